//! Real models against what llama.cpp and llama2.c gave for them. For development: the files are not part of the project.
//!
//! `BAREFLOW_MODELS`: folder with stories260K.bin, tok512.bin, stories260K.gguf; `BAREFLOW_REFERENCE_DIR`: folder with the
//! JSON and logits files; `BAREFLOW_SMOLLM2`: the SmolLM2-135M Q4_1 GGUF. Run with
//! `cargo test --release -p engine --test real_models -- --ignored`.

mod support;

use engine::attention::KvType;
use engine::workers::Single;
use engine::{Engine, Tier};
use model::ModelDescription;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;
use support::{Threads, forced_logits, generate, load};

fn path(variable: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}")))
}

/// CPU time of this thread: on a shared machine wall time measures the neighbours.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn json(name: &str) -> Value {
    let path = path("BAREFLOW_REFERENCE_DIR").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn gguf(path: PathBuf) -> (ModelDescription, Vec<u8>) {
    let file = std::fs::read(path).unwrap();
    let model = model::gguf::read(&file, file.len() as u64).unwrap();
    (model, file)
}

fn engine_of(model: &ModelDescription, file: &[u8], threads: usize) -> Engine<'static> {
    load(model, file, threads, 1 << 20, engine::isa::detect(), Tier::Baseline)
}

#[test]
#[ignore = "needs model files"]
fn stories260k_is_llama2c_token_for_token() {
    let expected = json("stories260K_greedy.json");
    let (prompt, want) = (ids(&expected["prompt_ids"]), ids(&expected["gen_ids"]));
    let models = path("BAREFLOW_MODELS");
    let logits = std::fs::read(path("BAREFLOW_REFERENCE_DIR").join("stories260K_logits_once_upon.f32")).unwrap();
    let (model, file) = gguf(models.join("stories260K.gguf"));
    let bin = std::fs::read(models.join("stories260K.bin")).unwrap();
    let tokenizer = std::fs::read(models.join("tok512.bin")).unwrap();
    let bin_model = model::llama2c::read(&bin, bin.len() as u64, &tokenizer).unwrap();
    for (model, file) in [(&model, &file), (&bin_model, &bin)] {
        for threads in [1, 2, 3] {
            let mut engine = engine_of(model, file, threads);
            let first = forced_logits(&mut engine, &Threads(threads), &prompt, &[], KvType::for_model(model)).remove(0);
            for (i, (got, want)) in first.iter().zip(logits.as_chunks::<4>().0).enumerate() {
                let want = f32::from_le_bytes(*want);
                assert!((got - want).abs() < 2e-4 * (1.0 + want.abs()), "logit {i}: {got} {want}");
            }
            assert_eq!(
                generate(&mut engine, &Threads(threads), &prompt, 200, KvType::for_model(model)),
                want,
                "{} on {threads}",
                model.format
            );
        }
    }
}

#[test]
#[ignore = "needs model files"]
fn smollm2_q4_1_follows_llama_cpp() {
    let (model, file) = gguf(path("BAREFLOW_SMOLLM2"));
    let mut engine = engine_of(&model, &file, 1);
    // int8 activations amplify any difference to about a third of a logit, the f16 cache's too (`smollm2_kv_types`).
    for (kv, percent, margin_limit) in [(KvType::F32, 97, 0.5), (KvType::F16, 95, 0.8)] {
        let (mut agree, mut total, mut worst) = (0, 0, 0.0f64);
        for case in json("smollm2_Q4_1_greedy.json").as_array().unwrap() {
            let (prompt, want) = (ids(&case["prompt_ids"]), ids(&case["gen_ids"]));
            let margins = case["top1_top2_logit_margin"].as_array().unwrap();
            let logits = forced_logits(&mut engine, &Single, &prompt, &want[..want.len() - 1], kv);
            for (i, logits) in logits.iter().enumerate() {
                let got = engine::sampler::greedy(logits);
                let margin = margins[i].as_f64().unwrap();
                total += 1;
                if got == want[i] {
                    agree += 1;
                } else {
                    worst = worst.max(margin);
                    println!("{} token {i}: {got}, llama.cpp {} by {margin}", case["prompt"], want[i]);
                }
            }
            let free = generate(&mut engine, &Single, &prompt, 64, kv);
            let common = free.iter().zip(&want).take_while(|(a, b)| a == b).count();
            println!("{}: free running agrees for {common} tokens", case["prompt"]);
        }
        println!("{agree} of {total} agree, largest margin overturned {worst}");
        assert!(agree * 100 >= total * percent && worst < margin_limit, "{agree} of {total}, margin {worst}");
    }
    let kv = KvType::F16;
    let top = json("smollm2_Q4_1_logits_top10.json");
    let logits = forced_logits(&mut engine, &Single, &ids(&top["prompt_ids"]), &[], kv).remove(0);
    for entry in top["top10"].as_array().unwrap() {
        let (id, want) = (entry["id"].as_u64().unwrap() as usize, entry["logit"].as_f64().unwrap());
        println!("logit {id}: {} llama.cpp {want}", logits[id]);
        assert!((f64::from(logits[id]) - want).abs() < 0.5, "logit {id}: {} {want}", logits[id]);
    }
}

/// What a narrower KV cache does to the logits, beside what int8 activations do to them anyway.
#[test]
#[ignore = "needs model files"]
fn smollm2_kv_types() {
    let (model, file) = gguf(path("BAREFLOW_SMOLLM2"));
    let mut engine = engine_of(&model, &file, 1);
    for case in json("smollm2_Q4_1_greedy.json").as_array().unwrap() {
        let (prompt, want) = (ids(&case["prompt_ids"]), ids(&case["gen_ids"]));
        let mut logits = |kv| forced_logits(&mut engine, &Single, &prompt, &want[..want.len() - 1], kv);
        let exact = logits(KvType::F32);
        for kv in [KvType::F16, KvType::Q8_0] {
            let got = logits(kv);
            let (mut squares, mut count, mut worst) = (0.0f64, 0u32, 0.0f64);
            for (a, b) in exact.iter().flatten().zip(got.iter().flatten()) {
                let difference = f64::from((a - b).abs());
                squares += difference * difference;
                count += 1;
                worst = worst.max(difference);
            }
            let greedy =
                |logits: &[Vec<f32>]| -> Vec<u32> { logits.iter().map(|l| engine::sampler::greedy(l)).collect() };
            let same = greedy(&exact).iter().zip(greedy(&got)).filter(|(a, b)| **a == *b).count();
            let rms = (squares / f64::from(count)).sqrt();
            println!(
                "{} {}: rms {rms:.4}, worst {worst:.3}, {same} of {} greedy",
                case["prompt"],
                kv.name(),
                got.len()
            );
            // Unrounded activations: f16 costs 0.004, int8 0.17. int8 activations round any difference up to 0.35.
            assert!(rms < 0.5, "{rms}");
        }
    }
}

#[test]
#[ignore = "needs model files"]
fn smollm2_rates() {
    let (model, file) = gguf(path("BAREFLOW_SMOLLM2"));
    let start = cpu_time();
    let mut engine = engine_of(&model, &file, 1);
    println!("load: {:.2} GB/s", file.len() as f64 / 1e9 / (cpu_time() - start).as_secs_f64());
    let mut memory = support::session_memory(&engine, 512, KvType::F16);
    let mut session = engine::Session::new(&engine, 512, KvType::F16, memory.lend()).unwrap();
    let prompt: Vec<u32> = (0..128).map(|i| 1000 + 7 * i).collect();
    for _ in 0..3 {
        session.truncate(0);
        let start = cpu_time();
        session.prefill(&mut engine, &Single, &prompt).unwrap();
        println!("prefill: {:.1} tok/s", 128.0 / (cpu_time() - start).as_secs_f64());
        let start = cpu_time();
        for i in 0..64 {
            session.decode(&mut engine, &Single, 2000 + i).unwrap();
        }
        println!("decode: {:.1} tok/s", 64.0 / (cpu_time() - start).as_secs_f64());
    }
    let profile = engine.table().profile();
    for hot in profile.hot_list() {
        let bytes = hot.key.weight_bytes() as f64;
        let median = profile.stats(hot.slot).median_cycles().unwrap() as f64;
        println!("{}: {:.1} %, {:.2} bytes/cycle", hot.key, 100.0 * hot.share, bytes / median);
    }
}
