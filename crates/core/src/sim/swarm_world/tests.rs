use super::*;

const MIB: u64 = 1 << 20;
const LINE: Line = Line::mbit(100, 100);
const LIMIT: Duration = Duration::from_secs(120);

/// One seed and `n` fetchers with equal lines.
fn equal(n: usize, mib: u64) -> Plan {
    Plan::star(mib * MIB, LINE, vec![LINE; n], 7)
}

fn person(line: Line, holds: &[u32], wants: &[u32]) -> Person {
    Person {
        line,
        nature: Nature::Honest,
        joins: Duration::ZERO,
        dies: Death::Never,
        holds: holds.to_vec(),
        wants: wants.to_vec(),
    }
}

/// Runs a plan of one content; the time until all honest people have it over the bound, and copies
/// that the seed sent.
fn ratio(plan: &Plan) -> (f64, f64, Report) {
    let report = World::new(plan.clone()).run(LIMIT);
    let honest = |p: &usize| {
        plan.people[*p].nature == Nature::Honest && plan.people[*p].dies == Death::Never
    };
    let last = report.last((0..plan.people.len()).filter(honest)).expect("everyone completes");
    let bytes: u64 = plan.contents[0].iter().sum();
    let copies = report.sent[0] as f64 / bytes as f64;
    (last.as_secs_f64() / plan.bound(0).as_secs_f64(), copies, report)
}

/// Nobody honest was dropped for good, and nobody for silence but those named.
fn assert_only_dropped(report: &Report, may: &[usize]) {
    for (who, whom, why) in &report.dropped {
        assert!(may.contains(whom), "{who} dropped {whom}, which did nothing wrong: {why:?}");
    }
}

#[test]
fn equal_links_come_close_to_the_fluid_bound_and_the_seed_sends_little_more_than_one_copy() {
    // The start and the end cost some 150 ms whatever the size, so many fetchers need a larger content.
    for (n, mib, most) in
        [(1, 16, 1.02), (2, 16, 1.05), (4, 32, 1.04), (8, 32, 1.06), (16, 64, 1.06)]
    {
        let (ratio, copies, report) = ratio(&equal(n, mib));
        assert!(ratio <= most, "N = {n}: T/T* = {ratio:.3}");
        assert!(copies <= 1.1, "N = {n}: the seed sent {copies:.3} copies");
        assert_only_dropped(&report, &[]);
        let stalls: u32 = report.fetched.iter().flat_map(|f| f.values()).map(|c| c.stalls).sum();
        assert_eq!(stalls, 0, "N = {n}: somebody honest was thought late");
        let twice: u64 = report.duplicate.iter().sum();
        assert!(twice * 50 <= n as u64 * mib * MIB, "N = {n}: {twice} bytes came twice");
    }
}

#[test]
fn the_same_seed_gives_the_same_world_and_another_gives_another() {
    let digest = |seed| World::new(Plan { seed, ..equal(6, 4) }).run(LIMIT).digest;
    assert_eq!(digest(1), digest(1));
    assert_ne!(digest(1), digest(2));
}

#[test]
fn fast_lines_are_kept_full_and_slow_answers_are_asked_ahead_for() {
    let fast = Line { delay: Duration::from_micros(30), ..Line::mbit(8_000, 8_000) };
    let far = Line { delay: Duration::from_millis(10), ..LINE };
    for (name, line, n, mib, most) in [
        ("one reader at 1 GB/s", fast, 1, 512, 1.06),
        ("three readers at 1 GB/s", fast, 3, 512, 1.10),
        ("40 ms there and back, one reader", far, 1, 32, 1.10),
        ("40 ms there and back, four readers", far, 4, 32, 1.25),
    ] {
        let (ratio, ..) = ratio(&Plan::star(mib * MIB, line, vec![line; n], 3));
        assert!(ratio <= most, "{name}: T/T* = {ratio:.3}");
    }
}

#[test]
fn mixed_lines_are_used_up_to_what_each_can_do() {
    let lines = (0..8).map(|n| Line::mbit(if n % 2 == 0 { 100 } else { 20 }, 200));
    let (ratio, copies, report) = ratio(&Plan::star(32 * MIB, Line::mbit(40, 200), lines, 5));
    assert!(ratio <= 1.10, "T/T* = {ratio:.3}");
    assert!(copies <= 1.1, "the seed sent {copies:.3} copies");
    assert_only_dropped(&report, &[]);
}

#[test]
fn who_joins_late_finishes_soon_after() {
    let mut plan = equal(8, 32);
    let half = Duration::from_millis(1_350);
    plan.people[8].joins = half;
    let report = World::new(plan).run(LIMIT);
    let alone = (32 * MIB) as f64 / LINE.down as f64;
    let took = report.done[8].expect("the late one completes") - half;
    assert!(took.as_secs_f64() <= 1.15 * alone, "{took:?}");
    assert!(report.sent[0] <= 32 * MIB * 13 / 10, "the seed sent {} bytes", report.sent[0]);
}

#[test]
fn all_complete_when_the_seed_dies_after_little_more_than_one_copy() {
    for (n, thousandths) in [(2, 1_100), (8, 1_100), (8, 1_200), (16, 1_200)] {
        let mut plan = equal(n, 16);
        plan.people[0].dies = Death::AfterCopies(thousandths);
        let (ratio, copies, _) = ratio(&plan);
        assert!(ratio <= 1.35, "N = {n}: T/T* = {ratio:.3}");
        assert!(copies <= 1.25, "N = {n}: the seed sent {copies:.3} copies");
    }
}

#[test]
fn all_living_complete_when_half_of_the_fetchers_die() {
    let mut plan = equal(12, 16);
    for (n, p) in (1..=12).step_by(2).enumerate() {
        plan.people[p].dies = Death::At(Duration::from_millis(300 + 150 * n as u64));
    }
    let (ratio, _, report) = ratio(&plan);
    // Time goes into what the dead took with them, never into waiting.
    assert!(ratio <= 1.8, "T/T* = {ratio:.3}");
    assert_only_dropped(&report, &[]);
}

#[test]
fn a_silent_and_a_slow_host_among_eight_cost_the_others_little() {
    let mut plan = equal(8, 32);
    plan.people[3].nature = Nature::Silent;
    let (silent, ..) = ratio(&plan);
    assert!(silent <= 1.15, "one silent: T/T* = {silent:.3}");
    plan.people[5].line = Line::mbit(2, 100);
    let report = World::new(plan).run(LIMIT);
    let others = report.last([1, 2, 4, 6, 7, 8]).expect("the others complete").as_secs_f64();
    let bound = (32 * MIB) as f64 / LINE.up as f64;
    assert!(others <= 1.15 * bound, "one silent, one slow: {others:.2} s");
    // What the slow one says waits behind the pieces it sends.
    let slow = report.done[5].expect("the slow one completes").as_secs_f64();
    assert!(slow <= 2.5 * bound, "the slow one took {slow:.2} s");
    assert_only_dropped(&report, &[3]);
}

#[test]
fn hosts_that_are_always_busy_or_hoard_grants_stop_nobody() {
    for nature in [Nature::Busy, Nature::Hoarder] {
        let mut plan = equal(8, 16);
        plan.people[2].nature = nature;
        plan.people[6].nature = nature;
        let (ratio, copies, report) = ratio(&plan);
        assert!(ratio <= 1.5, "{nature:?}: T/T* = {ratio:.3}");
        assert!(copies <= 1.6, "{nature:?}: the seed sent {copies:.3} copies");
        assert_only_dropped(&report, &[2, 6]);
    }
}

#[test]
fn those_who_leave_as_soon_as_they_are_done_leave_nobody_waiting() {
    let mut plan = equal(16, 32);
    plan.people.iter_mut().skip(1).for_each(|p| p.dies = Death::WhenDone);
    let report = World::new(plan.clone()).run(LIMIT);
    let last = report.last(1..=16).expect("everyone completes").as_secs_f64();
    // It was 1.4 when the seed was not asked for what it had granted and we had declined.
    assert!(last <= 1.15 * plan.bound(0).as_secs_f64(), "{last:.2} s");
}

#[test]
fn what_left_a_seed_that_died_within_its_first_copy_is_everywhere_and_everyone_knows_what_lacks() {
    let mut plan = equal(8, 16);
    plan.people[0].dies = Death::AfterCopies(500);
    let report = World::new(plan).run(Duration::from_secs(5));
    let left = report.left_home as u32;
    assert!((120..=136).contains(&left), "{left} of 256 pieces left the seed");
    for p in 1..=8 {
        // What was on the way when it died left it, but came to nobody.
        assert!(report.held[p] + 8 >= left, "{p} holds {} of {left} pieces", report.held[p]);
        assert_eq!(report.held[p], report.held[1], "what one has, all have");
        let missing = 256 - report.held[p];
        assert_eq!(report.waiting[p], Some(Waiting::Missing(missing)), "{p}");
    }
}

#[test]
fn each_poisoner_spoils_one_piece_of_each_fetcher_and_nobody_honest_is_dropped() {
    let styles = [(0, 1), (0, 2), (5, 1), (20, 3)];
    let mut plan = equal(8, 16);
    for (n, (after, every)) in styles.into_iter().enumerate() {
        plan.people[2 * n + 1].nature = Nature::Poisoner { after, every };
    }
    let (ratio, _, report) = ratio(&plan);
    assert!(ratio <= 1.5, "T/T* = {ratio:.3}");
    assert_only_dropped(&report, &[1, 3, 5, 7]);
    assert!(!report.bad.is_empty(), "nobody was poisoned");
    for ((to, from), pieces) in &report.bad {
        assert_eq!(*pieces, 1, "{to} took {pieces} bad pieces of {from}");
    }
}

#[test]
fn three_poisoners_of_ten_cost_a_piece_each_and_are_dropped_by_all_whom_they_served() {
    let mut poisoners = BTreeSet::new();
    for seed in 0..4 {
        let honest = Plan { seed, ..equal(10, 16) };
        let mut poisoned = honest.clone();
        for (p, after, every) in [(2, 0, 1), (5, 7, 1), (9, 20, 3)] {
            poisoned.people[p].nature = Nature::Poisoner { after, every };
        }
        let others = (1..=10).filter(|p| poisoned.people[*p].nature == Nature::Honest);
        let others: Vec<usize> = others.collect();
        let usual = World::new(honest).run(LIMIT).last(others.clone()).expect("everyone completes");
        let report = World::new(poisoned).run(LIMIT);
        let last = report.last(others.clone()).expect("everyone honest completes");
        assert!(last.as_secs_f64() <= 1.5 * usual.as_secs_f64(), "{last:?} instead of {usual:?}");
        assert_only_dropped(&report, &[2, 5, 9]);
        let by_honest = report.bad.iter().filter(|((to, _), _)| others.contains(to));
        for ((to, from), pieces) in by_honest {
            poisoners.insert(*from);
            assert_eq!(*pieces, 1, "seed {seed}: {to} took {pieces} bad pieces of {from}");
            assert!(report.dropped.contains(&(*to, *from, Why::Poison)), "{to} kept {from}");
        }
    }
    assert_eq!(poisoners, [2, 5, 9].into(), "each had its chance");
}

#[test]
fn when_half_die_midway_with_or_without_a_word_the_others_complete_and_nobody_waits_long() {
    for (seed, silently) in (0..6).map(|seed| (seed, seed % 2 == 1)) {
        let mut plan = Plan { seed, ..equal(12, 16) };
        for (n, p) in (1..=12).step_by(2).enumerate() {
            let at = Duration::from_millis(300 + 150 * n as u64);
            plan.people[p].dies = if silently { Death::Vanishes(at) } else { Death::At(at) };
        }
        let report = World::new(plan).run(LIMIT);
        let living = (2..=12).step_by(2);
        let last = report.last(living.clone());
        assert!(last.is_some(), "seed {seed}: {:?}", report.waiting);
        let waited = living.map(|p| report.waited[p]).max().unwrap_or_default();
        // The promise is 5 s; what a silent host was asked for is taken back after 0.3 s at the least.
        assert!(waited <= Duration::from_secs(2), "seed {seed}: somebody waited {waited:?}");
    }
}

#[test]
fn two_contents_at_once_share_the_line() {
    let mut plan = equal(0, 0);
    plan.contents = vec![vec![16 * MIB], vec![16 * MIB]];
    plan.people = vec![person(LINE, &[0, 1], &[])];
    plan.people.extend((0..4).map(|n| person(LINE, &[], &[n % 2])));
    let report = World::new(plan.clone()).run(LIMIT);
    let done = |p: usize| report.done[p].expect("complete").as_secs_f64();
    let (one, other) = (done(1).max(done(3)), done(2).max(done(4)));
    assert!((0.85..1.18).contains(&(one / other)), "{one:.2} s and {other:.2} s");
    // One seed, 32 MiB in all.
    assert!(one.max(other) <= 1.15 * (32 * MIB) as f64 / LINE.up as f64, "{one:.2}, {other:.2}");
    // One member wants both at once.
    plan.people.truncate(1);
    plan.people.push(person(LINE, &[], &[0, 1]));
    let report = World::new(plan).run(LIMIT);
    let took = report.last([1]).expect("complete").as_secs_f64();
    assert!(took <= 1.05 * (32 * MIB) as f64 / LINE.up as f64, "{took:.2} s");
}

#[test]
fn a_folder_of_tiny_files_is_fetched_at_the_speed_of_the_line() {
    let mut plan = equal(1, 0);
    plan.contents = vec![vec![4 << 10; 5_000]];
    let (one, ..) = ratio(&plan);
    assert!(one <= 1.10, "one reader: T/T* = {one:.3}");
    plan.people.extend([person(LINE, &[], &[0]), person(LINE, &[], &[0])]);
    let (three, copies, _) = ratio(&plan);
    assert!(three <= 1.15, "three readers: T/T* = {three:.3}");
    assert!(copies <= 1.1, "the seed sent {copies:.3} copies");
}

#[test]
fn readers_that_reach_nobody_but_the_seed_all_complete() {
    let mut plan = equal(4, 8);
    plan.walls = (1..=4).flat_map(|a| (a + 1..=4).map(move |b| (a, b))).collect();
    let report = World::new(plan).run(LIMIT);
    let last = report.last(1..=4).expect("everyone completes").as_secs_f64();
    let alone = (4 * 8 * MIB) as f64 / LINE.up as f64;
    assert!(last <= 1.15 * alone, "{last:.2} s instead of {alone:.2} s");
}

#[test]
fn two_seeds_share_the_work() {
    let mut plan = equal(8, 32);
    plan.people.push(person(LINE, &[0], &[]));
    plan.people.iter_mut().skip(1).take(8).for_each(|p| p.line = Line::mbit(100, 200));
    let (ratio, copies, report) = ratio(&plan);
    assert!(ratio <= 1.25, "T/T* = {ratio:.3}");
    let other = report.sent[9] as f64 / (32 * MIB) as f64;
    assert!((0.4..1.1).contains(&copies) && (0.4..1.1).contains(&other), "{copies:.2}, {other:.2}");
}

#[test]
fn whatever_goes_wrong_in_a_random_world_the_honest_complete() {
    for seed in 0..40 {
        let mut dice = Dice(seed);
        let n = 2 + dice.below(9) as usize;
        let mut plan = equal(n, 1 + dice.below(5));
        plan.seed = seed;
        plan.check_every = 41;
        for p in 1..=n {
            let person = &mut plan.people[p];
            person.line = Line::mbit([5, 20, 100][dice.below(3) as usize], 100);
            person.line.delay = Duration::from_micros(50 + dice.below(8_000));
            person.joins = Duration::from_millis(dice.below(4) * 200);
            match dice.below(12) {
                0 => person.nature = Nature::Silent,
                1 => person.nature = Nature::Busy,
                2 => person.nature = Nature::Hoarder,
                3 => person.nature = Nature::Poisoner { after: dice.below(9) as u32, every: 2 },
                4 | 5 => person.dies = Death::At(Duration::from_millis(dice.below(2_000))),
                _ => {}
            }
        }
        let report = World::new(plan.clone()).run(LIMIT);
        for (p, person) in plan.people.iter().enumerate() {
            if person.nature == Nature::Honest && person.dies == Death::Never {
                assert!(report.done[p].is_some(), "seed {seed}: {p} never completed");
            }
        }
        for (who, whom, why) in &report.dropped {
            let guilty = plan.people[*whom].nature != Nature::Honest;
            assert!(guilty, "seed {seed}: {who} dropped honest {whom}: {why:?}");
        }
    }
}
