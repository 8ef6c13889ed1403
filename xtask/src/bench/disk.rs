//! Owns the measurement on a disk: a transfer with nothing in the page cache, beside what the disk
//! itself does in the same run, and how much of what was written was still in memory.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;

use super::{CHUNK, Setting, check, is_in_memory, make_up};
use crate::proc::Machine;
use crate::table::{Table, median};

/// How often the kernel is asked what it has yet to write.
const LOOK: Duration = Duration::from_millis(20);

pub(super) fn run(setting: &Setting) -> Result<()> {
    let dir = &setting.dir;
    if is_in_memory(dir)? {
        println!("## Disk\n\nNot measured: {} is in memory; --dir names a disk.\n", dir.display());
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        println!("## Disk\n\nNot measured: only root may empty the page cache.\n");
        return Ok(());
    }
    let (_index, invite) = Machine::index(&setting.potluck, dir, None)?;
    let source = Machine::peer(&setting.potluck, dir, "source", &invite)?;
    let fetcher = Machine::peer(&setting.potluck, dir, "fetcher", &invite)?;
    let file = source.home.join("file");
    let hash = make_up(&file, setting.size)?;
    let shared = source.asks([&"share".into(), &file])?;
    let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };
    let copy = fetcher.home.join("copy");
    let get = || {
        let get = ["get".as_ref(), id.as_ref(), "--output".as_ref(), copy.as_os_str()];
        let done = fetcher.asks(get)?;
        ensure!(matches!(done, Event::Done { .. }), "get said {done:?}");
        Ok(())
    };

    let mut works: [(&str, Vec<Work>); 5] = [
        ("read", vec![]),
        ("write and fsync, from memory", vec![]),
        ("copy (read, write) and fsync", vec![]),
        ("potluck get, source in the page cache", vec![]),
        ("potluck get, source on the disk", vec![]),
    ];
    for _ in 0..setting.runs {
        works[0].1.push(work(true, || read(&file))?);
        // Read just now, so that it is in memory.
        works[1].1.push(work(false, || write(&file, &copy))?);
        fs::remove_file(&copy)?;
        works[2].1.push(work(true, || write(&file, &copy))?);
        fs::remove_file(&copy)?;
        for (nth, cold) in [(3, false), (4, true)] {
            if !cold {
                read(&file)?;
            }
            works[nth].1.push(work(cold, get)?);
            check(&copy, hash)?;
            fetcher.asks(["unshare", &id])?;
            fs::remove_file(&copy)?;
        }
    }

    println!("## Disk: {} MiB under {}\n", setting.size >> 20, dir.display());
    let heads = ["", "s", "MB/s", "× the disk's own", "most unwritten MiB"];
    let mut table = Table::new(&heads);
    let seconds = |nth: usize| median(works[nth].1.iter().map(|work| work.seconds));
    for (nth, (name, work)) in works.iter().enumerate() {
        // Beside what moves the same bytes from and to the same places.
        let own = [None, None, None, Some(1), Some(2)][nth];
        table.row([
            (*name).to_owned(),
            format!("{:.2}", seconds(nth)),
            format!("{:.0}", setting.size as f64 / 1e6 / seconds(nth)),
            own.map_or(String::new(), |own| format!("{:.2}", seconds(own) / seconds(nth))),
            format!("{:.0}", work.iter().map(|work| work.unwritten_mib).fold(0.0, f64::max)),
        ]);
    }
    println!("{table}");
    Ok(())
}

struct Work {
    seconds: f64,
    /// The most that was written to files and not yet to the disk, in MiB, beyond what was so before.
    unwritten_mib: f64,
}

/// Does some work, with nothing left to write by those before it and, if it is to be so, nothing in
/// the page cache.
fn work(cold: bool, work: impl FnOnce() -> Result<()>) -> Result<Work> {
    rustix::fs::sync();
    if cold {
        fs::write("/proc/sys/vm/drop_caches", "1").context("cannot empty the page cache")?;
    }
    let (stop, stopped) = channel::<()>();
    let before = unwritten_mib()?;
    let watch = thread::spawn(move || {
        let mut most = 0.0_f64;
        while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            most = most.max(unwritten_mib().unwrap_or(0.0));
        }
        most
    });
    let began = Instant::now();
    let result = work();
    let seconds = began.elapsed().as_secs_f64();
    drop(stop);
    let most = watch.join().unwrap_or(f64::NAN);
    result?;
    Ok(Work { seconds, unwritten_mib: (most - before).max(0.0) })
}

fn unwritten_mib() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| -> Option<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    };
    let all = kib("Dirty").zip(kib("Writeback")).context("/proc/meminfo says nothing of it")?;
    Ok((all.0 + all.1) / 1024.0)
}

fn read(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    while file.read(&mut chunk)? > 0 {}
    Ok(())
}

fn write(from: &Path, to: &Path) -> Result<()> {
    let (mut from, mut to) = (File::open(from)?, File::create_new(to)?);
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk)? {
            0 => break,
            n => to.write_all(&chunk[..n])?,
        }
    }
    Ok(to.sync_all()?)
}
