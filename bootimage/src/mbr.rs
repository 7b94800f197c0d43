//! The first MiB of the image: the partition table, and GRUB's BIOS half in front of the partition.
//!
//! Source: Microsoft FAT specification 1.03 for the BPB; the MBR layout of the IBM PC, entries at 446.

use crate::grub::Grub;
use crate::{PARTITION_OFFSET_BYTES, SERIAL};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

const SECTOR: u64 = 512;
/// Boot code ends where the disk signature begins.
const CODE_BYTES: usize = 440;
const ENTRY_AT: usize = 446;
/// FAT16 with LBA addressing.
const TYPE_FAT16_LBA: u8 = 0x0e;
/// EFI system partition: what UEFI firmware looks for on an MBR disk.
const TYPE_ESP: u8 = 0xef;
/// "Use the LBA fields": a CHS address beyond what CHS can say.
const CHS_BEYOND: [u8; 3] = [0xfe, 0xff, 0xff];

/// Writes sector 0 and, for a bootable image, GRUB's core behind it.
pub(crate) fn write(mut image: &File, volume_len_bytes: u64, grub: Option<&Grub>) -> io::Result<()> {
    let mut sector = [0u8; SECTOR as usize];
    if let Some(grub) = grub {
        sector[..CODE_BYTES].copy_from_slice(&grub.boot[..CODE_BYTES]);
    }
    sector[CODE_BYTES..CODE_BYTES + 4].copy_from_slice(&SERIAL.to_le_bytes());
    let sectors = |bytes: u64| {
        u32::try_from(bytes / SECTOR).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "volume beyond 2 TiB"))
    };
    let entry = &mut sector[ENTRY_AT..ENTRY_AT + 16];
    entry[0] = if grub.is_some() { 0x80 } else { 0 };
    entry[1..4].copy_from_slice(&CHS_BEYOND);
    entry[4] = if grub.is_some() { TYPE_ESP } else { TYPE_FAT16_LBA };
    entry[5..8].copy_from_slice(&CHS_BEYOND);
    entry[8..12].copy_from_slice(&sectors(PARTITION_OFFSET_BYTES)?.to_le_bytes());
    entry[12..16].copy_from_slice(&sectors(volume_len_bytes)?.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    image.seek(SeekFrom::Start(0))?;
    image.write_all(&sector)?;
    if let Some(grub) = grub {
        image.write_all(&grub.core)?;
    }
    Ok(())
}

/// Tells the volume where it begins (`BPB_HiddSec`); `fatfs` formats it as if nothing stood before it.
pub(crate) fn set_hidden_sectors(mut image: &File) -> io::Result<()> {
    const HIDDEN_SECTORS_AT: u64 = 28;
    image.seek(SeekFrom::Start(PARTITION_OFFSET_BYTES + HIDDEN_SECTORS_AT))?;
    image.write_all(&((PARTITION_OFFSET_BYTES / SECTOR) as u32).to_le_bytes())
}
