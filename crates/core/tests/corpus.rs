//! Owns the replay of the fuzzing corpus on a stable compiler, and the samples in it: one of every
//! type (`good-…`), and some that break a rule (`bad-…`). The good ones are test vectors for other
//! implementations; one that changes means that the wire format changed.
//!
//! `POTLUCK_WRITE_SAMPLES=1 cargo test -p potluck-core --test corpus` writes them anew.

#![expect(clippy::unwrap_used, reason = "what cannot be made or read fails the test")]

use std::path::PathBuf;

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{ContentId, MemberNumber, Name, PeerId, Piece, RequestId, Version};
use potluck_core::manifest::{self, Entry, Manifest, RelPath, What};
use potluck_core::registrar::trial;
use potluck_core::seal::SessionKeys;
use potluck_core::time::WallTime;
use potluck_core::trust::{Certificate, Invitation, MachineKey, NameRecord, RevocationList, Role};
use potluck_core::wire::bytes::Writer;
use potluck_core::wire::datagram::{
    Ack, Code, Found, HELD_ALL, Host, Item, List, Load, Notice, Page, Refusal, Register,
    Registered, Reply, Request, Row, RowKey, Search, Target, Watch, Watching,
};
use potluck_core::wire::desk::{
    Answer, Ask, DeskCode, DeskRefusal, InviteTerms, Join, Member, Membership, Removal, Session,
};
use potluck_core::wire::stream::{Channel, Frame, Goodbye, MAX_PIECES, Side};
use potluck_core::wire::{check, datagram};

type Check = fn(&[u8]) -> bool;
type Samples = Vec<(&'static str, Vec<u8>)>;

/// Every fuzz target: its name, its check, its samples.
fn targets() -> Vec<(&'static str, Check, Samples)> {
    vec![
        ("datagram", check::datagram, datagrams()),
        ("desk", check::desk, desk()),
        ("manifest", check::manifest, manifests()),
        ("registrar", trial::run, vec![("good-life", trial::sample())]),
        ("stream", check::stream, frames()),
        ("trust", check::trust, trust()),
    ]
}

fn folder_of(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

const ID: RequestId = RequestId(0x1122_3344_5566_7788);
const NOW: WallTime = WallTime(1_800_000_000);

fn index() -> MachineKey {
    MachineKey::from_seed([1; 32])
}

fn machine() -> MachineKey {
    MachineKey::from_seed([2; 32])
}

fn game() -> Name {
    "game".parse().unwrap()
}

fn file() -> ContentId {
    ContentId::file([0; 32])
}

fn folder() -> ContentId {
    ContentId::folder([0xf0; 32])
}

fn record() -> NameRecord {
    NameRecord::sign(&machine(), index().network(), game(), Version(2), file(), NOW)
}

fn certificate() -> Certificate {
    let (number, role) = (MemberNumber(7), Role::Publish);
    Certificate::issue(&index(), machine().peer(), number, role, "bob's desktop", NOW)
}

fn revocations() -> RevocationList {
    RevocationList::issue(&index(), 3, [PeerId([4; 32]), PeerId([5; 32])].into())
}

fn datagrams() -> Samples {
    [requests(), replies()].concat()
}

/// A datagram as it lies open: its letter, then the plaintext.
fn open(kind: u8, plaintext: Vec<u8>) -> Vec<u8> {
    [vec![kind], plaintext].concat()
}

fn requests() -> Samples {
    let items = vec![
        Item { id: file(), size: 1 << 30, held: HELD_ALL, name: Some(record()) },
        Item { id: folder(), size: 5, held: 17, name: None },
    ];
    let heartbeat = Register {
        port: 7701,
        load: Load { uploads: 1, free_slots: 5, rate_kib: 1_000, capacity_kib: 100_000 },
        digest: [0xdd; 16],
        round: 0,
        round_ends: false,
        items: vec![],
    };
    let full = Register { round: 9, round_ends: true, items, ..heartbeat.clone() };
    let no_round = Register { round_ends: true, ..heartbeat.clone() };
    let search = |target| Request::Search(Search { target, hosts: 16, avoid: vec![] });
    let after = RowKey { name: Some(game()), id: file() };
    let asks = [
        ("good-R-heartbeat", Request::Register(heartbeat)),
        ("good-R-round", Request::Register(full.clone())),
        ("good-S-id", search(Target::Id(folder()))),
        ("good-S-name", search(Target::Name(game(), None))),
        ("good-S-version", search(Target::Name(game(), Some(Version(1))))),
        (
            "good-S-avoid",
            Request::Search(Search {
                target: Target::Id(file()),
                hosts: 20,
                avoid: vec![PeerId([6; 32]), PeerId([7; 32])],
            }),
        ),
        ("good-O-first", Request::List(List { glob: "*".into(), after: None })),
        ("good-O-after", Request::List(List { glob: "g*".into(), after: Some(after) })),
        ("good-T", Request::Deregister(vec![file(), folder()])),
        ("good-W", Request::Watch(Watch { glob: "*".into(), since: 41, stop: false })),
        ("bad-R-ends-no-round", Request::Register(no_round)),
        (
            "bad-S-no-hosts",
            Request::Search(Search { target: Target::Id(file()), hosts: 0, avoid: vec![] }),
        ),
        ("bad-T-too-many", Request::Deregister(vec![file(); Request::MAX_DEREGISTER + 1])),
    ];
    let mut padded = open(b'T', Request::Deregister(vec![]).encode(ID));
    padded.resize(1 + datagram::MIN_REQUEST - datagram::HEAD_BYTES - datagram::TAG_BYTES, 0);
    let mut bad_padding = padded.clone();
    bad_padding.push(1);
    let mut cut = open(b'R', Request::Register(full).encode(ID));
    cut.pop();
    let mut samples: Samples =
        asks.map(|(name, ask)| (name, open(ask.kind(), ask.encode(ID)))).into();
    samples.extend([
        ("good-T-padded", padded),
        ("bad-T-padding", bad_padding),
        ("bad-R-cut", cut),
        ("bad-empty", vec![]),
        ("bad-kind", open(b'X', vec![0; 40])),
    ]);
    samples
}

fn replies() -> Samples {
    let named = Row {
        key: RowKey { name: Some(game()), id: file() },
        size: 1 << 30,
        hosts: 3,
        complete: 2,
        version: Some(Version(2)),
        publisher: Some(machine().peer()),
    };
    let nameless = Row {
        key: RowKey { name: None, id: folder() },
        size: 5,
        hosts: 1,
        complete: 0,
        version: None,
        publisher: None,
    };
    let gone = Row { hosts: 0, complete: 0, version: None, publisher: None, ..named.clone() };
    let host = |address: &str| Host {
        peer: machine().peer(),
        address: address.parse().unwrap(),
        held: HELD_ALL,
        load: 250,
    };
    let hosts = vec![host("10.0.0.5:7701"), host("[2001:db8::5]:7701")];
    let found =
        Found { id: file(), size: 1 << 30, record: Some(record()), hosts_in_all: 40, hosts };
    let refused = |code, text: &str| Refusal { code, text: text.into(), cookie: None };
    let cookie = Refusal { cookie: Some([0xcc; 16]), ..refused(Code::CookieNeeded, "") };
    let registered = Registered {
        lease_s: 90,
        heartbeat_s: 30,
        repeat_all: true,
        refused: vec![(1, refused(Code::Quota, "you hold 65,536 entries"))],
    };
    let page = Page { sequence: 41, rows: vec![nameless, named.clone()], more: true };
    let watching = Watching { lease_s: 90, sequence: 41, missed: false };
    let answers = [
        ("good-A-R", Reply::Ack(Ack::Registered(registered))),
        ("good-A-S", Reply::Ack(Ack::Found(found))),
        ("good-A-O", Reply::Ack(Ack::Page(page))),
        ("good-A-T", Reply::Ack(Ack::Deregistered)),
        ("good-A-W", Reply::Ack(Ack::Watching(watching))),
        ("good-E-cookie", Reply::Error(cookie)),
        ("good-E-not-found", Reply::Error(refused(Code::NotFound, "nobody shares \"game\""))),
    ];
    let notice = Notice { before: 41, after: 43, rows: vec![named.clone(), gone] };
    let impossible = Notice { rows: vec![Row { complete: 4, ..named }], ..notice.clone() };
    let mut samples: Samples =
        answers.map(|(name, answer)| (name, open(answer.kind(), answer.encode(ID)))).into();
    samples.extend([
        ("good-N", open(b'N', notice.encode())),
        ("bad-N-more-whole-than-hosts", open(b'N', impossible.encode())),
    ]);
    samples
}

fn desk() -> Samples {
    let label = || "bob's desktop".to_owned();
    let terms = InviteTerms { role: Role::Publish, uses: 3, expires: NOW };
    let member = Member {
        peer: machine().peer(),
        number: MemberNumber(7),
        role: Role::Admin,
        label: label(),
        joined: NOW,
        invitation: [8; 8],
        silent_s: Some(12),
    };
    let unheard = Member { silent_s: None, ..member.clone() };
    let session = |revocations| {
        Answer::Session(Box::new(Session {
            member: MemberNumber(7),
            epoch: 20_000,
            salt: 0x0102_0304_0506_0708,
            keys: SessionKeys { to_index: [0x11; 16], from_index: [0x22; 16] },
            heartbeat_s: 30,
            valid_s: 86_400,
            certificate: certificate(),
            revocations,
        }))
    };
    let join = Join { invitation: [8; 8], tag: [9; 32], label: label() };
    let refusal =
        DeskRefusal { code: DeskCode::UsedUp, text: "the invitation was used 3 times".into() };
    let addresses = vec!["10.0.0.1:7700".into(), "[2001:db8::1]:7700".into()];
    let membership = Membership { network: index().network(), index: addresses };
    vec![
        ("good-ask-join", Ask::Join(join).encode()),
        (
            "good-ask-session",
            Ask::Session { label: label(), revocations: 3, certificate: None }.encode(),
        ),
        ("good-ask-invite", Ask::Invite(terms).encode()),
        ("good-ask-members", Ask::Members.encode()),
        ("good-ask-remove-peer", Ask::Remove(Removal::Peer(machine().peer())).encode()),
        ("good-ask-remove-invitation", Ask::Remove(Removal::Invitation([8; 8])).encode()),
        ("good-answer-welcome", Answer::Welcome(Box::new(certificate())).encode()),
        ("good-answer-session", session(None).encode()),
        ("good-answer-session-revocations", session(Some(revocations())).encode()),
        ("good-answer-invited", Answer::Invited { secret: [3; 16], terms }.encode()),
        ("good-answer-members", Answer::Members(vec![member, unheard]).encode()),
        ("good-answer-removed", Answer::Removed(2).encode()),
        ("good-answer-refused", Answer::Refused(refusal).encode()),
        ("good-membership", membership.encode()),
        ("bad-ask-role", vec![3, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("bad-ask-label", [&[2, 0, 0, 0, 0, 4][..], b"bob "].concat()),
        ("bad-answer-many-members", vec![0x84, 0xff, 0xff, 0xff, 0xff]),
        ("bad-answer-code", vec![0xff, 0, 99, 0]),
    ]
}

fn frames() -> Samples {
    let ours = Channel { number: 5, opener: Side::Us };
    let theirs = ours.flipped();
    let pieces = || vec![Piece(0), Piece(4_095), Piece(17)];
    let mut some = Bitfield::none(11);
    some.insert(Piece(0));
    some.insert(Piece(10));
    let certificate = certificate().encode();
    let hosts = vec![
        (machine().peer(), "10.0.0.5:7701".parse().unwrap()),
        (index().peer(), "[2001:db8::5]:7701".parse().unwrap()),
    ];
    let bytes = |frame: &Frame<'_>| {
        let mut out = vec![];
        frame.encode(&mut out);
        out.split_off(4)
    };
    let opened = Frame::Opened { channel: theirs, size: 1 << 20, manifest: 64, proof: 512 };
    vec![
        ("good-hello", bytes(&Frame::Hello { certificate: &certificate, port: 7701 })),
        ("good-open", bytes(&Frame::Open(ours, folder()))),
        ("good-opened", bytes(&opened)),
        ("good-want-meta", bytes(&Frame::WantMeta(ours))),
        ("good-meta", bytes(&Frame::Meta(theirs, b"potluck manifest v1\n"))),
        ("good-have-host", bytes(&Frame::Have(theirs, some.clone()))),
        ("good-have-opener", bytes(&Frame::Have(ours, some))),
        ("good-have-more", bytes(&Frame::HaveMore(ours, pieces()))),
        ("good-lost", bytes(&Frame::Lost(theirs, pieces()))),
        ("good-want", bytes(&Frame::Want(ours, pieces()))),
        ("good-piece", bytes(&Frame::Piece(theirs, Piece(17), b"a very small piece"))),
        ("good-cancel", bytes(&Frame::Cancel(ours, pieces()))),
        ("good-busy", bytes(&Frame::Busy(theirs, pieces(), 1_500))),
        ("good-reject", bytes(&Frame::Reject(ours, Piece(17)))),
        ("good-grant", bytes(&Frame::Grant(theirs, pieces()))),
        ("good-hosts", bytes(&Frame::Hosts(theirs, hosts))),
        ("good-close", bytes(&Frame::Close(ours))),
        ("good-ping", bytes(&Frame::Ping)),
        ("good-bye", bytes(&Frame::Bye(Goodbye::Leaving, "the process stops"))),
        ("bad-want-of-a-host", bytes(&Frame::Want(theirs, pieces()))),
        ("bad-piece-of-an-opener", bytes(&Frame::Piece(ours, Piece(17), b"x"))),
        ("bad-piece-empty", bytes(&Frame::Piece(theirs, Piece(17), b""))),
        ("bad-piece-number", bytes(&Frame::Want(ours, vec![Piece(u32::MAX)]))),
        ("bad-cancel-too-many", [&[11, 0, 5][..], &[0; 4 * MAX_PIECES + 4]].concat()),
        ("bad-have-bits-past-the-end", vec![6, 0, 5, 0, 0, 0, 11, 0x80, 0x3f]),
        ("bad-have-endless", vec![6, 0, 5, 0xff, 0xff, 0xff, 0xff, 1]),
        ("bad-type", vec![0x77, 0, 5]),
    ]
}

fn manifests() -> Samples {
    let path = |path: &str| RelPath::new(path).unwrap();
    let file = |at: &str, size, executable| Entry {
        path: path(at),
        what: What::File { size, executable, id: [size as u8; 32] },
    };
    let entries = vec![
        file("README", 150_000, false),
        file("bin/run", 7, true),
        file("größe/日本語", 1 << 32, false),
        Entry { path: path("empty"), what: What::EmptyFolder },
    ];
    let good = Manifest::new(entries).unwrap().encode();
    let raw = |paths: &[&str]| {
        let mut out = manifest::HEADER.to_vec();
        for path in paths {
            out.u8(2);
            out.bytes16(path.as_bytes());
        }
        out
    };
    let mut cut = good.clone();
    cut.pop();
    vec![
        ("good-folder", good),
        ("good-nothing", raw(&[])),
        ("bad-cut", cut),
        ("bad-header", b"potluck manifest v2\n".to_vec()),
        ("bad-order", raw(&["b", "a"])),
        ("bad-twice", raw(&["a", "a"])),
        ("bad-case", raw(&["A", "a"])),
        ("bad-file-as-folder", raw(&["a", "a/b"])),
        ("bad-parent", raw(&["a/../b"])),
        ("bad-absolute", raw(&["/a"])),
        ("bad-backslash", raw(&["a\\b"])),
        ("bad-device", raw(&["nul.txt"])),
        ("bad-direction", raw(&["a\u{202E}b"])),
    ]
}

fn trust() -> Samples {
    let addresses = vec!["192.168.100.200:7700".into(), "[2001:db8::1]:7700".into()];
    let invitation = Invitation::new(index().network(), [9; 16], NOW, addresses).to_string();
    let slip = if invitation.as_bytes()[20] == b'a' { "b" } else { "a" };
    let mut slipped = invitation.clone();
    slipped.replace_range(20..21, slip);
    let (mut named, mut list) = (vec![], vec![]);
    record().write(&mut named);
    revocations().write(&mut list);
    let mut unsorted = list.clone();
    unsorted[8..72].rotate_left(32);
    let mut endless = list.clone();
    endless.splice(4..8, u32::MAX.to_be_bytes());
    let mut dots = vec![];
    dots.text8("..");
    dots.put(&named[5..]);
    vec![
        ("bad-invitation-checksum", slipped.into_bytes()),
        ("bad-invitation-no-port", invitation.replace(":7700", "").into_bytes()),
        ("good-invitation", invitation.into_bytes()),
        ("good-certificate", certificate().encode()),
        ("good-name-record", named),
        ("bad-name-record-name", dots),
        ("good-revocations", list),
        ("bad-revocations-order", unsorted),
        ("bad-revocations-endless", endless),
    ]
}

#[test]
fn every_sample_is_understood_or_refused_as_its_name_says_and_has_not_changed() {
    let write = std::env::var_os("POTLUCK_WRITE_SAMPLES").is_some();
    for (target, check, samples) in targets() {
        for (name, bytes) in samples {
            assert_eq!(check(&bytes), name.starts_with("good-"), "{target}/{name}");
            let path = folder_of(target).join(name);
            if write {
                std::fs::create_dir_all(folder_of(target)).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let kept = std::fs::read(&path);
            assert!(kept.is_ok_and(|kept| kept == bytes), "{target}/{name} is written otherwise");
        }
    }
}

#[test]
fn everything_in_the_corpus_is_refused_or_has_one_form() {
    for (target, check, samples) in targets() {
        let files: Vec<_> = std::fs::read_dir(folder_of(target)).unwrap().collect();
        assert!(files.len() >= samples.len());
        for file in files {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            assert!(std::panic::catch_unwind(|| check(&bytes)).is_ok(), "{}", path.display());
        }
    }
}
