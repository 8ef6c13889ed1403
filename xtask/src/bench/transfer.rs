//! Owns the measurement of one big file, from one source to one fetcher, beside other tools.

use std::fs;

use anyhow::Result;

use super::race::race;
use super::{Setting, make_up};
use crate::tools::{Aria2, Curl, Libtorrent, Rqbit, Rsync, Sendme, Tool};

pub(super) fn run(setting: &Setting) -> Result<()> {
    let shelf = setting.dir.join("shelf");
    fs::create_dir(&shelf)?;
    let file = shelf.join("file");
    make_up(&file, setting.size)?;
    let (https, http) = (Curl::https(), Curl::http());
    let against = [("HTTPS", https.name()), ("HTTP", http.name())];
    let tools: Vec<Box<dyn Tool>> = vec![
        Box::new(https),
        Box::new(http),
        Box::<Rsync>::default(),
        Box::<Aria2>::default(),
        Box::<Libtorrent>::default(),
        Box::<Rqbit>::default(),
        Box::<Sendme>::default(),
    ];
    let race = race(setting, &file, tools)?;
    println!("## Transfer: one source, one fetcher, {} MiB over loopback\n", setting.size >> 20);
    println!("{}", race.table(&against));
    Ok(())
}
