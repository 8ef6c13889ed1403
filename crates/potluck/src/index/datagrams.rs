//! Owns a UDP socket that takes and gives datagrams in batches: one system call for up to [`BATCH`].
//! Never looks into them.

use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg};
use potluck_core::registrar::Outbox;
use potluck_core::wire::datagram::MAX_DATAGRAM;
use rustix::event::{PollFd, PollFlags, poll};

use crate::clock;
use crate::door::timespec;
use crate::seldom::Seldom;

/// Datagrams taken or given with one system call: more of them gain nothing that could be measured.
const BATCH: usize = 64;
/// Room for one datagram, and one byte more: so a longer one shows.
type Buffer = [u8; MAX_DATAGRAM + 1];

/// A socket and the memory it takes datagrams into.
pub(super) struct Datagrams {
    socket: UdpSocket,
    ipv6: bool,
    /// Heads of messages taken, and of those given. They must not be the same: giving leaves pointers
    /// to addresses behind that are soon gone, and taking writes where heads point to.
    taking: MultiHeaders<SockaddrStorage>,
    giving: MultiHeaders<SockaddrStorage>,
    buffers: Box<[Buffer]>,
    /// Where each of the last batch came from, and its length.
    came: Vec<(SocketAddr, usize)>,
    unsent: Seldom,
}

impl Datagrams {
    pub(super) fn new(socket: UdpSocket) -> Self {
        let ipv6 = socket.local_addr().is_ok_and(|address| address.is_ipv6());
        Self {
            socket,
            ipv6,
            taking: MultiHeaders::preallocate(BATCH, None),
            giving: MultiHeaders::preallocate(BATCH, None),
            buffers: vec![[0; MAX_DATAGRAM + 1]; BATCH].into(),
            came: Vec::with_capacity(BATCH),
            unsent: Seldom::default(),
        }
    }

    /// Takes what waits, without waiting for more: each datagram and where it came from.
    pub(super) fn take(&mut self) -> impl Iterator<Item = (SocketAddr, &mut [u8])> {
        self.came.clear();
        let mut slices: Vec<_> = self.buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
        let fd = self.socket.as_raw_fd();
        // What the kernel reports as errors here are echoes of datagrams sent: nothing to act on.
        if let Ok(all) =
            recvmmsg(fd, &mut self.taking, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None)
        {
            let came = all.map(|one| (one.address.and_then(|a| address(&a)), one.bytes));
            let nowhere = SocketAddr::from(([0; 4], 0));
            self.came.extend(came.map(|(from, len)| (from.unwrap_or(nowhere), len)));
        }
        let buffers = self.buffers.iter_mut();
        self.came.iter().zip(buffers).map(|((from, len), buffer)| (*from, &mut buffer[..*len]))
    }

    /// How many the last batch were, and how many bytes.
    pub(super) fn taken(&self) -> (usize, usize) {
        (self.came.len(), self.came.iter().map(|(_, len)| len).sum())
    }

    /// Sends all that is in the outbox. What the kernel has no room for is lost: it is UDP.
    pub(super) fn give(&mut self, outbox: &Outbox) {
        let mut all = outbox.datagrams().peekable();
        while all.peek().is_some() {
            let (to, bytes): (Vec<_>, Vec<_>) = all
                .by_ref()
                .take(BATCH)
                .map(|(to, bytes)| (Some(self.for_socket(to)), [IoSlice::new(bytes)]))
                .unzip();
            let mut sent = 0;
            while sent < bytes.len() {
                let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
                let rest = bytes[sent..].iter();
                match sendmmsg(fd, &mut self.giving, rest, &to[sent..], [], flags) {
                    Ok(some) => sent += some.count().max(1),
                    Err(Errno::EAGAIN) => break,
                    Err(error) => {
                        if let Some(more) = self.unsent.now(clock::now()) {
                            tracing::debug!(%error, more, "a datagram was not sent");
                        }
                        sent += 1;
                    }
                }
            }
        }
    }

    /// Waits until a datagram waits, `wake` does, or the time is over.
    pub(super) fn wait(&self, wake: BorrowedFd<'_>, most: Duration) {
        let timeout = timespec(most);
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
        ];
        let _ = poll(&mut fds, Some(&timeout));
    }

    /// An address as the socket wants it: an IPv6 one takes IPv4 addresses only mapped.
    fn for_socket(&self, to: SocketAddr) -> SockaddrStorage {
        match to {
            SocketAddr::V4(v4) if self.ipv6 => {
                SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()).into()
            }
            _ => to.into(),
        }
    }
}

fn address(from: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = from.as_sockaddr_in() {
        return Some(SocketAddr::new(v4.ip().into(), v4.port()));
    }
    let v6 = from.as_sockaddr_in6()?;
    Some(SocketAddr::new(v6.ip().to_canonical(), v6.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_has_all_that_waits_each_whole_and_with_its_sender() {
        let socket = UdpSocket::bind("[::]:0").unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], socket.local_addr().unwrap().port()));
        let mut datagrams = Datagrams::new(socket);
        assert_eq!(datagrams.take().count(), 0);
        let senders: Vec<_> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        for (nth, sender) in senders.iter().enumerate() {
            sender.send_to(&vec![nth as u8; 100 + nth], to).unwrap();
        }
        let mut came = vec![];
        while came.len() < senders.len() {
            came.extend(datagrams.take().map(|(from, bytes)| (from, bytes.to_vec())));
        }
        for (nth, sender) in senders.iter().enumerate() {
            assert!(came.contains(&(sender.local_addr().unwrap(), vec![nth as u8; 100 + nth])));
        }
    }
}
