//! Owns `cargo xtask bench`: what is measured, where, and what the machine was. Never installs
//! anything: a tool that is not here is said to be missing.

mod disk;
pub(crate) mod echo;
mod files;
mod flood;
mod huge;
mod index;
mod limits;
mod race;
mod share;
mod storm;
mod tracker;
mod transfer;
mod workers;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::proc::{self, Cost};
use crate::table::median;

/// Bytes made up, or hashed, at once.
const CHUNK: usize = 1 << 20;
/// Room for databases and whatever else is small.
const SPARE: u64 = 256 << 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure
    #[arg(default_value = "all")]
    what: What,
    /// Size of the file that is shared and fetched, in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// How often each is measured; the tables show medians
    #[arg(long, default_value_t = 5, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Registrations that the index holds while it is measured
    #[arg(long, default_value_t = 1_000_000, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1_000..=10_000_000))]
    registrations: u32,
    /// Where the temporary folder is made [default: /dev/shm where it has room, else the usual]
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Hashing and registering a file, against b3sum
    Share,
    /// One big file, one source, one fetcher, against whatever else is installed
    Transfer,
    /// Likewise ten thousand small files, and the Rust toolchain's folder
    Files,
    /// Likewise on a disk (--dir), with nothing in memory, against the disk itself
    Disk,
    /// How near transfers stay to a limit
    Limits,
    /// Requests that the index answers on one core, against echoes and a BitTorrent tracker; and what a
    /// second worker costs
    Index,
    /// The same while it is attacked, and how soon 10,000 watchers are told of a change
    Attack,
    /// All of these but the huge file
    All,
    /// A sparse file (--size): bookkeeping and memory of sharing, restarting, fetching, resuming; not
    /// among all
    Huge,
}

/// What every measurement is given.
struct Setting {
    /// The binary.
    potluck: PathBuf,
    /// A folder of its own.
    dir: PathBuf,
    /// Bytes of the file.
    size: u64,
    runs: u32,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let potluck = proc::build_potluck()?;
    let size = args.size << 20;
    // What is sparse takes nothing, but has to find room for one copy.
    let need = if args.what == What::Huge { size } else { 2 * size } + SPARE;
    let dir = match &args.dir {
        Some(dir) => dir.clone(),
        None => Some(PathBuf::from("/dev/shm"))
            .filter(|shm| room(shm).is_ok_and(|room| room >= need))
            .unwrap_or_else(std::env::temp_dir),
    };
    let has = room(&dir)?;
    ensure!(has >= need, "{} has {} MiB, {} are needed", dir.display(), has >> 20, need >> 20);
    println!("{}; everything under {}; medians of {} runs\n", machine()?, dir.display(), args.runs);
    let under = tempfile::Builder::new().prefix("potluck-bench-").tempdir_in(&dir)?;
    for what in What::value_variants() {
        let what = *what;
        let in_all = args.what == What::All && what != What::Huge;
        if what == What::All || !(in_all || args.what == what) {
            continue;
        }
        let dir = under.path().join(format!("{}", what as u8));
        fs::create_dir(&dir)?;
        let setting = Setting { potluck: potluck.clone(), dir, size, runs: args.runs };
        match what {
            What::Share => share::run(&setting)?,
            What::Transfer => transfer::run(&setting)?,
            What::Files => files::run(&setting)?,
            What::Disk => disk::run(&setting)?,
            What::Limits => limits::run(&setting)?,
            What::Huge => huge::run(&setting)?,
            What::Attack => index::run(&setting, args.registrations, true)?,
            What::Index | What::All => {
                index::run(&setting, args.registrations, false)?;
                workers::run(&setting)?;
            }
        }
        fs::remove_dir_all(&setting.dir)?;
    }
    Ok(())
}

/// Bytes that may be written under `dir`.
fn room(dir: &Path) -> Result<u64> {
    let fs = rustix::fs::statvfs(dir).with_context(|| format!("cannot use {}", dir.display()))?;
    Ok(fs.f_bavail * fs.f_frsize)
}

/// Whether what is written there only ever is in memory.
fn is_in_memory(dir: &Path) -> Result<bool> {
    const TMPFS: u64 = 0x0102_1994;
    Ok(rustix::fs::statfs(dir)?.f_type as u64 == TMPFS)
}

/// Processor, cores, kernel, and how busy it is.
pub(crate) fn machine() -> Result<String> {
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = fs::read_to_string("/proc/loadavg")?;
    Ok(format!(
        "{} × {}, Linux {}, load {} before",
        std::thread::available_parallelism()?,
        model.unwrap_or(std::env::consts::ARCH),
        kernel.trim(),
        load.split(' ').next().unwrap_or_default(),
    ))
}

/// Makes a file of bytes that nowhere repeat, nor in a file of another name; its hash.
pub(crate) fn make_up(path: &Path, size: u64) -> Result<blake3::Hash> {
    let name = path.file_name().context("a file has a name")?;
    let mut stream = blake3::Hasher::new().update(name.as_encoded_bytes()).finalize_xof();
    let mut file = File::create_new(path)?;
    let (mut hasher, mut left) = (blake3::Hasher::new(), size);
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let some = &mut chunk[..left.min(CHUNK as u64) as usize];
        stream.fill(some);
        hasher.update(some);
        file.write_all(some)?;
        left -= some.len() as u64;
    }
    file.sync_all()?;
    Ok(hasher.finalize())
}

/// Fails unless the file at `path` has this hash.
fn check(path: &Path, expected: blake3::Hash) -> Result<()> {
    ensure!(hash_of(path)? == expected, "{} is not what was sent", path.display());
    Ok(())
}

/// The hash of a file.
pub(crate) fn hash_of(path: &Path) -> Result<blake3::Hash> {
    let (mut file, mut hasher) = (File::open(path)?, blake3::Hasher::new());
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            n => hasher.update(&chunk[..n]),
        };
    }
    Ok(hasher.finalize())
}

/// All runs of one way to do something.
#[derive(Default)]
struct Runs(Vec<Cost>);

impl Runs {
    fn seconds(&self) -> f64 {
        median(self.0.iter().map(|cost| cost.seconds))
    }

    /// MB (10⁶ bytes) a second.
    fn rate(&self, size: u64) -> f64 {
        size as f64 / 1e6 / self.seconds()
    }

    fn median(&self, of: impl Fn(&Cost) -> f64) -> f64 {
        median(self.0.iter().map(of))
    }

    /// What others used of the machine meanwhile, in percent.
    fn others(&self) -> String {
        let worst = self.0.iter().map(|cost| cost.others).fold(0.0, f64::max);
        let median = median(self.0.iter().map(|cost| cost.others));
        format!("{:.0} % (at most {:.0})", 100.0 * median, 100.0 * worst)
    }
}
