//! Medians with their spread: how every number of a benchmark is written down.

use serde::Serialize;

/// Median, ends and count of some values.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Spread {
    /// Median; of an even number the mean of the middle two.
    pub median: f64,
    /// Least.
    pub min: f64,
    /// Greatest.
    pub max: f64,
    /// How many.
    pub n: usize,
}

impl Spread {
    /// Of `values`; `None` of none. Values that are not finite count as a bug of the caller.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self { median: (sorted[n / 2] + sorted[(n - 1) / 2]) / 2.0, min, max, n })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_odd_even_and_nothing() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0, n: 3 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0, n: 2 }));
        assert_eq!(Spread::of([]), None);
    }
}
