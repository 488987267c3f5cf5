//! Translation of store failures into [`Error`]: the only place that maps transport and file errors to an
//! [`ErrorKind`]. `s3/refusal.rs` does so for error answers of a server.
//!
//! A missing bucket or a wrong region is never a missing artifact: only a 404 for the object itself is `NotFound`. A
//! 403 without a specific code is ambiguous, because S3 answers 403 for a missing key without `s3:ListBucket`. The
//! caller decides with [`is_ambiguous`].

use super::s3::Refusal;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Tier};
use crate::transfer::{tls_error, with_lookup_deadline};
use object_store::client::{HttpError, HttpErrorKind};
use std::error::Error as StdError;

/// The target of a request, for messages.
#[derive(Debug, Clone)]
pub(in crate::remote) struct EndpointContext {
    /// The bucket or folder.
    pub(in crate::remote) container: String,
    /// The endpoint or host.
    pub(in crate::remote) endpoint: String,
    /// The region that requests are signed for.
    pub(in crate::remote) region: String,
}

/// Returns the first error of type `T` in the source chain of `error`.
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

/// Returns the server's error answer, if the server answered.
pub(in crate::remote) fn refusal(error: &object_store::Error) -> Option<&Refusal> {
    find(error)
}

/// Returns true if a condition of the request (create-only, `If-Match`) was not met.
pub(in crate::remote) fn condition_failed(error: &object_store::Error) -> bool {
    match refusal(error) {
        Some(refusal) => matches!(refusal.status, 412 | 304),
        None => matches!(error, object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }),
    }
}

/// Returns true if the store answered that it does not support the condition.
pub(in crate::remote) fn condition_unknown(error: &object_store::Error) -> bool {
    let refused = refusal(error)
        .is_some_and(|refusal| refusal.status == 501 || refusal.code.as_deref() == Some("NotImplemented"));
    refused || matches!(error, object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. })
}

/// Returns true if the object may be missing: a 403 with no code that names a fault of the request.
pub(in crate::remote) fn is_ambiguous(error: &object_store::Error) -> bool {
    refusal(error).is_some_and(Refusal::is_ambiguous)
}

/// Returns true if a write failed because writes are not permitted, so that every other write would fail, too: a 403
/// that does not blame access key, signature or clock, or a folder that cannot be written.
pub(in crate::remote) fn refuses_write(error: &object_store::Error) -> bool {
    use std::io::ErrorKind as Io;
    let denied = |io: &std::io::Error| matches!(io.kind(), Io::PermissionDenied | Io::ReadOnlyFilesystem);
    is_ambiguous(error) || find(error).is_some_and(denied)
}

/// Returns true if the credentials have expired, so that a retry with renewed ones may succeed.
pub(in crate::remote) fn is_expired(error: &object_store::Error) -> bool {
    refusal(error).is_some_and(Refusal::is_expired)
}

/// Returns true if the server ignored the `Range` header and sent the whole object. `object_store` reports this only in
/// the text of its error.
pub(in crate::remote) fn ignores_range(error: &object_store::Error) -> bool {
    refusal(error).is_none() && innermost(error).contains("non-partial response")
}

/// Translates `error`. `doing` is the failed operation and begins the message (`"cannot read x/manifest.json"`).
pub(in crate::remote) fn translate(error: object_store::Error, doing: &str, at: &EndpointContext) -> Error {
    let error = match error {
        // An error of the credential chain is complete: it names the providers and the remedy.
        object_store::Error::Generic { store, source } => match source.downcast::<Error>() {
            Ok(ours) => return ours.tier(Tier::Remote),
            Err(source) => object_store::Error::Generic { store, source },
        },
        error => error,
    };
    // An error of `http_client.rs`, for instance an invalid or oversized answer: keep kind and hint, prepend `doing`.
    if let Some(ours) = find::<Error>(&error) {
        return Error::new(ours.kind(), format!("{doing}: {}", ours.message()))
            .hint(ours.hint_text().unwrap_or_default())
            .transient(ours.is_transient())
            .tier(Tier::Remote);
    }
    let translated = if let Some(refusal) = refusal(&error) {
        refusal.explain(doing, at)
    } else if let Some(http) = find::<HttpError>(&error) {
        from_transport(http, doing, at)
    } else {
        from_local(&error, doing, at)
    };
    translated.tier(Tier::Remote)
}

fn from_transport(http: &HttpError, doing: &str, at: &EndpointContext) -> Error {
    let reason = innermost(http);
    let roots = "name your own root certificates with AWS_CA_BUNDLE";
    if let Some(untrusted) = tls_error(&format!("{doing}: {}", at.endpoint), &reason, roots) {
        return untrusted;
    }
    match http.kind() {
        HttpErrorKind::Connect => {
            let failed = Error::unavailable(format!("{doing}: cannot connect to {}: {reason}", at.endpoint));
            with_lookup_deadline(failed, &reason).hint("check the endpoint, the network and any proxy")
        }
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
            // "Requested 0..5, got 3..8" and "Content-Range header not present": `object_store` received another range
            // than requested. Its error has no variant for this.
            let contradicts = ["range", "Content-Range", "Requested "].iter().any(|word| reason.contains(word));
            let kind = if contradicts { ErrorKind::Corrupt } else { ErrorKind::Unavailable };
            Error::new(kind, format!("{doing}: {reason}"))
        }
    }
}

/// Translates an I/O error of a remote that is a folder.
pub(in crate::remote) fn from_io(io: &std::io::Error, doing: &str, at: &EndpointContext) -> Error {
    use std::io::ErrorKind as Io;
    let error = |kind| Error::new(kind, format!("{doing}: {io}")).tier(Tier::Remote);
    match io.kind() {
        // `NotADirectory`: another tool put a file in place of a folder, so that the object cannot exist.
        Io::NotFound | Io::NotADirectory => error(ErrorKind::NotFound),
        Io::PermissionDenied | Io::ReadOnlyFilesystem => {
            error(ErrorKind::Unauthorized).hint(format!("check owner and mode of the folder {}", at.container))
        }
        Io::StorageFull | Io::QuotaExceeded => error(ErrorKind::Full).hint(format!("free space in {}", at.container)),
        Io::FileTooLarge => error(ErrorKind::Full).hint(FILE_SIZE_HINT),
        _ => error(ErrorKind::Unavailable),
    }
}

/// Returns the text of the last error in the source chain, which is the operating system's or the server's reason.
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
    fn only_a_403_without_a_specific_code_is_ambiguous() {
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
    fn a_full_folder_and_a_missing_permission_have_their_own_kinds() {
        let io = |kind| from_io(&std::io::Error::from(kind), "cannot write", &at()).kind();
        assert_eq!(io(std::io::ErrorKind::StorageFull), ErrorKind::Full);
        assert_eq!(io(std::io::ErrorKind::PermissionDenied), ErrorKind::Unauthorized);
        assert_eq!(io(std::io::ErrorKind::NotFound), ErrorKind::NotFound);
    }
}
