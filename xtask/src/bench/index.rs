//! Owns the measurement of an index: a real process on one core, its members made up on another.
//! Requests are sealed beforehand, every reply is opened, and one in a few is read as well.

use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;
use potluck::testing;
use potluck_core::id::{ContentId, MemberNumber, NetworkId, RequestId, Version};
use potluck_core::seal::{ReplyHead, RequestHead, SessionKeys, open, seal_request};
use potluck_core::time::WallTime;
use potluck_core::trust::{Invitation, MachineKey, NameRecord};
use potluck_core::wire::datagram::{
    Ack, Code, HEAD_BYTES, HELD_ALL, ITEMS_ROOM, Item, List, Load, MAX_DATAGRAM, Register, Reply,
    Request, RowKey, Search, Target, Watch, digest_of,
};

use super::storm::{self, Batches, Requests, Storm, Waits};
use super::tracker::Tracker;
use super::{Setting, echo, flood};
use crate::proc::{self, Machine, Place, measure};
use crate::table::{Table, median};

/// The index runs on this core …
const INDEX_CORE: usize = 0;
/// … and its members on this one.
const OWN_CORE: usize = 1;
/// Members.
pub(super) const MEMBERS: u32 = 10_000;
/// Hosts of each content.
const HOSTS: u32 = 10;
/// Contents that have a name: the listing has a row for each content, named or not.
const NAMED: u32 = 2_000;
/// Requests of one run: done before the cookies are stale, however busy the machine is.
const REQUESTS: usize = 400_000;
/// Requests at half the rate, to see how long answers take.
const STEADY: usize = 200_000;
/// Changes that watchers are told of, one after the other.
const CHANGES: u32 = 5;
/// A notice that takes so long is lost.
const NOTICE: Duration = Duration::from_secs(2);
/// Tries of a request that must not be lost.
const TRIES: u32 = 20;
/// Of so many replies one is read to its end, not only opened.
const READ_ONE_IN: u64 = 16;

pub(super) fn run(setting: &Setting, registrations: u32, attacked: bool) -> Result<()> {
    if proc::find("taskset").is_none() || std::thread::available_parallelism()?.get() < 2 {
        println!("## Index\n\nNot measured: it takes taskset (util-linux) and two cores.\n");
        return Ok(());
    }
    let contents = registrations / HOSTS;
    let (index, _) = Machine::index(&setting.potluck, &setting.dir, Some(INDEX_CORE))?;
    let empty = proc::memory(index.pid(), "VmRSS")?;
    let invited = index.asks(["invite", "--uses", &(MEMBERS + 1).to_string()])?;
    let Event::Invited { invite, .. } = invited else { bail!("invite said {invited:?}") };
    let invitation: Invitation = invite.parse()?;
    let mut crowd = Crowd::join(&invitation, 0..MEMBERS)?;
    crowd.register_all(contents)?;
    crowd.refresh_cookies()?;
    if attacked {
        return attack(&mut crowd, &index, contents, &invitation);
    }
    let sizes = crowd.reply_sizes(contents)?;

    let (echo, address) = echo::start(INDEX_CORE, false, sizes, MEMBERS)?;
    let mut beside = Crowd::of_echo(address, Real::Echo)?;
    let (bare, address) = echo::start(INDEX_CORE, true, sizes, MEMBERS)?;
    let mut bare_beside = Crowd::of_echo(address, Real::Bare)?;
    let mut tracker = Tracker::start(&setting.dir, INDEX_CORE, contents, HOSTS)?;
    keep_to(Some(OWN_CORE))?;
    let mut rows = Rows::default();
    for nth in 0..setting.runs {
        let dice = u64::from(nth);
        crowd.refresh_cookies()?;
        rows.note("potluck index", crowd.run(index.pid(), contents, dice)?);
        rows.note("authenticated echo", beside.run(echo.pid(), contents, dice)?);
        rows.note("bare echo", bare_beside.run(bare.pid(), contents, dice)?);
        if let Some(tracker) = &mut tracker {
            rows.note("aquatic_udp (BEP 15 announces)", tracker.run(REQUESTS, STEADY, dice)?);
        }
    }
    keep_to(None)?;
    drop((echo, bare, tracker.take()));
    let full = proc::memory(index.pid(), "VmRSS")?;
    let (index, back) = measure(&[], || {
        let place = Place { core: Some(INDEX_CORE), ..Place::here() };
        index.again("index", &place)
    })?;
    let again = proc::memory(index.pid(), "VmRSS")?;

    println!(
        "## Index: {MEMBERS} members, {contents} contents with {HOSTS} hosts each, one core\n"
    );
    println!(
        "60 % heartbeats, 35 % searches, 5 % lists, answered with {sizes:?} bytes; {REQUESTS} requests a run, then {STEADY} at half the rate.\n"
    );
    if rows.0.len() < 4 {
        println!("aquatic_udp is not installed: not measured.\n");
    }
    println!(
        "{}\nRSS of the index: {empty:.0} MiB when it started, {full:.0} MiB with {MEMBERS} members and {} registrations: {:.0} bytes a registration, all included. Killed, it was ready again after {:.2} s, with {again:.0} MiB.\n",
        rows.table(),
        contents * HOSTS,
        (full - empty) * 1024.0 * 1024.0 / f64::from(contents * HOSTS),
        back.seconds,
    );
    Ok(())
}

/// What members get while somebody attacks, and how soon all of them are told of a change.
fn attack(crowd: &mut Crowd, index: &Machine, contents: u32, invited: &Invitation) -> Result<()> {
    keep_to(Some(OWN_CORE))?;
    let floods = flood::run(crowd, index.pid(), contents, invited)?;
    crowd.refresh_cookies()?;
    let told = crowd.tell_watchers(contents)?;
    keep_to(None)?;
    println!(
        "## Index under attack: requests of members, while another process sends what it must not heed\n\n{floods}"
    );
    println!(
        "## Live listing: {} watchers, {CHANGES} changes, one after the other\n\nTold within {:.0} ms: half of them; {:.0} ms: 99 of 100; {:.0} ms: all that were. Not told: {} of {}.\n",
        MEMBERS,
        told.p50,
        told.p99,
        told.last,
        told.missing,
        MEMBERS * CHANGES,
    );
    Ok(())
}

/// How long it took until watchers were told of a change, in ms.
struct Told {
    p50: f64,
    p99: f64,
    last: f64,
    missing: u32,
}

/// What was measured of each, by name, the index first.
#[derive(Default)]
struct Rows(Vec<(&'static str, Vec<(Storm, Waits)>)>);

impl Rows {
    fn note(&mut self, name: &'static str, run: (Storm, Waits)) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, runs)) => runs.push(run),
            None => self.0.push((name, vec![run])),
        }
    }

    fn table(&self) -> Table {
        let heads = ["", "requests/s", "CPU s a million", "index × by CPU", "lost"];
        let more = ["p50 µs at half load", "p99 µs", "generator busy", "others busy"];
        let mut table = Table::new(&[&heads[..], &more].concat());
        let cpu = |runs: &[(Storm, Waits)]| median(runs.iter().map(|run| run.0.cpu_a_million()));
        for (name, runs) in &self.0 {
            let of = |f: fn(&(Storm, Waits)) -> f64| median(runs.iter().map(f));
            table.row([
                (*name).to_owned(),
                format!("{:.0}", of(|(storm, _)| storm.rate())),
                format!("{:.2}", cpu(runs)),
                format!("{:.2}", cpu(runs) / self.0.first().map_or(f64::NAN, |(_, all)| cpu(all))),
                format!("{}", runs.iter().map(|(s, w)| s.lost + w.lost).sum::<usize>()),
                format!("{:.0}", of(|(_, waits)| waits.p50)),
                format!("{:.0}", of(|(_, waits)| waits.p99)),
                format!("{:.0} %", of(|(storm, _)| 100.0 * storm.cost.own / storm.cost.seconds)),
                format!("{:.0} %", of(|(storm, _)| 100.0 * storm.cost.others)),
            ]);
        }
        table
    }
}

/// Binds this process's main thread to a core, or sets it free.
fn keep_to(core: Option<usize>) -> Result<()> {
    let cores = match core {
        Some(core) => core.to_string(),
        None => "0-1023".to_owned(),
    };
    let own = std::process::id().to_string();
    proc::output(Command::new("taskset").args(["--cpu-list", "--pid", &cores, &own])).map(drop)
}

/// One member, as the index knows it.
pub(super) struct Guest {
    key: MachineKey,
    pub(super) number: MemberNumber,
    pub(super) epoch: u16,
    pub(super) salt: u64,
    pub(super) keys: SessionKeys,
    /// The key of replies, and the boot of the index it is for.
    reply: Option<(u64, [u8; 16])>,
    pub(super) counter: u64,
    pub(super) cookie: [u8; 16],
    /// Sum of the digests of all it registered.
    digest: u128,
}

/// Who answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Real {
    Index,
    /// Its replies are the requests, sealed anew.
    Echo,
    /// Nothing is sealed.
    Bare,
}

/// All members, behind one socket.
pub(super) struct Crowd {
    pub(super) batches: Batches,
    network: NetworkId,
    pub(super) guests: Vec<Guest>,
    next_id: u64,
    real: Real,
}

/// A crowd on its way to another thread.
pub(super) struct Apart {
    pub(super) socket: UdpSocket,
    network: NetworkId,
    guests: Vec<Guest>,
    next_id: u64,
    real: Real,
}

impl Apart {
    pub(super) fn together(self) -> Result<Crowd> {
        let Self { socket, network, guests, next_id, real } = self;
        Ok(Crowd { batches: Batches::new(socket)?, network, guests, next_id, real })
    }
}

impl Crowd {
    pub(super) fn join(invitation: &Invitation, machines: Range<u32>) -> Result<Self> {
        let keys: Vec<MachineKey> = machines
            .map(|i| MachineKey::from_seed(*blake3::hash(&i.to_be_bytes()).as_bytes()))
            .collect();
        let mut met = None;
        let mut guests = vec![];
        for key in keys {
            let (session, index) = testing::session(&key, invitation)?;
            met = Some((index, session.certificate.network));
            guests.push(Guest {
                key,
                number: session.member,
                epoch: session.epoch,
                salt: session.salt,
                keys: session.keys,
                reply: None,
                counter: 0,
                cookie: [0; 16],
                digest: 0,
            });
        }
        let (index, network) = met.context("nobody joined")?;
        Ok(Self { batches: Batches::to(index)?, network, guests, next_id: 0, real: Real::Index })
    }

    fn of_echo(address: SocketAddr, real: Real) -> Result<Self> {
        let guest = |i: u32| Guest {
            key: MachineKey::from_seed([0; 32]),
            number: MemberNumber(i),
            epoch: 0,
            salt: 0,
            keys: echo::session(MemberNumber(i)),
            reply: None,
            counter: 0,
            cookie: [0; 16],
            digest: 0,
        };
        let guests = (0..MEMBERS).map(guest).collect();
        let (batches, network) = (Batches::to(address)?, NetworkId([0; 32]));
        Ok(Self { batches, network, guests, next_id: 0, real })
    }

    /// Cuts it up into crowds of consecutive members, each behind a socket of its own.
    pub(super) fn split(self, crowds: usize) -> Result<Vec<Apart>> {
        let index = self.batches.socket.peer_addr()?;
        let each = self.guests.len().div_ceil(crowds);
        let (mut rest, mut all) = (self.apart(), vec![]);
        while !rest.guests.is_empty() {
            let behind = rest.guests.split_off(each.min(rest.guests.len()));
            let guests = std::mem::replace(&mut rest.guests, behind);
            let socket = Batches::to(index)?.socket;
            let Apart { network, next_id, real, .. } = rest;
            all.push(Apart { socket, network, guests, next_id, real });
        }
        Ok(all)
    }

    /// Without its buffers: another thread may take it.
    pub(super) fn apart(self) -> Apart {
        let Self { batches, network, guests, next_id, real } = self;
        Apart { socket: batches.socket, network, guests, next_id, real }
    }

    /// Registers every content at [`HOSTS`] members; the first of them publishes its name, if any.
    pub(super) fn register_all(&mut self, contents: u32) -> Result<()> {
        let mut hosted = vec![vec![]; self.guests.len()];
        for content in 0..contents {
            (0..HOSTS).for_each(|nth| hosted[host(content, nth)].push((content, nth == 0)));
        }
        for (at, hosted) in hosted.into_iter().enumerate() {
            let mut batch = vec![];
            let mut room = ITEMS_ROOM;
            for (content, publishes) in hosted {
                let item = self.item(content, publishes);
                let guest = &mut self.guests[at];
                guest.digest = guest.digest.wrapping_add(digest_of(&item));
                if item.wire_len() > room {
                    self.register(at, std::mem::take(&mut batch))?;
                    room = ITEMS_ROOM;
                }
                room -= item.wire_len();
                batch.push(item);
            }
            self.register(at, batch)?;
            let (kept, _) = self.ask(at, &self.heartbeat(at))?;
            ensure!(
                matches!(&kept, Reply::Ack(Ack::Registered(said)) if !said.repeat_all),
                "the index does not know what was registered: {kept:?}"
            );
        }
        Ok(())
    }

    /// Bytes that an R, an S and an O are answered with, on average.
    fn reply_sizes(&mut self, contents: u32) -> Result<[usize; 3]> {
        const SAMPLES: u32 = 500;
        let mut sums = [0; 3];
        for i in 0..SAMPLES {
            let at = i as usize % self.guests.len();
            let content = i * (contents / SAMPLES);
            let asked = [self.heartbeat(at), search(content, i), list(content, contents)];
            for (sum, request) in sums.iter_mut().zip(&asked) {
                *sum += self.ask(at, request)?.1;
            }
        }
        Ok(sums.map(|sum| sum / SAMPLES as usize))
    }

    fn item(&self, content: u32, publishes: bool) -> Item {
        let id = content_id(content);
        let publisher = &self.guests[host(content, 0)].key;
        let name = name(content).filter(|_| publishes).map(|name| {
            NameRecord::sign(publisher, self.network, name, Version(1), id, WallTime(1))
        });
        Item { id, size: u64::from(content), held: HELD_ALL, name }
    }

    fn register(&mut self, at: usize, items: Vec<Item>) -> Result<()> {
        let Request::Register(plain) = self.heartbeat(at) else { bail!("a heartbeat is an R") };
        // No digest: items are still on their way.
        let (reply, _) =
            self.ask(at, &Request::Register(Register { digest: [0; 16], items, ..plain }))?;
        let Reply::Ack(Ack::Registered(said)) = &reply else { bail!("R was answered {reply:?}") };
        ensure!(said.refused.is_empty(), "an item was refused: {:?}", said.refused);
        Ok(())
    }

    pub(super) fn heartbeat(&self, at: usize) -> Request {
        Request::Register(Register {
            port: 7_000 + at as u16 % 50_000,
            load: Load { uploads: 1, free_slots: 3, rate_kib: 1_000, capacity_kib: 100_000 },
            digest: self.guests[at].digest.to_le_bytes(),
            round: 0,
            round_ends: false,
            items: vec![],
        })
    }

    /// Asks until there is an answer, and follows what the index wants on the way. Says as well how
    /// many bytes the answer had.
    pub(super) fn ask(&mut self, at: usize, request: &Request) -> Result<(Reply, usize)> {
        for _ in 0..TRIES {
            let (id, datagram) = self.seal(at, request);
            self.batches.socket.send(&datagram)?;
            let mut buffer = [0; MAX_DATAGRAM + 1];
            let Some(len) = self.batches.take_one(&mut buffer)? else { continue };
            let (kind, plaintext) = self.open(&mut buffer[..len])?;
            let (answers, reply) = Reply::decode(kind, plaintext)?;
            match reply {
                _ if answers != id => {}
                Reply::Error(refusal) if refusal.code == Code::CookieNeeded => {
                    self.guests[at].cookie = refusal.cookie.context("it gave no cookie")?;
                }
                // Registering everything at once is more than one member may do.
                Reply::Error(refusal) if refusal.code == Code::TooFast => {
                    std::thread::sleep(Duration::from_secs(1));
                }
                reply => return Ok((reply, len)),
            }
        }
        bail!("the index does not answer")
    }

    /// All watch, and something changes.
    fn tell_watchers(&mut self, contents: u32) -> Result<Told> {
        let watch = Request::Watch(Watch { glob: "*".to_owned(), since: 0, stop: false });
        for at in 0..self.guests.len() {
            let (reply, _) = self.ask(at, &watch)?;
            ensure!(matches!(reply, Reply::Ack(Ack::Watching(_))), "W was answered {reply:?}");
        }
        let mut waits = vec![];
        for nth in 0..CHANGES {
            let Request::Register(plain) = self.heartbeat(0) else { bail!("a heartbeat is an R") };
            let items = vec![self.item(contents + nth, false)];
            let change = Request::Register(Register { digest: [0; 16], items, ..plain });
            let (_, datagram) = self.seal(0, &change);
            let mut told = vec![false; self.guests.len()];
            let mut batches = Batches::to(self.batches.socket.peer_addr()?)?;
            std::mem::swap(&mut batches, &mut self.batches);
            let began = Instant::now();
            batches.socket.send(&datagram)?;
            let mut left = told.len();
            while left > 0 && began.elapsed() < NOTICE {
                batches.take(true)?;
                let now = began.elapsed().as_secs_f64() * 1e3;
                for (_, datagram) in batches.taken() {
                    let at = ReplyHead::decode(datagram)?.member.0 - self.guests[0].number.0;
                    let (kind, _) = self.open(datagram)?;
                    if kind == b'N' && !std::mem::replace(&mut told[at as usize], true) {
                        waits.push(now);
                        left -= 1;
                    }
                }
            }
            self.batches = batches;
        }
        waits.sort_by(f64::total_cmp);
        let at = |share: f64| waits.get((waits.len() as f64 * share) as usize).copied();
        Ok(Told {
            p50: at(0.5).context("nobody was told")?,
            p99: at(0.99).context("nobody was told")?,
            last: waits.last().copied().context("nobody was told")?,
            missing: MEMBERS * CHANGES - waits.len() as u32,
        })
    }

    /// Fresh cookies for all: one lives for a minute at least.
    pub(super) fn refresh_cookies(&mut self) -> Result<()> {
        for at in 0..self.guests.len() {
            self.guests[at].cookie = [0; 16];
            self.ask(at, &self.heartbeat(at))?;
        }
        Ok(())
    }

    pub(super) fn seal(&mut self, at: usize, request: &Request) -> (RequestId, Vec<u8>) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let guest = &mut self.guests[at];
        let head = RequestHead {
            kind: request.kind(),
            epoch: guest.epoch,
            member: guest.number,
            salt: guest.salt,
            counter: guest.counter,
            cookie: guest.cookie,
        };
        guest.counter += 1;
        (id, seal_request(&guest.keys.to_index, &head, &request.encode(id)))
    }

    /// Opens a reply: its kind and plaintext.
    fn open<'a>(&mut self, datagram: &'a mut [u8]) -> Result<(u8, &'a [u8])> {
        let head = ReplyHead::decode(datagram)?;
        // Members were numbered in the order they joined.
        let first = self.guests[0].number.0;
        let at = head.member.0.checked_sub(first).context("a reply to nobody")? as usize;
        let guest = self.guests.get_mut(at).context("a reply to nobody")?;
        let key = match guest.reply {
            Some((boot, key)) if boot == head.boot => key,
            _ => guest.keys.reply_key(head.boot),
        };
        guest.reply = Some((head.boot, key));
        let plaintext = open(&key, head.counter, datagram).context("a reply is forged")?;
        Ok((head.kind, plaintext))
    }

    /// As many requests as are answered, and then half as many.
    fn run(&mut self, pid: u32, contents: u32, dice: u64) -> Result<(Storm, Waits)> {
        let (mut first, requests) = self.prepare(REQUESTS, contents, dice);
        let mut batches = Batches::to(self.batches.socket.peer_addr()?)?;
        std::mem::swap(&mut batches, &mut self.batches);
        let storm =
            storm::storm(pid, &mut batches, &requests, |datagram| self.judge(datagram, first))?;
        let steady;
        (first, steady) = self.prepare(STEADY, contents, !dice);
        let rate = storm.rate() / 2.0;
        let waits =
            storm::pace(&mut batches, &steady, rate, |datagram| self.judge(datagram, first))?;
        self.batches = batches;
        Ok((storm, waits))
    }

    /// Which request a reply answers, counted from `first`. A refusal is a failure: all requests are
    /// good.
    pub(super) fn judge(&mut self, datagram: &mut [u8], first: u64) -> Result<usize> {
        let nth = |bytes: &[u8]| -> Result<(u64, usize)> {
            let id = u64::from_be_bytes(*bytes.first_chunk().context("a reply is too short")?);
            Ok((id, id.wrapping_sub(first) as usize))
        };
        if self.real == Real::Bare {
            return Ok(nth(&datagram[HEAD_BYTES..])?.1);
        }
        let real = self.real == Real::Index;
        let (kind, plaintext) = self.open(datagram)?;
        let (id, nth) = nth(plaintext)?;
        if real && (kind != b'A' || id % READ_ONE_IN == 0) {
            match Reply::decode(kind, plaintext)?.1 {
                Reply::Ack(Ack::Registered(said)) => ensure!(!said.repeat_all, "it forgot"),
                Reply::Ack(Ack::Found(found)) => ensure!(!found.hosts.is_empty(), "no hosts"),
                Reply::Ack(Ack::Page(page)) => ensure!(!page.rows.is_empty(), "no rows"),
                reply => bail!("the index answered {reply:?}"),
            }
        }
        Ok(nth)
    }

    /// Requests to be sent, and the id of the first.
    pub(super) fn prepare(&mut self, count: usize, contents: u32, dice: u64) -> (u64, Requests) {
        let first = self.next_id;
        let mut stream = blake3::Hasher::new().update(&dice.to_be_bytes()).finalize_xof();
        let mut all = Requests::default();
        for _ in 0..count {
            let mut drawn = [0; 12];
            stream.fill(&mut drawn);
            let [a, b, c] = [0, 4, 8]
                .map(|i| u32::from_be_bytes([drawn[i], drawn[i + 1], drawn[i + 2], drawn[i + 3]]));
            let (at, content) = (a as usize % self.guests.len(), b % contents);
            let request = match c % 100 {
                0..60 => self.heartbeat(at),
                60..95 => search(content, c),
                _ => list(content, contents),
            };
            let (id, mut datagram) = self.seal(at, &request);
            if self.real == Real::Bare {
                datagram[HEAD_BYTES..HEAD_BYTES + 8].copy_from_slice(&id.0.to_be_bytes());
            }
            all.push(&datagram);
        }
        (first, all)
    }
}

/// A page of the listing, from somewhere in it.
fn list(content: u32, contents: u32) -> Request {
    let after = Some(RowKey { name: name(content), id: content_id(content) });
    let after = after.filter(|_| content < NAMED.min(contents) - 100);
    Request::List(List { glob: "*".to_owned(), after })
}

/// Half of the searches are for an id, half for a name.
fn search(content: u32, dice: u32) -> Request {
    let target = match name(content % NAMED) {
        Some(name) if dice & 1 == 0 => Target::Name(name, None),
        _ => Target::Id(content_id(content)),
    };
    Request::Search(Search { target, hosts: Search::MAX_HOSTS, avoid: vec![] })
}

/// The member that is the `nth` host of a content: ten neighbours.
const fn host(content: u32, nth: u32) -> usize {
    (content.wrapping_mul(37) % MEMBERS + nth) as usize % MEMBERS as usize
}

fn content_id(content: u32) -> ContentId {
    ContentId::file(*blake3::hash(&content.to_be_bytes()).as_bytes())
}

fn name(content: u32) -> Option<potluck::Name> {
    if content < NAMED { format!("content-{content:05}").parse().ok() } else { None }
}
