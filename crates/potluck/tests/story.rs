//! The story that must work end to end, with the program as people run it: real processes, real
//! sockets, real files. Nothing here waits for time: every step waits for what the program says.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use potluck::control::{ContentStatus, Event, Row};

/// The program with a state folder of its own and no settings of whoever runs the tests.
fn potluck(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_potluck"));
    for name in ["POTLUCK_LISTEN", "POTLUCK_LABEL", "POTLUCK_LOG"] {
        command.env_remove(name);
    }
    command.env("POTLUCK_STATE", state).stdin(Stdio::null());
    command
}

/// What was printed with `--json`; every line must be an event that this version knows.
fn events(output: &Output) -> Vec<Event> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines()
        .map(|line| {
            assert!(line.starts_with(r#"{"v":1,"event":""#), "{line}");
            let event = Event::from_line(line).unwrap();
            assert_ne!(event, Event::Unknown, "{line}");
            event
        })
        .collect()
}

/// One machine: a folder with its state and what it has, and the process that serves it.
struct Machine {
    home: PathBuf,
    child: Child,
    /// Kept open, so that what it prints at its end has somewhere to go.
    stdout: BufReader<ChildStdout>,
    ready: Event,
}

impl Machine {
    fn start(under: &Path, name: &str, verb: &str) -> Self {
        let home = under.join(name);
        fs::create_dir(&home).unwrap();
        let mut command = potluck(&home.join("state"));
        command.args([verb, "--json", "--leash", "--listen", "127.0.0.1:0"]);
        if verb == "up" {
            command.args(["--label", name]);
        }
        // The pipe to its stdin is its leash: it ends with this test, however that ends.
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let ready = Event::from_line(&line).unwrap();
        assert!(matches!(ready, Event::Ready { .. }), "{name}: {line}");
        Self { home, child, stdout, ready }
    }

    /// Runs a verb here; its exit code and its events.
    fn run(&self, args: &[&str]) -> (i32, Vec<Event>) {
        let mut command = potluck(&self.home.join("state"));
        let output = command.arg("--json").args(args).current_dir(&self.home).output().unwrap();
        (output.status.code().unwrap(), events(&output))
    }

    /// The result of a verb that must succeed.
    fn does(&self, args: &[&str]) -> Event {
        let (code, mut events) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {events:?}");
        events.pop().unwrap()
    }

    /// The exit code of a verb that must fail, which its last event tells as well.
    fn fails(&self, args: &[&str]) -> i32 {
        let (code, events) = self.run(args);
        let failure = events.last().and_then(Event::failure).unwrap();
        assert_eq!(i32::from(failure.exit_code()), code, "{failure}");
        code
    }

    /// Fetches; where it is, and who sent how much.
    fn gets(&self, what: &str) -> (PathBuf, Vec<(String, u64)>) {
        match self.does(&["get", what]) {
            Event::Done { path, sources, .. } => {
                (path, sources.into_iter().map(|source| (source.label, source.bytes)).collect())
            }
            other => panic!("{other:?}"),
        }
    }

    fn lists(&self) -> Vec<Row> {
        match self.does(&["ls"]) {
            Event::Listing { rows } => rows,
            other => panic!("{other:?}"),
        }
    }

    fn hosts(&self) -> Vec<ContentStatus> {
        match self.does(&["status"]) {
            Event::Status(status) => status.contents,
            other => panic!("{other:?}"),
        }
    }

    /// Leaves, and is gone when this returns.
    fn leaves(mut self) {
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

/// Bytes that are the same in every run and nowhere repeat.
fn made_up(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(b"story").finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn whoever_fetches_hosts_and_the_publisher_may_leave() {
    let dir = tempfile::tempdir().unwrap();
    let index = Machine::start(dir.path(), "index", "index");
    let Event::Ready { invite: Some(invite), .. } = &index.ready else {
        panic!("{:?}", index.ready);
    };
    let [alice, bob, carol, dora] =
        ["alice", "bob", "carol", "dora"].map(|name| Machine::start(dir.path(), name, "up"));
    assert_eq!(bob.fails(&["ls"]), 4, "it is no member yet");
    for machine in [&alice, &bob, &carol, &dora] {
        assert!(matches!(machine.does(&["join", invite]), Event::Joined { .. }));
    }

    // A registers.
    let bytes = made_up(20_000_001);
    fs::write(alice.home.join("film.mkv"), &bytes).unwrap();
    let Event::Shared { id, name, size, .. } = alice.does(&["share", "film.mkv"]) else { panic!() };
    assert_eq!(id, blake3::hash(&bytes).to_string(), "it is what b3sum prints");
    assert_eq!((name.as_deref(), size), (Some("film.mkv"), 20_000_001));
    let listed = |rows: &[Row]| rows.iter().map(|row| (row.complete, row.size)).collect::<Vec<_>>();
    assert_eq!(listed(&dora.lists()), [(1, 20_000_001)]);

    // B gets it, and hosts it.
    let (at, from) = bob.gets("film.mkv");
    assert_eq!(at, bob.home.join("film.mkv"));
    assert!(fs::read(&at).unwrap() == bytes);
    assert_eq!(from, [("alice".to_owned(), 20_000_001)]);
    assert_eq!(
        bob.hosts().iter().map(|c| (c.id.as_str(), c.have)).collect::<Vec<_>>(),
        [(id.as_str(), 20_000_001)]
    );
    assert_eq!(dora.lists()[0].complete, 2);

    // C gets it from both.
    let (at, from) = carol.gets("film.mkv");
    assert!(fs::read(&at).unwrap() == bytes);
    assert_eq!(from.iter().map(|(_, bytes)| bytes).sum::<u64>(), 20_000_001);
    let mut labels: Vec<&str> = from.iter().map(|(label, _)| label.as_str()).collect();
    labels.sort_unstable();
    assert_eq!(labels, ["alice", "bob"]);

    // A leaves; D still gets it.
    alice.leaves();
    let (at, from) = dora.gets(&id);
    assert!(fs::read(&at).unwrap() == bytes);
    assert_eq!(from.iter().map(|(_, bytes)| bytes).sum::<u64>(), 20_000_001);
    assert!(from.iter().all(|(label, _)| label == "bob" || label == "carol"), "{from:?}");

    // What else may happen is told by exit codes.
    assert_eq!(dora.fails(&["get", "no-such-film"]), 3);
    assert_eq!(dora.gets("film.mkv"), (at, vec![]), "what is here is not fetched again");
    fs::write(dora.home.join("mine"), b"mine").unwrap();
    assert_eq!(dora.fails(&["get", "film.mkv", "-o", "mine"]), 10, "it never overwrites");
    assert_eq!(fs::read(dora.home.join("mine")).unwrap(), b"mine");
    assert_eq!(bob.does(&["unshare", "film.mkv"]), Event::Unshared { ids: vec![id] });
    assert!(bob.home.join("film.mkv").exists(), "no file is deleted");
    assert_eq!(bob.hosts(), []);
}

/// A state folder whose background processes are stopped at the end.
struct Background(PathBuf);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = potluck(&self.0.join("state")).args(["down", "--index"]).output();
    }
}

#[test]
fn two_machines_with_nothing_configured_need_two_commands() {
    let dir = tempfile::tempdir().unwrap();
    let [alice, bob] = ["alice", "bob"].map(|name| {
        let home = dir.path().join(name);
        fs::create_dir(&home).unwrap();
        Background(home)
    });
    let run = |who: &Background, args: &[&str]| {
        let mut command = potluck(&who.0.join("state"));
        // The two share one address here, so that the index's usual port may be taken: any will do.
        command.args(args).args(["--listen", "127.0.0.1:0"]).current_dir(&who.0).output().unwrap()
    };
    let folder = alice.0.join("photos");
    fs::create_dir_all(folder.join("2026/empty")).unwrap();
    fs::write(folder.join("2026/a.jpg"), made_up(300_000)).unwrap();
    fs::write(folder.join("nothing"), b"").unwrap();

    let shared = run(&alice, &["share", "photos"]);
    let text = String::from_utf8(shared.stdout).unwrap();
    assert!(shared.status.success(), "{}", String::from_utf8_lossy(&shared.stderr));
    assert!(String::from_utf8_lossy(&shared.stderr).contains("started potluck in the background"));
    let code = text.split_whitespace().find(|word| word.starts_with("potluck1")).unwrap();

    let got = run(&bob, &["get", code]);
    assert!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
    let at = String::from_utf8(got.stdout).unwrap();
    assert_eq!(Path::new(at.trim_end()), bob.0.join("photos"));
    assert!(fs::read(bob.0.join("photos/2026/a.jpg")).unwrap() == made_up(300_000));
    assert_eq!(fs::read(bob.0.join("photos/nothing")).unwrap(), b"");
    assert!(bob.0.join("photos/2026/empty").is_dir());

    for who in [&alice, &bob] {
        let down = potluck(&who.0.join("state")).arg("down").output().unwrap();
        assert!(down.status.success());
        let status = potluck(&who.0.join("state")).arg("status").output().unwrap();
        assert_eq!(status.status.code(), Some(3), "it is gone when down returns");
    }
}
