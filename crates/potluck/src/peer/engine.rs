//! Owns all thinking of a peer: the machines of core, who waits for what, and the order of things.
//! Never waits for a disk, a socket or a person: slow work is a job on a thread of its own, which
//! hands its result back as the next thing to do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, after, select};
use potluck_core::dice::Dice;
use potluck_core::id::{ContentId, PeerId, RequestId};
use potluck_core::limit::Limit;
use potluck_core::link::LinkError;
use potluck_core::sharing::Sharing;
use potluck_core::swarm::{self, Host};
use potluck_core::time::Moment;
use potluck_core::trust::{MachineKey, NameRecord};
use potluck_core::wire::datagram::{Ack, HELD_ALL, Item, Request as Question};
use potluck_core::wire::stream::{Channel, Goodbye, Side};
use tracing::{debug, info, warn};

use super::fetch::Fetch;
use super::listing::{Listing, Watcher};
use super::network::Line;
use super::notes::{KnownName, Notes};
use super::requests::{Hoping, Registering};
use super::{FAREWELL, Replies, Settings};
use crate::clock;
use crate::control::Request;
use crate::error::{Error, ErrorKind, Result};
use crate::index::{Index, spawn};
use crate::store::{Replica, Store};
use crate::transfer::{self, Command, ConnId, Connection, Context, SharedIdentity};

/// Connections with one peer: two dial each other at once, or one comes back before the other end of
/// its old connection noticed; more are of no use.
const MAX_A_PEER: usize = 4;
/// Jobs under way at once; more are refused with a clear error.
const MAX_JOBS: usize = 64;
/// Events handled before outputs and timers are looked at again.
const BATCH: usize = 256;
/// While one thing follows the other sooner than this, they are done together, once in so long: a
/// fast transfer would else wake this thread for every piece, and it the connection's for every
/// answer, which costs more than the thinking.
const TOGETHER: Duration = Duration::from_millis(1);
/// A connection on which nothing is open is closed after this.
const IDLE: Duration = Duration::from_secs(60);
/// How often fetchers are told how far it is, files are looked at for changes, and idle
/// connections are closed.
const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// What the engine is fed with, beside the events of connections.
pub(super) enum Input {
    /// A person asks.
    Request { request: Request, replies: Replies },
    /// A datagram of the index, on the line of this number.
    Datagram { line: u32, bytes: Vec<u8> },
    /// A job is done; this is what to do with its result.
    Then(Then),
    /// The process stops.
    Stop,
}

/// What is to be done on the one thread.
type Then = Box<dyn FnOnce(&mut Engine) + Send>;
/// What to do with the answer of the index.
type Answered = Box<dyn FnOnce(&mut Engine, Result<Ack, LinkError>) + Send>;

/// A content this machine hosts or fetches.
pub(super) struct Content {
    /// What the sharing machine knows it by.
    pub(super) number: u32,
    pub(super) name: Option<KnownName>,
    pub(super) phase: Phase,
}

pub(super) enum Phase {
    /// All of it is here.
    Whole(Arc<Replica>),
    /// It is being fetched, or waits to be.
    Fetching(Box<Fetch>),
    /// It was here; the file changed or went away.
    Lost { path: PathBuf, size: u64, why: String },
}

/// A connection, from dialling to its end.
pub(super) struct Conn {
    pub(super) connection: Connection,
    pub(super) peer: PeerId,
    pub(super) up: bool,
    pub(super) dialled: bool,
    pub(super) label: String,
    /// Where the other serves.
    pub(super) address: SocketAddr,
    pub(super) since: Moment,
    /// Since when nothing is open on it.
    pub(super) idle_since: Moment,
    /// Channels we opened, and those they did.
    pub(super) ours: BTreeMap<u16, ContentId>,
    pub(super) theirs: BTreeMap<u16, ContentId>,
    /// Channels it opened of what is fetched here but not known yet: answered once there is a proof
    /// of it, so that who begins together finds each other at once.
    pub(super) early: BTreeMap<u16, ContentId>,
    pub(super) next_channel: u16,
}

impl Conn {
    fn new(connection: Connection, peer: PeerId, address: SocketAddr, dialled: bool) -> Self {
        let now = clock::now();
        Self {
            connection,
            peer,
            up: false,
            dialled,
            label: String::new(),
            address,
            since: now,
            idle_since: now,
            ours: BTreeMap::new(),
            theirs: BTreeMap::new(),
            early: BTreeMap::new(),
            next_channel: 0,
        }
    }

    fn has_channels(&self) -> bool {
        !(self.ours.is_empty() && self.theirs.is_empty() && self.early.is_empty())
    }
}

/// The one thread's state.
pub(super) struct Engine {
    pub(super) settings: Settings,
    pub(super) key: Arc<MachineKey>,
    pub(super) store: Arc<Store>,
    pub(super) identity: SharedIdentity,
    pub(super) context: Arc<Context>,
    pub(super) listen: SocketAddr,
    pub(super) line: Option<Line>,
    pub(super) lines_made: u32,
    pub(super) index: Option<Index>,
    pub(super) contents: BTreeMap<ContentId, Content>,
    pub(super) numbers: BTreeMap<u32, ContentId>,
    pub(super) conns: BTreeMap<ConnId, Conn>,
    pub(super) sharing: Sharing,
    pub(super) questions: BTreeMap<RequestId, Answered>,
    /// Who waits for the index to acknowledge a content.
    pub(super) registering: BTreeMap<ContentId, Vec<Registering>>,
    /// Fetches of names that have no host yet.
    pub(super) hoping: Vec<Hoping>,
    /// Peers that sent a bad piece, and until when they are not spoken to.
    pub(super) bans: BTreeMap<PeerId, Moment>,
    pub(super) watchers: Vec<Watcher>,
    pub(super) listing: Listing,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    /// What fetches counted that are over.
    pub(super) fetched: swarm::Counts,
    pub(super) began: Moment,
    /// Contents whose files are being looked at for changes.
    pub(super) being_checked: BTreeSet<ContentId>,
    pub(super) next_check: Moment,
    next_number: u32,
    next_housekeeping: Moment,
    jobs: usize,
    /// The store is removing what was withdrawn, and what is done once it has.
    cleaning: bool,
    once_clean: Vec<Then>,
    pub(super) inbox: Sender<Input>,
    _acceptor: transfer::Listener,
}

impl Engine {
    #[expect(clippy::too_many_arguments, reason = "called once, by the peer that gathers them")]
    pub(super) fn new(
        settings: Settings,
        key: Arc<MachineKey>,
        store: Store,
        identity: SharedIdentity,
        context: Arc<Context>,
        acceptor: transfer::Listener,
        inbox: Sender<Input>,
        listen: SocketAddr,
    ) -> Self {
        Self {
            settings,
            key,
            store: Arc::new(store),
            identity,
            context,
            listen,
            line: None,
            lines_made: 0,
            index: None,
            contents: BTreeMap::new(),
            numbers: BTreeMap::new(),
            conns: BTreeMap::new(),
            sharing: Sharing::new(dice()),
            questions: BTreeMap::new(),
            registering: BTreeMap::new(),
            hoping: Vec::new(),
            bans: BTreeMap::new(),
            watchers: Vec::new(),
            listing: Listing::default(),
            sent_bytes: 0,
            received_bytes: 0,
            fetched: swarm::Counts::default(),
            began: clock::now(),
            being_checked: BTreeSet::new(),
            next_check: clock::now(),
            next_number: 0,
            next_housekeeping: clock::now(),
            jobs: 0,
            cleaning: false,
            once_clean: Vec::new(),
            inbox,
            _acceptor: acceptor,
        }
    }

    /// Takes up what was done before the last stop: shares, fetches, the membership.
    pub(super) fn begin(&mut self, replicas: Vec<Arc<Replica>>) {
        for replica in replicas {
            let id = replica.id();
            let name = self.notes().name_of(id).unwrap_or_default();
            // All pieces alone make nothing whole: a fetch that ended just before its final name is
            // given it now.
            if replica.is_growing() {
                let paused = self.notes().is_paused(id).unwrap_or_default();
                let fetch = Fetch::resumed(id, replica.clone(), paused);
                self.add(id, name, Phase::Fetching(Box::new(fetch)));
                self.host(&replica, false);
            } else {
                self.add(id, name, Phase::Whole(replica.clone()));
                if replica.is_complete() {
                    self.host(&replica, true);
                } else {
                    self.lose(id, "a piece of it is not what was shared any more (bit rot?)");
                }
            }
        }
        self.begin_limits();
        self.begin_network();
        for id in self.contents.keys().copied().collect::<Vec<_>>() {
            self.register(id);
            self.locate(id);
        }
    }

    fn begin_limits(&mut self) {
        let kept = self.notes().limits().unwrap_or_else(|e| {
            warn!(error = %e, "cannot read what limits were set");
            None
        });
        let (up, down) = kept.unwrap_or_default();
        let Settings { limit_up, limit_down, .. } = self.settings;
        self.keep_to(limit_up.unwrap_or(up), limit_down.unwrap_or(down));
    }

    /// Sends and receives no faster than this from now on.
    pub(super) fn keep_to(&mut self, up: Limit, down: Limit) {
        self.context.set_limits(up, down);
        self.sharing.set_limit(up.bytes_a_second());
        for conn in self.conns.values() {
            conn.connection.tell(Command::Relimit);
        }
    }

    /// The loop: until the process stops.
    pub(super) fn run(
        &mut self,
        inputs: &Receiver<Input>,
        events: &Receiver<(ConnId, transfer::Event)>,
    ) {
        let mut woke = clock::now();
        let mut crowded = false;
        loop {
            if crowded {
                std::thread::sleep(TOGETHER.saturating_sub(clock::now().since(woke)));
            }
            let wait = self.next_deadline().since(clock::now());
            select! {
                recv(inputs) -> input => match input {
                    Ok(Input::Stop) | Err(_) => break,
                    Ok(input) => self.on_input(input),
                },
                recv(events) -> event => if let Ok((conn, event)) = event {
                    self.on_event(conn, event);
                },
                recv(after(wait)) -> _ => {}
            }
            let now = clock::now();
            crowded = now.since(woke) < TOGETHER;
            woke = now;
            for _ in 0..BATCH {
                let Ok((conn, event)) = events.try_recv() else { break };
                self.on_event(conn, event);
            }
            for input in inputs.try_iter().take(BATCH).collect::<Vec<_>>() {
                if matches!(input, Input::Stop) {
                    return self.farewell(inputs);
                }
                self.on_input(input);
            }
            self.tick();
            self.act();
        }
        self.farewell(inputs);
    }

    fn on_input(&mut self, input: Input) {
        match input {
            Input::Request { request, replies } => self.on_request(request, replies),
            Input::Datagram { line, bytes } => self.on_datagram(line, bytes),
            Input::Then(then) => then(self),
            Input::Stop => {}
        }
    }

    fn next_deadline(&self) -> Moment {
        let swarms = self.contents.values().filter_map(|content| match &content.phase {
            Phase::Fetching(fetch) => fetch.swarm.as_ref()?.next_deadline(),
            Phase::Whole(_) | Phase::Lost { .. } => None,
        });
        swarms
            .chain(self.sharing.next_deadline())
            .chain(self.line.as_ref().and_then(|line| line.link.next_deadline()))
            .chain([self.next_housekeeping])
            .min()
            .unwrap_or(self.next_housekeeping)
    }

    fn tick(&mut self) {
        let now = clock::now();
        self.sharing.tick(now);
        if let Some(line) = &mut self.line {
            line.link.tick(now);
        }
        for content in self.contents.values_mut() {
            if let Phase::Fetching(fetch) = &mut content.phase
                && let Some(swarm) = &mut fetch.swarm
            {
                swarm.tick(now);
            }
        }
        if self.next_housekeeping <= now {
            self.next_housekeeping = now + HOUSEKEEPING;
            self.tend_fetches(now);
            self.tend_files(now);
            self.tend_connections(now);
            self.tend_line(now);
            self.tend_registering(now);
            self.tend_hopes(now);
            self.tend_watchers(now);
        }
    }

    /// Does what the machines want done, until none wants anything.
    fn act(&mut self) {
        loop {
            let busy = self.act_for_line() | self.act_for_sharing() | self.act_for_fetches();
            if !busy {
                break;
            }
        }
    }

    /// Slow work, away from this thread; `then` gets its result here.
    pub(super) fn job<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<T>) + Send + 'static,
    ) {
        if self.jobs >= MAX_JOBS {
            let busy =
                Error::new(ErrorKind::Other, format!("{MAX_JOBS} jobs are under way already"));
            return then(self, Err(busy.hint("try again when some are done")));
        }
        self.jobs += 1;
        let then = |engine: &mut Self, result: Result<T>| {
            engine.jobs -= 1;
            then(engine, result);
        };
        if !self.begin_job(work, then) {
            // `then` went with the thread that did not start: whoever waits sees its channel close.
            self.jobs -= 1;
        }
    }

    /// Removes from the disk what the store has retired, and then does this; one such job at a time.
    pub(super) fn once_clean(&mut self, then: impl FnOnce(&mut Self) + Send + 'static) {
        self.once_clean.push(Box::new(then));
        if !self.cleaning {
            self.clean();
        }
    }

    fn clean(&mut self) {
        let (store, once_clean) = (self.store.clone(), std::mem::take(&mut self.once_clean));
        let work = move || {
            store.clean();
            Ok(())
        };
        let then = |engine: &mut Self, _: Result<()>| {
            engine.cleaning = false;
            for then in once_clean {
                then(engine);
            }
            if !engine.cleaning && !engine.once_clean.is_empty() {
                engine.clean();
            }
        };
        self.cleaning = self.begin_job(work, then);
    }

    /// False if there is no thread for it.
    fn begin_job<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<T>) + Send + 'static,
    ) -> bool {
        let inbox = self.inbox.clone();
        let started = spawn("job", move || {
            let result = work();
            let _ = inbox.send(Input::Then(Box::new(move |engine| then(engine, result))));
        });
        if let Err(e) = &started {
            warn!(error = %e, "a job was not started");
        }
        started.is_ok()
    }

    /// Asks the index; `then` gets its answer here.
    pub(super) fn ask(
        &mut self,
        question: Question,
        then: impl FnOnce(&mut Self, Result<Ack, LinkError>) + Send + 'static,
    ) {
        match &mut self.line {
            Some(line) => {
                let id = line.link.ask(clock::now(), question);
                self.questions.insert(id, Box::new(then));
            }
            None => then(self, Err(LinkError::NoNetwork)),
        }
    }

    pub(super) fn notes(&self) -> Notes<'_> {
        Notes(&self.store)
    }

    pub(super) fn add(&mut self, id: ContentId, name: Option<KnownName>, phase: Phase) {
        let number = self.next_number;
        self.next_number += 1;
        self.numbers.insert(number, id);
        self.contents.insert(id, Content { number, name, phase });
    }

    /// Forgets a content: whoever is connected for it is told.
    pub(super) fn remove(&mut self, id: ContentId) -> Option<Content> {
        let content = self.contents.remove(&id)?;
        self.numbers.remove(&content.number);
        self.sharing.remove(clock::now(), content.number);
        self.close_channels(id);
        Some(content)
    }

    /// Tells the index that this machine hosts `id`, or what it holds of it now.
    pub(super) fn register(&mut self, id: ContentId) {
        let Some(item) = self.item(id) else { return };
        if let Some(line) = &mut self.line {
            line.link.share(clock::now(), item);
        }
    }

    fn item(&self, id: ContentId) -> Option<Item> {
        let content = self.contents.get(&id)?;
        let (replica, held) = match &content.phase {
            Phase::Whole(replica) => (replica, HELD_ALL),
            Phase::Fetching(fetch) => {
                let replica = fetch.replica.as_ref()?;
                (replica, replica.thousandths())
            }
            Phase::Lost { .. } => return None,
        };
        if held == 0 {
            return None;
        }
        let name: Option<NameRecord> = content.name.as_ref().map(|name| name.record.clone());
        Some(Item { id, size: replica.size(), held, name })
    }

    pub(super) fn host_of(conn: ConnId) -> Host {
        Host(conn.0)
    }

    pub(super) fn conn_of(host: Host) -> ConnId {
        ConnId(host.0)
    }

    /// A connection to `peer` that stands or is being made, for there should be one only.
    pub(super) fn connected_to(&self, peer: PeerId) -> Option<ConnId> {
        self.conns.iter().find(|(_, c)| c.peer == peer).map(|(id, _)| *id)
    }

    /// Dials `peer`; what is to be opened there is opened when it is up.
    pub(super) fn dial(&mut self, peer: PeerId, address: SocketAddr) -> Result<ConnId> {
        let id = self.context.number();
        let connection = transfer::dial(&self.context, id, address, peer)?;
        self.conns.insert(id, Conn::new(connection, peer, address, true));
        Ok(id)
    }

    fn on_event(&mut self, id: ConnId, event: transfer::Event) {
        use transfer::Event as E;
        match event {
            E::Up { peer, certificate, address, port, dialled, connection } => {
                let standing = self.conns.values().filter(|c| c.up && c.peer == peer).count();
                if standing >= MAX_A_PEER {
                    return connection.tell(Command::Bye(Goodbye::Full, "enough with you".into()));
                }
                let made = || Conn::new(connection, peer, address, dialled);
                let conn = self.conns.entry(id).or_insert_with(made);
                conn.up = true;
                conn.since = clock::now();
                conn.label = certificate.label;
                conn.address = SocketAddr::new(address.ip().to_canonical(), port);
                debug!(peer = %peer.short(), %address, dialled, "connected");
                self.on_up(id);
            }
            E::Gone { why } => self.on_gone(id, &why),
            E::Opened { channel, size, manifest, proof } => {
                self.on_opened(id, channel, size, manifest, proof);
            }
            E::Meta { channel, manifest, proof } => self.on_meta(id, channel, manifest, proof),
            E::Busy { channel, pieces, wait_ms } => {
                self.with_swarm(id, channel, |swarm, now, host| {
                    swarm.on_busy(now, host, &pieces, Duration::from_millis(wait_ms.into()));
                });
            }
            E::Granted { channel, pieces } => self.on_granted(id, channel, &pieces),
            E::Hosts { channel, hosts } => self.on_hosts(id, channel, hosts),
            E::PieceIn { channel, piece, bytes, put } => {
                self.on_piece(id, channel, piece, bytes, put);
            }
            E::Alive { coming } => self.on_alive(id, coming),
            E::WantsOpen { channel, id: content } => self.on_wants_open(id, channel, content),
            E::Wants { channel, pieces } => self.on_wants(id, channel, &pieces),
            E::Cancelled { channel, pieces } => self.on_cancelled(id, channel, &pieces),
            E::Rejected { channel, piece } => self.on_rejected(id, channel, piece),
            E::Sent { channel, piece, bytes } => self.on_sent(id, channel, piece, bytes),
            E::Unsent { channel, piece } => self.on_unsent(id, channel, piece),
            E::Unreadable { channel, piece, error } => {
                self.on_unreadable(id, channel, piece, error);
            }
            E::Have { channel, bitfield } => self.on_have(id, channel, &bitfield),
            E::HaveMore { channel, pieces } => self.on_have_more(id, channel, &pieces),
            E::Lost { channel, pieces } => self.on_lost(id, channel, &pieces),
            E::Closed { channel } => self.on_closed(id, channel),
        }
    }

    fn on_gone(&mut self, id: ConnId, why: &transfer::Gone) {
        let Some(conn) = self.conns.remove(&id) else { return };
        debug!(peer = %conn.peer.short(), ?why, "disconnected");
        let now = clock::now();
        self.sharing.on_gone(now, Self::host_of(id));
        self.on_host_gone(id, &conn, why);
    }

    fn on_closed(&mut self, id: ConnId, channel: Channel) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let now = clock::now();
        match channel.opener {
            Side::Them => {
                conn.early.remove(&channel.number);
                if let Some(content) = conn.theirs.remove(&channel.number)
                    && let Some(content) = self.contents.get(&content)
                {
                    self.sharing.on_closed(now, Self::host_of(id), content.number);
                }
            }
            Side::Us => {
                if let Some(content) = conn.ours.remove(&channel.number) {
                    self.on_host_closed(id, content);
                }
            }
        }
    }

    /// Tells everybody that a content is over here, in both directions.
    pub(super) fn close_channels(&mut self, id: ContentId) {
        for conn in self.conns.values_mut() {
            let Conn { ours, theirs, early, .. } = conn;
            for (channels, opener) in [(ours, Side::Us), (theirs, Side::Them), (early, Side::Them)]
            {
                channels.retain(|number, content| {
                    if *content == id {
                        let channel = Channel { number: *number, opener };
                        conn.connection.tell(Command::Close { channel });
                    }
                    *content != id
                });
            }
        }
    }

    /// Tells every neighbour of `id`, in both directions.
    pub(super) fn tell_all(&self, id: ContentId, command: impl Fn(Channel) -> Command) {
        for conn in self.conns.values() {
            for (channels, opener) in [(&conn.ours, Side::Us), (&conn.theirs, Side::Them)] {
                for (number, _) in channels.iter().filter(|(_, content)| **content == id) {
                    conn.connection.tell(command(Channel { number: *number, opener }));
                }
            }
        }
    }

    fn tend_connections(&mut self, now: Moment) {
        for conn in self.conns.values_mut() {
            if conn.has_channels() || !conn.up {
                conn.idle_since = now;
            } else if now.since(conn.idle_since) >= IDLE {
                conn.idle_since = now;
                conn.connection.tell(Command::Bye(Goodbye::Done, String::new()));
            }
        }
    }

    /// Says goodbye: to the index, so that the listing is right at once, and to the peers.
    fn farewell(&mut self, inputs: &Receiver<Input>) {
        let until = clock::now() + FAREWELL;
        if let Some(line) = &mut self.line {
            for id in self.contents.keys() {
                line.link.withdraw(clock::now(), *id);
            }
        }
        for conn in self.conns.values() {
            conn.connection.tell(Command::Bye(Goodbye::Leaving, String::new()));
        }
        while self.line.as_ref().is_some_and(|line| line.is_up() && line.link.is_withdrawing())
            && clock::now() < until
        {
            self.act_for_line();
            if let Ok(Input::Datagram { line, bytes }) =
                inputs.recv_timeout(Duration::from_millis(20))
            {
                self.on_datagram(line, bytes);
            }
            if let Some(line) = &mut self.line {
                line.link.tick(clock::now());
            }
        }
        self.hang_up();
        self.index = None;
        self.store.clean();
        if let Err(e) = self.store.flush() {
            warn!(error = %e, "what came last is fetched again at the next start");
        }
        info!("stopped");
    }
}

/// In any order.
pub(super) fn shuffle<T>(all: &mut [T]) {
    let mut dice = Dice(dice());
    all.sort_by_cached_key(|_| dice.next());
}

pub(super) fn dice() -> u64 {
    u64::from_be_bytes(clock::random())
}
