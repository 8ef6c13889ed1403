//! Owns a world of peers with links of given speeds.
