//! Owns the rsync daemon as a source: neither encrypted nor verified.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::{Host, Tool, folder_of, missing_of, name_of};
use crate::proc::Running;

#[derive(Default)]
pub(crate) struct Rsync {
    url: String,
}

impl Tool for Rsync {
    fn name(&self) -> &'static str {
        "rsync daemon"
    }

    fn missing(&self) -> Option<&'static str> {
        missing_of(&["rsync"])
    }

    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running> {
        let config = at.home.join("rsyncd.conf");
        let (dir, files) = (at.home.display(), folder_of(what)?.display());
        let (address, port) = (at.place.address, at.place.port);
        let text = format!(
            "use chroot = no
address = {address}
port = {port}
pid file = {dir}/pid
log file = {dir}/rsync.log
reverse lookup = no
[files]
path = {files}
read only = yes
uid = 0
gid = 0
"
        );
        let text = if rustix::process::geteuid().is_root() {
            text
        } else {
            text.replace("uid = 0\ngid = 0\n", "")
        };
        fs::write(&config, text)?;
        let mut rsync = at.command("rsync")?;
        rsync.args(["--daemon", "--no-detach", "--config"]).arg(config);
        let mut daemon = at.start(&mut rsync)?;
        at.wait_until_it_listens(&mut daemon)?;
        self.url = format!("rsync://{}/files/{}", at.address(), name_of(what)?);
        Ok(daemon)
    }

    fn fetch(&self, at: &Host, into: &Path, _: Option<&Path>) -> Result<Command> {
        let mut rsync = at.command("rsync")?;
        rsync.arg("--archive").arg(&self.url).arg(into);
        Ok(rsync)
    }
}
