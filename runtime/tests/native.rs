//! What the runtime of the native image, without a compiler and without the check of signatures, does not do: it says so.
//! Kernels are linked here as `export-tool` does it; the runtime that calls them has no compiler.
//!
//! Tests of the whole workspace build the runtime with both; `cargo test -p runtime` builds it as the native image.
#![cfg(not(any(feature = "jit", feature = "signature")))]

mod support;

use engine::dispatch::Kernel;
use engine::{Engine, Loader, Plan, Tier};
use jit::{Compiler, space};
use memmap2::MmapMut;
use model::kernel::{KernelKey, M_BUCKETS, Op};
use model::synthetic::{self, Spec};
use model::{Isa, TensorType};
use report::ExitStatus;
use runtime::RunError;
use runtime::kernels::{Linked, LinkedKernel};
use runtime::platform::KernelFault;
use sha2::{Digest, Sha256};
use snapshot_format::ModelFile;
use snapshot_format::frozen::FrozenModel;
use support::{Machine, volume};
use zerocopy::IntoBytes;

#[test]
fn a_public_key_is_refused_rather_than_ignored() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let settings = format!("prompt=ab max_tokens=4 model.public_key={}", "d7".repeat(32));
    let mut machine = Machine::with_model(&file);
    for signature in [&[][..], &[1; 64], &[1; 65]] {
        machine.boot = Some(volume(&[("MODEL.SIG", signature)]));
        let error = machine.refused(&settings);
        assert!(matches!(error, RunError::NoSignatureCheck), "{} bytes: {error}", signature.len());
    }
    machine.boot = None;
    let error = machine.refused(&settings);
    assert!(matches!(error, RunError::NoSignature { .. } | RunError::NoSignatureCheck), "{error}");
    machine.boot("prompt=ab max_tokens=4").report.expect("without a key the model runs");
}

#[test]
fn an_image_without_kernels_for_the_model_is_refused() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let mut machine = Machine::with_model(&file);
    if !engine::isa::detect().avx2 {
        // Nothing compiled could run: such a machine takes the reference, and says so.
        return;
    }
    let error = machine.refused("prompt=ab max_tokens=4 tier=compiled");
    assert!(matches!(error, RunError::NoLinkedKernel), "{error}");
}

#[test]
fn nothing_is_tuned_and_nothing_saved() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let mut machine = Machine::with_model(&file);
    let report = machine.boot("prompt=ab max_tokens=4 tune.budget_ms=1000 snapshot=true").report.unwrap();
    assert_eq!(report.snapshot.reason.as_deref(), Some("a native image learns nothing"));
    assert_eq!((report.kernels_compiled, report.trials.len(), report.boot), (0, 0, 1));
    assert!(!report.convergence.converged);
}

/// `vzeroupper; ret`.
const NOTHING: [u8; 4] = [0xc5, 0xf8, 0x77, 0xc3];
/// Tokens of a prompt that takes the largest batch, and a smaller one for the rest.
const PROMPT_TOKENS: usize = M_BUCKETS[M_BUCKETS.len() - 1] as usize + 1;
const REMEDY: &str = "let the JIT image run longer and export again";
const SLOWLY: &str = "the reference computes them, slowly";

/// `code` as a kernel that is part of an image.
fn linked(key: KernelKey, code: &[u8]) -> LinkedKernel {
    let mut pages = MmapMut::map_anon(code.len()).unwrap();
    pages.copy_from_slice(code);
    let entry = Box::leak(Box::new(pages.make_exec().unwrap())).as_ptr();
    // SAFETY: the pages are never unmapped or written again, and hold what the compiler made for `key` and AVX2, without
    // which no test gets here, or NOTHING, which touches no operand.
    let kernel = unsafe { Kernel::from_entry(key, entry) };
    LinkedKernel { variant: space::variants(&key, Isa::AVX2)[0], kernel, len_bytes: code.len(), answer_sha256: None }
}

/// Every kernel that the model of `file` can use, as `export-tool` would link them.
fn image_for(file: &[u8]) -> Vec<LinkedKernel> {
    let description = model::gguf::read(file, file.len() as u64).unwrap();
    let plan = Plan::new(&description, 1).unwrap();
    let arena = vec![0; plan.arena_bytes()].leak();
    let mut loader = Loader::new(plan, engine::simd::Level::detect(), arena).unwrap();
    loader.feed(0, file, &engine::workers::Single).unwrap();
    let engine = Engine::new(loader.finish().unwrap(), arena, engine::isa::detect(), Tier::Reference).unwrap();
    let mut compiler = Compiler::new(Isa::AVX2).unwrap();
    let mut image = Vec::new();
    for slot in 0..engine.table().len() {
        let key = engine.table().key(slot).unwrap();
        let kernel = linked(key, &compiler.compile(&key, &space::variants(&key, Isa::AVX2)[0]).unwrap().code);
        let answer = engine.reference_answer(slot).unwrap();
        image.push(LinkedKernel { answer_sha256: Some(Sha256::digest(answer.as_bytes()).into()), ..kernel });
    }
    image
}

/// A model, its image, and the tokens that the reference gives.
struct Frozen {
    file: Vec<u8>,
    image: Vec<LinkedKernel>,
    tokens: Vec<u32>,
}

impl Frozen {
    /// `None` on a machine that runs no compiled kernel at all.
    fn new() -> Option<Self> {
        Self::of(&Spec::default())
    }

    fn of(spec: &Spec) -> Option<Self> {
        if !engine::isa::detect().avx2 {
            eprintln!("skipped: no AVX2, FMA and F16C here, so no compiled kernel can run");
            return None;
        }
        #[expect(clippy::assertions_on_constants, reason = "a build with other features has another constant")]
        {
            assert!(
                !engine::ops::HAS_BASELINE,
                "this is not the engine of a native image: run `cargo test -p runtime`"
            );
        }
        let file = synthetic::gguf(spec).unwrap();
        let tokens = reference_tokens(&file);
        let image = image_for(&file);
        assert!(M_BUCKETS.iter().all(|&m| image.iter().any(|kernel| kernel.kernel.key().m == m)), "{image:?}");
        Some(Self { file, image, tokens })
    }

    /// The image without the kernels that are `gone`, and the keys of these.
    fn without(&self, gone: impl Fn(&KernelKey) -> bool) -> (Vec<LinkedKernel>, Vec<KernelKey>) {
        let (gone, kept): (Vec<_>, Vec<_>) = self.image.iter().partition(|kernel| gone(&kernel.kernel.key()));
        (kept, gone.iter().map(|kernel| kernel.kernel.key()).collect())
    }

    /// The first kernel of a layer for single tokens.
    fn first(&self) -> LinkedKernel {
        *self.image.iter().find(|kernel| kernel.kernel.key().m == 1 && kernel.kernel.key().op != Op::LmHead).unwrap()
    }

    /// The image with `kernel` in place of the one of its key.
    fn with(&self, kernel: LinkedKernel) -> Vec<LinkedKernel> {
        let key = kernel.kernel.key();
        self.image.iter().map(|own| if own.kernel.key() == key { kernel } else { *own }).collect()
    }

    fn machine(&self) -> Machine {
        Machine::with_model(&self.file)
    }
}

fn run(tier: &str) -> String {
    // The prompt's characters are tokens of their own.
    format!("prompt=\"{}\" max_tokens=6 kv=f16 isa=avx2 tier={tier}", "7 ".repeat(PROMPT_TOKENS / 2 + 1))
}

fn reference_tokens(file: &[u8]) -> Vec<u32> {
    let report = Machine::with_model(file).boot(&run("reference")).report.unwrap();
    assert_eq!(report.token_ids.len(), 6);
    assert!(report.prompt_tokens as usize >= PROMPT_TOKENS, "{} tokens", report.prompt_tokens);
    report.token_ids
}

/// What a boot that did its work said and did.
struct Booted {
    /// Every warning.
    warnings: Vec<String>,
    printed: String,
    /// Products that ran, and whether a linked kernel computed them.
    ran: Vec<(KernelKey, bool)>,
    guarded_calls: usize,
}

impl Booted {
    /// Products that the reference computed.
    fn by_reference(&self) -> Vec<KernelKey> {
        let mut keys: Vec<_> = self.ran.iter().filter(|(_, linked)| !linked).map(|(key, _)| *key).collect();
        keys.sort_by_key(|key| key.m);
        keys
    }

    /// The batches that went through the layers.
    fn batches(&self) -> Vec<u32> {
        let ran = |m: &u32| self.ran.iter().any(|(key, _)| key.m == *m && key.op != Op::LmHead);
        M_BUCKETS.into_iter().filter(ran).collect()
    }
}

/// Boots `image`, which must give `tokens` with `used` of its kernels.
fn boots(mut machine: Machine, image: &[LinkedKernel], tokens: &[u32], used: usize) -> Booted {
    let outcome = machine.boot_linked(&run("compiled"), image);
    let printed = machine.printed;
    let report = outcome.report.unwrap_or_else(|| panic!("{:?}", outcome.error));
    assert_eq!((outcome.status, &report.token_ids[..]), (ExitStatus::Pass, tokens), "{printed}");
    assert_eq!(report.kernels_loaded as usize, used, "{printed}");
    let ran = report.kernels.iter().map(|row| (row.key.parse().unwrap(), row.variant != "reference")).collect();
    let warnings = printed.lines().filter_map(|line| line.strip_prefix("warning: ")).map(String::from).collect();
    Booted { warnings, ran, guarded_calls: machine.guarded_calls, printed }
}

/// Boots `image`, which must be refused as one whose kernels are of no use; what it says of that.
fn refuses(mut machine: Machine, image: &[LinkedKernel]) -> String {
    let outcome = machine.boot_linked(&run("compiled"), image);
    assert!(outcome.report.is_none());
    assert_eq!(outcome.status, ExitStatus::Kernels, "{:?}", outcome.error);
    let error = outcome.error.unwrap().to_string();
    assert!(machine.printed.lines().any(|line| line == format!("error: {error}")), "{error}: {}", machine.printed);
    error
}

/// The warning that `keys` have no kernel.
fn gap(keys: &[KernelKey], instead: &str) -> String {
    let names: Vec<String> = keys.iter().map(KernelKey::to_string).collect();
    format!("no linked kernel for {}: {instead}; {REMEDY}", names.join(", "))
}

#[test]
fn an_image_with_every_kernel_warns_of_nothing() {
    let Some(frozen) = Frozen::new() else { return };
    let (image, tokens) = (&frozen.image, &frozen.tokens);
    let booted = boots(frozen.machine(), image, tokens, image.len());
    assert_eq!((&booted.warnings[..], &booted.by_reference()[..]), (&[][..], &[][..]));
    assert!(booted.batches().contains(&1) && booted.batches().contains(&64), "{:?}", booted.batches());
    assert!(!booted.printed.contains("in batches of up to"), "{}", booted.printed);
    assert_eq!(booted.guarded_calls, image.len(), "one answer each");
    // An answer that does not fit, or none, is no reason to refuse a kernel that computes what the reference does.
    for answer_sha256 in [None, Some([7; 32])] {
        let doubted: Vec<_> = image.iter().map(|kernel| LinkedKernel { answer_sha256, ..*kernel }).collect();
        let booted = boots(frozen.machine(), &doubted, tokens, image.len());
        assert_eq!(booted.warnings, [""; 0]);
        assert!(booted.guarded_calls > image.len(), "the reference itself was not asked");
    }
}

#[test]
fn weights_of_every_kind_run_and_are_checked_without_the_hand_written_products() {
    // Floats, blocks of signed codes, blocks with minima, super-blocks.
    for matrices in [TensorType::F16, TensorType::Q8_0, TensorType::Q4_1, TensorType::Q4_K] {
        // Rows of whole super-blocks, for K types.
        let spec =
            Spec { dim: 256, hidden_dim: 256, n_heads: 8, head_dim: 32, n_layers: 1, matrices, ..Spec::default() };
        let Some(frozen) = Frozen::of(&spec) else { return };
        let booted = boots(frozen.machine(), &frozen.image, &frozen.tokens, frozen.image.len());
        assert_eq!((&booted.warnings[..], &booted.by_reference()[..]), (&[][..], &[][..]), "{matrices:?}");
        // Without an answer to compare with, the reference computes one.
        let unknown: Vec<_> =
            frozen.image.iter().map(|kernel| LinkedKernel { answer_sha256: None, ..*kernel }).collect();
        let booted = boots(frozen.machine(), &unknown, &frozen.tokens, unknown.len());
        assert_eq!(booted.warnings, [""; 0], "{matrices:?}");
    }
}

#[test]
fn kernels_that_are_missing_are_named_with_what_is_done_instead() {
    let Some(frozen) = Frozen::new() else { return };
    let boots = |kept: &[LinkedKernel]| boots(frozen.machine(), kept, &frozen.tokens, kept.len());
    let is_head = |key: &KernelKey| key.op == Op::LmHead;
    let is_feed_forward = |key: &KernelKey| key.op == Op::GateUpSilu;

    // The head is asked for one row at a time, whatever the batch.
    let (kept, head) = frozen.without(is_head);
    let booted = boots(&kept);
    assert_eq!(head.len(), 1);
    assert_eq!((booted.warnings.clone(), booted.by_reference()), (vec![gap(&head, SLOWLY)], head.clone()));

    // Of the layers: the next larger batch has all its kernels and takes over.
    for gone in [is_feed_forward, |key: &KernelKey| key.op != Op::LmHead] {
        let (kept, keys) = frozen.without(|key| key.m == 1 && gone(key));
        let booted = boots(&kept);
        assert_eq!(booted.warnings, [gap(&keys, "batches of 4 serve single tokens")]);
        assert_eq!((booted.by_reference(), booted.batches()[0]), (vec![], 4));
    }

    // Of both: nothing takes over for the head.
    let (kept, keys) = frozen.without(|key| key.m == 1 && (is_head(key) || is_feed_forward(key)));
    let booted = boots(&kept);
    let layer: Vec<KernelKey> = keys.iter().copied().filter(is_feed_forward).collect();
    assert_eq!(keys.len(), 2);
    assert_eq!(booted.warnings, [gap(&layer, "batches of 4 serve single tokens"), gap(&head, SLOWLY)]);
    assert_eq!((booted.by_reference(), booted.batches()[0]), (head, 4));

    // Of every batch: nothing but the reference is left.
    let (kept, keys) = frozen.without(is_feed_forward);
    let booted = boots(&kept);
    assert_eq!(keys.len(), M_BUCKETS.len());
    assert_eq!(booted.warnings, [gap(&keys, SLOWLY)]);
    assert!(booted.by_reference().iter().all(is_feed_forward) && booted.by_reference().contains(&keys[0]));

    // Of the largest batch only: single tokens lack nothing, and of prompts it is said.
    let (kept, keys) = frozen.without(|key| key.m == 64);
    let booted = boots(&kept);
    let said = "this image has kernels for prompts in batches of up to 16: for faster long prompts, let the JIT image run \
                one and export again";
    assert!(!keys.is_empty() && booted.printed.lines().any(|line| line == said), "{said}: {}", booted.printed);
    assert_eq!((&booted.warnings[..], booted.by_reference()), (&[][..], vec![]));
    assert_eq!((booted.batches().first(), booted.batches().last()), (Some(&1), Some(&16)));
}

#[test]
fn a_kernel_that_faults_is_left_out_and_named_with_its_fault() {
    let Some(frozen) = Frozen::new() else { return };
    let LinkedKernel { variant, kernel, len_bytes, .. } = frozen.first();
    let key = kernel.key();
    let len = len_bytes as u32;
    for (fault, said) in [
        (KernelFault { vector: 14, offset: Some(3) }, "raised CPU exception 14 at byte 3 of its code".to_owned()),
        (
            KernelFault { vector: 6, offset: Some(len - 1) },
            format!("raised CPU exception 6 at byte {} of its code", len - 1),
        ),
        (KernelFault { vector: 14, offset: Some(len) }, "raised CPU exception 14 outside its code".to_owned()),
        (KernelFault { vector: 13, offset: None }, "raised CPU exception 13 outside its code".to_owned()),
    ] {
        let mut machine = frozen.machine();
        machine.faults = vec![(key, fault)];
        let booted = boots(machine, &frozen.image, &frozen.tokens, frozen.image.len() - 1);
        let refusal = format!("linked kernel {key} {variant} {said}; not used");
        assert_eq!(booted.warnings, [refusal, gap(&[key], "batches of 4 serve single tokens")]);
        assert!(!booted.ran.iter().any(|(ran, _)| *ran == key), "{:?}", booted.ran);
    }
}

#[test]
fn a_kernel_that_differs_is_left_out_and_named_with_what_it_gave() {
    let Some(frozen) = Frozen::new() else { return };
    let LinkedKernel { variant, kernel, answer_sha256, .. } = frozen.first();
    let key = kernel.key();
    for answer_sha256 in [answer_sha256, None, Some([7; 32])] {
        let image = frozen.with(LinkedKernel { answer_sha256, ..linked(key, &NOTHING) });
        let booted = boots(frozen.machine(), &image, &frozen.tokens, image.len() - 1);
        let [refusal, gap_note] = &booted.warnings[..] else { panic!("{:?}", booted.warnings) };
        let start = format!("linked kernel {key} {variant} differs from the reference: random operands: y[0][0] is ");
        assert!(refusal.starts_with(&start) && refusal.ends_with(" ulp); not used"), "{refusal}");
        assert_eq!(*gap_note, gap(&[key], "batches of 4 serve single tokens"));
        assert!(!booted.ran.iter().any(|(ran, _)| *ran == key), "{:?}", booted.ran);
    }
}

#[test]
fn an_image_for_another_model_is_refused_unless_shapes_are_the_same() {
    let Some(frozen) = Frozen::new() else { return };
    // No shape of this one is in the image.
    let other = synthetic::gguf(&Spec { dim: 128, head_dim: 32, hidden_dim: 160, ..Spec::default() }).unwrap();
    let mut machine = Machine::with_model(&other);
    let error = machine.boot_linked(&run("compiled"), &frozen.image).error;
    assert!(matches!(error, Some(RunError::NoLinkedKernel)), "{error:?}");
    assert_eq!(machine.guarded_calls, 0, "a kernel of another model was run");
    let error = refuses(Machine::with_model(&other), &frozen.image);
    let said = "this native image holds no kernel for this model; it was exported for another model, thread count or \
                batch: export again or boot the JIT image";
    assert_eq!(error, said);

    // Another inner length of the feed-forward block: the rest fits. The weights are others, so the answers are, too.
    let other = synthetic::gguf(&Spec { hidden_dim: 160, seed: 99, ..Spec::default() }).unwrap();
    let own: Vec<KernelKey> = image_for(&other).iter().map(|kernel| kernel.kernel.key()).collect();
    let keys: Vec<KernelKey> = frozen.image.iter().map(|kernel| kernel.kernel.key()).collect();
    let mut missing: Vec<KernelKey> = own.iter().copied().filter(|key| !keys.contains(key)).collect();
    missing.sort_by_key(|key| key.m);
    let booted =
        boots(Machine::with_model(&other), &frozen.image, &reference_tokens(&other), own.len() - missing.len());
    assert_eq!(booted.warnings, [gap(&missing, SLOWLY)]);
}

#[test]
fn on_another_cpu_the_image_says_what_it_cannot_use() {
    let Some(frozen) = Frozen::new() else { return };
    // Without AVX2 no kernel is tried, and there is nothing else to run.
    let mut machine = frozen.machine();
    machine.cpu.isa = Isa::PORTABLE;
    let error = machine.boot_linked(&run("compiled"), &frozen.image).error;
    assert!(matches!(error, Some(RunError::NoAvx2)), "{error:?}");
    assert_eq!(machine.guarded_calls, 0);

    // With AVX2, but without what one of them was compiled for: that one does not run.
    let first = frozen.first();
    for (name, needs) in [("w512_r1_c32_s1_u1_pf0", "AVX-512 F, BW, DQ and VL"), ("w256a_r1_c32_s1_u1_pf0", "AVX-VNNI")]
    {
        let image = frozen.with(LinkedKernel { variant: name.parse().unwrap(), ..first });
        let key = first.kernel.key();
        let booted = boots(frozen.machine(), &image, &frozen.tokens, image.len() - 1);
        let refusal =
            format!("linked kernel {key} {name} needs {needs}, which the CPU lacks or isa= rules out; not used");
        assert_eq!(booted.warnings, [refusal, gap(&[key], "batches of 4 serve single tokens")]);
        assert_eq!(booted.guarded_calls, image.len() - 1, "it was called");
    }

    // Kernels that need more than their names say: invalid opcodes.
    let LinkedKernel { variant, kernel, .. } = frozen.image[0];
    let mut machine = frozen.machine();
    let fault = KernelFault { vector: 6, offset: Some(9) };
    machine.faults = frozen.image.iter().map(|kernel| (kernel.kernel.key(), fault)).collect();
    let error = refuses(machine, &frozen.image);
    let said = format!(
        "none of the {} kernels this native image holds for the model can be used; the first, linked kernel {} {variant} \
         raised CPU exception 6 at byte 9 of its code; not used; export again from a snapshot that was tuned on this CPU, \
         or boot the JIT image",
        frozen.image.len(),
        kernel.key(),
    );
    assert_eq!(error, said);
}

#[test]
fn an_image_knows_the_hash_of_the_model_it_was_exported_with_and_of_no_other() {
    let Some(frozen) = Frozen::new() else { return };
    let boot = |file: &[u8], model: FrozenModel, settings: &str| {
        let mut machine = Machine::with_model(file);
        let linked = Linked { model, kernels: &frozen.image };
        let report = machine.boot_image(&format!("{} {settings}", run("compiled")), linked).report.unwrap();
        (report.model, machine.printed)
    };
    let (unknown, printed) = boot(&frozen.file, FrozenModel::default(), "");
    assert!(unknown.sha256.is_none() && printed.contains("it did not come with the image"), "{printed}");
    let model_id = std::array::from_fn(|i| u8::from_str_radix(&unknown.fingerprint[2 * i..2 * i + 2], 16).unwrap());
    let model_file = Some(ModelFile { len_bytes: frozen.file.len() as u64, sha256: [0xab; 32] });
    let model = FrozenModel { model_id, model_file };
    let (remembered, printed) = boot(&frozen.file, model, "");
    assert_eq!(remembered.sha256, Some("ab".repeat(32)), "{printed}");
    assert!(remembered.sha256_remembered && printed.contains("(of an earlier boot)"), "{printed}");
    let (computed, _) = boot(&frozen.file, model, "model.sha256=show");
    assert!(computed.sha256 != remembered.sha256 && !computed.sha256_remembered);
    // The same shapes with other weights.
    let other = synthetic::gguf(&Spec { seed: Spec::default().seed + 1, ..Spec::default() }).unwrap();
    assert!(boot(&other, model, "").0.sha256.is_none());
}
