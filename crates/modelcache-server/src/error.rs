//! Errors as HTTP responses: `{"error": {"code", "message", "hint"}}` with the status of the kind.

use crate::header;
use axum::Json;
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use modelcache::{Error, ErrorKind};
use serde_json::{Value, json};

/// An error of the library, or of the request itself, as the response of a native route.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) error: Error,
}

/// The result of a native route.
pub(crate) type ApiResult<T> = Result<T, ApiError>;

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self { status: status_of(&error), error }
    }
}

impl ApiError {
    /// Creates an error with a status of its own.
    pub(crate) fn new(status: StatusCode, message: &str, hint: &str) -> Self {
        Self { status, error: Error::invalid(message).hint(hint) }
    }

    /// Returns code, message and hint, as the body of the response has them.
    pub(crate) fn fields(&self) -> Value {
        let code = match (self.status, self.error.kind()) {
            (StatusCode::UNAUTHORIZED, _) => "unauthorized",
            (_, kind) => kind.name(),
        };
        json!({ "code": code, "message": self.error.to_string(), "hint": self.error.hint_text() })
    }
}

/// Returns the status for the kind of an error. `Unauthorized` becomes 502, not 401: the refused credentials are those of
/// the daemon, and its client cannot change them.
pub(crate) fn status_of(error: &Error) -> StatusCode {
    match error.kind() {
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::Unauthorized | ErrorKind::Corrupt => StatusCode::BAD_GATEWAY,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Full => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The error of a response, for the log and the list of recent errors.
#[derive(Debug, Clone)]
pub(crate) struct Failure(pub(crate) Error);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({ "error": self.fields() });
        let Self { status, error } = self;
        let mut response = (status, Json(body)).into_response();
        if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            response.headers_mut().insert(RETRY_AFTER, header::retry_after(error.wait()));
        }
        response.extensions_mut().insert(Failure(error));
        response
    }
}
