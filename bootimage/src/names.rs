//! Names on the volume: 8.3, upper case, ASCII, so that the guest needs no long-name support.

use crate::ImageError;
use std::path::{Path, PathBuf};

/// Checks a name given by hand.
///
/// # Errors
/// [`ImageError::BadName`].
pub(crate) fn check(name: &str) -> Result<(), ImageError> {
    let ok = |part: &str, most: usize| {
        (1..=most).contains(&part.len())
            && part.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_' || b == b'-')
    };
    match name.split_once('.') {
        Some((stem, extension)) if ok(stem, 8) && ok(extension, 3) => Ok(()),
        _ => Err(ImageError::BadName { name: name.to_owned() }),
    }
}

/// The name a model or tokenizer file gets when none is given: `tok512.bin` becomes `TOK512.BIN`.
pub fn short_name(path: &Path) -> String {
    let clean = |part: Option<&std::ffi::OsStr>, most: usize, default: &str| {
        let part = part.map(|p| p.to_string_lossy().to_ascii_uppercase()).unwrap_or_default();
        let kept: String = part.chars().filter(|c| c.is_ascii_alphanumeric() || "_-".contains(*c)).take(most).collect();
        if kept.is_empty() { default.to_owned() } else { kept }
    };
    format!("{}.{}", clean(path.file_stem(), 8, "FILE"), clean(path.extension(), 3, "BIN"))
}

/// Splits `FILE=NAME.EXT`; a path that exists as it stands, or without a valid name at its end, is all path.
pub fn split_name(argument: &str) -> (PathBuf, Option<String>) {
    if !Path::new(argument).exists()
        && let Some((path, name)) = argument.rsplit_once('=')
        && !name.contains('/')
    {
        return (PathBuf::from(path), Some(name.to_owned()));
    }
    (PathBuf::from(argument), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_8_3_upper_case_names_pass() {
        for good in ["MODEL.GGU", "A.B", "TOK_512-.BIN"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in
            ["", "MODEL", "MODEL.", ".GGU", "model.ggu", "TOOLONGNAME.GGU", "MODEL.GGUF", "A B.BIN", "A.B.C", "D/A.BIN"]
        {
            assert!(matches!(check(bad), Err(ImageError::BadName { name }) if name == bad), "{bad}");
        }
    }

    #[test]
    fn derived_names_are_valid() {
        for (path, name) in [
            ("/x/tok512.bin", "TOK512.BIN"),
            ("smollm2-135m.gguf", "SMOLLM2-.GGU"),
            ("tokenizer", "TOKENIZE.BIN"),
            ("modèle.b", "MODLE.B"),
            ("\u{e9}", "FILE.BIN"),
        ] {
            assert_eq!(short_name(Path::new(path)), name);
            assert!(check(name).is_ok());
        }
    }

    #[test]
    fn a_name_stands_behind_the_last_equals_sign() {
        assert_eq!(split_name("a=b/c.bin=TOK.BIN"), ("a=b/c.bin".into(), Some("TOK.BIN".into())));
        assert_eq!(split_name("plain.bin"), ("plain.bin".into(), None));
        assert_eq!(split_name("a=b/c.bin"), ("a=b/c.bin".into(), None));
    }
}
