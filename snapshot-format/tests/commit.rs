//! The two-slot commit: every cut, every flipped bit, every reason.

mod common;

use common::{ME, RawSlots, key, snapshot, variant};
use sha2::{Digest, Sha256};
use snapshot_format::header::{Header, MAX_GENERATION};
use snapshot_format::{
    CodeUse, ForeignCode, HEADER_BYTES, Identity, MAX_PAYLOAD_BYTES, Medium, Opened, SaveError, Saved, Slot,
    SlotReason, Snapshot, StoredKernel, Trial, TrialOutcome, open, open_any, save,
};
use storage::fault::{FAULT_STATUS, Fault, FaultDisk, Unflushed};
use storage::{BlockDevice, DeviceError, MemoryDisk, SECTOR_BYTES, StorageError};

const SLOT_SECTORS: u64 = 16;

fn blank() -> MemoryDisk {
    MemoryDisk::new(vec![0; 2 * SLOT_SECTORS as usize * SECTOR_BYTES])
}

fn slots<D: BlockDevice>(dev: &mut D) -> RawSlots<'_, D> {
    RawSlots { dev, slot_sectors: SLOT_SECTORS }
}

fn saved(disk: &mut MemoryDisk, snapshot: &Snapshot) -> Saved {
    save(&mut slots(disk), &ME, snapshot).expect("save")
}

fn opened(disk: &mut MemoryDisk) -> Opened {
    open(&mut slots(disk), &ME).expect("open")
}

/// Reasons of a cold start, slot A first.
fn cold(disk: &mut MemoryDisk) -> [SlotReason; 2] {
    let cold = open(&mut slots(disk), &ME).expect_err("a cold start");
    Slot::ALL.map(|slot| cold.reason(slot).clone())
}

fn slot_at(slot: Slot) -> usize {
    if slot == Slot::A { 0 } else { SLOT_SECTORS as usize * SECTOR_BYTES }
}

/// A disk whose slot A holds exactly these header fields and payload, hashes right.
fn forged(header: Header, payload: &[u8]) -> MemoryDisk {
    let mut disk = blank();
    disk.bytes_mut()[..HEADER_BYTES].copy_from_slice(&header.encode());
    disk.bytes_mut()[HEADER_BYTES..][..payload.len()].copy_from_slice(payload);
    disk
}

fn header_of(payload: &[u8]) -> Header {
    Header {
        generation: 5,
        committed: true,
        payload_bytes: payload.len() as u64,
        payload_sha256: Sha256::digest(payload).into(),
        identity: ME,
        model_file: None,
    }
}

#[test]
fn saves_alternate_and_the_newest_is_opened() {
    let mut disk = blank();
    for generation in 1..=5u32 {
        let snapshot = snapshot(generation, 300);
        let done = saved(&mut disk, &snapshot);
        let slot = if generation % 2 == 1 { Slot::A } else { Slot::B };
        assert_eq!((done.generation, done.slot), (u64::from(generation), slot));
        let back = opened(&mut disk);
        assert_eq!(back.snapshot, snapshot);
        assert_eq!((back.generation, back.slot, back.code), (u64::from(generation), slot, CodeUse::Full));
        assert_eq!(back.passed_over, (generation == 1).then_some(SlotReason::Empty));
    }
    // A snapshot that shrank leaves nothing of the longer one behind in its last sector.
    let done = saved(&mut disk, &Snapshot::default());
    assert_eq!(opened(&mut disk).snapshot, Snapshot::default());
    let tail = &disk.bytes()[slot_at(done.slot) + HEADER_BYTES..][..SECTOR_BYTES];
    assert!(tail[done.payload_bytes as usize..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_save_cut_at_any_sector_write_leaves_the_old_or_the_new_snapshot() {
    let mut starts = vec![blank()];
    for seed in 1..=3 {
        let mut next = starts[starts.len() - 1].clone();
        saved(&mut next, &snapshot(seed, 1500));
        starts.push(next);
    }
    let new = snapshot(77, 1700);
    let mut faults = vec![Fault::Fail, Fault::Cut];
    // Inside magic, generation, state, lengths and hashes; one byte short; and all of it.
    let torn = [1, 4, 7, 9, 16, 17, 20, 25, 40, 70, 256, 480, 481, 500, 511, 512];
    faults.extend(torn.map(|new_bytes| Fault::Tear { new_bytes }));
    let mut fates = vec![Unflushed::Kept, Unflushed::Dropped];
    fates.extend((1..=6).map(|seed| Unflushed::Some { seed: seed * 0x9e37_79b9 }));

    let (mut cases, mut kept_old, mut found_new) = (0, 0, 0);
    for start in &starts {
        let before = open(&mut slots(&mut start.clone()), &ME).ok();
        let mut whole = FaultDisk::new(start.clone());
        save(&mut slots(&mut whole), &ME, &new).expect("an undisturbed save");
        let writes = whole.sector_writes();
        assert!((6..=8).contains(&writes) && whole.flushes() == 3, "{writes} sector writes");
        for at in 0..writes {
            for &fault in &faults {
                for &fate in &fates {
                    cases += 1;
                    let case = format!("{fault:?} at write {at} of {writes}, unflushed {fate:?}");
                    let mut disk = FaultDisk::new(start.clone()).with_fault(at, fault, fate);
                    let error = save(&mut slots(&mut disk), &ME, &new).expect_err(&case);
                    assert!(matches!(error, SaveError::Write { .. }), "{case}: {error}");
                    let mut after = disk.power_on();
                    match (open(&mut slots(&mut after), &ME), &before) {
                        (Ok(found), Some(before)) if found.snapshot == before.snapshot => {
                            assert_eq!((found.generation, found.slot), (before.generation, before.slot), "{case}");
                            kept_old += 1;
                        }
                        (Ok(found), _) => {
                            assert_eq!(found.snapshot, new, "{case}");
                            assert!(at == writes - 1, "{case}: new before its header was complete");
                            found_new += 1;
                        }
                        (Err(_), None) => kept_old += 1,
                        (Err(cold), Some(_)) => panic!("{case}: {cold}"),
                    }
                    // And the volume goes on working.
                    let next = snapshot(78, 10);
                    saved(&mut after, &next);
                    assert_eq!(opened(&mut after).snapshot, next, "{case}");
                }
            }
        }
    }
    println!("{cases} cuts: {kept_old} kept the old snapshot, {found_new} have the new one");
    assert!(cases > 3000 && kept_old > 0 && found_new > 0);
}

#[test]
fn a_cut_is_told_from_damage() {
    let mut disk = blank();
    saved(&mut disk, &snapshot(1, 1500));
    let new = snapshot(2, 1500);
    let mut cut = FaultDisk::new(disk.clone()).with_fault(2, Fault::Cut, Unflushed::Kept);
    save(&mut slots(&mut cut), &ME, &new).unwrap_err();
    let after = opened(&mut cut.power_on());
    let payload_bytes = saved(&mut disk, &new).payload_bytes;
    assert_eq!(after.passed_over, Some(SlotReason::Torn { generation: 2, payload_bytes }));
    // Cut before anything reached the medium: the slot is what it was.
    let mut cut = FaultDisk::new(blank()).with_fault(0, Fault::Cut, Unflushed::Kept);
    save(&mut slots(&mut cut), &ME, &new).unwrap_err();
    assert_eq!(cold(&mut cut.power_on()), [SlotReason::Empty, SlotReason::Empty]);
}

#[test]
fn every_flipped_bit_is_noticed_and_named() {
    let mut disk = blank();
    let only = snapshot(1, 40);
    let payload_bytes = saved(&mut disk, &only).payload_bytes as usize;
    assert!((100..400).contains(&payload_bytes), "{payload_bytes}");
    for bit in 0..8 * (HEADER_BYTES + payload_bytes + 20) {
        let (at, mask) = (bit / 8, 1 << (bit % 8));
        disk.bytes_mut()[at] ^= mask;
        let result = open(&mut slots(&mut disk), &ME);
        match (at, result.map_err(|cold| cold.reason(Slot::A).clone())) {
            (0..4, Err(SlotReason::BadMagic { .. })) => {}
            (4..HEADER_BYTES, Err(SlotReason::HeaderDamaged { expected, found })) => assert_ne!(expected, found),
            (at, Err(SlotReason::PayloadDamaged { generation: 1, expected, found })) => {
                assert!((HEADER_BYTES..HEADER_BYTES + payload_bytes).contains(&at), "byte {at}");
                assert_ne!(expected, found);
            }
            // Past the payload nothing is stored.
            (at, Ok(back)) => {
                assert!(at >= HEADER_BYTES + payload_bytes, "byte {at} is not covered");
                assert_eq!(back.snapshot, only);
            }
            (at, Err(reason)) => panic!("byte {at} mask {mask:#x}: {reason:?}"),
        }
        disk.bytes_mut()[at] ^= mask;
    }
    assert_eq!(opened(&mut disk).snapshot, only);
}

#[test]
fn a_flipped_bit_in_the_newer_slot_falls_back_to_the_older() {
    let mut disk = blank();
    let (old, new) = (snapshot(1, 40), snapshot(2, 40));
    saved(&mut disk, &old);
    let newest = saved(&mut disk, &new);
    for at in [0, 10, 490, HEADER_BYTES, HEADER_BYTES + newest.payload_bytes as usize - 1] {
        let mut disk = disk.clone();
        disk.bytes_mut()[slot_at(newest.slot) + at] ^= 0x10;
        let back = opened(&mut disk);
        assert_eq!((back.generation, &back.snapshot), (1, &old), "byte {at}");
        let expected = ["bad_magic", "header_damaged", "header_damaged", "payload_damaged", "payload_damaged"];
        assert!(expected.contains(&back.passed_over.expect("a reason").name()));
        // The next save repairs the damaged slot, not the one that is still good.
        let done = saved(&mut disk, &snapshot(3, 40));
        assert_eq!(done.slot, newest.slot, "byte {at}");
        assert!(done.generation > 1);
    }
}

#[test]
fn slots_that_hold_something_else_are_named() {
    let payload = postcard::to_allocvec(&snapshot(1, 10)).unwrap();
    let good = header_of(&payload);
    let limit_bytes = (SLOT_SECTORS - 1) * SECTOR_BYTES as u64;
    let other = [0x99; 32];
    let mut cases: Vec<(MemoryDisk, SlotReason)> = Vec::new();
    cases.push((
        forged(Header { committed: false, ..good }, &payload),
        SlotReason::Torn { generation: 5, payload_bytes: good.payload_bytes },
    ));
    for payload_bytes in [limit_bytes + 1, u64::MAX] {
        let disk = forged(Header { payload_bytes, ..good }, &payload);
        cases.push((disk, SlotReason::PayloadTooLong { payload_bytes, limit_bytes }));
    }
    let identity = Identity { model_id: other, ..ME };
    cases.push((
        forged(Header { identity, ..good }, &payload),
        SlotReason::OtherModel { generation: 5, found: other, expected: ME.model_id },
    ));
    // Whole, but not this schema: too short, garbage, and with bytes to spare.
    let mut longer = payload.clone();
    longer.push(0);
    for payload in [&payload[..payload.len() - 1], &[0xff; 64], &longer] {
        let reason = SlotReason::Schema { generation: 5, payload_bytes: payload.len() as u64 };
        cases.push((forged(header_of(payload), payload), reason));
    }
    let mut bad_code = snapshot(1, 10);
    bad_code.entries[0].incumbent.as_mut().unwrap().code[3] ^= 1;
    let payload = postcard::to_allocvec(&bad_code).unwrap();
    cases.push((forged(header_of(&payload), &payload), SlotReason::CodeDamaged { generation: 5, key: key(1536) }));
    for (mut disk, expected) in cases {
        assert_eq!(cold(&mut disk), [expected, SlotReason::Empty]);
    }
}

#[test]
fn what_no_build_would_save_is_refused_although_its_hashes_are_right() {
    const SECTORS: u64 = 4096;
    let opens = |spoil: fn(&mut Snapshot)| {
        let mut snapshot = snapshot(1, 10);
        spoil(&mut snapshot);
        let payload = postcard::to_allocvec(&snapshot).unwrap();
        let mut disk = MemoryDisk::new(vec![0; 2 * SECTORS as usize * SECTOR_BYTES]);
        disk.bytes_mut()[..HEADER_BYTES].copy_from_slice(&header_of(&payload).encode());
        disk.bytes_mut()[HEADER_BYTES..][..payload.len()].copy_from_slice(&payload);
        let refused = SlotReason::Schema { generation: 5, payload_bytes: payload.len() as u64 };
        match open(&mut RawSlots { dev: &mut disk, slot_sectors: SECTORS }, &ME) {
            Ok(_) => true,
            Err(cold) => {
                assert_eq!(*cold.reason(Slot::A), refused);
                false
            }
        }
    };
    assert!(opens(|_| {}));
    assert!(!opens(|s| s.entries.push(s.entries[0].clone())), "two records of one key");
    assert!(!opens(|s| s.boots = vec![s.boots[0]; snapshot_format::MAX_BOOT_LINES + 1]));
    assert!(opens(|s| s.boots = vec![s.boots[0]; snapshot_format::MAX_BOOT_LINES]));
    assert!(!opens(|s| s.entries[0].trials = vec![s.entries[0].trials[0]; 4097]));
    assert!(!opens(|s| s.entries[0].quarantined = vec![variant(8); 4097]));
    assert!(!opens(|s| s.entries[0].incumbent = Some(StoredKernel::new(variant(2), vec![0; (256 << 10) + 1]))));
    assert!(opens(|s| s.entries[0].incumbent = Some(StoredKernel::new(variant(2), vec![0; 256 << 10]))));
    assert!(!opens(|s| s.entries.extend((1..=1024).map(|n| snapshot_format::KeyRecord::new(key(2048 + n))))));
}

#[test]
fn code_of_another_build_or_machine_is_dropped_and_what_still_holds_is_kept() {
    let mut disk = blank();
    let mut whole = snapshot(9, 500);
    whole.entries[0].answer_sha256 = Some([5; 32]);
    saved(&mut disk, &whole);
    let other = [0x77; 32];
    let without_code = |record: &snapshot_format::KeyRecord| {
        let kernel = record.incumbent.clone().unwrap();
        kernel.code.is_empty() && kernel.variant == variant(2) && !kernel.is_intact()
    };
    let build = open(&mut slots(&mut disk), &Identity { build_id: other, ..ME }).unwrap();
    let foreign = ForeignCode::OtherBuild { found: ME.build_id, expected: other };
    assert_eq!(build.code, CodeUse::ProfileOnly(foreign));
    let (kept, before) = (&build.snapshot.entries[0], &whole.entries[0]);
    assert!(without_code(kept));
    assert_eq!(kept.answer_sha256, None, "another build's answer cannot vouch for this build's kernels");
    assert_eq!((&kept.trials, &kept.quarantined), (&before.trials, &before.quarantined));
    assert_eq!(kept.last_median_cycles, before.last_median_cycles);
    assert_eq!((build.snapshot.boot_count, build.snapshot.boots.len()), (9, 1));

    // Another machine counts more than another build: its times must not survive.
    for identity in [Identity { machine: other, ..ME }, Identity { machine: other, build_id: other, ..ME }] {
        let machine = open(&mut slots(&mut disk), &identity).unwrap();
        let foreign = ForeignCode::OtherMachine { found: ME.machine, expected: other };
        assert_eq!(machine.code, CodeUse::ProfileOnly(foreign));
        let kept = &machine.snapshot.entries[0];
        assert!(without_code(kept) && kept.trials.is_empty());
        assert_eq!((kept.baseline_median_cycles, kept.last_median_cycles), (None, None));
        assert_eq!(kept.quarantined, before.quarantined);
        assert_eq!((machine.snapshot.boot_count, machine.snapshot.boots.len()), (9, 0));
    }

    // What was opened without code can be saved again.
    let identity = Identity { build_id: other, ..ME };
    save(&mut slots(&mut disk), &identity, &build.snapshot).unwrap();
    let again = open(&mut slots(&mut disk), &identity).unwrap();
    assert_eq!((again.code, again.snapshot), (CodeUse::Full, build.snapshot));
}

#[test]
fn two_models_can_share_a_volume_until_one_saves_twice() {
    let mut disk = blank();
    let other = Identity { model_id: [0x44; 32], ..ME };
    saved(&mut disk, &snapshot(1, 10));
    let second = save(&mut slots(&mut disk), &other, &snapshot(2, 10)).unwrap();
    assert_eq!((second.slot, second.generation), (Slot::B, 2));
    let mine = opened(&mut disk);
    assert_eq!((mine.generation, mine.snapshot), (1, snapshot(1, 10)));
    let reason = SlotReason::OtherModel { generation: 2, found: other.model_id, expected: ME.model_id };
    assert_eq!(mine.passed_over, Some(reason));
    assert_eq!(open(&mut slots(&mut disk), &other).unwrap().snapshot, snapshot(2, 10));
    // A third model finds nothing of its own and takes the older slot.
    let third = Identity { model_id: [0x55; 32], ..ME };
    let done = save(&mut slots(&mut disk), &third, &snapshot(3, 10)).unwrap();
    assert_eq!((done.slot, done.generation), (Slot::A, 3));
}

#[test]
fn a_newer_format_is_left_alone_as_long_as_possible() {
    let mut disk = blank();
    saved(&mut disk, &snapshot(1, 10));
    // The same header as a later format would write it: its version, generation 9, hash in its place.
    let (found, supported) = (snapshot_format::FORMAT_VERSION + 1, snapshot_format::FORMAT_VERSION);
    let mut sector = [0; HEADER_BYTES];
    sector.copy_from_slice(&disk.bytes()[..HEADER_BYTES]);
    (sector[4], sector[8]) = (found as u8, 9);
    let hash = Sha256::digest(&sector[..480]);
    sector[480..].copy_from_slice(&hash);
    disk.bytes_mut()[..HEADER_BYTES].copy_from_slice(&sector);
    let newer = SlotReason::OtherFormat { found, supported, generation: 9 };
    assert_eq!(cold(&mut disk), [newer.clone(), SlotReason::Empty]);
    let done = saved(&mut disk, &snapshot(2, 10));
    assert_eq!((done.slot, done.generation), (Slot::B, 10));
    assert_eq!(opened(&mut disk).passed_over, Some(newer));
}

#[test]
fn saves_that_cannot_be_made_change_nothing() {
    let mut disk = blank();
    saved(&mut disk, &snapshot(1, 10));
    let before = disk.clone();

    let mut read_only = disk.clone().with_read_only(true);
    assert_eq!(save(&mut slots(&mut read_only), &ME, &snapshot(2, 10)), Err(SaveError::ReadOnly));
    assert_eq!(opened(&mut read_only).generation, 1, "a read-only volume can still be read");

    let error = save(&mut slots(&mut disk), &ME, &snapshot(2, 20_000)).unwrap_err();
    match error {
        SaveError::TooLarge { slot: Slot::B, need_bytes: 20_000..22_000, have_bytes: 8192 } => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(disk, before);

    let payload = postcard::to_allocvec(&snapshot(1, 10)).unwrap();
    let mut last = forged(Header { generation: MAX_GENERATION, ..header_of(&payload) }, &payload);
    let before = last.clone();
    let error = save(&mut slots(&mut last), &ME, &snapshot(2, 10)).unwrap_err();
    assert_eq!(error, SaveError::LastGeneration { generation: MAX_GENERATION });
    assert_eq!(last, before);
}

#[test]
fn the_largest_payload_fits_and_one_more_sector_does_not() {
    let overhead = postcard::to_allocvec(&snapshot(1, 5000)).unwrap().len() - 5000;
    let most = (SLOT_SECTORS as usize - 1) * SECTOR_BYTES - overhead;
    let mut disk = blank();
    let full = snapshot(1, most);
    assert_eq!(saved(&mut disk, &full).payload_bytes, (SLOT_SECTORS - 1) * SECTOR_BYTES as u64);
    assert_eq!(opened(&mut disk).snapshot, full);
    let error = save(&mut slots(&mut disk), &ME, &snapshot(1, most + 1)).unwrap_err();
    let expected = SaveError::TooLarge {
        slot: Slot::B,
        need_bytes: (SLOT_SECTORS + 1) * SECTOR_BYTES as u64,
        have_bytes: SLOT_SECTORS * SECTOR_BYTES as u64,
    };
    assert_eq!(error, expected);
}

#[test]
fn an_unreadable_sector_costs_its_slot_only() {
    let mut disk = blank();
    saved(&mut disk, &snapshot(1, 1000));
    saved(&mut disk, &snapshot(2, 1000));
    for (lba, name) in [(SLOT_SECTORS, "header of B"), (SLOT_SECTORS + 2, "payload of B")] {
        let mut failing = FaultDisk::new(disk.clone()).with_failing_read(lba);
        let back = open(&mut slots(&mut failing), &ME).unwrap();
        assert_eq!((back.generation, back.slot), (1, Slot::A), "{name}");
        match back.passed_over {
            Some(SlotReason::Unreadable(StorageError::Device(DeviceError::Failed {
                status: FAULT_STATUS, ..
            }))) => {}
            other => panic!("{name}: {other:?}"),
        }
        // The good slot is kept: the save goes to the one that cannot be read.
        assert_eq!(save(&mut slots(&mut failing), &ME, &snapshot(3, 10)).unwrap().slot, Slot::B, "{name}");
    }
}

/// A medium with chosen slots missing, or of chosen length.
struct Partial<'a>(RawSlots<'a, MemoryDisk>, [Option<u64>; 2]);

impl Medium for Partial<'_> {
    fn slot_len_bytes(&self, slot: Slot) -> Result<u64, StorageError> {
        let path = slot.file_name().into();
        self.1[usize::from(slot == Slot::B)].ok_or(StorageError::NotFound { path })
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&mut self, slot: Slot, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        assert!(buf.len() as u64 <= MAX_PAYLOAD_BYTES, "{} bytes asked for", buf.len());
        self.0.read(slot, offset, buf)
    }
    fn write(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> Result<(), StorageError> {
        self.0.write(slot, offset, bytes)
    }
    fn flush(&mut self) -> Result<(), StorageError> {
        self.0.flush()
    }
}

#[test]
fn missing_and_small_slots_are_named() {
    fn partial(disk: &mut MemoryDisk, a: Option<u64>, b: Option<u64>) -> Partial<'_> {
        Partial(slots(disk), [a, b])
    }
    let disk = &mut blank();
    let reasons = |cold: &snapshot_format::ColdStart| Slot::ALL.map(|slot| cold.reason(slot).name());
    let none = open(&mut partial(disk, None, None), &ME).unwrap_err();
    assert_eq!(reasons(&none), ["no_file", "no_file"]);
    let error = save(&mut partial(disk, None, None), &ME, &snapshot(1, 10)).unwrap_err();
    assert_eq!(error, SaveError::NoSlotFile { slot: Slot::A });
    let small = open(&mut partial(disk, Some(1023), Some(1024)), &ME).unwrap_err();
    assert_eq!(small.reason(Slot::A), &SlotReason::TooSmall { len_bytes: 1023 });
    assert_eq!(small.reason(Slot::B), &SlotReason::Empty);
    // With one slot there is one save; a second would have to overwrite the only copy.
    let done = save(&mut partial(disk, None, Some(8192)), &ME, &snapshot(1, 10)).unwrap();
    assert_eq!(done.slot, Slot::B);
    let error = save(&mut partial(disk, None, Some(8192)), &ME, &snapshot(2, 10)).unwrap_err();
    assert_eq!(error, SaveError::NoSlotFile { slot: Slot::A });
    let back = open(&mut partial(disk, None, Some(8192)), &ME).unwrap();
    assert_eq!((back.snapshot, back.passed_over), (snapshot(1, 10), Some(SlotReason::NoFile)));
}

#[test]
fn a_huge_slot_does_not_mean_a_huge_allocation() {
    let payload = postcard::to_allocvec(&snapshot(1, 10)).unwrap();
    for payload_bytes in [MAX_PAYLOAD_BYTES + 1, 1 << 40, u64::MAX - 512] {
        let mut disk = forged(Header { payload_bytes, ..header_of(&payload) }, &payload);
        let mut medium = Partial(slots(&mut disk), [Some(u64::MAX), Some(u64::MAX)]);
        let cold = open(&mut medium, &ME).unwrap_err();
        let reason = SlotReason::PayloadTooLong { payload_bytes, limit_bytes: MAX_PAYLOAD_BYTES };
        assert_eq!(cold.reason(Slot::A), &reason);
    }
    // A small payload that claims huge lists is refused by its decoder, not by the allocator.
    let payload = [0x01, 0xff, 0xff, 0xff, 0xff, 0x0f];
    let reason = SlotReason::Schema { generation: 5, payload_bytes: 6 };
    assert_eq!(cold(&mut forged(header_of(&payload), &payload)), [reason, SlotReason::Empty]);
}

#[test]
fn texts_say_what_was_expected_what_was_found_and_what_happens() {
    let mut disk = blank();
    let cold = open(&mut slots(&mut disk), &ME).unwrap_err();
    assert_eq!(cold.to_string(), "cold start: both slots: the slot is empty, as on a new image; a save will fill it");
    saved(&mut disk, &snapshot(1, 10));
    disk.bytes_mut()[0] = b'X';
    let cold = open(&mut slots(&mut disk), &ME).unwrap_err();
    assert_eq!(
        cold.to_string(),
        "cold start: SNAPA.BIN: expected the magic \"SNAP\", found bytes 58 4e 41 50: not a snapshot; the slot is not \
         used and a save will replace it; SNAPB.BIN: the slot is empty, as on a new image; a save will fill it"
    );
    let reason = SlotReason::OtherFormat { found: 3, supported: 2, generation: 9 };
    assert_eq!(
        reason.to_string(),
        "expected format 2, found 3: written by a newer build (generation 9); the slot is not used and a save will \
         replace it"
    );
    let foreign = ForeignCode::OtherBuild { found: [0xab; 32], expected: [0xcd; 32] };
    assert_eq!(
        foreign.to_string(),
        "written by build abababababab, this is build cdcdcdcdcdcd; the profile and the trials are kept, the kernels \
         are compiled again"
    );
    let error = SaveError::TooLarge { slot: Slot::B, need_bytes: 9000, have_bytes: 8192 };
    assert_eq!(
        error.to_string(),
        "snapshot not saved: 9000 bytes are needed, SNAPB.BIN has 8192; build the image again with larger slots \
         (`bootimage`)"
    );
}

#[test]
fn the_encoding_of_format_5_is_pinned() {
    // When this fails, a type in the schema changed: raise FORMAT_VERSION, then pin the new encoding.
    let bytes = postcard::to_allocvec(&snapshot(3, 16)).unwrap();
    let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!((bytes.len(), hash.as_str()), (222, "344cfc4e8fa94c9b9c8120fc17b0e86e4d785cf0bac3ffcb570ae5d79ec3f8ba"));
    assert_eq!(snapshot_format::FORMAT_VERSION, 5);
}

#[test]
fn what_would_not_be_read_back_is_not_saved() {
    let mut disk = blank();
    saved(&mut disk, &snapshot(1, 10));
    let before = disk.bytes_mut().to_vec();
    let mut many = snapshot(2, 10);
    many.entries.extend((1..=1024).map(|n| snapshot_format::KeyRecord::new(key(2048 + n))));
    let error = save(&mut slots(&mut disk), &ME, &many).unwrap_err();
    assert_eq!(error, SaveError::TooMany { keys: 1026, trials: 2 });
    assert_eq!(disk.bytes_mut(), before);
}

#[test]
fn without_its_incumbent_a_key_is_searched_again_but_for_what_cannot_run() {
    let mut record = snapshot(1, 10).entries[0].clone();
    let trial = record.trials[0];
    let outcomes = [TrialOutcome::Kept, TrialOutcome::Slower, TrialOutcome::Undecided, TrialOutcome::Refused];
    let tried = outcomes.map(|outcome| Trial { outcome, ..trial });
    record.trials = tried.to_vec();
    record.drop_incumbent();
    assert_eq!((record.incumbent, record.trials), (None, vec![tried[3]]));
}

#[test]
fn stored_kernels_know_when_they_changed() {
    let mut kernel = StoredKernel::new(variant(4), vec![0xc5, 0xf8, 0x77, 0xc3]);
    assert!(kernel.is_intact());
    kernel.code[2] ^= 0x80;
    assert!(!kernel.is_intact());
    kernel.code.clear();
    assert!(!kernel.is_intact());
}

#[test]
fn records_are_found_and_boot_lines_bounded() {
    let mut snapshot = snapshot(1, 10);
    snapshot.record_mut(key(64)).quarantined.push(variant(1));
    snapshot.record_mut(key(64)).changed_at_boot = 4;
    assert_eq!(snapshot.entries.len(), 3);
    assert!(snapshot.record(&key(64)).unwrap().knows(&variant(1), 9));
    assert!(snapshot.record(&key(1536)).unwrap().knows(&variant(2), 9));
    assert!(!snapshot.record(&key(1536)).unwrap().knows(&variant(1), 9));
    assert!(snapshot.record(&key(96)).is_none());
    let line = snapshot.boots[0];
    for boot in 2..=1500 {
        snapshot.push_boot(snapshot_format::BootLine { boot, ..line });
    }
    assert_eq!(snapshot.boots.len(), snapshot_format::MAX_BOOT_LINES);
    assert_eq!((snapshot.boots[0].boot, snapshot.boots.last().unwrap().boot), (477, 1500));
}

#[test]
fn a_tool_opens_the_newest_snapshot_whosever_it_is() {
    let mut disk = blank();
    assert_eq!(
        open_any(&mut slots(&mut disk)).expect_err("nothing there"),
        open(&mut slots(&mut disk), &ME).unwrap_err()
    );
    saved(&mut disk, &snapshot(1, 100));
    let other = Identity { model_id: [9; 32], build_id: [8; 32], machine: [7; 32] };
    save(&mut slots(&mut disk), &other, &snapshot(2, 100)).expect("save");
    let (opened, identity) = open_any(&mut slots(&mut disk)).expect("open");
    assert_eq!(
        (identity, opened.generation, opened.code, opened.snapshot),
        (other, 2, CodeUse::Full, snapshot(2, 100))
    );

    // With the newer one damaged, the older one is still there, though of another model.
    let at = slot_at(opened.slot) + HEADER_BYTES + 5;
    disk.bytes_mut()[at] ^= 1;
    let (opened, identity) = open_any(&mut slots(&mut disk)).expect("the older one");
    assert_eq!((identity, opened.generation, opened.snapshot), (ME, 1, snapshot(1, 100)));
    assert!(
        matches!(opened.passed_over, Some(SlotReason::OtherModel { generation: 2, .. })),
        "{:?}",
        opened.passed_over
    );
}
