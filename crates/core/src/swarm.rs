//! Owns one content being fetched: which piece is asked of whom, patience, the endgame. Never sees
//! a piece's bytes, and never talks to anyone: its owner carries out what [`Swarm::poll_output`] says.

mod neighbour;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::ops::AddAssign;
use std::sync::Arc;

use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::fault::Backoff;
use crate::id::Piece;
use crate::layout::Layout;
use crate::pace::Pace;
use crate::rarity::{PieceSet, Rarity};
use crate::time::{Duration, Moment};
use crate::wire::stream::MAX_PIECES as MOST_IN_FRAME;
use neighbour::Neighbour;

/// All hosts together are asked ahead for this many pieces, or for what comes in [`AHEAD`] besides
/// the quickest answer if that is more. More would bind pieces to hosts too early (see DESIGN.md).
///
/// What comes in is taken at its best of late: asking for less because little comes would make it
/// less still, and a peer that fell behind once would stay behind. Who holds less than its neighbours
/// do on average asks ahead for as much more as it is behind, up to twice as much: senders divide
/// their lines evenly among those who ask, so that whose neighbours have many others gets too little,
/// and could not make up for it at the end, when a line down is no faster than a line up.
const LEAST_AHEAD_PIECES: u64 = 8;
/// See [`LEAST_AHEAD_PIECES`].
const AHEAD: Duration = Duration::from_millis(20);
/// A host that let us wait too long is left alone for so long.
const REST: Duration = Duration::from_secs(2);
/// A host that let us wait so often in a row, without a piece between, is dropped if it is not heard
/// of at all any more.
const MOST_STALLS: u8 = 3;
/// The longest wait that a busy host may ask for.
const MOST_BUSY: Duration = Duration::from_secs(5);
/// A granting host that grants and sends nothing for so long is asked like any other, once there is
/// nothing else to wait for. A seed with many readers and large pieces may well take longer.
const GRANTS_LAPSE: Duration = Duration::from_secs(2);
/// Pieces are announced at once, but no more often than this: then together. …
const ANNOUNCE: Duration = Duration::from_millis(10);
/// … To tell a host of something costs about 170 bytes, headers and acknowledgement included, and
/// wakes it up: so much is to come in for each host that is told, for a hundredth of the line …
const ANNOUNCE_EACH: u64 = 16 << 10;
/// … unless that takes longer than this.
const ANNOUNCE_MOST: Duration = Duration::from_millis(100);
/// Who is expected to take so many times as long as another is clearly slower.
const CLEARLY: u32 = 2;
/// In the endgame it is looked again at who lags, so often.
const ENDGAME: Duration = Duration::from_millis(20);
/// After our disk failed, nothing is asked for so long.
const DISK_REST: Duration = Duration::from_secs(1);
/// With fewer hosts than this, more are looked for.
const ENOUGH_HOSTS: usize = 8;
/// Hosts are looked for after so long, then ever more slowly, at last so slowly.
const LOOK: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// A swarm in which nothing came for so long is said to be waiting.
const QUIET: Duration = Duration::from_secs(1);

/// A neighbour: one connection, numbered by the owner. A number is not used again while anything of
/// the old connection may still arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host(pub u32);

/// How an asked-for piece came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// Verified, and held from now on.
    New,
    /// Verified, but it was held already.
    Duplicate,
    /// It does not match its proof.
    Bad,
    /// It could not be kept: our disk failed. It is missing still.
    Failed,
}

/// One thing the owner must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send `Want` for these (at most [`crate::wire::stream::MAX_PIECES`] at a time).
    Ask {
        /// Whom.
        host: Host,
        /// What, in the order it is wanted.
        pieces: Vec<Piece>,
    },
    /// Send `Cancel` for these: they were asked for, or granted, and are no longer wanted.
    Cancel {
        /// Whom.
        host: Host,
        /// What.
        pieces: Vec<Piece>,
    },
    /// Ask this host for nothing any more; it is forgotten here already.
    Drop {
        /// Whom.
        host: Host,
        /// What it did. After [`Why::Poison`] the owner ends the connection and lets that peer in
        /// no more; after [`Why::Silent`] it closes the channel and may try again later.
        why: Why,
    },
    /// Tell every neighbour (`HaveMore`), and `Sharing::on_held`, that we hold these now.
    Announce(Vec<Piece>),
    /// Look for further hosts: the index, neighbours. Comes again, ever more slowly, while it lasts.
    NeedHosts,
    /// Everything is held. Comes once, after the last `Announce`.
    Complete,
}

/// Why a host is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It sent a piece that does not match its proof.
    Poison,
    /// It took asks and answered none of them, several times in a row.
    Silent,
}

/// Why nothing moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// [`Swarm::pause`] was called: our disk is full.
    Paused,
    /// No host is connected.
    NoHosts,
    /// Hosts are there, but so many of the missing pieces are held by none of them, and nothing
    /// else is left to ask for.
    Missing(u32),
    /// Every host that has something for us said that it is busy, the first of them until then.
    AllBusy(Moment),
    /// Hosts that have something for us do not answer.
    Silent,
    /// Nor do they answer, but they are there: they serve others first.
    Queued,
}

/// What happened so far; a swarm that heals hides its wounds, so they are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pieces that came in new.
    pub new: u32,
    /// Bytes of them.
    pub new_bytes: u64,
    /// Pieces that came in a second time.
    pub duplicates: u32,
    /// Bytes of them.
    pub duplicate_bytes: u64,
    /// Pieces that did not match their proof.
    pub bad: u32,
    /// Pieces that our disk did not take.
    pub failed: u32,
    /// Times that our patience with a host ran out.
    pub stalls: u32,
    /// Pieces taken back from a host that was too slow with them, to be asked of others.
    pub steals: u32,
    /// Pieces that a host was too busy for.
    pub busy: u32,
    /// Pieces put on offer again since what was asked came to nothing, for whichever reason.
    pub retries: u32,
    /// Pieces asked for of a second host in the endgame, or a third.
    pub endgame: u32,
    /// Grants that were not taken: asked of others already, or no room for them.
    pub declined: u32,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.new += more.new;
        self.new_bytes += more.new_bytes;
        self.duplicates += more.duplicates;
        self.duplicate_bytes += more.duplicate_bytes;
        self.bad += more.bad;
        self.failed += more.failed;
        self.stalls += more.stalls;
        self.steals += more.steals;
        self.busy += more.busy;
        self.retries += more.retries;
        self.endgame += more.endgame;
        self.declined += more.declined;
    }
}

/// One content being fetched.
///
/// Invariant: every missing piece is either on offer, or asked of one host or (in the endgame) two.
pub struct Swarm {
    layout: Arc<Layout>,
    have: Bitfield,
    dice: Dice,
    hosts: BTreeMap<Host, Neighbour>,
    /// The pieces on offer: missing, and asked of nobody. Copies: hosts that told us they hold one.
    rarity: Rarity,
    asked: BTreeMap<Piece, Askers>,
    pace: Pace,
    /// New pieces not announced yet, and when they will be.
    news: Vec<Piece>,
    announce_at: Moment,
    look_at: Moment,
    look: Backoff,
    endgame_at: Option<Moment>,
    /// So much is asked for already that nothing new to ask for would be.
    is_full: bool,
    /// The latest moment we were told of.
    seen: Moment,
    paused: bool,
    disk_rest: Moment,
    counts: Counts,
    /// Asks of the call under way, a host at a time.
    asks: BTreeMap<Host, Vec<Piece>>,
    outputs: VecDeque<Output>,
}

/// Whom a piece is asked of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Askers {
    first: Host,
    /// In the endgame.
    others: Vec<Host>,
}

impl Swarm {
    /// Fetches what `have` lacks of a content cut like `layout`. `dice` seeds its choices among equals.
    ///
    /// `have` has as many pieces as `layout`. Where nothing is lacking, `Complete` comes at once.
    pub fn new(layout: Arc<Layout>, have: Bitfield, dice: u64) -> Self {
        let mut rarity = Rarity::new(layout.pieces());
        have.missing().for_each(|piece| rarity.offer(piece));
        let mut outputs = VecDeque::new();
        if have.is_full() {
            outputs.push_back(Output::Complete);
        }
        Self {
            layout,
            have,
            dice: Dice(dice),
            hosts: BTreeMap::new(),
            rarity,
            asked: BTreeMap::new(),
            pace: Pace::of_all(),
            news: Vec::new(),
            announce_at: Moment::ZERO,
            look_at: Moment::ZERO,
            look: LOOK,
            endgame_at: None,
            is_full: false,
            seen: Moment::ZERO,
            paused: false,
            disk_rest: Moment::ZERO,
            counts: Counts::default(),
            asks: BTreeMap::new(),
            outputs,
        }
    }

    /// A host opened the content for us (`Opened` came). What it holds comes with [`Swarm::on_have`]
    /// or piece by piece with [`Swarm::on_granted`].
    pub fn on_host(&mut self, now: Moment, host: Host) {
        self.forget(now, host);
        self.hosts.insert(host, Neighbour::new(self.layout.pieces()));
    }

    /// `Have`: all that this host holds; replaces what it said before, and ends its granting.
    /// A bitfield of another length is ignored.
    pub fn on_have(&mut self, now: Moment, host: Host, have: &Bitfield) {
        let Some(n) = self.hosts.get_mut(&host).filter(|_| have.len() == self.have.len()) else {
            return;
        };
        n.grants = None;
        let lost: Vec<Piece> = n.have.iter().filter(|p| !have.has(*p)).collect();
        self.on_lost(now, host, &lost);
        self.learn(host, have.iter());
        self.fill(now);
    }

    /// `HaveMore`.
    pub fn on_have_more(&mut self, now: Moment, host: Host, pieces: &[Piece]) {
        // Most of these are held, or asked of others: nothing follows from that.
        if self.learn(host, pieces.iter().copied()) && !self.is_full {
            self.fill(now);
        }
    }

    /// `Lost`.
    pub fn on_lost(&mut self, now: Moment, host: Host, pieces: &[Piece]) {
        for &piece in pieces {
            let Some(n) = self.hosts.get_mut(&host) else { return };
            if n.have.remove(piece) {
                n.open.remove(piece);
                n.declined.as_mut().map(|declined| declined.remove(piece));
                self.rarity.lower(piece);
                if n.take_back(now, piece) {
                    self.release(now, host, piece);
                }
            }
        }
        self.fill(now);
    }

    /// `Grant`: this host, a seed, holds these for us. Each is asked for, or declined (`Cancel`), at
    /// once. From now on the host is asked for what it grants, or granted before, only.
    pub fn on_granted(&mut self, now: Moment, host: Host, pieces: &[Piece]) {
        let Some(n) = self.hosts.get_mut(&host) else { return };
        // Whoever grants has room for us, whatever it said before.
        (n.grants, n.granted, n.busy) = (Some(now), true, n.busy.min(now));
        self.learn(host, pieces.iter().copied());
        let mut declined = Vec::new();
        for &piece in pieces {
            let may_ask = self.may_ask(now);
            let wanted = match self.asked.get(&piece) {
                // A piece that only a slow host had: the seed sees that it does not get about.
                Some(askers) => {
                    askers.others.is_empty() && self.is_sooner(now, host, piece, askers.first)
                }
                None => piece.0 < self.layout.pieces() && self.rarity.is_offered(piece),
            };
            let Some(n) = self.hosts.get_mut(&host) else { return };
            if wanted && may_ask && n.is_ready(now) {
                self.ask(now, host, piece);
            } else if piece.0 < self.layout.pieces() && !n.asked().any(|p| p == piece) {
                n.declined
                    .get_or_insert_with(|| PieceSet::none(self.layout.pieces()))
                    .insert(piece);
                declined.push(piece);
            }
        }
        self.counts.declined += declined.len() as u32;
        self.cancel(host, declined);
        self.fill(now);
    }

    /// `Busy`: not these, and nothing else for `wait`.
    pub fn on_busy(&mut self, now: Moment, host: Host, pieces: &[Piece], wait: Duration) {
        let Some(n) = self.hosts.get_mut(&host) else { return };
        n.busy = n.busy.max(now + wait.min(MOST_BUSY));
        n.turned_away();
        for &piece in pieces {
            if self.hosts.get_mut(&host).is_some_and(|n| n.take_back(now, piece)) {
                self.counts.busy += 1;
                self.release(now, host, piece);
            }
        }
        self.fill(now);
    }

    /// A piece came from this host, asked for or not, connected still or not.
    pub fn on_piece(&mut self, now: Moment, host: Host, piece: Piece, arrived: Arrived) {
        let bytes = self.layout.len_of(piece);
        if bytes == 0 {
            return; // no such piece
        }
        let asked = self.hosts.get_mut(&host).is_some_and(|n| n.answered(now, piece, bytes));
        self.pace.add(now, bytes);
        match arrived {
            Arrived::New | Arrived::Duplicate => {
                self.hold(now, host, piece, bytes);
            }
            Arrived::Bad => {
                self.counts.bad += 1;
                if asked {
                    self.release(now, host, piece);
                }
                if self.hosts.contains_key(&host) {
                    self.forget(now, host);
                    self.outputs.push_back(Output::Drop { host, why: Why::Poison });
                }
            }
            Arrived::Failed => {
                self.counts.failed += 1;
                self.disk_rest = now + DISK_REST;
                if asked {
                    self.release(now, host, piece);
                }
            }
        }
        self.fill(now);
    }

    /// This host said something; `coming`: a part of a piece. It is there, then, however slow it is, and
    /// however long others are served before us. To be told every few seconds at the least.
    pub fn on_alive(&mut self, now: Moment, host: Host, coming: bool) {
        if let Some(n) = self.hosts.get_mut(&host) {
            n.alive(now, coming);
        }
    }

    /// The host closed the channel, or its connection is over.
    pub fn on_gone(&mut self, now: Moment, host: Host) {
        self.forget(now, host);
        self.fill(now);
    }

    /// A piece that was held is not any more (bit rot was found): it is fetched again.
    pub fn on_rotten(&mut self, now: Moment, piece: Piece) {
        if self.have.remove(piece) {
            self.news.retain(|p| *p != piece);
            self.offer(piece);
            self.look_at = self.look_at.min(now);
            self.fill(now);
        }
    }

    /// Time passed. What came in meanwhile is best handed over before.
    pub fn tick(&mut self, now: Moment) {
        let late: Vec<Host> = self
            .hosts
            .iter()
            .filter(|(_, n)| n.late_at().is_some_and(|at| at <= now))
            .map(|(host, _)| *host)
            .collect();
        late.into_iter().for_each(|host| self.stall(now, host));
        if !self.news.is_empty() && self.announce_at <= now {
            self.announce(now);
        }
        if !self.have.is_full() && self.look_at <= now {
            if self.hosts.len() < ENOUGH_HOSTS || self.unheld() > 0 {
                self.outputs.push_back(Output::NeedHosts);
            } else {
                self.look = LOOK;
            }
            self.look_at = now + self.look.wait();
        }
        self.fill(now);
    }

    /// Our disk is full: what was asked for is cancelled, nothing is asked for until
    /// [`Swarm::resume`]. What is under way may still come in.
    pub fn pause(&mut self, now: Moment) {
        self.paused = true;
        let hosts: Vec<Host> = self.hosts.keys().copied().collect();
        for host in hosts {
            let pieces = self.take_all_back(now, host);
            self.cancel(host, pieces);
        }
    }

    /// There is room on the disk again.
    pub fn resume(&mut self, now: Moment) {
        (self.paused, self.disk_rest) = (false, now);
        self.fill(now);
    }

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Swarm::tick`] is due.
    pub fn next_deadline(&self) -> Option<Moment> {
        let announce = (!self.news.is_empty()).then_some(self.announce_at);
        if self.have.is_full() {
            return announce;
        }
        let wakes = self.hosts.values().flat_map(|n| {
            let lapse = n.grants.map_or(Moment::ZERO, |at| at + GRANTS_LAPSE);
            let ready = n.busy.max(n.rest).max(lapse).max(self.disk_rest);
            // What lies behind was seen already: the host is ready and waits for room.
            let wakes = ready > self.seen && !n.open.is_empty() && !self.paused;
            let lags = n.lags_at().filter(|at| *at > self.seen);
            [n.late_at(), lags, wakes.then_some(ready)]
        });
        wakes.chain([announce, self.endgame_at, Some(self.look_at)]).flatten().min()
    }

    /// What we hold.
    pub const fn have(&self) -> &Bitfield {
        &self.have
    }

    /// Whether everything is held.
    pub const fn is_complete(&self) -> bool {
        self.have.is_full()
    }

    /// Why nothing moves; `None` while something does, and when complete.
    pub fn waiting(&self, now: Moment) -> Option<Waiting> {
        if self.have.is_full() {
            return None;
        }
        if self.paused {
            return Some(Waiting::Paused);
        }
        if self.hosts.is_empty() {
            return Some(Waiting::NoHosts);
        }
        if !self.asked.is_empty() {
            let moves = |n: &Neighbour| n.waited(now).is_some_and(|waited| waited <= QUIET);
            let asked = || self.hosts.values().filter(|n| n.asked().len() > 0);
            return match () {
                () if asked().any(|n| moves(n) || n.is_coming(now)) => None,
                () if asked().any(|n| n.is_alive(now)) => Some(Waiting::Queued),
                () => Some(Waiting::Silent),
            };
        }
        let useful = || self.hosts.values().filter(|n| !n.open.is_empty());
        if useful().any(|n| n.rest > now) {
            let alive = useful().any(|n| n.is_alive(now));
            return Some(if alive { Waiting::Queued } else { Waiting::Silent });
        }
        if let Some(first) = useful().map(|n| n.busy).min() {
            return (first > now).then_some(Waiting::AllBusy(first));
        }
        let granted = self.hosts.values().filter_map(|n| n.grants).max();
        // It granted once, so it has more than it shows.
        let has_more = self.hosts.values().any(|n| n.granted && n.is_alive(now));
        match granted {
            Some(at) if now.since(at) <= QUIET => None,
            _ if has_more => Some(Waiting::Queued),
            Some(_) => Some(Waiting::Silent),
            None => Some(Waiting::Missing(self.unheld())),
        }
    }

    /// How many pieces are missing that no connected host holds. A granting host may hold all.
    pub fn unheld(&self) -> u32 {
        match self.hosts.values().any(|n| n.grants.is_some()) {
            true => 0,
            false => self.rarity.uncopied(),
        }
    }

    /// Bytes a second that came in of late, from all hosts.
    pub fn rate(&self) -> u64 {
        self.pace.rate()
    }

    /// What a host is to us just now, for people to read; `None` if it is not connected.
    pub fn view(&self, now: Moment, host: Host) -> Option<View> {
        let n = self.hosts.get(&host)?;
        Some(View {
            held: n.have.count(),
            grants: n.grants.is_some(),
            asked: n.asked().len() as u32,
            rate: n.rate(),
            given: n.given,
            busy: Some(n.busy).filter(|at| *at > now),
            resting: Some(n.rest).filter(|at| *at > now),
        })
    }

    /// What this host was asked for and did not answer yet.
    #[cfg(test)]
    fn asked_of(&self, host: Host) -> Vec<Piece> {
        self.hosts.get(&host).map_or_else(Vec::new, |n| n.asked().collect())
    }

    /// What happened so far.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Panics when an invariant broke.
    pub fn check(&self) {
        let mut outstanding = BTreeMap::<Piece, Vec<Host>>::new();
        let mut copies = vec![0u16; self.layout.pieces() as usize];
        for (host, n) in &self.hosts {
            n.check();
            for piece in n.asked() {
                assert!(n.have.has(piece), "{host:?} was asked for {piece:?}, which it has not");
                outstanding.entry(piece).or_default().push(*host);
            }
            n.have.iter().for_each(|p| copies[p.0 as usize] += 1);
            let open = n.have.iter().filter(|p| self.rarity.is_offered(*p)).count();
            assert_eq!(open, n.open.count() as usize, "open pieces of {host:?}");
        }
        for piece in (0..self.layout.pieces()).map(Piece) {
            assert_eq!(self.rarity.copies(piece), copies[piece.0 as usize], "copies of {piece:?}");
            let states = [
                self.have.has(piece),
                self.rarity.is_offered(piece),
                self.asked.contains_key(&piece),
            ];
            assert_eq!(
                states.iter().filter(|s| **s).count(),
                1,
                "{piece:?}: held, on offer, asked: {states:?}"
            );
        }
        for (piece, askers) in &self.asked {
            let mut hosts = vec![askers.first];
            hosts.extend(&askers.others);
            hosts.sort_unstable();
            assert_eq!(outstanding.remove(piece), Some(hosts.clone()), "askers of {piece:?}");
        }
        assert!(outstanding.is_empty(), "asked and forgotten: {outstanding:?}");
        assert!(!self.paused || self.asked.is_empty(), "paused, yet pieces are asked for");
        assert!(self.asks.is_empty(), "asks that were never said");
    }

    /// These are held by `host`, as it says. True if any of them is on offer.
    fn learn(&mut self, host: Host, pieces: impl Iterator<Item = Piece>) -> bool {
        let Some(n) = self.hosts.get_mut(&host) else { return false };
        let before = n.open.count();
        for piece in pieces {
            if n.have.insert(piece) {
                self.rarity.raise(piece);
                if self.rarity.is_offered(piece) {
                    n.open.insert(piece);
                }
            }
        }
        n.open.count() > before
    }

    /// `piece` is missing and asked of nobody.
    fn offer(&mut self, piece: Piece) {
        self.rarity.offer(piece);
        for n in self.hosts.values_mut() {
            if n.have.has(piece) {
                n.open.insert(piece);
            }
        }
    }

    /// `piece` is held, or asked of somebody.
    fn retract(&mut self, piece: Piece) {
        if self.rarity.retract(piece) {
            for n in self.hosts.values_mut() {
                n.open.remove(piece);
            }
        }
    }

    fn ask(&mut self, now: Moment, host: Host, piece: Piece) {
        let bytes = self.layout.len_of(piece);
        self.retract(piece);
        let Some(n) = self.hosts.get_mut(&host) else { return };
        n.ask(now, piece, bytes);
        self.pace.start(now);
        self.asked
            .entry(piece)
            .and_modify(|askers| askers.others.push(host))
            .or_insert(Askers { first: host, others: Vec::new() });
        self.asks.entry(host).or_default().push(piece);
    }

    /// `piece` is no longer asked of `host`, whose own book is settled; missing, it is on offer again
    /// if it was asked of nobody else.
    fn release(&mut self, now: Moment, host: Host, piece: Piece) {
        let Some(askers) = self.asked.get_mut(&piece) else { return };
        if askers.first != host {
            askers.others.retain(|other| *other != host);
        } else if askers.others.is_empty() {
            self.asked.remove(&piece);
            self.counts.retries += 1;
            self.offer(piece);
        } else {
            askers.first = askers.others.remove(0);
        }
        if self.asked.is_empty() {
            self.pace.stop(now);
        }
    }

    /// `piece` is here.
    fn hold(&mut self, now: Moment, host: Host, piece: Piece, bytes: u32) {
        if !self.have.insert(piece) {
            self.counts.duplicates += 1;
            self.counts.duplicate_bytes += u64::from(bytes);
            return;
        }
        self.counts.new += 1;
        self.counts.new_bytes += u64::from(bytes);
        if let Some(n) = self.hosts.get_mut(&host) {
            n.given += u64::from(bytes);
        }
        self.retract(piece);
        if let Some(askers) = self.asked.remove(&piece) {
            for other in std::iter::once(askers.first).chain(askers.others) {
                if self.hosts.get_mut(&other).is_some_and(|n| n.take_back(now, piece)) {
                    self.cancel(other, vec![piece]);
                }
            }
        }
        if self.asked.is_empty() {
            self.pace.stop(now);
        }
        self.news.push(piece);
        if self.have.is_full() {
            self.announce(now);
            self.outputs.push_back(Output::Complete);
        } else if self.announce_at <= now || self.news.len() >= MOST_IN_FRAME {
            self.announce(now);
        }
    }

    fn announce(&mut self, now: Moment) {
        let due = self.pace.time_for(self.hosts.len() as u64 * ANNOUNCE_EACH).unwrap_or_default();
        self.announce_at = now + due.clamp(ANNOUNCE, ANNOUNCE_MOST);
        self.outputs.push_back(Output::Announce(std::mem::take(&mut self.news)));
    }

    fn cancel(&mut self, host: Host, pieces: Vec<Piece>) {
        if !pieces.is_empty() {
            self.outputs.push_back(Output::Cancel { host, pieces });
        }
    }

    fn take_all_back(&mut self, now: Moment, host: Host) -> Vec<Piece> {
        let pieces = self.hosts.get_mut(&host).map_or_else(Vec::new, |n| n.take_all_back(now));
        pieces.iter().for_each(|piece| self.release(now, host, *piece));
        pieces
    }

    /// The host let us wait too long.
    fn stall(&mut self, now: Moment, host: Host) {
        let pieces = self.take_all_back(now, host);
        self.counts.stalls += 1;
        self.counts.steals += pieces.len() as u32;
        self.cancel(host, pieces);
        let Some(n) = self.hosts.get_mut(&host) else { return };
        n.rest = now + REST;
        n.stalls = n.stalls.saturating_add(1);
        if n.stalls >= MOST_STALLS && !n.is_alive(now) {
            self.forget(now, host);
            self.outputs.push_back(Output::Drop { host, why: Why::Silent });
        }
    }

    /// The host is nothing to us any more.
    fn forget(&mut self, now: Moment, host: Host) {
        self.take_all_back(now, host);
        if let Some(n) = self.hosts.remove(&host) {
            n.have.iter().for_each(|piece| self.rarity.lower(piece));
            self.look = LOOK;
            self.look_at = self.look_at.min(now + self.look.wait());
        }
    }

    fn may_ask(&self, now: Moment) -> bool {
        !self.paused && self.disk_rest <= now && !self.have.is_full()
    }

    /// Asks for as much as there is room for, and says so.
    fn fill(&mut self, now: Moment) {
        self.seen = now;
        self.endgame_at = None;
        self.is_full = false;
        if self.may_ask(now) {
            if self.asked.is_empty() {
                let lapsed = |at: Moment| at + GRANTS_LAPSE <= now;
                let hosts = self.hosts.values_mut();
                hosts.filter(|n| n.grants.is_some_and(lapsed)).for_each(|n| n.grants = None);
            }
            while let Some(host) = self.freest(now) {
                let Some(n) = self.hosts.get(&host) else { break };
                // Nobody to differ from: in the order that disks read in.
                let liked = n.following.filter(|_| self.hosts.len() == 1);
                let Some(piece) = self.rarity.rarest(&n.open, liked, &mut self.dice) else { break };
                self.ask(now, host, piece);
            }
            if let Some((host, piece)) = self.granted_before(now) {
                self.ask(now, host, piece);
            }
            if self.is_endgame() && !self.asked.is_empty() {
                self.endgame(now);
                self.endgame_at = Some(now + ENDGAME);
            }
        }
        for (host, pieces) in std::mem::take(&mut self.asks) {
            for some in pieces.chunks(MOST_IN_FRAME) {
                self.outputs.push_back(Output::Ask { host, pieces: some.to_vec() });
            }
        }
    }

    /// The host with room for an ask that would answer it soonest, among those that have something on
    /// offer. One that never answered yet is tried first.
    fn freest(&mut self, now: Moment) -> Option<Host> {
        let piece_size = self.layout.piece_size();
        let least = LEAST_AHEAD_PIECES * u64::from(piece_size);
        // What hosts grant, they ration themselves; who lags takes nothing from the others' share.
        let chosen = self.hosts.values().filter(|n| n.grants.is_none() && !n.lags(now));
        let (chosen, asked) =
            chosen.fold((0, 0), |(count, sum), n| (count + 1, sum + n.asked_bytes()));
        let quickest =
            self.hosts.values().filter_map(Neighbour::quickest).min().unwrap_or_default();
        let all = least.max(self.pace.within_at_best(AHEAD + quickest));
        let all = all + self.behind().min(all);
        self.is_full = asked + u64::from(piece_size) > all;
        if self.is_full {
            return None;
        }
        let mut best: Option<(Duration, Host)> = None;
        let mut ties = 1;
        for (host, n) in &self.hosts {
            if n.open.is_empty() || n.grants.is_some() || !n.is_ready(now) {
                continue;
            }
            // A host that never answered yet is trusted with little, unless there is no other.
            let part = if n.rate() > 0 || self.hosts.len() == 1 { all / chosen.max(1) } else { 0 };
            let window = n.window(piece_size).max(part);
            // A wide window is filled in steps, so that asks travel together.
            let step = if self.asks.contains_key(host) { 0 } else { window / 8 };
            if n.asked_bytes() + u64::from(piece_size).max(step) > window {
                continue;
            }
            let wait = if n.is_untried() { Duration::ZERO } else { n.expected_next(piece_size) };
            let better = match best {
                None => true,
                Some((least, _)) if wait == least => {
                    ties += 1;
                    self.dice.below(ties) == 0
                }
                Some((least, _)) => wait < least,
            };
            if better {
                ties = if best.is_some_and(|(least, _)| least == wait) { ties } else { 1 };
                best = Some((wait, *host));
            }
        }
        best.map(|(_, host)| host)
    }

    /// With nothing else to wait for: a piece that a host granted and we declined, since somebody else
    /// was to bring it, who then did not. It is asked for as if it were granted again.
    fn granted_before(&mut self, now: Moment) -> Option<(Host, Piece)> {
        if !self.asked.is_empty() {
            return None;
        }
        self.hosts.iter().filter(|(_, n)| n.grants.is_some() && n.is_ready(now)).find_map(
            |(host, n)| {
                Some((*host, self.rarity.rarest(n.declined.as_ref()?, None, &mut self.dice)?))
            },
        )
    }

    /// How many bytes less are here than the neighbours that are still fetching hold on average.
    fn behind(&self) -> u64 {
        let fetching = |n: &&Neighbour| n.grants.is_none() && !n.have.is_full();
        let held = self.hosts.values().filter(fetching).map(|n| u64::from(n.have.count()));
        let (hosts, pieces) = held.fold((0, 0), |(hosts, sum), held| (hosts + 1, sum + held));
        let average = u64::checked_div(pieces, hosts).unwrap_or(0);
        average.saturating_sub(self.have.count().into()) * u64::from(self.layout.piece_size())
    }

    /// Whether nothing is left that anybody could be asked for first.
    fn is_endgame(&self) -> bool {
        self.rarity.offered() == self.unheld()
    }

    /// Whether `host` would bring `piece` clearly sooner than `first`, who was asked for it.
    fn is_sooner(&self, now: Moment, host: Host, piece: Piece, first: Host) -> bool {
        let (Some(n), Some(other)) = (self.hosts.get(&host), self.hosts.get(&first)) else {
            return false;
        };
        let wait = other.expected(now).find(|(p, _)| *p == piece).map(|(_, wait)| wait);
        host != first
            && wait.is_some_and(|w| n.expected_next(self.layout.len_of(piece)) * CLEARLY < w)
    }

    /// Asks idle hosts for what others are expected to bring later than they would; of a third host only
    /// what both would bring clearly later.
    fn endgame(&mut self, now: Moment) {
        let piece_size = self.layout.piece_size();
        let idle: Vec<Host> = self
            .hosts
            .iter()
            .filter(|(_, n)| n.grants.is_none() && n.is_ready(now))
            .filter(|(_, n)| n.asked_bytes() < u64::from(piece_size))
            .map(|(host, _)| *host)
            .collect();
        if idle.is_empty() {
            return;
        }
        let mut soonest = BTreeMap::<Piece, Duration>::new();
        for (piece, wait) in self.hosts.values().flat_map(|n| n.expected(now)) {
            let least = soonest.entry(piece).or_insert(wait);
            *least = wait.min(*least);
        }
        let mut slowest: Vec<(Duration, Piece)> =
            soonest.into_iter().map(|(piece, wait)| (wait, piece)).collect();
        slowest.sort_unstable_by(|a, b| b.cmp(a));
        for (wait, piece) in slowest {
            let bytes = self.layout.len_of(piece);
            let Some(askers) = self.asked.get(&piece) else { continue };
            let times = match askers.others.len() {
                0 => 1,
                1 => CLEARLY,
                _ => continue,
            };
            let quickest = idle
                .iter()
                .filter_map(|host| self.hosts.get(host).map(|n| (host, n)))
                .filter(|(host, _)| askers.first != **host && !askers.others.contains(host))
                .filter(|(_, n)| n.have.has(piece) && n.asked_bytes() < 2 * u64::from(piece_size))
                .map(|(host, n)| (n.expected_next(bytes), *host))
                .min();
            if let Some((_, host)) = quickest.filter(|(time, _)| *time * times < wait) {
                self.counts.endgame += 1;
                self.ask(now, host, piece);
            }
        }
    }
}

/// What a host is to a swarm just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Pieces it told us it holds.
    pub held: u32,
    /// It grants pieces instead of letting us choose.
    pub grants: bool,
    /// Pieces asked of it and not answered yet.
    pub asked: u32,
    /// Bytes a second it sends of late.
    pub rate: u64,
    /// Bytes it sent that were new to us.
    pub given: u64,
    /// It said that it is busy, until then.
    pub busy: Option<Moment>,
    /// It let us wait too long and is left alone until then.
    pub resting: Option<Moment>,
}
