//! Owns the two questions every error answers: whose fault is it, and when may it be tried again.

use crate::time::Duration;

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Ours: a wrong argument, a full disk, a defect. Trying again alone changes nothing.
    Ours,
    /// Theirs: the other side broke a rule. Others are asked instead.
    Theirs,
    /// Nobody's: a lost packet, a time-out, a restart. Trying again is right.
    Weather,
}

/// Waits that grow by half from `first` to `most`, the shape used wherever something is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    next: Duration,
    most: Duration,
}

impl Backoff {
    /// Begins at `first`, never waits longer than `most`.
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self { next: first, most }
    }

    /// The next wait.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next.min(self.most);
        self.next = (wait * 3 / 2).min(self.most);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_by_half_up_to_the_most() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(200));
        let waits: Vec<_> = (0..4).map(|_| backoff.wait().as_millis()).collect();
        assert_eq!(waits, [100, 150, 200, 200]);
    }
}
