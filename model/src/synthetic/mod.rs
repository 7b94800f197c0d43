//! Tiny models made from a seed: test and demonstration data, not trained on anything.
//!
//! Input: a [`Spec`]. Output: the bytes of a complete model file, GGUF ([`gguf`]) or llama2.c ([`llama2c`]), the same on
//! every machine. A weight depends on the seed, its role and its layer only, so the same spec in two formats or two
//! storage types holds the same numbers. The text such a model writes is noise; what matters is that it is always the
//! same noise, and that greedy decoding has margins far above rounding errors (`tests/synthetic.rs` checks them with an
//! independent forward pass).

mod vocabulary;

pub use vocabulary::TokenizerKind;

use crate::architecture::{Architecture, Positions};
use crate::config::Config;
use crate::description::Role;
use crate::gguf::{self as gguf_format, Value, WriteError, Writer};
use crate::order::sorted_by_key;
use crate::quant::{QuantError, TensorType, quantise};
use crate::{ModelError, llama2c as llama2c_format};
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

/// Of seeds 0 to 3999 the one whose default models decide most clearly (`search_seeds` in `tests/synthetic.rs`).
const DEFAULT_SEED: u64 = 412;

/// What to make. Every combination that [`Config::check`] accepts works; quantised types need rows of whole blocks.
#[derive(Clone, PartialEq, Debug)]
pub struct Spec {
    /// Model family.
    pub architecture: Architecture,
    /// Embedding length.
    pub dim: u32,
    /// Inner length of the feed-forward block.
    pub hidden_dim: u32,
    /// Layers.
    pub n_layers: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads.
    pub n_kv_heads: u32,
    /// Length of a head; `n_heads * head_dim` may differ from `dim` (not in llama2.c files).
    pub head_dim: u32,
    /// Context length.
    pub seq_len: u32,
    /// Rotary base.
    pub rope_base: f32,
    /// Factor by which the context is stretched linearly; 1 for none.
    pub rope_stretch: f32,
    /// The file has a tensor of divisors of the rotary frequencies.
    pub rope_factors: bool,
    /// Tokens that layers with a window see, where the family has such layers; 0 for none.
    pub window: u32,
    /// The head is the embedding.
    pub tied_head: bool,
    /// Storage type of every matrix not listed in `overrides`.
    pub matrices: TensorType,
    /// Other storage types for some roles.
    pub overrides: Vec<(Role, TensorType)>,
    /// Vocabulary and tokenizer.
    pub tokenizer: TokenizerKind,
    /// Seed of the weights.
    pub seed: u64,
}

impl Default for Spec {
    /// 2 layers of dim 64, 4 heads on 2 kv heads, hidden 96, tied head, F32, byte-level BPE: 0.4 MB.
    fn default() -> Self {
        Spec {
            architecture: Architecture::Llama,
            dim: 64,
            hidden_dim: 96,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            seq_len: 256,
            rope_base: 10_000.0,
            rope_stretch: 1.0,
            rope_factors: false,
            window: 0,
            tied_head: true,
            matrices: TensorType::F32,
            overrides: Vec::new(),
            tokenizer: TokenizerKind::ByteLevel,
            seed: DEFAULT_SEED,
        }
    }
}

/// One model for every way through the forward pass, by name: what other programs' results are recorded for.
pub fn gallery() -> Vec<(&'static str, Spec)> {
    let llama = Spec::default();
    Vec::from([
        ("llama", llama.clone()),
        ("llama_untied", Spec { tied_head: false, tokenizer: TokenizerKind::SentencePiece, ..llama.clone() }),
        ("llama_linear", Spec { rope_stretch: 4.0, ..llama.clone() }),
        ("llama_factors", Spec { rope_factors: true, ..llama.clone() }),
        ("llama_windowed", Spec { window: 11, ..llama }),
        ("qwen2", Spec::of(Architecture::Qwen2)),
        ("qwen3", Spec::of(Architecture::Qwen3)),
        ("gemma3", Spec::of(Architecture::Gemma3)),
        ("gpt2", Spec::of(Architecture::Gpt2)),
    ])
}

/// A spec that cannot be written.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum SyntheticError {
    /// The numbers make no model.
    #[error(transparent)]
    Config(#[from] ModelError),
    /// The storage type cannot be written, or the rows are not whole blocks.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// The file cannot be laid out.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// llama2.c files cannot express the spec.
    #[error("a llama2.c file needs {0}")]
    NotLlama2c(&'static str),
}

impl Spec {
    /// A model of `architecture` that exercises all it has; else as the default.
    pub fn of(architecture: Architecture) -> Self {
        let base = Spec { architecture, ..Spec::default() };
        match architecture {
            Architecture::Llama | Architecture::Qwen2 => base,
            // Heads that do not add up to `dim`.
            Architecture::Qwen3 => Spec { head_dim: 32, rope_base: 1_000_000.0, ..base },
            Architecture::Gemma3 => Spec {
                n_layers: 7,
                head_dim: 32,
                n_kv_heads: 1,
                rope_base: 1_000_000.0,
                window: 8,
                tokenizer: TokenizerKind::SentencePiece,
                ..base
            },
            Architecture::Gpt2 => Spec { n_kv_heads: base.n_heads, ..base },
        }
    }

    /// The configuration a reader will find.
    pub fn config(&self) -> Config {
        let mut config = Config {
            architecture: self.architecture,
            dim: self.dim,
            hidden_dim: self.hidden_dim,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            vocab_size: self.tokenizer.vocab_size(),
            seq_len: self.seq_len,
            rope_base: self.rope_base,
            rope_dim: if self.is_rotary() { self.head_dim } else { 0 },
            rope_scale: 1.0 / self.rope_stretch,
            window: self.window,
            embedding_scale: 1.0,
            query_scale: 1.0,
            norm_eps: 1e-5,
            tied_head: self.tied_head,
        };
        (self.architecture.blueprint().derive)(&mut config);
        config
    }

    fn is_rotary(&self) -> bool {
        self.architecture.blueprint().positions != Positions::Learned
    }

    /// Storage type of a role.
    pub fn type_of(&self, role: Role) -> TensorType {
        // Position vectors stay F32 in real files, too.
        if role.is_vector() || role == Role::PositionEmbedding {
            return TensorType::F32;
        }
        self.overrides.iter().find(|(of, _)| *of == role).map_or(self.matrices, |&(_, ty)| ty)
    }

    /// The weights of one tensor before any quantisation, `(n, k)` row-major.
    ///
    /// Matrices are uniform with a variance that keeps activations near 1. Norm gains are near 1; those of the last norm
    /// have random signs, without which a tied head would only ever repeat the token it was given. Biases are small, rotary
    /// divisors between 1 and 4.
    pub fn weights(&self, role: Role, layer: Option<u32>) -> Vec<f32> {
        let (n, k) = role.shape(&self.config());
        let mut random = Random::new(self.seed, role, layer);
        // A uniform number in -1..1 has variance 1/3.
        let scale = match role {
            // What the pass multiplies it by is taken off again.
            Role::TokenEmbedding => 1.0 / self.config().embedding_scale,
            Role::PositionEmbedding => 0.5,
            Role::Q | Role::K => 1.5 * reciprocal_sqrt(k) * SQRT_3,
            Role::RopeFactors => 1.5,
            role if role.is_vector() => 0.2,
            _ => reciprocal_sqrt(k) * SQRT_3,
        };
        let count = n as usize * k as usize;
        let mut draw = || scale * random.uniform();
        let mut weights: Vec<f32> = (0..count).map(|_| draw()).collect();
        match role {
            Role::RopeFactors => weights.iter_mut().for_each(|divisor| *divisor += 2.5),
            role if role.is_gain() => {
                for gain in &mut weights {
                    let flip = role == Role::OutputNorm && gain.to_bits() & 1 == 1;
                    *gain = if flip { -1.0 - *gain } else { 1.0 + *gain };
                }
            }
            _ => {}
        }
        weights
    }
}

const SQRT_3: f32 = 1.732_050_8;

fn reciprocal_sqrt(k: u32) -> f32 {
    1.0 / libm::sqrtf(k as f32)
}

/// SplitMix64: every bit of the state reaches every bit of the output.
///
/// # Source
/// G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", 2014.
struct Random(u64);

impl Random {
    fn new(seed: u64, role: Role, layer: Option<u32>) -> Self {
        // Distinct streams: role in the high bits, layer from 1 below it.
        let stream = (role as u64) << 40 | layer.map_or(0, |layer| u64::from(layer) + 1);
        let mut random = Random(seed);
        Random(random.next() ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// In -1..1, a multiple of 2^-23: exact in f32 whatever the machine.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

/// All tensors of a spec in the order files list them.
fn roles(spec: &Spec) -> Vec<(Role, Option<u32>)> {
    let blueprint = spec.architecture.blueprint();
    let before = [Role::TokenEmbedding, Role::PositionEmbedding];
    let (first, last): (Vec<Role>, Vec<Role>) = blueprint.global.iter().partition(|role| before.contains(role));
    let factors = spec.rope_factors.then_some(Role::RopeFactors);
    let mut out: Vec<_> = first.into_iter().chain(factors).map(|role| (role, None)).collect();
    for layer in 0..spec.n_layers {
        out.extend(blueprint.layer.iter().map(|&role| (role, Some(layer))));
    }
    out.extend(last.into_iter().filter(|&role| role != Role::Output || !spec.tied_head).map(|role| (role, None)));
    out
}

/// A complete GGUF version 3 file.
///
/// # Errors
/// [`SyntheticError`] when the spec makes no model or a row is not whole blocks of its type.
pub fn gguf(spec: &Spec) -> Result<Vec<u8>, SyntheticError> {
    gguf_with(Writer::new(), spec)
}

/// A complete GGUF file begun by `writer`: another version or alignment, further metadata.
///
/// # Errors
/// As [`gguf`].
pub fn gguf_with(mut writer: Writer, spec: &Spec) -> Result<Vec<u8>, SyntheticError> {
    let config = spec.config();
    config.check()?;
    writer.set_config("synthetic", &config)?;
    if spec.rope_stretch != 1.0 {
        let name = config.architecture.name();
        writer.set(&format!("{name}.rope.scaling.type"), Value::String("linear"))?;
        writer.set(&format!("{name}.rope.scaling.factor"), Value::F32(spec.rope_stretch))?;
    }
    spec.tokenizer.write_gguf(&mut writer)?;

    let mut data = Vec::new();
    for (role, layer) in roles(spec) {
        let (n, k) = role.shape(&config);
        let dims = if role.is_vector() { Vec::from([u64::from(k)]) } else { Vec::from([k.into(), n.into()]) };
        let ty = spec.type_of(role);
        writer.tensor(&role.tensor_name(layer), &dims, ty)?;
        let mut bytes = Vec::new();
        quantise(ty, &spec.weights(role, layer), &mut bytes)?;
        data.push(bytes);
    }
    Ok(writer.file(|index| &data[index])?)
}

/// Weights that share a scale in the files of version 2.
const LLAMA2C_GROUP_LEN: u32 = 32;

/// A GGUF file with a hole in it: its bytes as pieces `(offset, bytes)` in ascending order, zeros between them.
pub type Pieces = Vec<(u64, Vec<u8>)>;

/// The model of the GGUF file `file` in one that is longer than `middle` bytes: its tensors are the same, but one of them
/// lies across byte `middle`, and those behind it follow. For readers that must count beyond 32 bits.
///
/// # Errors
/// What is wrong with `file`.
pub fn gguf_around(file: &[u8], middle: u64) -> Result<Pieces, ModelError> {
    let header = gguf_format::Header::parse(file, file.len() as u64)?;
    let tensors = sorted_by_key(&header.tensors, |tensor| tensor.offset);
    let Some(first) = tensors.get(tensors.len() / 2) else { return Ok(Vec::from([(0, file.to_vec())])) };
    let gap = middle.saturating_sub(first.offset + first.len_bytes / 2) / header.alignment * header.alignment;
    let (head, tail) = file.split_at(first.offset as usize);
    let mut head = head.to_vec();
    for tensor in tensors.iter().filter(|tensor| tensor.offset >= first.offset) {
        // A directory entry: name with its length, number of dimensions, dimensions, type, offset from the data's start.
        let mut entry = Vec::from((tensor.name.len() as u64).to_le_bytes());
        entry.extend(tensor.name.as_bytes());
        entry.extend((tensor.n_dims as u32).to_le_bytes());
        if let Some(at) = head.windows(entry.len()).position(|window| window == entry) {
            let at = at + entry.len() + 8 * tensor.n_dims + 4;
            head[at..at + 8].copy_from_slice(&(tensor.offset + gap - header.data_offset).to_le_bytes());
        }
    }
    Ok(Vec::from([(0, head), (first.offset + gap, tail.to_vec())]))
}

/// The two files of a llama2.c model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Llama2cFiles {
    /// The `.bin` file.
    pub model: Vec<u8>,
    /// The `tokenizer.bin` file.
    pub tokenizer: Vec<u8>,
}

/// A complete llama2.c model of version 0.
///
/// # Errors
/// [`SyntheticError::NotLlama2c`] for what the format cannot express: other types than F32, another tokenizer than
/// SentencePiece, another rotary base than 10000, heads that do not add up to `dim`.
pub fn llama2c(spec: &Spec) -> Result<Llama2cFiles, SyntheticError> {
    llama2c_version(spec, 0)
}

/// A complete llama2.c model of version 0, 1, or 2 (groups of 32; it stores the weights that `spec` has as F32).
///
/// # Errors
/// As [`llama2c`].
pub fn llama2c_version(spec: &Spec, version: u32) -> Result<Llama2cFiles, SyntheticError> {
    let config = spec.config();
    config.check()?;
    for (holds, need) in [
        (spec.architecture == Architecture::Llama, "the llama architecture"),
        (!spec.rope_factors && spec.rope_stretch == 1.0 && spec.window == 0, "plain rotary embedding and no window"),
        (spec.tokenizer == TokenizerKind::SentencePiece, "a SentencePiece tokenizer"),
        (roles(spec).iter().all(|&(role, _)| spec.type_of(role) == TensorType::F32), "F32 weights"),
        (config.q_dim() == config.dim, "n_heads * head_dim = dim"),
        (config.rope_base == 10_000.0, "rope_base = 10000"),
    ] {
        if !holds {
            return Err(SyntheticError::NotLlama2c(need));
        }
    }
    let is_legacy = version == 0;
    let vocab = config.vocab_size.cast_signed();
    let vocab = if config.tied_head || !is_legacy { vocab } else { -vocab };
    let mut model = Vec::new();
    if !is_legacy {
        model.extend(b"24ka");
        model.extend(version.to_le_bytes());
    }
    for value in [config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads] {
        model.extend(value.to_le_bytes());
    }
    model.extend(vocab.to_le_bytes());
    model.extend(config.seq_len.to_le_bytes());
    if !is_legacy {
        model.push(u8::from(config.tied_head));
    }
    let group_len = (version == 2).then_some(LLAMA2C_GROUP_LEN);
    model.extend(group_len.into_iter().flat_map(u32::to_le_bytes));
    let (tensors, file_bytes) = llama2c_format::Header { version, group_len, config }.tensors();
    for tensor in tensors {
        // The end of a header and the rotary tables before the classifier stay zero: nothing reads them.
        model.resize(tensor.offset as usize, 0);
        let weights = spec.weights(tensor.role, tensor.layer);
        match tensor.group_len {
            None => model.extend(weights.iter().flat_map(|weight| weight.to_le_bytes())),
            Some(group_len) => {
                let groups = weights.chunks(group_len as usize);
                let scales: Vec<f32> = groups.map(|g| g.iter().fold(0.0f32, |m, w| m.max(w.abs())) / 127.0).collect();
                let scale = |i: usize| scales[i / group_len as usize];
                let codes = weights.iter().enumerate().map(|(i, w)| libm::rintf(w / scale(i)) as i8);
                model.extend(codes.map(i8::cast_unsigned));
                model.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
            }
        }
    }
    model.resize(file_bytes as usize, 0);
    Ok(Llama2cFiles { model, tokenizer: spec.tokenizer.llama2c_file() })
}

/// The spec's name for reports, such as `synthetic-d64-l2-q4_1`.
impl core::fmt::Display for Spec {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Spec { architecture, dim, n_layers, .. } = self;
        let ty = self.matrices.to_string().to_ascii_lowercase();
        match architecture {
            Architecture::Llama => write!(f, "synthetic-d{dim}-l{n_layers}-{ty}"),
            other => write!(f, "synthetic-{other}-d{dim}-l{n_layers}-{ty}"),
        }
    }
}
