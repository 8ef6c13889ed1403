//! The thinking part of potluck: what machines say to each other and what they make of it.
//!
//! Nothing here reads a clock, opens a socket or a file, starts a thread or takes a lock. Time and
//! dice are arguments, bytes come in and go out, and every machine is a plain value with the same
//! verbs:
//!
//! * `on_*(&mut self, now, …)`: something happened;
//! * `tick(now)`: time passed;
//! * `poll_output() -> Option<Output>`: one thing that its owner must do;
//! * `next_deadline() -> Option<Moment>`: when `tick` is due;
//! * `check()`: panics when an invariant broke; tests and the simulator call it at every step.
//!
//! | module | owns |
//! |---|---|
//! | [`id`], [`time`], [`fault`], [`dice`] | the words everything else is said in |
//! | [`layout`], [`manifest`], [`proof`], [`bitfield`] | what a content is, how it is cut and proved |
//! | [`wire`] | bytes ↔ types |
//! | [`trust`], [`seal`] | who is who; the envelope of a datagram |
//! | [`catalog`] ← [`registrar`] | the index: who hosts what; what it answers |
//! | [`link`] | a peer's line to the index |
//! | [`swarm`], [`sharing`] | a content being fetched; whom to serve |
//! | [`limit`] | how many bytes may move by when |
//! | `sim` | a seeded world to try them in (feature `sim`) |

pub mod bitfield;
pub mod catalog;
pub mod dice;
pub mod fault;
pub mod id;
pub mod layout;
pub mod limit;
pub mod link;
pub mod manifest;
mod pace;
pub mod proof;
mod rarity;
pub mod registrar;
pub mod seal;
pub mod sharing;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod swarm;
pub mod time;
pub mod trust;
pub mod wire;
