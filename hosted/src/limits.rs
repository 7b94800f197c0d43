//! `bareflow limits`: what this machine can do at best, measured now.

use crate::platform::Process;
use anyhow::{Result, ensure};
use engine::simd::limits::Limits;
use engine::simd::{Level, limits};
use model::Isa;
use runtime::boot::limited;
use runtime::options::IsaLimit;
use runtime::platform::Platform;
use serde_json::json;

/// Memory read for the bandwidth: larger than any last-level cache a core gets to itself.
const MEMORY_BYTES: usize = 256 << 20;

/// Measures the limits of `threads` threads on memory of its own.
///
/// # Errors
/// When there is no memory to read.
pub fn measure(process: &mut Process, isa: Isa, threads: usize) -> Result<Limits> {
    let memory = process.arena("limits", MEMORY_BYTES)?;
    // Untouched pages are all the same page of zeros: cached, and no memory at all.
    memory.fill(0x5a);
    Ok(limits::measure(memory, Level::new(isa), isa, process.workers(), threads))
}

/// Measures read bandwidth and multiply-add peaks of `threads` threads (0: one per core) and prints them. Arithmetic uses
/// the best instructions of the CPU, or AVX2 with `avx2_only`.
///
/// # Errors
/// When there is no memory to read.
pub fn print(threads: u32, avx2_only: bool, as_json: bool) -> Result<()> {
    let mut process = Process::start(engine::cycles(), threads as usize, None, None, true)?;
    let cores = process.workers().count();
    let isa = limited(process.cpu().isa, if avx2_only { IsaLimit::Avx2 } else { IsaLimit::Auto });
    let measured = measure(&mut process, isa, cores)?;
    let gigahertz = process.clock().tsc_hz as f64 / 1e9;
    let read_gb_s = measured.read_bytes_per_cycle * gigahertz;
    let sustained_read_gb_s = measured.sustained_read_bytes_per_cycle * gigahertz;
    let f32_gflop_s = measured.fma_flops_per_cycle * gigahertz;
    let int8_gop_s = measured.int8_ops_per_cycle * gigahertz;
    ensure!(read_gb_s > 0.0, "nothing was measured: {MEMORY_BYTES} bytes are too few for {cores} threads");
    if as_json {
        let value = json!({
            "threads": cores,
            "isa": isa.name(),
            "read_gb_s": read_gb_s,
            "sustained_read_gb_s": sustained_read_gb_s,
            "f32_gflop_s": f32_gflop_s,
            "int8_gop_s": int8_gop_s,
            "interrupted": measured.interrupted,
        });
        print_line!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print_line!("threads       {cores} ({})", isa.name());
        print_line!("read          {read_gb_s:.1} GB/s at best, {sustained_read_gb_s:.1} GB/s sustained");
        print_line!("f32 FMA       {f32_gflop_s:.1} GFLOP/s");
        print_line!("int8 dot      {int8_gop_s:.1} GOP/s");
        print_line!("interrupted   {:.1} % of the time", 100.0 * measured.interrupted);
    }
    Ok(())
}
