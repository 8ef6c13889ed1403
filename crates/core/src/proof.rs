//! Owns how a piece is proved: the BLAKE3 chaining values of a file's pieces, which fold to exactly
//! the file's id. Never reads a file and never trusts a list that does not fold.
//!
//! BLAKE3 is a binary tree over chunks of 1,024 bytes in which every left side is a whole power of
//! two. A piece is a power of two of chunks that begins at a multiple of itself, hence a subtree with
//! a chaining value of its own; only a file's last piece may be shorter. A file of one piece is the
//! whole tree: its value is the file's id, and no list is needed.
//! (BLAKE3 specification, section 2.1; `blake3::hazmat`.)

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::id::Piece;
use crate::layout::{Layout, Place};
use crate::manifest::Manifest;

/// Bytes of one value.
pub const VALUE: usize = 32;

/// Why a list of values proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The list has not one value for each piece of each file with more than one.
    #[error("the list of piece hashes has a wrong length")]
    Length,
    /// The values of this file do not fold to its id.
    #[error("the piece hashes of file {0} do not fold to its id")]
    Fold(u32),
    /// The layout is not of these files.
    #[error("the layout is of other files")]
    Layout,
}

/// One value for each piece of a content, all of them proved by the content's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    values: Vec<[u8; VALUE]>,
}

impl Proof {
    /// The proof of the single file `id`, from the list as sent: empty for a file of at most one
    /// piece.
    ///
    /// # Errors
    /// The list is too long or short, or does not fold to `id`.
    pub fn of_file(id: [u8; 32], layout: &Layout, wire: &[u8]) -> Result<Self, ProofError> {
        Self::of_files(std::iter::once(id), layout, wire)
    }

    /// The proof of all files of a folder, from the list as sent: the values of those files only
    /// that have more than one piece.
    ///
    /// # Errors
    /// The list is too long or short, or does not fold to the files' ids.
    pub fn of_folder(
        manifest: &Manifest,
        layout: &Layout,
        wire: &[u8],
    ) -> Result<Self, ProofError> {
        Self::of_files(manifest.files().map(|file| file.id), layout, wire)
    }

    fn of_files(
        ids: impl Iterator<Item = [u8; 32]>,
        layout: &Layout,
        wire: &[u8],
    ) -> Result<Self, ProofError> {
        let (list, []) = wire.as_chunks::<VALUE>() else { return Err(ProofError::Length) };
        // Never more than what was sent and one value a file: a short list cannot make this large.
        let mut values = Vec::with_capacity(list.len() + layout.files() as usize);
        let mut list = list;
        let mut files = 0;
        for (file, id) in (0..).zip(ids) {
            if file >= layout.files() {
                return Err(ProofError::Layout);
            }
            files += 1;
            match layout.pieces_of(file).len() {
                0 if id != *blake3::hash(b"").as_bytes() => return Err(ProofError::Fold(file)),
                0 => {}
                1 => values.push(id),
                pieces => {
                    let (own, rest) = list.split_at_checked(pieces).ok_or(ProofError::Length)?;
                    if fold(own) != Some(id) {
                        return Err(ProofError::Fold(file));
                    }
                    values.extend_from_slice(own);
                    list = rest;
                }
            }
        }
        if !list.is_empty() {
            return Err(ProofError::Length);
        }
        if files != layout.files() {
            return Err(ProofError::Layout);
        }
        Ok(Self { values })
    }

    /// The list as sent: the values of the files that have more than one piece.
    pub fn encode(&self, layout: &Layout) -> Vec<u8> {
        let long = (0..layout.files()).map(|f| layout.pieces_of(f)).filter(|p| p.len() > 1);
        long.flat_map(|pieces| &self.values[pieces.start as usize..pieces.end as usize])
            .flatten()
            .copied()
            .collect()
    }

    /// The value of `piece`; `None` where there is no such piece.
    pub fn value(&self, piece: Piece) -> Option<&[u8; VALUE]> {
        self.values.get(piece.0 as usize)
    }

    /// The values of all pieces, in order.
    pub fn values(&self) -> &[[u8; VALUE]] {
        &self.values
    }

    /// Whether `parts`, one behind the other, are `piece`: of its length and of its value.
    ///
    /// Fastest where every part but the last is whole blocks of 16 KiB: the hash takes as many bytes
    /// at a time.
    pub fn verify(&self, layout: &Layout, piece: Piece, parts: &[&[u8]]) -> bool {
        let Some(place) = layout.place(piece) else { return false };
        let file_pieces = layout.pieces_of(place.file).len() as u32;
        let mut hasher = PieceHasher::new(&place, file_pieces);
        parts.iter().for_each(|part| hasher.update(part));
        self.value(piece) == Some(&hasher.finish())
    }
}

/// The value of the piece at `place`, of a file that has `file_pieces`, if these are its bytes.
///
/// Bytes of another length than the piece's have a value too, never the right one.
pub fn piece_value(place: &Place, file_pieces: u32, bytes: &[u8]) -> [u8; VALUE] {
    let mut hasher = PieceHasher::new(place, file_pieces);
    hasher.update(bytes);
    hasher.finish()
}

/// Hashes one piece as its bytes come.
#[derive(Clone, Debug)]
pub struct PieceHasher {
    hasher: Hasher,
    whole_file: bool,
    /// Bytes the piece still wants; none once it was given too many.
    wants: Option<u32>,
}

impl PieceHasher {
    /// Begins the piece at `place` of a file that has `file_pieces`.
    pub fn new(place: &Place, file_pieces: u32) -> Self {
        let mut hasher = Hasher::new();
        let whole_file = file_pieces <= 1;
        if !whole_file {
            hasher.set_input_offset(place.offset);
        }
        Self { hasher, whole_file, wants: Some(place.len) }
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let left = self.wants.and_then(|n| n.checked_sub(u32::try_from(bytes.len()).ok()?));
        if left.is_some() {
            self.hasher.update(bytes);
        }
        self.wants = left;
    }

    /// The value; all zeroes, which no bytes have, if they were not as many as the piece has.
    pub fn finish(&self) -> [u8; VALUE] {
        match self.wants {
            Some(0) if self.whole_file => *self.hasher.finalize().as_bytes(),
            // A subtree of no bytes has no value.
            Some(0) if self.hasher.count() > 0 => self.hasher.finalize_non_root(),
            _ => [0; VALUE],
        }
    }
}

/// Folds the values of all pieces of one file to the file's id; `None` for no values. The only
/// value of a file of one piece is its id already.
pub fn fold(values: &[[u8; VALUE]]) -> Option<[u8; VALUE]> {
    match values {
        [] => None,
        [id] => Some(*id),
        _ => {
            let (left, right) = halves(values);
            Some(*merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).as_bytes())
        }
    }
}

/// The chaining value of two or more pieces below the root, or of one: itself.
fn subtree(values: &[[u8; VALUE]]) -> [u8; VALUE] {
    match values {
        [value] => *value,
        _ => {
            let (left, right) = halves(values);
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// The left side is the largest power of two that leaves something to the right.
fn halves(values: &[[u8; VALUE]]) -> (&[[u8; VALUE]], &[[u8; VALUE]]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Entry, RelPath, What};
    use proptest::prelude::*;

    const PIECE: usize = 64 << 10;

    fn some_bytes(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Hasher::new().update(&len.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn values(layout: &Layout, file: u32, bytes: &[u8]) -> Vec<[u8; VALUE]> {
        let pieces = layout.pieces_of(file);
        let count = pieces.len() as u32;
        pieces
            .map(|piece| {
                let place = layout.place(Piece(piece)).unwrap();
                let at = place.offset as usize;
                piece_value(&place, count, &bytes[at..at + place.len as usize])
            })
            .collect()
    }

    #[test]
    fn the_values_of_any_file_fold_to_the_hash_that_b3sum_prints() {
        let around = |n: usize| [n - 1, n, n + 1];
        let sizes = [1, 1023, 1024, 1025, 2048, 5000]
            .into_iter()
            .chain((1..=9).flat_map(|n| around(n * PIECE)))
            .chain([PIECE + 1023, PIECE + 1025, 3 * PIECE + 1024, 16 * PIECE, 17 * PIECE - 5]);
        for size in sizes {
            let bytes = some_bytes(size);
            let layout = Layout::new([size as u64]).unwrap();
            let id = *blake3::hash(&bytes).as_bytes();
            let values = values(&layout, 0, &bytes);
            assert_eq!(fold(&values), Some(id), "{size}");
            let wire = if values.len() > 1 { values.concat() } else { Vec::new() };
            let proof = Proof::of_file(id, &layout, &wire).unwrap();
            assert_eq!(proof.encode(&layout), wire);
            for piece in (0..layout.pieces()).map(Piece) {
                let place = layout.place(piece).unwrap();
                let at = place.offset as usize;
                let own = &bytes[at..at + place.len as usize];
                assert!(proof.verify(&layout, piece, &[own]), "{size} {piece:?}");
                assert!(!proof.verify(&layout, piece, &[&own[1..]]));
                assert!(!proof.verify(&layout, piece, &[&[own, &[0]].concat()]));
                assert!(!proof.verify(&layout, piece, &[&[]]));
            }
            assert!(!proof.verify(&layout, Piece(layout.pieces()), &[&[]]));
        }
    }

    #[test]
    fn larger_pieces_fold_to_the_same_hash() {
        let size = 300 << 20;
        let layout = Layout::new([size]).unwrap();
        assert_eq!(layout.piece_size(), 128 << 10);
        let bytes = some_bytes(1 << 20);
        let mut hasher = Hasher::new();
        let mut values = Vec::new();
        for piece in (0..layout.pieces()).map(Piece) {
            let place = layout.place(piece).unwrap();
            let at = (place.offset % bytes.len() as u64) as usize;
            let own = &bytes[at..at + place.len as usize];
            hasher.update(own);
            values.push(piece_value(&place, layout.pieces(), own));
        }
        assert_eq!(fold(&values), Some(*hasher.finalize().as_bytes()));
    }

    #[test]
    fn a_file_of_nothing_needs_no_proof_and_must_be_nothing() {
        let layout = Layout::new([0]).unwrap();
        assert!(Proof::of_file(*blake3::hash(b"").as_bytes(), &layout, &[]).is_ok());
        assert_eq!(Proof::of_file([1; 32], &layout, &[]), Err(ProofError::Fold(0)));
        assert_eq!(fold(&[]), None);
    }

    #[test]
    fn a_wrong_list_is_refused() {
        let bytes = some_bytes(5 * PIECE + 7);
        let layout = Layout::new([bytes.len() as u64]).unwrap();
        let id = *blake3::hash(&bytes).as_bytes();
        let good = values(&layout, 0, &bytes).concat();
        assert!(Proof::of_file(id, &layout, &good).is_ok());
        for bad in
            [&good[..good.len() - 1], &good[32..], &[], &[good.as_slice(), &[0; 32]].concat()]
        {
            assert_eq!(Proof::of_file(id, &layout, bad), Err(ProofError::Length));
        }
        let mut swapped = good.clone();
        swapped[..64].rotate_left(32);
        assert_eq!(Proof::of_file(id, &layout, &swapped), Err(ProofError::Fold(0)));
        let small = Layout::new([5]).unwrap();
        assert_eq!(Proof::of_file(id, &small, &[0; 32]), Err(ProofError::Length));
        assert_eq!(Proof::of_file(id, &Layout::new([5, 5]).unwrap(), &[]), Err(ProofError::Layout));
        assert_eq!(Proof::of_file(id, &Layout::new([]).unwrap(), &[]), Err(ProofError::Layout));
    }

    #[test]
    fn a_folder_is_proved_file_by_file() {
        let files = [some_bytes(3 * PIECE), Vec::new(), some_bytes(10), some_bytes(2 * PIECE + 1)];
        let entries = files.iter().enumerate().map(|(n, bytes)| Entry {
            path: RelPath::new(format!("{n}")).unwrap(),
            what: What::File {
                size: bytes.len() as u64,
                executable: false,
                id: *blake3::hash(bytes).as_bytes(),
            },
        });
        let manifest = Manifest::new(entries.collect()).unwrap();
        let layout = manifest.layout().unwrap();
        let all = (0u32..).zip(&files).map(|(n, bytes)| values(&layout, n, bytes));
        let wire: Vec<u8> = all.filter(|v| v.len() > 1).flat_map(|v| v.concat()).collect();
        assert_eq!(wire.len(), 6 * 32);
        let proof = Proof::of_folder(&manifest, &layout, &wire).unwrap();
        assert_eq!(proof.encode(&layout), wire);
        assert_eq!(proof.values().len(), 7);
        assert!(proof.verify(&layout, Piece(3), &[&files[2]]));
        assert!(proof.verify(&layout, Piece(6), &[&files[3][2 * PIECE..]]));
        assert!(!proof.verify(&layout, Piece(4), &[&files[0][..PIECE]]));
        let mut bad = wire;
        bad[5 * 32] ^= 1;
        assert_eq!(Proof::of_folder(&manifest, &layout, &bad), Err(ProofError::Fold(3)));
    }

    #[test]
    fn more_bytes_than_the_piece_has_never_match_and_never_panic() {
        let layout = Layout::new([3 * PIECE as u64]).unwrap();
        let place = layout.place(Piece(1)).unwrap();
        let mut hasher = PieceHasher::new(&place, 3);
        assert_eq!(hasher.finish(), [0; 32]);
        hasher.update(&some_bytes(PIECE));
        assert_ne!(hasher.finish(), [0; 32]);
        hasher.update(&[1]);
        assert_eq!(hasher.finish(), [0; 32]);
        hasher.update(&some_bytes(4 * PIECE));
        assert_eq!(hasher.finish(), [0; 32]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_flipped_bit_is_always_noticed(size in 1usize..4 * PIECE, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = some_bytes(size);
            let layout = Layout::new([size as u64]).unwrap();
            let values = values(&layout, 0, &bytes);
            let wire = if values.len() > 1 { values.concat() } else { Vec::new() };
            let id = *blake3::hash(&bytes).as_bytes();
            let proof = Proof::of_file(id, &layout, &wire).unwrap();
            let at = at.index(size);
            bytes[at] ^= 1 << bit;
            for piece in (0..layout.pieces()).map(Piece) {
                let place = layout.place(piece).unwrap();
                let range = place.offset as usize..place.offset as usize + place.len as usize;
                prop_assert_eq!(proof.verify(&layout, piece, &[&bytes[range.clone()]]), !range.contains(&at));
            }
            if !wire.is_empty() {
                let mut wrong = wire.clone();
                let at = at % wire.len();
                wrong[at] ^= 1 << bit;
                prop_assert_eq!(Proof::of_file(id, &layout, &wrong), Err(ProofError::Fold(0)));
            }
        }

        #[test]
        fn bytes_may_come_in_any_portions(cuts in prop::collection::vec(0usize..PIECE, 0..6)) {
            let bytes = some_bytes(PIECE);
            let layout = Layout::new([2 * PIECE as u64]).unwrap();
            let place = layout.place(Piece(1)).unwrap();
            let mut hasher = PieceHasher::new(&place, 2);
            let mut cuts = cuts;
            cuts.sort_unstable();
            cuts.push(PIECE);
            let mut from = 0;
            for cut in cuts {
                hasher.update(&bytes[from..cut]);
                from = cut;
            }
            prop_assert_eq!(hasher.finish(), piece_value(&place, 2, &bytes));
        }
    }
}
