//! Owns what members say of hosts that did not answer them, or sent what did not verify. Never believes
//! one alone: a host sinks where several say so, and comes up again when it was a while ago.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::MemberNumber;
use crate::time::{Duration, Moment};

/// Members that must say so: one alone could sink whom it likes.
const ENOUGH: usize = 2;
/// How long what was said counts.
const COUNTS: Duration = Duration::from_secs(600);
/// Hosts that one member's word counts against at once: two that conspire sink these few.
const MOST: usize = 16;

/// Who says what of whom.
#[derive(Default)]
pub(super) struct Blames {
    /// Of a host, by a member: until when it counts.
    all: BTreeMap<(MemberNumber, MemberNumber), Moment>,
    /// The same by the time of its end.
    ends: BTreeSet<(Moment, MemberNumber, MemberNumber)>,
    /// How many hosts each member speaks against.
    said: BTreeMap<MemberNumber, usize>,
}

impl Blames {
    /// `by` says that `host` is of no use.
    pub(super) fn add(&mut self, now: Moment, host: MemberNumber, by: MemberNumber) {
        let until = now + COUNTS;
        if let Some(before) = self.all.get_mut(&(host, by)) {
            self.ends.remove(&(*before, host, by));
            *before = until;
        } else {
            let said = self.said.entry(by).or_default();
            if *said >= MOST {
                return;
            }
            *said += 1;
            self.all.insert((host, by), until);
        }
        self.ends.insert((until, host, by));
    }

    /// Whether enough say so.
    pub(super) fn sinks(&self, host: MemberNumber) -> bool {
        let all = (host, MemberNumber(0))..=(host, MemberNumber(u32::MAX));
        self.all.range(all).take(ENOUGH).count() >= ENOUGH
    }

    /// When [`Blames::lapse`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Moment> {
        self.ends.first().map(|(end, ..)| *end)
    }

    /// Forgets one thing that was said too long ago; of which host.
    pub(super) fn lapse(&mut self, now: Moment) -> Option<MemberNumber> {
        let (_, host, by) = *self.ends.first().filter(|(end, ..)| *end <= now)?;
        self.ends.pop_first();
        self.all.remove(&(host, by));
        if let Some(said) = self.said.get_mut(&by) {
            *said -= 1;
            if *said == 0 {
                self.said.remove(&by);
            }
        }
        Some(host)
    }

    pub(super) fn check(&self) {
        let ends: BTreeSet<_> =
            self.all.iter().map(|((host, by), end)| (*end, *host, *by)).collect();
        assert_eq!(ends, self.ends, "what was said never ends, or ends twice");
        let mut said: BTreeMap<MemberNumber, usize> = BTreeMap::new();
        self.all.keys().for_each(|(_, by)| *said.entry(*by).or_default() += 1);
        assert_eq!(said, self.said, "what a member said is miscounted");
        assert!(said.values().all(|said| *said <= MOST));
    }
}
