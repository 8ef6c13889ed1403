//! potluck
mod clock;
pub mod control;
pub mod daemon;
mod error;
mod standin;
pub use error::{Error, ErrorKind, Result};
pub use standin::{Index, IndexSettings, Peer, Settings};
