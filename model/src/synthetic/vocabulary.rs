//! The fixed vocabularies of the synthetic models: 41 merges over all bytes.

use crate::gguf::{Value, WriteError, Writer};
use crate::tokenizer::{TokenKind, char_of};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Tokenizer of a synthetic model.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TokenizerKind {
    /// 300 tokens: `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, all bytes, 41 merges. Pre-tokenizer `smollm`, no BOS, ChatML.
    ByteLevel,
    /// 332 tokens: `<unk>`, `<s>`, `</s>`, all bytes, the same 41 merges, 32 characters. BOS, added space.
    SentencePiece,
}

/// Texts that merge, best first; each part is a byte or an earlier result.
const MERGES: [(&str, &str); 41] = [
    (" ", "t"),
    ("h", "e"),
    (" ", "a"),
    ("i", "n"),
    (" ", "s"),
    (" ", "w"),
    ("n", "d"),
    (" t", "he"),
    ("e", "d"),
    (" t", "o"),
    (" ", "b"),
    (" a", "nd"),
    (" ", "h"),
    ("r", "e"),
    ("o", "u"),
    ("in", "g"),
    (" ", "f"),
    (" w", "a"),
    ("l", "l"),
    ("o", "n"),
    (" ", "o"),
    ("i", "t"),
    ("e", "r"),
    (" h", "e"),
    (" ", "d"),
    ("i", "s"),
    (" ", "m"),
    ("o", "m"),
    ("a", "t"),
    (" ", "c"),
    (" wa", "s"),
    ("o", "r"),
    (" ", "l"),
    ("e", "n"),
    ("l", "e"),
    (" ", "p"),
    ("u", "p"),
    ("m", "e"),
    ("c", "e"),
    ("O", "n"),
    ("On", "ce"),
];

/// Characters that are tokens of their own in the SentencePiece vocabulary.
const CHARACTERS: &str = " abcdefghijklmnopqrstuvwxyz.,!'O";

/// Tokens before the bytes, in either vocabulary.
const SPECIAL: usize = 3;

/// One token of a SentencePiece vocabulary: its text with plain spaces, score and kind.
struct Piece {
    text: String,
    score: f32,
    kind: TokenKind,
}

impl TokenizerKind {
    /// Tokens in the vocabulary.
    pub fn vocab_size(self) -> u32 {
        let tokens = match self {
            TokenizerKind::ByteLevel => SPECIAL + 256 + MERGES.len(),
            TokenizerKind::SentencePiece => SPECIAL + 256 + MERGES.len() + CHARACTERS.len(),
        };
        tokens as u32
    }

    pub(super) fn write_gguf(self, writer: &mut Writer) -> Result<(), WriteError> {
        match self {
            TokenizerKind::ByteLevel => write_byte_level(writer),
            TokenizerKind::SentencePiece => write_sentence_piece(writer),
        }
    }

    /// `tokenizer.bin` of the SentencePiece vocabulary.
    pub(super) fn llama2c_file(self) -> Vec<u8> {
        let pieces = pieces();
        let longest = pieces.iter().map(|piece| piece.text.len()).max().unwrap_or(0) as u32;
        let mut out = Vec::from(longest.to_le_bytes());
        for piece in pieces {
            // As llama2.c's exporter writes them.
            let text = if piece.kind == TokenKind::Control { format!("\n{}\n", piece.text) } else { piece.text };
            out.extend(piece.score.to_le_bytes());
            out.extend((text.len() as u32).to_le_bytes());
            out.extend(text.bytes());
        }
        out
    }
}

fn write_byte_level(writer: &mut Writer) -> Result<(), WriteError> {
    let alphabet = |text: &str| text.bytes().map(char_of).collect::<String>();
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(ToString::to_string).into();
    tokens.extend((0..=255).map(|byte| char_of(byte).to_string()));
    tokens.extend(MERGES.iter().map(|(left, right)| alphabet(&[*left, *right].concat())));
    let merges: Vec<String> = MERGES.iter().map(|(l, r)| format!("{} {}", alphabet(l), alphabet(r))).collect();
    let kind = |id| if id < SPECIAL { TokenKind::Control } else { TokenKind::Normal };
    let kinds: Vec<i32> = (0..tokens.len()).map(|id| kind(id).to_gguf()).collect();

    writer.set("tokenizer.ggml.model", Value::String("gpt2"))?;
    writer.set("tokenizer.ggml.pre", Value::String("smollm"))?;
    writer.set_strings("tokenizer.ggml.tokens", &tokens)?;
    writer.set_i32s("tokenizer.ggml.token_type", &kinds)?;
    writer.set_strings("tokenizer.ggml.merges", &merges)?;
    writer.set("tokenizer.ggml.bos_token_id", Value::U32(1))?;
    writer.set("tokenizer.ggml.eos_token_id", Value::U32(2))?;
    writer.set("tokenizer.ggml.unknown_token_id", Value::U32(0))?;
    writer.set("tokenizer.ggml.add_bos_token", Value::Bool(false))?;
    writer.set(
        "tokenizer.chat_template",
        Value::String(
            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + \
             '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ),
    )
}

fn pieces() -> Vec<Piece> {
    let mut out = Vec::new();
    let mut push = |text: String, score: f32, kind| out.push(Piece { text, score, kind });
    push("<unk>".to_string(), 0.0, TokenKind::Unknown);
    push("<s>".to_string(), 0.0, TokenKind::Control);
    push("</s>".to_string(), 0.0, TokenKind::Control);
    for byte in 0..=255u8 {
        push(format!("<0x{byte:02X}>"), 0.0, TokenKind::Byte);
    }
    for (rank, (left, right)) in MERGES.iter().enumerate() {
        push([*left, *right].concat(), -(rank as f32), TokenKind::Normal);
    }
    for (rank, character) in CHARACTERS.chars().enumerate() {
        push(character.to_string(), -((MERGES.len() + rank) as f32), TokenKind::Normal);
    }
    out
}

fn write_sentence_piece(writer: &mut Writer) -> Result<(), WriteError> {
    let pieces = pieces();
    let texts: Vec<String> = pieces.iter().map(|piece| piece.text.replace(' ', "\u{2581}")).collect();
    let scores: Vec<f32> = pieces.iter().map(|piece| piece.score).collect();
    let kinds: Vec<i32> = pieces.iter().map(|piece| piece.kind.to_gguf()).collect();
    writer.set("tokenizer.ggml.model", Value::String("llama"))?;
    writer.set_strings("tokenizer.ggml.tokens", &texts)?;
    writer.set_f32s("tokenizer.ggml.scores", &scores)?;
    writer.set_i32s("tokenizer.ggml.token_type", &kinds)?;
    writer.set("tokenizer.ggml.bos_token_id", Value::U32(1))?;
    writer.set("tokenizer.ggml.eos_token_id", Value::U32(2))?;
    writer.set("tokenizer.ggml.unknown_token_id", Value::U32(0))
}
