//! Model families: one file each says which tensors a file of the family holds and which of the engine's shared
//! operations its forward pass is made of.
//!
//! Input: an architecture's name in GGUF metadata -> [`Architecture`] -> its [`Blueprint`], from which `gguf` reads the
//! configuration, `description` checks the tensors, and `engine` plans the weights and runs the pass. No family has code
//! of its own anywhere else.
//! Not here: numbers of a particular model ([`crate::Config`]).
//!
//! # Source
//! The published papers and reference implementations named in each file; tensor and key names of the ggml project.

mod gemma3;
mod gpt2;
mod llama;
mod qwen2;
mod qwen3;

use crate::config::Config;
use crate::description::Role;
use core::fmt;
use serde::{Deserialize, Serialize};

/// Model families this project runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Architecture {
    /// Llama 1 to 3, Mistral, SmolLM, TinyLlama and what else is built like them.
    Llama,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
    /// Gemma 3, text.
    Gemma3,
    /// GPT-2.
    Gpt2,
}

/// What normalises a vector before a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Norm {
    /// RMSNorm: a gain.
    Rms,
    /// LayerNorm: a gain and a bias.
    Layer,
}

/// The nonlinearity of the feed-forward block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// GELU in its tanh form.
    Gelu,
}

/// Which elements of a head turn together: the pairs of rotary embedding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeOrder {
    /// `(2i, 2i + 1)`. Llama files come with query and key rows permuted for it.
    Adjacent,
    /// `(i, i + rope_dim / 2)`: "NeoX" order.
    Halves,
}

/// How a token's position enters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Positions {
    /// Queries and keys are turned by an angle that grows with the position.
    Rotary(RopeOrder),
    /// A learned vector per position is added to the embedding.
    Learned,
}

/// Which layers see only the last tokens, where a file states a window.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Windowed {
    /// The family has no such layers; a file that states a window is refused.
    None,
    /// All layers.
    All,
    /// All but every `n`-th layer. The others use `rope_base` and no rotary scaling.
    AllBut {
        /// Layers `n - 1`, `2n - 1` and so on see everything.
        every: u32,
        /// Rotary base of the layers with a window.
        rope_base: f32,
    },
}

/// What the files of a family hold and how its forward pass goes.
///
/// Every pass is: embedding; for each layer `x += attention(norm(x))`, `x += feed_forward(norm(x))`; final norm; head.
/// The rest follows from the tensors: a bias is added where there is a bias tensor, queries and keys are normalised where
/// there are [`Role::QNorm`] and [`Role::KNorm`], a block's output where there is [`Role::AttnPostNorm`] or
/// [`Role::FfnPostNorm`], and a feed-forward block without [`Role::Gate`] is a plain one.
#[derive(Debug)]
pub struct Blueprint {
    /// Name in GGUF metadata and first part of its keys.
    pub name: &'static str,
    /// Tensors that exist once. [`Role::Output`] may always be missing: the head is the embedding then.
    pub global: &'static [Role],
    /// Tensors of every layer.
    pub layer: &'static [Role],
    /// Tensors of either kind that a file may leave out.
    pub optional: &'static [Role],
    /// The norms.
    pub norm: Norm,
    /// The nonlinearity.
    pub activation: Activation,
    /// Positions.
    pub positions: Positions,
    /// Layers with a window.
    pub windowed: Windowed,
    /// Sets the numbers of a configuration that follow from its others.
    pub derive: fn(&mut Config),
}

impl Blueprint {
    /// True for tensors that a file of this family may hold.
    pub fn knows(&self, role: Role) -> bool {
        [self.global, self.layer, self.optional].iter().any(|roles| roles.contains(&role))
    }

    /// True when the feed-forward block multiplies an activated gate with a second projection.
    pub fn is_gated(&self) -> bool {
        self.layer.contains(&Role::Gate)
    }

    /// Metadata key of the norms' epsilon, behind the family's name.
    pub fn norm_eps_key(&self) -> &'static str {
        match self.norm {
            Norm::Rms => "attention.layer_norm_rms_epsilon",
            Norm::Layer => "attention.layer_norm_epsilon",
        }
    }
}

impl Architecture {
    /// Every family.
    pub const ALL: [Architecture; 5] =
        [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3, Architecture::Gemma3, Architecture::Gpt2];

    /// Their names, for messages.
    pub const SUPPORTED: &'static str = "llama, qwen2, qwen3, gemma3, gpt2";

    /// The family with this name in GGUF metadata.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// The name used in GGUF metadata.
    pub const fn name(self) -> &'static str {
        self.blueprint().name
    }

    /// What its files hold and how its pass goes.
    pub const fn blueprint(self) -> &'static Blueprint {
        match self {
            Architecture::Llama => &llama::LLAMA,
            Architecture::Qwen2 => &qwen2::QWEN2,
            Architecture::Qwen3 => &qwen3::QWEN3,
            Architecture::Gemma3 => &gemma3::GEMMA3,
            Architecture::Gpt2 => &gpt2::GPT2,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_families_and_back() {
        for architecture in Architecture::ALL {
            assert_eq!(Architecture::from_name(architecture.name()), Some(architecture));
            assert!(Architecture::SUPPORTED.split(", ").any(|name| name == architecture.name()));
            let blueprint = architecture.blueprint();
            assert!(blueprint.layer.iter().all(|role| role.is_per_layer()), "{architecture}");
            assert!(blueprint.global.iter().all(|role| !role.is_per_layer()), "{architecture}");
        }
        assert_eq!(Architecture::SUPPORTED.split(", ").count(), Architecture::ALL.len());
        assert_eq!(Architecture::from_name("mamba"), None);
    }
}
