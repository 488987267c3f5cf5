//! `doctor`: problems are reported with a fix, the exit code is the one with which a get would fail, and nothing
//! is left behind.

use crate::common::*;
use modelcache_testkit::s3::S3Fault;
use modelcache_testkit::{Content, LoggedRequest};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

/// The report of a run with `--json`.
struct Report {
    code: Option<i32>,
    checks: Vec<Value>,
    shown: String,
}

impl Report {
    #[track_caller]
    fn of(outcome: Outcome) -> Self {
        let shown = outcome.to_string();
        let object: Value = serde_json::from_str(&outcome.stdout).unwrap_or_else(|_| panic!("{shown}"));
        assert_eq!(object["exit"], outcome.code.unwrap(), "{shown}");
        Self { code: outcome.code, checks: object["checks"].as_array().unwrap().clone(), shown }
    }

    /// Returns the check of this area and severity whose text contains `part`. Asserts that every check that is not ok
    /// has a fix.
    #[track_caller]
    fn check(&self, area: &str, severity: &str, part: &str) -> &Value {
        for check in self.checks.iter().filter(|check| check["severity"] != "ok") {
            assert!(check["fix"].is_string(), "{check}");
        }
        let found = self.checks.iter().find(|check| {
            check["area"] == area && check["severity"] == severity && text(&check["message"]).contains(part)
        });
        found.unwrap_or_else(|| panic!("no {severity} of {area} contains {part:?}: {}", self.shown))
    }
}

#[track_caller]
fn doctor(run: Run) -> Report {
    Report::of(run.run(["doctor", "--json"]))
}

#[test]
fn a_working_setup_passes_and_nothing_is_left_behind() {
    let house = House::new();
    house.make_cache("a");
    let before = files_below(&house.path("a"));
    let report = doctor(house.on("a"));
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("directory", "ok", "file locks work");
    report.check("directory", "ok", "hard links");
    report.check("credentials", "ok", "AWS_ACCESS_KEY_ID; the access key id begins with TEST");
    assert!(!report.shown.contains("TESTK"), "at most four characters are shown");
    for part in ["can be listed", "can be written", "conditional writes are supported", "can be read", "can be removed"]
    {
        report.check("remote", "ok", part);
    }
    report.check("origin", "ok", "answers; no token");
    report.check("clock", "ok", "agrees");
    report.check("network", "ok", "no proxy");
    assert_eq!(files_below(&house.path("a")), before);
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
    assert!(house.s3.requests().iter().all(|seen| seen.path.starts_with("/models/cache/.modelcache-doctor")
        || seen.path.trim_end_matches('/').len() <= "/models".len()));
    let human_readable = house.on("a").run(["doctor"]).ok();
    assert!(
        human_readable.stdout.starts_with("configuration\n  ok ") && human_readable.stderr.contains("no problem"),
        "{human_readable}"
    );
}

#[test]
fn no_remote_and_no_directory_yet_are_fine_and_none_is_made() {
    let house = House::new();
    let report = doctor(house.on_local("not/yet"));
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("directory", "ok", "does not exist yet");
    report.check("remote", "ok", "none is configured");
    assert!(!house.path("not").exists());
}

#[test]
fn with_read_only_nothing_is_written() {
    let house = House::new();
    let report = Report::of(house.on("a").run(["doctor", "--json", "--read-only"]));
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("remote", "ok", "was not tried");
    assert!(house.s3.requests().iter().all(|seen| seen.method == "GET"), "{:?}", house.s3.requests());
}

#[test]
fn a_bad_configuration_is_named_and_the_rest_examined() {
    let house = House::new();
    let file = house.write("bad.toml", "max-bytes = 1\n");
    let report = doctor(house.on("a").env("MODEL_CACHE_CONFIG", &file));
    assert_eq!(report.code, Some(2), "{}", report.shown);
    let problem = report.check("configuration", "problem", "unknown setting \"max-bytes\"");
    assert_eq!(problem["fix"], "did you mean \"max_bytes\"?");
    report.check("directory", "ok", &house.path("a").display().to_string());
    report.check("remote", "ok", "conditional writes are supported");

    for (name, value) in
        [("MODEL_CACHE_MIN_FREE_BYTES", "lots"), ("HF_ENDPOINT", "nonsense"), ("MODEL_CACHE_LOG", "a=b=c")]
    {
        let report = doctor(house.on("a").env(name, value));
        assert_eq!(report.code, Some(2), "{name}: {}", report.shown);
        report.check("configuration", "problem", value);
        report.check("directory", "ok", &house.path("a").display().to_string());
    }
    let report = doctor(house.on("a").env("MODEL_CACHE_MAX_BYTE", "1GB"));
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("configuration", "warning", "did you mean MODEL_CACHE_MAX_BYTES?");
}

#[test]
fn a_dead_endpoint_and_a_missing_bucket_are_distinguished() {
    let house = House::new();
    let report = doctor(house.on("a").env("AWS_ENDPOINT_URL", "http://127.0.0.1:9"));
    assert_eq!(report.code, Some(7), "{}", report.shown);
    report.check("remote", "problem", "cannot connect");
    report.check("directory", "ok", "can be");
    let report = doctor(house.on("a").env("MODEL_CACHE_REMOTE", "s3://nowhere/cache"));
    assert_eq!(report.code, Some(2), "{}", report.shown);
    report.check("remote", "problem", "\"nowhere\" does not exist");
}

#[test]
fn credentials_that_are_missing_wrong_or_expired_end_with_4() {
    let house = House::new();
    let report = doctor(house.on("a").without("AWS_ACCESS_KEY_ID").without("AWS_SECRET_ACCESS_KEY"));
    assert_eq!(report.code, Some(4), "{}", report.shown);
    report.check("credentials", "problem", "no AWS credentials found");
    let report = doctor(house.on("a").env("AWS_SECRET_ACCESS_KEY", "canary-secret"));
    assert_eq!(report.code, Some(4), "{}", report.shown);
    report.check("remote", "problem", "SignatureDoesNotMatch");
    for (fault, message_part) in [
        (S3Fault::expired_token(), "expired"),
        (S3Fault::invalid_access_key(), "InvalidAccessKeyId"),
        (S3Fault::clock_skew(), "clock of this machine"),
        (S3Fault::access_denied(), "lack every permission"),
    ] {
        house.s3.faults().clear();
        house.s3.faults().add(fault);
        let report = doctor(house.on("a"));
        assert_eq!(report.code, Some(4), "{message_part}: {}", report.shown);
        report.check("remote", "problem", message_part);
    }
}

#[test]
fn a_profile_is_named_as_the_source_of_its_keys() {
    let house = House::new();
    let keys = format!(
        "[team]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
        house.s3.access_key(),
        house.s3.secret_key()
    );
    house.write("home/.aws/credentials", keys.as_str());
    let run = house.on("a").without("AWS_ACCESS_KEY_ID").without("AWS_SECRET_ACCESS_KEY").env("AWS_PROFILE", "team");
    doctor(run).check("credentials", "ok", "profile \"team\"");
}

#[test]
fn the_right_region_is_named() {
    let house = House::new();
    house.s3.faults().add(S3Fault::wrong_region("eu-west-3"));
    let report = doctor(house.on("a"));
    assert_eq!(report.code, Some(2), "{}", report.shown);
    assert!(text(&report.check("remote", "problem", "eu-west-3")["fix"]).contains("AWS_REGION=eu-west-3"));
}

#[test]
fn rights_that_are_lacking_are_named_one_by_one() {
    let house = House::new();
    let with = |fault: S3Fault| {
        house.s3.faults().clear();
        house.s3.faults().add(fault);
        let report = doctor(house.on("a"));
        house.s3.faults().clear();
        report
    };
    let report = with(S3Fault::access_denied().method("PUT"));
    assert_eq!(report.code, Some(0), "read access is enough: {}", report.shown);
    report.check("remote", "warning", "cannot be written");
    let report = with(S3Fault::no_list_permission());
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("remote", "warning", "listing is not permitted");
    report.check("remote", "ok", "can be read");
    let report = with(S3Fault::ignore_conditions());
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("remote", "warning", "conditional writes are not supported");
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
    let report = with(S3Fault::access_denied().method("DELETE"));
    assert_eq!(report.code, Some(4), "{}", report.shown);
    let [left] = &house.s3.keys(BUCKET)[..] else { panic!("{:?}", house.s3.keys(BUCKET)) };
    report.check("remote", "problem", left);
    house.s3.remove(BUCKET, left).unwrap();
    let report = with(S3Fault::slow_down());
    assert_eq!(report.code, Some(7), "{}", report.shown);
    // A write that succeeded although its response was lost is removed, too.
    with(S3Fault::lose_reply().method("PUT"));
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
}

#[test]
fn clock_skew_against_the_server_is_reported() {
    let house = House::new();
    house.s3.clock_ahead(-100);
    let report = doctor(house.on("a"));
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("clock", "warning", "ahead of");
    house.s3.clock_ahead(1000);
    let report = doctor(house.on("a"));
    assert_eq!(report.code, Some(4), "{}", report.shown);
    report.check("clock", "problem", "s behind that of");
}

#[test]
fn a_hub_that_is_down_or_throttles_or_rejects_the_token_is_reported() {
    let house = House::new();
    house.hub.user("ada", TOKEN);
    let report = doctor(house.on_local("a").env("HF_TOKEN", TOKEN));
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("origin", "ok", "the token is that of \"ada\"");
    let report = doctor(house.on_local("a").env("HF_TOKEN", "canary-session"));
    assert_eq!(report.code, Some(4), "{}", report.shown);
    report.check("origin", "problem", "rejects the token");
    house.hub.faults().add(modelcache_testkit::hub::HubFault::throttle(30));
    doctor(house.on_local("a")).check("origin", "warning", "throttles the requests");
    house.hub.down(true);
    let report = doctor(house.on_local("a"));
    assert_eq!(report.code, Some(7), "{}", report.shown);
    report.check("origin", "problem", "127.0.0.1");
    let report = doctor(house.on("a"));
    assert_eq!(report.code, Some(0), "the remote serves: {}", report.shown);
    report.check("origin", "warning", "can still be downloaded");
    doctor(house.on_local("a").env("MODEL_CACHE_OFFLINE", "1")).check("origin", "warning", "no origin is contacted");
}

#[test]
fn a_directory_that_cannot_be_used_ends_with_8() {
    let house = House::new();
    house.write("file", "x");
    let report = doctor(house.on_local("file"));
    assert_eq!(report.code, Some(8), "{}", report.shown);
    let report = doctor(house.on_local("file/below"));
    assert_eq!(report.code, Some(8), "{}", report.shown);
    report.check("directory", "problem", "not a folder");

    house.make_cache("newer");
    fs::write(house.path("newer/FORMAT"), "modelcache 9\n").unwrap();
    doctor(house.on_local("newer")).check("directory", "problem", "has format 9");

    fs::create_dir(house.path("locked")).unwrap();
    fs::set_permissions(house.path("locked"), Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(house.path(""), Permissions::from_mode(0o755)).unwrap();
    let report = doctor(house.on_local("locked").unprivileged());
    assert_eq!(report.code, Some(8), "{}", report.shown);
    report.check("directory", "problem", "cannot write to");
}

#[test]
fn a_read_only_mount_and_a_full_one_are_reported() {
    if !can_mount() {
        return;
    }
    let house = House::new();
    house.write("m/f", "content");
    house.on_local("a").run(["put", "m@1", "m"]).ok();
    let dir = house.path("a").display().to_string();
    let mount = format!("mount --bind {dir} {dir} && mount -o remount,ro,bind {dir}");
    let report = Report::of(house.on_local("a").run_after(&mount, &["doctor", "--json"]));
    assert_eq!(report.code, Some(8), "{}", report.shown);
    report.check("directory", "problem", "its artifacts are still served");

    let full =
        format!("mount -t tmpfs -o size=64k none {dir} && (dd if=/dev/zero of={dir}/fill bs=4k 2>/dev/null || true)");
    let report = Report::of(house.on_local("a").run_after(&full, &["doctor", "--json"]));
    assert_eq!(report.code, Some(6), "{}", report.shown);
    report.check("directory", "problem", "cannot write");
    report.check("directory", "warning", "tmpfs");
}

#[test]
fn locks_that_do_not_exclude_are_a_warning() {
    let Some(shim) = shim() else { return };
    let house = House::new();
    house.make_cache("a");
    let lies = shim.flock(&house.path("a"), modelcache_testkit::Flock::Lies);
    let report = doctor(house.on_local("a").envs(lies.envs()));
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("directory", "warning", "file locks have no effect");
}

/// The IAM action that a request needs.
fn action(seen: &LoggedRequest) -> &'static str {
    match (seen.method.as_str(), seen.query.as_str()) {
        ("GET", query) if query.contains("list-type=2") => "s3:ListBucket",
        ("GET", query) if query.starts_with("uploads") => "s3:ListBucketMultipartUploads",
        ("GET" | "HEAD", query) if !query.contains("uploadId") => "s3:GetObject",
        ("DELETE", query) if query.contains("uploadId") => "s3:AbortMultipartUpload",
        ("DELETE", _) => "s3:DeleteObject",
        ("PUT" | "POST", query) if !query.contains("delete") => "s3:PutObject",
        _ => panic!("{seen:?} needs an action that is not known here"),
    }
}

fn granted(policy: &Value) -> BTreeSet<String> {
    let statements = policy["Statement"].as_array().unwrap();
    let actions = statements.iter().flat_map(|statement| statement["Action"].as_array().unwrap());
    actions.map(text).collect()
}

#[test]
fn the_iam_policies_grant_exactly_the_actions_in_use() {
    let house = House::new();
    let policy = |role: &str| house.on("a").run(["doctor", "--iam-policy", role]).ok();
    let [reader, writer] =
        ["reader", "writer"].map(|role| serde_json::from_str::<Value>(&policy(role).stdout).unwrap());
    assert_eq!(reader["Statement"][1]["Resource"], serde_json::json!(["arn:aws:s3:::models/cache/*"]));
    policy("writer").said(&["kms:GenerateDataKey"]);
    assert!(house.s3.requests().is_empty(), "a policy needs no request");
    let needed =
        |house: &House| house.s3.requests().iter().map(|seen| action(seen).to_owned()).collect::<BTreeSet<_>>();

    house.write("m/small", "x");
    house.write("m/large", Content::generated(1, 17 * MIB));
    // A multipart upload that fails at its completion is aborted, which needs a permission of its own.
    house.s3.faults().add(S3Fault::error(400, "InvalidPart", "no").method("POST").on("uploadId").once());
    assert_ne!(house.on("a").run(["put", "m@1", "m"]).code, Some(0));
    house.on("a").run(["put", "m@1", "m", "--force"]).ok();
    house.on("b").run(["get", "m@1"]).path();
    house.on("b").run(["ls", "--remote"]).ok();
    house.on("b").run(["verify", "--tier", "remote"]).ok();
    doctor(house.on("b"));
    house.on("a").run(["evict", "m@1", "--yes"]).ok();
    let clock = |seen: &&LoggedRequest| seen.path == "/";
    house
        .s3
        .requests()
        .iter()
        .filter(clock)
        .for_each(|seen| assert_eq!(seen.authorization, None, "the clock check is unsigned"));
    assert_eq!(needed(&house), granted(&writer));

    house.on("a").run(["put", "m@1", "m"]).ok();
    house.s3.clear_requests();
    house.on("c").run(["get", "m@1"]).path();
    house.on("c").run(["ls", "--remote"]).ok();
    house.on("c").run(["verify", "--tier", "remote"]).ok();
    assert_eq!(needed(&house), granted(&reader));
}

#[test]
fn without_a_bucket_there_is_no_policy() {
    let house = House::new();
    house.on_local("a").run(["doctor", "--iam-policy", "reader"]).failed(2, &["no remote is configured"]);
    let folder = format!("file://{}", house.path("remote").display());
    house
        .on_local("a")
        .env("MODEL_CACHE_REMOTE", folder)
        .run(["doctor", "--iam-policy", "writer"])
        .failed(2, &["folder"]);
}

#[test]
fn a_folder_as_remote_is_tried_and_left_as_it_was() {
    let house = House::new();
    let folder = house.path("remote");
    let run = || house.on_local("a").env("MODEL_CACHE_REMOTE", format!("file://{}", folder.display()));
    doctor(run()).check("remote", "warning", "the first put creates it");
    assert!(!folder.exists());
    fs::create_dir(&folder).unwrap();
    let report = doctor(run());
    assert_eq!(report.code, Some(0), "{}", report.shown);
    report.check("remote", "ok", "conditional writes are supported");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}
