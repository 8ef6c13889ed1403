//! Owns what this peer serves to whom and in which order: a short queue that says Busy, fairness
//! among members, grants by a seed. Never sees a piece's bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::id::{PeerId, Piece};
use crate::layout::Layout;
use crate::swarm::Host;
use crate::time::{Duration, Moment};
use crate::wire::datagram::Load;

/// One thing the owner must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this piece now; say [`Sharing::on_sent`] once the socket took its last byte, or
    /// [`Sharing::on_unsent`] if it cannot be sent. A cancelled one may be skipped (say `on_unsent`).
    Serve {
        /// Whom.
        host: Host,
        /// Of which content.
        content: u32,
        /// What.
        piece: Piece,
    },
    /// Send `Busy` for these.
    Busy {
        /// Whom.
        host: Host,
        /// Of which content.
        content: u32,
        /// What will not be sent.
        pieces: Vec<Piece>,
        /// When to ask again.
        wait: Duration,
    },
    /// Send `Grant` for these.
    Grant {
        /// Whom.
        host: Host,
        /// Of which content.
        content: u32,
        /// What it is to take of us.
        pieces: Vec<Piece>,
    },
    /// Send `Have` with all that we hold of this content at this moment, and from now on `HaveMore`
    /// to this host with every `Announce`. May come again for the same host: send `Have` again.
    ShowHave {
        /// Whom.
        host: Host,
        /// Of which content.
        content: u32,
    },
}

/// All contents of this peer, as a host.
pub struct Sharing {
    dice: Dice,
    outputs: VecDeque<Output>,
}

impl Sharing {
    /// Shares nothing yet. `dice` seeds its choices among equals.
    pub fn new(dice: u64) -> Self {
        Self { dice: Dice(dice), outputs: VecDeque::new() }
    }

    /// Shares a content, numbered by the owner. `seed`: it was complete from the start, so this peer
    /// may be the only one that holds it, and grants pieces when several want them.
    pub fn add(&mut self, content: u32, layout: Arc<Layout>, have: &Bitfield, seed: bool) {}

    /// Shares this content no longer: what was queued of it is turned away. The owner closes its channels.
    pub fn remove(&mut self, now: Moment, content: u32) {}

    /// We hold these too (`swarm::Output::Announce`).
    pub fn on_held(&mut self, content: u32, pieces: &[Piece]) {}

    /// We hold these no longer (bit rot, a changed file). The owner tells every opener (`Lost`).
    pub fn on_lost(&mut self, now: Moment, content: u32, pieces: &[Piece]) {}

    /// A connection is up, to the member `peer`. Connections of one member share one member's part.
    pub fn on_host(&mut self, now: Moment, host: Host, peer: PeerId) {}

    /// A host opened this content (`Opened` is the owner's to answer, before anything that follows).
    pub fn on_open(&mut self, now: Moment, host: Host, content: u32) {}

    /// `Have` of an opener: all that it holds. Needed for contents added with `seed`, else ignored.
    pub fn on_their_have(&mut self, now: Moment, host: Host, content: u32, have: &Bitfield) {}

    /// `HaveMore` of an opener.
    pub fn on_their_have_more(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {}

    /// `Lost` of an opener.
    pub fn on_their_lost(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {}

    /// `Want`.
    pub fn on_want(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {}

    /// `Cancel`: of what it asked for, or of what it was granted.
    pub fn on_cancel(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {}

    /// The socket took the last byte of this piece.
    pub fn on_sent(&mut self, now: Moment, host: Host, content: u32, piece: Piece) {}

    /// This piece will not be sent after all: unreadable, or cancelled in time.
    pub fn on_unsent(&mut self, now: Moment, host: Host, content: u32, piece: Piece) {}

    /// The opener closed this content.
    pub fn on_closed(&mut self, now: Moment, host: Host, content: u32) {}

    /// The connection is over.
    pub fn on_gone(&mut self, now: Moment, host: Host) {}

    /// Time passed.
    pub fn tick(&mut self, now: Moment) {}

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Sharing::tick`] is due.
    pub fn next_deadline(&self) -> Option<Moment> {
        None
    }

    /// How busy we are, for the index.
    pub fn load(&self) -> Load {
        Load::default()
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        Counts::default()
    }

    /// Panics when an invariant broke.
    pub fn check(&self) {}
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pieces sent.
    pub sent: u64,
    /// Bytes of them.
    pub sent_bytes: u64,
    /// Pieces turned away as Busy.
    pub busy: u64,
    /// Pieces granted.
    pub granted: u64,
    /// Grants that were not taken in time.
    pub withdrawn: u64,
}
