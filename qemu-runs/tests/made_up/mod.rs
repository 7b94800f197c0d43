//! Made-up reports for tests of the report's form. The numbers mean nothing and never leave the tests.

#![allow(dead_code)]

use qemu_runs::{Accel, BootRecord, Environment, ImageBytes, LoadRecord, NativeRecord, RunReport};
use report::{
    BootReport, Convergence, ImageKind, KernelRow, LoadFacts, LoadRound, MemoryRow, ModelFacts, PartRow,
    SnapshotOutcome, SnapshotStatus, Stage, TrialOutcome, TrialRow,
};

const KEYS: [(&str, f64, u64); 7] = [
    ("gate_up_silu_q4_1_m1_n1536_k576", 0.34, 412_000),
    ("lm_head_q8_0_m1_n49152_k576", 0.27, 9_800_000),
    ("matmul_residual_q4_1_m1_n576_k1536", 0.17, 203_000),
    ("qkv_q4_1_m1_n960_k576", 0.11, 131_000),
    ("matmul_residual_q4_1_m1_n576_k576", 0.07, 79_000),
    ("gate_up_silu_q4_1_m4_n1536_k576", 0.03, 903_000),
    ("qkv_q4_1_m4_n960_k576", 0.01, 322_000),
];

pub fn made_up_boot(boot: u32) -> BootReport {
    let progress = 1.0 - 0.5f64.powf(f64::from(boot - 1) * 0.8);
    let kernels = KEYS
        .iter()
        .enumerate()
        .map(|(i, (key, share, before))| {
            let gain = 1.0 + (0.15 + 0.17 * ((i * 5 % 7) as f64)) * progress;
            let after = (*before as f64 / gain) as u64;
            KernelRow {
                key: (*key).into(),
                variant: if boot == 1 {
                    "avx2".into()
                } else {
                    format!("w256_r1_c32_s{}_u2_pf{}", 1 << (i % 3), 1024 * i)
                },
                calls: if i == 1 { 63 } else { 1890 },
                time_share: *share,
                total_cycles: after * 1890,
                min_cycles: after - after / 20,
                max_cycles: after * 2,
                median_cycles: after,
                baseline_cycles: (i != 6).then_some(*before),
                bytes_per_call: 1_105_920,
                gb_s: Some(7.4 * gain),
                gflop_s: Some(21.0 * gain),
                limit_fraction: (i != 5).then_some(0.44 * gain),
                variants_tried: (boot * 6).min(48),
                variants_total: 48,
                settled: boot > 5,
            }
        })
        .collect();
    let tried = [26, 31, 24, 12, 5, 0, 0, 0][(boot as usize - 1).min(7)];
    let trials = (0..tried)
        .map(|i| TrialRow {
            key: KEYS[i % 7].0.into(),
            variant: format!("w256_r1_c32_s{}_u{}_pf{}", 1 << (i % 3), 1 + i % 4, 512 * (i % 9)),
            incumbent: "avx2".into(),
            ratio: (i % 9 != 5).then_some(0.7 + 0.04 * i as f64),
            outcome: match i {
                0..4 if boot < 5 => TrialOutcome::Kept,
                7 if boot == 2 => TrialOutcome::Faulted,
                i if i % 9 == 5 => TrialOutcome::Refused,
                _ => TrialOutcome::Slower,
            },
            compile_us: Some(310.0 + i as f64),
            code_bytes: Some(900 + i as u32),
        })
        .collect::<Vec<_>>();
    let stage = |name: &str, ms: f64| Stage { name: name.into(), ms };
    BootReport {
        boot,
        image: ImageKind::Jit,
        build_id: "0123456789abcdef".into(),
        hypervisor: "KVM".into(),
        cpu: "Made-up(R) Test CPU @ 2.70GHz".into(),
        isa: "avx2".into(),
        threads: 2,
        tsc_hz: 2_700_000_000,
        clock_trusted: true,
        unix_time: Some(1_790_000_000),
        model: ModelFacts {
            name: "Made-up-135M (test fixture)".into(),
            architecture: "llama".into(),
            file_bytes: 98_362_432,
            fingerprint: "c2".repeat(32),
            sha256: Some("b1".repeat(32)),
            sha256_remembered: boot > 1,
            n_layers: 30,
            dim: 576,
            vocab_size: 49152,
            dtypes: "q4_1+q8_0".into(),
        },
        prompt: "Once upon a time".into(),
        prompt_tokens: 4,
        token_ids: (100..164).collect(),
        text: ", there was a report that looked the same in light & <dark>. This text is made up.".into(),
        stages: vec![
            stage("platform", 14.2),
            stage("open_model", 31.0),
            stage("load_model", 188.0 + 20.0 / f64::from(boot)),
            stage("snapshot", if boot == 1 { 0.6 } else { 9.4 }),
            stage("prefill", 61.0 - 25.0 * progress),
            stage("decode", 1400.0 - 560.0 * progress),
            stage("tune", if tried > 0 { 55.0 * tried as f64 } else { 0.0 }),
            stage("save", 12.5),
        ],
        ttft_ms: 312.0 - 40.0 * progress,
        prefill_tok_s: 120.0 + 95.0 * progress,
        decode_tok_s: 46.1 + 31.0 * progress + f64::from(boot % 3) * 0.4,
        token_ms_median: 13.0,
        read_gb_s: Some(16.2),
        peak_gflop_s: Some(87.0),
        interrupted: Some(0.013),
        load: Some(LoadFacts { bytes: 98_362_432, mb_s: 1810.0, raw_mb_s: 2011.0, rounds: Vec::new() }),
        profiler_overhead: Some(0.0004),
        parts: vec![PartRow {
            name: "attention".into(),
            prefill_share: Some(0.02),
            decode_share: Some(0.01),
            decode_us: Some(130.0),
        }],
        memory: vec![
            MemoryRow { name: "weights".into(), used_bytes: 104_000_000, capacity_bytes: 104_000_000 },
            MemoryRow { name: "code".into(), used_bytes: 210_000, capacity_bytes: 16_000_000 },
        ],
        kernels,
        kernels_loaded: if boot == 1 { 0 } else { 7 },
        kernels_compiled: tried as u32,
        kernels_changed: trials.iter().filter(|t| t.outcome == TrialOutcome::Kept).count() as u32,
        compile_ms_total: tried as f64 * 0.31,
        trials,
        snapshot: SnapshotStatus {
            outcome: if boot == 1 { SnapshotOutcome::Cold } else { SnapshotOutcome::Loaded },
            reason: (boot == 1).then(|| "both slots are empty".into()),
            generation_loaded: (boot > 1).then(|| u64::from(boot) - 1),
            generation_saved: Some(u64::from(boot)),
            saved_bytes: Some(18_000 + 900 * u64::from(boot)),
            kernels_restored: if boot == 1 { 0 } else { 7 },
        },
        convergence: Convergence {
            converged: boot >= 8,
            settled_share: (0.2 * f64::from(boot)).min(1.0),
            unchanged_boots: boot.saturating_sub(5),
            window: 3,
            token_time_variation: (boot > 2).then_some(0.0062),
            machine_variation: None,
            max_variation: 0.01,
            allowed_variation: 0.01,
            variation_required: true,
            reason: if boot >= 8 { String::new() } else { "kernels are still being tuned".into() },
        },
    }
}

pub fn record(report: BootReport) -> BootRecord {
    BootRecord { report, wall_s: 3.2 }
}

pub fn made_up_run(boots: u32, accel: Accel) -> RunReport {
    let environment = Environment {
        qemu: "QEMU emulator version 0 (test)".into(),
        host_cpu: Some("Made-up(R) Test CPU @ 2.70GHz".into()),
        host_cores: Some(2),
        commit: Some("0123456789ab".into()),
        command: "qemu-runs converge --kernel a.elf --disk d.img".into(),
        machine: "qemu-system-x86_64 -machine q35,accel=kvm".into(),
        memory_mib: 1024,
        cpus: 2,
    };
    let mut run = RunReport::new(accel, format!("{accel} (made up)"), 12, environment);
    run.jit_image = Some(ImageBytes { elf_bytes: 2_430_000, text_bytes: 1_710_000 });
    for boot in 1..=boots {
        let mut report = made_up_boot(boot);
        report.clock_trusted = accel == Accel::Kvm;
        run.push(record(report));
    }
    run
}

#[allow(dead_code, reason = "each test file uses a part of this module")]
/// A boot of `image` whose loads ran at these shares of the raw rate.
pub fn made_up_load(image: ImageKind, shares: &[f64]) -> LoadRecord {
    let rounds = shares.iter().map(|share| LoadRound { mb_s: 2000.0 * share, raw_mb_s: 2000.0 }).collect();
    let load = Some(LoadFacts { bytes: 98_362_432, mb_s: 1810.0, raw_mb_s: 2011.0, rounds });
    LoadRecord::of(record(BootReport { image, load, ..made_up_boot(8) })).expect("there are rounds")
}

pub fn made_up_native(boots: u32) -> NativeRecord {
    let native = |i: u32| {
        let mut report = made_up_boot(8);
        report.image = ImageKind::Native;
        report.decode_tok_s += f64::from(i) * 0.3;
        report.stages.retain(|s| s.name != "tune" && s.name != "save" && s.name != "snapshot");
        report.trials.clear();
        record(report)
    };
    NativeRecord::new(
        ImageBytes { elf_bytes: 412_000, text_bytes: 301_000 },
        Some(serde_json::json!({ "compiler_symbols": 0, "writable_and_executable_pages": 0 })),
        (0..boots).map(native).collect(),
        (0..boots).map(|_| record(made_up_boot(8))).collect(),
    )
}
