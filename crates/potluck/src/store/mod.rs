//! Owns what lies on this disk: contents shared where they are, contents being fetched, and the
//! peer's small durable notes. Never talks to another machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{ContentId, Piece};
use potluck_core::layout::Layout;

use crate::error::{Error, ErrorKind, Result};

/// What happened to a piece that was handed to [`Replica::put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is on the disk now.
    New,
    /// It was there already.
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

/// What was found when a path was shared.
#[derive(Debug)]
pub(crate) struct Imported {
    /// The content.
    pub(crate) replica: Arc<Replica>,
    /// Links and special files, which are not shared.
    pub(crate) skipped: Skipped,
    /// Bytes that had to be hashed; the others were known.
    pub(crate) hashed: u64,
}

/// What a walk over a folder left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Skipped {
    /// How many.
    pub(crate) count: u64,
    /// The first few of them.
    pub(crate) first: Vec<PathBuf>,
}

/// Everything this peer has on its disk.
#[derive(Debug)]
pub(crate) struct Store;

/// A content on this disk: whole and shared in place, or growing while it is fetched.
#[derive(Debug)]
pub(crate) struct Replica {
    id: ContentId,
    layout: Layout,
}

fn unfinished() -> Error {
    Error::new(ErrorKind::Other, "the store is being built")
}

impl Store {
    /// Opens what lies under `state`/peer.
    pub(crate) fn open(_state: &Path) -> Result<(Self, Vec<Arc<Replica>>)> {
        Err(unfinished())
    }

    /// Shares a file or a folder where it is.
    pub(crate) fn import(
        &self,
        _path: &Path,
        _progress: &(dyn Fn(u64, u64) + Sync),
        _cancel: &AtomicBool,
    ) -> Result<Imported> {
        Err(unfinished())
    }

    /// Begins (or goes on with) fetching `id` to `target`.
    pub(crate) fn fetch(
        &self,
        _id: ContentId,
        _size: u64,
        _manifest: &[u8],
        _proof: &[u8],
        _target: &Path,
        _overwrite: bool,
    ) -> Result<Arc<Replica>> {
        Err(unfinished())
    }

    /// Stops sharing or fetching.
    pub(crate) fn forget(&self, _id: &ContentId) -> Result<()> {
        Err(unfinished())
    }

    /// A durable note.
    pub(crate) fn note(&self, _key: &str) -> Result<Option<Vec<u8>>> {
        Err(unfinished())
    }

    /// Writes or removes a durable note.
    pub(crate) fn set_note(&self, _key: &str, _value: Option<&[u8]>) -> Result<()> {
        Err(unfinished())
    }

    /// Makes durable now all that was put.
    pub(crate) fn flush(&self) -> Result<()> {
        Err(unfinished())
    }
}

impl Replica {
    pub(crate) fn id(&self) -> ContentId {
        self.id
    }
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }
    pub(crate) fn size(&self) -> u64 {
        self.layout.total()
    }
    /// Where it is, or will be once it is whole.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::new()
    }
    pub(crate) fn have(&self) -> Bitfield {
        Bitfield::none(self.layout.pieces())
    }
    /// Whether every piece is held (a fetched one still wants [`Replica::finish`]).
    pub(crate) fn is_complete(&self) -> bool {
        self.have().is_full()
    }
    /// Whether it is being fetched: `finish` was not called or did not succeed.
    pub(crate) fn is_growing(&self) -> bool {
        false
    }
    /// The manifest as sent; empty for a file.
    pub(crate) fn manifest(&self) -> &[u8] {
        &[]
    }
    /// The proof as sent.
    pub(crate) fn proof(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Appends the piece's bytes to `buf`.
    pub(crate) fn read(&self, _piece: Piece, _buf: &mut Vec<u8>) -> Result<(), ReadError> {
        Err(ReadError::NotHeld)
    }
    /// Verifies, then writes; any number of threads at once.
    pub(crate) fn put(&self, _piece: Piece, _bytes: &[u8]) -> Result<Put, PutError> {
        Err(PutError::Disk(unfinished()))
    }
    /// All held: durable, and under its final name.
    pub(crate) fn finish(&self) -> Result<PathBuf> {
        Err(unfinished())
    }
    /// Another final name for what is being fetched (on the same file system).
    pub(crate) fn retarget(&self, _target: &Path, _overwrite: bool) -> Result<()> {
        Err(unfinished())
    }
    /// Hashes all of it again; the pieces that are bad and no longer held.
    pub(crate) fn recheck(&self) -> Result<Vec<Piece>> {
        Err(unfinished())
    }
    /// Whether its files were replaced, truncated or touched since they were shared.
    pub(crate) fn changed(&self) -> bool {
        false
    }
    /// Hashes this piece again; true if it is bad (and now no longer held).
    pub(crate) fn suspect(&self, _piece: Piece) -> bool {
        false
    }
}
