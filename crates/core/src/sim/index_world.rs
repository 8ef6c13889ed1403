//! Owns a world of one index and many peers' links, on a network that loses, delays, doubles and
//! reorders, with peers that die and come back and an index that restarts, with its saved state,
//! without what it knew of contents, or as a stranger. Never runs longer than its budget.
//!
//! The world plays the shells: it carries datagrams, keeps saved rows, fetches sessions, lists what
//! it is told to list. At the end every belief is compared with the truth.

mod desk;
#[cfg(test)]
mod tests;
mod troubles;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;

use crate::dice::Dice;
use crate::id::{ContentId, Name, PeerId, RequestId};
use crate::link::{self, Link, LinkError};
use crate::registrar::{self, Dropped, Registrar, Settings, Table};
use crate::time::{Duration, Moment, WallTime};
use crate::trust::{Certificate, MachineKey, NameRecord, RevocationList, Role};
use crate::wire::datagram::{Ack, Code, Item, List, Refusal, Request, Row, RowKey};
use crate::wire::desk::Session;

/// What happens in a world.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Peers.
    pub machines: usize,
    /// Datagrams lost, in thousandths.
    pub lost: u32,
    /// Datagrams that arrive twice, in thousandths.
    pub doubled: u32,
    /// Datagrams that take up to two seconds, in thousandths.
    pub late: u32,
    /// How long faults go on; then the world is mended and left alone until its beliefs settle.
    pub troubled: Duration,
    /// Whether peers die, the index restarts, members are removed.
    pub deaths: bool,
    /// Whether its machines share, ask and fail of themselves; else the whole world has them do so.
    pub(super) alone: bool,
    /// The index and the links are checked every so many times that they did something.
    pub(super) check_every: u64,
    /// How long a datagram takes that is not late, at most.
    pub(super) slowest: Duration,
    /// Requests a second that the index heeds of a machine, and twice as many at once.
    pub(super) requests_a_second: u32,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            machines: 12,
            lost: 200,
            doubled: 50,
            late: 20,
            troubled: Duration::from_secs(90),
            deaths: true,
            alone: true,
            check_every: 1,
            slowest: Duration::from_millis(20),
            requests_a_second: Settings::default().requests_a_second,
        }
    }
}

/// What became of a world, for assertions over many of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Story {
    /// The same for the same seed and plan.
    pub digest: [u8; 32],
    /// Events that happened.
    pub steps: u64,
    /// Datagrams the network lost.
    pub lost: u64,
    /// Changes that came too late and were not made.
    pub overtaken: u64,
    /// Times the index asked for everything again.
    pub repeats: u64,
    /// Leases that lapsed.
    pub lapsed: u64,
    /// Restarts of the index.
    pub restarts: u64,
    /// Times a watcher had to list everything.
    pub relists: u64,
    /// Times a watcher was told again what it had missed.
    pub caught_up: u64,
    /// Datagrams that came a second time.
    pub replayed: u64,
    /// Certificates that a machine did not believe: its clock, or the index's, was wrong.
    pub distrusted: u64,
    /// Machines that an index without its file took back by their certificates.
    pub taken_back: u64,
    /// Machines that had to be invited anew.
    pub invited_anew: u64,
    /// Rows of the listing at the end.
    pub rows: usize,
}

/// What the whole world has to hear of.
pub(super) enum News {
    /// The index answered a search.
    Found { machine: usize, id: ContentId, record: Option<NameRecord>, hosts: Vec<PeerId> },
    /// It answered that there is nothing, or nothing came back.
    NotFound { machine: usize },
    /// The index does not take a share.
    Refused { machine: usize, id: ContentId, code: Code },
    /// A machine has a newer list of those that were removed.
    Revocations { machine: usize },
    /// It stopped answering this machine, or answers again.
    Reachable { machine: usize, yes: bool },
}

const HEARTBEAT: Duration = Duration::from_secs(5);
/// After the troubles: longer than any timer of index or link runs (a refusal is tried again after
/// up to 75 s, a watch renewed after 37 s, a lease over after 15 s).
const QUIET: Duration = Duration::from_secs(150);
/// Every question is answered, or given up, by then.
const ANSWERED: Duration = Duration::from_secs(15);
/// More than any world has needed.
const MOST_STEPS: u64 = 400_000;
const BIRTH: WallTime = WallTime(1_800_000_000);

/// A peer, alive or not.
pub(super) struct Machine {
    pub(super) key: MachineKey,
    pub(super) role: Role,
    /// The network removed it.
    pub(super) removed: bool,
    /// It did so once, by an index that perhaps knows nothing of it any more.
    was_removed: bool,
    pub(super) link: Option<Link>,
    /// When its link is due.
    due: Option<Moment>,
    /// By how many seconds its wall clock is wrong.
    pub(super) skew: i64,
    /// Nothing gets through between it and the index.
    pub(super) cut: bool,
    /// Counts its lives: what was meant for an earlier one is dropped.
    pub(super) life: u32,
    address: SocketAddr,
    /// What it hosts, dead or alive.
    pub(super) hosts: BTreeMap<ContentId, Item>,
    /// What the link told to be registered.
    registered: BTreeSet<ContentId>,
    /// Its last certificate: what an index that lost its file knows it by.
    pub(super) certificate: Option<Certificate>,
    /// It is at the desk.
    fetching: bool,
    /// The machines it knows to be removed.
    pub(super) revocations: Option<RevocationList>,
    /// Versions it has published of its names.
    versions: BTreeMap<Name, u32>,
    mirror: Option<Mirror>,
    questions: BTreeMap<RequestId, Moment>,
    /// Pages asked for that nobody wants any more.
    abandoned: BTreeSet<RequestId>,
}

/// A watcher's own listing.
struct Mirror {
    glob: String,
    rows: BTreeMap<RowKey, Row>,
    /// The question for the next page, and what pages brought so far.
    listing: Option<(RequestId, BTreeMap<RowKey, Row>)>,
    /// Changes that wait for the listing to be whole.
    waiting: Vec<Row>,
    /// It was told to list at least once.
    stands: bool,
}

enum Event {
    ToIndex { from: SocketAddr, datagram: Vec<u8> },
    ToMachine { to: SocketAddr, datagram: Vec<u8> },
    AtDesk { machine: usize, life: u32 },
    FromDesk { machine: usize, life: u32, answer: FromDesk },
    Trouble,
    IndexUp { saved: Saved },
    Rebirth { machine: usize },
}

/// What the desk gave a machine.
enum FromDesk {
    Session(Box<Session>),
    /// The word that it was removed.
    Removed,
    Nothing,
}

/// What a restarted index finds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Saved {
    All,
    /// Members, but neither names nor registrations.
    Members,
    /// Only its key.
    Nothing,
}

/// A world under way.
pub struct IndexWorld {
    plan: Plan,
    dice: Dice,
    now: Moment,
    index: Option<Registrar>,
    /// By how many seconds the index's wall clock is wrong.
    pub(super) skew: i64,
    news: VecDeque<News>,
    boots: u64,
    rows: BTreeMap<(Table, Vec<u8>), Vec<u8>>,
    pub(super) machines: Vec<Machine>,
    events: BTreeMap<(Moment, u64), Event>,
    next_event: u64,
    mended: bool,
    tale: blake3::Hasher,
    pub(super) story: Story,
}

/// Runs the world of `seed` to its end and compares every belief with the truth.
///
/// # Panics
/// Where an invariant breaks on the way, or a belief is wrong at the end.
pub fn run(seed: u64, plan: Plan) -> Story {
    let mut world = IndexWorld::new(seed, plan);
    let mended_at = Moment::ZERO + plan.troubled;
    let end = mended_at + QUIET;
    while world.step(if world.mended { end } else { mended_at }) {
        assert!(world.story.steps < MOST_STEPS, "the world does not come to rest");
    }
    world.judge();
    world.tell()
}

impl IndexWorld {
    pub(super) fn new(seed: u64, plan: Plan) -> Self {
        let mut dice = Dice(seed);
        let machine = |at: usize| {
            let mut secret = [7; 32];
            secret[8..16].copy_from_slice(&(at as u64).to_be_bytes());
            secret[..8].copy_from_slice(&seed.to_be_bytes());
            Machine {
                key: MachineKey::from_seed(secret),
                role: match at % 4 {
                    0 => Role::Admin,
                    3 => Role::Read,
                    _ => Role::Publish,
                },
                removed: false,
                was_removed: false,
                link: None,
                due: None,
                skew: 0,
                cut: false,
                life: 0,
                address: SocketAddr::from((((10 << 24) + at as u32 + 1).to_be_bytes(), 5_000)),
                hosts: BTreeMap::new(),
                registered: BTreeSet::new(),
                certificate: None,
                fetching: false,
                revocations: None,
                versions: BTreeMap::new(),
                mirror: None,
                questions: BTreeMap::new(),
                abandoned: BTreeSet::new(),
            }
        };
        let machines = (0..plan.machines).map(machine).collect();
        let mut world = Self {
            plan,
            now: Moment::ZERO,
            index: None,
            skew: 0,
            news: VecDeque::new(),
            boots: 0,
            rows: BTreeMap::new(),
            machines,
            events: BTreeMap::new(),
            next_event: 0,
            mended: false,
            tale: blake3::Hasher::new(),
            story: Story::default(),
            dice: Dice(dice.next()),
        };
        world.index_up(Saved::Nothing);
        for machine in 0..plan.machines {
            world.rebirth(machine);
        }
        if world.plan.alone {
            world.at(Duration::from_millis(100), Event::Trouble);
        }
        world
    }

    /// One event, or one tick; false when `end` was reached in a mended world.
    fn step(&mut self, end: Moment) -> bool {
        let next = self.next_at().unwrap_or(end);
        if next >= end {
            self.now = end;
            if self.mended {
                return false;
            }
            self.mend();
            return true;
        }
        self.step_at(next);
        true
    }

    /// When something happens next.
    pub(super) fn next_at(&self) -> Option<Moment> {
        let ticks = self.machines.iter().filter_map(|machine| machine.due);
        let index = self.index.as_ref().and_then(Registrar::next_deadline);
        let event = self.events.first_key_value().map(|((at, _), _)| *at);
        ticks.chain(index).chain(event).min()
    }

    /// Has happen what happens at `next`.
    pub(super) fn step_at(&mut self, next: Moment) {
        self.story.steps += 1;
        self.now = self.now.max(next);
        self.tale.update(&self.now.as_micros().to_be_bytes());
        let first = self.events.first_entry().filter(|entry| entry.key().0 <= next);
        match first.map(std::collections::btree_map::OccupiedEntry::remove) {
            Some(event) => self.happen(event),
            None => self.tick(),
        }
    }

    /// Time has come so far.
    pub(super) fn advance(&mut self, now: Moment) {
        self.now = self.now.max(now);
    }

    pub(super) fn poll_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    fn tell_whole(&mut self, news: News) {
        if !self.plan.alone {
            self.news.push_back(news);
        }
    }

    fn tick(&mut self) {
        let (now, wall) = (self.now, self.wall());
        let due = |at: Option<Moment>| at.is_some_and(|at| at <= now);
        if let Some(index) = self.index.as_mut().filter(|index| due(index.next_deadline())) {
            index.tick(now, wall);
            self.carry_index();
        }
        for machine in 0..self.machines.len() {
            if due(self.machines[machine].due)
                && let Some(link) = &mut self.machines[machine].link
            {
                link.tick(now);
                assert!(!due(link.next_deadline()), "a tick leaves its deadline in the past");
                self.carry_link(machine);
            }
        }
    }

    fn happen(&mut self, event: Event) {
        let (now, wall) = (self.now, self.wall());
        match event {
            Event::ToIndex { from, mut datagram } => {
                self.tale.update(&datagram);
                if let Some(index) = &mut self.index {
                    index.on_datagram(now, wall, from, &mut datagram);
                    self.carry_index();
                }
            }
            Event::ToMachine { to, mut datagram } => {
                self.tale.update(&datagram);
                if let Some(machine) = self.machine_at(to)
                    && let Some(link) = &mut self.machines[machine].link
                {
                    link.on_datagram(now, &mut datagram);
                    self.carry_link(machine);
                }
            }
            Event::AtDesk { machine, life } => self.at_desk(machine, life),
            Event::FromDesk { machine, life, answer } => {
                if self.machines[machine].life == life {
                    self.adopt(machine, answer);
                }
            }
            Event::Trouble => self.trouble(),
            Event::IndexUp { saved } => self.index_up(saved),
            Event::Rebirth { machine } => self.rebirth(machine),
        }
    }

    /// Does what the index put out.
    fn carry_index(&mut self) {
        let Some(index) = &mut self.index else { return };
        if self.story.steps.is_multiple_of(self.plan.check_every) {
            index.check();
        }
        let mut sent = vec![];
        while let Some(output) = index.poll_output() {
            match output {
                registrar::Output::Send { to, datagram } => sent.push((to, datagram)),
                registrar::Output::Save(change) => save(&mut self.rows, change),
                registrar::Output::Answer { .. } | registrar::Output::Ignore { .. } => {
                    unreachable!("the desk is asked elsewhere");
                }
            }
        }
        for (to, datagram) in sent {
            let machine = self.machine_at(to);
            self.post(machine, |datagram| Event::ToMachine { to, datagram }, &datagram);
        }
    }

    /// Does what a link put out.
    fn carry_link(&mut self, at: usize) {
        loop {
            let now = self.now;
            let machine = &mut self.machines[at];
            let Some(link) = &mut machine.link else { return };
            if self.story.steps.is_multiple_of(self.plan.check_every) {
                link.check();
            }
            let Some(output) = link.poll_output() else {
                machine.due = link.next_deadline();
                return;
            };
            match output {
                link::Output::Send(datagram) => {
                    let from = machine.address;
                    self.post(Some(at), |datagram| Event::ToIndex { from, datagram }, &datagram);
                }
                link::Output::NeedSession => self.fetch_session(at),
                link::Output::Answered { id, result } => self.answered(at, id, result),
                link::Output::Registered(id) => {
                    machine.registered.insert(id);
                }
                link::Output::Refused(id, refusal) => self.refused(at, id, &refusal),
                link::Output::Withdrawn(_) => {}
                link::Output::Changes { rows } => {
                    if let Some(mirror) = &mut machine.mirror {
                        mirror.on_changes(rows);
                    }
                }
                link::Output::Relist => {
                    self.story.relists += 1;
                    if let Some(mirror) = &mut machine.mirror {
                        mirror.waiting.clear();
                        mirror.stands = true;
                        let list = List { glob: mirror.glob.clone(), after: None };
                        let id = link.ask(now, Request::List(list));
                        let before = mirror.listing.replace((id, BTreeMap::new()));
                        machine.abandoned.extend(before.map(|(id, _)| id));
                    }
                }
                link::Output::RevocationsAt(version) => {
                    if machine.revocations.as_ref().is_none_or(|list| version > list.version) {
                        self.fetch_session(at);
                    }
                }
                link::Output::IndexLost => {
                    self.tell_whole(News::Reachable { machine: at, yes: false });
                }
                link::Output::IndexBack => {
                    self.tell_whole(News::Reachable { machine: at, yes: true });
                }
            }
        }
    }

    /// The index does not take a share: its owner does what a person would.
    fn refused(&mut self, at: usize, id: ContentId, refusal: &Refusal) {
        let now = self.now;
        self.tell_whole(News::Refused { machine: at, id, code: refusal.code });
        let machine = &mut self.machines[at];
        machine.registered.remove(&id);
        match refusal.code {
            Code::NameTaken | Code::StaleVersion => {
                if let (Some(item), Some(link)) = (machine.hosts.get_mut(&id), &mut machine.link) {
                    item.name = None;
                    link.share(now, item.clone());
                }
            }
            // A machine that only reads hosts nothing that nobody published (any more).
            Code::NotAllowed => {
                assert_eq!(machine.role, Role::Read, "{refusal}");
                machine.hosts.remove(&id);
            }
            Code::Removed => {
                machine.hosts.remove(&id); // perhaps the late word of an index that is no more
            }
            code => panic!("{id:?} was refused with {code:?}: {refusal}"),
        }
    }

    fn answered(&mut self, at: usize, id: RequestId, result: Result<Ack, LinkError>) {
        let now = self.now;
        let machine = &mut self.machines[at];
        let (Some(link), mirror) = (&mut machine.link, &mut machine.mirror) else { return };
        if let Some(mirror) = mirror
            && let Some((_, mut rows)) = mirror.listing.take_if(|(listing, _)| *listing == id)
        {
            let glob = mirror.glob.clone();
            let after = match result {
                Ok(Ack::Page(page)) => {
                    for row in &page.rows {
                        assert!(rows.insert(row.key.clone(), row.clone()).is_none(), "a row twice");
                    }
                    if !page.more {
                        mirror.rows = rows;
                        let waiting = std::mem::take(&mut mirror.waiting);
                        mirror.on_changes(waiting);
                        return;
                    }
                    page.rows.last().map(|row| row.key.clone())
                }
                Err(LinkError::Refused(refusal)) if refusal.code == Code::Removed => return,
                _ => {
                    rows.clear(); // what waits stays: the watch stands
                    None
                }
            };
            let id = link.ask(now, Request::List(List { glob, after }));
            mirror.listing = Some((id, rows));
            return;
        }
        if machine.abandoned.remove(&id) {
            return;
        }
        assert!(
            machine.questions.remove(&id).is_some(),
            "an answer to what was never asked, or twice"
        );
        match result {
            Ok(Ack::Found(found)) => {
                assert!(found.hosts.iter().all(|host| host.peer != machine.key.peer()), "itself");
                let hosts = found.hosts.iter().map(|host| host.peer).collect();
                let (id, record) = (found.id, found.record);
                self.tell_whole(News::Found { machine: at, id, record, hosts });
            }
            Ok(Ack::Page(_)) => {}
            Err(LinkError::NoAnswer) => self.tell_whole(News::NotFound { machine: at }),
            Err(LinkError::Refused(refusal)) => {
                let code = refusal.code;
                let expected = matches!(code, Code::NotFound | Code::NoHosts)
                    || (code == Code::Removed && (machine.removed || machine.was_removed));
                assert!(expected, "{code:?}: {refusal}");
                self.tell_whole(News::NotFound { machine: at });
            }
            other => panic!("{other:?}"),
        }
    }

    /// A machine looks whether its certificate is good by its own clock.
    pub(super) fn tend_certificate(&mut self, at: usize) {
        let wall = self.wall_of(at);
        let machine = &mut self.machines[at];
        if let (Some(certificate), Some(link)) = (&machine.certificate, &mut machine.link)
            && certificate.is_timely(wall).is_err()
        {
            link.renew();
            self.carry_link(at);
        }
    }

    /// Compares what everybody believes with what is true.
    pub(super) fn judge(&mut self) {
        let index = self.index.as_ref().expect("the index is up at the end");
        let mut truth: BTreeMap<ContentId, BTreeMap<PeerId, u16>> = BTreeMap::new();
        for (at, machine) in self.machines.iter().enumerate() {
            let Some(link) = &machine.link else { continue };
            link.check();
            let late = |asked: &&Moment| self.now.since(**asked) > ANSWERED;
            assert_eq!(
                machine.questions.values().find(late),
                None,
                "machine {at} was not answered"
            );
            for (id, item) in machine.hosts.iter().filter(|_| !machine.removed) {
                assert!(machine.registered.contains(id), "machine {at} does not know of {id:?}");
                truth.entry(*id).or_default().insert(machine.key.peer(), item.held);
            }
        }
        let believed = index.catalog().hosts();
        for (id, hosts) in &truth {
            assert_eq!(believed.get(id), Some(hosts), "of {id:?} the index believes otherwise");
        }
        assert!(believed.keys().eq(truth.keys()), "the index believes in what is not there");
        let everything = index.catalog().listing();
        for (at, machine) in self.machines.iter().enumerate() {
            if let Some(mirror) =
                machine.mirror.as_ref().filter(|_| machine.link.is_some() && !machine.removed)
            {
                let matches = |row: &&Row| match &row.key.name {
                    _ if mirror.glob == "*" => true,
                    Some(name) => {
                        ["name-0-", "name-1-"].iter().any(|p| name.as_str().starts_with(p))
                    }
                    None => false,
                };
                let seen: Vec<Row> = mirror.rows.values().cloned().collect();
                let there: Vec<Row> = everything.iter().filter(matches).cloned().collect();
                assert!(mirror.stands && mirror.listing.is_none(), "machine {at} has no listing");
                assert_eq!(seen, there, "machine {at} sees another listing");
            }
        }
        self.story.rows = everything.len();
    }

    pub(super) fn tell(mut self) -> Story {
        if let Some(index) = &self.index {
            self.story.count(&index.stats());
        }
        self.story.digest = *self.tale.finalize().as_bytes();
        self.story
    }

    pub(super) fn key(&self) -> MachineKey {
        MachineKey::from_seed([99; 32])
    }

    /// What the index's wall clock says.
    pub(super) fn wall(&self) -> WallTime {
        WallTime(
            (BIRTH.0 + self.now.since(Moment::ZERO).as_secs()).saturating_add_signed(self.skew),
        )
    }

    /// What a machine's wall clock says.
    pub(super) fn wall_of(&self, at: usize) -> WallTime {
        let right = BIRTH.0 + self.now.since(Moment::ZERO).as_secs();
        WallTime(right.saturating_add_signed(self.machines[at].skew))
    }

    pub(super) const fn is_up(&self) -> bool {
        self.index.is_some()
    }

    pub(super) fn catalog(&self) -> &crate::catalog::Catalog {
        self.index.as_ref().expect("the index is up at the end").catalog()
    }

    /// The version of the index's list of removed machines.
    pub(super) fn revocations(&self) -> u32 {
        self.index.as_ref().map_or(0, |index| index.revocations().version)
    }

    fn machine_at(&self, address: SocketAddr) -> Option<usize> {
        let SocketAddr::V4(v4) = address else { return None };
        let at = (v4.ip().to_bits() - (10 << 24)) as usize - 1;
        Some(at).filter(|at| self.machines[*at].address == address)
    }

    fn at(&mut self, wait: Duration, event: Event) {
        self.next_event += 1;
        self.events.insert((self.now + wait, self.next_event), event);
    }

    /// Gives a datagram of or to a machine to the network.
    fn post(&mut self, machine: Option<usize>, event: impl Fn(Vec<u8>) -> Event, datagram: &[u8]) {
        assert!(datagram.len() <= crate::wire::datagram::MAX_DATAGRAM);
        if machine.is_some_and(|at| self.machines[at].cut) {
            self.story.lost += 1;
            return;
        }
        let copies = if chance(&mut self.dice, self.plan.doubled) { 2 } else { 1 };
        for _ in 0..copies {
            if chance(&mut self.dice, self.plan.lost) {
                self.story.lost += 1;
                continue;
            }
            let usual = self.plan.slowest.as_micros() as usize;
            let most = if chance(&mut self.dice, self.plan.late) { 2_000_000 } else { usual };
            let wait = Duration::from_micros(100 + throw(&mut self.dice, most) as u64);
            self.at(wait, event(datagram.to_vec()));
        }
    }
}

fn save(rows: &mut BTreeMap<(Table, Vec<u8>), Vec<u8>>, change: registrar::Change) {
    let key = (change.table, change.key);
    match change.value {
        Some(value) => rows.insert(key, value),
        None => rows.remove(&key),
    };
}

impl Story {
    /// Adds what a run of the index counted.
    fn count(&mut self, stats: &registrar::Stats) {
        let dropped = |why| stats.dropped.get(&why).copied().unwrap_or(0);
        self.repeats += stats.repeats;
        self.lapsed += stats.lapsed;
        self.caught_up += stats.caught_up;
        self.overtaken += dropped(Dropped::Overtaken);
        self.replayed += dropped(Dropped::Replayed);
    }
}

fn throw(dice: &mut Dice, n: usize) -> usize {
    dice.below(n as u64) as usize
}

/// True in so many of 1,000 throws.
fn chance(dice: &mut Dice, permille: u32) -> bool {
    dice.below(1_000) < u64::from(permille)
}

impl Mirror {
    fn new(glob: &str) -> Self {
        let glob = glob.to_owned();
        Self { glob, rows: BTreeMap::new(), listing: None, waiting: vec![], stands: false }
    }

    fn on_changes(&mut self, rows: Vec<Row>) {
        if self.listing.is_some() {
            self.waiting.extend(rows);
            return;
        }
        for row in rows {
            if row.hosts == 0 {
                self.rows.remove(&row.key);
            } else {
                self.rows.insert(row.key.clone(), row);
            }
        }
    }
}
