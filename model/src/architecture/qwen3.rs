//! Qwen 3 (dense): llama with every query and key head normalised, and rotary pairs in halves.
//!
//! # Source
//! A. Yang et al., "Qwen3 Technical Report", 2025.

use super::{Activation, Blueprint, Norm, Positions, RopeOrder, Windowed};
use crate::description::Role;

pub(super) const QWEN3: Blueprint = Blueprint {
    name: "qwen3",
    global: &[Role::TokenEmbedding, Role::OutputNorm, Role::Output],
    layer: &[
        Role::AttnNorm,
        Role::Q,
        Role::QNorm,
        Role::K,
        Role::KNorm,
        Role::V,
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
