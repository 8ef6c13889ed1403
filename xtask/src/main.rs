//! Tasks of the project itself, run with `cargo xtask`. Never part of what is shipped.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a task speaks to who runs it")]

mod bench;
mod lab;
mod proc;
mod sim;
mod soak;
mod table;
mod tools;

use clap::{Parser, Subcommand};

/// Tasks of the project itself
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Task {
    #[command(subcommand)]
    task: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measure potluck against other tools, on this machine alone
    ///
    /// Builds the release binary, runs real processes in a temporary folder, checks every result,
    /// and prints tables with medians. Compare only figures of one run.
    Bench(Box<bench::Args>),
    /// Try swarms in a network made for it: hosts with links as slow as is asked for
    ///
    /// One seed and some fetchers, each a real process in a network namespace of its own. It verifies
    /// every copy and compares the time of the last with the bound that nothing can beat. Needs root;
    /// whatever it makes is gone when it ends, however it ends.
    Lab(Box<lab::Args>),
    /// Try everything in seeded worlds where much goes wrong, or see that the tests notice broken code
    ///
    /// Index, links, swarms, sharing and trust in one world each; at the end every belief is compared
    /// with the truth. A seed that fails is named, with the smallest set of faults that still fails.
    Sim(sim::Args),
    /// Run the long forms of the tests that make faults, for as long as is wanted
    ///
    /// Kills, power cuts, failing disks, hostile members, bad networks and fuzzing, each in turn, and a
    /// table of how they went. Root, strace and xfsprogs make it whole; fuzzing wants cargo-fuzz and
    /// a nightly compiler. What cannot be done here is said and skipped.
    Soak(soak::Args),
    /// The echoes that `bench index` measures against
    #[command(hide = true)]
    Echo(bench::echo::Args),
    /// Run a command that ends, with all it starts, when stdin does
    #[command(hide = true)]
    Tether(proc::Tether),
}

fn main() -> anyhow::Result<()> {
    match Task::parse().task {
        Verb::Bench(args) => bench::run(&args),
        Verb::Lab(args) => lab::run(&args),
        Verb::Sim(args) => sim::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Echo(args) => bench::echo::serve(&args),
        Verb::Tether(args) => proc::run_tethered(&args),
    }
}
