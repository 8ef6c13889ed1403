//! Owns what two peers have open with each other: channels, the pieces asked for on them, and what
//! may be said by whom and when. Never touches the socket; never decides what to fetch or serve.
//!
//! A channel's number is free again once both sides have said Close: what was under way when the
//! first of the two said it belongs to nothing and is passed over.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{PeerId, Piece};
use potluck_core::time::Moment;
use potluck_core::trust::{Certificate, Distrust};
use potluck_core::wire::stream::{
    Channel, Frame, Goodbye, MAX_CHANNELS, MAX_HOSTS, MAX_META, MAX_PIECES, Side, piece_head,
};

use super::gather::Listener;
use super::limiter::Turn;
use super::outbox::{Outbox, Sent};
use super::secure::Secure;
use super::{
    Command, ConnId, Connection, Context, Event, Gone, Identity, MAX_ESTABLISHED, Mailbox,
};
use crate::clock;
use crate::store::{PutError, Replica};
use crate::timing::{self, Work};

/// Pieces the other side may have asked for and not been answered, on one channel.
const MAX_WANTS: usize = 4_096;
/// Pieces the other side may reject on one connection: each costs us a look at the disk.
const MAX_REJECTS: u32 = 64;
/// Reports that wait to be handed over together.
const MAX_REPORTS: usize = 64;

/// How the first [`Event::Up`] gets its handle; `None`: nobody wants it any more.
pub(super) type GetHandle = Box<dyn FnOnce() -> Option<Connection> + Send>;

/// An established connection, or one about to be.
pub(super) struct Session {
    ctx: Arc<Context>,
    conn: ConnId,
    mailbox: Arc<Mailbox>,
    address: std::net::SocketAddr,
    dialled: bool,
    handle: Option<GetHandle>,
    /// The key the other side proved to hold, once TLS is up.
    key: Option<PeerId>,
    /// The certificate this machine showed.
    shown: Option<Certificate>,
    /// The other side's, believed: the connection is up.
    member: Option<Certificate>,
    /// Taken when the engine is told that the connection is up.
    seat: Option<Seat>,
    ours: BTreeMap<u16, Ours>,
    theirs: BTreeMap<u16, Theirs>,
    rejects: u32,
    /// A piece it sent was bad. The engine ends the connection; until then nothing more is looked at.
    poisons: bool,
    /// What the engine is still to be told.
    reports: Vec<Event>,
    pub(super) outbox: Outbox,
    /// What is said last, if we were told.
    pub(super) goodbye: Option<(Goodbye, String)>,
}

/// A channel we opened: we fetch.
#[derive(Default)]
struct Ours {
    stage: Stage,
    replica: Option<Arc<Replica>>,
    /// How many pieces the content has, as far as anybody said.
    pieces: Option<u32>,
    asked: HashMap<Piece, Asked>,
    meta: MetaIn,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// Open was said and not answered.
    #[default]
    Asked,
    Open,
    /// Close was said and not answered.
    Closing,
}

/// A piece that may arrive.
#[derive(Clone, Copy, Default)]
struct Asked {
    /// How often it was asked for without an answer: asked for, cancelled and asked for again, it may
    /// come twice.
    copies: u32,
    /// When it was asked for last; `None`: it is no longer wanted.
    since: Option<Moment>,
}

/// Metadata on its way in: the manifest, then the proof.
#[derive(Default)]
struct MetaIn {
    manifest: usize,
    proof: usize,
    asked: bool,
    /// Since when more of it is due.
    since: Option<Moment>,
    bytes: Vec<u8>,
}

/// A channel the other side opened: we host.
#[derive(Default)]
struct Theirs {
    stage: Stage,
    replica: Option<Arc<Replica>>,
    pieces: Option<u32>,
    wanted: BTreeSet<Piece>,
    meta_sent: bool,
    /// The piece behind the last that was to be served.
    following: Option<Piece>,
}

/// One of the established connections there may be.
struct Seat(Arc<Context>);

impl Seat {
    fn take(ctx: &Arc<Context>) -> Result<Self, Gone> {
        let seat = Self(Arc::clone(ctx));
        match ctx.established.fetch_add(1, Ordering::Relaxed) {
            n if n < MAX_ESTABLISHED => Ok(seat),
            _ => Err(Gone::Full),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.established.fetch_sub(1, Ordering::Relaxed);
    }
}

// Coming up.
impl Session {
    pub(super) fn new(
        ctx: &Arc<Context>,
        conn: ConnId,
        address: std::net::SocketAddr,
        dialled: bool,
        mailbox: Arc<Mailbox>,
        handle: GetHandle,
    ) -> Self {
        Self {
            ctx: Arc::clone(ctx),
            conn,
            mailbox,
            address,
            dialled,
            handle: Some(handle),
            key: None,
            shown: None,
            member: None,
            seat: None,
            ours: BTreeMap::new(),
            theirs: BTreeMap::new(),
            rejects: 0,
            poisons: false,
            reports: Vec::new(),
            outbox: Outbox::default(),
            goodbye: None,
        }
    }

    /// Its part in the limits of what is sent, and of what is received.
    pub(super) fn turns(&self) -> (Turn, Turn) {
        (Turn::new(Arc::clone(&self.ctx.up)), Turn::new(Arc::clone(&self.ctx.down)))
    }

    /// The other side has shown that it is a member, and the engine was told.
    pub(super) const fn is_up(&self) -> bool {
        self.seat.is_some()
    }

    /// This machine may say why it ends the connection: the other side has shown who it is, or was
    /// dialled by us. Strangers are told nothing.
    pub(super) const fn may_speak(&self) -> bool {
        self.member.is_some() || self.shown.is_some()
    }

    /// TLS is up; the other side holds `key`.
    pub(super) fn on_secure(&mut self, key: PeerId) -> Result<(), Gone> {
        self.key = Some(key);
        if self.dialled {
            self.say_hello(&self.ctx.identity().ok_or(Gone::NotJoined)?.certificate.clone())?;
        }
        Ok(())
    }

    fn say_hello(&mut self, certificate: &Certificate) -> Result<(), Gone> {
        let port = self.ctx.port.load(Ordering::Relaxed);
        self.shown = Some(certificate.clone());
        self.outbox.say(&Frame::Hello { certificate: &certificate.encode(), port })
    }

    /// The other side shows its certificate: to come up, or a renewed one later.
    fn on_hello(&mut self, certificate: &[u8], port: u16) -> Result<(), Gone> {
        let key = self.key.ok_or(Gone::Protocol("it speaks before it was believed"))?;
        let certificate = Certificate::decode(certificate).map_err(|e| Gone::Protocol(e.0))?;
        if let Some(known) = &self.member
            && certificate.not_after <= known.not_after
        {
            return Err(Gone::Protocol("it says Hello again with nothing new"));
        }
        let identity = self.ctx.identity().ok_or(Gone::NotJoined)?;
        identity.believe(&certificate, key, clock::wall()).map_err(Gone::NotMember)?;
        let was_up = self.is_up();
        self.member = Some(certificate.clone());
        if was_up { Ok(()) } else { self.come_up(&identity, key, certificate, port) }
    }

    fn come_up(
        &mut self,
        identity: &Identity,
        peer: PeerId,
        certificate: Certificate,
        port: u16,
    ) -> Result<(), Gone> {
        let seat = Seat::take(&self.ctx)?;
        if !self.dialled {
            self.say_hello(&identity.certificate)?;
        }
        let connection = self.handle.take().and_then(|get| get()).ok_or(Gone::Ended)?;
        self.seat = Some(seat);
        let (address, dialled) = (self.address, self.dialled);
        self.report(Event::Up { peer, certificate, address, port, dialled, connection })
    }

    /// Whether the other side is still a member, and knows our certificate. To be asked when the
    /// identity changed and from time to time (certificates expire).
    pub(super) fn recheck(&mut self) -> Result<(), Gone> {
        let (Some(key), Some(member)) = (self.key, &self.member) else { return Ok(()) };
        let identity = self.ctx.identity().ok_or(Gone::NotJoined)?;
        identity.believe(member, key, clock::wall()).map_err(Gone::NotMember)?;
        match &self.shown {
            Some(shown) if shown.not_after < identity.certificate.not_after => {
                self.say_hello(&identity.certificate.clone())
            }
            _ => Ok(()),
        }
    }

    /// The last event, where the engine knows of the connection: callers that never came up are
    /// nothing to it.
    pub(super) fn report_gone(&mut self, why: &Gone) {
        let (conn, address, peer) = (self.conn.0, self.address, self.key);
        tracing::debug!(conn, %address, ?peer, self.dialled, %why, "a connection is over");
        self.mailbox.close();
        if self.is_up() || self.dialled {
            let _ = self.report(Event::Gone { why: why.clone() });
        }
        let _ = self.hand_over();
    }

    /// Tells the engine, together with what else there is to tell by the next [`Session::hand_over`]:
    /// small pieces come by the dozen, and each by itself would wake the engine's thread.
    fn report(&mut self, event: Event) -> Result<(), Gone> {
        self.reports.push(event);
        if self.reports.len() < MAX_REPORTS { Ok(()) } else { self.hand_over() }
    }

    /// Hands over what was reported. Waits while the engine's queue is full; ends the connection
    /// when the engine is gone.
    pub(super) fn hand_over(&mut self) -> Result<(), Gone> {
        let mut reports = self.reports.drain(..);
        reports
            .try_for_each(|event| self.ctx.events.send((self.conn, event)).map_err(|_| Gone::Ended))
    }
}

#[cfg(any(test, fuzzing))]
impl Session {
    /// Panics where it remembers more than it may.
    pub(super) fn check(&self) {
        assert!(self.theirs.len() <= MAX_CHANNELS && self.ours.len() <= MAX_CHANNELS);
        assert!(self.theirs.values().all(|theirs| theirs.wanted.len() <= MAX_WANTS + MAX_PIECES));
        let meta = |ours: &Ours| ours.meta.bytes.len() <= ours.meta.manifest + ours.meta.proof;
        assert!(self.ours.values().all(meta));
        assert!(self.reports.len() <= MAX_REPORTS && self.rejects <= MAX_REJECTS + 1);
    }
}

// What is asked of the time.
impl Session {
    /// The other side has owed us an answer for so long.
    pub(super) fn owed_for(&self, now: Moment) -> Duration {
        let asked = self.ours.values().filter(|ours| ours.stage != Stage::Closing);
        let since = asked.flat_map(|ours| {
            ours.asked.values().filter_map(|asked| asked.since).chain(ours.meta.since)
        });
        since.min().map_or(Duration::ZERO, |since| now.since(since))
    }

    /// We fetch something of the other side, or want to.
    pub(super) fn fetches(&self) -> bool {
        self.ours.values().any(|ours| ours.stage == Stage::Open)
    }

    /// The other side has said something.
    pub(super) fn report_alive(&mut self, coming: bool) -> Result<(), Gone> {
        self.report(Event::Alive { coming })
    }

    /// The other side owes us pieces.
    pub(super) fn awaits(&self) -> bool {
        self.ours.values().any(|ours| !ours.asked.is_empty())
    }

    /// We owe the other side pieces: it is to hear that we are alive.
    pub(super) fn owes(&self) -> bool {
        self.theirs.values().any(|theirs| !theirs.wanted.is_empty())
    }
}

// Commands.
impl Session {
    /// Does what the engine wants.
    pub(super) fn on_command(&mut self, command: Command) -> Result<(), Gone> {
        match command {
            Command::Open { channel, id } => {
                if self.ours.len() >= MAX_CHANNELS || self.ours.contains_key(&channel) {
                    return self.report(Event::Closed { channel: ours(channel) });
                }
                self.ours.insert(channel, Ours::default());
                self.outbox.say(&Frame::Open(ours(channel), id))
            }
            Command::WantMeta { channel } => self.want_meta(channel),
            Command::Attach { channel, replica } => self.attach(channel, replica),
            Command::Want { channel, pieces } => self.want(channel, pieces),
            Command::Cancel { channel, pieces } => {
                let Some(open) = open_ours(&mut self.ours, channel) else { return Ok(()) };
                for piece in &pieces {
                    if let Some(asked) = open.asked.get_mut(piece) {
                        asked.since = None;
                    }
                }
                self.say_pieces(&pieces, |pieces| Frame::Cancel(ours(channel), pieces))
            }
            Command::Admit { channel, replica } => self.admit(channel, replica),
            Command::Refuse { channel } => self.close(theirs(channel)),
            Command::Serve { channel, piece } => {
                if let Some(open) = open_theirs(&mut self.theirs, channel) {
                    // All that is told together is read from the disk together, not one by one;
                    // ahead of what is read in its order the system reads by itself, and cheaper.
                    if open.following != Some(piece) {
                        open.replica.iter().for_each(|replica| replica.will_read(piece));
                    }
                    open.following = piece.0.checked_add(1).map(Piece);
                    self.outbox.serve(channel, piece);
                }
                Ok(())
            }
            Command::Busy { channel, pieces, wait_ms } => {
                let Some(open) = open_theirs(&mut self.theirs, channel) else { return Ok(()) };
                for piece in &pieces {
                    open.wanted.remove(piece);
                }
                self.say_pieces(&pieces, |pieces| Frame::Busy(theirs(channel), pieces, wait_ms))
            }
            Command::Grant { channel, pieces } => {
                if open_theirs(&mut self.theirs, channel).is_none() {
                    return Ok(());
                }
                self.say_pieces(&pieces, |pieces| Frame::Grant(theirs(channel), pieces))
            }
            Command::Hosts { channel, hosts } => {
                if open_theirs(&mut self.theirs, channel).is_none() {
                    return Ok(());
                }
                hosts.chunks(MAX_HOSTS).try_for_each(|hosts| {
                    self.outbox.say(&Frame::Hosts(theirs(channel), hosts.to_vec()))
                })
            }
            Command::Have { channel, bitfield } if self.is_open(channel) => {
                self.outbox.say(&Frame::Have(channel, bitfield))
            }
            Command::HaveMore { channel, pieces } if self.is_open(channel) => {
                self.say_pieces(&pieces, |pieces| Frame::HaveMore(channel, pieces))
            }
            Command::Lost { channel, pieces } if self.is_open(channel) => {
                self.say_pieces(&pieces, |pieces| Frame::Lost(channel, pieces))
            }
            Command::Have { .. } | Command::HaveMore { .. } | Command::Lost { .. } => Ok(()),
            Command::Close { channel } => self.close(channel),
            Command::Bye(why, text) => {
                self.goodbye = Some((why, text));
                Err(Gone::Ended)
            }
            Command::Recheck => self.recheck(),
            Command::Relimit => Ok(()), // it has woken up: that is all
        }
    }

    fn want_meta(&mut self, channel: u16) -> Result<(), Gone> {
        let Some(open) = open_ours(&mut self.ours, channel) else { return Ok(()) };
        if open.stage != Stage::Open || std::mem::replace(&mut open.meta.asked, true) {
            return Ok(());
        }
        if open.meta.manifest + open.meta.proof == 0 {
            let (manifest, proof) = (vec![], vec![]);
            return self.report(Event::Meta { channel, manifest, proof });
        }
        open.meta.since = Some(clock::now());
        self.outbox.say(&Frame::WantMeta(ours(channel)))
    }

    fn attach(&mut self, channel: u16, replica: Arc<Replica>) -> Result<(), Gone> {
        let Some(open) = open_ours(&mut self.ours, channel) else { return Ok(()) };
        agree(&mut open.pieces, replica.layout().pieces())?;
        open.replica = Some(replica);
        Ok(())
    }

    fn want(&mut self, channel: u16, mut pieces: Vec<Piece>) -> Result<(), Gone> {
        let now = clock::now();
        let Some(open) = open_ours(&mut self.ours, channel) else { return Ok(()) };
        if open.stage != Stage::Open || open.replica.is_none() {
            return Ok(());
        }
        pieces.retain(|piece| {
            let asked = open.asked.entry(*piece).or_default();
            let fresh = asked.since.is_none();
            if fresh {
                asked.copies += 1;
                asked.since = Some(now);
            }
            fresh
        });
        self.say_pieces(&pieces, |pieces| Frame::Want(ours(channel), pieces))
    }

    fn admit(&mut self, channel: u16, replica: Arc<Replica>) -> Result<(), Gone> {
        let Some(asking) = self.theirs.get_mut(&channel) else { return Ok(()) };
        if asking.stage != Stage::Asked {
            return Ok(());
        }
        agree(&mut asking.pieces, replica.layout().pieces())?;
        let (manifest, proof) = (replica.manifest().len(), replica.proof().len());
        if manifest > MAX_META || proof > MAX_META {
            return self.close(theirs(channel));
        }
        let size = replica.size();
        asking.stage = Stage::Open;
        asking.replica = Some(replica);
        let (manifest, proof) = (manifest as u32, proof as u32);
        self.outbox.say(&Frame::Opened { channel: theirs(channel), size, manifest, proof })
    }

    fn close(&mut self, channel: Channel) -> Result<(), Gone> {
        let closes = match channel.opener {
            Side::Us => self.ours.get_mut(&channel.number).is_some_and(|open| {
                let closes = open.stage != Stage::Closing;
                *open = Ours { stage: Stage::Closing, ..Ours::default() };
                closes
            }),
            Side::Them => self.theirs.get_mut(&channel.number).is_some_and(|open| {
                let closes = open.stage != Stage::Closing;
                *open = Theirs { stage: Stage::Closing, ..Theirs::default() };
                closes
            }),
        };
        if !closes {
            return Ok(());
        }
        if channel.opener == Side::Them {
            self.outbox.forget(channel.number);
        }
        self.outbox.say(&Frame::Close(channel))
    }

    fn say_pieces<'a>(
        &mut self,
        pieces: &[Piece],
        frame: impl Fn(Vec<Piece>) -> Frame<'a>,
    ) -> Result<(), Gone> {
        pieces.chunks(MAX_PIECES).try_for_each(|pieces| self.outbox.say(&frame(pieces.to_vec())))
    }

    fn is_open(&self, channel: Channel) -> bool {
        let stage = match channel.opener {
            Side::Us => self.ours.get(&channel.number).map(|open| open.stage),
            Side::Them => self.theirs.get(&channel.number).map(|open| open.stage),
        };
        stage == Some(Stage::Open)
    }
}

// Serving.
impl Session {
    /// Reads the next piece to be served and seals it; false where that must wait until what was
    /// sealed before is with the kernel.
    pub(super) fn serve(&mut self, secure: &mut Secure) -> Result<bool, Gone> {
        let Some((channel, piece)) = self.outbox.next_serve() else { return Ok(true) };
        let open = open_theirs(&mut self.theirs, channel);
        let Some(replica) =
            open.and_then(|open| open.replica.clone().filter(|_| open.wanted.contains(&piece)))
        else {
            self.outbox.served();
            return self.report(Event::Unsent { channel, piece }).map(|()| true);
        };
        let bytes = replica.layout().len_of(piece);
        let head = piece_head(theirs(channel), piece, bytes as usize);
        let sealed = secure.seal_with(&head, bytes as usize, |parts| {
            let read = replica.read(piece, parts);
            timing::lap(Work::Read);
            read
        })?;
        timing::lap(Work::Seal);
        if sealed == Ok(false) {
            return Ok(false);
        }
        if let Some(open) = open_theirs(&mut self.theirs, channel) {
            open.wanted.remove(&piece);
        }
        self.outbox.served();
        match sealed {
            Ok(_) => self.outbox.sealed(secure.sealed(), Sent { channel, piece, bytes }),
            Err(error) => self.report(Event::Unreadable { channel, piece, error })?,
        }
        Ok(true)
    }

    /// Tells of the pieces that the kernel has taken whole, now that it has `written` bytes.
    pub(super) fn on_written(&mut self, written: u64) -> Result<(), Gone> {
        while let Some(sent) = self.outbox.sent(written) {
            let Sent { channel, piece, bytes } = sent;
            self.mailbox.sent.fetch_add(bytes.into(), Ordering::Relaxed);
            if open_theirs(&mut self.theirs, channel).is_some() {
                self.report(Event::Sent { channel, piece, bytes })?;
            }
        }
        self.hand_over()
    }
}

// What the other side says.
impl Listener for Session {
    fn on_frame(&mut self, frame: Frame<'_>) -> Result<(), Gone> {
        match frame {
            Frame::Hello { certificate, port } => self.on_hello(certificate, port),
            Frame::Bye(why, text) if self.is_up() || self.dialled => {
                Err(Gone::Said(why, text.to_owned()))
            }
            _ if !self.is_up() => Err(Gone::Protocol("it speaks before it was believed")),
            Frame::Open(channel, id) => {
                if self.theirs.len() >= MAX_CHANNELS {
                    return Err(Gone::Protocol("it opens too many channels"));
                }
                let number = channel.number;
                if self.theirs.insert(number, Theirs::default()).is_some() {
                    return Err(Gone::Protocol("it opens a channel that is open"));
                }
                self.report(Event::WantsOpen { channel: number, id })
            }
            Frame::Close(channel) => self.on_close(channel),
            Frame::Ping => Ok(()),
            Frame::Bye(why, text) => Err(Gone::Said(why, text.to_owned())),
            Frame::Have(channel, bitfield) => self.on_have(channel, bitfield),
            Frame::HaveMore(channel, pieces) => match self.heard_of(channel, &pieces)? {
                true => self.report(Event::HaveMore { channel, pieces }),
                false => Ok(()),
            },
            Frame::Lost(channel, pieces) => self.on_lost(channel, pieces),
            Frame::Opened { .. }
            | Frame::Meta(..)
            | Frame::Busy(..)
            | Frame::Grant(..)
            | Frame::Hosts(..) => self.on_host_says(frame),
            Frame::WantMeta(_) | Frame::Want(..) | Frame::Cancel(..) | Frame::Reject(..) => {
                self.on_opener_says(frame)
            }
            Frame::Piece(..) => Err(Gone::Protocol("a piece out of place")),
        }
    }

    fn on_piece_head(&mut self, channel: u16, piece: Piece, len: usize) -> Result<bool, Gone> {
        if !self.is_up() {
            return Err(Gone::Protocol("it speaks before it was believed"));
        }
        let open = self.ours.get(&channel).ok_or(NO_CHANNEL)?;
        if open.stage == Stage::Closing || self.poisons {
            return Ok(false);
        }
        let Some(replica) = open.replica.as_ref().filter(|_| open.asked.contains_key(&piece))
        else {
            return Err(Gone::Protocol("it sends a piece nobody asked for"));
        };
        if replica.layout().len_of(piece) as usize != len {
            return Err(Gone::Protocol("a piece has not its length"));
        }
        Ok(true)
    }

    fn on_piece(&mut self, channel: u16, piece: Piece, parts: &[&[u8]]) -> Result<(), Gone> {
        let len = parts.iter().map(|part| part.len() as u32).sum();
        self.mailbox.received.fetch_add(u64::from(len), Ordering::Relaxed);
        // Closed since the piece began to come in: of no use.
        let Some(open) = open_ours(&mut self.ours, channel) else { return Ok(()) };
        let Some(replica) = open.replica.clone() else { return Ok(()) };
        open.answered(piece);
        timing::lap(Work::Open);
        let put = replica.put(piece, parts);
        timing::lap(Work::Write);
        if put == Err(PutError::BadPiece) {
            self.poisons = true;
            self.outbox.say(&Frame::Reject(ours(channel), piece))?;
        }
        self.report(Event::PieceIn { channel, piece, bytes: len, put })
    }

    fn on_passed(&mut self, _: u16, _: Piece, len: usize) -> Result<(), Gone> {
        self.mailbox.received.fetch_add(len as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Session {
    fn on_close(&mut self, channel: Channel) -> Result<(), Gone> {
        let stage = match channel.opener {
            Side::Us => self.ours.remove(&channel.number).map(|open| open.stage),
            Side::Them => self.theirs.remove(&channel.number).map(|open| open.stage),
        };
        match stage {
            None => return Err(NO_CHANNEL),
            Some(Stage::Closing) => {}
            Some(Stage::Asked | Stage::Open) => {
                if channel.opener == Side::Them {
                    self.outbox.forget(channel.number);
                }
                self.outbox.say(&Frame::Close(channel))?;
            }
        }
        self.report(Event::Closed { channel })
    }

    fn on_have(&mut self, channel: Channel, bitfield: Bitfield) -> Result<(), Gone> {
        match self.pieces_of(channel)? {
            Some(known) => agree(known, bitfield.len())?,
            None => return Ok(()),
        }
        self.report(Event::Have { channel, bitfield })
    }

    fn on_lost(&mut self, channel: Channel, pieces: Vec<Piece>) -> Result<(), Gone> {
        if !self.heard_of(channel, &pieces)? {
            return Ok(());
        }
        if let (Side::Us, Some(open)) = (channel.opener, self.ours.get_mut(&channel.number)) {
            for piece in &pieces {
                if let Some(asked) = open.asked.get_mut(piece) {
                    asked.since = None; // it owes us this one no longer
                }
            }
        }
        self.report(Event::Lost { channel, pieces })
    }

    /// Whether news of these pieces on this channel are to be passed on.
    fn heard_of(&mut self, channel: Channel, pieces: &[Piece]) -> Result<bool, Gone> {
        match self.pieces_of(channel)? {
            None => Ok(false),
            Some(Some(known)) if pieces.iter().any(|piece| piece.0 >= *known) => Err(NO_PIECE),
            Some(_) => Ok(true),
        }
    }

    /// How many pieces the content of a channel has, as far as known; `None` where it is closing.
    fn pieces_of(&mut self, channel: Channel) -> Result<Option<&mut Option<u32>>, Gone> {
        let (stage, pieces) = match channel.opener {
            Side::Us => {
                let open = self.ours.get_mut(&channel.number).ok_or(NO_CHANNEL)?;
                (open.stage, &mut open.pieces)
            }
            Side::Them => {
                let open = self.theirs.get_mut(&channel.number).ok_or(NO_CHANNEL)?;
                (open.stage, &mut open.pieces)
            }
        };
        Ok((stage != Stage::Closing).then_some(pieces))
    }

    /// A host speaks, on a channel of ours.
    fn on_host_says(&mut self, frame: Frame<'_>) -> Result<(), Gone> {
        let number = match &frame {
            Frame::Opened { channel, .. }
            | Frame::Meta(channel, _)
            | Frame::Busy(channel, ..)
            | Frame::Grant(channel, _)
            | Frame::Hosts(channel, _) => channel.number,
            _ => return Ok(()),
        };
        let open = self.ours.get_mut(&number).ok_or(NO_CHANNEL)?;
        let is_answer = matches!(frame, Frame::Opened { .. });
        match (open.stage, is_answer) {
            (Stage::Closing, _) => return Ok(()),
            (Stage::Asked, true) | (Stage::Open, false) => {}
            _ => return Err(Gone::Protocol("it says that at the wrong time")),
        }
        match frame {
            Frame::Opened { size, manifest, proof, .. } => {
                open.stage = Stage::Open;
                open.meta.manifest = manifest as usize;
                open.meta.proof = proof as usize;
                self.report(Event::Opened { channel: number, size, manifest, proof })
            }
            Frame::Meta(_, bytes) => {
                if !open.meta.take(bytes)? {
                    return Ok(());
                }
                let (manifest, proof) = open.meta.hand_over();
                self.report(Event::Meta { channel: number, manifest, proof })
            }
            Frame::Busy(_, mut pieces, wait_ms) => {
                pieces.retain(|piece| open.answered(*piece));
                if pieces.is_empty() {
                    return Ok(());
                }
                self.report(Event::Busy { channel: number, pieces, wait_ms })
            }
            Frame::Grant(channel, pieces) => {
                self.heard_of(channel, &pieces)?;
                self.report(Event::Granted { channel: number, pieces })
            }
            Frame::Hosts(_, hosts) => self.report(Event::Hosts { channel: number, hosts }),
            _ => Ok(()),
        }
    }

    /// An opener speaks, on a channel of theirs.
    fn on_opener_says(&mut self, frame: Frame<'_>) -> Result<(), Gone> {
        let number = match &frame {
            Frame::WantMeta(channel)
            | Frame::Want(channel, _)
            | Frame::Cancel(channel, _)
            | Frame::Reject(channel, _) => channel.number,
            _ => return Ok(()),
        };
        let open = self.theirs.get_mut(&number).ok_or(NO_CHANNEL)?;
        let replica = match (open.stage, &open.replica) {
            (Stage::Closing, _) => return Ok(()),
            (Stage::Open, Some(replica)) => Arc::clone(replica),
            _ => return Err(Gone::Protocol("it asks before it was admitted")),
        };
        if let Frame::Want(_, pieces) | Frame::Cancel(_, pieces) = &frame
            && pieces.iter().any(|piece| piece.0 >= replica.layout().pieces())
        {
            return Err(NO_PIECE);
        }
        match frame {
            Frame::WantMeta(_) => {
                if std::mem::replace(&mut open.meta_sent, true) {
                    return Err(Gone::Protocol("it asks for metadata twice"));
                }
                self.outbox.send_meta(number, replica);
                Ok(())
            }
            Frame::Want(_, mut pieces) => {
                pieces.retain(|piece| open.wanted.insert(*piece));
                if open.wanted.len() > MAX_WANTS {
                    return Err(Gone::Protocol("it wants too much at once"));
                }
                if pieces.is_empty() {
                    return Ok(());
                }
                self.report(Event::Wants { channel: number, pieces })
            }
            Frame::Cancel(_, pieces) => {
                for piece in &pieces {
                    open.wanted.remove(piece);
                }
                let unsent = self.outbox.take_back(number, &pieces);
                self.report(Event::Cancelled { channel: number, pieces })?;
                unsent
                    .into_iter()
                    .try_for_each(|piece| self.report(Event::Unsent { channel: number, piece }))
            }
            Frame::Reject(_, piece) => {
                self.rejects += 1;
                if piece.0 >= replica.layout().pieces() {
                    return Err(NO_PIECE);
                }
                if self.rejects > MAX_REJECTS {
                    return Err(Gone::Protocol("it rejects too much"));
                }
                self.report(Event::Rejected { channel: number, piece })
            }
            _ => Ok(()),
        }
    }
}

impl Ours {
    /// One of the copies of `piece` that were asked for was answered; false if there was none.
    fn answered(&mut self, piece: Piece) -> bool {
        let Some(asked) = self.asked.get_mut(&piece) else { return false };
        asked.since = None;
        asked.copies -= 1;
        if asked.copies == 0 {
            self.asked.remove(&piece);
        }
        true
    }
}

impl MetaIn {
    /// Takes the next part; true where it was the last.
    fn take(&mut self, bytes: &[u8]) -> Result<bool, Gone> {
        let whole = self.manifest + self.proof;
        if self.since.is_none() || bytes.is_empty() || self.bytes.len() + bytes.len() > whole {
            return Err(Gone::Protocol("it sends metadata nobody asked for"));
        }
        self.bytes.extend_from_slice(bytes);
        self.since = (self.bytes.len() < whole).then(clock::now);
        Ok(self.since.is_none())
    }

    /// Manifest and proof, once they are whole.
    fn hand_over(&mut self) -> (Vec<u8>, Vec<u8>) {
        let mut manifest = std::mem::take(&mut self.bytes);
        let proof = manifest.split_off(self.manifest);
        (manifest, proof)
    }
}

const NO_CHANNEL: Gone = Gone::Protocol("it speaks of a channel that is not open");
const NO_PIECE: Gone = Gone::Protocol("it speaks of a piece that does not exist");

const fn ours(number: u16) -> Channel {
    Channel { number, opener: Side::Us }
}

const fn theirs(number: u16) -> Channel {
    Channel { number, opener: Side::Them }
}

fn open_ours(channels: &mut BTreeMap<u16, Ours>, number: u16) -> Option<&mut Ours> {
    channels.get_mut(&number).filter(|open| open.stage != Stage::Closing)
}

fn open_theirs(channels: &mut BTreeMap<u16, Theirs>, number: u16) -> Option<&mut Theirs> {
    channels.get_mut(&number).filter(|open| open.stage == Stage::Open)
}

/// All that is said of how many pieces a content has must agree.
fn agree(known: &mut Option<u32>, pieces: u32) -> Result<(), Gone> {
    match known.replace(pieces) {
        Some(before) if before != pieces => {
            Err(Gone::Protocol("it is wrong about how many pieces there are"))
        }
        _ => Ok(()),
    }
}

/// Whether a member that is no longer one may be told so.
pub(super) fn last_words(gone: &Gone) -> Option<(Goodbye, String)> {
    let (why, text) = match gone {
        Gone::Protocol(text) => (Goodbye::Protocol, (*text).to_owned()),
        Gone::NotMember(distrust) => (Goodbye::NotMember, distrust.to_string()),
        Gone::NotJoined => (Goodbye::Leaving, Distrust::OtherNetwork.to_string()),
        Gone::Full => (Goodbye::Full, "too many connections".to_owned()),
        Gone::TimedOut(text) => (Goodbye::TimedOut, (*text).to_owned()),
        Gone::Ended => (Goodbye::Done, String::new()),
        Gone::Unreachable(_)
        | Gone::OtherMachine
        | Gone::Insecure(_)
        | Gone::Said(..)
        | Gone::Lost(_) => return None,
    };
    Some((why, text))
}
