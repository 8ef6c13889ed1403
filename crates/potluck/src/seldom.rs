//! Owns how often the same thing is said: what a stranger can make happen must not fill a disk with
//! lines, nor what goes fast a reader with progress.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use potluck_core::time::Moment;

/// Between two lines of a log about the same.
const EVERY: Duration = Duration::from_secs(10);

/// What is said now and then, however often there is reason to.
#[derive(Debug)]
pub(crate) struct Seldom {
    every: Duration,
    /// When it may be said again, in µs.
    next_us: AtomicU64,
    left_out: AtomicU64,
}

impl Default for Seldom {
    fn default() -> Self {
        Self::every(EVERY)
    }
}

impl Seldom {
    /// At once, and then no more often than this.
    pub(crate) const fn every(every: Duration) -> Self {
        Self { every, next_us: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// Whether to say it now, and how many were left out since the last.
    pub(crate) fn now(&self, now: Moment) -> Option<u64> {
        let next = self.next_us.load(Ordering::Relaxed);
        let then = (now + self.every).as_micros();
        let order = Ordering::Relaxed;
        if now.as_micros() < next
            || self.next_us.compare_exchange(next, then, order, order).is_err()
        {
            self.left_out.fetch_add(1, order);
            return None;
        }
        Some(self.left_out.swap(0, order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_lines_one_is_written_and_says_how_many_were_not() {
        let (seldom, at) = (Seldom::default(), Moment::from_micros);
        assert_eq!(seldom.now(at(5)), Some(0));
        assert_eq!((seldom.now(at(6)), seldom.now(at(7))), (None, None));
        assert_eq!(seldom.now(at(5) + EVERY), Some(2));
        assert_eq!(seldom.now(at(6) + EVERY), None);
    }
}
