//! Every architecture against an independent implementation: logits and greedy ids of the synthetic models as the
//! `transformers` library computes them (`fixtures/architectures.py` records them).

mod support;

use engine::Tier;
use engine::attention::KvType;
use engine::workers::Single;
use serde_json::Value as Json;
use support::{Threads, forced_logits, generate, load};

/// Largest difference of a logit: sums in another order, no more.
const TOLERANCE: f32 = 1e-3;

fn numbers(json: &Json) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn logits_and_greedy_ids_are_those_of_transformers() {
    let fixture: Json = serde_json::from_str(include_str!("fixtures/architectures.json")).unwrap();
    let prompt: Vec<u32> = numbers(&fixture["prompt"]).into_iter().map(|id| id as u32).collect();
    let gallery = model::synthetic::gallery();
    assert_eq!(fixture.as_object().unwrap().len(), gallery.len() + 2, "made_by, prompt, and every model");
    for (name, spec) in gallery {
        let file = model::synthetic::gguf(&spec).unwrap();
        let description = model::gguf::read(&file, file.len() as u64).unwrap();
        let recorded = &fixture[name];
        let want = numbers(&recorded["logits"]);
        let ids: Vec<u32> = numbers(&recorded["greedy"]).into_iter().map(|id| id as u32).collect();
        let mut engine = load(&description, &file, 1, 1 << 20, engine::isa::detect(), Tier::Baseline);
        let logits = forced_logits(&mut engine, &Single, &prompt, &[], KvType::F32).remove(0);
        assert_eq!(logits.len(), want.len(), "{name}");
        let error = logits.iter().zip(&want).map(|(a, b)| (a - *b as f32).abs()).fold(0.0, f32::max);
        let size = want.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        assert!(error < TOLERANCE && size > 0.5, "{name}: logits up to {size} differ by {error}");
        // Two threads take other ways through chunks and slices.
        let mut engine = load(&description, &file, 2, 999, engine::isa::detect(), Tier::Baseline);
        assert_eq!(generate(&mut engine, &Threads(2), &prompt, ids.len(), KvType::F32), ids, "{name}");
    }
}
