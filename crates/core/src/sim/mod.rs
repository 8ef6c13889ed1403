//! A seeded world to try the machines in. Owns the clock and the network of that world; never used
//! by the running program.

pub mod index_world;
pub mod swarm_world;
pub mod whole_world;
