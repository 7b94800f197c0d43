//! What is linked into a native image besides code: what `export-tool` writes and the image's `runtime` reads.
//!
//! The table (postcard) stands between the symbols `bareflow_kernels_table` and `bareflow_kernels_table_end`; each
//! kernel's code stands at `offset` from `bareflow_kernels_text`.

use crate::schema::ModelFile;
use alloc::vec::Vec;
use model::kernel::{KernelKey, Variant};
use serde::{Deserialize, Serialize};

/// The model that the kernels of an image converged with.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct FrozenModel {
    /// As [`Identity::model_id`](crate::Identity::model_id).
    #[serde(with = "serde_bytes")]
    pub model_id: [u8; 32],
    /// As [`Snapshot::model_file`](crate::Snapshot::model_file).
    pub model_file: Option<ModelFile>,
}

/// All of it.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct FrozenTable {
    /// The model.
    pub model: FrozenModel,
    /// The kernels.
    pub kernels: Vec<FrozenKernel>,
}

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
    #[serde(with = "serde_bytes")]
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
pub fn encode(table: &FrozenTable) -> Vec<u8> {
    postcard::to_allocvec(table).expect("the table holds only serialisable types")
}

/// Reads [`encode`]'s bytes.
///
/// # Errors
/// [`BadTable`].
pub fn decode(bytes: &[u8]) -> Result<FrozenTable, BadTable> {
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
        let kernel = FrozenKernel { key, variant, offset: 64, len_bytes: 700, answer_sha256: Some([7; 32]) };
        let model_file = Some(ModelFile { len_bytes: 5000, sha256: [8; 32] });
        let model = FrozenModel { model_id: [9; 32], model_file };
        let table = FrozenTable { model, kernels: vec![kernel; 3] };
        let bytes = encode(&table);
        assert_eq!(decode(&bytes), Ok(table));
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), Err(BadTable), "{len} bytes");
        }
    }
}
