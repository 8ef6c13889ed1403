//! Owns what peers and the index say over UDP, as types and as the plaintext bytes inside a sealed
//! datagram. Never seals, opens or sends (see `seal`).

use std::net::SocketAddr;
use std::sync::LazyLock;

use blake3::hazmat::HasherExt;

use super::bytes::{Malformed, Reader, Writer, numbers};
use crate::id::{ContentId, Name, PeerId, RequestId, Version};
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
/// Room for items in one `R`, after its fixed part: pack by [`Item::wire_len`].
pub const ITEMS_ROOM: usize = MAX_PLAINTEXT - 8 - 36;
/// Room for rows in one page or notice, after the fixed part: pack by [`Row::wire_len`].
pub const ROWS_ROOM: usize = MAX_PLAINTEXT - 8 - 11;
/// Room for hosts in one answer to `S` that carries no record: see [`Found::room`].
pub const HOSTS_ROOM: usize = MAX_PLAINTEXT - 8 - 48;
/// The longest text beside a refused item, in bytes: all items of an `R` may be refused in one
/// answer. Longer ones are cut.
pub const MAX_ITEM_TEXT: usize = 40;
/// The longest glob, in bytes: a length byte. Longer ones are cut.
pub const MAX_GLOB: usize = 255;
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
    let named = item.name.as_ref().map(|record| (&record.name, record.version));
    digest_part(&item.id, item.size, named)
}

/// [`digest_of`] an item, from what of it counts: the name and version are those of its record.
pub fn digest_part(id: &ContentId, size: u64, named: Option<(&Name, Version)>) -> u128 {
    static CONTEXT: LazyLock<blake3::hazmat::ContextKey> = LazyLock::new(|| {
        blake3::hazmat::hash_derive_key_context("potluck 2026 registration digest v1")
    });
    let mut hasher = blake3::Hasher::new_from_context_key(&CONTEXT);
    hasher.update(&[u8::from(id.kind == crate::id::Kind::Folder)]);
    hasher.update(&id.hash);
    hasher.update(&size.to_be_bytes());
    if let Some((name, version)) = named {
        hasher.update(&version.0.to_be_bytes());
        hasher.update(name.as_str().as_bytes());
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
    /// Hosts that the asker could not reach, or that sent it what did not verify; at most
    /// [`Search::MAX_AVOIDED`].
    pub avoid: Vec<PeerId>,
}

impl Search {
    /// Hosts in one answer.
    pub const MAX_HOSTS: u8 = 20;
    /// Hosts that one search complains of.
    pub const MAX_AVOIDED: usize = 8;
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

numbers! {
    /// Why something was refused. A number is stable for ever.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub enum Code else "no such refusal code" {
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
}

impl Request {
    /// The letter.
    pub const fn kind(&self) -> u8 {
        match self {
            Self::Register(_) => b'R',
            Self::Search(_) => b'S',
            Self::List(_) => b'O',
            Self::Deregister(_) => b'T',
            Self::Watch(_) => b'W',
        }
    }

    /// The plaintext of its datagram: the request id, the body. Lists must have been packed to fit.
    pub fn encode(&self, id: RequestId) -> Vec<u8> {
        let mut out = Vec::with_capacity(USUAL_BYTES);
        out.u64(id.0);
        match self {
            Self::Register(register) => register.write(&mut out),
            Self::Search(search) => search.write(&mut out),
            Self::List(list) => {
                out.text8(&list.glob);
                out.u8(list.after.is_some().into());
                if let Some(key) = &list.after {
                    key.write(&mut out);
                }
            }
            Self::Deregister(ids) => {
                out.u8(ids.len() as u8);
                ids.iter().for_each(|id| out.content(id));
            }
            Self::Watch(watch) => {
                out.text8(&watch.glob);
                out.u64(watch.since);
                out.u8(watch.stop.into());
            }
        }
        debug_assert!(out.len() <= MAX_PLAINTEXT, "a request was packed too full");
        out
    }

    /// Reads the plaintext of a datagram headed `kind`; zeroes may follow it.
    pub fn decode(kind: u8, plaintext: &[u8]) -> Result<(RequestId, Self), Malformed> {
        let mut r = within(plaintext)?;
        let id = RequestId(r.u64()?);
        let request = match kind {
            b'R' => Self::Register(Register::read(&mut r)?),
            b'S' => Self::Search(Search::read(&mut r)?),
            b'O' => Self::List(List {
                glob: r.text8()?.to_owned(),
                after: if r.flag()? { Some(RowKey::read(&mut r)?) } else { None },
            }),
            b'T' => {
                let count = usize::from(r.u8()?);
                if count > Self::MAX_DEREGISTER {
                    return Err(Malformed("it names too many contents"));
                }
                Self::Deregister(r.many(count, CONTENT_BYTES, Reader::content)?)
            }
            b'W' => {
                Self::Watch(Watch { glob: r.text8()?.to_owned(), since: r.u64()?, stop: r.flag()? })
            }
            _ => return Err(Malformed("no such request")),
        };
        r.padding()?;
        Ok((id, request))
    }
}

impl Reply {
    /// The letter.
    pub const fn kind(&self) -> u8 {
        match self {
            Self::Ack(_) => b'A',
            Self::Error(_) => b'E',
        }
    }

    /// The plaintext of its datagram: the id of the request it answers, the body. Lists must have
    /// been packed to fit.
    pub fn encode(&self, to: RequestId) -> Vec<u8> {
        let mut out = Vec::with_capacity(USUAL_BYTES);
        self.write(to, &mut out);
        out
    }

    /// Appends its plaintext.
    pub fn write(&self, to: RequestId, out: &mut Vec<u8>) {
        let start = out.len();
        out.u64(to.0);
        match self {
            Self::Ack(ack) => ack.write(out),
            Self::Error(refusal) => {
                out.u16(refusal.code as u16);
                out.u8(refusal.cookie.is_some().into());
                if let Some(cookie) = &refusal.cookie {
                    out.put(cookie);
                }
                out.text8(&refusal.text);
            }
        }
        debug_assert!(out.len() - start <= MAX_PLAINTEXT, "a reply was packed too full");
    }

    /// Reads the plaintext of a datagram headed `kind`.
    pub fn decode(kind: u8, plaintext: &[u8]) -> Result<(RequestId, Self), Malformed> {
        let mut r = within(plaintext)?;
        let to = RequestId(r.u64()?);
        let reply = match kind {
            b'A' => Self::Ack(Ack::read(&mut r)?),
            b'E' => Self::Error(Refusal {
                code: Code::from_number(r.u16()?)?,
                cookie: if r.flag()? { Some(r.array()?) } else { None },
                text: r.text8()?.to_owned(),
            }),
            _ => return Err(Malformed("no such reply")),
        };
        r.end()?;
        Ok((to, reply))
    }
}

impl Notice {
    /// The plaintext of its datagram. Rows must have been packed to fit.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(USUAL_BYTES);
        self.write(&mut out);
        out
    }

    /// Appends its plaintext.
    pub fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.u64(self.before);
        out.u64(self.after);
        write_rows(&self.rows, out);
        debug_assert!(out.len() - start <= MAX_PLAINTEXT, "a notice was packed too full");
    }

    /// Reads the plaintext of a datagram headed `N`.
    pub fn decode(plaintext: &[u8]) -> Result<Self, Malformed> {
        let mut r = within(plaintext)?;
        let notice = Self { before: r.u64()?, after: r.u64()?, rows: read_rows(&mut r)? };
        if notice.after < notice.before {
            return Err(Malformed("a notice goes back in time"));
        }
        r.end()?;
        Ok(notice)
    }
}

/// A content id: kind and hash.
const CONTENT_BYTES: usize = 1 + 32;
/// A name record without its name's own bytes: length, version, publisher, time, signature.
const RECORD_BYTES: usize = 1 + 4 + 32 + 8 + 64;
/// An item without a record: content, size, held, flag.
const ITEM_BYTES: usize = CONTENT_BYTES + 8 + 2 + 1;
/// A row without a name: the name's length, content, size, hosts, complete.
const ROW_BYTES: usize = 1 + CONTENT_BYTES + 8 + 4 + 4;
/// A host at an IPv4 address: key, family, address, port, held, load.
const HOST_BYTES: usize = 32 + 1 + 4 + 2 + 2 + 2;
/// What most plaintexts fit, so that they are allocated once.
const USUAL_BYTES: usize = 256;

fn within(plaintext: &[u8]) -> Result<Reader<'_>, Malformed> {
    if plaintext.len() > MAX_PLAINTEXT {
        return Err(Malformed("it is longer than a datagram"));
    }
    Ok(Reader::new(plaintext))
}

fn read_held(r: &mut Reader<'_>) -> Result<u16, Malformed> {
    match r.u16()? {
        held if held <= HELD_ALL => Ok(held),
        _ => Err(Malformed("nobody holds more than all of it")),
    }
}

fn write_record(record: Option<&NameRecord>, out: &mut Vec<u8>) {
    out.u8(record.is_some().into());
    if let Some(record) = record {
        record.write(out);
    }
}

fn read_record(r: &mut Reader<'_>, id: ContentId) -> Result<Option<NameRecord>, Malformed> {
    if r.flag()? { NameRecord::read(r, id).map(Some) } else { Ok(None) }
}

fn record_len(record: Option<&NameRecord>) -> usize {
    record.map_or(0, |record| RECORD_BYTES + record.name.as_str().len())
}

impl Register {
    fn write(&self, out: &mut Vec<u8>) {
        out.u16(self.port);
        out.u16(self.load.uploads);
        out.u16(self.load.free_slots);
        out.u32(self.load.rate_kib);
        out.u32(self.load.capacity_kib);
        out.put(&self.digest);
        out.u32(self.round);
        out.u8(self.round_ends.into());
        out.u8(self.items.len() as u8);
        for item in &self.items {
            out.content(&item.id);
            out.u64(item.size);
            out.u16(item.held);
            write_record(item.name.as_ref(), out);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let register = Self {
            port: r.u16()?,
            load: Load {
                uploads: r.u16()?,
                free_slots: r.u16()?,
                rate_kib: r.u32()?,
                capacity_kib: r.u32()?,
            },
            digest: r.array()?,
            round: r.u32()?,
            round_ends: r.flag()?,
            items: {
                let count = r.u8()?.into();
                r.many(count, ITEM_BYTES, Item::read)?
            },
        };
        if register.round_ends && register.round == 0 {
            return Err(Malformed("a round ends that never was"));
        }
        Ok(register)
    }
}

impl Item {
    /// Bytes it takes in an `R`, of [`ITEMS_ROOM`].
    pub fn wire_len(&self) -> usize {
        ITEM_BYTES + record_len(self.name.as_ref())
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let id = r.content()?;
        Ok(Self { id, size: r.size()?, held: read_held(r)?, name: read_record(r, id)? })
    }
}

impl Search {
    fn write(&self, out: &mut Vec<u8>) {
        out.u8(self.hosts);
        match &self.target {
            Target::Id(id) => {
                out.u8(0);
                out.content(id);
            }
            Target::Name(name, version) => {
                out.u8(1);
                out.text8(name.as_str());
                out.u32(version.map_or(0, |version| version.0));
            }
        }
        out.u8(self.avoid.len() as u8);
        self.avoid.iter().for_each(|peer| out.put(&peer.0));
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let hosts = r.u8()?;
        if !(1..=Self::MAX_HOSTS).contains(&hosts) {
            return Err(Malformed("1 to 20 hosts are asked for"));
        }
        let target = match r.u8()? {
            0 => Target::Id(r.content()?),
            1 => Target::Name(r.name()?, Some(r.u32()?).filter(|n| *n > 0).map(Version)),
            _ => return Err(Malformed("an id or a name is looked for")),
        };
        let count = usize::from(r.u8()?);
        if count > Self::MAX_AVOIDED {
            return Err(Malformed("at most 8 hosts are complained of"));
        }
        let avoid = (0..count).map(|_| Ok(PeerId(r.array()?))).collect::<Result<_, Malformed>>()?;
        Ok(Self { target, hosts, avoid })
    }
}

impl RowKey {
    fn write(&self, out: &mut Vec<u8>) {
        out.text8(self.name.as_ref().map_or("", Name::as_str));
        out.content(&self.id);
    }

    /// No name is empty: length 0 is no name.
    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let name = match r.rest().first() {
            Some(0) => r.u8().map(|_| None)?,
            _ => Some(r.name()?),
        };
        Ok(Self { name, id: r.content()? })
    }
}

impl Row {
    /// Bytes it takes in a page or notice, of [`ROWS_ROOM`].
    pub fn wire_len(&self) -> usize {
        let name = self.key.name.as_ref().map_or(0, |name| name.as_str().len() + 4);
        ROW_BYTES + name + if self.owner().is_some() { 32 } else { 0 }
    }

    /// Version and publisher: a row has both or, nameless or gone, neither.
    fn owner(&self) -> Option<(Version, PeerId)> {
        self.key.name.as_ref().and(self.version).zip(self.publisher)
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.key.write(out);
        out.u64(self.size);
        out.u32(self.hosts);
        out.u32(self.complete);
        if self.key.name.is_some() {
            out.u32(self.owner().map_or(0, |(version, _)| version.0));
        }
        if let Some((_, publisher)) = self.owner() {
            out.put(&publisher.0);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let (key, size) = (RowKey::read(r)?, r.size()?);
        let (hosts, complete) = (r.u32()?, r.u32()?);
        if complete > hosts {
            return Err(Malformed("more hosts hold all of it than hold any"));
        }
        let version = if key.name.is_some() { Some(r.u32()?) } else { None };
        let version = version.filter(|n| *n > 0).map(Version);
        if key.name.is_some() && version.is_none() && hosts > 0 {
            return Err(Malformed("a name that is hosted stands at a version"));
        }
        let publisher = version.map(|_| r.array().map(PeerId)).transpose()?;
        Ok(Self { key, size, hosts, complete, version, publisher })
    }
}

fn write_rows(rows: &[Row], out: &mut Vec<u8>) {
    out.u8(rows.len() as u8);
    rows.iter().for_each(|row| row.write(out));
}

fn read_rows(r: &mut Reader<'_>) -> Result<Vec<Row>, Malformed> {
    let count = r.u8()?.into();
    r.many(count, ROW_BYTES, Row::read)
}

impl Ack {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Registered(registered) => {
                out.u8(b'R');
                registered.write(out);
            }
            Self::Found(found) => {
                out.u8(b'S');
                found.write(out);
            }
            Self::Page(page) => {
                out.u8(b'O');
                out.u64(page.sequence);
                out.u8(page.more.into());
                write_rows(&page.rows, out);
            }
            Self::Deregistered => out.u8(b'T'),
            Self::Watching(watching) => {
                out.u8(b'W');
                out.u16(watching.lease_s);
                out.u64(watching.sequence);
                out.u8(watching.missed.into());
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            b'R' => Self::Registered(Registered::read(r)?),
            b'S' => Self::Found(Found::read(r)?),
            b'O' => Self::Page(Page { sequence: r.u64()?, more: r.flag()?, rows: read_rows(r)? }),
            b'T' => Self::Deregistered,
            b'W' => Self::Watching(Watching {
                lease_s: r.u16()?,
                sequence: r.u64()?,
                missed: r.flag()?,
            }),
            _ => return Err(Malformed("no such acknowledgement")),
        })
    }
}

impl Registered {
    fn write(&self, out: &mut Vec<u8>) {
        out.u16(self.lease_s);
        out.u16(self.heartbeat_s);
        out.u8(self.repeat_all.into());
        out.u8(self.refused.len() as u8);
        for (position, refusal) in &self.refused {
            out.u8(*position);
            out.u16(refusal.code as u16);
            out.text_within(&refusal.text, MAX_ITEM_TEXT);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            lease_s: r.u16()?,
            heartbeat_s: r.u16()?,
            repeat_all: r.flag()?,
            refused: {
                let count = r.u8()?.into();
                r.many(count, 1 + 2 + 1, |r| {
                    let (position, code) = (r.u8()?, Code::from_number(r.u16()?)?);
                    let text = r.text8()?.to_owned();
                    if text.len() > MAX_ITEM_TEXT {
                        return Err(Malformed("the text beside an item is too long"));
                    }
                    Ok((position, Refusal { code, text, cookie: None }))
                })?
            },
        })
    }
}

impl Found {
    /// Room for hosts beside this record: pack by [`Host::wire_len`].
    pub fn room(record: Option<&NameRecord>) -> usize {
        HOSTS_ROOM - record_len(record)
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.content(&self.id);
        out.u64(self.size);
        write_record(self.record.as_ref(), out);
        out.u32(self.hosts_in_all);
        out.u8(self.hosts.len() as u8);
        for host in &self.hosts {
            out.put(&host.peer.0);
            out.address(host.address);
            out.u16(host.held);
            out.u16(host.load);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let id = r.content()?;
        let (size, record) = (r.size()?, read_record(r, id)?);
        let (hosts_in_all, count) = (r.u32()?, r.u8()?);
        if count > Search::MAX_HOSTS {
            return Err(Malformed("it names too many hosts"));
        }
        let hosts = r.many(count.into(), HOST_BYTES, |r| {
            Ok(Host {
                peer: PeerId(r.array()?),
                address: r.address()?,
                held: read_held(r)?,
                load: r.u16()?,
            })
        })?;
        Ok(Self { id, size, record, hosts_in_all, hosts })
    }
}

impl Host {
    /// Bytes it takes in an answer to `S`, of [`Found::room`].
    pub fn wire_len(&self) -> usize {
        HOST_BYTES + if self.address.ip().to_canonical().is_ipv4() { 0 } else { 12 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Kind;
    use crate::seal::{
        EpochSecret, ReplyHead, RequestHead, SessionKeys, open, seal_reply, seal_request,
    };
    use crate::wire::arbitrary::*;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    const ID: RequestId = RequestId(0x0102_0304_0506_0708);

    fn load() -> impl Strategy<Value = Load> {
        any::<(u16, u16, u32, u32)>().prop_map(|(uploads, free_slots, rate_kib, capacity_kib)| {
            Load { uploads, free_slots, rate_kib, capacity_kib }
        })
    }

    fn item() -> impl Strategy<Value = Item> {
        (content(), size(), 0..=HELD_ALL, any::<bool>(), record()).prop_map(
            |(id, size, held, named, record)| Item {
                id,
                size,
                held,
                name: named.then_some(NameRecord { id, ..record }),
            },
        )
    }

    /// As many of `all` as their lengths leave room for.
    fn packed<T>(all: Vec<T>, len: impl Fn(&T) -> usize, mut room: usize) -> Vec<T> {
        all.into_iter()
            .take_while(|one| room.checked_sub(len(one)).map(|left| room = left).is_some())
            .collect()
    }

    fn register() -> impl Strategy<Value = Request> {
        (any::<u16>(), load(), any::<[u8; 16]>(), any::<u32>(), any::<bool>(), vec(item(), 0..40))
            .prop_map(|(port, load, digest, round, round_ends, items)| {
                Request::Register(Register {
                    port,
                    load,
                    digest,
                    round,
                    round_ends: round_ends && round > 0,
                    items: packed(items, Item::wire_len, ITEMS_ROOM),
                })
            })
    }

    fn key() -> impl Strategy<Value = RowKey> {
        (option::of(name()), content()).prop_map(|(name, id)| RowKey { name, id })
    }

    fn request() -> impl Strategy<Value = Request> {
        let target = prop_oneof![
            content().prop_map(Target::Id),
            (name(), option::of(version())).prop_map(|(n, v)| Target::Name(n, v)),
        ];
        prop_oneof![
            register(),
            (target, 1..=Search::MAX_HOSTS, vec(peer(), 0..=Search::MAX_AVOIDED)).prop_map(
                |(target, hosts, avoid)| Request::Search(Search { target, hosts, avoid })
            ),
            (text(MAX_GLOB), option::of(key()))
                .prop_map(|(glob, after)| Request::List(List { glob, after })),
            vec(content(), 0..=Request::MAX_DEREGISTER).prop_map(Request::Deregister),
            (text(MAX_GLOB), any::<u64>(), any::<bool>())
                .prop_map(|(glob, since, stop)| Request::Watch(Watch { glob, since, stop })),
        ]
    }

    fn row() -> impl Strategy<Value = Row> {
        (key(), size(), any::<u32>(), any::<u32>(), version(), peer(), any::<bool>()).prop_map(
            |(key, size, a, b, version, publisher, gone)| {
                let (hosts, complete) = if gone { (0, 0) } else { (a.max(b), a.min(b)) };
                let owned = key.name.is_some() && hosts > 0;
                Row {
                    key,
                    size,
                    hosts,
                    complete,
                    version: owned.then_some(version),
                    publisher: owned.then_some(publisher),
                }
            },
        )
    }

    fn rows() -> impl Strategy<Value = Vec<Row>> {
        vec(row(), 0..30).prop_map(|rows| packed(rows, Row::wire_len, ROWS_ROOM))
    }

    fn refusal(most: usize, cookies: bool) -> impl Strategy<Value = Refusal> {
        (proptest::sample::select(Code::ALL), text(most), option::of(any::<[u8; 16]>())).prop_map(
            move |(code, text, cookie)| Refusal { code, text, cookie: cookie.filter(|_| cookies) },
        )
    }

    fn host() -> impl Strategy<Value = Host> {
        (peer(), address(), 0..=HELD_ALL, any::<u16>())
            .prop_map(|(peer, address, held, load)| Host { peer, address, held, load })
    }

    fn found() -> impl Strategy<Value = Found> {
        let hosts = vec(host(), 0..=usize::from(Search::MAX_HOSTS));
        (content(), size(), option::of(record()), any::<u32>(), hosts).prop_map(
            |(id, size, record, hosts_in_all, hosts)| {
                let record = record.map(|record| NameRecord { id, ..record });
                let hosts = packed(hosts, Host::wire_len, Found::room(record.as_ref()));
                Found { id, size, record, hosts_in_all, hosts }
            },
        )
    }

    fn reply() -> impl Strategy<Value = Reply> {
        let refused = vec((any::<u8>(), refusal(MAX_ITEM_TEXT, false)), 0..=25);
        let registered = (any::<(u16, u16, bool)>(), refused).prop_map(
            |((lease_s, heartbeat_s, repeat_all), refused)| {
                Ack::Registered(Registered { lease_s, heartbeat_s, repeat_all, refused })
            },
        );
        prop_oneof![
            registered.prop_map(Reply::Ack),
            found().prop_map(|found| Reply::Ack(Ack::Found(found))),
            (any::<u64>(), rows(), any::<bool>()).prop_map(|(sequence, rows, more)| Reply::Ack(
                Ack::Page(Page { sequence, rows, more })
            )),
            Just(Reply::Ack(Ack::Deregistered)),
            any::<(u16, u64, bool)>().prop_map(|(lease_s, sequence, missed)| Reply::Ack(
                Ack::Watching(Watching { lease_s, sequence, missed })
            )),
            refusal(255, true).prop_map(Reply::Error),
        ]
    }

    proptest! {
        #[test]
        fn every_request_is_read_as_it_was_written_and_fits_a_datagram(
            request in request(), id: u64, padding in 0usize..90,
        ) {
            let mut bytes = request.encode(RequestId(id));
            prop_assert!(bytes.len() <= MAX_PLAINTEXT);
            bytes.resize((bytes.len() + padding).min(MAX_PLAINTEXT), 0);
            prop_assert_eq!(Request::decode(request.kind(), &bytes), Ok((RequestId(id), request)));
        }

        #[test]
        fn every_reply_is_read_as_it_was_written_and_fits_a_datagram(reply in reply(), id: u64) {
            let bytes = reply.encode(RequestId(id));
            prop_assert!(bytes.len() <= MAX_PLAINTEXT);
            prop_assert_eq!(Reply::decode(reply.kind(), &bytes), Ok((RequestId(id), reply)));
        }

        #[test]
        fn every_notice_is_read_as_it_was_written_and_fits_a_datagram(
            rows in rows(), a: u64, b: u64,
        ) {
            let notice = Notice { before: a.min(b), after: a.max(b), rows };
            let bytes = notice.encode();
            prop_assert!(bytes.len() <= MAX_PLAINTEXT);
            prop_assert_eq!(Notice::decode(&bytes), Ok(notice));
        }

        #[test]
        fn bent_datagrams_are_refused_or_have_one_form(
            bytes in bent(prop_oneof![
                request().prop_map(|request| [vec![request.kind()], request.encode(ID)].concat()),
                reply().prop_map(|reply| [vec![reply.kind()], reply.encode(ID)].concat()),
                rows().prop_map(|rows| {
                    [vec![b'N'], Notice { before: 1, after: 2, rows }.encode()].concat()
                }),
            ]),
        ) {
            crate::wire::check::datagram(&bytes);
        }

        #[test]
        fn lengths_told_beforehand_are_the_lengths_written(
            item in item(), row in row(), found in found(),
        ) {
            let mut out = vec![];
            row.write(&mut out);
            prop_assert_eq!(out.len(), row.wire_len());
            let page = Page { sequence: 0, rows: vec![], more: false };
            let empty = Reply::Ack(Ack::Page(page)).encode(ID);
            prop_assert_eq!(MAX_PLAINTEXT - empty.len(), ROWS_ROOM);
            let empty = Notice { before: 0, after: 0, rows: vec![] }.encode();
            prop_assert!(MAX_PLAINTEXT - empty.len() >= ROWS_ROOM);
            let load = Load::default();
            let (digest, round, round_ends) = ([0; 16], 0, false);
            let len = item.wire_len();
            let one = Register { port: 0, load, digest, round, round_ends, items: vec![item] };
            out.clear();
            one.write(&mut out);
            prop_assert_eq!(MAX_PLAINTEXT - 8 - out.len(), ITEMS_ROOM - len);
            out.clear();
            found.write(&mut out);
            let hosts: usize = found.hosts.iter().map(Host::wire_len).sum();
            prop_assert_eq!(
                MAX_PLAINTEXT - 8 - 1 - out.len(),
                Found::room(found.record.as_ref()) - hosts
            );
        }
    }

    fn keys() -> SessionKeys {
        EpochSecret([1; 32]).session(crate::id::NetworkId([2; 32]), crate::id::MemberNumber(3), 4)
    }

    #[test]
    fn a_fully_packed_registration_goes_through_a_sealed_datagram_of_the_largest_size() {
        let item = Item {
            id: ContentId { kind: Kind::Folder, hash: [7; 32] },
            size: 1,
            held: HELD_ALL,
            name: None,
        };
        let long = Item {
            name: Some(NameRecord {
                name: "x".repeat(255).parse().unwrap(),
                version: Version(1),
                id: item.id,
                publisher: PeerId([1; 32]),
                time: crate::time::WallTime(1),
                signature: [2; 64],
            }),
            ..item.clone()
        };
        let items = packed([vec![long; 2], vec![item; 30]].concat(), Item::wire_len, ITEMS_ROOM);
        assert_eq!(items.len(), 2 + 6);
        let request = Request::Register(Register {
            port: 1,
            load: Load::default(),
            digest: [3; 16],
            round: 9,
            round_ends: true,
            items,
        });
        let head = RequestHead {
            kind: request.kind(),
            epoch: 1,
            member: crate::id::MemberNumber(3),
            salt: 4,
            counter: 5,
            cookie: [6; 16],
        };
        let mut sealed = seal_request(&keys().to_index, &head, &request.encode(ID));
        assert!(sealed.len() <= MAX_DATAGRAM && sealed.len() > MAX_DATAGRAM - ITEM_BYTES);
        let plaintext = open(&keys().to_index, 5, &mut sealed).unwrap();
        assert_eq!(Request::decode(b'R', plaintext), Ok((ID, request)));
    }

    #[test]
    fn the_reply_that_hands_out_a_cookie_is_smaller_than_any_request() {
        let refusal =
            Refusal { code: Code::CookieNeeded, text: String::new(), cookie: Some([1; 16]) };
        let head = ReplyHead {
            kind: b'E',
            epoch: 1,
            member: crate::id::MemberNumber(3),
            salt: 4,
            counter: 5,
            boot: 6,
            revocations: 7,
            flags: 0,
        };
        let sealed = seal_reply(&keys().reply_key(6), &head, &Reply::Error(refusal).encode(ID));
        assert!(sealed.len() < MIN_REQUEST, "{} bytes", sealed.len());
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let item = Item { id: ContentId::file([1; 32]), size: 5, held: 1_000, name: None };
        let register = |items, round, round_ends| {
            let load = Load::default();
            Request::Register(Register { port: 1, load, digest: [0; 16], round, round_ends, items })
        };
        let bytes = |request: &Request| request.encode(ID);
        let decode = |bytes: &[u8]| Request::decode(b'R', bytes);
        assert!(decode(&bytes(&register(vec![item.clone()], 1, true))).is_ok());
        let too_much = Item { held: 1_001, ..item.clone() };
        assert!(decode(&bytes(&register(vec![too_much], 0, false))).is_err());
        let too_large = Item { size: u64::MAX, ..item.clone() };
        assert!(decode(&bytes(&register(vec![too_large], 0, false))).is_err());
        assert!(decode(&bytes(&register(vec![], 0, true))).is_err());
        let whole = bytes(&register(vec![item], 2, false));
        for end in 0..whole.len() {
            assert!(decode(&whole[..end]).is_err(), "cut at {end}");
        }
        assert!(decode(&[whole.clone(), vec![0; 40]].concat()).is_ok());
        assert!(decode(&[whole.clone(), vec![0, 1]].concat()).is_err());
        assert!(decode(&[whole.clone(), vec![0; MAX_PLAINTEXT]].concat()).is_err());
        assert!(Request::decode(b'X', &whole).is_err());
        assert!(Reply::decode(b'R', &whole).is_err());
        let many = Request::Deregister(vec![ContentId::file([0; 32]); 31]);
        assert!(Request::decode(b'T', &bytes(&many)).is_err());
        for hosts in [0, 21] {
            let (target, avoid) = (Target::Id(ContentId::file([0; 32])), vec![]);
            let search = Search { target, hosts, avoid };
            assert!(Request::decode(b'S', &bytes(&Request::Search(search))).is_err());
        }
    }

    #[test]
    fn a_row_with_no_hosts_may_have_lost_its_version_but_no_other_row() {
        let key = RowKey { name: "game".parse().ok(), id: ContentId::file([1; 32]) };
        let row = Row { key, size: 1, hosts: 0, complete: 0, version: None, publisher: None };
        let notice = |row: &Row| Notice { before: 1, after: 2, rows: vec![row.clone()] };
        assert_eq!(Notice::decode(&notice(&row).encode()), Ok(notice(&row)));
        let hosted = Row { hosts: 1, ..row.clone() };
        assert!(Notice::decode(&notice(&hosted).encode()).is_err());
        let more_whole = Row { complete: 1, ..row };
        assert!(Notice::decode(&notice(&more_whole).encode()).is_err());
        let back = Notice { before: 2, after: 1, rows: vec![] };
        assert!(Notice::decode(&back.encode()).is_err());
    }

    #[test]
    fn texts_are_cleaned_and_cut_so_that_they_can_be_read() {
        let text = format!("a\nb\u{202E}{}", "é".repeat(200));
        let refusal = Refusal { code: Code::Full, text, cookie: None };
        let reply = Reply::Error(refusal.clone());
        let Ok((_, Reply::Error(read))) = Reply::decode(b'E', &reply.encode(ID)) else {
            panic!("it is an error")
        };
        assert_eq!(read.text, format!("ab{}", "é".repeat(126)));
        let refused = vec![(3, refusal)];
        let registered = Registered { lease_s: 90, heartbeat_s: 30, repeat_all: false, refused };
        let bytes = Reply::Ack(Ack::Registered(registered)).encode(ID);
        let Ok((_, Reply::Ack(Ack::Registered(read)))) = Reply::decode(b'A', &bytes) else {
            panic!("it is an acknowledgement")
        };
        assert_eq!(read.refused[0].1.text, format!("ab{}", "é".repeat(19)));
    }
}
