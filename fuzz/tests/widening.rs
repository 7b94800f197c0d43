//! What the target `widen` reaches: it proves little unless its functions use the whole allow-list.

use fuzz::{Mutator, seeds, widen};
use iced_x86::{Code, Decoder, DecoderOptions, OpKind};
use jit::widen::table::{CARRIERS, PLAIN};
use jit::{JitError, Refusals};
use model::kernel::Width;

/// Functions looked at.
const FUNCTIONS: usize = 1500;

#[test]
fn random_functions_use_the_whole_allow_list() {
    let seeds = seeds(256);
    let mut mutator = Mutator::new(7);
    let mut refusals = Refusals::default();
    let mut emitted: Vec<Code> = Vec::new();
    let (mut wide, mut unwidened, mut spills, mut folded, mut backward, mut lanes, mut known) = (0, 0, 0, 0, 0, 0, 0);
    let (mut high_registers, mut frames) = (0, 0);
    for _ in 0..FUNCTIONS {
        let report = widen::check(&mutator.mutate(&seeds));
        for error in &report.refused {
            refusals.count(error);
            spills += usize::from(matches!(error, JitError::Spill { .. }));
        }
        unwidened += usize::from(report.compared_unwidened);
        folded += report.folded;
        lanes += report.lanes;
        known += report.known_lanes;
        if !report.compared.contains(&Width::Y256) {
            continue;
        }
        wide += 1;
        let mut decoder = Decoder::new(64, &report.narrow, DecoderOptions::NONE);
        let (mut loops, mut high, mut framed) = (false, false, false);
        while decoder.can_decode() {
            let i = decoder.decode();
            if !emitted.contains(&i.code()) {
                emitted.push(i.code());
            }
            loops |= i.op0_kind() == OpKind::NearBranch64 && i.near_branch64() < i.ip();
            high |= (0..i.op_count()).any(|k| {
                i.op_kind(k) == OpKind::Register && i.op_register(k).is_xmm() && i.op_register(k).number() >= 8
            });
            framed |= i.code() == Code::And_rm64_imm8;
        }
        backward += usize::from(loops);
        high_registers += usize::from(high);
        frames += usize::from(framed);
    }
    println!(
        "of {FUNCTIONS} functions {wide} ran wide, {backward} of them with a loop, {high_registers} with registers from xmm8 \
         on, {frames} with a frame; {unwidened} unwidened; {folded} loads folded; refused: {refusals}; \
         {known} of {lanes} lanes known"
    );
    assert!(wide > FUNCTIONS / 2 && backward > FUNCTIONS / 10 && high_registers > FUNCTIONS / 20 && frames > 50);
    assert!(spills > 20 && folded > 100 && unwidened > FUNCTIONS / 10);
    assert!(known > lanes / 2, "only {known} of {lanes} lanes are known");
    let mut missing: Vec<Code> = PLAIN.iter().chain(CARRIERS).map(|row| row.emitted).collect();
    // Cranelift's register allocator moves vectors of all types by movdqa; movaps is listed beside it. Not every machine
    // has VNNI.
    missing.retain(|code| !emitted.contains(code) && *code != Code::Movaps_xmm_xmmm128);
    if !is_x86_feature_detected!("avx512vnni") && !is_x86_feature_detected!("avxvnni") {
        missing.retain(|code| *code != Code::VEX_Vfnmsub213ps_xmm_xmm_xmmm128);
    }
    assert_eq!(missing, [], "rows of the allow-list that no function used");
}
