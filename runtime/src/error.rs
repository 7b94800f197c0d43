//! Why a run ended without doing its work. Each message says what was expected, what was found and what to do.

use crate::generate::SHIFT_ROOM;
use crate::options::OptionError;
use crate::platform::OutOfMemory;
use alloc::string::String;
use alloc::vec::Vec;
use engine::EngineError;
use report::ExitStatus;

/// A run that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A setting is wrong.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// No model, or several and none named.
    #[error("{}", no_model(.looked_for, .found))]
    NoModel {
        /// The name asked for, empty when none was.
        looked_for: String,
        /// Candidate files on the boot volume.
        found: Vec<String>,
    },
    /// The boot volume or a file on it cannot be read.
    #[error(transparent)]
    Storage(#[from] storage::StorageError),
    /// The model file is not one we can run.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// The file's SHA-256 is not the configured one.
    #[error(
        "the model's SHA-256 is {found}, but model.sha256 says {expected}; the file is damaged or another one: not running it"
    )]
    WrongModelHash {
        /// Configured, lower-case hex.
        expected: String,
        /// Computed, lower-case hex.
        found: String,
    },
    /// The configured key is none.
    #[error(
        "model.public_key is not an Ed25519 public key that can be used (its 32 bytes are no point of the curve, or one of small order); `openssl pkey -in KEY.PEM -pubout -outform DER | tail -c 32 | xxd -p -c 32` prints one"
    )]
    BadPublicKey,
    /// A key is configured and there is no signature.
    #[error(
        "model.public_key is set, so the model must be signed, but there is no signature file `{name}` on the boot volume; put one there (64 bytes, by `openssl pkeyutl -sign -rawin`), or name it with model.signature="
    )]
    NoSignature {
        /// The file looked for.
        name: String,
    },
    /// A signature is named and nobody's key.
    #[error(
        "a signature file is given, but no key to check it with; set model.public_key= (hosted: --public-key) to 64 hexadecimal digits"
    )]
    NoPublicKey,
    /// Not the length of a signature.
    #[error(
        "the signature file has {found_bytes} bytes, expected the 64 of an Ed25519 signature as `openssl pkeyutl -sign -rawin` writes them (no text, no PEM)"
    )]
    SignatureLength {
        /// Its length.
        found_bytes: usize,
    },
    /// The signature is not one of the model by the key.
    #[error(
        "the signature does not fit the model ({model_bytes} bytes) and model.public_key: the model or the signature was changed, or another key made it; not running it. A model on a raw disk is signed with the zeros that fill its last sector: `truncate -s %512 MODEL` before signing"
    )]
    WrongSignature {
        /// Bytes of the model that were read; 0 when the signature is malformed.
        model_bytes: u64,
    },
    /// An image without the check.
    #[error(
        "model.public_key is set, but this native image was built without the check of signatures; boot the JIT image, or check the model before and leave model.public_key out (model.sha256= is enforced here, too)"
    )]
    NoSignatureCheck,
    /// The engine refuses the model or the request.
    #[error(transparent)]
    Engine(#[from] engine::EngineError),
    /// Memory is too small.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// The rotary angles of a long context do not fit the heap.
    #[error(
        "not enough memory for the rotary angles of {context} positions: {need_bytes} bytes needed; give the machine more memory or ask for a smaller context="
    )]
    NoRoomForAngles {
        /// Positions of the context.
        context: usize,
        /// Bytes they take.
        need_bytes: usize,
    },
    /// A file on the boot volume is larger than what it is for allows.
    #[error("{name} has {len_bytes} bytes, expected at most {max_bytes}; it is not read")]
    FileTooLong {
        /// Its name.
        name: String,
        /// Its length.
        len_bytes: u64,
        /// Most that is read.
        max_bytes: u64,
    },
    /// `tokenizer=` without a volume.
    #[error(
        "tokenizer={name}: there is no boot volume to look for it on; attach one, or give the file with --tokenizer"
    )]
    NoVolumeForTokenizer {
        /// The name asked for.
        name: String,
    },
    /// A model file without a tokenizer in it, and none named.
    #[error(
        "a llama2.c model has no tokenizer in its file; name one with tokenizer=FILE on the boot volume, or with --tokenizer FILE"
    )]
    NoTokenizer,
    /// Nothing to feed the model.
    #[error(
        "the prompt is empty and the model has no begin-of-text token to start from; give a prompt with at least one character"
    )]
    EmptyPrompt,
    /// `chat=true`, but the file has no template.
    #[error("chat=true, but the model file has no chat template; leave chat off to give the prompt as it is")]
    NoChatTemplate,
    /// `chat=true`, but the template cannot be used.
    #[error(transparent)]
    Chat(#[from] model::chat::ChatError),
    /// The prompt does not fit the context.
    #[error(
        "the prompt has {prompt_tokens} tokens but the context has room for {context}, one of them for the answer; shorten the prompt or raise context= (the model allows {model_context})"
    )]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// Positions in the context.
        context: usize,
        /// The model's own limit.
        model_context: usize,
    },
    /// More tokens to keep than a context that is to move on can hold.
    #[error(
        "context.shift={keep} keeps too much of a context of {context} tokens; keep at most {}, or raise context= (the model allows {model_context})", .context.saturating_sub(SHIFT_ROOM)
    )]
    ShiftKeepsTooMuch {
        /// First tokens to keep.
        keep: usize,
        /// Positions in the context.
        context: usize,
        /// The model's own limit.
        model_context: usize,
    },
    /// An image without a compiler whose linked kernels do not fit the model.
    #[error(
        "this native image holds no kernel for this model; it was exported for another model, thread count or batch: export again or boot the JIT image"
    )]
    NoLinkedKernel,
    /// An image without a compiler on a CPU that none of its kernels run on.
    #[error(
        "a native image needs AVX2, FMA and F16C, as all its kernels do: this CPU lacks them or isa= rules them out; boot the JIT image"
    )]
    NoAvx2,
    /// An image without a compiler whose linked kernels are for this model but cannot be used.
    #[error(
        "none of the {matching} kernels this native image holds for the model can be used; the first, {first}; export again from a snapshot that was tuned on this CPU, or boot the JIT image"
    )]
    LinkedKernelsRefused {
        /// Kernels for this model.
        matching: usize,
        /// Which was the first, and what was wrong with it.
        first: String,
    },
}

impl RunError {
    /// The exit status that says what kind of refusal it is.
    pub fn exit_status(&self) -> ExitStatus {
        use EngineError as E;
        use ExitStatus as S;
        match self {
            RunError::Option(_)
            | RunError::BadPublicKey
            | RunError::NoPublicKey
            | RunError::NoSignatureCheck
            | RunError::NoVolumeForTokenizer { .. }
            | RunError::FileTooLong { .. }
            | RunError::EmptyPrompt
            | RunError::NoChatTemplate
            | RunError::Chat(_)
            | RunError::PromptTooLong { .. }
            | RunError::ShiftKeepsTooMuch { .. } => S::Settings,
            RunError::NoModel { .. }
            | RunError::Model(_)
            | RunError::WrongModelHash { .. }
            | RunError::NoSignature { .. }
            | RunError::SignatureLength { .. }
            | RunError::WrongSignature { .. }
            | RunError::NoTokenizer => S::Model,
            RunError::Memory(_) | RunError::NoRoomForAngles { .. } => S::Memory,
            RunError::Storage(_) => S::Storage,
            RunError::NoLinkedKernel | RunError::NoAvx2 | RunError::LinkedKernelsRefused { .. } => S::Kernels,
            RunError::Engine(E::Threads { .. } | E::ContextFull { .. } | E::NoTokens | E::Token { .. }) => S::Settings,
            RunError::Engine(E::SessionMemory { .. } | E::ArenaTooSmall { .. }) => S::Memory,
            RunError::Engine(
                E::MissingTensor { .. } | E::UnsupportedType { .. } | E::Shape { .. } | E::Incomplete { .. },
            ) => S::Model,
            RunError::Engine(_) => S::Fatal,
        }
    }
}

fn no_model(looked_for: &str, found: &[String]) -> String {
    if !looked_for.is_empty() {
        return alloc::format!(
            "no model file `{looked_for}`: there is no boot volume to look on; attach one, or attach the model as a raw disk"
        );
    }
    if found.is_empty() {
        return "no model: attach a GGUF file as a raw disk (-drive file=model.gguf,format=raw,if=virtio,readonly=on), or put it on the boot volume".into();
    }
    alloc::format!("several model files on the boot volume ({}); name one with model=NAME", found.join(" "))
}
