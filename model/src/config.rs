//! The numbers that fix a model's computation, the same for every file format.

use crate::architecture::{Architecture, Positions, Windowed};
use crate::error::ModelError;
use crate::scientific::Scientific;
use alloc::format;
use alloc::string::{String, ToString};
use serde::{Deserialize, Serialize};

/// Hyperparameters, checked by [`Config::check`]. Counts are elements, heads, layers or tokens.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Config {
    /// Model family.
    pub architecture: Architecture,
    /// Embedding length.
    pub dim: u32,
    /// Length of the feed-forward block's inner vectors.
    pub hidden_dim: u32,
    /// Transformer blocks.
    pub n_layers: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: u32,
    /// Length of one head's query, key and value.
    pub head_dim: u32,
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// Longest context the model was trained for, in tokens.
    pub seq_len: u32,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Leading elements of each head that are rotated; even, at most `head_dim`, 0 where positions are learned.
    pub rope_dim: u32,
    /// Factor of the rotary frequencies: below 1 for models stretched to a longer context. Not in layers with a window
    /// and a base of their own.
    pub rope_scale: f32,
    /// Tokens that layers with a window see, the current one included; 0 when all layers see everything.
    pub window: u32,
    /// Factor of the token embedding.
    pub embedding_scale: f32,
    /// Factor of attention scores beside `1 / sqrt(head_dim)`.
    pub query_scale: f32,
    /// Added to the mean square (RMSNorm) or the variance (LayerNorm).
    pub norm_eps: f32,
    /// The output head is the token embedding matrix.
    pub tied_head: bool,
}

/// Largest accepted `dim`, `hidden_dim` and vocabulary: far above any model, low enough that no product overflows `u64`.
const MAX_DIM: u32 = 1 << 24;
/// Largest accepted number of layers.
const MAX_LAYERS: u32 = 1 << 16;

impl Config {
    /// Columns of the query projection: `n_heads * head_dim`.
    pub fn q_dim(&self) -> u32 {
        self.n_heads * self.head_dim
    }

    /// Columns of the key and of the value projection: `n_kv_heads * head_dim`.
    pub fn kv_dim(&self) -> u32 {
        self.n_kv_heads * self.head_dim
    }

    /// Query heads that share one key and value head.
    pub fn heads_per_kv(&self) -> u32 {
        self.n_heads / self.n_kv_heads
    }

    /// Tokens that `layer` sees, the current one included; `None` when it sees everything.
    pub fn layer_window(&self, layer: u32) -> Option<u32> {
        let windowed = match self.architecture.blueprint().windowed {
            Windowed::None => false,
            Windowed::All => true,
            Windowed::AllBut { every, .. } => !(layer + 1).is_multiple_of(every),
        };
        (windowed && self.window > 0).then_some(self.window)
    }

    /// Base and scale of the rotary frequencies of `layer`.
    pub fn layer_rope(&self, layer: u32) -> (f32, f32) {
        match self.architecture.blueprint().windowed {
            Windowed::AllBut { rope_base, .. } if self.layer_window(layer).is_some() => (rope_base, 1.0),
            _ => (self.rope_base, self.rope_scale),
        }
    }

    /// Checks that the numbers describe a computable model.
    ///
    /// # Errors
    /// [`ModelError::InvalidValue`] with the first field that is out of range.
    pub fn check(&self) -> Result<(), ModelError> {
        fn invalid(field: &str, found: String, expected: String) -> Result<(), ModelError> {
            Err(ModelError::InvalidValue { key: field.to_string(), found, expected })
        }
        for (field, value, max) in [
            ("dim", self.dim, MAX_DIM),
            ("hidden_dim", self.hidden_dim, MAX_DIM),
            ("n_layers", self.n_layers, MAX_LAYERS),
            ("n_heads", self.n_heads, MAX_LAYERS),
            ("n_kv_heads", self.n_kv_heads, MAX_LAYERS),
            ("head_dim", self.head_dim, MAX_LAYERS),
            ("vocab_size", self.vocab_size, MAX_DIM),
            ("seq_len", self.seq_len, MAX_DIM),
        ] {
            if value == 0 || value > max {
                return invalid(field, value.to_string(), format!("1 to {max}"));
            }
        }
        if self.n_heads.checked_mul(self.head_dim).is_none_or(|q_dim| q_dim > MAX_DIM) {
            let found = format!("{} x {}", self.n_heads, self.head_dim);
            return invalid("n_heads x head_dim", found, format!("at most {MAX_DIM}"));
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return invalid(
                "n_kv_heads",
                self.n_kv_heads.to_string(),
                format!("a divisor of n_heads = {}", self.n_heads),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return invalid("head_dim", self.head_dim.to_string(), "an even number".to_string());
        }
        let is_rotary = self.architecture.blueprint().positions != Positions::Learned;
        if !self.rope_dim.is_multiple_of(2) || self.rope_dim > self.head_dim || is_rotary != (self.rope_dim > 0) {
            let expected = match is_rotary {
                true => format!("an even number from 2 to head_dim = {}", self.head_dim),
                false => "0, as positions are learned".to_string(),
            };
            return invalid("rope_dim", self.rope_dim.to_string(), expected);
        }
        for (field, value) in [
            ("rope_base", self.rope_base),
            ("rope_scale", self.rope_scale),
            ("embedding_scale", self.embedding_scale),
            ("query_scale", self.query_scale),
            ("norm_eps", self.norm_eps),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return invalid(field, Scientific(value.into()).to_string(), "a finite number above zero".to_string());
            }
        }
        Ok(())
    }
}
