//! Kernels as text: each file under `filetests/` names a key and a variant and holds the disassembly they must give.
//!
//! `BLESS=1 cargo test -p jit --test filetests` rewrites the expectations; read the difference before committing it.

mod common;

use common::EVERY_ISA;
use jit::{Compiler, disassemble};
use std::fs;
use std::path::{Path, PathBuf};

/// A file: comment lines, `key NAME`, `variant NAME`, a blank line, the disassembly.
fn check(path: &Path, compiler: &mut Compiler, bless: bool) -> Result<(), String> {
    let text = fs::read_to_string(path).map_err(|e| e.to_string())?;
    let (head, expected) = text.split_once("\n\n").ok_or("no blank line between head and code")?;
    let field = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map(str::trim).ok_or_else(|| format!("no `{name}` line"))
    };
    let key = field("key")?.parse().map_err(|e| format!("{e}"))?;
    let variant = field("variant")?.parse().map_err(|e| format!("{e}"))?;
    let kernel = compiler.compile(&key, &variant).map_err(|e| e.to_string())?;
    let got = disassemble(&kernel.code);
    if got == expected {
        return Ok(());
    }
    if bless {
        return fs::write(path, format!("{head}\n\n{got}")).map_err(|e| e.to_string());
    }
    let line = got.lines().zip(expected.lines()).position(|(a, b)| a != b);
    let line = line.unwrap_or_else(|| got.lines().count().min(expected.lines().count()));
    Err(format!(
        "line {} of the code: expected `{}`, got `{}`; BLESS=1 rewrites the file",
        line + 1,
        expected.lines().nth(line).unwrap_or(""),
        got.lines().nth(line).unwrap_or("")
    ))
}

#[test]
fn kernels_disassemble_as_written() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests");
    let mut files: Vec<PathBuf> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "txt"));
    files.sort();
    assert!(files.len() >= 8, "only {} files in {}", files.len(), directory.display());
    let bless = std::env::var_os("BLESS").is_some_and(|value| value == "1");
    let mut compiler = Compiler::new(EVERY_ISA).unwrap();
    let wrong: Vec<String> = files
        .iter()
        .filter_map(|path| check(path, &mut compiler, bless).err().map(|e| format!("{}: {e}", path.display())))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
