//! Owns one way of a connection: what is said on it, and its send buffer. Never a clock.

use std::collections::VecDeque;
use std::rc::Rc;

use super::Nanos;
use crate::bitfield::Bitfield;
use crate::id::Piece;
use crate::time::Duration;

/// What a socket holds that is not on the line yet (`TCP_NOTSENT_LOWAT`).
const UNSENT: u64 = 32 << 10;
/// What a socket has on its way and not acknowledged, besides what its delay asks for.
const WINDOW: u64 = 128 << 10;

/// What is said besides pieces.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    Open(u32),
    Opened(u32),
    /// Further hosts.
    Hosts(Vec<u32>),
    /// `Have` of who opened the content, and of whom it was opened at.
    TheirHave(u32, Box<Bitfield>),
    Have(u32, Box<Bitfield>),
    TheirHaveMore(u32, Rc<[Piece]>),
    HaveMore(u32, Rc<[Piece]>),
    Want(u32, Vec<Piece>),
    Cancel(u32, Vec<Piece>),
    Busy(u32, Vec<Piece>, Duration),
    Grant(u32, Vec<Piece>),
    Close(u32),
}

impl Frame {
    /// Bytes it takes on the wire.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Have(_, have) | Self::TheirHave(_, have) => 16 + u64::from(have.len()) / 8,
            Self::HaveMore(_, pieces) | Self::TheirHaveMore(_, pieces) => {
                16 + 4 * pieces.len() as u64
            }
            Self::Want(_, pieces)
            | Self::Cancel(_, pieces)
            | Self::Busy(_, pieces, _)
            | Self::Grant(_, pieces) => 16 + 4 * pieces.len() as u64,
            Self::Hosts(hosts) => 16 + 60 * hosts.len() as u64,
            Self::Open(_) | Self::Opened(_) | Self::Close(_) => 48,
        }
    }
}

/// A piece, or what is left of it to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) content: u32,
    pub(super) piece: Piece,
    pub(super) left: u32,
}

/// What is in a send buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) bytes: u32,
    /// The piece that is whole with this chunk.
    pub(super) ends: Option<Part>,
}

/// One way of a connection.
pub(super) struct Way {
    pub(super) from: u32,
    pub(super) to: u32,
    /// The other way of it.
    pub(super) back: u32,
    pub(super) is_open: bool,
    /// Nothing gets through any more, and soon it is given up.
    pub(super) is_cut: bool,
    pub(super) delay: Nanos,
    /// Contents, as bits: `to` opened it here, sees what `from` holds of it, had it from the start.
    pub(super) opened: u32,
    pub(super) shown: u32,
    pub(super) of_seed: u32,
    /// To be written, in order.
    pub(super) pieces: VecDeque<Part>,
    buffer: VecDeque<Chunk>,
    unsent: u64,
    unacknowledged: u64,
    acknowledgements: VecDeque<(Nanos, u32)>,
    window: u64,
    /// There is more to write once an acknowledgement comes.
    pub(super) is_blocked: bool,
    /// Its turn on the uplink will come.
    pub(super) is_queued: bool,
    /// What was said last arrives then.
    pub(super) said: Nanos,
}

impl Way {
    pub(super) fn new(from: u32, to: u32, back: u32, delay: Nanos, rate: u64) -> Self {
        let flight = (u128::from(rate) * u128::from(3 * delay) / 1_000_000_000) as u64;
        Self {
            from,
            to,
            back,
            is_open: true,
            is_cut: false,
            delay,
            opened: 0,
            shown: 0,
            of_seed: 0,
            pieces: VecDeque::new(),
            buffer: VecDeque::new(),
            unsent: 0,
            unacknowledged: 0,
            acknowledgements: VecDeque::new(),
            window: WINDOW + flight,
            is_blocked: false,
            is_queued: false,
            said: 0,
        }
    }

    /// Writes the next chunk into the buffer, if there is one and room; the piece it ends, if any.
    pub(super) fn write(&mut self, now: Nanos, most: u32) -> Option<Option<Part>> {
        while let Some((at, bytes)) = self.acknowledgements.front()
            && *at <= now
        {
            self.unacknowledged -= u64::from(*bytes);
            self.acknowledgements.pop_front();
        }
        self.is_blocked = false;
        let part = self.pieces.front_mut()?;
        if self.unsent >= UNSENT {
            return None; // the uplink calls
        }
        if self.unacknowledged >= self.window {
            self.is_blocked = true;
            return None;
        }
        let bytes = part.left.min(most);
        part.left -= bytes;
        let ends = if part.left == 0 { self.pieces.pop_front() } else { None };
        self.unsent += u64::from(bytes);
        self.unacknowledged += u64::from(bytes);
        self.buffer.push_back(Chunk { bytes, ends });
        Some(ends)
    }

    /// Takes the next chunk out of the buffer, to be sent.
    pub(super) fn take(&mut self) -> Option<Chunk> {
        let chunk = self.buffer.pop_front()?;
        self.unsent -= u64::from(chunk.bytes);
        Some(chunk)
    }

    pub(super) fn acknowledge(&mut self, at: Nanos, bytes: u32) {
        self.acknowledgements.push_back((at, bytes));
    }

    /// When it is to be seen again whether there is room; `None` if nothing waits for that.
    pub(super) fn unblocks(&self) -> Option<Nanos> {
        self.acknowledgements.front().filter(|_| self.is_blocked).map(|(at, _)| *at)
    }

    pub(super) fn has_chunks(&self) -> bool {
        !self.buffer.is_empty()
    }

    pub(super) const fn unsent(&self) -> u64 {
        self.unsent
    }

    /// The connection is over; what is in the buffer is lost.
    pub(super) fn close(&mut self) {
        (self.is_open, self.opened, self.shown) = (false, 0, 0);
        (self.is_blocked, self.is_queued) = (false, false);
        (self.pieces, self.buffer) = (VecDeque::new(), VecDeque::new());
        self.acknowledgements = VecDeque::new();
    }
}
