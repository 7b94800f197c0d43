//! A small deterministic mutator: what `cargo test` has in place of coverage guidance.

use engine::SplitMix64;

/// Values at the edges of integer types, little-endian.
const EDGES: [u64; 8] = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];

/// Makes damaged copies of good inputs.
pub struct Mutator {
    random: SplitMix64,
}

impl Mutator {
    /// The same seed makes the same sequence, another one another.
    pub fn new(seed: u64) -> Self {
        Self { random: SplitMix64::new(seed) }
    }

    fn next(&mut self) -> u64 {
        self.random.next_u64()
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// A copy of one of `seeds` with one to eight changes.
    pub fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut data = seeds[self.below(seeds.len())].clone();
        for _ in 0..1 + self.below(8) {
            // Headers are where decisions are made: half of the changes go into the first bytes.
            let reach = if self.next() & 1 == 0 { data.len().min(256) } else { data.len() };
            let at = self.below(reach);
            match self.below(7) {
                0 if !data.is_empty() => data[at] ^= 1 << self.below(8),
                1 if !data.is_empty() => data[at] = self.next() as u8,
                2 => data.truncate(at),
                3 => {
                    let width = [1, 2, 4, 8][self.below(4)];
                    let edge = EDGES[self.below(EDGES.len())].to_le_bytes();
                    let end = (at + width).min(data.len());
                    data[at..end].copy_from_slice(&edge[..end - at]);
                }
                4 => {
                    let byte = self.next() as u8;
                    let count = 1 + self.below(16);
                    data.splice(at..at, std::iter::repeat_n(byte, count));
                }
                5 => {
                    let end = (at + 1 + self.below(32)).min(data.len());
                    data.drain(at..end);
                }
                _ => {
                    let other = &seeds[self.below(seeds.len())];
                    let from = self.below(other.len());
                    let len = self.below(64).min(other.len() - from).min(data.len() - at.min(data.len()));
                    data[at..at + len].copy_from_slice(&other[from..from + len]);
                }
            }
        }
        data
    }
}
