//! Owns who may speak for whom: machine keys, invitations, member certificates, signed names, the
//! revocation list. Never keeps a register of members (the registrar does) and never reads a clock.
//!
//! All signatures are Ed25519 (RFC 8032) over a domain-separating text followed by the drawn bytes.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use data_encoding::BASE32_NOPAD;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::id::{ContentId, MemberNumber, Name, NetworkId, ParseError, PeerId, Version};
use crate::time::{Duration, WallTime};
use crate::wire::bytes::{Malformed, Reader, Writer};

/// How long a member certificate holds.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How far clocks of honest machines may differ.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// The longest label of a machine, in bytes.
pub const MAX_LABEL: usize = 63;
/// Machines in one revocation list; where it is long, those leave it whose last certificate has expired.
pub const MAX_REVOKED: usize = 20_000;

/// A machine's (or an index's) Ed25519 key pair.
pub struct MachineKey {
    seed: Seed,
    pair: Ed25519KeyPair,
}

#[derive(Zeroize, ZeroizeOnDrop)]
struct Seed([u8; 32]);

impl MachineKey {
    /// The key made from 32 secret random bytes (the RFC 8032 seed).
    pub fn from_seed(seed: [u8; 32]) -> Self {
        #[expect(clippy::expect_used, reason = "every 32 bytes are an Ed25519 seed")]
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("32 bytes are a seed");
        Self { seed: Seed(seed), pair }
    }

    /// The secret, to be kept in a file only its owner reads.
    pub fn seed(&self) -> &[u8; 32] {
        &self.seed.0
    }

    /// The public half.
    pub fn public(&self) -> [u8; 32] {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        key
    }

    /// The public half as a machine's id.
    pub fn peer(&self) -> PeerId {
        PeerId(self.public())
    }

    /// The public half as a network's id.
    pub fn network(&self) -> NetworkId {
        NetworkId(self.public())
    }

    /// Signs `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.pair.sign(message).as_ref());
        signature
    }
}

impl fmt::Debug for MachineKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MachineKey({:?})", self.peer())
    }
}

/// Whether `signature` is `key`'s over `message`.
pub fn verify(key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()
}

/// What a member may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Fetch, and host what it fetched.
    Read = 1,
    /// Also publish contents and names.
    Publish = 2,
    /// Also invite and remove members, and hand names over.
    Admin = 3,
}

impl Role {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Result<Self, Malformed> {
        match byte {
            1 => Ok(Self::Read),
            2 => Ok(Self::Publish),
            3 => Ok(Self::Admin),
            _ => Err(Malformed("no such role")),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Read => "read",
            Self::Publish => "publish",
            Self::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "read" => Ok(Self::Read),
            "publish" => Ok(Self::Publish),
            "admin" => Ok(Self::Admin),
            _ => Err(ParseError("a role is read, publish or admin")),
        }
    }
}

/// The secret that lets a machine into a network, with all it needs to find it.
///
/// Text form: `potluck1` + base 32 of {16 bytes of the BLAKE3 of the network key, 16 bytes of secret,
/// 3 bytes of expiry (hours since 1970), 1 byte of checksum} + `@` + `host:port` (several divided
/// by commas).
#[derive(Clone, PartialEq, Eq)]
pub struct Invitation {
    /// The first half of the BLAKE3 of the network's key: pins the index.
    pub network_hash: [u8; 16],
    /// What only invited machines know.
    pub secret: [u8; 16],
    /// The hour after which it no longer works (rounded up; the index holds the exact second).
    pub expires: WallTime,
    /// Where the index is.
    pub index: Vec<String>,
}

impl Invitation {
    const PREFIX: &'static str = "potluck1";
    /// The longest text read: 58 characters of secret and room for several addresses.
    const MAX_TEXT: usize = 512;

    /// An invitation to the network with key `network`, whose index answers at `index`.
    pub fn new(
        network: NetworkId,
        secret: [u8; 16],
        expires: WallTime,
        index: Vec<String>,
    ) -> Self {
        let hours = expires.0.div_ceil(3600).min(0xff_ffff);
        Self { network_hash: network_hash(network), secret, expires: WallTime(hours * 3600), index }
    }

    /// How the index knows it: the first 8 bytes of the BLAKE3 of the secret.
    pub fn id(&self) -> [u8; 8] {
        invitation_id(&self.secret)
    }

    /// Whether `network` is the one invited to.
    pub fn is_for(&self, network: NetworkId) -> bool {
        network_hash(network) == self.network_hash
    }
}

/// How an index knows an invitation: the first 8 bytes of the BLAKE3 of its secret.
pub fn invitation_id(secret: &[u8; 16]) -> [u8; 8] {
    first(blake3::hash(secret).as_bytes())
}

fn network_hash(network: NetworkId) -> [u8; 16] {
    first(blake3::hash(&network.0).as_bytes())
}

fn first<const N: usize>(bytes: &[u8; 32]) -> [u8; N] {
    std::array::from_fn(|i| bytes[i])
}

impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(36);
        bytes.put(&self.network_hash);
        bytes.put(&self.secret);
        bytes.put(&u32::try_from(self.expires.0 / 3600).unwrap_or(u32::MAX).to_be_bytes()[1..]);
        bytes.u8(blake3::hash(&bytes).as_bytes()[0]);
        let text = BASE32_NOPAD.encode(&bytes).to_ascii_lowercase();
        write!(f, "{}{text}@{}", Self::PREFIX, self.index.join(","))
    }
}

impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Invitation({:?} at {:?})", self.id(), self.index)
    }
}

impl FromStr for Invitation {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        const SHAPE: ParseError =
            ParseError("an invitation looks like potluck1…@host:port; copy the whole of it");
        const DAMAGED: ParseError =
            ParseError("the invitation is damaged (its checksum does not fit): copy it once more");
        if text.len() > Self::MAX_TEXT {
            return Err(SHAPE);
        }
        let (code, addresses) =
            text.trim().strip_prefix(Self::PREFIX).and_then(|t| t.split_once('@')).ok_or(SHAPE)?;
        let bytes =
            BASE32_NOPAD.decode(code.to_ascii_uppercase().as_bytes()).map_err(|_| DAMAGED)?;
        let (&check, body) = bytes.split_last().ok_or(DAMAGED)?;
        if blake3::hash(body).as_bytes()[0] != check {
            return Err(DAMAGED);
        }
        let mut r = Reader::new(body);
        let fields = (|| {
            let (network_hash, secret) = (r.array()?, r.array()?);
            let [a, b, c] = r.array()?;
            r.end()?;
            let hours = u64::from(u32::from_be_bytes([0, a, b, c]));
            Ok::<_, Malformed>((network_hash, secret, WallTime(hours * 3600)))
        })();
        let (network_hash, secret, expires) = fields.map_err(|_| DAMAGED)?;
        let index: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        let has_port = |a: &String| {
            a.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok() && !a.contains(char::is_whitespace)
            })
        };
        if !index.iter().all(has_port) {
            return Err(SHAPE);
        }
        Ok(Self { network_hash, secret, expires, index })
    }
}

/// What a joining machine shows: keyed BLAKE3 of (TLS exporter | member key) under a key derived
/// from the invitation's secret. Bound to the connection, so it is worth nothing to a relay.
pub fn join_tag(secret: &[u8; 16], exporter: &[u8; 32], member: PeerId) -> [u8; 32] {
    let mut key = blake3::derive_key("potluck 2026 invitation secret to join key v1", secret);
    let mut hasher = blake3::Hasher::new_keyed(&key);
    key.zeroize();
    hasher.update(exporter);
    hasher.update(&member.0);
    *hasher.finalize().as_bytes()
}

/// Compares in constant time.
pub fn same_tag(a: &[u8], b: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a, b).is_ok()
}

/// Why a certificate, record or list is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    /// It is of another network.
    #[error("it belongs to another network")]
    OtherNetwork,
    /// The signature is not its signer's.
    #[error("its signature does not hold")]
    BadSignature,
    /// Its time is over.
    #[error("it expired (or this machine's clock is wrong)")]
    Expired,
    /// Its time has not begun.
    #[error("it is not valid yet (or this machine's clock is wrong)")]
    NotYet,
    /// It was revoked.
    #[error("the machine was removed from the network")]
    Revoked,
    /// It speaks of another key than the one that shows it.
    #[error("it belongs to another machine")]
    OtherKey,
}

/// What makes a machine a member: the index's word about its key, for a day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Of which network.
    pub network: NetworkId,
    /// The member's key.
    pub peer: PeerId,
    /// Its number.
    pub member: MemberNumber,
    /// What it may do.
    pub role: Role,
    /// Valid from.
    pub not_before: WallTime,
    /// Valid until.
    pub not_after: WallTime,
    /// What the machine is called, at most [`MAX_LABEL`] bytes.
    pub label: String,
    /// The index's signature over all of the above.
    pub signature: [u8; 64],
}

impl Certificate {
    const DOMAIN: &'static [u8] = b"potluck member certificate v1\0";
    /// The longest encoded certificate.
    pub const MAX_BYTES: usize = 32 + 32 + 4 + 1 + 8 + 8 + 1 + MAX_LABEL + 64;

    /// Issues a certificate: `issuer` is the index's key.
    pub fn issue(
        issuer: &MachineKey,
        peer: PeerId,
        member: MemberNumber,
        role: Role,
        label: &str,
        now: WallTime,
    ) -> Self {
        let mut certificate = Self {
            network: issuer.network(),
            peer,
            member,
            role,
            not_before: now.minus(CLOCK_SKEW),
            not_after: now.plus(CERTIFICATE_LIFE),
            label: clean_label(label),
            signature: [0; 64],
        };
        certificate.signature = issuer.sign(&certificate.signed_bytes());
        certificate
    }

    fn signed_bytes(&self) -> Vec<u8> {
        let mut out = Self::DOMAIN.to_vec();
        self.body(&mut out);
        out
    }

    fn body(&self, out: &mut Vec<u8>) {
        out.put(&self.network.0);
        out.put(&self.peer.0);
        out.u32(self.member.0);
        out.u8(self.role as u8);
        out.u64(self.not_before.0);
        out.u64(self.not_after.0);
        out.text8(&self.label);
    }

    /// Its bytes: the body, then the signature.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::MAX_BYTES);
        self.body(&mut out);
        out.put(&self.signature);
        out
    }

    /// Reads a certificate; says nothing of whether it is to be believed.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let certificate = Self::read(&mut r)?;
        r.end()?;
        Ok(certificate)
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let certificate = Self {
            network: NetworkId(r.array()?),
            peer: PeerId(r.array()?),
            member: MemberNumber(r.u32()?),
            role: Role::from_byte(r.u8()?)?,
            not_before: WallTime(r.u64()?),
            not_after: WallTime(r.u64()?),
            label: r.text8()?.to_owned(),
            signature: r.array()?,
        };
        if certificate.label.len() > MAX_LABEL {
            return Err(Malformed("a label is at most 63 bytes"));
        }
        Ok(certificate)
    }

    /// Whether this makes the holder of `peer` a member of `network` now. Revocation is the caller's
    /// to check.
    pub fn check(&self, network: NetworkId, peer: PeerId, now: WallTime) -> Result<(), Distrust> {
        if self.network != network {
            return Err(Distrust::OtherNetwork);
        }
        if self.peer != peer {
            return Err(Distrust::OtherKey);
        }
        self.is_timely(now)?;
        if !verify(&network.0, &self.signed_bytes(), &self.signature) {
            return Err(Distrust::BadSignature);
        }
        Ok(())
    }

    /// Whether its time has begun and is not over, by a clock that may be a little wrong.
    pub fn is_timely(&self, now: WallTime) -> Result<(), Distrust> {
        if now.plus(CLOCK_SKEW) < self.not_before {
            return Err(Distrust::NotYet);
        }
        if now > self.not_after.plus(CLOCK_SKEW) {
            return Err(Distrust::Expired);
        }
        Ok(())
    }
}

/// A label as it may be shown: no deceptive characters, no blanks around it, at most [`MAX_LABEL`]
/// bytes. What is clean already stays as it is.
pub fn clean_label(label: &str) -> String {
    let clean: String = label.chars().filter(|c| !crate::id::is_deceptive(*c)).collect();
    let clean = clean.trim();
    clean[..clean.floor_char_boundary(MAX_LABEL)].trim_end().to_owned()
}

/// A publisher's word that a version of a name is a content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRecord {
    /// The name.
    pub name: Name,
    /// Which version.
    pub version: Version,
    /// What it is.
    pub id: ContentId,
    /// Who says so; owns the name.
    pub publisher: PeerId,
    /// When it was said.
    pub time: WallTime,
    /// The publisher's signature over the network and all of the above.
    pub signature: [u8; 64],
}

impl NameRecord {
    const DOMAIN: &'static [u8] = b"potluck name record v1\0";

    /// Signs a record.
    pub fn sign(
        key: &MachineKey,
        network: NetworkId,
        name: Name,
        version: Version,
        id: ContentId,
        time: WallTime,
    ) -> Self {
        let mut record =
            Self { name, version, id, publisher: key.peer(), time, signature: [0; 64] };
        record.signature = key.sign(&record.signed_bytes(network));
        record
    }

    fn signed_bytes(&self, network: NetworkId) -> Vec<u8> {
        let mut out = Self::DOMAIN.to_vec();
        out.put(&network.0);
        out.content(&self.id);
        self.write(&mut out);
        out.truncate(out.len() - 64);
        out
    }

    /// Whether it is its publisher's word, in this network.
    pub fn check(&self, network: NetworkId) -> Result<(), Distrust> {
        if verify(&self.publisher.0, &self.signed_bytes(network), &self.signature) {
            Ok(())
        } else {
            Err(Distrust::BadSignature)
        }
    }

    /// Appends it without the content id, which stands beside it wherever records are sent:
    /// name (length byte), version `u32`, publisher 32, time `u64`, signature 64.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.text8(self.name.as_str());
        out.u32(self.version.0);
        out.put(&self.publisher.0);
        out.u64(self.time.0);
        out.put(&self.signature);
    }

    /// Reads what [`NameRecord::write`] wrote, for the content `id`.
    pub fn read(r: &mut Reader<'_>, id: ContentId) -> Result<Self, Malformed> {
        Ok(Self {
            name: r.name()?,
            version: r.version()?,
            id,
            publisher: PeerId(r.array()?),
            time: WallTime(r.u64()?),
            signature: r.array()?,
        })
    }
}

/// The machines whose certificates are not to be believed, signed by the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevocationList {
    /// Grows with every change.
    pub version: u32,
    /// Removed machines.
    pub peers: BTreeSet<PeerId>,
    /// The index's signature.
    pub signature: [u8; 64],
}

impl RevocationList {
    const DOMAIN: &'static [u8] = b"potluck revocation list v1\0";

    /// Issues a list: `issuer` is the index's key.
    pub fn issue(issuer: &MachineKey, version: u32, peers: BTreeSet<PeerId>) -> Self {
        let mut list = Self { version, peers, signature: [0; 64] };
        list.signature = issuer.sign(&list.signed_bytes(issuer.network()));
        list
    }

    fn signed_bytes(&self, network: NetworkId) -> Vec<u8> {
        let mut out = Self::DOMAIN.to_vec();
        out.put(&network.0);
        self.write(&mut out);
        out.truncate(out.len() - 64);
        out
    }

    /// Whether the index of `network` issued it.
    pub fn check(&self, network: NetworkId) -> Result<(), Distrust> {
        if verify(&network.0, &self.signed_bytes(network), &self.signature) {
            Ok(())
        } else {
            Err(Distrust::BadSignature)
        }
    }

    /// Appends version `u32`, count `u32`, 32 bytes each in order, signature 64.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.u32(self.version);
        out.u32(self.peers.len() as u32);
        for peer in &self.peers {
            out.put(&peer.0);
        }
        out.put(&self.signature);
    }

    /// Reads what [`RevocationList::write`] wrote.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let version = r.u32()?;
        let count = r.u32()? as usize;
        if count > MAX_REVOKED {
            return Err(Malformed("a revocation list is too long"));
        }
        let peers = r.many(count, 32, |r| r.array().map(PeerId))?;
        if !peers.is_sorted_by(|a, b| a < b) {
            return Err(Malformed("a revocation list is not in order"));
        }
        let peers = peers.into_iter().collect();
        Ok(Self { version, peers, signature: r.array()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: WallTime = WallTime(1_800_000_000);

    #[test]
    fn an_invitation_survives_being_written_down_and_a_slip_is_noticed() {
        let network = MachineKey::from_seed([1; 32]).network();
        let invitation = Invitation::new(
            network,
            [9; 16],
            NOW,
            vec!["192.168.100.200:65535".into(), "[2001:db8::1]:7700".into()],
        );
        let text = invitation.to_string();
        assert_eq!(text.parse(), Ok(invitation.clone()));
        assert!(invitation.is_for(network));
        assert!(!invitation.is_for(NetworkId([3; 32])));
        let one = Invitation { index: vec!["192.168.100.200:65535".into()], ..invitation };
        assert!(one.to_string().len() <= 100, "{} characters", one.to_string().len());
        let slip = text.replacen(&text[20..21], if &text[20..21] == "a" { "b" } else { "a" }, 1);
        assert!(slip.parse::<Invitation>().is_err());
        for bad in ["", "potluck1", "potluck1@h:1", "hello", &text[..40]] {
            assert!(bad.parse::<Invitation>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_certificate_is_believed_only_in_its_network_for_its_key_in_its_time() {
        let index = MachineKey::from_seed([1; 32]);
        let peer = MachineKey::from_seed([2; 32]).peer();
        let c = Certificate::issue(&index, peer, MemberNumber(7), Role::Publish, " bob\n", NOW);
        assert_eq!(c.label, "bob");
        assert_eq!(Certificate::decode(&c.encode()), Ok(c.clone()));
        let network = index.network();
        assert_eq!(c.check(network, peer, NOW), Ok(()));
        let later = NOW.plus(CERTIFICATE_LIFE).plus(CLOCK_SKEW * 2);
        assert_eq!(c.check(network, peer, later), Err(Distrust::Expired));
        assert_eq!(c.check(network, peer, NOW.minus(CLOCK_SKEW * 3)), Err(Distrust::NotYet));
        assert_eq!(c.check(NetworkId([0; 32]), peer, NOW), Err(Distrust::OtherNetwork));
        assert_eq!(c.check(network, PeerId([0; 32]), NOW), Err(Distrust::OtherKey));
        let promoted = Certificate { role: Role::Admin, ..c };
        assert_eq!(promoted.check(network, peer, NOW), Err(Distrust::BadSignature));
    }

    #[test]
    fn what_a_joining_machine_shows_is_worth_nothing_on_another_connection_or_to_another_machine() {
        let (secret, exporter) = ([1; 16], [2; 32]);
        let peer = MachineKey::from_seed([3; 32]).peer();
        let tag = join_tag(&secret, &exporter, peer);
        assert!(same_tag(&tag, &join_tag(&secret, &exporter, peer)));
        assert!(!same_tag(&tag, &join_tag(&secret, &[4; 32], peer)), "relayed");
        assert!(!same_tag(&tag, &join_tag(&secret, &exporter, PeerId([5; 32]))), "another's");
        assert!(!same_tag(&tag, &join_tag(&[6; 16], &exporter, peer)), "without the secret");
    }

    #[test]
    fn a_cleaned_label_is_clean() {
        let long = format!("{} {}", "x".repeat(MAX_LABEL - 1), "y");
        for label in [" bob ", "bob \u{202E}", "\u{202E} \n bob", &long, "", "é b"] {
            let clean = clean_label(label);
            assert!(clean.len() <= MAX_LABEL && clean.trim() == clean, "{clean:?}");
            assert_eq!(clean_label(&clean), clean);
        }
    }

    #[test]
    fn a_name_record_holds_for_one_network_and_one_content() {
        let key = MachineKey::from_seed([5; 32]);
        let network = NetworkId([6; 32]);
        let id = ContentId::file([7; 32]);
        let record = NameRecord::sign(&key, network, "game".parse().unwrap(), Version(2), id, NOW);
        assert_eq!(record.check(network), Ok(()));
        assert!(record.check(NetworkId([1; 32])).is_err());
        let other = NameRecord { id: ContentId::file([8; 32]), ..record.clone() };
        assert!(other.check(network).is_err());
        let mut bytes = vec![];
        record.write(&mut bytes);
        assert_eq!(NameRecord::read(&mut Reader::new(&bytes), id), Ok(record));
    }

    #[test]
    fn a_revocation_list_is_the_indexs_word() {
        let index = MachineKey::from_seed([1; 32]);
        let list = RevocationList::issue(&index, 3, [PeerId([1; 32]), PeerId([2; 32])].into());
        assert_eq!(list.check(index.network()), Ok(()));
        let mut bytes = vec![];
        list.write(&mut bytes);
        assert_eq!(RevocationList::read(&mut Reader::new(&bytes)), Ok(list.clone()));
        bytes[8..72].rotate_left(32);
        assert!(RevocationList::read(&mut Reader::new(&bytes)).is_err(), "out of order");
        let shorter = RevocationList { peers: [PeerId([1; 32])].into(), ..list };
        assert!(shorter.check(index.network()).is_err());
    }
}
