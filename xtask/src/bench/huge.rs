//! Owns the measurement of the bookkeeping of a file of any size: all of it is a hole, so that only
//! hashing, proofs, bitfields, journals and memory are real. A copy is right if it is a hole as well.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;

use super::Setting;
use crate::proc::{self, Machine, Place, Running, measure};
use crate::table::Table;

pub(super) fn run(setting: &Setting) -> Result<()> {
    let (potluck, dir, size) = (&setting.potluck, &setting.dir, setting.size);
    let (_index, invite) = Machine::index(potluck, dir, None)?;
    let source = Machine::peer(potluck, dir, "source", &invite)?;
    let fetcher = Machine::peer(potluck, dir, "fetcher", &invite)?;
    let (file, tiny) = (source.home.join("file"), source.home.join("tiny"));
    let copy = fetcher.home.join("copy");
    File::create(&file)?.set_len(size)?;
    fs::write(&tiny, "tiny")?;
    let mut table = Table::new(&["", "s", "CPU s", "peak RSS, MiB"]);
    let mut row = |what: &str, seconds: f64, cpu: f64, peer: &Machine| -> Result<()> {
        let rss = proc::memory(peer.pid(), "VmHWM")?;
        let seconds = format!("{seconds:.2}");
        table.row([what.to_owned(), seconds, format!("{cpu:.2}"), format!("{rss:.0}")]);
        Ok(())
    };

    let (shared, cost) = measure(&[source.pid()], || source.asks([&"share".into(), &file]))?;
    let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };
    row("share", cost.seconds, cost.cpu[0], &source)?;
    let Event::Shared { id: tiny, .. } = source.asks([&"share".into(), &tiny])? else {
        bail!("a tiny file is not shared");
    };

    let began = Instant::now();
    let source = source.again("up", &Place::here())?;
    let to = fetcher.home.join("tiny");
    fetcher.asks(["get".as_ref(), tiny.as_ref(), "--output".as_ref(), to.as_os_str()])?;
    row("restart, until it serves", began.elapsed().as_secs_f64(), 0.0, &source)?;

    let (had, cost) = measure(&[fetcher.pid()], || get_until(setting, &fetcher, &id, size / 2))?;
    row("fetch half of it", cost.seconds, cost.cpu[0], &fetcher)?;
    let began = Instant::now();
    let fetcher = fetcher.again("up", &Place::here())?;
    row("resume, until it is up", began.elapsed().as_secs_f64(), 0.0, &fetcher)?;
    let get = ["get".as_ref(), id.as_ref(), "--output".as_ref(), copy.as_os_str()];
    let (done, cost) = measure(&[fetcher.pid()], || fetcher.asks(get))?;
    ensure!(matches!(done, Event::Done { .. }), "get said {done:?}");
    row("fetch the rest", cost.seconds, cost.cpu[0], &fetcher)?;
    row("(the source meanwhile)", cost.seconds, 0.0, &source)?;

    let meta = copy.metadata()?;
    let taken = meta.blocks() * 512;
    ensure!(meta.len() == size, "the copy has {} bytes", meta.len());
    ensure!(taken <= size / 1_000, "the copy takes {taken} bytes: it may be anything but a hole");
    println!("## Huge: a sparse file of {} GiB\n\n{table}", size >> 30);
    println!("{} MiB were here when the fetcher was killed.\n", had >> 20);
    Ok(())
}

/// Fetches until so many bytes are here; how many there were.
fn get_until(setting: &Setting, fetcher: &Machine, id: &str, enough: u64) -> Result<u64> {
    let mut get = Command::new(&setting.potluck);
    get.arg("--json").arg("--state").arg(fetcher.home.join("state")).args(["get", id, "--output"]);
    get.arg(fetcher.home.join("copy")).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut get = Running(get.spawn().context("cannot run potluck get")?);
    let lines = BufReader::new(get.0.stdout.take().context("it has no stdout")?).lines();
    for line in lines {
        if let Event::Progress { done, .. } = Event::from_line(&line?)?
            && done >= enough
        {
            return Ok(done);
        }
    }
    bail!("potluck get ended before half of it was here")
}
