//! CPU exceptions, seen from ring 3.
//!
//! Ring 0 (boot/entry.s) copies the interrupted registers into this CPU's [`FaultFrame`] and returns to ring 3 at
//! `fault_entry` on a stack of its own. Here it is decided: resume at the recovery address of a guarded call (a compiled
//! kernel under `engine::dispatch::guard`, or a self-test's [`probe`]), or report and switch off with exit code 37.

use super::{code, power};
use crate::boot::area::{AREA_BYTES, AREA_FAULT_STACK, AREA_FAULT_STACK_END, AREA_STACK};
use crate::boot::gates;
use crate::options::Crash;
use alloc::vec::Vec;
use core::arch::asm;
use engine::dispatch::guard;
use report::{ExitStatus, Fault, Message};

/// Most return addresses of a backtrace.
const BACKTRACE: usize = 32;
/// The unmapped page below each stack.
const GUARD_BYTES: u64 = 4096;

/// Registers at a fault, in the order entry.s stores them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct FaultFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    /// CR2: the address of a page fault.
    pub address: u64,
    /// CPU number.
    pub cpu: u64,
}

const NAMES: [&str; 22] = [
    "divide error",
    "debug",
    "non-maskable interrupt",
    "breakpoint",
    "overflow",
    "bound range",
    "invalid opcode",
    "device not available",
    "double fault",
    "coprocessor overrun",
    "invalid TSS",
    "segment not present",
    "stack fault",
    "general protection",
    "page fault",
    "reserved",
    "x87 error",
    "alignment check",
    "machine check",
    "SIMD floating point",
    "virtualization",
    "control protection",
];

/// The exceptions an instruction raises by itself, which a guarded call can survive. NMI, double fault and machine check are
/// not about the code that was running.
const fn is_recoverable(vector: u64) -> bool {
    vector < 32 && !matches!(vector, 2 | 8 | 18)
}

#[unsafe(no_mangle)]
extern "sysv64" fn fault_entry(frame: *const FaultFrame) -> ! {
    // SAFETY: ring 0 filled this CPU's frame just now, and writes it only at this CPU's next fault.
    let frame = unsafe { frame.read() };
    // Guarded calls run on the boot CPU only.
    if frame.cpu == 0 && is_recoverable(frame.vector) {
        #[cfg(feature = "jit")]
        if let Some(rip) = probe::recovery(&frame) {
            // SAFETY: the probe that is running left its stack pointer for exactly this jump.
            unsafe { resume(rip) }
        }
        if let Some(rip) = guard::recovery() {
            guard::note_fault(frame.vector as u8, frame.rip);
            // SAFETY: the guard's contract: resume here with any registers while a guarded call is running.
            unsafe { resume(rip) }
        }
    }
    report_fault(&frame)
}

/// # Safety
/// `rip` must be a recovery address that sets its own stack pointer.
unsafe fn resume(rip: u64) -> ! {
    // SAFETY: the code at `rip` needs no register and no stack of ours.
    unsafe { asm!("jmp {}", in(reg) rip, options(noreturn)) }
}

fn report_fault(frame: &FaultFrame) -> ! {
    if !power::going_down() {
        // A fault while reporting one: say nothing more, the first report is what counts.
        power::off(ExitStatus::Panic);
    }
    let name = NAMES.get(frame.vector as usize).unwrap_or(&"reserved");
    crate::println!("\nFAULT {} ({name}) on CPU {}, error code {:#x}", frame.vector, frame.cpu, frame.error_code);
    crate::println!("rip {:#018x}  rsp {:#018x}  rflags {:#x}", frame.rip, frame.rsp, frame.rflags);
    if frame.vector == 14 {
        let what = match frame.error_code & 0x13 {
            e if e & 0x10 != 0 => "executing",
            e if e & 2 != 0 => "writing",
            _ => "reading",
        };
        let why = if frame.error_code & 1 != 0 { "not allowed there" } else { "nothing is mapped there" };
        crate::println!("{what} {:#018x}: {why}", frame.address);
        if stack_around(frame.rsp).is_some_and(|(start, _)| (start - GUARD_BYTES..start).contains(&frame.address)) {
            crate::println!("the stack has overflowed");
        }
    }
    let registers = [
        ("rax", frame.rax),
        ("rbx", frame.rbx),
        ("rcx", frame.rcx),
        ("rdx", frame.rdx),
        ("rsi", frame.rsi),
        ("rdi", frame.rdi),
        ("rbp", frame.rbp),
        ("r8 ", frame.r8),
        ("r9 ", frame.r9),
        ("r10", frame.r10),
        ("r11", frame.r11),
        ("r12", frame.r12),
        ("r13", frame.r13),
        ("r14", frame.r14),
        ("r15", frame.r15),
    ];
    for row in registers.chunks(3) {
        for (name, value) in row {
            crate::print!("{name} {value:#018x}  ");
        }
        crate::println!();
    }
    if let Some(offset) = code::offset_of(frame.rip) {
        crate::println!("inside compiled code, at offset {offset:#x} of the code arena");
    }
    let backtrace = backtrace(frame.rip, frame.rsp, frame.rbp);
    print_backtrace(&backtrace);
    power::send(&Message::Fault(Fault {
        vector: frame.vector as u8,
        error_code: frame.error_code,
        rip: frame.rip,
        address: if frame.vector == 14 { frame.address } else { 0 },
        backtrace,
    }));
    power::end(ExitStatus::Panic)
}

fn print_backtrace(backtrace: &[u64]) {
    crate::println!("backtrace (addr2line -fCe bareflow ADDRESS...):");
    for address in backtrace {
        let inside = (gates::text_start()..gates::text_end()).contains(address);
        let offset = address.wrapping_sub(gates::image_start());
        if inside {
            crate::println!("  {address:#x} (image + {offset:#x})");
        } else {
            crate::println!("  {address:#x}");
        }
    }
}

/// Prints the backtrace of the caller.
pub fn print_own_backtrace() {
    let (rsp, rbp): (u64, u64);
    // SAFETY: copies two registers.
    unsafe { asm!("mov {}, rsp", "mov {}, rbp", out(reg) rsp, out(reg) rbp, options(nomem, nostack)) };
    print_backtrace(&backtrace(print_own_backtrace as *const () as u64, rsp, rbp));
}

/// The ring-3 stack that `rsp` points into, or into the guard page below.
fn stack_around(rsp: u64) -> Option<(u64, u64)> {
    let others = super::cores::areas();
    let area = match others {
        Some(first) if rsp >= first => first + (rsp - first) / AREA_BYTES * AREA_BYTES,
        _ => gates::cpu0_area(),
    };
    [(AREA_STACK, AREA_BYTES), (AREA_FAULT_STACK, AREA_FAULT_STACK_END)]
        .into_iter()
        .map(|(start, end)| (area + start, area + end))
        .find(|&(start, end)| (start - GUARD_BYTES..end).contains(&rsp))
}

/// Return addresses along the frame pointers, `rip` first. Reads only the stack that `rsp` points into.
fn backtrace(rip: u64, rsp: u64, rbp: u64) -> Vec<u64> {
    let mut out = Vec::with_capacity(BACKTRACE);
    out.push(rip);
    let Some((start, end)) = stack_around(rsp) else { return out };
    let mut frame = rbp;
    while out.len() < BACKTRACE && frame >= start && frame + 16 <= end && frame.is_multiple_of(8) {
        // SAFETY: both words lie inside a mapped stack.
        let (next, address) = unsafe { ((frame as *const u64).read(), ((frame + 8) as *const u64).read()) };
        if address == 0 {
            break;
        }
        out.push(address);
        // Frames lie further up each time, so the walk ends.
        if next <= frame {
            break;
        }
        frame = next;
    }
    out
}

/// Fails in the way asked for.
pub fn crash(kind: Crash) -> ! {
    match kind {
        Crash::Panic => panic!("kernel.crash=panic"),
        // SAFETY: not sound, and that is the purpose: nothing is mapped at 0, so the write faults and changes nothing.
        Crash::Fault => unsafe { asm!("mov byte ptr [{}], 0", in(reg) 0u64) },
        Crash::StackOverflow => {
            recurse(0);
        }
        Crash::OutOfMemory => {
            let mut pieces = Vec::new();
            loop {
                pieces.push(alloc::vec![1u8; 16 << 20]);
            }
        }
    }
    panic!("kernel.crash had no effect")
}

#[inline(never)]
#[expect(unconditional_recursion, reason = "the stack is to overflow")]
fn recurse(depth: u64) -> u64 {
    let frame = core::hint::black_box([depth; 64]);
    core::hint::black_box(recurse(depth + 1)) + frame[0]
}

#[cfg(feature = "jit")]
pub mod probe {
    //! Doing something forbidden on purpose and surviving it: what the self-tests of memory and port protection need.
    //! On the boot CPU only, one at a time.

    use super::FaultFrame;
    use crate::boot::gates;
    use core::arch::global_asm;
    use core::sync::atomic::{AtomicU64, Ordering};

    /// An exception that a probe raised.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Caught {
        /// Vector.
        pub vector: u8,
        /// Error code.
        pub error_code: u64,
        /// CR2.
        pub address: u64,
    }

    static STACK: AtomicU64 = AtomicU64::new(0);
    static VECTOR: AtomicU64 = AtomicU64::new(0);
    static ERROR_CODE: AtomicU64 = AtomicU64::new(0);
    static ADDRESS: AtomicU64 = AtomicU64::new(0);

    global_asm!(
        ".pushsection .text.bareflow_probe, \"ax\", @progbits",
        "bareflow_probe:", // (rdi, rsi, rdx = code) -> rax = 0 or 1
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {stack}], rsp",
        "sub rsp, 8",
        "call rdx",
        "xor eax, eax",
        "2:",
        "mov rsp, [rip + {stack}]",
        "mov qword ptr [rip + {stack}], 0",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        "bareflow_probe_recover:",
        "mov eax, 1",
        "jmp 2b",
        "bareflow_probe_read:",
        "mov rax, [rdi]",
        "ret",
        "bareflow_probe_write:", // writes back what is there, so that a missing protection damages nothing
        "mov al, [rdi]",
        "mov [rdi], al",
        "ret",
        "bareflow_probe_in:",
        "mov edx, edi",
        "in al, dx",
        "ret",
        "bareflow_probe_privileged:",
        "mov rax, cr3",
        "ret",
        "bareflow_probe_undefined:",
        "ud2",
        ".popsection",
        stack = sym STACK,
    );

    unsafe extern "sysv64" {
        fn bareflow_probe(a: u64, b: u64, code: u64) -> u64;
        fn bareflow_probe_recover();
        fn bareflow_probe_read();
        fn bareflow_probe_write();
        fn bareflow_probe_in();
        fn bareflow_probe_privileged();
        fn bareflow_probe_undefined();
    }

    fn run(a: u64, code: u64) -> Result<(), Caught> {
        // SAFETY: every caller below passes code that raises at most an exception and changes no memory; the
        // trampoline restores the callee-saved registers either way.
        if unsafe { bareflow_probe(a, 0, code) } == 0 {
            return Ok(());
        }
        Err(Caught {
            vector: VECTOR.load(Ordering::Relaxed) as u8,
            error_code: ERROR_CODE.load(Ordering::Relaxed),
            address: ADDRESS.load(Ordering::Relaxed),
        })
    }

    pub(super) fn recovery(frame: &FaultFrame) -> Option<u64> {
        if STACK.load(Ordering::Relaxed) == 0 {
            return None;
        }
        VECTOR.store(frame.vector, Ordering::Relaxed);
        ERROR_CODE.store(frame.error_code, Ordering::Relaxed);
        ADDRESS.store(frame.address, Ordering::Relaxed);
        Some(bareflow_probe_recover as *const () as u64)
    }

    /// Reads eight bytes at `address`.
    ///
    /// # Errors
    /// The exception.
    pub fn read(address: u64) -> Result<(), Caught> {
        run(address, bareflow_probe_read as *const () as u64)
    }

    /// Writes the byte at `address` back to itself.
    ///
    /// # Errors
    /// The exception.
    pub fn write(address: u64) -> Result<(), Caught> {
        run(address, bareflow_probe_write as *const () as u64)
    }

    /// Calls `address`, which holds nothing but a `ret`.
    ///
    /// # Errors
    /// The exception.
    ///
    /// # Safety
    /// If `address` can be executed, the code there must return and have no other effect.
    pub unsafe fn execute(address: u64) -> Result<(), Caught> {
        run(0, address)
    }

    /// Reads a byte from `port`.
    ///
    /// # Errors
    /// The exception.
    pub fn port_in(port: u16) -> Result<(), Caught> {
        run(u64::from(port), bareflow_probe_in as *const () as u64)
    }

    /// Reads CR3.
    ///
    /// # Errors
    /// The exception.
    pub fn privileged() -> Result<(), Caught> {
        run(0, bareflow_probe_privileged as *const () as u64)
    }

    /// Executes an undefined instruction.
    ///
    /// # Errors
    /// Always, the exception.
    pub fn undefined() -> Result<(), Caught> {
        run(0, bareflow_probe_undefined as *const () as u64)
    }

    /// Asks ring 0 to seal again.
    ///
    /// # Errors
    /// [`gates::Refused`], as it must.
    pub fn seal_again() -> Result<(), gates::Refused> {
        // SAFETY: the seal is closed, so the gate refuses.
        unsafe { gates::seal() }
    }
}
