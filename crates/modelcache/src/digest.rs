//! Digests and their provenance.
//!
//! SHA-256 is the only digest that identifies content in this cache. For small files, the Hub publishes only the SHA-1
//! of the Git object. It verifies the first download, and never names a blob.

use crate::error::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha1::{Digest as _, Sha1};
use std::fmt;
use std::str::FromStr;

/// The SHA-256 of the content of a file: 32 bytes, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// The object id of a Git blob: SHA-1 of `"blob <length>\0"` and the content, written as 40 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GitOid([u8; 20]);

/// Maximum number of characters of an invalid digest that the error message quotes.
const QUOTED_CHARS_MAX: usize = 100;

macro_rules! hex_digest_type {
    ($type:ident, $len:literal, $what:literal) => {
        impl $type {
            /// Creates the digest from raw bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// Returns the raw bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($type))
            }
        }

        impl FromStr for $type {
            type Err = Error;

            /// Accepts hex digits of either case.
            fn from_str(text: &str) -> Result<Self> {
                let mut bytes = [0; $len];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| {
                    // Truncated, because a server may send a long text.
                    let quoted: String = text.chars().take(QUOTED_CHARS_MAX).collect();
                    Error::invalid(format!(concat!("not a ", $what, ": {:?}"), quoted))
                })?;
                Ok(Self(bytes))
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex_digest_type!(Digest, 32, "SHA-256 (64 hex digits)");
hex_digest_type!(GitOid, 20, "git object id (40 hex digits)");

impl Digest {
    /// Computes the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Returns the first 12 hex digits, for messages.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(12);
        text
    }
}

impl GitOid {
    /// Computes the object id of a file with this content.
    pub fn of(content: &[u8]) -> Self {
        Self::finish(Self::hasher(content.len() as u64).chain_update(content))
    }

    /// Returns the hasher of a file of `size` bytes, to be updated with its content. Git hashes the header
    /// `blob <size>\0` before the content.
    pub(crate) fn hasher(size: u64) -> Sha1 {
        Sha1::new_with_prefix(format!("blob {size}\0"))
    }

    /// Returns the object id from a [`hasher`](Self::hasher) that has hashed the content.
    pub(crate) fn finish(hasher: Sha1) -> Self {
        Self(hasher.finalize().into())
    }
}

/// Returns the text that git has in place of a large file on the Hub. See the specification of git-lfs, "The Pointer".
pub fn lfs_pointer(sha256: Digest, size: u64) -> String {
    format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n")
}

/// The provenance of a digest, in descending order of trust: the smallest value is trusted most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provenance {
    /// The caller demanded it (`#sha256=…`).
    Caller,
    /// Computed by `put`, when the artifact was published.
    Put,
    /// Published by the origin.
    Origin,
    /// Read from a checksum file or metadata beside the object.
    Sidecar,
    /// Computed at the first download, because no checksum was available (trust on first use).
    FirstSeen,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Caller => "caller",
            Self::Put => "put",
            Self::Origin => "origin",
            Self::Sidecar => "sidecar",
            Self::FirstSeen => "first-seen",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_parse_either_case_and_print_lower() {
        let digest = Digest::of(b"");
        assert_eq!(digest.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(digest.to_string().to_uppercase().parse::<Digest>().ok(), Some(digest));
        assert!("e3b0".parse::<Digest>().is_err());
        assert!("zz".repeat(32).parse::<Digest>().is_err());
    }

    #[test]
    fn provenance_is_ordered_by_trust() {
        use Provenance::*;
        let mut ranks = [FirstSeen, Sidecar, Origin, Put, Caller];
        ranks.sort();
        assert_eq!(ranks, [Caller, Put, Origin, Sidecar, FirstSeen]);
    }
}
