//! Which instruction sets may be used: the CPU has them and the operating state for their registers is enabled.

use model::Isa;

/// Asks CPUID and XGETBV. Both work in ring 3 and under Linux; under a hypervisor each CPUID may trap, so ask once.
/// The hand-written ops check the CPU again before they run, see [`crate::simd::Level`].
///
/// # Source
/// Intel SDM volume 1, sections 14.3, 15.2 (detection of AVX, FMA, AVX-512).
pub fn detect() -> Isa {
    let words = crate::simd::feature_words();
    from_words(&words)
}

/// The same decision from given CPUID and XCR0 words.
fn from_words(words: &FeatureWords) -> Isa {
    let bit = |word: u32, bit: u32| word >> bit & 1 == 1;
    let ymm_state = words.xcr0 & 0x06 == 0x06;
    let zmm_state = words.xcr0 & 0xe6 == 0xe6;
    let avx = bit(words.leaf1_ecx, 28) && ymm_state;
    let avx2 = avx && bit(words.leaf7_ebx, 5) && bit(words.leaf1_ecx, 12) && bit(words.leaf1_ecx, 29);
    let avx512 = avx2 && zmm_state && [16, 17, 30, 31].into_iter().all(|b| bit(words.leaf7_ebx, b));
    Isa { avx2, avx512, avx512_vnni: avx512 && bit(words.leaf7_ecx, 11), avx_vnni: avx2 && bit(words.leaf7_1_eax, 4) }
}

/// The words of CPUID and XCR0 that [`detect`] looks at; 0 where a leaf does not exist.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct FeatureWords {
    pub leaf1_ecx: u32,
    pub leaf7_ebx: u32,
    pub leaf7_ecx: u32,
    pub leaf7_1_eax: u32,
    /// XCR0, 0 when CR4.OSXSAVE is clear.
    pub xcr0: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: FeatureWords = FeatureWords {
        leaf1_ecx: 1 << 28 | 1 << 12 | 1 << 29 | 1 << 27,
        leaf7_ebx: 1 << 5 | 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31,
        leaf7_ecx: 1 << 11,
        leaf7_1_eax: 1 << 4,
        xcr0: 0xe7,
    };

    #[test]
    fn state_that_is_not_enabled_switches_the_tier_off() {
        assert_eq!(from_words(&ALL).name(), "avx512_vnni");
        let no_zmm = from_words(&FeatureWords { xcr0: 7, ..ALL });
        assert_eq!((no_zmm.name(), no_zmm.avx512), ("avx2_vnni", false));
        assert_eq!(from_words(&FeatureWords { xcr0: 3, ..ALL }), Isa::PORTABLE);
        assert_eq!(from_words(&FeatureWords { xcr0: 0, ..ALL }).name(), "portable");
    }

    #[test]
    fn each_feature_bit_is_needed() {
        for bit in [12, 28, 29] {
            assert!(!from_words(&FeatureWords { leaf1_ecx: ALL.leaf1_ecx & !(1 << bit), ..ALL }).avx2, "bit {bit}");
        }
        for bit in [16, 17, 30, 31] {
            let isa = from_words(&FeatureWords { leaf7_ebx: ALL.leaf7_ebx & !(1 << bit), ..ALL });
            assert!(isa.avx2 && !isa.avx512 && !isa.avx512_vnni, "bit {bit}");
        }
    }

    #[test]
    fn detection_agrees_with_the_standard_library() {
        let isa = detect();
        let std_avx2 = std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("f16c");
        assert_eq!(isa.avx2, std_avx2);
        let std_avx512 = std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512vl");
        assert_eq!(isa.avx512, std_avx512);
        assert_eq!(isa.avx512_vnni, std_avx512 && std::is_x86_feature_detected!("avx512vnni"));
    }
}
