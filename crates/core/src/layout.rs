//! Owns how a content is cut into pieces: pieces ↔ files ↔ byte ranges. Never sees a byte of it.
//!
//! A piece lies within one file: every file begins a new piece, so a piece is a subtree of its file's
//! BLAKE3 tree and has a chaining value to be proved by. The piece size follows from the content's
//! total size alone; both sides compute it and nobody negotiates.

use crate::id::Piece;

/// The smallest piece size: 64 KiB.
pub const MIN_PIECE_LOG2: u8 = 16;
/// The largest piece size: 4 MiB.
pub const MAX_PIECE_LOG2: u8 = 22;
/// Pieces are made larger while a content would have more of them than this.
pub const MANY_PIECES: u64 = 4_096;
/// The most pieces of one content: 8 TiB at the largest size. A proof of that many is 64 MiB.
pub const MAX_PIECES: u32 = 1 << 21;

/// How a content of one or many files is cut into pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    piece_log2: u8,
    total: u64,
    /// One a file: its size and its first piece.
    files: Vec<Span>,
    pieces: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    first: u32,
    size: u64,
}

/// Where a piece lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which file, by position.
    pub file: u32,
    /// Where in that file the piece begins, in bytes.
    pub offset: u64,
    /// Its length: the piece size, or less for a file's last piece.
    pub len: u32,
    /// Which of its file's pieces it is, from 0.
    pub nth: u32,
}

/// A content would have more pieces than [`MAX_PIECES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is too large: more than {MAX_PIECES} pieces")]
pub struct TooLarge;

impl Layout {
    /// The layout of files of these sizes, in the manifest's order. A single file is one of these.
    pub fn new(sizes: impl IntoIterator<Item = u64>) -> Result<Self, TooLarge> {
        let mut files: Vec<Span> = sizes.into_iter().map(|size| Span { first: 0, size }).collect();
        let total =
            files.iter().try_fold(0u64, |sum, f| sum.checked_add(f.size)).ok_or(TooLarge)?;
        let mut piece_log2 = MIN_PIECE_LOG2;
        while piece_log2 < MAX_PIECE_LOG2 && total >> piece_log2 > MANY_PIECES {
            piece_log2 += 1;
        }
        let mut pieces = 0u64;
        for file in &mut files {
            file.first = u32::try_from(pieces).map_err(|_| TooLarge)?;
            pieces += file.size.div_ceil(1 << piece_log2);
            if pieces > MAX_PIECES.into() {
                return Err(TooLarge);
            }
        }
        Ok(Self { piece_log2, total, files, pieces: pieces as u32 })
    }

    /// Bytes in all.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// How many pieces there are. Empty files have none.
    pub const fn pieces(&self) -> u32 {
        self.pieces
    }

    /// The piece size in bytes: a power of two.
    pub const fn piece_size(&self) -> u32 {
        1 << self.piece_log2
    }

    /// How many files there are.
    pub fn files(&self) -> u32 {
        self.files.len() as u32
    }

    /// The pieces of file `file`.
    pub fn pieces_of(&self, file: u32) -> std::ops::Range<u32> {
        let span = self.files[file as usize];
        span.first..span.first + span.size.div_ceil(1 << self.piece_log2) as u32
    }

    /// The size of file `file` in bytes.
    pub fn size_of(&self, file: u32) -> u64 {
        self.files[file as usize].size
    }

    /// Where `piece` lies; `None` where there is no such piece. O(log files).
    pub fn place(&self, piece: Piece) -> Option<Place> {
        if piece.0 >= self.pieces {
            return None;
        }
        let file = self.files.partition_point(|f| f.first <= piece.0) - 1;
        let span = self.files[file];
        // Empty files share their first piece with the next file: the last of the equal ones has it.
        let nth = piece.0 - span.first;
        let offset = u64::from(nth) << self.piece_log2;
        let len = (span.size - offset).min(1 << self.piece_log2) as u32;
        Some(Place { file: file as u32, offset, len, nth })
    }

    /// The length of `piece` in bytes; 0 where there is no such piece.
    pub fn len_of(&self, piece: Piece) -> u32 {
        self.place(piece).map_or(0, |place| place.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn piece_sizes_grow_with_the_content() {
        for (size, piece_size, pieces) in [
            (0, 64 << 10, 0),
            (1, 64 << 10, 1),
            (64 << 10, 64 << 10, 1),
            ((64 << 10) + 1, 64 << 10, 2),
            (256 * MIB, 64 << 10, 4096),
            (1024 * MIB, 256 << 10, 4096),
            (200_000 * MIB, 4 << 20, 50_000),
        ] {
            let layout = Layout::new([size]).unwrap();
            assert_eq!((layout.piece_size(), layout.pieces()), (piece_size, pieces), "{size}");
        }
        assert_eq!(Layout::new([u64::MAX]), Err(TooLarge));
        assert_eq!(Layout::new([u64::MAX, 1]), Err(TooLarge));
    }

    proptest! {
        #[test]
        fn pieces_cover_every_file_once_in_order(sizes in prop::collection::vec(prop_oneof![Just(0u64), 1u64..100, 60_000u64..400_000], 0..40)) {
            let layout = Layout::new(sizes.iter().copied()).unwrap();
            let mut covered = vec![0u64; sizes.len()];
            for p in 0..layout.pieces() {
                let place = layout.place(Piece(p)).unwrap();
                prop_assert_eq!(place.offset, covered[place.file as usize]);
                prop_assert!(place.len > 0 && place.len <= layout.piece_size());
                prop_assert!(layout.pieces_of(place.file).contains(&p));
                covered[place.file as usize] += u64::from(place.len);
            }
            prop_assert_eq!(covered, sizes);
            prop_assert_eq!(layout.place(Piece(layout.pieces())), None);
        }
    }
}
