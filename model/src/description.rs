//! One description of a model for all file formats: configuration, where each weight lies, how text becomes tokens.
//!
//! Input: what a format's reader found. Output: a [`ModelDescription`] whose tensors are complete, have the shapes
//! the configuration calls for, lie inside the file and do not overlap; `engine` relies on that.
//! Not here: weights themselves; a description of a 100 MB file is a few MB (mostly the vocabulary).

use crate::chat::ChatTemplate;
use crate::config::Config;
use crate::error::{MAX_NAMES_LISTED, ModelError};
use crate::order::sorted_by_key;
use crate::quant::{SUPPORTED_NAMES, TensorType};
use crate::tokenizer::Tokenizer;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

/// File format a description was read from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Format {
    /// GGUF, version 2 or 3.
    Gguf {
        /// Version in the file.
        version: u32,
    },
    /// llama2.c `.bin` with a separate tokenizer file.
    Llama2c {
        /// Version of the format: 0 (legacy), 1 or 2 (int8).
        version: u32,
    },
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Gguf { version } => write!(f, "GGUF v{version}"),
            Format::Llama2c { version } => write!(f, "llama2.c v{version}"),
        }
    }
}

/// What a tensor is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Role {
    /// Token embeddings, `(vocab_size, dim)`; also the output head when that is tied.
    TokenEmbedding,
    /// Gain of the last norm, `(1, dim)`.
    OutputNorm,
    /// Output head, `(vocab_size, dim)`.
    Output,
    /// Gain of the norm before attention, `(1, dim)`.
    AttnNorm,
    /// Query projection, `(n_heads * head_dim, dim)`.
    Q,
    /// Key projection, `(n_kv_heads * head_dim, dim)`.
    K,
    /// Value projection, `(n_kv_heads * head_dim, dim)`.
    V,
    /// Attention output projection, `(dim, n_heads * head_dim)`.
    AttnOut,
    /// Gain of the norm before the feed-forward block, `(1, dim)`.
    FfnNorm,
    /// Gate projection, `(hidden_dim, dim)`.
    Gate,
    /// Up projection, `(hidden_dim, dim)`.
    Up,
    /// Down projection, `(dim, hidden_dim)`.
    Down,
    /// Vectors added to the embedding by position, `(seq_len, dim)`.
    PositionEmbedding,
    /// Bias of the last norm, `(1, dim)`.
    OutputNormBias,
    /// Divisors of the rotary frequencies, `(1, rope_dim / 2)`.
    RopeFactors,
    /// Bias of the norm before attention, `(1, dim)`.
    AttnNormBias,
    /// Query, key and value projection as one matrix, `((n_heads + 2 n_kv_heads) * head_dim, dim)`.
    Qkv,
    /// Bias of [`Role::Qkv`], `(1, (n_heads + 2 n_kv_heads) * head_dim)`.
    QkvBias,
    /// Bias of the queries, `(1, n_heads * head_dim)`.
    QBias,
    /// Bias of the keys, `(1, n_kv_heads * head_dim)`.
    KBias,
    /// Bias of the values, `(1, n_kv_heads * head_dim)`.
    VBias,
    /// Gain of the RMSNorm of each query head, `(1, head_dim)`.
    QNorm,
    /// Gain of the RMSNorm of each key head, `(1, head_dim)`.
    KNorm,
    /// Bias of the attention output, `(1, dim)`.
    AttnOutBias,
    /// Gain of the norm of the attention block's output, `(1, dim)`.
    AttnPostNorm,
    /// Bias of the norm before the feed-forward block, `(1, dim)`.
    FfnNormBias,
    /// Bias of the up projection, `(1, hidden_dim)`.
    UpBias,
    /// Bias of the down projection, `(1, dim)`.
    DownBias,
    /// Gain of the norm of the feed-forward block's output, `(1, dim)`.
    FfnPostNorm,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 29] = [
        Role::TokenEmbedding,
        Role::OutputNorm,
        Role::Output,
        Role::AttnNorm,
        Role::Q,
        Role::K,
        Role::V,
        Role::AttnOut,
        Role::FfnNorm,
        Role::Gate,
        Role::Up,
        Role::Down,
        Role::PositionEmbedding,
        Role::OutputNormBias,
        Role::RopeFactors,
        Role::AttnNormBias,
        Role::Qkv,
        Role::QkvBias,
        Role::QBias,
        Role::KBias,
        Role::VBias,
        Role::QNorm,
        Role::KNorm,
        Role::AttnOutBias,
        Role::AttnPostNorm,
        Role::FfnNormBias,
        Role::UpBias,
        Role::DownBias,
        Role::FfnPostNorm,
    ];

    /// The name in GGUF files, behind `blk.N.` for roles of a layer.
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Role::TokenEmbedding => "token_embd.weight",
            Role::OutputNorm => "output_norm.weight",
            Role::Output => "output.weight",
            Role::AttnNorm => "attn_norm.weight",
            Role::Q => "attn_q.weight",
            Role::K => "attn_k.weight",
            Role::V => "attn_v.weight",
            Role::AttnOut => "attn_output.weight",
            Role::FfnNorm => "ffn_norm.weight",
            Role::Gate => "ffn_gate.weight",
            Role::Up => "ffn_up.weight",
            Role::Down => "ffn_down.weight",
            Role::PositionEmbedding => "position_embd.weight",
            Role::OutputNormBias => "output_norm.bias",
            Role::RopeFactors => "rope_freqs.weight",
            Role::AttnNormBias => "attn_norm.bias",
            Role::Qkv => "attn_qkv.weight",
            Role::QkvBias => "attn_qkv.bias",
            Role::QBias => "attn_q.bias",
            Role::KBias => "attn_k.bias",
            Role::VBias => "attn_v.bias",
            Role::QNorm => "attn_q_norm.weight",
            Role::KNorm => "attn_k_norm.weight",
            Role::AttnOutBias => "attn_output.bias",
            Role::AttnPostNorm => "post_attention_norm.weight",
            Role::FfnNormBias => "ffn_norm.bias",
            Role::UpBias => "ffn_up.bias",
            Role::DownBias => "ffn_down.bias",
            Role::FfnPostNorm => "post_ffw_norm.weight",
        }
    }

    /// The tensor's full name: `output_norm.weight`, `blk.3.attn_q.weight`.
    pub fn tensor_name(self, layer: Option<u32>) -> String {
        match layer {
            Some(layer) => format!("blk.{layer}.{}", self.gguf_name()),
            None => self.gguf_name().to_string(),
        }
    }

    /// The inverse of [`Role::tensor_name`]; `None` for any other name.
    pub fn from_tensor_name(name: &str) -> Option<(Role, Option<u32>)> {
        let find = |per_layer: bool, name: &str| {
            Role::ALL.into_iter().find(|role| role.is_per_layer() == per_layer && role.gguf_name() == name)
        };
        let Some(rest) = name.strip_prefix("blk.") else { return find(false, name).map(|role| (role, None)) };
        let (layer, rest) = rest.split_once('.')?;
        let role = find(true, rest)?;
        let number: u32 = layer.parse().ok()?;
        // `+1` and `01` parse too; only the canonical form is this tensor's name.
        (number.to_string() == layer).then_some((role, Some(number)))
    }

    /// True for norms, biases and rotary factors, which are one row and stay F32 in every file.
    pub const fn is_vector(self) -> bool {
        !matches!(
            self,
            Role::TokenEmbedding
                | Role::PositionEmbedding
                | Role::Output
                | Role::Q
                | Role::K
                | Role::V
                | Role::Qkv
                | Role::AttnOut
                | Role::Gate
                | Role::Up
                | Role::Down
        )
    }

    /// True for the gains of norms: near 1 in any model.
    pub const fn is_gain(self) -> bool {
        matches!(
            self,
            Role::OutputNorm
                | Role::AttnNorm
                | Role::AttnPostNorm
                | Role::FfnNorm
                | Role::FfnPostNorm
                | Role::QNorm
                | Role::KNorm
        )
    }

    /// True when there is one such tensor in each layer.
    pub const fn is_per_layer(self) -> bool {
        !matches!(
            self,
            Role::TokenEmbedding
                | Role::PositionEmbedding
                | Role::OutputNorm
                | Role::OutputNormBias
                | Role::Output
                | Role::RopeFactors
        )
    }

    /// Shape `(n, k)` under `config`: `n` rows in the file (output columns of the product), `k` elements a row.
    pub fn shape(self, config: &Config) -> (u32, u32) {
        let Config { dim, hidden_dim, vocab_size, .. } = *config;
        let qkv_dim = config.q_dim().saturating_add(config.kv_dim().saturating_mul(2));
        match self {
            Role::TokenEmbedding | Role::Output => (vocab_size, dim),
            Role::PositionEmbedding => (config.seq_len, dim),
            Role::OutputNorm
            | Role::OutputNormBias
            | Role::AttnNorm
            | Role::AttnNormBias
            | Role::AttnPostNorm
            | Role::FfnNorm
            | Role::FfnNormBias
            | Role::FfnPostNorm
            | Role::AttnOutBias
            | Role::DownBias => (1, dim),
            Role::RopeFactors => (1, config.rope_dim / 2),
            Role::Q => (config.q_dim(), dim),
            Role::K | Role::V => (config.kv_dim(), dim),
            Role::Qkv => (qkv_dim, dim),
            Role::QBias => (1, config.q_dim()),
            Role::KBias | Role::VBias => (1, config.kv_dim()),
            Role::QkvBias => (1, qkv_dim),
            Role::QNorm | Role::KNorm => (1, config.head_dim),
            Role::AttnOut => (dim, config.q_dim()),
            Role::Gate | Role::Up => (hidden_dim, dim),
            Role::UpBias => (1, hidden_dim),
            Role::Down => (dim, hidden_dim),
        }
    }
}

/// One weight tensor and where its bytes lie. Rows follow each other without gaps, each of whole blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tensor {
    /// What it is for.
    pub role: Role,
    /// Layer from 0; `None` for roles that exist once.
    pub layer: Option<u32>,
    /// Storage type; always one with a kernel dtype, or I8 with groups.
    pub ty: TensorType,
    /// For I8: how many weights in a row, counted through the whole matrix, share a scale. Behind the `n * k` codes lie
    /// the `n * k / group_len` scales as f32; a weight is `f32(code) * scale`, rounded once.
    pub group_len: Option<u32>,
    /// Rows in the file: output columns of the product.
    pub n: u32,
    /// Elements in a row: length of the sum.
    pub k: u32,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len_bytes: u64,
}

impl Tensor {
    /// Name as GGUF writes it, for messages.
    pub fn name(&self) -> String {
        self.role.tensor_name(self.layer)
    }

    /// Weights.
    pub fn elements(&self) -> u64 {
        u64::from(self.n) * u64::from(self.k)
    }

    /// Byte after the last.
    pub fn end(&self) -> u64 {
        self.offset + self.len_bytes
    }
}

/// Everything about a model except its weights.
#[derive(Clone, Debug)]
pub struct ModelDescription {
    /// Format it was read from.
    pub format: Format,
    /// The model's own name, empty when the file has none.
    pub name: String,
    /// Hyperparameters.
    pub config: Config,
    /// All tensors, in file order (ascending offset): the order to stream and pack them.
    pub tensors: Vec<Tensor>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// How the model wants a conversation written, when the file says so.
    pub chat_template: Option<ChatTemplate>,
    /// Length of the whole file.
    pub file_bytes: u64,
}

impl ModelDescription {
    /// The tensor with this role; `layer` is `None` for global roles.
    pub fn tensor(&self, role: Role, layer: Option<u32>) -> Option<&Tensor> {
        self.tensors.iter().find(|t| t.role == role && t.layer == layer)
    }

    /// The matrix of the output head: `Output`, or `TokenEmbedding` when tied.
    pub fn head(&self) -> Option<&Tensor> {
        let role = if self.config.tied_head { Role::TokenEmbedding } else { Role::Output };
        self.tensor(role, None)
    }

    /// Weights stored in the file.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(Tensor::elements).sum()
    }

    /// Matrix storage types by falling share of bytes, such as `q4_1+q8_0`.
    pub fn dtypes(&self) -> String {
        let mut bytes: Vec<(TensorType, u64)> = Vec::new();
        for tensor in self.tensors.iter().filter(|t| !t.role.is_vector()) {
            match bytes.iter_mut().find(|(ty, _)| *ty == tensor.ty) {
                Some((_, sum)) => *sum += tensor.len_bytes,
                None => bytes.push((tensor.ty, tensor.len_bytes)),
            }
        }
        let bytes = sorted_by_key(&bytes, |&(ty, sum)| (core::cmp::Reverse(sum), ty));
        let names: Vec<String> = bytes.iter().map(|(ty, _)| ty.name().to_ascii_lowercase()).collect();
        names.join("+")
    }
}

/// Bytes of `(n, k)` int8 codes and the scales of their groups; `None` when the groups do not come out even.
pub(crate) fn grouped_bytes(n: u32, k: u32, group_len: u32) -> Option<u64> {
    let elements = u64::from(n) * u64::from(k);
    let groups = elements.checked_div(group_len.into())?;
    (groups * u64::from(group_len) == elements).then_some(elements + 4 * groups)
}

/// The error for groups of `group_len` that a matrix cannot be cut into.
pub(crate) fn uneven_groups(role: Role, layer: Option<u32>, (n, k): (u32, u32), group_len: u32) -> ModelError {
    let elements = u64::from(n) * u64::from(k);
    ModelError::InvalidValue {
        key: "group_size".to_string(),
        found: group_len.to_string(),
        expected: format!("a divisor of the {elements} weights of `{}`", role.tensor_name(layer)),
    }
}

/// Checks `tensors` against `config` and returns them in file order.
///
/// # Errors
/// The first of: a type that cannot run, a wrong shape, a partial block, a wrong length, a tensor outside the file or
/// the configuration, a duplicate, every missing tensor by name, an overlap.
pub fn check_tensors(config: &Config, tensors: Vec<Tensor>, file_bytes: u64) -> Result<Vec<Tensor>, ModelError> {
    for tensor in &tensors {
        check_tensor(config, tensor, file_bytes)?;
    }
    check_complete(config, &tensors)?;
    let tensors = sorted_by_key(&tensors, |t| t.offset);
    for (first, second) in tensors.iter().zip(tensors.iter().skip(1)) {
        if second.offset < first.end() {
            return Err(ModelError::Overlap { first: first.name(), second: second.name(), at_byte: second.offset });
        }
    }
    Ok(tensors)
}

fn check_tensor(config: &Config, tensor: &Tensor, file_bytes: u64) -> Result<(), ModelError> {
    let Tensor { role, layer, ty, group_len, n, k, offset, len_bytes } = *tensor;
    let name = || tensor.name();
    let layer_fits = match layer {
        Some(layer) => role.is_per_layer() && layer < config.n_layers,
        None => !(role.is_per_layer() || role == Role::Output && config.tied_head),
    };
    if !layer_fits || !config.architecture.blueprint().knows(role) {
        return Err(ModelError::UnexpectedTensor { tensor: name(), architecture: config.architecture.name() });
    }
    let is_grouped = ty == TensorType::I8 && group_len.is_some();
    if role.is_vector() && ty != TensorType::F32 {
        let supported = "F32 (norms and biases)";
        return Err(ModelError::UnsupportedTensorType { tensor: name(), found: ty.name(), supported });
    }
    if !ty.is_supported() && !is_grouped {
        return Err(ModelError::UnsupportedTensorType { tensor: name(), found: ty.name(), supported: SUPPORTED_NAMES });
    }
    let (rows, columns) = role.shape(config);
    if (n, k) != (rows, columns) {
        let dims = |n: u32, k: u32| if role.is_vector() && n == 1 { vec![k.into()] } else { vec![k.into(), n.into()] };
        return Err(ModelError::WrongShape { tensor: name(), expected: dims(rows, columns), found: dims(n, k) });
    }
    let row_bytes = ty.row_bytes(k.into()).ok_or_else(|| ModelError::PartialBlock {
        tensor: name(),
        row_len: k.into(),
        ty: ty.name(),
        block_len: ty.block_len(),
    })?;
    // At most 2^24 rows of 2^24 elements of 4 bytes, and of 4 bytes of scales: no overflow.
    let expected_bytes = match group_len {
        Some(group_len) => {
            grouped_bytes(n, k, group_len).ok_or_else(|| uneven_groups(role, layer, (n, k), group_len))?
        }
        None => row_bytes * u64::from(n),
    };
    if len_bytes != expected_bytes {
        return Err(ModelError::WrongLength { tensor: name(), expected_bytes, found_bytes: len_bytes });
    }
    match offset.checked_add(len_bytes) {
        Some(end) if end <= file_bytes => Ok(()),
        end => Err(ModelError::OutsideFile { tensor: name(), offset, end: end.unwrap_or(u64::MAX), file_bytes }),
    }
}

fn check_complete(config: &Config, tensors: &[Tensor]) -> Result<(), ModelError> {
    let present: Vec<(Option<u32>, Role)> = tensors.iter().map(|t| (t.layer, t.role)).collect();
    let present = sorted_by_key(&present, |&place| place);
    for (a, b) in present.iter().zip(present.iter().skip(1)) {
        if a == b {
            return Err(ModelError::Duplicate { what: "tensor", name: a.1.tensor_name(a.0) });
        }
    }
    let mut names = Vec::new();
    let mut count = 0;
    let blueprint = config.architecture.blueprint();
    let global = blueprint.global.iter().copied().filter(|&role| !(role == Role::Output && config.tied_head));
    let per_layer = (0..config.n_layers).flat_map(|layer| blueprint.layer.iter().map(move |&role| (Some(layer), role)));
    for wanted in global.map(|role| (None, role)).chain(per_layer) {
        if present.binary_search(&wanted).is_err() {
            count += 1;
            if names.len() < MAX_NAMES_LISTED {
                names.push(wanted.1.tensor_name(wanted.0));
            }
        }
    }
    if count > 0 { Err(ModelError::MissingTensors { names, count }) } else { Ok(()) }
}
