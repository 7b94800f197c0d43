//! Which variants of a key are worth trying, best guess first.
//!
//! A grid over width, dot products, tile, streams, unroll and prefetch distance is cut down to what is legal and fits the
//! registers ([`crate::plan`]), to code that compiles in about a millisecond, and then, by a cost model, to at most
//! [`LIMIT`] variants. The model only orders and prunes; the profiler's measurements decide. It knows ports, latency,
//! bytes and loop overhead of a wide x86 core, and two measured facts: decode is limited by memory, where streams and
//! software prefetch matter more than vector width (and help one core that is alone with its memory, not two that share it);
//! and a width the model dislikes may still win on another machine (under software emulation 128 bits win by an order of
//! magnitude), so every width keeps a share of the list.
//!
//! The grid itself holds what won somewhere, not what could be compiled: decision 0015 has the measurements behind it.

use crate::plan::{Home, Plan};
use alloc::vec::Vec;
use model::Isa;
use model::kernel::{DType, Dot, KernelKey, Variant, Width};
use model::layout::{BlockLayout, PANEL, QUADS, panels};

/// Most variants of one key.
pub const LIMIT: usize = 16;
/// Variants that the best class gives for each one of every other class.
const BEST_SHARE: usize = 4;

/// Most instructions a kernel may be expected to have: what compiles in about a millisecond.
const MAX_INSTRUCTIONS: u64 = 520;
/// The same for [`Dot::Halves`], whose tile of 4 x 16 is faster than smaller ones by a tenth.
const MAX_INSTRUCTIONS_HALVES: u64 = 600;

/// A legal variant with its predicted cost.
struct Candidate {
    variant: Variant,
    /// Predicted cycles per call, and expected instructions to break ties.
    cost: (u64, u64),
}

/// Variants of `key` that machines with `isa` can run, best guess first; at most [`LIMIT`]; empty only where no variant can
/// compute the key at all.
pub fn variants(key: &KernelKey, isa: Isa) -> Vec<Variant> {
    let mut classes: Vec<Vec<Candidate>> = Vec::new();
    for width in [Width::X128, Width::Y256, Width::Z512] {
        // Both encodings of `vpdpbusd` do the same: one is enough, and better than anything else.
        let quads = match (isa.avx512_vnni, isa.avx_vnni) {
            (true, _) => Dot::Evex,
            (_, true) => Dot::Vex,
            _ => Dot::Halves,
        };
        let dots = [Dot::Pairs, quads];
        for dot in dots {
            let mut class = candidates(key, width, dot, isa);
            class.sort_by_key(|c| c.cost);
            classes.push(thin_out(class));
        }
    }
    classes.retain(|class| !class.is_empty());
    classes.sort_by_key(|class| class[0].cost);

    // The best class gives its share, then every other class one, and so on round.
    let mut queues: Vec<_> = classes.into_iter().map(Vec::into_iter).collect();
    let mut out = Vec::with_capacity(LIMIT);
    loop {
        let before = out.len();
        for (rank, queue) in queues.iter_mut().enumerate() {
            let share = if rank == 0 { BEST_SHARE } else { 1 };
            out.extend(queue.take(share).map(|c| c.variant));
        }
        if out.len() == before || out.len() >= LIMIT {
            out.truncate(LIMIT);
            return out;
        }
    }
}

/// The legal part of the grid at one width.
fn candidates(key: &KernelKey, width: Width, dot: Dot, isa: Isa) -> Vec<Candidate> {
    let decode = key.m == 1;
    let rows: &[u8] = if decode { &[1] } else { &[1, 2, 3, 4, 6, 8, 12, 14] };
    // A few rows still wait for memory, many for arithmetic.
    let streams: &[u8] = match key.m {
        1 => &[1, 2, 3, 4],
        2..=4 => &[1, 2],
        _ => &[1],
    };
    let unrolls: &[u8] = if key.dtype.is_quantised() { &[1, 2] } else { &[1, 2, 4, 8] };
    let distances: &[u16] = if decode { &[0, 2048] } else { &[0, 1024] };
    let k_blocks = k_blocks(key);
    let mut out = Vec::new();
    for &rows in rows {
        for columns in [32, 16, 8] {
            // A single row reads a line of a panel once, so it takes all of the panel where that fits.
            if decode && !out.is_empty() {
                break;
            }
            for &streams in streams {
                for &unroll in unrolls {
                    for &prefetch_bytes in distances {
                        for &k_block in &k_blocks {
                            let variant =
                                Variant { width, dot, rows, columns, streams, unroll, prefetch_bytes, k_block };
                            if isa.missing(&variant).is_some() {
                                return out;
                            }
                            // A single row widens codes for itself alone.
                            if rows == 1 && dot == Dot::Halves {
                                continue;
                            }
                            let Ok(plan) = Plan::new(key, &variant) else { continue };
                            let instructions = instructions(&plan);
                            // The smallest kernel of a key is never too large, whatever the estimate says.
                            let smallest =
                                rows == 1 && columns < 32 && streams == 1 && unroll == 1 && prefetch_bytes == 0;
                            let most = if plan.halves { MAX_INSTRUCTIONS_HALVES } else { MAX_INSTRUCTIONS };
                            if instructions <= most || smallest {
                                out.push(Candidate { variant, cost: (cycles(key, &plan), instructions) });
                            }
                        }
                    }
                }
            }
        }
    }
    out
}

/// Block lengths of `k` worth trying, and 0 for none: those that divide `k` and are nearest to 12, 24 and 48 KiB of an f32
/// panel, which a first-level cache holds with room to spare, just, or not. A single row uses each weight once: for it
/// there are streams.
fn k_blocks(key: &KernelKey) -> Vec<u16> {
    let mut blocks = Vec::from([0]);
    if key.m == 1 || key.dtype.is_quantised() {
        return blocks;
    }
    for wanted in [96, 192, 384] {
        let divisors = (1..=2 * wanted).rev().filter(|steps| key.k.is_multiple_of(*steps));
        let near = divisors.min_by_key(|steps| steps.abs_diff(wanted)).unwrap_or(key.k);
        // Short ones of a `k` with few divisors cost more than they save.
        let long_enough = near == key.k || near >= wanted / 2;
        if let Some(block) = u16::try_from(near).ok().filter(|block| long_enough && !blocks.contains(block)) {
            blocks.push(block);
        }
    }
    blocks
}

/// Keeps variety: of each tile, stream count and length of blocks of `k` the best with software prefetch, which hinders some
/// machines' own prefetchers, and the best without.
fn thin_out(sorted: Vec<Candidate>) -> Vec<Candidate> {
    let mut kept: Vec<Candidate> = Vec::new();
    for candidate in sorted {
        let shape = |v: &Variant| (v.rows, v.columns, v.streams, v.prefetch_bytes == 0, v.k_block);
        if kept.iter().all(|k| shape(&k.variant) != shape(&candidate.variant)) {
            kept.push(candidate);
        }
    }
    kept
}

/// Work of one step of `k` for one group of a tile, in instructions by kind.
struct Step {
    /// Multiplications and other arithmetic.
    arithmetic: u64,
    /// Sums of products for which there are further ports.
    sums: u64,
    /// Loads, broadcasts included.
    loads: u64,
    /// Loads that are instructions of their own, not folded into arithmetic.
    own_loads: u64,
}

fn step(plan: &Plan, rows: u64) -> Step {
    let v = plan.vectors as u64;
    let tile = rows * v;
    // Broadcasts of x: one for a single row, else one for each row (float) or row and vector (quantised).
    let per_group = if rows == 1 { 1 } else { tile };
    // At 512 bits a broadcast with a single user folds into it.
    let folds = plan.width == Width::Z512 && rows > 1;
    match plan.dtype {
        DType::F32 if rows == 1 => Step { arithmetic: tile, sums: 0, loads: v + 1, own_loads: 1 },
        DType::F32 => {
            let operands = (0..rows as usize).filter(|row| plan.x_is_operand(*row)).count() as u64;
            let loads = v + rows + operands * (v - 1);
            Step { arithmetic: tile, sums: 0, loads, own_loads: v + rows - operands }
        }
        DType::F16 => {
            let operands = (0..rows as usize).filter(|row| plan.x_is_operand(*row)).count() as u64;
            let own_loads = if folds && v == 1 { 0 } else { rows - operands };
            Step { arithmetic: tile + v, sums: 0, loads: v + rows + operands * (v - 1), own_loads }
        }
        dtype => BlockLayout::of(dtype).map_or(Step { arithmetic: 0, sums: 0, loads: 0, own_loads: 0 }, |layout| {
            quantised_step(plan, &layout, tile, per_group, folds)
        }),
    }
}

/// [`step`] of a quantised type.
fn quantised_step(plan: &Plan, layout: &BlockLayout, tile: u64, per_group: u64, folds: bool) -> Step {
    let v = plan.vectors as u64;
    let shifted = |from: usize, to: usize| u64::from(from != to);
    // Of each quad: mask, and shift; for high bits also a load and an or.
    let (mut unpack, mut high_loads) = (0, 0);
    for quad in 0..QUADS {
        unpack += 1 + shifted(layout.low_field(quad).shift, 0);
        if let Some(high) = layout.high_field(quad) {
            unpack += 2 + shifted(high.shift, layout.low_bits);
            high_loads += 1;
        }
    }
    let (dots, sums) = match (layout.signed_codes(), plan.vnni, plan.halves) {
        (_, true, _) => (1, 0),
        (true, _, true) => (2, 2),
        (true, _, false) => (3, 1),
        (false, ..) => (2, 0),
    };
    // Of each quad: widening, and two broadcasts for each row.
    unpack += if plan.halves { 2 * QUADS as u64 } else { 0 };
    let x = if plan.halves { 2 * tile / v } else { per_group };
    let own_x = if folds && plan.vnni { 0 } else { x };
    let (minima, subs) = (u64::from(layout.minima), layout.sub_blocks as u64);
    // Scaling: multiply, convert, fma; correct or widen, for what has no signs; the minimum's fma. Scales that are products take
    // three more, sums of half a block one.
    let corrections = if layout.signed_codes() && !plan.vnni { 0 } else { subs };
    let products = if layout.super_blocks { 3 } else { 0 };
    let scale = subs * (tile * (3 + corrections + minima) + (2 + products) * v * (1 + minima));
    let frame = if plan.home == Home::Frame { subs * tile } else { 0 };
    let quads = QUADS as u64;
    let words = layout.low_words() as u64 + high_loads;
    let fields = subs * ((1 + corrections + minima) * per_group + 2 * frame);
    Step {
        arithmetic: unpack * v + quads * dots * tile + scale,
        sums: quads * sums * tile,
        loads: words * v + quads * x + fields + v,
        own_loads: words * v + quads * own_x + fields,
    }
}

/// Prefetches of one step of one group.
fn prefetches(plan: &Plan) -> u64 {
    if plan.prefetch_bytes == 0 {
        return 0;
    }
    let lines = |bytes: usize| bytes.div_ceil(64) as u64;
    match plan.dtype {
        DType::F32 => lines(4 * plan.columns),
        DType::F16 => lines(2 * plan.columns),
        dtype => BlockLayout::of(dtype).map_or(0, |layout| {
            layout.words() as u64 * lines(4 * plan.columns) + lines(layout.step_bytes() - layout.scales_offset(0))
        }),
    }
}

/// Expected instructions of the finished kernel.
fn instructions(plan: &Plan) -> u64 {
    let tail = plan.k_steps % plan.unroll;
    let steps = (plan.unroll + tail) as u64;
    let mut total = 40;
    for region in &plan.regions {
        let groups = match plan.home {
            Home::Registers => region.streams,
            Home::Frame => 1,
        } as u64;
        for rows in [plan.rows, plan.m % plan.rows].into_iter().filter(|rows| *rows > 0) {
            let one = step(plan, rows as u64);
            let held = (rows * plan.vectors) as u64;
            let frame = if plan.home == Home::Frame && !plan.dtype.is_quantised() { 4 * groups * held } else { 0 };
            total += groups * steps * (one.arithmetic + one.sums + one.own_loads + prefetches(plan))
                + frame
                + 3 * groups * held
                + 30;
            total += if plan.parts == 2 { 45 } else { 0 };
            // Loading sums, and the loops and the prefetches between them.
            total += if plan.k_block.is_some() { held + 30 } else { 0 };
        }
    }
    total
}

/// Predicted cycles of one call.
fn cycles(key: &KernelKey, plan: &Plan) -> u64 {
    // In hundredths of a cycle: two vector ports, two load ports, four instructions a cycle.
    let streams = plan.regions.first().map_or(1, |r| r.streams) as u64;
    let groups_in_flight = if plan.home == Home::Registers { streams } else { 1 };
    let tile = |rows: u64| -> u64 {
        let one = step(plan, rows);
        let issue = 25 * (one.arithmetic + one.sums + one.own_loads + prefetches(plan)) + 100 / plan.unroll as u64;
        // Each accumulator's fma waits 4 cycles for the one before; quantised blocks are long enough to hide it.
        let latency = if plan.dtype.is_quantised() { 0 } else { 400 / groups_in_flight };
        let frame = if plan.home == Home::Frame && !plan.dtype.is_quantised() {
            100 * rows * plan.vectors as u64 / plan.unroll as u64
        } else {
            0
        };
        // Sums are loaded and saved once for each block, and its loop is left once.
        let saved = plan.k_block.map_or(0, |steps| (100 * rows * plan.vectors as u64 + 2000) / steps as u64);
        // Measured on a Zen 4: float tiles with about as many loads as multiply-adds reach 0.6 of the peak at 256 bits, those
        // with two thirds as many 0.88, at 512 bits all of them 0.95; on a Cascade Lake also at 512 bits those with fewer loads
        // are faster, by 4 to 8 %.
        let load = match plan.width {
            _ if plan.dtype.is_quantised() => 50,
            Width::Z512 => 60,
            _ => 75,
        };
        // The end of an iteration holds up a tile that keeps the multipliers busy.
        let iteration = if plan.dtype.is_quantised() || rows == 1 { 0 } else { 60 / plan.unroll as u64 };
        (50 * one.arithmetic).max(load * one.loads).max(issue).max(latency) + frame + saved + iteration
    };
    let rows = (plan.m / plan.rows) as u64 * tile(plan.rows as u64)
        + if plan.m.is_multiple_of(plan.rows) { 0 } else { tile((plan.m % plan.rows) as u64) };
    let tiles = (panels(key.n as usize) * plan.parts * PANEL / plan.columns) as u64;
    let compute = tiles * plan.k_steps as u64 * rows / 100;

    // Memory: about 4 bytes a cycle. What helps the prefetchers of one core that reads alone hinders two that share a memory:
    // this only says in which order to try.
    let distance = if plan.prefetch_bytes == 0 { 100 } else { 102 };
    let side_by_side = match streams {
        0 | 1 => 100,
        2 => 101,
        3 => 103,
        _ => 105,
    };
    // A tile narrower than the panel comes back for the rest of each line.
    let split = if plan.m <= 4 { 100 + 10 * (PANEL / plan.columns - 1) as u64 } else { 100 };
    let memory = key.weight_bytes() / 4 * distance * side_by_side * split / 1_000_000;
    // They overlap, though never perfectly; best where the next block is asked for while this one is computed with.
    compute.max(memory) + compute.min(memory) / if plan.k_block.is_some() { 16 } else { 4 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::kernel::{M_BUCKETS, Op};
    use model::layout::k_multiple;

    const EVERYTHING: Isa = Isa { avx2: true, avx512: true, avx512_vnni: true, avx_vnni: true };
    const AVX_VNNI: Isa = Isa { avx_vnni: true, ..Isa::AVX2 };

    /// Keys of a 135M-parameter llama, whole and cut for two cores.
    fn keys() -> Vec<KernelKey> {
        let mut keys = Vec::new();
        for dtype in DType::ALL {
            for m in M_BUCKETS {
                for (op, n, k) in [
                    (Op::Qkv, 960, 576),
                    (Op::GateUpSilu, 1536, 576),
                    (Op::MatmulResidual, 576, 1536),
                    (Op::LmHead, 49152, 576),
                ] {
                    let k = k / k_multiple(dtype) as u32 * k_multiple(dtype) as u32;
                    keys.push(KernelKey { op, dtype, m, n, k });
                    keys.push(KernelKey { op, dtype, m, n: n / 2, k });
                }
            }
        }
        keys
    }

    #[test]
    fn a_boot_can_exhaust_the_space_of_every_key() {
        for key in keys() {
            for isa in [Isa::AVX2, AVX_VNNI, EVERYTHING] {
                let variants = variants(&key, isa);
                let dots = |dot| variants.iter().any(|v| v.dot == dot);
                assert_eq!(dots(Dot::Vex), isa == AVX_VNNI && key.dtype.is_quantised(), "{key}");
                assert_eq!(dots(Dot::Evex), isa == EVERYTHING && key.dtype.is_quantised(), "{key}");
                assert!((8..=LIMIT).contains(&variants.len()), "{key}: {} variants", variants.len());
                for (i, variant) in variants.iter().enumerate() {
                    assert!(!variants[..i].contains(variant), "{key}: {variant} twice");
                    assert_eq!(isa.missing(variant), None, "{key}: {variant}");
                }
                // Software emulation wants 128 bits, and must meet them early.
                let narrow = variants.iter().position(|v| v.width == Width::X128);
                assert!(narrow.is_some_and(|at| at < 8), "{key}: first 128-bit variant at {narrow:?}");
            }
        }
    }

    #[test]
    fn the_space_is_the_same_every_time_and_empty_without_avx2() {
        for key in keys().into_iter().step_by(7) {
            assert_eq!(variants(&key, EVERYTHING), variants(&key, EVERYTHING));
            assert!(variants(&key, Isa::default()).is_empty());
        }
    }

    #[test]
    fn small_and_odd_keys_have_a_space_and_impossible_ones_none() {
        let key = |dtype, m, n, k| KernelKey { op: Op::Matmul, dtype, m, n, k };
        for dtype in DType::ALL {
            for m in M_BUCKETS {
                assert!(!variants(&key(dtype, m, 1, k_multiple(dtype).max(32) as u32), Isa::AVX2).is_empty());
            }
        }
        assert!(!variants(&key(DType::F32, 1, 1, 1), Isa::AVX2).is_empty());
        for bad in [
            key(DType::F32, 1, 0, 1),
            key(DType::F32, 2, 8, 8),
            key(DType::Q8_0, 1, 32, 33),
            key(DType::F32, 1, u32::MAX, u32::MAX),
        ] {
            assert!(variants(&bad, EVERYTHING).is_empty(), "{bad}");
        }
    }
}
