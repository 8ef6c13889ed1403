//! Owns what a person sees of a standing index: one screen at the terminal's end, renewed every second,
//! above which the log goes on. Never knows more than the index's status.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use potluck::{IndexLimits, IndexStatus};

use crate::render::{err, plain, rate, size, span};

/// Between two pictures.
pub(crate) const EVERY: Duration = Duration::from_secs(1);
/// What is refused most is shown, so many reasons of it.
const MOST_REASONS: usize = 5;

/// The screen that is shown, if any: who logs must lift it first.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// A screen; when dropped, it stands still.
pub(crate) struct Screen {
    bar: ProgressBar,
    before: IndexStatus,
}

impl Screen {
    pub(crate) fn new(status: IndexStatus) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(4));
        // A template that does not parse would show the default bar: no reason to fail.
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            bar.set_style(style);
        }
        *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
        Self { bar, before: status }
    }

    pub(crate) fn show(&mut self, status: IndexStatus, limits: &IndexLimits) {
        self.bar.set_message(picture(&self.before, &status, limits));
        self.bar.tick();
        self.before = status;
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // The last picture stays. (To take it away would miss a line: the terminal writes ^C below it.)
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
        err("");
    }
}

/// Where the log goes: stderr, above the screen where there is one.
pub(crate) struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let bar = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match bar {
            Some(bar) => bar.suspend(|| io::stderr().write(line)),
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// `1234567` as people read it.
fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (nth, digit) in digits.chars().enumerate() {
        if nth > 0 && (digits.len() - nth).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What there is now, and how fast it went since before.
fn picture(before: &IndexStatus, now: &IndexStatus, limits: &IndexLimits) -> String {
    let seconds = now.uptime.saturating_sub(before.uptime).as_secs_f64();
    let a_second = |after: u64, before: u64| {
        if seconds > 0.0 {
            (after.saturating_sub(before) as f64 / seconds).round() as u64
        } else {
            0
        }
    };
    let (stats, counts) = (&now.stats, now.stats.counts);
    let mut lines: Vec<(&str, String)> = vec![];

    let (asked, asked_before) = (now.requests(), before.requests());
    let of = |pdu| {
        let get = |all: &std::collections::BTreeMap<char, u64>| all.get(&pdu).copied();
        a_second(get(&asked).unwrap_or(0), get(&asked_before).unwrap_or(0))
    };
    let kinds =
        [('R', "register"), ('S', "search"), ('O', "list"), ('T', "withdraw"), ('W', "watch")];
    let mut text = number(kinds.iter().map(|(pdu, _)| of(*pdu)).sum());
    for (pdu, name) in kinds {
        let _ = write!(text, "   {name} {}", number(of(pdu)));
    }
    lines.push(("requests/s", text));

    let sum = |status: &IndexStatus| {
        status.workers.iter().fold((0, 0, 0.0), |(taken, given, busy), worker| {
            let more = worker.busy.as_secs_f64();
            (taken + worker.bytes_taken, given + worker.bytes_given, busy + more)
        })
    };
    let ((taken, given, busy), (taken_before, given_before, busy_before)) = (sum(now), sum(before));
    let share = if seconds > 0.0 { (busy - busy_before) / seconds } else { 0.0 };
    lines.push((
        "traffic",
        format!(
            "in {}   out {}   {:.0} % of {}",
            rate(a_second(taken, taken_before)),
            rate(a_second(given, given_before)),
            100.0 * share / now.workers.len().max(1) as f64,
            crate::render::count(now.workers.len() as u64, "worker", "workers"),
        ),
    ));
    lines.push((
        "members",
        format!(
            "{}   sessions {}   watchers {}   hosts {}",
            number(stats.members as u64),
            number(stats.sessions as u64),
            number(stats.watchers as u64),
            number(counts.hosts as u64),
        ),
    ));
    lines.push((
        "contents",
        format!(
            "{}   names {}   registrations {}",
            number(counts.contents as u64),
            number(counts.names as u64),
            number(counts.registrations as u64),
        ),
    ));
    let mut refused: Vec<(String, u64)> = now.refusals().into_iter().collect();
    refused.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    refused.truncate(MOST_REASONS);
    let refused = refused.iter().map(|(why, count)| format!("{why} {}", number(*count)));
    let refused = refused.collect::<Vec<_>>().join("   ");
    lines.push(("refused", if refused.is_empty() { "nothing".into() } else { refused }));
    lines.push((
        "memory",
        format!(
            "{}   {:.0} % of what it may take",
            size(now.memory),
            100.0 * stats.memory as f64 / limits.memory.max(1) as f64,
        ),
    ));
    let disk = match &now.journal.trouble {
        Some(why) => format!("NOT WRITTEN, in memory only: {}", plain(why)),
        None => format!("{} rows written", number(now.journal.rows)),
    };
    lines.push(("disk", disk));
    lines.push(("up", span(now.uptime)));
    let lines = lines.iter().map(|(what, text)| format!("{what:>12}  {text}"));
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use potluck::Traffic;

    use super::*;

    #[test]
    fn the_picture_shows_rates_since_the_last_and_what_there_is() {
        let mut before = IndexStatus { workers: vec![Traffic::default(); 2], ..Default::default() };
        before.uptime = Duration::from_secs(10);
        let mut now = before.clone();
        now.uptime = Duration::from_secs(12);
        now.stats.requests.insert(('S', None), 2_468);
        now.stats.members = 1_234_567;
        now.workers[1].bytes_taken = 4_000_000;
        now.workers[1].busy = Duration::from_secs(1);
        now.stats.memory = 1 << 29;
        let text = picture(&before, &now, &IndexLimits::default());
        let has = |line: &str| assert!(text.contains(line), "{line:?} is not in\n{text}");
        has("  requests/s  1,234   register 0   search 1,234   list 0");
        has("     traffic  in 2.0 MB/s   out 0 B/s   25 % of 2 workers");
        has("     members  1,234,567   sessions 0");
        has("     refused  nothing");
        has("50 % of what it may take");
        has("        disk  0 rows written");
        now.journal.trouble = Some("no\u{1b}[2J room".into());
        let text = picture(&now, &now, &IndexLimits::default());
        assert!(text.contains("NOT WRITTEN, in memory only: no\\u{1b}[2J room"), "{text}");
    }
}
