//! Is a kernel right? Compares its output bit for bit with the reference before it may be installed.
//!
//! Cases: random weights with random activations (over the whole range of both), and real weights of the model with
//! the activations captured from the forward pass. The output has random content before the call, spare columns in
//! every row and a spare row at the end: a kernel that writes outside its columns differs there.
//!
//! The reference is slow. [`Engine::reference_answer`] is what it makes of fixed operands; its hash can stand for the
//! reference in later boots, in which [`Engine::kernel_answer`] has to have the same.

use crate::dispatch::{ColumnsMut, Kernel, KernelArgs};
use crate::error::EngineError;
use crate::forward::Engine;
use crate::operands::{AlignedBytes, random_activations, random_weights};
use crate::ops::run_reference;
use crate::random::SplitMix64;
use crate::simd::Level;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use model::kernel::KernelKey;
use model::layout::padded;

/// Random weights are made up to this size; above it only real weights are used.
const RANDOM_WEIGHT_BYTES: u64 = 4 << 20;
/// Columns behind a row, and elements behind the last row, that a kernel must leave alone.
const SPARE: usize = 32;

/// The first element that differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// `random` or `model`: where the operands came from.
    pub case: &'static str,
    /// Row of the output.
    pub row: usize,
    /// Column of the output; `padded(n)` and above are columns that must not be written.
    pub column: usize,
    /// Bits of the reference's f32.
    pub want_bits: u32,
    /// Bits the kernel left.
    pub got_bits: u32,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { case, row, column, want_bits, got_bits } = *self;
        // Neighbouring floats have neighbouring numbers.
        let number = |bits: u32| if bits >> 31 == 0 { i64::from(bits) } else { -i64::from(bits & i32::MAX as u32) };
        let ulps = number(got_bits) - number(want_bits);
        write!(f, "{case} operands: y[{row}][{column}] is {got_bits:08x}, not {want_bits:08x} ({ulps:+} ulp)")
    }
}

/// Why a kernel is not trusted; `F` is the platform's fault.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum VerifyError<F> {
    /// Output differs from the reference.
    #[error("the kernel is wrong: {0}")]
    Wrong(Mismatch),
    /// The kernel raised a CPU fault.
    #[error("the kernel faulted")]
    Faulted(F),
    /// There is nothing to compare it with.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Expected outputs of one slot, kept while its variants are tried.
#[derive(Debug, Default)]
pub(crate) struct Cases {
    /// The slot, and whether activations were captured for it when the cases were made.
    of: Option<(usize, bool)>,
    cases: Vec<Case>,
}

#[derive(Debug)]
struct Case {
    name: &'static str,
    x: AlignedBytes,
    w: Weights,
    before: Vec<f32>,
    want: Vec<f32>,
}

#[derive(Debug)]
enum Weights {
    Own(AlignedBytes),
    /// Bytes of the arena.
    Arena(Range<usize>),
}

impl Weights {
    fn bytes<'a>(&'a self, arena: &'a [u8]) -> &'a [u8] {
        match self {
            Weights::Own(bytes) => bytes,
            Weights::Arena(range) => &arena[range.clone()],
        }
    }
}

/// Operands that are the same in every boot of a model.
struct Question<'a> {
    key: KernelKey,
    x: AlignedBytes,
    w: &'a [u8],
    y: Vec<f32>,
}

/// Elements from one row of a case's output to the next.
fn stride(key: &KernelKey) -> usize {
    padded(key.n as usize) + SPARE
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// What the output of a case holds before the call.
fn output_before(key: &KernelKey) -> Vec<f32> {
    let m = key.m as usize;
    let mut rng = SplitMix64::new(m as u64);
    (0..m * stride(key) + SPARE).map(|_| rng.next_unit()).collect()
}

impl Case {
    fn new(level: Level, key: &KernelKey, name: &'static str, x: AlignedBytes, w: Weights, arena: &[u8]) -> Self {
        let (m, columns) = (key.m as usize, padded(key.n as usize));
        let before = output_before(key);
        let mut want = before.clone();
        run_reference(level, key, &x, w.bytes(arena), ColumnsMut::new(&mut want, m, columns, stride(key)));
        Self { name, x, w, before, want }
    }

    /// Runs `kernel` through `call`, on all rows and on about half of them, and compares.
    fn check<F>(
        &self,
        kernel: Kernel,
        arena: &[u8],
        got: &mut Vec<f32>,
        call: &mut dyn FnMut(Kernel, KernelArgs<'_>) -> Result<(), F>,
    ) -> Result<(), VerifyError<F>> {
        let m = kernel.key().m as usize;
        let ldy = stride(&kernel.key());
        // The bound of a kernel's row loop is what a number of rows changes: one number below `m` shows that it is kept.
        for rows in [m, m / 2 + 1].into_iter().take(m.min(2)) {
            got.clear();
            got.extend_from_slice(&self.before);
            let args = KernelArgs { x: &self.x, w: self.w.bytes(arena), y: got, ldy, rows };
            call(kernel, args).map_err(VerifyError::Faulted)?;
            // A row that is not wanted may have been left as it was, as a whole.
            let is_left = |row: usize| {
                let columns = row * ldy..(row + 1) * ldy;
                (rows..m).contains(&row) && same_bits(&got[columns.clone()], &self.before[columns])
            };
            let differs = |at: &usize| !same_bits(&self.want[*at..=*at], &got[*at..=*at]) && !is_left(*at / ldy);
            if let Some(at) = (0..got.len()).find(differs) {
                return Err(VerifyError::Wrong(Mismatch {
                    case: self.name,
                    row: at / ldy,
                    column: at % ldy,
                    want_bits: self.want[at].to_bits(),
                    got_bits: got[at].to_bits(),
                }));
            }
        }
        Ok(())
    }
}

/// Compares `kernel` with the reference on random operands alone: for tests of a compiler without a model.
///
/// # Errors
/// [`VerifyError::Wrong`] with the first difference, [`VerifyError::Faulted`] with what `call` reports.
pub fn verify_random<F>(
    level: Level,
    kernel: Kernel,
    seed: u64,
    call: &mut dyn FnMut(Kernel, KernelArgs<'_>) -> Result<(), F>,
) -> Result<(), VerifyError<F>> {
    let key = kernel.key();
    let mut rng = SplitMix64::new(seed);
    let (x, w) = (random_activations(&key, &mut rng), random_weights(&key, &mut rng));
    let case = Case::new(level, &key, "random", x, Weights::Own(w), &[]);
    case.check(kernel, &[], &mut Vec::new(), call)
}

impl Engine<'_> {
    /// Compares `kernel` with the reference on random operands and on this model's own, each call made through `call`
    /// (which survives faults). What the reference gives is kept for the next kernel of the same slot.
    ///
    /// # Errors
    /// [`VerifyError::Wrong`] with the first difference, [`VerifyError::Faulted`] with what `call` reports,
    /// [`VerifyError::Engine`] for a slot that does not exist or a kernel for another key.
    pub fn verify<F>(
        &mut self,
        slot: usize,
        kernel: Kernel,
        call: &mut dyn FnMut(Kernel, KernelArgs<'_>) -> Result<(), F>,
    ) -> Result<(), VerifyError<F>> {
        let slots = self.table.len();
        let key = self.table.key(slot).ok_or(EngineError::NoSlot { slot, slots })?;
        if kernel.key() != key {
            return Err(EngineError::KeyMismatch { slot: key, kernel: kernel.key() }.into());
        }
        let of = Some((slot, self.is_captured(slot)));
        if self.verify.of != of {
            let cases = self.cases(slot, &key);
            self.verify = Cases { of, cases };
        }
        let mut got = Vec::new();
        for case in &self.verify.cases {
            case.check(kernel, self.weights, &mut got, call)?;
        }
        Ok(())
    }

    fn cases(&self, slot: usize, key: &KernelKey) -> Vec<Case> {
        let level = self.table.level();
        let mut rng = SplitMix64::new(u64::from(key.n) << 32 | u64::from(key.k));
        let mut cases = Vec::new();
        if key.weight_bytes() <= RANDOM_WEIGHT_BYTES {
            let (x, w) = (random_activations(key, &mut rng), random_weights(key, &mut rng));
            cases.push(Case::new(level, key, "random", x, Weights::Own(w), self.weights));
        }
        if let Some(weights) = self.last_slice(slot) {
            let x = match &self.captured[slot] {
                Some(x) => AlignedBytes::copy_of(x),
                None => random_activations(key, &mut rng),
            };
            cases.push(Case::new(level, key, "model", x, Weights::Arena(weights), self.weights));
        }
        cases
    }

    /// The last slice of the last matrix of `slot`, as bytes of the arena: the one with padding, where there is any.
    fn last_slice(&self, slot: usize) -> Option<Range<usize>> {
        let (matrix, bucket) = self.instances_of(slot).last()?;
        let mut parts = (0..matrix.partition.parts()).filter(|&part| matrix.slot(part, bucket) == Some(slot));
        parts.next_back().map(|part| matrix.part_bytes(part))
    }

    /// What the reference makes of random activations (the same in every boot) and weights of this model: the whole
    /// output, spare elements included. The same model and key give the same bits.
    ///
    /// # Errors
    /// [`EngineError::NoSlot`].
    pub fn reference_answer(&self, slot: usize) -> Result<Vec<f32>, EngineError> {
        let Question { key, x, w, mut y } = self.question(slot)?;
        let out = ColumnsMut::new(&mut y, key.m as usize, padded(key.n as usize), stride(&key));
        run_reference(self.table.level(), &key, &x, w, out);
        Ok(y)
    }

    /// What `kernel`, called through `call`, makes of the same: the same bits, if it is right.
    ///
    /// # Errors
    /// [`VerifyError::Faulted`] with what `call` reports, [`VerifyError::Engine`] for a slot that does not exist or a
    /// kernel for another key.
    pub fn kernel_answer<F>(
        &self,
        slot: usize,
        kernel: Kernel,
        call: &mut dyn FnMut(Kernel, KernelArgs<'_>) -> Result<(), F>,
    ) -> Result<Vec<f32>, VerifyError<F>> {
        let Question { key, x, w, mut y } = self.question(slot)?;
        if kernel.key() != key {
            return Err(EngineError::KeyMismatch { slot: key, kernel: kernel.key() }.into());
        }
        let args = KernelArgs { x: &x, w, y: &mut y, ldy: stride(&key), rows: key.m as usize };
        call(kernel, args).map_err(VerifyError::Faulted)?;
        Ok(y)
    }

    /// The fixed question to the kernels of `slot`.
    fn question(&self, slot: usize) -> Result<Question<'_>, EngineError> {
        let (Some(key), Some(weights)) = (self.table.key(slot), self.last_slice(slot)) else {
            return Err(EngineError::NoSlot { slot, slots: self.table.len() });
        };
        let mut rng = SplitMix64::new(u64::from(key.m) << 32 | u64::from(key.k));
        let x = random_activations(&key, &mut rng);
        Ok(Question { key, x, w: &self.weights[weights], y: output_before(&key) })
    }
}
