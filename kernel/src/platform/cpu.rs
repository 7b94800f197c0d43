//! What CPU this is.

use alloc::string::{String, ToString};
use core::arch::x86_64::__cpuid;
use raw_cpuid::CpuId;

/// The 48 bytes of the brand string as CPUID gives them, zero when there is none. Needs no heap.
pub fn brand_bytes() -> [u8; 48] {
    let mut out = [0; 48];
    if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
        for (chunk, leaf) in out.chunks_exact_mut(16).zip(0x8000_0002u32..) {
            let leaf = __cpuid(leaf);
            for (bytes, word) in chunk.chunks_exact_mut(4).zip([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
    }
    out
}

/// The CPU can forbid execution page by page.
pub fn has_no_execute() -> bool {
    __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).edx >> 20 & 1 == 1
}

/// Brand string, or vendor when there is none.
pub fn brand() -> String {
    let cpuid = CpuId::new();
    let brand = cpuid.get_processor_brand_string().map(|b| b.as_str().trim().to_string()).unwrap_or_default();
    if !brand.is_empty() {
        return brand;
    }
    cpuid.get_vendor_info().map_or_else(|| "unknown CPU".to_string(), |v| v.as_str().to_string())
}

/// The text that names this CPU in snapshots (`runtime::platform::cpu_fingerprint`).
pub fn fingerprint(isa: model::Isa) -> String {
    let vendor = CpuId::new().get_vendor_info().map_or_else(|| "unknown".to_string(), |v| v.as_str().to_string());
    runtime::platform::cpu_fingerprint(&vendor, __cpuid(1).eax, isa)
}

/// The hypervisor's name, or its signature where that is not known here; `None` without one.
pub fn hypervisor() -> Option<String> {
    if !super::clock::hypervised() {
        return None;
    }
    let signature = super::clock::hypervisor_signature();
    let text: String = signature.iter().take_while(|&&b| b != 0).map(|&b| char::from(b)).collect();
    let known = [
        ("KVMKVMKVM", "KVM"),
        ("TCGTCGTCGTCG", "QEMU TCG"),
        ("VMwareVMware", "VMware"),
        ("Microsoft Hv", "Hyper-V"),
        ("XenVMMXenVMM", "Xen"),
    ];
    if let Some((_, name)) = known.iter().find(|(signature, _)| *signature == text) {
        return Some((*name).to_string());
    }
    let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() || c == ' ');
    Some(if plain { text } else { "unnamed".to_string() })
}
