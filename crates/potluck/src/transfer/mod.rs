//! Owns connections to other peers: one TCP connection, one thread, which owns its socket, its TLS
//! state and the way of piece bytes between socket and disk. Never decides what to fetch or serve:
//! it is told ([`Command`]) and it tells ([`Event`]).
//!
//! | file | owns |
//! |---|---|
//! | `connection` | the thread: waiting, deadlines, who may come up |
//! | `session` | channels, and what may be said on them by whom and when |
//! | `outbox` | what is said next, in an order that lets small things pass between large ones |
//! | `gather` | a stream of bytes → frames and whole pieces |
//! | `incoming` | bytes that came in, where they lie until they are of use |
//! | `secure` | TLS ↔ socket, in few large steps |
//! | `records` | how a record is sealed and opened |
//! | `unsent` | how much a socket takes beyond what is on its way |
//! | `limiter` | the limits all connections keep to together, and whose turn it is |

mod connection;
mod gather;
mod incoming;
mod limiter;
mod outbox;
mod records;
mod secure;
mod session;
mod unsent;

#[cfg(test)]
mod exchange;
#[cfg(test)]
pub(crate) mod puppet;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crossbeam_channel::Sender;
use potluck_core::bitfield::Bitfield;
use potluck_core::fault::Fault;
use potluck_core::id::{ContentId, NetworkId, PeerId, Piece};
use potluck_core::limit::Limit;
use potluck_core::time::WallTime;
use potluck_core::trust::{Certificate, Distrust, MachineKey};
use potluck_core::wire::stream::{Channel, Goodbye};
use rustix::event::{EventfdFlags, eventfd};
use rustls::ServerConfig;

use crate::door::{self, Door};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Put, PutError, ReadError, Replica};
use crate::tls;
use limiter::Limiter;

/// Callers that have not shown a certificate yet; for one more, the oldest is sent away.
const MAX_HALF_OPEN: usize = 256;
/// Established connections, dialled and accepted; a caller beyond is told `Bye(Full)`.
const MAX_ESTABLISHED: usize = 512;

/// A connection, numbered by [`Context::number`]; a number is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ConnId(pub(crate) u32);

/// Who this machine is in its network, and whom the network has removed.
pub(crate) struct Identity {
    /// The network.
    pub(crate) network: NetworkId,
    /// This machine's certificate: shown to everyone it speaks with.
    pub(crate) certificate: Certificate,
    /// Machines that are members no longer.
    pub(crate) revoked: BTreeSet<PeerId>,
}

impl Identity {
    /// Whether `certificate` makes the holder of `peer` a member of the network now.
    pub(crate) fn believe(
        &self,
        certificate: &Certificate,
        peer: PeerId,
        now: WallTime,
    ) -> Result<(), Distrust> {
        if self.revoked.contains(&peer) {
            return Err(Distrust::Revoked);
        }
        certificate.check(self.network, peer, now)
    }
}

/// The identity all connections look at; `None`: no network joined, nobody is let in. Whoever swaps
/// it tells every connection [`Command::Recheck`].
pub(crate) type SharedIdentity = Arc<RwLock<Option<Arc<Identity>>>>;

/// What all connections of a peer share.
pub(crate) struct Context {
    key: Arc<MachineKey>,
    identity: SharedIdentity,
    events: Sender<(ConnId, Event)>,
    callers: Arc<ServerConfig>,
    /// The TCP port this machine serves on; 0 before it listens.
    port: AtomicU16,
    numbers: AtomicU32,
    established: AtomicUsize,
    up: Arc<Limiter>,
    down: Arc<Limiter>,
}

impl Context {
    /// Connections under `key`, which report to `events` (bounded: when it is full, connections
    /// wait, and so do the machines they speak with).
    ///
    /// # Errors
    /// The cryptography library refuses its own algorithms.
    pub(crate) fn new(
        key: Arc<MachineKey>,
        identity: SharedIdentity,
        events: Sender<(ConnId, Event)>,
    ) -> Result<Self> {
        let callers = tls::server(&key, tls::PEERS).map_err(|e| no_tls(&e))?;
        Ok(Self {
            key,
            identity,
            events,
            callers: Arc::new(callers),
            port: AtomicU16::new(0),
            numbers: AtomicU32::new(0),
            established: AtomicUsize::new(0),
            up: Arc::default(),
            down: Arc::default(),
        })
    }

    /// A number for a connection about to be dialled.
    pub(crate) fn number(&self) -> ConnId {
        ConnId(self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    /// What all connections together keep to from now on: what they send, and what they receive.
    /// Counted is what the sockets take and give, TLS and all. Whoever sets them tells every
    /// connection [`Command::Relimit`].
    pub(crate) fn set_limits(&self, up: Limit, down: Limit) {
        self.up.set(up);
        self.down.set(down);
    }

    /// The limits: of what is sent, and of what is received.
    pub(crate) fn limits(&self) -> (Limit, Limit) {
        (self.up.limit(), self.down.limit())
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn no_tls(error: &rustls::Error) -> Error {
    Error::new(ErrorKind::Other, format!("TLS cannot be set up: {error}"))
}

/// A listening socket for other peers; dropping it ends listening, not the connections made.
pub(crate) struct Listener {
    _door: Door,
}

/// Lets other peers call at `listener`. A caller is told of by [`Event::Up`] once it has shown that
/// it is a member; strangers and failed callers are told of to nobody.
///
/// # Errors
/// The system gives no thread or descriptor.
#[expect(clippy::needless_pass_by_value, reason = "the shape all users were promised")]
pub(crate) fn listen(ctx: Arc<Context>, listener: TcpListener) -> Result<Listener> {
    let here = listener.local_addr().map_err(|e| Error::io("cannot listen", &e))?;
    ctx.port.store(here.port(), Ordering::Relaxed);
    let ctx = Arc::clone(&ctx);
    let door = Door::open(listener, MAX_HALF_OPEN, "potluck peer", move |socket, from, pass| {
        connection::accepted(&ctx, socket, from, pass);
    })?;
    Ok(Listener { _door: door })
}

/// Dials `to`, where the holder of `expect` is to answer. Returns at once; [`Event::Up`] or
/// [`Event::Gone`] follows.
///
/// # Errors
/// The system gives no thread or descriptor; no event follows.
pub(crate) fn dial(
    ctx: &Arc<Context>,
    conn: ConnId,
    to: SocketAddr,
    expect: PeerId,
) -> Result<Connection> {
    let (mailbox, connection) = Connection::new()?;
    let (ctx, owner) = (Arc::clone(ctx), Arc::downgrade(&connection.0));
    std::thread::Builder::new()
        .name("potluck peer".to_owned())
        .stack_size(door::STACK)
        .spawn(move || connection::dialled(&ctx, conn, to, expect, &mailbox, &owner))
        .map_err(|e| Error::new(ErrorKind::Other, format!("cannot start a thread: {e}")))?;
    Ok(connection)
}

/// The handle of a connection. When its last clone is dropped, the connection ends.
#[derive(Clone)]
pub(crate) struct Connection(Arc<Handle>);

struct Handle(Arc<Mailbox>);

impl Connection {
    fn new() -> Result<(Arc<Mailbox>, Self)> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("cannot make a connection", &e.into()))?;
        let mailbox = Arc::new(Mailbox {
            letters: Mutex::default(),
            bell,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        });
        Ok((Arc::clone(&mailbox), Self(Arc::new(Handle(mailbox)))))
    }

    /// Tells the connection to do something; never waits. What is told before [`Event::Up`] is done
    /// after it; what is told after the end is forgotten.
    pub(crate) fn tell(&self, command: Command) {
        self.0.0.put(Letter::Command(command));
    }

    /// Bytes of pieces handed to the kernel so far.
    pub(crate) fn sent(&self) -> u64 {
        self.0.0.sent.load(Ordering::Relaxed)
    }

    /// Bytes of pieces received so far, good or bad.
    pub(crate) fn received(&self) -> u64 {
        self.0.0.received.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} sent, {} received)", self.sent(), self.received())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.put(Letter::Abandoned);
    }
}

/// How a connection's thread is reached, and what it counts.
struct Mailbox {
    letters: Mutex<Letters>,
    /// An eventfd: rung only where the thread may be asleep, which saves most of the system calls.
    bell: OwnedFd,
    sent: AtomicU64,
    received: AtomicU64,
}

#[derive(Default)]
struct Letters {
    waiting: VecDeque<Letter>,
    asleep: bool,
    /// Nobody will read any more.
    closed: bool,
}

enum Letter {
    Command(Command),
    /// Nobody holds a handle any more.
    Abandoned,
}

impl Mailbox {
    fn letters(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, letter: Letter) {
        let mut letters = self.letters();
        if letters.closed {
            return;
        }
        letters.waiting.push_back(letter);
        if std::mem::take(&mut letters.asleep) {
            door::ring(&self.bell);
        }
    }

    /// Takes all letters into `into` (empty before).
    fn take(&self, into: &mut VecDeque<Letter>) {
        std::mem::swap(&mut self.letters().waiting, into);
    }

    /// Takes nothing more.
    fn close(&self) {
        let mut letters = self.letters();
        letters.closed = true;
        letters.waiting.clear();
    }

    /// Marks the thread as asleep; false where there is mail and it must not sleep.
    fn fall_asleep(&self) -> bool {
        let mut letters = self.letters();
        letters.asleep = letters.waiting.is_empty();
        letters.asleep
    }

    /// The thread is awake again; the bell is silenced where it rang.
    fn wake_up(&self, rang: bool) {
        self.letters().asleep = false;
        if rang {
            let _ = rustix::io::read(&self.bell, &mut [0u8; 8]);
        }
    }
}

/// What a connection is told. Channels given as a number: which side opened it follows from the
/// command. A command about a channel that is not open is ignored.
#[derive(Debug)]
pub(crate) enum Command {
    /// Open `id` on our channel `channel` (a number of ours that is free). → `Opened` or `Closed`
    Open {
        /// Ours.
        channel: u16,
        /// What we want to fetch.
        id: ContentId,
    },
    /// Ask for manifest and proof, once, after `Opened`. → `Meta`
    WantMeta {
        /// Ours.
        channel: u16,
    },
    /// Pieces that arrive on our channel go there. Before any `Want`.
    Attach {
        /// Ours.
        channel: u16,
        /// Where they go.
        replica: Arc<Replica>,
    },
    /// Ask for pieces. → a `PieceIn` each, or `Busy`
    Want {
        /// Ours.
        channel: u16,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// No longer wanted; some may arrive all the same, and are reported.
    Cancel {
        /// Ours.
        channel: u16,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// Yes to `WantsOpen`: says Opened, and sends the metadata when it is asked for. Says nothing of
    /// what the replica holds: a seed does not show that; others are told `Have` next.
    Admit {
        /// Theirs.
        channel: u16,
        /// What is served from.
        replica: Arc<Replica>,
    },
    /// No to `WantsOpen`. → `Closed`
    Refuse {
        /// Theirs.
        channel: u16,
    },
    /// Send a wanted piece, after those told before. → `Sent`, `Unsent` or `Unreadable`
    Serve {
        /// Theirs.
        channel: u16,
        /// Which.
        piece: Piece,
    },
    /// Not now; ask again after so long or ask others.
    Busy {
        /// Theirs.
        channel: u16,
        /// Which.
        pieces: Vec<Piece>,
        /// Milliseconds.
        wait_ms: u32,
    },
    /// Take these of us.
    Grant {
        /// Theirs.
        channel: u16,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// Further hosts of the content.
    Hosts {
        /// Theirs.
        channel: u16,
        /// Their keys and serving addresses.
        hosts: Vec<(PeerId, SocketAddr)>,
    },
    /// What we hold now, all of it.
    Have {
        /// Either's.
        channel: Channel,
        /// Which.
        bitfield: Bitfield,
    },
    /// What we hold since.
    HaveMore {
        /// Either's.
        channel: Channel,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// What we hold no longer.
    Lost {
        /// Either's.
        channel: Channel,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// The channel is over. → `Closed`, when the other side has agreed
    Close {
        /// Either's.
        channel: Channel,
    },
    /// End the connection, saying why. → `Gone`
    Bye(Goodbye, String),
    /// The shared identity changed: is the other still a member, and does it know our certificate?
    Recheck,
    /// The limits changed: whoever waits for a turn looks again.
    Relimit,
}

/// What a connection reports.
#[derive(Debug)]
pub(crate) enum Event {
    /// The other side has shown that it is a member. First event of a connection.
    Up {
        /// Its key.
        peer: PeerId,
        /// Its certificate, believed.
        certificate: Certificate,
        /// The other end of the socket.
        address: SocketAddr,
        /// The TCP port it serves on; 0 where it does not.
        port: u16,
        /// We dialled.
        dialled: bool,
        /// The handle; keep it, or the connection ends.
        connection: Connection,
    },
    /// Our channel: the host has (some of) it.
    Opened {
        /// Ours.
        channel: u16,
        /// Bytes, all files together.
        size: u64,
        /// Length of the manifest.
        manifest: u32,
        /// Length of the proof.
        proof: u32,
    },
    /// Our channel: the metadata asked for, unverified.
    Meta {
        /// Ours.
        channel: u16,
        /// Empty for a file.
        manifest: Vec<u8>,
        /// Wire form.
        proof: Vec<u8>,
    },
    /// Our channel: not these now.
    Busy {
        /// Ours.
        channel: u16,
        /// Those of them that were asked for.
        pieces: Vec<Piece>,
        /// Milliseconds to wait before asking this host again.
        wait_ms: u32,
    },
    /// Our channel: the seed offers these.
    Granted {
        /// Ours.
        channel: u16,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// Our channel: further hosts.
    Hosts {
        /// Ours.
        channel: u16,
        /// Their keys and serving addresses.
        hosts: Vec<(PeerId, SocketAddr)>,
    },
    /// Our channel: a piece arrived, and this became of it. (`BadPiece`: the other was told so.)
    PieceIn {
        /// Ours.
        channel: u16,
        /// Which.
        piece: Piece,
        /// Its length.
        bytes: u32,
        /// Verified and written, or not.
        put: Result<Put, PutError>,
    },
    /// We have something open, and the other side said something: told once a second at the most.
    Alive {
        /// It stands amid a frame: a piece that is long in coming, or metadata.
        coming: bool,
    },
    /// The other side wants to fetch from us: to be answered by `Admit` or `Refuse`.
    WantsOpen {
        /// Theirs.
        channel: u16,
        /// What.
        id: ContentId,
    },
    /// Their channel: wants these pieces.
    Wants {
        /// Theirs.
        channel: u16,
        /// Which; not those it wants already.
        pieces: Vec<Piece>,
    },
    /// Their channel: wants these no longer (or leaves what it was granted). What was told
    /// `Serve` is still answered.
    Cancelled {
        /// Theirs.
        channel: u16,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// Their channel: says that a piece we sent does not match its proof.
    Rejected {
        /// Theirs.
        channel: u16,
        /// Which.
        piece: Piece,
    },
    /// Their channel: a `Serve` is done: its last byte was handed to the kernel.
    Sent {
        /// Theirs.
        channel: u16,
        /// Which.
        piece: Piece,
        /// Its length.
        bytes: u32,
    },
    /// Their channel: a `Serve` is done: not sent, because it is wanted no longer.
    Unsent {
        /// Theirs.
        channel: u16,
        /// Which.
        piece: Piece,
    },
    /// Their channel: a `Serve` is done: not sent, because the piece could not be read.
    Unreadable {
        /// Theirs.
        channel: u16,
        /// Which.
        piece: Piece,
        /// Why.
        error: ReadError,
    },
    /// What the other side holds, all of it.
    Have {
        /// Either's.
        channel: Channel,
        /// Which; as long as the content has pieces where a replica is attached or admitted,
        /// otherwise of any length.
        bitfield: Bitfield,
    },
    /// What the other side holds since.
    HaveMore {
        /// Either's.
        channel: Channel,
        /// Which; all exist where a replica is attached or admitted.
        pieces: Vec<Piece>,
    },
    /// What the other side holds no longer.
    Lost {
        /// Either's.
        channel: Channel,
        /// Which.
        pieces: Vec<Piece>,
    },
    /// A channel is over, whoever closed it: its last event; the number is free again.
    Closed {
        /// Either's.
        channel: Channel,
    },
    /// The connection is over: its last event, also when dialling failed.
    Gone {
        /// Why.
        why: Gone,
    },
}

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Gone {
    /// Nobody answers there.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// Who answers there holds another key than the one dialled.
    #[error("another machine answers there")]
    OtherMachine,
    /// TLS failed otherwise.
    #[error("no secure connection: {0}")]
    Insecure(String),
    /// The other side showed no certificate that can be believed, or is a member no longer.
    #[error("it is no member of this network: {0}")]
    NotMember(Distrust),
    /// This machine is in no network (any more).
    #[error("this machine is in no network")]
    NotJoined,
    /// The other side said goodbye.
    #[error("it said goodbye: {1}")]
    Said(Goodbye, String),
    /// This machine has as many connections as it may.
    #[error("too many connections")]
    Full,
    /// We were told to say goodbye, or nobody held the connection any more.
    #[error("it was ended from here")]
    Ended,
    /// The other side broke a rule.
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
    /// Nothing moved for too long.
    #[error("timed out: {0}")]
    TimedOut(&'static str),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Lost(String),
}

impl Gone {
    /// Whose fault it is, and so whether dialling again is worth it.
    pub(crate) const fn fault(&self) -> Fault {
        match self {
            // Bits that flip on the way break TLS as well, so that alone is held against nobody.
            Self::Unreachable(_) | Self::Insecure(_) | Self::TimedOut(_) | Self::Lost(_) => {
                Fault::Weather
            }
            Self::NotJoined | Self::Full | Self::Ended => Fault::Ours,
            Self::OtherMachine | Self::NotMember(_) | Self::Protocol(_) => Fault::Theirs,
            Self::Said(goodbye, _) => match goodbye {
                Goodbye::Done | Goodbye::Leaving | Goodbye::Full | Goodbye::TimedOut => {
                    Fault::Weather
                }
                Goodbye::Protocol | Goodbye::NotMember | Goodbye::BadPiece => Fault::Ours,
            },
        }
    }
}
