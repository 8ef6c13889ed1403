//! potluck
mod clock;
pub mod control;
mod error;
mod store;
pub use error::{Error, ErrorKind, Result};
