//! Owns the load: sends prepared requests as fast as they are answered, or at a steady rate, and says
//! how many were answered, how fast, and at what cost. Never knows what they mean.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg};
use potluck_core::wire::datagram::MAX_DATAGRAM;
use rustix::event::{PollFd, PollFlags, poll};

use crate::proc::{Cost, measure};

/// Requests under way at once: they fit any socket's buffer.
const WINDOW: usize = 256;
/// At a steady rate this long is waited for replies before more is sent.
const NAP: Duration = Duration::from_micros(50);
/// Datagrams with one system call.
const BATCH: usize = 64;
/// A reply that takes so long is lost.
const PATIENCE: Duration = Duration::from_millis(200);

/// More lost than this, and something is wrong.
const MOST_LOST: usize = 4 * WINDOW;

/// A socket that takes and gives datagrams in batches.
pub(super) struct Batches {
    pub(super) socket: UdpSocket,
    /// Never the same: giving leaves pointers behind that taking would write to.
    taking: MultiHeaders<SockaddrStorage>,
    giving: MultiHeaders<SockaddrStorage>,
    buffers: Vec<[u8; MAX_DATAGRAM + 1]>,
    came: Vec<(usize, Option<SockaddrStorage>)>,
}

impl Batches {
    pub(super) fn new(socket: UdpSocket) -> Result<Self> {
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 8 << 20)?;
        Ok(Self {
            socket,
            taking: MultiHeaders::preallocate(BATCH, None),
            giving: MultiHeaders::preallocate(BATCH, None),
            buffers: vec![[0; MAX_DATAGRAM + 1]; BATCH],
            came: vec![],
        })
    }

    /// One that speaks to this address only.
    pub(super) fn to(address: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(address)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Self::new(socket)
    }

    /// Takes what waits; where `wait`, until there is something or patience ends. Says how many.
    pub(super) fn take(&mut self, wait: bool) -> Result<usize> {
        let flags = if wait { MsgFlags::MSG_WAITFORONE } else { MsgFlags::MSG_DONTWAIT };
        let mut slices: Vec<_> = self.buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
        self.came.clear();
        match recvmmsg(self.socket.as_raw_fd(), &mut self.taking, slices.iter_mut(), flags, None) {
            Ok(all) => self.came.extend(all.map(|one| (one.bytes, one.address))),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.came.len())
    }

    /// What was taken last.
    pub(super) fn taken(&mut self) -> impl Iterator<Item = (Option<SockaddrStorage>, &mut [u8])> {
        let buffers = self.buffers.iter_mut();
        self.came.iter().zip(buffers).map(|((len, from), buffer)| (*from, &mut buffer[..*len]))
    }

    /// Sends these, to where they say or to the address of this socket; how many went.
    pub(super) fn give<'a>(
        &mut self,
        all: impl Iterator<Item = (Option<SockaddrStorage>, &'a [u8])>,
    ) -> Result<usize> {
        let (to, bytes): (Vec<_>, Vec<_>) =
            all.take(BATCH).map(|(to, bytes)| (to, [IoSlice::new(bytes)])).unzip();
        let fd = self.socket.as_raw_fd();
        match sendmmsg(fd, &mut self.giving, bytes.iter(), &to, [], MsgFlags::empty()) {
            _ if bytes.is_empty() => Ok(0),
            Ok(sent) => Ok(sent.count()),
            Err(error) => Err(error.into()),
        }
    }

    /// One datagram, if it comes in time.
    pub(super) fn take_one(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match self.socket.recv(buffer) {
            Ok(len) => Ok(Some(len)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// Requests, one behind the other.
#[derive(Default)]
pub(super) struct Requests {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Requests {
    pub(super) fn push(&mut self, datagram: &[u8]) {
        self.bytes.extend_from_slice(datagram);
        self.ends.push(self.bytes.len());
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn get(&self, nth: usize) -> &[u8] {
        let start = nth.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[nth]]
    }

    /// Sends as many of these as go with one call; how many went.
    pub(super) fn send(&self, batches: &mut Batches, range: Range<usize>) -> Result<usize> {
        batches.give(range.map(|nth| (None, self.get(nth))))
    }
}

/// Requests sent as fast as they were answered.
pub(super) struct Storm {
    pub(super) answered: usize,
    pub(super) lost: usize,
    pub(super) cost: Cost,
}

impl Storm {
    pub(super) fn rate(&self) -> f64 {
        self.answered as f64 / self.cost.seconds
    }

    /// CPU seconds of who answers, for a million requests: says more than the rate where others are
    /// busy on its core, or where those who ask are the slower.
    pub(super) fn cpu_a_million(&self) -> f64 {
        self.cost.cpu[0] / self.answered as f64 * 1e6
    }
}

/// Sends all requests, a window at a time. `judge` says which one a reply answers, counted from 0.
pub(super) fn storm(
    pid: u32,
    batches: &mut Batches,
    requests: &Requests,
    mut judge: impl FnMut(&mut [u8]) -> Result<usize>,
) -> Result<Storm> {
    let all = requests.len();
    let mut answered = vec![false; all];
    let ((done, lost), cost) = measure(&[pid], || {
        let (mut sent, mut done, mut lost) = (0, 0, 0);
        while done + lost < all {
            while sent < all && sent - done - lost <= WINDOW - BATCH {
                sent += requests.send(batches, sent..(sent + BATCH).min(all))?;
            }
            if batches.take(true)? == 0 {
                lost = sent - done;
                ensure!(lost <= MOST_LOST, "{lost} requests were not answered");
                continue;
            }
            for (_, datagram) in batches.taken() {
                // Replies to what was asked before this run come late, if at all.
                let Some(answered) = answered.get_mut(judge(datagram)?) else { continue };
                ensure!(!std::mem::replace(answered, true), "a request was answered twice");
                done += 1;
            }
            lost = lost.min(sent - done); // one that was given up came after all
        }
        Ok((done, lost))
    })?;
    Ok(Storm { answered: done, lost, cost })
}

/// Requests sent at a steady rate: how long answers took, in µs.
pub(super) struct Waits {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) lost: usize,
}

/// Sends all requests at `rate` a second, and never waits for an answer.
pub(super) fn pace(
    batches: &mut Batches,
    requests: &Requests,
    rate: f64,
    mut judge: impl FnMut(&mut [u8]) -> Result<usize>,
) -> Result<Waits> {
    let all = requests.len();
    let (mut waits, mut due_at) = (vec![], vec![0.0; all]);
    let (began, mut sent) = (Instant::now(), 0);
    let mut last_heard = began;
    let nap = rustix::event::Timespec { tv_sec: 0, tv_nsec: NAP.subsec_nanos().into() };
    while waits.len() < all && (sent < all || last_heard.elapsed() < PATIENCE) {
        let due = ((began.elapsed().as_secs_f64() * rate) as usize).min(all);
        while sent < due {
            let some = requests.send(batches, sent..due.min(sent + BATCH))?;
            for at in &mut due_at[sent..sent + some] {
                *at = began.elapsed().as_secs_f64();
            }
            sent += some;
        }
        // Who spins here keeps the kernel from carrying datagrams on this core.
        let mut fds = [PollFd::new(&batches.socket, PollFlags::IN)];
        poll(&mut fds, Some(&nap))?;
        if batches.take(false)? > 0 {
            last_heard = Instant::now();
            let now = began.elapsed().as_secs_f64();
            for (_, datagram) in batches.taken() {
                if let Some(at) = due_at.get(judge(datagram)?) {
                    waits.push((now - at) * 1e6);
                }
            }
        }
    }
    waits.sort_by(f64::total_cmp);
    let at = |share: f64| waits.get((waits.len() as f64 * share) as usize).copied();
    let (p50, p99) = (at(0.5).unwrap_or(f64::NAN), at(0.99).unwrap_or(f64::NAN));
    Ok(Waits { p50, p99, lost: all - waits.len() })
}
