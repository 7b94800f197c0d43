//! The vocabulary of compiled kernels: which operation, on which weights, of which shape, built how.
//!
//! A [`KernelKey`] says *what* is computed and is the unit of profiling and tuning; a [`Variant`] says *how* one
//! compiled kernel computes it. Both have a stable text form (their `Display`), which is the name users see in
//! reports: `gate_up_silu_q4_1_m1_n1536_k576` and `w256_r1_c32_s2_u1_pf1024`.
//! Nothing here generates, loads or runs code.

use core::fmt;
use core::str::FromStr;
use serde::{Deserialize, Serialize};

/// Storage type of a weight matrix that a kernel reads; [`crate::layout`] says where its bits are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// Blocks of 32 `i8` with one f16 scale: `w = d * q`.
    Q8_0,
    /// Blocks of 32 nibbles with one f16 scale: `w = d * (q - 8)`.
    Q4_0,
    /// Blocks of 32 nibbles with an f16 scale and an f16 minimum: `w = d * q + m`.
    Q4_1,
    /// Blocks of 32 5-bit codes with one f16 scale: `w = d * (q - 16)`.
    Q5_0,
    /// Blocks of 32 5-bit codes with an f16 scale and an f16 minimum: `w = d * q + m`.
    Q5_1,
    /// Super-blocks of 256 2-bit codes, scale and minimum per 16: `w = d * sc * q + m * mn`.
    #[allow(non_camel_case_types)]
    Q2_K,
    /// Super-blocks of 256 3-bit codes, scale per 16: `w = d * sc * (q - 4)`.
    #[allow(non_camel_case_types)]
    Q3_K,
    /// Super-blocks of 256 nibbles, scale and minimum per 32: `w = d * sc * q + m * mn`.
    #[allow(non_camel_case_types)]
    Q4_K,
    /// Super-blocks of 256 5-bit codes, scale and minimum per 32: `w = d * sc * q + m * mn`.
    #[allow(non_camel_case_types)]
    Q5_K,
    /// Super-blocks of 256 6-bit codes, scale per 16: `w = d * sc * (q - 32)`.
    #[allow(non_camel_case_types)]
    Q6_K,
}

impl DType {
    /// Every kernel dtype, in the order reports list them.
    pub const ALL: [DType; 12] = [
        DType::F32,
        DType::F16,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
    ];

    /// Lower-case name as used in kernel names.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Q8_0 => "q8_0",
            DType::Q4_0 => "q4_0",
            DType::Q4_1 => "q4_1",
            DType::Q5_0 => "q5_0",
            DType::Q5_1 => "q5_1",
            DType::Q2_K => "q2_k",
            DType::Q3_K => "q3_k",
            DType::Q4_K => "q4_k",
            DType::Q5_K => "q5_k",
            DType::Q6_K => "q6_k",
        }
    }

    /// True when activations are quantised to int8 blocks before the product (the numerics contract).
    pub fn is_quantised(self) -> bool {
        !matches!(self, DType::F32 | DType::F16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a kernel computes, with everything fused into it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Op {
    /// `y = x W`.
    Matmul,
    /// `[q | k | v] = x [Wq | Wk | Wv]`: three projections in one pass over `x`; `n` is their sum.
    Qkv,
    /// `y = silu(x Wg) * (x Wu)`: the gated half of a SwiGLU feed-forward block; `n` columns out, `2 n` read.
    GateUpSilu,
    /// `y = y + x W`: attention output and feed-forward down projection, each with its residual.
    MatmulResidual,
    /// `logits = x W`: the output head; a `Matmul` kept apart because its shape and its share of time are its own.
    LmHead,
    /// `y = gelu(x Wg) * (x Wu)`: the same of a GeGLU feed-forward block.
    GateUpGelu,
}

impl Op {
    /// Every operation, in forward-pass order.
    pub const ALL: [Op; 6] = [Op::Qkv, Op::Matmul, Op::MatmulResidual, Op::GateUpSilu, Op::GateUpGelu, Op::LmHead];

    /// Lower-case name as used in kernel names.
    pub fn name(self) -> &'static str {
        match self {
            Op::Matmul => "matmul",
            Op::Qkv => "qkv",
            Op::GateUpSilu => "gate_up_silu",
            Op::MatmulResidual => "matmul_residual",
            Op::LmHead => "lm_head",
            Op::GateUpGelu => "gate_up_gelu",
        }
    }

    /// True for the ops that multiply an activated gate with a second product, whose panels alternate with the gate's.
    pub const fn is_gated(self) -> bool {
        matches!(self, Op::GateUpSilu | Op::GateUpGelu)
    }

    /// Weight columns read for each output column.
    pub fn columns_per_output(self) -> usize {
        if self.is_gated() { 2 } else { 1 }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The exact problem one kernel is specialised to.
///
/// `m` is a batch bucket (one of [`M_BUCKETS`]), `n` the output columns of the slice one core computes, `k` the
/// length of the sum. All three are constants in the compiled code.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct KernelKey {
    /// Operation with its fusion.
    pub op: Op,
    /// Weight storage type.
    pub dtype: DType,
    /// Rows of `x` (tokens).
    pub m: u32,
    /// Output columns.
    pub n: u32,
    /// Input columns.
    pub k: u32,
}

/// Batch sizes kernels are compiled for; a batch of another size runs in a larger bucket, up to where its rows end.
pub const M_BUCKETS: [u32; 4] = [1, 4, 16, 64];

impl KernelKey {
    /// Floating-point operations of one call, a multiply-add counted as two.
    pub fn flops(&self) -> u64 {
        2 * u64::from(self.m) * u64::from(self.n) * u64::from(self.k) * self.op.columns_per_output() as u64
    }

    /// Bytes of packed weights one call reads (see [`crate::layout`]).
    pub fn weight_bytes(&self) -> u64 {
        crate::layout::op_weight_bytes(self.op, self.dtype, self.n as usize, self.k as usize) as u64
    }
}

impl fmt::Display for KernelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}_m{}_n{}_k{}", self.op, self.dtype, self.m, self.n, self.k)
    }
}

/// A name that is not the text form of a [`KernelKey`] or [`Variant`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a kernel name: expected the form `{expected}`")]
pub struct NameError {
    /// The form that was expected.
    pub expected: &'static str,
}

impl FromStr for KernelKey {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        const ERROR: NameError = NameError { expected: "OP_DTYPE_mM_nN_kK" };
        let op =
            *Op::ALL.iter().filter(|op| text.starts_with(op.name())).max_by_key(|op| op.name().len()).ok_or(ERROR)?;
        let rest = text[op.name().len()..].strip_prefix('_').ok_or(ERROR)?;
        let dtype = *DType::ALL.iter().find(|d| rest.starts_with(d.name())).ok_or(ERROR)?;
        let rest = rest[dtype.name().len()..].strip_prefix('_').ok_or(ERROR)?;
        let mut fields = rest.split('_');
        let mut field = |prefix: char| -> Result<u32, NameError> {
            let digits = fields.next().and_then(|f| f.strip_prefix(prefix)).ok_or(ERROR)?;
            digits.parse().map_err(|_| ERROR)
        };
        let key = KernelKey { op, dtype, m: field('m')?, n: field('n')?, k: field('k')? };
        if fields.next().is_some() { Err(ERROR) } else { Ok(key) }
    }
}

/// Width of the vector registers a kernel uses, in bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Width {
    /// xmm registers: what Cranelift emits by itself.
    X128,
    /// ymm registers (AVX2).
    Y256,
    /// zmm registers (AVX-512).
    Z512,
}

impl Width {
    /// Bits in one vector.
    pub fn bits(self) -> u32 {
        match self {
            Width::X128 => 128,
            Width::Y256 => 256,
            Width::Z512 => 512,
        }
    }

    /// f32 lanes in one vector.
    pub fn lanes(self) -> usize {
        self.bits() as usize / 32
    }
}

/// How neighbouring products of int8 are summed. (The order is that of their numbers in snapshots.)
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Dot {
    /// Two and two, by `vpmaddubsw` and `vpmaddwd`. Float types have no other.
    Pairs,
    /// Four, by `vpdpbusd` as AVX512-VNNI encodes it.
    Evex,
    /// Four, by `vpdpbusd` as AVX-VNNI encodes it: up to 256 bits, for CPUs without AVX-512.
    Vex,
    /// Two and two as i16, by `vpmaddwd`: for codes of 8 bits, which `vpmaddubsw` needs the sign taken from.
    Halves,
}

impl Dot {
    /// Every way.
    pub const ALL: [Dot; 4] = [Dot::Pairs, Dot::Evex, Dot::Vex, Dot::Halves];

    /// The letter after the width in a variant's name.
    fn letter(self) -> &'static str {
        match self {
            Dot::Pairs => "",
            Dot::Evex => "v",
            Dot::Vex => "a",
            Dot::Halves => "h",
        }
    }
}

/// One way to compile a [`KernelKey`]. Every variant of a key gives bit-identical output.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Variant {
    /// Vector register width.
    pub width: Width,
    /// How int8 products are summed.
    pub dot: Dot,
    /// Rows of `x` held in one register tile (1 for decode).
    pub rows: u8,
    /// Output columns held in one register tile per stream; a divisor of the panel width.
    pub columns: u8,
    /// Weight streams read side by side, each a contiguous run of panels.
    pub streams: u8,
    /// Steps of the k loop in one iteration.
    pub unroll: u8,
    /// Software prefetch distance ahead of each stream, in bytes; 0 is none.
    pub prefetch_bytes: u16,
    /// Steps of `k` in a block that all rows go through before the next block, whose weights are fetched meanwhile; 0 is no
    /// blocking: each register tile goes through the whole of `k` at once.
    pub k_block: u16,
}

impl Variant {
    /// What its time counts for in a choice, relative to a kernel of one stream, such as a hand-written one. A further stream
    /// gains some hundredths while the core has its memory to itself, and costs a tenth to a third when others use it
    /// (decision 0015): a trial of fractions of a second sees only one of the two.
    pub fn weight(&self) -> f64 {
        const FURTHER_STREAM: f64 = 0.04;
        1.0 + FURTHER_STREAM * f64::from(self.streams.saturating_sub(1))
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "w{}{}_r{}_c{}_s{}_u{}_pf{}",
            self.width.bits(),
            self.dot.letter(),
            self.rows,
            self.columns,
            self.streams,
            self.unroll,
            self.prefetch_bytes
        )?;
        if self.k_block > 0 { write!(f, "_kb{}", self.k_block) } else { Ok(()) }
    }
}

impl FromStr for Variant {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        const ERROR: NameError =
            NameError { expected: "wBITS[v|a|h]_rROWS_cCOLUMNS_sSTREAMS_uUNROLL_pfBYTES[_kbSTEPS]" };
        fn number<T: FromStr>(field: Option<&str>, prefix: &str) -> Result<T, NameError> {
            field.and_then(|f| f.strip_prefix(prefix)).and_then(|f| f.parse().ok()).ok_or(ERROR)
        }
        let mut fields = text.split('_');
        let width = fields.next().ok_or(ERROR)?;
        let digits = width.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let dot = Dot::ALL.into_iter().find(|dot| dot.letter() == &width[digits.len()..]).ok_or(ERROR)?;
        let width = digits;
        let width = match width {
            "w128" => Width::X128,
            "w256" => Width::Y256,
            "w512" => Width::Z512,
            _ => return Err(ERROR),
        };
        let variant = Variant {
            width,
            dot,
            rows: number(fields.next(), "r")?,
            columns: number(fields.next(), "c")?,
            streams: number(fields.next(), "s")?,
            unroll: number(fields.next(), "u")?,
            prefetch_bytes: number(fields.next(), "pf")?,
            k_block: match fields.next() {
                None => 0,
                // Without blocking nothing is written.
                field => Some(number(field, "kb")?).filter(|&steps| steps > 0).ok_or(ERROR)?,
            },
        };
        if fields.next().is_some() { Err(ERROR) } else { Ok(variant) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn all_dtypes_are_listed_in_the_order_of_their_numbers() {
        for (number, dtype) in DType::ALL.into_iter().enumerate() {
            assert_eq!(dtype as usize, number, "{dtype}");
        }
    }

    #[test]
    fn key_names_round_trip() {
        for op in Op::ALL {
            for dtype in DType::ALL {
                let key = KernelKey { op, dtype, m: 4, n: 1536, k: 576 };
                assert_eq!(key.to_string().parse::<KernelKey>(), Ok(key), "{key}");
            }
        }
        for bad in
            ["", "matmul", "matmul_f32_m1_n2", "matmul_f32_m1_n2_k3_x", "matmul_f32_m1_k2_n3", "gemm_f32_m1_n2_k3"]
        {
            assert!(bad.parse::<KernelKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn variant_names_round_trip() {
        let variant = Variant {
            width: Width::Y256,
            dot: Dot::Evex,
            rows: 6,
            columns: 16,
            streams: 4,
            unroll: 2,
            prefetch_bytes: 4096,
            k_block: 0,
        };
        assert_eq!(variant.to_string(), "w256v_r6_c16_s4_u2_pf4096");
        assert_eq!(variant.to_string().parse::<Variant>(), Ok(variant));
        assert_eq!(Variant { dot: Dot::Vex, ..variant }.to_string(), "w256a_r6_c16_s4_u2_pf4096");
        assert_eq!("w256a_r6_c16_s4_u2_pf4096".parse(), Ok(Variant { dot: Dot::Vex, ..variant }));
        let blocked = Variant { dot: Dot::Pairs, streams: 1, prefetch_bytes: 0, k_block: 144, ..variant };
        assert_eq!(blocked.to_string(), "w256_r6_c16_s1_u2_pf0_kb144");
        assert_eq!(blocked.to_string().parse::<Variant>(), Ok(blocked));
        for bad in [
            "",
            "w64_r1_c8_s1_u1_pf0",
            "w256_r1_c8_s1_u1",
            "w256x_r1_c8_s1_u1_pf0",
            "w256va_r1_c8_s1_u1_pf0",
            "w256_r1_c8_s1_u1_pf0_z",
            "w256_r1_c8_s1_u1_pf70000",
            "w256_r1_c8_s1_u1_pf0_kb0",
            "w256_r1_c8_s1_u1_pf0_kb8_z",
        ] {
            assert!(bad.parse::<Variant>().is_err(), "{bad}");
        }
    }
}
