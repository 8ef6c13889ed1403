//! Who gets in, who is put out, and what a stranger hears: with real processes and real sockets.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{Machine, Table, Under, made_of, made_up, table, until};
use potluck::control::Event;

/// A new invitation, and its id.
fn invites(index: &Machine, args: &[&str]) -> (String, String) {
    match index.does(&[&["invite"], args].concat()) {
        Event::Invited { invite, id, .. } => (invite, id),
        other => panic!("{other:?}"),
    }
}

/// Whom a machine is connected to.
fn connected(machine: &Machine) -> Vec<String> {
    match machine.does(&["peers"]) {
        Event::Peers { peers } => peers.into_iter().map(|peer| peer.label).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_invitation_for_one_lets_one_of_many_in() {
    let Table { dir, index, peers: [] } = table([]);
    let (invite, _) = invites(&index, &["--uses", "1"]);
    let machines: Vec<Machine> =
        (0..8).map(|nth| Machine::start(dir.path(), &format!("m{nth}"), "up")).collect();
    let outcomes: Vec<(i32, Event)> = thread::scope(|scope| {
        let joining: Vec<_> = machines
            .iter()
            .map(|machine| scope.spawn(|| machine.begins(&["join", &invite]).ends()))
            .collect();
        joining.into_iter().map(|join| join.join().unwrap()).collect()
    });
    let codes = |wanted: i32| outcomes.iter().filter(|(code, _)| *code == wanted).count();
    assert_eq!((codes(0), codes(4)), (1, 7), "{outcomes:?}");
    let Event::Members { members } = index.does(&["members"]) else { panic!() };
    assert_eq!(members.len(), 1, "{members:?}");
    let refused = outcomes.iter().find(|(code, _)| *code == 4).unwrap();
    let text = refused.1.failure().unwrap().message;
    assert!(text.contains("used"), "it says that it is used up: {text}");
}

#[test]
fn an_expired_invitation_lets_nobody_in() {
    let Table { dir, index, peers: [] } = table([]);
    let (invite, _) = invites(&index, &["--uses", "1000", "--valid", "1s"]);
    // Who is a member stays one: every try is another machine's.
    let mut tries = 0;
    let refused = until("an end of the invitation", || {
        tries += 1;
        let machine = Machine::start(dir.path(), &format!("late{tries}"), "up");
        let (code, mut events) = machine.run(&["join", &invite]);
        assert!(code == 0 || code == 4, "{events:?}");
        events.pop().filter(|_| code == 4)
    });
    let failure = refused.failure().unwrap();
    assert!(failure.message.contains("expired"), "{failure}");
    assert!(failure.hint.is_some(), "it says what to do");
}

#[test]
fn a_removed_machine_is_out_and_the_others_go_on() {
    let Table { dir: _dir, index, peers: [alice, bob, carol] } = table(["alice", "bob", "carol"]);
    let bytes = made_up(1_000_000);
    alice.shares("film", &bytes);
    bob.gets("film");
    carol.gets("film");
    bob.shares("bobs", b"of bob alone");
    until("connections", || connected(&alice).contains(&"bob".to_owned()).then_some(()));
    assert_eq!(carol.lists().len(), 2);

    assert_eq!(index.does(&["members", "rm", "bob"]), Event::Removed { count: 1 });
    let (code, text) = bob.fails_with(&["ls"]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("removed"), "{text}");
    let rows = carol.lists();
    let shown: Vec<_> = rows.iter().map(|row| (row.name.as_deref(), row.complete)).collect();
    assert_eq!(shown, [(Some("film"), 2)], "what it hosted is gone at once");

    for machine in [&alice, &carol] {
        until("an end of its connections", || {
            (!connected(machine).contains(&"bob".to_owned())).then_some(())
        });
    }
    assert!(connected(&alice).contains(&"carol".to_owned()), "others stay connected");
    alice.shares("song", &made_of("song", 1_000));
    carol.gets("song");
    assert_eq!(bob.fails(&["share", "bobs"]), 4);
}

#[test]
fn another_network_has_nothing_of_this_one() {
    let Table { dir: _dir, index: _index, peers: [alice] } = table(["alice"]);
    let Table { dir: _theirs, index: _other, peers: [mallory] } = table(["mallory"]);
    let id = alice.shares("film", &made_up(1_000));
    for what in ["film", &id] {
        let (code, text) = mallory.fails_with(&["get", what, "--timeout", "1s"]);
        assert_eq!(code, 3, "{text}");
    }
    assert_eq!(mallory.lists(), vec![]);
}

/// What was seen of a name was kept under the name alone, so that the same name in another network was
/// taken for a lie of its index.
#[test]
fn a_name_that_was_seen_in_one_network_says_nothing_in_another() {
    let Table { dir: _dir, index: _index, peers: [alice, bob] } = table(["alice", "bob"]);
    let Table { dir: _theirs, index: other, peers: [mallory] } = table(["mallory"]);
    alice.shares("film", b"one");
    alice.shares("film", b"two");
    bob.gets("film");
    bob.does(&["unshare", "film"]);
    bob.does(&["leave"]);
    bob.joins(&other.invitation());
    mallory.shares("film", b"another's");
    let (at, _) = bob.gets_with(&["film", "-o", "theirs"]);
    assert_eq!(fs::read(at).unwrap(), b"another's");
}

#[test]
fn a_reader_fetches_and_serves_on_but_publishes_nothing() {
    let Table { dir, index, peers: [alice, carol] } = table(["alice", "carol"]);
    let reader = Machine::start(dir.path(), "reader", "up");
    let (invite, _) = invites(&index, &["--role", "read"]);
    let Event::Joined { role, .. } = reader.does(&["join", &invite]) else { panic!() };
    assert_eq!(role, "read");

    let bytes = made_up(1_000_000);
    let id = alice.shares("film", &bytes);
    reader.gets("film");
    until("its copy", || (carol.lists()[0].complete == 2).then_some(()));
    fs::write(reader.home.join("mine"), b"mine").unwrap();
    for args in [&["share", "mine"][..], &["share", "mine", "--name", "other"]] {
        let (code, text) = reader.fails_with(args);
        assert_eq!(code, 4, "{text}");
    }
    assert_eq!(carol.lists().len(), 1);
    assert_eq!(reader.hosts().iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), [id.as_str()]);

    alice.leaves();
    let (at, from) = carol.gets("film");
    assert!(fs::read(at).unwrap() == bytes);
    assert_eq!(from, [("reader".to_owned(), 1_000_000)]);
}

#[test]
fn a_state_folder_has_one_process() {
    let Table { dir: _dir, index, peers: [alice] } = table(["alice"]);
    for (machine, verb) in [(&alice, "up"), (&index, "index")] {
        let (code, text) = machine.fails_with(&[verb, "--listen", "127.0.0.1:0"]);
        assert_eq!(code, 10, "{text}");
        assert!(text.contains("runs already for"), "{text}");
    }
    assert_eq!(alice.lists(), vec![]);
}

/// Whatever is said, at whatever level: no key, no invitation, and nothing in a core either.
#[test]
fn secrets_are_in_no_log_and_no_core() {
    let dir = tempfile::tempdir().unwrap();
    let (log, home) = (dir.path().join("log"), dir.path().join("alice"));
    let index = Machine::start(dir.path(), "index", "index");
    let invite = index.invitation();
    fs::create_dir(&home).unwrap();
    let logs = "exec \"$@\" 2> \"$0\"";
    let sh = ["sh", "-c", logs, log.to_str().unwrap()].map(Into::into).into();
    let by = Under { process: sh, verbs: vec![] };
    let alice = Machine::start_by(home, "alice", "up", &["-vv"], by);
    alice.joins(&invite);
    alice.shares("film", &made_up(1_000));
    // What a person mistypes is shown to that person alone.
    assert_ne!(alice.run(&["join", &format!("{invite}x")]).0, 0);
    let said = fs::read(&log).unwrap();
    assert!(said.len() > 100, "it logs");
    let has = |secret: &[u8]| said.windows(secret.len()).any(|window| window == secret);
    let key = fs::read(alice.state().join("peer/key")).unwrap();
    let hex: String = key[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(!has(&key[..8]) && !has(hex.as_bytes()));
    let secret = invite.split_once('@').unwrap().0;
    assert!(!has(secret.as_bytes()), "an invitation is a secret");
    for machine in [&index, &alice] {
        let of =
            |file: &str| fs::read_to_string(format!("/proc/{}/{file}", machine.pid())).unwrap();
        let limits = of("limits");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["0", "0"], "{core}");
        assert_eq!(u64::from_str_radix(of("coredump_filter").trim(), 16), Ok(0));
    }
}

/// Stands between members and the index, on TCP and UDP, and keeps what members send by UDP.
struct Wire {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Wire {
    fn to(index: SocketAddr, tcp: TcpListener, udp: UdpSocket) -> Self {
        let address = tcp.local_addr().unwrap();
        thread::spawn(move || {
            while let Ok((here, _)) = tcp.accept() {
                let there = TcpStream::connect(index).unwrap();
                let ends = [(&here, &there), (&there, &here)];
                for (from, to) in
                    ends.map(|(a, b)| (a.try_clone().unwrap(), b.try_clone().unwrap()))
                {
                    thread::spawn(move || pass(from, to));
                }
            }
        });
        let heard = Arc::new(Mutex::new(Vec::new()));
        let keep = heard.clone();
        thread::spawn(move || {
            let mut member = None;
            let mut buffer = [0; 2_048];
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let datagram = &buffer[..length];
                if from == index {
                    if let Some(member) = member {
                        udp.send_to(datagram, member).unwrap();
                    }
                } else {
                    member = Some(from);
                    keep.lock().unwrap().push(datagram.to_vec());
                    udp.send_to(datagram, index).unwrap();
                }
            }
        });
        Self { address, heard }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 4_096];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// The same port on TCP and UDP.
fn both() -> (TcpListener, UdpSocket) {
    until("a port free on both", || {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind(tcp.local_addr().unwrap()).ok()?;
        Some((tcp, udp))
    })
}

#[test]
fn a_stranger_gets_no_byte_back_for_noise_or_for_what_it_overheard() {
    let dir = tempfile::tempdir().unwrap();
    let (tcp, udp) = both();
    let at = tcp.local_addr().unwrap().to_string();
    let options = ["--heartbeat", "1", "--advertise", &at];
    let index = Machine::start_with(dir.path(), "index", "index", &options);
    let wire = Wire::to(index.address().parse().unwrap(), tcp, udp);
    assert_eq!(wire.address.to_string(), at);
    let alice = Machine::start(dir.path(), "alice", "up");
    alice.joins(&index.invitation());
    alice.shares("film", &made_up(1_000));
    alice.lists();
    let overheard = wire.heard.lock().unwrap().clone();
    assert!(overheard.len() >= 3, "{}", overheard.len());

    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.connect(index.address()).unwrap();
    for length in (0..1_400).step_by(7) {
        let mut noise = made_of("noise", length);
        stranger.send(&noise).unwrap();
        // The same where it looks like a request.
        if let [kind, version, ..] = &mut noise[..] {
            (*kind, *version) = (b"RSOT"[length % 4], 1);
            stranger.send(&noise).unwrap();
        }
    }
    for datagram in &overheard {
        stranger.send(datagram).unwrap();
        let mut bent = datagram.clone();
        bent[50] ^= 1;
        stranger.send(&bent).unwrap();
    }
    // Answered after all of that was read: an answer to any of it would be here before.
    assert_eq!(alice.lists().len(), 1);
    stranger.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let answer = stranger.recv(&mut [0; 2_048]);
    assert!(answer.is_err(), "{answer:?}");
}
