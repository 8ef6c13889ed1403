//! potluck
mod clock;
pub mod control;
pub mod daemon;
mod error;
mod store;
pub use error::{Error, ErrorKind, Result};
