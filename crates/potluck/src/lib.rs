//! potluck
mod clock;
pub mod control;
mod error;
mod desk;
mod door;
mod store;
mod tls;
mod transfer;
pub use error::{Error, ErrorKind, Result};
