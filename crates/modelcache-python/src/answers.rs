//! Reports of the library as JSON, which the Python package parses into the classes of `_reports.py`.
//!
//! Some names differ from the command line's `--json`: `before` and `after` of a tag, `origin` of a resolved reference.
//! Times are numbers in seconds.

use modelcache::ArtifactKey;
use modelcache::cache::{Artifact, EvictReport, Listed, Pin, PinReport, Pinned, PutReport, TagReport};
use modelcache::finding::Verified;
use modelcache::progress::Phase;
use modelcache::{Error, ErrorKind, Reference, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Serializes a report with the field names that it has in the library.
pub(crate) fn plain(value: &impl Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|cause| Error::new(ErrorKind::Other, "cannot write the answer").cause(cause))
}

pub(crate) fn got(artifact: &Artifact) -> Value {
    let report = &artifact.report;
    with_key(
        &artifact.key,
        json!({
            "from": report.from,
            "files": report.files,
            "size": report.selected_bytes,
            "bytes": report.bytes,
            "backfilled_bytes": report.backfilled_bytes,
            "copied_bytes": report.copied_bytes,
            "seconds": seconds(&report.phases),
        }),
    )
}

pub(crate) fn put(report: &PutReport) -> Value {
    with_key(
        &report.key,
        json!({
            "path": report.path,
            "files": report.files,
            "size": report.bytes,
            "uploaded_bytes": report.uploaded_bytes,
            "copied_bytes": report.copied_bytes,
            "on_remote": report.on_remote,
            "sha256": report.sha256,
            "seconds": seconds(&report.phases),
        }),
    )
}

pub(crate) fn evicted(report: &EvictReport) -> Value {
    with_key(
        &report.key,
        json!({
            "disk_bytes": report.disk_bytes,
            "remote_bytes": report.remote_bytes,
            "origin_can_give_back": report.origin_can_give_back,
            "tags": report.tags,
        }),
    )
}

pub(crate) fn tagged(report: &TagReport) -> Value {
    json!({"name": report.name, "tag": report.tag, "before": report.from, "after": report.to, "sha256": report.sha256})
}

pub(crate) fn pin(report: &PinReport) -> Value {
    with_key(&report.key, json!({"pin": report.pin.as_ref().map(pin_object)}))
}

pub(crate) fn resolved(pinned: &Pinned) -> Value {
    let with_digest =
        pinned.sha256.map(|sha256| Reference { digest: Some(sha256), ..pinned.reference.clone() }.to_string());
    with_key(
        &pinned.key,
        json!({
            "pinned": pinned.reference.to_string(),
            "pinned_with_digest": with_digest,
            "revision": pinned.revision,
            "sha256": pinned.sha256,
            "origin": pinned.from,
            // `Duration::MAX` stands for an answer of unknown age.
            "age_seconds": pinned.age.filter(|age| *age < Duration::MAX).map(|age| age.as_secs_f64()),
        }),
    )
}

pub(crate) fn listed(listed: &Listed) -> Value {
    with_key(
        &listed.key,
        json!({
            "reference": listed.reference,
            "shape": listed.shape,
            "files": listed.files,
            "held_files": listed.held_files,
            "size": listed.bytes,
            "held_bytes": listed.held_bytes,
            "formats": listed.formats,
            "last_used": listed.last_used.and_then(unix),
            "leased": listed.leased,
            "pin": listed.pin.as_ref().map(pin_object),
            "tags": listed.tags,
        }),
    )
}

pub(crate) fn verified(verified: &Verified) -> Value {
    json!({
        "reference": verified.reference,
        "tier": verified.tier,
        "ok": verified.is_right(),
        "files": verified.files,
        "bytes": verified.bytes,
        "findings": verified.findings,
    })
}

fn pin_object(pin: &Pin) -> Value {
    json!({"since": pin.since_unix, "until": pin.until_unix, "by": pin.by, "reason": pin.reason})
}

/// Returns the time as seconds since the Unix epoch, or `None` if it is before the epoch.
fn unix(time: SystemTime) -> Option<f64> {
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}

/// Returns the seconds spent in each phase, keyed by the name of the phase.
fn seconds(phases: &BTreeMap<Phase, Duration>) -> Value {
    phases.iter().map(|(phase, spent)| (phase.name().to_owned(), json!(spent.as_secs_f64()))).collect()
}

/// Adds the name and version of the artifact to a report.
fn with_key(key: &ArtifactKey, mut about: Value) -> Value {
    if let Value::Object(fields) = &mut about {
        fields.insert("name".into(), json!(key.name));
        fields.insert("version".into(), json!(key.version));
    }
    about
}
