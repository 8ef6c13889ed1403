//! Owns how fast bytes move while somebody waits for them. Never counts idle time.

use crate::time::{Duration, Moment};

/// A sample as long as this counts as much as everything before it.
const MEMORY: Duration = Duration::from_millis(24);

/// A peak fades by a third in so many microseconds.
const PEAK_FADES: u128 = 3 * 5_000_000;

/// Bytes a second, smoothed over the time that something was awaited.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// A sample covers at least this much waiting: shorter ones measure how events were bunched.
    sample: Duration,
    /// Pauses shorter than this are waiting, too: a buffer hides that the line is still at work.
    pause: Duration,
    /// Bytes a second; 0 as long as nothing was measured.
    rate: u64,
    /// The most it was of late.
    peak: u64,
    awaited: bool,
    /// Waiting is counted up to here.
    counted: Moment,
    /// Of the sample under way.
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Of what one host sends: quick to notice that it sends faster or slower.
    pub(crate) const fn of_one() -> Self {
        Self::new(Duration::from_millis(8), Duration::ZERO)
    }

    /// Of what all hosts send together, which comes in bunches.
    pub(crate) const fn of_all() -> Self {
        Self::new(Duration::from_millis(30), Duration::ZERO)
    }

    /// Of what is given to sockets, which swallow a burst at once and send it later.
    pub(crate) const fn of_sockets() -> Self {
        Self::new(Duration::from_millis(30), Duration::from_millis(50))
    }

    const fn new(sample: Duration, pause: Duration) -> Self {
        let (counted, waited) = (Moment::ZERO, Duration::ZERO);
        Self { sample, pause, rate: 0, peak: 0, awaited: false, counted, waited, bytes: 0 }
    }

    /// Something is awaited from now on, if it was not already.
    pub(crate) fn start(&mut self, now: Moment) {
        if !self.awaited {
            let idle = now.since(self.counted);
            self.waited += if idle < self.pause { idle } else { Duration::ZERO };
            (self.awaited, self.counted) = (true, now);
        }
    }

    /// Nothing is awaited any more.
    pub(crate) fn stop(&mut self, now: Moment) {
        self.count(now);
        self.awaited = false;
    }

    fn count(&mut self, now: Moment) {
        if self.awaited {
            self.waited += now.since(self.counted);
            self.counted = now;
        }
    }

    /// Bytes moved.
    pub(crate) fn add(&mut self, now: Moment, bytes: u32) {
        self.count(now);
        self.bytes += u64::from(bytes);
        if self.waited < self.sample {
            return;
        }
        let (old, new) = (MEMORY.as_micros() as u64, self.waited.as_micros() as u64);
        let sample = self.bytes.saturating_mul(1_000_000) / new;
        self.rate = match self.rate {
            0 => sample,
            rate => {
                let sum = u128::from(rate) * u128::from(old) + u128::from(sample) * u128::from(new);
                (sum / u128::from(old + new)) as u64
            }
        };
        let fade = u128::from(self.peak) * u128::from(new) / PEAK_FADES;
        let fades = self.peak.saturating_sub(fade as u64);
        self.peak = self.rate.max(fades);
        (self.waited, self.bytes) = (Duration::ZERO, 0);
    }

    /// Bytes a second; 0 while unknown.
    pub(crate) const fn rate(&self) -> u64 {
        self.rate
    }

    /// Bytes that move within `time`; 0 while unknown.
    pub(crate) fn within(&self, time: Duration) -> u64 {
        (u128::from(self.rate) * time.as_micros() / 1_000_000) as u64
    }

    /// Bytes that moved within `time` when things went best of late.
    pub(crate) fn within_at_best(&self, time: Duration) -> u64 {
        (u128::from(self.peak) * time.as_micros() / 1_000_000) as u64
    }

    /// How long `bytes` take; `None` while unknown.
    pub(crate) fn time_for(&self, bytes: u64) -> Option<Duration> {
        (self.rate > 0).then(|| Duration::from_micros(bytes.saturating_mul(1_000_000) / self.rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::from_micros(ms * 1_000)
    }

    #[test]
    fn a_steady_flow_is_measured_whether_it_comes_in_drops_or_lumps() {
        for (every_ms, bytes) in [(1, 1_000), (5, 5_000), (100, 100_000)] {
            let mut pace = Pace::of_one();
            pace.start(at(0));
            for n in 1..200 {
                pace.add(at(n * every_ms), bytes);
            }
            assert!((990_000..1_010_000).contains(&pace.rate()), "{every_ms}: {}", pace.rate());
            assert_eq!(pace.time_for(1_000_000).unwrap().as_millis() / 10, 100);
        }
    }

    #[test]
    fn a_burst_that_a_socket_swallows_is_measured_by_how_often_it_has_room_again() {
        let mut pace = Pace::of_sockets();
        // Ten at once; then one has room every 5 ms, and each is swallowed the moment it is given.
        (0..10).for_each(|_| pace.start(at(0)));
        (0..10).for_each(|_| pace.add(at(0), 5_000));
        for n in 1..100 {
            pace.stop(at(n * 5 - 5));
            pace.start(at(n * 5));
            pace.add(at(n * 5), 5_000);
        }
        assert!((950_000..1_100_000).contains(&pace.rate()), "{}", pace.rate());
    }

    #[test]
    fn idle_time_is_not_counted() {
        let mut pace = Pace::of_one();
        assert_eq!((pace.rate(), pace.time_for(1)), (0, None));
        for n in 0..50 {
            pace.start(at(n * 1_000));
            pace.add(at(n * 1_000 + 10), 10_000);
            pace.stop(at(n * 1_000 + 10));
        }
        assert_eq!(pace.rate(), 1_000_000);
        assert_eq!(pace.within(Duration::from_millis(20)), 20_000);
    }
}
