//! Owns TLS 1.3's record protection once rustls has shaken hands (RFC 8446, sections 5.2 to 5.5):
//! records are sealed and opened where they lie. Never negotiates and derives no key: the keys, and
//! those that follow when they are worn out, come from rustls.
//!
//! rustls itself copies every byte of a record twice when sealing and once when opening, which was a
//! fifth of all the work of a transfer (DESIGN.md).

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets, SupportedCipherSuite};

use super::Gone;

/// The most bytes one record carries.
pub(super) const MOST: usize = 16 << 10;
/// The head: type (1), version (2), length of what follows (2).
pub(super) const HEAD: usize = 5;
/// What a record adds to what it carries: the head, the true type, the tag.
pub(super) const EXTRA: usize = HEAD + 1 + TAG;
const TAG: usize = 16;
/// The most that may follow a head: padding is allowed for.
const MOST_FOLLOWS: usize = MOST + 256;

/// Types of records.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
/// The alert that says that nothing more comes.
const CLOSE_NOTIFY: u8 = 0;
/// The handshake message that says that the sender's key changes; one byte follows: whether it wants
/// ours changed as well.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];
/// Bytes of that message with all that a record adds.
pub(super) const RENEWAL: usize = EXTRA + KEY_UPDATE.len() + 1;
/// Records that are sealed after one look at whether the key is worn out.
const BATCH: u64 = 512;
/// Changes of key that the other side may make one after the other without saying anything.
const MAX_RENEWALS: u32 = 32;

/// Both directions of a connection.
pub(super) struct Records {
    keys: Keys,
    ours: Cipher,
    theirs: Cipher,
    /// Records that may be sealed with one key.
    limit: u64,
    /// The other side wants our key changed.
    asked: bool,
    /// Its changes of key since it last said anything.
    renewals: u32,
}

/// Where further keys come from.
enum Keys {
    Dialler(KernelConnection<ClientConnectionData>),
    Acceptor(KernelConnection<ServerConnectionData>),
}

/// What a record was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// So many bytes, behind the head.
    Data(usize),
    /// Something between the two TLS ends only.
    Nothing,
    /// Nothing more comes.
    End,
}

impl Records {
    /// Goes on where the dialler's handshake has ended.
    pub(super) fn of_dialler(tls: UnbufferedClientConnection) -> Result<Self, Error> {
        let (secrets, keys) = tls.dangerous_into_kernel_connection()?;
        let suite = keys.negotiated_cipher_suite();
        Self::new(secrets, Keys::Dialler(keys), suite)
    }

    /// Goes on where the acceptor's handshake has ended.
    pub(super) fn of_acceptor(tls: UnbufferedServerConnection) -> Result<Self, Error> {
        let (secrets, keys) = tls.dangerous_into_kernel_connection()?;
        let suite = keys.negotiated_cipher_suite();
        Self::new(secrets, Keys::Acceptor(keys), suite)
    }

    fn new(
        secrets: ExtractedSecrets,
        keys: Keys,
        suite: SupportedCipherSuite,
    ) -> Result<Self, Error> {
        let SupportedCipherSuite::Tls13(suite) = suite;
        Ok(Self {
            keys,
            ours: Cipher::new(secrets.tx)?,
            theirs: Cipher::new(secrets.rx)?,
            limit: suite.common.confidentiality_limit,
            asked: false,
            renewals: 0,
        })
    }

    /// Seals a whole record in place: what it carries lies behind the head, and [`EXTRA`] bytes more
    /// than that belong to it.
    pub(super) fn seal(&mut self, record: &mut [u8]) -> Result<(), Gone> {
        self.seal_as(DATA, record)
    }

    fn seal_as(&mut self, kind: u8, record: &mut [u8]) -> Result<(), Gone> {
        let follows = record.len() - HEAD;
        let (head, rest) = record.split_at_mut(HEAD);
        head.copy_from_slice(&head_of(follows));
        let (inner, tag) = rest.split_at_mut(follows - TAG);
        inner[follows - TAG - 1] = kind;
        let nonce = self.ours.nonce();
        let made = self.ours.key.seal_in_place_separate_tag(nonce, Aad::from(&*head), inner);
        tag.copy_from_slice(made.map_err(|_| broken("a record cannot be sealed"))?.as_ref());
        Ok(())
    }

    /// To be asked before sealing (some [`BATCH`] records, then again): where our key is worn out or
    /// the other side wants another, the record that says so, and a new key from then on.
    pub(super) fn renew(&mut self) -> Result<Option<[u8; RENEWAL]>, Gone> {
        if self.ours.sequence.saturating_add(BATCH) < self.limit && !self.asked {
            return Ok(None);
        }
        self.asked = false;
        let mut record = [0; RENEWAL];
        record[HEAD..HEAD + KEY_UPDATE.len()].copy_from_slice(&KEY_UPDATE);
        self.seal_as(HANDSHAKE, &mut record)?;
        let next = match &mut self.keys {
            Keys::Dialler(keys) => keys.update_tx_secret(),
            Keys::Acceptor(keys) => keys.update_tx_secret(),
        };
        self.ours = next.and_then(Cipher::new).map_err(|e| Gone::Lost(e.to_string()))?;
        Ok(Some(record))
    }

    /// Opens a whole record in place.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<Opened, Gone> {
        let (head, rest) = record.split_at_mut(HEAD);
        if head[0] != DATA {
            return Err(broken("a record is not sealed"));
        }
        let nonce = self.theirs.nonce();
        let opened = self.theirs.key.open_in_place(nonce, Aad::from(&*head), rest);
        let inner = opened.map_err(|_| broken("a record was not sealed by the other side"))?;
        let Some(end) = inner.iter().rposition(|byte| *byte != 0) else {
            return Err(broken("a record has no type"));
        };
        if end > MOST {
            return Err(broken("a record is too long"));
        }
        match (inner[end], &inner[..end]) {
            (DATA, data) => {
                self.renewals = 0;
                Ok(Opened::Data(data.len()))
            }
            (ALERT, [_, CLOSE_NOTIFY]) => Ok(Opened::End),
            (ALERT, [_, alert]) => Err(Gone::Lost(format!("its TLS gave up: alert {alert}"))),
            (HANDSHAKE, [message @ .., wants @ (0 | 1)]) if *message == KEY_UPDATE => {
                let wants = *wants == 1;
                self.follow(wants)?;
                Ok(Opened::Nothing)
            }
            _ => Err(broken("a record of no use")),
        }
    }

    /// The other side's key changes.
    fn follow(&mut self, wants_ours: bool) -> Result<(), Gone> {
        self.asked |= wants_ours;
        self.renewals += 1;
        if self.renewals > MAX_RENEWALS {
            return Err(broken("it changes its key for nothing"));
        }
        let next = match &mut self.keys {
            Keys::Dialler(keys) => keys.update_rx_secret(),
            Keys::Acceptor(keys) => keys.update_rx_secret(),
        };
        self.theirs = next.and_then(Cipher::new).map_err(|e| Gone::Lost(e.to_string()))?;
        Ok(())
    }
}

/// How long the record at the front of `bytes` is, once as much of it is here as tells that.
pub(super) fn record_len(bytes: &[u8]) -> Result<Option<usize>, Gone> {
    let [_, _, _, high, low, ..] = bytes else { return Ok(None) };
    match usize::from(u16::from_be_bytes([*high, *low])) {
        follows @ TAG..=MOST_FOLLOWS => Ok(Some(HEAD + follows)),
        _ => Err(broken("a record is too long or too short")),
    }
}

/// A key, and the number of the next record under it.
struct Cipher {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Cipher {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        use ConnectionTrafficSecrets as Of;
        let (algorithm, key, iv) = match &secrets {
            Of::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            Of::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            Of::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("an unknown cipher".to_owned())),
        };
        let key = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| Error::General("the key does not fit its cipher".to_owned()))?;
        let iv = iv.as_ref().try_into().map_err(|_| Error::General("an odd IV".to_owned()))?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// The nonce of the next record (RFC 8446, section 5.3): each is given once.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, part) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= part;
        }
        // A key is changed long before: no machine seals 2⁶⁴ records.
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Of a record that is followed by so much after its head. The version is a relic: "TLS 1.2".
fn head_of(follows: usize) -> [u8; HEAD] {
    let [high, low] = (follows as u16).to_be_bytes();
    [DATA, 3, 3, high, low]
}

fn broken(what: &'static str) -> Gone {
    Gone::Lost(what.to_owned())
}
