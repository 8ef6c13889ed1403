//! Owns a peer: the process half that shares, fetches and serves. This file is its outside: settings,
//! start, requests, stop. The inside is one thread (`engine`) that owns all thinking; it is fed by
//! two bounded queues and never waits for a disk, a socket or a person.

mod engine;
mod fetch;
mod hosting;
mod listing;
pub(crate) mod members;
mod neighbours;
mod network;
mod notes;
mod requests;
mod stats;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use potluck_core::id::PeerId;
use potluck_core::limit::Limit;
use tracing::{error, warn};

use crate::clock;
use crate::control::{Event, Request};
use crate::daemon::{self, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::index::spawn;
use crate::seldom::Seldom;
use crate::signals::stop_on_signals;
use crate::state::StateDir;
use crate::store::Store;
use crate::transfer;
use engine::{Engine, Input};

/// The TCP port a peer serves on unless told otherwise; where it is taken, any free one.
pub const DEFAULT_PORT: u16 = 7701;
/// Requests and results waiting for the engine.
const INBOX: usize = 1_024;
/// Events of connections waiting for the engine; a connection waits when it is full.
const EVENTS: usize = 4_096;
/// Events waiting for whoever asked; one that reads nothing for so long is taken for gone.
const REPLIES: usize = 1_024;
/// Progress is told of at once, and then no more often than this: nobody reads faster.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// How often it is looked whether whoever asked is still there.
const GONE_EVERY: Duration = Duration::from_millis(200);
/// How long a stopping engine may take to say goodbye to the index and its peers.
const FAREWELL: Duration = Duration::from_secs(2);

/// How to run a peer.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The state folder; the peer keeps to `peer/` in it.
    pub state: PathBuf,
    /// TCP address to serve on; `None`: port 7701, or any free one, on all addresses.
    pub listen: Option<SocketAddr>,
    /// What this machine is called; shown to other members.
    pub label: String,
    /// Where this machine founds a network: what invitations name as its address.
    pub advertise: Option<String>,
    /// How fast it may send, over all transfers; `None`: as was last set to stay, or unlimited.
    pub limit_up: Option<Limit>,
    /// How fast it may receive, likewise.
    pub limit_down: Option<Limit>,
}

impl Settings {
    /// The defaults, with this state folder and the host's name as label.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        let label = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let (limit_up, limit_down) = (None, None);
        Self { state: state.into(), listen: None, label, advertise: None, limit_up, limit_down }
    }
}

/// A running peer. Stops when dropped.
pub struct Peer {
    hands: Hands,
    engine: Mutex<Option<JoinHandle<()>>>,
    stopping: Receiver<()>,
    control: Mutex<Option<daemon::Server>>,
    state: PathBuf,
}

/// What is needed to ask the engine something; cheap to clone.
#[derive(Clone)]
struct Hands {
    inbox: Sender<Input>,
    stop: Sender<()>,
    peer: PeerId,
    listen: SocketAddr,
}

/// Where the answers to a request go.
#[derive(Clone, Debug)]
pub(crate) struct Replies {
    events: Sender<Event>,
    /// Alive as long as somebody reads.
    reader: Weak<()>,
    progress: Arc<Seldom>,
}

impl Replies {
    /// Sends one; false when nobody listens any more. Progress is left out where it was told of just
    /// now or the reader is behind: a result is not to wait until that was read.
    pub(crate) fn send(&self, event: Event) -> bool {
        if event.is_progress()
            && (!self.events.is_empty() || self.progress.now(clock::now()).is_none())
        {
            return !self.is_gone();
        }
        self.events.try_send(event).is_ok()
    }

    /// Sends one, whoever listens.
    pub(crate) fn tell(&self, event: Event) {
        self.send(event);
    }

    /// Sends the failure that ends a request.
    pub(crate) fn fail(&self, error: &Error) {
        self.send(Event::failed(error));
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.reader.strong_count() == 0
    }
}

impl Peer {
    /// Opens the state folder, listens, and serves until [`Peer::stop`] or drop: what was shared
    /// before is shared again, what was being fetched goes on.
    pub fn open(settings: Settings) -> Result<Self> {
        // The store locks the folder: from here on no other process uses it.
        let (store, replicas) = Store::open(&settings.state)?;
        let key = Arc::new(StateDir::open(&settings.state, "peer")?.key()?);
        let peer = key.peer();
        let listener = listen(settings.listen)?;
        let address = listener.local_addr().map_err(|e| Error::io("cannot listen", &e))?;
        let state = settings.state.clone();

        let (inbox, inputs) = bounded(INBOX);
        let (events, from_connections) = bounded(EVENTS);
        let identity = transfer::SharedIdentity::default();
        let context = Arc::new(transfer::Context::new(key.clone(), identity.clone(), events)?);
        let acceptor = transfer::listen(context.clone(), listener)?;
        let (stop, stopping) = bounded(1);
        let hands = Hands { inbox: inbox.clone(), stop, peer, listen: address };
        let mut engine =
            Engine::new(settings, key, store, identity, context, acceptor, inbox, address);
        engine.begin(replicas);
        let stop = hands.stop.clone();
        let thread = spawn("peer", move || {
            engine.run(&inputs, &from_connections);
            let _ = stop.try_send(());
        })?;
        let (engine, control) = (Mutex::new(Some(thread)), Mutex::new(None));
        Ok(Self { hands, engine, stopping, control, state })
    }

    /// This machine's id.
    pub fn id(&self) -> PeerId {
        self.hands.peer
    }

    /// Where it serves.
    pub fn listen(&self) -> SocketAddr {
        self.hands.listen
    }

    /// Runs one request; `emit` gets its events and returns false when nobody wants more of them
    /// (a fetch that nobody waits for any more is paused).
    pub fn handle(&self, request: Request, emit: &mut dyn FnMut(Event) -> bool) {
        self.hands.handle(request, emit, &|| false);
    }

    /// Takes requests over the control socket of the state folder from now on.
    ///
    /// # Errors
    /// Another peer serves this folder, or the socket cannot be made.
    pub fn serve_control(&self) -> Result<()> {
        let hands = self.hands.clone();
        let path = daemon::socket_path(&self.state, Role::Peer);
        let server = daemon::serve(
            &path,
            Arc::new(move |request, replies: daemon::Replies| {
                hands.handle(request, &mut |event| replies.send(&event), &|| replies.gone());
            }),
        )?;
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(())
    }

    /// A way to ask this peer from another thread.
    pub(crate) fn asker(&self) -> Asker {
        Asker(self.hands.clone())
    }

    /// The event that says that this peer serves.
    pub fn ready(&self) -> Event {
        let mut network = None;
        self.handle(Request::Status, &mut |event| {
            if let Event::Status(status) = event {
                network = status.network;
            }
            true
        });
        Event::Ready {
            listen: self.hands.listen.to_string(),
            invite: None,
            network,
            peer: Some(self.hands.peer.to_string()),
            metrics: None,
        }
    }

    /// Blocks until this peer was asked to stop (by a request, [`Peer::stop`], SIGTERM or SIGINT),
    /// then stops it.
    pub fn wait(&self) {
        let signals = stop_on_signals(self.hands.stop.clone());
        if let Err(e) = &signals {
            warn!(error = %e, "signals end this process at once");
        }
        let _ = self.stopping.recv();
        self.stop();
    }

    /// Stops serving: says goodbye to the index and to peers, makes everything durable.
    pub fn stop(&self) {
        drop(self.control.lock().unwrap_or_else(PoisonError::into_inner).take());
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(engine) = engine {
            let _ = self.hands.inbox.send_timeout(Input::Stop, FAREWELL);
            if engine.join().is_err() {
                error!("the peer's thread ended by a panic");
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Asks a peer from any thread.
pub(crate) struct Asker(Hands);

impl Asker {
    pub(crate) fn ask(&self, request: Request, emit: &mut dyn FnMut(Event) -> bool) {
        self.0.handle(request, emit, &|| false);
    }
}

impl Hands {
    fn handle(
        &self,
        request: Request,
        emit: &mut dyn FnMut(Event) -> bool,
        gone: &dyn Fn() -> bool,
    ) {
        let (replies, events) = bounded(REPLIES);
        if request == Request::Down {
            emit(Event::Stopping);
            let _ = self.stop.try_send(());
            return;
        }
        let watches = matches!(request, Request::Watch { .. });
        let reader = Arc::new(());
        let replies = Replies {
            events: replies,
            reader: Arc::downgrade(&reader),
            progress: Arc::new(Seldom::every(PROGRESS_EVERY)),
        };
        if self.inbox.send_timeout(Input::Request { request, replies }, FAREWELL).is_err() {
            emit(Event::failed(&stopping()));
            return;
        }
        loop {
            match events.recv_timeout(GONE_EVERY) {
                Ok(event) => {
                    let last = event.is_result() && !watches || event.failure().is_some();
                    if !emit(event) || last {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) if gone() => return,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    emit(Event::failed(&stopping()));
                    return;
                }
            }
        }
    }
}

fn stopping() -> Error {
    Error::new(ErrorKind::Interrupted, "the peer process is stopping")
        .hint("start it again with potluck up; nothing is lost")
}

fn listen(wanted: Option<SocketAddr>) -> Result<TcpListener> {
    let any = |port| {
        let (v6, v4) = (Ipv6Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED);
        [SocketAddr::from((v6, port)), SocketAddr::from((v4, port))]
    };
    let choices = match wanted {
        Some(address) => vec![address],
        None => [any(DEFAULT_PORT), any(0)].concat(),
    };
    let mut problem = None;
    for address in choices {
        // std binds IPv6 "any" for both families on Linux.
        match TcpListener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(e) => problem = Some(Error::io(format_args!("cannot listen on {address}"), &e)),
        }
    }
    Err(problem
        .unwrap_or_else(stopping)
        .hint("choose another address with --listen ADDR:PORT; port 0 takes a free one"))
}
