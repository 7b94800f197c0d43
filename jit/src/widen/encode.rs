//! Encodes the rewritten instructions one behind the other and fixes up branches.
//!
//! iced-x86's `BlockEncoder` encodes everything twice to find the shortest branches, which was an eighth of the time a
//! kernel takes to compile. Here a branch back, whose distance is known, is as short as it can be, which is what loops take;
//! the few ahead have 32 bits.

use super::ORIGIN;
use crate::error::JitError;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use iced_x86::{Encoder, Instruction, OpKind};

/// Bytes of a displacement of 32 bits, the last of its branch.
const DISPLACEMENT: usize = size_of::<i32>();
/// Bytes of a short branch.
const SHORT_BRANCH: u64 = 2;

/// Machine code of `code`, whose branches name their targets by the address these had before ([`Instruction::ip`], 0 for an
/// instruction that was added).
///
/// # Errors
/// [`JitError::Encode`], also for a branch to something that is not in `code`.
pub(super) fn encode(code: &[Instruction]) -> Result<Vec<u8>, JitError> {
    let failed = |message: String| JitError::Encode { message };
    let mut encoder = Encoder::new(64);
    // Addresses before and now, ascending.
    let mut placed: Vec<(u64, u64)> = Vec::with_capacity(code.len());
    // Where branches ahead end, and what they go to.
    let mut ahead: Vec<(u64, u64)> = Vec::new();
    let now = |placed: &[(u64, u64)], before: u64| {
        placed.binary_search_by_key(&before, |(ip, _)| *ip).ok().map(|at| placed[at].1)
    };
    let mut at = ORIGIN;
    for instruction in code {
        let mut i = *instruction;
        if i.ip() != 0 {
            placed.push((i.ip(), at));
        }
        let target = (i.op0_kind() == OpKind::NearBranch64).then(|| i.near_branch64());
        let known = target.map(|target| now(&placed, target));
        if let Some(back) = known {
            let to = back.unwrap_or(at);
            let is_short = back.is_some() && at + SHORT_BRANCH - to <= i8::MIN.unsigned_abs().into();
            if is_short {
                i.as_short_branch()
            } else {
                i.as_near_branch()
            }
            i.set_near_branch64(to);
        }
        at += encoder.encode(&i, at).map_err(|e| failed(e.to_string()))? as u64;
        if let (Some(target), Some(None)) = (target, known) {
            ahead.push((at, target));
        }
    }
    let mut bytes = encoder.take_buffer();
    for (end, target) in ahead {
        let to = now(&placed, target).ok_or_else(|| failed("a branch leaves the kernel".into()))?;
        let end_offset = (end - ORIGIN) as usize;
        let distance = i32::try_from(to - end).map_err(|e| failed(e.to_string()))?;
        bytes[end_offset - DISPLACEMENT..end_offset].copy_from_slice(&distance.to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::{Encoding, widen};
    use super::*;
    use iced_x86::code_asm::*;
    use model::kernel::{Dot, Width};

    const WIDE: Encoding = Encoding { width: Width::Z512, dot: Dot::Pairs, prefetch_bytes: 0 };

    #[test]
    fn branches_follow_code_that_grew() {
        // 24 additions of 4 bytes: a branch over them is short before and not after, when each has 6.
        let mut a = CodeAssembler::new(64).unwrap();
        let (mut head, mut end) = (a.create_label(), a.create_label());
        a.set_label(&mut head).unwrap();
        a.cmp(rdi, rsi).unwrap();
        a.jae(end).unwrap();
        for _ in 0..24 {
            a.vaddps(xmm1, xmm1, xmm2).unwrap();
        }
        a.jb(head).unwrap();
        a.set_label(&mut end).unwrap();
        a.jb(end).unwrap();
        a.ret().unwrap();
        let code = a.assemble(0).unwrap();
        assert_eq!(code[3..5], [0x73, 24 * 4 + 2], "short before");

        let wide = widen(&code, WIDE).unwrap().0;
        let text = crate::disasm::disassemble(&wide);
        let jumps: Vec<&str> = text.lines().filter(|l| l.contains(" j")).map(str::trim).collect();
        // 3 bytes of `cmp`, 6 of `jae`, 144 of additions, 6 of `jb`; then 2 of the short one.
        assert_eq!(jumps, ["3  jae 9Fh", "99  jb 0h", "9f  jb 9Fh"]);
        assert_eq!(wide[0x9f..], [0x72, 0xfe, 0xc5, 0xf8, 0x77, 0xc3], "short, vzeroupper, ret");
    }

    #[test]
    fn branches_that_leave_are_refused() {
        // To behind the end, before the start, and into an instruction.
        for code in [&[0xeb, 0x10, 0xc3][..], &[0xeb, 0xf0, 0xc3], &[0x48, 0x39, 0xf7, 0x72, 0xfc, 0xc3]] {
            assert!(matches!(widen(code, WIDE), Err(JitError::Encode { .. })), "{code:02x?}");
        }
    }
}
