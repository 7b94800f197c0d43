//! From a GGUF header to a [`ModelDescription`]: architecture, configuration, tensors, tokenizer, chat template.

use super::metadata::Metadata;
use super::reader::{Header, TensorInfo};
use crate::architecture::{Architecture, Positions, Windowed};
use crate::chat::ChatTemplate;
use crate::config::Config;
use crate::description::{Format, ModelDescription, Role, Tensor, check_tensors};
use crate::error::ModelError;
use crate::scientific::Scientific;
use crate::tokenizer::{Bpe, Pretokenizer, SpecialTokens, Spm, TokenKind, Tokenizer, TokenizerError, Vocab};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// Rotary base of the original Llama; the format's default when `rope.freq_base` is absent.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

pub(super) fn describe(header: &Header<'_>, file_bytes: u64) -> Result<ModelDescription, ModelError> {
    let metadata = &header.metadata;
    const KEY: &str = "general.architecture";
    let name = Metadata::required(metadata.str(KEY), KEY, "the architecture's name")?;
    let architecture = Architecture::from_name(name).ok_or_else(|| ModelError::UnsupportedArchitecture {
        found: name.to_string(),
        supported: Architecture::SUPPORTED,
    })?;
    let tokenizer = read_tokenizer(metadata)?;
    let tied_head = !header.tensors.iter().any(|t| Role::from_tensor_name(t.name) == Some((Role::Output, None)));
    let config = read_config(metadata, architecture, tokenizer.vocab_size(), tied_head)?;
    let tensors = header.tensors.iter().map(|t| read_tensor(t, &config)).collect::<Result<Vec<_>, _>>()?;
    Ok(ModelDescription {
        format: Format::Gguf { version: header.version },
        name: metadata.str("general.name")?.unwrap_or_default().to_string(),
        tensors: check_tensors(&config, tensors, file_bytes)?,
        config,
        tokenizer,
        chat_template: metadata.str("tokenizer.chat_template")?.map(ChatTemplate::recognise),
        file_bytes,
    })
}

/// Keys of one architecture: `llama.block_count` and so on.
struct Keys<'m, 'a> {
    metadata: &'m Metadata<'a>,
    architecture: Architecture,
}

impl Keys<'_, '_> {
    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture.name())
    }

    fn u32(&self, suffix: &str) -> Result<Option<u32>, ModelError> {
        self.metadata.u32(&self.key(suffix))
    }

    fn f32(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        self.metadata.f32(&self.key(suffix))
    }

    fn refuse<T>(&self, feature: &'static str, suffix: &str, found: String) -> Result<T, ModelError> {
        Err(ModelError::UnsupportedFeature { feature, key: self.key(suffix), found })
    }

    fn count(&self, suffix: &str, expected: &'static str) -> Result<u32, ModelError> {
        Metadata::required(self.u32(suffix), &self.key(suffix), expected)
    }
}

fn read_config(
    metadata: &Metadata<'_>,
    architecture: Architecture,
    tokens: usize,
    tied_head: bool,
) -> Result<Config, ModelError> {
    let keys = Keys { metadata, architecture };
    refuse_unsupported(&keys)?;

    let vocab_size = u32::try_from(tokens).unwrap_or(u32::MAX);
    if let Some(stated) = keys.u32("vocab_size")?
        && stated != vocab_size
    {
        return Err(ModelError::InvalidValue {
            key: keys.key("vocab_size"),
            found: stated.to_string(),
            expected: format!("{vocab_size}, the length of tokenizer.ggml.tokens"),
        });
    }
    let dim = keys.count("embedding_length", "the embedding length")?;
    let n_heads = keys.count("attention.head_count", "the number of attention heads")?;
    let head_dim = head_dim(&keys, dim, n_heads)?;
    let blueprint = architecture.blueprint();
    let is_rotary = blueprint.positions != Positions::Learned;
    let mut config = Config {
        architecture,
        dim,
        hidden_dim: keys.count("feed_forward_length", "the inner length of the feed-forward block")?,
        n_layers: keys.count("block_count", "the number of layers")?,
        n_heads,
        n_kv_heads: keys.u32("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        vocab_size,
        seq_len: keys.count("context_length", "the context length")?,
        rope_base: keys.f32("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE),
        rope_dim: if is_rotary { keys.u32("rope.dimension_count")?.unwrap_or(head_dim) } else { 0 },
        rope_scale: rope_scale(&keys)?,
        window: window(&keys)?,
        embedding_scale: 1.0,
        query_scale: 1.0,
        norm_eps: Metadata::required(
            keys.f32(blueprint.norm_eps_key()),
            &keys.key(blueprint.norm_eps_key()),
            "the epsilon of the norms",
        )?,
        tied_head,
    };
    (blueprint.derive)(&mut config);
    config.check()?;
    Ok(config)
}

/// Factor of the rotary frequencies: 1, or 1 over the factor of a linearly stretched context.
fn rope_scale(keys: &Keys<'_, '_>) -> Result<f32, ModelError> {
    let scaling = keys.metadata.str(&keys.key("rope.scaling.type"))?;
    if let Some(found) = scaling.filter(|&kind| kind != "none" && kind != "linear") {
        return keys.refuse("a kind of rotary scaling other than linear", "rope.scaling.type", found.to_string());
    }
    // The old name of the factor of linear scaling, from before there were other kinds.
    let factor = match keys.f32("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.f32("rope.scale_linear")?,
    };
    match factor.filter(|&factor| factor != 0.0 && scaling != Some("none")) {
        Some(factor) => Ok(1.0 / factor),
        None => Ok(1.0),
    }
}

/// Tokens that layers with a window see; 0 for no window.
fn window(keys: &Keys<'_, '_>) -> Result<u32, ModelError> {
    const KEY: &str = "attention.sliding_window";
    let window = keys.u32(KEY)?.unwrap_or(0);
    if window > 0 && keys.architecture.blueprint().windowed == Windowed::None {
        return keys.refuse(
            "sliding-window attention, which this architecture has no rule for here",
            KEY,
            window.to_string(),
        );
    }
    Ok(window)
}

/// `attention.key_length` where given (it must equal `value_length`), else `dim / n_heads`.
fn head_dim(keys: &Keys<'_, '_>, dim: u32, n_heads: u32) -> Result<u32, ModelError> {
    let key_length = keys.u32("attention.key_length")?;
    let value_length = keys.u32("attention.value_length")?;
    let by_division = || match dim.checked_div(n_heads) {
        Some(head_dim) if head_dim * n_heads == dim => Ok(head_dim),
        _ => Err(ModelError::InvalidValue {
            key: keys.key("attention.head_count"),
            found: n_heads.to_string(),
            expected: format!("a divisor of embedding_length = {dim}, or attention.key_length to be given"),
        }),
    };
    let head_dim = match key_length.or(value_length) {
        Some(length) => length,
        None => by_division()?,
    };
    match value_length {
        Some(value_length) if value_length != head_dim => Err(ModelError::UnsupportedFeature {
            feature: "values of another length than keys",
            key: keys.key("attention.value_length"),
            found: format!("{value_length}, key_length = {head_dim}"),
        }),
        _ => Ok(head_dim),
    }
}

/// Refuses what would change the results and is not implemented, rather than run it wrongly.
fn refuse_unsupported(keys: &Keys<'_, '_>) -> Result<(), ModelError> {
    for (suffix, feature) in [
        ("expert_count", "a mixture of experts"),
        ("pooling_type", "embedding pooling"),
        ("attention.sliding_window_pattern", "a pattern of layers with a window other than its architecture's"),
    ] {
        let usual = match keys.architecture.blueprint().windowed {
            Windowed::AllBut { every, .. } if suffix == "attention.sliding_window_pattern" => every,
            _ => 0,
        };
        if let Some(found) = keys.u32(suffix)?
            && found != 0
            && found != usual
        {
            return keys.refuse(feature, suffix, found.to_string());
        }
    }
    for (suffix, feature, harmless) in [
        ("attn_logit_softcapping", "capped attention scores", 0.0),
        ("final_logit_softcapping", "capped logits", 0.0),
        ("rope.scaling.attn_factor", "scaled attention of a stretched context", 1.0),
    ] {
        if let Some(found) = keys.f32(suffix)?
            && found != harmless
        {
            return keys.refuse(feature, suffix, Scientific(found.into()).to_string());
        }
    }
    Ok(())
}

fn read_tensor(info: &TensorInfo<'_>, config: &Config) -> Result<Tensor, ModelError> {
    let (role, layer) = Role::from_tensor_name(info.name).ok_or_else(|| ModelError::UnexpectedTensor {
        tensor: info.name.to_string(),
        architecture: config.architecture.name(),
    })?;
    let [k, n, rest @ ..] = info.dims;
    match (u32::try_from(n), u32::try_from(k)) {
        (Ok(n), Ok(k)) if rest.iter().all(|&dim| dim == 1) => Ok(Tensor {
            role,
            layer,
            ty: info.ty,
            group_len: None,
            n,
            k,
            offset: info.offset,
            len_bytes: info.len_bytes,
        }),
        _ => {
            let (n, k) = role.shape(config);
            Err(ModelError::WrongShape {
                tensor: info.name.to_string(),
                expected: Vec::from([k.into(), n.into()]),
                found: info.dims[..info.n_dims].to_vec(),
            })
        }
    }
}

fn read_tokenizer(metadata: &Metadata<'_>) -> Result<Tokenizer, ModelError> {
    const MODEL: &str = "tokenizer.ggml.model";
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let model = Metadata::required(metadata.str(MODEL), MODEL, "the tokenizer's kind")?;
    let texts = Metadata::required(metadata.strings(TOKENS), TOKENS, "an array of strings")?;
    let count = texts.len();
    let kinds = match metadata.i32s("tokenizer.ggml.token_type")? {
        None => vec![TokenKind::Normal; count],
        Some(kinds) => kinds.into_iter().map(TokenKind::from_gguf).collect::<Result<_, _>>()?,
    };
    if kinds.len() != count {
        return Err(TokenizerError::Lengths { what: "token_type", found: kinds.len(), tokens: count }.into());
    }
    let tokens = texts.zip(kinds);
    let mut tokenizer = match model {
        "gpt2" => {
            let name = metadata.str("tokenizer.ggml.pre")?;
            let pre = Pretokenizer::from_name(name)?;
            // Those vocabularies of this form that came with Llama 3; the others that cut text so lack both rules.
            let is_llama3 = pre == Pretokenizer::Llama3 && !matches!(name, Some("smaug-bpe" | "dbrx"));
            const MERGES: &str = "tokenizer.ggml.merges";
            let merges = Metadata::required(metadata.strings(MERGES), MERGES, "an array of strings")?;
            let vocab = Vocab::byte_level(tokens, count)?;
            let bpe = Bpe::new(&vocab, pre, merges)?;
            let mut tokenizer = Tokenizer::byte_level(if is_llama3 { bpe.with_whole_pieces() } else { bpe }, vocab);
            if is_llama3 {
                let special = SpecialTokens { add_bos: true, ..tokenizer.special().clone() };
                tokenizer.set_special(special)?;
            }
            tokenizer
        }
        "llama" => {
            const SCORES: &str = "tokenizer.ggml.scores";
            let scores = Metadata::required(metadata.f32s(SCORES), SCORES, "an array of f32")?;
            let add_space = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            let vocab = Vocab::sentence_piece(tokens, count)?;
            Tokenizer::sentence_piece(Spm::new(&vocab, scores, add_space)?, vocab)
        }
        other => return Err(TokenizerError::UnsupportedModel { found: other.to_string() }.into()),
    };
    read_special_ids(metadata, &mut tokenizer)?;
    Ok(tokenizer)
}

fn read_special_ids(metadata: &Metadata<'_>, tokenizer: &mut Tokenizer) -> Result<(), ModelError> {
    let id = |name: &str| -> Result<Option<u32>, ModelError> {
        // 4294967295 is how converters write "none".
        let id = metadata.u32(&format!("tokenizer.ggml.{name}_token_id"))?;
        Ok(id.filter(|&id| id != u32::MAX))
    };
    let mut special = tokenizer.special().clone();
    special.bos = id("bos")?.or(special.bos);
    if let Some(eos) = id("eos")? {
        // What looked like the end of text is an ordinary tag in vocabularies with another one.
        special.eog.retain(|&guess| Some(guess) != special.eos);
        special.eos = Some(eos);
    }
    special.unknown = id("unknown")?.or(special.unknown);
    if let Some(add) = metadata.bool("tokenizer.ggml.add_bos_token")? {
        special.add_bos = add;
    }
    if let Some(add) = metadata.bool("tokenizer.ggml.add_eos_token")? {
        special.add_eos = add;
    }
    for name in ["eot", "eom"] {
        special.eog.extend(id(name)?);
    }
    tokenizer.set_special(special)?;
    Ok(())
}
