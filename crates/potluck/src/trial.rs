//! Owns the doors for fuzzing what needs a disk, and the replay of what it found. No part of what is
//! shipped.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::store::{Replica, Store, trial as disk};
use crate::transfer::trial as wire;

/// A folder that nobody else has, other threads included; in memory, where that is possible.
fn room() -> PathBuf {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let nth = MADE.fetch_add(1, Ordering::Relaxed);
    let room = base.join(format!("potluck-trial-{}-{nth}", std::process::id()));
    // What a process of the same number once left there.
    let _ = std::fs::remove_dir_all(&room);
    std::fs::create_dir_all(&room).expect("room to try things in");
    room
}

fn in_room(work: impl FnOnce(&Path)) {
    let room = room();
    work(&room);
    let _ = std::fs::remove_dir_all(room);
}

/// See [`disk::journal`].
pub fn journal(script: &[u8]) {
    in_room(|room| disk::journal(room, script));
}

/// See [`disk::folder`].
pub fn folder(manifest: &[u8]) {
    in_room(|room| disk::folder(room, manifest));
}

/// See [`wire::connection`].
pub fn connection(script: &[u8]) {
    static CONTENTS: OnceLock<(Store, Arc<Replica>, Store, Arc<Replica>)> = OnceLock::new();
    let (_, whole, _, growing) = CONTENTS.get_or_init(|| {
        let room = room();
        let (one, _) = Store::open(&room.join("one")).expect("a store");
        let whole = disk::share(&one, &room.join("shared"));
        let (two, _) = Store::open(&room.join("two")).expect("a store");
        let (manifest, proof) = (whole.manifest(), whole.proof());
        let at = room.join("copy");
        let growing = two.fetch(whole.id(), whole.size(), manifest, &proof, &at, false);
        // It needs no name any more: nothing is left when this process ends.
        let _ = std::fs::remove_dir_all(&room);
        (one, whole, two, growing.expect("room for three pieces"))
    });
    wire::connection(script, whole, growing);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn replay(target: &str, run: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
        let mut ran = 0;
        for file in std::fs::read_dir(corpus).unwrap() {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            assert!(std::panic::catch_unwind(|| run(&bytes)).is_ok(), "{}", path.display());
            ran += 1;
        }
        assert!(ran > 0, "{target}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_script_is_gone_through(
            steps in vec((any::<u8>(), vec(any::<u8>(), 0..40)), 0..60),
        ) {
            let step = |(choice, bytes): (u8, Vec<u8>)| {
                [vec![choice, bytes.len() as u8], bytes].concat()
            };
            connection(&steps.into_iter().flat_map(step).collect::<Vec<_>>());
        }

        #[test]
        fn any_records_are_gone_through(
            change in any::<u8>(), there in any::<u8>(),
            runs in vec((1u8..6, 0u32..4, 0u32..4), 0..12),
        ) {
            let record = |(kind, first, count): (u8, u32, u32)| {
                [&[kind, 8][..], &first.to_be_bytes(), &count.to_be_bytes()].concat()
            };
            let records: Vec<u8> = runs.into_iter().flat_map(record).collect();
            journal(&[&[change, there][..], &records].concat());
        }
    }

    #[test]
    fn whatever_a_disk_says_of_a_download_is_looked_at_and_not_believed() {
        replay("journal", journal);
    }

    #[test]
    fn whatever_a_folder_is_said_to_hold_lies_within_it() {
        replay("folder", folder);
    }

    #[test]
    fn whatever_a_member_says_on_a_connection_is_bounded() {
        replay("connection", connection);
    }
}
