//! The model in every weight type, as files that all engines read.

use crate::demo_model;
use anyhow::{Context, Result, bail};
use model::formats::header_bytes;
use model::{ModelDescription, Role, Tensor, gguf};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Type of the demo model as it is downloaded.
const ORIGINAL: &str = "Q4_1";

/// One file.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFile {
    /// Weight type asked for.
    pub dtype: String,
    /// Types in the file, by falling share of bytes.
    pub stored: String,
    /// GGUF file.
    #[serde(skip)]
    pub path: PathBuf,
    /// Its size.
    pub file_bytes: u64,
    /// Bytes of weights that one decoded token has to read: every matrix once, the embedding only where it is the head too.
    pub token_bytes: u64,
    /// Operations of the layers' products for one token, a multiply-add counted as two: those of attention and of the head,
    /// which a prompt runs for its last token only, are left out.
    pub layer_ops: u64,
    /// Elements of the keys and values of one position.
    pub position_elements: u64,
    /// Name in the file.
    pub name: String,
}

/// The demo model with matrices of type `dtype`, made in `cache` when missing.
///
/// # Errors
/// No download, a type that `bareflow convert` does not write, or a damaged file.
pub fn obtain(cache: &Path, bareflow: &Path, dtype: &str) -> Result<ModelFile> {
    let original = demo_model::obtain(cache)?;
    let path = if dtype == ORIGINAL {
        original
    } else {
        let path = cache.join(format!("SmolLM2-135M-Instruct.{dtype}.gguf"));
        if !path.exists() {
            let mut command = Command::new(bareflow);
            command.arg("convert").arg(&original).arg(&path).args(["--type", dtype]);
            eprintln!("  $ {command:?}");
            let status = command.stdout(std::io::stderr()).status().context("running bareflow convert")?;
            if !status.success() {
                bail!("{command:?} failed ({status}); the lines above say why");
            }
        }
        path
    };
    let description = describe(&path)?;
    let head = description.head().map_or(Role::Output, |tensor| tensor.role);
    let read = |role: Role| role == head || !(role.is_vector() || role == Role::TokenEmbedding);
    let in_layers = |t: &&Tensor| t.role != head && read(t.role);
    Ok(ModelFile {
        dtype: dtype.to_owned(),
        stored: description.dtypes(),
        file_bytes: description.file_bytes,
        token_bytes: description.tensors.iter().filter(|t| read(t.role)).map(|t| t.len_bytes).sum(),
        layer_ops: description.tensors.iter().filter(in_layers).map(|t| 2 * t.elements()).sum(),
        position_elements: 2 * u64::from(description.config.n_layers) * u64::from(description.config.kv_dim()),
        name: description.name,
        path,
    })
}

fn describe(path: &Path) -> Result<ModelDescription> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let file_bytes = file.metadata()?.len();
    let read = |bytes: &mut [u8]| file.read_exact_at(bytes, 0);
    let header = header_bytes(file_bytes, read).with_context(|| format!("reading {}", path.display()))?;
    gguf::read(&header, file_bytes).with_context(|| format!("{} is damaged; delete it", path.display()))
}
