//! Owns a content as it lies on this disk: whole and shared in place, or growing while it is fetched;
//! which pieces are held; reading and writing them. Never writes to a file that is shared in place.
//!
//! Locks are taken in this order: `placing`, then what [`Growing`] has, then `have`. Whoever waits for
//! `placing` may wait for a disk; `state` and `have` are held for a moment only, so that who only looks
//! never waits.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{ContentId, Piece};
use potluck_core::layout::Layout;
use potluck_core::time::WallTime;
use rustix::fs::Advice;

use super::Shared;
use super::content::Content;
use super::files::{For, ROOT, Stamp, lock, open_beneath, open_file, open_folder, read_exact_at};
use super::growing::{At, Growing, stamps};
use super::hashing::{Progress, in_parallel};
use super::ledger::Entry;
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::timing::{self, Work};

/// What happened to a piece that was handed to [`Replica::put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is here now.
    New,
    /// It was here already; the bytes were not looked at.
    Duplicate,
}

/// Why a piece was not stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PutError {
    /// The bytes are not this piece: whoever sent them lies or is broken.
    #[error("the bytes are not those of the piece")]
    BadPiece,
    /// This disk failed or is full.
    #[error(transparent)]
    Disk(Error),
}

/// Why a piece cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReadError {
    /// It is not here.
    #[error("the piece is not here")]
    NotHeld,
    /// The file is not what it was when it was shared.
    #[error("the file was changed since it was shared")]
    Changed,
    /// This disk failed.
    #[error(transparent)]
    Disk(Error),
}

/// A content on this disk: whole and shared in place, or growing while it is fetched.
pub(crate) struct Replica {
    content: Arc<Content>,
    shared: Arc<Shared>,
    /// Of two replicas at one path the later has the higher one; also names its open files.
    serial: u64,
    have: Mutex<Bitfield>,
    state: RwLock<State>,
    /// Read by who writes or reads pieces while it grows, or notes where it lies; written by who gives it
    /// its final name, or another, or forgets it.
    placing: RwLock<()>,
    /// One at a time finishes.
    finishing: Mutex<()>,
    /// The last flush failed: said once, until one succeeds.
    flush_failed: AtomicBool,
}

#[derive(Clone, Debug)]
enum State {
    Whole(Arc<Whole>),
    Growing(Arc<Growing>),
    /// No longer shared or fetched; where it was.
    Forgotten(PathBuf),
}

/// Where a whole content lies and what its files looked like when they were hashed.
#[derive(Clone, Debug)]
pub(super) struct Whole {
    pub(super) path: PathBuf,
    /// One a file of the layout.
    pub(super) stamps: Vec<Stamp>,
    /// When hashing began.
    pub(super) hashed: WallTime,
}

impl Replica {
    /// The content's id.
    pub(crate) fn id(&self) -> ContentId {
        self.content.id
    }

    /// How it is cut into pieces.
    pub(crate) fn layout(&self) -> &Layout {
        &self.content.layout
    }

    /// Bytes in all.
    pub(crate) fn size(&self) -> u64 {
        self.content.layout.total()
    }

    /// Where it is, or will be once it is whole.
    pub(crate) fn path(&self) -> PathBuf {
        match self.state() {
            State::Whole(whole) => whole.path.clone(),
            State::Growing(growing) => growing.at().target,
            State::Forgotten(path) => path,
        }
    }

    /// The pieces held.
    pub(crate) fn have(&self) -> Bitfield {
        lock(&self.have).clone()
    }

    /// How much is held, in thousandths, as [`Bitfield::thousandths`] counts.
    pub(crate) fn thousandths(&self) -> u16 {
        lock(&self.have).thousandths()
    }

    /// Whether every piece is held. What was fetched still wants [`Replica::finish`].
    pub(crate) fn is_complete(&self) -> bool {
        lock(&self.have).is_full()
    }

    /// Whether it is being fetched: it has no final name yet.
    pub(crate) fn is_growing(&self) -> bool {
        matches!(self.state(), State::Growing(_))
    }

    /// The manifest as sent; empty for a file.
    pub(crate) fn manifest(&self) -> &[u8] {
        &self.content.manifest
    }

    /// The proof as sent: 32 bytes a piece of each file with more than one.
    pub(crate) fn proof(&self) -> Vec<u8> {
        self.content.proof.encode(&self.content.layout)
    }

    /// Reads `piece` into `parts`, which have room for exactly that. What they hold where it fails
    /// is of no use.
    pub(crate) fn read(&self, piece: Piece, parts: &mut [IoSliceMut<'_>]) -> Result<(), ReadError> {
        if !lock(&self.have).has(piece) {
            return Err(ReadError::NotHeld);
        }
        // Its files are open for writing as long as it grows, and not a moment longer.
        let placing = self.placing();
        match self.state() {
            State::Whole(whole) => {
                drop(placing);
                self.read_whole(&whole, piece, parts)
            }
            State::Growing(growing) => growing.read(piece, parts).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound => ReadError::Changed,
                _ => ReadError::Disk(Error::io(cannot("read", &growing.at().part), &e)),
            }),
            State::Forgotten(_) => Err(ReadError::NotHeld),
        }
    }

    /// `piece` is about to be read: the disk may begin. Of small files that would cost more than it
    /// saves.
    pub(crate) fn will_read(&self, piece: Piece) {
        let State::Whole(whole) = self.state() else { return };
        let Some(place) = self.content.layout.place(piece) else { return };
        if self.content.layout.pieces_of(place.file).len() > 1
            && let Ok(file) = self.open_whole(&whole, place.file)
        {
            let len = NonZeroU64::new(place.len.into());
            let _ = rustix::fs::fadvise(&*file, place.offset, len, Advice::WillNeed); // a hint
        }
    }

    fn read_whole(
        &self,
        whole: &Whole,
        piece: Piece,
        parts: &mut [IoSliceMut<'_>],
    ) -> Result<(), ReadError> {
        let place = self.content.layout.place(piece).ok_or(ReadError::NotHeld)?;
        let stamp = self.open_whole(whole, place.file).and_then(|file| {
            read_exact_at(&file, parts, place.offset)?;
            // After the read, not before: whatever was read of a change had changed the times first.
            Ok(Stamp::of(&file.metadata()?))
        });
        match stamp {
            Ok(stamp) if stamp == whole.stamps[place.file as usize] => Ok(()),
            Ok(_) => Err(ReadError::Changed),
            Err(error) if is_gone(&error) => Err(ReadError::Changed),
            Err(error) => Err(ReadError::Disk(Error::io(cannot("read", &whole.path), &error))),
        }
    }

    fn open_whole(&self, whole: &Whole, file: u32) -> io::Result<Arc<File>> {
        let kept = &self.shared.open;
        let open = || match &self.content.files[file as usize].path {
            None => open_file(&whole.path),
            Some(path) => {
                let root = kept.get((self.serial, ROOT), || open_folder(&whole.path))?;
                open_beneath(&root, path, For::Reading)
            }
        };
        match self.content.layout.pieces_of(file).len() {
            // Read whole: keeping it would only close another that is read on.
            1 => open().map(Arc::new),
            _ => kept.get((self.serial, file), open),
        }
    }

    /// Verifies a piece, in as many parts as it came in, and writes it at its place; any number of
    /// threads at once. Within about a second it is durable. A crash before costs it, and never
    /// leaves it claimed.
    pub(crate) fn put(&self, piece: Piece, parts: &[&[u8]]) -> Result<Put, PutError> {
        if lock(&self.have).has(piece) {
            return Ok(Put::Duplicate);
        }
        let good = self.content.proof.verify(&self.content.layout, piece, parts);
        timing::lap(Work::Hash);
        if !good {
            return Err(PutError::BadPiece);
        }
        self.shared.bell.wait_for_room();
        let _placing = self.placing();
        // Again: finish waits for this lock, and nothing may be written once it has begun.
        if lock(&self.have).has(piece) {
            return Ok(Put::Duplicate);
        }
        let State::Growing(growing) = self.state() else {
            let what = format!("{} is not being fetched (any more)", self.id().short());
            return Err(PutError::Disk(Error::new(ErrorKind::Other, what)));
        };
        let new = growing
            .write(piece, parts, || lock(&self.have).insert(piece))
            .map_err(|e| PutError::Disk(Error::io(cannot("write to", &growing.at().part), &e)))?;
        self.shared.bell.written(self.layout().len_of(piece).into());
        Ok(if new { Put::New } else { Put::Duplicate })
    }

    /// All pieces are held: makes everything durable, gives it its final name and returns that. From
    /// then on it is shared in place. Called again it only returns the name.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]: something has that name meanwhile; the download stays, whole, for
    /// [`Replica::retarget`]. [`ErrorKind::Integrity`]: files were touched by others or a failed
    /// sync lost pieces; [`Replica::have`] tells what is to be fetched again. Others: the disk; try
    /// again.
    pub(crate) fn finish(&self) -> Result<PathBuf> {
        let _turn = lock(&self.finishing);
        let growing = match self.state() {
            State::Whole(whole) => return Ok(whole.path.clone()),
            State::Growing(growing) => growing,
            State::Forgotten(_) => return Err(self.not_fetched()),
        };
        let failed = |e: &io::Error| Error::io(cannot("finish", &growing.at().target), e);
        self.flush()?;
        if !self.is_complete() {
            return Err(self.incomplete());
        }
        growing.complete().map_err(|e| failed(&e))?;

        let alone = self.placing_alone();
        if !self.is_growing() {
            return Err(self.not_fetched());
        }
        // A second copy of the last piece may have been written since, or a piece lost.
        self.flush_growing(&growing)?;
        let hashed = clock::wall();
        let inspected = growing.inspect(|lost| self.lose(&growing, lost));
        let stamps = inspected.map_err(|e| failed(&e))?;
        let Some(stamps) = stamps.filter(|_| self.is_complete()) else {
            return Err(self.incomplete());
        };
        let stamps =
            growing.rename(stamps).map_err(|e| self.rename_failed(&growing.at().target, &e))?;
        let whole = Arc::new(Whole { path: growing.at().target, stamps, hashed });
        self.shared.open.close(self.serial);
        self.becomes(State::Whole(Arc::clone(&whole)));
        drop(alone);

        // Until it is remembered the journal stays: it tells the next process what was finished.
        let kept = self.remember(&whole).map_err(|e| e.to_string());
        let kept = kept.and_then(|()| growing.close_journal().map_err(|e| e.to_string()));
        if let Err(error) = kept {
            tracing::warn!(error, content = %self.id(), "a finished download cannot be noted");
        }
        Ok(whole.path.clone())
    }

    fn rename_failed(&self, target: &Path, error: &io::Error) -> Error {
        if error.kind() == io::ErrorKind::AlreadyExists {
            let what = format!("{} exists already", target.display());
            return Error::new(ErrorKind::Exists, what)
                .hint("it is fetched whole: give it another name, or let it overwrite");
        }
        Error::io(cannot("finish", target), error)
    }

    fn incomplete(&self) -> Error {
        let missing = self.layout().pieces() - lock(&self.have).count();
        let what = format!("{missing} pieces of {} are still to be fetched", self.id().short());
        Error::new(ErrorKind::Integrity, what)
    }

    fn not_fetched(&self) -> Error {
        Error::new(ErrorKind::Other, format!("{} is no longer fetched", self.id().short()))
    }

    /// Gives what is being fetched another final name, on the same disk.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where that is taken; another where it is no longer being fetched, or
    /// the disk refuses.
    pub(crate) fn retarget(&self, target: &Path, overwrite: bool) -> Result<()> {
        let target = super::resolve_target(target, overwrite)?;
        let _alone = self.placing_alone();
        let State::Growing(growing) = self.state() else { return Err(self.not_fetched()) };
        let at = At::new(&self.content, &target, overwrite);
        growing.retarget(at).map_err(|e| match e.kind() {
            io::ErrorKind::CrossesDevices => {
                let what = format!("{} is on another disk", target.display());
                Error::new(ErrorKind::Other, what).hint("name a place on the same disk")
            }
            _ => Error::io(cannot("move the download to", &target), &e),
        })
    }

    /// Hashes all that should be here again, with all cores. Returns the pieces that are bad, which
    /// are no longer held. A file shared in place that was touched but is unchanged is shared again.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] where `cancel` was set.
    pub(crate) fn recheck(
        &self,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Vec<Piece>> {
        match self.state() {
            State::Whole(whole) => self.recheck_whole(&whole, progress, cancel),
            State::Growing(growing) => {
                let have = self.have();
                let good = self.rehash(&|n| growing.open_again(n), &have, progress, cancel)?;
                let bad: Vec<Piece> = have.iter().filter(|piece| !good.has(*piece)).collect();
                let placing = self.placing();
                if !self.is_growing() {
                    // It got its final name meanwhile, and was not to be found under the other.
                    drop(placing);
                    return self.recheck(progress, cancel);
                }
                self.lose(&growing, &bad);
                Ok(bad)
            }
            State::Forgotten(_) => Err(self.not_fetched()),
        }
    }

    fn recheck_whole(
        &self,
        whole: &Arc<Whole>,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Vec<Piece>> {
        let hashed = clock::wall();
        let before = stamps(&self.content, &whole.path).ok();
        let root = open_folder(&whole.path);
        let open = |file: u32| match (&self.content.files[file as usize].path, &root) {
            (Some(path), Ok(root)) => open_beneath(root, path, For::Reading),
            (Some(_), Err(_)) => Err(io::ErrorKind::NotFound.into()),
            (None, _) => open_file(&whole.path),
        };
        let all = Bitfield::all(self.layout().pieces());
        let good = self.rehash(&open, &all, progress, cancel)?;
        let bad: Vec<Piece> = good.missing().collect();
        let alone = self.placing_alone();
        if !self.is_still(whole) {
            return Ok(bad);
        }
        *lock(&self.have) = good;
        let mut whole = Arc::clone(whole);
        let sizes = (0..self.layout().files()).map(|file| self.layout().size_of(file));
        if let Some(before) = before
            && bad.is_empty()
            && before.iter().map(|stamp| stamp.size).eq(sizes)
            && stamps(&self.content, &whole.path).is_ok_and(|after| after == before)
        {
            whole = Arc::new(Whole { path: whole.path.clone(), stamps: before, hashed });
            self.shared.open.close(self.serial);
            self.becomes(State::Whole(Arc::clone(&whole)));
        }
        drop(alone);
        if let Err(error) = self.remember(&whole) {
            tracing::warn!(%error, content = %self.id(), "what was found is not remembered");
        }
        Ok(bad)
    }

    /// Those of the `wanted` pieces whose bytes are right.
    fn rehash(
        &self,
        open: &(dyn Fn(u32) -> io::Result<File> + Sync),
        wanted: &Bitfield,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Bitfield> {
        let good = Mutex::new(self.content.none());
        in_parallel(self.layout(), open, progress, cancel, &|hand, run| {
            for piece in run.map(Piece).filter(|piece| wanted.has(*piece)) {
                let value = hand.hash(piece).ok().map(|(value, _)| value);
                if value.as_ref() == self.content.proof.value(piece) {
                    lock(&good).insert(piece);
                }
            }
            Ok(())
        })?;
        Ok(good.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether its files were replaced, truncated, touched or removed since they were hashed: a look
    /// at each, nothing is read. Always false for what is being fetched.
    pub(crate) fn changed(&self) -> bool {
        let State::Whole(whole) = self.state() else { return false };
        !stamps(&self.content, &whole.path).is_ok_and(|now| now == whole.stamps)
    }

    /// Hashes this piece again, since somebody says it is bad; true if it is, or is not here. Then it
    /// is no longer held.
    pub(crate) fn suspect(&self, piece: Piece) -> bool {
        if !lock(&self.have).has(piece) {
            return true;
        }
        let placing = self.placing();
        let state = self.state();
        let mut bytes = vec![0; self.layout().len_of(piece) as usize];
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        let read = match &state {
            State::Growing(growing) => growing.read(piece, parts).is_ok(),
            State::Whole(whole) => self.read_again(whole, piece, parts).is_ok(),
            State::Forgotten(_) => false,
        };
        if read && self.content.proof.verify(self.layout(), piece, &[&bytes]) {
            return false;
        }
        tracing::warn!(content = %self.id(), piece = piece.0, "a piece on this disk is bad");
        let whole = match state {
            State::Growing(growing) => {
                self.lose(&growing, &[piece]);
                return true;
            }
            State::Whole(whole) => whole,
            State::Forgotten(_) => return true,
        };
        drop(placing);
        lock(&self.have).remove(piece);
        if let Err(error) = self.remember(&whole) {
            tracing::warn!(%error, content = %self.id(), "cannot note that a piece is bad");
        }
        true
    }

    /// Reads whatever is there now, changed or not.
    fn read_again(
        &self,
        whole: &Whole,
        piece: Piece,
        parts: &mut [IoSliceMut<'_>],
    ) -> io::Result<()> {
        let place = self.content.layout.place(piece).ok_or(io::ErrorKind::NotFound)?;
        read_exact_at(&*self.open_whole(whole, place.file)?, parts, place.offset)
    }

    /// Makes durable, and claims, all that was put so far.
    pub(super) fn flush(&self) -> Result<()> {
        let State::Growing(growing) = self.state() else { return Ok(()) };
        self.flush_growing(&growing)
    }

    fn flush_growing(&self, growing: &Growing) -> Result<()> {
        let flushed = growing.flush(|lost| {
            if !lost.is_empty() {
                let pieces = lost.len();
                tracing::warn!(content = %self.id(), pieces, "a failed write lost pieces: fetching them again");
                self.misses(lost);
            }
        });
        let Err(error) = flushed else {
            if self.flush_failed.swap(false, Ordering::Relaxed) {
                tracing::info!(content = %self.id(), "the disk takes the download again");
            }
            return Ok(());
        };
        if !self.flush_failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, content = %self.id(), "the download cannot be made durable: trying again");
        }
        Err(Error::io(cannot("make durable", &growing.at().part), &error))
    }

    /// These pieces are not held (any more), whatever was claimed; whether that is noted. `placing`
    /// is to be held meanwhile: no final name is given.
    fn lose(&self, growing: &Growing, pieces: &[Piece]) -> bool {
        if pieces.is_empty() {
            return true;
        }
        let noted = growing.lose(pieces, || self.misses(pieces));
        if let Err(error) = &noted {
            tracing::warn!(%error, content = %self.id(), "cannot note that pieces are bad: trying again");
            self.shared.bell.again();
        }
        noted.is_ok()
    }

    fn misses(&self, pieces: &[Piece]) {
        let have = &mut *lock(&self.have);
        for piece in pieces {
            have.remove(*piece);
        }
    }

    /// Notes it for the next process, unless it was forgotten meanwhile.
    fn remember(&self, whole: &Arc<Whole>) -> Result<()> {
        // Held until it is noted: who forgets it waits, and removes the note.
        let _placing = self.placing();
        if !self.is_still(whole) {
            return Ok(());
        }
        let entry = Entry {
            path: whole.path.clone(),
            size: self.size(),
            manifest: self.content.manifest.clone(),
            proof: self.proof(),
            have: lock(&self.have).to_bytes(),
            hashed: whole.hashed,
            stamps: whole.stamps.clone(),
            serial: self.serial,
        };
        self.shared.ledger.set_whole(&self.id(), Some(&entry))
    }

    fn state(&self) -> State {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// To be called by who is alone in placing it.
    fn becomes(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }

    fn is_still(&self, whole: &Arc<Whole>) -> bool {
        matches!(self.state(), State::Whole(now) if Arc::ptr_eq(&now, whole))
    }

    fn placing(&self) -> RwLockReadGuard<'_, ()> {
        self.placing.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn placing_alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.placing.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What only the store does with a replica.
impl Replica {
    pub(super) fn whole(
        content: Content,
        whole: Whole,
        have: Bitfield,
        serial: u64,
        shared: &Arc<Shared>,
    ) -> Arc<Self> {
        Self::new(Arc::new(content), State::Whole(Arc::new(whole)), have, serial, shared)
    }

    pub(super) fn growing(
        content: Arc<Content>,
        growing: Growing,
        have: Bitfield,
        serial: u64,
        shared: &Arc<Shared>,
    ) -> Arc<Self> {
        Self::new(content, State::Growing(Arc::new(growing)), have, serial, shared)
    }

    fn new(
        content: Arc<Content>,
        state: State,
        have: Bitfield,
        serial: u64,
        shared: &Arc<Shared>,
    ) -> Arc<Self> {
        Arc::new(Self {
            content,
            shared: Arc::clone(shared),
            serial,
            have: Mutex::new(have),
            state: RwLock::new(state),
            placing: RwLock::default(),
            finishing: Mutex::default(),
            flush_failed: AtomicBool::new(false),
        })
    }

    pub(super) fn content(&self) -> &Content {
        &self.content
    }

    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// Where it lies, if it is whole and shared.
    pub(super) fn as_whole(&self) -> Option<Arc<Whole>> {
        match self.state() {
            State::Whole(whole) => Some(whole),
            _ => None,
        }
    }

    /// Where it grows, if it is being fetched.
    pub(super) fn as_growing(&self) -> Option<Arc<Growing>> {
        match self.state() {
            State::Growing(growing) => Some(growing),
            _ => None,
        }
    }

    /// Remembers it over a restart.
    pub(super) fn record(&self) -> Result<()> {
        self.as_whole().map_or(Ok(()), |whole| self.remember(&whole))
    }

    /// It is neither shared nor fetched any more; what was only temporary is removed.
    pub(super) fn forget(&self) -> Result<()> {
        let _alone = self.placing_alone();
        let state = self.state();
        self.becomes(State::Forgotten(self.path()));
        self.shared.open.close(self.serial);
        lock(&self.have).clone_from(&self.content.none());
        if let State::Growing(growing) = state {
            let failed = |e| Error::io(cannot("remove", &growing.at().part), &e);
            return growing.discard().map_err(failed);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} at {}, {:?}", self.id(), self.path().display(), self.have())
    }
}

fn cannot(what: &str, path: &Path) -> String {
    format!("cannot {what} {}", path.display())
}

/// Whether a file that was there is there no more, or something else is in its place.
fn is_gone(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::XDEV))
        || matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof)
}
