//! Instruction sets by name: what a machine may use, and what a kernel needs.

use crate::kernel::{Dot, Variant, Width};

/// Usable instruction sets. Plain facts: holding an `Isa` with a flag set does not by itself run anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Isa {
    /// AVX2, FMA and F16C, with ymm state enabled: the least any compiled kernel needs, at 128 bits too.
    pub avx2: bool,
    /// AVX-512 F, BW, DQ and VL, with zmm state enabled.
    pub avx512: bool,
    /// `vpdpbusd` in its EVEX form (AVX512-VNNI).
    pub avx512_vnni: bool,
    /// `vpdpbusd` in its VEX form (AVX-VNNI).
    pub avx_vnni: bool,
}

impl Isa {
    /// No vector extension beyond the SSE2 that x86-64 guarantees.
    pub const PORTABLE: Isa = Isa { avx2: false, avx512: false, avx512_vnni: false, avx_vnni: false };
    /// The base tier of compiled kernels.
    pub const AVX2: Isa = Isa { avx2: true, ..Isa::PORTABLE };

    /// Short name of the highest tier, as reports show it.
    pub fn name(&self) -> &'static str {
        match (self.avx512_vnni, self.avx512, self.avx_vnni, self.avx2) {
            (true, ..) => "avx512_vnni",
            (_, true, ..) => "avx512",
            (_, _, true, _) => "avx2_vnni",
            (_, _, _, true) => "avx2",
            _ => "portable",
        }
    }

    /// The first instruction set that `variant` needs and that is not among these.
    pub fn missing(&self, variant: &Variant) -> Option<&'static str> {
        if !self.avx2 {
            Some("AVX2, FMA and F16C")
        } else if !self.avx512 && (variant.width == Width::Z512 || variant.dot == Dot::Evex) {
            Some("AVX-512 F, BW, DQ and VL")
        } else if !self.avx512_vnni && variant.dot == Dot::Evex {
            Some("AVX-512 VNNI")
        } else if !self.avx_vnni && variant.dot == Dot::Vex {
            Some("AVX-VNNI")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_runs_where_all_it_needs_is() {
        let everything = Isa { avx2: true, avx512: true, avx512_vnni: true, avx_vnni: true };
        for (name, without, missing) in [
            ("w128_r1_c8_s1_u1_pf0", Isa { avx2: false, ..everything }, "AVX2, FMA and F16C"),
            ("w512_r1_c8_s1_u1_pf0", Isa { avx512: false, ..everything }, "AVX-512 F, BW, DQ and VL"),
            ("w256v_r1_c8_s1_u1_pf0", Isa { avx512: false, ..everything }, "AVX-512 F, BW, DQ and VL"),
            ("w256v_r1_c8_s1_u1_pf0", Isa { avx512_vnni: false, ..everything }, "AVX-512 VNNI"),
            ("w256a_r1_c8_s1_u1_pf0", Isa { avx_vnni: false, ..everything }, "AVX-VNNI"),
        ] {
            let variant: Variant = name.parse().unwrap();
            assert_eq!(everything.missing(&variant), None, "{name}");
            assert_eq!(without.missing(&variant), Some(missing), "{name}");
        }
        assert_eq!(Isa::AVX2.missing(&"w256_r1_c8_s1_u1_pf0".parse().unwrap()), None);
    }
}
