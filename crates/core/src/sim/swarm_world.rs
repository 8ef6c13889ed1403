//! Owns a world of peers that fetch and serve contents over links of given speed and delay, with the
//! real `Swarm` and `Sharing` in every one of them. Never moves a byte: pieces are numbers here.
//!
//! A connection is one socket each way: a bounded send buffer, filled chunk by chunk. An uplink sends
//! the chunks of its sockets in turn, a downlink takes them in as they come; what is said besides
//! pieces waits behind what its socket holds, and costs the uplink its bytes. Hosts are found as the
//! program finds them: the real [`Catalog`] answers searches, hosts tell each other of further ones.
//! Left out: packet loss, slow start, framing (4.6 % on Ethernet) and CPU.
//!
//! [`Catalog`]: crate::catalog::Catalog

mod agenda;
pub(super) mod outside;
mod peer;
#[cfg(test)]
mod tests;
mod way;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::bitfield::Bitfield;
use crate::catalog::{Asker, Catalog, Limits};
use crate::dice::Dice;
use crate::id::{ContentId, MemberNumber, Piece};
use crate::layout::Layout;
use crate::sharing;
use crate::swarm::{self, Arrived, Host, Waiting, Why};
use crate::time::{Duration, Moment};
use crate::wire::datagram::{HELD_ALL, Item, Search, Target};
use agenda::Agenda;
use peer::Peer;
use way::{Frame, Part, Way};

/// What goes onto a link at once, where a plan says nothing else.
const CHUNK: u32 = 16 << 10;
/// Hash a piece and write it.
const VERIFY: Nanos = 300_000;
/// Ask the index for hosts.
const SEARCH: Nanos = 20_000_000;
/// A peer asks the index no more often than this, but when it needs hosts.
const SEARCH_EVERY: Nanos = 3_000_000_000;
/// It looks so often whether it has hosts enough, …
const TEND: Nanos = 500_000_000;
/// … and dials a host again that was up and went after this.
const AGAIN: Nanos = 200_000_000;
/// A peer's program looks at its machines' deadlines at least this often, …
const LOOK: Nanos = 1_000_000;
/// A connection on which nothing comes is given up after this.
const SILENCE: Nanos = 45_000_000_000;
/// Hosts that a host tells of at most.
const MOST_TOLD: usize = crate::wire::stream::MAX_HOSTS;
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
    /// Claims to hold everything from the start, and serves what it has of it.
    Liar,
    /// As it should; but its uplink stands still for `lasts` after every `every`.
    Stalling {
        /// So long it sends, …
        every: Duration,
        /// … and so long it does not.
        lasts: Duration,
    },
}

impl Nature {
    /// Whether it does what it should, as well as it can.
    pub const fn is_honest(self) -> bool {
        matches!(self, Self::Honest | Self::Stalling { .. })
    }
}

/// When a peer dies. Its connections break at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Death {
    /// Never.
    Never,
    /// So long after the beginning.
    At(Duration),
    /// So long after the beginning, and without a word: its connections stand until they are given up.
    Vanishes(Duration),
    /// After it has sent so many thousandths of all contents.
    AfterCopies(u64),
    /// As soon as it has all it wants.
    WhenDone,
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
    /// Connections a peer that fetches opens at most.
    pub neighbours: usize,
    /// What goes onto a link at once, in bytes: the more, the faster and the coarser.
    pub chunk: u32,
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
    /// When each person had 99 of 100 of the pieces it wanted.
    pub nearly: Vec<Option<Duration>>,
    /// When all together had one, two … tenths of what they wanted.
    pub tenths: Vec<Duration>,
    /// The longest time that each person waited for a new piece.
    pub waited: Vec<Duration>,
    /// Pieces it holds of what it wanted.
    pub held: Vec<u32>,
    /// Pieces that were sent whole by those who held them from the start, counted once.
    pub left_home: usize,
    /// What each person who did not complete waits for.
    pub waiting: Vec<Option<Waiting>>,
    /// Connections each person has.
    pub neighbours: Vec<usize>,
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
            neighbours: 16,
            chunk: CHUNK,
            walls: BTreeSet::new(),
            seed,
            check_every: 997,
        }
    }

    /// The shortest time in which one content can reach all who want it, were it a fluid:
    /// max(F/u_seed, F/min d, N·F/(u_seed + Σu)) (Kumar and Ross 2006). Counts honest people only.
    pub fn bound(&self, content: u32) -> Duration {
        let honest = || self.people.iter().filter(|p| p.nature.is_honest());
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

enum Event {
    Join(u32),
    Die(u32),
    Vanish(u32),
    /// The index answers.
    Answer(u32),
    /// Somebody dialled is reached.
    Connect(u32, u32),
    Tend(u32),
    Tick(u32),
    /// The uplink has sent a chunk.
    Sent(u32),
    /// A chunk has come to the downlink.
    Arrives {
        way: u32,
        bytes: u32,
        ends: Option<(Part, bool)>,
    },
    Verified {
        way: u32,
        part: Part,
        bad: bool,
    },
    Writable(u32),
    /// A way that was cut is given up.
    Sever(u32),
    Says(u32, Frame),
}

/// The world.
pub struct World {
    plan: Plan,
    layouts: Vec<Arc<Layout>>,
    /// Where hosts are found; `None`: somewhere outside, by [`outside::Wish`].
    index: Option<Catalog>,
    wishes: std::collections::VecDeque<outside::Wish>,
    dice: Dice,
    peers: Vec<Peer>,
    ways: Vec<Way>,
    now: Nanos,
    agenda: Agenda<Event>,
    handled: u64,
    /// Honest people that are not done and not dead.
    unfinished: usize,
    left_home: Vec<Bitfield>,
    /// Bytes that all together want, and have.
    wanted: u64,
    had: u64,
    tenths: Vec<Duration>,
    bad: BTreeMap<(usize, usize), u32>,
    dropped: Vec<(usize, usize, Why)>,
    digest: u64,
}

impl World {
    /// Builds the world of a plan.
    ///
    /// # Panics
    /// Where a content has too many pieces, or there are more than 32.
    pub fn new(plan: Plan) -> Self {
        assert!(plan.contents.len() <= 32, "contents are bits of a word here");
        let layouts: Vec<Arc<Layout>> = plan
            .contents
            .iter()
            .map(|sizes| Arc::new(Layout::new(sizes.iter().copied()).expect("a content that fits")))
            .collect();
        let mut dice = Dice(plan.seed);
        let peers: Vec<Peer> =
            plan.people.iter().map(|person| Peer::new(person, &layouts, &mut dice)).collect();
        let size = |content: &u32| layouts[*content as usize].total();
        let wanted = plan.people.iter().flat_map(|p| &p.wants).map(size).sum();
        let mut world = Self {
            index: Some(Catalog::new(Limits::default(), 0, dice.next())),
            wishes: std::collections::VecDeque::new(),
            unfinished: peers.iter().filter(|p| p.is_waited_for()).count(),
            left_home: layouts.iter().map(|l| Bitfield::none(l.pieces())).collect(),
            plan,
            layouts,
            dice,
            peers,
            ways: Vec::new(),
            now: 0,
            agenda: Agenda::new(),
            handled: 0,
            wanted,
            had: 0,
            tenths: Vec::new(),
            bad: BTreeMap::new(),
            dropped: Vec::new(),
            digest: 0,
        };
        for p in 0..world.peers.len() {
            let person = &world.peers[p].person;
            let (joins, dies) = (nanos(person.joins), person.dies);
            world.agenda.plan(joins, Event::Join(p as u32));
            match dies {
                Death::At(at) => world.agenda.plan(nanos(at), Event::Die(p as u32)),
                Death::Vanishes(at) => world.agenda.plan(nanos(at), Event::Vanish(p as u32)),
                Death::Never | Death::AfterCopies(_) | Death::WhenDone => {}
            }
        }
        world
    }

    /// Runs until everyone living and honest has all it wants, or until `limit`.
    pub fn run(mut self, limit: Duration) -> Report {
        while self.unfinished > 0 {
            let Some((at, event)) = self.agenda.next().filter(|(at, _)| *at <= nanos(limit)) else {
                break;
            };
            self.now = at;
            self.handled += 1;
            self.handle(event);
        }
        self.report()
    }

    fn report(self) -> Report {
        let now = self.moment();
        let of = |p: &Peer| p.swarms.iter().map(|(c, s)| (*c, s.counts())).collect();
        let waits = |p: &Peer| p.swarms.iter().find_map(|(_, s)| s.waiting(now));
        Report {
            done: self.peers.iter().map(|p| p.done).collect(),
            nearly: self.peers.iter().map(|p| p.nearly).collect(),
            tenths: self.tenths,
            waited: self.peers.iter().map(|p| Duration::from_nanos(p.waited)).collect(),
            held: self.peers.iter().map(|p| p.progress().0).collect(),
            left_home: self.left_home.iter().map(|left| left.count() as usize).sum(),
            waiting: self.peers.iter().map(waits).collect(),
            neighbours: self.peers.iter().map(|p| p.ways.len()).collect(),
            sent: self.peers.iter().map(|p| p.sent).collect(),
            duplicate: self.peers.iter().map(|p| p.duplicate).collect(),
            bad: self.bad,
            dropped: self.dropped,
            fetched: self.peers.iter().map(of).collect(),
            shared: self.peers.iter().map(|p| p.sharing.counts()).collect(),
            copies_at: self.peers.iter().map(|p| p.copies_at.clone()).collect(),
            events: self.handled,
            digest: self.digest,
        }
    }

    fn moment(&self) -> Moment {
        Moment::from_micros(self.now / 1_000)
    }

    fn peer(&mut self, p: u32) -> &mut Peer {
        &mut self.peers[p as usize]
    }

    fn way(&mut self, way: u32) -> &mut Way {
        &mut self.ways[way as usize]
    }

    fn note(&mut self, what: u64, a: u32, b: u32) {
        let word = self.now ^ (what << 56) ^ (u64::from(a) << 40) ^ (u64::from(b) << 24);
        self.digest = Dice(self.digest ^ word).next();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Join(p) => self.join(p),
            Event::Die(p) => self.die(p),
            Event::Vanish(p) => self.vanish(p),
            Event::Answer(p) => self.answer(p),
            Event::Connect(a, b) => self.connect(a, b),
            Event::Tend(p) => self.tend(p),
            Event::Tick(p) => self.tick(p),
            Event::Sent(p) => {
                let way = self.peer(p).on_line.take();
                if let Some(way) = way {
                    self.pump(way);
                }
                self.uplink(p);
            }
            Event::Arrives { way, bytes, ends } => {
                let (from, to) = (&self.ways[way as usize], self.ways[way as usize].to);
                if !from.is_open || from.is_cut {
                    return;
                }
                let peer = &mut self.peers[to as usize];
                let took = u64::from(bytes) * 1_000_000_000 / peer.person.line.down;
                peer.downlink_free = peer.downlink_free.max(self.now) + took;
                let at = peer.downlink_free;
                if let Some((part, bad)) = ends {
                    self.agenda.plan(at + VERIFY, Event::Verified { way, part, bad });
                }
                let from = self.way(way);
                let was = from.unblocks();
                from.acknowledge(at + from.delay, bytes);
                if let (None, Some(at)) = (was, from.unblocks()) {
                    self.agenda.plan(at, Event::Writable(way));
                }
            }
            Event::Verified { way, part, bad } => {
                let to = self.ways[way as usize].to;
                self.verified(way, part, bad);
                self.act(to);
            }
            Event::Writable(way) => self.pump(way),
            Event::Sever(way) => self.sever(way),
            Event::Says(way, frame) => {
                if self.ways[way as usize].is_open && !self.ways[way as usize].is_cut {
                    let to = self.ways[way as usize].to;
                    self.hear(way, frame);
                    self.act(to);
                }
            }
        }
    }

    fn join(&mut self, p: u32) {
        self.peer(p).alive = true;
        self.peer(p).last_new = self.now;
        for content in self.peer(p).person.holds.clone() {
            self.register(p, content, HELD_ALL);
        }
        if !self.peer(p).swarms.is_empty() {
            self.search(p);
            self.begin_tending(p);
        }
        self.act(p);
    }

    fn begin_tending(&mut self, p: u32) {
        if !std::mem::replace(&mut self.peer(p).tending, true) {
            let at = self.now + TEND;
            self.agenda.plan(at, Event::Tend(p));
        }
    }

    fn vanish(&mut self, p: u32) {
        self.note(5, p, 0);
        if std::mem::replace(&mut self.peer(p).alive, false) {
            self.unfinished -= usize::from(self.peer(p).is_waited_for());
            let ways: Vec<u32> = self.peer(p).ways.values().copied().collect();
            for way in ways {
                let back = self.way(way).back;
                (self.way(way).is_cut, self.way(back).is_cut) = (true, true);
                self.agenda.plan(self.now + SILENCE, Event::Sever(way));
            }
        }
    }

    fn die(&mut self, p: u32) {
        self.note(2, p, 0);
        if !std::mem::replace(&mut self.peer(p).alive, false) {
            return;
        }
        self.unfinished -= usize::from(self.peer(p).is_waited_for());
        if let Some(index) = &mut self.index {
            index.evict(MemberNumber(p));
        }
        let ways: Vec<(u32, u32)> = self.peer(p).ways.iter().map(|(to, w)| (*to, *w)).collect();
        for (other, way) in ways {
            self.disconnect(way);
            self.act(other);
        }
    }

    /// Tells the index how much of a content is here.
    fn register(&mut self, p: u32, content: u32, held: u16) {
        let (member, peer) = (MemberNumber(p), &mut self.peers[p as usize]);
        let Some(index) = &mut self.index else {
            return self.wishes.push_back(outside::Wish::Register { peer: p, content });
        };
        let octets = (10 << 24 | p).to_be_bytes();
        let (first, load) = (peer.registered.is_empty(), peer.sharing.load());
        if first {
            index.report(member, peer::peer_id(p), (octets, 7_701).into(), load, true);
        }
        peer.registered.insert(content);
        let size = self.layouts[content as usize].total();
        let item = Item { id: content_id(content), size, held, name: None };
        index.register(member, &item, |_| true).expect("the index has room");
        while index.poll_journal().is_some() {}
    }

    /// Asks the index for hosts.
    fn search(&mut self, p: u32) {
        let now = self.now;
        self.peer(p).next_search = now + SEARCH_EVERY;
        self.agenda.plan(now + SEARCH, Event::Answer(p));
    }

    fn answer(&mut self, p: u32) {
        let asker = Asker { member: MemberNumber(p), loopback: false };
        if !self.peer(p).alive {
            return;
        }
        let hosts = self.plan.neighbours.min(Search::MAX_HOSTS.into()) as u8;
        for content in self.peer(p).wanting() {
            let Some(index) = &mut self.index else {
                self.wishes.push_back(outside::Wish::Search { peer: p, content, hosts });
                continue;
            };
            let search = Search { target: Target::Id(content_id(content)), hosts, avoid: vec![] };
            let Ok(found) = index.search(asker, &search) else { continue };
            let hosts = found
                .hosts
                .iter()
                .map(|host| u32::from_be_bytes(host.peer.0[8..12].try_into().expect("four bytes")));
            let hosts: Vec<u32> = hosts.collect();
            self.learn(p, hosts);
        }
    }

    /// Hears of hosts, and dials them while it has too few.
    fn learn(&mut self, p: u32, hosts: Vec<u32>) {
        let now = self.moment();
        for other in hosts.into_iter().filter(|other| *other != p) {
            let peer = self.peer(p);
            peer.known.entry(other).or_insert(0);
            // Who stood by already may not have had any of it when the connection was made.
            let Some(way) = peer.ways.get(&other).copied() else { continue };
            let mut wanting = peer.wanting();
            wanting.retain(|content| {
                peer.swarm(*content).is_some_and(|swarm| swarm.view(now, Host(other)).is_none())
            });
            wanting.into_iter().for_each(|content| self.say(way, Frame::Open(content)));
        }
        self.dial(p);
    }

    fn dial(&mut self, p: u32) {
        let now = self.now;
        let peer = &mut self.peers[p as usize];
        let room = self.plan.neighbours.saturating_sub(peer.ways.len());
        let free = |who: &u32| !peer.ways.contains_key(who) && !peer.banned.contains(who);
        let known = peer.known.iter().filter(|(who, at)| **at <= now && free(who));
        let mut known: Vec<u32> = known.map(|(who, _)| *who).collect();
        for _ in 0..room.min(known.len()) {
            let who = known.swap_remove(self.dice.below(known.len() as u64) as usize);
            let took = 4 * self.delay(p, who);
            // Until then it is not dialled again.
            self.peer(p).known.insert(who, now + took + AGAIN);
            self.agenda.plan(now + took, Event::Connect(p, who));
        }
    }

    fn delay(&self, a: u32, b: u32) -> Nanos {
        let of = |p: u32| nanos(self.peers[p as usize].person.line.delay);
        of(a) + of(b)
    }

    fn tend(&mut self, p: u32) {
        let peer = self.peer(p);
        if !peer.alive || peer.wanting().is_empty() {
            peer.tending = false;
            return;
        }
        self.dial(p);
        let few = self.peer(p).ways.len() < self.plan.neighbours / 2;
        if few && self.peer(p).next_search <= self.now {
            self.search(p);
        }
        let at = self.now + TEND;
        self.agenda.plan(at, Event::Tend(p));
    }

    fn tick(&mut self, p: u32) {
        let (now, at) = (self.moment(), self.now);
        let peer = self.peer(p);
        if peer.tick_at == Some(at) {
            peer.tick_at = None;
            if peer.alive && peer.due(at).is_some_and(|due| due <= at) {
                peer.swarms.iter_mut().for_each(|(_, s)| s.tick(now));
                peer.sharing.tick(now);
            }
            self.act(p);
        }
    }

    fn connect(&mut self, a: u32, b: u32) {
        let delay = self.delay(a, b);
        let hates = |a: &Peer, b: u32| a.banned.contains(&b) || a.ways.contains_key(&b);
        if !self.peer(a).alive
            || !self.peer(b).alive
            || hates(self.peer(a), b)
            || hates(self.peer(b), a)
            || self.plan.walls.contains(&(a.min(b) as usize, a.max(b) as usize))
        {
            return;
        }
        match self.index {
            Some(_) => self.greet(a, b, delay),
            None => self.wishes.push_back(outside::Wish::Greet { dialler: a, dialled: b }),
        }
    }

    /// Both are up and believe each other.
    fn greet(&mut self, a: u32, b: u32, delay: Nanos) {
        let now = self.moment();
        let first = self.ways.len() as u32;
        for (p, o, way, back) in [(a, b, first, first + 1), (b, a, first + 1, first)] {
            let (peer, other) = (&self.peers[p as usize].person, &self.peers[o as usize].person);
            let rate = peer.line.up.min(other.line.down);
            let mut new = Way::new(p, o, back, delay, rate);
            new.of_seed = other.holds.iter().fold(0, |bits, content| bits | 1 << content);
            self.ways.push(new);
            let peer = self.peer(p);
            peer.ways.insert(o, way);
            peer.sharing.on_host(now, Host(o), peer::peer_id(o));
        }
        for (p, way) in [(a, first), (b, first + 1)] {
            for content in self.peer(p).wanting() {
                self.say(way, Frame::Open(content));
            }
        }
        self.note(1, a, b);
        self.act(a);
        self.act(b);
    }

    fn disconnect(&mut self, way: u32) {
        let (now, again) = (self.moment(), self.now + AGAIN);
        for way in [way, self.ways[way as usize].back] {
            let from = self.way(way);
            let (p, o) = (from.from, from.to);
            from.close();
            let peer = self.peer(p);
            peer.ways.remove(&o);
            peer.ring.retain(|w| *w != way);
            peer.known.entry(o).and_modify(|at| *at = again);
            peer.sharing.on_gone(now, Host(o));
            peer.swarms.iter_mut().for_each(|(_, s)| s.on_gone(now, Host(o)));
        }
    }

    fn say(&mut self, way: u32, frame: Frame) {
        let from = &mut self.ways[way as usize];
        if !from.is_open {
            return;
        }
        let peer = &mut self.peers[from.from as usize];
        // Behind what its socket holds, which goes in turn with the others'; an empty one has its turn
        // after one chunk of each.
        let others = peer.ring.len() as u64;
        let ahead = match from.unsent() {
            0 => others * u64::from(CHUNK),
            unsent => unsent * others.max(1),
        };
        let size = frame.size();
        let time = (ahead + size) * 1_000_000_000 / peer.person.line.up;
        peer.owed += size;
        from.said = from.said.max(self.now.max(peer.free_at) + time + from.delay);
        self.agenda.plan(from.said, Event::Says(way, frame));
    }

    /// Fills the send buffer.
    fn pump(&mut self, way: u32) {
        let now = self.moment();
        let (from, mut any) = (&mut self.ways[way as usize], false);
        if !from.is_open {
            return;
        }
        let was = from.unblocks();
        let (p, to) = (from.from, from.to);
        while let Some(ends) = self.ways[way as usize].write(self.now, self.plan.chunk) {
            if let Some(part) = ends {
                any = true;
                self.peer(p).sharing.on_sent(now, Host(to), part.content, part.piece);
            }
        }
        let (from, peer) = (&mut self.ways[way as usize], &mut self.peers[p as usize]);
        if !from.is_queued && from.has_chunks() {
            from.is_queued = true;
            peer.ring.push_back(way);
        }
        if let (None, Some(at)) = (was.filter(|at| *at > self.now), from.unblocks()) {
            self.agenda.plan(at, Event::Writable(way));
        }
        self.uplink(p);
        if any {
            self.act(p);
        }
    }

    /// Puts the next chunk on the line, a socket after the other.
    fn uplink(&mut self, p: u32) {
        let now = self.now;
        let peer = &mut self.peers[p as usize];
        if peer.on_line.is_some() {
            return;
        }
        let Some(way) = peer.ring.pop_front() else { return };
        let from = &mut self.ways[way as usize];
        let Some(chunk) = from.take() else { return };
        from.is_queued = from.has_chunks();
        if from.is_queued {
            peer.ring.push_back(way);
        }
        let owed = std::mem::take(&mut peer.owed);
        let mut took = (u64::from(chunk.bytes) + owed) * 1_000_000_000 / peer.person.line.up;
        if let Nature::Stalling { every, lasts } = peer.person.nature {
            let (every, lasts) = (nanos(every), nanos(lasts));
            let phase = now % (every + lasts);
            took += if phase >= every { every + lasts - phase } else { 0 };
        }
        let mut bad = false;
        peer.sent += u64::from(chunk.bytes);
        if let Some(part) = chunk.ends {
            peer.served += 1;
            if let Nature::Poisoner { after, every } = peer.person.nature {
                bad = peer.served > after && peer.served.is_multiple_of(every);
            }
            if peer.person.holds.contains(&part.content) {
                self.left_home[part.content as usize].insert(part.piece);
            }
        }
        (peer.on_line, peer.free_at) = (Some(way), now + took);
        let (bytes, ends) = (chunk.bytes, chunk.ends.map(|part| (part, bad)));
        self.agenda.plan(now + took + from.delay, Event::Arrives { way, bytes, ends });
        self.agenda.plan(now + took, Event::Sent(p));
        let all: u64 = self.layouts.iter().map(|l| l.total()).sum();
        if peer.sent >= all * (peer.copies_at.len() as u64 + 1) {
            peer.copies_at.push(Duration::from_nanos(now));
        }
        if let Death::AfterCopies(thousandths) = peer.person.dies
            && peer.sent * 1_000 >= all * thousandths
        {
            peer.person.dies = Death::Never;
            self.agenda.plan(now + took + from.delay, Event::Die(p));
        }
    }

    fn hear(&mut self, way: u32, frame: Frame) {
        let now = self.moment();
        let (from, to, back) = {
            let way = self.way(way);
            (way.from, way.to, way.back)
        };
        let (host, peer) = (Host(from), &mut self.peers[to as usize]);
        match frame {
            Frame::Open(content) => {
                if peer.shares(content) && self.way(back).opened & 1 << content == 0 {
                    self.way(back).opened |= 1 << content;
                    self.say(back, Frame::Opened(content));
                    self.tell_of_hosts(back, content);
                    self.peer(to).sharing.on_open(now, host, content);
                }
            }
            Frame::Hosts(hosts) => self.learn(to, hosts),
            Frame::Opened(content) => {
                let hoards = peer.person.nature == Nature::Hoarder;
                if let Some(swarm) = peer.swarm(content) {
                    swarm.on_host(now, host);
                    let none = || Bitfield::none(swarm.have().len());
                    let have = if hoards { none() } else { swarm.have().clone() };
                    self.say(back, Frame::TheirHave(content, Box::new(have)));
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
                    self.say(back, Frame::Busy(content, pieces, Duration::from_millis(10)));
                }
                _ => peer.sharing.on_want(now, host, content, &pieces),
            },
            Frame::Cancel(content, pieces) => peer.sharing.on_cancel(now, host, content, &pieces),
            Frame::Close(content) => {
                peer.sharing.on_closed(now, host, content);
                let back = self.way(back);
                back.opened &= !(1 << content);
                back.shown &= !(1 << content);
                back.pieces.retain(|part| part.content != content);
            }
            Frame::Have(content, have) => {
                if let Some(swarm) = peer.swarm(content) {
                    swarm.on_have(now, host, &have);
                }
            }
            Frame::HaveMore(content, pieces) => {
                if let Some(swarm) = peer.swarm(content) {
                    swarm.on_have_more(now, host, &pieces);
                }
            }
            Frame::Busy(content, pieces, wait) => {
                if let Some(swarm) = peer.swarm(content) {
                    swarm.on_busy(now, host, &pieces, wait);
                }
            }
            Frame::Grant(content, pieces) => {
                if peer.person.nature != Nature::Hoarder
                    && let Some(swarm) = peer.swarm(content)
                {
                    swarm.on_granted(now, host, &pieces);
                }
            }
        }
    }

    /// Who opens a content hears of others who have it open here.
    fn tell_of_hosts(&mut self, way: u32, content: u32) {
        let (p, to) = (self.way(way).from, self.way(way).to);
        let open = |w: &u32| self.ways[*w as usize].opened >> content & 1 == 1;
        let ways = self.peers[p as usize].ways.iter();
        let others = ways.filter(|(o, w)| **o != to && open(w)).map(|(o, _)| *o);
        let (mut others, mut hosts) = (others.collect::<Vec<u32>>(), Vec::new());
        while hosts.len() < MOST_TOLD && !others.is_empty() {
            hosts.push(others.swap_remove(self.dice.below(others.len() as u64) as usize));
        }
        if !hosts.is_empty() {
            self.say(way, Frame::Hosts(hosts));
        }
    }

    fn verified(&mut self, way: u32, part: Part, bad: bool) {
        let now = self.moment();
        let Way { from, to, is_open, .. } = self.ways[way as usize];
        self.note(3, to, part.piece.0);
        if !is_open {
            return; // a connection that sent one bad piece is read no further
        }
        let bytes = self.layouts[part.content as usize].len_of(part.piece);
        let peer = &mut self.peers[to as usize];
        let Some(swarm) = peer.swarm(part.content) else { return };
        let arrived = match (bad, swarm.have().has(part.piece)) {
            (true, _) => Arrived::Bad,
            (false, true) => Arrived::Duplicate,
            (false, false) => Arrived::New,
        };
        swarm.on_piece(now, Host(from), part.piece, arrived);
        match arrived {
            Arrived::Bad => *self.bad.entry((to as usize, from as usize)).or_default() += 1,
            Arrived::Duplicate => peer.duplicate += u64::from(bytes),
            _ => {
                peer.waited = peer.waited.max(self.now - peer.last_new);
                peer.last_new = self.now;
                let (held, all) = peer.progress();
                if peer.nearly.is_none() && u64::from(held) * 100 >= u64::from(all) * 99 {
                    peer.nearly = Some(Duration::from_nanos(self.now));
                }
                self.had += u64::from(bytes);
                if self.had * 10 >= self.wanted * (self.tenths.len() as u64 + 1) {
                    self.tenths.push(Duration::from_nanos(self.now));
                }
            }
        }
    }

    /// Carries out what a peer's machines ask for.
    fn act(&mut self, p: u32) {
        if !self.peer(p).alive {
            return;
        }
        loop {
            let mut quiet = true;
            for n in 0..self.peer(p).swarms.len() {
                loop {
                    let (content, swarm) = &mut self.peer(p).swarms[n];
                    let (content, Some(output)) = (*content, swarm.poll_output()) else { break };
                    quiet = false;
                    self.fetch(p, content, output);
                }
            }
            while let Some(output) = self.peer(p).sharing.poll_output() {
                quiet = false;
                self.serve(p, output);
            }
            if quiet {
                break;
            }
        }
        if self.plan.check_every > 0 && self.handled.is_multiple_of(self.plan.check_every) {
            self.peer(p).swarms.iter().for_each(|(_, s)| s.check());
            self.peer(p).sharing.check();
        }
        // Machines set their deadlines anew at every event: it is enough to look now and then.
        let now = self.now;
        let peer = self.peer(p);
        let again = peer.looked + LOOK;
        let due = if now < again && peer.tick_at.is_some() { Some(again) } else { peer.due(now) };
        if let Some(at) = due.map(|at| at.max(now + 1_000))
            && peer.tick_at.is_none_or(|planned| at < planned)
        {
            peer.tick_at = Some(at);
            self.agenda.plan(at, Event::Tick(p));
        }
    }

    fn say_to(&mut self, p: u32, host: Host, frame: Frame) {
        if let Some(way) = self.peer(p).ways.get(&host.0).copied() {
            self.say(way, frame);
        }
    }

    fn fetch(&mut self, p: u32, content: u32, output: swarm::Output) {
        match output {
            swarm::Output::Ask { host, pieces } => {
                self.say_to(p, host, Frame::Want(content, pieces));
            }
            swarm::Output::Cancel { host, pieces } => {
                self.say_to(p, host, Frame::Cancel(content, pieces));
            }
            swarm::Output::Drop { host, why } => {
                self.note(4, p, host.0);
                self.dropped.push((p as usize, host.0 as usize, why));
                if why == Why::Poison {
                    self.peer(p).banned.insert(host.0);
                }
                if let Some(way) = self.peer(p).ways.get(&host.0).copied() {
                    self.disconnect(way);
                    self.act(host.0);
                }
            }
            swarm::Output::Announce(pieces) => self.announce(p, content, &pieces),
            swarm::Output::NeedHosts => {
                if self.peer(p).next_search <= self.now + SEARCH_EVERY / 2 {
                    self.search(p);
                }
            }
            swarm::Output::Complete => self.complete(p, content),
        }
    }

    fn announce(&mut self, p: u32, content: u32, pieces: &[Piece]) {
        self.peer(p).sharing.on_held(content, pieces);
        let pieces: std::rc::Rc<[Piece]> = pieces.into();
        let ways: Vec<u32> = self.peer(p).ways.values().copied().collect();
        for way in ways {
            let to = &self.ways[way as usize];
            let (shown, of_seed) = (to.shown >> content & 1 == 1, to.of_seed >> content & 1 == 1);
            if shown {
                self.say(way, Frame::HaveMore(content, pieces.clone()));
            }
            // Nobody else makes use of it.
            if of_seed {
                self.say(way, Frame::TheirHaveMore(content, pieces.clone()));
            }
        }
        if self.index.is_none() || !self.peer(p).registered.contains(&content) {
            let held = self.peer(p).have(content).map_or(0, Bitfield::thousandths);
            self.register(p, content, held);
        }
    }

    fn complete(&mut self, p: u32, content: u32) {
        let ways: Vec<u32> = self.peer(p).ways.values().copied().collect();
        ways.into_iter().for_each(|way| self.say(way, Frame::Close(content)));
        self.register(p, content, HELD_ALL);
        let now = self.now;
        let peer = self.peer(p);
        if peer.wanting().is_empty() && peer.done.is_none() {
            let waited_for = peer.is_waited_for();
            peer.done = Some(Duration::from_nanos(now));
            self.unfinished -= usize::from(waited_for);
            if self.peer(p).person.dies == Death::WhenDone {
                self.agenda.plan(now, Event::Die(p));
            }
        }
    }

    fn serve(&mut self, p: u32, output: sharing::Output) {
        match output {
            sharing::Output::Serve { host, content, piece } => {
                assert!(self.peer(p).holds(content, piece), "{p} has no {piece:?} to serve");
                let left = self.layouts[content as usize].len_of(piece);
                if let Some(way) = self.peer(p).ways.get(&host.0).copied() {
                    self.way(way).pieces.push_back(Part { content, piece, left });
                    self.pump(way);
                }
            }
            sharing::Output::Busy { host, content, pieces, wait } => {
                self.say_to(p, host, Frame::Busy(content, pieces, wait));
            }
            sharing::Output::Grant { host, content, pieces } => {
                self.say_to(p, host, Frame::Grant(content, pieces));
            }
            sharing::Output::ShowHave { host, content } => {
                let Some(way) = self.peer(p).ways.get(&host.0).copied() else { return };
                self.way(way).shown |= 1 << content;
                let pieces = self.layouts[content as usize].pieces();
                let have = self.peer(p).claims(content, pieces);
                self.say(way, Frame::Have(content, Box::new(have)));
            }
        }
    }
}

pub(super) fn content_id(content: u32) -> ContentId {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&content.to_be_bytes());
    ContentId::file(hash)
}

const fn nanos(time: Duration) -> Nanos {
    time.as_nanos() as u64
}
