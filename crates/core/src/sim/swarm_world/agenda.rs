//! Owns what is to happen when. Never knows what it is.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

use super::Nanos;

/// Events within so many nanoseconds (a power of two) lie together, unsorted until their time comes.
const SLOT: u32 = 16;
/// So many slots (a power of two) are a second or so; what is later waits apart.
const SLOTS: usize = 1 << 14;

struct Entry<E> {
    at: Nanos,
    number: u64,
    event: E,
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    /// The earliest is the greatest, for [`BinaryHeap`]; of one moment, what was planned first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// Events in the order of their time, then of their planning. A calendar queue (Brown 1988): of
/// millions of events only those of the slot at hand are kept in order.
pub(super) struct Agenda<E> {
    slots: Vec<Vec<Entry<E>>>,
    /// The slot at hand, numbered from the beginning of the world, and its events.
    slot: u64,
    at_hand: BinaryHeap<Entry<E>>,
    later: BTreeMap<u64, Vec<Entry<E>>>,
    /// Events in `slots`.
    near: usize,
    planned: u64,
}

impl<E> Agenda<E> {
    pub(super) fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
            slot: 0,
            at_hand: BinaryHeap::new(),
            later: BTreeMap::new(),
            near: 0,
            planned: 0,
        }
    }

    /// Not before the time of the event taken last.
    pub(super) fn plan(&mut self, at: Nanos, event: E) {
        self.planned += 1;
        let entry = Entry { at, number: self.planned, event };
        let slot = at >> SLOT;
        if slot <= self.slot {
            self.at_hand.push(entry);
        } else if slot - self.slot < SLOTS as u64 {
            self.near += 1;
            self.slots[slot as usize % SLOTS].push(entry);
        } else {
            self.later.entry(slot).or_default().push(entry);
        }
    }

    pub(super) fn next(&mut self) -> Option<(Nanos, E)> {
        self.turn();
        self.at_hand.pop().map(|entry| (entry.at, entry.event))
    }

    /// Has the next event at hand, if there is one.
    fn turn(&mut self) {
        while self.at_hand.is_empty() {
            let next = match (self.near, self.later.first_key_value()) {
                (0, None) => return,
                (0, Some((first, _))) => *first,
                _ => self.slot + 1,
            };
            self.turn_to(next);
        }
    }

    /// When the next event is.
    pub(super) fn peek(&mut self) -> Option<Nanos> {
        self.turn();
        self.at_hand.peek().map(|entry| entry.at)
    }

    fn turn_to(&mut self, slot: u64) {
        self.slot = slot;
        let mut events = std::mem::take(&mut self.slots[slot as usize % SLOTS]);
        self.near -= events.len();
        if let Some(mut waited) = self.later.remove(&slot) {
            events.append(&mut waited);
        }
        self.at_hand = events.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn events_come_in_the_order_of_time_and_then_of_planning(
            waits in prop::collection::vec((0u64..3_000_000_000, 0u8..3), 1..200),
        ) {
            let (mut agenda, mut plain, mut now) = (Agenda::new(), BTreeMap::new(), 0);
            for (n, (wait, takes)) in waits.into_iter().enumerate() {
                agenda.plan(now + wait, n);
                plain.insert((now + wait, n), ());
                for _ in 0..takes {
                    let first = plain.pop_first().map(|(key, ())| key);
                    prop_assert_eq!(agenda.next(), first);
                    now = first.map_or(now, |(at, _)| at);
                }
            }
            while let Some((key, ())) = plain.pop_first() {
                prop_assert_eq!(agenda.next(), Some(key));
            }
            prop_assert_eq!(agenda.next(), None);
        }
    }
}
