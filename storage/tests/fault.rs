//! The fault-injecting disk does exactly what it promises: the snapshot tests stand on it.

use storage::fault::{FAULT_STATUS, Fault, FaultDisk, Unflushed};
use storage::{BlockDevice, DeviceError, MemoryDisk};

const OLD: u8 = 0x11;
const NEW: u8 = 0x22;

fn disk() -> FaultDisk {
    FaultDisk::new(MemoryDisk::new(vec![OLD; 8 * 512]))
}

fn failed(lba: u64, sectors: u64) -> DeviceError {
    DeviceError::Failed { lba, sectors, status: FAULT_STATUS }
}

/// First byte of every sector.
fn sectors(disk: FaultDisk) -> Vec<u8> {
    disk.power_on().bytes().chunks(512).map(|sector| sector[0]).collect()
}

#[test]
fn flushed_writes_survive_a_cut_and_others_by_plan() {
    for (unflushed, third) in [(Unflushed::Kept, NEW), (Unflushed::Dropped, OLD)] {
        let mut disk = disk().with_fault(4, Fault::Cut, unflushed);
        disk.write(0, &[NEW; 2 * 512]).unwrap();
        disk.flush().unwrap();
        disk.write(2, &[NEW; 512]).unwrap();
        assert_eq!(disk.write(3, &[NEW; 3 * 512]), Err(failed(4, 1)));
        assert!(!disk.is_powered());
        assert_eq!(disk.read(0, &mut [0; 512]), Err(failed(0, 1)));
        assert_eq!(disk.write(0, &[0; 512]), Err(failed(0, 1)));
        assert!(disk.flush().is_err());
        assert_eq!((disk.sector_writes(), disk.flushes()), (5, 1));
        assert_eq!(sectors(disk), [NEW, NEW, third, third, OLD, OLD, OLD, OLD]);
    }
}

#[test]
fn some_unflushed_writes_survive_by_seed() {
    let outcomes: std::collections::BTreeSet<Vec<u8>> = (0..64)
        .map(|seed| {
            let mut disk = disk().with_fault(7, Fault::Cut, Unflushed::Some { seed: seed * 2 + 1 });
            disk.write(0, &[NEW; 8 * 512]).unwrap_err();
            sectors(disk)
        })
        .collect();
    assert!(outcomes.len() > 20, "{} different outcomes", outcomes.len());
}

#[test]
fn a_torn_sector_is_new_then_old() {
    let mut disk = disk().with_fault(1, Fault::Tear { new_bytes: 100 }, Unflushed::Dropped);
    assert_eq!(disk.write(5, &[NEW; 2 * 512]), Err(failed(6, 1)));
    let medium = disk.power_on();
    let torn = &medium.bytes()[6 * 512..7 * 512];
    assert!(torn[..100].iter().all(|&b| b == NEW) && torn[100..].iter().all(|&b| b == OLD));
    assert!(medium.bytes()[5 * 512..6 * 512].iter().all(|&b| b == OLD), "the write before it was dropped");
}

#[test]
fn a_failed_sector_leaves_a_working_device() {
    let mut disk = disk().with_fault(1, Fault::Fail, Unflushed::Dropped);
    assert_eq!(disk.write(0, &[NEW; 3 * 512]), Err(failed(1, 1)));
    disk.write(4, &[NEW; 512]).unwrap();
    disk.flush().unwrap();
    assert_eq!(sectors(disk), [NEW, OLD, OLD, OLD, NEW, OLD, OLD, OLD]);
}

#[test]
fn reads_see_the_cache_and_planned_read_errors() {
    let mut disk = disk().with_failing_read(6);
    disk.write(1, &[NEW; 512]).unwrap();
    let mut buf = [0; 3 * 512];
    disk.read(0, &mut buf).unwrap();
    assert_eq!((buf[0], buf[512], buf[1024]), (OLD, NEW, OLD));
    assert_eq!(disk.read(5, &mut buf), Err(failed(5, 3)));
    assert_eq!(disk.read(7, &mut buf), Err(DeviceError::OutOfRange { lba: 7, sectors: 3, device_sectors: 8 }));
}

#[test]
fn devices_refuse_transfers_they_cannot_make() {
    let mut plain = MemoryDisk::new(vec![OLD; 1000]);
    assert_eq!(plain.len_bytes(), 1024);
    assert_eq!(plain.read(0, &mut [0; 100]), Err(DeviceError::Unaligned { len_bytes: 100 }));
    let beyond = DeviceError::OutOfRange { lba: u64::MAX, sectors: 1, device_sectors: 2 };
    assert_eq!(plain.write(u64::MAX, &[0; 512]), Err(beyond));
    assert_eq!(plain.stream(u64::MAX, 512, &mut |_| panic!("no data")), Err(beyond));
    assert_eq!(plain.stream(0, 511, &mut |_| panic!("no data")), Err(DeviceError::Unaligned { len_bytes: 511 }));
    let mut read_only = FaultDisk::new(plain.with_read_only(true));
    assert_eq!(read_only.write(1, &[0; 512]), Err(DeviceError::ReadOnly { lba: 1 }));
}
