//! The targets: any bytes in, must return. Here are those of the parsers; [`crate::widen`] and [`crate::kernels`] make code
//! of the bytes and run it.

use crate::decisions::seeds;
use crate::{kernels, snapshot, widen};
use engine::operands::AlignedBytes;
use engine::pack::{ColumnMap, RowFormat, dequantise_column, pack_rows, unpack_column};
use engine::simd::Level;
use model::kernel::Width;
use model::layout::packed_len_bytes;
use model::synthetic::{self, Llama2cFiles, Spec, TokenizerKind};
use model::{TensorType, gguf, llama2c};
use report::wire;
use runtime::Options;
use snapshot_format::frozen::{self, FrozenTable};
use snapshot_format::{DiskMedium, Identity, Slot, Snapshot, open, save};
use std::io::{Cursor, Write};
use storage::{ByteSource, FatVolume, FileSource, MemoryDisk, SECTOR_BYTES};

/// One target.
pub struct Target {
    /// Name, as the test prints it.
    pub name: &'static str,
    /// What is run.
    pub run: fn(&[u8]) -> Outcome,
    /// Good inputs to damage.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// True when it runs code made of its input: then a failure may end the process.
    pub runs_code: bool,
}

impl Target {
    const fn new(name: &'static str, run: fn(&[u8]) -> Outcome, seeds: fn() -> Vec<Vec<u8>>) -> Target {
        Target { name, run, seeds, runs_code: false }
    }
}

/// What became of an input. A target that accepts none checks nothing but its errors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It was good, and so was what was made of it.
    Accepted,
    /// It was refused with an error.
    Refused,
}

impl Outcome {
    fn accepted_if(accepted: bool) -> Outcome {
        if accepted { Outcome::Accepted } else { Outcome::Refused }
    }
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target::new("gguf", gguf_header, || vec![tiny_gguf()]),
    Target::new("llama2c", llama2c_header, llama2c_of_every_version),
    Target::new("tokenize", tokenize, texts),
    Target::new("quant", quantised_blocks, blocks_of_every_type),
    Target::new("wire", wire_frames, frames),
    Target::new("options", options, texts),
    Target::new("volume", volume, volumes),
    Target::new("snapshot", snapshot::payload, snapshot::payloads),
    Target::new("audit", snapshot::audit, snapshot::codes),
    Target::new("frozen_table", frozen_table, || vec![frozen::encode(&FrozenTable::default())]),
    Target { runs_code: true, ..Target::new("widen", widened, || seeds(64)) },
    Target { runs_code: true, ..Target::new("kernels", kernels::check, || seeds(64)) },
];

/// Accepted when it ran at more than the width it was made at.
fn widened(data: &[u8]) -> Outcome {
    Outcome::accepted_if(widen::check(data).compared.iter().any(|width| *width != Width::X128))
}

fn tiny_gguf() -> Vec<u8> {
    synthetic::gguf(&Spec::default()).expect("the default spec makes a model")
}

fn tiny_llama2c() -> Llama2cFiles {
    let spec = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    synthetic::llama2c(&spec).expect("the spec makes a llama2.c model")
}

fn llama2c_of_every_version() -> Vec<Vec<u8>> {
    let spec = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    let file = |version| synthetic::llama2c_version(&spec, version).expect("the spec makes a llama2.c model").model;
    (0..=2).map(file).collect()
}

fn texts() -> Vec<Vec<u8>> {
    [
        "Once upon a time",
        "prompt=\"a \\\"b\\\" c\" max_tokens=12 # comment\nisa=avx2",
        "naïve 東京 🦀 \u{200d} 1234 don't  ",
        "<|im_start|>user\nhi<|im_end|>",
    ]
    .iter()
    .map(|s| s.as_bytes().to_vec())
    .collect()
}

fn gguf_header(data: &[u8]) -> Outcome {
    let mut accepted = false;
    // The file may claim to be longer than what was read of it.
    for file_bytes in [data.len() as u64, data.len() as u64 * 3] {
        if let Ok(description) = gguf::read(data, file_bytes) {
            assert!(description.tensors.iter().all(|t| t.end() <= file_bytes), "a tensor ends outside the file");
            accepted = true;
        }
    }
    Outcome::accepted_if(accepted)
}

fn llama2c_header(data: &[u8]) -> Outcome {
    thread_local! {
        static GOOD: Llama2cFiles = tiny_llama2c();
    }
    GOOD.with(|good| damaged_llama2c(data, good))
}

fn damaged_llama2c(data: &[u8], good: &Llama2cFiles) -> Outcome {
    let description = llama2c::read(data, data.len() as u64, &good.tokenizer);
    if let Ok(description) = &description {
        assert!(description.tensors.iter().all(|t| t.end() <= data.len() as u64), "a tensor ends outside the file");
    }
    // The other way round: a damaged tokenizer beside a good model.
    drop(llama2c::read(&good.model, good.model.len() as u64, data));
    Outcome::accepted_if(description.is_ok())
}

fn tokenize(data: &[u8]) -> Outcome {
    thread_local! {
        static MODELS: Vec<model::ModelDescription> = {
            let file = tiny_gguf();
            vec![gguf::read(&file, file.len() as u64).expect("a synthetic model is whole")]
        };
    }
    MODELS.with(|models| {
        for model in models {
            let ids = model.tokenizer.encode(data, false);
            assert!(ids.iter().all(|&id| (id as usize) < model.tokenizer.vocab_size()), "an id outside the vocabulary");
            assert_eq!(model.tokenizer.decode(&ids), data, "bytes changed on the way through the tokenizer");
        }
    });
    Outcome::Accepted
}

/// A type's number, then blocks of it.
fn blocks_of_every_type() -> Vec<Vec<u8>> {
    let values: Vec<f32> = (0..512u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8).collect();
    let mut seeds = Vec::new();
    for ty in TensorType::ALL.iter().filter(|ty| ty.is_supported()) {
        let mut seed = vec![ty.id() as u8];
        model::quant::quantise(*ty, &values, &mut seed).expect("512 values are whole blocks of every type");
        seeds.push(seed);
    }
    seeds
}

/// Any bytes are blocks of any type: packed, each row comes back as it was and means what the file meant.
fn quantised_blocks(data: &[u8]) -> Outcome {
    let Some((&id, bytes)) = data.split_first() else { return Outcome::Refused };
    let Some((ty, format)) = TensorType::from_id(id.into()).and_then(|ty| Some((ty, RowFormat::of(ty)?))) else {
        assert!(TensorType::from_id(id.into()).is_none_or(|ty| !ty.is_supported()), "a type without a packer");
        return Outcome::Refused;
    };
    let (k, row_bytes) = (ty.block_len() as usize, ty.block_bytes() as usize);
    let rows = &bytes[..bytes.len() / row_bytes * row_bytes];
    let n = rows.len() / row_bytes;
    let mut packed = AlignedBytes::zeroed(packed_len_bytes(format.dtype(), n, k));
    pack_rows(Level::detect(), format, k, ColumnMap::WHOLE, 0, rows, &mut packed);
    let (mut want, mut got) = (vec![0.0f32; k], vec![0.0f32; k]);
    let mut back = vec![0; TensorType::from(format.dtype()).row_bytes(k as u64).expect("a whole block") as usize];
    for (column, row) in rows.chunks_exact(row_bytes).enumerate() {
        model::quant::dequantise(ty, row, &mut want).expect("a whole block");
        dequantise_column(format.dtype(), column, &packed, &mut got);
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(want.iter().zip(&got).all(same), "{ty}: {want:?} became {got:?}");
        unpack_column(format.dtype(), k, ColumnMap::WHOLE, column, &packed, &mut back);
        assert!(ty == TensorType::BF16 || back == row, "{ty}: a packed row is not the file's");
    }
    Outcome::accepted_if(n > 0)
}

fn frames() -> Vec<Vec<u8>> {
    use report::{ExitStatus, Message};
    vec![
        wire::encode(&Message::Tokens { ids: vec![0, 1, 70_000] }),
        wire::encode(&Message::End { status: ExitStatus::Pass, messages: 1 }),
    ]
}

fn wire_frames(data: &[u8]) -> Outcome {
    let mut decoder = wire::Decoder::default();
    let whole = decoder.push(data);
    let mut decoder = wire::Decoder::default();
    let parts: Vec<_> = data.chunks(3).flat_map(|chunk| decoder.push(chunk)).collect();
    assert_eq!(whole, parts, "chunking changed the messages");
    Outcome::accepted_if(whole.iter().any(Result::is_ok))
}

fn options(data: &[u8]) -> Outcome {
    Outcome::accepted_if(core::str::from_utf8(data).is_ok_and(|text| Options::default().apply(text).is_ok()))
}

/// Sectors of the volumes: clusters of one sector, a few more than the fewest that make FAT16.
const VOLUME_BYTES: usize = 4300 * SECTOR_BYTES;
/// Bytes of a snapshot slot on them.
const SLOT_BYTES: usize = 16 << 10;

/// A FAT16 volume with both snapshot slots, a file in pieces and a directory: bare, and behind a partition table. Only up
/// to the last byte that is not 0: there the decisions are, and [`volume`] puts the zeros back.
fn volumes() -> Vec<Vec<u8>> {
    let mut image = vec![0; VOLUME_BYTES];
    let options = fatfs::FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat16).bytes_per_cluster(512);
    fatfs::format_volume(Cursor::new(&mut *image), options).expect("formatting memory");
    {
        let system = fatfs::FileSystem::new(Cursor::new(&mut *image), fatfs::FsOptions::new()).expect("mounting it");
        let root = system.root_dir();
        let put = |dir: &fatfs::Dir<'_, _>, name: &str, bytes: &[u8]| {
            dir.create_file(name).and_then(|mut file| file.write_all(bytes)).expect("writing to memory");
        };
        for slot in Slot::ALL {
            put(&root, slot.file_name(), &[0; SLOT_BYTES]);
        }
        put(&root, "BAREFLOW.CFG", b"prompt=hello max_tokens=4");
        put(&root, "GONE.TXT", &[1; 512]);
        put(&root, "PIECES.BIN", &[2; 512]);
        root.remove("GONE.TXT").expect("removing a file");
        put(&root, "a long name.txt", &[3; 1500]);
        put(&root.create_dir("MODELS").expect("making a directory"), "TINY.GGU", &[4; 700]);
    }
    let mut disk = MemoryDisk::new(image);
    {
        let mut medium = DiskMedium::open(&mut disk).expect("the volume is FAT16");
        save(&mut medium, &IDENTITY, &Snapshot::default()).expect("the slots are there");
        open(&mut medium, &IDENTITY).expect("it was just saved");
    }
    let mut image = disk.into_bytes();
    let end = image.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    image.truncate(end);

    // A partition of type FAT16 with LBA, from sector 1 on.
    let mut partitioned = vec![0; SECTOR_BYTES];
    partitioned[446 + 4] = 0x0e;
    partitioned[446 + 8] = 1;
    partitioned[446 + 12..446 + 16].copy_from_slice(&((VOLUME_BYTES / SECTOR_BYTES) as u32).to_le_bytes());
    partitioned[510..].copy_from_slice(&[0x55, 0xaa]);
    partitioned.extend_from_slice(&image);
    vec![image, partitioned]
}

const IDENTITY: Identity = Identity { build_id: [0; 32], model_id: [0; 32], machine: [0; 32] };

fn volume(data: &[u8]) -> Outcome {
    let mut image = vec![0; data.len().max(VOLUME_BYTES + SECTOR_BYTES)];
    image[..data.len()].copy_from_slice(data);
    let mut disk = MemoryDisk::new(image);
    let volume = FatVolume::open(&mut disk);
    if let Ok(volume) = &volume {
        for directory in ["", "MODELS"] {
            for entry in volume.list(&mut disk, directory).unwrap_or_default().iter().take(8) {
                let path =
                    if directory.is_empty() { entry.name.clone() } else { format!("{directory}/{}", entry.name) };
                let Ok(file) = volume.find(&mut disk, &path) else { continue };
                let sectors: u64 = file.extents.iter().map(|extent| extent.sectors).sum();
                assert_eq!(sectors, file.len_bytes.div_ceil(SECTOR_BYTES as u64), "extents of {path}");
                let mut bytes = [0; 1024];
                let len = bytes.len().min(file.len_bytes as usize);
                drop(FileSource::new(&mut disk, &file).read_at(0, &mut bytes[..len]));
            }
        }
    }
    if let Ok(mut medium) = DiskMedium::open(&mut disk) {
        drop(open(&mut medium, &IDENTITY));
    }
    Outcome::accepted_if(volume.is_ok())
}

fn frozen_table(data: &[u8]) -> Outcome {
    let table = frozen::decode(data);
    if let Ok(table) = &table {
        assert!(table.kernels.len() <= data.len(), "more entries than bytes");
    }
    Outcome::accepted_if(table.is_ok())
}
