//! Owns who hosts what: contents, their hosts, names with their versions, and the listing made of
//! them. Never knows time, rights or the wire: leases and roles are the registrar's.
//!
//! This is the default engine and the reference for any other: what goes in are a few plain
//! operations, what comes out are rows, refusals and a journal of what must outlive a restart.
//! Nothing here takes longer than O(log n), but for what its answer is long itself.

mod choice;
mod listing;
mod names;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;

use crate::dice::Dice;
use crate::id::{ContentId, MemberNumber, Name, PeerId, Version};
use crate::trust::NameRecord;
use crate::wire::datagram::{Code, HELD_ALL, Item, Load, Refusal, digest_part};

pub use choice::Asker;
use choice::Card;
use listing::Changes;
pub use listing::{Pattern, Scan};
use names::Named;

/// How much a catalog may hold. Everything a member can make grow stands here.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Contents known, hosted or named.
    pub contents: usize,
    /// Registrations (a content at a host) in all.
    pub registrations: usize,
    /// Registrations of one member.
    pub registrations_a_member: usize,
    /// Names.
    pub names: usize,
    /// Names whose newest version is one content: each is a row that changes with its hosts.
    pub names_a_content: usize,
    /// Versions of one name; then the oldest that nobody hosts is forgotten for a new one.
    pub versions_a_name: usize,
    /// Versions of all names together.
    pub records: usize,
    /// Versions that one publisher signed.
    pub records_a_publisher: usize,
    /// Changes of the listing that are remembered for watchers that missed some.
    pub changes: usize,
}

impl Default for Limits {
    /// About half a gigabyte where everything is at its limit.
    fn default() -> Self {
        Self {
            contents: 1 << 20,
            registrations: 1 << 23,
            registrations_a_member: 65_536,
            names: 1 << 17,
            names_a_content: 64,
            versions_a_name: 1_000,
            records: 1 << 18,
            records_a_publisher: 1 << 14,
            changes: 65_536,
        }
    }
}

/// What a catalog is taken to need of memory: for a content, with its place in the listing and its
/// vectors; for a registration at its content and at its host …
const CONTENT_BYTES: usize = 288;
const REGISTRATION_BYTES: usize = 32;
/// … for a member that might host, and one that does; for a name, a version of one, and a change.
const CARD_BYTES: usize = 80;
const HOSTER_BYTES: usize = 320;
const NAME_BYTES: usize = 256;
const RECORD_BYTES: usize = 288;
const CHANGE_BYTES: usize = 96;

/// Something that must outlive a restart of the index, in the order it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Durable {
    /// A member hosts a content; told again only when something written here changes.
    Hosted(MemberNumber, ContentId, Hosted),
    /// It no longer does.
    Dropped(MemberNumber, ContentId),
    /// A version of a name.
    Record(NameRecord),
    /// That version was forgotten.
    Forgotten(Name, Version),
}

/// What outlives a restart of one registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hosted {
    /// The content's size in bytes.
    pub size: u64,
    /// Whether the host holds all of it; how much of it otherwise is told anew soon.
    pub complete: bool,
    /// The name and version it was registered with.
    pub named: Option<(Name, Version)>,
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Contents with a host.
    pub contents: usize,
    /// Names, whether or not hosted now.
    pub names: usize,
    /// Members that host something.
    pub hosts: usize,
    /// Registrations: pairs of content and host.
    pub registrations: usize,
}

/// A place in the table of contents.
type Slot = u32;

struct Content {
    id: ContentId,
    /// As its hosts say; means nothing while there are none.
    size: u64,
    /// Those that hold all of it first.
    hosts: Vec<Hosting>,
    /// How many of `hosts` hold all of it.
    complete: u32,
    /// Versions of names that are this content.
    records: u32,
    /// Names whose newest version it is: positions in `Catalog::named`.
    names: Vec<u32>,
}

/// One registration; there may be millions, so eight bytes.
#[derive(Clone, Copy)]
struct Hosting {
    member: MemberNumber,
    held: u16,
    /// The stamp of the host's round in which it was last named.
    stamp: u8,
}

/// A member that hosts, or lately did.
#[derive(Default)]
struct Hoster {
    /// What it hosts, and where in each content's `hosts` it stands.
    holds: BTreeMap<Slot, u32>,
    /// The version of a name that came with a registration, where one did.
    named: BTreeMap<Slot, (u32, Version)>,
    /// Sum of the digests of all its registrations.
    digest: u128,
    /// The round it is in or was in last, as it numbers them.
    round: Option<u32>,
    /// The same as counted here.
    stamp: u8,
}

/// Who hosts what.
pub struct Catalog {
    limits: Limits,
    dice: Dice,
    by_id: HashMap<ContentId, Slot, Seeded>,
    contents: Vec<Content>,
    free: Vec<Slot>,
    /// Contents that are hosted and not the newest version of any name: the first part of the listing.
    nameless: BTreeMap<ContentId, Slot>,
    by_name: HashMap<Name, u32, Seeded>,
    /// The same in the order of names: the second part of the listing.
    names: BTreeMap<Name, u32>,
    named: Vec<Named>,
    records: usize,
    signed: BTreeMap<PeerId, usize>,
    /// By member number.
    hosters: Vec<Option<Box<Hoster>>>,
    /// By member number; apart from `hosters` since searches read only this, of many hosts.
    cards: Vec<Card>,
    /// Contents with a host, members with a content, pairs of both.
    hosted: usize,
    hosting: usize,
    registrations: usize,
    changes: Changes,
    journal: VecDeque<Durable>,
}

impl Catalog {
    /// An empty catalog whose changes are counted from `sequence`.
    pub fn new(limits: Limits, sequence: u64, dice: u64) -> Self {
        let mut dice = Dice(dice);
        let seeded = Seeded([dice.next(), dice.next()]);
        Self {
            limits,
            by_id: HashMap::with_hasher(seeded),
            contents: Vec::new(),
            free: Vec::new(),
            nameless: BTreeMap::new(),
            by_name: HashMap::with_hasher(seeded),
            names: BTreeMap::new(),
            named: Vec::new(),
            records: 0,
            signed: BTreeMap::new(),
            hosters: Vec::new(),
            cards: Vec::new(),
            hosted: 0,
            hosting: 0,
            registrations: 0,
            changes: Changes::new(sequence, limits.changes),
            journal: VecDeque::new(),
            dice,
        }
    }

    /// A member tells where it serves and how busy it is. Comes before anything it registers. Where
    /// the report was not `due` yet, it is no reason to believe that those sent to it have come and
    /// gone.
    pub fn report(
        &mut self,
        member: MemberNumber,
        peer: PeerId,
        address: SocketAddr,
        load: Load,
        due: bool,
    ) {
        let at = member.0 as usize;
        if self.hosters.len() <= at {
            self.hosters.resize_with(at + 1, || None);
            self.cards.resize(at + 1, Card::default());
        }
        self.cards[at] = self.cards[at].renewed(Card::of(peer, address, load), due);
        self.hosters[at].get_or_insert_default();
    }

    /// A member hosts `item`. Its record is judged by `genuine` only where it is not known already.
    /// Refused as a whole, or done as a whole; the same again changes nothing.
    pub fn register(
        &mut self,
        member: MemberNumber,
        item: &Item,
        genuine: impl FnOnce(&NameRecord) -> bool,
    ) -> Result<(), Refusal> {
        self.room_for(member, item)?;
        if let Some(record) = &item.name {
            let standing = self.weigh(record)?;
            if !standing.same_bytes && !genuine(record) {
                return Err(refuse(Code::BadSignature, "the name's signature does not hold"));
            }
            if !standing.known {
                self.publish(record, true);
            }
        }
        self.host(member, item, true);
        Ok(())
    }

    /// Whether `member` may host `item`, but for its name.
    fn room_for(&self, member: MemberNumber, item: &Item) -> Result<(), Refusal> {
        let Some(hoster) = self.hoster(member) else {
            return Err(refuse(Code::BadRequest, "tell the port you serve on first"));
        };
        let slot = self.by_id.get(&item.id).copied();
        let mine = slot.is_some_and(|slot| hoster.holds.contains_key(&slot));
        if let Some(slot) = slot {
            let content = &self.contents[slot as usize];
            if content.size != item.size && content.hosts.len() > usize::from(mine) {
                return Err(refuse(
                    Code::SizeDiffers,
                    format!("others say {} bytes", content.size),
                ));
            }
        }
        if mine {
            return Ok(());
        }
        if hoster.holds.len() >= self.limits.registrations_a_member {
            let most = self.limits.registrations_a_member;
            return Err(refuse(Code::Quota, format!("a machine hosts at most {most}")));
        }
        if self.registrations >= self.limits.registrations
            || (slot.is_none() && self.contents_known() >= self.limits.contents)
        {
            return Err(refuse(Code::Full, "the index is full"));
        }
        Ok(())
    }

    /// Enters a registration that was found to be in order.
    fn host(&mut self, member: MemberNumber, item: &Item, journal: bool) {
        let slot = self.slot_of(item.id);
        let named = item.name.as_ref().map(|r| (self.by_name[r.name.as_str()], r.version));
        let Some(hoster) = self.hosters[member.0 as usize].as_deref_mut() else { return };
        let stamp = hoster.stamp;
        let content = &mut self.contents[slot as usize];
        let at = hoster.holds.get(&slot).copied();
        let before = at.map(|at| content.hosts[at as usize].held);
        let old_named = hoster.named.get(&slot).copied();
        let same = before.is_some() && content.size == item.size && old_named == named;
        if !same {
            if before.is_some() {
                let old = old_named.map(|(n, v)| (&self.named[n as usize].name, v));
                let part = digest_part(&content.id, content.size, old);
                hoster.digest = hoster.digest.wrapping_sub(part);
            }
            let new = named.map(|(n, v)| (&self.named[n as usize].name, v));
            hoster.digest = hoster.digest.wrapping_add(digest_part(&item.id, item.size, new));
            match named {
                Some(named) => hoster.named.insert(slot, named),
                None => hoster.named.remove(&slot),
            };
        }
        let resized = content.size != item.size;
        content.size = item.size;
        let at = at.unwrap_or_else(|| {
            if hoster.holds.is_empty() {
                self.hosting += 1;
            }
            self.registrations += 1;
            let at = content.hosts.len() as u32;
            if at == 0 {
                self.hosted += 1;
                content.hosts.reserve_exact(1); // most contents have one host: do not begin with four
            }
            content.hosts.push(Hosting { member, held: 0, stamp });
            hoster.holds.insert(slot, at);
            at
        });
        let hosting = &mut content.hosts[at as usize];
        hosting.held = item.held;
        hosting.stamp = stamp;
        let (was, is) = (before == Some(HELD_ALL), item.held == HELD_ALL);
        match (was, is) {
            (false, true) => self.promote(slot, at),
            (true, false) => self.demote(slot, at),
            _ => {}
        }
        self.settle(slot);
        if before.is_none() || was != is || resized {
            self.touch(slot);
        }
        if journal && (!same || was != is) {
            let named = item.name.as_ref().map(|r| (r.name.clone(), r.version));
            let hosted = Hosted { size: item.size, complete: is, named };
            self.journal.push_back(Durable::Hosted(member, item.id, hosted));
        }
    }

    /// A member no longer hosts `id`. True where it did.
    pub fn withdraw(&mut self, member: MemberNumber, id: &ContentId) -> bool {
        let Some(&slot) = self.by_id.get(id) else { return false };
        let hosts = self.hoster(member).is_some_and(|h| h.holds.contains_key(&slot));
        if hosts {
            self.unhost(member, slot);
        }
        hosts
    }

    /// A member is gone, and all it hosted with it. Says how many registrations that were.
    pub fn evict(&mut self, member: MemberNumber) -> usize {
        let Some(hoster) = self.hoster(member) else { return 0 };
        let slots: Vec<Slot> = hoster.holds.keys().copied().collect();
        for slot in &slots {
            self.unhost(member, *slot);
        }
        self.hosters[member.0 as usize] = None;
        slots.len()
    }

    /// A member begins to repeat all its registrations, or goes on with it, in what it calls round
    /// `round`.
    pub fn enter_round(&mut self, member: MemberNumber, round: u32) {
        if let Some(hoster) = self.hoster_mut(member)
            && hoster.round.replace(round) != Some(round)
        {
            hoster.stamp = hoster.stamp.wrapping_add(1);
        }
    }

    /// A member has named all it hosts in round `round`: whatever it did not name since the round
    /// began is forgotten. Says how many registrations that were.
    pub fn end_round(&mut self, member: MemberNumber, round: u32) -> usize {
        let Some(hoster) = self.hoster(member) else { return 0 };
        if hoster.round != Some(round) {
            return 0;
        }
        let stamp = hoster.stamp;
        let stale = |(slot, at): (&Slot, &u32)| {
            let hosting = self.contents[*slot as usize].hosts[*at as usize];
            (hosting.stamp != stamp).then_some(*slot)
        };
        let slots: Vec<Slot> = hoster.holds.iter().filter_map(stale).collect();
        for slot in &slots {
            self.unhost(member, *slot);
        }
        slots.len()
    }

    /// Sum of the digests of what `member` has registered.
    pub fn digest(&self, member: MemberNumber) -> u128 {
        self.hoster(member).map_or(0, |hoster| hoster.digest)
    }

    /// How many contents `member` hosts.
    pub fn hosted_by(&self, member: MemberNumber) -> usize {
        self.hoster(member).map_or(0, |hoster| hoster.holds.len())
    }

    /// Where `member` serves, as it last told.
    pub fn address_of(&self, member: MemberNumber) -> Option<SocketAddr> {
        self.hoster(member).map(|_| self.cards[member.0 as usize].address())
    }

    /// Whether `id` has a host or a name.
    pub fn knows(&self, id: &ContentId) -> bool {
        self.by_id.contains_key(id)
    }

    /// Whether `member` hosts `id`.
    pub fn hosts_it(&self, member: MemberNumber, id: &ContentId) -> bool {
        let slot = self.by_id.get(id);
        slot.is_some_and(|slot| self.hoster(member).is_some_and(|h| h.holds.contains_key(slot)))
    }

    /// What it may hold from now on. What it holds it keeps.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.changes.keep(limits.changes);
    }

    /// Bytes that all it holds is taken to need.
    pub fn memory(&self) -> usize {
        self.contents_known() * CONTENT_BYTES
            + self.registrations * REGISTRATION_BYTES
            + self.cards.len() * CARD_BYTES
            + self.hosting * HOSTER_BYTES
            + self.named.len() * NAME_BYTES
            + self.records * RECORD_BYTES
            + self.changes.len() * CHANGE_BYTES
    }

    /// How much there is.
    pub fn counts(&self) -> Counts {
        Counts {
            contents: self.hosted,
            names: self.named.len(),
            hosts: self.hosting,
            registrations: self.registrations,
        }
    }

    /// The next thing that must outlive a restart.
    pub fn poll_journal(&mut self) -> Option<Durable> {
        self.journal.pop_front()
    }

    /// Enters a registration that outlived a restart; its record, if any, was restored before.
    pub fn restore(&mut self, member: MemberNumber, id: ContentId, hosted: &Hosted) {
        if self.hoster(member).is_none() {
            return;
        }
        let record = hosted.named.as_ref().and_then(|(name, version)| {
            let named = &self.named[*self.by_name.get(name.as_str())? as usize];
            named.version(*version).map(|published| published.record.clone())
        });
        let held = if hosted.complete { HELD_ALL } else { 0 };
        self.host(member, &Item { id, size: hosted.size, held, name: record }, false);
    }

    /// What `member` hosts, as it was told to outlive a restart.
    pub fn durable_of(&self, member: MemberNumber) -> impl Iterator<Item = Durable> {
        let holds =
            self.hoster(member).into_iter().flat_map(|h| h.holds.iter().map(move |at| (h, at)));
        holds.map(move |(hoster, (slot, at))| {
            let content = &self.contents[*slot as usize];
            let named = hoster.named.get(slot);
            let named = named.map(|(n, v)| (self.named[*n as usize].name.clone(), *v));
            let complete = content.hosts[*at as usize].held == HELD_ALL;
            Durable::Hosted(member, content.id, Hosted { size: content.size, complete, named })
        })
    }

    fn contents_known(&self) -> usize {
        self.contents.len() - self.free.len()
    }

    fn hoster(&self, member: MemberNumber) -> Option<&Hoster> {
        self.hosters.get(member.0 as usize)?.as_deref()
    }

    fn hoster_mut(&mut self, member: MemberNumber) -> Option<&mut Hoster> {
        self.hosters.get_mut(member.0 as usize)?.as_deref_mut()
    }

    /// The slot of `id`, made if need be.
    fn slot_of(&mut self, id: ContentId) -> Slot {
        if let Some(slot) = self.by_id.get(&id) {
            return *slot;
        }
        let content =
            Content { id, size: 0, hosts: vec![], complete: 0, records: 0, names: vec![] };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.contents[slot as usize] = content;
                slot
            }
            None => {
                self.contents.push(content);
                self.contents.len() as Slot - 1
            }
        };
        self.by_id.insert(id, slot);
        slot
    }

    fn unhost(&mut self, member: MemberNumber, slot: Slot) {
        let Some(hoster) = self.hosters[member.0 as usize].as_deref_mut() else { return };
        let Some(at) = hoster.holds.get(&slot).copied() else { return };
        let named = hoster.named.remove(&slot);
        let content = &self.contents[slot as usize];
        let named = named.map(|(n, v)| (&self.named[n as usize].name, v));
        let part = digest_part(&content.id, content.size, named);
        hoster.digest = hoster.digest.wrapping_sub(part);
        let id = content.id;
        if content.hosts[at as usize].held == HELD_ALL {
            self.demote(slot, at);
        }
        if let Some(hoster) = self.hosters[member.0 as usize].as_deref_mut()
            && let Some(at) = hoster.holds.remove(&slot)
        {
            if hoster.holds.is_empty() {
                self.hosting -= 1;
            }
            let hosts = &mut self.contents[slot as usize].hosts;
            hosts.swap_remove(at as usize);
            if hosts.is_empty() {
                self.hosted -= 1;
            }
            if hosts.capacity() > 16 && hosts.len() * 4 < hosts.capacity() {
                hosts.shrink_to(hosts.len() * 2);
            }
            if let Some(moved) = hosts.get(at as usize).copied() {
                self.note_place(moved.member, slot, at);
            }
        }
        self.registrations -= 1;
        self.touch(slot);
        self.settle(slot);
        self.journal.push_back(Durable::Dropped(member, id));
    }

    /// Moves the partial host at `at` among the complete ones.
    fn promote(&mut self, slot: Slot, at: u32) {
        let content = &mut self.contents[slot as usize];
        let to = content.complete;
        content.complete += 1;
        self.swap_hosts(slot, at, to);
    }

    /// Moves the complete host at `at` among the partial ones.
    fn demote(&mut self, slot: Slot, at: u32) {
        let content = &mut self.contents[slot as usize];
        content.complete -= 1;
        let to = content.complete;
        self.swap_hosts(slot, at, to);
    }

    fn swap_hosts(&mut self, slot: Slot, a: u32, b: u32) {
        if a == b {
            return;
        }
        let hosts = &mut self.contents[slot as usize].hosts;
        hosts.swap(a as usize, b as usize);
        let (at_a, at_b) = (hosts[a as usize].member, hosts[b as usize].member);
        self.note_place(at_a, slot, a);
        self.note_place(at_b, slot, b);
    }

    fn note_place(&mut self, member: MemberNumber, slot: Slot, at: u32) {
        if let Some(hoster) = self.hoster_mut(member) {
            hoster.holds.insert(slot, at);
        }
    }

    /// Puts a content where it belongs after its hosts or names changed: among the nameless ones of
    /// the listing, or out of the catalog.
    fn settle(&mut self, slot: Slot) {
        let content = &self.contents[slot as usize];
        let (id, hosted) = (content.id, !content.hosts.is_empty());
        if hosted && content.names.is_empty() {
            self.nameless.insert(id, slot);
        } else {
            self.nameless.remove(&id);
        }
        if !hosted && content.records == 0 && self.by_id.remove(&id).is_some() {
            self.contents[slot as usize].hosts = vec![];
            self.free.push(slot);
        }
    }

    /// Panics where the catalog contradicts itself. O(everything): for tests and the simulator.
    pub fn check(&self) {
        let mut registrations = 0;
        let live = (0..self.contents.len() as Slot).filter(|slot| !self.free.contains(slot));
        for slot in live {
            let content = &self.contents[slot as usize];
            assert_eq!(self.by_id.get(&content.id), Some(&slot), "an id leads elsewhere");
            assert!(!content.hosts.is_empty() || content.records > 0, "an empty content stays");
            registrations += content.hosts.len();
            for (at, hosting) in content.hosts.iter().enumerate() {
                let hoster = self.hoster(hosting.member).expect("a host is not known");
                assert_eq!(hoster.holds.get(&slot), Some(&(at as u32)), "a host stands elsewhere");
                let among_complete = at < content.complete as usize;
                assert_eq!(hosting.held == HELD_ALL, among_complete, "complete hosts stand first");
            }
            let listed = !content.hosts.is_empty() && content.names.is_empty();
            assert_eq!(self.nameless.contains_key(&content.id), listed, "nameless, listed, or not");
        }
        assert_eq!(registrations, self.registrations, "registrations are miscounted");
        let hosted = self.contents.iter().filter(|c| !c.hosts.is_empty()).count();
        assert_eq!(hosted, self.hosted, "hosted contents are miscounted");
        assert_eq!(self.by_id.len(), self.contents_known(), "ids and contents differ in number");
        self.check_hosters();
        self.check_names();
    }

    fn check_hosters(&self) {
        let mut holds = 0;
        for hoster in self.hosters.iter().flatten() {
            holds += hoster.holds.len();
            let part = |slot: &Slot| {
                let content = &self.contents[*slot as usize];
                let named = hoster.named.get(slot);
                let named = named.map(|(n, v)| (&self.named[*n as usize].name, *v));
                digest_part(&content.id, content.size, named)
            };
            let digest = hoster.holds.keys().map(part).fold(0, u128::wrapping_add);
            assert_eq!(digest, hoster.digest, "a digest is not the sum of its parts");
            assert!(hoster.named.keys().all(|slot| hoster.holds.contains_key(slot)));
        }
        assert_eq!(holds, self.registrations, "a host holds what no content says");
        let hosting = self.hosters.iter().flatten().filter(|h| !h.holds.is_empty()).count();
        assert_eq!(hosting, self.hosting, "hosts are miscounted");
    }
}

/// A refusal without a cookie.
pub(crate) fn refuse(code: Code, text: impl Into<String>) -> Refusal {
    Refusal { code, text: text.into(), cookie: None }
}

/// A hash that members cannot aim at one bucket, seeded by dice rather than by the machine.
#[derive(Clone, Copy)]
struct Seeded([u64; 2]);

struct SeededHasher {
    state: u64,
    key: u64,
}

impl BuildHasher for Seeded {
    type Hasher = SeededHasher;
    fn build_hasher(&self) -> SeededHasher {
        SeededHasher { state: self.0[0], key: self.0[1] | 1 }
    }
}

impl SeededHasher {
    /// One folded 128-bit product (the step of wyhash).
    fn mix(&mut self, word: u64) {
        let product = u128::from(self.state ^ word) * u128::from(self.key ^ word.rotate_left(32));
        self.state = (product as u64 ^ (product >> 64) as u64).wrapping_add(self.key);
    }
}

impl Hasher for SeededHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.mix(u64::from_le_bytes(*word)));
        rest.iter().for_each(|byte| self.mix(u64::from(*byte)));
    }
    fn write_u64(&mut self, n: u64) {
        self.mix(n);
    }
    fn write_usize(&mut self, n: usize) {
        self.mix(n as u64);
    }
    fn write_isize(&mut self, n: isize) {
        self.mix(n as u64);
    }
    fn finish(&self) -> u64 {
        self.state
    }
}
