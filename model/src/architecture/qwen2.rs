//! Qwen 2 and 2.5: llama with biases on query, key and value, and rotary pairs in halves.
//!
//! # Source
//! A. Yang et al., "Qwen2 Technical Report", 2024.

use super::{Activation, Blueprint, Norm, Positions, RopeOrder, Windowed};
use crate::description::Role;

pub(super) const QWEN2: Blueprint = Blueprint {
    name: "qwen2",
    global: &[Role::TokenEmbedding, Role::OutputNorm, Role::Output],
    layer: &[
        Role::AttnNorm,
        Role::Q,
        Role::QBias,
        Role::K,
        Role::KBias,
        Role::V,
        Role::VBias,
        Role::AttnOut,
        Role::FfnNorm,
        Role::Gate,
        Role::Up,
        Role::Down,
    ],
    optional: &[],
    norm: Norm::Rms,
    activation: Activation::Silu,
    positions: Positions::Rotary(RopeOrder::Halves),
    windowed: Windowed::None,
    derive: |_| {},
};
