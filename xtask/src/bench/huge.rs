//! Owns the measurement of a huge file: what a peer needs to share it, to begin again, to verify it
//! and to resume a fetch of it. The file is all hole, so that it takes no room; every byte of it is
//! read and hashed nevertheless.

use std::fs::{self, File};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use potluck::control::{Event, IfExists, Request, Status};
use potluck::daemon::Client;

use super::{SPARE, Setting, room};
use crate::proc::{self, Machine, Place};
use crate::table::Table;

/// Bytes of the file.
const SIZE: u64 = 200_000_000_000;
/// A fetch is stopped when it has so much.
const SOME: u64 = 1 << 30;

pub(super) fn run(setting: &Setting) -> Result<()> {
    let (potluck, dir) = (&setting.potluck, &setting.dir);
    let (_index, invite) = Machine::index(potluck, dir, None)?;
    let mut source = Machine::peer(potluck, dir, "source", &invite)?;
    let file = source.home.join("file");
    File::create_new(&file)?.set_len(SIZE)?;
    println!("## Huge: a file of {} GB that is all hole\n", SIZE / 1_000_000_000);
    let mut table = Table::new(&["", "s", "peak RSS MiB"]);
    let row = |what: &str, seconds: f64, machine: &Machine| -> Result<[String; 3]> {
        let rss = proc::memory(machine.pid(), "VmHWM")?;
        Ok([what.to_owned(), format!("{seconds:.2}"), format!("{rss:.0}")])
    };

    let began = Instant::now();
    let shared = source.asks(["share".as_ref(), file.as_os_str()])?;
    table.row(row("share: hash, proofs, register", began.elapsed().as_secs_f64(), &source)?);
    let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };

    source.stop()?;
    let began = Instant::now();
    source = source.again(&Place::here())?;
    while status(&source)?.contents.iter().all(|content| content.state != "sharing") {
        std::thread::yield_now();
    }
    table.row(row(
        "begin again: process started until it shares",
        began.elapsed().as_secs_f64(),
        &source,
    )?);

    if room(dir)? < SIZE + SPARE {
        table.row(["fetch: not measured, there is no room for the copy".to_owned()]);
    } else {
        let mut fetcher = Machine::peer(potluck, dir, "fetcher", &invite)?;
        let (first, _) = fetch_some(&fetcher, &id)?;
        let what = format!("fetch: until the first of {} MiB are there", SOME >> 20);
        table.row(row(&what, first, &fetcher)?);
        fetcher.kill()?;
        fetcher = fetcher.again(&Place::here())?;
        let (first, have) = fetch_some(&fetcher, &id)?;
        ensure!(have > 0, "the fetch began from nothing");
        table.row(row("resume after SIGKILL: until more is there", first, &fetcher)?);
    }

    let began = Instant::now();
    let verified = source.asks(["verify", &id])?;
    let Event::Verified { good, .. } = verified else { bail!("verify said {verified:?}") };
    ensure!(good == [id], "it is not what was shared");
    table.row(row("verify", began.elapsed().as_secs_f64(), &source)?);
    println!("{table}");
    fs::remove_file(file)?;
    Ok(())
}

/// Fetches until there is some more; the seconds to the first of it, and what was there before.
fn fetch_some(fetcher: &Machine, id: &str) -> Result<(f64, u64)> {
    let client = Client::connect(&fetcher.socket())?.context("the fetcher does not run")?;
    let (to, exists) = (fetcher.home.join("copy"), IfExists::Refuse);
    let began = Instant::now();
    let (mut first, mut had) = (None, None);
    let get = Request::Get { what: id.to_owned(), to, exists, timeout_s: 30 };
    for event in client.request(&get)? {
        match event? {
            Event::Fetching { have, .. } => had = Some(have),
            Event::Progress { done, .. } => {
                let had = *had.get_or_insert(0);
                if done > had && first.is_none() {
                    first = Some(began.elapsed().as_secs_f64());
                }
                if let Some(first) = first.filter(|_| done >= had + SOME) {
                    return Ok((first, had));
                }
            }
            Event::Failed { error, .. } => bail!("{error}"),
            _ => {}
        }
    }
    bail!("the fetch ended")
}

fn status(machine: &Machine) -> Result<Status> {
    match machine.asks(["status"])? {
        Event::Status(status) => Ok(*status),
        other => bail!("status said {other:?}"),
    }
}
