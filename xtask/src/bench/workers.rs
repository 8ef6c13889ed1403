//! Owns the measurement of an index's second worker: what a request costs where two of them share one
//! registrar, against what it costs where there is one. Never a rate of two cores: who asks needs them
//! as well.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;
use potluck_core::trust::Invitation;

use super::Setting;
use super::index::{Apart, Crowd, MEMBERS};
use super::storm::{self, Batches, Requests};
use crate::proc::{Machine, Place, measure};
use crate::table::{Table, median};

/// Crowds that ask at once, each from an address of its own: as many as there are workers at the most.
const CROWDS: usize = 2;
/// Contents, with ten hosts each.
const CONTENTS: u32 = 10_000;
/// Requests of each crowd in one run.
const REQUESTS: usize = 200_000;
/// Sockets tried until one is another worker's: each is so in half of the cases.
const TRIES: usize = 64;

/// Two million requests, by turns, of an index with one worker and of one with two.
pub(super) fn run(setting: &Setting) -> Result<()> {
    let mut one = Under::start(setting, 1)?;
    let mut two = Under::start(setting, 2)?;
    let (mut of_one, mut of_two) = (vec![], vec![]);
    for nth in 0..setting.runs {
        of_one.push(one.run(nth.into())?);
        of_two.push(two.run(nth.into())?);
    }
    let heads = ["", "requests/s", "CPU s a million", "requests a CPU second", "× one worker"];
    let mut table = Table::new(&[&heads[..], &["taken by each"]].concat());
    let cpu = |runs: &[Run]| median(runs.iter().map(|run| run.cpu / run.answered * 1e6));
    for (name, runs) in [("one worker", &of_one), ("two workers", &of_two)] {
        let taken = runs.last().context("there was no run")?.taken.iter();
        let all = taken.clone().sum::<f64>();
        let shares: Vec<_> = taken.map(|some| format!("{:.0} %", 100.0 * some / all)).collect();
        table.row([
            name.to_owned(),
            format!("{:.0}", median(runs.iter().map(|run| run.answered / run.seconds))),
            format!("{:.2}", cpu(runs)),
            format!("{:.0}", 1e6 / cpu(runs)),
            format!("{:.2}", cpu(&of_one) / cpu(runs)),
            shares.join(", "),
        ]);
    }
    println!(
        "## Two workers: {MEMBERS} members at two addresses, {} registrations, two cores for index and members\n\n{table}\nRequests a CPU second, so that it counts nothing that those who ask take of the cores. What is below 1 in the last but one column is lost to the lock and to cache lines that both write; two cores of their own would carry at most twice that of one.\n",
        CONTENTS * 10,
    );
    Ok(())
}

struct Run {
    answered: f64,
    seconds: f64,
    cpu: f64,
    /// Datagrams that each worker took.
    taken: Vec<f64>,
}

/// An index, and the crowds that ask it.
struct Under {
    index: Machine,
    metrics: SocketAddr,
    crowds: Vec<Apart>,
}

impl Under {
    fn start(setting: &Setting, workers: usize) -> Result<Self> {
        let args = ["--workers", &workers.to_string(), "--metrics", "127.0.0.1:0"];
        let place = Place { args: args.map(str::to_owned).to_vec(), ..Place::here() };
        let name = format!("index-{workers}");
        let index = Machine::start(&setting.potluck, &setting.dir, "index", &name, &place)?;
        let Event::Ready { metrics: Some(metrics), .. } = &index.ready else {
            bail!("the index is not ready: {:?}", index.ready);
        };
        let metrics = metrics.parse()?;
        let invited = index.asks(["invite", "--uses", &MEMBERS.to_string()])?;
        let Event::Invited { invite, .. } = invited else { bail!("invite said {invited:?}") };
        let invitation: Invitation = invite.parse()?;
        let mut crowd = Crowd::join(&invitation, 0..MEMBERS)?;
        crowd.register_all(CONTENTS)?;
        let crowds = crowd.split(CROWDS)?;
        let mut under = Self { index, metrics, crowds };
        for nth in 0..CROWDS {
            under.lead(nth, nth % workers)?;
        }
        Ok(under)
    }

    /// Gives a crowd a socket whose datagrams this worker takes: the kernel chooses by address.
    fn lead(&mut self, nth: usize, worker: usize) -> Result<()> {
        let mut crowd = self.crowds.remove(nth).together()?;
        let index = crowd.batches.socket.peer_addr()?;
        for _ in 0..TRIES {
            crowd.batches = Batches::to(index)?;
            let before = taken(self.metrics)?;
            crowd.ask(0, &crowd.heartbeat(0))?;
            if taken(self.metrics)?[worker] > before[worker] {
                self.crowds.insert(nth, crowd.apart());
                return Ok(());
            }
        }
        bail!("worker {worker} takes nothing")
    }

    fn run(&mut self, dice: u64) -> Result<Run> {
        let mut prepared = vec![];
        for (nth, crowd) in self.crowds.drain(..).enumerate() {
            let mut crowd = crowd.together()?;
            crowd.refresh_cookies()?;
            let requests = crowd.prepare(REQUESTS, CONTENTS, dice << 8 | nth as u64);
            prepared.push((crowd.apart(), requests));
        }
        let before = taken(self.metrics)?;
        let pid = self.index.pid();
        let (done, cost) = measure(&[pid], || {
            let ask = move |(crowd, (first, requests)): (Apart, (u64, Requests))| -> Result<_> {
                let mut crowd = crowd.together()?;
                let mut batches = Batches::new(crowd.batches.socket.try_clone()?)?;
                let judge = |datagram: &mut [u8]| crowd.judge(datagram, first);
                let answered = storm::storm(pid, &mut batches, &requests, judge)?.answered;
                Ok((answered, crowd.apart()))
            };
            let threads: Vec<_> =
                prepared.into_iter().map(|one| thread::spawn(move || ask(one))).collect();
            let done = threads.into_iter().map(|t| t.join().ok().context("a crowd failed")?);
            done.collect::<Result<Vec<_>>>()
        })?;
        let after = taken(self.metrics)?;
        let taken = after.iter().zip(before).map(|(after, before)| after - before).collect();
        let answered = done.iter().map(|(answered, _)| *answered as f64).sum();
        self.crowds.extend(done.into_iter().map(|(_, crowd)| crowd));
        Ok(Run { answered, seconds: cost.seconds, cpu: cost.cpu[0], taken })
    }
}

/// Datagrams that each worker has taken.
fn taken(metrics: SocketAddr) -> Result<Vec<f64>> {
    let mut socket = TcpStream::connect(metrics)?;
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: index\r\n\r\n")?;
    let mut page = String::new();
    socket.read_to_string(&mut page)?;
    let counts = page.lines().filter_map(|line| {
        line.strip_prefix("potluck_index_datagrams_in_total{")?.split_once("} ")?.1.parse().ok()
    });
    let counts: Vec<f64> = counts.collect();
    ensure!(!counts.is_empty(), "the index says nothing of its workers");
    Ok(counts)
}
