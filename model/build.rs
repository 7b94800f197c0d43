//! Writes the character classes of `src/tokenizer/unicode.rs` as one sorted table of runs: a tenth of the size of the
//! category table it is made from, which matters in an image of half a megabyte.

use std::fmt::Write as _;
use std::path::PathBuf;
use unicode_general_category::{GeneralCategory as G, get_general_category};

/// Name of a class in `src/tokenizer/unicode.rs`.
fn class(c: char) -> &'static str {
    match get_general_category(c) {
        G::UppercaseLetter | G::LowercaseLetter | G::TitlecaseLetter | G::ModifierLetter | G::OtherLetter => "Letter",
        G::DecimalNumber | G::LetterNumber | G::OtherNumber => "Number",
        G::ConnectorPunctuation
        | G::DashPunctuation
        | G::OpenPunctuation
        | G::ClosePunctuation
        | G::InitialPunctuation
        | G::FinalPunctuation
        | G::OtherPunctuation => "Punctuation",
        _ => "Other",
    }
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let mut runs: Vec<(u32, &str)> = Vec::new();
    for c in '\0'..=char::MAX {
        let class = class(c);
        if runs.last().is_none_or(|&(_, last)| last != class) {
            runs.push((c as u32, class));
        }
    }
    let mut text = format!("static RUNS: [u32; {}] = [\n", runs.len());
    for (start, class) in runs {
        writeln!(text, "    run({start:#x}, Class::{class}),").expect("writing to a string");
    }
    text.push_str("];\n");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("unicode_runs.rs"), text).expect("writing to OUT_DIR");
}
