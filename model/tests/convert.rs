//! Converting a model: right numbers, right layout, right report.

use model::convert::{ConvertError, Summary, Target, convert, convert_llama2c};
use model::description::{Role, Tensor};
use model::gguf::{self, Header, Value, Writer};
use model::quant::{TensorType, dequantise, f16_to_f32, f32_to_f16, quantise};
use model::synthetic::{self, Llama2cFiles, Spec, TokenizerKind};
use model::{ModelDescription, ModelError, llama2c};

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

/// Converts the llama2.c model of `spec` without a target, after `change` to the model file.
fn from_llama2c(
    spec: &Spec,
    version: u32,
    target: Option<Target>,
    change: impl Fn(&mut Vec<u8>),
) -> (ModelDescription, Vec<u8>, ModelDescription, Vec<u8>, Summary) {
    let Llama2cFiles { mut model, tokenizer } = synthetic::llama2c_version(spec, version).unwrap();
    change(&mut model);
    let mut out = Vec::new();
    let summary = convert_llama2c::<&'static str>(
        &model[..model.len().min(256)],
        model.len() as u64,
        &tokenizer,
        "tiny",
        target,
        &mut |offset, buf| {
            buf.copy_from_slice(model.get(offset as usize..offset as usize + buf.len()).ok_or("outside the file")?);
            Ok(())
        },
        &mut |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        },
    )
    .unwrap();
    let source = llama2c::read(&model, model.len() as u64, &tokenizer).unwrap();
    (source, model, read(&out), out, summary)
}

fn llama2c_spec() -> Spec {
    Spec { tokenizer: TokenizerKind::SentencePiece, rope_base: 10_000.0, tied_head: false, ..Spec::default() }
}

/// The weights of a tensor, as its file says they are.
fn weights(tensor: &Tensor, file: &[u8]) -> Vec<f32> {
    let bytes = &file[tensor.offset as usize..tensor.end() as usize];
    let mut values = vec![0.0; tensor.elements() as usize];
    match tensor.group_len {
        None => dequantise(tensor.ty, bytes, &mut values).unwrap(),
        Some(group_len) => {
            let (codes, scales) = bytes.split_at(values.len());
            for (i, value) in values.iter_mut().enumerate() {
                let at = i / group_len as usize * 4;
                *value = f32::from(codes[i].cast_signed()) * f32::from_le_bytes(scales[at..at + 4].try_into().unwrap());
            }
        }
    }
    values
}

#[test]
fn llama2c_models_become_the_same_model_as_gguf() {
    for version in 0..=2 {
        for tied_head in [false, true] {
            let spec = Spec { tied_head, ..llama2c_spec() };
            let (source, model, gguf, file, summary) = from_llama2c(&spec, version, None, |_| {});
            assert_eq!(gguf.config, source.config, "version {version}");
            assert_eq!(gguf.name, "tiny");
            assert_eq!((summary.written_bytes, summary.kept.len()), (file.len() as u64, 0));
            assert_eq!(gguf.tensors.len(), source.tensors.len());
            // The scales of version 2 are no f16 numbers.
            assert_eq!(gguf.dtypes(), "f32");
            for tensor in &source.tensors {
                let other = gguf.tensor(tensor.role, tensor.layer).unwrap();
                let [expected, found] = [weights(tensor, &model), weights(other, &file)];
                assert!(expected.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", tensor.name());
                assert_eq!(expected.len(), found.len());
            }
            let [old, new] = [&source.tokenizer, &gguf.tokenizer];
            assert_eq!(new.special(), old.special());
            for text in ["Once upon a time", " two  spaces\n", "caf\u{e9} \u{2581} <s> </s>\u{0}", ""] {
                assert_eq!(new.encode_prompt(text, false), old.encode_prompt(text, false), "{text:?}");
                assert_eq!(new.encode_prompt(text, true), old.encode_prompt(text, true), "{text:?}");
            }
            for id in 0..source.config.vocab_size {
                assert_eq!(new.vocab().piece(id), old.vocab().piece(id), "token {id}");
                assert_eq!(new.vocab().kind(id), old.vocab().kind(id), "token {id}");
            }
        }
    }
}

#[test]
fn llama2c_int8_with_f16_scales_becomes_q8_0_as_it_is() {
    // Every scale rounded to an f16 number, and in one matrix a single one that is none.
    let round = |model: &mut Vec<u8>, but: Option<u64>| {
        let header = llama2c::Header::parse(model, model.len() as u64).unwrap();
        for tensor in header.tensors().0.iter().filter(|tensor| tensor.group_len.is_some()) {
            let scales = &mut model[(tensor.offset + tensor.elements()) as usize..tensor.end() as usize];
            for scale in scales.as_chunks_mut::<4>().0 {
                let rounded = f16_to_f32(f32_to_f16(f32::from_le_bytes(*scale)));
                *scale = rounded.to_le_bytes();
            }
            if but == Some(tensor.offset) {
                let last = scales.len() - 4;
                scales[last] |= 1;
            }
        }
    };
    let (source, model, gguf, file, _) = from_llama2c(&llama2c_spec(), 2, None, |model| round(model, None));
    assert_eq!(gguf.dtypes(), "q8_0");
    let same = |source: &ModelDescription, model: &[u8], gguf: &ModelDescription, file: &[u8]| {
        source
            .tensors
            .iter()
            .all(|tensor| weights(tensor, model) == weights(gguf.tensor(tensor.role, tensor.layer).unwrap(), file))
    };
    assert!(same(&source, &model, &gguf, &file));
    let header = Header::parse(&file, file.len() as u64).unwrap();
    assert_eq!(header.metadata.u32("general.file_type"), Ok(Some(7)));

    let up = source.tensor(Role::Up, Some(0)).unwrap().offset;
    let (source, model, gguf, file, _) = from_llama2c(&llama2c_spec(), 2, None, |model| round(model, Some(up)));
    assert_eq!(gguf.tensor(Role::Up, Some(0)).unwrap().ty, TensorType::F32);
    assert_eq!(gguf.dtypes(), "q8_0+f32");
    assert!(same(&source, &model, &gguf, &file));
}

#[test]
fn llama2c_models_are_converted_to_a_type_that_is_asked_for() {
    for version in [0, 2] {
        let target = Target { matrices: TensorType::Q4_0, embedding: TensorType::Q8_0 };
        let spec = Spec { hidden_dim: 176, ..llama2c_spec() };
        let (source, model, gguf, file, summary) = from_llama2c(&spec, version, Some(target), |_| {});
        let kept: Vec<String> = (0..spec.n_layers).map(|layer| format!("blk.{layer}.ffn_down.weight")).collect();
        assert_eq!(summary.kept, kept, "176 is no whole number of blocks");
        for tensor in source.tensors.iter().filter(|tensor| !tensor.role.is_vector() && tensor.role != Role::Down) {
            let other = gguf.tensor(tensor.role, tensor.layer).unwrap();
            let mut expected = Vec::new();
            quantise(other.ty, &weights(tensor, &model), &mut expected).unwrap();
            assert!(file[other.offset as usize..other.end() as usize] == expected, "{}", tensor.name());
        }
        assert_eq!(gguf.tensor(Role::TokenEmbedding, None).unwrap().ty, TensorType::Q8_0);
    }
}
