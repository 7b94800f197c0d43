//! `bareflow convert`: a GGUF file again, with its weights in another type.

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget};
use model::TensorType;
use model::convert::{ConvertError, Target, convert};
use model::formats::HeaderBytes;
use std::fs::{File, Permissions};
use std::io::{BufWriter, IntoInnerError, IsTerminal, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// Writes `input` to `output` with matrices of type `matrices`, and the embedding and head of type `embedding`
/// (`None`: the same).
///
/// # Errors
/// An input that is no GGUF model, an unsupported type, or a file that cannot be read or written. `output` appears only
/// when it is complete.
pub fn run(input: &Path, output: &Path, matrices: &str, embedding: Option<&str>) -> Result<()> {
    let target = Target { matrices: tensor_type(matrices)?, embedding: tensor_type(embedding.unwrap_or(matrices))? };
    let file = File::open(input).with_context(|| format!("opening {}", input.display()))?;
    let file_bytes = file.metadata()?.len();
    // A file of its own beside the output, whatever lies there; gone again unless it becomes the output.
    let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let writing = || format!("writing {}", output.display());
    let bar = if std::io::stderr().is_terminal() {
        ProgressBar::with_draw_target(Some(file_bytes), ProgressDrawTarget::stderr())
    } else {
        ProgressBar::hidden()
    };
    let mut len = HeaderBytes::of(file_bytes);
    let summary = loop {
        let mut header = vec![0; len.len()];
        file.read_exact_at(&mut header, 0).with_context(|| format!("reading {}", input.display()))?;
        let part = tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(dir);
        let mut out = BufWriter::new(part.with_context(|| format!("creating a file in {}", dir.display()))?);
        let result = convert::<std::io::Error>(
            &header,
            file_bytes,
            target,
            &mut |offset, buf| {
                bar.set_position(offset);
                file.read_exact_at(buf, offset)
            },
            &mut |bytes| out.write_all(bytes),
        );
        match result {
            Ok(summary) => {
                let part = out.into_inner().map_err(IntoInnerError::into_error).with_context(writing)?;
                part.as_file().sync_all().with_context(writing)?;
                part.persist(output).map_err(|failed| failed.error).with_context(writing)?;
                break summary;
            }
            Err(ConvertError::Model(error)) if len.grow(&error) => {}
            Err(error) => bail!("{}: {error}", input.display()),
        }
    };
    bar.finish_and_clear();
    println!(
        "{}: {} bytes, {} tensors converted, {} copied",
        output.display(),
        summary.written_bytes,
        summary.converted,
        summary.copied
    );
    if !summary.kept.is_empty() {
        println!("kept as they were, because their rows are not whole blocks: {}", summary.kept.join(" "));
    }
    Ok(())
}

fn tensor_type(name: &str) -> Result<TensorType> {
    let known = TensorType::ALL.iter().copied().filter(|ty| ty.is_supported());
    let names: Vec<&str> = known.clone().map(TensorType::name).collect();
    let mut known = known;
    known
        .find(|ty| ty.name().eq_ignore_ascii_case(name))
        .with_context(|| format!("unknown type `{name}`: expected one of {}", names.join(" ")))
}
