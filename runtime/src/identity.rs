//! Which build, CPU and model this is: what decides whether a snapshot's machine code may be used.

use crate::options::hex_32;
use crate::platform::CpuFacts;
use sha2::{Digest, Sha256};
use snapshot_format::Identity;

/// Hash of the sources that decide what compiled code looks like, lower-case hex (see `build.rs`).
pub const BUILD_ID: &str = env!("BAREFLOW_BUILD_ID");

/// Identity of this boot.
///
/// # Panics
/// Never in practice: the build script writes 64 hexadecimal digits.
pub fn identity(cpu: &CpuFacts, model_fingerprint: [u8; 32]) -> Identity {
    Identity {
        build_id: hex_32(BUILD_ID).expect("the build script writes a SHA-256"),
        model_id: model_fingerprint,
        machine: Sha256::digest(cpu.fingerprint.as_bytes()).into(),
    }
}

/// Lower-case hex of `bytes`.
pub fn hex(bytes: &[u8]) -> alloc::string::String {
    bytes.iter().map(|b| alloc::format!("{b:02x}")).collect()
}
