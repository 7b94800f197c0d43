//! Byte-level BPE: pre-tokenise, then merge each piece's bytes by rank.
//!
//! # Source
//! R. Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016; OpenAI GPT-2 `encoder.py`.

use super::merge::{Merger, NONE};
use super::{Pretokenizer, TokenizerError, Vocab, alphabet};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use hashbrown::HashMap;

/// What merging a pair gives.
#[derive(Clone, Copy, Debug)]
struct Merge {
    /// Index in the file's list: lower merges first.
    rank: u32,
    /// The merged token.
    id: u32,
}

/// Merge rules over token ids, and the pre-tokenizer that comes before them.
#[derive(Clone)]
pub struct Bpe {
    pretokenizer: Pretokenizer,
    merges: HashMap<(u32, u32), Merge>,
    /// Token of each single byte, or [`NONE`] where the vocabulary has none.
    bytes: Box<[u32; 256]>,
    /// A piece that is a token is that token, even if no sequence of merges makes it.
    whole_pieces: bool,
}

impl core::fmt::Debug for Bpe {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Bpe({:?}, {} merges)", self.pretokenizer, self.merges.len())
    }
}

impl Bpe {
    /// Rules from `merges`, each `left right` in the GPT-2 alphabet, best first.
    ///
    /// # Errors
    /// [`TokenizerError::Merge`] for a rule that is not two texts or whose parts or result are not in `vocab`.
    pub fn new<'a>(
        vocab: &Vocab,
        pretokenizer: Pretokenizer,
        merges: impl ExactSizeIterator<Item = &'a [u8]>,
    ) -> Result<Self, TokenizerError> {
        let bytes: Box<[u32; 256]> = Box::new(core::array::from_fn(|byte| vocab.find(&[byte as u8]).unwrap_or(NONE)));
        let find = |text: &[u8]| match text {
            &[byte] => Some(bytes[usize::from(byte)]).filter(|&id| id != NONE),
            _ => vocab.find(text),
        };
        let mut map = HashMap::with_capacity(merges.len());
        let mut scratch = Vec::new();
        // Vocabularies list merged tokens in merge order: the token after the last one made is the likely next.
        let mut likely = 0;
        for (index, rule) in merges.enumerate() {
            let error = |problem| {
                let text: String = String::from_utf8_lossy(rule).chars().take(40).collect();
                TokenizerError::Merge { index, text, problem }
            };
            scratch.clear();
            let cut = rule.iter().position(|&byte| byte == b' ');
            let cut = cut.ok_or_else(|| error("is not two texts with a space between"))?;
            let (left, right) = (&rule[..cut], &rule[cut + 1..]);
            alphabet::decode(left, &mut scratch).ok_or_else(|| error("has a character outside the byte alphabet"))?;
            let cut = scratch.len();
            alphabet::decode(right, &mut scratch).ok_or_else(|| error("has a character outside the byte alphabet"))?;
            let (left, right) = scratch.split_at(cut);
            let missing = || error("names a text that is not in the vocabulary");
            let pair = (find(left).ok_or_else(missing)?, find(right).ok_or_else(missing)?);
            let id = if vocab.is_only(likely, &scratch) { likely } else { find(&scratch).ok_or_else(missing)? };
            likely = id.saturating_add(1);
            // Of equal rules the first counts, as in the reference implementations.
            map.entry(pair).or_insert(Merge { rank: index as u32, id });
        }
        Ok(Bpe { pretokenizer, merges: map, bytes, whole_pieces: false })
    }

    /// Looks every piece up as a whole before merging: the rule of Llama 3 vocabularies, which hold tokens that their merges
    /// do not reach.
    pub fn with_whole_pieces(mut self) -> Self {
        self.whole_pieces = true;
        self
    }

    /// The pre-tokenizer.
    pub fn pretokenizer(&self) -> Pretokenizer {
        self.pretokenizer
    }

    /// Appends the ids of `text`.
    pub(super) fn encode(&self, vocab: &Vocab, text: &[u8], ids: &mut Vec<u32>) {
        let mut merger = Merger::default();
        self.pretokenizer.split(text, &mut |piece| {
            if self.whole_pieces
                && let Some(id) = vocab.find(piece)
            {
                ids.push(id);
                return;
            }
            merger.clear();
            for &byte in piece {
                merger.push(1, self.bytes[usize::from(byte)]);
            }
            merger.run(|left, right| self.merges.get(&(left.id, right.id)).map(|merge| (merge.rank, merge.id)));
            ids.extend(merger.symbols().map(|symbol| symbol.id).filter(|&id| id != NONE));
        });
    }
}
