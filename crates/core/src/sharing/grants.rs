//! Owns what a seed lets whom take of one content: each piece once before any twice, and the rarest
//! then. Never sends anything, and never refuses what is asked for outside of its grants.
//!
//! Readers that draw blindly take what others draw too, and the second copies of fresh pieces are
//! exactly what a swarm is late by (see DESIGN.md). So a seed with several readers steers them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::id::{PeerId, Piece};
use crate::layout::Layout;
use crate::rarity::PieceSet;
use crate::swarm::Host;
use crate::time::{Duration, Moment};

use super::stock::Stock;

/// A reader has this many pieces granted and not sent (or its part of [`OPEN_AHEAD`]) …
const OPEN_EACH: u64 = 2;
/// … and all readers together this many (or what goes out in [`OPEN_AHEAD`], if that is more).
const OPEN_ALL: u64 = 16;
/// See [`OPEN_ALL`].
const OPEN_AHEAD: Duration = Duration::from_millis(20);
/// A reader of whose fresh pieces so many were not seen elsewhere yet gets no more of them …
const UNSPREAD: u64 = 4;
/// … or as many as are its part in this time: a piece needs as long to get about and be told of.
const SPREAD_TIME: Duration = Duration::from_millis(100);
/// A grant that is not taken in this time (or in four times what all open grants should take to send:
/// its word waits behind their bytes) is withdrawn …
const NOT_TAKEN: Duration = Duration::from_secs(1);
/// … and its reader is granted nothing for so long.
const REST: Duration = Duration::from_secs(2);
/// A piece that is taken but not sent in this time (or in four times what all open grants should
/// take) stops counting as granted: its reader does not read.
const NOT_SENT: Duration = Duration::from_secs(2);
/// A piece that was sent but not announced in this time may be granted again: a disk failed.
const NOT_ANNOUNCED: Duration = Duration::from_secs(5);
/// What is under way to its first reader is on offer again when this many usual times have passed since
/// it was last granted, …
const LATE: u32 = 2;
/// … or this time, while none is known.
const LATE_FIRST: Duration = Duration::from_millis(500);
/// The usual time moves by its eighth, so it is never less than this: from nothing it would not come back.
const USUAL_LEAST: Duration = Duration::from_millis(1);
/// What a reader declined, or we withdrew, is not granted to it again for so long.
const DECLINED: Duration = Duration::from_secs(2);

/// Whenever we have nothing to do though readers lack pieces, the limits above were too narrow: the
/// network is slow to answer, or readers cannot reach each other. When we idled for this long in all, or
/// for as long as a reader takes to answer a grant, they double: sooner nothing can have come of it. When
/// we were busy for as long they narrow by a 64th.
const WIDEN_EVERY: Duration = Duration::from_millis(5);
/// See [`WIDEN_EVERY`].
const UNSTRETCHED: u64 = 64;
/// The limits are never wider than 32 times.
const MOST_STRETCHED: u64 = 32 * UNSTRETCHED;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Granted,
    Taken,
    Sent,
}

#[derive(Clone, Copy, Debug)]
struct Grant {
    stage: Stage,
    since: Moment,
    /// When it was given.
    given: Moment,
}

/// A member that has the content open, over one connection or several.
struct Reader {
    hosts: Vec<Host>,
    /// What it told us it holds.
    have: Bitfield,
    /// What may be granted to it: held by us, and neither held by it, nor granted, nor declined.
    lacks: PieceSet,
    /// Granted (or asked for without), and not announced by it yet.
    grants: BTreeMap<Piece, Grant>,
    /// Bytes of the grants that were not sent.
    open: u64,
    declined: BTreeMap<Piece, Moment>,
    /// Bytes of its fresh pieces that nobody else announced.
    unspread: u64,
    rest: Moment,
    /// When it was last granted something: who waits longest comes first.
    last: Moment,
}

/// How fast we send, for the limits that grow with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outflow {
    /// Bytes a second; 0 while unknown.
    pub(super) rate: u64,
    /// Nothing is queued or being sent, whatever the content, but on lines that are stuck.
    pub(super) idle: bool,
}

impl Outflow {
    const fn within(&self, time: Duration) -> u64 {
        self.rate / 1_000 * time.as_millis() as u64
    }
}

/// What a seed grants of one content.
pub(super) struct Grants {
    layout: Arc<Layout>,
    readers: BTreeMap<PeerId, Reader>,
    stock: Stock,
    /// Bytes of all grants that were not sent.
    open: u64,
    /// Fresh pieces, sent, that were seen with this reader only.
    unspread: BTreeMap<Piece, PeerId>,
    /// Two readers or more lack something.
    granting: bool,
    /// By how much the limits are widened, in [`UNSTRETCHED`]ths.
    stretch: u64,
    /// Whether we idled when that was looked at last, and how long we had idled and been busy by then
    /// since the limits were changed for it.
    idles: bool,
    looked: Moment,
    idled: Duration,
    busy: Duration,
    /// How long the last grant that was taken had waited for that.
    answer: Option<Duration>,
    /// How long the usual grant took to be announced: the median, as far as is known.
    arrival: Option<Duration>,
}

impl Grants {
    pub(super) fn new(layout: Arc<Layout>, have: &Bitfield) -> Self {
        let mut stock = Stock::new(layout.pieces());
        have.iter().for_each(|piece| stock.hold(piece));
        Self {
            layout,
            readers: BTreeMap::new(),
            stock,
            open: 0,
            unspread: BTreeMap::new(),
            granting: false,
            stretch: UNSTRETCHED,
            idles: false,
            looked: Moment::ZERO,
            idled: Duration::ZERO,
            busy: Duration::ZERO,
            answer: None,
            arrival: None,
        }
    }

    /// Whether several readers are steered; if not, a reader sees what we hold and helps itself.
    pub(super) const fn are_on(&self) -> bool {
        self.granting
    }

    pub(super) fn on_open(&mut self, host: Host, peer: PeerId) {
        let pieces = self.layout.pieces();
        let reader = self.readers.entry(peer).or_insert_with(|| {
            let mut lacks = PieceSet::none(pieces);
            let held = (0..pieces).map(Piece).filter(|p| self.stock.holds(*p));
            held.for_each(|piece| {
                lacks.insert(piece);
            });
            Reader {
                hosts: Vec::new(),
                have: Bitfield::none(pieces),
                lacks,
                grants: BTreeMap::new(),
                open: 0,
                declined: BTreeMap::new(),
                unspread: 0,
                rest: Moment::ZERO,
                last: Moment::ZERO,
            }
        });
        reader.hosts.push(host);
    }

    pub(super) fn on_closed(&mut self, host: Host, peer: PeerId) {
        let Some(reader) = self.readers.get_mut(&peer) else { return };
        reader.hosts.retain(|h| *h != host);
        if !reader.hosts.is_empty() {
            return;
        }
        let granted = reader.grants.keys().copied().collect::<Vec<_>>();
        for piece in granted {
            self.note(peer, piece, None);
            self.stock.break_promise(piece);
        }
        if let Some(reader) = self.readers.remove(&peer) {
            reader.have.iter().for_each(|piece| self.stock.miss(piece));
            self.unspread.retain(|_, whose| *whose != peer);
        }
    }

    /// The reader holds exactly these.
    pub(super) fn on_have(&mut self, now: Moment, peer: PeerId, have: &Bitfield) {
        let Some(reader) = self.readers.get(&peer).filter(|r| r.have.len() == have.len()) else {
            return;
        };
        let lost: Vec<Piece> = reader.have.iter().filter(|p| !have.has(*p)).collect();
        self.on_their_lost(peer, &lost);
        have.iter().for_each(|piece| self.on_announced(now, peer, piece));
    }

    /// The reader holds this, too.
    pub(super) fn on_announced(&mut self, now: Moment, peer: PeerId, piece: Piece) {
        let Some(reader) = self.readers.get_mut(&peer) else { return };
        if !reader.have.insert(piece) {
            return;
        }
        reader.lacks.remove(piece);
        reader.declined.remove(&piece);
        let grant = self.note(peer, piece, None);
        self.stock.see(piece, grant.is_some());
        if let Some(grant) = grant {
            self.arrived(now.since(grant.given));
        }
        if self.unspread.get(&piece).is_some_and(|whose| *whose != peer) {
            self.is_spread(piece);
        }
    }

    /// Moves the usual time towards this one.
    fn arrived(&mut self, took: Duration) {
        let moved = match self.arrival {
            None => took,
            Some(usual) if took > usual => usual + usual / 8,
            Some(usual) => usual - usual / 8,
        };
        self.arrival = Some(moved.max(USUAL_LEAST));
    }

    pub(super) fn on_their_lost(&mut self, peer: PeerId, pieces: &[Piece]) {
        for &piece in pieces {
            let Some(reader) = self.readers.get_mut(&peer) else { return };
            if reader.have.remove(piece) {
                self.stock.miss(piece);
                if self.stock.holds(piece) {
                    reader.lacks.insert(piece);
                }
                if self.unspread.get(&piece) == Some(&peer) {
                    self.is_spread(piece);
                }
            }
        }
    }

    /// We hold this again.
    pub(super) fn on_held(&mut self, piece: Piece) {
        self.stock.hold(piece);
        for reader in self.readers.values_mut() {
            let spoken = reader.have.has(piece)
                || reader.grants.contains_key(&piece)
                || reader.declined.contains_key(&piece);
            if !spoken {
                reader.lacks.insert(piece);
            }
        }
    }

    /// We hold this no longer.
    pub(super) fn on_lost(&mut self, piece: Piece) {
        self.stock.lose(piece);
        let readers: Vec<PeerId> = self.readers.keys().copied().collect();
        for peer in readers {
            if self.note(peer, piece, None).is_some() {
                self.stock.break_promise(piece);
            }
            let Some(reader) = self.readers.get_mut(&peer) else { continue };
            reader.lacks.remove(piece);
            reader.declined.remove(&piece);
        }
        self.is_spread(piece);
    }

    /// Whether the reader was granted this and did not have it sent yet.
    pub(super) fn is_open(&self, peer: PeerId, piece: Piece) -> bool {
        let grant = self.readers.get(&peer).and_then(|r| r.grants.get(&piece));
        grant.is_some_and(|g| g.stage != Stage::Sent)
    }

    /// The reader asked for this and gets it: that counts as a grant where none was given.
    pub(super) fn on_taken(&mut self, now: Moment, peer: PeerId, piece: Piece) {
        self.advance(now, peer, piece, Stage::Taken);
    }

    /// It was sent.
    pub(super) fn on_sent(&mut self, now: Moment, peer: PeerId, piece: Piece) {
        self.advance(now, peer, piece, Stage::Sent);
        if self.stock.copies(piece) != 1 || self.unspread.get(&piece) == Some(&peer) {
            return;
        }
        // It may count as another's, who had it sent and then gave it up.
        self.is_spread(piece);
        if let Some(reader) = self.readers.get_mut(&peer) {
            reader.unspread += u64::from(self.layout.len_of(piece));
            self.unspread.insert(piece, peer);
        }
    }

    fn advance(&mut self, now: Moment, peer: PeerId, piece: Piece, stage: Stage) {
        let Some(reader) = self.readers.get_mut(&peer).filter(|r| !r.have.has(piece)) else {
            return;
        };
        reader.lacks.remove(piece);
        reader.declined.remove(&piece);
        let before = reader.grants.get(&piece).copied();
        let given = before.map_or(now, |before| before.given);
        self.note(peer, piece, Some(Grant { stage, since: now, given }));
        match before {
            None => self.stock.promise(piece),
            Some(before) if (before.stage, stage) == (Stage::Granted, Stage::Taken) => {
                self.answer = Some(now.since(before.since));
            }
            Some(_) => {}
        }
    }

    /// Puts a grant into the books, or takes it out of them; the one there was.
    fn note(&mut self, peer: PeerId, piece: Piece, grant: Option<Grant>) -> Option<Grant> {
        let bytes = u64::from(self.layout.len_of(piece));
        let reader = self.readers.get_mut(&peer)?;
        let before = match grant {
            Some(grant) => reader.grants.insert(piece, grant),
            None => reader.grants.remove(&piece),
        };
        let open =
            |grant: Option<Grant>| grant.map_or(0, |g| bytes * u64::from(g.stage != Stage::Sent));
        reader.open = reader.open + open(grant) - open(before);
        self.open = self.open + open(grant) - open(before);
        before
    }

    /// The reader does not want this of us just now, or will not get it.
    pub(super) fn on_declined(&mut self, now: Moment, peer: PeerId, piece: Piece) {
        if self.note(peer, piece, None).is_some() {
            self.stock.break_promise(piece);
            self.readers.get_mut(&peer).map(|reader| reader.declined.insert(piece, now));
        }
    }

    /// Somebody else has it, or nobody: either way its first reader is not to be waited for.
    fn is_spread(&mut self, piece: Piece) {
        if let Some(whose) = self.unspread.remove(&piece)
            && let Some(reader) = self.readers.get_mut(&whose)
        {
            reader.unspread -= u64::from(self.layout.len_of(piece));
        }
    }

    /// Sees whether readers are to be steered; returns the hosts that are to see what we hold since
    /// they no longer are.
    pub(super) fn settle(&mut self) -> Vec<Host> {
        let ours = self.stock.held();
        let lacking = self.readers.values().filter(|r| r.have.count() < ours);
        let was = std::mem::replace(&mut self.granting, lacking.take(2).count() == 2);
        match was && !self.granting {
            true => self.readers.values().flat_map(|r| r.hosts.iter().copied()).collect(),
            false => Vec::new(),
        }
    }

    /// Grants as much as the limits let it, and says what to whom.
    pub(super) fn grant(
        &mut self,
        now: Moment,
        outflow: Outflow,
        dice: &mut Dice,
    ) -> BTreeMap<Host, Vec<Piece>> {
        let mut grants = BTreeMap::<Host, Vec<Piece>>::new();
        if !self.granting {
            return grants;
        }
        self.adapt(now, outflow.idle);
        let size = u64::from(self.layout.piece_size());
        let all = self.stretched((OPEN_ALL * size).max(outflow.within(OPEN_AHEAD)));
        while self.open + size <= all {
            let Some((peer, piece)) = self.next_grant(now, outflow, &grants, dice) else { break };
            self.advance(now, peer, piece, Stage::Granted);
            let Some(reader) = self.readers.get_mut(&peer) else { break };
            reader.last = now;
            // Several connections to one member are there to be used together.
            let host = reader.hosts[dice.below(reader.hosts.len() as u64) as usize];
            grants.entry(host).or_default().push(piece);
        }
        grants
    }

    /// Widens the limits while we idle though readers lack pieces; narrows them while we do not.
    fn adapt(&mut self, now: Moment, idle: bool) {
        let passed = now.since(std::mem::replace(&mut self.looked, now));
        let idles = idle && self.readers.values().any(|r| self.stock.offers_of(&r.lacks));
        let patience = self.answer.map(|answer| answer.max(WIDEN_EVERY));
        match std::mem::replace(&mut self.idles, idles) {
            true => self.idled += passed,
            false => self.busy += passed,
        }
        if patience.is_some_and(|patience| self.idled >= patience) {
            self.idled = Duration::ZERO;
            self.stretch = (2 * self.stretch).min(MOST_STRETCHED);
        }
        if patience.is_some_and(|patience| self.busy >= patience) {
            self.busy = Duration::ZERO;
            self.stretch = (self.stretch - self.stretch / UNSTRETCHED).max(UNSTRETCHED);
        }
    }

    const fn stretched(&self, bytes: u64) -> u64 {
        bytes * self.stretch / UNSTRETCHED
    }

    /// Who is to be granted what next. With nothing else to do, also one that does not pass things on:
    /// perhaps nobody can reach it but us.
    fn next_grant(
        &self,
        now: Moment,
        outflow: Outflow,
        grants: &BTreeMap<Host, Vec<Piece>>,
        dice: &mut Dice,
    ) -> Option<(PeerId, Piece)> {
        let idle = outflow.idle && self.open == 0;
        let size = u64::from(self.layout.piece_size());
        let part = Outflow { rate: outflow.rate / self.readers.len().max(1) as u64, ..outflow };
        let each = self.stretched((OPEN_EACH * size).max(part.within(OPEN_AHEAD)));
        let unspread = self.stretched((UNSPREAD * size).max(part.within(SPREAD_TIME)));
        let fits = |reader: &Reader| {
            // A wide window is filled in steps, so that grants travel together.
            let begun = reader.hosts.iter().any(|host| grants.contains_key(host));
            let step = if begun { 0 } else { each / 8 };
            reader.rest <= now
                && reader.open + size.max(step) <= each
                && (reader.unspread < unspread || idle)
        };
        let readers =
            self.readers.iter().filter(|(_, r)| fits(r) && self.stock.offers_of(&r.lacks));
        let (peer, reader) =
            readers.min_by_key(|(_, r)| (idle.then_some(r.unspread), r.open, r.last))?;
        Some((*peer, self.stock.rarest(&reader.lacks, dice)?))
    }

    /// Withdraws what was not taken (returns how many), forgets what was not announced, offers again
    /// what was declined and what is late.
    pub(super) fn tick(&mut self, now: Moment, outflow: Outflow) -> u64 {
        let mut withdrawn = 0;
        let sending = self.open.saturating_mul(1_000).checked_div(outflow.rate).unwrap_or(0);
        let sending = Duration::from_millis(4 * sending);
        let late = |grant: &Grant| {
            now.since(grant.since)
                >= match grant.stage {
                    Stage::Granted => NOT_TAKEN.max(sending),
                    Stage::Taken => NOT_SENT.max(sending),
                    Stage::Sent => NOT_ANNOUNCED,
                }
        };
        let peers: Vec<PeerId> = self.readers.keys().copied().collect();
        for peer in peers {
            let Some(reader) = self.readers.get_mut(&peer) else { continue };
            let again: Vec<Piece> = reader
                .declined
                .iter()
                .filter(|(_, since)| now.since(**since) >= DECLINED)
                .map(|(piece, _)| *piece)
                .collect();
            for piece in again {
                reader.declined.remove(&piece);
                if self.stock.holds(piece) {
                    reader.lacks.insert(piece);
                }
            }
            let lapsed: Vec<(Piece, Stage)> = reader
                .grants
                .iter()
                .filter(|(_, grant)| late(grant))
                .map(|(piece, grant)| (*piece, grant.stage))
                .collect();
            let not_taken = lapsed.iter().filter(|(_, stage)| *stage == Stage::Granted).count();
            if not_taken > 0 {
                reader.rest = now + REST;
                withdrawn += not_taken as u64;
            }
            lapsed.iter().for_each(|(piece, _)| self.on_declined(now, peer, *piece));
        }
        self.offer_late(now);
        withdrawn
    }

    /// Offers again what should have arrived by now, with whomever it was promised.
    fn offer_late(&mut self, now: Moment) {
        let patience = self.arrival.map_or(LATE_FIRST, |usual| usual * LATE);
        let mut newest = BTreeMap::<Piece, Moment>::new();
        let grants = self.readers.values().flat_map(|r| &r.grants);
        for (piece, grant) in grants.filter(|(piece, _)| self.stock.is_under_way(**piece)) {
            let given = newest.entry(*piece).or_insert(grant.given);
            *given = grant.given.max(*given);
        }
        newest.retain(|_, given| now.since(*given) >= patience);
        newest.keys().for_each(|piece| self.stock.expire(*piece));
    }

    /// Whether time will change anything: [`Grants::tick`] is needed now and then.
    pub(super) fn needs_ticks(&self) -> bool {
        let waits = |r: &Reader| !r.grants.is_empty() || !r.declined.is_empty();
        self.readers.values().any(|r| waits(r) || (self.granting && !r.lacks.is_empty()))
    }

    pub(super) fn check(&self) {
        let mut copies = vec![0u16; self.layout.pieces() as usize];
        let mut seen = copies.clone();
        let mut unspread = BTreeMap::<PeerId, u64>::new();
        for (piece, peer) in &self.unspread {
            *unspread.entry(*peer).or_default() += u64::from(self.layout.len_of(*piece));
        }
        for (peer, reader) in &self.readers {
            assert!(!reader.hosts.is_empty(), "{peer:?} reads over no connection");
            let mut open = 0;
            for (piece, grant) in &reader.grants {
                assert!(!reader.have.has(*piece), "{piece:?} is granted to {peer:?}, which has it");
                if grant.stage != Stage::Sent {
                    open += u64::from(self.layout.len_of(*piece));
                }
            }
            assert_eq!(open, reader.open, "bytes granted to {peer:?}");
            assert_eq!(unspread.remove(peer).unwrap_or(0), reader.unspread, "unspread of {peer:?}");
            for piece in (0..self.layout.pieces()).map(Piece) {
                let counted = reader.have.has(piece) || reader.grants.contains_key(&piece);
                copies[piece.0 as usize] += u16::from(counted);
                seen[piece.0 as usize] += u16::from(reader.have.has(piece));
                let lacks =
                    self.stock.holds(piece) && !counted && !reader.declined.contains_key(&piece);
                assert_eq!(lacks, reader.lacks.has(piece), "{peer:?} lacks {piece:?}");
            }
        }
        let open: u64 = self.readers.values().map(|r| r.open).sum();
        assert_eq!(open, self.open, "bytes granted in all");
        assert!(unspread.is_empty(), "unspread pieces of readers that are gone");
        for piece in (0..self.layout.pieces()).map(Piece) {
            let (copies, seen) = (copies[piece.0 as usize], seen[piece.0 as usize]);
            let stock = &self.stock;
            assert_eq!((copies, seen), (stock.copies(piece), stock.seen(piece)), "of {piece:?}");
            let under_way = stock.holds(piece) && copies > 0 && seen == 0 && !stock.is_late(piece);
            assert_eq!(under_way, stock.is_under_way(piece), "{piece:?} is under way");
        }
    }
}
