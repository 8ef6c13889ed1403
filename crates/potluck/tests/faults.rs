//! What may go wrong, done to real processes: an index, a publisher and a fetcher that are killed,
//! files that change, disks that are too small, targets that exist; and contents of every shape.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{
    Machine, Running, Table, Under, can_run, done, made_of, made_up, sum, table, until,
    with_small_disk,
};
use potluck::control::{Event, Request, Row};

/// So many bytes that a fetch of them can be met half-way.
const LONG: usize = 96 << 20;

/// Waits until somebody lists exactly these copies: how many complete ones each row has.
fn lists_copies(machine: &Machine, copies: &[u32]) -> Vec<Row> {
    until(&format!("a listing of {copies:?} copies"), || {
        match machine.run(&["ls"]) {
            (0, mut events) => match events.pop() {
                Some(Event::Listing { rows }) => Some(rows),
                other => panic!("{other:?}"),
            },
            _ => None,
        }
        .filter(|rows| rows.iter().map(|row| row.complete).eq(copies.iter().copied()))
    })
}

/// Begins to fetch, and is back when some of it is here and most of it is not.
fn begins_to_get(machine: &Machine, id: &str, args: &[&str]) -> Running {
    let mut get = machine.begins(&[&["get", id], args].concat());
    get.says_so(|event| matches!(event, Event::Fetching { .. }));
    let have = until("the first pieces", || Some(machine.has(id)).filter(|have| *have > 0));
    assert!(have < LONG as u64 * 9 / 10, "it came too fast for this test: {have}");
    get
}

fn is_same(at: &Path, bytes: &[u8]) {
    assert!(fs::read(at).unwrap() == bytes, "{} is not what was shared", at.display());
}

/// Takes a folder of `part` away, puts a link to `outside` in its place, and puts it back; over and
/// over, until told. How often.
fn swaps(part: &Path, folders: &[&str], outside: &Path, stop: &AtomicBool) -> u32 {
    let mut swapped = 0;
    for round in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let at = part.join(folders[round % folders.len()]);
        let away = part.join("away");
        let taken = fs::rename(&at, &away).is_ok();
        // Also where it is not there yet: before it is made.
        if (taken || part.exists()) && symlink(outside, &at).is_ok() {
            swapped += 1;
            for _ in 0..round % 500 {
                std::hint::spin_loop();
            }
            let _ = fs::remove_file(&at);
        }
        if taken {
            let _ = fs::rename(&away, &at);
        }
    }
    swapped
}

#[test]
fn a_racer_that_swaps_folders_for_links_has_nothing_written_outside() {
    let Table { dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    let (tree, outside) = (alice.home.join("tree"), dir.path().join("outside"));
    let folders = ["a", "b", "b/c"];
    for folder in folders {
        for at in [tree.join(folder), outside.join(folder)] {
            fs::create_dir_all(at).unwrap();
        }
        for n in 0..16 {
            let name = format!("{folder}/f{n}");
            fs::write(tree.join(&name), made_of(&name, 20_000)).unwrap();
            // Of the same names and sizes, so that a wrong way would find what it looks for.
            for at in [outside.join(&name), outside.join(format!("f{n}"))] {
                fs::write(at, vec![b'x'; 20_000]).unwrap();
            }
        }
    }
    let Event::Shared { id, .. } = alice.does(&["share", "tree"]) else { panic!() };
    let all = || walkdir::WalkDir::new(&outside).into_iter().map(Result::unwrap);
    let before = all().count();
    let is_intact = || {
        assert_eq!(all().count(), before, "nothing more, and nothing less");
        for entry in all().filter(|entry| !entry.file_type().is_dir()) {
            assert!(fs::read(entry.path()).unwrap() == vec![b'x'; 20_000], "{entry:?}");
        }
    };
    let rounds = std::env::var("POTLUCK_ROUNDS").map_or(10, |text| text.parse().unwrap());
    bob.does(&["limit", "--down", "4MB"]);
    let (mut swapped, mut whole) = (0, 0);
    for round in 0..rounds {
        let name = format!("copy{round}");
        let get = bob.begins(&["get", &id, "-o", &name, "--timeout", "2s"]);
        let stop = AtomicBool::new(false);
        let code = std::thread::scope(|scope| {
            let racer = scope.spawn(|| {
                let part = || {
                    let all = fs::read_dir(&bob.home).unwrap().map(|entry| entry.unwrap().path());
                    all.into_iter().find(|path| path.to_string_lossy().ends_with("-part"))
                };
                let part = loop {
                    match part() {
                        Some(part) => break part,
                        None if stop.load(Ordering::Relaxed) => return 0,
                        None => {}
                    }
                };
                swaps(&part, &folders, &outside, &stop)
            });
            let (code, _) = get.ends();
            stop.store(true, Ordering::Relaxed);
            swapped += racer.join().unwrap();
            code
        });
        whole += u32::from(code == 0);
        is_intact();
        bob.run(&["unshare", &id]);
        let _ = fs::remove_dir_all(bob.home.join(&name));
    }
    println!("{swapped} swaps in {rounds} fetches, of which {whole} became whole");
    assert!(swapped > rounds, "{swapped}");
    bob.does(&["limit", "--down", "off"]);
    bob.gets_with(&[&id, "-o", "undisturbed"]);
    for folder in folders {
        let name = format!("{folder}/f3");
        is_same(&bob.home.join("undisturbed").join(&name), &made_of(&name, 20_000));
    }
}

#[test]
fn a_killed_index_lists_what_lives_when_it_is_back_even_without_its_database() {
    let Table { dir: _dir, mut index, peers: [alice, bob] } = table(["alice", "bob"]);
    let bytes = made_up(300_000);
    alice.shares("film", &bytes);
    let before = lists_copies(&bob, &[1]);

    index.is_killed();
    index.is_back();
    assert_eq!(lists_copies(&bob, &[1]), before, "with its name, version and publisher");

    // Without the database nobody is known any more: members show their certificates.
    index.is_killed();
    fs::remove_file(index.state().join("index/index.redb")).unwrap();
    index.is_back();
    assert_eq!(lists_copies(&bob, &[1]), before);
    is_same(&bob.gets("film").0, &bytes);
    lists_copies(&alice, &[2]);
    let Event::Members { members } = index.does(&["members"]) else { panic!() };
    assert_eq!(members.len(), 2, "{members:?}");
}

#[test]
fn what_a_killed_publisher_leaves_undone_is_told_and_gone_on_with() {
    let Table { dir: _dir, index: _index, peers: [mut alice, bob, carol] } =
        table(["alice", "bob", "carol"]);
    let bytes = made_up(LONG);
    let id = alice.shares("film", &bytes);
    let gets: Vec<Running> =
        [&bob, &carol].map(|m| begins_to_get(m, &id, &["--timeout", "3s"])).into();
    alice.is_killed();

    let ended: Vec<(i32, Event)> = gets.into_iter().map(Running::ends).collect();
    let have = [&bob, &carol].map(|m| m.has(&id));
    assert_eq!(have[0], have[1], "what one of them had, the other has now");
    if have[0] < LONG as u64 {
        for (code, last) in &ended {
            let text = last.failure().unwrap().message;
            assert_eq!(*code, 5, "{text}");
            assert!(
                text.contains(&format!("({} of {LONG} bytes)", LONG as u64 - have[0])),
                "{text}"
            );
        }
    }

    alice.is_back();
    for machine in [&bob, &carol] {
        let (at, from) = machine.gets(&id);
        is_same(&at, &bytes);
        assert!(sum(&from) <= LONG as u64, "no verified piece is fetched twice: {from:?}");
    }
}

#[test]
fn a_killed_fetcher_goes_on_by_itself_from_what_it_had() {
    let Table { dir: _dir, index: _index, peers: [mut alice, mut bob] } = table(["alice", "bob"]);
    let bytes = made_up(LONG);
    let id = alice.shares("film", &bytes);
    let mut get = begins_to_get(&bob, &id, &["--timeout", "10m"]);
    alice.is_killed();
    // Six words without a new piece are longer than the second of work that a crash may cost.
    let (mut still, mut here) = (0, 0);
    get.says_so(|event| {
        if let Event::Progress { done, .. } = event {
            still = if *done == here { still + 1 } else { 0 };
            here = *done;
        }
        still == 6
    });
    bob.is_killed();
    assert_ne!(get.ends().0, 0, "its peer is gone");

    bob.is_back();
    assert_eq!(bob.has(&id), here, "what was durable is here");
    alice.is_back();
    let whole = until("the rest", || bob.hosts().pop().filter(|c| c.state == "sharing"));
    is_same(&whole.path, &bytes);
    let Some(Event::Status(status)) = bob.asks(&Request::Status).pop() else { panic!() };
    assert_eq!(status.received, LONG as u64 - here, "only the rest was fetched");
}

#[test]
fn an_interrupted_fetch_pauses_and_goes_on() {
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    let bytes = made_up(LONG);
    let id = alice.shares("film", &bytes);
    let get = begins_to_get(&bob, &id, &[]);
    alice.stands_still(); // so that it is not complete before it pauses
    get.is_interrupted();
    let (code, last) = get.ends();
    assert_eq!(code, 130);
    assert_eq!(last.failure().unwrap().exit_code(), 130);
    until("a pause", || bob.hosts().pop().filter(|content| content.state == "paused"));
    alice.goes_on();
    let (at, from) = bob.gets("film");
    is_same(&at, &bytes);
    assert_eq!(sum(&from), LONG as u64, "what came before the pause is not fetched again");
}

/// Bytes a process has read by system calls.
fn bytes_read(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn a_restarted_peer_hashes_nothing_again_and_what_changed_is_withdrawn() {
    let Table { dir: _dir, index: _index, peers: [mut alice, bob] } = table(["alice", "bob"]);
    let names = ["same", "edited", "replaced", "truncated", "gone", "edited-while-away"];
    let ids: BTreeMap<&str, String> =
        names.map(|name| (name, alice.shares(name, &made_of(name, 8_000_000)))).into();
    let path = |name: &str| alice.home.join(name);
    let edit = |name: &str| {
        let file = File::options().write(true).open(path(name)).unwrap();
        file.write_all_at(b"other", 4_000_000).unwrap();
    };
    edit("edited");
    fs::write(path("new"), made_of("another", 8_000_000)).unwrap();
    fs::rename(path("new"), path("replaced")).unwrap();
    File::options().write(true).open(path("truncated")).unwrap().set_len(7_000_000).unwrap();
    fs::remove_file(path("gone")).unwrap();

    let not_to_be_had = |name: &str| {
        let (code, text) = bob.fails_with(&["get", &ids[name], "--timeout", "2s"]);
        assert!(code == 5 || code == 3, "{name}: {code}, {text}");
        assert!(!bob.home.join(&ids[name]).exists());
    };
    not_to_be_had("edited"); // before anybody looked at the file again
    for name in ["edited", "replaced", "truncated", "gone"] {
        let lost = until("a withdrawal", || {
            alice.hosts().into_iter().find(|c| c.id == ids[name] && c.state == "lost")
        });
        assert!(lost.note.is_some_and(|note| note.contains("changed")), "{name}");
        not_to_be_had(name);
    }
    lists_copies(&bob, &[1, 1]);

    let edited_while_away = path("edited-while-away");
    alice.is_killed();
    fs::write(&edited_while_away, b"short").unwrap();
    alice.is_back();
    let same = alice.hosts().into_iter().find(|content| content.id == ids["same"]).unwrap();
    assert_eq!((same.state.as_str(), same.have), ("sharing", 8_000_000));
    let read = bytes_read(alice.pid());
    assert!(read < 8_000_000, "it read {read} bytes to start with 8 MB shared");
    let (code, _) = bob.fails_with(&["get", &ids["edited-while-away"], "--timeout", "2s"]);
    assert!(code == 5 || code == 3);
    is_same(&bob.gets(&ids["same"]).0, &made_of("same", 8_000_000));
}

/// Whoever interrupted `verify` had what was being looked at withdrawn, as if it were bad.
#[test]
fn a_verification_that_is_called_off_withdraws_nothing() {
    let Table { dir: _dir, index: _index, peers: [alice] } = table(["alice"]);
    File::create(alice.home.join("sparse")).unwrap().set_len(1 << 30).unwrap();
    let Event::Shared { id, .. } = alice.does(&["share", "sparse"]) else { panic!() };
    let mut verify = alice.begins(&["verify"]);
    verify.says_so(|event| matches!(event, Event::Verifying { .. }));
    verify.is_interrupted();
    let ended = verify.ends();
    assert_eq!(ended.0, 130, "{ended:?}");
    // What follows is looked at when that is over.
    let Event::Verified { good, bad } = alice.does(&["verify"]) else { panic!() };
    assert_eq!((good, bad), (vec![id], vec![]));
}

#[test]
fn a_name_has_versions_and_one_publisher() {
    let Table { dir: _dir, index: _index, peers: [alice, bob, carol] } =
        table(["alice", "bob", "carol"]);
    let share = |path: &str, bytes: &[u8]| {
        fs::write(alice.home.join(path), bytes).unwrap();
        match alice.does(&["share", path, "--name", "game"]) {
            Event::Shared { id, name, version, .. } => {
                assert_eq!(name.as_deref(), Some("game"));
                (id, version.unwrap())
            }
            other => panic!("{other:?}"),
        }
    };
    let (first, second, third) = (made_of("1", 70_000), made_of("2", 70_000), made_of("3", 70_000));
    assert_eq!(share("kept", &first).1, 1);
    let (id, version) = share("game.bin", &second);
    assert_eq!(version, 2);
    assert_eq!(share("game.bin", &second), (id.clone(), 2), "the same again is no new version");

    is_same(&bob.gets("game").0, &second);
    is_same(&bob.gets_with(&["game@1", "-o", "old"]).0, &first);
    is_same(&carol.gets_with(&[&id, "-o", "by-id"]).0, &second);

    fs::write(carol.home.join("mine"), made_of("mine", 1_000)).unwrap();
    let (code, text) = carol.fails_with(&["share", "mine", "--name", "game"]);
    assert_eq!(code, 10, "{text}");
    assert!(text.contains("game"), "{text}");
    assert!(carol.hosts().iter().all(|content| content.path != carol.home.join("mine")));

    // The file itself moves on: others still have what it was.
    assert_eq!(share("game.bin", &third).1, 3);
    is_same(&carol.gets_with(&["game", "-o", "new"]).0, &third);
    assert_eq!(bob.fails(&["get", "game@4", "--timeout", "1s"]), 3);
    let rows = carol.lists();
    let named: Vec<_> = rows.iter().filter(|r| r.name.as_deref() == Some("game")).collect();
    assert_eq!(named.iter().filter_map(|row| row.version).max(), Some(3), "{rows:?}");
}

/// Every path under `root` with its mode and its bytes; none: a folder.
fn tree(root: &Path) -> BTreeMap<String, (u32, Option<Vec<u8>>)> {
    let mut all = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            let bytes = metadata.is_file().then(|| fs::read(&path).unwrap());
            all.insert(name, (metadata.permissions().mode(), bytes));
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    all
}

#[test]
fn contents_of_every_shape_arrive_as_they_were() {
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    for size in [0, 1, 65_535, 65_536, 65_537, 2 * 65_536] {
        let (name, bytes) = (format!("of-{size}"), made_up(size));
        let id = alice.shares(&name, &bytes);
        assert_eq!(id, blake3::hash(&bytes).to_string());
        let (at, from) = bob.gets(&name);
        is_same(&at, &bytes);
        assert_eq!(sum(&from), size as u64);
    }

    let sparse = File::create(alice.home.join("sparse")).unwrap();
    sparse.set_len(5_000_000).unwrap();
    sparse.write_all_at(b"the end", 4_999_993).unwrap();
    let Event::Shared { id, .. } = alice.does(&["share", "sparse"]) else { panic!() };
    let bytes = fs::read(alice.home.join("sparse")).unwrap();
    assert_eq!(id, blake3::hash(&bytes).to_string());
    is_same(&bob.gets("sparse").0, &bytes);

    fs::create_dir(alice.home.join("nothing")).unwrap();
    alice.does(&["share", "nothing"]);
    let (at, _) = bob.gets("nothing");
    assert!(at.is_dir() && tree(&at).is_empty());

    let folder = alice.home.join("things");
    for within in ["a/b/c", "émile/Ελλάδα 日本", "an empty one"] {
        fs::create_dir_all(folder.join(within)).unwrap();
    }
    for nth in 0..500 {
        let file = folder.join(["a", "a/b/c", "émile"][nth % 3]).join(format!("{nth}.txt"));
        fs::write(file, made_of(&nth.to_string(), nth * 7)).unwrap();
    }
    fs::write(folder.join("émile/Ελλάδα 日本/naïve 🥘"), made_up(200_001)).unwrap();
    fs::write(folder.join("run.sh"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(folder.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let Event::Shared { id, .. } = alice.does(&["share", "things"]) else { panic!() };
    assert!(id.ends_with('/'), "a folder's id says so: {id}");
    let (at, _) = bob.gets("things");
    let (sent, got) = (tree(&folder), tree(&at));
    assert_eq!(sent.keys().collect::<Vec<_>>(), got.keys().collect::<Vec<_>>());
    for (path, (mode, bytes)) in &sent {
        assert_eq!(got[path].0, *mode, "the mode of {path}");
        assert!(got[path].1 == *bytes, "{path}");
    }
    assert_eq!(fs::read_dir(&bob.home).unwrap().count(), 10, "nothing else is left beside them");
}

fn is_root() -> bool {
    rustix::process::getuid().is_root()
}

#[test]
fn a_folder_with_a_file_that_cannot_be_read_is_not_shared() {
    let Table { dir, index, peers: [bob] } = table(["bob"]);
    let home = dir.path().join("nobody");
    fs::create_dir(&home).unwrap();
    let mut by = Under::default();
    if is_root() {
        // Root reads everything: somebody else is to share.
        let setpriv: Vec<String> =
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"].map(Into::into).into();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(&home, Some(65_534), Some(65_534)).unwrap();
        if !can_run(&setpriv) {
            println!("SKIPPED: as root, and setpriv cannot run the program as nobody");
            return;
        }
        by = Under { process: setpriv.clone(), verbs: setpriv };
    }
    let nobody = Machine::start_by(home, "nobody", "up", &[], by);
    nobody.joins(&index.invitation());
    let folder = nobody.home.join("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("open"), b"open").unwrap();
    fs::write(folder.join("secret"), b"secret").unwrap();
    fs::set_permissions(folder.join("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    let (code, text) = nobody.fails_with(&["share", "folder"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("folder/secret"), "{text}");
    assert_eq!((nobody.hosts(), bob.lists()), (vec![], vec![]));
}

#[test]
fn a_disk_that_is_too_small_is_told_before_anything_is_written() {
    let Table { dir, index, peers: [alice] } = table(["alice"]);
    let home = dir.path().join("bob");
    let small = home.join("small");
    fs::create_dir_all(&small).unwrap();
    let process = with_small_disk(2, &small);
    if !can_run(&process) {
        println!("SKIPPED: no tmpfs can be mounted in a namespace of its own here");
        return;
    }
    let bob = Machine::start_by(home, "bob", "up", &[], Under { process, verbs: vec![] });
    bob.joins(&index.invitation());
    let id = alice.shares("film", &made_up(10_000_000));
    let (code, text) = bob.fails_with(&["get", "film", "-o", "small/"]);
    assert_eq!(code, 8, "{text}");
    let seen_by_bob = format!("/proc/{}/root{}", bob.pid(), small.display());
    assert_eq!(fs::read_dir(seen_by_bob).unwrap().count(), 0, "nothing is left behind");
    assert_eq!(bob.hosts(), vec![]);
    is_same(&bob.gets(&id).0, &made_up(10_000_000));
}

#[test]
fn a_target_that_exists_is_kept_unless_told_otherwise() {
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    let bytes = made_up(100_000);
    alice.shares("film.mkv", &bytes);
    let target = bob.home.join("film.mkv");
    fs::write(&target, b"mine").unwrap();

    let (code, text) = bob.fails_with(&["get", "film.mkv"]);
    assert_eq!(code, 10);
    assert!(text.contains("film.mkv exists already"), "{text}");
    assert_eq!(bob.gets_with(&["film.mkv", "--skip"]), (target.clone(), vec![]));
    let (at, _) = bob.gets_with(&["film.mkv", "--rename"]);
    assert_eq!(at, bob.home.join("film (2).mkv"));
    is_same(&at, &bytes);
    is_same(&target, b"mine");

    bob.does(&["unshare", "film.mkv"]);
    let (at, _) = bob.gets_with(&["film.mkv", "--overwrite"]);
    assert_eq!(at, target);
    is_same(&target, &bytes);
}

#[test]
fn a_watcher_is_told_every_change_also_after_the_index_was_lost() {
    let Table { dir: _dir, mut index, peers: [alice, bob, carol] } =
        table(["alice", "bob", "carol"]);
    let mut watch = carol.begins(&["watch"]);
    let begin = watch.says_so(|_| true);
    assert_eq!(begin, Event::Listing { rows: vec![] });
    let mut told = |what: &str, copies: u32| {
        let mut wanted = |event: &Event| match event {
            Event::Change { what: change, row } => change == what && row.complete == copies,
            other => panic!("{other:?}"),
        };
        match watch.says_so(&mut wanted) {
            Event::Change { row, .. } => row.name.unwrap(),
            _ => String::new(),
        }
    };
    alice.shares("film", &made_up(100_000));
    assert_eq!(told("added", 1), "film");
    bob.gets("film");
    assert_eq!(told("changed", 2), "film");
    alice.does(&["unshare", "film"]);
    assert_eq!(told("changed", 1), "film");
    bob.does(&["unshare", "film"]);
    assert_eq!(told("removed", 0), "film");

    index.is_killed();
    index.is_back();
    alice.shares("song", &made_up(50_000));
    assert_eq!(told("added", 1), "song");
    let get = bob.begins(&["get", "song"]);
    let (code, last) = get.ends();
    assert_eq!((code, done(last).0), (0, bob.home.join("song")));
    assert_eq!(told("changed", 2), "song");
}
