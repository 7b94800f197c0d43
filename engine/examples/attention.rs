//! How fast attention reads the KV cache, beside the bandwidth of plain reads of the same bytes, both taken in turns.
//!
//! `cargo run --release -p engine --example attention [POSITION [N_HEADS N_KV_HEADS HEAD_DIM N_LAYERS]]`; the defaults are
//! SmolLM2-135M at position 2000. Each layer counts with the fastest of its rounds: on a shared
//! machine the rest measures the neighbours.

use engine::attention::{KeysValues, KvShape, KvType, Queries, attend, store};
use engine::operands::AlignedBytes;
use engine::simd::{Level, limits};
use engine::workers::Single;
use engine::{SplitMix64, cycles};
use model::Isa;

const ROUNDS: usize = 25;

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().expect("numbers")).collect();
    let argument = |i: usize, default| arguments.get(i).copied().unwrap_or(default);
    let position = argument(0, 2000);
    let (n_heads, n_kv_heads, head_dim, n_layers) = (argument(1, 9), argument(2, 3), argument(3, 64), argument(4, 30));
    let width = n_heads * head_dim;
    println!("position {position}: {n_layers} layers, {n_heads} heads, {n_kv_heads} kv heads of {head_dim}");
    for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let shape = KvShape { n_layers, n_heads, n_kv_heads, head_dim, blocks: position / 128 + 1, ty };
        let mut cache = AlignedBytes::zeroed(shape.len_bytes());
        let mut rng = SplitMix64::new(1);
        let mut row = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.next_bell()).collect() };
        for layer in 0..n_layers {
            let (rows, stride) = (position + 1, n_kv_heads * head_dim);
            let (k, v) = (row(rows * stride), row(rows * stride));
            store(Level::detect(), &shape, &mut cache, layer, &KeysValues { pos: 0, rows, k: &k, v: &v, stride });
        }
        let q = row(width);
        let (mut out, mut partials) = (vec![0.0; width], vec![0.0; shape.partials_len()]);
        let bytes = shape.len_bytes();
        let levels = [engine::isa::detect(), Isa { avx512: false, ..engine::isa::detect() }].map(Level::new);
        // For each layer: plain reads, then each level.
        let mut fastest = vec![[u64::MAX; 3]; n_layers];
        for _ in 0..ROUNDS {
            for (layer, fastest) in fastest.iter_mut().enumerate() {
                let start = cycles();
                limits::read(&cache[layer * bytes / n_layers..(layer + 1) * bytes / n_layers], levels[0]);
                fastest[0] = fastest[0].min(cycles() - start);
            }
            for (i, &level) in levels.iter().enumerate() {
                for (layer, fastest) in fastest.iter_mut().enumerate() {
                    let queries = Queries {
                        shape: &shape,
                        cache: &cache,
                        layer,
                        q: &q,
                        q_stride: width,
                        rows: 1,
                        pos: position,
                        window: usize::MAX,
                        scale: 0.125,
                    };
                    let start = cycles();
                    attend(level, &queries, &Single, 1, &mut out, &mut partials);
                    fastest[1 + i] = fastest[1 + i].min(cycles() - start);
                }
            }
        }
        let rate = |i: usize| bytes as f64 / fastest.iter().map(|ticks| ticks[i]).sum::<u64>() as f64;
        let name = ty.name();
        for (i, isa) in ["auto", "avx2"].into_iter().enumerate() {
            println!(
                "{name:<5} {isa:<5} {:>9.0} ticks a token, {:.2} bytes a tick; reads {:.2}; {:.0} % of them",
                bytes as f64 / rate(i + 1),
                rate(i + 1),
                rate(0),
                100.0 * rate(i + 1) / rate(0)
            );
        }
    }
}
