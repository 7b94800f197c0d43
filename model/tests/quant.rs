//! Every quantised type against the `gguf` Python package, bit for bit: `fixtures/quant.bin`, made by `fixtures/quant.py`.

use model::TensorType;
use model::gguf::Header;
use model::quant::{dequantise, quantise};

/// The next `len` bytes of `rest`.
fn take<'a>(rest: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (now, later) = rest.split_at(len);
    *rest = later;
    now
}

fn word(rest: &mut &[u8]) -> u32 {
    u32::from_le_bytes(take(rest, 4).try_into().unwrap())
}

#[test]
fn every_type_agrees_with_the_gguf_package() {
    let mut rest = &include_bytes!("fixtures/quant.bin")[..];
    let (mut read, mut written) = (Vec::new(), Vec::new());
    while !rest.is_empty() {
        let id = word(&mut rest);
        let ty = TensorType::from_id(id & !(1 << 31)).unwrap();
        let blocks = word(&mut rest) as usize;
        let bytes = take(&mut rest, blocks * ty.block_bytes() as usize);
        let values = take(&mut rest, blocks * ty.block_len() as usize * 4);
        let values: Vec<f32> = values.chunks_exact(4).map(|v| f32::from_le_bytes(v.try_into().unwrap())).collect();
        if id >> 31 == 0 {
            let mut got = vec![0.0; values.len()];
            dequantise(ty, bytes, &mut got).unwrap();
            for (i, (got, want)) in got.iter().zip(&values).enumerate() {
                assert_eq!(got.to_bits(), want.to_bits(), "{ty} element {i}: {got} instead of {want}");
            }
            read.push(ty.name());
        } else {
            let mut got = Vec::new();
            quantise(ty, &values, &mut got).unwrap();
            assert_eq!(got, bytes, "{ty}");
            written.push(ty.name());
        }
    }
    assert_eq!(read, ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]);
    assert_eq!(written, ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]);
}

/// Every tensor of a whole model: `BAREFLOW_GGUF` is the file, `BAREFLOW_GGUF_SUMS` what `fixtures/quant.py` printed for it.
#[test]
#[ignore = "needs BAREFLOW_GGUF and BAREFLOW_GGUF_SUMS"]
fn every_tensor_of_a_model_agrees_with_the_gguf_package() {
    let path = |variable| std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}"));
    let file = std::fs::read(path("BAREFLOW_GGUF")).unwrap();
    let sums: serde_json::Value = serde_json::from_slice(&std::fs::read(path("BAREFLOW_GGUF_SUMS")).unwrap()).unwrap();
    let header = Header::parse(&file, file.len() as u64).unwrap();
    let mut types = std::collections::BTreeMap::new();
    for tensor in &header.tensors {
        let bytes = &file[tensor.offset as usize..][..tensor.len_bytes as usize];
        let mut values = vec![0.0f32; tensor.dims.iter().product::<u64>() as usize];
        dequantise(tensor.ty, bytes, &mut values).unwrap();
        let sum = values
            .iter()
            .zip(1u64..)
            .fold(0u64, |sum, (value, number)| sum.wrapping_add(u64::from(value.to_bits()).wrapping_mul(number)));
        let expected = &sums[tensor.name];
        assert_eq!(expected[0], tensor.ty.name(), "{}", tensor.name);
        assert_eq!(expected[1], format!("{sum:016x}"), "{}: {}", tensor.name, tensor.ty);
        *types.entry(tensor.ty).or_insert(0) += 1;
    }
    assert_eq!(header.tensors.len(), sums.as_object().unwrap().len());
    eprintln!("tensors that agree: {types:?}");
}
