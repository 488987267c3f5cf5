//! The minimal IAM policy for a bucket: exactly the actions that modelcache's requests need.
//!
//! GET and HEAD requests need `GetObject`. Multipart uploads need `PutObject`, `AbortMultipartUpload`, and
//! `ListBucketMultipartUploads` to find orphaned ones. With `ListBucket`, S3 sends 404 for a missing object instead of
//! 403. Tests compare the policy with the requests that a test server received.

use super::profile::Profiles;
use super::settings::{Options, S3Settings};
use crate::config::RemoteConfig;
use crate::error::{Error, Result, Tier};
use crate::option_name::setting::REMOTE;
use crate::remote::backend::RemoteLocation;
use serde_json::{Value, json};

/// How a machine uses the remote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Reads and lists artifacts.
    Reader,
    /// Also publishes, backfills and evicts.
    Writer,
}

/// An IAM policy with notes.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The policy document.
    pub document: Value,
    /// Further requirements that the document does not contain, for display.
    pub notes: Vec<String>,
}

impl Role {
    fn object_actions(self) -> &'static [&'static str] {
        match self {
            Self::Reader => &["s3:GetObject"],
            Self::Writer => &["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"],
        }
    }
}

impl Policy {
    /// Returns the minimal policy of `role` for the bucket and prefix of `config`. Reads the AWS configuration files to
    /// find the region.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the remote is not a bucket.
    pub fn minimal(config: &RemoteConfig, role: Role) -> Result<Self> {
        let RemoteLocation::Bucket { bucket, prefix } = RemoteLocation::parse(&config.url)? else {
            return Err(Error::invalid("the remote is a folder, which has no IAM policy")
                .tier(Tier::Remote)
                .hint(format!("set {}", REMOTE.set_to("s3://BUCKET/PREFIX"))));
        };
        let options = Options::parse(config)?;
        let settings = S3Settings::gather(&options, &config.environment, &Profiles::load(&config.environment))?;
        let arn = format!("arn:{}:s3:::{bucket}", partition(&settings.region));
        let mut list = json!({
            "Sid": "ListModels", "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [arn],
        });
        let object_pattern = match prefix.as_str() {
            "" => "*".to_owned(),
            prefix => {
                list["Condition"] = json!({"StringLike": {"s3:prefix": [format!("{prefix}/*")]}});
                format!("{prefix}/*")
            }
        };
        let objects = json!({
            "Sid": match role { Role::Reader => "ReadModels", Role::Writer => "ReadAndWriteModels" },
            "Effect": "Allow", "Action": role.object_actions(), "Resource": [format!("{arn}/{object_pattern}")],
        });
        // IAM has no condition on the prefix for this action.
        let uploads = json!({
            "Sid": "ListUploads", "Effect": "Allow", "Action": ["s3:ListBucketMultipartUploads"], "Resource": [arn],
        });
        let statements = match role {
            Role::Reader => vec![list, objects],
            Role::Writer => vec![list, objects, uploads],
        };
        Ok(Self { document: json!({"Version": "2012-10-17", "Statement": statements}), notes: notes(config, role) })
    }
}

/// Returns the AWS partition of a region (docs.aws.amazon.com/IAM/latest/UserGuide/reference-arns.html).
fn partition(region: &str) -> &'static str {
    match region {
        region if region.starts_with("cn-") => "aws-cn",
        region if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

/// Returns the notes on KMS. Its permissions belong to the key and not to the bucket.
fn notes(config: &RemoteConfig, role: Role) -> Vec<String> {
    let uses_kms = config.options.values().any(|value| value.starts_with("aws:kms"));
    let permissions = match role {
        Role::Reader => "kms:Decrypt",
        Role::Writer => "kms:Decrypt and kms:GenerateDataKey",
    };
    let kms = match uses_kms {
        true => format!("the remote is encrypted with a KMS key: grant {permissions} on that key, too"),
        false => format!("if the bucket is encrypted with a KMS key, grant {permissions} on that key, too"),
    };
    vec![kms]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;

    fn policy(url: &str, region: &str, role: Role) -> Result<Value> {
        let environment = Environment([("AWS_REGION".to_owned(), region.to_owned())].into());
        let config = RemoteConfig { url: url.into(), options: Default::default(), environment };
        Policy::minimal(&config, role).map(|policy| policy.document)
    }

    #[test]
    fn a_policy_names_bucket_prefix_and_partition() {
        let reader = policy("s3://b/x/y", "eu-west-1", Role::Reader).expect("policy");
        assert_eq!(reader["Statement"][0]["Resource"], json!(["arn:aws:s3:::b"]));
        assert_eq!(reader["Statement"][0]["Condition"]["StringLike"]["s3:prefix"], json!(["x/y/*"]));
        assert_eq!(reader["Statement"][1]["Resource"], json!(["arn:aws:s3:::b/x/y/*"]));
        let writer = policy("s3://b", "cn-north-1", Role::Writer).expect("policy");
        assert_eq!(writer["Statement"][1]["Resource"], json!(["arn:aws-cn:s3:::b/*"]));
        assert!(writer["Statement"][0].get("Condition").is_none());
        assert_eq!(partition("us-gov-west-1"), "aws-us-gov");
        assert!(policy("file:///srv", "eu-west-1", Role::Reader).is_err());
    }
}
