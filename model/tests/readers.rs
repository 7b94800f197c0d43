//! What the readers do with files that are cut, changed or wrong: a typed error, never a panic, never a wrong model.

use model::description::Role;
use model::gguf::{Header, Value, WriteError, Writer};
use model::quant::TensorType;
use model::synthetic::{self, Spec, TokenizerKind};
use model::tokenizer::TokenizerError;
use model::{Architecture, ModelDescription, ModelError, formats, gguf, llama2c};
use proptest::prelude::*;
use std::sync::LazyLock;

fn tiny() -> Spec {
    Spec { n_layers: 1, ..Spec::default() }
}

fn tiny_file() -> Vec<u8> {
    static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| synthetic::gguf(&tiny()).unwrap());
    FILE.clone()
}

fn read(file: &[u8]) -> Result<ModelDescription, ModelError> {
    gguf::read(file, file.len() as u64)
}

/// A file like [`tiny_file`] whose metadata and tensors went through `metadata` and `tensor` on the way.
/// `metadata` returns `None` to leave a key out; `tensor` may change name, dimensions and type.
fn rewritten(
    metadata: impl Fn(&str, Value<'static>) -> Option<Value<'static>>,
    tensor: impl Fn(&str, &[u64], TensorType) -> Changed,
    add: &[(&str, Value<'static>)],
) -> Vec<u8> {
    rewritten_file(tiny_file(), metadata, tensor, add)
}

fn rewritten_from(file: Vec<u8>, key: &str, value: Value<'static>) -> Vec<u8> {
    rewritten_file(file, |k, v| Some(if k == key { value } else { v }), same, &[])
}

fn rewritten_file(
    file: Vec<u8>,
    metadata: impl Fn(&str, Value<'static>) -> Option<Value<'static>>,
    tensor: impl Fn(&str, &[u64], TensorType) -> Changed,
    add: &[(&str, Value<'static>)],
) -> Vec<u8> {
    let source: &'static [u8] = file.leak();
    let header = Header::parse(source, source.len() as u64).unwrap();
    let mut writer = Writer::new();
    for (key, value) in header.metadata.iter() {
        if let Some(value) = metadata(key, value) {
            writer.set(key, value).unwrap();
        }
    }
    for &(key, value) in add {
        writer.set(key, value).unwrap();
    }
    let mut sizes = Vec::new();
    for info in &header.tensors {
        if let Some((name, dims, ty)) = tensor(info.name, &info.dims[..info.n_dims], info.ty) {
            let index = writer.tensor(&name, &dims, ty).unwrap();
            sizes.push(vec![0; writer.tensor_bytes(index) as usize]);
        }
    }
    writer.file(|index| &sizes[index]).unwrap()
}

/// Name, dimensions and type of a rewritten tensor; `None` leaves it out.
type Changed = Option<(String, Vec<u64>, TensorType)>;

fn same(name: &str, dims: &[u64], ty: TensorType) -> Changed {
    Some((name.to_string(), dims.to_vec(), ty))
}

fn with_value(key: &'static str, value: Value<'static>) -> ModelError {
    read(&rewritten(|k, v| Some(if k == key { value } else { v }), same, &[])).unwrap_err()
}

fn without(key: &'static str) -> Result<ModelDescription, ModelError> {
    read(&rewritten(|k, v| (k != key).then_some(v), same, &[]))
}

fn with_extra(key: &'static str, value: Value<'static>) -> Result<ModelDescription, ModelError> {
    read(&rewritten(|_, v| Some(v), same, &[(key, value)]))
}

#[test]
fn every_truncated_header_asks_for_more_and_every_truncated_file_is_refused() {
    let file = tiny_file();
    let len = file.len() as u64;
    let data_offset = Header::parse(&file, len).unwrap().data_offset;
    let directory_end = (0..).find(|&cut| gguf::read(&file[..cut], len).is_ok()).unwrap();
    assert!(data_offset - (directory_end as u64) < 32);
    for cut in 0..directory_end {
        match gguf::read(&file[..cut], len).unwrap_err() {
            ModelError::Truncated { need_bytes, have_bytes, at_byte } => {
                assert_eq!(have_bytes, cut as u64);
                assert!(at_byte <= have_bytes && need_bytes > have_bytes && need_bytes <= directory_end as u64);
            }
            other => panic!("cut at {cut}: {other}"),
        }
        // The same bytes as a whole file.
        match gguf::read(&file[..cut], cut as u64).unwrap_err() {
            ModelError::FileEnds { need_bytes, file_bytes, .. } => {
                assert!(need_bytes > file_bytes && file_bytes == cut as u64);
            }
            other => panic!("file of {cut} bytes: {other}"),
        }
    }
    for cut in [data_offset, len - 1] {
        let error = gguf::read(&file[..cut as usize], cut).unwrap_err();
        assert!(matches!(error, ModelError::OutsideFile { file_bytes, .. } if file_bytes == cut), "{error}");
    }
}

#[test]
fn following_need_bytes_always_arrives() {
    let file = tiny_file();
    let mut have = 0;
    for attempts in 0.. {
        assert!(attempts < 5000);
        match gguf::read(&file[..have], file.len() as u64) {
            Ok(model) => {
                assert_eq!(model.config, tiny().config());
                break;
            }
            Err(ModelError::Truncated { need_bytes, .. }) => have = need_bytes as usize,
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn versions_and_alignments() {
    let spec = tiny();
    let v2 = synthetic::gguf_with(Writer::new().with_version_2(), &spec).unwrap();
    assert_eq!(read(&v2).unwrap().format, model::Format::Gguf { version: 2 });
    for alignment in [1, 64, 4096] {
        let file = synthetic::gguf_with(Writer::new().with_alignment(alignment).unwrap(), &spec).unwrap();
        let model = read(&file).unwrap();
        assert!(model.tensors.iter().all(|t| t.offset.is_multiple_of(alignment.into())), "{alignment}");
    }
    for (bytes, version) in [([1, 0, 0, 0], 1), ([4, 0, 0, 0], 4), ([0, 0, 0, 3], 3)] {
        let mut file = tiny_file();
        file[4..8].copy_from_slice(&bytes);
        let error = read(&file).unwrap_err();
        assert!(
            matches!(error, ModelError::UnsupportedVersion { format: "GGUF", found, .. } if found == version),
            "{error}"
        );
    }
    assert!(matches!(with_extra("general.alignment", Value::U32(24)), Err(ModelError::InvalidValue { .. })));
}

#[test]
fn huge_counts_are_refused_before_any_allocation() {
    let file = tiny_file();
    for at in [8, 16] {
        let mut file = file.clone();
        file[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(read(&file), Err(ModelError::FileEnds { need_bytes: u64::MAX, .. })));
    }
    // The length of the token array: key, type, element type, then the count.
    let key = b"tokenizer.ggml.tokens";
    let at = file.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 8;
    for count in [u64::MAX, 1 << 61, file.len() as u64] {
        let mut file = file.clone();
        file[at..at + 8].copy_from_slice(&count.to_le_bytes());
        assert!(matches!(read(&file), Err(ModelError::FileEnds { .. })), "{count}");
    }
}

#[test]
fn metadata_errors_name_the_key_and_what_was_expected() {
    let missing = |key: &str| match without(Box::leak(key.to_string().into_boxed_str())).unwrap_err() {
        ModelError::MissingKey { key, .. } => key,
        other => panic!("{other}"),
    };
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ] {
        assert_eq!(missing(key), key);
    }
    assert_eq!(
        with_value("llama.block_count", Value::String("two")),
        ModelError::WrongType {
            key: "llama.block_count".into(),
            expected: "an integer from 0 to 4294967295",
            found: "a string (\"two\")".into()
        }
    );
    assert!(matches!(with_value("llama.block_count", Value::I32(-1)), ModelError::WrongType { .. }));
    assert_eq!(
        with_value("general.architecture", Value::String("mamba")),
        ModelError::UnsupportedArchitecture { found: "mamba".into(), supported: "llama, qwen2, qwen3, gemma3, gpt2" }
    );
    for (key, value) in [
        ("llama.attention.head_count_kv", Value::U32(3)),
        ("llama.attention.head_count", Value::U32(0)),
        ("llama.rope.dimension_count", Value::U32(18)),
        ("llama.rope.freq_base", Value::F32(f32::NAN)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(0.0)),
        ("llama.vocab_size", Value::U32(301)),
        ("llama.block_count", Value::U32(u32::MAX)),
        ("llama.embedding_length", Value::U32(u32::MAX)),
    ] {
        let error = with_value(key, value);
        assert!(matches!(error, ModelError::InvalidValue { .. }), "{key}: {error}");
    }
    assert!(matches!(with_value("llama.attention.value_length", Value::U32(8)), ModelError::UnsupportedFeature { .. }));
}

#[test]
fn optional_keys_default_as_the_format_says() {
    let model = without("llama.rope.freq_base").unwrap();
    assert_eq!(model.config.rope_base, 10_000.0);
    assert_eq!(without("llama.rope.dimension_count").unwrap().config.rope_dim, 16);
    assert_eq!(without("llama.vocab_size").unwrap().config.vocab_size, 300);
    // Integers of any width are integers.
    let wide = rewritten(|k, v| Some(if k == "llama.block_count" { Value::U64(1) } else { v }), same, &[]);
    assert_eq!(read(&wide).unwrap().config.n_layers, 1);
    // No head_count_kv means as many as query heads, which these tensors do not have.
    assert!(matches!(without("llama.attention.head_count_kv"), Err(ModelError::WrongShape { .. })));
}

#[test]
fn features_that_would_change_results_are_refused() {
    for (key, value) in [
        ("llama.expert_count", Value::U32(8)),
        ("llama.rope.scaling.type", Value::String("yarn")),
        ("llama.rope.scaling.attn_factor", Value::F32(1.2)),
        ("llama.final_logit_softcapping", Value::F32(30.0)),
        ("llama.attention.sliding_window_pattern", Value::U32(6)),
    ] {
        assert!(matches!(with_extra(key, value), Err(ModelError::UnsupportedFeature { .. })), "{key}");
    }
    assert!(with_extra("llama.rope.scaling.type", Value::String("none")).is_ok());
    assert_eq!(with_extra("llama.rope.scale_linear", Value::F32(4.0)).unwrap().config.rope_scale, 0.25);
    assert_eq!(with_extra("llama.rope.scaling.factor", Value::F32(8.0)).unwrap().config.rope_scale, 0.125);
    let windowed = with_extra("llama.attention.sliding_window", Value::U32(100)).unwrap().config;
    assert_eq!((windowed.window, windowed.layer_window(0)), (100, Some(100)));
    let spec = Spec { window: 16, ..Spec::of(Architecture::Qwen2) };
    let file = synthetic::gguf(&spec).unwrap();
    assert!(matches!(read(&file), Err(ModelError::UnsupportedFeature { found, .. }) if found == "16"));
    assert!(with_extra("some.other.key", Value::F64(1.0)).is_ok());
}

/// The rules for BOS and for leading spaces come from the file, and where it is silent from the family.
#[test]
fn tokenizer_rules_come_from_the_metadata() {
    const PRE: &str = "tokenizer.ggml.pre";
    const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
    let with_pre = |pre: &'static str, add_bos: bool| {
        let change = |key: &str, value| match key {
            PRE => Some(Value::String(pre)),
            // What the synthetic file says is left out or kept.
            ADD_BOS => add_bos.then_some(value),
            _ => Some(value),
        };
        read(&rewritten(change, same, &[])).unwrap().tokenizer
    };
    assert!(with_pre("llama-bpe", false).special().add_bos, "Llama 3 begins with BOS");
    assert!(!with_pre("llama-bpe", true).special().add_bos, "the file said no");
    assert!(!with_pre("qwen2", false).special().add_bos);
    assert!(!with_pre("gpt-2", false).special().add_bos);
    // Llama 3's rule also changes ids: `thing` is no token, ` the` is one and stays one.
    assert_eq!(with_pre("llama-bpe", true).encode(" the", false), with_pre("qwen2", true).encode(" the", false));
    let unknown = with_value(PRE, Value::String("tekken"));
    assert!(unknown.to_string().starts_with("tokenizer: `tokenizer.ggml.pre` is `tekken`; supported: gpt-2,"));

    let writer = || {
        let mut writer = Writer::new();
        writer.set("tokenizer.ggml.add_space_prefix", Value::Bool(false)).unwrap();
        writer.set("tokenizer.ggml.eot_token_id", Value::U32(7)).unwrap();
        writer
    };
    let file = synthetic::gguf_with(writer(), &Spec::of(Architecture::Gemma3)).unwrap();
    let tokenizer = read(&file).unwrap().tokenizer;
    assert_eq!(tokenizer.encode("the the", false).len(), tokenizer.encode(" the", false).len() + 2);
    assert_eq!(tokenizer.decode(&tokenizer.encode(" the", false)), b" the", "no space is taken off");
    assert_eq!(tokenizer.special().eog, [2, 7]);
    // Where the file names another end of text, a token that looks like one (`</s>`, 2) does not end anything.
    let spec = Spec { tokenizer: TokenizerKind::SentencePiece, ..tiny() };
    let other_eos = rewritten_from(synthetic::gguf(&spec).unwrap(), "tokenizer.ggml.eos_token_id", Value::U32(9));
    assert_eq!(read(&other_eos).unwrap().tokenizer.special().eog, [9]);
    assert_eq!(tokenizer.describe(), "SentencePiece BPE (without added space), 332 tokens");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever the file's rules are, every byte comes back.
    #[test]
    fn any_bytes_come_back_under_any_rules(bytes in prop::collection::vec(any::<u8>(), 0..100), text in "[ a1'S\\PC\r\n]{0,60}") {
        static TOKENIZERS: std::sync::LazyLock<Vec<model::Tokenizer>> = std::sync::LazyLock::new(|| {
            let with_pre = |pre: &'static str| {
                let change = |key: &str, value| Some(if key == "tokenizer.ggml.pre" { Value::String(pre) } else { value });
                read(&rewritten(change, same, &[])).unwrap().tokenizer
            };
            let mut writer = Writer::new();
            writer.set("tokenizer.ggml.add_space_prefix", Value::Bool(false)).unwrap();
            let file = synthetic::gguf_with(writer, &Spec::of(Architecture::Gemma3)).unwrap();
            let names = ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"];
            names.map(with_pre).into_iter().chain([read(&file).unwrap().tokenizer]).collect()
        });
        for tokenizer in TOKENIZERS.iter() {
            for input in [&bytes[..], text.as_bytes()] {
                prop_assert_eq!(tokenizer.decode(&tokenizer.encode(input, false)), input);
            }
        }
    }
}

#[test]
fn tensor_errors_name_the_tensor() {
    let change =
        |tensor: fn(&str, &[u64], TensorType) -> Changed| read(&rewritten(|_, v| Some(v), tensor, &[])).unwrap_err();
    assert_eq!(
        change(|n, d, t| same(n, d, t).filter(|_| !n.contains("attn_k") && n != "output_norm.weight")),
        ModelError::MissingTensors { names: vec!["output_norm.weight".into(), "blk.0.attn_k.weight".into()], count: 2 }
    );
    assert_eq!(
        change(|n, d, t| same(if n == "blk.0.ffn_up.weight" { "blk.0.ffn_up.bias" } else { n }, d, t)),
        ModelError::UnexpectedTensor { tensor: "blk.0.ffn_up.bias".into(), architecture: "llama" }
    );
    assert_eq!(
        change(|n, d, t| same(if n == "blk.0.ffn_up.weight" { "blk.1.ffn_up.weight" } else { n }, d, t)),
        ModelError::UnexpectedTensor { tensor: "blk.1.ffn_up.weight".into(), architecture: "llama" }
    );
    assert_eq!(
        change(|n, d, t| same(n, if n == "blk.0.attn_v.weight" { &[64, 64] } else { d }, t)),
        ModelError::WrongShape { tensor: "blk.0.attn_v.weight".into(), expected: vec![64, 32], found: vec![64, 64] }
    );
    assert_eq!(
        change(|n, d, t| same(n, d, if n == "blk.0.attn_v.weight" { TensorType::IQ4_NL } else { t })),
        ModelError::UnsupportedTensorType {
            tensor: "blk.0.attn_v.weight".into(),
            found: "IQ4_NL",
            supported: model::quant::SUPPORTED_NAMES
        }
    );
    assert!(matches!(
        change(|n, d, t| same(n, d, if n == "output_norm.weight" { TensorType::F16 } else { t })),
        ModelError::UnsupportedTensorType { found: "F16", .. }
    ));
}

/// Edits of the directory line of `blk.0.attn_q.weight`: after its name come 4 bytes count, 2 x 8 dimensions, type, offset.
#[test]
fn directory_lines_that_lie_are_refused() {
    let file = tiny_file();
    let name = b"blk.0.attn_q.weight";
    let at = file.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    let edit = |offset: usize, bytes: &[u8]| {
        let mut file = file.clone();
        file[at + offset..at + offset + bytes.len()].copy_from_slice(bytes);
        read(&file).unwrap_err()
    };
    let offset = u64::from_le_bytes(file[at + 24..at + 32].try_into().unwrap());
    assert!(matches!(edit(0, &[5]), ModelError::InvalidValue { .. }));
    assert!(matches!(edit(4, &[0; 8]), ModelError::InvalidValue { .. }));
    assert!(matches!(edit(4, &[0xff; 16]), ModelError::InvalidValue { .. }));
    assert!(matches!(edit(20, &[200]), ModelError::UnknownTensorType { found: 200, .. }));
    assert!(matches!(edit(24, &(offset + 1).to_le_bytes()), ModelError::Misaligned { alignment: 32, .. }));
    assert!(matches!(edit(24, &(offset + 32).to_le_bytes()), ModelError::Overlap { .. }));
    assert!(matches!(edit(24, &(1u64 << 40).to_le_bytes()), ModelError::OutsideFile { .. }));
    assert!(matches!(edit(24, &(u64::MAX - 31).to_le_bytes()), ModelError::OutsideFile { .. }));
    let mut twice = file.clone();
    twice[at - name.len()..at].copy_from_slice(b"blk.0.attn_k.weight");
    assert_eq!(read(&twice).unwrap_err(), ModelError::Duplicate { what: "tensor", name: "blk.0.attn_k.weight".into() });
}

#[test]
fn tokenizer_errors_reach_the_caller() {
    let unknown = with_value("tokenizer.ggml.pre", Value::String("tekken"));
    assert!(unknown.to_string().contains("`tokenizer.ggml.pre` is `tekken`; supported: gpt-2, phi-2"), "{unknown}");
    let kind = |error| match error {
        ModelError::Tokenizer(error) => *error,
        other => panic!("{other}"),
    };
    assert_eq!(
        kind(with_value("tokenizer.ggml.model", Value::String("t5"))),
        TokenizerError::UnsupportedModel { found: "t5".into() }
    );
    assert_eq!(
        kind(with_value("tokenizer.ggml.eos_token_id", Value::U32(300))),
        TokenizerError::SpecialOutside { name: "eos", id: 300, tokens: 300 }
    );
    // 4294967295 is how converters write "none".
    let none =
        rewritten(|k, v| Some(if k == "tokenizer.ggml.bos_token_id" { Value::U32(u32::MAX) } else { v }), same, &[]);
    assert_eq!(read(&none).unwrap().tokenizer.special().bos, None);
}

#[test]
fn writer_refuses_what_cannot_be_read() {
    let mut writer = Writer::new();
    writer.set("a", Value::U8(1)).unwrap();
    assert_eq!(writer.set("a", Value::U8(2)), Err(WriteError::Duplicate { what: "metadata key", name: "a".into() }));
    for dims in [&[][..], &[0], &[33, 2], &[32, 1, 1, 1, 1], &[1 << 40, 1 << 40]] {
        assert!(matches!(writer.tensor("t", dims, TensorType::Q8_0), Err(WriteError::Shape { .. })), "{dims:?}");
    }
    writer.tensor("t", &[32], TensorType::Q8_0).unwrap();
    assert!(matches!(writer.tensor("t", &[32], TensorType::Q8_0), Err(WriteError::Duplicate { .. })));
    assert!(matches!(writer.file(|_| &[0; 33]), Err(WriteError::Data { expected_bytes: 34, found_bytes: 33, .. })));
}

fn llama2c_files() -> synthetic::Llama2cFiles {
    static FILES: LazyLock<synthetic::Llama2cFiles> =
        LazyLock::new(|| synthetic::llama2c(&Spec { tokenizer: TokenizerKind::SentencePiece, ..tiny() }).unwrap());
    FILES.clone()
}

#[test]
fn llama2c_files_of_the_wrong_length_or_version_are_refused() {
    let files = llama2c_files();
    let len = files.model.len() as u64;
    let read = |header: &[u8], len| llama2c::read(header, len, &files.tokenizer);
    assert!(read(&files.model[..28], len).is_ok());
    for cut in 0..28 {
        let truncated = read(&files.model[..cut], len).unwrap_err();
        assert!(matches!(truncated, ModelError::Truncated { have_bytes, .. } if have_bytes == cut as u64));
    }
    assert!(matches!(read(&files.model, len - 4), Err(ModelError::FileEnds { .. })));
    assert!(matches!(read(&files.model, len + 4), Err(ModelError::TrailingBytes { .. })));
    let mut versioned = files.model.clone();
    versioned[..8].copy_from_slice(&[0x32, 0x34, 0x6b, 0x61, 3, 0, 0, 0]);
    assert!(matches!(read(&versioned, len), Err(ModelError::UnsupportedVersion { format: "llama2.c", found: 3, .. })));
    for cut in 0..files.tokenizer.len() {
        let error = llama2c::read(&files.model, len, &files.tokenizer[..cut]).unwrap_err();
        assert!(matches!(error, ModelError::FileEnds { .. }), "tokenizer cut at {cut}: {error}");
    }
    let mut longer = files.tokenizer.clone();
    longer.push(0);
    assert!(matches!(llama2c::read(&files.model, len, &longer), Err(ModelError::TrailingBytes { .. })));
}

/// The order of `export.py`, written out: the synthetic writer shares the reader's own table and cannot check it.
#[test]
fn llama2c_weights_lie_where_the_format_says() {
    let spec = Spec { tied_head: false, tokenizer: TokenizerKind::SentencePiece, n_layers: 2, ..tiny() };
    let files = synthetic::llama2c(&spec).unwrap();
    let model = llama2c::read(&files.model, files.model.len() as u64, &files.tokenizer).unwrap();
    let (dim, hidden, vocab, kv, seq_len, head_dim) = (64, 96, 332, 32, 256, 16);
    let mut at = 28;
    let mut expected = vec![(Role::TokenEmbedding, None, at)];
    at += 4 * vocab * dim;
    for (role, floats) in [
        (Role::AttnNorm, dim),
        (Role::Q, dim * dim),
        (Role::K, kv * dim),
        (Role::V, kv * dim),
        (Role::AttnOut, dim * dim),
        (Role::FfnNorm, dim),
        (Role::Gate, hidden * dim),
        (Role::Down, dim * hidden),
        (Role::Up, hidden * dim),
    ] {
        for layer in 0..2 {
            expected.push((role, Some(layer), at));
            at += 4 * floats;
        }
    }
    expected.push((Role::OutputNorm, None, at));
    at += 4 * dim + 2 * 4 * seq_len * (head_dim / 2);
    expected.push((Role::Output, None, at));
    let found: Vec<_> = model.tensors.iter().map(|t| (t.role, t.layer, t.offset)).collect();
    assert_eq!(found, expected);
    assert_eq!(model.file_bytes, at + 4 * vocab * dim);
}

/// Tensors of `Spec::default()` as versions 1 and 2 order them: role, layers, elements of one layer.
fn llama2c_order(tied_head: bool) -> [(Role, u32, u64); 12] {
    let (dim, hidden, vocab, kv) = (64, 96, 332, 32);
    [
        (Role::AttnNorm, 2, dim),
        (Role::FfnNorm, 2, dim),
        (Role::OutputNorm, 1, dim),
        (Role::TokenEmbedding, 1, vocab * dim),
        (Role::Q, 2, dim * dim),
        (Role::K, 2, kv * dim),
        (Role::V, 2, kv * dim),
        (Role::AttnOut, 2, dim * dim),
        (Role::Gate, 2, hidden * dim),
        (Role::Down, 2, dim * hidden),
        (Role::Up, 2, hidden * dim),
        (Role::Output, if tied_head { 0 } else { 1 }, vocab * dim),
    ]
}

/// As `version1_export` of `export.py` writes it.
#[test]
fn llama2c_version_1_lies_where_the_format_says() {
    for tied_head in [true, false] {
        let spec = Spec { tied_head, tokenizer: TokenizerKind::SentencePiece, n_layers: 2, ..tiny() };
        let files = synthetic::llama2c_version(&spec, 1).unwrap();
        let len = files.model.len() as u64;
        let model = llama2c::read(&files.model[..64], len, &files.tokenizer).unwrap();
        assert_eq!(model.format, model::Format::Llama2c { version: 1 });
        assert_eq!(model.config, spec.config());
        let mut at = 256;
        let mut expected = Vec::new();
        for (role, layers, elements) in llama2c_order(tied_head) {
            for layer in 0..layers {
                expected.push((role, role.is_per_layer().then_some(layer), at));
                at += 4 * elements;
            }
        }
        let found: Vec<_> = model.tensors.iter().map(|t| (t.role, t.layer, t.offset)).collect();
        assert_eq!(found, expected);
        assert_eq!(len, at);
        for cut in [8, 36] {
            let error = llama2c::read(&files.model[..cut], len, &files.tokenizer).unwrap_err();
            assert!(matches!(error, ModelError::Truncated { .. }), "{cut}: {error}");
        }
        let mut nonsense = files.model.clone();
        nonsense[8..12].fill(0xff);
        assert!(matches!(llama2c::read(&nonsense, len, &files.tokenizer), Err(ModelError::UnknownFormat { .. })));
    }
}

/// As `version2_export` of `export.py` writes it.
#[test]
fn llama2c_version_2_lies_where_the_format_says() {
    for tied_head in [true, false] {
        let spec = Spec { tied_head, tokenizer: TokenizerKind::SentencePiece, n_layers: 2, ..tiny() };
        let files = synthetic::llama2c_version(&spec, 2).unwrap();
        let len = files.model.len() as u64;
        let read = |header: &[u8], len| llama2c::read(header, len, &files.tokenizer);
        let model = read(&files.model[..64], len).unwrap();
        assert_eq!(model.format, model::Format::Llama2c { version: 2 });
        assert_eq!(model.config, spec.config());
        let mut at = 256;
        let mut expected = Vec::new();
        for (role, layers, elements) in llama2c_order(tied_head) {
            for layer in 0..layers {
                let is_norm = role.is_vector();
                let (ty, group_len) = if is_norm { (TensorType::F32, None) } else { (TensorType::I8, Some(32)) };
                expected.push((role, role.is_per_layer().then_some(layer), ty, group_len, at));
                at += if is_norm { 4 * elements } else { elements + 4 * (elements / 32) };
            }
        }
        let found: Vec<_> = model.tensors.iter().map(|t| (t.role, t.layer, t.ty, t.group_len, t.offset)).collect();
        assert_eq!(found, expected);
        assert_eq!(len, at);
        for cut in [8, 36, 37, 40] {
            let error = read(&files.model[..cut], len).unwrap_err();
            assert!(matches!(error, ModelError::Truncated { .. }), "{cut}: {error}");
        }
        assert!(matches!(read(&files.model, len - 1), Err(ModelError::FileEnds { .. })));
        assert!(matches!(read(&files.model, len + 1), Err(ModelError::TrailingBytes { .. })));
        // 64 divides every matrix, 48 divides some, 2^20 none; the last two are read as negative numbers.
        let with_groups = |size: u32| {
            let mut changed = files.model.clone();
            changed[37..41].copy_from_slice(&size.to_le_bytes());
            read(&changed, len).unwrap_err()
        };
        assert!(matches!(with_groups(64), ModelError::TrailingBytes { .. }));
        for size in [48, 1 << 20, 0, u32::MAX, 1 << 31] {
            let error = with_groups(size);
            let found = size.cast_signed().to_string();
            assert!(
                matches!(&error, ModelError::InvalidValue { key, found: f, .. } if key == "group_size" && *f == found),
                "{size}: {error}"
            );
        }
    }
}

#[test]
fn formats_are_told_apart() {
    use formats::FileFormat;
    let gguf_file = tiny_file();
    assert_eq!(formats::sniff(&gguf_file[..28], gguf_file.len() as u64), Ok(FileFormat::Gguf));
    let bin = llama2c_files().model;
    assert_eq!(formats::sniff(&bin[..37], bin.len() as u64), Ok(FileFormat::Llama2c));
    for other in [&b"\x7fELF\x02\x01\x01\0"[..], b"PK\x03\x04aaaa", b"{\"model\":", &[0; 64], &[0xff; 64]] {
        let mut file = other.to_vec();
        file.resize(64, b' ');
        let error = formats::sniff(&file, 64).unwrap_err();
        assert_eq!(error, ModelError::UnknownFormat { first_bytes: file[..8].try_into().unwrap() });
    }
}

#[test]
fn names_map_to_roles_and_back() {
    // As in files by other programs.
    for (name, role, layer) in [
        ("token_embd.weight", Role::TokenEmbedding, None),
        ("output_norm.weight", Role::OutputNorm, None),
        ("output.weight", Role::Output, None),
        ("blk.0.attn_norm.weight", Role::AttnNorm, Some(0)),
        ("blk.1.attn_q.weight", Role::Q, Some(1)),
        ("blk.2.attn_k.weight", Role::K, Some(2)),
        ("blk.3.attn_v.weight", Role::V, Some(3)),
        ("blk.4.attn_output.weight", Role::AttnOut, Some(4)),
        ("blk.5.ffn_norm.weight", Role::FfnNorm, Some(5)),
        ("blk.6.ffn_gate.weight", Role::Gate, Some(6)),
        ("blk.7.ffn_up.weight", Role::Up, Some(7)),
        ("blk.29.ffn_down.weight", Role::Down, Some(29)),
        ("position_embd.weight", Role::PositionEmbedding, None),
        ("output_norm.bias", Role::OutputNormBias, None),
        ("rope_freqs.weight", Role::RopeFactors, None),
        ("blk.0.attn_norm.bias", Role::AttnNormBias, Some(0)),
        ("blk.0.attn_qkv.weight", Role::Qkv, Some(0)),
        ("blk.0.attn_qkv.bias", Role::QkvBias, Some(0)),
        ("blk.0.attn_q.bias", Role::QBias, Some(0)),
        ("blk.0.attn_k.bias", Role::KBias, Some(0)),
        ("blk.0.attn_v.bias", Role::VBias, Some(0)),
        ("blk.0.attn_q_norm.weight", Role::QNorm, Some(0)),
        ("blk.0.attn_k_norm.weight", Role::KNorm, Some(0)),
        ("blk.0.attn_output.bias", Role::AttnOutBias, Some(0)),
        ("blk.0.post_attention_norm.weight", Role::AttnPostNorm, Some(0)),
        ("blk.0.ffn_norm.bias", Role::FfnNormBias, Some(0)),
        ("blk.0.ffn_up.bias", Role::UpBias, Some(0)),
        ("blk.0.ffn_down.bias", Role::DownBias, Some(0)),
        ("blk.0.post_ffw_norm.weight", Role::FfnPostNorm, Some(0)),
    ] {
        assert_eq!(Role::from_tensor_name(name), Some((role, layer)), "{name}");
    }
    for role in Role::ALL {
        let layer = role.is_per_layer().then_some(17);
        assert_eq!(Role::from_tensor_name(&role.tensor_name(layer)), Some((role, layer)));
        let wrong = if layer.is_none() { Some(17) } else { None };
        assert_eq!(Role::from_tensor_name(&role.tensor_name(wrong)), None, "{role:?}");
    }
    for name in [
        "",
        ".weight",
        "output",
        "blk.0.ffn_gate.bias",
        "blk.00.attn_q.weight",
        "blk.+1.attn_q.weight",
        "blk.0.output.weight",
        "blk.99999999999.attn_q.weight",
        "attn_q.weight",
    ] {
        assert_eq!(Role::from_tensor_name(name), None, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any damage to the header gives a description or an error; whatever is described lies inside the file.
    #[test]
    fn damaged_gguf_headers_never_panic(
        damage in prop::collection::vec((0usize..16384, any::<u8>()), 1..6),
        cut in prop::option::of(0usize..16384),
    ) {
        let mut file = tiny_file();
        for (at, byte) in damage {
            if let Some(target) = file.get_mut(at) {
                *target = byte;
            }
        }
        let len = file.len() as u64;
        if let Ok(model) = gguf::read(&file[..cut.unwrap_or(file.len()).min(file.len())], len) {
            prop_assert!(model.tensors.iter().all(|t| t.end() <= len));
            model.tokenizer.encode("Once upon a time <|im_end|>", true);
        }
    }

    #[test]
    fn damaged_llama2c_files_never_panic(
        damage in prop::collection::vec((0usize..28, any::<u8>()), 0..4),
        tokenizer_damage in prop::collection::vec((0usize..6000, any::<u8>()), 0..6),
    ) {
        let mut files = llama2c_files();
        for (at, byte) in damage {
            files.model[at] = byte;
        }
        for (at, byte) in tokenizer_damage {
            if let Some(target) = files.tokenizer.get_mut(at) {
                *target = byte;
            }
        }
        if let Ok(model) = llama2c::read(&files.model[..28], files.model.len() as u64, &files.tokenizer) {
            model.tokenizer.encode("Once upon a time", true);
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), gguf_magic: bool) {
        let mut bytes = bytes;
        if gguf_magic && bytes.len() >= 8 {
            bytes[..8].copy_from_slice(b"GGUF\x03\0\0\0");
        }
        let len = bytes.len() as u64;
        prop_assert!(gguf::read(&bytes, len).is_err());
        let _ = formats::sniff(&bytes, len);
        let _ = llama2c::read_tokenizer(&bytes, 4);
    }

    /// Whatever is written is read back.
    #[test]
    fn metadata_round_trips(
        integer: i64, number: f32, flag: bool, text in "\\PC{0,20}",
        strings in prop::collection::vec("\\PC{0,9}", 0..5), numbers in prop::collection::vec(any::<f32>(), 0..5),
    ) {
        let mut writer = Writer::new();
        writer.set("i", Value::I64(integer)).unwrap();
        writer.set("n", Value::F32(number)).unwrap();
        writer.set("b", Value::Bool(flag)).unwrap();
        writer.set("t", Value::String(&text)).unwrap();
        writer.set_strings("s", &strings).unwrap();
        writer.set_f32s("f", &numbers).unwrap();
        let file = writer.header();
        let header = Header::parse(&file, file.len() as u64).unwrap();
        prop_assert_eq!(header.metadata.get("i"), Some(Value::I64(integer)));
        prop_assert_eq!(header.metadata.f32("n").unwrap().unwrap().to_bits(), number.to_bits());
        prop_assert_eq!(header.metadata.bool("b"), Ok(Some(flag)));
        prop_assert_eq!(header.metadata.str("t"), Ok(Some(text.as_str())));
        let read: Vec<&[u8]> = header.metadata.strings("s").unwrap().unwrap().collect();
        prop_assert!(read.iter().zip(&strings).all(|(a, b)| *a == b.as_bytes()) && read.len() == strings.len());
        let read: Vec<u32> = header.metadata.f32s("f").unwrap().unwrap().iter().map(|f| f.to_bits()).collect();
        prop_assert_eq!(read, numbers.iter().map(|f| f.to_bits()).collect::<Vec<_>>());
    }
}
