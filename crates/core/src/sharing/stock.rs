//! Owns how far each piece of a seed has got: held, under way to its first reader, seen with some.
//! Never knows who the readers are.

use crate::dice::Dice;
use crate::id::Piece;
use crate::rarity::{PieceSet, Rarity};

/// The pieces that a seed holds, and how many readers have each of them.
pub(super) struct Stock {
    /// On offer: what is held and not under way. Copies: readers that have a piece or are to get it.
    rarity: Rarity,
    /// Held, promised to some, and with nobody yet. A second copy would only keep the first from
    /// arriving, and it is the first that all others wait for.
    under_way: PieceSet,
    /// Readers that have each piece.
    seen: Vec<u16>,
}

impl Stock {
    /// Nothing is held of `len` pieces.
    pub(super) fn new(len: u32) -> Self {
        Self {
            rarity: Rarity::new(len),
            under_way: PieceSet::none(len),
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

    /// One of these that is under way to somebody.
    pub(super) fn promised(&self, among: &PieceSet, dice: &mut Dice) -> Option<Piece> {
        self.under_way.meet(among, dice)
    }

    fn settle(&mut self, piece: Piece) {
        let under_way = self.copies(piece) > 0 && self.seen(piece) == 0;
        if under_way && self.rarity.retract(piece) {
            self.under_way.insert(piece);
        } else if !under_way && self.under_way.remove(piece) {
            self.rarity.offer(piece);
        }
    }
}
