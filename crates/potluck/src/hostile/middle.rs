//! Owns a man in the middle, between two peers and between a peer and the index: he takes every
//! connection and every datagram, ends TLS with whatever key he has, and says again what he heard.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use potluck_core::seal::{ReplyHead, RequestHead, seal_reply, seal_request};
use potluck_core::trust::{Invitation, MachineKey};
use potluck_core::wire::datagram::HEAD_BYTES;
use rustls::{ClientConnection, ServerConnection};

use super::{Foe, Net, PATIENCE, fetches, made_up, until};
use crate::control::{IfExists, Request};
use crate::error::ErrorKind;
use crate::{Peer, Settings, tls};

/// What he does with a connection.
#[derive(Clone)]
enum Way {
    /// Hands everything on, and keeps it.
    Listens,
    /// Ends TLS with this key, and begins it anew with the machine behind him.
    Shows(Arc<MachineKey>),
    /// The same, showing the key of the machine behind him, which he cannot sign with.
    ShowsTheirs(Arc<MachineKey>, [u8; 32]),
    /// Says to the caller what the machine behind him said to an earlier one.
    Replays(Vec<u8>),
    /// Hands on record by record, one of them twice.
    Repeats(usize),
}

/// What he got.
#[derive(Default)]
struct Loot {
    /// What callers said, and what they were told, of each connection that he handed on.
    heard: Vec<[Vec<u8>; 2]>,
    /// Handshakes that ended well for him, with the caller or the machine behind.
    believed_by_caller: u32,
    believed_by_machine: u32,
    /// Bytes under the seal of either.
    opened: usize,
    calls: u32,
}

struct Middle {
    way: Arc<Mutex<Way>>,
    loot: Arc<Mutex<Loot>>,
}

impl Middle {
    /// Before the port of `machine`.
    fn before(port: TcpListener, machine: SocketAddr, alpn: &'static [u8], way: Way) -> Self {
        let (way, loot) = (Arc::new(Mutex::new(way)), Arc::<Mutex<Loot>>::default());
        let (ways, all) = (Arc::clone(&way), Arc::clone(&loot));
        thread::spawn(move || {
            while let Ok((caller, _)) = port.accept() {
                all.lock().unwrap().calls += 1;
                let (way, loot) = (ways.lock().unwrap().clone(), Arc::clone(&all));
                thread::spawn(move || way.takes(caller, machine, alpn, &loot));
            }
        });
        Self { way, loot }
    }

    fn now(&self, way: Way) {
        *self.way.lock().unwrap() = way;
    }

    fn loot(&self) -> std::sync::MutexGuard<'_, Loot> {
        self.loot.lock().unwrap()
    }
}

impl Way {
    fn takes(
        self,
        mut caller: TcpStream,
        machine: SocketAddr,
        alpn: &'static [u8],
        loot: &Arc<Mutex<Loot>>,
    ) {
        let behind = || TcpStream::connect(machine).unwrap();
        match self {
            Self::Listens => {
                let at = {
                    let mut loot = loot.lock().unwrap();
                    loot.heard.push(Default::default());
                    loot.heard.len() - 1
                };
                let there = behind();
                let ends = [(&caller, &there, 0), (&there, &caller, 1)];
                for (mut from, mut to, which) in ends
                    .map(|(a, b, which)| (a.try_clone().unwrap(), b.try_clone().unwrap(), which))
                {
                    let loot = Arc::clone(loot);
                    thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(read @ 1..) = from.read(&mut buffer) {
                            loot.lock().unwrap().heard[at][which].extend(&buffer[..read]);
                            if to.write_all(&buffer[..read]).is_err() {
                                break;
                            }
                        }
                        let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
                    });
                }
            }
            Self::Shows(key) => {
                let config = tls::server(&key, alpn).unwrap();
                ends_tls(caller, behind(), config, &key, alpn, loot);
            }
            Self::ShowsTheirs(key, theirs) => {
                let config = tls::pretending(&key, theirs, alpn).unwrap();
                ends_tls(caller, behind(), config, &key, alpn, loot);
            }
            Self::Replays(said) => {
                let _ = caller.read(&mut [0; 16 << 10]);
                let _ = caller.write_all(&said);
                let _ = caller.shutdown(Shutdown::Write);
                let _ = caller.read_to_end(&mut vec![]);
            }
            Self::Repeats(nth) => {
                let there = behind();
                let (mut up, mut there_too) =
                    (caller.try_clone().unwrap(), there.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut up, &mut there_too);
                    let _ = there_too.shutdown(Shutdown::Both);
                });
                let mut from = there;
                for at in 0.. {
                    let mut record = vec![0; 5];
                    if from.read_exact(&mut record).is_err() {
                        break;
                    }
                    let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
                    record.resize(5 + length, 0);
                    let whole = from.read_exact(&mut record[5..]);
                    let twice = if at == nth { 2 } else { 1 };
                    if whole.is_err() || (0..twice).any(|_| caller.write_all(&record).is_err()) {
                        break;
                    }
                }
                let _ = (caller.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
            }
        }
    }
}

/// Stands between two TLS connections, and hands on what is under the seal of either.
fn ends_tls(
    mut caller: TcpStream,
    mut there: TcpStream,
    config: rustls::ServerConfig,
    key: &MachineKey,
    alpn: &'static [u8],
    loot: &Mutex<Loot>,
) {
    for socket in [&caller, &there] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    // With whoever is behind him first: what that one would give is what the caller would get.
    let expect = tls::client(key, tls::Expect::Anyone, alpn).unwrap();
    let mut behind = ClientConnection::new(Arc::new(expect), tls::no_name()).unwrap();
    while behind.is_handshaking() && behind.complete_io(&mut there).is_ok() {}
    loot.lock().unwrap().believed_by_machine += u32::from(!behind.is_handshaking());
    let mut front = ServerConnection::new(Arc::new(config)).unwrap();
    while front.is_handshaking() {
        if front.complete_io(&mut caller).is_err() {
            return; // as it should be: the caller does not believe that he is who it called
        }
    }
    loot.lock().unwrap().believed_by_caller += 1;
    let mut said = vec![0; 64 << 10];
    let mut tls = rustls::Stream::new(&mut front, &mut caller);
    while let Ok(read @ 1..) = tls.read(&mut said) {
        loot.lock().unwrap().opened += read;
        let _ = rustls::Stream::new(&mut behind, &mut there).write_all(&said[..read]);
    }
}

/// A peer that others see at an address where somebody else stands.
fn behind(net: &Net, name: &str, way: Way) -> (Peer, Middle) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let hidden = SocketAddr::new("127.0.0.2".parse().unwrap(), port.local_addr().unwrap().port());
    let settings = Settings::new(net.dir.path().join(name));
    let label = name.into();
    let peer = Peer::open(Settings { listen: Some(hidden), label, ..settings }).unwrap();
    peer.join(&net.invitation).unwrap();
    (peer, Middle::before(port, hidden, tls::PEERS, way))
}

/// How a fetch ends that nobody honest can serve.
fn fails(peer: &Peer, what: &str, to: &std::path::Path) -> crate::Error {
    let (what, to) = (what.into(), to.to_owned());
    let request = Request::Get { what, to, exists: IfExists::default(), timeout_s: 3 };
    let mut failure = None;
    peer.handle(request, &mut |event| {
        failure = event.failure().or(failure.take());
        true
    });
    failure.expect("it fails")
}

#[test]
fn between_two_peers_he_gets_no_byte_and_who_else_has_it_is_asked() {
    let net = Net::new();
    let foe = Foe::join(&net, 1);
    let own = Arc::new(MachineKey::from_seed([99; 32]));
    let (alice, middle) = behind(&net, "alice", Way::Shows(Arc::clone(&own)));
    let (bob, carol, dave) = (net.peer("bob"), net.peer("carol"), net.peer("dave"));
    let bytes = made_up("film", 3 << 20);
    let file = net.file("film", &bytes);
    let id = alice.share(&file, Some("film")).unwrap().id;
    let member = Arc::new(MachineKey::from_seed(*foe.key.seed()));
    let theirs = alice.id().0;
    let ways = [
        ("his own key", Way::Shows(Arc::clone(&own))),
        ("another member's key", Way::Shows(member)),
        ("her key, which he cannot sign with", Way::ShowsTheirs(own, theirs)),
    ];
    for (what, way) in &ways {
        middle.now(way.clone());
        let to = net.dir.path().join("refused");
        let error = fails(&bob, &id.to_string(), &to);
        assert_eq!(error.kind, ErrorKind::NoSource, "{what}: {error}");
        assert!(!to.exists(), "{what}");
        let loot = middle.loot();
        assert!(loot.calls > 0, "{what}: he was called");
        assert_eq!((loot.believed_by_caller, loot.opened), (0, 0), "{what}");
        assert!(loot.believed_by_machine > 0, "{what}: a stranger may call her, and gets nothing");
    }

    // What he overhears of a fetch that he lets through is worth nothing later, to either side.
    middle.now(Way::Listens);
    let to = net.dir.path().join("overheard");
    let (sources, ..) = fetches(&bob, id, &to);
    assert_eq!(sources.into_keys().collect::<Vec<_>>(), ["alice"]);
    bob.unshare(&id.to_string()).unwrap();
    let [said, told] = {
        let loot = middle.loot();
        loot.heard.iter().max_by_key(|[_, told]| told.len()).unwrap().clone()
    };
    assert!(told.len() > bytes.len(), "all of it went by him");
    assert!(!told.windows(64).any(|window| window == &bytes[1_000..1_064]), "sealed");
    let mut again = TcpStream::connect(alice.listen()).unwrap();
    again.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = again.write_all(&said);
    let mut got = vec![];
    let _ = again.read_to_end(&mut got);
    println!("{} bytes of handshake for {} replayed", got.len(), said.len());
    assert!(got.len() < 8 << 10, "{} bytes", got.len());

    middle.now(Way::Replays(told));
    carol.share(&file, None).unwrap();
    let before = middle.loot().calls;
    let to = net.dir.path().join("from carol");
    let (sources, ..) = fetches(&dave, id, &to);
    assert_eq!(sources.into_iter().collect::<Vec<_>>(), [("carol".into(), bytes.len() as u64)]);
    assert!(std::fs::read(&to).unwrap() == bytes);
    until("a call", || (middle.loot().calls > before).then_some(()));
}

#[test]
fn a_record_said_twice_costs_a_connection_and_no_byte() {
    let net = Net::new();
    let (alice, middle) = behind(&net, "alice", Way::Repeats(40));
    let bob = net.peer("bob");
    let bytes = made_up("film", 6 << 20);
    let id = alice.share(net.file("film", &bytes), Some("film")).unwrap().id;
    let to = net.dir.path().join("copy");
    let (_, stats, took) = fetches(&bob, id, &to);
    assert!(std::fs::read(&to).unwrap() == bytes);
    let calls = middle.loot().calls;
    println!("{calls} connections, {took:?}");
    assert!(calls > 1, "it was noticed");
    assert_eq!(stats.fetched.bad, 0, "before it could be a piece");
}

/// Stands before an index's UDP port. Every datagram goes through; with each go some that he made:
/// sealed with a key of his, bent, said before.
struct Forger {
    forged: Arc<AtomicU32>,
    closed: Arc<AtomicBool>,
}

impl Forger {
    fn before(index: SocketAddr, udp: UdpSocket) -> Self {
        let (forged, closed) = (Arc::<AtomicU32>::default(), Arc::<AtomicBool>::default());
        let (count, done) = (Arc::clone(&forged), Arc::clone(&closed));
        udp.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        thread::spawn(move || {
            let (mut members, mut buffer) = (BTreeMap::new(), [0; 2_048]);
            let (mut asked, mut told): (Vec<Vec<u8>>, Vec<Vec<u8>>) = (vec![], vec![]);
            while !done.load(Ordering::Relaxed) {
                let Ok((length, from)) = udp.recv_from(&mut buffer) else { continue };
                let datagram = &buffer[..length];
                let (to, kept, own) = if from == index {
                    let head = ReplyHead::decode(datagram).unwrap();
                    let own = seal_reply(&[7; 16], &head, &[0; 80]);
                    (members[&(head.member, head.salt)], &mut told, own)
                } else {
                    let head = RequestHead::decode(datagram).unwrap();
                    members.insert((head.member, head.salt), from);
                    (index, &mut asked, seal_request(&[7; 16], &head, &[0; 80]))
                };
                let mut bent = datagram.to_vec();
                bent[HEAD_BYTES + 3] ^= 1;
                let sends = |made: &[u8]| {
                    count.fetch_add(1, Ordering::Relaxed);
                    udp.send_to(made, to).unwrap();
                };
                sends(&own);
                sends(&bent);
                kept.iter().rev().take(3).for_each(|before| sends(before));
                udp.send_to(datagram, to).unwrap();
                kept.push(datagram.to_vec());
            }
        });
        Self { forged, closed }
    }
}

impl Drop for Forger {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

#[test]
fn before_the_index_he_is_not_told_who_wants_in_and_his_datagrams_change_nothing() {
    let net = Net::new();
    let real = net.index.listen();
    let (tcp, udp) = until("a port free on both", || {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind(tcp.local_addr().unwrap()).ok()?;
        Some((tcp, udp))
    });
    let at = tcp.local_addr().unwrap();
    let own = Arc::new(MachineKey::from_seed([99; 32]));
    let middle = Middle::before(tcp, real, tls::DESK, Way::Shows(Arc::clone(&own)));
    let forger = Forger::before(real, udp);
    let invited = |index: Vec<String>| Invitation { index, ..net.invitation.clone() };

    let open = |name: &str| {
        let settings = Settings::new(net.dir.path().join(name));
        let listen = "127.0.0.1:0".parse().ok();
        Peer::open(Settings { listen, label: name.into(), ..settings }).unwrap()
    };
    let alice = open("alice");
    let theirs = net.index.network().0;
    for way in [Way::Shows(Arc::clone(&own)), Way::ShowsTheirs(own, theirs)] {
        middle.now(way);
        let error = alice.join(&invited(vec![at.to_string()])).unwrap_err();
        println!("{error}");
        assert!(matches!(error.kind, ErrorKind::Refused | ErrorKind::IndexUnreachable), "{error}");
    }
    {
        let loot = middle.loot();
        assert_eq!((loot.believed_by_caller, loot.opened), (0, 0), "he was told nothing");
    }
    assert_eq!(net.index.members().unwrap().len(), 0);
    // Where another address of the index is known, that one is taken.
    let bob = open("bob");
    bob.join(&invited(vec![at.to_string(), real.to_string()])).unwrap();

    middle.now(Way::Listens);
    alice.join(&invited(vec![at.to_string()])).unwrap();
    let bytes = made_up("film", 1 << 20);
    let id = alice.share(net.file("film", &bytes), Some("film")).unwrap().id;
    for _ in 0..50 {
        let rows = alice.list("*").unwrap();
        assert_eq!(rows.iter().map(|row| row.id.clone()).collect::<Vec<_>>(), [id.to_string()]);
    }
    let (sources, ..) = fetches(&bob, id, &net.dir.path().join("copy"));
    assert_eq!(sources.into_keys().collect::<Vec<_>>(), ["alice"]);
    let forged = forger.forged.load(Ordering::Relaxed);
    println!("{forged} datagrams of his among the true ones");
    assert!(forged > 200, "{forged}");

    // A join overheard is not another's: said again, it is a stranger's handshake.
    let said = middle.loot().heard.iter().map(|[said, _]| said.clone()).collect::<Vec<_>>();
    let members = net.index.members().unwrap().len();
    for said in said {
        let mut again = TcpStream::connect(real).unwrap();
        again.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = again.write_all(&said);
        let _ = again.read_to_end(&mut vec![]);
    }
    assert_eq!(net.index.members().unwrap().len(), members);
}
