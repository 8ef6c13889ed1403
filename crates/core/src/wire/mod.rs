//! Owns bytes ↔ types, both ways, for all that crosses a network. Never decides anything.
//!
//! Every format is drawn in PROTOCOL.md. Numbers are big-endian. Whatever decodes is valid: ranges,
//! text and lengths are checked here and nowhere else.

#[cfg(test)]
pub(crate) mod arbitrary;
pub mod bytes;
#[doc(hidden)]
pub mod check;
pub mod datagram;
pub mod desk;
pub mod stream;
