//! Owns one source and one fetcher over loopback: potluck and other tools bring the same file or
//! folder from one to the other, in turn. Each copy is compared with what was sent.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use potluck::control::Event;

use super::{Runs, Setting, hash_of, is_in_memory};
use crate::proc::{self, Machine, measure};
use crate::table::{Table, median};
use crate::tools::{Host, Tool};

/// What potluck is called in tables.
const POTLUCK: &str = "potluck get";

/// Who took part, in the order of the table, and how long each took.
pub(super) struct Race {
    pub(super) entrants: Vec<Entrant>,
    /// Bytes that were brought.
    size: u64,
    /// Whether what is written is on a disk in the end.
    on_disk: bool,
}

pub(super) struct Entrant {
    name: &'static str,
    /// What it takes and is not installed.
    missing: Option<&'static str>,
    runs: Runs,
    /// Seconds until the copy is on the disk too, where that is a disk.
    durable: Vec<f64>,
}

/// Brings `what` over with potluck and all of `tools`, as often as the setting says. The order is
/// another in each run, so that none always follows the same one.
pub(super) fn race(setting: &Setting, what: &Path, tools: Vec<Box<dyn Tool>>) -> Result<Race> {
    let (potluck, dir) = (&setting.potluck, &setting.dir);
    let (_index, invite) = Machine::index(potluck, dir, None)?;
    let source = Machine::peer(potluck, dir, "source", &invite)?;
    let fetcher = Machine::peer(potluck, dir, "fetcher", &invite)?;
    let sent = Digest::of(what)?;
    let shared = source.asks(["share".as_ref(), what.as_os_str()])?;
    let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };
    let mut race = Race { entrants: vec![], size: sent.bytes, on_disk: !is_in_memory(dir)? };
    race.enter(POTLUCK, None);
    for tool in &tools {
        race.enter(tool.name(), tool.missing());
    }
    let mut track = Track { setting, what, sent, source, fetcher, id, tools };
    for nth in 0..setting.runs as usize {
        for step in 0..race.entrants.len() {
            let who = (nth + step) % race.entrants.len();
            if race.entrants[who].missing.is_none() {
                track.lap(who, &mut race.entrants[who])?;
            }
        }
    }
    Ok(race)
}

struct Track<'a> {
    setting: &'a Setting,
    what: &'a Path,
    sent: Digest,
    source: Machine,
    fetcher: Machine,
    /// What was shared.
    id: String,
    tools: Vec<Box<dyn Tool>>,
}

impl Track<'_> {
    fn lap(&mut self, who: usize, entrant: &mut Entrant) -> Result<()> {
        // What the one before has left to be written is not this one's load.
        rustix::fs::sync();
        let into = self.setting.dir.join("copies");
        fs::create_dir(&into)?;
        let copy = into.join(self.what.file_name().unwrap_or_default());
        let (cost, began) = match who.checked_sub(1) {
            None => self.own_lap(&copy)?,
            Some(nth) => self.tools_lap(nth, &into)?,
        };
        if !is_in_memory(&into)? {
            rustix::fs::syncfs(fs::File::open(&into)?)?;
        }
        entrant.durable.push(began.elapsed().as_secs_f64());
        entrant.runs.0.push(cost);
        ensure!(Digest::of(&copy)? == self.sent, "{}: the copy is another", entrant.name);
        if who == 0 {
            self.fetcher.asks(["unshare", &self.id])?;
        }
        fs::remove_dir_all(&into)?;
        Ok(())
    }

    fn own_lap(&self, copy: &Path) -> Result<(proc::Cost, std::time::Instant)> {
        let both = [self.source.pid(), self.fetcher.pid()];
        let get = ["get".as_ref(), self.id.as_ref(), "--output".as_ref(), copy.as_os_str()];
        let began = std::time::Instant::now();
        let (done, cost) = measure(&both, || self.fetcher.asks(get))?;
        ensure!(matches!(done, Event::Done { .. }), "get said {done:?}");
        Ok((cost, began))
    }

    fn tools_lap(&mut self, nth: usize, into: &Path) -> Result<(proc::Cost, std::time::Instant)> {
        let tool = &mut self.tools[nth];
        let [from, to] = ["from", "to"].map(|name| self.setting.dir.join(name));
        let (from, to) = (Host::here(from)?, Host::here(to)?);
        let source = tool.serve(&from, self.what)?;
        let mut fetch = tool.fetch(&to, into, None)?;
        let began = std::time::Instant::now();
        let (_, mut cost) = measure(&[source.pid()], || proc::output(&mut fetch))?;
        // A fetcher that is a process of its own has come and gone.
        cost.cpu.push(cost.children);
        cost.memory.push(cost.children_memory);
        drop(source);
        fs::remove_dir_all(&from.home)?;
        fs::remove_dir_all(&to.home)?;
        Ok((cost, began))
    }
}

impl Race {
    fn enter(&mut self, name: &'static str, missing: Option<&'static str>) {
        let (runs, durable) = (Runs::default(), vec![]);
        self.entrants.push(Entrant { name, missing, runs, durable });
    }

    /// The table; `against` are those whose time is compared with everyone's.
    pub(super) fn table(&self, against: &[(&str, &str)]) -> Table {
        let mut heads = vec!["".to_owned(), "s".into()];
        if self.on_disk {
            heads.push("s until it is on the disk".into());
        }
        heads.extend(
            ["MB/s", "CPU s source", "fetcher", "RSS MiB source", "fetcher"].map(Into::into),
        );
        heads.extend(against.iter().map(|(head, _)| format!("× {head}")));
        heads.push("others busy".into());
        let mut table = Table::new(&heads);
        let seconds = |name: &str| {
            let one = self.entrants.iter().find(|entrant| entrant.name == name);
            one.map_or(f64::NAN, |entrant| entrant.runs.seconds())
        };
        for Entrant { name, missing, runs, durable } in &self.entrants {
            if let Some(missing) = missing {
                table.row([(*name).to_owned(), format!("{missing} is not installed")]);
                continue;
            }
            let mut row = vec![(*name).to_owned(), format!("{:.3}", runs.seconds())];
            if self.on_disk {
                row.push(format!("{:.3}", median(durable.iter().copied())));
            }
            row.push(format!("{:.0}", runs.rate(self.size)));
            row.extend((0..2).map(|i| format!("{:.2}", runs.median(|cost| cost.cpu[i]))));
            row.extend((0..2).map(|i| format!("{:.0}", runs.median(|cost| cost.memory[i]))));
            row.extend(against.iter().map(|(_, them)| {
                let times = seconds(them) / runs.seconds();
                if times.is_nan() { "-".into() } else { format!("{times:.2}") }
            }));
            row.push(runs.others());
            table.row(row);
        }
        table
    }
}

/// What a file or folder is: names below it, and every byte.
#[derive(PartialEq, Eq)]
pub(super) struct Digest {
    hash: blake3::Hash,
    pub(super) bytes: u64,
    pub(super) files: u64,
}

impl Digest {
    pub(super) fn of(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Ok(Self { hash: hash_of(path)?, bytes: fs::metadata(path)?.len(), files: 1 });
        }
        let mut all = Self { hash: blake3::hash(b""), bytes: 0, files: 0 };
        let mut hasher = blake3::Hasher::new();
        for file in files_under(path)? {
            hasher.update(file.strip_prefix(path)?.as_os_str().as_encoded_bytes());
            hasher.update(hash_of(&file)?.as_bytes());
            all.bytes += fs::metadata(&file)?.len();
            all.files += 1;
        }
        Ok(Self { hash: hasher.finalize(), ..all })
    }
}

/// All files in a folder and those in it, in order.
fn files_under(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    entries.sort();
    let mut files = vec![];
    for entry in entries {
        let kind = fs::symlink_metadata(&entry)?.file_type();
        if kind.is_dir() {
            files.extend(files_under(&entry)?);
        } else if kind.is_file() {
            files.push(entry);
        }
    }
    Ok(files)
}
