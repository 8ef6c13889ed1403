//! Owns `cargo xtask lab`: which scenarios are tried, that they leave nothing behind, and the tables.
//!
//! The lab runs in namespaces of its own (processes, mounts, network), held by its first process.
//! When that ends, and it ends with whoever started it, the kernel ends all processes in it and
//! takes back hosts, cables, rules and files: there is nothing that could be left over.

mod crowd;
mod fleet;
mod net;
mod scenario;
mod swarm;

use std::env;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use self::crowd::Crowd;
use self::fleet::Fleet;
use self::net::{Link, Net, Weather};
use self::scenario::{Fault, Scenario, When};
use self::swarm::{Outcome, Players};
use crate::bench::{machine, make_up};
use crate::proc;
use crate::table::{Table, median};
use crate::tools::{Aria2Torrent, Curl, Libtorrent, Tool, Tracker};

/// Above this share of the machine in use, the machine was measured and not the program.
const TOO_BUSY: f64 = 0.9;
/// What the lab's namespaces are made with.
const UNSHARE: [&str; 6] =
    ["--mount", "--net", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"];
/// Where its files are: in memory, and visible to nobody else.
const ROOM: &str = "/run";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Scenarios with a name [default: one made of the options]
    scenarios: Vec<Preset>,
    /// Every scenario that has a name
    #[arg(long, conflicts_with = "scenarios")]
    all: bool,
    /// A small one, in seconds: fails unless every copy is complete and right; says nothing of times
    #[arg(long, conflicts_with_all = ["scenarios", "all"])]
    quick: bool,
    /// How many fetch [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    n: Option<u16>,
    /// Size of each content [default: 128]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    size: Option<u64>,
    /// What the seed may send, in Mbit/s; 0: no cap [default: 100]
    #[arg(long, value_name = "MBIT")]
    seed_up: Option<f64>,
    /// What fetchers may send; several values are dealt in turn [default: 100]
    #[arg(long, value_name = "MBIT", value_delimiter = ',')]
    up: Vec<f64>,
    /// What fetchers may receive, likewise [default: 100]
    #[arg(long, value_name = "MBIT", value_delimiter = ',')]
    down: Vec<f64>,
    /// Packets that are lost
    #[arg(long, value_name = "PERCENT")]
    loss: Option<f64>,
    /// How long a packet takes, one way (needs netem in the kernel)
    #[arg(long, value_name = "MS")]
    delay: Option<f64>,
    /// When the last fetcher begins: 0.5 (parts of the bound) or 2s
    #[arg(long, value_name = "WHEN")]
    join_at: Option<When>,
    /// Kill the seed when it has sent so much
    #[arg(long, value_name = "COPIES")]
    kill_seed_after: Option<f64>,
    /// What befalls a fetcher: kill, stop, resume or slow, who and when, such as kill:2@0.5
    #[arg(long = "fault", value_name = "WHAT:HOST@WHEN")]
    faults: Vec<Fault>,
    /// Contents that all fetch at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    contents: Option<u8>,
    /// Who takes part, in turn
    #[arg(long, value_name = "TOOL", value_delimiter = ',', default_value = "potluck")]
    tools: Vec<Player>,
    /// The number of the first run: where chance strikes, each number is a run of its own
    #[arg(long, value_name = "NTH", default_value_t = 0)]
    from: u32,
    /// How often; the table shows the median and the worst
    #[arg(long, default_value_t = 3, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Keep what the processes logged (POTLUCK_LOG says how much) in this folder
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Within the namespaces, with this binary.
    #[arg(long, hide = true, value_name = "BINARY")]
    inside: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Preset {
    /// One fetcher, every link 100 Mbit/s
    #[value(name = "n1")]
    N1,
    /// Four
    #[value(name = "n4")]
    N4,
    /// Eight
    #[value(name = "n8")]
    N8,
    /// Sixteen
    #[value(name = "n16")]
    N16,
    /// Eight: the seed sends 40 Mbit/s, half of them 100 and half 20; all receive 200
    Mixed,
    /// Eight, one of which joins at half time
    Late,
    /// Eight, the seed killed after 1.2 copies
    SeedKilled,
    /// Eight, two contents at once
    Two,
    /// Eight of 50 Mbit/s: by chance one becomes slow, one stands still, one dies
    NeverStuck,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Player {
    Potluck,
    /// Everyone fetches from one nginx
    Star,
    /// aria2 as a BitTorrent client
    Aria2,
    /// libtorrent (python3-libtorrent), over TCP
    Libtorrent,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(potluck) = &args.inside {
        return inside(args, potluck);
    }
    for tool in args.tools.iter().filter_map(|player| player.tool()) {
        let missing = tool.missing();
        ensure!(missing.is_none(), "{}: {} is not installed", tool.name(), missing.unwrap_or(""));
    }
    if let Some(why) = obstacle() {
        ensure!(args.quick, "{why}");
        println!("SKIPPED: the lab was not tried: {why}");
        return Ok(());
    }
    let potluck = proc::build_potluck()?;
    let mut lab = Command::new("unshare");
    lab.args(UNSHARE).arg(env::current_exe()?).args(env::args_os().skip(1));
    lab.arg("--inside").arg(potluck);
    // The leash: it ends when this process does, however that comes.
    let mut lab = lab.stdin(Stdio::piped()).spawn().context("cannot run unshare")?;
    let leash = lab.stdin.take();
    let ended = lab.wait()?;
    drop(leash);
    ensure!(ended.success(), "the lab failed ({ended})");
    Ok(())
}

/// Why there can be no lab here.
fn obstacle() -> Option<String> {
    for program in ["unshare", "mount", "ip", "tc", "nft"] {
        if proc::find(program).is_none() {
            return Some(format!("{program} is not installed (util-linux, iproute2, nftables)"));
        }
    }
    let tried = Command::new("unshare").args(UNSHARE).arg("true").output();
    match tried {
        Ok(done) if done.status.success() => None,
        Ok(done) => Some(format!(
            "no namespaces can be made here (not root?): {}",
            String::from_utf8_lossy(&done.stderr).trim()
        )),
        Err(error) => Some(format!("cannot run unshare: {error}")),
    }
}

fn inside(args: &Args, potluck: &Path) -> Result<()> {
    thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut vec![]);
        std::process::exit(1);
    });
    proc::output(Command::new("mount").args(["-t", "tmpfs", "lab", ROOM]))?;
    proc::output(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    let scenarios: Vec<Scenario> = match (args.all, args.scenarios.is_empty()) {
        (true, _) => Preset::value_variants().iter().map(|of| args.scenario(Some(*of))).collect(),
        (false, true) => vec![args.scenario(None)],
        (false, false) => args.scenarios.iter().map(|of| args.scenario(Some(*of))).collect(),
    };
    let runs = if args.quick { 1 } else { args.runs };
    println!("{}\n", machine()?);
    let tracker = crowd::tracker()?;
    let mut table = Table::new(&HEADS);
    for scenario in &scenarios {
        let mut all: Vec<Vec<Outcome>> = args.tools.iter().map(|_| vec![]).collect();
        for nth in args.from..args.from + runs {
            for (player, outcomes) in args.tools.iter().zip(&mut all) {
                let name = format!("{}-{}-{nth}", scenario.title, player.name());
                let under = Path::new(ROOM).join(&name);
                fs::create_dir(&under)?;
                let outcome = once(&scenario.in_run(nth), *player, potluck, &under, &tracker);
                if let Some(logs) = &args.logs {
                    swarm::keep_logs(&under, &logs.join(&name))?;
                }
                let outcome = outcome.with_context(|| name.clone())?;
                for missing in &outcome.missing {
                    eprintln!("{name}: {missing}");
                }
                outcomes.push(outcome);
                fs::remove_dir_all(under)?;
            }
        }
        if args.quick {
            let complete = all.iter().flatten().all(|outcome| outcome.missing.is_empty());
            ensure!(complete, "not every copy was completed");
            println!("{}: every copy is complete and right.", scenario.title);
            return Ok(());
        }
        for (player, outcomes) in args.tools.iter().zip(&all) {
            table.row(row(scenario, *player, outcomes));
        }
    }
    let words: Vec<String> = env::args().skip(2).take_while(|word| word != "--inside").collect();
    println!("## `cargo xtask lab {}`: medians of {runs} runs\n\n{table}", words.join(" "));
    Ok(())
}

/// One run, in a network and with files of its own.
fn once(
    scenario: &Scenario,
    player: Player,
    potluck: &Path,
    under: &Path,
    tracker: &Tracker,
) -> Result<Outcome> {
    let mut links = vec![scenario.seed];
    links.extend(&scenario.fetchers);
    links.push(Link { up: 0.0, down: 0.0 }); // the index
    let net = Net::build(&links, scenario.weather)?;
    let files: Vec<PathBuf> =
        (0..scenario.contents).map(|nth| under.join(format!("content-{nth}"))).collect();
    let hashes = files.iter().map(|file| make_up(file, scenario.size));
    let hashes: Vec<blake3::Hash> = hashes.collect::<Result<_>>()?;
    let n = scenario.fetchers.len();
    let mut players: Box<dyn Players> = match player.tool() {
        None => Box::new(Fleet::start(potluck, under, n, &files, &hashes)?),
        Some(tool) => Box::new(Crowd::start(tool, under, n, &files, tracker)?),
    };
    swarm::run(scenario, &net, players.as_mut(), &hashes)
}

impl Player {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// The tool, unless it is potluck itself.
    fn tool(self) -> Option<Box<dyn Tool>> {
        let tracker = crowd::tracker_address();
        match self {
            Self::Potluck => None,
            Self::Star => Some(Box::new(Curl::http())),
            Self::Aria2 => Some(Box::new(Aria2Torrent::tracked(tracker))),
            Self::Libtorrent => Some(Box::new(Libtorrent::tracked(tracker))),
        }
    }
}

impl Args {
    /// A scenario by its name, or the plain one; what was given with an option is so in any case.
    fn scenario(&self, preset: Option<Preset>) -> Scenario {
        let given = |these: &[f64]| (!these.is_empty()).then(|| these.to_vec());
        let mixed = preset == Some(Preset::Mixed);
        let chance = preset == Some(Preset::NeverStuck);
        let (mut n, mut size) = if self.quick { (4, 16) } else { (4, 128) };
        match preset {
            Some(Preset::N1) => n = 1,
            None | Some(Preset::N4) => {}
            Some(Preset::N16) => n = 16,
            Some(Preset::Two) => (n, size) = (8, 64),
            Some(Preset::NeverStuck) => (n, size) = (8, 32),
            Some(_) => n = 8,
        }
        let late = (preset == Some(Preset::Late)).then_some(When::Bound(0.5));
        let kill = (preset == Some(Preset::SeedKilled)).then_some(1.2);
        let contents = if preset == Some(Preset::Two) { 2 } else { 1 };
        let name = preset.and_then(|of| Some(of.to_possible_value()?.get_name().to_owned()));
        let usual = if chance { 50.0 } else { 100.0 };
        let ups = given(&self.up).unwrap_or(if mixed { vec![100.0, 20.0] } else { vec![usual] });
        let downs = given(&self.down).unwrap_or(vec![if mixed { 200.0 } else { usual }]);
        let n = self.n.map_or(n, usize::from);
        let dealt = |nth| Link { up: ups[nth % ups.len()], down: downs[nth % downs.len()] };
        Scenario {
            title: name.unwrap_or_else(|| if self.quick { "quick".into() } else { "own".into() }),
            size: self.size.unwrap_or(size) << 20,
            contents: self.contents.map_or(contents, usize::from),
            seed: Link {
                up: self.seed_up.unwrap_or(if mixed { 40.0 } else { usual }),
                down: downs[0],
            },
            fetchers: (0..n).map(dealt).collect(),
            weather: Weather {
                loss: self.loss.unwrap_or(0.0) / 100.0,
                delay_ms: self.delay.unwrap_or(0.0),
            },
            late: self.join_at.or(late),
            kill_seed_after: self.kill_seed_after.or(kill),
            faults: self.faults.clone(),
            chance,
        }
    }
}

const HEADS: [&str; 14] = [
    "scenario",
    "tool",
    "N",
    "T* s",
    "T/T*",
    "worst",
    "copies the seed sent",
    "received twice",
    "CPU s",
    "peak RSS MiB",
    "machine in use",
    "by others",
    "last 1 % took (worst)",
    "remarks",
];

fn row(scenario: &Scenario, player: Player, outcomes: &[Outcome]) -> Vec<String> {
    let bound = scenario.bound_s();
    let ratios: Vec<f64> =
        outcomes.iter().flat_map(|outcome| outcome.seconds).map(|s| s / bound).collect();
    let of = |what: fn(&Outcome) -> f64| median(outcomes.iter().map(what));
    let worst = |values: &[f64]| values.iter().copied().fold(f64::NAN, f64::max);
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let twice: Vec<f64> = outcomes.iter().flat_map(|outcome| outcome.duplicates).collect();
    let tails: Vec<f64> = outcomes.iter().flat_map(|outcome| outcome.tails.clone()).collect();
    vec![
        scenario.title.clone(),
        player.name(),
        scenario.fetchers.len().to_string(),
        format!("{bound:.2}"),
        format!("{:.3}", median(ratios.iter().copied())),
        format!("{:.3}", worst(&ratios)),
        format!("{:.2}", of(|outcome| outcome.seed_copies)),
        if twice.is_empty() { "-".into() } else { format!("{:.2} %", 100.0 * worst(&twice)) },
        format!("{:.1}", of(|outcome| outcome.cpu_s)),
        format!("{:.0}", outcomes.iter().map(|outcome| outcome.rss_mib).fold(0.0, f64::max)),
        percent(of(|outcome| outcome.busy)),
        percent(of(|outcome| outcome.others)),
        format!("{:.1} % ({:.1})", median(tails.iter().copied()), worst(&tails)),
        remarks(scenario, outcomes),
    ]
}

fn remarks(scenario: &Scenario, outcomes: &[Outcome]) -> String {
    let mut remarks = vec![];
    let failed = outcomes.iter().filter(|outcome| !outcome.missing.is_empty()).count();
    if failed > 0 {
        let missing: usize = outcomes.iter().map(|outcome| outcome.missing.len()).sum();
        let runs = outcomes.len();
        remarks.push(format!("NOT COMPLETE in {failed} of {runs} runs, {missing} hosts in all"));
    }
    if let Some(bound) = scenario.late_bound_s() {
        let late: Vec<f64> = outcomes.iter().flat_map(|o| o.late_s).map(|s| s / bound).collect();
        let worst = late.iter().copied().fold(f64::NAN, f64::max);
        remarks.push(format!(
            "the late one: {:.3} × its own bound (worst {worst:.3})",
            median(late.iter().copied())
        ));
    }
    let killed: Vec<f64> = outcomes.iter().flat_map(|outcome| outcome.seed_killed_s).collect();
    if !killed.is_empty() {
        let bounds = median(killed.iter().copied()) / scenario.bound_s();
        remarks.push(format!("seed killed at {bounds:.2} T*"));
    }
    let fair: Vec<f64> = outcomes.iter().flat_map(|outcome| outcome.fairness).collect();
    if !fair.is_empty() {
        let worst = fair.iter().copied().fold(f64::NAN, f64::max);
        remarks.push(format!("last content / first: {:.3} (worst {worst:.3})", median(fair)));
    }
    if outcomes.iter().any(|outcome| outcome.busy > TOO_BUSY) {
        remarks.push("THE MACHINE WAS MEASURED".into());
    }
    remarks.join("; ")
}
