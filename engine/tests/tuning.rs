//! The kernel table as the tuner uses it: profile, replay, verify, install. The "compiled" kernels are functions of this
//! test, so that right, wrong and overreaching ones can be made at will.

mod support;

use engine::attention::KvType;
use engine::dispatch::{ColumnsMut, Kernel, KernelArgs};
use engine::ops::run_reference;
use engine::simd::Level;
use engine::verify::{VerifyError, verify_random};
use engine::{Engine, EngineError, Runs, Tier};
use model::TensorType;
use model::kernel::{DType, KernelKey, Op};
use model::layout::{op_weight_bytes, padded, x_row_bytes};
use model::synthetic::{self, Spec};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Threads, forced_logits, load};

/// The key that the kernels below compute: gate/up of the model below, one row, on two workers.
const KEY: KernelKey = KernelKey { op: Op::GateUpSilu, dtype: DType::Q4_1, m: 1, n: 64, k: 64 };
/// Calls of `right`.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// # Safety
/// Operands of the sizes that `KEY` needs.
unsafe extern "sysv64" fn right(x: *const u8, w: *const u8, y: *mut f32, _ldy_bytes: usize, _rows: usize) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    let (n, k) = (KEY.n as usize, KEY.k as usize);
    // SAFETY: the caller's operands are those of `KEY`.
    let (x, w, y) = unsafe {
        (
            std::slice::from_raw_parts(x, x_row_bytes(KEY.dtype, k)),
            std::slice::from_raw_parts(w, op_weight_bytes(KEY.op, KEY.dtype, n, k)),
            std::slice::from_raw_parts_mut(y, padded(n)),
        )
    };
    run_reference(Level::detect(), &KEY, x, w, ColumnsMut::new(y, 1, padded(n), padded(n)));
}

/// Wrong in the last bit of one element. Safety as `right`.
unsafe extern "sysv64" fn one_bit_off(x: *const u8, w: *const u8, y: *mut f32, ldy_bytes: usize, rows: usize) {
    // SAFETY: as `right`.
    unsafe {
        right(x, w, y, ldy_bytes, rows);
        let last = y.add(KEY.n as usize - 1);
        last.write(f32::from_bits(last.read().to_bits() ^ 1));
    }
}

/// Wrong by 1 in every element: enough to show behind the int8 rounding of the next op. Safety as `right`.
unsafe extern "sysv64" fn one_off(x: *const u8, w: *const u8, y: *mut f32, ldy_bytes: usize, rows: usize) {
    // SAFETY: as `right`.
    unsafe {
        right(x, w, y, ldy_bytes, rows);
        for i in 0..KEY.n as usize {
            *y.add(i) += 1.0;
        }
    }
}

/// Writes one element behind its columns, which the verifier's spare columns catch. Safety as `right`.
unsafe extern "sysv64" fn overreaching(x: *const u8, w: *const u8, y: *mut f32, ldy_bytes: usize, rows: usize) {
    // SAFETY: as `right`; only ever called by `verify`, whose rows have spare columns.
    unsafe {
        right(x, w, y, ldy_bytes, rows);
        y.add(padded(KEY.n as usize)).write(0.0);
    }
}

/// Writes one element behind the last row, which has spare ones behind it, too. Safety as `overreaching`.
unsafe extern "sysv64" fn past_the_end(x: *const u8, w: *const u8, y: *mut f32, ldy_bytes: usize, rows: usize) {
    // SAFETY: as `overreaching`.
    unsafe {
        right(x, w, y, ldy_bytes, rows);
        y.byte_add(KEY.m as usize * ldy_bytes).write(0.0);
    }
}

type Entry = unsafe extern "sysv64" fn(*const u8, *const u8, *mut f32, usize, usize);

fn kernel(key: KernelKey, entry: Entry) -> Kernel {
    // SAFETY: functions of this ABI that live as long as the program; what they touch is stated above.
    unsafe { Kernel::from_entry(key, entry as *const () as *const u8) }
}

fn direct(kernel: Kernel, args: KernelArgs<'_>) -> Result<(), &'static str> {
    kernel.call(args);
    Ok(())
}

/// 128 hidden columns on two workers: slices of 64.
fn engine() -> Engine<'static> {
    let spec = Spec { hidden_dim: 128, matrices: TensorType::Q4_1, ..Spec::default() };
    let file = synthetic::gguf(&spec).unwrap();
    let model = model::gguf::read(&file, file.len() as u64).unwrap();
    load(&model, &file, 2, 1 << 20, engine::isa::detect(), Tier::Baseline)
}

#[test]
fn wrong_kernels_are_told_from_right_ones() {
    let mut engine = engine();
    let slot = engine.table().find(&KEY).unwrap();
    let call = &mut direct;
    for _ in 0..2 {
        assert_eq!(engine.verify(slot, kernel(KEY, right), call), Ok(()));
        let Err(VerifyError::Wrong(wrong)) = engine.verify(slot, kernel(KEY, one_bit_off), call) else {
            panic!("one wrong bit passed")
        };
        assert_eq!((wrong.case, wrong.row, wrong.column), ("random", 0, 63));
        assert_eq!(wrong.want_bits ^ wrong.got_bits, 1);
        let Err(VerifyError::Wrong(wrong)) = engine.verify(slot, kernel(KEY, overreaching), call) else {
            panic!("a write behind the columns passed")
        };
        assert_eq!((wrong.row, wrong.column), (0, 64));
        // The second round has captured activations.
        forced_logits(&mut engine, &Threads(2), &[1, 2], &[3], KvType::F16);
        assert!(engine.is_captured(slot));
    }
    // The second case runs on the model's own weights; a fault there is reported as it came.
    let mut calls = 0;
    let result = engine.verify(slot, kernel(KEY, right), &mut |kernel, args| {
        calls += 1;
        if calls == 2 { Err("vector 6") } else { direct(kernel, args) }
    });
    assert_eq!((result, calls), (Err(VerifyError::Faulted("vector 6")), 2));
    assert_eq!(verify_random(Level::detect(), kernel(KEY, right), 3, call), Ok(()));
    assert!(verify_random(Level::detect(), kernel(KEY, one_bit_off), 3, call).is_err());
    assert!(verify_random(Level::detect(), kernel(KEY, past_the_end), 3, call).is_err());
    let other = KernelKey { n: 96, ..KEY };
    let mismatch = EngineError::KeyMismatch { slot: KEY, kernel: other };
    assert_eq!(engine.verify(slot, kernel(other, right), call), Err(VerifyError::Engine(mismatch)));
}

#[test]
fn an_installed_kernel_runs_and_changes_no_bit() {
    let mut engine = engine();
    let slot = engine.table().find(&KEY).unwrap();
    let bits = |logits: Vec<Vec<f32>>| -> Vec<u32> { logits.iter().flatten().map(|x| x.to_bits()).collect() };
    let want = bits(forced_logits(&mut engine, &Threads(2), &[1, 2, 3], &[4, 5], KvType::F16));
    let other = KernelKey { k: 96, ..KEY };
    assert!(engine.table_mut().install(slot, kernel(other, right)).is_err());
    assert!(engine.table_mut().install(slot, kernel(KEY, right)).unwrap().is_none());
    assert!(matches!(engine.table().runs(slot), Some(Runs::Compiled(_))));
    let before = CALLS.load(Ordering::Relaxed);
    assert!(bits(forced_logits(&mut engine, &Threads(2), &[1, 2, 3], &[4, 5], KvType::F16)) == want);
    // Two layers, two slices, two single tokens; other tests may call it as well.
    assert!(CALLS.load(Ordering::Relaxed) >= before + 8);
    // What the table runs is really used: a wrong kernel changes the logits.
    engine.table_mut().install(slot, kernel(KEY, one_off)).unwrap();
    assert!(bits(forced_logits(&mut engine, &Threads(2), &[1, 2, 3], &[4, 5], KvType::F16)) != want);
    assert!(engine.table_mut().remove(slot).is_some());
    assert!(matches!(engine.table().runs(slot), Some(Runs::Baseline)));
    assert!(bits(forced_logits(&mut engine, &Threads(2), &[1, 2, 3], &[4, 5], KvType::F16)) == want);
}

#[test]
fn the_profile_counts_one_sample_for_each_op() {
    let mut engine = engine();
    let slot = engine.table().find(&KEY).unwrap();
    assert_eq!(engine.table().slices(slot), 2);
    forced_logits(&mut engine, &Threads(2), &[1], &[2, 3], KvType::F16);
    let count = |engine: &Engine<'_>, slot| engine.table().profile().stats(slot).count();
    assert_eq!(count(&engine, slot), 2 * 3, "two layers, three single tokens");
    let head = (0..engine.table().len()).find(|&s| engine.table().key(s).unwrap().op == Op::LmHead).unwrap();
    assert_eq!(count(&engine, head), 3);
    assert!(engine.table().profile().stats(slot).min_cycles().unwrap() > 0);
}

#[test]
fn replay_times_every_instance_without_touching_anything() {
    let mut engine = engine();
    let workers = Threads(2);
    let slot = engine.table().find(&KEY).unwrap();
    assert_eq!(engine.instances(slot), 2, "one gate/up matrix in each layer");
    let want = forced_logits(&mut engine, &workers, &[1, 2, 3], &[4], KvType::F16);
    let count = engine.table().profile().stats(slot).count();
    let before = CALLS.load(Ordering::Relaxed);
    for instance in 0..2 {
        for runs in [Runs::Baseline, Runs::Reference, Runs::Compiled(kernel(KEY, right))] {
            assert!(engine.replay(&workers, slot, runs, instance).unwrap() > 0);
        }
    }
    assert!(CALLS.load(Ordering::Relaxed) >= before + 4);
    assert_eq!(engine.table().profile().stats(slot).count(), count, "replays are not recorded");
    assert!(forced_logits(&mut engine, &workers, &[1, 2, 3], &[4], KvType::F16) == want);
    let none = EngineError::NoInstance { key: KEY, instance: 2, instances: 2 };
    assert_eq!(engine.replay(&workers, slot, Runs::Baseline, 2), Err(none));
    let slots = engine.table().len();
    assert_eq!(engine.replay(&workers, slots, Runs::Baseline, 0), Err(EngineError::NoSlot { slot: slots, slots }));
    // Every slot can be replayed, also those whose op never ran.
    for slot in 0..slots {
        for instance in 0..engine.instances(slot) {
            engine.replay(&workers, slot, Runs::Baseline, instance).unwrap();
        }
    }
}
