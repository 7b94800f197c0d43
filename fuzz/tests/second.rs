//! Every target, a second each.

use fuzz::{Mutator, Outcome, TARGETS};
use std::time::{Duration, Instant};

#[test]
fn every_target_survives_a_second_of_damage() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{}: no seeds", target.name);
        for seed in &seeds {
            (target.run)(seed);
        }
        let mut mutator = Mutator::new(0x5eed);
        let (start, mut cases, mut accepted) = (Instant::now(), 0u64, 0u64);
        while start.elapsed() < Duration::from_secs(1) {
            accepted += u64::from((target.run)(&mutator.mutate(&seeds)) == Outcome::Accepted);
            cases += 1;
        }
        println!("{}: {cases} cases, {accepted} of them accepted", target.name);
        assert!(accepted > 0, "{}: all of {cases} inputs were refused", target.name);
    }
}
