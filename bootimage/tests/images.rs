//! Images are built for real and read back by three readers: `fatfs`, this crate (the guest's reader), and GRUB under QEMU
//! in the project's scenarios.

use bootimage::{
    DEFAULT_SLOT_MIB, FileSpec, ImageError, ImageSpec, PARTITION_OFFSET_BYTES, SLOT_NAMES, build, list, read_file,
};
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

/// A directory with a file that passes for a kernel.
struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let fixture = Self { directory };
        fixture.write("kernel.elf", &pattern(b"\x7fELF\x02", 300_001));
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn spec(&self) -> ImageSpec {
        ImageSpec { config: "prompt=\"a b\"\n".into(), slot_mib: 1, ..ImageSpec::new(self.path("kernel.elf")) }
    }
}

fn pattern(head: &[u8], len: usize) -> Vec<u8> {
    let body = (head.len()..len).map(|i| ((i * 31) >> 3) as u8);
    head.iter().copied().chain(body).collect()
}

/// Mounts the volume with `fatfs` and reads one file.
fn read_with_fatfs(image: &Path, name: &str) -> Vec<u8> {
    let mut bytes = std::fs::read(image).unwrap();
    let volume = bytes.split_off(PARTITION_OFFSET_BYTES as usize);
    let volume = fatfs::FileSystem::new(Cursor::new(volume), fatfs::FsOptions::new()).unwrap();
    assert_eq!(volume.fat_type(), fatfs::FatType::Fat16);
    let mut out = Vec::new();
    volume.root_dir().open_file(name).unwrap().read_to_end(&mut out).unwrap();
    out
}

#[test]
fn files_read_back_by_both_readers_and_slots_are_in_one_piece() {
    let fixture = Fixture::new();
    let model = pattern(b"GGUF", 3_000_000);
    let mut spec = fixture.spec();
    spec.files = vec![FileSpec { name: "MODEL.GGU".into(), path: fixture.write("model", &model) }];
    let image = fixture.path("disk.img");
    let entries = build(&spec, &image).unwrap();
    assert_eq!(list(&image).unwrap(), entries);
    let names: Vec<&str> = entries.iter().map(|e| e.path.as_str()).collect();
    assert_eq!(names, ["BAREFLOW.CFG", "KERNEL.ELF", "MODEL.GGU", "REPORT.TXT", "SNAPA.BIN", "SNAPB.BIN"]);

    let kernel = std::fs::read(fixture.path("kernel.elf")).unwrap();
    for (name, content) in [
        ("KERNEL.ELF", kernel),
        ("MODEL.GGU", model),
        ("BAREFLOW.CFG", spec.config.clone().into_bytes()),
        ("SNAPA.BIN", vec![0; 1 << 20]),
        ("SNAPB.BIN", vec![0; 1 << 20]),
    ] {
        assert_eq!(read_with_fatfs(&image, name), content, "{name} by fatfs");
        assert_eq!(read_file(&image, name).unwrap(), content, "{name} by storage");
    }
    // The bytes of a slot are where the listing says, so a save in place can be seen by every reader.
    for name in SLOT_NAMES {
        let offset = entries.iter().find(|e| e.path == name).unwrap().offset_bytes().unwrap();
        let mut bytes = std::fs::read(&image).unwrap();
        bytes[offset as usize..][..4].copy_from_slice(b"SNAP");
        std::fs::write(&image, bytes).unwrap();
        assert_eq!(&read_with_fatfs(&image, name)[..5], b"SNAP\0", "{name}");
    }
    let report = read_with_fatfs(&image, "REPORT.TXT");
    assert_eq!(report.len(), bootimage::REPORT_LEN_BYTES);
    assert!(report.starts_with(b"No boot has written"));
}

#[test]
fn the_partition_table_is_that_of_a_plain_fat16_disk() {
    let fixture = Fixture::new();
    let image = fixture.path("disk.img");
    build(&ImageSpec { size_mib: Some(24), ..fixture.spec() }, &image).unwrap();
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!(bytes.len(), 24 << 20);
    assert_eq!(bytes[..440], [0; 440], "no boot code");
    assert_eq!((bytes[446], bytes[450]), (0, 0x0e), "not active, FAT16 LBA");
    assert_eq!(u32::from_le_bytes(bytes[454..458].try_into().unwrap()), 2048);
    assert_eq!(u32::from_le_bytes(bytes[458..462].try_into().unwrap()), 23 << 11);
    assert_eq!(bytes[462..510], [0; 48], "one partition");
    assert_eq!(bytes[510..512], [0x55, 0xaa]);
    let hidden = &bytes[PARTITION_OFFSET_BYTES as usize + 28..][..4];
    assert_eq!(hidden, 2048u32.to_le_bytes());
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let fixture = Fixture::new();
    let (a, b) = (fixture.path("a.img"), fixture.path("b.img"));
    build(&fixture.spec(), &a).unwrap();
    build(&fixture.spec(), &b).unwrap();
    assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap());
}

#[test]
fn bootable_images_carry_grub_for_both_firmwares() {
    let fixture = Fixture::new();
    let (a, b) = (fixture.path("a.img"), fixture.path("b.img"));
    let spec = ImageSpec { bootable: true, ..fixture.spec() };
    match build(&spec, &a) {
        // Where GRUB is not installed, the error that says which package to install is the expected result.
        Err(e @ (ImageError::GrubMissing | ImageError::GrubFilesMissing { .. })) => {
            assert!(e.to_string().contains("apt-get install"), "{e}");
            assert!(!a.exists());
        }
        result => {
            result.unwrap();
            let bytes = std::fs::read(&a).unwrap();
            assert_eq!((bytes[446], bytes[450]), (0x80, 0xef), "active, EFI system partition");
            assert_ne!(bytes[..64], [0; 64], "boot code");
            assert_ne!(bytes[512..1024], [0; 512], "core");
            assert_eq!(bytes[(1 << 20) - 512..1 << 20], [0; 512], "the core ends before the partition");
            assert_eq!(&read_with_fatfs(&a, "EFI/BOOT/BOOTX64.EFI")[..2], b"MZ");
            build(&spec, &b).unwrap();
            assert!(bytes == std::fs::read(&b).unwrap(), "GRUB's cores are reproducible");
            let with_words = ImageSpec { append: "kernel.cores=2 kernel.memory=1G".into(), overwrite: true, ..spec };
            build(&with_words, &b).unwrap();
            // The configuration of the UEFI core is not compressed.
            let efi = read_with_fatfs(&b, "EFI/BOOT/BOOTX64.EFI");
            let line = b"multiboot2 /KERNEL.ELF kernel.cores=2 kernel.memory=1G\n";
            assert!(efi.windows(line.len()).any(|bytes| bytes == line), "the words are in GRUB's configuration");
        }
    }
}

#[test]
fn every_refusal_has_its_reason_and_leaves_nothing_behind() {
    let fixture = Fixture::new();
    let out = fixture.path("disk.img");
    let refused = |spec: &ImageSpec| {
        let error = build(spec, &out).unwrap_err();
        assert!(!out.exists(), "{error}");
        error
    };
    let spec = fixture.spec();
    let with_file =
        |name: &str, path: PathBuf| ImageSpec { files: vec![FileSpec { name: name.into(), path }], ..spec.clone() };

    let e = refused(&ImageSpec::new(fixture.path("nothing")));
    assert!(matches!(&e, ImageError::Input { what, .. } if what == "the kernel"), "{e}");
    let e = refused(&ImageSpec::new(fixture.path("")));
    assert!(matches!(&e, ImageError::NotAFile { .. }), "{e}");
    let e = refused(&ImageSpec::new(fixture.write("text", b"hello, world")));
    assert!(matches!(&e, ImageError::NotAnElf { .. }), "{e}");
    let e = refused(&with_file("model.gguf", fixture.path("kernel.elf")));
    assert!(matches!(&e, ImageError::BadName { name } if name == "model.gguf"), "{e}");
    let e = refused(&with_file("SNAPA.BIN", fixture.path("kernel.elf")));
    assert!(matches!(&e, ImageError::DuplicateName { name } if name == "SNAPA.BIN"), "{e}");
    let e = refused(&ImageSpec { append: "kernel.cores=1".into(), ..spec.clone() });
    assert!(matches!(e, ImageError::AppendWithoutGrub), "{e}");
    for (append, bad) in
        [("prompt=\"a b\"", '"'), ("a=1;reboot", ';'), ("a=$b", '$'), ("a=1\nhalt", '\n'), ("x=ä", 'ä')]
    {
        let e = refused(&ImageSpec { append: append.into(), bootable: true, ..spec.clone() });
        assert!(matches!(e, ImageError::BadAppend { found } if found == bad), "{append}: {e}");
    }
    let e = refused(&ImageSpec { slot_mib: 0, ..spec.clone() });
    assert!(matches!(e, ImageError::EmptySlots), "{e}");
    let e = refused(&ImageSpec { size_mib: Some(8), slot_mib: DEFAULT_SLOT_MIB, ..spec.clone() });
    assert!(matches!(&e, ImageError::DoesNotFit { size_mib: 8, need_mib: 11, .. }), "{e}");
    let e = refused(&ImageSpec { size_mib: Some(4000), ..spec.clone() });
    assert!(matches!(e, ImageError::ImageTooLarge { size_mib: 4000 }), "{e}");
    let e = refused(&ImageSpec { slot_mib: 1024, ..spec.clone() });
    assert!(matches!(&e, ImageError::TooLargeForFat16 { largest, .. } if largest.starts_with("SNAP")), "{e}");
    let e = refused(&ImageSpec { slot_mib: u64::MAX, ..spec.clone() });
    assert!(matches!(&e, ImageError::TooLargeForFat16 { .. }), "{e}");

    // A model beyond FAT16 (sparse: it takes no room here) is sent to the raw disk.
    let huge = std::fs::File::create(fixture.path("huge.gguf")).unwrap();
    huge.set_len(3 << 30).unwrap();
    let e = refused(&with_file("MODEL.GGU", fixture.path("huge.gguf")));
    assert!(matches!(&e, ImageError::TooLargeForFat16 { largest_bytes: 0xc000_0000, .. }), "{e}");
    assert!(e.to_string().contains("raw second disk"), "{e}");
}

#[test]
fn an_image_without_a_kernel_holds_slots_and_cannot_be_bootable() {
    let fixture = Fixture::new();
    let out = fixture.path("disk.img");
    let spec = ImageSpec { slot_mib: 1, ..ImageSpec::without_kernel() };
    let error = build(&ImageSpec { bootable: true, ..spec.clone() }, &out).unwrap_err();
    assert!(matches!(error, ImageError::NothingToBoot), "{error}");
    assert!(!out.exists());
    let entries = build(&spec, &out).unwrap();
    let names: Vec<&str> = entries.iter().map(|e| e.path.as_str()).collect();
    assert_eq!(names, ["BAREFLOW.CFG", "REPORT.TXT", "SNAPA.BIN", "SNAPB.BIN"]);
}

#[test]
fn an_existing_image_is_kept_unless_told_otherwise() {
    let fixture = Fixture::new();
    let out = fixture.write("disk.img", b"a snapshot worth keeping");
    let error = build(&fixture.spec(), &out).unwrap_err();
    assert!(matches!(&error, ImageError::OutputExists { path } if *path == out), "{error}");
    assert_eq!(std::fs::read(&out).unwrap(), b"a snapshot worth keeping");
    build(&ImageSpec { overwrite: true, ..fixture.spec() }, &out).unwrap();
    assert_eq!(list(&out).unwrap().len(), 5);
}

#[test]
fn looking_into_the_wrong_file_says_so() {
    let fixture = Fixture::new();
    let text = fixture.write("text", &[b'x'; 4096]);
    assert!(matches!(list(&text), Err(ImageError::Volume { .. })));
    assert!(matches!(list(&fixture.path("nothing")), Err(ImageError::Read { .. })));
    let image = fixture.path("disk.img");
    build(&fixture.spec(), &image).unwrap();
    let error = read_file(&image, "MODEL.GGU").unwrap_err();
    assert!(
        matches!(&error, ImageError::NoSuchFile { name, have, .. } if name == "MODEL.GGU" && have.len() == 5),
        "{error}"
    );
}

#[test]
fn directories_that_lead_in_circles_are_an_error() {
    let fixture = Fixture::new();
    let image = fixture.path("disk.img");
    build(&fixture.spec(), &image).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    let mut volume = Cursor::new(bytes.split_off(PARTITION_OFFSET_BYTES as usize));
    {
        let mounted = fatfs::FileSystem::new(&mut volume, fatfs::FsOptions::new()).unwrap();
        let looping = mounted.root_dir().create_dir("LOOPING").unwrap();
        (0..8).for_each(|i| drop(looping.create_dir(&format!("INNER{i}")).unwrap()));
    }
    // A directory's entry has its first cluster in bytes 26 and 27: those of the inner ones lead back.
    let mut volume = volume.into_inner();
    let entry = |volume: &[u8], name: &[u8]| (0..volume.len()).step_by(32).find(|&at| volume[at..].starts_with(name));
    let at = entry(&volume, b"LOOPING    \x10").unwrap();
    let cluster = [volume[at + 26], volume[at + 27]];
    for i in 0..8 {
        let at = entry(&volume, format!("INNER{i}     \x10").as_bytes()).unwrap();
        volume[at + 26..at + 28].copy_from_slice(&cluster);
    }
    bytes.extend(volume);
    std::fs::write(&image, bytes).unwrap();
    let error = list(&image).unwrap_err();
    assert!(matches!(error, ImageError::TooManyEntries { .. }), "{error}");
    assert!(error.to_string().contains("lead in circles"), "{error}");
}

#[test]
fn a_name_that_nothing_can_ask_for_hides_no_other_file() {
    let fixture = Fixture::new();
    let image = fixture.path("disk.img");
    build(&fixture.spec(), &image).unwrap();
    let before = list(&image).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    let mut volume = Cursor::new(bytes.split_off(PARTITION_OFFSET_BYTES as usize));
    {
        let mounted = fatfs::FileSystem::new(&mut volume, fatfs::FsOptions::new()).unwrap();
        mounted.root_dir().create_file("XY.TXT").unwrap().write_all(b"content").unwrap();
    }
    // As another system may write it: outside ASCII, and with a space inside.
    let mut volume = volume.into_inner();
    let at = (0..volume.len()).step_by(32).find(|&at| volume[at..].starts_with(b"XY      TXT")).unwrap();
    volume[at..at + 4].copy_from_slice(b"\x8e Y ");
    bytes.extend(volume);
    std::fs::write(&image, bytes).unwrap();
    let after = list(&image).unwrap();
    assert_eq!(after.len(), before.len() + 1);
    let odd = after.iter().find(|entry| entry.path == "? Y.TXT").unwrap();
    assert_eq!((odd.len_bytes, odd.extents.len()), (7, 1));
    assert_eq!(read_file(&image, "? Y.TXT").unwrap(), b"content");
    assert!(before.iter().all(|entry| after.contains(entry)));
}
