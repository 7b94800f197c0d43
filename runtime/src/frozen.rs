//! What an image without a compiler does with kernels: uses those that are linked into it. `learning` is the
//! counterpart of the self-optimising images.

use crate::boot::{BootFigures, Remembered, TuningWork};
use crate::error::RunError;
use crate::hash::FileSha256;
use crate::kernels::{Linked, RunningKernels, install_linked};
use crate::options::{Options, Tier};
use crate::platform::Platform;
use crate::reporter::Reporter;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use engine::Engine;
use engine::simd::limits::Limits;
use model::Isa;
use model::kernel::{KernelKey, M_BUCKETS, Op};
use report::{Convergence, Level, SnapshotStatus};
use snapshot_format::Identity;

/// The kernels of one boot.
pub struct Kernels<'a> {
    options: &'a Options,
    isa: Isa,
    linked: Linked<'a>,
    /// The model is that with which the kernels converged.
    same_model: bool,
    running: RunningKernels,
    /// Rows of the largest batches that have all their kernels.
    largest_batch: u32,
}

impl<'a> Kernels<'a> {
    /// Takes the kernels of the image.
    pub fn start(
        _platform: &mut dyn Platform,
        _reporter: &mut Reporter,
        options: &'a Options,
        isa: Isa,
        identity: Identity,
        linked: Linked<'a>,
    ) -> Self {
        let same_model = identity.model_id == linked.model.model_id;
        let largest_batch = M_BUCKETS[M_BUCKETS.len() - 1];
        Self { options, isa, linked, same_model, running: RunningKernels::none(0), largest_batch }
    }

    /// Why no hash is computed: none is remembered here.
    pub(crate) fn hash_needless(_platform: &mut dyn Platform, _options: &Options, _isa: Isa) -> Option<&'static str> {
        Some("it did not come with the image")
    }

    /// The model's hash as `found` while loading, or else as the export brought it.
    pub(crate) fn remember_hash(&mut self, found: FileSha256) -> FileSha256 {
        match (found, self.linked.model.model_file.filter(|_| self.same_model)) {
            (FileSha256::Unknown(_), Some(file)) => FileSha256::Remembered(file),
            _ => found,
        }
    }

    /// Installs the kernels of the image, each after it gave the reference's answer.
    ///
    /// # Errors
    /// [`RunError::NoLinkedKernel`] and [`RunError::LinkedKernelsRefused`].
    pub fn install(
        &mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        engine: &mut Engine<'_>,
    ) -> Result<(), RunError> {
        self.running = RunningKernels::none(engine.table().len());
        if self.options.tier == Tier::Compiled && self.isa.avx2 {
            self.running = install_linked(platform, reporter, engine, self.linked.kernels, self.isa)?;
            self.note_gaps(platform, reporter, engine);
            let sizes = M_BUCKETS.iter().zip(engine.batch_sizes());
            self.largest_batch = sizes.rev().find(|&(_, has)| has).map_or(1, |(m, _)| *m);
        }
        Ok(())
    }

    /// Says which products have no kernel, and what is done instead: nothing here is slow in silence.
    fn note_gaps(&self, platform: &mut dyn Platform, reporter: &mut Reporter, engine: &Engine<'_>) {
        const REMEDY: &str = "let the JIT image run longer and export again";
        // `batch_sizes` allows every size where none has all its kernels.
        let sizes = engine.batch_sizes();
        let (mut slow, mut replaced) = (Vec::new(), Vec::new());
        for (bucket, in_use) in sizes.into_iter().enumerate() {
            for key in engine.keys_without_kernel(bucket) {
                // The head runs for one row at a time, whatever the batch.
                if in_use || key.op == Op::LmHead {
                    slow.push(key);
                } else if bucket == 0 {
                    replaced.push(key);
                }
            }
        }
        let mut note = |keys: &[KernelKey], instead: &str| {
            if !keys.is_empty() {
                let names: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
                let text = format!("no linked kernel for {}: {instead}; {REMEDY}", names.join(", "));
                reporter.note(platform, Level::Warning, text);
            }
        };
        if let Some((m, _)) = M_BUCKETS.iter().zip(sizes).find(|&(_, has)| has) {
            note(&replaced, &format!("batches of {m} serve single tokens"));
        }
        note(&slow, "the reference computes them, slowly");
    }

    /// Which variant runs in each slot.
    pub fn running(&self) -> &RunningKernels {
        &self.running
    }

    /// A native image does not count its boots.
    pub fn boot(&self) -> u32 {
        1
    }

    /// Kernels in use.
    pub fn restored(&self) -> u32 {
        self.running.count() as u32
    }

    /// Nothing: what was learnt is in the kernels.
    pub fn remembered(&self, _key: &KernelKey) -> Remembered {
        Remembered::default()
    }

    /// There is no compiler to improve anything with.
    pub fn improve(
        &mut self,
        _platform: &mut dyn Platform,
        _reporter: &mut Reporter,
        _engine: &mut Engine<'_>,
        _limits: &Limits,
    ) -> TuningWork {
        TuningWork::default()
    }

    /// Nothing is decided and nothing saved.
    pub fn conclude(
        &mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        figures: &BootFigures<'_>,
    ) -> (Convergence, SnapshotStatus) {
        if self.largest_batch < M_BUCKETS[M_BUCKETS.len() - 1] {
            let text = format!(
                "this image has kernels for prompts in batches of up to {}: for faster long prompts, let the JIT image run one and export again",
                self.largest_batch
            );
            reporter.note(platform, Level::Info, text);
        }
        let reason = "a native image does not tune: its kernels are part of it".into();
        let convergence = Convergence::undecided(figures.settled_share, reason);
        let mut status = SnapshotStatus::disabled();
        status.reason = Some("a native image learns nothing".into());
        status.kernels_restored = self.restored();
        (convergence, status)
    }
}
