//! potluck
mod clock;
pub mod control;
mod error;
pub use error::{Error, ErrorKind, Result};
