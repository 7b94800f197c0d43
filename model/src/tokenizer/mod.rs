//! Text to token ids and back, by the rules the model file states.
//!
//! Input: bytes (any bytes; UTF-8 in practice) -> [`Tokenizer::encode`] -> ids; id -> [`Tokenizer::decode_bytes`] ->
//! bytes -> [`TextStream`] -> whole characters. Two families: byte-level BPE ([`Bpe`], after a [`Pretokenizer`]) and
//! SentencePiece BPE with scores and byte fallback ([`Spm`]). Both merge with a heap, O(n log n) in the text.
//! Not here: normalisation (no supported model uses any), unigram and WordPiece models.

mod alphabet;
mod bpe;
mod merge;
mod pretokenize;
mod spm;
mod stop;
mod stream;
mod unicode;
mod vocab;

pub(crate) use alphabet::char_of;
pub use bpe::Bpe;
pub use pretokenize::Pretokenizer;
pub use spm::Spm;
pub use stop::StopStrings;
pub use stream::TextStream;
pub(crate) use vocab::parse_byte_token;
pub use vocab::{TokenKind, Vocab};

use crate::order::sorted_by_key;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Texts of tokens that end a generation whatever the metadata says, provided the file marks them as special.
const END_OF_GENERATION: [&str; 10] = [
    "<|im_end|>",
    "<|eot|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
];

/// Why a tokenizer cannot be built.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A tokenizer family this crate does not implement.
    #[error("`tokenizer.ggml.model` is `{found}`; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)")]
    UnsupportedModel {
        /// Name found.
        found: String,
    },
    /// A pre-tokenizer this crate does not implement.
    #[error("`tokenizer.ggml.pre` is `{found}`; supported: {supported}")]
    UnsupportedPretokenizer {
        /// Name found.
        found: String,
        /// Names known.
        supported: &'static str,
    },
    /// A token kind outside the format.
    #[error("token type {found} does not exist (0 to 6); the file is damaged")]
    UnknownKind {
        /// Value found.
        found: i32,
    },
    /// Two per-token arrays of different length.
    #[error("`{what}` has {found} entries for {tokens} tokens; convert the model again")]
    Lengths {
        /// Array.
        what: &'static str,
        /// Its length.
        found: usize,
        /// Tokens in the vocabulary.
        tokens: usize,
    },
    /// No tokens, or more than ids can number.
    #[error(
        "a vocabulary of {tokens} tokens in {text_bytes} bytes cannot be used; expected 1 to 2^24 tokens in less than 4 GiB"
    )]
    Size {
        /// Tokens.
        tokens: usize,
        /// Bytes of their texts.
        text_bytes: usize,
    },
    /// A merge rule that does not fit the vocabulary.
    #[error("merge {index} (`{text}`) {problem}; the file is damaged")]
    Merge {
        /// Index in the list.
        index: usize,
        /// The rule.
        text: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A score that cannot be ordered.
    #[error("the score of token {id} is not a number; the file is damaged")]
    Score {
        /// Token.
        id: usize,
    },
    /// A special token id outside the vocabulary.
    #[error("special token `{name}` has id {id}, the vocabulary has {tokens} tokens; convert the model again")]
    SpecialOutside {
        /// Which one.
        name: &'static str,
        /// Its id.
        id: u32,
        /// Tokens in the vocabulary.
        tokens: usize,
    },
}

/// Special tokens and the rules for adding them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Stands for what the vocabulary cannot express.
    pub unknown: Option<u32>,
    /// [`Tokenizer::encode_prompt`] begins with `bos`.
    pub add_bos: bool,
    /// [`Tokenizer::encode_prompt`] ends with `eos`.
    pub add_eos: bool,
    /// Every token that ends a generation, ascending.
    pub eog: Vec<u32>,
}

#[derive(Clone, Debug)]
enum Model {
    ByteLevel(Bpe),
    SentencePiece(Spm),
}

/// A model's tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    model: Model,
    special: SpecialTokens,
}

impl Tokenizer {
    /// A byte-level BPE tokenizer; `bpe` was built from the same `vocab`.
    pub fn byte_level(bpe: Bpe, vocab: Vocab) -> Self {
        let mut tokenizer = Tokenizer { vocab, model: Model::ByteLevel(bpe), special: SpecialTokens::default() };
        tokenizer.add_known_ends();
        tokenizer
    }

    /// A SentencePiece BPE tokenizer; `spm` was built from the same `vocab`. `<s>`, `</s>` and the token of unknown
    /// kind are taken from the vocabulary, and prompts begin with `<s>`, until [`Tokenizer::set_special`] says otherwise.
    pub fn sentence_piece(spm: Spm, vocab: Vocab) -> Self {
        let special = SpecialTokens {
            bos: vocab.special_id("<s>"),
            eos: vocab.special_id("</s>"),
            unknown: vocab.unknown(),
            add_bos: true,
            add_eos: false,
            eog: Vec::new(),
        };
        let mut tokenizer = Tokenizer { vocab, model: Model::SentencePiece(spm), special };
        tokenizer.special.eog.extend(tokenizer.special.eos);
        tokenizer.add_known_ends();
        tokenizer
    }

    /// Special tokens and rules.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// Replaces the special tokens. `eos` and the well-known end tokens of the vocabulary join `eog` by themselves.
    ///
    /// # Errors
    /// [`TokenizerError::SpecialOutside`].
    pub fn set_special(&mut self, special: SpecialTokens) -> Result<(), TokenizerError> {
        let named = [("bos", special.bos), ("eos", special.eos), ("unknown", special.unknown)];
        let named = named.into_iter().filter_map(|(name, id)| id.map(|id| (name, id)));
        for (name, id) in named.chain(special.eog.iter().map(|&id| ("end of generation", id))) {
            if id as usize >= self.vocab.len() {
                return Err(TokenizerError::SpecialOutside { name, id, tokens: self.vocab.len() });
            }
        }
        self.special = special;
        self.special.eog.extend(self.special.eos);
        self.add_known_ends();
        Ok(())
    }

    fn add_known_ends(&mut self) {
        let eog = &mut self.special.eog;
        eog.extend(END_OF_GENERATION.iter().filter_map(|text| self.vocab.special_id(text)));
        *eog = sorted_by_key(eog, |&id| id);
        eog.dedup();
    }

    /// Tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// Id of the special token with exactly this text.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.vocab.special_id(text)
    }

    /// The family and its rules in words, such as `byte-level BPE (llama3), 128256 tokens`.
    pub fn describe(&self) -> String {
        let tokens = self.vocab.len();
        match &self.model {
            Model::ByteLevel(bpe) => format!("byte-level BPE ({}), {tokens} tokens", bpe.pretokenizer().name()),
            Model::SentencePiece(spm) => {
                let space = if spm.adds_space() { "with" } else { "without" };
                format!("SentencePiece BPE ({space} added space), {tokens} tokens")
            }
        }
    }

    /// True when `id` ends a generation.
    pub fn is_eog(&self, id: u32) -> bool {
        self.special.eog.binary_search(&id).is_ok()
    }

    /// Ids of `text` alone, without BOS or EOS.
    ///
    /// With `special`, texts of control tokens (`<|im_start|>`) become those tokens; otherwise they are plain text, which
    /// is the right choice for anything a user typed. Tokens the file calls user-defined always match.
    /// Bytes that the vocabulary has no token for become the unknown token (SentencePiece) or are dropped (byte-level
    /// vocabularies that lack a byte; none lacks a printable one), as in the reference implementations.
    pub fn encode(&self, text: impl AsRef<[u8]>, special: bool) -> Vec<u32> {
        let text = text.as_ref();
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        let mut from = 0;
        let mut at = 0;
        while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
            match self.vocab.longest_special(rest, special) {
                Some((id, len)) => {
                    self.encode_plain(text.get(from..at).unwrap_or_default(), &mut ids);
                    ids.push(id);
                    at += len;
                    from = at;
                }
                None => at += 1,
            }
        }
        self.encode_plain(text.get(from..).unwrap_or_default(), &mut ids);
        ids
    }

    fn encode_plain(&self, text: &[u8], ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        match &self.model {
            Model::ByteLevel(bpe) => bpe.encode(&self.vocab, text, ids),
            Model::SentencePiece(spm) => spm.encode(&self.vocab, self.special.unknown, text, ids),
        }
    }

    /// Ids of a prompt: [`Tokenizer::encode`] with BOS and EOS where the file asks for them.
    pub fn encode_prompt(&self, text: impl AsRef<[u8]>, special: bool) -> Vec<u32> {
        let mut ids = Vec::new();
        if self.special.add_bos {
            ids.extend(self.special.bos);
        }
        ids.extend(self.encode(text, special));
        if self.special.add_eos {
            ids.extend(self.special.eos);
        }
        ids
    }

    /// The bytes `id` stands for; they may be part of a character. Empty for control tokens and ids outside the vocabulary.
    pub fn decode_bytes(&self, id: u32) -> &[u8] {
        match self.vocab.kind(id) {
            None | Some(TokenKind::Control) => &[],
            Some(_) => self.vocab.piece(id),
        }
    }

    /// The bytes of a whole sequence: the inverse of [`Tokenizer::encode`]. A SentencePiece tokenizer's leading space, which
    /// encoding adds at the start and after each special token, is taken off again.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let adds_space = matches!(&self.model, Model::SentencePiece(spm) if spm.adds_space());
        let mut out = Vec::new();
        let mut at_start = true;
        for &id in ids {
            let piece = self.decode_bytes(id);
            let piece = if adds_space && at_start { piece.strip_prefix(b" ").unwrap_or(piece) } else { piece };
            out.extend_from_slice(piece);
            at_start = self.vocab.kind(id).is_some_and(TokenKind::is_special);
        }
        out
    }
}
