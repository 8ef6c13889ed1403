//! Owns the frames two peers exchange over TCP. Never reads a socket.
//!
//! A frame: `u32` length of what follows, a type byte, the body. Who opens a content numbers the
//! channel; a channel on the wire says which of the two opened it, so numbers never clash.

use std::net::SocketAddr;

use super::bytes::{Malformed, Reader, Writer, numbers};
use crate::bitfield::Bitfield;
use crate::id::{ContentId, PeerId, Piece};
use crate::layout::MAX_PIECES as PIECES_OF_A_CONTENT;
use crate::trust::Certificate;

/// The largest piece (see `layout`): what the longest frame carries.
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

numbers! {
    /// Why a connection ends. A number is stable for ever.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Goodbye else "no such goodbye" {
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
}

/// The bit of a channel that is set where the frame's receiver opened it.
const RECEIVERS: u16 = 1 << 15;

impl Channel {
    /// The same channel, as the other side sees it.
    #[must_use]
    pub const fn flipped(self) -> Self {
        let opener = match self.opener {
            Side::Us => Side::Them,
            Side::Them => Side::Us,
        };
        Self { number: self.number, opener }
    }

    const fn to_wire(self) -> u16 {
        match self.opener {
            Side::Us => self.number & !RECEIVERS,
            Side::Them => self.number | RECEIVERS,
        }
    }

    const fn from_wire(wire: u16) -> Self {
        let opener = if wire & RECEIVERS == 0 { Side::Them } else { Side::Us };
        Self { number: wire & !RECEIVERS, opener }
    }
}

/// Type bytes, in the order a connection meets them.
mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const OPEN: u8 = 2;
    pub(super) const OPENED: u8 = 3;
    pub(super) const WANT_META: u8 = 4;
    pub(super) const META: u8 = 5;
    pub(super) const HAVE: u8 = 6;
    pub(super) const HAVE_MORE: u8 = 7;
    pub(super) const LOST: u8 = 8;
    pub(super) const WANT: u8 = 9;
    pub(super) const PIECE: u8 = 10;
    pub(super) const CANCEL: u8 = 11;
    pub(super) const BUSY: u8 = 12;
    pub(super) const REJECT: u8 = 13;
    pub(super) const GRANT: u8 = 14;
    pub(super) const HOSTS: u8 = 15;
    pub(super) const CLOSE: u8 = 16;
    pub(super) const PING: u8 = 17;
    pub(super) const BYE: u8 = 18;
}

/// A piece frame up to the piece's own bytes, `len` of which must follow: for who reads the piece
/// straight into what is sent.
pub fn piece_head(channel: Channel, piece: Piece, len: usize) -> [u8; 4 + PIECE_HEAD] {
    let mut head = [0; 4 + PIECE_HEAD];
    head[..4].copy_from_slice(&((PIECE_HEAD + len) as u32).to_be_bytes());
    head[4] = kind::PIECE;
    head[5..7].copy_from_slice(&channel.to_wire().to_be_bytes());
    head[7..].copy_from_slice(&piece.0.to_be_bytes());
    head
}

impl<'a> Frame<'a> {
    /// Appends the frame, its length first. Lists, metadata and pieces must be within their limits.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.u32(0);
        self.write(out);
        let len = out.len() - start - 4;
        debug_assert!(len <= MAX_FRAME, "a frame was made too long");
        out[start..start + 4].copy_from_slice(&(len as u32).to_be_bytes());
    }

    /// Reads a frame that was received, without its length.
    pub fn decode(frame: &'a [u8]) -> Result<Self, Malformed> {
        if frame.len() > MAX_FRAME {
            return Err(Malformed("a frame is too long"));
        }
        let mut r = Reader::new(frame);
        let frame = Self::read(&mut r)?;
        r.end()?;
        Ok(frame)
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut begin = |kind, channel: &Channel| {
            out.u8(kind);
            out.u16(channel.to_wire());
        };
        match self {
            Self::Hello { certificate, port } => {
                out.u8(kind::HELLO);
                out.u16(*port);
                out.put(certificate);
            }
            Self::Open(channel, id) => {
                begin(kind::OPEN, channel);
                out.content(id);
            }
            Self::Opened { channel, size, manifest, proof } => {
                begin(kind::OPENED, channel);
                out.u64(*size);
                out.u32(*manifest);
                out.u32(*proof);
            }
            Self::WantMeta(channel) => begin(kind::WANT_META, channel),
            Self::Meta(channel, bytes) => {
                begin(kind::META, channel);
                out.put(bytes);
            }
            Self::Have(channel, held) => {
                begin(kind::HAVE, channel);
                out.u32(held.len());
                out.put(&held.to_bytes());
            }
            Self::HaveMore(channel, pieces) => {
                begin(kind::HAVE_MORE, channel);
                write_pieces(pieces, out);
            }
            Self::Lost(channel, pieces) => {
                begin(kind::LOST, channel);
                write_pieces(pieces, out);
            }
            Self::Want(channel, pieces) => {
                begin(kind::WANT, channel);
                write_pieces(pieces, out);
            }
            Self::Piece(channel, piece, bytes) => {
                out.put(&piece_head(*channel, *piece, bytes.len())[4..]);
                out.put(bytes);
            }
            Self::Cancel(channel, pieces) => {
                begin(kind::CANCEL, channel);
                write_pieces(pieces, out);
            }
            Self::Busy(channel, pieces, wait_ms) => {
                begin(kind::BUSY, channel);
                out.u32(*wait_ms);
                write_pieces(pieces, out);
            }
            Self::Reject(channel, piece) => {
                begin(kind::REJECT, channel);
                out.u32(piece.0);
            }
            Self::Grant(channel, pieces) => {
                begin(kind::GRANT, channel);
                write_pieces(pieces, out);
            }
            Self::Hosts(channel, hosts) => {
                begin(kind::HOSTS, channel);
                for (peer, address) in hosts {
                    out.put(&peer.0);
                    out.address(*address);
                }
            }
            Self::Close(channel) => begin(kind::CLOSE, channel),
            Self::Ping => out.u8(kind::PING),
            Self::Bye(why, text) => {
                out.u8(kind::BYE);
                out.u16(*why as u16);
                out.text8(text);
            }
        }
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            kind::HELLO => {
                let (port, certificate) = (r.u16()?, r.take_rest());
                if certificate.len() > Certificate::MAX_BYTES {
                    return Err(Malformed("no certificate is so long"));
                }
                Self::Hello { certificate, port }
            }
            kind::OPEN => Self::Open(from_opener(r)?, r.content()?),
            kind::OPENED => Self::Opened {
                channel: from_host(r)?,
                size: r.size()?,
                manifest: read_meta_len(r)?,
                proof: read_meta_len(r)?,
            },
            kind::WANT_META => Self::WantMeta(from_opener(r)?),
            kind::META => {
                let (channel, bytes) = (from_host(r)?, r.take_rest());
                if bytes.len() > META_CHUNK {
                    return Err(Malformed("too much metadata in one frame"));
                }
                Self::Meta(channel, bytes)
            }
            kind::HAVE => Self::Have(from_either(r)?, read_held(r)?),
            kind::HAVE_MORE => Self::HaveMore(from_either(r)?, read_pieces(r)?),
            kind::LOST => Self::Lost(from_either(r)?, read_pieces(r)?),
            kind::WANT => Self::Want(from_opener(r)?, read_pieces(r)?),
            kind::PIECE => {
                let (channel, piece, bytes) = (from_host(r)?, read_piece(r)?, r.take_rest());
                if bytes.is_empty() || bytes.len() > MAX_PIECE {
                    return Err(Malformed("a piece is 1 byte to 4 MiB long"));
                }
                Self::Piece(channel, piece, bytes)
            }
            kind::CANCEL => Self::Cancel(from_opener(r)?, read_pieces(r)?),
            kind::BUSY => {
                let (channel, wait_ms) = (from_host(r)?, r.u32()?);
                Self::Busy(channel, read_pieces(r)?, wait_ms)
            }
            kind::REJECT => Self::Reject(from_opener(r)?, read_piece(r)?),
            kind::GRANT => Self::Grant(from_host(r)?, read_pieces(r)?),
            kind::HOSTS => Self::Hosts(from_host(r)?, read_hosts(r)?),
            kind::CLOSE => Self::Close(from_either(r)?),
            kind::PING => Self::Ping,
            kind::BYE => Self::Bye(Goodbye::from_number(r.u16()?)?, r.text8()?),
            _ => return Err(Malformed("no such frame")),
        })
    }
}

/// The channel of a frame that openers and hosts send alike.
fn from_either(r: &mut Reader<'_>) -> Result<Channel, Malformed> {
    Ok(Channel::from_wire(r.u16()?))
}

/// The channel of a frame that only the opener sends: the other side opened it.
fn from_opener(r: &mut Reader<'_>) -> Result<Channel, Malformed> {
    match from_either(r)? {
        channel if channel.opener == Side::Them => Ok(channel),
        _ => Err(Malformed("only who opened the channel says this")),
    }
}

/// The channel of a frame that only the host sends: this side opened it.
fn from_host(r: &mut Reader<'_>) -> Result<Channel, Malformed> {
    match from_either(r)? {
        channel if channel.opener == Side::Us => Ok(channel),
        _ => Err(Malformed("only the host says this")),
    }
}

fn read_meta_len(r: &mut Reader<'_>) -> Result<u32, Malformed> {
    match r.u32()? {
        len if len as usize <= MAX_META => Ok(len),
        _ => Err(Malformed("no metadata is so long")),
    }
}

fn read_piece(r: &mut Reader<'_>) -> Result<Piece, Malformed> {
    match r.u32()? {
        n if n < PIECES_OF_A_CONTENT => Ok(Piece(n)),
        _ => Err(Malformed("no content has so many pieces")),
    }
}

/// Pieces fill the rest of their frame.
fn write_pieces(pieces: &[Piece], out: &mut Vec<u8>) {
    debug_assert!(pieces.len() <= MAX_PIECES, "a frame names too many pieces");
    pieces.iter().for_each(|piece| out.u32(piece.0));
}

fn read_pieces(r: &mut Reader<'_>) -> Result<Vec<Piece>, Malformed> {
    let count = r.rest().len().div_ceil(4);
    if count > MAX_PIECES {
        return Err(Malformed("a frame names too many pieces"));
    }
    r.many(count, 4, read_piece)
}

fn read_held(r: &mut Reader<'_>) -> Result<Bitfield, Malformed> {
    let pieces = r.u32()?;
    if pieces > PIECES_OF_A_CONTENT {
        return Err(Malformed("no content has so many pieces"));
    }
    Bitfield::from_bytes(r.take_rest(), pieces).ok_or(Malformed("not a bit for every piece"))
}

fn read_hosts(r: &mut Reader<'_>) -> Result<Vec<(PeerId, SocketAddr)>, Malformed> {
    let mut hosts = vec![];
    while !r.rest().is_empty() {
        if hosts.len() == MAX_HOSTS {
            return Err(Malformed("a frame names too many hosts"));
        }
        hosts.push((PeerId(r.array()?), r.address()?));
    }
    Ok(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::arbitrary::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn channel(opener: impl Strategy<Value = Side>) -> impl Strategy<Value = Channel> {
        (0..RECEIVERS, opener).prop_map(|(number, opener)| Channel { number, opener })
    }

    fn pieces() -> impl Strategy<Value = Vec<Piece>> {
        prop_oneof![4 => vec(piece(), 0..40), 1 => vec(piece(), MAX_PIECES)]
    }

    fn held() -> impl Strategy<Value = Bitfield> {
        (0u32..3_000, vec(any::<u32>(), 0..50)).prop_map(|(len, held)| {
            let mut field = Bitfield::none(len);
            held.iter().filter_map(|n| n.checked_rem(len)).for_each(|n| {
                field.insert(Piece(n));
            });
            field
        })
    }

    fn owned() -> impl Strategy<Value = Frame<'static>> {
        let us = || channel(Just(Side::Us));
        let them = || channel(Just(Side::Them));
        let either = || channel(prop_oneof![Just(Side::Us), Just(Side::Them)]);
        let meta_len = || 0..=MAX_META as u32;
        prop_oneof![
            (us(), content()).prop_map(|(c, id)| Frame::Open(c, id)),
            (them(), size(), meta_len(), meta_len()).prop_map(
                |(channel, size, manifest, proof)| Frame::Opened { channel, size, manifest, proof }
            ),
            us().prop_map(Frame::WantMeta),
            (either(), held()).prop_map(|(c, held)| Frame::Have(c, held)),
            (either(), pieces()).prop_map(|(c, pieces)| Frame::HaveMore(c, pieces)),
            (either(), pieces()).prop_map(|(c, pieces)| Frame::Lost(c, pieces)),
            (us(), pieces()).prop_map(|(c, pieces)| Frame::Want(c, pieces)),
            (us(), pieces()).prop_map(|(c, pieces)| Frame::Cancel(c, pieces)),
            (them(), pieces(), any::<u32>()).prop_map(|(c, pieces, ms)| Frame::Busy(c, pieces, ms)),
            (us(), piece()).prop_map(|(c, piece)| Frame::Reject(c, piece)),
            (them(), pieces()).prop_map(|(c, pieces)| Frame::Grant(c, pieces)),
            (them(), vec((peer(), address()), 0..=MAX_HOSTS))
                .prop_map(|(c, hosts)| Frame::Hosts(c, hosts)),
            either().prop_map(Frame::Close),
            Just(Frame::Ping),
        ]
    }

    /// Frames with what they borrow; the bytes they are written as.
    fn borrowing(with: impl Fn(Frame<'_>) -> Vec<u8> + 'static) -> impl Strategy<Value = Vec<u8>> {
        let bytes = vec(any::<u8>(), 1..=Certificate::MAX_BYTES);
        let goodbye = (proptest::sample::select(Goodbye::ALL), text(255));
        (0..4, channel(Just(Side::Them)), piece(), bytes, any::<u16>(), goodbye).prop_map(
            move |(which, channel, piece, bytes, port, (why, text))| {
                with(match which {
                    0 => Frame::Hello { certificate: &bytes, port },
                    1 => Frame::Meta(channel, &bytes),
                    2 => Frame::Piece(channel, piece, &bytes),
                    _ => Frame::Bye(why, &text),
                })
            },
        )
    }

    /// The frame's bytes; panics unless they read as the same frame with the sides exchanged.
    fn there_and_back(frame: Frame<'_>) -> Vec<u8> {
        let mut bytes = vec![9];
        frame.encode(&mut bytes);
        let mut r = Reader::new(&bytes[1..]);
        assert_eq!(r.u32().unwrap() as usize, r.rest().len());
        assert!(r.rest().len() <= MAX_FRAME);
        assert_eq!(Frame::decode(r.rest()), Ok(flipped(frame)));
        r.rest().to_vec()
    }

    /// The frame as its receiver sees it.
    fn flipped(mut frame: Frame<'_>) -> Frame<'_> {
        match &mut frame {
            Frame::Hello { .. } | Frame::Ping | Frame::Bye(..) => {}
            Frame::Opened { channel, .. }
            | Frame::Open(channel, _)
            | Frame::WantMeta(channel)
            | Frame::Meta(channel, _)
            | Frame::Have(channel, _)
            | Frame::HaveMore(channel, _)
            | Frame::Lost(channel, _)
            | Frame::Want(channel, _)
            | Frame::Piece(channel, ..)
            | Frame::Cancel(channel, _)
            | Frame::Busy(channel, ..)
            | Frame::Reject(channel, _)
            | Frame::Grant(channel, _)
            | Frame::Hosts(channel, _)
            | Frame::Close(channel) => *channel = channel.flipped(),
        }
        frame
    }

    proptest! {
        #[test]
        fn every_frame_is_read_as_it_was_written_with_the_sides_exchanged(
            frame in owned(), _bytes in borrowing(there_and_back),
        ) {
            there_and_back(frame);
        }

        #[test]
        fn bent_frames_are_refused_or_have_one_form(
            owned in bent(owned().prop_map(there_and_back)),
            borrowing in bent(borrowing(there_and_back)),
        ) {
            crate::wire::check::stream(&owned);
            crate::wire::check::stream(&borrowing);
        }
    }

    #[test]
    fn who_may_not_say_a_thing_is_not_understood() {
        let number = 3;
        for (opener, allowed) in [(Side::Us, true), (Side::Them, false)] {
            let channel = Channel { number, opener };
            let of_openers = [
                Frame::Open(channel, ContentId::file([1; 32])),
                Frame::WantMeta(channel),
                Frame::Want(channel, vec![Piece(1)]),
                Frame::Cancel(channel, vec![Piece(1)]),
                Frame::Reject(channel, Piece(1)),
            ];
            let of_hosts = [
                Frame::Opened { channel, size: 1, manifest: 0, proof: 0 },
                Frame::Meta(channel, b"x"),
                Frame::Piece(channel, Piece(1), b"x"),
                Frame::Busy(channel, vec![Piece(1)], 5),
                Frame::Grant(channel, vec![Piece(1)]),
                Frame::Hosts(channel, vec![]),
            ];
            let understood = |frame: &Frame<'_>| {
                let mut bytes = vec![];
                frame.encode(&mut bytes);
                Frame::decode(&bytes[4..]).is_ok()
            };
            assert!(of_openers.iter().all(|frame| understood(frame) == allowed));
            assert!(of_hosts.iter().all(|frame| understood(frame) != allowed));
        }
    }

    #[test]
    fn the_largest_piece_fits_a_frame_and_a_larger_one_is_refused() {
        let channel = Channel { number: 1, opener: Side::Them };
        let piece = vec![5; MAX_PIECE + 1];
        let mut bytes = vec![];
        Frame::Piece(channel, Piece(2), &piece[1..]).encode(&mut bytes);
        assert_eq!(bytes[..11], piece_head(channel, Piece(2), MAX_PIECE));
        assert!(
            matches!(Frame::decode(&bytes[4..]), Ok(Frame::Piece(_, Piece(2), p)) if p == &piece[1..])
        );
        bytes.push(5);
        assert!(Frame::decode(&bytes[4..]).is_err());
        assert!(Frame::decode(&bytes[4..11]).is_err(), "an empty piece");
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let frame = |kind: u8, body: &[&[u8]]| {
            Frame::decode(&[&[kind], &body.concat()[..]].concat()).is_ok()
        };
        let (ours, theirs): (&[u8], &[u8]) = (&[0x80, 1], &[0, 1]);
        assert!(frame(kind::WANT, &[theirs, &[0, 0, 0, 1]]));
        assert!(!frame(kind::WANT, &[theirs, &[0, 0, 0, 1, 0]]));
        assert!(!frame(kind::WANT, &[theirs, &PIECES_OF_A_CONTENT.to_be_bytes()]));
        assert!(frame(kind::WANT, &[theirs, &[0; 4 * MAX_PIECES]]));
        assert!(!frame(kind::WANT, &[theirs, &[0; 4 * MAX_PIECES + 4]]));
        assert!(frame(kind::HAVE, &[ours, &[0, 0, 0, 9], &[0xff, 0x80]]));
        assert!(!frame(kind::HAVE, &[ours, &[0, 0, 0, 9], &[0xff, 0xc0]]));
        assert!(!frame(kind::HAVE, &[ours, &[0xff, 0xff, 0xff, 0xff], &[0xff]]));
        assert!(frame(kind::META, &[ours, &[0; META_CHUNK]]));
        assert!(!frame(kind::META, &[ours, &[0; META_CHUNK + 1]]));
        assert!(frame(kind::HELLO, &[&[0, 1], &[0; Certificate::MAX_BYTES]]));
        assert!(!frame(kind::HELLO, &[&[0, 1], &[0; Certificate::MAX_BYTES + 1]]));
        let host: &[u8] = &[&[7; 32][..], &[4, 10, 0, 0, 1, 0, 80]].concat();
        assert!(frame(kind::HOSTS, &[ours, &host.repeat(MAX_HOSTS)]));
        assert!(!frame(kind::HOSTS, &[ours, &host.repeat(MAX_HOSTS + 1)]));
        let mapped: &[u8] = &"::ffff:10.0.0.1".parse::<std::net::Ipv6Addr>().unwrap().octets();
        assert!(!frame(kind::HOSTS, &[ours, &[7; 32], &[6], mapped, &[0, 80]]));
        assert!(!frame(kind::PING, &[&[0]]));
        assert!(!frame(kind::BYE, &[&[0, 99], &[0]]));
        assert!(!frame(0, &[]) && !frame(19, &[]));
        assert!(Frame::decode(&[]).is_err());
    }
}
