//! Greedy pair merging, shared by both tokenizer families: a linked list of symbols and a heap of candidate pairs.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::Reverse;

/// No token, and no neighbour.
pub(super) const NONE: u32 = u32::MAX;

/// A run of bytes of the text that is one token so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    /// First byte in the text.
    pub start: u32,
    /// Bytes; 0 once merged into its left neighbour.
    pub len: u32,
    /// Token, or [`NONE`].
    pub id: u32,
    prev: u32,
    next: u32,
}

/// A pair that could merge, as it was when proposed. Ordered best first: lowest rank, then leftmost.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: u32,
    right: u32,
    /// Bytes of both symbols.
    len: u32,
    /// The merged token.
    id: u32,
}

/// Working memory, reused between words.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Reverse<Candidate>>,
}

impl Merger {
    /// Starts a new text.
    pub(super) fn clear(&mut self) {
        self.symbols.clear();
        self.heap.clear();
    }

    /// Appends the next symbol of the text.
    pub(super) fn push(&mut self, len: u32, id: u32) {
        let at = self.symbols.len() as u32;
        let start = self.symbols.last().map_or(0, |last| last.start + last.len);
        if let Some(last) = self.symbols.last_mut() {
            last.next = at;
        }
        self.symbols.push(Symbol { start, len, id, prev: at.checked_sub(1).unwrap_or(NONE), next: NONE });
    }

    /// Merges the best pair (lowest rank, then leftmost) until none is left. `rank` gives a pair's rank and merged token.
    pub(super) fn run(&mut self, rank: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
        for left in 1..self.symbols.len() as u32 {
            self.propose(left - 1, left, &rank);
        }
        while let Some(Reverse(Candidate { left, right, len, id, .. })) = self.heap.pop() {
            let (l, r) = (self.symbols[left as usize], self.symbols[right as usize]);
            // Symbols only grow or vanish: two that are alive with the same total length are as they were when proposed.
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            self.symbols[right as usize].len = 0;
            self.symbols[left as usize] = Symbol { len, id, next: r.next, ..l };
            if l.prev != NONE {
                self.propose(l.prev, left, &rank);
            }
            if r.next != NONE {
                self.symbols[r.next as usize].prev = left;
                self.propose(left, r.next, &rank);
            }
        }
    }

    fn propose(&mut self, left: u32, right: u32, rank: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
        let (l, r) = (&self.symbols[left as usize], &self.symbols[right as usize]);
        if let Some((rank, id)) = rank(l, r) {
            self.heap.push(Reverse(Candidate { rank, left, right, len: l.len + r.len, id }));
        }
    }

    /// What is left, in text order.
    pub(super) fn symbols(&self) -> impl Iterator<Item = &Symbol> {
        self.symbols.iter().filter(|symbol| symbol.len > 0)
    }
}
