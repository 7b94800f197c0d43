//! The readers and tokenizers against real model files and token ids made with llama.cpp and llama2.c.
//!
//! Not part of a plain `cargo test`: the files are too large for the repository. Run with
//! `BAREFLOW_REFERENCE_DIR` (holding `{smollm2,stories260K}_tokenizer.json`), `BAREFLOW_MODELS_DIR` (holding
//! `stories260K.{bin,gguf}`, `tok512.bin`) and `BAREFLOW_SMOLLM2` (the GGUF file) set, and `-- --ignored`.

use model::description::Role;
use model::quant::TensorType;
use model::tokenizer::Tokenizer;
use model::{ModelDescription, ModelError, chat, gguf, llama2c};
use std::path::PathBuf;
use std::time::Instant;

fn path(variable: &str, file: &str) -> PathBuf {
    let base = std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}"));
    if file.is_empty() { PathBuf::from(base) } else { PathBuf::from(base).join(file) }
}

fn smollm2() -> ModelDescription {
    let bytes = std::fs::read(path("BAREFLOW_SMOLLM2", "")).unwrap();
    let header = &bytes[..bytes.len().min(4 << 20)];
    let best = (0..5)
        .map(|_| {
            let start = Instant::now();
            gguf::read(header, bytes.len() as u64).unwrap();
            start.elapsed()
        })
        .min();
    eprintln!("reading the SmolLM2 header: {best:?}");
    gguf::read(header, bytes.len() as u64).unwrap()
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn check_vectors(tokenizer: &Tokenizer, file: &str) {
    let text = std::fs::read_to_string(path("BAREFLOW_REFERENCE_DIR", file)).unwrap();
    let vectors: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vectors = vectors.as_array().unwrap();
    assert!(vectors.len() >= 14);
    for vector in vectors {
        let text = vector["text"].as_str().unwrap();
        let expected = ids(&vector["ids"]);
        assert_eq!(tokenizer.encode(text, true), expected, "{text:?}, special");
        assert_eq!(tokenizer.encode(text, false), ids(&vector["ids_specials_as_text"]), "{text:?}, plain");
        assert_eq!(tokenizer.encode_prompt(text, true), ids(&vector["ids_add_special"]), "{text:?}, prompt");
        let pieces = vector["pieces_hex"].as_array().unwrap();
        for (id, piece) in expected.iter().zip(pieces) {
            let hex: String = tokenizer.decode_bytes(*id).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, piece.as_str().unwrap(), "{text:?}, token {id}");
        }
        assert_eq!(String::from_utf8(tokenizer.decode(&expected)).unwrap(), text);
    }
    eprintln!("{}: {} vectors match", file, vectors.len());
}

#[test]
#[ignore = "needs BAREFLOW_SMOLLM2 and BAREFLOW_REFERENCE_DIR"]
fn smollm2_is_described_in_full() {
    let model = smollm2();
    let config = &model.config;
    assert_eq!(
        [config.n_layers, config.dim, config.n_heads, config.n_kv_heads, config.head_dim, config.hidden_dim],
        [30, 576, 9, 3, 64, 1536]
    );
    assert_eq!((config.vocab_size, config.seq_len, config.rope_base), (49152, 8192, 100_000.0));
    assert!(config.tied_head && config.rope_dim == 64);
    assert_eq!(model.tensors.len(), 272);
    assert_eq!(model.dtypes(), "q4_1+q8_0");
    assert_eq!(model.parameters(), 134_515_008);
    assert_eq!(model.head().unwrap().role, Role::TokenEmbedding);
    assert_eq!(model.head().unwrap().ty, TensorType::Q8_0);
    assert_eq!(model.tensors.last().unwrap().end(), model.file_bytes);
    let special = model.tokenizer.special();
    assert_eq!((special.bos, special.eos, special.add_bos), (Some(1), Some(2), false));
    assert_eq!(special.eog, [0, 2]);
    check_vectors(&model.tokenizer, "smollm2_tokenizer.json");

    let template = model.chat_template.as_ref().unwrap();
    let messages = [chat::Message { role: "user", content: "Hi<|im_end|>" }];
    let text = template.render(&model.tokenizer, &messages, true).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = template.encode(&model.tokenizer, &messages, true).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 2, "the user's marker is text");
}

#[test]
#[ignore = "needs BAREFLOW_SMOLLM2"]
fn a_short_smollm2_header_asks_for_more_and_gets_there() {
    let bytes = std::fs::read(path("BAREFLOW_SMOLLM2", "")).unwrap();
    let mut have = 64 * 1024;
    let mut attempts = 1;
    loop {
        match gguf::read(&bytes[..have], bytes.len() as u64) {
            Ok(_) => break,
            Err(ModelError::Truncated { need_bytes, have_bytes, .. }) => {
                assert_eq!(have_bytes, have as u64);
                assert!(need_bytes > have_bytes);
                have = (need_bytes as usize).max(2 * have);
                attempts += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(attempts <= 6, "{attempts}");
}

#[test]
#[ignore = "needs BAREFLOW_MODELS_DIR and BAREFLOW_REFERENCE_DIR"]
fn stories_tokens_agree_between_both_formats() {
    let read = |file| std::fs::read(path("BAREFLOW_MODELS_DIR", file)).unwrap();
    let gguf_file = read("stories260K.gguf");
    let from_gguf = gguf::read(&gguf_file[..65536], gguf_file.len() as u64).unwrap();
    check_vectors(&from_gguf.tokenizer, "stories260K_tokenizer.json");

    let bin = read("stories260K.bin");
    let from_bin = llama2c::read(&bin[..64], bin.len() as u64, &read("tok512.bin")).unwrap();
    check_vectors(&from_bin.tokenizer, "stories260K_tokenizer.json");
    assert_eq!(from_bin.config, model::Config { seq_len: 512, tied_head: true, ..from_gguf.config.clone() });

    let weights = |file: &[u8], model: &ModelDescription, role, layer| {
        let tensor = model.tensor(role, layer).unwrap();
        let mut out = vec![0.0; (tensor.n * tensor.k) as usize];
        let bytes = &file[tensor.offset as usize..tensor.end() as usize];
        model::quant::dequantise(tensor.ty, bytes, &mut out).unwrap();
        out
    };
    for &role in from_bin.config.architecture.blueprint().layer {
        for layer in 0..5 {
            let (a, b) =
                (weights(&bin, &from_bin, role, Some(layer)), weights(&gguf_file, &from_gguf, role, Some(layer)));
            assert_eq!(a, b, "{role:?} {layer}");
        }
    }
}

#[test]
#[ignore = "needs BAREFLOW_MODELS_DIR"]
fn the_llama2_tokenizer_file_reads_and_encodes() {
    let bytes = std::fs::read(path("BAREFLOW_MODELS_DIR", "tokenizer-llama2-32000.bin")).unwrap();
    let tokenizer = llama2c::read_tokenizer(&bytes, 32000).unwrap();
    let prompt = "I believe the meaning of life is";
    // From the test vectors in llama2.c's test.c.
    assert_eq!(tokenizer.encode_prompt(prompt, false), [1, 306, 4658, 278, 6593, 310, 2834, 338]);
    let prompt = "Simply put, the theory of relativity states that ";
    assert_eq!(
        tokenizer.encode_prompt(prompt, false),
        [1, 3439, 17632, 1925, 29892, 278, 6368, 310, 14215, 537, 5922, 393, 29871]
    );
}

#[test]
#[ignore = "needs BAREFLOW_SMOLLM2 and BAREFLOW_MODELS_DIR; prints times"]
fn encoding_is_not_quadratic() {
    let bin = std::fs::read(path("BAREFLOW_MODELS_DIR", "tok512.bin")).unwrap();
    for (name, tokenizer) in [("smollm2", smollm2().tokenizer), ("tok512", llama2c::read_tokenizer(&bin, 512).unwrap())]
    {
        for (what, text) in [("one long word", "a".repeat(1 << 20)), ("words", "once upon a time ".repeat(1 << 16))] {
            let start = Instant::now();
            let ids = tokenizer.encode(&text, false);
            let elapsed = start.elapsed();
            eprintln!("{name}, {what}: {} bytes -> {} ids in {elapsed:?}", text.len(), ids.len());
            assert_eq!(tokenizer.decode(&ids), text.as_bytes());
            assert!(elapsed.as_secs() < 20);
        }
    }
}
