//! References to buckets: `s3://bucket/prefix-or-object`, as in `aws s3`.
//!
//! No character of a key is special: keys are not percent-decoded and not split at `@`. A key with a slash at the end
//! is a prefix: it refers to the objects below it, not to an object with this key.

use super::location::Location;
use super::{Pointer, Reference, Scheme, Target};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::redact;
use std::fmt;

/// The scheme of buckets.
pub(crate) static SCHEME: Scheme =
    Scheme { keeps_versions: false, ..Scheme::built_in("s3://", &["s3"], "s3://bucket/prefix-or-object", parse) };

/// One object, or everything below a prefix, in a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BucketPlace {
    /// The bucket.
    pub bucket: String,
    /// The key or prefix, without slashes at its ends; empty for the whole bucket.
    pub key: String,
    /// True if the reference ended with a slash: the key is a prefix, not an object.
    pub folder: bool,
}

/// Returns true if `bucket` has only characters that a bucket name may have. Bucket names become part of the hosts and
/// paths of URLs, so a name from a server must be checked before it is used.
pub(crate) fn is_bucket_name(bucket: &str) -> bool {
    !bucket.is_empty() && bucket.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// Parses the text after `s3://`.
fn parse(_prefix: &str, rest: &str) -> Result<Reference> {
    let text = redact::reference(&format!("s3://{rest}"));
    let refuse = |why: &str| Error::invalid(format!("{text}: {why}")).hint("write s3://bucket/prefix-or-object");
    let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
    if !is_bucket_name(bucket) {
        return Err(not_a_bucket(&text, rest).hint("write s3://bucket/prefix-or-object"));
    }
    let folder = key.is_empty() || key.ends_with('/');
    let key = key.strip_suffix('/').unwrap_or(key);
    if !key.is_empty() && key.split('/').any(str::is_empty) {
        return Err(refuse("the key has an empty segment between slashes"));
    }
    let place = BucketPlace { bucket: bucket.to_owned(), key: key.to_owned(), folder };
    // Fails if the key cannot be part of an artifact name.
    place.name().map_err(|error| refuse(error.message()))?;
    Ok(Reference { target: Target::Bucket(place), file: None, digest: None })
}

/// Returns the error for an address that names no bucket; `rest` is its part after `s3://`. `text` begins the message.
pub(crate) fn not_a_bucket(text: &str, rest: &str) -> Error {
    let error = Error::invalid(format!("{text}: it names no bucket"));
    match rest.starts_with("arn:") {
        true => error.hint("in place of the ARN of an access point, write its alias: s3://ALIAS/PREFIX"),
        false => error,
    }
}

impl BucketPlace {
    /// Returns the artifact name.
    pub fn name(&self) -> Result<ArtifactName> {
        let segments = self.key.split('/').filter(|segment| !segment.is_empty());
        ArtifactName::from_uri("s3", [self.bucket.as_str()].into_iter().chain(segments))
    }

    /// Returns the revision under which the resolution of this location is recorded. A bucket has no revisions, only
    /// current content. An object and a prefix of the same name have separate records.
    fn revision(&self) -> &'static str {
        if self.folder { "current-folder" } else { "current" }
    }
}

impl Location for BucketPlace {
    fn scheme(&self) -> Option<&'static Scheme> {
        Some(&SCHEME)
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        None
    }

    fn pointer(&self) -> Option<Pointer> {
        Some(Pointer { name: self.name().ok()?, revision: self.revision().to_owned() })
    }

    fn can_resolve_to(&self, version: &Version) -> bool {
        version.as_str().parse::<Digest>().is_ok_and(|hash| hash.to_string() == version.as_str())
    }
}

impl fmt::Display for BucketPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}{}", self.bucket, self.key, if self.folder && !self.key.is_empty() { "/" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> (String, String, bool) {
        match Reference::parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).target {
            Target::Bucket(BucketPlace { bucket, key, folder }) => (bucket, key, folder),
            other => panic!("{text} is {other:?}"),
        }
    }

    #[test]
    fn a_bucket_name_cannot_change_the_host_of_a_url() {
        for name in ["b", "my.b_1", "models-3"] {
            assert!(is_bucket_name(name), "{name}");
        }
        for text in ["", "evil.example#", "h:1", "h:1?", "u@h", "a%2f..", "a/b", "a\\b", "b\u{1b}", "é"] {
            assert!(!is_bucket_name(text), "{text}");
        }
    }

    #[test]
    fn keys_are_not_decoded_and_a_slash_at_the_end_marks_a_prefix() {
        let row = |bucket: &str, key: &str, folder| (bucket.to_owned(), key.to_owned(), folder);
        assert_eq!(place("s3://b"), row("b", "", true));
        assert_eq!(place("s3://b/"), row("b", "", true));
        assert_eq!(place("s3://b/models/m"), row("b", "models/m", false));
        assert_eq!(place("s3://b/models/m/"), row("b", "models/m", true));
        assert_eq!(place("s3://my.b_1/m@3/é%2F+ ?x"), row("my.b_1", "m@3/é%2F+ ?x", false));
        for bad in
            ["s3://", "s3:///x", "s3://b:80/x", "s3://k@b/x", "s3://b//x", "s3://b/a//b", "s3://b/../x", "s3://b/x//"]
        {
            assert!(Reference::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn an_object_and_a_prefix_share_a_name_but_not_a_revision() {
        let name = |text| {
            let Target::Bucket(place) = Reference::parse(text).expect("parses").target else { panic!("{text}") };
            place.name().expect("name").to_string()
        };
        assert_eq!(name("s3://b/m@3/a%2Fb"), "s3/b/m%403/a%252Fb");
        let pointer = |text| Reference::parse(text).expect("parses").pointer().expect("movable");
        assert_eq!(pointer("s3://b/m").name, pointer("s3://b/m/").name);
        assert_ne!(pointer("s3://b/m").revision, pointer("s3://b/m/").revision);
        assert!(Reference::parse("s3://b/m").expect("parses").exact_key().is_none());
        assert!(Reference::parse("s3://b/m").expect("parses").at_revision("x").is_err());
    }
}
