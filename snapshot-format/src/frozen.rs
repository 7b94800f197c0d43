//! The table of kernels linked into a native image: what `export-tool` writes and the image's `runtime` reads.
//!
//! The table (postcard) stands between the symbols `bareflow_kernels_table` and `bareflow_kernels_table_end`; each
//! kernel's code stands at `offset` from `bareflow_kernels_text`.

use alloc::vec::Vec;
use model::kernel::{KernelKey, Variant};
use serde::{Deserialize, Serialize};

/// One linked kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FrozenKernel {
    /// What it computes.
    pub key: KernelKey,
    /// How it was built.
    pub variant: Variant,
    /// Bytes from the start of the kernels' text to its first instruction.
    pub offset: u32,
    /// Bytes of machine code.
    pub len_bytes: u32,
    /// As [`KeyRecord::answer_sha256`](crate::KeyRecord::answer_sha256).
    pub answer_sha256: Option<[u8; 32]>,
}

/// The table's bytes do not decode: the image was linked from another version's export.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the table of linked kernels does not decode; export the image again with the matching export-tool")]
pub struct BadTable;

/// Bytes of the table.
///
/// # Panics
/// Never in practice: the schema always serialises.
pub fn encode(table: &[FrozenKernel]) -> Vec<u8> {
    postcard::to_allocvec(table).expect("the table holds only serialisable types")
}

/// Reads [`encode`]'s bytes.
///
/// # Errors
/// [`BadTable`].
pub fn decode(bytes: &[u8]) -> Result<Vec<FrozenKernel>, BadTable> {
    postcard::from_bytes(bytes).map_err(|_| BadTable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn the_table_round_trips_and_a_cut_one_is_refused() {
        let key = "qkv_q4_1_m1_n960_k576".parse().unwrap();
        let variant = "w256_r1_c32_s2_u1_pf1024".parse().unwrap();
        let table = vec![FrozenKernel { key, variant, offset: 64, len_bytes: 700, answer_sha256: Some([7; 32]) }; 3];
        let bytes = encode(&table);
        assert_eq!(decode(&bytes), Ok(table));
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), Err(BadTable), "{len} bytes");
        }
    }
}
