//! Owns the measurement of an index: a real process on one core, its members made up on another.
//! Requests are sealed beforehand, every reply is opened, and one in a few is read as well.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use potluck::control::Event;
use potluck::testing;
use potluck_core::id::{ContentId, MemberNumber, NetworkId, RequestId, Version};
use potluck_core::seal::{ReplyHead, RequestHead, SessionKeys, open, seal_request};
use potluck_core::time::WallTime;
use potluck_core::trust::{Invitation, MachineKey, NameRecord};
use potluck_core::wire::datagram::{
    Ack, Code, HELD_ALL, ITEMS_ROOM, Item, List, Load, MAX_DATAGRAM, Register, Reply, Request,
    RowKey, Search, Target, digest_of,
};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};

use super::{Setting, echo};
use crate::proc::{self, Machine, measure};
use crate::table::{Table, median};

/// The index runs on this core …
const INDEX_CORE: usize = 0;
/// … and its members on this one.
const OWN_CORE: usize = 1;
/// Members: each may ask 2,000 times a second, so that these are never told to slow down.
const MEMBERS: u32 = 200;
/// Hosts of each content.
const HOSTS: u32 = 5;
/// Contents that have a name: the listing has a row for each content, named or not.
const NAMED: u32 = 2_000;
/// Requests of one run: done before the cookies are stale, however busy the machine is.
const REQUESTS: usize = 200_000;
/// Requests under way at once: they fit any socket's buffer.
const WINDOW: usize = 128;
/// A reply that takes so long is lost.
const PATIENCE: Duration = Duration::from_millis(200);
/// Tries of a request that must not be lost.
const TRIES: u32 = 20;
/// Of so many replies one is read to its end, not only opened.
const READ_ONE_IN: u64 = 16;

pub(super) fn run(setting: &Setting, registrations: u32) -> Result<()> {
    if proc::find("taskset").is_none() || std::thread::available_parallelism()?.get() < 2 {
        println!("## Index\n\nNot measured: it takes taskset (util-linux) and two cores.\n");
        return Ok(());
    }
    let contents = registrations / HOSTS;
    let (index, _) = Machine::index(&setting.potluck, &setting.dir, Some(INDEX_CORE))?;
    let uses = MEMBERS.to_string();
    let invited = index.asks(["invite", "--uses", &uses])?;
    let Event::Invited { invite, .. } = invited else { bail!("invite said {invited:?}") };
    let invitation: Invitation = invite.parse()?;
    let mut crowd = Crowd::join(&invitation)?;
    let empty = proc::memory(index.pid(), "VmRSS")?;
    crowd.register_all(contents)?;
    let full = proc::memory(index.pid(), "VmRSS")?;

    let (echo, address) = echo::start(INDEX_CORE)?;
    let mut beside = Crowd::of_echo(address)?;
    keep_to(Some(OWN_CORE))?;
    let (mut ours, mut theirs) = (vec![], vec![]);
    for nth in 0..setting.runs {
        crowd.refresh_cookies()?;
        ours.push(crowd.storm(index.pid(), contents, u64::from(nth))?);
        theirs.push(beside.storm(echo.pid(), contents, u64::from(nth))?);
    }
    keep_to(None)?;

    println!(
        "## Index: {MEMBERS} members, {contents} contents with {HOSTS} hosts each, one core\n"
    );
    println!("60 % heartbeats, 35 % searches, 5 % lists; {REQUESTS} requests a run.\n");
    let heads = ["", "requests/s", "× echo", "lost", "CPU s a million", "× echo by CPU"];
    let mut table = Table::new(&[&heads[..], &["generator busy", "others busy"]].concat());
    let rate = |storms: &[Storm]| median(storms.iter().map(Storm::rate));
    let cpu = |storms: &[Storm]| median(storms.iter().map(Storm::cpu_a_million));
    for (name, storms) in [("potluck index", &ours), ("authenticated echo", &theirs)] {
        let of = |f: fn(&Storm) -> f64| median(storms.iter().map(f));
        table.row([
            name.to_owned(),
            format!("{:.0}", rate(storms)),
            format!("{:.2}", rate(storms) / rate(&theirs)),
            format!("{}", storms.iter().map(|storm| storm.lost).sum::<usize>()),
            format!("{:.2}", cpu(storms)),
            format!("{:.2}", cpu(&theirs) / cpu(storms)),
            format!("{:.0} %", of(|storm| 100.0 * storm.cost.own / storm.cost.seconds)),
            format!("{:.0} %", of(|storm| 100.0 * storm.cost.others)),
        ]);
    }
    println!(
        "{table}\nRSS of the index: {empty:.0} MiB with no registration, {full:.0} MiB with {}: {:.0} bytes each, names and contents included.\n",
        contents * HOSTS,
        (full - empty) * 1024.0 * 1024.0 / f64::from(contents * HOSTS),
    );
    Ok(())
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
struct Guest {
    key: MachineKey,
    number: MemberNumber,
    epoch: u16,
    salt: u64,
    keys: SessionKeys,
    /// The key of replies, and the boot of the index it is for.
    reply: Option<(u64, [u8; 16])>,
    counter: u64,
    cookie: [u8; 16],
    /// Sum of the digests of all it registered.
    digest: u128,
}

/// All members, behind one socket.
struct Crowd {
    socket: UdpSocket,
    network: NetworkId,
    guests: Vec<Guest>,
    next_id: u64,
    /// Whether replies are those of an index: an echo's are the requests.
    real: bool,
}

/// One run: as many requests as go, [`WINDOW`] at a time.
struct Storm {
    answered: usize,
    lost: usize,
    cost: proc::Cost,
}

impl Storm {
    fn rate(&self) -> f64 {
        self.answered as f64 / self.cost.seconds
    }

    /// CPU seconds of the index for a million requests: says more than the rate where others are
    /// busy on its core.
    fn cpu_a_million(&self) -> f64 {
        self.cost.cpu[0] / self.answered as f64 * 1e6
    }
}

impl Crowd {
    fn join(invitation: &Invitation) -> Result<Self> {
        let mut guests = vec![];
        let mut met = None;
        for i in 0..MEMBERS {
            let key = MachineKey::from_seed(*blake3::hash(&i.to_be_bytes()).as_bytes());
            let (session, index) = testing::session(&key, invitation)?;
            met = Some((index, session.certificate.network));
            guests.push(Guest {
                key,
                number: session.member,
                epoch: session.epoch,
                salt: session.salt,
                keys: SessionKeys {
                    to_index: session.key_to_index,
                    from_index: session.key_from_index,
                },
                reply: None,
                counter: 0,
                cookie: [0; 16],
                digest: 0,
            });
        }
        let (index, network) = met.context("nobody joined")?;
        Ok(Self { socket: socket(index)?, network, guests, next_id: 0, real: true })
    }

    fn of_echo(address: SocketAddr) -> Result<Self> {
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
        let network = NetworkId([0; 32]);
        Ok(Self { socket: socket(address)?, network, guests, next_id: 0, real: false })
    }

    /// Registers every content at [`HOSTS`] members; the first of them publishes its name, if any.
    fn register_all(&mut self, contents: u32) -> Result<()> {
        for at in 0..self.guests.len() {
            let mut batch = vec![];
            let mut room = ITEMS_ROOM;
            for content in 0..contents {
                let Some(nth) = (0..HOSTS).find(|nth| host(content, *nth) == at) else { continue };
                let item = self.item(content, nth == 0);
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
            let kept = self.ask(at, &self.heartbeat(at))?;
            ensure!(
                matches!(&kept, Reply::Ack(Ack::Registered(said)) if !said.repeat_all),
                "the index does not know what was registered: {kept:?}"
            );
        }
        Ok(())
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
        let reply =
            self.ask(at, &Request::Register(Register { digest: [0; 16], items, ..plain }))?;
        let Reply::Ack(Ack::Registered(said)) = &reply else { bail!("R was answered {reply:?}") };
        ensure!(said.refused.is_empty(), "an item was refused: {:?}", said.refused);
        Ok(())
    }

    fn heartbeat(&self, at: usize) -> Request {
        Request::Register(Register {
            port: 7_000 + at as u16,
            load: Load { uploads: 1, free_slots: 3, rate_kib: 1_000, capacity_kib: 100_000 },
            digest: self.guests[at].digest.to_le_bytes(),
            round: 0,
            round_ends: false,
            items: vec![],
        })
    }

    /// Asks until there is an answer, and follows what the index wants on the way.
    fn ask(&mut self, at: usize, request: &Request) -> Result<Reply> {
        for _ in 0..TRIES {
            let (id, datagram) = self.seal(at, request);
            self.socket.send(&datagram)?;
            let mut buffer = [0; MAX_DATAGRAM + 1];
            let Some(len) = receive(&self.socket, &mut buffer)? else { continue };
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
                reply => return Ok(reply),
            }
        }
        bail!("the index does not answer")
    }

    /// Fresh cookies for all: one lives for a minute at least.
    fn refresh_cookies(&mut self) -> Result<()> {
        for at in 0..self.guests.len() {
            self.guests[at].cookie = [0; 16];
            self.ask(at, &self.heartbeat(at))?;
        }
        Ok(())
    }

    fn seal(&mut self, at: usize, request: &Request) -> (RequestId, Vec<u8>) {
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

    /// Sends [`REQUESTS`] requests as fast as they are answered.
    fn storm(&mut self, pid: u32, contents: u32, dice: u64) -> Result<Storm> {
        let mut answered = vec![false; REQUESTS];
        let first = self.next_id;
        let requests = self.prepare(contents, dice);
        let ((done, lost), cost) = measure(&[pid], || {
            let mut buffer = [0; MAX_DATAGRAM + 1];
            let (mut sent, mut done, mut lost) = (0, 0, 0);
            while done + lost < REQUESTS {
                // Half a window at a time: fewer calls, and the index never runs dry.
                if sent - done - lost <= WINDOW / 2 {
                    let batch = sent..(done + lost + WINDOW).min(REQUESTS);
                    sent += requests.send(&self.socket, batch)?;
                }
                let Some(len) = receive(&self.socket, &mut buffer)? else {
                    lost = sent - done;
                    continue;
                };
                let nth = self.judge(&mut buffer[..len])?.wrapping_sub(first);
                // Replies to what was asked before this run come late, if at all.
                let Some(answered) = answered.get_mut(nth as usize) else { continue };
                ensure!(!std::mem::replace(answered, true), "a request was answered twice");
                done += 1;
                // One that was given up came after all.
                lost = lost.min(sent - done);
            }
            Ok((done, lost))
        })?;
        Ok(Storm { answered: done, lost, cost })
    }

    /// Which request a reply answers. A refusal is a failure: all requests are good.
    fn judge(&mut self, datagram: &mut [u8]) -> Result<u64> {
        let (kind, plaintext) = self.open(datagram)?;
        let id = plaintext.first_chunk().context("a reply is too short")?;
        let id = u64::from_be_bytes(*id);
        if self.real && (kind != b'A' || id % READ_ONE_IN == 0) {
            match Reply::decode(kind, plaintext)?.1 {
                Reply::Ack(Ack::Registered(said)) => ensure!(!said.repeat_all, "it forgot"),
                Reply::Ack(Ack::Found(found)) => ensure!(!found.hosts.is_empty(), "no hosts"),
                Reply::Ack(Ack::Page(page)) => ensure!(!page.rows.is_empty(), "no rows"),
                reply => bail!("the index answered {reply:?}"),
            }
        }
        Ok(id)
    }

    fn prepare(&mut self, contents: u32, dice: u64) -> Requests {
        let mut stream = blake3::Hasher::new().update(&dice.to_be_bytes()).finalize_xof();
        let mut all = Requests { bytes: vec![], ends: vec![0] };
        for _ in 0..REQUESTS {
            let mut drawn = [0; 12];
            stream.fill(&mut drawn);
            let [a, b, c] = [0, 4, 8]
                .map(|i| u32::from_be_bytes([drawn[i], drawn[i + 1], drawn[i + 2], drawn[i + 3]]));
            let (at, content) = (a as usize % self.guests.len(), b % contents);
            let request = match c % 100 {
                0..60 => self.heartbeat(at),
                60..95 => search(content, c),
                _ => Request::List(List {
                    glob: "*".to_owned(),
                    after: Some(RowKey { name: name(content), id: content_id(content) })
                        .filter(|_| content < NAMED.min(contents) - 100),
                }),
            };
            let (_, datagram) = self.seal(at, &request);
            all.bytes.extend_from_slice(&datagram);
            all.ends.push(all.bytes.len());
        }
        all
    }
}

/// Half of the searches are for an id, half for a name.
fn search(content: u32, dice: u32) -> Request {
    let target = match name(content % NAMED) {
        Some(name) if dice & 1 == 0 => Target::Name(name, None),
        _ => Target::Id(content_id(content)),
    };
    Request::Search(Search { target, hosts: Search::MAX_HOSTS })
}

/// The member that is the `nth` host of a content: any five neighbours of two hundred.
const fn host(content: u32, nth: u32) -> usize {
    (content.wrapping_mul(37) % MEMBERS + nth) as usize % MEMBERS as usize
}

fn content_id(content: u32) -> ContentId {
    ContentId::file(*blake3::hash(&content.to_be_bytes()).as_bytes())
}

fn name(content: u32) -> Option<potluck::Name> {
    if content < NAMED { format!("content-{content:05}").parse().ok() } else { None }
}

/// Sealed requests, one behind the other.
struct Requests {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Requests {
    /// Sends these with one call; how many went.
    fn send(&self, socket: &UdpSocket, batch: std::ops::Range<usize>) -> Result<usize> {
        let bytes: Vec<_> = batch
            .map(|nth| [io::IoSlice::new(&self.bytes[self.ends[nth]..self.ends[nth + 1]])])
            .collect();
        let mut control: Vec<_> = bytes.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let mut messages: Vec<_> =
            bytes.iter().zip(&mut control).map(|(b, control)| MMsgHdr::new(b, control)).collect();
        match messages.len() {
            0 => Ok(0),
            _ => Ok(sendmmsg(socket, &mut messages, SendFlags::empty())?),
        }
    }
}

fn socket(to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 8 << 20)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// The length of a datagram; `None`: none came in time.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> Result<Option<usize>> {
    match socket.recv(buffer) {
        Ok(len) => Ok(Some(len)),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}
