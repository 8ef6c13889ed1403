//! Owns one run in the lab: hosts are set up, fetchers begin, blows fall when they are due, and what
//! came of it is counted. Never knows which program the hosts run.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::net::{Net, Traffic};
use super::scenario::{Blow, SLOW_MBIT, Scenario};
use crate::bench::hash_of;
use crate::proc::{self, Busy};

/// How often the cables are looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How often the processes' memory is: a run has some, and the kernel keeps the highest value.
const MEMORY_LOOK: Duration = Duration::from_millis(250);
/// A run is given up after so many times the bound, and so many seconds.
const PATIENCE_BOUNDS: f64 = 12.0;
const PATIENCE_S: f64 = 20.0;
/// What frames of Ethernet, IP and TCP add to a byte.
const FRAMING: f64 = 1.046;

/// A program that distributes contents, set up: the seed serves, and fetchers can begin.
pub(super) trait Players {
    /// Has a fetcher (1 …) begin. When it has a content, verified and under its final name, that is
    /// told.
    fn fetch(&mut self, host: usize, tell: &Sender<Arrival>) -> Result<()>;
    /// The process of a host: 0 is the seed.
    fn pid(&self, host: usize) -> Option<u32>;
    /// Where a fetcher puts a content.
    fn copy(&self, host: usize, content: usize) -> PathBuf;
    /// Bytes of pieces that fetchers received though they had them, where the program tells.
    fn duplicate_bytes(&self, arrivals: &[Arrival]) -> Option<u64>;
}

/// A fetcher has a content, or will not get it.
pub(super) struct Arrival {
    pub(super) host: usize,
    pub(super) content: usize,
    pub(super) at: Instant,
    /// Who sent how much, where the program tells.
    pub(super) got: Result<Vec<potluck::control::Source>>,
}

/// What came of a run.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Seconds until the last of those who began at once has everything; none: not all of them do.
    pub(super) seconds: Option<f64>,
    /// Seconds that the late one took, from its own beginning.
    pub(super) late_s: Option<f64>,
    /// Bytes on the seed's cable, in copies of the contents.
    pub(super) seed_copies: f64,
    /// Bytes received twice, in parts of all that were received once.
    pub(super) duplicates: Option<f64>,
    /// CPU seconds of all processes together.
    pub(super) cpu_s: f64,
    /// The most memory that one of them had, in MiB.
    pub(super) rss_mib: f64,
    /// The share of this machine's CPU time in use, and what of it was not the lab's.
    pub(super) busy: f64,
    pub(super) others: f64,
    /// Each fetcher's time for the last 1 % of the bytes, in hundredths of its whole time.
    pub(super) tails: Vec<f64>,
    /// Of several contents: when the last was complete everywhere, in times of the first.
    pub(super) fairness: Option<f64>,
    /// When the seed was killed.
    pub(super) seed_killed_s: Option<f64>,
    /// Those who should have completed and did not, with what they said of it.
    pub(super) missing: Vec<String>,
}

/// Runs a scenario once. `hashes` are what the contents should be.
pub(super) fn run(
    scenario: &Scenario,
    net: &Net,
    players: &mut dyn Players,
    hashes: &[blake3::Hash],
) -> Result<Outcome> {
    let (tell, told) = channel();
    let (cpu, busy) = (proc::everyone()?, Busy::now()?);
    let mut run = Run {
        scenario,
        net,
        players,
        tell,
        bound_s: scenario.bound_s(),
        began: Instant::now(),
        before: net.traffic()?,
        looks: vec![],
        arrivals: vec![],
        due: due(scenario),
        seed_killed_s: None,
        memory: BTreeMap::new(),
    };
    run.until_done(&told)?;
    let seconds = run.elapsed();
    let busy_after = Busy::now()?;
    let cpu_s = proc::everyone()? - cpu;
    run.look_at_memory()?;
    let programs = busy_after.programs - busy.programs - cpu_s;
    let available = seconds * busy.cores;
    let mut outcome = run.outcome()?;
    outcome.cpu_s = cpu_s;
    outcome.busy = (busy_after.all - busy.all) / available;
    outcome.others = (programs / available).clamp(0.0, 1.0);
    for arrival in run.arrivals.iter().filter(|arrival| arrival.got.is_ok()) {
        let copy = run.players.copy(arrival.host, arrival.content);
        let says = || format!("host {} says it has {}", arrival.host, copy.display());
        let hash = hash_of(&copy).with_context(says)?;
        ensure!(hash == hashes[arrival.content], "{} is not what was shared", copy.display());
    }
    Ok(outcome)
}

/// What is to happen to whom.
#[derive(Clone, Copy)]
enum Event {
    Begin(usize),
    Strike(Blow, usize),
}

/// Everything that is to happen, the next at the end.
fn due(scenario: &Scenario) -> Vec<(f64, Event)> {
    let bound = scenario.bound_s();
    let mut due = vec![];
    for host in 1..=scenario.fetchers.len() {
        let late = scenario.late.filter(|_| host > scenario.early());
        due.push((late.map_or(0.0, |when| when.seconds(bound)), Event::Begin(host)));
    }
    for fault in &scenario.faults {
        due.push((fault.when.seconds(bound), Event::Strike(fault.what, fault.host)));
    }
    due.sort_by(|a, b| f64::total_cmp(&b.0, &a.0));
    due
}

struct Run<'a> {
    scenario: &'a Scenario,
    net: &'a Net,
    players: &'a mut dyn Players,
    tell: Sender<Arrival>,
    bound_s: f64,
    began: Instant,
    before: Vec<Traffic>,
    /// What each host has received, at each look.
    looks: Vec<(f64, Vec<u64>)>,
    arrivals: Vec<Arrival>,
    due: Vec<(f64, Event)>,
    seed_killed_s: Option<f64>,
    /// The most memory of each process, in MiB.
    memory: BTreeMap<u32, f64>,
}

impl Run<'_> {
    fn elapsed(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn bytes(&self) -> f64 {
        (self.scenario.size * self.scenario.contents as u64) as f64
    }

    fn until_done(&mut self, told: &Receiver<Arrival>) -> Result<()> {
        let mut memory_at = self.began;
        let last = self.due.first().map_or(0.0, |(at, _)| *at);
        let patience = PATIENCE_BOUNDS * self.bound_s + PATIENCE_S + last;
        while !self.is_done() && self.elapsed() < patience {
            while self.due.last().is_some_and(|(at, _)| *at <= self.elapsed()) {
                let (_, event) = self.due.pop().context("it was just there")?;
                self.happen(event)?;
            }
            let traffic = self.net.traffic()?;
            self.looks.push((self.elapsed(), traffic.iter().map(|host| host.received).collect()));
            let sent = (traffic[0].sent - self.before[0].sent) as f64 / self.bytes();
            let fatal = self.scenario.kill_seed_after.is_some_and(|copies| sent >= copies);
            if fatal && self.seed_killed_s.is_none() {
                self.look_at_memory()?;
                self.happen(Event::Strike(Blow::Kill, 0))?;
                self.seed_killed_s = Some(self.elapsed());
            }
            if memory_at.elapsed() > MEMORY_LOOK {
                memory_at = Instant::now();
                self.look_at_memory()?;
            }
            match told.recv_timeout(LOOK) {
                Ok(arrival) => self.arrivals.push(arrival),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("this holds a sender"),
            }
            self.arrivals.extend(told.try_iter());
        }
        Ok(())
    }

    /// Whether all who are expected to have everything, or have given up.
    fn is_done(&self) -> bool {
        let survivors = (1..=self.scenario.fetchers.len()).filter(|h| self.scenario.survives(*h));
        let of = |host| self.arrivals.iter().filter(move |arrival| arrival.host == host);
        survivors.into_iter().all(|host| of(host).count() == self.scenario.contents)
    }

    fn happen(&mut self, event: Event) -> Result<()> {
        let (blow, host) = match event {
            Event::Begin(host) => return self.players.fetch(host, &self.tell),
            Event::Strike(blow, host) => (blow, host),
        };
        let signal = match blow {
            // The first host of the net is the seed.
            Blow::Slow => return self.net.shape(host, SLOW_MBIT),
            Blow::Kill => Signal::KILL,
            Blow::Stop => Signal::STOP,
            Blow::Resume => Signal::CONT,
        };
        let pid = self.players.pid(host).and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(pid.with_context(|| format!("host {host} has no process"))?, signal)?;
        Ok(())
    }

    fn look_at_memory(&mut self) -> Result<()> {
        for pid in proc::processes()?.into_iter().filter(|pid| *pid != std::process::id()) {
            // It may have ended between two looks.
            if let Ok(mib) = proc::memory(pid, "VmHWM") {
                self.memory.insert(pid, mib);
            }
        }
        Ok(())
    }

    fn outcome(&self) -> Result<Outcome> {
        let mut outcome = Outcome { seed_killed_s: self.seed_killed_s, ..Outcome::default() };
        let sent = self.net.traffic()?[0].sent - self.before[0].sent;
        outcome.seed_copies = sent as f64 / self.bytes();
        outcome.rss_mib = self.memory.values().copied().fold(0.0, f64::max);
        let mut last = 0.0_f64;
        for host in (1..=self.scenario.fetchers.len()).filter(|h| self.scenario.survives(*h)) {
            let late = host > self.scenario.early();
            match self.finish(host) {
                Ok(finish) if late => outcome.late_s = Some(finish - self.start(host)),
                Ok(finish) => last = last.max(finish),
                Err(why) => outcome.missing.push(format!("host {host}: {why:#}")),
            }
            if let Ok(finish) = self.finish(host) {
                outcome.tails.push(self.tail(host, finish));
            }
        }
        outcome.seconds = outcome.missing.is_empty().then_some(last);
        outcome.fairness = self.fairness();
        let useful =
            self.arrivals.iter().filter(|a| a.got.is_ok()).count() as u64 * self.scenario.size;
        let twice = self.players.duplicate_bytes(&self.arrivals);
        outcome.duplicates = twice.map(|bytes| bytes as f64 / useful.max(1) as f64);
        Ok(outcome)
    }

    /// When a fetcher began.
    fn start(&self, host: usize) -> f64 {
        let late = self.scenario.late.filter(|_| host > self.scenario.early());
        late.map_or(0.0, |when| when.seconds(self.bound_s))
    }

    /// When a fetcher had everything.
    fn finish(&self, host: usize) -> Result<f64> {
        let mut last = 0.0_f64;
        let mine = || self.arrivals.iter().filter(|arrival| arrival.host == host);
        for arrival in mine() {
            if let Err(why) = &arrival.got {
                anyhow::bail!("{why:#}");
            }
            last = last.max((arrival.at - self.began).as_secs_f64());
        }
        ensure!(
            mine().count() == self.scenario.contents,
            "not complete after {:.0} s",
            self.elapsed()
        );
        Ok(last)
    }

    /// How long the last hundredth of the bytes took, in hundredths of the whole.
    fn tail(&self, host: usize, finish: f64) -> f64 {
        let until = self.looks.partition_point(|(at, _)| *at <= finish);
        let Some((_, all)) = self.looks[..until].last() else { return f64::NAN };
        let most = all[host].saturating_sub((self.bytes() * FRAMING / 100.0) as u64);
        let before = self.looks[..until].partition_point(|(_, received)| received[host] <= most);
        let from = before.checked_sub(1).map_or(0.0, |nth| self.looks[nth].0);
        (finish - from) / (finish - self.start(host)) * 100.0
    }

    fn fairness(&self) -> Option<f64> {
        let done = |content| {
            let of = self.arrivals.iter().filter(move |a| a.content == content && a.got.is_ok());
            of.map(|arrival| (arrival.at - self.began).as_secs_f64()).fold(0.0, f64::max)
        };
        let all: Vec<f64> = (0..self.scenario.contents).map(done).collect();
        let (first, last) =
            (all.iter().copied().fold(f64::MAX, f64::min), all.iter().copied().fold(0.0, f64::max));
        (all.len() > 1 && first > 0.0).then(|| last / first)
    }
}

/// Keeps what the hosts logged, and what they said of themselves at the end.
pub(super) fn keep_logs(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        for kept in ["log", "status"] {
            let file = entry.path().join(kept);
            if file.is_file() {
                fs::copy(file, to.join(entry.file_name()).with_extension(kept))?;
            }
        }
    }
    Ok(())
}
