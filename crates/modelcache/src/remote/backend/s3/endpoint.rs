//! The endpoint of S3 for a region, and the URL of a bucket, as the AWS tools compute them.
//!
//! The rules are those of the endpoint rule set of S3 that botocore ships; a test compares the results
//! (`tests/endpoints.py`). Two differences are deliberate. For us-east-1, botocore uses `s3.amazonaws.com`, the older
//! name of the same endpoint. At an endpoint that is an IP address, buckets are always addressed by path.

use crate::error::{Error, Result, Tier};

/// The DNS suffix of each partition, by the beginning of its regions.
const PARTITIONS: &[(&str, &str)] = &[
    ("cn-", "amazonaws.com.cn"),
    ("us-iso-", "c2s.ic.gov"),
    ("us-isob-", "sc2s.sgov.gov"),
    ("us-isof-", "csp.hci.ic.gov"),
    ("eu-isoe-", "cloud.adc-e.uk"),
    ("eusc-", "amazonaws.eu"),
];

/// Returns the DNS suffix of the partition of `region`.
pub(super) fn dns_suffix(region: &str) -> &'static str {
    PARTITIONS.iter().find(|(prefix, _)| region.starts_with(prefix)).map_or("amazonaws.com", |(_, suffix)| suffix)
}

/// Where S3 is, and how a bucket is addressed there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// A custom endpoint without a slash at its end; `None` for AWS.
    pub(super) custom: Option<String>,
    /// Address buckets by path (`endpoint/bucket`), not by host name (`bucket.endpoint`). `None` decides by endpoint
    /// and bucket.
    pub(super) path_style: Option<bool>,
    /// Use the endpoints with FIPS 140 validated cryptography.
    pub(super) fips: bool,
    /// Use the endpoints that have IPv6 addresses, too.
    pub(super) dual_stack: bool,
}

impl Endpoint {
    /// Returns the endpoint for `region`, without a bucket.
    pub(super) fn url(&self, region: &str) -> String {
        let (fips, dual_stack) =
            (if self.fips { "-fips" } else { "" }, if self.dual_stack { ".dualstack" } else { "" });
        let aws = || format!("https://s3{fips}{dual_stack}.{region}.{}", dns_suffix(region));
        self.custom.clone().unwrap_or_else(aws)
    }

    /// Returns true if `bucket` is addressed by path.
    pub(super) fn is_path_style(&self, bucket: &str) -> bool {
        // Over HTTPS a bucket name with dots must be in the path: the wildcard certificate covers one label only. An IP
        // address has no subdomains.
        let https = self.custom.as_deref().is_none_or(|url| url.starts_with("https://"));
        let must = !is_host_label(bucket, !https) || self.custom.as_deref().is_some_and(is_ip_address);
        // Most S3-compatible servers do not resolve `bucket.endpoint`, so a custom endpoint defaults to path style.
        must || self.path_style.unwrap_or(self.custom.is_some())
    }

    /// Returns the URL of a bucket, without a slash at its end.
    pub(super) fn bucket_url(&self, bucket: &str, region: &str) -> String {
        let endpoint = self.url(region);
        match self.is_path_style(bucket) {
            true => format!("{endpoint}/{bucket}"),
            false => endpoint.replacen("://", &format!("://{bucket}."), 1),
        }
    }

    /// Fails if AWS has no endpoint with these properties in `region`. A custom endpoint has neither FIPS nor
    /// dual-stack variants, so `fips` and `dual_stack` have no effect on it, as in the AWS tools.
    pub(super) fn check(&self, region: &str) -> Result<()> {
        if self.custom.is_none() && self.fips && region.starts_with("cn-") {
            return Err(Error::invalid(format!("there are no FIPS endpoints in {region}"))
                .tier(Tier::Remote)
                .hint("unset AWS_USE_FIPS_ENDPOINT and use_fips_endpoint"));
        }
        Ok(())
    }
}

/// Returns true if `bucket` can be a label of a host name: 3 to 63 lower-case letters, digits and hyphens. With
/// `subdomains`, it may consist of several labels.
fn is_host_label(bucket: &str, subdomains: bool) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let is_label =
        |label: &str| !label.is_empty() && label.chars().all(plain) && !label.starts_with('-') && !label.ends_with('-');
    let fits = (3..=63).contains(&bucket.len());
    fits && if subdomains { bucket.split('.').all(is_label) } else { is_label(bucket) }
}

fn is_ip_address(url: &str) -> bool {
    let host = url::Url::parse(url).ok();
    matches!(host.as_ref().and_then(url::Url::host), Some(url::Host::Ipv4(_) | url::Host::Ipv6(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::process::Command;

    /// One combination, and the URL that botocore sends a request for a bucket to; `None` if it refuses.
    #[derive(Debug, Deserialize)]
    struct Row {
        region: String,
        style: String,
        fips: bool,
        dual: bool,
        endpoint: Option<String>,
        bucket: String,
        url: Option<String>,
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn endpoints_are_those_of_botocore() {
        let Some(venv) = std::env::var_os("MODELCACHE_TEST_VENV").filter(|venv| !venv.is_empty()) else {
            eprintln!("SKIPPED: MODELCACHE_TEST_VENV names no environment with botocore");
            return;
        };
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/endpoints.py");
        let python = std::path::Path::new(&venv).join("bin/python");
        let listed = Command::new(python).arg(script).output().expect("python");
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        let rows: Vec<Row> = serde_json::from_slice(&listed.stdout).expect("rows");
        assert!(rows.len() > 200, "{} rows", rows.len());
        let has_bucket_before_address = |row: &Row| row.url.as_deref().is_some_and(|url| url.contains(".127.0.0.1"));
        for row in rows.into_iter().filter(|row| !has_bucket_before_address(row)) {
            let path_style = (row.style != "auto").then_some(row.style == "path");
            let endpoint = Endpoint { custom: row.endpoint.clone(), path_style, fips: row.fips, dual_stack: row.dual };
            let url = endpoint.check(&row.region).ok().map(|()| endpoint.bucket_url(&row.bucket, &row.region));
            let expected = row.url.as_ref().map(|url| url.replace("s3.amazonaws.com", "s3.us-east-1.amazonaws.com"));
            assert_eq!(url, expected, "{row:?}");
        }
    }
}
