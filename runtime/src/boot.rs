//! One boot as it reads: options, model, kernels, generation, tuning, snapshot, report.

use crate::error::RunError;
#[cfg(not(feature = "jit"))]
use crate::frozen::Kernels;
use crate::generate::{Generated, generate};
use crate::hash::HashWork;
use crate::identity::{hex, identity};
use crate::kernels::Linked;
#[cfg(feature = "jit")]
use crate::learning::Kernels;
use crate::load::{self, Companions, Loaded, Location, Round};
use crate::options::{IsaLimit, Options, Tier};
use crate::platform::{Platform, WhichDisk};
use crate::prompt;
use crate::reporter::Reporter;
use crate::rows::kernel_rows;
use crate::summary::{Ran, boot_report};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use engine::attention::KvType;
use engine::dispatch::MAX_PARTS;
use engine::simd::limits;
use engine::workers::{Workers, for_each};
use engine::{Engine, Loader, Plan, Session, SessionMemory};
use model::Isa;
use model::ModelDescription;
use report::{BootReport, ExitStatus, ImageKind, Level, Message, TrialRow, screen};
use storage::{FatVolume, write_in_place};

/// Name of the settings file on the boot volume.
pub const CONFIG_FILE: &str = "BAREFLOW.CFG";
/// Name of the file on the boot volume that takes the report screen.
pub const REPORT_FILE: &str = "REPORT.TXT";
/// Longest settings file.
const MAX_CONFIG_BYTES: u64 = 64 << 10;
/// Smallest piece of memory that is given at once.
const PAGE_BYTES: usize = 4096;
/// Of the report file, this much is written.
const MAX_REPORT_BYTES: usize = 64 << 10;
/// Memory is touched in pieces of this size: some large pages.
const TOUCHED_TOGETHER_BYTES: usize = 8 << 20;
/// Context when neither the options nor the model ask for less.
const DEFAULT_CONTEXT: usize = 2048;

/// What is to be run.
pub struct Request<'a> {
    /// Which image asks.
    pub image: ImageKind,
    /// Settings that override the boot volume's file.
    pub settings: Settings<'a>,
    /// What is linked into the image.
    pub linked: Linked<'a>,
    /// What belongs to the model and is not on the boot volume.
    pub companions: Companions,
}

/// Where settings come from.
#[allow(clippy::large_enum_variant, reason = "one of it a boot: boxing it would save nothing")]
pub enum Settings<'a> {
    /// `BAREFLOW.CFG` on the boot volume, then this command line.
    CommandLine(&'a str),
    /// These, and no file.
    Given(Box<Options>),
}

/// How a run ended.
pub struct Outcome {
    /// Status for the exit code.
    pub status: ExitStatus,
    /// The report, when the work was done.
    pub report: Option<BootReport>,
    /// Why the work was not done.
    pub error: Option<RunError>,
}

/// Runs one boot from the first message to the last.
pub fn run(platform: &mut dyn Platform, request: Request<'_>) -> Outcome {
    let image = request.image;
    let mut reporter = Reporter::start(platform, image);
    reporter.stage(platform, "platform");
    match work(platform, &mut reporter, request) {
        Ok(report) => {
            reporter.send(platform, &Message::Report(report.clone()));
            let status = reporter.end(platform, ExitStatus::Pass);
            Outcome { status, report: Some(report), error: None }
        }
        Err(error) => {
            let text = error.to_string();
            // A process says itself why it ends.
            if image == ImageKind::Hosted {
                reporter.send(platform, &Message::Note { level: Level::Error, text });
            } else {
                reporter.note(platform, Level::Error, text);
            }
            let status = reporter.end(platform, error.exit_status());
            Outcome { status, report: None, error: Some(error) }
        }
    }
}

fn work(platform: &mut dyn Platform, reporter: &mut Reporter, request: Request<'_>) -> Result<BootReport, RunError> {
    let options = match request.settings {
        Settings::Given(options) => *options,
        Settings::CommandLine(text) => read_options(platform, text)?,
    };
    let isa = limited(platform.cpu().isa, options.isa);
    if !isa.avx2 {
        if !engine::ops::HAS_BASELINE {
            return Err(RunError::NoAvx2);
        }
        let text = "no AVX2, FMA and F16C (CPU or isa=): the portable ops run, and no kernels are compiled";
        reporter.note(platform, Level::Warning, text);
    }

    let location = load::locate(platform, &options)?;
    let companions = request.companions.or_from_volume(platform, &options)?;
    let description = load::describe(platform, &location, &options, &companions)?;
    if let Some(key) = &options.model_public_key {
        reporter.note(platform, Level::Info, alloc::format!("the model is signed by {}", hex(key)));
    }
    let context = context(&options, &description);
    let prompt_tokens = prompt::encode(&description, &options, context)?;
    reporter.stage(platform, "model_header");

    let threads = threads(&options, platform.workers());
    for (asked, what, given) in [(options.context, "context", context), (options.threads, "threads", threads)] {
        if asked as usize > given {
            reporter.note(platform, Level::Warning, alloc::format!("{what}={asked} is more than there is: {given}"));
        }
    }
    let shape = Shape { isa, threads, context, prompt: prompt_tokens.len() };
    let reserved = Reserved::new(platform, &description, &options, shape)?;
    reporter.stage(platform, "memory");
    let hash_work = HashWork::new(options.model_sha256, || Kernels::hash_needless(platform, &options, isa));
    let (mut engine, mut session, mut loaded) =
        reserved.load(platform, &location, &description, &options, hash_work)?;
    reporter.stage(platform, "load_model");
    if !engine::ops::HAS_BASELINE && kv_type(&options, &description) == KvType::F32 {
        let text = "attention over an f32 cache takes its plainest form in this image; kv=f16 is faster";
        reporter.note(platform, Level::Warning, text);
    }

    let identity = identity(platform.cpu(), loaded.fingerprint);
    let mut kernels = Kernels::start(platform, reporter, &options, isa, identity, request.linked);
    kernels.install(platform, reporter, &mut engine)?;
    loaded.sha256 = kernels.remember_hash(loaded.sha256);
    reporter.stage(platform, "restore_kernels");

    let out = generate(platform, reporter, &mut engine, &mut session, &description, &options, &prompt_tokens)?;
    // Lines cost time, and until here somebody waits for an answer.
    reporter.note(platform, Level::Info, loaded.sha256.to_string());

    let limits = limits::measure(engine.weights(), engine.table().level(), isa, platform.workers(), threads);
    reporter.stage(platform, "measure_limits");
    // The table shows what this boot ran with, not what it goes on to find.
    let ran_with = kernels.running().clone();
    let work = kernels.improve(platform, reporter, &mut engine, &limits);

    let trusted_hz = Some(platform.clock()).filter(|clock| clock.trusted).map(|clock| clock.tsc_hz);
    let rows = kernel_rows(&engine, &limits, &ran_with, trusted_hz, &|key| kernels.remembered(key));
    // Summed from 0.0: the sum of no floats is -0.0.
    let settled_share = rows.iter().filter(|row| row.settled).fold(0.0, |sum, row| sum + row.time_share);
    let figures = BootFigures { generated: &out, settled_share, kernels_changed: work.changed, threads };
    let (convergence, snapshot) = kernels.conclude(platform, reporter, &figures);
    reporter.stage(platform, "save_snapshot");

    let mut report = boot_report(
        platform,
        Ran {
            image: request.image,
            boot: kernels.boot(),
            options: &options,
            isa,
            threads,
            location: &location,
            description: &description,
            loaded: &loaded,
            prompt_tokens: prompt_tokens.len(),
            generated: out,
            engine: &engine,
            limits: &limits,
            rows,
            kernels_loaded: kernels.restored(),
            work,
            snapshot,
            convergence,
        },
    );
    report.stages = reporter.stages().to_vec();
    if options.report {
        let text = screen::boot_screen(&report);
        platform.print(&text);
        // A native image leaves the volume as it is.
        if request.image != ImageKind::Native {
            write_report(platform, &text);
        }
    }
    report.stages = reporter.stages().to_vec();
    Ok(report)
}

/// What the search of this boot did; all zero where there was none.
#[derive(Default)]
pub struct TuningWork {
    /// Every variant tried, in order.
    pub trials: Vec<TrialRow>,
    /// Kernels compiled.
    pub compiled: u32,
    /// Keys whose kernel changed.
    pub changed: u32,
    /// Sum of compile times, ms.
    pub compile_ms: f64,
}

/// What earlier boots and this one found out about a key.
#[derive(Clone, Copy, Default, Debug)]
pub struct Remembered {
    /// Median cycles of the hand-written op.
    pub baseline_cycles: Option<u64>,
    /// Variants tried.
    pub tried: u32,
    /// Variants in the search.
    pub variants: u32,
    /// None is left to try.
    pub exhausted: bool,
}

/// What one boot measured, for the decision whether the search has converged.
pub struct BootFigures<'a> {
    /// The generation, with its times.
    pub generated: &'a Generated,
    /// Share of the kernel cycles in settled keys.
    pub settled_share: f64,
    /// Keys whose kernel changed.
    pub kernels_changed: u32,
    /// Cores at work.
    pub threads: usize,
}

/// The settings of a guest: `BAREFLOW.CFG` on the boot volume, then the command line.
///
/// # Errors
/// [`RunError`] of the volume, or of a setting that cannot be read.
pub fn read_options(platform: &mut dyn Platform, command_line: &str) -> Result<Options, RunError> {
    let mut options = Options::default();
    if let Some(bytes) = load::boot_file(platform, CONFIG_FILE, MAX_CONFIG_BYTES)? {
        options.apply(&String::from_utf8_lossy(&bytes))?;
    }
    options.apply(command_line)?;
    Ok(options)
}

/// What may be used of what the CPU has.
pub fn limited(isa: Isa, limit: IsaLimit) -> Isa {
    match limit {
        IsaLimit::Auto | IsaLimit::Avx512 => isa,
        IsaLimit::Avx2Vnni => Isa { avx512: false, avx512_vnni: false, ..isa },
        IsaLimit::Avx2 => Isa { avx512: false, avx512_vnni: false, avx_vnni: false, ..isa },
        IsaLimit::Portable => Isa::PORTABLE,
    }
}

/// Cores to compute on, of those there are; at most [`MAX_PARTS`] unless more are asked for, which the plan then refuses.
pub fn threads(options: &Options, workers: &dyn Workers) -> usize {
    match options.threads as usize {
        0 => workers.count().min(MAX_PARTS),
        n => n.min(workers.count()),
    }
}

/// Positions of the context: what was asked for or the default, and what the model allows at most.
pub fn context(options: &Options, description: &ModelDescription) -> usize {
    let model = description.config.seq_len as usize;
    match options.context as usize {
        0 => model.min(DEFAULT_CONTEXT),
        asked => asked.min(model),
    }
}

/// Type of the KV cache: what was asked for, or what suits the model.
pub fn kv_type(options: &Options, description: &ModelDescription) -> KvType {
    options.kv.unwrap_or_else(|| KvType::for_model(description))
}

/// What a model is loaded for.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Instruction sets that may be used.
    pub isa: Isa,
    /// Cores to compute on.
    pub threads: usize,
    /// Positions of the context.
    pub context: usize,
    /// Of these, the ones that are filled as soon as all is loaded.
    pub prompt: usize,
}

/// The memory of a run, set aside before anything is read into it.
pub struct Reserved {
    shape: Shape,
    plan: Plan,
    kv: KvType,
    session: SessionMemory<&'static mut [u8]>,
    weights: &'static mut [u8],
    /// The angles go to the heap as the context fills: their room is held until the engine takes it.
    angles: Vec<u8>,
}

impl Reserved {
    /// Sets aside all memory the run needs, and touches that of the weights and of the prompt's keys and values: what a hypervisor or
    /// operating system gives only when it is touched costs its time here, on all cores, and not where the device's speed is measured
    /// or one core stores keys.
    ///
    /// # Errors
    /// A model that cannot be planned or does not fit.
    pub fn new(
        platform: &mut dyn Platform,
        description: &ModelDescription,
        options: &Options,
        shape: Shape,
    ) -> Result<Self, RunError> {
        let Shape { threads, context, prompt, .. } = shape;
        let plan = Plan::new(description, threads)?;
        let kv = kv_type(options, description);
        let bytes = Session::memory_bytes(&description.config, context, threads, kv);
        let session = SessionMemory {
            kv: platform.arena("kv", bytes.kv)?,
            activations: platform.arena("activations", bytes.activations)?,
        };
        let weights = platform.arena("weights", plan.arena_bytes())?;
        let need_bytes = plan.angle_bytes(context);
        let no_room = RunError::NoRoomForAngles { context, need_bytes };
        let mut angles: Vec<u8> = Vec::new();
        angles.try_reserve_exact(need_bytes).map_err(|_| no_room)?;
        let (_, loaders) = platform.disk(WhichDisk::Model);
        // A context's first positions come first.
        let prompt_bytes = Session::memory_bytes(&description.config, prompt.min(context), threads, kv).kv;
        let soon = &mut session.kv[..prompt_bytes];
        let touched = weights.chunks_mut(TOUCHED_TOGETHER_BYTES).chain(soon.chunks_mut(TOUCHED_TOGETHER_BYTES));
        for_each(loaders, touched, |chunk| {
            chunk.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 0);
        });
        Ok(Self { shape, plan, kv, session, weights, angles })
    }

    /// Streams the model into the weights arena, freezes that, and opens an empty session.
    ///
    /// # Errors
    /// A model that cannot be read.
    pub(crate) fn load(
        self,
        platform: &mut dyn Platform,
        location: &Location,
        description: &ModelDescription,
        options: &Options,
        hash_work: HashWork,
    ) -> Result<(Engine<'static>, Session<'static>, Loaded), RunError> {
        let Shape { isa, context, .. } = self.shape;
        let mut loader = Loader::new(self.plan, engine::simd::Level::new(isa), self.weights)?;
        let mut fill =
            |platform: &mut dyn Platform| load::weights(platform, location, description, hash_work, &mut loader);
        let mut loaded = fill(platform)?;
        for _ in 0..options.load_rounds {
            let raw_ticks = load::raw_ticks(platform, location, loaded.bytes)?;
            loaded.rounds.push(Round { raw_ticks, ticks: fill(platform)?.ticks });
        }
        let model = loader.finish()?;
        let tier = if options.tier == Tier::Reference { engine::Tier::Reference } else { engine::Tier::Baseline };
        let weights = platform.freeze(self.weights);
        let mut engine = Engine::new(model, weights, isa, tier)?;
        drop(self.angles);
        engine.reserve_angles(context);
        let session = Session::new(&engine, context, self.kv, self.session)?;
        Ok((engine, session, loaded))
    }
}

/// Sets aside the memory of a run and loads the model.
///
/// # Errors
/// As of [`Reserved`]. That a model does not fit is found before it is read.
pub fn load_session(
    platform: &mut dyn Platform,
    location: &Location,
    description: &ModelDescription,
    options: &Options,
    shape: Shape,
) -> Result<(Engine<'static>, Session<'static>, Loaded), RunError> {
    let hash_work = HashWork::new(options.model_sha256, || Some("no snapshot would remember it"));
    Reserved::new(platform, description, options, shape)?.load(platform, location, description, options, hash_work)
}

/// Leaves the screen in the preallocated report file, if the volume has one. Not worth failing over.
fn write_report(platform: &mut dyn Platform, text: &str) {
    let Some(disk) = platform.boot_disk() else { return };
    if disk.read_only() {
        return;
    }
    let Ok(volume) = FatVolume::open(disk) else { return };
    let Ok(file) = volume.find(disk, REPORT_FILE) else { return };
    // The file's length is fixed: blank out what an earlier, longer report left, as far as one can be long.
    let len = usize::try_from(file.len_bytes).map_or(MAX_REPORT_BYTES, |len| len.min(MAX_REPORT_BYTES));
    let mut bytes = vec![b' '; len];
    let taken = text.len().min(len);
    bytes[..taken].copy_from_slice(&text.as_bytes()[..taken]);
    if write_in_place(disk, &file, 0, &bytes).is_ok() {
        let _ = disk.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Many(usize);

    impl Workers for Many {
        fn count(&self) -> usize {
            self.0
        }

        fn run(&self, job: &(dyn Fn(usize) + Sync)) {
            (0..self.0).for_each(job);
        }
    }

    #[test]
    fn all_cores_means_as_many_as_a_plan_takes() {
        let asked = |n| Options { threads: n, ..Options::default() };
        assert_eq!(threads(&asked(0), &Many(8)), 8);
        assert_eq!(threads(&asked(0), &Many(MAX_PARTS + 1)), MAX_PARTS);
        assert_eq!(threads(&asked(3), &Many(8)), 3);
        assert_eq!(threads(&asked(9), &Many(8)), 8);
    }
}
