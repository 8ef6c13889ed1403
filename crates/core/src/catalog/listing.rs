//! Owns the listing: rows in order, globs over them, and which rows changed lately. Never pushes
//! anything to anybody.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::id::{ContentId, PeerId};
use crate::wire::datagram::{MAX_GLOB, Page, ROWS_ROOM, Row, RowKey};

use super::{Catalog, Slot};

/// A glob over names, or over the ids of nameless contents. `*` and nothing match all.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// `None` matches everything.
    globs: Option<GlobSet>,
    /// What every name it matches begins with.
    prefix: String,
    /// Whether it could match an id at all.
    ids: bool,
}

impl Pattern {
    /// Reads a glob (`*`, `?`, `[a-z]`, `{this,that}`, `\` before a character meant literally). The
    /// error is for people.
    pub fn new(glob: &str) -> Result<Self, String> {
        if glob.len() > MAX_GLOB {
            return Err(format!("a glob is at most {MAX_GLOB} bytes"));
        }
        let wild = |c: char| matches!(c, '*' | '?' | '[' | ']' | '{' | '}' | '\\' | ',');
        let prefix = glob.split(wild).next().unwrap_or_default().to_owned();
        if glob.is_empty() || glob == "*" {
            return Ok(Self { globs: None, prefix: String::new(), ids: true });
        }
        let bad = |error: globset::Error| format!("not a glob: {}", error.kind());
        let one = GlobBuilder::new(glob).backslash_escape(true).build().map_err(bad)?;
        // A set of one: unlike a single matcher it reports what it cannot build instead of panicking.
        let globs = GlobSetBuilder::new().add(one).build().map_err(bad)?;
        let grouped = glob.contains(['[', '{', '\\']);
        let of_ids = |c: char| wild(c) || matches!(c, '0'..='9' | 'a'..='f' | '/');
        Ok(Self { globs: Some(globs), prefix, ids: grouped || glob.chars().all(of_ids) })
    }

    /// Whether it matches a row.
    pub fn matches(&self, key: &RowKey) -> bool {
        match (&self.globs, &key.name) {
            (None, _) => true,
            (Some(globs), Some(name)) => globs.is_match(name.as_str()),
            (Some(_), None) => self.matches_id(&key.id),
        }
    }

    fn matches_id(&self, id: &ContentId) -> bool {
        self.ids && self.globs.as_ref().is_none_or(|globs| globs.is_match(id.to_string()))
    }
}

/// The rows that changed lately, in the order they did; each change has a number.
pub(super) struct Changes {
    /// The number of the last change.
    sequence: u64,
    most: usize,
    rows: VecDeque<RowKey>,
}

impl Changes {
    pub(super) const fn new(sequence: u64, most: usize) -> Self {
        Self { sequence, most, rows: VecDeque::new() }
    }

    fn push(&mut self, key: RowKey) {
        if self.rows.len() >= self.most.max(1) {
            self.rows.pop_front();
        }
        self.rows.push_back(key);
        self.sequence += 1;
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Remembers at most so many from now on.
    pub(super) fn keep(&mut self, most: usize) {
        self.most = most;
        self.rows.drain(..self.rows.len().saturating_sub(most));
    }

    /// The keys of changes after `since`; `None` where they are no longer all known.
    fn after(&self, since: u64) -> Option<impl Iterator<Item = (u64, &RowKey)>> {
        let first = self.sequence - self.rows.len() as u64;
        if since < first || since > self.sequence {
            return None;
        }
        let skip = (since - first) as usize;
        Some((since + 1..).zip(self.rows.range(skip..)))
    }
}

/// A page, and how many rows were looked at for it: what it cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// The rows.
    pub page: Page,
    /// Rows looked at, matching or not.
    pub looked_at: usize,
}

impl Catalog {
    /// The number of the listing's last change.
    pub const fn sequence(&self) -> u64 {
        self.changes.sequence
    }

    /// Whether all changes after `since` are known.
    pub fn remembers(&self, since: u64) -> bool {
        self.changes.after(since).is_some()
    }

    /// The rows after `after` that match, as many as fit a datagram. A row that exists throughout a
    /// walk from page to page is met exactly once.
    pub fn page(&self, pattern: &Pattern, after: Option<&RowKey>) -> Scan {
        let mut filling = Filling { rows: vec![], room: ROWS_ROOM, looked_at: 0 };
        let after_name = after.and_then(|key| key.name.as_ref());
        let mut more = false;
        if after_name.is_none() && pattern.ids {
            let start = after.map_or(Bound::Unbounded, |key| Bound::Excluded(key.id));
            more = !self.nameless.range((start, Bound::Unbounded)).all(|(id, slot)| {
                filling.looked_at += 1;
                !pattern.matches_id(id) || filling.fits(|| self.row(*slot, None))
            });
        }
        if !more {
            more = !self.fill_names(pattern, after_name.map(crate::id::Name::as_str), &mut filling);
        }
        let page = Page { sequence: self.changes.sequence, rows: filling.rows, more };
        Scan { page, looked_at: filling.looked_at }
    }

    /// True where all names that match found room.
    fn fill_names(&self, pattern: &Pattern, after: Option<&str>, filling: &mut Filling) -> bool {
        let prefix = pattern.prefix.as_str();
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let names = self.names.range::<str, _>((start, Bound::Unbounded));
        names.take_while(|(name, _)| name.as_str().starts_with(prefix)).all(|(name, at)| {
            filling.looked_at += 1;
            let name = name.as_str();
            let Some(newest) = self.named[*at as usize].newest() else { return true };
            self.contents[newest.slot as usize].hosts.is_empty()
                || pattern.globs.as_ref().is_some_and(|globs| !globs.is_match(name))
                || filling.fits(|| self.row(newest.slot, Some(*at)))
        })
    }

    /// The whole listing. O(everything): for tests and the simulator.
    pub fn listing(&self) -> Vec<Row> {
        let nameless = self.nameless.values().map(|slot| self.row(*slot, None));
        let named = self.names.values().filter_map(|at| {
            let slot = self.named[*at as usize].newest()?.slot;
            let hosted = !self.contents[slot as usize].hosts.is_empty();
            hosted.then(|| self.row(slot, Some(*at)))
        });
        nameless.chain(named).collect()
    }

    /// All hosts of all contents, and how much each holds. O(everything): for tests and the
    /// simulator.
    pub fn hosts(&self) -> BTreeMap<ContentId, BTreeMap<PeerId, u16>> {
        let mut hosts: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for content in &self.contents {
            for hosting in &content.hosts {
                let peer = self.cards[hosting.member.0 as usize].peer;
                hosts.entry(content.id).or_default().insert(peer, hosting.held);
            }
        }
        hosts
    }

    /// The row of a content under one of its names, or under none.
    fn row(&self, slot: Slot, at: Option<u32>) -> Row {
        let content = &self.contents[slot as usize];
        let named = at.map(|at| &self.named[at as usize]);
        Row {
            key: RowKey { name: named.map(|n| n.name.clone()), id: content.id },
            size: content.size,
            hosts: content.hosts.len() as u32,
            complete: content.complete,
            version: named.and_then(|n| n.newest()).map(|newest| newest.record.version),
            publisher: named.map(|n| n.owner),
        }
    }

    /// The row with this key as it is now; without hosts where there is none.
    pub fn row_at(&self, key: &RowKey) -> Row {
        let gone = || Row {
            key: key.clone(),
            size: 0,
            hosts: 0,
            complete: 0,
            version: None,
            publisher: None,
        };
        let Some(&slot) = self.by_id.get(&key.id) else { return gone() };
        let content = &self.contents[slot as usize];
        let at = key.name.as_ref().map(|name| self.by_name.get(name.as_str()).copied());
        match at {
            _ if content.hosts.is_empty() => gone(),
            None if content.names.is_empty() => self.row(slot, None),
            Some(Some(at)) if content.names.contains(&at) => self.row(slot, Some(at)),
            None | Some(_) => gone(),
        }
    }

    /// The rows that changed after `since`, each once and as it is now, with the number of its last
    /// change, in that order; `None` where that is no longer known.
    ///
    /// By the last change, not the first: so whoever took these rows up to any number knows all whose
    /// last change that was or an earlier one, and may go on from there in another, later answer.
    pub fn changed_since(&self, since: u64) -> Option<Vec<(u64, Row)>> {
        let mut seen = BTreeSet::new();
        let changes: Vec<(u64, &RowKey)> = self.changes.after(since)?.collect();
        let last = changes.into_iter().rev().filter(|(_, key)| seen.insert(*key));
        let mut rows: Vec<(u64, Row)> = last.map(|(n, key)| (n, self.row_at(key))).collect();
        rows.reverse();
        Some(rows)
    }

    /// Notes that all rows of a content changed.
    pub(super) fn touch(&mut self, slot: Slot) {
        let content = &self.contents[slot as usize];
        if content.names.is_empty() {
            self.changes.push(RowKey { name: None, id: content.id });
        }
        for at in &content.names {
            let name = Some(self.named[*at as usize].name.clone());
            self.changes.push(RowKey { name, id: content.id });
        }
    }
}

/// Rows of a page that is being filled.
struct Filling {
    rows: Vec<Row>,
    room: usize,
    looked_at: usize,
}

impl Filling {
    /// Puts the row in; false where it does not fit any more.
    fn fits(&mut self, row: impl FnOnce() -> Row) -> bool {
        let row = row();
        if row.wire_len() > self.room {
            return false;
        }
        self.room -= row.wire_len();
        self.rows.push(row);
        true
    }
}
