//! Owns the way from a stream of bytes, cut anywhere, to frames and whole pieces. Never knows which
//! pieces were asked for: it asks its [`Listener`] before it takes one in.

use potluck_core::id::Piece;
use potluck_core::layout::MAX_PIECES;
use potluck_core::wire::stream::{Channel, Frame, MAX_FRAME, PIECE_HEAD, Side, piece_head};

use super::Gone;
use super::incoming::Incoming;

/// The longest frame but a piece: `Have` with a bit for each of the most pieces a content has.
const MAX_OTHER: usize = 7 + MAX_PIECES as usize / 8;
/// A frame's length and type, which tell a piece from all others.
const TYPE_END: usize = 5;
/// The same of a piece, and all that is said of it before its bytes.
const HEAD: usize = 4 + PIECE_HEAD;

/// What is done with what was gathered.
pub(super) trait Listener {
    /// A frame that is no piece.
    fn on_frame(&mut self, frame: Frame<'_>) -> Result<(), Gone>;
    /// A piece of so many bytes begins. `false`: it is of no use, let it pass by.
    fn on_piece_head(&mut self, channel: u16, piece: Piece, len: usize) -> Result<bool, Gone>;
    /// The same piece, whole, in the parts it came in.
    fn on_piece(&mut self, channel: u16, piece: Piece, parts: &[&[u8]]) -> Result<(), Gone>;
    /// A piece that was let pass by is over.
    fn on_passed(&mut self, channel: u16, piece: Piece, len: usize) -> Result<(), Gone>;
}

/// Gathers frames. Pieces stay where they came in until they are whole.
pub(super) struct Gather {
    stage: Stage,
    /// The first bytes of the frame at hand.
    head: [u8; HEAD],
    /// Its bytes, if it is no piece. Grows with what arrives, not with what was announced.
    frame: Vec<u8>,
}

#[derive(Clone, Copy)]
enum Stage {
    /// So many bytes of the head are here.
    Head(usize),
    /// Another frame, so long.
    Other(usize),
    /// A piece, so long.
    Piece { channel: u16, piece: Piece, len: usize },
    /// A piece of no use, of which so many bytes have passed by.
    Passing { channel: u16, piece: Piece, len: usize, passed: usize },
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

    /// How many bytes the piece at hand has in all.
    pub(super) const fn piece(&self) -> Option<usize> {
        match self.stage {
            Stage::Piece { len, .. } => Some(len),
            Stage::Head(_) | Stage::Other(_) | Stage::Passing { .. } => None,
        }
    }

    /// Gives back memory that is not in use.
    pub(super) fn rest(&mut self) {
        self.frame.shrink_to_fit();
    }

    /// Takes what is here of the stream, but for a piece that is not whole.
    pub(super) fn take(
        &mut self,
        stream: &mut Incoming,
        listener: &mut impl Listener,
    ) -> Result<(), Gone> {
        while !stream.is_empty() {
            match self.stage {
                Stage::Head(have) => self.take_head(have, stream, listener)?,
                Stage::Other(len) => {
                    let missing = len - self.frame.len();
                    stream.copy_to(&mut self.frame, missing);
                    if self.frame.len() == len {
                        listener.on_frame(decode(&self.frame)?)?;
                        self.next_frame();
                    }
                }
                Stage::Piece { len, .. } if stream.len() < len => return Ok(()),
                Stage::Piece { channel, piece, len } => {
                    listener.on_piece(channel, piece, &stream.front(len))?;
                    stream.advance(len);
                    self.next_frame();
                }
                Stage::Passing { channel, piece, len, passed } => {
                    let n = stream.len().min(len - passed);
                    stream.advance(n);
                    self.stage = Stage::Passing { channel, piece, len, passed: passed + n };
                    if passed + n == len {
                        self.next_frame();
                        listener.on_passed(channel, piece, len)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Gathers the head; once enough of it is here, knows what frame it is.
    fn take_head(
        &mut self,
        have: usize,
        stream: &mut Incoming,
        listener: &mut impl Listener,
    ) -> Result<(), Gone> {
        // First the length and the type; of a piece, the whole head as well.
        let is_piece = have >= TYPE_END && self.head[TYPE_END - 1] == piece_kind();
        let need = if is_piece { HEAD } else { TYPE_END };
        let have = have + stream.copy(&mut self.head[have..need]);
        self.stage = Stage::Head(have);
        if have < need {
            return Ok(());
        }
        let len = u32::from_be_bytes([self.head[0], self.head[1], self.head[2], self.head[3]]);
        let len = len as usize;
        if len == 0 {
            return Err(Gone::Protocol("a frame is empty"));
        }
        if self.head[TYPE_END - 1] != piece_kind() {
            if len > MAX_OTHER {
                return Err(Gone::Protocol("a frame is too long"));
            }
            self.stage = Stage::Other(len);
            self.frame.push(self.head[TYPE_END - 1]);
            if len == 1 {
                listener.on_frame(decode(&self.frame)?)?;
                self.next_frame();
            }
            return Ok(());
        }
        if len > MAX_FRAME || len <= PIECE_HEAD {
            return Err(Gone::Protocol("a piece is too long or too short"));
        }
        match have {
            HEAD => self.begin_piece(len - PIECE_HEAD, listener),
            _ => Ok(()),
        }
    }

    fn begin_piece(&mut self, len: usize, listener: &mut impl Listener) -> Result<(), Gone> {
        // The head with any byte behind it is a whole piece frame.
        let mut least = [0; HEAD + 1];
        least[..HEAD].copy_from_slice(&self.head);
        let Frame::Piece(channel, piece, _) = decode(&least[4..])? else {
            return Err(Gone::Protocol("a piece is no piece"));
        };
        let channel = channel.number;
        self.stage = match listener.on_piece_head(channel, piece, len)? {
            true => Stage::Piece { channel, piece, len },
            false => Stage::Passing { channel, piece, len, passed: 0 },
        };
        Ok(())
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
    use crate::transfer::incoming::opened;
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
        fn on_piece(&mut self, _: u16, _: Piece, parts: &[&[u8]]) -> Result<(), Gone> {
            self.0.push(format!("{:?}", parts.concat()));
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
            Gather::new().take(&mut opened(&stream), &mut at_once).unwrap();
            let (mut gather, mut rest) = (Gather::new(), &stream[..]);
            let mut incoming = opened(b"");
            for cut in cuts {
                let (part, more) = rest.split_at(cut.min(rest.len()));
                incoming.put(part);
                gather.take(&mut incoming, &mut in_parts).unwrap();
                rest = more;
            }
            incoming.put(rest);
            gather.take(&mut incoming, &mut in_parts).unwrap();
            prop_assert!(incoming.is_empty());
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
            let _ = gather.take(&mut opened(&stream), &mut Notes::default());
            prop_assert!(gather.frame.capacity() <= 1_024);
            let _ = Gather::new().take(&mut opened(&bytes), &mut Notes::default());
        }
    }
}
