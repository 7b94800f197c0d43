//! What several test files need: threads as workers, and a model loaded from bytes.
#![allow(dead_code)] // each test file uses its part

use engine::attention::KvType;
use engine::operands::AlignedBytes;
use engine::simd::Level;
use engine::workers::Workers;
use engine::{Engine, Loader, Plan, Session, SessionMemory, Tier, sampler};
use model::Isa;
use model::ModelDescription;

/// Scoped threads, started anew for each job: slow, and as unordered as it gets.
pub struct Threads(pub usize);

impl Workers for Threads {
    fn count(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for i in 1..self.0 {
                scope.spawn(move || job(i));
            }
            job(0);
        });
    }
}

/// Loads `file` into a fresh arena in chunks of `chunk_bytes`. The arena is leaked, as on a real boot.
pub fn load(
    model: &ModelDescription,
    file: &[u8],
    threads: usize,
    chunk_bytes: usize,
    isa: Isa,
    tier: Tier,
) -> Engine<'static> {
    let plan = Plan::new(model, threads).unwrap();
    let arena = Box::leak(Box::new(AlignedBytes::zeroed(plan.arena_bytes())));
    arena.fill(0xff);
    let loaded = {
        let mut loader = Loader::new(plan, Level::new(isa), arena).unwrap();
        for (i, chunk) in file.chunks(chunk_bytes).enumerate() {
            loader.feed((i * chunk_bytes) as u64, chunk, &Threads(threads)).unwrap();
        }
        assert_eq!(loader.next_offset(), None);
        loader.finish().unwrap()
    };
    Engine::new(loaded, arena, isa, tier).unwrap()
}

/// Memory for a session.
pub fn session_memory(engine: &Engine<'_>, context: usize, kv: KvType) -> SessionMemory<Vec<u8>> {
    Session::memory_bytes(engine.config(), context, engine.plan().threads(), kv).map(|len| vec![0xff; len])
}

/// Runs `prompt` and then `forced` tokens one by one; returns the logits after the prompt and after each forced token.
pub fn forced_logits(
    engine: &mut Engine<'_>,
    workers: &dyn Workers,
    prompt: &[u32],
    forced: &[u32],
    kv: KvType,
) -> Vec<Vec<f32>> {
    let context = prompt.len() + forced.len();
    let mut memory = session_memory(engine, context, kv);
    let mut session = Session::new(engine, context, kv, memory.lend()).unwrap();
    let mut all = vec![session.prefill(engine, workers, prompt).unwrap().to_vec()];
    for &token in forced {
        all.push(session.decode(engine, workers, token).unwrap().to_vec());
    }
    all
}

/// Greedy continuation of `prompt` by `count` tokens.
pub fn generate(engine: &mut Engine<'_>, workers: &dyn Workers, prompt: &[u32], count: usize, kv: KvType) -> Vec<u32> {
    let context = prompt.len() + count;
    let mut memory = session_memory(engine, context, kv);
    let mut session = Session::new(engine, context, kv, memory.lend()).unwrap();
    let mut token = sampler::greedy(session.prefill(engine, workers, prompt).unwrap());
    let mut tokens = vec![token];
    while tokens.len() < count {
        token = sampler::greedy(session.decode(engine, workers, token).unwrap());
        tokens.push(token);
    }
    tokens
}
