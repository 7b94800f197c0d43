//! Is there anything left to gain? Decided from one line of evidence per boot.
//!
//! Converged means: the keys that cover nearly all kernel cycles are settled, no kernel changed for a window of boots, and
//! the token time stopped moving over that window. The last is required only where the clock can be trusted, and only down to
//! the noise floor of the machine: how much equal work varies in those boots, whatever the kernels, up to a cap.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Most that the machine's noise raises the limit to: tokens that vary by more tell nothing about the kernels.
pub const MAX_RAISED_VARIATION: f64 = 0.15;

/// Limits of the decision.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ConvergenceConfig {
    /// Boots in a row without a changed kernel; 0 counts as 1.
    pub window: u32,
    /// Share of kernel cycles that has to be in settled keys, 0..=1.
    pub settled_share: f64,
    /// Largest spread of the token time over the window, relative.
    pub max_variation: f64,
    /// The spread is required; false where the clock cannot be trusted (software emulation).
    pub variation_required: bool,
}

impl Default for ConvergenceConfig {
    fn default() -> Self {
        Self { window: 3, settled_share: 0.99, max_variation: 0.01, variation_required: true }
    }
}

/// What one boot contributes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BootEvidence {
    /// Share of kernel cycles in settled keys, 0..=1.
    pub settled_share: f64,
    /// Keys whose kernel changed.
    pub kernels_changed: u32,
    /// Median time of one generated token, in any unit that stays the same; `None` when none was generated.
    pub token_time: Option<f64>,
    /// Relative spread of the token times inside this boot, where every token is the same work by the same kernels.
    pub token_spread: Option<f64>,
    /// Median time of a fixed piece of work measured between those tokens. When every boot of the window has one, token
    /// times are taken relative to it: that divides out how fast the machine as a whole was in that boot.
    pub reference_time: Option<f64>,
}

/// The decision with its evidence; the same fields as the report's.
#[derive(Clone, PartialEq, Debug)]
pub struct Convergence {
    /// All conditions hold.
    pub converged: bool,
    /// Share of kernel cycles in settled keys in the last boot, 0..=1.
    pub settled_share: f64,
    /// Boots in a row, up to the last, without a changed kernel.
    pub unchanged_boots: u32,
    /// Boots in a row that are required.
    pub window: u32,
    /// Spread of the token time over the window, relative; `None` before the window is full or when a boot has no time.
    pub token_time_variation: Option<f64>,
    /// The spread is of token times relative to the reference work.
    pub relative_to_reference: bool,
    /// Noise floor of the machine, below which no limit is enforced: the spread of the reference work over the window, or
    /// of the tokens inside one of its boots, whichever is larger.
    pub machine_variation: Option<f64>,
    /// Largest spread allowed on a quiet machine.
    pub max_variation: f64,
    /// Largest spread allowed in this window: `max_variation`, or the noise floor where that is higher, but for that at most
    /// [`MAX_RAISED_VARIATION`].
    pub allowed_variation: f64,
    /// The spread is required.
    pub variation_required: bool,
    /// One line for people.
    pub reason: String,
}

/// Decides from `boots`, oldest first, the last being the one that just ended.
pub fn decide(config: &ConvergenceConfig, boots: &[BootEvidence]) -> Convergence {
    let window = config.window.max(1);
    let unchanged = boots.iter().rev().take_while(|boot| boot.kernels_changed == 0).count();
    let unchanged_boots = u32::try_from(unchanged).unwrap_or(u32::MAX);
    let settled_share = boots.last().map_or(0.0, |boot| boot.settled_share);
    let in_window = boots.len().checked_sub(window as usize).and_then(|first| boots.get(first..));
    let Variation { token: token_time_variation, relative_to_reference, machine: machine_variation } =
        in_window.map_or_else(Variation::default, Variation::of);

    let settled = settled_share >= config.settled_share;
    let unchanged = unchanged_boots >= window;
    // Boots cannot be asked to be steadier than equal tokens inside one of them, or than a fixed piece of work in them.
    let floor = machine_variation.unwrap_or(0.0).min(MAX_RAISED_VARIATION);
    let allowed_variation = floor.max(config.max_variation);
    let steady = token_time_variation.is_some_and(|variation| variation <= allowed_variation);
    let converged = settled && unchanged && (steady || !config.variation_required);

    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let of_what = if relative_to_reference { "token time relative to the reference work" } else { "token time" };
    let met = if settled { "" } else { ", below the required share" };
    let (have, need) = (percent(settled_share), percent(config.settled_share));
    let shares = format!("{have} of kernel cycles in settled keys (need {need}){met}");
    let changes = format!("no kernel changed for {unchanged_boots} boots (need {window})");
    let required = if config.variation_required { "" } else { "; not required, the clock is not trusted" };
    let limit = percent(config.max_variation);
    let spread = match token_time_variation {
        Some(variation) => {
            let machine = match machine_variation {
                Some(machine) if allowed_variation > config.max_variation => {
                    let varies = percent(machine);
                    if machine > allowed_variation {
                        let raised = percent(allowed_variation);
                        format!(
                            ", raised to {raised}, the most it can be: equal work varies by {varies} on this machine"
                        )
                    } else {
                        format!(", raised to the {varies} by which equal work varies on this machine")
                    }
                }
                _ => String::new(),
            };
            format!("{of_what} varies by {} (limit {limit}{machine}{required})", percent(variation))
        }
        None if window < 2 => format!("{of_what} variation unknown: a window of 1 boot shows none{required}"),
        None => {
            let with_tokens = boots.iter().rev().take(window as usize).filter(|boot| boot.token_time.is_some()).count();
            format!("{of_what} variation unknown: {with_tokens} of {window} boots generated tokens{required}")
        }
    };
    // A run that goes on is told only what stands in the way.
    let parts = [(settled, shares), (unchanged, changes), (steady || !config.variation_required, spread)];
    let shown: Vec<String> = parts.into_iter().filter(|(met, _)| converged || !met).map(|(_, text)| text).collect();
    let reason = format!("{}: {}", if converged { "converged" } else { "not converged" }, shown.join("; "));
    Convergence {
        converged,
        settled_share,
        unchanged_boots,
        window,
        token_time_variation,
        relative_to_reference,
        machine_variation,
        max_variation: config.max_variation,
        allowed_variation,
        variation_required: config.variation_required,
        reason,
    }
}

/// How much the boots of a window differ.
#[derive(Clone, Copy, Default)]
struct Variation {
    /// Spread of the token times, as they are or relative to the reference work, whichever is smaller.
    token: Option<f64>,
    relative_to_reference: bool,
    /// Noise floor: spread of the reference work over the boots, or of the tokens inside one, whichever is larger.
    machine: Option<f64>,
}

impl Variation {
    fn of(boots: &[BootEvidence]) -> Self {
        let usable = |time: Option<f64>| time.filter(|time| time.is_finite() && *time > 0.0);
        let references: Option<Vec<f64>> = boots.iter().map(|boot| usable(boot.reference_time)).collect();
        let times: Option<Vec<f64>> = boots.iter().map(|boot| usable(boot.token_time)).collect();
        let Some(times) = times else { return Self::default() };
        let raw = spread(&times);
        let inside = boots.iter().filter_map(|boot| usable(boot.token_spread)).max_by(f64::total_cmp);
        let Some(references) = references else {
            return Self { token: raw, relative_to_reference: false, machine: inside };
        };
        let machine = spread(&references).into_iter().chain(inside).max_by(f64::total_cmp);
        let ratios: Vec<f64> = times.iter().zip(references).map(|(time, reference)| time / reference).collect();
        // The reference divides out a machine that changes speed; on a steady one it only adds its own noise.
        match (raw, spread(&ratios)) {
            (Some(raw), Some(relative)) if relative < raw => {
                Self { token: Some(relative), relative_to_reference: true, machine }
            }
            (raw, _) => Self { token: raw, relative_to_reference: false, machine },
        }
    }
}

/// Robust relative standard deviation. Of five values and more `1.4826 * MAD / median`, which one odd boot in a window does
/// not move; of two to four, too few to tell an odd one, the range over its expected value for normal noise.
/// `None` of fewer.
pub fn spread(values: &[f64]) -> Option<f64> {
    // Expected range of 2, 3, 4 standard normal values.
    const RANGE: [f64; 3] = [1.128, 1.693, 2.059];
    let mut sorted = Vec::from(values);
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = median(&sorted)?;
    let deviation = match sorted.len().checked_sub(2).map(|index| RANGE.get(index))? {
        Some(expected) => (sorted.last()? - sorted.first()?) / expected,
        None => {
            let mut away: Vec<f64> = sorted.iter().map(|value| (value - middle).abs()).collect();
            away.sort_unstable_by(f64::total_cmp);
            1.4826 * median(&away)?
        }
    };
    (middle > 0.0).then(|| deviation / middle)
}

fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some(0.5 * (lower + upper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn boot(settled_share: f64, kernels_changed: u32, token_time: f64) -> BootEvidence {
        BootEvidence {
            token_spread: None,
            settled_share,
            kernels_changed,
            token_time: Some(token_time),
            reference_time: None,
        }
    }

    #[test]
    fn a_run_converges_when_the_last_condition_is_met() {
        let boots = [
            boot(0.30, 9, 90.0),
            boot(0.80, 3, 60.0),
            boot(0.995, 1, 50.0),
            boot(0.995, 0, 50.1),
            boot(0.995, 0, 50.0),
            boot(0.995, 0, 49.9),
        ];
        let config = ConvergenceConfig::default();
        for n in 0..boots.len() {
            let decision = decide(&config, &boots[..n]);
            assert!(!decision.converged, "after {n} boots: {}", decision.reason);
        }
        let decision = decide(&config, &boots);
        assert!(decision.converged, "{}", decision.reason);
        assert_eq!((decision.unchanged_boots, decision.window), (3, 3));
        let expected = 0.2 / 1.693 / 50.0;
        assert!((decision.token_time_variation.unwrap() - expected).abs() < 1e-12);
        assert_eq!(
            decision.reason,
            "converged: 99.50 % of kernel cycles in settled keys (need 99.00 %); no kernel changed for 3 boots (need 3); \
             token time varies by 0.24 % (limit 1.00 %)"
        );
    }

    #[test]
    fn each_condition_alone_prevents_convergence_and_is_named() {
        let good = [boot(1.0, 0, 50.0); 3];
        let config = ConvergenceConfig::default();
        assert!(decide(&config, &good).converged);
        let mut open = good;
        open[2].settled_share = 0.9899;
        assert_eq!(
            decide(&config, &open).reason,
            "not converged: 98.99 % of kernel cycles in settled keys (need 99.00 %), below the required share"
        );
        let mut changed = good;
        changed[1].kernels_changed = 1;
        assert_eq!(decide(&config, &changed).reason, "not converged: no kernel changed for 1 boots (need 3)");
        let mut moving = good;
        moving[0].token_time = Some(55.0);
        assert_eq!(decide(&config, &moving).reason, "not converged: token time varies by 5.91 % (limit 1.00 %)");
        for time in [None, Some(f64::NAN), Some(0.0), Some(-1.0), Some(f64::INFINITY)] {
            let mut silent = good;
            silent[1].token_time = time;
            let decision = decide(&config, &silent);
            assert!(!decision.converged && decision.token_time_variation.is_none(), "{time:?}");
        }
        let nan = [boot(f64::NAN, 0, 50.0); 3];
        assert!(!decide(&config, &nan).converged);
    }

    #[test]
    fn an_untrusted_clock_leaves_the_spread_reported_but_not_required() {
        let config = ConvergenceConfig { variation_required: false, ..ConvergenceConfig::default() };
        let boots = [boot(1.0, 0, 50.0), boot(1.0, 0, 150.0), boot(1.0, 0, 90.0)];
        let decision = decide(&config, &boots);
        assert!(decision.converged && decision.token_time_variation.unwrap() > 0.5);
        assert!(
            decision.reason.ends_with("(limit 1.00 %; not required, the clock is not trusted)"),
            "{}",
            decision.reason
        );
        assert!(!decide(&ConvergenceConfig::default(), &boots).converged);
    }

    #[test]
    fn drift_of_the_whole_machine_is_divided_out() {
        // Token and reference times of a machine whose bandwidth drifts by 2.6x between boots, kernels unchanged.
        let drift = [1.0, 2.6, 1.7];
        let boots = drift.map(|d| BootEvidence {
            settled_share: 1.0,
            kernels_changed: 0,
            token_time: Some(50.0 * d),
            token_spread: None,
            reference_time: Some(8.0 * d * 1.002),
        });
        let config = ConvergenceConfig::default();
        let decision = decide(&config, &boots);
        assert!(decision.converged && decision.relative_to_reference, "{}", decision.reason);
        let without = boots.map(|boot| BootEvidence { reference_time: None, ..boot });
        let decision = decide(&config, &without);
        assert!(!decision.converged && !decision.relative_to_reference, "{}", decision.reason);
        // One boot without a reference: raw times are compared, never a mixture.
        let mut mixed = boots;
        mixed[0].reference_time = None;
        assert!(!decide(&config, &mixed).relative_to_reference);
    }

    #[test]
    fn a_noisy_machine_raises_the_limit_to_its_own_noise_and_no_further() {
        let boots = |tokens: [f64; 3], references: [f64; 3]| -> Vec<BootEvidence> {
            let boot = |(token, reference)| BootEvidence { reference_time: Some(reference), ..boot(1.0, 0, token) };
            tokens.into_iter().zip(references).map(boot).collect()
        };
        let config = ConvergenceConfig::default();
        // Tokens vary by 3 %, fixed work by 25 %: the kernels are not to blame.
        let decision = decide(&config, &boots([50.0, 51.5, 52.0], [8.0, 11.5, 8.2]));
        assert!(decision.converged && !decision.relative_to_reference, "{}", decision.reason);
        assert!(decision.reason.contains("raised to"), "{}", decision.reason);
        assert_eq!((decision.max_variation, decision.allowed_variation), (0.01, MAX_RAISED_VARIATION));
        // Tokens vary by 20 % and fixed work by 25 %: the limit is not raised that far.
        let decision = decide(&config, &boots([50.0, 70.0, 52.0], [8.0, 8.2, 11.5]));
        assert!(!decision.converged && decision.machine_variation.unwrap() > 0.2, "{}", decision.reason);
        assert!(decision.reason.contains("raised to 15.00 %, the most it can be"), "{}", decision.reason);
        // A limit that was set higher stays.
        let loose = ConvergenceConfig { max_variation: 0.2, ..config };
        let decision = decide(&loose, &boots([50.0, 57.0, 52.0], [8.0, 8.2, 9.5]));
        assert!(decision.converged && decision.allowed_variation == 0.2, "{}", decision.reason);
        // Tokens vary by 20 %, fixed work by 12 %: something else moves.
        let decision = decide(&config, &boots([50.0, 70.0, 52.0], [8.0, 8.2, 9.5]));
        assert!(!decision.converged, "{}", decision.reason);
        // Fixed work stands still, but tokens inside one boot vary by 5 %, and so may boots.
        let mut inside = boots([50.0, 51.5, 52.0], [8.0, 8.0, 8.0]);
        inside[1].token_spread = Some(0.05);
        assert!(decide(&config, &inside).converged);
        // Fixed work that stands still raises nothing.
        let decision = decide(&config, &boots([50.0, 51.5, 52.0], [8.0, 8.0, 8.0]));
        assert!(!decision.converged, "{}", decision.reason);
    }

    #[test]
    fn windows_of_any_size() {
        let boots = vec![boot(1.0, 0, 50.0); 120];
        let config = |window| ConvergenceConfig { window, ..ConvergenceConfig::default() };
        assert!(decide(&config(100), &boots).converged);
        assert!(!decide(&config(121), &boots).converged);
        assert!(!decide(&config(u32::MAX), &boots).converged);
        for window in [0, 1] {
            let decision = decide(&config(window), &boots);
            assert!(!decision.converged && decision.window == 1);
            assert!(decision.reason.ends_with("a window of 1 boot shows none"), "{}", decision.reason);
            let unclocked = ConvergenceConfig { variation_required: false, ..config(window) };
            assert!(decide(&unclocked, &boots).converged);
        }
        let decision = decide(&config(3), &[]);
        assert_eq!((decision.settled_share, decision.unchanged_boots, decision.token_time_variation), (0.0, 0, None));
    }

    #[test]
    fn one_odd_boot_in_a_long_window_does_not_count() {
        let mut values = vec![100.0, 100.4, 99.6, 100.2, 99.8, 100.1, 99.9];
        let calm = spread(&values).unwrap();
        values[3] = 300.0;
        let spiked = spread(&values).unwrap();
        assert!(calm < 0.005 && spiked < 0.006, "{calm} {spiked}");
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[1.0]), None);
        assert_eq!(spread(&[0.0, 0.0]), None);
        assert_eq!(spread(&[5.0; 4]), Some(0.0));
    }
}
