//! Owns the index's thinking: whom to believe, what to answer, whose lease is over. Never touches a
//! socket, a disk or a clock, and never sends a byte to a stranger.
//!
//! A datagram's way: gate (see there) → replay window → pace → not removed → cookie → catalog. Before
//! the gate's AEAD check passed nothing changes; before the cookie proved the address nothing has an
//! effect. An owner with several threads lets each open datagrams at a gate of its own and seal an
//! [`Outbox`]; the registrar itself is one, and thinks of one batch at a time.

mod blame;
mod desk;
mod gate;
mod members;
mod pace;
mod requests;
mod saved;
mod seats;
#[cfg(test)]
mod tests;
#[doc(hidden)]
pub mod trial;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;

use crate::catalog::{Catalog, Counts, Limits};
use crate::dice::Dice;
use crate::fault::Fault;
use crate::id::{MemberNumber, NetworkId};
use crate::seal::CookieJar;
use crate::time::{Duration, Moment, WallTime};
use crate::trust::{MachineKey, RevocationList};
use crate::wire::bytes::Malformed;
use crate::wire::datagram::{Code, Load};
use crate::wire::desk::Answer;

use blame::Blames;
pub use desk::{Caller, Invited};
pub use gate::{Gate, Opened, Outbox};
pub use members::Member;
use members::{Epochs, Roster, Secrets};
use pace::{BURST_S, REQUESTS_A_SECOND};
use saved::Saved;
pub use saved::{Change, Table};
use seats::Seat;
use watch::Watchers;

/// What an index is taken to need of memory: for a member; for what is known of one that was heard …
const MEMBER_BYTES: usize = 320;
const SEAT_BYTES: usize = 256;
/// … for a session, for a watch, and for a glob that is watched.
const SESSION_BYTES: usize = 192;
const WATCH_BYTES: usize = 400;
const GLOB_BYTES: usize = 8 << 10;

/// What is new with every run of the index. All of it but `dice` must be secret and unforeseeable.
pub struct Boot {
    /// Never the same twice: reply keys come from it.
    pub id: u64,
    /// Key of the cookies.
    pub cookie_key: [u8; 32],
    /// Seed of all choices that are no secrets.
    pub dice: u64,
    /// Seed of all secrets made: epochs, invitations, salts.
    pub secret_seed: [u8; 32],
}

/// How an index behaves and how much it takes.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How often members report, in seconds; three missed, and what they host is forgotten.
    pub heartbeat_s: u16,
    /// What the catalog may hold.
    pub limits: Limits,
    /// Machines that ever joined, removed ones included.
    pub members: usize,
    /// Invitations that are open or lately were.
    pub invitations: usize,
    /// Members that watch the listing at once.
    pub watchers: usize,
    /// Bytes of memory (see [`Stats::memory`]) from which on nothing more is taken that stays: no new
    /// registration, name, member or watch.
    pub memory: usize,
    /// Sessions of one member whose replay windows are kept.
    pub sessions_a_member: usize,
    /// Requests a second of one member, on average …
    pub requests_a_second: u32,
    /// … and at once.
    pub burst: u32,
    /// How long a session is to be used.
    pub session: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat_s: 25, // a removal rides in the answer: every peer knows of it within 30 s
            limits: Limits::default(),
            members: 1 << 18,
            invitations: 10_000,
            watchers: 1 << 14,
            memory: 1 << 30,
            sessions_a_member: 4,
            requests_a_second: REQUESTS_A_SECOND,
            burst: REQUESTS_A_SECOND * BURST_S,
            session: Duration::from_secs(12 * 3600),
        }
    }
}

/// Where a walk over all rows stands (see [`Registrar::rows`]).
#[derive(Clone, Copy, Debug, Default)]
pub struct Walk {
    /// Among [`Table::ALL`].
    table: usize,
    /// Which member or name.
    nth: usize,
}

/// The shell's word for a question at the desk, handed back with its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What the shell is to do, in this order.
pub enum Output {
    /// Send this datagram.
    Send {
        /// Where.
        to: SocketAddr,
        /// At most 1,200 bytes.
        datagram: Vec<u8>,
    },
    /// Write or delete a row.
    Save(Change),
    /// Answer at the desk.
    Answer {
        /// Which question.
        ticket: Ticket,
        /// What.
        answer: Answer,
        /// Only once all rows before it are on disk; where that fails, `DeskCode::NotDurable`.
        durable: bool,
    },
    /// Hang up at the desk without a byte: a stranger.
    Ignore {
        /// Which question.
        ticket: Ticket,
    },
}

/// The saved state does not hold together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// A row is not what was written.
    #[error(
        "a saved row of {0:?} is damaged ({1}): restore the file, or delete it and invite anew"
    )]
    Damaged(Table, Malformed),
    /// The rows do not come in the order of tables.
    #[error("saved rows of {0:?} come too late")]
    Order(Table),
}

impl RestoreError {
    /// Always ours: the rows are our own.
    pub const fn fault(&self) -> Fault {
        Fault::Ours
    }
}

/// Why a datagram was dropped without a byte back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dropped {
    /// No request of this version.
    Malformed,
    /// Its member number was never given.
    UnknownMember,
    /// Its member asks faster than one may, and has been told so.
    TooFast,
    /// Its epoch's secret is unknown or erased.
    UnknownEpoch,
    /// It does not open with the session's key.
    Forged,
    /// It was seen before, or is too old to know.
    Replayed,
    /// It would change what its sender hosts or watches, and a later one that does came before it: it
    /// is asked again, and then says what is the case.
    Overtaken,
}

/// What the index has and did since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests answered, by PDU letter and code; no code: done.
    pub requests: BTreeMap<(char, Option<Code>), u64>,
    /// Items that were refused within an `R` that was answered.
    pub items_refused: BTreeMap<Code, u64>,
    /// Datagrams dropped without a byte back.
    pub dropped: BTreeMap<Dropped, u64>,
    /// Notices pushed to watchers.
    pub notices: u64,
    /// Times a watcher that had missed some was told again what had changed.
    pub caught_up: u64,
    /// Leases that lapsed.
    pub lapsed: u64,
    /// Times a member was asked to repeat its registrations.
    pub repeats: u64,
    /// Contents, names, hosts, registrations.
    pub counts: Counts,
    /// Members that were not removed.
    pub members: usize,
    /// Watchers now.
    pub watchers: usize,
    /// Sessions whose replay windows are kept.
    pub sessions: usize,
    /// Bytes that all of this is taken to need: reckoned, not measured, so that what is refused does
    /// not depend on how memory is handed out. About what the process has, and rather more.
    pub memory: usize,
}

/// The index's thinking.
pub struct Registrar {
    key: MachineKey,
    network: NetworkId,
    boot: u64,
    settings: Settings,
    jar: CookieJar,
    secrets: Secrets,
    epochs: Epochs,
    roster: Roster,
    catalog: Catalog,
    seats: Vec<Option<Box<Seat>>>,
    /// Sessions in all seats.
    sessions: usize,
    /// When to look at whose lease; a member stands here at most once, perhaps too early.
    leases: BTreeSet<(Moment, MemberNumber)>,
    watchers: Watchers,
    blames: Blames,
    /// The nonce of the next reply or notice.
    nonce: u64,
    /// Counts what gates have to know of: members and epochs.
    news: u64,
    /// Members that the gate to be briefed next is to pass over, and until when.
    too_fast: Vec<(MemberNumber, Moment)>,
    /// The gate of who calls [`Registrar::on_datagram`]; made when first used.
    own_gate: Option<Box<Gate>>,
    outbox: Outbox,
    outputs: VecDeque<Output>,
    stats: Stats,
}

impl Registrar {
    /// An index with this key, going on with what was `saved` (key and value of each row, in the
    /// order of [`Table::ALL`], within a table by key). Members that hosted something have a whole
    /// lease to report again.
    #[expect(clippy::needless_pass_by_value, reason = "what is new with a run is used once")]
    pub fn new(
        key: MachineKey,
        boot: Boot,
        settings: Settings,
        saved: impl Iterator<Item = (Table, Vec<u8>, Vec<u8>)>,
        now: Moment,
        wall: WallTime,
    ) -> Result<Self, RestoreError> {
        let mut secrets = Secrets::new(boot.secret_seed);
        let mut dice = Dice(boot.dice);
        let mut roster = Roster::new(&key, settings.members, settings.invitations);
        // Changes are counted from the date on, so that no number of an earlier run is met again.
        let mut catalog = Catalog::new(settings.limits, wall.0 << 20, dice.next());
        let (mut epochs, mut vague) = (vec![], BTreeSet::new());
        let mut last = Table::Epochs;
        for (table, key, value) in saved {
            if table < last {
                return Err(RestoreError::Order(table));
            }
            last = table;
            let damaged = |malformed| RestoreError::Damaged(table, malformed);
            match saved::read(table, &key, &value).map_err(damaged)? {
                Saved::Epoch { number, secret, made } => epochs.push((number, secret, made)),
                Saved::Member(member) => roster.restore_member(member),
                Saved::Invitation(id, invited) => roster.restore_invitation(id, invited),
                Saved::Revocations(list) => roster.restore_revocations(list),
                Saved::Record(record) => catalog.restore_record(&record),
                Saved::Address(member, address) => {
                    if let Some(known) = roster.member(member).filter(|m| m.removed.is_none()) {
                        let load = Load { free_slots: 1, ..Load::default() };
                        catalog.report(member, known.peer, address, load, true);
                    }
                }
                Saved::Registration(member, id, hosted) => {
                    catalog.restore(member, id, &hosted);
                    if !hosted.complete {
                        vague.insert(member);
                    }
                }
            }
        }
        let mut changes = vec![];
        let epochs = Epochs::new(epochs, &mut secrets, now, wall, &mut changes);
        let mut registrar = Self {
            network: key.network(),
            key,
            boot: boot.id,
            settings,
            jar: CookieJar::new(boot.cookie_key),
            secrets,
            epochs,
            roster,
            catalog,
            seats: Vec::new(),
            sessions: 0,
            leases: BTreeSet::new(),
            watchers: Watchers::default(),
            blames: Blames::default(),
            nonce: 0,
            news: 1,
            too_fast: Vec::new(),
            own_gate: None,
            outbox: Outbox::default(),
            outputs: VecDeque::new(),
            stats: Stats::default(),
        };
        registrar.save(changes);
        for member in vague {
            registrar.seat(member).vague = true;
        }
        registrar.grant_leases(now);
        registrar.tick(now, wall);
        Ok(registrar)
    }

    /// A datagram came. It is opened in place. (The date matters at the desk only, so far.)
    ///
    /// All in one, for owners of one thread: its own gate opens, [`Registrar::poll_output`] seals.
    pub fn on_datagram(
        &mut self,
        now: Moment,
        _wall: WallTime,
        from: SocketAddr,
        datagram: &mut [u8],
    ) {
        let mut gate = self.own_gate.take().unwrap_or_else(|| Box::new(self.gate()));
        self.brief(&mut gate);
        if let Some(opened) = gate.open(now, from, datagram) {
            self.on_opened(now, &opened);
        }
        self.brief(&mut gate);
        self.own_gate = Some(gate);
    }

    /// Members' datagrams came, opened at a gate.
    ///
    /// To fetch what is known of a member from memory takes longer than to think about it: so all of it
    /// is looked at first, which a processor does for many members at once.
    pub fn on_batch(&mut self, now: Moment, batch: &[Opened<'_>]) {
        let look = |opened: &Opened<'_>| self.look_at(opened.line.member);
        std::hint::black_box(batch.iter().map(look).fold(0, u64::wrapping_add));
        for opened in batch {
            self.on_opened(now, opened);
        }
    }

    /// Reads of each thing known of a member, for nothing but that it is at hand afterwards.
    fn look_at(&self, member: MemberNumber) -> u64 {
        let seat = self.seats.get(member.0 as usize).and_then(|seat| seat.as_deref());
        let session = seat.and_then(|seat| seat.sessions.first());
        let removed = self.roster.member(member).is_some_and(|member| member.removed.is_some());
        session.map_or(0, |session| session.nth)
            + seat.map_or(0, |seat| seat.hosts_order.0)
            + u64::from(removed)
            + self.catalog.hosted_by(member) as u64
    }

    /// A member's datagram came, opened at a gate.
    fn on_opened(&mut self, now: Moment, opened: &Opened<'_>) {
        let heeded = match self.recognise(now, opened) {
            Ok(order) => self.heed(now, opened, order),
            Err(dropped) => Err(dropped),
        };
        if let Err(dropped) = heeded {
            *self.stats.dropped.entry(dropped).or_default() += 1;
        }
    }

    /// Time passed.
    pub fn tick(&mut self, now: Moment, wall: WallTime) {
        let mut changes = vec![];
        if self.epochs.turn(&mut self.secrets, now, wall, &mut changes) {
            self.news += 1;
        }
        self.save(changes);
        self.lapse(now);
        while let Some(host) = self.blames.lapse(now) {
            self.catalog.sink(host, self.blames.sinks(host));
        }
        self.notify(now);
    }

    /// When [`Registrar::tick`] is due.
    pub fn next_deadline(&self) -> Option<Moment> {
        let lease = self.leases.first().map(|(moment, _)| *moment);
        let first = [lease, self.watchers.next_deadline(), self.blames.next_deadline()]
            .into_iter()
            .flatten()
            .min();
        Some(first.map_or(self.epochs.turns(), |moment| moment.min(self.epochs.turns())))
    }

    /// The next thing to be done. Datagrams that nobody took (see [`Registrar::take_outbox`]) are
    /// sealed and among them.
    pub fn poll_output(&mut self) -> Option<Output> {
        if !self.outbox.is_empty() {
            self.outbox.seal();
            let send =
                |(to, bytes): (SocketAddr, &[u8])| Output::Send { to, datagram: bytes.into() };
            self.outputs.extend(self.outbox.datagrams().map(send));
            self.outbox.clear();
        }
        self.outputs.pop_front()
    }

    /// Takes all datagrams to be sent, unsealed, for `outbox`, which must be empty.
    pub fn take_outbox(&mut self, outbox: &mut Outbox) {
        debug_assert!(outbox.is_empty(), "what was to be sent would be lost");
        std::mem::swap(&mut self.outbox, outbox);
    }

    /// The next of all rows that make up what must outlive a restart, about as many as wanted; none:
    /// that was all. For an owner whose disk has lost some: it writes these and then every change
    /// made since the walk began, in order.
    pub fn rows(&self, walk: &mut Walk, about: usize) -> Vec<Change> {
        let mut rows = vec![];
        while rows.len() < about
            && let Some(table) = Table::ALL.get(walk.table)
        {
            let nth = walk.nth;
            walk.nth += 1;
            if !self.rows_at(*table, nth, &mut rows) {
                *walk = Walk { table: walk.table + 1, nth: 0 };
            }
        }
        rows
    }

    /// The rows of the `nth` member or name, or of all of a small table at once; false where there
    /// was no such.
    fn rows_at(&self, table: Table, nth: usize, rows: &mut Vec<Change>) -> bool {
        let number = MemberNumber(u32::try_from(nth).unwrap_or(u32::MAX));
        match table {
            Table::Epochs => rows.extend(self.epochs.rows()),
            Table::Invitations => rows.extend(self.roster.invitation_rows()),
            Table::Revocations if self.revocations().version == 0 => {} // never written
            Table::Revocations => rows.push(saved::revocations(self.revocations())),
            Table::Members => rows.extend(self.roster.member(number).map(saved::member)),
            Table::Names => match self.catalog.durable_names(nth) {
                Some(records) => rows.extend(records.map(saved::durable)),
                None => return false,
            },
            Table::Addresses => {
                let saved = self.seats.get(nth).and_then(|seat| seat.as_ref()?.saved);
                rows.extend(saved.map(|address| saved::address(number, Some(address))));
            }
            Table::Registrations => {
                rows.extend(self.catalog.durable_of(number).map(saved::durable));
            }
        }
        match table {
            Table::Epochs | Table::Invitations | Table::Revocations => false,
            Table::Names => true,
            Table::Members | Table::Addresses | Table::Registrations => {
                number.0 < self.roster.numbers()
            }
        }
    }

    /// Which network this is the index of.
    pub const fn network(&self) -> NetworkId {
        self.network
    }

    /// The revocation list as it is now.
    pub const fn revocations(&self) -> &RevocationList {
        self.roster.revocations()
    }

    /// What the index has and did.
    pub fn stats(&self) -> Stats {
        Stats {
            counts: self.catalog.counts(),
            members: self.roster.count(),
            watchers: self.watchers.count(),
            sessions: self.sessions,
            memory: self.memory(),
            ..self.stats.clone()
        }
    }

    /// From now on it behaves like this. What is there stays, also where it is more than may be now.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
        self.catalog.set_limits(settings.limits);
        self.roster.set_limits(settings.members, settings.invitations);
    }

    /// How it behaves.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    fn memory(&self) -> usize {
        self.catalog.memory()
            + self.roster.numbers() as usize * MEMBER_BYTES
            + self.seats.len() * SEAT_BYTES
            + self.sessions * SESSION_BYTES
            + self.watchers.count() * WATCH_BYTES
            + self.watchers.globs() * GLOB_BYTES
    }

    /// Nothing more is taken that stays.
    fn is_full(&self) -> bool {
        self.memory() >= self.settings.memory
    }

    /// Who hosts what: to look at, for tests, the simulator and a page that shows it.
    pub const fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Panics where something contradicts itself. O(everything): for tests and the simulator.
    pub fn check(&self) {
        self.catalog.check();
        self.roster.check();
        self.watchers.check();
        self.blames.check();
        let sessions = self.seats.iter().flatten().map(|seat| seat.sessions.len());
        assert_eq!(sessions.sum::<usize>(), self.sessions, "sessions are miscounted");
        for number in 0..self.seats.len() {
            let member = MemberNumber(number as u32);
            let hosts = self.catalog.hosted_by(member) > 0;
            let seat = self.seats[number].as_deref();
            let lease = seat.and_then(|seat| seat.lease);
            assert_eq!(hosts, lease.is_some(), "a lease without registrations, or the reverse");
            let queued = self.leases.iter().filter(|(_, m)| *m == member).count();
            assert_eq!(queued, usize::from(seat.is_some_and(|seat| seat.queued)));
            assert!(!hosts || queued == 1, "a lease nobody looks at");
            let saved = seat.and_then(|seat| seat.saved);
            assert!(!hosts || saved == self.catalog.address_of(member), "an address was not saved");
            let removed = self.roster.member(member).is_none_or(|m| m.removed.is_some());
            assert!(!(hosts && removed), "a machine that is no member hosts something");
        }
    }

    fn save(&mut self, changes: Vec<Change>) {
        self.outputs.extend(changes.into_iter().map(Output::Save));
    }
}
