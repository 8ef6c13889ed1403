//! Owns the fetching half of a peer: finding hosts, opening the content at them, metadata, the swarm
//! of each content and what people who wait are told. Never decides which piece is asked of whom
//! (the swarm machine does).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use potluck_core::bitfield::Bitfield;
use potluck_core::fault::{Backoff, Fault};
use potluck_core::id::{ContentId, Kind, PeerId, Piece};
use potluck_core::swarm::{Arrived, Host, Output, Swarm, Waiting, Why};
use potluck_core::time::Moment;
use potluck_core::wire::datagram::{Ack, Found, Request as Question, Search, Target};
use potluck_core::wire::stream::{Channel, Goodbye, Side};
use tracing::{debug, info, warn};

use super::Replies;
use super::engine::{Conn, Content, Engine, Phase, dice};
use super::notes::KnownName;
use crate::clock;
use crate::control::{Event, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Put, PutError, Replica};
use crate::transfer::{Command, ConnId, Gone};

/// Neighbours of one content: more make no swarm faster.
const MAX_NEIGHBOURS: usize = 16;
/// Hosts remembered for one content.
const MAX_KNOWN: usize = 256;
/// A host that was asked for metadata and gave none for so long is left for another.
const META_PATIENCE: Duration = Duration::from_secs(10);
/// How often the index is asked for further hosts, while there are few.
const SEARCH_EVERY: Duration = Duration::from_secs(3);
/// How often a fetch that met a full disk tries again.
const DISK_RETRY: Duration = Duration::from_secs(3);
/// How long a host that sent a bad piece is not spoken to.
const BAN: Duration = Duration::from_secs(600);

/// A content being fetched.
pub(super) struct Fetch {
    pub(super) replica: Option<Arc<Replica>>,
    pub(super) swarm: Option<Swarm>,
    pub(super) target: PathBuf,
    pub(super) size: u64,
    /// Why it stands still by decision: a person's, or a failure's.
    pub(super) paused: Option<Error>,
    overwrite: bool,
    askers: Vec<Asker>,
    known: BTreeMap<PeerId, Known>,
    opened: BTreeMap<ConnId, Opened>,
    /// Whom the metadata was asked of, and when.
    meta: Option<(ConnId, Moment)>,
    preparing: bool,
    finishing: bool,
    searching: bool,
    next_search: Moment,
    /// When there last was a host that has something missing here.
    last_source: Moment,
    /// The disk was full: when to try again.
    disk_retry: Option<Moment>,
    began: Moment,
    registered: bool,
    /// Verified bytes from each peer, and what it calls itself.
    got: BTreeMap<PeerId, (String, u64)>,
    last_piece: BTreeMap<ConnId, Moment>,
}

/// Somebody who waits for a fetch.
pub(super) struct Asker {
    pub(super) replies: Replies,
    /// Gives up after so long without any source.
    pub(super) timeout: Duration,
}

/// A host heard of.
struct Known {
    address: SocketAddr,
    conn: Option<ConnId>,
    next_try: Moment,
    backoff: Backoff,
}

/// A channel open for this content.
struct Opened {
    channel: u16,
    /// The host's answer came.
    answered: bool,
    /// What it said before the swarm was there.
    have: Option<Bitfield>,
    more: BTreeSet<Piece>,
    grants: Vec<Piece>,
}

const fn patience() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(15))
}

impl Fetch {
    /// A fetch of something found, to be put at `target`.
    fn new(size: u64, target: PathBuf, overwrite: bool) -> Self {
        let now = clock::now();
        Self {
            replica: None,
            swarm: None,
            target,
            size,
            paused: None,
            overwrite,
            askers: Vec::new(),
            known: BTreeMap::new(),
            opened: BTreeMap::new(),
            meta: None,
            preparing: false,
            finishing: false,
            searching: false,
            next_search: now,
            last_source: now,
            disk_retry: None,
            began: now,
            registered: false,
            got: BTreeMap::new(),
            last_piece: BTreeMap::new(),
        }
    }

    /// A fetch that an earlier run began.
    pub(super) fn resumed(_: ContentId, replica: Arc<Replica>, paused: bool) -> Self {
        let mut fetch = Self::new(replica.size(), replica.path(), false);
        let layout = Arc::new(replica.layout().clone());
        fetch.swarm = Some(Swarm::new(layout, replica.have(), dice()));
        fetch.replica = Some(replica);
        fetch.paused = paused.then(interrupted);
        fetch
    }

    /// Bytes here, verified.
    pub(super) fn have_bytes(&self) -> u64 {
        let Some(replica) = &self.replica else { return 0 };
        let (have, layout) = (replica.have(), replica.layout());
        let missing = have.missing().map(|piece| u64::from(layout.len_of(piece))).sum::<u64>();
        layout.total() - missing
    }

    /// Tells those who wait that it is called off.
    pub(super) fn call_off(&mut self) {
        self.fail(&Error::new(ErrorKind::Interrupted, "called off by potluck unshare"));
    }

    /// Why it does not move, for a person; `None` while it does.
    pub(super) fn waiting(&self, now: Moment) -> Option<String> {
        if let Some(error) = &self.paused {
            return Some(error.message.clone());
        }
        if self.finishing {
            return Some("making it durable".into());
        }
        let Some(swarm) = &self.swarm else {
            return Some(match (self.preparing, self.opened.is_empty()) {
                (true, _) => "reserving space".into(),
                (false, true) => "looking for hosts".into(),
                (false, false) => "asking for its list of pieces".into(),
            });
        };
        match swarm.waiting(now)? {
            Waiting::Paused => Some("the disk is full".into()),
            Waiting::NoHosts => Some("no host is connected".into()),
            Waiting::Missing(n) => Some(format!("{n} pieces are at no host that is connected")),
            Waiting::AllBusy(_) => Some("all hosts are busy with others".into()),
            Waiting::Silent => Some("the hosts do not answer".into()),
        }
    }

    fn fail(&mut self, error: &Error) {
        for asker in self.askers.drain(..) {
            asker.replies.fail(error);
        }
    }

    fn sources(&self) -> Vec<Source> {
        self.got
            .iter()
            .map(|(peer, (label, bytes))| Source {
                peer: peer.to_string(),
                label: label.clone(),
                bytes: *bytes,
            })
            .collect()
    }
}

fn interrupted() -> Error {
    Error::new(ErrorKind::Interrupted, "paused").hint("go on with potluck get")
}

impl Engine {
    pub(super) fn fetch_mut(&mut self, id: ContentId) -> Option<&mut Fetch> {
        match &mut self.contents.get_mut(&id)?.phase {
            Phase::Fetching(fetch) => Some(fetch),
            Phase::Whole(_) | Phase::Lost { .. } => None,
        }
    }

    fn fetching(&self) -> Vec<ContentId> {
        let fetching = |c: &Content| matches!(&c.phase, Phase::Fetching(_));
        self.contents.iter().filter(|(_, c)| fetching(c)).map(|(id, _)| *id).collect()
    }

    /// Begins to fetch what the index found, for `asker`.
    pub(super) fn begin_fetch(
        &mut self,
        found: &Found,
        name: Option<KnownName>,
        target: PathBuf,
        overwrite: bool,
        asker: Asker,
    ) {
        if !self.contents.contains_key(&found.id) {
            let fetch = Fetch::new(found.size, target, overwrite);
            self.add(found.id, name, Phase::Fetching(Box::new(fetch)));
        }
        self.follow(found.id, asker);
        self.on_found(found);
    }

    /// The same as [`Engine::follow`], for somebody who says where it is to go. A fetch that was all
    /// there but found its place taken takes the new one; any other keeps its own.
    pub(super) fn follow_to(&mut self, id: ContentId, to: &Path, overwrite: bool, asker: Asker) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        let taken = fetch.paused.as_ref().is_some_and(|why| why.kind == ErrorKind::Exists);
        let name = fetch.target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let (true, Some(replica)) = (taken, &fetch.replica) {
            let target = target_of(to, &name);
            if let Err(error) = replica.retarget(&target, overwrite) {
                asker.replies.fail(&error);
                return;
            }
            fetch.target = target;
        }
        self.follow(id, asker);
    }

    /// Adds somebody who waits; a paused fetch goes on.
    pub(super) fn follow(&mut self, id: ContentId, asker: Asker) {
        if let Err(e) = self.notes().set_paused(id, false) {
            asker.replies.fail(&e);
            return;
        }
        let name = self.contents.get(&id).and_then(|c| c.name.clone());
        let now = clock::now();
        let Some(fetch) = self.fetch_mut(id) else { return };
        asker.replies.send(Event::Fetching {
            id: id.to_string(),
            version: name.as_ref().map(|n| n.record.version.0),
            name: name.map(|n| n.record.name.to_string()),
            size: fetch.size,
            have: fetch.have_bytes(),
            path: fetch.target.clone(),
        });
        fetch.askers.push(asker);
        fetch.last_source = now;
        fetch.next_search = now;
        if fetch.paused.take().is_some() {
            fetch.began = now;
            fetch.disk_retry = None;
            if let Some(swarm) = &mut fetch.swarm {
                swarm.resume(now);
                if swarm.have().is_full() {
                    return self.complete(id);
                }
            }
        }
        self.connect(id);
    }

    /// Stops fetching until asked again; what is here stays.
    pub(super) fn pause(&mut self, id: ContentId, why: Error) {
        if let Err(e) = self.notes().set_paused(id, true) {
            warn!(error = %e, "a pause is not remembered over a restart");
        }
        let now = clock::now();
        let Some(fetch) = self.fetch_mut(id) else { return };
        info!(content = %id, why = %why, "paused");
        if let Some(swarm) = &mut fetch.swarm {
            for conn in std::mem::take(&mut fetch.opened).into_keys() {
                swarm.on_gone(now, Self::host_of(conn));
            }
            swarm.pause(now);
        }
        fetch.opened.clear();
        fetch.meta = None;
        fetch.known.values_mut().for_each(|known| known.conn = None);
        fetch.fail(&why);
        let nothing_here = fetch.replica.is_none() && !fetch.preparing;
        fetch.paused = Some(why);
        self.close_our_channels(id);
        if nothing_here {
            self.remove(id);
        }
    }

    fn close_our_channels(&mut self, id: ContentId) {
        for conn in self.conns.values_mut() {
            conn.ours.retain(|number, content| {
                if *content == id {
                    let channel = Channel { number: *number, opener: Side::Us };
                    conn.connection.tell(Command::Close { channel });
                }
                *content != id
            });
        }
    }

    /// Asks the index who hosts `id`.
    pub(super) fn locate(&mut self, id: ContentId) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        if fetch.searching || fetch.paused.is_some() {
            return;
        }
        fetch.searching = true;
        fetch.next_search = clock::now() + SEARCH_EVERY;
        let search = Search { target: Target::Id(id), hosts: Search::MAX_HOSTS };
        self.ask(Question::Search(search), move |engine, answer| {
            if let Some(fetch) = engine.fetch_mut(id) {
                fetch.searching = false;
                fetch.next_search = clock::now() + SEARCH_EVERY;
            }
            if let Ok(Ack::Found(found)) = answer {
                engine.on_found(&found);
            }
        });
    }

    fn on_found(&mut self, found: &Found) {
        self.learn(found.id, found.hosts.iter().map(|host| (host.peer, host.address)));
    }

    /// Other hosts know hosts as well: that way a lost index stops nothing.
    pub(super) fn on_hosts(&mut self, id: ConnId, channel: u16, hosts: Vec<(PeerId, SocketAddr)>) {
        let content = self.conns.get(&id).and_then(|conn| conn.ours.get(&channel).copied());
        if let Some(content) = content {
            self.learn(content, hosts);
        }
    }

    fn learn(&mut self, id: ContentId, hosts: impl IntoIterator<Item = (PeerId, SocketAddr)>) {
        let own = self.key.peer();
        let Some(fetch) = self.fetch_mut(id) else { return };
        for (peer, address) in hosts {
            if peer == own || (fetch.known.len() >= MAX_KNOWN && !fetch.known.contains_key(&peer)) {
                continue;
            }
            let known = fetch.known.entry(peer).or_insert_with(|| Known {
                address,
                conn: None,
                next_try: Moment::ZERO,
                backoff: patience(),
            });
            if known.address != address {
                *known = Known {
                    conn: known.conn,
                    address,
                    next_try: Moment::ZERO,
                    backoff: patience(),
                };
            }
        }
        self.connect(id);
    }

    /// Connects to known hosts while there are fewer neighbours than wanted.
    fn connect(&mut self, id: ContentId) {
        let now = clock::now();
        let banned = self.banned(now);
        let Some(fetch) = self.fetch_mut(id) else { return };
        if fetch.paused.is_some() || fetch.finishing {
            return;
        }
        let connected = fetch.known.values().filter(|k| k.conn.is_some()).count();
        let wanted: Vec<(PeerId, SocketAddr)> = fetch
            .known
            .iter()
            .filter(|(peer, k)| k.conn.is_none() && k.next_try <= now && !banned.contains(peer))
            .map(|(peer, k)| (*peer, k.address))
            .take(MAX_NEIGHBOURS.saturating_sub(connected))
            .collect();
        for (peer, address) in wanted {
            let conn = match self.connected_to(peer).map_or_else(|| self.dial(peer, address), Ok) {
                Ok(conn) => conn,
                Err(e) => return warn!(error = %e, "cannot dial"),
            };
            let up = self.conns.get(&conn).is_some_and(|c| c.up);
            if let Some(known) = self.fetch_mut(id).and_then(|f| f.known.get_mut(&peer)) {
                known.conn = Some(conn);
            }
            if up {
                self.open_on(conn, id);
            }
        }
    }

    pub(super) fn on_up(&mut self, id: ConnId) {
        let Some(peer) = self.conns.get(&id).map(|conn| conn.peer) else { return };
        self.sharing.on_host(clock::now(), Self::host_of(id), peer);
        for content in self.fetching() {
            if self.fetch_mut(content).is_some_and(|f| f.known.contains_key(&peer)) {
                self.open_on(id, content);
            }
        }
    }

    /// Opens `content` on a standing connection, unless it is open there or not wanted.
    pub(super) fn open_on(&mut self, id: ConnId, content: ContentId) {
        let now = clock::now();
        let banned = self.banned(now);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let Some(Content { phase: Phase::Fetching(fetch), .. }) = self.contents.get_mut(&content)
        else {
            return;
        };
        // One channel a peer: a second connection to the same one brings nothing.
        let before = fetch.known.get(&conn.peer).and_then(|known| known.conn).unwrap_or(id);
        if fetch.paused.is_some()
            || fetch.finishing
            || banned.contains(&conn.peer)
            || fetch.opened.contains_key(&id)
            || fetch.opened.contains_key(&before)
        {
            return;
        }
        let channel = loop {
            conn.next_channel = (conn.next_channel + 1) & 0x7fff;
            if !conn.ours.contains_key(&conn.next_channel) {
                break conn.next_channel;
            }
        };
        conn.ours.insert(channel, content);
        conn.connection.tell(Command::Open { channel, id: content });
        let address = conn.address;
        fetch.opened.insert(
            id,
            Opened {
                channel,
                answered: false,
                have: None,
                more: BTreeSet::new(),
                grants: Vec::new(),
            },
        );
        let known = fetch.known.entry(conn.peer).or_insert_with(|| Known {
            address,
            conn: None,
            next_try: Moment::ZERO,
            backoff: patience(),
        });
        known.conn = Some(id);
    }

    pub(super) fn on_opened(
        &mut self,
        id: ConnId,
        channel: u16,
        size: u64,
        manifest: u32,
        _proof: u32,
    ) {
        let Some(content) = self.ours(id, channel) else { return };
        let Some(fetch) = self.fetch_mut(content) else { return };
        let plausible = size == fetch.size && (manifest > 0) == (content.kind == Kind::Folder);
        if !plausible {
            debug!(content = ?content, size, "a host tells another size");
            self.drop_host(id, Goodbye::Protocol, "the size is not the content's");
            return;
        }
        if let Some(opened) = fetch.opened.get_mut(&id) {
            opened.answered = true;
        }
        if fetch.swarm.is_some() {
            self.attach(id, content);
        } else {
            self.want_meta(content);
        }
    }

    /// Asks one of the hosts that answered for the metadata.
    fn want_meta(&mut self, content: ContentId) {
        let now = clock::now();
        let Some(Content { phase: Phase::Fetching(fetch), .. }) = self.contents.get_mut(&content)
        else {
            return;
        };
        if fetch.meta.is_some() || fetch.preparing || fetch.swarm.is_some() {
            return;
        }
        let Some((id, opened)) = fetch.opened.iter().find(|(_, o)| o.answered) else { return };
        if let Some(conn) = self.conns.get(id) {
            conn.connection.tell(Command::WantMeta { channel: opened.channel });
            fetch.meta = Some((*id, now));
        }
    }

    pub(super) fn on_meta(&mut self, id: ConnId, channel: u16, manifest: Vec<u8>, proof: Vec<u8>) {
        let Some(content) = self.ours(id, channel) else { return };
        let store = self.store.clone();
        let Some(fetch) = self.fetch_mut(content) else { return };
        if fetch.preparing || fetch.swarm.is_some() {
            return;
        }
        fetch.meta = None;
        fetch.preparing = true;
        let (size, target, overwrite) = (fetch.size, fetch.target.clone(), fetch.overwrite);
        self.job(
            move || store.fetch(content, size, &manifest, &proof, &target, overwrite),
            move |engine, result| engine.on_prepared(content, id, result),
        );
    }

    fn on_prepared(&mut self, content: ContentId, from: ConnId, result: Result<Arc<Replica>>) {
        let Some(fetch) = self.fetch_mut(content) else {
            // Unshared meanwhile: nothing of it is to stay.
            if result.is_ok()
                && let Err(e) = self.store.forget(&content)
            {
                warn!(error = %e, "a fetch that was called off leaves files behind");
            }
            return;
        };
        fetch.preparing = false;
        match result {
            Ok(replica) => {
                let layout = Arc::new(replica.layout().clone());
                let mut swarm = Swarm::new(layout, replica.have(), dice());
                if fetch.paused.is_some() {
                    swarm.pause(clock::now());
                }
                fetch.swarm = Some(swarm);
                fetch.replica = Some(replica.clone());
                let opened: Vec<ConnId> =
                    fetch.opened.iter().filter(|(_, o)| o.answered).map(|(id, _)| *id).collect();
                if let Err(e) = self.keep_name(content) {
                    warn!(error = %e, "a name is not remembered");
                }
                self.host(&replica, false);
                for id in opened {
                    self.attach(id, content);
                }
            }
            Err(error) if error.kind == ErrorKind::Integrity => {
                warn!(content = %content, error = %error, "a host sent a false list of pieces");
                self.ban(from);
                self.drop_host(
                    from,
                    Goodbye::BadPiece,
                    "the proof does not fold to the content's id",
                );
                self.want_meta(content);
            }
            Err(error) => {
                fetch.fail(&error);
                self.remove(content);
            }
        }
    }

    fn keep_name(&self, id: ContentId) -> Result<()> {
        let name = self.contents.get(&id).and_then(|c| c.name.as_ref());
        self.notes().set_name_of(id, name)
    }

    /// Brings a host that answered into the swarm.
    fn attach(&mut self, id: ConnId, content: ContentId) {
        let now = clock::now();
        let Some(conn) = self.conns.get(&id) else { return };
        let Some(Content { phase: Phase::Fetching(fetch), .. }) = self.contents.get_mut(&content)
        else {
            return;
        };
        let (Some(swarm), Some(replica)) = (&mut fetch.swarm, &fetch.replica) else { return };
        let Some(opened) = fetch.opened.get_mut(&id) else { return };
        let channel = opened.channel;
        conn.connection.tell(Command::Attach { channel, replica: replica.clone() });
        let have = replica.have();
        if !have.is_empty() {
            let channel = Channel { number: channel, opener: Side::Us };
            conn.connection.tell(Command::Have { channel, bitfield: have });
        }
        let host = Self::host_of(id);
        swarm.on_host(now, host);
        let shown = opened.have.take();
        let wrong = shown.as_ref().is_some_and(|have| have.len() != replica.layout().pieces());
        if let Some(shown) = shown.filter(|_| !wrong) {
            swarm.on_have(now, host, &shown);
        }
        let more: Vec<Piece> = std::mem::take(&mut opened.more).into_iter().collect();
        if !more.is_empty() {
            swarm.on_have_more(now, host, &more);
        }
        let grants = std::mem::take(&mut opened.grants);
        if !grants.is_empty() {
            swarm.on_granted(now, host, &grants);
        }
        if wrong {
            self.drop_host(id, Goodbye::Protocol, "a bitfield of another content");
        }
    }

    /// The content on a channel that we opened.
    fn ours(&self, id: ConnId, channel: u16) -> Option<ContentId> {
        self.conns.get(&id)?.ours.get(&channel).copied()
    }

    /// Tells the swarm of the content on our channel something.
    pub(super) fn with_swarm(
        &mut self,
        id: ConnId,
        channel: u16,
        tell: impl FnOnce(&mut Swarm, Moment, Host),
    ) {
        let content = self.ours(id, channel);
        if let Some(fetch) = content.and_then(|content| self.fetch_mut(content))
            && let Some(swarm) = &mut fetch.swarm
        {
            tell(swarm, clock::now(), Self::host_of(id));
        }
    }

    pub(super) fn on_granted(&mut self, id: ConnId, channel: u16, pieces: &[Piece]) {
        let Some(fetch) = self.ours(id, channel).and_then(|c| self.fetch_mut(c)) else { return };
        match (&mut fetch.swarm, fetch.opened.get_mut(&id)) {
            (Some(swarm), _) => swarm.on_granted(clock::now(), Self::host_of(id), pieces),
            (None, Some(opened)) => opened.grants.extend_from_slice(pieces),
            (None, None) => {}
        }
    }

    pub(super) fn on_have(&mut self, id: ConnId, channel: Channel, have: &Bitfield) {
        let now = clock::now();
        let host = Self::host_of(id);
        match channel.opener {
            Side::Us => {
                let Some(content) = self.ours(id, channel.number) else { return };
                let Some(fetch) = self.fetch_mut(content) else { return };
                match (&mut fetch.swarm, &fetch.replica, fetch.opened.get_mut(&id)) {
                    (Some(swarm), Some(replica), _) if have.len() == replica.layout().pieces() => {
                        swarm.on_have(now, host, have);
                    }
                    (Some(_), ..) => {
                        self.drop_host(id, Goodbye::Protocol, "a bitfield of another content");
                    }
                    (None, _, Some(opened)) => opened.have = Some(have.clone()),
                    (None, _, None) => {}
                }
            }
            Side::Them => {
                if let Some((content, number)) = self.theirs_number(id, channel.number) {
                    let replica = self.replica_of(content);
                    if replica.is_some_and(|r| r.layout().pieces() == have.len()) {
                        self.sharing.on_their_have(now, host, number, have);
                    }
                }
            }
        }
    }

    pub(super) fn on_have_more(&mut self, id: ConnId, channel: Channel, pieces: &[Piece]) {
        let now = clock::now();
        let host = Self::host_of(id);
        match channel.opener {
            Side::Us => {
                let Some(content) = self.ours(id, channel.number) else { return };
                let Some(fetch) = self.fetch_mut(content) else { return };
                match (&mut fetch.swarm, fetch.opened.get_mut(&id)) {
                    (Some(swarm), _) => swarm.on_have_more(now, host, pieces),
                    (None, Some(opened)) => opened.more.extend(pieces),
                    (None, None) => {}
                }
            }
            Side::Them => {
                if let Some((_, number)) = self.theirs_number(id, channel.number) {
                    self.sharing.on_their_have_more(now, host, number, pieces);
                }
            }
        }
    }

    pub(super) fn on_lost(&mut self, id: ConnId, channel: Channel, pieces: &[Piece]) {
        let now = clock::now();
        match channel.opener {
            Side::Us => self.with_swarm(id, channel.number, |swarm, now, host| {
                swarm.on_lost(now, host, pieces);
            }),
            Side::Them => {
                if let Some((_, number)) = self.theirs_number(id, channel.number) {
                    self.sharing.on_their_lost(now, Self::host_of(id), number, pieces);
                }
            }
        }
    }

    fn theirs_number(&self, id: ConnId, channel: u16) -> Option<(ContentId, u32)> {
        let content = *self.conns.get(&id)?.theirs.get(&channel)?;
        Some((content, self.contents.get(&content)?.number))
    }

    pub(super) fn on_piece(
        &mut self,
        id: ConnId,
        channel: u16,
        piece: Piece,
        bytes: u32,
        put: Result<Put, PutError>,
    ) {
        let now = clock::now();
        let Some(content) = self.ours(id, channel) else { return };
        let Some(conn) = self.conns.get(&id) else { return };
        let Some(Content { number, phase: Phase::Fetching(fetch), .. }) =
            self.contents.get_mut(&content)
        else {
            return;
        };
        let arrived = match put {
            Ok(Put::New) => {
                self.received_bytes += u64::from(bytes);
                let entry = fetch.got.entry(conn.peer).or_default();
                entry.0.clone_from(&conn.label);
                entry.1 += u64::from(bytes);
                fetch.last_piece.insert(id, now);
                fetch.last_source = now;
                self.sharing.on_held(*number, &[piece]);
                Arrived::New
            }
            Ok(Put::Duplicate) => Arrived::Duplicate,
            Err(PutError::BadPiece) => {
                warn!(peer = %conn.peer, label = conn.label, content = %content, piece = piece.0, "a bad piece: it is asked of others");
                Arrived::Bad
            }
            Err(PutError::Disk(error)) => {
                self.on_disk_trouble(content, error);
                Arrived::Failed
            }
        };
        self.with_swarm(id, channel, |swarm, now, host| swarm.on_piece(now, host, piece, arrived));
    }

    /// Our own disk does not take a piece: those who wait are told now; a full disk is tried again.
    fn on_disk_trouble(&mut self, content: ContentId, error: Error) {
        let now = clock::now();
        let Some(fetch) = self.fetch_mut(content) else { return };
        if fetch.disk_retry.is_some() || fetch.paused.is_some() {
            return;
        }
        warn!(content = %content, error = %error, "cannot write");
        if error.kind == ErrorKind::DiskFull {
            fetch.disk_retry = Some(now + DISK_RETRY);
            if let Some(swarm) = &mut fetch.swarm {
                swarm.pause(now);
            }
            let error =
                error.hint("free some space: the fetch then goes on by itself (potluck status)");
            fetch.fail(&error);
        } else {
            self.pause(content, error);
        }
    }

    pub(super) fn on_host_gone(&mut self, id: ConnId, conn: &Conn, why: &Gone) {
        let now = clock::now();
        let host = Self::host_of(id);
        for content in self.fetching() {
            let Some(fetch) = self.fetch_mut(content) else { continue };
            if let Some(known) = fetch.known.get_mut(&conn.peer)
                && known.conn == Some(id)
            {
                known.conn = None;
                // One that was up and went may be back at once; one that was never reached waits longer.
                let wait = match (why.fault(), conn.up) {
                    (Fault::Theirs, _) => BAN,
                    (_, true) => Duration::from_millis(200),
                    (_, false) => known.backoff.wait(),
                };
                known.next_try = now + wait;
            }
            fetch.last_piece.remove(&id);
            if fetch.opened.remove(&id).is_some()
                && let Some(swarm) = &mut fetch.swarm
            {
                swarm.on_gone(now, host);
                debug!(?why, peer = %conn.peer.short(), "a host is gone");
            }
            if fetch.meta.is_some_and(|(from, _)| from == id) {
                fetch.meta = None;
                self.want_meta(content);
            }
        }
    }

    /// A host closed the content: it has it no longer, or has nothing of it yet.
    pub(super) fn on_host_closed(&mut self, id: ConnId, content: ContentId) {
        let now = clock::now();
        let peer = self.conns.get(&id).map(|conn| conn.peer);
        let Some(fetch) = self.fetch_mut(content) else { return };
        if fetch.opened.remove(&id).is_some()
            && let Some(swarm) = &mut fetch.swarm
        {
            swarm.on_gone(now, Self::host_of(id));
        }
        if let Some(known) = peer.and_then(|peer| fetch.known.get_mut(&peer)) {
            known.conn = None;
            known.next_try = now + known.backoff.wait();
        }
        if fetch.meta.is_some_and(|(from, _)| from == id) {
            fetch.meta = None;
            self.want_meta(content);
        }
    }

    fn drop_host(&self, id: ConnId, why: Goodbye, text: &str) {
        if let Some(conn) = self.conns.get(&id) {
            conn.connection.tell(Command::Bye(why, text.into()));
        }
    }

    fn ban(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get(&id) {
            self.bans.insert(conn.peer, clock::now() + BAN);
        }
    }

    fn banned(&mut self, now: Moment) -> BTreeSet<PeerId> {
        self.bans.retain(|_, until| *until > now);
        self.bans.keys().copied().collect()
    }

    /// Pieces turned bad on our own disk: they are missing again.
    pub(super) fn restart_fetch(&mut self, id: ContentId) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        let Some(replica) = fetch.replica.clone() else { return };
        let layout = Arc::new(replica.layout().clone());
        fetch.swarm = Some(Swarm::new(layout, replica.have(), dice()));
        fetch.opened.clear();
        fetch.known.values_mut().for_each(|known| known.conn = None);
        self.host(&replica, false);
        self.register(id);
        self.connect(id);
    }

    /// Does what the swarms want done; true if there was anything.
    pub(super) fn act_for_fetches(&mut self) -> bool {
        let mut busy = false;
        for content in self.fetching() {
            while let Some(output) =
                self.fetch_mut(content).and_then(|f| f.swarm.as_mut()).and_then(Swarm::poll_output)
            {
                busy = true;
                self.act_for_swarm(content, output);
            }
        }
        busy
    }

    fn act_for_swarm(&mut self, content: ContentId, output: Output) {
        match output {
            Output::Ask { host, pieces } => {
                self.tell_host(content, host, |channel| Command::Want { channel, pieces });
            }
            Output::Cancel { host, pieces } => {
                self.tell_host(content, host, |channel| Command::Cancel { channel, pieces });
            }
            Output::Drop { host, why } => {
                let id = Self::conn_of(host);
                match why {
                    Why::Poison => {
                        self.ban(id);
                        self.drop_host(id, Goodbye::BadPiece, "a piece did not match its proof");
                    }
                    Why::Silent => self.drop_host(id, Goodbye::TimedOut, "no piece came"),
                }
            }
            Output::Announce(pieces) => self.announce(content, &pieces),
            Output::NeedHosts => {
                if let Some(fetch) = self.fetch_mut(content)
                    && fetch.next_search > clock::now() + SEARCH_EVERY / 2
                {
                    return;
                }
                self.locate(content);
            }
            Output::Complete => self.complete(content),
        }
    }

    fn tell_host(&self, content: ContentId, host: Host, command: impl FnOnce(u16) -> Command) {
        let id = Self::conn_of(host);
        if let Some(Content { phase: Phase::Fetching(fetch), .. }) = self.contents.get(&content)
            && let (Some(opened), Some(conn)) = (fetch.opened.get(&id), self.conns.get(&id))
        {
            conn.connection.tell(command(opened.channel));
        }
    }

    /// Tells neighbours and the index what is here now.
    fn announce(&mut self, content: ContentId, pieces: &[Piece]) {
        for some in pieces.chunks(potluck_core::wire::stream::MAX_PIECES) {
            self.tell_all(content, |channel| Command::HaveMore { channel, pieces: some.to_vec() });
        }
        let Some(fetch) = self.fetch_mut(content) else { return };
        let held = fetch.replica.as_ref().map_or(0, |replica| replica.have().thousandths());
        if !std::mem::replace(&mut fetch.registered, true) {
            return self.register(content);
        }
        if let Some(line) = &mut self.line {
            line.link.update_held(clock::now(), content, held);
        }
    }

    fn complete(&mut self, content: ContentId) {
        let Some(fetch) = self.fetch_mut(content) else { return };
        let Some(replica) = fetch.replica.clone() else { return };
        if std::mem::replace(&mut fetch.finishing, true) {
            return;
        }
        let finishing = replica.clone();
        self.job(
            move || finishing.finish(),
            move |engine, result| engine.on_finished(content, replica, result),
        );
    }

    fn on_finished(&mut self, content: ContentId, replica: Arc<Replica>, result: Result<PathBuf>) {
        let now = clock::now();
        let Some(fetch) = self.fetch_mut(content) else { return };
        fetch.finishing = false;
        let path = match result {
            Ok(path) => path,
            Err(error) if error.kind == ErrorKind::DiskFull => {
                return self.on_disk_trouble(content, error);
            }
            Err(error) => return self.pause(content, error),
        };
        let seconds = now.since(fetch.began).as_secs_f64();
        let sources = fetch.sources();
        let bytes = replica.size();
        info!(content = %content, path = %path.display(), bytes, seconds, "complete");
        for asker in fetch.askers.drain(..) {
            asker.replies.send(Event::Done {
                id: content.to_string(),
                path: path.clone(),
                bytes,
                seconds,
                sources: sources.clone(),
            });
        }
        self.close_our_channels(content);
        if let Some(known) = self.contents.get_mut(&content) {
            known.phase = Phase::Whole(replica);
        }
        self.register(content);
    }

    /// Twice a second: connect, search, tell those who wait, notice those who went.
    pub(super) fn tend_fetches(&mut self, now: Moment) {
        for id in self.fetching() {
            self.tend_disk(id, now);
            let Some(fetch) = self.fetch_mut(id) else { continue };
            if fetch.paused.is_some() {
                continue;
            }
            if let Some((from, asked)) = fetch.meta
                && now.since(asked) > META_PATIENCE
            {
                fetch.meta = None;
                self.drop_host(from, Goodbye::TimedOut, "the list of pieces did not come");
            }
            self.connect(id);
            self.tell_askers(id, now);
            let Some(fetch) = self.fetch_mut(id) else { continue };
            let few = fetch.opened.len() < MAX_NEIGHBOURS / 2;
            if fetch.next_search <= now && few && !fetch.finishing {
                self.locate(id);
            }
        }
    }

    fn tend_disk(&mut self, id: ContentId, now: Moment) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        if fetch.disk_retry.is_some_and(|at| at <= now) {
            fetch.disk_retry = None;
            if let Some(swarm) = &mut fetch.swarm {
                swarm.resume(now);
                if swarm.have().is_full() {
                    self.complete(id);
                }
            }
        }
    }

    fn tell_askers(&mut self, id: ContentId, now: Moment) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        let recent = |at: &&Moment| now.since(**at) < Duration::from_secs(3);
        let waiting = fetch.waiting(now);
        let stuck = match &fetch.swarm {
            None => fetch.opened.is_empty() && !fetch.preparing,
            Some(swarm) => matches!(
                swarm.waiting(now),
                Some(Waiting::NoHosts | Waiting::Missing(_) | Waiting::Silent)
            ),
        };
        if !stuck || fetch.finishing {
            fetch.last_source = now;
        }
        let progress = Event::Progress {
            id: id.to_string(),
            done: fetch.have_bytes(),
            total: fetch.size,
            rate: fetch.swarm.as_ref().map_or(0, Swarm::rate),
            sources: fetch.last_piece.values().filter(recent).count() as u32,
            hosts: fetch.opened.len() as u32,
            waiting,
        };
        let had_askers = !fetch.askers.is_empty();
        fetch.askers.retain(|asker| {
            // A reader that is behind misses some progress; one that is gone is gone.
            asker.replies.send(progress.clone());
            !asker.replies.is_gone()
        });
        if had_askers && fetch.askers.is_empty() {
            return self.pause(id, interrupted());
        }
        let without = now.since(fetch.last_source);
        if had_askers && fetch.askers.iter().all(|asker| asker.timeout <= without) {
            let error = self.no_source(id, without);
            self.pause(id, error);
        }
    }

    fn no_source(&mut self, id: ContentId, without: Duration) -> Error {
        let what = self
            .contents
            .get(&id)
            .and_then(|c| c.name.as_ref())
            .map_or_else(|| id.short(), |n| format!("{}@{}", n.record.name, n.record.version));
        let seconds = without.as_secs();
        let reachable = self.line.as_ref().is_some_and(super::network::Line::is_up);
        let Some(fetch) = self.fetch_mut(id) else { return interrupted() };
        let (here, size) = (fetch.have_bytes(), fetch.size);
        let missing = fetch.swarm.as_ref().map_or_else(
            || format!("all {size} bytes of {what}"),
            |swarm| {
                let have = swarm.have();
                let gone = have.len() - have.count();
                format!(
                    "{gone} of the {} pieces of {what} ({} of {size} bytes)",
                    have.len(),
                    size - here
                )
            },
        );
        let index = if reachable { "" } else { "; the index does not answer either" };
        Error::new(
            ErrorKind::NoSource,
            format!("no peer that is reachable has {missing}: none came for {seconds} s{index}"),
        )
        .hint(format!(
            "what came is kept: when a host is back, go on with potluck get {what} (potluck find {what} tells who has it)"
        ))
    }
}

/// The path a content goes to: into `to` where that is a folder, else `to` itself.
pub(super) fn target_of(to: &Path, name: &str) -> PathBuf {
    if to.is_dir() { to.join(name) } else { to.to_owned() }
}

/// The first of `name (2)`, `name (3)` … that is free; the number goes before the extension.
pub(super) fn free_name(target: &Path) -> PathBuf {
    let stem = target.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let extension = target.extension().map(|e| format!(".{}", e.to_string_lossy()));
    (2u32..)
        .map(|n| {
            target.with_file_name(format!("{stem} ({n}){}", extension.as_deref().unwrap_or("")))
        })
        .find(|path| path.symlink_metadata().is_err())
        .unwrap_or_else(|| target.to_owned())
}
