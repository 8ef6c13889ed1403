//! Owns the sums of where connections' threads spend their time, over the whole process. A clock is
//! read where a thread goes from one kind of work to the next: once for a read, a write or a piece.
//!
//! ```text
//! source    Read  → Seal → Send                  ToSend: had something to send, and waited
//! fetcher   Receive → Open → Hash → Write        ToReceive: had asked for something, and waited
//! ```

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a thread was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Reading a piece to be sent from the disk.
    Read,
    /// Sealing what is sent into TLS records.
    Seal,
    /// Handing it to the socket.
    Send,
    /// Waiting to send: for the socket, for a turn, or to be told which piece.
    ToSend,
    /// Taking what came from the socket.
    Receive,
    /// Opening TLS records, and gathering pieces of them.
    Open,
    /// Verifying pieces.
    Hash,
    /// Writing pieces.
    Write,
    /// Waiting for what was asked for.
    ToReceive,
    /// Making what was written durable: not of a connection.
    Sync,
    /// Anything else but being idle.
    Other,
}

const WORKS: usize = Work::Other as usize + 1;

static NANOS: [AtomicU64; WORKS] = [const { AtomicU64::new(0) }; WORKS];

thread_local! {
    /// When this thread went into the work it is at; none in threads that are not timed.
    static SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// This thread is timed from now on.
pub(crate) fn begin() {
    SINCE.set(Some(Instant::now()));
}

/// What this thread did up to now was this.
pub(crate) fn lap(work: Work) {
    laps(&[work]);
}

/// The same for time that counts for each of these, or for none.
pub(crate) fn laps(works: &[Work]) {
    let Some(since) = SINCE.get() else { return };
    let now = Instant::now();
    works.iter().for_each(|work| add(*work, now - since));
    SINCE.set(Some(now));
}

/// Work of another thread.
pub(crate) fn timed<T>(what: Work, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = work();
    add(what, began.elapsed());
    result
}

fn add(work: Work, time: Duration) {
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    NANOS[work as usize].fetch_add(nanos, Ordering::Relaxed);
}

/// The sums at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums([u64; WORKS]);

impl Sums {
    /// Since the process began.
    pub(crate) fn now() -> Self {
        Self(std::array::from_fn(|at| NANOS[at].load(Ordering::Relaxed)))
    }

    /// What was added since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at].saturating_sub(before.0[at])))
    }

    /// Seconds spent on it.
    pub(crate) fn seconds(&self, work: Work) -> f64 {
        self.0[work as usize] as f64 / 1e9
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_timed_adds_up_to_the_time_it_ran_and_others_add_nothing() {
        // Other tests of this process may add to the sums meanwhile: never less than these.
        let before = Sums::now();
        let spin = |time: Duration| {
            let began = Instant::now();
            while began.elapsed() < time {}
        };
        let ran = std::thread::spawn(move || {
            let began = Instant::now();
            begin();
            spin(Duration::from_millis(3));
            lap(Work::Read);
            spin(Duration::from_millis(2));
            laps(&[Work::ToSend, Work::ToReceive]);
            spin(Duration::from_millis(1));
            laps(&[]);
            began.elapsed().as_secs_f64()
        });
        let ran = ran.join().unwrap();
        lap(Work::Other); // of a thread that is not timed
        let sums = Sums::now().since(before);
        assert!(sums.seconds(Work::Read) >= 0.003 && sums.seconds(Work::ToSend) >= 0.002);
        assert!(sums.seconds(Work::ToReceive) >= 0.002 && ran >= 0.006);
        assert_eq!(timed(Work::Sync, || 7), 7);
    }
}
