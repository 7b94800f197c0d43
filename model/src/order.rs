//! Sorting by index. A sort is compiled once for every type and comparison, at 4 KB each; the native image has room for
//! one, so whatever it sorts outside the path of a token is sorted through here.

use alloc::vec::Vec;
use core::cmp::Ordering;

/// Indices `0..len` in ascending order of `compare`; equal ones keep theirs.
pub fn order(len: usize, compare: &dyn Fn(usize, usize) -> Ordering) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..len).collect();
    indices.sort_unstable_by(|&a, &b| compare(a, b).then(a.cmp(&b)));
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
        assert!(order(0, &|a, b| a.cmp(&b)).is_empty());
    }
}
