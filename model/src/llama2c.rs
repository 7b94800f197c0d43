//! llama2.c model files, versions 0 and 1 (F32) and 2 (int8), and their `tokenizer.bin`.
//!
//! Version 0: seven `i32` (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then all weights as f32,
//! each kind for all layers in a row: embedding, attention norms, wq, wk, wv, wo, feed-forward norms, w1 (gate), w2 (down),
//! w3 (up), final norm, two rotary tables that nothing reads, and the classifier unless `vocab_size` is positive (shared).
//! Version 1: magic `ak42` and version as `u32`, the same seven numbers, one byte that says whether the classifier is shared,
//! zeros up to byte 256; then attention norms, feed-forward norms, final norm, embedding, wq, wk, wv, wo, w1, w2, w3 and
//! the classifier unless shared.
//! Version 2: as version 1, with the group size as `i32` behind the byte of the classifier; then all norms as f32, and of
//! each matrix in the order of version 1 its int8 codes and one f32 scale for each group of codes. Groups go through the
//! rows of a matrix without regard to their ends.
//! Input: header bytes and file length -> [`ModelDescription`].
//!
//! # Source
//! `export.py` (`legacy_export`, `version1_export`, `version2_export`), `run.c` and `runq.c` of llama2.c.

use crate::architecture::Architecture;
use crate::config::Config;
use crate::cursor::Cursor;
use crate::description::{Format, ModelDescription, Role, Tensor, check_tensors, grouped_bytes, uneven_groups};
use crate::error::ModelError;
use crate::formats;
use crate::gguf::{Value, WriteError, Writer};
use crate::quant::TensorType;
use crate::tokenizer::{Spm, TokenKind, Tokenizer, Vocab, parse_byte_token};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Bytes of the header of version 0.
pub const HEADER_BYTES: usize = 28;
/// Bytes in front of the weights of versions 1 and 2.
pub const VERSIONED_HEADER_BYTES: usize = 256;
/// `ak42`, the magic number of versions 1 and 2.
const VERSIONED_MAGIC: u32 = 0x616b_3432;
/// RMSNorm epsilon, a constant of `run.c`.
const NORM_EPS: f32 = 1e-5;
/// Rotary base, a constant of `run.c`.
const ROPE_BASE: f32 = 10_000.0;
/// Token ids that llama2.c fixes: unknown, begin, end.
const UNK: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;

/// The seven numbers, checked.
#[derive(Clone, PartialEq, Debug)]
pub struct Header {
    /// Version of the format: 0, 1 or 2.
    pub version: u32,
    /// Weights that share a scale; version 2 only.
    pub group_len: Option<u32>,
    /// Configuration; `tied_head` is the file's "shared classifier".
    pub config: Config,
}

impl Header {
    /// Reads the header.
    ///
    /// # Errors
    /// [`ModelError::Truncated`], [`ModelError::UnsupportedVersion`], [`ModelError::InvalidValue`] for a group size below 1,
    /// or [`ModelError::UnknownFormat`] when the numbers describe no model.
    pub fn parse(header: &[u8], file_bytes: u64) -> Result<Self, ModelError> {
        let mut cursor = Cursor::new(header, file_bytes);
        const WHAT: &str = "the llama2.c header";
        let mut first = cursor.u32(WHAT)?;
        let version = if first == VERSIONED_MAGIC { cursor.u32(WHAT)? } else { 0 };
        if first == VERSIONED_MAGIC {
            if !matches!(version, 1 | 2) {
                return Err(ModelError::UnsupportedVersion {
                    format: "llama2.c",
                    found: version,
                    supported: "0 and 1 (F32) and 2 (int8)",
                    advice: "export the model again with `export.py --version 1` or 2",
                });
            }
            first = cursor.u32(WHAT)?;
        }
        let mut field = || cursor.u32(WHAT);
        let numbers = [first, field()?, field()?, field()?, field()?, field()?, field()?].map(u32::cast_signed);
        let [dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len] = numbers;
        let tied_head = match version {
            0 => vocab_size > 0,
            _ => cursor.array::<1>(WHAT)? != [0],
        };
        let group_size = if version == 2 { Some(cursor.u32(WHAT)?.cast_signed()) } else { None };
        let positive = |value: i32| u32::try_from(value).unwrap_or(0);
        let head_dim = positive(dim).checked_div(positive(n_heads)).unwrap_or(0);
        let config = Config {
            architecture: Architecture::Llama,
            dim: positive(dim),
            hidden_dim: positive(hidden_dim),
            n_layers: positive(n_layers),
            n_heads: positive(n_heads),
            n_kv_heads: positive(n_kv_heads),
            head_dim,
            vocab_size: vocab_size.unsigned_abs(),
            seq_len: positive(seq_len),
            rope_base: ROPE_BASE,
            rope_dim: head_dim,
            rope_scale: 1.0,
            window: 0,
            embedding_scale: 1.0,
            query_scale: 1.0,
            norm_eps: NORM_EPS,
            tied_head,
        };
        // The format has no magic number: numbers that make no model mean that the file is something else.
        let is_model = config.check().is_ok() && config.q_dim() == config.dim;
        if !is_model || version != 0 && vocab_size < 0 {
            return Err(formats::unknown(header));
        }
        if let Some(size) = group_size.filter(|&size| size < 1) {
            let (key, expected) = ("group_size".to_string(), "a number of weights above zero".to_string());
            return Err(ModelError::InvalidValue { key, found: size.to_string(), expected });
        }
        Ok(Header { version, group_len: group_size.map(positive), config })
    }

    /// Every tensor with its place, in file order, and the length of the whole file.
    pub fn tensors(&self) -> (Vec<Tensor>, u64) {
        let mut tensors = Vec::new();
        let end = self.each_role(&mut |first, layers| {
            for layer in 0..layers {
                let offset = first.offset + u64::from(layer) * first.len_bytes;
                tensors.push(Tensor { layer: first.layer.map(|_| layer), offset, ..first });
            }
        });
        (tensors, end)
    }

    /// Calls `visit` with the first tensor of each role, in file order, and their number; returns the length of the file.
    fn each_role(&self, visit: &mut dyn FnMut(Tensor, u32)) -> u64 {
        use Role::{AttnNorm, AttnOut, Down, FfnNorm, Gate, K, Output, OutputNorm, Q, TokenEmbedding, Up, V};
        let legacy = [TokenEmbedding, AttnNorm, Q, K, V, AttnOut, FfnNorm, Gate, Down, Up, OutputNorm, Output];
        let versioned = [AttnNorm, FfnNorm, OutputNorm, TokenEmbedding, Q, K, V, AttnOut, Gate, Down, Up, Output];
        let config = &self.config;
        let is_legacy = self.version == 0;
        let mut offset = if is_legacy { HEADER_BYTES } else { VERSIONED_HEADER_BYTES } as u64;
        for role in if is_legacy { legacy } else { versioned } {
            if role == Output && is_legacy {
                // freq_cis_real and freq_cis_imag, (seq_len, head_dim / 2) each.
                offset = offset.saturating_add(4 * u64::from(config.seq_len) * u64::from(config.head_dim));
            }
            if role == Output && config.tied_head {
                continue;
            }
            let (n, k) = role.shape(config);
            let group_len = self.group_len.filter(|_| !role.is_vector());
            let (ty, len_bytes) = match group_len {
                // `read` has refused groups that do not come out even.
                Some(len) => (TensorType::I8, grouped_bytes(n, k, len).unwrap_or_default()),
                None => (TensorType::F32, 4 * u64::from(n) * u64::from(k)),
            };
            let (layer, layers) = if role.is_per_layer() { (Some(0), config.n_layers) } else { (None, 1) };
            visit(Tensor { role, layer, ty, group_len, n, k, offset, len_bytes }, layers);
            offset = offset.saturating_add(len_bytes.saturating_mul(layers.into()));
        }
        offset
    }
}

/// Reads the beginning of a file of `file_bytes` and the whole tokenizer file that goes with it.
///
/// # Errors
/// [`ModelError::Truncated`] when `header` is shorter than [`HEADER_BYTES`]; a file length that differs from what the
/// header calls for; a tokenizer of another vocabulary.
pub fn read(header: &[u8], file_bytes: u64, tokenizer_bin: &[u8]) -> Result<ModelDescription, ModelError> {
    let header = Header::parse(header, file_bytes)?;
    let mut uneven = None;
    // The length first, so that the list of tensors is no longer than the file justifies.
    let expected_bytes = header.each_role(&mut |tensor, _| {
        let Tensor { role, layer, group_len, n, k, .. } = tensor;
        if let Some(group_len) = group_len.filter(|&len| grouped_bytes(n, k, len).is_none()) {
            uneven.get_or_insert_with(|| uneven_groups(role, layer, (n, k), group_len));
        }
    });
    if let Some(error) = uneven {
        return Err(error);
    }
    if file_bytes < expected_bytes {
        let (what, at_byte) = ("the weights", HEADER_BYTES as u64);
        return Err(ModelError::FileEnds { what, at_byte, need_bytes: expected_bytes, file_bytes });
    }
    if file_bytes > expected_bytes {
        return Err(ModelError::TrailingBytes { what: "the model file", expected_bytes, found_bytes: file_bytes });
    }
    Ok(ModelDescription {
        format: Format::Llama2c { version: header.version },
        name: String::new(),
        tensors: check_tensors(&header.config, header.tensors().0, file_bytes)?,
        tokenizer: read_tokenizer(tokenizer_bin, header.config.vocab_size)?,
        config: header.config,
        chat_template: None,
        file_bytes,
    })
}

/// Reads a whole `tokenizer.bin`: the longest token's length, then score, length and bytes of each token.
///
/// # Errors
/// [`ModelError::FileEnds`] and [`ModelError::TrailingBytes`] when it does not hold exactly `vocab_size` tokens;
/// [`ModelError::Tokenizer`] when they make no vocabulary.
pub fn read_tokenizer(bytes: &[u8], vocab_size: u32) -> Result<Tokenizer, ModelError> {
    let pieces = read_pieces(bytes, vocab_size)?;
    let scores = pieces.iter().map(|piece| piece.score).collect();
    let tokens = pieces.iter().map(|piece| (piece.text, piece.kind));
    let vocab = Vocab::sentence_piece(tokens, pieces.len())?;
    let mut tokenizer = Tokenizer::sentence_piece(Spm::new(&vocab, scores, true)?, vocab);
    let mut special = tokenizer.special().clone();
    (special.bos, special.eos, special.unknown) = (Some(BOS), Some(EOS), Some(UNK));
    // run.c stops at BOS, which separates texts in its training data; its chat mode stops at EOS.
    special.eog.push(BOS);
    tokenizer.set_special(special)?;
    Ok(tokenizer)
}

/// One token of a `tokenizer.bin`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    /// Its text; those of kind [`TokenKind::Byte`] are written `<0x41>`.
    text: &'a [u8],
    score: f32,
    kind: TokenKind,
}

/// The tokens of a whole `tokenizer.bin`, by id.
pub(crate) fn read_pieces(bytes: &[u8], vocab_size: u32) -> Result<Vec<Piece<'_>>, ModelError> {
    const WHAT: &str = "the tokenizer file";
    let mut cursor = Cursor::new(bytes, bytes.len() as u64);
    // The longest token's length is a buffer size for run.c; nothing here depends on it.
    cursor.u32(WHAT)?;
    cursor.require(u64::from(vocab_size) * 8, WHAT)?;
    let mut pieces = Vec::with_capacity(vocab_size as usize);
    for id in 0..vocab_size {
        let score = f32::from_bits(cursor.u32(WHAT)?);
        // A negative length reads as one far beyond the file.
        let len = cursor.u32(WHAT)?;
        let text = cursor.take(len.into(), WHAT)?;
        let kind = match id {
            UNK => TokenKind::Unknown,
            BOS | EOS => TokenKind::Control,
            _ if parse_byte_token(text).is_some() => TokenKind::Byte,
            _ => TokenKind::Normal,
        };
        // run.c's exporter writes `<s>` as "\n<s>\n".
        pieces.push(Piece { text: if kind == TokenKind::Control { text.trim_ascii() } else { text }, score, kind });
    }
    if cursor.pos() != bytes.len() as u64 {
        let (expected_bytes, found_bytes) = (cursor.pos(), bytes.len() as u64);
        return Err(ModelError::TrailingBytes { what: WHAT, expected_bytes, found_bytes });
    }
    Ok(pieces)
}

/// Writes the tokens of a `tokenizer.bin` as GGUF metadata that means the same: [`read_tokenizer`] of the file and
/// [`crate::gguf::read`] of the metadata make the same tokenizer.
pub(crate) fn write_pieces(pieces: &[Piece<'_>], writer: &mut Writer) -> Result<(), WriteError> {
    // Special tokens are taken literally on both sides.
    let text = |piece: &Piece<'_>| match piece.kind.is_special() {
        true => piece.text.to_vec(),
        false => piece.text.split(|&byte| byte == b' ').collect::<Vec<_>>().join(Vocab::SPACE),
    };
    let texts: Vec<Vec<u8>> = pieces.iter().map(text).collect();
    let scores: Vec<f32> = pieces.iter().map(|piece| piece.score).collect();
    let kinds: Vec<i32> = pieces.iter().map(|piece| piece.kind.to_gguf()).collect();
    writer.set("tokenizer.ggml.model", Value::String("llama"))?;
    writer.set_strings("tokenizer.ggml.tokens", &texts)?;
    writer.set_f32s("tokenizer.ggml.scores", &scores)?;
    writer.set_i32s("tokenizer.ggml.token_type", &kinds)?;
    // A second token that ends a generation, as BOS does here, is what GGUF calls "end of turn".
    for (name, id) in [("unknown", UNK), ("bos", BOS), ("eos", EOS), ("eot", BOS)] {
        writer.set(&format!("tokenizer.ggml.{name}_token_id"), Value::U32(id))?;
    }
    for (name, adds) in [("bos_token", true), ("eos_token", false), ("space_prefix", true)] {
        writer.set(&format!("tokenizer.ggml.add_{name}"), Value::Bool(adds))?;
    }
    Ok(())
}
