//! Owns what an index says of itself to its operator: counts for a screen, and the text that
//! Prometheus reads. Never a secret, and never a name or an id: who asks may be anybody on this machine.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use potluck_core::registrar::Stats;

/// What an index has and did since it started.
#[derive(Clone, Debug, Default)]
pub struct IndexStatus {
    /// What it thinks.
    pub stats: Stats,
    /// What each worker took, gave and used.
    pub workers: Vec<Traffic>,
    /// How writing goes.
    pub journal: JournalStatus,
    /// Bytes of memory the process has (RSS); 0 where the system does not say.
    pub memory: u64,
    /// How long it has been running.
    pub uptime: Duration,
}

/// How an index's state gets to its disk.
#[derive(Clone, Debug, Default)]
pub struct JournalStatus {
    /// Why what changes now would be lost at a restart, where it would.
    pub trouble: Option<String>,
    /// Changes that wait to be written.
    pub waiting: usize,
    /// Groups written.
    pub commits: u64,
    /// Rows written in them.
    pub rows: u64,
    /// Times that writing failed.
    pub failures: u64,
}

/// What one worker did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Datagrams taken, and their bytes.
    pub taken: u64,
    /// See `taken`.
    pub bytes_taken: u64,
    /// Datagrams sent, and their bytes.
    pub given: u64,
    /// See `given`.
    pub bytes_given: u64,
    /// How long it was not asleep.
    pub busy: Duration,
}

/// The same, being counted.
#[derive(Default)]
pub(super) struct Tally {
    taken: AtomicU64,
    bytes_taken: AtomicU64,
    given: AtomicU64,
    bytes_given: AtomicU64,
    busy_us: AtomicU64,
}

impl Tally {
    /// One batch more.
    pub(super) fn add(&self, taken: (usize, usize), given: (usize, usize), busy: Duration) {
        let add = |to: &AtomicU64, n: usize| to.fetch_add(n as u64, Ordering::Relaxed);
        add(&self.taken, taken.0);
        add(&self.bytes_taken, taken.1);
        add(&self.given, given.0);
        add(&self.bytes_given, given.1);
        self.busy_us.fetch_add(busy.as_micros() as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Traffic {
        let read = |of: &AtomicU64| of.load(Ordering::Relaxed);
        Traffic {
            taken: read(&self.taken),
            bytes_taken: read(&self.bytes_taken),
            given: read(&self.given),
            bytes_given: read(&self.bytes_given),
            busy: Duration::from_micros(read(&self.busy_us)),
        }
    }
}

/// Bytes of memory that this process has.
pub(super) fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    kib.unwrap_or(0) * 1024
}

impl IndexStatus {
    /// Requests answered, by PDU letter, however they were answered.
    pub fn requests(&self) -> BTreeMap<char, u64> {
        let mut all = BTreeMap::new();
        for ((pdu, _), count) in &self.stats.requests {
            *all.entry(*pdu).or_default() += count;
        }
        all
    }

    /// What was not done, by why: refused with a code, or dropped without a byte.
    pub fn refusals(&self) -> BTreeMap<String, u64> {
        let mut all: BTreeMap<String, u64> = BTreeMap::new();
        for ((_, code), count) in &self.stats.requests {
            if let Some(code) = code {
                *all.entry(format!("{code:?}")).or_default() += count;
            }
        }
        for (code, count) in &self.stats.items_refused {
            *all.entry(format!("{code:?}")).or_default() += count;
        }
        for (why, count) in &self.stats.dropped {
            *all.entry(format!("{why:?}")).or_default() += count;
        }
        all
    }

    /// Prometheus's text format, version 0.0.4.
    pub fn to_prometheus(&self) -> String {
        let Self { stats, workers, journal, memory, uptime } = self;
        let mut text = Text::default();
        text.head(
            "requests_total",
            "counter",
            "Datagrams answered, by PDU and by code of refusal.",
        );
        for ((pdu, code), count) in &stats.requests {
            let code = code.map_or_else(|| "done".to_owned(), |code| format!("{code:?}"));
            text.row("requests_total", &format!("pdu=\"{pdu}\",code=\"{code}\""), count);
        }
        text.head("items_refused_total", "counter", "Registrations refused within an answered R.");
        for (code, count) in &stats.items_refused {
            text.row("items_refused_total", &format!("code=\"{code:?}\""), count);
        }
        text.head("dropped_total", "counter", "Datagrams dropped without a byte back.");
        for (why, count) in &stats.dropped {
            text.row("dropped_total", &format!("reason=\"{why:?}\""), count);
        }
        for (name, help, value) in [
            ("notices_total", "Notices pushed to watchers.", stats.notices),
            ("leases_lapsed_total", "Members whose lease lapsed.", stats.lapsed),
            (
                "repeats_total",
                "Times a member was asked to register everything again.",
                stats.repeats,
            ),
            ("journal_commits_total", "Groups of rows written to disk.", journal.commits),
            ("journal_rows_total", "Rows written to disk.", journal.rows),
            ("journal_failures_total", "Times that writing to disk failed.", journal.failures),
        ] {
            text.one(name, "counter", help, value);
        }
        for (name, help, value) in [
            ("members", "Members that were not removed.", stats.members),
            ("contents", "Contents with a host.", stats.counts.contents),
            ("names", "Names, hosted now or not.", stats.counts.names),
            ("hosts", "Members that host something.", stats.counts.hosts),
            ("registrations", "Pairs of content and host.", stats.counts.registrations),
            ("watchers", "Members that watch the listing.", stats.watchers),
            ("sessions", "Sessions whose replay windows are kept.", stats.sessions),
            ("memory_reckoned_bytes", "Memory that the limit is held against.", stats.memory),
            ("journal_waiting_rows", "Changes that wait to be written.", journal.waiting),
            (
                "journal_healthy",
                "1: what changes is written to disk. 0: it is in memory only.",
                usize::from(journal.trouble.is_none()),
            ),
        ] {
            text.one(name, "gauge", help, value);
        }
        text.one("memory_resident_bytes", "gauge", "Memory of the process.", memory);
        text.one("uptime_seconds", "gauge", "Since it started.", uptime.as_secs());
        type Of = fn(&Traffic) -> f64;
        let by_worker: [(&str, &str, Of); 5] = [
            ("datagrams_in_total", "Datagrams taken.", |worker| worker.taken as f64),
            ("bytes_in_total", "Their bytes.", |worker| worker.bytes_taken as f64),
            ("datagrams_out_total", "Datagrams sent.", |worker| worker.given as f64),
            ("bytes_out_total", "Their bytes.", |worker| worker.bytes_given as f64),
            ("worker_busy_seconds_total", "Time it was not asleep.", |worker| {
                worker.busy.as_secs_f64()
            }),
        ];
        for (name, help, of) in by_worker {
            text.head(name, "counter", help);
            for (nth, worker) in workers.iter().enumerate() {
                text.row(name, &format!("worker=\"{nth}\""), of(worker));
            }
        }
        text.0
    }
}

/// Metrics, one behind the other.
#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP potluck_index_{name} {help}");
        let _ = writeln!(self.0, "# TYPE potluck_index_{name} {kind}");
    }

    fn row(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = writeln!(self.0, "potluck_index_{name}{{{labels}}} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.head(name, kind, help);
        let _ = writeln!(self.0, "potluck_index_{name} {value}");
    }
}

#[cfg(test)]
mod tests {
    use potluck_core::registrar::Dropped;
    use potluck_core::wire::datagram::Code;

    use super::*;

    #[test]
    fn every_metric_is_told_once_with_its_kind() {
        let mut status = IndexStatus { workers: vec![Traffic::default(); 2], ..Default::default() };
        status.stats.requests.insert(('S', None), 7);
        status.stats.requests.insert(('S', Some(Code::NotFound)), 2);
        status.stats.requests.insert(('R', Some(Code::TooFast)), 1);
        status.stats.items_refused.insert(Code::TooFast, 4);
        status.stats.dropped.insert(Dropped::Forged, 3);
        assert_eq!(status.requests(), BTreeMap::from([('S', 9), ('R', 1)]));
        let refusals = status.refusals();
        assert_eq!((refusals["TooFast"], refusals["NotFound"], refusals["Forged"]), (5, 2, 3));

        let text = status.to_prometheus();
        assert!(text.contains("\npotluck_index_requests_total{pdu=\"S\",code=\"NotFound\"} 2\n"));
        assert!(text.contains("\npotluck_index_journal_healthy 1\n"));
        let mut known = BTreeMap::new();
        for line in text.lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(known.insert(name, kind).is_none(), "{name} is told twice");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            } else if !line.starts_with('#') {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(known.contains_key(name.split('{').next().unwrap()), "{line}");
            }
        }
    }
}
