//! The demo model in F32 against the greedy tokens that llama.cpp gives for it.
//!
//! In F32 no activation is quantised, so the tokens are those of any correct implementation as long as no two logits are
//! closer than its rounding: the smallest distance on the way is 0.01. `smollm2_f32_greedy.json` was written by llama.cpp
//! from the same file, converted to F32; here the conversion is ours.

use crate::demo_model;
use crate::hosted_program;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::path::Path;
use std::process::{Command, Stdio};

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    token_ids: Vec<u32>,
}

/// Runs every prompt; returns how many there were, `None` where the model was never fetched.
///
/// # Errors
/// Other tokens than expected, or a command that failed.
pub fn run(workspace: &Path) -> Result<Option<usize>> {
    let Some(model) = demo_model::cached(&workspace.join(".cache"))? else {
        println!("skipped: the demo model is not there (cargo xtask demo fetches it)");
        return Ok(None);
    };
    let out = workspace.join("out");
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    // Half a gigabyte: beside the other results, not where temporary files may be memory.
    let dir = tempfile::tempdir_in(&out).with_context(|| format!("making a directory in {}", out.display()))?;
    let f32_model = dir.path().join("f32.gguf");
    bareflow(workspace, |c| c.arg("convert").args([&model, &f32_model]).args(["--type", "F32"]))?;
    let cases: Vec<Case> = serde_json::from_str(include_str!("smollm2_f32_greedy.json"))?;
    for case in &cases {
        let count = case.token_ids.len().to_string();
        let json = bareflow(workspace, |c| {
            c.args(["generate", "--json", "--ignore-eos", "--max-tokens", &count, "--prompt", &case.prompt]);
            c.arg("--model").arg(&f32_model)
        })?;
        let json: serde_json::Value = serde_json::from_slice(&json)?;
        let found: Vec<u32> = serde_json::from_value(json["token_ids"].clone())?;
        ensure!(
            json["report"]["prompt_tokens"] == case.prompt_ids.len(),
            "{:?}: {}",
            case.prompt,
            json["report"]["prompt_tokens"]
        );
        let same = found.iter().zip(&case.token_ids).take_while(|(a, b)| a == b).count();
        ensure!(
            found == case.token_ids,
            "{:?}: token {same} of {count} differs: {found:?}, expected {:?}",
            case.prompt,
            case.token_ids
        );
        println!("{:?}: {count} tokens as expected", case.prompt);
    }
    Ok(Some(cases.len()))
}

/// Standard output of `bareflow` with what `arguments` adds.
fn bareflow(workspace: &Path, arguments: impl FnOnce(&mut Command) -> &mut Command) -> Result<Vec<u8>> {
    let mut command = Command::new(hosted_program::of_tests(workspace)?);
    command.current_dir(workspace);
    let output = arguments(&mut command).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{command:?} failed ({})", output.status);
    Ok(output.stdout)
}
