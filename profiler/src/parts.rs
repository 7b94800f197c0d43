//! What a token's time goes into besides and including its products.

/// A part of the work on a token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Token embedding rows.
    Embed,
    /// Norms, and quantisation of what they and the other ops leave for the next product.
    Norm,
    /// Weight products, with what is fused into them.
    Product,
    /// Rotary embedding, and storing keys and values.
    Rope,
    /// Scores, softmax and sums of values.
    Attention,
    /// From logits to a token.
    Sample,
}

impl Part {
    /// Every part, in the order of a token.
    pub const ALL: [Part; 6] = [Part::Embed, Part::Norm, Part::Product, Part::Rope, Part::Attention, Part::Sample];

    /// Name for reports.
    pub const fn name(self) -> &'static str {
        match self {
            Part::Embed => "embed",
            Part::Norm => "norm",
            Part::Product => "product",
            Part::Rope => "rope",
            Part::Attention => "attention",
            Part::Sample => "sample",
        }
    }
}

/// Ticks by part, summed over some passes, of the core that calls the others.
#[derive(Clone, Copy, Default, Debug)]
pub struct PartTimes {
    ticks: [u64; Part::ALL.len()],
}

impl PartTimes {
    /// Adds to a part.
    #[inline]
    pub fn add(&mut self, part: Part, ticks: u64) {
        let sum = &mut self.ticks[part as usize];
        *sum = sum.saturating_add(ticks);
    }

    /// Ticks of a part.
    pub fn ticks(&self, part: Part) -> u64 {
        self.ticks[part as usize]
    }

    /// Ticks of all parts.
    pub fn total(&self) -> u64 {
        self.ticks.iter().fold(0, |sum: u64, &ticks| sum.saturating_add(ticks))
    }

    /// Share of a part, 0..=1; `None` before anything was added.
    pub fn share(&self, part: Part) -> Option<f64> {
        let total = self.total();
        (total > 0).then(|| self.ticks(part) as f64 / total as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_all_parts() {
        let mut times = PartTimes::default();
        assert_eq!(times.share(Part::Norm), None);
        times.add(Part::Norm, 10);
        times.add(Part::Product, 25);
        times.add(Part::Norm, 5);
        times.add(Part::Sample, 0);
        assert_eq!((times.ticks(Part::Norm), times.total()), (15, 40));
        assert_eq!(times.share(Part::Norm), Some(0.375));
        assert_eq!(times.share(Part::Attention), Some(0.0));
        for (i, part) in Part::ALL.into_iter().enumerate() {
            assert_eq!(part as usize, i, "{}", part.name());
        }
    }
}
