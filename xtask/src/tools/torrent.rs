//! Owns the BitTorrent clients: verified by SHA-1, not encrypted.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Host, Tool, folder_of, missing_of};
use crate::proc::{self, Running};

/// The one that sees the system's packages.
const PYTHON: &str = "/usr/bin/python3";

/// What peers of a torrent need to know.
#[derive(Default)]
struct Torrent {
    /// Where there is one.
    tracker: Option<SocketAddr>,
    file: PathBuf,
    seed: String,
}

/// libtorrent, over TCP.
#[derive(Default)]
pub(crate) struct Libtorrent(Torrent);

/// aria2 as a BitTorrent client: it needs a tracker.
#[derive(Default)]
pub(crate) struct Aria2Torrent(Torrent);

/// rqbit: without a tracker.
#[derive(Default)]
pub(crate) struct Rqbit(Torrent);

impl Torrent {
    fn tracked(tracker: SocketAddr) -> Self {
        Self { tracker: Some(tracker), ..Self::default() }
    }

    /// Describes `what` as a torrent.
    fn make(&mut self, at: &Host, what: &Path) -> Result<()> {
        self.file = at.home.join("torrent");
        self.seed = if self.tracker.is_some() { String::new() } else { at.address().to_string() };
        let tracker = self.tracker.map(|at| format!("http://{at}/announce")).unwrap_or_default();
        let mut make = python(at)?;
        make.arg("make").arg(what).arg(&self.file).arg(tracker);
        proc::output(&mut make).map(drop)
    }
}

impl Libtorrent {
    pub(crate) fn tracked(tracker: SocketAddr) -> Self {
        Self(Torrent::tracked(tracker))
    }

    fn peer(&self, role: &str, at: &Host, folder: &Path) -> Result<Command> {
        let mut peer = python(at)?;
        peer.arg(role).arg(&self.0.file).arg(folder);
        peer.arg(at.place.address.to_string()).arg(at.place.port.to_string());
        Ok(peer)
    }
}

impl Tool for Libtorrent {
    fn name(&self) -> &'static str {
        "libtorrent, TCP"
    }

    fn missing(&self) -> Option<&'static str> {
        no_libtorrent()
    }

    fn is_swarm(&self) -> bool {
        true
    }

    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running> {
        self.0.make(at, what)?;
        let mut seed = at.start(&mut self.peer("seed", at, folder_of(what)?)?)?;
        at.wait_until_it_listens(&mut seed)?;
        Ok(seed)
    }

    fn fetch(&self, at: &Host, into: &Path, done: Option<&Path>) -> Result<Command> {
        let mut peer = self.peer("fetch", at, into)?;
        peer.arg(&self.0.seed).arg(done.unwrap_or(Path::new("")));
        Ok(peer)
    }
}

impl Aria2Torrent {
    pub(crate) fn tracked(tracker: SocketAddr) -> Self {
        Self(Torrent::tracked(tracker))
    }

    fn peer(&self, at: &Host, folder: &Path) -> Result<Command> {
        let mut aria2 = at.command("aria2c")?;
        aria2.args(["--no-conf", "--quiet", "--enable-dht=false", "--enable-dht6=false"]);
        aria2.args(["--bt-enable-lpd=false", "--disable-ipv6=true", "--seed-ratio=0.0"]);
        aria2.args(["--file-allocation=none", "--bt-max-peers=0"]);
        aria2.arg(format!("--listen-port={}", at.place.port)).arg("--dir").arg(folder);
        Ok(aria2)
    }
}

impl Tool for Aria2Torrent {
    fn name(&self) -> &'static str {
        "aria2, BitTorrent"
    }

    fn missing(&self) -> Option<&'static str> {
        missing_of(&["aria2c"]).or_else(no_libtorrent)
    }

    fn is_swarm(&self) -> bool {
        true
    }

    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running> {
        self.0.make(at, what)?;
        let mut seed = self.peer(at, folder_of(what)?)?;
        seed.args(["--bt-seed-unverified=true", "--allow-overwrite=true"]).arg(&self.0.file);
        let mut seed = at.start(&mut seed)?;
        at.wait_until_it_listens(&mut seed)?;
        Ok(seed)
    }

    fn fetch(&self, at: &Host, into: &Path, done: Option<&Path>) -> Result<Command> {
        let mut peer = self.peer(at, into)?;
        let done = done.context("aria2 goes on serving")?;
        let hook = at.home.join("done.sh");
        fs::write(&hook, format!("#!/bin/sh\n: > '{}'\n", done.display()))?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
        peer.arg("--on-bt-download-complete").arg(hook).arg(&self.0.file);
        Ok(peer)
    }
}

impl Rqbit {
    fn peer(at: &Host) -> Result<Command> {
        let mut rqbit = at.command("rqbit")?;
        let (ip, port) = (at.place.address, at.place.port);
        rqbit.args(["--disable-dht", "--disable-upnp-port-forward", "--disable-lsd"]);
        rqbit.args(["--listen-ip", &ip.to_string(), "--listen-port", &port.to_string()]);
        // Any port will do for what nobody asks.
        rqbit.args(["--http-api-listen-addr", &format!("{ip}:0")]);
        Ok(rqbit)
    }
}

impl Tool for Rqbit {
    fn name(&self) -> &'static str {
        "rqbit"
    }

    fn missing(&self) -> Option<&'static str> {
        missing_of(&["rqbit"]).or_else(no_libtorrent)
    }

    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running> {
        self.0.make(at, what)?;
        // It sets the length of what it seeds, which others then take for changed.
        let own = at.home.join("own");
        fs::create_dir(&own)?;
        proc::output(Command::new("cp").arg("-r").arg(what).arg(&own))?;
        let mut seed = Self::peer(at)?;
        seed.args(["download", "--overwrite", "-o"]).arg(&own).arg(&self.0.file);
        let mut seed = at.start(&mut seed)?;
        at.wait_until_it_listens(&mut seed)?;
        Ok(seed)
    }

    fn fetch(&self, at: &Host, into: &Path, _: Option<&Path>) -> Result<Command> {
        let mut peer = Self::peer(at)?;
        peer.args(["download", "--exit-on-finish", "--overwrite", "--initial-peers"]);
        peer.arg(&self.0.seed).arg("-o").arg(into).arg(&self.0.file);
        Ok(peer)
    }
}

/// The script that is libtorrent's peer.
fn python(at: &Host) -> Result<Command> {
    let script = at.home.join("torrent.py");
    fs::write(&script, include_str!("torrent.py"))?;
    let mut python = at.place.command(Path::new(PYTHON));
    python.current_dir(&at.home).arg(script);
    Ok(python)
}

fn no_libtorrent() -> Option<&'static str> {
    let mut try_it = Command::new(PYTHON);
    let there = proc::output(try_it.args(["-c", "import libtorrent"])).is_ok();
    (!there).then_some("python3-libtorrent")
}
