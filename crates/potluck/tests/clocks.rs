//! Wall clocks that jump, a machine's and the index's, under the real program (libfaketime): no lease
//! moves, and what fails says that it is the clock.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]
#![expect(clippy::print_stdout, reason = "what was skipped")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Machine, Under, made_of, made_up, until};
use potluck::control::Event;

/// A clock that the test sets, for a program that it runs.
struct Clock {
    at: PathBuf,
    library: PathBuf,
}

impl Clock {
    /// None where libfaketime is missing.
    fn new(dir: &Path, name: &str) -> Option<Self> {
        let places = fs::read_dir("/usr/lib").unwrap().map(|place| place.unwrap().path());
        let library = places
            .map(|place| place.join("faketime/libfaketimeMT.so.1"))
            .chain(["/usr/local/lib/faketime/libfaketimeMT.so.1".into()])
            .find(|library| library.exists());
        if library.is_none() {
            println!("SKIPPED: a clock that can be set takes libfaketime");
        }
        let clock = Self { at: dir.join(name), library: library? };
        clock.is("+0");
        Some(clock)
    }

    /// So far from the true time.
    fn is(&self, offset: &str) {
        let fresh = self.at.with_extension("new");
        fs::write(&fresh, offset).unwrap();
        fs::rename(&fresh, &self.at).unwrap();
    }

    /// What runs a program by this clock; its monotonic clock stays true, as a machine's does.
    fn by(&self) -> Under {
        let set = [
            format!("LD_PRELOAD={}", self.library.display()),
            format!("FAKETIME_TIMESTAMP_FILE={}", self.at.display()),
            "FAKETIME_NO_CACHE=1".into(),
            "FAKETIME_DONT_FAKE_MONOTONIC=1".into(),
            "DONT_FAKE_MONOTONIC=1".into(),
            "NO_FAKE_STAT=1".into(),
        ];
        Under { process: ["env".into()].into_iter().chain(set).collect(), verbs: vec![] }
    }

    fn starts(&self, dir: &Path, name: &str, verb: &str, more: &[&str]) -> Machine {
        let home = dir.join(name);
        fs::create_dir(&home).unwrap();
        Machine::start_by(home, name, verb, more, self.by())
    }
}

/// Back an hour and on five years: further than any clock may be wrong.
const JUMPS: [&str; 2] = ["-1h", "+5y"];

fn is_listed(name: &str, machine: &Machine) -> bool {
    machine.lists().iter().any(|row| row.name.as_deref() == Some(name))
}

/// Again and again: a wrong lease would end with the next datagram.
fn stays_listed(name: &str, machine: &Machine) {
    for _ in 0..20 {
        assert!(is_listed(name, machine));
    }
}

#[test]
fn a_machine_whose_clock_jumps_stays_listed_and_says_that_it_is_the_clock() {
    let dir = tempfile::tempdir().unwrap();
    let Some(clock) = Clock::new(dir.path(), "clock") else { return };
    let index = Machine::start_with(dir.path(), "index", "index", &["--heartbeat", "4"]);
    let invitation = index.invitation();
    let bob = Machine::start(dir.path(), "bob", "up");
    let alice = clock.starts(dir.path(), "alice", "up", &[]);
    for machine in [&alice, &bob] {
        machine.joins(&invitation);
    }
    alice.shares("film", &made_up(1_000));
    for jump in JUMPS {
        // Somebody whom she has no connection with yet: those that stand go on.
        let host = Machine::start(dir.path(), &format!("host{jump}"), "up");
        host.joins(&invitation);
        let song = host.shares("song", &made_of(jump, 1_000));
        clock.is(jump);
        stays_listed("film", &bob);
        stays_listed("film", &alice);
        let (code, text) = alice.fails_with(&["get", &song, "-o", "song", "--timeout", "3s"]);
        println!("{jump}: {text}");
        assert_eq!(code, 5, "{text}");
        assert!(text.contains("clock"), "{text}");
        let late = clock.starts(dir.path(), &format!("late{jump}"), "up", &[]);
        let (code, text) = late.fails_with(&["join", &invitation]);
        println!("{jump}: {text}");
        assert_eq!(code, 4, "{text}");
        assert!(text.contains("clock"), "{text}");
        stays_listed("film", &bob);

        clock.is("+0");
        let (at, _) = alice.gets_with(&[&song, "-o", &format!("song{jump}")]);
        assert!(fs::read(at).unwrap() == made_of(jump, 1_000));
        bob.gets_with(&["film", "-o", &format!("film{jump}")]);
        bob.does(&["unshare", "film"]);
    }
    // Neither is a lease longer than it should be.
    clock.is("-1h");
    drop(alice);
    until("the end of her lease", || (!is_listed("film", &bob)).then_some(()));
}

#[test]
fn an_index_whose_clock_jumps_keeps_its_leases_and_who_it_lets_in_says_that_it_is_the_clock() {
    let dir = tempfile::tempdir().unwrap();
    let Some(clock) = Clock::new(dir.path(), "clock") else { return };
    let index = clock.starts(dir.path(), "index", "index", &["--heartbeat", "4"]);
    let [alice, bob] = ["alice", "bob"].map(|name| {
        let machine = Machine::start(dir.path(), name, "up");
        machine.joins(&index.invitation());
        machine
    });
    alice.shares("film", &made_up(1_000));
    for jump in JUMPS {
        clock.is(jump);
        stays_listed("film", &bob);
        bob.gets_with(&["film", "-o", &format!("film{jump}")]);
        bob.does(&["unshare", "film"]);
        stays_listed("film", &alice);
    }
    // Five years on: a fresh invitation is in order, the certificate that it brings is of a time to come.
    let Event::Invited { invite, .. } = index.does(&["invite"]) else { panic!() };
    let late = Machine::start(dir.path(), "late", "up");
    let (code, text) = late.fails_with(&["join", &invite]);
    println!("{text}");
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("clock"), "{text}");
    clock.is("+0");
    // The invitations of before are forgotten by then; that of the wrong clock is as good as any.
    late.joins(&invite);
    stays_listed("film", &late);
    clock.is("-1h");
    drop(alice);
    until("the end of her lease", || (!is_listed("film", &bob)).then_some(()));
}
