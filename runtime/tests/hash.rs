//! The model's SHA-256: computed or not by rule, right whatever the disk hides of the file's end, and enforced.

mod support;

use model::synthetic::{self, Llama2cFiles, Spec, TokenizerKind};
use runtime::RunError;
use sha2::{Digest, Sha256};
use support::{Machine, Threads, volume};

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn the_hash_is_shown_by_rule_and_says_of_how_many_bytes() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    assert!(file.len().is_multiple_of(32) && !file.len().is_multiple_of(512));
    let shown = format!("SHA-256 of the model's {} bytes: {}", file.len(), hash(&file));
    let boot = |workers: usize, option: &str| {
        let mut machine = Machine::with_model(&file);
        machine.workers = Threads(workers);
        let report = machine.boot(&format!("prompt=ab max_tokens=2 threads=1 {option}")).report.unwrap();
        (report.model.sha256, machine.printed)
    };
    for workers in [1, 2, 3] {
        let (sha256, printed) = boot(workers, "model.sha256=show");
        assert_eq!(sha256, Some(hash(&file)));
        assert!(printed.contains(&shown), "{printed}");
        // Nothing here would remember it, so by itself no boot computes it.
        for option in ["", "model.sha256=auto", "model.sha256=off"] {
            let (sha256, printed) = boot(workers, option);
            assert!(
                sha256.is_none()
                    && printed.contains("the model's SHA-256 is not known (model.sha256=show computes it): "),
                "{printed}"
            );
        }
        let (sha256, _) = boot(workers, &format!("model.sha256={}", hash(&file)));
        assert_eq!(sha256, Some(hash(&file)));
    }
}

#[test]
fn whatever_the_end_of_the_file_its_hash_is_found() {
    let whole = synthetic::gguf(&Spec::default()).unwrap();
    let spec = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    let Llama2cFiles { model: bin, tokenizer } = synthetic::llama2c(&spec).unwrap();
    let padded = |alignment: usize| {
        let mut file = whole.clone();
        file.resize(file.len().next_multiple_of(alignment), 0);
        file
    };
    for file in [padded(32), padded(64), padded(128), padded(256), padded(512), bin] {
        let mut machine = Machine::with_model(&file);
        machine.boot = Some(volume(&[("TOK.BIN", &tokenizer)]));
        let settings = format!("prompt=ab max_tokens=2 tokenizer=TOK.BIN model.sha256={}", hash(&file));
        assert_eq!(machine.boot(&settings).report.unwrap().model.sha256, Some(hash(&file)));
    }
    // A file of a volume has its own end, whatever stands in its last sector.
    let mut odd = whole.clone();
    odd.extend(b"seven b");
    let mut machine = Machine::with_model(&[]);
    machine.model = None;
    machine.boot = Some(volume(&[("A.GGU", &odd)]));
    let report = machine.boot("prompt=ab max_tokens=2 model.sha256=show").report.unwrap();
    assert_eq!(report.model.sha256, Some(hash(&odd)));
}

#[test]
fn another_file_does_not_run() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let mut changed = file.clone();
    *changed.last_mut().unwrap() ^= 1;
    for workers in [1, 2] {
        let mut machine = Machine::with_model(&changed);
        machine.workers = Threads(workers);
        let error = machine.refused(&format!("model.sha256={}", hash(&file)));
        let RunError::WrongModelHash { expected, found } = error else { panic!("{error}") };
        assert_eq!((expected, found), (hash(&file), hash(&changed)));
    }
}
