//! Owns what must hold for any sequence of datagrams whatever: a script of bytes becomes members that
//! ask, repeat, bend, replay and wait, and strangers that send anything. Fuzzing, the corpus's replay
//! and the property tests all run it. It panics where the registrar breaks a promise:
//!
//! * its invariants hold after every step, and what it holds is within its limits;
//! * whatever is no member's own datagram, fresh and whole, gets no byte back; a replay of one from
//!   before a restart, when it is not known as such any more, less than it has;
//! * one who has not proved its address gets less than it sent;
//! * after a restart from what was saved it knows the same.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::{Boot, Output, Registrar, Settings, Table, Walk};
use crate::catalog::Limits;
use crate::id::{MemberNumber, RequestId};
use crate::seal::{RequestHead, SessionKeys, open, seal_request};
use crate::time::{Duration, Moment, WallTime};
use crate::trust::{MachineKey, Role, invitation_id, join_tag};
use crate::wire::bytes::Reader;
use crate::wire::datagram::{Code, HELD_ALL, Item, Load, MAX_PLAINTEXT, Register, Reply, Request};
use crate::wire::desk::{Answer, Ask, InviteTerms, Join};

const WALL: WallTime = WallTime(1_800_000_000);
const MEMBERS: u8 = 3;
/// Small, so that a script meets them.
const LIMITS: Limits = Limits {
    contents: 24,
    registrations: 32,
    registrations_a_member: 16,
    names: 6,
    names_a_content: 2,
    versions_a_name: 3,
    records: 12,
    records_a_publisher: 8,
    changes: 16,
};

struct Member {
    number: MemberNumber,
    epoch: u16,
    salt: u64,
    keys: SessionKeys,
    counter: u64,
    cookie: [u8; 16],
    from: SocketAddr,
    /// Its last datagram, and the run of the index that heard it.
    last: Vec<u8>,
    last_heard_by: u8,
}

struct Trial {
    registrar: Registrar,
    rows: BTreeMap<(Table, Vec<u8>), Vec<u8>>,
    members: Vec<Member>,
    now: Moment,
    boots: u8,
    answered: u64,
}

/// Runs a script. Each step is five bytes (who, what, kind of request, length `u16`) and so many bytes
/// of a request's body. True where any request was answered with more than a refusal.
pub fn run(script: &[u8]) -> bool {
    let mut trial = Trial::new();
    let mut r = Reader::new(script);
    while let (Ok(who), Ok(what), Ok(kind), Ok(length)) = (r.u8(), r.u8(), r.u8(), r.u16()) {
        let length = usize::from(length).min(r.rest().len()).min(MAX_PLAINTEXT - 8);
        let Ok(body) = r.take(length) else { break };
        trial.step(usize::from(who % MEMBERS), what, kind, body);
        trial.hold();
    }
    trial.restart();
    trial.answered > 0
}

impl Trial {
    fn new() -> Self {
        let now = Moment::from_micros(1_000_000);
        let registrar = boot(1, std::iter::empty(), now);
        let rows = BTreeMap::new();
        let mut trial = Self { registrar, rows, members: vec![], now, boots: 1, answered: 0 };
        for n in 0..MEMBERS {
            trial.join(n);
        }
        trial
    }

    /// A member joins and fetches keys, as over TLS.
    #[expect(clippy::panic, reason = "the desk gives what it has to, or the trial fails")]
    fn join(&mut self, n: u8) {
        let role = if n == 0 { Role::Read } else { Role::Publish };
        let terms = InviteTerms { role, uses: 1, expires: WALL.plus(Duration::from_secs(60)) };
        let made = self.registrar.make_invitation(self.now, WALL, terms);
        let Ok(invited) = made else { panic!("no invitation") };
        let (key, exporter) = (MachineKey::from_seed([n + 1; 32]), [n; 32]);
        let (invitation, label) = (invitation_id(&invited.secret), String::new());
        let tag = join_tag(&invited.secret, &exporter, key.peer());
        let caller = super::Caller { peer: key.peer(), exporter };
        let session = Ask::Session { label: String::new(), revocations: 0, certificate: None };
        for ask in [Ask::Join(Join { invitation, tag, label }), session] {
            self.registrar.on_ask(self.now, WALL, caller, ask, super::Ticket(0));
            if let Some(Answer::Session(session)) = self.carry().0 {
                self.members.push(Member {
                    number: session.member,
                    epoch: session.epoch,
                    salt: session.salt,
                    keys: session.keys.clone(),
                    counter: 0,
                    cookie: [0; 16],
                    from: SocketAddr::from(([10, 0, 0, n], 70)),
                    last: vec![],
                    last_heard_by: 0,
                });
            }
        }
        assert_eq!(self.members.len(), usize::from(n) + 1, "a member was not let in");
    }

    fn step(&mut self, who: usize, what: u8, kind: u8, body: &[u8]) {
        let from = self.members[who].from;
        match what % 8 {
            0..=2 => self.ask(who, b"RSOTW"[usize::from(kind % 5)], body),
            3 => self.replay(who),
            4 => {
                // One bit of its last datagram is bent.
                let mut bent = self.members[who].last.clone();
                let at = body.first().map_or(0, |at| usize::from(*at) * bent.len() / 256);
                if let Some(byte) = bent.get_mut(at) {
                    *byte ^= 1 << (kind % 8);
                    self.strange(from, bent);
                }
            }
            5 => self.strange(from, body.to_vec()),
            6 => {
                self.now = self.now + Duration::from_secs(kind.into());
                self.registrar.tick(self.now, WALL);
                self.carry();
            }
            _ if kind.is_multiple_of(2) => self.restart(),
            _ => self.members[who].from.set_port(u16::from(kind)), // it moved
        }
    }

    /// A member's own datagram, and once more with the cookie it is given.
    fn ask(&mut self, who: usize, kind: u8, body: &[u8]) {
        for _ in 0..2 {
            let member = &mut self.members[who];
            member.counter += 1;
            let Member { number, epoch, salt, counter, cookie, from, .. } = *member;
            let head = RequestHead { kind, epoch, member: number, salt, counter, cookie };
            let mut plaintext = RequestId(counter).0.to_be_bytes().to_vec();
            plaintext.extend_from_slice(body);
            let datagram = seal_request(&member.keys.to_index, &head, &plaintext);
            member.last.clone_from(&datagram);
            member.last_heard_by = self.boots;
            self.registrar.on_datagram(self.now, WALL, from, &mut datagram.clone());
            let boot = self.registrar.boot;
            let key = self.members[who].keys.reply_key(boot);
            let mut again = false;
            for (to, mut reply) in self.carry().1 {
                if reply[0] == b'N' {
                    continue;
                }
                assert_eq!(to, from, "an answer goes to who asked");
                let nonce = u64::from_be_bytes(std::array::from_fn(|i| reply[16 + i]));
                let (kind, length) = (reply[0], reply.len());
                let plaintext = open(&key, nonce, &mut reply).expect("an answer opens");
                match Reply::decode(kind, plaintext).expect("an answer is understood").1 {
                    Reply::Error(refusal) if refusal.code == Code::CookieNeeded => {
                        assert!(length < datagram.len(), "an unproven address got too much");
                        self.members[who].cookie = refusal.cookie.unwrap_or_default();
                        again = true;
                    }
                    Reply::Error(_) => {}
                    Reply::Ack(_) => self.answered += 1,
                }
            }
            if !again {
                return;
            }
        }
    }

    /// What is not a member's own, fresh datagram: nobody gets a byte for it.
    fn strange(&mut self, from: SocketAddr, mut datagram: Vec<u8>) {
        self.registrar.on_datagram(self.now, WALL, from, &mut datagram);
        let (_, sent) = self.carry();
        assert!(sent.is_empty(), "a stranger got an answer");
    }

    fn replay(&mut self, who: usize) {
        let Member { from, last_heard_by, .. } = self.members[who];
        let again = self.members[who].last.clone();
        if last_heard_by == self.boots {
            return self.strange(from, again);
        }
        let before = self.registrar.catalog().sequence();
        self.registrar.on_datagram(self.now, WALL, from, &mut again.clone());
        let (_, sent) = self.carry();
        assert!(sent.iter().all(|(_, reply)| reply.len() < again.len()), "a replay got too much");
        assert_eq!(before, self.registrar.catalog().sequence(), "a replay had an effect");
        self.members[who].last_heard_by = self.boots;
    }

    fn restart(&mut self) {
        let before = self.registrar.catalog().hosts();
        self.boots = self.boots.wrapping_add(1);
        let rows = self.rows.iter().map(|((table, key), row)| (*table, key.clone(), row.clone()));
        let rows: Vec<_> = rows.collect();
        self.registrar = boot(self.boots, rows.into_iter(), self.now);
        self.carry();
        let after = self.registrar.catalog().hosts();
        assert!(before.keys().eq(after.keys()), "a restart lost contents");
        for (content, hosts) in &before {
            assert!(hosts.keys().eq(after[content].keys()), "a restart lost hosts");
        }
    }

    fn hold(&self) {
        self.registrar.check();
        let counts = self.registrar.catalog().counts();
        assert!(counts.contents <= LIMITS.contents && counts.names <= LIMITS.names);
        assert!(counts.registrations <= LIMITS.registrations);
        assert!(self.registrar.stats().watchers <= usize::from(MEMBERS));
        let (mut walk, mut rows) = (Walk::default(), BTreeMap::new());
        loop {
            let some = self.registrar.rows(&mut walk, 2);
            if some.is_empty() {
                break;
            }
            rows.extend(some.into_iter().filter_map(|c| Some(((c.table, c.key), c.value?))));
        }
        assert!(rows == self.rows, "what would be written anew differs from what was written");
    }

    /// Does what the registrar wants done: saves, and says what it answered and sent.
    fn carry(&mut self) -> (Option<Answer>, Vec<(SocketAddr, Vec<u8>)>) {
        let (mut answer, mut sent) = (None, vec![]);
        while let Some(output) = self.registrar.poll_output() {
            match output {
                Output::Send { to, datagram } => sent.push((to, datagram)),
                Output::Save(change) => {
                    let at = (change.table, change.key);
                    match change.value {
                        Some(value) => drop(self.rows.insert(at, value)),
                        None => drop(self.rows.remove(&at)),
                    }
                }
                Output::Answer { answer: given, .. } => answer = Some(given),
                Output::Ignore { .. } => {}
            }
        }
        (answer, sent)
    }
}

#[expect(clippy::expect_used, reason = "what was saved can be read, or the trial fails")]
fn boot(id: u8, rows: impl Iterator<Item = (Table, Vec<u8>, Vec<u8>)>, now: Moment) -> Registrar {
    let boot =
        Boot { id: id.into(), cookie_key: [id; 32], dice: id.into(), secret_seed: [id ^ 0x80; 32] };
    let settings = Settings { limits: LIMITS, sessions_a_member: 2, ..Settings::default() };
    let key = MachineKey::from_seed([42; 32]);
    Registrar::new(key, boot, settings, rows, now, WALL).expect("saved rows are whole")
}

/// A script for the corpus: two machines register and withdraw, one watches; datagrams are replayed and
/// bent, leases lapse, the index restarts.
pub fn sample() -> Vec<u8> {
    let id = |n| crate::id::ContentId::file([n; 32]);
    let hosts = |n| {
        let items = vec![Item { id: id(n), size: 9, held: HELD_ALL, name: None }];
        let load = Load { free_slots: 3, ..Load::default() };
        let (port, digest, round, round_ends) = (70, [0; 16], 0, false);
        Request::Register(Register { port, load, digest, round, round_ends, items })
    };
    let list = Request::List(crate::wire::datagram::List { glob: "*".into(), after: None });
    let watch = crate::wire::datagram::Watch { glob: "*".into(), since: 0, stop: false };
    let target = crate::wire::datagram::Target::Id(id(1));
    let search = Request::Search(crate::wire::datagram::Search { target, hosts: 5, avoid: vec![] });
    let mut script = vec![];
    let mut step = |who: u8, what: u8, kind: u8, request: Option<&Request>| {
        let body = request.map(|request| request.encode(RequestId(0))[8..].to_vec());
        let body = body.unwrap_or_default();
        script.extend_from_slice(&[who, what, kind]);
        script.extend_from_slice(&(body.len() as u16).to_be_bytes());
        script.extend_from_slice(&body);
    };
    step(2, 0, 4, Some(&Request::Watch(watch)));
    step(1, 0, 0, Some(&hosts(1)));
    step(1, 3, 0, None);
    step(2, 1, 0, Some(&hosts(2)));
    step(2, 4, 3, None);
    step(0, 0, 1, Some(&search));
    step(0, 0, 2, Some(&list));
    step(0, 6, 1, None);
    step(0, 7, 0, None);
    step(1, 0, 3, Some(&Request::Deregister(vec![id(1)])));
    step(2, 7, 1, None);
    step(2, 0, 0, Some(&hosts(3)));
    step(0, 6, 100, None);
    script
}
