//! Owns the limits that all connections of a peer keep to together, and each connection's part in
//! that. Never waits: it says until when there is to be waited.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use potluck_core::limit::{Bucket, Limit};
use potluck_core::time::Moment;

use crate::clock;

/// The limit of one direction, over all connections.
#[derive(Default)]
pub(super) struct Limiter {
    /// Counts the limits there were, from 1 on; 0 while there is none, so that nothing is locked and
    /// no clock is read where there is nothing to keep to.
    epoch: AtomicU64,
    bucket: Mutex<(u64, Bucket)>,
}

impl Limiter {
    /// Another limit from now on.
    pub(super) fn set(&self, limit: Limit) {
        let (last, bucket) = &mut *self.bucket();
        *last += 1;
        bucket.set(clock::now(), limit);
        let epoch = if limit == Limit::OFF { 0 } else { *last };
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    pub(super) fn limit(&self) -> Limit {
        self.bucket().1.limit()
    }

    fn bucket(&self) -> MutexGuard<'_, (u64, Bucket)> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's turn to move bytes in one direction.
pub(super) struct Turn {
    limiter: Arc<Limiter>,
    reserved: Option<Reserved>,
}

struct Reserved {
    epoch: u64,
    begins: Moment,
    left: u64,
}

impl Turn {
    pub(super) const fn new(limiter: Arc<Limiter>) -> Self {
        Self { limiter, reserved: None }
    }

    /// How many bytes may move now. 0: none before [`Turn::until`].
    pub(super) fn room(&mut self) -> usize {
        let epoch = self.limiter.epoch.load(Ordering::Relaxed);
        if epoch == 0 {
            self.reserved = None;
            return usize::MAX;
        }
        let now = clock::now();
        let reserved = match &mut self.reserved {
            Some(reserved) if reserved.epoch == epoch => reserved,
            reserved => {
                let (_, bucket) = &mut *self.limiter.bucket();
                let left = bucket.turn();
                let begins = bucket.reserve(now, left);
                reserved.insert(Reserved { epoch, begins, left })
            }
        };
        match reserved.begins <= now {
            true => usize::try_from(reserved.left).unwrap_or(usize::MAX),
            false => 0,
        }
    }

    /// When its turn comes, where it waits for it.
    pub(super) fn until(&self) -> Option<Moment> {
        let reserved = self.reserved.as_ref()?;
        let stands = reserved.epoch == self.limiter.epoch.load(Ordering::Relaxed);
        (stands && reserved.begins > clock::now()).then_some(reserved.begins)
    }

    /// So many bytes moved. What was not reserved (a few small ones wait for nobody) is paid for by
    /// the next turns of all.
    pub(super) fn moved(&mut self, bytes: usize) {
        let epoch = self.limiter.epoch.load(Ordering::Relaxed);
        if epoch == 0 {
            return;
        }
        let mut beyond = bytes as u64;
        if let Some(reserved) = &mut self.reserved
            && reserved.begins <= clock::now()
        {
            let paid = beyond.min(reserved.left);
            reserved.left -= paid;
            beyond -= paid;
            if reserved.left == 0 {
                self.reserved = None;
            }
        }
        if beyond > 0 {
            self.limiter.bucket().1.reserve(clock::now(), beyond);
        }
    }

    /// Nothing more is to be moved for now: others may have what is left of the turn.
    pub(super) fn rest(&mut self) {
        if let Some(reserved) = self.reserved.take() {
            let (last, bucket) = &mut *self.limiter.bucket();
            if *last == reserved.epoch {
                bucket.give_back(reserved.left);
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.rest();
    }
}
