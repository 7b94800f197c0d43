//! llama2.c model files: the legacy `.bin` (version 0, F32) and its `tokenizer.bin`.
//!
//! Layout: seven `i32` (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then all weights as f32, each
//! kind for all layers in a row: embedding, attention norms, wq, wk, wv, wo, feed-forward norms, w1 (gate), w2 (down),
//! w3 (up), final norm, two rotary tables that nothing reads, and the classifier unless `vocab_size` is positive (shared).
//! Input: header bytes and file length -> [`ModelDescription`]. Not here: versions 1 and 2 (they are named in the error).
//!
//! # Source
//! `export.py` (`legacy_export`) and `run.c` of llama2.c.

use crate::architecture::Architecture;
use crate::config::Config;
use crate::cursor::Cursor;
use crate::description::{Format, ModelDescription, Role, Tensor, check_tensors};
use crate::error::ModelError;
use crate::formats;
use crate::quant::TensorType;
use crate::tokenizer::{Spm, TokenKind, Tokenizer, Vocab, parse_byte_token};
use alloc::string::String;
use alloc::vec::Vec;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 28;
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
    /// Configuration; `tied_head` is the file's "shared classifier".
    pub config: Config,
}

impl Header {
    /// Reads the header of a version 0 file.
    ///
    /// # Errors
    /// [`ModelError::Truncated`], [`ModelError::UnsupportedVersion`], or [`ModelError::UnknownFormat`] when the numbers
    /// describe no model.
    pub fn parse(header: &[u8], file_bytes: u64) -> Result<Self, ModelError> {
        let mut cursor = Cursor::new(header, file_bytes);
        let mut field = || cursor.u32("the llama2.c header");
        let first = field()?;
        if first == VERSIONED_MAGIC {
            return Err(ModelError::UnsupportedVersion {
                format: "llama2.c",
                found: field()?,
                supported: "0 (legacy)",
                advice: "export the model again with `export.py --version 0`",
            });
        }
        let numbers = [first, field()?, field()?, field()?, field()?, field()?, field()?].map(u32::cast_signed);
        let [dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len] = numbers;
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
            tied_head: vocab_size > 0,
        };
        // The format has no magic number: numbers that make no model mean that the file is something else.
        if config.check().is_err() || config.q_dim() != config.dim {
            return Err(formats::unknown(header));
        }
        Ok(Header { config })
    }

    /// Every tensor with its place, in file order, and the length of the whole file.
    pub fn tensors(&self) -> (Vec<Tensor>, u64) {
        const ORDER: [Role; 9] =
            [Role::AttnNorm, Role::Q, Role::K, Role::V, Role::AttnOut, Role::FfnNorm, Role::Gate, Role::Down, Role::Up];
        let config = &self.config;
        let mut offset = HEADER_BYTES as u64;
        let mut tensors = Vec::new();
        let mut push = |role: Role, layer: Option<u32>, offset: &mut u64| {
            let (n, k) = role.shape(config);
            let len_bytes = 4 * u64::from(n) * u64::from(k);
            tensors.push(Tensor { role, layer, ty: TensorType::F32, n, k, offset: *offset, len_bytes });
            *offset += len_bytes;
        };
        push(Role::TokenEmbedding, None, &mut offset);
        for role in ORDER {
            for layer in 0..config.n_layers {
                push(role, Some(layer), &mut offset);
            }
        }
        push(Role::OutputNorm, None, &mut offset);
        // freq_cis_real and freq_cis_imag, (seq_len, head_dim / 2) each.
        offset += 4 * u64::from(config.seq_len) * u64::from(config.head_dim);
        if !config.tied_head {
            push(Role::Output, None, &mut offset);
        }
        (tensors, offset)
    }
}

/// Reads the beginning of a version 0 file of `file_bytes` and the whole tokenizer file that goes with it.
///
/// # Errors
/// [`ModelError::Truncated`] when `header` is shorter than [`HEADER_BYTES`]; a file length that differs from what the
/// header calls for; a tokenizer of another vocabulary.
pub fn read(header: &[u8], file_bytes: u64, tokenizer_bin: &[u8]) -> Result<ModelDescription, ModelError> {
    let header = Header::parse(header, file_bytes)?;
    let (tensors, expected_bytes) = header.tensors();
    if file_bytes < expected_bytes {
        let (what, at_byte) = ("the weights", HEADER_BYTES as u64);
        return Err(ModelError::FileEnds { what, at_byte, need_bytes: expected_bytes, file_bytes });
    }
    if file_bytes > expected_bytes {
        return Err(ModelError::TrailingBytes { what: "the model file", expected_bytes, found_bytes: file_bytes });
    }
    Ok(ModelDescription {
        format: Format::Llama2c,
        name: String::new(),
        tensors: check_tensors(&header.config, tensors, file_bytes)?,
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
    const WHAT: &str = "the tokenizer file";
    let mut cursor = Cursor::new(bytes, bytes.len() as u64);
    // The longest token's length is a buffer size for run.c; nothing here depends on it.
    cursor.u32(WHAT)?;
    cursor.require(u64::from(vocab_size) * 8, WHAT)?;
    let mut scores = Vec::with_capacity(vocab_size as usize);
    let mut tokens = Vec::with_capacity(vocab_size as usize);
    for id in 0..vocab_size {
        scores.push(f32::from_bits(cursor.u32(WHAT)?));
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
        tokens.push((if kind == TokenKind::Control { text.trim_ascii() } else { text }, kind));
    }
    if cursor.pos() != bytes.len() as u64 {
        let (expected_bytes, found_bytes) = (cursor.pos(), bytes.len() as u64);
        return Err(ModelError::TrailingBytes { what: WHAT, expected_bytes, found_bytes });
    }
    let vocab = Vocab::sentence_piece(tokens.into_iter(), vocab_size as usize)?;
    let mut tokenizer = Tokenizer::sentence_piece(Spm::new(&vocab, scores, true)?, vocab);
    let mut special = tokenizer.special().clone();
    (special.bos, special.eos, special.unknown) = (Some(BOS), Some(EOS), Some(UNK));
    // run.c stops at BOS, which separates texts in its training data; its chat mode stops at EOS.
    special.eog.push(BOS);
    tokenizer.set_special(special)?;
    Ok(tokenizer)
}
