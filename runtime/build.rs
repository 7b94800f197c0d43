//! Computes the build id: a hash of everything that decides what compiled code looks like and what it is called with.
//! A snapshot's machine code is used only by the build that wrote it.

use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let workspace = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).parent().unwrap().to_path_buf();
    let mut files = Vec::new();
    for part in ["model/src", "engine/src", "jit/src", "runtime/src"] {
        collect(&workspace.join(part), &mut files);
        println!("cargo:rerun-if-changed={}", workspace.join(part).display());
    }
    files.push(workspace.join("Cargo.lock"));
    println!("cargo:rerun-if-changed={}", workspace.join("Cargo.lock").display());
    files.sort();
    let mut hasher = Sha256::new();
    for file in &files {
        let content = fs::read(file).unwrap_or_default();
        hasher.update(file.strip_prefix(&workspace).unwrap().to_string_lossy().as_bytes());
        hasher.update((content.len() as u64).to_le_bytes());
        hasher.update(content);
    }
    let id: String = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
    println!("cargo:rustc-env=BAREFLOW_BUILD_ID={id}");
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.push(path);
        }
    }
}
