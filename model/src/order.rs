//! Sorting by index. A sort of the standard library is compiled once for every type and comparison, at 3 to 7 KB each; the
//! native image has no room for that, so whatever it sorts outside the path of a token is sorted through here.

use alloc::vec::Vec;
use core::cmp::Ordering;

/// Indices `0..len` in ascending order of `compare`; equal ones keep theirs. A merge sort, from runs of one up.
pub fn order(len: usize, compare: &dyn Fn(usize, usize) -> Ordering) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..len).collect();
    let mut merged = Vec::with_capacity(len);
    let mut run = 1;
    while run < len {
        merged.clear();
        for two_runs in indices.chunks(2 * run) {
            let (mut left, mut right) = two_runs.split_at(run.min(two_runs.len()));
            while let ([l, left_rest @ ..], [r, right_rest @ ..]) = (left, right) {
                if compare(*l, *r).is_le() {
                    merged.push(*l);
                    left = left_rest;
                } else {
                    merged.push(*r);
                    right = right_rest;
                }
            }
            merged.extend_from_slice(left);
            merged.extend_from_slice(right);
        }
        core::mem::swap(&mut indices, &mut merged);
        run *= 2;
    }
    indices
}

/// `items` in ascending order of `key`; those of equal keys keep theirs.
pub fn sorted_by_key<T: Clone, K: Ord>(items: &[T], key: impl Fn(&T) -> K) -> Vec<T> {
    let compare = |a: usize, b: usize| key(&items[a]).cmp(&key(&items[b]));
    order(items.len(), &compare).into_iter().map(|i| items[i].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_ascending_and_stable() {
        let items: Vec<(u32, usize)> = (0..200usize).map(|i| ((i as u32 * 37) % 10, i)).collect();
        let mut expected = items.clone();
        expected.sort_by_key(|item| item.0);
        assert_eq!(sorted_by_key(&items, |item| item.0), expected);
        for len in 0..70 {
            let mut expected = items[..len].to_vec();
            expected.sort_by_key(|item| item.0);
            assert_eq!(sorted_by_key(&items[..len], |item| item.0), expected, "{len}");
        }
        assert!(order(0, &|a, b| a.cmp(&b)).is_empty());
    }
}
