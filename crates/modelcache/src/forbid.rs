//! The policy that forbids files by name or by the format of their content.

use crate::error::{Error, Result};
use crate::format::Format;
use crate::human::nearest;
use crate::key::FilePath;
use crate::option_name::call::EXCLUDE;
use crate::option_name::setting::FORBID;
use crate::selection::Selection;

/// Files that are neither published nor downloaded nor returned.
#[derive(Debug, Clone, Default)]
pub struct Forbid {
    /// Matches the names. `None` if no name is forbidden.
    names: Option<Selection>,
    formats: Vec<Format>,
}

impl Forbid {
    /// Parses a list. The name of a [`Format`] forbids files of that format, and any other text is a pattern of names,
    /// as in `--include`. `pickle` also forbids PyTorch files, which contain one.
    ///
    /// # Errors
    /// `Invalid` for a pattern that cannot be parsed, and for a word that is neither a format nor looks like a pattern.
    pub fn parse<'a>(list: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let (mut patterns, mut formats) = (Vec::new(), Vec::new());
        for item in list.into_iter().map(str::trim).filter(|item| !item.is_empty()) {
            match Format::named(item) {
                Some(format) => formats.push(format),
                None if item.contains(['*', '?', '[', '.', '/']) => patterns.push(item),
                None => {
                    let names = Format::names();
                    let similar = nearest(item, names.iter().copied()).map(|name| format!("did you mean {name:?}? "));
                    return Err(Error::invalid(format!("{item:?} is neither a format nor a pattern of names"))
                        .hint(format!("{}formats: {}", similar.unwrap_or_default(), names.join(", "))));
                }
            }
        }
        let names = (!patterns.is_empty()).then(|| Selection::globs(&patterns, &[])).transpose()?;
        Ok(Self { names, formats })
    }

    /// Returns true if any format is forbidden, so that the content of each file must be examined.
    pub(crate) fn has_formats(&self) -> bool {
        !self.formats.is_empty()
    }

    /// Fails if a file is forbidden. The format of a file is `None` while it is unknown.
    ///
    /// # Errors
    /// `Corrupt`, with the file and the reason.
    pub(crate) fn check<'a>(&self, files: impl IntoIterator<Item = (&'a FilePath, Option<Format>)>) -> Result<()> {
        for (path, format) in files {
            let reason = match format.filter(|format| self.formats.iter().any(|forbidden| format.contains(*forbidden)))
            {
                Some(format) => format!("it is {format}"),
                None if self.names.as_ref().is_some_and(|names| names.matches(path)) => {
                    "its name matches a forbidden pattern".to_owned()
                }
                None => continue,
            };
            return Err(Error::corrupt(format!("the file {path} is forbidden here: {reason}"))
                .hint(format!("leave it out ({EXCLUDE}), or change {FORBID}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_formats_are_told_apart() {
        let forbid = Forbid::parse(["*.pkl", " pickle", "onnx", ""]).expect("parses");
        let check = |path: &str, format| forbid.check([(&FilePath::new(path).expect("path"), format)]);
        assert!(check("a.bin", None).is_ok() && check("a.bin", Some(Format::Safetensors)).is_ok());
        for (path, format, part) in [
            ("d/a.pkl", None, "its name matches"),
            ("a.bin", Some(Format::Pickle), "a Python pickle"),
            ("a.bin", Some(Format::PyTorch), "a pickle in it"),
            ("a.bin", Some(Format::Onnx), "an ONNX model"),
        ] {
            let error = check(path, format).expect_err(part);
            assert!(error.to_string().contains(part) && error.to_string().contains(path), "{error}");
        }
        assert!(
            Forbid::parse(["pickel"]).is_err_and(|error| error.hint_text().is_some_and(|hint| hint.contains("pickle")))
        );
        assert!(Forbid::default().check([(&FilePath::new("a.pkl").expect("path"), Some(Format::Pickle))]).is_ok());
    }
}
