//! Owns what a peer says of what happened in it: the counts of core's machines, and the times of
//! connections' threads, since the process began or since a fetch did.

use potluck_core::{sharing, swarm};

use super::engine::{Engine, Phase};
use crate::control::{FetchedStats, ServedStats, Stats, TimeStats};
use crate::timing::{Sums, Work};

/// What had happened when a fetch began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Before {
    served: sharing::Counts,
    times: Sums,
}

impl Before {
    pub(super) fn now(served: sharing::Counts) -> Self {
        Self { served, times: Sums::now() }
    }

    /// What happened since, of which the swarm counted `fetched`.
    pub(super) fn stats(self, fetched: swarm::Counts, served: sharing::Counts) -> Stats {
        Stats {
            fetched: fetched_stats(fetched),
            served: served_stats(served, self.served),
            seconds: time_stats(Sums::now().since(self.times)),
        }
    }
}

impl Engine {
    /// What happened since the process began.
    pub(super) fn stats(&self) -> Stats {
        let mut fetched = self.fetched;
        for content in self.contents.values() {
            if let Phase::Fetching(fetch) = &content.phase {
                fetched += fetch.counts();
            }
        }
        Before::default().stats(fetched, self.sharing.counts())
    }
}

fn fetched_stats(counts: swarm::Counts) -> FetchedStats {
    FetchedStats {
        pieces: counts.new.into(),
        bytes: counts.new_bytes,
        duplicates: counts.duplicates.into(),
        duplicate_bytes: counts.duplicate_bytes,
        bad: counts.bad.into(),
        failed: counts.failed.into(),
        stalls: counts.stalls.into(),
        steals: counts.steals.into(),
        retries: counts.retries.into(),
        busy: counts.busy.into(),
        endgame: counts.endgame.into(),
        declined: counts.declined.into(),
    }
}

fn served_stats(now: sharing::Counts, before: sharing::Counts) -> ServedStats {
    ServedStats {
        pieces: now.sent - before.sent,
        bytes: now.sent_bytes - before.sent_bytes,
        busy: now.busy - before.busy,
        granted: now.granted - before.granted,
        withdrawn: now.withdrawn - before.withdrawn,
        unsent: now.unsent - before.unsent,
        stuck: now.stuck - before.stuck,
    }
}

fn time_stats(sums: Sums) -> TimeStats {
    TimeStats {
        read: sums.seconds(Work::Read),
        seal: sums.seconds(Work::Seal),
        send: sums.seconds(Work::Send),
        wait_to_send: sums.seconds(Work::ToSend),
        receive: sums.seconds(Work::Receive),
        open: sums.seconds(Work::Open),
        hash: sums.seconds(Work::Hash),
        write: sums.seconds(Work::Write),
        wait_to_receive: sums.seconds(Work::ToReceive),
        sync: sums.seconds(Work::Sync),
        other: sums.seconds(Work::Other),
    }
}
