//! Owns the frames two peers exchange over TCP. Never reads a socket.
//!
//! A frame: `u32` length of what follows, a type byte, the body. Who opens a content numbers the
//! channel; a channel on the wire says which of the two opened it, so numbers never clash.

use std::net::SocketAddr;

use crate::bitfield::Bitfield;
use crate::id::{ContentId, PeerId, Piece};

/// The largest piece (see `manifest`): what the longest frame carries.
pub const MAX_PIECE: usize = 4 << 20;
/// The longest frame, without its length.
pub const MAX_FRAME: usize = MAX_PIECE + 64;
/// Pieces named in one frame.
pub const MAX_PIECES: usize = 1_024;
/// Bytes of metadata in one `Meta` frame.
pub const META_CHUNK: usize = 256 << 10;
/// The longest metadata (manifest and proof) of one content, either of them.
pub const MAX_META: usize = 64 << 20;
/// Hosts named in one frame.
pub const MAX_HOSTS: usize = 64;
/// Contents open on one connection, per direction.
pub const MAX_CHANNELS: usize = 1_024;
/// Bytes of a piece frame before the piece's own: type, channel, piece.
pub const PIECE_HEAD: usize = 7;

/// A content open on a connection.
///
/// On the wire: a `u16` whose top bit is set when the frame's *receiver* opened the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Channel {
    /// Picked by the opener, below 2¹⁵.
    pub number: u16,
    /// Who opened it, as seen from this side; flipped by sending.
    pub opener: Side,
}

/// One end of a connection, as seen from this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// This machine.
    Us,
    /// The other.
    Them,
}

/// What is said on a connection. *Opener* is who wants the content, *host* the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// First frame of both sides, the dialler's first; the acceptor says nothing before.
    Hello {
        /// The sender's member certificate, as issued.
        certificate: &'a [u8],
        /// TCP port the sender serves on.
        port: u16,
    },
    /// Opener: I want to fetch this content from you.
    Open(Channel, ContentId),
    /// Host: I have (some of) it.
    Opened {
        /// The opener's channel.
        channel: Channel,
        /// The content's size in bytes (a folder: all files together).
        size: u64,
        /// Length of its manifest in bytes (0 for a file).
        manifest: u32,
        /// Length of its proof in bytes.
        proof: u32,
    },
    /// Opener: send the metadata.
    WantMeta(Channel),
    /// Host: the next bytes of manifest ‖ proof, at most [`META_CHUNK`].
    Meta(Channel, &'a [u8]),
    /// Either: what I hold, all of it at once. `u32` pieces in all, then the bits.
    Have(Channel, Bitfield),
    /// Either: what I hold since.
    HaveMore(Channel, Vec<Piece>),
    /// Either: what I hold no longer.
    Lost(Channel, Vec<Piece>),
    /// Opener: send these pieces.
    Want(Channel, Vec<Piece>),
    /// Host: one piece, whole.
    Piece(Channel, Piece, &'a [u8]),
    /// Opener: I no longer want these.
    Cancel(Channel, Vec<Piece>),
    /// Host: not these now; ask again after so many milliseconds, or ask others.
    Busy(Channel, Vec<Piece>, u32),
    /// Opener: the piece you sent does not match its proof.
    Reject(Channel, Piece),
    /// Host, a seed: take these pieces of me.
    Grant(Channel, Vec<Piece>),
    /// Host: further hosts of this content that I know.
    Hosts(Channel, Vec<(PeerId, SocketAddr)>),
    /// Either: this channel is over.
    Close(Channel),
    /// Nothing new: shows that the sender is alive.
    Ping,
    /// The connection is over, and why.
    Bye(Goodbye, &'a str),
}

/// Why a connection ends. A number is stable for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Goodbye {
    /// Nothing left to do.
    Done = 1,
    /// The process stops.
    Leaving = 2,
    /// A rule was broken.
    Protocol = 3,
    /// The other's certificate is expired, revoked or of another network.
    NotMember = 4,
    /// Too many connections.
    Full = 5,
    /// A piece that does not match its proof was sent.
    BadPiece = 6,
    /// Nothing moved for too long.
    TimedOut = 7,
}
