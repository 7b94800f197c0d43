//! The targets `snapshot` and `audit`: what a slot holds behind its checksums, and the machine code in it.
//!
//! On a volume, a changed payload is refused by its hash before anything decodes it. Here the hash is made to fit.

use crate::common::host_isa;
use crate::targets::Outcome;
use jit::{Compiler, space};
use model::kernel::{DType, KernelKey, Op, Width};
use sha2::{Digest, Sha256};
use snapshot_format::header::Header;
use snapshot_format::{
    BootLine, CodeUse, HEADER_BYTES, Identity, KeyRecord, Medium, Slot, Snapshot, StoredKernel, Trial, TrialOutcome,
    open, save,
};
use storage::{SECTOR_BYTES, StorageError};

const IDENTITY: Identity = Identity { build_id: [1; 32], model_id: [2; 32], machine: [3; 32] };

/// Two slots in memory.
struct Slots([Vec<u8>; 2]);

impl Medium for Slots {
    fn slot_len_bytes(&self, slot: Slot) -> Result<u64, StorageError> {
        Ok(self.0[slot as usize].len() as u64)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&mut self, slot: Slot, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        buf.copy_from_slice(&self.0[slot as usize][offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> Result<(), StorageError> {
        self.0[slot as usize][offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(())
    }
}

/// Empty slots with room for `payload_bytes`.
fn slots(payload_bytes: usize) -> Slots {
    let slot = vec![0; HEADER_BYTES + payload_bytes.next_multiple_of(SECTOR_BYTES) + SECTOR_BYTES];
    Slots([slot.clone(), slot])
}

/// The payload of `snapshot` as it is saved, at most `room_bytes` long.
fn saved(snapshot: &Snapshot, room_bytes: usize) -> Vec<u8> {
    let mut slots = slots(room_bytes);
    let saved = save(&mut slots, &IDENTITY, snapshot).expect("there is room");
    slots.0[saved.slot as usize][HEADER_BYTES..][..saved.payload_bytes as usize].to_vec()
}

/// A small key of each kind of weights.
const KEYS: [KernelKey; 2] = [
    KernelKey { op: Op::MatmulResidual, dtype: DType::F32, m: 1, n: 32, k: 8 },
    KernelKey { op: Op::GateUpSilu, dtype: DType::Q4_1, m: 4, n: 40, k: 64 },
];

/// Machine code for each of [`KEYS`], in each width that tuning tries on this machine.
fn kernels() -> Vec<(KernelKey, StoredKernel)> {
    let mut compiler = Compiler::new(host_isa()).expect("this machine is an x86-64");
    let mut made = Vec::new();
    for key in KEYS {
        for (more, width) in [(0, Width::X128), (8, Width::Y256), (16, Width::Z512)] {
            // A snapshot has one record for each key.
            let key = KernelKey { n: key.n + more, ..key };
            let variants = space::variants(&key, host_isa());
            let Some(variant) = variants.iter().find(|variant| variant.width == width) else { continue };
            let kernel = compiler.compile(&key, variant).expect("the space holds what compiles");
            made.push((key, StoredKernel::new(*variant, kernel.code)));
        }
    }
    made
}

/// Room for the snapshots made here.
const ROOM_BYTES: usize = 1 << 20;

/// Payloads: an empty one, and one of boots that found something.
pub(crate) fn payloads() -> Vec<Vec<u8>> {
    let entries = kernels().into_iter().map(|(key, kernel)| {
        let variant = kernel.variant;
        let trial = |outcome, ratio| Trial {
            variant,
            incumbent: None,
            ratio,
            outcome,
            boot: 1,
            compile_us: 900,
            code_bytes: 700,
        };
        KeyRecord {
            incumbent: Some(kernel),
            baseline_median_cycles: Some(4000),
            last_median_cycles: Some(3000),
            trials: vec![trial(TrialOutcome::Kept, Some(0.75)), trial(TrialOutcome::Refused, None)],
            quarantined: vec![variant],
            changed_at_boot: 1,
            answer_sha256: Some([7; 32]),
            ..KeyRecord::new(key)
        }
    });
    let mut snapshot = Snapshot { boot_count: 1, entries: entries.collect(), model_file: None, boots: Vec::new() };
    let line = BootLine {
        boot: 1,
        unix_time: Some(1_790_000_000),
        token_us_median: 4000.0,
        token_us_mad: 20.0,
        reference_us: None,
        decode_tok_s: 250.0,
        ttft_ms: 70.0,
        kernels_changed: 2,
        settled_share: 0.5,
        generation: 0,
        threads: 1,
        clock_trusted: true,
        converged: false,
    };
    snapshot.push_boot(line);
    let plain = saved(&snapshot, ROOM_BYTES);
    // Without code, whose hash refuses any change of it.
    for kernel in snapshot.entries.iter_mut().filter_map(|record| record.incumbent.as_mut()) {
        kernel.code.clear();
    }
    vec![saved(&Snapshot::default(), ROOM_BYTES), plain, saved(&snapshot, ROOM_BYTES)]
}

/// A payload that decodes is saved and opened again as it was, and can be asked about every variant it names.
pub(crate) fn payload(data: &[u8]) -> Outcome {
    let mut slots = slots(data.len());
    let header = Header {
        generation: 1,
        committed: true,
        payload_bytes: data.len() as u64,
        payload_sha256: Sha256::digest(data).into(),
        identity: IDENTITY,
        model_file: None,
    };
    slots.0[0][..HEADER_BYTES].copy_from_slice(&header.encode());
    slots.0[0][HEADER_BYTES..][..data.len()].copy_from_slice(data);
    let Ok(opened) = open(&mut slots, &IDENTITY) else { return Outcome::Refused };
    assert_eq!((opened.code, opened.generation), (CodeUse::Full, 1));
    for record in &opened.snapshot.entries {
        let kernel = record.incumbent.as_ref();
        assert!(kernel.is_none_or(|kernel| kernel.code.is_empty() || kernel.is_intact()), "code without its hash");
        assert!(record.trials.iter().all(|trial| record.trials_of(&trial.variant) > 0));
        assert!(record.variants_tried() <= record.trials.len());
        assert!(record.quarantined.iter().all(|variant| record.knows(variant, 1)));
    }
    // Numbers may have been written longer than need be, never shorter.
    let again = saved(&opened.snapshot, data.len());
    let mut other = self::slots(again.len());
    save(&mut other, &IDENTITY, &opened.snapshot).expect("there is room");
    let reopened = open(&mut other, &IDENTITY).expect("it was just saved");
    // Not the snapshots themselves: a ratio that is no number equals nothing.
    assert_eq!(saved(&reopened.snapshot, again.len()), again, "a save changed the snapshot");
    Outcome::Accepted
}

/// Every machine code of [`kernels`].
pub(crate) fn codes() -> Vec<Vec<u8>> {
    kernels().into_iter().map(|(_, kernel)| kernel.code).collect()
}

/// Any bytes are judged as code of any width.
pub(crate) fn audit(data: &[u8]) -> Outcome {
    let mut accepted = false;
    for width in [Width::X128, Width::Y256, Width::Z512] {
        accepted |= jit::audit::audit(data, width).is_ok();
    }
    if accepted { Outcome::Accepted } else { Outcome::Refused }
}
