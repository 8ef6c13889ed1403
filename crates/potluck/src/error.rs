//! Owns what callers are told when something fails: what happened, why, whose fault it is, what a
//! person can do, and the exit code. Never handles an error.

use potluck_core::fault::Fault;

/// A failure, with all that its reader needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What kind of failure: decides the exit code.
    pub kind: ErrorKind,
    /// What happened and why.
    pub message: String,
    /// What to do about it, where that is known.
    pub hint: Option<String>,
}

/// The kinds of failure; the number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ErrorKind {
    /// Anything else.
    Other = 1,
    /// The command was not understood.
    Usage = 2,
    /// No such content, name, file, or machine.
    NotFound = 3,
    /// This machine is not a member, or may not do this.
    Refused = 4,
    /// No peer has what is missing.
    NoSource = 5,
    /// The index does not answer.
    IndexUnreachable = 6,
    /// Bytes are not what they should be.
    Integrity = 7,
    /// The disk is full, or too small.
    DiskFull = 8,
    /// Some of it was done, not all.
    Partly = 9,
    /// The target or name exists already.
    Exists = 10,
    /// Interrupted; can be resumed.
    Interrupted = 130,
}

/// The result of everything in this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure of this kind, told in one sentence that says what and why.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An I/O error while doing `what` (a phrase such as "cannot read /x").
    pub fn io(what: impl std::fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => ErrorKind::DiskFull,
            Io::AlreadyExists => ErrorKind::Exists,
            _ => ErrorKind::Other,
        };
        let made = Self::new(kind, format!("{what}: {error}"));
        match error.kind() {
            Io::StorageFull | Io::QuotaExceeded => made.hint("free some space and try again"),
            Io::PermissionDenied => made.hint("check the permissions, or run as its owner"),
            _ => made,
        }
    }

    /// The exit code of a process that ends with this.
    pub const fn exit_code(&self) -> u8 {
        self.kind as u8
    }

    /// Whose fault it is, and so whether trying again alone can help.
    pub const fn fault(&self) -> Fault {
        match self.kind {
            ErrorKind::NoSource | ErrorKind::IndexUnreachable | ErrorKind::Interrupted => {
                Fault::Weather
            }
            ErrorKind::Integrity => Fault::Theirs,
            _ => Fault::Ours,
        }
    }
}
