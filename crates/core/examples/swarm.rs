//! Runs the simulated swarms of DESIGN.md ("Swarming") and prints them as a table:
//!
//! ```sh
//! cargo run --release -p potluck-core --features sim --example swarm -- [--fetchers N] [--mib M] [--seeds K] [--tell] [NAME…]
//! ```
//!
//! A name chooses the scenarios that contain it; `--seeds` runs each with so many throws of the dice,
//! `--tell` says how each went.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a report is for reading")]
#![allow(clippy::disallowed_methods, reason = "how long it takes is part of the report")]

use std::time::{Duration, Instant};

use potluck_core::sim::swarm_world::{Death, Line, Nature, Plan, Report, World};

const MIB: u64 = 1 << 20;
const LINE: Line = Line::mbit(100, 100);

/// What to run.
struct Options {
    fetchers: Option<usize>,
    mib: Option<u64>,
    seeds: u64,
    tell: bool,
    names: Vec<String>,
}

struct Scenario {
    name: &'static str,
    fetchers: usize,
    mib: u64,
    /// What is special about it.
    change: fn(&mut Plan),
}

const fn scenario(
    name: &'static str,
    fetchers: usize,
    mib: u64,
    change: fn(&mut Plan),
) -> Scenario {
    Scenario { name, fetchers, mib, change }
}

fn scenarios() -> Vec<Scenario> {
    vec![
        scenario("equal, 1", 1, 64, |_| {}),
        scenario("equal, 4", 4, 64, |_| {}),
        scenario("equal, 8", 8, 64, |_| {}),
        scenario("equal, 16", 16, 64, |_| {}),
        scenario("equal, 64", 64, 64, |_| {}),
        scenario("equal, 256", 256, 64, |_| {}),
        scenario("large: 1 MiB pieces, 16", 16, 4_096, |_| {}),
        scenario("mixed lines, 8", 8, 64, mixed),
        scenario("mixed lines, 16", 16, 64, mixed),
        scenario("mixed lines, 64", 64, 64, mixed),
        scenario("late joiner, 8", 8, 64, |plan| {
            let half = plan.bound(0) / 2;
            plan.people[8].joins = half;
        }),
        scenario("20 ms there and back, 16", 16, 64, |plan| far(plan, 20)),
        scenario("40 ms there and back, 16", 16, 64, |plan| far(plan, 40)),
        scenario("80 ms there and back, 16", 16, 64, |plan| far(plan, 80)),
        scenario("two seeds, 16", 16, 64, |plan| {
            plan.people[16].holds = vec![0];
            plan.people[16].wants = vec![];
        }),
        scenario("four seeds, 16", 16, 64, |plan| {
            for p in 13..=16 {
                plan.people[p].holds = vec![0];
                plan.people[p].wants = vec![];
            }
        }),
        scenario("who is done leaves, 16", 16, 64, |plan| {
            plan.people.iter_mut().skip(1).for_each(|p| p.dies = Death::WhenDone);
        }),
        scenario("a quarter dies, 16", 16, 64, |plan| {
            for (n, p) in (1..=16).step_by(4).enumerate() {
                plan.people[p].dies = Death::At(Duration::from_millis(500 + 1_000 * n as u64));
            }
        }),
        scenario("seed dies after 1.2 copies, 16", 16, 64, |plan| {
            plan.people[0].dies = Death::AfterCopies(1_200);
        }),
        scenario("seed dies after 1.05 copies, 16", 16, 64, |plan| {
            plan.people[0].dies = Death::AfterCopies(1_050);
        }),
        scenario("seed dies after 0.5 copies, 16", 16, 64, |plan| {
            plan.people[0].dies = Death::AfterCopies(500);
        }),
        scenario("2 of 16 slow (2 Mbit/s up)", 16, 64, |plan| {
            for p in [5, 11] {
                plan.people[p].line.up = Line::mbit(2, 100).up;
            }
        }),
        scenario("2 of 16 stall (0.5 s after 1 s)", 16, 64, |plan| {
            let (every, lasts) = (Duration::from_secs(1), Duration::from_millis(500));
            for p in [5, 11] {
                plan.people[p].nature = Nature::Stalling { every, lasts };
            }
        }),
        scenario("1 of 16 silent, 1 slow, 1 stalls, 1 dies", 16, 64, faults),
        scenario("2 of 16 hoard grants", 16, 64, |plan| {
            plan.people[5].nature = Nature::Hoarder;
            plan.people[11].nature = Nature::Hoarder;
        }),
    ]
}

/// The seed at 40 Mbit/s up; half of the others at 100, half at 20; all at 200 down.
fn mixed(plan: &mut Plan) {
    for (n, person) in plan.people.iter_mut().enumerate() {
        let up = if n == 0 { 40 } else { [100, 20][n % 2] };
        person.line = Line::mbit(up, 200);
    }
}

fn far(plan: &mut Plan, round_trip_ms: u64) {
    for person in &mut plan.people {
        person.line.delay = Duration::from_micros(round_trip_ms * 250);
    }
}

fn faults(plan: &mut Plan) {
    plan.people[3].nature = Nature::Silent;
    plan.people[7].line.up = Line::mbit(2, 100).up;
    let (every, lasts) = (Duration::from_secs(1), Duration::from_millis(500));
    plan.people[11].nature = Nature::Stalling { every, lasts };
    plan.people[15].dies = Death::At(plan.bound(0) / 2);
}

/// The figures of one run.
struct Figures {
    /// Of those who are well and have been there from the start.
    ratio: f64,
    /// Of everybody, each against the bound from its own joining on.
    slowest: f64,
    copies: f64,
    duplicates: f64,
    /// Time from 99 % to 100 % over a hundredth of the whole, at the median and at the worst.
    end: (f64, f64),
    steals: u64,
    stalls: u64,
    complete: usize,
    expected: usize,
    /// The most that anybody holds of the pieces that left the seed, and the least, in percent.
    recovered: f64,
}

fn figures(plan: &Plan, report: &Report) -> Figures {
    let bytes: u64 = plan.contents[0].iter().sum();
    let waited_for = |p: &usize| {
        let person = &plan.people[*p];
        let stays = matches!(person.dies, Death::Never | Death::WhenDone);
        person.nature.is_honest() && stays && !person.wants.is_empty()
    };
    let all: Vec<usize> = (0..plan.people.len()).filter(waited_for).collect();
    let seconds = |time: Option<Duration>| time.map_or(f64::NAN, |t| t.as_secs_f64());
    let took = |p: usize| seconds(report.done[p]) - plan.people[p].joins.as_secs_f64();
    let is_well = |p: &usize| {
        let person = &plan.people[*p];
        let slow = person.line.up * 4 < plan.people[0].line.up;
        person.nature == Nature::Honest && person.joins.is_zero() && !slow
    };
    let bound = plan.bound(0).as_secs_f64();
    let last = all.iter().filter(|p| is_well(p)).map(|p| took(*p)).fold(0.0, f64::max);
    let alone = |p: usize| match plan.people[p].joins {
        Duration::ZERO => bound,
        _ => bytes as f64 / plan.people[p].line.down as f64,
    };
    let mut ends: Vec<f64> = all
        .iter()
        .map(|p| (seconds(report.done[*p]) - seconds(report.nearly[*p])) / (took(*p) / 100.0))
        .filter(|end| end.is_finite())
        .collect();
    ends.sort_by(f64::total_cmp);
    let counts = || report.fetched.iter().flat_map(|f| f.values());
    let held = all.iter().map(|p| report.held[*p]).min().unwrap_or(0);
    Figures {
        ratio: last / bound,
        slowest: all.iter().map(|p| took(*p) / alone(*p)).fold(0.0, f64::max),
        copies: report.sent[0] as f64 / bytes as f64,
        duplicates: all.iter().map(|p| report.duplicate[*p]).sum::<u64>() as f64 * 100.0
            / (bytes * all.len() as u64) as f64,
        end: (
            ends.get(ends.len() / 2).copied().unwrap_or(f64::NAN),
            ends.last().copied().unwrap_or(f64::NAN),
        ),
        steals: counts().map(|c| u64::from(c.steals)).sum(),
        stalls: counts().map(|c| u64::from(c.stalls)).sum(),
        complete: all.iter().filter(|p| report.done[**p].is_some()).count(),
        expected: all.len(),
        recovered: f64::from(held) * 100.0 / report.left_home.max(1) as f64,
    }
}

fn main() {
    let options = options();
    println!(
        "| scenario | N | MiB | T/T* median, worst | … of the slowest | seed's copies | duplicates % | last 1 %: median, worst | steals | stalls | complete | host seconds |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let chosen = |s: &Scenario| {
        options.names.is_empty() || options.names.iter().any(|n| s.name.contains(n.as_str()))
    };
    for scenario in scenarios().into_iter().filter(chosen) {
        run(&scenario, &options);
    }
}

fn run(scenario: &Scenario, options: &Options) {
    let began = Instant::now();
    let fetchers = options.fetchers.unwrap_or(scenario.fetchers);
    let mib = options.mib.unwrap_or(scenario.mib);
    let runs: Vec<Figures> = (1..=options.seeds)
        .map(|seed| {
            let mut plan = Plan::star(mib * MIB, LINE, vec![LINE; fetchers], seed);
            plan.check_every = 0;
            (scenario.change)(&mut plan);
            let limit = plan.bound(0) * 4 + Duration::from_secs(10);
            let report = World::new(plan.clone()).run(limit);
            if options.tell {
                tell(&report);
            }
            figures(&plan, &report)
        })
        .collect();
    let sorted = |of: fn(&Figures) -> f64| {
        let mut all: Vec<f64> = runs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        (all[all.len() / 2], all[all.len() - 1])
    };
    let ratio = sorted(|f| f.ratio);
    let mean = |of: fn(&Figures) -> f64| runs.iter().map(of).sum::<f64>() / runs.len() as f64;
    let stuck = runs.iter().find(|f| f.complete < f.expected);
    let complete = match stuck {
        None => "all".to_owned(),
        Some(f) => {
            format!("{} of {}, each {:.0} % of what left", f.complete, f.expected, f.recovered)
        }
    };
    println!(
        "| {} | {fetchers} | {mib} | {:.3}, {:.3} | {:.3} | {:.3} | {:.2} | {:.1}, {:.1} | {:.0} | {:.0} | {complete} | {:.1} |",
        scenario.name,
        ratio.0,
        ratio.1,
        sorted(|f| f.slowest).1,
        sorted(|f| f.copies).1,
        sorted(|f| f.duplicates).1,
        sorted(|f| f.end.0).0,
        sorted(|f| f.end.1).1,
        mean(|f| f.steals as f64),
        mean(|f| f.stalls as f64),
        began.elapsed().as_secs_f64(),
    );
}

/// How a run went, for who wants to know why.
fn tell(report: &Report) {
    let ms = |time: Duration| time.as_millis();
    eprintln!("tenths: {:?}", report.tenths.iter().map(|t| ms(*t)).collect::<Vec<_>>());
    for (p, counts) in report.fetched.iter().enumerate() {
        let (done, nearly) = (report.done[p].map(ms), report.nearly[p].map(ms));
        let (sent, neighbours) = (report.sent[p] >> 16, report.neighbours[p]);
        eprintln!("{p}: done {done:?} nearly {nearly:?} sent {sent} neighbours {neighbours}");
        eprintln!("   {:?} {:?} {:?}", counts.get(&0), report.shared[p], report.waiting[p]);
    }
}

fn options() -> Options {
    let mut options =
        Options { fetchers: None, mib: None, seeds: 1, tell: false, names: Vec::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or_else(|| {
                eprintln!("{word} needs a number");
                std::process::exit(2)
            })
        };
        match word.as_str() {
            "--fetchers" => options.fetchers = Some(number() as usize),
            "--mib" => options.mib = Some(number()),
            "--seeds" => options.seeds = number().max(1),
            "--tell" => options.tell = true,
            _ => options.names.push(word),
        }
    }
    options
}
