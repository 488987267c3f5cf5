//! What a failure of the store means: the one place where statuses, codes and transport errors get their kind.
//!
//! A failing bucket or a wrong region is never taken for a missing artifact: only a 404 about the object itself is
//! `NotFound`. A 403 without a telling code is ambiguous (without `s3:ListBucket` a missing key looks like that), and
//! [`is_ambiguous`] lets the caller decide.

use super::http_client::Refusal;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Tier};
use crate::printable;
use object_store::client::{HttpError, HttpErrorKind};
use std::error::Error as StdError;

/// What messages name: where the request went.
#[derive(Debug, Clone)]
pub(super) struct EndpointContext {
    /// The bucket or folder.
    pub(super) container: String,
    /// The endpoint or host.
    pub(super) endpoint: String,
    /// The region signed for.
    pub(super) region: String,
}

/// The first failure of type `T` in the chain below `error`.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// The server's answer, if there was one.
pub(super) fn refusal(error: &object_store::Error) -> Option<&Refusal> {
    find(error)
}

/// Whether a condition on the request (create-only, If-Match) was not met.
pub(super) fn condition_failed(error: &object_store::Error) -> bool {
    match refusal(error) {
        Some(refusal) => matches!(refusal.status, 412 | 304),
        None => matches!(error, object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }),
    }
}

/// Whether the store says that it knows no such condition.
pub(super) fn condition_unknown(error: &object_store::Error) -> bool {
    let refused = refusal(error)
        .is_some_and(|refusal| refusal.status == 501 || refusal.code.as_deref() == Some("NotImplemented"));
    refused || matches!(error, object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. })
}

/// Whether this may as well be a missing object: a 403 that does not say what is wrong with the request.
pub(super) fn is_ambiguous(error: &object_store::Error) -> bool {
    refusal(error).is_some_and(|refusal| refusal.status == 403 && !refusal.code.as_deref().is_some_and(is_telling))
}

/// Whether a write failed because it is not permitted, and every other one would: a 403 that blames neither key,
/// signature nor clock.
pub(super) fn refuses_write(error: &object_store::Error) -> bool {
    use std::io::ErrorKind as Io;
    let denied = |io: &std::io::Error| matches!(io.kind(), Io::PermissionDenied | Io::ReadOnlyFilesystem);
    is_ambiguous(error) || find(error).is_some_and(denied)
}

/// Whether the credentials used are past their end; fresh ones may do.
pub(super) fn is_expired(error: &object_store::Error) -> bool {
    let code = refusal(error).and_then(|refusal| refusal.code.as_deref());
    matches!(code, Some("ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired"))
}

/// Whether the server sent the whole object where a range was asked for.
pub(super) fn ignores_range(error: &object_store::Error) -> bool {
    refusal(error).is_none() && innermost(error).contains("non-partial response")
}

/// Codes that say what is wrong, whatever object was asked for.
fn is_telling(code: &str) -> bool {
    !matches!(code, "AccessDenied" | "Forbidden" | "403" | "")
}

/// The library's error for `error`, met while `doing` (`"cannot read x/manifest.json"`).
pub(super) fn translate(error: object_store::Error, doing: &str, at: &EndpointContext) -> Error {
    let error = match error {
        // The credential chain speaks for itself.
        object_store::Error::Generic { store, source } => match source.downcast::<Error>() {
            Ok(ours) => return ours.tier(Tier::Remote),
            Err(source) => object_store::Error::Generic { store, source },
        },
        error => error,
    };
    // What our own HTTP layer found wrong with an answer.
    if let Some(ours) = find::<Error>(&error) {
        return Error::new(ours.kind(), format!("{doing}: {}", ours.message()))
            .hint(ours.hint_text().unwrap_or_default())
            .transient(ours.is_transient())
            .tier(Tier::Remote);
    }
    let translated = if let Some(refusal) = refusal(&error) {
        from_refusal(refusal, doing, at)
    } else if let Some(http) = find::<HttpError>(&error) {
        from_transport(http, doing, at)
    } else {
        from_local(&error, doing, at)
    };
    translated.tier(Tier::Remote)
}

fn from_refusal(refusal: &Refusal, doing: &str, at: &EndpointContext) -> Error {
    let what = || format!("{doing}: {} answered {refusal}", at.endpoint);
    let error = |kind| Error::new(kind, what());
    let code = refusal.code.as_deref().unwrap_or_default();
    match (code, refusal.status) {
        ("NoSuchBucket", _) => Error::invalid(format!("the bucket {:?} does not exist at {}", at.container, at.endpoint))
            .hint("check the remote's address (s3://BUCKET/PREFIX), its endpoint and its region; modelcache creates no buckets"),
        ("InvalidBucketName", _) => Error::invalid(format!("{:?} can be no bucket's name: {} says so", at.container, at.endpoint))
            .hint("names have 3 to 63 lower-case letters, digits, dots and hyphens: check MODEL_CACHE_REMOTE or MODEL_CACHE_S3_BUCKET"),
        ("PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" | "IncorrectEndpoint", _) | ("", 301 | 307 | 308) => {
            wrong_region(refusal, at)
        }
        ("RequestTimeTooSkewed" | "RequestInTheFuture", _) => Error::new(
            ErrorKind::Unauthorized,
            format!("{doing}: the clock of this machine differs too much from the server's ({})", refusal.date.as_deref().map_or_else(|| "time unknown".into(), printable::quote)),
        )
        .hint("set the clock (NTP); requests are signed with the time"),
        ("ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired", _) => {
            error(ErrorKind::Unauthorized).hint("the credentials have expired: log in again (`aws sso login`) or renew the session token")
        }
        ("InvalidAccessKeyId" | "InvalidToken" | "InvalidClientTokenId", _) => {
            error(ErrorKind::Unauthorized).hint("the access key is not known there: check AWS_ACCESS_KEY_ID, AWS_PROFILE and the endpoint")
        }
        ("SignatureDoesNotMatch", _) => error(ErrorKind::Unauthorized).hint("check AWS_SECRET_ACCESS_KEY, and that no proxy rewrites requests"),
        ("SlowDown" | "InternalError" | "ServiceUnavailable" | "RequestTimeout" | "OperationAborted" | "ConditionalRequestConflict" | "TooManyRequests", _) => {
            waiting(Error::unavailable(what()), refusal)
        }
        (_, 401 | 403) => error(ErrorKind::Unauthorized).hint(format!(
            "the credentials lack a right on {:?}: reading needs s3:GetObject and s3:ListBucket, publishing s3:PutObject, evicting s3:DeleteObject",
            at.container
        )),
        (_, 404) => error(ErrorKind::NotFound),
        (_, 409 | 412) => error(ErrorKind::Conflict).transient(refusal.status == 409),
        (_, 416) => error(ErrorKind::Corrupt).hint("the object is shorter than recorded; publish the artifact again to repair it"),
        (_, 501) => error(ErrorKind::Unavailable).transient(false),
        (_, 408 | 425 | 429 | 500..) => waiting(Error::unavailable(what()), refusal),
        _ => error(ErrorKind::Unavailable).transient(false),
    }
}

fn waiting(error: Error, refusal: &Refusal) -> Error {
    let error = if matches!(refusal.status, 429 | 503) { error.throttled() } else { error };
    match refusal.retry_after {
        Some(wait) => error.retry_after(wait),
        None => error,
    }
}

fn wrong_region(refusal: &Refusal, at: &EndpointContext) -> Error {
    match &refusal.region {
        Some(region) => {
            let region = printable::quote(region);
            Error::invalid(format!("the bucket {:?} is in the region {region}, not {}", at.container, at.region))
                .hint(format!("set AWS_REGION={region}, or region = {region:?} under [remote.options]"))
        }
        None => Error::invalid(format!(
            "the bucket {:?} is not in the region {}, or not at {}",
            at.container, at.region, at.endpoint
        ))
        .hint("set AWS_REGION (or region under [remote.options]) to the bucket's region"),
    }
}

fn from_transport(http: &HttpError, doing: &str, at: &EndpointContext) -> Error {
    let reason = innermost(http);
    if reason.contains("certificate") {
        return Error::new(
            ErrorKind::Unavailable,
            format!("{doing}: {} cannot prove who it is: {reason}", at.endpoint),
        )
        .hint("name your own root certificates with AWS_CA_BUNDLE");
    }
    match http.kind() {
        HttpErrorKind::Connect => Error::unavailable(format!("{doing}: cannot connect to {}: {reason}", at.endpoint))
            .hint("check the endpoint, the network and any proxy"),
        _ => Error::unavailable(format!("{doing}: the connection to {} broke: {reason}", at.endpoint)),
    }
}

fn from_local(error: &object_store::Error, doing: &str, at: &EndpointContext) -> Error {
    match error {
        object_store::Error::NotFound { .. } => return Error::not_found(format!("{doing}: not there")),
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            return Error::new(ErrorKind::Conflict, format!("{doing}: it changed meanwhile"));
        }
        _ => {}
    }
    match find::<std::io::Error>(error) {
        Some(io) => from_io(io, doing, at),
        None => {
            let reason = innermost(error);
            // "Requested 0..5, got 3..8" and "Content-Range header not present": an answer of another range, or of none.
            let contradicts = ["range", "Content-Range", "Requested "].iter().any(|word| reason.contains(word));
            let kind = if contradicts { ErrorKind::Corrupt } else { ErrorKind::Unavailable };
            Error::new(kind, format!("{doing}: {reason}"))
        }
    }
}

/// What a failure in a folder means.
pub(super) fn from_io(io: &std::io::Error, doing: &str, at: &EndpointContext) -> Error {
    use std::io::ErrorKind as Io;
    let error = |kind| Error::new(kind, format!("{doing}: {io}")).tier(Tier::Remote);
    match io.kind() {
        // Another tool may have put a file where a folder of ours would be.
        Io::NotFound | Io::NotADirectory => error(ErrorKind::NotFound),
        Io::PermissionDenied | Io::ReadOnlyFilesystem => {
            error(ErrorKind::Unauthorized).hint(format!("check owner and mode of the folder {}", at.container))
        }
        Io::StorageFull | Io::QuotaExceeded => error(ErrorKind::Full).hint(format!("free space in {}", at.container)),
        Io::FileTooLarge => error(ErrorKind::Full).hint(FILE_SIZE_HINT),
        _ => error(ErrorKind::Unavailable),
    }
}

/// The text of the last failure in the chain: the system's reason rather than the layers around it.
fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at() -> EndpointContext {
        EndpointContext { container: "bucket".into(), endpoint: "http://s3.test".into(), region: "us-east-1".into() }
    }

    fn refused(status: u16, code: &str) -> object_store::Error {
        let refusal = Refusal {
            status,
            code: (!code.is_empty()).then(|| code.to_owned()),
            region: Some("eu-west-1".into()),
            ..Refusal::default()
        };
        object_store::Error::Generic { store: "S3", source: Box::new(HttpError::new(HttpErrorKind::Unknown, refusal)) }
    }

    #[test]
    fn every_refusal_has_its_kind() {
        use ErrorKind::*;
        let rows = [
            (404, "NoSuchKey", NotFound, false),
            (404, "", NotFound, false),
            (404, "NoSuchBucket", Invalid, false),
            (301, "PermanentRedirect", Invalid, false),
            (301, "", Invalid, false),
            (400, "AuthorizationHeaderMalformed", Invalid, false),
            (403, "AccessDenied", Unauthorized, false),
            (403, "InvalidAccessKeyId", Unauthorized, false),
            (403, "SignatureDoesNotMatch", Unauthorized, false),
            (400, "ExpiredToken", Unauthorized, false),
            (403, "RequestTimeTooSkewed", Unauthorized, false),
            (401, "", Unauthorized, false),
            (503, "SlowDown", Unavailable, true),
            (500, "InternalError", Unavailable, true),
            (429, "", Unavailable, true),
            (409, "ConditionalRequestConflict", Unavailable, true),
            (501, "NotImplemented", Unavailable, false),
            (412, "PreconditionFailed", Conflict, false),
            (416, "InvalidRange", Corrupt, false),
            (400, "InvalidRequest", Unavailable, false),
        ];
        for (status, code, kind, transient) in rows {
            let error = translate(refused(status, code), "cannot read", &at());
            assert_eq!((error.kind(), error.is_transient()), (kind, transient), "{status} {code}");
            assert_eq!(error.failed_tier(), Some(Tier::Remote));
        }
    }

    #[test]
    fn messages_name_what_to_set() {
        let text = |status, code| {
            let error = translate(refused(status, code), "cannot read", &at());
            format!("{error} {}", error.hint_text().unwrap_or_default())
        };
        assert!(text(404, "NoSuchBucket").contains("\"bucket\""));
        assert!(text(301, "PermanentRedirect").contains("AWS_REGION=eu-west-1"));
        assert!(text(403, "RequestTimeTooSkewed").contains("clock"));
    }

    #[test]
    fn only_a_403_that_tells_nothing_is_ambiguous() {
        assert!(is_ambiguous(&refused(403, "AccessDenied")) && is_ambiguous(&refused(403, "")));
        assert!(!is_ambiguous(&refused(403, "InvalidAccessKeyId")) && !is_ambiguous(&refused(404, "")));
        assert!(is_expired(&refused(400, "ExpiredToken")));
    }

    #[test]
    fn a_failing_credential_chain_is_not_wrapped() {
        let ours = Error::new(ErrorKind::Unauthorized, "no AWS credentials found").hint("run `aws configure`");
        let error =
            translate(object_store::Error::Generic { store: "S3", source: Box::new(ours) }, "cannot read", &at());
        assert_eq!(error.message(), "no AWS credentials found");
    }

    #[test]
    fn a_full_or_closed_folder_is_told_apart() {
        let io = |kind| from_io(&std::io::Error::from(kind), "cannot write", &at()).kind();
        assert_eq!(io(std::io::ErrorKind::StorageFull), ErrorKind::Full);
        assert_eq!(io(std::io::ErrorKind::PermissionDenied), ErrorKind::Unauthorized);
        assert_eq!(io(std::io::ErrorKind::NotFound), ErrorKind::NotFound);
    }
}
