//! Llama, versions 1 to 3, and the many models built alike (Mistral, SmolLM, TinyLlama, Yi).
//!
//! # Source
//! H. Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023; for the window A. Q. Jiang et al.,
//! "Mistral 7B", 2023. Llama 3.1's rotary scaling comes as a tensor of divisors, one per pair.

use super::{Activation, Blueprint, Norm, Positions, RopeOrder, Windowed};
use crate::description::Role;

pub(super) const LLAMA: Blueprint = Blueprint {
    name: "llama",
    global: &[Role::TokenEmbedding, Role::OutputNorm, Role::Output],
    layer: &[Role::AttnNorm, Role::Q, Role::K, Role::V, Role::AttnOut, Role::FfnNorm, Role::Gate, Role::Up, Role::Down],
    optional: &[Role::RopeFactors, Role::QBias, Role::KBias, Role::VBias, Role::AttnOutBias],
    norm: Norm::Rms,
    activation: Activation::Silu,
    positions: Positions::Rotary(RopeOrder::Adjacent),
    windowed: Windowed::All,
    derive: |_| {},
};
