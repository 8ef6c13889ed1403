//! Owns how far each piece of a seed has got: held, under way to its first reader, seen with some.
//! Never knows who the readers are.

use crate::dice::Dice;
use crate::id::Piece;
use crate::rarity::{PieceSet, Rarity};

/// The pieces that a seed holds, and how many readers have each of them.
pub(super) struct Stock {
    /// On offer: what is held and not under way. Copies: readers that have a piece or are to get it.
    rarity: Rarity,
    /// Held, promised to some, not late, and with nobody yet. A second copy would only keep the first
    /// from arriving, and it is the first that all others wait for.
    under_way: PieceSet,
    /// What should have arrived by now, from the last promise.
    late: PieceSet,
    /// Readers that have each piece.
    seen: Vec<u16>,
}

impl Stock {
    /// Nothing is held of `len` pieces.
    pub(super) fn new(len: u32) -> Self {
        Self {
            rarity: Rarity::new(len),
            under_way: PieceSet::none(len),
            late: PieceSet::none(len),
            seen: vec![0; len as usize],
        }
    }

    /// How many are held.
    pub(super) const fn held(&self) -> u32 {
        self.rarity.offered() + self.under_way.count()
    }

    pub(super) fn holds(&self, piece: Piece) -> bool {
        self.rarity.is_offered(piece) || self.under_way.has(piece)
    }

    pub(super) fn is_under_way(&self, piece: Piece) -> bool {
        self.under_way.has(piece)
    }

    /// Whether it should have arrived by now, from the last promise.
    pub(super) fn is_late(&self, piece: Piece) -> bool {
        self.late.has(piece)
    }

    /// Readers that have it or are to get it.
    pub(super) fn copies(&self, piece: Piece) -> u16 {
        self.rarity.copies(piece)
    }

    /// Readers that have it.
    pub(super) fn seen(&self, piece: Piece) -> u16 {
        self.seen[piece.0 as usize]
    }

    pub(super) fn hold(&mut self, piece: Piece) {
        if !self.holds(piece) {
            self.rarity.offer(piece);
            self.settle(piece);
        }
    }

    pub(super) fn lose(&mut self, piece: Piece) {
        self.rarity.retract(piece);
        self.under_way.remove(piece);
    }

    /// A reader is to get it.
    pub(super) fn promise(&mut self, piece: Piece) {
        self.rarity.raise(piece);
        self.late.remove(piece);
        self.settle(piece);
    }

    /// It should have arrived by now: perhaps it never does.
    pub(super) fn expire(&mut self, piece: Piece) {
        self.late.insert(piece);
        self.settle(piece);
    }

    /// It is not to get it after all.
    pub(super) fn break_promise(&mut self, piece: Piece) {
        self.rarity.lower(piece);
        self.settle(piece);
    }

    /// A reader has it, which it was promised or not.
    pub(super) fn see(&mut self, piece: Piece, promised: bool) {
        let seen = &mut self.seen[piece.0 as usize];
        *seen = seen.saturating_add(1);
        if !promised {
            self.rarity.raise(piece);
        }
        self.settle(piece);
    }

    /// It has it no longer.
    pub(super) fn miss(&mut self, piece: Piece) {
        let seen = &mut self.seen[piece.0 as usize];
        *seen = seen.saturating_sub(1);
        self.rarity.lower(piece);
        self.settle(piece);
    }

    /// Whether any of these, all held, is on offer.
    pub(super) fn offers_of(&self, among: &PieceSet) -> bool {
        among.exceeds(&self.under_way)
    }

    /// The rarest of these that is on offer.
    pub(super) fn rarest(&self, among: &PieceSet, dice: &mut Dice) -> Option<Piece> {
        self.rarity.rarest(among, None, dice)
    }

    fn settle(&mut self, piece: Piece) {
        let under_way = self.copies(piece) > 0 && self.seen(piece) == 0 && !self.late.has(piece);
        if under_way && self.rarity.retract(piece) {
            self.under_way.insert(piece);
        } else if !under_way && self.under_way.remove(piece) {
            self.rarity.offer(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// What is known of a piece: whether we hold it, who is to get it, who has it, and
    /// whether it should have arrived.
    type Known = (bool, BTreeSet<u8>, BTreeSet<u8>, bool);

    proptest! {
        #[test]
        fn a_piece_is_under_way_exactly_while_it_is_promised_not_late_and_nobody_has_it(
            steps in prop::collection::vec((0u8..7, 0u32..5, 0u8..4), 0..200), seed: u64,
        ) {
            let mut stock = Stock::new(5);
            let mut known: Vec<Known> = vec![Known::default(); 5];
            for (what, piece, reader) in steps {
                let (at, (held, promised, seen, late)) = (Piece(piece), &mut known[piece as usize]);
                match what {
                    0 => { stock.hold(at); *held = true; }
                    1 => { stock.lose(at); *held = false; }
                    2 if !seen.contains(&reader) && promised.insert(reader) => {
                        stock.promise(at);
                        *late = false;
                    }
                    3 if promised.remove(&reader) => stock.break_promise(at),
                    4 if !seen.contains(&reader) => {
                        stock.see(at, promised.remove(&reader));
                        seen.insert(reader);
                    }
                    6 => { stock.expire(at); *late = true; }
                    5 if seen.remove(&reader) => stock.miss(at),
                    _ => {}
                }
                let (mut all, mut dice) = (PieceSet::none(5), Dice(seed));
                (0..5).filter(|p| known[*p as usize].0).for_each(|p| { all.insert(Piece(p)); });
                let under_way = |p: &u32| {
                    let (held, promised, seen, late) = &known[*p as usize];
                    *held && !promised.is_empty() && seen.is_empty() && !late
                };
                for p in 0..5 {
                    let (held, promised, seen, _) = &known[p as usize];
                    let piece = Piece(p);
                    prop_assert_eq!(stock.holds(piece), *held);
                    prop_assert_eq!(stock.copies(piece) as usize, promised.len() + seen.len());
                    prop_assert_eq!(stock.seen(piece) as usize, seen.len());
                    prop_assert_eq!(stock.is_under_way(piece), under_way(&p));
                }
                prop_assert_eq!(stock.held(), all.count());
                let offered = (0..5).filter(|p| all.has(Piece(*p)) && !under_way(p)).count();
                prop_assert_eq!(stock.offers_of(&all), offered > 0);
                prop_assert_eq!(stock.rarest(&all, &mut dice).is_some(), offered > 0);
            }
        }
    }
}
