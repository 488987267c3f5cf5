//! The description of the native routes in OpenAPI 3.1, made from the handlers.

use crate::{native, probes};
use axum::http::StatusCode;
use serde_json::Value;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "modelcache",
        description = "A tiered, verifying cache for model artifacts. The reports are those of `modelcache --json`.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    paths(
        native::stats, native::metrics, native::activity, native::doctor, native::list, native::inspect, native::get, native::file,
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

/// Returns the documentation of the routes as a page in Markdown.
pub fn page() -> String {
    let document = serde_json::to_value(document()).unwrap_or_default();
    let mut page = String::from(
        "# HTTP routes of the daemon\n\n\
         <!-- Written by `cargo xtask docs`; edit the handlers in crates/modelcache-server/src. -->\n\n\
         The routes of `modelcache serve` itself. The routes for clients of the Hugging Face Hub are described in\n\
         [daemon.md](daemon.md#hugging-face-clients).\n\n\
         The reports have the fields of `modelcache --json`, see [json.md](json.md). An error is\n\
         `{\"error\": {\"code\", \"message\", \"hint\"}}`; the codes are those of [the command line](command-line.md).\n",
    );
    let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            page.push_str(&format!("\n## `{} {path}`\n\n{}.\n", method.to_uppercase(), text(operation, "summary")));
            let description = text(operation, "description");
            if !description.is_empty() {
                page.push_str(&format!("\n{}\n", description.trim()));
            }
            let parameters = operation["parameters"].as_array().map(Vec::as_slice).unwrap_or_default();
            if !parameters.is_empty() {
                page.push_str("\n| parameter | in | meaning |\n|---|---|---|\n");
            }
            for parameter in parameters {
                let (name, place, meaning) =
                    (text(parameter, "name"), text(parameter, "in"), text(parameter, "description"));
                page.push_str(&format!("| `{name}` | {place} | {} |\n", meaning.trim()));
            }
            if let Some(name) = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str() {
                page.push_str(&fields(&document, name, "field of the body"));
            }
            page.push_str("\n| status | |\n|---|---|\n");
            for status in operation["responses"].as_object().into_iter().flatten().map(|(status, _)| status) {
                let reason = status.parse::<u16>().ok().and_then(|code| StatusCode::from_u16(code).ok());
                let reason = reason.and_then(|status| status.canonical_reason()).unwrap_or_default();
                page.push_str(&format!("| {status} | {reason} |\n"));
            }
            let schema = &operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"];
            if let Some(name) = schema.as_str() {
                page.push_str(&fields(&document, name, "field of the answer"));
            }
        }
    }
    page
}

/// Returns a table of the fields of a schema, which a reference such as `#/components/schemas/Name` names.
fn fields(document: &Value, reference: &str, heading: &str) -> String {
    let name = reference.rsplit('/').next().unwrap_or_default();
    let schema = &document["components"]["schemas"][name];
    let mut table = format!("\n| {heading} | type | meaning |\n|---|---|---|\n");
    for (field, of) in schema["properties"].as_object().into_iter().flatten() {
        let kind = match (&of["type"], of["$ref"].as_str().or_else(|| of["items"]["$ref"].as_str())) {
            (_, Some(reference)) => format!("`{}`", reference.rsplit('/').next().unwrap_or_default()),
            (Value::Array(kinds), _) => kinds.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or "),
            (kind, _) => kind.as_str().unwrap_or("object").to_owned(),
        };
        let meaning = of["description"].as_str().unwrap_or_default().replace('\n', " ");
        table.push_str(&format!("| `{field}` | {kind} | {meaning} |\n"));
    }
    table
}
