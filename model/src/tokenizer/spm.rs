//! SentencePiece BPE: merge characters by score, then fall back to byte tokens for characters the vocabulary lacks.
//!
//! # Source
//! `src/bpe_model.cc` of SentencePiece; `encode` in llama2.c's `run.c` gives the same ids for every vocabulary
//! whose pieces are built from characters it holds.

use super::merge::{Merger, NONE};
use super::{TokenizerError, Vocab, unicode};
use alloc::vec::Vec;

/// Scores of a SentencePiece vocabulary.
#[derive(Clone)]
pub struct Spm {
    /// Rank of each token: the lower, the higher its score.
    ranks: Vec<u32>,
    add_space: bool,
}

impl core::fmt::Debug for Spm {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Spm({} scores, add_space {})", self.ranks.len(), self.add_space)
    }
}

impl Spm {
    /// One score a token; the pair whose merged token scores highest merges first. With `add_space` a text begins with a
    /// space that decoding takes off.
    ///
    /// # Errors
    /// [`TokenizerError::Lengths`], [`TokenizerError::Score`].
    pub fn new(vocab: &Vocab, scores: Vec<f32>, add_space: bool) -> Result<Self, TokenizerError> {
        if scores.len() != vocab.len() {
            return Err(TokenizerError::Lengths { what: "scores", found: scores.len(), tokens: vocab.len() });
        }
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(TokenizerError::Score { id });
        }
        Ok(Spm { ranks: scores.into_iter().map(descending).collect(), add_space })
    }

    /// Texts begin with an added space.
    pub fn adds_space(&self) -> bool {
        self.add_space
    }

    /// Appends the ids of `text`, which is not empty.
    pub(super) fn encode(&self, vocab: &Vocab, unknown: Option<u32>, text: &[u8], ids: &mut Vec<u32>) {
        let mut spaced = Vec::new();
        let text = if self.add_space {
            spaced.reserve_exact(text.len() + 1);
            spaced.push(b' ');
            spaced.extend_from_slice(text);
            spaced.as_slice()
        } else {
            text
        };
        let mut merger = Merger::default();
        let mut rest = text;
        while !rest.is_empty() {
            let (_, len) = unicode::first_char(rest);
            let (char, after) = rest.split_at(len);
            merger.push(len as u32, vocab.find(char).unwrap_or(NONE));
            rest = after;
        }
        let bytes_of = |start: u32, len: u32| text.get(start as usize..(start + len) as usize).unwrap_or_default();
        merger.run(|left, right| {
            let id = vocab.find(bytes_of(left.start, left.len + right.len))?;
            Some((*self.ranks.get(id as usize)?, id))
        });
        for symbol in merger.symbols() {
            if symbol.id != NONE {
                ids.push(symbol.id);
                continue;
            }
            let bytes = bytes_of(symbol.start, symbol.len);
            if bytes.iter().all(|&byte| vocab.byte_id(byte).is_some()) {
                ids.extend(bytes.iter().filter_map(|&byte| vocab.byte_id(byte)));
            } else {
                ids.extend(unknown);
            }
        }
    }
}

/// Maps scores to integers so that a higher score gives a lower number; equal scores, zeros included, give equal ones.
fn descending(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    !ascending
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_order_scores_downwards() {
        let scores = [f32::INFINITY, 3.0, 1e-30, 0.0, -1e-30, -1.0, -250.0, f32::NEG_INFINITY];
        for pair in scores.windows(2) {
            assert!(descending(pair[0]) < descending(pair[1]), "{pair:?}");
        }
        assert_eq!(descending(0.0), descending(-0.0));
    }
}
