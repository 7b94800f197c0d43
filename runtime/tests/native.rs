//! What the runtime of the native image, without a compiler and without the check of signatures, does not do: it says so.
//!
//! Tests of the whole workspace build the runtime with both; `cargo test -p runtime` builds it as the native image.
#![cfg(not(any(feature = "jit", feature = "signature")))]

mod support;

use model::synthetic::{self, Spec};
use runtime::RunError;
use support::{Machine, volume};

#[test]
fn a_public_key_is_refused_rather_than_ignored() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let settings = format!("prompt=ab max_tokens=4 model.public_key={}", "d7".repeat(32));
    let mut machine = Machine::with_model(&file);
    for signature in [&[][..], &[1; 64], &[1; 65]] {
        machine.boot = Some(volume(&[("MODEL.SIG", signature)]));
        let error = machine.refused(&settings);
        assert!(matches!(error, RunError::NoSignatureCheck), "{} bytes: {error}", signature.len());
    }
    machine.boot = None;
    let error = machine.refused(&settings);
    assert!(matches!(error, RunError::NoSignature { .. } | RunError::NoSignatureCheck), "{error}");
    machine.boot("prompt=ab max_tokens=4").report.expect("without a key the model runs");
}

#[test]
fn an_image_without_kernels_for_the_model_is_refused() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let mut machine = Machine::with_model(&file);
    if !engine::Isa::detect().avx2 {
        // Nothing compiled could run: such a machine takes the reference, and says so.
        return;
    }
    let error = machine.refused("prompt=ab max_tokens=4 tier=compiled");
    assert!(matches!(error, RunError::NoLinkedKernel), "{error}");
}

#[test]
fn nothing_is_tuned_and_nothing_saved() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let mut machine = Machine::with_model(&file);
    let report = machine.boot("prompt=ab max_tokens=4 tune.budget_ms=1000 snapshot=true").report.unwrap();
    assert_eq!(report.snapshot.reason.as_deref(), Some("a native image learns nothing"));
    assert_eq!((report.kernels_compiled, report.trials.len(), report.boot), (0, 0, 1));
    assert!(!report.convergence.converged);
}
