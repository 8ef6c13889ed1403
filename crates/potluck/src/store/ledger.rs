//! Owns what is remembered over a restart besides running downloads: the contents shared in place,
//! and notes. It is a cache: lost, all of it can be found again by sharing and joining again.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use potluck_core::id::ContentId;
use potluck_core::time::WallTime;
use potluck_core::wire::bytes::{Malformed, Reader, Writer};
use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};

use super::files::Stamp;
use crate::clock;
use crate::error::{Error, ErrorKind, Result};

const WHOLES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("wholes");
const NOTES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("notes");
/// Memory for pages of the database; it is read once when the peer starts.
const CACHE: usize = 4 << 20;

/// A content that lies whole under its own name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) manifest: Vec<u8>,
    pub(super) proof: Vec<u8>,
    /// Pieces that were found good; as `Bitfield::to_bytes`.
    pub(super) have: Vec<u8>,
    /// When hashing began: a file touched about then may have changed unseen.
    pub(super) hashed: WallTime,
    /// One a file, in the layout's order.
    pub(super) stamps: Vec<Stamp>,
    /// Rises with each sharing: of two contents shared at one path, the later counts.
    pub(super) serial: u64,
}

/// The database.
#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    /// None where the disk failed and it could not be opened again yet.
    db: RwLock<Option<Database>>,
}

impl Ledger {
    /// Opens the database at `path`; one that is broken is moved aside, and a new one begun.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let error = match open_database(path).map_err(|e| (is_broken(&e), e)) {
            Ok(db) => return Ok(Self::of(path, db)),
            Err((true, error)) => error,
            Err((false, error)) => {
                let what = format!("cannot open {}: {error}", path.display());
                return Err(Error::new(ErrorKind::Other, what));
            }
        };
        let aside = path.with_extension(format!("redb.broken-{}", clock::wall().0));
        std::fs::rename(path, &aside).map_err(|e| {
            Error::io(format!("cannot move the broken {} aside", path.display()), &e)
        })?;
        tracing::warn!(
            %error, path = %path.display(), moved_to = %aside.display(),
            "the peer's database is broken: a new one begins; share again what was shared",
        );
        open_database(path).map(|db| Self::of(path, db)).map_err(failed)
    }

    fn of(path: &Path, db: Database) -> Self {
        Self { path: path.to_owned(), db: RwLock::new(Some(db)) }
    }

    /// All contents that are remembered, with what could not be read left out.
    pub(super) fn wholes(&self) -> Result<Vec<(ContentId, Entry)>> {
        self.with(|db| {
            let read = db.begin_read()?;
            let table = match read.open_table(WHOLES) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
            let mut all = Vec::new();
            for row in table.iter()? {
                let (key, value) = row?;
                match decode(key.value(), value.value()) {
                    Ok(entry) => all.push(entry),
                    Err(error) => {
                        tracing::warn!(%error, "an entry of the peer's database is unreadable");
                    }
                }
            }
            Ok(all)
        })
    }

    /// Remembers, or forgets, a content.
    pub(super) fn set_whole(&self, id: &ContentId, entry: Option<&Entry>) -> Result<()> {
        self.write(|txn| {
            let mut table = txn.open_table(WHOLES)?;
            match entry {
                Some(entry) => table.insert(&*key(id), &*encode(entry))?,
                None => table.remove(&*key(id))?,
            };
            Ok(())
        })
    }

    /// A note.
    pub(super) fn note(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.with(|db| match db.begin_read()?.open_table(NOTES) {
            Ok(table) => Ok(table.get(name)?.map(|value| value.value().to_vec())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        })
    }

    /// Writes or removes a note; durable when this returns.
    pub(super) fn set_note(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        self.write(|txn| {
            let mut table = txn.open_table(NOTES)?;
            match value {
                Some(value) => table.insert(name, value)?,
                None => table.remove(name)?,
            };
            Ok(())
        })
    }

    fn write(
        &self,
        change: impl Fn(&redb::WriteTransaction) -> std::result::Result<(), redb::Error>,
    ) -> Result<()> {
        self.with(|db| {
            let mut txn = db.begin_write()?;
            // Two phases, and opened at once after a crash.
            txn.set_quick_repair(true);
            change(&txn)?;
            Ok(txn.commit()?)
        })
    }

    /// Works with the database. After one failure of the disk (it was full for a moment) redb refuses
    /// everything until it is opened anew: that is done here, and the work tried once more.
    fn with<T>(
        &self,
        work: impl Fn(&Database) -> std::result::Result<T, redb::Error>,
    ) -> Result<T> {
        if let Some(db) = &*self.db.read().unwrap_or_else(PoisonError::into_inner) {
            match work(db) {
                Err(redb::Error::Io(_) | redb::Error::PreviousIo) => {}
                done => return done.map_err(failed),
            }
        }
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        drop(db.take()); // first: a file is opened by one at a time
        let again = db.insert(open_database(&self.path).map_err(failed)?);
        tracing::info!(path = %self.path.display(), "the peer's database was opened anew");
        work(again).map_err(failed)
    }
}

fn open_database(path: &Path) -> std::result::Result<Database, DatabaseError> {
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
    builder.create_with_backend(FileBackend::new(file)?)
}

/// Whether the file itself is at fault, so that another attempt would find the same.
fn is_broken(error: &DatabaseError) -> bool {
    match error {
        DatabaseError::Storage(StorageError::Io(io)) => {
            matches!(io.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof)
        }
        DatabaseError::Storage(StorageError::Corrupted(_))
        | DatabaseError::RepairAborted
        | DatabaseError::UpgradeRequired(_) => true,
        _ => false,
    }
}

fn failed(error: impl Into<redb::Error>) -> Error {
    match error.into() {
        redb::Error::Io(io) => Error::io("the peer's database failed", &io),
        other => Error::new(ErrorKind::Other, format!("the peer's database failed: {other}")),
    }
}

fn key(id: &ContentId) -> Vec<u8> {
    let mut key = Vec::with_capacity(33);
    key.content(id);
    key
}

/// The layout of a value: serial u64, hashed u64, size u64; then path, manifest, proof and bitfield,
/// each with a u32 length; then the stamps.
fn encode(entry: &Entry) -> Vec<u8> {
    let mut out = Vec::new();
    out.u64(entry.serial);
    out.u64(entry.hashed.0);
    out.u64(entry.size);
    let path = entry.path.as_os_str().as_bytes();
    for part in [path, &entry.manifest, &entry.proof, &entry.have] {
        out.u32(part.len() as u32);
        out.put(part);
    }
    for stamp in &entry.stamps {
        stamp.encode(&mut out);
    }
    out
}

fn decode(key: &[u8], value: &[u8]) -> Result<(ContentId, Entry), Malformed> {
    let id = Reader::new(key).content()?;
    let mut r = Reader::new(value);
    let (serial, hashed, size) = (r.u64()?, WallTime(r.u64()?), r.u64()?);
    let mut bytes = || {
        let length = r.u32()?;
        Ok::<_, Malformed>(r.take(length as usize)?.to_vec())
    };
    let path = PathBuf::from(OsStr::from_bytes(&bytes()?));
    let (manifest, proof, have) = (bytes()?, bytes()?, bytes()?);
    let mut stamps = Vec::with_capacity(r.rest().len() / Stamp::BYTES);
    while !r.rest().is_empty() {
        stamps.push(Stamp::decode(&mut r)?);
    }
    Ok((id, Entry { path, size, manifest, proof, have, hashed, stamps, serial }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_core::bitfield::Bitfield;

    fn entry() -> Entry {
        let stamp = Stamp::of(&Path::new("/").metadata().unwrap());
        Entry {
            path: "/x/ü".into(),
            size: 5,
            manifest: vec![1],
            proof: vec![2; 64],
            have: Bitfield::all(9).to_bytes(),
            hashed: WallTime(7),
            stamps: vec![stamp; 3],
            serial: 8,
        }
    }

    #[test]
    fn contents_and_notes_are_remembered_until_they_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        let (a, b) = (ContentId::file([1; 32]), ContentId::folder([1; 32]));
        {
            let ledger = Ledger::open(&path).unwrap();
            assert_eq!((ledger.wholes().unwrap(), ledger.note("n").unwrap()), (Vec::new(), None));
            ledger.set_whole(&a, Some(&entry())).unwrap();
            ledger.set_whole(&b, Some(&entry())).unwrap();
            ledger.set_note("n", Some(b"v")).unwrap();
        }
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.wholes().unwrap(), [(a, entry()), (b, entry())]);
        assert_eq!(ledger.note("n").unwrap(), Some(b"v".to_vec()));
        ledger.set_whole(&a, None).unwrap();
        ledger.set_note("n", None).unwrap();
        assert_eq!(ledger.wholes().unwrap(), [(b, entry())]);
        assert_eq!(ledger.note("n").unwrap(), None);
    }

    #[test]
    fn a_broken_database_is_moved_aside_and_a_new_one_begun() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        let ledger = Ledger::open(&path).unwrap();
        ledger.set_note("n", Some(&[7; 9_000])).unwrap();
        drop(ledger);
        let whole = std::fs::read(&path).unwrap();
        let mut zeroed = whole.clone();
        zeroed[..600].fill(0);
        for broken in [b"not a database at all".to_vec(), whole[..100].to_vec(), zeroed] {
            std::fs::write(&path, &broken).unwrap();
            let ledger = Ledger::open(&path).unwrap();
            assert_eq!(ledger.note("n").unwrap(), None);
            ledger.set_note("n", Some(b"again")).unwrap();
            let aside = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
            let aside = aside.filter(|p| *p != path).find(|p| std::fs::read(p).unwrap() == broken);
            std::fs::remove_file(aside.unwrap()).unwrap();
        }
    }
}
