//! The vocabulary: one buffer of decoded token bytes, found by id, by bytes, or as special text.

use super::{TokenizerError, alphabet};
use crate::order::sorted_by_key;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::hash::BuildHasher;
use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

/// Most tokens a vocabulary may have.
const MAX_TOKENS: usize = 1 << 24;

/// What a token is, as GGUF's `token_type` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TokenKind {
    /// Text that merging can produce.
    Normal,
    /// Stands for what cannot be expressed.
    Unknown,
    /// Structure, never text: BOS, `<|im_start|>`.
    Control,
    /// Text that is one token wherever it occurs.
    UserDefined,
    /// In the table but not in use.
    Unused,
    /// One byte, for byte fallback.
    Byte,
}

impl TokenKind {
    /// The kind by its number in GGUF; 0 (undefined) counts as normal.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownKind`].
    pub const fn from_gguf(kind: i32) -> Result<Self, TokenizerError> {
        Ok(match kind {
            0 | 1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            found => return Err(TokenizerError::UnknownKind { found }),
        })
    }

    /// Its number in GGUF.
    pub const fn to_gguf(self) -> i32 {
        match self {
            TokenKind::Normal => 1,
            TokenKind::Unknown => 2,
            TokenKind::Control => 3,
            TokenKind::UserDefined => 4,
            TokenKind::Unused => 5,
            TokenKind::Byte => 6,
        }
    }

    /// True for tokens that are matched as whole texts before any merging.
    pub const fn is_special(self) -> bool {
        matches!(self, TokenKind::Unknown | TokenKind::Control | TokenKind::UserDefined)
    }

    /// True for tokens that merging may produce. Control tokens are not among them, so plain text cannot forge them.
    const fn is_mergeable(self) -> bool {
        matches!(self, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused)
    }
}

/// All tokens of a model, decoded to the bytes they stand for.
#[derive(Clone)]
pub struct Vocab {
    bytes: Vec<u8>,
    /// End of each token's bytes; a token begins where the one before it ends.
    ends: Vec<u32>,
    kinds: Vec<TokenKind>,
    /// Mergeable tokens by their bytes.
    by_bytes: HashTable<u32>,
    /// Two mergeable tokens have the same bytes.
    has_duplicates: bool,
    hasher: DefaultHashBuilder,
    /// Tokens of kind [`TokenKind::Byte`].
    byte_ids: Box<[Option<u32>; 256]>,
    /// Special tokens, sorted by bytes.
    special: Vec<u32>,
    /// First bytes of special tokens.
    special_first: Box<[bool; 256]>,
}

impl core::fmt::Debug for Vocab {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Vocab({} tokens, {} special)", self.len(), self.special.len())
    }
}

impl Vocab {
    /// What stands for a space in SentencePiece vocabularies.
    pub(crate) const SPACE: &[u8] = "\u{2581}".as_bytes();

    /// A vocabulary of byte-level BPE: texts in the GPT-2 alphabet, special tokens as they are.
    ///
    /// # Errors
    /// [`TokenizerError::Size`].
    pub fn byte_level<'a>(
        tokens: impl Iterator<Item = (&'a [u8], TokenKind)>,
        count: usize,
    ) -> Result<Self, TokenizerError> {
        Self::build(tokens, count, |text, kind, out| {
            let alphabetic = !kind.is_special() && kind != TokenKind::Byte;
            if !alphabetic || alphabet::decode(text, out).is_none() {
                out.extend_from_slice(text);
            }
        })
    }

    /// A SentencePiece vocabulary: `U+2581` stands for a space, byte tokens are written `<0x41>`.
    ///
    /// # Errors
    /// [`TokenizerError::Size`].
    pub fn sentence_piece<'a>(
        tokens: impl Iterator<Item = (&'a [u8], TokenKind)>,
        count: usize,
    ) -> Result<Self, TokenizerError> {
        Self::build(tokens, count, |mut text, kind, out| {
            if kind == TokenKind::Byte
                && let Some(byte) = parse_byte_token(text)
            {
                out.push(byte);
                return;
            }
            while let Some((&first, rest)) = text.split_first() {
                match text.strip_prefix(Self::SPACE).filter(|_| !kind.is_special()) {
                    Some(rest) => {
                        out.push(b' ');
                        text = rest;
                    }
                    None => {
                        out.push(first);
                        text = rest;
                    }
                }
            }
        })
    }

    fn build<'a>(
        tokens: impl Iterator<Item = (&'a [u8], TokenKind)>,
        count: usize,
        decode: impl Fn(&[u8], TokenKind, &mut Vec<u8>),
    ) -> Result<Self, TokenizerError> {
        let size_error = |text_bytes| TokenizerError::Size { tokens: count, text_bytes };
        if count == 0 || count > MAX_TOKENS {
            return Err(size_error(0));
        }
        let mut vocab = Vocab {
            bytes: Vec::with_capacity(count.saturating_mul(8)),
            ends: Vec::with_capacity(count),
            kinds: Vec::with_capacity(count),
            by_bytes: HashTable::with_capacity(count),
            has_duplicates: false,
            hasher: DefaultHashBuilder::default(),
            byte_ids: Box::new([None; 256]),
            special: Vec::new(),
            special_first: Box::new([false; 256]),
        };
        for (text, kind) in tokens {
            decode(text, kind, &mut vocab.bytes);
            let end = u32::try_from(vocab.bytes.len()).map_err(|_| size_error(vocab.bytes.len()))?;
            vocab.ends.push(end);
            vocab.kinds.push(kind);
            // `count` bounds the ids below 2^24.
            vocab.index(vocab.kinds.len() as u32 - 1, kind);
        }
        vocab.special = sorted_by_key(&vocab.special, |&id| vocab.piece(id));
        Ok(vocab)
    }

    fn index(&mut self, id: u32, kind: TokenKind) {
        let Vocab { bytes, ends, by_bytes, has_duplicates, hasher, byte_ids, special, special_first, .. } = self;
        let piece_of = |id: u32| piece(bytes, ends, id);
        let text = piece_of(id);
        let Some(&first) = text.first() else { return };
        if kind.is_special() {
            special.push(id);
            special_first[usize::from(first)] = true;
        }
        if kind == TokenKind::Byte && text.len() == 1 {
            byte_ids[usize::from(first)] = Some(id);
        }
        if kind.is_mergeable() {
            let hash = hasher.hash_one(text);
            // Of tokens with the same text the last one counts, as in llama.cpp.
            match by_bytes.entry(hash, |&other| piece_of(other) == text, |&other| hasher.hash_one(piece_of(other))) {
                Entry::Occupied(mut slot) => {
                    *slot.get_mut() = id;
                    *has_duplicates = true;
                }
                Entry::Vacant(slot) => {
                    slot.insert(id);
                }
            }
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Never true: a vocabulary has at least one token.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Decoded bytes of a token (the text itself for special tokens); empty outside the vocabulary.
    pub fn piece(&self, id: u32) -> &[u8] {
        piece(&self.bytes, &self.ends, id)
    }

    /// Kind of a token; `None` outside the vocabulary.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    /// The mergeable token that stands for exactly `bytes`.
    pub fn find(&self, bytes: &[u8]) -> Option<u32> {
        self.by_bytes.find(self.hasher.hash_one(bytes), |&id| self.piece(id) == bytes).copied()
    }

    /// True when `find(bytes)` is known to be `id` without looking it up.
    pub(super) fn is_only(&self, id: u32, bytes: &[u8]) -> bool {
        !self.has_duplicates && self.kind(id).is_some_and(TokenKind::is_mergeable) && self.piece(id) == bytes
    }

    /// The byte-fallback token of `byte`.
    pub(super) fn byte_id(&self, byte: u8) -> Option<u32> {
        self.byte_ids[usize::from(byte)]
    }

    /// The token of unknown kind.
    pub(super) fn unknown(&self) -> Option<u32> {
        self.special.iter().copied().find(|&id| self.kind(id) == Some(TokenKind::Unknown))
    }

    /// The special token with exactly this text.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        let at = self.special.partition_point(|&id| self.piece(id) < text.as_bytes());
        self.special.get(at).copied().filter(|&id| self.piece(id) == text.as_bytes())
    }

    /// The longest special token that `text` begins with, and its length; without `all` only user-defined ones.
    ///
    /// Walks the sorted list one byte at a time, keeping the range of tokens that share the prefix.
    pub(super) fn longest_special(&self, text: &[u8], all: bool) -> Option<(u32, usize)> {
        let first = *text.first()?;
        if !self.special_first[usize::from(first)] {
            return None;
        }
        let mut range = self.special.as_slice();
        let mut best = None;
        for (depth, &byte) in text.iter().enumerate() {
            let byte_at = |id: u32| self.piece(id).get(depth).copied();
            let from = range.partition_point(|&id| byte_at(id) < Some(byte));
            let to = range.partition_point(|&id| byte_at(id) <= Some(byte));
            range = range.get(from..to).unwrap_or_default();
            let whole = range.iter().take_while(|&&id| self.piece(id).len() == depth + 1);
            let allowed = |id: &&u32| all || self.kind(**id) == Some(TokenKind::UserDefined);
            if let Some(&id) = whole.clone().find(allowed) {
                best = Some((id, depth + 1));
            }
            if range.is_empty() {
                break;
            }
        }
        best
    }
}

fn piece<'a>(bytes: &'a [u8], ends: &[u32], id: u32) -> &'a [u8] {
    let id = id as usize;
    let start = id.checked_sub(1).and_then(|before| ends.get(before)).map_or(0, |&end| end as usize);
    ends.get(id).and_then(|&end| bytes.get(start..end as usize)).unwrap_or_default()
}

/// The byte that a token text of the form `<0x41>` stands for.
pub(crate) fn parse_byte_token(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    let digits = core::str::from_utf8(digits).ok().filter(|d| d.len() == 2 && !d.starts_with('+'))?;
    u8::from_str_radix(digits, 16).ok()
}
