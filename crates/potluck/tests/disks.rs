//! The worst for the store, with the real program: killed over and over, power cut, disks that fail,
//! fill up, rot, go away or cannot be written to, quotas. Whatever needs root, or a program that is not
//! there, says so and is skipped. `POTLUCK_ROUNDS` makes the loops longer (`cargo xtask soak`).

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]
#![expect(clippy::print_stdout, reason = "figures, and what was skipped")]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Machine, Table, Under, alone_with, is_run_by, made_of, made_up, table, until};
use potluck::control::{ContentStatus, Event, Request};

/// Runs `name`, a test of this file, once more in a process with mounts of its own, which are gone
/// with it, however it ends. True in that process: go on.
fn has_own_mounts(name: &str) -> bool {
    is_run_by(&alone_with(&["--mount"], "true"), name, "root: it mounts")
}

/// How often a loop goes round: as often as is asked for, or `few` times.
fn rounds(few: u32) -> u32 {
    std::env::var("POTLUCK_ROUNDS").map_or(few, |text| text.parse().unwrap())
}

fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    found.is_ok_and(|output| output.status.success())
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A small disk in memory at `at`. To be used by who [`has_own_mounts`].
fn mount_memory(at: &Path, mib: u32) {
    fs::create_dir_all(at).unwrap();
    run("mount", &["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", text(at)]);
}

/// A disk in a file. To be used by who [`has_own_mounts`].
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    /// None, said loudly, where there are no loop devices or nothing to make a file system with.
    fn new(dir: &Path, kind: &str) -> Option<Self> {
        let (image, at) = (dir.join(format!("{kind}.img")), dir.join(kind));
        let mkfs = format!("mkfs.{kind}");
        if !has(&mkfs) || !has("losetup") {
            println!("SKIPPED: no {mkfs} here");
            return None;
        }
        File::create(&image).unwrap().set_len(320 << 20).unwrap();
        fs::create_dir(&at).unwrap();
        let quiet = if kind == "ext4" { "-F" } else { "-f" };
        run(&mkfs, &["-q", quiet, text(&image)]);
        let disk = Self { image, at };
        if !disk.mount() {
            println!("SKIPPED: no loop device can be mounted here");
            return None;
        }
        Some(disk)
    }

    fn mount(&self) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).args([&self.image, &self.at]);
        mount.output().is_ok_and(|output| output.status.success())
    }

    fn unmount(&self) {
        until("an end of its use", || {
            let unmount = Command::new("umount").arg(&self.at).output().unwrap();
            unmount.status.success().then_some(())
        });
    }

    /// As when the power fails: what was not made durable is gone, and so is who was writing.
    fn loses_power(&self, with: &mut Machine) {
        run("xfs_io", &["-x", "-c", "shutdown", text(&self.at)]);
        with.is_killed();
        self.unmount();
        assert!(self.mount());
    }
}

/// A folder of all that makes a store's life hard, shared by `alice`: its id.
fn shares_a_folder(alice: &Machine) -> (PathBuf, String) {
    let folder = alice.home.join("things");
    fs::create_dir_all(folder.join("small")).unwrap();
    fs::write(folder.join("large"), made_up(24 << 20)).unwrap();
    for nth in 0..120 {
        let bytes = made_of(&nth.to_string(), nth * 900);
        fs::write(folder.join(format!("small/{nth}")), bytes).unwrap();
    }
    let sparse = File::create(folder.join("sparse")).unwrap();
    sparse.set_len(8 << 20).unwrap();
    sparse.write_all_at(b"the end", (8 << 20) - 7).unwrap();
    fs::create_dir(folder.join("empty")).unwrap();
    let Event::Shared { id, .. } = alice.does(&["share", "things"]) else { panic!() };
    (folder, id)
}

/// All files below `root`, by their hash.
fn hashes(root: &Path) -> Vec<(PathBuf, blake3::Hash)> {
    let (mut all, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let hash = blake3::hash(&fs::read(&path).unwrap());
                    all.push((path.strip_prefix(root).unwrap().to_owned(), hash));
                }
            }
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn status_of(machine: &Machine, id: &str) -> ContentStatus {
    machine.hosts().into_iter().find(|content| content.id == id).expect("it knows the content")
}

/// Every piece that a machine claims is hashed again by itself: none is bad.
fn claims_nothing_wrong(machine: &Machine) {
    match machine.asks(&Request::Verify { what: None }).pop() {
        Some(Event::Verified { bad, .. }) => assert_eq!(bad, []),
        other => panic!("{other:?}"),
    }
}

/// Kills `bob` over and over while he fetches `id`, `end` deciding how each life ends. After each
/// restart everything that his journal claims is hashed again, and what was durable once is there.
fn dies_again_and_again(
    (alice, bob): (&Machine, &mut Machine),
    (source, id, target): (&Path, &str, &Path),
    rounds: u32,
    mut end: impl FnMut(&mut Machine),
) {
    let size = status_of(alice, id).size;
    alice.does(&["limit", "--up", "8MB"]); // lives are longer and shorter than a second's work
    let whole = hashes(source);
    let (mut fetches, mut durable, mut oldest) = (0, 0, Duration::ZERO);
    for death in 0..rounds {
        // Whoever asked goes with it; a fetch that was begun goes on by itself.
        let _get = bob.hosts().is_empty().then(|| {
            fetches += 1;
            let mut get = bob.begins(&["get", id, "-o", text(target)]);
            get.says_so(|event| matches!(event, Event::Fetching { .. }));
            get
        });
        // Somewhere on the way, each time elsewhere.
        let step = u64::from(blake3::hash(&death.to_le_bytes()).as_bytes()[0]) * (size / 1024);
        let before = bob.has(id);
        let mut life = vec![(Instant::now(), before)];
        until("more of it", || {
            let has = bob.has(id);
            life.push((Instant::now(), has));
            (has >= (before + step).min(size)).then_some(())
        });
        let died = Instant::now();
        end(bob);
        alice.stands_still(); // so that nothing more comes while all is looked at
        if target.symlink_metadata().is_ok() {
            assert_eq!(hashes(target), whole, "its final name is on all of it or on nothing");
        }
        bob.is_back();
        let was_durable = std::mem::replace(&mut durable, bob.has(id));
        claims_nothing_wrong(bob);
        assert_eq!(bob.has(id), durable, "what it claimed was there");
        assert!(durable >= was_durable, "what was durable once is there");
        let lost = life.iter().find(|(_, has)| *has > durable);
        oldest = oldest.max(lost.map_or(Duration::ZERO, |(since, _)| died - *since));
        alice.goes_on();
        if target.symlink_metadata().is_ok() {
            assert_eq!(hashes(target), whole);
            bob.does(&["unshare", id]);
            fs::remove_dir_all(target).unwrap();
            durable = 0;
        }
    }
    if !bob.hosts().is_empty() {
        until("the rest", || (status_of(bob, id).state == "sharing").then_some(()));
        assert_eq!(hashes(target), whole);
    }
    println!(
        "{rounds} deaths in {fetches} fetches; nothing was lost that was older than {oldest:?}"
    );
}

#[test]
fn a_peer_killed_over_and_over_claims_only_what_it_has_and_finishes() {
    let Table { dir: _dir, index: _index, peers: [alice, mut bob] } = table(["alice", "bob"]);
    let (source, id) = shares_a_folder(&alice);
    let target = bob.home.join("copy");
    dies_again_and_again((&alice, &mut bob), (&source, &id, &target), rounds(20), |bob| {
        bob.is_killed();
    });
}

/// A machine whose state and files are on a disk of its own loses the power of that over and over.
fn loses_power_on(kind: &str) {
    let Table { dir, index, peers: [alice] } = table(["alice"]);
    if !has("xfs_io") {
        println!("SKIPPED: no xfs_io here (xfsprogs)");
        return;
    }
    let Some(disk) = Disk::new(dir.path(), kind) else { return };
    let home = disk.at.join("bob");
    fs::create_dir(&home).unwrap();
    let mut bob = Machine::start_by(home, "bob", "up", &[], Under::default());
    bob.joins(&index.invitation());
    let (source, id) = shares_a_folder(&alice);
    let target = bob.home.join("copy");
    let cut = |bob: &mut Machine| disk.loses_power(bob);
    dies_again_and_again((&alice, &mut bob), (&source, &id, &target), rounds(6), cut);
}

#[test]
fn a_power_cut_on_ext4_costs_little_and_claims_nothing_wrong() {
    if has_own_mounts("a_power_cut_on_ext4_costs_little_and_claims_nothing_wrong") {
        loses_power_on("ext4");
    }
}

#[test]
fn a_power_cut_on_xfs_costs_little_and_claims_nothing_wrong() {
    if has_own_mounts("a_power_cut_on_xfs_costs_little_and_claims_nothing_wrong") {
        loses_power_on("xfs");
    }
}

/// Tampers with calls of a running process, as a broken or slow disk does, until dropped. The store
/// speaks to the kernel past the C library, so this is done between the two.
struct Tampering(Child);

impl Tampering {
    /// `how` is done to the `calls` of each thread, as strace calls it.
    fn with(machine: &Machine, calls: &str, how: &str) -> Option<Self> {
        let inject = format!("inject={calls}:{how}");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}"), "-e", &inject]);
        strace.args(["-p", &machine.pid().to_string()]).stderr(Stdio::piped());
        let Ok(mut child) = strace.spawn() else {
            println!("SKIPPED: no strace here");
            return None;
        };
        let mut said = String::new();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        lines.read_line(&mut said).unwrap();
        let tampering = Self(child);
        if !said.contains("attached") {
            println!("SKIPPED: strace may not: {said}");
            return None;
        }
        std::thread::spawn(move || lines.lines().count()); // so that it is never held up
        Some(tampering)
    }
}

/// Whether a thread of the process stands in a call that is held up: whenever it is looked at.
fn is_held_up(machine: &Machine) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", machine.pid())).unwrap();
    tasks.map(|task| task.unwrap().path().join("stat")).any(|stat| {
        (0..1_000).all(|_| fs::read_to_string(&stat).is_ok_and(|text| text.contains(") t ")))
    })
}

impl Drop for Tampering {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Killed between the last piece and the final name, it took itself for whole when it was back: the
/// name never came, and `get` said that all was done.
#[test]
fn a_fetch_that_is_killed_just_before_its_final_name_gets_it_afterwards() {
    let Table { dir: _dir, index: _index, peers: [alice, mut bob] } = table(["alice", "bob"]);
    let bytes = made_up(3 << 20);
    let id = alice.shares("film", &bytes);
    let target = bob.home.join("copy");
    let Some(slow) = Tampering::with(&bob, "renameat2", "delay_enter=3000000") else { return };
    let get = bob.begins(&["get", &id, "-o", "copy"]);
    until("all pieces", || (bob.has(&id) == bytes.len() as u64).then_some(()));
    until("its end", || is_held_up(&bob).then_some(()));
    bob.is_killed();
    drop((slow, get));
    // Whoever tampers with its threads has to let go of them as well.
    let is_gone = || !Path::new(&format!("/proc/{}", bob.pid())).exists();
    until("an end of all its threads", || is_gone().then_some(()));
    assert!(!target.exists());
    bob.is_back();
    until("its name", || target.exists().then_some(()));
    assert!(fs::read(target).unwrap() == bytes);
    until("all of it", || (status_of(&bob, &id).state == "sharing").then_some(()));
}

#[test]
fn a_disk_that_fails_is_never_believed() {
    let Table { dir: _dir, index: _index, peers: [alice, mut bob] } = table(["alice", "bob"]);
    let (source, id) = shares_a_folder(&alice);
    let target = bob.home.join("copy");
    let get = ["get", &id, "-o", text(&target), "--timeout", "20s"];
    // Writes of pieces, of the journal and the database; making durable; names.
    let calls = ["pwritev", "pwrite64", "fdatasync,fsync,syncfs", "renameat2,rename"];
    let (mut failed, mut done) = (0, 0);
    for round in 0..rounds(8) {
        alice.does(&["limit", "--up", "40MB"]);
        let fetch = bob.begins(&get);
        until("some of it", || (bob.hosts().is_empty() || bob.has(&id) > 0).then_some(()));
        let call = calls[round as usize % calls.len()];
        let first = if call.starts_with("rename") { 1 } else { 2 + round % 5 };
        let how = format!("error=EIO:when={first}+{}", 3 + round % 3);
        let Some(broken) = Tampering::with(&bob, call, &how) else { return };
        alice.does(&["limit", "--up", "off"]);
        let (code, last) = fetch.ends();
        match last.failure() {
            None => done += 1,
            Some(failure) => {
                failed += 1;
                assert_eq!(code, 1, "{failure}");
                assert!(failure.message.contains("Input/output error"), "{failure}");
            }
        }
        if round % 2 == 0 {
            bob.is_killed();
        }
        drop(broken);
        if round % 2 == 0 {
            bob.is_back();
        }
        claims_nothing_wrong(&bob);
        if target.symlink_metadata().is_ok() {
            assert_eq!(hashes(&target), hashes(&source));
            bob.does(&["unshare", &id]);
            fs::remove_dir_all(&target).unwrap();
        }
    }
    println!("{failed} fetches failed and said so, {done} got around it");
    assert!(failed > 0);
    bob.gets_with(&get[1..]);
    assert_eq!(hashes(&target), hashes(&source));
}

/// Takes all the room that is left at `at`.
fn fill(at: &Path) -> PathBuf {
    let filler = at.join("filler");
    let mut file = File::create(&filler).unwrap();
    for size in [1 << 20, 4 << 10] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
    filler
}

#[test]
fn a_disk_that_fills_up_on_the_way_is_told_at_once_and_gone_on_with_when_there_is_room() {
    let name =
        "a_disk_that_fills_up_on_the_way_is_told_at_once_and_gone_on_with_when_there_is_room";
    if !has_own_mounts(name) {
        return;
    }
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    let small = bob.home.join("small");
    mount_memory(&small, 64);
    let (source, id) = shares_a_folder(&alice);
    let film = alice.shares("film", &made_of("film", 3 << 20));
    bob.does(&["limit", "--down", "1MB"]);
    let target = small.join("copy");
    let get = bob.begins(&["get", &id, "-o", text(&target)]);
    until("some of it", || (bob.has(&id) > 0).then_some(()));
    let full = Instant::now();
    let filler = fill(&small);
    bob.does(&["limit", "--down", "off"]);
    let (code, last) = get.ends();
    let told = full.elapsed();
    let failure = last.failure().unwrap();
    assert_eq!(code, 8, "{failure}");
    assert!(failure.message.contains("No space left"), "{failure}");
    assert!(failure.hint.unwrap().contains("by itself"));
    assert!(!target.exists());

    // Others go on.
    bob.gets_with(&[&film, "-o", "film"]);
    let note = until("a note", || status_of(&bob, &id).note);
    assert!(note.contains("disk is full"), "{note}");

    fs::remove_file(filler).unwrap();
    let freed = Instant::now();
    until("the rest", || (status_of(&bob, &id).state == "sharing").then_some(()));
    println!("told after {told:?}; whole {:?} after there was room", freed.elapsed());
    assert_eq!(hashes(&target), hashes(&source));
}

#[test]
fn a_quota_that_is_used_up_is_told_like_a_full_disk_and_gone_on_with() {
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    let (source, id) = shares_a_folder(&alice);
    alice.does(&["limit", "--up", "4MB"]);
    let target = bob.home.join("copy");
    let get = bob.begins(&["get", &id, "-o", text(&target)]);
    until("some of it", || (bob.has(&id) > 0).then_some(()));
    let Some(used_up) = Tampering::with(&bob, "pwritev", "error=EDQUOT") else { return };
    alice.does(&["limit", "--up", "off"]);
    let (code, last) = get.ends();
    let failure = last.failure().unwrap();
    assert_eq!(code, 8, "{failure}");
    assert!(failure.message.contains("quota exceeded"), "{failure}");
    assert!(failure.hint.unwrap().contains("by itself"));
    assert!(!target.exists());
    drop(used_up);
    until("the rest", || (status_of(&bob, &id).state == "sharing").then_some(()));
    assert_eq!(hashes(&target), hashes(&source));
}

#[test]
fn a_disk_that_may_not_be_written_to_is_told_and_another_disk_than_the_states_will_do() {
    let name = "a_disk_that_may_not_be_written_to_is_told_and_another_disk_than_the_states_will_do";
    if !has_own_mounts(name) {
        return;
    }
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    let other = bob.home.join("other");
    mount_memory(&other, 100);
    let (source, id) = shares_a_folder(&alice);
    run("mount", &["-o", "remount,ro", text(&other)]);
    let (code, text_of_it) = bob.fails_with(&["get", &id, "-o", "other/copy"]);
    assert_eq!(code, 1, "{text_of_it}");
    assert!(text_of_it.contains("Read-only file system"), "{text_of_it}");
    assert!(text_of_it.contains("other"), "{text_of_it}");
    assert_eq!(bob.hosts(), vec![]);
    run("mount", &["-o", "remount,rw", text(&other)]);
    assert_eq!(fs::read_dir(&other).unwrap().count(), 0);
    bob.gets_with(&[&id, "-o", "other/copy"]);
    assert_eq!(hashes(&other.join("copy")), hashes(&source));
}

#[test]
fn what_is_shared_from_a_disk_that_goes_away_is_withdrawn_and_the_rest_stays() {
    let name = "what_is_shared_from_a_disk_that_goes_away_is_withdrawn_and_the_rest_stays";
    if !has_own_mounts(name) {
        return;
    }
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    mount_memory(&alice.home.join("stick"), 64);
    let away = alice.shares("stick/film", &made_of("film", 8 << 20));
    let here = alice.shares("song", &made_of("song", 1 << 20));
    run("umount", &["-l", text(&alice.home.join("stick"))]);
    let lost = until("a withdrawal", || {
        Some(status_of(&alice, &away)).filter(|content| content.state == "lost")
    });
    assert!(lost.note.is_some(), "{lost:?}");
    let (code, text_of_it) = bob.fails_with(&["get", &away, "--timeout", "2s"]);
    assert!(code == 5 || code == 3, "{text_of_it}");
    bob.gets(&here);
}

/// A bit flips on the disk itself, where no time of any file tells: nothing bad is served as good,
/// whoever has the rot withdraws, and the fetch is completed by others.
#[test]
fn a_bit_that_rots_on_the_disk_is_never_served_as_good() {
    if !has_own_mounts("a_bit_that_rots_on_the_disk_is_never_served_as_good") {
        return;
    }
    let Table { dir, index, peers: [bob, carol] } = table(["bob", "carol"]);
    let Some(disk) = Disk::new(dir.path(), "ext4") else { return };
    let home = disk.at.join("alice");
    fs::create_dir(&home).unwrap();
    let mut alice = Machine::start_by(home, "alice", "up", &[], Under::default());
    alice.joins(&index.invitation());
    let bytes = made_up(2 << 20);
    let id = alice.shares("film", &bytes);
    run("sync", &["-f", text(&alice.home)]);
    alice.is_killed();
    disk.unmount();
    let image = fs::read(&disk.image).unwrap();
    let known = &bytes[(1 << 20) + 1000..][..64];
    let at = image.windows(64).position(|window| window == known).expect("its blocks");
    let image = File::options().write(true).open(&disk.image).unwrap();
    image.write_all_at(&[known[0] ^ 1], at as u64).unwrap();
    assert!(disk.mount());
    alice.is_back();
    assert_eq!(status_of(&alice, &id).state, "sharing", "nothing tells yet");

    let fetch = bob.begins(&["get", &id, "-o", "copy"]);
    let lost = until("a withdrawal", || {
        Some(status_of(&alice, &id)).filter(|content| content.state == "lost")
    });
    assert!(lost.note.unwrap().contains("bit rot"));
    assert!(!bob.home.join("copy").exists());
    // Somebody who has it in order comes.
    fs::write(carol.home.join("film"), &bytes).unwrap();
    carol.does(&["share", "film", "--name", "carols"]);
    assert_eq!(fetch.ends().0, 0);
    assert!(fs::read(bob.home.join("copy")).unwrap() == bytes);
}
