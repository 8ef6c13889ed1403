//! Owns how fast bytes move while somebody waits for them. Never counts idle time.

use crate::time::{Duration, Moment};

/// A sample covers at least this much waiting: shorter ones measure how events were bunched.
const SAMPLE: Duration = Duration::from_millis(8);
/// A sample as long as this counts as much as everything before it.
const MEMORY: Duration = Duration::from_millis(24);

/// Bytes a second, smoothed over the time that something was awaited.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    /// Bytes a second; 0 as long as nothing was measured.
    rate: u64,
    /// Something is awaited since then.
    since: Option<Moment>,
    /// Of the sample under way: time waited before `since`, and bytes.
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Something is awaited from now on, if it was not already.
    pub(crate) fn start(&mut self, now: Moment) {
        self.since.get_or_insert(now);
    }

    /// Nothing is awaited any more.
    pub(crate) fn stop(&mut self, now: Moment) {
        if let Some(since) = self.since.take() {
            self.waited += now.since(since);
        }
    }

    /// Bytes moved.
    pub(crate) fn add(&mut self, now: Moment, bytes: u32) {
        self.bytes += u64::from(bytes);
        let waited = self.waited + self.since.map_or(Duration::ZERO, |since| now.since(since));
        if waited < SAMPLE {
            return;
        }
        let (old, new) = (MEMORY.as_micros() as u64, waited.as_micros() as u64);
        let sample = self.bytes.saturating_mul(1_000_000) / new;
        self.rate = match self.rate {
            0 => sample,
            rate => {
                let sum = u128::from(rate) * u128::from(old) + u128::from(sample) * u128::from(new);
                (sum / u128::from(old + new)) as u64
            }
        };
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        self.since = self.since.map(|_| now);
    }

    /// Bytes a second; 0 while unknown.
    pub(crate) const fn rate(&self) -> u64 {
        self.rate
    }

    /// Bytes that move within `time`; 0 while unknown.
    pub(crate) fn within(&self, time: Duration) -> u64 {
        (u128::from(self.rate) * time.as_micros() / 1_000_000) as u64
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
            let mut pace = Pace::default();
            pace.start(at(0));
            for n in 1..200 {
                pace.add(at(n * every_ms), bytes);
            }
            assert!((990_000..1_010_000).contains(&pace.rate()), "{every_ms}: {}", pace.rate());
            assert_eq!(pace.time_for(1_000_000).unwrap().as_millis() / 10, 100);
        }
    }

    #[test]
    fn idle_time_is_not_counted() {
        let mut pace = Pace::default();
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
