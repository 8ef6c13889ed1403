//! Owns the control socket, both ends: how the process of a state folder is found, who may speak to
//! it, and how lines are cut. Never knows what a request means.

use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, Shutdown, recv, shutdown, sockopt};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};

use crate::control::{Event, Request};
use crate::{Error, ErrorKind, Result};

/// The longest request: a path, a name and their escapes fit many times over.
const REQUEST_LIMIT_BYTES: u64 = 64 * 1024;
/// Conversations at once; each holds a thread.
const CONVERSATIONS_LIMIT: usize = 64;
/// How long a caller may take to say what it wants.
const REQUEST_WAIT: Duration = Duration::from_secs(5);
/// How long a caller may take to read before it is given up.
const SEND_WAIT: Duration = Duration::from_secs(30);
/// The longest address of a Unix socket: `sun_path` less the zero byte after it.
const ADDRESS_LIMIT_BYTES: usize = 107;
/// The wait after a failed `accept` (no descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Which process of a state folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one that shares and fetches.
    Peer,
    /// A standing index.
    Index,
}

impl Role {
    /// The folder within the state folder that is its own.
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Index => "index",
        }
    }
}

/// Where the process of this state folder and role listens: `<state>/<role>/control.sock`, however
/// long that is. It depends on nothing else, so that a process begun by a system
/// service is found from any login.
pub fn socket_path(state: &Path, role: Role) -> PathBuf {
    state.join(role.folder()).join("control.sock")
}

/// What runs a request. It is called on a thread of its own, and the conversation ends when it (or
/// whoever it gave the [`Replies`] to) drops them.
pub type Handler = Arc<dyn Fn(Request, Replies) + Send + Sync>;

/// The listening end. Dropping it stops listening; conversations under way go on to their end.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: Arc<UnixListener>,
    stopped: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
    /// Held for as long as this lives: whoever holds it owns the socket's path.
    _lock: File,
}

/// Listens at `path` and lets `handler` run what is asked. The folder is made if it is missing
/// (0700); a socket left behind by a process that died is replaced.
///
/// # Errors
/// `Exists` where a living process listens there; else what the operating system said.
pub fn serve(path: &Path, handler: Handler) -> Result<Server> {
    let cannot = |what: &str, error: &io::Error| {
        Error::io(format_args!("cannot {what} the control socket {}", path.display()), error)
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|e| Error::io(format_args!("cannot make the folder {}", folder.display()), &e))?;
    let lock = take_lock(&path.with_extension("lock"))?;
    match fs::symlink_metadata(path) {
        Ok(left) if left.file_type().is_socket() => {
            fs::remove_file(path).map_err(|e| cannot("replace", &e))?;
        }
        Ok(_) => {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("cannot listen at {}: something else is there", path.display()),
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(cannot("replace", &error)),
    }
    let listener = Address::of(path)
        .and_then(|address| UnixListener::bind(&address.path))
        .map_err(|e| cannot("make", &e))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(|e| cannot("protect", &e))?;

    let listener = Arc::new(listener);
    let stopped = Arc::new(AtomicBool::new(false));
    let accepting = thread::Builder::new()
        .name("control".into())
        .spawn({
            let (listener, stopped) = (listener.clone(), stopped.clone());
            move || accept(&listener, &stopped, &handler)
        })
        .map_err(|e| cannot("serve", &e))?;
    let path = path.to_owned();
    Ok(Server { path, listener, stopped, accepting: Some(accepting), _lock: lock })
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Nobody finds the socket from here on; then the waiting `accept` is woken.
        let _ = fs::remove_file(&self.path);
        let _ = shutdown(&*self.listener, Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// Where the answers to one request go. The conversation ends when this is dropped.
#[derive(Debug)]
pub struct Replies {
    stream: Mutex<UnixStream>,
    gone: AtomicBool,
    _place: Place,
}

impl Replies {
    /// Sends an event. False: nobody is there to read it any more (now or since an earlier call).
    ///
    /// An event of progress is left out where the reader is behind (a stopped terminal): the next
    /// one replaces it. Any other waits for the reader, 30 s at most.
    pub fn send(&self, event: &Event) -> bool {
        if self.gone() {
            return false;
        }
        let line =
            event.to_line().or_else(|error| Event::failed(&error).to_line()).unwrap_or_default();
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if event.is_progress() && !has_room(&stream) {
            return true;
        }
        let sent = stream.write_all(line.as_bytes()).is_ok();
        if !sent {
            self.gone.store(true, Ordering::Relaxed);
        }
        sent
    }

    /// Whether the other side has closed the connection: a person pressed Ctrl-C.
    pub fn gone(&self) -> bool {
        if !self.gone.load(Ordering::Relaxed) {
            let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            if has_hung_up(&stream) {
                self.gone.store(true, Ordering::Relaxed);
            }
        }
        self.gone.load(Ordering::Relaxed)
    }
}

/// A connection to a running process, good for one request.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    pid: Pid,
}

impl Client {
    /// Connects to the process that listens at `path`; none: nobody does.
    ///
    /// # Errors
    /// What the operating system said, above all that the caller may not.
    pub fn connect(path: &Path) -> Result<Option<Self>> {
        let connected = Address::of(path)
            .and_then(|address| UnixStream::connect(&address.path))
            .and_then(|stream| Ok((sockopt::socket_peercred(&stream)?.pid, stream)));
        match connected {
            Ok((pid, stream)) => Ok(Some(Self { stream, pid })),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(Error::io(
                    format_args!("cannot reach the potluck process at {}", path.display()),
                    &error,
                )),
            },
        }
    }

    /// The process at the other end.
    pub const fn pid(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// Ends the conversation from another thread: the answers end, and the process sees that nobody
    /// waits for them.
    ///
    /// # Errors
    /// `Other` where no descriptor is left.
    pub fn hang_up(&self) -> Result<HangUp> {
        self.stream
            .try_clone()
            .map(HangUp)
            .map_err(|error| Error::io("cannot watch for an interruption", &error))
    }

    /// Asks, and gives back the answers as they come, up to the end of the conversation. A process
    /// that ends without a result is an error, the last item.
    ///
    /// # Errors
    /// `Usage` where the request cannot be written as JSON.
    pub fn request(self, request: &Request) -> Result<Answers> {
        let line = request.to_line()?;
        // A process that has too much to do answers and closes without having read.
        let _ = (&self.stream).write_all(line.as_bytes());
        Ok(Answers { lines: BufReader::new(self.stream), resolved: false, ended: false })
    }
}

/// Ends a conversation (see [`Client::hang_up`]).
#[derive(Debug)]
pub struct HangUp(UnixStream);

impl HangUp {
    /// Now.
    pub fn now(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// The answers to one request.
#[derive(Debug)]
pub struct Answers {
    lines: BufReader<UnixStream>,
    resolved: bool,
    ended: bool,
}

impl Iterator for Answers {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        if self.ended {
            return None;
        }
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(n) if n > 0 && line.ends_with('\n') => {
                let event = Event::from_line(&line);
                self.resolved |= event.as_ref().is_ok_and(Event::is_result);
                self.ended = event.is_err();
                Some(event)
            }
            _ => {
                self.ended = true;
                (!self.resolved).then(|| {
                    Err(Error::new(
                        ErrorKind::Other,
                        "the potluck process ended before it had answered",
                    )
                    .hint("its log (peer/log in the state folder) may say why"))
                })
            }
        }
    }
}

/// Asks the process that listens at `path` to stop, and waits up to `within` until it is gone.
/// False: nobody listened.
///
/// # Errors
/// `Other` where it is still there after that time.
pub fn stop(path: &Path, within: Duration) -> Result<bool> {
    let Some(client) = Client::connect(path)? else { return Ok(false) };
    let pid = client.pid();
    // Opened before it is asked, so that it cannot be another process that got the same number.
    let process = pidfd_open(client.pid, PidfdFlags::empty());
    for event in client.request(&Request::Down)? {
        match event {
            Ok(event) => {
                if let Some(error) = event.failure() {
                    return Err(error);
                }
            }
            Err(_) => break, // it went before it had said so: what was asked for
        }
    }
    let Ok(process) = process else { return Ok(true) };
    let wait = Timespec { tv_sec: i64::try_from(within.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&wait)) {
        Ok(0) => Err(Error::new(
            ErrorKind::Other,
            format!("process {pid} still runs {} s after it was asked to stop", within.as_secs()),
        )
        .hint(format!("kill {pid}; nothing that was fetched is lost by it"))),
        _ => Ok(true),
    }
}

/// A path under which the kernel takes a socket's address: the path itself, or, where that is too
/// long for an address, the same through a descriptor of its folder.
struct Address {
    path: PathBuf,
    _folder: Option<OwnedFd>,
}

impl Address {
    fn of(path: &Path) -> io::Result<Self> {
        if path.as_os_str().as_bytes().len() <= ADDRESS_LIMIT_BYTES {
            return Ok(Self { path: path.to_owned(), _folder: None });
        }
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let folder = OwnedFd::from(File::open(folder)?);
        let path = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
        Ok(Self { path, _folder: Some(folder) })
    }
}

fn take_lock(path: &Path) -> Result<File> {
    let cannot =
        |error: &io::Error| Error::io(format_args!("cannot lock {}", path.display()), error);
    let lock = File::options().create(true).append(true).open(path).map_err(|e| cannot(&e))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            ErrorKind::Exists,
            format!("a potluck process already uses {}", path.with_file_name("").display()),
        )
        .hint("potluck status shows it, potluck down stops it; or give another --state")),
        Err(TryLockError::Error(error)) => Err(cannot(&error)),
    }
}

fn accept(listener: &UnixListener, stopped: &AtomicBool, handler: &Handler) {
    let places = Arc::new(());
    while !stopped.load(Ordering::SeqCst) {
        let Ok((stream, _)) = listener.accept() else {
            if !stopped.load(Ordering::SeqCst) {
                thread::sleep(ACCEPT_PAUSE);
            }
            continue;
        };
        if !is_allowed(&stream) {
            continue;
        }
        let place = Place(places.clone());
        let crowded = Arc::strong_count(&places) > CONVERSATIONS_LIMIT + 1;
        let handler = handler.clone();
        let conversation = move || converse(stream, place, crowded, &handler);
        if thread::Builder::new().name("conversation".into()).spawn(conversation).is_err() {
            thread::sleep(ACCEPT_PAUSE); // no thread to be had: the caller sees the end
        }
    }
}

/// One of the [`CONVERSATIONS_LIMIT`]; free again when dropped.
#[derive(Debug)]
struct Place(#[expect(dead_code, reason = "it is its count that matters")] Arc<()>);

/// Only the same user and root. (The folder's mode says so too; a folder can be opened by mistake.)
fn is_allowed(stream: &UnixStream) -> bool {
    sockopt::socket_peercred(stream)
        .is_ok_and(|caller| caller.uid.is_root() || caller.uid == geteuid())
}

fn converse(stream: UnixStream, place: Place, crowded: bool, handler: &Handler) {
    let _ = stream.set_read_timeout(Some(REQUEST_WAIT));
    let _ = stream.set_write_timeout(Some(SEND_WAIT));
    let request = if crowded {
        Err(Error::new(ErrorKind::Other, "too many requests at once; try again when one has ended"))
    } else {
        read_request(&stream)
    };
    let replies =
        Replies { stream: Mutex::new(stream), gone: AtomicBool::new(false), _place: place };
    match request {
        Ok(request) => handler(request, replies),
        Err(error) => {
            replies.send(&Event::failed(&error));
        }
    }
}

fn read_request(stream: &UnixStream) -> Result<Request> {
    let mut line = String::new();
    let read = BufReader::new(stream.take(REQUEST_LIMIT_BYTES)).read_line(&mut line);
    if read.is_err() || !line.ends_with('\n') {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("a request is one line of at most {REQUEST_LIMIT_BYTES} bytes"),
        ));
    }
    serde_json::from_str(&line).map_err(|error| {
        Error::new(
            ErrorKind::Usage,
            format!("this potluck process does not know that request: {error}"),
        )
        .hint("if potluck was updated, stop the old process first: potluck down")
    })
}

fn has_room(stream: &UnixStream) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Whether the end of what the other side sends was reached. Anything it sends after its request is
/// of no meaning and is read away, so that the end behind it is seen.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut more = [0; 512];
    loop {
        match recv(stream, &mut more[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return true,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return false,
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{bounded, unbounded};

    fn note(text: &str) -> Event {
        Event::Note { text: text.into() }
    }

    /// Answers every request with a note of it and `stopping`.
    fn echo() -> Handler {
        Arc::new(|request, replies: Replies| {
            replies.send(&note(&format!("{request:?}")));
            replies.send(&Event::Stopping);
        })
    }

    fn events(path: &Path, request: &Request) -> Vec<Result<Event>> {
        Client::connect(path).unwrap().unwrap().request(request).unwrap().collect()
    }

    #[test]
    fn a_request_is_answered_event_by_event_over_a_socket_only_its_owner_can_open() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        let server = serve(&path, echo()).unwrap();
        let get = Request::List { glob: "*".into() };
        assert_eq!(events(&path, &get), [Ok(note(&format!("{get:?}"))), Ok(Event::Stopping)]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        drop(server);
        assert!(Client::connect(&path).unwrap().is_none());
        assert!(!path.exists());
    }

    #[test]
    fn nobody_listens_where_there_is_no_folder_or_only_the_socket_of_a_dead_process() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Index);
        assert!(Client::connect(&path).unwrap().is_none());
        fs::create_dir(path.parent().unwrap()).unwrap();
        drop(UnixListener::bind(&path).unwrap()); // leaves its file behind, as a killed process does
        assert!(path.exists());
        assert!(Client::connect(&path).unwrap().is_none());
        let _server = serve(&path, echo()).unwrap();
        assert_eq!(events(&path, &Request::Status).len(), 2);
    }

    #[test]
    fn a_second_process_for_one_folder_is_refused_and_the_first_stays() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        let _first = serve(&path, echo()).unwrap();
        assert_eq!(serve(&path, echo()).unwrap_err().kind, ErrorKind::Exists);
        assert_eq!(events(&path, &Request::Status).len(), 2);
        let other = socket_path(state.path(), Role::Index);
        assert!(serve(&other, echo()).is_ok(), "an index may stand beside a peer");
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_replaced() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert_eq!(serve(&path, echo()).unwrap_err().kind, ErrorKind::Exists);
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_state_folder_of_any_depth_can_be_served_and_reached() {
        let state = tempfile::tempdir().unwrap();
        let deep = state.path().join("d".repeat(100)).join("e".repeat(100));
        let path = socket_path(&deep, Role::Peer);
        assert!(path.as_os_str().len() > ADDRESS_LIMIT_BYTES);
        assert!(Client::connect(&path).unwrap().is_none());
        let server = serve(&path, echo()).unwrap();
        assert_eq!(events(&path, &Request::Peers).len(), 2);
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn a_caller_that_hangs_up_is_noticed() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        let (asked, was_asked) = bounded(1);
        let (hung, has_hung) = bounded::<()>(0);
        let (told, was_told) = bounded(1);
        let _server = serve(
            &path,
            Arc::new(move |_, replies: Replies| {
                asked.send((replies.gone(), replies.send(&note("begun")))).unwrap();
                let _ = has_hung.recv();
                told.send((replies.gone(), replies.send(&note("nobody reads this")))).unwrap();
            }),
        )
        .unwrap();
        let client = Client::connect(&path).unwrap().unwrap();
        assert_eq!(client.pid(), std::process::id());
        let hang_up = client.hang_up().unwrap();
        let mut answers = client.request(&Request::Status).unwrap();
        assert_eq!(answers.next(), Some(Ok(note("begun"))));
        assert_eq!(was_asked.recv(), Ok((false, true)));
        hang_up.now();
        drop(hung);
        assert_eq!(was_told.recv(), Ok((true, false)));
        assert!(answers.next().is_some_and(|last| last.is_err()), "it had no result");
        assert_eq!(answers.next(), None);
    }

    #[test]
    fn a_conversation_lasts_as_long_as_its_replies_and_not_as_its_handler() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        let (kept, keep) = unbounded();
        let _server =
            serve(&path, Arc::new(move |_, replies| kept.send(replies).unwrap())).unwrap();
        let mut answers =
            Client::connect(&path).unwrap().unwrap().request(&Request::Status).unwrap();
        let replies: Replies = keep.recv().unwrap();
        assert!(replies.send(&Event::Stopping));
        assert_eq!(answers.next(), Some(Ok(Event::Stopping)));
        drop(replies);
        assert_eq!(answers.next(), None);
    }

    #[test]
    fn a_reader_that_stands_still_misses_progress_but_is_not_given_up() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        let (kept, keep) = unbounded();
        let _server =
            serve(&path, Arc::new(move |_, replies| kept.send(replies).unwrap())).unwrap();
        let mut answers =
            Client::connect(&path).unwrap().unwrap().request(&Request::Status).unwrap();
        let replies: Replies = keep.recv().unwrap();
        const SENT: u64 = 100_000; // far more than the socket's buffers hold
        assert!((0..SENT).all(|done| replies.send(&Event::Hashing { done, total: SENT })));
        let result = thread::spawn(move || replies.send(&Event::Stopping));
        let seen: Vec<_> = answers.by_ref().map(Result::unwrap).collect();
        assert!((seen.len() as u64) < SENT);
        assert_eq!(seen.last(), Some(&Event::Stopping));
        assert!(result.join().unwrap());
    }

    #[test]
    fn what_is_no_request_is_told_so() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        let _server = serve(&path, echo()).unwrap();
        let long = format!("{{\"verb\":\"list\",\"glob\":\"{}\"}}\n", "x".repeat(70_000));
        for bad in ["hello\n", "{\"verb\":\"dance\"}\n", "{\"verb\":\"list\"}\n", "\u{0}\n", &long]
        {
            let mut stream = UnixStream::connect(&path).unwrap();
            let _ = stream.write_all(bad.as_bytes()); // the long one may be cut short
            let mut answer = String::new();
            let _ = BufReader::new(&mut stream).read_line(&mut answer);
            let failure = Event::from_line(&answer).unwrap().failure().unwrap();
            assert_eq!(failure.kind, ErrorKind::Usage, "{bad:.40}");
        }
        let newer = "{\"v\":9,\"verb\":\"peers\",\"more\":[1]}\n";
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(newer.as_bytes()).unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        assert_eq!(answers.lines().count(), 2, "unknown fields are passed over: {answers}");
    }

    #[test]
    fn the_sixty_fifth_conversation_is_told_to_come_again() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        let (kept, keep) = unbounded();
        let _server =
            serve(&path, Arc::new(move |_, replies| kept.send(replies).unwrap())).unwrap();
        let ask = || Client::connect(&path).unwrap().unwrap().request(&Request::Status).unwrap();
        let held: Vec<(Answers, Replies)> =
            (0..CONVERSATIONS_LIMIT).map(|_| (ask(), keep.recv().unwrap())).collect();
        let one_more = ask().next().unwrap().unwrap().failure().unwrap();
        assert_eq!(one_more.kind, ErrorKind::Other);
        drop(held);
        let (answers, replies) = (ask(), keep.recv().unwrap());
        replies.send(&Event::Stopping);
        drop(replies);
        assert_eq!(answers.collect::<Vec<_>>(), [Ok(Event::Stopping)]);
    }

    #[test]
    fn stopping_where_nobody_listens_says_so() {
        let state = tempfile::tempdir().unwrap();
        let path = socket_path(state.path(), Role::Peer);
        assert_eq!(stop(&path, Duration::from_secs(1)), Ok(false));
    }
}
