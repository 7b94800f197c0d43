//! The target `kernels`: any key of a small shape, compiled as any variant, computes the reference's bits.
//!
//! Half of the variants are of the space that tuning walks, of one of the instruction sets this machine has: these must
//! compile. The other half are anything: these may be refused, as a variant and not later. What the kernel leaves is compared
//! with the oracle of `jit`'s tests, for any number of rows that are wanted; and so are the reference of `engine` and its
//! hand-written op, which the product compares kernels with.

use crate::common::{Case, host_isa};
use crate::decisions::Decisions;
use crate::targets::Outcome;
use engine::dispatch::ColumnsMut;
use engine::operands::AlignedBytes;
use engine::ops::{run_baseline, run_reference};
use engine::simd::Level;
use jit::{Compiler, JitError, space};
use model::Isa;
use model::kernel::{DType, Dot, KernelKey, M_BUCKETS, Op, Variant, Width};
use model::layout::{k_multiple, padded};

/// Largest `n` and `k` of a key, and most products: the oracle is slow.
const MAX_N: usize = 200;
const MAX_K: usize = 300;
const MAX_PRODUCTS: usize = 300_000;

fn any_key(d: &mut Decisions<'_>) -> KernelKey {
    let (op, dtype, m) = (d.pick(&Op::ALL), d.pick(&DType::ALL), d.pick(&M_BUCKETS));
    let multiple = k_multiple(dtype);
    let k = (1 + d.below(MAX_K)).next_multiple_of(multiple).min(MAX_K.next_multiple_of(multiple));
    let most = MAX_PRODUCTS / (m as usize * k * op.columns_per_output());
    let n = 1 + d.below(MAX_N.min(most.max(1)));
    KernelKey { op, dtype, m, n: n as u32, k: k as u32 }
}

/// Anything that is not refused at a glance.
fn any_variant(d: &mut Decisions<'_>, key: &KernelKey) -> Variant {
    let rows = (1 + d.below(14)).min(key.m as usize) as u8;
    let mut variant = Variant {
        width: d.pick(&[Width::X128, Width::Y256, Width::Z512]),
        dot: if key.dtype.is_quantised() { d.pick(&Dot::ALL) } else { Dot::Pairs },
        rows,
        columns: d.pick(&[4, 8, 16, 32]),
        streams: 1 + d.below(8) as u8,
        unroll: 1 + d.below(8) as u8,
        prefetch_bytes: d.below(5000) as u16,
        k_block: 0,
    };
    if key.m > 1 && !key.dtype.is_quantised() && d.once_in(2) {
        let blocks = 1 + d.below(8) as u32;
        let k_block = if key.k.is_multiple_of(blocks) { key.k / blocks } else { key.k } as u16;
        variant = Variant { streams: 1, prefetch_bytes: 0, k_block, ..variant };
    }
    variant
}

/// Instruction sets of this machine, from the least on.
fn tiers() -> Vec<Isa> {
    let host = host_isa();
    let least = Isa { avx2: host.avx2, ..Default::default() };
    let mut tiers = vec![
        least,
        Isa { avx_vnni: host.avx_vnni, ..least },
        Isa { avx512: host.avx512, ..least },
        Isa { avx_vnni: false, ..host },
        host,
    ];
    tiers.dedup();
    tiers
}

/// An op of `engine`.
type EngineOp = fn(Level, &KernelKey, &[u8], &[u8], ColumnsMut<'_>);

/// Compiles one variant of one key and compares it with everything that computes the same.
///
/// # Panics
/// When one of them is wrong, or the compiler refuses what it must not.
pub fn check(data: &[u8]) -> Outcome {
    let mut d = Decisions::new(data);
    let key = any_key(&mut d);
    let isa = d.pick(&tiers());
    let of_space = d.once_in(2).then(|| space::variants(&key, isa)).filter(|variants| !variants.is_empty());
    let variant = match &of_space {
        Some(variants) => d.pick(variants),
        None => any_variant(&mut d, &key),
    };
    let mut compiler = Compiler::new(isa).expect("Cranelift for x86-64");
    let kernel = match compiler.compile(&key, &variant) {
        Ok(kernel) => kernel,
        Err(JitError::Variant { .. } | JitError::Isa { .. }) if of_space.is_none() => return Outcome::Refused,
        Err(error) => panic!("{key} as {variant}: {error}"),
    };
    let case = Case::new(key, d.random().next(), d.below(40));
    let rows = 1 + d.below(key.m as usize);
    if let Err(wrong) = case.check(&kernel).and_then(|()| case.check_rows(&kernel, rows)) {
        panic!("{wrong}");
    }

    // Weights begin at a cache line for these.
    let w = AlignedBytes::copy_of(case.w.bytes());
    let level = Level::detect();
    for (name, run) in [("reference", run_reference as EngineOp), ("hand-written op", run_baseline)] {
        let mut y = case.y_before.clone();
        let columns = ColumnsMut::new(&mut y, key.m as usize, padded(key.n as usize), case.ldy);
        run(level, &key, case.x.bytes(), &w, columns);
        let wrong = (0..y.len()).find(|&i| y[i].to_bits() != case.expected[i].to_bits());
        if let Some(i) = wrong {
            let (row, column) = (i / case.ldy, i % case.ldy);
            panic!("{key}, {name}: y[{row}][{column}] is {:?}, not {:?}", y[i], case.expected[i]);
        }
    }
    Outcome::Accepted
}
