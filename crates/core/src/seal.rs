//! Owns the envelope of every UDP datagram: session keys, AES-128-GCM, address cookies, replay
//! windows. Never looks inside.
//!
//! The shape is that of NTS (RFC 8915): keys are agreed over TLS, and the index derives them again
//! from the datagram's head and the epoch's secret, so it needs no state to open one.

use std::net::{IpAddr, SocketAddr};

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::id::{MemberNumber, NetworkId};
use crate::time::{Duration, Moment};
use crate::wire::bytes::{Malformed, Reader, Writer};
use crate::wire::datagram::{HEAD_BYTES, MAX_DATAGRAM, MIN_REQUEST, TAG_BYTES};

/// The version byte of every datagram.
pub const WIRE_VERSION: u8 = 1;

/// What session keys of one epoch are derived from. Only the index (all its nodes) knows it.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct EpochSecret(pub [u8; 32]);

/// The two keys of a session, as the index derives and the member receives them.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct SessionKeys {
    /// Seals requests.
    pub to_index: [u8; 16],
    /// From which reply keys are derived, one for every boot of the index.
    pub from_index: [u8; 16],
}

impl EpochSecret {
    /// Keyed BLAKE3 of (direction | network | member | salt), 16 bytes for each direction.
    pub fn session(&self, network: NetworkId, member: MemberNumber, salt: u64) -> SessionKeys {
        let derive = |direction: u8| {
            let mut message = [0; 1 + 32 + 4 + 8];
            message[0] = direction;
            message[1..33].copy_from_slice(&network.0);
            message[33..37].copy_from_slice(&member.0.to_be_bytes());
            message[37..].copy_from_slice(&salt.to_be_bytes());
            half(&blake3::keyed_hash(&self.0, &message))
        };
        SessionKeys { to_index: derive(1), from_index: derive(2) }
    }
}

impl std::fmt::Debug for SessionKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKeys")
    }
}

impl SessionKeys {
    /// The key of replies from the boot `boot`: a restarted index, whose counters begin anew, never
    /// repeats a (key, nonce).
    pub fn reply_key(&self, boot: u64) -> [u8; 16] {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&self.from_index);
        let reply = half(&blake3::keyed_hash(&key, &boot.to_be_bytes()));
        key.zeroize();
        reply
    }
}

fn half(hash: &blake3::Hash) -> [u8; 16] {
    std::array::from_fn(|i| hash.as_bytes()[i])
}

/// The authenticated clear head of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// `R`, `S`, `T`, `O` or `W`.
    pub kind: u8,
    /// Which epoch's secret the keys come from.
    pub epoch: u16,
    /// Who asks.
    pub member: MemberNumber,
    /// Which of its sessions.
    pub salt: u64,
    /// Never used twice in a session: the nonce.
    pub counter: u64,
    /// Proof of address, as last given; zeroes where there is none yet.
    pub cookie: [u8; 16],
}

/// The authenticated clear head of a reply or notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHead {
    /// `A`, `E` or `N`.
    pub kind: u8,
    /// As in the request.
    pub epoch: u16,
    /// As in the request.
    pub member: MemberNumber,
    /// As in the request.
    pub salt: u64,
    /// Never used twice by one boot of the index: the nonce.
    pub counter: u64,
    /// Which run of the index answers.
    pub boot: u64,
    /// The version of its revocation list.
    pub revocations: u32,
    /// Reserved; zero.
    pub flags: u32,
}

impl RequestHead {
    /// Reads the head of what may be a request; checks length, kind and version, nothing else.
    pub fn decode(datagram: &[u8]) -> Result<Self, Malformed> {
        if !(MIN_REQUEST..=MAX_DATAGRAM).contains(&datagram.len()) {
            return Err(Malformed("a request is 96 to 1,200 bytes"));
        }
        let mut r = Reader::new(datagram);
        let kind = r.u8()?;
        if !matches!(kind, b'R' | b'S' | b'T' | b'O' | b'W') || r.u8()? != WIRE_VERSION {
            return Err(Malformed("no request of this version"));
        }
        Ok(Self {
            kind,
            epoch: r.u16()?,
            member: MemberNumber(r.u32()?),
            salt: r.u64()?,
            counter: r.u64()?,
            cookie: r.array()?,
        })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.u8(self.kind);
        out.u8(WIRE_VERSION);
        out.u16(self.epoch);
        out.u32(self.member.0);
        out.u64(self.salt);
        out.u64(self.counter);
        out.put(&self.cookie);
    }
}

impl ReplyHead {
    /// Reads the head of what may be a reply.
    pub fn decode(datagram: &[u8]) -> Result<Self, Malformed> {
        if !(HEAD_BYTES + TAG_BYTES..=MAX_DATAGRAM).contains(&datagram.len()) {
            return Err(Malformed("a reply is 56 to 1,200 bytes"));
        }
        let mut r = Reader::new(datagram);
        let kind = r.u8()?;
        if !matches!(kind, b'A' | b'E' | b'N') || r.u8()? != WIRE_VERSION {
            return Err(Malformed("no reply of this version"));
        }
        Ok(Self {
            kind,
            epoch: r.u16()?,
            member: MemberNumber(r.u32()?),
            salt: r.u64()?,
            counter: r.u64()?,
            boot: r.u64()?,
            revocations: r.u32()?,
            flags: r.u32()?,
        })
    }

    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.u8(self.kind);
        out.u8(WIRE_VERSION);
        out.u16(self.epoch);
        out.u32(self.member.0);
        out.u64(self.salt);
        out.u64(self.counter);
        out.u64(self.boot);
        out.u32(self.revocations);
        out.u32(self.flags);
    }
}

/// Seals a request: head ‖ AES-128-GCM(plaintext), padded with zeroes to [`MIN_REQUEST`].
pub fn seal_request(key: &[u8; 16], head: &RequestHead, plaintext: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(MAX_DATAGRAM);
    head.encode(&mut out);
    out.extend_from_slice(plaintext);
    if out.len() < MIN_REQUEST - TAG_BYTES {
        out.resize(MIN_REQUEST - TAG_BYTES, 0);
    }
    seal(key, head.counter, out)
}

/// Seals a reply or notice: head ‖ AES-128-GCM(plaintext).
pub fn seal_reply(key: &[u8; 16], head: &ReplyHead, plaintext: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD_BYTES + plaintext.len() + TAG_BYTES);
    head.encode(&mut out);
    out.extend_from_slice(plaintext);
    seal(key, head.counter, out)
}

/// Opens a datagram in place: the plaintext, or `None` where it is not the key holder's.
pub fn open<'a>(key: &[u8; 16], counter: u64, datagram: &'a mut [u8]) -> Option<&'a [u8]> {
    let (head, sealed) = datagram.split_at_mut_checked(HEAD_BYTES)?;
    let plaintext = aead(key).open_in_place(nonce(counter), Aad::from(&*head), sealed).ok()?;
    Some(plaintext)
}

/// Seals what stands between a datagram's head and the last bytes of it, where the tag goes.
///
/// # Panics
/// Where the datagram is too short for head and tag.
pub fn seal_in_place(key: &[u8; 16], counter: u64, datagram: &mut [u8]) {
    let (head, rest) = datagram.split_at_mut(HEAD_BYTES);
    let (body, place) = rest.split_at_mut(rest.len() - TAG_BYTES);
    #[expect(clippy::expect_used, reason = "GCM refuses only texts over 64 GiB")]
    let tag = aead(key)
        .seal_in_place_separate_tag(nonce(counter), Aad::from(&*head), body)
        .expect("a datagram is short enough for GCM");
    place.copy_from_slice(tag.as_ref());
}

fn seal(key: &[u8; 16], counter: u64, mut out: Vec<u8>) -> Vec<u8> {
    out.extend_from_slice(&[0; TAG_BYTES]);
    seal_in_place(key, counter, &mut out);
    out
}

/// Keys are kept as keys and set up anew for each datagram: that takes 0.1 µs, and to fetch a set-up
/// context of half a kilobyte, one of many thousands, from memory takes longer.
fn aead(key: &[u8; 16]) -> LessSafeKey {
    #[expect(clippy::expect_used, reason = "the length is in the type")]
    LessSafeKey::new(UnboundKey::new(&AES_128_GCM, key).expect("16 bytes are an AES-128 key"))
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Makes and checks the cookies by which a member proves that it receives at its address.
#[derive(Clone)]
pub struct CookieJar {
    key: Seed,
}

#[derive(Clone, Zeroize, ZeroizeOnDrop)]
struct Seed([u8; 32]);

impl CookieJar {
    /// A cookie is good for one to two of these: at most 120 s.
    const SLOT: Duration = Duration::from_secs(60);
    /// Longer than any cookie lives: what was sealed with one older than this has no effect.
    pub const LIFE: Duration = Duration::from_secs(120);

    /// A jar with a key of this boot: cookies die with the process.
    pub const fn new(key: [u8; 32]) -> Self {
        Self { key: Seed(key) }
    }

    /// The cookie that proves `from` to be `member`'s address at `now`.
    pub fn bake(&self, now: Moment, from: SocketAddr, member: MemberNumber) -> [u8; 16] {
        self.cookie(now.as_micros() / Self::SLOT.as_micros() as u64, from, member)
    }

    /// Whether `cookie` was baked for this address and member lately.
    pub fn accepts(
        &self,
        now: Moment,
        from: SocketAddr,
        member: MemberNumber,
        cookie: &[u8; 16],
    ) -> bool {
        let slot = now.as_micros() / Self::SLOT.as_micros() as u64;
        let fits = |slot| crate::trust::same_tag(&self.cookie(slot, from, member), cookie);
        fits(slot) || (slot > 0 && fits(slot - 1))
    }

    fn cookie(&self, slot: u64, from: SocketAddr, member: MemberNumber) -> [u8; 16] {
        let ip = match from.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let mut message = [0; 16 + 2 + 4 + 8];
        message[..16].copy_from_slice(&ip.octets());
        message[16..18].copy_from_slice(&from.port().to_be_bytes());
        message[18..22].copy_from_slice(&member.0.to_be_bytes());
        message[22..].copy_from_slice(&slot.to_be_bytes());
        half(&blake3::keyed_hash(&self.key.0, &message))
    }
}

/// Which of a session's last 1,024 counters were seen (the scheme of RFC 6479).
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    /// One more than the highest counter seen; 0: none yet.
    next: u64,
    seen: [u64; Self::WORDS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self { next: 0, seen: [0; Self::WORDS] }
    }
}

impl ReplayWindow {
    const WORDS: usize = 16;
    const BITS: u64 = 64 * Self::WORDS as u64;

    /// Marks `counter` as seen; false where it was seen before or is too old to know. To be called
    /// only with counters of datagrams that were authentic.
    pub fn mark(&mut self, counter: u64) -> bool {
        let Some(next) = counter.checked_add(1) else { return false };
        if counter.saturating_add(Self::BITS) < self.next {
            return false;
        }
        if next > self.next {
            if next - self.next >= Self::BITS {
                self.seen = [0; Self::WORDS];
            } else {
                for passed in self.next..next {
                    let (word, bit) = Self::place(passed);
                    self.seen[word] &= !bit;
                }
            }
            self.next = next;
        }
        let (word, bit) = Self::place(counter);
        let fresh = self.seen[word] & bit == 0;
        self.seen[word] |= bit;
        fresh
    }

    const fn place(counter: u64) -> (usize, u64) {
        ((counter / 64 % Self::WORDS as u64) as usize, 1 << (counter % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn head(counter: u64) -> RequestHead {
        RequestHead {
            kind: b'R',
            epoch: 3,
            member: MemberNumber(9),
            salt: 77,
            counter,
            cookie: [5; 16],
        }
    }

    #[test]
    fn a_request_opens_only_unchanged_and_with_its_key() {
        let keys = EpochSecret([1; 32]).session(NetworkId([2; 32]), MemberNumber(9), 77);
        let sealed = seal_request(&keys.to_index, &head(4), b"hello");
        assert_eq!(sealed.len(), MIN_REQUEST);
        assert_eq!(RequestHead::decode(&sealed), Ok(head(4)));
        let plain = open(&keys.to_index, 4, &mut sealed.clone()).map(<[u8]>::to_vec);
        assert!(plain.is_some_and(|p| p.starts_with(b"hello\0")));
        for at in 0..sealed.len() {
            let mut bent = sealed.clone();
            bent[at] ^= 1;
            let counter = RequestHead::decode(&bent).map_or(4, |h| h.counter);
            assert_eq!(open(&keys.to_index, counter, &mut bent), None, "byte {at}");
        }
        assert_eq!(open(&keys.from_index, 4, &mut sealed.clone()), None);
        let other = EpochSecret([1; 32]).session(NetworkId([2; 32]), MemberNumber(8), 77);
        assert_eq!(open(&other.to_index, 4, &mut sealed.clone()), None);
    }

    #[test]
    fn replies_of_two_boots_are_sealed_with_two_keys() {
        let keys = EpochSecret([1; 32]).session(NetworkId([2; 32]), MemberNumber(9), 77);
        assert_ne!(keys.reply_key(1), keys.reply_key(2));
    }

    #[test]
    fn a_cookie_proves_one_address_of_one_member_for_two_minutes_at_most() {
        let jar = CookieJar::new([8; 32]);
        let here: SocketAddr = "10.0.0.1:5".parse().unwrap();
        let now = Moment::from_micros(1_000_000_000);
        let cookie = jar.bake(now, here, MemberNumber(1));
        assert!(jar.accepts(now, here, MemberNumber(1), &cookie));
        assert!(jar.accepts(now + Duration::from_secs(59), here, MemberNumber(1), &cookie));
        assert!(!jar.accepts(now + CookieJar::LIFE, here, MemberNumber(1), &cookie));
        assert!(!jar.accepts(now, "10.0.0.1:6".parse().unwrap(), MemberNumber(1), &cookie));
        assert!(!jar.accepts(now, "10.0.0.2:5".parse().unwrap(), MemberNumber(1), &cookie));
        assert!(!jar.accepts(now, here, MemberNumber(2), &cookie));
        assert!(!CookieJar::new([9; 32]).accepts(now, here, MemberNumber(1), &cookie));
    }

    proptest! {
        #[test]
        fn a_window_accepts_each_counter_once_like_a_set(steps in prop::collection::vec(0u64..5_000, 1..400)) {
            let mut window = ReplayWindow::default();
            let (mut seen, mut next) = (BTreeSet::new(), 0u64);
            for counter in steps {
                let too_old = counter + ReplayWindow::BITS < next;
                let expected = !too_old && seen.insert(counter);
                next = next.max(counter + 1);
                prop_assert_eq!(window.mark(counter), expected);
            }
            prop_assert!(!window.mark(u64::MAX));
        }
    }
}
