//! Owns the index's gate: opens datagrams that prove to be a member's, and drops all others without
//! a byte. Never has an effect: what it opened has to be heeded by the registrar, which knows what
//! was said before. Any number of gates may stand side by side, each in a thread of its own.
//!
//! Cheapest check first: head → member number → not passed over → epoch → keys (kept, or derived) →
//! AEAD → cookie.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::id::{MemberNumber, NetworkId};
use crate::seal::{CookieJar, EpochSecret, ReplyHead, RequestHead, open, seal_in_place};
use crate::time::Moment;
use crate::wire::datagram::TAG_BYTES;

use super::{Dropped, Registrar};

/// Sessions whose keys a gate keeps, a power of two. Members are numbered from 1, so this many
/// members with one session each do not displace each other's. One cache line each.
const KEPT: usize = 1 << 14;
/// An outbox that once held more than this gives the memory back.
const OUTBOX_KEEPS: usize = 1 << 20;

/// The way back to a member: where it asked from, and the session it asked in.
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub(super) from: SocketAddr,
    pub(super) member: MemberNumber,
    pub(super) epoch: u16,
    pub(super) salt: u64,
    pub(super) reply_key: [u8; 16],
}

/// A datagram that is a member's own.
pub struct Opened<'a> {
    pub(super) line: Line,
    /// What it asks, by PDU letter.
    pub(super) kind: u8,
    /// Its number in its session.
    pub(super) counter: u64,
    /// Its cookie proves that its sender receives at the address it came from.
    pub(super) proven: bool,
    /// Bytes it had in all.
    pub(super) length: usize,
    pub(super) plaintext: &'a [u8],
}

/// The keys of one session, in a cache line of their own.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Keys {
    member: u32,
    epoch: u16,
    salt: u64,
    to_index: [u8; 16],
    reply: [u8; 16],
    /// Its member is passed over until then, whatever the session: it asks too fast.
    shut: Moment,
}

/// Opens datagrams, for a registrar that has to brief it (see [`Registrar::brief`]).
pub struct Gate {
    network: NetworkId,
    boot: u64,
    jar: CookieJar,
    /// Which of the registrar's news it knows.
    pub(super) news: u64,
    pub(super) epochs: Vec<(u16, EpochSecret)>,
    /// Members' numbers are below this.
    pub(super) members: u32,
    /// By member number. Only what proved authentic gets in, so strangers displace nothing.
    keys: Box<[Keys]>,
    pub(super) dropped: BTreeMap<Dropped, u64>,
}

impl Gate {
    pub(super) fn new(network: NetworkId, boot: u64, jar: CookieJar) -> Self {
        Self {
            network,
            boot,
            jar,
            news: 0,
            epochs: vec![],
            members: 0,
            keys: vec![Keys::default(); KEPT].into(),
            dropped: BTreeMap::new(),
        }
    }

    /// Which of the registrar's news it was briefed of: where [`Registrar::news`] differs, it has to be again.
    pub const fn news(&self) -> u64 {
        self.news
    }

    /// Whether it has dropped some that the registrar has not counted yet.
    pub fn has_dropped(&self) -> bool {
        !self.dropped.is_empty()
    }

    /// Opens a datagram in place; `None` where it is dropped, and counted.
    pub fn open<'a>(
        &mut self,
        now: Moment,
        from: SocketAddr,
        datagram: &'a mut [u8],
    ) -> Option<Opened<'a>> {
        match self.admit(now, from, datagram) {
            Ok(opened) => Some(opened),
            Err(dropped) => {
                *self.dropped.entry(dropped).or_default() += 1;
                None
            }
        }
    }

    fn admit<'a>(
        &mut self,
        now: Moment,
        from: SocketAddr,
        datagram: &'a mut [u8],
    ) -> Result<Opened<'a>, Dropped> {
        let length = datagram.len();
        let head = RequestHead::decode(datagram).map_err(|_| Dropped::Malformed)?;
        let RequestHead { kind, epoch, member, salt, counter, cookie } = head;
        if !(1..self.members).contains(&member.0) {
            return Err(Dropped::UnknownMember);
        }
        let at = member.0 as usize % KEPT;
        let kept = self.keys[at];
        if kept.member == member.0 && now < kept.shut {
            return Err(Dropped::TooFast);
        }
        let (_, secret) = self.epochs.iter().find(|e| e.0 == epoch).ok_or(Dropped::UnknownEpoch)?;
        let known = (kept.member, kept.epoch, kept.salt) == (member.0, epoch, salt);
        let (plaintext, reply_key) = if known {
            (open(&kept.to_index, counter, datagram).ok_or(Dropped::Forged)?, kept.reply)
        } else {
            let session = secret.session(self.network, member, salt);
            let plaintext = open(&session.to_index, counter, datagram).ok_or(Dropped::Forged)?;
            let reply = session.reply_key(self.boot);
            let to_index = session.to_index;
            let shut = Moment::ZERO;
            self.keys[at] = Keys { member: member.0, epoch, salt, to_index, reply, shut };
            (plaintext, reply)
        };
        let proven = self.jar.accepts(now, from, member, &cookie);
        let line = Line { from, member, epoch, salt, reply_key };
        Ok(Opened { line, kind, counter, proven, length, plaintext })
    }
}

impl Registrar {
    /// A gate of this index.
    pub fn gate(&self) -> Gate {
        let mut gate = Gate::new(self.network, self.boot, self.jar.clone());
        self.tell(&mut gate);
        gate
    }

    /// Changes whenever gates have to be briefed anew.
    pub const fn news(&self) -> u64 {
        self.news
    }

    /// Tells a gate what has changed, and takes over what it counted. To be done after each batch of
    /// its own: then it knows as well who is to be passed over.
    pub fn brief(&mut self, gate: &mut Gate) {
        for (member, until) in self.too_fast.drain(..) {
            let kept = &mut gate.keys[member.0 as usize % KEPT];
            if kept.member == member.0 {
                kept.shut = until;
            }
        }
        for (why, count) in std::mem::take(&mut gate.dropped) {
            *self.stats.dropped.entry(why).or_default() += count;
        }
        if gate.news != self.news {
            self.tell(gate);
        }
    }

    fn tell(&self, gate: &mut Gate) {
        gate.news = self.news;
        gate.epochs = self.epochs.secrets();
        gate.members = self.roster.numbers();
    }
}

/// Replies and notices, in the order they were thought of, in one piece of memory that is used again
/// and again. They are sealed by who sends them: that takes longer than to think of them.
#[derive(Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    letters: Vec<Letter>,
    sealed: bool,
}

#[derive(Clone, Copy)]
struct Letter {
    to: SocketAddr,
    key: [u8; 16],
    nonce: u64,
    /// Where in `bytes` it ends; it begins where the one before ends.
    end: usize,
}

impl Outbox {
    /// Appends a letter whose plaintext is what `write` appends.
    pub(super) fn push(&mut self, line: &Line, head: &ReplyHead, write: impl FnOnce(&mut Vec<u8>)) {
        head.encode(&mut self.bytes);
        write(&mut self.bytes);
        self.bytes.extend_from_slice(&[0; TAG_BYTES]);
        let end = self.bytes.len();
        self.letters.push(Letter { to: line.from, key: line.reply_key, nonce: head.counter, end });
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.letters.is_empty()
    }

    /// How many letters are in it …
    pub const fn len(&self) -> usize {
        self.letters.len()
    }

    /// … and how many bytes they have.
    pub const fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Seals all that is in it.
    pub fn seal(&mut self) {
        debug_assert!(!self.sealed, "letters are sealed once");
        let mut rest = &mut self.bytes[..];
        let mut start = 0;
        for letter in &self.letters {
            let (datagram, behind) = rest.split_at_mut(letter.end - start);
            seal_in_place(&letter.key, letter.nonce, datagram);
            (rest, start) = (behind, letter.end);
        }
        self.sealed = true;
    }

    /// The datagrams, once they are sealed, and where they go.
    pub fn datagrams(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        debug_assert!(self.sealed || self.is_empty(), "nothing leaves unsealed");
        let mut start = 0;
        self.letters.iter().map(move |letter| {
            let datagram = &self.bytes[start..letter.end];
            start = letter.end;
            (letter.to, datagram)
        })
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.letters.clear();
        self.sealed = false;
        if self.bytes.capacity() > OUTBOX_KEEPS {
            *self = Self::default();
        }
    }
}
