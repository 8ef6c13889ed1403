//! Owns the two kinds of time core is handed: `Moment` for waiting, `WallTime` for dates that
//! machines tell each other. Never reads a clock.

use std::fmt;
use std::ops::{Add, Sub};
pub use std::time::Duration;

/// A point on this process's monotonic clock, in microseconds since the process began.
///
/// Leases, retries and patience are measured with it, so a changed wall clock moves none of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// The beginning of the process.
    pub const ZERO: Self = Self(0);

    /// The moment `us` microseconds after the process began.
    pub const fn from_micros(us: u64) -> Self {
        Self(us)
    }

    /// Microseconds since the process began.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// How long ago `earlier` was; zero where it lies ahead.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Moment {
    type Output = Self;
    fn add(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Moment {
    type Output = Self;
    fn sub(self, back: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(back.as_micros()).unwrap_or(u64::MAX)))
    }
}

/// Seconds since the Unix epoch (UTC): the dates in invitations, certificates and names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WallTime(pub u64);

impl WallTime {
    /// This date, `wait` later (whole seconds).
    pub const fn plus(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(wait.as_secs()))
    }

    /// This date, `back` earlier (whole seconds).
    pub const fn minus(self, back: Duration) -> Self {
        Self(self.0.saturating_sub(back.as_secs()))
    }
}

impl fmt::Display for WallTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s after 1970", self.0)
    }
}
