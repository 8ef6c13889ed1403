//! Two real ends over real sockets, or one and a puppet.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use potluck_core::id::{ContentId, PeerId};
use potluck_core::time::WallTime;
use potluck_core::trust::{CERTIFICATE_LIFE, Certificate, Distrust};
use potluck_core::wire::stream::{Channel, Frame, Goodbye, Side};

use super::puppet::*;
use super::*;
use crate::clock;

const SOME: ContentId = ContentId::file([9; 32]);

fn theirs(number: u16) -> Channel {
    Channel { number, opener: Side::Them }
}

fn ours(number: u16) -> Channel {
    Channel { number, opener: Side::Us }
}

fn gone(machine: &Machine) -> Gone {
    match machine.event() {
        Event::Gone { why } => why,
        other => panic!("instead of Gone: {other:?}"),
    }
}

fn goodbye(puppet: &mut Puppet) -> Goodbye {
    puppet.hear(|frame| match frame {
        Frame::Bye(why, _) => why,
        other => panic!("instead of Bye: {other:?}"),
    })
}

#[test]
fn two_members_come_up_on_both_sides_and_know_each_other() {
    let (a, b) = (Machine::new(2), Machine::new(3));
    let (conn, _kept) = a.dial(&b);
    let Event::Up { peer, certificate, address, port, dialled, connection: _accepted } = b.event()
    else {
        panic!("no Up at the acceptor");
    };
    assert_eq!((peer, certificate.peer, port, dialled), (a.peer, a.peer, a.address.port(), false));
    assert!(address.ip().is_loopback());
    let (number, Event::Up { peer, certificate, address, port, dialled, .. }) = a.next() else {
        panic!("no Up at the dialler");
    };
    assert_eq!((number, peer, certificate.peer), (conn, b.peer, b.peer));
    assert_eq!((address, port, dialled), (b.address, b.address.port(), true));
}

#[test]
fn a_dialler_that_finds_another_key_hangs_up() {
    let (a, b) = (Machine::new(2), Machine::new(3));
    let (_, _kept) = a.dial_at(b.address, key(9).peer());
    assert_eq!(gone(&a), Gone::OtherMachine);
    assert!(b.knows_of_nothing());
}

#[test]
fn where_nobody_listens_the_dialler_learns_it() {
    let a = Machine::new(2);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (_, _kept) = a.dial_at(free, key(9).peer());
    assert!(matches!(gone(&a), Gone::Unreachable(_)));
}

#[test]
fn a_stranger_gets_no_byte_whatever_it_shows() {
    let machine = Machine::new(2);
    let (stranger, revoked) = (key(8), key(7).peer());
    machine.identify(|identity| identity.revoked = [revoked].into());
    let now = clock::wall();
    let long_ago = now.minus(CERTIFICATE_LIFE * 2);
    let forged = Certificate {
        network: index().network(),
        ..certificate_of(&stranger, stranger.peer(), now)
    };
    let cases = [
        ("signed by itself", 8, certificate_of(&stranger, stranger.peer(), now).encode()),
        ("signed by itself in our name", 8, forged.encode()),
        ("of another network", 8, certificate_of(&key(5), stranger.peer(), now).encode()),
        ("another's", 8, certificate(key(3).peer()).encode()),
        ("expired", 8, certificate_of(&index(), stranger.peer(), long_ago).encode()),
        (
            "of the future",
            8,
            certificate_of(&index(), stranger.peer(), WallTime(now.0 * 2)).encode(),
        ),
        ("revoked", 7, certificate(revoked).encode()),
        ("cut short", 8, certificate(stranger.peer()).encode()[..99].to_vec()),
        ("nothing", 8, vec![]),
    ];
    for (what, n, shown) in cases {
        let mut puppet = Puppet::dial(&machine, &key(n));
        puppet.say(&Frame::Hello { certificate: &shown, port: 1 });
        puppet.say(&Frame::Open(ours(1), SOME));
        assert_eq!(puppet.hear_all(), b"", "a certificate that is {what}");
    }
    let mut puppet = Puppet::dial(&machine, &stranger);
    puppet.say_bytes(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(puppet.hear_all(), b"", "another protocol");
    assert!(machine.knows_of_nothing());
}

#[test]
fn who_is_in_no_network_lets_nobody_in() {
    let machine = Machine::new(2);
    *machine.identity.write().unwrap() = None;
    let mut puppet = Puppet::dial(&machine, &key(3));
    puppet.hello(&certificate(key(3).peer()));
    assert_eq!(puppet.hear_all(), b"");
}

#[test]
fn a_dialler_does_not_believe_an_acceptor_without_certificate() {
    let a = Machine::new(2);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    a.identify(|identity| identity.revoked = [key(3).peer()].into());
    let (_, _kept) = a.dial_at(listener.local_addr().unwrap(), key(3).peer());
    let mut puppet = Puppet::answer(&listener, 3);
    assert_eq!(goodbye(&mut puppet), Goodbye::NotMember);
    assert_eq!(gone(&a), Gone::NotMember(Distrust::Revoked));
}

#[test]
fn commands_told_before_the_connection_is_up_are_done_after_it() {
    let (a, b) = (Machine::new(2), Machine::new(3));
    let (_, dialled) = a.dial(&b);
    dialled.tell(Command::Open { channel: 5, id: SOME });
    let (_, _accepted) = b.up();
    assert!(matches!(b.event(), Event::WantsOpen { channel: 5, id: SOME }));
}

#[test]
fn a_revoked_peer_is_dropped_when_the_identity_changes() {
    let ((a, _dialled), (b, accepted)) = pair();
    b.identify(|identity| identity.revoked = [a.peer].into());
    accepted.tell(Command::Recheck);
    assert_eq!(gone(&b), Gone::NotMember(Distrust::Revoked));
    assert!(matches!(gone(&a), Gone::Said(Goodbye::NotMember, _)));
}

#[test]
fn a_renewed_certificate_is_shown_and_believed() {
    let machine = Machine::new(2);
    let (mut puppet, connection) = Puppet::come_up(&machine, 3);
    let renewed = certificate_of(&index(), machine.peer, WallTime(clock::wall().0 + 60));
    machine.identify(|identity| identity.certificate = renewed.clone());
    connection.tell(Command::Recheck);
    puppet.hear(|frame| {
        let Frame::Hello { certificate, .. } = frame else { panic!("{frame:?}") };
        assert_eq!(certificate, renewed.encode());
    });
    puppet.hello(&certificate_of(&index(), key(3).peer(), WallTime(clock::wall().0 + 60)));
    puppet.say(&Frame::Open(ours(1), SOME));
    assert!(matches!(machine.event(), Event::WantsOpen { channel: 1, .. }));
    // The same once more has nothing new.
    puppet.hello(&certificate(key(3).peer()));
    assert_eq!(goodbye(&mut puppet), Goodbye::Protocol);
    assert!(matches!(gone(&machine), Gone::Protocol(_)));
}

#[test]
fn what_breaks_a_rule_ends_the_connection_with_a_reason() {
    let have = |pieces| Frame::Have(ours(1), Bitfield::none(pieces));
    let cases: Vec<(&str, Vec<Frame<'_>>)> = vec![
        ("a channel opened twice", vec![Frame::Open(ours(1), SOME), Frame::Open(ours(1), SOME)]),
        ("a channel that is not open", vec![Frame::Close(ours(1))]),
        ("one of ours that we did not open", vec![Frame::Close(theirs(1))]),
        (
            "wants before it was admitted",
            vec![Frame::Open(ours(1), SOME), Frame::Want(ours(1), vec![Piece(0)])],
        ),
        ("a piece nobody asked for", vec![Frame::Piece(theirs(1), Piece(0), b"x")]),
        ("an answer nobody asked for", vec![Frame::Busy(theirs(1), vec![Piece(0)], 5)]),
        ("two numbers of pieces", vec![Frame::Open(ours(1), SOME), have(5), have(6)]),
        (
            "a piece beyond them",
            vec![Frame::Open(ours(1), SOME), have(5), Frame::HaveMore(ours(1), vec![Piece(5)])],
        ),
        ("too many channels", (0..=1024).map(|n| Frame::Open(ours(n), SOME)).collect()),
    ];
    for (what, frames) in cases {
        let machine = Machine::new(2);
        let (mut puppet, _connection) = Puppet::come_up(&machine, 3);
        std::thread::scope(|scope| {
            scope.spawn(|| frames.iter().for_each(|frame| puppet.say(frame)));
            loop {
                match machine.event() {
                    Event::Gone { why } => {
                        break assert!(matches!(why, Gone::Protocol(_)), "{what}: {why:?}");
                    }
                    Event::WantsOpen { .. } | Event::Have { .. } => {}
                    other => panic!("{what}: {other:?}"),
                }
            }
        });
        assert_eq!(goodbye(&mut puppet), Goodbye::Protocol, "{what}");
    }
}

#[test]
fn garbage_instead_of_frames_ends_the_connection() {
    for garbage in [
        &b"\0\0\0\0\0"[..],
        b"\xff\xff\xff\xff\x06",
        b"\0\0\0\x02\x63\x00",
        b"\xff\xff\xff\xff\x0a",
        b"\0\0\0\x07\x0a",
    ] {
        let machine = Machine::new(2);
        let (mut puppet, _connection) = Puppet::come_up(&machine, 3);
        puppet.say_bytes(garbage);
        assert!(matches!(gone(&machine), Gone::Protocol(_)), "{garbage:x?}");
        assert_eq!(goodbye(&mut puppet), Goodbye::Protocol);
    }
}

#[test]
fn bytes_that_are_not_tls_end_the_connection_without_blame() {
    let machine = Machine::new(2);
    let (mut puppet, _connection) = Puppet::come_up(&machine, 3);
    std::io::Write::write_all(&mut puppet.socket, &[0x17, 3, 3, 0, 32, 1, 2, 3]).unwrap();
    std::io::Write::write_all(&mut puppet.socket, &[0; 64]).unwrap();
    let why = gone(&machine);
    assert!(matches!(why, Gone::Lost(_)), "{why:?}");
    assert_eq!(why.fault(), Fault::Weather);
}

#[test]
fn callers_that_say_nothing_do_not_keep_an_honest_one_out() {
    let (a, b) = (Machine::new(2), Machine::new(3));
    let silent: Vec<_> = (0..300).map(|_| TcpStream::connect(b.address).unwrap()).collect();
    let (_, _kept) = a.dial(&b);
    let (_, _accepted) = b.up();
    a.up();
    drop(silent);
}

#[test]
fn a_machine_that_is_full_says_so_to_members() {
    let (a, b) = (Machine::new(2), Machine::new(3));
    b.ctx.established.store(MAX_ESTABLISHED, Ordering::Relaxed);
    let (_, _kept) = a.dial(&b);
    assert!(matches!(gone(&a), Gone::Said(Goodbye::Full, _)));
    assert!(b.knows_of_nothing());
    assert_eq!(b.ctx.established.load(Ordering::Relaxed), MAX_ESTABLISHED);
}

#[test]
fn goodbyes_arrive_with_their_reason() {
    let ((a, dialled), (b, _accepted)) = pair();
    dialled.tell(Command::Bye(Goodbye::Leaving, "the machine sleeps".to_owned()));
    assert_eq!(gone(&a), Gone::Ended);
    assert_eq!(gone(&b), Gone::Said(Goodbye::Leaving, "the machine sleeps".to_owned()));
    dialled.tell(Command::Recheck);
    assert!(dialled.0.0.letters().waiting.is_empty(), "what is told after the end is forgotten");
}

#[test]
fn a_connection_nobody_holds_ends() {
    let ((a, dialled), (b, _accepted)) = pair();
    drop(dialled);
    assert_eq!(gone(&a), Gone::Ended);
    assert!(matches!(gone(&b), Gone::Said(Goodbye::Done, _)));
}

#[test]
fn when_the_engine_is_gone_its_connections_end() {
    let ((a, _dialled), (b, accepted)) = pair();
    let context = Arc::clone(&b.ctx);
    drop((b, accepted));
    assert!(matches!(gone(&a), Gone::Said(..) | Gone::Lost(_)));
    drop(context);
}

#[test]
fn a_channel_is_refused_closed_and_its_number_used_again() {
    let ((a, dialled), (b, accepted)) = pair();
    for _ in 0..3 {
        dialled.tell(Command::Open { channel: 1, id: SOME });
        assert!(matches!(b.event(), Event::WantsOpen { channel: 1, .. }));
        accepted.tell(Command::Refuse { channel: 1 });
        assert!(matches!(a.event(), Event::Closed { channel } if channel == ours(1)));
        assert!(matches!(b.event(), Event::Closed { channel } if channel == theirs(1)));
    }
    dialled.tell(Command::Open { channel: 1, id: SOME });
    dialled.tell(Command::Close { channel: ours(1) });
    assert!(matches!(b.event(), Event::WantsOpen { channel: 1, .. }));
    assert!(matches!(b.event(), Event::Closed { channel } if channel == theirs(1)));
    assert!(matches!(a.event(), Event::Closed { channel } if channel == ours(1)));
    // About a channel that is over, nothing is said any more.
    accepted.tell(Command::HaveMore { channel: theirs(1), pieces: vec![Piece(0)] });
    dialled.tell(Command::Want { channel: 1, pieces: vec![Piece(0)] });
    dialled.tell(Command::Bye(Goodbye::Done, String::new()));
    assert!(matches!(gone(&b), Gone::Said(Goodbye::Done, _)));
}

#[test]
fn a_certificate_of_the_wrong_peer_is_nobodys() {
    let identity = Identity {
        network: index().network(),
        certificate: certificate(PeerId([0; 32])),
        revoked: [].into(),
    };
    let now = clock::wall();
    assert_eq!(identity.believe(&certificate(key(3).peer()), key(3).peer(), now), Ok(()));
    assert_eq!(
        identity.believe(&certificate(key(3).peer()), key(4).peer(), now),
        Err(Distrust::OtherKey)
    );
}
