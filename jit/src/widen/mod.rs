//! Re-encodes Cranelift's 128-bit code at the width a kernel was written for.
//!
//! Input: machine code of one function. Output: machine code in which every vector instruction has been replaced by its
//! form at the wanted width according to [`table`], with branches fixed up. Whatever is not on the table, touches the
//! stack pointer with a vector (a spill would save 128 bits only) or reads a constant pool is refused with a typed error.
//!
//! Architecture invariant: this pass never drops, adds or reorders arithmetic; it replaces instructions one for one,
//! folds loads into their only user ([`fold`]), gives prefetches their distance or leaves them out ([`prefetch`]), adds
//! `vzeroupper` and encodes the rest ([`encode`]).

mod encode;
pub mod fold;
pub mod prefetch;
pub mod table;

use crate::error::JitError;
use alloc::vec::Vec;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};
use model::kernel::{Dot, Variant, Width};

/// Address the code pretends to be at while it is rewritten; also the first label of branch targets.
const ORIGIN: u64 = 0x1000;

/// What the pass makes of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Encoding {
    /// Register width, which the kernel was written for.
    pub width: Width,
    /// Encoding of `vpdpbusd`.
    pub dot: Dot,
    /// Bytes that prefetches to the first-level cache ask ahead; 0 leaves them out.
    pub prefetch_bytes: u16,
}

impl From<&Variant> for Encoding {
    fn from(variant: &Variant) -> Self {
        Self { width: variant.width, dot: variant.dot, prefetch_bytes: variant.prefetch_bytes }
    }
}

/// What the pass did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WidenStats {
    /// Instructions of the finished kernel.
    pub instructions: u32,
    /// Vector instructions re-encoded.
    pub widened: u32,
    /// Loads folded into their user.
    pub folded: u32,
    /// Prefetches.
    pub prefetches: u32,
}

/// Re-encodes `code` as `encoding` says.
///
/// # Errors
/// [`JitError::Undecodable`], [`JitError::ConstantPool`], [`JitError::Spill`], [`JitError::Unlisted`],
/// [`JitError::NoWidth`] or [`JitError::Encode`].
pub fn widen(code: &[u8], encoding: Encoding) -> Result<(Vec<u8>, WidenStats), JitError> {
    let mut out = Rewritten { code: Vec::with_capacity(code.len() / 5), ..Rewritten::default() };
    let mut decoder = Decoder::with_ip(64, code, ORIGIN, DecoderOptions::NONE);
    while decoder.can_decode() {
        let offset = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Err(JitError::Undecodable { offset });
        }
        rewrite(instruction, offset, encoding, &mut out)?;
    }
    let Rewritten { mut code, left_out, mut stats } = out;
    prefetch::skip(&mut code, &left_out);
    stats.folded = fold::fold_loads(&mut code);
    stats.instructions = code.len() as u32;
    Ok((encode::encode(&code)?, stats))
}

/// The kernel's instructions on their way to the encoder.
#[derive(Default)]
struct Rewritten {
    code: Vec<Instruction>,
    /// Addresses of prefetches that were left out, ascending, and of what follows each.
    left_out: Vec<(u64, u64)>,
    stats: WidenStats,
}

/// True when an operand is a vector register.
fn is_vector(i: &Instruction) -> bool {
    (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Register && i.op_register(k).is_vector_register())
}

/// True when an operand is in memory.
pub(crate) fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory)
}

/// `r` at `width`.
fn at_width(r: Register, width: Width) -> Register {
    let first = match width {
        Width::X128 => Register::XMM0,
        Width::Y256 => Register::YMM0,
        Width::Z512 => Register::ZMM0,
    };
    first + r.number() as u32
}

fn rewrite(
    mut i: Instruction,
    offset: usize,
    Encoding { width, dot, prefetch_bytes }: Encoding,
    out: &mut Rewritten,
) -> Result<(), JitError> {
    let code = i.code();
    if code == table::PREFETCH_CARRIER {
        let prefetch = prefetch::prefetch(&i, prefetch_bytes).ok_or(JitError::Unlisted { offset, code })?;
        if prefetch_bytes == 0 && prefetch.code() == Code::Prefetcht0_m8 {
            out.left_out.push((i.ip(), i.next_ip()));
        } else {
            out.code.push(prefetch);
            out.stats.prefetches += 1;
        }
        return Ok(());
    }
    if !is_vector(&i) {
        if !table::SCALAR.contains(&code) {
            return Err(JitError::Unlisted { offset, code });
        }
        if code == Code::Retnq && width != Width::X128 {
            let mut clean = Instruction::with(Code::VEX_Vzeroupper);
            // A branch to the return must clean up too.
            clean.set_ip(i.ip());
            i.set_ip(0);
            out.code.push(clean);
        }
        out.code.push(i);
        return Ok(());
    }

    if has_memory(&i) {
        if i.is_ip_rel_memory_operand() {
            return Err(JitError::ConstantPool { offset, code });
        }
        if matches!(i.memory_base(), Register::RSP | Register::RBP) {
            return Err(JitError::Spill { offset, code });
        }
        if i.memory_displ_size() > 1 {
            // Let the encoder choose again: EVEX displacements are scaled.
            i.set_memory_displ_size(1);
        }
    }
    let row = table::row(code).ok_or(JitError::Unlisted { offset, code })?;
    let is_move = matches!(code, Code::Movaps_xmm_xmmm128 | Code::Movdqa_xmm_xmmm128);
    // Moves of the register allocator never touch memory: that would be a spill through another register.
    if (is_move && has_memory(&i)) || (table::memory_only(code) && !has_memory(&i)) {
        return Err(JitError::Unlisted { offset, code });
    }
    let form = match (row.form(width), dot) {
        (form, Dot::Vex) => table::vex_dot(form).unwrap_or(form),
        (form, _) => form,
    };
    if form == Code::INVALID {
        return Err(JitError::NoWidth { offset, code, bits: width.bits() });
    }
    i.set_code(form);
    for k in 0..i.op_count() {
        if i.op_kind(k) == OpKind::Register && i.op_register(k).is_vector_register() {
            i.set_op_register(k, at_width(i.op_register(k), width));
        }
    }
    out.stats.widened += 1;
    out.code.push(i);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::code_asm::*;

    /// Assembles `build` and a return, as Cranelift would, and widens it, prefetches at their addresses plus `distance`.
    fn widened_with(
        width: Width,
        distance: u16,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Result<alloc::string::String, JitError> {
        let mut a = CodeAssembler::new(64).unwrap();
        build(&mut a).unwrap();
        a.ret().unwrap();
        let encoding = Encoding { width, dot: Dot::Evex, prefetch_bytes: distance };
        widen(&a.assemble(0).unwrap(), encoding).map(|(code, _)| {
            let text = crate::disasm::disassemble(&code);
            let lines: Vec<&str> = text.lines().map(|line| line[6..].trim()).collect();
            lines.join("; ")
        })
    }

    fn widened(
        width: Width,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Result<alloc::string::String, JitError> {
        widened_with(width, 0, build)
    }

    #[test]
    fn instructions_take_the_width_and_wide_code_cleans_up() {
        let code = |width| widened(width, |a| a.vaddps(xmm1, xmm2, xmmword_ptr(rsi + 0x80))).unwrap();
        assert_eq!(code(Width::X128), "vaddps xmm1, xmm2, [rsi+80h]; ret");
        assert_eq!(code(Width::Y256), "vaddps ymm1, ymm2, [rsi+80h]; vzeroupper; ret");
        assert_eq!(code(Width::Z512), "vaddps zmm1, zmm2, [rsi+80h]; vzeroupper; ret");
    }

    #[test]
    fn carriers_become_what_they_stand_for() {
        let code = widened(Width::Y256, |a| {
            a.vfnmadd213ps(xmm0, xmm1, xmm2)?;
            a.vpmovzxwd(xmm3, qword_ptr(rsi))?;
            a.vpmovzxdq(xmm4, qword_ptr(rdi))?;
            a.vpsubsb(xmm5, xmm6, xmm7)?;
            a.vpmulhrsw(xmm5, xmm6, xmm7)?;
            a.vfnmsub213ps(xmm5, xmm6, xmm7)
        });
        assert_eq!(
            code.unwrap(),
            "vfmadd231ps ymm0, ymm1, ymm2; vcvtph2ps ymm3, [rsi]; vbroadcastss ymm4, [rdi]; vpsignb ymm5, ymm6, ymm7; \
             vpmaddwd ymm5, ymm6, ymm7; vpdpbusd ymm5, ymm6, ymm7; vzeroupper; ret"
        );
    }

    #[test]
    fn prefetches_take_the_distance_or_go() {
        let code = |distance| {
            let build = |a: &mut CodeAssembler| {
                let mut head = a.create_label();
                a.set_label(&mut head)?;
                a.mov(byte_ptr(rsi), i32::from(table::PREFETCH_MARK))?;
                a.mov(byte_ptr(rsi + 0x40), i32::from(table::PREFETCH_MARK))?;
                a.vaddps(xmm1, xmm1, xmm2)?;
                a.mov(byte_ptr(rsi + 0x800), i32::from(table::PREFETCH_FAR_MARK))?;
                a.cmp(rdi, rsi)?;
                a.jb(head)
            };
            widened_with(Width::X128, distance, build).unwrap()
        };
        assert_eq!(
            code(0x400),
            "prefetcht0 [rsi+400h]; prefetcht0 [rsi+440h]; vaddps xmm1, xmm1, xmm2; prefetcht1 [rsi+800h]; cmp rdi, rsi; \
             jb 0h; ret"
        );
        // The loop begins with what followed them.
        assert_eq!(code(0), "vaddps xmm1, xmm1, xmm2; prefetcht1 [rsi+800h]; cmp rdi, rsi; jb 0h; ret");
    }

    #[test]
    fn loads_fold_into_their_only_user() {
        let code = widened(Width::Z512, |a| {
            a.vpmovzxdq(xmm1, qword_ptr(rdi))?;
            a.vfnmadd213ps(xmm0, xmm2, xmm1)?;
            a.vmovups(xmm3, xmmword_ptr(rsi))?;
            a.vfnmadd213ps(xmm0, xmm3, xmm2)?;
            // Read again below: must stay.
            a.vpmovzxdq(xmm4, qword_ptr(rdi + 4))?;
            a.vfnmadd213ps(xmm0, xmm2, xmm4)?;
            a.vmovups(xmmword_ptr(rdx), xmm4)
        });
        assert_eq!(
            code.unwrap(),
            "vfmadd231ps zmm0, zmm2, dword bcst [rdi]; vfmadd231ps zmm0, zmm2, [rsi]; vbroadcastss zmm4, [rdi+4h]; \
             vfmadd231ps zmm0, zmm2, zmm4; vmovups [rdx], zmm4; vzeroupper; ret"
        );
    }

    #[test]
    fn loads_stay_where_a_loop_reads_them_again() {
        let code = widened(Width::Y256, |a| {
            let mut head = a.create_label();
            a.vxorps(xmm1, xmm1, xmm1)?;
            a.set_label(&mut head)?;
            a.vaddps(xmm2, xmm2, xmm1)?;
            a.vmovups(xmm1, xmmword_ptr(rsi))?;
            a.vfnmadd213ps(xmm0, xmm2, xmm1)?;
            a.cmp(rdi, rsi)?;
            a.jb(head)
        });
        assert!(code.unwrap().contains("vmovups ymm1, [rsi]; vfmadd231ps ymm0, ymm2, ymm1"));
    }

    #[test]
    fn refusals_are_typed() {
        let refused = |width, build: &dyn Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
            widened(width, |a| build(a)).unwrap_err()
        };
        let unlisted = |error: JitError| matches!(error, JitError::Unlisted { offset: 0, .. });
        // Spills, by stack and frame pointer.
        let spill = refused(Width::Y256, &|a| a.vmovups(xmmword_ptr(rsp + 16), xmm1));
        assert_eq!(spill, JitError::Spill { offset: 0, code: Code::VEX_Vmovups_xmmm128_xmm });
        assert!(matches!(
            refused(Width::X128, &|a| a.vaddps(xmm1, xmm1, xmmword_ptr(rbp - 32))),
            JitError::Spill { .. }
        ));
        // Constant pools: by address, and as data behind the code.
        let plain = Encoding { width: Width::X128, dot: Dot::Pairs, prefetch_bytes: 0 };
        let pool = refused(Width::Y256, &|a| {
            a.db(&[0xc5, 0xf8, 0x10, 0x05, 0, 0, 0, 0]) // vmovups xmm0, [rip]
        });
        assert_eq!(pool, JitError::ConstantPool { offset: 0, code: Code::VEX_Vmovups_xmm_xmmm128 });
        assert_eq!(widen(&[0xc3, 0x0f, 0xff], plain), Err(JitError::Undecodable { offset: 1 }));
        // Not listed: lane-crossing, legacy, already wide, scalar, other byte stores, the register form of a load carrier.
        assert!(unlisted(refused(Width::Y256, &|a| a.vshufps(xmm1, xmm1, xmm1, 0))));
        assert!(unlisted(refused(Width::X128, &|a| a.addps(xmm1, xmm1))));
        assert!(unlisted(refused(Width::Y256, &|a| a.vaddps(ymm1, ymm1, ymm1))));
        assert!(unlisted(refused(Width::Y256, &|a| a.vaddss(xmm1, xmm1, xmm1))));
        assert!(unlisted(refused(Width::Y256, &|a| a.mov(byte_ptr(rsi), 1))));
        assert!(unlisted(refused(Width::Y256, &|a| a.mov(byte_ptr(rsp), i32::from(table::PREFETCH_MARK)))));
        assert!(unlisted(refused(Width::Y256, &|a| a.vpmovzxwd(xmm1, xmm2))));
        assert!(unlisted(refused(Width::Y256, &|a| a.movaps(xmm1, xmmword_ptr(rsi)))));
        assert!(unlisted(refused(Width::Y256, &|a| a.cpuid())));
        // No form at this width.
        let sign = refused(Width::Z512, &|a| a.vpsubsb(xmm1, xmm2, xmm3));
        assert_eq!(sign, JitError::NoWidth { offset: 0, code: Code::VEX_Vpsubsb_xmm_xmm_xmmm128, bits: 512 });
        let mut counted = crate::error::Refusals::default();
        for error in [spill, pool, sign] {
            counted.count(&error);
        }
        assert_eq!((counted.spill, counted.constant_pool, counted.unlisted, counted.total()), (1, 1, 1, 3));
    }
}
