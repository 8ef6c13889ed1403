//! An index that lies, told to the real program: it holds its network's key and speaks the real
//! protocol, but says of names, contents, hosts and the listing whatever it likes.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use common::{Machine, made_of, made_up, until};
use potluck::control::Event;
use potluck::{Invitation, Role, testing};
use potluck_core::id::{ContentId, Kind, MemberNumber, NetworkId, PeerId, Version};
use potluck_core::registrar::Caller;
use potluck_core::seal::{EpochSecret, ReplyHead, RequestHead, open, seal_reply};
use potluck_core::time::WallTime;
use potluck_core::trust::{Certificate, MachineKey, NameRecord};
use potluck_core::wire::datagram::{
    Ack, Code, Found, HELD_ALL, Host, Item, MAX_DATAGRAM, Notice, Page, Refusal, Registered, Reply,
    Request, Row, RowKey, Target, Watching,
};
use potluck_core::wire::desk::{Answer, Ask, Session};

const EPOCH: EpochSecret = EpochSecret([5; 32]);
const BOOT: u64 = 1;

fn wall() -> WallTime {
    WallTime(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
}

/// What it says instead of the truth, where it says something else.
type Lie = Box<dyn FnMut(&Request) -> Option<Reply> + Send>;

/// What an index knows.
#[derive(Default)]
struct Book {
    members: Vec<PeerId>,
    hosts: BTreeMap<(PeerId, ContentId), (Item, SocketAddr)>,
    /// All records that it was ever told.
    records: Vec<NameRecord>,
    /// Requests by their letter.
    asked: BTreeMap<u8, u32>,
    /// Who asked last, and the head of what it asked.
    line: Option<(SocketAddr, RequestHead)>,
}

/// An index that tells the truth until it is given a lie.
struct Liar {
    key: Arc<MachineKey>,
    at: SocketAddr,
    socket: UdpSocket,
    book: Arc<Mutex<Book>>,
    lie: Arc<Mutex<Option<Lie>>>,
    counter: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _desk: Box<dyn Send>,
}

impl Liar {
    fn new() -> Self {
        let key = Arc::new(MachineKey::from_seed([77; 32]));
        let (desk, socket) = until("a port free on both", || {
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            let udp = UdpSocket::bind(tcp.local_addr().unwrap()).ok()?;
            Some((tcp, udp))
        });
        let at = desk.local_addr().unwrap();
        let book = Arc::new(Mutex::new(Book::default()));
        let (of, known) = (Arc::clone(&key), Arc::clone(&book));
        let desk = testing::serve_desk(desk, Arc::clone(&key), move |caller, ask| {
            known.lock().unwrap().at_desk(&of, &caller, ask)
        });
        let lie = Arc::<Mutex<Option<Lie>>>::default();
        let (counter, closed) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let mut liar = Self {
            key,
            at,
            socket,
            book,
            lie,
            counter,
            closed,
            thread: None,
            _desk: Box::new(desk.unwrap()),
        };
        liar.thread = Some(liar.answers());
        liar
    }

    fn answers(&self) -> JoinHandle<()> {
        let socket = self.socket.try_clone().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (book, lie) = (Arc::clone(&self.book), Arc::clone(&self.lie));
        let (counter, closed) = (Arc::clone(&self.counter), Arc::clone(&self.closed));
        let network = self.network();
        thread::spawn(move || {
            let mut buffer = [0; MAX_DATAGRAM];
            while !closed.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let datagram = &mut buffer[..length];
                let head = RequestHead::decode(datagram).unwrap();
                let keys = EPOCH.session(network, head.member, head.salt);
                let plaintext = open(&keys.to_index, head.counter, datagram).unwrap();
                let (id, request) = Request::decode(head.kind, plaintext).unwrap();
                let mut book = book.lock().unwrap();
                *book.asked.entry(head.kind).or_default() += 1;
                book.line = Some((from, head));
                let truth = book.answer(head.member, from, &request);
                drop(book);
                let lie = lie.lock().unwrap().as_mut().and_then(|lie| lie(&request));
                let reply = lie.unwrap_or(truth);
                let counter = counter.fetch_add(1, Ordering::Relaxed);
                let sealed = sealed(network, &head, counter, reply.kind(), &reply.encode(id));
                socket.send_to(&sealed, from).unwrap();
            }
        })
    }

    fn network(&self) -> NetworkId {
        self.key.network()
    }

    fn machine(&self, dir: &tempfile::TempDir, name: &str) -> Machine {
        let machine = Machine::start(dir.path(), name, "up");
        let until = WallTime(wall().0 + 7_200);
        let at = vec![self.at.to_string()];
        machine.joins(&Invitation::new(self.network(), [9; 16], until, at).to_string());
        machine
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap()
    }

    fn lies(&self, lie: impl FnMut(&Request) -> Option<Reply> + Send + 'static) {
        *self.lie.lock().unwrap() = Some(Box::new(lie));
    }

    /// Says this to whoever searches.
    fn says(&self, found: Found) {
        self.lies(move |request| match request {
            Request::Search(_) => Some(Reply::Ack(Ack::Found(found.clone()))),
            _ => None,
        });
    }

    fn tells_the_truth(&self) {
        *self.lie.lock().unwrap() = None;
    }

    /// Pushes a notice to whoever asked last.
    fn notices(&self, notice: &Notice) {
        let (to, head) = self.book().line.unwrap();
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        let sealed = sealed(self.network(), &head, counter, b'N', &notice.encode());
        self.socket.send_to(&sealed, to).unwrap();
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

fn sealed(
    network: NetworkId,
    to: &RequestHead,
    counter: u64,
    kind: u8,
    plaintext: &[u8],
) -> Vec<u8> {
    let keys = EPOCH.session(network, to.member, to.salt);
    let (epoch, member, salt) = (to.epoch, to.member, to.salt);
    let (boot, revocations, flags) = (BOOT, 0, 0);
    let head = ReplyHead { kind, epoch, member, salt, counter, boot, revocations, flags };
    seal_reply(&keys.reply_key(BOOT), &head, plaintext)
}

fn refused(code: Code) -> Reply {
    Reply::Error(Refusal { code, text: "nothing of that".into(), cookie: None })
}

impl Book {
    fn at_desk(&mut self, key: &MachineKey, caller: &Caller, ask: Ask) -> Option<Answer> {
        let number = match self.members.iter().position(|peer| *peer == caller.peer) {
            Some(at) => at,
            None => {
                self.members.push(caller.peer);
                self.members.len() - 1
            }
        };
        let member = MemberNumber(number as u32);
        let issue = |label: &str| {
            Certificate::issue(key, caller.peer, member, Role::Publish, label, wall())
        };
        match ask {
            Ask::Join(join) => Some(Answer::Welcome(Box::new(issue(&join.label)))),
            Ask::Session { label, .. } => {
                let (epoch, salt) = (1, 3);
                Some(Answer::Session(Box::new(Session {
                    member,
                    epoch,
                    salt,
                    keys: EPOCH.session(key.network(), member, salt),
                    heartbeat_s: 1,
                    valid_s: 3_600,
                    certificate: issue(&label),
                    revocations: None,
                })))
            }
            _ => None,
        }
    }

    /// The truth.
    fn answer(&mut self, member: MemberNumber, from: SocketAddr, request: &Request) -> Reply {
        let peer = self.members[member.0 as usize];
        Reply::Ack(match request {
            Request::Register(said) => {
                for item in &said.items {
                    let at = SocketAddr::new(from.ip(), said.port);
                    self.hosts.insert((peer, item.id), (item.clone(), at));
                    self.records.extend(item.name.clone());
                }
                let (lease_s, heartbeat_s, repeat_all) = (90, 1, false);
                Ack::Registered(Registered { lease_s, heartbeat_s, repeat_all, refused: vec![] })
            }
            Request::Search(search) => {
                let found = match &search.target {
                    Target::Id(id) => self.found(*id, None),
                    Target::Name(name, version) => self.newest(name.as_str(), *version),
                };
                match found {
                    Some(found) => Ack::Found(found),
                    None => return refused(Code::NotFound),
                }
            }
            Request::List(_) => {
                let rows = self.hosts.values().map(|(item, _)| row(item.id, item.size)).collect();
                Ack::Page(Page { sequence: 1, rows, more: false })
            }
            Request::Deregister(ids) => {
                self.hosts.retain(|(host, id), _| *host != peer || !ids.contains(id));
                Ack::Deregistered
            }
            Request::Watch(_) => {
                Ack::Watching(Watching { lease_s: 90, sequence: 1, missed: false })
            }
        })
    }

    fn found(&self, id: ContentId, record: Option<NameRecord>) -> Option<Found> {
        let of = |((peer, content), (item, address)): (&(PeerId, ContentId), &(Item, _))| {
            let host = Host { peer: *peer, address: *address, held: item.held, load: 0 };
            (*content == id).then_some((item.size, host))
        };
        let (sizes, hosts): (Vec<u64>, Vec<Host>) = self.hosts.iter().filter_map(of).unzip();
        let hosts_in_all = hosts.len() as u32;
        Some(Found { id, size: *sizes.first()?, record, hosts_in_all, hosts })
    }

    fn newest(&self, name: &str, version: Option<Version>) -> Option<Found> {
        let fits = |record: &&NameRecord| {
            record.name.as_str() == name && version.is_none_or(|wanted| wanted == record.version)
        };
        let record = self.records.iter().filter(fits).max_by_key(|record| record.version)?;
        self.found(record.id, Some(record.clone()))
    }
}

fn row(id: ContentId, size: u64) -> Row {
    let key = RowKey { name: None, id };
    Row { key, size, hosts: 1, complete: 1, version: None, publisher: None }
}

/// A machine's own key, as only a test has it.
fn key_of(machine: &Machine) -> MachineKey {
    let seed = fs::read(machine.state().join("peer/key")).unwrap();
    MachineKey::from_seed(seed.try_into().unwrap())
}

/// Integrity: bytes or words are not what they should be.
const LIED_TO: i32 = 7;
/// Nobody has what is missing.
const NO_SOURCE: i32 = 5;

#[test]
fn a_name_is_its_publishers_word_and_never_older_than_was_seen() {
    let (liar, dir) = (Liar::new(), tempfile::tempdir().unwrap());
    let [alice, bob] = ["alice", "bob"].map(|name| liar.machine(&dir, name));
    let [old, new] = [made_of("old", 300_000), made_of("new", 400_000)];
    alice.shares("film", &old);
    alice.shares("song", &made_of("song", 1_000));
    let id = alice.shares("film", &new);
    let (at, _) = bob.gets_with(&["film", "-o", "first"]);
    assert!(fs::read(at).unwrap() == new);
    bob.does(&["unshare", "first"]);

    let truth = liar.book().newest("film", None).unwrap();
    assert_eq!(truth.id.to_string(), id);
    let record = |name: &str, version| {
        let book = liar.book();
        let fits = |r: &&NameRecord| r.name.as_str() == name && r.version == Version(version);
        book.records.iter().find(fits).unwrap().clone()
    };
    let [first, second, song] = [record("film", 1), record("film", 2), record("song", 1)];
    let mallory = MachineKey::from_seed([66; 32]);
    let signed_by = |key: &MachineKey, network| {
        NameRecord::sign(key, network, second.name.clone(), Version(9), truth.id, wall())
    };
    let theirs = signed_by(&mallory, liar.network());
    let forged = NameRecord { publisher: alice_of(&second), ..theirs.clone() };
    let elsewhere = signed_by(&key_of(&alice), NetworkId([1; 32]));
    let says = |record: Option<&NameRecord>, id: ContentId| {
        let record = record.map(|record| NameRecord { id, ..record.clone() });
        Found { id, record, ..truth.clone() }
    };
    let lies = [
        ("the old version", "film", says(Some(&first), first.id)),
        ("another content under the new version", "film", says(Some(&second), first.id)),
        ("no record", "film", says(None, truth.id)),
        ("another publisher's", "film", says(Some(&theirs), truth.id)),
        ("forged", "film", says(Some(&forged), truth.id)),
        ("of another network", "film", says(Some(&elsewhere), truth.id)),
        ("of another name", "film", says(Some(&song), song.id)),
        ("of another version than asked for", "film@2", says(Some(&first), first.id)),
        ("of a later one than asked for", "film@1", says(Some(&second), second.id)),
    ];
    for (what, wanted, found) in lies {
        liar.says(found);
        let (code, text) = bob.fails_with(&["get", wanted, "-o", "lie"]);
        println!("{what}: {text}");
        assert_eq!(code, LIED_TO, "{what}: {text}");
        assert!(!bob.home.join("lie").exists(), "{what}");
        assert_eq!(bob.hosts().len(), 0, "{what}: nothing of it is kept");
    }
    liar.tells_the_truth();
    let (at, _) = bob.gets_with(&["film", "-o", "again"]);
    assert!(fs::read(at).unwrap() == new);
}

fn alice_of(record: &NameRecord) -> PeerId {
    record.publisher
}

/// The index's word was taken for which version a publisher's own name has: a false one took its
/// versions away for ever, and one that knew nothing of it had it sign a second version 1.
#[test]
fn a_publisher_believes_itself_which_version_its_name_has() {
    let (liar, dir) = (Liar::new(), tempfile::tempdir().unwrap());
    let alice = liar.machine(&dir, "alice");
    let version = |event| match event {
        Event::Shared { version, .. } => version,
        other => panic!("{other:?}"),
    };
    let shares = |text: &str| {
        fs::write(alice.home.join("film"), text).unwrap();
        version(alice.does(&["share", "film"]))
    };
    assert_eq!((shares("one"), shares("two")), (Some(1), Some(2)));
    let truth = liar.book().newest("film", None).unwrap();
    let real = truth.record.clone().unwrap();
    liar.says(Found { record: Some(NameRecord { version: Version(u32::MAX), ..real }), ..truth });
    fs::write(alice.home.join("film"), "three").unwrap();
    let (code, text) = alice.fails_with(&["share", "film"]);
    assert_eq!(code, LIED_TO, "{text}");
    let knows_nothing = |request: &Request| match request {
        Request::Search(_) => Some(refused(Code::NotFound)),
        _ => None,
    };
    liar.lies(knows_nothing);
    assert_eq!(shares("four"), Some(3));
    // The record of the version before, which is genuine, is no reason to sign version 3 again.
    let old = liar.book().records.iter().find(|r| r.version == Version(2)).cloned();
    let id = old.as_ref().unwrap().id;
    liar.says(Found { id, size: 3, record: old, hosts_in_all: 0, hosts: vec![] });
    assert_eq!(shares("five"), Some(4));
}

/// Takes calls at a port that is no member's, and says nothing; how many there were.
fn stranger() -> (SocketAddr, Arc<AtomicU64>) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let (at, calls) = (port.local_addr().unwrap(), Arc::<AtomicU64>::default());
    let count = Arc::clone(&calls);
    thread::spawn(move || {
        while let Ok((socket, _)) = port.accept() {
            count.fetch_add(1, Ordering::Relaxed);
            drop(socket);
        }
    });
    (at, calls)
}

#[test]
fn false_words_of_a_content_its_size_and_its_hosts_bring_no_wrong_byte() {
    let (liar, dir) = (Liar::new(), tempfile::tempdir().unwrap());
    let [alice, bob, carol] = ["alice", "bob", "carol"].map(|name| liar.machine(&dir, name));
    let bytes = made_up(3_000_000);
    let text = alice.shares("film", &bytes);
    let id: ContentId = text.parse().unwrap();
    let other: ContentId = alice.shares("other", &made_of("other", 3_000_000)).parse().unwrap();
    let truth = liar.book().found(id, None).unwrap();
    let fails = |what: &str, wanted: &str, code: i32| {
        let args = ["get", wanted, "-o", "lie", "--timeout", "2s"];
        let (got, text) = bob.fails_with(&args);
        println!("{what}: {text}");
        assert_eq!(got, code, "{what}: {text}");
        assert!(!bob.home.join("lie").exists(), "{what}");
        bob.run(&["unshare", wanted]);
        assert_eq!(bob.hosts().len(), 0, "{what}");
    };

    liar.says(Found { id: other, ..truth.clone() });
    fails("another content", &text, LIED_TO);
    for size in [0, 1, 2_999_999, 3_000_001, 1 << 43] {
        liar.says(Found { size, ..truth.clone() });
        fails(&format!("{size} bytes"), &text, LIED_TO);
    }
    // A content that nobody has, said to be at a host that has another.
    let nothing = ContentId { hash: [3; 32], ..id };
    liar.says(Found { id: nothing, ..truth.clone() });
    fails("a content of nobody's", &nothing.to_string(), NO_SOURCE);
    let folder = ContentId { kind: Kind::Folder, ..id };
    liar.says(Found { id: folder, ..truth.clone() });
    fails("a folder that is a file", &folder.to_string(), NO_SOURCE);

    // Hosts that are none: ever new keys, at the address of somebody else, and a member's key there.
    let (at, calls) = stranger();
    let (searches, counted) = (Arc::<AtomicU64>::default(), calls);
    let (count, of, member) = (Arc::clone(&searches), truth.clone(), key_of(&carol).peer());
    liar.lies(move |request| match request {
        Request::Search(_) => {
            let round = count.fetch_add(1, Ordering::Relaxed);
            let mut hosts: Vec<Host> = (0..19u64)
                .map(|nth| {
                    let seed = [round.to_be_bytes(), nth.to_be_bytes()].concat();
                    let peer = PeerId(*blake3::hash(&seed).as_bytes());
                    Host { peer, address: at, held: HELD_ALL, load: 0 }
                })
                .collect();
            hosts.push(Host { peer: member, address: at, held: HELD_ALL, load: 0 });
            Some(Reply::Ack(Ack::Found(Found { hosts, ..of.clone() })))
        }
        _ => None,
    });
    fails("hosts that are none", &text, NO_SOURCE);
    let (calls, searches) = (counted.load(Ordering::Relaxed), searches.load(Ordering::Relaxed));
    println!("{calls} calls at the victim for {searches} answers that named it 20 times each");
    assert!(calls > 0, "it was called");
    // Each under its key: at once, and after 0.5, 1, 2, 4 … 15 s.
    assert!(calls <= 20 * 6 * searches, "{calls} calls for {searches} answers");

    // The same with one word of truth.
    let of = truth.clone();
    liar.lies(move |request| match request {
        Request::Search(_) => {
            let none = |nth: u8| Host { peer: PeerId([nth; 32]), address: at, ..of.hosts[0] };
            let hosts = (1..=19).map(none).chain([of.hosts[0]]).collect();
            Some(Reply::Ack(Ack::Found(Found { hosts, ..of.clone() })))
        }
        _ => None,
    });
    let (path, from) = bob.gets_with(&[&text, "-o", "copy"]);
    assert!(fs::read(path).unwrap() == bytes);
    assert_eq!(from, [("alice".to_owned(), 3_000_000)]);
}

/// The memory that a machine's process holds, in KiB.
fn memory(machine: &Machine) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn made_up_rows(from: u32, count: u32) -> Vec<Row> {
    let id = |n: u32| {
        let mut hash = [0; 32];
        hash[..4].copy_from_slice(&n.to_be_bytes());
        ContentId::file(hash)
    };
    (from..from + count).map(|n| row(id(n), 5)).collect()
}

/// A page of rows that had been told already, or of none, with more to follow, was asked for without
/// end.
#[test]
fn a_listing_that_goes_in_circles_is_refused_and_one_that_is_made_up_does_no_harm() {
    let (liar, dir) = (Liar::new(), tempfile::tempdir().unwrap());
    let bob = liar.machine(&dir, "bob");
    let always = |rows: Vec<Row>, more: bool| {
        liar.lies(move |request| match request {
            Request::List(_) => {
                let (sequence, rows) = (1, rows.clone());
                Some(Reply::Ack(Ack::Page(Page { sequence, rows, more })))
            }
            _ => None,
        });
    };
    let backwards: Vec<Row> = made_up_rows(1, 9).into_iter().rev().collect();
    for (what, rows, more) in [
        ("the same page for ever", made_up_rows(1, 9), true),
        ("no rows, and more to follow", vec![], true),
        ("out of order", backwards, false),
        ("a row twice", [made_up_rows(1, 1), made_up_rows(1, 1)].concat(), false),
    ] {
        always(rows, more);
        let before = liar.book().asked.get(&b'O').copied().unwrap_or(0);
        let (code, text) = bob.fails_with(&["ls"]);
        assert_eq!(code, LIED_TO, "{what}: {text}");
        let asked = liar.book().asked[&b'O'] - before;
        assert!(asked <= 4, "{what}: it was asked for {asked} pages");
    }

    // Rows of nothing: shown, since the listing is the index's word, and no more than that.
    let mut next = 0;
    liar.lies(move |request| match request {
        Request::List(list) => {
            next = if list.after.is_none() { 0 } else { next + 15 };
            let rows = made_up_rows(next, 15);
            let more = next < 15_000;
            Some(Reply::Ack(Ack::Page(Page { sequence: 1, rows, more })))
        }
        _ => None,
    });
    assert!(bob.lists().len() > 15_000);
    let before = memory(&bob);
    let mut watch = bob.begins(&["watch"]);
    watch.says_so(|event| matches!(event, Event::Listing { .. }));
    for n in 0..3_000u64 {
        let rows = made_up_rows(100_000 + n as u32 * 15, 15);
        liar.notices(&Notice { before: n + 1, after: n + 2, rows });
    }
    liar.tells_the_truth();
    assert_eq!(bob.lists().len(), 0);
    let grown = memory(&bob).saturating_sub(before);
    println!("{grown} KiB more after 45,000 rows of nothing");
    assert!(grown < 64 << 10, "{grown} KiB");
}
