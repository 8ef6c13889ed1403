//! Owns one content being fetched: which piece is asked of whom, patience, the endgame. Never sees
//! a piece's bytes, and never talks to anyone: its owner carries out what [`Swarm::poll_output`] says.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::id::Piece;
use crate::layout::Layout;
use crate::time::{Duration, Moment};

/// A neighbour: one connection, numbered by the owner. A number is not used again while anything of
/// the old connection may still arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host(pub u32);

/// How an asked-for piece came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// Verified, and held from now on.
    New,
    /// Verified, but it was held already.
    Duplicate,
    /// It does not match its proof.
    Bad,
    /// It could not be kept: our disk failed. It is missing still.
    Failed,
}

/// One thing the owner must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send `Want` for these (at most [`crate::wire::stream::MAX_PIECES`] at a time).
    Ask {
        /// Whom.
        host: Host,
        /// What, in the order it is wanted.
        pieces: Vec<Piece>,
    },
    /// Send `Cancel` for these: they were asked for, or granted, and are no longer wanted.
    Cancel {
        /// Whom.
        host: Host,
        /// What.
        pieces: Vec<Piece>,
    },
    /// Ask this host for nothing any more; it is forgotten here already.
    Drop {
        /// Whom.
        host: Host,
        /// What it did. After [`Why::Poison`] the owner ends the connection and lets that peer in
        /// no more; after [`Why::Silent`] it closes the channel and may try again later.
        why: Why,
    },
    /// Tell every neighbour (`HaveMore`), and `Sharing::on_held`, that we hold these now.
    Announce(Vec<Piece>),
    /// Look for further hosts: the index, neighbours. Comes again, ever more slowly, while it lasts.
    NeedHosts,
    /// Everything is held. Comes once, after the last `Announce`.
    Complete,
}

/// Why a host is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It sent a piece that does not match its proof.
    Poison,
    /// It took asks and answered none of them, several times in a row.
    Silent,
}

/// Why nothing moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// [`Swarm::pause`] was called: our disk is full.
    Paused,
    /// No host is connected.
    NoHosts,
    /// Hosts are there, but so many of the missing pieces are held by none of them, and nothing
    /// else is left to ask for.
    Missing(u32),
    /// Every host that has something for us said that it is busy, the first of them until then.
    AllBusy(Moment),
    /// Hosts that have something for us do not answer.
    Silent,
}

/// What happened so far; a swarm that heals hides its wounds, so they are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pieces that came in new, and their bytes.
    pub new: u32,
    /// Bytes of them.
    pub new_bytes: u64,
    /// Bytes that came in a second time.
    pub duplicate_bytes: u64,
    /// Pieces that did not match their proof.
    pub bad: u32,
    /// Pieces that our disk did not take.
    pub failed: u32,
    /// Times that a host's patience ran out.
    pub stalls: u32,
    /// Pieces that a host was too busy for.
    pub busy: u32,
    /// Pieces asked for of a second host in the endgame.
    pub endgame: u32,
}

/// One content being fetched.
pub struct Swarm {
    layout: Arc<Layout>,
    have: Bitfield,
    dice: Dice,
    counts: Counts,
    outputs: VecDeque<Output>,
}

impl Swarm {
    /// Fetches what `have` lacks of a content cut like `layout`. `dice` seeds its choices among equals.
    pub fn new(layout: Arc<Layout>, have: Bitfield, dice: u64) -> Self {
        Self { layout, have, dice: Dice(dice), counts: Counts::default(), outputs: VecDeque::new() }
    }

    /// A host opened the content for us (`Opened` came). What it holds comes with [`Swarm::on_have`]
    /// or piece by piece with [`Swarm::on_granted`].
    pub fn on_host(&mut self, now: Moment, host: Host) {}

    /// `Have`: all that this host holds; replaces what it said before, and ends its granting.
    /// A bitfield of another length is ignored.
    pub fn on_have(&mut self, now: Moment, host: Host, have: &Bitfield) {}

    /// `HaveMore`.
    pub fn on_have_more(&mut self, now: Moment, host: Host, pieces: &[Piece]) {}

    /// `Lost`.
    pub fn on_lost(&mut self, now: Moment, host: Host, pieces: &[Piece]) {}

    /// `Grant`: this host, a seed, holds these for us. From now on it is asked for what it grants only.
    pub fn on_granted(&mut self, now: Moment, host: Host, pieces: &[Piece]) {}

    /// `Busy`: not these, and nothing else for `wait`.
    pub fn on_busy(&mut self, now: Moment, host: Host, pieces: &[Piece], wait: Duration) {}

    /// A piece came from this host, asked for or not, connected still or not.
    pub fn on_piece(&mut self, now: Moment, host: Host, piece: Piece, arrived: Arrived) {}

    /// The host closed the channel, or its connection is over.
    pub fn on_gone(&mut self, now: Moment, host: Host) {}

    /// A piece that was held is not any more (bit rot was found): it is fetched again.
    pub fn on_rotten(&mut self, now: Moment, piece: Piece) {}

    /// Time passed.
    pub fn tick(&mut self, now: Moment) {}

    /// Our disk is full: what was asked for is cancelled, nothing is asked for until
    /// [`Swarm::resume`]. What is under way may still come in.
    pub fn pause(&mut self, now: Moment) {}

    /// There is room on the disk again.
    pub fn resume(&mut self, now: Moment) {}

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Swarm::tick`] is due.
    pub fn next_deadline(&self) -> Option<Moment> {
        None
    }

    /// What we hold.
    pub const fn have(&self) -> &Bitfield {
        &self.have
    }

    /// Whether everything is held.
    pub const fn is_complete(&self) -> bool {
        self.have.is_full()
    }

    /// Why nothing moves; `None` while something does, and when complete.
    pub fn waiting(&self, now: Moment) -> Option<Waiting> {
        None
    }

    /// How many pieces are missing that no connected host holds.
    pub fn unheld(&self) -> u32 {
        0
    }

    /// Bytes a second that came in of late, from all hosts.
    pub fn rate(&self) -> u64 {
        0
    }

    /// What a host is to us just now, for people to read; `None` if it is not connected.
    pub fn view(&self, now: Moment, host: Host) -> Option<View> {
        None
    }

    /// What happened so far.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Panics when an invariant broke.
    pub fn check(&self) {}
}

/// What a host is to a swarm just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Pieces it told us it holds.
    pub held: u32,
    /// It grants pieces instead of letting us choose.
    pub grants: bool,
    /// Pieces asked of it and not answered yet.
    pub asked: u32,
    /// Bytes a second it sends of late.
    pub rate: u64,
    /// Bytes it sent that were new to us.
    pub given: u64,
    /// It said that it is busy, until then.
    pub busy: Option<Moment>,
    /// It let us wait too long and is left alone until then.
    pub resting: Option<Moment>,
}
