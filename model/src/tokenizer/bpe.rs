//! Byte-level BPE: pre-tokenise, then merge each piece's bytes by rank.
//!
//! # Source
//! R. Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016; OpenAI GPT-2 `encoder.py`.

use super::merge::{Merger, NONE};
use super::{Pretokenizer, TokenizerError, Vocab, alphabet};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// One way to make a token out of two. Its rank is its index in the file's list: lower merges first.
#[derive(Clone, Copy)]
struct Rule {
    /// Bytes of the left part.
    left_bytes: u32,
    /// The next rule that makes the same token, or [`NONE`].
    next: u32,
}

/// Merge rules, and the pre-tokenizer that comes before them.
///
/// A rule is found by the token it makes, and that by its text: building a table of pairs of ids would take two more
/// look-ups a rule, before every first token, for rules that few texts need.
#[derive(Clone)]
pub struct Bpe {
    pretokenizer: Pretokenizer,
    rules: Vec<Rule>,
    /// The first rule that makes each token, or [`NONE`].
    first_rule: Vec<u32>,
    /// Token of each single byte, or [`NONE`] where the vocabulary has none.
    bytes: Box<[u32; 256]>,
    /// A piece that is a token is that token, even if no sequence of merges makes it.
    whole_pieces: bool,
}

impl core::fmt::Debug for Bpe {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Bpe({:?}, {} merges)", self.pretokenizer, self.rules.len())
    }
}

impl Bpe {
    /// Rules from `merges`, each `left right` in the GPT-2 alphabet, best first.
    ///
    /// # Errors
    /// [`TokenizerError::Merge`] for a rule that is not two texts or whose result is not in `vocab`. A rule with a part that is
    /// not is never used: no symbol has that text.
    pub fn new<'a>(
        vocab: &Vocab,
        pretokenizer: Pretokenizer,
        merges: impl ExactSizeIterator<Item = &'a [u8]>,
    ) -> Result<Self, TokenizerError> {
        let bytes: Box<[u32; 256]> = Box::new(core::array::from_fn(|byte| vocab.find(&[byte as u8]).unwrap_or(NONE)));
        let mut rules: Vec<Rule> = Vec::with_capacity(merges.len());
        let mut first_rule = vec![NONE; vocab.len()];
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
            let missing = || error("makes a text that is not in the vocabulary");
            let known = vocab.is_only(likely, &scratch).then_some(likely);
            let id = known.or_else(|| vocab.find(&scratch)).ok_or_else(missing)?;
            likely = id.saturating_add(1);
            rules.push(Rule { left_bytes: cut as u32, next: id });
        }
        // From the worst rule up, so that each token's list begins with its best. Of equal rules the first counts, as in
        // the reference implementations.
        for index in (0..rules.len()).rev() {
            let Rule { left_bytes, next: id } = rules[index];
            let first = &mut first_rule[id as usize];
            let worse = rules.get(*first as usize).filter(|worse| worse.left_bytes == left_bytes);
            rules[index].next = worse.map_or(*first, |equal| equal.next);
            *first = index as u32;
        }
        Ok(Bpe { pretokenizer, rules, first_rule, bytes, whole_pieces: false })
    }

    /// Rank of the best rule that makes `text` out of its first `left_bytes` bytes and the rest, and the token made.
    fn merge(&self, vocab: &Vocab, text: &[u8], left_bytes: u32) -> Option<(u32, u32)> {
        let id = vocab.find(text)?;
        let mut at = *self.first_rule.get(id as usize)?;
        while let Some(rule) = self.rules.get(at as usize) {
            if rule.left_bytes == left_bytes {
                return Some((at, id));
            }
            at = rule.next;
        }
        None
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
            merger.run(|left, right| {
                let text = piece.get(left.start as usize..(right.start + right.len) as usize)?;
                (left.id != NONE && right.id != NONE).then(|| self.merge(vocab, text, left.len))?
            });
            ids.extend(merger.symbols().map(|symbol| symbol.id).filter(|&id| id != NONE));
        });
    }
}
