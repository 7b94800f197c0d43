//! A list in place: what the early boot uses before there is a heap.

/// At most `N` values, in order of insertion.
#[derive(Clone, Copy, Debug)]
pub struct FixedList<T, const N: usize> {
    items: [T; N],
    len: usize,
    left_out: usize,
}

impl<T: Copy + Default, const N: usize> FixedList<T, N> {
    /// The empty list.
    pub fn new() -> Self {
        Self { items: [T::default(); N], len: 0, left_out: 0 }
    }

    /// Appends `item`; false when the list is full and `item` was dropped.
    #[must_use]
    pub fn push(&mut self, item: T) -> bool {
        match self.items.get_mut(self.len) {
            Some(place) => {
                *place = item;
                self.len += 1;
                true
            }
            None => {
                self.left_out += 1;
                false
            }
        }
    }

    /// How many values found no place.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// The values.
    pub fn as_slice(&self) -> &[T] {
        &self.items[..self.len]
    }

    /// The values, mutable.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.items[..self.len]
    }
}

impl<T: Copy + Default, const N: usize> Default for FixedList<T, N> {
    fn default() -> Self {
        Self::new()
    }
}
