//! Owns what peers and the index say over UDP, as types and as the plaintext bytes inside a sealed
//! datagram. Never seals, opens or sends (see `seal`).

use std::net::SocketAddr;

use crate::id::{ContentId, Name, PeerId, Version};
use crate::trust::NameRecord;

/// The largest datagram either side sends: fits any path of MTU 1,280 with room for IPv6 and UDP.
pub const MAX_DATAGRAM: usize = 1_200;
/// The smallest request: an unproven address is answered with less than this.
pub const MIN_REQUEST: usize = 96;
/// Cleartext head of every datagram.
pub const HEAD_BYTES: usize = 40;
/// AES-128-GCM's tag behind every datagram.
pub const TAG_BYTES: usize = 16;
/// Room for the plaintext of one datagram.
pub const MAX_PLAINTEXT: usize = MAX_DATAGRAM - HEAD_BYTES - TAG_BYTES;
/// Share held, in thousandths: a host with all of it says this.
pub const HELD_ALL: u16 = 1_000;

/// What a peer asks. The letter is the datagram's first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `R`: I host these; also the heartbeat.
    Register(Register),
    /// `S`: who hosts this?
    Search(Search),
    /// `O`: list what there is.
    List(List),
    /// `T`: I no longer host these (at most [`Request::MAX_DEREGISTER`]).
    Deregister(Vec<ContentId>),
    /// `W`: push changes of the listing to me until the watch lapses.
    Watch(Watch),
}

impl Request {
    /// Contents in one `T`: 30 × 33 bytes fit a datagram.
    pub const MAX_DEREGISTER: usize = 30;
}

/// The body of `R`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Register {
    /// TCP port this peer serves on; the address is the datagram's own source.
    pub port: u16,
    /// How busy this peer is.
    pub load: Load,
    /// Digest of all this peer believes it has registered ([`digest_of`] folded over the items); all
    /// zero while items are still on their way.
    pub digest: [u8; 16],
    /// When not 0: this `R` belongs to a full repetition of all registrations, with this number.
    pub round: u32,
    /// The last `R` of that round: whatever the round did not name is forgotten.
    pub round_ends: bool,
    /// Contents hosted, as many as fit a datagram; empty in a plain heartbeat.
    pub items: Vec<Item>,
}

/// How busy a peer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Uploads under way.
    pub uploads: u16,
    /// Upload slots that are free.
    pub free_slots: u16,
    /// Bytes a second sent of late, in KiB.
    pub rate_kib: u32,
    /// The most this peer ever measured or was allowed, in KiB a second; 0: unknown.
    pub capacity_kib: u32,
}

/// One content in an `R`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Which content.
    pub id: ContentId,
    /// Its size in bytes.
    pub size: u64,
    /// Thousandths of it that this peer holds; [`HELD_ALL`]: everything.
    pub held: u16,
    /// The publisher's signed record, where this peer publishes the content under a name.
    pub name: Option<NameRecord>,
}

/// What one item adds to a registration digest. Order does not matter: digests of items are added
/// as little-endian 128-bit numbers, wrapping. `held` is no part of it.
pub fn digest_of(item: &Item) -> u128 {
    let mut hasher = blake3::Hasher::new_derive_key("potluck 2026 registration digest v1");
    hasher.update(&[u8::from(item.id.kind == crate::id::Kind::Folder)]);
    hasher.update(&item.id.hash);
    hasher.update(&item.size.to_be_bytes());
    if let Some(record) = &item.name {
        hasher.update(&record.version.0.to_be_bytes());
        hasher.update(record.name.as_str().as_bytes());
    }
    let mut first = [0; 16];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(first)
}

/// The body of `S`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    /// What is looked for.
    pub target: Target,
    /// How many hosts at most, 1 to [`Search::MAX_HOSTS`].
    pub hosts: u8,
}

impl Search {
    /// Hosts in one answer.
    pub const MAX_HOSTS: u8 = 20;
}

/// What an `S` looks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A content by id.
    Id(ContentId),
    /// A name; the newest version unless one is given.
    Name(Name, Option<Version>),
}

/// The body of `O`: rows of the listing, in order of (name, id), nameless contents first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// Only names this glob matches (`*` for all; also matched against ids of nameless contents).
    pub glob: String,
    /// Only rows after this one.
    pub after: Option<RowKey>,
}

/// The body of `W`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Only rows this glob matches.
    pub glob: String,
    /// The last change this watcher has seen; notices begin after it. 0: only what comes.
    pub since: u64,
    /// Ends the watch instead.
    pub stop: bool,
}

/// Where a row stands in the listing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// The name; `None` for contents that no name points at.
    pub name: Option<Name>,
    /// The content.
    pub id: ContentId,
}

/// One row of the listing: a name's newest version, or a nameless content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Name and content.
    pub key: RowKey,
    /// Bytes.
    pub size: u64,
    /// Hosts that hold any of it.
    pub hosts: u32,
    /// Hosts that hold all of it.
    pub complete: u32,
    /// The version the name stands at; `None` without a name.
    pub version: Option<Version>,
    /// Who owns the name; `None` without a name.
    pub publisher: Option<PeerId>,
}

/// What the index answers, or pushes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `A`: done.
    Ack(Ack),
    /// `E`: not done.
    Error(Refusal),
}

/// The body of `A`, by what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ack {
    /// To `R`.
    Registered(Registered),
    /// To `S`.
    Found(Found),
    /// To `O`.
    Page(Page),
    /// To `T`.
    Deregistered,
    /// To `W`.
    Watching(Watching),
}

/// The answer to `R`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    /// The lease: without another `R` for so long, all this peer's registrations lapse.
    pub lease_s: u16,
    /// When the next heartbeat is due.
    pub heartbeat_s: u16,
    /// The digest sent is not the index's: register everything again, in a round.
    pub repeat_all: bool,
    /// Items that were refused: position in the `R`, and why.
    pub refused: Vec<(u8, Refusal)>,
}

/// The answer to `S`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which content.
    pub id: ContentId,
    /// Its size.
    pub size: u64,
    /// The publisher's record, where it was asked for by name.
    pub record: Option<NameRecord>,
    /// How many hosts there are in all.
    pub hosts_in_all: u32,
    /// Hosts to ask, the best first.
    pub hosts: Vec<Host>,
}

/// A host in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its key, to be pinned when dialling.
    pub peer: PeerId,
    /// Where it serves: the address the index saw, and the port it told.
    pub address: SocketAddr,
    /// Thousandths of the content that it holds.
    pub held: u16,
    /// How busy it is, in thousandths of its capacity.
    pub load: u16,
}

/// The answer to `O`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The listing's change number when this page was made.
    pub sequence: u64,
    /// Rows, in order.
    pub rows: Vec<Row>,
    /// More rows follow the last one.
    pub more: bool,
}

/// The answer to `W`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watching {
    /// The watch lapses then; ask again before.
    pub lease_s: u16,
    /// The listing's change number now.
    pub sequence: u64,
    /// Changes since the number asked for are no longer known: list everything again.
    pub missed: bool,
}

/// `N`: one or more changes of the listing, pushed to a watcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The change number before the first change told here.
    pub before: u64,
    /// The change number after the last one. A watcher whose last number is not `before` missed some.
    pub after: u64,
    /// The rows as they are now; a row with no hosts is gone.
    pub rows: Vec<Row>,
}

/// The body of `E`, and the reason for a refused item.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// The stable reason.
    pub code: Code,
    /// For people.
    pub text: String,
    /// With [`Code::CookieNeeded`]: the cookie to send from now on.
    pub cookie: Option<[u8; 16]>,
}

/// Why something was refused. A number is stable for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Code {
    /// The request was not understood.
    BadRequest = 1,
    /// Repeat the request with the cookie given here (proves the address).
    CookieNeeded = 2,
    /// Such content or name is not known.
    NotFound = 3,
    /// The content is known, but no live peer hosts it.
    NoHosts = 4,
    /// The name belongs to another publisher.
    NameTaken = 5,
    /// The name has a newer version already.
    StaleVersion = 6,
    /// A signature does not hold.
    BadSignature = 7,
    /// This member holds as much as one member may.
    Quota = 8,
    /// The index holds as much as it may.
    Full = 9,
    /// This member's role does not allow it.
    NotAllowed = 10,
    /// This machine was removed from the network.
    Removed = 11,
    /// The session's keys are too old or unknown: fetch new ones over TLS.
    SessionOver = 12,
    /// Too many requests: slow down.
    TooFast = 13,
    /// The size differs from what other hosts say of the same content.
    SizeDiffers = 14,
}
