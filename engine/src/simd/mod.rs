//! Everything written with CPU intrinsics: feature detection, the time-stamp counter, and the hand-written ops.
//!
//! A [`Level`] is the proof that an instruction set may be used: only detection makes one, so the safe wrappers of
//! this module cannot execute an instruction the CPU lacks.

pub(crate) mod attention;
#[cfg(feature = "baseline")]
pub(crate) mod avx2;
pub(crate) mod fma;
pub mod limits;
pub(crate) mod math;
pub(crate) mod pack;

use crate::isa::FeatureWords;
use core::arch::x86_64::{__cpuid, __cpuid_count, _MM_HINT_T1, _mm_prefetch, _rdtsc, _xgetbv};
use core::sync::atomic::{AtomicU8, Ordering};
use model::Isa;

/// Reads the time-stamp counter. Not serialising: good for differences well above 100 cycles.
#[inline(always)]
pub fn cycles() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU; CR4.TSD is clear in our kernel and under Linux.
    unsafe { _rdtsc() }
}

/// Asks for the cache lines of `bytes`, so that they are near when they are wanted.
pub(crate) fn fetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        // SAFETY: a hint; it is part of SSE, which every x86-64 CPU has.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
}

/// CPUID and XCR0 as far as [`Isa`] needs them.
pub(crate) fn feature_words() -> FeatureWords {
    let max_leaf = __cpuid(0).eax;
    let leaf1_ecx = __cpuid(1).ecx;
    let mut words = FeatureWords { leaf1_ecx, ..FeatureWords::default() };
    if max_leaf >= 7 {
        let leaf7 = __cpuid_count(7, 0);
        words.leaf7_ebx = leaf7.ebx;
        words.leaf7_ecx = leaf7.ecx;
        if leaf7.eax >= 1 {
            words.leaf7_1_eax = __cpuid_count(7, 1).eax;
        }
    }
    const OSXSAVE: u32 = 1 << 27;
    if leaf1_ecx & OSXSAVE != 0 {
        // SAFETY: OSXSAVE is set, so XGETBV is enabled at every privilege level.
        words.xcr0 = unsafe { xcr0() };
    }
    words
}

#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller saw CPUID's OSXSAVE bit.
    unsafe { _xgetbv(0) }
}

/// Proof that this CPU runs AVX2, FMA and F16C; with another proof inside where wider vectors may be used too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Avx2 {
    avx512: Option<Avx512>,
}

/// Proof that this CPU runs AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Avx512(());

/// Which of this crate's own ops to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// Portable scalar code.
    Portable,
    /// Hand-written AVX2, FMA and F16C code, with 512-bit forms where they pay.
    Avx2(Avx2),
}

impl Level {
    /// The highest level that `isa` allows and this CPU has.
    pub fn new(isa: Isa) -> Level {
        match Level::detect() {
            Level::Avx2(Avx2 { avx512 }) if isa.avx2 => Level::Avx2(Avx2 { avx512: avx512.filter(|_| isa.avx512) }),
            _ => Level::Portable,
        }
    }

    /// The proof, where portable code is not to run. A build without the hand-written ops holds none of that: its compiled
    /// kernels all need AVX2, and who runs it has seen to that first.
    #[inline(always)]
    pub(crate) fn avx2(self) -> Option<Avx2> {
        match self {
            Level::Avx2(avx2) => Some(avx2),
            Level::Portable if crate::ops::HAS_BASELINE => None,
            Level::Portable => unreachable!("this build needs AVX2"),
        }
    }

    /// The highest level of this CPU.
    pub fn detect() -> Level {
        let (avx2, avx512) = cpu_has();
        if avx2 { Level::Avx2(Avx2 { avx512: avx512.then_some(Avx512(())) }) } else { Level::Portable }
    }
}

/// [`crate::isa::detect`]'s answers for AVX2 and AVX-512, kept because a CPUID under a hypervisor can cost tens of microseconds.
fn cpu_has() -> (bool, bool) {
    static KNOWN: AtomicU8 = AtomicU8::new(0);
    match KNOWN.load(Ordering::Relaxed) {
        0 => {
            let isa = crate::isa::detect();
            KNOWN.store(1 + u8::from(isa.avx2) + u8::from(isa.avx2 && isa.avx512), Ordering::Relaxed);
            (isa.avx2, isa.avx2 && isa.avx512)
        }
        known => (known >= 2, known == 3),
    }
}

/// Marks the upper halves of all vector registers clean (`vzeroupper`), on CPUs that have them.
pub(crate) fn clear_upper_halves() {
    #[target_feature(enable = "avx")]
    fn vzeroupper() {
        core::arch::x86_64::_mm256_zeroupper();
    }
    if cpu_has().0 {
        // SAFETY: AVX2 implies AVX.
        unsafe { vzeroupper() }
    }
}
