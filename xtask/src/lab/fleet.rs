//! Owns potluck's own part in the lab: an index, a seed and fetchers, each in a namespace.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use potluck::control::{Event, IfExists, Request, Source};
use potluck::daemon::Client;

use super::net::{address, namespace};
use super::swarm::{Arrival, Players};
use crate::proc::{Machine, Place};

/// A fetcher that finds nobody to fetch from for so long says so.
const NO_SOURCE_S: u64 = 60;

pub(super) struct Fleet {
    /// The seed, then the fetchers.
    machines: Vec<Machine>,
    contents: Vec<String>,
    _index: Machine,
}

impl Fleet {
    /// Hosts 0 (the seed) to `fetchers`; the index is the one behind them.
    pub(super) fn start(
        potluck: &Path,
        under: &Path,
        fetchers: usize,
        files: &[PathBuf],
        hashes: &[blake3::Hash],
    ) -> Result<Self> {
        let place = |host| Place {
            core: None,
            namespace: Some(namespace(host)),
            address: address(host).into(),
            port: 0,
            logs: true,
            args: vec![],
        };
        let (index, _) = Machine::index_at(potluck, under, &place(fetchers + 1))?;
        let invited = index.asks(["invite", "--uses", &(fetchers + 1).to_string()])?;
        let Event::Invited { invite, .. } = invited else { bail!("invite said {invited:?}") };
        let machines = (0..=fetchers).map(|host| {
            let machine =
                Machine::start(potluck, under, "up", &format!("host{host}"), &place(host))?;
            machine.asks(["join", &invite])?;
            Ok(machine)
        });
        let machines: Vec<Machine> = machines.collect::<Result<_>>()?;
        let contents = files.iter().zip(hashes).map(|(file, hash)| {
            let shared = machines[0].asks([&"share".into(), file])?;
            let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };
            ensure!(id == hash.to_string(), "potluck share found another hash");
            Ok(id)
        });
        let contents = contents.collect::<Result<_>>()?;
        Ok(Self { machines, contents, _index: index })
    }
}

impl Players for Fleet {
    fn fetch(&mut self, host: usize, tell: &Sender<Arrival>) -> Result<()> {
        for (content, id) in self.contents.iter().enumerate() {
            let to = self.copy(host, content);
            let client = Client::connect(&self.machines[host].socket())?
                .with_context(|| format!("host {host} does not run"))?;
            let exists = IfExists::Refuse;
            let get = Request::Get { what: id.clone(), to, exists, timeout_s: NO_SOURCE_S };
            let tell = tell.clone();
            // It ends with the process that it asks.
            thread::spawn(move || {
                let got = follow(client, &get);
                let _ = tell.send(Arrival { host, content, at: Instant::now(), got });
            });
        }
        Ok(())
    }

    fn pid(&self, host: usize) -> Option<u32> {
        self.machines.get(host).map(Machine::pid)
    }

    fn copy(&self, host: usize, content: usize) -> PathBuf {
        self.machines[host].home.join(format!("copy-{content}"))
    }

    fn duplicate_bytes(&self, arrivals: &[Arrival]) -> Option<u64> {
        let mut twice = 0;
        for (host, machine) in self.machines.iter().enumerate() {
            let mine = arrivals.iter().filter(|arrival| arrival.host == host);
            if host > 0 && mine.filter(|a| a.got.is_ok()).count() < self.contents.len() {
                continue; // It may not even answer.
            }
            match machine.asks(["status"]) {
                Ok(Event::Status(status)) => {
                    twice += status.stats.fetched.duplicate_bytes;
                    let said = Event::Status(status).to_line().unwrap_or_default();
                    let _ = fs::write(machine.home.join("status"), said);
                }
                _ if host == 0 => {} // It may have been killed.
                _ => return None,
            }
        }
        Some(twice)
    }
}

/// Waits for the result of a fetch.
fn follow(client: Client, get: &Request) -> Result<Vec<Source>> {
    let mut result = None;
    for event in client.request(get)? {
        result = Some(event?);
    }
    match result.context("no answer")? {
        Event::Done { sources, .. } => Ok(sources),
        Event::Failed { error, .. } => bail!("{error}"),
        other => bail!("get said {other:?}"),
    }
}
