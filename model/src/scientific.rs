//! Floats in messages. The standard library's way to write them brings 15 KB of tables and code, and the native image has no
//! other use for that.

use core::fmt;

/// A float as `-1.25000e-5`: six digits, of which the last may be off by one.
pub(crate) struct Scientific(pub(crate) f64);

impl fmt::Display for Scientific {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0;
        if value.is_nan() {
            return f.write_str("NaN");
        }
        if value.is_sign_negative() {
            f.write_str("-")?;
        }
        let mut left = value.abs();
        if left == 0.0 || left.is_infinite() {
            return f.write_str(if left == 0.0 { "0" } else { "infinity" });
        }
        let mut exponent = 0;
        while left < 1.0 {
            left *= 10.0;
            exponent -= 1;
        }
        while left >= 999_999.5 / 1e5 {
            left /= 10.0;
            exponent += 1;
        }
        let digits = (left * 1e5 + 0.5) as u32;
        write!(f, "{}.{:05}e{exponent}", digits / 100_000, digits % 100_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn floats_of_every_size_are_written() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "-0"),
            (1.0, "1.00000e0"),
            (-1e-5, "-1.00000e-5"),
            (9.999996, "1.00000e1"),
            (9.999994, "9.99999e0"),
            (123_456.5, "1.23457e5"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-infinity"),
        ] {
            assert_eq!(Scientific(value).to_string(), text);
        }
        for value in [f64::MIN_POSITIVE, 4.9e-324, f64::MAX, f64::from(f32::MAX), 1e22, 6.02214076e23] {
            let written: f64 = Scientific(value).to_string().parse().unwrap();
            let bound = if value < 1e-300 { 0.02 } else { 2e-6 };
            assert!((written / value - 1.0).abs() < bound || written == value, "{value:e} as {written:e}");
        }
    }
}
