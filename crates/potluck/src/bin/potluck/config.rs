//! Owns the file of an index's settings that may change while it runs (`potluck index --config`): lines
//! `name = value`, a small part of TOML. A file with anything wrong in it is refused as a whole.

use std::path::Path;

use potluck::{Error, ErrorKind, IndexLimits, Result};

/// What a file may set.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Config {
    pub(crate) limits: IndexLimits,
    /// A filter of the log, as `POTLUCK_LOG` takes it.
    pub(crate) log: Option<String>,
}

/// The longest file: far more than all settings take.
const MOST_BYTES: u64 = 64 << 10;

/// Reads a file.
///
/// # Errors
/// It cannot be read, or something in it is not understood: which line, and what could stand there.
pub(crate) fn read(path: &Path) -> Result<Config> {
    let problem = |why: String| {
        Error::new(ErrorKind::Usage, format!("{}: {why}", path.display()))
            .hint("potluck help index says what may stand there")
    };
    let meta = std::fs::metadata(path).map_err(|e| problem(e.to_string()))?;
    if meta.len() > MOST_BYTES {
        return Err(problem(format!("it is longer than {MOST_BYTES} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|e| problem(e.to_string()))?;
    parse(&text).map_err(problem)
}

fn parse(text: &str) -> Result<Config, String> {
    let mut config = Config::default();
    let mut seen = vec![];
    for (nth, line) in text.lines().enumerate() {
        // No value that means anything holds a `#`.
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |why: &str| format!("line {}: {why}", nth + 1);
        let Some((name, value)) = line.split_once('=') else {
            return Err(wrong("a setting looks like members = 1000"));
        };
        let (name, value) = (name.trim(), value.trim());
        if seen.contains(&name) {
            return Err(wrong(&format!("{name} is set twice")));
        }
        seen.push(name);
        let quoted = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        if name == "workers" {
            return Err(wrong(
                "workers are started with the index: potluck index --workers N, anew",
            ));
        }
        if name == "log" {
            let filter = quoted.ok_or_else(|| wrong("log is a text: log = \"info\""))?;
            tracing_subscriber::EnvFilter::try_new(filter)
                .map_err(|e| wrong(&format!("no filter of the log: {e}")))?;
            config.log = Some(filter.to_owned());
            continue;
        }
        let Some(limit) = config.limits.named(name) else {
            let known = IndexLimits::NAMES.join(", ");
            return Err(wrong(&format!("there is no setting {name}; there are: log, {known}")));
        };
        let number = if name == "memory" { bytes(quoted.unwrap_or(value)) } else { number(value) };
        *limit = number.ok_or_else(|| match name {
            "memory" => wrong("memory is a size: memory = \"2GB\""),
            _ => wrong(&format!("{name} is a whole number from 1: {name} = 10_000")),
        })?;
    }
    Ok(config)
}

/// `10_000`; not 0, which would shut everybody out.
fn number(text: &str) -> Option<usize> {
    let digits = text.replace('_', "");
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|number| plain && *number > 0)
}

/// `2GB`, `512MiB`, or bytes.
fn bytes(text: &str) -> Option<usize> {
    let units = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
    ];
    let unit = units.iter().find_map(|(unit, each)| Some((text.strip_suffix(unit)?.trim(), *each)));
    let (digits, each) = unit.unwrap_or((text, 1));
    number(digits)?.checked_mul(each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_the_rest_stays_as_it_is() {
        let config = parse(
            "# an index for a lab\n\nmembers = 10_000   # and no more\nmemory=\"2GB\"\nlog = \"warn,potluck=debug\"\n",
        );
        let limits =
            IndexLimits { members: 10_000, memory: 2_000_000_000, ..IndexLimits::default() };
        assert_eq!(config, Ok(Config { limits, log: Some("warn,potluck=debug".into()) }));
        assert_eq!(parse(""), Ok(Config::default()));
        assert_eq!(parse("memory = 512MiB").map(|config| config.limits.memory), Ok(512 << 20));
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_line() {
        for (text, why) in [
            ("\nmember = 3", "line 2: there is no setting member; there are: log, members"),
            ("members", "line 1: a setting looks like"),
            ("members = 0", "members is a whole number from 1"),
            ("members = -1", "members is a whole number from 1"),
            ("members = 1e3", "members is a whole number from 1"),
            ("members = +5", "members is a whole number from 1"),
            ("memory = \"2 potatoes\"", "memory is a size"),
            ("names = 3\nnames = 4", "line 2: names is set twice"),
            (
                "workers = 2",
                "line 1: workers are started with the index: potluck index --workers N",
            ),
            ("log = info", "log is a text"),
            ("log = \"=[\"", "no filter of the log"),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.contains(why), "{text:?}: {problem}");
        }
    }
}
