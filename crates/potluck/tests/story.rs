//! The story that must work end to end, with the program as people run it: real processes, real
//! sockets, real files. Nothing here waits for time: every step waits for what the program says.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Machine, made_up, potluck};
use potluck::control::{Event, Row};

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
