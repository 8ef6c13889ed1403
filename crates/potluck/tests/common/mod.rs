//! Machines for tests: the program as people run it, in real processes with real sockets and files,
//! which can be killed and started again on what they left. Never waits for time: every step waits
//! for what the program says.

#![allow(dead_code, reason = "each file of tests needs a part of it")]
#![allow(clippy::print_stdout, reason = "a test that is skipped says so")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use potluck::control::{ContentStatus, Event, Request, Row};
use potluck::daemon::{self, Client, Role};
use rustix::process::{Pid, Signal, kill_process};

/// What is tested.
const PROGRAM: &str = env!("CARGO_BIN_EXE_potluck");
/// Far more than anything takes: whoever waits so long waits for something that does not come.
const PATIENCE: Duration = Duration::from_secs(60);

/// The program with a state folder of its own and no settings of whoever runs the tests.
pub(crate) fn potluck(state: &Path) -> Command {
    potluck_by(&[], state)
}

/// The same, run by another program that ends by turning into it.
fn potluck_by(runner: &[String], state: &Path) -> Command {
    let mut command = Command::new(runner.first().map_or(PROGRAM, String::as_str));
    if let [_, args @ ..] = runner {
        command.args(args).arg(PROGRAM);
    }
    for name in
        ["POTLUCK_LISTEN", "POTLUCK_LABEL", "POTLUCK_LIMIT_UP", "POTLUCK_LIMIT_DOWN", "POTLUCK_LOG"]
    {
        command.env_remove(name);
    }
    command.env("POTLUCK_STATE", state).stdin(Stdio::null());
    command
}

/// Whether this runner can run the program here.
pub(crate) fn can_run(runner: &[String]) -> bool {
    let output = potluck_by(runner, Path::new("/")).arg("--version").output();
    output.is_ok_and(|output| output.status.success())
}

/// What runs another program where it has these (in the words of `unshare`) for itself alone, and they are
/// gone with it; `set` is a shell's command that is run there first.
pub(crate) fn alone_with(these: &[&str], set: &str) -> Vec<String> {
    let set = format!("{set} && exec \"$@\"");
    let words = [&["unshare"], these, &["sh", "-c", &set, "sh"]].concat();
    words.into_iter().map(Into::into).collect()
}

/// What runs another program with a disk in memory, of so many MiB, at `at`.
pub(crate) fn with_small_disk(mib: u32, at: &Path) -> Vec<String> {
    let set = format!("mount -t tmpfs -o size={mib}m potluck '{}'", at.display());
    alone_with(&["--mount"], &set)
}

/// Runs the test of this name once more, by this runner. True in the process that does: go on.
pub(crate) fn is_run_by(runner: &[String], name: &str, takes: &str) -> bool {
    const AGAIN: &str = "POTLUCK_AGAIN";
    if std::env::var_os(AGAIN).is_some() {
        return true;
    }
    if !can_run(runner) {
        println!("SKIPPED: {name} takes {takes}");
        return false;
    }
    let mut again = Command::new(&runner[0]);
    again.args(&runner[1..]).arg(std::env::current_exe().unwrap());
    again.args(["--exact", name, "--nocapture"]).env(AGAIN, "1");
    assert!(again.status().unwrap().success());
    false
}

/// What was printed with `--json`; every line must be an event that this version knows.
pub(crate) fn events(output: &Output) -> Vec<Event> {
    String::from_utf8(output.stdout.clone()).unwrap().lines().map(event).collect()
}

fn event(line: &str) -> Event {
    assert!(line.starts_with(r#"{"v":1,"event":""#), "{line}");
    let event = Event::from_line(line).unwrap();
    assert_ne!(event, Event::Unknown, "{line}");
    event
}

/// Bytes that are the same in every run and nowhere repeat.
pub(crate) fn made_up(length: usize) -> Vec<u8> {
    made_of("story", length)
}

/// Others for every seed.
pub(crate) fn made_of(seed: &str, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Asks until the answer is there.
pub(crate) fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "it never came: {what}");
        std::thread::yield_now();
    }
}

/// What a machine's program is run by: other programs that take the rest as their last arguments.
#[derive(Default)]
pub(crate) struct Under {
    pub(crate) process: Vec<String>,
    pub(crate) verbs: Vec<String>,
}

/// One machine: a folder with its state and what it has, and the process that serves it.
pub(crate) struct Machine {
    pub(crate) home: PathBuf,
    pub(crate) ready: Event,
    args: Vec<String>,
    role: Role,
    /// What its process, and its verbs, are run by (see [`Under`]).
    by: Under,
    child: Child,
    /// Kept open, so that what it prints at its end has somewhere to go.
    stdout: BufReader<ChildStdout>,
}

impl Machine {
    pub(crate) fn start(under: &Path, name: &str, verb: &str) -> Self {
        Self::start_with(under, name, verb, &[])
    }

    /// With further options of `up` or `index`.
    pub(crate) fn start_with(under: &Path, name: &str, verb: &str, more: &[&str]) -> Self {
        let home = under.join(name);
        fs::create_dir(&home).unwrap();
        Self::start_by(home, name, verb, more, Under::default())
    }

    /// In a folder that is there, run by other programs.
    pub(crate) fn start_by(
        home: PathBuf,
        name: &str,
        verb: &str,
        more: &[&str],
        by: Under,
    ) -> Self {
        Self::start_at("127.0.0.1:0", home, name, verb, more, by)
    }

    /// The same, listening there.
    pub(crate) fn start_at(
        listen: &str,
        home: PathBuf,
        name: &str,
        verb: &str,
        more: &[&str],
        by: Under,
    ) -> Self {
        let mut args: Vec<String> = [verb, "--json", "--leash"].map(Into::into).into();
        if verb == "up" {
            args.extend(["--label", name].map(Into::into));
        }
        args.extend(more.iter().map(|&arg| arg.into()));
        let role = if verb == "up" { Role::Peer } else { Role::Index };
        let (child, stdout, ready) = Self::spawn(&by.process, &home, &args, listen);
        Self { home, ready, args, role, by, child, stdout }
    }

    fn spawn(
        by: &[String],
        home: &Path,
        args: &[String],
        listen: &str,
    ) -> (Child, BufReader<ChildStdout>, Event) {
        // The pipe to its stdin is its leash: it ends with this test, however that ends.
        let mut child = potluck_by(by, &home.join("state"))
            .args(args)
            .args(["--listen", listen])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let ready = event(&line);
        assert!(matches!(ready, Event::Ready { .. }), "{}: {line}", home.display());
        (child, stdout, ready)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.home.join("state")
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> String {
        match &self.ready {
            Event::Ready { listen, .. } => listen.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// The invitation that an index printed when it started.
    pub(crate) fn invitation(&self) -> String {
        match &self.ready {
            Event::Ready { invite: Some(invite), .. } => invite.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// SIGKILL: no goodbye, nothing written any more. Gone when this returns.
    pub(crate) fn is_killed(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGSTOP: it stands still, with its connections open, until it goes on.
    pub(crate) fn stands_still(&self) {
        signal(&self.child, Signal::STOP);
    }

    pub(crate) fn goes_on(&self) {
        signal(&self.child, Signal::CONT);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts again where it was, on the state and the port it had.
    pub(crate) fn is_back(&mut self) {
        let address = self.address();
        let (child, stdout, ready) =
            Self::spawn(&self.by.process, &self.home, &self.args, &address);
        (self.child, self.stdout, self.ready) = (child, stdout, ready);
    }

    /// A verb that is run here.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = potluck_by(&self.by.verbs, &self.state());
        command.arg("--json").args(args).current_dir(&self.home);
        command
    }

    /// Runs a verb here; its exit code and its events.
    pub(crate) fn run(&self, args: &[&str]) -> (i32, Vec<Event>) {
        let output = self.command(args).output().unwrap();
        (output.status.code().unwrap(), events(&output))
    }

    /// Begins a verb here that is not waited for.
    pub(crate) fn begins(&self, args: &[&str]) -> Running {
        let mut child = self.command(args).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Running { child, stdout }
    }

    /// The result of a verb that must succeed.
    pub(crate) fn does(&self, args: &[&str]) -> Event {
        let (code, mut events) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {events:?}");
        events.pop().unwrap()
    }

    /// The exit code of a verb that must fail, which its last event tells as well.
    pub(crate) fn fails(&self, args: &[&str]) -> i32 {
        self.fails_with(args).0
    }

    /// The same, with what it says to people.
    pub(crate) fn fails_with(&self, args: &[&str]) -> (i32, String) {
        let (code, events) = self.run(args);
        let failure = events.last().and_then(Event::failure);
        let failure = failure.unwrap_or_else(|| panic!("{args:?}: {events:?}"));
        assert_eq!(i32::from(failure.exit_code()), code, "{failure}");
        (code, failure.message)
    }

    pub(crate) fn joins(&self, invitation: &str) {
        assert!(matches!(self.does(&["join", invitation]), Event::Joined { .. }));
    }

    /// Writes a file here and shares it; its id.
    pub(crate) fn shares(&self, path: &str, bytes: &[u8]) -> String {
        fs::write(self.home.join(path), bytes).unwrap();
        match self.does(&["share", path]) {
            Event::Shared { id, .. } => id,
            other => panic!("{other:?}"),
        }
    }

    /// Fetches; where it is, and who sent how much.
    pub(crate) fn gets(&self, what: &str) -> (PathBuf, Vec<(String, u64)>) {
        self.gets_with(&[what])
    }

    pub(crate) fn gets_with(&self, args: &[&str]) -> (PathBuf, Vec<(String, u64)>) {
        done(self.does(&[&["get"], args].concat()))
    }

    pub(crate) fn lists(&self) -> Vec<Row> {
        match self.does(&["ls"]) {
            Event::Listing { rows } => rows,
            other => panic!("{other:?}"),
        }
    }

    /// What it hosts or fetches, asked without a process in between.
    pub(crate) fn hosts(&self) -> Vec<ContentStatus> {
        match self.asks(&Request::Status).pop() {
            Some(Event::Status(status)) => status.contents,
            other => panic!("{other:?}"),
        }
    }

    /// Verified bytes here of a content.
    pub(crate) fn has(&self, id: &str) -> u64 {
        self.hosts().iter().find(|content| content.id == id).map_or(0, |content| content.have)
    }

    /// Asks the process itself, as the command line does.
    pub(crate) fn asks(&self, request: &Request) -> Vec<Event> {
        let client = Client::connect(&daemon::socket_path(&self.state(), self.role));
        let client = client.unwrap().expect("it runs");
        client.request(request).unwrap().map(Result::unwrap).collect()
    }

    /// Leaves, and is gone when this returns.
    pub(crate) fn leaves(mut self) {
        assert_eq!(self.does(&["down"]), Event::Stopping);
        assert!(self.child.wait().unwrap().success());
        let last = self.stdout.by_ref().lines().map(Result::unwrap).last().unwrap();
        assert_eq!(Event::from_line(&last), Ok(Event::Stopping));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Where a finished fetch is, and who sent how much.
pub(crate) fn done(event: Event) -> (PathBuf, Vec<(String, u64)>) {
    match event {
        Event::Done { path, sources, .. } => {
            (path, sources.into_iter().map(|source| (source.label, source.bytes)).collect())
        }
        other => panic!("{other:?}"),
    }
}

/// All bytes that were sent.
pub(crate) fn sum(sources: &[(String, u64)]) -> u64 {
    sources.iter().map(|(_, bytes)| bytes).sum()
}

/// A verb under way.
pub(crate) struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    /// What it prints next; none: it has ended.
    pub(crate) fn says(&mut self) -> Option<Event> {
        let mut line = String::new();
        (self.stdout.read_line(&mut line).unwrap() > 0).then(|| event(&line))
    }

    /// Waits until it says something of this kind.
    pub(crate) fn says_so(&mut self, mut what: impl FnMut(&Event) -> bool) -> Event {
        let mut before = Vec::new();
        while let Some(event) = self.says() {
            if what(&event) {
                return event;
            }
            before.push(event);
        }
        panic!("it ended without a word of it: {before:?}");
    }

    /// Ctrl-C.
    pub(crate) fn is_interrupted(&self) {
        signal(&self.child, Signal::INT);
    }

    /// Waits for its end; its exit code and the last it said.
    pub(crate) fn ends(mut self) -> (i32, Event) {
        let mut last = None;
        while let Some(event) = self.says() {
            last = Some(event);
        }
        (self.child.wait().unwrap().code().unwrap(), last.expect("it says how it went"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An index and peers that joined it, under one folder that goes with them.
pub(crate) struct Table<const N: usize> {
    pub(crate) index: Machine,
    pub(crate) peers: [Machine; N],
    pub(crate) dir: tempfile::TempDir,
}

/// An index with a heartbeat of a second, and these peers.
pub(crate) fn table<const N: usize>(names: [&str; N]) -> Table<N> {
    let dir = tempfile::tempdir().unwrap();
    let index = Machine::start_with(dir.path(), "index", "index", &["--heartbeat", "1"]);
    let invite = index.invitation();
    let peers = names.map(|name| {
        let peer = Machine::start(dir.path(), name, "up");
        peer.joins(&invite);
        peer
    });
    Table { index, peers, dir }
}
