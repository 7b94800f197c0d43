//! The first sector of a slot: what the payload is, whose it is, and whether it is whole.
//!
//! ```text
//! offset  bytes  field            meaning (integers little-endian)
//!      0      4  magic            "SNAP"
//!      4      4  version          format of the header's middle and of the payload; 4
//!      8      8  generation       1 for the first save; each save has one more than any slot on the volume
//!     16      4  state            "WRIT" while the payload is being written, "DONE" when it is durable
//!     20      4  -                zero
//!     24      8  payload_bytes    length of the payload, which starts at offset 512 of the slot
//!     32     32  payload_sha256   SHA-256 of the payload
//!     64     32  build_id         image that wrote it: machine code fits this build only
//!     96     32  model_id         fingerprint of the model file
//!    128     32  machine          CPU fingerprint: machine code fits this CPU only
//!    160      8  model_bytes      length of the model file; 0 when its SHA-256 was never computed
//!    168     32  model_sha256     SHA-256 of the model file
//!    200    280  -                zero
//!    480     32  header_sha256    SHA-256 of bytes 0..480
//! ```
//!
//! `magic`, `version`, `generation` and `header_sha256` stay where they are in every version, so that any build can tell
//! a newer snapshot from a damaged one. An example (`hexdump -C`; generation 7, 292 payload bytes, ids of repeated `b`, `c`, `d`,
//! a model file of 4096 bytes with a hash of repeated `e`):
//!
//! ```text
//! 00000000  53 4e 41 50 05 00 00 00  07 00 00 00 00 00 00 00  |SNAP............|
//! 00000010  44 4f 4e 45 00 00 00 00  24 01 00 00 00 00 00 00  |DONE....$.......|
//! 00000020  7b 5c 59 b7 9c 28 8c ef  c0 76 5b 17 5b 0a e0 db  |{\Y..(...v[.[...|
//! 00000030  f3 25 65 15 4c 21 bb 31  3f 4c f3 e8 7b 7b 0b b5  |.%e.L!.1?L..{{..|
//! 00000040  62 62 62 62 62 62 62 62  62 62 62 62 62 62 62 62  |bbbbbbbbbbbbbbbb|
//! *
//! 00000060  63 63 63 63 63 63 63 63  63 63 63 63 63 63 63 63  |cccccccccccccccc|
//! *
//! 00000080  64 64 64 64 64 64 64 64  64 64 64 64 64 64 64 64  |dddddddddddddddd|
//! *
//! 000000a0  00 10 00 00 00 00 00 00  65 65 65 65 65 65 65 65  |........eeeeeeee|
//! 000000b0  65 65 65 65 65 65 65 65  65 65 65 65 65 65 65 65  |eeeeeeeeeeeeeeee|
//! 000000c0  65 65 65 65 65 65 65 65  00 00 00 00 00 00 00 00  |eeeeeeee........|
//! 000000d0  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
//! *
//! 000001e0  56 20 45 bb 80 32 f0 a3  9b 10 70 fb 55 5c 1e 83  |V E..2....p.U\..|
//! 000001f0  51 aa 77 ac 2f 89 e1 90  d6 f1 20 b3 e4 13 e5 14  |Q.w./..... .....|
//! ```
//!
//! Write order: the header with `WRIT`, flush; the payload, flush; the header with `DONE`, flush. A slot that says `WRIT` was
//! torn by a power cut; one that says `DONE` and has another hash was changed later.

use crate::reason::SlotReason;
use crate::schema::ModelFile;
use sha2::{Digest, Sha256};

/// Bytes of the header: one sector. The payload follows it.
pub const HEADER_BYTES: usize = 512;
/// Version this build writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 5;
/// Largest payload that is read or written, whatever the size of the slot.
pub const MAX_PAYLOAD_BYTES: u64 = 16 << 20;
/// Largest generation; a header with another one is refused, so that the next generation always exists.
pub const MAX_GENERATION: u64 = 1 << 48;

const MAGIC: [u8; 4] = *b"SNAP";
const WRITING: [u8; 4] = *b"WRIT";
const DONE: [u8; 4] = *b"DONE";
const HASH_AT: usize = HEADER_BYTES - 32;

/// What the running image is, and what it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Hash of the build.
    pub build_id: [u8; 32],
    /// Fingerprint of the model file: SHA-256 of its length and of samples spread over it.
    pub model_id: [u8; 32],
    /// Hash of the CPU's fingerprint: equal where the same machine code runs and performs alike.
    pub machine: [u8; 32],
}

/// A decoded header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Which save this is.
    pub generation: u64,
    /// The payload is durable.
    pub committed: bool,
    /// Length of the payload.
    pub payload_bytes: u64,
    /// SHA-256 of the payload.
    pub payload_sha256: [u8; 32],
    /// Who wrote it.
    pub identity: Identity,
    /// The payload's [`Snapshot::model_file`](crate::Snapshot::model_file), repeated so that a boot knows it before it loads.
    pub model_file: Option<ModelFile>,
}

impl Header {
    /// The header as its sector.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let state = if self.committed { DONE } else { WRITING };
        let file = self.model_file.unwrap_or(ModelFile { len_bytes: 0, sha256: [0; 32] });
        let mut sector = [0; HEADER_BYTES];
        let mut at = 0;
        for field in [
            &MAGIC[..],
            &FORMAT_VERSION.to_le_bytes(),
            &self.generation.to_le_bytes(),
            &state,
            &[0; 4],
            &self.payload_bytes.to_le_bytes(),
            &self.payload_sha256,
            &self.identity.build_id,
            &self.identity.model_id,
            &self.identity.machine,
            &file.len_bytes.to_le_bytes(),
            &file.sha256,
        ] {
            sector[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        }
        let hash = Sha256::digest(&sector[..HASH_AT]);
        sector[HASH_AT..].copy_from_slice(&hash);
        sector
    }

    /// Reads a header back. Says nothing about the payload.
    ///
    /// # Errors
    /// [`SlotReason`]: empty, not a snapshot, damaged, of another format, or a field out of range.
    pub fn decode(sector: &[u8; HEADER_BYTES]) -> Result<Self, SlotReason> {
        if sector.iter().all(|&byte| byte == 0) {
            return Err(SlotReason::Empty);
        }
        let magic = bytes_at::<0, 4>(sector);
        if magic != MAGIC {
            return Err(SlotReason::BadMagic { found: magic });
        }
        let found: [u8; 32] = Sha256::digest(&sector[..HASH_AT]).into();
        let expected = bytes_at::<HASH_AT, 32>(sector);
        if found != expected {
            return Err(SlotReason::HeaderDamaged { expected, found });
        }
        let version = u32::from_le_bytes(bytes_at::<4, 4>(sector));
        let generation = u64::from_le_bytes(bytes_at::<8, 8>(sector));
        if !(1..=MAX_GENERATION).contains(&generation) {
            return Err(SlotReason::BadField { field: "generation", found: generation });
        }
        if version != FORMAT_VERSION {
            return Err(SlotReason::OtherFormat { found: version, supported: FORMAT_VERSION, generation });
        }
        let state = bytes_at::<16, 4>(sector);
        let committed = match state {
            DONE => true,
            WRITING => false,
            _ => return Err(SlotReason::BadField { field: "state", found: u64::from(u32::from_le_bytes(state)) }),
        };
        let file = ModelFile {
            len_bytes: u64::from_le_bytes(bytes_at::<160, 8>(sector)),
            sha256: bytes_at::<168, 32>(sector),
        };
        Ok(Self {
            generation,
            committed,
            payload_bytes: u64::from_le_bytes(bytes_at::<24, 8>(sector)),
            payload_sha256: bytes_at::<32, 32>(sector),
            identity: Identity {
                build_id: bytes_at::<64, 32>(sector),
                model_id: bytes_at::<96, 32>(sector),
                machine: bytes_at::<128, 32>(sector),
            },
            model_file: Some(file).filter(|file| file.len_bytes > 0),
        })
    }
}

/// Bytes `AT..AT + N`, a range the compiler has checked.
fn bytes_at<const AT: usize, const N: usize>(sector: &[u8; HEADER_BYTES]) -> [u8; N] {
    const { assert!(AT + N <= HEADER_BYTES) };
    core::array::from_fn(|i| sector[AT + i])
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;
    use alloc::vec::Vec;

    fn example() -> Header {
        Header {
            generation: 7,
            committed: true,
            payload_bytes: 292,
            payload_sha256: Sha256::digest([b'a'; 292]).into(),
            identity: Identity { build_id: [b'b'; 32], model_id: [b'c'; 32], machine: [b'd'; 32] },
            model_file: Some(ModelFile { len_bytes: 4096, sha256: [b'e'; 32] }),
        }
    }

    /// `hexdump -C`, repeated lines as `*`.
    fn hexdump(sector: &[u8; HEADER_BYTES]) -> String {
        let mut out = String::new();
        let mut last: Option<&[u8]> = None;
        let mut starred = false;
        for (i, row) in sector.chunks(16).enumerate() {
            if last == Some(row) {
                if !starred {
                    out.push_str("*\n");
                }
                starred = true;
                continue;
            }
            starred = false;
            last = Some(row);
            let hex: Vec<String> =
                row.chunks(8).map(|half| half.iter().map(|b| format!("{b:02x} ")).collect()).collect();
            let text: String =
                row.iter().map(|&b| if b == b' ' || b.is_ascii_graphic() { b as char } else { '.' }).collect();
            out.push_str(&format!("{:08x}  {} {} |{text}|\n", i * 16, hex[0], hex[1]));
        }
        out
    }

    #[test]
    fn the_documented_example_is_what_is_written() {
        let source = include_str!("header.rs");
        let documented: String = source
            .lines()
            .filter_map(|line| line.strip_prefix("//! "))
            .filter(|line| line.starts_with("0000") || *line == "*")
            .map(|line| format!("{line}\n"))
            .collect();
        let expected = hexdump(&example().encode());
        assert_eq!(documented, expected, "the module docs should say:\n{expected}");
    }

    #[test]
    fn headers_round_trip() {
        for header in
            [example(), Header { committed: false, generation: 1, payload_bytes: 0, model_file: None, ..example() }]
        {
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    /// A header with some bytes changed and its hash made right again: a foreign writer, not damage.
    fn forged(at: usize, bytes: &[u8]) -> Result<Header, SlotReason> {
        let mut sector = example().encode();
        sector[at..at + bytes.len()].copy_from_slice(bytes);
        let hash = Sha256::digest(&sector[..HASH_AT]);
        sector[HASH_AT..].copy_from_slice(&hash);
        Header::decode(&sector)
    }

    #[test]
    fn headers_of_foreign_writers_are_refused_by_cause() {
        assert_eq!(forged(0, b"SNAQ"), Err(SlotReason::BadMagic { found: *b"SNAQ" }));
        for found in [0, 1, FORMAT_VERSION - 1, FORMAT_VERSION + 1, u32::MAX] {
            let error = SlotReason::OtherFormat { found, supported: FORMAT_VERSION, generation: 7 };
            assert_eq!(forged(4, &found.to_le_bytes()), Err(error));
        }
        for found in [0, MAX_GENERATION + 1, u64::MAX] {
            assert_eq!(forged(8, &found.to_le_bytes()), Err(SlotReason::BadField { field: "generation", found }));
        }
        assert_eq!(forged(16, b"done"), Err(SlotReason::BadField { field: "state", found: 0x656e_6f64 }));
        assert_eq!(Header::decode(&[0; HEADER_BYTES]), Err(SlotReason::Empty));
        assert_eq!(Header::decode(&[0xff; HEADER_BYTES]), Err(SlotReason::BadMagic { found: [0xff; 4] }));
    }
}
