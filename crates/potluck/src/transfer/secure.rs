//! Owns the TLS records of one connection and the buffers between them and a non-blocking socket:
//! few large reads and writes, records opened where they lie. Never knows what the bytes mean, and
//! never waits.

use std::io::{ErrorKind as Io, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{ClientConfig, ServerConfig};

use super::Gone;
use crate::tls;

/// The most bytes one TLS record carries.
const RECORD: usize = 16 << 10;
/// What a record adds: 5 bytes of head, 1 of type, 16 of tag.
const RECORD_EXTRA: usize = 22;
/// Room kept for what TLS itself has to say (handshake flights, key updates, alerts).
const RESERVE: usize = 4 << 10;
/// Both buffers before the other side has shown who it is: a record, and some.
const BUFFER_AT_FIRST: usize = RECORD + 2 * RESERVE;
/// The incoming buffer of an established connection. Larger ones measure no better.
const INCOMING: usize = 256 << 10;
/// The outgoing buffer: a piece of 256 KiB with its head, in full records.
const OUTGOING: usize = 17 * (RECORD + RECORD_EXTRA) + RESERVE;

/// One TLS connection over one socket.
pub(super) struct Secure {
    socket: Arc<TcpStream>,
    tls: Side,
    incoming: Window,
    outgoing: Window,
    /// Bytes of ciphertext ever put into `outgoing`.
    sealed: u64,
    /// Bytes of ciphertext ever handed to the kernel.
    written: u64,
    /// The other side has said that nothing more comes.
    closed: bool,
}

enum Side {
    Dialler(Box<UnbufferedClientConnection>),
    Acceptor(Box<UnbufferedServerConnection>),
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
        Ok(Self::new(socket, Side::Dialler(Box::new(tls))))
    }

    /// The acceptor's end of `socket` (non-blocking).
    pub(super) fn accepted(
        socket: Arc<TcpStream>,
        config: Arc<ServerConfig>,
    ) -> Result<Self, rustls::Error> {
        let tls = UnbufferedServerConnection::new(config)?;
        Ok(Self::new(socket, Side::Acceptor(Box::new(tls))))
    }

    fn new(socket: Arc<TcpStream>, tls: Side) -> Self {
        Self {
            socket,
            tls,
            incoming: Window::new(BUFFER_AT_FIRST),
            outgoing: Window::new(BUFFER_AT_FIRST),
            sealed: 0,
            written: 0,
            closed: false,
        }
    }

    /// Gives the connection the buffers of an established one.
    pub(super) fn grow(&mut self) {
        self.incoming.grow(INCOMING);
        self.outgoing.grow(OUTGOING);
    }

    /// The socket, to wait on.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// The handshake is not over.
    pub(super) fn is_handshaking(&self) -> bool {
        match &self.tls {
            Side::Dialler(tls) => tls.is_handshaking(),
            Side::Acceptor(tls) => tls.is_handshaking(),
        }
    }

    /// The key the other side has proved to hold, once the handshake is over.
    pub(super) fn peer_key(&self) -> Option<[u8; 32]> {
        let (shown, alpn): (Option<&[CertificateDer<'_>]>, _) = match &self.tls {
            Side::Dialler(tls) => (tls.peer_certificates(), tls.alpn_protocol()),
            Side::Acceptor(tls) => (tls.peer_certificates(), tls.alpn_protocol()),
        };
        (alpn == Some(tls::PEERS)).then(|| tls::key_of(shown)).flatten()
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

    /// Reads once what the socket holds, as much as there is room for, and `most` bytes at the most.
    pub(super) fn read(&mut self, most: usize) -> Result<Arrived, Gone> {
        if self.closed {
            return Ok(Arrived::End);
        }
        self.incoming.compact();
        loop {
            let free = self.incoming.free();
            let room = free.len().min(most);
            match (&*self.socket).read(&mut free[..room]) {
                Ok(0) => return Ok(Arrived::End),
                Ok(n) => {
                    self.incoming.end += n;
                    return Ok(Arrived::Some(n));
                }
                Err(e) if e.kind() == Io::WouldBlock => return Ok(Arrived::Nothing),
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(Gone::Lost(e.to_string())),
            }
        }
    }

    /// Hands what was read, opened, to `take`, record by record. What TLS has to answer lies in the
    /// outgoing buffer afterwards. An incomplete record stays for the next time.
    pub(super) fn open(
        &mut self,
        mut take: impl FnMut(&[u8]) -> Result<(), Gone>,
    ) -> Result<(), Gone> {
        loop {
            if self.outgoing.free().len() < RESERVE / 2 {
                return Err(Gone::Protocol("it makes TLS talk without listening"));
            }
            match self.step(Job::Open(&mut take)) {
                Ok(Next::Again) => {}
                Ok(Next::Idle) => return Ok(()),
                Err(Failure::Taker(gone)) => return Err(gone),
                Err(Failure::Tls(error)) => return Err(self.broken(&error)),
            }
        }
    }

    /// Seals as much of `plain` as there is room for; how much it was. All that was read must have
    /// been opened.
    pub(super) fn seal(&mut self, plain: &[u8]) -> Result<usize, Gone> {
        let n = sealable(self.outgoing.free().len().saturating_sub(RESERVE), plain.len());
        let mut rest = &plain[..n];
        while !rest.is_empty() {
            match self.step(Job::Seal(&mut rest)) {
                Ok(Next::Again) => {}
                Ok(Next::Idle) => return Err(Gone::Lost("TLS takes nothing more".to_owned())),
                Err(Failure::Taker(gone)) => return Err(gone),
                Err(Failure::Tls(error)) => return Err(self.broken(&error)),
            }
        }
        Ok(n)
    }

    /// Writes what is sealed until the kernel takes no more; true if it took anything.
    pub(super) fn write(&mut self) -> Result<bool, Gone> {
        let before = self.written;
        while !self.outgoing.is_empty() {
            match (&*self.socket).write(self.outgoing.filled()) {
                Ok(n) => {
                    self.outgoing.start += n;
                    self.written += n as u64;
                }
                Err(e) if e.kind() == Io::WouldBlock => break,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(Gone::Lost(e.to_string())),
            }
        }
        if self.outgoing.is_empty() {
            self.outgoing.compact();
        }
        Ok(self.written > before)
    }

    fn step(&mut self, mut job: Job<'_, '_>) -> Result<Next, Failure> {
        let (incoming, outgoing) = (self.incoming.filled(), &mut self.outgoing);
        let before = outgoing.end;
        let (discard, next) = match &mut self.tls {
            Side::Dialler(tls) => advance(tls.process_tls_records(incoming), outgoing, &mut job),
            Side::Acceptor(tls) => advance(tls.process_tls_records(incoming), outgoing, &mut job),
        };
        self.sealed += (outgoing.end - before) as u64;
        self.incoming.start += discard;
        match next? {
            Ok(next) => Ok(next),
            Err(Closed) => {
                self.closed = true;
                Ok(Next::Again)
            }
        }
    }

    /// TLS failed: tries to let the other side know why, and says what it means here.
    fn broken(&mut self, error: &rustls::Error) -> Gone {
        let handshaking = self.is_handshaking();
        // One step, and over the same bytes, among which TLS remembers positions: it gives the alert
        // that was made, if one was. A further step could fail anew, and alert twice.
        let mut nothing = |_: &[u8]| Ok(());
        if self.step(Job::Open(&mut nothing)).is_ok() {
            let _ = self.write();
        }
        match error {
            error if tls::is_wrong_key(error) => Gone::OtherMachine,
            error if handshaking => Gone::Insecure(error.to_string()),
            error => Gone::Lost(error.to_string()),
        }
    }
}

/// What a step of TLS is taken for.
enum Job<'a, 'b> {
    /// To open what came in.
    Open(&'a mut dyn FnMut(&[u8]) -> Result<(), Gone>),
    /// To seal this; emptied when done.
    Seal(&'a mut &'b [u8]),
}

enum Next {
    /// There may be more to do.
    Again,
    /// Nothing until more comes in.
    Idle,
}

/// The other side will send nothing more.
struct Closed;

enum Failure {
    Tls(rustls::Error),
    Taker(Gone),
}

/// Does what one state of the connection asks for: how many bytes at the front of the incoming
/// buffer are done with, and what comes next.
fn advance<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Window,
    job: &mut Job<'_, '_>,
) -> (usize, Result<Result<Next, Closed>, Failure>) {
    let mut discard = status.discard;
    let act = || match status.state.map_err(Failure::Tls)? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record.map_err(Failure::Tls)?;
                discard += record.discard;
                match job {
                    Job::Open(take) => take(record.payload).map_err(Failure::Taker)?,
                    // All that came in was opened before anything is sealed.
                    Job::Seal(_) => return Err(Failure::Tls(defect("unread records"))),
                }
            }
            Ok(Ok(Next::Again))
        }
        ConnectionState::EncodeTlsData(mut flight) => {
            let n = flight.encode(outgoing.free()).map_err(|e| Failure::Tls(defect(e)))?;
            outgoing.end += n;
            Ok(Ok(Next::Again))
        }
        ConnectionState::TransmitTlsData(flight) => {
            flight.done(); // it lies in the outgoing buffer, before all that follows
            Ok(Ok(Next::Again))
        }
        ConnectionState::WriteTraffic(mut traffic) => match job {
            Job::Open(_) => Ok(Ok(Next::Idle)),
            Job::Seal(plain) => {
                let n = traffic.encrypt(plain, outgoing.free());
                outgoing.end += n.map_err(|e| Failure::Tls(defect(e)))?;
                **plain = &[];
                Ok(Ok(Next::Again))
            }
        },
        ConnectionState::BlockedHandshake => Ok(Ok(Next::Idle)),
        ConnectionState::PeerClosed => Ok(Err(Closed)),
        ConnectionState::Closed => Ok(Ok(Next::Idle)),
        _ => Err(Failure::Tls(defect("early data, which is not offered"))),
    };
    let next = act();
    (discard, next)
}

fn defect(what: impl std::fmt::Display) -> rustls::Error {
    rustls::Error::General(what.to_string())
}

/// How many of `len` bytes are sealed into `room`: all, or full records only.
fn sealable(room: usize, len: usize) -> usize {
    let records = len.div_ceil(RECORD);
    if len + records * RECORD_EXTRA <= room { len } else { room / (RECORD + RECORD_EXTRA) * RECORD }
}

/// Bytes within a buffer of fixed size: filled at the end, taken from the start.
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

    fn filled(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    fn free(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// Moves what is left to the front.
    fn compact(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
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
            end.read(usize::MAX).unwrap();
            end.open(|bytes| {
                got.extend_from_slice(bytes);
                Ok(())
            })
            .unwrap();
            end.write().unwrap();
        }
    }

    #[test]
    fn both_directions_flow_at_once_and_keys_are_renewed_under_way() {
        let (mut a, mut b) = pair();
        let (mut at_a, mut at_b) = (vec![], vec![]);
        while a.is_handshaking() || b.is_handshaking() {
            turn(&mut [(&mut a, &mut at_a), (&mut b, &mut at_b)]);
        }
        assert_eq!(b.peer_key(), Some(MachineKey::from_seed([2; 32]).public()));
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
    fn what_is_sealed_always_fits() {
        for room in 0..3 * RECORD + 100 {
            for len in [1, 100, RECORD - 1, RECORD, RECORD + 1, 2 * RECORD, 5 * RECORD] {
                let n = sealable(room, len);
                assert!(n <= len && n + n.div_ceil(RECORD) * RECORD_EXTRA <= room.max(n));
                assert!(n == len || n.is_multiple_of(RECORD));
            }
        }
    }
}
