//! Owns what is said to the index's desk: the few rare, weighty things that go over TLS (joining,
//! session keys, membership). Never carries content or registrations.
//!
//! One frame each way: `u32` length, a type byte, the body. The client speaks first.

use super::bytes::{Malformed, Reader, Writer, numbers};
use crate::id::{MemberNumber, NetworkId, PeerId};
use crate::seal::SessionKeys;
use crate::time::WallTime;
use crate::trust::{Certificate, RevocationList, Role, clean_label};

/// The longest frame at the desk, either way (a long member list is what needs the room).
pub const MAX_FRAME: usize = 1 << 20;
/// Members in one answer, and so in one network: as many with the longest labels fit a frame.
pub const MAX_MEMBERS: usize = 8_192;
/// Addresses of one index that a member remembers.
pub const MAX_ADDRESSES: usize = 16;

/// What is asked at the desk. (No `Debug` outside tests: it may hold
/// secrets; so may [`Answer`].)
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
pub enum Ask {
    /// An invited machine asks to become a member.
    Join(Join),
    /// A member asks for UDP keys and a fresh certificate.
    Session {
        /// What to call this machine (≤ 63 bytes).
        label: String,
        /// The revocation list it has.
        revocations: u32,
        /// The certificate it has: lets an index that lost its file know its members again.
        certificate: Option<Certificate>,
    },
    /// An admin makes an invitation.
    Invite(InviteTerms),
    /// An admin asks who is a member.
    Members,
    /// An admin removes members.
    Remove(Removal),
}

/// The body of a join.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
pub struct Join {
    /// Which invitation: the first 8 bytes of the BLAKE3 of its secret.
    pub invitation: [u8; 8],
    /// Proof of knowing its secret, bound to this TLS connection and this key (`trust::join_tag`).
    pub tag: [u8; 32],
    /// What to call this machine (≤ 63 bytes).
    pub label: String,
}

/// What an invitation allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InviteTerms {
    /// The role members get.
    pub role: Role,
    /// How many machines may join by it.
    pub uses: u32,
    /// Until when.
    pub expires: WallTime,
}

/// Who is to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// One machine.
    Peer(PeerId),
    /// Everyone who joined by the invitation with this id, which is closed as well.
    Invitation([u8; 8]),
}

/// What the desk answers.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
pub enum Answer {
    /// To a join: you are a member.
    Welcome(Box<Certificate>),
    /// To `Session`.
    Session(Box<Session>),
    /// To `Invite`: the secret; the caller writes the invitation from it.
    Invited {
        /// The invitation's 128-bit secret.
        secret: [u8; 16],
        /// Its terms.
        terms: InviteTerms,
    },
    /// To `Members`; at most [`MAX_MEMBERS`].
    Members(Vec<Member>),
    /// To `Remove`: how many machines were removed.
    Removed(u32),
    /// Not done: a stable code and a text for people.
    Refused(DeskRefusal),
}

/// Keys and terms for speaking UDP to the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The member's number.
    pub member: MemberNumber,
    /// Which epoch's secret the keys come from.
    pub epoch: u16,
    /// Distinguishes this session from the member's others.
    pub salt: u64,
    /// The keys: erased when dropped, and never shown.
    pub keys: SessionKeys,
    /// Heartbeat the index expects.
    pub heartbeat_s: u16,
    /// Fetch another session before so many seconds are over.
    pub valid_s: u32,
    /// The member's renewed certificate.
    pub certificate: Certificate,
    /// The revocation list, where the index has a newer one.
    pub revocations: Option<RevocationList>,
}

/// A member, as an admin sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub peer: PeerId,
    /// Its number.
    pub number: MemberNumber,
    /// Its role.
    pub role: Role,
    /// What it calls itself.
    pub label: String,
    /// When it joined.
    pub joined: WallTime,
    /// The invitation it joined by.
    pub invitation: [u8; 8],
    /// Seconds since the index heard of it; `None`: not since the index started.
    pub silent_s: Option<u32>,
}

/// Why the desk refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct DeskRefusal {
    /// The stable reason.
    pub code: DeskCode,
    /// For people.
    pub text: String,
}

numbers! {
    /// Why the desk refused. A number is stable for ever.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum DeskCode else "no such desk code" {
        /// The request was not understood.
        BadRequest = 1,
        /// The invitation's date has passed.
        Expired = 2,
        /// The invitation was used as often as it may be.
        UsedUp = 3,
        /// The invitation was withdrawn.
        Withdrawn = 4,
        /// This machine was removed from the network.
        Removed = 5,
        /// Only an admin may do this.
        NotAllowed = 6,
        /// The network has as many members as it may.
        Full = 7,
        /// The index could not make it durable: nothing was changed.
        NotDurable = 8,
        /// No such member or invitation.
        NotFound = 9,
    }
}

/// A network as a member remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Which network.
    pub network: NetworkId,
    /// Where its index is, as `host:port`, tried in turn; at most [`MAX_ADDRESSES`].
    pub index: Vec<String>,
}

/// Type bytes of what is asked.
mod asked {
    pub(super) const JOIN: u8 = 1;
    pub(super) const SESSION: u8 = 2;
    pub(super) const INVITE: u8 = 3;
    pub(super) const MEMBERS: u8 = 4;
    pub(super) const REMOVE: u8 = 5;
}

/// Type bytes of what is answered: the question's with the top bit, or 255.
mod answered {
    pub(super) const WELCOME: u8 = 0x81;
    pub(super) const SESSION: u8 = 0x82;
    pub(super) const INVITED: u8 = 0x83;
    pub(super) const MEMBERS: u8 = 0x84;
    pub(super) const REMOVED: u8 = 0x85;
    pub(super) const REFUSED: u8 = 0xff;
}

impl Ask {
    /// Type byte and body, without the length.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![];
        match self {
            Self::Join(join) => {
                out.u8(asked::JOIN);
                out.put(&join.invitation);
                out.put(&join.tag);
                out.text8(&clean_label(&join.label));
            }
            Self::Session { label, revocations, certificate } => {
                out.u8(asked::SESSION);
                out.u32(*revocations);
                out.text8(&clean_label(label));
                out.bytes16(&certificate.as_ref().map(Certificate::encode).unwrap_or_default());
            }
            Self::Invite(terms) => {
                out.u8(asked::INVITE);
                terms.write(&mut out);
            }
            Self::Members => out.u8(asked::MEMBERS),
            Self::Remove(removal) => {
                out.u8(asked::REMOVE);
                match removal {
                    Removal::Peer(peer) => {
                        out.u8(0);
                        out.put(&peer.0);
                    }
                    Removal::Invitation(id) => {
                        out.u8(1);
                        out.put(id);
                    }
                }
            }
        }
        out
    }

    /// Reads a frame without its length.
    pub fn decode(frame: &[u8]) -> Result<Self, Malformed> {
        let mut r = within(frame)?;
        let ask = match r.u8()? {
            asked::JOIN => Self::Join(Join {
                invitation: r.array()?,
                tag: r.array()?,
                label: read_label(&mut r)?,
            }),
            asked::SESSION => Self::Session {
                revocations: r.u32()?,
                label: read_label(&mut r)?,
                certificate: match r.bytes16()? {
                    [] => None,
                    bytes => Some(Certificate::decode(bytes)?),
                },
            },
            asked::INVITE => Self::Invite(InviteTerms::read(&mut r)?),
            asked::MEMBERS => Self::Members,
            asked::REMOVE => Self::Remove(match r.u8()? {
                0 => Removal::Peer(PeerId(r.array()?)),
                1 => Removal::Invitation(r.array()?),
                _ => return Err(Malformed("a machine or an invitation is removed")),
            }),
            _ => return Err(Malformed("the desk is not asked this")),
        };
        r.end()?;
        Ok(ask)
    }
}

impl Answer {
    /// Type byte and body, without the length.
    pub fn encode(&self) -> Vec<u8> {
        // Room for all of it at once: keys would stay behind where it had to move.
        let mut out = Vec::with_capacity(match self {
            Self::Session(session) => session.most_bytes(),
            _ => 0,
        });
        match self {
            Self::Welcome(certificate) => {
                out.u8(answered::WELCOME);
                out.put(&certificate.encode());
            }
            Self::Session(session) => {
                out.u8(answered::SESSION);
                session.write(&mut out);
            }
            Self::Invited { secret, terms } => {
                out.u8(answered::INVITED);
                out.put(secret);
                terms.write(&mut out);
            }
            Self::Members(members) => {
                out.u8(answered::MEMBERS);
                out.u32(members.len() as u32);
                members.iter().for_each(|member| member.write(&mut out));
            }
            Self::Removed(machines) => {
                out.u8(answered::REMOVED);
                out.u32(*machines);
            }
            Self::Refused(refusal) => {
                out.u8(answered::REFUSED);
                out.u16(refusal.code as u16);
                out.text8(&refusal.text);
            }
        }
        debug_assert!(out.len() <= MAX_FRAME, "an answer was made too long");
        out
    }

    /// Reads a frame without its length.
    pub fn decode(frame: &[u8]) -> Result<Self, Malformed> {
        let mut r = within(frame)?;
        let answer = match r.u8()? {
            answered::WELCOME => Self::Welcome(Box::new(Certificate::read(&mut r)?)),
            answered::SESSION => Self::Session(Box::new(Session::read(&mut r)?)),
            answered::INVITED => {
                Self::Invited { secret: r.array()?, terms: InviteTerms::read(&mut r)? }
            }
            answered::MEMBERS => {
                let count = r.u32()? as usize;
                if count > MAX_MEMBERS {
                    return Err(Malformed("no network has so many members"));
                }
                Self::Members(r.many(count, MEMBER_BYTES, Member::read)?)
            }
            answered::REMOVED => Self::Removed(r.u32()?),
            answered::REFUSED => Self::Refused(DeskRefusal {
                code: DeskCode::from_number(r.u16()?)?,
                text: r.text8()?.to_owned(),
            }),
            _ => return Err(Malformed("the desk does not answer this")),
        };
        r.end()?;
        Ok(answer)
    }
}

impl Membership {
    /// Its bytes, as a member keeps them: network, one byte of count, each address after a length
    /// byte. Addresses beyond [`MAX_ADDRESSES`] are left out.
    pub fn encode(&self) -> Vec<u8> {
        let index = &self.index[..self.index.len().min(MAX_ADDRESSES)];
        let mut out = self.network.0.to_vec();
        out.u8(index.len() as u8);
        index.iter().for_each(|address| out.text8(address));
        out
    }

    /// Reads what [`Membership::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let (network, count) = (NetworkId(r.array()?), usize::from(r.u8()?));
        if count > MAX_ADDRESSES {
            return Err(Malformed("an index has too many addresses"));
        }
        let index = r.many(count, 1, |r| r.text8().map(str::to_owned))?;
        r.end()?;
        Ok(Self { network, index })
    }
}

/// A member without its label's bytes and without its silence.
const MEMBER_BYTES: usize = 32 + 4 + 1 + 1 + 8 + 8 + 1;

fn within(frame: &[u8]) -> Result<Reader<'_>, Malformed> {
    if frame.len() > MAX_FRAME {
        return Err(Malformed("a frame is too long"));
    }
    Ok(Reader::new(frame))
}

fn read_label(r: &mut Reader<'_>) -> Result<String, Malformed> {
    let label = r.text8()?;
    if clean_label(label) != label {
        return Err(Malformed("a label is at most 63 bytes, without blanks around it"));
    }
    Ok(label.to_owned())
}

impl InviteTerms {
    fn write(&self, out: &mut Vec<u8>) {
        out.u8(self.role as u8);
        out.u32(self.uses);
        out.u64(self.expires.0);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self { role: Role::from_byte(r.u8()?)?, uses: r.u32()?, expires: WallTime(r.u64()?) })
    }
}

impl Session {
    /// No fewer than it takes with its type byte.
    fn most_bytes(&self) -> usize {
        let list = |list: &RevocationList| 4 + 4 + 32 * list.peers.len() + 64;
        1 + 52 + Certificate::MAX_BYTES + 1 + self.revocations.as_ref().map_or(0, list)
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.u32(self.member.0);
        out.u16(self.epoch);
        out.u64(self.salt);
        out.put(&self.keys.to_index);
        out.put(&self.keys.from_index);
        out.u16(self.heartbeat_s);
        out.u32(self.valid_s);
        out.put(&self.certificate.encode());
        out.u8(self.revocations.is_some().into());
        if let Some(list) = &self.revocations {
            list.write(out);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            member: MemberNumber(r.u32()?),
            epoch: r.u16()?,
            salt: r.u64()?,
            keys: SessionKeys { to_index: r.array()?, from_index: r.array()? },
            heartbeat_s: r.u16()?,
            valid_s: r.u32()?,
            certificate: Certificate::read(r)?,
            revocations: if r.flag()? { Some(RevocationList::read(r)?) } else { None },
        })
    }
}

impl Member {
    fn write(&self, out: &mut Vec<u8>) {
        out.put(&self.peer.0);
        out.u32(self.number.0);
        out.u8(self.role as u8);
        out.text8(&clean_label(&self.label));
        out.u64(self.joined.0);
        out.put(&self.invitation);
        out.u8(self.silent_s.is_some().into());
        if let Some(silent_s) = self.silent_s {
            out.u32(silent_s);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            peer: PeerId(r.array()?),
            number: MemberNumber(r.u32()?),
            role: Role::from_byte(r.u8()?)?,
            label: read_label(r)?,
            joined: WallTime(r.u64()?),
            invitation: r.array()?,
            silent_s: if r.flag()? { Some(r.u32()?) } else { None },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::{MAX_LABEL, MAX_REVOKED};
    use crate::wire::arbitrary::*;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    fn terms() -> impl Strategy<Value = InviteTerms> {
        (role(), any::<u32>(), time()).prop_map(|(role, uses, expires)| InviteTerms {
            role,
            uses,
            expires,
        })
    }

    fn ask() -> impl Strategy<Value = Ask> {
        prop_oneof![
            (any::<[u8; 8]>(), any::<[u8; 32]>(), label())
                .prop_map(|(invitation, tag, label)| Ask::Join(Join { invitation, tag, label })),
            (label(), any::<u32>(), option::of(certificate())).prop_map(
                |(label, revocations, certificate)| Ask::Session {
                    label,
                    revocations,
                    certificate
                }
            ),
            terms().prop_map(Ask::Invite),
            Just(Ask::Members),
            peer().prop_map(|peer| Ask::Remove(Removal::Peer(peer))),
            any::<[u8; 8]>().prop_map(|id| Ask::Remove(Removal::Invitation(id))),
        ]
    }

    fn member() -> impl Strategy<Value = Member> {
        (peer(), any::<u32>(), role(), label(), time(), any::<[u8; 8]>(), any::<Option<u32>>())
            .prop_map(|(peer, number, role, label, joined, invitation, silent_s)| Member {
                peer,
                number: MemberNumber(number),
                role,
                label,
                joined,
                invitation,
                silent_s,
            })
    }

    fn session() -> impl Strategy<Value = Session> {
        (
            any::<(u32, u16, u64, u16, u32, [[u8; 16]; 2])>(),
            certificate(),
            option::of(revocations()),
        )
            .prop_map(
                |((member, epoch, salt, heartbeat_s, valid_s, keys), certificate, revocations)| {
                    Session {
                        member: MemberNumber(member),
                        epoch,
                        salt,
                        keys: SessionKeys { to_index: keys[0], from_index: keys[1] },
                        heartbeat_s,
                        valid_s,
                        certificate,
                        revocations,
                    }
                },
            )
    }

    fn answer() -> impl Strategy<Value = Answer> {
        prop_oneof![
            certificate().prop_map(|certificate| Answer::Welcome(Box::new(certificate))),
            session().prop_map(|session| Answer::Session(Box::new(session))),
            (any::<[u8; 16]>(), terms())
                .prop_map(|(secret, terms)| Answer::Invited { secret, terms }),
            vec(member(), 0..50).prop_map(Answer::Members),
            any::<u32>().prop_map(Answer::Removed),
            (proptest::sample::select(DeskCode::ALL), text(255))
                .prop_map(|(code, text)| Answer::Refused(DeskRefusal { code, text })),
        ]
    }

    proptest! {
        #[test]
        fn every_question_is_read_as_it_was_written(ask in ask()) {
            let bytes = ask.encode();
            prop_assert!(bytes.len() <= MAX_FRAME);
            prop_assert_eq!(Ask::decode(&bytes), Ok(ask));
        }

        #[test]
        fn every_answer_is_read_as_it_was_written(answer in answer()) {
            let bytes = answer.encode();
            prop_assert!(bytes.len() <= MAX_FRAME);
            prop_assert_eq!(Answer::decode(&bytes), Ok(answer));
        }

        #[test]
        fn bent_frames_of_the_desk_are_refused_or_have_one_form(
            question in bent(ask().prop_map(|ask| ask.encode())),
            answer in bent(answer().prop_map(|answer| answer.encode())),
        ) {
            crate::wire::check::desk(&question);
            crate::wire::check::desk(&answer);
        }

        #[test]
        fn a_membership_is_read_as_it_was_kept(network in peer(), index in vec(text(80), 0..=MAX_ADDRESSES)) {
            let membership = Membership { network: NetworkId(network.0), index };
            prop_assert_eq!(Membership::decode(&membership.encode()), Ok(membership));
        }
    }

    fn largest_member() -> Member {
        Member {
            peer: PeerId([255; 32]),
            number: MemberNumber(u32::MAX),
            role: Role::Admin,
            label: "x".repeat(MAX_LABEL),
            joined: WallTime(u64::MAX),
            invitation: [255; 8],
            silent_s: Some(u32::MAX),
        }
    }

    #[test]
    fn the_largest_network_and_the_longest_revocation_list_fit_a_frame() {
        let members = Answer::Members(vec![largest_member(); MAX_MEMBERS]);
        let bytes = members.encode();
        assert!(bytes.len() <= MAX_FRAME);
        assert_eq!(Answer::decode(&bytes), Ok(members));
        let peers = (0..MAX_REVOKED as u64).map(|i| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&i.to_be_bytes());
            PeerId(key)
        });
        let key = crate::trust::MachineKey::from_seed([1; 32]);
        let list = RevocationList::issue(&key, 7, peers.collect());
        let session = Answer::Session(Box::new(Session {
            member: MemberNumber(1),
            epoch: 2,
            salt: 3,
            keys: SessionKeys { to_index: [4; 16], from_index: [5; 16] },
            heartbeat_s: 30,
            valid_s: 86_400,
            certificate: Certificate::issue(
                &key,
                PeerId([6; 32]),
                MemberNumber(1),
                Role::Read,
                &"x".repeat(MAX_LABEL),
                WallTime(9),
            ),
            revocations: Some(list),
        }));
        let bytes = session.encode();
        assert!(bytes.len() <= MAX_FRAME);
        let Answer::Session(inner) = &session else { panic!() };
        assert_eq!(bytes.len(), inner.most_bytes(), "it never moves while it is written");
        assert_eq!(Answer::decode(&bytes), Ok(session));
    }

    #[test]
    fn the_keys_of_a_session_are_not_shown_and_are_erased_when_it_is_dropped() {
        let session = Session {
            member: MemberNumber(1),
            epoch: 2,
            salt: 3,
            keys: SessionKeys { to_index: [0xa7; 16], from_index: [0xb7; 16] },
            heartbeat_s: 30,
            valid_s: 86_400,
            certificate: Certificate::issue(
                &crate::trust::MachineKey::from_seed([1; 32]),
                PeerId([6; 32]),
                MemberNumber(1),
                Role::Read,
                "x",
                WallTime(9),
            ),
            revocations: None,
        };
        let shown = format!("{session:?} {session:#?}").replace([' ', '\n'], "");
        assert!(shown.contains("member"), "{shown}");
        for key in ["167,167", "183,183", "a7,a7", "a7a7", "b7b7"] {
            assert!(!shown.to_lowercase().contains(key), "{shown}");
        }
        const fn erased<T: zeroize::ZeroizeOnDrop>(_: &T) {}
        erased(&session.keys);
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let ask = |bytes: &[&[u8]]| Ask::decode(&bytes.concat()).is_ok();
        assert!(ask(&[&[asked::SESSION, 0, 0, 0, 1, 1], b"x\0\0"]));
        assert!(!ask(&[&[asked::SESSION, 0, 0, 0, 1, 2], b"x"]), "cut");
        assert!(!ask(&[&[asked::SESSION, 0, 0, 0, 1, 1], b"xx\0\0"]), "too long");
        assert!(!ask(&[&[asked::SESSION, 0, 0, 0, 1, 1], b"x\0\x01x"]), "no certificate");
        assert!(!ask(&[&[asked::SESSION, 0, 0, 0, 1, 2], b" x\0\0"]), "blank");
        assert!(!ask(&[&[asked::SESSION, 0, 0, 0, 1, 64], &[b'x'; 64], &[0, 0]]), "label");
        assert!(!ask(&[&[asked::INVITE, 4], &[0; 12]]), "role");
        assert!(!ask(&[&[asked::REMOVE, 2], &[0; 32]]), "neither");
        assert!(!ask(&[&[0]]) && !ask(&[]));
        assert!(!ask(&[&[asked::MEMBERS], &[0; MAX_FRAME]]), "endless");
        let claims = [&[answered::MEMBERS][..], &u32::MAX.to_be_bytes()].concat();
        assert!(Answer::decode(&claims).is_err());
        let claims = [&[answered::MEMBERS][..], &5_000u32.to_be_bytes(), &[1; 300]].concat();
        assert!(Answer::decode(&claims).is_err());
        assert!(Answer::decode(&[answered::REFUSED, 0, 77, 0]).is_err(), "code");
        assert!(Answer::decode(&Ask::Members.encode()).is_err(), "a question");
    }

    #[test]
    fn a_label_is_cleaned_before_it_is_sent() {
        let label = format!(" a\u{202E}\n{} ", "é".repeat(60));
        let Ok(Ask::Session { label, .. }) =
            Ask::decode(&Ask::Session { label, revocations: 0, certificate: None }.encode())
        else {
            panic!("it is a question for a session")
        };
        assert_eq!(label, format!("a{}", "é".repeat(31)));
    }
}
