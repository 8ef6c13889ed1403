//! Owns which pieces of a content somebody holds. Never knows who.

use crate::id::Piece;

/// A set of pieces out of a fixed number.
#[derive(Clone, PartialEq, Eq)]
pub struct Bitfield {
    /// Bit `i % 64` of word `i / 64` is piece `i`; bits past `len` are zero.
    words: Vec<u64>,
    len: u32,
    ones: u32,
}

impl Bitfield {
    /// None of `len` pieces.
    pub fn none(len: u32) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len, ones: 0 }
    }

    /// All of `len` pieces.
    pub fn all(len: u32) -> Self {
        let mut words = vec![u64::MAX; len.div_ceil(64) as usize];
        if let Some(last) = words.last_mut()
            && !len.is_multiple_of(64)
        {
            *last = (1 << (len % 64)) - 1;
        }
        Self { words, len, ones: len }
    }

    /// How many pieces there are, held or not.
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// How many pieces are held.
    pub const fn count(&self) -> u32 {
        self.ones
    }

    /// Whether every piece is held (true of a content without pieces).
    pub const fn is_full(&self) -> bool {
        self.ones == self.len
    }

    /// Whether no piece is held.
    pub const fn is_empty(&self) -> bool {
        self.ones == 0
    }

    /// Whether `piece` is held; false for one that does not exist.
    pub fn has(&self, piece: Piece) -> bool {
        piece.0 < self.len && self.words[piece.0 as usize / 64] >> (piece.0 % 64) & 1 == 1
    }

    /// Adds `piece`; true if it is new. A piece that does not exist is not added.
    pub fn insert(&mut self, piece: Piece) -> bool {
        let fresh = piece.0 < self.len && !self.has(piece);
        if fresh {
            self.words[piece.0 as usize / 64] |= 1 << (piece.0 % 64);
            self.ones += 1;
        }
        fresh
    }

    /// Takes `piece` away; true if it was held.
    pub fn remove(&mut self, piece: Piece) -> bool {
        let held = self.has(piece);
        if held {
            self.words[piece.0 as usize / 64] &= !(1 << (piece.0 % 64));
            self.ones -= 1;
        }
        held
    }

    /// The pieces held, in order.
    pub fn iter(&self) -> impl Iterator<Item = Piece> + '_ {
        ones(self.words.iter().copied())
    }

    /// The pieces not held, in order.
    pub fn missing(&self) -> impl Iterator<Item = Piece> + '_ {
        ones(self.words.iter().map(|word| !word)).take_while(|piece| piece.0 < self.len)
    }

    /// How much of it is held, in thousandths: 1,000 only if all, 0 only if none.
    pub fn thousandths(&self) -> u16 {
        match (self.ones, self.len) {
            (ones, len) if ones == len => 1_000,
            (0, _) => 0,
            (ones, len) => (u64::from(ones) * 1_000 / u64::from(len)).clamp(1, 999) as u16,
        }
    }

    /// `len.div_ceil(8)` bytes; piece `i` is bit `7 - i % 8` of byte `i / 8` (as in BEP 3).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            self.words.iter().flat_map(|w| w.to_le_bytes()).map(u8::reverse_bits).collect();
        bytes.truncate(self.len.div_ceil(8) as usize);
        bytes
    }

    /// Reads what [`Bitfield::to_bytes`] wrote for `len` pieces; `None` for a wrong length or bits
    /// past the end.
    pub fn from_bytes(bytes: &[u8], len: u32) -> Option<Self> {
        if bytes.len() != len.div_ceil(8) as usize {
            return None;
        }
        let mut words = vec![0u64; len.div_ceil(64) as usize];
        for (i, byte) in bytes.iter().enumerate() {
            words[i / 8] |= u64::from(byte.reverse_bits()) << (i % 8 * 8);
        }
        if !len.is_multiple_of(64) && words.last().is_some_and(|w| w >> (len % 64) != 0) {
            return None;
        }
        let ones = words.iter().map(|w| w.count_ones()).sum();
        Some(Self { words, len, ones })
    }
}

/// The bits that are set: a word without any costs one look.
fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = Piece> {
    words.zip(0u32..).flat_map(|(word, i)| {
        std::iter::successors((word != 0).then_some(word), |w| {
            let rest = w & (w - 1);
            (rest != 0).then_some(rest)
        })
        .map(move |w| Piece(i * 64 + w.trailing_zeros()))
    })
}

impl std::fmt::Debug for Bitfield {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} pieces", self.ones, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_bitfield_behaves_like_a_set_of_numbers(
            len in 0u32..300,
            steps in prop::collection::vec((any::<bool>(), 0u32..320), 0..300),
        ) {
            let (mut field, mut set) = (Bitfield::none(len), BTreeSet::new());
            for (add, at) in steps {
                if add {
                    prop_assert_eq!(field.insert(Piece(at)), at < len && set.insert(at));
                } else {
                    prop_assert_eq!(field.remove(Piece(at)), set.remove(&at));
                }
            }
            prop_assert_eq!(field.count() as usize, set.len());
            prop_assert!(field.iter().map(|p| p.0).eq(set.iter().copied()));
            prop_assert!(field.missing().map(|p| p.0).eq((0..len).filter(|p| !set.contains(p))));
            prop_assert_eq!(field.is_full(), set.len() == len as usize);
            prop_assert_eq!(Bitfield::from_bytes(&field.to_bytes(), len), Some(field));
        }

        #[test]
        fn any_bytes_are_a_bitfield_or_refused(len in 0u32..200, bytes in prop::collection::vec(any::<u8>(), 0..30)) {
            if let Some(field) = Bitfield::from_bytes(&bytes, len) {
                prop_assert_eq!(field.to_bytes(), bytes);
            }
        }
    }

    #[test]
    fn all_is_full_and_thousandths_tell_all_from_nearly_all() {
        for len in [0, 1, 63, 64, 65, 128, 5000] {
            assert!(Bitfield::all(len).is_full());
            assert_eq!(Bitfield::all(len).iter().count(), len as usize);
            assert_eq!(Bitfield::all(len).thousandths(), 1_000);
        }
        let mut nearly = Bitfield::all(5000);
        nearly.remove(Piece(17));
        assert_eq!(nearly.thousandths(), 999);
        let mut barely = Bitfield::none(5000);
        barely.insert(Piece(17));
        assert_eq!(barely.thousandths(), 1);
    }
}
