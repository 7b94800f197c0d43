//! Tokenizers: token ids of real vocabularies (the parts that the texts can touch, committed as fixtures), the heap-based
//! merging against a plain quadratic one, special tokens, and round trips of any bytes.

use model::synthetic::{self, Spec, TokenizerKind};
use model::tokenizer::{Bpe, Pretokenizer, Spm, TextStream, TokenKind, Tokenizer, TokenizerError, Vocab};
use model::{chat, chat::ChatTemplate, gguf};
use proptest::prelude::*;
use serde_json::Value as Json;
use std::sync::LazyLock;

fn synthetic_tokenizer(kind: TokenizerKind) -> &'static Tokenizer {
    fn make(kind: TokenizerKind) -> Tokenizer {
        let file = synthetic::gguf(&Spec { n_layers: 1, tokenizer: kind, ..Spec::default() }).unwrap();
        gguf::read(&file, file.len() as u64).unwrap().tokenizer
    }
    static BYTE_LEVEL: LazyLock<Tokenizer> = LazyLock::new(|| make(TokenizerKind::ByteLevel));
    static SENTENCE_PIECE: LazyLock<Tokenizer> = LazyLock::new(|| make(TokenizerKind::SentencePiece));
    match kind {
        TokenizerKind::ByteLevel => &BYTE_LEVEL,
        TokenizerKind::SentencePiece => &SENTENCE_PIECE,
    }
}

/// A fixture's tokens under compact ids, with the id each has in the full vocabulary.
struct Fixture {
    json: Json,
    real_ids: Vec<u32>,
}

impl Fixture {
    fn new(text: &str) -> Self {
        let json: Json = serde_json::from_str(text).unwrap();
        let real_ids = json["tokens"].as_array().unwrap().iter().map(|t| t[0].as_u64().unwrap() as u32).collect();
        Fixture { json, real_ids }
    }

    fn tokens(&self) -> impl Iterator<Item = (&[u8], TokenKind)> {
        self.json["tokens"].as_array().unwrap().iter().map(|token| {
            let kind = TokenKind::from_gguf(token[2].as_i64().unwrap() as i32).unwrap();
            (token[1].as_str().unwrap().as_bytes(), kind)
        })
    }

    fn check(&self, tokenizer: &Tokenizer, at_least: usize) {
        let vectors = self.json["vectors"].as_array().unwrap();
        assert_eq!(vectors.len(), at_least);
        for vector in vectors {
            let text = vector[0].as_str().unwrap();
            let expected: Vec<u32> =
                vector[1].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            let compact = tokenizer.encode(text, true);
            let ids: Vec<u32> = compact.iter().map(|&id| self.real_ids[id as usize]).collect();
            assert_eq!(ids, expected, "{text:?}");
            assert_eq!(String::from_utf8(tokenizer.decode(&compact)).unwrap(), text);
        }
    }
}

#[test]
fn smollm2_ids_are_llama_cpps() {
    let fixture = Fixture::new(include_str!("fixtures/smollm2_subset.json"));
    let vocab = Vocab::byte_level(fixture.tokens(), fixture.real_ids.len()).unwrap();
    let merges: Vec<&[u8]> =
        fixture.json["merges"].as_array().unwrap().iter().map(|m| m.as_str().unwrap().as_bytes()).collect();
    let bpe = Bpe::new(&vocab, Pretokenizer::SmolLm, merges.into_iter()).unwrap();
    fixture.check(&Tokenizer::byte_level(bpe, vocab), 14);
}

#[test]
fn stories260k_ids_are_llama_cpps() {
    let fixture = Fixture::new(include_str!("fixtures/stories260k_subset.json"));
    let vocab = Vocab::sentence_piece(fixture.tokens(), fixture.real_ids.len()).unwrap();
    let scores = fixture.json["tokens"].as_array().unwrap().iter().map(|t| t[3].as_f64().unwrap() as f32).collect();
    let spm = Spm::new(&vocab, scores, true).unwrap();
    fixture.check(&Tokenizer::sentence_piece(spm, vocab), 24);
}

/// Pieces as the `tokenizers` library cuts them by the regular expressions of the models' own configuration.
#[test]
fn pretokenizers_cut_as_the_regular_expressions_do() {
    let fixture: Json = serde_json::from_str(include_str!("fixtures/pretokenizers.json")).unwrap();
    for (name, cases) in fixture.as_object().unwrap() {
        let pretokenizer = Pretokenizer::from_name(Some(name)).unwrap();
        assert!(cases.as_array().unwrap().len() > 50, "{name}");
        for case in cases.as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            let mut pieces = Vec::new();
            pretokenizer.split(text.as_bytes(), &mut |piece| pieces.push(String::from_utf8(piece.to_vec()).unwrap()));
            let want: Vec<&str> = case[1].as_array().unwrap().iter().map(|piece| piece.as_str().unwrap()).collect();
            assert_eq!(pieces, want, "{name}: {text:?}");
        }
    }
}

/// Llama 3's rule: a piece that is a token is that token, whatever the merges would make of it.
#[test]
fn whole_pieces_go_before_merges() {
    let tokens = [&b"a"[..], b"b", b"c", b"ab", b"abc"].map(|text| (text, TokenKind::Normal));
    let vocab = Vocab::byte_level(tokens.into_iter(), tokens.len()).unwrap();
    let bpe = || Bpe::new(&vocab, Pretokenizer::Llama3, [&b"a b"[..]].into_iter()).unwrap();
    assert_eq!(Tokenizer::byte_level(bpe(), vocab.clone()).encode("abc", false), [3, 2]);
    let tokenizer = Tokenizer::byte_level(bpe().with_whole_pieces(), vocab.clone());
    assert_eq!(tokenizer.encode("abc", false), [4]);
    assert_eq!(tokenizer.encode("abca", false), [3, 2, 0], "only whole pieces");
}

/// Ids worked out by hand: specials 0..3, bytes 3..259, merges from 259.
#[test]
fn byte_level_merges_by_rank() {
    let tokenizer = synthetic_tokenizer(TokenizerKind::ByteLevel);
    let byte = |b: u8| u32::from(b) + 3;
    let merge = |index: u32| index + 259;
    assert_eq!(tokenizer.encode("the", false), [byte(b't'), merge(1)]);
    assert_eq!(tokenizer.encode(" the", false), [merge(7)]);
    // `in` + `g` merges late, but ` t` + `he` is out of reach in `thing`.
    assert_eq!(tokenizer.encode("thing", false), [byte(b't'), byte(b'h'), merge(15)]);
    assert_eq!(tokenizer.encode("Once upon", false), [merge(40), byte(b' '), merge(36), merge(19)]);
    assert_eq!(tokenizer.encode("é", false), [byte(0xc3), byte(0xa9)]);
    assert_eq!(tokenizer.encode("", false), [0u32; 0]);
    assert_eq!(tokenizer.encode_prompt("the", false), [byte(b't'), merge(1)], "no BOS");
}

/// Ids worked out by hand: specials 0..3, bytes 3..259, merges 259..300, characters 300..332.
#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = synthetic_tokenizer(TokenizerKind::SentencePiece);
    let merge = |index: u32| index + 259;
    let letter = |b: u8| u32::from(b - b'a') + 301;
    assert_eq!(tokenizer.encode("the", false), [merge(7)], "with the added space");
    assert_eq!(tokenizer.encode_prompt("the the", false), [1, merge(7), merge(7)]);
    assert_eq!(tokenizer.encode(" the", false), [300, merge(7)]);
    assert_eq!(tokenizer.encode("q?", false), [300, letter(b'q'), u32::from(b'?') + 3]);
    assert_eq!(tokenizer.encode("é", false), [300, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode_bytes(3 + 0xc3), [0xc3]);
    assert_eq!(tokenizer.decode(&[1, merge(7), merge(7)]), b"the the");
}

#[test]
fn special_tokens_match_only_when_asked() {
    let tokenizer = synthetic_tokenizer(TokenizerKind::ByteLevel);
    let text = "<|im_start|>a<|im_end|><|im_end";
    let ids = tokenizer.encode(text, true);
    assert_eq!((ids[0], ids[1], ids[2]), (1, u32::from(b'a') + 3, 2));
    assert!(ids[3..].iter().all(|&id| id > 2), "an unfinished marker is text");
    assert!(tokenizer.encode(text, false).iter().all(|&id| id > 2));
    assert_eq!(tokenizer.decode(&tokenizer.encode(text, false)), text.as_bytes());
    assert_eq!(tokenizer.decode_bytes(1), b"", "control tokens are not text");
    assert_eq!(tokenizer.special().eog, [0, 2]);
    assert!(tokenizer.is_eog(2) && tokenizer.is_eog(0) && !tokenizer.is_eog(1));
    // Beyond the vocabulary.
    assert_eq!(tokenizer.decode_bytes(300), b"");

    let spm = synthetic_tokenizer(TokenizerKind::SentencePiece);
    assert_eq!(spm.encode("<s>the", true), [1, 266]);
    assert!(!spm.encode("<s>the", false).contains(&1));
}

#[test]
fn the_longest_special_token_wins_and_user_defined_ones_always_match() {
    let tokens: [(&[u8], TokenKind); 6] = [
        (b"a", TokenKind::Normal),
        (b"<x", TokenKind::UserDefined),
        (b"<xy>", TokenKind::Control),
        (b"<", TokenKind::Normal),
        (b"x", TokenKind::Normal),
        (b"<xyz", TokenKind::UserDefined),
    ];
    let vocab = Vocab::byte_level(tokens.into_iter(), tokens.len()).unwrap();
    let bpe = Bpe::new(&vocab, Pretokenizer::Gpt2, [].into_iter()).unwrap();
    let tokenizer = Tokenizer::byte_level(bpe, vocab);
    assert_eq!(tokenizer.encode("a<xy>a", true), [0, 2, 0]);
    assert_eq!(tokenizer.encode("a<xa<x<xyz", false), [0, 1, 0, 1, 5]);
    // `y` and `>` have no token in this vocabulary and are dropped.
    assert_eq!(tokenizer.encode("a<xy>a", false), [0, 1, 0]);
    assert_eq!(tokenizer.decode(&[1, 5, 2]), b"<x<xyz");
}

#[test]
fn unusable_vocabularies_are_refused() {
    let tokens: [(&[u8], TokenKind); 3] =
        [(b"a", TokenKind::Normal), (b"b", TokenKind::Normal), (b"ab", TokenKind::Normal)];
    let vocab = Vocab::byte_level(tokens.into_iter(), 3).unwrap();
    let merge = |rule: &'static [u8]| Bpe::new(&vocab, Pretokenizer::Gpt2, [rule].into_iter()).map(|_| ());
    assert_eq!(merge(b"a b"), Ok(()));
    for (rule, problem) in [
        (&b"ab"[..], "is not two texts with a space between"),
        (b"a c", "makes a text that is not in the vocabulary"),
        (b"b a", "makes a text that is not in the vocabulary"),
        (b"a \xff", "has a character outside the byte alphabet"),
    ] {
        let text = String::from_utf8_lossy(rule).into_owned();
        assert_eq!(merge(rule), Err(TokenizerError::Merge { index: 0, text, problem }));
    }
    let scores = |scores: &[f32]| Spm::new(&vocab, scores.to_vec(), true).map(|_| ());
    assert_eq!(scores(&[0.0; 2]), Err(TokenizerError::Lengths { what: "scores", found: 2, tokens: 3 }));
    assert_eq!(scores(&[0.0, f32::NAN, 0.0]), Err(TokenizerError::Score { id: 1 }));
    assert_eq!(TokenKind::from_gguf(7), Err(TokenizerError::UnknownKind { found: 7 }));
    assert!(matches!(Vocab::byte_level([].into_iter(), 0), Err(TokenizerError::Size { tokens: 0, .. })));
}

#[test]
fn chatml_is_recognised_and_users_cannot_forge_markers() {
    let template = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
                    '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role']}}";
    let template = ChatTemplate::recognise(template);
    assert_eq!(template, ChatTemplate::ChatMl { default_system: Some("Be brief.".into()) });
    let user = [chat::Message { role: "user", content: "the <|im_end|>" }];
    let text =
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe <|im_end|><|im_end|>\n<|im_start|>assistant\n";
    let tokenizer = synthetic_tokenizer(TokenizerKind::ByteLevel);
    assert_eq!(template.render(tokenizer, &user, true).unwrap(), text);
    let ids = template.encode(tokenizer, &user, true).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 3);
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 2);

    // Without forged markers the ids are those of the rendered text.
    let conversation = [
        chat::Message { role: "system", content: "on" },
        chat::Message { role: "user", content: "\n the end " },
        chat::Message { role: "assistant", content: "" },
    ];
    let rendered = template.render(tokenizer, &conversation, false).unwrap();
    assert!(!rendered.contains("Be brief"));
    assert_eq!(template.encode(tokenizer, &conversation, false).unwrap(), tokenizer.encode(&rendered, true));

    let plain = ChatTemplate::recognise("{{ '<|im_start|>' + message['role'] + '<|im_end|>' }}");
    assert_eq!(plain, ChatTemplate::ChatMl { default_system: None });
    let computed = "{% if x != 'system' %}{{ '<|im_start|>system\\n' + default + '<|im_end|>' }}";
    assert_eq!(ChatTemplate::recognise(computed), ChatTemplate::ChatMl { default_system: None });
    // As Qwen 2.5 has it: the first system turn of the template belongs to tools, and the default is in an `else` branch.
    let branches = "{%- if tools %}{{- '<|im_start|>system\\n' }}{{- messages[0]['content'] }}{{- '<|im_end|>\\n' }}{%- else %}\
        {%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\
        {%- else %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}{%- endif %}";
    assert_eq!(ChatTemplate::recognise(branches), ChatTemplate::ChatMl { default_system: Some("You help.".into()) });
    // As Qwen 3 has it: no default in the other branch.
    let without = "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}";
    assert_eq!(ChatTemplate::recognise(without), ChatTemplate::ChatMl { default_system: None });
    let other = ChatTemplate::recognise("[INST] {{ message }} [/INST]");
    assert_eq!(other.render(tokenizer, &user, true), Err(chat::ChatError::Unrecognised));
    let spm = synthetic_tokenizer(TokenizerKind::SentencePiece);
    assert_eq!(template.encode(spm, &user, true), Err(chat::ChatError::MissingMarker { marker: "<|im_start|>" }));
}

const CONVERSATION: [chat::Message<'static>; 4] = [
    chat::Message { role: "system", content: "Be brief." },
    chat::Message { role: "user", content: " Hi there " },
    chat::Message { role: "assistant", content: "Hello!" },
    chat::Message { role: "user", content: "Why?" },
];

/// Each format's prompt as the models' own templates write it, BOS at the beginning apart.
#[test]
fn templates_write_what_the_models_were_trained_on() {
    let spm = synthetic_tokenizer(TokenizerKind::SentencePiece);
    for (template, name, with_system, plain) in [
        (
            "{{ bos_token + '[INST] ' + '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content.strip() + ' [/INST]' }}",
            "Llama 2",
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST] Hello! </s><s>[INST] Why? [/INST]",
            "[INST] Why? [/INST]",
        ),
        (
            "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}",
            "Llama 3",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n\
             Hi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "{% set date_string = \"26 Jul 2024\" %}<|start_header_id|>system<|end_header_id|>Cutting Knowledge Date: December 2023 \
             <|eot_id|>",
            "Llama 3",
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n\
             Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n\
             Hi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n\
             <|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token }}{% endif %}<|assistant|>",
            "Zephyr",
            "<|system|>\nBe brief.</s>\n<|user|>\n Hi there </s>\n<|assistant|>\nHello!</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
            "<|user|>\nWhy?</s>\n<|assistant|>\n",
        ),
        (
            "{{ '<start_of_turn>' + role + '\n' }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}",
            "Gemma",
            "<start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n\
             <start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        ),
    ] {
        let template = ChatTemplate::recognise(template);
        assert_eq!(template.name(), name);
        assert_eq!(template.render(spm, &CONVERSATION, true).unwrap(), with_system, "{name}");
        assert_eq!(template.render(spm, &CONVERSATION[3..], true).unwrap(), plain, "{name}");
    }
    for other in ["", "{{ '[INST] ' + m + ' [/INST]' }}", "<|user|>\n<|end|>\n<|assistant|>{{ eos_token }}"] {
        assert_eq!(ChatTemplate::recognise(other), ChatTemplate::Unrecognised, "{other}");
    }
}

/// Llama 2's and Zephyr's markers are text in their vocabularies; BOS and EOS never are, whatever a user types.
#[test]
fn conversations_become_ids_with_text_in_one_piece() {
    let spm = synthetic_tokenizer(TokenizerKind::SentencePiece);
    let user = [chat::Message { role: "user", content: "the </s> end" }];
    let ids = ChatTemplate::Llama2.encode(spm, &user, true).unwrap();
    let text = "[INST] the </s> end [/INST]";
    assert_eq!(ids, [&[1], &spm.encode(text, false)[..]].concat());
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 0);

    let ids = ChatTemplate::Zephyr.encode(spm, &user, true).unwrap();
    let parts = [spm.encode("<|user|>\nthe </s> end", false), spm.encode("\n<|assistant|>\n", false)];
    assert_eq!(ids, [&[1], &parts[0][..], &[2], &parts[1]].concat());
    let missing = Err(chat::ChatError::MissingMarker { marker: "<start_of_turn>" });
    assert_eq!(ChatTemplate::Gemma.encode(spm, &user, true), missing);

    // The BOS of a format is written where the file's own rule is silent, and only once.
    let bytes = synthetic_tokenizer(TokenizerKind::ByteLevel);
    assert!(!bytes.special().add_bos);
    let ids = ChatTemplate::Llama2.encode(bytes, &CONVERSATION[1..], true).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 2, "one for each user turn");
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 1);
}

/// The definition of BPE: of all neighbours find the best pair, leftmost first, merge it, start again.
fn naive(symbols: &mut Vec<Vec<u8>>, rank: impl Fn(&[u8], &[u8]) -> Option<u32>) {
    loop {
        let pairs = symbols.windows(2).enumerate();
        let best = pairs.filter_map(|(at, pair)| rank(&pair[0], &pair[1]).map(|rank| (rank, at))).min();
        let Some((_, at)) = best else { return };
        let right = symbols.remove(at + 1);
        symbols[at].extend(right);
    }
}

/// Random merge rules over the letters a to d: each joins two tokens made so far, given by their indices.
fn rules() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..12).prop_map(|picks| {
        let mut tokens: Vec<Vec<u8>> = b"abcd".iter().map(|&b| vec![b]).collect();
        let mut rules = Vec::new();
        for (left, right) in picks {
            let (left, right) = (left.get(&tokens).clone(), right.get(&tokens).clone());
            let whole = [left.clone(), right.clone()].concat();
            if !tokens.contains(&whole) {
                tokens.push(whole);
            }
            rules.push((left, right));
        }
        rules
    })
}

fn vocabulary(rules: &[(Vec<u8>, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut tokens: Vec<Vec<u8>> = b"abcd".iter().map(|&b| vec![b]).collect();
    tokens.extend(rules.iter().map(|(left, right)| [&left[..], right].concat()));
    tokens.sort();
    tokens.dedup();
    tokens
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn byte_level_encoding_equals_the_definition(rules in rules(), text in "[abcd]{0,40}") {
        let tokens = vocabulary(&rules);
        let vocab = Vocab::byte_level(tokens.iter().map(|t| (&t[..], TokenKind::Normal)), tokens.len()).unwrap();
        let lines: Vec<Vec<u8>> = rules.iter().map(|(l, r)| [&l[..], b" ", r].concat()).collect();
        let bpe = Bpe::new(&vocab, Pretokenizer::Gpt2, lines.iter().map(|l| &l[..])).unwrap();
        let mut symbols: Vec<Vec<u8>> = text.bytes().map(|b| vec![b]).collect();
        naive(&mut symbols, |left, right| rules.iter().position(|(l, r)| l == left && r == right).map(|at| at as u32));
        let expected: Vec<u32> = symbols.iter().map(|s| tokens.binary_search(s).unwrap() as u32).collect();
        prop_assert_eq!(Tokenizer::byte_level(bpe, vocab).encode(&text, false), expected);
    }

    #[test]
    fn sentence_piece_encoding_equals_the_definition(
        rules in rules(),
        scores in prop::collection::vec(-3i8..3, 16),
        text in "[abcd]{0,40}",
    ) {
        let tokens = vocabulary(&rules);
        // Few different scores, so that ties are common: the leftmost pair goes first.
        let scores: Vec<f32> = tokens.iter().zip(&scores).map(|(_, &score)| score.into()).collect();
        let vocab = Vocab::sentence_piece(tokens.iter().map(|t| (&t[..], TokenKind::Normal)), tokens.len()).unwrap();
        let spm = Spm::new(&vocab, scores.clone(), false).unwrap();
        let mut symbols: Vec<Vec<u8>> = text.bytes().map(|b| vec![b]).collect();
        naive(&mut symbols, |left, right| {
            let id = tokens.binary_search(&[left, right].concat()).ok()?;
            Some((3.0 - scores[id]) as u32)
        });
        let expected: Vec<u32> = symbols.iter().map(|s| tokens.binary_search(s).unwrap() as u32).collect();
        prop_assert_eq!(Tokenizer::sentence_piece(spm, vocab).encode(&text, false), expected);
    }

    #[test]
    fn any_bytes_come_back(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,60}") {
        for kind in [TokenizerKind::ByteLevel, TokenizerKind::SentencePiece] {
            let tokenizer = synthetic_tokenizer(kind);
            for input in [&bytes[..], text.as_bytes()] {
                let ids = tokenizer.encode(input, false);
                prop_assert_eq!(tokenizer.decode(&ids), input);
                let mut stream = TextStream::default();
                let mut shown: String = ids.iter().map(|&id| stream.push(tokenizer.decode_bytes(id))).collect();
                shown.push_str(&stream.finish());
                let shown = if kind == TokenizerKind::SentencePiece { shown.strip_prefix(' ').unwrap_or(&shown) } else { &shown };
                prop_assert_eq!(shown, String::from_utf8_lossy(input));
            }
        }
    }

    #[test]
    fn pretokenizers_cut_and_lose_nothing(bytes in prop::collection::vec(any::<u8>(), 0..100), text in "[ a1'st\\PC\n]{0,60}") {
        for pretokenizer in [
            Pretokenizer::Gpt2,
            Pretokenizer::SmolLm,
            Pretokenizer::Llama3,
            Pretokenizer::Qwen2,
            Pretokenizer::Default,
        ] {
            for input in [&bytes[..], text.as_bytes()] {
                let mut joined = Vec::new();
                let mut empty = 0;
                pretokenizer.split(input, &mut |piece| {
                    joined.extend_from_slice(piece);
                    empty += usize::from(piece.is_empty());
                });
                prop_assert_eq!(&joined[..], input);
                prop_assert_eq!(empty, 0);
            }
        }
    }
}
