//! Error responses of S3, and the table that maps them to error kind, message and remedy.

use crate::error::{Error, ErrorKind};
use crate::option_name::setting::{REMOTE, S3_BUCKET};
use crate::printable;
use crate::remote::backend::EndpointContext;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Most characters of S3's message that are kept.
pub(super) const MESSAGE_CHARS_MAX: usize = 200;

/// An error response of the server. Never contains request headers or signatures.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::remote::backend) struct ErrorResponse {
    /// HTTP status.
    pub(in crate::remote::backend) status: u16,
    /// S3's error code, if the body has one. Responses to HEAD have no body.
    pub(in crate::remote::backend) code: Option<String>,
    /// S3's message, at most [`MESSAGE_CHARS_MAX`] characters.
    pub(in crate::remote::backend) message: Option<String>,
    /// The bucket's region, if the response contains it.
    pub(in crate::remote::backend) region: Option<String>,
    /// The time to wait before a retry, if the response contains it.
    pub(in crate::remote::backend) retry_after: Option<Duration>,
    /// The `Date` header: the time of the server's clock.
    pub(in crate::remote::backend) date: Option<String>,
}

impl fmt::Display for ErrorResponse {
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

impl std::error::Error for ErrorResponse {}

/// What a message is made of: an error response and the request that failed.
struct MessageContext<'a> {
    response: &'a ErrorResponse,
    /// The failed operation. It begins most messages.
    what_failed: &'a str,
    server: &'a EndpointContext,
}

type Text = fn(&MessageContext<'_>) -> String;

/// The meaning of an error response.
struct Meaning {
    kind: ErrorKind,
    /// True if a retry may succeed.
    transient: bool,
    message: Text,
    remedy: Option<Text>,
}

/// The message for most responses: operation, endpoint, and the server's response.
const DEFAULT_MESSAGE: Text =
    |context| format!("{}: {} answered {}", context.what_failed, context.server.endpoint, context.response);

const fn meaning(kind: ErrorKind, transient: bool, message: Text, remedy: Option<Text>) -> Meaning {
    Meaning { kind, transient, message, remedy }
}

/// Hint for responses that no object store sends.
pub(super) const NOT_A_STORE_HINT: &str =
    "a proxy or a login page of the network (captive portal) may have answered: check the endpoint and HTTPS_PROXY";

/// Codes of expired credentials. A retry with renewed credentials may succeed.
const EXPIRED: &[&str] = &["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"];
/// Codes of a missing permission, which S3 also sends for a missing object.
const AMBIGUOUS: &[&str] = &["AccessDenied", "Forbidden", "403", ""];

/// Error codes of S3 (<https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>). They take precedence over
/// the status.
const CODES: &[(&[&str], Meaning)] = &[
    (
        &["NoSuchBucket"],
        meaning(
            ErrorKind::Invalid,
            false,
            |context| {
                format!("the bucket {:?} does not exist at {}", context.server.container, context.server.endpoint)
            },
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
            |context| {
                format!("{:?} is not a valid bucket name at {}", context.server.container, context.server.endpoint)
            },
            Some(|_| {
                format!(
                    "a bucket name has 3 to 63 lower-case letters, digits, dots and hyphens: check {REMOTE} or {S3_BUCKET}"
                )
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
            |context| {
                let date = context.response.date.as_deref().map_or_else(|| "time unknown".into(), printable::quote);
                format!(
                    "{}: the clock of this machine differs too much from the server's ({date})",
                    context.what_failed
                )
            },
            Some(|_| "set the clock (NTP); the signature of a request contains the time".into()),
        ),
    ),
    (
        EXPIRED,
        meaning(
            ErrorKind::Unauthorized,
            false,
            DEFAULT_MESSAGE,
            Some(|_| "the credentials have expired: log in again (`aws sso login`) or renew the session token".into()),
        ),
    ),
    (
        &["InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId"],
        meaning(
            ErrorKind::Unauthorized,
            false,
            DEFAULT_MESSAGE,
            Some(|_| {
                "the server does not know the access key: check AWS_ACCESS_KEY_ID, AWS_PROFILE and the endpoint".into()
            }),
        ),
    ),
    (
        &["SignatureDoesNotMatch"],
        meaning(
            ErrorKind::Unauthorized,
            false,
            DEFAULT_MESSAGE,
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
            DEFAULT_MESSAGE,
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
            |context| {
                format!("{}: the object is archived and cannot be read: {}", context.what_failed, context.response)
            },
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
            DEFAULT_MESSAGE,
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
            DEFAULT_MESSAGE,
            Some(|_| {
                "the KMS key of the bucket is disabled or deleted: enable it, or set another key under [remote.options]"
                    .into()
            }),
        ),
    ),
    // Not codes of S3: `ErrorResponse::derived_code` derives them from the message.
    (
        &[CHECKSUM_REQUIRED],
        meaning(
            ErrorKind::Invalid,
            false,
            DEFAULT_MESSAGE,
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
            DEFAULT_MESSAGE,
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
        meaning(ErrorKind::Unavailable, true, DEFAULT_MESSAGE, None),
    ),
];

/// Code of a redirect to another region. A response without a code and with one of the [`REDIRECT_STATUSES`] means the
/// same.
const REDIRECT: &str = "PermanentRedirect";
/// Derived code of a bucket that refuses writes without a checksum.
const CHECKSUM_REQUIRED: &str = "checksum required";
/// Derived code of an object that is encrypted with a key that the caller has to send.
const CUSTOMER_KEY_REQUIRED: &str = "customer key required";
/// Statuses of redirects.
const REDIRECT_STATUSES: &[u16] = &[301, 307, 308];

/// The meaning by status, for responses without one of the [`CODES`]. The first matching row counts.
const STATUSES: &[(RangeInclusive<u16>, Meaning)] = &[
    (300..=399, NOT_A_STORE),
    (401..=401, MISSING_PERMISSION),
    (403..=403, MISSING_PERMISSION),
    (404..=404, meaning(ErrorKind::NotFound, false, DEFAULT_MESSAGE, None)),
    (409..=409, meaning(ErrorKind::Conflict, true, DEFAULT_MESSAGE, None)),
    (412..=412, meaning(ErrorKind::Conflict, false, DEFAULT_MESSAGE, None)),
    (
        416..=416,
        meaning(
            ErrorKind::Corrupt,
            false,
            DEFAULT_MESSAGE,
            Some(|_| "the object is shorter than recorded; publish the artifact again to repair it".into()),
        ),
    ),
    (501..=501, REFUSED),
    (511..=511, NOT_A_STORE),
    (507..=507, FULL),
    (408..=408, OVERLOADED),
    (425..=425, OVERLOADED),
    (429..=429, OVERLOADED),
    (500..=u16::MAX, OVERLOADED),
    (400..=499, REFUSED),
    (0..=u16::MAX, OTHER),
];

const MISSING_PERMISSION: Meaning = meaning(ErrorKind::Unauthorized, false, DEFAULT_MESSAGE, Some(missing_permission));
/// The store has no room, or its quota is used up. A retry would fail, too.
const FULL: Meaning = meaning(
    ErrorKind::Full,
    false,
    DEFAULT_MESSAGE,
    Some(|context| {
        format!(
            "free space in {:?} (`modelcache evict NAME@VERSION --tier remote`) or raise its quota",
            context.server.container
        )
    }),
);
/// The store understood the request and refuses it.
const REFUSED: Meaning = meaning(
    ErrorKind::Unavailable,
    false,
    DEFAULT_MESSAGE,
    Some(|_| "the store refuses the request itself: check the endpoint and [remote.options] against its manual".into()),
);
/// No object store sends these statuses.
const NOT_A_STORE: Meaning = meaning(ErrorKind::Unavailable, false, DEFAULT_MESSAGE, Some(|_| NOT_A_STORE_HINT.into()));
const OVERLOADED: Meaning = meaning(ErrorKind::Unavailable, true, DEFAULT_MESSAGE, None);
const OTHER: Meaning = meaning(ErrorKind::Unavailable, false, DEFAULT_MESSAGE, None);

/// Returns true if the message of an error response names a missing permission on a KMS key. No error code shows this.
pub(super) fn names_kms_permission(message: &str) -> bool {
    message.contains("kms:")
}

fn missing_permission(context: &MessageContext<'_>) -> String {
    if context.response.message.as_deref().is_some_and(names_kms_permission) {
        return "grant the permission on the key that the server names: kms:Decrypt to read, kms:GenerateDataKey to write"
            .into();
    }
    if context.response.message.as_deref().is_some_and(|message| message.to_ascii_lowercase().contains("requester pay"))
    {
        return "the requester pays for this bucket: set request_payer = true under [remote.options]".into();
    }
    format!(
        "the credentials lack a permission on {:?}, or its policy forbids the request: reading needs s3:GetObject and s3:ListBucket, publishing s3:PutObject, evicting s3:DeleteObject",
        context.server.container
    )
}

fn wrong_region(context: &MessageContext<'_>) -> String {
    let server = context.server;
    match context.response.region.as_deref().map(printable::quote) {
        Some(region) => format!("the bucket {:?} is in the region {region}, not {}", server.container, server.region),
        None => {
            format!(
                "the bucket {:?} is not in the region {}, or not at {}",
                server.container, server.region, server.endpoint
            )
        }
    }
}

fn right_region(context: &MessageContext<'_>) -> String {
    match context.response.region.as_deref().map(printable::quote) {
        Some(region) => format!("set AWS_REGION={region}, or region = {region:?} under [remote.options]"),
        None => "set AWS_REGION (or region under [remote.options]) to the bucket's region".into(),
    }
}

impl ErrorResponse {
    fn code(&self) -> &str {
        self.code.as_deref().unwrap_or_default()
    }

    /// Returns the code for a request without a required checksum or encryption key. S3 has no codes for these errors,
    /// so they are recognized by words of the message.
    fn derived_code(&self) -> Option<&'static str> {
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

    /// Returns true if the object may be missing: the response is a 403 without a code, or with a code that gives no
    /// cause.
    pub(in crate::remote::backend) fn is_ambiguous(&self) -> bool {
        self.status == 403 && AMBIGUOUS.contains(&self.code())
    }

    /// Translates the response by [`CODES`] and [`STATUSES`].
    pub(in crate::remote::backend) fn explain(&self, what_failed: &str, server: &EndpointContext) -> Error {
        let code = match self.code() {
            "" if REDIRECT_STATUSES.contains(&self.status) => REDIRECT,
            code @ ("InvalidRequest" | "MissingContentMD5" | "InvalidArgument") => self.derived_code().unwrap_or(code),
            code => code,
        };
        let by_code = CODES.iter().find(|(codes, _)| codes.contains(&code)).map(|(_, meaning)| meaning);
        let by_status = || STATUSES.iter().find(|(range, _)| range.contains(&self.status)).map(|(_, meaning)| meaning);
        let meaning = by_code.or_else(by_status).unwrap_or(&OTHER);
        let context = MessageContext { response: self, what_failed, server };
        let mut error = Error::new(meaning.kind, (meaning.message)(&context)).transient(meaning.transient);
        if let Some(remedy) = meaning.remedy {
            error = error.hint(remedy(&context));
        }
        // A server that is overloaded may tell how long to wait.
        if meaning.kind != ErrorKind::Unavailable || !meaning.transient {
            return error;
        }
        if matches!(self.status, 429 | 503) {
            error = error.throttled(server.endpoint.clone());
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
    fn remedies_contain_no_double_spaces_from_line_breaks() {
        let (response, what_failed) = (ErrorResponse::default(), "cannot read");
        let server = EndpointContext { container: "b".into(), endpoint: "e".into(), region: "r".into() };
        let context = MessageContext { response: &response, what_failed, server: &server };
        let meanings = CODES.iter().map(|(_, meaning)| meaning).chain(STATUSES.iter().map(|(_, meaning)| meaning));
        for remedy in meanings.filter_map(|meaning| meaning.remedy) {
            assert!(!remedy(&context).contains("  "), "{:?}", remedy(&context));
        }
    }

    #[test]
    fn each_code_has_one_meaning() {
        let codes: Vec<_> = CODES.iter().flat_map(|(codes, _)| codes.iter()).collect();
        assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len());
    }

    #[test]
    fn only_an_overloaded_server_sets_the_wait_before_a_retry() {
        let explained = |status, code: &str| {
            let retry_after = Some(Duration::from_secs(3));
            let refusal =
                ErrorResponse { status, code: Some(code.to_owned()), retry_after, ..ErrorResponse::default() };
            let at = EndpointContext { container: "b".into(), endpoint: "e".into(), region: "r".into() };
            let error = refusal.explain("cannot read", &at);
            (error.is_transient(), error.throttled_by().is_some())
        };
        assert_eq!((explained(503, "SlowDown"), explained(429, "unknown")), ((true, true), (true, true)));
        assert_eq!((explained(500, "InternalError"), explained(501, "unknown")), ((true, false), (false, false)));
        assert_eq!((explained(409, "unknown"), explained(403, "AccessDenied")), ((true, false), (false, false)));
    }
}
