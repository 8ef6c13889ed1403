//! Owns names: who owns each, its versions, which content each version is. Never checks a
//! signature itself.

use std::collections::BTreeMap;

use crate::id::{Name, PeerId, Version};
use crate::trust::NameRecord;
use crate::wire::datagram::{Code, Refusal, Target};

use super::{Catalog, Durable, Slot, refuse};

/// A name: its first publisher owns it for good, and only its versions rise.
pub(super) struct Named {
    pub(super) name: Name,
    pub(super) owner: PeerId,
    /// In their order; never empty, and the last is the newest.
    pub(super) versions: Vec<Published>,
}

/// A version of a name.
pub(super) struct Published {
    pub(super) record: NameRecord,
    /// Of its content, which is known for as long as the version is.
    pub(super) slot: Slot,
}

impl Named {
    pub(super) fn newest(&self) -> Option<&Published> {
        self.versions.last()
    }

    pub(super) fn version(&self, version: Version) -> Option<&Published> {
        self.place_of(version).ok().map(|at| &self.versions[at])
    }

    /// Where this version stands, or where it belongs.
    fn place_of(&self, version: Version) -> Result<usize, usize> {
        self.versions.binary_search_by_key(&version, |published| published.record.version)
    }
}

/// What a record is to a catalog that would take it.
pub(super) struct Weighed {
    /// This version is known, and is this content.
    pub(super) known: bool,
    /// Known to the last byte: its signature was verified before.
    pub(super) same_bytes: bool,
}

impl Catalog {
    /// Whether `record`, if its signature holds, may stand in the catalog.
    ///
    /// A version below the newest is taken where it is a piece of history (signed no later than the
    /// version that follows it): a host brings it along to an index that lost its file.
    pub(super) fn weigh(&self, record: &NameRecord) -> Result<Weighed, Refusal> {
        let Some(&at) = self.by_name.get(record.name.as_str()) else {
            if self.named.len() >= self.limits.names {
                return Err(refuse(Code::Full, "the index holds no more names"));
            }
            return self.room_for_record(record);
        };
        let named = &self.named[at as usize];
        if named.owner != record.publisher {
            return Err(refuse(Code::NameTaken, "another machine owns this name"));
        }
        let place = match named.place_of(record.version) {
            Ok(at) => {
                let known = &named.versions[at].record;
                if known.id != record.id {
                    return Err(stale(named));
                }
                return Ok(Weighed { known: true, same_bytes: known == record });
            }
            Err(place) => place,
        };
        if let Some(later) = named.versions.get(place)
            && record.time > later.record.time
        {
            return Err(stale(named));
        }
        if named.versions.len() >= self.limits.versions_a_name && self.forgettable(named).is_none()
        {
            return Err(refuse(Code::Quota, "this name has as many versions as it may"));
        }
        self.room_for_record(record)
    }

    fn room_for_record(&self, record: &NameRecord) -> Result<Weighed, Refusal> {
        let slot = self.by_id.get(&record.id);
        let names = slot.map_or(0, |slot| self.contents[*slot as usize].names.len());
        let signed = self.signed.get(&record.publisher).copied().unwrap_or(0);
        if signed >= self.limits.records_a_publisher {
            Err(refuse(Code::Quota, "its publisher signed too many versions"))
        } else if self.records >= self.limits.records {
            Err(refuse(Code::Full, "the index holds no more versions"))
        } else if names >= self.limits.names_a_content {
            Err(refuse(Code::Quota, "this content has too many names"))
        } else {
            Ok(Weighed { known: false, same_bytes: false })
        }
    }

    /// The oldest version that nobody hosts, but never the newest one.
    fn forgettable(&self, named: &Named) -> Option<Version> {
        let (_, older) = named.versions.split_last()?;
        let unhosted =
            |published: &&Published| self.contents[published.slot as usize].hosts.is_empty();
        older.iter().find(unhosted).map(|published| published.record.version)
    }

    /// Enters a record that was weighed and verified, and is new.
    pub(super) fn publish(&mut self, record: &NameRecord, journal: bool) {
        let at = match self.by_name.get(record.name.as_str()) {
            Some(at) => *at,
            None => {
                let at = self.named.len() as u32;
                let (name, owner) = (record.name.clone(), record.publisher);
                self.by_name.insert(name.clone(), at);
                self.names.insert(name.clone(), at);
                // Most names have one version: do not begin with four.
                self.named.push(Named { name, owner, versions: Vec::with_capacity(1) });
                at
            }
        };
        if self.named[at as usize].versions.len() >= self.limits.versions_a_name
            && let Some(version) = self.forgettable(&self.named[at as usize])
        {
            self.forget(at, version);
        }
        let slot = self.slot_of(record.id);
        self.contents[slot as usize].records += 1;
        self.records += 1;
        *self.signed.entry(record.publisher).or_default() += 1;
        let named = &mut self.named[at as usize];
        let before = named.newest().map(|newest| (newest.record.version, newest.slot));
        let (Ok(place) | Err(place)) = named.place_of(record.version);
        named.versions.insert(place, Published { record: record.clone(), slot });
        match before {
            Some((newest, _)) if newest > record.version => {} // a piece of history
            Some((_, before)) if before == slot => self.touch(slot),
            before => {
                if let Some((_, before)) = before {
                    self.detach(at, before);
                }
                self.attach(at, slot);
            }
        }
        if journal {
            self.journal.push_back(Durable::Record(record.clone()));
        }
    }

    /// Enters a record that outlived a restart.
    pub fn restore_record(&mut self, record: &NameRecord) {
        if self.weigh(record).is_ok_and(|weighed| !weighed.known) {
            self.publish(record, false);
        }
    }

    /// The versions of the `nth` name there ever was, as they were told to outlive a restart; `None`
    /// where there were not so many.
    pub fn durable_names(&self, nth: usize) -> Option<impl Iterator<Item = Durable>> {
        self.named.get(nth).map(|named| {
            named.versions.iter().map(|published| Durable::Record(published.record.clone()))
        })
    }

    /// Whether exactly this record is known.
    pub fn has_record(&self, record: &NameRecord) -> bool {
        let named = self.by_name.get(record.name.as_str()).map(|at| &self.named[*at as usize]);
        let known = named.and_then(|named| named.version(record.version));
        known.is_some_and(|known| known.record == *record)
    }

    fn forget(&mut self, at: u32, version: Version) {
        let named = &mut self.named[at as usize];
        let Ok(place) = named.place_of(version) else { return };
        let Published { record, slot } = named.versions.remove(place);
        self.records -= 1;
        if let Some(signed) = self.signed.get_mut(&record.publisher) {
            *signed -= 1;
        }
        self.contents[slot as usize].records -= 1;
        self.settle(slot);
        self.journal.push_back(Durable::Forgotten(record.name, version));
    }

    /// The name at `at` no longer stands at the content at `slot`: that row is gone, and where it was
    /// the content's only name, the nameless row comes.
    fn detach(&mut self, at: u32, slot: Slot) {
        self.touch(slot);
        let content = &mut self.contents[slot as usize];
        content.names.retain(|name| *name != at);
        self.settle(slot);
        if self.contents[slot as usize].names.is_empty() {
            self.touch(slot);
        }
    }

    /// The name at `at` now stands at the content at `slot`.
    fn attach(&mut self, at: u32, slot: Slot) {
        if self.contents[slot as usize].names.is_empty() {
            self.touch(slot); // its nameless row goes
        }
        self.contents[slot as usize].names.push(at);
        self.settle(slot);
        self.touch(slot);
    }

    /// Which content `target` means, and by which record. The refusal says what there is instead.
    pub(super) fn resolve(&self, target: &Target) -> Result<(Slot, Option<&NameRecord>), Refusal> {
        match target {
            Target::Id(id) => match self.by_id.get(id) {
                None => Err(not_found(format!("no machine offers {}", id.short()))),
                Some(&slot) if self.contents[slot as usize].hosts.is_empty() => {
                    let text = "is known, but no machine that hosts it is up: wait, or start one";
                    Err(refuse(Code::NoHosts, format!("{} {text}", id.short())))
                }
                Some(&slot) => Ok((slot, None)),
            },
            Target::Name(name, version) => self.resolve_name(name, *version),
        }
    }

    fn resolve_name(
        &self,
        name: &Name,
        version: Option<Version>,
    ) -> Result<(Slot, Option<&NameRecord>), Refusal> {
        let Some(&at) = self.by_name.get(name.as_str()) else {
            return Err(not_found(format!("nothing is named {}", shown(name))));
        };
        let named = &self.named[at as usize];
        let hosted =
            |published: &&Published| !self.contents[published.slot as usize].hosts.is_empty();
        let found = version.map_or_else(|| named.newest(), |version| named.version(version));
        if let Some(Published { record, slot }) = found.filter(hosted) {
            return Ok((*slot, Some(record)));
        }
        let shown = shown(name);
        let newest = named.newest().map_or(Version(0), |newest| newest.record.version);
        let asked = version.unwrap_or(newest);
        if found.is_none() {
            let text = format!("{shown} has no version @{asked}; its newest is @{newest}");
            return Err(not_found(text));
        }
        let which = if asked == newest { "newest " } else { "" };
        let what = format!("{shown} exists, but its {which}version @{asked} has no host now");
        Err(refuse(
            Code::NoHosts,
            match named.versions.iter().rev().find(hosted) {
                Some(Published { record: NameRecord { version, .. }, .. }) => {
                    format!("{what}; @{version} has: ask for {shown}@{version}")
                }
                None => format!("{what}, nor has any other: wait, or start a machine that has it"),
            },
        ))
    }

    pub(super) fn check_names(&self) {
        let mut records = 0;
        let mut signed: BTreeMap<PeerId, usize> = BTreeMap::new();
        for (at, named) in self.named.iter().enumerate() {
            assert_eq!(self.by_name.get(named.name.as_str()), Some(&(at as u32)));
            let newest = named.newest().expect("a name has no version");
            let names = &self.contents[newest.slot as usize].names;
            assert!(names.contains(&(at as u32)), "a content does not know its name");
            assert!(named.versions.is_sorted_by(|a, b| a.record.version < b.record.version));
            for Published { record, slot } in &named.versions {
                assert_eq!(record.publisher, named.owner);
                assert_eq!(self.by_id.get(&record.id), Some(slot), "a version's content moved");
                *signed.entry(record.publisher).or_default() += 1;
                records += 1;
            }
        }
        assert!(self.names.len() == self.by_name.len(), "names stand in one order only");
        assert!(self.names.iter().all(|(name, at)| self.by_name.get(name) == Some(at)));
        assert_eq!(records, self.records, "records are miscounted");
        let counted = self.signed.iter().filter(|(_, n)| **n > 0).map(|(p, n)| (*p, *n));
        assert!(signed.into_iter().eq(counted), "a publisher's records are miscounted");
        let pointers: usize = self.contents.iter().map(|c| c.records as usize).sum();
        assert_eq!(pointers, self.records, "contents and names disagree about records");
        let rows: usize = self.contents.iter().map(|c| c.names.len()).sum();
        assert_eq!(rows, self.named.len(), "a name stands at two contents, or at none");
    }
}

fn stale(named: &Named) -> Refusal {
    let newest = named.newest().map_or(0, |newest| newest.record.version.0);
    refuse(Code::StaleVersion, format!("it stands at @{newest}: publish a newer one"))
}

fn not_found(text: String) -> Refusal {
    refuse(Code::NotFound, text)
}

/// A name as it fits into the text of a refusal.
fn shown(name: &Name) -> String {
    const MOST: usize = 60;
    if name.as_str().chars().count() <= MOST {
        return name.to_string();
    }
    name.as_str().chars().take(MOST).chain(['…']).collect()
}
