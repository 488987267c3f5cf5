//! The reports that `--json` prints: which command prints which type, with one example of each.
//!
//! `cargo xtask docs` writes docs/json.md from this table and from the comments at the fields of the types.

use crate::output::{ErrorJson, Failure, WithReference};
use crate::verbs::{backfill::Outcome, doctor, pin::UnpinReport, watch};
use modelcache::cache::{
    BytesByTier, EvictReport, GetAnswer, GetPlan, GetReport, Holder, HubLayout, InspectedFile, Inspection, KeepReason,
    KeptArtifact, LeasedReference, Leftovers, Link, ListedArtifact, Materialized, PendingBackfill, Pin, PinReport,
    PlannedFile, PruneReport, PrunedArtifact, PutReport, ResolvedReference, RunningFill, Stats, TagReport,
};
use modelcache::digest::{Digest, Provenance};
use modelcache::doctor::{Area, Check};
use modelcache::finding::{BadPart, Finding, Problem, VerifyReport};
use modelcache::key::FilePath;
use modelcache::manifest::Shape;
use modelcache::progress::Phase;
use modelcache::reference::RepoKind;
use modelcache::{ArtifactKey, Error, Reference, Result, Tier};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One kind of object that a command prints with `--json`.
#[derive(Debug)]
pub struct Report {
    /// The command, without `modelcache`.
    pub command: &'static str,
    /// When the command prints the object.
    pub about: &'static str,
    /// The names of the types that the object consists of.
    pub types: &'static [&'static str],
    /// An example with a value in every field.
    pub example: Value,
}

/// Returns all kinds of objects that commands print with `--json`.
///
/// # Errors
/// `Invalid` if an example is not valid.
pub fn reports() -> Result<Vec<Report>> {
    let (reference, key) = ("team/model@prod", ArtifactKey::bare("team/model@3")?);
    let weights = FilePath::new("weights.bin")?;
    let sha256 = Digest::of(b"weights");
    let bytes = BytesByTier { disk: 8, remote: 4_000_000, origin: 0 };
    let phases =
        BTreeMap::from([(Phase::Resolve, Duration::from_millis(20)), (Phase::Download, Duration::from_secs(3))]);
    let took = Duration::from_millis(3100);
    let at = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
    let last_used: Option<SystemTime> = at(1_767_323_045);
    let pin = Pin {
        since_unix: Some(1_767_323_045),
        until_unix: Some(1_767_409_445),
        by: Some("ops@host".into()),
        reason: Some("canary".into()),
    };
    let pinned = PinReport { key: key.clone(), pin: Some(pin.clone()) };

    let got = GetReport {
        from: Tier::Remote,
        bytes,
        backfilled_bytes: 0,
        copied_bytes: 0,
        files: 2,
        selected_bytes: 4_000_008,
        link: Some(Link::Hard),
        phases: phases.clone(),
        took,
    };
    let made =
        Materialized { dir: "/srv/model".into(), path: "/srv/model".into(), links: BTreeMap::from([(Link::Hard, 2)]) };
    let hub = HubLayout {
        cache_dir: "/cache/hub".into(),
        kind: RepoKind::Model,
        repo_id: "org/model".into(),
        snapshot: "/cache/hub/models--org--model/snapshots/4f5c".into(),
    };
    let answer =
        GetAnswer { key: &key, path: Path::new("/srv/model"), hub: Some(&hub), report: &got, into: Some(&made) };
    let planned = PlannedFile { path: weights.clone(), size: 4_000_000, from: Tier::Remote };
    let plan = GetPlan::new(key.clone(), vec![planned]);
    let tagged = TagReport {
        name: key.name.clone(),
        tag: "prod".parse()?,
        from: Some("2".parse()?),
        to: Some(key.version.clone()),
        sha256: Some(sha256),
    };
    let put = PutReport {
        key: key.clone(),
        path: Some("/cache/artifacts/team%2Fmodel/3/files".into()),
        files: 2,
        bytes: 4_000_008,
        uploaded_bytes: 4_000_000,
        copied_bytes: 8,
        on_remote: true,
        sha256,
        phases,
        took,
        tag: Some(tagged.clone()),
    };
    let resolved = ResolvedReference {
        reference: Reference::parse("team/model@3")?,
        key: key.clone(),
        revision: Some("prod".into()),
        sha256: Some(sha256),
        from: Some(Tier::Remote),
        age: Some(Duration::ZERO),
    };
    let pending = PendingBackfill {
        key: key.clone(),
        reference: key.to_string(),
        remote: Some("s3://models/prod".into()),
        files: 2,
        bytes: 4_000_008,
    };
    let evicted = EvictReport {
        key: key.clone(),
        dry_run: false,
        disk_bytes: Some(4_000_008),
        shared_bytes: 0,
        remote_bytes: Some(4_000_008),
        remote: Some("s3://models/prod".into()),
        only_copy: false,
        can_be_fetched_again: false,
        tags: vec!["prod".into()],
    };
    let pruned = PruneReport {
        dry_run: false,
        used_before_bytes: 5_000_000,
        used_bytes: 899_992,
        freed_bytes: 4_100_008,
        to_bytes: Some(1_000_000),
        reached: true,
        leftovers: Leftovers { fills: 1, fill_bytes: 100_000, ..Leftovers::default() },
        evicted: vec![PrunedArtifact { reference: key.to_string(), last_used, freed_bytes: 4_000_008 }],
        kept: vec![KeptArtifact { reference: "team/other@1".into(), why: KeepReason::Leased(Vec::new()) }],
        set_aside: Vec::new(),
    };
    let listed = ListedArtifact {
        key: key.clone(),
        reference: key.to_string(),
        shape: Shape::Tree,
        held_files: 1,
        files: 2,
        held_bytes: 8,
        bytes: 4_000_008,
        formats: ["safetensors".into()].into(),
        last_used,
        leased: true,
        pin: Some(pin.clone()),
        tags: vec!["prod".into()],
    };
    let inspection = Inspection {
        key: key.clone(),
        reference: key.to_string(),
        shape: Shape::Tree,
        path: Some("/cache/artifacts/team%2Fmodel/3/files".into()),
        sha256: Some(sha256),
        known_on_disk: true,
        known_in_lower: false,
        known_on_remote: true,
        remote_error: None,
        last_used,
        leased: true,
        holders: vec![Holder { pid: 4711, command: Some("python3".into()) }],
        pin: Some(pin),
        files: vec![InspectedFile {
            path: weights.clone(),
            size: 4_000_000,
            sha256: Some(sha256),
            git_oid: None,
            provenance: Some(Provenance::Put),
            format: Some("safetensors".into()),
            on_disk: true,
            in_lower: false,
            on_remote: true,
        }],
    };
    let stats = Stats {
        dir: "/cache".into(),
        lower_dir: Some("/baked".into()),
        lower_artifacts: 1,
        artifacts: 3,
        files: 12,
        leases: 1,
        pins: 1,
        budget_bytes: 14_000_000_000,
        used_bytes: 4_000_008,
        staging_bytes: 0,
        resumable_bytes: 0,
        quarantine_bytes: 0,
        filesystem_free_bytes: 100_000_000_000,
        min_free_bytes: 10_000_000_000,
        pending_backfills: 1,
        pending_backfill_bytes: 4_000_008,
        remote: Some("s3://models/prod".into()),
    };
    let loader = Holder { pid: 1234, command: Some("python3".into()) };
    let filling = RunningFill {
        reference: "team/other@1".into(),
        process: Holder { pid: 1240, command: Some("modelcache".into()) },
        done_bytes: 1_000_000_000,
        total_bytes: Some(4_000_000_000),
    };
    let sample = watch::Sample {
        time: "2026-01-02T03:04:05Z".into(),
        stats: stats.clone(),
        fills: vec![watch::WatchedFill {
            fill: filling,
            bytes_per_second: Some(250_000_000.0),
            seconds_left: Some(12),
        }],
        leased: vec![LeasedReference { reference: key.to_string(), holders: vec![loader] }],
    };
    let mut verified = VerifyReport::new(Some(key.clone()), key.to_string(), Tier::Disk);
    (verified.files, verified.bytes) = (2, 4_000_008);
    verified.findings.push(Finding {
        expected: Some(sha256),
        found: Some(Digest::of(b"damaged")),
        bad_parts: vec![BadPart::new(0, 8_000_000, 4_000_000)],
        withdrawn: true,
        repaired_from: Some(Tier::Remote),
        ..Finding::new(Some(weights), Problem::WrongBytes)
    });
    let checks = vec![
        Check::ok(Area::Directory, "/cache can be written"),
        Check::warning(Area::Clock, "the clock is 90 s ahead", "synchronize it"),
    ];
    let examined = doctor::Report { checks, problems: 0, warnings: 1, exit: 0 };
    let error = Error::not_found("neither on disk nor on the remote")
        .artifact(&key)
        .tier(Tier::Remote)
        .hint("`modelcache ls` lists what is there");
    let failure = Failure { reference: Some(reference.to_owned()), error: ErrorJson::of(&error) };

    Ok(vec![
        report(
            "get REF…",
            "One object for each reference, in their order. `prewarm REF…` prints the same objects, in the order in \
             which the artifacts are complete.",
            &["WithReference", "GetAnswer"],
            &WithReference { reference, report: answer },
        )?,
        report(
            "get --dry-run REF…",
            "One object for each reference, in their order.",
            &["WithReference", "GetPlan"],
            &WithReference { reference, report: plan },
        )?,
        report("put NAME@VERSION PATH", "One object.", &["PutReport"], &put)?,
        report("tag NAME@VERSION TAG", "One object. `tag --remove` prints the same.", &["TagReport"], &tagged)?,
        report(
            "resolve REF",
            "One object.",
            &["WithReference", "ResolvedReferenceJson"],
            &WithReference { reference, report: resolved },
        )?,
        report(
            "backfill",
            "One object for each artifact that was uploaded, or is being uploaded by another process.",
            &["Outcome"],
            &Outcome::new(&key, "done"),
        )?,
        report("backfill --dry-run", "One object for each pending upload.", &["PendingBackfill"], &pending)?,
        report("evict REF", "One object. `evict --dry-run` prints the same.", &["EvictReport"], &evicted)?,
        report("pin REF", "One object.", &["PinReport"], &pinned)?,
        report("unpin REF", "One object.", &["UnpinReport"], &UnpinReport { report: &pinned, was_pinned: true })?,
        report("prune", "One object. `prune --dry-run` prints the same.", &["PruneReport"], &pruned)?,
        report("ls", "One object for each artifact. `ls --remote` prints the same.", &["ListedArtifact"], &listed)?,
        report("inspect REF", "One object.", &["Inspection"], &inspection)?,
        report("stats", "One object.", &["Stats"], &stats)?,
        report("stats --watch", "One object for each interval, until the command ends.", &["Sample"], &sample)?,
        report("verify [REF…]", "One object for each artifact and tier.", &["VerifyReportJson"], &verified)?,
        report("doctor", "One object.", &["Report"], &examined)?,
        report(
            "Errors",
            "Any command prints one object for each failure, and the message also to standard error. \
             [command-line.md](command-line.md#exit-codes) has the exit codes.",
            &["Failure"],
            &failure,
        )?,
    ])
}

fn report(
    command: &'static str,
    about: &'static str,
    types: &'static [&'static str],
    example: &impl Serialize,
) -> Result<Report> {
    let example = serde_json::to_value(example).map_err(|cause| Error::invalid("not serializable").cause(cause))?;
    Ok(Report { command, about, types, example })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The objects that scripts read. A field may be added. A field that is renamed or removed breaks scripts.
    const PRINTED: &str = r##"{
        "get REF…": {"backfilled_bytes": 0, "bytes": {"disk": 8, "origin": 0, "remote": 4000000},
            "hub": {"cache_dir": "/cache/hub", "repo_id": "org/model",
            "snapshot": "/cache/hub/models--org--model/snapshots/4f5c"},
            "copied_bytes": 0, "files": 2,
            "from": "remote", "into": {"dir": "/srv/model", "links": {"hard": 2}}, "link": "hard", "name": "team/model",
            "path": "/srv/model", "reference": "team/model@prod", "seconds": {"download": 3.0, "resolve": 0.02},
            "size": 4000008, "total_seconds": 3.1, "version": "3"},
        "get --dry-run REF…": {"bytes": {"disk": 0, "origin": 0, "remote": 4000000}, "files": [{"from": "remote",
            "path": "weights.bin",
            "size": 4000000}], "name": "team/model", "reference": "team/model@prod", "version": "3"},
        "put NAME@VERSION PATH": {"copied_bytes": 8, "files": 2, "name": "team/model", "on_remote": true,
            "path": "/cache/artifacts/team%2Fmodel/3/files", "seconds": {"download": 3.0, "resolve": 0.02},
            "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c", "size": 4000008,
            "tag": "prod", "total_seconds": 3.1, "uploaded_bytes": 4000000, "version": "3"},
        "tag NAME@VERSION TAG": {"from": "2", "name": "team/model",
            "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c", "tag": "prod", "to": "3"},
        "resolve REF": {"age_seconds": 0, "from": "remote", "key": "team/model@3", "name": "team/model",
            "pinned": "team/model@3",
            "pinned_with_digest":
                "team/model@3#sha256=9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
            "reference": "team/model@prod", "revision": "prod",
            "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c", "version": "3"},
        "backfill": {"name": "team/model", "outcome": "done", "reference": "team/model@3", "version": "3"},
        "backfill --dry-run": {"files": 2, "name": "team/model", "reference": "team/model@3",
            "remote": "s3://models/prod",
            "size": 4000008, "version": "3"},
        "evict REF": {"disk_bytes": 4000008, "dry_run": false, "name": "team/model", "only_copy": false,
            "can_be_fetched_again": false, "remote": "s3://models/prod", "remote_bytes": 4000008, "shared_bytes": 0, "tags": ["prod"], "version": "3"},
        "pin REF": {"name": "team/model", "pin": {"by": "ops@host", "reason": "canary",
            "since": "2026-01-02T03:04:05Z",
            "until": "2026-01-03T03:04:05Z"}, "version": "3"},
        "unpin REF": {"name": "team/model", "pin": {"by": "ops@host", "reason": "canary",
            "since": "2026-01-02T03:04:05Z",
            "until": "2026-01-03T03:04:05Z"}, "version": "3", "was_pinned": true},
        "prune": {"dry_run": false, "evicted": [{"freed_bytes": 4000008, "last_used": "2026-01-02T03:04:05Z",
            "reference": "team/model@3"}], "freed_bytes": 4100008, "kept": [{"detail": "in use",
            "reference": "team/other@1", "why": "leased"}], "leftovers": {"blob_bytes": 0, "fill_bytes": 100000,
            "fills": 1, "quarantine_bytes": 0, "temporary_bytes": 0}, "reached": true, "set_aside": [],
            "to_bytes": 1000000, "used_before_bytes": 5000000, "used_bytes": 899992},
        "ls": {"files": 2, "formats": ["safetensors"], "held_bytes": 8, "held_files": 1,
            "last_used": "2026-01-02T03:04:05Z", "leased": true, "name": "team/model", "pin": {"by": "ops@host",
            "reason": "canary", "since": "2026-01-02T03:04:05Z", "until": "2026-01-03T03:04:05Z"},
            "reference": "team/model@3", "shape": "tree", "size": 4000008, "tags": ["prod"], "version": "3"},
        "inspect REF": {"files": [{"format": "safetensors", "git_oid": null, "in_lower": false, "on_disk": true,
            "on_remote": true,
            "path": "weights.bin", "provenance": "put",
            "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c", "size": 4000000}],
            "holders": [{"command": "python3", "pid": 4711}], "known_in_lower": false, "known_on_disk": true,
            "known_on_remote": true, "last_used": "2026-01-02T03:04:05Z", "leased": true, "name": "team/model",
            "path": "/cache/artifacts/team%2Fmodel/3/files", "pin": {"by": "ops@host", "reason": "canary",
            "since": "2026-01-02T03:04:05Z", "until": "2026-01-03T03:04:05Z"}, "reference": "team/model@3",
            "remote_error": null, "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
            "shape": "tree", "version": "3"},
        "stats": {"artifacts": 3, "budget_bytes": 14000000000, "dir": "/cache", "files": 12,
            "filesystem_free_bytes": 100000000000, "leases": 1, "lower_artifacts": 1, "lower_dir": "/baked",
            "min_free_bytes": 10000000000, "pending_backfill_bytes": 4000008, "pending_backfills": 1, "pins": 1,
            "quarantine_bytes": 0, "remote": "s3://models/prod", "resumable_bytes": 0, "staging_bytes": 0, "used_bytes": 4000008},
        "stats --watch": {"artifacts": 3, "budget_bytes": 14000000000, "dir": "/cache", "files": 12,
            "filesystem_free_bytes": 100000000000, "leases": 1, "lower_artifacts": 1, "lower_dir": "/baked",
            "min_free_bytes": 10000000000, "pending_backfill_bytes": 4000008, "pending_backfills": 1, "pins": 1,
            "quarantine_bytes": 0, "remote": "s3://models/prod", "resumable_bytes": 0, "staging_bytes": 0, "used_bytes": 4000008,
            "fills": [{"bytes_per_second": 250000000.0, "done_bytes": 1000000000,
                "process": {"command": "modelcache", "pid": 1240}, "reference": "team/other@1", "seconds_left": 12,
                "total_bytes": 4000000000}],
            "leased": [{"holders": [{"command": "python3", "pid": 1234}], "reference": "team/model@3"}],
            "time": "2026-01-02T03:04:05Z"},
        "verify [REF…]": {"bytes": 4000008, "files": 2, "findings": [{"bad_parts": [{"end": 4000000, "index": 0,
            "start": 0}],
            "detail": null, "expected": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
            "found": "41f0c27c00e8018f7715b5f50f67b5b54c229c1b843a014152785d9005f58fde", "path": "weights.bin",
            "problem": "wrong-bytes", "remedy": null, "repaired_from": "remote", "withdrawn": true}],
            "name": "team/model", "ok": true, "reference": "team/model@3", "tier": "disk", "version": "3"},
        "doctor": {"checks": [{"area": "directory", "fix": null, "severity": "ok", "message": "/cache can be written"},
            {"area": "clock", "fix": "synchronize it", "severity": "warning", "message": "the clock is 90 s ahead"}],
            "exit": 0, "problems": 0, "warnings": 1},
        "Errors": {"error": {"artifact": "team/model@3", "code": "not_found",
            "hint": "`modelcache ls` lists what is there",
            "message": "neither on disk nor on the remote", "tier": "remote"}, "reference": "team/model@prod"}
    }"##;

    #[test]
    fn commands_print_the_objects_that_scripts_read() {
        let printed: BTreeMap<String, Value> = serde_json::from_str(PRINTED).expect("an object");
        let reports = reports().expect("valid examples");
        assert_eq!(reports.len(), printed.len());
        for Report { command, example, .. } in reports {
            assert_eq!(example, printed[command], "{command}");
        }
    }
}
