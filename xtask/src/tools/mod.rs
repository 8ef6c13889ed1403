//! Owns how other programs are run, so that potluck is measured beside them: one small adapter each.
//! Never installs anything: a program that is not here is said to be missing.

mod rsync;
mod sendme;
mod torrent;
mod tracker;
mod web;

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub(crate) use self::rsync::Rsync;
pub(crate) use self::sendme::Sendme;
pub(crate) use self::torrent::{Aria2Torrent, Libtorrent, Rqbit};
pub(crate) use self::tracker::Tracker;
pub(crate) use self::web::{Aria2, Curl};
use crate::proc::{self, Place, Running};

/// How long a source may take until it serves, in steps of [`STEP`].
const STEPS: u32 = 3000;
const STEP: Duration = Duration::from_millis(10);

/// A program that brings a file or folder from one host to others.
pub(crate) trait Tool {
    /// What it is called in tables.
    fn name(&self) -> &'static str;

    /// A program it takes that is not installed.
    fn missing(&self) -> Option<&'static str>;

    /// Whether a fetcher goes on serving, so that it ends only when it is ended.
    fn is_swarm(&self) -> bool {
        false
    }

    /// Starts the source of `what`, and returns when it serves.
    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running>;

    /// A command that fetches it, under its own name, into a folder. It ends when all of it is there;
    /// but where `done` is given, a swarm's fetcher makes that file then, and goes on serving.
    fn fetch(&self, at: &Host, into: &Path, done: Option<&Path>) -> Result<Command>;
}

/// Where a tool runs, and a folder for what it needs beside.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) place: Place,
    pub(crate) home: PathBuf,
}

impl Host {
    /// A host on the loopback, with a port that is free and a folder that is new.
    pub(crate) fn here(home: PathBuf) -> Result<Self> {
        fs::create_dir(&home)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        Ok(Self { place: Place { port, ..Place::here() }, home })
    }

    /// A command of a program that is installed.
    fn command(&self, program: &str) -> Result<Command> {
        let path = proc::find(program).with_context(|| format!("{program} is not installed"))?;
        let mut command = self.place.command(&path);
        command.current_dir(&self.home);
        Ok(command)
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(self.place.address, self.place.port)
    }

    /// Starts a source; what it says goes to a log.
    fn start(&self, command: &mut Command) -> Result<Running> {
        let log = fs::File::create(self.home.join("log"))?;
        command.stdin(std::process::Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Running(command.spawn().with_context(|| format!("cannot run {command:?}"))?))
    }

    /// Waits until something listens at its address.
    fn wait_until_it_listens(&self, source: &mut Running) -> Result<()> {
        self.wait_until(source, || {
            if self.place.namespace.is_none() {
                return Ok(TcpStream::connect(self.address()).is_ok());
            }
            let mut command = self.command("ss")?;
            let filter = format!("sport = :{}", self.place.port);
            let text = proc::output(command.args(["-H", "-l", "-n", "-t", &filter]))?;
            Ok(!text.trim().is_empty())
        })
    }

    fn wait_until(
        &self,
        source: &mut Running,
        mut ready: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        for _ in 0..STEPS {
            let ended = source.0.try_wait()?;
            ensure!(ended.is_none(), "the source ended: {}", self.log());
            if ready()? {
                return Ok(());
            }
            thread::sleep(STEP);
        }
        anyhow::bail!("the source does not serve: {}", self.log())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.home.join("log")).unwrap_or_default()
    }
}

/// The first of these programs that is not installed.
fn missing_of(programs: &[&'static str]) -> Option<&'static str> {
    programs.iter().copied().find(|program| proc::find(program).is_none())
}

/// The last part of a path.
fn name_of(what: &Path) -> Result<&str> {
    what.file_name().and_then(|name| name.to_str()).context("a path has a name")
}

/// The folder something lies in.
fn folder_of(what: &Path) -> Result<&Path> {
    what.parent().context("a path lies in a folder")
}
