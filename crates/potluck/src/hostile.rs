//! Owns, for tests only, members that break every rule they can, against a real index and real peers
//! on loopback. Each attack has its bound here; `docs/reliability.md` lists them.

mod middle;

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{ContentId, PeerId, Piece, Version};
use potluck_core::layout::Layout;
use potluck_core::limit::Limit;
use potluck_core::link::{Link, Output};
use potluck_core::trust::{Invitation, MachineKey, NameRecord};
use potluck_core::wire::datagram::{Code, HELD_ALL, Item, MAX_DATAGRAM};
use potluck_core::wire::desk::Session;
use potluck_core::wire::stream::{Channel, Frame, Goodbye, Side};
use tempfile::TempDir;

use crate::control::{Event, IfExists, Request, Stats};
use crate::transfer::puppet::Puppet;
use crate::{Index, IndexSettings, Peer, Settings, clock, testing};

/// Longer than any test should wait for anything; only reached when it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A network on loopback, and room for what is in it.
struct Net {
    index: Index,
    invitation: Invitation,
    dir: TempDir,
}

impl Net {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = IndexSettings::new(dir.path().join("index"));
        let listen = "127.0.0.1:0".parse().ok();
        let index = Index::open(&IndexSettings { listen, ..settings }).unwrap();
        let invitation = index.invite_machines(1_000).unwrap();
        Self { index, invitation, dir }
    }

    fn peer(&self, name: &str) -> Peer {
        let settings = Settings::new(self.dir.path().join(name));
        let listen = "127.0.0.1:0".parse().ok();
        let peer = Peer::open(Settings { listen, label: name.into(), ..settings }).unwrap();
        peer.join(&self.invitation).unwrap();
        peer
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn made_up(seed: &str, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A content as whoever has it knows it.
struct Original {
    id: ContentId,
    bytes: Vec<u8>,
    layout: Layout,
    proof: Vec<u8>,
}

impl Original {
    /// Of a file that `peer` shares: its proof is asked for as any member may.
    fn of(id: ContentId, bytes: &[u8], peer: &Peer, foe: &Foe) -> Self {
        let mut puppet = foe.dial(peer);
        puppet.say(&Frame::Open(ours(1), id));
        let mut proof = Vec::new();
        let length = loop {
            let length = puppet.hear(|frame| match frame {
                Frame::Opened { proof, .. } => Some(proof as usize),
                _ => None,
            });
            if let Some(length) = length {
                break length;
            }
        };
        puppet.say(&Frame::WantMeta(ours(1)));
        while proof.len() < length {
            puppet.hear(|frame| {
                if let Frame::Meta(_, some) = frame {
                    proof.extend_from_slice(some);
                }
            });
        }
        let layout = Layout::new([bytes.len() as u64]).unwrap();
        Self { id, bytes: bytes.to_vec(), layout, proof }
    }

    fn piece(&self, piece: Piece) -> &[u8] {
        let place = self.layout.place(piece).unwrap();
        &self.bytes[place.offset as usize..][..place.len as usize]
    }

    fn item(&self) -> Item {
        Item { id: self.id, size: self.bytes.len() as u64, held: HELD_ALL, name: None }
    }
}

const fn ours(number: u16) -> Channel {
    Channel { number, opener: Side::Us }
}

/// A member that means ill.
struct Foe {
    key: MachineKey,
    session: Session,
    index: SocketAddr,
    listener: TcpListener,
}

impl Foe {
    fn join(net: &Net, seed: u8) -> Self {
        let key = MachineKey::from_seed([seed; 32]);
        let (session, index) = testing::session(&key, &net.invitation).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self { key, session, index, listener }
    }

    /// Comes up with a peer by dialling it.
    fn dial(&self, peer: &Peer) -> Puppet {
        let mut puppet = Puppet::dial_at(peer.listen(), peer.id(), &self.key);
        puppet.hello(&self.session.certificate);
        puppet.hear(|frame| assert!(matches!(frame, Frame::Hello { .. }), "{frame:?}"));
        puppet
    }

    /// Tells the index that it hosts this; what the index says against it.
    fn registers(&self, item: Item) -> Result<(), Code> {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(self.index).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut link = Link::new(7);
        link.set_port(self.listener.local_addr().unwrap().port());
        link.on_session(clock::now(), self.session.clone());
        link.share(clock::now(), item);
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            while let Some(output) = link.poll_output() {
                match output {
                    Output::Send(datagram) => drop(socket.send(&datagram).unwrap()),
                    Output::Registered(_) => return Ok(()),
                    Output::Refused(_, refusal) => return Err(refusal.code),
                    _ => {}
                }
            }
            let mut datagram = [0; MAX_DATAGRAM];
            if let Ok(length) = socket.recv(&mut datagram) {
                link.on_datagram(clock::now(), &mut datagram[..length]);
            }
            link.tick(clock::now());
        }
        panic!("the index does not answer");
    }

    /// Hosts from now on, in its way.
    fn hosts(self, of: &Arc<Original>, way: Way) -> Arc<Mutex<Tally>> {
        self.registers(of.item()).unwrap();
        let (of, tally) = (Arc::clone(of), Arc::<Mutex<Tally>>::default());
        let count = Arc::clone(&tally);
        thread::spawn(move || {
            while let Ok((socket, _)) = self.listener.accept() {
                count.lock().unwrap().calls += 1;
                let puppet = Puppet::answer_as(socket, &self.key, &self.session.certificate);
                let (of, count) = (Arc::clone(&of), Arc::clone(&count));
                thread::spawn(move || way.host(puppet, &of, &count));
            }
        });
        tally
    }
}

/// What a foe saw.
#[derive(Clone, Debug, Default)]
struct Tally {
    calls: u32,
    opened: u32,
    pieces: u32,
    ended: Vec<Option<Goodbye>>,
}

/// How a foe hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Poison: one bit of each piece.
    OneBit,
    /// Other bytes altogether.
    Whole,
    /// Another piece's bytes, as from an older version.
    Stale,
    Zeroes,
    Truncated,
    /// Has all, and never answers.
    Stalls,
    /// Has all, and is always busy for no time at all.
    Busy,
    /// Has all, loses what it is asked for, and has it again.
    Forgets,
    /// Has all, and closes when it is asked.
    Closes,
}

enum Heard {
    Open(Channel, ContentId),
    WantMeta(Channel),
    Want(Channel, Vec<Piece>),
    Bye(Goodbye),
    Other,
}

impl Way {
    fn host(self, mut puppet: Puppet, of: &Original, tally: &Mutex<Tally>) {
        let all = || Bitfield::all(of.layout.pieces());
        let ended = loop {
            let heard = puppet.try_to_hear(|frame| match frame {
                Frame::Open(channel, id) => Heard::Open(channel, id),
                Frame::WantMeta(channel) => Heard::WantMeta(channel),
                Frame::Want(channel, pieces) => Heard::Want(channel, pieces),
                Frame::Bye(why, _) => Heard::Bye(why),
                _ => Heard::Other,
            });
            match heard {
                Err(_) => break None,
                Ok(Heard::Bye(why)) => break Some(why),
                Ok(Heard::Open(channel, id)) => {
                    assert_eq!(id, of.id);
                    tally.lock().unwrap().opened += 1;
                    let (size, proof) = (of.bytes.len() as u64, of.proof.len() as u32);
                    puppet.say(&Frame::Opened { channel, size, manifest: 0, proof });
                    puppet.say(&Frame::Have(channel, all()));
                }
                Ok(Heard::WantMeta(channel)) => puppet.say(&Frame::Meta(channel, &of.proof)),
                Ok(Heard::Want(channel, pieces)) => match self {
                    Self::Stalls => {}
                    Self::Busy => puppet.say(&Frame::Busy(channel, pieces, 0)),
                    Self::Forgets => {
                        puppet.say(&Frame::Lost(channel, pieces));
                        puppet.say(&Frame::Have(channel, all()));
                    }
                    Self::Closes => puppet.say(&Frame::Close(channel)),
                    poison => {
                        for piece in pieces {
                            tally.lock().unwrap().pieces += 1;
                            puppet.say(&Frame::Piece(channel, piece, &poison.spoil(of, piece)));
                        }
                    }
                },
                Ok(Heard::Other) => {}
            }
        };
        tally.lock().unwrap().ended.push(ended);
    }

    fn spoil(self, of: &Original, piece: Piece) -> Vec<u8> {
        let mut bytes = of.piece(piece).to_vec();
        match self {
            Self::OneBit => bytes[piece.0 as usize % 1_000] ^= 1 << (piece.0 % 8),
            Self::Whole => bytes = made_up("poison", bytes.len()),
            Self::Stale => {
                let length = bytes.len();
                bytes = of.piece(Piece(u32::from(piece.0 == 0))).to_vec();
                bytes.resize(length, 0);
            }
            Self::Zeroes => bytes.fill(0),
            Self::Truncated => drop(bytes.pop()),
            _ => {}
        }
        bytes
    }
}

/// Fetches to `to`; who sent how much, what happened, how long it took.
fn fetches(peer: &Peer, id: ContentId, to: &PathBuf) -> (BTreeMap<String, u64>, Stats, Duration) {
    let began = Instant::now();
    let download = peer.get(&id.to_string(), to).unwrap();
    while let Some(event) = download.next_event() {
        assert_eq!(event.failure(), None);
        if let Event::Done { sources, stats, .. } = event {
            let sources = sources.into_iter().map(|source| (source.label, source.bytes)).collect();
            return (sources, *stats.unwrap(), began.elapsed());
        }
    }
    panic!("it ended without a word");
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "it never came: {what}");
        thread::yield_now();
    }
}

/// An honest publisher who is no faster than that, and who fetches from her.
struct Scene {
    net: Net,
    alice: Peer,
    bob: Peer,
    of: Arc<Original>,
}

impl Scene {
    fn new(length: usize, rate: u64) -> Self {
        let net = Net::new();
        let (alice, bob) = (net.peer("alice"), net.peer("bob"));
        let bytes = made_up("film", length);
        let shared = alice.share(net.file("film", &bytes), Some("film")).unwrap();
        let of = Arc::new(Original::of(shared.id, &bytes, &alice, &Foe::join(&net, 200)));
        alice.limit(Some(Limit::new(rate).unwrap()), None).unwrap();
        Self { net, alice, bob, of }
    }

    /// Bob has a whole and right copy, all of it from alice, and how long that took.
    fn bob_fetches(&self, to: &str) -> (Stats, Duration) {
        let to = self.net.dir.path().join(to);
        let (sources, stats, took) = fetches(&self.bob, self.of.id, &to);
        assert!(fs::read(&to).unwrap() == self.of.bytes);
        let size = self.of.bytes.len() as u64;
        assert_eq!(sources, BTreeMap::from([("alice".into(), size)]));
        self.bob.unshare(&self.of.id.to_string()).unwrap();
        (stats, took)
    }
}

#[test]
fn poison_of_every_kind_is_found_and_costs_a_piece_of_each_who_sends_it() {
    let scene = Scene::new(24 << 20, 16 << 20);
    let (_, honest) = scene.bob_fetches("honest");
    let ways = [Way::OneBit, Way::Whole, Way::Stale, Way::Zeroes, Way::Truncated];
    let tallies: Vec<_> = ways
        .iter()
        .zip(1..)
        .map(|(way, seed)| Foe::join(&scene.net, seed).hosts(&scene.of, *way))
        .collect();
    let (stats, poisoned) = scene.bob_fetches("poisoned");
    println!(
        "{honest:?} alone, {poisoned:?} with five poisoners; {} bad pieces",
        stats.fetched.bad
    );
    for (way, tally) in ways.iter().zip(tallies) {
        let tally = until("the end", || {
            Some(tally.lock().unwrap().clone()).filter(|tally| !tally.ended.is_empty())
        });
        println!("{way:?}: {tally:?}");
        assert_eq!(tally.calls, 1, "{way:?}: it is not called again");
        // One, and what else was under way by then.
        assert!(tally.pieces <= 4, "{way:?}: {tally:?}");
        let reason = match way {
            Way::Truncated => Goodbye::Protocol,
            _ => Goodbye::BadPiece,
        };
        assert!(matches!(tally.ended[..], [None]) || tally.ended == [Some(reason)], "{way:?}");
    }
}

#[test]
fn hosts_that_have_all_and_give_nothing_hold_nobody_up() {
    let scene = Scene::new(24 << 20, 16 << 20);
    let (_, honest) = scene.bob_fetches("honest");
    for (way, seed) in [Way::Stalls, Way::Busy, Way::Forgets, Way::Closes].into_iter().zip(1..) {
        let tally = Foe::join(&scene.net, seed).hosts(&scene.of, way);
        let (stats, took) = scene.bob_fetches(&format!("{way:?}"));
        let tally = tally.lock().unwrap().clone();
        println!(
            "{way:?}: {took:?} instead of {honest:?}, {} stalls; {tally:?}",
            stats.fetched.stalls
        );
    }
}

#[test]
fn fakes_registered_for_a_popular_content_do_not_hide_the_honest_host() {
    let scene = Scene::new(1 << 20, 64 << 20);
    for seed in 1..=60 {
        // It takes no call, so that its port is as good as dead.
        Foe::join(&scene.net, seed).registers(scene.of.item()).unwrap();
    }
    let (_, took) = scene.bob_fetches("copy");
    println!("{took:?} with 60 fakes beside one honest host");
}

/// They take the call, or end the handshake, or say hello as well, and no word more. Of those that had said
/// hello sixteen took all places for ever: neither was another host called nor the index asked for more.
#[test]
fn fakes_that_take_the_call_and_fall_silent_do_not_hide_the_honest_host() {
    const FAKES: u8 = 48;
    let scene = Scene::new(1 << 20, 64 << 20);
    let calls: Vec<_> = (1..=FAKES)
        .map(|seed| {
            let foe = Foe::join(&scene.net, seed);
            foe.registers(scene.of.item()).unwrap();
            let calls = Arc::<Mutex<u32>>::default();
            let count = Arc::clone(&calls);
            thread::spawn(move || {
                let mut kept = Vec::new();
                while let Ok((socket, _)) = foe.listener.accept() {
                    *count.lock().unwrap() += 1;
                    let (key, shown) =
                        (MachineKey::from_seed([seed; 32]), &foe.session.certificate);
                    match seed % 3 {
                        0 => kept.push((Some(socket), None)),
                        1 => kept.push((None, Some(Puppet::shake_hands_as(socket, &key)))),
                        _ => kept.push((None, Some(Puppet::answer_as(socket, &key, shown)))),
                    }
                }
            });
            calls
        })
        .collect();
    // The default patience is less than it may take until the index has named her.
    let (began, to) = (Instant::now(), scene.net.dir.path().join("copy"));
    let (what, exists) = (scene.of.id.to_string(), IfExists::default());
    let request = Request::Get { what, to: to.clone(), exists, timeout_s: 300 };
    let mut from = Vec::new();
    scene.bob.handle(request, &mut |event| {
        assert_eq!(event.failure(), None);
        if let Event::Done { sources, .. } = event {
            from = sources.into_iter().map(|source| source.label).collect();
        }
        true
    });
    let took = began.elapsed();
    assert_eq!(from, ["alice"]);
    assert!(fs::read(to).unwrap() == scene.of.bytes);
    let called: Vec<u32> = calls.iter().map(|calls| *calls.lock().unwrap()).collect();
    let (hosts, all) =
        (called.iter().filter(|calls| **calls > 0).count(), called.iter().sum::<u32>());
    println!("{took:?}; {all} calls at {hosts} of {FAKES} fakes");
}

#[test]
fn a_name_is_neither_taken_nor_moved_by_another() {
    let scene = Scene::new(1 << 20, 64 << 20);
    let foe = Foe::join(&scene.net, 1);
    let (network, name) = (scene.net.index.network(), "film".parse().unwrap());
    let id = ContentId::file([9; 32]);
    let own = NameRecord::sign(&foe.key, network, name, Version(9), id, clock::wall());
    let item = |name| Item { id, size: 5, held: HELD_ALL, name: Some(name) };
    assert_eq!(foe.registers(item(own.clone())), Err(Code::NameTaken));
    let forged = NameRecord { publisher: scene.alice.id(), ..own };
    assert_eq!(foe.registers(item(forged)), Err(Code::BadSignature));
    let rows = scene.bob.list("film").unwrap();
    let found: Vec<_> = rows.iter().map(|row| (row.id.as_str(), row.version)).collect();
    assert_eq!(found, [(scene.of.id.to_string().as_str(), Some(1))]);
}

#[test]
fn who_floods_with_wants_is_served_like_one_and_others_go_on() {
    let scene = Scene::new(24 << 20, 64 << 20);
    let (_, honest) = scene.bob_fetches("honest");
    let foes: Vec<_> = (1..=4)
        .map(|seed| {
            let mut puppet = Foe::join(&scene.net, seed).dial(&scene.alice);
            let (id, pieces) = (scene.of.id, scene.of.layout.pieces());
            let socket = puppet.socket.try_clone().unwrap();
            let flood = thread::spawn(move || {
                let all = || (0..pieces).map(Piece).collect::<Vec<_>>();
                for channel in 0..1_000 {
                    puppet.say(&Frame::Open(ours(channel), id));
                }
                // Not read from: it takes nothing of what it wants.
                for round in 0..2_000u16 {
                    let channel = ours(round % 1_000);
                    puppet.say(&Frame::Want(channel, all()));
                    puppet.say(&Frame::Cancel(channel, all()));
                }
            });
            (flood, socket)
        })
        .collect();
    let (_, took) = scene.bob_fetches("copy");
    println!("{took:?} beside four floods instead of {honest:?}");
    for (flood, socket) in foes {
        let _ = socket.shutdown(std::net::Shutdown::Both);
        flood.join().unwrap();
    }
    scene.bob_fetches("again");
}

/// A host told of a victim's address under ever new keys. They filled the memory for hosts, and those
/// that the index knew found no room: the fetch ended without a source. And as it was silent when it
/// was asked for its list of pieces, no other was ever asked for that.
#[test]
fn hosts_told_of_by_another_neither_keep_honest_ones_out_nor_have_a_victim_called_over_and_over() {
    let net = Net::new();
    let (alice, bob) = (net.peer("alice"), net.peer("bob"));
    let bytes = made_up("film", 3 << 20);
    let file = net.file("film", &bytes);
    let foe = Foe::join(&net, 1);
    let id = alice.share(&file, Some("film")).unwrap().id;
    let of = Original::of(id, &bytes, &alice, &foe);
    alice.unshare(&id.to_string()).unwrap();
    foe.registers(of.item()).unwrap();

    let victims = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let download = bob.get(&id.to_string(), net.dir.path().join("copy")).unwrap();
    let (socket, _) = foe.listener.accept().unwrap();
    let mut puppet = Puppet::answer_as(socket, &foe.key, &foe.session.certificate);
    let channel = puppet.hear(|frame| match frame {
        Frame::Open(channel, _) => channel,
        other => panic!("{other:?}"),
    });
    let (size, proof) = (bytes.len() as u64, of.proof.len() as u32);
    puppet.say(&Frame::Opened { channel, size, manifest: 0, proof });
    for round in 0..500u32 {
        let victim = victims[round as usize % 2].local_addr().unwrap();
        let mut told = vec![(PeerId([0xee; 32]), victim)];
        told.extend((0..40).map(|nth: u8| {
            let seed = [&round.to_le_bytes()[..], &[nth]].concat();
            (PeerId(*blake3::hash(&seed).as_bytes()), victim)
        }));
        puppet.say(&Frame::Hosts(channel, told));
    }
    // Answered when all of that was heard (bob knows nothing of this one); or it is left before, for
    // its silence.
    puppet.say(&Frame::Open(ours(1), ContentId::file([7; 32])));
    let answered = |frame: Frame<'_>| matches!(frame, Frame::Close(closed) if closed == ours(1));
    while matches!(puppet.try_to_hear(answered), Ok(false)) {}
    let calls: u32 = victims
        .iter()
        .map(|victim| {
            victim.set_nonblocking(true).unwrap();
            std::iter::from_fn(|| victim.accept().ok()).count() as u32
        })
        .sum();
    println!("{calls} calls at the victim for 20,500 words of it");
    assert!(calls <= 64, "{calls}");

    alice.share(&file, Some("film")).unwrap();
    let done = download.wait().unwrap();
    assert!(fs::read(done.path).unwrap() == bytes);
}

/// What a host offered before its list of pieces came was kept without end.
#[test]
fn a_host_that_offers_without_end_before_its_list_of_pieces_is_left() {
    let scene = Scene::new(1 << 20, 1 << 20);
    let foe = Foe::join(&scene.net, 1);
    scene.alice.unshare(&scene.of.id.to_string()).unwrap();
    foe.registers(scene.of.item()).unwrap();
    let download = scene.bob.get(&scene.of.id.to_string(), scene.net.dir.path().join("copy"));
    let (socket, _) = foe.listener.accept().unwrap();
    let mut puppet = Puppet::answer_as(socket, &foe.key, &foe.session.certificate);
    let channel = puppet.hear(|frame| match frame {
        Frame::Open(channel, _) => channel,
        other => panic!("{other:?}"),
    });
    let (size, proof) = (scene.of.bytes.len() as u64, scene.of.proof.len() as u32);
    puppet.say(&Frame::Opened { channel, size, manifest: 0, proof });
    for _ in 0..50 {
        puppet.say(&Frame::Grant(channel, (0..1_000).map(Piece).collect()));
    }
    let ended = loop {
        let heard = puppet.try_to_hear(|frame| match frame {
            Frame::Bye(why, _) => Some(why),
            _ => None,
        });
        match heard {
            Ok(None) => {}
            Ok(Some(why)) => break Some(why),
            Err(_) => break None,
        }
    };
    assert_eq!(ended, Some(Goodbye::Protocol));
    drop(download);
    let mut index_lists = 0;
    scene.bob.handle(Request::List { glob: "*".into() }, &mut |event| {
        index_lists += u32::from(matches!(event, Event::Listing { .. }));
        true
    });
    assert_eq!(index_lists, 1, "and it goes on with its work");
}

/// Whoever opened what was not known here yet was refused, and both looked for each other again a
/// second later.
#[test]
fn who_opens_what_is_not_known_here_yet_is_answered_once_it_is() {
    let scene = Scene::new(1 << 20, 1 << 20);
    let (first, other) = (Foe::join(&scene.net, 1), Foe::join(&scene.net, 2));
    let id = scene.of.id;
    scene.alice.unshare(&id.to_string()).unwrap();
    first.registers(scene.of.item()).unwrap();
    let download = scene.bob.get(&id.to_string(), scene.net.dir.path().join("copy")).unwrap();
    let (socket, _) = first.listener.accept().unwrap();
    let mut host = Puppet::answer_as(socket, &first.key, &first.session.certificate);
    let channel = host.hear(|frame| match frame {
        Frame::Open(channel, _) => channel,
        other => panic!("{other:?}"),
    });

    let mut reader = other.dial(&scene.bob);
    reader.say(&Frame::Open(ours(1), id));
    reader.say(&Frame::Open(ours(2), ContentId::file([7; 32])));
    let refused = |frame: Frame<'_>| match frame {
        Frame::Close(closed) => {
            assert_eq!(closed, ours(2), "only what it knows nothing of");
            true
        }
        frame => {
            assert!(!matches!(frame, Frame::Opened { .. }), "{frame:?}");
            false
        }
    };
    while !reader.hear(refused) {}

    let (size, proof) = (scene.of.bytes.len() as u64, scene.of.proof.len() as u32);
    host.say(&Frame::Opened { channel, size, manifest: 0, proof });
    host.say(&Frame::Have(channel, Bitfield::all(scene.of.layout.pieces())));
    while !host.hear(|frame| matches!(frame, Frame::WantMeta(_))) {}
    host.say(&Frame::Meta(channel, &scene.of.proof));
    let opened = |frame: Frame<'_>| match frame {
        Frame::Opened { channel, .. } => channel == ours(1),
        frame => {
            assert!(!matches!(frame, Frame::Close(_)), "{frame:?}");
            false
        }
    };
    while !reader.hear(opened) {}
    drop(download);
}
