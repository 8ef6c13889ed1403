//! Owns hashing with all cores: which thread hashes which pieces, one pass over the bytes, a bounded
//! buffer each. Never decides what a hash means.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use potluck_core::id::Piece;
use potluck_core::layout::Layout;
use potluck_core::proof::{PieceHasher, VALUE};

use super::files::lock;
use crate::error::{Error, ErrorKind, Result};

/// The most threads: more cores than this outrun any disk.
const MAX_THREADS: usize = 16;
/// Bytes a thread takes at a time: enough for the disk to read ahead, few enough to share out.
const TURN: u32 = 4 << 20;
/// Bytes read at once: they are hashed while they are in the core's own cache.
const BLOCK: usize = 256 << 10;

/// Told of bytes done and bytes in all, from any thread.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);
/// Opens the n-th file of a content.
type Opener<'a> = &'a (dyn Fn(u32) -> io::Result<File> + Sync);

/// What one thread holds: the file it has open and the buffer it reads into.
pub(super) struct Hand<'a> {
    layout: &'a Layout,
    open: Opener<'a>,
    file: Option<(u32, File)>,
    block: Vec<u8>,
}

impl Hand<'_> {
    /// Reads and hashes one piece; also returns the file, for a look at what became of it.
    pub(super) fn hash(&mut self, piece: Piece) -> io::Result<([u8; VALUE], &File)> {
        let place = self.layout.place(piece).ok_or(io::ErrorKind::NotFound)?;
        if self.file.as_ref().is_none_or(|(number, _)| *number != place.file) {
            self.file = None;
            self.file = Some((place.file, (self.open)(place.file)?));
        }
        let (_, file) = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let mut hasher = PieceHasher::new(&place, self.layout.pieces_of(place.file).len() as u32);
        let mut done = 0;
        while done < place.len as usize {
            let block = &mut self.block[..BLOCK.min(place.len as usize - done)];
            file.read_exact_at(block, place.offset + done as u64)?;
            hasher.update(block);
            done += block.len();
        }
        Ok((hasher.finish(), file))
    }
}

/// Deals all pieces out to all cores, a run of them at a time. The first error ends it.
pub(super) fn in_parallel(
    layout: &Layout,
    open: Opener<'_>,
    progress: Progress<'_>,
    cancel: &AtomicBool,
    work: &(dyn Fn(&mut Hand<'_>, Range<u32>) -> Result<()> + Sync),
) -> Result<()> {
    let turn = (TURN / layout.piece_size()).max(1);
    let turns = layout.pieces().div_ceil(turn) as usize;
    let next = AtomicU32::new(0);
    let done = AtomicU64::new(0);
    let failure = Mutex::new(None);
    let one_thread = || {
        let mut hand = Hand { layout, open, file: None, block: vec![0; BLOCK] };
        loop {
            let first = next.fetch_add(turn, Ordering::Relaxed);
            if first >= layout.pieces() || lock(&failure).is_some() {
                return;
            }
            let run = first..(first + turn).min(layout.pieces());
            let result = if cancel.load(Ordering::Relaxed) {
                Err(Error::new(ErrorKind::Interrupted, "hashing was interrupted"))
            } else {
                work(&mut hand, run.clone())
            };
            if let Err(error) = result {
                lock(&failure).get_or_insert(error);
                return;
            }
            let bytes: u64 = run.map(|piece| u64::from(layout.len_of(Piece(piece)))).sum();
            progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, layout.total());
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(MAX_THREADS).min(turns);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(one_thread);
        }
        one_thread();
    });
    lock(&failure).take().map_or(Ok(()), Err)
}
