//! Owns the control socket's language: what the command line asks a running process, and what is
//! answered. One JSON object a line, both ways; the same lines are what `--json` prints.
//!
//! It is spoken over a Unix socket that only its owner can open, never over a network.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// The version in every event.
pub const VERSION: u8 = 1;

/// What a process is asked. One a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// Join the network an invitation is for. → `joined`
    Join {
        /// `potluck1…@host:port`
        invitation: String,
    },
    /// Forget the network; nothing on disk is deleted. → `left`
    Leave,
    /// Share a file or folder. → `hashing` …, `shared`
    Share {
        /// Absolute path.
        path: PathBuf,
        /// The name asked for; without one the base name is tried, and left out if it is taken.
        name: Option<String>,
    },
    /// Stop hosting. → `unshared`
    Unshare {
        /// A name, id or path.
        what: String,
    },
    /// Fetch. → `progress` …, `done`
    Get {
        /// A name, `name@version` or id.
        what: String,
        /// Absolute path of the file or folder to make, or of an existing folder to put it in.
        to: PathBuf,
        /// What to do where the target exists.
        #[serde(default)]
        exists: IfExists,
        /// Give up after so many seconds without any source.
        timeout_s: u64,
    },
    /// List what the network has. → `listing`
    List {
        /// Glob over names.
        glob: String,
    },
    /// Who hosts a content. → `found`
    Find {
        /// A name, `name@version` or id.
        what: String,
    },
    /// Connections and what goes over them. → `peers`
    Peers,
    /// What this process does. → `status`
    Status,
    /// The listing as it changes. → `listing`, then `change` … until the connection ends
    Watch {
        /// Glob over names.
        glob: String,
    },
    /// Hash what this machine hosts again and compare. → `verifying` …, `verified`
    Verify {
        /// A name, id or path; all of it without one.
        what: Option<String>,
    },
    /// Make an invitation (the index's process, or a peer that is an admin). → `invited`
    Invite {
        /// How many machines may join by it.
        uses: u32,
        /// For how long.
        valid_s: u64,
        /// `read`, `publish` or `admin`.
        role: String,
    },
    /// Who is a member. → `members`
    Members,
    /// Remove a member, or all who joined by an invitation. → `removed`
    RemoveMember {
        /// A machine's id (or its first characters, or its label), or `invitation:ID`.
        who: String,
    },
    /// How fast this process may send and receive, in bytes a second; 0 is no limit, and what is not
    /// given stays as it is. → `limits`
    Limit {
        /// To others, all together.
        #[serde(default)]
        up: Option<u64>,
        /// From others, all together.
        #[serde(default)]
        down: Option<u64>,
        /// The next process keeps to them too.
        #[serde(default)]
        keep: bool,
    },
    /// Stop the process. → `stopping`
    Down,
}

/// What to do when the target of a fetch exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IfExists {
    /// Refuse (exit code 10).
    #[default]
    Refuse,
    /// Replace it once the new content is complete.
    Overwrite,
    /// Take the first free `name (2)`, `name (3)` …
    Rename,
    /// Leave it and report success.
    Skip,
}

/// What is answered. Every line also has `"v":1`. The last line of a request is its result, or
/// `failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A process serves now (`index --json`, `up --json`).
    Ready {
        /// Where it listens: the index's UDP and TCP port, or a peer's TCP port.
        listen: String,
        /// An index alone: an invitation good for 50 machines and 24 hours.
        #[serde(skip_serializing_if = "Option::is_none")]
        invite: Option<String>,
        /// The network, if any.
        #[serde(skip_serializing_if = "Option::is_none")]
        network: Option<String>,
        /// This machine's id (a peer).
        #[serde(skip_serializing_if = "Option::is_none")]
        peer: Option<String>,
        /// Where an index's metrics are read, if anywhere.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        metrics: Option<String>,
    },
    /// Something worth a line on stderr.
    Note {
        /// The line.
        text: String,
    },
    /// Joined a network.
    Joined {
        /// Its id.
        network: String,
        /// This machine's id.
        peer: String,
        /// What it may do.
        role: String,
    },
    /// Left the network.
    Left {
        /// Its id.
        network: String,
    },
    /// A new network was made here, with this machine as its index.
    Founded {
        /// An invitation to it.
        invite: String,
    },
    /// Hashing goes on.
    Hashing {
        /// Bytes hashed.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Shared, and the index has acknowledged it.
    Shared {
        /// Content id.
        id: String,
        /// Its name, if it has one.
        name: Option<String>,
        /// The version it is under that name.
        version: Option<u32>,
        /// Bytes.
        size: u64,
    },
    /// No longer hosted.
    Unshared {
        /// Content ids.
        ids: Vec<String>,
    },
    /// A fetch begins: what it is and where it goes.
    Fetching {
        /// Content id.
        id: String,
        /// Its name, if it was asked for by one.
        name: Option<String>,
        /// The version, likewise.
        version: Option<u32>,
        /// Bytes in all.
        size: u64,
        /// Bytes that are here already, verified.
        have: u64,
        /// Where it goes.
        path: PathBuf,
    },
    /// A fetch goes on; about twice a second.
    Progress {
        /// Content id.
        id: String,
        /// Bytes verified.
        done: u64,
        /// Bytes in all.
        total: u64,
        /// Bytes a second of late.
        rate: u64,
        /// Hosts that sent something in the last seconds.
        sources: u32,
        /// Hosts connected.
        hosts: u32,
        /// Why it does not move, where it does not.
        #[serde(skip_serializing_if = "Option::is_none")]
        waiting: Option<String>,
    },
    /// Complete, verified, durable, under its final name.
    Done {
        /// Content id.
        id: String,
        /// Where it is.
        path: PathBuf,
        /// Bytes.
        bytes: u64,
        /// From the request to now.
        seconds: f64,
        /// Who sent how much in this run.
        sources: Vec<Source>,
        /// What happened on the way; none where nothing had to be fetched.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stats: Option<Box<Stats>>,
    },
    /// The listing.
    Listing {
        /// Rows in order.
        rows: Vec<Row>,
    },
    /// A row of the listing changed.
    Change {
        /// `added`, `changed` or `removed`.
        what: String,
        /// The row as it is now.
        row: Row,
    },
    /// Who hosts a content.
    Found {
        /// Content id.
        id: String,
        /// Name, version and publisher, where it was asked for by name.
        name: Option<String>,
        /// The version.
        version: Option<u32>,
        /// Who publishes it.
        publisher: Option<String>,
        /// Bytes.
        size: u64,
        /// Hosts in all, of which `hosts` are some.
        hosts_in_all: u32,
        /// Hosts.
        hosts: Vec<FoundHost>,
    },
    /// Connections.
    Peers {
        /// One a connection.
        peers: Vec<Connection>,
    },
    /// What this process does.
    Status(Box<Status>),
    /// Verifying goes on.
    Verifying {
        /// Bytes hashed.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// What verifying found.
    Verified {
        /// Contents that are what they should be.
        good: Vec<String>,
        /// Contents that are not: id, path, and what is wrong.
        bad: Vec<BadContent>,
    },
    /// An invitation.
    Invited {
        /// `potluck1…@host:port`
        invite: String,
        /// Its id, by which all who joined by it can be removed.
        id: String,
        /// Machines that may join by it.
        uses: u32,
        /// Seconds it is valid.
        valid_s: u64,
        /// The role.
        role: String,
    },
    /// Members.
    Members {
        /// One a machine.
        members: Vec<Member>,
    },
    /// Members were removed.
    Removed {
        /// How many.
        count: u32,
    },
    /// The limits as they are now, in bytes a second.
    Limits {
        /// To others; none: no limit.
        up: Option<u64>,
        /// From others, likewise.
        down: Option<u64>,
    },
    /// The process stops.
    Stopping,
    /// The request failed.
    Failed {
        /// The exit code for it.
        code: u8,
        /// What happened and why.
        error: String,
        /// What to do.
        #[serde(skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
    /// An event of a newer version than this: passed over, never sent.
    #[serde(other)]
    Unknown,
}

impl Request {
    /// The request as one line, with its newline.
    ///
    /// # Errors
    /// `Usage` where a path in it is not UTF-8: JSON cannot carry it.
    pub fn to_line(&self) -> Result<String> {
        line(self)
    }
}

impl Event {
    /// The event as one line, with `"v"` before all else and its newline.
    ///
    /// # Errors
    /// `Usage` where a path in it is not UTF-8: JSON cannot carry it.
    pub fn to_line(&self) -> Result<String> {
        #[derive(Serialize)]
        struct Line<'a> {
            v: u8,
            #[serde(flatten)]
            event: &'a Event,
        }
        line(&Line { v: VERSION, event: self })
    }

    /// Reads a line. Fields that this version does not know are passed over; an event that it does
    /// not know is [`Event::Unknown`].
    ///
    /// # Errors
    /// `Other` where it is no JSON, or a known event lacks a field.
    pub fn from_line(line: &str) -> Result<Self> {
        serde_json::from_str(line).map_err(|error| {
            Error::new(
                ErrorKind::Other,
                format!("the other process said what this one cannot read: {error}"),
            )
            .hint("if potluck was updated, stop the old process first: potluck down")
        })
    }

    /// The failure that is told by this event.
    pub fn failed(error: &Error) -> Self {
        Self::Failed {
            code: error.exit_code(),
            error: error.message.clone(),
            hint: error.hint.clone(),
        }
    }

    /// The failure, where this event tells one.
    pub fn failure(&self) -> Option<Error> {
        let Self::Failed { code, error, hint } = self else { return None };
        let kind = match code {
            2 => ErrorKind::Usage,
            3 => ErrorKind::NotFound,
            4 => ErrorKind::Refused,
            5 => ErrorKind::NoSource,
            6 => ErrorKind::IndexUnreachable,
            7 => ErrorKind::Integrity,
            8 => ErrorKind::DiskFull,
            9 => ErrorKind::Partly,
            10 => ErrorKind::Exists,
            130 => ErrorKind::Interrupted,
            _ => ErrorKind::Other,
        };
        Some(Error { kind, message: error.clone(), hint: hint.clone() })
    }

    /// Whether this tells of something under way, so that a later event of its kind replaces it and
    /// nothing is lost where a slow reader misses it.
    pub const fn is_progress(&self) -> bool {
        matches!(self, Self::Hashing { .. } | Self::Progress { .. } | Self::Verifying { .. })
    }

    /// Whether this can be the last event of a request: its result or its failure.
    pub const fn is_result(&self) -> bool {
        !self.is_progress()
            && !matches!(
                self,
                Self::Note { .. } | Self::Founded { .. } | Self::Fetching { .. } | Self::Unknown
            )
    }
}

fn line(of: &impl Serialize) -> Result<String> {
    let mut line = serde_json::to_string(of).map_err(|error| {
        Error::new(ErrorKind::Usage, format!("cannot be said in JSON: {error}"))
            .hint("only paths of valid UTF-8 can be shared or fetched to")
    })?;
    line.push('\n');
    Ok(line)
}

/// Who sent how much.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The machine's id.
    pub peer: String,
    /// What it calls itself.
    pub label: String,
    /// Bytes of verified pieces.
    pub bytes: u64,
}

/// One row of the listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Content id.
    pub id: String,
    /// Name, if any.
    pub name: Option<String>,
    /// Its newest version.
    pub version: Option<u32>,
    /// Bytes.
    pub size: u64,
    /// Hosts with any of it.
    pub hosts: u32,
    /// Hosts with all of it.
    pub complete: u32,
    /// Who owns the name.
    pub publisher: Option<String>,
}

/// A host of a content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundHost {
    /// The machine's id.
    pub peer: String,
    /// Where it serves.
    pub address: String,
    /// Thousandths of the content that it holds.
    pub held: u16,
    /// How busy it is, in thousandths.
    pub load: u16,
}

/// A connection to another peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The machine's id.
    pub peer: String,
    /// What it calls itself.
    pub label: String,
    /// Where it is.
    pub address: String,
    /// This machine dialled.
    pub dialled: bool,
    /// Seconds it has stood.
    pub seconds: u64,
    /// Bytes of pieces sent to it.
    pub sent: u64,
    /// Bytes of pieces received from it.
    pub received: u64,
}

/// What a peer process does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// This machine's id.
    pub peer: String,
    /// The network, if it joined one.
    pub network: Option<String>,
    /// What this machine may do there.
    pub role: Option<String>,
    /// Where it looks for the index.
    pub index: Vec<String>,
    /// Whether the index answers.
    pub index_reachable: bool,
    /// This process is the index as well.
    pub is_index: bool,
    /// Where it serves.
    pub listen: String,
    /// The process.
    pub pid: u32,
    /// Seconds it has run.
    pub seconds: u64,
    /// Bytes of pieces sent.
    pub sent: u64,
    /// Bytes of pieces received.
    pub received: u64,
    /// Bytes a second it may send; none: no limit.
    #[serde(default)]
    pub limit_up: Option<u64>,
    /// Bytes a second it may receive, likewise.
    #[serde(default)]
    pub limit_down: Option<u64>,
    /// What it hosts or fetches.
    pub contents: Vec<ContentStatus>,
    /// What happened since the process began.
    #[serde(default)]
    pub stats: Stats,
}

/// What happened: in the whole process, or while one content was fetched.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// What was fetched; of the one content, where it is of one.
    pub fetched: FetchedStats,
    /// What was sent to others meanwhile, of all contents.
    pub served: ServedStats,
    /// Where connections spent their time meanwhile, whatever it was for.
    pub seconds: TimeStats,
}

/// What was fetched, in pieces unless the name says bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FetchedStats {
    /// Came in, verified and new.
    pub pieces: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Came in a second time.
    pub duplicates: u64,
    /// Bytes of them.
    pub duplicate_bytes: u64,
    /// Did not match their proof.
    pub bad: u64,
    /// Our disk did not take.
    pub failed: u64,
    /// Times that our patience with a host ran out, …
    pub stalls: u64,
    /// … and what was taken from it, to be asked of others.
    pub steals: u64,
    /// Offered again since what was asked came to nothing, for whichever reason.
    pub retries: u64,
    /// Hosts were too busy for.
    pub busy: u64,
    /// Asked of a second host at the end.
    pub endgame: u64,
    /// Granted by a seed and not taken.
    pub declined: u64,
}

/// What was sent, in pieces unless the name says bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServedStats {
    /// Sent.
    pub pieces: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Turned away, since others were to be served first.
    pub busy: u64,
    /// Granted.
    pub granted: u64,
    /// Granted and not taken in time.
    pub withdrawn: u64,
    /// Begun to be served, and cancelled in time or unreadable.
    pub unsent: u64,
    /// Times that a connection took nothing for too long.
    pub stuck: u64,
}

/// Seconds that all connections together spent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TimeStats {
    /// Reading pieces to be sent.
    pub read: f64,
    /// Encrypting what is sent.
    pub seal: f64,
    /// Handing it to the socket.
    pub send: f64,
    /// With something to send, waiting: for the socket, for the limit, or for their turn.
    pub wait_to_send: f64,
    /// Taking what came from the socket.
    pub receive: f64,
    /// Decrypting it.
    pub open: f64,
    /// Verifying pieces.
    pub hash: f64,
    /// Writing pieces.
    pub write: f64,
    /// Waiting for what was asked for.
    pub wait_to_receive: f64,
    /// Making pieces durable, beside the connections.
    pub sync: f64,
    /// Anything else but being idle.
    pub other: f64,
}

/// A content this machine hosts or fetches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContentStatus {
    /// Content id.
    pub id: String,
    /// Name and version, if known.
    pub name: Option<String>,
    /// The version.
    pub version: Option<u32>,
    /// Where it is, or will be.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Bytes here, verified.
    pub have: u64,
    /// `sharing`, `fetching`, `waiting`, `paused` or `lost`.
    pub state: String,
    /// More of it for a person: why it waits, what went wrong.
    pub note: Option<String>,
}

/// A content that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadContent {
    /// Content id.
    pub id: String,
    /// Where it should be.
    pub path: PathBuf,
    /// What is wrong.
    pub why: String,
}

/// A member of the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The machine's id.
    pub peer: String,
    /// What it calls itself.
    pub label: String,
    /// `read`, `publish` or `admin`.
    pub role: String,
    /// Seconds since 1970.
    pub joined: u64,
    /// The invitation it joined by.
    pub invitation: String,
    /// Seconds since the index heard of it; none: not since the index started.
    pub silent_s: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress() -> Event {
        Event::Progress {
            id: "ab".into(),
            done: 1,
            total: u64::MAX,
            rate: 3,
            sources: 1,
            hosts: 2,
            waiting: None,
        }
    }

    #[test]
    fn every_line_begins_with_the_version_and_is_read_back() {
        let status = Event::Status(Box::new(Status {
            peer: "p".into(),
            network: None,
            role: None,
            index: vec!["10.0.0.5:7700".into()],
            index_reachable: true,
            is_index: false,
            listen: "0.0.0.0:1".into(),
            pid: 7,
            seconds: 1,
            sent: 0,
            received: 0,
            limit_up: None,
            limit_down: Some(125_000),
            contents: vec![],
            stats: Stats::default(),
        }));
        for event in [progress(), Event::Stopping, Event::Note { text: "a\nb".into() }, status] {
            let line = event.to_line().unwrap();
            assert!(line.starts_with(r#"{"v":1,"event":""#), "{line}");
            assert_eq!(line.find('\n'), Some(line.len() - 1), "{line}");
            assert_eq!(Event::from_line(&line), Ok(event));
        }
    }

    #[test]
    fn what_a_newer_version_adds_is_passed_over() {
        let stopping = Event::from_line(r#"{"v":2,"event":"stopping","gently":true}"#);
        assert_eq!(stopping, Ok(Event::Stopping));
        let unknown = Event::from_line(r#"{"v":2,"event":"dance","with":{"a":[1]}}"#);
        assert_eq!(unknown, Ok(Event::Unknown));
        assert!(!Event::Unknown.is_result());
        assert!(Event::from_line(r#"{"event":"left"}"#).is_err(), "a field is missing");
        assert!(Event::from_line("hello").is_err());
    }

    #[test]
    fn a_failure_keeps_its_exit_code_over_the_socket() {
        for kind in [
            ErrorKind::Other,
            ErrorKind::Usage,
            ErrorKind::NotFound,
            ErrorKind::Refused,
            ErrorKind::NoSource,
            ErrorKind::IndexUnreachable,
            ErrorKind::Integrity,
            ErrorKind::DiskFull,
            ErrorKind::Partly,
            ErrorKind::Exists,
            ErrorKind::Interrupted,
        ] {
            let error = Error::new(kind, "what; why").hint("do this");
            let event = Event::failed(&error);
            assert!(event.is_result());
            let read = Event::from_line(&event.to_line().unwrap()).unwrap();
            assert_eq!(read.failure(), Some(error));
        }
        assert_eq!(progress().failure(), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_path_that_json_cannot_carry_is_refused_and_not_mangled() {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::OsStr::from_bytes(b"/tmp/\xff").into();
        let request = Request::Share { path, name: None };
        assert_eq!(request.to_line().unwrap_err().kind, ErrorKind::Usage);
    }
}
