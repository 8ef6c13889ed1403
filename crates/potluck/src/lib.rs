//! potluck
mod clock;
pub mod control;
mod error;
#[allow(dead_code, unused_imports, reason = "the peer that uses it is still being built")]
mod store;
pub use error::{Error, ErrorKind, Result};
