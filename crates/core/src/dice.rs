//! Owns dice: numbers that look random and come again from the same seed. Never makes a secret, and
//! never asks the machine for chance: the seed is an argument.

use crate::time::Duration;

/// A generator of 64 bits a throw (splitmix64, Steele, Lea & Flood 2014). Not for secrets.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that always fall the same way for the same `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    pub const fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 where `n` is 0.
    pub const fn below(&mut self, n: usize) -> usize {
        ((self.throw() as u128 * n as u128) >> 64) as usize
    }

    /// True in `permille` of 1,000 throws.
    pub const fn chance(&mut self, permille: u32) -> bool {
        self.below(1_000) < permille as usize
    }

    /// A time between three quarters and five quarters of `about`: what keeps many machines from
    /// doing the same thing at the same moment.
    pub fn around(&mut self, about: Duration) -> Duration {
        let us = about.as_micros() as u64;
        Duration::from_micros(us - us / 4 + self.below(us as usize / 2 + 1) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_fall_the_same_way_again_and_everywhere_within_bounds() {
        let (mut a, mut b) = (Dice::new(7), Dice::new(7));
        let mut faces = [0; 6];
        for _ in 0..6_000 {
            let face = a.below(6);
            assert_eq!(face, b.below(6));
            faces[face] += 1;
        }
        assert!(faces.iter().all(|n| (850..1_150).contains(n)), "{faces:?}");
        assert_eq!(a.below(0), 0);
        let wait = a.around(Duration::from_secs(4));
        assert!((Duration::from_secs(3)..=Duration::from_secs(5)).contains(&wait));
    }
}
