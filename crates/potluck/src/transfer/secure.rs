//! Owns one connection's TLS and the buffers between it and a non-blocking socket: few large reads
//! and writes; rustls shakes hands, then records are opened and sealed where they lie. Never knows
//! what the bytes mean, and never waits.

use std::io::{ErrorKind as Io, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{ClientConfig, ServerConfig};

use super::Gone;
use super::incoming::{Incoming, carrying};
use super::records::{EXTRA, HEAD, MOST, Opened, RENEWAL, Records};
use crate::tls;

/// Room kept for what TLS itself has to say (handshake flights, key updates, alerts).
const RESERVE: usize = 4 << 10;
/// Both buffers before the other side has shown who it is: a record, and some.
const BUFFER_AT_FIRST: usize = carrying(MOST) + 2 * RESERVE;
/// What is read at once of an established connection. Larger reads measure no better.
const READ: usize = carrying(256 << 10);
/// The outgoing buffer: small frames, and a few pieces of the smallest size or one of 256 KiB. It
/// grows to hold a larger one.
const OUTGOING: usize = carrying(256 << 10) + 2 * RESERVE;

/// One TLS connection over one socket.
pub(super) struct Secure {
    socket: Arc<TcpStream>,
    tls: Tls,
    /// The key the other side has proved to hold.
    peer: Option<[u8; 32]>,
    incoming: Incoming,
    outgoing: Window,
    /// How much is read at once.
    read: usize,
    /// Bytes of ciphertext ever put into `outgoing`.
    sealed: u64,
    /// Bytes of ciphertext ever handed to the kernel.
    written: u64,
    /// The other side has said that nothing more comes.
    closed: bool,
}

enum Tls {
    /// Shaking hands.
    Dialler(Box<UnbufferedClientConnection>),
    /// Shaking hands.
    Acceptor(Box<UnbufferedServerConnection>),
    Up(Box<Records>),
    /// Failed.
    Broken,
}

/// What a read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    /// So many bytes.
    Some(usize),
    /// Nothing at the moment.
    Nothing,
    /// The other side sends nothing any more.
    End,
}

impl Secure {
    /// The dialler's end of `socket` (non-blocking, connected).
    pub(super) fn dialled(
        socket: Arc<TcpStream>,
        config: ClientConfig,
    ) -> Result<Self, rustls::Error> {
        let tls = UnbufferedClientConnection::new(Arc::new(config), tls::no_name())?;
        Ok(Self::new(socket, Tls::Dialler(Box::new(tls))))
    }

    /// The acceptor's end of `socket` (non-blocking).
    pub(super) fn accepted(
        socket: Arc<TcpStream>,
        config: Arc<ServerConfig>,
    ) -> Result<Self, rustls::Error> {
        let tls = UnbufferedServerConnection::new(config)?;
        Ok(Self::new(socket, Tls::Acceptor(Box::new(tls))))
    }

    fn new(socket: Arc<TcpStream>, tls: Tls) -> Self {
        Self {
            socket,
            tls,
            peer: None,
            incoming: Incoming::new(BUFFER_AT_FIRST),
            outgoing: Window::new(BUFFER_AT_FIRST),
            read: MOST,
            sealed: 0,
            written: 0,
            closed: false,
        }
    }

    /// Gives the connection the buffers of an established one.
    pub(super) fn grow(&mut self) {
        self.read = READ;
        self.outgoing.grow(OUTGOING);
    }

    /// Gives back memory that an idle connection does not need.
    pub(super) fn rest(&mut self) {
        self.incoming.rest(READ);
        if self.outgoing.is_empty() && self.outgoing.bytes.len() > OUTGOING {
            self.outgoing = Window::new(OUTGOING);
        }
    }

    /// The socket, to wait on.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// The handshake is not over.
    pub(super) const fn is_handshaking(&self) -> bool {
        matches!(self.tls, Tls::Dialler(_) | Tls::Acceptor(_))
    }

    /// The key the other side has proved to hold, once the handshake is over.
    pub(super) const fn peer_key(&self) -> Option<[u8; 32]> {
        self.peer
    }

    /// How many bytes of ciphertext were made so far: where the next one will stand.
    pub(super) const fn sealed(&self) -> u64 {
        self.sealed
    }

    /// How many bytes of ciphertext the kernel has taken so far.
    pub(super) const fn written(&self) -> u64 {
        self.written
    }

    /// Nothing waits to be written.
    pub(super) const fn is_flushed(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// What was opened and waits to be taken.
    pub(super) const fn opened(&mut self) -> &mut Incoming {
        &mut self.incoming
    }

    /// Reads once what the socket holds: `most` bytes at the most, and where `wanted` more are all
    /// that a piece lacks, not much more than those, so that its end is the buffer's end and nothing
    /// has to be moved.
    pub(super) fn read(&mut self, most: usize, wanted: Option<usize>) -> Result<Arrived, Gone> {
        if self.closed {
            return Ok(Arrived::End);
        }
        let sealed = self.incoming.sealed().len();
        let read = if self.is_handshaking() {
            BUFFER_AT_FIRST.saturating_sub(sealed)
        } else {
            wanted.map_or(self.read, carrying).saturating_sub(sealed).max(MOST).min(most)
        };
        if read == 0 {
            return Err(Gone::Protocol("its handshake is too long"));
        }
        self.incoming.make_room(read);
        loop {
            match (&*self.socket).read(&mut self.incoming.room()[..read]) {
                Ok(0) => return Ok(Arrived::End),
                Ok(n) => {
                    self.incoming.arrived(n);
                    return Ok(Arrived::Some(n));
                }
                Err(e) if e.kind() == Io::WouldBlock => return Ok(Arrived::Nothing),
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(Gone::Lost(e.to_string())),
            }
        }
    }

    /// Opens what was read, record by record: it waits in [`Secure::opened`]. What TLS has to answer
    /// lies in the outgoing buffer afterwards. An incomplete record stays for the next time.
    pub(super) fn open(&mut self) -> Result<(), Gone> {
        while self.is_handshaking() {
            if self.outgoing.free().len() < RESERVE / 2 {
                return Err(Gone::Protocol("it makes TLS talk without listening"));
            }
            match self.step() {
                Ok(Next::Again) => {}
                Ok(Next::Idle) => return Ok(()),
                Ok(Next::Up) => self.come_up()?,
                Err(error) => return Err(self.broken(&error)),
            }
        }
        let Tls::Up(records) = &mut self.tls else { return Ok(()) };
        while !self.closed
            && let Some(record) = self.incoming.record()?
        {
            let len = record.len();
            let carried = match records.open(record)? {
                Opened::Data(carried) => carried,
                Opened::Nothing => 0,
                Opened::End => {
                    self.closed = true;
                    0
                }
            };
            self.incoming.opened(len, carried);
        }
        Ok(())
    }

    /// Seals as much of `plain` as there is room for; how much it was.
    pub(super) fn seal(&mut self, plain: &[u8]) -> Result<usize, Gone> {
        self.renew()?;
        let Tls::Up(records) = &mut self.tls else { return Ok(0) };
        let mut said = 0;
        for part in plain.chunks(MOST) {
            let free = self.outgoing.free();
            let Some(record) = free.get_mut(..part.len() + EXTRA) else { break };
            record[HEAD..HEAD + part.len()].copy_from_slice(part);
            records.seal(record)?;
            self.sealed += record.len() as u64;
            self.outgoing.end += part.len() + EXTRA;
            said += part.len();
        }
        Ok(said)
    }

    /// Seals `head` and, behind it, `len` bytes that `fill` puts in their places: it is given as many
    /// in parts. Where the two do not fit into one record the bytes begin a record of their own, so
    /// that the other side finds them in whole chunks of their hash. False, and nothing done, where
    /// something must be written first.
    ///
    /// # Errors
    /// What `fill` says; nothing was sealed then.
    pub(super) fn seal_with<E>(
        &mut self,
        head: &[u8],
        len: usize,
        fill: impl FnOnce(&mut [IoSliceMut<'_>]) -> Result<(), E>,
    ) -> Result<Result<bool, E>, Gone> {
        let need = head.len() + EXTRA + carrying(len);
        if self.outgoing.free().len() < need + RENEWAL {
            if !self.outgoing.is_empty() {
                return Ok(Ok(false));
            }
            self.outgoing.grow(need + RESERVE);
        }
        self.renew()?;
        let Tls::Up(records) = &mut self.tls else { return Ok(Ok(false)) };
        let free = self.outgoing.free();
        // Where the head ends in its record, and where the bytes begin.
        let alone = head.len() + len > MOST;
        let behind = HEAD + head.len();
        free[HEAD..behind].copy_from_slice(head);
        let begin = if alone { behind + EXTRA - HEAD } else { behind - HEAD };
        let filled = {
            let (skipped, mut rest) = free.split_at_mut(begin);
            debug_assert!(skipped.len() == begin);
            let mut parts = Vec::with_capacity(len / MOST + 1);
            let mut left = len;
            while left > 0 {
                let n = left.min(MOST);
                let (record, more) = rest.split_at_mut((n + EXTRA).min(rest.len()));
                parts.push(IoSliceMut::new(&mut record[HEAD..HEAD + n]));
                rest = more;
                left -= n;
            }
            fill(&mut parts)
        };
        if let Err(error) = filled {
            return Ok(Err(error));
        }
        let mut at = 0;
        let mut seal = |carries: usize| {
            records.seal(&mut free[at..at + carries + EXTRA])?;
            at += carries + EXTRA;
            Ok(())
        };
        if alone {
            seal(head.len())?;
            (0..len).step_by(MOST).try_for_each(|from| seal(MOST.min(len - from)))?;
        } else {
            seal(head.len() + len)?;
        }
        self.sealed += at as u64;
        self.outgoing.end += at;
        Ok(Ok(true))
    }

    /// Changes our key where it is worn out, or the other side wants that.
    fn renew(&mut self) -> Result<(), Gone> {
        let Tls::Up(records) = &mut self.tls else { return Ok(()) };
        if self.outgoing.free().len() >= RENEWAL
            && let Some(record) = records.renew()?
        {
            self.outgoing.free()[..RENEWAL].copy_from_slice(&record);
            self.outgoing.end += RENEWAL;
            self.sealed += RENEWAL as u64;
        }
        Ok(())
    }

    /// Writes what is sealed, `most` bytes at the most, until the kernel takes no more; how much it
    /// took.
    pub(super) fn write(&mut self, most: usize) -> Result<usize, Gone> {
        let mut took = 0;
        while !self.outgoing.is_empty() && took < most {
            let filled = self.outgoing.filled();
            let n = filled.len().min(most - took);
            match (&*self.socket).write(&filled[..n]) {
                Ok(n) => {
                    self.outgoing.start += n;
                    took += n;
                }
                Err(e) if e.kind() == Io::WouldBlock => break,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(Gone::Lost(e.to_string())),
            }
        }
        if self.outgoing.is_empty() {
            self.outgoing.compact();
        }
        self.written += took as u64;
        Ok(took)
    }

    /// One step of the handshake.
    fn step(&mut self) -> Result<Next, rustls::Error> {
        let (incoming, outgoing) = (self.incoming.sealed(), &mut self.outgoing);
        let before = outgoing.end;
        let mut early = vec![];
        let (discard, next) = match &mut self.tls {
            Tls::Dialler(tls) => advance(tls.process_tls_records(incoming), outgoing, &mut early),
            Tls::Acceptor(tls) => advance(tls.process_tls_records(incoming), outgoing, &mut early),
            Tls::Up(_) | Tls::Broken => return Ok(Next::Idle),
        };
        self.sealed += (outgoing.end - before) as u64;
        self.incoming.discard(discard);
        self.incoming.append(&early);
        let next = next?;
        let over = match &self.tls {
            Tls::Dialler(tls) => !tls.is_handshaking(),
            Tls::Acceptor(tls) => !tls.is_handshaking(),
            Tls::Up(_) | Tls::Broken => false,
        };
        match next {
            Next::Up if over => Ok(Next::Up),
            Next::Up => Ok(Next::Idle),
            next => Ok(next),
        }
    }

    /// The handshake is over: from now on records are opened and sealed here.
    fn come_up(&mut self) -> Result<(), Gone> {
        let (tls, peer) = match std::mem::replace(&mut self.tls, Tls::Broken) {
            Tls::Dialler(tls) => {
                let peer = proved(tls.peer_certificates(), tls.alpn_protocol());
                (Records::of_dialler(*tls), peer)
            }
            Tls::Acceptor(tls) => {
                let peer = proved(tls.peer_certificates(), tls.alpn_protocol());
                (Records::of_acceptor(*tls), peer)
            }
            Tls::Up(_) | Tls::Broken => return Ok(()),
        };
        self.tls = Tls::Up(Box::new(tls.map_err(|e| Gone::Insecure(e.to_string()))?));
        self.peer = peer;
        Ok(())
    }

    /// The handshake failed: tries to let the other side know why, and says what it means here.
    fn broken(&mut self, error: &rustls::Error) -> Gone {
        // One step, and over the same bytes, among which TLS remembers positions: it gives the alert
        // that was made, if one was. A further step could fail anew, and alert twice.
        if self.step().is_ok() {
            let _ = self.write(usize::MAX);
        }
        self.tls = Tls::Broken;
        match error {
            error if tls::is_wrong_key(error) => Gone::OtherMachine,
            error => Gone::Insecure(error.to_string()),
        }
    }
}

/// The key shown, where the two speak the same protocol.
fn proved(shown: Option<&[CertificateDer<'_>]>, protocol: Option<&[u8]>) -> Option<[u8; 32]> {
    (protocol == Some(tls::PEERS)).then(|| tls::key_of(shown)).flatten()
}

/// What comes after a step of the handshake.
enum Next {
    /// There may be more to do.
    Again,
    /// Nothing until more comes in.
    Idle,
    /// Data may be sent; the handshake may be over.
    Up,
}

/// Does what one state of the handshake asks for: how many bytes at the front of the incoming buffer
/// are done with, and what comes next. Data that came with its end is added to `early`.
fn advance<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Window,
    early: &mut Vec<u8>,
) -> (usize, Result<Next, rustls::Error>) {
    let mut discard = status.discard;
    let act = || match status.state? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                early.extend_from_slice(record.payload);
            }
            Ok(Next::Again)
        }
        ConnectionState::EncodeTlsData(mut flight) => {
            outgoing.end += flight.encode(outgoing.free()).map_err(defect)?;
            Ok(Next::Again)
        }
        ConnectionState::TransmitTlsData(flight) => {
            flight.done(); // it lies in the outgoing buffer, before all that follows
            Ok(Next::Again)
        }
        ConnectionState::WriteTraffic(_) => Ok(Next::Up),
        ConnectionState::BlockedHandshake => Ok(Next::Idle),
        ConnectionState::PeerClosed | ConnectionState::Closed => {
            Err(defect("it gave up in the middle of the handshake"))
        }
        _ => Err(defect("early data, which is not offered")),
    };
    let next = act();
    (discard, next)
}

fn defect(what: impl std::fmt::Display) -> rustls::Error {
    rustls::Error::General(what.to_string())
}

/// Bytes within a buffer: filled at the end, taken from the start.
struct Window {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Window {
    fn new(size: usize) -> Self {
        Self { bytes: vec![0; size].into(), start: 0, end: 0 }
    }

    fn grow(&mut self, size: usize) {
        let mut larger = Self::new(size.max(self.bytes.len()));
        let filled = self.filled();
        larger.bytes[..filled.len()].copy_from_slice(filled);
        larger.end = filled.len();
        *self = larger;
    }

    const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn free(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// Begins at the front again, where nothing is left.
    fn compact(&mut self) {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::net::TcpListener;

    use potluck_core::trust::MachineKey;
    use rustls::crypto::{CipherSuiteCommon, CryptoProvider};
    use rustls::{SupportedCipherSuite, Tls13CipherSuite};

    /// Keys that are worn out after 40 records instead of 2²⁴.
    fn short_lived(mut provider: CryptoProvider) -> CryptoProvider {
        let SupportedCipherSuite::Tls13(suite) = provider.cipher_suites[0];
        provider.cipher_suites =
            vec![SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
                common: CipherSuiteCommon {
                    suite: suite.common.suite,
                    hash_provider: suite.common.hash_provider,
                    confidentiality_limit: 40,
                },
                hkdf_provider: suite.hkdf_provider,
                aead_alg: suite.aead_alg,
                quic: None,
            })))];
        provider
    }

    fn pair() -> (Secure, Secure) {
        let (a, b) = (MachineKey::from_seed([2; 32]), MachineKey::from_seed([3; 32]));
        let expect = tls::Expect::Key(b.public());
        let client =
            tls::client_with(short_lived(tls::provider()), &a, expect, tls::PEERS).unwrap();
        let server = tls::server_with(short_lived(tls::provider()), &b, tls::PEERS).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        dialled.set_nonblocking(true).unwrap();
        accepted.set_nonblocking(true).unwrap();
        (
            Secure::dialled(Arc::new(dialled), client).unwrap(),
            Secure::accepted(Arc::new(accepted), Arc::new(server)).unwrap(),
        )
    }

    /// One turn of both ends: each reads, opens and writes what there is.
    fn turn(ends: &mut [(&mut Secure, &mut Vec<u8>)]) {
        for (end, got) in ends {
            end.read(usize::MAX, None).unwrap();
            end.open().unwrap();
            end.opened().copy_to(got, usize::MAX);
            end.write(usize::MAX).unwrap();
        }
    }

    /// The two ends of a connection that is up.
    pub(in crate::transfer) fn up() -> (Secure, Secure) {
        let (mut a, mut b) = pair();
        while a.is_handshaking() || b.is_handshaking() {
            turn(&mut [(&mut a, &mut vec![]), (&mut b, &mut vec![])]);
        }
        assert_eq!(b.peer_key(), Some(MachineKey::from_seed([2; 32]).public()));
        (a, b)
    }

    #[test]
    fn both_directions_flow_at_once_and_keys_are_renewed_under_way() {
        let (mut a, mut b) = up();
        let (mut at_a, mut at_b) = (vec![], vec![]);
        a.grow();
        b.grow();
        let there: Vec<u8> = (0..8 << 20).map(|i| (i / 251) as u8).collect();
        let back: Vec<u8> = there.iter().rev().copied().collect();
        let (mut sent_a, mut sent_b) = (0, 0);
        while at_b.len() < there.len() || at_a.len() < back.len() {
            sent_a += a.seal(&there[sent_a..]).unwrap();
            sent_b += b.seal(&back[sent_b..]).unwrap();
            turn(&mut [(&mut a, &mut at_a), (&mut b, &mut at_b)]);
        }
        assert!(at_b == there && at_a == back);
        assert_eq!(a.sealed(), a.written());
    }

    #[test]
    fn bytes_put_in_their_places_arrive_whatever_their_number_and_nothing_of_them_if_that_fails() {
        let (mut a, mut b) = up();
        let (mut at_a, mut at_b, mut sent) = (vec![], vec![], vec![]);
        for len in [1, 77, MOST - 4, MOST - 3, MOST, MOST + 1, 3 * MOST, 1 << 20, (1 << 20) + 5] {
            let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8).collect();
            let failed = a.seal_with(b"head", len, |_| Err("no")).unwrap();
            assert_eq!(failed, Err("no"));
            let fill = |parts: &mut [IoSliceMut<'_>]| {
                let mut rest = &bytes[..];
                for part in parts {
                    let (now, later) = rest.split_at(part.len());
                    part.copy_from_slice(now);
                    rest = later;
                }
                assert!(rest.is_empty());
                Ok::<_, ()>(())
            };
            assert_eq!(a.seal_with(b"head", len, fill).unwrap(), Ok(true));
            sent.extend_from_slice(b"head");
            sent.extend(bytes);
            while at_b.len() < sent.len() {
                turn(&mut [(&mut a, &mut at_a), (&mut b, &mut at_b)]);
            }
            assert!(at_b == sent, "{len} bytes");
            assert_eq!(a.sealed(), a.written());
        }
    }
}
