//! Owns a listening socket: lets callers in, a thread each, and bounds how many stand in the door
//! without having shown who they are. Never reads or writes a byte of what they say.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use potluck_core::time::Moment;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::seldom::Seldom;

/// Stack of a thread that serves one caller: TLS handshakes want some 100 KiB in unoptimised builds.
pub(crate) const STACK: usize = 512 << 10;
/// The wait after the system could not give another socket or thread.
const SHORT_OF_SOCKETS: Duration = Duration::from_millis(50);

/// An open door; dropping it closes it and sends away who still stands in it.
pub(crate) struct Door {
    stop: Arc<OwnedFd>,
    porch: Arc<Porch>,
    acceptor: Option<JoinHandle<()>>,
}

/// A caller's leave to stand in the door. Whoever holds it may be sent away for a newer caller: its
/// socket is then shut down. Dropping it, or [`Pass::let_in`], gives the place free.
pub(crate) struct Pass {
    porch: Arc<Porch>,
    number: u64,
}

impl Door {
    /// Serves callers of `listener`, each by `serve` on a thread of its own named after `what`. At
    /// most `limit` stand in the door; for one more, the one who stood there longest is sent away.
    ///
    /// # Errors
    /// The system gives no thread or descriptor.
    pub(crate) fn open(
        listener: TcpListener,
        limit: usize,
        what: &'static str,
        serve: impl Fn(Arc<TcpStream>, SocketAddr, Pass) + Send + Sync + 'static,
    ) -> Result<Self> {
        let cannot =
            |error: std::io::Error| Error::io(format_args!("cannot listen ({what})"), &error);
        listener.set_nonblocking(true).map_err(cannot)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(|error| cannot(error.into()))?);
        let porch = Arc::new(Porch { limit, callers: Mutex::default() });
        let accept = Acceptor {
            listener,
            stop: Arc::clone(&stop),
            porch: Arc::clone(&porch),
            what,
            serve: Arc::new(serve),
            short: Seldom::default(),
        };
        let acceptor = std::thread::Builder::new()
            .name(format!("{what} door"))
            .spawn(move || accept.run())
            .map_err(|e| Error::new(ErrorKind::Other, format!("cannot start a thread: {e}")))?;
        Ok(Self { stop, porch, acceptor: Some(acceptor) })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        ring(&self.stop);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for socket in self.porch.callers().values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Pass {
    /// The caller has shown who it is: it is no longer sent away for others.
    pub(crate) fn let_in(self) {}
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.porch.callers().remove(&self.number);
    }
}

/// Makes an eventfd readable. It is full only if it is readable already.
pub(crate) fn ring(bell: &OwnedFd) {
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

/// Who stands in the door, by order of arrival.
struct Porch {
    limit: usize,
    callers: Mutex<BTreeMap<u64, Arc<TcpStream>>>,
}

impl Porch {
    fn callers(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<TcpStream>>> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, number: u64, socket: &Arc<TcpStream>) -> Pass {
        let mut callers = self.callers();
        if callers.len() >= self.limit
            && let Some((_, oldest)) = callers.pop_first()
        {
            let _ = oldest.shutdown(Shutdown::Both);
        }
        callers.insert(number, Arc::clone(socket));
        Pass { porch: Arc::clone(self), number }
    }

    fn send_oldest_away(&self) {
        if let Some((_, oldest)) = self.callers().pop_first() {
            let _ = oldest.shutdown(Shutdown::Both);
        }
    }
}

struct Acceptor<F> {
    listener: TcpListener,
    stop: Arc<OwnedFd>,
    porch: Arc<Porch>,
    what: &'static str,
    serve: Arc<F>,
    short: Seldom,
}

impl<F: Fn(Arc<TcpStream>, SocketAddr, Pass) + Send + Sync + 'static> Acceptor<F> {
    fn run(self) {
        let mut number = 0;
        while self.wait(None) {
            match self.listener.accept() {
                Ok((socket, from)) => {
                    number += 1;
                    if let Err(error) = self.admit(number, Arc::new(socket), from) {
                        self.short(&error);
                    }
                }
                Err(error) if is_weather(&error) => {}
                Err(error) => self.short(&error),
            }
        }
    }

    fn admit(&self, number: u64, socket: Arc<TcpStream>, from: SocketAddr) -> std::io::Result<()> {
        let pass = self.porch.enter(number, &socket);
        let serve = Arc::clone(&self.serve);
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        std::thread::Builder::new()
            .name(self.what.to_owned())
            .stack_size(STACK)
            .spawn(move || serve(socket, from, pass))
            .map(drop)
    }

    /// No more descriptors, threads or memory: make room and let some of it come back.
    fn short(&self, error: &std::io::Error) {
        if let Some(more) = self.short.now(clock::now()) {
            tracing::warn!(%error, what = self.what, more, "a caller could not be let in");
        }
        self.porch.send_oldest_away();
        let _ = self.wait(Some(SHORT_OF_SOCKETS));
    }

    /// Waits for a caller, or only so long; false when the door is to be closed.
    fn wait(&self, only_for: Option<Duration>) -> bool {
        loop {
            let mut fds = [
                PollFd::new(&self.stop, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            let watched = if only_for.is_some() { &mut fds[..1] } else { &mut fds[..] };
            match poll(watched, only_for.map(timespec).as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, what = self.what, "no longer listening");
                    return false;
                }
                Ok(_) => return fds[0].revents().is_empty(),
            }
        }
    }
}

/// Errors of `accept` that concern one caller (or nobody).
fn is_weather(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as Io;
    matches!(
        error.kind(),
        Io::WouldBlock | Io::Interrupted | Io::ConnectionAborted | Io::ConnectionReset
    )
}

/// A blocking socket on which everything together is over at a deadline.
pub(crate) struct Timed {
    socket: Arc<TcpStream>,
    deadline: Moment,
}

impl Timed {
    pub(crate) fn new(socket: Arc<TcpStream>, deadline: Moment) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, deadline })
    }

    /// The other side hears that nothing follows.
    pub(crate) fn says_no_more(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    /// It is over at another deadline.
    pub(crate) const fn until(&mut self, deadline: Moment) {
        self.deadline = deadline;
    }
}

pub(crate) fn time_left(deadline: Moment) -> io::Result<Duration> {
    match deadline.since(clock::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(time_left(self.deadline)?))?;
        (&*self.socket).read(into)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(time_left(self.deadline)?))?;
        (&*self.socket).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A wait as poll(2) wants it.
pub(crate) fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: wait.subsec_nanos().into(),
    }
}
