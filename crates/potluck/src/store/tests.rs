//! The store on a real disk: sharing, fetching, crashes, changes behind its back.

mod losses;

use super::*;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::IoSliceMut;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::sync::Once;
use std::time::{Duration, SystemTime};

use potluck_core::id::Piece;
use potluck_core::time::WallTime;
use proptest::prelude::*;
use tempfile::TempDir;

const PIECE: usize = 64 << 10;

/// A disk with a store, and a place for what is shared and fetched.
struct Bench {
    dir: TempDir,
    store: Option<Store>,
}

impl Bench {
    fn new() -> Self {
        let mut bench = Self { dir: tempfile::tempdir().unwrap(), store: None };
        bench.start();
        bench
    }

    /// On a disk in memory, where there is one: for what is much rather than slow.
    fn in_memory() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let mut bench = Self { dir, store: None };
        bench.start();
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn start(&mut self) -> Vec<Arc<Replica>> {
        let (store, replicas) = Store::open(&self.at("state")).unwrap();
        self.store = Some(store);
        replicas
    }

    fn restart(&mut self) -> Vec<Arc<Replica>> {
        self.store = None;
        self.start()
    }

    /// From now on nothing is made durable but by hand.
    fn kill(&self) {
        self.store().shared.killed.store(true, Ordering::Relaxed);
    }

    /// As if everything shared so far had been hashed long after it was written.
    fn age(&mut self) -> Vec<Arc<Replica>> {
        let ledger = &self.store().shared.ledger;
        for (id, mut entry) in ledger.wholes().unwrap() {
            entry.hashed = WallTime(entry.hashed.0 + 60);
            ledger.set_whole(&id, Some(&entry)).unwrap();
        }
        self.restart()
    }

    fn import(&self, name: &str) -> Result<Imported> {
        self.store().import(&self.at(name), &|_, _| {}, &AtomicBool::new(false))
    }

    fn share(&self, name: &str) -> Arc<Replica> {
        self.import(name).unwrap().replica
    }

    fn fetch(&self, of: &Replica, name: &str) -> Result<Arc<Replica>> {
        let (manifest, proof) = (of.manifest(), of.proof());
        self.store().fetch(of.id(), of.size(), manifest, &proof, &self.at(name), false)
    }

    /// Everything that lies beside the state folder.
    fn names(&self) -> BTreeSet<String> {
        let names = fs::read_dir(self.dir.path()).unwrap();
        let names = names.map(|item| item.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "state").collect()
    }
}

/// Bytes that look like nothing in particular, different for each seed.
fn some_bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// The pieces in an order that looks like none.
fn shuffled(of: &Replica, seed: u64) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = (0..of.layout().pieces()).map(Piece).collect();
    pieces.sort_by_cached_key(|piece| {
        *blake3::hash(&[seed.to_le_bytes(), u64::from(piece.0).to_le_bytes()].concat()).as_bytes()
    });
    pieces
}

impl Replica {
    /// Appends a piece's bytes to `buf`; nothing where it cannot be read.
    pub(crate) fn read_to(&self, piece: Piece, buf: &mut Vec<u8>) -> Result<(), ReadError> {
        let mut bytes = vec![0; self.layout().len_of(piece) as usize];
        self.read(piece, &mut [IoSliceMut::new(&mut bytes)])?;
        buf.extend(bytes);
        Ok(())
    }
}

fn carry(from: &Replica, to: &Replica, pieces: impl IntoIterator<Item = Piece>) {
    let mut bytes = Vec::new();
    for piece in pieces {
        bytes.clear();
        from.read_to(piece, &mut bytes).unwrap();
        to.put(piece, &[&bytes]).unwrap();
    }
}

fn no_progress() -> (impl Fn(u64, u64) + Sync, AtomicBool) {
    (|_, _| {}, AtomicBool::new(false))
}

fn recheck(replica: &Replica) -> Vec<Piece> {
    let (progress, cancel) = no_progress();
    replica.recheck(&progress, &cancel).unwrap()
}

/// Path, bytes and executable bit of everything in a folder; folders end with a slash.
fn tree(root: &Path) -> Vec<(PathBuf, Vec<u8>, bool)> {
    let walk = walkdir::WalkDir::new(root).min_depth(1).sort_by_file_name();
    walk.into_iter()
        .map(|item| {
            let item = item.unwrap();
            let path = item.path().strip_prefix(root).unwrap().to_owned();
            let executable = item.metadata().unwrap().permissions().mode() & 0o100 != 0;
            match item.file_type().is_dir() {
                true => (path.join(""), Vec::new(), true),
                false => (path, fs::read(item.path()).unwrap(), executable),
            }
        })
        .collect()
}

/// A folder with a bit of everything: large and small, empty and executable, deep and foreign.
fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("sub/deep/er")).unwrap();
    fs::create_dir_all(root.join("leer/sehr leer")).unwrap();
    fs::write(root.join("large"), some_bytes(11 * PIECE + 17, 1)).unwrap();
    fs::write(root.join("sub/even"), some_bytes(4 * PIECE, 2)).unwrap();
    fs::write(root.join("sub/deep/er/日本語.txt"), some_bytes(100, 3)).unwrap();
    fs::write(root.join("sub/nothing"), "").unwrap();
    fs::write(root.join("Ünï"), "u").unwrap();
    for (name, bytes) in [("run.sh", "#!/bin/sh\n"), ("sub/empty.sh", "")] {
        fs::write(root.join(name), bytes).unwrap();
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    // More files with several pieces than are synced one by one.
    for n in 0..40 {
        fs::write(root.join(format!("sub/{n}.dat")), some_bytes(PIECE + n, n as u64)).unwrap();
    }
}

fn touch(path: &Path) {
    let file = fs::OpenOptions::new().append(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(1_000)).unwrap();
}

#[test]
fn a_file_has_the_id_that_b3sum_prints_and_is_read_where_it_is() {
    let bench = Bench::new();
    for size in [0, 1, 1024, PIECE - 1, PIECE, PIECE + 1, 7 * PIECE + 3, 40 * PIECE] {
        let bytes = some_bytes(size, 5);
        fs::write(bench.at("f"), &bytes).unwrap();
        let replica = bench.share("f");
        assert_eq!(replica.id(), ContentId::file(*blake3::hash(&bytes).as_bytes()));
        assert_eq!((replica.size(), replica.path()), (size as u64, bench.at("f")));
        assert!(replica.is_complete() && !replica.is_growing() && !replica.changed());
        let mut read = b"before".to_vec();
        for piece in (0..replica.layout().pieces()).map(Piece) {
            replica.read_to(piece, &mut read).unwrap();
        }
        assert_eq!(read[6..], bytes);
        let beyond = Piece(replica.layout().pieces());
        assert_eq!(replica.read_to(beyond, &mut read), Err(ReadError::NotHeld));
        assert_eq!(read.len(), 6 + size);
    }
    assert_eq!(bench.names(), BTreeSet::from(["f".into()]));
}

#[test]
fn a_file_of_more_than_four_gibibytes_is_hashed_and_its_end_is_read() {
    let bench = Bench::in_memory();
    let size = (4 << 30) + (5 << 20) + 3;
    let file = File::create(bench.at("sparse")).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(b"end", size - 3).unwrap();
    let imported = bench.import("sparse").unwrap();
    assert_eq!((imported.hashed, imported.replica.size()), (size, size));
    let last = Piece(imported.replica.layout().pieces() - 1);
    let mut bytes = Vec::new();
    imported.replica.read_to(last, &mut bytes).unwrap();
    assert!(bytes.ends_with(b"\0end"));
    assert!(!imported.replica.suspect(last));
}

#[test]
fn a_folder_comes_over_whole_with_everything_in_it() {
    let (from, mut to) = (Bench::new(), Bench::new());
    make_tree(&from.at("tree"));
    let source = from.share("tree");
    assert!(source.id().to_string().ends_with('/'));
    let mut replica = to.fetch(&source, "copy").unwrap();
    assert!(replica.is_growing() && replica.have().is_empty());
    assert_eq!(replica.path(), to.at("copy"));
    // A third at a time, the store closed and opened again in between.
    let pieces = shuffled(&source, 9);
    for some in pieces.chunks(pieces.len() / 3) {
        carry(&source, &replica, some.iter().copied());
        assert!(!to.at("copy").exists());
        let before = replica.have();
        drop(replica);
        let mut again = to.restart();
        replica = again.pop().unwrap();
        assert_eq!((again.len(), replica.have()), (0, before));
        assert_eq!(recheck(&replica), []);
    }
    assert!(replica.is_complete());
    assert_eq!(replica.finish(), Ok(to.at("copy")));
    assert_eq!(replica.finish(), Ok(to.at("copy")));
    assert_eq!(tree(&to.at("copy")), tree(&from.at("tree")));
    assert_eq!(to.names(), BTreeSet::from(["copy".into()]));
    assert_eq!(fs::read_dir(to.at("state/peer/journal")).unwrap().count(), 0);
    // It is shared from there, now and after a restart, and has the same id.
    assert!(!replica.is_growing() && !replica.changed());
    assert_eq!(recheck(&replica), []);
    drop(replica);
    let replica = to.restart().pop().unwrap();
    assert!(replica.is_complete() && !replica.changed());
    assert_eq!(to.share("copy").id(), source.id());
}

#[test]
fn a_file_comes_over_in_any_order_through_many_threads_at_once() {
    let (from, to) = (Bench::new(), Bench::new());
    let bytes = some_bytes(50 * PIECE + 1, 4);
    fs::write(from.at("f"), &bytes).unwrap();
    let source = from.share("f");
    let replica = to.fetch(&source, "f").unwrap();
    let new = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (source, replica, new) = (&source, &replica, &new);
            scope.spawn(move || {
                for piece in shuffled(source, seed) {
                    let mut bytes = Vec::new();
                    source.read_to(piece, &mut bytes).unwrap();
                    if replica.put(piece, &[&bytes]).unwrap() == Put::New {
                        new.fetch_add(1, Ordering::Relaxed);
                    }
                }
                // Whoever is first; the others' pieces may still be under way.
                replica.finish().unwrap();
            });
        }
    });
    assert_eq!(new.into_inner(), u64::from(source.layout().pieces()));
    assert_eq!(fs::read(to.at("f")).unwrap(), bytes);
    assert!(!replica.changed());
    assert_eq!(replica.put(Piece(0), &[b"x"]), Ok(Put::Duplicate));
}

#[test]
fn ten_thousand_small_files_are_shared_fetched_and_the_same() {
    let (from, to) = (Bench::in_memory(), Bench::in_memory());
    for n in 0..10_000u64 {
        if n % 100 == 0 {
            fs::create_dir_all(from.at(&format!("many/{}", n / 100))).unwrap();
        }
        fs::write(from.at(&format!("many/{}/{n}", n / 100)), some_bytes(n as usize % 50, n))
            .unwrap();
    }
    let source = from.share("many");
    assert_eq!(source.layout().files(), 10_000);
    assert!(source.proof().is_empty());
    let replica = to.fetch(&source, "many").unwrap();
    carry(&source, &replica, shuffled(&source, 1));
    replica.finish().unwrap();
    assert_eq!(tree(&to.at("many")), tree(&from.at("many")));
}

#[test]
fn nothing_but_an_empty_file_or_folder_is_fetched_too() {
    let (from, to) = (Bench::new(), Bench::new());
    fs::write(from.at("file"), "").unwrap();
    fs::create_dir(from.at("folder")).unwrap();
    for name in ["file", "folder"] {
        let source = from.share(name);
        let replica = to.fetch(&source, name).unwrap();
        assert!(replica.is_complete() && replica.is_growing());
        replica.finish().unwrap();
        assert_eq!(to.share(name).id(), source.id());
    }
    assert_eq!(fs::read(to.at("file")).unwrap(), b"");
    assert_eq!(fs::read_dir(to.at("folder")).unwrap().count(), 0);
}

#[test]
fn a_second_sharing_hashes_only_what_is_new() {
    let mut bench = Bench::new();
    make_tree(&bench.at("tree"));
    let first = bench.import("tree").unwrap();
    assert_eq!(first.hashed, first.replica.size());
    let id = first.replica.id();
    // Just written: it could have changed within the clock's tick, so it is hashed once more.
    assert_eq!(bench.import("tree").unwrap().hashed, first.hashed);
    drop(first);
    drop(bench.age());
    let again = bench.import("tree").unwrap();
    assert_eq!((again.hashed, again.replica.id()), (0, id));
    assert!(Arc::ptr_eq(&again.replica, &bench.import("tree").unwrap().replica));
    fs::write(bench.at("tree/sub/new"), some_bytes(123, 0)).unwrap();
    fs::write(bench.at("tree/sub/even"), some_bytes(4 * PIECE, 77)).unwrap();
    fs::remove_file(bench.at("tree/large")).unwrap();
    let changed = bench.import("tree").unwrap();
    assert_eq!(changed.hashed, 123 + 4 * PIECE as u64);
    assert_eq!(recheck(&changed.replica), []);
    let fresh = Bench::new();
    let copy =
        fresh.store().import(&bench.at("tree"), &|_, _| {}, &AtomicBool::new(false)).unwrap();
    assert_eq!(copy.replica.id(), changed.replica.id());
}

#[test]
fn a_restart_knows_what_was_shared_without_hashing() {
    let mut bench = Bench::new();
    fs::write(bench.at("f"), some_bytes(3 * PIECE, 1)).unwrap();
    make_tree(&bench.at("tree"));
    let ids = BTreeSet::from([bench.share("f").id(), bench.share("tree").id()]);
    let known = bench.restart();
    assert_eq!(known.iter().map(|r| r.id()).collect::<BTreeSet<_>>(), ids);
    assert!(known.iter().all(|r| r.is_complete() && !r.changed()));
    let mut bytes = Vec::new();
    known.iter().for_each(|r| r.read_to(Piece(1), &mut bytes).unwrap());
    for id in &ids {
        bench.store().forget(id).unwrap();
        bench.store().forget(id).unwrap();
    }
    assert_eq!(known[0].read_to(Piece(1), &mut bytes), Err(ReadError::NotHeld));
    drop(known);
    assert!(bench.restart().is_empty());
    assert!(bench.at("f").exists() && bench.at("tree/large").exists());
}

#[test]
fn what_changed_after_sharing_is_noticed_and_not_served() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 7] = [
        ("edited", |path| {
            fs::write(path, some_bytes(3 * PIECE, 99)).unwrap();
            touch(path);
        }),
        ("appended to", |path| {
            let file = fs::OpenOptions::new().append(true).open(path).unwrap();
            file.write_all_at(b"more", 3 * PIECE as u64).unwrap();
        }),
        ("truncated", |path| File::options().write(true).open(path).unwrap().set_len(9).unwrap()),
        ("replaced", |path| {
            fs::write(path.with_extension("new"), some_bytes(3 * PIECE, 98)).unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        }),
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("replaced by a link", |path| {
            fs::rename(path, path.with_extension("moved")).unwrap();
            symlink(path.with_extension("moved"), path).unwrap();
        }),
        ("replaced by a folder", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for (what, change) in changes {
        for read_before in [true, false] {
            let bench = Bench::new();
            fs::create_dir(bench.at("tree")).unwrap();
            fs::write(bench.at("tree/f"), some_bytes(3 * PIECE, 1)).unwrap();
            fs::write(bench.at("tree/other"), "o").unwrap();
            let replicas = [bench.share("tree/f"), bench.share("tree")];
            let mut bytes = Vec::new();
            if read_before {
                replicas.iter().for_each(|r| r.read_to(Piece(0), &mut bytes).unwrap());
            }
            bytes.clear();
            change(&bench.at("tree/f"));
            for replica in replicas {
                assert!(replica.changed(), "{what}");
                for piece in [Piece(0), Piece(2)] {
                    let read = replica.read_to(piece, &mut bytes);
                    assert_eq!(read, Err(ReadError::Changed), "{what}, {read_before}");
                }
                assert!(bytes.is_empty(), "{what}");
            }
        }
    }
}

#[test]
fn what_was_only_touched_is_shared_again_after_a_recheck() {
    let mut bench = Bench::new();
    make_tree(&bench.at("tree"));
    let replica = bench.share("tree");
    touch(&bench.at("tree/large"));
    let mut bytes = Vec::new();
    let large = Piece(replica.layout().pieces_of(0).start);
    assert!(replica.changed());
    assert_eq!(replica.read_to(large, &mut bytes), Err(ReadError::Changed));
    assert_eq!(recheck(&replica), []);
    assert!(!replica.changed());
    replica.read_to(large, &mut bytes).unwrap();
    drop(replica);
    assert!(!bench.restart()[0].changed());
}

#[test]
fn a_rotten_piece_is_found_and_stays_unserved() {
    let mut bench = Bench::new();
    let mut bytes = some_bytes(5 * PIECE, 1);
    fs::write(bench.at("f"), &bytes).unwrap();
    let replica = bench.share("f");
    bytes[3 * PIECE] ^= 1;
    fs::write(bench.at("f"), &bytes).unwrap();
    assert!(!replica.suspect(Piece(2)));
    assert!(replica.suspect(Piece(3)) && replica.suspect(Piece(3)));
    assert!(!replica.have().has(Piece(3)) && replica.have().count() == 4);
    drop(replica);
    let replica = bench.restart().pop().unwrap();
    assert!(!replica.is_complete());
    assert_eq!(replica.read_to(Piece(3), &mut Vec::new()), Err(ReadError::NotHeld));
    assert_eq!(recheck(&replica), [Piece(3)]);
    bytes[3 * PIECE] ^= 1;
    fs::write(bench.at("f"), &bytes).unwrap();
    assert_eq!(recheck(&replica), []);
    assert!(replica.is_complete() && !replica.changed());
    fs::remove_file(bench.at("f")).unwrap();
    assert_eq!(recheck(&replica).len(), 5);
}

#[test]
fn what_cannot_be_shared_is_named_with_the_reason() {
    let bench = Bench::new();
    fs::create_dir(bench.at("tree")).unwrap();
    assert_eq!(bench.import("gone").unwrap_err().kind, ErrorKind::NotFound);
    for (name, why) in [
        (std::ffi::OsStr::new("con.txt"), "device"),
        (std::ffi::OsStr::new("a\nb"), "control"),
        (std::ffi::OsStr::new("dot."), "dot or a blank"),
        (std::os::unix::ffi::OsStrExt::from_bytes(b"caf\xe9"), "not UTF-8"),
    ] {
        let path = bench.at("tree").join(name);
        fs::write(&path, "x").unwrap();
        let error = bench.import("tree").unwrap_err();
        assert!(error.message.contains(why) && error.hint.is_some(), "{error:?}");
        assert!(error.message.contains(&format!("{name:?}")), "{error:?}");
        fs::remove_file(path).unwrap();
    }
    fs::write(bench.at("tree/readme"), "x").unwrap();
    fs::write(bench.at("tree/README"), "x").unwrap();
    assert!(bench.import("tree").unwrap_err().message.contains("clashes"));
    assert!(
        bench.store().import(Path::new("/dev/null"), &|_, _| {}, &AtomicBool::new(false)).is_err()
    );
    assert!(bench.store().shared.ledger.wholes().unwrap().is_empty());
}

#[test]
fn links_and_special_files_are_left_out_and_counted() {
    let bench = Bench::new();
    fs::create_dir_all(bench.at("tree/only links")).unwrap();
    fs::write(bench.at("tree/f"), "f").unwrap();
    fs::write(bench.at("secret"), "s").unwrap();
    symlink(bench.at("secret"), bench.at("tree/link")).unwrap();
    symlink("..", bench.at("tree/only links/up")).unwrap();
    fs::create_dir(bench.at("tree/.x.01234567.potluck-part")).unwrap();
    fs::write(bench.at("tree/.x.01234567.potluck-part/f"), "half").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(bench.at("tree/socket")).unwrap();
    let imported = bench.import("tree").unwrap();
    assert_eq!(imported.skipped.count, 4);
    let named: BTreeSet<_> = imported.skipped.first.into_iter().collect();
    let names = ["link", "only links/up", ".x.01234567.potluck-part", "socket"];
    assert_eq!(named, names.map(|name| bench.at("tree").join(name)).into());
    let to = Bench::new();
    let replica = to.fetch(&imported.replica, "tree").unwrap();
    carry(&imported.replica, &replica, [Piece(0)]);
    replica.finish().unwrap();
    let names: Vec<_> = tree(&to.at("tree")).into_iter().map(|(path, ..)| path).collect();
    assert_eq!(names, [Path::new("f"), Path::new("only links/")]);
    // A link that is named itself is followed.
    symlink(bench.at("secret"), bench.at("link")).unwrap();
    assert_eq!(bench.share("link").path(), bench.at("secret"));
}

#[test]
fn a_file_that_changes_while_it_is_hashed_is_refused() {
    let bench = Bench::new();
    fs::write(bench.at("f"), some_bytes(512 * PIECE, 1)).unwrap();
    let once = Once::new();
    let append = |_, _| {
        once.call_once(|| {
            let file = fs::OpenOptions::new().write(true).open(bench.at("f")).unwrap();
            file.write_all_at(b"!", 512 * PIECE as u64).unwrap();
        });
    };
    let error = bench.store().import(&bench.at("f"), &append, &AtomicBool::new(false)).unwrap_err();
    assert!(error.message.contains("changed while"), "{error:?}");
    let cancel = AtomicBool::new(false);
    let stop = |_, _| cancel.store(true, Ordering::Relaxed);
    let error = bench.store().import(&bench.at("f"), &stop, &cancel).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Interrupted);
    assert!(bench.store().shared.ledger.wholes().unwrap().is_empty());
}

#[test]
fn progress_ends_at_all_of_it() {
    let bench = Bench::new();
    make_tree(&bench.at("tree"));
    let most = AtomicU64::new(0);
    let progress = |done, total| {
        assert!(done <= total);
        most.fetch_max(done, Ordering::Relaxed);
    };
    let path = bench.at("tree");
    let imported = bench.store().import(&path, &progress, &AtomicBool::new(false)).unwrap();
    assert_eq!(most.into_inner(), imported.replica.size());
}

#[test]
fn a_bad_piece_is_refused_and_nothing_of_it_is_written() {
    let (from, to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(3 * PIECE, 1)).unwrap();
    let source = from.share("f");
    let replica = to.fetch(&source, "f").unwrap();
    let mut bytes = Vec::new();
    source.read_to(Piece(1), &mut bytes).unwrap();
    let good = bytes.clone();
    bytes[777] ^= 4;
    for bad in [&bytes[..], &good[1..], &[], &[good.as_slice(), b"x"].concat()] {
        assert_eq!(replica.put(Piece(1), &[bad]), Err(PutError::BadPiece));
    }
    assert_eq!(replica.put(Piece(0), &[&good]), Err(PutError::BadPiece));
    assert_eq!(replica.put(Piece(3), &[&good]), Err(PutError::BadPiece));
    assert!(replica.have().is_empty());
    let part = fs::read(files::part_path(&to.at("f"), &source.id())).unwrap();
    assert!(part.len() == 3 * PIECE && part.iter().all(|byte| *byte == 0));
    assert_eq!(replica.put(Piece(1), &[&good]), Ok(Put::New));
    assert_eq!(replica.put(Piece(1), &[&good]), Ok(Put::Duplicate));
    assert_eq!(replica.finish().unwrap_err().kind, ErrorKind::Integrity);
    assert!(replica.is_growing());
}

#[test]
fn what_a_stranger_says_of_a_content_must_agree_with_its_id() {
    let (from, to) = (Bench::new(), Bench::new());
    make_tree(&from.at("tree"));
    let tree = from.share("tree");
    let file = from.share("tree/large");
    let fetch = |id, size, manifest: &[u8], proof: &[u8]| {
        let got = to.store().fetch(id, size, manifest, proof, &to.at("x"), false);
        got.map(|_| ()).unwrap_err().kind
    };
    let (manifest, proof) = (tree.manifest(), tree.proof());
    let mut wrong = manifest.to_vec();
    wrong[30] ^= 1;
    let mut unproved = proof.clone();
    unproved[30] ^= 1;
    for kind in [
        fetch(tree.id(), tree.size(), &wrong, &proof),
        fetch(tree.id(), tree.size(), &[], &proof),
        fetch(tree.id(), tree.size() + 1, manifest, &proof),
        fetch(tree.id(), tree.size(), manifest, &unproved),
        fetch(tree.id(), tree.size(), manifest, &proof[32..]),
        fetch(ContentId::file(tree.id().hash), 100, manifest, &[]),
        fetch(file.id(), file.size(), &[], &[]),
        fetch(file.id(), file.size() + PIECE as u64, &[], &file.proof()),
        fetch(file.id(), u64::MAX, &[], &file.proof()),
        fetch(file.id(), 0, &[], &[]),
        fetch(ContentId::folder(*blake3::hash(b"junk").as_bytes()), 4, b"junk", &[]),
    ] {
        assert_eq!(kind, ErrorKind::Integrity);
    }
    assert!(to.names().is_empty());
}

#[test]
fn a_kill_costs_what_was_not_flushed_and_claims_nothing_else() {
    let (from, mut to) = (Bench::new(), Bench::new());
    make_tree(&from.at("tree"));
    fs::write(from.at("f"), some_bytes(30 * PIECE, 8)).unwrap();
    for name in ["tree", "f"] {
        let source = from.share(name);
        let replica = to.fetch(&source, name).unwrap();
        to.kill();
        let pieces = shuffled(&source, 3);
        let (kept, cost) = pieces.split_at(pieces.len() / 2);
        carry(&source, &replica, kept.iter().copied());
        to.store().flush().unwrap();
        carry(&source, &replica, cost.iter().copied());
        assert!(replica.is_complete());
        drop(replica);
        let replica = to.restart().into_iter().find(|r| r.id() == source.id()).unwrap();
        let held: BTreeSet<Piece> = replica.have().iter().collect();
        assert_eq!(held, kept.iter().copied().collect());
        assert_eq!(recheck(&replica), []);
        carry(&source, &replica, cost.iter().copied());
        replica.finish().unwrap();
        assert!(tree(&from.at(name)) == tree(&to.at(name)));
    }
}

#[test]
fn what_is_put_becomes_durable_by_itself() {
    let (from, mut to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(9 * PIECE, 8)).unwrap();
    let source = from.share("f");
    let replica = to.fetch(&source, "f").unwrap();
    carry(&source, &replica, [Piece(3)]);
    let growing = replica.as_growing().unwrap();
    // Nobody asks for it: the store's own thread does it.
    while !growing.is_flushed() {
        std::thread::yield_now();
    }
    drop(growing);
    to.kill();
    carry(&source, &replica, [Piece(4)]);
    drop(replica);
    let held: Vec<_> = to.restart()[0].have().iter().collect();
    assert_eq!(held, [Piece(3)]);
}

#[test]
fn a_failed_sync_is_not_believed() {
    let (from, mut to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(9 * PIECE, 8)).unwrap();
    let source = from.share("f");
    let replica = to.fetch(&source, "f").unwrap();
    to.kill();
    carry(&source, &replica, [Piece(0), Piece(1)]);
    to.store().flush().unwrap();
    carry(&source, &replica, [Piece(2), Piece(3), Piece(4)]);
    let growing = replica.as_growing().unwrap();
    growing.fail_syncs.store(2, Ordering::Relaxed);
    assert!(to.store().flush().is_err());
    // What the disk made of one of them.
    let part = File::options().write(true).open(growing.at().part).unwrap();
    part.write_all_at(&[0; 100], 3 * PIECE as u64 + 5).unwrap();
    assert!(to.store().flush().is_err());
    carry(&source, &replica, [Piece(5)]);
    assert!(!replica.have().has(Piece(3)));
    // Killed now, only what the first sync made durable would be claimed.
    let claimed = || {
        let path =
            fs::read_dir(to.at("state/peer/journal")).unwrap().next().unwrap().unwrap().path();
        let (_, _, records) = Journal::open(&path).unwrap().unwrap();
        records
    };
    assert_eq!(claimed()[..1], [journal::Record::Held(vec![Piece(0), Piece(1)])]);
    assert!(claimed()[1..].iter().all(|more| matches!(more, journal::Record::Lost(_))));
    to.store().flush().unwrap();
    let lost = journal::Record::Lost(vec![Piece(3)]); // as it could have been claimed before
    assert_eq!(claimed()[1..], [lost, journal::Record::Held([2, 4, 5].map(Piece).to_vec())]);
    drop((growing, replica));
    let replica = to.restart().pop().unwrap();
    assert_eq!(replica.have().iter().map(|p| p.0).collect::<Vec<_>>(), [0, 1, 2, 4, 5]);
    assert_eq!(recheck(&replica), []);
}

#[test]
fn a_journal_torn_anywhere_claims_only_what_is_there() {
    let (from, mut to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(20 * PIECE, 8)).unwrap();
    let source = from.share("f");
    let replica = to.fetch(&source, "f").unwrap();
    to.kill();
    for piece in shuffled(&source, 5) {
        carry(&source, &replica, [piece]);
        to.store().flush().unwrap();
    }
    drop(replica);
    to.store = None;
    let path = fs::read_dir(to.at("state/peer/journal")).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(&path).unwrap();
    let head = whole.len() - 20 * 21;
    let mut counts = Vec::new();
    for len in (head..=whole.len()).step_by(19) {
        fs::write(&path, &whole[..len]).unwrap();
        let replica = to.start().pop().unwrap();
        assert_eq!(recheck(&replica), []);
        counts.push(replica.have().count() as usize);
        assert_eq!(counts.last(), Some(&((len - head) / 21)));
        drop(replica);
        to.store = None;
    }
    assert!(counts.is_sorted() && counts.len() > 20);
}

#[test]
fn a_broken_journal_is_moved_aside() {
    let (from, mut to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(2 * PIECE, 8)).unwrap();
    let source = from.share("f");
    drop(to.fetch(&source, "f").unwrap());
    let path = fs::read_dir(to.at("state/peer/journal")).unwrap().next().unwrap().unwrap().path();
    fs::write(&path, "junk").unwrap();
    fs::write(path.with_extension("new"), "half").unwrap();
    fs::write(path.with_file_name("x.folder"), "").unwrap();
    assert!(to.restart().is_empty());
    assert!(path.with_extension("broken").exists() && !path.with_extension("new").exists());
    // The old part is in nobody's way.
    let replica = to.fetch(&source, "f").unwrap();
    carry(&source, &replica, shuffled(&source, 0));
    replica.finish().unwrap();
}

#[test]
fn a_broken_journal_that_cannot_be_moved_aside_stops_nothing() {
    // The peer did not start.
    let (from, mut to) = (Bench::new(), Bench::new());
    let sources = [("f", 8), ("g", 9)].map(|(name, seed)| {
        fs::write(from.at(name), some_bytes(2 * PIECE, seed)).unwrap();
        from.share(name)
    });
    let journals = || {
        let all =
            fs::read_dir(to.at("state/peer/journal")).unwrap().map(|item| item.unwrap().path());
        all.collect::<BTreeSet<_>>()
    };
    drop(to.fetch(&sources[0], "f").unwrap());
    let path = journals().pop_first().unwrap();
    drop(to.fetch(&sources[1], "g").unwrap());
    fs::write(&path, "junk").unwrap();
    fs::create_dir(path.with_extension("broken")).unwrap();
    let resumed = to.restart();
    assert_eq!(resumed.iter().map(|replica| replica.id()).collect::<Vec<_>>(), [sources[1].id()]);
    let replica = to.fetch(&sources[0], "f").unwrap();
    carry(&sources[0], &replica, shuffled(&sources[0], 0));
    replica.finish().unwrap();
}

#[test]
fn a_part_that_is_gone_or_short_holds_nothing() {
    let (from, mut to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(9 * PIECE, 8)).unwrap();
    make_tree(&from.at("tree"));
    let (file, folder) = (from.share("f"), from.share("tree"));
    carry(&file, &to.fetch(&file, "f").unwrap(), shuffled(&file, 1));
    carry(&folder, &to.fetch(&folder, "tree").unwrap(), shuffled(&folder, 1));
    let part = files::part_path(&to.at("f"), &file.id());
    File::options().write(true).open(&part).unwrap().set_len(5 * PIECE as u64 + 7).unwrap();
    let folder_part = files::part_path(&to.at("tree"), &folder.id());
    fs::remove_file(folder_part.join("large")).unwrap();
    fs::remove_dir_all(folder_part.join("sub/deep")).unwrap();
    let even = File::options().write(true).open(folder_part.join("sub/even")).unwrap();
    even.set_len(3 * PIECE as u64).unwrap();
    let find = |all: &[Arc<Replica>], id| all.iter().find(|r| r.id() == id).cloned().unwrap();
    let again = to.restart();
    let (f, t) = (find(&again, file.id()), find(&again, folder.id()));
    assert_eq!(f.have().count(), 5);
    assert_eq!(folder.layout().pieces() - t.have().count(), 14);
    assert!(recheck(&f).is_empty() && recheck(&t).is_empty());
    // The end of a short file is put back without harm to its beginning.
    carry(&folder, &t, (0..folder.layout().pieces()).map(Piece).filter(|p| !t.have().has(*p)));
    assert_eq!(recheck(&t), []);
    drop((again, f, t));
    // Gone: perhaps its disk is only away.
    let away = to.at("away");
    fs::rename(&part, &away).unwrap();
    let f = find(&to.restart(), file.id());
    assert!(f.have().is_empty());
    drop(f);
    fs::rename(&away, &part).unwrap();
    let f = find(&to.restart(), file.id());
    assert_eq!(f.have().count(), 5);
    drop(f);
    // Gone for good: once it is begun anew nothing old is claimed.
    fs::remove_file(&part).unwrap();
    let f = find(&to.restart(), file.id());
    to.kill();
    carry(&file, &f, [Piece(8)]);
    to.store().flush().unwrap();
    drop(f);
    let again = to.restart();
    let (f, t) = (find(&again, file.id()), find(&again, folder.id()));
    assert_eq!(f.have().iter().collect::<Vec<_>>(), [Piece(8)]);
    carry(&file, &f, shuffled(&file, 2));
    carry(&folder, &t, shuffled(&folder, 2));
    f.finish().unwrap();
    t.finish().unwrap();
    assert_eq!(tree(&to.at("tree")), tree(&from.at("tree")));
    assert_eq!(fs::read(to.at("f")).unwrap(), fs::read(from.at("f")).unwrap());
}

#[test]
fn files_that_others_were_at_before_the_end_are_fetched_again() {
    let (from, to) = (Bench::new(), Bench::new());
    make_tree(&from.at("tree"));
    fs::write(from.at("f"), some_bytes(3 * PIECE, 1)).unwrap();
    for name in ["tree", "f"] {
        let source = from.share(name);
        let replica = to.fetch(&source, name).unwrap();
        carry(&source, &replica, shuffled(&source, 1));
        let part = files::part_path(&to.at(name), &source.id());
        if name == "f" {
            fs::remove_file(part).unwrap();
        } else {
            fs::write(part.join("sub/even"), "other").unwrap();
            fs::remove_file(part.join("run.sh")).unwrap();
        }
        assert_eq!(replica.finish().unwrap_err().kind, ErrorKind::Integrity);
        assert!(replica.have().missing().count() >= 3 && !to.at(name).exists());
        let missing: Vec<_> = replica.have().missing().collect();
        carry(&source, &replica, missing);
        replica.finish().unwrap();
        assert!(tree(&from.at(name)) == tree(&to.at(name)));
    }
}

#[test]
fn a_crash_around_the_final_rename_neither_loses_nor_repeats_it() {
    let (from, mut to) = (Bench::new(), Bench::new());
    make_tree(&from.at("tree"));
    fs::write(from.at("f"), some_bytes(3 * PIECE, 1)).unwrap();
    for name in ["tree", "f"] {
        let source = from.share(name);
        let replica = to.fetch(&source, name).unwrap();
        carry(&source, &replica, shuffled(&source, 1));
        to.store().flush().unwrap();
        let growing = replica.as_growing().unwrap();
        growing.complete().unwrap();
        let stamps = growing.inspect(|_| panic!("all is there")).unwrap().unwrap();
        growing.rename(stamps).unwrap();
        to.kill();
        drop((growing, replica));
        let replica = to.restart().into_iter().find(|r| r.id() == source.id()).unwrap();
        assert!(!replica.is_growing() && replica.is_complete() && !replica.changed());
        assert_eq!((replica.path(), recheck(&replica)), (to.at(name), Vec::new()));
        drop(replica);
        assert!(to.restart().iter().all(|r| !r.is_growing()));
    }
    assert_eq!(to.names(), ["f", "tree"].map(String::from).into());
}

#[test]
fn nothing_is_overwritten_unless_it_was_said() {
    let (from, to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), "new").unwrap();
    fs::create_dir(from.at("folder")).unwrap();
    fs::write(from.at("folder/new"), "new").unwrap();
    for (name, old_is_folder) in [("f", false), ("f", true), ("folder", false), ("folder", true)] {
        let make_old = || {
            if old_is_folder {
                fs::create_dir(to.at("x")).unwrap();
                fs::write(to.at("x/old"), "old").unwrap();
            } else {
                fs::write(to.at("x"), "old").unwrap();
            }
        };
        let source = from.share(name);
        make_old();
        assert_eq!(to.fetch(&source, "x").unwrap_err().kind, ErrorKind::Exists);
        files::remove_any(&to.at("x")).unwrap();
        // It turns up while the download runs.
        let replica = to.fetch(&source, "x").unwrap();
        carry(&source, &replica, [Piece(0)]);
        make_old();
        assert_eq!(replica.finish().unwrap_err().kind, ErrorKind::Exists);
        assert!(
            replica.is_growing()
                && to.at("x").symlink_metadata().unwrap().is_dir() == old_is_folder
        );
        assert_eq!(replica.retarget(&to.at("x"), false).unwrap_err().kind, ErrorKind::Exists);
        replica.retarget(&to.at("y"), false).unwrap();
        assert_eq!(replica.finish(), Ok(to.at("y")));
        assert_eq!(to.names(), ["x", "y"].map(String::from).into());
        to.store().forget(&source.id()).unwrap();
        files::remove_any(&to.at("y")).unwrap();

        let (manifest, proof) = (source.manifest(), source.proof());
        let overwriting =
            to.store().fetch(source.id(), source.size(), manifest, &proof, &to.at("x"), true);
        let replica = overwriting.unwrap();
        carry(&source, &replica, [Piece(0)]);
        assert!(to.at("x").symlink_metadata().unwrap().is_dir() == old_is_folder);
        replica.finish().unwrap();
        assert!(!replica.changed());
        assert!(tree(&to.at("x")) == tree(&from.at(name)));
        assert_eq!(to.names(), BTreeSet::from(["x".into()]));
        to.store().forget(&source.id()).unwrap();
        files::remove_any(&to.at("x")).unwrap();
    }
}

#[test]
fn a_new_target_survives_a_crash() {
    let (from, mut to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(3 * PIECE, 1)).unwrap();
    let source = from.share("f");
    let replica = to.fetch(&source, "f").unwrap();
    carry(&source, &replica, [Piece(0)]);
    to.store().flush().unwrap();
    fs::create_dir(to.at("sub")).unwrap();
    replica.retarget(&to.at("sub/g"), false).unwrap();
    drop(replica);
    let replica = to.restart().pop().unwrap();
    assert_eq!((replica.path(), replica.have().count()), (to.at("sub/g"), 1));
    // Killed after the journal knew and before it moved.
    drop(replica);
    let (new, old) = (to.at("sub/g"), to.at("f"));
    let (new, old) = (files::part_path(&new, &source.id()), files::part_path(&old, &source.id()));
    to.store = None;
    fs::rename(new, old).unwrap();
    let replica = to.start().pop().unwrap();
    assert_eq!((replica.path(), replica.have().count()), (to.at("sub/g"), 1));
    carry(&source, &replica, shuffled(&source, 1));
    assert_eq!(replica.finish(), Ok(to.at("sub/g")));
    assert_eq!(to.names(), BTreeSet::from(["sub".into()]));
}

#[test]
fn two_downloads_never_share_a_place_or_an_id() {
    let (from, to, other) = (Bench::new(), Bench::new(), Bench::new());
    fs::write(from.at("a"), some_bytes(PIECE, 1)).unwrap();
    fs::write(from.at("b"), some_bytes(PIECE, 2)).unwrap();
    let (a, b) = (from.share("a"), from.share("b"));
    let first = to.fetch(&a, "x").unwrap();
    assert!(Arc::ptr_eq(&first, &to.fetch(&a, "x").unwrap()));
    assert_eq!(to.fetch(&a, "y").unwrap_err().kind, ErrorKind::Exists);
    assert_eq!(to.fetch(&b, "x").unwrap_err().kind, ErrorKind::Exists);
    // Another process with its own state.
    let (manifest, proof) = (a.manifest(), a.proof());
    let second = other.store().fetch(a.id(), a.size(), manifest, &proof, &to.at("x"), false);
    assert!(second.unwrap_err().message.contains("another process"));
    carry(&a, &first, [Piece(0)]);
    first.finish().unwrap();
    // Here already, until it is no longer what it was.
    assert_eq!(to.fetch(&a, "y").unwrap_err().kind, ErrorKind::Exists);
    fs::write(to.at("x"), "edited").unwrap();
    let again = to.fetch(&a, "y").unwrap();
    fs::write(to.at("copy"), some_bytes(PIECE, 1)).unwrap();
    assert_eq!(to.import("copy").unwrap_err().kind, ErrorKind::Exists);
    carry(&a, &again, [Piece(0)]);
    again.finish().unwrap();
    assert_eq!(to.share("copy").path(), to.at("copy"));
}

#[test]
fn a_forgotten_download_leaves_nothing_behind() {
    let (from, mut to) = (Bench::new(), Bench::new());
    make_tree(&from.at("tree"));
    let source = from.share("tree");
    let replica = to.fetch(&source, "tree").unwrap();
    carry(&source, &replica, [Piece(0), Piece(5)]);
    to.store().forget(&source.id()).unwrap();
    let mut bytes = Vec::new();
    assert_eq!(replica.read_to(Piece(0), &mut bytes), Err(ReadError::NotHeld));
    source.read_to(Piece(1), &mut bytes).unwrap();
    assert!(matches!(replica.put(Piece(1), &[&bytes]), Err(PutError::Disk(_))));
    assert!(replica.finish().is_err());
    assert!(to.names().is_empty());
    drop(replica);
    assert!(to.restart().is_empty());
}

#[test]
fn one_process_at_a_time_uses_a_state_folder_and_nobody_else_may_look() {
    let bench = Bench::new();
    let error = Store::open(&bench.at("state")).map(|_| ()).unwrap_err();
    assert!(error.message.contains("another potluck process"), "{error:?}");
    fs::write(bench.at("f"), some_bytes(2 * PIECE, 1)).unwrap();
    let source = Bench::new();
    fs::write(source.at("f"), some_bytes(2 * PIECE, 2)).unwrap();
    bench.fetch(&source.share("f"), "g").unwrap();
    bench.share("f");
    for item in walkdir::WalkDir::new(bench.at("state/peer")) {
        let item = item.unwrap();
        let mode = item.metadata().unwrap().permissions().mode() & 0o777;
        let right = if item.file_type().is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode, right, "{}", item.path().display());
    }
}

#[test]
fn notes_outlive_the_process_and_a_broken_database_does_not_stop_it() {
    let mut bench = Bench::new();
    bench.store().set_note("membership", Some(b"m")).unwrap();
    bench.restart();
    assert_eq!(bench.store().note("membership").unwrap(), Some(b"m".to_vec()));
    bench.store().set_note("membership", None).unwrap();
    assert_eq!(bench.store().note("membership").unwrap(), None);
    fs::write(bench.at("f"), "f").unwrap();
    bench.share("f");
    bench.store = None;
    fs::write(bench.at("state/peer/store.redb"), "junk").unwrap();
    assert!(bench.start().is_empty());
    bench.share("f");
    assert_eq!(bench.restart().len(), 1);
}

/// A small disk of its own; none where this process may not mount one.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(mib: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        if !mounted {
            println!("SKIPPED: mounting a small disk takes root");
        }
        mounted.then(|| Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_said_before_or_when_it_happens_and_costs_nothing() {
    let Some(disk) = SmallDisk::new(8) else { return };
    let target = |name: &str| disk.0.path().canonicalize().unwrap().join(name);
    let (from, to) = (Bench::new(), Bench::new());
    fs::write(from.at("large"), some_bytes(200 * PIECE, 1)).unwrap();
    fs::create_dir(from.at("many")).unwrap();
    for n in 0..64 {
        fs::write(from.at(&format!("many/{n}")), some_bytes(PIECE - 1, n)).unwrap();
    }
    let fetch = |of: &Replica, name| {
        to.store().fetch(of.id(), of.size(), of.manifest(), &of.proof(), &target(name), false)
    };
    let large = from.share("large");
    let error = fetch(&large, "large").unwrap_err();
    assert_eq!(error.kind, ErrorKind::DiskFull);
    assert!(error.message.contains("13.1 MB needed"), "{error:?}");
    assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 0);

    let many = from.share("many");
    let replica = fetch(&many, "many").unwrap();
    // What is promised to one is not promised to another.
    let again = Bench::new();
    fs::write(again.at("f"), some_bytes(70 * PIECE, 1)).unwrap();
    assert_eq!(fetch(&again.share("f"), "f").unwrap_err().kind, ErrorKind::DiskFull);
    let mut filler = vec![0; 8 << 20];
    filler.truncate((rustix::fs::statvfs(disk.0.path()).unwrap().f_bavail as usize - 20) * 4096);
    fs::write(target("filler"), filler).unwrap();
    let mut bytes = Vec::new();
    let full = (0..64).map(Piece).find_map(|piece| {
        bytes.clear();
        many.read_to(piece, &mut bytes).unwrap();
        Some((piece, replica.put(piece, &[&bytes]).err()?))
    });
    let (piece, error) = full.unwrap();
    assert!(matches!(error, PutError::Disk(Error { kind: ErrorKind::DiskFull, .. })));
    assert!(!replica.have().has(piece));
    fs::remove_file(target("filler")).unwrap();
    carry(&many, &replica, shuffled(&many, 1));
    replica.finish().unwrap();
    assert_eq!(tree(&target("many")), tree(&from.at("many")));
}

/// A state disk that was full for a moment made the running peer forget everything from then on: redb
/// refuses all work after one failure, until it is opened anew.
#[test]
fn notes_and_shared_contents_are_remembered_again_once_a_full_disk_has_room() {
    let Some(disk) = SmallDisk::new(8) else { return };
    let (store, _) = Store::open(&disk.0.path().join("state")).unwrap();
    store.set_note("before", Some(b"1")).unwrap();
    let filler = disk.0.path().join("filler");
    let mut file = File::create(&filler).unwrap();
    for size in [1 << 20, 4 << 10] {
        while std::io::Write::write_all(&mut file, &vec![7; size]).is_ok() {}
    }
    let much = vec![9; 2 << 20];
    for _ in 0..2 {
        let error = store.set_note("much", Some(&much)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::DiskFull, "{error:?}");
        assert_eq!(store.note("before").unwrap(), Some(b"1".to_vec()), "what is there is there");
    }
    drop(file);
    fs::remove_file(filler).unwrap();
    store.set_note("much", Some(&much)).unwrap();
    assert_eq!(store.note("much").unwrap(), Some(much));
    assert_eq!(store.note("before").unwrap(), Some(b"1".to_vec()));
}

#[test]
fn a_sparse_file_stays_sparse_and_its_holes_are_proved_durable_and_taken_up_like_all() {
    let (from, mut to) = (Bench::new(), Bench::new());
    fs::create_dir(from.at("disks")).unwrap();
    for (name, zeroes) in [("disks/image", 400), ("disks/small", 1), ("alone", 400)] {
        let file = File::create(from.at(name)).unwrap();
        file.set_len((zeroes * PIECE) as u64).unwrap();
        if zeroes > 1 {
            file.write_all_at(&some_bytes(3 * PIECE, 1), (7 * PIECE - 100) as u64).unwrap();
        }
    }
    for name in ["disks", "alone"] {
        let source = from.share(name);
        let replica = to.fetch(&source, name).unwrap();
        let order = shuffled(&source, 1);
        let (some, rest) = order.split_at(order.len() / 2);
        carry(&source, &replica, some.iter().copied());
        to.store().flush().unwrap();
        to.kill();
        drop(replica);
        let replica = to.restart().into_iter().find(|r| r.id() == source.id()).unwrap();
        assert_eq!(replica.have().count() as usize, some.len());
        assert_eq!(recheck(&replica), []);
        carry(&source, &replica, rest.iter().copied());
        replica.finish().unwrap();
        assert!(!replica.changed());
        assert_eq!(recheck(&replica), []);
    }
    assert_eq!(tree(&to.at("disks")), tree(&from.at("disks")));
    assert!(fs::read(to.at("alone")).unwrap() == fs::read(from.at("alone")).unwrap());
    for name in ["disks/image", "alone"] {
        let taken = to.at(name).metadata().unwrap().blocks() * 512;
        assert!(taken <= 5 * PIECE as u64, "{name} takes {taken}");
    }
}

#[test]
fn room_in_memory_is_taken_with_the_pieces_and_promised_to_nobody_else_meanwhile() {
    let Some(disk) = SmallDisk::new(8) else { return };
    let folder = disk.0.path().canonicalize().unwrap();
    let (from, mut to) = (Bench::new(), Bench::new());
    for (name, pieces) in [("a", 70), ("b", 60)] {
        fs::write(from.at(name), some_bytes(pieces * PIECE, pieces as u64)).unwrap();
    }
    let (a, b) = (from.share("a"), from.share("b"));
    let fetch = |to: &Bench, of: &Replica, name: &str| {
        let (manifest, proof) = (of.manifest(), of.proof());
        to.store().fetch(of.id(), of.size(), manifest, &proof, &folder.join(name), false)
    };
    let free = || rustix::fs::statvfs(&folder).unwrap().f_bfree;
    let before = free();
    let growing = fetch(&to, &a, "a").unwrap();
    assert!(before - free() < 4);
    assert_eq!(fetch(&to, &b, "b").unwrap_err().kind, ErrorKind::DiskFull);
    // As much as is here is no longer to come, also after a restart.
    carry(&a, &growing, (0..30).map(Piece));
    drop(growing);
    let growing = to.restart().remove(0);
    assert_eq!(growing.as_growing().unwrap().will_take(&growing.have()), 40 * PIECE as u64);
    assert_eq!(fetch(&to, &b, "b").unwrap_err().kind, ErrorKind::DiskFull);
    carry(&a, &growing, (30..70).map(Piece));
    assert_eq!(growing.as_growing().unwrap().will_take(&growing.have()), 0);
    growing.finish().unwrap();
    assert!(fs::read(folder.join("a")).unwrap() == fs::read(from.at("a")).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever is put, flushed, suspected, killed and opened again, in whatever order: what is held
    /// is right, and what was flushed is held.
    #[test]
    fn beliefs_agree_with_the_disk_through_any_history(
        steps in prop::collection::vec((0u8..8, 0u32..12), 1..40),
    ) {
        let (from, mut to) = (Bench::new(), Bench::new());
        fs::write(from.at("f"), some_bytes(12 * PIECE - 9, 1)).unwrap();
        let source = from.share("f");
        let mut replica = to.fetch(&source, "f").unwrap();
        to.kill();
        let (mut held, mut flushed) = (BTreeSet::new(), BTreeSet::new());
        for (step, piece) in steps {
            match step {
                0..=3 => {
                    carry(&source, &replica, [Piece(piece)]);
                    held.insert(Piece(piece));
                }
                4 => {
                    to.store().flush().unwrap();
                    flushed = held.clone();
                }
                5 => {
                    // Somebody else's hand on the disk.
                    let part = files::part_path(&to.at("f"), &source.id());
                    let part = File::options().write(true).open(part).unwrap();
                    part.write_all_at(b"rot", u64::from(piece) * PIECE as u64).unwrap();
                    prop_assert!(replica.suspect(Piece(piece)));
                    held.remove(&Piece(piece));
                    flushed.remove(&Piece(piece));
                }
                6 => prop_assert_eq!(replica.suspect(Piece(piece)), !held.contains(&Piece(piece))),
                _ => {
                    drop(replica);
                    replica = to.restart().pop().unwrap();
                    to.kill();
                    held = flushed.clone();
                }
            }
            prop_assert_eq!(replica.have().iter().collect::<BTreeSet<_>>(), held.clone());
        }
        prop_assert_eq!(recheck(&replica), []);
        carry(&source, &replica, shuffled(&source, 1));
        replica.finish().unwrap();
        prop_assert!(fs::read(to.at("f")).unwrap() == fs::read(from.at("f")).unwrap());
    }
}
