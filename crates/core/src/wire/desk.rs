//! Owns what is said to the index's desk: the few rare, weighty things that go over TLS (joining,
//! session keys, membership). Never carries content or registrations.
//!
//! One frame each way: `u32` length, a type byte, the body. The client speaks first.

use crate::id::{MemberNumber, NetworkId, PeerId};
use crate::time::WallTime;
use crate::trust::{Certificate, RevocationList, Role};

/// The longest frame at the desk, either way (a long member list is what needs the room).
pub const MAX_FRAME: usize = 1 << 20;

/// What is asked at the desk. (No `Debug`: it may hold secrets; so may [`Answer`].)
#[derive(Clone, PartialEq, Eq)]
pub enum Ask {
    /// An invited machine asks to become a member.
    Join(Join),
    /// A member asks for UDP keys and a fresh certificate.
    Session {
        /// What to call this machine (≤ 63 bytes).
        label: String,
        /// The revocation list it has.
        revocations: u32,
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
    /// To `Members`.
    Members(Vec<Member>),
    /// To `Remove`: how many machines were removed.
    Removed(u32),
    /// Not done: a stable code and a text for people.
    Refused(DeskRefusal),
}

/// Keys and terms for speaking UDP to the index.
#[derive(Clone, PartialEq, Eq)]
pub struct Session {
    /// The member's number.
    pub member: MemberNumber,
    /// Which epoch's secret the keys come from.
    pub epoch: u16,
    /// Distinguishes this session from the member's others.
    pub salt: u64,
    /// AES-128 key for requests.
    pub key_to_index: [u8; 16],
    /// AES-128 key from which reply keys are derived (with the boot id).
    pub key_from_index: [u8; 16],
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

/// Why the desk refused. A number is stable for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeskCode {
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

/// A network as a member remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Which network.
    pub network: NetworkId,
    /// Where its index is, as `host:port`, tried in turn.
    pub index: Vec<String>,
}
