//! Owns nothing: the names that the command line is written against, until the real peer and index
//! take their place. Everything fails and says so.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::control::{Event, Request};
use crate::{Error, ErrorKind, Result};

/// Settings of a peer.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The state folder.
    pub state: PathBuf,
    /// Where it listens; none: all addresses, a free port.
    pub listen: Option<SocketAddr>,
    /// What others see it called.
    pub label: String,
    /// The host (and port) others reach it by.
    pub advertise: Option<String>,
}

/// A peer.
#[derive(Debug)]
pub struct Peer(());

impl Peer {
    /// # Errors
    /// Always.
    pub fn open(_: Settings) -> Result<Self> {
        Err(Error::new(ErrorKind::Other, "this build has no peer"))
    }
    /// # Errors
    /// Never.
    pub fn serve_control(&self) -> Result<()> {
        Ok(())
    }
    /// Nothing.
    pub fn handle(&self, _: Request, _: &mut dyn FnMut(Event) -> bool) {}
    /// Nothing.
    pub fn ready(&self) -> Event {
        Event::Stopping
    }
    /// Nothing.
    pub fn wait(&self) {}
    /// Nothing.
    pub fn stop(&self) {}
}

/// Settings of an index.
#[derive(Clone, Debug)]
pub struct IndexSettings {
    /// The state folder.
    pub state: PathBuf,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The host and port that invitations name.
    pub advertise: Option<String>,
    /// Machines that may join by the first invitation.
    pub invite_uses: u32,
    /// How long that is valid.
    pub invite_valid: Duration,
}

/// An index.
#[derive(Debug)]
pub struct Index(());

impl Index {
    /// # Errors
    /// Always.
    pub fn open(_: IndexSettings) -> Result<Self> {
        Err(Error::new(ErrorKind::Other, "this build has no index"))
    }
    /// # Errors
    /// Never.
    pub fn serve_control(&self) -> Result<()> {
        Ok(())
    }
    /// Nothing.
    pub fn handle(&self, _: Request, _: &mut dyn FnMut(Event) -> bool) {}
    /// Nothing.
    pub fn ready(&self) -> Event {
        Event::Stopping
    }
    /// Nothing.
    pub fn wait(&self) {}
    /// Nothing.
    pub fn stop(&self) {}
}
