//! Owns how things look to a person: sizes, times, tables, and what other machines call things made
//! harmless for a terminal. The only writer of stdout.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use console::{Alignment, measure_text_width, pad_str, style, truncate_str};
use potluck_core::id::PeerId;

/// The narrowest a column is squeezed to.
const NARROWEST_COLUMN: usize = 8;
/// Between two columns.
const GAP: &str = "  ";

/// Writes a line to stdout. Where nobody reads it any more (`potluck ls | head`), the work is done:
/// the process ends.
pub(crate) fn out(text: &str) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        if error.kind() == io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        err(&format!("potluck: cannot write the result: {error}"));
        std::process::exit(1);
    }
}

/// Writes a line to stderr. That nobody reads it is no reason to stop.
pub(crate) fn err(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// `999 B`, `1.5 kB`, `131.4 GB`: base 1000.
pub(crate) fn size(bytes: u64) -> String {
    let (value, unit) = scaled(bytes, unit_of(bytes));
    format!("{value} {unit}")
}

/// `15.8/131.4 GB`: both in the unit of the second.
pub(crate) fn pair(done: u64, total: u64) -> String {
    let power = unit_of(total);
    let (total, unit) = scaled(total, power);
    // Always with its decimal, so that what follows does not jump to and fro.
    let decimals = usize::from(power > 0);
    let done = done as f64 / 1000_f64.powi(i32::from(power));
    format!("{done:.decimals$}/{total} {unit}")
}

/// `112 MB/s`, `2.9 GB/s`: no more digits than matter.
pub(crate) fn rate(bytes_a_second: u64) -> String {
    let power = unit_of(bytes_a_second);
    let value = bytes_a_second as f64 / 1000_f64.powi(i32::from(power));
    let decimals = usize::from(power > 0 && value < 99.95);
    format!("{value:.decimals$} {}/s", UNITS[usize::from(power)])
}

/// `up 20 MB/s, down no limit`
pub(crate) fn limits(up: Option<u64>, down: Option<u64>) -> String {
    let one = |limit: Option<u64>| limit.map_or_else(|| "no limit".into(), rate);
    format!("up {}, down {}", one(up), one(down))
}

const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];

/// Which unit, so that one decimal never rounds up to 1000.
fn unit_of(bytes: u64) -> u8 {
    let (mut power, mut left) = (0, bytes);
    while left >= 1000 {
        left /= 1000;
        power += 1;
    }
    let value = bytes as f64 / 1000_f64.powi(i32::from(power));
    if power > 0 && value >= 999.95 { power + 1 } else { power }
}

fn scaled(bytes: u64, power: u8) -> (String, &'static str) {
    let value = bytes as f64 / 1000_f64.powi(i32::from(power));
    let text = if power == 0 { bytes.to_string() } else { format!("{value:.1}") };
    let text = text.strip_suffix(".0").map_or(text.clone(), str::to_owned);
    (text, UNITS[usize::from(power).min(UNITS.len() - 1)])
}

/// `340 ms`, `3.2 s`, `17 min`, `2 h 5 min`, `3 days`.
pub(crate) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match seconds {
        0 => format!("{} ms", time.as_millis()),
        1..=9 => format!("{:.1} s", time.as_secs_f64()),
        10..=99 => format!("{seconds} s"),
        100..3600 => format!("{minutes} min"),
        3600..172_800 if minutes % 60 == 0 => format!("{hours} h"),
        3600..172_800 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A time that is known in whole seconds.
pub(crate) fn age(seconds: u64) -> String {
    if seconds == 0 { "under 1 s".into() } else { span(Duration::from_secs(seconds)) }
}

/// Text of another machine, made harmless: what would steer the terminal or make the text read
/// otherwise than it is shows as `\u{…}`.
pub(crate) fn plain(text: &str) -> String {
    escaped(text, |_| false)
}

/// The same for text that may have several lines.
pub(crate) fn plain_lines(text: &str) -> String {
    escaped(text, |c| c == '\n')
}

fn escaped(text: &str, keep: impl Fn(char) -> bool) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        let deceptive = c.is_control()
            || matches!(c, '\u{061C}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}'
                | '\u{2060}'..='\u{2069}' | '\u{FEFF}');
        if deceptive && !keep(c) {
            plain.extend(c.escape_unicode());
        } else {
            plain.push(c);
        }
    }
    plain
}

/// A path for a person: `./x` where it is in the current folder.
pub(crate) fn path(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    match path.strip_prefix(&here) {
        Ok(rest) if here.parent().is_some() && !rest.as_os_str().is_empty() => {
            plain(&format!("./{}", rest.display()))
        }
        _ => plain(&path.display().to_string()),
    }
}

/// A path as a result: untouched for a program, harmless for a terminal.
pub(crate) fn path_result(path: &Path) -> String {
    let text = path.display().to_string();
    if io::stdout().is_terminal() { plain(&text) } else { text }
}

/// `name`, `name@2`, or the id where it has no name.
pub(crate) fn title(name: Option<&str>, version: Option<u32>, id: &str) -> String {
    match (name, version) {
        (Some(name), Some(version)) if version > 1 => plain(&format!("{name}@{version}")),
        (Some(name), _) => plain(name),
        (None, _) => content(id),
    }
}

/// A content id's first 12 digits, with the `/` of a folder.
pub(crate) fn content(id: &str) -> String {
    let folder = if id.ends_with('/') { "/" } else { "" };
    let digits: String = id.trim_end_matches('/').chars().take(12).collect();
    plain(&format!("{digits}{folder}"))
}

/// A machine's id, short; whatever else it is, as it is.
pub(crate) fn machine(id: &str) -> String {
    id.parse::<PeerId>().map_or_else(|_| plain(id), |id| id.short())
}

/// `text` as one word of a shell.
pub(crate) fn quoted(text: &str) -> String {
    let tame = |c: char| c.is_alphanumeric() || "-_./@:,+=%…".contains(c);
    let text = plain(text);
    if !text.is_empty() && text.chars().all(tame) && !text.starts_with('-') {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// `1 machine`, `3 machines`.
pub(crate) fn count(n: u64, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// A thousandth part as a percentage.
pub(crate) fn permille(thousandths: u16) -> String {
    format!("{} %", thousandths / 10)
}

/// Rows under headings, aligned, and squeezed into a terminal's width where it goes to one.
pub(crate) struct Table {
    columns: Vec<(&'static str, Alignment)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Headings; one that begins with `>` is set to the right, as numbers are.
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        let column = |heading: &&'static str| match heading.strip_prefix('>') {
            Some(heading) => (heading, Alignment::Right),
            None => (*heading, Alignment::Left),
        };
        Self { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// One more row. Cells are made harmless here, whatever they hold.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| plain(&cell)).collect());
    }

    /// Writes it to stdout.
    pub(crate) fn print(&self) {
        let terminal = console::Term::stdout();
        let width = terminal.is_term().then(|| usize::from(terminal.size().1));
        let mut lines = self.lines(width).into_iter();
        if let Some(head) = lines.next() {
            out(&style(head).bold().to_string());
        }
        lines.for_each(|line| out(&line));
    }

    /// As text, for stderr.
    pub(crate) fn text(&self) -> String {
        self.lines(None).join("\n")
    }

    fn lines(&self, width: Option<usize>) -> Vec<String> {
        let widths = self.widths(width);
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for ((cell, (_, side)), &width) in cells.zip(&self.columns).zip(&widths) {
                if !line.is_empty() {
                    line.push_str(GAP);
                }
                line.push_str(&pad_str(&truncate_str(cell, width, "…"), width, *side, None));
            }
            line.trim_end().to_owned()
        };
        let mut lines = vec![line(&mut self.columns.iter().map(|(heading, _)| *heading))];
        lines.extend(self.rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
        lines
    }

    /// As wide as the widest cell; where that is too much, the widest columns give way.
    fn widths(&self, width: Option<usize>) -> Vec<usize> {
        let widest = |(at, (heading, _)): (usize, &(&str, Alignment))| {
            let cells = self.rows.iter().filter_map(|row| row.get(at));
            let cells = cells.map(|cell| measure_text_width(cell)).max().unwrap_or(0);
            cells.max(measure_text_width(heading))
        };
        let mut widths: Vec<usize> = self.columns.iter().enumerate().map(widest).collect();
        let Some(room) = width else { return widths };
        let gaps = GAP.len() * widths.len().saturating_sub(1);
        let mut over = (widths.iter().sum::<usize>() + gaps).saturating_sub(room);
        while over > 0 {
            let Some(widest) = widths.iter_mut().max() else { break };
            if *widest <= NARROWEST_COLUMN {
                break;
            }
            *widest -= 1;
            over -= 1;
        }
        widths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_at_a_glance() {
        let sizes = [0, 999, 1000, 1500, 64_000_000, 131_412_345_678, 999_960, u64::MAX];
        let texts: Vec<_> = sizes.into_iter().map(size).collect();
        let want = ["0 B", "999 B", "1 kB", "1.5 kB", "64 MB", "131.4 GB", "1 MB", "18.4 EB"];
        assert_eq!(texts, want);
        assert_eq!(pair(15_800_000_000, 131_400_000_000), "15.8/131.4 GB");
        assert_eq!(pair(1_000_000, 3_000_000), "1.0/3 MB");
        assert_eq!(pair(0, 0), "0/0 B");
        assert_eq!(rate(112_300_000), "112 MB/s");
        assert_eq!(rate(2_900_000_000), "2.9 GB/s");
        assert_eq!(rate(7), "7 B/s");
    }

    #[test]
    fn times_are_read_at_a_glance() {
        let spans = [0, 3, 75, 1020, 7200, 7500, 300_000].map(Duration::from_secs).map(span);
        assert_eq!(spans, ["0 ms", "3.0 s", "75 s", "17 min", "2 h", "2 h 5 min", "3 days"]);
    }

    #[test]
    fn what_other_machines_say_cannot_steer_the_terminal() {
        let nasty = "a\u{1b}[31mred\u{7}\r\n\u{202e}gpj.exe\u{9b}2J";
        let shown = plain(nasty);
        assert!(!shown.chars().any(char::is_control), "{shown}");
        assert_eq!(shown, "a\\u{1b}[31mred\\u{7}\\u{d}\\u{a}\\u{202e}gpj.exe\\u{9b}2J");
        assert_eq!(plain("größe 日本"), "größe 日本");
        let mut table = Table::new(&["NAME"]);
        table.row([nasty.to_owned()]);
        assert!(!table.lines(None).concat().contains('\u{1b}'));
    }

    #[test]
    fn a_table_is_aligned_and_fits_the_terminal() {
        let mut table = Table::new(&["NAME", ">SIZE", "ID"]);
        table.row(["a-rather-long-name-of-a-thing".into(), "1.5 GB".into(), "abc".into()]);
        table.row(["日本".into(), "12 B".into(), String::new()]);
        assert_eq!(
            table.lines(None),
            [
                "NAME                             SIZE  ID",
                "a-rather-long-name-of-a-thing  1.5 GB  abc",
                "日本                             12 B",
            ]
        );
        assert_eq!(
            table.lines(Some(25)),
            ["NAME            SIZE  ID", "a-rather-lo…  1.5 GB  abc", "日本            12 B"]
        );
    }

    #[test]
    fn a_command_to_type_survives_the_shell() {
        assert_eq!(quoted("llama-70b@2"), "llama-70b@2");
        assert_eq!(quoted("my film"), "'my film'");
        assert_eq!(quoted("it's; rm -rf"), "'it'\\''s; rm -rf'");
        assert_eq!(quoted("-rf"), "'-rf'");
    }
}
