//! What a Rust program without an operating system must bring along: memory functions, unwind stubs, panic handler.
//!
//! The memory functions are assembly because LLVM turns the same loops in Rust back into calls to themselves. They use
//! SSE2, not `rep movsb`: under software emulation the string instructions work byte by byte.

use super::power;
use alloc::format;
use core::arch::global_asm;
use report::{ExitStatus, Level, Message};

global_asm!(
    ".pushsection .text.bareflow_memory, \"ax\", @progbits",
    ".globl memcpy",
    ".globl memmove",
    ".globl memset",
    ".globl memcmp",
    ".globl bcmp",
    // memcpy(rdi to, rsi from, rdx bytes) -> rax = to.  memmove decides by overlap and shares all of it.
    ".p2align 4",
    "memmove:",
    "mov rax, rdi",
    "sub rax, rsi",
    "cmp rax, rdx",
    "jb 20f", // to lies inside from..from+bytes: copy from the end
    ".p2align 4",
    "memcpy:",
    "mov rax, rdi",
    "cmp rdx, 16",
    "jb 15f",
    "cmp rdx, 32",
    "ja 2f",
    "movups xmm0, [rsi]", // 16..=32 bytes: two loads that may overlap, then two stores
    "movups xmm1, [rsi + rdx - 16]",
    "movups [rdi], xmm0",
    "movups [rdi + rdx - 16], xmm1",
    "ret",
    "2:", // more than 32: the last 32 bytes are read first, stored last
    "movups xmm4, [rsi + rdx - 32]",
    "movups xmm5, [rsi + rdx - 16]",
    "lea r8, [rdi + rdx - 32]",
    "cmp rdx, 64",
    "jb 4f",
    "3:",
    "movups xmm0, [rsi]",
    "movups xmm1, [rsi + 16]",
    "movups xmm2, [rsi + 32]",
    "movups xmm3, [rsi + 48]",
    "movups [rdi], xmm0",
    "movups [rdi + 16], xmm1",
    "movups [rdi + 32], xmm2",
    "movups [rdi + 48], xmm3",
    "add rsi, 64",
    "add rdi, 64",
    "sub rdx, 64",
    "cmp rdx, 64",
    "jae 3b",
    "4:", // fewer than 64 left: at most 32 now, the tail does the rest
    "cmp rdx, 32",
    "jbe 5f",
    "movups xmm0, [rsi]",
    "movups xmm1, [rsi + 16]",
    "movups [rdi], xmm0",
    "movups [rdi + 16], xmm1",
    "5:",
    "movups [r8], xmm4",
    "movups [r8 + 16], xmm5",
    "ret",
    "15:", // 0..=15
    "cmp edx, 8",
    "jb 16f",
    "mov rcx, [rsi]",
    "mov r8, [rsi + rdx - 8]",
    "mov [rdi], rcx",
    "mov [rdi + rdx - 8], r8",
    "ret",
    "16:",
    "cmp edx, 4",
    "jb 17f",
    "mov ecx, [rsi]",
    "mov r8d, [rsi + rdx - 4]",
    "mov [rdi], ecx",
    "mov [rdi + rdx - 4], r8d",
    "ret",
    "17:", // 1..=3: first, middle and last byte, some of them the same
    "test edx, edx",
    "jz 18f",
    "mov r9, rdx",
    "shr r9, 1",
    "movzx ecx, byte ptr [rsi]",
    "movzx r8d, byte ptr [rsi + rdx - 1]",
    "movzx r10d, byte ptr [rsi + r9]",
    "mov [rdi + rdx - 1], r8b",
    "mov [rdi + r9], r10b",
    "mov [rdi], cl",
    "18:",
    "ret",
    "20:", // overlap with `to` above `from`
    "mov rax, rdi",
    "cmp rdx, 32",
    "jbe 25f",
    "movups xmm4, [rsi]",
    "movups xmm5, [rsi + 16]",
    "21:",
    "movups xmm0, [rsi + rdx - 16]",
    "movups xmm1, [rsi + rdx - 32]",
    "movups [rdi + rdx - 16], xmm0",
    "movups [rdi + rdx - 32], xmm1",
    "sub rdx, 32",
    "cmp rdx, 32",
    "ja 21b",
    "movups [rdi], xmm4",
    "movups [rdi + 16], xmm5",
    "ret",
    "25:", // at most 32 bytes: everything is loaded before anything is stored
    "cmp rdx, 16",
    "jb 15b",
    "movups xmm0, [rsi]",
    "movups xmm1, [rsi + rdx - 16]",
    "movups [rdi], xmm0",
    "movups [rdi + rdx - 16], xmm1",
    "ret",
    // memset(rdi to, esi byte, rdx bytes) -> rax = to
    ".p2align 4",
    "memset:",
    "mov rax, rdi",
    "movzx esi, sil",
    "mov rcx, 0x0101010101010101",
    "imul rsi, rcx",
    "cmp rdx, 16",
    "jb 32f",
    "movq xmm0, rsi",
    "punpcklqdq xmm0, xmm0",
    "lea r8, [rdi + rdx - 16]",
    "30:",
    "cmp rdx, 64",
    "jb 31f",
    "movups [rdi], xmm0",
    "movups [rdi + 16], xmm0",
    "movups [rdi + 32], xmm0",
    "movups [rdi + 48], xmm0",
    "add rdi, 64",
    "sub rdx, 64",
    "jmp 30b",
    "31:",
    "cmp rdx, 16",
    "jbe 33f",
    "movups [rdi], xmm0",
    "add rdi, 16",
    "sub rdx, 16",
    "jmp 31b",
    "33:",
    "movups [r8], xmm0",
    "ret",
    "32:", // 0..=15
    "cmp edx, 8",
    "jb 34f",
    "mov [rdi], rsi",
    "mov [rdi + rdx - 8], rsi",
    "ret",
    "34:",
    "cmp edx, 4",
    "jb 35f",
    "mov [rdi], esi",
    "mov [rdi + rdx - 4], esi",
    "ret",
    "35:",
    "test edx, edx",
    "jz 36f",
    "mov [rdi], sil",
    "mov [rdi + rdx - 1], sil",
    "shr edx, 1",
    "mov [rdi + rdx], sil",
    "36:",
    "ret",
    // memcmp(rdi, rsi, rdx) -> eax
    ".p2align 4",
    "bcmp:",
    "memcmp:",
    "40:",
    "cmp rdx, 16",
    "jb 42f",
    "movups xmm0, [rdi]",
    "movups xmm1, [rsi]",
    "pcmpeqb xmm0, xmm1",
    "pmovmskb eax, xmm0",
    "xor eax, 0xffff",
    "jnz 41f",
    "add rdi, 16",
    "add rsi, 16",
    "sub rdx, 16",
    "jmp 40b",
    "41:",
    "bsf ecx, eax",
    "movzx eax, byte ptr [rdi + rcx]",
    "movzx edx, byte ptr [rsi + rcx]",
    "sub eax, edx",
    "ret",
    "42:",
    "xor eax, eax",
    "43:",
    "test rdx, rdx",
    "jz 44f",
    "movzx eax, byte ptr [rdi]",
    "movzx ecx, byte ptr [rsi]",
    "sub eax, ecx",
    "jnz 44f",
    "inc rdi",
    "inc rsi",
    "dec rdx",
    "jmp 43b",
    "44:",
    "ret",
    ".popsection",
);

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    power::end(ExitStatus::Panic)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    power::going_down();
    if let Some(bytes) = super::memory::failed_allocation() {
        let text = format!(
            "out of memory: an allocation of {bytes} bytes does not fit; give the machine more memory (-m) or use a smaller model or context"
        );
        crate::println!("\nFATAL: {text}");
        power::send(&Message::Note { level: Level::Error, text });
        power::end(ExitStatus::Memory)
    }
    let text = format!("{info}");
    crate::println!("\nPANIC: {text}");
    super::traps::print_own_backtrace();
    power::send(&Message::Note { level: Level::Error, text });
    power::end(ExitStatus::Panic)
}
