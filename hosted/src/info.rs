//! `bareflow info`: what a model file is.

use crate::platform::FileDisk;
use crate::read_file;
use anyhow::{Context, Result};
use engine::attention::KvType;
use engine::{Plan, Session};
use model::architecture::{Activation, Norm, Positions};
use model::chat::ChatTemplate;
use model::formats::header_bytes;
use model::gguf::Header;
use model::{Config, ModelDescription};
use runtime::load::describe_source;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use storage::RawDisk;

/// Reads the header of `file` and prints what it says.
///
/// # Errors
/// When the file is not a model file. One that is but cannot run is described as far as its header goes, with the reason.
pub fn print(file: &Path, tokenizer: Option<&Path>, as_json: bool) -> Result<()> {
    let facts = match describe(file, tokenizer) {
        Ok(description) => facts_of(&description),
        Err(error) => match header_facts(file)? {
            Some(mut facts) => {
                facts.push("runs", "runs", json!(false), "no".to_owned());
                facts.push("why_not", "why not", json!(error.to_string()), format!("{error:#}"));
                facts
            }
            None => return Err(error),
        },
    };
    if as_json {
        print_line!("{}", serde_json::to_string_pretty(&Value::Object(facts.json))?);
        return Ok(());
    }
    print_line!("{:<13} {}", "file", file.display());
    for (label, text) in facts.lines {
        print_line!("{label:<13} {text}");
    }
    Ok(())
}

/// What is known of a model: for programs, and line by line for people.
#[derive(Default)]
struct Facts {
    json: Map<String, Value>,
    lines: Vec<(&'static str, String)>,
}

impl Facts {
    fn push(&mut self, key: &str, label: &'static str, value: Value, text: String) {
        self.json.insert(key.to_owned(), value);
        self.lines.push((label, text));
    }

    /// Number and bytes of the tensors of each type.
    fn push_types<'t>(&mut self, tensors: impl Iterator<Item = (&'t str, u64)>) {
        let mut types: Vec<(&str, usize, u64)> = Vec::new();
        for (name, len_bytes) in tensors {
            match types.iter_mut().find(|(known, ..)| *known == name) {
                Some((_, count, bytes)) => {
                    *count += 1;
                    *bytes += len_bytes;
                }
                None => types.push((name, 1, len_bytes)),
            }
        }
        for (name, count, bytes) in &types {
            self.lines.push(("tensors", format!("{count:>4} x {name:<6} {:>9.1} MiB", mebibytes(*bytes))));
        }
        let rows = types.iter().map(|(name, count, bytes)| json!({"type": name, "tensors": count, "bytes": bytes}));
        self.json.insert("tensor_types".to_owned(), rows.collect());
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

fn facts_of(description: &ModelDescription) -> Facts {
    let config = &description.config;
    let mut facts = Facts::default();
    let bytes = description.file_bytes;
    facts.push("file_bytes", "size", json!(bytes), format!("{:.1} MiB ({bytes} bytes)", mebibytes(bytes)));
    let format = description.format.to_string();
    facts.push("format", "format", json!(format), format.clone());
    facts.push("name", "name", json!(description.name), description.name.clone());
    facts.push("config", "architecture", json!(config), format!("{} ({})", config.architecture, pass(config)));
    let parameters = description.parameters();
    facts.push("parameters", "parameters", json!(parameters), format!("{:.1} million", parameters as f64 / 1e6));
    for (label, text) in [
        ("layers", config.n_layers.to_string()),
        ("dim", format!("{} (feed-forward {})", config.dim, config.hidden_dim)),
        ("heads", format!("{} (kv {}, head dim {})", config.n_heads, config.n_kv_heads, config.head_dim)),
        ("vocabulary", format!("{} (head {})", config.vocab_size, if config.tied_head { "tied" } else { "separate" })),
        ("context", format!("{} trained", config.seq_len)),
    ] {
        facts.lines.push((label, text));
    }
    facts.push_types(description.tensors.iter().map(|tensor| (tensor.ty.name(), tensor.len_bytes)));

    let special = description.tokenizer.special();
    let name = |id: Option<u32>| id.map_or("none".to_owned(), |id| token_name(description, id));
    let tokenizer = description.tokenizer.describe();
    facts.push("tokenizer", "tokenizer", json!(tokenizer), tokenizer.clone());
    let added = if special.add_bos { "added" } else { "not added" };
    let bos = json!({"id": special.bos, "added": special.add_bos});
    facts.push("bos", "begins with", bos, format!("{} ({added})", name(special.bos)));
    let ends: Vec<String> = special.eog.iter().map(|&id| token_name(description, id)).collect();
    facts.push("eog", "ends with", json!(special.eog), ends.join(" "));
    let template = description.chat_template.as_ref().map_or("none", ChatTemplate::name);
    facts.push("chat_template", "chat template", json!(template), template.to_owned());

    let context = (config.seq_len as usize).min(2048);
    let plan = Plan::new(description, 1);
    let kv = KvType::for_model(description);
    let session = Session::memory_bytes(config, context, 1, kv);
    let session_bytes = session.kv + session.activations;
    let weights_bytes = plan.as_ref().map(Plan::arena_bytes).ok();
    facts.json.insert("session_bytes".to_owned(), json!(session_bytes));
    facts.json.insert("kv_cache".to_owned(), json!(kv.name()));
    facts.json.insert("context".to_owned(), json!(context));
    facts.json.insert("weights_bytes".to_owned(), json!(weights_bytes));
    if let Some(weights_bytes) = weights_bytes {
        let (weights, session) = (mebibytes(weights_bytes as u64), mebibytes(session_bytes as u64));
        let text = format!(
            "{weights:.1} MiB weights + {session:.1} MiB for {context} tokens of context ({} KV cache)",
            kv.name()
        );
        facts.lines.push(("memory", text));
    }
    let why_not = plan.err().map(|error| error.to_string());
    let runs = if why_not.is_none() { "yes" } else { "no" };
    facts.push("runs", "runs", json!(why_not.is_none()), runs.to_owned());
    facts.json.insert("why_not".to_owned(), json!(why_not));
    if let Some(why_not) = why_not {
        facts.lines.push(("why not", why_not));
    }
    facts
}

/// Text and id of a token.
fn token_name(description: &ModelDescription, id: u32) -> String {
    let text = String::from_utf8_lossy(description.tokenizer.vocab().piece(id)).escape_debug().to_string();
    format!("{text} ({id})")
}

/// What a forward pass is made of, in words.
fn pass(config: &Config) -> String {
    let blueprint = config.architecture.blueprint();
    let norm = match blueprint.norm {
        Norm::Rms => "RMSNorm",
        Norm::Layer => "LayerNorm",
    };
    let activation = match (blueprint.activation, blueprint.is_gated()) {
        (Activation::Silu, true) => "SwiGLU",
        (Activation::Gelu, true) => "GeGLU",
        (Activation::Silu, false) => "SiLU",
        (Activation::Gelu, false) => "GELU",
    };
    let positions = match blueprint.positions {
        Positions::Learned => "learned positions".to_owned(),
        Positions::Rotary(_) if config.rope_scale == 1.0 => format!("rope base {}", config.rope_base),
        Positions::Rotary(_) => format!("rope base {}, frequencies x {}", config.rope_base, config.rope_scale),
    };
    let windowed = (0..config.n_layers).filter(|&layer| config.layer_window(layer).is_some()).count();
    let window = match windowed {
        0 => String::new(),
        layers => format!(", window {} in {layers} layers", config.window),
    };
    format!("{norm}, {activation}, {positions}{window}")
}

/// What the header of a GGUF file says of a model that cannot be described; `None` for other files.
fn header_facts(file: &Path) -> Result<Option<Facts>> {
    let source = File::open(file).with_context(|| format!("opening {}", file.display()))?;
    let file_bytes = source.metadata()?.len();
    let read = |bytes: &mut [u8]| source.read_exact_at(bytes, 0);
    let bytes = header_bytes(file_bytes, read).with_context(|| format!("reading {}", file.display()))?;
    let Ok(header) = Header::parse(&bytes, file_bytes) else { return Ok(None) };
    let mut facts = Facts::default();
    facts.push("file_bytes", "size", json!(file_bytes), format!("{:.1} MiB", mebibytes(file_bytes)));
    let format = format!("GGUF v{}", header.version);
    facts.push("format", "format", json!(format), format.clone());
    for (key, name, label) in [
        ("general.name", "name", "name"),
        ("general.architecture", "architecture", "architecture"),
        ("tokenizer.ggml.model", "tokenizer", "tokenizer"),
        ("tokenizer.ggml.pre", "pre_tokenizer", "pre-tokenizer"),
    ] {
        if let Ok(Some(text)) = header.metadata.str(key) {
            facts.push(name, label, json!(text), text.to_owned());
        }
    }
    facts.push_types(header.tensors.iter().map(|tensor| (tensor.ty.name(), tensor.len_bytes)));
    Ok(Some(facts))
}

fn describe(file: &Path, tokenizer: Option<&Path>) -> Result<ModelDescription> {
    let mut disk = FileDisk::open(file, false).with_context(|| format!("opening {}", file.display()))?;
    let tokenizer = read_file(tokenizer)?;
    let mut description = describe_source(&mut RawDisk::new(&mut disk), tokenizer.as_deref())?;
    // A disk is whole sectors, a file is as long as it is.
    match std::fs::metadata(file) {
        Ok(metadata) if metadata.is_file() => description.file_bytes = metadata.len(),
        _ => {}
    }
    Ok(description)
}
