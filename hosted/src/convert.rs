//! `bareflow convert`: a GGUF file again with its weights in another type, or a llama2.c model as GGUF.

use crate::{BadFlag, read_file};
use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget};
use model::TensorType;
use model::convert::{ConvertError, Target, convert, convert_llama2c};
use model::formats::{FileFormat, header_bytes, sniff};
use std::fs::{File, Permissions};
use std::io::{BufWriter, IntoInnerError, IsTerminal, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// What to convert to what.
pub struct Request<'a> {
    /// GGUF file, or llama2.c .bin.
    pub input: &'a Path,
    /// GGUF file to write.
    pub output: &'a Path,
    /// Tokenizer file of a llama2.c model.
    pub tokenizer: Option<&'a Path>,
    /// Type of the matrices; a llama2.c model needs none.
    pub matrices: Option<&'a str>,
    /// Type of the embedding and head; `None`: as the matrices.
    pub embedding: Option<&'a str>,
    /// Replace an output that is there.
    pub force: bool,
}

/// Writes `request.output`.
///
/// # Errors
/// An input that is no model, an unsupported type, an output that is there already, or a file that cannot be read or written.
/// The output appears only when it is complete, and never takes the place of the input.
pub fn run(request: &Request<'_>) -> Result<()> {
    let &Request { input, output, tokenizer, matrices, embedding, force } = request;
    let target = match (matrices, embedding) {
        (Some(matrices), embedding) => {
            Some(Target { matrices: tensor_type(matrices)?, embedding: tensor_type(embedding.unwrap_or(matrices))? })
        }
        (None, Some(_)) => {
            bail!(BadFlag("--embedding is given without --type, the type of all other matrices".into()))
        }
        (None, None) => None,
    };
    let file = File::open(input).with_context(|| format!("opening {}", input.display()))?;
    let file_bytes = file.metadata()?.len();
    let tokenizer_bin = read_file(tokenizer)?;
    for input in [Some(input), tokenizer].into_iter().flatten() {
        bootimage::not_over([input], output)?;
    }
    let taken =
        || BadFlag(format!("{} is there already: name another output, or replace it with --force", output.display()));
    // A link that leads nowhere is there, too.
    ensure!(force || std::fs::symlink_metadata(output).is_err(), taken());
    // A file of its own beside the output, whatever lies there; gone again unless it becomes the output.
    let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let writing = || format!("writing {}", output.display());
    let bar = if std::io::stderr().is_terminal() {
        ProgressBar::with_draw_target(Some(file_bytes), ProgressDrawTarget::stderr())
    } else {
        ProgressBar::hidden()
    };
    let read_header = |header: &mut [u8]| file.read_exact_at(header, 0);
    let header = header_bytes(file_bytes, read_header).with_context(|| format!("reading {}", input.display()))?;
    let format = sniff(&header, file_bytes).with_context(|| input.display().to_string())?;
    let part = tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(dir);
    let mut out = BufWriter::new(part.with_context(|| format!("creating a file in {}", dir.display()))?);
    let mut read = |offset: u64, buf: &mut [u8]| {
        bar.set_position(offset);
        file.read_exact_at(buf, offset)
    };
    let mut write = |bytes: &[u8]| out.write_all(bytes);
    let result = match (format, &tokenizer_bin) {
        (FileFormat::Gguf, tokenizer) => {
            let own = "a GGUF file has its own tokenizer: leave --tokenizer out";
            ensure!(tokenizer.is_none(), "{}: {own}", input.display());
            let target = target.context("--type is missing: the type that the matrices are to have, such as Q8_0")?;
            convert::<std::io::Error>(&header, file_bytes, target, &mut read, &mut write)
        }
        (FileFormat::Llama2c, Some(tokenizer)) => {
            let name = input.file_stem().unwrap_or_default().to_string_lossy();
            convert_llama2c(&header, file_bytes, tokenizer, &name, target, &mut read, &mut write)
        }
        (FileFormat::Llama2c, None) => {
            bail!("{}: a llama2.c model, whose tokenizer is a file of its own: give --tokenizer", input.display())
        }
    };
    let summary = match result {
        Ok(summary) => summary,
        // What they are of decides the exit code.
        Err(ConvertError::Model(error)) => return Err(error).with_context(|| input.display().to_string()),
        Err(ConvertError::Io(error)) => {
            return Err(error).with_context(|| format!("{} to {}", input.display(), output.display()));
        }
        Err(error) => bail!("{}: {error}", input.display()),
    };
    let part = out.into_inner().map_err(IntoInnerError::into_error).with_context(writing)?;
    part.as_file().sync_all().with_context(writing)?;
    // What has appeared meanwhile is not replaced, either.
    let persisted = if force { part.persist(output) } else { part.persist_noclobber(output) };
    persisted.map_err(|failed| failed.error).with_context(writing)?;
    bar.finish_and_clear();
    print_line!(
        "{}: {} bytes, {} tensors converted, {} copied",
        output.display(),
        summary.written_bytes,
        summary.converted,
        summary.copied
    );
    if !summary.kept.is_empty() {
        print_line!("kept as they were, because their rows are not whole blocks: {}", summary.kept.join(" "));
    }
    Ok(())
}

fn tensor_type(name: &str) -> Result<TensorType> {
    let known = TensorType::ALL.iter().copied().filter(|ty| ty.is_supported());
    let names: Vec<&str> = known.clone().map(TensorType::name).collect();
    let mut known = known;
    known
        .find(|ty| ty.name().eq_ignore_ascii_case(name))
        .ok_or_else(|| BadFlag(format!("unknown type `{name}`: expected one of {}", names.join(" "))).into())
}
