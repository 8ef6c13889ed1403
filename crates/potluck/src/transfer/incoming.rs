//! Owns the bytes that came in on a connection, from the socket until they are of use: records are
//! opened where they lie, and what they carry stays there until all of a piece is here, so that none
//! of it is copied. Never knows what the bytes mean.

use std::collections::VecDeque;
use std::ops::Range;

use super::Gone;
use super::records::{EXTRA, HEAD, MOST, record_len};

/// What a record of fewer bytes carries is moved together with what came before it, so that many
/// small ones make no long list.
const SMALL: usize = 4 << 10;

/// A buffer: opened bytes first, then such as are to be opened, then room.
pub(super) struct Incoming {
    bytes: Box<[u8]>,
    /// What was opened and not taken yet, in the order of the stream.
    plain: VecDeque<Range<usize>>,
    /// How many bytes that is.
    len: usize,
    /// What was not opened yet.
    sealed: Range<usize>,
}

impl Incoming {
    pub(super) fn new(size: usize) -> Self {
        Self { bytes: vec![0; size].into(), plain: VecDeque::new(), len: 0, sealed: 0..0 }
    }

    /// How many opened bytes there are.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Room for so many bytes more from the socket, at the least.
    pub(super) fn make_room(&mut self, room: usize) {
        if self.bytes.len() - self.sealed.end >= room {
            return;
        }
        let size = self.len + self.sealed.len() + room;
        if size > self.bytes.len() {
            let mut larger = Self::new(size);
            for run in &self.plain {
                larger.bytes[larger.len..larger.len + run.len()]
                    .copy_from_slice(&self.bytes[run.clone()]);
                larger.len += run.len();
            }
            let sealed = &self.bytes[self.sealed.clone()];
            larger.sealed = larger.len..larger.len + sealed.len();
            larger.bytes[larger.sealed.clone()].copy_from_slice(sealed);
            larger.plain.extend((larger.len > 0).then_some(0..larger.len));
            *self = larger;
        } else {
            let mut end = 0;
            for run in self.plain.drain(..) {
                let len = run.len();
                self.bytes.copy_within(run, end);
                end += len;
            }
            self.plain.extend((end > 0).then_some(0..end));
            let len = self.sealed.len();
            self.bytes.copy_within(self.sealed.clone(), end);
            self.sealed = end..end + len;
        }
    }

    /// Gives back what the buffer has beyond `size`, where nothing lies in it.
    pub(super) fn rest(&mut self, size: usize) {
        if self.is_empty() && self.sealed.is_empty() && self.bytes.len() > size {
            *self = Self::new(size);
        }
    }

    /// Where the socket's next bytes go; then say [`Incoming::arrived`].
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.sealed.end..]
    }

    /// So many bytes came.
    pub(super) const fn arrived(&mut self, n: usize) {
        self.sealed.end += n;
    }

    /// All that was not opened yet.
    pub(super) fn sealed(&mut self) -> &mut [u8] {
        &mut self.bytes[self.sealed.clone()]
    }

    /// The next record, if all of it is here; then say [`Incoming::opened`].
    pub(super) fn record(&mut self) -> Result<Option<&mut [u8]>, Gone> {
        let sealed = &mut self.bytes[self.sealed.clone()];
        Ok(record_len(sealed)?.and_then(|len| sealed.get_mut(..len)))
    }

    /// A record of `len` bytes is done with; it carried so many, behind its head.
    pub(super) fn opened(&mut self, len: usize, carried: usize) {
        let carries = self.sealed.start + HEAD..self.sealed.start + HEAD + carried;
        self.discard(len);
        self.len += carried;
        match self.plain.back_mut() {
            _ if carried == 0 => {}
            Some(last) if carried < SMALL => {
                self.bytes.copy_within(carries, last.end);
                last.end += carried;
            }
            _ => self.plain.push_back(carries),
        }
        if self.plain.is_empty() && self.sealed.is_empty() {
            self.sealed = 0..0;
        }
    }

    /// So many bytes that were not opened are done with, without anything to take.
    pub(super) const fn discard(&mut self, n: usize) {
        self.sealed.start += n;
    }

    /// Bytes that were opened elsewhere, out of as many or more that were discarded.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        let begin = self.plain.back().map_or(0, |last| last.end);
        let end = begin + bytes.len();
        debug_assert!(end <= self.sealed.start, "more was opened than discarded");
        self.bytes[begin..end].copy_from_slice(bytes);
        self.len += bytes.len();
        match self.plain.back_mut() {
            Some(last) => last.end = end,
            None => self.plain.push_back(begin..end),
        }
    }

    /// The first `n` opened bytes, in the parts they lie in. There are as many.
    pub(super) fn front(&self, n: usize) -> Vec<&[u8]> {
        let mut parts = Vec::with_capacity(n / MOST + 2);
        let mut left = n;
        for run in &self.plain {
            if left == 0 {
                break;
            }
            let part = &self.bytes[run.start..run.end.min(run.start + left)];
            left -= part.len();
            parts.push(part);
        }
        debug_assert!(left == 0, "more was taken than is here");
        parts
    }

    /// The first `n` opened bytes were taken.
    pub(super) fn advance(&mut self, n: usize) {
        let mut left = n.min(self.len);
        self.len -= left;
        while let Some(run) = self.plain.front_mut() {
            let of_run = left.min(run.len());
            run.start += of_run;
            left -= of_run;
            if run.start < run.end {
                break;
            }
            self.plain.pop_front();
        }
        if self.plain.is_empty() && self.sealed.is_empty() {
            self.sealed = 0..0; // nothing has to be moved to make room
        }
    }

    /// Takes up to `into.len()` bytes; how many.
    pub(super) fn copy(&mut self, into: &mut [u8]) -> usize {
        let n = into.len().min(self.len);
        let mut at = 0;
        for part in self.front(n) {
            into[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        self.advance(n);
        n
    }

    /// Takes up to `n` bytes to the end of `into`.
    pub(super) fn copy_to(&mut self, into: &mut Vec<u8>, n: usize) {
        let n = n.min(self.len);
        self.front(n).into_iter().for_each(|part| into.extend_from_slice(part));
        self.advance(n);
    }
}

/// How many bytes of the socket carry `plain` bytes, in full records.
pub(super) const fn carrying(plain: usize) -> usize {
    plain + (plain / MOST + 2) * EXTRA
}

/// A stream of which these bytes have come and were opened.
#[cfg(any(test, fuzzing))]
pub(super) fn opened(bytes: &[u8]) -> Incoming {
    let mut incoming = Incoming::new(0);
    incoming.put(bytes);
    incoming
}

#[cfg(any(test, fuzzing))]
impl Incoming {
    /// More has come and was opened.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.make_room(bytes.len());
        self.arrived(bytes.len());
        self.discard(bytes.len());
        self.append(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// A "record" as sealed as it needs to be here: its head, what it carries, and the rest.
    fn record(carries: &[u8]) -> Vec<u8> {
        let follows = (carries.len() + EXTRA - HEAD) as u16;
        let mut record = vec![23, 3, 3];
        record.extend(follows.to_be_bytes());
        record.extend_from_slice(carries);
        record.extend([0xee; EXTRA - HEAD]);
        record
    }

    proptest! {
        #[test]
        fn what_comes_out_is_what_went_in_however_it_was_cut(
            sizes in vec(prop_oneof![0usize..40, 3_000..5_000usize, Just(MOST)], 1..30),
            reads in vec(1usize..30_000, 1..60),
            takes in vec(prop_oneof![1usize..100, 1..60_000usize], 1..60),
        ) {
            let plain: Vec<u8> = (0..sizes.iter().sum()).map(|n: usize| (n / 3) as u8).collect();
            let (mut stream, mut rest) = (vec![], &plain[..]);
            for size in &sizes {
                let (carries, more) = rest.split_at(*size);
                stream.extend(record(carries));
                rest = more;
            }
            let mut incoming = Incoming::new(100);
            let (mut got, mut stream) = (vec![], &stream[..]);
            let mut turns = reads.iter().cycle().zip(takes.iter().cycle());
            while got.len() < plain.len() {
                let (read, take) = turns.next().unwrap();
                incoming.make_room(*read);
                let n = stream.len().min(*read);
                incoming.room()[..n].copy_from_slice(&stream[..n]);
                incoming.arrived(n);
                stream = &stream[n..];
                while let Some(record) = incoming.record().unwrap() {
                    let len = record.len();
                    incoming.opened(len, len - EXTRA);
                }
                prop_assert!(incoming.plain.len() <= incoming.len() / SMALL + 1);
                let n = incoming.len().min(*take);
                if n % 2 == 0 {
                    incoming.copy_to(&mut got, n);
                } else {
                    let part = &mut vec![0; n][..];
                    prop_assert_eq!(incoming.copy(part), n);
                    got.extend_from_slice(part);
                }
            }
            prop_assert_eq!(got, plain);
        }
    }
}
