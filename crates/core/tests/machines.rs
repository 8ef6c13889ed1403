//! The swarm and the sharing machine, driven from outside with whatever may happen, in any order.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{PeerId, Piece};
use potluck_core::layout::Layout;
use potluck_core::sharing::{self, Sharing};
use potluck_core::swarm::{self, Arrived, Host, Swarm};
use potluck_core::time::{Duration, Moment};
use proptest::prelude::*;

const PIECES: u32 = 40;

fn layout() -> Arc<Layout> {
    Arc::new(Layout::new([u64::from(PIECES) << 16]).unwrap())
}

/// Something that may happen to a fetcher.
#[derive(Clone, Debug)]
enum Happens {
    Comes(u32),
    Shows(u32, BTreeSet<u32>),
    Grants(u32, BTreeSet<u32>),
    Loses(u32, u32),
    Busy(u32, u64),
    Sends(u32, u8),
    Goes(u32),
    Waits(u64),
    DiskFull(bool),
}

fn happens() -> impl Strategy<Value = Happens> {
    let host = 0u32..5;
    let pieces = || prop::collection::btree_set(0..PIECES, 0..12);
    prop_oneof![
        2 => host.clone().prop_map(Happens::Comes),
        4 => (host.clone(), pieces()).prop_map(|(h, p)| Happens::Shows(h, p)),
        2 => (host.clone(), pieces()).prop_map(|(h, p)| Happens::Grants(h, p)),
        1 => (host.clone(), 0..PIECES).prop_map(|(h, p)| Happens::Loses(h, p)),
        1 => (host.clone(), 0u64..3_000).prop_map(|(h, ms)| Happens::Busy(h, ms)),
        9 => (host.clone(), 0u8..12).prop_map(|(h, how)| Happens::Sends(h, how)),
        1 => host.prop_map(Happens::Goes),
        4 => (0u64..2_000).prop_map(Happens::Waits),
        1 => any::<bool>().prop_map(Happens::DiskFull),
    ]
}

/// What the world knows of a host, to hold the swarm's asks against.
#[derive(Default)]
struct Known {
    offered: BTreeSet<u32>,
    asked: Vec<u32>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_swarm_asks_only_for_what_it_misses_of_those_who_have_it(
        story in prop::collection::vec(happens(), 1..250),
        dice in any::<u64>(),
    ) {
        let mut swarm = Swarm::new(layout(), Bitfield::none(PIECES), dice);
        let mut now = Moment::from_micros(1);
        let mut hosts: BTreeMap<u32, Known> = BTreeMap::new();
        let mut held = BTreeSet::new();
        for event in story {
            match event {
                Happens::Comes(h) if !hosts.contains_key(&h) => {
                    hosts.insert(h, Known::default());
                    swarm.on_host(now, Host(h));
                }
                Happens::Shows(h, pieces) => if let Some(known) = hosts.get_mut(&h) {
                    known.offered.extend(&pieces);
                    let pieces: Vec<Piece> = pieces.into_iter().map(Piece).collect();
                    swarm.on_have_more(now, Host(h), &pieces);
                },
                Happens::Grants(h, pieces) => if let Some(known) = hosts.get_mut(&h) {
                    known.offered.extend(&pieces);
                    let pieces: Vec<Piece> = pieces.into_iter().map(Piece).collect();
                    swarm.on_granted(now, Host(h), &pieces);
                },
                Happens::Loses(h, piece) => if let Some(known) = hosts.get_mut(&h) {
                    known.asked.retain(|p| *p != piece);
                    known.offered.remove(&piece);
                    swarm.on_lost(now, Host(h), &[Piece(piece)]);
                },
                Happens::Busy(h, ms) => if let Some(known) = hosts.get_mut(&h) {
                    let refused: Vec<Piece> = known.asked.drain(..).map(Piece).collect();
                    swarm.on_busy(now, Host(h), &refused, Duration::from_millis(ms));
                },
                Happens::Sends(h, how) => if let Some(known) = hosts.get_mut(&h)
                    && !known.asked.is_empty()
                {
                    let piece = known.asked.remove(0);
                    let arrived = match how {
                        0 => Arrived::Bad,
                        1 => Arrived::Failed,
                        _ if held.insert(piece) => Arrived::New,
                        _ => Arrived::Duplicate,
                    };
                    swarm.on_piece(now, Host(h), Piece(piece), arrived);
                },
                Happens::Goes(h) => if hosts.remove(&h).is_some() {
                    swarm.on_gone(now, Host(h));
                },
                Happens::Waits(ms) => now = now + Duration::from_millis(ms),
                Happens::DiskFull(true) => swarm.pause(now),
                Happens::DiskFull(false) => swarm.resume(now),
                Happens::Comes(_) => {}
            }
            swarm.tick(now);
            swarm.check();
            while let Some(output) = swarm.poll_output() {
                match output {
                    swarm::Output::Ask { host, pieces } => {
                        let known = hosts.get_mut(&host.0);
                        prop_assert!(known.is_some(), "asked {host:?}, who is gone");
                        let known = known.unwrap();
                        for piece in pieces {
                            prop_assert!(known.offered.contains(&piece.0), "{host:?} never offered {piece:?}");
                            prop_assert!(!held.contains(&piece.0), "{piece:?} is here already");
                            prop_assert!(!known.asked.contains(&piece.0), "{piece:?} was asked twice");
                            known.asked.push(piece.0);
                        }
                    }
                    swarm::Output::Cancel { host, pieces } => {
                        if let Some(known) = hosts.get_mut(&host.0) {
                            known.asked.retain(|p| !pieces.contains(&Piece(*p)));
                        }
                    }
                    swarm::Output::Drop { host, .. } => {
                        hosts.remove(&host.0);
                        swarm.on_gone(now, host);
                    }
                    swarm::Output::Announce(pieces) => {
                        prop_assert!(pieces.iter().all(|p| held.contains(&p.0)));
                    }
                    swarm::Output::Complete => prop_assert_eq!(held.len(), PIECES as usize),
                    swarm::Output::NeedHosts => {}
                }
                swarm.check();
            }
            for piece in 0..PIECES {
                let copies = hosts.values().filter(|k| k.asked.contains(&piece)).count();
                prop_assert!(copies <= 2, "{copies} copies of piece {piece} are under way");
            }
        }
        prop_assert_eq!(swarm.have().count() as usize, held.len());
    }

    #[test]
    fn a_sharer_serves_what_was_wanted_and_nothing_else(
        story in prop::collection::vec((0u32..4, 0u8..10, prop::collection::btree_set(0..PIECES, 1..6), 0u64..400), 1..200),
        dice in any::<u64>(),
        seed in any::<bool>(),
    ) {
        let mut sharing = Sharing::new(dice);
        let mut now = Moment::from_micros(1);
        sharing.add(9, layout(), &Bitfield::all(PIECES), seed);
        let mut open = BTreeSet::new();
        let mut wanted: BTreeSet<(u32, u32)> = BTreeSet::new();
        let mut serving: Vec<(u32, u32)> = vec![];
        for (h, what, pieces, ms) in story {
            let list: Vec<Piece> = pieces.iter().copied().map(Piece).collect();
            match what {
                0 | 1 => if open.insert(h) {
                    sharing.on_host(now, Host(h), PeerId([h as u8; 32]));
                    sharing.on_open(now, Host(h), 9);
                },
                2..=5 => if open.contains(&h) {
                    let fresh: Vec<Piece> = list.into_iter()
                        .filter(|p| !wanted.contains(&(h, p.0)) && !serving.contains(&(h, p.0)))
                        .collect();
                    wanted.extend(fresh.iter().map(|p| (h, p.0)));
                    sharing.on_want(now, Host(h), 9, &fresh);
                },
                6 => if open.contains(&h) {
                    wanted.retain(|(host, p)| *host != h || !pieces.contains(p));
                    sharing.on_cancel(now, Host(h), 9, &list);
                },
                7 => if open.contains(&h) {
                    sharing.on_their_have_more(now, Host(h), 9, &list);
                },
                8 => if open.remove(&h) {
                    wanted.retain(|(host, _)| *host != h);
                    serving.retain(|(host, _)| *host != h);
                    sharing.on_closed(now, Host(h), 9);
                    sharing.on_gone(now, Host(h));
                },
                _ => now = now + Duration::from_millis(ms),
            }
            // The sockets take everything at once.
            loop {
                for (host, piece) in serving.drain(..) {
                    sharing.on_sent(now, Host(host), 9, Piece(piece));
                }
                sharing.tick(now);
                sharing.check();
                while let Some(output) = sharing.poll_output() {
                    match output {
                        sharing::Output::Serve { host, content, piece } => {
                            prop_assert_eq!(content, 9);
                            prop_assert!(wanted.remove(&(host.0, piece.0)), "{host:?} did not want {piece:?}");
                            serving.push((host.0, piece.0));
                        }
                        sharing::Output::Busy { host, pieces, .. } => {
                            for piece in pieces {
                                prop_assert!(wanted.remove(&(host.0, piece.0)));
                            }
                        }
                        sharing::Output::Grant { host, .. } | sharing::Output::ShowHave { host, .. } => {
                            prop_assert!(open.contains(&host.0));
                        }
                    }
                }
                if serving.is_empty() {
                    break;
                }
            }
        }
        prop_assert!(wanted.is_empty(), "with free sockets nobody is left waiting: {wanted:?}");
    }
}
