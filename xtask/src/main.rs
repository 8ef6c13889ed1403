//! Tasks of the project itself, run with `cargo xtask`. Never part of what is shipped.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a task speaks to who runs it")]

mod bench;
mod proc;
mod table;

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
    Bench(bench::Args),
    /// The echoes that `bench index` measures against
    #[command(hide = true)]
    Echo(bench::echo::Args),
}

fn main() -> anyhow::Result<()> {
    match Task::parse().task {
        Verb::Bench(args) => bench::run(&args),
        Verb::Echo(args) => bench::echo::serve(&args),
    }
}
