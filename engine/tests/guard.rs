//! Guarded calls of machine code that faults in every way a broken kernel can, under Linux signals.

use engine::dispatch::guard::{self, Faulted};
use engine::dispatch::{Kernel, KernelArgs};
use model::kernel::{DType, KernelKey, Op};
use std::sync::Once;

const KEY: KernelKey = KernelKey { op: Op::Matmul, dtype: DType::F32, m: 1, n: 32, k: 1 };

/// What `hosted` does: signal -> exception vector, resume at the recovery address.
extern "C" fn on_signal(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext_t to a SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let Some(resume) = guard::recovery() else {
        // SAFETY: ends the process at once; the fault is not ours to handle.
        unsafe { libc::_exit(101) }
    };
    let vector = match signal {
        libc::SIGILL => 6,
        libc::SIGFPE => 0,
        libc::SIGTRAP => 3,
        _ => 14,
    };
    guard::note_fault(vector, registers[libc::REG_RIP as usize] as u64);
    registers[libc::REG_RIP as usize] = resume as i64;
}

fn install_handlers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            // SAFETY: a zeroed sigaction with handler and flags set is valid, and the handler is async-signal-safe.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
    });
    // A kernel may fault with a ruined stack pointer, so the handler needs its own stack, in each thread.
    let stack = Box::leak(vec![0u8; 64 << 10].into_boxed_slice());
    // SAFETY: the stack is leaked, so it outlives the thread.
    unsafe {
        let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
        assert_eq!(libc::sigaltstack(&stack, std::ptr::null_mut()), 0);
    }
}

fn publish(code: &[u8]) -> Kernel {
    // SAFETY: a fresh private mapping, filled and then made executable, never unmapped.
    let entry = unsafe {
        let len = code.len().next_multiple_of(4096);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(page, libc::MAP_FAILED);
        std::ptr::copy_nonoverlapping(code.as_ptr(), page.cast::<u8>(), code.len());
        assert_eq!(libc::mprotect(page, len, libc::PROT_READ | libc::PROT_EXEC), 0);
        page.cast::<u8>()
    };
    // SAFETY: these codes touch only `y[0]` of the operands or fault, and run under the guard only.
    unsafe { Kernel::from_entry(KEY, entry) }
}

/// The SSE control and status register.
fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores four bytes to `value`.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut value, options(nostack)) };
    value
}

#[repr(align(64))]
struct Aligned([u8; 128]);

fn run(code: &[u8]) -> (Result<(), Faulted>, f32, Kernel) {
    install_handlers();
    let kernel = publish(code);
    let w = Aligned([0; 128]);
    let mut y = [0f32; 32];
    let x = Aligned([0; 128]);
    let control = mxcsr();
    let result = guard::call(kernel, KernelArgs { x: &x.0[..4], w: &w.0, y: &mut y, ldy: 32, rows: 1 });
    assert_eq!(mxcsr(), control, "rounding mode and exception masks are the caller's");
    assert_eq!(guard::recovery(), None, "no guarded call is left active");
    (result, y[0], kernel)
}

/// `mov dword ptr [rdx], 0x3f800000`: writes 1.0 to `y[0]`.
const STORE_ONE: [u8; 6] = [0xc7, 0x02, 0x00, 0x00, 0x80, 0x3f];

fn with_store(rest: &[u8]) -> Vec<u8> {
    [&STORE_ONE, rest].concat()
}

// One test: guarded calls share one recovery point, and a fault of one must not meet another's call.
#[test]
fn kernels_that_fault_return_errors_and_the_caller_lives() {
    let (result, y0, _) = run(&with_store(&[0xc3]));
    assert_eq!((result, y0), (Ok(()), 1.0), "a sound kernel");

    let faults: [(&str, u8, &[u8]); 7] = [
        // `ldmxcsr [rsi]` from the zero weights: every floating-point exception unmasked.
        ("changed MXCSR", 6, &[0x0f, 0xae, 0x16, 0x0f, 0x0b]),
        ("ud2", 6, &[0x0f, 0x0b]),
        ("read of address 0", 14, &[0x31, 0xc0, 0x8b, 0x00]),
        ("hlt is privileged", 14, &[0xf4]),
        ("division by zero", 0, &[0x31, 0xd2, 0x31, 0xc0, 0x31, 0xc9, 0xf7, 0xf1]),
        ("jump to a wild address", 14, &[0x48, 0xc7, 0xc0, 0x10, 0x00, 0x00, 0x00, 0xff, 0xe0]),
        // All callee-saved registers and the stack pointer ruined, direction flag set, then ud2.
        (
            "ruined registers",
            6,
            &[
                0x31, 0xdb, 0x31, 0xed, 0x45, 0x31, 0xe4, 0x45, 0x31, 0xed, 0x45, 0x31, 0xf6, 0x45, 0x31, 0xff, 0x31,
                0xe4, 0xfd, 0x0f, 0x0b,
            ],
        ),
    ];
    for round in 0..3 {
        for (name, vector, code) in faults {
            let (result, y0, kernel) = run(&with_store(code));
            let fault = result.expect_err(name);
            assert_eq!(fault.vector, vector, "{name}");
            assert_eq!(y0, 1.0, "{name}: the store before the fault happened, round {round}");
            if name == "ud2" {
                assert_eq!(fault.rip, kernel.entry_address() as u64 + 6, "{name}: offset of the instruction");
            }
        }
    }
    let (result, ..) = run(&with_store(&[0xc3]));
    assert_eq!(result, Ok(()), "a sound kernel after faults");
}

#[test]
#[should_panic(expected = "w has 64 bytes, 128 needed")]
fn short_operands_are_refused_before_the_call() {
    let kernel = publish(&[0xc3]);
    let (x, w) = (Aligned([0; 128]), Aligned([0; 128]));
    let _ = guard::call(kernel, KernelArgs { x: &x.0, w: &w.0[..64], y: &mut [0.0; 32], ldy: 32, rows: 1 });
}
