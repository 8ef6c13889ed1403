//! Owns another tool's part in the lab: its source on the seed, its fetchers on all other hosts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::net::{SWITCH, address, namespace};
use super::swarm::{Arrival, Players};
use crate::proc::{Place, Running};
use crate::tools::{Host, Tool, Tracker};

/// Where the tracker listens, on the switch itself.
const TRACKER_PORT: u16 = 6969;
/// Where every host's program listens.
const PORT: u16 = 7000;
/// How often is looked whether a fetcher is done.
const LOOK: Duration = Duration::from_millis(5);
/// How long a seed may take to be known to the tracker, in such looks.
const LOOKS: u32 = 4000;

pub(super) struct Crowd {
    tool: Box<dyn Tool>,
    hosts: Vec<Host>,
    what: PathBuf,
    seed: Running,
    fetchers: Vec<Option<Arc<Mutex<Running>>>>,
}

/// A tracker for all runs.
pub(super) fn tracker() -> Result<Tracker> {
    Tracker::start(([0, 0, 0, 0], TRACKER_PORT).into())
}

/// Where hosts find it.
pub(super) fn tracker_address() -> std::net::SocketAddr {
    (SWITCH, TRACKER_PORT).into()
}

impl Crowd {
    pub(super) fn start(
        mut tool: Box<dyn Tool>,
        under: &Path,
        fetchers: usize,
        files: &[PathBuf],
        tracker: &Tracker,
    ) -> Result<Self> {
        ensure!(files.len() == 1, "{} is tried with one content", tool.name());
        let host = |nth: usize| {
            let home = under.join(format!("host{nth}"));
            fs::create_dir(&home)?;
            let place = Place {
                core: None,
                namespace: Some(namespace(nth)),
                address: address(nth).into(),
                port: PORT,
                logs: true,
                args: vec![],
            };
            Ok(Host { place, home })
        };
        let hosts: Vec<Host> = (0..=fetchers).map(host).collect::<Result<_>>()?;
        tracker.forget();
        let mut seed = tool.serve(&hosts[0], &files[0])?;
        let mut looks = 0;
        while tool.is_swarm() && tracker.peers() == 0 {
            looks += 1;
            ensure!(looks < LOOKS && seed.0.try_wait()?.is_none(), "no seed at the tracker");
            thread::sleep(LOOK);
        }
        let fetchers = vec![None; hosts.len()];
        Ok(Self { tool, hosts, what: files[0].clone(), seed, fetchers })
    }
}

impl Players for Crowd {
    fn fetch(&mut self, host: usize, tell: &Sender<Arrival>) -> Result<()> {
        let at = &self.hosts[host];
        let into = at.home.join("copies");
        fs::create_dir(&into)?;
        let done = at.home.join("done");
        let mut command = self.tool.fetch(at, &into, Some(&done))?;
        let log = fs::File::create(at.home.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let fetcher = Running(command.spawn().with_context(|| format!("cannot run {command:?}"))?);
        let fetcher = Arc::new(Mutex::new(fetcher));
        self.fetchers[host] = Some(Arc::clone(&fetcher));
        let tell = tell.clone();
        thread::spawn(move || {
            let got = wait(&fetcher, &done).map(|()| vec![]);
            let _ = tell.send(Arrival { host, content: 0, at: Instant::now(), got });
        });
        Ok(())
    }

    fn pid(&self, host: usize) -> Option<u32> {
        if host == 0 {
            return Some(self.seed.pid());
        }
        let fetcher = self.fetchers.get(host)?.as_ref()?;
        Some(fetcher.lock().unwrap_or_else(PoisonError::into_inner).pid())
    }

    fn copy(&self, host: usize, _: usize) -> PathBuf {
        self.hosts[host].home.join("copies").join(self.what.file_name().unwrap_or_default())
    }

    fn duplicate_bytes(&self, _: &[Arrival]) -> Option<u64> {
        None
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // Those who wait for one hold it too.
        for fetcher in self.fetchers.iter().flatten() {
            let mut fetcher = fetcher.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = fetcher.0.kill();
            let _ = fetcher.0.wait();
        }
    }
}

/// Waits until a fetcher is done: it has made the file that says so, or has ended well.
fn wait(fetcher: &Mutex<Running>, done: &Path) -> Result<()> {
    loop {
        if done.exists() {
            return Ok(());
        }
        match fetcher.lock().unwrap_or_else(PoisonError::into_inner).0.try_wait()? {
            None => {}
            Some(ended) if ended.success() => return Ok(()),
            Some(ended) => bail!("it failed ({ended})"),
        }
        thread::sleep(LOOK);
    }
}
