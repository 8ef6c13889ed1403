//! Owns the listing as a peer shows it: pages gathered from the index, and the live picture that
//! watchers are told changes of. Never decides what is listed (the index does).

use std::collections::BTreeMap;

use globset::GlobMatcher;
use potluck_core::time::Moment;
use potluck_core::wire::datagram::{Ack, List, Request as Question, Row, RowKey};

use super::Replies;
use super::engine::Engine;
use super::network::no_network;
use super::requests::{lie, link_error};
use crate::clock;
use crate::control::{self, Event};
use crate::desk;
use crate::error::{Error, ErrorKind, Result};

/// Rows of the listing kept for watchers, or gathered for one listing.
const MAX_LISTING: usize = 1_000_000;

/// Somebody who watches the listing.
pub(super) struct Watcher {
    replies: Replies,
    glob: GlobMatcher,
    /// Has been sent the listing, and gets changes from now on.
    begun: bool,
}

/// The listing as this peer knows it, while somebody watches.
#[derive(Default)]
pub(super) struct Listing {
    rows: BTreeMap<RowKey, Row>,
    /// Pages are on their way; changes that come meanwhile wait here.
    filling: Option<Vec<Row>>,
    /// It is to be filled once more when it is filled.
    again: bool,
}

/// What to do with a whole listing.
type Listed = Box<dyn FnOnce(&mut Engine, Result<Vec<Row>>) + Send>;

impl Engine {
    pub(super) fn list(&mut self, glob: String, replies: Replies) {
        self.list_from(glob, None, Vec::new(), move |_, result| match result {
            Ok(rows) => {
                let rows = rows.iter().map(shown).collect();
                replies.send(Event::Listing { rows });
            }
            Err(e) => replies.fail(&e),
        });
    }

    /// Gathers pages until there are no more.
    fn list_from(
        &mut self,
        glob: String,
        after: Option<RowKey>,
        mut rows: Vec<Row>,
        then: impl FnOnce(&mut Self, Result<Vec<Row>>) + Send + 'static,
    ) {
        let question = Question::List(List { glob: glob.clone(), after });
        // Boxed, since it calls itself with itself inside.
        let then: Listed = Box::new(then);
        self.ask(question, move |engine, answer| match answer {
            Ok(Ack::Page(page)) => {
                // Else a page could be asked for again and again, without end.
                let goes_on = page.rows.iter().map(|row| &row.key).is_sorted_by(|a, b| a < b)
                    && match (rows.last(), page.rows.first()) {
                        (Some(last), Some(first)) => last.key < first.key,
                        (_, None) => !page.more,
                        (None, Some(_)) => true,
                    };
                if !goes_on {
                    return then(engine, Err(lie("the index lists rows out of order".into())));
                }
                rows.extend(page.rows);
                match rows.last().map(|row| row.key.clone()) {
                    Some(last) if page.more && rows.len() < MAX_LISTING => {
                        engine.list_from(glob, Some(last), rows, then);
                    }
                    _ => then(engine, Ok(rows)),
                }
            }
            Ok(_) => then(engine, Err(desk::unexpected())),
            Err(e) => then(engine, Err(link_error(&e))),
        });
    }

    pub(super) fn watch(&mut self, glob: &str, replies: Replies) {
        let glob = match globset::Glob::new(glob) {
            Ok(glob) => glob.compile_matcher(),
            Err(e) => {
                let error = Error::new(ErrorKind::Usage, format!("not a pattern: {e}"));
                return replies.fail(&error);
            }
        };
        let Some(line) = &mut self.line else { return replies.fail(&no_network()) };
        line.link.watch(clock::now(), "*".into());
        self.watchers.push(Watcher { replies, glob, begun: false });
        self.relist();
    }

    /// Lists everything (again), and tells watchers what that changes.
    pub(super) fn relist(&mut self) {
        if self.listing.filling.is_some() {
            self.listing.again = true;
            return;
        }
        self.listing.filling = Some(Vec::new());
        self.list_from("*".into(), None, Vec::new(), |engine, result| {
            let meanwhile = engine.listing.filling.take().unwrap_or_default();
            match result {
                Ok(rows) => {
                    let rows: BTreeMap<_, _> =
                        rows.into_iter().map(|row| (row.key.clone(), row)).collect();
                    engine.take_listing(&rows);
                    engine.on_changes(meanwhile);
                }
                Err(e) => {
                    let waiting = |w: &mut Watcher| !w.begun;
                    for watcher in engine.watchers.extract_if(.., waiting) {
                        watcher.replies.fail(&e);
                    }
                }
            }
            if std::mem::take(&mut engine.listing.again) {
                engine.relist();
            }
        });
    }

    fn take_listing(&mut self, rows: &BTreeMap<RowKey, Row>) {
        let gone: Vec<_> =
            self.listing.rows.keys().filter(|k| !rows.contains_key(k)).cloned().collect();
        let mut changes: Vec<Row> = Vec::new();
        for key in gone {
            if let Some(row) = self.listing.rows.get(&key) {
                changes.push(Row { hosts: 0, complete: 0, ..row.clone() });
            }
        }
        changes.extend(
            rows.values().filter(|row| self.listing.rows.get(&row.key) != Some(row)).cloned(),
        );
        self.on_changes(changes);
        for watcher in self.watchers.iter_mut().filter(|w| !w.begun) {
            let rows = self.listing.rows.values().filter(|row| matches(&watcher.glob, row));
            watcher.begun =
                watcher.replies.send(Event::Listing { rows: rows.map(shown).collect() });
        }
    }

    pub(super) fn on_changes(&mut self, rows: Vec<Row>) {
        if let Some(meanwhile) = &mut self.listing.filling {
            meanwhile.extend(rows);
            return;
        }
        for row in rows {
            let old = self.listing.rows.get(&row.key);
            let what = match (old, row.hosts) {
                (None, 0) => continue,
                (Some(_), 0) => "removed",
                (None, _) => "added",
                (Some(old), _) if *old == row => continue,
                (Some(_), _) => "changed",
            };
            let change = Event::Change { what: what.into(), row: shown(&row) };
            self.watchers.retain(|watcher| {
                !watcher.begun
                    || !matches(&watcher.glob, &row)
                    || watcher.replies.send(change.clone())
            });
            if row.hosts == 0 {
                self.listing.rows.remove(&row.key);
            } else if self.listing.rows.len() < MAX_LISTING {
                self.listing.rows.insert(row.key.clone(), row);
            }
        }
    }

    /// Lets the watch go when nobody watches any more.
    pub(super) fn tend_watchers(&mut self, _: Moment) {
        if self.watchers.is_empty() {
            return;
        }
        self.watchers.retain(|watcher| !watcher.replies.is_gone());
        if self.watchers.is_empty() {
            self.listing = Listing::default();
            if let Some(line) = &mut self.line {
                line.link.unwatch(clock::now());
            }
        }
    }
}

fn matches(glob: &GlobMatcher, row: &Row) -> bool {
    match &row.key.name {
        Some(name) => glob.is_match(name.as_str()),
        None => glob.is_match(row.key.id.to_string()),
    }
}

fn shown(row: &Row) -> control::Row {
    control::Row {
        id: row.key.id.to_string(),
        name: row.key.name.as_ref().map(ToString::to_string),
        version: row.version.map(|v| v.0),
        size: row.size,
        hosts: row.hosts,
        complete: row.complete,
        publisher: row.publisher.map(|p| p.to_string()),
    }
}
