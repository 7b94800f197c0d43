//! The self-optimising image. Everything before `bareflow_main` is `kernel::boot`; everything in it is `runtime`.
#![no_std]
#![no_main]

use kernel::{Machine, session};
use report::ImageKind;
use runtime::kernels::Linked;

/// Called by `kernel::boot::early` once the machine is sealed.
#[unsafe(no_mangle)]
fn bareflow_main(machine: Machine) -> ! {
    session::run(machine, ImageKind::Jit, Linked::default())
}
