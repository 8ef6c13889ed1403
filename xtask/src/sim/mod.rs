//! Owns the runs of the simulation of everything: many seeds, one told at length, the smallest set of
//! faults that still fails, and the deliberate breakages that the tests have to catch.

mod mutants;

use std::collections::BTreeSet;
use std::env;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use potluck_core::sim::whole_world::{Fault, MARKS, Plan, run as run_world, traced};
use potluck_core::time::{Duration, Moment};

use crate::proc::Tethered;

/// Failing seeds that are looked into and named.
const MOST_FAILED: usize = 20;

/// What to run.
#[derive(Parser)]
pub(crate) struct Args {
    /// The first seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many worlds
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Tell what happens in the world of --seed
    #[arg(long)]
    trace: bool,
    /// Machines of a world
    #[arg(long, default_value_t = Plan::default().machines)]
    machines: usize,
    /// How long things go wrong, in seconds
    #[arg(long, default_value_t = Plan::default().troubled.as_secs())]
    troubled: u64,
    /// Leave out a kind of fault (repeat it): loss, doubles, late, partition, cut, death, restart, slow,
    /// liar, poisoner, clock, removal, move
    #[arg(long, value_parser = fault)]
    without: Vec<Fault>,
    /// Break the code in each of the ways of a list, one after the other, and see that a test notices;
    /// prints the table of docs/mutants.md
    #[arg(long)]
    mutants: bool,
    /// Only the mutants of this machine, or whose description contains this (repeat it)
    #[arg(long, requires = "mutants")]
    only: Vec<String>,
    /// Run the worlds and say how each went, for the process that started this one
    #[arg(long, hide = true)]
    work: bool,
}

fn fault(text: &str) -> Result<Fault, String> {
    let named = |fault: &Fault| format!("{fault:?}").eq_ignore_ascii_case(text);
    Fault::ALL.into_iter().find(named).ok_or_else(|| "no such fault".to_owned())
}

/// What came of some worlds.
#[derive(Default)]
struct Outcome {
    /// Steps, copies, then one number for each of [`MARKS`], summed over all worlds that ended well.
    sums: Vec<u64>,
    /// Seeds that failed, and how.
    failed: Vec<(u64, String)>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.mutants {
        return mutants::run(&args.only);
    }
    if args.work {
        work(args);
        return Ok(());
    }
    if args.trace {
        let tell = |at: Moment, text: String| {
            println!("{:>11.6} s  {text}", at.as_micros() as f64 / 1e6);
        };
        let story = traced(args.seed, &args.plan(), &mut { tell });
        println!("{} steps, {} copies, digest {}", story.steps, story.copies, hex(&story.digest));
        return Ok(());
    }
    let workers = thread::available_parallelism().map_or(1, usize::from) as u64;
    let each = args.seeds.div_ceil(workers).max(1);
    let ends = args.seed + args.seeds;
    let parts = (args.seed..ends).step_by(each as usize).map(|from| (from, ends.min(from + each)));
    let outcomes: Vec<Result<Outcome>> = thread::scope(|scope| {
        let run = |(from, to)| scope.spawn(move || args.part(from, to));
        let running: Vec<_> = parts.map(run).collect();
        let ended = |run: thread::ScopedJoinHandle<'_, _>| run.join().expect("no worker panics");
        running.into_iter().map(ended).collect()
    });
    let mut all = Outcome::default();
    for outcome in outcomes {
        all.add(outcome?);
    }
    let Outcome { sums, failed } = all;
    println!(
        "{} worlds, {} failed, {} steps, {} copies",
        args.seeds,
        failed.len(),
        sums[0],
        sums[1]
    );
    for (mark, times) in MARKS.iter().zip(&sums[2..]) {
        println!("{times:>12}  {mark}");
    }
    for (seed, why) in failed.iter().take(MOST_FAILED) {
        println!("\nseed {seed}: {why}");
        println!("  cargo xtask sim --trace{}", args.smallest(*seed)?);
    }
    ensure!(failed.is_empty(), "{} of {} worlds failed", failed.len(), args.seeds);
    Ok(())
}

/// Runs the worlds in this process, which a world that fails ends.
fn work(args: &Args) {
    let plan = args.plan();
    for seed in args.seed..args.seed + args.seeds {
        std::panic::set_hook(Box::new(move |panic| {
            let at = panic.location().map(ToString::to_string).unwrap_or_default();
            println!("failed {seed} {at}: {}", panic.payload_as_str().unwrap_or("?"));
            std::process::exit(101);
        }));
        let story = run_world(seed, &plan);
        let marks = MARKS.iter().map(|mark| story.marks.get(mark).copied().unwrap_or(0));
        let numbers = [story.steps, story.copies].into_iter().chain(marks);
        let numbers: Vec<String> = numbers.map(|n| n.to_string()).collect();
        println!("done {}", numbers.join(" "));
    }
}

impl Outcome {
    fn add(&mut self, more: Self) {
        self.sums.resize(MARKS.len() + 2, 0);
        self.sums.iter_mut().zip(more.sums).for_each(|(sum, n)| *sum += n);
        self.failed.extend(more.failed);
    }
}

impl Args {
    fn plan(&self) -> Plan {
        let faults = Fault::ALL.into_iter().filter(|fault| !self.without.contains(fault)).collect();
        Plan { machines: self.machines, troubled: Duration::from_secs(self.troubled), faults }
    }

    /// All worlds of a part: after one that failed goes on with the next.
    fn part(&self, mut from: u64, to: u64) -> Result<Outcome> {
        let mut all = Outcome::default();
        let without = self.without.iter().copied().collect();
        while from < to {
            let outcome = elsewhere(from, to - from, &without, self.machines, self.troubled)?;
            from = outcome.failed.last().map_or(to, |(seed, _)| seed + 1);
            all.add(outcome);
        }
        Ok(all)
    }

    /// The arguments of the smallest world of a failing seed that still fails, found by leaving out one
    /// kind of fault after the other, and then what comes late.
    fn smallest(&self, seed: u64) -> Result<String> {
        let mut without: BTreeSet<Fault> = self.without.iter().copied().collect();
        let mut troubled = self.troubled;
        for fault in Fault::ALL {
            let mut less = without.clone();
            if less.insert(fault)
                && !elsewhere(seed, 1, &less, self.machines, troubled)?.failed.is_empty()
            {
                without = less;
            }
        }
        while troubled > 1
            && !elsewhere(seed, 1, &without, self.machines, troubled * 3 / 4)?.failed.is_empty()
        {
            troubled = troubled * 3 / 4;
        }
        Ok(arguments(seed, 1, &without, self.machines, troubled).join(" "))
    }
}

fn arguments(
    seed: u64,
    seeds: u64,
    without: &BTreeSet<Fault>,
    machines: usize,
    troubled: u64,
) -> Vec<String> {
    let mut arguments = vec![String::new(), "--seed".into(), seed.to_string()];
    if seeds > 1 {
        arguments.extend(["--seeds".into(), seeds.to_string()]);
    }
    let plan = Plan::default();
    if machines != plan.machines {
        arguments.extend(["--machines".into(), machines.to_string()]);
    }
    if troubled != plan.troubled.as_secs() {
        arguments.extend(["--troubled".into(), troubled.to_string()]);
    }
    for fault in without {
        arguments.extend(["--without".into(), format!("{fault:?}").to_lowercase()]);
    }
    arguments
}

/// Runs worlds in a process of its own: the one that fails takes its process with it.
fn elsewhere(
    seed: u64,
    seeds: u64,
    without: &BTreeSet<Fault>,
    machines: usize,
    troubled: u64,
) -> Result<Outcome> {
    let arguments = arguments(seed, seeds, without, machines, troubled);
    let mut command = Tethered::command(env::current_exe()?)?;
    command.args(["sim", "--work"]).args(&arguments[1..]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut worker = Tethered::spawn(&mut command)?;
    let output = worker.stdout()?;
    let mut outcome = Outcome::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        if let Some(numbers) = line.strip_prefix("done ") {
            let sums = numbers.split(' ').map(str::parse).collect::<Result<_, _>>()?;
            outcome.add(Outcome { sums, failed: vec![] });
        } else if let Some((seed, why)) =
            line.strip_prefix("failed ").and_then(|rest| rest.split_once(' '))
        {
            outcome.failed.push((seed.parse()?, why.to_owned()));
        }
    }
    let status = worker.wait()?;
    if !status.success() && outcome.failed.is_empty() {
        bail!("a worker ended with {status} and said nothing");
    }
    Ok(outcome)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
