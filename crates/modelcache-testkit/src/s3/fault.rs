//! Faults of the S3 server.
//!
//! [`Fault::on`] is compared with the decoded `/bucket/key?query`, so a fault can be aimed at `partNumber=2` or
//! `list-type` as well as at a key. [`S3Fault::ignore_conditions`] and [`S3Fault::no_list_permission`] are compared
//! with `/bucket/key` only; in a listing, the prefix takes the place of the key. Errors are returned before the request
//! takes effect; only [`S3Fault::lose_reply`] comes after.

use std::time::Duration;

use crate::faults::Fault;

/// The kinds of fault. Use the constructors on [`S3Fault`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// Status, S3 error code and message of an XML error.
    Error(u16, String, String),
    /// 301 that names this region as the bucket's.
    WrongRegion(String),
    /// The connection is closed without an answer; the request has no effect.
    HangUp,
    /// The answer is delayed by this time.
    Delay(Duration),
    /// The request takes effect, then the connection is closed without an answer.
    LoseReply,
    /// `If-Match` and `If-None-Match` have no effect.
    IgnoreConditions,
    /// A missing key answers 403 instead of 404; listings are refused.
    NoListPermission,
    /// The object is served with another ETag than it is listed with: with this one, or with a new one in each answer.
    OtherEtag(Option<String>),
}

/// A fault of the S3 stand-in. Without `.times(n)` it stays armed; without `.on(part)` it applies to every request.
pub type S3Fault = Fault<Kind>;

impl Fault<Kind> {
    /// Any error: status, code, message.
    pub fn error(status: u16, code: &str, message: &str) -> Self {
        Self::new(Kind::Error(status, code.to_owned(), message.to_owned()))
    }

    /// 403 `AccessDenied`.
    pub fn access_denied() -> Self {
        Self::error(403, "AccessDenied", "Access Denied")
    }

    /// 403 `InvalidAccessKeyId`.
    pub fn invalid_access_key() -> Self {
        Self::error(403, "InvalidAccessKeyId", "The access key id you provided does not exist in our records.")
    }

    /// `ExpiredToken` with status 400, as S3 documents it. Some compatible stores answer 403: use [`S3Fault::error`].
    pub fn expired_token() -> Self {
        Self::error(400, "ExpiredToken", "The provided token has expired.")
    }

    /// 403 `RequestTimeTooSkewed`.
    pub fn clock_skew() -> Self {
        let message = "The difference between the request time and the current time is too large.";
        Self::error(403, "RequestTimeTooSkewed", message)
    }

    /// 503 `SlowDown`.
    pub fn slow_down() -> Self {
        Self::error(503, "SlowDown", "Please reduce your request rate.")
    }

    /// 500 `InternalError`.
    pub fn internal_error() -> Self {
        Self::error(500, "InternalError", "We encountered an internal error. Please try again.")
    }

    /// 301 `PermanentRedirect` to another region.
    pub fn wrong_region(region: &str) -> Self {
        Self::new(Kind::WrongRegion(region.to_owned()))
    }

    /// The connection is closed without an answer; the request has no effect.
    pub fn hang_up() -> Self {
        Self::new(Kind::HangUp)
    }

    /// The answer is delayed by `time`.
    pub fn delay(time: Duration) -> Self {
        Self::new(Kind::Delay(time))
    }

    /// The request takes effect, but the client gets no answer.
    pub fn lose_reply() -> Self {
        Self::new(Kind::LoseReply)
    }

    /// Conditional requests always succeed: the store answers 200 and overwrites.
    pub fn ignore_conditions() -> Self {
        Self::new(Kind::IgnoreConditions)
    }

    /// The object is served with the ETag `etag`, and listed with its real one. `If-Match` is compared with `etag`, and
    /// then by the store with the real one. Add [`S3Fault::ignore_conditions`] as well, so that the store accepts it.
    pub fn other_etag(etag: &str) -> Self {
        Self::new(Kind::OtherEtag(Some(etag.to_owned())))
    }

    /// Each answer has a new ETag, and no `If-Match` matches.
    pub fn new_etags() -> Self {
        Self::new(Kind::OtherEtag(None))
    }

    /// Simulates a caller without `s3:ListBucket`: 403 for listings and for keys that do not exist.
    pub fn no_list_permission() -> Self {
        Self::new(Kind::NoListPermission)
    }
}
