//! Owns what must hold of the store whatever a disk or another machine says: it does not panic, claims
//! no piece that is not there, and touches nothing but its own places. Fuzzing and the replay of the
//! corpus run it.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use potluck_core::id::{ContentId, Kind, Piece};
use potluck_core::manifest::Manifest;

use super::journal::{Head, forged};
use super::{Replica, Store, files};

/// A small file of three pieces.
pub(crate) const SIZE: usize = (2 << 16) + 77;

/// Shares that file at `at`.
pub(crate) fn share(store: &Store, at: &Path) -> std::sync::Arc<Replica> {
    let bytes: Vec<u8> = (0..SIZE).map(|nth| (nth % 251) as u8).collect();
    let _ = fs::write(at, bytes);
    let never = AtomicBool::new(false);
    match store.import(at, &|_, _| {}, &never) {
        Ok(imported) => imported.replica,
        Err(error) => panic!("{error}"),
    }
}

/// A process starts on a disk in `dir` (empty) where somebody has rewritten a journal, with all checks
/// right. `script`: what of the head is changed, how much of the file is there, then the records.
pub(crate) fn journal(dir: &Path, script: &[u8]) {
    let [change, there, records @ ..] = script else { return };
    let (state, target) = (dir.join("state"), dir.join("target"));
    let (store, _) = Store::open(&dir.join("other")).expect("an empty folder is a store");
    let of = share(&store, &dir.join("shared"));
    let mut head = Head {
        id: of.id(),
        size: of.size(),
        manifest: of.manifest().to_vec(),
        proof: of.proof(),
        target: target.clone(),
        overwrite: change & 1 != 0,
    };
    match change >> 1 {
        1 => head.size = u64::MAX,
        2 => head.size -= 1,
        3 => head.proof.truncate(40),
        4 => head.proof.fill(7),
        5 => head.id.kind = Kind::Folder,
        6 => head.manifest = records.to_vec(),
        7 => head.id = ContentId::folder(*blake3::hash(records).as_bytes()),
        _ => {}
    }
    let part = files::part_path(&target, &head.id);
    let bytes = fs::read(dir.join("shared")).unwrap_or_default();
    let some = &bytes[..bytes.len() * usize::from(*there) / 255];
    match there % 3 {
        0 => drop(fs::write(&part, some)),
        1 => drop(fs::write(&target, some)),
        _ => {}
    }
    let journals = state.join("peer/journal");
    let _ = fs::create_dir_all(&journals);
    let _ = fs::write(journals.join("x.file"), forged(&head, records));
    let (again, all) = Store::open(&state).expect("a broken journal stops nobody");
    for replica in all {
        let never = AtomicBool::new(false);
        // What it claims it may claim wrongly, since the disk lies; a look finds all of that.
        replica.recheck(&|_, _| {}, &never).expect("a look is possible");
        for piece in replica.have().iter() {
            let mut read = vec![0; replica.layout().len_of(piece) as usize];
            let parts = &mut [std::io::IoSliceMut::new(&mut read)];
            if replica.read(piece, parts).is_ok() && *there % 3 == 0 {
                let place = replica.layout().place(piece).expect("it exists");
                assert_eq!(read, bytes[place.offset as usize..][..read.len()]);
            }
        }
    }
    drop(again);
    assert_eq!(fs::read(dir.join("shared")).ok(), Some(bytes), "what is shared is not touched");
}

/// Another machine says what is in a folder; it is made in `dir` (empty) as far as it goes without
/// any bytes.
pub(crate) fn folder(dir: &Path, manifest: &[u8]) {
    let inside = dir.join("inside");
    let _ = fs::create_dir_all(&inside);
    let (store, _) = Store::open(&dir.join("state")).expect("an empty folder is a store");
    let id = ContentId::folder(*blake3::hash(manifest).as_bytes());
    let layout = Manifest::decode(manifest).ok().and_then(|manifest| manifest.layout().ok());
    let size = layout.map_or(0, |layout| layout.total());
    if let Ok(replica) = store.fetch(id, size, manifest, &[], &inside.join("target"), false) {
        for piece in (0..replica.layout().pieces().min(20)).map(Piece) {
            let zeroes = vec![0; replica.layout().len_of(piece) as usize];
            let _ = replica.put(piece, &[&zeroes]);
        }
        let _ = replica.finish();
    }
    let names = |at: &Path| -> Vec<_> {
        let entries = fs::read_dir(at).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(dir), ["inside", "state"]);
    for name in names(&inside) {
        let name = name.to_string_lossy().into_owned();
        assert!(name == "target" || name.starts_with(".target."), "{name}");
    }
}
