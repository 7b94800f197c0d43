//! `bareflow` with a snapshot: what a run may take from it and what it may leave in it.

use jit::Compiler;
use model::Isa;
use model::kernel::{Variant, Width};
use model::synthetic::{self, Spec};
use serde_json::Value;
use sha2::{Digest, Sha256};
use snapshot_format::{DiskMedium, Identity, Snapshot, StoredKernel};
use std::path::{Path, PathBuf};
use std::process::Command;
use storage::MemoryDisk;

/// A directory with a tiny model, and an image with a snapshot that a run without tuning left.
struct Bench {
    _dir: tempfile::TempDir,
    model: PathBuf,
    image: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (model, image) = (dir.path().join("tiny.gguf"), dir.path().join("kernels.img"));
        std::fs::write(&model, synthetic::gguf(&Spec::default()).unwrap()).unwrap();
        let bench = Self { _dir: dir, model, image };
        bench.run(&["--isa", "avx2"]);
        bench
    }

    /// The printed JSON of `bareflow generate`, and what it wrote to standard error.
    fn run(&self, args: &[&str]) -> (Value, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_bareflow"))
            .args(["generate", "--json", "--prompt", "ab", "--max-tokens", "8", "--ignore-eos", "--threads", "1"])
            .args([Path::new("--model"), &self.model, Path::new("--snapshot"), &self.image])
            .args(args)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {stderr}");
        (serde_json::from_slice(&output.stdout).unwrap(), stderr)
    }

    fn read(&self) -> (Snapshot, Identity, u64) {
        let mut disk = MemoryDisk::new(std::fs::read(&self.image).unwrap());
        let (opened, identity) = snapshot_format::open_any(&mut DiskMedium::open(&mut disk).unwrap()).unwrap();
        (opened.snapshot, identity, opened.generation)
    }

    /// Commits what `edit` makes of the snapshot.
    fn edit(&self, edit: impl FnOnce(&mut Snapshot)) {
        let (mut snapshot, identity, _) = self.read();
        edit(&mut snapshot);
        let mut disk = MemoryDisk::new(std::fs::read(&self.image).unwrap());
        snapshot_format::save(&mut DiskMedium::open(&mut disk).unwrap(), &identity, &snapshot).unwrap();
        std::fs::write(&self.image, disk.into_bytes()).unwrap();
    }
}

/// Compiled kernels need AVX2; without it a run with a snapshot is that of `a_machine_without_avx2_...` alone.
fn has_avx2() -> bool {
    engine::isa::detect().avx2
}

/// Puts a working AVX2 kernel in place of every incumbent, by the name `rename` gives it.
fn install_everywhere(snapshot: &mut Snapshot, rename: impl Fn(Variant) -> Variant) {
    let mut compiler = Compiler::new(Isa::AVX2).unwrap();
    for record in &mut snapshot.entries {
        let variant = jit::space::variants(&record.key, Isa::AVX2)
            .into_iter()
            .find(|variant| variant.width == Width::Y256 && compiler.compile(&record.key, variant).is_ok())
            .unwrap();
        let code = compiler.compile(&record.key, &variant).unwrap().code;
        record.incumbent = Some(StoredKernel::new(rename(variant), code));
    }
}

#[test]
fn kernels_that_a_forced_tier_rules_out_do_not_run_and_are_kept() {
    if !engine::isa::detect().avx512 {
        return; // The CPU itself rules them out: they are compiled again or dropped.
    }
    let bench = Bench::new();
    bench.edit(|snapshot| {
        install_everywhere(snapshot, |variant| Variant { width: Width::Z512, ..variant });
    });
    let before = bench.read();
    let (out, stderr) = bench.run(&["--isa", "avx2", "--tune-ms", "50"]);
    assert_eq!(out["report"]["kernels_loaded"], 0);
    for row in out["report"]["kernels"].as_array().unwrap() {
        assert_eq!(row["variant"], "avx2", "{row}");
    }
    assert!(stderr.contains("isa= rules out"), "{stderr}");
    assert_eq!(out["report"]["convergence"]["converged"], false);
    assert_eq!(bench.read(), before, "what the limit rules out is kept, and nothing is learnt beside it");
}

#[test]
fn the_first_run_with_a_model_hashes_it_and_the_snapshot_remembers() {
    if !has_avx2() {
        return;
    }
    let bench = Bench::new();
    let digest = || -> [u8; 32] { Sha256::digest(std::fs::read(&bench.model).unwrap()).into() };
    let hash = || digest().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let file = bench.read().0.model_file.unwrap();
    assert_eq!(file.sha256, digest());
    assert_eq!(file.len_bytes, std::fs::metadata(&bench.model).unwrap().len());
    let reported = |args: &[&str]| {
        let model = bench.run(args).0["report"]["model"].clone();
        (model["sha256"].as_str().map(String::from), model["sha256_remembered"] == true)
    };
    assert_eq!(reported(&[]), (Some(hash()), true));
    // Asked for, it is computed again.
    assert_eq!(reported(&["--set", "model.sha256=show"]), (Some(hash()), false));
    // Another model in its place: met by a run that did not compute it, and known from the next on.
    let other = synthetic::gguf(&Spec { n_layers: 3, ..Spec::default() }).unwrap();
    std::fs::write(&bench.model, &other).unwrap();
    assert_eq!(reported(&[]), (None, false));
    assert_eq!(reported(&[]), (Some(hash()), false));
    assert_eq!(reported(&[]), (Some(hash()), true));
}

#[test]
fn runs_without_compiled_kernels_leave_the_snapshot_as_it_is() {
    if !has_avx2() {
        return;
    }
    let bench = Bench::new();
    bench.edit(|snapshot| install_everywhere(snapshot, |variant| variant));
    let before = bench.read();
    assert!(before.0.entries.iter().all(|record| record.baseline_median_cycles.is_some()), "the first run had none");
    for args in [["--tier", "baseline"], ["--tier", "reference"], ["--isa", "portable"]] {
        let (out, _) = bench.run(&args);
        assert_eq!(out["report"]["kernels_loaded"], 0, "{args:?}");
        let reason = out["report"]["snapshot"]["reason"].as_str().unwrap();
        assert!(reason.contains("left as it is"), "{args:?}: {reason}");
        assert_eq!(bench.read(), before, "{args:?}");
    }
    // A run that does run them counts, and keeps the first run's times of the hand-written ops.
    let (out, _) = bench.run(&["--isa", "avx2"]);
    assert_eq!(out["report"]["kernels_loaded"], before.0.entries.len());
    let after = bench.read().0;
    assert_eq!(after.boots.len(), before.0.boots.len() + 1);
    for (old, new) in before.0.entries.iter().zip(&after.entries) {
        assert_eq!(old.baseline_median_cycles, new.baseline_median_cycles, "{}", old.key);
    }
}

#[test]
fn a_reference_run_does_not_pass_for_the_hand_written_baseline() {
    if !has_avx2() {
        return;
    }
    let bench = Bench::new();
    std::fs::remove_file(&bench.image).unwrap();
    bench.run(&["--tier", "reference"]);
    bench.run(&["--isa", "avx2"]);
    let (snapshot, ..) = bench.read();
    assert_eq!((snapshot.boot_count, snapshot.boots.len()), (1, 1), "the reference run left a line");
}

#[test]
fn forged_code_with_a_right_hash_is_quarantined_before_it_runs() {
    if !has_avx2() {
        return;
    }
    let bench = Bench::new();
    bench.edit(|snapshot| install_everywhere(snapshot, |variant| variant));
    // `syscall` with 60 in rax would end the process with a status; then zeros.
    let forged = [0xb8, 0x3c, 0x00, 0x00, 0x00, 0x0f, 0x05, 0xc5, 0xf8, 0x77, 0xc3];
    let mut victim = None;
    bench.edit(|snapshot| {
        let record = &mut snapshot.entries[0];
        let variant = record.incumbent.as_ref().unwrap().variant;
        record.incumbent = Some(StoredKernel::new(variant, forged.to_vec()));
        victim = Some((record.key, variant));
    });
    let (key, variant) = victim.unwrap();
    let (out, stderr) = bench.run(&["--isa", "avx2"]);
    assert!(stderr.contains("refused by the audit before it ran"), "{stderr}");
    let (snapshot, ..) = bench.read();
    assert_eq!(out["report"]["kernels_loaded"], snapshot.entries.len() - 1);
    let record = snapshot.record(&key).unwrap();
    assert!(record.incumbent.is_none() && record.quarantined.contains(&variant));
}
