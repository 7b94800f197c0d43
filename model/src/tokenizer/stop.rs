//! Ends a generation at a text: none of a stop string is ever shown, however its tokens fall.

use alloc::string::String;
use alloc::vec::Vec;

/// Watches text for the first of some strings.
#[derive(Clone, Default, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl StopStrings {
    /// Watches for `stops`; empty strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        StopStrings { stops, held: String::new() }
    }

    /// Takes in `text`; returns what may be shown, and whether a stop string was met (then nothing more comes).
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            let mut shown = core::mem::take(&mut self.held);
            shown.truncate(at);
            return (shown, true);
        }
        // The longest end of the text that a stop string begins with.
        let may_begin = |at: usize| {
            let end = self.held.as_bytes().get(at..).unwrap_or_default();
            self.stops.iter().any(|stop| stop.as_bytes().starts_with(end))
        };
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let keep = (from..self.held.len()).find(|&at| self.held.is_char_boundary(at) && may_begin(at));
        let rest = self.held.split_off(keep.unwrap_or(self.held.len()));
        (core::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back and turned out to be no stop string.
    pub fn finish(&mut self) -> String {
        core::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut watch = StopStrings::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            let (shown, stopped) = watch.push(piece);
            out.push_str(&shown);
            if stopped {
                return (out, true);
            }
        }
        out.push_str(&watch.finish());
        (out, false)
    }

    #[test]
    fn text_ends_before_the_first_stop_string() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), ("a ".into(), true));
        assert_eq!(run(&["END"], &["a E", "N", "X END"]), ("a ENX ".into(), true));
        assert_eq!(run(&["END"], &["a EN"]), ("a EN".into(), false));
        assert_eq!(run(&["\n\n", "b"], &["a\n", "b"]), ("a\n".into(), true));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&["é!"], &["caf", "é", "é!"]), ("café".into(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run(&[""], &["a"]), ("a".into(), false));
    }

    #[test]
    fn nothing_is_held_back_without_need() {
        let mut watch = StopStrings::new(&["###".into()]);
        assert_eq!(watch.push("a#b"), ("a#b".into(), false));
        assert_eq!(watch.push("x##"), ("x".into(), false));
        assert_eq!(watch.push("y"), ("##y".into(), false));
    }
}
