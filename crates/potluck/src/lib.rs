//! Peer-to-peer file sharing for the machines you own or trust: one index, many peers.
//!
//! An [`Index`] knows who hosts what; a [`Peer`] shares files and folders and fetches them from many
//! peers at once, and hosts what it has fetched. Both planes are encrypted and for members only.
//!
//! ```no_run
//! use potluck::{Index, IndexSettings, Peer, Settings};
//! # fn main() -> potluck::Result<()> {
//! let index = Index::open(&IndexSettings::new("/srv/potluck"))?;
//! let invitation = index.invite_machines(2)?;
//! let (alice, bob) = (Peer::open(Settings::new("/tmp/alice"))?, Peer::open(Settings::new("/tmp/bob"))?);
//! alice.join(&invitation)?;
//! bob.join(&invitation)?;
//! alice.share("/data/model.bin", Some("model"))?;
//! let path = bob.get("model", "/data/copies")?.wait()?.path;
//! # let _ = path; Ok(()) }
//! ```
//!
//! Everything here blocks the calling thread and nothing else; call it from threads of your own.

mod api;
mod clock;
pub mod control;
pub mod daemon;
mod desk;
mod door;
mod error;
#[cfg(test)]
mod hostile;
mod index;
mod peer;
mod seldom;
mod signals;
mod state;
mod store;
#[doc(hidden)]
pub mod testing;
mod timing;
mod tls;
mod transfer;

pub use api::{Completed, Download, Shared};
pub use error::{Error, ErrorKind, Result};
pub use index::{
    DEFAULT_PORT as INDEX_PORT, Index, IndexLimits, IndexSettings, IndexStatus, JournalStatus,
    Traffic,
};
pub use peer::{DEFAULT_PORT as PEER_PORT, Peer, Settings};
pub use potluck_core::id::{ContentId, Name, NetworkId, PeerId, Version};
pub use potluck_core::limit::Limit;
pub use potluck_core::trust::{Invitation, Role};
