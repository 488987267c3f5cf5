//! Digests, and where they came from.
//!
//! SHA-256 is the only digest that names bytes in this cache. Git's SHA-1 blob identity appears for small Hub
//! files until their bytes were seen once; it never names a blob.

use crate::error::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// The SHA-256 of a file's bytes: 32 bytes, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Git's blob identity: SHA-1 over `"blob <length>\0"` and the bytes; written as 40 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GitOid([u8; 20]);

/// Characters that are quoted of a text that is no digest.
const QUOTED_CHARS_MAX: usize = 100;

macro_rules! hex_words {
    ($type:ident, $len:literal, $what:literal) => {
        impl $type {
            /// From raw bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The raw bytes.
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
                    // Not all of it: what a server sends here may be long.
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

hex_words!(Digest, 32, "SHA-256 (64 hex digits)");
hex_words!(GitOid, 20, "git object id (40 hex digits)");

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// The first 12 hex digits, for messages.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(12);
        text
    }
}

/// Where a digest came from, ranked: the smaller the more trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provenance {
    /// The caller demanded it (`#sha256=…`).
    Caller,
    /// Computed here when the artifact was put.
    Put,
    /// Stated by the origin.
    Origin,
    /// Read from a checksum file or metadata beside the object.
    Sidecar,
    /// Nobody stated one: computed when the bytes were first seen.
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
    fn provenance_ranks_as_designed() {
        use Provenance::*;
        let mut ranks = [FirstSeen, Sidecar, Origin, Put, Caller];
        ranks.sort();
        assert_eq!(ranks, [Caller, Put, Origin, Sidecar, FirstSeen]);
    }
}
