//! Owns a world of peers that fetch and serve contents over links of given speed and delay, with the
//! real [`Swarm`] and [`Sharing`] in every one of them. Never moves a byte: pieces are numbers here.
//!
//! A connection is one socket each way: a bounded send buffer, filled frame by frame, control frames
//! before the next piece. An uplink sends the chunks of its sockets in turn, a downlink takes them in
//! as they come. Left out: packet loss, slow start, framing (4.6 % on Ethernet) and CPU.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::id::{PeerId, Piece};
use crate::layout::Layout;
use crate::sharing::{self, Sharing};
use crate::swarm::{self, Arrived, Host, Swarm, Why};
use crate::time::{Duration, Moment};

/// What goes onto a link at once.
const CHUNK: u32 = 16 << 10;
/// What a socket holds that is not on the line yet (`TCP_NOTSENT_LOWAT`).
const UNSENT: u64 = 32 << 10;
/// What a socket has on its way and not acknowledged, besides what its delay asks for.
const WINDOW: u64 = 128 << 10;
/// Hash a piece and write it.
const VERIFY: Nanos = 300_000;
/// Ask the index for hosts.
const SEARCH: Nanos = 20_000_000;
/// Nanoseconds since the world began.
type Nanos = u64;

/// A machine's line to the network.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Bytes a second it sends at most.
    pub up: u64,
    /// Bytes a second it takes in at most.
    pub down: u64,
    /// How long a byte takes to the middle of the network.
    pub delay: Duration,
}

impl Line {
    /// So many megabits a second each way, 0.1 ms from the middle.
    pub const fn mbit(up: u64, down: u64) -> Self {
        Self { up: up * 125_000, down: down * 125_000, delay: Duration::from_micros(100) }
    }
}

/// How a peer behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// As it should.
    Honest,
    /// Takes every ask and every grant, and sends no piece.
    Silent,
    /// Says that it is busy, always.
    Busy,
    /// Sends bad pieces: all after so many good ones, or every n-th.
    Poisoner {
        /// Good ones first.
        after: u32,
        /// 1: every one is bad.
        every: u32,
    },
    /// Claims to hold everything from the start, and never declines a grant nor takes one.
    Hoarder,
}

/// When a peer dies. Its connections break at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Death {
    /// Never.
    Never,
    /// So long after the beginning.
    At(Duration),
    /// After it has sent so many thousandths of all contents.
    AfterCopies(u64),
}

/// One peer.
#[derive(Clone, Debug)]
pub struct Person {
    /// Its line.
    pub line: Line,
    /// How it behaves.
    pub nature: Nature,
    /// When it comes.
    pub joins: Duration,
    /// When it goes.
    pub dies: Death,
    /// Contents it holds from the start (and is a seed of).
    pub holds: Vec<u32>,
    /// Contents it wants.
    pub wants: Vec<u32>,
}

/// A whole world before it begins.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Contents, numbered from 0: sizes of their files.
    pub contents: Vec<Vec<u64>>,
    /// Who is there.
    pub people: Vec<Person>,
    /// Hosts a search names at most.
    pub neighbours: usize,
    /// Pairs that cannot reach each other.
    pub walls: BTreeSet<(usize, usize)>,
    /// Decides all chance.
    pub seed: u64,
    /// Every so many events the machines touched are checked; 0: never.
    pub check_every: u64,
}

/// How it went.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// When each person had all that it wanted; `None`: never. Zero for who wanted nothing.
    pub done: Vec<Option<Duration>>,
    /// Bytes of pieces each person put on its uplink.
    pub sent: Vec<u64>,
    /// Bytes of pieces that came to each person a second time.
    pub duplicate: Vec<u64>,
    /// Bad pieces that each person took in, by sender.
    pub bad: BTreeMap<(usize, usize), u32>,
    /// Who dropped whom, and why.
    pub dropped: Vec<(usize, usize, Why)>,
    /// What each person's fetching of each content counted.
    pub fetched: Vec<BTreeMap<u32, swarm::Counts>>,
    /// What each person's sharing counted.
    pub shared: Vec<sharing::Counts>,
    /// When each person had sent each full copy of all contents, in bytes.
    pub copies_at: Vec<Vec<Duration>>,
    /// Events handled.
    pub events: u64,
    /// Of everything that happened, in order: the same seed, the same digest.
    pub digest: u64,
}

impl Report {
    /// When the last of these was done; `None` if one never was.
    pub fn last(&self, people: impl IntoIterator<Item = usize>) -> Option<Duration> {
        people
            .into_iter()
            .map(|p| self.done[p])
            .try_fold(Duration::ZERO, |a, b| b.map(|b| a.max(b)))
    }
}

impl Plan {
    /// One seed (person 0) with `line`, and fetchers with these lines, of one content of `bytes`.
    pub fn star(
        bytes: u64,
        line: Line,
        fetchers: impl IntoIterator<Item = Line>,
        seed: u64,
    ) -> Self {
        let person = |line, holds, wants| Person {
            line,
            nature: Nature::Honest,
            joins: Duration::ZERO,
            dies: Death::Never,
            holds,
            wants,
        };
        let mut people = vec![person(line, vec![0], vec![])];
        people.extend(fetchers.into_iter().map(|line| person(line, vec![], vec![0])));
        Self {
            contents: vec![vec![bytes]],
            people,
            neighbours: 20,
            walls: BTreeSet::new(),
            seed,
            check_every: 997,
        }
    }

    /// The shortest time in which one content can reach all who want it, were it a fluid:
    /// max(F/u_seed, F/min d, N·F/(u_seed + Σu)) (Kumar and Ross 2006). Counts honest people only.
    pub fn bound(&self, content: u32) -> Duration {
        let honest = || self.people.iter().filter(|p| p.nature == Nature::Honest);
        let bytes: u64 = self.contents[content as usize].iter().sum();
        let seeds: u64 = honest().filter(|p| p.holds.contains(&content)).map(|p| p.line.up).sum();
        let wanting = || honest().filter(|p| p.wants.contains(&content));
        let ups: u64 = seeds + wanting().map(|p| p.line.up).sum::<u64>();
        let slowest = wanting().map(|p| p.line.down).min().unwrap_or(u64::MAX);
        let time = |bytes: u64, rate: u64| bytes as f64 / rate as f64;
        let all = time(bytes * wanting().count() as u64, ups);
        Duration::from_secs_f64(time(bytes, seeds).max(time(bytes, slowest)).max(all))
    }
}

/// What is said on a connection.
#[derive(Clone, Debug)]
enum Frame {
    Open(u32),
    Opened(u32),
    TheirHave(u32, Bitfield),
    TheirHaveMore(u32, Vec<Piece>),
    Have(u32, Bitfield),
    HaveMore(u32, Vec<Piece>),
    Want(u32, Vec<Piece>),
    Cancel(u32, Vec<Piece>),
    Busy(u32, Vec<Piece>, Duration),
    Grant(u32, Vec<Piece>),
    Close(u32),
    Piece { content: u32, piece: Piece, bad: bool },
}

impl Frame {
    /// Bytes it takes on the wire; a piece's own are counted apart.
    fn size(&self) -> u32 {
        match self {
            Self::Have(_, have) | Self::TheirHave(_, have) => 16 + have.len() / 8,
            Self::HaveMore(_, pieces)
            | Self::TheirHaveMore(_, pieces)
            | Self::Want(_, pieces)
            | Self::Cancel(_, pieces)
            | Self::Busy(_, pieces, _)
            | Self::Grant(_, pieces) => 16 + 4 * pieces.len() as u32,
            Self::Open(_) | Self::Opened(_) | Self::Close(_) | Self::Piece { .. } => 48,
        }
    }
}

/// One way of a connection.
#[derive(Default)]
struct Socket {
    control: VecDeque<Frame>,
    pieces: VecDeque<(u32, Piece, u32)>,
    /// The piece being written, and how much of it is not yet.
    writing: Option<(u32, Piece, u32)>,
    /// In the send buffer, before the uplink.
    buffer: VecDeque<Chunk>,
    /// In the send buffer or under way.
    unacknowledged: u64,
    unsent: u64,
    window: u64,
    queued: bool,
}

struct Chunk {
    bytes: u32,
    /// The frame that is whole with this chunk.
    ends: Option<Frame>,
}

enum Event {
    Join(usize),
    Die(usize),
    /// The search or the dialling that `usize` began is through.
    Connect(usize, usize),
    UplinkFree(usize, usize),
    Arrives {
        from: usize,
        to: usize,
        life: u64,
        chunk: Chunk,
    },
    TakenIn {
        from: usize,
        to: usize,
        life: u64,
        chunk: Chunk,
    },
    Acknowledged {
        from: usize,
        to: usize,
        life: u64,
        bytes: u32,
    },
    Verified {
        from: usize,
        to: usize,
        content: u32,
        piece: Piece,
        bad: bool,
    },
    Tick(usize),
}

struct Peer {
    person: Person,
    alive: bool,
    swarms: BTreeMap<u32, Swarm>,
    sharing: Sharing,
    /// Connections: to whom, and which life of that connection.
    connected: BTreeMap<usize, u64>,
    /// What was shown to whom (both directions of a channel).
    shown: BTreeSet<(usize, u32)>,
    opened: BTreeSet<(usize, u32)>,
    banned: BTreeSet<usize>,
    sockets: BTreeMap<usize, Socket>,
    ring: VecDeque<usize>,
    uplink_busy: bool,
    downlink_free: Nanos,
    tick_at: Option<Nanos>,
    served: u32,
    sent: u64,
    duplicate: u64,
    copies_at: Vec<Duration>,
    done: Option<Duration>,
}

/// The world.
pub struct World {
    plan: Plan,
    layouts: Vec<Arc<Layout>>,
    peers: Vec<Peer>,
    dice: Dice,
    now: Nanos,
    /// By time, then by order of planning.
    agenda: BinaryHeap<Reverse<(Nanos, u64)>>,
    events: BTreeMap<u64, Event>,
    planned: u64,
    handled: u64,
    lives: u64,
    bad: BTreeMap<(usize, usize), u32>,
    dropped: Vec<(usize, usize, Why)>,
    digest: u64,
}

impl World {
    /// Builds the world of a plan.
    ///
    /// # Panics
    /// Where a content has too many pieces.
    pub fn new(plan: Plan) -> Self {
        let layouts: Vec<Arc<Layout>> = plan
            .contents
            .iter()
            .map(|sizes| Arc::new(Layout::new(sizes.iter().copied()).expect("a content that fits")))
            .collect();
        let mut dice = Dice(plan.seed);
        let peers =
            plan.people.iter().map(|person| Peer::new(person, &layouts, &mut dice)).collect();
        let mut world = Self {
            plan,
            layouts,
            peers,
            dice,
            now: 0,
            agenda: BinaryHeap::new(),
            events: BTreeMap::new(),
            planned: 0,
            handled: 0,
            lives: 0,
            bad: BTreeMap::new(),
            dropped: Vec::new(),
            digest: 0,
        };
        for p in 0..world.peers.len() {
            let person = &world.peers[p].person;
            let (joins, dies) = (nanos(person.joins), person.dies);
            world.plan_at(joins, Event::Join(p));
            if let Death::At(at) = dies {
                world.plan_at(nanos(at), Event::Die(p));
            }
        }
        world
    }

    /// Runs until everyone living and honest has all it wants, or until `limit`.
    pub fn run(mut self, limit: Duration) -> Report {
        while !self.is_over() {
            let Some(Reverse((at, number))) = self.agenda.pop() else { break };
            if at > nanos(limit) {
                break;
            }
            self.now = at;
            self.handled += 1;
            if let Some(event) = self.events.remove(&number) {
                self.handle(event);
            }
        }
        Report {
            done: self.peers.iter().map(|p| p.done).collect(),
            sent: self.peers.iter().map(|p| p.sent).collect(),
            duplicate: self.peers.iter().map(|p| p.duplicate).collect(),
            bad: self.bad,
            dropped: self.dropped,
            fetched: self
                .peers
                .iter()
                .map(|p| p.swarms.iter().map(|(c, s)| (*c, s.counts())).collect())
                .collect(),
            shared: self.peers.iter().map(|p| p.sharing.counts()).collect(),
            copies_at: self.peers.iter().map(|p| p.copies_at.clone()).collect(),
            events: self.handled,
            digest: self.digest,
        }
    }

    fn is_over(&self) -> bool {
        let waits = |p: &Peer| {
            let dead = !p.alive && nanos(p.person.joins) < self.now;
            p.done.is_none() && !dead && p.person.nature == Nature::Honest
        };
        !self.peers.iter().any(waits)
    }

    fn moment(&self) -> Moment {
        Moment::from_micros(self.now / 1_000)
    }

    fn plan_at(&mut self, at: Nanos, event: Event) {
        self.planned += 1;
        self.agenda.push(Reverse((at.max(self.now), self.planned)));
        self.events.insert(self.planned, event);
    }

    fn note(&mut self, what: u64, a: usize, b: usize) {
        let word = self.now ^ (what << 56) ^ ((a as u64) << 40) ^ ((b as u64) << 24);
        self.digest = Dice(self.digest ^ word).next();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Join(p) => {
                self.peers[p].alive = true;
                self.search(p);
                self.act(p);
            }
            Event::Die(p) => self.die(p),
            Event::Connect(a, b) => self.connect(a, b),
            Event::UplinkFree(p, to) => {
                self.peers[p].uplink_busy = false;
                self.pump(p, to);
                self.uplink(p);
            }
            Event::Arrives { from, to, life, chunk } => {
                let peer = &mut self.peers[to];
                let took = u64::from(chunk.bytes) * 1_000_000_000 / peer.person.line.down;
                peer.downlink_free = peer.downlink_free.max(self.now) + took;
                let at = peer.downlink_free;
                self.plan_at(at, Event::TakenIn { from, to, life, chunk });
            }
            Event::TakenIn { from, to, life, chunk } => {
                let at = self.now + self.delay(from, to);
                let bytes = chunk.bytes;
                self.plan_at(at, Event::Acknowledged { from, to, life, bytes });
                if self.peers[to].connected.get(&from) == Some(&life)
                    && let Some(frame) = chunk.ends
                {
                    self.receive(from, to, frame);
                    self.act(to);
                }
            }
            Event::Acknowledged { from, to, life, bytes } => {
                if self.peers[from].connected.get(&to) == Some(&life) {
                    let socket = self.peers[from].sockets.get_mut(&to);
                    if let Some(socket) = socket {
                        socket.unacknowledged -= u64::from(bytes);
                    }
                    self.pump(from, to);
                }
            }
            Event::Verified { from, to, content, piece, bad } => {
                self.verified(from, to, content, piece, bad);
                self.act(to);
            }
            Event::Tick(p) => {
                if self.peers[p].tick_at == Some(self.now) {
                    self.peers[p].tick_at = None;
                    let now = self.moment();
                    if self.peers[p].alive {
                        self.peers[p].swarms.values_mut().for_each(|s| s.tick(now));
                        self.peers[p].sharing.tick(now);
                        self.act(p);
                    }
                }
            }
        }
    }

    fn delay(&self, a: usize, b: usize) -> Nanos {
        nanos(self.peers[a].person.line.delay) + nanos(self.peers[b].person.line.delay)
    }

    /// Asks the index for hosts, and dials them.
    fn search(&mut self, p: usize) {
        let mut others: Vec<usize> = (0..self.peers.len())
            .filter(|o| *o != p && self.peers[*o].alive)
            .filter(|o| !self.peers[p].connected.contains_key(o))
            .filter(|o| !self.peers[p].banned.contains(o) && !self.peers[*o].banned.contains(&p))
            .filter(|o| !self.plan.walls.contains(&(p.min(*o), p.max(*o))))
            .collect();
        let room = self.plan.neighbours.saturating_sub(self.peers[p].connected.len());
        for _ in 0..room.min(others.len()) {
            let other = others.swap_remove(self.dice.below(others.len() as u64) as usize);
            let at = self.now + SEARCH + 4 * self.delay(p, other);
            self.plan_at(at, Event::Connect(p, other));
        }
    }

    fn connect(&mut self, a: usize, b: usize) {
        if !self.peers[a].alive || !self.peers[b].alive || self.peers[a].connected.contains_key(&b)
        {
            return;
        }
        self.lives += 1;
        let now = self.moment();
        for (p, o) in [(a, b), (b, a)] {
            let rate = self.peers[p].person.line.up.min(self.peers[o].person.line.down);
            let flight =
                (u128::from(rate) * u128::from(3 * self.delay(p, o)) / 1_000_000_000) as u64;
            let peer = &mut self.peers[p];
            peer.connected.insert(o, self.lives);
            peer.sockets.insert(o, Socket { window: WINDOW + flight, ..Socket::default() });
            peer.sharing.on_host(now, Host(o as u32), peer_id(o));
            let wanted: Vec<u32> =
                peer.swarms.iter().filter(|(_, s)| !s.is_complete()).map(|(c, _)| *c).collect();
            for content in wanted {
                self.say(p, o, Frame::Open(content));
            }
        }
        self.note(1, a, b);
        self.act(a);
        self.act(b);
    }

    fn disconnect(&mut self, a: usize, b: usize) {
        let now = self.moment();
        for (p, o) in [(a, b), (b, a)] {
            let peer = &mut self.peers[p];
            if peer.connected.remove(&o).is_none() {
                continue;
            }
            peer.sockets.remove(&o);
            peer.ring.retain(|to| *to != o);
            peer.shown.retain(|(to, _)| *to != o);
            peer.opened.retain(|(to, _)| *to != o);
            peer.sharing.on_gone(now, Host(o as u32));
            peer.swarms.values_mut().for_each(|s| s.on_gone(now, Host(o as u32)));
        }
    }

    fn die(&mut self, p: usize) {
        self.note(2, p, 0);
        self.peers[p].alive = false;
        let others: Vec<usize> = self.peers[p].connected.keys().copied().collect();
        for other in others {
            self.disconnect(p, other);
            self.act(other);
        }
    }

    fn say(&mut self, from: usize, to: usize, frame: Frame) {
        if let Some(socket) = self.peers[from].sockets.get_mut(&to) {
            socket.control.push_back(frame);
            self.pump(from, to);
        }
    }

    /// Fills the send buffer: control frames first, then the piece under way, then the next.
    fn pump(&mut self, from: usize, to: usize) {
        let mut sent = Vec::new();
        let peer = &mut self.peers[from];
        let Some(socket) = peer.sockets.get_mut(&to) else { return };
        while socket.unacknowledged < socket.window && socket.unsent < UNSENT {
            let chunk = if let Some((content, piece, left)) = socket.writing {
                let bytes = left.min(CHUNK);
                let last = bytes == left;
                socket.writing = (!last).then_some((content, piece, left - bytes));
                if last {
                    sent.push((content, piece));
                    peer.served += 1;
                }
                let bad = match peer.person.nature {
                    Nature::Poisoner { after, every } => {
                        peer.served > after && peer.served.is_multiple_of(every)
                    }
                    _ => false,
                };
                peer.sent += u64::from(bytes);
                Chunk { bytes, ends: last.then_some(Frame::Piece { content, piece, bad }) }
            } else if let Some(frame) = socket.control.pop_front() {
                Chunk { bytes: frame.size(), ends: Some(frame) }
            } else if let Some(next) = socket.pieces.pop_front() {
                socket.writing = Some(next);
                continue;
            } else {
                break;
            };
            socket.unacknowledged += u64::from(chunk.bytes);
            socket.unsent += u64::from(chunk.bytes);
            socket.buffer.push_back(chunk);
        }
        if !socket.queued && !socket.buffer.is_empty() {
            socket.queued = true;
            peer.ring.push_back(to);
        }
        self.uplink(from);
        let now = self.moment();
        for (content, piece) in &sent {
            self.peers[from].sharing.on_sent(now, Host(to as u32), *content, *piece);
        }
        if !sent.is_empty() {
            let all: u64 = self.layouts.iter().map(|l| l.total()).sum();
            if self.peers[from].sent >= all * (self.peers[from].copies_at.len() as u64 + 1) {
                self.peers[from].copies_at.push(Duration::from_nanos(self.now));
            }
            if let Death::AfterCopies(thousandths) = self.peers[from].person.dies
                && self.peers[from].sent * 1_000 >= all * thousandths
            {
                self.plan_at(self.now, Event::Die(from));
                self.peers[from].person.dies = Death::Never;
            }
            self.act(from);
        }
    }

    /// Puts the next chunk on the line, a socket after the other.
    fn uplink(&mut self, p: usize) {
        let peer = &mut self.peers[p];
        if peer.uplink_busy {
            return;
        }
        let Some(to) = peer.ring.pop_front() else { return };
        let Some(socket) = peer.sockets.get_mut(&to) else { return };
        let Some(chunk) = socket.buffer.pop_front() else { return };
        socket.unsent -= u64::from(chunk.bytes);
        socket.queued = !socket.buffer.is_empty();
        if socket.queued {
            peer.ring.push_back(to);
        }
        peer.uplink_busy = true;
        let took = u64::from(chunk.bytes) * 1_000_000_000 / peer.person.line.up;
        let Some(life) = peer.connected.get(&to).copied() else { return };
        let arrives = self.now + took + self.delay(p, to);
        self.plan_at(self.now + took, Event::UplinkFree(p, to));
        self.plan_at(arrives, Event::Arrives { from: p, to, life, chunk });
    }

    fn receive(&mut self, from: usize, to: usize, frame: Frame) {
        let (now, host) = (self.moment(), Host(from as u32));
        let peer = &mut self.peers[to];
        match frame {
            Frame::Open(content) => {
                if peer.shares(content) {
                    peer.opened.insert((from, content));
                    self.say(to, from, Frame::Opened(content));
                    self.peers[to].sharing.on_open(now, host, content);
                }
            }
            Frame::Opened(content) => {
                if let Some(swarm) = peer.swarms.get_mut(&content) {
                    swarm.on_host(now, host);
                    let have = match peer.person.nature {
                        Nature::Hoarder => Bitfield::none(swarm.have().len()),
                        _ => swarm.have().clone(),
                    };
                    self.say(to, from, Frame::TheirHave(content, have));
                }
            }
            Frame::TheirHave(content, have) => {
                peer.sharing.on_their_have(now, host, content, &have);
            }
            Frame::TheirHaveMore(content, pieces) => {
                peer.sharing.on_their_have_more(now, host, content, &pieces);
            }
            Frame::Want(content, pieces) => match peer.person.nature {
                Nature::Silent | Nature::Hoarder => {}
                Nature::Busy => {
                    self.say(to, from, Frame::Busy(content, pieces, Duration::from_millis(10)));
                }
                Nature::Honest | Nature::Poisoner { .. } => {
                    peer.sharing.on_want(now, host, content, &pieces);
                }
            },
            Frame::Cancel(content, pieces) => peer.sharing.on_cancel(now, host, content, &pieces),
            Frame::Close(content) => {
                peer.opened.remove(&(from, content));
                peer.shown.remove(&(from, content));
                peer.sharing.on_closed(now, host, content);
                if let Some(socket) = peer.sockets.get_mut(&from) {
                    socket.pieces.retain(|(c, ..)| *c != content);
                }
            }
            Frame::Have(content, have) => {
                peer.with_swarm(content, |swarm| swarm.on_have(now, host, &have));
            }
            Frame::HaveMore(content, pieces) => {
                peer.with_swarm(content, |swarm| swarm.on_have_more(now, host, &pieces));
            }
            Frame::Busy(content, pieces, wait) => {
                peer.with_swarm(content, |swarm| swarm.on_busy(now, host, &pieces, wait));
            }
            Frame::Grant(content, pieces) => {
                if peer.person.nature != Nature::Hoarder {
                    peer.with_swarm(content, |swarm| swarm.on_granted(now, host, &pieces));
                }
            }
            Frame::Piece { content, piece, bad } => {
                let at = self.now + VERIFY;
                self.plan_at(at, Event::Verified { from, to, content, piece, bad });
            }
        }
    }

    fn verified(&mut self, from: usize, to: usize, content: u32, piece: Piece, bad: bool) {
        let now = self.moment();
        self.note(3, to, piece.0 as usize);
        let peer = &mut self.peers[to];
        if !peer.alive || !peer.connected.contains_key(&from) {
            return; // a connection that sent one bad piece is read no further
        }
        let Some(swarm) = peer.swarms.get_mut(&content) else { return };
        let arrived = match (bad, swarm.have().has(piece)) {
            (true, _) => Arrived::Bad,
            (false, true) => Arrived::Duplicate,
            (false, false) => Arrived::New,
        };
        if bad {
            *self.bad.entry((to, from)).or_default() += 1;
        }
        if arrived == Arrived::Duplicate {
            peer.duplicate += u64::from(self.layouts[content as usize].len_of(piece));
        }
        swarm.on_piece(now, Host(from as u32), piece, arrived);
    }

    /// Carries out what a peer's machines ask for.
    fn act(&mut self, p: usize) {
        if !self.peers[p].alive {
            return;
        }
        loop {
            let mut quiet = true;
            let contents: Vec<u32> = self.peers[p].swarms.keys().copied().collect();
            for content in contents {
                let next = |peer: &mut Peer| peer.swarms.get_mut(&content)?.poll_output();
                while let Some(output) = next(&mut self.peers[p]) {
                    quiet = false;
                    self.fetch(p, content, output);
                }
            }
            while let Some(output) = self.peers[p].sharing.poll_output() {
                quiet = false;
                self.serve(p, output);
            }
            if quiet {
                break;
            }
        }
        if self.plan.check_every > 0 && self.handled.is_multiple_of(self.plan.check_every) {
            self.peers[p].swarms.values().for_each(Swarm::check);
            self.peers[p].sharing.check();
        }
        let peer = &mut self.peers[p];
        let due = peer.swarms.values().filter_map(Swarm::next_deadline);
        let due = due.chain(peer.sharing.next_deadline()).min().map(|at| at.as_micros() * 1_000);
        if let Some(at) = due.map(|at| at.max(self.now + 1_000))
            && peer.tick_at.is_none_or(|planned| at < planned)
        {
            peer.tick_at = Some(at);
            self.plan_at(at, Event::Tick(p));
        }
    }

    fn fetch(&mut self, p: usize, content: u32, output: swarm::Output) {
        match output {
            swarm::Output::Ask { host, pieces } => {
                self.say(p, host.0 as usize, Frame::Want(content, pieces));
            }
            swarm::Output::Cancel { host, pieces } => {
                self.say(p, host.0 as usize, Frame::Cancel(content, pieces));
            }
            swarm::Output::Drop { host, why } => {
                let other = host.0 as usize;
                self.dropped.push((p, other, why));
                match why {
                    Why::Poison => {
                        self.peers[p].banned.insert(other);
                        self.disconnect(p, other);
                        self.act(other);
                    }
                    Why::Silent => self.say(p, other, Frame::Close(content)),
                }
            }
            swarm::Output::Announce(pieces) => {
                self.peers[p].sharing.on_held(content, &pieces);
                let shown: Vec<usize> = self.peers[p].shown_to(content);
                for other in shown {
                    self.say(p, other, Frame::HaveMore(content, pieces.clone()));
                }
                let hosts: Vec<usize> = self.peers[p].connected.keys().copied().collect();
                for other in hosts {
                    self.say(p, other, Frame::TheirHaveMore(content, pieces.clone()));
                }
            }
            swarm::Output::NeedHosts => self.search(p),
            swarm::Output::Complete => {
                let hosts: Vec<usize> = self.peers[p].connected.keys().copied().collect();
                for other in hosts {
                    self.say(p, other, Frame::Close(content));
                }
                let peer = &mut self.peers[p];
                if peer.swarms.values().all(Swarm::is_complete) {
                    peer.done.get_or_insert(Duration::from_nanos(self.now));
                }
            }
        }
    }

    fn serve(&mut self, p: usize, output: sharing::Output) {
        match output {
            sharing::Output::Serve { host, content, piece } => {
                assert!(
                    self.peers[p].holds(content, piece),
                    "{p} serves {piece:?}, which it has not"
                );
                let bytes = self.layouts[content as usize].len_of(piece);
                let to = host.0 as usize;
                if let Some(socket) = self.peers[p].sockets.get_mut(&to) {
                    socket.pieces.push_back((content, piece, bytes));
                    self.pump(p, to);
                }
            }
            sharing::Output::Busy { host, content, pieces, wait } => {
                self.say(p, host.0 as usize, Frame::Busy(content, pieces, wait));
            }
            sharing::Output::Grant { host, content, pieces } => {
                self.say(p, host.0 as usize, Frame::Grant(content, pieces));
            }
            sharing::Output::ShowHave { host, content } => {
                let to = host.0 as usize;
                self.peers[p].shown.insert((to, content));
                let have = self.peers[p].claims(content, self.layouts[content as usize].pieces());
                self.say(p, to, Frame::Have(content, have));
            }
        }
    }
}

impl Peer {
    fn new(person: &Person, layouts: &[Arc<Layout>], dice: &mut Dice) -> Self {
        let mut sharing = Sharing::new(dice.next());
        let mut swarms = BTreeMap::new();
        for content in &person.holds {
            let layout = &layouts[*content as usize];
            let all = Bitfield::all(layout.pieces());
            sharing.add(*content, Arc::clone(layout), &all, true);
        }
        for content in &person.wants {
            let layout = &layouts[*content as usize];
            let none = Bitfield::none(layout.pieces());
            sharing.add(*content, Arc::clone(layout), &none, false);
            swarms.insert(*content, Swarm::new(Arc::clone(layout), none, dice.next()));
        }
        Self {
            person: person.clone(),
            alive: false,
            swarms,
            sharing,
            connected: BTreeMap::new(),
            shown: BTreeSet::new(),
            opened: BTreeSet::new(),
            banned: BTreeSet::new(),
            sockets: BTreeMap::new(),
            ring: VecDeque::new(),
            uplink_busy: false,
            downlink_free: 0,
            tick_at: None,
            served: 0,
            sent: 0,
            duplicate: 0,
            copies_at: Vec::new(),
            done: person.wants.is_empty().then_some(Duration::ZERO),
        }
    }

    fn shares(&self, content: u32) -> bool {
        self.person.holds.contains(&content) || self.swarms.contains_key(&content)
    }

    fn holds(&self, content: u32, piece: Piece) -> bool {
        self.person.holds.contains(&content)
            || self.swarms.get(&content).is_some_and(|s| s.have().has(piece))
    }

    /// What it says it holds.
    fn claims(&self, content: u32, pieces: u32) -> Bitfield {
        match (self.person.nature, self.swarms.get(&content)) {
            (Nature::Honest, Some(swarm)) => swarm.have().clone(),
            _ => Bitfield::all(pieces),
        }
    }

    fn shown_to(&self, content: u32) -> Vec<usize> {
        self.shown.iter().filter(|(_, c)| *c == content).map(|(to, _)| *to).collect()
    }

    fn with_swarm(&mut self, content: u32, tell: impl FnOnce(&mut Swarm)) {
        if let Some(swarm) = self.swarms.get_mut(&content) {
            tell(swarm);
        }
    }
}

fn peer_id(p: usize) -> PeerId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&(p as u64).to_be_bytes());
    PeerId(id)
}

const fn nanos(time: Duration) -> Nanos {
    time.as_nanos() as u64
}
