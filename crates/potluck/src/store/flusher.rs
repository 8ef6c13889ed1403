//! Owns when written pieces are made durable: twice a second, or sooner where much was written; and
//! how much may wait for the disk. Never wakes while nothing is written.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::files::lock;

/// Half of what a crash may cost, a second: the sync itself takes its time too.
const EVERY: Duration = Duration::from_millis(500);
/// Unsynced bytes that do not wait for that: the disk is kept busy while more come, and no sync is
/// long.
const MANY_BYTES: u64 = 32 << 20;
/// Bytes of all downloads together that wait for the disk, but for one piece a connection: where it
/// is slower than the network, whoever received more waits, and TCP holds the sender back. The
/// system's own bound is a fifth of the memory, behind which every other program would queue. A disk
/// that takes 5 MB/s is through with this sooner than the silence becomes suspicious (45 s).
const MAX_DIRTY: u64 = 128 << 20;

/// Tells the flusher's thread what was written, and when to stop.
#[derive(Debug, Default)]
pub(super) struct Bell {
    /// Written since the last flush began.
    unsynced: AtomicU64,
    /// The same, and what the flush at hand has not brought to the disk yet.
    dirty: AtomicU64,
    stop: AtomicBool,
    /// Guards nothing by itself: it keeps a ring from falling between a look and the wait.
    waiting: Mutex<()>,
    ring: Condvar,
    room: Condvar,
}

impl Bell {
    /// So many bytes were written.
    pub(super) fn written(&self, bytes: u64) {
        self.dirty.fetch_add(bytes, Ordering::AcqRel);
        let before = self.unsynced.fetch_add(bytes, Ordering::AcqRel);
        let after = before.saturating_add(bytes);
        if before == 0 || (before < MANY_BYTES && after >= MANY_BYTES) {
            let _waiting = lock(&self.waiting);
            self.ring.notify_all();
        }
    }

    /// Something else failed that the next flush does.
    pub(super) fn again(&self) {
        self.written(1);
    }

    /// Waits while too much waits for the disk. To be called with nothing locked that a flush needs.
    pub(super) fn wait_for_room(&self) {
        if self.dirty.load(Ordering::Acquire) < MAX_DIRTY {
            return;
        }
        let mut turn = lock(&self.waiting);
        while self.dirty.load(Ordering::Acquire) >= MAX_DIRTY && !self.stopped() {
            turn = self.room.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread ends, after one last flush; nobody waits any more.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        let _waiting = lock(&self.waiting);
        self.ring.notify_all();
        self.room.notify_all();
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
            let taken = self.unsynced.swap(0, Ordering::AcqRel);
            if !flush() {
                self.again();
            }
            // Also where it failed: a disk that is broken must not stop what goes to others.
            self.dirty.fetch_sub(taken, Ordering::AcqRel);
            let _waiting = lock(&self.waiting);
            self.room.notify_all();
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

    #[test]
    fn no_more_than_the_bound_waits_for_the_disk_and_nobody_waits_for_good() {
        for broken in [false, true] {
            let bell = Bell::default();
            let on_disk = AtomicU64::new(0);
            let written = AtomicU64::new(0);
            std::thread::scope(|scope| {
                let flusher = scope.spawn(|| {
                    bell.run(|| {
                        on_disk.store(written.load(Ordering::SeqCst), Ordering::SeqCst);
                        !broken
                    });
                });
                let writer = scope.spawn(|| {
                    for _ in 0..1_000 {
                        bell.wait_for_room();
                        let waits = written.load(Ordering::SeqCst) - on_disk.load(Ordering::SeqCst);
                        assert!(broken || waits < MAX_DIRTY);
                        written.fetch_add(MANY_BYTES / 3, Ordering::SeqCst);
                        bell.written(MANY_BYTES / 3);
                    }
                });
                writer.join().unwrap();
                bell.stop();
                flusher.join().unwrap();
            });
            assert!(bell.dirty.into_inner() <= 1);
        }
        // Nor when the thread is gone.
        let bell = Bell::default();
        bell.written(2 * MAX_DIRTY);
        bell.stop();
        bell.wait_for_room();
    }
}
