//! Weight storage types of ggml: names, sizes, and the reference conversion to and from `f32`.
//!
//! Input -> output: bytes of whole blocks -> `f32` values ([`dequantise`]); `f32` values -> bytes ([`quantise`]);
//! bytes of a quantised block -> its codes and scales ([`BlockFormat`]), which is what `engine` packs.
//! Each format is one file that says where its bits are; a further format is one more file, one line of
//! `with_format!`, and a [`DType`] with its [`crate::layout::BlockLayout`]. All of them mean the same: [`Parts`].
//!
//! The quantisers of the types with blocks of 32 give the same bytes as ggml's `quantize_row_*_ref`. Those of the K types
//! do not search for the best scales as ggml's do: they span each sub-block. They are meant for tests, and good enough to
//! run.
//! Not here: packed kernel layouts ([`crate::layout`]) and anything fast; `engine` packs, this defines.

mod parts;
mod plain;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

use crate::kernel::DType;
use crate::layout::BlockLayout;
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

pub use parts::Parts;
pub use plain::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use q2_k::Q2K;
pub use q3_k::Q3K;
pub use q4_0::Q4_0;
pub use q4_1::Q4_1;
pub use q4_k::Q4K;
pub use q5_0::Q5_0;
pub use q5_1::Q5_1;
pub use q5_k::Q5K;
pub use q6_k::Q6K;
pub use q8_0::Q8_0;

/// Names of the types that can be read and run, for messages.
pub const SUPPORTED_NAMES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";

macro_rules! tensor_types {
    ($($name:ident = $id:literal, $block_len:literal, $block_bytes:literal;)*) => {
        /// Every tensor type of ggml that has a stable id, whether or not it can be run here.
        ///
        /// # Source
        /// `enum ggml_type` and the block structures of `ggml-common.h` in the ggml project.
        #[allow(non_camel_case_types, missing_docs)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub enum TensorType { $($name),* }

        impl TensorType {
            /// Every type, by ascending id.
            pub const ALL: &[TensorType] = &[$(TensorType::$name),*];

            /// The type with ggml's numeric id.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(TensorType::$name),)* _ => None }
            }

            /// ggml's numeric id.
            pub const fn id(self) -> u32 {
                match self { $(TensorType::$name => $id),* }
            }

            /// Name as ggml and its tools print it.
            pub const fn name(self) -> &'static str {
                match self { $(TensorType::$name => stringify!($name)),* }
            }

            /// Elements in one block.
            pub const fn block_len(self) -> u32 {
                match self { $(TensorType::$name => $block_len),* }
            }

            /// Bytes of one block.
            pub const fn block_bytes(self) -> u32 {
                match self { $(TensorType::$name => $block_bytes),* }
            }
        }
    };
}

tensor_types! {
    F32 = 0, 1, 4;
    F16 = 1, 1, 2;
    Q4_0 = 2, 32, 18;
    Q4_1 = 3, 32, 20;
    Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24;
    Q8_0 = 8, 32, 34;
    Q8_1 = 9, 32, 36;
    Q2_K = 10, 256, 84;
    Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144;
    Q5_K = 13, 256, 176;
    Q6_K = 14, 256, 210;
    Q8_K = 15, 256, 292;
    IQ2_XXS = 16, 256, 66;
    IQ2_XS = 17, 256, 74;
    IQ3_XXS = 18, 256, 98;
    IQ1_S = 19, 256, 50;
    IQ4_NL = 20, 32, 18;
    IQ3_S = 21, 256, 110;
    IQ2_S = 22, 256, 82;
    IQ4_XS = 23, 256, 136;
    I8 = 24, 1, 1;
    I16 = 25, 1, 2;
    I32 = 26, 1, 4;
    I64 = 27, 1, 8;
    F64 = 28, 1, 8;
    IQ1_M = 29, 256, 56;
    BF16 = 30, 1, 2;
    TQ1_0 = 34, 256, 54;
    TQ2_0 = 35, 256, 66;
    MXFP4 = 39, 32, 17;
}

impl TensorType {
    /// The kernel type that holds these weights without loss; `None` when they cannot be run.
    ///
    /// BF16 maps to F32: every bf16 is an f32, and no kernel reads bf16 itself.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            TensorType::F32 | TensorType::BF16 => Some(DType::F32),
            TensorType::F16 => Some(DType::F16),
            TensorType::Q8_0 => Some(DType::Q8_0),
            TensorType::Q4_0 => Some(DType::Q4_0),
            TensorType::Q4_1 => Some(DType::Q4_1),
            TensorType::Q5_0 => Some(DType::Q5_0),
            TensorType::Q5_1 => Some(DType::Q5_1),
            TensorType::Q2_K => Some(DType::Q2_K),
            TensorType::Q3_K => Some(DType::Q3_K),
            TensorType::Q4_K => Some(DType::Q4_K),
            TensorType::Q5_K => Some(DType::Q5_K),
            TensorType::Q6_K => Some(DType::Q6_K),
            _ => None,
        }
    }

    /// True when [`dequantise`] can read it.
    pub const fn is_supported(self) -> bool {
        self.dtype().is_some()
    }

    /// Bytes of a row of `k` elements; `None` when `k` is not whole blocks.
    pub const fn row_bytes(self, k: u64) -> Option<u64> {
        if k.is_multiple_of(self.block_len() as u64) {
            (k / self.block_len() as u64).checked_mul(self.block_bytes() as u64)
        } else {
            None
        }
    }
}

impl From<DType> for TensorType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => TensorType::F32,
            DType::F16 => TensorType::F16,
            DType::Q8_0 => TensorType::Q8_0,
            DType::Q4_0 => TensorType::Q4_0,
            DType::Q4_1 => TensorType::Q4_1,
            DType::Q5_0 => TensorType::Q5_0,
            DType::Q5_1 => TensorType::Q5_1,
            DType::Q2_K => TensorType::Q2_K,
            DType::Q3_K => TensorType::Q3_K,
            DType::Q4_K => TensorType::Q4_K,
            DType::Q5_K => TensorType::Q5_K,
            DType::Q6_K => TensorType::Q6_K,
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A conversion that cannot be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QuantError {
    /// No reader or writer for this type.
    #[error("{ty} weights cannot be converted; supported: {SUPPORTED_NAMES}")]
    Unsupported {
        /// The type.
        ty: TensorType,
    },
    /// Not a whole number of blocks, or the two sides disagree.
    #[error("{ty}: {bytes} bytes do not hold {values} values (blocks of {} values in {} bytes)", ty.block_len(), ty.block_bytes())]
    Length {
        /// The type.
        ty: TensorType,
        /// Values on the f32 side.
        values: usize,
        /// Bytes on the stored side.
        bytes: usize,
    },
}

/// Blocks of `LEN` values in `BYTES` bytes, converted independently of each other.
trait Storage<const LEN: usize, const BYTES: usize> {
    /// Values of one block.
    fn decode(block: &[u8; BYTES]) -> [f32; LEN];
    /// Bytes of one block.
    fn encode(values: &[f32; LEN]) -> [u8; BYTES];
}

/// A quantised format: blocks of `LEN` weights in `BYTES` bytes, and where in them the codes and scales are.
///
/// # Source
/// `block_*` of `ggml-common.h` in the ggml project.
pub trait BlockFormat<const LEN: usize, const BYTES: usize> {
    /// The kernel type, which says what the codes mean.
    const DTYPE: DType;
    /// Codes and scales of one block.
    fn take_apart(block: &[u8; BYTES]) -> Parts<LEN>;
    /// The block of these parts: the inverse of [`BlockFormat::take_apart`].
    fn put_together(parts: &Parts<LEN>) -> [u8; BYTES];
    /// Codes and scales for `values`.
    fn quantise(values: &[f32; LEN]) -> Parts<LEN>;
}

impl<F: BlockFormat<LEN, BYTES>, const LEN: usize, const BYTES: usize> Storage<LEN, BYTES> for F {
    fn decode(block: &[u8; BYTES]) -> [f32; LEN] {
        let layout = const { BlockLayout::of(F::DTYPE).unwrap() };
        F::take_apart(block).values(&layout)
    }

    fn encode(values: &[f32; LEN]) -> [u8; BYTES] {
        F::put_together(&F::quantise(values))
    }
}

fn decode_all<F: Storage<LEN, BYTES>, const LEN: usize, const BYTES: usize>(
    bytes: &[u8],
    out: &mut [f32],
) -> Option<()> {
    let (blocks, rest) = bytes.as_chunks::<BYTES>();
    let (values, spare) = out.as_chunks_mut::<LEN>();
    if !rest.is_empty() || !spare.is_empty() || blocks.len() != values.len() {
        return None;
    }
    for (block, values) in blocks.iter().zip(values) {
        *values = F::decode(block);
    }
    Some(())
}

fn encode_all<F: Storage<LEN, BYTES>, const LEN: usize, const BYTES: usize>(
    values: &[f32],
    out: &mut Vec<u8>,
) -> Option<()> {
    let (blocks, rest) = values.as_chunks::<LEN>();
    if !rest.is_empty() {
        return None;
    }
    out.reserve(blocks.len() * BYTES);
    for block in blocks {
        out.extend_from_slice(&F::encode(block));
    }
    Some(())
}

/// Calls a generic function with the format of `$ty`; unsupported types return [`QuantError::Unsupported`].
macro_rules! with_format {
    ($ty:expr, $call:ident ( $($arg:expr),* )) => {
        match $ty {
            TensorType::F32 => $call::<plain::F32, 1, 4>($($arg),*),
            TensorType::F16 => $call::<plain::F16, 1, 2>($($arg),*),
            TensorType::BF16 => $call::<plain::Bf16, 1, 2>($($arg),*),
            TensorType::Q8_0 => $call::<Q8_0, 32, 34>($($arg),*),
            TensorType::Q4_0 => $call::<Q4_0, 32, 18>($($arg),*),
            TensorType::Q4_1 => $call::<Q4_1, 32, 20>($($arg),*),
            TensorType::Q5_0 => $call::<Q5_0, 32, 22>($($arg),*),
            TensorType::Q5_1 => $call::<Q5_1, 32, 24>($($arg),*),
            TensorType::Q2_K => $call::<Q2K, 256, 84>($($arg),*),
            TensorType::Q3_K => $call::<Q3K, 256, 110>($($arg),*),
            TensorType::Q4_K => $call::<Q4K, 256, 144>($($arg),*),
            TensorType::Q5_K => $call::<Q5K, 256, 176>($($arg),*),
            TensorType::Q6_K => $call::<Q6K, 256, 210>($($arg),*),
            ty => return Err(QuantError::Unsupported { ty }),
        }
    };
}

/// Converts whole blocks of `ty` into `out`, one `f32` per element.
///
/// # Errors
/// [`QuantError::Unsupported`], or [`QuantError::Length`] when `bytes` does not hold exactly `out.len()` values.
pub fn dequantise(ty: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    let (values, len) = (out.len(), bytes.len());
    with_format!(ty, decode_all(bytes, out)).ok_or(QuantError::Length { ty, values, bytes: len })
}

/// Appends `values` to `out` as blocks of `ty`; for all but the K types byte for byte what ggml's reference quantiser writes.
///
/// # Errors
/// [`QuantError::Unsupported`], or [`QuantError::Length`] when `values` are not whole blocks.
pub fn quantise(ty: TensorType, values: &[f32], out: &mut Vec<u8>) -> Result<(), QuantError> {
    with_format!(ty, encode_all(values, out)).ok_or(QuantError::Length { ty, values: values.len(), bytes: 0 })
}

#[cfg(test)]
mod tests;
