//! Owns what this peer serves to whom and in which order: a short queue that says Busy, fairness
//! among members, grants by a seed. Never sees a piece's bytes.

mod grants;
mod stock;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::id::{PeerId, Piece};
use crate::layout::Layout;
use crate::pace::Pace;
use crate::swarm::Host;
use crate::time::{Duration, Moment};
use crate::wire::datagram::Load;
use crate::wire::stream::MAX_PIECES as MOST_IN_FRAME;
use grants::{Grants, Outflow};

/// So many pieces are with connections, being sent, or what goes out in [`SENDING_AHEAD`] if that
/// is more: first come, first served, so that a piece is whole somewhere soon and can travel on.
///
/// Not one alone: where two senders met at one reader, both their lines would be half idle. With
/// large pieces that cost 42 of 100 of what all lines could do.
const SENDING: u64 = 2;
/// … and so many on one line, with the same exception.
const SENDING_EACH: u64 = 1;
/// See [`SENDING`].
const SENDING_AHEAD: Duration = Duration::from_millis(10);
/// So many pieces wait in the queue, or what goes out in [`QUEUE_AHEAD`] if that is more. Whoever is
/// told Busy asks another holder, instead of waiting here while that one idles.
const QUEUE: u64 = 6;
/// See [`QUEUE`].
const QUEUE_AHEAD: Duration = Duration::from_millis(30);
/// With no more readers than this, nobody is told Busy: nobody else is kept waiting.
const FEW_READERS: usize = 2;
/// Pieces one member may have waiting, however few read: its wants are memory of ours.
const MOST_WAITING: usize = 4_096;
/// A Busy says to come back after so many piece times, …
const BUSY_PIECES: u64 = 2;
/// … but within these bounds, …
const BUSY_LEAST: Duration = Duration::from_millis(5);
/// … above …
const BUSY_MOST: Duration = Duration::from_secs(2);
/// … and this while our speed is unknown.
const BUSY_FIRST: Duration = Duration::from_millis(20);
/// A line is stuck, and blocks nobody else any more, when its socket has not taken a piece in so
/// many times what all that is being sent should take, …
const STUCK_TIMES: u64 = 3;
/// … in this at the least, …
const STUCK_LEAST: Duration = Duration::from_millis(5);
/// … and in this while our speed is unknown.
const STUCK_FIRST: Duration = Duration::from_millis(50);
/// Time is looked at so often while anything is under way.
const TICK: Duration = Duration::from_millis(50);
/// The index is told the rate of the last so long.
const METER: Duration = Duration::from_secs(1);
/// So many uploads at once are what we offer the index; more are served, too.
const SLOTS: u16 = 16;

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
    contents: BTreeMap<u32, Shared>,
    /// Contents that somebody has open.
    open: BTreeSet<u32>,
    lines: BTreeMap<Host, Line>,
    members: BTreeMap<PeerId, Member>,
    /// Lines that have something to send.
    active: BTreeSet<Host>,
    /// Members with something waiting, in the order of their turn.
    turns: BTreeSet<Turn>,
    /// Bytes waiting in all queues, and being sent on lines that are not stuck.
    waiting: u64,
    sending: u64,
    /// Fair queueing: what the member served last had been served, so that who comes new starts there.
    turn: u64,
    comings: u64,
    pace: Pace,
    /// Bytes a second that may go out at all, where the owner keeps to a limit.
    limit: Option<u64>,
    meter: Meter,
    tick_at: Option<Moment>,
    counts: Counts,
    outputs: VecDeque<Output>,
}

/// A content, as we serve it.
struct Shared {
    layout: Arc<Layout>,
    have: Bitfield,
    /// A seed's.
    grants: Option<Grants>,
    openers: BTreeMap<Host, Opener>,
}

/// A content open on a line: what is wanted and was not given to the line yet.
#[derive(Default)]
struct Opener {
    /// In the order of asking; what is not in `wanted` any more is skipped.
    queue: VecDeque<Piece>,
    wanted: BTreeSet<Piece>,
}

/// A connection.
struct Line {
    peer: PeerId,
    sending: VecDeque<Sending>,
    sending_bytes: u64,
    /// Its socket takes nothing: what it has does not count against the others.
    stuck: bool,
    pace: Pace,
}

struct Sending {
    content: u32,
    piece: Piece,
    bytes: u32,
    since: Moment,
}

/// Whose turn it is: the member served least; of these, who came first.
type Turn = (u64, u64, PeerId);

/// A member, over all its connections.
#[derive(Default)]
struct Member {
    lines: usize,
    /// Bytes served, on the scale of `Sharing::turn`.
    served: u64,
    /// Among those served equally, who came first is first.
    came: u64,
    /// Channels with something waiting, whose turn comes in this order.
    rota: VecDeque<(Host, u32)>,
    waiting: usize,
    waiting_bytes: u64,
}

/// Bytes sent in the last whole [`METER`], and the most ever.
#[derive(Default)]
struct Meter {
    since: Moment,
    bytes: u64,
    last: u64,
    most: u64,
}

impl Sharing {
    /// Shares nothing yet. `dice` seeds its choices among equals.
    pub fn new(dice: u64) -> Self {
        Self {
            dice: Dice(dice),
            contents: BTreeMap::new(),
            open: BTreeSet::new(),
            lines: BTreeMap::new(),
            members: BTreeMap::new(),
            active: BTreeSet::new(),
            turns: BTreeSet::new(),
            waiting: 0,
            sending: 0,
            turn: 0,
            comings: 0,
            pace: Pace::of_sockets(),
            limit: None,
            meter: Meter::default(),
            tick_at: None,
            counts: Counts::default(),
            outputs: VecDeque::new(),
        }
    }

    /// All lines together send so many bytes a second at the most, from now on: what takes long for
    /// that alone is not taken for stuck, nor granted to somebody else.
    pub const fn set_limit(&mut self, bytes_a_second: Option<u64>) {
        self.limit = bytes_a_second;
    }

    /// Shares a content, numbered by the owner; a number that is in use is left as it is.
    /// `seed`: it was complete from the start, so this peer may be the only one that holds it, and
    /// grants pieces when several want them.
    pub fn add(&mut self, content: u32, layout: Arc<Layout>, have: &Bitfield, seed: bool) {
        self.contents.entry(content).or_insert_with(|| Shared {
            grants: seed.then(|| Grants::new(Arc::clone(&layout), have)),
            layout,
            have: have.clone(),
            openers: BTreeMap::new(),
        });
    }

    /// Shares this content no longer: what was queued of it is dropped. The owner closes its channels.
    pub fn remove(&mut self, now: Moment, content: u32) {
        let hosts: Vec<Host> = match self.contents.get(&content) {
            Some(shared) => shared.openers.keys().copied().collect(),
            None => return,
        };
        hosts.into_iter().for_each(|host| self.close(now, host, content));
        self.contents.remove(&content);
        self.proceed(now, None);
    }

    /// We hold these too (`swarm::Output::Announce`).
    pub fn on_held(&mut self, content: u32, pieces: &[Piece]) {
        let Some(shared) = self.contents.get_mut(&content) else { return };
        for &piece in pieces {
            if shared.have.insert(piece)
                && let Some(grants) = &mut shared.grants
            {
                grants.on_held(piece);
            }
        }
    }

    /// We hold these no longer (bit rot, a changed file). The owner tells every opener (`Lost`).
    pub fn on_lost(&mut self, now: Moment, content: u32, pieces: &[Piece]) {
        let Some(shared) = self.contents.get_mut(&content) else { return };
        for &piece in pieces {
            if shared.have.remove(piece)
                && let Some(grants) = &mut shared.grants
            {
                grants.on_lost(piece);
            }
        }
        let hosts: Vec<Host> = shared.openers.keys().copied().collect();
        for host in hosts {
            let gone: Vec<Piece> =
                pieces.iter().copied().filter(|p| self.unqueue(host, content, *p)).collect();
            self.turn_away(host, content, &gone);
        }
        self.proceed(now, Some(content));
    }

    /// A connection is up, to the member `peer`. Connections of one member share one member's part.
    pub fn on_host(&mut self, now: Moment, host: Host, peer: PeerId) {
        self.on_gone(now, host);
        let line = Line {
            peer,
            sending: VecDeque::new(),
            sending_bytes: 0,
            stuck: false,
            pace: Pace::of_sockets(),
        };
        self.lines.insert(host, line);
        self.members.entry(peer).or_default().lines += 1;
    }

    /// A host opened this content (`Opened` is the owner's to answer, before anything that follows).
    pub fn on_open(&mut self, now: Moment, host: Host, content: u32) {
        let Some(line) = self.lines.get(&host) else { return };
        let Some(shared) = self.contents.get_mut(&content) else { return };
        if shared.openers.contains_key(&host) {
            return;
        }
        shared.openers.insert(host, Opener::default());
        if let Some(grants) = &mut shared.grants {
            grants.on_open(host, line.peer);
        }
        self.open.insert(content);
        self.proceed(now, Some(content));
        if !self.contents.get(&content).is_some_and(Shared::steers) {
            self.outputs.push_back(Output::ShowHave { host, content });
        }
    }

    /// `Have` of an opener: all that it holds. Needed for contents added with `seed`, else ignored.
    pub fn on_their_have(&mut self, now: Moment, host: Host, content: u32, have: &Bitfield) {
        self.with_grants(now, host, content, |grants, peer| grants.on_have(now, peer, have));
    }

    /// `HaveMore` of an opener.
    pub fn on_their_have_more(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {
        self.with_grants(now, host, content, |grants, peer| {
            pieces.iter().for_each(|piece| grants.on_announced(now, peer, *piece));
        });
    }

    /// `Lost` of an opener.
    pub fn on_their_lost(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {
        self.with_grants(now, host, content, |grants, peer| grants.on_their_lost(peer, pieces));
    }

    /// `Want`.
    pub fn on_want(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {
        if !self.contents.get(&content).is_some_and(|s| s.openers.contains_key(&host)) {
            return;
        }
        let mut refused = Vec::new();
        for &piece in pieces {
            if !self.admit(now, host, content, piece) {
                refused.push(piece);
            }
        }
        self.turn_away(host, content, &refused);
        self.proceed(now, Some(content));
    }

    /// `Cancel`: of what it asked for, or of what it was granted.
    pub fn on_cancel(&mut self, now: Moment, host: Host, content: u32, pieces: &[Piece]) {
        for &piece in pieces {
            self.unqueue(host, content, piece);
        }
        self.with_grants(now, host, content, |grants, peer| {
            pieces.iter().for_each(|piece| grants.on_declined(now, peer, *piece));
        });
    }

    /// The socket took the last byte of this piece.
    pub fn on_sent(&mut self, now: Moment, host: Host, content: u32, piece: Piece) {
        let Some(bytes) = self.unload(now, host, content, piece) else { return };
        self.pace.add(now, bytes);
        if let Some(line) = self.lines.get_mut(&host) {
            line.pace.add(now, bytes);
        }
        self.rest_paces(now, host);
        self.counts.sent += 1;
        self.counts.sent_bytes += u64::from(bytes);
        self.meter.add(now, bytes);
        self.with_grants(now, host, content, |grants, peer| grants.on_sent(now, peer, piece));
    }

    /// This piece will not be sent after all: unreadable, or cancelled in time.
    pub fn on_unsent(&mut self, now: Moment, host: Host, content: u32, piece: Piece) {
        if self.unload(now, host, content, piece).is_some() {
            self.counts.unsent += 1;
            self.rest_paces(now, host);
            self.with_grants(now, host, content, |grants, peer| {
                grants.on_declined(now, peer, piece);
            });
        }
    }

    /// The opener closed this content.
    pub fn on_closed(&mut self, now: Moment, host: Host, content: u32) {
        self.close(now, host, content);
        self.proceed(now, Some(content));
    }

    /// The connection is over.
    pub fn on_gone(&mut self, now: Moment, host: Host) {
        let contents: Vec<u32> = self.open.iter().copied().collect();
        contents.into_iter().for_each(|content| self.close(now, host, content));
        if let Some(line) = self.lines.remove(&host) {
            self.active.remove(&host);
            self.sending -= if line.stuck { 0 } else { line.sending_bytes };
            if let Some(member) = self.members.get_mut(&line.peer) {
                member.lines -= 1;
                if member.lines == 0 {
                    self.members.remove(&line.peer);
                }
            }
            self.rest_paces(now, host);
            self.proceed(now, None);
        }
    }

    /// Time passed.
    pub fn tick(&mut self, now: Moment) {
        while self.set_stuck_aside(now) {}
        self.meter.roll(now);
        let outflow = self.outflow();
        for shared in self.contents.values_mut() {
            if let Some(grants) = &mut shared.grants {
                self.counts.withdrawn += grants.tick(now, outflow);
            }
        }
        self.tick_at = None;
        self.proceed(now, None);
    }

    /// Lines that took nothing for too long block nobody else any more. True if there were any: without
    /// their bytes, the others should have been quicker.
    fn set_stuck_aside(&mut self, now: Moment) -> bool {
        let (patience, before) = (self.patience(), self.counts.stuck);
        for host in &self.active {
            let Some(line) = self.lines.get_mut(host) else { continue };
            let waited = line.sending.front().map_or(Duration::ZERO, |s| now.since(s.since));
            if waited >= patience && !line.stuck {
                line.stuck = true;
                self.counts.stuck += 1;
                self.sending -= line.sending_bytes;
            }
        }
        self.counts.stuck > before
    }

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Sharing::tick`] is due.
    pub fn next_deadline(&self) -> Option<Moment> {
        let patience = self.patience();
        let active = self.active.iter().filter_map(|host| self.lines.get(host));
        let unstuck = active.filter(|l| !l.stuck);
        let stuck = unstuck.filter_map(|l| l.sending.front()).map(|s| s.since + patience).min();
        [self.tick_at, stuck].into_iter().flatten().min()
    }

    /// How long a line may take for a piece before it counts as stuck.
    fn patience(&self) -> Duration {
        let bytes = STUCK_TIMES * self.sending;
        let usual = self.pace.time_for(bytes).map_or(STUCK_FIRST, |usual| usual.max(STUCK_LEAST));
        let micros = |rate| bytes.saturating_mul(1_000_000).checked_div(rate);
        let limited = self.limit.and_then(micros).map(Duration::from_micros);
        limited.map_or(usual, |limited| usual.max(limited))
    }

    /// How busy we are, for the index.
    pub fn load(&self) -> Load {
        let waits = |l: &Line| self.members.get(&l.peer).is_some_and(|m| m.waiting > 0);
        let uploads = self.lines.values().filter(|l| !l.sending.is_empty() || waits(l)).count();
        let uploads = u16::try_from(uploads).unwrap_or(u16::MAX);
        let kib = |bytes: u64| u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
        Load {
            uploads,
            free_slots: SLOTS.saturating_sub(uploads),
            rate_kib: kib(self.meter.last),
            capacity_kib: kib(self.meter.most),
        }
    }

    /// What happened so far.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Panics when an invariant broke.
    pub fn check(&self) {
        let (mut waiting, mut waits) = (0, BTreeMap::<PeerId, (usize, u64)>::new());
        for (number, shared) in &self.contents {
            for (host, opener) in &shared.openers {
                let line = self.lines.get(host).expect("an opener has a line");
                let queued: BTreeSet<Piece> = opener.queue.iter().copied().collect();
                assert!(opener.wanted.is_subset(&queued), "wanted, but not in the queue");
                assert!(opener.queue.len() <= 2 * opener.wanted.len() + 64, "a queue of nothing");
                let bytes: u64 =
                    opener.wanted.iter().map(|p| u64::from(shared.layout.len_of(*p))).sum();
                waiting += bytes;
                let of_member = waits.entry(line.peer).or_default();
                of_member.0 += opener.wanted.len();
                of_member.1 += bytes;
                for piece in &opener.wanted {
                    assert!(shared.have.has(*piece), "{piece:?} waits to be sent, but is not held");
                }
                let rota = self.members[&line.peer].rota.contains(&(*host, *number));
                assert!(rota || opener.wanted.is_empty(), "{host:?} waits, but never has its turn");
            }
            if let Some(grants) = &shared.grants {
                grants.check();
            }
        }
        assert_eq!(waiting, self.waiting, "bytes waiting");
        let waits_for_its_turn = self.members.iter().filter(|(_, m)| m.waiting > 0);
        let turns: BTreeSet<Turn> = waits_for_its_turn.map(|(peer, m)| m.turn(*peer)).collect();
        assert_eq!(turns, self.turns, "whose turn it is");
        let active = self.lines.iter().filter(|(_, l)| !l.sending.is_empty());
        assert!(active.map(|(host, _)| host).eq(&self.active), "lines that send");
        for (peer, member) in &self.members {
            let (pieces, bytes) = waits.remove(peer).unwrap_or_default();
            assert_eq!((pieces, bytes), (member.waiting, member.waiting_bytes), "of {peer:?}");
            assert!(pieces <= MOST_WAITING, "{peer:?} has {pieces} pieces waiting");
            let lines = self.lines.values().filter(|l| l.peer == *peer).count();
            assert_eq!(lines, member.lines, "lines of {peer:?}");
        }
        let mut sending = 0;
        for line in self.lines.values() {
            let bytes: u64 = line.sending.iter().map(|s| u64::from(s.bytes)).sum();
            assert_eq!(bytes, line.sending_bytes, "bytes being sent on a line");
            sending += if line.stuck { 0 } else { bytes };
        }
        assert_eq!(sending, self.sending, "bytes being sent");
    }

    /// Queues `piece` for `host`; false if it is to be told Busy.
    fn admit(&mut self, now: Moment, host: Host, content: u32, piece: Piece) -> bool {
        let Some(line) = self.lines.get(&host) else { return false };
        let Some(shared) = self.contents.get(&content) else { return false };
        let Some(opener) = shared.openers.get(&host) else { return false };
        let (peer, bytes) = (line.peer, u64::from(shared.layout.len_of(piece)));
        if !shared.have.has(piece) {
            return false;
        }
        let sending = line.sending.iter().any(|s| s.content == content && s.piece == piece);
        if opener.wanted.contains(&piece) || sending {
            return true;
        }
        let granted = shared.grants.as_ref().is_some_and(|g| g.is_open(peer, piece));
        let size = u64::from(shared.layout.piece_size());
        let member = &self.members[&peer];
        if member.waiting >= MOST_WAITING {
            return false;
        }
        let room = (QUEUE * size).max(self.pace.within(QUEUE_AHEAD));
        if !granted && self.waiting + bytes > room && self.readers_besides(peer) >= FEW_READERS {
            let mine = member.waiting_bytes + bytes;
            if !self.make_room(mine) {
                return false;
            }
        }
        self.enqueue(now, host, content, piece);
        true
    }

    /// How many members besides this one have something waiting.
    fn readers_besides(&self, peer: PeerId) -> usize {
        self.turns.len() - usize::from(self.members.get(&peer).is_some_and(|m| m.waiting > 0))
    }

    /// Turns away the last piece of the member that has most waiting, if that is more than `mine`:
    /// whoever asks for much cannot keep out who asks for little. Granted pieces stay.
    fn make_room(&mut self, mine: u64) -> bool {
        let waiting = self.turns.iter().map(|(.., peer)| (peer, &self.members[peer]));
        let greediest = waiting.max_by_key(|(peer, m)| (m.waiting_bytes, **peer));
        let Some((peer, member)) = greediest.filter(|(_, m)| m.waiting_bytes > mine) else {
            return false;
        };
        let last = member.rota.iter().rev().find_map(|(host, content)| {
            let shared = self.contents.get(content)?;
            let opener = shared.openers.get(host)?;
            let granted = |p| shared.grants.as_ref().is_some_and(|g| g.is_open(*peer, p));
            let mut queued = opener.queue.iter().rev().copied();
            let piece = queued.find(|p| opener.wanted.contains(p) && !granted(*p))?;
            Some((*host, *content, piece))
        });
        let Some((host, content, piece)) = last else { return false };
        self.unqueue(host, content, piece);
        self.turn_away(host, content, &[piece]);
        true
    }

    fn enqueue(&mut self, now: Moment, host: Host, content: u32, piece: Piece) {
        let Some(peer) = self.lines.get(&host).map(|l| l.peer) else { return };
        let Some(shared) = self.contents.get_mut(&content) else { return };
        let Some(opener) = shared.openers.get_mut(&host) else { return };
        let Some(member) = self.members.get_mut(&peer) else { return };
        self.turns.remove(&member.turn(peer));
        let bytes = u64::from(shared.layout.len_of(piece));
        opener.wanted.insert(piece);
        opener.queue.push_back(piece);
        if member.waiting == 0 {
            member.served = member.served.max(self.turn);
            self.comings += 1;
            member.came = self.comings;
        }
        member.waiting += 1;
        member.waiting_bytes += bytes;
        self.turns.insert(member.turn(peer));
        self.waiting += bytes;
        if !member.rota.contains(&(host, content)) {
            member.rota.push_back((host, content));
        }
        if let Some(grants) = &mut shared.grants {
            grants.on_taken(now, peer, piece);
        }
    }

    /// Takes `piece` out of the queue; true if it was there.
    fn unqueue(&mut self, host: Host, content: u32, piece: Piece) -> bool {
        let Some(shared) = self.contents.get_mut(&content) else { return false };
        let Some(opener) = shared.openers.get_mut(&host) else { return false };
        if !opener.wanted.remove(&piece) {
            return false;
        }
        if opener.queue.len() > 2 * opener.wanted.len() + 64 {
            opener.queue.retain(|p| opener.wanted.contains(p));
        }
        let bytes = u64::from(shared.layout.len_of(piece));
        self.waiting -= bytes;
        let Some(peer) = self.lines.get(&host).map(|l| l.peer) else { return true };
        if let Some(member) = self.members.get_mut(&peer) {
            member.waiting -= 1;
            member.waiting_bytes -= bytes;
            if member.waiting == 0 {
                self.turns.remove(&member.turn(peer));
            }
        }
        true
    }

    fn turn_away(&mut self, host: Host, content: u32, pieces: &[Piece]) {
        if pieces.is_empty() {
            return;
        }
        self.counts.busy += pieces.len() as u64;
        let size = self.contents.get(&content).map_or(0, |s| s.layout.piece_size());
        let wait = self.pace.time_for(BUSY_PIECES * u64::from(size));
        let wait = wait.map_or(BUSY_FIRST, |wait| wait.clamp(BUSY_LEAST, BUSY_MOST));
        for some in pieces.chunks(MOST_IN_FRAME) {
            self.outputs.push_back(Output::Busy { host, content, pieces: some.to_vec(), wait });
        }
    }

    /// The opener is gone from this content, and all that it waited for.
    fn close(&mut self, now: Moment, host: Host, content: u32) {
        let Some(shared) = self.contents.get(&content) else { return };
        let Some(opener) = shared.openers.get(&host) else { return };
        let waiting: Vec<Piece> = opener.wanted.iter().copied().collect();
        for piece in waiting {
            self.unqueue(host, content, piece);
        }
        let Some(line) = self.lines.get_mut(&host) else { return };
        line.sending.retain(|s| s.content != content);
        if line.sending.is_empty() {
            self.active.remove(&host);
        }
        let left: u64 = line.sending.iter().map(|s| u64::from(s.bytes)).sum();
        let freed = std::mem::replace(&mut line.sending_bytes, left) - left;
        self.sending -= if line.stuck { 0 } else { freed };
        if let Some(member) = self.members.get_mut(&line.peer) {
            member.rota.retain(|channel| *channel != (host, content));
        }
        if let Some(shared) = self.contents.get_mut(&content) {
            shared.openers.remove(&host);
            if let Some(grants) = &mut shared.grants {
                grants.on_closed(host, line.peer);
            }
            if shared.openers.is_empty() {
                self.open.remove(&content);
            }
        }
        self.rest_paces(now, host);
    }

    /// `piece` is with the line no more; its bytes, if it was.
    fn unload(&mut self, now: Moment, host: Host, content: u32, piece: Piece) -> Option<u32> {
        let patience = self.patience();
        let line = self.lines.get_mut(&host)?;
        let at = line.sending.iter().position(|s| s.content == content && s.piece == piece)?;
        let done = line.sending.remove(at)?;
        line.sending_bytes -= u64::from(done.bytes);
        if line.sending.is_empty() {
            self.active.remove(&host);
        }
        if let Some(next) = line.sending.get_mut(at).filter(|_| at == 0) {
            next.since = now;
        }
        match line.stuck {
            false => self.sending -= u64::from(done.bytes),
            true if now.since(done.since) < patience => {
                line.stuck = false;
                self.sending += line.sending_bytes;
            }
            true => {}
        }
        Some(done.bytes)
    }

    /// Time does not count for a line that has nothing to send.
    fn rest_paces(&mut self, now: Moment, host: Host) {
        if let Some(line) = self.lines.get_mut(&host).filter(|l| l.sending.is_empty()) {
            line.pace.stop(now);
        }
        if self.active.is_empty() {
            self.pace.stop(now);
        }
    }

    /// Tells a seed's grants what an opener did, and goes on.
    fn with_grants(
        &mut self,
        now: Moment,
        host: Host,
        content: u32,
        tell: impl FnOnce(&mut Grants, PeerId),
    ) {
        let peer = self.lines.get(&host).map(|l| l.peer);
        let shared = self.contents.get_mut(&content).filter(|s| s.openers.contains_key(&host));
        if let (Some(grants), Some(peer)) = (shared.and_then(|s| s.grants.as_mut()), peer) {
            tell(grants, peer);
        }
        self.proceed(now, Some(content));
    }

    fn outflow(&self) -> Outflow {
        let idle = self.sending == 0 && self.waiting == 0;
        let rate = match (self.pace.rate(), self.limit) {
            (0, Some(limit)) => limit,
            (rate, Some(limit)) => rate.min(limit),
            (rate, None) => rate,
        };
        Outflow { rate, idle }
    }

    /// Serves and grants what there is room for; grants of this content, or of all that are open.
    fn proceed(&mut self, now: Moment, content: Option<u32>) {
        while let Some((peer, turn)) = self.next_served() {
            self.serve(now, peer, turn);
        }
        let outflow = self.outflow();
        let steered = match content {
            Some(content) => vec![content],
            None => self.open.iter().copied().collect(),
        };
        for content in steered {
            let shared = self.contents.get_mut(&content);
            let Some(grants) = shared.and_then(|s| s.grants.as_mut()) else { continue };
            for host in grants.settle() {
                self.outputs.push_back(Output::ShowHave { host, content });
            }
            for (host, pieces) in grants.grant(now, outflow, &mut self.dice) {
                self.counts.granted += pieces.len() as u64;
                for some in pieces.chunks(MOST_IN_FRAME) {
                    let pieces = some.to_vec();
                    self.outputs.push_back(Output::Grant { host, content, pieces });
                }
            }
        }
        let busy = self.waiting > 0
            || !self.meter.is_still()
            || !self.active.is_empty()
            || self.open.iter().any(|c| self.contents.get(c).is_some_and(Shared::needs_ticks));
        self.tick_at = busy.then(|| self.tick_at.unwrap_or(now + TICK));
    }

    /// Whose turn it is, and which of its channels': the first with something waiting for a line that
    /// has room.
    fn next_served(&self) -> Option<(PeerId, usize)> {
        self.turns.iter().find_map(|(.., peer)| {
            let mut rota = self.members[peer].rota.iter();
            Some((*peer, rota.position(|(host, content)| self.has_room(*host, *content))?))
        })
    }

    /// Whether the next piece of this channel may go to its line.
    fn has_room(&self, host: Host, content: u32) -> bool {
        let (Some(shared), Some(line)) = (self.contents.get(&content), self.lines.get(&host))
        else {
            return false;
        };
        let opener = shared.openers.get(&host).filter(|opener| !opener.wanted.is_empty());
        let Some(opener) = opener else { return false };
        let next = opener.queue.iter().copied().find(|p| opener.wanted.contains(p));
        let bytes = u64::from(next.map_or(0, |piece| shared.layout.len_of(piece)));
        let size = u64::from(shared.layout.piece_size());
        let fits = |sending: u64, most: u64, pace: &Pace| {
            sending + bytes <= (most * size).max(pace.within(SENDING_AHEAD))
        };
        fits(line.sending_bytes, SENDING_EACH, &line.pace)
            && (line.stuck || fits(self.sending, SENDING, &self.pace))
    }

    /// Gives the next piece of this member's channel to its line.
    fn serve(&mut self, now: Moment, peer: PeerId, turn: usize) {
        let Some(member) = self.members.get_mut(&peer) else { return };
        let Some((host, content)) = member.rota.remove(turn) else { return };
        let Some(shared) = self.contents.get_mut(&content) else { return };
        let Some(opener) = shared.openers.get_mut(&host) else { return };
        let queue = std::iter::from_fn(|| opener.queue.pop_front());
        let Some(piece) = queue.into_iter().find(|p| opener.wanted.contains(p)) else { return };
        let bytes = shared.layout.len_of(piece);
        if opener.wanted.len() > 1 {
            member.rota.push_back((host, content));
        }
        self.turns.remove(&member.turn(peer));
        self.turn = member.served;
        member.served += u64::from(bytes);
        self.comings += 1;
        member.came = self.comings;
        self.turns.insert(member.turn(peer));
        self.unqueue(host, content, piece);
        let Some(line) = self.lines.get_mut(&host) else { return };
        self.active.insert(host);
        line.sending.push_back(Sending { content, piece, bytes, since: now });
        line.sending_bytes += u64::from(bytes);
        line.pace.start(now);
        self.sending += if line.stuck { 0 } else { u64::from(bytes) };
        self.pace.start(now);
        self.outputs.push_back(Output::Serve { host, content, piece });
    }
}

impl Member {
    const fn turn(&self, peer: PeerId) -> Turn {
        (self.served, self.came, peer)
    }
}

impl Shared {
    /// Whether openers are granted pieces, instead of seeing what we hold.
    fn steers(&self) -> bool {
        self.grants.as_ref().is_some_and(Grants::are_on)
    }

    fn needs_ticks(&self) -> bool {
        self.grants.as_ref().is_some_and(Grants::needs_ticks)
    }
}

impl Meter {
    fn add(&mut self, now: Moment, bytes: u32) {
        self.roll(now);
        self.bytes += u64::from(bytes);
    }

    fn roll(&mut self, now: Moment) {
        let elapsed = now.since(self.since);
        if elapsed >= METER {
            self.last = self.bytes.saturating_mul(1_000) / elapsed.as_millis() as u64;
            self.most = self.most.max(self.last);
            (self.since, self.bytes) = (now, 0);
        }
    }

    const fn is_still(&self) -> bool {
        self.bytes == 0 && self.last == 0
    }
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
    /// Pieces given to a connection that were not sent: cancelled in time, or unreadable.
    pub unsent: u64,
    /// Times that a connection's socket took nothing for too long.
    pub stuck: u64,
}
