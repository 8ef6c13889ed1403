//! Owns how many copies of each piece are about, and finds the rarest of a set. Never knows who
//! holds them.

use crate::dice::Dice;
use crate::id::Piece;

/// Pieces with this many copies or more are all alike: none of them is rare.
const LEVELS: usize = 16;

/// A set of pieces that meets another quickly: above the words of bits lie words that say which
/// words hold any (4,096 pieces a bit-word), so that sparse sets meet in a few steps.
#[derive(Clone, Debug)]
pub(crate) struct PieceSet {
    words: Vec<u64>,
    heads: Vec<u64>,
    count: u32,
}

impl PieceSet {
    pub(crate) fn none(len: u32) -> Self {
        let words = len.div_ceil(64) as usize;
        Self { words: vec![0; words], heads: vec![0; words.div_ceil(64)], count: 0 }
    }

    pub(crate) const fn count(&self) -> u32 {
        self.count
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn has(&self, piece: Piece) -> bool {
        self.words.get(piece.0 as usize / 64).is_some_and(|w| w >> (piece.0 % 64) & 1 == 1)
    }

    /// Adds an existing piece; true if it is new.
    pub(crate) fn insert(&mut self, piece: Piece) -> bool {
        let at = piece.0 as usize / 64;
        let fresh = self.words[at] >> (piece.0 % 64) & 1 == 0;
        if fresh {
            self.words[at] |= 1 << (piece.0 % 64);
            self.heads[at / 64] |= 1 << (at % 64);
            self.count += 1;
        }
        fresh
    }

    /// Takes an existing piece away; true if it was there.
    pub(crate) fn remove(&mut self, piece: Piece) -> bool {
        let held = self.has(piece);
        if held {
            let at = piece.0 as usize / 64;
            self.words[at] &= !(1 << (piece.0 % 64));
            if self.words[at] == 0 {
                self.heads[at / 64] &= !(1 << (at % 64));
            }
            self.count -= 1;
        }
        held
    }

    /// Whether it has any piece that `other` has not. Quick where `other` is sparse.
    pub(crate) fn exceeds(&self, other: &Self) -> bool {
        self.count > other.count
            || self.heads.iter().enumerate().any(|(at, head)| {
                let mut words = *head;
                while words != 0 {
                    let word = at * 64 + words.trailing_zeros() as usize;
                    if self.words[word] & !other.words[word] != 0 {
                        return true;
                    }
                    words &= words - 1;
                }
                false
            })
    }

    /// One of the pieces in both sets, from a random place on.
    fn meet(&self, other: &Self, dice: &mut Dice) -> Option<Piece> {
        if self.is_empty() || other.is_empty() {
            return None;
        }
        let start = dice.below(self.words.len() as u64) as usize;
        let (first, split) = (start / 64, u64::MAX << (start % 64));
        // The head word that the start lies in comes twice: from the start on, and up to it.
        let turns = std::iter::once((first, split))
            .chain((first + 1..self.heads.len()).map(|h| (h, u64::MAX)))
            .chain((0..first).map(|h| (h, u64::MAX)))
            .chain(std::iter::once((first, !split)));
        for (head, mask) in turns {
            let mut words = self.heads[head] & other.heads[head] & mask;
            while words != 0 {
                let at = head * 64 + words.trailing_zeros() as usize;
                let both = self.words[at] & other.words[at];
                if both != 0 {
                    let turn = dice.below(64) as u32;
                    let bit = (both.rotate_right(turn).trailing_zeros() + turn) % 64;
                    return Some(Piece(at as u32 * 64 + bit));
                }
                words &= words - 1;
            }
        }
        None
    }
}

/// Copies of each piece, and the pieces on offer, in buckets by their copies.
#[derive(Clone, Debug)]
pub(crate) struct Rarity {
    copies: Vec<u16>,
    /// The pieces on offer with so many copies; the last level holds all that have more.
    levels: Vec<PieceSet>,
    offered: u32,
}

impl Rarity {
    /// No copies of any of `len` pieces, none on offer.
    pub(crate) fn new(len: u32) -> Self {
        Self {
            copies: vec![0; len as usize],
            levels: (0..LEVELS).map(|_| PieceSet::none(len)).collect(),
            offered: 0,
        }
    }

    fn level(&self, piece: Piece) -> usize {
        usize::from(self.copies[piece.0 as usize]).min(LEVELS - 1)
    }

    pub(crate) fn copies(&self, piece: Piece) -> u16 {
        self.copies[piece.0 as usize]
    }

    /// How many pieces are on offer.
    pub(crate) const fn offered(&self) -> u32 {
        self.offered
    }

    /// How many pieces on offer have no copy.
    pub(crate) fn uncopied(&self) -> u32 {
        self.levels[0].count()
    }

    pub(crate) fn is_offered(&self, piece: Piece) -> bool {
        self.levels[self.level(piece)].has(piece)
    }

    /// Puts a piece on offer.
    pub(crate) fn offer(&mut self, piece: Piece) {
        let level = self.level(piece);
        self.offered += u32::from(self.levels[level].insert(piece));
    }

    /// Takes a piece off; true if it was on offer.
    pub(crate) fn retract(&mut self, piece: Piece) -> bool {
        let level = self.level(piece);
        let was = self.levels[level].remove(piece);
        self.offered -= u32::from(was);
        was
    }

    /// One copy more.
    pub(crate) fn raise(&mut self, piece: Piece) {
        self.step(piece, u16::saturating_add);
    }

    /// One copy less.
    pub(crate) fn lower(&mut self, piece: Piece) {
        self.step(piece, u16::saturating_sub);
    }

    fn step(&mut self, piece: Piece, change: fn(u16, u16) -> u16) {
        let before = self.level(piece);
        let copies = &mut self.copies[piece.0 as usize];
        *copies = change(*copies, 1);
        let after = self.level(piece);
        if before != after && self.levels[before].remove(piece) {
            self.levels[after].insert(piece);
        }
    }

    /// The rarest piece on offer among these. Of several it is `liked`, else ties fall by dice.
    pub(crate) fn rarest(
        &self,
        among: &PieceSet,
        liked: Option<Piece>,
        dice: &mut Dice,
    ) -> Option<Piece> {
        let liked = liked.filter(|piece| among.has(*piece));
        self.levels.iter().find_map(|level| {
            liked.filter(|piece| level.has(*piece)).or_else(|| level.meet(among, dice))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn two_sets_meet_exactly_where_their_members_do(
            len in 1u32..20_000,
            ones in prop::collection::btree_set(0u32..20_000, 0..40),
            others in prop::collection::btree_set(0u32..20_000, 0..40),
            gone in prop::collection::btree_set(0u32..20_000, 0..40),
            seed: u64,
        ) {
            let build = |members: &BTreeSet<u32>| {
                let mut set = PieceSet::none(len);
                for p in members.iter().filter(|p| **p < len) {
                    set.insert(Piece(*p));
                }
                for p in gone.iter().filter(|p| **p < len) {
                    set.remove(Piece(*p));
                }
                set
            };
            let (a, b) = (build(&ones), build(&others));
            let common: BTreeSet<u32> =
                ones.iter().filter(|p| others.contains(p) && !gone.contains(p) && **p < len).copied().collect();
            let mut dice = Dice(seed);
            let more = ones.iter().any(|p| *p < len && !gone.contains(p) && !common.contains(p));
            prop_assert_eq!(a.exceeds(&b), more);
            match a.meet(&b, &mut dice) {
                Some(p) => prop_assert!(common.contains(&p.0)),
                None => prop_assert!(common.is_empty()),
            }
        }

        #[test]
        fn the_rarest_is_found_whatever_happened_before(
            steps in prop::collection::vec((0u8..4, 0u32..200), 0..400), seed: u64,
        ) {
            let mut rarity = Rarity::new(200);
            let (mut copies, mut offered) = (vec![0u16; 200], BTreeSet::new());
            for (what, p) in steps {
                match what {
                    0 => { rarity.raise(Piece(p)); copies[p as usize] += 1; }
                    1 => { rarity.lower(Piece(p)); copies[p as usize] = copies[p as usize].saturating_sub(1); }
                    2 => { rarity.offer(Piece(p)); offered.insert(p); }
                    _ => { prop_assert_eq!(rarity.retract(Piece(p)), offered.remove(&p)); }
                }
            }
            prop_assert_eq!(rarity.offered() as usize, offered.len());
            prop_assert_eq!(rarity.uncopied() as usize, offered.iter().filter(|p| copies[**p as usize] == 0).count());
            let mut odd = PieceSet::none(200);
            (0..200).filter(|p| p % 2 == 1).for_each(|p| { odd.insert(Piece(p)); });
            let best = offered.iter().filter(|p| *p % 2 == 1).map(|p| copies[*p as usize].min(15)).min();
            for liked in (0..210).map(Piece).map(Some).chain([None]) {
                let found = rarity.rarest(&odd, liked, &mut Dice(seed));
                prop_assert_eq!(found.map(|p| rarity.copies(p).min(15)), best);
                prop_assert!(found.is_none_or(|p| rarity.is_offered(p) && odd.has(p)));
                if let Some(p) = liked && odd.has(p) && rarity.is_offered(p) {
                    let is_rarest = Some(rarity.copies(p).min(15)) == best;
                    prop_assert_eq!(found == liked, is_rarest);
                }
            }
        }
    }

    #[test]
    fn ties_fall_everywhere() {
        let (mut rarity, mut all) = (Rarity::new(1_000), PieceSet::none(1_000));
        for p in (0..1_000).map(Piece) {
            rarity.offer(p);
            all.insert(p);
        }
        let mut dice = Dice(3);
        let picks: BTreeSet<Piece> =
            (0..500).filter_map(|_| rarity.rarest(&all, None, &mut dice)).collect();
        assert!(picks.len() > 350, "{} different picks of 500", picks.len());
    }
}
