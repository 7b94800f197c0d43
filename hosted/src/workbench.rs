//! A loaded model outside of a boot: the same engine, kernels and limits, for measuring instead of generating.
//!
//! [`Workbench::open`] does what a boot does up to the end of the generation: load, restore the snapshot's kernels (each
//! verified), run the prompt and some tokens. After that every slot has its share of time and its real inputs.

use crate::platform::{FileDisk, Process};
use anyhow::{Context, Result, bail};
use engine::simd::limits::{self, Limits};
use engine::{Engine, EngineError, Runs};
use jit::Compiler;
use model::Isa;
use model::kernel::{KernelKey, Variant};
use profiler::HotKey;
use report::ImageKind;
use runtime::boot::Shape;
use runtime::kernels::{RunningKernels, restore};
use runtime::load::Companions;
use runtime::options::Tier;
use runtime::platform::Platform;
use runtime::reporter::Reporter;
use runtime::{Options, boot, generate, identity, load, prompt};
use snapshot_format::{CodeUse, DiskMedium, Snapshot, StoredKernel};
use std::path::Path;

/// The bench.
pub struct Workbench {
    /// The process as a machine.
    pub process: Process,
    /// The model, the snapshot's kernels installed.
    pub engine: Engine<'static>,
    /// What the machine can do, measured after the generation.
    pub limits: Limits,
    /// Instruction sets in use.
    pub isa: Isa,
    /// Which variant runs in each slot.
    pub running: RunningKernels,
    turn: usize,
}

impl Workbench {
    /// Loads `model` with its `companions` as `options` say and takes the kernels of the snapshot on the image `snapshot`.
    ///
    /// # Errors
    /// What stops a boot; a snapshot of another model or CPU.
    pub fn open(model: &Path, companions: Companions, snapshot: Option<&Path>, options: &Options) -> Result<Self> {
        let disk = FileDisk::open(model, false).with_context(|| format!("opening {}", model.display()))?;
        let image = match snapshot {
            Some(path) => Some(FileDisk::open(path, false).with_context(|| format!("opening {}", path.display()))?),
            None => None,
        };
        let mut process = Process::start(engine::cycles(), options.threads as usize, Some(disk), image, true)?;
        let isa = boot::limited(process.cpu().isa, options.isa);
        let location = load::locate(&mut process, options)?;
        let companions = companions.or_from_volume(&mut process, options)?;
        let description = load::describe(&mut process, &location, options, &companions)?;
        let context = boot::context(options, &description);
        let prompt = prompt::encode(&description, options, context)?;
        let threads = boot::threads(options, process.workers());
        let shape = Shape { isa, threads, context, prompt: prompt.len() };
        let (mut engine, mut session, loaded) =
            boot::load_session(&mut process, &location, &description, options, shape)?;

        let mut reporter = Reporter::start(&mut process, ImageKind::Hosted);
        let identity = identity::identity(process.cpu(), loaded.fingerprint);
        let mut learnt = match (snapshot, process.boot_disk()) {
            (Some(path), Some(disk)) => {
                let mut medium = DiskMedium::open(disk).with_context(|| format!("reading {}", path.display()))?;
                let opened = snapshot_format::open(&mut medium, &identity)
                    .map_err(|cold| anyhow::anyhow!("{}: {cold}", path.display()))?;
                if let CodeUse::ProfileOnly(why) = &opened.code {
                    print_note!("{}: {why}; its kernels are compiled again", path.display());
                }
                opened.snapshot
            }
            _ => Snapshot::default(),
        };
        let mut running = RunningKernels::none(engine.table().len());
        if options.tier == Tier::Compiled && isa.avx2 {
            let mut compiler = Compiler::new(isa)?;
            let mut rebuild = |key: &KernelKey, variant: &Variant| {
                let compiled = compiler.compile(key, variant).map_err(|error| error.to_string())?;
                Ok(StoredKernel::new(*variant, compiled.code))
            };
            running = restore(&mut process, &mut reporter, &mut engine, &mut learnt, isa, &mut rebuild).running;
        }
        generate::generate(&mut process, &mut reporter, &mut engine, &mut session, &description, options, &prompt)?;
        let limits = limits::measure(engine.weights(), engine.table().level(), isa, process.workers(), threads);
        Ok(Self { process, engine, limits, isa, running, turn: 0 })
    }

    /// Keys with at least `share` of the kernel cycles of the generation, hottest first.
    pub fn hot(&self, share: f64) -> Vec<HotKey> {
        self.engine.table().profile().hot_list().into_iter().filter(|hot| hot.share >= share).collect()
    }

    /// Fewest cycles one op of `key` can take: its bytes or its multiply-adds at the limits of all threads together.
    pub fn limit_cycles(&self, key: &KernelKey) -> Option<f64> {
        let threads = self.engine.plan().threads();
        runtime::rows::roofline(&self.limits, key, threads).limit_cycles(key.weight_bytes(), key.flops())
    }

    /// Compiles, publishes and verifies `variant` of `slot`.
    ///
    /// # Errors
    /// Why it cannot be used, as text for people.
    pub fn prepare(&mut self, compiler: &mut Compiler, slot: usize, variant: &Variant) -> Result<Runs> {
        let key = self.engine.table().key(slot).context("no such slot")?;
        let compiled = compiler.compile(&key, variant)?;
        let kernel = self.process.publish(key, &compiled.code)?;
        let len_bytes = compiled.code.len();
        match runtime::kernels::verify(&mut self.process, &mut self.engine, slot, kernel, len_bytes) {
            Ok(()) => Ok(Runs::Compiled(kernel)),
            Err(rejected) => bail!("{rejected}"),
        }
    }

    /// Cycles of one op of `slot` done by `runs`, on the next of its matrices, which is not in a cache.
    ///
    /// # Errors
    /// A slot that does not exist or a kernel for another key.
    pub fn time(&mut self, slot: usize, runs: Runs) -> Result<u64, EngineError> {
        self.turn += 1;
        let instances = self.engine.instances(slot).max(1);
        self.engine.replay(self.process.workers(), slot, runs, self.turn % instances)
    }
}
