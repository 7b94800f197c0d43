//! What every test that runs code needs: memory to run it in, operands with guards, and the oracle.
//!
//! The oracle is written from `model::numerics` and `model::layout` alone, in scalar code, and shares nothing with the
//! compiler under test.
#![allow(dead_code)]

use jit::CompiledKernel;
use model::Isa;
use model::kernel::{DType, KernelKey, Op};
use model::layout::{
    BLOCK, BlockLayout, PANEL, QuadField, WORD_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_HALVES, XBLOCK_QS, XBLOCK_SUM,
    XBLOCK_SUM_LOW, group_bytes, group_steps, header_bytes, padded, panel_bytes, panels, step_bytes, x_row_bytes,
};
use model::numerics::{EXP_HI, EXP_LO, EXP_POLY, GELU_CUBIC, GELU_LINEAR, LN2_HI, LN2_LO, LOG2E, ROUND_MAGIC};

/// Page size of every x86-64 machine the tests run on.
const PAGE: usize = 4096;

/// Instruction sets of the machine the tests run on.
pub fn host_isa() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    Isa {
        avx2,
        avx512,
        avx512_vnni: avx512 && is_x86_feature_detected!("avx512vnni"),
        avx_vnni: avx2 && is_x86_feature_detected!("avxvnni"),
    }
}

/// Everything there is, to compile kernels this machine may not run.
pub const EVERY_ISA: Isa = Isa { avx2: true, avx512: true, avx512_vnni: true, avx_vnni: true };

/// Anonymous memory between two unmapped pages.
pub struct Mapping {
    start: *mut u8,
    mapped_bytes: usize,
    data: *mut u8,
    len_bytes: usize,
}

impl Mapping {
    /// `len_bytes` of zeroes that end at an unmapped page (rounded down to `align`) and start after another one.
    pub fn new(len_bytes: usize, align: usize) -> Mapping {
        let pages = len_bytes.div_ceil(PAGE).max(1);
        let mapped_bytes = (pages + 2) * PAGE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "mmap of {mapped_bytes} bytes");
        let start = start.cast::<u8>();
        // SAFETY: the pages lie inside the mapping made above.
        let middle = unsafe { start.add(PAGE) };
        // SAFETY: as above; the first and last page stay inaccessible.
        let done = unsafe { libc::mprotect(middle.cast(), pages * PAGE, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(done, 0, "mprotect");
        // SAFETY: `len_bytes` rounded up to `align` fits the pages, so the start is inside them.
        let data = unsafe { middle.add(pages * PAGE - len_bytes.next_multiple_of(align)) };
        Mapping { start, mapped_bytes, data, len_bytes }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `data` points at `len_bytes` mapped, initialised (zeroed) bytes owned by this value.
        unsafe { std::slice::from_raw_parts(self.data, self.len_bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len_bytes) }
    }

    /// The same memory as f32; it must be 4-byte aligned.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.data.align_offset(4), 0);
        // SAFETY: as in `bytes_mut`; every bit pattern is an f32 and the alignment was checked.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.len_bytes / 4) }
    }

    /// Asks for huge pages behind the memory.
    pub fn huge_pages(&mut self) {
        // SAFETY: advice about pages this value owns; it changes no contents. Refused advice is no error.
        unsafe { libc::madvise(self.start.cast(), self.mapped_bytes, libc::MADV_HUGEPAGE) };
    }

    /// Makes the memory read-only, or executable.
    pub fn protect(&mut self, protection: i32) {
        let pages_bytes = self.mapped_bytes - 2 * PAGE;
        // SAFETY: the pages between the guards, mapped by `new`.
        let done = unsafe { libc::mprotect(self.start.add(PAGE).cast(), pages_bytes, protection) };
        assert_eq!(done, 0, "mprotect");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, and nothing borrows it any more.
        unsafe { libc::munmap(self.start.cast(), self.mapped_bytes) };
    }
}

type Entry = unsafe extern "sysv64" fn(*const u8, *const u8, *mut f32, usize, usize);

/// A compiled kernel in executable memory.
pub struct Runnable {
    memory: Mapping,
}

impl Runnable {
    pub fn new(kernel: &CompiledKernel) -> Runnable {
        Runnable::of_code(&kernel.code)
    }

    /// Any function of the kernel ABI.
    pub fn of_code(code: &[u8]) -> Runnable {
        let mut memory = Mapping::new(code.len(), 64);
        memory.bytes_mut().copy_from_slice(code);
        memory.protect(libc::PROT_READ | libc::PROT_EXEC);
        Runnable { memory }
    }

    /// Runs the kernel for `rows` rows.
    ///
    /// # Safety
    /// The operands must be as large as the kernel's key says, `rows` at least 1 and at most its `m`, and the code must be what the compiler under test made for
    /// a machine like this one.
    pub unsafe fn call(&self, x: *const u8, w: *const u8, y: *mut f32, ldy_bytes: usize, rows: usize) {
        // SAFETY: the bytes are a function of this type, by the compiler's contract.
        let entry: Entry = unsafe { std::mem::transmute(self.memory.data) };
        // SAFETY: the caller's promise.
        unsafe { entry(x, w, y, ldy_bytes, rows) }
    }
}

/// CPU time of this thread: other processes on the machine cost a kernel cache and bandwidth, but no time on the clock.
pub fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(done, 0, "clock_gettime");
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Deterministic pseudo-random numbers (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Mostly ordinary values of several magnitudes; sometimes signed zeroes and powers of two.
    pub fn float(&mut self) -> f32 {
        let sign = if self.next() & 1 == 0 { 1.0 } else { -1.0 };
        match self.below(16) {
            0 => 0.0 * sign,
            1 => sign * 2f32.powi(self.below(12) as i32 - 6),
            _ => sign * (self.next() >> 40) as f32 / (1u32 << 24) as f32 * [0.03, 1.0, 7.0][self.below(3) as usize],
        }
    }
}

/// f32 to the nearest f16 (ties to even), for normal results and zero.
pub fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let exponent = ((bits >> 23) & 0xff) as i32 - 127;
    if exponent < -14 {
        return sign;
    }
    assert!(exponent <= 15, "{value} is out of range of f16");
    let mantissa = bits & 0x7f_ffff;
    let mut half = (((exponent + 15) as u32) << 10) | (mantissa >> 13);
    let rest = mantissa & 0x1fff;
    if rest > 0x1000 || (rest == 0x1000 && half & 1 == 1) {
        half += 1;
    }
    sign | half as u16
}

/// f16 to f32, exactly.
pub fn f16_value(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let mantissa = u32::from(bits) & 0x3ff;
    match exponent {
        0 => f32::from_bits(sign | (mantissa as f32 * 2f32.powi(-24)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// Operands of one call, and a result to compare with.
pub struct Case {
    pub key: KernelKey,
    pub x: Mapping,
    pub w: Mapping,
    pub y_before: Vec<f32>,
    pub ldy: usize,
    pub expected: Vec<f32>,
}

impl Case {
    /// Random operands of `key`, and the oracle's result. Rows of `y` are `extra` floats longer than they must be.
    pub fn new(key: KernelKey, seed: u64, extra: usize) -> Case {
        let mut random = Random(seed);
        let (m, n, k) = (key.m as usize, key.n as usize, key.k as usize);
        let ldy = padded(n) + extra;
        let mut x = Mapping::new(m * x_row_bytes(key.dtype, k), 4);
        fill_x(key.dtype, x.bytes_mut(), &mut random);
        let mut w = Mapping::new(key.weight_bytes() as usize, 64);
        fill_w(&key, w.bytes_mut(), &mut random);
        let y_before: Vec<f32> = (0..m * ldy).map(|_| random.float()).collect();
        let expected = oracle(&key, x.bytes(), w.bytes(), &y_before, ldy);
        x.protect(libc::PROT_READ);
        w.protect(libc::PROT_READ);
        Case { key, x, w, y_before, ldy, expected }
    }

    /// Runs `kernel` on all rows of the operands and returns all of `y`.
    pub fn run(&self, kernel: &CompiledKernel) -> Vec<f32> {
        self.run_rows(kernel, self.key.m as usize)
    }

    /// As [`Case::run`], for the first `rows` rows.
    pub fn run_rows(&self, kernel: &CompiledKernel, rows: usize) -> Vec<f32> {
        assert_eq!(kernel.key, self.key);
        let runnable = Runnable::new(kernel);
        let mut y = Mapping::new(self.y_before.len() * 4, 4);
        y.floats_mut().copy_from_slice(&self.y_before);
        // SAFETY: `new` sized the operands by the key; guards around them turn a stray access into a fault, not into damage.
        unsafe { runnable.call(self.x.bytes().as_ptr(), self.w.bytes().as_ptr(), y.data.cast(), self.ldy * 4, rows) };
        y.floats_mut().to_vec()
    }

    /// Compares every output of `kernel`, and what lies between the rows, bit for bit: of all rows, and of calls for fewer,
    /// where the rows behind are either done or left as they were.
    pub fn check(&self, kernel: &CompiledKernel) -> Result<(), String> {
        let m = self.key.m as usize;
        let mut counts = vec![m, m / 2 + 1, m.div_ceil(7), 1];
        counts.dedup();
        counts.into_iter().try_for_each(|rows| self.check_rows(kernel, rows))
    }

    /// As [`Case::check`], of one call for `rows` rows.
    pub fn check_rows(&self, kernel: &CompiledKernel, rows: usize) -> Result<(), String> {
        let y = self.run_rows(kernel, rows);
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        let is_left = |row: usize| {
            let columns = row * self.ldy..(row + 1) * self.ldy;
            row >= rows && same(&y[columns.clone()], &self.y_before[columns])
        };
        let wrong = (0..y.len()).find(|&at| y[at].to_bits() != self.expected[at].to_bits() && !is_left(at / self.ldy));
        match wrong {
            None => Ok(()),
            Some(at) => Err(format!(
                "{} as {}, {rows} rows: row {} column {}: got {:?} ({:#010x}), expected {:?} ({:#010x})",
                kernel.key,
                kernel.variant,
                at / self.ldy,
                at % self.ldy,
                y[at],
                y[at].to_bits(),
                self.expected[at],
                self.expected[at].to_bits()
            )),
        }
    }
}

/// Random activations, quantised ones with every extreme a block can have.
pub fn fill_x(dtype: DType, bytes: &mut [u8], random: &mut Random) {
    if !dtype.is_quantised() {
        for chunk in bytes.chunks_exact_mut(4) {
            chunk.copy_from_slice(&random.float().to_le_bytes());
        }
        return;
    }
    let has_halves = x_row_bytes(dtype, BLOCK) > XBLOCK_HALVES;
    for block in bytes.chunks_exact_mut(x_row_bytes(dtype, BLOCK)) {
        let kind = random.below(8);
        let (mut sum, mut sum_low) = (0i32, 0);
        for (i, q) in block[XBLOCK_QS..XBLOCK_QS + BLOCK].iter_mut().enumerate() {
            let value: i8 = match kind {
                0 => 127,
                1 => -127,
                2 => 0,
                _ => (random.below(255) as i32 - 127) as i8,
            };
            *q = value as u8;
            sum += i32::from(value);
            sum_low += if i < BLOCK / 2 { i32::from(value) } else { 0 };
        }
        let d = if kind == 2 { 0.0 } else { random.float().abs() };
        block[XBLOCK_D..XBLOCK_D + 4].copy_from_slice(&d.to_le_bytes());
        block[XBLOCK_SUM..XBLOCK_SUM + 4].copy_from_slice(&sum.to_le_bytes());
        block[XBLOCK_DSUM..XBLOCK_DSUM + 4].copy_from_slice(&(d * sum as f32).to_le_bytes());
        block[XBLOCK_SUM_LOW..XBLOCK_SUM_LOW + 4].copy_from_slice(&sum_low.to_le_bytes());
        for i in (0..BLOCK).filter(|_| has_halves) {
            let place = XBLOCK_HALVES + 2 * (i / 4 * 4 + [0, 2, 1, 3][i % 4]);
            let value = i16::from(block[XBLOCK_QS + i] as i8);
            block[place..place + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Random weights in every column, padding included (a kernel must not care).
pub fn fill_w(key: &KernelKey, bytes: &mut [u8], random: &mut Random) {
    match key.dtype {
        DType::F32 => {
            for chunk in bytes.chunks_exact_mut(4) {
                chunk.copy_from_slice(&random.float().to_le_bytes());
            }
        }
        DType::F16 => {
            for chunk in bytes.chunks_exact_mut(2) {
                // Subnormals too: vcvtph2ps is exact on all of them.
                let bits = if random.below(16) == 0 { random.below(0x400) as u16 } else { f16_bits(random.float()) };
                chunk.copy_from_slice(&bits.to_le_bytes());
            }
        }
        dtype => {
            let layout = BlockLayout::of(dtype).expect("a quantised type");
            for group in bytes.chunks_exact_mut(group_bytes(dtype)) {
                let (header, steps) = group.split_at_mut(header_bytes(dtype));
                for scale in header.chunks_exact_mut(2) {
                    scale.copy_from_slice(&f16_bits(random.float() / 64.0).to_le_bytes());
                }
                for step in steps.chunks_exact_mut(step_bytes(dtype)) {
                    let (quants, scales) = step.split_at_mut(layout.words() * WORD_BYTES);
                    let kind = random.below(8);
                    for byte in quants {
                        *byte = match kind {
                            0 => 0x80, // -128: not what quantisers make, but what a file may hold
                            1 => 0xff,
                            2 => 0x7f,
                            _ => random.next() as u8,
                        };
                    }
                    for scale in scales.chunks_exact_mut(2) {
                        let bits = if layout.super_blocks { random.next() as u16 } else { f16_bits(random.float()) };
                        scale.copy_from_slice(&bits.to_le_bytes());
                    }
                }
            }
        }
    }
}

fn f32_at(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16_value(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()))
}

/// One accumulator: row `row` of `x` times weight column `column` of the packed panels at `w`.
fn product(dtype: DType, k: usize, x: &[u8], row: usize, w: &[u8], panel: usize, lane: usize) -> f32 {
    let x = &x[row * x_row_bytes(dtype, k)..][..x_row_bytes(dtype, k)];
    let w = &w[panel * panel_bytes(dtype, k)..][..panel_bytes(dtype, k)];
    let mut acc = 0.0f32;
    if !dtype.is_quantised() {
        for step in 0..k {
            let weight = match dtype {
                DType::F32 => f32_at(w, step * step_bytes(dtype) + 4 * lane),
                _ => f16_at(w, step * step_bytes(dtype) + 2 * lane),
            };
            acc = weight.mul_add(f32_at(x, 4 * step), acc);
        }
        return acc;
    }
    let layout = BlockLayout::of(dtype).expect("a quantised type");
    for block in 0..k / BLOCK {
        let x = &x[x_row_bytes(dtype, block * BLOCK)..];
        let group = &w[block / group_steps(dtype) * group_bytes(dtype)..][..group_bytes(dtype)];
        let (header, steps) = group.split_at(header_bytes(dtype));
        let w = &steps[block % group_steps(dtype) * step_bytes(dtype)..][..step_bytes(dtype)];
        let code = |i: usize| -> i32 {
            let bits = |field: QuadField| {
                let byte = u32::from(w[field.word * WORD_BYTES + 4 * lane + i % 4]);
                (byte >> field.shift) % (1 << field.bits)
            };
            let code = bits(layout.low_field(i / 4)) + (layout.high_field(i / 4).map_or(0, bits) << layout.low_bits);
            if layout.signed_codes() { i32::from(code as u8 as i8) } else { code as i32 }
        };
        let byte = |at: usize, signed: bool| if signed { f32::from(w[at] as i8) } else { f32::from(w[at]) };
        let d_x = f32_at(x, XBLOCK_D);
        let len = BLOCK / layout.sub_blocks;
        for sub in 0..layout.sub_blocks {
            let elements = sub * len..(sub + 1) * len;
            let activation = |i: usize| i32::from(x[XBLOCK_QS + i] as i8);
            let dot: i32 = elements.clone().map(|i| (code(i) - layout.offset) * activation(i)).sum();
            let (scale, minimum) = (layout.scales_offset(sub), layout.minima_offset(sub));
            let d_w = match layout.super_blocks {
                true => f16_at(header, 2 * lane) * byte(scale + lane, layout.signed_scales),
                false => f16_at(w, scale + 2 * lane),
            };
            acc = (d_w * d_x).mul_add(dot as f32, acc);
            if layout.minima {
                let m_w = match layout.super_blocks {
                    true => f16_at(header, 2 * PANEL + 2 * lane) * byte(minimum + lane, false),
                    false => f16_at(w, minimum + 2 * lane),
                };
                let sum: i32 = elements.map(activation).sum();
                acc = m_w.mul_add(d_x * sum as f32, acc);
            }
        }
    }
    acc
}

/// `exp` of the numerics contract.
#[allow(clippy::manual_clamp, reason = "the contract's min(max()) takes a NaN to the lower bound, clamp keeps it")]
fn exp(x: f32) -> f32 {
    let x = x.max(EXP_LO).min(EXP_HI);
    let t = x.mul_add(LOG2E, ROUND_MAGIC);
    let n = t - ROUND_MAGIC;
    let r = n.mul_add(-LN2_HI, x);
    let r = n.mul_add(-LN2_LO, r);
    let mut p = EXP_POLY[0];
    for c in &EXP_POLY[1..] {
        p = p.mul_add(r, *c);
    }
    let e = p.mul_add(r * r, r + 1.0);
    f32::from_bits(e.to_bits().wrapping_add(t.to_bits() << 23))
}

/// What a kernel of `key` must leave in `y`, padding columns and the gaps between rows included.
pub fn oracle(key: &KernelKey, x: &[u8], w: &[u8], y_before: &[f32], ldy: usize) -> Vec<f32> {
    let k = key.k as usize;
    let mut y = y_before.to_vec();
    for row in 0..key.m as usize {
        for panel in 0..panels(key.n as usize) {
            for lane in 0..PANEL {
                let product = |panel: usize| product(key.dtype, k, x, row, w, panel, lane);
                let out = &mut y[row * ldy + panel * PANEL + lane];
                *out = match key.op {
                    Op::GateUpSilu => {
                        let gate = product(2 * panel);
                        gate / (1.0 + exp(0.0 - gate)) * product(2 * panel + 1)
                    }
                    Op::GateUpGelu => {
                        let gate = product(2 * panel);
                        let z = gate * (gate * gate).mul_add(GELU_CUBIC, GELU_LINEAR);
                        gate / (1.0 + exp(0.0 - z)) * product(2 * panel + 1)
                    }
                    Op::MatmulResidual => *out + product(panel),
                    Op::Matmul | Op::Qkv | Op::LmHead => product(panel),
                };
            }
        }
    }
    y
}
