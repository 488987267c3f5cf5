//! Translation of store failures into [`Error`]: the only place that maps transport and file errors to an
//! [`ErrorKind`]. `s3/error_response.rs` does so for error responses of a server.
//!
//! A missing bucket or a wrong region is never a missing artifact: only a 404 for the object itself is `NotFound`. A
//! 403 without a code, or with a code that gives no cause such as `AccessDenied`, is ambiguous: without
//! `s3:ListBucket`, S3 sends 403 for a missing key, too. [`is_ambiguous`] returns true for such a response.

use super::s3::ErrorResponse;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Tier};
use crate::transfer::{tls_error, with_lookup_deadline};
use object_store::client::{HttpError, HttpErrorKind};
use std::error::Error as StdError;

/// Bucket, endpoint and region of a request, for messages.
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

/// Returns the server's error response, or `None` if the error has another cause.
pub(in crate::remote) fn error_response(error: &object_store::Error) -> Option<&ErrorResponse> {
    find(error)
}

/// Returns true if a condition of the request (create-only, `If-Match`) was not met.
pub(in crate::remote) fn condition_failed(error: &object_store::Error) -> bool {
    match error_response(error) {
        Some(response) => matches!(response.status, 412 | 304),
        None => matches!(error, object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }),
    }
}

/// Returns true if the store reported that it does not support the condition.
pub(in crate::remote) fn condition_unsupported(error: &object_store::Error) -> bool {
    let is_unsupported = error_response(error)
        .is_some_and(|response| response.status == 501 || response.code.as_deref() == Some("NotImplemented"));
    is_unsupported
        || matches!(error, object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. })
}

/// Returns true if the object may be missing: the response is a 403 without a code, or with a code that
/// gives no cause.
pub(in crate::remote) fn is_ambiguous(error: &object_store::Error) -> bool {
    error_response(error).is_some_and(ErrorResponse::is_ambiguous)
}

/// Returns true if a write failed because writes are not permitted, so that every other write would fail, too: the
/// response is a 403 without a code, or with a code that gives no cause, or the folder is not writable.
pub(in crate::remote) fn refuses_write(error: &object_store::Error) -> bool {
    use std::io::ErrorKind as Io;
    let denied = |io: &std::io::Error| matches!(io.kind(), Io::PermissionDenied | Io::ReadOnlyFilesystem);
    is_ambiguous(error) || find(error).is_some_and(denied)
}

/// Returns true if the credentials have expired, so that a retry with renewed ones may succeed.
pub(in crate::remote) fn is_expired(error: &object_store::Error) -> bool {
    error_response(error).is_some_and(ErrorResponse::is_expired)
}

/// Returns true if the server ignored the `Range` header and sent the whole object. `object_store` reports this only in
/// the text of its error.
pub(in crate::remote) fn ignores_range(error: &object_store::Error) -> bool {
    error_response(error).is_none() && innermost(error).contains("non-partial response")
}

/// Translates `error`. `what_failed` begins the message (`"cannot read x/manifest.json"`).
pub(in crate::remote) fn translate(error: object_store::Error, what_failed: &str, context: &EndpointContext) -> Error {
    let error = match error {
        // An error of the credential provider chain is complete: it names the providers and the remedy.
        object_store::Error::Generic { store, source } => match source.downcast::<Error>() {
            Ok(ours) => return ours.tier(Tier::Remote),
            Err(source) => object_store::Error::Generic { store, source },
        },
        error => error,
    };
    // An error of `http_client.rs`, for instance for an invalid or too large response. Keep kind and hint, and prepend
    // `what_failed`.
    if let Some(ours) = find::<Error>(&error) {
        return Error::new(ours.kind(), format!("{what_failed}: {}", ours.message()))
            .hint(ours.hint_text().unwrap_or_default())
            .transient(ours.is_transient())
            .tier(Tier::Remote);
    }
    let translated = if let Some(error_response) = error_response(&error) {
        error_response.explain(what_failed, context)
    } else if let Some(http) = find::<HttpError>(&error) {
        from_transport(http, what_failed, context)
    } else {
        from_local(&error, what_failed, context)
    };
    translated.tier(Tier::Remote)
}

/// Translates a failure to connect, or of an open connection.
fn from_transport(http: &HttpError, what_failed: &str, context: &EndpointContext) -> Error {
    let reason = innermost(http);
    let roots = "name your own root certificates with AWS_CA_BUNDLE";
    if let Some(untrusted) = tls_error(&format!("{what_failed}: {}", context.endpoint), &reason, roots) {
        return untrusted;
    }
    match http.kind() {
        HttpErrorKind::Connect => {
            let failed = Error::unavailable(format!("{what_failed}: cannot connect to {}: {reason}", context.endpoint));
            with_lookup_deadline(failed, &reason).hint("check the endpoint, the network and any proxy")
        }
        _ => Error::unavailable(format!("{what_failed}: the connection to {} broke: {reason}", context.endpoint)),
    }
}

/// Translates an error without an HTTP response: of a folder, or of `object_store` itself.
fn from_local(error: &object_store::Error, what_failed: &str, context: &EndpointContext) -> Error {
    match error {
        object_store::Error::NotFound { .. } => return Error::not_found(format!("{what_failed}: it does not exist")),
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            return Error::new(ErrorKind::Conflict, format!("{what_failed}: another process changed it"));
        }
        _ => {}
    }
    match find::<std::io::Error>(error) {
        Some(io) => from_io(io, what_failed, context),
        None => {
            let reason = innermost(error);
            // `object_store` has no error variant for a response with another range than requested. Its texts are, for
            // instance, "Requested 0..5, got 3..8" and "Content-Range header not present".
            let is_wrong_range = ["range", "Content-Range", "Requested "].iter().any(|word| reason.contains(word));
            let kind = if is_wrong_range { ErrorKind::Corrupt } else { ErrorKind::Unavailable };
            Error::new(kind, format!("{what_failed}: {reason}"))
        }
    }
}

/// Translates an I/O error of a remote that is a folder.
pub(in crate::remote) fn from_io(io: &std::io::Error, what_failed: &str, context: &EndpointContext) -> Error {
    use std::io::ErrorKind as Io;
    let error = |kind| Error::new(kind, format!("{what_failed}: {io}")).tier(Tier::Remote);
    match io.kind() {
        // `NotADirectory`: another tool put a file in place of a folder, so that the object cannot exist.
        Io::NotFound | Io::NotADirectory => error(ErrorKind::NotFound),
        Io::PermissionDenied | Io::ReadOnlyFilesystem => {
            error(ErrorKind::Unauthorized).hint(format!("check owner and mode of the folder {}", context.container))
        }
        Io::StorageFull | Io::QuotaExceeded => {
            error(ErrorKind::Full).hint(format!("free space in {}", context.container))
        }
        Io::Unsupported => error(ErrorKind::Invalid).hint(format!(
            "the filesystem of {} lacks this: mount it in another way, or use a bucket",
            context.container
        )),
        Io::FileTooLarge => error(ErrorKind::Full).hint(FILE_SIZE_HINT),
        _ => error(ErrorKind::Unavailable),
    }
}

/// Returns the text of the last error in the source chain, which is the reason of the operating system or the server.
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

    fn context() -> EndpointContext {
        EndpointContext { container: "bucket".into(), endpoint: "http://s3.test".into(), region: "us-east-1".into() }
    }

    fn response_error(status: u16, code: &str) -> object_store::Error {
        let error_response = ErrorResponse {
            status,
            code: (!code.is_empty()).then(|| code.to_owned()),
            region: Some("eu-west-1".into()),
            ..ErrorResponse::default()
        };
        object_store::Error::Generic {
            store: "S3",
            source: Box::new(HttpError::new(HttpErrorKind::Unknown, error_response)),
        }
    }

    #[test]
    fn every_error_response_has_its_kind() {
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
            let error = translate(response_error(status, code), "cannot read", &context());
            assert_eq!((error.kind(), error.is_transient()), (kind, transient), "{status} {code}");
            assert_eq!(error.failed_tier(), Some(Tier::Remote));
        }
    }

    #[test]
    fn messages_name_what_to_set() {
        let text = |status, code| {
            let error = translate(response_error(status, code), "cannot read", &context());
            format!("{error} {}", error.hint_text().unwrap_or_default())
        };
        assert!(text(404, "NoSuchBucket").contains("\"bucket\""));
        assert!(text(301, "PermanentRedirect").contains("AWS_REGION=eu-west-1"));
        assert!(text(403, "RequestTimeTooSkewed").contains("clock"));
    }

    #[test]
    fn only_a_403_without_a_specific_code_is_ambiguous() {
        assert!(is_ambiguous(&response_error(403, "AccessDenied")) && is_ambiguous(&response_error(403, "")));
        assert!(!is_ambiguous(&response_error(403, "InvalidAccessKeyId")) && !is_ambiguous(&response_error(404, "")));
        assert!(is_expired(&response_error(400, "ExpiredToken")));
    }

    #[test]
    fn an_error_of_the_credential_chain_keeps_its_message() {
        let ours = Error::new(ErrorKind::Unauthorized, "no AWS credentials found").hint("run `aws configure`");
        let error =
            translate(object_store::Error::Generic { store: "S3", source: Box::new(ours) }, "cannot read", &context());
        assert_eq!(error.message(), "no AWS credentials found");
    }

    #[test]
    fn a_full_folder_and_a_missing_permission_have_their_own_kinds() {
        let io = |kind| from_io(&std::io::Error::from(kind), "cannot write", &context()).kind();
        assert_eq!(io(std::io::ErrorKind::StorageFull), ErrorKind::Full);
        assert_eq!(io(std::io::ErrorKind::PermissionDenied), ErrorKind::Unauthorized);
        assert_eq!(io(std::io::ErrorKind::NotFound), ErrorKind::NotFound);
    }
}
