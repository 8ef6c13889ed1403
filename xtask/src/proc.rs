//! Owns the processes that are measured: starts them, asks them, ends them, and reads what the
//! kernel says of them. Never judges a figure.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;
use potluck::daemon::{Role, socket_path};
use rustix::process::{Signal, kill_current_process_group};

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

/// A child that ends, with all that it has started, when this is dropped or this process ends, however
/// that ends. It reads nothing.
pub(crate) struct Tethered {
    child: Child,
    /// Its process ends the group when this closes. Not left in `child`: a wait would close it.
    leash: Option<ChildStdin>,
}

impl Tethered {
    /// A command for [`Tethered::spawn`].
    pub(crate) fn command(program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new(env::current_exe()?);
        // A group of its own: a Ctrl-C is not for it.
        command.arg("tether").arg(program).stdin(Stdio::piped()).process_group(0);
        Ok(command)
    }

    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        let leash = child.stdin.take();
        Ok(Self { child, leash })
    }

    pub(crate) fn stdout(&mut self) -> Result<ChildStdout> {
        self.child.stdout.take().context("its output is not piped")
    }

    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }
}

impl Drop for Tethered {
    fn drop(&mut self) {
        self.leash = None;
        let _ = self.child.wait();
    }
}

/// What a [`Tethered`] runs.
#[derive(clap::Args)]
pub(crate) struct Tether {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

/// Runs the command and ends with its exit code; ends the whole group when stdin ends.
pub(crate) fn run_tethered(tether: &Tether) -> Result<()> {
    let Some((program, args)) = tether.command.split_first() else { return Ok(()) };
    thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        let _ = kill_current_process_group(Signal::KILL);
    });
    let status = Command::new(program).args(args).stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot run {}", program.display()))?;
    std::process::exit(status.code().unwrap_or(101));
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

/// Where and how a program runs.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The one core it is kept to.
    pub(crate) core: Option<usize>,
    /// The network namespace it is in.
    pub(crate) namespace: Option<String>,
    /// The address it has there.
    pub(crate) address: IpAddr,
    /// The port it listens on; 0: any.
    pub(crate) port: u16,
    /// Where its log goes: a file in its folder, or else to whoever runs this.
    pub(crate) logs: bool,
    /// What it is told as well.
    pub(crate) args: Vec<String>,
}

impl Place {
    /// Any port of the loopback.
    pub(crate) fn here() -> Self {
        let address = Ipv4Addr::LOCALHOST.into();
        Self { core: None, namespace: None, address, port: 0, logs: false, args: vec![] }
    }

    /// A command that will run there. It becomes the program: its process id is the program's.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let Some(namespace) = &self.namespace else { return on_core(self.core, program) };
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program);
        command
    }
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
    /// Starts `potluck up` or `potluck index`; again where it ran before.
    pub(crate) fn start(
        potluck: &Path,
        under: &Path,
        verb: &str,
        name: &str,
        place: &Place,
    ) -> Result<Self> {
        let home = under.join(name);
        fs::create_dir(&home)?;
        Self::start_in(potluck, home, verb, name, place)
    }

    fn start_in(
        potluck: &Path,
        home: PathBuf,
        verb: &str,
        name: &str,
        place: &Place,
    ) -> Result<Self> {
        let mut command = place.command(potluck);
        let listen = SocketAddr::new(place.address, place.port).to_string();
        command.args([verb, "--json", "--leash", "--listen", &listen, "--state"]);
        command.arg(home.join("state"));
        if verb == "index" {
            // However busy the machine is, and however many members are made up: no lease lapses.
            command.args(["--heartbeat", "600"]);
        }
        if verb == "up" {
            command.args(["--label", name]);
        }
        command.args(&place.args);
        for name in ["POTLUCK_LISTEN", "POTLUCK_LABEL", "POTLUCK_LIMIT_UP", "POTLUCK_LIMIT_DOWN"] {
            command.env_remove(name);
        }
        command.env("POTLUCK_LOG", env::var_os("POTLUCK_LOG").unwrap_or_else(|| "warn".into()));
        if place.logs {
            command.stderr(File::create(home.join("log"))?);
        }
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
        Self::index_at(potluck, under, &Place { core, ..Place::here() })
    }

    /// Likewise, wherever it is to run.
    pub(crate) fn index_at(potluck: &Path, under: &Path, place: &Place) -> Result<(Self, String)> {
        let index = Self::start(potluck, under, "index", "index", place)?;
        let Event::Ready { invite: Some(invite), .. } = &index.ready else {
            bail!("the index is not ready: {:?}", index.ready);
        };
        let invite = invite.clone();
        Ok((index, invite))
    }

    /// A peer that has joined.
    pub(crate) fn peer(potluck: &Path, under: &Path, name: &str, invite: &str) -> Result<Self> {
        let peer = Self::start(potluck, under, "up", name, &Place::here())?;
        peer.asks(["join", invite])?;
        Ok(peer)
    }

    /// Starts it again, killed if it runs yet, in the folder it left.
    pub(crate) fn again(self, verb: &str, place: &Place) -> Result<Self> {
        let Self { potluck, home, child, .. } = self;
        drop(child);
        let name = home.file_name().and_then(OsStr::to_str).context("it has a name")?.to_owned();
        Self::start_in(&potluck, home, verb, &name, place)
    }

    /// Where a peer takes requests.
    pub(crate) fn socket(&self) -> PathBuf {
        socket_path(&self.home.join("state"), Role::Peer)
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
    /// CPU seconds of each process that was named, with all its descendants.
    pub(crate) cpu: Vec<f64>,
    /// Their most memory until then, in MiB, likewise.
    pub(crate) memory: Vec<f64>,
    /// CPU seconds of this process.
    pub(crate) own: f64,
    /// CPU seconds of children that came and went meanwhile …
    pub(crate) children: f64,
    /// … and the most memory of one of them, with its descendants.
    pub(crate) children_memory: f64,
    /// The share of this machine's CPU time that others used meanwhile.
    pub(crate) others: f64,
}

/// Does `work`, in which `processes` take part, and says what it cost.
pub(crate) fn measure<T>(processes: &[u32], work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let look = || -> Result<_> {
        let cpu: Vec<f64> = processes.iter().map(|pid| cpu_of(*pid)).collect::<Result<_>>()?;
        Ok((cpu, times(std::process::id())?, Busy::now()?))
    };
    let (cpu_before, own_before, busy_before) = look()?;
    let watch = Watch::start();
    let began = Instant::now();
    let result = work()?;
    let seconds = began.elapsed().as_secs_f64();
    let (cpu, own, busy) = look()?;
    let most = watch.stop();
    let cpu: Vec<f64> = cpu.iter().zip(cpu_before).map(|(after, before)| after - before).collect();
    let (children, own) = (own.children - own_before.children, own.own - own_before.own);
    let ours = cpu.iter().sum::<f64>() + children + own;
    let programs = busy.programs - busy_before.programs;
    let others = ((programs - ours) / (seconds * busy.cores)).clamp(0.0, 1.0);
    let memory = processes.iter().map(|pid| most.get(pid).copied().unwrap_or(f64::NAN)).collect();
    let strangers = most.iter().filter(|(pid, _)| !processes.contains(pid));
    let children_memory = strangers.map(|(_, mib)| *mib).fold(0.0, f64::max);
    Ok((result, Cost { seconds, cpu, memory, own, children, children_memory, others }))
}

/// How often memory is looked at: the kernel keeps the highest value, so that only the last moment
/// of a process is missed.
const MEMORY_LOOK: Duration = Duration::from_millis(50);

/// A thread that looks at the memory of all children meanwhile.
struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<BTreeMap<u32, f64>>,
}

impl Watch {
    fn start() -> Self {
        let (stop, stopped) = channel();
        let thread = thread::spawn(move || {
            let mut most: BTreeMap<u32, BTreeMap<u32, f64>> = BTreeMap::new();
            loop {
                let last =
                    !matches!(stopped.recv_timeout(MEMORY_LOOK), Err(RecvTimeoutError::Timeout));
                for child in children_of(std::process::id()) {
                    let of = most.entry(child).or_default();
                    for pid in tree(child) {
                        // It may have ended between two looks.
                        if let Ok(mib) = memory(pid, "VmHWM") {
                            of.insert(pid, mib);
                        }
                    }
                }
                if last {
                    return most.iter().map(|(child, of)| (*child, of.values().sum())).collect();
                }
            }
        });
        Self { stop, thread }
    }

    /// The most memory of each child, with its descendants, in MiB.
    fn stop(self) -> BTreeMap<u32, f64> {
        drop(self.stop);
        self.thread.join().unwrap_or_default()
    }
}

/// A process and all its descendants.
fn tree(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(pid) = all.get(next) {
        all.extend(children_of(*pid));
        next += 1;
    }
    all
}

fn children_of(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return vec![] };
    let lists =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    let lists: Vec<String> = lists.collect();
    lists.iter().flat_map(|list| list.split_whitespace()).flat_map(str::parse).collect()
}

/// CPU seconds of a process and all its descendants.
fn cpu_of(pid: u32) -> Result<f64> {
    let own = times(pid)?;
    // A descendant may have ended between two looks.
    let below = tree(pid).into_iter().skip(1).filter_map(|pid| times(pid).ok());
    Ok(own.own + own.children + below.map(|times| times.own + times.children).sum::<f64>())
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

/// CPU seconds of every process but this one (and of its children that have ended): of the lab,
/// where all that run are of it.
pub(crate) fn everyone() -> Result<f64> {
    let mut all = times(std::process::id())?.children;
    for pid in processes()?.into_iter().filter(|pid| *pid != std::process::id()) {
        // It may have ended between two looks.
        all += times(pid).map_or(0.0, |times| times.own + times.children);
    }
    Ok(all)
}

/// Every process that can be seen.
pub(crate) fn processes() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?.filter_map(Result::ok);
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// What this machine has done since it started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Busy {
    /// CPU seconds that programs used, or that were stolen from it.
    pub(crate) programs: f64,
    /// Likewise with interrupts, which serve our own sockets too.
    pub(crate) all: f64,
    /// How many cores it has: this process may be kept to fewer.
    pub(crate) cores: f64,
}

impl Busy {
    pub(crate) fn now() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let mut lines = stat.lines().take_while(|line| line.starts_with("cpu"));
        let all = lines.next().context("/proc/stat is empty")?;
        let ticks: Vec<f64> =
            all.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
        // user, nice, system, idle, iowait, irq, softirq, steal
        let get = |i: usize| ticks.get(i).copied().unwrap_or(0.0) / TICKS;
        let programs = get(0) + get(1) + get(2) + get(7);
        Ok(Self { programs, all: programs + get(5) + get(6), cores: lines.count() as f64 })
    }
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
