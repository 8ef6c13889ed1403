//! Owns `potluck demo`: the whole story on one machine, with real processes, real sockets and real
//! files in a temporary folder that is gone afterwards. Never touches this machine's own state.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use potluck::control::{Event, IfExists, Request, Source};
use potluck::daemon::{self, Client, Role, socket_path};
use potluck::{Error, ErrorKind, Result};

use crate::interrupt;
use crate::process::{Context, absolute, log_tail};
use crate::render::{self, Table, content, count, plain, size, span, title};
use crate::verbs::change;

/// The made-up file: large enough that two machines fetch it at once for a while.
const FILE_BYTES: usize = 64 << 20;
/// How long the listing may take to show a change; it is pushed, so this is generous.
const WATCH_WAIT: Duration = Duration::from_secs(10);
/// How long a process may take to stop.
const STOP_WAIT: Duration = Duration::from_secs(20);
/// As for a person who fetches: without any source for so long, it has failed.
const FETCH_TIMEOUT_S: u64 = 30;

const PEERS: [&str; 4] = ["alice", "bob", "carol", "dora"];

pub(crate) fn demo(cx: &Context, path: Option<&Path>) -> Result<()> {
    let began = Instant::now();
    let path = path.map(absolute).transpose()?;
    if let Some(path) = &path {
        fs::metadata(path)
            .map_err(|e| Error::io(format_args!("cannot read {}", path.display()), &e))?;
    }
    let stage = Stage::build()?;
    let children = stage.children.clone();
    let hooked = interrupt::hooked(move || kill(&children));
    let played = play(cx, &stage, path);
    drop(hooked);
    if interrupt::happened() {
        return Err(Error::new(ErrorKind::Interrupted, "interrupted; everything was cleaned up"));
    }
    if let Err(error) = played {
        for log in stage.logs() {
            let tail = log_tail(&log, 0);
            if !tail.is_empty() {
                let who = log.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                cx.tell(&format!("the last words of {who}:{tail}"));
            }
        }
        return Err(error);
    }
    drop(stage);
    say(cx, &format!("all is right, and cleaned up, after {}", span(began.elapsed())))
}

/// The story, step by step.
fn play(cx: &Context, stage: &Stage, path: Option<PathBuf>) -> Result<()> {
    let step = Step::new(cx);
    let things = match path {
        Some(path) => vec![path],
        None => make_things(&stage.folder.join("made-up"))?,
    };
    step.done(&match things.as_slice() {
        [one] => format!("will share {}", render::path(one)),
        _ => format!("made up a file of {} and a folder", size(FILE_BYTES as u64)),
    })?;

    let step = Step::new(cx);
    let (network, invitation) = stage.start_index()?;
    step.done(&format!("an index runs: network {}", render::machine(&network)))?;

    let step = Step::new(cx);
    stage.start_peers(&invitation)?;
    step.done(&format!("{} run and have joined by its invitation", PEERS.join(", ")))?;
    let seen = watch(cx, &stage.peer("dora"))?;

    let step = Step::new(cx);
    let contents: Vec<Content> =
        things.iter().map(|path| share(stage, path)).collect::<Result<_>>()?;
    let names: Vec<String> = contents.iter().map(Content::to_text).collect();
    step.done(&format!("alice shares {}", names.join(" and ")))?;

    let step = Step::new(cx);
    wait_until_seen(&seen, &contents)?;
    step.done("dora, who watches the listing, has seen it appear")?;

    let step = Step::new(cx);
    let mut got = fetch(stage, &["bob", "carol"], &contents)?;
    step.done("bob and carol fetched it at the same time")?;

    let step = Step::new(cx);
    daemon::stop(&stage.peer("alice"), STOP_WAIT)?;
    step.done("alice left")?;

    let step = Step::new(cx);
    let last = fetch(stage, &["dora"], &contents)?;
    if last.iter().any(|got| got.sources.iter().any(|s| s.label == "alice" && s.bytes > 0)) {
        return Err(wrong("dora got something from alice, who had left"));
    }
    got.extend(last);
    step.done("dora fetched it all the same: from those who had fetched it")?;

    let step = Step::new(cx);
    let files = compare(&things, &got)?;
    step.done(&format!("compared {}: every byte is right", count(files, "file", "files")))?;
    show(cx, &got)
}

/// A step of the story, with its time.
struct Step<'a> {
    cx: &'a Context,
    began: Instant,
}

impl<'a> Step<'a> {
    fn new(cx: &'a Context) -> Self {
        Self { cx, began: Instant::now() }
    }

    fn done(self, what: &str) -> Result<()> {
        say(self.cx, &format!("{:>7}  {what}", span(self.began.elapsed())))
    }
}

fn say(cx: &Context, text: &str) -> Result<()> {
    cx.say(text);
    cx.event(&Event::Note { text: text.trim_start().to_owned() })
}

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Integrity, what).hint("this is a defect of potluck: please report it")
}

/// A temporary folder and the processes in it. Both are gone when it is dropped.
struct Stage {
    folder: PathBuf,
    children: Children,
}

type Children = Arc<Mutex<Vec<Child>>>;

impl Stage {
    fn build() -> Result<Self> {
        let base = std::env::temp_dir();
        let me = std::process::id();
        for n in 0..100 {
            let folder = base.join(format!("potluck-demo-{me}-{n}"));
            match DirBuilder::new().mode(0o700).create(&folder) {
                Ok(()) => return Ok(Self { folder, children: Arc::default() }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(cannot("make", &folder)(error)),
            }
        }
        Err(Error::new(ErrorKind::Exists, format!("{} is full of demos", base.display())))
    }

    fn state(&self, who: &str) -> PathBuf {
        self.folder.join(who)
    }

    fn peer(&self, who: &str) -> PathBuf {
        socket_path(&self.state(who), Role::Peer)
    }

    fn logs(&self) -> impl Iterator<Item = PathBuf> {
        ["index"].iter().chain(&PEERS).map(|who| self.folder.join(format!("{who}.log")))
    }

    /// Starts one process; its first line is yet to be read.
    fn start(&self, who: &str, verb: &[&str]) -> Result<ChildStdout> {
        let log = self.folder.join(format!("{who}.log"));
        let log = File::create(&log).map_err(cannot("make", &log))?;
        let program =
            std::env::current_exe().map_err(|e| Error::io("cannot find this program", &e))?;
        let mut child = Command::new(program)
            .args(verb)
            .args(["--json", "--leash", "--listen", "127.0.0.1:0", "--state"])
            .arg(self.state(who))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|e| Error::io(format_args!("cannot start {who}"), &e))?;
        let stdout = child.stdout.take();
        lock(&self.children).push(child);
        stdout.ok_or_else(|| Error::new(ErrorKind::Other, format!("{who} has no output")))
    }

    /// Its network's id, and an invitation to it.
    fn start_index(&self) -> Result<(String, String)> {
        let stdout = self.start("index", &["index"])?;
        match ready("index", stdout)? {
            Event::Ready { invite: Some(invite), network, .. } => {
                Ok((network.unwrap_or_default(), invite))
            }
            other => Err(unexpected("index", &other)),
        }
    }

    /// All at once, since they need not wait for each other.
    fn start_peers(&self, invitation: &str) -> Result<()> {
        let started: Vec<ChildStdout> = PEERS
            .iter()
            .map(|who| self.start(who, &["up", "--label", who, "--advertise", "127.0.0.1"]))
            .collect::<Result<_>>()?;
        for (who, stdout) in PEERS.into_iter().zip(started) {
            ready(who, stdout)?;
            let invitation = invitation.to_owned();
            self.ask(who, &Request::Join { invitation })?;
        }
        Ok(())
    }

    /// Asks a peer; its result, or why there is none.
    fn ask(&self, who: &str, request: &Request) -> Result<Event> {
        let mut last = None;
        for event in connect(&self.peer(who))?.request(request)? {
            let event = event?;
            if let Some(failure) = event.failure() {
                return Err(Error { message: format!("{who}: {}", failure.message), ..failure });
            }
            last = Some(event);
        }
        last.ok_or_else(|| Error::new(ErrorKind::Other, format!("{who} said nothing")))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        kill(&self.children);
        for child in lock(&self.children).iter_mut() {
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn lock(children: &Children) -> MutexGuard<'_, Vec<Child>> {
    children.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whoever waits for one of them sees its end.
fn kill(children: &Children) {
    for child in lock(children).iter_mut() {
        let _ = child.kill();
    }
}

fn connect(socket: &Path) -> Result<Client> {
    Client::connect(socket)?.ok_or_else(|| {
        Error::new(ErrorKind::Other, format!("nobody listens at {}", socket.display()))
    })
}

fn unexpected(who: &str, event: &Event) -> Error {
    Error::new(ErrorKind::Other, format!("{who} said something unexpected: {event:?}"))
}

fn cannot(what: &str, path: &Path) -> impl Fn(io::Error) -> Error {
    let what = format!("cannot {what} {}", path.display());
    move |error| Error::io(&what, &error)
}

/// Waits for the first line of a process.
fn ready(who: &str, stdout: ChildStdout) -> Result<Event> {
    let mut line = String::new();
    let mut stdout = BufReader::new(stdout);
    let read = stdout.read_line(&mut line);
    // Read on, so that it is never stopped by a full pipe.
    let _ = thread::Builder::new()
        .name("stdout".into())
        .spawn(move || io::copy(&mut stdout, &mut io::sink()));
    if !read.is_ok_and(|read| read > 0) {
        return Err(Error::new(ErrorKind::Other, format!("{who} ended before it was ready")));
    }
    let event = Event::from_line(&line)?;
    event.failure().map_or(Ok(event), Err)
}

/// Shows every change of the listing as it comes; what was seen comes out of the channel.
fn watch(cx: &Context, socket: &Path) -> Result<Receiver<String>> {
    let (tell, seen) = channel();
    let mut answers = connect(socket)?.request(&Request::Watch { glob: "*".into() })?;
    // The listing as it is comes first: from then on nothing is missed.
    match answers.next() {
        Some(Ok(Event::Listing { .. })) => {}
        Some(Ok(event)) => {
            return Err(event.failure().unwrap_or_else(|| unexpected("dora", &event)));
        }
        Some(Err(error)) => return Err(error),
        None => return Err(Error::new(ErrorKind::Other, "dora does not watch")),
    }
    let cx = cx.clone();
    let show = move || {
        for event in answers.map_while(Result::ok) {
            let _ = cx.event(&event);
            if let Event::Change { what, row } = event {
                cx.say(&format!("            {}", change(&what, &row)));
                let _ = tell.send(row.id);
            }
        }
    };
    thread::Builder::new()
        .name("watch".into())
        .spawn(show)
        .map_err(|e| Error::io("cannot watch", &e))?;
    Ok(seen)
}

/// Waits until all of these have been seen, in whatever order.
fn wait_until_seen(seen: &Receiver<String>, contents: &[Content]) -> Result<()> {
    let mut missing: BTreeSet<&str> = contents.iter().map(|content| content.id.as_str()).collect();
    let until = Instant::now() + WATCH_WAIT;
    while !missing.is_empty() {
        match seen.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(id) => missing.remove(id.as_str()),
            Err(_) => return Err(wrong("the listing did not show what was shared")),
        };
    }
    Ok(())
}

/// What alice shares.
struct Content {
    id: String,
    name: Option<String>,
    version: Option<u32>,
    size: u64,
}

impl Content {
    fn to_text(&self) -> String {
        let title = title(self.name.as_deref(), self.version, &self.id);
        format!("{title} ({}, {})", size(self.size), content(&self.id))
    }
}

fn share(stage: &Stage, path: &Path) -> Result<Content> {
    match stage.ask("alice", &Request::Share { path: path.to_owned(), name: None })? {
        Event::Shared { id, name, version, size } => Ok(Content { id, name, version, size }),
        other => Err(unexpected("alice", &other)),
    }
}

/// What somebody got.
struct Got {
    who: &'static str,
    /// Which of the contents.
    which: usize,
    path: PathBuf,
    seconds: f64,
    sources: Vec<Source>,
}

/// Everything, on all of these peers, at the same time.
fn fetch(stage: &Stage, who: &[&'static str], contents: &[Content]) -> Result<Vec<Got>> {
    thread::scope(|scope| {
        let mut fetches = Vec::new();
        for &who in who {
            let to = stage.folder.join(format!("{who}-got"));
            fs::create_dir(&to).map_err(cannot("make", &to))?;
            for (which, content) in contents.iter().enumerate() {
                let what = content.name.clone().unwrap_or_else(|| content.id.clone());
                let (to, exists) = (to.clone(), IfExists::Refuse);
                let request = Request::Get { what, to, exists, timeout_s: FETCH_TIMEOUT_S };
                fetches.push(scope.spawn(move || match stage.ask(who, &request)? {
                    Event::Done { path, seconds, sources, .. } => {
                        Ok(Got { who, which, path, seconds, sources })
                    }
                    other => Err(unexpected(who, &other)),
                }));
            }
        }
        let joined = fetches.into_iter().map(|fetch| {
            fetch.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::Other, "a fetch panicked")))
        });
        joined.collect()
    })
}

/// Compares every copy with what was shared; how many files were compared.
fn compare(things: &[PathBuf], got: &[Got]) -> Result<u64> {
    let mut compared = 0;
    let truths: Vec<Tree> = things.iter().map(|path| Tree::read(path)).collect::<Result<_>>()?;
    for Got { who, which, path, .. } in got {
        let copy = Tree::read(path)?;
        if copy != truths[*which] {
            return Err(wrong(format!(
                "what {who} has at {} is not what was shared",
                path.display()
            )));
        }
        compared += copy.files;
    }
    Ok(compared)
}

/// A file or folder as it lies on the disk.
#[derive(PartialEq)]
struct Tree {
    /// Relative path to hash and executable bit; none: a folder.
    entries: BTreeMap<PathBuf, Option<(blake3::Hash, bool)>>,
    files: u64,
}

impl Tree {
    fn read(root: &Path) -> Result<Self> {
        let mut tree = Self { entries: BTreeMap::new(), files: 0 };
        for entry in walkdir::WalkDir::new(root) {
            let entry = entry.map_err(|e| cannot("read", root)(e.into()))?;
            let path = entry.path().strip_prefix(root).unwrap_or(entry.path()).to_owned();
            let what = if entry.file_type().is_dir() {
                None
            } else if entry.file_type().is_file() {
                tree.files += 1;
                let mut hasher = blake3::Hasher::new();
                let cannot = cannot("read", entry.path());
                let file = File::open(entry.path()).map_err(&cannot)?;
                let mode = file.metadata().map_err(&cannot)?.permissions().mode();
                hasher.update_reader(file).map_err(&cannot)?;
                Some((hasher.finalize(), mode & 0o100 != 0))
            } else {
                continue; // links and devices are not shared
            };
            tree.entries.insert(path, what);
        }
        Ok(tree)
    }
}

/// A file and a folder with what folders have: levels, empty files, a program.
fn make_things(at: &Path) -> Result<Vec<PathBuf>> {
    let mut bytes = vec![0; FILE_BYTES];
    blake3::Hasher::new().update(b"potluck demo").finalize_xof().fill(&mut bytes);
    let file = at.join("film.bin");
    let folder = at.join("photos");
    for below in ["2025/summer", "2026/winter", "tools"] {
        let path = folder.join(below);
        fs::create_dir_all(&path).map_err(cannot("make", &path))?;
    }
    let write = |path: &Path, bytes: &[u8]| {
        File::create(path).and_then(|mut file| file.write_all(bytes)).map_err(cannot("write", path))
    };
    write(&file, &bytes)?;
    for n in 0..24 {
        let below = if n % 2 == 0 { "2025/summer" } else { "2026/winter" };
        let picture = &bytes[n * 1_000_003..][..n * 20_011 + 1];
        write(&folder.join(below).join(format!("picture {n}.jpg")), picture)?;
    }
    write(&folder.join("empty"), b"")?;
    let program = folder.join("tools/show");
    write(&program, b"#!/bin/sh\nls\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
        .map_err(cannot("write", &program))?;
    Ok(vec![file, folder])
}

/// Who got how much from whom.
fn show(cx: &Context, got: &[Got]) -> Result<()> {
    if cx.json {
        return Ok(());
    }
    cx.say("");
    let mut table = Table::new(&["", ">FROM alice", ">FROM bob", ">FROM carol", ">IN ALL", ">IN"]);
    for who in &PEERS[1..] {
        let mine = || got.iter().filter(|got| got.who == *who);
        let from = |label: &str| -> u64 {
            let sources = mine().flat_map(|got| &got.sources);
            sources.filter(|source| source.label == label).map(|source| source.bytes).sum()
        };
        let all: u64 = mine().flat_map(|got| &got.sources).map(|source| source.bytes).sum();
        let slowest = mine().map(|got| got.seconds).fold(0.0, f64::max);
        let time = Duration::try_from_secs_f64(slowest).unwrap_or_default();
        let some = |bytes| if bytes == 0 { "-".to_owned() } else { size(bytes) };
        table.row([
            plain(who),
            some(from("alice")),
            some(from("bob")),
            some(from("carol")),
            size(all),
            span(time),
        ]);
    }
    table.print();
    cx.say("");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_told_apart_by_bytes_names_and_the_executable_bit() {
        let folder = tempfile::tempdir().unwrap();
        let things = make_things(folder.path()).unwrap();
        let photos = &things[1];
        let truth = Tree::read(photos).unwrap();
        assert_eq!(truth.files, 26);
        assert!(truth == Tree::read(photos).unwrap());
        let program = photos.join("tools/show");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(truth != Tree::read(photos).unwrap());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(truth == Tree::read(photos).unwrap());
        fs::rename(photos.join("empty"), photos.join("full")).unwrap();
        assert!(truth != Tree::read(photos).unwrap());
    }

    #[test]
    fn the_stage_leaves_nothing_behind() {
        let stage = Stage::build().unwrap();
        let (folder, children) = (stage.folder.clone(), stage.children.clone());
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = child.id();
        lock(&children).push(child);
        fs::write(folder.join("x"), "x").unwrap();
        drop(stage);
        assert!(!folder.exists());
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
