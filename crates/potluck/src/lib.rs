//! potluck
mod clock;
pub mod control;
#[allow(dead_code, reason = "the peer and the index that use it are still being built")]
mod desk;
mod door;
mod error;
#[allow(dead_code, unused_imports, reason = "the peer that uses it is still being built")]
mod store;
mod tls;
#[allow(dead_code, reason = "the peer that uses it is still being built")]
mod transfer;
pub use error::{Error, ErrorKind, Result};
