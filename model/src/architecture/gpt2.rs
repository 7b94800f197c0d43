//! GPT-2: LayerNorm, learned positions, one fused query-key-value projection, a plain GELU feed-forward block, and a
//! bias on everything.
//!
//! # Source
//! A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

use super::{Activation, Blueprint, Norm, Positions, Windowed};
use crate::description::Role;

pub(super) const GPT2: Blueprint = Blueprint {
    name: "gpt2",
    global: &[Role::TokenEmbedding, Role::PositionEmbedding, Role::OutputNorm, Role::OutputNormBias, Role::Output],
    layer: &[
        Role::AttnNorm,
        Role::AttnNormBias,
        Role::Qkv,
        Role::QkvBias,
        Role::AttnOut,
        Role::AttnOutBias,
        Role::FfnNorm,
        Role::FfnNormBias,
        Role::Up,
        Role::UpBias,
        Role::Down,
        Role::DownBias,
    ],
    optional: &[],
    norm: Norm::Layer,
    activation: Activation::Gelu,
    positions: Positions::Learned,
    windowed: Windowed::None,
    derive: |_| {},
};
