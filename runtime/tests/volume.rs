//! What a boot makes of the files on its boot volume.

mod support;

use bootimage::ImageSpec;
use model::synthetic::{self, Spec, TokenizerKind};
use runtime::RunError;
use storage::{MemoryDisk, StorageError};
use support::{Machine, volume};

#[test]
fn a_settings_file_that_is_too_long_is_an_error_and_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let boot = |padding: usize| {
        let config = format!("#{}\nmax_tokens=3\n", " ".repeat(padding));
        let len_bytes = config.len() as u64;
        let spec = ImageSpec { config, slot_mib: 1, overwrite: true, ..ImageSpec::without_kernel() };
        bootimage::build(&spec, &image).unwrap();
        let mut machine = Machine::with_model(&file);
        machine.boot = Some(MemoryDisk::new(std::fs::read(&image).unwrap()));
        (machine.boot("prompt=ab"), len_bytes)
    };
    let (outcome, _) = boot(60 << 10);
    assert_eq!(outcome.report.unwrap().token_ids.len(), 3);
    let (outcome, len) = boot(64 << 10);
    match outcome.error.expect("the last setting is beyond what is read") {
        RunError::FileTooLong { name, len_bytes, max_bytes: 65_536 } => {
            assert_eq!((name.as_str(), len_bytes), ("BAREFLOW.CFG", len));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_tokenizer_that_is_named_has_to_be_there() {
    let spec = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    let synthetic::Llama2cFiles { model, tokenizer } = synthetic::llama2c(&spec).unwrap();
    let mut machine = Machine::with_model(&model);
    assert!(matches!(machine.refused("prompt=a tokenizer=TOK.BIN"), RunError::NoVolumeForTokenizer { .. }));
    assert!(matches!(machine.refused("prompt=a"), RunError::NoTokenizer));
    machine.boot = Some(volume(&[("TOK.BIN", &tokenizer)]));
    assert!(machine.boot("prompt=a max_tokens=2 tokenizer=TOK.BIN").report.is_some());
    match machine.refused("prompt=a tokenizer=TIK.BIN") {
        RunError::Storage(StorageError::NotFound { path }) => assert_eq!(path, "TIK.BIN"),
        other => panic!("{other}"),
    }
}
