//! The allow-list: every instruction a kernel may contain, what Cranelift emits for it and what it becomes.
//!
//! `emitted` is the 128-bit VEX instruction Cranelift chose; the three columns are what the kernel means at each width.
//! A row whose 128-bit column differs from `emitted` is a *carrier*: CLIF has no name for the instruction the kernel
//! needs, so it emits another one with the same operand shape that no kernel needs for itself (see [`crate::clif`]).
//! `INVALID` marks a form that does not exist. Anything absent from this file is refused.

use iced_x86::Code;
use model::kernel::Width;

/// One vector instruction at every width.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What Cranelift emits.
    pub emitted: Code,
    /// What it becomes at 128, 256 and 512 bits.
    pub forms: [Code; 3],
}

impl Row {
    /// The form at `width`; `Code::INVALID` where there is none.
    pub fn form(&self, width: Width) -> Code {
        match width {
            Width::X128 => self.forms[0],
            Width::Y256 => self.forms[1],
            Width::Z512 => self.forms[2],
        }
    }
}

macro_rules! rows {
    ($($emitted:ident => $x:ident | $y:ident | $z:ident;)*) => {
        &[$(Row { emitted: Code::$emitted, forms: [Code::$x, Code::$y, Code::$z] }),*]
    };
}

/// Vector instructions that mean themselves.
#[rustfmt::skip]
pub const PLAIN: &[Row] = rows! {
    // Loads and stores.
    VEX_Vmovups_xmm_xmmm128         => VEX_Vmovups_xmm_xmmm128         | VEX_Vmovups_ymm_ymmm256         | EVEX_Vmovups_zmm_k1z_zmmm512;
    VEX_Vmovups_xmmm128_xmm         => VEX_Vmovups_xmmm128_xmm         | VEX_Vmovups_ymmm256_ymm         | EVEX_Vmovups_zmmm512_k1z_zmm;
    VEX_Vmovdqu_xmm_xmmm128         => VEX_Vmovdqu_xmm_xmmm128         | VEX_Vmovdqu_ymm_ymmm256         | EVEX_Vmovdqu32_zmm_k1z_zmmm512;
    VEX_Vmovdqu_xmmm128_xmm         => VEX_Vmovdqu_xmmm128_xmm         | VEX_Vmovdqu_ymmm256_ymm         | EVEX_Vmovdqu32_zmmm512_k1z_zmm;
    // Register moves of the register allocator, which it emits in their legacy encoding.
    Movaps_xmm_xmmm128              => VEX_Vmovaps_xmm_xmmm128         | VEX_Vmovaps_ymm_ymmm256         | EVEX_Vmovaps_zmm_k1z_zmmm512;
    Movdqa_xmm_xmmm128              => VEX_Vmovaps_xmm_xmmm128         | VEX_Vmovaps_ymm_ymmm256         | EVEX_Vmovaps_zmm_k1z_zmmm512;
    // Float arithmetic.
    VEX_Vfmadd213ps_xmm_xmm_xmmm128 => VEX_Vfmadd213ps_xmm_xmm_xmmm128 | VEX_Vfmadd213ps_ymm_ymm_ymmm256 | EVEX_Vfmadd213ps_zmm_k1z_zmm_zmmm512b32_er;
    VEX_Vaddps_xmm_xmm_xmmm128      => VEX_Vaddps_xmm_xmm_xmmm128      | VEX_Vaddps_ymm_ymm_ymmm256      | EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er;
    VEX_Vsubps_xmm_xmm_xmmm128      => VEX_Vsubps_xmm_xmm_xmmm128      | VEX_Vsubps_ymm_ymm_ymmm256      | EVEX_Vsubps_zmm_k1z_zmm_zmmm512b32_er;
    VEX_Vmulps_xmm_xmm_xmmm128      => VEX_Vmulps_xmm_xmm_xmmm128      | VEX_Vmulps_ymm_ymm_ymmm256      | EVEX_Vmulps_zmm_k1z_zmm_zmmm512b32_er;
    VEX_Vdivps_xmm_xmm_xmmm128      => VEX_Vdivps_xmm_xmm_xmmm128      | VEX_Vdivps_ymm_ymm_ymmm256      | EVEX_Vdivps_zmm_k1z_zmm_zmmm512b32_er;
    VEX_Vxorps_xmm_xmm_xmmm128      => VEX_Vxorps_xmm_xmm_xmmm128      | VEX_Vxorps_ymm_ymm_ymmm256      | EVEX_Vxorps_zmm_k1z_zmm_zmmm512b32;
    VEX_Vcvtdq2ps_xmm_xmmm128       => VEX_Vcvtdq2ps_xmm_xmmm128       | VEX_Vcvtdq2ps_ymm_ymmm256       | EVEX_Vcvtdq2ps_zmm_k1z_zmmm512b32_er;
    // Integer arithmetic.
    VEX_Vpxor_xmm_xmm_xmmm128       => VEX_Vpxor_xmm_xmm_xmmm128       | VEX_Vpxor_ymm_ymm_ymmm256       | EVEX_Vpxord_zmm_k1z_zmm_zmmm512b32;
    VEX_Vpand_xmm_xmm_xmmm128       => VEX_Vpand_xmm_xmm_xmmm128       | VEX_Vpand_ymm_ymm_ymmm256       | EVEX_Vpandd_zmm_k1z_zmm_zmmm512b32;
    VEX_Vpor_xmm_xmm_xmmm128        => VEX_Vpor_xmm_xmm_xmmm128        | VEX_Vpor_ymm_ymm_ymmm256        | EVEX_Vpord_zmm_k1z_zmm_zmmm512b32;
    VEX_Vpaddd_xmm_xmm_xmmm128      => VEX_Vpaddd_xmm_xmm_xmmm128      | VEX_Vpaddd_ymm_ymm_ymmm256      | EVEX_Vpaddd_zmm_k1z_zmm_zmmm512b32;
    VEX_Vpsubd_xmm_xmm_xmmm128      => VEX_Vpsubd_xmm_xmm_xmmm128      | VEX_Vpsubd_ymm_ymm_ymmm256      | EVEX_Vpsubd_zmm_k1z_zmm_zmmm512b32;
    VEX_Vpaddw_xmm_xmm_xmmm128      => VEX_Vpaddw_xmm_xmm_xmmm128      | VEX_Vpaddw_ymm_ymm_ymmm256      | EVEX_Vpaddw_zmm_k1z_zmm_zmmm512;
    VEX_Vpabsb_xmm_xmmm128          => VEX_Vpabsb_xmm_xmmm128          | VEX_Vpabsb_ymm_ymmm256          | EVEX_Vpabsb_zmm_k1z_zmmm512;
    VEX_Vpslld_xmm_xmm_imm8         => VEX_Vpslld_xmm_xmm_imm8         | VEX_Vpslld_ymm_ymm_imm8         | EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8;
    VEX_Vpsllw_xmm_xmm_imm8         => VEX_Vpsllw_xmm_xmm_imm8         | VEX_Vpsllw_ymm_ymm_imm8         | EVEX_Vpsllw_zmm_k1z_zmmm512_imm8;
    VEX_Vpsrlw_xmm_xmm_imm8         => VEX_Vpsrlw_xmm_xmm_imm8         | VEX_Vpsrlw_ymm_ymm_imm8         | EVEX_Vpsrlw_zmm_k1z_zmmm512_imm8;
    VEX_Vpsraw_xmm_xmm_imm8         => VEX_Vpsraw_xmm_xmm_imm8         | VEX_Vpsraw_ymm_ymm_imm8         | EVEX_Vpsraw_zmm_k1z_zmmm512_imm8;
    VEX_Vpmaddubsw_xmm_xmm_xmmm128  => VEX_Vpmaddubsw_xmm_xmm_xmmm128  | VEX_Vpmaddubsw_ymm_ymm_ymmm256  | EVEX_Vpmaddubsw_zmm_k1z_zmm_zmmm512;
};

/// Carriers: vector instructions that stand for another one.
#[rustfmt::skip]
pub const CARRIERS: &[Row] = rows! {
    // acc = fma(a, b, acc), accumulator tied. 132 is chosen where `a` folds from memory; the product commutes.
    VEX_Vfnmadd213ps_xmm_xmm_xmmm128 => VEX_Vfmadd231ps_xmm_xmm_xmmm128 | VEX_Vfmadd231ps_ymm_ymm_ymmm256 | EVEX_Vfmadd231ps_zmm_k1z_zmm_zmmm512b32_er;
    VEX_Vfnmadd132ps_xmm_xmm_xmmm128 => VEX_Vfmadd231ps_xmm_xmm_xmmm128 | VEX_Vfmadd231ps_ymm_ymm_ymmm256 | EVEX_Vfmadd231ps_zmm_k1z_zmm_zmmm512b32_er;
    // acc += four products of u8 and i8, accumulator tied. Not commutative, so the 132 form is not listed.
    VEX_Vfnmsub213ps_xmm_xmm_xmmm128 => EVEX_Vpdpbusd_xmm_k1z_xmm_xmmm128b32 | EVEX_Vpdpbusd_ymm_k1z_ymm_ymmm256b32 | EVEX_Vpdpbusd_zmm_k1z_zmm_zmmm512b32;
    // Half a vector of f16 to f32: from memory only.
    VEX_Vpmovzxwd_xmm_xmmm64         => VEX_Vcvtph2ps_xmm_xmmm64        | VEX_Vcvtph2ps_ymm_xmmm128       | EVEX_Vcvtph2ps_zmm_k1z_ymmm256_sae;
    // A quarter of a vector of u8 or i8 to i32: from memory only.
    VEX_Vpmovzxbw_xmm_xmmm64         => VEX_Vpmovzxbd_xmm_xmmm32        | VEX_Vpmovzxbd_ymm_xmmm64        | EVEX_Vpmovzxbd_zmm_k1z_xmmm128;
    VEX_Vpmovsxbw_xmm_xmmm64         => VEX_Vpmovsxbd_xmm_xmmm32        | VEX_Vpmovsxbd_ymm_xmmm64        | EVEX_Vpmovsxbd_zmm_k1z_xmmm128;
    // Four bytes in every lane: from memory only.
    VEX_Vpmovzxdq_xmm_xmmm64         => VEX_Vbroadcastss_xmm_m32        | VEX_Vbroadcastss_ymm_m32        | EVEX_Vbroadcastss_zmm_k1z_xmmm32;
    // x with the signs of w.
    VEX_Vpsubsb_xmm_xmm_xmmm128      => VEX_Vpsignb_xmm_xmm_xmmm128     | VEX_Vpsignb_ymm_ymm_ymmm256     | INVALID;
    // Two products of i16.
    VEX_Vpmulhrsw_xmm_xmm_xmmm128    => VEX_Vpmaddwd_xmm_xmm_xmmm128    | VEX_Vpmaddwd_ymm_ymm_ymmm256    | EVEX_Vpmaddwd_zmm_k1z_zmm_zmmm512;
    // Clamps.
    VEX_Vpminsd_xmm_xmm_xmmm128      => VEX_Vminps_xmm_xmm_xmmm128      | VEX_Vminps_ymm_ymm_ymmm256      | EVEX_Vminps_zmm_k1z_zmm_zmmm512b32_sae;
    VEX_Vpmaxsd_xmm_xmm_xmmm128      => VEX_Vmaxps_xmm_xmm_xmmm128      | VEX_Vmaxps_ymm_ymm_ymmm256      | EVEX_Vmaxps_zmm_k1z_zmm_zmmm512b32_sae;
};

/// `vpdpbusd` as AVX512-VNNI encodes it, and as AVX-VNNI does, which has no 512-bit form.
pub const VEX_DOTS: [(Code, Code); 2] = [
    (Code::EVEX_Vpdpbusd_xmm_k1z_xmm_xmmm128b32, Code::VEX_Vpdpbusd_xmm_xmm_xmmm128),
    (Code::EVEX_Vpdpbusd_ymm_k1z_ymm_ymmm256b32, Code::VEX_Vpdpbusd_ymm_ymm_ymmm256),
];

/// The AVX-VNNI encoding of an AVX512-VNNI instruction; `None` for every other one.
pub fn vex_dot(form: Code) -> Option<Code> {
    VEX_DOTS.iter().find(|(evex, _)| *evex == form).map(|(_, vex)| *vex)
}

/// Integer instructions: loop counters, addresses, the frame. They stay as they are.
#[rustfmt::skip]
pub const SCALAR: &[Code] = &[
    Code::Push_r64, Code::Pop_r64, Code::Retnq,
    Code::Mov_r64_rm64, Code::Mov_rm64_r64, Code::Mov_rm32_imm32, Code::Mov_r32_imm32,
    Code::Lea_r64_m,
    Code::Add_rm64_imm8, Code::Add_rm64_imm32, Code::Add_rm64_r64, Code::Add_r64_rm64,
    Code::Sub_rm64_imm8, Code::Sub_rm64_imm32,
    Code::And_rm64_imm8, Code::Imul_r64_rm64_imm8, Code::Imul_r64_rm64_imm32,
    Code::Shl_rm64_imm8,
    Code::Cmp_r64_rm64, Code::Cmp_rm64_r64,
    Code::Jb_rel8_64, Code::Jb_rel32_64, Code::Jae_rel8_64, Code::Jae_rel32_64, Code::Jmp_rel8_64, Code::Jmp_rel32_64,
];

/// The carrier of a prefetch: `mov byte [address], mark`.
pub const PREFETCH_CARRIER: Code = Code::Mov_rm8_imm8;
/// Marks, and what the carrier becomes with each: a prefetch to the first-level cache, and one to the second level.
pub const PREFETCHES: [(u8, Code); 2] =
    [(PREFETCH_MARK, Code::Prefetcht0_m8), (PREFETCH_FAR_MARK, Code::Prefetcht1_m8)];
/// The mark of a prefetch to the first-level cache.
pub const PREFETCH_MARK: u8 = 0x5a;
/// The mark of a prefetch to the second-level cache.
pub const PREFETCH_FAR_MARK: u8 = 0x5b;

/// True for prefetches.
pub fn is_prefetch(code: Code) -> bool {
    PREFETCHES.iter().any(|(_, prefetch)| *prefetch == code)
}

/// True for carriers that are a load: their register forms mean something else when widened.
pub fn memory_only(emitted: Code) -> bool {
    matches!(
        emitted,
        Code::VEX_Vpmovzxwd_xmm_xmmm64
            | Code::VEX_Vpmovzxbw_xmm_xmmm64
            | Code::VEX_Vpmovsxbw_xmm_xmmm64
            | Code::VEX_Vpmovzxdq_xmm_xmmm64
    )
}

/// The row for an instruction Cranelift emitted.
pub fn row(emitted: Code) -> Option<&'static Row> {
    PLAIN.iter().chain(CARRIERS).find(|row| row.emitted == emitted)
}

/// True when a finished kernel of `width` may contain `code`.
pub fn allowed(code: Code, width: Width) -> bool {
    SCALAR.contains(&code)
        || is_prefetch(code)
        || (code == Code::VEX_Vzeroupper && width != Width::X128)
        || (code != Code::INVALID
            && PLAIN
                .iter()
                .chain(CARRIERS)
                .any(|row| row.form(width) == code || vex_dot(row.form(width)) == Some(code)))
}
