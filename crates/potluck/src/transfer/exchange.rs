//! Tests of contents on their way: real replicas on a real disk, over real sockets.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use potluck_core::wire::stream::{Frame, MAX_PIECES, Side};
use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::gather::{Gather, Listener as _};
use super::incoming::opened;
use super::puppet::*;
use super::session::Session;
use super::*;
use crate::clock;
use crate::store::Store;

const PIECE: usize = 64 << 10;

fn theirs(number: u16) -> Channel {
    Channel { number, opener: Side::Them }
}

fn ours(number: u16) -> Channel {
    Channel { number, opener: Side::Us }
}

/// A disk with a store.
struct Disk {
    dir: TempDir,
    store: Store,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(&dir.path().join("state")).unwrap();
        Self { dir, store }
    }

    fn import(&self, path: &Path) -> Arc<Replica> {
        self.store.import(path, &|_, _| {}, &AtomicBool::new(false)).unwrap().replica
    }

    fn share(&self, name: &str, bytes: &[u8]) -> Arc<Replica> {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        self.import(&path)
    }

    /// An empty replica to fetch `of` into.
    fn fetch(&self, of: &Replica) -> Arc<Replica> {
        let target = self.dir.path().join("fetched");
        let (manifest, proof) = (of.manifest(), of.proof());
        self.store.fetch(of.id(), of.size(), manifest, &proof, &target, false).unwrap()
    }
}

fn some_bytes(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn piece(of: &Replica, n: u32) -> Vec<u8> {
    let mut bytes = vec![];
    of.read_to(Piece(n), &mut bytes).unwrap();
    bytes
}

/// The least an engine does: hosts `has`, fetches `wants` eight pieces at a time, and is done when
/// both sides are. What it fetched.
fn engine(
    machine: &Machine,
    connection: &Connection,
    has: &[Arc<Replica>],
    wants: &[ContentId],
    disk: &Disk,
) -> Vec<Arc<Replica>> {
    for (channel, id) in (0..).zip(wants) {
        connection.tell(Command::Open { channel, id: *id });
    }
    let (mut fetched, mut sizes, mut next) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut hosted = BTreeMap::new();
    let mut open = wants.len() + has.len();
    while open > 0 {
        match machine.event() {
            Event::Opened { channel, size, .. } => {
                sizes.insert(channel, size);
                connection.tell(Command::WantMeta { channel });
            }
            Event::Meta { channel, manifest, proof } => {
                let target = disk.dir.path().join(format!("fetched {channel}"));
                let id = wants[usize::from(channel)];
                let fetch =
                    disk.store.fetch(id, sizes[&channel], &manifest, &proof, &target, false);
                let replica = fetch.unwrap();
                connection.tell(Command::Attach { channel, replica: Arc::clone(&replica) });
                let first = (0..replica.layout().pieces()).take(8).map(Piece).collect();
                connection.tell(Command::Want { channel, pieces: first });
                next.insert(channel, 8);
                fetched.insert(channel, replica);
            }
            Event::Have { channel, bitfield } => {
                assert!(channel.opener == Side::Us && bitfield.is_full());
            }
            Event::PieceIn { channel, put, .. } => {
                assert_eq!(put, Ok(Put::New));
                let (replica, next) = (&fetched[&channel], next.get_mut(&channel).unwrap());
                if *next < replica.layout().pieces() {
                    connection.tell(Command::Want { channel, pieces: vec![Piece(*next)] });
                    *next += 1;
                } else if replica.is_complete() {
                    connection.tell(Command::Close { channel: ours(channel) });
                }
            }
            Event::WantsOpen { channel, id } => {
                let replica = has.iter().find(|replica| replica.id() == id).unwrap();
                let (to, bitfield) = (theirs(channel), replica.have());
                connection.tell(Command::Admit { channel, replica: Arc::clone(replica) });
                connection.tell(Command::Have { channel: to, bitfield });
                hosted.insert(channel, 0);
            }
            Event::Wants { channel, pieces } => pieces
                .into_iter()
                .for_each(|piece| connection.tell(Command::Serve { channel, piece })),
            Event::Sent { channel, bytes, .. } => *hosted.get_mut(&channel).unwrap() += bytes,
            Event::Closed { .. } => open -= 1,
            other => panic!("{other:?}"),
        }
    }
    fetched.into_values().collect()
}

#[test]
fn files_and_folders_go_both_ways_at_once_over_one_connection() {
    let (left, right) = (Disk::new(), Disk::new());
    let large = some_bytes(24 << 20, 1);
    let there = left.share("large", &large);
    let folder = right.dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    for n in 0..60u8 {
        let bytes = some_bytes(usize::from(n) * 9_973, n);
        std::fs::write(folder.join(n.to_string()), bytes).unwrap();
    }
    std::fs::write(folder.join("big"), some_bytes(24 << 20, 2)).unwrap();
    let back = right.import(&folder);
    let ((a, dialled), (b, accepted)) = pair();
    let (at_left, at_right) = std::thread::scope(|scope| {
        let (there, back) = ([Arc::clone(&there)], [Arc::clone(&back)]);
        let (to_right, to_left) = ([there[0].id()], [back[0].id()]);
        let (left, right) = (&left, &right);
        let (a, dialled) = (&a, &dialled);
        let one = scope.spawn(move || engine(a, dialled, &there, &to_left, left));
        let two = engine(&b, &accepted, &back, &to_right, right);
        (one.join().unwrap(), two)
    });
    let file = at_right[0].finish().unwrap();
    assert!(std::fs::read(file).unwrap() == large);
    let copy = at_left[0].finish().unwrap();
    for n in 0..60u8 {
        let bytes = std::fs::read(copy.join(n.to_string())).unwrap();
        assert!(bytes == some_bytes(usize::from(n) * 9_973, n));
    }
    assert_eq!((dialled.sent(), dialled.received()), (there.size(), back.size()));
    drop(dialled);
}

/// A machine that fetches a content of five pieces, which a puppet hosts on our channel 1.
struct Fetching {
    puppet: Puppet,
    machine: Machine,
    connection: Connection,
    whole: Arc<Replica>,
    _disks: [Disk; 2],
}

fn fetching() -> Fetching {
    let disks = [Disk::new(), Disk::new()];
    let whole = disks[0].share("whole", &some_bytes(4 * PIECE + 9, 3));
    let growing = disks[1].fetch(&whole);
    let machine = Machine::new(2);
    let (mut puppet, connection) = Puppet::come_up(&machine, 3);
    connection.tell(Command::Open { channel: 1, id: whole.id() });
    puppet.hear(|frame| assert!(matches!(frame, Frame::Open(..))));
    puppet.say(&Frame::Opened { channel: theirs(1), size: whole.size(), manifest: 0, proof: 160 });
    assert!(matches!(machine.event(), Event::Opened { channel: 1, .. }));
    connection.tell(Command::Attach { channel: 1, replica: growing });
    Fetching { puppet, machine, connection, whole, _disks: disks }
}

impl Fetching {
    fn want(&mut self, pieces: &[u32]) {
        let pieces: Vec<Piece> = pieces.iter().copied().map(Piece).collect();
        self.connection.tell(Command::Want { channel: 1, pieces: pieces.clone() });
        self.puppet.hear(|frame| match frame {
            Frame::Want(_, heard) => assert_eq!(heard, pieces),
            other => panic!("{other:?}"),
        });
    }

    fn give(&mut self, n: u32) {
        let bytes = piece(&self.whole, n);
        self.puppet.say(&Frame::Piece(theirs(1), Piece(n), &bytes));
    }

    fn put(&self) -> (u32, Result<Put, PutError>) {
        match self.machine.event() {
            Event::PieceIn { piece, put, .. } => (piece.0, put),
            other => panic!("instead of PieceIn: {other:?}"),
        }
    }

    fn breaks_a_rule(&self) {
        match self.machine.event() {
            Event::Gone { why: Gone::Protocol(_) } => {}
            other => panic!("instead of Gone: {other:?}"),
        }
    }
}

#[test]
fn a_liar_is_found_out_told_so_and_nothing_more_of_it_is_looked_at() {
    let mut f = fetching();
    f.want(&[0, 1]);
    let mut lie = piece(&f.whole, 0);
    lie[77] ^= 1;
    f.puppet.say(&Frame::Piece(theirs(1), Piece(0), &lie));
    assert_eq!(f.put(), (0, Err(PutError::BadPiece)));
    f.puppet.hear(|frame| assert!(matches!(frame, Frame::Reject(_, Piece(0)))));
    f.give(1);
    f.puppet.say(&Frame::Busy(theirs(1), vec![Piece(1)], 250));
    match f.machine.event() {
        Event::Busy { pieces, .. } => assert_eq!(pieces, [Piece(1)]),
        other => panic!("{other:?}"),
    }
    assert_eq!(f.connection.received(), 2 * PIECE as u64);
}

#[test]
fn a_cancelled_piece_that_arrives_is_of_use_and_asked_for_again_it_may_come_twice() {
    let mut f = fetching();
    f.want(&[2]);
    f.connection.tell(Command::Cancel { channel: 1, pieces: vec![Piece(2)] });
    f.puppet.hear(|frame| assert!(matches!(frame, Frame::Cancel(..))));
    f.want(&[2]);
    f.give(2);
    assert_eq!(f.put(), (2, Ok(Put::New)));
    f.give(2);
    assert_eq!(f.put(), (2, Ok(Put::Duplicate)));
    f.give(2);
    f.breaks_a_rule();
}

#[test]
fn a_piece_nobody_asked_for_or_of_another_length_breaks_a_rule() {
    let mut f = fetching();
    f.give(0);
    f.breaks_a_rule();
    let mut f = fetching();
    f.want(&[4]);
    f.puppet.say(&Frame::Piece(theirs(1), Piece(4), &[0; 10]));
    f.breaks_a_rule();
}

#[test]
fn what_was_turned_away_is_no_longer_expected() {
    let mut f = fetching();
    f.want(&[0, 1]);
    f.puppet.say(&Frame::Busy(theirs(1), vec![Piece(0), Piece(3)], 250));
    match f.machine.event() {
        Event::Busy { pieces, wait_ms, .. } => assert_eq!((pieces, wait_ms), (vec![Piece(0)], 250)),
        other => panic!("{other:?}"),
    }
    f.give(0);
    f.breaks_a_rule();
}

#[test]
fn a_channel_closed_in_the_middle_of_a_piece_lets_the_rest_pass_by() {
    let mut f = fetching();
    f.want(&[0, 1]);
    let mut frames = vec![];
    Frame::Piece(theirs(1), Piece(0), &piece(&f.whole, 0)).encode(&mut frames);
    Frame::Piece(theirs(1), Piece(1), &piece(&f.whole, 1)).encode(&mut frames);
    Frame::HaveMore(theirs(1), vec![Piece(3)]).encode(&mut frames);
    let (first, second) = frames.split_at(PIECE / 2);
    f.puppet.say_bytes(first);
    f.connection.tell(Command::Close { channel: ours(1) });
    f.puppet.hear(|frame| assert!(matches!(frame, Frame::Close(_))));
    f.puppet.say_bytes(second);
    f.puppet.say(&Frame::Close(theirs(1)));
    assert!(matches!(f.machine.event(), Event::Closed { channel } if channel == ours(1)));
    f.puppet.say(&Frame::Open(ours(7), f.whole.id()));
    assert!(matches!(f.machine.event(), Event::WantsOpen { channel: 7, .. }));
}

/// A machine that hosts `replica` for a puppet, which opened it on its channel 1.
fn hosting(replica: &Arc<Replica>) -> (Puppet, Machine, Connection) {
    let machine = Machine::new(2);
    let (mut puppet, connection) = Puppet::come_up(&machine, 3);
    puppet.say(&Frame::Open(ours(1), replica.id()));
    assert!(matches!(machine.event(), Event::WantsOpen { channel: 1, .. }));
    connection.tell(Command::Admit { channel: 1, replica: Arc::clone(replica) });
    puppet.hear(|frame| match frame {
        Frame::Opened { size, manifest, proof, .. } => {
            assert_eq!(size, replica.size());
            assert_eq!(manifest as usize, replica.manifest().len());
            assert_eq!(proof as usize, replica.proof().len());
        }
        other => panic!("{other:?}"),
    });
    (puppet, machine, connection)
}

#[test]
fn metadata_is_sent_when_asked_for_once() {
    let disk = Disk::new();
    let folder = disk.dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("a"), some_bytes(3 * PIECE, 1)).unwrap();
    let replica = disk.import(&folder);
    let (mut puppet, machine, _connection) = hosting(&replica);
    puppet.say(&Frame::WantMeta(ours(1)));
    let whole = [replica.manifest(), &replica.proof()].concat();
    let mut heard = vec![];
    while heard.len() < whole.len() {
        puppet.hear(|frame| match frame {
            Frame::Meta(_, bytes) => heard.extend_from_slice(bytes),
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(heard, whole);
    puppet.say(&Frame::WantMeta(ours(1)));
    assert!(matches!(machine.event(), Event::Gone { why: Gone::Protocol(_) }));
}

#[test]
fn a_serve_is_sent_or_not_and_always_answered() {
    let disk = Disk::new();
    let replica = disk.share("whole", &some_bytes(4 * PIECE, 1));
    let (mut puppet, machine, connection) = hosting(&replica);
    let all: Vec<Piece> = (0..4).map(Piece).collect();
    let mut twice = vec![];
    Frame::Want(ours(1), all.clone()).encode(&mut twice);
    Frame::Want(ours(1), all.clone()).encode(&mut twice);
    puppet.say_bytes(&twice);
    assert!(matches!(machine.event(), Event::Wants { pieces, .. } if pieces == all));
    connection.tell(Command::Serve { channel: 1, piece: Piece(0) });
    puppet.hear(|frame| match frame {
        Frame::Piece(_, Piece(0), bytes) => assert!(bytes == piece(&replica, 0)),
        other => panic!("{other:?}"),
    });
    assert!(matches!(machine.event(), Event::Sent { piece: Piece(0), bytes: 65536, .. }));
    // No longer wanted, in the two ways there are.
    puppet.say(&Frame::Cancel(ours(1), vec![Piece(1)]));
    assert!(matches!(machine.event(), Event::Cancelled { pieces, .. } if pieces == [Piece(1)]));
    connection.tell(Command::Serve { channel: 1, piece: Piece(1) });
    assert!(matches!(machine.event(), Event::Unsent { piece: Piece(1), .. }));
    let (channel, pieces) = (1, vec![Piece(2)]);
    connection.tell(Command::Busy { channel, pieces, wait_ms: 7 });
    puppet.hear(|frame| assert!(matches!(frame, Frame::Busy(_, _, 7))));
    connection.tell(Command::Serve { channel: 1, piece: Piece(2) });
    assert!(matches!(machine.event(), Event::Unsent { piece: Piece(2), .. }));
    // Changed under our hands.
    std::fs::write(replica.path(), some_bytes(4 * PIECE, 2)).unwrap();
    connection.tell(Command::Serve { channel: 1, piece: Piece(3) });
    let error = match machine.event() {
        Event::Unreadable { piece: Piece(3), error, .. } => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(error, ReadError::Changed);
    assert_eq!(connection.sent(), PIECE as u64);
    // And a piece there is not.
    puppet.say(&Frame::Want(ours(1), vec![Piece(4)]));
    assert!(matches!(machine.event(), Event::Gone { why: Gone::Protocol(_) }));
}

#[test]
fn a_cancel_takes_back_what_waits_in_the_queue() {
    let disk = Disk::new();
    let replica = disk.share("whole", &some_bytes(40 << 20, 1));
    let all = replica.layout().pieces();
    let (mut puppet, machine, connection) = hosting(&replica);
    let pieces: Vec<Piece> = (0..all).map(Piece).collect();
    puppet.say(&Frame::Want(ours(1), pieces.clone()));
    assert!(matches!(machine.event(), Event::Wants { .. }));
    for piece in &pieces {
        connection.tell(Command::Serve { channel: 1, piece: *piece });
    }
    // Nobody reads, so some of it stays in the queue, and the machine goes on listening.
    puppet.say(&Frame::Cancel(ours(1), pieces));
    puppet.say(&Frame::Open(ours(2), replica.id()));
    let (mut sent, mut unsent) = (0, 0);
    loop {
        match machine.event() {
            Event::Sent { .. } => sent += 1,
            Event::Unsent { .. } => unsent += 1,
            Event::Cancelled { .. } => {}
            Event::WantsOpen { channel: 2, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(unsent > 0 && sent + unsent <= all, "{sent} sent, {unsent} not");
}

#[test]
fn who_does_not_read_blocks_nothing_and_reads_it_all_later() {
    let disk = Disk::new();
    let bytes = some_bytes(40 << 20, 1);
    let replica = disk.share("whole", &bytes);
    let all = replica.layout().pieces();
    let (mut puppet, machine, connection) = hosting(&replica);
    puppet.say(&Frame::Want(ours(1), (0..all).map(Piece).collect()));
    assert!(matches!(machine.event(), Event::Wants { .. }));
    for n in 0..all {
        connection.tell(Command::Serve { channel: 1, piece: Piece(n) });
    }
    puppet.say(&Frame::Open(ours(2), replica.id()));
    let mut sent = 0;
    loop {
        match machine.event() {
            Event::Sent { .. } => sent += 1,
            Event::WantsOpen { channel: 2, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(sent < all);
    for n in 0..all as usize {
        puppet.hear(|frame| match frame {
            Frame::Piece(_, piece, heard) => {
                assert_eq!(piece.0 as usize, n);
                assert!(heard == &bytes[n * PIECE..][..PIECE]);
            }
            other => panic!("{other:?}"),
        });
    }
    while sent < all {
        assert!(matches!(machine.event(), Event::Sent { .. }));
        sent += 1;
    }
    assert_eq!(connection.sent(), replica.size());
}

#[test]
fn wants_without_end_break_a_rule() {
    let disk = Disk::new();
    let folder = disk.dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    for n in 0..4_200 {
        std::fs::write(folder.join(n.to_string()), [n as u8]).unwrap();
    }
    let replica = disk.import(&folder);
    let (mut puppet, machine, _connection) = hosting(&replica);
    for begin in (0..4_200).step_by(MAX_PIECES) {
        let end = (begin + MAX_PIECES as u32).min(4_200);
        puppet.say(&Frame::Want(ours(1), (begin..end).map(Piece).collect()));
    }
    for _ in 0..4 {
        assert!(matches!(machine.event(), Event::Wants { .. }));
    }
    assert!(matches!(machine.event(), Event::Gone { why: Gone::Protocol(_) }));
}

/// A frame or command that often makes sense.
#[derive(Clone, Debug)]
enum Step {
    Frame(u8, u16, Vec<u32>, Vec<u8>),
    Command(u8, u16, Vec<u32>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let channel = || prop_oneof![Just(0u16), Just(1)];
    let frame = (
        0u8..20,
        (channel(), any::<bool>()).prop_map(|(n, bit)| n | u16::from(bit) << 15),
        vec(0u32..6, 0..4),
        vec(any::<u8>(), 0..3),
    )
        .prop_map(|(kind, channel, words, bytes)| Step::Frame(kind, channel, words, bytes));
    let command = (0u8..14, channel(), vec(0u32..6, 0..4))
        .prop_map(|(kind, channel, pieces)| Step::Command(kind, channel, pieces));
    vec(prop_oneof![frame, command], 0..40)
}

fn command(kind: u8, channel: u16, pieces: &[u32], replica: &Arc<Replica>) -> Command {
    let of = if pieces.len() > 1 { ours(channel) } else { theirs(channel) };
    let first = pieces.first().copied().map_or(Piece(0), Piece);
    let pieces = pieces.iter().copied().map(Piece).collect();
    let (id, replica) = (replica.id(), Arc::clone(replica));
    match kind {
        0 => Command::Open { channel, id },
        1 => Command::WantMeta { channel },
        2 => Command::Attach { channel, replica },
        3 => Command::Want { channel, pieces },
        4 => Command::Cancel { channel, pieces },
        5 => Command::Admit { channel, replica },
        6 => Command::Refuse { channel },
        7 => Command::Serve { channel, piece: first },
        8 => Command::Busy { channel, pieces, wait_ms: 1 },
        9 => Command::Grant { channel, pieces },
        10 => Command::Have { channel: of, bitfield: replica.have() },
        11 => Command::HaveMore { channel: of, pieces },
        12 => Command::Lost { channel: of, pieces },
        _ => Command::Close { channel: of },
    }
}

#[test]
fn no_bytes_and_no_commands_in_any_order_make_a_session_panic() {
    let disk = Disk::new();
    let replica = disk.share("whole", &some_bytes(2 * PIECE + 1, 1));
    let machine = Machine::new(2);
    let (events, reports) = crossbeam_channel::unbounded();
    let ctx = Context::new(Arc::new(key(2)), Arc::clone(&machine.identity), events).unwrap();
    let ctx = Arc::new(ctx);
    proptest!(ProptestConfig::with_cases(400), |(steps in steps(), up in any::<bool>())| {
        let (mailbox, connection) = Connection::new().unwrap();
        let handle = Box::new(move || Some(connection));
        let address = machine.address;
        let mut session = Session::new(&ctx, ConnId(0), address, false, mailbox, handle);
        let mut gather = Gather::new();
        let (mut secure, mut other) = super::secure::tests::up();
        let _ = session.on_secure(key(3).peer());
        if up {
            let certificate = certificate(key(3).peer()).encode();
            session.on_frame(Frame::Hello { certificate: &certificate, port: 1 }).unwrap();
        }
        for step in steps {
            let done = match step {
                Step::Frame(kind, channel, words, bytes) => {
                    let mut body = vec![kind];
                    body.extend(channel.to_be_bytes());
                    if kind == 2 {
                        body.extend([0; 33]);
                    } else {
                        words.iter().for_each(|word| body.extend(word.to_be_bytes()));
                        body.extend(bytes);
                    }
                    let frame = [&(body.len() as u32).to_be_bytes()[..], &body].concat();
                    gather.take(&mut opened(&frame), &mut session)
                }
                Step::Command(kind, channel, pieces) if up => {
                    session.on_command(command(kind, channel, &pieces, &replica))
                }
                Step::Command(..) => Ok(()),
            };
            let Ok(()) = done else { break };
            while session.outbox.has_serves() || !session.outbox.plain().is_empty() {
                let n = session.outbox.plain().len();
                session.outbox.said(n);
                session.serve(&mut secure).unwrap();
                while !secure.is_flushed() {
                    secure.write(usize::MAX).unwrap();
                    other.read(usize::MAX, None).unwrap();
                    other.open().unwrap();
                    other.opened().copy_to(&mut vec![], usize::MAX);
                }
                session.on_written(secure.written()).unwrap();
            }
            session.owed_for(clock::now());
        }
        prop_assert!(up || reports.is_empty());
        reports.try_iter().for_each(drop);
    });
}
