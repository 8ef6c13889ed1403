//! Owns what people and fate decide in a world: what a script says, and chance where it says no more.

use std::collections::VecDeque;

use crate::dice::Dice;

/// Decides. Without a script it decides just like its dice.
pub(super) struct Fate {
    script: VecDeque<u8>,
    dice: Dice,
}

impl Fate {
    pub(super) fn new(script: &[u8], seed: u64) -> Self {
        Self { script: script.iter().copied().collect(), dice: Dice(seed) }
    }

    /// A seed for other dice.
    pub(super) const fn seed(&mut self) -> u64 {
        self.dice.next()
    }

    /// A number below `n`: a byte of the script is where between 0 and `n` it lies, two bytes where one
    /// cannot tell.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        let scaled = |at: u64, of: u64| at * n / of;
        match self.script.pop_front() {
            None => self.dice.below(n),
            Some(byte) if n <= 256 => scaled(byte.into(), 256),
            Some(byte) => {
                let more = self.script.pop_front().unwrap_or_default();
                scaled(u16::from_be_bytes([byte, more]).into(), 1 << 16)
            }
        }
    }

    /// True with probability `p`.
    pub(super) fn chance(&mut self, p: f64) -> bool {
        match self.script.pop_front() {
            None => self.dice.chance(p),
            Some(byte) => f64::from(byte) < p * 256.0,
        }
    }
}
