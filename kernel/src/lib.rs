//! BareFlow on a bare x86-64 machine.
//!
//! Data path: loader -> [`boot`] (ring 0 assembly, then ring 3 up to the seal) -> `platform` (serial, clock, memory, disks,
//! cores) -> `Machine`, which the runtime drives -> `power::off`.
//!
//! Architecture invariant: ring 0 is `boot/entry.s`, assembly and integer only; all Rust and all compiled code run in
//! ring 3.
//! Architecture invariant: after the seal no instruction in ring 3 can change a page table, descriptor table or ring-0
//! stack, use a port that is not on the list, or find memory that is both writable and executable at one address.
//! Not claimed: protection against devices. A program that owns a disk's registers can have it write anywhere.
//!
//! The machine-dependent half is behind the feature `bare-metal`; without it (on the host, in tests) the crate holds only
//! the computations of [`boot`].
//!
//! With the feature `jit` the binary `bareflow` is the self-optimising image. Without it there is no compiler, no code arena
//! and no binary: the library, as a static library, is what `export-tool` links with converged kernels (see `native`).
//!
//! # Building and running
//! `cargo xtask` does this; by hand, from the workspace:
//! ```text
//! export RUSTFLAGS="$(sed -e '/^#/d' -e "s|{link.ld}|$PWD/kernel/link.ld|" kernel/rustflags.txt | tr '\n' ' ')"
//! cargo build -p kernel --bin bareflow --features bare-metal --profile image \
//!   --target x86_64-unknown-linux-gnu --target-dir target/guest
//! cargo rustc -p kernel --lib --crate-type staticlib --no-default-features --features bare-metal --profile native \
//!   --target x86_64-unknown-linux-gnu --target-dir target/guest       # libkernel.a for export-tool, without xtask's outlining
//! qemu-system-x86_64 -machine q35,accel=kvm -cpu host -smp 2 -m 1G -display none -no-reboot -nodefaults \
//!   -bios qboot.rom -kernel target/guest/x86_64-unknown-linux-gnu/image/bareflow -append "mode=smoke" \
//!   -serial stdio -serial file:frames.bin -device isa-debug-exit,iobase=0xf4,iosize=0x04 \
//!   -drive file=boot.img,format=raw,if=virtio -drive file=model.gguf,format=raw,if=virtio,readonly=on
//! ```
//! `-bios qboot.rom` is optional and saves the time of the full firmware: half a minute where KVM emulates ring 0. With
//! `accel=tcg` say `-cpu max`. QEMU's exit code is 33 for a pass, 35 for a failed self-test, 37 for a panic or
//! fault, and from 39 on one for each kind of refusal (`docs/FORMATS.md`); 0 is never a pass.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod boot;
#[cfg(feature = "bare-metal")]
mod machine;
#[cfg(all(feature = "bare-metal", not(feature = "jit")))]
mod native;
pub mod options;
#[cfg(feature = "bare-metal")]
pub mod platform;
#[cfg(all(feature = "bare-metal", feature = "jit"))]
pub mod selftest;
#[cfg(feature = "bare-metal")]
pub mod session;
#[cfg(all(feature = "bare-metal", feature = "jit"))]
pub mod smoke;

#[cfg(feature = "bare-metal")]
pub use machine::Machine;
