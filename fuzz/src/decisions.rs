//! Bytes of an input as decisions, for targets whose cases are made and not parsed.

use crate::common::Random;

/// The bytes of an input one by one, and behind them numbers that all of them together decide.
pub struct Decisions<'a> {
    bytes: &'a [u8],
    random: Random,
}

impl<'a> Decisions<'a> {
    /// Of an input.
    pub fn new(bytes: &'a [u8]) -> Self {
        // FNV-1a.
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Self { bytes, random: Random(hash) }
    }

    fn byte(&mut self) -> u8 {
        match self.bytes.split_first() {
            Some((first, rest)) => {
                self.bytes = rest;
                *first
            }
            None => self.random.next() as u8,
        }
    }

    /// A number below `bound`, which is at most 65536.
    pub fn below(&mut self, bound: usize) -> usize {
        let low = usize::from(self.byte());
        if bound <= 256 { low % bound } else { (low | usize::from(self.byte()) << 8) % bound }
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// One of `choices`, which are some.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Numbers that the whole input decides, as many as wanted.
    pub fn random(&mut self) -> Random {
        Random(self.random.next())
    }
}

/// Inputs to start from: `count` of them, each of some bytes.
pub fn seeds(count: u64) -> Vec<Vec<u8>> {
    let seed = |number| {
        let mut random = Random(number);
        (0..8 + random.below(56)).map(|_| random.next() as u8).collect()
    };
    (0..count).map(seed).collect()
}
