//! Owns who watches the listing and pushes its changes to them. Never keeps a change itself: the
//! catalog remembers the last of them.

use std::collections::BTreeMap;

use crate::catalog::{Pattern, refuse};
use crate::id::MemberNumber;
use crate::time::{Duration, Moment};
use crate::wire::datagram::{Code, Notice, ROWS_ROOM, Refusal, Row, Watch, Watching};

use super::{Line, Registrar};

/// A watch that is not renewed lapses after this.
const LEASE: Duration = Duration::from_secs(90);
/// Changes are gathered for this long before they are pushed.
const GATHER: Duration = Duration::from_millis(100);
/// Datagrams pushed to one watcher at a time; what does not fit follows after [`GATHER`].
const NOTICES_A_TURN: usize = 16;

struct Watcher {
    line: Line,
    pattern: Pattern,
    until: Moment,
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
    /// When the next notices go out.
    due: Option<Moment>,
    /// The change up to which everybody was told all.
    told: u64,
}

impl Watchers {
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    pub(super) fn remove(&mut self, member: MemberNumber) {
        self.all.remove(&member);
    }

    pub(super) fn next_deadline(&self) -> Option<Moment> {
        let lapse = self.all.values().map(|watcher| watcher.until).min();
        [self.due, lapse].into_iter().flatten().min()
    }

    /// The listing stands at change `sequence`: if that is news, it is told before long.
    pub(super) fn note(&mut self, now: Moment, sequence: u64) {
        if self.due.is_none() && sequence > self.told && !self.all.is_empty() {
            self.due = Some(now + GATHER);
        }
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
        let pattern = Pattern::new(&watch.glob).map_err(|text| refuse(Code::BadRequest, text))?;
        let known = self.watchers.all.contains_key(&line.member);
        if !known && self.watchers.count() >= self.settings.watchers {
            let most = self.settings.watchers;
            return Err(refuse(Code::Full, format!("{most} machines watch already: list instead")));
        }
        let missed = watch.since != 0 && !self.catalog.remembers(watch.since);
        let since = if watch.since == 0 || missed { sequence } else { watch.since };
        let owed = since < sequence;
        let watcher =
            Watcher { line: *line, pattern, until: now + LEASE, told: since, looked: since, owed };
        self.watchers.all.insert(line.member, watcher);
        if owed {
            self.watchers.due = Some(now);
        }
        Ok(watching(missed))
    }

    /// Pushes what has changed, and ends watches that were not renewed.
    pub(super) fn notify(&mut self, now: Moment) {
        self.watchers.all.retain(|_, watcher| watcher.until > now);
        if self.watchers.due.is_none_or(|due| due > now) {
            return;
        }
        let sequence = self.catalog.sequence();
        let mut all = std::mem::take(&mut self.watchers.all);
        // Most watchers stand at the same change: what came after it is gathered once for them all.
        let mut gathered: BTreeMap<u64, Option<Vec<(u64, Row)>>> = BTreeMap::new();
        for watcher in all.values_mut() {
            let changed = gathered
                .entry(watcher.looked)
                .or_insert_with_key(|since| self.catalog.changed_since(*since));
            let notices = match changed {
                Some(rows) => watcher.tell(rows),
                None => watcher.tell_gap(sequence),
            };
            for notice in notices {
                self.stats.notices += 1;
                self.send(&watcher.line, b'N', |out| notice.write(out));
            }
        }
        let behind = all.values().any(|watcher| watcher.looked < sequence);
        self.watchers.all = all;
        self.watchers.told = sequence;
        self.watchers.due = behind.then_some(now + GATHER);
    }
}

impl Watcher {
    /// Notices about those of `rows` it watches, at most [`NOTICES_A_TURN`].
    fn tell(&mut self, rows: &[(u64, Row)]) -> Vec<Notice> {
        let mut notices = vec![];
        let mut notice = Notice { before: self.told, after: self.told, rows: vec![] };
        let mut room = ROWS_ROOM;
        for (number, row) in rows {
            if self.pattern.matches(&row.key) {
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
