//! The worst for the network, with the real program on loopback: connections that say nothing, bits
//! that flip, datagrams that are lost, an index that goes away or elsewhere, IPv6 alone, small packets.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, Table, Under, alone_with, is_run_by, made_of, made_up, sum, table, until};
use potluck::control::{Event, Request};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// So many as are asked for, or few.
fn rounds(few: u32) -> u32 {
    std::env::var("POTLUCK_ROUNDS").map_or(few, |text| text.parse().unwrap())
}

fn is_same(at: &Path, bytes: &[u8]) {
    assert!(fs::read(at).unwrap() == bytes, "{} is not what was shared", at.display());
}

/// As many idle connections as asked for, or as this process may have.
fn idle(to: &str, wanted: usize) -> Vec<TcpStream> {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    // Half of them go elsewhere, and there are others than sockets.
    let most = limit.maximum.map_or(wanted, |most| (most as usize * 9 / 20).min(wanted));
    (0..most)
        .map(|_| {
            let mut socket = TcpStream::connect(to).unwrap();
            // The beginning of a TLS handshake, which may already be refused.
            let _ = socket.write(&[0x16]);
            socket.set_nonblocking(true).unwrap();
            socket
        })
        .collect()
}

/// Those of them that the other side has not hung up on yet, after another byte of each.
fn still_there(sockets: Vec<TcpStream>) -> Vec<TcpStream> {
    let open = |socket: &mut TcpStream| {
        let _ = socket.write(&[3]);
        matches!(socket.read(&mut [0; 16]), Err(e) if e.kind() == ErrorKind::WouldBlock)
    };
    sockets.into_iter().filter_map(|mut socket| open(&mut socket).then_some(socket)).collect()
}

#[test]
fn thousands_of_connections_that_say_a_byte_now_and_then_hold_nobody_up_and_are_culled() {
    let Table { dir, index, peers: [alice, bob] } = table(["alice", "bob"]);
    let bytes = made_up(48 << 20);
    alice.shares("film", &bytes);
    let began = Instant::now();
    is_same(&bob.gets_with(&["film", "-o", "before"]).0, &bytes);
    let alone = began.elapsed();
    bob.does(&["unshare", "film"]);

    let wanted = rounds(2_000).max(2_000) as usize;
    let mut sockets = idle(&alice.address(), wanted);
    sockets.extend(idle(&index.address(), wanted));
    let (many, began) = (sockets.len(), Instant::now());
    is_same(&bob.gets_with(&["film", "-o", "meanwhile"]).0, &bytes);
    let beside = began.elapsed();
    let carol = Machine::start(dir.path(), "carol", "up");
    carol.joins(&index.invitation());
    carol.lists();
    let joined = began.elapsed();
    let culled = until("an end of all", || {
        sockets = still_there(std::mem::take(&mut sockets));
        sockets.is_empty().then(|| began.elapsed())
    });
    println!(
        "{many} idle: a fetch took {beside:?} instead of {alone:?}, a join was done after {joined:?}, the last was culled after {culled:?}"
    );
    carol.gets("film");
}

/// What becomes of bytes on their way through.
#[derive(Clone, Copy)]
enum Way {
    /// One bit of so many bytes flips, once a connection.
    FlipsABitAfter(usize),
    /// Nothing goes through.
    Swallows,
}

/// Stands before a machine's port and hands on, changed, what comes out of it; how many called.
fn stand_before(port: TcpListener, machine: SocketAddr, way: Way) -> Arc<AtomicU64> {
    let calls = Arc::<AtomicU64>::default();
    let count = Arc::clone(&calls);
    thread::spawn(move || {
        let mut kept = Vec::new();
        while let Ok((here, _)) = port.accept() {
            count.fetch_add(1, Ordering::Relaxed);
            match way {
                Way::Swallows => kept.push(here),
                Way::FlipsABitAfter(bytes) => {
                    let there = TcpStream::connect(machine).unwrap();
                    let (to, from) = (there.try_clone().unwrap(), here.try_clone().unwrap());
                    thread::spawn(move || pass(from, to, usize::MAX));
                    thread::spawn(move || pass(there, here, bytes));
                }
            }
        }
    });
    calls
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut until_flip: usize) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if let Some(byte) = buffer[..read].get_mut(until_flip) {
            *byte ^= 4;
        }
        until_flip = until_flip.checked_sub(read).unwrap_or(usize::MAX);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// A machine that listens on another address than the one others see it at, so that somebody can
/// stand before it there.
fn start_behind(dir: &Path, name: &str, way: Way) -> (Machine, Arc<AtomicU64>) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let hidden = SocketAddr::new("127.0.0.2".parse().unwrap(), port.local_addr().unwrap().port());
    let home = dir.join(name);
    fs::create_dir(&home).unwrap();
    let machine = Machine::start_at(&hidden.to_string(), home, name, "up", &[], Under::default());
    let calls = stand_before(port, hidden, way);
    (machine, calls)
}

#[test]
fn bits_that_flip_on_the_way_cost_a_connection_each_and_no_byte_is_wrong() {
    let Table { dir, index, peers: [bob] } = table(["bob"]);
    let (alice, calls) = start_behind(dir.path(), "alice", Way::FlipsABitAfter(9 << 20));
    alice.joins(&index.invitation());
    let bytes = made_up(48 << 20);
    let id = alice.shares("film", &bytes);
    let Event::Done { path, stats, sources, seconds, .. } = bob.does(&["get", &id, "-o", "copy"])
    else {
        panic!()
    };
    is_same(&path, &bytes);
    let (calls, bad) = (calls.load(Ordering::Relaxed), stats.unwrap().fetched.bad);
    println!("{calls} connections in {seconds} s");
    assert!(calls >= 5, "{calls}");
    assert_eq!(bad, 0, "it is noticed before it could be a piece");
    assert_eq!(sources.iter().map(|source| source.bytes).sum::<u64>(), bytes.len() as u64);
}

#[test]
fn a_host_behind_a_port_that_swallows_everything_holds_nobody_up() {
    let Table { dir, index, peers: [bob, carol] } = table(["bob", "carol"]);
    let (alice, calls) = start_behind(dir.path(), "alice", Way::Swallows);
    alice.joins(&index.invitation());
    let bytes = made_up(8 << 20);
    let id = alice.shares("film", &bytes);
    fs::write(carol.home.join("film"), &bytes).unwrap();
    carol.does(&["share", "film", "--name", "carols"]);
    let (at, from) = bob.gets_with(&[&id, "-o", "copy"]);
    is_same(&at, &bytes);
    assert_eq!(from, [("carol".to_owned(), bytes.len() as u64)]);
    until("a call", || (calls.load(Ordering::Relaxed) > 0).then_some(()));
}

/// Stands before an index: TCP goes through, of the datagrams every fifth is lost, both ways.
fn lossy(index: SocketAddr, tcp: TcpListener, udp: UdpSocket) -> Arc<AtomicU64> {
    thread::spawn(move || {
        while let Ok((here, _)) = tcp.accept() {
            let there = TcpStream::connect(index).unwrap();
            let (to, from) = (there.try_clone().unwrap(), here.try_clone().unwrap());
            thread::spawn(move || pass(from, to, usize::MAX));
            thread::spawn(move || pass(there, here, usize::MAX));
        }
    });
    let lost = Arc::<AtomicU64>::default();
    let count = Arc::clone(&lost);
    thread::spawn(move || {
        let (mut member, mut nth, mut buffer) = (None, 0u64, [0; 2_048]);
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            nth += 1;
            if blake3::hash(&nth.to_le_bytes()).as_bytes()[0] < 51 {
                count.fetch_add(1, Ordering::Relaxed);
                if from != index {
                    member = Some(from);
                }
                continue;
            }
            match member {
                Some(member) if from == index => drop(udp.send_to(&buffer[..length], member)),
                _ => {
                    member = Some(from);
                    let _ = udp.send_to(&buffer[..length], index);
                }
            }
        }
    });
    lost
}

#[test]
fn with_a_fifth_of_all_datagrams_lost_both_ways_every_request_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (tcp, udp) = until("a port free on both", || {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind(tcp.local_addr().unwrap()).ok()?;
        Some((tcp, udp))
    });
    let at = tcp.local_addr().unwrap().to_string();
    let options = ["--heartbeat", "1", "--advertise", &at];
    let index = Machine::start_with(dir.path(), "index", "index", &options);
    let lost = lossy(index.address().parse().unwrap(), tcp, udp);
    let alice = Machine::start(dir.path(), "alice", "up");
    alice.joins(&index.invitation());
    alice.shares("film", &made_up(1_000));
    until("its row", || (alice.lists().len() == 1).then_some(()));
    let asks = rounds(400);
    let mut took: Vec<Duration> = thread::scope(|scope| {
        let some: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let ask = || {
                        let began = Instant::now();
                        match alice.asks(&Request::List { glob: "*".into() }).pop() {
                            Some(Event::Listing { .. }) => {}
                            other => panic!("{other:?}"),
                        }
                        began.elapsed()
                    };
                    (0..asks / 4).map(|_| ask()).collect::<Vec<_>>()
                })
            })
            .collect();
        some.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    took.sort();
    let lost = lost.load(Ordering::Relaxed);
    assert!(lost > u64::from(asks) / 5, "{lost}");
    println!(
        "{} of {asks} requests answered, half within {:?}, the last after {:?}; {lost} datagrams lost",
        took.len(),
        took[took.len() / 2],
        took[took.len() - 1]
    );
}

#[test]
fn a_transfer_goes_on_to_its_end_while_the_index_is_gone() {
    let Table { dir: _dir, mut index, peers: [alice, bob] } = table(["alice", "bob"]);
    let bytes = made_up(24 << 20);
    let id = alice.shares("film", &bytes);
    // So many seconds, but for what goes over at first: of another test's many rounds, ten minutes.
    let seconds = rounds(3).min(600) as usize;
    alice.does(&["limit", "--up", &format!("{}B", bytes.len() / seconds)]);
    let get = bob.begins(&["get", &id, "-o", "copy"]);
    until("some of it", || (bob.has(&id) > 0).then_some(()));
    index.is_killed();
    let gone = Instant::now();
    let (code, last) = get.ends();
    assert_eq!(code, 0, "{last:?}");
    println!(
        "the index was gone for {:?} of a transfer that should take {seconds} s",
        gone.elapsed()
    );
    is_same(&bob.home.join("copy"), &bytes);
    index.is_back();
    until("both copies", || (bob.lists().first().map(|row| row.complete) == Some(2)).then_some(()));
}

#[test]
fn an_index_that_is_elsewhere_under_its_name_is_found_there() {
    const NAME: &str = "an_index_that_is_elsewhere_under_its_name_is_found_there";
    let hosts = tempfile::NamedTempFile::new().unwrap();
    let own = format!("mount --bind '{}' /etc/hosts", hosts.path().display());
    if !is_run_by(&alone_with(&["--mount"], &own), NAME, "root: it has names of its own") {
        return;
    }
    assert_eq!(fs::read("/etc/hosts").unwrap(), b"", "not the machine's");
    let dir = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let home = dir.path().join("index");
    fs::create_dir(&home).unwrap();
    let index_at = |ip: &str| {
        fs::write("/etc/hosts", format!("{ip} index.test\n")).unwrap();
        let named = format!("index.test:{port}");
        let more = ["--advertise", &named, "--heartbeat", "1"];
        let listen = format!("{ip}:{port}");
        Machine::start_at(&listen, home.clone(), "index", "index", &more, Under::default())
    };
    let mut index = index_at("127.0.0.1");
    let [alice, bob] = ["alice", "bob"].map(|name| Machine::start(dir.path(), name, "up"));
    alice.joins(&index.invitation());
    index.is_killed();
    let index = index_at("127.0.0.2");
    let moved = Instant::now();
    bob.joins(&index.invitation());
    let bytes = made_up(1 << 20);
    let id = alice.shares("film", &bytes);
    until("who shares", || (bob.lists().first().map(|row| row.hosts) == Some(1)).then_some(()));
    println!("listed {:?} after the index had moved", moved.elapsed());
    is_same(&bob.gets(&id).0, &bytes);
}

/// An index and two peers on this address: a file goes over.
fn goes_over_at(listen: &str) {
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &str, verb: &str| {
        let home = dir.path().join(name);
        fs::create_dir(&home).unwrap();
        Machine::start_at(listen, home, name, verb, &[], Under::default())
    };
    let index = start("index", "index");
    let (alice, bob) = (start("alice", "up"), start("bob", "up"));
    for peer in [&alice, &bob] {
        peer.joins(&index.invitation());
    }
    let bytes = made_of("six", 9 << 20);
    alice.shares("film", &bytes);
    let (at, from) = bob.gets("film");
    is_same(&at, &bytes);
    assert_eq!(sum(&from), bytes.len() as u64);
    until("both copies", || (alice.lists()[0].complete == 2).then_some(()));
}

#[test]
fn it_all_works_where_there_is_only_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        println!("SKIPPED: there is no IPv6 here");
        return;
    }
    goes_over_at("[::1]:0");
}

/// Two machines with a cable between them, in a network of this test's own; run by who is in it.
const CABLE: &str = "mount -t tmpfs tmpfs /run && ip netns add far \
    && ip link add near type veth peer name far netns far \
    && ip link set lo up && ip addr add 10.9.0.1/24 dev near && ip link set near up \
    && ip -n far link set lo up && ip -n far addr add 10.9.0.2/24 dev far && ip -n far link set far up";

fn ip(args: &[&str]) {
    assert!(Command::new("ip").args(args).status().unwrap().success(), "ip {args:?}");
}

/// A machine's line to the index kept the address that it had when it was opened, and no datagram left
/// any more.
#[test]
fn a_machine_whose_address_changes_goes_on_sending_and_fetching_by_itself() {
    const NAME: &str = "a_machine_whose_address_changes_goes_on_sending_and_fetching_by_itself";
    let cable = alone_with(&["--net", "--mount"], CABLE);
    if !is_run_by(&cable, NAME, "root and ip (iproute2): it has a network of its own") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let start = |listen: &str, name: &str, verb: &str, process: &[&str]| {
        let home = dir.path().join(name);
        fs::create_dir(&home).unwrap();
        let process = process.iter().map(|&arg| arg.into()).collect();
        let more: &[&str] = if verb == "index" { &["--heartbeat", "1"] } else { &[] };
        Machine::start_at(listen, home, name, verb, more, Under { process, verbs: vec![] })
    };
    let index = start("10.9.0.1:0", "index", "index", &[]);
    let near = start("10.9.0.1:0", "near", "up", &[]);
    let far = start("0.0.0.0:0", "far", "up", &["ip", "netns", "exec", "far"]);
    for peer in [&near, &far] {
        peer.joins(&index.invitation());
        peer.does(&["limit", "--up", "4MB"]);
    }
    let [theirs, ours] = [made_of("far", 24 << 20), made_of("near", 24 << 20)];
    let moved = |from: &str, to: &str| {
        ip(&["-n", "far", "addr", "del", from, "dev", "far"]);
        ip(&["-n", "far", "addr", "add", to, "dev", "far"]);
    };
    let goes_on = |of: &Machine, at: &Machine, bytes: &[u8], from: &str, to: &str| {
        let id = of.shares("film", bytes);
        let get = at.begins(&["get", &id, "-o", "copy", "--timeout", "300s"]);
        until("some of it", || (at.has(&id) > 0).then_some(()));
        let before = at.has(&id);
        assert!(before < bytes.len() as u64, "it came too fast for this test");
        let began = Instant::now();
        moved(from, to);
        let (code, last) = get.ends();
        assert_eq!(code, 0, "{last:?}");
        let left = bytes.len() as u64 - before;
        println!("{left} bytes more {:?} after the address was gone", began.elapsed());
        is_same(&at.home.join("copy"), bytes);
    };
    // Who sends moves, then who fetches.
    goes_on(&far, &near, &theirs, "10.9.0.2/24", "10.9.0.3/24");
    far.does(&["unshare", "film"]);
    near.does(&["unshare", "copy"]);
    fs::remove_file(near.home.join("copy")).unwrap();
    goes_on(&near, &far, &ours, "10.9.0.3/24", "10.9.0.4/24");
    until("both copies", || {
        let rows = far.lists();
        rows.iter().any(|row| row.complete == 2).then_some(())
    });
}

#[test]
fn it_all_works_where_packets_are_no_larger_than_1280_bytes() {
    const NAME: &str = "it_all_works_where_packets_are_no_larger_than_1280_bytes";
    let small = alone_with(&["--net"], "ip link set lo mtu 1280 up");
    if is_run_by(&small, NAME, "root and ip (iproute2): it has a network of its own") {
        goes_over_at("[::1]:0");
        goes_over_at("127.0.0.1:0");
    }
}
