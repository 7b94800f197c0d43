//! The forward pass of every architecture: tokens in, logits of the last one out.
//!
//! Key types: [`Engine`] (weights, kernel table, rope angles) and [`Session`] (one context: KV cache, position, buffers).
//! A prompt runs in chunks of up to 64 rows; a chunk runs in the smallest batch bucket that holds it, whose kernels stop
//! behind its last row: what the rows of a buffer behind it hold is never read as a result. Several chunks go through a layer
//! one after the other before the next layer, which then finds its weights in a
//! cache for all but the first. Every row is computed on its own, so neither the chunks nor the bucket show in the result.

use crate::attention::{self, KeysValues, KvShape, KvType, Queries};
use crate::dispatch::{self, ColumnsMut};
use crate::error::EngineError;
use crate::loader::LoadedModel;
use crate::math::{RopeTable, activate, layernorm, quantise_activations, rmsnorm, rmsnorm_quantise, rope};
use crate::operands::AlignedBytes;
use crate::ops::HAS_BASELINE;
use crate::pack::{dequantise_column, field};
use crate::simd::{Level, cycles};
use crate::table::{KernelTable, OpCall, Runs, Tier};
use crate::weights::{Embedding, NormWeights, Plan, QkvWeights, RopeParameters, UpWeights, Vector};
use crate::workers::Workers;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use model::Isa;
use model::architecture::Positions;
use model::kernel::{DType, KernelKey, M_BUCKETS, Op};
use model::layout::{KV_BLOCK, PANEL, WEIGHT_ALIGN, padded, x_row_bytes};
use model::{Config, Role};
use profiler::{Part, PartTimes};
use zerocopy::{FromBytes, IntoBytes};

/// Rows of the largest batch bucket.
const MAX_ROWS: usize = M_BUCKETS[M_BUCKETS.len() - 1] as usize;

/// Chunks that go through each layer together. More would save little: the first of four pays a quarter of the reading.
const GROUP: usize = 4;

/// Consecutive tokens that run in one batch bucket.
#[derive(Clone, Copy, Default, Debug)]
struct Chunk {
    /// Their first row of `Buffers::x`.
    first: usize,
    /// How many they are, at most the bucket's rows.
    rows: usize,
    /// Index into `M_BUCKETS`.
    bucket: usize,
    /// Position of the first.
    pos: usize,
}

impl Chunk {
    /// Rows of the bucket.
    fn m(&self) -> usize {
        M_BUCKETS[self.bucket] as usize
    }

    /// Its rows from `row` on, as far as a layer can leave the others out, and how many are left out: all, all but the last
    /// where `single` rows run in a bucket of their own (the spare rows of another would be rows of the next chunk), or none.
    fn without_rows_before(&self, row: usize, single: bool) -> (usize, Chunk) {
        match self.rows.saturating_sub(row) {
            0 => (self.rows, Chunk { rows: 0, ..*self }),
            1 if single => {
                let left_out = self.rows - 1;
                (left_out, Chunk { first: self.first + left_out, rows: 1, bucket: 0, pos: self.pos + left_out })
            }
            _ => (0, *self),
        }
    }

    /// What products run on.
    fn batch(&self) -> Batch {
        Batch { bucket: self.bucket, rows: self.rows }
    }

    /// Its part of `x`, of rows of `stride` elements.
    fn of<'a>(&self, x: &'a mut [f32], stride: usize) -> &'a mut [f32] {
        &mut x[self.first * stride..(self.first + self.m()) * stride]
    }
}

/// Rows of one product.
#[derive(Clone, Copy)]
struct Batch {
    /// Index into `M_BUCKETS`.
    bucket: usize,
    /// How many of the bucket's rows are wanted, from the first on.
    rows: usize,
}

/// A model ready to run.
#[derive(Debug)]
pub struct Engine<'w> {
    pub(crate) plan: Plan,
    /// The arena from its first aligned byte.
    pub(crate) weights: &'w [u8],
    /// Norms, biases and rotary divisors.
    vectors: Vec<f32>,
    pub(crate) table: KernelTable,
    /// One for each of `Plan::ropes`.
    ropes: Vec<RopeTable>,
    /// For each slot, the activations of the first op that ran in it: inputs to verify and time kernels on.
    pub(crate) captured: Vec<Option<AlignedBytes>>,
    pub(crate) replay: crate::replay::Scratch,
    pub(crate) verify: crate::verify::Cases,
    /// Where the time went while several rows ran at once, and while one did.
    parts: [PartTimes; 2],
    /// Which of `parts` is counting, and since when its next part does.
    counting: (usize, u64),
}

impl<'w> Engine<'w> {
    /// Joins a loaded model with its arena. `isa` bounds what this crate's own ops use.
    ///
    /// # Errors
    /// [`EngineError::ArenaMoved`] when `arena` is not the memory the model was loaded into.
    pub fn new(loaded: LoadedModel, arena: &'w [u8], isa: Isa, tier: Tier) -> Result<Self, EngineError> {
        let LoadedModel { mut plan, vectors, base_address } = loaded;
        let weights = &arena[plan.base(arena)?..];
        if weights.as_ptr().addr() != base_address {
            return Err(EngineError::ArenaMoved);
        }
        let mut table = KernelTable::new(Level::new(isa), tier);
        plan.add_slots(&mut table);
        let divisors = plan.rope_factors.map_or(&[][..], |factors| factors.of(&vectors));
        let rope_dim = plan.config.rope_dim as usize;
        let table_of = |rope: &RopeParameters| RopeTable::new(rope.base, rope.scale, divisors, rope_dim);
        let ropes = plan.ropes.iter().map(table_of).collect();
        let captured = (0..table.len()).map(|_| None).collect();
        Ok(Self {
            plan,
            weights,
            vectors,
            table,
            ropes,
            captured,
            replay: Default::default(),
            verify: Default::default(),
            parts: Default::default(),
            counting: (0, 0),
        })
    }

    /// Takes the memory of the rotary angles of `positions`, which are made as the context fills.
    pub fn reserve_angles(&mut self, positions: usize) {
        self.ropes.iter_mut().for_each(|rope| rope.reserve(positions));
    }

    /// Hyperparameters.
    pub fn config(&self) -> &Config {
        &self.plan.config
    }

    /// What the model looks like in memory.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The kernel table.
    pub fn table(&self) -> &KernelTable {
        &self.table
    }

    /// The kernel table, to install kernels and reset statistics.
    pub fn table_mut(&mut self) -> &mut KernelTable {
        &mut self.table
    }

    /// Which of `M_BUCKETS` prompts are cut into: all of them where this crate's own products are fast; without those the
    /// ones that have a compiled kernel for every product of a layer, or all if none has.
    pub fn batch_sizes(&self) -> [bool; M_BUCKETS.len()] {
        let every = [true; M_BUCKETS.len()];
        if HAS_BASELINE {
            return every;
        }
        // The head runs for one row at a time, whatever the batch.
        let is_layer = |key: &KernelKey| key.op != Op::LmHead;
        let some = core::array::from_fn(|bucket| !self.keys_without_kernel(bucket).iter().any(is_layer));
        if some.contains(&true) { some } else { every }
    }

    /// The products of the batch bucket `bucket` that no compiled kernel computes.
    pub fn keys_without_kernel(&self, bucket: usize) -> Vec<KernelKey> {
        let mut keys = Vec::new();
        for slot in self.plan.matrices.iter().flat_map(|matrix| matrix.slots(bucket)) {
            let Some(key) = self.table.key(slot) else { continue };
            if !matches!(self.table.runs(slot), Some(Runs::Compiled(_))) && !keys.contains(&key) {
                keys.push(key);
            }
        }
        keys
    }

    /// True when an op ran in `slot`, so that its activations are kept.
    pub fn is_captured(&self, slot: usize) -> bool {
        self.captured.get(slot).is_some_and(Option::is_some)
    }

    /// Where the time of prompts went.
    pub fn prefill_parts(&self) -> &PartTimes {
        &self.parts[0]
    }

    /// Where the time of single tokens went.
    pub fn decode_parts(&self) -> &PartTimes {
        &self.parts[1]
    }

    /// Counts the time since the last call, or since the pass began, to `part`.
    #[inline]
    pub fn lap(&mut self, part: Part) {
        let (which, since) = self.counting;
        let now = cycles();
        self.parts[which].add(part, now.wrapping_sub(since));
        self.counting.1 = now;
    }

    fn vector(&self, vector: Vector) -> &[f32] {
        vector.of(&self.vectors)
    }

    /// Writes the input of the first layer for `token` at `pos`, `(dim)`; `row` is scratch of the same length.
    fn embed(&self, token: u32, pos: usize, out: &mut [f32], row: &mut [f32]) {
        self.embedding_row(&self.plan.embedding, token as usize, out);
        let scale = self.plan.config.embedding_scale;
        if scale != 1.0 {
            out.iter_mut().for_each(|out| *out *= scale);
        }
        if let Some(positions) = &self.plan.positions {
            self.embedding_row(positions, pos, row);
            add(out, row);
        }
    }

    /// Row `index` of `embedding` as f32.
    fn embedding_row(&self, embedding: &Embedding, index: usize, out: &mut [f32]) {
        match embedding {
            Embedding::Head => {
                let head = &self.plan.matrices[self.plan.head];
                dequantise_column(head.dtype, index, &self.weights[head.bytes.clone()], out);
            }
            Embedding::Rows { bytes, row_bytes, ty } => {
                let row = &self.weights[bytes.clone()][index * row_bytes..][..*row_bytes];
                model::quant::dequantise(*ty, row, out).expect("the plan checked type and length of these rows");
            }
            Embedding::Groups { bytes, codes, group_len } => {
                let (codes, scales) = self.weights[bytes.clone()].split_at(*codes);
                let first = index * out.len();
                for (i, (out, code)) in out.iter_mut().zip(&codes[first..]).enumerate() {
                    let scale = f32::from_le_bytes(field(scales, 4 * ((first + i) / group_len)));
                    *out = f32::from(code.cast_signed()) * scale;
                }
            }
        }
    }

    /// `out = norm(x)` for one row.
    fn norm(&self, norm: &NormWeights, x: &[f32], out: &mut [f32]) {
        let (level, eps) = (self.table.level(), self.plan.config.norm_eps);
        match norm.bias {
            Some(bias) => layernorm(level, x, self.vector(norm.gain), self.vector(bias), eps, out),
            None => rmsnorm(level, x, self.vector(norm.gain), eps, out),
        }
    }

    /// Replaces each head by its RMSNorm; `scratch` is as long as a head.
    fn norm_heads(&self, gain: Vector, heads: &mut [f32], scratch: &mut [f32]) {
        for head in heads.chunks_exact_mut(scratch.len()) {
            self.norm(&NormWeights { gain, bias: None }, head, scratch);
            head.copy_from_slice(scratch);
        }
    }

    /// `y = op(x, matrix)` for the `batch`'s rows, on all workers, through the kernel table.
    fn run(&mut self, matrix: usize, batch: Batch, x: &[u8], y: ColumnsMut<'_>, workers: &dyn Workers) {
        let Batch { bucket, rows } = batch;
        for slot in self.plan.matrices[matrix].slots(bucket) {
            if self.captured[slot].is_none() {
                let mut captured = AlignedBytes::copy_of(x);
                // Spare rows hold whatever was there.
                captured[x.len() / M_BUCKETS[bucket] as usize * rows..].fill(0);
                self.captured[slot] = Some(captured);
            }
        }
        // What was done since the last product, other than the parts with laps of their own, was to make its input.
        self.lap(Part::Norm);
        let matrix = &self.plan.matrices[matrix];
        self.table.run(&OpCall { matrix, weights: self.weights, bucket, x, rows }, y, workers);
        self.lap(Part::Product);
    }

    fn dtype(&self, matrix: usize) -> DType {
        self.plan.matrices[matrix].dtype
    }
}

/// One context: what was said so far, and the memory to go on.
#[derive(Debug)]
pub struct Session<'m> {
    sizes: Sizes,
    /// Keys and values of every layer (`attention`).
    kv: &'m mut [f32],
    /// Tokens in the context.
    pos: usize,
    buffers: Buffers<&'m mut [f32]>,
}

/// Activations of one chunk, `x` those of all chunks of a group; `rows` is that of the bucket, at most 64. Each starts on a
/// cache line.
#[derive(Debug)]
struct Buffers<B> {
    /// Residual stream, `(GROUP * rows, dim)`, row stride `padded(dim)`.
    x: B,
    /// Its norm, `(rows, dim)`.
    normed: B,
    /// Quantised input of the next matmul, `(rows, k / 32)` blocks of `BlockLayout::x_block_bytes`.
    quantised: B,
    /// Query, key and value, `(rows, q_dim + 2 kv_dim)`, row stride `Sizes::qkv_stride`.
    qkv: B,
    /// Attention output, `(rows, q_dim)`.
    attended: B,
    /// Inner activations of the feed-forward block, `(rows, hidden_dim)`, row stride `padded(hidden_dim)`.
    hidden: B,
    /// The up half where it is not fused, as `hidden`.
    up: B,
    /// Output of a block that is normalised before it joins `x`, as `x`; empty where none is.
    projected: B,
    /// Partial results of one position's attention.
    partials: B,
    /// `(padded(vocab_size))`.
    logits: B,
}

/// Every size a session depends on.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Sizes {
    context: usize,
    threads: usize,
    dim: usize,
    q_dim: usize,
    kv_dim: usize,
    hidden_dim: usize,
    vocab_size: usize,
    /// Elements of a row of `Buffers::projected`.
    projected: usize,
    kv: KvShape,
}

impl Sizes {
    fn new(config: &Config, context: usize, threads: usize, kv: KvType) -> Self {
        let kv = KvShape {
            n_layers: config.n_layers as usize,
            n_heads: config.n_heads as usize,
            n_kv_heads: config.n_kv_heads as usize,
            head_dim: config.head_dim as usize,
            blocks: context.div_ceil(KV_BLOCK),
            ty: kv,
        };
        let roles = config.architecture.blueprint().layer;
        let has_post_norm = roles.contains(&Role::AttnPostNorm) || roles.contains(&Role::FfnPostNorm);
        Self {
            context,
            threads,
            dim: config.dim as usize,
            q_dim: kv.n_heads * kv.head_dim,
            kv_dim: kv.n_kv_heads * kv.head_dim,
            hidden_dim: config.hidden_dim as usize,
            vocab_size: config.vocab_size as usize,
            projected: if has_post_norm { padded(config.dim as usize) } else { 0 },
            kv,
        }
    }

    /// Row stride of `qkv`: room for three matrices that each pad their columns.
    fn qkv_stride(&self) -> usize {
        padded(self.q_dim) + 2 * padded(self.kv_dim)
    }

    /// Elements of the KV cache.
    fn kv_len(&self) -> usize {
        self.kv.len_bytes().div_ceil(size_of::<f32>())
    }

    /// Cuts the buffers with `cut`, which is given the elements of each.
    fn buffers<B>(&self, mut cut: impl FnMut(usize) -> Option<B>) -> Option<Buffers<B>> {
        let longest_k = self.dim.max(self.q_dim).max(self.hidden_dim);
        Some(Buffers {
            x: cut(GROUP * MAX_ROWS * padded(self.dim))?,
            normed: cut(MAX_ROWS * self.dim)?,
            quantised: cut(MAX_ROWS * x_row_bytes(DType::Q8_0, longest_k).div_ceil(size_of::<f32>()))?,
            qkv: cut(MAX_ROWS * self.qkv_stride())?,
            attended: cut(MAX_ROWS * self.q_dim)?,
            hidden: cut(MAX_ROWS * padded(self.hidden_dim))?,
            up: cut(MAX_ROWS * padded(self.hidden_dim))?,
            projected: cut(MAX_ROWS * self.projected)?,
            partials: cut(self.kv.partials_len())?,
            logits: cut(padded(self.vocab_size))?,
        })
    }
}

/// The two pieces of memory a session lives in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionMemory<B> {
    /// Keys and values: most of it, used as the context fills.
    pub kv: B,
    /// Everything that is computed on the way to a token.
    pub activations: B,
}

impl<B> SessionMemory<B> {
    /// Both pieces by `make`.
    pub fn map<C>(self, mut make: impl FnMut(B) -> C) -> SessionMemory<C> {
        SessionMemory { kv: make(self.kv), activations: make(self.activations) }
    }
}

impl SessionMemory<Vec<u8>> {
    /// The memory itself, for one session.
    pub fn lend(&mut self) -> SessionMemory<&mut [u8]> {
        SessionMemory { kv: &mut self.kv, activations: &mut self.activations }
    }
}

/// Cuts pieces off the front of memory, each at the start of a cache line.
struct Cutter<'m>(&'m mut [f32]);

impl<'m> Cutter<'m> {
    /// Elements in a cache line.
    const LINE: usize = WEIGHT_ALIGN / size_of::<f32>();

    /// Bytes of memory that pieces of `lens` elements need, wherever it starts.
    fn need_bytes(lens: impl Iterator<Item = usize>) -> usize {
        WEIGHT_ALIGN + lens.map(|len| len.next_multiple_of(Self::LINE) * size_of::<f32>()).sum::<usize>()
    }

    fn new(memory: &'m mut [u8]) -> Self {
        let start = memory.as_ptr().align_offset(WEIGHT_ALIGN).min(memory.len());
        let whole = (memory.len() - start) / WEIGHT_ALIGN * WEIGHT_ALIGN;
        Self(<[f32]>::mut_from_bytes(&mut memory[start..start + whole]).unwrap_or_default())
    }

    fn cut(&mut self, len: usize) -> Option<&'m mut [f32]> {
        let (piece, rest) = core::mem::take(&mut self.0).split_at_mut_checked(len.next_multiple_of(Self::LINE))?;
        self.0 = rest;
        Some(&mut piece[..len])
    }
}

impl<'m> Session<'m> {
    /// Bytes of memory a session of `context` tokens on `threads` cores needs, with a KV cache of type `kv`.
    pub fn memory_bytes(config: &Config, context: usize, threads: usize, kv: KvType) -> SessionMemory<usize> {
        let sizes = Sizes::new(config, context, threads, kv);
        let mut lens = Vec::new();
        let _ = sizes.buffers(|len| {
            lens.push(len);
            Some(())
        });
        SessionMemory {
            kv: Cutter::need_bytes([sizes.kv_len()].into_iter()),
            activations: Cutter::need_bytes(lens.into_iter()),
        }
    }

    /// An empty context of `context` tokens in `memory` ([`Session::memory_bytes`], content arbitrary).
    ///
    /// # Errors
    /// [`EngineError::SessionMemory`] when the memory is too small.
    pub fn new(
        engine: &Engine<'_>,
        context: usize,
        kv: KvType,
        memory: SessionMemory<&'m mut [u8]>,
    ) -> Result<Self, EngineError> {
        let threads = engine.plan.threads;
        let sizes = Sizes::new(engine.config(), context, threads, kv);
        let need = Self::memory_bytes(engine.config(), context, threads, kv);
        let (need_bytes, have_bytes) = (need.kv + need.activations, memory.kv.len() + memory.activations.len());
        let too_small = EngineError::SessionMemory { context, need_bytes, have_bytes };
        if memory.kv.len() < need.kv || memory.activations.len() < need.activations {
            return Err(too_small);
        }
        // The cache clears itself as it is used.
        let kv = Cutter::new(memory.kv).cut(sizes.kv_len()).ok_or(too_small.clone())?;
        let mut activations = Cutter::new(memory.activations);
        let buffers = sizes.buffers(|len| {
            let buffer = activations.cut(len)?;
            // Spare rows and padding columns are read: they must be finite.
            buffer.fill(0.0);
            Some(buffer)
        });
        Ok(Self { sizes, kv, pos: 0, buffers: buffers.ok_or(too_small)? })
    }

    /// Tokens in the context.
    pub fn pos(&self) -> usize {
        self.pos
    }

    /// Most tokens the context holds.
    pub fn context(&self) -> usize {
        self.sizes.context
    }

    /// Forgets everything behind the first `pos` tokens; no effect when there are fewer.
    pub fn truncate(&mut self, pos: usize) {
        self.pos = self.pos.min(pos);
    }

    /// Appends `tokens` to the context and returns the logits after the last one, `(vocab_size)`.
    ///
    /// # Errors
    /// No tokens, a token outside the vocabulary, a full context, a session of another engine. Nothing was appended then.
    pub fn prefill(
        &mut self,
        engine: &mut Engine<'_>,
        workers: &dyn Workers,
        tokens: &[u32],
    ) -> Result<&[f32], EngineError> {
        let last = tokens.len().saturating_sub(1);
        self.prefill_each(engine, workers, tokens, last, &mut |_, _| {})?;
        Ok(&self.buffers.logits[..self.sizes.vocab_size])
    }

    /// As [`Session::prefill`], but calls `each` with the index of every token from index `first` on and the logits after it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn prefill_each(
        &mut self,
        engine: &mut Engine<'_>,
        workers: &dyn Workers,
        tokens: &[u32],
        first: usize,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.check(engine, tokens)?;
        for rope in &mut engine.ropes {
            rope.extend_to(self.pos + tokens.len());
        }
        engine.counting = (usize::from(tokens.len() == 1), cycles());
        let buckets = engine.batch_sizes();
        let mut done = 0;
        while done < tokens.len() {
            let (chunks, count) = next_group(&tokens[done..], self.pos, &buckets);
            let chunks = &chunks[..count];
            self.group(engine, workers, (chunks, &buckets), &tokens[done..], first.saturating_sub(done));
            for chunk in chunks {
                for row in first.saturating_sub(done)..chunk.rows {
                    self.head(engine, workers, chunk.first + row);
                    each(done + row, &self.buffers.logits[..self.sizes.vocab_size]);
                }
                done += chunk.rows;
            }
        }
        Ok(())
    }

    /// Appends one token and returns the logits after it, `(vocab_size)`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(
        &mut self,
        engine: &mut Engine<'_>,
        workers: &dyn Workers,
        token: u32,
    ) -> Result<&[f32], EngineError> {
        self.prefill(engine, workers, &[token])
    }

    fn check(&self, engine: &Engine<'_>, tokens: &[u32]) -> Result<(), EngineError> {
        let (context, pos) = (self.sizes.context, self.pos);
        if self.sizes != Sizes::new(engine.config(), context, engine.plan.threads, self.sizes.kv.ty) {
            return Err(EngineError::ForeignSession);
        }
        if tokens.is_empty() {
            return Err(EngineError::NoTokens);
        }
        if tokens.len() > context - pos {
            return Err(EngineError::ContextFull { context, pos, tokens: tokens.len() });
        }
        let vocab_size = engine.config().vocab_size;
        match tokens.iter().find(|&&token| token >= vocab_size) {
            Some(&token) => Err(EngineError::Token { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// Runs all layers on `chunks`, which are the first of `tokens` cut into `buckets`, and advances the position. Of tokens before `first`, only
    /// what later ones see of them is computed: the last layer's keys and values, and no output.
    fn group(
        &mut self,
        engine: &mut Engine<'_>,
        workers: &dyn Workers,
        (chunks, buckets): (&[Chunk], &[bool; M_BUCKETS.len()]),
        tokens: &[u32],
        first: usize,
    ) {
        let (dim, stride) = (self.sizes.dim, padded(self.sizes.dim));
        let Buffers { x, normed, .. } = &mut self.buffers;
        let mut tokens = tokens.iter();
        for chunk in chunks {
            let rows = chunk.of(x, stride).chunks_exact_mut(stride).take(chunk.rows);
            for (r, (x, &token)) in rows.zip(tokens.by_ref()).enumerate() {
                engine.embed(token, chunk.pos + r, &mut x[..dim], &mut normed[..dim]);
            }
        }
        engine.lap(Part::Embed);
        let layers = engine.plan.layers.len();
        for layer in 0..layers {
            let mut first = if layer + 1 == layers { first } else { 0 };
            for chunk in chunks {
                self.store_keys(engine, workers, layer, chunk);
                let (left_out, wanted) = chunk.without_rows_before(first, buckets[0]);
                if wanted.rows > 0 {
                    self.attend(engine, workers, layer, left_out, &wanted);
                    self.feed_forward_block(engine, workers, layer, &wanted);
                }
                first = first.saturating_sub(chunk.rows);
            }
        }
        self.pos += chunks.iter().map(|chunk| chunk.rows).sum::<usize>();
    }

    /// Queries, keys and values of `norm(x)`, with the norms and biases that the layer has; keys and values go to the cache.
    fn store_keys(&mut self, engine: &mut Engine<'_>, workers: &dyn Workers, layer: usize, chunk: &Chunk) {
        let level = engine.table.level();
        let weights = engine.plan.layers[layer];
        let (m, rows, batch) = (chunk.m(), chunk.rows, chunk.batch());
        let Sizes { dim, q_dim, kv_dim, .. } = self.sizes;
        let qkv_stride = self.sizes.qkv_stride();
        let input = match weights.qkv {
            QkvWeights::Fused(matrix) => Some(engine.dtype(matrix)),
            QkvWeights::Separate { .. } => None,
        };
        self.norm_rows(engine, workers, &weights.attn_norm, chunk.first..chunk.first + rows, input);
        let Buffers { normed, quantised, qkv, .. } = &mut self.buffers;
        let normed = &normed[..m * dim];

        engine.lap(Part::Norm);
        if rows == 1 {
            // What is still on its way arrives while the product below is computed.
            attention::fetch(&self.sizes.kv, self.kv.as_bytes(), layer, chunk.pos);
        }
        engine.lap(Part::Rope);
        // Where key and value columns start in a row of `qkv`.
        let (k_at, v_at) = match weights.qkv {
            QkvWeights::Fused(matrix) => {
                let input = normed_activations(engine.dtype(matrix), normed, dim, quantised);
                engine.run(matrix, batch, input, ColumnsMut::new(qkv, m, qkv_stride, qkv_stride), workers);
                (q_dim, q_dim + kv_dim)
            }
            QkvWeights::Separate { q, k, v } => {
                let (k_at, v_at) = (padded(q_dim), padded(q_dim) + padded(kv_dim));
                for (matrix, at) in [(q, 0), (k, k_at), (v, v_at)] {
                    let input = activations(engine, workers, engine.dtype(matrix), normed, dim, rows, quantised);
                    let y = ColumnsMut::new(&mut qkv[at..], m, qkv_stride - at, qkv_stride);
                    engine.run(matrix, batch, input, y, workers);
                }
                (k_at, v_at)
            }
        };

        let kv = &self.sizes.kv;
        let columns = [0..q_dim, k_at..k_at + kv_dim, v_at..v_at + kv_dim];
        let shared: &Engine<'_> = engine;
        let has_head_norm = weights.q_norm.is_some() || weights.k_norm.is_some();
        share_out(shared, workers, &mut qkv[..rows * qkv_stride], qkv_stride, &|rows, qkv| {
            let mut scratch = vec![0.0; if has_head_norm { kv.head_dim } else { 0 }];
            for (r, row) in rows.zip(qkv.chunks_exact_mut(qkv_stride)) {
                for (columns, bias) in columns.iter().zip(weights.qkv_bias) {
                    if let Some(bias) = bias {
                        add(&mut row[columns.clone()], shared.vector(bias));
                    }
                }
                for (columns, gain) in columns.iter().zip([weights.q_norm, weights.k_norm]) {
                    let heads = &mut row[columns.clone()];
                    if let Some(gain) = gain {
                        shared.norm_heads(gain, heads, &mut scratch);
                    }
                    if let Positions::Rotary(order) = shared.config().architecture.blueprint().positions {
                        rope(level, order, heads, kv.head_dim, shared.ropes[weights.rope].row(chunk.pos + r));
                    }
                }
            }
        });
        let new = KeysValues { pos: chunk.pos, rows, k: &qkv[k_at..], v: &qkv[v_at..], stride: qkv_stride };
        attention::store(level, kv, self.kv.as_mut_bytes(), layer, &new);
        engine.lap(Part::Rope);
    }

    /// `x += attention(queries) Wo` for `chunk`, whose queries follow the first `left_out` of those stored last.
    fn attend(&mut self, engine: &mut Engine<'_>, workers: &dyn Workers, layer: usize, left_out: usize, chunk: &Chunk) {
        let level = engine.table.level();
        let weights = engine.plan.layers[layer];
        let (m, rows, batch) = (chunk.m(), chunk.rows, chunk.batch());
        let Sizes { dim, q_dim, .. } = self.sizes;
        let qkv_stride = self.sizes.qkv_stride();
        let Buffers { x, quantised, qkv, attended, projected, partials, .. } = &mut self.buffers;
        let kv = &self.sizes.kv;
        let queries = Queries {
            shape: kv,
            cache: self.kv.as_bytes(),
            layer,
            q: &qkv[left_out * qkv_stride..],
            q_stride: qkv_stride,
            rows,
            pos: chunk.pos,
            window: weights.window,
            scale: engine.config().query_scale / libm::sqrtf(kv.head_dim as f32),
        };
        attention::attend(level, &queries, workers, self.sizes.threads, attended, partials);
        engine.lap(Part::Attention);

        let attended = &attended[..m * q_dim];
        let input = activations(engine, workers, engine.dtype(weights.attn_out), attended, q_dim, rows, quantised);
        let out = if weights.attn_post_norm.is_some() { &mut **projected } else { chunk.of(x, padded(dim)) };
        engine.run(weights.attn_out, batch, input, ColumnsMut::new(out, m, padded(dim), padded(dim)), workers);
        self.finish_block(engine, weights.attn_out_bias, weights.attn_post_norm, chunk);
    }

    /// What follows a block's last product, for `chunk`: its bias, or the norm of its output and the residual.
    fn finish_block(&mut self, engine: &Engine<'_>, bias: Option<Vector>, post_norm: Option<Vector>, chunk: &Chunk) {
        let (dim, stride, rows) = (self.sizes.dim, padded(self.sizes.dim), chunk.rows);
        let Buffers { x, projected, normed, .. } = &mut self.buffers;
        let x = chunk.of(x, stride);
        if let Some(bias) = bias {
            let out = if post_norm.is_some() { &mut **projected } else { &mut *x };
            out.chunks_exact_mut(stride).take(rows).for_each(|row| add(&mut row[..dim], engine.vector(bias)));
        }
        if let Some(gain) = post_norm {
            let normed = &mut normed[..dim];
            for (x, projected) in x.chunks_exact_mut(stride).zip(projected.chunks_exact(stride)).take(rows) {
                engine.norm(&NormWeights { gain, bias: None }, &projected[..dim], normed);
                add(&mut x[..dim], normed);
            }
        }
    }

    /// `x += down(activation(gate(norm(x))) * up(norm(x)))`, or without a gate `x += down(activation(up(norm(x))))`.
    fn feed_forward_block(&mut self, engine: &mut Engine<'_>, workers: &dyn Workers, layer: usize, chunk: &Chunk) {
        let level = engine.table.level();
        let weights = engine.plan.layers[layer];
        let (m, rows, batch) = (chunk.m(), chunk.rows, chunk.batch());
        let Sizes { dim, hidden_dim, .. } = self.sizes;
        let stride = padded(hidden_dim);
        let input = match weights.up {
            UpWeights::Fused(matrix) => Some(engine.dtype(matrix)),
            UpWeights::Separate { .. } | UpWeights::Plain { .. } => None,
        };
        self.norm_rows(engine, workers, &weights.ffn_norm, chunk.first..chunk.first + rows, input);
        let activation = engine.config().architecture.blueprint().activation;
        let Buffers { x, normed, quantised, hidden, up: up_rows, projected, .. } = &mut self.buffers;
        let normed = &normed[..m * dim];
        match weights.up {
            UpWeights::Fused(matrix) => {
                let input = normed_activations(engine.dtype(matrix), normed, dim, quantised);
                engine.run(matrix, batch, input, ColumnsMut::new(hidden, m, stride, stride), workers);
            }
            UpWeights::Separate { gate, up } => {
                for (matrix, out) in [(gate, &mut *hidden), (up, &mut *up_rows)] {
                    let input = activations(engine, workers, engine.dtype(matrix), normed, dim, rows, quantised);
                    engine.run(matrix, batch, input, ColumnsMut::new(out, m, stride, stride), workers);
                }
                activate(level, activation, &mut hidden[..rows * stride], Some(&up_rows[..rows * stride]));
            }
            UpWeights::Plain { up, bias } => {
                let input = activations(engine, workers, engine.dtype(up), normed, dim, rows, quantised);
                engine.run(up, batch, input, ColumnsMut::new(hidden, m, stride, stride), workers);
                if let Some(bias) = bias {
                    let bias = engine.vector(bias);
                    hidden.chunks_exact_mut(stride).take(rows).for_each(|row| add(&mut row[..hidden_dim], bias));
                }
                activate(level, activation, &mut hidden[..rows * stride], None);
            }
        }
        if stride != hidden_dim {
            // The next op reads rows without padding.
            for r in 1..rows {
                hidden.copy_within(r * stride..r * stride + hidden_dim, r * hidden_dim);
            }
        }
        let hidden = &hidden[..m * hidden_dim];
        let input = activations(engine, workers, engine.dtype(weights.down), hidden, hidden_dim, rows, quantised);
        let out = if weights.ffn_post_norm.is_some() { &mut **projected } else { chunk.of(x, padded(dim)) };
        engine.run(weights.down, batch, input, ColumnsMut::new(out, m, padded(dim), padded(dim)), workers);
        self.finish_block(engine, weights.down_bias, weights.ffn_post_norm, chunk);
    }

    /// Logits after row `row` of the group that just ran.
    fn head(&mut self, engine: &mut Engine<'_>, workers: &dyn Workers, row: usize) {
        let (dim, head) = (self.sizes.dim, engine.plan.head);
        self.norm_rows(engine, workers, &engine.plan.output_norm, row..row + 1, Some(engine.dtype(head)));
        let Buffers { normed, quantised, logits, .. } = &mut self.buffers;
        let input = normed_activations(engine.dtype(head), &normed[..dim], dim, quantised);
        let columns = logits.len();
        engine.run(head, Batch { bucket: 0, rows: 1 }, input, ColumnsMut::new(logits, 1, columns, columns), workers);
    }

    /// `norm(x)` for `rows` of `x`; the first goes to row 0. Left in `normed`, or where `input` is a quantised type, quantised
    /// for products of that type in `quantised`.
    fn norm_rows(
        &mut self,
        engine: &Engine<'_>,
        workers: &dyn Workers,
        norm: &NormWeights,
        rows: Range<usize>,
        input: Option<DType>,
    ) {
        let (dim, stride) = (self.sizes.dim, padded(self.sizes.dim));
        let (level, eps) = (engine.table.level(), engine.config().norm_eps);
        let Buffers { x, normed, quantised, .. } = &mut self.buffers;
        let x = &x[rows.start * stride..rows.end * stride];
        let row = |r: usize| &x[r * stride..][..dim];
        let Some(dtype) = input.filter(|dtype| dtype.is_quantised()) else {
            return share_out(engine, workers, &mut normed[..rows.len() * dim], dim, &|rows, normed| {
                rows.zip(normed.chunks_exact_mut(dim)).for_each(|(r, out)| engine.norm(norm, row(r), out));
            });
        };
        let row_len = x_row_bytes(dtype, dim) / size_of::<f32>();
        if norm.bias.is_some() {
            for (r, out) in quantised.chunks_exact_mut(row_len).take(rows.len()).enumerate() {
                engine.norm(norm, row(r), &mut normed[..dim]);
                quantise_activations(level, &normed[..dim], dtype, out.as_mut_bytes());
            }
            return;
        }
        share_out(engine, workers, &mut quantised[..rows.len() * row_len], row_len, &|rows, quantised| {
            for (r, out) in rows.zip(quantised.chunks_exact_mut(row_len)) {
                rmsnorm_quantise(level, row(r), engine.vector(norm.gain), eps, dtype, out.as_mut_bytes());
            }
        });
    }
}

/// Fewer rows than these take less time than handing some of them to other workers.
const SHARED_ROWS: usize = 8;

/// Calls `job` for all rows of `out`, `(rows, row_len)`, with the rows it is to make: on all workers where that is worth it.
fn share_out(
    engine: &Engine<'_>,
    workers: &dyn Workers,
    out: &mut [f32],
    row_len: usize,
    job: &(dyn Fn(Range<usize>, &mut [f32]) + Sync),
) {
    let parts = if out.len() / row_len < SHARED_ROWS { 1 } else { engine.plan.threads };
    dispatch::for_rows(workers, parts, out, row_len, job);
}

/// `x += other`.
fn add(x: &mut [f32], other: &[f32]) {
    for (x, other) in x.iter_mut().zip(other) {
        *x += other;
    }
}

/// What `norm_rows` left for a product with weights of type `dtype`; `normed` is `(m, dim)`.
fn normed_activations<'a>(dtype: DType, normed: &'a [f32], dim: usize, quantised: &'a [f32]) -> &'a [u8] {
    if dtype.is_quantised() {
        &quantised.as_bytes()[..normed.len() / dim * x_row_bytes(dtype, dim)]
    } else {
        normed.as_bytes()
    }
}

/// Rows of the next chunk and the index of its bucket, one of `buckets`, for a prompt of which `left` tokens are left.
///
/// Spare rows cost little, a second pass over the weights more: one chunk takes all that is left, unless that fills less than
/// a quarter of the bucket. (A kernel does one full row tile and its last, shorter one, however few rows are wanted.)
fn next_chunk(left: usize, buckets: &[bool; M_BUCKETS.len()]) -> (usize, usize) {
    let usable = |bucket: &usize| buckets[*bucket];
    for bucket in (0..M_BUCKETS.len()).rev().filter(usable) {
        let below = (0..bucket).rev().find(usable).map_or(0, |bucket| M_BUCKETS[bucket] as usize);
        let m = M_BUCKETS[bucket] as usize;
        if left >= m {
            return (m, bucket);
        }
        if left > below && (4 * left >= m || below == 0) {
            return (left, bucket);
        }
    }
    (1, 0)
}

/// The chunks of the next group of `tokens`, whose first is at position `pos`, and how many they are.
fn next_group(tokens: &[u32], pos: usize, buckets: &[bool; M_BUCKETS.len()]) -> ([Chunk; GROUP], usize) {
    let mut chunks = [Chunk::default(); GROUP];
    let (mut done, mut first, mut count) = (0, 0, 0);
    for chunk in &mut chunks {
        if done == tokens.len() {
            break;
        }
        let (rows, bucket) = next_chunk(tokens.len() - done, buckets);
        *chunk = Chunk { first, rows, bucket, pos: pos + done };
        (done, first, count) = (done + rows, first + chunk.m(), count + 1);
    }
    (chunks, count)
}

/// `x`, `(m, k)`, as matmuls with weights of type `dtype` read it: its first `rows` rows, and whatever lies behind them.
fn activations<'a>(
    engine: &Engine<'_>,
    workers: &dyn Workers,
    dtype: DType,
    x: &'a [f32],
    k: usize,
    rows: usize,
    quantised: &'a mut [f32],
) -> &'a [u8] {
    if !dtype.is_quantised() {
        return x.as_bytes();
    }
    let (level, row_len) = (engine.table.level(), x_row_bytes(dtype, k) / size_of::<f32>());
    share_out(engine, workers, &mut quantised[..rows * row_len], row_len, &|rows, quantised| {
        for (r, out) in rows.zip(quantised.chunks_exact_mut(row_len)) {
            quantise_activations(level, &x[r * k..][..k], dtype, out.as_mut_bytes());
        }
    });
    &quantised.as_bytes()[..x.len() / k * row_len * size_of::<f32>()]
}

const _: () = assert!(PANEL.is_multiple_of(WEIGHT_ALIGN / size_of::<f32>()));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_cut_into_buckets_that_are_a_quarter_full_at_least() {
        for prompt in 1..300 {
            let mut left = prompt;
            while left > 0 {
                let (rows, bucket) = next_chunk(left, &[true; M_BUCKETS.len()]);
                let m = M_BUCKETS[bucket] as usize;
                assert!(rows >= 1 && rows <= m.min(left) && 4 * rows >= m, "{prompt}: {rows} rows in a bucket of {m}");
                left -= rows;
            }
        }
        let chunks_of = |mut left: usize, buckets: [bool; M_BUCKETS.len()]| -> Vec<usize> {
            core::iter::from_fn(|| {
                (left > 0).then(|| {
                    let (rows, _) = next_chunk(left, &buckets);
                    left -= rows;
                    rows
                })
            })
            .collect()
        };
        assert_eq!(chunks_of(11, [true, true, false, false]), [4, 4, 3]);
        assert_eq!(chunks_of(18, [true, false, false, true]), [18]);
        assert_eq!(chunks_of(3, [true, false, false, true]), [1, 1, 1]);
        assert_eq!(chunks_of(20, [false, false, true, false]), [16, 4]);
        assert_eq!(chunks_of(3, [true, false, false, false]), [1, 1, 1]);
        let chunks = |left: usize| chunks_of(left, [true; M_BUCKETS.len()]);
        assert_eq!(chunks(20), [20]);
        assert_eq!(chunks(2), [2]);
        assert_eq!(chunks(100), [64, 36]);
        assert_eq!(chunks(69), [64, 5]);
    }
}
