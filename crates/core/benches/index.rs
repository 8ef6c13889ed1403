//! What an index thinks of a batch of requests, with 10,000 members and a million registrations: opening,
//! answering and sealing, without the kernel. `cargo bench -p potluck-core --bench index`.

#![allow(
    missing_docs,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a bench measures time, and ends where something is not as it should be"
)]

use std::net::SocketAddr;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use potluck_core::id::{ContentId, NetworkId, RequestId, Version};
use potluck_core::registrar::{Boot, Caller, Gate, Outbox, Output, Registrar, Settings, Ticket};
use potluck_core::seal::{ReplyHead, RequestHead, open, seal_request};
use potluck_core::time::{Duration, Moment, WallTime};
use potluck_core::trust::{MachineKey, NameRecord, Role, invitation_id, join_tag};
use potluck_core::wire::datagram::{
    Code, HELD_ALL, ITEMS_ROOM, Item, List, Load, Register, Reply, Request, RowKey, Search, Target,
};
use potluck_core::wire::desk::{Answer, Ask, InviteTerms, Join, Session};

const MEMBERS: u32 = 10_000;
const CONTENTS: u32 = 100_000;
/// Of each content.
const HOSTS: u32 = 10;
/// Contents that have a name.
const NAMED: u32 = 2_000;
/// Requests thought of at once.
const BATCH: usize = 64;
const WALL: WallTime = WallTime(1_800_000_000);

/// A request, by the dice: of or near a content, and which of a hundred.
type Kind = fn(content: u32, nth: u32) -> Request;

struct Member {
    key: MachineKey,
    session: Session,
    counter: u64,
    cookie: [u8; 16],
}

/// An index whose time stands still, and all its members.
struct Network {
    registrar: Registrar,
    gate: Gate,
    outbox: Outbox,
    id: NetworkId,
    members: Vec<Member>,
    now: Moment,
    dice: u64,
}

impl Network {
    fn new() -> Self {
        let now = Moment::from_micros(1_000_000);
        let key = MachineKey::from_seed([1; 32]);
        let boot = Boot { id: 1, cookie_key: [2; 32], dice: 3, secret_seed: [4; 32] };
        // Its time stands still, so no bucket of requests is filled again.
        let settings = Settings { burst: u32::MAX, ..Settings::default() };
        let id = key.network();
        let mut registrar =
            Registrar::new(key, boot, settings, std::iter::empty(), now, WALL).unwrap();
        let role = Role::Publish;
        let expires = WALL.plus(Duration::from_secs(600));
        let terms = InviteTerms { role, uses: MEMBERS, expires };
        let invited = registrar.make_invitation(now, WALL, terms).unwrap();
        let gate = registrar.gate();
        let mut network =
            Self { registrar, gate, outbox: Outbox::default(), id, members: vec![], now, dice: 5 };
        for n in 0..MEMBERS {
            network.join(n, &invited.secret);
        }
        network.registrar.brief(&mut network.gate);
        network.register_all();
        network
    }

    fn join(&mut self, n: u32, secret: &[u8; 16]) {
        let key = MachineKey::from_seed(*blake3_of(n).as_bytes());
        let (peer, exporter) = (key.peer(), [7; 32]);
        let (invitation, tag) = (invitation_id(secret), join_tag(secret, &exporter, peer));
        let join = Ask::Join(Join { invitation, tag, label: String::new() });
        let ask = Ask::Session { label: String::new(), revocations: 0, certificate: None };
        for ask in [join, ask] {
            let caller = Caller { peer, exporter };
            self.registrar.on_ask(self.now, WALL, caller, ask, Ticket(0));
        }
        let mut session = None;
        while let Some(output) = self.registrar.poll_output() {
            if let Output::Answer { answer: Answer::Session(given), .. } = output {
                session = Some(*given);
            }
        }
        self.members.push(Member { key, session: session.unwrap(), counter: 0, cookie: [0; 16] });
    }

    fn register_all(&mut self) {
        let mut hosted = vec![vec![]; MEMBERS as usize];
        for content in 0..CONTENTS {
            (0..HOSTS).for_each(|nth| hosted[host(content, nth)].push((content, nth == 0)));
        }
        for (at, hosted) in hosted.into_iter().enumerate() {
            let cookie = match self.ask(at, &heartbeat(vec![])) {
                Reply::Error(refusal) if refusal.code == Code::CookieNeeded => refusal.cookie,
                _ => None,
            };
            self.members[at].cookie = cookie.unwrap();
            let mut items = vec![];
            let mut room = ITEMS_ROOM;
            for (content, publishes) in hosted {
                let item = self.item(content, publishes);
                if item.wire_len() > room {
                    let reply = self.ask(at, &heartbeat(std::mem::take(&mut items)));
                    assert!(matches!(reply, Reply::Ack(_)), "{reply:?}");
                    room = ITEMS_ROOM;
                }
                room -= item.wire_len();
                items.push(item);
            }
            self.ask(at, &heartbeat(items));
        }
        let counts = self.registrar.stats().counts;
        assert_eq!(counts.registrations, (CONTENTS * HOSTS) as usize);
    }

    fn item(&self, content: u32, publishes: bool) -> Item {
        let id = content_id(content);
        let publisher = &self.members[host(content, 0)].key;
        let name = name(content).filter(|_| publishes);
        let name = name
            .map(|name| NameRecord::sign(publisher, self.id, name, Version(1), id, WallTime(1)));
        Item { id, size: content.into(), held: HELD_ALL, name }
    }

    /// One question, and its answer.
    fn ask(&mut self, at: usize, request: &Request) -> Reply {
        let mut datagram = self.seal(at, request);
        self.answer(std::slice::from_mut(&mut datagram));
        let (_, reply) = self.outbox.datagrams().next().unwrap();
        let mut reply = reply.to_vec();
        let head = ReplyHead::decode(&reply).unwrap();
        let key = self.members[at].session.keys.reply_key(head.boot);
        let plaintext = open(&key, head.counter, &mut reply).unwrap();
        let (_, reply) = Reply::decode(head.kind, plaintext).unwrap();
        while self.registrar.poll_output().is_some() {}
        reply
    }

    fn seal(&mut self, at: usize, request: &Request) -> (SocketAddr, Vec<u8>) {
        let Member { session, counter, cookie, .. } = &mut self.members[at];
        *counter += 1;
        let (epoch, member, salt) = (session.epoch, session.member, session.salt);
        let (kind, counter, cookie) = (request.kind(), *counter, *cookie);
        let head = RequestHead { kind, epoch, member, salt, counter, cookie };
        let sealed = seal_request(&session.keys.to_index, &head, &request.encode(RequestId(1)));
        (SocketAddr::from(([10, 0, (at >> 8) as u8, at as u8], 7_000)), sealed)
    }

    /// As a worker of the index does it.
    fn answer(&mut self, batch: &mut [(SocketAddr, Vec<u8>)]) {
        self.outbox.clear();
        let (now, gate) = (self.now, &mut self.gate);
        let opened: Vec<_> =
            batch.iter_mut().filter_map(|(from, bytes)| gate.open(now, *from, bytes)).collect();
        self.registrar.on_batch(now, &opened);
        self.registrar.take_outbox(&mut self.outbox);
        self.registrar.brief(gate);
        self.outbox.seal();
    }

    fn throw(&mut self, n: u32) -> u32 {
        // Knuth's MMIX generator.
        self.dice = self
            .dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.dice >> 33) % u64::from(n)) as u32
    }

    fn batch(&mut self, what: Kind) -> Vec<(SocketAddr, Vec<u8>)> {
        let mut one = || {
            let (at, content, nth) = (self.throw(MEMBERS), self.throw(CONTENTS), self.throw(100));
            self.seal(at as usize, &what(content, nth))
        };
        (0..BATCH).map(|_| one()).collect()
    }
}

fn blake3_of(n: u32) -> blake3::Hash {
    blake3::hash(&n.to_be_bytes())
}

fn heartbeat(items: Vec<Item>) -> Request {
    Request::Register(Register {
        port: 7_000,
        load: Load { uploads: 1, free_slots: 3, rate_kib: 1_000, capacity_kib: 100_000 },
        digest: [0; 16],
        round: 0,
        round_ends: false,
        items,
    })
}

/// The `nth` host of a content: ten neighbours.
const fn host(content: u32, nth: u32) -> usize {
    ((content.wrapping_mul(37) % MEMBERS + nth) % MEMBERS) as usize
}

fn content_id(content: u32) -> ContentId {
    ContentId::file(*blake3_of(content).as_bytes())
}

fn name(content: u32) -> Option<potluck_core::id::Name> {
    (content < NAMED).then(|| format!("content-{content:05}").parse().unwrap())
}

/// Half of the searches are for an id, half for a name.
fn search(content: u32, nth: u32) -> Request {
    let target = match name(content % NAMED) {
        Some(name) if nth & 1 == 0 => Target::Name(name, None),
        _ => Target::Id(content_id(content)),
    };
    Request::Search(Search { target, hosts: Search::MAX_HOSTS, avoid: vec![] })
}

fn list(content: u32, _: u32) -> Request {
    let after = Some(RowKey { name: name(content), id: content_id(content) });
    Request::List(List { glob: "*".to_owned(), after: after.filter(|_| content < NAMED - 100) })
}

fn mixed(content: u32, nth: u32) -> Request {
    match nth {
        0..60 => heartbeat(vec![]),
        60..95 => search(content, nth),
        _ => list(content, nth),
    }
}

fn requests(c: &mut Criterion) {
    let mut network = Network::new();
    let mut group = c.benchmark_group("index");
    group.throughput(Throughput::Elements(BATCH as u64));
    let kinds: [(&str, Kind); 4] = [
        ("60 % heartbeats, 35 % searches, 5 % lists", mixed),
        ("heartbeats", |_, _| heartbeat(vec![])),
        ("searches", search),
        ("lists", list),
    ];
    for (name, what) in kinds {
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let mut took = std::time::Duration::ZERO;
                for _ in 0..times {
                    let mut batch = network.batch(what);
                    let began = Instant::now();
                    network.answer(&mut batch);
                    took += began.elapsed();
                }
                took
            });
        });
    }
    group.finish();
}

criterion_group!(benches, requests);
criterion_main!(benches);
