//! The KV cache and grouped-query attention over it.
//!
//! Each kv head's keys and values lie in blocks of [`KV_BLOCK`] positions, a block's values behind its keys, so that a
//! pass over the context is one sequential read. Keys stand in panels of [`KV_PANEL`] positions with the head dimension
//! running slowest, so a score's lane is its position; values stand row by row, so an output's lane is its element:
//! neither product needs a horizontal sum. Blocks are computed on their own and joined in ascending order
//! (`model::numerics`), so every level, every number of workers and every split of the work gives the same bits.
//!
//! One token's attention is shared between workers by blocks ([`attend`] then joins their partial results); that of
//! several rows by rows.

use crate::dispatch::{self, ColumnsMut, Partition, SharedColumns};
use crate::math::exp_with;
use crate::reference::{ScalarArithmetic, Software};
use crate::simd::{self, Level};
use crate::workers::{self, Workers};
use core::ops::Range;
use half::f16;
use model::layout::{KV_BLOCK, KV_PANEL};
use model::numerics::REDUCE_LANES;
use model::{ModelDescription, TensorType};

/// Multiply-adds below which attention is not worth waking the other workers.
const PARALLEL: usize = 1 << 17;

/// Queries that can share the loads of a block in one pass.
pub(crate) const MAX_TILE: usize = 12;

/// Type of the elements of a KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvType {
    /// As computed.
    F32,
    /// Rounded to nearest even, magnitudes above 65504 clamped.
    F16,
    /// int8 with one f32 scale for each position and head.
    Q8_0,
}

impl KvType {
    /// The type that does a model's weights justice: f32 where they are unrounded, else f16.
    pub fn for_model(model: &ModelDescription) -> KvType {
        let unrounded = |ty| matches!(ty, TensorType::F32 | TensorType::BF16);
        let matrices = model.tensors.iter().filter(|tensor| !tensor.role.is_vector());
        if matrices.into_iter().all(|tensor| unrounded(tensor.ty)) { KvType::F32 } else { KvType::F16 }
    }

    /// Short name.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Q8_0 => "q8_0",
        }
    }

    const fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 => 2,
            KvType::Q8_0 => 1,
        }
    }

    /// Bytes of a block's key scales, or value scales.
    const fn scales_bytes(self) -> usize {
        match self {
            KvType::F32 | KvType::F16 => 0,
            KvType::Q8_0 => KV_BLOCK * size_of::<f32>(),
        }
    }
}

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
    /// Blocks of [`KV_BLOCK`] positions.
    pub blocks: usize,
    /// Type of the elements.
    pub ty: KvType,
}

impl KvShape {
    /// Bytes of the whole cache.
    pub fn len_bytes(&self) -> usize {
        self.n_layers * self.n_kv_heads * self.blocks * self.block_bytes()
    }

    /// Positions it has room for.
    pub fn positions(&self) -> usize {
        self.blocks * KV_BLOCK
    }

    /// f32 elements of scratch that [`attend`] needs.
    pub fn partials_len(&self) -> usize {
        self.n_kv_heads * self.blocks * self.partial_len()
    }

    /// Query heads of one kv head.
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Bytes of one block of one kv head: keys, values, key scales, value scales.
    fn block_bytes(&self) -> usize {
        2 * KV_BLOCK * self.head_dim * self.ty.bytes() + 2 * self.ty.scales_bytes()
    }

    /// Elements of what [`attend_blocks`] leaves of one block for one kv head: for each query head the sum of values,
    /// then for each query head the largest score and the sum of the numerators; whole cache lines.
    fn partial_len(&self) -> usize {
        (self.group() * (self.head_dim + 2)).next_multiple_of(16)
    }

    /// The same positions of all layers lie together, so that a short context touches little memory: the first touch of a
    /// large page costs more than a token.
    fn block_range(&self, layer: usize, kv_head: usize, block: usize) -> Range<usize> {
        let start = ((block * self.n_layers + layer) * self.n_kv_heads + kv_head) * self.block_bytes();
        start..start + self.block_bytes()
    }

    fn block<'a>(&self, cache: &'a [u8], layer: usize, kv_head: usize, block: usize) -> Block<'a> {
        let half = KV_BLOCK * self.head_dim * self.ty.bytes();
        let (keys, rest) = cache[self.block_range(layer, kv_head, block)].split_at(half);
        let (values, scales) = rest.split_at(half);
        let (key_scales, value_scales) = scales.split_at(self.ty.scales_bytes());
        Block { ty: self.ty, head_dim: self.head_dim, keys, values, key_scales, value_scales, next_keys: keys }
    }
}

/// One block of one kv head's cache.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub ty: KvType,
    pub head_dim: usize,
    /// `(KV_BLOCK / KV_PANEL, head_dim, KV_PANEL)`.
    pub keys: &'a [u8],
    /// `(KV_BLOCK, head_dim)`.
    pub values: &'a [u8],
    /// `(KV_BLOCK)` f32 for `Q8_0`, else empty.
    pub key_scales: &'a [u8],
    /// As `key_scales`.
    pub value_scales: &'a [u8],
    /// Keys of the block that is read next; its own where there is none.
    pub next_keys: &'a [u8],
}

impl Block<'_> {
    fn element<F: ScalarArithmetic>(&self, bytes: &[u8], index: usize) -> f32 {
        match self.ty {
            KvType::F32 => f32_at(bytes, index),
            KvType::F16 => F::half([bytes[2 * index], bytes[2 * index + 1]]),
            KvType::Q8_0 => f32::from(bytes[index].cast_signed()),
        }
    }
}

fn f32_at(bytes: &[u8], index: usize) -> f32 {
    f32::from_le_bytes(crate::pack::field(bytes, 4 * index))
}

/// Keys and values of consecutive positions.
#[derive(Clone, Copy)]
pub struct KeysValues<'a> {
    /// Position of row 0.
    pub pos: usize,
    /// Rows.
    pub rows: usize,
    /// Key rows, `(rows, stride)`, of which the first `n_kv_heads * head_dim` columns are used.
    pub k: &'a [f32],
    /// Value rows, as `k`.
    pub v: &'a [f32],
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a> KeysValues<'a> {
    /// Key and value of one head of `row`.
    fn head(&self, row: usize, kv_head: usize, head_dim: usize) -> (&'a [f32], &'a [f32]) {
        let at = row * self.stride + kv_head * head_dim;
        (&self.k[at..][..head_dim], &self.v[at..][..head_dim])
    }
}

/// Stores keys and values in `layer` of a cache.
///
/// # Panics
/// When a slice is too short or a position is outside the cache.
pub fn store(level: Level, shape: &KvShape, cache: &mut [u8], layer: usize, new: &KeysValues<'_>) {
    let KeysValues { pos, rows, .. } = *new;
    assert!(pos + rows <= shape.positions(), "{rows} rows from position {pos} of {}", shape.positions());
    // Head by head: a panel of one stays in the first-level cache, those of all need not.
    for kv_head in 0..shape.n_kv_heads {
        for row in 0..rows {
            let block = &mut cache[shape.block_range(layer, kv_head, (pos + row) / KV_BLOCK)];
            let (at, head) = ((pos + row) % KV_BLOCK, new.head(row, kv_head, shape.head_dim));
            match shape.ty {
                KvType::F32 => store_head::<4>(level, shape, block, at, head),
                KvType::F16 => store_head::<2>(level, shape, block, at, head),
                KvType::Q8_0 => store_head::<1>(level, shape, block, at, head),
            }
        }
    }
}

/// Stores key and value of one head at position `at` of its block, in elements of `BYTES` bytes.
fn store_head<const BYTES: usize>(
    level: Level,
    shape: &KvShape,
    block: &mut [u8],
    at: usize,
    (key, value): (&[f32], &[f32]),
) {
    let row_bytes = shape.head_dim * BYTES;
    let (keys, rest) = block.split_at_mut(KV_BLOCK * row_bytes);
    let (values, scales) = rest.split_at_mut(KV_BLOCK * row_bytes);
    let panel = &mut keys[at / KV_PANEL * KV_PANEL * row_bytes..][..KV_PANEL * row_bytes];
    if at.is_multiple_of(KV_PANEL) {
        // Lanes of positions to come are computed with and thrown away: whatever they hold must be finite.
        panel.fill(0);
    }
    let (mut key_scale, mut value_scale) = (0.0, 0.0);
    if shape.ty == KvType::Q8_0 {
        (key_scale, value_scale) = (int8_scale(key), int8_scale(value));
        let (key_scales, value_scales) = scales.split_at_mut(shape.ty.scales_bytes());
        if at.is_multiple_of(KV_PANEL) {
            key_scales[4 * at..4 * (at + KV_PANEL)].fill(0);
        }
        key_scales[4 * at..4 * at + 4].copy_from_slice(&key_scale.to_le_bytes());
        value_scales[4 * at..4 * at + 4].copy_from_slice(&value_scale.to_le_bytes());
    }
    // The lane of this position runs through the panel: converted a piece at a time, then scattered.
    let mut piece = [0u8; 64 * size_of::<f32>()];
    for (lines, key) in panel.chunks_mut(64 * KV_PANEL * BYTES).zip(key.chunks(64)) {
        let piece = &mut piece[..key.len() * BYTES];
        narrow(level, shape.ty, key, key_scale, piece);
        for (line, element) in
            lines.as_chunks_mut::<BYTES>().0.chunks_exact_mut(KV_PANEL).zip(piece.as_chunks::<BYTES>().0)
        {
            line[at % KV_PANEL] = *element;
        }
    }
    narrow(level, shape.ty, value, value_scale, &mut values[at * row_bytes..][..row_bytes]);
}

/// Asks for the memory that [`store`] will write for `pos`. Keys of one position are strided over as many cache lines as a head
/// has elements, and by the next token all have left the caches: one by one, each costs a trip to memory. What [`attend`] reads
/// besides lies line after line, and is not faster asked for here.
///
/// # Panics
/// When `pos` is outside the cache.
pub fn fetch(shape: &KvShape, cache: &[u8], layer: usize, pos: usize) {
    let at = pos % KV_BLOCK;
    let row_bytes = shape.head_dim * shape.ty.bytes();
    let panel = at / KV_PANEL * KV_PANEL * row_bytes;
    for kv_head in 0..shape.n_kv_heads {
        let block = shape.block(cache, layer, kv_head, pos / KV_BLOCK);
        simd::fetch(&block.keys[panel..panel + KV_PANEL * row_bytes]);
        simd::fetch(&block.values[at * row_bytes..(at + 1) * row_bytes]);
    }
}

/// `max |x| / 127`.
fn int8_scale(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |max, x| if x.abs() > max { x.abs() } else { max }) / 127.0
}

/// Elements of `x` as the cache holds them; `scale` is [`int8_scale`] of the head they belong to.
fn narrow(level: Level, ty: KvType, x: &[f32], scale: f32, out: &mut [u8]) {
    match ty {
        KvType::F32 => {
            for (out, x) in out.chunks_exact_mut(4).zip(x) {
                out.copy_from_slice(&x.to_le_bytes());
            }
        }
        KvType::F16 => {
            let done = match level.avx2() {
                None => 0,
                Some(avx2) => simd::attention::to_f16(avx2, x, out),
            };
            for (out, &x) in out[2 * done..].chunks_exact_mut(2).zip(&x[done..]) {
                let clamped = if x.abs() > 65504.0 { f32::copysign(65504.0, x) } else { x };
                out.copy_from_slice(&f16::from_f32(clamped).to_le_bytes());
            }
        }
        KvType::Q8_0 => {
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            let done = match level.avx2() {
                None => 0,
                Some(avx2) => simd::attention::to_int8(avx2, x, inverse, out),
            };
            for (out, &x) in out[done..].iter_mut().zip(&x[done..]) {
                let q = libm::rintf(x * inverse);
                // As the saturating packs: NaN and what is out of range become the lowest value.
                let q = if (-127.0..=2_147_483_520.0).contains(&q) { q.min(127.0) as i8 } else { -127 };
                *out = q.cast_unsigned();
            }
        }
    }
}

/// Queries of consecutive positions against one layer of a cache.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// Sizes.
    pub shape: &'a KvShape,
    /// The cache, with the rows' own positions stored; 64-byte aligned.
    pub cache: &'a [u8],
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
    /// Positions a row sees at most, its own included (sliding-window attention); `usize::MAX` for all.
    pub window: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl Queries<'_> {
    /// Positions that row `r` sees.
    fn visible(&self, r: usize) -> Range<usize> {
        let end = self.pos + r + 1;
        end.saturating_sub(self.window.max(1))..end
    }

    /// Block `block` of a kv head, with the one that is read next where each kv head's blocks in the range are read once, in ascending
    /// order. Rows of a prompt read them several times: for them the guess is right but for the last block.
    fn block(&self, kv_head: usize, block: usize, Range { start, end }: Range<usize>) -> Block<'_> {
        let of = |kv_head, block| self.shape.block(self.cache, self.layer, kv_head, block);
        let (next_head, next) = if block + 1 < end { (kv_head, block + 1) } else { (kv_head + 1, start) };
        let this = of(kv_head, block);
        if next_head < self.shape.n_kv_heads { Block { next_keys: of(next_head, next).keys, ..this } } else { this }
    }

    /// Blocks that row `r` sees something of.
    fn blocks(&self, r: usize) -> Range<usize> {
        let Range { start, end } = self.visible(r);
        start / KV_BLOCK..end.div_ceil(KV_BLOCK)
    }
}

/// The part of `block` that is among the positions `visible`, from its start.
fn inside(block: usize, visible: &Range<usize>) -> Range<usize> {
    let start = block * KV_BLOCK;
    visible.start.saturating_sub(start).min(KV_BLOCK)..visible.end.saturating_sub(start).min(KV_BLOCK)
}

/// Attention of all rows and heads, on up to `parts` workers; `out` is `(rows, n_heads * head_dim)`, `partials`
/// [`KvShape::partials_len`] elements.
///
/// # Panics
/// When a slice is too short or a position is outside the cache.
pub fn attend(
    level: Level,
    queries: &Queries<'_>,
    workers: &dyn Workers,
    parts: usize,
    out: &mut [f32],
    partials: &mut [f32],
) {
    let Queries { shape, rows, pos, .. } = *queries;
    let q_dim = shape.n_heads * shape.head_dim;
    assert!(rows > 0 && pos + rows <= shape.positions(), "{rows} rows from position {pos}");
    let seen = queries.visible(rows - 1).len();
    if parts == 1 || rows * seen * 2 * q_dim < PARALLEL {
        return attend_rows(level, queries, 0..rows, &mut out[..rows * q_dim]);
    }
    if rows > 1 {
        return dispatch::for_rows(workers, parts, &mut out[..rows * q_dim], q_dim, &|rows, out| {
            attend_rows(level, queries, rows, out);
        });
    }
    let (blocks, len) = (queries.blocks(0).len(), shape.partial_len());
    let units = shape.n_kv_heads * blocks;
    let cut = Partition::even(units, len, parts);
    let shared = SharedColumns::new(ColumnsMut::new(partials, 1, units * len, units * len), &cut);
    workers::for_parts(workers, parts, &|part| {
        let Some(mut partials) = shared.take(part) else { return };
        let columns = cut.range(part);
        attend_blocks(level, queries, columns.start / len..columns.end / len, partials.row(0));
    });
    join_blocks(level, shape, blocks, partials, &mut out[..q_dim]);
}

/// What a query has taken in over its blocks so far.
#[derive(Clone, Copy)]
pub(crate) struct Running {
    /// Largest score.
    pub max: f32,
    /// Sum of the numerators, relative to `max`.
    pub sum: f32,
    /// Nothing was taken in yet.
    pub empty: bool,
}

impl Running {
    const EMPTY: Running = Running { max: 0.0, sum: 0.0, empty: true };

    /// Takes in a block's largest score and sum, and returns by what to multiply the values' sum so far and the block's;
    /// `None` when this is the first.
    #[inline(always)]
    pub(crate) fn join<F: ScalarArithmetic>(&mut self, max: f32, sum: f32) -> Option<(f32, f32)> {
        if self.empty {
            *self = Running { max, sum, empty: false };
            return None;
        }
        let top = if max > self.max { max } else { self.max };
        let (old, new) = (exp_with::<F>(self.max - top), exp_with::<F>(max - top));
        *self = Running { max: top, sum: F::fma(new, sum, old * self.sum), empty: false };
        Some((old, new))
    }
}

/// Up to [`MAX_TILE`] queries.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// Query rows of all tiles.
    pub q: &'a [f32],
    /// Where each query starts in `q`.
    pub q_at: [usize; MAX_TILE],
    /// Where each query's output starts.
    pub out_at: [usize; MAX_TILE],
    pub scale: f32,
}

/// The positions of a block that queries of a tile see.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    /// The first, of all of them.
    pub start: usize,
    /// Behind the last, of each; above `start`.
    pub ends: [usize; MAX_TILE],
}

/// Attention of `rows`, all heads; `out` is `(rows.len(), n_heads * head_dim)`.
fn attend_rows(level: Level, queries: &Queries<'_>, rows: Range<usize>, out: &mut [f32]) {
    let shape = queries.shape;
    let (group, head_dim) = (shape.group(), shape.head_dim);
    // Heads of one row that share a tile, and rows of a tile.
    let heads = group.min(MAX_TILE);
    let tile_rows = MAX_TILE / heads;
    for kv_head in 0..shape.n_kv_heads {
        for first_head in (kv_head * group..(kv_head + 1) * group).step_by(heads) {
            let heads = heads.min((kv_head + 1) * group - first_head);
            for start in rows.clone().step_by(tile_rows) {
                let tile_rows = start..rows.end.min(start + tile_rows);
                let mut tile = Tile { q: queries.q, q_at: [0; MAX_TILE], out_at: [0; MAX_TILE], scale: queries.scale };
                let mut count = 0;
                for row in tile_rows.clone() {
                    for head in first_head..first_head + heads {
                        tile.q_at[count] = row * queries.q_stride + head * head_dim;
                        tile.out_at[count] = ((row - rows.start) * shape.n_heads + head) * head_dim;
                        count += 1;
                    }
                }
                let mut running = [Running::EMPTY; MAX_TILE];
                let blocks = queries.blocks(start).start..queries.blocks(tile_rows.end - 1).end;
                for block in blocks.clone() {
                    let data = queries.block(kv_head, block, blocks.clone());
                    let seen = |row| inside(block, &queries.visible(row));
                    // Rows share a pass that see the block from the same position on: all of them but at the edge of a window.
                    let mut rows = tile_rows.clone();
                    while let Some(first) = rows.find(|row| !seen(*row).is_empty()) {
                        let start = seen(first).start;
                        let together =
                            rows.clone().take_while(|row| seen(*row).start == start && !seen(*row).is_empty());
                        let next = first + 1 + together.count();
                        let mut ends = [0; MAX_TILE];
                        let which = (first - tile_rows.start) * heads..(next - tile_rows.start) * heads;
                        for i in which.clone() {
                            ends[i] = seen(tile_rows.start + i / heads).end;
                        }
                        pass(level, &data, &Seen { start, ends }, &tile, which, &mut running, out);
                        rows = next..tile_rows.end;
                    }
                }
                for (at, running) in tile.out_at.iter().zip(&running).take(count) {
                    let inverse = 1.0 / running.sum;
                    out[*at..*at + head_dim].iter_mut().for_each(|out| *out *= inverse);
                }
            }
        }
    }
}

/// The partial results of row 0 in `units`, which count the blocks it sees of kv head 0, then of the next.
fn attend_blocks(level: Level, queries: &Queries<'_>, units: Range<usize>, partials: &mut [f32]) {
    let shape = queries.shape;
    let (group, head_dim, len) = (shape.group(), shape.head_dim, shape.partial_len());
    let (visible, blocks) = (queries.visible(0), queries.blocks(0));
    for (unit, partial) in units.zip(partials.chunks_exact_mut(len)) {
        let (kv_head, block) = (unit / blocks.len(), blocks.start + unit % blocks.len());
        let data = queries.block(kv_head, block, blocks.clone());
        for first in (0..group).step_by(MAX_TILE) {
            let count = MAX_TILE.min(group - first);
            let mut tile = Tile { q: queries.q, q_at: [0; MAX_TILE], out_at: [0; MAX_TILE], scale: queries.scale };
            for i in 0..count {
                tile.q_at[i] = (kv_head * group + first + i) * head_dim;
                tile.out_at[i] = (first + i) * head_dim;
            }
            let mut running = [Running::EMPTY; MAX_TILE];
            let Range { start, end } = inside(block, &visible);
            pass(level, &data, &Seen { start, ends: [end; MAX_TILE] }, &tile, 0..count, &mut running, partial);
            for (i, running) in running.iter().take(count).enumerate() {
                let at = group * head_dim + 2 * (first + i);
                (partial[at], partial[at + 1]) = (running.max, running.sum);
            }
        }
    }
}

/// Joins what [`attend_blocks`] left: `partials` is `(n_kv_heads, blocks, partial_len)`, `out` `(n_heads, head_dim)`.
fn join_blocks(level: Level, shape: &KvShape, blocks: usize, partials: &[f32], out: &mut [f32]) {
    let (group, head_dim, len) = (shape.group(), shape.head_dim, shape.partial_len());
    for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let (kv_head, i) = (head / group, head % group);
        let mut running = Running::EMPTY;
        for partial in partials[kv_head * blocks * len..].chunks_exact(len).take(blocks) {
            let (sums, rest) = partial.split_at(group * head_dim);
            let (values, max, sum) = (&sums[i * head_dim..][..head_dim], rest[2 * i], rest[2 * i + 1]);
            match level.avx2() {
                None => join::<Software>(&mut running, max, sum, values, out),
                Some(avx2) => simd::attention::join(avx2, &mut running, max, sum, values, out),
            }
        }
        let inverse = 1.0 / running.sum;
        out.iter_mut().for_each(|out| *out *= inverse);
    }
}

/// Joins one block's sums to `running` and `out`.
#[inline(always)]
pub(crate) fn join<F: ScalarArithmetic>(running: &mut Running, max: f32, sum: f32, values: &[f32], out: &mut [f32]) {
    match running.join::<F>(max, sum) {
        None => out.copy_from_slice(values),
        Some((old, new)) => {
            for (out, &value) in out.iter_mut().zip(values) {
                *out = F::fma(new, value, old * *out);
            }
        }
    }
}

/// Takes what they see of a block into the queries `which` of a tile.
fn pass(
    level: Level,
    block: &Block<'_>,
    seen: &Seen,
    tile: &Tile<'_>,
    which: Range<usize>,
    running: &mut [Running; MAX_TILE],
    out: &mut [f32],
) {
    if let Some(avx2) = level.avx2()
        && block.head_dim.is_multiple_of(8)
    {
        return simd::attention::pass(avx2, block, seen, tile, which, running, out);
    }
    // Head dimensions that are no multiple of 8 are rare: they take the portable way everywhere.
    for i in which {
        let q = &tile.q[tile.q_at[i]..][..block.head_dim];
        let out = &mut out[tile.out_at[i]..][..block.head_dim];
        portable_pass(block, seen.start..seen.ends[i], q, tile.scale, &mut running[i], out);
    }
}

fn portable_pass(
    block: &Block<'_>,
    visible: Range<usize>,
    q: &[f32],
    scale: f32,
    running: &mut Running,
    out: &mut [f32],
) {
    let head_dim = block.head_dim;
    let mut weights = [0.0f32; KV_BLOCK];
    for pos in visible.clone() {
        let key = |d: usize| (pos / KV_PANEL * head_dim + d) * KV_PANEL + pos % KV_PANEL;
        let dot = q
            .iter()
            .enumerate()
            .fold(0.0, |sum, (d, &q)| Software::fma(block.element::<Software>(block.keys, key(d)), q, sum));
        let dot = if block.ty == KvType::Q8_0 { dot * f32_at(block.key_scales, pos) } else { dot };
        weights[pos] = dot * scale;
    }
    let max = weights[visible.clone()].iter().fold(f32::NEG_INFINITY, |max, &s| if s > max { s } else { max });
    let mut lanes = [0.0f32; REDUCE_LANES];
    for pos in visible.clone() {
        weights[pos] = exp_with::<Software>(weights[pos] - max);
        lanes[pos % REDUCE_LANES] += weights[pos];
        if block.ty == KvType::Q8_0 {
            weights[pos] *= f32_at(block.value_scales, pos);
        }
    }
    let factors = running.join::<Software>(max, crate::math::fold_halves(lanes));
    for (d, out) in out.iter_mut().enumerate() {
        let sum = visible.clone().fold(0.0, |sum, pos| {
            Software::fma(weights[pos], block.element::<Software>(block.values, pos * head_dim + d), sum)
        });
        *out = match factors {
            None => sum,
            Some((old, new)) => Software::fma(new, sum, old * *out),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operands::AlignedBytes;
    use crate::random::SplitMix64;
    use crate::workers::Single;
    use alloc::vec;
    use alloc::vec::Vec;
    use model::Isa;

    /// Workers that take turns.
    struct Turns(usize);

    impl Workers for Turns {
        fn count(&self) -> usize {
            self.0
        }

        fn run(&self, job: &(dyn Fn(usize) + Sync)) {
            (0..self.0).rev().for_each(job);
        }
    }

    /// Softmax attention in f64, straight from the formula.
    fn naive(q: &[f32], k: &[Vec<f32>], v: &[Vec<f32>], scale: f32) -> Vec<f64> {
        let dot = |k: &Vec<f32>| q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let scores: Vec<f64> = k.iter().map(|k| dot(k) * f64::from(scale)).collect();
        let max = scores.iter().cloned().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..q.len()).map(|d| weights.iter().zip(v).map(|(w, v)| w * f64::from(v[d])).sum::<f64>() / sum).collect()
    }

    /// `x` as the cache gives it back.
    fn stored(ty: KvType, x: &[f32]) -> Vec<f32> {
        let scale = int8_scale(x);
        let mut bytes = vec![0u8; x.len() * ty.bytes()];
        narrow(Level::Portable, ty, x, scale, &mut bytes);
        let block = Block {
            ty,
            head_dim: x.len(),
            keys: &bytes,
            values: &[],
            key_scales: &[],
            value_scales: &[],
            next_keys: &[],
        };
        let factor = if ty == KvType::Q8_0 { scale } else { 1.0 };
        (0..x.len()).map(|i| factor * block.element::<Software>(&bytes, i)).collect()
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn a_block_knows_which_is_read_next() {
        let shape = KvShape { n_layers: 2, n_heads: 4, n_kv_heads: 2, head_dim: 8, blocks: 4, ty: KvType::Q8_0 };
        let cache = vec![0u8; shape.len_bytes()];
        // Sees the last row of block 1, block 2, and the first of block 3.
        let queries = Queries {
            shape: &shape,
            cache: &cache,
            layer: 1,
            q: &[],
            q_stride: 0,
            rows: 1,
            pos: 3 * KV_BLOCK,
            window: KV_BLOCK + 2,
            scale: 1.0,
        };
        assert_eq!(queries.blocks(0), 1..4);
        let order = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)];
        let blocks = order.map(|(kv_head, block)| queries.block(kv_head, block, queries.blocks(0)));
        for (this, next) in blocks.iter().zip(&blocks[1..]) {
            assert_eq!(this.next_keys.as_ptr(), next.keys.as_ptr());
        }
        assert_eq!(blocks[5].next_keys.as_ptr(), blocks[5].keys.as_ptr());
    }

    #[test]
    fn attention_is_the_formula_and_the_same_bits_at_every_level_and_split() {
        // Heads, kv heads, head dimension, positions, rows, window.
        let cases = [
            (9, 3, 64, 300usize, 7, usize::MAX),
            (9, 3, 64, 300, 1, usize::MAX),
            (8, 4, 8, 33, 3, usize::MAX),
            (4, 1, 48, 5, 5, usize::MAX),
            (2, 2, 20, 64, 1, usize::MAX),
            (5, 1, 6, 140, 3, usize::MAX),
            (1, 1, 128, 257, 2, usize::MAX),
            (14, 1, 16, 200, 4, usize::MAX),
            (28, 2, 80, 129, 1, usize::MAX),
            (12, 12, 64, 260, 14, usize::MAX),
            (4, 2, 96, 390, 9, 100),
            (6, 2, 32, 390, 1, 130),
            (4, 4, 24, 300, 20, 1),
        ];
        for (case, (n_heads, n_kv_heads, head_dim, positions, rows, window)) in cases.into_iter().enumerate() {
            for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
                let mut rng = SplitMix64::new(case as u64);
                let blocks = positions.div_ceil(KV_BLOCK) + 1;
                let shape = KvShape { n_layers: 2, n_heads, n_kv_heads, head_dim, blocks, ty };
                let mut cache = AlignedBytes::zeroed(shape.len_bytes());
                // What lies behind the visible positions must not matter, whatever it is.
                cache.fill(0x7f);
                let mut row = |len: usize| -> Vec<f32> { (0..len).map(|_| 2.0 * rng.next_bell()).collect() };
                let k: Vec<Vec<f32>> = (0..positions).map(|_| row(n_kv_heads * head_dim)).collect();
                let v: Vec<Vec<f32>> = (0..positions).map(|_| row(n_kv_heads * head_dim)).collect();
                let mut portable_cache = AlignedBytes::copy_of(&cache);
                for pos in 0..positions {
                    let new = KeysValues { pos, rows: 1, k: &k[pos], v: &v[pos], stride: 0 };
                    store(Level::Portable, &shape, &mut portable_cache, 1, &new);
                }
                // The same in runs that end anywhere in a panel.
                let (all_k, all_v, stride) = (k.concat(), v.concat(), n_kv_heads * head_dim);
                let (mut pos, mut run) = (0, 1);
                while pos < positions {
                    let rows = run.min(positions - pos);
                    let (k, v) = (&all_k[pos * stride..], &all_v[pos * stride..]);
                    store(Level::detect(), &shape, &mut cache, 1, &KeysValues { pos, rows, k, v, stride });
                    (pos, run) = (pos + rows, 3 * run + 2);
                }
                assert!(*cache == *portable_cache, "{shape:?}: stored bytes");
                let width = n_heads * head_dim;
                let (pos, scale) = (positions - rows, 1.0 / (head_dim as f32).sqrt());
                let q = row(rows * width);
                let queries = Queries {
                    shape: &shape,
                    cache: &cache,
                    layer: 1,
                    q: &q,
                    q_stride: width,
                    rows,
                    pos,
                    window,
                    scale,
                };
                let run = |level: Level, workers: &dyn Workers, parts: usize| -> Vec<f32> {
                    let mut out = vec![f32::NAN; rows * width];
                    let mut partials = vec![f32::NAN; shape.partials_len()];
                    attend(level, &queries, workers, parts, &mut out, &mut partials);
                    out
                };
                let portable = run(Level::Portable, &Single, 1);
                for level in
                    [Level::Portable, Level::detect(), Level::new(Isa { avx512: false, ..crate::isa::detect() })]
                {
                    for (workers, parts) in [(1, 1), (2, 2), (3, 3), (2, 5)] {
                        let got = run(level, &Turns(workers), parts);
                        assert!(bits(&portable) == bits(&got), "{shape:?} {level:?} {parts} parts on {workers}");
                    }
                }
                // Rows on their own are the same rows.
                for r in [0, rows - 1] {
                    let alone = Queries { q: &q[r * width..], rows: 1, pos: pos + r, ..queries };
                    let mut out = vec![f32::NAN; width];
                    let mut partials = vec![f32::NAN; shape.partials_len()];
                    attend(Level::detect(), &alone, &Turns(2), 2, &mut out, &mut partials);
                    assert!(bits(&out) == bits(&portable[r * width..][..width]), "{shape:?} row {r}");
                }
                for r in 0..rows {
                    for head in 0..n_heads {
                        let kv = head / (n_heads / n_kv_heads) * head_dim;
                        let end = pos + r + 1;
                        let cut = |rows: &[Vec<f32>]| -> Vec<Vec<f32>> {
                            let seen = &rows[end.saturating_sub(window)..end];
                            seen.iter().map(|row| stored(ty, &row[kv..kv + head_dim])).collect()
                        };
                        let at = r * width + head * head_dim;
                        let want = naive(&q[at..at + head_dim], &cut(&k), &cut(&v), scale);
                        for (d, want) in want.iter().enumerate() {
                            let got = f64::from(portable[at + d]);
                            assert!((got - want).abs() < 2e-5, "{shape:?} row {r} head {head} [{d}]: {got} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn elements_round_to_nearest_even_and_saturate() {
        let x = [1.0, 1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, -2e9, 65519.0, 65520.0, 6e-8, f32::NEG_INFINITY, 3e-8];
        for level in [Level::Portable, Level::detect()] {
            let mut bytes = [0u8; 18];
            narrow(level, KvType::F16, &x, 0.0, &mut bytes);
            let got: Vec<f32> =
                bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32_const()).collect();
            let tiny = f16::from_bits(1).to_f32_const();
            let want = [1.0, 1.0, 1.0 + 4.0 / 2048.0, -65504.0, 65504.0, 65504.0, tiny, -65504.0, tiny];
            assert_eq!(got, want);
        }
        assert_eq!(stored(KvType::Q8_0, &[127.0, 0.5, 1.5, -2.5]), [127.0, 0.0, 2.0, -2.0]);
        assert_eq!(stored(KvType::Q8_0, &[0.0; 8]), [0.0; 8]);
    }
}
