//! Error answers of S3, and the table of their meaning.

use crate::error::{Error, ErrorKind};
use crate::printable;
use crate::remote::backend::EndpointContext;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

/// An error answer of the server. Never contains request headers or signatures.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::remote::backend) struct Refusal {
    /// HTTP status.
    pub(in crate::remote::backend) status: u16,
    /// S3's error code, if the body has one (answers to HEAD have no body).
    pub(in crate::remote::backend) code: Option<String>,
    /// S3's message, at most 200 characters.
    pub(in crate::remote::backend) message: Option<String>,
    /// The bucket's region, if the server states it.
    pub(in crate::remote::backend) region: Option<String>,
    /// The time to wait before a retry, if the server states it.
    pub(in crate::remote::backend) retry_after: Option<Duration>,
    /// The `Date` header, the server's clock.
    pub(in crate::remote::backend) date: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}", self.status)?;
        if let Some(code) = &self.code {
            write!(f, " {}", printable::quote(code))?;
        }
        if let Some(message) = &self.message {
            write!(f, ": {}", printable::quote(message))?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

/// An error answer, and the request that it answers.
struct Answer<'a> {
    refusal: &'a Refusal,
    /// The failed operation; it begins a message.
    doing: &'a str,
    at: &'a EndpointContext,
}

type Text = fn(&Answer<'_>) -> String;

/// What an error answer means.
struct Meaning {
    kind: ErrorKind,
    /// True if a retry may succeed.
    transient: bool,
    message: Text,
    remedy: Option<Text>,
}

/// The message of most answers: operation, endpoint, and the server's answer.
const ANSWERED: Text = |answer| format!("{}: {} answered {}", answer.doing, answer.at.endpoint, answer.refusal);

const fn meaning(kind: ErrorKind, transient: bool, message: Text, remedy: Option<Text>) -> Meaning {
    Meaning { kind, transient, message, remedy }
}

/// Codes of expired credentials. Renewed ones may succeed.
const EXPIRED: &[&str] = &["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"];
/// Codes of a missing right, which S3 also sends for a missing object.
const AMBIGUOUS: &[&str] = &["AccessDenied", "Forbidden", "403", ""];

/// Error codes of S3 (<https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>). They take precedence over
/// the status.
const CODES: &[(&[&str], Meaning)] = &[
    (
        &["NoSuchBucket"],
        meaning(
            ErrorKind::Invalid,
            false,
            |answer| format!("the bucket {:?} does not exist at {}", answer.at.container, answer.at.endpoint),
            Some(|_| {
                "check the remote's address (s3://BUCKET/PREFIX), its endpoint and its region; modelcache creates no buckets"
                    .into()
            }),
        ),
    ),
    (
        &["InvalidBucketName"],
        meaning(
            ErrorKind::Invalid,
            false,
            |answer| format!("{:?} is not a valid bucket name at {}", answer.at.container, answer.at.endpoint),
            Some(|_| {
                "names have 3 to 63 lower-case letters, digits, dots and hyphens: check MODEL_CACHE_REMOTE or MODEL_CACHE_S3_BUCKET"
                    .into()
            }),
        ),
    ),
    // Redirects are not followed, because the signature covers host and region.
    (
        &[REDIRECT, "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "IncorrectEndpoint"],
        meaning(ErrorKind::Invalid, false, wrong_region, Some(right_region)),
    ),
    (
        &["RequestTimeTooSkewed", "RequestInTheFuture"],
        meaning(
            ErrorKind::Unauthorized,
            false,
            |answer| {
                let date = answer.refusal.date.as_deref().map_or_else(|| "time unknown".into(), printable::quote);
                format!("{}: the clock of this machine differs too much from the server's ({date})", answer.doing)
            },
            Some(|_| "set the clock (NTP); requests are signed with the time".into()),
        ),
    ),
    (
        EXPIRED,
        meaning(
            ErrorKind::Unauthorized,
            false,
            ANSWERED,
            Some(|_| "the credentials have expired: log in again (`aws sso login`) or renew the session token".into()),
        ),
    ),
    (
        &["InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId"],
        meaning(
            ErrorKind::Unauthorized,
            false,
            ANSWERED,
            Some(|_| "the access key is not known there: check AWS_ACCESS_KEY_ID, AWS_PROFILE and the endpoint".into()),
        ),
    ),
    (
        &["SignatureDoesNotMatch"],
        meaning(
            ErrorKind::Unauthorized,
            false,
            ANSWERED,
            Some(|_| "check AWS_SECRET_ACCESS_KEY, and that no proxy rewrites requests".into()),
        ),
    ),
    // Codes of MinIO, Ceph, and stores with a quota per bucket or user.
    (
        &[
            "QuotaExceeded",
            "XMinioAdminBucketQuotaExceeded",
            "XMinioStorageFull",
            "InsufficientStorage",
            "InsufficientCapacity",
            "StorageFull",
            "NoSpaceLeft",
        ],
        FULL,
    ),
    // Aliyun OSS, Tencent COS and Volcengine TOS accept the bucket in the host name only.
    (
        &["SecondLevelDomainForbidden", "PathStyleDomainForbidden", "InvalidPathAccess"],
        meaning(
            ErrorKind::Invalid,
            false,
            ANSWERED,
            Some(|_| {
                "this store wants the bucket in the host name: set path_style = false under [remote.options]".into()
            }),
        ),
    ),
    (
        &["InvalidObjectState"],
        meaning(
            ErrorKind::Unavailable,
            false,
            |answer| format!("{}: the object is archived and cannot be read: {}", answer.doing, answer.refusal),
            Some(|_| {
                "restore it (`aws s3api restore-object`), or exclude the prefix from the bucket's archive rules".into()
            }),
        ),
    ),
    (
        &["NotSignedUp", "AccountProblem", "AllAccessDisabled", "InvalidPayer", "AccountSuspended", "UserSuspended"],
        meaning(
            ErrorKind::Unauthorized,
            false,
            ANSWERED,
            Some(|_| "the account of the bucket is suspended or not paid for: ask the owner of the account".into()),
        ),
    ),
    (
        &[
            "KMS.DisabledException",
            "KMS.InvalidStateException",
            "KMS.KMSInvalidStateException",
            "KMS.NotFoundException",
        ],
        meaning(
            ErrorKind::Unauthorized,
            false,
            ANSWERED,
            Some(|_| {
                "the KMS key of the bucket is disabled or deleted: enable it, or set another key under [remote.options]"
                    .into()
            }),
        ),
    ),
    // Not codes of S3: `Refusal::demand` derives them from the message.
    (
        &[CHECKSUM_REQUIRED],
        meaning(
            ErrorKind::Invalid,
            false,
            ANSWERED,
            Some(|_| {
                "the bucket wants a checksum with each write (Object Lock): set checksum_algorithm = \"SHA256\" under [remote.options]"
                    .into()
            }),
        ),
    ),
    (
        &[CUSTOMER_KEY_REQUIRED],
        meaning(
            ErrorKind::Unauthorized,
            false,
            ANSWERED,
            Some(|_| {
                "the object is encrypted with a key of its owner: set sse_customer_key_base64 under [remote.options]"
                    .into()
            }),
        ),
    ),
    (
        &[
            "InvalidRequest",
            "InvalidArgument",
            "MethodNotAllowed",
            "MalformedXML",
            "EntityTooLarge",
            "KeyTooLongError",
            "UnexpectedContent",
        ],
        REFUSED,
    ),
    // Transient, whatever status comes with the code. 409 ConditionalRequestConflict asks for a retry.
    (
        &[
            "SlowDown",
            "InternalError",
            "ServiceUnavailable",
            "RequestTimeout",
            "OperationAborted",
            "ConditionalRequestConflict",
            "TooManyRequests",
        ],
        meaning(ErrorKind::Unavailable, true, ANSWERED, None),
    ),
];

/// Code of a redirect to another region. An answer without a code and with one of [`REDIRECTS`] means the same.
const REDIRECT: &str = "PermanentRedirect";
/// Derived code of a bucket that refuses writes without a checksum.
const CHECKSUM_REQUIRED: &str = "checksum required";
/// Derived code of an object that is encrypted with a key that the caller has to send.
const CUSTOMER_KEY_REQUIRED: &str = "customer key required";
/// Statuses of redirects.
const REDIRECTS: &[u16] = &[301, 307, 308];

/// Statuses, for answers without one of the [`CODES`].
const STATUSES: &[(RangeInclusive<u16>, Meaning)] = &[
    (401..=401, MISSING_RIGHT),
    (403..=403, MISSING_RIGHT),
    (404..=404, meaning(ErrorKind::NotFound, false, ANSWERED, None)),
    (409..=409, meaning(ErrorKind::Conflict, true, ANSWERED, None)),
    (412..=412, meaning(ErrorKind::Conflict, false, ANSWERED, None)),
    (
        416..=416,
        meaning(
            ErrorKind::Corrupt,
            false,
            ANSWERED,
            Some(|_| "the object is shorter than recorded; publish the artifact again to repair it".into()),
        ),
    ),
    (501..=501, REFUSED),
    (507..=507, FULL),
    (408..=408, OVERLOADED),
    (425..=425, OVERLOADED),
    (429..=429, OVERLOADED),
    (500..=u16::MAX, OVERLOADED),
    (400..=499, REFUSED),
    (0..=u16::MAX, OTHER),
];

const MISSING_RIGHT: Meaning = meaning(ErrorKind::Unauthorized, false, ANSWERED, Some(missing_right));
/// The store has no room, or its quota is used up. A retry would fail, too.
const FULL: Meaning = meaning(
    ErrorKind::Full,
    false,
    ANSWERED,
    Some(|answer| {
        format!(
            "free space in {:?} (`modelcache evict NAME@VERSION --tier remote`) or raise its quota",
            answer.at.container
        )
    }),
);
/// The store understood the request and refuses it.
const REFUSED: Meaning = meaning(
    ErrorKind::Unavailable,
    false,
    ANSWERED,
    Some(|_| "the store refuses the request itself: check the endpoint and [remote.options] against its manual".into()),
);
const OVERLOADED: Meaning = meaning(ErrorKind::Unavailable, true, ANSWERED, None);
const OTHER: Meaning = meaning(ErrorKind::Unavailable, false, ANSWERED, None);

/// Returns true if the server blames a permission on an encryption key. It names it in its message only.
pub(super) fn names_key_permission(message: &str) -> bool {
    message.contains("kms:")
}

fn missing_right(answer: &Answer<'_>) -> String {
    if answer.refusal.message.as_deref().is_some_and(names_key_permission) {
        return "grant the permission on the key that the answer names: kms:Decrypt to read, kms:GenerateDataKey to write"
            .into();
    }
    format!(
        "the server's answer may say more; reading {:?} needs s3:GetObject and s3:ListBucket, publishing s3:PutObject, evicting s3:DeleteObject",
        answer.at.container
    )
}

fn wrong_region(answer: &Answer<'_>) -> String {
    let at = answer.at;
    match answer.refusal.region.as_deref().map(printable::quote) {
        Some(region) => format!("the bucket {:?} is in the region {region}, not {}", at.container, at.region),
        None => {
            format!("the bucket {:?} is not in the region {}, or not at {}", at.container, at.region, at.endpoint)
        }
    }
}

fn right_region(answer: &Answer<'_>) -> String {
    match answer.refusal.region.as_deref().map(printable::quote) {
        Some(region) => format!("set AWS_REGION={region}, or region = {region:?} under [remote.options]"),
        None => "set AWS_REGION (or region under [remote.options]) to the bucket's region".into(),
    }
}

impl Refusal {
    fn code(&self) -> &str {
        self.code.as_deref().unwrap_or_default()
    }

    /// Returns the derived code if the message states what a write or read lacks. S3 has no code of its own for it.
    fn demand(&self) -> Option<&'static str> {
        let message = self.message.as_deref()?.to_ascii_lowercase();
        let is = |words: &[&str]| words.iter().any(|word| message.contains(word));
        if is(&["checksum", "content-md5"]) {
            return Some(CHECKSUM_REQUIRED);
        }
        is(&["server side encryption", "customer-key", "customer-provided"]).then_some(CUSTOMER_KEY_REQUIRED)
    }

    /// Returns true if the credentials have expired.
    pub(in crate::remote::backend) fn is_expired(&self) -> bool {
        EXPIRED.contains(&self.code())
    }

    /// Returns true if the object may be missing: a 403 with no code that names a fault of the request.
    pub(in crate::remote::backend) fn is_ambiguous(&self) -> bool {
        self.status == 403 && AMBIGUOUS.contains(&self.code())
    }

    /// Translates the answer by [`CODES`] and [`STATUSES`].
    pub(in crate::remote::backend) fn explain(&self, doing: &str, at: &EndpointContext) -> Error {
        let code = match self.code() {
            "" if REDIRECTS.contains(&self.status) => REDIRECT,
            code @ ("InvalidRequest" | "MissingContentMD5" | "InvalidArgument") => self.demand().unwrap_or(code),
            code => code,
        };
        let by_code = CODES.iter().find(|(codes, _)| codes.contains(&code)).map(|(_, meaning)| meaning);
        let by_status = || STATUSES.iter().find(|(range, _)| range.contains(&self.status)).map(|(_, meaning)| meaning);
        let meaning = by_code.or_else(by_status).unwrap_or(&OTHER);
        let answer = Answer { refusal: self, doing, at };
        let mut error = Error::new(meaning.kind, (meaning.message)(&answer)).transient(meaning.transient);
        if let Some(remedy) = meaning.remedy {
            error = error.hint(remedy(&answer));
        }
        // A busy server may state how long to wait.
        if meaning.kind != ErrorKind::Unavailable || !meaning.transient {
            return error;
        }
        if matches!(self.status, 429 | 503) {
            error = error.throttled(at.endpoint.clone());
        }
        match self.retry_after {
            Some(wait) => error.retry_after(wait),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn remedies_have_no_gaps_from_broken_lines() {
        let (refusal, doing) = (Refusal::default(), "cannot read");
        let at = EndpointContext { container: "b".into(), endpoint: "e".into(), region: "r".into() };
        let answer = Answer { refusal: &refusal, doing, at: &at };
        let meanings = CODES.iter().map(|(_, meaning)| meaning).chain(STATUSES.iter().map(|(_, meaning)| meaning));
        for remedy in meanings.filter_map(|meaning| meaning.remedy) {
            assert!(!remedy(&answer).contains("  "), "{:?}", remedy(&answer));
        }
    }

    #[test]
    fn each_code_has_one_meaning() {
        let codes: Vec<_> = CODES.iter().flat_map(|(codes, _)| codes.iter()).collect();
        assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len());
    }

    #[test]
    fn only_a_busy_server_says_when_to_retry() {
        let explained = |status, code: &str| {
            let retry_after = Some(Duration::from_secs(3));
            let refusal = Refusal { status, code: Some(code.to_owned()), retry_after, ..Refusal::default() };
            let at = EndpointContext { container: "b".into(), endpoint: "e".into(), region: "r".into() };
            let error = refusal.explain("cannot read", &at);
            (error.is_transient(), error.throttled_by().is_some())
        };
        assert_eq!((explained(503, "SlowDown"), explained(429, "unknown")), ((true, true), (true, true)));
        assert_eq!((explained(500, "InternalError"), explained(501, "unknown")), ((true, false), (false, false)));
        assert_eq!((explained(409, "unknown"), explained(403, "AccessDenied")), ((true, false), (false, false)));
    }
}
