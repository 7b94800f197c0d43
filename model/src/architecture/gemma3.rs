//! Gemma 3, text models: scaled embedding, GeGLU, norms before and after each block and on every query and key head,
//! and five layers with a window and a rotary base of their own to each that sees everything.
//!
//! Files store every RMSNorm gain with its 1 already added.
//!
//! # Source
//! Gemma Team, "Gemma 3 Technical Report", 2025.

use super::{Activation, Blueprint, Norm, Positions, RopeOrder, Windowed};
use crate::config::Config;
use crate::description::Role;

pub(super) const GEMMA3: Blueprint = Blueprint {
    name: "gemma3",
    global: &[Role::TokenEmbedding, Role::OutputNorm, Role::Output],
    layer: &[
        Role::AttnNorm,
        Role::Q,
        Role::QNorm,
        Role::K,
        Role::KNorm,
        Role::V,
        Role::AttnOut,
        Role::AttnPostNorm,
        Role::FfnNorm,
        Role::Gate,
        Role::Up,
        Role::Down,
        Role::FfnPostNorm,
    ],
    optional: &[],
    norm: Norm::Rms,
    activation: Activation::Gelu,
    positions: Positions::Rotary(RopeOrder::Halves),
    windowed: Windowed::AllBut { every: 6, rope_base: 10_000.0 },
    derive,
};

/// Layers of the 27B model, the only one whose scores are not divided by `sqrt(head_dim)`.
const LAYERS_27B: u32 = 62;

fn derive(config: &mut Config) {
    config.embedding_scale = libm::sqrtf(config.dim as f32);
    if config.n_layers == LAYERS_27B {
        // There they are divided by sqrt(dim / n_heads).
        config.query_scale = libm::sqrtf(config.head_dim as f32 * config.n_heads as f32 / config.dim as f32);
    }
}
