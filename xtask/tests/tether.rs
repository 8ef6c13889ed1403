//! What a task has started ends with it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn runs(pid: &str) -> bool {
    // Nobody may be there to wait for it: then it stays, dead.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// The workers of a simulation went on for hours after whoever had started it was killed.
#[test]
fn what_is_tethered_and_all_that_it_started_end_with_who_holds_the_other_end() {
    let mut tethered = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["tether", "sh", "-c", "sleep 600 & echo $$; echo $!; wait"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(tethered.stdout.take().unwrap()).lines();
    let pids = [lines.next().unwrap().unwrap(), lines.next().unwrap().unwrap()];
    assert!(pids.iter().all(|pid| runs(pid)));
    drop(tethered.stdin.take());
    let patience = Instant::now() + Duration::from_secs(60);
    while pids.iter().any(|pid| runs(pid)) {
        assert!(Instant::now() < patience, "they run on");
        std::thread::yield_now();
    }
    tethered.wait().unwrap();
    // And where it ends by itself, that is how it ended.
    let mut ended = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["tether", "sh", "-c", "exit 7"])
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let held = ended.stdin.take();
    assert_eq!(ended.wait().unwrap().code(), Some(7));
    drop(held);
}
