//! Checksum files: `model.bin.sha256`, `SHA256SUMS`.
//!
//! Three forms are accepted: the digest alone; `sha256sum`'s `<hex>  <name>` (with ` *` for binary, and a backslash in
//! front if the name is escaped); and the BSD form `SHA256 (<name>) = <hex>`. Other lines are ignored, because such
//! files also contain comments, signatures and digests of other algorithms.

use crate::digest::Digest;

/// One line of a checksum file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The name of the file; `None` if the line has only a digest.
    pub name: Option<String>,
    /// The digest of the file.
    pub digest: Digest,
}

/// Returns all lines that contain a SHA-256, in order.
pub fn lines(text: &str) -> impl Iterator<Item = Line> {
    text.trim_start_matches('\u{feff}').lines().filter_map(line)
}

/// Returns the digest of the file `name`, from the line with exactly this name, else from a line with the same last
/// path segment, else from a line without a name.
pub fn digest_of(text: &str, name: &str) -> Option<Digest> {
    let lines: Vec<Line> = lines(text).collect();
    let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let exact = lines.iter().find(|line| line.name.as_deref() == Some(name));
    let same_file = || lines.iter().find(|line| line.name.as_deref().is_some_and(|listed| last(listed) == last(name)));
    let unnamed = || lines.iter().find(|line| line.name.is_none());
    exact.or_else(same_file).or_else(unnamed).map(|line| line.digest)
}

/// Parses one line in any of the accepted forms.
fn line(text: &str) -> Option<Line> {
    let text = text.trim_end_matches(['\r', '\n']);
    bsd(text).or_else(|| coreutils(text))
}

/// Parses the form `SHA256 (<name>) = <hex>`.
fn bsd(text: &str) -> Option<Line> {
    let (name, hex) = text.strip_prefix("SHA256 (")?.rsplit_once(") = ")?;
    Some(Line { name: Some(name.to_owned()), digest: hex.trim().parse().ok()? })
}

/// Parses the form `<hex>  <name>`, or a digest alone.
fn coreutils(text: &str) -> Option<Line> {
    let text = text.trim_start();
    // A leading backslash marks a name with escaped newlines and backslashes.
    let (escaped, text) = text.strip_prefix('\\').map_or((false, text), |rest| (true, rest));
    let digest = text.get(..64)?.parse().ok()?;
    let rest = &text[64..];
    if rest.trim().is_empty() {
        return Some(Line { name: None, digest });
    }
    let name = rest.strip_prefix("  ").or_else(|| rest.strip_prefix(" *")).or_else(|| rest.strip_prefix(' '))?;
    let name = name.strip_prefix("./").unwrap_or(name);
    let name = if escaped { unescape(name) } else { name.to_owned() };
    Some(Line { name: Some(name), digest })
}

/// Replaces the escapes `\n` and `\\` of `sha256sum`, from left to right, so that no replacement is read as part of
/// another escape.
fn unescape(name: &str) -> String {
    let (mut unescaped, mut rest) = (String::with_capacity(name.len()), name);
    while let Some(at) = rest.find('\\') {
        let (character, escape_len) = match rest[at + 1..].chars().next() {
            Some('n') => ('\n', 2),
            Some('\\') => ('\\', 2),
            _ => ('\\', 1),
        };
        unescaped.push_str(&rest[..at]);
        unescaped.push(character);
        rest = &rest[at + escape_len..];
    }
    unescaped + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_parsed_and_other_lines_are_ignored() {
        let digest = Digest::of(b"x");
        let upper = digest.to_string().to_uppercase();
        for text in [
            format!("{digest}"),
            format!("{digest}\n"),
            format!("{upper}  \r\n"),
            format!("{digest}  model.tar.gz\n"),
            format!("{digest} *model.tar.gz\n"),
            format!("{digest}  ./model.tar.gz\n"),
            format!("{digest}  dist/model.tar.gz\n"),
            format!("SHA256 (model.tar.gz) = {digest}\n"),
            format!("# comment\nMD5 (model.tar.gz) = 00\n{}  other\n{digest}  model.tar.gz\n", Digest::of(b"y")),
            format!("\u{feff}{digest}  model.tar.gz"),
        ] {
            assert_eq!(digest_of(&text, "model.tar.gz"), Some(digest), "{text:?}");
        }
        for text in ["", "not found", "deadbeef  model.tar.gz", "é".repeat(40).as_str()] {
            assert_eq!(digest_of(text, "model.tar.gz"), None, "{text:?}");
        }
        assert_eq!(digest_of(&format!("{digest}  other.bin\n"), "model.tar.gz"), None);
    }

    #[test]
    fn escaped_names_are_unescaped_from_left_to_right() {
        let name =
            |escaped: &str| lines(&format!("\\{}  {escaped}", Digest::of(b"x"))).next().and_then(|line| line.name);
        assert_eq!(name(r"a\\nb").as_deref(), Some(r"a\nb"), "an escaped backslash before an n");
        assert_eq!(name(r"a\nb").as_deref(), Some("a\nb"));
        assert_eq!(name(r"a\\\nb\x\").as_deref(), Some("a\\\nb\\x\\"));
    }

    #[test]
    fn a_line_with_the_whole_path_takes_precedence_over_one_with_the_same_last_segment() {
        let text = format!("{}  a/x\n{}  b/x\n", Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(digest_of(&text, "b/x"), Some(Digest::of(b"b")));
    }
}
