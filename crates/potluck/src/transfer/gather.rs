//! Owns the way from a stream of bytes, cut anywhere, to frames and whole pieces. Never knows which
//! pieces were asked for: it asks its [`Listener`] before it takes one in.

use potluck_core::id::Piece;
use potluck_core::layout::MAX_PIECES;
use potluck_core::wire::stream::{Channel, Frame, MAX_FRAME, PIECE_HEAD, Side, piece_head};

use super::Gone;

/// The longest frame but a piece: `Have` with a bit for each of the most pieces a content has.
const MAX_OTHER: usize = 7 + MAX_PIECES as usize / 8;
/// A frame's length and as much of it as tells a piece from all others: the head and one byte.
const HEAD: usize = 4 + PIECE_HEAD + 1;

/// What is done with what was gathered.
pub(super) trait Listener {
    /// A frame that is no piece.
    fn on_frame(&mut self, frame: Frame<'_>) -> Result<(), Gone>;
    /// A piece of so many bytes begins. `false`: it is of no use, let it pass by.
    fn on_piece_head(&mut self, channel: u16, piece: Piece, len: usize) -> Result<bool, Gone>;
    /// The same piece, whole.
    fn on_piece(&mut self, channel: u16, piece: Piece, bytes: &[u8]) -> Result<(), Gone>;
    /// A piece that was let pass by is over.
    fn on_passed(&mut self, channel: u16, piece: Piece, len: usize) -> Result<(), Gone>;
}

/// Gathers frames.
pub(super) struct Gather {
    stage: Stage,
    /// The first bytes of the frame at hand.
    head: [u8; HEAD],
    /// Its bytes, where they came in parts. Grows with what arrives, not with what was announced.
    frame: Vec<u8>,
}

#[derive(Clone, Copy)]
enum Stage {
    /// So many bytes of the head are here.
    Head(usize),
    /// Another frame, so long.
    Other(usize),
    /// A piece, so long.
    Piece { channel: u16, piece: Piece, len: usize, wanted: Wanted },
}

#[derive(Clone, Copy)]
enum Wanted {
    Yes,
    /// So many of its bytes have passed by.
    No(usize),
}

impl Gather {
    /// At the beginning of a stream.
    pub(super) fn new() -> Self {
        Self { stage: Stage::Head(0), head: [0; HEAD], frame: vec![] }
    }

    /// Whether the stream stands within a frame.
    pub(super) const fn is_amid(&self) -> bool {
        !matches!(self.stage, Stage::Head(0))
    }

    /// Gives back memory that is not in use.
    pub(super) fn rest(&mut self) {
        self.frame.shrink_to_fit();
    }

    /// Takes the next bytes of the stream.
    pub(super) fn take(
        &mut self,
        mut bytes: &[u8],
        listener: &mut impl Listener,
    ) -> Result<(), Gone> {
        while !bytes.is_empty() {
            bytes = match self.stage {
                Stage::Head(have) => self.take_head(have, bytes, listener)?,
                Stage::Other(len) => {
                    let rest = self.fill(len, bytes);
                    if self.frame.len() == len {
                        listener.on_frame(decode(&self.frame)?)?;
                        self.next_frame();
                    }
                    rest
                }
                Stage::Piece { channel, piece, len, wanted: Wanted::Yes } => {
                    let rest = self.fill(len, bytes);
                    if self.frame.len() == len {
                        listener.on_piece(channel, piece, &self.frame)?;
                        self.next_frame();
                    }
                    rest
                }
                Stage::Piece { channel, piece, len, wanted: Wanted::No(passed) } => {
                    let n = bytes.len().min(len - passed);
                    self.pass(channel, piece, len, passed + n, listener)?;
                    &bytes[n..]
                }
            };
        }
        Ok(())
    }

    /// Gathers the head; once enough of it is here, knows what frame it is.
    fn take_head<'a>(
        &mut self,
        have: usize,
        bytes: &'a [u8],
        listener: &mut impl Listener,
    ) -> Result<&'a [u8], Gone> {
        // First the length and the type; of a piece, its head and one byte as well.
        let need = if have < 5 || self.head[4] != piece_kind() { 5 } else { HEAD };
        let n = bytes.len().min(need - have);
        self.head[have..have + n].copy_from_slice(&bytes[..n]);
        let (have, rest) = (have + n, &bytes[n..]);
        self.stage = Stage::Head(have);
        if have < need {
            return Ok(rest);
        }
        let len = u32::from_be_bytes([self.head[0], self.head[1], self.head[2], self.head[3]]);
        let len = len as usize;
        if len == 0 {
            return Err(Gone::Protocol("a frame is empty"));
        }
        if self.head[4] != piece_kind() {
            if len > MAX_OTHER {
                return Err(Gone::Protocol("a frame is too long"));
            }
            self.stage = Stage::Other(len);
            self.frame.push(self.head[4]);
            if len == 1 {
                listener.on_frame(decode(&self.frame)?)?;
                self.next_frame();
            }
            return Ok(rest);
        }
        if len > MAX_FRAME || len <= PIECE_HEAD {
            return Err(Gone::Protocol("a piece is too long or too short"));
        }
        if have == HEAD {
            self.begin_piece(len - PIECE_HEAD, listener)?;
        }
        Ok(rest)
    }

    fn begin_piece(&mut self, len: usize, listener: &mut impl Listener) -> Result<(), Gone> {
        // The head and one byte are a whole piece frame of one byte.
        let Frame::Piece(channel, piece, first) = decode(&self.head[4..])? else {
            return Err(Gone::Protocol("a piece is no piece"));
        };
        let (channel, first) = (channel.number, first[0]);
        if listener.on_piece_head(channel, piece, len)? {
            self.stage = Stage::Piece { channel, piece, len, wanted: Wanted::Yes };
            self.frame.reserve_exact(len);
            self.frame.push(first);
            if len == 1 {
                listener.on_piece(channel, piece, &self.frame)?;
                self.next_frame();
            }
            Ok(())
        } else {
            self.pass(channel, piece, len, 1, listener)
        }
    }

    fn pass(
        &mut self,
        channel: u16,
        piece: Piece,
        len: usize,
        passed: usize,
        listener: &mut impl Listener,
    ) -> Result<(), Gone> {
        self.stage = Stage::Piece { channel, piece, len, wanted: Wanted::No(passed) };
        if passed == len {
            self.next_frame();
            listener.on_passed(channel, piece, len)?;
        }
        Ok(())
    }

    /// Adds to the frame up to `len` bytes; what is left of `bytes`.
    fn fill<'a>(&mut self, len: usize, bytes: &'a [u8]) -> &'a [u8] {
        let n = bytes.len().min(len - self.frame.len());
        self.frame.extend_from_slice(&bytes[..n]);
        &bytes[n..]
    }

    fn next_frame(&mut self) {
        self.stage = Stage::Head(0);
        self.frame.clear();
    }
}

fn decode(frame: &[u8]) -> Result<Frame<'_>, Gone> {
    Frame::decode(frame).map_err(|malformed| Gone::Protocol(malformed.0))
}

/// The type byte of a piece.
fn piece_kind() -> u8 {
    piece_head(Channel { number: 0, opener: Side::Us }, Piece(0), 1)[4]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Writes down what it is told; lets pieces of odd channels pass by.
    #[derive(Default, Debug, PartialEq, Eq)]
    struct Notes(Vec<String>);

    impl Listener for Notes {
        fn on_frame(&mut self, frame: Frame<'_>) -> Result<(), Gone> {
            self.0.push(format!("{frame:?}"));
            Ok(())
        }
        fn on_piece_head(&mut self, channel: u16, piece: Piece, len: usize) -> Result<bool, Gone> {
            self.0.push(format!("{channel} {piece:?} of {len}"));
            Ok(channel.is_multiple_of(2))
        }
        fn on_piece(&mut self, _: u16, _: Piece, bytes: &[u8]) -> Result<(), Gone> {
            self.0.push(format!("{bytes:?}"));
            Ok(())
        }
        fn on_passed(&mut self, channel: u16, _: Piece, len: usize) -> Result<(), Gone> {
            self.0.push(format!("{channel} passed {len}"));
            Ok(())
        }
    }

    fn frames() -> Vec<u8> {
        let theirs = |number| Channel { number, opener: Side::Them };
        let frames = [
            Frame::Ping,
            Frame::Piece(theirs(2), Piece(7), b"whole"),
            Frame::Piece(theirs(3), Piece(8), b"passes by"),
            Frame::Piece(theirs(4), Piece(9), b"x"),
            Frame::Piece(theirs(5), Piece(9), b"y"),
            Frame::Lost(theirs(1), vec![Piece(1), Piece(2)]),
            Frame::Close(theirs(1)),
            Frame::Ping,
        ];
        let mut bytes = vec![];
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        bytes
    }

    proptest! {
        #[test]
        fn frames_are_the_same_wherever_the_stream_is_cut(cuts in vec(1usize..20, 0..60)) {
            let stream = frames();
            let (mut at_once, mut in_parts) = (Notes::default(), Notes::default());
            Gather::new().take(&stream, &mut at_once).unwrap();
            let (mut gather, mut rest) = (Gather::new(), &stream[..]);
            for cut in cuts {
                let (part, more) = rest.split_at(cut.min(rest.len()));
                gather.take(part, &mut in_parts).unwrap();
                rest = more;
            }
            gather.take(rest, &mut in_parts).unwrap();
            prop_assert!(!gather.is_amid());
            prop_assert_eq!(at_once.0.len(), 12);
            prop_assert_eq!(at_once, in_parts);
        }

        #[test]
        fn any_bytes_are_frames_or_refused_and_take_no_more_memory_than_they_are(
            bytes in vec(any::<u8>(), 0..200),
            announced in any::<u32>(),
            kind in 0u8..20,
        ) {
            let mut gather = Gather::new();
            let stream = [&announced.to_be_bytes()[..], &[kind], &bytes].concat();
            let _ = gather.take(&stream, &mut Notes::default());
            // (A piece's length is checked by its listener before room is made for it.)
            prop_assert!(kind == piece_kind() || gather.frame.capacity() <= 1_024);
            let _ = Gather::new().take(&bytes, &mut Notes::default());
        }
    }
}
