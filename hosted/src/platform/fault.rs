//! CPU faults as Linux signals: a fault inside a guarded kernel call resumes at the engine's recovery point.

use engine::dispatch::guard;
use std::sync::atomic::{AtomicI32, Ordering};

/// Kernel thread id of the thread that makes guarded calls; faults of any other thread are never recovered.
static GUARDED_THREAD: AtomicI32 = AtomicI32::new(0);

/// Signals that CPU exceptions arrive as.
const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// Installs the handlers; the calling thread is the one that may make guarded calls.
pub fn install() {
    // SAFETY: gettid has no preconditions.
    GUARDED_THREAD.store(unsafe { libc::gettid() }, Ordering::Relaxed);
    for signal in SIGNALS {
        // SAFETY: an all-zero sigaction is a valid value (no flags, empty mask).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the action is fully initialised and `on_fault` has the signature SA_SIGINFO asks for.
        let status = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
        assert_eq!(status, 0, "sigaction takes these signals");
    }
}

extern "C" fn on_fault(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the third argument points at this thread's interrupted ucontext, valid and ours to
    // change until the handler returns.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // SAFETY: gettid has no preconditions and is async-signal-safe.
    let ours = unsafe { libc::gettid() } == GUARDED_THREAD.load(Ordering::Relaxed);
    let rip = registers[libc::REG_RIP as usize] as u64;
    let vector = registers[libc::REG_TRAPNO as usize] as u8;
    if let (true, Some(resume)) = (ours, guard::recovery()) {
        guard::note_fault(vector, rip);
        registers[libc::REG_RIP as usize] = resume as i64;
        return;
    }
    // Not ours to recover: fall back to the default action, which the retried instruction then triggers.
    // SAFETY: `signal` and SIG_DFL are valid; signal is async-signal-safe.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
