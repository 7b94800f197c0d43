//! The peers: llama.cpp through llama-cpp-python, built here from the source package on PyPI, once for AVX2 and once for
//! AVX-512 with VNNI.
//!
//! Each gets a virtual environment under the cache. Source and build directory are shared, so the second peer compiles only
//! what its instruction set changes.

use crate::bench::machine::{MachineFacts, pinned};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The binding, whose source package brings llama.cpp with it.
const BINDING: &str = "llama-cpp-python";
const VERSION: &str = "0.3.36";
/// The one dependency of the binding's ctypes layer, which is all that the driver uses.
const REQUIREMENT: &str = "typing-extensions==4.15.0";
/// Build settings of both: release, nothing detected from the machine, no multimodal library.
const CMAKE_COMMON: &str = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF";

/// One way to build llama.cpp.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flavour {
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 with VNNI; no AMX.
    Avx512,
}

impl Flavour {
    /// Engine name in every table.
    pub fn engine(self) -> &'static str {
        match self {
            Flavour::Avx2 => "llama_cpp_avx2",
            Flavour::Avx512 => "llama_cpp_avx512",
        }
    }

    /// Instruction set name in every table.
    pub fn isa(self) -> &'static str {
        match self {
            Flavour::Avx2 => "avx2",
            Flavour::Avx512 => "avx512_vnni",
        }
    }

    fn cmake_args(self) -> String {
        let own = match self {
            Flavour::Avx2 => "-DGGML_AVX512=OFF -DGGML_AVX512_VNNI=OFF",
            Flavour::Avx512 => "-DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON",
        };
        format!("{CMAKE_COMMON} {own}")
    }
}

/// A peer that was built.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Which build.
    pub flavour: Flavour,
    python: PathBuf,
}

/// What became of a peer, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct PeerStatus {
    /// Engine name.
    pub engine: &'static str,
    /// Package and version.
    pub package: String,
    /// Commands that make it from nothing.
    pub commands: Vec<String>,
    /// Why it is not there; `None` when it is.
    pub failure: Option<String>,
    /// What llama.cpp says of its own build; filled in by the first run.
    pub system_info: Option<String>,
}

/// Builds every peer this machine can run, or finds it built; what cannot be had is in the status, with the reason.
pub fn obtain(cache: &Path, machine: &MachineFacts) -> (Vec<Peer>, Vec<PeerStatus>) {
    let (mut peers, mut statuses) = (Vec::new(), Vec::new());
    for flavour in [Flavour::Avx2, Flavour::Avx512] {
        let build = Build::new(cache, flavour);
        let built = match flavour {
            Flavour::Avx512 if !machine.has_avx512_vnni() => Err(anyhow::anyhow!("this CPU has no AVX-512 with VNNI")),
            _ => build.ensure(),
        };
        let failure = match built {
            Ok(()) => {
                peers.push(Peer { flavour, python: build.python() });
                None
            }
            Err(error) => {
                eprintln!("no {}: {error:#}", flavour.engine());
                Some(format!("{error:#}"))
            }
        };
        statuses.push(PeerStatus {
            engine: flavour.engine(),
            package: format!("{BINDING}=={VERSION}"),
            // As typed in the workspace: where that lies on this machine is nobody's business.
            commands: build.commands().iter().map(|c| c.replace(&*cache.to_string_lossy(), ".cache/peers")).collect(),
            failure,
            system_info: None,
        });
    }
    (peers, statuses)
}

/// The Python with llama.cpp's AVX2 build, built here when missing.
///
/// # Errors
/// A tool that is missing, or a step that fails.
pub fn python(cache: &Path) -> Result<PathBuf> {
    let build = Build::new(cache, Flavour::Avx2);
    build.ensure()?;
    Ok(build.python())
}

/// How one peer is built.
struct Build {
    flavour: Flavour,
    cache: PathBuf,
    venv: PathBuf,
}

impl Build {
    fn new(cache: &Path, flavour: Flavour) -> Self {
        let venv = cache.join(format!("{BINDING}-{VERSION}-{}", flavour.isa()));
        Self { flavour, cache: cache.to_owned(), venv }
    }

    fn python(&self) -> PathBuf {
        self.venv.join("bin/python")
    }

    fn source(&self) -> PathBuf {
        self.cache.join(format!("llama_cpp_python-{VERSION}"))
    }

    /// Program and arguments of every step, in order.
    fn steps(&self) -> Vec<Vec<String>> {
        let text = |path: &Path| path.display().to_string();
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let (python, source) = (text(&self.python()), text(&self.source()));
        let build_dir = format!("build-dir={}", text(&self.cache.join("llama-build")));
        let package = format!("{BINDING}=={VERSION}");
        let archive = format!("{source}.tar.gz");
        let install = [&python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let mut steps = vec![words(&["python3", "-m", "venv", &text(&self.venv)])];
        steps.push([words(&install), words(&[REQUIREMENT])].concat());
        if !self.source().exists() {
            let download = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", BINDING, "--dest"];
            steps.push([words(&[&python]), words(&download), words(&[&text(&self.cache), &package])].concat());
            steps.push(words(&["tar", "-xzf", &archive, "-C", &text(&self.cache)]));
        }
        let options = ["--no-deps", "--no-cache-dir", "--force-reinstall", "--config-settings", &build_dir, &source];
        steps.push([words(&install), words(&options)].concat());
        steps
    }

    /// The steps as a person would type them.
    fn commands(&self) -> Vec<String> {
        let quoted = |word: &String| if word.contains(' ') { format!("'{word}'") } else { word.clone() };
        let mut lines: Vec<String> =
            self.steps().iter().map(|step| step.iter().map(quoted).collect::<Vec<_>>().join(" ")).collect();
        if let Some(last) = lines.last_mut() {
            *last = format!("CMAKE_ARGS='{}' {last}", self.flavour.cmake_args());
        }
        lines
    }

    /// Makes the environment unless a finished one is there.
    fn ensure(&self) -> Result<()> {
        // Written last: an environment without it was not finished.
        let done = self.venv.join("bareflow-peer");
        if std::fs::read_to_string(&done).is_ok_and(|args| args == self.flavour.cmake_args()) {
            return Ok(());
        }
        for tool in ["cc", "c++"] {
            let found = Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
            ensure!(found, "it is built from source and there is no `{tool}`; install it with: apt-get install g++");
        }
        if self.venv.exists() {
            std::fs::remove_dir_all(&self.venv).with_context(|| format!("removing {}", self.venv.display()))?;
        }
        std::fs::create_dir_all(&self.cache)?;
        eprintln!("building {} (several minutes, once):", self.flavour.engine());
        for (step, line) in self.steps().iter().zip(self.commands()) {
            eprintln!("  $ {line}");
            let status = Command::new(&step[0])
                .args(&step[1..])
                .env("CMAKE_ARGS", self.flavour.cmake_args())
                .env("CMAKE_BUILD_PARALLEL_LEVEL", parallelism())
                .stdout(std::io::stderr())
                .status()
                .with_context(|| format!("running {}", step[0]))?;
            if !status.success() {
                bail!("`{line}` failed ({status}); the lines above say why");
            }
        }
        std::fs::write(&done, self.flavour.cmake_args())?;
        Ok(())
    }
}

fn parallelism() -> String {
    std::thread::available_parallelism().map_or(1, |n| n.get()).to_string()
}

/// What one run of the driver measured; see `peer.py` for how.
#[derive(Clone, Debug, Deserialize)]
pub struct PeerRun {
    /// Version of the binding that ran.
    pub version: String,
    /// llama.cpp's line about its build.
    pub system_info: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Generated ids.
    pub token_ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
    /// Generated tokens per second, the first excluded.
    pub decode_tok_s: f64,
    /// From loading the library to the first token, ms.
    pub ttft_ms: f64,
    /// Growth of the process's peak, MiB.
    pub peak_rss_mib: f64,
}

/// One run's settings.
#[derive(Clone, Copy)]
pub struct PeerJob<'a> {
    /// `peer.py`.
    pub driver: &'a Path,
    /// File of the prompt.
    pub prompt: &'a Path,
    /// Cores to choose from.
    pub cores: &'a [usize],
    /// GGUF file.
    pub model: &'a Path,
    /// Threads, each on a core of its own.
    pub threads: u32,
    /// Tokens to generate.
    pub tokens: u32,
    /// Context in tokens.
    pub context: u32,
}

impl Peer {
    /// Runs the driver once.
    ///
    /// # Errors
    /// When it fails, with what it wrote.
    pub fn run(&self, job: &PeerJob<'_>) -> Result<PeerRun> {
        let mut command = pinned(job.cores, job.threads, &self.python);
        command.arg(job.driver).arg("--model").arg(job.model).arg("--prompt-file").arg(job.prompt);
        for (flag, value) in [("--tokens", job.tokens), ("--threads", job.threads), ("--context", job.context)] {
            command.arg(flag).arg(value.to_string());
        }
        let output = command.output().context("running taskset")?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            bail!("{command:?} failed ({}): {}", output.status, why.trim());
        }
        let run: PeerRun =
            serde_json::from_slice(&output.stdout).with_context(|| format!("reading what {command:?} printed"))?;
        ensure!(run.version == VERSION, "{} is {BINDING} {}, not {VERSION}", self.python.display(), run.version);
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_flavours_are_pinned_and_differ_only_in_avx512() {
        let dir = std::env::temp_dir().join("bareflow-no-such-cache");
        let avx2 = Build::new(&dir, Flavour::Avx2);
        let lines = avx2.commands();
        assert_eq!(lines.len(), 5, "{lines:#?}");
        assert!(lines.iter().any(|l| l.contains("llama-cpp-python==0.3.36") && l.contains("--no-binary")));
        assert!(lines[4].starts_with("CMAKE_ARGS='") && lines[4].contains("-DGGML_NATIVE=OFF"));
        let strip = |f: Flavour| f.cmake_args().replace("=ON", "").replace("=OFF", "");
        assert_eq!(strip(Flavour::Avx2), strip(Flavour::Avx512));
        assert_ne!(Flavour::Avx2.cmake_args(), Flavour::Avx512.cmake_args());
    }

    #[test]
    fn the_drivers_json_is_read() {
        let text = r#"{"version":"1","system_info":"CPU","prompt_tokens":3,"token_ids":[1,2],"text":"a","prefill_tok_s":1.5,
            "decode_tok_s":2.5,"token_ms_median":400.0,"ttft_ms":9.0,"peak_rss_mib":7.0}"#;
        let run: PeerRun = serde_json::from_str(text).unwrap();
        assert_eq!((run.token_ids, run.decode_tok_s), (vec![1, 2], 2.5));
    }
}
