//! Owns, for tests only, the other side of a connection that does and says whatever a test wants,
//! and a whole peer's connections without its engine.

use std::collections::VecDeque;
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::DerefMut;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use crossbeam_channel::Receiver;
use potluck_core::id::{MemberNumber, PeerId};
use potluck_core::time::WallTime;
use potluck_core::trust::{Certificate, MachineKey, Role};
use potluck_core::wire::stream::Frame;
use rustls::{ClientConnection, ConnectionCommon, ServerConnection, SideData, StreamOwned};

use super::{ConnId, Connection, Context, Event, Identity, Listener, SharedIdentity, dial, listen};
use crate::{clock, tls};

/// Longer than any test should wait for anything; only reached when it fails.
const LONG: Duration = Duration::from_secs(60);

/// The key of the test network's index.
pub(super) fn index() -> MachineKey {
    MachineKey::from_seed([1; 32])
}

pub(super) fn key(n: u8) -> MachineKey {
    MachineKey::from_seed([n; 32])
}

pub(super) fn certificate(peer: PeerId) -> Certificate {
    certificate_of(&index(), peer, clock::wall())
}

pub(super) fn certificate_of(issuer: &MachineKey, peer: PeerId, now: WallTime) -> Certificate {
    Certificate::issue(issuer, peer, MemberNumber(7), Role::Publish, "someone", now)
}

/// A peer's connections, and the end of the channel where its engine would sit.
pub(super) struct Machine {
    pub(super) ctx: Arc<Context>,
    pub(super) peer: PeerId,
    pub(super) address: SocketAddr,
    pub(super) identity: SharedIdentity,
    events: Receiver<(ConnId, Event)>,
    _listener: Listener,
}

impl Machine {
    /// A member of the test network, listening on loopback.
    pub(super) fn new(n: u8) -> Self {
        let key = Arc::new(key(n));
        let peer = key.peer();
        let identity = Identity {
            network: index().network(),
            certificate: certificate(peer),
            revoked: [].into(),
        };
        let identity: SharedIdentity = Arc::new(RwLock::new(Some(Arc::new(identity))));
        let (send, events) = crossbeam_channel::bounded(1_000);
        let ctx = Arc::new(Context::new(key, Arc::clone(&identity), send).unwrap());
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let _listener = listen(Arc::clone(&ctx), socket).unwrap();
        Self { ctx, peer, address, identity, events, _listener }
    }

    pub(super) fn dial(&self, other: &Machine) -> (ConnId, Connection) {
        self.dial_at(other.address, other.peer)
    }

    pub(super) fn dial_at(&self, address: SocketAddr, peer: PeerId) -> (ConnId, Connection) {
        let conn = self.ctx.number();
        (conn, dial(&self.ctx, conn, address, peer).unwrap())
    }

    /// The next event, but for signs of life, which come when a test is slow.
    pub(super) fn next(&self) -> (ConnId, Event) {
        loop {
            match self.events.recv_timeout(LONG).expect("an event in time") {
                (_, Event::Alive { .. }) => {}
                event => return event,
            }
        }
    }

    /// The next event, whatever it is.
    pub(super) fn any_event(&self) -> Event {
        self.events.recv_timeout(LONG).expect("an event in time").1
    }

    /// The next event, which is of the one connection there is.
    pub(super) fn event(&self) -> Event {
        self.next().1
    }

    /// Nothing has happened that the engine would know of.
    pub(super) fn knows_of_nothing(&self) -> bool {
        self.events.is_empty()
    }

    /// Waits for a connection to come up.
    pub(super) fn up(&self) -> (ConnId, Connection) {
        match self.next() {
            (conn, Event::Up { connection, .. }) => (conn, connection),
            (_, other) => panic!("instead of Up: {other:?}"),
        }
    }

    /// Changes who this machine is, or whom it believes.
    pub(super) fn identify(&self, change: impl FnOnce(&mut Identity)) {
        let mut now = self.identity.write().unwrap();
        let old = now.as_ref().unwrap();
        let mut new = Identity {
            network: old.network,
            certificate: old.certificate.clone(),
            revoked: old.revoked.clone(),
        };
        change(&mut new);
        *now = Some(Arc::new(new));
    }
}

/// Two machines with one connection, which the first dialled.
pub(super) fn pair() -> ((Machine, Connection), (Machine, Connection)) {
    let (a, b) = (Machine::new(2), Machine::new(3));
    let (_, dialled) = a.dial(&b);
    let (_, accepted) = b.up();
    a.up();
    ((a, dialled), (b, accepted))
}

/// A peer that is worked by hand, over a blocking socket.
pub(crate) struct Puppet {
    tls: Box<dyn Talk>,
    pub(crate) socket: TcpStream,
    heard: VecDeque<u8>,
}

trait Talk: Read + Write + Send {}
impl<T: Read + Write + Send> Talk for T {}

impl Puppet {
    /// Dials and finishes the TLS handshake, saying nothing yet.
    pub(super) fn dial(to: &Machine, key: &MachineKey) -> Self {
        Self::dial_at(to.address, to.peer, key)
    }

    /// The same with any peer.
    pub(crate) fn dial_at(address: SocketAddr, peer: PeerId, key: &MachineKey) -> Self {
        let config = tls::client(key, tls::Expect::Key(peer.0), tls::PEERS).unwrap();
        let tls = ClientConnection::new(Arc::new(config), tls::no_name()).unwrap();
        Self::shake_hands(TcpStream::connect(address).unwrap(), tls)
    }

    /// Dials and comes up as the member `n`; `to` has reported Up.
    pub(super) fn come_up(to: &Machine, n: u8) -> (Self, Connection) {
        let mut puppet = Self::dial(to, &key(n));
        puppet.hello(&certificate(key(n).peer()));
        puppet.hear(|frame| assert!(matches!(frame, Frame::Hello { .. }), "{frame:?}"));
        (puppet, to.up().1)
    }

    /// Waits at `listener` for a dialler, and comes up as the member `n`.
    pub(super) fn answer(listener: &TcpListener, n: u8) -> Self {
        let (socket, _) = listener.accept().unwrap();
        Self::answer_as(socket, &key(n), &certificate(key(n).peer()))
    }

    /// Comes up with whoever dialled, as a member that shows this.
    pub(crate) fn answer_as(socket: TcpStream, key: &MachineKey, shown: &Certificate) -> Self {
        let mut puppet = Self::shake_hands_as(socket, key);
        puppet.hear(|frame| assert!(matches!(frame, Frame::Hello { .. }), "{frame:?}"));
        puppet.hello(shown);
        puppet
    }

    /// Finishes the TLS handshake with whoever dialled, and says nothing.
    pub(crate) fn shake_hands_as(socket: TcpStream, key: &MachineKey) -> Self {
        let config = tls::server(key, tls::PEERS).unwrap();
        Self::shake_hands(socket, ServerConnection::new(Arc::new(config)).unwrap())
    }

    fn shake_hands<C, S>(mut socket: TcpStream, mut tls: C) -> Self
    where
        C: DerefMut<Target = ConnectionCommon<S>> + Send + 'static,
        S: SideData + 'static,
    {
        socket.set_read_timeout(Some(LONG)).unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).unwrap();
        }
        let tls = Box::new(StreamOwned::new(tls, socket.try_clone().unwrap()));
        Self { tls, socket, heard: VecDeque::new() }
    }

    pub(crate) fn hello(&mut self, certificate: &Certificate) {
        self.say(&Frame::Hello { certificate: &certificate.encode(), port: 4711 });
    }

    pub(crate) fn say(&mut self, frame: &Frame<'_>) {
        let mut bytes = vec![];
        frame.encode(&mut bytes);
        self.say_bytes(&bytes);
    }

    /// Sends these bytes as application data; an error is not one of ours.
    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        let _ = self.tls.write_all(bytes).and_then(|()| self.tls.flush());
    }

    /// Hands the next frame but pings to `look`.
    pub(crate) fn hear<T>(&mut self, look: impl FnOnce(Frame<'_>) -> T) -> T {
        self.try_to_hear(look).unwrap()
    }

    /// The same; an error where the connection is over.
    pub(crate) fn try_to_hear<T>(
        &mut self,
        look: impl FnOnce(Frame<'_>) -> T,
    ) -> std::io::Result<T> {
        loop {
            let len: [u8; 4] = self.take(4)?.try_into().unwrap();
            let frame = self.take(u32::from_be_bytes(len) as usize)?;
            match Frame::decode(&frame).unwrap() {
                Frame::Ping => {}
                frame => return Ok(look(frame)),
            }
        }
    }

    fn take(&mut self, n: usize) -> std::io::Result<Vec<u8>> {
        while self.heard.len() < n {
            let mut more = vec![0; 64 << 10];
            match self.tls.read(&mut more)? {
                0 => return Err(Io::UnexpectedEof.into()),
                got => self.heard.extend(&more[..got]),
            }
        }
        Ok(self.heard.drain(..n).collect())
    }

    /// Everything that is said until the connection ends.
    pub(super) fn hear_all(mut self) -> Vec<u8> {
        let mut all: Vec<u8> = self.heard.drain(..).collect();
        match self.tls.read_to_end(&mut all) {
            Err(error) if matches!(error.kind(), Io::WouldBlock | Io::TimedOut) => {
                panic!("the connection did not end");
            }
            _ => all,
        }
    }
}
