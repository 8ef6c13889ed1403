//! Owns what people ask of a peer: each request from its words to its last event. Never does slow
//! work itself (jobs do) and never speaks to a socket.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use potluck_core::id::{ContentId, Name, NetworkId, PeerId, Query, Version};
use potluck_core::limit::Limit;
use potluck_core::link::LinkError;
use potluck_core::time::Moment;
use potluck_core::trust::{Invitation, NameRecord};
use potluck_core::wire::datagram::{
    Ack, Code, Found, Refusal, Request as Question, Search, Target,
};
use potluck_core::wire::desk::{Answer, Ask};
use tracing::warn;

use super::Replies;
use super::engine::{Content, Engine, Phase};
use super::fetch::{Asker, free_name, target_of};
use super::members::members_event;
use super::network::no_network;
use super::notes::{KnownName, Notes};
use crate::clock;
use crate::control::{
    BadContent, Connection, ContentStatus, Event, FoundHost, IfExists, Request, Status,
};
use crate::desk;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Replica, Skipped};

/// How long a share waits for the index to acknowledge it.
const REGISTER_PATIENCE: Duration = Duration::from_secs(12);
/// How often the index is asked again for a name that has no host yet.
const HOPE_EVERY: Duration = Duration::from_secs(1);
/// Somebody who waits for the index to acknowledge a content.
pub(super) struct Registering {
    replies: Replies,
    size: u64,
    /// The name was not asked for: where it is taken, the content goes without.
    name_is_optional: bool,
    until: Moment,
}

/// A fetch of something known that has no host yet.
pub(super) struct Hoping {
    query: Query,
    to: PathBuf,
    exists: IfExists,
    asker: Asker,
    until: Moment,
    next: Moment,
    why: Error,
}

impl Engine {
    pub(super) fn on_request(&mut self, request: Request, replies: Replies) {
        match request {
            Request::Join { invitation } => self.join_by(&invitation, replies),
            Request::Leave => match self.leave() {
                Ok(network) => replies.tell(Event::Left { network: network.to_string() }),
                Err(e) => replies.fail(&e),
            },
            Request::Share { path, name } => self.share(path, name.as_deref(), replies),
            Request::Unshare { what } => self.unshare(&what, &replies),
            Request::Get { what, to, exists, timeout_s } => {
                let timeout = Duration::from_secs(timeout_s);
                self.get(&what, to, exists, Asker { replies, timeout });
            }
            Request::List { glob } => self.list(glob, replies),
            Request::Find { what } => self.find(&what, replies),
            Request::Peers => replies.tell(self.peers()),
            Request::Status => replies.tell(Event::Status(Box::new(self.status()))),
            Request::Watch { glob } => self.watch(&glob, replies),
            Request::Verify { what } => self.verify(what.as_deref(), replies),
            Request::Invite { uses, valid_s, role } => self.invite(uses, valid_s, &role, replies),
            Request::Members => self.at_desk(Ask::Members, replies, |answer| match answer {
                Answer::Members(members) => Some(members_event(members)),
                _ => None,
            }),
            Request::RemoveMember { who } => self.remove_member(who, replies),
            Request::Limit { up, down, keep } => match self.limit(up, down, keep) {
                Ok(limits) => replies.tell(limits),
                Err(e) => replies.fail(&e),
            },
            Request::Down => replies.tell(Event::Stopping),
        }
    }

    fn join_by(&mut self, text: &str, replies: Replies) {
        match text.parse::<Invitation>() {
            Ok(invitation) => self.join(&invitation, replies, |engine, result| match result {
                Ok(replies) => replies.tell(engine.joined_event()),
                Err((replies, error)) => replies.fail(&error),
            }),
            Err(e) => replies.fail(&Error::new(ErrorKind::Usage, e.0)),
        }
    }

    // ---- share

    fn share(&mut self, path: PathBuf, name: Option<&str>, replies: Replies) {
        let name = match name.map(Name::from_str).transpose() {
            Ok(name) => name,
            Err(e) => return replies.fail(&Error::new(ErrorKind::Usage, e.0)),
        };
        self.with_network(replies, move |engine, result| match result {
            Ok(replies) => engine.import(path, name, replies),
            Err((replies, error)) => replies.fail(&error),
        });
    }

    fn import(&mut self, path: PathBuf, name: Option<Name>, replies: Replies) {
        let store = self.store.clone();
        let teller = replies.clone();
        let from = path.clone();
        self.job(
            move || {
                let cancel = AtomicBool::new(false);
                let progress = |done, total| {
                    teller.send(Event::Hashing { done, total });
                    cancel.store(teller.is_gone(), Ordering::Relaxed);
                };
                store.import(&from, &progress, &cancel)
            },
            move |engine, result| match result {
                Ok(imported) => {
                    tracing::debug!(path = %path.display(), bytes = imported.hashed, "hashed");
                    if let Some(text) = left_out(&imported.skipped) {
                        replies.send(Event::Note { text });
                    }
                    engine.name_and_register(&imported.replica, &path, name, replies);
                }
                Err(e) => replies.fail(&e),
            },
        );
    }

    /// Finds out which version this will be, then signs the name and registers.
    fn name_and_register(
        &mut self,
        replica: &Arc<Replica>,
        path: &Path,
        wanted: Option<Name>,
        replies: Replies,
    ) {
        let optional = wanted.is_none();
        let base = || path.file_name()?.to_str()?.parse::<Name>().ok();
        let Some(name) = wanted.or_else(base) else {
            return self.publish(replica, None, optional, replies);
        };
        let replica = replica.clone();
        let search = Search { target: Target::Name(name.clone(), None), hosts: 1, avoid: vec![] };
        self.ask(Question::Search(search), move |engine, answer| {
            let own = engine.key.peer();
            let latest = engine.own_latest(&name);
            let known = match answer {
                Ok(Ack::Found(found)) => match engine.record_of(&name, None, &found) {
                    Ok(r) => Some((r.publisher, r.version, r.id)),
                    Err(e) => return replies.fail(&e),
                },
                Ok(_) => return replies.fail(&desk::unexpected()),
                // Nobody has a claim that the index knows of.
                Err(LinkError::Refused(Refusal { code: Code::NotFound, .. })) => None,
                // Without the index, or without a host, the best guess is what is known here.
                Err(_) => latest,
            };
            // Of its own names a publisher knows best: no version is signed twice.
            let newest = latest.filter(|(by, ..)| *by == own);
            let known = match (known, newest) {
                (None, newest) => newest,
                (Some((by, version, _)), Some(newest)) if by == own && newest.1 > version => {
                    Some(newest)
                }
                (known, _) => known,
            };
            let version = match known {
                None => Some(Version(1)),
                Some((by, version, id)) if by == own && id == replica.id() => Some(version),
                Some((by, version, _)) if by == own => Some(Version(version.0.saturating_add(1))),
                // Another's name: where it names this very content nothing is to be claimed.
                Some((_, _, id)) if id == replica.id() || optional => None,
                Some((by, ..)) => return replies.fail(&taken(&name, Some(by))),
            };
            if version.is_none() && known.is_some_and(|(_, _, id)| id != replica.id()) {
                replies.send(Event::Note {
                    text: format!("the name {name} belongs to another publisher: shared without a name (choose one with --name)"),
                });
            }
            let record = version.and_then(|version| engine.sign(name, version, replica.id()));
            engine.publish(&replica, record, optional, replies);
        });
    }

    /// What is known here of a name.
    fn own_latest(&self, name: &Name) -> Option<(PeerId, Version, ContentId)> {
        let network = self.line.as_ref()?.membership.network;
        let here = self.contents.values().filter_map(|c| c.name.as_ref()).map(|n| &n.record);
        // Another network's records are no word in this one.
        let newest =
            here.filter(|r| r.name == *name && r.check(network).is_ok()).max_by_key(|r| r.version);
        let seen = self.notes().seen(network, name).ok().flatten();
        match (newest, seen) {
            (Some(r), Some((by, version))) if version <= r.version || by != r.publisher => {
                Some((r.publisher, r.version, r.id))
            }
            (Some(r), None) => Some((r.publisher, r.version, r.id)),
            (_, Some((by, version))) => Some((by, version, ContentId::file([0; 32]))),
            (None, None) => None,
        }
    }

    fn sign(&self, name: Name, version: Version, id: ContentId) -> Option<NameRecord> {
        let network = self.line.as_ref()?.membership.network;
        Some(NameRecord::sign(&self.key, network, name, version, id, clock::wall()))
    }

    fn publish(
        &mut self,
        replica: &Arc<Replica>,
        record: Option<NameRecord>,
        name_is_optional: bool,
        replies: Replies,
    ) {
        let id = replica.id();
        let mut name = record.map(|record| KnownName { published_here: true, record });
        if let Some(old) = self.remove(id) {
            name = name.or(old.name);
        }
        let network = self.line.as_ref().map(|line| line.membership.network);
        let kept = self.notes().set_name_of(id, name.as_ref()).and_then(|()| {
            let Some((KnownName { record: r, .. }, network)) = name.as_ref().zip(network) else {
                return Ok(());
            };
            self.notes().set_seen(network, &r.name, r.publisher, r.version)
        });
        if let Err(e) = kept {
            return replies.fail(&e);
        }
        self.add(id, name, Phase::Whole(replica.clone()));
        self.host(replica, true);
        let until = clock::now() + REGISTER_PATIENCE;
        let waiting = Registering { replies, size: replica.size(), name_is_optional, until };
        self.registering.entry(id).or_default().push(waiting);
        self.register(id);
    }

    pub(super) fn on_registered(&mut self, id: ContentId) {
        let name = self.contents.get(&id).and_then(|c| c.name.as_ref()).map(|n| n.record.clone());
        for waiting in self.registering.remove(&id).unwrap_or_default() {
            waiting.replies.send(Event::Shared {
                id: id.to_string(),
                name: name.as_ref().map(|r| r.name.to_string()),
                version: name.as_ref().map(|r| r.version.0),
                size: waiting.size,
            });
        }
    }

    pub(super) fn on_refused(&mut self, id: ContentId, refusal: &Refusal) {
        let waiting = self.registering.remove(&id).unwrap_or_default();
        let Some(content) = self.contents.get_mut(&id) else { return };
        let about_name = matches!(refusal.code, Code::NameTaken | Code::StaleVersion);
        if about_name && let Some(name) = content.name.take() {
            let all_optional = waiting.iter().all(|w| w.name_is_optional);
            if let Err(e) = self.notes().set_name_of(id, None) {
                warn!(error = %e, "a refused name is not forgotten");
            }
            if all_optional || !name.published_here {
                for w in &waiting {
                    let name = &name.record.name;
                    w.replies.send(Event::Note { text: format!("the name {name} belongs to another publisher: shared without a name (choose one with --name)") });
                }
                self.registering.insert(id, waiting);
                return self.register(id);
            }
            for w in waiting {
                w.replies.fail(&taken(&name.record.name, None));
            }
            // It was asked for under that name only: nothing stays half-shared.
            self.withdraw(id);
            return;
        }
        warn!(content = %id, reason = %refusal, "the index refuses a registration");
        if waiting.is_empty() {
            return;
        }
        for w in waiting {
            w.replies.fail(&from_refusal(refusal));
        }
        self.withdraw(id);
    }

    /// Those who waited too long for the index are told; the registration itself is tried for ever.
    pub(super) fn tend_registering(&mut self, now: Moment) {
        for waiting in self.registering.values_mut() {
            waiting.retain(|w| {
                if w.until > now {
                    return true;
                }
                let error = Error::new(
                    ErrorKind::IndexUnreachable,
                    "the index does not answer: the content is hashed and served, but not listed yet",
                );
                w.replies.fail(&error.hint(
                    "it will be listed as soon as the index answers; potluck status shows it",
                ));
                false
            });
        }
        self.registering.retain(|_, waiting| !waiting.is_empty());
    }

    // ---- unshare

    fn unshare(&mut self, what: &str, replies: &Replies) {
        let ids = self.here(what);
        if ids.is_empty() {
            return replies.fail(&not_here(what));
        }
        for id in &ids {
            self.withdraw(*id);
        }
        let unshared = Event::Unshared { ids: ids.iter().map(ToString::to_string).collect() };
        let replies = replies.clone();
        self.once_clean(move |_| replies.tell(unshared));
    }

    /// Hosts `id` no more. A finished file stays; a half-fetched one goes.
    fn withdraw(&mut self, id: ContentId) {
        let Some(content) = self.remove(id) else { return };
        if let Phase::Fetching(mut fetch) = content.phase {
            self.fetched += fetch.counts();
            fetch.call_off();
        }
        if let Some(line) = &mut self.line {
            line.link.withdraw(clock::now(), id);
        }
        self.store.retire(&id, Notes::of(id));
        self.once_clean(|_| ());
    }

    /// What a person means by a name, id or path among the contents here.
    fn here(&self, what: &str) -> Vec<ContentId> {
        let path = Path::new(what);
        self.contents
            .iter()
            .filter(|(id, content)| {
                let named = content.name.as_ref().is_some_and(|n| {
                    let record = &n.record;
                    record.name.as_str() == what
                        || format!("{}@{}", record.name, record.version) == what
                });
                named || id.to_string() == what || path_of(content) == path
            })
            .map(|(id, _)| *id)
            .collect()
    }

    // ---- get

    fn get(&mut self, what: &str, to: PathBuf, exists: IfExists, asker: Asker) {
        let query = match what.parse::<Query>() {
            Ok(query) => query,
            Err(e) => return asker.replies.fail(&Error::new(ErrorKind::Usage, e.0)),
        };
        if self.line.is_none() {
            return asker.replies.fail(&no_network());
        }
        // What is being fetched already goes on even where the index does not answer.
        if let [id] = *self.here(what)
            && self.fetch_mut(id).is_some()
        {
            return self.follow_to(id, &to, exists == IfExists::Overwrite, asker);
        }
        let until = clock::now() + asker.timeout;
        self.get_asked(query, to, exists, asker, until);
    }

    fn get_asked(
        &mut self,
        query: Query,
        to: PathBuf,
        exists: IfExists,
        asker: Asker,
        until: Moment,
    ) {
        let search = search_for(&query, Search::MAX_HOSTS);
        self.ask(Question::Search(search), move |engine, answer| match answer {
            Ok(Ack::Found(found)) => engine.get_found(&query, &found, &to, exists, asker),
            Ok(_) => asker.replies.fail(&desk::unexpected()),
            Err(e) => {
                let why = about(&e);
                if why.kind == ErrorKind::NoSource {
                    let next = clock::now() + HOPE_EVERY;
                    let hope = Hoping { query, to, exists, asker, until, next, why };
                    return engine.hoping.push(hope);
                }
                asker.replies.fail(&why);
            }
        });
    }

    /// Asks again for what had no host, until somebody's patience ends.
    pub(super) fn tend_hopes(&mut self, now: Moment) {
        let due = |hope: &mut Hoping| hope.next <= now || hope.asker.replies.is_gone();
        for hope in self.hoping.extract_if(.., due).collect::<Vec<_>>() {
            if hope.until <= now {
                hope.asker.replies.fail(&hope.why);
            } else if !hope.asker.replies.is_gone() {
                self.get_asked(hope.query, hope.to, hope.exists, hope.asker, hope.until);
            }
        }
    }

    fn get_found(
        &mut self,
        query: &Query,
        found: &Found,
        to: &Path,
        exists: IfExists,
        asker: Asker,
    ) {
        let name = match self.believe(query, found) {
            Ok(name) => name,
            Err(e) => return asker.replies.fail(&e),
        };
        if self.fetch_mut(found.id).is_some() {
            return self.follow_to(found.id, to, exists == IfExists::Overwrite, asker);
        }
        let called = name.as_ref().map_or_else(
            || found.id.to_string().trim_end_matches('/').to_owned(),
            |n| n.record.name.to_string(),
        );
        let mut target = target_of(to, &called);
        if let Some(Content { phase: Phase::Whole(replica), .. }) = self.contents.get(&found.id) {
            if !replica.changed() {
                return already_here(replica, &target, &asker.replies);
            }
            self.lose(found.id, "the file changed, moved or went away after it was shared");
        }
        if matches!(self.contents.get(&found.id), Some(Content { phase: Phase::Lost { .. }, .. })) {
            self.remove(found.id);
        }
        if target.symlink_metadata().is_ok() {
            match exists {
                IfExists::Refuse => {
                    let error = Error::new(
                        ErrorKind::Exists,
                        format!("{} exists already", target.display()),
                    );
                    return asker.replies.fail(&error.hint(
                        "choose another place with -o, or say --overwrite, --rename or --skip",
                    ));
                }
                IfExists::Skip => {
                    asker.replies.send(Event::Done {
                        id: found.id.to_string(),
                        path: target,
                        bytes: 0,
                        seconds: 0.0,
                        sources: Vec::new(),
                        stats: None,
                    });
                    return;
                }
                IfExists::Rename => target = free_name(&target),
                IfExists::Overwrite => {}
            }
        }
        self.begin_fetch(found, name, target, exists == IfExists::Overwrite, asker);
    }

    /// Whether the index's answer is what was asked for, and no older than what was seen before: the
    /// index is not trusted for content, and content proves itself.
    fn believe(&self, query: &Query, found: &Found) -> Result<Option<KnownName>> {
        let (name, version) = match query {
            Query::Id(id) if *id == found.id => return Ok(None),
            Query::Id(id) => {
                let text = format!("asked for {id}, the index answered with {}", found.id);
                return Err(lie(text));
            }
            Query::Name(name, version) => (name, *version),
        };
        let record = self.record_of(name, version, found)?;
        let network = self.network()?;
        let before = self.notes().seen(network, name)?;
        if let Some((publisher, seen)) = before {
            if publisher != record.publisher {
                return Err(lie(format!(
                    "the name {name} was {}'s and is now {}'s",
                    publisher.short(),
                    record.publisher.short()
                )));
            }
            if version.is_none() && record.version < seen {
                return Err(lie(format!(
                    "the index says that the newest {name} is version {}, but this machine has seen version {seen}",
                    record.version
                )));
            }
        }
        let newest = before.map_or(record.version, |(_, seen)| seen.max(record.version));
        self.notes().set_seen(network, name, record.publisher, newest)?;
        Ok(Some(KnownName { published_here: false, record: record.clone() }))
    }

    fn network(&self) -> Result<NetworkId> {
        self.line.as_ref().map(|line| line.membership.network).ok_or_else(no_network)
    }

    /// The record in an answer about `name`, where it is its publisher's word and what was asked for.
    fn record_of<'a>(
        &self,
        name: &Name,
        version: Option<Version>,
        found: &'a Found,
    ) -> Result<&'a NameRecord> {
        let Some(record) = &found.record else {
            return Err(lie(format!("the index gave no signed record for the name {name}")));
        };
        let network = self.network()?;
        if record.name != *name
            || record.id != found.id
            || version.is_some_and(|v| v != record.version)
        {
            let query = Query::Name(name.clone(), version);
            return Err(lie(format!(
                "asked for {query}, the index answered with {}@{}",
                record.name, record.version
            )));
        }
        if let Err(e) = record.check(network) {
            return Err(lie(format!("the record of {name} is not to be believed: {e}")));
        }
        Ok(record)
    }

    // ---- find, verify

    fn find(&mut self, what: &str, replies: Replies) {
        let query = match what.parse::<Query>() {
            Ok(query) => query,
            Err(e) => return replies.fail(&Error::new(ErrorKind::Usage, e.0)),
        };
        let search = search_for(&query, Search::MAX_HOSTS);
        self.ask(Question::Search(search), move |_, answer| {
            match answer {
                Ok(Ack::Found(found)) => replies.tell(found_event(&found)),
                Ok(_) => replies.fail(&desk::unexpected()),
                Err(e) => replies.fail(&about(&e)),
            };
        });
    }

    fn verify(&mut self, what: Option<&str>, replies: Replies) {
        let ids: Vec<ContentId> = match what {
            Some(what) => self.here(what),
            None => self.contents.keys().copied().collect(),
        };
        if let (Some(what), true) = (what, ids.is_empty()) {
            return replies.fail(&not_here(what));
        }
        let mut replicas = Vec::new();
        let mut bad = Vec::new();
        for id in ids {
            match self.contents.get(&id).map(|c| &c.phase) {
                Some(Phase::Whole(replica)) => replicas.push(replica.clone()),
                Some(Phase::Fetching(fetch)) => replicas.extend(fetch.replica.clone()),
                Some(Phase::Lost { path, why, .. }) => {
                    bad.push(BadContent {
                        id: id.to_string(),
                        path: path.clone(),
                        why: why.clone(),
                    });
                }
                None => {}
            }
        }
        let teller = replies.clone();
        self.job(
            move || {
                let total = replicas.iter().map(|r| r.size()).sum();
                let (mut done, mut good, mut ruined) = (0, Vec::new(), Vec::new());
                for replica in replicas {
                    match recheck(&replica, &teller, done, total)? {
                        None => good.push(replica.id().to_string()),
                        Some(why) => ruined.push((replica.id(), replica.path(), why)),
                    }
                    done += replica.size();
                }
                Ok((good, ruined))
            },
            move |engine, result| match result {
                Ok((good, ruined)) => {
                    for (id, path, why) in ruined {
                        engine.lose(id, &why);
                        bad.push(BadContent { id: id.to_string(), path, why });
                    }
                    replies.send(Event::Verified { good, bad });
                }
                Err(e) => replies.fail(&e),
            },
        );
    }

    // ---- what there is

    fn peers(&self) -> Event {
        let now = clock::now();
        let connections = self.conns.values().filter(|conn| conn.up).map(|conn| Connection {
            peer: conn.peer.to_string(),
            label: conn.label.clone(),
            address: conn.address.to_string(),
            dialled: conn.dialled,
            seconds: now.since(conn.since).as_secs(),
            sent: conn.connection.sent(),
            received: conn.connection.received(),
        });
        Event::Peers { peers: connections.collect() }
    }

    /// Changes the limits that are given; what they are now.
    fn limit(&mut self, up: Option<u64>, down: Option<u64>, keep: bool) -> Result<Event> {
        let read = |rate: Option<u64>, old| match rate {
            None => Ok(old),
            Some(rate) => Limit::new(rate).map_err(|e| Error::new(ErrorKind::Usage, e.to_string())),
        };
        let (old_up, old_down) = self.context.limits();
        let (new_up, new_down) = (read(up, old_up)?, read(down, old_down)?);
        if keep && (up.is_some() || down.is_some()) {
            self.notes().set_limits(new_up, new_down)?;
        }
        if (new_up, new_down) != (old_up, old_down) {
            self.keep_to(new_up, new_down);
        }
        let (up, down) = (new_up.bytes_a_second(), new_down.bytes_a_second());
        Ok(Event::Limits { up, down })
    }

    fn status(&self) -> Status {
        let now = clock::now();
        let (limit_up, limit_down) = self.context.limits();
        let membership = self.line.as_ref().map(|line| &line.membership);
        Status {
            peer: self.key.peer().to_string(),
            network: membership.map(|m| m.network.to_string()),
            role: membership.map(|m| m.certificate.role.to_string()),
            index: membership.map(|m| m.index.clone()).unwrap_or_default(),
            index_reachable: self.line.as_ref().is_some_and(super::network::Line::is_up),
            is_index: self.index.is_some(),
            listen: self.listen.to_string(),
            pid: std::process::id(),
            seconds: now.since(self.began).as_secs(),
            sent: self.sent_bytes,
            received: self.received_bytes,
            limit_up: limit_up.bytes_a_second(),
            limit_down: limit_down.bytes_a_second(),
            contents: self.contents.iter().map(|(id, c)| content_status(*id, c)).collect(),
            stats: self.stats(),
        }
    }
}

/// What a walk over a folder left out, for a person.
fn left_out(skipped: &Skipped) -> Option<String> {
    let first = skipped.first.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
    (skipped.count > 0).then(|| {
        let more = if skipped.count > first.len() as u64 { " …" } else { "" };
        format!("{} links or special files are left out: {}{more}", skipped.count, first.join(", "))
    })
}

/// The index said what cannot be.
pub(super) fn lie(text: String) -> Error {
    Error::new(ErrorKind::Integrity, text).hint(
        "the index may be broken or hostile: ask its operator; potluck find shows what it says",
    )
}

fn search_for(query: &Query, hosts: u8) -> Search {
    let target = match query {
        Query::Id(id) => Target::Id(*id),
        Query::Name(name, version) => Target::Name(name.clone(), *version),
    };
    Search { target, hosts, avoid: vec![] }
}

fn already_here(replica: &Replica, target: &Path, replies: &Replies) {
    let path = replica.path();
    let same = path == target || path.canonicalize().ok() == target.canonicalize().ok();
    if same || target.symlink_metadata().is_err() && target.parent() == path.parent() {
        replies.send(Event::Done {
            id: replica.id().to_string(),
            path,
            bytes: replica.size(),
            seconds: 0.0,
            sources: Vec::new(),
            stats: None,
        });
    } else {
        let text = format!("this machine has it already, at {}", path.display());
        replies.fail(&Error::new(ErrorKind::Exists, text).hint("copy it from there"));
    }
}

/// What is wrong with a replica, telling how far it is; `before` bytes of `total` came first.
/// What is wrong with a content, if anything.
///
/// # Errors
/// [`ErrorKind::Interrupted`]: nobody waits for it any more, and nothing is known.
fn recheck(replica: &Replica, teller: &Replies, before: u64, total: u64) -> Result<Option<String>> {
    let cancel = AtomicBool::new(false);
    let progress = |done, _| {
        teller.send(Event::Verifying { done: before + done, total });
        cancel.store(teller.is_gone(), Ordering::Relaxed);
    };
    if replica.is_complete() && replica.changed() {
        return Ok(Some("the file changed, moved or went away after it was shared".into()));
    }
    Ok(match replica.recheck(&progress, &cancel) {
        Ok(bad) if bad.is_empty() => None,
        Ok(bad) => Some(format!(
            "{} of {} pieces are not what they should be",
            bad.len(),
            replica.layout().pieces()
        )),
        Err(e) if e.kind == ErrorKind::Interrupted => return Err(e),
        Err(e) => Some(e.message),
    })
}

fn path_of(content: &Content) -> PathBuf {
    match &content.phase {
        Phase::Whole(replica) => replica.path(),
        Phase::Fetching(fetch) => fetch.target.clone(),
        Phase::Lost { path, .. } => path.clone(),
    }
}

fn content_status(id: ContentId, content: &Content) -> ContentStatus {
    let now = clock::now();
    let (size, have, state, note) = match &content.phase {
        Phase::Whole(replica) => (replica.size(), replica.size(), "sharing", None),
        Phase::Fetching(fetch) => {
            let note = fetch.waiting(now);
            let state = match (&fetch.paused, &note) {
                (Some(_), _) => "paused",
                (None, Some(_)) => "waiting",
                (None, None) => "fetching",
            };
            (fetch.size, fetch.have_bytes(), state, note)
        }
        Phase::Lost { size, why, .. } => (*size, 0, "lost", Some(why.clone())),
    };
    ContentStatus {
        id: id.to_string(),
        name: content.name.as_ref().map(|n| n.record.name.to_string()),
        version: content.name.as_ref().map(|n| n.record.version.0),
        path: path_of(content),
        size,
        have,
        state: state.into(),
        note,
    }
}

fn found_event(found: &Found) -> Event {
    let record = found.record.as_ref();
    Event::Found {
        id: found.id.to_string(),
        name: record.map(|r| r.name.to_string()),
        version: record.map(|r| r.version.0),
        publisher: record.map(|r| r.publisher.to_string()),
        size: found.size,
        hosts_in_all: found.hosts_in_all,
        hosts: found
            .hosts
            .iter()
            .map(|host| FoundHost {
                peer: host.peer.to_string(),
                address: host.address.to_string(),
                held: host.held,
                load: host.load,
            })
            .collect(),
    }
}

fn not_here(what: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("this machine neither hosts nor fetches {what}"))
        .hint("potluck status lists what it does")
}

fn taken(name: &Name, by: Option<PeerId>) -> Error {
    let by =
        by.map_or("another publisher".to_owned(), |peer| format!("the machine {}", peer.short()));
    Error::new(ErrorKind::Exists, format!("the name {name} belongs to {by}"))
        .hint("choose another with --name; potluck ls lists the names that are taken")
}

/// What the index's refusal means to the person who asked.
fn from_refusal(refusal: &Refusal) -> Error {
    // To an address that is not proven the index says the code alone.
    let text = match (refusal.code, refusal.text.as_str()) {
        (Code::Removed, "") => "this machine was removed from the network",
        (_, text) => text,
    };
    Error::new(kind_of(refusal.code), format!("the index refuses: {text}"))
}

fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::NotFound => ErrorKind::NotFound,
        Code::NoHosts => ErrorKind::NoSource,
        Code::NameTaken | Code::StaleVersion => ErrorKind::Exists,
        Code::NotAllowed | Code::Removed | Code::SessionOver => ErrorKind::Refused,
        Code::BadRequest => ErrorKind::Usage,
        Code::BadSignature | Code::SizeDiffers => ErrorKind::Integrity,
        Code::CookieNeeded | Code::Quota | Code::Full | Code::TooFast => ErrorKind::Other,
    }
}

pub(super) fn link_error(e: &LinkError) -> Error {
    match e {
        LinkError::Refused(refusal) => from_refusal(refusal),
        LinkError::NoNetwork => no_network(),
        LinkError::NoAnswer | LinkError::TooMany => {
            Error::new(ErrorKind::IndexUnreachable, format!("the index does not answer: {e}")).hint(
                "is it running, and can its port be reached? potluck status shows its address",
            )
        }
    }
}

/// The index's answer about one content: its words say what is the case.
fn about(e: &LinkError) -> Error {
    match e {
        LinkError::Refused(refusal) => {
            let error = Error::new(kind_of(refusal.code), refusal.text.clone());
            match refusal.code {
                Code::NotFound => error.hint("potluck ls lists what there is"),
                _ => error,
            }
        }
        e => link_error(e),
    }
}
