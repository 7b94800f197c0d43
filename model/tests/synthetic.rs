//! The synthetic models: equal in every format, readable by every reader, and decisive enough for golden tokens.
//!
//! The forward pass here is a plain f64 transcription of the llama architecture, independent of `engine`.

use model::description::Role;
use model::quant::{TensorType, dequantise};
use model::synthetic::{self, Spec, TokenizerKind};
use model::{Format, ModelDescription, gguf, llama2c};

const PROMPT: &str = "Once upon a time";

/// Weights of one tensor as f64, `(n, k)` row-major.
fn weights(file: &[u8], model: &ModelDescription, role: Role, layer: Option<u32>) -> Vec<f64> {
    let tensor = model.tensor(role, layer).unwrap_or_else(|| panic!("{role:?} {layer:?}"));
    let mut out = vec![0.0; tensor.n as usize * tensor.k as usize];
    dequantise(tensor.ty, &file[tensor.offset as usize..tensor.end() as usize], &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

fn matvec(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn rmsnorm(x: &[f64], gain: &[f64], eps: f64) -> Vec<f64> {
    let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
    x.iter().zip(gain).map(|(v, g)| v * scale * g).collect()
}

fn rope(heads: &mut [f64], head_dim: usize, base: f64, pos: usize) {
    for head in heads.chunks_mut(head_dim) {
        for (pair, xy) in head.chunks_mut(2).enumerate() {
            let angle = pos as f64 * base.powf(-2.0 * pair as f64 / head_dim as f64);
            let (sin, cos) = angle.sin_cos();
            (xy[0], xy[1]) = (xy[0] * cos - xy[1] * sin, xy[0] * sin + xy[1] * cos);
        }
    }
}

struct Layer {
    attn_norm: Vec<f64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    out: Vec<f64>,
    ffn_norm: Vec<f64>,
    gate: Vec<f64>,
    up: Vec<f64>,
    down: Vec<f64>,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

/// Greedy ids after the prompt and each step's margin between the best two logits, in standard deviations of the logits.
fn greedy(file: &[u8], model: &ModelDescription, prompt: &[u32], steps: usize) -> Vec<(u32, f64)> {
    let config = &model.config;
    let head_dim = config.head_dim as usize;
    let mut layers: Vec<Layer> = (0..config.n_layers)
        .map(|layer| {
            let w = |role| weights(file, model, role, Some(layer));
            Layer {
                attn_norm: w(Role::AttnNorm),
                q: w(Role::Q),
                k: w(Role::K),
                v: w(Role::V),
                out: w(Role::AttnOut),
                ffn_norm: w(Role::FfnNorm),
                gate: w(Role::Gate),
                up: w(Role::Up),
                down: w(Role::Down),
                keys: Vec::new(),
                values: Vec::new(),
            }
        })
        .collect();
    let embedding = weights(file, model, Role::TokenEmbedding, None);
    let norm = weights(file, model, Role::OutputNorm, None);
    let head = weights(file, model, model.head().unwrap().role, None);
    let eps = f64::from(config.norm_eps);

    let mut out = Vec::new();
    let mut pending: Vec<u32> = prompt.to_vec();
    let mut pos = 0;
    while out.len() < steps {
        let mut x = Vec::new();
        for &id in &pending {
            x = embedding[id as usize * config.dim as usize..][..config.dim as usize].to_vec();
            for layer in &mut layers {
                let h = rmsnorm(&x, &layer.attn_norm, eps);
                let (mut q, mut k) = (matvec(&layer.q, &h), matvec(&layer.k, &h));
                rope(&mut q, head_dim, config.rope_base.into(), pos);
                rope(&mut k, head_dim, config.rope_base.into(), pos);
                layer.keys.push(k);
                layer.values.push(matvec(&layer.v, &h));
                let mut attended = Vec::new();
                for (head, q) in q.chunks(head_dim).enumerate() {
                    let kv = head / config.heads_per_kv() as usize * head_dim;
                    let scores = layer.keys.iter().map(|k| {
                        let dot: f64 = q.iter().zip(&k[kv..]).map(|(a, b)| a * b).sum();
                        (dot / (head_dim as f64).sqrt()).exp()
                    });
                    let scores: Vec<f64> = scores.collect();
                    let sum: f64 = scores.iter().sum();
                    for i in 0..head_dim {
                        attended.push(scores.iter().zip(&layer.values).map(|(s, v)| s / sum * v[kv + i]).sum());
                    }
                }
                x.iter_mut().zip(matvec(&layer.out, &attended)).for_each(|(x, y)| *x += y);
                let h = rmsnorm(&x, &layer.ffn_norm, eps);
                let (gate, up) = (matvec(&layer.gate, &h), matvec(&layer.up, &h));
                let inner: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                x.iter_mut().zip(matvec(&layer.down, &inner)).for_each(|(x, y)| *x += y);
            }
            pos += 1;
        }
        let logits = matvec(&head, &rmsnorm(&x, &norm, eps));
        let mean = logits.iter().sum::<f64>() / logits.len() as f64;
        let deviation = (logits.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / logits.len() as f64).sqrt();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let id = order[0] as u32;
        out.push((id, (logits[order[0]] - logits[order[1]]) / deviation));
        pending = vec![id];
    }
    out
}

fn read_gguf(file: &[u8]) -> ModelDescription {
    gguf::read(file, file.len() as u64).unwrap()
}

/// The specs other crates' golden tests start from.
fn golden_specs() -> Vec<Spec> {
    let spm = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    vec![
        Spec::default(),
        Spec { tied_head: false, ..Spec::default() },
        Spec { tied_head: false, ..spm.clone() },
        spm,
        Spec { matrices: TensorType::Q8_0, ..Spec::default() },
        Spec {
            matrices: TensorType::Q4_1,
            overrides: vec![(Role::TokenEmbedding, TensorType::Q8_0)],
            ..Spec::default()
        },
    ]
}

#[test]
fn greedy_tokens_vary_and_have_margins_far_above_rounding() {
    for spec in golden_specs() {
        let (margin, different) = decisiveness(&spec);
        eprintln!("{spec} tied {}: least margin {margin:.4}, {different} different ids", spec.tied_head);
        // f32 rounding moves a logit by about 1e-6 of their spread, int8 activations by some 1e-2 (test those bit for bit).
        assert!(margin > 9e-3, "{spec}: {margin}");
        assert!(different >= 12, "{spec}: {different}");
    }
}

#[test]
fn every_spec_reads_back_as_what_it_says() {
    let odd = Spec {
        dim: 96,
        hidden_dim: 160,
        n_layers: 3,
        n_heads: 6,
        n_kv_heads: 3,
        head_dim: 32,
        rope_base: 100_000.0,
        matrices: TensorType::BF16,
        overrides: vec![(Role::Down, TensorType::Q4_0), (Role::Q, TensorType::F16), (Role::K, TensorType::Q8_0)],
        ..Spec::default()
    };
    for spec in golden_specs().into_iter().chain([odd]) {
        let file = synthetic::gguf(&spec).unwrap();
        assert_eq!(file, synthetic::gguf(&spec).unwrap());
        let model = read_gguf(&file);
        assert_eq!(model.config, spec.config());
        assert_eq!(model.format, Format::Gguf { version: 3 });
        for tensor in &model.tensors {
            assert_eq!(tensor.ty, spec.type_of(tensor.role));
            let mut expected = Vec::new();
            model::quant::quantise(tensor.ty, &spec.weights(tensor.role, tensor.layer), &mut expected).unwrap();
            assert_eq!(file[tensor.offset as usize..tensor.end() as usize], expected, "{}", tensor.name());
        }
    }
}

#[test]
fn both_formats_hold_the_same_model() {
    for tied_head in [true, false] {
        let spec = Spec { tied_head, tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
        let files = synthetic::llama2c(&spec).unwrap();
        let from_bin = llama2c::read(&files.model[..64], files.model.len() as u64, &files.tokenizer).unwrap();
        let gguf_file = synthetic::gguf(&spec).unwrap();
        let from_gguf = read_gguf(&gguf_file);
        assert_eq!(from_bin.config, from_gguf.config);
        assert_eq!(from_bin.tensors.len(), from_gguf.tensors.len());
        for tensor in &from_bin.tensors {
            assert_eq!(
                weights(&files.model, &from_bin, tensor.role, tensor.layer),
                weights(&gguf_file, &from_gguf, tensor.role, tensor.layer)
            );
        }
        assert_eq!(from_bin.tokenizer.special().eog, [1, 2]);
        assert_eq!(from_gguf.tokenizer.special().eog, [2]);
        for text in [PROMPT, "", " x", "the café\n\0", "<s>Once</s>"] {
            let ids = from_bin.tokenizer.encode_prompt(text, true);
            assert_eq!(ids, from_gguf.tokenizer.encode_prompt(text, true), "{text:?}");
        }
    }
    let f16 = Spec { matrices: TensorType::F16, tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    assert_eq!(synthetic::llama2c(&f16), Err(synthetic::SyntheticError::NotLlama2c("F32 weights")));
}

/// Least margin and number of different ids over 48 greedy steps.
fn decisiveness(spec: &Spec) -> (f64, usize) {
    let file = synthetic::gguf(spec).unwrap();
    let model = read_gguf(&file);
    let prompt = model.tokenizer.encode_prompt(PROMPT, false);
    let steps = greedy(&file, &model, &prompt, 48);
    let mut ids: Vec<u32> = steps.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids.dedup();
    (steps.iter().map(|(_, margin)| *margin).fold(f64::INFINITY, f64::min), ids.len())
}

#[test]
#[ignore = "chooses the default seed; minutes"]
fn search_seeds() {
    let mut best = 0.0;
    for seed in 0..4000 {
        let least = golden_specs()
            .into_iter()
            .map(|spec| Spec { seed, ..spec })
            .try_fold(f64::INFINITY, |least, spec| Some(decisiveness(&spec).0.min(least)).filter(|&m| m > best));
        if let Some(least) = least {
            eprintln!("seed {seed}: {least:.4}");
            best = least;
        }
    }
}
