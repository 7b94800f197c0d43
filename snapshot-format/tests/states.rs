//! The commit as a state machine: any sequence of saves, cuts, reopenings and flipped bits, by builds and models in turn.

mod common;

use common::{ME, RawSlots, snapshot};
use proptest::prelude::*;
use snapshot_format::{HEADER_BYTES, Identity, Slot, Snapshot, open, save};
use storage::fault::{Fault, FaultDisk, Unflushed};
use storage::{MemoryDisk, SECTOR_BYTES};

const SLOT_SECTORS: u64 = 8;

#[derive(Clone, Debug)]
enum Step {
    Save { code_bytes: usize },
    Cut { code_bytes: usize, at: u64, fault: Fault, unflushed: Unflushed },
    Flip { slot: Slot, at: usize, bit: u8 },
    Garbage { slot: Slot, sector: usize, byte: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    let slot = || prop_oneof![Just(Slot::A), Just(Slot::B)];
    let fault = prop_oneof![
        Just(Fault::Fail),
        Just(Fault::Cut),
        (0usize..=512).prop_map(|new_bytes| Fault::Tear { new_bytes })
    ];
    let unflushed = prop_oneof![
        Just(Unflushed::Kept),
        Just(Unflushed::Dropped),
        any::<u64>().prop_map(|seed| Unflushed::Some { seed })
    ];
    prop_oneof![
        4 => (0usize..2000).prop_map(|code_bytes| Step::Save { code_bytes }),
        4 => (0usize..2000, 0u64..8, fault, unflushed)
            .prop_map(|(code_bytes, at, fault, unflushed)| Step::Cut { code_bytes, at, fault, unflushed }),
        1 => (slot(), 0usize..1500, 0u8..8).prop_map(|(slot, at, bit)| Step::Flip { slot, at, bit }),
        1 => (slot(), 0usize..4, any::<u8>()).prop_map(|(slot, sector, byte)| Step::Garbage { slot, sector, byte }),
    ]
}

fn reopen(disk: &mut MemoryDisk) -> Option<(u64, Snapshot)> {
    let opened = open(&mut RawSlots { dev: disk, slot_sectors: SLOT_SECTORS }, &ME).ok()?;
    Some((opened.generation, opened.snapshot))
}

fn slot_at(slot: Slot) -> usize {
    if slot == Slot::A { 0 } else { SLOT_SECTORS as usize * SECTOR_BYTES }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_opened_was_saved_and_nothing_whole_is_lost(steps in proptest::collection::vec(step(), 1..25)) {
        let mut disk = MemoryDisk::new(vec![0; 2 * SLOT_SECTORS as usize * SECTOR_BYTES]);
        // What the next boot has to find, and everything a boot may ever find.
        let mut current: Option<(u64, Snapshot)> = None;
        let mut attempted: Vec<Snapshot> = Vec::new();
        for (seed, step) in steps.into_iter().enumerate() {
            let before = current.clone();
            match step {
                Step::Save { code_bytes } => {
                    let new = snapshot(seed as u32, code_bytes);
                    let medium = &mut RawSlots { dev: &mut disk, slot_sectors: SLOT_SECTORS };
                    let saved = save(medium, &ME, &new).expect("nothing is in the way");
                    prop_assert!(before.as_ref().is_none_or(|(generation, _)| saved.generation > *generation));
                    attempted.push(new.clone());
                    current = Some((saved.generation, new));
                    prop_assert_eq!(&reopen(&mut disk), &current);
                }
                Step::Cut { code_bytes, at, fault, unflushed } => {
                    let new = snapshot(seed as u32, code_bytes);
                    let mut faulty = FaultDisk::new(disk).with_fault(at, fault, unflushed);
                    let medium = &mut RawSlots { dev: &mut faulty, slot_sectors: SLOT_SECTORS };
                    let result = save(medium, &ME, &new);
                    disk = faulty.power_on();
                    attempted.push(new.clone());
                    let found = reopen(&mut disk);
                    match &found {
                        Some((_, snapshot)) if *snapshot == new => {}
                        _ => {
                            prop_assert!(result.is_err(), "a save that succeeded was lost");
                            prop_assert_eq!(&found, &before);
                        }
                    }
                    current = found;
                }
                Step::Flip { slot, at, bit } => {
                    disk.bytes_mut()[slot_at(slot) + at] ^= 1 << bit;
                    current = reopen(&mut disk);
                }
                Step::Garbage { slot, sector, byte } => {
                    let at = slot_at(slot) + sector * SECTOR_BYTES;
                    disk.bytes_mut()[at..at + SECTOR_BYTES].fill(byte);
                    current = reopen(&mut disk);
                }
            }
            if let Some((_, snapshot)) = &current {
                prop_assert!(attempted.contains(snapshot), "opened what nobody saved");
            }
        }
    }

    /// No bytes of a slot panic, whatever they claim; hashes are made right in half of the cases, so that all checks are reached.
    #[test]
    fn any_slot_is_answered(
        header in proptest::collection::vec(any::<u8>(), HEADER_BYTES),
        payload in proptest::collection::vec(any::<u8>(), 0..600),
        whole in any::<bool>(),
        flips in proptest::collection::vec((0usize..200, any::<u8>()), 0..4),
    ) {
        use sha2::{Digest, Sha256};
        let mut disk = MemoryDisk::new(vec![0; 2 * SLOT_SECTORS as usize * SECTOR_BYTES]);
        let mut sector = header;
        if whole {
            let good = snapshot_format::header::Header {
                generation: 3,
                committed: true,
                payload_bytes: payload.len() as u64,
                payload_sha256: Sha256::digest(&payload).into(),
                identity: ME,
                model_file: None,
            };
            sector = good.encode().to_vec();
            for (at, byte) in flips {
                sector[at] = byte;
            }
            let hash = Sha256::digest(&sector[..480]);
            sector[480..].copy_from_slice(&hash);
        }
        disk.bytes_mut()[..HEADER_BYTES].copy_from_slice(&sector);
        disk.bytes_mut()[HEADER_BYTES..][..payload.len()].copy_from_slice(&payload);
        let other = Identity { build_id: [1; 32], ..ME };
        for identity in [ME, other] {
            let medium = &mut RawSlots { dev: &mut disk, slot_sectors: SLOT_SECTORS };
            if let Err(cold) = open(medium, &identity) {
                prop_assert!(cold.to_string().len() > 20);
            }
        }
        let medium = &mut RawSlots { dev: &mut disk, slot_sectors: SLOT_SECTORS };
        let new = snapshot(1, 10);
        // A forged generation may be the last; anything else can be saved over.
        match save(medium, &ME, &new) {
            Ok(_) => prop_assert_eq!(reopen(&mut disk).map(|(_, snapshot)| snapshot), Some(new)),
            Err(error) => prop_assert!(matches!(error, snapshot_format::SaveError::LastGeneration { .. }), "{}", error),
        }
    }
}
