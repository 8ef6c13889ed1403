//! potluck
mod clock;
pub mod control;
pub mod daemon;
mod error;
pub use error::{Error, ErrorKind, Result};
