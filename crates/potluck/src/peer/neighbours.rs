//! Owns a fetch's neighbours: hosts heard of, connections opened for it, metadata, and what the other
//! side says it holds. Never decides what is asked of whom (the swarm machine does).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use potluck_core::bitfield::Bitfield;
use potluck_core::fault::{Backoff, Fault};
use potluck_core::id::{ContentId, Kind, PeerId, Piece};
use potluck_core::layout::MAX_PIECES;
use potluck_core::swarm::{Host, Swarm};
use potluck_core::time::Moment;
use potluck_core::wire::datagram::{Ack, Found, Request as Question, Search, Target};
use potluck_core::wire::stream::{Channel, Goodbye, Side};
use tracing::{debug, warn};

use super::engine::{Conn, Content, Engine, Phase, shuffle};
use crate::clock;
use crate::transfer::{Command, ConnId, Gone};

/// Neighbours of one content: more make no swarm faster.
pub(super) const MAX_NEIGHBOURS: usize = 16;
/// Hosts remembered for one content.
const MAX_KNOWN: usize = 256;
/// Of these so many at the most that only another host told of: its word is not the index's.
const MAX_TOLD: usize = 64;
/// Pieces a host may offer before it is known how many there are.
const MAX_EARLY: usize = 4_096;
/// A host that was asked for metadata and gave none for so long is left for another.
pub(super) const META_PATIENCE: Duration = Duration::from_secs(5);
/// A host that does not answer whether it has the content is left for others after this, and asked again
/// later: it may be waiting for the list of pieces itself.
const OPEN_PATIENCE: Duration = Duration::from_secs(5);
/// How often the index is asked for further hosts, while there are few.
pub(super) const SEARCH_EVERY: Duration = Duration::from_secs(3);
/// How long a host that sent a bad piece is not spoken to.
const BAN: Duration = Duration::from_secs(600);

/// A host heard of.
pub(super) struct Known {
    pub(super) address: SocketAddr,
    /// Only another host told of it.
    told: bool,
    pub(super) conn: Option<ConnId>,
    pub(super) next_try: Moment,
    pub(super) backoff: Backoff,
    /// The last try to reach it failed.
    pub(super) unreached: bool,
    /// So often it was tried, and did not answer.
    fruitless: u32,
}

/// A channel open for this content.
pub(super) struct Opened {
    pub(super) channel: u16,
    since: Moment,
    /// The host's answer came.
    pub(super) answered: bool,
    /// What it said before the swarm was there.
    pub(super) have: Option<Bitfield>,
    /// What it said that it has since; of any length.
    pub(super) more: Option<Bitfield>,
    pub(super) grants: Vec<Piece>,
}

impl Known {
    const fn new(address: SocketAddr) -> Self {
        Self {
            address,
            told: false,
            conn: None,
            next_try: Moment::ZERO,
            backoff: patience(),
            unreached: false,
            fruitless: 0,
        }
    }
}

const fn patience() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(15))
}

impl Engine {
    /// Asks the index who hosts `id`.
    pub(super) fn locate(&mut self, id: ContentId) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        if fetch.searching || fetch.paused.is_some() {
            return;
        }
        fetch.searching = true;
        fetch.next_search = clock::now() + SEARCH_EVERY;
        let avoid = self.of_no_use(id);
        let search = Search { target: Target::Id(id), hosts: Search::MAX_HOSTS, avoid };
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

    /// Hosts of `id` that could not be reached, or sent what did not verify: the index hears of them, so
    /// that it sends others elsewhere.
    fn of_no_use(&mut self, id: ContentId) -> Vec<PeerId> {
        let banned = self.banned(clock::now());
        let Some(fetch) = self.fetch_mut(id) else { return vec![] };
        let of_no_use = |(peer, known): &(&PeerId, &Known)| {
            known.conn.is_none() && (known.unreached || banned.contains(peer))
        };
        let all = fetch.known.iter().filter(of_no_use).map(|(peer, _)| *peer);
        all.take(Search::MAX_AVOIDED).collect()
    }

    pub(super) fn on_found(&mut self, found: &Found) {
        let (id, own) = (found.id, self.key.peer());
        let Some(fetch) = self.fetch_mut(id) else { return };
        for host in found.hosts.iter().filter(|host| host.peer != own) {
            if fetch.known.len() >= MAX_KNOWN && !fetch.known.contains_key(&host.peer) {
                // Who was only told of makes room for who is known to the index.
                let told =
                    |(peer, k): (&PeerId, &Known)| (k.told && k.conn.is_none()).then_some(*peer);
                let Some(told) = fetch.known.iter().find_map(told) else { continue };
                fetch.known.remove(&told);
            }
            let known = fetch.known.entry(host.peer).or_insert_with(|| Known::new(host.address));
            known.told = false;
            if known.address != host.address {
                *known = Known { conn: known.conn, ..Known::new(host.address) };
            }
        }
        self.connect(id);
    }

    /// Other hosts know hosts as well: that way a lost index stops nothing. What they say only adds:
    /// it changes nothing that the index said, and makes nothing be dialled sooner.
    pub(super) fn on_hosts(&mut self, id: ConnId, channel: u16, hosts: Vec<(PeerId, SocketAddr)>) {
        let content = self.conns.get(&id).and_then(|conn| conn.ours.get(&channel).copied());
        let own = self.key.peer();
        let Some((content, fetch)) = content.and_then(|id| Some((id, self.fetch_mut(id)?))) else {
            return;
        };
        for (peer, address) in hosts {
            if let Some(known) = fetch.known.get_mut(&peer) {
                if known.told && known.conn.is_none() {
                    known.address = address;
                }
                continue;
            }
            let told = fetch.known.values().filter(|known| known.told).count();
            if peer != own && told < MAX_TOLD && fetch.known.len() < MAX_KNOWN {
                fetch.known.insert(peer, Known { told: true, ..Known::new(address) });
            }
        }
        self.connect(content);
    }

    /// Connects to known hosts while there are fewer neighbours than wanted, to any of them: if all
    /// began with the same, that one would be the middle of a star.
    pub(super) fn connect(&mut self, id: ContentId) {
        let now = clock::now();
        let banned = self.banned(now);
        let Some(fetch) = self.fetch_mut(id) else { return };
        if fetch.paused.is_some() || fetch.finishing {
            return;
        }
        let connected = fetch.known.values().filter(|k| k.conn.is_some()).count();
        let told = fetch.known.values().filter(|k| k.told && k.conn.is_some()).count();
        let mut wanted: Vec<(bool, u32, PeerId, SocketAddr)> = fetch
            .known
            .iter()
            .filter(|(peer, k)| k.conn.is_none() && k.next_try <= now && !banned.contains(peer))
            .map(|(peer, k)| (k.told, k.fruitless, *peer, k.address))
            .collect();
        shuffle(&mut wanted);
        // Each once before any twice: so those that fall silent, however many, hide the others for no
        // longer than it takes to find that out of each.
        wanted.sort_by_key(|(_, fruitless, ..)| *fruitless);
        // Whom the index knows first; others never take all places.
        let (mut wanted, mut others): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|w| !w.0);
        others.truncate((MAX_NEIGHBOURS / 2).saturating_sub(told));
        wanted.append(&mut others);
        wanted.truncate(MAX_NEIGHBOURS.saturating_sub(connected));
        for (.., peer, address) in wanted {
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
                since: now,
                answered: false,
                have: None,
                more: None,
                grants: Vec::new(),
            },
        );
        let known = fetch.known.entry(conn.peer).or_insert_with(|| Known::new(address));
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
            fetch.other_size = Some(size).filter(|size| *size != fetch.size);
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
    pub(super) fn want_meta(&mut self, content: ContentId) {
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

    /// Brings a host that answered into the swarm.
    pub(super) fn attach(&mut self, id: ConnId, content: ContentId) {
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
        let exists = |piece: &Piece| piece.0 < replica.layout().pieces();
        let more = opened.more.take();
        let more: Vec<Piece> = more.iter().flat_map(Bitfield::iter).filter(exists).collect();
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
    pub(super) fn ours(&self, id: ConnId, channel: u16) -> Option<ContentId> {
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

    /// A host is alive; `coming`: something large of it is on its way.
    pub(super) fn on_alive(&mut self, id: ConnId, coming: bool) {
        let now = clock::now();
        let Some(conn) = self.conns.get(&id) else { return };
        for content in conn.ours.values() {
            let Some(Content { phase: Phase::Fetching(fetch), .. }) =
                self.contents.get_mut(content)
            else {
                continue;
            };
            if let Some((_, since)) = fetch.meta.as_mut().filter(|(from, _)| coming && *from == id)
            {
                *since = now;
            }
            if let Some(swarm) = &mut fetch.swarm {
                swarm.on_alive(now, Self::host_of(id), coming);
            }
        }
    }

    pub(super) fn on_granted(&mut self, id: ConnId, channel: u16, pieces: &[Piece]) {
        let Some(fetch) = self.ours(id, channel).and_then(|c| self.fetch_mut(c)) else { return };
        match (&mut fetch.swarm, fetch.opened.get_mut(&id)) {
            (Some(swarm), _) => swarm.on_granted(clock::now(), Self::host_of(id), pieces),
            (None, Some(opened)) if opened.grants.len() + pieces.len() <= MAX_EARLY => {
                opened.grants.extend_from_slice(pieces);
            }
            (None, Some(_)) => {
                self.drop_host(id, Goodbye::Protocol, "it offers too much too early");
            }
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
                    (None, Some(opened)) => {
                        let more = opened.more.get_or_insert_with(|| Bitfield::none(MAX_PIECES));
                        for piece in pieces {
                            more.insert(*piece);
                        }
                    }
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

    pub(super) fn theirs_number(&self, id: ConnId, channel: u16) -> Option<(ContentId, u32)> {
        let content = *self.conns.get(&id)?.theirs.get(&channel)?;
        Some((content, self.contents.get(&content)?.number))
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
                known.unreached = !conn.up;
                known.fruitless += u32::from(!conn.up);
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

    /// Leaves those that do not answer whether they have the content: their places are for others.
    pub(super) fn leave_silent(&mut self, id: ContentId, now: Moment) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        let silent =
            |(_, o): &(&ConnId, &Opened)| !o.answered && now.since(o.since) > OPEN_PATIENCE;
        let silent = fetch.opened.iter().filter(silent).map(|(conn, o)| (*conn, o.channel));
        for (conn, number) in silent.collect::<Vec<_>>() {
            let Some(on) = self.conns.get_mut(&conn) else { continue };
            on.ours.remove(&number);
            on.connection.tell(Command::Close { channel: Channel { number, opener: Side::Us } });
            let peer = on.peer;
            self.on_host_closed(conn, id);
            if let Some(known) = self.fetch_mut(id).and_then(|fetch| fetch.known.get_mut(&peer)) {
                known.fruitless += 1;
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

    pub(super) fn drop_host(&self, id: ConnId, why: Goodbye, text: &str) {
        if let Some(conn) = self.conns.get(&id) {
            conn.connection.tell(Command::Bye(why, text.into()));
        }
    }

    pub(super) fn ban(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get(&id) {
            self.bans.insert(conn.peer, clock::now() + BAN);
        }
    }

    pub(super) fn banned(&mut self, now: Moment) -> BTreeSet<PeerId> {
        self.bans.retain(|_, until| *until > now);
        self.bans.keys().copied().collect()
    }
}
