//! Owns what one host is to a swarm: what it holds, what it was asked for in which order, how fast
//! it answers and how long to wait for it. Never decides which piece to ask for.

use std::collections::VecDeque;

use crate::bitfield::Bitfield;
use crate::id::Piece;
use crate::pace::Pace;
use crate::rarity::PieceSet;
use crate::time::{Duration, Moment};

/// A host is asked ahead for as much as it sends in this time, besides its quickest answer: enough
/// to bridge a busy moment of either side, little enough to ask elsewhere when things change.
const AHEAD: Duration = Duration::from_millis(25);
/// … and always for this many pieces: one on its way, one to follow.
const LEAST_PIECES: u64 = 2;
/// … and never for more bytes than this.
const MOST_BYTES: u64 = 64 << 20;
/// … nor for more pieces: they may be tiny.
const MOST_PIECES: usize = 2_048;
/// An answer is late after so many usual ones …
const PATIENCE: u32 = 4;
/// … and not before this, whatever is usual: a busy machine pauses that long.
const LEAST_PATIENCE: Duration = Duration::from_millis(300);
/// … nor is it waited for longer than this.
const MOST_PATIENCE: Duration = Duration::from_secs(30);
/// Before it is late, an answer lags: after twice the usual time, and not before this.
const LAGS: Duration = Duration::from_millis(100);
/// Whoever is there says something within this: at the least a ping every 15 s.
const SIGN: Duration = Duration::from_secs(20);
/// A piece that was coming so long ago is coming still.
const COMING: Duration = Duration::from_secs(3);
/// After so many Busy in a row a host is believed to take twice as long as it seems, and so on, …
const BUSIES_TO_DOUBT: u32 = 8;
/// … so often at most.
const MOST_DOUBTS: u32 = 16;
/// What a first answer may take, besides the piece's bytes at [`FIRST_RATE`].
const FIRST_PATIENCE: Duration = Duration::from_secs(1);
/// Bytes a second that are expected of a host that was never measured.
const FIRST_RATE: u64 = 1 << 20;

struct Asked {
    piece: Piece,
    bytes: u32,
    at: Moment,
}

/// One host of a content.
pub(super) struct Neighbour {
    /// All it told us it holds.
    pub(super) have: Bitfield,
    /// Of these, what is missing here and asked of nobody.
    pub(super) open: PieceSet,
    /// It grants, and is asked for nothing else; since then nothing was granted or sent.
    pub(super) grants: Option<Moment>,
    /// What it granted and we declined.
    pub(super) declined: Option<PieceSet>,
    /// It is not asked before: it said so, …
    pub(super) busy: Moment,
    /// … or let us wait too long.
    pub(super) rest: Moment,
    /// How often in a row it said that it is busy, without a piece between.
    busies: u32,
    /// How often in a row it let us wait too long.
    pub(super) stalls: u8,
    /// Bytes it sent that were new.
    pub(super) given: u64,
    /// What it was asked for, in that order, which is the order it answers in.
    asked: VecDeque<Asked>,
    asked_bytes: u64,
    /// The piece behind the last that it was asked for.
    pub(super) following: Option<Piece>,
    /// The first of `asked` has had the host to itself since then.
    turn: Moment,
    /// When it last showed that it is there, …
    sign: Option<Moment>,
    /// … and that a piece is on its way.
    coming: Option<Moment>,
    /// It granted us pieces once: it is a seed, which does not show what it has.
    pub(super) granted: bool,
    /// What was taken back from it may still come: since when it was waited for.
    late: Option<Moment>,
    usual: Option<Duration>,
    quickest: Option<Duration>,
    pace: Pace,
}

impl Neighbour {
    pub(super) fn new(pieces: u32) -> Self {
        Self {
            have: Bitfield::none(pieces),
            open: PieceSet::none(pieces),
            grants: None,
            declined: None,
            busy: Moment::ZERO,
            rest: Moment::ZERO,
            busies: 0,
            stalls: 0,
            given: 0,
            asked: VecDeque::new(),
            asked_bytes: 0,
            following: None,
            turn: Moment::ZERO,
            sign: None,
            coming: None,
            granted: false,
            late: None,
            usual: None,
            quickest: None,
            pace: Pace::of_one(),
        }
    }

    /// Pieces asked for, in service order.
    pub(super) fn asked(&self) -> impl ExactSizeIterator<Item = Piece> + '_ {
        self.asked.iter().map(|a| a.piece)
    }

    pub(super) const fn asked_bytes(&self) -> u64 {
        self.asked_bytes
    }

    pub(super) const fn rate(&self) -> u64 {
        self.pace.rate()
    }

    /// The shortest time an answer ever took.
    pub(super) const fn quickest(&self) -> Option<Duration> {
        self.quickest
    }

    /// Whether it may be asked for anything now.
    pub(super) fn is_ready(&self, now: Moment) -> bool {
        self.busy <= now && self.rest <= now && self.asked.len() < MOST_PIECES
    }

    /// How many bytes to have outstanding here.
    pub(super) fn window(&self, piece_size: u32) -> u64 {
        (LEAST_PIECES * u64::from(piece_size))
            .max(self.pace.within(AHEAD + self.quickest.unwrap_or_default()).min(MOST_BYTES))
    }

    /// Notes that `piece` is asked for now.
    pub(super) fn ask(&mut self, now: Moment, piece: Piece, bytes: u32) {
        if self.asked.is_empty() {
            self.turn = now;
            self.pace.start(now);
        }
        self.asked.push_back(Asked { piece, bytes, at: now });
        self.asked_bytes += u64::from(bytes);
        self.following = piece.0.checked_add(1).map(Piece);
    }

    /// A piece came. True if it had been asked for (and not taken back).
    pub(super) fn answered(&mut self, now: Moment, piece: Piece, bytes: u32) -> bool {
        let found = self.asked.iter().position(|a| a.piece == piece);
        let since = match found.and_then(|at| self.asked.remove(at)) {
            Some(asked) => {
                self.asked_bytes -= u64::from(asked.bytes);
                let took = now.since(asked.at);
                self.quickest = Some(self.quickest.map_or(took, |q| q.min(took)));
                Some(self.turn)
            }
            None => self.late.take(),
        };
        if let Some(since) = since {
            let took = now.since(since);
            self.usual = Some(self.usual.map_or(took, |usual| (usual * 7 + took) / 8));
        }
        (self.stalls, self.busies) = (0, 0);
        self.turn = now;
        self.grants = self.grants.map(|_| now);
        self.pace.add(now, bytes);
        if self.asked.is_empty() {
            self.pace.stop(now);
        }
        found.is_some()
    }

    /// It shows that it is there, or even (`coming`) that a piece is on its way: then that one is
    /// waited for, instead of asking somebody else for it as well.
    pub(super) fn alive(&mut self, now: Moment, coming: bool) {
        self.sign = Some(now);
        if coming {
            self.coming = Some(now);
        }
    }

    /// Whether it was heard of lately.
    pub(super) fn is_alive(&self, now: Moment) -> bool {
        self.sign.is_some_and(|at| now.since(at) < SIGN)
    }

    /// Whether a piece is on its way.
    pub(super) fn is_coming(&self, now: Moment) -> bool {
        self.coming.is_some_and(|at| now.since(at) < COMING)
    }

    /// Takes one ask back. True if it had been asked for.
    pub(super) fn take_back(&mut self, now: Moment, piece: Piece) -> bool {
        let Some(at) = self.asked.iter().position(|a| a.piece == piece) else { return false };
        if let Some(asked) = self.asked.remove(at) {
            self.asked_bytes -= u64::from(asked.bytes);
        }
        if at == 0 {
            self.turn = now;
        }
        if self.asked.is_empty() {
            self.pace.stop(now);
        }
        true
    }

    /// Takes all asks back, in order.
    pub(super) fn take_all_back(&mut self, now: Moment) -> Vec<Piece> {
        if !self.asked.is_empty() {
            self.late.get_or_insert(self.turn);
        }
        self.asked_bytes = 0;
        self.pace.stop(now);
        self.asked.drain(..).map(|a| a.piece).collect()
    }

    /// When the answer that is due will be late; `None` if none is due.
    pub(super) fn late_at(&self) -> Option<Moment> {
        let first = self.asked.front()?;
        let patience = match self.usual {
            Some(usual) => (usual * PATIENCE).clamp(LEAST_PATIENCE, MOST_PATIENCE),
            None => {
                FIRST_PATIENCE + Duration::from_millis(u64::from(first.bytes) * 1_000 / FIRST_RATE)
            }
        };
        Some(self.turn.max(self.coming.unwrap_or_default()) + patience)
    }

    /// When the answer that is due will have taken so long that others should be asked ahead instead.
    pub(super) fn lags_at(&self) -> Option<Moment> {
        let usual = self.usual.unwrap_or_default();
        (!self.asked.is_empty()).then(|| self.turn + LAGS.max(usual * 2))
    }

    /// Whether that time has come.
    pub(super) fn lags(&self, now: Moment) -> bool {
        self.lags_at().is_some_and(|at| at <= now)
    }

    /// How long the answer that is due has been waited for.
    pub(super) fn waited(&self, now: Moment) -> Option<Duration> {
        (!self.asked.is_empty()).then(|| now.since(self.turn))
    }

    /// When each asked piece may be expected, from now on.
    pub(super) fn expected(&self, now: Moment) -> impl Iterator<Item = (Piece, Duration)> + '_ {
        let mut ahead = 0u64;
        self.asked.iter().map(move |a| {
            ahead += u64::from(a.bytes);
            // The first may be half here; but an answer long waited for is not about to come.
            (a.piece, (self.time_for(ahead) * self.doubt()).max(now.since(self.turn)))
        })
    }

    /// How long a further piece of `bytes` would take to come.
    pub(super) fn expected_next(&self, bytes: u32) -> Duration {
        self.time_for(self.asked_bytes + u64::from(bytes)) * self.doubt()
    }

    /// It said that it is busy.
    pub(super) const fn turned_away(&mut self) {
        self.busies = self.busies.saturating_add(1);
    }

    /// Nothing is known of how it answers: it neither sent a piece, nor turned us away.
    pub(super) const fn is_untried(&self) -> bool {
        self.rate() == 0 && self.asked_bytes == 0 && self.busies == 0
    }

    /// By how much longer an answer of a host that says nothing but Busy is believed to take than it seems,
    /// ever longer: however fast it was once, or might be, others are asked before it.
    fn doubt(&self) -> u32 {
        1 << (self.busies / BUSIES_TO_DOUBT).min(MOST_DOUBTS)
    }

    fn time_for(&self, bytes: u64) -> Duration {
        let unknown = Duration::from_micros(bytes.saturating_mul(1_000_000) / FIRST_RATE);
        self.pace.time_for(bytes).unwrap_or(unknown)
    }

    pub(super) fn check(&self) {
        let bytes: u64 = self.asked.iter().map(|a| u64::from(a.bytes)).sum();
        assert_eq!(bytes, self.asked_bytes, "bytes asked for");
        assert!(self.asked.len() <= MOST_PIECES, "asked for {} pieces", self.asked.len());
        assert!(
            self.asked.len() <= 1 || bytes <= MOST_BYTES + (8 << 20),
            "asked for {bytes} bytes"
        );
    }
}
