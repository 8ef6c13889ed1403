//! Owns a world of everything: the index and the links of [`index_world`], the swarms and the sharing
//! of [`swarm_world`], certificates and revocation lists between them. Never models anything itself:
//! it decides what people and fate do, carries wishes and news between the two worlds, and compares
//! what everybody believes with what is true.
//!
//! Contents are published and fetched, what was fetched is registered and served. Meanwhile things go
//! wrong, each kind of which can be left out (see [`Fault`]). When the troubles end, the world goes on
//! for much longer than three leases, and then everybody has to have all there is to be had.
//!
//! [`index_world`]: super::index_world
//! [`swarm_world`]: super::swarm_world

mod fate;

use std::collections::{BTreeMap, BTreeSet};

use fate::Fate;

use super::index_world::{self, IndexWorld, News};
use super::swarm_world::outside::Wish;
use super::swarm_world::{self, Death, Line, Nature, Person, World, content_id};
use crate::bitfield::Bitfield;
use crate::id::{ContentId, Name, PeerId, Piece, Version};
use crate::swarm::Why;
use crate::time::{Duration, Moment};
use crate::trust::{Distrust, NameRecord, Role};
use crate::wire::datagram::{Code, Item, Target};

/// A kind of thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// Datagrams are lost.
    Loss,
    /// Datagrams come twice.
    Doubles,
    /// Datagrams come up to two seconds late, overtaken by others.
    Late,
    /// Some machines cannot reach some others for a while.
    Partition,
    /// A machine cannot reach the index for a while.
    Cut,
    /// Machines stop at once, and come back without their last pieces, or never.
    Death,
    /// The index restarts: with its state, with members only, or with nothing.
    Restart,
    /// Lines become slow, and uplinks stand still for a while.
    Slow,
    /// Machines claim what they do not have, are always busy, or silent.
    Liar,
    /// Machines send pieces that do not verify.
    Poisoner,
    /// Wall clocks jump back an hour or on five years, the index's as well.
    Clock,
    /// Members are removed.
    Removal,
    /// Machines' addresses change under way.
    Move,
}

impl Fault {
    /// All kinds.
    pub const ALL: [Self; 13] = [
        Self::Loss,
        Self::Doubles,
        Self::Late,
        Self::Partition,
        Self::Cut,
        Self::Death,
        Self::Restart,
        Self::Slow,
        Self::Liar,
        Self::Poisoner,
        Self::Clock,
        Self::Removal,
        Self::Move,
    ];
}

/// What happens in a world.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Machines.
    pub machines: usize,
    /// How long things go wrong.
    pub troubled: Duration,
    /// What goes wrong.
    pub faults: BTreeSet<Fault>,
}

impl Default for Plan {
    fn default() -> Self {
        let faults = Fault::ALL.into();
        Self { machines: 9, troubled: Duration::from_secs(60), faults }
    }
}

/// Ways to heal, and things to heal from, that are counted; in a run over many seeds each has to be
/// met.
pub const MARKS: [&str; 33] = [
    "datagrams were lost",
    "a datagram came twice and was dropped",
    "a change came too late and was not made",
    "the index asked for everything again",
    "a lease lapsed",
    "the index restarted",
    "a watcher was told again what it had missed",
    "a watcher listed everything",
    "the index took a machine back by its certificate",
    "a machine was invited anew",
    "a machine did not believe a certificate from the index",
    "the index stopped answering a machine",
    "the index answered a machine again",
    "a content was complete and registered as such",
    "a search by name found the newest version",
    "an older version than seen before was refused",
    "a refused share was taken later",
    "a share was refused",
    "a dial failed at an expired certificate",
    "a dial failed at a certificate that is not valid yet",
    "a dial failed at a removed member",
    "a removed member's connection was ended",
    "a cut connection was given up",
    "a machine died while it fetched",
    "a machine resumed what it had begun",
    "pieces were taken back from a slow host",
    "a host said Busy",
    "a poisoner was dropped",
    "a silent host was dropped",
    "grants were withdrawn",
    "grants were declined",
    "a line was stuck",
    "a piece was asked of a second host at the end",
];

/// What became of a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    /// The same for the same seed and plan.
    pub digest: [u8; 32],
    /// Events that happened.
    pub steps: u64,
    /// How often each of [`MARKS`] was met.
    pub marks: BTreeMap<&'static str, u64>,
    /// Contents published.
    pub contents: usize,
    /// Copies completed by fetching.
    pub copies: u64,
}

/// After the troubles: three leases, and a wait for whatever is tried again last (a search 30 s after
/// the one before, a refusal after 75 s, a watch after 37 s).
const QUIET: Duration = Duration::from_secs(150);
/// More than any world has needed.
const MOST_STEPS: u64 = 3_000_000;
/// Both worlds are looked through every so many steps.
const CHECK_EVERY: u64 = 256;
/// Contents of one world: bits of a word.
const MOST_CONTENTS: usize = 24;
/// Connections a peer opens.
const NEIGHBOURS: usize = 16;
/// A share that was refused is tried again after this.
const TRY_AGAIN: Duration = Duration::from_secs(15);
/// A machine looks at its certificate so often.
const TEND_EVERY: Duration = Duration::from_secs(5);
/// Members removed at most.
const MOST_REMOVED: usize = 2;

/// A content, as its publisher knows it.
struct Published {
    id: ContentId,
    by: usize,
    record: Option<NameRecord>,
}

/// What was decided to happen later.
enum Deed {
    Trouble,
    Revive(usize),
    Reach(Vec<(u32, u32)>),
    Uncut(usize),
    SetClock(Option<usize>),
    Speed(usize, Line),
    HostAgain(usize, u32),
    TendCertificates,
}

struct Whole<'a> {
    plan: Plan,
    fate: Fate,
    now: Moment,
    index: IndexWorld,
    swarms: World,
    natures: Vec<Nature>,
    lines: Vec<Line>,
    contents: Vec<Published>,
    /// The newest version of each name that each machine has seen.
    seen: BTreeMap<(usize, Name), Version>,
    /// Shares that the index did not take, and has not taken since.
    refused: BTreeSet<(usize, u32)>,
    /// Machines that were removed once, even if the index has forgotten it.
    removed: BTreeSet<usize>,
    deeds: BTreeMap<(Moment, u64), Deed>,
    planned: u64,
    mended: bool,
    marks: BTreeMap<&'static str, u64>,
    steps: u64,
    copies: u64,
    trace: Option<&'a mut dyn FnMut(Moment, String)>,
}

/// Runs the world of `seed` to its end and compares every belief with the truth.
///
/// # Panics
/// Where an invariant breaks on the way, or a belief is wrong at the end.
pub fn run(seed: u64, plan: &Plan) -> Story {
    live(Fate::new(&[], seed), plan, None)
}

/// The same, and has told what happens.
///
/// # Panics
/// Like [`run`].
pub fn traced(seed: u64, plan: &Plan, trace: &mut dyn FnMut(Moment, String)) -> Story {
    live(Fate::new(&[], seed), plan, Some(trace))
}

/// Runs a small world in which people and fate do what these bytes say, decision by decision, and go on
/// by chance.
///
/// # Panics
/// Like [`run`].
pub fn scripted(script: &[u8]) -> Story {
    let plan = Plan { machines: 6, troubled: Duration::from_secs(20), ..Plan::default() };
    live(Fate::new(script, 0), &plan, None)
}

fn live(fate: Fate, plan: &Plan, trace: Option<&mut dyn FnMut(Moment, String)>) -> Story {
    let mut whole = Whole::new(fate, plan.clone(), trace);
    let mended_at = Moment::ZERO + plan.troubled;
    while whole.step(mended_at) {}
    whole.mend();
    while whole.step(mended_at + QUIET) {}
    whole.judge();
    whole.tell()
}

impl<'a> Whole<'a> {
    fn new(mut fate: Fate, plan: Plan, trace: Option<&'a mut dyn FnMut(Moment, String)>) -> Self {
        let has = |fault| plan.faults.contains(&fault);
        let index_plan = index_world::Plan {
            machines: plan.machines,
            lost: if has(Fault::Loss) { 150 } else { 0 },
            doubled: if has(Fault::Doubles) { 50 } else { 0 },
            late: if has(Fault::Late) { 20 } else { 0 },
            troubled: plan.troubled,
            alone: false,
            ..index_world::Plan::default()
        };
        // Two machines at least are as they should be.
        let natures: Vec<Nature> = (0..plan.machines)
            .map(|at| match fate.below(if at < 2 { 1 } else { 20 }) {
                8..=9 if has(Fault::Poisoner) => Nature::Poisoner {
                    after: fate.below(6) as u32,
                    every: 1 + fate.below(2) as u32,
                },
                10..=11 if has(Fault::Liar) => Nature::Liar,
                12 if has(Fault::Liar) => Nature::Silent,
                13 if has(Fault::Liar) => Nature::Busy,
                14 if has(Fault::Liar) => Nature::Hoarder,
                15..=16 if has(Fault::Slow) => Nature::Stalling {
                    every: Duration::from_millis(200 + fate.below(2_000)),
                    lasts: Duration::from_millis(fate.below(2_500)),
                },
                _ => Nature::Honest,
            })
            .collect();
        let lines: Vec<Line> = (0..plan.machines)
            .map(|_| {
                let mut line = Line::mbit([4, 10, 50][fate.below(3) as usize], 50);
                line.delay = Duration::from_micros(50 + fate.below(8_000));
                line
            })
            .collect();
        let person = |at: usize| Person {
            line: lines[at],
            nature: natures[at],
            joins: Duration::ZERO,
            dies: Death::Never,
            holds: vec![],
            wants: vec![],
        };
        let swarm_plan = swarm_world::Plan {
            contents: vec![],
            people: (0..plan.machines).map(person).collect(),
            neighbours: NEIGHBOURS,
            chunk: 64 << 10,
            walls: BTreeSet::new(),
            seed: fate.seed(),
            check_every: 7,
        };
        let mut whole = Self {
            index: IndexWorld::new(fate.seed(), index_plan),
            swarms: World::within(swarm_plan),
            plan,
            fate,
            now: Moment::ZERO,
            natures,
            lines,
            contents: vec![],
            seen: BTreeMap::new(),
            refused: BTreeSet::new(),
            removed: BTreeSet::new(),
            deeds: BTreeMap::new(),
            planned: 0,
            mended: false,
            marks: BTreeMap::new(),
            steps: 0,
            copies: 0,
            trace,
        };
        whole.at(Duration::from_millis(100), Deed::Trouble);
        whole.at(TEND_EVERY, Deed::TendCertificates);
        whole
    }

    /// One event; false when `end` was reached.
    fn step(&mut self, end: Moment) -> bool {
        self.steps += 1;
        assert!(self.steps < MOST_STEPS, "the world does not come to rest");
        let (index, swarms) = (self.index.next_at(), self.swarms.next_at());
        let deed = self.deeds.first_key_value().map(|((at, _), _)| *at);
        let next = [index, swarms, deed].into_iter().flatten().min().unwrap_or(end).max(self.now);
        if next >= end {
            self.now = end;
            self.advance();
            return false;
        }
        self.now = next;
        self.advance();
        if deed.is_some_and(|at| at <= next)
            && let Some((_, deed)) = self.deeds.pop_first()
        {
            self.act(deed);
        } else if index.is_some_and(|at| at <= next) {
            self.index.step_at(next);
        } else {
            self.swarms.step_until(next);
        }
        self.carry();
        if self.steps.is_multiple_of(CHECK_EVERY) {
            self.swarms.check();
        }
        true
    }

    fn advance(&mut self) {
        self.index.advance(self.now);
        // What happens in between happens event by event: this only sets the clock.
        if self.swarms.next_at().is_none_or(|at| at > self.now) {
            self.swarms.advance(self.now);
        }
    }

    /// Carries wishes and news between the two worlds until there are none.
    fn carry(&mut self) {
        loop {
            if let Some(wish) = self.swarms.poll_wish() {
                self.grant_wish(wish);
            } else if let Some(news) = self.index.poll_news() {
                self.hear(news);
            } else {
                return;
            }
        }
    }

    fn grant_wish(&mut self, wish: Wish) {
        match wish {
            Wish::Register { peer, content } => self.register(peer as usize, content),
            Wish::Search { peer, content, hosts } => {
                let id = self.contents[content as usize].id;
                self.index.search(peer as usize, Target::Id(id), hosts);
            }
            Wish::Greet { dialler, dialled } => {
                let (a, b) = (dialler as usize, dialled as usize);
                if self.believes(a, b) && self.believes(b, a) {
                    self.swarms.meet(dialler, dialled);
                }
            }
        }
    }

    /// Tells the index how much of a content a machine holds.
    fn register(&mut self, at: usize, content: u32) {
        let published = &self.contents[content as usize];
        let held = self.swarms.says_it_holds(at as u32, content);
        if let Some(item) = self.index.machines[at].hosts.get(&published.id) {
            if item.held != held {
                if held == 1_000 && at != published.by {
                    self.copies += 1;
                    self.mark("a content was complete and registered as such");
                }
                self.index.hold(at, self.contents[content as usize].id, held);
            }
        } else if held > 0 && !self.refused.contains(&(at, content)) {
            self.host(at, content);
        }
    }

    fn host(&mut self, at: usize, content: u32) {
        let published = &self.contents[content as usize];
        let held = self.swarms.says_it_holds(at as u32, content);
        let (id, name) = (published.id, published.record.clone());
        let size = self.swarms.size(content);
        self.index.host(at, Item { id, size, held, name });
    }

    /// Whether machine `a` believes that `b` is a member, by its own clock and list.
    fn believes(&mut self, a: usize, b: usize) -> bool {
        let wall = self.index.wall_of(a);
        let machines = &self.index.machines;
        let key = machines[b].key.peer();
        let Some(certificate) = &machines[b].certificate else { return false };
        if machines[a].certificate.is_none() {
            return false;
        }
        if machines[a].revocations.as_ref().is_some_and(|list| list.peers.contains(&key)) {
            self.mark("a dial failed at a removed member");
            return false;
        }
        match certificate.check(certificate.network, key, wall) {
            Ok(()) => return true,
            Err(Distrust::Expired) => self.mark("a dial failed at an expired certificate"),
            Err(Distrust::NotYet) => {
                self.mark("a dial failed at a certificate that is not valid yet");
            }
            Err(distrust) => panic!("machine {b}'s certificate: {distrust}"),
        }
        false
    }

    fn hear(&mut self, news: News) {
        match news {
            News::Found { machine, id, record, hosts } => self.found(machine, id, record, &hosts),
            News::NotFound { machine } => {
                self.say(|| format!("machine {machine} is told of no hosts"));
            }
            News::Refused { machine, id, code } => {
                self.mark("a share was refused");
                self.say(|| format!("the index refuses machine {machine}'s share: {code:?}"));
                if let Some(content) = self.content(id)
                    && matches!(code, Code::NotAllowed | Code::Removed)
                {
                    self.refused.insert((machine, content));
                    self.at(TRY_AGAIN, Deed::HostAgain(machine, content));
                }
            }
            News::Revocations { machine } => {
                let list = self.index.machines[machine].revocations.clone();
                let peers = list.map(|list| list.peers).unwrap_or_default();
                for other in self.swarms.neighbours(machine as u32) {
                    if peers.contains(&self.index.machines[other as usize].key.peer()) {
                        self.mark("a removed member's connection was ended");
                        self.swarms.part(machine as u32, other);
                    }
                }
            }
            News::Reachable { machine, yes } => {
                self.say(|| {
                    format!("machine {machine} {} the index", if yes { "reaches" } else { "lost" })
                });
                self.mark(match yes {
                    true => "the index answered a machine again",
                    false => "the index stopped answering a machine",
                });
            }
        }
    }

    fn found(&mut self, at: usize, id: ContentId, record: Option<NameRecord>, hosts: &[PeerId]) {
        let Some(content) = self.content(id) else { panic!("{id:?} was never published") };
        if let Some(record) = record {
            let published = &self.contents[content as usize];
            assert_eq!(Some(&record), published.record.as_ref(), "the index made up a record");
            let newest = self.seen.entry((at, record.name.clone())).or_insert(record.version);
            if record.version < *newest {
                return self.mark("an older version than seen before was refused");
            }
            *newest = record.version;
            self.mark("a search by name found the newest version");
            self.say(|| format!("machine {at} wants {}@{}", record.name, record.version));
            if self.swarms.is_alive(at as u32) {
                self.swarms.want(at as u32, content);
            }
        }
        let known = |peer: &PeerId| {
            let machine = self.index.machines.iter().position(|m| m.key.peer() == *peer);
            machine.expect("the index made up a host") as u32
        };
        let hosts = hosts.iter().map(known).collect();
        self.swarms.found(at as u32, hosts);
    }

    fn content(&self, id: ContentId) -> Option<u32> {
        self.contents.iter().position(|published| published.id == id).map(|at| at as u32)
    }

    fn act(&mut self, deed: Deed) {
        match deed {
            Deed::Trouble => self.trouble(),
            Deed::TendCertificates => {
                (0..self.plan.machines).for_each(|at| self.index.tend_certificate(at));
                self.at(TEND_EVERY, Deed::TendCertificates);
            }
            Deed::Revive(at) => self.revive(at),
            Deed::Reach(pairs) => {
                self.say(|| "the partition is over".to_owned());
                pairs.into_iter().for_each(|(a, b)| self.swarms.mend_between(a, b));
            }
            Deed::Uncut(at) => self.index.machines[at].cut = false,
            Deed::SetClock(who) => {
                self.say(|| format!("the clock of {} is right again", whose(who)));
                match who {
                    Some(at) => self.index.machines[at].skew = 0,
                    None => self.index.skew = 0,
                }
            }
            Deed::Speed(at, line) => self.swarms.set_line(at as u32, line),
            Deed::HostAgain(at, content) => {
                let id = self.contents[content as usize].id;
                let machine = &self.index.machines[at];
                if machine.hosts.contains_key(&id) || machine.removed {
                    return;
                }
                if self.swarms.is_alive(at as u32)
                    && self.swarms.says_it_holds(at as u32, content) > 0
                {
                    self.refused.remove(&(at, content));
                    self.mark("a refused share was taken later");
                    self.host(at, content);
                } else {
                    self.at(TRY_AGAIN, Deed::HostAgain(at, content));
                }
            }
        }
    }

    /// Something a person or fate does.
    fn trouble(&mut self) {
        if self.mended {
            return;
        }
        let wait = Duration::from_millis(20 + self.fate.below(600));
        self.at(wait, Deed::Trouble);
        let at = self.fate.below(self.plan.machines as u64) as usize;
        let throw = self.fate.below(100);
        let has = |fault| self.plan.faults.contains(&fault);
        let while_ms = 500 + self.fate.below(20_000);
        let lasts = Duration::from_millis(while_ms);
        match throw {
            0..14 => self.publish(at),
            14..44 => self.want(at),
            44..50 => self.index.watch(at),
            50..53 => self.index.report_load(at),
            53..60 if has(Fault::Death) => self.die(at),
            60..63 if has(Fault::Restart) => {
                self.say(|| "the index goes down".to_owned());
                self.index.index_down();
            }
            63..68 if has(Fault::Partition) => self.partition(lasts),
            68..71 if has(Fault::Cut) => {
                self.say(|| format!("machine {at} is cut off from the index"));
                self.index.machines[at].cut = true;
                self.at(lasts, Deed::Uncut(at));
            }
            71..76 if has(Fault::Clock) => self.turn_clock(at, lasts),
            76..79 if has(Fault::Slow) => {
                self.say(|| format!("machine {at}'s line is slow"));
                let slow = Line { delay: self.lines[at].delay, ..Line::mbit(1, 2) };
                self.swarms.set_line(at as u32, slow);
                self.at(lasts, Deed::Speed(at, self.lines[at]));
            }
            79 if has(Fault::Removal) && self.fate.chance(0.5) => self.remove(at),
            80..83 if has(Fault::Move) => self.index.move_house(at),
            83..86 => self.look_again(at),
            _ => {}
        }
    }

    fn publish(&mut self, at: usize) {
        let machine = &self.index.machines[at];
        let lives = self.swarms.is_alive(at as u32) && machine.link.is_some();
        if !lives || machine.role == Role::Read || self.contents.len() == MOST_CONTENTS {
            return;
        }
        let files = 1 + self.fate.below(3);
        let sizes = (0..files).map(|_| 1 + self.fate.below(1_200_000)).collect();
        let content = self.swarms.add_content(sizes);
        let id = content_id(content);
        let record = self.fate.chance(0.6).then(|| {
            let name: Name = format!("name-{at}").parse().expect("a name");
            let mine = self.contents.iter().filter_map(|published| published.record.as_ref());
            let versions = mine.filter(|record| record.name == name).map(|r| r.version.0);
            let version = Version(versions.max().unwrap_or(0) + 1);
            let (machine, wall) = (&self.index.machines[at], self.index.wall_of(at));
            NameRecord::sign(&machine.key, self.index.key().network(), name, version, id, wall)
        });
        self.say(|| match &record {
            Some(r) => {
                format!("machine {at} publishes content {content} as {}@{}", r.name, r.version)
            }
            None => format!("machine {at} publishes content {content}"),
        });
        self.contents.push(Published { id, by: at, record });
        self.swarms.publish(at as u32, content);
    }

    fn want(&mut self, at: usize) {
        if self.contents.is_empty() || !self.swarms.is_alive(at as u32) {
            return;
        }
        let content = self.fate.below(self.contents.len() as u64) as u32;
        let published = &self.contents[content as usize];
        match &published.record {
            Some(record) => {
                self.index.search(at, Target::Name(record.name.clone(), None), NEIGHBOURS as u8);
            }
            None => {
                self.say(|| format!("machine {at} wants content {content}"));
                self.swarms.want(at as u32, content);
            }
        }
    }

    /// A machine looks whether there are newer versions of what it has seen.
    fn look_again(&mut self, at: usize) {
        let seen = self.seen.keys().filter(|(who, _)| *who == at);
        let names: Vec<Name> = seen.map(|(_, name)| name.clone()).collect();
        for name in names {
            self.index.search(at, Target::Name(name, None), NEIGHBOURS as u8);
        }
    }

    fn die(&mut self, at: usize) {
        if !self.index.kill(at) {
            return;
        }
        let fetches = |c: &u32| self.swarms.store(at as u32, *c).is_some_and(|h| !h.is_full());
        if self.swarms.contents_of(at as u32).iter().any(fetches) {
            self.mark("a machine died while it fetched");
        }
        self.say(|| format!("machine {at} dies"));
        self.swarms.kill(at as u32);
        let wait = Duration::from_millis(self.fate.below(40_000));
        self.at(wait, Deed::Revive(at));
    }

    fn revive(&mut self, at: usize) {
        if self.swarms.is_alive(at as u32) {
            return;
        }
        self.say(|| format!("machine {at} is back"));
        let forgets = self.fate.below(3) as u32;
        self.swarms.revive(at as u32, forgets);
        let begun = |c: &u32| {
            self.swarms.store(at as u32, *c).is_some_and(|h| !h.is_full() && !h.is_empty())
        };
        if self.swarms.contents_of(at as u32).iter().any(begun) {
            self.mark("a machine resumed what it had begun");
        }
        self.carry(); // what it hosts is what its store holds, before it registers that
        self.index.rebirth(at);
    }

    fn partition(&mut self, lasts: Duration) {
        let sides: Vec<bool> = (0..self.plan.machines).map(|_| self.fate.chance(0.4)).collect();
        let mut pairs = vec![];
        for a in 0..self.plan.machines {
            pairs.extend(
                (a + 1..self.plan.machines)
                    .filter(|b| sides[a] != sides[*b])
                    .map(|b| (a as u32, b as u32)),
            );
        }
        self.say(|| format!("{} pairs cannot reach each other", pairs.len()));
        let patience = Duration::from_millis(500 + self.fate.below(8_000));
        for (a, b) in &pairs {
            if self.swarms.neighbours(*a).contains(b) {
                self.mark("a cut connection was given up");
            }
            self.swarms.cut_between(*a, *b, patience);
        }
        self.at(lasts, Deed::Reach(pairs));
    }

    fn turn_clock(&mut self, at: usize, lasts: Duration) {
        const FIVE_YEARS: i64 = 5 * 365 * 24 * 3_600;
        let skew = if self.fate.chance(0.5) { -3_600 } else { FIVE_YEARS };
        let who = (self.fate.below(3) > 0).then_some(at);
        self.say(|| format!("the clock of {} jumps by {skew} s", whose(who)));
        match who {
            Some(at) => self.index.machines[at].skew = skew,
            None => self.index.skew = skew,
        }
        self.at(lasts, Deed::SetClock(who));
    }

    fn remove(&mut self, at: usize) {
        if self.removed.len() < MOST_REMOVED && self.index.is_up() {
            self.index.remove(at);
            if self.index.machines[at].removed {
                self.say(|| format!("machine {at} is removed"));
                self.removed.insert(at);
            }
        }
    }

    /// The troubles are over: everything works again, and most of the dead are back.
    fn mend(&mut self) {
        self.say(|| "the troubles are over".to_owned());
        self.mended = true;
        self.index.skew = 0;
        for machine in &mut self.index.machines {
            (machine.skew, machine.cut) = (0, false);
        }
        for a in 0..self.plan.machines as u32 {
            (0..a).for_each(|b| self.swarms.mend_between(b, a));
            self.swarms.set_line(a, self.lines[a as usize]);
        }
        self.deeds.retain(|_, deed| matches!(deed, Deed::HostAgain(..) | Deed::TendCertificates));
        self.index.mend();
        for at in 0..self.plan.machines {
            if !self.swarms.is_alive(at as u32) && self.fate.chance(0.7) {
                self.revive(at);
            }
        }
        self.carry();
    }

    /// Honest, living, never removed: those who are to have everything in the end.
    fn good(&self) -> Vec<usize> {
        let good = |at: &usize| {
            self.natures[*at].is_honest()
                && self.swarms.is_alive(*at as u32)
                && !self.removed.contains(at)
        };
        (0..self.plan.machines).filter(good).collect()
    }

    /// Compares what everybody believes with what is true.
    fn judge(&mut self) {
        self.swarms.check();
        let good = self.good();
        for (at, machine) in self.index.machines.iter().enumerate() {
            let lives = self.swarms.is_alive(at as u32);
            assert_eq!(lives, machine.link.is_some(), "machine {at} lives by half");
            if !lives || machine.removed {
                continue;
            }
            for content in self.swarms.contents_of(at as u32) {
                let says = self.swarms.says_it_holds(at as u32, content);
                let hosts = machine.hosts.get(&self.contents[content as usize].id);
                match hosts {
                    Some(item) => assert_eq!(item.held, says, "machine {at} and content {content}"),
                    None => {
                        let refused = self.refused.contains(&(at, content));
                        assert!(says == 0 || refused, "machine {at} does not host {content}");
                    }
                }
            }
        }
        self.index.judge();
        for (content, published) in self.contents.iter().enumerate() {
            let content = content as u32;
            let mut all: Option<Bitfield> = None;
            for at in &good {
                if !self.index.machines[*at].hosts.contains_key(&published.id) {
                    continue;
                }
                if let Some(have) = self.swarms.store(*at as u32, content) {
                    let all = all.get_or_insert_with(|| Bitfield::none(have.len()));
                    have.iter().for_each(|piece| {
                        all.insert(piece);
                    });
                }
            }
            let Some(all) = all else { continue };
            for at in &good {
                let Some(have) = self.swarms.store(*at as u32, content) else { continue };
                let lacks: Vec<Piece> = all.iter().filter(|p| !have.has(*p)).collect();
                assert!(
                    lacks.is_empty(),
                    "machine {at} lacks {lacks:?} of content {content}, which others have; {}",
                    self.swarms.tell_of(*at as u32, content)
                );
            }
        }
        self.judge_names();
        self.judge_people(&good);
    }

    /// The index knows the latest version that any of its members carries.
    fn judge_names(&self) {
        let machines = self.index.machines.iter().filter(|m| m.link.is_some() && !m.removed);
        let carried = machines.flat_map(|m| m.hosts.values().filter_map(|item| item.name.as_ref()));
        let mut latest: BTreeMap<&Name, &NameRecord> = BTreeMap::new();
        for record in carried {
            let known = latest.entry(&record.name).or_insert(record);
            if record.version > known.version {
                *known = record;
            }
        }
        let listing = self.index.catalog().listing();
        for (name, record) in latest {
            assert!(self.index.catalog().has_record(record), "{name}@{} is lost", record.version);
            // It stands at an even later version, or at none where nobody up hosts that.
            let row = listing.iter().find(|row| row.key.name.as_ref() == Some(name));
            let stands = row.is_none_or(|row| row.version >= Some(record.version));
            assert!(stands, "{name}@{} is known, but not listed", record.version);
        }
    }

    /// Nobody honest is let in no more, nobody takes a second bad piece, nobody removed is connected.
    fn judge_people(&self, good: &[usize]) {
        for (to, whom, why) in self.swarms.dropped() {
            let poisons = matches!(self.natures[*whom], Nature::Poisoner { .. });
            assert!(*why != Why::Poison || poisons, "machine {to} takes {whom} for a poisoner");
        }
        for ((to, from), pieces) in self.swarms.bad() {
            let lives = self.index.machines[*to].life;
            assert!(*pieces <= lives, "machine {to} took {pieces} bad pieces of {from}");
        }
        for at in good {
            for other in self.swarms.banned_by(*at as u32) {
                assert!(matches!(self.natures[*other as usize], Nature::Poisoner { .. }));
            }
            // An index that removed somebody while its clock was years ahead, and then lost its file,
            // makes lists that are older than that one until it is as late: they are not believed.
            let known = self.index.machines[*at].revocations.as_ref().map_or(0, |l| l.version);
            if known > self.index.revocations() {
                continue;
            }
            for other in self.swarms.neighbours(*at as u32) {
                let removed = self.index.machines[other as usize].removed;
                assert!(!removed, "machine {at} is connected with {other}, which was removed");
            }
        }
    }

    fn tell(mut self) -> Story {
        let story = self.index.tell();
        let (fetched, shared) = self.swarms.counts();
        let of = |why| self.swarms.dropped().iter().filter(|(.., w)| *w == why).count() as u64;
        let (poisoners, silent) = (of(Why::Poison), of(Why::Silent));
        let counted = [
            ("datagrams were lost", story.lost),
            ("a datagram came twice and was dropped", story.replayed),
            ("a change came too late and was not made", story.overtaken),
            ("the index asked for everything again", story.repeats),
            ("a lease lapsed", story.lapsed),
            ("the index restarted", story.restarts),
            ("a watcher was told again what it had missed", story.caught_up),
            ("a watcher listed everything", story.relists),
            ("the index took a machine back by its certificate", story.taken_back),
            ("a machine was invited anew", story.invited_anew),
            ("a machine did not believe a certificate from the index", story.distrusted),
            ("pieces were taken back from a slow host", fetched.steals.into()),
            ("a host said Busy", fetched.busy.into()),
            ("a poisoner was dropped", poisoners),
            ("a silent host was dropped", silent),
            ("grants were withdrawn", shared.withdrawn),
            ("grants were declined", fetched.declined.into()),
            ("a line was stuck", shared.stuck),
            ("a piece was asked of a second host at the end", fetched.endgame.into()),
        ];
        for (mark, times) in counted {
            *self.marks.entry(mark).or_default() += times;
        }
        let (events, digest) = self.swarms.told();
        let mut tale = blake3::Hasher::new();
        tale.update(&story.digest).update(&digest.to_be_bytes());
        for (mark, times) in &self.marks {
            assert!(MARKS.contains(mark), "{mark} is no mark");
            tale.update(mark.as_bytes()).update(&times.to_be_bytes());
        }
        Story {
            digest: *tale.finalize().as_bytes(),
            steps: story.steps + events,
            marks: self.marks,
            contents: self.contents.len(),
            copies: self.copies,
        }
    }

    fn at(&mut self, wait: Duration, deed: Deed) {
        self.planned += 1;
        self.deeds.insert((self.now + wait, self.planned), deed);
    }

    fn mark(&mut self, mark: &'static str) {
        *self.marks.entry(mark).or_default() += 1;
    }

    fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace(self.now, text());
        }
    }
}

fn whose(who: Option<usize>) -> String {
    who.map_or_else(|| "the index".to_owned(), |at| format!("machine {at}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four runs side by side; the marks are asserted in each.
    fn seeds(from: u64) {
        let mut marks: BTreeMap<&str, u64> = BTreeMap::new();
        let (mut copies, mut steps) = (0, 0);
        for seed in from..from + 75 {
            let story = std::panic::catch_unwind(|| run(seed, &Plan::default()));
            let story = story.unwrap_or_else(|_| {
                panic!("in the world of seed {seed}: cargo xtask sim --seed {seed} --trace")
            });
            copies += story.copies;
            steps += story.steps;
            for (mark, times) in story.marks {
                *marks.entry(mark).or_default() += times;
            }
        }
        // Every way to heal was gone: none goes untested.
        let met = |mark: &&&str| marks.get(**mark).is_some_and(|times| *times > 0);
        let never: Vec<_> = MARKS.iter().filter(|m| !RARE.contains(m) && !met(m)).collect();
        assert!(never.is_empty(), "never met: {never:?}; met: {marks:?}");
        assert!(copies > 300, "{copies} copies in {steps} steps");
    }

    /// Met once in some hundred worlds.
    const RARE: [&str; 1] = ["an older version than seen before was refused"];

    #[test]
    fn after_troubled_worlds_everybody_has_and_believes_what_is_true_0_to_74() {
        seeds(0);
    }

    #[test]
    fn after_troubled_worlds_everybody_has_and_believes_what_is_true_75_to_149() {
        seeds(75);
    }

    #[test]
    fn after_troubled_worlds_everybody_has_and_believes_what_is_true_150_to_224() {
        seeds(150);
    }

    #[test]
    fn after_troubled_worlds_everybody_has_and_believes_what_is_true_225_to_299() {
        seeds(225);
    }

    #[test]
    fn a_script_decides_what_happens_and_every_script_in_the_corpus_ends_well() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/world");
        let mut digests = BTreeSet::new();
        for file in std::fs::read_dir(corpus).unwrap() {
            let path = file.unwrap().path();
            let script = std::fs::read(&path).unwrap();
            let story = std::panic::catch_unwind(|| scripted(&script));
            digests.insert(story.unwrap_or_else(|_| panic!("{}", path.display())).digest);
        }
        assert!(digests.len() > 10, "{} stories", digests.len());
        assert_ne!(scripted(&[]).digest, scripted(&[255]).digest);
    }

    #[test]
    fn the_same_seed_tells_the_same_story() {
        let story = run(7, &Plan::default());
        assert_eq!(story, run(7, &Plan::default()));
        assert_ne!(story.digest, run(8, &Plan::default()).digest);
    }
}
