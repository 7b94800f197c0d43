//! Converting a model: right numbers, right layout, right report.

use model::convert::{ConvertError, Summary, Target, convert};
use model::description::Role;
use model::gguf::{self, Header, Value, Writer};
use model::quant::{TensorType, dequantise, quantise};
use model::synthetic::{self, Spec, TokenizerKind};
use model::{ModelDescription, ModelError};

fn run(file: &[u8], header_len: usize, target: Target) -> Result<(Vec<u8>, Summary), ConvertError<&'static str>> {
    let mut out = Vec::new();
    let summary = convert(
        &file[..header_len],
        file.len() as u64,
        target,
        &mut |offset, buf| {
            let source = file.get(offset as usize..offset as usize + buf.len()).ok_or("outside the file")?;
            buf.copy_from_slice(source);
            Ok(())
        },
        &mut |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        },
    )?;
    Ok((out, summary))
}

fn read(file: &[u8]) -> ModelDescription {
    gguf::read(file, file.len() as u64).unwrap()
}

#[test]
fn converting_equals_making_the_model_in_that_type() {
    use TensorType::*;
    let small = Spec { tied_head: false, ..Spec::default() };
    // K types need rows of whole super-blocks.
    let wide = Spec { dim: 256, hidden_dim: 256, n_layers: 1, n_heads: 8, head_dim: 32, ..small.clone() };
    converts_between(small, &[F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1]);
    converts_between(wide, &[F32, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K]);
}

fn converts_between(spec: Spec, types: &[TensorType]) {
    let source = synthetic::gguf(&spec).unwrap();
    for &matrices in types {
        for &embedding in types {
            let overrides = vec![(Role::TokenEmbedding, embedding), (Role::Output, embedding)];
            let expected = synthetic::gguf(&Spec { matrices, overrides, ..spec.clone() }).unwrap();
            let (file, summary) = run(&source, source.len(), Target { matrices, embedding }).unwrap();
            let (converted, made) = (read(&file), read(&expected));
            assert_eq!(summary.written_bytes, file.len() as u64);
            assert_eq!((summary.converted + summary.copied, summary.kept.len()), (made.tensors.len(), 0));
            assert_eq!(converted.config, made.config);
            assert_eq!(converted.dtypes(), made.dtypes());
            for tensor in &made.tensors {
                let other = converted.tensor(tensor.role, tensor.layer).unwrap();
                assert_eq!(other.ty, tensor.ty);
                assert_eq!(
                    file[other.offset as usize..other.end() as usize],
                    expected[tensor.offset as usize..tensor.end() as usize],
                    "{} as {matrices}/{embedding}",
                    tensor.name()
                );
            }
        }
    }
}

#[test]
fn metadata_is_kept_and_the_file_type_is_brought_up_to_date() {
    let mut writer = Writer::new().with_alignment(128).unwrap();
    writer.set("general.file_type", Value::U32(0)).unwrap();
    writer.set("x.note", Value::String("kept")).unwrap();
    let source = synthetic::gguf_with(writer, &Spec::default()).unwrap();
    let (file, _) = run(&source, source.len(), Target::uniform(TensorType::Q8_0)).unwrap();
    let header = Header::parse(&file, file.len() as u64).unwrap();
    let old = Header::parse(&source, source.len() as u64).unwrap();
    assert_eq!(header.alignment, 128);
    assert_eq!(header.metadata.u32("general.file_type"), Ok(Some(7)));
    assert_eq!(header.metadata.u32("general.quantization_version"), Ok(Some(2)));
    for (key, value) in old.metadata.iter().filter(|(key, _)| *key != "general.file_type") {
        assert_eq!(header.metadata.get(key), Some(value), "{key}");
    }
    let (again, summary) = run(&file, file.len(), Target::uniform(TensorType::Q8_0)).unwrap();
    assert_eq!(summary.converted, 0);
    assert_eq!(read(&again).tensors, read(&file).tensors);
}

/// From one quantised type to another, by way of f32, in more than one chunk.
#[test]
fn large_quantised_tensors_are_converted_in_chunks() {
    let spec = Spec {
        dim: 1024,
        head_dim: 256,
        hidden_dim: 1056,
        n_layers: 1,
        matrices: TensorType::Q8_0,
        tokenizer: TokenizerKind::SentencePiece,
        ..Spec::default()
    };
    assert!(4 * spec.dim as usize * spec.hidden_dim as usize > 4 * model::convert::CHUNK_BYTES);
    let source = synthetic::gguf(&spec).unwrap();
    let (file, _) = run(&source, source.len(), Target::uniform(TensorType::Q4_0)).unwrap();
    let (old, new) = (read(&source), read(&file));
    for tensor in old.tensors.iter().filter(|t| !t.role.is_vector()) {
        let mut values = vec![0.0; tensor.n as usize * tensor.k as usize];
        dequantise(tensor.ty, &source[tensor.offset as usize..tensor.end() as usize], &mut values).unwrap();
        let mut expected = Vec::new();
        quantise(TensorType::Q4_0, &values, &mut expected).unwrap();
        let other = new.tensor(tensor.role, tensor.layer).unwrap();
        assert!(file[other.offset as usize..other.end() as usize] == expected, "{}", tensor.name());
    }
}

#[test]
fn rows_that_are_not_whole_blocks_keep_their_type_and_are_reported() {
    let source = synthetic::gguf(&Spec { hidden_dim: 172, n_layers: 1, ..Spec::default() }).unwrap();
    let (file, summary) = run(&source, source.len(), Target::uniform(TensorType::Q4_1)).unwrap();
    assert_eq!(summary.kept, ["blk.0.ffn_down.weight"]);
    assert_eq!(read(&file).dtypes(), "f32+q4_1");
}

#[test]
fn failures_are_typed() {
    let source = synthetic::gguf(&Spec::default()).unwrap();
    let q4 = Target::uniform(TensorType::Q4_0);
    assert!(matches!(run(&source, 1000, q4), Err(ConvertError::Model(ModelError::Truncated { .. }))));
    assert_eq!(
        run(&source, source.len(), Target::uniform(TensorType::Q8_K)).unwrap_err(),
        ConvertError::Target { ty: TensorType::Q8_K }
    );
    let mut written = 0;
    let error = convert(&source, source.len() as u64, q4, &mut |_, _| Err("read failed"), &mut |bytes| {
        written += bytes.len();
        Ok(())
    });
    assert_eq!(error, Err(ConvertError::Io("read failed")));
    assert!(written > 0);
    let error = convert(&source, source.len() as u64, q4, &mut |_, _| Ok(()), &mut |_| Err("disk full"));
    assert_eq!(error, Err(ConvertError::Io("disk full")));
}
