//! Owns one peer of the world: its machines, and what its program would know. Never another's.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::{Nanos, Person};
use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::id::{PeerId, Piece};
use crate::layout::Layout;
use crate::sharing::{self, Sharing};
use crate::swarm::{self, Swarm};
use crate::time::Duration;

pub(super) struct Peer {
    pub(super) person: Person,
    pub(super) alive: bool,
    pub(super) swarms: Vec<(u32, Swarm)>,
    pub(super) sharing: Sharing,
    /// Connections: to whom, and our way of it.
    pub(super) ways: BTreeMap<u32, u32>,
    /// Hosts heard of, and when they may be dialled.
    pub(super) known: BTreeMap<u32, Nanos>,
    pub(super) banned: BTreeSet<u32>,
    pub(super) next_search: Nanos,
    /// It looks now and then whether it has hosts enough.
    pub(super) tending: bool,
    /// Contents it told the index of.
    pub(super) registered: BTreeSet<u32>,
    /// Ways that have something for the uplink, and the one it is busy with until then.
    pub(super) ring: VecDeque<u32>,
    pub(super) on_line: Option<u32>,
    pub(super) free_at: Nanos,
    /// Bytes said besides pieces, which the uplink still owes time for.
    pub(super) owed: u64,
    pub(super) downlink_free: Nanos,
    /// When its machines' deadlines were looked at last, and when they will be.
    pub(super) looked: Nanos,
    pub(super) tick_at: Option<Nanos>,
    pub(super) served: u32,
    pub(super) sent: u64,
    pub(super) duplicate: u64,
    pub(super) copies_at: Vec<Duration>,
    /// When a new piece came last, and the longest time that one was waited for.
    pub(super) last_new: Nanos,
    pub(super) waited: Nanos,
    pub(super) nearly: Option<Duration>,
    pub(super) done: Option<Duration>,
    /// What its sharing and fetching counted in former lives.
    pub(super) past: sharing::Counts,
    pub(super) fetched: swarm::Counts,
}

impl Peer {
    pub(super) fn new(person: &Person, layouts: &[Arc<Layout>], dice: &mut Dice) -> Self {
        Self::resumed(person, layouts, &BTreeMap::new(), dice)
    }

    /// A peer whose store holds so much of what it wants.
    pub(super) fn resumed(
        person: &Person,
        layouts: &[Arc<Layout>],
        stores: &BTreeMap<u32, Bitfield>,
        dice: &mut Dice,
    ) -> Self {
        let mut sharing = Sharing::new(dice.next());
        let mut swarms = Vec::new();
        for content in &person.holds {
            let layout = &layouts[*content as usize];
            let all = Bitfield::all(layout.pieces());
            sharing.add(*content, Arc::clone(layout), &all, true);
        }
        for content in &person.wants {
            let layout = &layouts[*content as usize];
            let none = || Bitfield::none(layout.pieces());
            let have = stores.get(content).cloned().unwrap_or_else(none);
            sharing.add(*content, Arc::clone(layout), &have, false);
            swarms.push((*content, Swarm::new(Arc::clone(layout), have, dice.next())));
        }
        Self {
            person: person.clone(),
            alive: false,
            swarms,
            sharing,
            ways: BTreeMap::new(),
            known: BTreeMap::new(),
            banned: BTreeSet::new(),
            next_search: 0,
            tending: false,
            registered: BTreeSet::new(),
            ring: VecDeque::new(),
            on_line: None,
            free_at: 0,
            owed: 0,
            downlink_free: 0,
            looked: 0,
            tick_at: None,
            served: 0,
            sent: 0,
            duplicate: 0,
            copies_at: Vec::new(),
            last_new: 0,
            waited: 0,
            nearly: None,
            done: person.wants.is_empty().then_some(Duration::ZERO),
            past: sharing::Counts::default(),
            fetched: swarm::Counts::default(),
        }
    }

    /// When its machines are due.
    pub(super) fn due(&mut self, now: Nanos) -> Option<Nanos> {
        self.looked = now;
        let due = self.swarms.iter().filter_map(|(_, s)| s.next_deadline());
        due.chain(self.sharing.next_deadline()).min().map(|at| at.as_micros() * 1_000)
    }

    /// Honest, come or to come, and not complete.
    pub(super) fn is_waited_for(&self) -> bool {
        self.done.is_none() && self.person.nature.is_honest()
    }

    pub(super) fn swarm(&mut self, content: u32) -> Option<&mut Swarm> {
        self.swarms.iter_mut().find(|(c, _)| *c == content).map(|(_, swarm)| swarm)
    }

    pub(super) fn have(&self, content: u32) -> Option<&Bitfield> {
        self.swarms.iter().find(|(c, _)| *c == content).map(|(_, swarm)| swarm.have())
    }

    pub(super) fn shares(&self, content: u32) -> bool {
        self.person.holds.contains(&content) || self.have(content).is_some()
    }

    pub(super) fn holds(&self, content: u32, piece: Piece) -> bool {
        self.person.holds.contains(&content) || self.have(content).is_some_and(|h| h.has(piece))
    }

    /// What it says it holds.
    pub(super) fn claims(&self, content: u32, pieces: u32) -> Bitfield {
        match self.have(content) {
            Some(have) if self.person.nature.is_honest() => have.clone(),
            _ => Bitfield::all(pieces),
        }
    }

    /// Contents it still wants.
    pub(super) fn wanting(&self) -> Vec<u32> {
        self.swarms.iter().filter(|(_, s)| !s.is_complete()).map(|(c, _)| *c).collect()
    }

    /// Pieces it holds of what it wants, and all of these.
    pub(super) fn progress(&self) -> (u32, u32) {
        self.swarms
            .iter()
            .fold((0, 0), |(held, all), (_, s)| (held + s.have().count(), all + s.have().len()))
    }
}

pub(super) fn peer_id(p: u32) -> PeerId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&Dice(p.into()).next().to_be_bytes());
    id[8..12].copy_from_slice(&p.to_be_bytes());
    PeerId(id)
}
