//! Owns the page that machines read of an index: `/metrics`, `/healthz`, `/readyz`, over HTTP/1.1, one
//! request a connection. Never changes anything, and never reads more than a request's head: who
//! dawdles is sent away, and only so many may stand in the door.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use super::status::IndexStatus;
use crate::clock;
use crate::door::{Door, Timed};
use crate::error::{Error, Result};

/// Requests being read or answered; for one more, the oldest is sent away.
const MOST_CALLERS: usize = 16;
/// A caller has asked and taken its answer within this.
const VISIT: Duration = Duration::from_secs(2);
/// Reads, at most, of what follows a request that was answered.
const MOST_UNREAD: usize = 16;
/// The longest head of a request.
const MOST_HEAD: usize = 4_096;

/// What is asked about.
pub(super) struct Source {
    pub(super) status: Box<dyn Fn() -> IndexStatus + Send + Sync>,
    /// It takes requests, and goes on doing so.
    pub(super) ready: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Serves the page until dropped; where.
///
/// # Errors
/// The address is taken, or is none of this machine's.
pub(super) fn serve(address: SocketAddr, source: Source) -> Result<(Door, SocketAddr)> {
    let cannot = |e: io::Error| {
        Error::io(format_args!("cannot serve metrics on {address}"), &e)
            .hint("choose another address with --metrics ADDR:PORT")
    };
    let listener = TcpListener::bind(address).map_err(cannot)?;
    let at = listener.local_addr().map_err(cannot)?;
    let door = Door::open(listener, MOST_CALLERS, "index metrics", move |socket, from, _pass| {
        if let Err(error) = attend(socket, &source) {
            tracing::debug!(%from, %error, "a reader of metrics was not answered");
        }
    })?;
    Ok((door, at))
}

fn attend(socket: Arc<TcpStream>, source: &Source) -> io::Result<()> {
    let mut socket = Timed::new(socket, clock::now() + VISIT)?;
    let mut head = [0; MOST_HEAD];
    let mut len = 0;
    let answer = loop {
        if let Some(end) = head[..len].windows(4).position(|end| end == b"\r\n\r\n") {
            break answer(&String::from_utf8_lossy(&head[..end]), source);
        }
        match socket.read(&mut head[len..]) {
            Ok(0) if len == MOST_HEAD => break Answer::text("431 Request Header Fields Too Large"),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    };
    socket.write_all(&answer.bytes())?;
    // What nobody read would make the kernel take the answer back: a little of it is read.
    socket.says_no_more()?;
    for _ in 0..MOST_UNREAD {
        if socket.read(&mut head)? == 0 {
            break;
        }
    }
    Ok(())
}

struct Answer {
    status: &'static str,
    kind: &'static str,
    body: String,
    /// Asked by HEAD: the body stays away.
    bare: bool,
}

impl Answer {
    fn text(status: &'static str) -> Self {
        Self::saying(status, status)
    }

    fn saying(status: &'static str, body: &str) -> Self {
        let kind = "text/plain; charset=utf-8";
        Self { status, kind, body: format!("{body}\n"), bare: false }
    }

    fn bytes(&self) -> Vec<u8> {
        let Self { status, kind, body, bare } = self;
        let length = body.len();
        let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
        let body = if *bare { "" } else { body };
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{allow}\
             X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// The answer to a request's head.
fn answer(head: &str, source: &Source) -> Answer {
    let mut lines = head.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0"), None) =
        (first.next(), first.next(), first.next(), first.next())
    else {
        return Answer::text("400 Bad Request");
    };
    // No page of another site in somebody's browser has a reason to read this.
    if lines.any(|line| line.get(..7).is_some_and(|name| name.eq_ignore_ascii_case("origin:"))) {
        return Answer::text("403 Forbidden");
    }
    if !matches!(method, "GET" | "HEAD") {
        return Answer::text("405 Method Not Allowed");
    }
    let answer = match target.split('?').next().unwrap_or_default() {
        "/metrics" => Answer {
            kind: "text/plain; version=0.0.4; charset=utf-8",
            body: (source.status)().to_prometheus(),
            ..Answer::text("200 OK")
        },
        "/healthz" => Answer::saying("200 OK", "serving"),
        "/readyz" if !(source.ready)() => Answer::saying(
            "503 Service Unavailable",
            "stopping: it answers what has come, and ends",
        ),
        // Fetching, listing and searching go on: whoever is sent elsewhere would find nothing there.
        "/readyz" => match (source.status)().journal.trouble {
            None => Answer::saying("200 OK", "ready"),
            Some(why) => Answer::saying(
                "200 OK",
                &format!(
                    "ready, but from memory only: what changes now would be lost at a restart, and \
                     nobody can join ({why})"
                ),
            ),
        },
        _ => Answer::text("404 Not Found"),
    };
    Answer { bare: method == "HEAD", ..answer }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn page() -> (Door, SocketAddr, Arc<AtomicBool>) {
        let stopping = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&stopping);
        let source = Source {
            status: Box::new(|| {
                let mut status = IndexStatus::default();
                status.journal.trouble = Some("no room".into());
                status
            }),
            ready: Box::new(move || !stops.load(Ordering::SeqCst)),
        };
        let (door, at) = serve((Ipv4Addr::LOCALHOST, 0).into(), source).unwrap();
        (door, at, stopping)
    }

    fn ask(at: SocketAddr, request: &str) -> String {
        let mut socket = TcpStream::connect(at).unwrap();
        let _ = socket.write_all(request.as_bytes()); // it may have been answered before its end
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn machines_read_how_the_index_is() {
        let (_door, at, stopping) = page();
        let get = |path: &str| ask(at, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let metrics = get("/metrics");
        assert!(metrics.starts_with("HTTP/1.1 200 OK\r\n"), "{metrics}");
        let (head, body) = metrics.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
        assert!(body.contains("\npotluck_index_journal_healthy 0\n"), "{body}");
        assert!(get("/healthz").ends_with("\r\n\r\nserving\n"));
        let ready = get("/readyz?verbose");
        assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("from memory only"), "{ready}");
        assert!(ready.contains("no room"), "{ready}");
        stopping.store(true, Ordering::SeqCst);
        assert!(get("/readyz").starts_with("HTTP/1.1 503"));
        assert!(get("/healthz").starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn whatever_else_is_asked_is_refused() {
        let (_door, at, _) = page();
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("GET /metrics/x HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", "405"),
            ("GET /metrics HTTP/1.1\r\nORIGIN: http://evil.example\r\n\r\n", "403"),
            ("GET /metrics HTTP/2.0\r\n\r\n", "400"),
            ("GET  /metrics HTTP/1.1\r\n\r\n", "400"),
            ("\r\n\r\n", "400"),
            (&format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(MOST_HEAD)), "431"),
        ] {
            let answer = ask(at, request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
        }
        let head = ask(at, "HEAD /healthz HTTP/1.0\r\n\r\n");
        assert!(head.contains("Content-Length: 8\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[test]
    fn callers_that_never_finish_keep_nobody_out() {
        let (_door, at, _) = page();
        let dawdle = |_| {
            let mut socket = TcpStream::connect(at).unwrap();
            socket.write_all(b"GET /met").unwrap();
            socket
        };
        let mut dawdlers: Vec<TcpStream> = (0..4 * MOST_CALLERS).map(dawdle).collect();
        let answer = ask(at, "GET /healthz HTTP/1.1\r\n\r\n");
        assert!(answer.ends_with("serving\n"), "{answer}");
        // All of them are sent away: for others, or since their time is over.
        for dawdler in &mut dawdlers {
            let mut nothing = vec![];
            let _ = dawdler.read_to_end(&mut nothing);
            assert!(nothing.is_empty());
        }
    }
}
