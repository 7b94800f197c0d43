//! `--micro`: single kernels. Every hot key's tuned kernel beside the hand-written AVX2 op and the reference, and one square
//! f32 product beside the `matrixmultiply` crate and the multiply-add peak.

use crate::bench::document::table;
use crate::bench::machine::pinned;
use crate::bench::models::ModelFile;
use crate::bench::ours::{Form, json};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the measurements need.
pub struct Micro<'a> {
    /// The checkout.
    pub workspace: &'a Path,
    /// The hosted program.
    pub bareflow: &'a Path,
    /// Cores to choose from.
    pub cores: &'a [usize],
    /// Prompt text.
    pub prompt: &'a str,
    /// Context in tokens.
    pub context: u32,
}

impl Micro<'_> {
    /// `bareflow tune --json` for one model and form on one core; `exhaustive` times the whole search space, too.
    ///
    /// # Errors
    /// When the program fails, with what it wrote.
    pub fn kernels(&self, model: &ModelFile, form: Form, snapshot: &Path, exhaustive: bool) -> Result<Value> {
        let mut command = pinned(self.cores, 1, self.bareflow);
        command.args(["tune", "--json", "--ignore-eos", "--threads", "1", "--max-tokens", "17"]).args(form.flags());
        command.arg("--context").arg(self.context.to_string()).args(["--prompt", self.prompt]);
        command.arg("--model").arg(&model.path).arg("--snapshot").arg(snapshot);
        if exhaustive {
            command.arg("--exhaustive");
        }
        let mut found: Value = json(command)?;
        // Paths of this machine say nothing to a reader.
        for field in ["model", "snapshot"] {
            found[field] = Value::Null;
        }
        found["engine"] = form.engine().into();
        found["dtype"] = model.dtype.clone().into();
        Ok(found)
    }

    /// The `gemm` example of the `jit` crate on one core.
    ///
    /// # Errors
    /// When it cannot be built or fails.
    pub fn gemm(&self) -> Result<Value> {
        let cargo = PathBuf::from(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let args = ["--locked", "--release", "--quiet", "--package", "jit", "--example", "gemm"];
        let built = Command::new(&cargo).current_dir(self.workspace).arg("build").args(args).status()?;
        anyhow::ensure!(built.success(), "building the gemm example failed ({built}); the lines above say why");
        let mut command = pinned(self.cores, 1, &cargo);
        command.current_dir(self.workspace).arg("run").args(args).args(["--", "--json"]);
        json(command)
    }
}

/// The kernel tables of `found` (as [`Micro::kernels`] gives them), hottest key first.
pub fn kernel_table(found: &[Value]) -> String {
    let header = [
        "type",
        "engine",
        "kernel",
        "share of time",
        "runs",
        "of its limit",
        "time / avx2",
        "time / reference",
        "choice / best",
    ];
    let mut lines = Vec::new();
    for run in found {
        for key in run["keys"].as_array().into_iter().flatten() {
            let cycles = key["chosen"]["cycles"].as_f64();
            let over_reference = cycles.zip(key["reference_cycles"].as_f64()).map(|(c, r)| c / r);
            let percent = |value: &Value| value.as_f64().map_or_else(|| "-".into(), |v| format!("{:.0} %", 100.0 * v));
            let ratio = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.3}"));
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            lines.push(vec![
                text(&run["dtype"]),
                text(&run["engine"]),
                format!("`{}`", text(&key["key"])),
                percent(&key["share"]),
                format!("`{}`", text(&key["chosen"]["runs"])),
                percent(&key["limit_fraction"]),
                ratio(key["chosen_over_baseline"].as_f64()),
                ratio(over_reference),
                ratio(key["best"]["chosen_over_best"].as_f64()),
            ]);
        }
    }
    let mut out = table(&header.map(str::to_owned), &lines);
    for run in found {
        let distance = &run["chosen_over_best"];
        if let (Some(mean), Some(weighted)) =
            (distance["geometric_mean"].as_f64(), distance["weighted_by_time"].as_f64())
        {
            out += &format!(
                "\n{} {}: the choices take {:.1} % longer than the best of the search space, {:.1} % weighted by time.\n",
                run["engine"].as_str().unwrap_or("-"),
                run["dtype"].as_str().unwrap_or("-"),
                100.0 * (mean - 1.0),
                100.0 * (weighted - 1.0)
            );
        }
    }
    out
}

/// The table of [`Micro::gemm`].
pub fn gemm_table(found: &Value) -> String {
    let number = |value: &Value, digits: usize| value.as_f64().map_or_else(|| "-".into(), |v| format!("{v:.digits$}"));
    let lines: Vec<Vec<String>> = found["rows"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| {
            vec![
                row["name"].as_str().unwrap_or("-").to_owned(),
                row["isa"].as_str().unwrap_or("-").to_owned(),
                number(&row["gflop_s"], 1),
                number(&row["fraction_of_peak"], 2),
                number(&row["tile_fraction_of_peak"], 2),
                number(&row["over_crate"], 2),
            ]
        })
        .collect();
    let header =
        ["f32, one core", "instructions", "GFLOP/s", "of the FMA peak", "its register tile alone", "of matrixmultiply"];
    let size = found["size"].as_u64().unwrap_or_default();
    format!("n = m = k = {size}:\n\n{}", table(&header.map(str::to_owned), &lines))
}

/// Both as one JSON value.
pub fn both(kernels: &[Value], gemm: &Value) -> Value {
    json!({"kernels": kernels, "gemm": gemm})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_what_was_found() {
        let found = json!({
            "dtype": "Q4_1", "engine": "ours_avx2",
            "keys": [{
                "key": "matmul_q4_1_m1_n64_k64", "share": 0.25, "limit_fraction": 0.8, "reference_cycles": 1000.0,
                "chosen": {"runs": "w256_r1_c32_s2_u1_pf0", "cycles": 100.0}, "chosen_over_baseline": 0.5, "best": null,
            }],
            "chosen_over_best": {"geometric_mean": 1.05, "weighted_by_time": 1.02},
        });
        let text = kernel_table(&[found]);
        assert!(text.contains("| 25 % | `w256_r1_c32_s2_u1_pf0` | 80 % | 0.500 | 0.100 | - |"), "{text}");
        assert!(text.contains("5.0 % longer"), "{text}");
        let gemm = json!({"size": 512, "rows": [{"name": "a", "isa": "avx2", "gflop_s": 70.04, "fraction_of_peak": 0.9, "tile_fraction_of_peak": null, "over_crate": 1.0}]});
        assert!(gemm_table(&gemm).contains("| a | avx2 | 70.0 | 0.90 | - | 1.00 |"));
    }
}
