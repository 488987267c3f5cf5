//! Makes untrusted text safe for terminals, logs and exceptions. Only this module decides which characters are escaped.
//!
//! Text from servers, files, other users of a shared directory and the command line may contain escape sequences, line
//! ends and invisible characters. [`line()`] turns any text into a single printable line. [`Error`](crate::Error)
//! applies it to every message, and each front end applies it to its output. Secrets are redacted, too (see
//! [`crate::redact`]).

use crate::redact;
use std::borrow::Cow;
use std::fmt::Write;
use std::panic::PanicHookInfo;

/// Maximum length of a line, in characters. The longest path on Linux, 4,096 bytes, fits.
const LINE_CHARS_MAX: usize = 6000;

/// Maximum length of a quotation from a server's response, in characters.
const QUOTE_CHARS_MAX: usize = 200;

/// Returns `text` as a single line: secrets are redacted, line ends become spaces, and invisible or control characters
/// are escaped like `\u{1b}`. A long line is truncated.
pub fn line(text: &str) -> Cow<'_, str> {
    truncated(escaped(redact::text(text)), LINE_CHARS_MAX)
}

/// Returns the text of a server's response as a printable line, trimmed and truncated to 200 characters.
pub fn quote(text: &str) -> String {
    // This first cut bounds the work for a long response. It is generous, because escaping and redaction change the
    // length.
    let end = text.char_indices().nth(LINE_CHARS_MAX).map_or(text.len(), |(at, _)| at);
    let line = escaped(redact::text(&text[..end]));
    truncated(Cow::Borrowed(line.trim()), QUOTE_CHARS_MAX).into_owned()
}

/// Escapes all hidden characters in JSON text, as `\uXXXX`. The JSON value does not change.
pub fn json(json: &str) -> Cow<'_, str> {
    replaced(Cow::Borrowed(json), |c, shown| {
        let mut units = [0; 2];
        for unit in c.encode_utf16(&mut units) {
            let _ = write!(shown, "\\u{unit:04x}");
        }
    })
}

/// Formats a panic as one line with its location.
pub fn panic(info: &PanicHookInfo<'_>) -> String {
    let place = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    let text = info.payload_as_str().unwrap_or("a panic");
    line(&format!("a defect in modelcache: panicked at {place}: {text}")).into_owned()
}

/// Replaces line ends with spaces and escapes all other hidden characters.
fn escaped(text: Cow<'_, str>) -> Cow<'_, str> {
    replaced(text, |c, shown| match c {
        '\n' | '\r' | '\t' | '\u{85}' | '\u{2028}' | '\u{2029}' => shown.push(' '),
        // Writing to a `String` cannot fail.
        c => drop(write!(shown, "{}", c.escape_unicode())),
    })
}

/// Calls `replace` for each hidden character of `text`, with the text to append the replacement to.
fn replaced(text: Cow<'_, str>, replace: impl Fn(char, &mut String)) -> Cow<'_, str> {
    if !text.chars().any(is_hidden) {
        return text;
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_hidden(c) { replace(c, &mut shown) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

/// Cuts `text` after `chars_max` characters, and marks the cut with `…`.
fn truncated(text: Cow<'_, str>, chars_max: usize) -> Cow<'_, str> {
    match text.char_indices().nth(chars_max) {
        Some((at, _)) => Cow::Owned(format!("{}…", &text[..at])),
        None => text,
    }
}

/// Returns true if a character controls the terminal, is invisible, or changes how its neighbours are shown: control,
/// format, line separator and paragraph separator characters of Unicode (Cc, Cf, Zl, Zp), invisible fillers and
/// selectors, and the private use areas.
fn is_hidden(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    matches!(c,
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
        | '\u{890}'..='\u{891}' | '\u{8e2}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}'
        | '\u{e000}'..='\u{f8ff}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
        | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1345f}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{10ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn invisible_characters_are_escaped() {
        for (text, shown) in [
            ("a\x1b]0;owned\x07\x1b[2Jb", "a\\u{1b}]0;owned\\u{7}\\u{1b}[2Jb"),
            ("one\ntwo\r\n\tthree", "one two   three"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\u{85}b\u{2028}c\u{2029}d", "a b c d"),
            ("\u{202e}exe.nib", "\\u{202e}exe.nib"),
            ("\u{2066}a\u{2069}\u{200e}\u{200f}\u{61c}", "\\u{2066}a\\u{2069}\\u{200e}\\u{200f}\\u{61c}"),
            ("a\u{200b}\u{200d}\u{feff}\u{ad}\u{2060}b", "a\\u{200b}\\u{200d}\\u{feff}\\u{ad}\\u{2060}b"),
            ("\u{e0041}", "\\u{e0041}"),
            ("fé/日本語 ünï e\u{301} 🦀", "fé/日本語 ünï e\u{301} 🦀"),
            (&String::from_utf8_lossy(b"\xff\x1b"), "\u{fffd}\\u{1b}"),
        ] {
            assert_eq!(line(text), shown);
        }
    }

    #[test]
    fn quotations_are_truncated_and_trimmed() {
        assert_eq!(quote(" \n words\n "), "words");
        assert_eq!(quote(&"é".repeat(1000)).chars().count(), QUOTE_CHARS_MAX + 1);
        assert_eq!(line(&"é".repeat(60_000)).chars().count(), LINE_CHARS_MAX + 1);
        assert!(matches!(line("plain"), Cow::Borrowed(_)));
    }

    #[test]
    fn secrets_are_redacted_before_the_text_is_truncated() {
        redact::register("printable-canary");
        let text = format!("{} printable-canary", "x".repeat(QUOTE_CHARS_MAX - 8));
        assert!(!quote(&text).contains("print"), "{}", quote(&text));
        assert_eq!(line("http://u:canary@h\x1b said no"), "http://…@h\\u{1b} said no");
    }

    #[test]
    fn escaped_json_has_the_same_value() {
        let value = serde_json::json!({"k\u{202e}": "\x1b\u{9b}\u{2028}\u{e0041}é"});
        let shown = json(&value.to_string()).into_owned();
        assert!(!shown.chars().any(is_hidden), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("json"), value);
    }

    proptest! {
        #[test]
        fn every_text_becomes_one_printable_line(text in "\\PC{0,40}|[\u{0}-\u{10ffff}]{0,40}") {
            prop_assert!(!line(&text).chars().any(is_hidden));
            prop_assert!(quote(&text).chars().count() <= QUOTE_CHARS_MAX + 1);
        }
    }
}
