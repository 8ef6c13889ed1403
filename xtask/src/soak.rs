//! Owns `cargo xtask soak`: the long forms of the tests that make faults, over and over until the time
//! is up, and the table of how they went. Never judges a figure: a test fails, or it does not.

use std::fs;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::proc::{self, Tethered};
use crate::table::Table;

/// Where the output of what failed is kept.
const KEPT: &str = "target/soak";
/// How long each fuzz target runs in a round.
const FUZZ_SECONDS: u32 = 60;
/// The most memory a fuzz target may take, in MiB.
const FUZZ_MEMORY: u32 = 2_048;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Begin nothing more after so long [default: each once]
    #[arg(long, value_name = "N")]
    hours: Option<f64>,
    /// Only those whose name contains this
    #[arg(long, value_name = "NAME", default_value = "")]
    only: String,
}

/// What is done in a round.
struct Task {
    name: String,
    program: &'static str,
    args: Vec<String>,
    rounds: u32,
}

impl Task {
    fn command(&self) -> Result<Command> {
        let mut command = Tethered::command(self.program)?;
        command.args(&self.args).env("POTLUCK_ROUNDS", self.rounds.to_string());
        if self.program == "rustup" {
            // Of the stable compiler that runs this.
            command.env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
        }
        Ok(command)
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let tasks = || tasks().into_iter().filter(|task| task.name.contains(&args.only));
    ensure!(tasks().next().is_some(), "nothing is called {:?}", args.only);
    fs::create_dir_all(KEPT).context("cannot keep what fails")?;
    let began = Instant::now();
    let time_is_up = || args.hours.is_some_and(|h| began.elapsed().as_secs_f64() >= h * 3600.0);
    let mut rows: Vec<Row> = tasks().map(|task| Row::new(task.name)).collect();
    'all: loop {
        for (task, row) in tasks().zip(&mut rows) {
            if time_is_up() {
                break 'all;
            }
            row.run(&task)?;
        }
        if args.hours.is_none() {
            break;
        }
    }
    let mut table = Table::new(&["what", "runs", "failed", "skipped", "s a run", "last figure"]);
    for row in &rows {
        let each = row.took.as_secs_f64() / f64::from(row.runs.max(1));
        let counts = [row.runs, row.failed, row.skipped].map(|count| count.to_string());
        let figure = if row.figure.is_empty() { "–".into() } else { row.figure.clone() };
        let [runs, failed, skipped] = counts;
        table.row([row.name.clone(), runs, failed, skipped, format!("{each:.0}"), figure]);
    }
    println!("\n{table}");
    let failed: u32 = rows.iter().map(|row| row.failed).sum();
    ensure!(failed == 0, "{failed} failed: what they said is in {KEPT}");
    Ok(())
}

fn tasks() -> Vec<Task> {
    let test = |name: &str, rounds: u32, args: &[&str]| {
        let args = [&["test", "--locked"], args, &["--nocapture", "--test-threads", "1"]].concat();
        let args = args.into_iter().map(Into::into).collect();
        Task { name: name.into(), program: "cargo", args, rounds }
    };
    let disks = ["-p", "potluck", "--test", "disks", "--"];
    let of_disks = |only: &'static str| [&disks[..], &[only]].concat();
    let mut all = vec![
        test("kill", 500, &of_disks("over_and_over")),
        test("power", 100, &of_disks("power_cut")),
        test("eio", 100, &of_disks("fails_is_never")),
        test("disks", 4, &disks),
        test("loss", 20_000, &["-p", "potluck", "--test", "network", "--", "lost_both_ways"]),
        test("network", 400, &["-p", "potluck", "--test", "network", "--"]),
        test("hostile", 0, &["-p", "potluck", "--lib", "--", "hostile::"]),
    ];
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/fuzz_targets");
    let targets = fs::read_dir(fuzz).into_iter().flatten().flatten();
    let mut targets: Vec<_> =
        targets.filter_map(|at| Some(at.path().file_stem()?.to_str()?.to_owned())).collect();
    targets.sort();
    all.extend(targets.into_iter().map(|target| {
        let mut args: Vec<String> =
            ["run", "nightly", "cargo", "fuzz", "run", &target, "--"].map(Into::into).into();
        args.push(format!("-max_total_time={FUZZ_SECONDS}"));
        args.push(format!("-rss_limit_mb={FUZZ_MEMORY}"));
        args.extend(["-timeout=10", "-verbosity=0", "-print_final_stats=1"].map(Into::into));
        Task { name: format!("fuzz {target}"), program: "rustup", args, rounds: 0 }
    }));
    all
}

/// How a task went so far.
struct Row {
    name: String,
    runs: u32,
    failed: u32,
    skipped: u32,
    took: Duration,
    figure: String,
}

impl Row {
    fn new(name: String) -> Self {
        Self { name, runs: 0, failed: 0, skipped: 0, took: Duration::ZERO, figure: String::new() }
    }

    fn run(&mut self, task: &Task) -> Result<()> {
        let fuzzes = self.name.starts_with("fuzz ");
        if fuzzes && proc::find("cargo-fuzz").is_none() {
            println!("SKIPPED: {}: cargo install cargo-fuzz, and a nightly compiler", self.name);
            self.skipped += 1;
            return Ok(());
        }
        println!("{} …", self.name);
        let began = Instant::now();
        let done = output(&mut task.command()?)?;
        self.took += began.elapsed();
        self.runs += 1;
        let (said, log) =
            (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        self.skipped += said.matches("SKIPPED").count() as u32;
        let mut figures = if fuzzes { log.lines() } else { said.lines() };
        if let Some(figure) = figures.rfind(|line| is_figure(line, fuzzes)) {
            self.figure = own_words(figure).to_owned();
        }
        if !done.status.success() {
            self.failed += 1;
            let path = format!("{KEPT}/{}-{}", self.name.replace(' ', "-"), self.runs);
            println!("FAILED: {}: see {path}", self.name);
            fs::write(&path, format!("{said}\n{log}")).context("cannot keep what failed")?;
        }
        Ok(())
    }
}

/// All that a command prints, which ends when this process does.
fn output(command: &mut Command) -> Result<Output> {
    let mut stderr = tempfile::tempfile().context("cannot keep what is said")?;
    command.stdout(Stdio::piped()).stderr(stderr.try_clone()?);
    let mut running = Tethered::spawn(command)?;
    let mut done = Output { stdout: Vec::new(), stderr: Vec::new(), status: ExitStatus::default() };
    running.stdout()?.read_to_end(&mut done.stdout)?;
    done.status = running.wait()?;
    stderr.rewind()?;
    stderr.read_to_end(&mut done.stderr)?;
    Ok(done)
}

/// What a test said, where the runner has begun the line.
fn own_words(line: &str) -> &str {
    let begun = line.strip_prefix("test ").and_then(|line| line.split_once(" ... "));
    begun.map_or(line, |(_, said)| said).trim()
}

/// Whether a line says what was measured, and is none of the test runner's own.
fn is_figure(line: &str, fuzzes: bool) -> bool {
    if fuzzes {
        return line.starts_with("stat::number_of_executed_units");
    }
    let line = own_words(line);
    let own = ["ok", "test ", "running ", "failures", "FAILED", "SKIPPED", "---- "];
    !line.is_empty() && !own.iter().any(|begin| line.starts_with(begin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_from_what_the_test_runner_says() {
        assert!(is_figure("100 deaths in 3 fetches", false));
        assert!(is_figure("test x ... 5 calls", false));
        assert_eq!(own_words("test x ... 5 calls"), "5 calls");
        for own in
            ["", "running 1 test", "test x ... ok", "test result: ok. 1 passed", "SKIPPED: x"]
        {
            assert!(!is_figure(own, false), "{own}");
        }
        assert!(is_figure("stat::number_of_executed_units: 5", true));
    }

    #[test]
    fn every_fuzz_target_is_run() {
        let names: Vec<String> = tasks().into_iter().map(|task| task.name).collect();
        for target in ["connection", "datagram", "journal", "folder"] {
            assert!(names.contains(&format!("fuzz {target}")), "{names:?}");
        }
    }
}
