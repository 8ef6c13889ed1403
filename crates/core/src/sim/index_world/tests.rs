use super::*;
use crate::wire::datagram::{HELD_ALL, Target};

impl IndexWorld {
    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.next_at().filter(|next| *next < end) {
            self.step_at(next);
        }
        self.advance(end);
    }
}

#[test]
fn after_fifty_troubled_worlds_everybody_believes_what_is_true() {
    let mut all = Story::default();
    for seed in 0..50 {
        let story = std::panic::catch_unwind(|| run(seed, Plan::default()));
        let story = story.unwrap_or_else(|_| panic!("in the world of seed {seed}"));
        all.lost += story.lost;
        all.overtaken += story.overtaken;
        all.repeats += story.repeats;
        all.lapsed += story.lapsed;
        all.restarts += story.restarts;
        all.relists += story.relists;
        all.rows += story.rows;
        all.steps += story.steps;
    }
    // The troubles were real ones, and were healed, not avoided.
    assert!(all.lost > 1_000 && all.repeats > 50 && all.lapsed > 50, "{all:?}");
    assert!(all.overtaken > 10, "{all:?}");
    assert!(all.restarts > 50 && all.relists > 100 && all.rows > 300, "{all:?}");
}

/// A peer that shares nothing says so, and the index forgets what it may have had of it. Where that
/// was lost, it was said again after the first share was acknowledged, which was then missing until
/// the next heartbeat.
#[test]
fn what_was_acknowledged_is_there_from_then_on_whatever_is_lost_on_the_way() {
    let mut acknowledged = 0;
    for seed in 0..40 {
        let mut world = IndexWorld::new(seed, Plan { deaths: false, ..Plan::default() });
        let mut ever = BTreeSet::new();
        while world.step(Moment::ZERO + world.plan.troubled) && !world.mended {
            let there = world.catalog().hosts();
            for machine in &world.machines {
                let peer = machine.key.peer();
                let told = machine.registered.iter().filter(|id| machine.hosts.contains_key(id));
                for id in told {
                    let missing = !there.get(id).is_some_and(|hosts| hosts.contains_key(&peer));
                    assert!(!missing, "seed {seed}, {:?}: {id:?} of {peer:?}", world.now);
                    ever.insert((peer, *id));
                }
            }
        }
        acknowledged += ever.len();
    }
    assert!(acknowledged > 500, "{acknowledged}");
}

#[test]
fn a_restarted_index_lists_what_a_thousand_peers_host_at_once_or_after_a_heartbeat_without_its_file()
 {
    const PEERS: usize = 1_000;
    const CONTENTS: usize = 50;
    let quiet = Plan { machines: PEERS, lost: 0, doubled: 0, late: 0, ..Plan::default() };
    let mut world =
        IndexWorld::new(8, Plan { deaths: false, alone: false, check_every: 4_000, ..quiet });
    for at in 0..PEERS {
        world.machines[at].role = Role::Publish;
        for n in 0..CONTENTS {
            let id = ContentId::file(
                *blake3::hash(&((at * CONTENTS + n) as u64).to_be_bytes()).as_bytes(),
            );
            world.host(at, Item { id, size: 1 + n as u64, held: HELD_ALL, name: None });
        }
    }
    let listed = |world: &IndexWorld| world.catalog().counts().registrations;
    world.run_for(HEARTBEAT * 4);
    assert_eq!(listed(&world), PEERS * CONTENTS);
    world.index_up(Saved::All);
    assert_eq!(listed(&world), PEERS * CONTENTS, "with its file all is there at once");
    world.run_for(HEARTBEAT * 7 / 2);
    assert_eq!(listed(&world), PEERS * CONTENTS, "nothing lapsed: everybody was heard again");
    world.index_up(Saved::Nothing);
    assert_eq!(listed(&world), 0);
    // A heartbeat until the last has asked, and two seconds of asking again until it fetches keys.
    let began = world.now;
    while listed(&world) < PEERS * CONTENTS {
        world.run_for(Duration::from_millis(100));
        let took = world.now.since(began);
        assert!(took <= HEARTBEAT + Duration::from_secs(4), "{} after {took:?}", listed(&world));
    }
    world.judge();
}

#[test]
fn a_peer_that_registers_fifty_thousand_contents_anew_is_not_hurt_and_nobody_waits_for_it() {
    const CONTENTS: usize = 50_000;
    const OTHERS: usize = 8;
    // As quick a line as there is. With what an index allows unless told otherwise the peer is never
    // too fast; with a twentieth of it, it is told to slow down, and does.
    for (requests_a_second, within_s) in [(Settings::default().requests_a_second, 4), (250, 16)] {
        let quiet = Plan { lost: 0, doubled: 0, late: 0, deaths: false, ..Plan::default() };
        let mut world = IndexWorld::new(
            8,
            Plan {
                machines: 1 + OTHERS,
                alone: false,
                check_every: 10_000,
                slowest: Duration::from_micros(100),
                requests_a_second,
                ..quiet
            },
        );
        for (at, count) in [(0, CONTENTS)].into_iter().chain((1..=OTHERS).map(|at| (at, 1))) {
            let machine = &mut world.machines[at];
            machine.role = Role::Publish;
            for n in 0..count {
                let id = blake3::hash(&[at as u64, n as u64].map(u64::to_be_bytes).concat());
                let id = ContentId::file(*id.as_bytes());
                machine.hosts.insert(id, Item { id, size: 1, held: HELD_ALL, name: None });
            }
            world.kill(at);
            world.rebirth(at); // it shares what it hosts
        }
        let listed = |world: &IndexWorld| world.catalog().counts().registrations;
        world.run_for(HEARTBEAT * 4);
        assert_eq!(listed(&world), CONTENTS + OTHERS);
        world.index_up(Saved::Members);
        let lost = *world.machines[1].hosts.keys().next().unwrap();
        // Until the next heartbeat nobody knows that the index lost anything.
        world.run_for(HEARTBEAT);
        let began = world.now;
        while listed(&world) < CONTENTS + OTHERS {
            world.search(2, Target::Id(lost), 1);
            world.run_for(Duration::from_millis(100));
            assert!(world.machines[2].questions.is_empty(), "another has to wait");
            let took = world.now.since(began);
            assert!(took <= Duration::from_secs(within_s), "{} by then", listed(&world));
        }
        let stats = world.index.as_ref().unwrap().stats();
        let too_fast = stats.requests.get(&('R', Some(Code::TooFast))).copied().unwrap_or(0);
        assert_eq!(too_fast > 0, requests_a_second == 250, "{too_fast}");
        world.run_for(QUIET);
        world.judge();
    }
}

#[test]
fn the_same_seed_tells_the_same_story() {
    let story = run(7, Plan::default());
    assert_eq!(story, run(7, Plan::default()));
    assert_ne!(story.digest, run(8, Plan::default()).digest);
}
