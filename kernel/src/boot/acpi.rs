//! The two things the kernel asks ACPI for: which cores exist, and where the power-management ports are.
//!
//! Input: the root pointer (from the loader, else found by scanning the BIOS area). Output: [`AcpiFacts`]. AML is not
//! interpreted. A damaged table is skipped, which leaves its facts unknown.
//!
//! # Source
//! ACPI specification 6.5, sections 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.9 (FADT), 5.2.12 (MADT).

use super::area::MAX_CPUS;
use super::fixed::FixedList;
use super::info::Physical;

/// Longest table that is read, in bytes.
const TABLE_BYTES: usize = 1 << 20;

/// What the tables said.
#[derive(Clone, Copy, Debug, Default)]
pub struct AcpiFacts {
    /// Local APIC ids of usable cores, the boot CPU included, in table order.
    pub apic_ids: FixedList<u8, MAX_CPUS>,
    /// Physical address of the local APIC registers.
    pub local_apic: Option<u64>,
    /// Port of the 3.579545 MHz power-management timer.
    pub pm_timer_port: Option<u16>,
    /// Port of PM1a control, which switches the machine off.
    pub pm1_control_port: Option<u16>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)) == 0
}

/// Looks for the root pointer where a BIOS leaves it: 16-byte steps in `0xe0000..0x100000`.
pub fn scan(memory: &dyn Physical) -> Option<u64> {
    (0xe_0000..0x10_0000u64)
        .step_by(16)
        .find(|&at| memory.bytes(at, 20).is_some_and(|root| root.starts_with(b"RSD PTR ") && sums_to_zero(root)))
}

fn table(memory: &dyn Physical, address: u64) -> Option<&[u8]> {
    let len = u32_at(memory.bytes(address, 36)?, 4)? as usize;
    if !(36..=TABLE_BYTES).contains(&len) {
        return None;
    }
    memory.bytes(address, len).filter(|t| sums_to_zero(t))
}

/// Reads the tables under the root pointer at `rsdp`.
pub fn read(memory: &dyn Physical, rsdp: u64) -> AcpiFacts {
    let mut facts = AcpiFacts::default();
    let Some(root) = memory.bytes(rsdp, 20).filter(|r| r.starts_with(b"RSD PTR ")) else { return facts };
    let extended = if root.get(15) >= Some(&2) { memory.bytes(rsdp, 36).and_then(|r| u64_at(r, 24)) } else { None };
    let (address, entry_bytes) = match extended {
        Some(xsdt) if xsdt != 0 => (xsdt, 8),
        _ => (u64::from(u32_at(root, 16).unwrap_or(0)), 4),
    };
    let Some(list) = table(memory, address) else { return facts };
    for entry in list.get(36..).unwrap_or(&[]).chunks_exact(entry_bytes) {
        let address = match entry_bytes {
            8 => u64_at(entry, 0),
            _ => u32_at(entry, 0).map(u64::from),
        };
        let Some(table) = address.and_then(|address| table(memory, address)) else { continue };
        match &table[..4] {
            b"APIC" => madt(table, &mut facts),
            b"FACP" => fadt(table, &mut facts),
            _ => {}
        }
    }
    facts
}

fn madt(table: &[u8], facts: &mut AcpiFacts) {
    facts.local_apic = u32_at(table, 36).map(u64::from);
    let mut rest = table.get(44..).unwrap_or(&[]);
    while let [kind, len, ..] = *rest {
        let Some(entry) = rest.get(..usize::from(len)).filter(|e| e.len() >= 2) else { break };
        // Type 0: local APIC; flags bit 0 enabled, bit 1 can be enabled.
        if kind == 0
            && let (Some(&id), Some(flags)) = (entry.get(3), u32_at(entry, 4))
            && flags & 3 != 0
        {
            let _ = facts.apic_ids.push(id);
        }
        rest = &rest[entry.len()..];
    }
}

fn fadt(table: &[u8], facts: &mut AcpiFacts) {
    let port = |at: usize| u32_at(table, at).and_then(|p| u16::try_from(p).ok()).filter(|&p| p != 0);
    facts.pm1_control_port = port(64);
    facts.pm_timer_port = port(76);
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    struct Memory(Vec<u8>);

    impl Physical for Memory {
        fn bytes(&self, address: u64, len: usize) -> Option<&[u8]> {
            let start = usize::try_from(address).ok()?;
            self.0.get(start..start.checked_add(len)?)
        }
    }

    fn seal(bytes: &mut [u8], checksum_at: usize) {
        bytes[checksum_at] = 0;
        bytes[checksum_at] = bytes.iter().fold(0u8, |sum, &b| sum.wrapping_sub(b));
    }

    fn make_table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut table = alloc::vec![0u8; 36];
        table[..4].copy_from_slice(signature);
        table[4..8].copy_from_slice(&(36 + body.len() as u32).to_le_bytes());
        table.extend(body);
        seal(&mut table, 9);
        table
    }

    fn memory() -> Memory {
        let mut m = alloc::vec![0u8; 0x10_0000];
        let mut put = |at: usize, bytes: &[u8]| m[at..at + bytes.len()].copy_from_slice(bytes);
        let mut madt = alloc::vec![0u8, 0, 0xe0, 0xfe, 1, 0, 0, 0];
        madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        madt.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        madt.extend([0, 8, 1, 4, 1, 0, 0, 0]);
        madt.extend([0, 8, 2, 6, 0, 0, 0, 0]);
        put(0x2000, &make_table(b"APIC", &madt));
        let mut fadt = alloc::vec![0u8; 80];
        fadt[64 - 36..68 - 36].copy_from_slice(&0x604u32.to_le_bytes());
        fadt[76 - 36..80 - 36].copy_from_slice(&0x608u32.to_le_bytes());
        put(0x3000, &make_table(b"FACP", &fadt));
        let mut rsdt = Vec::new();
        rsdt.extend(0x2000u32.to_le_bytes());
        rsdt.extend(0x3000u32.to_le_bytes());
        put(0x1000, &make_table(b"RSDT", &rsdt));
        let mut root = alloc::vec![0u8; 20];
        root[..8].copy_from_slice(b"RSD PTR ");
        root[16..20].copy_from_slice(&0x1000u32.to_le_bytes());
        seal(&mut root, 8);
        put(0xf_5ad0, &root);
        Memory(m)
    }

    #[test]
    fn cores_and_ports_are_found() {
        let memory = memory();
        let rsdp = scan(&memory).unwrap();
        assert_eq!(rsdp, 0xf_5ad0);
        let facts = read(&memory, rsdp);
        assert_eq!(facts.apic_ids.as_slice(), [0, 4], "the disabled core is left out");
        assert_eq!(facts.local_apic, Some(0xfee0_0000));
        assert_eq!((facts.pm_timer_port, facts.pm1_control_port), (Some(0x608), Some(0x604)));
    }

    #[test]
    fn a_table_with_a_wrong_checksum_is_skipped() {
        let mut memory = memory();
        memory.0[0x2030] ^= 1;
        let facts = read(&memory, 0xf_5ad0);
        assert!(facts.apic_ids.as_slice().is_empty());
        assert_eq!(facts.pm_timer_port, Some(0x608));
    }

    proptest! {
        #[test]
        fn damaged_tables_never_panic(at in 0usize..0x200, byte: u8, table in prop_oneof![Just(0x1000usize), Just(0x2000), Just(0x3000)]) {
            let mut memory = memory();
            let len = u32_at(&memory.0, table + 4).unwrap() as usize;
            memory.0[table + at % len] = byte;
            // The checksum is made right again, so that the damage is parsed.
            let len = (u32_at(&memory.0, table + 4).unwrap() as usize).clamp(36, 0x1000);
            seal(&mut memory.0[table..table + len], 9);
            read(&memory, 0xf_5ad0);
        }
    }
}
