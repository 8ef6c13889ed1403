//! Owns when written pieces are made durable: twice a second, or sooner where much was written. Never
//! wakes while nothing is written.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::files::lock;

/// Half of what a crash may cost, a second: the sync itself takes its time too.
const EVERY: Duration = Duration::from_millis(500);
/// Unsynced bytes that do not wait for that: they would make one long sync.
const MANY_BYTES: u64 = 256 << 20;

/// Tells the flusher's thread what was written, and when to stop.
#[derive(Debug, Default)]
pub(super) struct Bell {
    unsynced: AtomicU64,
    stop: AtomicBool,
    /// Guards nothing by itself: it keeps a ring from falling between a look and the wait.
    waiting: Mutex<()>,
    ring: Condvar,
}

impl Bell {
    /// So many bytes were written.
    pub(super) fn written(&self, bytes: u64) {
        let before = self.unsynced.fetch_add(bytes, Ordering::AcqRel);
        let after = before.saturating_add(bytes);
        if before == 0 || (before < MANY_BYTES && after >= MANY_BYTES) {
            let _waiting = lock(&self.waiting);
            self.ring.notify_all();
        }
    }

    /// The thread ends, after one last flush.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        let _waiting = lock(&self.waiting);
        self.ring.notify_all();
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Calls `flush` whenever it is due, until [`Bell::stop`]. A flush that returns false is tried
    /// again after the same wait.
    pub(super) fn run(&self, flush: impl Fn() -> bool) {
        loop {
            let mut turn = lock(&self.waiting);
            while self.unsynced.load(Ordering::Acquire) == 0 && !self.stopped() {
                turn = self.ring.wait(turn).unwrap_or_else(PoisonError::into_inner);
            }
            let more_to_come =
                |(): &mut ()| self.unsynced.load(Ordering::Acquire) < MANY_BYTES && !self.stopped();
            drop(self.ring.wait_timeout_while(turn, EVERY, more_to_come));
            // Looked at before the flush: what was written until then is in it.
            let last = self.stopped();
            self.unsynced.store(0, Ordering::Release);
            if !flush() {
                self.unsynced.fetch_add(1, Ordering::AcqRel);
            }
            if last {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_before_the_stop_is_always_flushed() {
        for round in 0..200 {
            let bell = Bell::default();
            let (written, flushed) = (AtomicU64::new(0), AtomicU64::new(0));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    bell.run(|| {
                        flushed.store(written.load(Ordering::SeqCst), Ordering::SeqCst);
                        true
                    });
                });
                for n in 1..=round % 3 {
                    written.store(n, Ordering::SeqCst);
                    bell.written(MANY_BYTES);
                }
                bell.stop();
            });
            assert_eq!(flushed.into_inner(), round % 3);
        }
    }
}
