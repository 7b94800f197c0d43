//! Key and variant in, audited machine code out.

use crate::audit;
use crate::clif::Emit;
use crate::error::{JitError, Refusals};
use crate::nest;
use crate::plan::Plan;
use crate::widen::{WidenStats, widen};
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{AbiParam, InstBuilder, Signature, Value};
use cranelift_codegen::isa::{self, CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{CodegenError, Context};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use model::Isa;
use model::kernel::{KernelKey, Variant};
use target_lexicon::{Architecture, BinaryFormat, Environment, OperatingSystem, Triple, Vendor};

/// A finished kernel: position-independent bytes of one leaf function with the kernel ABI
/// `extern "sysv64" fn(x: *const u8, w: *const u8, y: *mut f32, ldy_bytes: usize, rows: usize)`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CompiledKernel {
    /// What it computes.
    pub key: KernelKey,
    /// How.
    pub variant: Variant,
    /// Machine code; the entry is the first byte.
    pub code: Vec<u8>,
    /// How it came about.
    pub stats: CompileStats,
}

/// Counts of one compilation, the same on every machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CompileStats {
    /// What the widening pass did.
    pub widen: WidenStats,
    /// Stack bytes the kernel uses, its return address not counted.
    pub stack_bytes: u32,
}

/// Most kernels whose code before widening is kept: those that a boot's search may come back to.
const KEPT: usize = 256;

/// Compiles kernels. Keeps its buffers between kernels, so one compiler is cheaper than many, and Cranelift's code, which
/// variants share that differ in their prefetch distance only.
pub struct Compiler {
    isa: Isa,
    cranelift: OwnedTargetIsa,
    context: Context,
    builder: FunctionBuilderContext,
    /// Cranelift's code by key and variant, the prefetch distance left out; the oldest first.
    kept: VecDeque<(KernelKey, Variant, Vec<u8>)>,
    refusals: Refusals,
}

impl Compiler {
    /// A compiler for machines with `isa`.
    ///
    /// # Errors
    /// [`JitError::Codegen`] when this build's Cranelift lacks x86-64.
    pub fn new(isa: Isa) -> Result<Compiler, JitError> {
        Ok(Compiler {
            isa,
            cranelift: cranelift_isa().map_err(|message| JitError::Codegen { message })?,
            context: Context::new(),
            builder: FunctionBuilderContext::new(),
            kept: VecDeque::new(),
            refusals: Refusals::default(),
        })
    }

    /// Instruction sets this compiler may use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Kernels refused so far, by cause.
    pub fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// Compiles `key` as `variant`.
    ///
    /// The code has passed [`audit::audit`]; that it computes the right numbers is for the caller to verify.
    ///
    /// # Errors
    /// A [`JitError`], also counted in [`Self::refusals`]. Nothing else is ever compiled in its place.
    pub fn compile(&mut self, key: &KernelKey, variant: &Variant) -> Result<CompiledKernel, JitError> {
        let compiled = self.try_compile(key, variant);
        if let Err(error) = &compiled {
            self.refusals.count(error);
        }
        compiled
    }

    fn try_compile(&mut self, key: &KernelKey, variant: &Variant) -> Result<CompiledKernel, JitError> {
        if let Some(needs) = self.isa.missing(variant) {
            return Err(JitError::Isa { variant: *variant, needs });
        }
        let plan = Plan::new(key, variant)?;
        let (code, widen_stats) = widen(self.narrow_kernel(key, variant, &plan)?, variant.into())?;
        let stats = CompileStats { widen: widen_stats, stack_bytes: audit::audit(&code, variant.width)?.stack_bytes };
        Ok(CompiledKernel { key: *key, variant: *variant, code, stats })
    }

    /// Cranelift's 128-bit code of `variant` of `key`, with carriers for prefetches whether it has any or not.
    fn narrow_kernel(&mut self, key: &KernelKey, variant: &Variant, plan: &Plan) -> Result<&[u8], JitError> {
        let any_distance = Variant { prefetch_bytes: 0, ..*variant };
        let known = self.kept.iter().position(|(k, v, _)| (k, v) == (key, &any_distance));
        let at = match known {
            Some(at) => at,
            None => {
                let narrow = self.narrow(|e, args| nest::kernel(e, plan, args))?;
                if self.kept.len() == KEPT {
                    self.kept.pop_front();
                }
                self.kept.push_back((*key, any_distance, narrow));
                self.kept.len() - 1
            }
        };
        Ok(&self.kept[at].2)
    }

    /// Cranelift's 128-bit code of a function with the kernel ABI that `build` writes, given its five arguments: what
    /// [`widen()`] reads. It is right as it is only where `build` used no carriers. Refusals are not counted.
    ///
    /// # Errors
    /// [`JitError::Codegen`] or [`JitError::Relocation`].
    pub fn narrow(&mut self, build: impl FnOnce(&mut Emit<'_, '_>, [Value; 5])) -> Result<Vec<u8>, JitError> {
        self.context.clear();
        let mut signature = Signature::new(CallConv::SystemV);
        signature.params.extend([AbiParam::new(I64); 5]);
        self.context.func.signature = signature;
        let mut builder = FunctionBuilder::new(&mut self.context.func, &mut self.builder);
        let entry = builder.create_block();
        builder.append_block_params_for_function_params(entry);
        builder.switch_to_block(entry);
        let mut args = [Value::from_u32(0); 5];
        args.copy_from_slice(builder.block_params(entry));
        build(&mut Emit::new(&mut builder), args);
        builder.ins().return_(&[]);
        builder.seal_all_blocks();
        builder.finalize(self.cranelift.frontend_config());

        let compiled = self
            .context
            .compile(&*self.cranelift, &mut ControlPlane::default())
            .map_err(|error| JitError::Codegen { message: describe(&error.inner) })?;
        let relocations = compiled.buffer.relocs().len();
        if relocations > 0 {
            return Err(JitError::Relocation { count: relocations });
        }
        Ok(compiled.code_buffer().to_vec())
    }
}

fn describe(error: &CodegenError) -> String {
    error.to_string()
}

/// Cranelift for x86-64 with VEX code and FMA, set up for speed of compilation and no surprises.
fn cranelift_isa() -> Result<OwnedTargetIsa, String> {
    // With `speed`, loads are hoisted out of loops and registers spill; with `none`, code comes in the order written.
    const SETTINGS: [(&str, &str); 6] = [
        ("opt_level", "none"),
        ("enable_verifier", if cfg!(debug_assertions) { "true" } else { "false" }),
        ("enable_alias_analysis", "false"),
        ("is_pic", "false"),
        ("enable_probestack", "false"),
        ("unwind_info", "false"),
    ];
    const FEATURES: [&str; 9] =
        ["has_sse3", "has_ssse3", "has_sse41", "has_sse42", "has_popcnt", "has_avx", "has_avx2", "has_fma", "has_bmi1"];
    let mut flags = settings::builder();
    for (name, value) in SETTINGS {
        flags.set(name, value).map_err(|e| e.to_string())?;
    }
    let triple = Triple {
        architecture: Architecture::X86_64,
        vendor: Vendor::Unknown,
        operating_system: OperatingSystem::None_,
        environment: Environment::Unknown,
        binary_format: BinaryFormat::Elf,
    };
    let mut builder = isa::lookup(triple).map_err(|e| e.to_string())?;
    for feature in FEATURES {
        builder.enable(feature).map_err(|e| e.to_string())?;
    }
    builder.finish(settings::Flags::new(flags)).map_err(|e| describe(&e))
}
