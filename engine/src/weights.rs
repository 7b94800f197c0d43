//! Which matrices a model has once packed: fusion, slices, where each lies in the weights arena, and its slots.
//!
//! Input: a `ModelDescription` and the number of cores. Output: a [`Plan`] with the arena's size and, for every tensor of
//! the file, where its rows go. Fused where the types allow it: q, k, v side by side, gate and up by alternating panels.
//! What else the pass does in each layer (norms, biases, window, rotary table) follows from the tensors and the
//! architecture's `Blueprint`; nothing here or in `forward` asks which architecture it is.

use crate::dispatch::{MAX_PARTS, Partition};
use crate::error::EngineError;
use crate::pack::{ColumnMap, RowFormat};
use crate::table::KernelTable;
use alloc::vec::Vec;
use core::ops::Range;
use model::architecture::{Activation, Positions};
use model::kernel::{DType, KernelKey, M_BUCKETS, Op};
use model::layout::{PANEL, WEIGHT_ALIGN, op_weight_bytes, panel_bytes, panels};
use model::order::sorted_by_key;
use model::{Config, ModelDescription, Role, Tensor, TensorType};

/// One packed matrix and how its op is shared between workers.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The op it serves.
    pub op: Op,
    /// Type of its packed weights.
    pub dtype: DType,
    /// Output columns, without padding.
    pub n: usize,
    /// Length of the sum.
    pub k: usize,
    /// Output columns of each worker, whole panels.
    pub partition: Partition,
    /// Bytes of the arena, from its first aligned byte.
    pub bytes: Range<usize>,
    /// For each batch bucket, slots of the longer and of the shorter slices; set by [`Matrix::add_slots`].
    slots: [[Option<usize>; 2]; M_BUCKETS.len()],
}

impl Matrix {
    fn new(op: Op, dtype: DType, n: usize, k: usize, threads: usize, at: &mut usize) -> Self {
        let start = *at;
        *at += op_weight_bytes(op, dtype, n, k).next_multiple_of(WEIGHT_ALIGN);
        let partition = Partition::even(panels(n), PANEL, threads);
        let bytes = start..start + op_weight_bytes(op, dtype, n, k);
        Self { op, dtype, n, k, partition, bytes, slots: [[None; 2]; M_BUCKETS.len()] }
    }

    /// Columns of the longer slices, which come first, and of the shorter ones (0 when there are none).
    fn slice_columns(&self) -> [usize; 2] {
        let longest = self.partition.range(0).len();
        let shortest = self.partition.range(self.partition.parts() - 1).len();
        if longest == shortest { [longest, 0] } else { [longest, shortest] }
    }

    /// Makes the slots of this matrix. A slice's key counts its padding columns: kernels compute them anyway, and so
    /// the last slice has no key of its own.
    fn add_slots(&mut self, table: &mut KernelTable) {
        let buckets = if self.op == Op::LmHead { 1 } else { M_BUCKETS.len() };
        for (bucket, &m) in M_BUCKETS.iter().enumerate().take(buckets) {
            for (i, columns) in self.slice_columns().into_iter().enumerate() {
                if columns > 0 {
                    let slices = (0..self.partition.parts()).filter(|&p| self.partition.range(p).len() == columns);
                    // Columns and depth come from 32-bit file fields.
                    let key = KernelKey { op: self.op, dtype: self.dtype, m, n: columns as u32, k: self.k as u32 };
                    self.slots[bucket][i] = Some(table.slot_for(key, slices.count()));
                }
            }
        }
    }

    /// Slot of the slice `part`; `None` for an empty slice.
    pub(crate) fn slot(&self, part: usize, bucket: usize) -> Option<usize> {
        let columns = self.partition.range(part).len();
        let [longer, _] = self.slice_columns();
        if columns == 0 { None } else { self.slots[bucket][usize::from(columns != longer)] }
    }

    /// The different slots of this matrix's slices.
    pub(crate) fn slots(&self, bucket: usize) -> impl Iterator<Item = usize> + use<> {
        self.slots[bucket].into_iter().flatten()
    }

    /// Bytes of the arena that the slice `part` reads.
    pub(crate) fn part_bytes(&self, part: usize) -> Range<usize> {
        let panel = self.op.columns_per_output() * panel_bytes(self.dtype, self.k) / PANEL;
        let columns = self.partition.range(part);
        self.bytes.start + columns.start * panel..self.bytes.start + columns.end * panel
    }

    /// Bytes of the whole matrix with the arena's packing.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// Query, key and value projection of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum QkvWeights {
    /// One matrix.
    Fused(usize),
    /// Three, because their types differ.
    Separate { q: usize, k: usize, v: usize },
}

/// First half of the feed-forward block of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UpWeights {
    /// Gate and up as one matrix with alternating panels.
    Fused(usize),
    /// Two, because their types differ.
    Separate { gate: usize, up: usize },
    /// No gate.
    Plain { up: usize, bias: Option<Vector> },
}

/// Norm weights, a bias or rotary divisors: elements of [`crate::LoadedModel`]'s vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vector {
    start: usize,
    len: usize,
}

impl Vector {
    pub fn of(self, vectors: &[f32]) -> &[f32] {
        &vectors[self.start..self.start + self.len]
    }
}

/// Weights of a norm; RMSNorm has no bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormWeights {
    pub gain: Vector,
    pub bias: Option<Vector>,
}

/// What one layer computes with: matrices as indices into [`Plan::matrices`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerWeights {
    pub attn_norm: NormWeights,
    pub qkv: QkvWeights,
    /// Biases of query, key and value.
    pub qkv_bias: [Option<Vector>; 3],
    /// Gains of the norms of each query and of each key head.
    pub q_norm: Option<Vector>,
    pub k_norm: Option<Vector>,
    /// Positions that a query sees, its own included.
    pub window: usize,
    /// Which of [`Plan::ropes`] turns queries and keys.
    pub rope: usize,
    pub attn_out: usize,
    pub attn_out_bias: Option<Vector>,
    /// Gain of the norm of the block's output; without one, output and residual are added in one op.
    pub attn_post_norm: Option<Vector>,
    pub ffn_norm: NormWeights,
    pub up: UpWeights,
    pub down: usize,
    pub down_bias: Option<Vector>,
    pub ffn_post_norm: Option<Vector>,
}

/// Base and scale of a table of rotary angles.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct RopeParameters {
    pub base: f32,
    pub scale: f32,
}

/// Where rows of an embedding come from.
#[derive(Clone, Debug)]
pub(crate) enum Embedding {
    /// Columns of the packed output head.
    Head,
    /// File rows kept as they are, at these bytes of the arena.
    Rows { bytes: Range<usize>, row_bytes: usize, ty: TensorType },
    /// So many int8 codes and behind them the scales of their groups, as the file has them, at these bytes of the arena.
    Groups { bytes: Range<usize>, codes: usize, group_len: usize },
}

/// Where the rows of one tensor of the file go.
#[derive(Clone, Debug)]
pub(crate) enum Destination {
    /// Into a packed matrix.
    Packed { matrix: usize, map: ColumnMap, format: RowFormat },
    /// Multiplied into what was packed: one f32 for each group of weights.
    Scales { matrix: usize, map: ColumnMap, group_len: usize },
    /// Into the arena as they are.
    Rows { bytes: Range<usize> },
    /// Into the vectors, from this element on.
    Vector { at: usize },
}

/// One tensor of the file, or its codes or its scales, and its destination.
#[derive(Clone, Debug)]
pub(crate) struct PlannedTensor {
    /// Of which only `offset` and `len_bytes` say what is meant.
    pub tensor: Tensor,
    /// Bytes that are taken in together: of a row, of one scale.
    pub row_bytes: usize,
    pub destination: Destination,
}

impl PlannedTensor {
    /// Matrix, columns and format of a tensor that is packed and whose first column begins a panel.
    pub(crate) fn begins_panel(&self) -> Option<(usize, ColumnMap, RowFormat)> {
        match self.destination {
            Destination::Packed { matrix, map, format } if map.place(0).1 == 0 => Some((matrix, map, format)),
            _ => None,
        }
    }
}

/// How a model will lie in memory.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) config: Config,
    pub(crate) threads: usize,
    pub(crate) matrices: Vec<Matrix>,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) output_norm: NormWeights,
    pub(crate) head: usize,
    pub(crate) embedding: Embedding,
    /// Rows added to the embedding by position.
    pub(crate) positions: Option<Embedding>,
    /// Different tables of rotary angles; none where positions are learned.
    pub(crate) ropes: Vec<RopeParameters>,
    pub(crate) rope_factors: Option<Vector>,
    /// Elements of all vectors.
    pub(crate) vectors_len: usize,
    /// In file order.
    pub(crate) tensors: Vec<PlannedTensor>,
    arena_len: usize,
}

impl Plan {
    /// Plans a model for `threads` cores.
    ///
    /// # Errors
    /// Too many threads, a missing tensor, or a tensor that no op can read.
    pub fn new(model: &ModelDescription, threads: usize) -> Result<Plan, EngineError> {
        if !(1..=MAX_PARTS).contains(&threads) {
            return Err(EngineError::Threads { threads, max: MAX_PARTS });
        }
        let config = model.config.clone();
        let by_role = sorted_by_key(&model.tensors, |tensor| (tensor.role, tensor.layer));
        let mut planner = Planner {
            by_role,
            config: &model.config,
            threads,
            matrices: Vec::new(),
            tensors: Vec::new(),
            ropes: Vec::new(),
            at: 0,
            vectors: 0,
        };
        let mut layers = Vec::with_capacity(config.n_layers as usize);
        for layer in 0..config.n_layers {
            layers.push(planner.layer(layer)?);
        }
        let head_role = if config.tied_head { Role::TokenEmbedding } else { Role::Output };
        let head = planner.matrix(Op::LmHead, None, head_role, &[])?;
        let embedding = if config.tied_head { Embedding::Head } else { planner.rows(Role::TokenEmbedding)? };
        let is_learned = config.architecture.blueprint().positions == Positions::Learned;
        let positions = if is_learned { Some(planner.rows(Role::PositionEmbedding)?) } else { None };
        let output_norm = planner.norm(None, Role::OutputNorm, Role::OutputNormBias)?;
        let rope_factors = planner.optional_vector(None, Role::RopeFactors)?;
        let Planner { matrices, tensors, ropes, at, vectors, .. } = planner;
        let tensors = sorted_by_key(&tensors, |planned| planned.tensor.offset);
        Ok(Plan {
            config,
            threads,
            matrices,
            layers,
            output_norm,
            head,
            embedding,
            positions,
            ropes,
            rope_factors,
            vectors_len: vectors,
            tensors,
            arena_len: at,
        })
    }

    /// Bytes of the weights arena, with room to align its start.
    pub fn arena_bytes(&self) -> usize {
        self.arena_len + WEIGHT_ALIGN
    }

    /// Bytes of the tables of rotary angles for `context` positions.
    pub fn angle_bytes(&self, context: usize) -> usize {
        let row_bytes = self.ropes.len() * self.config.rope_dim as usize * size_of::<f32>();
        context.saturating_mul(row_bytes)
    }

    /// Bytes of packed weights that one decoded token reads: all matrices once, embedding rows excepted.
    pub fn token_bytes(&self) -> usize {
        self.matrices.iter().map(Matrix::len_bytes).sum()
    }

    /// Cores the matrices are cut for.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// First aligned byte of `arena` and the bytes from there on.
    pub(crate) fn base(&self, arena: &[u8]) -> Result<usize, EngineError> {
        let base = arena.as_ptr().align_offset(WEIGHT_ALIGN);
        let need_bytes = self.arena_len.saturating_add(base);
        if arena.len() < need_bytes {
            return Err(EngineError::ArenaTooSmall { need_bytes, have_bytes: arena.len() });
        }
        Ok(base)
    }

    /// Makes the kernel table's slots.
    pub(crate) fn add_slots(&mut self, table: &mut KernelTable) {
        for matrix in &mut self.matrices {
            matrix.add_slots(table);
        }
    }
}

/// Bytes of the scale of a group.
const SCALE_BYTES: u64 = 4;

struct Planner<'a> {
    /// The model's tensors by role and layer: a file names them in any order, and as many as it likes.
    by_role: Vec<Tensor>,
    config: &'a Config,
    threads: usize,
    matrices: Vec<Matrix>,
    tensors: Vec<PlannedTensor>,
    ropes: Vec<RopeParameters>,
    /// Bytes of the arena given away.
    at: usize,
    /// Elements of vectors given away.
    vectors: usize,
}

impl Planner<'_> {
    fn find(&self, role: Role, layer: Option<u32>) -> Option<Tensor> {
        let at = self.by_role.binary_search_by_key(&(role, layer), |tensor| (tensor.role, tensor.layer));
        at.ok().map(|at| self.by_role[at])
    }

    fn tensor(&self, role: Role, layer: Option<u32>) -> Result<Tensor, EngineError> {
        let missing = || EngineError::MissingTensor { name: role.tensor_name(layer) };
        self.find(role, layer).ok_or_else(missing)
    }

    /// Bytes of one file row, checked against the tensor's length.
    fn row_bytes(tensor: &Tensor) -> Result<usize, EngineError> {
        let Tensor { n, k, len_bytes, .. } = *tensor;
        let shape = || EngineError::Shape { name: tensor.name(), n, k, len_bytes };
        let row_bytes = tensor.ty.row_bytes(u64::from(k)).ok_or_else(shape)?;
        let whole = row_bytes > 0 && row_bytes.checked_mul(u64::from(n)) == Some(len_bytes);
        if whole { usize::try_from(row_bytes).map_err(|_| shape()) } else { Err(shape()) }
    }

    fn format(tensor: &Tensor) -> Result<RowFormat, EngineError> {
        let unsupported = || EngineError::UnsupportedType { name: tensor.name(), found: tensor.ty.name() };
        match tensor.group_len {
            Some(_) if tensor.ty == TensorType::I8 => Ok(RowFormat::Int8),
            _ => RowFormat::of(tensor.ty).ok_or_else(unsupported),
        }
    }

    /// A matrix of the tensors `first` and `others` of a layer, side by side (gated ops: in alternating panels).
    fn matrix(&mut self, op: Op, layer: Option<u32>, first: Role, others: &[Role]) -> Result<usize, EngineError> {
        let index = self.matrices.len();
        let tensor = self.packed(index, first, layer, op, 0)?;
        let Tensor { n, k, .. } = tensor;
        let mut columns = n as usize;
        for &role in others {
            let tensor = self.packed(index, role, layer, op, columns)?;
            if !op.is_gated() {
                columns += tensor.n as usize;
            }
        }
        let dtype = Self::format(&tensor)?.dtype();
        self.matrices.push(Matrix::new(op, dtype, columns, k as usize, self.threads, &mut self.at));
        Ok(index)
    }

    /// Plans one tensor of the matrix `matrix`, behind `columns` others.
    fn packed(
        &mut self,
        matrix: usize,
        role: Role,
        layer: Option<u32>,
        op: Op,
        columns: usize,
    ) -> Result<Tensor, EngineError> {
        let tensor = self.tensor(role, layer)?;
        let map = match (op.is_gated(), role) {
            (true, Role::Up) => ColumnMap::UP,
            (true, _) => ColumnMap::GATE,
            (false, _) => ColumnMap::after(columns),
        };
        let destination = Destination::Packed { matrix, map, format: Self::format(&tensor)? };
        match tensor.group_len {
            None => self.tensors.push(PlannedTensor { tensor, row_bytes: Self::row_bytes(&tensor)?, destination }),
            Some(group_len) => {
                // The scales come behind all codes: those are packed as they are and scaled where they lie.
                let codes_bytes = Self::codes_bytes(&tensor, group_len)?;
                let codes = Tensor { len_bytes: codes_bytes, ..tensor };
                self.tensors.push(PlannedTensor { tensor: codes, row_bytes: tensor.k as usize, destination });
                let (offset, len_bytes) = (tensor.offset + codes_bytes, tensor.len_bytes - codes_bytes);
                let scales = Tensor { offset, len_bytes, ..tensor };
                let destination = Destination::Scales { matrix, map, group_len: group_len as usize };
                self.tensors.push(PlannedTensor { tensor: scales, row_bytes: SCALE_BYTES as usize, destination });
            }
        }
        Ok(tensor)
    }

    /// Bytes of the codes of a tensor with groups, whose length is checked.
    fn codes_bytes(tensor: &Tensor, group_len: u32) -> Result<u64, EngineError> {
        let Tensor { n, k, len_bytes, .. } = *tensor;
        let elements = tensor.elements();
        let groups = elements / u64::from(group_len).max(1);
        let whole = elements > 0 && groups * u64::from(group_len) == elements;
        if whole && len_bytes == elements + SCALE_BYTES * groups {
            Ok(elements)
        } else {
            Err(EngineError::Shape { name: tensor.name(), n, k, len_bytes })
        }
    }

    fn same_type(&self, roles: &[Role], layer: Option<u32>) -> Result<bool, EngineError> {
        let mut types = Vec::with_capacity(roles.len());
        for &role in roles {
            types.push(Self::format(&self.tensor(role, layer)?)?.dtype());
        }
        Ok(types.windows(2).all(|pair| pair[0] == pair[1]))
    }

    fn layer(&mut self, number: u32) -> Result<LayerWeights, EngineError> {
        let layer = Some(number);
        let config = self.config;
        let blueprint = config.architecture.blueprint();
        let window = config.layer_window(number).map_or(usize::MAX, |window| window as usize);
        let (base, scale) = config.layer_rope(number);
        let rope = self.rope(RopeParameters { base, scale });
        let attn_norm = self.norm(layer, Role::AttnNorm, Role::AttnNormBias)?;
        let is_whole = blueprint.layer.contains(&Role::Qkv);
        let qkv = if is_whole {
            QkvWeights::Fused(self.matrix(Op::Qkv, layer, Role::Qkv, &[])?)
        } else if self.same_type(&[Role::Q, Role::K, Role::V], layer)? {
            QkvWeights::Fused(self.matrix(Op::Qkv, layer, Role::Q, &[Role::K, Role::V])?)
        } else {
            QkvWeights::Separate {
                q: self.matrix(Op::Matmul, layer, Role::Q, &[])?,
                k: self.matrix(Op::Matmul, layer, Role::K, &[])?,
                v: self.matrix(Op::Matmul, layer, Role::V, &[])?,
            }
        };
        let qkv_bias = match self.optional_vector(layer, Role::QkvBias)? {
            Some(Vector { start, .. }) => {
                let (q, kv) = (config.q_dim() as usize, config.kv_dim() as usize);
                [(0, q), (q, kv), (q + kv, kv)].map(|(at, len)| Some(Vector { start: start + at, len }))
            }
            None => [
                self.optional_vector(layer, Role::QBias)?,
                self.optional_vector(layer, Role::KBias)?,
                self.optional_vector(layer, Role::VBias)?,
            ],
        };
        let q_norm = self.optional_vector(layer, Role::QNorm)?;
        let k_norm = self.optional_vector(layer, Role::KNorm)?;
        let attn_post_norm = self.optional_vector(layer, Role::AttnPostNorm)?;
        let attn_out_op = if attn_post_norm.is_some() { Op::Matmul } else { Op::MatmulResidual };
        let attn_out = self.matrix(attn_out_op, layer, Role::AttnOut, &[])?;
        let attn_out_bias = self.optional_vector(layer, Role::AttnOutBias)?;
        let ffn_norm = self.norm(layer, Role::FfnNorm, Role::FfnNormBias)?;
        let up = if !blueprint.is_gated() {
            let up = self.matrix(Op::Matmul, layer, Role::Up, &[])?;
            UpWeights::Plain { up, bias: self.optional_vector(layer, Role::UpBias)? }
        } else if self.same_type(&[Role::Gate, Role::Up], layer)? {
            let op = match blueprint.activation {
                Activation::Silu => Op::GateUpSilu,
                Activation::Gelu => Op::GateUpGelu,
            };
            UpWeights::Fused(self.matrix(op, layer, Role::Gate, &[Role::Up])?)
        } else {
            UpWeights::Separate {
                gate: self.matrix(Op::Matmul, layer, Role::Gate, &[])?,
                up: self.matrix(Op::Matmul, layer, Role::Up, &[])?,
            }
        };
        let ffn_post_norm = self.optional_vector(layer, Role::FfnPostNorm)?;
        let down_op = if ffn_post_norm.is_some() { Op::Matmul } else { Op::MatmulResidual };
        let down = self.matrix(down_op, layer, Role::Down, &[])?;
        let down_bias = self.optional_vector(layer, Role::DownBias)?;
        Ok(LayerWeights {
            attn_norm,
            qkv,
            qkv_bias,
            q_norm,
            k_norm,
            window,
            rope,
            attn_out,
            attn_out_bias,
            attn_post_norm,
            ffn_norm,
            up,
            down,
            down_bias,
            ffn_post_norm,
        })
    }

    /// Index of the table with these parameters.
    fn rope(&mut self, parameters: RopeParameters) -> usize {
        match self.ropes.iter().position(|known| *known == parameters) {
            Some(index) => index,
            None => {
                self.ropes.push(parameters);
                self.ropes.len() - 1
            }
        }
    }

    fn norm(&mut self, layer: Option<u32>, gain: Role, bias: Role) -> Result<NormWeights, EngineError> {
        Ok(NormWeights { gain: self.vector(self.tensor(gain, layer)?)?, bias: self.optional_vector(layer, bias)? })
    }

    fn optional_vector(&mut self, layer: Option<u32>, role: Role) -> Result<Option<Vector>, EngineError> {
        match self.find(role, layer) {
            Some(tensor) => self.vector(tensor).map(Some),
            None => Ok(None),
        }
    }

    fn vector(&mut self, tensor: Tensor) -> Result<Vector, EngineError> {
        if tensor.ty != TensorType::F32 {
            return Err(EngineError::UnsupportedType { name: tensor.name(), found: tensor.ty.name() });
        }
        let row_bytes = Self::row_bytes(&tensor)?;
        let vector = Vector { start: self.vectors, len: tensor.k as usize };
        self.vectors += vector.len;
        self.tensors.push(PlannedTensor { tensor, row_bytes, destination: Destination::Vector { at: vector.start } });
        Ok(vector)
    }

    /// Keeps a matrix as the file has it: its rows are read one at a time.
    fn rows(&mut self, role: Role) -> Result<Embedding, EngineError> {
        let tensor = self.tensor(role, None)?;
        let Tensor { n, k, len_bytes, ty, group_len, .. } = tensor;
        Self::format(&tensor)?;
        let shape = || EngineError::Shape { name: tensor.name(), n, k, len_bytes };
        let bytes = self.at..self.at + usize::try_from(len_bytes).map_err(|_| shape())?;
        self.at = bytes.end.next_multiple_of(WEIGHT_ALIGN);
        let row_bytes = match group_len {
            // The scales are kept, too: whatever comes is stored where it belongs.
            Some(group_len) => Self::codes_bytes(&tensor, group_len).map(|_| 1)?,
            None => Self::row_bytes(&tensor)?,
        };
        let destination = Destination::Rows { bytes: bytes.clone() };
        self.tensors.push(PlannedTensor { tensor, row_bytes, destination });
        Ok(match group_len {
            Some(group_len) => {
                Embedding::Groups { bytes, codes: n as usize * k as usize, group_len: group_len as usize }
            }
            None => Embedding::Rows { bytes, row_bytes, ty },
        })
    }
}
