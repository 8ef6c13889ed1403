//! Owns how many bytes may move by when: a limit in bytes a second as people write it, and the bucket
//! that holds to it. Never waits, and never sees a byte.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use crate::time::{Duration, Moment};

/// The lowest limit there is. Below it a machine that sends on several connections at once would be
/// silent on each for so long that the others take it for dead.
const LEAST: u64 = 16_000;
/// Whoever moves bytes does so in turns of what the limit allows in this time: short, so that many
/// can share it evenly and nothing comes in bursts …
const TURN: Duration = Duration::from_millis(20);
/// … but of no fewer bytes, or the heads of records would cost more than a hundredth, …
const LEAST_TURN: u64 = 2 << 10;
/// … and of no more: so much is moved at once anyway.
const MOST_TURN: u64 = 256 << 10;
/// What was not moved in this time is made up for: threads wake late. More would be a burst.
const SLACK: Duration = Duration::from_millis(40);

const SECOND_NS: u128 = 1_000_000_000;

/// Bytes a second that may move, or no limit.
///
/// As text: `20MB`, `1.5MiB`, `500k`, `1Mbit` (each with `/s` after it, if one likes), or `off`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit(Option<NonZeroU64>);

impl Limit {
    /// No limit.
    pub const OFF: Self = Self(None);

    /// So many bytes a second; 0 is no limit.
    ///
    /// # Errors
    /// [`TooLow`]: nothing works at so little.
    pub const fn new(bytes_a_second: u64) -> Result<Self, TooLow> {
        match bytes_a_second {
            1..LEAST => Err(TooLow),
            rate => Ok(Self(NonZeroU64::new(rate))),
        }
    }

    /// Bytes a second; `None` where there is no limit.
    pub const fn bytes_a_second(self) -> Option<u64> {
        match self.0 {
            Some(rate) => Some(rate.get()),
            None => None,
        }
    }
}

/// A limit at which transfers cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a limit under 16 kB/s is too low: other machines would take this one for dead (off: no limit)"
)]
pub struct TooLow;

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("off") {
            return Ok(Self::OFF);
        }
        let text = text.strip_suffix("/s").unwrap_or(text).trim_end();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..digits], text[digits..].trim_start());
        let wrong =
            || "a limit looks like 20MB, 1.5MiB, 500k or 1Mbit (a second), or is off".into();
        let milli_bytes = thousandths(number).ok_or_else(wrong)?;
        let (times, part) = match unit {
            "" | "B" => (1, 1),
            "k" | "K" | "kB" | "KB" => (1_000, 1),
            "m" | "M" | "MB" => (1_000_000, 1),
            "g" | "G" | "GB" => (1_000_000_000, 1),
            "KiB" | "kiB" => (1 << 10, 1),
            "MiB" => (1 << 20, 1),
            "GiB" => (1 << 30, 1),
            "kbit" | "Kbit" => (1_000, 8),
            "Mbit" | "mbit" => (1_000_000, 8),
            "Gbit" | "gbit" => (1_000_000_000, 8),
            "b" | "kb" | "Kb" | "mb" | "Mb" | "gb" | "Gb" => {
                return Err("say MB for megabytes and Mbit for megabits".into());
            }
            _ => return Err(wrong()),
        };
        let rate = milli_bytes.checked_mul(times).ok_or_else(wrong)? / (part * 1_000);
        if rate == 0 {
            return Err(TooLow.to_string());
        }
        Self::new(u64::try_from(rate).map_err(|_| wrong())?).map_err(|e| e.to_string())
    }
}

/// A decimal number, in thousandths; what is finer is left out.
fn thousandths(number: &str) -> Option<u128> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let part = &part[..part.len().min(3)];
    let fine: u128 = format!("{part:0<3}").parse().ok()?;
    whole.parse::<u128>().ok()?.checked_mul(1_000)?.checked_add(fine)
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes_a_second() {
            None => f.write_str("off"),
            Some(rate) => write!(f, "{rate}B"),
        }
    }
}

/// Hands out turns, so that all who take them together keep to a limit.
///
/// Who has bytes to move reserves one turn at a time and begins it at the moment it is told: turns
/// follow each other in the order of asking, so that whoever asks without pause gets an even share.
#[derive(Clone, Debug, Default)]
pub struct Bucket {
    limit: Limit,
    /// Up to here all time is given away, in nanoseconds since the process began: microseconds
    /// would round away a part of a short turn.
    given: u128,
}

impl Bucket {
    /// The limit.
    pub const fn limit(&self) -> Limit {
        self.limit
    }

    /// Another limit from now on. Turns that were reserved are forgotten: their holders ask again.
    pub fn set(&mut self, now: Moment, limit: Limit) {
        *self = Self { limit, given: nanos(now) };
    }

    /// How many bytes a turn is; without a limit, all there can be.
    pub fn turn(&self) -> u64 {
        let rate = self.limit.bytes_a_second();
        let within = |rate: u64| (u128::from(rate) * TURN.as_nanos() / SECOND_NS) as u64;
        rate.map_or(u64::MAX, |rate| within(rate).clamp(LEAST_TURN, MOST_TURN))
    }

    /// Reserves `bytes`; they may move from the moment that is returned.
    pub fn reserve(&mut self, now: Moment, bytes: u64) -> Moment {
        let begin = self.given.max(nanos(now).saturating_sub(SLACK.as_nanos()));
        self.given = begin.saturating_add(self.time_for(bytes));
        Moment::from_micros(u64::try_from(begin.div_ceil(1_000)).unwrap_or(u64::MAX))
    }

    /// So many bytes that were reserved did not move: others may have the time.
    pub fn give_back(&mut self, bytes: u64) {
        self.given = self.given.saturating_sub(self.time_for(bytes));
    }

    fn time_for(&self, bytes: u64) -> u128 {
        self.limit
            .bytes_a_second()
            .map_or(0, |rate| u128::from(bytes) * SECOND_NS / u128::from(rate))
    }
}

fn nanos(at: Moment) -> u128 {
    u128::from(at.as_micros()) * 1_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limit(text: &str) -> Option<u64> {
        let limit: Limit = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        limit.bytes_a_second()
    }

    #[test]
    fn limits_are_read_as_people_write_them() {
        let read = [
            ("20MB", 20_000_000),
            ("20M", 20_000_000),
            ("20 MB/s", 20_000_000),
            ("20MiB", 20 << 20),
            ("1.5m", 1_500_000),
            ("1Mbit", 125_000),
            ("1Mbit/s", 125_000),
            ("0.5Gbit", 62_500_000),
            ("64KiB", 64 << 10),
            ("500k", 500_000),
            ("16000", 16_000),
            ("16000B", 16_000),
            ("2G", 2_000_000_000),
        ];
        for (text, rate) in read {
            assert_eq!(limit(text), Some(rate), "{text}");
        }
        assert_eq!((limit("off"), limit("Off")), (None, None));
        for bad in ["", "fast", "MB", "-1MB", "1.MBB", "1,5MB", ".5MB", "1e9", "99999999999G", "1é"]
        {
            assert!(bad.parse::<Limit>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_could_be_bits_or_bytes_and_what_is_too_low_is_refused_with_the_reason() {
        let refused = |text: &str| text.parse::<Limit>().unwrap_err();
        assert!(refused("20Mb").contains("Mbit"));
        assert!(refused("20mb").contains("Mbit"));
        for low in ["0", "15999", "100kbit", "0.0001k"] {
            assert!(refused(low).contains("too low"), "{low}");
        }
    }

    proptest! {
        #[test]
        fn a_limit_is_read_back_as_it_is_shown(rate in prop_oneof![Just(0), LEAST..=u64::MAX]) {
            let limit = Limit::new(rate).unwrap();
            prop_assert_eq!(limit.to_string().parse(), Ok(limit));
        }

        /// Machines that take turns of a bucket, some of them late, some of them giving back: what
        /// all moved between any two moments is what the limit allows, and what is lent of it.
        #[test]
        fn all_together_keep_to_the_limit_in_every_stretch_of_time(
            rate in LEAST..2_000_000_000,
            late_us in proptest::collection::vec(0u64..60_000, 1..8),
            unused in proptest::collection::vec(0u64..4, 40..200),
        ) {
            let mut bucket = Bucket::default();
            bucket.set(Moment::ZERO, Limit::new(rate).unwrap());
            let turn = bucket.turn();
            // Each asks anew when its turn is over, which takes it `late_us` more than it should.
            let mut asks: Vec<Moment> = late_us.iter().map(|_| Moment::ZERO).collect();
            let mut moved: Vec<(Moment, u64)> = vec![];
            for part in unused {
                let first = (0..asks.len()).min_by_key(|at| asks[*at]).unwrap();
                let now = asks[first];
                let begins = bucket.reserve(now, turn).max(now);
                let not = turn / 4 * part;
                bucket.give_back(not);
                moved.push((begins, turn - not));
                asks[first] = begins + Duration::from_micros(late_us[first]);
            }
            moved.sort();
            let lent = SLACK.as_secs_f64() * rate as f64 + turn as f64;
            for from in 0..moved.len() {
                let mut sum = 0;
                for (at, bytes) in &moved[from..] {
                    sum += bytes;
                    let time = at.since(moved[from].0).as_secs_f64() + 2e-6;
                    let most = time * rate as f64 + lent + asks.len() as f64 * turn as f64;
                    prop_assert!(sum as f64 <= most, "{sum} in {time} s at {rate}");
                }
            }
        }

        #[test]
        fn who_is_never_late_gets_all_of_it_and_shares_it_evenly(
            rate in LEAST..2_000_000_000,
            takers in 1usize..20,
        ) {
            let mut bucket = Bucket::default();
            bucket.set(Moment::ZERO, Limit::new(rate).unwrap());
            let turn = bucket.turn();
            let mut next: Vec<Moment> = vec![Moment::ZERO; takers];
            let mut got = vec![0u64; takers];
            let rounds = 50;
            let mut end = Moment::ZERO;
            for _ in 0..rounds * takers {
                let first = (0..takers).min_by_key(|at| next[*at]).unwrap();
                end = bucket.reserve(next[first], turn).max(next[first]);
                got[first] += turn;
                next[first] = end;
            }
            let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
            // (Two more may fall to who asks twice before the first turn is over.)
            prop_assert!(most - least <= 2 * turn, "{got:?}");
            let sum = got.iter().sum::<u64>() as f64;
            let ideal = end.as_micros() as f64 / 1e6 * rate as f64;
            prop_assert!((sum - ideal).abs() <= 2.0 * turn as f64 + rate as f64 * 1e-6);
        }

        #[test]
        fn no_time_and_no_amount_overflows(
            steps in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), 0u8..3), 0..40),
        ) {
            let mut bucket = Bucket::default();
            for (at, bytes, rate, what) in steps {
                let now = Moment::from_micros(at);
                match what {
                    0 => bucket.set(now, Limit::new(rate).unwrap_or_default()),
                    1 => bucket.give_back(bytes),
                    _ => {
                        bucket.reserve(now, bytes);
                    }
                }
                prop_assert!(bucket.turn() > 0);
            }
        }
    }

    #[test]
    fn without_a_limit_everything_goes_at_once_and_a_new_one_holds_from_now_on() {
        let mut bucket = Bucket::default();
        let at = |ms: u64| Moment::from_micros(ms * 1_000);
        assert_eq!(bucket.turn(), u64::MAX);
        assert!(bucket.reserve(at(1_000), u64::MAX) <= at(1_000));
        bucket.set(at(2_000), Limit::new(1_000_000).unwrap());
        assert_eq!(bucket.turn(), 20_000);
        assert!(bucket.reserve(at(2_000), 500_000) <= at(2_000));
        assert_eq!(bucket.reserve(at(2_000), 1), at(2_500));
        // What was owed under the old limit is not held against the new one.
        bucket.set(at(2_100), Limit::new(2_000_000).unwrap());
        assert!(bucket.reserve(at(2_100), 1) <= at(2_100));
    }
}
