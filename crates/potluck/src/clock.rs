//! Owns the only readings of clocks and dice; everything else is handed them.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime};

use potluck_core::time::{Moment, WallTime};

static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Now, on this process's monotonic clock.
pub(crate) fn now() -> Moment {
    Moment::from_micros(u64::try_from(BEGAN.elapsed().as_micros()).unwrap_or(u64::MAX))
}

/// Now, as a date.
pub(crate) fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    WallTime(since.as_secs())
}

/// `N` secret random bytes of the operating system.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(clippy::expect_used, reason = "without random numbers no key is safe: stop")]
    aws_lc_rs::rand::fill(&mut bytes).expect("the operating system gives random numbers");
    bytes
}
