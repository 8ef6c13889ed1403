//! Owns who watches the listing and pushes its changes to them. Never keeps a change itself: the
//! catalog remembers the last of them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::catalog::{Pattern, refuse};
use crate::id::MemberNumber;
use crate::time::{Duration, Moment};
use crate::wire::datagram::{Code, Notice, ROWS_ROOM, Refusal, Row, Watch, Watching};

use super::Registrar;
use super::gate::Line;

/// A watch that is not renewed lapses after this.
const LEASE: Duration = Duration::from_secs(90);
/// Changes are gathered for this long before they are pushed.
const GATHER: Duration = Duration::from_millis(100);
/// Datagrams pushed to one watcher at a time; what does not fit follows after [`GATHER`].
const NOTICES_A_TURN: usize = 16;
/// Watchers told at a time: who asks something meanwhile does not wait for all the others.
const WATCHERS_A_TURN: usize = 64;
/// Different globs watched at once, `*` not counted: each takes some kilobytes, ready to be matched.
const GLOBS: usize = 1_024;

struct Watcher {
    line: Line,
    glob: String,
    until: Moment,
    /// Where it stands among the lapses: perhaps too early.
    queued: Moment,
    /// The change up to which it was told.
    told: u64,
    /// The change up to which was looked for something to tell it.
    looked: u64,
    /// Tell it where it stands even if nothing it watches has changed.
    owed: bool,
}

/// All watchers; a member has at most one watch.
#[derive(Default)]
pub(super) struct Watchers {
    all: BTreeMap<MemberNumber, Watcher>,
    /// Each glob that is watched, and by how many.
    globs: BTreeMap<String, (Pattern, usize)>,
    /// When to look at whose lease; each watcher stands here once.
    lapses: BTreeSet<(Moment, MemberNumber)>,
    /// When the next notices go out.
    due: Option<Moment>,
    /// The change up to which everybody was told all.
    told: u64,
    /// The notices that are going out, where some are.
    round: Option<Round>,
}

/// Notices going out, a few watchers at a time.
struct Round {
    /// The change up to which is told.
    sequence: u64,
    /// The last watcher told.
    last: Option<MemberNumber>,
    /// Somebody was not told all.
    behind: bool,
    /// What came after a change, for all who stand there: most watchers do at the same.
    gathered: BTreeMap<u64, Option<Vec<(u64, Row)>>>,
}

impl Watchers {
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    pub(super) fn globs(&self) -> usize {
        self.globs.len()
    }

    pub(super) fn remove(&mut self, member: MemberNumber) {
        let Some(watcher) = self.all.remove(&member) else { return };
        self.forget_glob(&watcher.glob);
        self.lapses.remove(&(watcher.queued, member));
    }

    fn forget_glob(&mut self, glob: &str) {
        if let Some((_, users)) = self.globs.get_mut(glob) {
            *users -= 1;
            if *users == 0 {
                self.globs.remove(glob);
            }
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Moment> {
        let lapse = self.lapses.first().map(|(moment, _)| *moment);
        [self.due, lapse].into_iter().flatten().min()
    }

    /// The listing stands at change `sequence`: if that is news, it is told before long.
    pub(super) fn note(&mut self, now: Moment, sequence: u64) {
        if self.due.is_none() && sequence > self.told && !self.all.is_empty() {
            self.due = Some(now + GATHER);
        }
    }

    /// Enters a watch in the place of the one the member had, if any.
    fn enter(&mut self, member: MemberNumber, watcher: Watcher, pattern: Pattern) {
        self.globs.entry(watcher.glob.clone()).or_insert((pattern, 0)).1 += 1;
        self.remove(member);
        self.lapses.insert((watcher.queued, member));
        self.all.insert(member, watcher);
    }

    /// Ends watches that were not renewed.
    fn lapse(&mut self, now: Moment) {
        while let Some(&(moment, member)) = self.lapses.first() {
            if moment > now {
                break;
            }
            self.lapses.pop_first();
            match self.all.get_mut(&member) {
                Some(watcher) if watcher.until > now => {
                    watcher.queued = watcher.until;
                    self.lapses.insert((watcher.until, member));
                }
                _ => self.remove(member),
            }
        }
    }

    pub(super) fn check(&self) {
        let queued: BTreeSet<_> = self.all.iter().map(|(m, w)| (w.queued, *m)).collect();
        assert_eq!(queued, self.lapses, "a watch nobody ends, or an end of none");
        let users: usize = self.globs.values().map(|(_, users)| users).sum();
        assert_eq!(users, self.all.len(), "globs are miscounted");
    }
}

impl Registrar {
    pub(super) fn watch(
        &mut self,
        now: Moment,
        line: &Line,
        watch: &Watch,
    ) -> Result<Watching, Refusal> {
        let sequence = self.catalog.sequence();
        let watching = |missed| Watching { lease_s: LEASE.as_secs() as u16, sequence, missed };
        if watch.stop {
            self.watchers.remove(line.member);
            return Ok(watching(false));
        }
        // `*` and nothing mean the same.
        let glob = if watch.glob.is_empty() { "*" } else { &watch.glob };
        let pattern = match self.watchers.globs.get(glob) {
            Some((pattern, _)) => pattern.clone(),
            None => Pattern::new(glob).map_err(|text| refuse(Code::BadRequest, text))?,
        };
        if glob != "*"
            && self.watchers.globs.len() >= GLOBS
            && !self.watchers.globs.contains_key(glob)
        {
            return Err(refuse(Code::Full, "too many globs are watched: watch *, or list"));
        }
        let known = self.watchers.all.contains_key(&line.member);
        if !known && self.watchers.count() >= self.settings.watchers {
            let most = self.settings.watchers;
            return Err(refuse(Code::Full, format!("{most} machines watch already: list instead")));
        }
        if !known && self.is_full() {
            return Err(refuse(Code::Full, "the index's memory is full: list instead"));
        }
        let missed = watch.since != 0 && !self.catalog.remembers(watch.since);
        let since = if watch.since == 0 || missed { sequence } else { watch.since };
        let owed = since < sequence;
        let (glob, until) = (glob.to_owned(), now + LEASE);
        let watcher =
            Watcher { line: *line, glob, until, queued: until, told: since, looked: since, owed };
        self.watchers.enter(line.member, watcher, pattern);
        if owed {
            self.stats.caught_up += 1;
            self.watchers.due = Some(now);
        }
        Ok(watching(missed))
    }

    /// Pushes what has changed to some of those who watch it, and ends watches that were not renewed.
    pub(super) fn notify(&mut self, now: Moment) {
        self.watchers.lapse(now);
        if self.watchers.due.is_none_or(|due| due > now) {
            return;
        }
        let mut watchers = std::mem::take(&mut self.watchers);
        let sequence = self.catalog.sequence();
        let begin = || Round { sequence, last: None, behind: false, gathered: BTreeMap::new() };
        let mut round = watchers.round.take().unwrap_or_else(begin);
        let start = round.last.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = watchers.all.range_mut((start, Bound::Unbounded));
        for (member, watcher) in rest.by_ref().take(WATCHERS_A_TURN) {
            round.last = Some(*member);
            // What was gathered for others who stand here may be older than the round by a moment, and
            // this one may stand further than the round already: both are told the rest next time.
            let changed = round
                .gathered
                .entry(watcher.looked)
                .or_insert_with_key(|since| self.catalog.changed_since(*since));
            let notices = match (changed, watchers.globs.get(&watcher.glob)) {
                (Some(rows), Some((pattern, _))) => watcher.tell(pattern, rows),
                _ => watcher.tell_gap(sequence),
            };
            for notice in notices {
                self.stats.notices += 1;
                self.send(&watcher.line, b'N', |out| notice.write(out));
            }
            round.behind |= watcher.looked < round.sequence;
        }
        if rest.next().is_some() {
            watchers.due = Some(now);
            watchers.round = Some(round);
        } else {
            watchers.told = round.sequence;
            let news = round.behind || sequence > round.sequence;
            watchers.due = news.then_some(now + GATHER);
        }
        self.watchers = watchers;
    }
}

impl Watcher {
    /// Notices about those of `rows` it watches, at most [`NOTICES_A_TURN`].
    fn tell(&mut self, pattern: &Pattern, rows: &[(u64, Row)]) -> Vec<Notice> {
        let mut notices = vec![];
        let mut notice = Notice { before: self.told, after: self.told, rows: vec![] };
        let mut room = ROWS_ROOM;
        for (number, row) in rows {
            if pattern.matches(&row.key) {
                if row.wire_len() > room {
                    notice.after = self.looked;
                    self.told = self.looked;
                    notices.push(notice);
                    if notices.len() == NOTICES_A_TURN {
                        return notices;
                    }
                    notice = Notice { before: self.told, after: self.told, rows: vec![] };
                    room = ROWS_ROOM;
                }
                room -= row.wire_len();
                notice.rows.push(row.clone());
            }
            self.looked = *number;
        }
        if !notice.rows.is_empty() || self.owed {
            notice.after = self.looked;
            self.told = self.looked;
            self.owed = false;
            notices.push(notice);
        }
        notices
    }

    /// So much has changed that not all is known any more: a notice that does not follow the last
    /// one makes the watcher ask, and learn that it missed some.
    fn tell_gap(&mut self, sequence: u64) -> Vec<Notice> {
        (self.told, self.looked, self.owed) = (sequence, sequence, false);
        vec![Notice { before: sequence, after: sequence, rows: vec![] }]
    }
}
