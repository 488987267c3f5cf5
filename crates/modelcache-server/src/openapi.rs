//! The description of the native routes in OpenAPI 3.1, made from the handlers.

use crate::{native, probes};
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "modelcache",
        description = "A tiered, verifying cache for model artifacts. The reports are those of `modelcache --json`.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    paths(
        native::stats, native::metrics, native::activity, native::list, native::inspect, native::get, native::file,
        native::evict, probes::livez, probes::readyz, probes::prometheus, probes::description
    ),
    tags(
        (name = "cache", description = "Artifacts and reports. These routes need the token, if one is configured."),
        (name = "operation", description = "Probes and metrics."),
    )
)]
struct Document;

/// Returns the OpenAPI document.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}
