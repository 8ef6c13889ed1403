//! Owns how fast one member may ask: a bucket of tokens for each. Never counts what is not the member's
//! own and new: who forges or replays its datagrams takes nothing from it.
//!
//! Who has emptied its bucket is told so once, and then passed over for a moment without a byte: by
//! gates before they open anything, and by the registrar where a gate has not heard of it yet. So one
//! who asks without end costs no more than taking its datagrams from the socket does.

use crate::time::{Duration, Moment};

/// Requests a second of one member unless told otherwise: a sixtieth of what a core answers, and so much
/// that a peer with fifty thousand contents need not wait to register them anew.
pub(super) const REQUESTS_A_SECOND: u32 = 5_000;
/// As many seconds' worth of them may come at once.
pub(super) const BURST_S: u32 = 2;
/// Requests that the verification of one signature costs as much as.
pub(super) const SIGNATURE_TOKENS: i64 = 10;
/// So long a member with an empty bucket is passed over. Its bucket fills meanwhile: what it may do in a
/// second it does in ten rounds, and only the last batch of each is opened in vain.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// How fast one member has been asking.
#[derive(Clone, Copy, Default)]
pub(super) struct Pace {
    /// Thousandths of requests taken from the bucket; dear requests may put it in debt.
    used: i64,
    at: Moment,
    /// Until then it is passed over.
    shut: Moment,
}

/// What becomes of a member's request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// It is heeded.
    Granted,
    /// It is one too many: its sender is told, and then passed over until this moment …
    Refused(Moment),
    /// … as it is already.
    PassedOver(Moment),
}

impl Pace {
    /// One request more.
    pub(super) fn take(&mut self, now: Moment, a_second: u32, burst: u32) -> Turn {
        if now < self.shut {
            return Turn::PassedOver(self.shut);
        }
        let refilled = now.since(self.at).as_micros() * u128::from(a_second) / 1_000;
        let refilled = i64::try_from(refilled).unwrap_or(i64::MAX);
        self.used = self.used.saturating_sub(refilled).max(0);
        self.at = now;
        if self.used >= i64::from(burst) * 1_000 {
            self.shut = now + PAUSE;
            return Turn::Refused(self.shut);
        }
        self.used += 1_000;
        Turn::Granted
    }

    /// The last request was as dear as `tokens` more.
    pub(super) fn charge(&mut self, tokens: i64) {
        self.used = self.used.saturating_add(tokens.saturating_mul(1_000));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn in_no_span_of_time_more_is_granted_than_the_bucket_holds_and_what_fills_it_meanwhile(
            waits in prop::collection::vec(0u64..40_000, 1..400),
        ) {
            const A_SECOND: u32 = 100;
            const BURST: u32 = 20;
            let (mut pace, mut now) = (Pace::default(), Moment::from_micros(1_000_000));
            let mut granted: Vec<Moment> = vec![];
            for wait in waits {
                now = now + Duration::from_micros(wait);
                match pace.take(now, A_SECOND, BURST) {
                    Turn::Granted => granted.push(now),
                    Turn::Refused(until) => prop_assert_eq!(until, now + PAUSE),
                    Turn::PassedOver(until) => prop_assert!(now < until),
                }
            }
            for (nth, from) in granted.iter().enumerate() {
                for (more, until) in granted[nth..].iter().enumerate() {
                    let fills = until.since(*from).as_micros() as usize * A_SECOND as usize / 1_000_000;
                    prop_assert!(more <= BURST as usize + fills);
                }
            }
        }
    }
}
