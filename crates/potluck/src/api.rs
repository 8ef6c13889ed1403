//! Owns the typed face of a peer: what programs call instead of speaking requests and events.
//! Nothing here does anything that a request cannot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use potluck_core::id::ContentId;
use potluck_core::limit::Limit;
use potluck_core::trust::{Invitation, Role};

use crate::control::{Event, IfExists, Request, Row, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{Index, invite_terms, spawn};
use crate::peer::Peer;

/// A content that is shared, and that the index has acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Its id: for a file what `b3sum` prints.
    pub id: ContentId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// The version it is under that name.
    pub version: Option<u32>,
    /// Bytes.
    pub size: u64,
}

/// A content that was fetched.
#[derive(Clone, Debug, PartialEq)]
pub struct Completed {
    /// Its id.
    pub id: ContentId,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// Who sent how much.
    pub sources: Vec<Source>,
}

/// A content being fetched. Dropping it pauses the fetch; asking for the same content again goes on
/// with what is there.
#[derive(Debug)]
pub struct Download {
    events: Receiver<Event>,
}

impl Download {
    /// The next thing that happens; `None` when it is over.
    pub fn next_event(&self) -> Option<Event> {
        self.events.recv().ok()
    }

    /// Blocks until it is complete: verified, durable, under its final name.
    ///
    /// # Errors
    /// Whatever made it fail; what was fetched is kept.
    pub fn wait(self) -> Result<Completed> {
        loop {
            match self.events.recv() {
                Ok(Event::Done { id, path, bytes, seconds, sources, .. }) => {
                    return Ok(Completed {
                        id: parse_id(&id)?,
                        path,
                        bytes,
                        took: Duration::try_from_secs_f64(seconds).unwrap_or_default(),
                        sources,
                    });
                }
                Ok(event) => match event.failure() {
                    Some(error) => return Err(error),
                    None => continue,
                },
                Err(_) => {
                    return Err(Error::new(ErrorKind::Interrupted, "the peer stopped meanwhile"));
                }
            }
        }
    }
}

impl Index {
    /// An invitation for `uses` machines that may publish, good for 24 hours.
    ///
    /// # Errors
    /// The index could not make it durable.
    pub fn invite_machines(&self, uses: u32) -> Result<Invitation> {
        self.invite(invite_terms(Role::Publish, uses, crate::index::FIRST_VALID))
    }
}

impl Peer {
    /// Joins the network that `invitation` is for.
    ///
    /// # Errors
    /// `Refused`: the invitation is used up, expired, withdrawn or unknown. `IndexUnreachable`.
    pub fn join(&self, invitation: &Invitation) -> Result<()> {
        self.result(Request::Join { invitation: invitation.to_string() }).map(drop)
    }

    /// Shares the file or folder at `path`, under `name` or its base name.
    ///
    /// # Errors
    /// `NotFound` and others where it cannot be read whole, `Exists` where another publisher owns
    /// the name, `IndexUnreachable`.
    pub fn share(&self, path: impl AsRef<Path>, name: Option<&str>) -> Result<Shared> {
        let path = std::path::absolute(path.as_ref())
            .map_err(|e| Error::io(format_args!("cannot find {}", path.as_ref().display()), &e))?;
        match self.result(Request::Share { path, name: name.map(str::to_owned) })? {
            Event::Shared { id, name, version, size } => {
                Ok(Shared { id: parse_id(&id)?, name, version, size })
            }
            _ => Err(odd()),
        }
    }

    /// Begins to fetch `what` (a name, `name@version` or an id) to `to`: the path to make, or a
    /// folder to put it in. Gives up after 30 s without any host.
    ///
    /// # Errors
    /// No thread can be started; all else is told by the [`Download`].
    pub fn get(&self, what: &str, to: impl AsRef<Path>) -> Result<Download> {
        let to = std::path::absolute(to.as_ref())
            .map_err(|e| Error::io(format_args!("cannot use {}", to.as_ref().display()), &e))?;
        let request =
            Request::Get { what: what.into(), to, exists: IfExists::Refuse, timeout_s: 30 };
        let (sender, events) = unbounded();
        let asker = self.asker();
        spawn("download", move || asker.ask(request, &mut |event| sender.send(event).is_ok()))?;
        Ok(Download { events })
    }

    /// What the network has, by a glob over names.
    ///
    /// # Errors
    /// `IndexUnreachable`; `Refused` without a network.
    pub fn list(&self, glob: &str) -> Result<Vec<Row>> {
        match self.result(Request::List { glob: glob.into() })? {
            Event::Listing { rows } => Ok(rows),
            _ => Err(odd()),
        }
    }

    /// Sends and receives no faster than this from now on, over all transfers together; `None` leaves
    /// a limit as it is. For this run alone: [`crate::Settings`] has those of the next.
    ///
    /// # Errors
    /// The peer is stopping.
    pub fn limit(&self, up: Option<Limit>, down: Option<Limit>) -> Result<()> {
        let rate = |limit: Limit| limit.bytes_a_second().unwrap_or(0);
        let (up, down) = (up.map(rate), down.map(rate));
        self.result(Request::Limit { up, down, keep: false }).map(drop)
    }

    /// Hosts `what` (a name, id or path) no more; the file stays.
    ///
    /// # Errors
    /// `NotFound` where this peer does not host it.
    pub fn unshare(&self, what: &str) -> Result<()> {
        self.result(Request::Unshare { what: what.into() }).map(drop)
    }

    /// Runs a request to its result.
    fn result(&self, request: Request) -> Result<Event> {
        let mut last = Err(odd());
        self.handle(request, &mut |event| {
            if event.is_result() || event.failure().is_some() {
                last = event.failure().map_or(Ok(event), Err);
            }
            true
        });
        last
    }
}

fn parse_id(id: &str) -> Result<ContentId> {
    id.parse().map_err(|_| odd())
}

fn odd() -> Error {
    Error::new(ErrorKind::Other, "the peer answered something else than it was asked")
}
