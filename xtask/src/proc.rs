//! Owns the processes that are measured: starts them, asks them, ends them, and reads what the
//! kernel says of them. Never judges a figure.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;

/// What `/proc` counts CPU time in, a second: the same on every Linux that Rust runs on.
const TICKS: f64 = 100.0;

/// A child that ends when this is dropped.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The release binary, fresh from the sources. It lies beside this one's profile folder.
pub(crate) fn build_potluck() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--release", "-p", "potluck"])
        .current_dir(root)
        .status()
        .context("cannot run cargo")?;
    ensure!(built.success(), "potluck does not build");
    let own = env::current_exe()?;
    let target = own.ancestors().nth(2).context("this binary lies in no target folder")?;
    Ok(target.join("release/potluck"))
}

/// Where a program is: in the `PATH`, among the system's, or among cargo's own.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo = env::var_os("HOME").map(|home| Path::new(&home).join(".cargo/bin"));
    let more = cargo.into_iter().chain(["/usr/sbin".into(), "/sbin".into()]);
    let mut folders = env::split_paths(&path).chain(more).map(|folder| folder.join(program));
    folders.find(|path| path.is_file())
}

/// A potluck process with a folder of its own.
pub(crate) struct Machine {
    potluck: PathBuf,
    pub(crate) home: PathBuf,
    /// What it said when it was ready.
    pub(crate) ready: Event,
    child: Running,
    /// Kept open, so that what it prints has somewhere to go.
    _stdout: BufReader<ChildStdout>,
}

impl Machine {
    /// Starts `potluck up` or `potluck index`; on one core, if that is given.
    pub(crate) fn start(
        potluck: &Path,
        under: &Path,
        verb: &str,
        name: &str,
        core: Option<usize>,
    ) -> Result<Self> {
        let home = under.join(name);
        fs::create_dir(&home)?;
        Self::start_in(potluck, home, verb, name, core)
    }

    /// Kills it, and starts it anew in the folder it left.
    pub(crate) fn restart(self, verb: &str, name: &str, core: Option<usize>) -> Result<Self> {
        let Self { potluck, home, child, .. } = self;
        drop(child);
        Self::start_in(&potluck, home, verb, name, core)
    }

    fn start_in(
        potluck: &Path,
        home: PathBuf,
        verb: &str,
        name: &str,
        core: Option<usize>,
    ) -> Result<Self> {
        let mut command = on_core(core, potluck);
        command.args([verb, "--json", "--leash", "--listen", "127.0.0.1:0", "--state"]);
        command.arg(home.join("state"));
        if verb == "index" {
            // However busy the machine is, and however many members are made up: no lease lapses.
            command.args(["--heartbeat", "600"]);
        }
        if verb == "up" {
            command.args(["--label", name]);
        }
        for name in ["POTLUCK_LISTEN", "POTLUCK_LABEL"] {
            command.env_remove(name);
        }
        command.env("POTLUCK_LOG", "warn");
        // The pipe to its stdin is its leash: it ends with this process, however that ends.
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = Running(command.spawn().with_context(|| format!("cannot run {name}"))?);
        let mut stdout = BufReader::new(child.0.stdout.take().context("it has no stdout")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let ready = Event::from_line(&line).with_context(|| format!("{name} said {line:?}"))?;
        Ok(Self { potluck: potluck.into(), home, ready, child, _stdout: stdout })
    }

    /// An index and its invitation.
    pub(crate) fn index(
        potluck: &Path,
        under: &Path,
        core: Option<usize>,
    ) -> Result<(Self, String)> {
        let index = Self::start(potluck, under, "index", "index", core)?;
        let Event::Ready { invite: Some(invite), .. } = &index.ready else {
            bail!("the index is not ready: {:?}", index.ready);
        };
        let invite = invite.clone();
        Ok((index, invite))
    }

    /// A peer that has joined.
    pub(crate) fn peer(potluck: &Path, under: &Path, name: &str, invite: &str) -> Result<Self> {
        let peer = Self::start(potluck, under, "up", name, None)?;
        peer.asks(["join", invite])?;
        Ok(peer)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Runs a verb here; its result.
    pub(crate) fn asks<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Event> {
        let mut command = Command::new(&self.potluck);
        command.arg("--json").arg("--state").arg(self.home.join("state")).args(args);
        let text = output(&mut command)?;
        let last = text.lines().last().context("it said nothing")?;
        Ok(Event::from_line(last)?)
    }
}

/// A command, kept to one core where one is given.
pub(crate) fn on_core(core: Option<usize>, program: &Path) -> Command {
    let Some(core) = core else { return Command::new(program) };
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &core.to_string()]).arg(program);
    command
}

/// What a command printed; it must succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let done = command.stdin(Stdio::null()).output();
    let done = done.with_context(|| format!("cannot run {command:?}"))?;
    let (out, err) = (String::from_utf8(done.stdout)?, String::from_utf8_lossy(&done.stderr));
    ensure!(done.status.success(), "{command:?} failed: {out}{err}");
    Ok(out)
}

/// What some work cost.
#[derive(Clone, Debug)]
pub(crate) struct Cost {
    /// Seconds on the clock.
    pub(crate) seconds: f64,
    /// CPU seconds of each process that was named.
    pub(crate) cpu: Vec<f64>,
    /// CPU seconds of this process.
    pub(crate) own: f64,
    /// CPU seconds of children that came and went meanwhile.
    pub(crate) children: f64,
    /// The share of this machine's CPU time that others used meanwhile.
    pub(crate) others: f64,
}

/// Does `work`, in which `processes` take part, and says what it cost.
pub(crate) fn measure<T>(processes: &[u32], work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let look = || -> Result<_> {
        let cpu: Vec<f64> =
            processes.iter().map(|pid| Ok(times(*pid)?.own)).collect::<Result<_>>()?;
        Ok((cpu, times(std::process::id())?, busy()?))
    };
    let (cpu_before, own_before, (busy_before, _)) = look()?;
    let began = Instant::now();
    let result = work()?;
    let seconds = began.elapsed().as_secs_f64();
    let (cpu, own, (busy, cores)) = look()?;
    let cpu: Vec<f64> = cpu.iter().zip(cpu_before).map(|(after, before)| after - before).collect();
    let (children, own) = (own.children - own_before.children, own.own - own_before.own);
    let ours = cpu.iter().sum::<f64>() + children + own;
    let others = ((busy - busy_before - ours) / (seconds * cores)).clamp(0.0, 1.0);
    Ok((result, Cost { seconds, cpu, own, children, others }))
}

/// CPU seconds of a process, and of its children that have ended.
struct Times {
    own: f64,
    children: f64,
}

fn times(pid: u32) -> Result<Times> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} has ended"))?;
    // The name, in brackets, may hold anything; utime is the 12th field behind it.
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has no name")?;
    let ticks: Vec<f64> =
        fields.split_whitespace().skip(11).take(4).map(str::parse).collect::<Result<_, _>>()?;
    ensure!(ticks.len() == 4, "/proc/PID/stat is too short");
    Ok(Times { own: (ticks[0] + ticks[1]) / TICKS, children: (ticks[2] + ticks[3]) / TICKS })
}

/// CPU seconds that programs used on this machine since it started, or that were stolen from it,
/// and how many cores it has (this process may be kept to fewer). Interrupts are left out: they serve
/// our own sockets.
fn busy() -> Result<(f64, f64)> {
    let stat = fs::read_to_string("/proc/stat")?;
    let mut lines = stat.lines().take_while(|line| line.starts_with("cpu"));
    let all = lines.next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> =
        all.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    // user, nice, system, idle, iowait, irq, softirq, steal
    let get = |i: usize| ticks.get(i).copied().unwrap_or(0.0);
    Ok(((get(0) + get(1) + get(2) + get(7)) / TICKS, lines.count() as f64))
}

/// A line of `/proc/PID/status`, in MiB: `VmRSS` (memory now) or `VmHWM` (its highest ever).
pub(crate) fn memory(pid: u32, line: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|at| at.strip_prefix(line)?.strip_prefix(':')?.trim().strip_suffix(" kB"))
        .with_context(|| format!("/proc/{pid}/status has no {line}"))?;
    Ok(kib.parse::<f64>()? / 1024.0)
}
