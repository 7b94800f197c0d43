//! A full context: it ends the generation, or it shifts, and then every token is that of a fresh run over what was kept.

mod support;

use engine::attention::KvType;
use engine::simd::Level;
use engine::workers::Single;
use engine::{Engine, Loader, Plan, Session, SessionMemory, Tier, sampler};
use model::Architecture;
use model::synthetic::{self, Spec};
use runtime::RunError;
use support::Machine;

const CONTEXT: usize = 40;

/// Token ids of a boot, and what it printed.
fn tokens(file: &[u8], settings: &str) -> (Vec<u32>, String) {
    let mut machine = Machine::with_model(file);
    let outcome = machine.boot(&format!("prompt=\"once upon\" context={CONTEXT} {settings}"));
    let report = outcome.report.unwrap_or_else(|| panic!("{settings}: {:?}", outcome.error));
    (report.token_ids, machine.printed)
}

/// An engine of its own for runs from an empty context.
struct Fresh {
    engine: Engine<'static>,
    memory: SessionMemory<Vec<u8>>,
    kv: KvType,
}

impl Fresh {
    fn new(file: &[u8]) -> Self {
        let description = model::gguf::read(file, file.len() as u64).unwrap();
        let plan = Plan::new(&description, 1).unwrap();
        let arena = vec![0; plan.arena_bytes()].leak();
        let mut loader = Loader::new(plan, Level::detect(), arena).unwrap();
        loader.feed(0, file, &Single).unwrap();
        let engine = Engine::new(loader.finish().unwrap(), arena, engine::isa::detect(), Tier::Baseline).unwrap();
        let kv = KvType::for_model(&description);
        Self { engine, memory: Session::memory_bytes(&description.config, CONTEXT, 1, kv).map(|len| vec![0; len]), kv }
    }

    /// Greedy tokens after `window`.
    fn tokens(&mut self, window: &[u32], count: usize) -> Vec<u32> {
        let mut session = Session::new(&self.engine, CONTEXT, self.kv, self.memory.lend()).unwrap();
        let mut token = sampler::greedy(session.prefill(&mut self.engine, &Single, window).unwrap());
        let mut out = vec![token];
        while out.len() < count {
            token = sampler::greedy(session.decode(&mut self.engine, &Single, token).unwrap());
            out.push(token);
        }
        out
    }
}

fn prompt_of(file: &[u8]) -> Vec<u32> {
    model::gguf::read(file, file.len() as u64).unwrap().tokenizer.encode_prompt(b"once upon", false)
}

#[test]
fn without_a_shift_the_end_of_the_context_is_the_end() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let (ids, printed) = tokens(&file, "max_tokens=200");
    assert_eq!(ids.len(), CONTEXT - prompt_of(&file).len() + 1);
    assert!(printed.contains("the context of 40 tokens is full; stopping here"), "{printed}");
}

#[test]
fn after_a_shift_the_tokens_are_those_of_a_fresh_run() {
    // Rotary and learned positions, and layers with a window.
    for architecture in [Architecture::Llama, Architecture::Gpt2, Architecture::Gemma3] {
        let file = synthetic::gguf(&Spec::of(architecture)).unwrap();
        let prompt = prompt_of(&file);
        let mut fresh = Fresh::new(&file);
        for keep in [0, 3, CONTEXT - 10] {
            let count = 120;
            let (ids, printed) = tokens(&file, &format!("max_tokens={count} context.shift={keep}"));
            assert_eq!(ids.len(), count, "{architecture} {keep}");
            // Here in other words: what is in the context when token `at` of the text is to be run and there is no room.
            let text: Vec<u32> = prompt.iter().chain(&ids).copied().collect();
            let (mut window, mut at, mut shifts) = (text[..CONTEXT].to_vec(), CONTEXT, 0);
            while at < text.len() {
                let newer = &window[CONTEXT - (CONTEXT - keep) / 2..];
                window = [&window[..keep], newer, &text[at..=at]].concat();
                let room = CONTEXT - window.len();
                let next = &text[at + 1..text.len().min(at + 2 + room)];
                assert_eq!(next, &fresh.tokens(&window, room + 1)[..next.len()], "{architecture} {keep} at {at}");
                window.extend(&text[at + 1..text.len().min(at + 1 + room)]);
                at += 1 + room;
                shifts += 1;
            }
            assert!(shifts >= 3, "{shifts}");
            assert_eq!(printed.matches("run again").count(), 1, "{printed}");
        }
    }
}

#[test]
fn keeping_the_whole_context_is_refused() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    for keep in [CONTEXT - 1, CONTEXT, 4_000_000_000] {
        let settings = format!("prompt=ab context={CONTEXT} context.shift={keep}");
        let error = Machine::with_model(&file).refused(&settings);
        assert!(
            matches!(error, RunError::ShiftKeepsTooMuch { keep: found, context: CONTEXT, .. } if found == keep),
            "{error}"
        );
        assert!(error.to_string().contains("at most 38"), "{error}");
    }
}

#[test]
fn asking_for_more_than_there_is_gives_what_there_is_and_says_so() {
    let file = synthetic::gguf(&Spec { seq_len: 64, ..Spec::default() }).unwrap();
    let mut machine = Machine::with_model(&file);
    machine.boot("prompt=ab max_tokens=2 context=65 threads=3 kv=f16").report.unwrap();
    let warnings: Vec<_> = machine.printed.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
    assert_eq!(warnings, ["context=65 is more than there is: 64", "threads=3 is more than there is: 1"]);
    machine.printed.clear();
    machine.boot("prompt=ab max_tokens=2 context=64 threads=1").report.unwrap();
    assert!(!machine.printed.contains("more than there is"), "{}", machine.printed);
}
