//! Owns the index process: the UDP socket and the TLS desk around a `Registrar`, and the database in
//! which its memory survives. Never decides who may do what (the registrar does).
//!
//! Three kinds of thread: one thinks (it owns the registrar and the UDP socket), one writes (it
//! commits changes in groups and only then lets answers that depend on them go), and a few serve the
//! desk, each for one short TLS conversation.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use potluck_core::id::{NetworkId, ParseError};
use potluck_core::registrar::{
    Boot, Caller, Change, Output, Registrar, Settings as Terms, Stats, Table, Ticket,
};
use potluck_core::time::WallTime;
use potluck_core::trust::{Invitation, MachineKey, Role};
use potluck_core::wire::datagram::MAX_DATAGRAM;
use potluck_core::wire::desk::{Answer, Ask, DeskCode, DeskRefusal, InviteTerms, Member, Removal};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tracing::{error, info, warn};

use crate::clock;
use crate::control::{Event, Request};
use crate::daemon::{self, Role as Half};
use crate::desk;
use crate::door::timespec;
use crate::error::{Error, ErrorKind, Result};
use crate::peer::members::{invited_event, members_event, pick_member, removal};
use crate::state::{Hold, StateDir, hold};

/// The port an index listens on unless told otherwise, UDP and TCP.
pub const DEFAULT_PORT: u16 = 7700;
/// Machines that may join by the first invitation.
pub(crate) const FIRST_USES: u32 = 50;
/// How long the first invitation holds.
pub(crate) const FIRST_VALID: Duration = Duration::from_secs(24 * 3600);
/// Datagrams taken from the socket before outputs are looked at.
const BATCH: usize = 64;
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
    threads: Vec<JoinHandle<()>>,
    desk: Option<desk::Desk>,
    control: Option<daemon::Server>,
}

/// What every thread of an index shares.
struct Hands {
    network: NetworkId,
    listen: SocketAddr,
    advertise: Vec<String>,
    orders: Sender<Order>,
    wake: OwnedFd,
}

/// What the thinking thread is asked by others.
enum Order {
    Desk { caller: Caller, ask: Ask, reply: Sender<Option<Answer>> },
    Operator { ask: Ask, reply: Sender<Option<Answer>> },
    Stats { reply: Sender<Stats> },
    Stop,
}

/// What the writing thread does, in order.
enum Write {
    Change(Change),
    /// Let this answer go once everything before it is on disk.
    Answer(Sender<Option<Answer>>, Box<Answer>),
}

impl Index {
    /// Opens the state folder, listens, and serves until [`Index::stop`] or drop.
    pub fn open(settings: &IndexSettings) -> Result<Self> {
        let dir = StateDir::open(&settings.state, "index")?;
        let lock = hold(dir.path())?;
        let key = dir.key()?;
        let network = key.network();
        let database = open_database(&dir)?;
        let saved = load(&database)?;
        let (tcp, udp) = bind(settings.listen)?;
        let listen = tcp.local_addr().map_err(|e| Error::io("cannot listen", &e))?;
        let advertise = advertised(settings.advertise.as_deref(), listen);

        let boot = Boot {
            id: u64::from_be_bytes(clock::random()),
            cookie_key: clock::random(),
            secret_seed: clock::random(),
            dice: u64::from_be_bytes(clock::random()),
        };
        let terms = Terms { heartbeat_s: settings.heartbeat_s.max(1), ..Terms::default() };
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

        let (orders, inbox) = bounded(1_024);
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| Error::io("cannot start the index", &e.into()))?;
        let hands = Arc::new(Hands { network, listen, advertise, orders, wake });

        let (writes, to_write) = unbounded();
        let mut threads =
            vec![spawn("index-disk", move || write_all(&database, lock, dir.path(), &to_write))?];
        let thinker = Thinker {
            registrar,
            udp,
            inbox,
            hands: hands.clone(),
            writes,
            waiting: BTreeMap::new(),
            next_ticket: 0,
        };
        threads.push(spawn("index", move || thinker.run())?);
        let at_desk = hands.clone();
        let desk = desk::serve(tcp, own_key, move |caller, ask| {
            let (reply, answer) = bounded(1);
            at_desk.order(Order::Desk { caller, ask, reply });
            answer.recv_timeout(DESK_PATIENCE).ok().flatten()
        })?;
        info!(%listen, %network, "index serves");
        let (stop, stopping) = bounded(1);
        let running = Running { threads, desk: Some(desk), control: None };
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
    pub fn stats(&self) -> Result<Stats> {
        let (reply, stats) = bounded(1);
        self.hands.order(Order::Stats { reply });
        stats.recv_timeout(DESK_PATIENCE).map_err(|_| stopped())
    }

    /// Stops serving and writes what is still to be written.
    pub fn stop(&self) {
        let running = std::mem::take(&mut *self.running());
        drop((running.desk, running.control));
        if running.threads.is_empty() {
            return;
        }
        self.hands.order(Order::Stop);
        let _ = self.stop.try_send(());
        for thread in running.threads.into_iter().rev() {
            if thread.join().is_err() {
                error!("a thread of the index ended by a panic");
            }
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
        let (reply, answer) = bounded(1);
        self.order(Order::Operator { ask, reply });
        match answer.recv_timeout(DESK_PATIENCE * 3) {
            Ok(Some(Answer::Refused(refusal))) => Err(desk::refused(&refusal)),
            Ok(Some(answer)) => Ok(answer),
            _ => Err(stopped()),
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

impl Hands {
    /// Puts an order in and wakes the thinking thread. An order that finds no room is dropped: its
    /// asker's patience ends by itself.
    fn order(&self, order: Order) {
        if self.orders.send_timeout(order, DESK_PATIENCE).is_ok() {
            // An eventfd write fails only when the counter is full: then the thread is awake anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// The thread that owns the registrar.
struct Thinker {
    registrar: Registrar,
    udp: UdpSocket,
    inbox: Receiver<Order>,
    hands: Arc<Hands>,
    writes: Sender<Write>,
    /// Who waits at the desk for which ticket.
    waiting: BTreeMap<u64, Sender<Option<Answer>>>,
    next_ticket: u64,
}

impl Thinker {
    fn run(mut self) {
        let mut buffer = [0; MAX_DATAGRAM + 1];
        loop {
            if !self.take_orders() {
                return;
            }
            for _ in 0..BATCH {
                match self.udp.recv_from(&mut buffer) {
                    Ok((len, from)) => {
                        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
                        self.registrar.on_datagram(
                            clock::now(),
                            clock::wall(),
                            from,
                            &mut buffer[..len],
                        );
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                    // What the kernel reports here are echoes of datagrams sent: nothing to act on.
                    Err(_) => continue,
                }
            }
            self.registrar.tick(clock::now(), clock::wall());
            self.act();
            self.sleep();
        }
    }

    fn take_orders(&mut self) -> bool {
        while let Ok(order) = self.inbox.try_recv() {
            match order {
                Order::Desk { caller, ask, reply } => {
                    let ticket = self.ticket(reply);
                    self.registrar.on_ask(clock::now(), clock::wall(), caller, ask, ticket);
                }
                Order::Operator { ask, reply } => {
                    let ticket = self.ticket(reply);
                    self.registrar.on_operator(clock::now(), clock::wall(), ask, ticket);
                }
                Order::Stats { reply } => {
                    let _ = reply.try_send(self.registrar.stats());
                }
                Order::Stop => {
                    self.act();
                    return false;
                }
            }
        }
        true
    }

    fn ticket(&mut self, reply: Sender<Option<Answer>>) -> Ticket {
        self.next_ticket += 1;
        self.waiting.insert(self.next_ticket, reply);
        Ticket(self.next_ticket)
    }

    fn act(&mut self) {
        while let Some(output) = self.registrar.poll_output() {
            match output {
                Output::Send { to, datagram } => {
                    let to = for_socket(to, &self.udp);
                    if let Err(e) = self.udp.send_to(&datagram, to)
                        && e.kind() != std::io::ErrorKind::WouldBlock
                    {
                        tracing::debug!(%to, error = %e, "a datagram was not sent");
                    }
                }
                Output::Save(change) => drop(self.writes.send(Write::Change(change))),
                Output::Answer { ticket, answer, durable } => {
                    let Some(reply) = self.waiting.remove(&ticket.0) else { continue };
                    if durable {
                        drop(self.writes.send(Write::Answer(reply, Box::new(answer))));
                    } else {
                        let _ = reply.try_send(Some(answer));
                    }
                }
                Output::Ignore { ticket } => {
                    if let Some(reply) = self.waiting.remove(&ticket.0) {
                        let _ = reply.try_send(None);
                    }
                }
            }
        }
    }

    fn sleep(&self) {
        let wait = self
            .registrar
            .next_deadline()
            .map_or(Duration::from_secs(1), |at| at.since(clock::now()))
            .min(Duration::from_secs(1));
        let timeout = timespec(wait);
        let mut fds = [
            PollFd::new(&self.udp, PollFlags::IN),
            PollFd::from_borrowed_fd(self.hands.wake.as_fd(), PollFlags::IN),
        ];
        let _ = poll(&mut fds, Some(&timeout));
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.hands.wake, &mut counter);
    }
}

/// An IPv4 address as an IPv6 socket wants it.
fn for_socket(to: SocketAddr, socket: &UdpSocket) -> SocketAddr {
    match (to, socket.local_addr()) {
        (SocketAddr::V4(v4), Ok(SocketAddr::V6(_))) => {
            SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port())
        }
        _ => to,
    }
}

/// The thread that owns the database: commits what has gathered, then lets the answers go.
fn write_all(database: &Database, _lock: Hold, folder: &Path, writes: &Receiver<Write>) {
    let mut healthy = true;
    while let Ok(first) = writes.recv() {
        let mut changes = Vec::new();
        let mut answers = Vec::new();
        for write in std::iter::once(first).chain(writes.try_iter()) {
            match write {
                Write::Change(change) => changes.push(change),
                Write::Answer(reply, answer) => answers.push((reply, answer)),
            }
        }
        let result =
            if changes.is_empty() && healthy { Ok(()) } else { commit(database, &changes) };
        match &result {
            Ok(()) if !healthy => info!("the index's database takes changes again"),
            Err(e) if healthy => {
                error!(error = %e, folder = %folder.display(), "the index cannot save its state: it goes on from memory; what changes now is lost at a restart");
            }
            _ => {}
        }
        healthy = result.is_ok();
        for (reply, answer) in answers {
            let answer = if healthy { *answer } else { not_durable() };
            let _ = reply.try_send(Some(answer));
        }
    }
}

fn not_durable() -> Answer {
    Answer::Refused(DeskRefusal {
        code: DeskCode::NotDurable,
        text: "the index cannot write its state (is its disk full?); nothing was promised".into(),
    })
}

/// One redb table for each of the registrar's, keys and values as it encodes them.
fn table(of: Table) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
    TableDefinition::new(of.name())
}

fn commit(database: &Database, changes: &[Change]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for change in changes {
        let mut table = transaction.open_table(table(change.table))?;
        match &change.value {
            Some(value) => drop(table.insert(&*change.key, &**value)?),
            None => drop(table.remove(&*change.key)?),
        }
    }
    Ok(transaction.commit()?)
}

/// A row of the database: its table, key and value.
type SavedRow = (Table, Vec<u8>, Vec<u8>);

fn load(database: &Database) -> Result<Vec<SavedRow>> {
    let mut saved = Vec::new();
    let mut read = || -> Result<(), redb::Error> {
        let transaction = database.begin_read()?;
        for of in Table::ALL {
            match transaction.open_table(table(of)) {
                Ok(rows) => {
                    for row in rows.iter()? {
                        let (key, value) = row?;
                        saved.push((of, key.value().to_vec(), value.value().to_vec()));
                    }
                }
                Err(redb::TableError::TableDoesNotExist(_)) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    };
    read().map_err(|e| {
        Error::new(ErrorKind::Integrity, format!("cannot read the index's database: {e}"))
    })?;
    Ok(saved)
}

fn open_database(dir: &StateDir) -> Result<Database> {
    let path = dir.path().join("index.redb");
    match Database::create(&path) {
        Ok(database) => Ok(database),
        Err(redb::DatabaseError::Storage(redb::StorageError::Io(e)))
            if e.kind() != std::io::ErrorKind::InvalidData =>
        {
            Err(Error::io(format_args!("cannot open {}", path.display()), &e))
        }
        Err(e) => {
            // The members know almost all of it and register it again: begin anew, keep the old file.
            let aside = path.with_extension("redb.damaged");
            warn!(error = %e, kept = %aside.display(), "the index's database is damaged: beginning a new one");
            std::fs::rename(&path, &aside)
                .map_err(|e| Error::io(format_args!("cannot move {} aside", path.display()), &e))?;
            Database::create(&path).map_err(|e| {
                Error::new(ErrorKind::Other, format!("cannot make {}: {e}", path.display()))
            })
        }
    }
}

/// TCP and UDP sockets on the same address and port.
fn bind(listen: Option<SocketAddr>) -> Result<(TcpListener, UdpSocket)> {
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
            match bind_both(address) {
                Ok(pair) => return Ok(pair),
                Err(e) => problem = Some((address, e)),
            }
        }
    }
    let Some((address, e)) = problem else { return Err(stopped()) };
    Err(Error::io(format_args!("cannot listen on {address} (UDP and TCP)"), &e)
        .hint("another index may run already; choose another address with --listen ADDR:PORT"))
}

fn bind_both(address: SocketAddr) -> std::io::Result<(TcpListener, UdpSocket)> {
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
    let udp = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        udp.set_only_v6(false)?;
    }
    udp.set_recv_buffer_size(SOCKET_BUFFER)?;
    udp.set_send_buffer_size(SOCKET_BUFFER)?;
    udp.set_nonblocking(true)?;
    udp.bind(&address.into())?;
    Ok((tcp, udp.into()))
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
