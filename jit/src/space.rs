//! Which variants of a key are worth trying, best guess first.

use crate::compiler::TargetIsa;
use crate::plan::Plan;
use alloc::vec::Vec;
use model::kernel::{KernelKey, Variant, Width};

/// Variants of `key` that machines with `isa` can run, best guess first; empty where no variant can compute it.
pub fn variants(key: &KernelKey, isa: TargetIsa) -> Vec<Variant> {
    let mut out = Vec::new();
    let rows: &[u8] = if key.m == 1 { &[1] } else { &[4, 2] };
    for width in [Width::Y256, Width::X128, Width::Z512] {
        for vnni in [false, true] {
            for rows in rows {
                for columns in [32, 16, 8] {
                    for streams in [2, 1, 4] {
                        for (unroll, prefetch_bytes) in [(4, 1024), (1, 0)] {
                            let variant =
                                Variant { width, vnni, rows: *rows, columns, streams, unroll, prefetch_bytes };
                            if isa.missing(&variant).is_none() && Plan::new(key, &variant).is_ok() {
                                out.push(variant);
                            }
                        }
                    }
                }
            }
        }
    }
    out
}
