//! The address of the remote.

use crate::error::{Error, Result, Tier};
use std::path::PathBuf;
use url::Url;

/// The parsed address of the remote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::remote) enum RemoteLocation {
    /// A bucket, and the prefix of all keys in it (empty, or without slashes at its ends).
    Bucket {
        /// The name of the bucket.
        bucket: String,
        /// The prefix of every key.
        prefix: String,
    },
    /// A local folder.
    Folder(PathBuf),
}

impl RemoteLocation {
    /// Parses `s3://bucket/prefix` and `file:///folder`.
    pub(in crate::remote) fn parse(address: &str) -> Result<Self> {
        let hint = "write s3://BUCKET/PREFIX or file:///FOLDER";
        // The messages of the first three checks do not contain the address, because it may contain a
        // password or token.
        let url = Url::parse(address)
            .map_err(|cause| invalid("the remote's address is not a URL".into()).cause(cause).hint(hint))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(invalid("the remote's address carries credentials".into())
                .hint("leave them out; keys come from the environment or from `aws configure`"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(invalid("the remote's address has a query or fragment".into()).hint(hint));
        }
        match url.scheme() {
            "s3" => {
                let bucket = url.host_str().unwrap_or_default();
                if bucket.is_empty() || url.port().is_some() {
                    return Err(invalid(format!("the remote's address {address:?} names no bucket")).hint(hint));
                }
                let prefix = percent_encoding::percent_decode_str(url.path()).decode_utf8_lossy();
                let prefix = prefix.trim_matches('/').to_owned();
                object_store::path::Path::parse(&prefix).map_err(|cause| {
                    invalid(format!("the prefix of the remote's address {address:?} is not a valid object key"))
                        .cause(cause)
                })?;
                Ok(Self::Bucket { bucket: bucket.to_owned(), prefix })
            }
            "file" => match url.to_file_path() {
                Ok(folder) if folder.is_absolute() && folder.parent().is_some() => Ok(Self::Folder(folder)),
                _ => Err(invalid(format!("the remote's address {address:?} names no folder")).hint(hint)),
            },
            other => Err(invalid(format!("the remote's address has the unsupported scheme {other:?}")).hint(hint)),
        }
    }
}

fn invalid(message: String) -> Error {
    Error::invalid(message).tier(Tier::Remote)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn addresses_name_a_bucket_or_a_folder() {
        let bucket =
            |bucket: &str, prefix: &str| RemoteLocation::Bucket { bucket: bucket.into(), prefix: prefix.into() };
        assert_eq!(RemoteLocation::parse("s3://b").expect("parses"), bucket("b", ""));
        assert_eq!(RemoteLocation::parse("s3://b/x/y/").expect("parses"), bucket("b", "x/y"));
        assert_eq!(RemoteLocation::parse("s3://my_b.ucket/a b").expect("parses"), bucket("my_b.ucket", "a b"));
        assert_eq!(RemoteLocation::parse("file:///srv/m").expect("parses"), RemoteLocation::Folder("/srv/m".into()));
        for bad in ["", "gs://b", "s3:///x", "/srv/models", "file:///", "s3://b/a//b", "s3://b/x?y"] {
            assert_eq!(RemoteLocation::parse(bad).expect_err(bad).kind(), ErrorKind::Invalid, "{bad}");
        }
        for secret in ["s3://AKIA:canary@bucket/x", "s3://bucket/x?token=canary", "s3://bucket/x#canary"] {
            let error = RemoteLocation::parse(secret).expect_err("a secret");
            assert!(!format!("{error:?} {error}").contains("canary"), "{error}");
        }
    }
}
