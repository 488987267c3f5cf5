//! Schemes: the properties of the references to an origin, known without contacting it.
//!
//! A built-in scheme has a parser and a location type of its own. An application's scheme has the common form of
//! [`Place`].

use super::{Place, Reference};
use crate::error::Result;
use std::fmt;
use std::hash::{Hash, Hasher};

/// The beginning of the names of all artifacts of an application's origin. The word before `://` of its scheme follows,
/// as in `origin+shelf/novels`. No bare name may begin with it, so that a process without that origin cannot publish
/// under such a name.
pub(crate) const OWN_ORIGIN: &str = "origin+";

/// A scheme of references, such as `hf://`.
///
/// An application declares the scheme of its own [`Origin`](crate::origin::Origin) with [`Scheme::new`].
pub struct Scheme {
    /// The beginning of its references, such as `hf://`.
    pub(crate) prefix: &'static str,
    /// Another beginning of its references, if there is one.
    pub(crate) alias: Option<&'static str>,
    /// The first segments of the names of its artifacts, and other words that no bare name may begin with. Empty for an
    /// application's scheme: see [`OWN_ORIGIN`].
    pub(crate) words: &'static [&'static str],
    /// The form of its references, for help texts and hints.
    pub(crate) form: &'static str,
    /// How its references are parsed.
    pub(crate) syntax: Syntax,
    /// True if its references accept another revision, as `--revision` sets it.
    pub(crate) has_revisions: bool,
    /// True if its parser decodes percent escapes in the name and the version.
    pub(crate) decodes_escapes: bool,
    /// True if its parser redacts its own error messages, with more specific hints.
    pub(crate) redacts_errors: bool,
    /// True if a key is printed as a URI, because the URI of an exact version contains all of the key.
    pub(crate) prints_keys_as_uri: bool,
    /// True if the origin keeps old versions: it still serves a version after newer content has replaced it.
    pub(crate) keeps_versions: bool,
}

/// How references of a scheme are parsed.
pub(crate) enum Syntax {
    /// A function parses the references. Its arguments are the prefix and the text after it.
    BuiltIn(fn(&str, &str) -> Result<Reference>),
    /// The references have the common form of [`Place`]. The function returns true for exact versions.
    Place(fn(&str) -> bool),
}

impl Scheme {
    /// Declares the scheme of an application's origin. Its references have the form `<prefix><path>[@revision[/file]]`.
    ///
    /// `prefix` is a lower-case word and `://`. `form` is shown in hints. `is_version` returns true for every version
    /// that the origin resolves references to, and false for every revision that can move, such as a branch.
    pub const fn new(prefix: &'static str, form: &'static str, is_version: fn(&str) -> bool) -> Self {
        Self { has_revisions: true, ..Self::with(prefix, &[], form, Syntax::Place(is_version)) }
    }

    /// Declares a built-in scheme with the properties that most schemes have.
    pub(crate) const fn built_in(
        prefix: &'static str,
        words: &'static [&'static str],
        form: &'static str,
        parse: fn(&str, &str) -> Result<Reference>,
    ) -> Self {
        Self::with(prefix, words, form, Syntax::BuiltIn(parse))
    }

    const fn with(prefix: &'static str, words: &'static [&'static str], form: &'static str, syntax: Syntax) -> Self {
        Self {
            prefix,
            alias: None,
            words,
            form,
            syntax,
            has_revisions: false,
            decodes_escapes: false,
            redacts_errors: false,
            prints_keys_as_uri: false,
            keeps_versions: true,
        }
    }

    /// Returns the form of its references.
    pub fn form(&self) -> &'static str {
        self.form
    }

    /// Splits `text` after the prefix. Returns `None` if `text` is not a reference of this scheme.
    pub(crate) fn split<'a>(&self, text: &'a str) -> Option<(&'static str, &'a str)> {
        let prefixes = [Some(self.prefix), self.alias].into_iter().flatten();
        prefixes.into_iter().find_map(|prefix| Some((prefix, text.strip_prefix(prefix)?)))
    }

    /// Returns true if the prefix is a lower-case word followed by `://`, so that it can begin names and references.
    pub(crate) fn is_well_formed(&self) -> bool {
        let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let word = self.prefix.strip_suffix("://");
        word.is_some_and(|word| !word.is_empty() && word.chars().all(is_allowed))
    }

    /// Parses the text after `prefix`.
    pub(super) fn parse(&'static self, prefix: &str, rest: &str) -> Result<Reference> {
        match self.syntax {
            Syntax::BuiltIn(parse) => parse(prefix, rest),
            Syntax::Place(_) => Place::parse(self, rest),
        }
    }
}

/// Schemes are equal if they have the same prefix.
impl PartialEq for Scheme {
    fn eq(&self, other: &Self) -> bool {
        self.prefix == other.prefix
    }
}

impl Eq for Scheme {}

impl Hash for Scheme {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.prefix.hash(state);
    }
}

impl fmt::Debug for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Scheme").field(&self.prefix).finish()
    }
}
