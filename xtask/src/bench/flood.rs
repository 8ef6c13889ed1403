//! Owns the attack on an index: datagrams that it must not heed, as fast as a socket takes them, while
//! members go on asking. Never knows what members ask.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use potluck_core::id::{ContentId, RequestId};
use potluck_core::seal::{RequestHead, seal_request};
use potluck_core::trust::Invitation;
use potluck_core::wire::datagram::{HEAD_BYTES, HELD_ALL, Item, MAX_DATAGRAM, Register, Request};

use super::index::{Crowd, MEMBERS};
use super::storm::{self, Batches, Requests, Storm, Waits};
use crate::proc;
use crate::table::Table;

/// Different datagrams of one kind; they are sent again and again.
const KINDS_OF: usize = 20_000;
/// Datagrams of an attack at least.
const AT_LEAST: usize = 250_000;
/// Requests of members meanwhile.
const REQUESTS: usize = 100_000;
/// Contents that the greedy member names with each of its datagrams.
const NAMED_AT_ONCE: u32 = 24;
/// Contents that it names at least, in all.
const GREED: usize = 10_000_000;
/// Memory that an attack of strangers may cost, in MiB.
const MOST_MEMORY: f64 = 1.0;

/// What members got while nobody attacked, and under each attack.
pub(super) fn run(
    crowd: &mut Crowd,
    pid: u32,
    contents: u32,
    invitation: &Invitation,
) -> Result<Table> {
    let mut table = Table::new(&[
        "meanwhile",
        "members' requests a second",
        "of them answered",
        "p50 µs",
        "p99 µs",
        "attack/s",
        "answered",
        "memory MiB",
    ]);
    let index = crowd.batches.socket.peer_addr()?;
    let alone = ask(crowd, pid, contents, 0)?;
    let rate = alone.rate() / 2.0;
    let quiet = beside(crowd, contents, rate, |_| Ok((0, 0)), 1)?;
    table.row(row("nothing", rate, &quiet, 0.0));
    let kinds = [
        ("random bytes", random()),
        ("a member's head, forged", forged(crowd)),
        ("a member's datagram, one bit bent", bent(crowd, contents)),
        ("a member's datagrams, replayed", replayed(crowd, pid, contents)?),
    ];
    for (nth, (name, datagrams)) in kinds.into_iter().enumerate() {
        let before = proc::memory(pid, "VmRSS")?;
        let flooded = flooded(crowd, contents, rate, &datagrams, index, 2 + nth as u64)?;
        let grown = proc::memory(pid, "VmRSS")? - before;
        ensure!(flooded.answered == 0, "{name}: {} were answered", flooded.answered);
        ensure!(grown <= MOST_MEMORY, "{name}: the index took {grown:.1} MiB more");
        table.row(row(name, rate, &flooded, grown));
    }
    let before = proc::memory(pid, "VmRSS")?;
    let flooded = greedy(crowd, contents, rate, invitation)?;
    let grown = proc::memory(pid, "VmRSS")? - before;
    table.row(row("one member that registers ten million contents", rate, &flooded, grown));
    Ok(table)
}

fn row(name: &str, rate: f64, flooded: &Flooded, grown: f64) -> [String; 8] {
    let lost = flooded.waits.lost as f64 / REQUESTS as f64;
    [
        name.to_owned(),
        format!("{rate:.0}"),
        format!("{:.1} %", 100.0 * (1.0 - lost)),
        format!("{:.0}", flooded.waits.p50),
        format!("{:.0}", flooded.waits.p99),
        format!("{:.0}", flooded.sent as f64 / flooded.seconds),
        flooded.answered.to_string(),
        format!("{grown:+.1}"),
    ]
}

/// What members got, and what came of the attack.
struct Flooded {
    waits: Waits,
    sent: usize,
    answered: usize,
    seconds: f64,
}

fn ask(crowd: &mut Crowd, pid: u32, contents: u32, dice: u64) -> Result<Storm> {
    crowd.refresh_cookies()?;
    let (first, requests) = crowd.prepare(REQUESTS, contents, dice);
    storm_of(crowd, pid, &requests, first)
}

fn storm_of(crowd: &mut Crowd, pid: u32, requests: &Requests, first: u64) -> Result<Storm> {
    let mut batches = Batches::to(crowd.batches.socket.peer_addr()?)?;
    std::mem::swap(&mut batches, &mut crowd.batches);
    let storm = storm::storm(pid, &mut batches, requests, |datagram| crowd.judge(datagram, first));
    crowd.batches = batches;
    storm
}

/// Members ask while `datagrams` are sent to `target`.
fn flooded(
    crowd: &mut Crowd,
    contents: u32,
    rate: f64,
    datagrams: &Requests,
    target: SocketAddr,
    dice: u64,
) -> Result<Flooded> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(target)?;
    let attack = move |over: &AtomicBool| -> Result<(usize, usize)> {
        let (mut batches, mut sent, mut answered) = (Batches::new(socket)?, 0, 0);
        while sent < AT_LEAST || !over.load(Ordering::Relaxed) {
            let from = sent % datagrams.len();
            sent += datagrams.send(&mut batches, from..datagrams.len().min(from + 64))?;
            answered += batches.take(false)?;
        }
        thread::sleep(Duration::from_millis(200)); // an answer to the last would have come by then
        while batches.take(false)? > 0 {
            answered += batches.taken().count();
        }
        Ok((sent, answered))
    };
    beside(crowd, contents, rate, attack, dice)
}

/// Members ask, half as often as they could, while something else goes on, on the same core.
fn beside(
    crowd: &mut Crowd,
    contents: u32,
    rate: f64,
    attack: impl FnOnce(&AtomicBool) -> Result<(usize, usize)> + Send,
    dice: u64,
) -> Result<Flooded> {
    crowd.refresh_cookies()?;
    let (first, requests) = crowd.prepare(REQUESTS, contents, dice);
    let mut batches = Batches::to(crowd.batches.socket.peer_addr()?)?;
    std::mem::swap(&mut batches, &mut crowd.batches);
    let over = AtomicBool::new(false);
    let flooded = thread::scope(|scope| {
        let began = Instant::now();
        let attack = scope.spawn(|| attack(&over));
        let waits =
            storm::pace(&mut batches, &requests, rate, |datagram| crowd.judge(datagram, first));
        over.store(true, Ordering::Relaxed);
        let (sent, answered) = attack.join().ok().context("the attack failed")??;
        Ok(Flooded { waits: waits?, sent, answered, seconds: began.elapsed().as_secs_f64() })
    });
    while batches.take(true)? > 0 {} // what came too late is no answer to what is asked next
    crowd.batches = batches;
    flooded
}

/// Bytes that mean nothing, of any length.
fn random() -> Requests {
    let mut stream = blake3::Hasher::new().update(b"random").finalize_xof();
    let mut all = Requests::default();
    for _ in 0..KINDS_OF {
        let (mut length, mut bytes) = ([0; 2], [0; MAX_DATAGRAM]);
        stream.fill(&mut length);
        stream.fill(&mut bytes);
        let length = 1 + usize::from(u16::from_be_bytes(length)) % MAX_DATAGRAM;
        // Half of them begin as requests do.
        if length.is_multiple_of(2) && length > 2 {
            bytes[..2].copy_from_slice(&[b'R', 1]);
        }
        all.push(&bytes[..length]);
    }
    all
}

/// Heads of members' sessions, as whoever listens on the way may know them, before bytes that do not open.
fn forged(crowd: &mut Crowd) -> Requests {
    let mut all = Requests::default();
    for nth in 0..KINDS_OF {
        let at = nth * 7 % crowd.guests.len();
        let request = crowd.heartbeat(at);
        let (_, mut datagram) = crowd.seal(at, &request);
        crowd.guests[at].counter -= 1; // it was never sent
        datagram[HEAD_BYTES..].fill(nth as u8);
        all.push(&datagram);
    }
    all
}

/// Members' requests with one bit bent, anywhere.
fn bent(crowd: &mut Crowd, contents: u32) -> Requests {
    let (_, good) = crowd.prepare(KINDS_OF, contents, 77);
    let mut all = Requests::default();
    for nth in 0..good.len() {
        let mut datagram = good.get(nth).to_vec();
        let bit = nth * 31 % (8 * datagram.len());
        datagram[bit / 8] ^= 1 << (bit % 8);
        all.push(&datagram);
    }
    all
}

/// Requests that were answered already.
fn replayed(crowd: &mut Crowd, pid: u32, contents: u32) -> Result<Requests> {
    crowd.refresh_cookies()?;
    let (first, requests) = crowd.prepare(KINDS_OF, contents, 78);
    let storm = storm_of(crowd, pid, &requests, first)?;
    ensure!(storm.lost == 0, "some of what is to be replayed did not arrive");
    Ok(requests)
}

/// A member that registers all it can, as fast as it can.
fn greedy(crowd: &mut Crowd, contents: u32, rate: f64, invitation: &Invitation) -> Result<Flooded> {
    let mut member = Crowd::join(invitation, MEMBERS..MEMBERS + 1)?;
    let Request::Register(plain) = member.heartbeat(0) else { unreachable!("a heartbeat is an R") };
    member.refresh_cookies()?;
    let Crowd { batches, mut guests, .. } = member;
    let guest = guests.remove(0);
    let socket = batches.socket.try_clone()?;
    let attack = move |over: &AtomicBool| -> Result<(usize, usize)> {
        let (mut batches, mut sent, mut answered) = (Batches::new(socket)?, 0, 0);
        let mut content = 0;
        while sent * (NAMED_AT_ONCE as usize) < GREED || !over.load(Ordering::Relaxed) {
            let mut all = Requests::default();
            for nth in 0..16 {
                let items = (content..content + NAMED_AT_ONCE).map(greeds).collect();
                content += NAMED_AT_ONCE;
                let request =
                    Request::Register(Register { digest: [0; 16], items, ..plain.clone() });
                let head = RequestHead {
                    kind: b'R',
                    epoch: guest.epoch,
                    member: guest.number,
                    salt: guest.salt,
                    counter: guest.counter + 1 + (sent + nth) as u64,
                    cookie: guest.cookie,
                };
                let plaintext = request.encode(RequestId(0));
                all.push(&seal_request(&guest.keys.to_index, &head, &plaintext));
            }
            let mut gone = 0;
            while gone < all.len() {
                gone += all.send(&mut batches, gone..all.len())?;
            }
            sent += gone;
            answered += batches.take(false)?;
        }
        Ok((sent, answered))
    };
    beside(crowd, contents, rate, attack, 99)
}

/// A content of the greedy member's, unlike any other.
fn greeds(n: u32) -> Item {
    let mut hash = [0xee; 32];
    hash[..4].copy_from_slice(&n.to_be_bytes());
    Item { id: ContentId::file(hash), size: 1, held: HELD_ALL, name: None }
}
