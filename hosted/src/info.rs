//! `bareflow info`: what a model file is.

use crate::platform::FileDisk;
use anyhow::{Context, Result};
use engine::attention::KvType;
use engine::{Plan, Session};
use model::ModelDescription;
use runtime::load::describe_source;
use serde_json::json;
use std::path::Path;
use storage::RawDisk;

/// Reads the header of `file` and prints what it says.
///
/// # Errors
/// When the file is not a model this project reads.
pub fn print(file: &Path, tokenizer: Option<&Path>, as_json: bool) -> Result<()> {
    let description = describe(file, tokenizer)?;
    let config = &description.config;
    let mut types: Vec<(&str, usize, u64)> = Vec::new();
    for tensor in &description.tensors {
        match types.iter_mut().find(|(name, ..)| *name == tensor.ty.name()) {
            Some((_, count, bytes)) => {
                *count += 1;
                *bytes += tensor.len_bytes;
            }
            None => types.push((tensor.ty.name(), 1, tensor.len_bytes)),
        }
    }
    let context = (config.seq_len as usize).min(2048);
    let plan = Plan::new(&description, 1);
    let weights_bytes = plan.as_ref().map(Plan::arena_bytes).ok();
    let kv = KvType::for_model(&description);
    let session_bytes = Session::memory_bytes(config, context, 1, kv);
    let template = description.chat_template.as_ref().map_or("none".to_owned(), |t| format!("{t:?}"));
    if as_json {
        let tensor_types: Vec<_> =
            types.iter().map(|(name, count, bytes)| json!({"type": name, "tensors": count, "bytes": bytes})).collect();
        let value = json!({
            "format": description.format.to_string(),
            "name": description.name,
            "config": config,
            "file_bytes": description.file_bytes,
            "tensor_types": tensor_types,
            "tokenizer_vocab": description.tokenizer.vocab_size(),
            "chat_template": template,
            "weights_bytes": weights_bytes,
            "session_bytes": session_bytes,
            "kv_cache": kv.name(),
            "context": context,
            "runs": plan.is_ok(),
            "why_not": plan.err().map(|e| e.to_string()),
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!("file          {} ({} bytes)", file.display(), description.file_bytes);
    println!("format        {}", description.format);
    println!("name          {}", description.name);
    println!("architecture  {}", config.architecture);
    println!("layers        {}", config.n_layers);
    println!("dim           {} (feed-forward {})", config.dim, config.hidden_dim);
    println!("heads         {} (kv {}, head dim {})", config.n_heads, config.n_kv_heads, config.head_dim);
    println!("vocabulary    {} (head {})", config.vocab_size, if config.tied_head { "tied" } else { "separate" });
    println!("context       {} trained", config.seq_len);
    println!("rope          base {}, {} of {} elements", config.rope_base, config.rope_dim, config.head_dim);
    for (name, count, bytes) in &types {
        println!("tensors       {count:>4} x {name:<6} {:>9.1} MiB", *bytes as f64 / (1 << 20) as f64);
    }
    println!("chat template {template}");
    if let Some(bytes) = weights_bytes {
        println!(
            "memory        {:.1} MiB weights + {:.1} MiB for {context} tokens of context ({} KV cache)",
            bytes as f64 / (1 << 20) as f64,
            session_bytes as f64 / (1 << 20) as f64,
            kv.name()
        );
    }
    match plan {
        Ok(_) => println!("runs          yes"),
        Err(error) => println!("runs          no: {error}"),
    }
    Ok(())
}

fn describe(file: &Path, tokenizer: Option<&Path>) -> Result<ModelDescription> {
    let mut disk = FileDisk::open(file, false).with_context(|| format!("opening {}", file.display()))?;
    let tokenizer = match tokenizer {
        Some(path) => Some(std::fs::read(path).with_context(|| format!("reading {}", path.display()))?),
        None => None,
    };
    Ok(describe_source(&mut RawDisk::new(&mut disk), tokenizer.as_deref())?)
}
