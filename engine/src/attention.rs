//! The KV cache and grouped-query attention over it.
//!
//! Keys lie in panels of 32 positions with the head dimension running slowest, so a score's lane is its position;
//! values lie row by row, so an output's lane is its element. Neither product needs a horizontal sum. Both are one
//! fused multiply-add per element in ascending order, so every level and every number of workers gives the same bits:
//! `score[pos] = scale * sum_d fma(k[pos][d], q[d])`, `out[d] = (sum_pos fma(e[pos], v[pos][d])) * (1 / sum_pos e[pos])`
//! with `e = exp(score - max)`.
//!
//! The element type is f32, which keeps F32 models equal to their reference; f16 would halve the traffic and is worth
//! its conversions only for contexts of thousands of tokens.

use crate::dispatch::ColumnsMut;
use crate::math::softmax_numerators;
use crate::reference::{ScalarArithmetic, Software};
use crate::simd::{self, Avx2, Level};
use core::ops::Range;
use model::layout::{PANEL, padded};

/// Query heads that share the loads of their kv head in one pass.
const HEADS: usize = 3;

/// Sizes of a KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvShape {
    /// Layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions, rounded up to whole panels of 32.
    pub positions: usize,
}

impl KvShape {
    /// Elements of the whole cache.
    pub fn len(&self) -> usize {
        2 * self.n_layers * self.n_kv_heads * self.head_len()
    }

    /// True for a cache of no positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of one head's keys, or values.
    fn head_len(&self) -> usize {
        self.positions * self.head_dim
    }

    /// Where the keys of `(layer, kv_head)` lie; its values follow.
    fn keys(&self, layer: usize, kv_head: usize) -> Range<usize> {
        let start = 2 * (layer * self.n_kv_heads + kv_head) * self.head_len();
        start..start + self.head_len()
    }

    fn values(&self, layer: usize, kv_head: usize) -> Range<usize> {
        let keys = self.keys(layer, kv_head);
        keys.end..keys.end + self.head_len()
    }

    /// Elements of scratch one worker needs for [`attend`].
    pub fn scores_len(&self) -> usize {
        HEADS * self.positions
    }
}

/// Stores the key and value rows (`n_kv_heads * head_dim` elements each) of position `pos`.
///
/// # Panics
/// When a slice is too short or `pos` is outside the cache.
pub fn store(shape: &KvShape, cache: &mut [f32], layer: usize, pos: usize, k: &[f32], v: &[f32]) {
    assert!(pos < shape.positions, "position {pos} of {}", shape.positions);
    for kv_head in 0..shape.n_kv_heads {
        let head = kv_head * shape.head_dim..(kv_head + 1) * shape.head_dim;
        let keys = &mut cache[shape.keys(layer, kv_head)];
        let panel = &mut keys[pos / PANEL * PANEL * shape.head_dim..][..PANEL * shape.head_dim];
        for (lanes, &k) in panel.chunks_exact_mut(PANEL).zip(&k[head.clone()]) {
            lanes[pos % PANEL] = k;
        }
        let values = &mut cache[shape.values(layer, kv_head)];
        values[pos * shape.head_dim..][..shape.head_dim].copy_from_slice(&v[head]);
    }
}

/// Queries of consecutive positions against one layer of a cache.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// Sizes.
    pub shape: &'a KvShape,
    /// The cache, with the rows' own positions stored.
    pub cache: &'a [f32],
    /// Layer.
    pub layer: usize,
    /// Query rows, `(rows, q_stride)`, of which the first `n_heads * head_dim` columns are used.
    pub q: &'a [f32],
    /// Elements from one query row to the next.
    pub q_stride: usize,
    /// Rows.
    pub rows: usize,
    /// Position of row 0; row `r` sees positions `..=pos + r`.
    pub pos: usize,
}

/// Attention of the query heads `heads`; `out` is `(rows, heads.len() * head_dim)`, `scores` [`KvShape::scores_len`] elements.
///
/// # Panics
/// When a slice is too short or a position is outside the cache.
pub fn attend(level: Level, queries: &Queries<'_>, heads: Range<usize>, mut out: ColumnsMut<'_>, scores: &mut [f32]) {
    let Queries { shape, q, q_stride, rows, pos, .. } = *queries;
    let group = shape.n_heads / shape.n_kv_heads;
    assert!(heads.end <= shape.n_heads && pos + rows <= shape.positions, "{rows} rows from position {pos}");
    for r in 0..rows {
        let (q, out) = (&q[r * q_stride..], out.row(r));
        let positions = pos + r + 1;
        let mut head = heads.start;
        while head < heads.end {
            let kv_head = head / group;
            let count = HEADS.min(heads.end - head).min((kv_head + 1) * group - head);
            let q = &q[head * shape.head_dim..][..count * shape.head_dim];
            let out = &mut out[(head - heads.start) * shape.head_dim..][..count * shape.head_dim];
            let pass = Pass::new(queries, kv_head, positions);
            match (level, count) {
                (Level::Portable, _) => pass.run_portable(q, out, scores),
                (Level::Avx2(avx2), 1) => pass.run_avx2::<1>(avx2, q, out, scores),
                (Level::Avx2(avx2), 2) => pass.run_avx2::<2>(avx2, q, out, scores),
                (Level::Avx2(avx2), _) => pass.run_avx2::<HEADS>(avx2, q, out, scores),
            }
            head += count;
        }
    }
}

/// One pass over the keys and values of a kv head, for one row.
struct Pass<'a> {
    head_dim: usize,
    scale: f32,
    /// Panels that hold the visible positions, `(panels, head_dim, 32)`.
    keys: &'a [f32],
    /// Visible positions, `(positions, head_dim)`.
    values: &'a [f32],
    positions: usize,
    /// Elements from one head's scores to the next's.
    stride: usize,
}

impl<'a> Pass<'a> {
    fn new(queries: &Queries<'a>, kv_head: usize, positions: usize) -> Self {
        let shape = queries.shape;
        let head_dim = shape.head_dim;
        Self {
            head_dim,
            scale: 1.0 / libm::sqrtf(head_dim as f32),
            keys: &queries.cache[shape.keys(queries.layer, kv_head)][..padded(positions) * head_dim],
            values: &queries.cache[shape.values(queries.layer, kv_head)][..positions * head_dim],
            positions,
            stride: shape.positions,
        }
    }

    fn run_portable(&self, q: &[f32], out: &mut [f32], scores: &mut [f32]) {
        for (q, out) in q.chunks_exact(self.head_dim).zip(out.chunks_exact_mut(self.head_dim)) {
            for (panel, scores) in self.keys.chunks_exact(self.head_dim * PANEL).zip(scores.chunks_exact_mut(PANEL)) {
                let mut acc = [0.0f32; PANEL];
                for (keys, &q) in panel.chunks_exact(PANEL).zip(q) {
                    for (acc, &key) in acc.iter_mut().zip(keys) {
                        *acc = Software::fma(key, q, *acc);
                    }
                }
                for (score, acc) in scores.iter_mut().zip(acc) {
                    *score = acc * self.scale;
                }
            }
            let inverse = 1.0 / softmax_numerators(Level::Portable, scores, self.positions);
            out.fill(0.0);
            for (value, &weight) in self.values.chunks_exact(self.head_dim).zip(&*scores) {
                for (out, &value) in out.iter_mut().zip(value) {
                    *out = Software::fma(weight, value, *out);
                }
            }
            out.iter_mut().for_each(|out| *out *= inverse);
        }
    }

    fn run_avx2<const R: usize>(&self, avx2: Avx2, q: &[f32], out: &mut [f32], scores: &mut [f32]) {
        let q: [&[f32]; R] = core::array::from_fn(|r| &q[r * self.head_dim..][..self.head_dim]);
        simd::math::attention_scores(avx2, q, self.keys, self.head_dim, self.scale, scores, self.stride);
        let inverse: [f32; R] = core::array::from_fn(|r| {
            1.0 / softmax_numerators(Level::Avx2(avx2), &mut scores[r * self.stride..][..self.stride], self.positions)
        });
        let mut d = 0;
        while d + 32 <= self.head_dim {
            let (values, scores) = (self.values, &*scores);
            simd::math::attention_values::<R, 4>(avx2, scores, self.stride, values, self.head_dim, d, inverse, out);
            d += 32;
        }
        while d + 8 <= self.head_dim {
            let (values, scores) = (self.values, &*scores);
            simd::math::attention_values::<R, 1>(avx2, scores, self.stride, values, self.head_dim, d, inverse, out);
            d += 8;
        }
        // Head dimensions that are no multiple of 8 are rare: their last elements take the portable way.
        for r in 0..R {
            for d in d..self.head_dim {
                let rows = self.values.chunks_exact(self.head_dim).zip(&scores[r * self.stride..]);
                let sum = rows.fold(0.0, |sum, (value, &weight)| Software::fma(weight, value[d], sum));
                out[r * self.head_dim + d] = sum * inverse[r];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;
    use alloc::vec;
    use alloc::vec::Vec;

    /// Softmax attention in f64, straight from the formula.
    fn naive(q: &[f32], k: &[Vec<f32>], v: &[Vec<f32>]) -> Vec<f64> {
        let dot = |k: &Vec<f32>| q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let scores: Vec<f64> = k.iter().map(|k| dot(k) / (q.len() as f64).sqrt()).collect();
        let max = scores.iter().cloned().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..q.len()).map(|d| weights.iter().zip(v).map(|(w, v)| w * f64::from(v[d])).sum::<f64>() / sum).collect()
    }

    #[test]
    fn attention_is_the_formula_and_the_same_bits_at_every_level_and_split() {
        let cases = [(9, 3, 64, 70), (8, 4, 8, 33), (4, 1, 48, 5), (2, 2, 20, 64), (5, 1, 6, 40), (1, 1, 128, 32)];
        for (n_heads, n_kv_heads, head_dim, positions) in cases {
            let mut rng = SplitMix64::new(head_dim as u64);
            let shape = KvShape { n_layers: 2, n_heads, n_kv_heads, head_dim, positions: padded(positions) };
            let mut cache = vec![f32::NAN; shape.len()];
            // Stale values behind the visible positions must not matter, so they are left as they are: but finite ones
            // stand in the same panel, as after a session was reset.
            cache.iter_mut().for_each(|x| *x = 100.0 * rng.next_bell());
            let mut row = |len: usize| -> Vec<f32> { (0..len).map(|_| 2.0 * rng.next_bell()).collect() };
            let k: Vec<Vec<f32>> = (0..positions).map(|_| row(n_kv_heads * head_dim)).collect();
            let v: Vec<Vec<f32>> = (0..positions).map(|_| row(n_kv_heads * head_dim)).collect();
            for pos in 0..positions {
                store(&shape, &mut cache, 1, pos, &k[pos], &v[pos]);
            }
            let (rows, width) = (3.min(positions), n_heads * head_dim);
            let pos = positions - rows;
            let q = row(rows * width);
            let queries = Queries { shape: &shape, cache: &cache, layer: 1, q: &q, q_stride: width, rows, pos };
            let run = |level: Level, cut: usize| -> Vec<f32> {
                let mut out = vec![0.0; rows * width];
                let mut scores = vec![f32::NAN; shape.scores_len()];
                let partition = crate::dispatch::Partition::even(n_heads, head_dim, cut);
                let shared =
                    crate::dispatch::SharedColumns::new(ColumnsMut::new(&mut out, rows, width, width), &partition);
                for i in 0..cut {
                    let heads = partition.range(i).start / head_dim..partition.range(i).end / head_dim;
                    attend(level, &queries, heads, shared.take(i).unwrap(), &mut scores);
                }
                out
            };
            let portable = run(Level::Portable, 1);
            for cut in [1, 2, 3] {
                let fast = run(Level::detect(), cut);
                assert!(portable.iter().zip(&fast).all(|(a, b)| a.to_bits() == b.to_bits()), "{shape:?} cut {cut}");
            }
            for r in 0..rows {
                for head in 0..n_heads {
                    let kv = head / (n_heads / n_kv_heads) * head_dim;
                    let cut = |rows: &[Vec<f32>]| -> Vec<Vec<f32>> {
                        rows[..=pos + r].iter().map(|row| row[kv..kv + head_dim].to_vec()).collect()
                    };
                    let at = r * width + head * head_dim;
                    let want = naive(&q[at..at + head_dim], &cut(&k), &cut(&v));
                    for (d, want) in want.iter().enumerate() {
                        let got = f64::from(portable[at + d]);
                        assert!((got - want).abs() < 2e-5, "{shape:?} row {r} head {head} [{d}]: {got} {want}");
                    }
                }
            }
        }
    }
}
