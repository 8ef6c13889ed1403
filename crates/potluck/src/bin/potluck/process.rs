//! Owns the way from a verb to the process that does its work: the running one of the state folder,
//! one started in the background, or this one. Never knows what is asked.

use std::fs::{self, DirBuilder, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::Arc;

use potluck::control::{Event, Request};
use potluck::daemon::{Client, Role, socket_path};
use potluck::{Error, ErrorKind, Limit, Peer, Result, Settings};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::{Common, Listen};
use crate::interrupt;
use crate::render::{err, limits, out, plain_lines};
use crate::serve::log;

/// The log of a background peer is begun anew where it is longer than this at the start.
const LOG_LIMIT_BYTES: u64 = 4 * 1024 * 1024;
/// How much of the log's end is shown when a background peer did not start.
const LOG_TAIL_LINES: usize = 5;
/// How much of it is read for that.
const LOG_TAIL_BYTES: u64 = 4096;
/// How long a background peer may take to be ready: it may have a long journal to read.
const START_WAIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// What every verb knows.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// Absolute.
    pub(crate) state: PathBuf,
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    pub(crate) verbose: u8,
}

impl Context {
    pub(crate) fn new(common: &Common) -> Result<Self> {
        let state = match &common.state {
            Some(state) => absolute(state)?,
            None => default_state(std::env::var_os("XDG_STATE_HOME"), std::env::var_os("HOME"))?,
        };
        let Common { json, quiet, verbose, .. } = *common;
        Ok(Self { state, json, quiet, verbose })
    }

    /// A result for a person, on stdout. (With `--json` the event itself was printed.)
    pub(crate) fn say(&self, text: &str) {
        if !self.json {
            out(text);
        }
    }

    /// A remark on stderr.
    pub(crate) fn tell(&self, text: &str) {
        if !self.quiet {
            err(&plain_lines(text));
        }
    }

    /// A remark on stderr that `--json` says by an event already.
    pub(crate) fn remark(&self, text: &str) {
        if !self.json {
            self.tell(text);
        }
    }

    /// An event on stdout, where `--json` wants it.
    pub(crate) fn event(&self, event: &Event) -> Result<()> {
        if self.json {
            out(event.to_line()?.trim_end());
        }
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.state.join(Role::Peer.folder())
    }

    pub(crate) fn socket(&self, role: Role) -> PathBuf {
        socket_path(&self.state, role)
    }

    /// Fails where such a process of this state folder runs.
    pub(crate) fn must_not_run(&self, role: Role, hint: &str) -> Result<()> {
        let Some(running) = Client::connect(&self.socket(role))? else { return Ok(()) };
        let (pid, state) = (running.pid(), self.state.display());
        let text = match role {
            Role::Peer => format!("a peer runs already for {state} (process {pid})"),
            Role::Index => format!("an index runs already for {state} (process {pid})"),
        };
        Err(Error::new(ErrorKind::Exists, text).hint(hint))
    }

    /// Settings of a peer in this process.
    pub(crate) fn settings(&self, listen: &Listen) -> Settings {
        Settings {
            state: self.state.clone(),
            listen: listen.listen,
            label: listen.label.clone().unwrap_or_else(host_name),
            advertise: listen.advertise.clone(),
            limit_up: listen.limit_up,
            limit_down: listen.limit_down,
        }
    }
}

/// Where requests go.
pub(crate) enum Line {
    /// To the process that listens there.
    Process(PathBuf),
    /// To a peer in this process.
    Here(Arc<Peer>),
}

impl Line {
    /// To the running peer, or to one started in the background.
    pub(crate) fn to_peer(cx: &Context, listen: &Listen) -> Result<Self> {
        let socket = cx.socket(Role::Peer);
        if Client::connect(&socket)?.is_some() {
            if listen.listen.is_some() && std::env::var_os("POTLUCK_LISTEN").is_none() {
                cx.tell("potluck runs already: --listen is for its next start (potluck down)");
            }
            limit_running(cx, &socket, listen)?;
        } else {
            start(cx, listen)?;
        }
        Ok(Self::Process(socket))
    }

    /// The same for verbs that are of no use where this state folder never had a peer.
    pub(crate) fn to_known_peer(cx: &Context) -> Result<Self> {
        if !cx.folder().exists() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("this machine has joined no network (state folder {})", cx.state.display()),
            )
            .hint("potluck join INVITATION, or potluck share PATH to begin a network here"));
        }
        Self::to_peer(cx, &Listen::default())
    }

    /// To the running peer; where none runs, that is the answer.
    pub(crate) fn to_running_peer(cx: &Context) -> Result<Self> {
        let socket = cx.socket(Role::Peer);
        if Client::connect(&socket)?.is_none() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("no peer runs for {}", cx.state.display()),
            )
            .hint("share, get, join and up start one"));
        }
        Ok(Self::Process(socket))
    }

    /// To the index of this state folder if it runs, else to the peer.
    pub(crate) fn to_authority(cx: &Context) -> Result<Self> {
        let socket = cx.socket(Role::Index);
        if Client::connect(&socket)?.is_some() {
            return Ok(Self::Process(socket));
        }
        Self::to_known_peer(cx)
    }

    /// To a peer in this process, that other commands of this state folder find as well.
    pub(crate) fn here(cx: &Context, listen: &Listen) -> Result<Self> {
        cx.must_not_run(Role::Peer, "leave out --foreground to use it, or stop it: potluck down")?;
        drop(log(cx));
        let peer = Peer::open(cx.settings(listen))?;
        peer.serve_control()?;
        Ok(Self::Here(Arc::new(peer)))
    }

    /// Asks, and shows `on` every event but a failure, which is returned. An interruption ends it
    /// with `Interrupted`: whoever did the work sees that nobody waits for it.
    pub(crate) fn ask(
        &self,
        cx: &Context,
        request: &Request,
        on: &mut dyn FnMut(&Event),
    ) -> Result<()> {
        let (mut failure, mut resolved) = (None, false);
        let mut see = |event: &Event| -> Result<()> {
            match event {
                Event::Failed { .. } => failure = event.failure(),
                Event::Unknown => {}
                _ => cx.event(event)?,
            }
            resolved |= event.is_result();
            if let Event::Note { text } = event {
                cx.remark(text);
            }
            on(event);
            Ok(())
        };
        let seen = match self {
            Self::Process(socket) => ask_process(socket, request, &mut see),
            Self::Here(peer) => ask_here(peer, request, &mut see),
        };
        if interrupt::happened() && (failure.is_some() || !resolved) {
            return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
        }
        seen?;
        failure.map_or(Ok(()), Err)
    }
}

fn ask_process(
    socket: &Path,
    request: &Request,
    see: &mut dyn FnMut(&Event) -> Result<()>,
) -> Result<()> {
    let client = Client::connect(socket)?.ok_or_else(|| {
        Error::new(ErrorKind::Other, "the potluck process has ended").hint("try again")
    })?;
    let hang_up = client.hang_up()?;
    let _hooked = interrupt::hooked(move || hang_up.now());
    for event in client.request(request)? {
        see(&event?)?;
    }
    Ok(())
}

fn ask_here(
    peer: &Peer,
    request: &Request,
    see: &mut dyn FnMut(&Event) -> Result<()>,
) -> Result<()> {
    let _hooked = interrupt::hooked(|| {});
    let mut seen = Ok(());
    peer.handle(request.clone(), &mut |event| {
        seen = see(&event);
        seen.is_ok() && !interrupt::happened()
    });
    seen
}

/// Limits that were asked for on the command line, and not by the settings of whoever runs it, hold
/// for a peer that runs already.
fn limit_running(cx: &Context, socket: &Path, listen: &Listen) -> Result<()> {
    let asked = |limit: Option<Limit>, variable| {
        let set = std::env::var(variable).ok().and_then(|text| text.parse().ok());
        limit.filter(|limit| set != Some(*limit))
    };
    let up = asked(listen.limit_up, "POTLUCK_LIMIT_UP");
    let down = asked(listen.limit_down, "POTLUCK_LIMIT_DOWN");
    if up.is_none() && down.is_none() {
        return Ok(());
    }
    let rate = |limit: Limit| limit.bytes_a_second().unwrap_or(0);
    let request = Request::Limit { up: up.map(rate), down: down.map(rate), keep: false };
    ask_process(socket, &request, &mut |event| match event {
        Event::Limits { up, down } => {
            cx.tell(&format!("the running peer keeps to {}", limits(*up, *down)));
            Ok(())
        }
        event => event.failure().map_or(Ok(()), Err),
    })
}

/// Starts a peer in the background and waits until it is ready. Of several commands that do so at
/// the same time, one starts it and the others find it.
fn start(cx: &Context, listen: &Listen) -> Result<()> {
    let folder = cx.folder();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .map_err(|e| Error::io(format_args!("cannot make the folder {}", folder.display()), &e))?;
    let one_at_a_time = folder.join("start.lock");
    let lock = File::options()
        .create(true)
        .append(true)
        .open(&one_at_a_time)
        .and_then(|lock| lock.lock().map(|()| lock))
        .map_err(|e| Error::io(format_args!("cannot lock {}", one_at_a_time.display()), &e))?;
    if Client::connect(&cx.socket(Role::Peer))?.is_some() {
        return Ok(());
    }
    let log_path = folder.join("log");
    let log = open_log(&log_path)
        .map_err(|e| Error::io(format_args!("cannot open the log {}", log_path.display()), &e))?;
    let cannot = |e: &std::io::Error| Error::io("cannot start potluck in the background", e);
    let mut command = Command::new(std::env::current_exe().map_err(|e| cannot(&e))?);
    command.args(["up", "--detach", "--json", "--state"]).arg(&cx.state);
    if let Some(address) = listen.listen {
        command.arg("--listen").arg(address.to_string());
    }
    if let Some(label) = &listen.label {
        command.arg(format!("--label={label}"));
    }
    if let Some(host) = &listen.advertise {
        command.arg(format!("--advertise={host}"));
    }
    for (option, limit) in [("up", listen.limit_up), ("down", listen.limit_down)] {
        if let Some(limit) = limit {
            command.arg(format!("--limit-{option}={limit}"));
        }
    }
    command.args(std::iter::repeat_n("-v", usize::from(cx.verbose)));
    // It makes a session of its own at once, and keeps nobody from unmounting this folder.
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let logged_before = fs::metadata(&log_path).map_or(0, |log| log.len());
    let mut child = command.spawn().map_err(|e| cannot(&e))?;
    let said = child.stdout.take().map_or(Ok(None), first_event);
    drop(lock);
    match said {
        Ok(Some(Event::Ready { .. })) => {
            cx.tell("started potluck in the background (potluck status, potluck down)");
            Ok(())
        }
        Ok(Some(event)) if event.failure().is_some() => event.failure().map_or(Ok(()), Err),
        said => {
            let _ = child.kill();
            let _ = child.wait();
            let why = match said {
                Ok(_) => "it ended before it was ready".to_owned(),
                Err(error) => error.message,
            };
            Err(Error::new(
                ErrorKind::Other,
                format!(
                    "potluck did not start in the background: {why}{}",
                    log_tail(&log_path, logged_before)
                ),
            )
            .hint(format!("its log: {}", log_path.display())))
        }
    }
}

/// The first event that a starting peer prints; none where it ended without.
fn first_event(stdout: ChildStdout) -> Result<Option<Event>> {
    let ready = poll(&mut [PollFd::new(&stdout, PollFlags::IN)], Some(&START_WAIT));
    if ready == Ok(0) {
        let text = format!("it was not ready after {} s", START_WAIT.tv_sec);
        return Err(Error::new(ErrorKind::Other, text));
    }
    let mut line = String::new();
    match BufReader::new(stdout).read_line(&mut line) {
        Ok(read) if read > 0 => Event::from_line(&line).map(Some),
        _ => Ok(None),
    }
}

fn open_log(path: &Path) -> std::io::Result<File> {
    let log = File::options().create(true).append(true).mode(0o600).open(path)?;
    if log.metadata()?.len() > LOG_LIMIT_BYTES {
        log.set_len(0)?;
    }
    Ok(log)
}

/// The last lines that were logged after the first `before` bytes, each on a line of its own.
pub(crate) fn log_tail(path: &Path, before: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut log = File::open(path)?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES).max(before)))?;
        let mut end = Vec::new();
        log.take(LOG_TAIL_BYTES).read_to_end(&mut end)?;
        Ok(end)
    };
    let end = read().unwrap_or_default();
    let end = String::from_utf8_lossy(&end);
    let lines: Vec<&str> = end.lines().rev().take(LOG_TAIL_LINES).collect();
    lines.iter().rev().map(|line| format!("\n  | {line}")).collect()
}

/// `path` from the root on, since a process elsewhere reads it.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::io(format_args!("cannot tell where {} is", path.display()), &e))
}

fn default_state(
    xdg: Option<std::ffi::OsString>,
    home: Option<std::ffi::OsString>,
) -> Result<PathBuf> {
    let folder = |value: Option<std::ffi::OsString>| {
        value.map(PathBuf::from).filter(|path| path.is_absolute())
    };
    folder(xdg)
        .or_else(|| folder(home).map(|home| home.join(".local/state")))
        .map(|base| base.join("potluck"))
        .ok_or_else(|| {
            Error::new(ErrorKind::Usage, "no folder for potluck's state: HOME is not set")
                .hint("give one: --state DIR or POTLUCK_STATE")
        })
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "peer".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_folder_follows_xdg_then_home_and_ignores_relative_paths() {
        let at = |xdg: &str, home: &str| {
            let given = |text: &str| (!text.is_empty()).then(|| text.into());
            default_state(given(xdg), given(home))
        };
        assert_eq!(at("/x", "/h"), Ok("/x/potluck".into()));
        assert_eq!(at("relative", "/h"), Ok("/h/.local/state/potluck".into()));
        assert_eq!(at("", "/h"), Ok("/h/.local/state/potluck".into()));
        assert_eq!(at("", "").map_err(|e| e.kind), Err(ErrorKind::Usage));
    }

    #[test]
    fn a_log_is_begun_anew_when_it_has_grown_long_and_its_end_is_what_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "one\ntwo\nthree\nfour\nfive\nsix\n").unwrap();
        assert_eq!(open_log(&path).unwrap().metadata().unwrap().len(), 28);
        assert_eq!(log_tail(&path, 24), "\n  | six");
        assert_eq!(log_tail(&path, 0), "\n  | two\n  | three\n  | four\n  | five\n  | six");
        File::create(&path).unwrap().set_len(LOG_LIMIT_BYTES + 1).unwrap();
        assert_eq!(open_log(&path).unwrap().metadata().unwrap().len(), 0);
        assert_eq!(log_tail(&path, 0), "");
    }
}
