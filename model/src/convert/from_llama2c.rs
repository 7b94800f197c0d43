//! A llama2.c model as GGUF.

use super::{Append, CHUNK_BYTES, ConvertError, Q8_0_LEN, ReadAt, Rewrite, Stored, Summary, Target};
use super::{set_file_type, write_file};
use crate::description::Tensor;
use crate::gguf::Writer;
use crate::llama2c;
use crate::quant::{TensorType, f16_to_f32, f32_to_f16};
use alloc::vec::Vec;

/// Writes the llama2.c model in `header` (a file of `file_bytes`) with its whole tokenizer file as a GGUF file of the model
/// `name`, which gives the same tokens.
///
/// Without a `target` every weight stays what the file says it is: F32, but for int8 matrices that are Q8_0 in other words
/// (groups of whole blocks, scales that are f16 numbers). Rows of queries and keys stay in their order: llama2.c turns the
/// pairs `(2i, 2i+1)`, as GGUF's llama does.
///
/// # Errors
/// As [`super::convert`]; [`ConvertError::Model`] also for a tokenizer file that does not fit.
pub fn convert_llama2c<E>(
    header: &[u8],
    file_bytes: u64,
    tokenizer_bin: &[u8],
    name: &str,
    target: Option<Target>,
    read: &mut ReadAt<'_, E>,
    write: &mut Append<'_, E>,
) -> Result<Summary, ConvertError<E>> {
    if let Some(target) = target {
        target.check()?;
    }
    let source = llama2c::read(header, file_bytes, tokenizer_bin)?;
    let pieces = llama2c::read_pieces(tokenizer_bin, source.config.vocab_size)?;
    let mut writer = Writer::new();
    writer.set_config(name, &source.config)?;
    llama2c::write_pieces(&pieces, &mut writer)?;

    let mut summary = Summary { converted: 0, copied: 0, kept: Vec::new(), written_bytes: 0 };
    let mut rewrites = Vec::with_capacity(source.tensors.len());
    for tensor in &source.tensors {
        let is_q8_0 = target.is_none() && is_q8_0(tensor, read)?;
        let wanted = match target {
            Some(target) => target.type_of(tensor.role),
            None if is_q8_0 => TensorType::Q8_0,
            None => TensorType::F32,
        };
        let (n, k) = (u64::from(tensor.n), u64::from(tensor.k));
        let ty = if wanted.row_bytes(k).is_some() { wanted } else { TensorType::F32 };
        let from = match tensor.group_len {
            Some(group_len) => Stored::Groups { group_len: group_len.into(), keep_codes: is_q8_0 },
            None => Stored::Rows { ty: TensorType::F32, row_bytes: 4 * k },
        };
        match tensor.group_len {
            _ if ty != wanted => summary.kept.push(tensor.name()),
            None if ty == TensorType::F32 => summary.copied += 1,
            _ => summary.converted += 1,
        }
        let dims: &[u64] = if tensor.role.is_vector() { &[k] } else { &[k, n] };
        writer.tensor(&tensor.name(), dims, ty)?;
        rewrites.push(Rewrite { name: tensor.name(), row_len: k, rows: n, offset: tensor.offset, from, ty });
    }
    let matrices = target.map_or_else(|| largest_type(&rewrites), |target| target.matrices);
    set_file_type(&mut writer, matrices)?;
    summary.written_bytes = write_file(&writer, &rewrites, read, write)?;
    Ok(summary)
}

/// The type of the most weights.
fn largest_type(rewrites: &[Rewrite]) -> TensorType {
    let weights = |ty: TensorType| -> u64 {
        rewrites.iter().filter(|rewrite| rewrite.ty == ty).map(|rewrite| rewrite.rows * rewrite.row_len).sum()
    };
    if weights(TensorType::Q8_0) > weights(TensorType::F32) { TensorType::Q8_0 } else { TensorType::F32 }
}

/// True when the int8 codes of `tensor` are those of Q8_0 blocks that stand for exactly the same weights.
fn is_q8_0<E>(tensor: &Tensor, read: &mut ReadAt<'_, E>) -> Result<bool, ConvertError<E>> {
    let Some(group_len) = tensor.group_len else { return Ok(false) };
    let block_len = Q8_0_LEN as u32;
    if !group_len.is_multiple_of(block_len) || !tensor.k.is_multiple_of(block_len) {
        return Ok(false);
    }
    let mut at = tensor.offset + tensor.elements();
    let mut bytes = Vec::new();
    while at < tensor.end() {
        bytes.resize((tensor.end() - at).min(CHUNK_BYTES as u64) as usize, 0);
        read(at, &mut bytes).map_err(ConvertError::Io)?;
        let mut scales = bytes.as_chunks().0.iter().map(|scale| f32::from_le_bytes(*scale));
        if !scales.all(|scale| f16_to_f32(f32_to_f16(scale)).to_bits() == scale.to_bits()) {
            return Ok(false);
        }
        at += bytes.len() as u64;
    }
    Ok(true)
}
