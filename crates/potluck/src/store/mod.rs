//! Owns what lies on this disk: contents shared where they are, contents being fetched, and the
//! peer's small durable notes. Never talks to another machine.
//!
//! ```text
//! <state>/peer/lock          held by the one process that uses this folder
//! <state>/peer/store.redb    contents shared in place, notes (`ledger`)
//! <state>/peer/journal/…     one file a running download (`journal`)
//! <target's folder>/.<name>.<8 digits of the id>.potluck-part     what is being fetched (`growing`)
//! ```
//!
//! Sharing copies nothing: a file is served from where it is, and each read looks whether it is still
//! what was hashed. Fetching writes into the final place under a temporary name.

mod content;
mod files;
mod flusher;
mod growing;
mod hashing;
mod import;
mod journal;
mod ledger;
mod replica;
mod resume;
#[cfg(test)]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) mod trial;

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use potluck_core::bitfield::Bitfield;
use potluck_core::id::ContentId;

use crate::error::{Error, ErrorKind, Result};
use crate::state::{Hold, hold};

use content::Content;
use files::{OpenFiles, lock};
use flusher::Bell;
use growing::{At, Growing};
pub(crate) use hashing::Progress;
pub(crate) use import::Skipped;
use journal::{Head, Journal};
use ledger::Ledger;
use replica::Whole;
pub(crate) use replica::{Put, PutError, ReadError, Replica};

/// Everything this peer has on its disk. Dropping it makes durable what was put.
#[derive(Debug)]
pub(crate) struct Store {
    shared: Arc<Shared>,
    replicas: Arc<Mutex<Replicas>>,
    /// What is no longer shared or fetched, and still on the disk.
    leaving: Mutex<Vec<Leaving>>,
    /// Contents begin and end one at a time, so that no two take one id or one place.
    changing: Mutex<()>,
    flusher: Option<JoinHandle<()>>,
}

type Replicas = BTreeMap<ContentId, Arc<Replica>>;

/// What [`Store::retire`] leaves to [`Store::clean`].
#[derive(Debug)]
struct Leaving {
    id: ContentId,
    replica: Option<Arc<Replica>>,
    notes: Vec<String>,
}

/// What every replica uses.
#[derive(Debug)]
struct Shared {
    ledger: Ledger,
    open: Arc<OpenFiles>,
    bell: Bell,
    journals: PathBuf,
    next_serial: AtomicU64,
    /// Locked while this process uses the folder; dropped after the database.
    _held: Hold,
    /// The thread flushes nothing any more, as if the process had been killed.
    #[cfg(test)]
    killed: AtomicBool,
}

impl Shared {
    fn serial(&self) -> u64 {
        self.next_serial.fetch_add(1, Ordering::Relaxed)
    }
}

/// What was found when a path was shared.
#[derive(Debug)]
pub(crate) struct Imported {
    /// The content; replaces any replica of the same id that its owner still has.
    pub(crate) replica: Arc<Replica>,
    /// What in the folder is not shared.
    pub(crate) skipped: Skipped,
    /// Bytes that had to be hashed; the others were known.
    pub(crate) hashed: u64,
}

impl Store {
    /// Opens what lies under `state`/peer, made where it is missing, and returns all that is known,
    /// whole and growing. Nothing is hashed: ask [`Replica::changed`].
    ///
    /// # Errors
    /// Another process uses the folder, or the disk refuses. A broken database or journal is no
    /// error: it is moved aside and said in the log.
    pub(crate) fn open(state: &Path) -> Result<(Self, Vec<Arc<Replica>>)> {
        let dir = state.join("peer");
        let journals = dir.join("journal");
        let mut make = DirBuilder::new();
        make.recursive(true).mode(0o700);
        make.create(&journals)
            .map_err(|e| Error::io(format!("cannot make {}", journals.display()), &e))?;
        let held = hold(&dir)?;
        let ledger = Ledger::open(&dir.join("store.redb"))?;
        let entries = ledger.wholes()?;
        let last = entries.iter().map(|(_, entry)| entry.serial).max().unwrap_or(0);
        let shared = Arc::new(Shared {
            ledger,
            open: Arc::default(),
            bell: Bell::default(),
            journals,
            next_serial: AtomicU64::new(last.saturating_add(1)),
            _held: held,
            #[cfg(test)]
            killed: AtomicBool::new(false),
        });
        let mut replicas = Replicas::new();
        for (id, entry) in entries {
            match resume::remembered(id, entry, &shared) {
                Ok(replica) => drop(replicas.insert(id, replica)),
                Err(error) => {
                    tracing::warn!(%error, content = %id, "a shared content is forgotten");
                }
            }
        }
        resume::resume_all(&shared, &mut replicas)?;
        let all = replicas.values().cloned().collect();
        let replicas = Arc::new(Mutex::new(replicas));
        let flusher = Some(start_flusher(&shared, &replicas)?);
        let (leaving, changing) = (Mutex::default(), Mutex::default());
        Ok((Self { shared, replicas, leaving, changing, flusher }, all))
    }

    /// Shares a file or a folder where it is, hashing with all cores what is not known from sharing
    /// it before. `progress` is told bytes done and in all, from any thread.
    ///
    /// Links and special files within a folder are left out and counted.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Interrupted`] where `cancel` was set;
    /// [`ErrorKind::Other`], naming the file and the reason: it cannot be read, has a name that
    /// cannot be shared, or changes meanwhile. [`ErrorKind::Exists`]: just this is being fetched.
    pub(crate) fn import(
        &self,
        path: &Path,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Imported> {
        let path = path
            .canonicalize()
            .map_err(|e| Error::io(format!("cannot share {}", path.display()), &e))?;
        let before = self.latest_at(&path);
        let before = before.as_ref().and_then(|old| Some((old, old.as_whole()?)));
        let known =
            before.as_ref().map(|(old, whole)| import::Known { content: old.content(), whole });
        let import::Made { content, whole, skipped, hashed } =
            import::make(&path, known.as_ref(), progress, cancel)?;
        if let Some((old, old_whole)) = before
            && hashed == 0
            && old.id() == content.id
            && old_whole.stamps == whole.stamps
            && old.is_complete()
        {
            return Ok(Imported { replica: Arc::clone(old), skipped, hashed });
        }
        let replica = self.share(content, whole)?;
        Ok(Imported { replica, skipped, hashed })
    }

    /// Takes a whole content in, in the place of what was shared under its id.
    fn share(&self, content: Content, whole: Whole) -> Result<Arc<Replica>> {
        let _turn = lock(&self.changing);
        self.clean_up();
        if let Some(old) = self.get(&content.id)
            && old.is_growing()
        {
            let (id, place) = (content.id.short(), old.path());
            let what = format!("{id} is just being fetched to {}", place.display());
            return Err(Error::new(ErrorKind::Exists, what)
                .hint("wait until it is here, or stop fetching it"));
        }
        let have = Bitfield::all(content.layout.pieces());
        let replica = Replica::whole(content, whole, have, self.shared.serial(), &self.shared);
        replica.record()?;
        lock(&self.replicas).insert(replica.id(), Arc::clone(&replica));
        Ok(replica)
    }

    /// What was last shared at exactly this path.
    fn latest_at(&self, path: &Path) -> Option<Arc<Replica>> {
        let replicas = self.all();
        let here = replicas.iter().filter(|r| r.as_whole().is_some_and(|w| w.path == path));
        here.max_by_key(|replica| replica.serial()).cloned()
    }

    /// Begins fetching `id`, of `size` bytes, to `target`; goes on where it was begun before. The
    /// temporary file lies beside the target, with its room taken in advance.
    ///
    /// # Errors
    /// [`ErrorKind::Integrity`]: manifest or proof are not those of `id`. [`ErrorKind::Exists`]:
    /// something is at the target and may not be overwritten, or something else is being fetched
    /// there, or the content is here already. [`ErrorKind::DiskFull`]. [`ErrorKind::NotFound`]: the
    /// target's folder.
    pub(crate) fn fetch(
        &self,
        id: ContentId,
        size: u64,
        manifest: &[u8],
        proof: &[u8],
        target: &Path,
        overwrite: bool,
    ) -> Result<Arc<Replica>> {
        let content = Content::checked(id, size, manifest, proof)?;
        let _turn = lock(&self.changing);
        self.clean_up();
        if let Some(going_on) = self.already(&id, target)? {
            return Ok(going_on);
        }
        let target = resolve_target(target, overwrite)?;
        self.check_unclaimed(&target)?;
        let folder = target.parent().unwrap_or(Path::new("/"));
        files::check_space(folder, size, self.promised(folder))?;

        let at = At::new(&content, &target, overwrite);
        let failed =
            |e: &io::Error| Error::io(format!("cannot begin to fetch to {}", target.display()), e);
        // Of a download that could not be taken up: it must not claim pieces of the new part.
        Journal::remove_old(&self.shared.journals, &id).map_err(|e| failed(&e))?;
        let part = growing::make_part(&content, &at.part).map_err(|e| failed(&e))?;
        let head = Head {
            id,
            size,
            manifest: manifest.to_vec(),
            proof: proof.to_vec(),
            target: target.clone(),
            overwrite,
        };
        let journal = Journal::create(&self.shared.journals, &head).map_err(|e| {
            // Nobody knows of the part yet.
            let _ = files::remove_any(&at.part);
            failed(&e)
        })?;
        let (content, serial) = (Arc::new(content), self.shared.serial());
        let open = (Arc::clone(&self.shared.open), serial);
        let growing = Growing::begun(Arc::clone(&content), open, at, journal, part);
        let have = content.none();
        let replica = Replica::growing(content, growing, have, serial, &self.shared);
        lock(&self.replicas).insert(id, Arc::clone(&replica));
        Ok(replica)
    }

    /// The download of `id` to `target` that is under way; an error if `id` is here or on its way
    /// elsewhere. What was shared and is no longer right makes way.
    fn already(&self, id: &ContentId, target: &Path) -> Result<Option<Arc<Replica>>> {
        let Some(old) = self.get(id) else { return Ok(None) };
        let place = old.path();
        if old.is_growing() {
            if resolve_target(target, true)? == place {
                return Ok(Some(old));
            }
            let what = format!("{} is being fetched to {} already", id.short(), place.display());
            return Err(Error::new(ErrorKind::Exists, what));
        }
        if old.is_complete() && !old.changed() {
            let what = format!("{} is on this machine already: {}", id.short(), place.display());
            return Err(Error::new(ErrorKind::Exists, what).hint("copy it from there"));
        }
        self.retire(id, Vec::new());
        self.clean_up();
        Ok(None)
    }

    fn check_unclaimed(&self, target: &Path) -> Result<()> {
        let replicas = self.all();
        match replicas.iter().find(|r| r.is_growing() && r.path() == target) {
            Some(other) => {
                let id = other.id().short();
                let what = format!("{id} is being fetched to {} already", target.display());
                Err(Error::new(ErrorKind::Exists, what).hint("choose another name"))
            }
            None => Ok(()),
        }
    }

    /// Bytes that other downloads on the disk of `folder` will still take.
    fn promised(&self, folder: &Path) -> u64 {
        let device = |path: &Path| path.metadata().map(|meta| meta.dev()).ok();
        let own = device(folder);
        let replicas = self.all();
        let others = replicas.iter().filter_map(|r| Some((r, r.as_growing()?)));
        let here = others.filter(|(r, _)| r.path().parent().and_then(device) == own);
        here.map(|(replica, growing)| growing.will_take(&replica.have())).sum()
    }

    /// Stops sharing or fetching `id`, and waits for no disk. [`Store::clean`] removes what was only
    /// begun (a finished file is never deleted) and these notes. An unknown id is fine.
    pub(crate) fn retire(&self, id: &ContentId, notes: Vec<String>) {
        let replica = lock(&self.replicas).remove(id);
        lock(&self.leaving).push(Leaving { id: *id, replica, notes });
    }

    /// Removes from the disk what was retired. Whatever begins later finds it gone, also where this was
    /// not called yet.
    pub(crate) fn clean(&self) {
        let _turn = lock(&self.changing);
        self.clean_up();
    }

    fn clean_up(&self) {
        let leaving = std::mem::take(&mut *lock(&self.leaving));
        for Leaving { id, replica, notes } in leaving {
            let gone = replica.map_or(Ok(()), |replica| {
                let removed = replica.forget();
                self.shared.ledger.set_whole(&id, None).and(removed)
            });
            let forgotten = notes.iter().map(|note| self.shared.ledger.set_note(note, None));
            if let Err(error) = forgotten.fold(gone, Result::and) {
                tracing::warn!(%error, content = %id, "cannot forget a content");
            }
        }
    }

    #[cfg(test)]
    fn forget(&self, id: &ContentId) -> Result<()> {
        self.retire(id, Vec::new());
        self.clean();
        Ok(())
    }

    fn all(&self) -> Vec<Arc<Replica>> {
        lock(&self.replicas).values().cloned().collect()
    }

    fn get(&self, id: &ContentId) -> Option<Arc<Replica>> {
        lock(&self.replicas).get(id).cloned()
    }

    /// A small durable fact; none where it was never set.
    pub(crate) fn note(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.shared.ledger.note(key)
    }

    /// Sets or removes a small durable fact; durable when this returns.
    pub(crate) fn set_note(&self, key: &str, value: Option<&[u8]>) -> Result<()> {
        self.shared.ledger.set_note(key, value)
    }

    /// Makes durable now what was put so far, rather than within a second.
    pub(crate) fn flush(&self) -> Result<()> {
        self.all().iter().map(|replica| replica.flush()).fold(Ok(()), Result::and)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.shared.bell.stop();
        if let Some(flusher) = self.flusher.take()
            && flusher.join().is_err()
        {
            tracing::error!("the thread that makes downloads durable panicked");
        }
    }
}

fn start_flusher(shared: &Arc<Shared>, replicas: &Arc<Mutex<Replicas>>) -> Result<JoinHandle<()>> {
    let (shared, replicas) = (Arc::clone(shared), Arc::clone(replicas));
    let flush = move || {
        shared.bell.run(|| {
            #[cfg(test)]
            if shared.killed.load(Ordering::Relaxed) {
                return true;
            }
            let all: Vec<_> = lock(&replicas).values().cloned().collect();
            // Each says itself what is wrong with it.
            all.iter().filter(|replica| replica.flush().is_err()).count() == 0
        });
    };
    let thread = std::thread::Builder::new().name("potluck-flush".into()).spawn(flush);
    thread.map_err(|e| Error::io("cannot start the thread that makes downloads durable", &e))
}

/// The target as an absolute path whose folder exists and is no link.
fn resolve_target(target: &Path, overwrite: bool) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        let what = format!("{} is no name for what is fetched", target.display());
        return Err(Error::new(ErrorKind::Usage, what));
    };
    let folder = match target.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let folder = folder
        .canonicalize()
        .map_err(|e| Error::io(format!("cannot fetch to {}", folder.display()), &e))?;
    let target = folder.join(name);
    if !overwrite && target.symlink_metadata().is_ok() {
        let what = format!("{} exists already", target.display());
        return Err(
            Error::new(ErrorKind::Exists, what).hint("give it another name, or let it overwrite")
        );
    }
    Ok(target)
}
