//! Owns the temporary file or folder of a running download and its journal: pieces are written, made
//! durable, then claimed, in this order. Never judges who sent them and never claims one that a power
//! cut could still take.
//!
//! After a failed sync the system counts pages as clean that never reached the disk. So every piece
//! since the last good sync is in doubt: it is read back, verified, written and synced once more
//! before the journal claims it.
//!
//! A piece is lost in this order: the journal notes it (at the latest before it notes anything else),
//! then it counts as missing, and only then can it be put again and claimed anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{Kind, Piece};
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::content::Content;
use super::files::{
    For, Looks, OpenFiles, Stamp, lock, make_folder, open_beneath, open_file, open_file_to_update,
    open_folder, part_path, preallocate, punch, read_exact_at, remove_any, rename_new, rename_over,
    sync_folder, walk, write_all_at,
};
use super::journal::{Journal, Record};
use crate::timing::{self, Work};

/// Files synced one by one; beyond that one `syncfs` is cheaper and needs no descriptor for each.
const MAX_SYNCED_SINGLY: usize = 32;
/// What `stat` counts a file's room in.
const STAT_BLOCK: u64 = 512;

/// A download's place on the disk.
#[derive(Debug)]
pub(super) struct Growing {
    content: Arc<Content>,
    open: Arc<OpenFiles>,
    serial: u64,
    at: Mutex<At>,
    /// The temporary file or folder, locked against other processes; none while it is not there.
    root: Mutex<Option<Arc<File>>>,
    journal: Mutex<Journal>,
    unsynced: Mutex<Unsynced>,
    /// Held from taking what is unsynced to claiming it, so that nothing is claimed that was lost
    /// meanwhile.
    flushing: Mutex<()>,
    /// Failed syncs so far: a write that began before one and ended after it is in doubt.
    failed_syncs: AtomicU64,
    /// Nothing is made any more.
    given_up: AtomicBool,
    /// So many of the next syncs fail.
    #[cfg(test)]
    pub(super) fail_syncs: AtomicU64,
}

/// Where it grows and where it will lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub(super) target: PathBuf,
    pub(super) part: PathBuf,
    pub(super) overwrite: bool,
}

impl At {
    /// The place for `content` that will lie at `target`.
    pub(super) fn new(content: &Content, target: &Path, overwrite: bool) -> Self {
        Self { target: target.to_owned(), part: part_path(target, &content.id), overwrite }
    }

    fn folder(&self) -> &Path {
        self.target.parent().unwrap_or(Path::new("/"))
    }
}

/// What was written since the last good sync.
#[derive(Debug, Default)]
struct Unsynced {
    pieces: Vec<Piece>,
    /// The files they lie in, kept open so that an error of theirs cannot be missed.
    files: BTreeMap<u32, Arc<File>>,
    /// More files than that: the whole file system is synced.
    many: bool,
    /// Pieces that a failed sync has put in doubt.
    doubtful: Vec<Piece>,
}

impl Unsynced {
    fn add(&mut self, number: u32, file: &Arc<File>) {
        if self.files.len() == MAX_SYNCED_SINGLY && !self.files.contains_key(&number) {
            self.many = true;
            self.files.clear();
        }
        if !self.many {
            self.files.entry(number).or_insert_with(|| Arc::clone(file));
        }
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.files.is_empty() && !self.many && self.doubtful.is_empty()
    }
}

impl Growing {
    /// A download whose temporary file or folder `root` was just made.
    pub(super) fn begun(
        content: Arc<Content>,
        (open, serial): (Arc<OpenFiles>, u64),
        at: At,
        journal: Journal,
        root: File,
    ) -> Self {
        let growing = Self::absent(content, (open, serial), at, journal);
        *lock(&growing.root) = Some(Arc::new(root));
        growing
    }

    /// A download of an earlier process, and which of the `claimed` pieces are really there. Where
    /// its part is missing (its disk may be away) it holds nothing for now; the claims stay.
    pub(super) fn resumed(
        content: Arc<Content>,
        (open, serial): (Arc<OpenFiles>, u64),
        at: At,
        journal: Journal,
        claimed: &Bitfield,
    ) -> io::Result<(Self, Bitfield)> {
        let growing = Self::absent(content, (open, serial), at, journal);
        let part = lock(&growing.at).part.clone();
        let root = match open_part(&growing.content, &part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let none = growing.content.none();
                return Ok((growing, none));
            }
            other => other?,
        };
        let held = really_there(&growing.content, &part, &root, claimed);
        let lost: Vec<Piece> = claimed.iter().filter(|piece| !held.has(*piece)).collect();
        if let Err(error) = lock(&growing.journal).lose(&lost) {
            tracing::warn!(%error, path = %part.display(), "cannot note yet that pieces are gone");
        }
        *lock(&growing.root) = Some(Arc::new(root));
        Ok((growing, held))
    }

    fn absent(
        content: Arc<Content>,
        (open, serial): (Arc<OpenFiles>, u64),
        at: At,
        journal: Journal,
    ) -> Self {
        Self {
            content,
            open,
            serial,
            at: Mutex::new(at),
            root: Mutex::default(),
            journal: Mutex::new(journal),
            unsynced: Mutex::default(),
            flushing: Mutex::default(),
            failed_syncs: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
            #[cfg(test)]
            fail_syncs: AtomicU64::new(0),
        }
    }

    pub(super) fn at(&self) -> At {
        lock(&self.at).clone()
    }

    /// Writes a piece at its place; not durable yet. `held` is called when the next flush knows of it,
    /// and before anybody can lose it. Where nothing but zeroes are to be, a hole is as good: sparse
    /// files (disk images, databases) stay so.
    pub(super) fn write<T>(
        &self,
        piece: Piece,
        parts: &[&[u8]],
        held: impl FnOnce() -> T,
    ) -> io::Result<T> {
        let place = self.content.layout.place(piece).ok_or(io::ErrorKind::NotFound)?;
        let failed_before = self.failed_syncs.load(Ordering::Acquire);
        let file = self.file_to_write(place.file)?;
        // A file of one piece has no size yet: a hole would not give it one.
        let has_size = self.content.id.kind == Kind::File
            || self.content.layout.pieces_of(place.file).len() > 1;
        if !(has_size
            && parts.iter().all(|part| is_zero(part))
            && punch(&file, place.offset, place.len.into()))
        {
            write_all_at(&file, parts, place.offset)?;
        }
        let unsynced = &mut *lock(&self.unsynced);
        unsynced.add(place.file, &file);
        if self.failed_syncs.load(Ordering::Acquire) == failed_before {
            unsynced.pieces.push(piece);
        } else {
            unsynced.doubtful.push(piece);
        }
        Ok(held())
    }

    /// Reads a piece into `parts`, which have room for exactly that.
    pub(super) fn read(&self, piece: Piece, parts: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let place = self.content.layout.place(piece).ok_or(io::ErrorKind::NotFound)?;
        let root = self.root()?;
        let file = match &self.content.files[place.file as usize].path {
            None => root,
            // Written to through the same descriptor, so it must be open for that.
            Some(path) => self
                .open
                .get((self.serial, place.file), || open_beneath(&root, path, For::Updating))?,
        };
        read_exact_at(&file, parts, place.offset)
    }

    /// Opens a file anew, only to read what is on the disk now.
    pub(super) fn open_again(&self, number: u32) -> io::Result<File> {
        match &self.content.files[number as usize].path {
            Some(path) => open_beneath(&*self.root()?, path, For::Reading),
            None => open_file(&self.at().part),
        }
    }

    fn file_to_write(&self, number: u32) -> io::Result<Arc<File>> {
        let root = self.root()?;
        let name = &self.content.files[number as usize];
        let Some(path) = &name.path else { return Ok(root) };
        let make = || open_beneath(&root, path, For::Making { executable: name.executable });
        if self.content.layout.pieces_of(number).len() == 1 {
            // Written once and whole: nothing to keep open, and no room to ask for first.
            return make().map(Arc::new);
        }
        let size = self.content.layout.size_of(number);
        self.open.get((self.serial, number), || {
            let file = make()?;
            let len = file.metadata()?.len();
            if len > size {
                file.set_len(size)?;
            } else if len < size {
                preallocate(&file, size)?;
            }
            Ok(file)
        })
    }

    /// The temporary file or folder; made anew, and empty, where it is gone. Where it was not there
    /// (its disk was away) none of its pieces is held now, so none is claimed either.
    fn root(&self) -> io::Result<Arc<File>> {
        let root = &mut *lock(&self.root);
        if let Some(root) = root {
            return Ok(Arc::clone(root));
        }
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("it is no longer fetched"));
        }
        let part = self.at().part;
        let there = match open_part(&self.content, &part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            other => Some(other?),
        };
        lock(&self.journal).append(&Record::Nothing)?;
        let file = match there {
            Some(file) => file,
            None => make_part(&self.content, &part)?,
        };
        Ok(Arc::clone(root.insert(Arc::new(file))))
    }

    /// Makes durable, then claims, what was written; `missing` is told what was in doubt and turned out
    /// bad. After an error nothing was claimed, and the next call tries again.
    pub(super) fn flush(&self, missing: impl FnOnce(&[Piece])) -> io::Result<()> {
        let _turn = lock(&self.flushing);
        let doubtful = std::mem::take(&mut lock(&self.unsynced).doubtful);
        let lost = self.write_again(doubtful);
        // One that was written twice may be claimed already.
        let noted = lock(&self.journal).lose(&lost);
        missing(&lost);
        noted?;
        let mut batch = std::mem::take(&mut *lock(&self.unsynced));
        if batch.is_empty() {
            return Ok(());
        }
        let synced = timing::timed(Work::Sync, || self.sync(&batch));
        if synced.is_err() {
            // First the count, then the lists: a write that missed the one meets the other.
            self.failed_syncs.fetch_add(1, Ordering::Release);
        }
        {
            let unsynced = &mut *lock(&self.unsynced);
            unsynced.doubtful.append(&mut batch.doubtful);
            if synced.is_err() {
                unsynced.doubtful.append(&mut batch.pieces);
                let since = std::mem::take(&mut unsynced.pieces);
                unsynced.doubtful.extend(since);
                return synced;
            }
        }
        if batch.pieces.is_empty() {
            return Ok(());
        }
        let record = Record::Held(batch.pieces);
        let appended = lock(&self.journal).append(&record);
        if let (Err(_), Record::Held(pieces)) = (&appended, record) {
            lock(&self.unsynced).pieces.extend(pieces);
        }
        appended
    }

    fn sync(&self, batch: &Unsynced) -> io::Result<()> {
        #[cfg(test)]
        if self.fail_syncs.load(Ordering::Relaxed) > 0 {
            self.fail_syncs.fetch_sub(1, Ordering::Relaxed);
            return Err(rustix::io::Errno::IO.into());
        }
        if batch.many {
            // The root was opened before anything was written, so it is told of every error since
            // (Linux 5.8 and later).
            rustix::fs::syncfs(&self.root()?)?;
        }
        // A new file's name goes with it on common file systems; where it does not, the file is
        // missing after a power cut and its pieces are not believed.
        batch.files.values().try_for_each(|file| file.sync_data())
    }

    /// Those of them that are lost.
    fn write_again(&self, doubtful: Vec<Piece>) -> Vec<Piece> {
        let (mut bytes, mut lost) = (Vec::new(), Vec::new());
        for piece in doubtful {
            bytes.resize(self.content.layout.len_of(piece) as usize, 0);
            let good = self.read(piece, &mut [IoSliceMut::new(&mut bytes)]).is_ok()
                && self.content.proof.verify(&self.content.layout, piece, &[&bytes])
                && self.write(piece, &[&bytes], || ()).is_ok();
            if !good {
                lost.push(piece);
            }
        }
        lost
    }

    /// Claims these no longer; `missing` is called when they can be put again. After an error that is
    /// not noted yet: the next flush does it, and nothing is claimed or named before.
    pub(super) fn lose(&self, pieces: &[Piece], missing: impl FnOnce()) -> io::Result<()> {
        let _turn = lock(&self.flushing);
        {
            let gone: BTreeSet<&Piece> = pieces.iter().collect();
            let unsynced = &mut *lock(&self.unsynced);
            unsynced.pieces.retain(|piece| !gone.contains(piece));
            unsynced.doubtful.retain(|piece| !gone.contains(piece));
        }
        let noted = lock(&self.journal).lose(pieces);
        missing();
        noted
    }

    /// Whether a flush would have nothing to do.
    pub(super) fn is_flushed(&self) -> bool {
        lock(&self.unsynced).is_empty() && lock(&self.journal).is_right()
    }

    /// So many of the next writes to the journal fail.
    #[cfg(test)]
    pub(super) fn fail_journal(&self, writes: u32) {
        lock(&self.journal).fail_writes = writes;
    }

    /// Bytes it will still take from the disk beyond what it was given.
    pub(super) fn will_take(&self, have: &Bitfield) -> u64 {
        let layout = &self.content.layout;
        let missing: u64 = have.missing().map(|piece| u64::from(layout.len_of(piece))).sum();
        match &*lock(&self.root) {
            Some(file) if self.content.id.kind == Kind::File => {
                let given = file.metadata().map_or(0, |meta| meta.blocks() * STAT_BLOCK);
                missing.min(layout.total().saturating_sub(given))
            }
            _ => missing,
        }
    }

    /// All pieces are there and durable: makes the rest so, which no piece makes (empty files and
    /// folders, names).
    pub(super) fn complete(&self) -> io::Result<()> {
        let root = self.root()?;
        if self.content.id.kind == Kind::File {
            return root.sync_all();
        }
        for (file, number) in self.content.files.iter().zip(0..) {
            if let Some(path) = &file.path
                && self.content.layout.size_of(number) == 0
            {
                open_beneath(&root, path, For::Making { executable: file.executable })?;
            }
        }
        for path in &self.content.empty {
            make_folder(&root, path)?;
        }
        let folders = self.content.folders();
        if folders.len() > MAX_SYNCED_SINGLY {
            return Ok(rustix::fs::syncfs(&root)?);
        }
        for folder in folders {
            walk(&root, folder, false)?.sync_all()?;
        }
        root.sync_all()
    }

    /// Looks whether all files are there with the right sizes: then these are their stamps. The pieces
    /// of those that are not (somebody else was at them) are lost, and to be fetched again. `lose` is
    /// told of them and says whether that is noted: only then are these files removed or given their
    /// size, since a file of the right size is believed by the next process.
    pub(super) fn inspect(
        &self,
        lose: impl FnOnce(&[Piece]) -> bool,
    ) -> io::Result<Option<Vec<Stamp>>> {
        let root = self.root()?;
        let own = root.metadata()?;
        let layout = &self.content.layout;
        let Some(lies) = self.lies(&own) else {
            lose(&(0..layout.pieces()).map(Piece).collect::<Vec<_>>());
            *lock(&self.root) = None;
            self.open.close(self.serial);
            return Ok(None);
        };
        let (mut stamps, mut wrong) = (Vec::with_capacity(self.content.files.len()), Vec::new());
        let mut looks = Looks::beneath(&root);
        for (file, number) in self.content.files.iter().zip(0..) {
            let stamp = match &file.path {
                Some(path) => looks.at(path),
                None => Ok(Stamp::of(&own)),
            };
            match stamp {
                Ok(stamp) if stamp.size == layout.size_of(number) => stamps.push(stamp),
                _ => wrong.push((file, number)),
            }
        }
        if wrong.is_empty() {
            return Ok(Some(stamps));
        }
        let lost = wrong.iter().flat_map(|(_, number)| layout.pieces_of(*number).map(Piece));
        if lose(&lost.collect::<Vec<_>>()) {
            self.open.close(self.serial);
            for (file, _) in wrong {
                match &file.path {
                    Some(path) => remove_any(&lies.join(path.as_str()))?,
                    None => root.set_len(layout.total())?,
                }
            }
        }
        Ok(None)
    }

    /// The name it has: the temporary one, or (after an attempt that failed half-way) the final one.
    fn lies(&self, own: &Metadata) -> Option<PathBuf> {
        let at = self.at();
        [at.part, at.target].into_iter().find(|path| {
            let named = path.symlink_metadata();
            named.is_ok_and(|named| (named.ino(), named.dev()) == (own.ino(), own.dev()))
        })
    }

    /// Gives it its final name, durably, and returns the stamps of its files there, which were these
    /// `before`.
    ///
    /// # Errors
    /// `AlreadyExists`: something has that name, and it may not be overwritten. It stays as it is.
    pub(super) fn rename(&self, before: Vec<Stamp>) -> io::Result<Vec<Stamp>> {
        let at = self.at();
        let own = self.root()?.metadata()?;
        lock(&self.journal).append(&Record::Renaming(own.ino()))?;
        if self.lies(&own).as_ref() != Some(&at.target) {
            if at.overwrite {
                rename_over(&at.part, &at.target)?;
            } else {
                rename_new(&at.part, &at.target)?;
            }
        } else if at.overwrite {
            // What it has replaced.
            remove_any(&at.part)?;
        }
        sync_folder(at.folder())?;
        match self.content.id.kind {
            // A file's own time of change is that of its new name.
            Kind::File => stamps(&self.content, &at.target),
            Kind::Folder => Ok(before),
        }
    }

    /// It is whole, or given up: the journal goes.
    pub(super) fn close_journal(&self) -> io::Result<()> {
        lock(&self.journal).remove()
    }

    /// Removes the temporary file or folder and the journal.
    pub(super) fn discard(&self) -> io::Result<()> {
        let removed = {
            let root = &mut *lock(&self.root);
            self.given_up.store(true, Ordering::Relaxed);
            *root = None;
            remove_any(&self.at().part)
        };
        self.close_journal()?;
        removed
    }

    /// Changes where it will lie; the temporary file or folder moves there at once.
    pub(super) fn retarget(&self, new: At) -> io::Result<()> {
        let at = &mut *lock(&self.at);
        let record = |at: &At| Record::Target(at.target.clone(), at.overwrite);
        // The journal knows both places before anything moves.
        let journal = &mut *lock(&self.journal);
        journal.append(&record(&new))?;
        if new.part != at.part {
            let moved = rename_new(&at.part, &new.part);
            if let Err(error) = moved {
                journal.append(&record(at))?;
                return Err(error);
            }
            sync_folder(new.folder())?;
        }
        *at = new;
        Ok(())
    }
}

/// Whether all bytes are zero. Nearly always the first few say no.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(1024).all(|some| some.iter().fold(0, |any, byte| any | byte) == 0)
}

impl Drop for Growing {
    fn drop(&mut self) {
        if let Some(root) = &*lock(&self.root) {
            // Not left to closing it: a child just being started may have it open for a moment.
            let _ = rustix::fs::flock(root, FlockOperation::Unlock);
        }
    }
}

/// The stamps of a content's files as they lie at `path`.
pub(super) fn stamps(content: &Content, path: &Path) -> io::Result<Vec<Stamp>> {
    if content.id.kind == Kind::File {
        return Ok(vec![Stamp::of(&path.symlink_metadata()?)]);
    }
    let root = open_folder(path)?;
    let mut looks = Looks::beneath(&root);
    content.files.iter().filter_map(|file| file.path.as_ref()).map(|path| looks.at(path)).collect()
}

/// Makes a new, empty temporary file or folder at `part`, locked, with its room where the file system
/// gives it at once. What an earlier, lost download left there goes; what another process uses stays.
pub(super) fn make_part(content: &Content, part: &Path) -> io::Result<File> {
    match open_part(content, part) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ResourceBusy | io::ErrorKind::PermissionDenied
            ) =>
        {
            return Err(error);
        }
        // Ours to remove: nobody has it locked, or it is not even of the kind we make.
        _ => remove_any(part)?,
    }
    let made = new_part(content, part).and_then(|made| {
        sync_folder(part.parent().unwrap_or(Path::new("/")))?;
        Ok(made)
    });
    made.inspect_err(|error| {
        if error.kind() != io::ErrorKind::AlreadyExists {
            // Nobody knows of it yet; if it cannot be removed, the next attempt will.
            let _ = remove_any(part);
        }
    })
}

fn new_part(content: &Content, part: &Path) -> io::Result<File> {
    if content.id.kind == Kind::Folder {
        std::fs::create_dir(part)?;
        let root = open_folder(part)?;
        lock_part(&root)?;
        return Ok(root);
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(part, flags, Mode::from_raw_mode(0o666))?.into();
    lock_part(&file)?;
    preallocate(&file, content.layout.total())?;
    Ok(file)
}

/// Opens and locks a temporary file or folder that exists.
fn open_part(content: &Content, part: &Path) -> io::Result<File> {
    let root = match content.id.kind {
        Kind::Folder => open_folder(part)?,
        Kind::File => open_file_to_update(part)?,
    };
    lock_part(&root)?;
    Ok(root)
}

fn lock_part(file: &File) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::AGAIN) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another process is fetching the same to the same place",
        )),
        // Some network file systems have no locks: then nothing can be said of other processes.
        Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOLCK) => Ok(()),
        other => Ok(other?),
    }
}

/// Those of `claimed` whose file is there and long enough.
fn really_there(content: &Content, part: &Path, root: &File, claimed: &Bitfield) -> Bitfield {
    let mut held = content.none();
    for (file, number) in content.files.iter().zip(0..) {
        let own = content.layout.pieces_of(number).map(Piece);
        let own: Vec<Piece> = own.filter(|piece| claimed.has(*piece)).collect();
        if own.is_empty() {
            continue;
        }
        let meta = match &file.path {
            Some(path) => part.join(path.as_str()).symlink_metadata(),
            None => root.metadata(),
        };
        let len = meta.map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
        for piece in own {
            let end = content.layout.place(piece).map(|place| place.offset + u64::from(place.len));
            if end.is_some_and(|end| end <= len) {
                held.insert(piece);
            }
        }
    }
    held
}
