//! Owns how often the same thing is logged: what a stranger can make happen must not fill a disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use potluck_core::time::Moment;

/// Between two lines about the same.
const EVERY: Duration = Duration::from_secs(10);

/// A line that is written now and then, however often there is reason to.
#[derive(Default)]
pub(crate) struct Seldom {
    /// When it may be written again, in µs.
    next_us: AtomicU64,
    left_out: AtomicU64,
}

impl Seldom {
    /// Whether to write it now, and how many were left out since the last.
    pub(crate) fn now(&self, now: Moment) -> Option<u64> {
        let next = self.next_us.load(Ordering::Relaxed);
        let then = (now + EVERY).as_micros();
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
