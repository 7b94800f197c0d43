//! What each command of `bareflow` prints for a model that is all right, and what it says of one that is not.

use model::synthetic::{self, Spec};
use model::{Role, TensorType};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// A directory with the tiny model `tiny.gguf`.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("tiny.gguf", &tiny());
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path().join(name), bytes).unwrap();
    }

    fn bareflow(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_bareflow")).args(args).current_dir(self.path()).output().unwrap()
    }

    /// Standard output and standard error of a run that must pass.
    fn run(&self, args: &[&str]) -> (String, String) {
        let output = self.bareflow(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {stderr}");
        (String::from_utf8(output.stdout).unwrap(), stderr)
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.run(args).0).unwrap()
    }

    /// What a run that must fail with the exit code `code` writes to standard error.
    fn refused(&self, code: i32, args: &[&str]) -> String {
        let output = self.bareflow(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

fn spec() -> Spec {
    Spec {
        matrices: TensorType::Q4_0,
        overrides: vec![(Role::AttnOut, TensorType::F32), (Role::TokenEmbedding, TensorType::F16)],
        ..Spec::default()
    }
}

fn tiny() -> Vec<u8> {
    synthetic::gguf(&spec()).unwrap()
}

/// Exit codes of docs/FORMATS.md.
const ANYTHING: i32 = 1;
const SETTINGS: i32 = 3;
const MODEL: i32 = 4;
const STORAGE: i32 = 6;

const GENERATE: [&str; 10] =
    ["generate", "--model", "tiny.gguf", "--prompt", "ab", "--max-tokens", "8", "--ignore-eos", "--threads", "1"];

#[test]
fn generate_prints_the_same_text_for_people_and_in_json() {
    let folder = Folder::new();
    let json = folder.json(&[&GENERATE[..], &["--json"]].concat());
    assert_eq!(json["token_ids"].as_array().unwrap().len(), 8);
    let text = json["text"].as_str().unwrap();
    let (stdout, stderr) = folder.run(&GENERATE);
    assert!(!text.is_empty() && stdout == format!("{text}\n"), "{text:?} in JSON, {stdout:?} printed");
    assert!(stderr.contains("8 tokens, prefill "), "{stderr}");
    for key in ["prefill_tok_s", "decode_tok_s", "ttft_ms"] {
        let value = json[key].as_f64().unwrap();
        assert!(value > 0.0 && value.is_finite(), "{key} is {value}");
        assert_eq!(json["report"][key], json[key], "{key}");
    }
    // More than the weights, less than a machine has.
    let peak = json["peak_memory_bytes"].as_u64().unwrap();
    assert!((tiny().len() as u64..1 << 36).contains(&peak), "{peak} bytes");
    assert_eq!(json["threads"], 1);
    let overhead = json["report"]["profiler_overhead"].as_f64().unwrap();
    assert!(overhead > 0.0 && overhead.is_finite(), "the profiler costs {overhead}");
}

#[test]
fn info_says_what_the_file_holds() {
    let folder = Folder::new();
    let json = folder.json(&["info", "tiny.gguf", "--json"]);
    let expected = spec();
    assert_eq!(json["file_bytes"], tiny().len());
    assert_eq!(json["format"], "GGUF v3");
    assert_eq!(
        (&json["config"]["dim"], &json["config"]["n_layers"]),
        (&expected.dim.into(), &expected.n_layers.into())
    );
    assert_eq!((&json["runs"], &json["why_not"]), (&true.into(), &Value::Null));
    for key in ["weights_bytes", "session_bytes", "context"] {
        assert!(json[key].as_u64().unwrap() > 0, "{key}: {}", json[key]);
    }
    // Of each layer: wq, wk, wv, w1, w2, w3 in Q4_0, the attention output in F32, and norms.
    let types: Vec<(&str, u64)> = json["tensor_types"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["type"].as_str().unwrap(), row["tensors"].as_u64().unwrap()))
        .collect();
    let layers = u64::from(expected.n_layers);
    for (ty, count) in [("F16", 1), ("Q4_0", 6 * layers)] {
        assert!(types.contains(&(ty, count)), "{count} of {ty}: {types:?}");
    }
    let (text, _) = folder.run(&["info", "tiny.gguf"]);
    let line = |label: &str| text.lines().find(|line| line.starts_with(label)).unwrap_or_else(|| panic!("{text}"));
    assert_eq!(line("file ").split_whitespace().nth(1), Some("tiny.gguf"));
    assert_eq!(line("runs").split_whitespace().nth(1), Some("yes"));
    assert!(line("dim").contains(&format!("{} (feed-forward {})", expected.dim, expected.hidden_dim)), "{text}");
}

/// `file` with the first `from` replaced, which has to have the length of `to`.
fn replaced(file: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = file.windows(from.len()).position(|bytes| bytes == from).unwrap();
    let mut out = file.to_vec();
    out[at..at + to.len()].copy_from_slice(to);
    out
}

#[test]
fn a_model_that_cannot_run_is_described_with_the_reason() {
    let folder = Folder::new();
    // The value of general.architecture, which is the first string of that length that says so.
    folder.write("unknown.gguf", &replaced(&tiny(), b"llama", b"lxama"));
    let json = folder.json(&["info", "unknown.gguf", "--json"]);
    assert_eq!((&json["runs"], &json["architecture"]), (&false.into(), &"lxama".into()));
    let why_not = json["why_not"].as_str().unwrap();
    assert!(why_not.contains("lxama"), "{why_not}");
    let (text, _) = folder.run(&["info", "unknown.gguf"]);
    assert!(text.contains("why not") && text.contains(why_not), "{text}");
    let error = folder.refused(MODEL, &["generate", "--model", "unknown.gguf"]);
    assert!(error.contains(why_not), "{error}");
}

#[test]
fn files_that_are_no_model_are_refused_with_the_reason() {
    let folder = Folder::new();
    let whole = tiny();
    folder.write("empty.gguf", b"");
    folder.write("noise.gguf", &[0xa5; 4096]);
    folder.write("cut.gguf", &whole[..whole.len() / 2]);
    // In the header: a name, two dimensions of 8 bytes, the type. 99 is none.
    let name = b"blk.0.attn_q.weight";
    let at = whole.windows(name.len()).position(|bytes| bytes == name).unwrap() + name.len() + 4 + 16;
    let mut typed = whole.clone();
    assert_eq!(typed[at..at + 4], 2u32.to_le_bytes(), "Q4_0");
    typed[at] = 99;
    folder.write("type.gguf", &typed);
    for (file, code, words) in [
        ("none.gguf", STORAGE, &["none.gguf", "No such file"][..]),
        ("empty.gguf", MODEL, &["empty", "0 bytes"]),
        ("noise.gguf", MODEL, &["not a model file"]),
        ("cut.gguf", MODEL, &["bytes"]),
        ("type.gguf", MODEL, &["blk.0.attn_q.weight", "99"]),
    ] {
        for command in [&["generate", "--model", file][..], &["bench", "--model", file], &["tune", "--model", file]] {
            let error = folder.refused(code, command);
            for word in words {
                assert!(error.contains(word), "{command:?} does not say `{word}`: {error}");
            }
        }
    }
    for (file, code, word) in
        [("none.gguf", STORAGE, "none.gguf"), ("empty.gguf", MODEL, "empty"), ("noise.gguf", MODEL, "not a model file")]
    {
        let error = folder.refused(code, &["info", file]);
        assert!(error.contains(word), "{file}: {error}");
    }
}

#[test]
fn prompts_that_cannot_be_run_are_refused_with_the_reason() {
    let folder = Folder::new();
    let error = folder.refused(SETTINGS, &["generate", "--model", "tiny.gguf", "--prompt", ""]);
    assert!(error.contains("the prompt is empty"), "{error}");
    let long = "a b c d ".repeat(40);
    let error = folder.refused(SETTINGS, &["generate", "--model", "tiny.gguf", "--prompt", &long, "--context", "64"]);
    assert!(error.contains("the context has room for 64") && error.contains("shorten the prompt"), "{error}");
    let error = folder.refused(SETTINGS, &["generate", "--model", "tiny.gguf", "--set", "kernel.cores=2"]);
    assert!(error.contains("kernel.cores") && error.contains("command line"), "{error}");
}

#[test]
fn bench_runs_both_tiers_in_turn_and_their_tokens_agree() {
    let folder = Folder::new();
    let args = [&["bench"], &GENERATE[1..], &["--rounds", "2"]].concat();
    let rows = folder.json(&[&args[..], &["--json"]].concat());
    let rows = rows.as_array().unwrap();
    let order: Vec<(u64, &str)> =
        rows.iter().map(|row| (row["round"].as_u64().unwrap(), row["tier"].as_str().unwrap())).collect();
    assert_eq!(order, [(1, "baseline"), (1, "compiled"), (2, "baseline"), (2, "compiled")]);
    for row in rows {
        assert_eq!(row["token_ids"], rows[0]["token_ids"]);
        assert!(row["decode_tok_s"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert_eq!(rows[0]["token_ids"].as_array().unwrap().len(), 8);
    let (_, stderr) = folder.run(&args);
    assert_eq!(stderr.lines().filter(|line| line.starts_with("round ")).count(), 4, "{stderr}");
}

#[test]
fn perplexity_counts_what_it_scores() {
    let folder = Folder::new();
    folder.write("text", "abc def ghi jkl mno pqr stu vwx yz. ".repeat(8).as_bytes());
    let args = ["perplexity", "tiny.gguf", "text", "--context", "16", "--threads", "1"];
    let json = folder.json(&[&args[..], &["--windows", "3", "--json"]].concat());
    assert_eq!((&json["windows"], &json["context"]), (&3.into(), &16.into()));
    // The second half of each window but for its first token, as llama.cpp counts.
    assert_eq!(json["scored_tokens"], 3 * (16 / 2 - 1));
    let (perplexity, nll) = (json["perplexity"].as_f64().unwrap(), json["mean_nll"].as_f64().unwrap());
    assert!((perplexity - nll.exp()).abs() < 1e-9 * perplexity, "{perplexity} is not e^{nll}");
    assert!(nll > 0.0 && perplexity.is_finite() && json["error"].as_f64().unwrap() > 0.0, "{json}");
    let (text, _) = folder.run(&[&args[..], &["--windows", "3"]].concat());
    assert!(text.starts_with(&format!("perplexity {perplexity:.4} +/- ")), "{text}");
    let all = folder.json(&[&args[..], &["--json"]].concat());
    assert_eq!(all["windows"], all["tokens"].as_u64().unwrap() / 16);

    folder.write("short", b"ab");
    let error = folder.refused(ANYTHING, &["perplexity", "tiny.gguf", "short", "--context", "16"]);
    assert!(error.contains("less than one window of 16"), "{error}");
    let error = folder.refused(SETTINGS, &["perplexity", "tiny.gguf", "text", "--context", "100000"]);
    assert!(error.contains("--context 100000"), "{error}");
}

#[test]
fn explain_shows_the_search_space_and_what_a_snapshot_knows() {
    let folder = Folder::new();
    let error = folder.refused(SETTINGS, &["explain", "matmul"]);
    assert!(error.contains("`matmul`"), "{error}");
    if !engine::isa::detect().avx2 {
        eprintln!("skipped: no AVX2, so there is nothing to compile");
        return;
    }
    let generate = ["--isa", "avx2", "--snapshot", "kernels.img", "--tune-ms", "60000", "--json"];
    let settings = ["--set", "tune.max_trials=4", "--set", "tune.max_variants=2", "--set", "tune.pairs=8"];
    let report = folder.json(&[&GENERATE[..], &generate, &settings].concat())["report"].clone();
    let trial = &report["trials"][0];
    let (key, variant) = (trial["key"].as_str().unwrap(), trial["variant"].as_str().unwrap());

    let (space, _) = folder.run(&["explain", key, "--isa", "avx2"]);
    assert!(space.starts_with(key) && space.contains(variant), "{space}");
    assert!(space.trim_end().ends_with("ret"), "it ends with the machine code of the first guess: {space}");
    let (known, _) = folder.run(&["explain", key, "--isa", "avx2", "--snapshot", "kernels.img"]);
    let tried = known.lines().find(|line| line.split_whitespace().nth(1) == Some(variant));
    let tried = tried.unwrap_or_else(|| panic!("no line of {variant}: {known}"));
    assert!(tried.contains(trial["outcome"].as_str().unwrap()), "{tried}");
    assert!(known.contains("cycles a call, median; the limit measured now"), "{known}");

    let error = folder.refused(ANYTHING, &["explain", "qkv_q8_0_m1_n32_k32", "--snapshot", "kernels.img"]);
    assert!(error.contains("has never met qkv_q8_0_m1_n32_k32") && error.contains(key), "{error}");
    folder.write("no.img", &[0; 4096]);
    let error = folder.refused(STORAGE, &["explain", key, "--snapshot", "no.img"]);
    assert!(error.contains("no.img"), "{error}");
}
