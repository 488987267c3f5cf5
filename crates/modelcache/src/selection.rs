//! [`Selection`]: the files of an artifact that a call requests.
//!
//! Patterns are those of Python's `fnmatch`, as `huggingface_hub` applies them: `*` matches any characters, also `/`;
//! `?` matches one character; `[…]` is a set of characters; a pattern that ends in `/` matches all files below that
//! folder. A file is selected if it matches no exclude pattern, and at least one include pattern if there are any.

use crate::error::{Error, Result};
use crate::key::FilePath;
use regex::Regex;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A selection of files of an artifact.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// The single file, if the selection was created by [`file`](Self::file).
    file: Option<FilePath>,
    /// The files, if the selection was created by [`files`](Self::files).
    files: Option<Arc<BTreeSet<FilePath>>>,
    include: Vec<Regex>,
    exclude: Vec<Regex>,
    /// The patterns as they were passed.
    patterns: Vec<String>,
}

impl Selection {
    /// Selects all files.
    pub fn all() -> Self {
        Self::default()
    }

    /// Selects exactly one file. A get then returns the path of this file.
    pub fn file(path: FilePath) -> Self {
        Self { patterns: vec![path.to_string()], file: Some(path), ..Self::default() }
    }

    /// Selects exactly these files. Their names are not patterns.
    pub fn files(paths: impl IntoIterator<Item = FilePath>) -> Self {
        Self { files: Some(Arc::new(paths.into_iter().collect())), ..Self::default() }
    }

    /// Selects files by patterns.
    ///
    /// # Errors
    /// `Invalid` for a pattern that cannot be compiled.
    pub fn globs<S: AsRef<str>>(include: &[S], exclude: &[S]) -> Result<Self> {
        let compile =
            |patterns: &[S]| patterns.iter().map(|pattern| fnmatch(pattern.as_ref())).collect::<Result<Vec<_>>>();
        Ok(Self {
            file: None,
            files: None,
            include: compile(include)?,
            exclude: compile(exclude)?,
            patterns: include.iter().chain(exclude).map(|pattern| pattern.as_ref().to_owned()).collect(),
        })
    }

    /// Returns true if `path` is selected.
    pub fn matches(&self, path: &FilePath) -> bool {
        if let Some(file) = &self.file {
            return file == path;
        }
        if let Some(paths) = &self.files {
            return paths.contains(path);
        }
        let any = |patterns: &[Regex]| patterns.iter().any(|pattern| pattern.is_match(path.as_str()));
        (self.include.is_empty() || any(&self.include)) && !any(&self.exclude)
    }

    /// Returns true if `path` matches an exclude pattern. The path of a folder must end in a slash: a pattern for all
    /// files below the folder (`onnx/`, `onnx/*`) matches that path, too. The files themselves are not looked at.
    pub(crate) fn excludes(&self, path: &str) -> bool {
        self.exclude.iter().any(|pattern| pattern.is_match(path))
    }

    /// Returns the selected file, if the selection was created by [`file`](Self::file).
    pub fn one_file(&self) -> Option<&FilePath> {
        self.file.as_ref()
    }

    /// Returns true if all files of any artifact are selected.
    pub fn is_all(&self) -> bool {
        self.file.is_none() && self.files.is_none() && self.include.is_empty() && self.exclude.is_empty()
    }

    /// Returns a text that is equal for two selections only if they select the same files of any artifact.
    pub(crate) fn identity(&self) -> String {
        // NUL bytes separate the fields, because no path contains them.
        let list = |patterns: &[Regex]| patterns.iter().map(Regex::as_str).collect::<Vec<_>>().join("\0");
        let file = self.file.as_ref().map_or_else(String::new, |file| format!("{file}\0"));
        let files =
            self.files.iter().flat_map(|paths| paths.iter()).map(FilePath::as_str).collect::<Vec<_>>().join("\0");
        format!("{file}\0\0{}\0\0{}\0\0{files}", list(&self.include), list(&self.exclude))
    }

    /// Returns the patterns as they were passed, or the path of a single file, for messages.
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }
}

/// A pattern for references, with the wildcards of [`Selection`].
#[derive(Debug, Clone)]
pub struct ReferencePattern(Regex);

impl ReferencePattern {
    /// Compiles `pattern`.
    ///
    /// # Errors
    /// `Invalid` for a pattern that cannot be compiled.
    pub fn new(pattern: &str) -> Result<Self> {
        fnmatch(pattern).map(Self)
    }

    /// Returns true if the pattern matches the reference, its name without the version, or one of them without its
    /// scheme. So `org/model` matches every revision of `hf://org/model`.
    pub fn matches(&self, reference: &str) -> bool {
        let without_scheme = reference.split_once("://").map(|(_, rest)| rest);
        [Some(reference), without_scheme].into_iter().flatten().any(|text| {
            let name = text.rsplit_once('@').map_or(text, |(name, _)| name);
            self.0.is_match(text) || self.0.is_match(name)
        })
    }
}

/// Translates a pattern of Python's `fnmatch` to a regular expression that must match the whole text.
fn fnmatch(pattern: &str) -> Result<Regex> {
    let mut regex = String::from("(?s)^");
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '*' => regex.push_str(".*"),
            '?' => regex.push('.'),
            '[' => match set_end(rest) {
                Some(end) => {
                    push_set(&rest[..end], &mut regex);
                    rest = &rest[end + 1..];
                }
                // A set that is not closed is a literal bracket.
                None => regex.push_str("\\["),
            },
            literal => regex.push_str(&regex::escape(literal.encode_utf8(&mut [0; 4]))),
        }
    }
    if pattern.ends_with('/') {
        regex.push_str(".*");
    }
    regex.push('$');
    Regex::new(&regex).map_err(|cause| Error::invalid(format!("the pattern {pattern:?} cannot be used")).cause(cause))
}

/// Returns the offset in `rest`, the text after `[`, of the bracket that closes the set; `None` if there is none. A `]`
/// in first place, or after `!`, is a member of the set.
fn set_end(rest: &str) -> Option<usize> {
    let first = usize::from(rest.starts_with('!'));
    let skip = first + usize::from(rest[first..].starts_with(']'));
    rest[skip..].find(']').map(|at| at + skip)
}

/// Appends a set of `fnmatch`, without its brackets, to `regex` as a character class.
fn push_set(set: &str, regex: &mut String) {
    let (open, members) = match set.strip_prefix('!') {
        Some(members) => ("[^", members),
        None => ("[", set),
    };
    let escaped = |c: &char| regex::escape(c.encode_utf8(&mut [0; 4]));
    let members: Vec<char> = members.chars().collect();
    let (mut class, mut rest) = (String::new(), &members[..]);
    while let [first, after @ ..] = rest {
        rest = match after {
            ['-', last, after @ ..] => {
                // As in `fnmatch`, a range whose ends are in the wrong order is empty.
                if first <= last {
                    class.push_str(&format!("{}-{}", escaped(first), escaped(last)));
                }
                after
            }
            _ => {
                class.push_str(&escaped(first));
                after
            }
        };
    }
    // The syntax of `regex` has no empty class, but an empty intersection.
    let class = if class.is_empty() { "a&&b" } else { class.as_str() };
    regex.push_str(&format!("{open}{class}]"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selects(include: &[&str], exclude: &[&str], path: &str) -> bool {
        Selection::globs(include, exclude).expect("patterns").matches(&FilePath::new(path).expect("path"))
    }

    #[test]
    fn a_reference_pattern_matches_references_and_names() {
        let matches = |pattern: &str, reference: &str| ReferencePattern::new(pattern).expect("glob").matches(reference);
        for pattern in ["team/m@3", "team/m", "team/*", "*@3", "t?am/[lm]@*"] {
            assert!(matches(pattern, "team/m@3"), "{pattern}");
        }
        for pattern in ["org/model", "hf://org/model", "hf://org/*", "org/model@main"] {
            assert!(matches(pattern, "hf://org/model@main"), "{pattern}");
        }
        for pattern in ["m", "m@3", "team", "team/m@", "team/mm*"] {
            assert!(!matches(pattern, "team/m@3"), "{pattern}");
        }
    }

    #[test]
    fn selected_files_are_not_patterns() {
        let path = |text| FilePath::new(text).expect("path");
        let [one, two] = [Selection::files([path("a*")]), Selection::files([path("a*"), path("b/c")])];
        assert!(two.matches(&path("b/c")) && one.matches(&path("a*")), "a star in a path is no pattern");
        assert!(!one.matches(&path("ab")) && !one.matches(&path("b/c")));
        assert!(!one.is_all() && one.identity() != two.identity() && one.identity() != Selection::all().identity());
        assert_eq!(two.one_file(), None, "a get returns the folder");
    }

    #[test]
    fn patterns_match_as_fnmatch_does() {
        assert!(selects(&["*.json"], &[], "sub/dir/config.json"), "a star crosses slashes");
        assert!(!selects(&["*.json"], &[], "config.jsonl"));
        assert!(selects(&["model-?.bin"], &[], "model-1.bin"));
        assert!(selects(&["model-[0-3].bin"], &[], "model-2.bin"));
        assert!(!selects(&["model-[!0-3].bin"], &[], "model-2.bin"));
        assert!(selects(&["[]]x"], &[], "]x"));
        assert!(selects(&["a[b"], &[], "a[b"), "an unclosed bracket is literal");
        assert!(selects(&["onnx/"], &[], "onnx/model.onnx"));
        assert!(selects(&["{a,b}"], &[], "{a,b}"), "braces are literal");
        assert!(selects(&["a.b"], &[], "a.b") && !selects(&["a.b"], &[], "axb"));
    }

    #[test]
    fn hyphens_in_a_set_are_those_of_fnmatch() {
        let members = |set: &str| -> String {
            let matches = |c: &char| selects(&[&format!("x[{set}]")], &[], &format!("x{c}"));
            "-abcz^&~|.".chars().filter(matches).collect()
        };
        assert_eq!(members("a--b"), "b", "an empty range, not a difference of sets");
        assert_eq!(members("z-a"), "", "an empty range");
        assert_eq!(members("!z-a"), "-abcz^&~|.");
        assert_eq!((members("a-"), members("-a")), ("-a".into(), "-a".into()));
        assert_eq!(members("a-b-z"), "-abz", "the end of a range begins no other range");
        assert_eq!(members("--a"), "-a^.", "from the hyphen to a");
        assert_eq!(members("^&&~~|"), "^&~|");
    }

    #[test]
    fn exclude_beats_include() {
        assert!(!selects(&["*"], &["*.bin"], "a.bin"));
        assert!(selects(&[], &["*.bin"], "a.json"));
    }
}
