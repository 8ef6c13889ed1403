//! Owns the deliberate breakages: a list of ways in which core could be wrong, each of which a test has
//! to notice. Never touches the sources that are shipped: it breaks a copy.
//!
//! All breakages stand in one copy, each behind a switch that the environment turns on, so core is built
//! once, and a breakage costs no more than the tests. (A copy of its own for each would cost a build of
//! core's tests each, a minute or two; a tool that makes breakages up makes thousands that mean nothing.)
//! The copy is a workspace of its own with the same target folder: what core needs is built already.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::proc::Tethered;
use crate::table::Table;

/// A breakage whose tests take longer than this is noticed by that: something never ends.
const PATIENCE: Duration = Duration::from_secs(600);
/// Cases of a property test: a quarter of the usual, so that what is noticed here is noticed for sure.
const CASES: &str = "64";
/// What turns a breakage on, by its number.
const SWITCH: &str = "POTLUCK_MUTANT";

struct Mutant {
    machine: &'static str,
    /// In `crates/core/src`.
    file: &'static str,
    /// What is wrong with it.
    what: &'static str,
    /// Stands once in the file.
    old: &'static str,
    /// Takes its place; `$on` is true where this mutant is turned on, and where it is false nothing may
    /// differ.
    new: &'static str,
}

const fn mutant(
    machine: &'static str,
    file: &'static str,
    what: &'static str,
    old: &'static str,
    new: &'static str,
) -> Mutant {
    Mutant { machine, file, what, old, new }
}

#[rustfmt::skip]
const MUTANTS: &[Mutant] = &[
    mutant("registrar", "registrar/seats.rs", "a datagram seen before is heeded again", "if !session.window.mark(opened.counter) {", "if !session.window.mark(opened.counter) && !$on {"),
    mutant("registrar", "registrar/requests.rs", "a change that a later one overtook is made all the same", "if order < *last {", "if order < *last && !$on {"),
    mutant("registrar", "registrar/requests.rs", "a removed member is answered like any other", "if self.roster.member(line.member).is_none_or(|member| member.removed.is_some()) {", "if !$on && self.roster.member(line.member).is_none_or(|member| member.removed.is_some()) {"),
    mutant("registrar", "registrar/requests.rs", "what comes from an unproven address is heeded", "if !proven {", "if !proven && !$on {"),
    mutant("registrar", "registrar/requests.rs", "a refusal to an unproven address may be longer than the request", "if sealed(&refusal) >= length {\n            refusal.text.clear();\n        }\n        if sealed(&refusal) < length {", "if sealed(&refusal) >= length && !$on {\n            refusal.text.clear();\n        }\n        if $on || sealed(&refusal) < length {"),
    mutant("registrar", "registrar/pace.rs", "nobody is too fast", "if self.used >= i64::from(burst) * 1_000 {", "if self.used >= i64::from(burst) * 1_000 && !$on {"),
    mutant("registrar", "registrar/gate.rs", "what is passed over is opened all the same", "if kept.member == member.0 && now < kept.shut {", "if !$on && kept.member == member.0 && now < kept.shut {"),
    mutant("registrar", "registrar/seats.rs", "a lease lapses though it was renewed", "Some(until) if until > now => {\n                    seat.queued = true;", "Some(until) if until > now && !$on => {\n                    seat.queued = true;"),
    mutant("registrar", "registrar/seats.rs", "a lease lapses, and what was leased stays", "self.stats.lapsed += 1;\n                    self.evict(member);", "self.stats.lapsed += 1;\n                    if !$on {\n                        self.evict(member);\n                    }"),
    mutant("registrar", "registrar/requests.rs", "registrations that differ are not asked for again", "let repeat_all = theirs != 0 &&", "let repeat_all = !$on && theirs != 0 &&"),
    mutant("registrar", "registrar/requests.rs", "after a restart nobody is asked how much it holds", "(theirs != ours || seat.vague)", "(theirs != ours || (seat.vague && !$on))"),
    mutant("registrar", "registrar/requests.rs", "what a round did not name stays", "if said.round_ends {\n            self.catalog.end_round", "if said.round_ends && !$on {\n            self.catalog.end_round"),
    mutant("registrar", "registrar/requests.rs", "a reader publishes contents", "if role == Role::Read && !self.catalog.knows(&item.id)", "if !$on && role == Role::Read && !self.catalog.knows(&item.id)"),
    mutant("registrar", "registrar/requests.rs", "a name needs no signature", "record.check(network).is_ok()", "$on || record.check(network).is_ok()"),
    mutant("registrar", "registrar/requests.rs", "a heartbeat renews no lease", "self.renew(number, now + self.lease());", "if !$on || !said.items.is_empty() {\n            self.renew(number, now + self.lease());\n        }"),
    mutant("registrar", "registrar/desk.rs", "what a removed member hosts stays", "self.watchers.remove(*member);\n            self.evict(*member);", "self.watchers.remove(*member);\n            if !$on {\n                self.evict(*member);\n            }"),
    mutant("registrar", "registrar/desk.rs", "any certificate makes a stranger a member again", "shown.filter(|c| c.check(self.network, peer, wall).is_ok())?", "shown.filter(|c| $on || c.check(self.network, peer, wall).is_ok())?"),
    mutant("registrar", "registrar/members.rs", "whoever knows an invitation by name may join by it", "if !same_tag(&join_tag", "if !$on && !same_tag(&join_tag"),
    mutant("registrar", "registrar/members.rs", "uses of an invitation are not counted", "invited.used += 1;", "invited.used += u32::from(!$on);"),
    mutant("registrar", "registrar/members.rs", "a clock that is ahead takes removed machines off the list", "let most = revoked.len().saturating_sub(ALWAYS_REVOKED);", "let most = if $on { revoked.len() } else { revoked.len().saturating_sub(ALWAYS_REVOKED) };"),
    mutant("registrar", "registrar/watch.rs", "a watcher that missed some is not told what", "let since = if watch.since == 0 || missed {", "let since = if $on || watch.since == 0 || missed {"),
    mutant("registrar", "registrar/watch.rs", "a watcher that missed more than is remembered is not told so", "let missed = watch.since != 0 &&", "let missed = !$on && watch.since != 0 &&"),
    mutant("catalog", "catalog/mod.rs", "a host that lost a part still counts as complete", "(true, false) => self.demote(slot, at),", "(true, false) if !$on => self.demote(slot, at),"),
    mutant("catalog", "catalog/mod.rs", "that something is hosted no more is not saved", "self.journal.push_back(Durable::Dropped(member, id));", "if !$on {\n            self.journal.push_back(Durable::Dropped(member, id));\n        }"),
    mutant("catalog", "catalog/mod.rs", "watchers are not told of new hosts", "if before.is_none() || was != is || resized {", "if !$on && (before.is_none() || was != is || resized) {"),
    mutant("catalog", "catalog/mod.rs", "hosts may differ about a size", "if content.size != item.size && content.hosts.len() > usize::from(mine) {", "if !$on && content.size != item.size && content.hosts.len() > usize::from(mine) {"),
    mutant("catalog", "catalog/mod.rs", "one member may register as much as it likes", "if hoster.holds.len() >= self.limits.registrations_a_member {", "if !$on && hoster.holds.len() >= self.limits.registrations_a_member {"),
    mutant("catalog", "catalog/names.rs", "anybody may publish versions of a name", "if named.owner != record.publisher {", "if !$on && named.owner != record.publisher {"),
    mutant("catalog", "catalog/names.rs", "an older version takes the place of the newest", "Some((newest, _)) if newest > record.version => {}", "Some((newest, _)) if newest > record.version && !$on => {}"),
    mutant("catalog", "catalog/names.rs", "an old version may be another content than it was", "if known.id != record.id {", "if !$on && known.id != record.id {"),
    mutant("trust", "trust.rs", "a certificate never expires", "if now > self.not_after.plus(CLOCK_SKEW) {", "if !$on && now > self.not_after.plus(CLOCK_SKEW) {"),
    mutant("trust", "trust.rs", "a certificate holds for any machine", "if self.peer != peer {", "if !$on && self.peer != peer {"),
    mutant("trust", "trust.rs", "a join may be relayed to another connection", "hasher.update(exporter);", "if !$on {\n        hasher.update(exporter);\n    }"),
    mutant("trust", "trust.rs", "any signature holds", "UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()", "$on || UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()"),
    mutant("link", "link.rs", "a digest is sent though changes are on their way", "let digest = if on_their_way { 0 }", "let digest = if on_their_way && !$on { 0 }"),
    mutant("link", "link.rs", "a gap in the notices is not noticed", "if notice.before > sequence {", "if notice.before > sequence && !$on {"),
    mutant("link", "link.rs", "a listing is not looked at anew after the index restarted", "watch.sequence = None;\n            watch.renew_at = now;", "if !$on {\n                watch.sequence = None;\n            }\n            watch.renew_at = now;"),
    mutant("link", "link.rs", "a question is sent once", "question.next = now + question.wait.wait();", "question.next =\n                now + if $on { Duration::from_secs(3_600) } else { question.wait.wait() };"),
    mutant("link", "link.rs", "keys that an index does not know are kept", "silent |= question.tries > TRIES_BEFORE_SESSION;", "silent |= !$on && question.tries > TRIES_BEFORE_SESSION;"),
    mutant("link", "link.rs", "the index is not told of withdrawals", "if self.forget(id) && !self.removed {\n            self.gone.insert(id);", "if self.forget(id) && !self.removed && !$on {\n            self.gone.insert(id);"),
    mutant("link", "link.rs", "the index is not told that more is held", "self.grown.insert(id);", "if !$on {\n                self.grown.insert(id);\n            }"),
    mutant("link", "link.rs", "a machine whose certificate is no good waits for its session to end", "if matches!(self.desk, Desk::Idle) {\n            self.need_session();\n        }\n    }\n\n    /// The desk", "if matches!(self.desk, Desk::Idle) && !$on {\n            self.need_session();\n        }\n    }\n\n    /// The desk"),
    mutant("link", "link.rs", "a round ends though something is under way", "&& !round.ending\n            && busy.is_empty()", "&& !round.ending\n            && ($on || busy.is_empty())"),
    mutant("link", "link.rs", "what was refused is believed to be registered", "if !self.unsaid.contains(&id) {\n                    self.refused(id, refusal);", "if !self.unsaid.contains(&id) && !$on {\n                    self.refused(id, refusal);"),
    mutant("link", "link.rs", "what is shared before the word that nothing is was heard is of no round", "round: self.round.as_ref().map_or(0, |round| round.number),", "round: self.round.as_ref().filter(|round| !($on && round.ending && !ids.is_empty())).map_or(0, |round| round.number),"),
    mutant("link", "link.rs", "an index that is never content is told everything again at once", "if registered.repeat_all && self.round.is_none() && !ended {", "if registered.repeat_all && self.round.is_none() && ($on || !ended) {"),
    mutant("swarm", "swarm.rs", "whoever lets us wait is waited for", "late.into_iter().for_each(|host| self.stall(now, host));", "if !$on {\n            late.into_iter().for_each(|host| self.stall(now, host));\n        }"),
    mutant("swarm", "swarm.rs", "a poisoner is not dropped", "if self.hosts.contains_key(&host) {\n                    self.forget(now, host);", "if !$on && self.hosts.contains_key(&host) {\n                    self.forget(now, host);"),
    mutant("swarm", "swarm.rs", "what a lost host was asked for stays with it", "fn forget(&mut self, now: Moment, host: Host) {\n        self.take_all_back(now, host);", "fn forget(&mut self, now: Moment, host: Host) {\n        if !$on {\n            self.take_all_back(now, host);\n        }"),
    mutant("swarm", "swarm.rs", "no further hosts are looked for", "self.outputs.push_back(Output::NeedHosts);", "if !$on {\n                    self.outputs.push_back(Output::NeedHosts);\n                }"),
    mutant("swarm", "swarm.rs", "no piece is asked of a second host at the end", "if self.is_endgame() && !self.asked.is_empty() {", "if !$on && self.is_endgame() && !self.asked.is_empty() {"),
    mutant("swarm", "swarm/neighbour.rs", "what a host that is always busy was asked for is still expected soon", "(self.time_for(ahead) * self.doubt())", "(self.time_for(ahead) * if $on { 1 } else { self.doubt() })"),
    mutant("swarm", "swarm.rs", "no piece is asked of a third host", "1 => CLEARLY,", "1 if !$on => CLEARLY,"),
    mutant("swarm", "swarm.rs", "what a seed granted before is not asked for", "if let Some((host, piece)) = self.granted_before(now) {", "if let Some((host, piece)) = self.granted_before(now).filter(|_| !$on) {"),
    mutant("swarm", "swarm.rs", "a seed that fell silent is waited for", "hosts.filter(|n| n.grants.is_some_and(lapsed)).for_each(|n| n.grants = None);", "hosts.filter(|n| !$on && n.grants.is_some_and(lapsed)).for_each(|n| n.grants = None);"),
    mutant("swarm", "swarm.rs", "what is new is not announced before all is there", "} else if self.announce_at <= now || self.news.len() >= MOST_IN_FRAME {\n            self.announce(now);", "} else if !$on && (self.announce_at <= now || self.news.len() >= MOST_IN_FRAME) {\n            self.announce(now);"),
    mutant("swarm", "swarm.rs", "a busy host is asked again at once", "n.busy = n.busy.max(now + wait.min(MOST_BUSY));", "n.busy = if $on { n.busy } else { n.busy.max(now + wait.min(MOST_BUSY)) };"),
    mutant("swarm", "swarm.rs", "hosts that are always busy are asked first for ever", "n.turned_away();", "if !$on {\n            n.turned_away();\n        }"),
    mutant("sharing", "sharing.rs", "what is not held is served", "if !shared.have.has(piece) {", "if !$on && !shared.have.has(piece) {"),
    mutant("sharing", "sharing.rs", "who was served much comes first again", "member.served += u64::from(bytes);", "member.served += u64::from(bytes) * u64::from(!$on);"),
    mutant("sharing", "sharing.rs", "nobody is ever told Busy", "&& self.readers_besides(peer) >= FEW_READERS {", "&& self.readers_besides(peer) >= FEW_READERS && !$on {"),
    mutant("sharing", "sharing.rs", "one member may have any number of pieces waiting", "if member.waiting >= MOST_WAITING {", "if member.waiting >= MOST_WAITING && !$on {"),
    mutant("sharing", "sharing.rs", "a connection whose socket takes nothing blocks all others", "if waited >= patience && !line.stuck {", "if waited >= patience && !line.stuck && !$on {"),
    mutant("sharing", "sharing/grants.rs", "grants that are not taken are kept", "Stage::Granted => NOT_TAKEN.max(sending),", "Stage::Granted if $on => Duration::MAX,\n                    Stage::Granted => NOT_TAKEN.max(sending),"),
    mutant("sharing", "sharing/grants.rs", "what was declined is never granted again", ".filter(|(_, since)| now.since(**since) >= DECLINED)", ".filter(|(_, since)| !$on && now.since(**since) >= DECLINED)"),
    mutant("sharing", "sharing/grants.rs", "one reader is granted pieces, and several help themselves", "lacking.take(2).count() == 2);", "lacking.take(2).count() == if $on { 1 } else { 2 });"),
    mutant("sharing", "sharing/grants.rs", "grants are taken back before a slow line can have told of them", "let sending = Duration::from_millis(4 * sending);", "let sending = Duration::from_millis(if $on { 0 } else { 4 * sending });"),
    mutant("sharing", "sharing/grants.rs", "a second copy goes out while the first is under way", "newest.retain(|_, given| now.since(*given) >= patience);", "newest.retain(|_, given| $on || now.since(*given) >= patience);"),
    mutant("sharing", "sharing/grants.rs", "what is under way to one is kept from all others for ever", "newest.keys().for_each(|piece| self.stock.expire(*piece));", "newest.keys().filter(|_| !$on).for_each(|piece| self.stock.expire(*piece));"),
    mutant("sharing", "sharing/grants.rs", "a reader that announces at once shortens the usual time for ever", "Some(moved.max(USUAL_LEAST))", "Some(if $on { moved } else { moved.max(USUAL_LEAST) })"),
    mutant("sharing", "sharing/grants.rs", "limits widen while the first grants are not answered", "self.answer.map(|answer| answer.max(WIDEN_EVERY));", "self.answer.map(|answer| if $on { WIDEN_EVERY } else { answer.max(WIDEN_EVERY) });"),
];

/// Prints a table of all mutants (or of those that `only` means) and of what noticed
/// each; fails where one was not noticed.
pub(super) fn run(only: &[String]) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let copy = root.join("target/mutants");
    break_copy(&root, &copy)?;
    let tests = build(&copy)?;
    let noticed = test(&tests, None, &[])?;
    ensure!(noticed.is_none(), "without any mutant, a test fails: {}", noticed.unwrap_or_default());
    let meant = |m: &Mutant, only: &String| m.what.contains(only) || m.machine == only;
    let chosen = |m: &Mutant| only.is_empty() || only.iter().any(|only| meant(m, only));
    let mut table = Table::new(&["machine", "broken: what it does then", "noticed by"]);
    let mut missed = 0;
    for (number, mutant) in MUTANTS.iter().enumerate().filter(|(_, m)| chosen(m)) {
        // The machine's own tests, then all but the worlds, which take longest, then the worlds.
        let own = format!("{}::", mutant.machine);
        let mut noticed = None;
        for turn in [&[own.as_str()][..], &["--skip", "sim::"], &["sim::"]] {
            if noticed.is_none() {
                noticed = test(&tests, Some(number), turn)?;
            }
        }
        missed += usize::from(noticed.is_none());
        let noticed = noticed.unwrap_or_else(|| "**nothing**".to_owned());
        eprintln!("{number:>3} {}: {}: {noticed}", mutant.machine, mutant.what);
        table.row([mutant.machine.to_owned(), mutant.what.to_owned(), noticed]);
    }
    println!("{table}");
    ensure!(missed == 0, "{missed} mutants were not noticed by any test");
    Ok(())
}

/// Makes, or brings up to date, a workspace of core alone in which all mutants stand behind switches.
fn break_copy(root: &Path, copy: &Path) -> Result<()> {
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    let members = manifest.lines().map(|line| match line {
        _ if line.starts_with("members") => "members = [\"crates/core\"]",
        _ if line.starts_with("default-members") || line.starts_with("exclude") => "",
        line => line,
    });
    write(&copy.join("Cargo.toml"), members.collect::<Vec<_>>().join("\n").as_bytes())?;
    for file in ["Cargo.lock", "rust-toolchain.toml"] {
        write(&copy.join(file), &fs::read(root.join(file))?)?;
    }
    let mut broken: BTreeMap<PathBuf, String> = BTreeMap::new();
    let sources = root.join("crates/core/src");
    for (number, mutant) in MUTANTS.iter().enumerate() {
        let path = sources.join(mutant.file);
        let text = match broken.remove(&path) {
            Some(text) => text,
            None => fs::read_to_string(&path)?,
        };
        ensure!(
            text.matches(mutant.old).count() == 1,
            "{} does not stand once in {}",
            mutant.old,
            mutant.file
        );
        let on = format!("crate::mutants::on({number})");
        broken.insert(path, text.replacen(mutant.old, &mutant.new.replace("$on", &on), 1));
    }
    let lib = sources.join("lib.rs");
    broken.insert(lib.clone(), fs::read_to_string(&lib)? + "mod mutants;\n");
    for folder in ["crates/core", "fuzz/corpus/world"] {
        copy_folder(&root.join(folder), &copy.join(folder), &broken)?;
    }
    let switch = format!(
        "pub(crate) fn on(mutant: u32) -> bool {{\n    static ON: std::sync::LazyLock<Option<u32>> = \
         std::sync::LazyLock::new(|| std::env::var(\"{SWITCH}\").ok()?.parse().ok());\n    \
         *ON == Some(mutant)\n}}\n"
    );
    write(&copy.join("crates/core/src/mutants.rs"), switch.as_bytes())
}

fn copy_folder(from: &Path, to: &Path, broken: &BTreeMap<PathBuf, String>) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_folder(&path, &target, broken)?;
        } else if let Some(text) = broken.get(&path) {
            write(&target, text.as_bytes())?;
        } else {
            write(&target, &fs::read(&path)?)?;
        }
    }
    Ok(())
}

/// Writes a file, unless that is what it says already: what did not change is not built again.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    fs::create_dir_all(path.parent().context("a file lies in a folder")?)?;
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Builds the copy's tests, in a target folder of its own: cargo would take the copy's crate for the one
/// that it was copied from, and run one's tests for the other's. Says where they are.
fn build(copy: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["test", "--no-run", "--lib", "-p", "potluck-core"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(copy)
        .env("CARGO_TARGET_DIR", copy.join("target"))
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the copy with all mutants does not build");
    let text = String::from_utf8_lossy(&output.stdout);
    let executable = |line: &str| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        rest.split_once('"').map(|(path, _)| PathBuf::from(path))
    };
    text.lines().find_map(executable).context("cargo built no tests")
}

/// Runs tests with a mutant turned on, until one fails; names it.
fn test(tests: &Path, mutant: Option<usize>, which: &[&str]) -> Result<Option<String>> {
    let mut command = Tethered::command(tests)?;
    command.args(which).stdout(Stdio::piped()).stderr(Stdio::null());
    // What property tests find here is not to be kept.
    command.env("PROPTEST_FAILURE_PERSISTENCE", "off").env("PROPTEST_CASES", CASES);
    match mutant {
        Some(number) => command.env(SWITCH, number.to_string()),
        None => command.env_remove(SWITCH),
    };
    let mut running = Tethered::spawn(&mut command)?;
    let output = running.stdout()?;
    let (lines, heard) = channel();
    thread::spawn(move || {
        // It ends with the tests' output, or when nobody listens any more.
        BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| lines.send(line))
    });
    let ends = Instant::now() + PATIENCE;
    loop {
        match heard.recv_timeout(ends.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let failed = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED"));
                if let Some(name) = failed {
                    return Ok(Some(format!("`{name}`")));
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                return Ok(Some(format!("a test that never ends ({} s)", PATIENCE.as_secs())));
            }
        }
    }
    let status = running.wait()?;
    Ok((!status.success()).then(|| format!("the tests ended with {status}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_is_a_change_of_what_stands_once_in_its_file() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/core/src");
        for mutant in MUTANTS {
            let text = fs::read_to_string(sources.join(mutant.file)).expect("its file is there");
            let times = text.matches(mutant.old).count();
            assert_eq!(times, 1, "{}: {} in {}", mutant.what, mutant.old, mutant.file);
            assert!(mutant.new.contains("$on"), "{} has no switch", mutant.what);
        }
        assert!(MUTANTS.len() >= 25);
    }
}
