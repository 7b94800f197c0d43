//! Volumes written by the `fatfs` crate, read by ours: geometry, names, chains, refusals and random damage.

use proptest::prelude::*;
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use storage::{
    BlockDevice, ByteSource, DeviceError, DirEntry, FatFile, FatKind, FatVolume, FileSource, MemoryDisk, RawDisk,
    SECTOR_BYTES, StorageError, write_in_place,
};

const MIB: usize = 1 << 20;

type Files<'a, 'b> = fatfs::Dir<'a, Cursor<&'b mut [u8]>>;

/// Formats `image` and fills it through `fill`.
fn format(image: &mut [u8], kind: fatfs::FatType, cluster_bytes: u32, fill: impl FnOnce(Files<'_, '_>)) {
    let options = fatfs::FormatVolumeOptions::new().fat_type(kind).bytes_per_cluster(cluster_bytes);
    fatfs::format_volume(Cursor::new(&mut *image), options).expect("format");
    let volume = fatfs::FileSystem::new(Cursor::new(image), fatfs::FsOptions::new()).expect("mount");
    fill(volume.root_dir());
}

fn fat16(len_bytes: usize, cluster_bytes: u32, fill: impl FnOnce(Files<'_, '_>)) -> Vec<u8> {
    let mut image = vec![0; len_bytes];
    format(&mut image, fatfs::FatType::Fat16, cluster_bytes, fill);
    image
}

/// The same volume behind a partition table at `lba`, in table entry `slot`.
fn partitioned(volume: &[u8], kind: u8, slot: usize, lba: u32) -> Vec<u8> {
    let mut disk = vec![0; lba as usize * SECTOR_BYTES];
    disk.extend_from_slice(volume);
    let entry = &mut disk[446 + 16 * slot..][..16];
    entry[0] = 0x80;
    entry[4] = kind;
    entry[8..12].copy_from_slice(&lba.to_le_bytes());
    entry[12..16].copy_from_slice(&((volume.len() / SECTOR_BYTES) as u32).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// Bytes that differ at every offset a test could confuse.
fn pattern(len_bytes: usize, salt: u32) -> Vec<u8> {
    (0..len_bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(salt) >> 13) as u8).collect()
}

fn put(dir: &Files<'_, '_>, path: &str, bytes: &[u8]) {
    dir.create_file(path).expect("create").write_all(bytes).expect("write");
}

fn read(disk: &mut dyn BlockDevice, path: &str) -> Result<Vec<u8>, StorageError> {
    let file = FatVolume::open(disk)?.find(disk, path)?;
    let mut bytes = vec![0; file.len_bytes as usize];
    FileSource::new(disk, &file).read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Two files written in turns, so that both are in many pieces.
fn fragment(dir: &Files<'_, '_>, a: &[u8], b: &[u8], piece_bytes: usize) {
    let (mut file_a, mut file_b) = (dir.create_file("A.BIN").unwrap(), dir.create_file("B.BIN").unwrap());
    let (mut pieces_a, mut pieces_b) = (a.chunks(piece_bytes), b.chunks(piece_bytes));
    loop {
        match (pieces_a.next(), pieces_b.next()) {
            (None, None) => return,
            (piece_a, piece_b) => {
                file_a.write_all(piece_a.unwrap_or_default()).unwrap();
                file_a.flush().unwrap();
                file_b.write_all(piece_b.unwrap_or_default()).unwrap();
                file_b.flush().unwrap();
            }
        }
    }
}

/// Counts requests and notes their sizes.
struct Counting {
    disk: MemoryDisk,
    reads: Vec<usize>,
    writes: Vec<(u64, usize)>,
}

impl Counting {
    fn new(image: Vec<u8>) -> Self {
        Self { disk: MemoryDisk::new(image), reads: Vec::new(), writes: Vec::new() }
    }
}

impl BlockDevice for Counting {
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }
    fn read_only(&self) -> bool {
        self.disk.read_only()
    }
    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.reads.push(buf.len());
        self.disk.read(lba, buf)
    }
    fn write(&mut self, lba: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.writes.push((lba, buf.len()));
        self.disk.write(lba, buf)
    }
    fn flush(&mut self) -> Result<(), DeviceError> {
        self.disk.flush()
    }
}

#[test]
fn a_bare_volume_and_every_accepted_partition_type_hold_the_same_files() {
    let bytes = pattern(100_001, 1);
    let volume = fat16(4 * MIB, 512, |root| put(&root, "MODEL.BIN", &bytes));
    assert_eq!(read(&mut MemoryDisk::new(volume.clone()), "MODEL.BIN").unwrap(), bytes);
    for kind in [0x04, 0x06, 0x0e, 0xef] {
        for slot in 0..4 {
            let mut disk = MemoryDisk::new(partitioned(&volume, kind, slot, 63));
            assert_eq!(read(&mut disk, "model.bin").unwrap(), bytes, "type {kind:#x} in entry {slot}");
        }
    }
}

#[test]
fn a_partition_that_is_not_fat16_is_passed_over_for_one_that_is() {
    let volume = fat16(4 * MIB, 512, |root| put(&root, "HERE", b"yes"));
    let mut efi = vec![0; 2 * MIB];
    format(&mut efi, fatfs::FatType::Fat12, 2048, |_| ());
    let mut disk = partitioned(&efi, 0xef, 0, 64);
    let second_lba = (disk.len() / SECTOR_BYTES) as u32;
    disk.extend_from_slice(&volume);
    disk[446 + 16 + 4] = 0x0e;
    disk[446 + 16 + 8..][..4].copy_from_slice(&second_lba.to_le_bytes());
    assert_eq!(read(&mut MemoryDisk::new(disk.clone()), "here").unwrap(), b"yes");
    // With the second gone, the first candidate's refusal is the answer.
    disk[446 + 16 + 4] = 0x83;
    let error = FatVolume::open(&mut MemoryDisk::new(disk)).unwrap_err();
    assert!(matches!(error, StorageError::NotFat16 { lba: 64, found: FatKind::Fat12, .. }), "{error}");
}

#[test]
fn disks_without_a_fat16_volume_are_refused_by_cause() {
    let open = |image: Vec<u8>| FatVolume::open(&mut MemoryDisk::new(image)).unwrap_err();
    assert_eq!(open(vec![0; 4096]), StorageError::NoBootSignature { lba: 0, found: [0, 0] });
    assert_eq!(
        open(Vec::new()),
        StorageError::Device(DeviceError::OutOfRange { lba: 0, sectors: 1, device_sectors: 0 })
    );
    let volume = fat16(4 * MIB, 512, |_| ());
    assert_eq!(open(partitioned(&volume, 0x83, 1, 63)), StorageError::NoFat16Partition { types: [0, 0x83, 0, 0] });
    let mut image = vec![0; MIB];
    format(&mut image, fatfs::FatType::Fat12, 512, |_| ());
    let error = open(image);
    assert!(matches!(error, StorageError::NotFat16 { lba: 0, found: FatKind::Fat12, clusters: 2000..2048 }), "{error}");
    let mut image = vec![0; 36 * MIB];
    format(&mut image, fatfs::FatType::Fat32, 512, |_| ());
    let error = open(image);
    assert!(matches!(error, StorageError::NotFat16 { lba: 0, found: FatKind::Fat32, clusters: 65_525.. }), "{error}");
    assert!(error.to_string().contains("mkfs.fat -F 16"), "{error}");
    let mut truncated = fat16(4 * MIB, 512, |_| ());
    truncated.truncate(3 * MIB);
    assert_eq!(open(truncated), StorageError::VolumeTruncated { lba: 0, volume_sectors: 8192, device_sectors: 6144 });
    // A partition whose first sector is past the end of the disk.
    let mut disk = partitioned(&volume, 0x06, 0, 63);
    disk.truncate(512);
    assert_eq!(open(disk), StorageError::Device(DeviceError::OutOfRange { lba: 63, sectors: 1, device_sectors: 1 }));
}

#[test]
fn boot_sector_fields_out_of_range_are_named() {
    let volume = fat16(4 * MIB, 512, |_| ());
    for (at, bytes, field) in [
        (11, [0, 2 * 2], "bytes per sector"),
        (13, [3, 1], "sectors per cluster"),
        (13, [0, 1], "sectors per cluster"),
        (14, [0, 0], "reserved sectors"),
        (16, [0, 0], "allocation tables"),
        (16, [3, 0], "allocation tables"),
        (17, [0, 0], "root entries"),
        (19, [2, 0], "total sectors"),
        (22, [1, 0], "sectors per allocation table"),
    ] {
        let mut image = volume.clone();
        image[at..at + 2].copy_from_slice(&bytes);
        match FatVolume::open(&mut MemoryDisk::new(image)) {
            Err(StorageError::BadBootSector { lba: 0, field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}

#[test]
fn names_match_without_case_and_by_their_short_alias() {
    let image = fat16(4 * MIB, 512, |root| {
        put(&root, "BAREFLOW.CFG", b"cfg");
        put(&root, "A long file name.gguf", b"long");
        put(&root, "NOEXT", b"plain");
        let boot = root.create_dir("BOOT").unwrap();
        let deep = boot.create_dir("DEEP").unwrap();
        put(&deep, "X.Y", b"deep");
        root.create_file("GONE.TXT").unwrap();
        root.remove("GONE.TXT").unwrap();
    });
    let disk = &mut MemoryDisk::new(image);
    let cases: [(&str, &[u8]); 7] = [
        ("BAREFLOW.CFG", b"cfg"),
        ("/bareflow.cfg", b"cfg"),
        ("ALONGF~1.GGU", b"long"),
        ("noext", b"plain"),
        ("NOEXT.", b"plain"),
        ("boot/deep/x.y", b"deep"),
        ("//BOOT//DEEP/X.Y", b"deep"),
    ];
    for (path, bytes) in cases {
        assert_eq!(read(disk, path).as_deref(), Ok(bytes), "{path}");
    }
    let path = |path: &str| path.to_string();
    for (asked, error) in [
        ("GONE.TXT", StorageError::NotFound { path: path("GONE.TXT") }),
        ("boot/none/x.y", StorageError::NotFound { path: path("boot/none") }),
        ("BAREFLOW.CFG/X", StorageError::NotADirectory { path: path("BAREFLOW.CFG") }),
        ("BOOT", StorageError::IsADirectory { path: path("BOOT") }),
        ("", StorageError::IsADirectory { path: path("") }),
        ("/", StorageError::IsADirectory { path: path("/") }),
        ("A long file name.gguf", StorageError::BadPath { path: path("A long file name.gguf") }),
        ("..", StorageError::BadPath { path: path("..") }),
        ("BOOT/../NOEXT", StorageError::BadPath { path: path("BOOT/../NOEXT") }),
        ("NINECHARS", StorageError::BadPath { path: path("NINECHARS") }),
        ("A.LONG", StorageError::BadPath { path: path("A.LONG") }),
        ("A.B.C", StorageError::BadPath { path: path("A.B.C") }),
        ("naïve", StorageError::BadPath { path: path("naïve") }),
    ] {
        assert_eq!(read(disk, asked), Err(error), "{asked}");
    }
    let volume = FatVolume::open(disk).unwrap();
    let shown = |entries: &[DirEntry]| -> Vec<(String, u64, bool)> {
        entries.iter().map(|entry| (entry.name.clone(), entry.len_bytes, entry.is_dir)).collect()
    };
    let expected = [("BAREFLOW.CFG", 3, false), ("ALONGF~1.GGU", 4, false), ("NOEXT", 5, false), ("BOOT", 0, true)];
    let root = volume.list(disk, "").unwrap();
    assert_eq!(shown(&root), expected.map(|(name, len_bytes, is_dir)| (name.to_string(), len_bytes, is_dir)));
    assert_eq!(volume.open_entry(&root[2]).unwrap(), volume.find(disk, "NOEXT").unwrap());
    assert_eq!(volume.open_entry(&root[3]), Err(StorageError::IsADirectory { path: path("BOOT") }));
    assert_eq!(volume.list_in(disk, &root[3]).unwrap(), volume.list(disk, "BOOT").unwrap());
    assert_eq!(volume.list_in(disk, &root[2]), Err(StorageError::NotADirectory { path: path("NOEXT") }));
    assert_eq!(shown(&volume.list(disk, "Boot/Deep/").unwrap()), [("X.Y".to_string(), 4, false)]);
    assert_eq!(volume.list(disk, "NOEXT").unwrap_err(), StorageError::NotADirectory { path: path("NOEXT") });
}

#[test]
fn a_directory_of_many_clusters_is_searched_to_its_end() {
    let image = fat16(8 * MIB, 512, |root| {
        let dir = root.create_dir("MANY").unwrap();
        for i in 0..700 {
            put(&dir, &format!("F{i}.BIN"), &pattern(i, i as u32));
        }
    });
    let disk = &mut MemoryDisk::new(image);
    for i in [0, 1, 350, 699] {
        assert_eq!(read(disk, &format!("MANY/F{i}.BIN")).unwrap(), pattern(i, i as u32), "file {i}");
    }
    assert_eq!(FatVolume::open(disk).unwrap().list(disk, "MANY").unwrap().len(), 700);
}

#[test]
fn fragmented_files_are_read_whole_and_at_every_offset() {
    let (a, b) = (pattern(300_000, 7), pattern(123_457, 8));
    let image = fat16(5 * MIB, 1024, |root| fragment(&root, &a, &b, 3000));
    let disk = &mut MemoryDisk::new(image);
    let volume = FatVolume::open(disk).unwrap();
    for (path, bytes) in [("A.BIN", &a), ("B.BIN", &b)] {
        let file = volume.find(disk, path).unwrap();
        assert!(!file.is_contiguous() && file.extents.len() > 20, "{} extents", file.extents.len());
        let sectors: u64 = file.extents.iter().map(|e| e.sectors).sum();
        assert_eq!(sectors, file.len_bytes.div_ceil(512));
        let mut source = FileSource::new(disk, &file);
        assert_eq!(source.len_bytes(), bytes.len() as u64);
        for (offset, len) in [(0, 1), (511, 2), (1023, 70_000), (1, 100_000), (65_536, 512), (120_000, 3_457)] {
            let mut buf = vec![0; len];
            source.read_at(offset as u64, &mut buf).unwrap();
            assert_eq!(buf, bytes[offset..offset + len], "{path} read at {offset}+{len}");
            let mut streamed = Vec::new();
            source.stream(offset as u64, len as u64, &mut |chunk| streamed.extend_from_slice(chunk)).unwrap();
            assert_eq!(streamed, bytes[offset..offset + len], "{path} stream at {offset}+{len}");
        }
        let end = bytes.len() as u64;
        for (offset, len_bytes) in [(end, 1), (end - 1, 2), (u64::MAX, 1)] {
            let error = StorageError::BeyondEnd { offset, len_bytes, file_bytes: end };
            assert_eq!(source.read_at(offset, &mut vec![0; len_bytes as usize]), Err(error.clone()));
            assert_eq!(source.stream(offset, len_bytes, &mut |_| panic!("no data")), Err(error));
        }
        source.read_at(end, &mut []).unwrap();
        source.stream(end, 0, &mut |_| panic!("no data")).unwrap();
    }
}

#[test]
fn an_empty_file_has_no_extents() {
    let image = fat16(4 * MIB, 512, |root| put(&root, "EMPTY", b""));
    let disk = &mut MemoryDisk::new(image);
    let file = FatVolume::open(disk).unwrap().find(disk, "EMPTY").unwrap();
    assert_eq!(file, FatFile { len_bytes: 0, extents: Vec::new() });
    FileSource::new(disk, &file).stream(0, 0, &mut |_| panic!("no data")).unwrap();
}

#[test]
fn reads_are_large() {
    let bytes = pattern(3 * MIB + 77, 3);
    let image = fat16(12 * MIB, 2048, |root| put(&root, "MODEL.BIN", &bytes));
    let mut disk = Counting::new(image);
    let file = FatVolume::open(&mut disk).unwrap().find(&mut disk, "MODEL.BIN").unwrap();
    assert!(file.is_contiguous());
    assert!(disk.reads.len() <= 4, "opening and finding took {} requests", disk.reads.len());
    disk.reads.clear();
    let mut streamed = Vec::new();
    FileSource::new(&mut disk, &file)
        .stream(0, file.len_bytes, &mut |chunk| streamed.extend_from_slice(chunk))
        .unwrap();
    assert_eq!(streamed, bytes);
    assert_eq!(disk.reads, [MIB, MIB, MIB, 512]);
    disk.reads.clear();
    let mut whole = vec![0; bytes.len()];
    FileSource::new(&mut disk, &file).read_at(0, &mut whole).unwrap();
    assert_eq!(whole, bytes);
    assert_eq!(disk.reads, [MIB, MIB, MIB, 512]);
    disk.reads.clear();
    // A parser that takes 13 bytes at a time costs one request for 64 KiB.
    let mut source = FileSource::new(&mut disk, &file);
    for (i, expected) in bytes[..130_000].chunks(13).enumerate() {
        let mut buf = vec![0; expected.len()];
        source.read_at(i as u64 * 13, &mut buf).unwrap();
        assert_eq!(buf, expected);
    }
    assert_eq!(disk.reads, [65_536, 65_536]);
}

#[test]
fn a_raw_disk_is_read_at_any_offset() {
    let bytes = pattern(200_000, 9);
    let mut disk = MemoryDisk::new(bytes.clone());
    let mut source = RawDisk::new(&mut disk);
    assert_eq!(source.len_bytes(), 200_192);
    let mut buf = vec![0; 150_001];
    source.read_at(999, &mut buf).unwrap();
    assert_eq!(buf, bytes[999..][..150_001]);
    let mut streamed = Vec::new();
    source.stream(513, 100_000, &mut |chunk| streamed.extend_from_slice(chunk)).unwrap();
    assert_eq!(streamed, bytes[513..][..100_000]);
}

#[test]
fn writing_in_place_changes_these_bytes_and_nothing_else() {
    let (a, b) = (pattern(20_000, 1), pattern(20_000, 2));
    let image = fat16(4 * MIB, 512, |root| fragment(&root, &a, &b, 1500));
    let mut disk = Counting::new(image.clone());
    let file = FatVolume::open(&mut disk).unwrap().find(&mut disk, "A.BIN").unwrap();
    for (offset, len) in [(0usize, 512usize), (5, 9000), (511, 2), (1000, 24), (12_288, 7_712), (19_999, 1), (0, 0)] {
        let (new, before) = (pattern(len, 99), disk.disk.bytes().to_vec());
        disk.writes.clear();
        write_in_place(&mut disk, &file, offset as u64, &new).unwrap();
        let mut expected = a.clone();
        expected[offset..offset + len].copy_from_slice(&new);
        assert_eq!(read(&mut disk.disk, "A.BIN").unwrap(), expected, "{offset}+{len}");
        assert_eq!(read(&mut disk.disk, "B.BIN").unwrap(), b);
        let touched = (offset + len).div_ceil(512) - offset / 512;
        let written: usize = disk.writes.iter().map(|(_, bytes)| bytes / 512).sum();
        assert_eq!(written, if len == 0 { 0 } else { touched }, "each touched sector is written once");
        let inside = |sector: u64| file.extents.iter().any(|e| (e.lba..e.lba + e.sectors).contains(&sector));
        for (i, (old, new)) in before.chunks(512).zip(disk.disk.bytes().chunks(512)).enumerate() {
            assert!(old == new || inside(i as u64), "sector {i} is not the file's");
        }
        disk.disk.bytes_mut().copy_from_slice(&image);
    }
    let error = write_in_place(&mut disk, &file, 19_999, &[0; 2]).unwrap_err();
    assert_eq!(error, StorageError::BeyondEnd { offset: 19_999, len_bytes: 2, file_bytes: 20_000 });
    let mut read_only = MemoryDisk::new(image).with_read_only(true);
    let error = write_in_place(&mut read_only, &file, 0, &[0; 512]).unwrap_err();
    assert_eq!(error, StorageError::Device(DeviceError::ReadOnly { lba: file.extents[0].lba }));
}

#[test]
fn what_we_write_in_place_fatfs_reads() {
    let new = pattern(4096, 5);
    let image = fat16(4 * MIB, 512, |root| put(&root, "SNAPA.BIN", &[0; 8192]));
    let disk = &mut MemoryDisk::new(image);
    let file = FatVolume::open(disk).unwrap().find(disk, "SNAPA.BIN").unwrap();
    write_in_place(disk, &file, 512, &new).unwrap();
    let volume = fatfs::FileSystem::new(Cursor::new(disk.bytes_mut()), fatfs::FsOptions::new()).unwrap();
    let mut read = vec![0; 4096];
    let mut file = volume.root_dir().open_file("SNAPA.BIN").unwrap();
    file.seek(SeekFrom::Start(512)).unwrap();
    file.read_exact(&mut read).unwrap();
    assert_eq!(read, new);
}

/// A volume with one file of `clusters` clusters of 512 bytes, and the offset of its first table entry.
fn chained(clusters: usize) -> (Vec<u8>, usize, u16) {
    let image = fat16(4 * MIB, 512, |root| put(&root, "F.BIN", &pattern(clusters * 512, 1)));
    let root_at = 512
        * (u16::from_le_bytes([image[14], image[15]]) as usize
            + usize::from(image[16]) * u16::from_le_bytes([image[22], image[23]]) as usize);
    let entry = (0..).map(|i| root_at + 32 * i).find(|&at| &image[at..at + 11] == b"F       BIN").unwrap();
    let first = u16::from_le_bytes([image[entry + 26], image[entry + 27]]);
    let table = 512 * u16::from_le_bytes([image[14], image[15]]) as usize;
    (image, table, first)
}

#[test]
fn damaged_chains_are_refused_by_cause() {
    let (image, table, first) = chained(8);
    let path = || "F.BIN".to_string();
    let with = |link: u16, value: u16| {
        let mut image = image.clone();
        let at = table + 2 * usize::from(link);
        image[at..at + 2].copy_from_slice(&value.to_le_bytes());
        let disk = &mut MemoryDisk::new(image);
        FatVolume::open(disk).unwrap().find(disk, "F.BIN")
    };
    let whole = with(first + 7, 0xffff).unwrap();
    assert_eq!(whole.extents.len(), 1);
    assert_eq!(with(first + 7, 0xfff8).unwrap(), whole, "every end mark is an end");
    for target in [first, first + 3, first + 7] {
        let error = StorageError::ChainLoop { path: path(), cluster: target };
        assert_eq!(with(first + 7, target).unwrap_err(), error);
    }
    assert_eq!(with(first + 1, first).unwrap_err(), StorageError::ChainLoop { path: path(), cluster: first });
    for cluster in [0, 1, 0xfff7, 0xfff0, 0xf000] {
        match with(first + 2, cluster).unwrap_err() {
            StorageError::ClusterOutOfRange { cluster: found, last, .. } => {
                assert_eq!(found, cluster);
                assert!((4086..8192).contains(&last), "{last}");
            }
            other => panic!("{other}"),
        }
    }
    let error = StorageError::ChainTooShort { path: path(), len_bytes: 4096, chain_bytes: 1536 };
    assert_eq!(with(first + 2, 0xffff).unwrap_err(), error);
    // A chain longer than the file is preallocation, not damage.
    let (mut long, ..) = chained(8);
    let entry = long.windows(11).position(|w| w == b"F       BIN").unwrap();
    long[entry + 28..entry + 32].copy_from_slice(&700u32.to_le_bytes());
    let disk = &mut MemoryDisk::new(long);
    let file = FatVolume::open(disk).unwrap().find(disk, "F.BIN").unwrap();
    assert_eq!((file.len_bytes, file.extents[0].sectors), (700, 2));
}

#[test]
fn a_looping_directory_is_refused() {
    let image = fat16(4 * MIB, 512, |root| put(&root.create_dir("DIR").unwrap(), "F.BIN", b"x"));
    let disk = &mut MemoryDisk::new(image);
    let sector = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let table = 512 * usize::from(sector(disk.bytes(), 14));
    let entry = disk.bytes().windows(11).position(|w| w == b"DIR        ").unwrap();
    let cluster = sector(disk.bytes(), entry + 26);
    let at = table + 2 * usize::from(cluster);
    disk.bytes_mut()[at..at + 2].copy_from_slice(&cluster.to_le_bytes());
    let volume = FatVolume::open(disk).unwrap();
    let error = StorageError::ChainLoop { path: "DIR".into(), cluster };
    assert_eq!(volume.find(disk, "DIR/F.BIN").unwrap_err(), error);
    assert_eq!(volume.list(disk, "DIR").unwrap_err(), error);
}

/// Everything a boot does with a volume; what it finds must lie inside the disk.
fn explore(disk: &mut Counting) -> Result<(), StorageError> {
    let device_sectors = disk.len_bytes() / SECTOR_BYTES as u64;
    let volume = FatVolume::open(disk)?;
    for dir in ["", "DIR", "DIR/SUB"] {
        let Ok(entries) = volume.list(disk, dir) else { continue };
        for entry in entries.iter().take(64) {
            let Ok(file) = volume.find(disk, &format!("{dir}/{}", entry.name)) else { continue };
            let sectors: u64 = file.extents.iter().map(|e| e.sectors).sum();
            assert_eq!(sectors, file.len_bytes.div_ceil(SECTOR_BYTES as u64));
            assert!(file.extents.iter().all(|e| e.lba > 0 && e.lba + e.sectors <= device_sectors));
            let mut streamed = 0;
            FileSource::new(disk, &file).stream(0, file.len_bytes, &mut |chunk| streamed += chunk.len() as u64)?;
            assert_eq!(streamed, file.len_bytes);
        }
    }
    Ok(())
}

fn busy_image() -> Vec<u8> {
    static IMAGE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let fill = |root: Files<'_, '_>| {
        fragment(&root, &pattern(20_000, 1), &pattern(30_000, 2), 1000);
        let dir = root.create_dir("DIR").unwrap();
        put(&dir, "A rather long name.text", b"long");
        put(&dir.create_dir("SUB").unwrap(), "C.BIN", &pattern(5000, 3));
    };
    IMAGE.get_or_init(|| partitioned(&fat16(3 * MIB, 512, fill), 0x0e, 0, 8)).clone()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_damage_panics_or_loops(
        damage in proptest::collection::vec((0usize..120_000, any::<u8>()), 1..40),
        keep in 0usize..8192,
    ) {
        let mut image = busy_image();
        for (at, byte) in damage {
            // Half of it in the structures that steer the reader: boot sectors, table, directories.
            let at = if byte % 2 == 0 { at % 42_000 } else { at };
            image[at] = byte;
        }
        if keep < 6000 {
            image.truncate(keep * SECTOR_BYTES);
        }
        let mut disk = Counting::new(image);
        // Any refusal is right; reading on from damage is bounded by what the volume can hold.
        let _ = explore(&mut disk);
        prop_assert!(disk.reads.len() < 100_000, "{} requests", disk.reads.len());
        prop_assert!(disk.reads.iter().all(|&bytes| bytes <= MIB));
        prop_assert!(disk.writes.is_empty());
    }

    #[test]
    fn any_boot_sector_is_answered(sector in proptest::collection::vec(any::<u8>(), 512), bare in any::<bool>()) {
        let mut image = busy_image();
        image[..512].copy_from_slice(&sector);
        image[510..512].copy_from_slice(&[0x55, 0xaa]);
        if bare {
            (image[0], image[11], image[12], image[21]) = (0xeb, 0, 2, 0xf8);
            image[13] = 1 << (image[13] & 7);
        }
        let mut disk = Counting::new(image);
        let _ = explore(&mut disk);
        prop_assert!(disk.reads.len() < 100_000, "{} requests", disk.reads.len());
    }

    #[test]
    fn any_read_of_a_fragmented_file_is_the_files_bytes(
        offset in 0usize..30_000, len in 0usize..30_000, window in 0usize..30_000,
    ) {
        let bytes = pattern(30_000, 2);
        let len = len.min(bytes.len() - offset);
        let mut disk = MemoryDisk::new(busy_image());
        let file = FatVolume::open(&mut disk).unwrap().find(&mut disk, "B.BIN").unwrap();
        let mut source = FileSource::new(&mut disk, &file);
        // Leaves a read-ahead window somewhere first.
        source.read_at(window as u64, &mut [0; 1][..usize::from(window < bytes.len())]).unwrap();
        let mut buf = vec![0; len];
        source.read_at(offset as u64, &mut buf).unwrap();
        prop_assert_eq!(&buf, &bytes[offset..offset + len]);
        let mut streamed = Vec::new();
        source.stream(offset as u64, len as u64, &mut |chunk| streamed.extend_from_slice(chunk)).unwrap();
        prop_assert_eq!(&streamed, &bytes[offset..offset + len]);
    }
}

#[test]
fn an_undamaged_busy_image_is_explored_without_error() {
    assert_eq!(explore(&mut Counting::new(busy_image())), Ok(()));
}
