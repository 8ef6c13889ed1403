//! Owns what is said next on a connection: small frames pass between large ones, metadata goes
//! before pieces. Never decides whom to serve, and never sees a piece's bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use potluck_core::id::Piece;
use potluck_core::wire::stream::{Channel, Frame, META_CHUNK, Side};

use super::Gone;
use crate::store::Replica;

/// Small frames that may wait for a machine that does not read: one that stays this far behind is
/// let go of.
const MAX_WAITING: usize = 16 << 20;

/// What is to be said.
#[derive(Default)]
pub(super) struct Outbox {
    /// Frames, encoded, of which the first `small_at` bytes were said.
    small: Vec<u8>,
    small_at: usize,
    /// How much of `small` is metadata, its first frame then.
    small_meta: usize,
    metas: VecDeque<MetaOut>,
    serves: VecDeque<(u16, Piece)>,
    /// Pieces said but not yet known to be with the kernel: where in the stream they end.
    ends: VecDeque<(u64, Sent)>,
}

/// A piece that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) channel: u16,
    pub(super) piece: Piece,
    pub(super) bytes: u32,
}

struct MetaOut {
    channel: u16,
    replica: Arc<Replica>,
    /// Read when its turn comes.
    proof: Option<Vec<u8>>,
    /// Bytes of manifest ‖ proof that were said.
    said: usize,
}

impl Outbox {
    /// Says a small frame, before all pieces that were not begun.
    pub(super) fn say(&mut self, frame: &Frame<'_>) -> Result<(), Gone> {
        frame.encode(&mut self.small);
        if self.small.len() - self.small_at > MAX_WAITING {
            return Err(Gone::TimedOut("it does not read what it is told"));
        }
        Ok(())
    }

    /// Sends the metadata of `replica`.
    pub(super) fn send_meta(&mut self, channel: u16, replica: Arc<Replica>) {
        self.metas.push_back(MetaOut { channel, replica, proof: None, said: 0 });
    }

    /// Sends a piece when its turn comes: it is then handed out by [`Outbox::next_serve`].
    pub(super) fn serve(&mut self, channel: u16, piece: Piece) {
        self.serves.push_back((channel, piece));
    }

    /// Takes back what of these was not begun; which it was.
    pub(super) fn take_back(&mut self, channel: u16, pieces: &[Piece]) -> Vec<Piece> {
        let mut taken = vec![];
        self.serves.retain(|&(on, piece)| {
            let back = on == channel && pieces.contains(&piece);
            if back {
                taken.push(piece);
            }
            !back
        });
        taken
    }

    /// Begins nothing more on `channel`.
    pub(super) fn forget(&mut self, channel: u16) {
        self.metas.retain(|meta| meta.channel != channel);
        self.serves.retain(|(on, _)| *on != channel);
    }

    /// Begins nothing more at all, but says `frame` last.
    pub(super) fn end_with(&mut self, frame: &Frame<'_>) {
        self.metas.clear();
        self.serves.clear();
        frame.encode(&mut self.small);
    }

    /// The bytes to say now, before any piece; empty where there are none.
    pub(super) fn plain(&mut self) -> &[u8] {
        if self.small_at == self.small.len() {
            self.small.clear();
            (self.small_at, self.small_meta) = (0, 0);
            while self.small.is_empty() && !self.metas.is_empty() {
                self.next_meta();
            }
        }
        &self.small[self.small_at..]
    }

    /// Whether those bytes are of metadata, and not of a frame that is always small.
    pub(super) const fn is_large(&self) -> bool {
        self.small_at < self.small_meta
    }

    /// The first `n` of those bytes were said.
    pub(super) const fn said(&mut self, n: usize) {
        self.small_at += n;
    }

    /// Whether there is a serve that was not begun.
    pub(super) fn has_serves(&self) -> bool {
        !self.serves.is_empty()
    }

    /// The next piece to be served, where nothing else is to be said before; it stays the next until
    /// [`Outbox::served`].
    pub(super) fn next_serve(&self) -> Option<(u16, Piece)> {
        self.serves.front().copied()
    }

    /// That piece's turn is over.
    pub(super) fn served(&mut self) {
        self.serves.pop_front();
    }

    /// A piece was sealed, and ends at `position` in the stream.
    pub(super) fn sealed(&mut self, position: u64, piece: Sent) {
        self.ends.push_back((position, piece));
    }

    /// The next piece whose last byte lies before `written` in the stream.
    pub(super) fn sent(&mut self, written: u64) -> Option<Sent> {
        match self.ends.front() {
            Some((end, sent)) if *end <= written => {
                let sent = *sent;
                self.ends.pop_front();
                Some(sent)
            }
            _ => None,
        }
    }

    /// Gives back memory that is not in use.
    pub(super) fn rest(&mut self) {
        self.small.shrink_to_fit();
    }

    /// Says the next part of the metadata that is being sent, if any.
    fn next_meta(&mut self) {
        let Some(meta) = self.metas.front_mut() else { return };
        let proof = meta.proof.get_or_insert_with(|| meta.replica.proof());
        let manifest = meta.replica.manifest();
        let rest = match meta.said.checked_sub(manifest.len()) {
            None => &manifest[meta.said..],
            Some(of_proof) => &proof[of_proof..],
        };
        let chunk = &rest[..rest.len().min(META_CHUNK)];
        let theirs = Channel { number: meta.channel, opener: Side::Them };
        if !chunk.is_empty() {
            Frame::Meta(theirs, chunk).encode(&mut self.small);
            self.small_meta = self.small.len();
        }
        meta.said += chunk.len();
        if meta.said == manifest.len() + proof.len() {
            self.metas.pop_front();
        }
    }
}
