//! Identities, snapshots and media that the tests of this crate share.
#![allow(dead_code)] // Each test binary uses its own part.

use model::kernel::{DType, KernelKey, Op, Variant};
use snapshot_format::{
    BootLine, Identity, KeyRecord, Medium, ModelFile, Slot, Snapshot, StoredKernel, Trial, TrialOutcome,
};
use storage::{BlockDevice, SECTOR_BYTES, StorageError};

pub const ME: Identity = Identity { build_id: [0xb1; 32], model_id: [0x3d; 32], machine: [0xac; 32] };

pub fn key(n: u32) -> KernelKey {
    KernelKey { op: Op::GateUpSilu, dtype: DType::Q4_1, m: 1, n, k: 576 }
}

pub fn variant(streams: u8) -> Variant {
    format!("w256v_r1_c32_s{streams}_u2_pf4096").parse().expect("a variant name")
}

/// A snapshot with everything in it, different for every `seed`, with `code_bytes` bytes of code in one kernel.
pub fn snapshot(seed: u32, code_bytes: usize) -> Snapshot {
    let code = (0..code_bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 11) as u8).collect();
    let trial = Trial {
        variant: variant(2),
        incumbent: None,
        ratio: Some(0.75),
        outcome: TrialOutcome::Kept,
        boot: seed,
        compile_us: 400,
        code_bytes: code_bytes as u32,
    };
    let refused = Trial { ratio: None, outcome: TrialOutcome::Refused, incumbent: Some(variant(2)), ..trial };
    let mut entry = KeyRecord::new(key(1536));
    entry.incumbent = Some(StoredKernel::new(variant(2), code));
    entry.baseline_median_cycles = Some(1_000_000);
    entry.last_median_cycles = Some(750_000 + u64::from(seed));
    entry.trials = vec![trial, refused];
    entry.quarantined = vec![variant(8)];
    entry.changed_at_boot = seed;
    let mut snapshot = Snapshot {
        boot_count: seed,
        entries: vec![entry, KeyRecord::new(key(32))],
        model_file: Some(ModelFile { len_bytes: 1000 + u64::from(seed), sha256: [seed as u8; 32] }),
        boots: Vec::new(),
    };
    snapshot.push_boot(BootLine {
        boot: seed,
        unix_time: Some(1_700_000_000),
        token_us_median: 12_345.5,
        token_us_mad: 12.25,
        reference_us: Some(800.0),
        decode_tok_s: 81.0,
        ttft_ms: 310.0,
        kernels_changed: 1,
        settled_share: 0.5,
        generation: 3,
        threads: 2,
        clock_trusted: true,
        converged: true,
    });
    snapshot
}

/// Two slots side by side on a device, without a file system.
pub struct RawSlots<'a, D: BlockDevice> {
    pub dev: &'a mut D,
    pub slot_sectors: u64,
}

impl<D: BlockDevice> RawSlots<'_, D> {
    fn lba(&self, slot: Slot, offset: u64) -> u64 {
        let first = if slot == Slot::A { 0 } else { self.slot_sectors };
        first + offset / SECTOR_BYTES as u64
    }
}

impl<D: BlockDevice> Medium for RawSlots<'_, D> {
    fn slot_len_bytes(&self, _: Slot) -> Result<u64, StorageError> {
        Ok(self.slot_sectors * SECTOR_BYTES as u64)
    }
    fn read_only(&self) -> bool {
        self.dev.read_only()
    }
    fn read(&mut self, slot: Slot, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        let mut whole = vec![0; buf.len().next_multiple_of(SECTOR_BYTES)];
        self.dev.read(self.lba(slot, offset), &mut whole)?;
        buf.copy_from_slice(&whole[..buf.len()]);
        Ok(())
    }
    fn write(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> Result<(), StorageError> {
        assert!(offset.is_multiple_of(SECTOR_BYTES as u64), "writes start at a sector");
        Ok(self.dev.write(self.lba(slot, offset), bytes)?)
    }
    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(self.dev.flush()?)
    }
}
