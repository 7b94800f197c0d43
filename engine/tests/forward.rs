//! The forward pass on synthetic models: equal to the formula in f64, and the same bits whatever computes it, on however
//! many workers, in whatever chunks the file and the prompt come.

mod support;

use engine::attention::KvType;
use engine::operands::AlignedBytes;
use engine::simd::Level;
use engine::workers::{Single, Workers};
use engine::{Engine, EngineError, Loader, Plan, Session, SessionMemory, Tier};
use model::Isa;
use model::architecture::{Activation, Norm, Positions, RopeOrder};
use model::quant::{dequantise, quantise};
use model::synthetic::{self, Spec, TokenizerKind};
use model::{Architecture, ModelDescription, Role, TensorType};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Threads, forced_logits, generate, load, session_memory};

fn gguf(spec: &Spec) -> (ModelDescription, Vec<u8>) {
    let file = synthetic::gguf(spec).unwrap();
    (model::gguf::read(&file, file.len() as u64).unwrap(), file)
}

/// Models that between them take every branch of planning and of the pass.
fn specs() -> Vec<(&'static str, Spec)> {
    let base = Spec::default();
    let quantised = |ty| Spec { matrices: ty, ..Spec::default() };
    // K types need rows of whole super-blocks.
    let k_type =
        |ty| Spec { dim: 256, hidden_dim: 512, n_layers: 1, n_heads: 8, head_dim: 32, matrices: ty, ..Spec::default() };
    vec![
        ("f32", base.clone()),
        ("f16", quantised(TensorType::F16)),
        ("bf16", quantised(TensorType::BF16)),
        ("q8_0", quantised(TensorType::Q8_0)),
        ("q4_0", quantised(TensorType::Q4_0)),
        ("q4_1", quantised(TensorType::Q4_1)),
        ("q5_0", quantised(TensorType::Q5_0)),
        ("q5_1", quantised(TensorType::Q5_1)),
        ("q2_k", k_type(TensorType::Q2_K)),
        ("q3_k", k_type(TensorType::Q3_K)),
        ("q4_k", k_type(TensorType::Q4_K)),
        ("q5_k", k_type(TensorType::Q5_K)),
        ("q6_k", k_type(TensorType::Q6_K)),
        (
            "mixed as Q4_K_M files are",
            Spec {
                tied_head: false,
                overrides: vec![
                    (Role::TokenEmbedding, TensorType::Q6_K),
                    (Role::Output, TensorType::Q6_K),
                    (Role::V, TensorType::Q6_K),
                    (Role::Down, TensorType::Q6_K),
                    (Role::AttnOut, TensorType::Q5_0),
                ],
                ..k_type(TensorType::Q4_K)
            },
        ),
        (
            "odd sizes",
            Spec { dim: 40, hidden_dim: 52, n_heads: 5, n_kv_heads: 1, head_dim: 6, n_layers: 3, ..base.clone() },
        ),
        ("untied", Spec { tied_head: false, tokenizer: TokenizerKind::SentencePiece, ..base.clone() }),
        (
            "mixed",
            Spec {
                tied_head: false,
                matrices: TensorType::Q4_1,
                overrides: vec![
                    (Role::TokenEmbedding, TensorType::Q8_0),
                    (Role::Output, TensorType::F16),
                    (Role::K, TensorType::F16),
                    (Role::V, TensorType::Q8_0),
                    (Role::Up, TensorType::F32),
                    (Role::Down, TensorType::Q4_0),
                ],
                ..base.clone()
            },
        ),
        ("windowed", Spec { window: 5, rope_factors: true, rope_stretch: 4.0, ..base }),
        ("qwen2", Spec::of(Architecture::Qwen2)),
        ("qwen2 q4_1", Spec { matrices: TensorType::Q4_1, ..Spec::of(Architecture::Qwen2) }),
        ("qwen3", Spec::of(Architecture::Qwen3)),
        ("gemma3", Spec::of(Architecture::Gemma3)),
        (
            "gemma3 mixed",
            Spec {
                matrices: TensorType::Q8_0,
                overrides: vec![(Role::Up, TensorType::F16), (Role::V, TensorType::F32)],
                ..Spec::of(Architecture::Gemma3)
            },
        ),
        ("gpt2", Spec::of(Architecture::Gpt2)),
        ("gpt2 untied q8_0", Spec { tied_head: false, matrices: TensorType::Q8_0, ..Spec::of(Architecture::Gpt2) }),
    ]
}

const PROMPT: [u32; 23] = [1, 7, 70, 200, 31, 3, 150, 99, 12, 45, 45, 45, 8, 250, 17, 101, 64, 33, 2, 299, 0, 77, 5];
const FORCED: [u32; 3] = [19, 280, 4];

fn bits(logits: &[Vec<f32>]) -> Vec<u32> {
    logits.iter().flatten().map(|x| x.to_bits()).collect()
}

#[test]
fn every_tier_thread_count_and_chunking_gives_the_same_logits() {
    for (name, spec) in specs() {
        let (model, file) = gguf(&spec);
        let kv = KvType::for_model(&model);
        let mut reference = load(&model, &file, 1, file.len(), Isa::PORTABLE, Tier::Reference);
        let want = bits(&forced_logits(&mut reference, &Single, &PROMPT, &FORCED, kv));
        for (threads, chunk_bytes, isa, tier) in [
            (1, 1 << 20, engine::isa::detect(), Tier::Reference),
            (1, 1000, Isa::PORTABLE, Tier::Baseline),
            (1, 4099, engine::isa::detect(), Tier::Baseline),
            (2, 17, engine::isa::detect(), Tier::Baseline),
            (3, 65_536, engine::isa::detect(), Tier::Baseline),
            // More workers than panels: some have nothing to do.
            (7, 512, engine::isa::detect(), Tier::Baseline),
        ] {
            let mut engine = load(&model, &file, threads, chunk_bytes, isa, tier);
            let got = bits(&forced_logits(&mut engine, &Threads(threads), &PROMPT, &FORCED, kv));
            assert!(got == want, "{name}: {threads} threads, chunks of {chunk_bytes}, {isa:?}, {tier:?}");
        }
        // Fewer workers than the plan has parts: each takes several.
        let mut engine = load(&model, &file, 3, 1 << 20, engine::isa::detect(), Tier::Baseline);
        assert!(bits(&forced_logits(&mut engine, &Threads(2), &PROMPT, &FORCED, kv)) == want, "{name}: 3 parts on 2");
    }
}

#[test]
fn a_prompt_in_any_pieces_is_the_same_context() {
    let (model, file) = gguf(&Spec { matrices: TensorType::Q8_0, ..Spec::default() });
    let mut engine = load(&model, &file, 2, 1 << 20, engine::isa::detect(), Tier::Baseline);
    let prompt: Vec<u32> = (0..150).map(|i| i * 37 % 300).collect();
    for kv in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let mut memory = session_memory(&engine, 160, kv);
        let mut session = Session::new(&engine, 160, kv, memory.lend()).unwrap();
        let whole = session.prefill(&mut engine, &Threads(2), &prompt).unwrap().to_vec();
        assert_eq!(session.pos(), 150);
        for piece in [1, 3, 5, 16, 40, 64, 100] {
            session.truncate(0);
            let mut last = Vec::new();
            for tokens in prompt.chunks(piece) {
                last = session.prefill(&mut engine, &Threads(2), tokens).unwrap().to_vec();
            }
            assert!(bits(&[last]) == bits(std::slice::from_ref(&whole)), "pieces of {piece}");
        }
        // Logits of the tokens on the way are those of prompts that end there.
        session.truncate(0);
        let mut each = Vec::new();
        session
            .prefill_each(&mut engine, &Threads(2), &prompt, 140, &mut |i, logits| each.push((i, logits.to_vec())))
            .unwrap();
        assert_eq!(each.iter().map(|(i, _)| *i).collect::<Vec<_>>(), (140..150).collect::<Vec<_>>());
        for (i, logits) in each {
            session.truncate(0);
            let ending = session.prefill(&mut engine, &Threads(2), &prompt[..=i]).unwrap().to_vec();
            assert!(bits(&[ending]) == bits(&[logits]), "token {i}");
        }
        // Going back in the context and on again is the same as never having been further.
        session.truncate(100);
        let again = session.prefill(&mut engine, &Threads(2), &prompt[100..]).unwrap().to_vec();
        assert!(bits(&[again]) == bits(&[whole]));
    }
}

#[test]
fn every_file_format_gives_the_same_tokens() {
    let spec = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    let (model, file) = gguf(&spec);
    let files = synthetic::llama2c(&spec).unwrap();
    let other = model::llama2c::read(&files.model, files.model.len() as u64, &files.tokenizer).unwrap();
    let mut a = load(&model, &file, 2, 3000, engine::isa::detect(), Tier::Baseline);
    let mut b = load(&other, &files.model, 1, 100, engine::isa::detect(), Tier::Reference);
    let newer = synthetic::llama2c_version(&spec, 1).unwrap();
    let described = model::llama2c::read(&newer.model, newer.model.len() as u64, &newer.tokenizer).unwrap();
    let mut c = load(&described, &newer.model, 1, 1 << 20, engine::isa::detect(), Tier::Baseline);
    let tokens = generate(&mut a, &Threads(2), &PROMPT, 100, KvType::F32);
    assert_eq!(tokens, generate(&mut b, &Single, &PROMPT, 100, KvType::F32));
    assert_eq!(tokens, generate(&mut c, &Single, &PROMPT, 100, KvType::F32));
}

/// An int8 llama2.c file and the F32 file of the weights it means, both written out here as `export.py` writes them.
/// Scales are f32 numbers that no f16 holds.
fn llama2c_int8(spec: &Spec, group_len: usize) -> [Vec<u8>; 2] {
    use Role::{AttnNorm, AttnOut, Down, FfnNorm, Gate, K, Output, OutputNorm, Q, TokenEmbedding, Up, V};
    let c = spec.config();
    let seven = [c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.seq_len];
    let header = |version: u32, group_len: Option<u32>| {
        let mut file: Vec<u8> = [0x616b_3432, version].into_iter().chain(seven).flat_map(u32::to_le_bytes).collect();
        file.push(u8::from(spec.tied_head));
        file.extend(group_len.into_iter().flat_map(u32::to_le_bytes));
        file.resize(256, 0);
        file
    };
    let (mut int8, mut f32s) = (header(2, Some(group_len as u32)), header(1, None));
    let order = [AttnNorm, FfnNorm, OutputNorm, TokenEmbedding, Q, K, V, AttnOut, Gate, Down, Up, Output];
    for role in order.into_iter().filter(|&role| role != Output || !spec.tied_head) {
        let layers = if role.is_per_layer() { c.n_layers } else { 1 };
        for layer in 0..layers {
            let weights = spec.weights(role, role.is_per_layer().then_some(layer));
            if role.is_vector() {
                let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
                int8.extend(&bytes);
                f32s.extend(&bytes);
                continue;
            }
            let mut scales = Vec::new();
            for group in weights.chunks(group_len) {
                let scale = group.iter().fold(0.0f32, |max, w| max.max(w.abs())) / 127.0;
                scales.push(scale);
                for weight in group {
                    let code = (weight / scale).round_ties_even() as i8;
                    int8.push(code as u8);
                    f32s.extend((f32::from(code) * scale).to_le_bytes());
                }
            }
            assert!(scales.iter().any(|&scale| half::f16::from_f32(scale).to_f32() != scale));
            int8.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
        }
    }
    [int8, f32s]
}

#[test]
fn int8_llama2c_files_give_what_their_weights_as_f32_give() {
    let base = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    // Rows are of 64 and of 96 weights: groups of 64 go across the ends of rows of 96, groups of 128 hold two rows of 64.
    for (group_len, tied_head) in [(16, true), (32, false), (64, true), (64, false), (128, false)] {
        let spec = Spec { tied_head, ..base.clone() };
        let [int8, f32s] = llama2c_int8(&spec, group_len);
        let tokenizer = synthetic::llama2c(&base).unwrap().tokenizer;
        let describe = |file: &[u8]| model::llama2c::read(file, file.len() as u64, &tokenizer).unwrap();
        let (of_int8, of_f32) = (describe(&int8), describe(&f32s));
        let mut wanted = load(&of_f32, &f32s, 1, 1 << 20, engine::isa::detect(), Tier::Reference);
        let forced: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 300).collect();
        let expected = forced_logits(&mut wanted, &Single, &PROMPT, &forced, KvType::F32);
        for (threads, chunk, isa) in
            [(1, 1 << 20, engine::isa::detect()), (2, 1000, engine::isa::detect()), (1, 3, Isa::PORTABLE)]
        {
            let mut engine = load(&of_int8, &int8, threads, chunk, isa, Tier::Baseline);
            let found = forced_logits(&mut engine, &Threads(threads), &PROMPT, &forced, KvType::F32);
            assert!(bits(&expected) == bits(&found), "groups of {group_len}, tied {tied_head}, chunks of {chunk}");
        }
    }
}

/// Activations as int8 blocks hold them.
fn as_int8(x: &[f64]) -> Vec<f64> {
    let block = |x: &[f64]| -> Vec<f64> {
        let d = x.iter().fold(0.0f64, |max, x| max.max(x.abs())) / 127.0;
        x.iter().map(|x| if d == 0.0 { 0.0 } else { (x / d).round_ties_even() * d }).collect()
    };
    x.chunks(32).flat_map(block).collect()
}

/// The whole model in f64, from the weights as the file stores them: every position's logits.
fn naive_logits(spec: &Spec, tokens: &[u32]) -> Vec<Vec<f64>> {
    let c = spec.config();
    let blueprint = c.architecture.blueprint();
    let (dim, head_dim) = (c.dim as usize, c.head_dim as usize);
    let (q_dim, kv_dim) = (c.q_dim() as usize, c.kv_dim() as usize);
    let weights = |role: Role, layer| -> Vec<f64> {
        let exact = spec.weights(role, layer);
        let (mut stored, mut read) = (Vec::new(), vec![0.0f32; exact.len()]);
        quantise(spec.type_of(role), &exact, &mut stored).unwrap();
        dequantise(spec.type_of(role), &stored, &mut read).unwrap();
        read.into_iter().map(f64::from).collect()
    };
    let matmul = |x: &[f64], w: &[f64], role: Role| -> Vec<f64> {
        let quantised = spec.type_of(role).dtype().unwrap().is_quantised();
        let x = if quantised { as_int8(x) } else { x.to_vec() };
        w.chunks_exact(x.len()).map(|row| row.iter().zip(&x).map(|(a, b)| a * b).sum()).collect()
    };
    let rmsnorm = |x: &[f64], gain: &[f64]| -> Vec<f64> {
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + f64::from(c.norm_eps)).sqrt();
        x.iter().zip(gain).map(|(x, g)| x * scale * g).collect()
    };
    let norm = |x: &[f64], gain: &[f64], bias: Option<&[f64]>| -> Vec<f64> {
        if blueprint.norm == Norm::Rms {
            return rmsnorm(x, gain);
        }
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let centred: Vec<f64> = x.iter().map(|x| x - mean).collect();
        rmsnorm(&centred, gain).iter().zip(bias.unwrap()).map(|(x, b)| x + b).collect()
    };
    let factors = spec.rope_factors.then(|| weights(Role::RopeFactors, None));
    let rope = |x: &mut [f64], pos: usize, layer: u32| {
        let Positions::Rotary(order) = blueprint.positions else { return };
        let (base, scale) = c.layer_rope(layer);
        for head in x.chunks_exact_mut(head_dim) {
            for i in 0..head_dim / 2 {
                let divisor = factors.as_ref().map_or(1.0, |factors| factors[i]);
                let frequency = f64::from(base).powf(-2.0 * i as f64 / head_dim as f64) * f64::from(scale) / divisor;
                let angle = pos as f64 * frequency;
                let (a, b) = match order {
                    RopeOrder::Adjacent => (2 * i, 2 * i + 1),
                    RopeOrder::Halves => (i, i + head_dim / 2),
                };
                let (x0, x1) = (head[a], head[b]);
                head[a] = x0 * angle.cos() - x1 * angle.sin();
                head[b] = x0 * angle.sin() + x1 * angle.cos();
            }
        }
    };
    let active = |x: f64| match blueprint.activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
    };
    let add = |x: &mut [f64], other: &[f64]| x.iter_mut().zip(other).for_each(|(x, other)| *x += other);
    let embedding = weights(Role::TokenEmbedding, None);
    let scale = if c.architecture == Architecture::Gemma3 { f64::from(c.dim).sqrt() } else { 1.0 };
    let row = |&token: &u32| embedding[token as usize * dim..][..dim].iter().map(|x| x * scale).collect();
    let mut xs: Vec<Vec<f64>> = tokens.iter().map(row).collect();
    if blueprint.positions == Positions::Learned {
        let positions = weights(Role::PositionEmbedding, None);
        xs.iter_mut().zip(positions.chunks_exact(dim)).for_each(|(x, position)| add(x, position));
    }
    for layer in 0..c.n_layers {
        let has = |role: Role| blueprint.layer.contains(&role);
        let w = |role| weights(role, Some(layer));
        let optional = |role| has(role).then(|| w(role));
        let wo = w(Role::AttnOut);
        let (gate, up, down) = (optional(Role::Gate), w(Role::Up), w(Role::Down));
        let (attn_norm, ffn_norm) = (w(Role::AttnNorm), w(Role::FfnNorm));
        let (attn_norm_bias, ffn_norm_bias) = (optional(Role::AttnNormBias), optional(Role::FfnNormBias));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (pos, x) in xs.iter_mut().enumerate() {
            let h = norm(x, &attn_norm, attn_norm_bias.as_deref());
            let projection = |role: Role, bias: Role| {
                let mut y = matmul(&h, &w(role), role);
                if let Some(bias) = optional(bias) {
                    add(&mut y, &bias);
                }
                y
            };
            let (mut q, mut k, v) = if has(Role::Qkv) {
                let all = projection(Role::Qkv, Role::QkvBias);
                (all[..q_dim].to_vec(), all[q_dim..q_dim + kv_dim].to_vec(), all[q_dim + kv_dim..].to_vec())
            } else {
                (projection(Role::Q, Role::QBias), projection(Role::K, Role::KBias), projection(Role::V, Role::VBias))
            };
            for (heads, gain) in [(&mut q, optional(Role::QNorm)), (&mut k, optional(Role::KNorm))] {
                if let Some(gain) = gain {
                    *heads = heads.chunks_exact(head_dim).flat_map(|head| rmsnorm(head, &gain)).collect();
                }
                rope(heads, pos, layer);
            }
            keys.push(k);
            values.push(v);
            let first = c.layer_window(layer).map_or(0, |window| (pos + 1).saturating_sub(window as usize));
            let mut attended = Vec::new();
            for (head, q) in q.chunks_exact(head_dim).enumerate() {
                let kv = head / c.heads_per_kv() as usize * head_dim;
                let score = |k: &Vec<f64>| {
                    (q.iter().zip(&k[kv..]).map(|(a, b)| a * b).sum::<f64>() / (head_dim as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = keys[first..].iter().map(score).collect();
                let sum: f64 = scores.iter().sum();
                let out = |d| scores.iter().zip(&values[first..]).map(|(s, v)| s * v[kv + d]).sum::<f64>() / sum;
                attended.extend((0..head_dim).map(out));
            }
            let block = |mut y: Vec<f64>, bias: Role, post_norm: Role| {
                if let Some(bias) = optional(bias) {
                    add(&mut y, &bias);
                }
                optional(post_norm).map_or(y.clone(), |gain| rmsnorm(&y, &gain))
            };
            let y = matmul(&attended, &wo, Role::AttnOut);
            add(x, &block(y, Role::AttnOutBias, Role::AttnPostNorm));
            let h = norm(x, &ffn_norm, ffn_norm_bias.as_deref());
            let mut inner = matmul(&h, &up, Role::Up);
            if let Some(bias) = optional(Role::UpBias) {
                add(&mut inner, &bias);
            }
            match &gate {
                Some(gate) => {
                    let gate = matmul(&h, gate, Role::Gate);
                    inner.iter_mut().zip(gate).for_each(|(up, gate)| *up *= active(gate));
                }
                None => inner.iter_mut().for_each(|up| *up = active(*up)),
            }
            let y = matmul(&inner, &down, Role::Down);
            add(x, &block(y, Role::DownBias, Role::FfnPostNorm));
        }
    }
    let role = if c.tied_head { Role::TokenEmbedding } else { Role::Output };
    let (head, gain) = (weights(role, None), weights(Role::OutputNorm, None));
    let bias = (blueprint.norm == Norm::Layer).then(|| weights(Role::OutputNormBias, None));
    xs.iter().map(|x| matmul(&norm(x, &gain, bias.as_deref()), &head, role)).collect()
}

#[test]
fn logits_are_those_of_the_formula() {
    for (name, spec) in specs() {
        // An activation at the edge between two int8 steps may round the other way in f64, and then moves everything
        // behind it by a step's worth.
        let int8 = Role::ALL.into_iter().any(|role| spec.type_of(role).dtype().unwrap().is_quantised());
        let tolerance = if int8 { 0.2 } else { 1e-4 };
        let (model, file) = gguf(&spec);
        let mut engine = load(&model, &file, 1, 1 << 20, engine::isa::detect(), Tier::Baseline);
        let got = forced_logits(&mut engine, &Single, &PROMPT, &FORCED, KvType::F32);
        let tokens = [&PROMPT[..], &FORCED].concat();
        let want = naive_logits(&spec, &tokens);
        for (got, want) in got.iter().zip(&want[PROMPT.len() - 1..]) {
            let error = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            let size = want.iter().fold(0.0f64, |max, x| max.max(x.abs()));
            assert!(error < tolerance && size > 1.0, "{name}: logits up to {size}, error {error}");
        }
    }
}

#[test]
fn cores_that_share_a_load_fill_the_arena_as_one_does() {
    for ty in [TensorType::F32, TensorType::Q8_0, TensorType::Q5_0, TensorType::Q4_K] {
        let spec = Spec { dim: 256, hidden_dim: 2080, head_dim: 64, matrices: ty, n_layers: 8, ..Spec::default() };
        let spec = if ty == TensorType::Q4_K { Spec { hidden_dim: 2048, ..spec } } else { spec };
        let (model, file) = gguf(&spec);
        let plan = Plan::new(&model, 1).unwrap();
        let packed = |workers: &dyn Workers, chunk_bytes: usize| {
            let mut arena = AlignedBytes::zeroed(plan.arena_bytes());
            let mut loader = Loader::new(plan.clone(), Level::detect(), &mut arena).unwrap();
            for (i, chunk) in file.chunks(chunk_bytes).enumerate() {
                loader.feed((i * chunk_bytes) as u64, chunk, workers).unwrap();
            }
            loader.finish().unwrap();
            arena
        };
        assert!(file.len() > 4 << 20, "pieces are long enough to be shared");
        let want = packed(&Single, 100_001);
        for (workers, chunk_bytes) in [(2, file.len()), (3, 4 << 20), (5, 1_000_003)] {
            assert!(packed(&Threads(workers), chunk_bytes)[..] == want[..], "{ty:?}, {workers} workers");
        }
    }
}

#[test]
fn cores_that_read_the_file_themselves_fill_the_arena_as_a_stream_does() {
    let wide = |ty| Spec { dim: 256, hidden_dim: 2048, head_dim: 64, matrices: ty, n_layers: 4, ..Spec::default() };
    let types = [TensorType::F32, TensorType::Q4_1, TensorType::Q6_K];
    let wide = types.map(|ty| ("several pieces in a share", wide(ty)));
    for (name, spec) in specs().into_iter().chain(wide) {
        let (model, file) = gguf(&spec);
        let plan = Plan::new(&model, 1).unwrap();
        let packed = |fill: u8, load: &dyn Fn(&mut Loader<'_>)| {
            let mut arena = AlignedBytes::zeroed(plan.arena_bytes());
            arena.fill(fill);
            let mut loader = Loader::new(plan.clone(), Level::detect(), &mut arena).unwrap();
            load(&mut loader);
            loader.finish().unwrap();
            arena
        };
        let want = packed(0x77, &|loader| loader.feed(0, &file, &Single).unwrap());
        let read = |at: u64, buf: &mut [u8]| -> Result<(), ()> {
            buf.copy_from_slice(&file[at as usize..][..buf.len()]);
            Ok(())
        };
        for (workers, step) in [(1, u64::MAX), (2, 100_000), (3, 1 << 20)] {
            let got = packed(0x77, &|loader| {
                let mut until = 0u64;
                while loader.next_offset().is_some() {
                    until = until.saturating_add(step);
                    loader.pull(until, &Threads(workers), &read).unwrap();
                }
            });
            assert!(got[..] == want[..], "{name}: {workers} workers, {step} bytes a time");
        }
    }
}

/// Workers each of which begins when the one before has nothing left to do.
struct InTurn {
    count: usize,
    running: AtomicUsize,
}

impl Workers for InTurn {
    fn count(&self) -> usize {
        self.count
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        for worker in 0..self.count {
            self.running.store(worker, Ordering::Relaxed);
            job(worker);
        }
        self.running.store(0, Ordering::Relaxed);
    }
}

#[test]
fn a_core_that_does_not_come_leaves_its_share_of_a_load_to_the_others() {
    let (model, file) = gguf(&Spec { dim: 256, hidden_dim: 2048, n_layers: 4, ..Spec::default() });
    let plan = Plan::new(&model, 1).unwrap();
    let workers = InTurn { count: 3, running: AtomicUsize::new(0) };
    let read = |at: u64, buf: &mut [u8]| -> Result<(), usize> {
        buf.copy_from_slice(&file[at as usize..][..buf.len()]);
        match workers.running.load(Ordering::Relaxed) {
            0 => Ok(()),
            late => Err(late),
        }
    };
    let mut arena = AlignedBytes::zeroed(plan.arena_bytes());
    let mut loader = Loader::new(plan, Level::detect(), &mut arena).unwrap();
    assert_eq!(loader.pull(u64::MAX, &workers, &read), Ok(()));
    loader.finish().unwrap();
}

#[test]
fn what_cannot_be_read_ends_a_load() {
    let (model, file) = gguf(&Spec::default());
    let plan = Plan::new(&model, 1).unwrap();
    let mut arena = AlignedBytes::zeroed(plan.arena_bytes());
    for tensor in &model.tensors {
        let bad = tensor.end() - 1;
        let read = |at: u64, buf: &mut [u8]| {
            buf.copy_from_slice(&file[at as usize..][..buf.len()]);
            if (at..at + buf.len() as u64).contains(&bad) { Err(bad) } else { Ok(()) }
        };
        let mut loader = Loader::new(plan.clone(), Level::detect(), &mut arena).unwrap();
        assert_eq!(loader.pull(u64::MAX, &Threads(2), &read), Err(bad), "{}", tensor.name());
        assert!(loader.finish().is_err());
    }
}

#[test]
fn nothing_of_the_arena_is_left_as_it_was() {
    for (name, spec) in specs() {
        let (model, file) = gguf(&spec);
        let plan = Plan::new(&model, 1).unwrap();
        let packed = |fill: u8| {
            let mut arena = AlignedBytes::zeroed(plan.arena_bytes());
            arena.fill(fill);
            let mut loader = Loader::new(plan.clone(), Level::detect(), &mut arena).unwrap();
            loader.feed(0, &file, &Single).unwrap();
            loader.finish().unwrap();
            arena
        };
        let (zeros, ones) = (packed(0x00), packed(0xff));
        // The room to align the start lies behind, and up to 63 bytes behind rows that are not packed.
        let differ = zeros.iter().zip(&*ones).filter(|(a, b)| a != b).count();
        assert!(differ <= 64 + 63, "{name}: {differ} bytes were not written");
    }
}

#[test]
fn sessions_refuse_what_they_cannot_do() {
    let (model, file) = gguf(&Spec::default());
    let mut engine = load(&model, &file, 1, 1 << 20, engine::isa::detect(), Tier::Baseline);
    let mut memory = session_memory(&engine, 10, KvType::F16);
    let need_bytes = memory.kv.len() + memory.activations.len();
    let refused = EngineError::SessionMemory { context: 10, need_bytes, have_bytes: need_bytes - 1 };
    let lent = memory.lend();
    let short = SessionMemory { kv: &mut lent.kv[1..], ..lent };
    assert_eq!(Session::new(&engine, 10, KvType::F16, short).err(), Some(refused.clone()));
    let lent = memory.lend();
    let short = SessionMemory { activations: &mut lent.activations[1..], ..lent };
    assert_eq!(Session::new(&engine, 10, KvType::F16, short).err(), Some(refused));
    let mut session = Session::new(&engine, 10, KvType::F16, memory.lend()).unwrap();
    assert_eq!(session.prefill(&mut engine, &Single, &[]).err(), Some(EngineError::NoTokens));
    let outside = session.decode(&mut engine, &Single, 300).err();
    assert_eq!(outside, Some(EngineError::Token { token: 300, vocab_size: 300 }));
    session.prefill(&mut engine, &Single, &[1; 9]).unwrap();
    let full = session.prefill(&mut engine, &Single, &[1; 2]).err();
    assert_eq!(full, Some(EngineError::ContextFull { context: 10, pos: 9, tokens: 2 }));
    assert_eq!(session.pos(), 9, "a refused call appends nothing");
    session.decode(&mut engine, &Single, 1).unwrap();
    assert!(session.decode(&mut engine, &Single, 1).is_err());
    let mut other = load(&model, &file, 2, 1 << 20, engine::isa::detect(), Tier::Baseline);
    session.truncate(0);
    assert_eq!(session.decode(&mut other, &Threads(2), 1).err(), Some(EngineError::ForeignSession));
}

#[test]
fn the_loader_refuses_gaps_truncation_and_small_arenas() {
    let (model, file) = gguf(&Spec::default());
    assert_eq!(Plan::new(&model, 0).err(), Some(EngineError::Threads { threads: 0, max: 64 }));
    assert_eq!(Plan::new(&model, 65).err(), Some(EngineError::Threads { threads: 65, max: 64 }));
    let plan = Plan::new(&model, 1).unwrap();
    let (first, last) = (model.tensors[0], *model.tensors.last().unwrap());
    let mut arena = AlignedBytes::zeroed(plan.arena_bytes());
    let small = plan.arena_bytes() - 128;
    let refused = Loader::new(plan.clone(), Level::Portable, &mut arena[..small]).err();
    assert!(
        matches!(refused, Some(EngineError::ArenaTooSmall { have_bytes, .. }) if have_bytes == small),
        "{refused:?}"
    );

    let mut loader = Loader::new(plan.clone(), Level::Portable, &mut arena).unwrap();
    loader.feed(0, &file[..first.offset as usize + 10], &Single).unwrap();
    let gap = loader.feed(first.offset + 11, &file[first.offset as usize + 11..], &Single).err();
    assert_eq!(gap, Some(EngineError::OutOfOrder { expected: first.offset + 10, found: first.offset + 11 }));
    // Bytes that were seen before are skipped, so a caller may go back to a sector's start.
    loader.feed(first.offset, &file[first.offset as usize..last.end() as usize - 1], &Single).unwrap();
    assert_eq!(loader.next_offset(), Some(last.end() - 1));
    let incomplete =
        EngineError::Incomplete { name: last.name(), need_bytes: last.len_bytes, have_bytes: last.len_bytes - 1 };
    assert_eq!(loader.finish().err(), Some(incomplete));

    let mut loader = Loader::new(plan, Level::Portable, &mut arena).unwrap();
    loader.feed(0, &file, &Single).unwrap();
    let loaded = loader.finish().unwrap();
    let elsewhere = AlignedBytes::copy_of(&arena);
    let moved = Engine::new(loaded, &elsewhere, Isa::PORTABLE, Tier::Baseline).err();
    assert_eq!(moved, Some(EngineError::ArenaMoved));

    let mut broken = model.clone();
    broken.tensors.retain(|tensor| tensor.role != Role::Down || tensor.layer != Some(1));
    let missing = EngineError::MissingTensor { name: "blk.1.ffn_down.weight".to_string() };
    assert_eq!(Plan::new(&broken, 1).err(), Some(missing));
    let mut broken = model;
    let tensor = broken.tensors.iter_mut().find(|tensor| tensor.role == Role::Gate).unwrap();
    tensor.ty = TensorType::IQ4_XS;
    let name = tensor.name();
    let unsupported = EngineError::UnsupportedType { name: name.clone(), found: "IQ4_XS" };
    assert_eq!(Plan::new(&broken, 1).err(), Some(unsupported));
    // Rows of 64 are no whole super-blocks of 256.
    let tensor = broken.tensors.iter_mut().find(|tensor| tensor.role == Role::Gate).unwrap();
    tensor.ty = TensorType::Q6_K;
    let (n, k, len_bytes) = (tensor.n, tensor.k, tensor.len_bytes);
    assert_eq!(Plan::new(&broken, 1).err(), Some(EngineError::Shape { name, n, k, len_bytes }));
}
