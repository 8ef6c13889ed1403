//! Owns what is tried in the lab: how many hosts, how fast, what befalls them and when, and the
//! bound that no way to distribute a file can beat there.

use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

use potluck_core::dice::Dice;

use super::net::{Link, Weather};

/// One seed, some fetchers, and what befalls them.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) title: String,
    /// Bytes of each content.
    pub(super) size: u64,
    pub(super) contents: usize,
    pub(super) seed: Link,
    pub(super) fetchers: Vec<Link>,
    pub(super) weather: Weather,
    /// The last fetcher begins only then.
    pub(super) late: Option<When>,
    /// The seed is killed when it has sent so many copies.
    pub(super) kill_seed_after: Option<f64>,
    pub(super) faults: Vec<Fault>,
    /// Three hosts are struck by chance, others in each run: one is slow from some moment on, one
    /// stands still, and one dies.
    pub(super) chance: bool,
}

/// A moment of a run, counted from when the first fetchers begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum When {
    Seconds(f64),
    /// In parts of the bound.
    Bound(f64),
}

/// Something that befalls a host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fault {
    pub(super) what: Blow,
    /// 0: the seed; 1: the first fetcher …
    pub(super) host: usize,
    pub(super) when: When,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blow {
    /// `SIGKILL`.
    Kill,
    /// `SIGSTOP`: its kernel goes on to take and acknowledge what fits in its buffers.
    Stop,
    /// `SIGCONT`.
    Resume,
    /// It sends at [`SLOW_MBIT`] from now on.
    Slow,
}

/// By chance a host is struck up to this moment, in thousandths of the bound.
const LAST_BLOW: u64 = 950;

/// What a slow host still sends, in Mbit/s.
pub(super) const SLOW_MBIT: f64 = 2.0;

impl Scenario {
    /// What is tried in this run of it.
    pub(super) fn in_run(&self, nth: u32) -> Self {
        let mut scenario = self.clone();
        if self.chance {
            let mut dice = Dice(u64::from(nth));
            let mut hosts: Vec<usize> = (1..=self.fetchers.len()).collect();
            for what in [Blow::Slow, Blow::Stop, Blow::Kill] {
                let host = hosts.swap_remove(dice.below(hosts.len() as u64) as usize);
                let when = When::Bound(dice.below(LAST_BLOW) as f64 / 1000.0);
                scenario.faults.push(Fault { what, host, when });
            }
        }
        scenario
    }

    /// Seconds in which no way to distribute the contents can be done: Kumar and Ross, "Peer-assisted
    /// file distribution: the minimum distribution time" (2006). The seed has to send everything
    /// once, each fetcher has to receive it, and all copies go over the uplinks that there are.
    /// It counts the file's bytes alone; frames of Ethernet, IP and TCP take 4.6 % more.
    pub(super) fn bound_s(&self) -> f64 {
        let survivors = (1..=self.early()).filter(|host| self.survives(*host));
        let downs: Vec<f64> = survivors.map(|host| rate(self.fetchers[host - 1].down)).collect();
        let slowest = downs.iter().copied().fold(f64::INFINITY, f64::min);
        let each = self.all_up(self.fetchers.len()) / downs.len() as f64;
        self.longest(&[rate(self.seed.up), slowest, each])
    }

    /// Likewise for the late one alone, from when it begins: it has to receive everything, from all
    /// the others, and cannot be done before the seed has sent everything once.
    pub(super) fn late_bound_s(&self) -> Option<f64> {
        let began = self.late?.seconds(self.bound_s());
        let late = self.fetchers.last()?;
        let own = self.longest(&[rate(late.down), self.all_up(self.fetchers.len() - 1)]);
        Some(own.max(self.longest(&[rate(self.seed.up)]) - began))
    }

    /// Fetchers that begin at once.
    pub(super) fn early(&self) -> usize {
        self.fetchers.len() - usize::from(self.late.is_some())
    }

    /// Whether a host is expected to complete.
    pub(super) fn survives(&self, host: usize) -> bool {
        let mut alive = true;
        for fault in self.faults.iter().filter(|fault| fault.host == host) {
            match fault.what {
                Blow::Kill => return false,
                Blow::Stop => alive = false,
                Blow::Resume => alive = true,
                Blow::Slow => {}
            }
        }
        alive
    }

    /// Bytes a second that the seed and this many fetchers can send.
    fn all_up(&self, fetchers: usize) -> f64 {
        let fetchers = self.fetchers.iter().take(fetchers).map(|link| rate(link.up));
        rate(self.seed.up) + fetchers.sum::<f64>()
    }

    fn longest(&self, rates: &[f64]) -> f64 {
        let bytes = (self.size * self.contents as u64) as f64;
        rates.iter().map(|rate| bytes / rate).fold(0.0, f64::max)
    }
}

/// Bytes a second.
fn rate(mbit: f64) -> f64 {
    if mbit > 0.0 { mbit * 1e6 / 8.0 } else { f64::INFINITY }
}

impl When {
    pub(super) fn seconds(self, bound_s: f64) -> f64 {
        match self {
            Self::Seconds(s) => s,
            Self::Bound(part) => part * bound_s,
        }
    }
}

impl FromStr for When {
    type Err = Error;

    /// `2s`: seconds; `0.5`: parts of the bound.
    fn from_str(text: &str) -> Result<Self> {
        let seconds = text.strip_suffix('s');
        let number: f64 = seconds.unwrap_or(text).parse().context("a moment is 0.5 or 2s")?;
        ensure!(number >= 0.0 && number.is_finite(), "a moment is not before the beginning");
        Ok(if seconds.is_some() { Self::Seconds(number) } else { Self::Bound(number) })
    }
}

impl FromStr for Fault {
    type Err = Error;

    /// `kill:2@0.5`.
    fn from_str(text: &str) -> Result<Self> {
        let form = "a fault looks like kill:2@0.5 (kill, stop, resume or slow; fetcher; moment)";
        let (what, rest) = text.split_once(':').context(form)?;
        let (host, when) = rest.split_once('@').context(form)?;
        let what = match what {
            "kill" => Blow::Kill,
            "stop" => Blow::Stop,
            "resume" => Blow::Resume,
            "slow" => Blow::Slow,
            _ => bail!(form),
        };
        Ok(Self { what, host: host.parse().context(form)?, when: when.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn equal(n: usize) -> Scenario {
        let link = Link { up: 80.0, down: 80.0 };
        Scenario {
            title: String::new(),
            size: 10_000_000,
            contents: 1,
            seed: link,
            fetchers: vec![link; n],
            weather: Weather::default(),
            late: None,
            kill_seed_after: None,
            faults: vec![],
            chance: false,
        }
    }

    #[test]
    fn equal_links_need_the_time_of_one_copy_however_many_there_are() {
        assert_eq!(equal(1).bound_s(), 1.0);
        assert_eq!(equal(16).bound_s(), 1.0);
        assert_eq!(Scenario { contents: 2, ..equal(4) }.bound_s(), 2.0);
    }

    #[test]
    fn the_narrowest_of_seed_downlink_and_all_uplinks_is_the_bound() {
        let seed = |up| Scenario { seed: Link { up, down: 0.0 }, ..equal(4) };
        assert_eq!(seed(40.0).bound_s(), 2.0);
        let mut slow_down = equal(4);
        slow_down.fetchers[2].down = 20.0;
        assert_eq!(slow_down.bound_s(), 4.0);
        let mut no_uplinks = equal(4);
        no_uplinks.fetchers.iter_mut().for_each(|link| link.up = 20.0);
        assert_eq!(no_uplinks.bound_s(), 2.0, "four copies over 80 + 4 × 20 Mbit/s");
        assert_eq!(seed(0.0).bound_s(), 1.0, "no cap is no bound");
    }

    #[test]
    fn who_dies_needs_no_copy_and_who_only_stalls_does() {
        let mut scenario = equal(2);
        scenario.fetchers[0].down = 8.0;
        assert_eq!(scenario.bound_s(), 10.0);
        scenario.faults = vec!["stop:1@0.5".parse().unwrap()];
        assert_eq!(scenario.bound_s(), 1.0);
        scenario.faults.push("resume:1@2s".parse().unwrap());
        assert_eq!(scenario.bound_s(), 10.0);
    }

    #[test]
    fn the_late_one_waits_for_its_own_link_or_for_the_seed() {
        let late = |when| Scenario { late: Some(when), ..equal(8) };
        assert_eq!(late(When::Bound(0.5)).late_bound_s(), Some(1.0));
        let mut wide = late(When::Bound(0.5));
        wide.fetchers[7].down = 800.0;
        assert_eq!(wide.late_bound_s(), Some(0.5), "the seed's other half");
        assert_eq!(equal(8).late_bound_s(), None);
    }

    #[test]
    fn chance_strikes_three_hosts_and_in_each_run_the_same() {
        let scenario = Scenario { chance: true, ..equal(8) };
        for nth in 0..100 {
            let run = scenario.in_run(nth);
            let mut struck: Vec<usize> = run.faults.iter().map(|fault| fault.host).collect();
            struck.sort_unstable();
            struck.dedup();
            assert_eq!(struck.len(), 3);
            assert!(struck[0] >= 1 && struck[2] <= 8);
            assert_eq!((1..=8).filter(|host| run.survives(*host)).count(), 6);
            assert_eq!(run.faults, scenario.in_run(nth).faults);
        }
    }

    #[test]
    fn moments_and_faults_are_read_as_they_are_written() {
        assert_eq!("0.5".parse::<When>().unwrap(), When::Bound(0.5));
        assert_eq!("2s".parse::<When>().unwrap(), When::Seconds(2.0));
        let slow = Fault { what: Blow::Slow, host: 3, when: When::Seconds(0.0) };
        assert_eq!("slow:3@0s".parse::<Fault>().unwrap(), slow);
        for wrong in ["kill", "kill:2", "eat:2@1", "kill:x@1", "kill:1@-1", "kill:1@soon"] {
            assert!(wrong.parse::<Fault>().is_err(), "{wrong}");
        }
    }
}
