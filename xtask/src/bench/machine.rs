//! The machine a benchmark ran on, and the cores it was given.

use anyhow::{Context, Result, bail};
use qemu_runs::Environment;
use serde::Serialize;
use std::path::Path;
use std::process::Command;

/// Facts that the figures depend on; `None` where the system does not say.
#[derive(Clone, Debug, Serialize)]
pub struct MachineFacts {
    /// CPU brand string.
    pub cpu: Option<String>,
    /// Cores this process may use.
    pub cores: Vec<usize>,
    /// Threads of one core, if the system shows its topology.
    pub threads_per_core: Option<u32>,
    /// Last-level cache of core 0, as the system writes it.
    pub last_level_cache: Option<String>,
    /// Hypervisor flag of the CPU: the machine is a guest itself.
    pub virtual_machine: bool,
    /// Total memory, MiB.
    pub memory_mib: Option<u64>,
    /// Kernel release.
    pub kernel: Option<String>,
    /// Scaling governor of core 0, where there is one.
    pub governor: Option<String>,
    /// Load average when the benchmark started, one minute.
    pub load_before: Option<f64>,
    /// Vector extensions that matter here.
    pub isa: Vec<&'static str>,
    /// Commit of the checkout, with `-dirty` when files differ.
    pub commit: Option<String>,
}

impl MachineFacts {
    /// Of this machine and the checkout.
    ///
    /// # Errors
    /// When the cores this process may use cannot be read.
    pub fn read(checkout: &Path) -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let flags = field("flags").unwrap_or_default();
        let has = |flag: &str| flags.split(' ').any(|f| f == flag);
        let named = [("avx2", "avx2"), ("fma", "fma"), ("f16c", "f16c"), ("avx_vnni", "avx_vnni")];
        let wide = [("avx512f", "avx512f"), ("avx512_vnni", "avx512_vnni"), ("amx_int8", "amx_int8")];
        let (siblings, cores_in_socket) = (field("siblings"), field("cpu cores"));
        let number = |text: Option<String>| text.and_then(|t| t.parse::<u32>().ok());
        let read = |file: &str| std::fs::read_to_string(file).ok().map(|text| text.trim().to_owned());
        let environment = Environment::of_host(checkout, String::new());
        Ok(Self {
            cpu: environment.host_cpu,
            cores: allowed_cores()?,
            threads_per_core: number(siblings).zip(number(cores_in_socket)).map(|(s, c)| s / c.max(1)),
            last_level_cache: read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
            virtual_machine: has("hypervisor"),
            memory_mib: read("/proc/meminfo").and_then(|text| {
                text.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib / 1024)
            }),
            kernel: read("/proc/sys/kernel/osrelease"),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            load_before: read("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok()),
            isa: named.iter().chain(&wide).filter(|(flag, _)| has(flag)).map(|(_, name)| *name).collect(),
            commit: environment.commit,
        })
    }

    /// AVX-512 with its integer dot products.
    pub fn has_avx512_vnni(&self) -> bool {
        self.isa.contains(&"avx512f") && self.isa.contains(&"avx512_vnni")
    }
}

/// Cores this process may use, in order.
fn allowed_cores() -> Result<Vec<usize>> {
    let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    parse_core_list(list.context("/proc/self/status has no Cpus_allowed_list")?)
}

/// `0-3,8` as numbers.
fn parse_core_list(text: &str) -> Result<Vec<usize>> {
    let mut cores = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => (first, last),
            _ => bail!("`{text}` is not a list of cores"),
        };
        cores.extend(first..=last);
    }
    Ok(cores)
}

/// A command that runs `program` on the first `threads` of `cores` only.
pub fn pinned(cores: &[usize], threads: u32, program: &Path) -> Command {
    let list: Vec<String> = cores.iter().take(threads as usize).map(usize::to_string).collect();
    let mut command = Command::new("taskset");
    command.arg("--cpu-list").arg(list.join(",")).arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_lists_are_read() {
        assert_eq!(parse_core_list("\t0-3,8\n").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(parse_core_list("1").unwrap(), [1]);
        assert!(parse_core_list("").is_err());
        assert!(parse_core_list("a-b").is_err());
    }

    #[test]
    fn the_first_cores_are_given() {
        let command = pinned(&[2, 3, 5], 2, Path::new("/bin/true"));
        assert_eq!(command.get_args().collect::<Vec<_>>(), ["--cpu-list", "2,3", "/bin/true"]);
    }
}
