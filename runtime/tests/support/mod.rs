//! A machine in memory: disks, arenas and what was said, for tests of whole boots without a compiler in them.
#![allow(dead_code)] // each test file uses its part

use bootimage::{FileSpec, ImageSpec};
use engine::dispatch::{Kernel, KernelArgs};
use engine::workers::Workers;
use model::kernel::KernelKey;
use report::ImageKind;
use runtime::boot::{Outcome, Request, Settings, run};
use runtime::kernels::{Linked, LinkedKernel};
use runtime::load::Companions;
use runtime::platform::{Clock, CpuFacts, KernelFault, MemoryUse, OutOfMemory, Platform, WhichDisk};
use snapshot_format::frozen::FrozenModel;
use storage::{BlockDevice, MemoryDisk};

/// Scoped threads, started anew for each job.
pub struct Threads(pub usize);

impl Workers for Threads {
    fn count(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            (1..self.0).for_each(|i| drop(scope.spawn(move || job(i))));
            job(0);
        });
    }
}

/// The machine.
pub struct Machine {
    pub cpu: CpuFacts,
    pub workers: Threads,
    pub boot: Option<MemoryDisk>,
    pub model: Option<Box<dyn BlockDevice>>,
    /// All that was printed.
    pub printed: String,
    /// What the kernels of these keys raise when they are tried.
    pub faults: Vec<(KernelKey, KernelFault)>,
    /// Kernels tried.
    pub guarded_calls: usize,
}

impl Machine {
    /// One with `model` on a raw disk and no other.
    pub fn with_model(model: &[u8]) -> Self {
        let isa = engine::isa::detect();
        let cpu = CpuFacts { brand: "test".into(), fingerprint: "test".into(), hypervisor: None, isa };
        Self {
            cpu,
            workers: Threads(1),
            boot: None,
            model: Some(Box::new(MemoryDisk::new(model.to_vec()))),
            printed: String::new(),
            faults: Vec::new(),
            guarded_calls: 0,
        }
    }

    /// Boots with `settings` and without compiled kernels.
    pub fn boot(&mut self, settings: &str) -> Outcome {
        self.boot_linked(settings, &[])
    }

    /// Boots with `settings` an image that these kernels are linked into.
    pub fn boot_linked(&mut self, settings: &str, kernels: &[LinkedKernel]) -> Outcome {
        self.boot_image(settings, Linked { model: FrozenModel::default(), kernels })
    }

    /// Boots with `settings` an image that this is linked into.
    pub fn boot_image(&mut self, settings: &str, linked: Linked<'_>) -> Outcome {
        let settings = format!("tier=baseline snapshot=false tune.budget_ms=0 ignore_eos=1 report=0 {settings}");
        let settings = Settings::CommandLine(&settings);
        let companions = Companions::default();
        let image = if linked.kernels.is_empty() { ImageKind::Hosted } else { ImageKind::Native };
        run(self, Request { image, settings, linked, companions })
    }

    /// Boots, and gives what stopped it.
    pub fn refused(&mut self, settings: &str) -> runtime::RunError {
        let outcome = self.boot(settings);
        assert!(outcome.report.is_none(), "{settings} ran");
        outcome.error.expect("a boot without a report says why")
    }
}

/// A boot volume with these files.
pub fn volume(files: &[(&str, &[u8])]) -> MemoryDisk {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = ImageSpec { slot_mib: 1, ..ImageSpec::without_kernel() };
    for (name, bytes) in files {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        spec.files.push(FileSpec { name: (*name).into(), path });
    }
    let image = dir.path().join("disk.img");
    bootimage::build(&spec, &image).unwrap();
    MemoryDisk::new(std::fs::read(&image).unwrap())
}

impl Platform for Machine {
    fn clock(&self) -> Clock {
        Clock { tsc_hz: 1_000_000_000, trusted: false, entry_tsc: engine::cycles() }
    }

    fn cpu(&self) -> &CpuFacts {
        &self.cpu
    }

    fn unix_time(&self) -> Option<u64> {
        None
    }

    fn print(&mut self, text: &str) {
        self.printed.push_str(text);
    }

    fn send(&mut self, _frame: &[u8]) {}

    fn disk(&mut self, which: WhichDisk) -> (Option<&mut dyn BlockDevice>, &dyn Workers) {
        let disk = match which {
            WhichDisk::Boot => self.boot.as_mut().map(|disk| disk as &mut dyn BlockDevice),
            WhichDisk::Model => self.model.as_deref_mut().map(|disk| disk as &mut dyn BlockDevice),
        };
        (disk, &self.workers)
    }

    fn arena(&mut self, _name: &'static str, len_bytes: usize) -> Result<&'static mut [u8], OutOfMemory> {
        Ok(vec![0xff; len_bytes].leak())
    }

    fn freeze(&mut self, weights: &'static mut [u8]) -> &'static [u8] {
        weights
    }

    fn publish(&mut self, _key: KernelKey, code: &[u8]) -> Result<Kernel, OutOfMemory> {
        Err(OutOfMemory { name: "code", need_bytes: code.len() as u64, have_bytes: 0 })
    }

    fn call_guarded(&mut self, kernel: Kernel, args: KernelArgs<'_>) -> Result<(), KernelFault> {
        self.guarded_calls += 1;
        if let Some((_, fault)) = self.faults.iter().find(|(key, _)| *key == kernel.key()) {
            return Err(*fault);
        }
        kernel.call(args);
        Ok(())
    }

    fn workers(&self) -> &dyn Workers {
        &self.workers
    }

    fn memory(&self) -> Vec<MemoryUse> {
        Vec::new()
    }
}
