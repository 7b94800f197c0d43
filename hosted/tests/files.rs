//! `bareflow` with files that are missing, in the way, or not what they should be.

use model::TensorType;
use model::synthetic::{self, Spec};
use std::path::Path;
use std::process::{Command, Output};

fn bareflow(args: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bareflow")).args(args).current_dir(dir).output().unwrap()
}

/// What a run that must fail writes to standard error.
fn refused(args: &[&str], dir: &Path) -> String {
    let output = bareflow(args, dir);
    assert!(!output.status.success(), "{args:?} passed");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn convert_touches_nothing_but_its_output() {
    let dir = tempfile::tempdir().unwrap();
    let file = synthetic::gguf(&Spec::default()).unwrap();
    // An input whose name is that of the output with the extension of a partial file.
    for name in ["model.part", "model.gguf.part", "model.tmp"] {
        std::fs::write(dir.path().join(name), &file).unwrap();
        let output = bareflow(&["convert", name, "model.gguf", "--type", "Q8_0", "--force"], dir.path());
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(std::fs::read(dir.path().join(name)).unwrap(), file, "{name} has changed");
    }
    let expected = synthetic::gguf(&Spec { matrices: TensorType::Q8_0, ..Spec::default() }).unwrap();
    let converted = std::fs::read(dir.path().join("model.gguf")).unwrap();
    assert!(converted.len().abs_diff(expected.len()) < 1024, "{} bytes", converted.len());
    std::fs::write(dir.path().join("noise.gguf"), [0xa5; 4096]).unwrap();
    refused(&["convert", "noise.gguf", "out.gguf", "--type", "Q8_0"], dir.path());
    let mut left: Vec<String> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["model.gguf", "model.gguf.part", "model.part", "model.tmp", "noise.gguf"]);
}

#[test]
fn memory_is_asked_for_before_the_weights_are_read() {
    let dir = tempfile::tempdir().unwrap();
    // Half a terabyte of keys and values.
    let spec = Spec { seq_len: 1 << 22, n_layers: 64, n_kv_heads: 4, head_dim: 64, ..Spec::default() };
    std::fs::write(dir.path().join("long.gguf"), synthetic::gguf(&spec).unwrap()).unwrap();
    // The hash is wrong, too, and is known once everything was read.
    let hash = format!("model.sha256={:064}", 0);
    let context = (1 << 22).to_string();
    let args = ["generate", "--model", "long.gguf", "--context", &context, "--threads", "1", "--set", &hash];
    let error = refused(&args, dir.path());
    assert!(error.contains("not enough memory for kv"), "{error}");
}

#[test]
fn a_llama2c_model_asks_for_its_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { tokenizer: synthetic::TokenizerKind::SentencePiece, ..Spec::default() };
    let synthetic::Llama2cFiles { model, tokenizer } = synthetic::llama2c(&spec).unwrap();
    std::fs::write(dir.path().join("tiny.bin"), model).unwrap();
    std::fs::write(dir.path().join("tok.bin"), tokenizer).unwrap();
    let run = ["generate", "--model", "tiny.bin", "--threads", "1", "--max-tokens", "2", "--prompt", "a"];
    let error = refused(&run, dir.path());
    assert!(error.contains("tokenizer="), "{error}");
    let error = refused(&[&run[..], &["--set", "tokenizer=TOK.BIN"]].concat(), dir.path());
    assert!(error.contains("TOK.BIN") && error.contains("no boot volume"), "{error}");
    let output = bareflow(&[&run[..], &["--tokenizer", "tok.bin"]].concat(), dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The same file is what the judge of kernels needs.
    let tune = ["tune", "--model", "tiny.bin", "--threads", "1", "--max-tokens", "2", "--prompt", "a", "--rounds", "1"];
    let output = bareflow(&[&tune[..], &["--tokenizer", "tok.bin"]].concat(), dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_llama2c_model_says_the_same_as_a_gguf_file() {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec { tokenizer: synthetic::TokenizerKind::SentencePiece, ..Spec::default() };
    for version in 0..=2 {
        let synthetic::Llama2cFiles { model, tokenizer } = synthetic::llama2c_version(&spec, version).unwrap();
        std::fs::write(dir.path().join("tiny.bin"), model).unwrap();
        std::fs::write(dir.path().join("tok.bin"), tokenizer).unwrap();
        let error = refused(&["convert", "tiny.bin", "tiny.gguf"], dir.path());
        assert!(error.contains("--tokenizer") && !dir.path().join("tiny.gguf").exists(), "{error}");
        let output = bareflow(&["convert", "tiny.bin", "tiny.gguf", "--tokenizer", "tok.bin"], dir.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let ids = |model: &[&str]| {
            let run =
                ["generate", "--threads", "1", "--max-tokens", "12", "--ignore-eos", "--prompt", "Once upon", "--json"];
            let output = bareflow(&[&run[..], model].concat(), dir.path());
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            json["token_ids"].as_array().unwrap().clone()
        };
        let from_bin = ids(&["--model", "tiny.bin", "--tokenizer", "tok.bin"]);
        assert_eq!(from_bin.len(), 12);
        assert_eq!(ids(&["--model", "tiny.gguf"]), from_bin, "version {version}");
        let error = refused(&["convert", "tiny.gguf", "again.gguf"], dir.path());
        assert!(error.contains("--type"), "{error}");
        let args = ["convert", "tiny.gguf", "again.gguf", "--type", "F16", "--tokenizer", "tok.bin"];
        assert!(refused(&args, dir.path()).contains("its own tokenizer"));
        std::fs::remove_file(dir.path().join("tiny.gguf")).unwrap();
    }
}

#[test]
fn tune_refuses_what_it_would_ignore() {
    let dir = tempfile::tempdir().unwrap();
    for (args, word) in [
        (&["--report"][..], "--report"),
        (&["--tune-ms", "5"], "--tune-ms"),
        (&["--rounds", "0"], "--rounds"),
        (&["--exhaustive", "--rounds", "0"], "--rounds"),
    ] {
        let error = refused(&[&["tune", "--model", "none.gguf"][..], args].concat(), dir.path());
        assert!(error.contains(word), "{args:?}: {error}");
    }
}
