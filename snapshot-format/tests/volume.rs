//! The slots as files of a FAT16 volume that `fatfs` made: the same guarantees with a file system around them.

mod common;

use common::{ME, snapshot};
use snapshot_format::{DiskMedium, SaveError, Slot, SlotReason, open, save};
use std::io::{Cursor, Write};
use storage::fault::{Fault, FaultDisk, Unflushed};
use storage::{MemoryDisk, StorageError};

/// A volume with a configuration file and slot files of the given lengths.
fn volume(slots: &[(&str, usize)]) -> MemoryDisk {
    let mut image = vec![0; 3 << 20];
    let options = fatfs::FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat16).bytes_per_cluster(512);
    fatfs::format_volume(Cursor::new(&mut image), options).expect("format");
    {
        let volume = fatfs::FileSystem::new(Cursor::new(&mut image), fatfs::FsOptions::new()).expect("mount");
        volume.root_dir().create_file("BAREFLOW.CFG").unwrap().write_all(b"max_tokens=8\n").unwrap();
        for (name, len_bytes) in slots {
            volume.root_dir().create_file(name).unwrap().write_all(&vec![0; *len_bytes]).unwrap();
        }
    }
    MemoryDisk::new(image)
}

#[test]
fn snapshots_live_in_slot_files_and_nothing_else_changes() {
    let mut disk = volume(&[("SNAPA.BIN", 65_536), ("SNAPB.BIN", 65_536)]);
    let before = disk.bytes().to_vec();
    for seed in 1..=4 {
        let new = snapshot(seed, 9000);
        let saved = save(&mut DiskMedium::open(&mut disk).unwrap(), &ME, &new).unwrap();
        assert_eq!(saved.generation, u64::from(seed));
        let opened = open(&mut DiskMedium::open(&mut disk).unwrap(), &ME).unwrap();
        assert_eq!((opened.snapshot, opened.generation), (new, saved.generation));
    }
    let volume = storage::FatVolume::open(&mut disk).unwrap();
    let files = Slot::ALL.map(|slot| volume.find(&mut disk, slot.file_name()).unwrap());
    let in_slot =
        |sector: u64| files.iter().flat_map(|f| &f.extents).any(|e| (e.lba..e.lba + e.sectors).contains(&sector));
    for (sector, (old, new)) in before.chunks(512).zip(disk.bytes().chunks(512)).enumerate() {
        assert!(old == new || in_slot(sector as u64), "sector {sector} is outside the slots");
    }
}

#[test]
fn a_cut_on_the_volume_keeps_the_old_snapshot() {
    let mut disk = volume(&[("SNAPA.BIN", 16_384), ("SNAPB.BIN", 16_384)]);
    let (old, new) = (snapshot(1, 3000), snapshot(2, 3000));
    save(&mut DiskMedium::open(&mut disk).unwrap(), &ME, &old).unwrap();
    let mut whole = FaultDisk::new(disk.clone());
    save(&mut DiskMedium::open(&mut whole).unwrap(), &ME, &new).unwrap();
    for at in 0..whole.sector_writes() {
        for fault in [Fault::Cut, Fault::Tear { new_bytes: 200 }] {
            let mut cut = FaultDisk::new(disk.clone()).with_fault(at, fault, Unflushed::Some { seed: at });
            save(&mut DiskMedium::open(&mut cut).unwrap(), &ME, &new).unwrap_err();
            let mut after = cut.power_on();
            let opened = open(&mut DiskMedium::open(&mut after).unwrap(), &ME).unwrap();
            assert_eq!((opened.snapshot, opened.generation), (old.clone(), 1), "{fault:?} at write {at}");
        }
    }
}

#[test]
fn a_volume_without_slots_is_named() {
    let mut disk = volume(&[]);
    let cold = open(&mut DiskMedium::open(&mut disk).unwrap(), &ME).unwrap_err();
    assert_eq!((cold.reason(Slot::A), cold.reason(Slot::B)), (&SlotReason::NoFile, &SlotReason::NoFile));
    let error = save(&mut DiskMedium::open(&mut disk).unwrap(), &ME, &snapshot(1, 10)).unwrap_err();
    assert_eq!(error, SaveError::NoSlotFile { slot: Slot::A });
    let error = DiskMedium::open(&mut MemoryDisk::new(vec![0; 4096])).map(|_| ()).unwrap_err();
    assert_eq!(error, StorageError::NoBootSignature { lba: 0, found: [0, 0] });
}

#[test]
fn a_slot_with_a_damaged_chain_costs_itself_only() {
    let mut disk = volume(&[("SNAPA.BIN", 16_384), ("SNAPB.BIN", 16_384)]);
    let old = snapshot(1, 100);
    save(&mut DiskMedium::open(&mut disk).unwrap(), &ME, &old).unwrap();
    let entry = disk.bytes().windows(11).position(|w| w == b"SNAPB   BIN").unwrap();
    disk.bytes_mut()[entry + 26..entry + 28].copy_from_slice(&[0, 0]);
    let opened = open(&mut DiskMedium::open(&mut disk).unwrap(), &ME).unwrap();
    assert_eq!(opened.snapshot, old);
    match opened.passed_over {
        Some(SlotReason::Unreadable(StorageError::ClusterOutOfRange { cluster: 0, .. })) => {}
        other => panic!("{other:?}"),
    }
    match save(&mut DiskMedium::open(&mut disk).unwrap(), &ME, &old).unwrap_err() {
        SaveError::Write { slot: Slot::B, error: StorageError::ClusterOutOfRange { .. } } => {}
        other => panic!("{other:?}"),
    }
}
