//! Owns the index process: the UDP sockets and the TLS desk around a `Registrar`, and the database in
//! which its memory survives. Never decides who may do what (the registrar does).
//!
//! Three kinds of thread: workers answer datagrams, each with a socket of its own; one writes (it
//! commits changes in groups and only then lets answers that depend on them go); and a few serve the
//! desk, each for one short TLS conversation, or the page that machines read. The registrar is one, behind a lock that a worker takes
//! once for a whole batch of datagrams.

mod datagrams;
mod journal;
mod limits;
mod metrics;
mod status;

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use datagrams::Datagrams;
use journal::{Journal, Queue, Write};
pub use limits::IndexLimits;
use potluck_core::id::{NetworkId, ParseError};
use potluck_core::registrar::{
    Boot, Outbox, Output, Registrar, Settings as Terms, Stats, Ticket, Walk,
};
use potluck_core::time::{Moment, WallTime};
use potluck_core::trust::{Invitation, MachineKey, Role};
use potluck_core::wire::desk::{Answer, Ask, InviteTerms, Member, Removal};
use rustix::event::{EventfdFlags, eventfd};
use status::Tally;
pub use status::{IndexStatus, JournalStatus, Traffic};
use tracing::{error, info, warn};

use crate::clock;
use crate::control::{Event, Request};
use crate::daemon::{self, Role as Half};
use crate::desk;
use crate::door::Door;
use crate::error::{Error, ErrorKind, Result};
use crate::peer::members::{invited_event, members_event, pick_member, removal};
use crate::state::{StateDir, hold};

/// The port an index listens on unless told otherwise, UDP and TCP.
pub const DEFAULT_PORT: u16 = 7700;
/// Machines that may join by the first invitation.
pub(crate) const FIRST_USES: u32 = 50;
/// How long the first invitation holds.
pub(crate) const FIRST_VALID: Duration = Duration::from_secs(24 * 3600);
/// Workers that an index has unless told otherwise: one for each core, but no more than this.
const MOST_WORKERS: usize = 4;
/// What a worker waits for at most, so that it looks at the clock, and tells what it dropped, now and
/// then.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Batches that a worker answers at most once it is told to stop: more than its socket holds, fewer
/// than a flood would have it answer.
const LAST_BATCHES: u32 = 512;
/// How long the desk waits for the registrar, and for the disk, before it gives up on an answer.
const DESK_PATIENCE: Duration = Duration::from_secs(4);
/// Receive buffer asked of the kernel: a burst of 10,000 heartbeats fits.
const SOCKET_BUFFER: usize = 8 << 20;

/// How to run an index.
#[derive(Clone, Debug)]
pub struct IndexSettings {
    /// The state folder; the index keeps to `index/` in it.
    pub state: PathBuf,
    /// UDP and TCP address to listen on; `None`: port 7700 on all addresses.
    pub listen: Option<SocketAddr>,
    /// What invitations name as its address, `host:port` (the port may be left out); `None`: this
    /// machine's own address.
    pub advertise: Option<String>,
    /// Seconds between heartbeats of its members.
    pub heartbeat_s: u16,
    /// Machines that may join by the invitation it prints when it starts.
    pub invite_uses: u32,
    /// How long that invitation is valid.
    pub invite_valid: Duration,
    /// Threads that answer datagrams, each with a socket of its own.
    pub workers: usize,
    /// How much it takes.
    pub limits: IndexLimits,
    /// Where machines read how it is (HTTP: `/metrics`, `/healthz`, `/readyz`); `None`: nowhere.
    pub metrics: Option<SocketAddr>,
}

impl IndexSettings {
    /// The defaults, with this state folder.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self {
            state: state.into(),
            listen: None,
            advertise: None,
            heartbeat_s: 25,
            invite_uses: FIRST_USES,
            invite_valid: FIRST_VALID,
            workers: std::thread::available_parallelism().map_or(1, usize::from).min(MOST_WORKERS),
            limits: IndexLimits::default(),
            metrics: None,
        }
    }
}

/// A running index: the registry of a network. Stops when dropped.
pub struct Index {
    hands: Arc<Hands>,
    settings: IndexSettings,
    running: Mutex<Running>,
    stop: Sender<()>,
    stopping: Receiver<()>,
}

/// What ends with a running index.
#[derive(Default)]
struct Running {
    workers: Vec<JoinHandle<()>>,
    journal: Option<JoinHandle<()>>,
    desk: Option<desk::Desk>,
    metrics: Option<(Door, SocketAddr)>,
    control: Option<daemon::Server>,
}

/// What every thread of an index shares.
struct Hands {
    network: NetworkId,
    listen: SocketAddr,
    advertise: Vec<String>,
    registrar: Mutex<Registrar>,
    /// [`Registrar::news`], to be seen without the lock.
    news: AtomicU64,
    queue: Queue,
    /// Of each worker.
    tallies: Vec<Tally>,
    began: Moment,
    stopping: AtomicBool,
    /// Wakes a worker that sleeps.
    wake: OwnedFd,
}

impl Index {
    /// Opens the state folder, listens, and serves until [`Index::stop`] or drop.
    pub fn open(settings: &IndexSettings) -> Result<Self> {
        let dir = StateDir::open(&settings.state, "index")?;
        let lock = hold(dir.path())?;
        let key = dir.key()?;
        let network = key.network();
        let (journal, saved) = Journal::open(dir.path(), lock)?;
        let (tcp, sockets) = bind(settings.listen, settings.workers.max(1))?;
        let listen = tcp.local_addr().map_err(|e| Error::io("cannot listen", &e))?;
        let advertise = advertised(settings.advertise.as_deref(), listen);

        let boot = Boot {
            id: u64::from_be_bytes(clock::random()),
            cookie_key: clock::random(),
            secret_seed: clock::random(),
            dice: u64::from_be_bytes(clock::random()),
        };
        let heartbeat_s = settings.heartbeat_s.max(1);
        let terms = settings.limits.terms(Terms { heartbeat_s, ..Terms::default() });
        let own_key = Arc::new(MachineKey::from_seed(*key.seed()));
        let registrar =
            Registrar::new(key, boot, terms, saved.into_iter(), clock::now(), clock::wall())
                .map_err(|e| {
                    Error::new(
                        ErrorKind::Integrity,
                        format!("the index's saved state is damaged: {e}"),
                    )
                    .hint(format!(
                        "move {} aside: the index then learns everything anew from its members",
                        dir.path().join("index.redb").display()
                    ))
                })?;

        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| Error::io("cannot start the index", &e.into()))?;
        let (writes, to_write) = unbounded();
        let hands = Arc::new(Hands {
            network,
            listen,
            advertise,
            news: registrar.news().into(),
            registrar: registrar.into(),
            queue: Queue::new(writes),
            tallies: sockets.iter().map(|_| Tally::default()).collect(),
            began: clock::now(),
            stopping: false.into(),
            wake,
        });
        hands.carry_out(&mut hands.think(), None);

        let at_journal = hands.clone();
        let journal = spawn("index-disk", move || {
            let hands = Arc::clone(&at_journal);
            let all = Box::new(move |walk: &mut Walk, about| hands.think().rows(walk, about)) as _;
            journal.run(&at_journal.queue, &to_write, &all);
        })?;
        let mut workers = vec![];
        for (nth, socket) in sockets.into_iter().enumerate() {
            let hands = hands.clone();
            workers.push(spawn("index", move || work(&hands, &hands.tallies[nth], socket))?);
        }
        let at_desk = hands.clone();
        let desk = desk::serve(tcp, own_key, move |caller, ask| {
            at_desk.ask(DESK_PATIENCE, |registrar, ticket| {
                registrar.on_ask(clock::now(), clock::wall(), caller, ask, ticket);
            })
        })?;
        let metrics = match settings.metrics {
            None => None,
            Some(address) => {
                let (at_status, at_ready) = (hands.clone(), hands.clone());
                let (door, at) = metrics::serve(
                    address,
                    metrics::Source {
                        status: Box::new(move || at_status.status()),
                        ready: Box::new(move || !at_ready.stopping.load(Ordering::Acquire)),
                    },
                )?;
                info!(%at, "metrics are read");
                Some((door, at))
            }
        };
        info!(%listen, %network, "index serves");
        let (stop, stopping) = bounded(1);
        let (journal, desk) = (Some(journal), Some(desk));
        let running = Running { workers, journal, desk, metrics, control: None };
        Ok(Self { hands, settings: settings.clone(), running: running.into(), stop, stopping })
    }

    /// The network this index keeps.
    pub fn network(&self) -> NetworkId {
        self.hands.network
    }

    /// Where it listens, UDP and TCP.
    pub fn listen(&self) -> SocketAddr {
        self.hands.listen
    }

    /// Where other machines find it, `host:port`.
    pub fn addresses(&self) -> &[String] {
        &self.hands.advertise
    }

    /// Makes an invitation, durable when this returns.
    ///
    /// # Errors
    /// `Other` where it cannot be made durable.
    pub fn invite(&self, terms: InviteTerms) -> Result<Invitation> {
        self.hands.invite(terms)
    }

    /// Who is a member.
    ///
    /// # Errors
    /// `IndexUnreachable` while it stops.
    pub fn members(&self) -> Result<Vec<Member>> {
        self.hands.members()
    }

    /// Removes members; how many there were.
    ///
    /// # Errors
    /// `NotFound` where there is no such member or invitation.
    pub fn remove(&self, who: Removal) -> Result<u32> {
        self.hands.remove(who)
    }

    /// Runs one request of the operator: `Invite`, `Members`, `RemoveMember`, `Down`.
    pub fn handle(&self, request: Request, emit: &mut dyn FnMut(Event) -> bool) {
        let event = self.hands.answer(request, &self.stop);
        emit(event.unwrap_or_else(|e| Event::failed(&e)));
    }

    /// Takes requests over the control socket of the state folder from now on.
    ///
    /// # Errors
    /// Another index serves this folder, or the socket cannot be made.
    pub fn serve_control(&self) -> Result<()> {
        let (hands, stop) = (self.hands.clone(), self.stop.clone());
        let path = daemon::socket_path(&self.settings.state, Half::Index);
        let server = daemon::serve(
            &path,
            Arc::new(move |request, replies: daemon::Replies| {
                let event = hands.answer(request, &stop);
                replies.send(&event.unwrap_or_else(|e| Event::failed(&e)));
            }),
        )?;
        self.running().control = Some(server);
        Ok(())
    }

    /// The event that says that this index serves, with a fresh invitation.
    pub fn ready(&self) -> Event {
        let terms =
            invite_terms(Role::Publish, self.settings.invite_uses, self.settings.invite_valid);
        match self.invite(terms) {
            Ok(invitation) => Event::Ready {
                listen: self.hands.listen.to_string(),
                invite: Some(invitation.to_string()),
                network: Some(self.hands.network.to_string()),
                peer: None,
                metrics: self.running().metrics.as_ref().map(|(_, at)| at.to_string()),
            },
            Err(e) => Event::failed(&e),
        }
    }

    /// Blocks until this index was asked to stop (by a request, [`Index::stop`], SIGTERM or SIGINT),
    /// then stops it.
    pub fn wait(&self) {
        let signals = crate::signals::stop_on_signals(self.stop.clone());
        if let Err(e) = &signals {
            warn!(error = %e, "signals end this process at once");
        }
        let _ = self.stopping.recv();
        self.stop();
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it has done so far.
    pub fn stats(&self) -> Stats {
        self.hands.think().stats()
    }

    /// How it is.
    pub fn status(&self) -> IndexStatus {
        self.hands.status()
    }

    /// From now on it takes so much. What it has it keeps, also where that is more.
    pub fn set_limits(&self, limits: &IndexLimits) {
        let mut registrar = self.hands.think();
        let terms = limits.terms(*registrar.settings());
        registrar.set(terms);
    }

    /// Stops serving: answers what has arrived, and writes what is still to be written.
    pub fn stop(&self) {
        let running = std::mem::take(&mut *self.running());
        drop((running.desk, running.control));
        if running.workers.is_empty() {
            return;
        }
        let _ = self.stop.try_send(());
        self.hands.stopping.store(true, Ordering::Release);
        self.hands.wake();
        let join = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                error!("a thread of the index ended by a panic");
            }
        };
        running.workers.into_iter().for_each(join);
        self.hands.queue.push(Write::Stop); // behind all that they changed
        running.journal.into_iter().for_each(join);
        if let Some(why) = self.hands.queue.trouble() {
            error!(%why, "the index ends, and what changed since its disk failed is lost");
        }
    }
}

impl Hands {
    fn answer(&self, request: Request, stop: &Sender<()>) -> Result<Event> {
        match request {
            Request::Invite { uses, valid_s, role } => {
                let role: Role =
                    role.parse().map_err(|e: ParseError| Error::new(ErrorKind::Usage, e.0))?;
                let terms = invite_terms(role, uses, Duration::from_secs(valid_s));
                Ok(invited_event(&self.invite(terms)?, uses, valid_s, role))
            }
            Request::Members => Ok(members_event(&self.members()?)),
            Request::RemoveMember { who } => {
                let removal = match removal(&who) {
                    Some(removal) => removal?,
                    None => Removal::Peer(pick_member(&self.members()?, &who)?),
                };
                Ok(Event::Removed { count: self.remove(removal)? })
            }
            Request::Down => {
                let _ = stop.try_send(());
                Ok(Event::Stopping)
            }
            _ => Err(Error::new(ErrorKind::Usage, "an index is not asked this; a peer is")
                .hint("start one beside it with potluck up")),
        }
    }

    fn invite(&self, terms: InviteTerms) -> Result<Invitation> {
        match self.operator(Ask::Invite(terms))? {
            Answer::Invited { secret, terms } => {
                Ok(Invitation::new(self.network, secret, terms.expires, self.advertise.clone()))
            }
            _ => Err(desk::unexpected()),
        }
    }

    fn members(&self) -> Result<Vec<Member>> {
        match self.operator(Ask::Members)? {
            Answer::Members(members) => Ok(members),
            _ => Err(desk::unexpected()),
        }
    }

    fn remove(&self, who: Removal) -> Result<u32> {
        match self.operator(Ask::Remove(who))? {
            Answer::Removed(count) => Ok(count),
            _ => Err(desk::unexpected()),
        }
    }

    fn operator(&self, ask: Ask) -> Result<Answer> {
        let answer = self.ask(3 * DESK_PATIENCE, |registrar, ticket| {
            registrar.on_operator(clock::now(), clock::wall(), ask, ticket);
        });
        match answer {
            Some(Answer::Refused(refusal)) => Err(desk::refused(&refusal)),
            Some(answer) => Ok(answer),
            None => Err(stopped()),
        }
    }

    /// Asks the registrar, and waits until the answer may go: it may have to be on disk first.
    fn ask(&self, patience: Duration, ask: impl FnOnce(&mut Registrar, Ticket)) -> Option<Answer> {
        if self.stopping.load(Ordering::Acquire) {
            return None;
        }
        let (reply, answer) = bounded(1);
        let mut registrar = self.think();
        ask(&mut registrar, Ticket(0)); // the only one under this lock
        self.carry_out(&mut registrar, Some(&reply));
        drop(registrar);
        self.wake(); // it may have made something due
        answer.recv_timeout(patience).ok().flatten()
    }

    /// The registrar: for as short as possible.
    fn think(&self) -> MutexGuard<'_, Registrar> {
        self.registrar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands on what the registrar wants done, but for datagrams, in its order. `reply` is for who asked
    /// at the desk under this lock.
    fn carry_out(&self, registrar: &mut Registrar, reply: Option<&Sender<Option<Answer>>>) {
        self.news.store(registrar.news(), Ordering::Release);
        while let Some(output) = registrar.poll_output() {
            match output {
                Output::Save(change) => self.queue.push(Write::Change(change)),
                Output::Answer { answer, durable: true, .. } => {
                    let Some(reply) = reply else { continue };
                    self.queue.push(Write::Answer(reply.clone(), Box::new(answer)));
                }
                Output::Answer { answer, .. } => {
                    let _ = reply.map(|reply| reply.try_send(Some(answer)));
                }
                Output::Ignore { .. } => {
                    let _ = reply.map(|reply| reply.try_send(None));
                }
                Output::Send { .. } => debug_assert!(false, "workers take what is to be sent"),
            }
        }
    }

    fn wake(&self) {
        // Writing to an eventfd fails only when its counter is full: then all are awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// After a wait: when the next thing is due, which may be otherwise if this was a wake-up.
    fn woken(&self, due: Option<Moment>) -> Option<Moment> {
        if self.stopping.load(Ordering::Acquire) {
            return due; // the others have to be woken as well
        }
        let mut counter = [0; 8];
        match rustix::io::read(&self.wake, &mut counter) {
            Ok(_) => self.think().next_deadline(),
            Err(_) => due,
        }
    }

    fn status(&self) -> IndexStatus {
        let queue = &self.queue;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IndexStatus {
            stats: self.think().stats(),
            workers: self.tallies.iter().map(Tally::read).collect(),
            journal: JournalStatus {
                trouble: queue.trouble(),
                waiting: queue.waiting(),
                commits: read(&queue.commits),
                rows: read(&queue.rows),
                failures: read(&queue.failures),
            },
            memory: status::memory(),
            uptime: clock::now().since(self.began),
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        self.stop();
    }
}

fn stopped() -> Error {
    Error::new(
        ErrorKind::IndexUnreachable,
        "the index does not answer (it is stopping, or overloaded)",
    )
}

/// Takes datagrams, has them answered, and sends the answers, until the index stops and what had come by
/// then is answered. Opening and sealing, which take most of the time, are done by as many workers as
/// there are side by side; the registrar is locked for the thinking between, once a batch.
fn work(hands: &Hands, tally: &Tally, socket: UdpSocket) {
    let mut datagrams = Datagrams::new(socket);
    let mut gate = hands.think().gate();
    let mut outbox = Outbox::default();
    let mut due = Some(clock::now());
    let mut told = clock::now();
    let mut last_batches = LAST_BATCHES;
    loop {
        let stopping = hands.stopping.load(Ordering::Acquire);
        if gate.news() != hands.news.load(Ordering::Acquire) {
            hands.think().brief(&mut gate);
        }
        let now = clock::now();
        let batch = datagrams.take();
        let opened: Vec<_> =
            batch.filter_map(|(from, bytes)| gate.open(now, from, bytes)).collect();
        let tells = gate.has_dropped() && now.since(told) >= LONGEST_WAIT;
        if !opened.is_empty() || due.is_none_or(|due| due <= now) || tells {
            told = now;
            let mut registrar = hands.think();
            registrar.on_batch(now, &opened);
            registrar.tick(now, clock::wall());
            registrar.brief(&mut gate);
            registrar.take_outbox(&mut outbox);
            hands.carry_out(&mut registrar, None);
            due = registrar.next_deadline();
        }
        drop(opened);
        outbox.seal();
        datagrams.give(&outbox);
        let done = clock::now();
        let taken = datagrams.taken();
        tally.add(taken, (outbox.len(), outbox.bytes()), done.since(now));
        outbox.clear();
        if taken.0 == 0 && stopping {
            break;
        } else if taken.0 == 0 {
            let wait = due.map_or(LONGEST_WAIT, |at| at.since(done)).min(LONGEST_WAIT);
            datagrams.wait(hands.wake.as_fd(), wait);
            due = hands.woken(due);
        } else if stopping {
            last_batches -= 1;
            if last_batches == 0 {
                break;
            }
        }
    }
}

/// A TCP socket and as many UDP sockets as there are workers, on the same address and port.
fn bind(listen: Option<SocketAddr>, workers: usize) -> Result<(TcpListener, Vec<UdpSocket>)> {
    let choices = match listen {
        Some(address) => vec![address],
        None => vec![
            SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), DEFAULT_PORT),
            SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), DEFAULT_PORT),
        ],
    };
    let mut problem = None;
    for address in choices {
        // A free TCP port may be taken on UDP: with port 0 a few tries find one free on both.
        for _ in 0..if address.port() == 0 { 16 } else { 1 } {
            match bind_all(address, workers) {
                Ok(all) => return Ok(all),
                Err(e) => problem = Some((address, e)),
            }
        }
    }
    let Some((address, e)) = problem else { return Err(stopped()) };
    Err(Error::io(format_args!("cannot listen on {address} (UDP and TCP)"), &e)
        .hint("another index may run already; choose another address with --listen ADDR:PORT"))
}

fn bind_all(address: SocketAddr, workers: usize) -> std::io::Result<(TcpListener, Vec<UdpSocket>)> {
    use socket2::{Domain, Protocol, Socket, Type};
    let tcp = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    tcp.set_reuse_address(true)?;
    if address.is_ipv6() {
        tcp.set_only_v6(false)?;
    }
    tcp.bind(&address.into())?;
    tcp.listen(1_024)?;
    let tcp: TcpListener = tcp.into();
    let address = SocketAddr::new(address.ip(), tcp.local_addr()?.port());
    let bind = |_| {
        let udp = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            udp.set_only_v6(false)?;
        }
        // The kernel spreads senders over the sockets; one sender's datagrams keep to one of them.
        udp.set_reuse_port(workers > 1)?;
        udp.set_recv_buffer_size(SOCKET_BUFFER)?;
        udp.set_send_buffer_size(SOCKET_BUFFER)?;
        udp.set_nonblocking(true)?;
        udp.bind(&address.into())?;
        Ok(udp.into())
    };
    let udp = (0..workers).map(bind).collect::<std::io::Result<_>>()?;
    Ok((tcp, udp))
}

/// What invitations name: what was asked for, or the address listened on, or (where that is "any")
/// the one this machine reaches others from.
fn advertised(wanted: Option<&str>, listen: SocketAddr) -> Vec<String> {
    if let Some(wanted) = wanted {
        let has_port = wanted.rsplit_once(':').is_some_and(|(host, port)| {
            port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']'))
        });
        return vec![if has_port { wanted.into() } else { format!("{wanted}:{}", listen.port()) }];
    }
    if !listen.ip().is_unspecified() {
        return vec![listen.to_string()];
    }
    vec![SocketAddr::new(own_address(), listen.port()).to_string()]
}

/// The address this machine would speak to the rest of the world from. Nothing is sent: connecting a
/// UDP socket only looks up the route.
fn own_address() -> std::net::IpAddr {
    use std::net::{IpAddr, Ipv4Addr};
    for (bind, towards) in [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")] {
        let found =
            UdpSocket::bind(bind).and_then(|s| s.connect(towards).and_then(|()| s.local_addr()));
        if let Ok(address) = found
            && !address.ip().is_unspecified()
        {
            return address.ip();
        }
    }
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|e| Error::io("cannot start a thread", &e))
}

/// The terms of an invitation that is good for `uses` machines for `valid`.
pub(crate) fn invite_terms(role: Role, uses: u32, valid: Duration) -> InviteTerms {
    let now: WallTime = clock::wall();
    InviteTerms { role, uses, expires: now.plus(valid) }
}
