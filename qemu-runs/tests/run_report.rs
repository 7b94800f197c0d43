//! The form of report.json, the text and the page, on made-up runs.

mod made_up;

use made_up::{made_up_boot, made_up_load, made_up_native, made_up_run, record};
use qemu_runs::{Accel, LoadRecord, Spread, html, text};
use report::{ImageKind, SnapshotOutcome, TrialOutcome};

#[test]
fn the_json_has_the_keys_other_tools_read() {
    let mut run = made_up_run(8, Accel::Kvm);
    let json: serde_json::Value = serde_json::from_str(&run.to_json()).unwrap();
    assert_eq!(json["schema"], 2);
    assert_eq!(json["accel"], "kvm");
    assert_eq!(json["model"], "Made-up-135M (test fixture)");
    assert_eq!(json["prompt"], "Once upon a time");
    assert_eq!(json["converged_at"], 8);
    assert_eq!(json["tokens_identical"], true);
    assert!(json["native"].is_null() && json["failure"].is_null());
    assert_eq!(json["jit_image"], serde_json::json!({ "elf_bytes": 2_430_000, "text_bytes": 1_710_000 }));
    assert_eq!(json["boots"].as_array().unwrap().len(), 8);
    for key in [
        "boot",
        "ttft_ms",
        "prefill_tok_s",
        "decode_tok_s",
        "kernels_loaded",
        "kernels_compiled",
        "kernels_changed",
        "compile_ms_total",
        "snapshot",
        "token_ids",
        "kernels",
        "trials",
        "stages",
        "convergence",
        "wall_s",
    ] {
        assert!(!json["boots"][1][key].is_null(), "boots[1].{key}");
    }
    assert_eq!(json["boots"][1]["snapshot"]["generation_saved"], 2);
    run.set_native(made_up_native(2));
    let json: serde_json::Value = serde_json::from_str(&run.to_json()).unwrap();
    for key in ["elf_bytes", "text_bytes", "decode_tok_s", "token_ids", "audit"] {
        assert!(!json["native"][key].is_null(), "native.{key}");
    }
}

#[test]
fn settled_speed_is_the_median_of_the_boots_after_the_last_change() {
    let rates = |decode: &[(f64, u32)]| {
        let mut run = made_up_run(0, Accel::Kvm);
        for (i, &(decode_tok_s, kernels_changed)) in decode.iter().enumerate() {
            run.push(record(report::BootReport { decode_tok_s, kernels_changed, ..made_up_boot(i as u32 + 1) }));
        }
        run
    };
    let settled = |run: &qemu_runs::RunReport| run.settled().map(|s| (s.decode_tok_s, s.boots));
    assert_eq!(settled(&rates(&[])), None);
    assert_eq!(settled(&rates(&[(50.0, 3)])), None);
    assert_eq!(settled(&rates(&[(50.0, 3), (60.0, 1)])), None, "the last boot still changed a kernel");
    let mut run = rates(&[(50.0, 3), (1.0, 1), (80.0, 0), (70.0, 0), (20.0, 0)]);
    assert_eq!(settled(&run), Some((70.0, 3)));
    let mut native = made_up_native(2);
    native.interleaved_jit_boots.iter_mut().for_each(|boot| boot.report.decode_tok_s = 90.0);
    run.set_native(native);
    assert_eq!(settled(&run), Some((80.0, 5)), "the boots in between count");
    // What never changed is not compared with itself.
    assert_eq!(settled(&rates(&[(50.0, 0), (60.0, 0)])), Some((60.0, 1)));
}

#[test]
fn loading_is_compared_with_reading_right_before_it() {
    let shares = [0.8, 0.5, 0.9, 1.2];
    let load = made_up_load(ImageKind::Jit, &shares);
    let spread = load.share_of_raw;
    assert!((spread.median - 0.85).abs() < 1e-12 && spread.n == 4, "{spread:?}");
    assert!((spread.min - 0.5).abs() < 1e-12 && (spread.max - 1.2).abs() < 1e-12, "{spread:?}");
    assert_eq!(LoadRecord::of(record(made_up_boot(8))), None, "no rounds, no share");
    let mut run = made_up_run(8, Accel::Kvm);
    run.push_load(load);
    run.push_load(made_up_load(ImageKind::Native, &[0.91]));
    let summary = text::summary(&run);
    assert!(
        summary.contains("image with compiler: the model loads at 85% of the raw disk rate (4 rounds"),
        "{summary}"
    );
    assert!(summary.contains("native image: the model loads at 91%"), "{summary}");
    let page = html::page(&run);
    assert!(page.contains("Model load") && page.contains("<b>91%</b> in the native image"), "{page}");
    // Its tokens count as those of every other boot.
    let mut other = made_up_load(ImageKind::Native, &[0.9]);
    other.boot.report.token_ids[0] += 1;
    run.push_load(other);
    assert_eq!(run.tokens_identical, Some(false));
}

#[test]
fn unknown_numbers_are_null_and_never_zero() {
    let mut run = made_up_run(0, Accel::Kvm);
    let mut boot = made_up_boot(1);
    boot.decode_tok_s = f64::NAN;
    boot.read_gb_s = None;
    run.push(record(boot));
    let json: serde_json::Value = serde_json::from_str(&run.to_json()).unwrap();
    assert!(json["boots"][0]["decode_tok_s"].is_null());
    assert!(json["boots"][0]["read_gb_s"].is_null());
    assert!(json["converged_at"].is_null() && json["tokens_identical"].is_null());
    let summary = text::summary(&run);
    assert!(summary.contains("not converged after 1 boots: kernels are still being tuned"), "{summary}");
}

#[test]
fn a_different_token_in_any_boot_is_a_failure() {
    let mut run = made_up_run(3, Accel::Kvm);
    assert_eq!((run.tokens_identical, run.failure.as_deref()), (Some(true), None));
    let mut native = made_up_native(1);
    native.boots[0].report.token_ids[5] += 1;
    run.set_native(native);
    assert_eq!(run.tokens_identical, Some(false));
    assert!(run.failure.as_ref().unwrap().contains("different tokens"));
    assert!(text::summary(&run).contains("tokens DIFFER between boots"));
    assert!(html::page(&run).contains("did not give the same tokens"));
}

#[test]
fn emulated_times_carry_a_note() {
    const NOTE: &str = "These times are not hardware speed";
    assert!(html::page(&made_up_run(2, Accel::Tcg)).contains(NOTE));
    assert!(!html::page(&made_up_run(2, Accel::Kvm)).contains(NOTE));
    assert!(text::summary(&made_up_run(2, Accel::Tcg)).contains("not hardware speed"));
    // An untrusted clock is enough, whatever the accelerator.
    let mut run = made_up_run(1, Accel::Kvm);
    let mut boot = made_up_boot(2);
    boot.clock_trusted = false;
    run.push(record(boot));
    assert!(!run.hardware_times && html::page(&run).contains(NOTE));
}

#[test]
fn nothing_from_outside_becomes_markup() {
    assert_eq!(html::escape("<a b='\"&'>\u{1b}\n"), "&lt;a b=&#39;&quot;&amp;&#39;&gt;\u{fffd}\n");
    let hostile = "\"><script>x</script>";
    let mut boot = made_up_boot(2);
    let (kernel, trial, model) = (&mut boot.kernels[0], &mut boot.trials[0], &mut boot.model);
    for text in [&mut kernel.key, &mut kernel.variant, &mut trial.key, &mut trial.variant, &mut trial.incumbent] {
        *text = hostile.into();
    }
    for text in [&mut model.name, &mut model.dtypes, &mut model.fingerprint, &mut model.architecture] {
        *text = hostile.into();
    }
    for text in
        [&mut boot.cpu, &mut boot.hypervisor, &mut boot.isa, &mut boot.build_id, &mut boot.prompt, &mut boot.text]
    {
        *text = hostile.into();
    }
    model.sha256 = Some(hostile.into());
    boot.stages[0].name = hostile.into();
    boot.memory[0].name = hostile.into();
    boot.convergence.reason = hostile.into();
    boot.snapshot.outcome = SnapshotOutcome::ProfileOnly;
    boot.snapshot.reason = Some(hostile.into());
    let mut run = made_up_run(0, Accel::Kvm);
    run.push(record(boot));
    let mut native = made_up_native(1);
    native.audit = Some(serde_json::json!({ hostile: hostile }));
    run.set_native(native);
    run.failure = Some(hostile.into());
    run.accel_reason = hostile.into();
    run.environment.command = hostile.into();
    run.environment.machine = hostile.into();
    run.environment.commit = Some(hostile.into());
    run.environment.host_cpu = Some(hostile.into());
    run.environment.qemu = hostile.into();
    let page = html::page(&run);
    assert!(!page.contains("<script"), "{}", &page[page.find("<script").unwrap_or(0)..]);
    assert!(page.contains("&lt;script&gt;"));
}

#[test]
fn the_page_stands_alone_and_shows_every_part() {
    let mut run = made_up_run(8, Accel::Kvm);
    run.set_native(made_up_native(3));
    let page = html::page(&run);
    for outside in ["http://", "https://", "src=", "<link", "@import", "url(", "<script"] {
        assert!(!page.contains(outside), "the page refers to {outside}");
    }
    for part in [
        "Converged at boot 8",
        "Decode, tokens per second",
        "Prefill, tokens per second",
        "Cycles of one call",
        "Variants tried in each boot",
        "Kernels of boot 8",
        "Where the time went",
        "Native image",
        "Boots",
        "What each boot tried",
        "Environment",
        "both slots are empty",
        "lm_head_q8_0_m1_n49152_k576",
        "faulted, quarantined",
    ] {
        assert!(page.contains(part), "no `{part}`");
    }
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    assert!(!page.contains("NaN") && !page.contains("inf"), "a number is not drawn as such");
    // For people who change the page: open this file.
    std::fs::write(std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("made-up.html"), &page).unwrap();
}

#[test]
fn pages_of_odd_runs_hold_together() {
    let mut run = made_up_run(0, Accel::Tcg);
    run.failure = Some("boot-01: the guest reset the machine".into());
    let page = html::page(&run);
    assert!(page.contains("No boot passed") && page.contains("the guest reset the machine"));
    let summary = text::summary(&run);
    assert!(summary.contains("no boot passed") && summary.contains("FAILED: boot-01"), "{summary}");

    let mut bare = made_up_boot(1);
    bare.kernels.clear();
    bare.trials.clear();
    bare.stages.clear();
    bare.decode_tok_s = f64::NAN;
    bare.prefill_tok_s = 0.0;
    let mut run = made_up_run(0, Accel::Tcg);
    run.push(record(bare));
    let page = html::page(&run);
    assert!(page.contains("No boot measured this") && !page.contains("NaN"));
    std::fs::write(std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("made-up-bare.html"), &page).unwrap();
}

#[test]
fn the_summary_lists_each_boot_once() {
    let mut run = made_up_run(8, Accel::Kvm);
    run.set_native(made_up_native(1));
    let summary = text::summary(&run);
    assert!(summary.contains("converged at boot 8\ntokens identical in every boot\n"), "{summary}");
    assert_eq!(summary.lines().filter(|l| l.contains("gen ")).count(), 8, "{summary}");
    assert!(summary.contains("412000 bytes, code 301000; with compiler 2430000 bytes, code 1710000"), "{summary}");
    assert!(summary.lines().all(|l| l.len() <= 110), "{summary}");
    let kept: usize = run.boots.iter().map(|b| b.trials_with(TrialOutcome::Kept)).sum();
    assert_eq!(kept, 16);
}

#[test]
fn spread_of_odd_even_and_nothing() {
    assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0, n: 3 }));
    assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0, n: 2 }));
    assert_eq!(Spread::of([]), None);
}

#[test]
fn a_native_boot_is_compared_with_its_neighbour() {
    let boot =
        |decode_tok_s: f64, ttft_ms: f64| record(report::BootReport { decode_tok_s, ttft_ms, ..made_up_boot(8) });
    let image = qemu_runs::ImageBytes { elf_bytes: 2, text_bytes: 1 };
    // The host was twice as fast during the second pair.
    let native = vec![boot(100.0, 80.0), boot(220.0, 40.0), boot(90.0, 90.0)];
    let jit = vec![boot(100.0, 100.0), boot(200.0, 40.0), boot(100.0, 100.0)];
    let compared = qemu_runs::NativeRecord::new(image, None, native.clone(), jit);
    assert_eq!((compared.decode_tok_s, compared.interleaved_jit_decode_tok_s), (Some(100.0), Some(100.0)));
    let ratio = compared.decode_ratio.unwrap();
    assert_eq!((ratio.min, ratio.median, ratio.max, ratio.n), (0.9, 1.0, 1.1, 3));
    assert_eq!(compared.ttft_ratio.map(|ratio| ratio.median), Some(0.9));
    let alone = qemu_runs::NativeRecord::new(image, None, native, Vec::new());
    assert_eq!((alone.decode_ratio, alone.decode_tok_s), (None, Some(100.0)));
}
