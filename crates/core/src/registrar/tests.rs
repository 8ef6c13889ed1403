use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::id::{ContentId, Name, PeerId, RequestId, Version};
use crate::seal::{ReplyHead, RequestHead, open, seal_request};
use crate::trust::{
    CERTIFICATE_LIFE, CLOCK_SKEW, Certificate, NameRecord, Role, invitation_id, join_tag,
};
use crate::wire::datagram::{
    Ack, Found, HEAD_BYTES, HELD_ALL, Item, List, Notice, Page, Register, Registered, Reply,
    Request, Row, Search, Target, Watch, Watching, digest_of,
};
use crate::wire::desk::{self, Ask, DeskCode, InviteTerms, Join, Removal};

const WALL: WallTime = WallTime(1_800_000_000);
const SECOND: Duration = Duration::from_secs(1);
const EXPORTER: [u8; 32] = [8; 32];

/// An index and its shell: what it saves is kept, what it sends is read.
struct Index {
    registrar: Registrar,
    rows: BTreeMap<(Table, Vec<u8>), Vec<u8>>,
    sent: Vec<(SocketAddr, Vec<u8>)>,
    now: Moment,
    wall: WallTime,
}

/// A member's side, as little of it as the index can tell from a real one.
struct Peer {
    key: MachineKey,
    session: desk::Session,
    counter: u64,
    cookie: [u8; 16],
    from: SocketAddr,
    asked: u64,
}

fn key() -> MachineKey {
    MachineKey::from_seed([42; 32])
}

fn boot(id: u64) -> Boot {
    Boot { id, cookie_key: [id as u8; 32], dice: id, secret_seed: [id as u8 + 100; 32] }
}

impl Index {
    fn new() -> Self {
        Self::with(Settings::default())
    }

    fn with(settings: Settings) -> Self {
        let now = Moment::from_micros(1_000_000);
        let registrar = Registrar::new(key(), boot(1), settings, std::iter::empty(), now, WALL);
        let registrar = registrar.unwrap();
        let mut index = Self { registrar, rows: BTreeMap::new(), sent: vec![], now, wall: WALL };
        index.carry();
        index
    }

    /// A new process, with these tables of what was saved.
    fn restart(&mut self, id: u64, keeps: impl Fn(Table) -> bool) {
        self.rows.retain(|(table, _), _| keeps(*table));
        let rows = self.rows.iter().map(|((table, k), v)| (*table, k.clone(), v.clone()));
        let settings = self.registrar.settings;
        let rows: Vec<_> = rows.collect();
        let registrar =
            Registrar::new(key(), boot(id), settings, rows.into_iter(), self.now, self.wall);
        self.registrar = registrar.unwrap();
        self.carry();
    }

    fn carry(&mut self) -> Vec<(Ticket, Option<Answer>)> {
        self.registrar.check();
        let mut answers = vec![];
        while let Some(output) = self.registrar.poll_output() {
            match output {
                Output::Send { to, datagram } => self.sent.push((to, datagram)),
                Output::Save(change) => {
                    let at = (change.table, change.key);
                    match change.value {
                        Some(value) => self.rows.insert(at, value),
                        None => self.rows.remove(&at),
                    };
                }
                Output::Answer { ticket, answer, .. } => answers.push((ticket, Some(answer))),
                Output::Ignore { ticket } => answers.push((ticket, None)),
            }
        }
        answers
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        self.wall = self.wall.plus(time);
        self.registrar.tick(self.now, self.wall);
        let due = self.registrar.next_deadline();
        assert!(due.is_none_or(|due| due > self.now), "a tick leaves its deadline in the past");
        self.carry();
    }

    /// Asks at the desk; `None`: silence.
    fn at_desk(&mut self, peer: PeerId, ask: Ask) -> Option<Answer> {
        let caller = Caller { peer, exporter: EXPORTER };
        self.registrar.on_ask(self.now, self.wall, caller, ask, Ticket(7));
        let mut answers = self.carry();
        assert_eq!(answers.len(), 1, "one answer a question");
        answers.remove(0).1
    }

    fn refused_at_desk(&mut self, peer: PeerId, ask: Ask) -> DeskCode {
        match self.at_desk(peer, ask) {
            Some(Answer::Refused(refusal)) => refusal.code,
            Some(_) => panic!("it was not refused"),
            None => panic!("it was ignored"),
        }
    }

    fn invite(&mut self, role: Role, uses: u32) -> [u8; 16] {
        let terms = InviteTerms { role, uses, expires: self.wall.plus(3_600 * SECOND) };
        let invited = self.registrar.make_invitation(self.now, self.wall, terms).ok().unwrap();
        self.carry();
        invited.secret
    }

    fn join(&self, secret: &[u8; 16], peer: PeerId) -> Ask {
        let tag = join_tag(secret, &EXPORTER, peer);
        Ask::Join(Join { invitation: invitation_id(secret), tag, label: "bob".into() })
    }

    fn session(&mut self, peer: PeerId) -> desk::Session {
        let ask = Ask::Session { label: "bob".into(), revocations: 0, certificate: None };
        match self.at_desk(peer, ask) {
            Some(Answer::Session(session)) => *session,
            _ => panic!("no session"),
        }
    }

    /// A new member that has proven its address.
    fn member(&mut self, n: u8, role: Role) -> Peer {
        let key = MachineKey::from_seed([n; 32]);
        let secret = self.invite(role, 1);
        let join = self.join(&secret, key.peer());
        assert!(matches!(self.at_desk(key.peer(), join), Some(Answer::Welcome(_))));
        let session = self.session(key.peer());
        let from = SocketAddr::from(([10, 0, 0, n], 4_000));
        let mut peer = Peer { key, session, counter: 0, cookie: [0; 16], from, asked: 0 };
        peer.prove(self);
        peer
    }

    fn hear(&mut self, from: SocketAddr, datagram: &[u8]) -> Vec<(SocketAddr, Vec<u8>)> {
        self.sent.clear();
        self.registrar.on_datagram(self.now, self.wall, from, &mut datagram.to_vec());
        self.carry();
        std::mem::take(&mut self.sent)
    }

    fn count(&self, which: Dropped) -> u64 {
        self.registrar.stats().dropped.get(&which).copied().unwrap_or(0)
    }
}

impl Peer {
    /// Fetches a cookie.
    fn prove(&mut self, index: &mut Index) {
        self.cookie = [0; 16];
        let Reply::Error(refusal) = self.ask(index, &search(id(200))) else { panic!("proven") };
        assert_eq!(refusal.code, Code::CookieNeeded);
        self.cookie = refusal.cookie.unwrap();
    }

    fn seal(&mut self, request: &Request) -> Vec<u8> {
        self.counter += 1;
        self.asked += 1;
        self.seal_as(request, self.counter)
    }

    fn seal_as(&self, request: &Request, counter: u64) -> Vec<u8> {
        let head = RequestHead {
            kind: request.kind(),
            epoch: self.session.epoch,
            member: self.session.member,
            salt: self.session.salt,
            counter,
            cookie: self.cookie,
        };
        seal_request(&self.session.keys.to_index, &head, &request.encode(RequestId(self.asked)))
    }

    fn open(&self, datagram: &[u8]) -> (ReplyHead, Vec<u8>) {
        let head = ReplyHead::decode(datagram).unwrap();
        let mut copy = datagram.to_vec();
        let plain = open(&self.session.keys.reply_key(head.boot), head.counter, &mut copy)
            .unwrap()
            .to_vec();
        (head, plain)
    }

    fn ask(&mut self, index: &mut Index, request: &Request) -> Reply {
        let datagram = self.seal(request);
        let replies = index.hear(self.from, &datagram);
        let [(to, reply)] = &replies[..] else { panic!("{} replies", replies.len()) };
        assert_eq!(*to, self.from);
        let (head, plain) = self.open(reply);
        let (of, reply) = Reply::decode(head.kind, &plain).unwrap();
        assert_eq!(of, RequestId(self.asked));
        reply
    }

    fn register(&mut self, index: &mut Index, items: Vec<Item>) -> Registered {
        self.report(index, Register { items, ..report() })
    }

    fn report(&mut self, index: &mut Index, register: Register) -> Registered {
        match self.ask(index, &Request::Register(register)) {
            Reply::Ack(Ack::Registered(registered)) => registered,
            other => panic!("{other:?}"),
        }
    }

    fn search(&mut self, index: &mut Index, of: ContentId) -> Result<Found, Code> {
        match self.ask(index, &search(of)) {
            Reply::Ack(Ack::Found(found)) => Ok(found),
            Reply::Error(refusal) => Err(refusal.code),
            other => panic!("{other:?}"),
        }
    }

    fn list(&mut self, index: &mut Index) -> Page {
        match self.ask(index, &Request::List(List { glob: "*".into(), after: None })) {
            Reply::Ack(Ack::Page(page)) => page,
            other => panic!("{other:?}"),
        }
    }

    fn watch(&mut self, index: &mut Index, glob: &str, since: u64) -> Watching {
        match self.ask(index, &Request::Watch(Watch { glob: glob.into(), since, stop: false })) {
            Reply::Ack(Ack::Watching(watching)) => watching,
            other => panic!("{other:?}"),
        }
    }

    /// Time passes for the index; what it pushes to this peer meanwhile.
    fn notices(&self, index: &mut Index, time: Duration) -> Vec<Notice> {
        index.sent.clear();
        index.pass(time);
        let sent = std::mem::take(&mut index.sent);
        let mine = sent.iter().filter(|(to, datagram)| *to == self.from && datagram[0] == b'N');
        mine.map(|(_, datagram)| Notice::decode(&self.open(datagram).1).unwrap()).collect()
    }

    fn named(&self, n: u8, name: &str, version: u32) -> Item {
        let name: Name = name.parse().unwrap();
        let (network, time) = (key().network(), WallTime(WALL.0 + u64::from(version)));
        let record = NameRecord::sign(&self.key, network, name, Version(version), id(n), time);
        Item { name: Some(record), ..item(n) }
    }
}

fn id(n: u8) -> ContentId {
    ContentId::file([n; 32])
}

fn item(n: u8) -> Item {
    Item { id: id(n), size: 10, held: HELD_ALL, name: None }
}

fn search(of: ContentId) -> Request {
    Request::Search(Search { target: Target::Id(of), hosts: 20, avoid: vec![] })
}

fn report() -> Register {
    Register {
        port: 7_000,
        load: Load { uploads: 0, free_slots: 4, rate_kib: 0, capacity_kib: 0 },
        digest: [0; 16],
        round: 0,
        round_ends: false,
        items: vec![],
    }
}

fn digest(items: &[Item]) -> [u8; 16] {
    items.iter().map(digest_of).fold(0, u128::wrapping_add).to_le_bytes()
}

fn every_request() -> Vec<Request> {
    vec![
        Request::Register(Register { items: vec![item(1)], ..report() }),
        search(id(1)),
        Request::List(List { glob: "*".into(), after: None }),
        Request::Deregister(vec![id(1)]),
        Request::Watch(Watch { glob: "*".into(), since: 0, stop: false }),
    ]
}

#[test]
fn a_registered_content_is_found_with_the_address_the_index_saw() {
    let mut index = Index::new();
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Read));
    let done = a.register(&mut index, vec![item(1)]);
    assert_eq!((done.lease_s, done.heartbeat_s, done.repeat_all), (75, 25, false));
    assert_eq!(done.refused, []);
    let found = b.search(&mut index, id(1)).unwrap();
    assert_eq!((found.size, found.hosts_in_all), (10, 1));
    assert_eq!(found.hosts[0].address, SocketAddr::new(a.from.ip(), 7_000));
    assert_eq!(found.hosts[0].peer, a.key.peer());
    assert_eq!(a.ask(&mut index, &Request::Deregister(vec![id(1)])), Reply::Ack(Ack::Deregistered));
    assert_eq!(b.search(&mut index, id(1)), Err(Code::NotFound));
    assert!(index.rows.keys().all(|(table, _)| *table < Table::Names), "nothing of it stays saved");
}

#[test]
fn before_an_address_is_proven_replies_are_smaller_than_requests_and_nothing_happens() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    peer.cookie = [0; 16];
    for request in every_request() {
        let (datagram, rows) = (peer.seal(&request), index.rows.clone());
        let replies = index.hear(peer.from, &datagram);
        assert_eq!(replies.len(), 1);
        assert!(
            replies[0].1.len() < datagram.len(),
            "{} for {}",
            replies[0].1.len(),
            datagram.len()
        );
        let (head, plain) = peer.open(&replies[0].1);
        let Ok((_, Reply::Error(refusal))) = Reply::decode(head.kind, &plain) else { panic!() };
        assert_eq!(refusal.code, Code::CookieNeeded);
        assert!(index.rows == rows && index.registrar.catalog().listing().is_empty());
        assert_eq!(index.registrar.stats().watchers, 0);
    }
    // A cookie proves one address, for two minutes at most.
    peer.prove(&mut index);
    let datagram = peer.seal(&every_request()[0]);
    let elsewhere = SocketAddr::from(([10, 0, 0, 1], 4_001));
    assert!(index.hear(elsewhere, &datagram)[0].1.len() < datagram.len());
    assert!(index.registrar.catalog().listing().is_empty());
    peer.register(&mut index, vec![item(1)]);
    index.pass(CookieJar::LIFE);
    let Reply::Error(refusal) = peer.ask(&mut index, &search(id(1))) else { panic!() };
    assert_eq!(refusal.code, Code::CookieNeeded);
}

#[test]
fn a_replayed_request_gets_no_answer_and_has_no_effect() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    let register = peer.seal(&every_request()[0]);
    assert_eq!(index.hear(peer.from, &register).len(), 1);
    peer.ask(&mut index, &Request::Deregister(vec![id(1)]));
    for _ in 0..3 {
        assert!(index.hear(peer.from, &register).is_empty());
    }
    assert_eq!(index.count(Dropped::Replayed), 3);
    assert!(index.registrar.catalog().listing().is_empty());
}

#[test]
fn a_change_that_a_later_one_has_overtaken_is_not_made() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    peer.register(&mut index, vec![item(1), item(2)]);
    let late = [
        Request::Register(Register { items: vec![item(3)], ..report() }),
        Request::Register(Register { round: 9, round_ends: true, ..report() }),
        Request::Deregister(vec![id(2)]),
    ];
    let late: Vec<_> = late.iter().map(|request| peer.seal(request)).collect();
    let heartbeat = peer.seal(&Request::Register(report()));
    peer.ask(&mut index, &Request::Deregister(vec![id(1)]));
    for datagram in &late {
        assert!(index.hear(peer.from, datagram).is_empty());
    }
    assert_eq!(index.count(Dropped::Overtaken), 3);
    assert_eq!(index.hear(peer.from, &heartbeat).len(), 1, "what changes nothing may come late");
    assert_eq!(index.registrar.catalog().hosts().into_keys().collect::<Vec<_>>(), [id(2)]);
    // Asked again, it is done; and so is what a newer session asks.
    peer.register(&mut index, vec![item(3)]);
    let old = peer.seal(&Request::Deregister(vec![id(3)]));
    peer.session = index.session(peer.key.peer());
    peer.counter = 0;
    peer.register(&mut index, vec![item(4)]);
    assert!(index.hear(peer.from, &old).is_empty(), "an older session's change comes too late");
    assert_eq!(index.registrar.catalog().counts().registrations, 3);
}

#[test]
fn a_watch_that_comes_late_does_not_take_the_place_of_a_newer_one() {
    let mut index = Index::new();
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    let watch = |glob: &str, stop| Request::Watch(Watch { glob: glob.into(), since: 0, stop });
    let late = [b.seal(&watch("*", false)), b.seal(&watch("*", true))];
    let register = b.seal(&every_request()[0]);
    b.watch(&mut index, "game*", 0);
    for datagram in &late {
        assert!(index.hear(b.from, datagram).is_empty());
    }
    assert_eq!(index.hear(b.from, &register).len(), 1, "what it hosts is ordered by itself");
    let game = a.named(3, "game", 1);
    a.register(&mut index, vec![item(4), game]);
    let notices = b.notices(&mut index, SECOND);
    assert_eq!((notices.len(), notices[0].rows.len()), (1, 1), "the newer watch stands");
}

#[test]
fn a_lease_lapses_after_three_missed_heartbeats_and_an_empty_report_renews_it() {
    let mut index = Index::new();
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    a.register(&mut index, vec![item(1), item(2)]);
    b.register(&mut index, vec![item(2)]);
    for _ in 0..4 {
        index.pass(30 * SECOND);
        a.prove(&mut index);
        a.register(&mut index, vec![]);
    }
    let hosts = index.registrar.catalog().hosts();
    assert_eq!(hosts[&id(2)].keys().collect::<Vec<_>>(), [&a.key.peer()], "b's lease is over");
    assert_eq!(index.registrar.stats().lapsed, 1);
    let due = index.registrar.next_deadline().unwrap();
    assert!(due <= index.now + 90 * SECOND, "somebody looks at the lease in time");
    index.pass(90 * SECOND);
    assert!(index.registrar.catalog().listing().is_empty());
    assert!(index.rows.keys().all(|(table, _)| *table < Table::Addresses));
}

#[test]
fn a_wall_clock_that_jumps_moves_no_lease_and_costs_nobody_its_session() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    peer.register(&mut index, vec![item(1)]);
    let five_years = Duration::from_secs(5 * 365 * 24 * 3_600);
    for wall in [WALL.minus(3_600 * SECOND), WALL.plus(five_years), WALL] {
        index.wall = wall;
        for _ in 0..4 {
            index.pass(25 * SECOND);
            peer.prove(&mut index);
            peer.register(&mut index, vec![]);
        }
        assert_eq!(index.registrar.stats().lapsed, 0, "at {wall}");
        assert_eq!(index.registrar.catalog().counts().registrations, 1);
    }
    index.wall = WALL.plus(five_years);
    index.pass(74 * SECOND);
    assert_eq!(index.registrar.stats().lapsed, 0, "not before its time");
    index.wall = WALL.minus(3_600 * SECOND);
    index.pass(2 * SECOND);
    assert_eq!(index.registrar.stats().lapsed, 1, "nor after it");
    // What a machine with a right clock says of a certificate that was issued at another time.
    index.wall = WALL.plus(five_years);
    let early = index.session(peer.key.peer()).certificate;
    let distrust = early.check(key().network(), peer.key.peer(), WALL).unwrap_err();
    assert!(distrust.to_string().contains("clock"), "{distrust}");
    let old = peer.session.certificate.check(key().network(), peer.key.peer(), index.wall);
    assert!(old.unwrap_err().to_string().contains("clock"));
}

#[test]
fn a_digest_that_differs_asks_for_everything_and_a_round_heals() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    let believed = [item(1), item(2), peer.named(3, "game", 1)];
    peer.register(&mut index, believed.to_vec());
    let beat = Register { digest: digest(&believed), ..report() };
    assert!(!peer.report(&mut index, beat.clone()).repeat_all);
    // The index knows one too many, and not one of the others.
    peer.register(&mut index, vec![item(9)]);
    peer.ask(&mut index, &Request::Deregister(vec![id(1)]));
    assert!(peer.report(&mut index, beat.clone()).repeat_all);
    assert!(!peer.report(&mut index, report()).repeat_all, "zeroes are no digest");
    let (first, last) = believed.split_at(2);
    let part = Register { round: 5, items: first.to_vec(), ..report() };
    peer.report(&mut index, part);
    assert_eq!(index.registrar.catalog().counts().registrations, 4, "nothing goes before the end");
    let end = Register { round: 5, round_ends: true, items: last.to_vec(), ..beat.clone() };
    assert!(!peer.report(&mut index, end.clone()).repeat_all);
    assert_eq!(index.registrar.catalog().counts().registrations, 3);
    // The end said again forgets nothing that came after it.
    peer.register(&mut index, vec![item(7)]);
    peer.report(&mut index, Register { items: vec![], digest: [0; 16], ..end });
    assert_eq!(index.registrar.catalog().counts().registrations, 4);
}

#[test]
fn a_restarted_index_lists_everything_again_at_once() {
    let mut index = Index::new();
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    let game = a.named(1, "game", 1);
    a.register(&mut index, vec![game.clone(), item(2)]);
    let part = Item { held: 300, ..item(2) };
    b.register(&mut index, vec![part.clone()]);
    let before = index.registrar.catalog().listing();
    index.restart(2, |_| true);
    assert_eq!(index.registrar.catalog().listing(), before);
    // The old session's keys still fit: only the cookie is asked for anew.
    a.prove(&mut index);
    b.prove(&mut index);
    assert_eq!(
        b.search(&mut index, id(1)).unwrap().hosts[0].address,
        "10.0.0.1:7000".parse().unwrap()
    );
    let all = [game, item(2)];
    assert!(!a.report(&mut index, Register { digest: digest(&all), ..report() }).repeat_all);
    // How much of a content a host holds is not saved: it is asked to tell.
    let beat = Register { digest: digest(std::slice::from_ref(&part)), ..report() };
    assert!(b.report(&mut index, beat.clone()).repeat_all);
    let round = Register { round: 1, round_ends: true, items: vec![part], ..beat.clone() };
    assert!(!b.report(&mut index, round).repeat_all);
    assert!(!b.report(&mut index, beat).repeat_all);
    assert_eq!(index.registrar.catalog().hosts()[&id(2)][&b.key.peer()], 300);
    // Whoever does not report within a lease is gone, as always.
    index.pass(90 * SECOND);
    assert!(index.registrar.catalog().listing().is_empty());
}

#[test]
fn damaged_or_disordered_rows_are_an_error_not_a_panic() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    let game = peer.named(1, "game", 1);
    peer.register(&mut index, vec![game]);
    let rows: Vec<_> = index.rows.iter().map(|((t, k), v)| (*t, k.clone(), v.clone())).collect();
    let tables: BTreeSet<Table> = rows.iter().map(|(table, ..)| *table).collect();
    assert_eq!(tables.len(), Table::ALL.len() - 1, "all tables but the revocations are in use");
    let open = |rows: Vec<_>| {
        let settings = Settings::default();
        Registrar::new(key(), boot(2), settings, rows.into_iter(), index.now, WALL).err()
    };
    assert!(open(rows.clone()).is_none());
    for at in 0..rows.len() {
        let mut bent = rows.clone();
        bent[at].2.truncate(3);
        assert!(matches!(open(bent), Some(RestoreError::Damaged(table, _)) if table == rows[at].0));
    }
    let backwards: Vec<_> = rows.iter().rev().cloned().collect();
    assert!(matches!(open(backwards), Some(RestoreError::Order(_))));
}

#[test]
fn whoever_does_not_know_an_invitation_is_ignored() {
    let mut index = Index::new();
    let secret = index.invite(Role::Publish, 5);
    let (bob, eve) = (MachineKey::from_seed([1; 32]).peer(), MachineKey::from_seed([2; 32]).peer());
    let Ask::Join(good) = index.join(&secret, bob) else { panic!() };
    let mut bent = good.tag;
    bent[31] ^= 1;
    let asks = [
        (bob, Ask::Join(Join { tag: bent, ..good.clone() })),
        (bob, Ask::Join(Join { invitation: [0; 8], ..good.clone() })),
        (eve, Ask::Join(good.clone())), // another's tag
        (eve, Ask::Session { label: String::new(), revocations: 0, certificate: None }),
        (eve, Ask::Members),
        (eve, Ask::Remove(Removal::Peer(bob))),
    ];
    for (who, ask) in asks {
        assert!(index.at_desk(who, ask).is_none(), "a stranger got an answer");
    }
    assert_eq!(index.registrar.stats().members, 0);
    assert!(matches!(index.at_desk(bob, Ask::Join(good)), Some(Answer::Welcome(_))));
}

#[test]
fn a_hundred_joins_with_a_single_use_invitation_make_one_member() {
    let mut index = Index::new();
    let secret = index.invite(Role::Read, 1);
    let mut welcome = 0;
    for n in 0..100 {
        let peer = MachineKey::from_seed([n; 32]).peer();
        let join = index.join(&secret, peer);
        match index.at_desk(peer, join) {
            Some(Answer::Welcome(certificate)) => {
                assert_eq!((certificate.role, certificate.peer), (Role::Read, peer));
                assert_eq!(certificate.check(key().network(), peer, WALL), Ok(()));
                welcome += 1;
            }
            Some(Answer::Refused(refusal)) => assert_eq!(refusal.code, DeskCode::UsedUp),
            _ => panic!("neither welcome nor refused"),
        }
    }
    assert_eq!((welcome, index.registrar.stats().members), (1, 1));
    // The one that is a member may say it again, also after a restart; it costs no use.
    index.restart(2, |_| true);
    let peer = MachineKey::from_seed([0; 32]).peer();
    let again = index.join(&secret, peer);
    assert!(matches!(index.at_desk(peer, again), Some(Answer::Welcome(_))));
    assert_eq!(index.registrar.stats().members, 1);
}

#[test]
fn expired_and_withdrawn_invitations_say_so_to_those_who_know_them() {
    let mut index = Index::new();
    let (bob, eve) = (MachineKey::from_seed([1; 32]).peer(), MachineKey::from_seed([2; 32]).peer());
    let secret = index.invite(Role::Publish, 9);
    let join = index.join(&secret, bob);
    assert!(matches!(index.at_desk(bob, join), Some(Answer::Welcome(_))));
    let removal = Removal::Invitation(invitation_id(&secret));
    assert_eq!(index.registrar.remove(index.now, index.wall, &removal), Ok(1));
    index.carry();
    let (bobs, eves) = (index.join(&secret, bob), index.join(&secret, eve));
    assert_eq!(index.refused_at_desk(bob, bobs), DeskCode::Removed);
    assert_eq!(index.refused_at_desk(eve, eves), DeskCode::Withdrawn);
    let secret = index.invite(Role::Publish, 9);
    index.pass(3_601 * SECOND);
    let join = index.join(&secret, eve);
    assert_eq!(index.refused_at_desk(eve, join), DeskCode::Expired);
    let unknown = index.registrar.remove(index.now, index.wall, &Removal::Peer(eve));
    assert_eq!(unknown.unwrap_err().code, DeskCode::NotFound);
    for (uses, days) in [(0, 1), (1, 0), (1, 400)] {
        let expires = index.wall.plus(days * 86_400 * SECOND);
        let terms = InviteTerms { role: Role::Read, uses, expires };
        let refused = index.registrar.make_invitation(index.now, index.wall, terms).err().unwrap();
        assert_eq!(refused.code, DeskCode::BadRequest);
    }
}

#[test]
fn a_removed_member_is_out_with_its_next_datagram_and_every_reply_says_there_is_news() {
    let mut index = Index::new();
    let mut admin = index.member(1, Role::Admin);
    let (mut bob, mut eve) = (index.member(2, Role::Publish), index.member(3, Role::Publish));
    bob.register(&mut index, vec![item(1)]);
    bob.watch(&mut index, "*", 0);
    let remove = || Ask::Remove(Removal::Peer(MachineKey::from_seed([2; 32]).peer()));
    assert_eq!(index.refused_at_desk(eve.key.peer(), remove()), DeskCode::NotAllowed);
    assert!(matches!(index.at_desk(admin.key.peer(), remove()), Some(Answer::Removed(1))));
    assert!(matches!(index.at_desk(admin.key.peer(), remove()), Some(Answer::Removed(0))));
    assert_eq!(admin.search(&mut index, id(1)), Err(Code::NotFound), "its leases are gone");
    assert_eq!(index.registrar.stats().watchers, 0);
    for request in every_request() {
        let Reply::Error(refusal) = bob.ask(&mut index, &request) else { panic!("not refused") };
        assert_eq!(refusal.code, Code::Removed);
    }
    bob.cookie = [0; 16];
    let datagram = bob.seal(&search(id(1)));
    assert!(index.hear(bob.from, &datagram)[0].1.len() < datagram.len());
    let datagram = eve.seal(&search(id(1)));
    let reply = index.hear(eve.from, &datagram);
    let version = eve.open(&reply[0].1).0.revocations;
    let list = index.session(eve.key.peer()).revocations.unwrap();
    assert_eq!((list.version, list.check(key().network())), (version, Ok(())));
    assert!(list.peers.contains(&bob.key.peer()));
    let ask = Ask::Session { label: String::new(), revocations: version, certificate: None };
    let Some(Answer::Session(session)) = index.at_desk(eve.key.peer(), ask) else { panic!() };
    assert!(session.revocations.is_none(), "a list is sent to who has an older one");
    let bobs = Ask::Session {
        label: String::new(),
        revocations: 0,
        certificate: Some(bob.session.certificate.clone()),
    };
    assert_eq!(index.refused_at_desk(bob.key.peer(), bobs.clone()), DeskCode::Removed);
    index.restart(2, |_| true);
    assert_eq!(index.refused_at_desk(bob.key.peer(), bobs), DeskCode::Removed);
    // Found by the simulation of everything, seed 47: eve was removed while the clock was five years
    // ahead, bob left the list as one whose certificate had expired, and was let in again.
    let removal = Removal::Peer(eve.key.peer());
    let ahead = index.wall.plus(CERTIFICATE_LIFE * 2_000);
    assert_eq!(index.registrar.remove(index.now, ahead, &removal), Ok(1));
    let list = index.registrar.revocations();
    assert_eq!(list.peers, [bob.key.peer(), eve.key.peer()].into());
    assert!(list.version > version);
}

#[test]
fn of_many_removed_machines_those_leave_the_list_whose_certificates_expired_long_ago() {
    let mut roster = members::Roster::new(&key(), 10_000, 1);
    let peer = |n: u16| {
        let mut peer = [7; 32];
        peer[..2].copy_from_slice(&n.to_be_bytes());
        crate::id::PeerId(peer)
    };
    for n in 1..=1_200 {
        roster.restore_member(Member {
            peer: peer(n),
            number: MemberNumber(n.into()),
            role: Role::Read,
            label: String::new(),
            joined: WALL,
            invitation: [0; 8],
            removed: (n < 1_200).then(|| WALL.plus(Duration::from_secs(n.into()))),
        });
    }
    roster.restore_revocations(RevocationList::issue(&key(), 3, (1..1_200).map(peer).collect()));
    let removal = Removal::Peer(peer(1_200));
    let later = WALL.plus(CERTIFICATE_LIFE * 3);
    assert!(roster.remove(&key(), &removal, later, &mut vec![]).is_ok());
    assert_eq!(roster.revocations().peers, (200..=1_200).map(peer).collect());
}

#[test]
fn an_index_that_lost_its_file_takes_back_who_shows_its_own_signature() {
    let mut index = Index::new();
    let (bob, eve) = (index.member(1, Role::Publish), index.member(2, Role::Read));
    index.restart(2, |_| false);
    let show = |certificate: &Certificate| Ask::Session {
        label: "bob".into(),
        revocations: 0,
        certificate: Some(certificate.clone()),
    };
    let own = &bob.session.certificate;
    assert!(index.at_desk(eve.key.peer(), show(own)).is_none(), "another's certificate");
    let promoted = Certificate { role: Role::Admin, ..own.clone() };
    assert!(index.at_desk(bob.key.peer(), show(&promoted)).is_none(), "a bent one");
    // Somebody new has bob's number meanwhile.
    let new = index.member(3, Role::Publish);
    assert_eq!(new.session.member, bob.session.member);
    let Some(Answer::Session(session)) = index.at_desk(bob.key.peer(), show(own)) else { panic!() };
    assert_ne!(session.member, bob.session.member);
    assert_eq!(session.certificate.role, Role::Publish);
    let certificate = &eve.session.certificate;
    let Some(Answer::Session(session)) = index.at_desk(eve.key.peer(), show(certificate)) else {
        panic!()
    };
    assert_eq!(session.certificate.role, Role::Read);
    index.pass(CERTIFICATE_LIFE + 2 * CLOCK_SKEW);
    index.restart(3, |_| false);
    assert!(index.at_desk(bob.key.peer(), show(own)).is_none(), "an expired one");
}

#[test]
fn the_operator_may_do_at_the_index_what_an_admin_may_at_the_desk() {
    let mut index = Index::new();
    let mut bob = index.member(1, Role::Publish);
    bob.register(&mut index, vec![]);
    let ask = |index: &mut Index, ask| {
        index.registrar.on_operator(index.now, index.wall, ask, Ticket(3));
        index.carry().remove(0).1.unwrap()
    };
    let Answer::Members(members) = ask(&mut index, Ask::Members) else { panic!() };
    assert_eq!((members.len(), members[0].peer, members[0].silent_s), (1, bob.key.peer(), Some(0)));
    let terms = InviteTerms { role: Role::Admin, uses: 1, expires: WALL.plus(60 * SECOND) };
    let Answer::Invited { secret, .. } = ask(&mut index, Ask::Invite(terms)) else { panic!() };
    let peer = MachineKey::from_seed([2; 32]).peer();
    let join = index.join(&secret, peer);
    assert!(matches!(index.at_desk(peer, join), Some(Answer::Welcome(_))));
    assert!(matches!(index.at_desk(peer, Ask::Members), Some(Answer::Members(m)) if m.len() == 2));
    let removal = Ask::Remove(Removal::Peer(bob.key.peer()));
    assert!(matches!(ask(&mut index, removal), Answer::Removed(1)));
    assert!(matches!(ask(&mut index, join_of(bob.key.peer())), Answer::Refused(_)));
}

fn join_of(peer: PeerId) -> Ask {
    Ask::Join(Join { invitation: [0; 8], tag: peer.0, label: String::new() })
}

#[test]
fn a_member_that_only_reads_hosts_what_is_known_and_publishes_nothing() {
    let mut index = Index::new();
    let mut publisher = index.member(1, Role::Publish);
    let mut reader = index.member(2, Role::Read);
    let code = |done: &Registered| done.refused.first().map(|(_, refusal)| refusal.code);
    assert_eq!(code(&reader.register(&mut index, vec![item(1)])), Some(Code::NotAllowed));
    publisher.register(&mut index, vec![item(1)]);
    assert_eq!(code(&reader.register(&mut index, vec![item(1)])), None);
    let own = reader.named(1, "mine", 1);
    assert_eq!(code(&reader.register(&mut index, vec![own])), Some(Code::NotAllowed));
    // What a publisher signed may be brought along: an index that lost its names finds them again.
    let game = publisher.named(5, "game", 1);
    publisher.register(&mut index, vec![game.clone()]);
    index.restart(2, |table| table < Table::Names);
    reader.prove(&mut index);
    assert_eq!(code(&reader.register(&mut index, vec![game.clone()])), None);
    let found = reader.ask(&mut index, &Request::List(List { glob: "game".into(), after: None }));
    assert!(matches!(found, Reply::Ack(Ack::Page(page)) if page.rows.len() == 1));
    let mut forged = publisher.named(6, "game", 2);
    if let Some(record) = &mut forged.name {
        record.version = Version(3);
    }
    assert_eq!(code(&reader.register(&mut index, vec![forged])), Some(Code::BadSignature));
    let stranger = Peer { key: MachineKey::from_seed([77; 32]), ..index.member(3, Role::Read) };
    let smuggled = stranger.named(7, "smuggled", 1);
    assert_eq!(code(&reader.register(&mut index, vec![smuggled])), Some(Code::NotAllowed));
}

/// A member's searches for what nobody hosts, at once: the codes they were answered with.
fn storm(index: &mut Index, peer: &mut Peer, count: usize) -> Vec<Code> {
    let mut codes = vec![];
    for _ in 0..count {
        let datagram = peer.seal(&search(id(1)));
        for (_, reply) in index.hear(peer.from, &datagram) {
            let (head, plain) = peer.open(&reply);
            let Ok((_, Reply::Error(refusal))) = Reply::decode(head.kind, &plain) else { panic!() };
            codes.push(refusal.code);
        }
    }
    codes
}

/// Ten requests a second, twenty at once. Members that are made take one to prove their address.
fn strict() -> Index {
    Index::with(Settings { requests_a_second: 10, burst: 20, ..Settings::default() })
}

#[test]
fn who_asks_too_fast_is_told_so_once_then_passed_over_and_others_notice_nothing() {
    let mut index = strict();
    let (mut fast, mut calm) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    let codes = storm(&mut index, &mut fast, 50);
    assert_eq!(codes, [[Code::NotFound; 19].as_slice(), &[Code::TooFast]].concat());
    assert_eq!(index.count(Dropped::TooFast), 30);
    assert_eq!(calm.search(&mut index, id(1)), Err(Code::NotFound));
    // None of it is opened: what is forged in its name, or comes in another session, fares the same.
    let mut forged = fast.seal(&search(id(1)));
    forged[60] ^= 1;
    assert!(index.hear(fast.from, &forged).is_empty());
    fast.session = index.session(fast.key.peer());
    assert!(storm(&mut index, &mut fast, 1).is_empty());
    assert_eq!((index.count(Dropped::TooFast), index.count(Dropped::Forged)), (32, 0));
    index.pass(SECOND);
    let codes = storm(&mut index, &mut fast, 50);
    assert_eq!(codes, [[Code::NotFound; 10].as_slice(), &[Code::TooFast]].concat());
    assert!(index.hear(fast.from, &forged).is_empty());
    index.pass(SECOND);
    assert!(index.hear(fast.from, &forged).is_empty());
    assert_eq!(index.count(Dropped::Forged), 1, "and then it is opened again");
}

#[test]
fn nobody_takes_from_a_members_bucket_by_forging_or_replaying_its_datagrams() {
    let mut index = strict();
    let mut peer = index.member(1, Role::Publish);
    let datagram = peer.seal(&search(id(1)));
    assert_eq!(index.hear(peer.from, &datagram).len(), 1);
    let mut forged = peer.seal(&search(id(1)));
    forged[60] ^= 1;
    for _ in 0..100 {
        assert!(index.hear(peer.from, &forged).is_empty());
        assert!(index.hear(peer.from, &datagram).is_empty());
    }
    assert_eq!(storm(&mut index, &mut peer, 18), [Code::NotFound; 18]);
    assert_eq!((index.count(Dropped::Forged), index.count(Dropped::Replayed)), (100, 100));
}

#[test]
fn who_proves_no_address_or_is_no_member_any_more_may_ask_no_faster() {
    let mut index = strict();
    let (mut boss, mut peer) = (index.member(1, Role::Admin), index.member(2, Role::Publish));
    let cookie = std::mem::take(&mut peer.cookie);
    assert_eq!(storm(&mut index, &mut peer, 50), [Code::CookieNeeded; 20]);
    assert_eq!(index.count(Dropped::TooFast), 30);
    peer.cookie = cookie;
    let out = Ask::Remove(Removal::Peer(peer.key.peer()));
    assert!(matches!(index.at_desk(boss.key.peer(), out), Some(Answer::Removed(1))));
    index.pass(SECOND);
    assert_eq!(storm(&mut index, &mut peer, 50), [Code::Removed; 11]);
    assert_eq!(boss.search(&mut index, id(1)), Err(Code::NotFound));
}

#[test]
fn a_gate_that_has_not_heard_who_is_passed_over_learns_it_with_the_first_it_opens() {
    let mut index = strict();
    let mut peer = index.member(1, Role::Publish);
    storm(&mut index, &mut peer, 20);
    let mut other = index.registrar.gate();
    let (now, from) = (index.now, peer.from);
    let mut batch: Vec<_> = (0..3).map(|_| peer.seal(&search(id(1)))).collect();
    let opened: Vec<_> =
        batch.iter_mut().filter_map(|bytes| other.open(now, from, bytes)).collect();
    assert_eq!(opened.len(), 3);
    index.registrar.on_batch(now, &opened);
    index.registrar.brief(&mut other);
    assert!(index.carry().is_empty() && index.sent.is_empty(), "not a byte");
    assert!(other.open(now, from, &mut peer.seal(&search(id(1)))).is_none());
    assert!(other.has_dropped());
    let later = now + pace::PAUSE;
    assert!(other.open(later, from, &mut peer.seal(&search(id(1)))).is_some());
}

/// A registration of `count` contents that nobody else hosts.
fn unheard_of(from: u32, count: u32) -> Request {
    let item = |n: u32| {
        let id = ContentId::file(*blake3::hash(&n.to_be_bytes()).as_bytes());
        Item { id, size: 1, held: HELD_ALL, name: None }
    };
    Request::Register(Register { items: (from..from + count).map(item).collect(), ..report() })
}

#[test]
fn a_member_that_registers_a_million_contents_changes_nothing_for_the_others() {
    const TRIES: u32 = 1_000_000;
    const AT_ONCE: u32 = 20;
    let mut index = Index::new();
    let mut honest = index.member(1, Role::Publish);
    let mut greedy = index.member(2, Role::Publish);
    honest.prove(&mut index);
    greedy.prove(&mut index);
    assert!(honest.register(&mut index, vec![item(1)]).refused.is_empty());
    let most = Limits::default().registrations_a_member;
    let mut memory = 0;
    for from in (0..TRIES).step_by(AT_ONCE as usize) {
        // As fast as a member may, and its cookie is renewed when it has to be.
        index.now = index.now + Duration::from_millis(1);
        if from % 20_000 == 0 {
            greedy.prove(&mut index);
        }
        let mut datagram = greedy.seal(&unheard_of(from, AT_ONCE));
        index.registrar.on_datagram(index.now, index.wall, greedy.from, &mut datagram);
        // What it changes is not kept here: `carry` looks at everything each time.
        while index.registrar.poll_output().is_some() {}
        if from == most as u32 / AT_ONCE * AT_ONCE {
            memory = index.registrar.stats().memory;
        }
    }
    let stats = index.registrar.stats();
    assert_eq!(stats.counts.registrations, most + 1);
    assert_eq!(stats.items_refused[&Code::Quota], u64::from(TRIES) - most as u64);
    assert!(stats.memory < memory + 100_000, "refusing takes no memory");
    assert!(honest.register(&mut index, vec![item(2)]).refused.is_empty());
    assert_eq!(honest.search(&mut index, id(2)).unwrap_err(), Code::NoHosts, "its own alone");
    assert!(greedy.search(&mut index, id(2)).is_ok());
}

#[test]
fn a_host_that_two_members_complain_of_sinks_for_all_and_one_alone_sinks_nobody() {
    let mut index = Index::new();
    let mut hosts: Vec<Peer> = (1..=4).map(|n| index.member(n, Role::Publish)).collect();
    let mut fetchers: Vec<Peer> = (5..=7).map(|n| index.member(n, Role::Publish)).collect();
    for host in &mut hosts {
        host.register(&mut index, vec![item(1)]);
    }
    let bad = hosts[0].key.peer();
    let ask = |fetcher: &mut Peer, index: &mut Index, avoid: Vec<PeerId>| {
        fetcher.prove(index);
        let search = Search { target: Target::Id(id(1)), hosts: 20, avoid };
        match fetcher.ask(index, &Request::Search(search)) {
            Reply::Ack(Ack::Found(found)) => found.hosts.iter().map(|host| host.peer).collect(),
            other => panic!("{other:?}"),
        }
    };
    let place = |told: Vec<PeerId>| told.iter().position(|peer| *peer == bad).unwrap();
    // One fetcher's word is heeded in its own answers alone, however often it is said.
    let other = &mut fetchers[1];
    let before = (0..8).map(|_| place(ask(other, &mut index, vec![]))).min();
    assert_eq!(before, Some(0));
    for _ in 0..8 {
        assert_eq!(place(ask(&mut fetchers[0], &mut index, vec![bad])), 3);
    }
    let after = (0..8).map(|_| place(ask(&mut fetchers[1], &mut index, vec![]))).min();
    assert_eq!(after, Some(0), "a single member sank a host");
    // The host's own word does not count, nor that of who is no member; a second member's does.
    hosts[0].prove(&mut index);
    ask(&mut hosts[0], &mut index, vec![bad, PeerId([9; 32])]);
    assert_eq!(place(ask(&mut fetchers[1], &mut index, vec![bad])), 3);
    for _ in 0..8 {
        assert_eq!(place(ask(&mut fetchers[2], &mut index, vec![])), 3, "it sinks for all");
    }
    // Its heartbeats do not raise it; that nobody complained for long does.
    hosts[0].register(&mut index, vec![item(1)]);
    assert_eq!(place(ask(&mut fetchers[2], &mut index, vec![])), 3);
    for _ in 0..11 {
        index.pass(60 * SECOND);
        for host in &mut hosts {
            host.prove(&mut index);
            host.register(&mut index, vec![item(1)]);
        }
    }
    let at_last = (0..8).map(|_| place(ask(&mut fetchers[2], &mut index, vec![]))).min();
    assert_eq!(at_last, Some(0));
}

#[test]
fn two_that_conspire_sink_few_hosts_and_never_all() {
    let mut index = Index::new();
    let mut hosts: Vec<Peer> = (1..=30).map(|n| index.member(n, Role::Publish)).collect();
    let mut liars: Vec<Peer> = (31..=32).map(|n| index.member(n, Role::Publish)).collect();
    for host in &mut hosts {
        host.register(&mut index, vec![item(1)]);
    }
    let peers: Vec<PeerId> = hosts.iter().map(|host| host.key.peer()).collect();
    for liar in &mut liars {
        liar.prove(&mut index);
        for avoid in peers.chunks(Search::MAX_AVOIDED) {
            let target = Target::Id(id(1));
            let search = Search { target, hosts: 20, avoid: avoid.to_vec() };
            assert!(matches!(liar.ask(&mut index, &Request::Search(search)), Reply::Ack(_)));
        }
    }
    index.registrar.check();
    let sunk = (1..=30).filter(|n| index.registrar.blames.sinks(MemberNumber(*n))).count();
    assert_eq!(sunk, 16);
}

#[test]
fn an_index_whose_memory_is_full_refuses_what_would_stay_and_serves_on() {
    let mut index = Index::new();
    let mut alice = index.member(1, Role::Publish);
    let mut bob = index.member(2, Role::Publish);
    assert!(alice.register(&mut index, vec![item(1), item(2)]).refused.is_empty());
    bob.prove(&mut index);
    let invitation = index.invite(Role::Publish, 1);
    let settings = *index.registrar.settings();
    index.registrar.set(Settings { memory: index.registrar.stats().memory, ..settings });

    let refused = bob.register(&mut index, vec![item(1), item(3)]).refused;
    assert!(refused.iter().all(|(_, refusal)| refusal.code == Code::Full) && refused.len() == 2);
    assert_eq!(bob.prove_and_watch(&mut index, "*"), Err(Code::Full));
    let stranger = MachineKey::from_seed([99; 32]).peer();
    let join = index.join(&invitation, stranger);
    assert_eq!(index.refused_at_desk(stranger, join), DeskCode::Full);
    // What is there stays, is found, and is renewed; and who makes room has it.
    assert!(alice.register(&mut index, vec![item(1), item(2)]).refused.is_empty());
    assert!(bob.search(&mut index, id(1)).is_ok());
    alice.ask(&mut index, &Request::Deregister(vec![id(1), id(2)]));
    assert!(bob.register(&mut index, vec![item(3)]).refused.is_empty());

    index.registrar.set(settings);
    assert!(bob.register(&mut index, vec![item(1), item(3)]).refused.is_empty());
    assert_eq!(bob.prove_and_watch(&mut index, "*"), Ok(()));
}

#[test]
fn a_watcher_is_told_every_change_it_watches_in_a_chain_without_gaps() {
    let mut index = Index::new();
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    a.register(&mut index, vec![item(1)]);
    let watching = b.watch(&mut index, "*", 0);
    assert_eq!((watching.lease_s, watching.missed), (90, false));
    assert!(b.notices(&mut index, SECOND).is_empty(), "what was there before is listed, not told");
    let many: Vec<Item> = (10..60).map(item).collect();
    for items in many.chunks(20) {
        a.register(&mut index, items.to_vec());
    }
    a.ask(&mut index, &Request::Deregister(vec![id(1)]));
    let notices = b.notices(&mut index, SECOND);
    assert!(notices.len() > 1, "more than a datagram holds");
    let mut last = watching.sequence;
    for notice in &notices {
        assert_eq!(notice.before, last);
        last = notice.after;
    }
    assert_eq!(last, b.list(&mut index).sequence);
    let rows: Vec<&Row> = notices.iter().flat_map(|notice| &notice.rows).collect();
    assert_eq!(rows.len(), 51);
    assert!(rows.iter().all(|row| (row.hosts == 0) == (row.key.id == id(1))));
    // One that missed the last asks from where it is, and is told again.
    let since = notices[0].after;
    assert!(!b.watch(&mut index, "*", since).missed);
    let again = b.notices(&mut index, SECOND);
    assert_eq!((again[0].before, again.last().unwrap().after), (since, last));
    assert!(b.watch(&mut index, "*", 5).missed, "of another run of the index, or too long ago");
}

#[test]
fn a_watcher_of_few_rows_is_kept_in_step_and_lapses_when_it_does_not_renew() {
    let mut index = Index::new();
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    let start = b.watch(&mut index, "game*", 0).sequence;
    a.register(&mut index, vec![item(1), item(2)]);
    assert!(b.notices(&mut index, SECOND).is_empty(), "nothing it watches changed");
    let game = a.named(3, "game", 1);
    a.register(&mut index, vec![game]);
    let notices = b.notices(&mut index, SECOND);
    assert_eq!((notices.len(), notices[0].before, notices[0].rows.len()), (1, start, 1));
    a.register(&mut index, vec![item(4)]);
    index.pass(SECOND);
    // Renewed, it learns how far the listing is even though no row it watches changed.
    let now = b.watch(&mut index, "game*", notices[0].after).sequence;
    let step = b.notices(&mut index, SECOND);
    assert_eq!(step, [Notice { before: notices[0].after, after: now, rows: vec![] }]);
    index.pass(89 * SECOND);
    assert_eq!(index.registrar.stats().watchers, 0);
    a.prove(&mut index);
    a.register(&mut index, vec![item(5)]);
    assert!(b.notices(&mut index, SECOND).is_empty());
    let bad = b.prove_and_watch(&mut index, "[");
    assert_eq!(bad, Err(Code::BadRequest));
}

impl Peer {
    fn prove_and_watch(&mut self, index: &mut Index, glob: &str) -> Result<(), Code> {
        self.prove(index);
        match self.ask(index, &Request::Watch(Watch { glob: glob.into(), since: 0, stop: false })) {
            Reply::Ack(_) => Ok(()),
            Reply::Error(refusal) => Err(refusal.code),
        }
    }
}

#[test]
fn a_watcher_left_far_behind_is_told_that_it_missed_some() {
    let limits = Limits { changes: 8, ..Limits::default() };
    let mut index = Index::with(Settings { limits, watchers: 1, ..Settings::default() });
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    let start = b.watch(&mut index, "*", 0).sequence;
    a.register(&mut index, (1..20).map(item).collect());
    let notices = b.notices(&mut index, SECOND);
    assert!(notices[0].before > start && notices[0].rows.is_empty(), "a gap it will notice");
    assert!(b.watch(&mut index, "*", start).missed);
    assert_eq!(a.prove_and_watch(&mut index, "*"), Err(Code::Full));
}

#[test]
fn sessions_outlive_their_epoch_by_a_day_and_are_then_unknown() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    index.pass(24 * 3_600 * SECOND);
    peer.prove(&mut index);
    assert_eq!(peer.search(&mut index, id(1)), Err(Code::NotFound), "yesterday's keys still hold");
    let today = index.session(peer.key.peer());
    assert_ne!(today.epoch, peer.session.epoch);
    index.restart(2, |_| true);
    peer.prove(&mut index);
    assert_eq!(peer.search(&mut index, id(1)), Err(Code::NotFound), "a restart keeps both");
    index.pass(23 * 3_600 * SECOND + 1_800 * SECOND);
    peer.prove(&mut index);
    assert_eq!(peer.search(&mut index, id(1)), Err(Code::SessionOver), "they end within the hour");
    index.pass(3_600 * SECOND);
    let datagram = peer.seal(&search(id(1)));
    assert!(index.hear(peer.from, &datagram).is_empty());
    assert_eq!(index.count(Dropped::UnknownEpoch), 1);
    peer.session = today;
    peer.prove(&mut index);
    let epochs = index.rows.keys().filter(|(table, _)| *table == Table::Epochs).count();
    assert_eq!(epochs, 2, "older secrets are erased");
}

#[test]
fn no_two_replies_of_a_run_share_a_nonce() {
    let mut index = Index::new();
    let (mut a, mut b) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
    b.watch(&mut index, "*", 0);
    let mut nonces = BTreeSet::new();
    for n in 0..30 {
        let request = Request::Register(Register { items: vec![item(n)], ..report() });
        for (peer, request) in [(&mut a, &request), (&mut b, &search(id(n)))] {
            let datagram = peer.seal(request);
            for (_, reply) in index.hear(peer.from, &datagram) {
                assert!(nonces.insert(ReplyHead::decode(&reply).unwrap().counter));
            }
        }
        index.sent.clear();
        index.pass(SECOND);
        for (_, notice) in std::mem::take(&mut index.sent) {
            assert!(nonces.insert(ReplyHead::decode(&notice).unwrap().counter));
        }
    }
    assert!(nonces.len() > 60);
}

#[test]
fn a_member_keeps_few_sessions_and_the_one_in_use_among_them() {
    let mut index = Index::new();
    let mut peer = index.member(1, Role::Publish);
    for _ in 0..20 {
        let mut other = Peer {
            key: MachineKey::from_seed([1; 32]),
            session: index.session(peer.key.peer()),
            ..Peer { counter: 0, ..index_peer(&peer) }
        };
        index.now = index.now + SECOND;
        other.prove(&mut index);
        assert_eq!(peer.search(&mut index, id(1)), Err(Code::NotFound));
        let sessions = &index.registrar.seats[1].as_ref().unwrap().sessions;
        assert!(sessions.len() <= index.registrar.settings.sessions_a_member);
        assert!(sessions.iter().any(|session| session.salt == peer.session.salt));
    }
}

fn index_peer(peer: &Peer) -> Peer {
    Peer {
        key: MachineKey::from_seed([1; 32]),
        session: peer.session.clone(),
        counter: 0,
        cookie: [0; 16],
        from: peer.from,
        asked: 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_stranger_gets_no_byte_back_whatever_it_sends(
        bytes in prop::collection::vec(any::<u8>(), 0..1_300),
        kind in prop::sample::select(b"RSTOWAEN".to_vec()),
        honest_head in any::<bool>(),
    ) {
        let mut index = Index::new();
        let peer = index.member(1, Role::Publish);
        let mut datagram = bytes;
        if datagram.len() >= HEAD_BYTES && honest_head {
            let good = peer.seal_as(&search(id(1)), 77);
            datagram[..HEAD_BYTES].copy_from_slice(&good[..HEAD_BYTES]);
            datagram[0] = kind;
        }
        let from = SocketAddr::new(IpAddr::from([9, 9, 9, 9]), 9);
        let rows = index.rows.clone();
        prop_assert!(index.hear(from, &datagram).is_empty());
        prop_assert!(index.rows == rows);
    }

    #[test]
    fn a_bent_datagram_is_dropped_and_the_honest_one_still_works(
        which in 0usize..5,
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let mut index = Index::new();
        let mut peer = index.member(1, Role::Publish);
        let request = &every_request()[which];
        let good = peer.seal(request);
        let mut bent = good.clone();
        *at.get_mut(&mut bent) ^= 1 << bit;
        prop_assert!(index.hear(peer.from, &bent).is_empty());
        prop_assert!(index.registrar.catalog().listing().is_empty());
        prop_assert_eq!(index.hear(peer.from, &good).len(), 1);
    }

    #[test]
    fn whatever_a_member_says_it_is_answered_in_one_datagram(
        kind in prop::sample::select(b"RSTOW".to_vec()),
        plaintext in prop::collection::vec(any::<u8>(), 8..1_100),
    ) {
        let mut index = Index::new();
        let mut peer = index.member(1, Role::Publish);
        peer.counter += 1;
        let head = RequestHead {
            kind,
            epoch: peer.session.epoch,
            member: peer.session.member,
            salt: peer.session.salt,
            counter: peer.counter,
            cookie: peer.cookie,
        };
        let datagram = seal_request(&peer.session.keys.to_index, &head, &plaintext);
        let replies = index.hear(peer.from, &datagram);
        prop_assert_eq!(replies.len(), 1);
        prop_assert!(replies[0].1.len() <= crate::wire::datagram::MAX_DATAGRAM);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn before_an_address_is_proven_no_reply_is_as_long_as_what_it_answers(
        kind in prop::sample::select(b"RSTOW".to_vec()),
        plaintext in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..64),
            prop::collection::vec(any::<u8>(), 0..1_100),
        ],
        cookie in any::<[u8; 16]>(),
        (removed, moved) in any::<(bool, bool)>(),
    ) {
        let mut index = Index::new();
        let (mut peer, mut other) = (index.member(1, Role::Publish), index.member(2, Role::Publish));
        other.register(&mut index, vec![item(1)]);
        if removed {
            let removal = Removal::Peer(peer.key.peer());
            index.registrar.remove(index.now, index.wall, &removal).unwrap();
            index.carry();
        }
        peer.counter += 1;
        let head = RequestHead {
            kind,
            epoch: peer.session.epoch,
            member: peer.session.member,
            salt: peer.session.salt,
            counter: peer.counter,
            // A cookie proves one address, and no other.
            cookie: if moved { peer.cookie } else { cookie },
        };
        let from = if moved { SocketAddr::from(([10, 9, 9, 9], 4_000)) } else { peer.from };
        let (datagram, rows) =
            (seal_request(&peer.session.keys.to_index, &head, &plaintext), index.rows.clone());
        let replies = index.hear(from, &datagram);
        prop_assert!(replies.len() <= 1);
        for (to, reply) in replies {
            prop_assert_eq!(to, from);
            prop_assert!(reply.len() < datagram.len(), "{} for {}", reply.len(), datagram.len());
        }
        prop_assert!(index.rows == rows, "nothing happened");
        index.pass(SECOND);
        prop_assert!(index.sent.is_empty(), "nothing follows");
    }

    #[test]
    fn no_sequence_of_datagrams_breaks_a_promise(
        steps in prop::collection::vec((any::<[u8; 3]>(), prop::collection::vec(any::<u8>(), 0..120)), 0..40),
        twists in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
    ) {
        let mut script = trial::sample();
        for (head, body) in steps {
            script.extend_from_slice(&head);
            script.extend_from_slice(&(body.len() as u16).to_be_bytes());
            script.extend_from_slice(&body);
        }
        let life = script.clone();
        script.extend_from_slice(&life); // once more, after all that
        for (at, byte) in twists {
            let at = at.index(script.len());
            script[at] = byte;
        }
        trial::run(&script);
    }
}
