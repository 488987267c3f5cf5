//! Texts for people, in messages and front ends: sizes, shortened lists, and suggestions for misspelt names.

use std::fmt::Display;

/// Formats bytes in decimal units with at most three significant digits: `0 B`, `1.2 GB`, `350 MB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // A value that would round to 1000 is shown as 1.0 of the next unit.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 99.95);
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// Joins the first `shown` names for a message. A `…` stands for the others.
pub(crate) fn first_few<T: Display>(names: impl IntoIterator<Item = T>, shown: usize) -> String {
    let mut names = names.into_iter();
    let mut few: Vec<String> = names.by_ref().take(shown).map(|name| name.to_string()).collect();
    few.extend(names.next().map(|_| "…".to_owned()));
    few.join(", ")
}

/// Returns the name in `known` that is closest to `name`. Returns `None` if the edit distance of the two exceeds a
/// third of the length of `name`; this limit is at least 1 and at most 3. Ignores case, and treats `-` and `_` as
/// equal.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.to_ascii_lowercase().replace('-', "_");
    let (name, distance_max) = (plain(name), (name.chars().count() / 3).clamp(1, 3));
    let near = known.into_iter().map(|known| (strsim::levenshtein(&name, &plain(known)), known)).min();
    near.filter(|(distance, _)| *distance <= distance_max).map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_similar_name_is_suggested() {
        let known = ["dir", "max_bytes", "origin"];
        assert_eq!(nearest("MAX-BYTE", known), Some("max_bytes"));
        assert_eq!(nearest("colour", known), None);
    }

    #[test]
    fn a_long_list_is_shortened() {
        assert_eq!(first_few(["a", "b"], 2), "a, b");
        assert_eq!(first_few(["a", "b", "c"], 2), "a, b, …");
    }

    #[test]
    fn sizes_are_shown_in_decimal_units() {
        let shown = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (1_234_567_890, "1.2 GB"),
            (13_700_000_000, "13.7 GB"),
            (350_400_000, "350 MB"),
            (999_499_999, "999 MB"),
            (999_999_999, "1.0 GB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (number, text) in shown {
            assert_eq!(bytes(number), text);
        }
    }
}
