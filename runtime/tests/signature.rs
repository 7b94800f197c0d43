//! A model with a configured public key runs only if the signature file on the boot volume is of exactly its bytes; and
//! nothing of it is parsed before.
#![cfg(feature = "signature")]

mod support;

use ed25519_dalek::{Signer, SigningKey};
use model::synthetic::{self, Spec};
use runtime::RunError;
use runtime::options::OptionError;
use support::{Machine, volume};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// As `truncate -s %512`.
fn whole_sectors(file: &[u8]) -> Vec<u8> {
    let mut padded = file.to_vec();
    padded.resize(file.len().next_multiple_of(512), 0);
    padded
}

fn signer() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn settings() -> String {
    format!("prompt=ab max_tokens=4 model.public_key={}", hex(signer().verifying_key().as_bytes()))
}

#[test]
fn a_raw_disk_is_signed_with_its_padding_and_a_file_without() {
    let mut file = synthetic::gguf(&Spec::default()).unwrap();
    // Whatever the length of the file, its disk is whole sectors; a GGUF file may have bytes behind its last tensor.
    file.extend([0; 7]);
    assert!(!file.len().is_multiple_of(512));
    let of_disk = signer().sign(&whole_sectors(&file)).to_bytes();
    let of_file = signer().sign(&file).to_bytes();
    let unsigned = Machine::with_model(&file).boot("prompt=ab max_tokens=4").report.unwrap();

    let mut machine = Machine::with_model(&file);
    machine.boot = Some(volume(&[("MODEL.SIG", &of_disk)]));
    let report = machine.boot(&settings()).report.unwrap();
    assert_eq!(report.token_ids, unsigned.token_ids);
    assert!(machine.printed.contains(&format!("signed by {}", hex(signer().verifying_key().as_bytes()))));
    machine.boot = Some(volume(&[("MODEL.SIG", &of_file)]));
    assert!(matches!(machine.refused(&settings()), RunError::WrongSignature { .. }));

    machine.model = None;
    machine.boot = Some(volume(&[("MODEL.SIG", &of_file), ("A.GGU", &file)]));
    assert_eq!(machine.boot(&settings()).report.unwrap().token_ids, unsigned.token_ids);
    machine.boot = Some(volume(&[("OTHER.SIG", &of_file), ("A.GGU", &file)]));
    let named = settings() + " model.signature=OTHER.SIG";
    assert_eq!(machine.boot(&named).report.unwrap().token_ids, unsigned.token_ids);
    machine.boot = Some(volume(&[("MODEL.SIG", &of_disk), ("A.GGU", &file)]));
    assert!(matches!(machine.refused(&settings()), RunError::WrongSignature { .. }));
}

#[test]
fn every_changed_model_is_refused_before_it_is_parsed() {
    let file = whole_sectors(&synthetic::gguf(&Spec::default()).unwrap());
    let signature = signer().sign(&file).to_bytes();
    let boot = Some(volume(&[("MODEL.SIG", &signature)]));
    let refused = |file: &[u8]| {
        let mut machine = Machine::with_model(file);
        machine.boot = boot.clone();
        machine.refused(&settings())
    };
    // The magic number, the header, a weight, the last byte: never what a parser says.
    for at in [0, 9, 100, file.len() / 2, file.len() - 1] {
        let mut changed = file.clone();
        changed[at] ^= 0x10;
        let error = refused(&changed);
        assert!(
            matches!(error, RunError::WrongSignature { model_bytes } if model_bytes == file.len() as u64),
            "byte {at}: {error}"
        );
    }
    for noise in [&[][..], &[0xa5; 4096], &file[..1024]] {
        assert!(matches!(refused(noise), RunError::WrongSignature { .. }));
    }
}

#[test]
fn missing_and_malformed_signatures_and_keys_are_told_apart() {
    let file = whole_sectors(&synthetic::gguf(&Spec::default()).unwrap());
    let signature = signer().sign(&file).to_bytes();
    let mut machine = Machine::with_model(&file);
    let missing = |error| matches!(error, RunError::NoSignature { name } if name == "MODEL.SIG");
    assert!(missing(machine.refused(&settings())), "no volume");
    machine.boot = Some(volume(&[]));
    assert!(missing(machine.refused(&settings())), "no file");
    for found in [0, 63, 65, 1000] {
        machine.boot = Some(volume(&[("MODEL.SIG", &signature.repeat(16)[..found])]));
        let error = machine.refused(&settings());
        assert!(matches!(error, RunError::SignatureLength { found_bytes } if found_bytes == found), "{error}");
    }
    machine.boot = Some(volume(&[("MODEL.SIG", &signature)]));
    let other = settings().replace(&hex(signer().verifying_key().as_bytes()), &hex(&[0x55; 32]));
    assert!(matches!(machine.refused(&other), RunError::WrongSignature { .. } | RunError::BadPublicKey));
    let weak = format!("model.public_key=01{}", "00".repeat(31));
    assert!(matches!(machine.refused(&weak), RunError::BadPublicKey));
    let error = machine.refused("model.public_key=12ab");
    let RunError::Option(OptionError::BadValue { key, expected, found }) = error else { panic!("{error}") };
    assert_eq!((&key[..], expected, &found[..]), ("model.public_key", "64 hexadecimal digits", "12ab"));
    assert!(matches!(machine.refused("model.signature=A.SIG"), RunError::NoPublicKey));
}
