# The only privileged code of the image: about 200 instructions, integer only.
#
#   boot_start32   PVH and Multiboot2 entry (32-bit, paging off) -> long mode -> ring 3 `early_main`
#   ap_start64     second and later cores, behind the trampoline page -> ring 3 `core_main`
#   stub table     CPU exceptions from ring 3 -> register frame in user memory -> ring 3 `fault_entry`
#   gate_seal      ring 3 asks once: final page tables in, gate closed
#   gate_freeze    ring 3 asks: write permission of 2 MiB pages out; there is no way back
#   gate_park      ring 3 asks: this core sleeps until another one wakes it
#   gate_wake      ring 3 asks: wake the core with this APIC id
#
# Ring 0 never calls Rust, never touches a vector register (hosts that emulate ring 0 cannot), and after `gate_seal`
# nothing in ring 3 can write a page table, descriptor table, TSS or ring-0 stack.
# Operands in braces are constants from boot/area.rs.

    .section .multiboot2,"a",@progbits
    .balign 8
multiboot2_header:
    .long 0xe85250d6                    # magic
    .long 0                             # i386 protected mode
    .long multiboot2_header_end - multiboot2_header
    .long -(0xe85250d6 + (multiboot2_header_end - multiboot2_header))
    .short 0, 0                         # end tag
    .long 8
multiboot2_header_end:

    .section .note.Xen,"a",@note
    .balign 4
    .long 4, 4, 18                      # name length, value length, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long boot_start32

# ---------------------------------------------------------------------------------------------------------------
# Entry.  eax = Multiboot2 magic or anything, ebx = start information (both protocols).

    .section .ring0.text,"ax",@progbits
    .code32
    .globl boot_start32
boot_start32:
    cli
    cld
    mov ebp, eax
    mov esi, ebx
    rdtsc
    mov dword ptr [ring0_entry_tsc], eax
    mov dword ptr [ring0_entry_tsc + 4], edx

    mov eax, 0x80000001
    cpuid
    bt edx, 29                          # long mode
    jnc no_long_mode
    mov edi, 0x100                      # EFER.LME
    bt edx, 20                          # no-execute
    jnc 7f
    or edi, 0x800                       # EFER.NXE
7:  mov dword ptr [ring0_efer], edi

    # The boot page tables, which take no room in the file. Ring 0 may be emulated instruction by instruction: it maps
    # the image, and the first lines of ring 3 make directories of the rest.
    mov eax, 0x87                       # 2 MiB page 0: present, writable, user
    mov ecx, offset boot_pd_image
8:  mov dword ptr [ecx], eax
    add ecx, 8
    add eax, 0x200000
    cmp eax, offset __image_end
    jb 8b
    mov eax, offset boot_pml4
    mov ecx, offset boot_pdpt + 7
    mov dword ptr [eax], ecx
    mov ecx, offset boot_pd_image + 7
    mov dword ptr [boot_pdpt], ecx
    mov cr3, eax
    mov eax, cr4
    or eax, 0x620                       # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, edi
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3                 # not CD, NW, TS, EM
    or eax, 0x80010023                  # PG, WP, NE, MP, PE
    mov cr0, eax

    mov eax, offset __cpu0_area + {AREA_TSS}
    mov word ptr [ring0_gdt_tss + 2], ax
    shr eax, 16
    mov byte ptr [ring0_gdt_tss + 4], al
    mov byte ptr [ring0_gdt_tss + 7], ah
    lgdt [ring0_gdtr]
    .byte 0xea                          # jmp 0x08:start64
    .long start64
    .short 0x08

no_long_mode:
    mov al, {EXIT_FATAL}
    mov dx, 0xf4
    out dx, al
    hlt
    jmp no_long_mode

    .code64
start64:
    mov ax, 0x40
    ltr ax
    # Both interrupt controllers: vectors away from the CPU exceptions, then every line masked.
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xff
    out 0x21, al
    out 0xa1, al

    mov r11d, offset __cpu0_area        # r11 = this CPU's area
    mov r12d, offset early_main
    mov r14d, ebp
    mov r15d, esi
    # fall through

# r11 = CPU area, r12 = ring-3 entry, r14 and r15 = its arguments.
enter_ring3:
    lidt [ring0_idtr]
    xor eax, eax
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov ss, ax
    lea rsp, [r11 + {AREA_IST_END} - 16]

    # Vector state: all of x87, SSE, AVX and AVX-512 that the CPU has (AVX-512's three parts only together).
    mov eax, 1
    cpuid
    bt ecx, 26                          # XSAVE
    jnc 2f
    mov rax, cr4
    or rax, 0x40000                     # OSXSAVE
    mov cr4, rax
    mov eax, 0x0d
    xor ecx, ecx
    cpuid
    and eax, 0xe7
    mov edx, eax
    and edx, 0xe4
    cmp edx, 0xe4
    je 7f
    and eax, 7
7:  xor edx, edx
    xor ecx, ecx
    xsetbv
2:
    mov rdi, r14
    mov rsi, r15
    push 0x33                           # ss
    lea rax, [r11 + {AREA_BYTES} - 8]
    push rax                            # rsp, as after a call
    push 2                              # rflags: interrupts off, IOPL 0
    push 0x2b                           # cs
    push r12
    xor ebp, ebp                        # ends every backtrace
    iretq

# ---------------------------------------------------------------------------------------------------------------
# Second and later cores.

    .section .rodata.trampoline,"a",@progbits
    .globl trampoline_start
    .globl trampoline_end
    .code16
# Copied to physical {TRAMPOLINE}; a start-up IPI enters it in real mode with CS = {TRAMPOLINE} / 16.
trampoline_start:
    jmp 7f
    .balign 8
    .long 0                             # +8   CR3, filled in by boot/cores.rs
    .long 0                             # +12  EFER bits, likewise
    .short {GDT_BYTES} - 1              # +16  GDT pointer
    .long ring0_gdt
7:  cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        # lgdt [{TRAMPOLINE} + 16], 32-bit base
    .short {TRAMPOLINE} + 16
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, dword ptr [{TRAMPOLINE} + 8]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, dword ptr [{TRAMPOLINE} + 12]
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3
    or eax, 0x80010023
    mov cr0, eax
    .byte 0x66, 0xea                    # jmp 0x08:2f
    .long {TRAMPOLINE} + (2f - trampoline_start)
    .short 0x08
    .code64
2:  mov eax, offset ap_start64
    jmp rax
trampoline_end:

    .section .ring0.text,"ax",@progbits
ap_start64:
    mov ecx, 1
    lock xadd dword ptr [ring0_next_core], ecx
    cmp ecx, dword ptr [ring0_core_count]
    jae 7f
    lea eax, [rcx - 1]
    shl rax, {AREA_SHIFT}
    add rax, qword ptr [ring0_core_areas]
    mov r11, rax
    mov eax, ecx
    shl eax, 4
    add eax, 0x40
    ltr ax
    mov rax, cr4
    or rax, qword ptr [ring0_sealed_cr4]
    mov cr4, rax
    mov rax, qword ptr [ring0_apic]
    mov dword ptr [rax + 0xf0], 0x1ff   # accept interrupts: gate_wake sends one
    mov r14d, dword ptr [rax + 0x20]    # this core's APIC id, the argument
    shr r14d, 24
    mov r12d, offset core_main
    jmp enter_ring3
7:  hlt                                 # a core nobody has an area for
    jmp 7b

# ---------------------------------------------------------------------------------------------------------------
# CPU exceptions. Every vector runs on an IST stack (compiled Rust uses the red zone). The last eight bytes of each
# IST page hold the address of this CPU's area.

    .globl ring0_stubs
    .set vector, 0
    .balign 16
ring0_stubs:
    .rept 32
    .balign 16
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0                              # no error code from the CPU
    .endif
    .byte 0x6a, vector                  # push vector
    jmp fault
    .set vector, vector + 1
    .endr

    .balign 16
fault:
    test byte ptr [rsp + 24], 3
    jz ring0_fault
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rbx, rsp
    or rbx, 0xfff
    mov rbx, qword ptr [rbx - 7]        # this CPU's area
    cld
    mov rsi, rsp
    lea rdi, [rbx + {AREA_FRAME}]
    mov ecx, 22
    rep movsq
    mov rax, cr2
    stosq
    mov rax, qword ptr [rbx]            # CPU number
    stosq
    push 0x33
    lea rax, [rbx + {AREA_FAULT_STACK_END} - 8]
    push rax
    push 2
    push 0x2b
    lea rax, [fault_entry]
    push rax
    lea rdi, [rbx + {AREA_FRAME}]
    xor ebp, ebp
    iretq

# Vectors from 32 on: stray interrupts of devices nobody enabled.
    .globl ring0_ignore
ring0_ignore:
    iretq

# Vector {WAKE_VECTOR}, of gate_wake and of the timer: ends the hlt of gate_park. Should it come in between sti and hlt (real
# CPUs never let it; no host that emulates ring 0 was seen to), the hlt must not happen any more, or nobody would end it.
    .globl ring0_woken
ring0_woken:
    push rax
    mov rax, qword ptr [ring0_apic]
    mov dword ptr [rax + 0xb0], 0       # end of interrupt
    lea rax, [park_hlt]
    cmp qword ptr [rsp + 8], rax
    jne 7f
    inc qword ptr [rsp + 8]             # over the one byte of hlt
7:  pop rax
    iretq

# A fault inside ring 0 is a bug in this file. [rsp] = vector, error code, rip.
ring0_fault:
    lea rsi, [ring0_fault_text]
    mov dx, 0x3f8
7:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 7b
2:  mov ebx, 3
3:  pop rcx
    mov edi, 16
4:  rol rcx, 4
    mov eax, ecx
    and eax, 15
    mov al, byte ptr [ring0_hex + rax]
    out dx, al
    dec edi
    jnz 4b
    mov al, 32
    out dx, al
    dec ebx
    jnz 3b
    mov al, {EXIT_PANIC}
    mov dx, 0xf4
    out dx, al
5:  hlt
    jmp 5b

# ---------------------------------------------------------------------------------------------------------------
# Requests from ring 3: a breakpoint with the request in eax, because hosts that emulate ring 0 refuse `int n` but
# deliver breakpoints. Any other value is an ordinary breakpoint. Answer in eax: 0 done, 1 refused.

    .globl ring0_breakpoint
ring0_breakpoint:
    cmp eax, {REQUEST_SEAL}
    je gate_seal
    cmp eax, {REQUEST_FREEZE}
    je gate_freeze
    cmp eax, {REQUEST_PARK}
    je gate_park
    cmp eax, {REQUEST_WAKE}
    je gate_wake
    cmp eax, {REQUEST_NAP}
    je gate_nap
    push 0
    push 3
    jmp fault

# Installs the page tables that `ring0_final_cr3` names and closes itself.
gate_seal:
    cmp byte ptr [ring0_sealed], 0
    jne gate_refuse
    mov rax, qword ptr [ring0_final_cr3]
    mov cr3, rax
    mov rax, cr4
    or rax, qword ptr [ring0_sealed_cr4]
    mov cr4, rax
    mov byte ptr [ring0_sealed], 1
    xor eax, eax
    iretq

# rdi = first byte, rsi = end, both multiples of 2 MiB inside RAM: clears the write bit of every 2 MiB page between
# them and drops this core's stale translations. Changes rcx, rdi, rsi.
gate_freeze:
    cmp byte ptr [ring0_sealed], 0
    je gate_refuse
    mov rax, rdi
    or rax, rsi
    test eax, 0x1fffff
    jnz gate_refuse
    cmp rsi, qword ptr [ring0_ram_end]
    ja gate_refuse
    mov rcx, qword ptr [ring0_ram_directory]
    shr rdi, 21
    shr rsi, 21
7:  cmp rdi, rsi
    jae 3f
    test byte ptr [rcx + rdi * 8], 0x80
    jz 2f
    and byte ptr [rcx + rdi * 8], 0xfd
2:  inc rdi
    jmp 7b
3:  mov rax, cr3
    mov cr3, rax
    xor eax, eax
    iretq

# Sleeps until the timer has counted down, or until any other wake-up. Changes rdi.
gate_nap:
    mov edi, dword ptr [ring0_nap_ticks]
    test edi, edi
    jz gate_refuse
    mov rax, qword ptr [ring0_apic]
    mov dword ptr [rax + 0x380], edi

# A wake-up that came just before is still pending and ends the hlt at once: sti takes effect after it.
gate_park:
    sti
park_hlt:
    hlt
    cli
    xor eax, eax
    iretq

# rdi = APIC id. Changes rdi.
gate_wake:
    mov rax, qword ptr [ring0_apic]
    test rax, rax
    jz gate_refuse
    shl edi, 24
    mov dword ptr [rax + 0x310], edi
    mov dword ptr [rax + 0x300], 0x4000 + {WAKE_VECTOR}
    xor eax, eax
    iretq

gate_refuse:
    mov eax, 1
    iretq

# ---------------------------------------------------------------------------------------------------------------

    .section .ring0.bss,"aw",@nobits    # starts at a page: link.ld
# 4 GiB of identity mapping, readable, writable and executable from ring 3: in force until the seal.
boot_pml4: .skip 4096
    .globl boot_pdpt
boot_pdpt: .skip 4096
boot_pd_image: .skip 4096               # the image only, until boot/early.rs
    .globl boot_pd
boot_pd: .skip 4 * 4096                 # filled and put in its place by boot/early.rs
    .globl ring0_idt
ring0_idt: .skip 4096                   # filled by boot/early.rs

    .section .ring0.data,"aw",@progbits
    .balign 16
    .globl ring0_gdt
ring0_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 ring 0 code
    .quad 0x00cf93000000ffff            # 0x10 ring 0 data
    .quad 0, 0
    .quad 0x00affb000000ffff            # 0x2b ring 3 code
    .quad 0x00cff3000000ffff            # 0x33 ring 3 data
    .quad 0
ring0_gdt_tss:                          # 0x40 + 16 n: TSS of CPU n
    .quad 0x0000890000000000 + {TSS_LIMIT}
    .quad 0
    .fill {GDT_BYTES} / 8 - 10, 8, 0
    .balign 8
    .short 0, 0, 0
ring0_gdtr:
    .short {GDT_BYTES} - 1
    .quad ring0_gdt
    .balign 8
    .short 0, 0, 0
ring0_idtr:
    .short 4095
    .quad ring0_idt
    .balign 8
    .globl ring0_entry_tsc
    .globl ring0_efer
    .globl ring0_final_cr3
    .globl ring0_sealed_cr4
    .globl ring0_ram_directory
    .globl ring0_ram_end
    .globl ring0_core_areas
    .globl ring0_core_count
    .globl ring0_next_core
    .globl ring0_apic
    .globl ring0_nap_ticks
ring0_entry_tsc:     .quad 0            # TSC at boot_start32
ring0_final_cr3:     .quad 0            # what gate_seal installs
ring0_sealed_cr4:    .quad 0            # CR4 bits it adds (SMEP, UMIP)
ring0_ram_directory: .quad 0            # page directories of RAM, contiguous: entry n maps 2 MiB page n
ring0_ram_end:       .quad 0            # first byte they do not map
ring0_core_areas:    .quad 0            # area of core 1; the others follow
ring0_apic:          .quad 0            # registers of the local APIC, the same address on every core
ring0_nap_ticks:     .quad 0            # what gate_nap lets the boot CPU's timer count down; 0 where there is none
ring0_core_count:    .long 0            # cores with an area, the boot CPU included
ring0_next_core:     .long 1
ring0_efer:          .long 0
ring0_sealed:        .byte 0
ring0_hex:           .ascii "0123456789abcdef"
ring0_fault_text:    .asciz "\r\nfault in ring 0: vector, error code, rip: "
