//! Owns what a new process makes of what the last one left: entries of the ledger become whole
//! replicas, journals become growing ones. Never hashes a file.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use potluck_core::bitfield::Bitfield;
use potluck_core::id::ContentId;

use super::content::Content;
use super::files::{self, Stamp};
use super::growing::{self, At, Growing};
use super::journal::{Head, Journal, Record};
use super::ledger;
use super::replica::{Replica, Whole};
use super::{Replicas, Shared};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};

/// A content as the ledger remembers it.
pub(super) fn remembered(
    id: ContentId,
    entry: ledger::Entry,
    shared: &Arc<Shared>,
) -> Result<Arc<Replica>> {
    let content = Content::checked(id, entry.size, &entry.manifest, &entry.proof)?;
    let unreadable = || Error::new(ErrorKind::Integrity, "what is remembered of it is broken");
    let have = Bitfield::from_bytes(&entry.have, content.layout.pieces()).ok_or_else(unreadable)?;
    if entry.stamps.len() != content.files.len() {
        return Err(unreadable());
    }
    let whole = Whole { path: entry.path, stamps: entry.stamps, hashed: entry.hashed };
    Ok(Replica::whole(content, whole, have, entry.serial, shared))
}

/// Takes up what was being fetched when the last process ended.
pub(super) fn resume_all(shared: &Arc<Shared>, replicas: &mut Replicas) -> Result<()> {
    let failed = |e: io::Error| Error::io(format!("cannot read {}", shared.journals.display()), &e);
    for item in std::fs::read_dir(&shared.journals).map_err(failed)? {
        let path = item.map_err(failed)?.path();
        match path.extension().and_then(|end| end.to_str()) {
            Some("file" | "folder") => {}
            Some("new") => {
                // A download that was never begun.
                let _ = std::fs::remove_file(&path);
                continue;
            }
            _ => continue,
        }
        match resume(shared, &path) {
            Ok(Some(replica)) => drop(replicas.insert(replica.id(), replica)),
            Ok(None) => {
                // It claims nothing either way, and a new fetch's journal takes its place.
                let aside = path.with_extension("broken");
                let moved_to = match std::fs::rename(&path, &aside) {
                    Ok(()) => aside.display().to_string(),
                    Err(error) => format!("nowhere, for {error}"),
                };
                tracing::warn!(
                    path = %path.display(), moved_to,
                    "the journal of a download is broken: it has to be fetched again",
                );
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "a download cannot be taken up");
            }
        }
    }
    Ok(())
}

/// What a journal tells, once all of it was read.
struct Told {
    held: Bitfield,
    /// Where it was to lie, the latest last.
    targets: Vec<(PathBuf, bool)>,
    renaming: Option<u64>,
}

fn told(content: &Content, head: &Head, records: Vec<Record>) -> Told {
    let targets = vec![(head.target.clone(), head.overwrite)];
    let mut told = Told { held: content.none(), targets, renaming: None };
    for record in records {
        match record {
            Record::Held(pieces) => {
                for piece in pieces {
                    told.held.insert(piece);
                }
            }
            Record::Lost(pieces) => {
                for piece in pieces {
                    told.held.remove(piece);
                }
            }
            Record::Nothing => told.held = content.none(),
            Record::Target(target, overwrite) => told.targets.push((target, overwrite)),
            Record::Renaming(inode) => told.renaming = Some(inode),
        }
    }
    told
}

/// The download of a journal, growing on; whole, if only its journal was left. `None` where the
/// journal is broken.
fn resume(shared: &Arc<Shared>, path: &Path) -> Result<Option<Arc<Replica>>> {
    let failed = |e: io::Error| Error::io(format!("cannot read {}", path.display()), &e);
    let Some((journal, head, records)) = Journal::open(path).map_err(failed)? else {
        return Ok(None);
    };
    let content = Content::checked(head.id, head.size, &head.manifest, &head.proof);
    let Ok(content) = content else { return Ok(None) };
    let told = told(&content, &head, records);
    let mut places = told.targets.iter().rev().map(|(to, over)| At::new(&content, to, *over));
    let Some(latest) = places.next() else { return Ok(None) };

    let own = latest.target.symlink_metadata().ok().map(|meta| meta.ino());
    if told.renaming.is_some() && told.renaming == own && told.held.is_full() {
        if latest.overwrite {
            // What it has replaced.
            files::remove_any(&latest.part).map_err(failed)?;
        }
        let replica = finished(content, &latest.target, shared)?;
        journal.remove().map_err(failed)?;
        return Ok(Some(replica));
    }
    // It moves only after the journal knew where to: it may still lie at an earlier place.
    let is_there = |at: &At| at.part.symlink_metadata().is_ok();
    let part = std::iter::once(latest.clone()).chain(places).find(is_there).map(|at| at.part);
    let at = At { part: part.unwrap_or_else(|| latest.part.clone()), ..latest };
    let (content, serial) = (Arc::new(content), shared.serial());
    let open = (Arc::clone(&shared.open), serial);
    let (growing, held) =
        Growing::resumed(Arc::clone(&content), open, at, journal, &told.held).map_err(failed)?;
    if !growing.is_flushed() {
        shared.bell.again();
    }
    Ok(Some(Replica::growing(content, growing, held, serial, shared)))
}

/// A download that got its final name just before the process ended.
fn finished(content: Content, path: &Path, shared: &Arc<Shared>) -> Result<Arc<Replica>> {
    let stamps: io::Result<Vec<Stamp>> = growing::stamps(&content, path);
    let stamps = stamps.map_err(|e| Error::io(format!("cannot read {}", path.display()), &e))?;
    let have = Bitfield::all(content.layout.pieces());
    let whole = Whole { path: path.to_owned(), stamps, hashed: clock::wall() };
    let replica = Replica::whole(content, whole, have, shared.serial(), shared);
    replica.record()?;
    Ok(replica)
}
