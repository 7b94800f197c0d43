//! The image without a compiler: `bareflow_main` of the static library that `export-tool` links with converged kernels.
//!
//! The kernel object (`export-tool`'s `object_file`) brings three things: the kernels' machine code, a table that says
//! what each computes (`snapshot_format::frozen`), and optionally the model file. They are ordinary text and constants of
//! the image, so no memory is ever executable and writable under any address.

use crate::{Machine, session};
use alloc::format;
use alloc::vec::Vec;
use engine::dispatch::Kernel;
use report::ImageKind;
use runtime::kernels::{Linked, LinkedKernel};
use snapshot_format::frozen;

unsafe extern "C" {
    static bareflow_kernels_text: u8;
    static bareflow_kernels_table: u8;
    static bareflow_kernels_table_end: u8;
    static bareflow_model: u8;
    static bareflow_model_end: u8;
}

/// The bytes between two symbols.
///
/// # Safety
/// Both must bound one constant section of the image.
unsafe fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: the caller names the bounds of constant bytes, which live as long as the image.
    unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// Called by `boot::early` once the machine is sealed.
#[unsafe(no_mangle)]
fn bareflow_main(machine: Machine) -> ! {
    // SAFETY: the symbols bound the table section of the kernel object.
    let table = unsafe { between(&raw const bareflow_kernels_table, &raw const bareflow_kernels_table_end) };
    // SAFETY: as above, the model section.
    let model = unsafe { between(&raw const bareflow_model, &raw const bareflow_model_end) };
    let table = match frozen::decode(table) {
        Ok(table) => table,
        Err(error) => {
            session::give_up(&format!("the linked kernel table is damaged ({error}); export the image again"))
        }
    };
    let kernels: Vec<LinkedKernel> = table
        .kernels
        .iter()
        .map(|kernel| {
            // SAFETY: the table was written with the code it describes: an offset into the text section, where code for
            // this key lies, made by the compiler and verified before it was exported. It is verified again in this
            // boot before it serves.
            let kernel_code = unsafe {
                let entry = (&raw const bareflow_kernels_text).add(kernel.offset as usize);
                Kernel::from_entry(kernel.key, entry)
            };
            LinkedKernel {
                variant: kernel.variant,
                kernel: kernel_code,
                len_bytes: kernel.len_bytes as usize,
                answer_sha256: kernel.answer_sha256,
            }
        })
        .collect();
    let machine = if model.is_empty() { machine } else { machine.with_embedded_model(model) };
    session::run(machine, ImageKind::Native, Linked { model: table.model, kernels: &kernels })
}
