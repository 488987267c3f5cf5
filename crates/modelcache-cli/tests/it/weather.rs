//! Failures of S3, the Hub and the network, in every way that they are known to fail.
//!
//! A passing failure is retried and does not show. A lasting failure ends with its exit code and a message with the
//! artifact, the tier and a remedy. Nothing partial is visible, and the same directory works after the failure.

use crate::common::*;
use modelcache_testkit::FaultProxy;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::proxy::ProxyFault;
use modelcache_testkit::s3::S3Fault;
use std::fs;
use std::sync::Mutex;
use std::time::Duration;

/// Longer than any timeout of these tests.
const FOR_EVER: Duration = Duration::from_secs(600);
/// A port on which nothing listens.
const CLOSED_PORT: &str = "http://127.0.0.1:9";

/// Sets short timeouts, for failures that last.
fn impatient(run: Run) -> Run {
    run.env("MODEL_CACHE_RETRY_DEADLINE", "300ms").env("MODEL_CACHE_READ_TIMEOUT", "500ms")
}

/// An environment with `org/model` at the Hub and `m@1` on S3 only.
fn house() -> House {
    let (house, _) = House::with_model();
    for (path, content) in model() {
        house.write(&format!("mine/{path}"), content);
    }
    house.on("publisher").run(["put", "m@1", "mine"]).ok();
    fs::remove_dir_all(house.path("publisher")).unwrap();
    house
}

/// Runs `check` for every row, four at a time because most of the time is waiting. Each check builds its own
/// environment.
fn each_in_its_own_environment<T: Send>(rows: Vec<T>, check: impl Fn(T) + Sync) {
    let rows = Mutex::new(rows.into_iter());
    let next = || rows.lock().unwrap().next();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| std::iter::from_fn(next).for_each(&check));
        }
    });
}

/// One lasting failure of S3, with the exit code and the message to expect.
struct S3Trouble {
    name: &'static str,
    fault: Option<S3Fault>,
    change: fn(Run) -> Run,
    code: i32,
    message_parts: &'static [&'static str],
}

fn s3_troubles() -> Vec<S3Trouble> {
    let row = |name, code, message_parts| S3Trouble { name, fault: None, change: |run| run, code, message_parts };
    vec![
        S3Trouble {
            change: |run| run.without("AWS_ACCESS_KEY_ID").without("AWS_SECRET_ACCESS_KEY"),
            ..row("no credentials", 4, &["no AWS credentials found", "aws configure"])
        },
        S3Trouble {
            change: |run| run.env("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN"),
            ..row("unknown key", 4, &["InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"])
        },
        S3Trouble {
            change: |run| run.env("AWS_SECRET_ACCESS_KEY", "canary-secret"),
            ..row("wrong secret", 4, &["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"])
        },
        S3Trouble {
            fault: Some(S3Fault::expired_token()),
            change: |run| run.env("AWS_SESSION_TOKEN", "canary-session"),
            ..row("expired token", 4, &["ExpiredToken", "log in again", "aws sso login"])
        },
        S3Trouble { fault: Some(S3Fault::clock_skew()), ..row("clock skew", 4, &["clock", "NTP"]) },
        S3Trouble { fault: Some(S3Fault::slow_down()), ..row("slow down", 7, &["SlowDown"]) },
        S3Trouble { fault: Some(S3Fault::hang_up()), ..row("hangs up", 7, &["127.0.0.1"]) },
        S3Trouble { fault: Some(S3Fault::delay(FOR_EVER)), ..row("silent", 7, &["127.0.0.1"]) },
        S3Trouble {
            change: |run| run.env("AWS_ENDPOINT_URL", CLOSED_PORT),
            ..row("down", 7, &["cannot connect to http://127.0.0.1:9", "check the endpoint"])
        },
    ]
}

#[test]
fn a_lasting_failure_of_s3_is_reported_and_the_origin_serves() {
    each_in_its_own_environment(s3_troubles(), |S3Trouble { name, fault, change, code, message_parts }| {
        let house = house();
        let keys = house.s3.keys(BUCKET);
        fault.map(|fault| house.s3.faults().add(fault));
        let run = || change(impatient(house.on("a")));
        let message_parts = [message_parts, &["remote"]].concat();
        run().run(["get", "m@1"]).failed(code, &[&message_parts[..], &["m@1"]].concat());
        run().run(["put", "p@1", "mine/config.json"]).failed(code, &[&message_parts[..], &["p@1"]].concat());
        house.assert_no_artifact("a");
        run().run(["ls", "--remote"]).failed(code, &message_parts);

        // The Hub serves the artifact, with a warning that contains the remedy.
        let served = run().run(["get", "hf://org/model"]);
        assert_model(
            &served.path_saying(
                &[&message_parts[..], &["WARN", "the remote failed and is skipped", "from origin"]].concat(),
            ),
        );
        let refuses = run().env("MODEL_CACHE_ON_REMOTE_DOWN", "fail");
        fs::remove_dir_all(house.path("a")).unwrap();
        refuses.run(["get", "hf://org/model"]).failed(code, &[&message_parts[..], &["hf://org/model"]].concat());

        house.s3.faults().clear();
        assert_eq!(house.s3.keys(BUCKET), keys, "{name}: nothing was written");
        assert_model(&house.on("a").run(["get", "m@1"]).path_saying(&["from remote"]));
    });
}

/// Each definite answer of a store ends a put with its own exit code, the server's message and a remedy. It is not
/// retried.
#[test]
fn a_definite_answer_of_s3_ends_a_put_at_once() {
    let house = house();
    let rows = [
        (403, "QuotaExceeded", "the quota of the user is used up", 6, "raise its quota"),
        (507, "XMinioStorageFull", "minimum free drive threshold", 6, "free space"),
        (507, "", "", 6, "free space"),
        (403, "SecondLevelDomainForbidden", "use virtual hosted style", 2, "path_style = false"),
        (400, "InvalidRequest", "Content-MD5 OR x-amz-checksum- header is required", 2, "checksum_algorithm"),
        (400, "KeyTooLongError", "too long", 7, "refuses the request itself"),
        (405, "MethodNotAllowed", "not here", 7, "refuses the request itself"),
        (403, "AccessDenied", "not authorized to perform: kms:GenerateDataKey", 4, "kms:GenerateDataKey to write"),
        (403, "AccessDenied", "denied by policy", 4, "s3:PutObject"),
        (403, "AccountSuspended", "unpaid", 4, "owner of the account"),
    ];
    for (at, (status, code, message, exit, remedy)) in rows.into_iter().enumerate() {
        house.s3.faults().clear();
        let hits = house.s3.faults().add(S3Fault::error(status, code, message).method("PUT"));
        house.on(&format!("d{at}")).run(["put", "p@1", "mine"]).failed(exit, &["p@1", code, message, remedy]);
        // The claim is tried, and then withdrawn in case the request had arrived.
        assert!(hits.count() <= 2, "{code}: tried {} times", hits.count());
    }
}

/// An object that a listing names is there. A 403 to its GET is reported with the server's message, and no copy of it
/// is taken for missing or for the work of another tool.
#[test]
fn an_object_that_is_listed_and_cannot_be_read_is_not_missing() {
    let house = house();
    house.on("b").run(["get", "hf://org/model"]).path_saying(&["to remote"]);
    let keys = house.s3.keys(BUCKET);
    for (status, code, message, exit) in [
        (403, "AccessDenied", "not authorized to perform: kms:Decrypt", 4),
        (403, "AccessDenied", "download cap exceeded", 4),
        (403, "InvalidObjectState", "the operation is not valid for the object's storage class", 7),
        (400, "InvalidRequest", "stored using a form of Server Side Encryption", 4),
    ] {
        house.s3.faults().clear();
        house.s3.faults().add(S3Fault::error(status, code, message).on("manifest.json").method("GET"));
        house.on("c").run(["get", "m@1"]).failed(exit, &["m@1", code, message]);
        let served = house.on("c").run(["get", "hf://org/model"]);
        assert!(!served.stderr.contains("remove"), "{served}");
        assert_model(&served.path_saying(&["the remote", message, "from origin"]));
        assert_eq!(house.s3.keys(BUCKET), keys, "nothing is written over what cannot be read");
        fs::remove_dir_all(house.path("c")).unwrap();
    }
}

/// One stated wait pauses all requests to a host, and costs one retry: the usual budget has 32.
#[test]
fn a_rate_limit_is_waited_out_once_for_all_files() {
    let house = House::new();
    let names: Vec<_> = (0..120).map(|at| format!("d/{at:03}.json")).collect();
    let commit = house.hub.repo("org/many").commit();
    names.iter().fold(commit, |commit, name| commit.plain(name, name.as_str())).publish().unwrap();
    let hits = house.hub.faults().add(HubFault::rate_limit(2).on("/resolve/").after_skipping(40).times(4));
    house.on_local("a").run(["get", "hf://org/many"]).path_saying(&["from origin"]);
    assert!(hits.count() > 0);
    let sent = house.hub.body_gets();
    assert_eq!(sent.len(), names.len(), "each file was sent once");
}

/// Small files whose bytes arrived before the failure are resumed with.
#[test]
fn a_failed_get_of_many_small_files_keeps_what_arrived() {
    let house = House::new();
    let names: Vec<_> = (0..120).map(|at| format!("d/{at:03}.json")).collect();
    let commit = house.hub.repo("org/many").commit();
    names.iter().fold(commit, |commit, name| commit.plain(name, name.as_str())).publish().unwrap();
    house.hub.faults().add(HubFault::status(403).on("/resolve/").after_skipping(60));
    house.on_local("a").run(["get", "hf://org/many"]).failed(4, &["hf://org/many"]);
    house.hub.faults().clear();
    house.on_local("a").run(["get", "hf://org/many"]).path();
    assert_eq!(house.hub.body_gets().len(), names.len(), "no file was sent twice");
}

#[test]
fn credentials_with_a_line_break_are_trimmed_or_refused_by_name() {
    let house = house();
    let (key, secret) = (house.s3.access_key(), house.s3.secret_key());
    let trimmed = house
        .on("a")
        .env("AWS_ACCESS_KEY_ID", format!("{key}\n"))
        .env("AWS_SECRET_ACCESS_KEY", format!("{secret}\r\n"));
    assert_model(&trimmed.run(["get", "m@1"]).path_saying(&["from remote"]));
    let broken = house.on("b").env("AWS_SESSION_TOKEN", "a\nb");
    broken.run(["get", "m@1"]).failed(4, &["AWS_ACCESS_KEY_ID", "session token", "line break"]);
}

/// Without `s3:ListBucket`, S3 answers 403 for a missing object. A get therefore takes 403 for a miss, with a warning.
#[test]
fn access_denied_is_a_miss_with_a_warning_for_a_get_and_an_error_for_a_put() {
    let house = house();
    house.s3.faults().add(S3Fault::access_denied());
    let warns = ["WARN", "403", "may just be missing", "s3:ListBucket", "models"];
    house.on("a").run(["get", "m@1"]).failed(3, &[&warns[..], &["m@1", "s3://models/cache"]].concat());
    let rights = ["remote", "AccessDenied", "s3:PutObject", "\"models\""];
    let lists = ["listing the remote is not permitted", "s3:ListBucket"];
    house.on("a").run(["put", "p@1", "mine"]).failed(4, &[&rights[..], &["p@1"]].concat());
    house.on("a").run(["ls", "--remote"]).failed(4, &lists);
    house.assert_no_artifact("a");
    let served = house.on("a").run(["get", "hf://org/model"]);
    assert_model(
        &served.path_saying(&[&warns[..], &rights, &["the artifact is available locally", "from origin"]].concat()),
    );
    house.s3.faults().clear();
    assert_model(&house.on("a").run(["get", "m@1"]).path());
}

#[test]
fn a_misconfigured_remote_ends_in_2_and_is_never_skipped() {
    let house = house();
    let elsewhere = |run: Run| run.env("MODEL_CACHE_REMOTE", "s3://nobody-has-this/cache");
    let same = |run: Run| run;
    type Trouble<'a> = (Option<S3Fault>, fn(Run) -> Run, &'a [&'a str]);
    let rows: [Trouble<'_>; 3] = [
        (None, elsewhere, &["nobody-has-this", "does not exist", "creates no buckets"]),
        (Some(S3Fault::wrong_region("eu-west-1")), same, &["region eu-west-1, not us-east-1", "AWS_REGION=eu-west-1"]),
        (
            Some(S3Fault::error(400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong")),
            same,
            &["is not in the region us-east-1", "set AWS_REGION"],
        ),
    ];
    for (fault, change, message_parts) in rows {
        fault.map(|fault| house.s3.faults().add(fault));
        for args in [&["get", "m@1"][..], &["get", "hf://org/model"], &["put", "p@1", "mine"], &["ls", "--remote"]] {
            change(house.on("a")).run(args).failed(2, &[message_parts, &["remote"]].concat());
        }
        house.assert_no_artifact("a");
        house.s3.faults().clear();
    }
    assert_model(&house.on("a").run(["get", "m@1"]).path());
}

#[test]
fn passing_failures_of_s3_are_retried() {
    let house = house();
    for fault in [
        S3Fault::slow_down().times(2),
        S3Fault::internal_error().times(2),
        S3Fault::slow_down().on("model.safetensors").times(2),
        S3Fault::hang_up().on("model.safetensors").times(2),
        S3Fault::delay(FOR_EVER).on("config.json").once(),
    ] {
        let shown = format!("{fault:?}");
        let hits = house.s3.faults().add(fault.clone());
        let got = house.on("a").run(["get", "m@1"]);
        assert!(!got.stderr.contains("WARN"), "{shown}: {got}");
        assert_model(&got.path_saying(&["from remote"]));
        assert!(hits.count() > 0, "{shown} was not triggered");
        house.s3.faults().clear();
        let hits = house.s3.faults().add(fault.method("PUT"));
        house.on("a").run(["put", "p@1", "mine"]).ok().said(&["to remote"]);
        assert!(hits.count() > 0, "{shown} was not triggered");
        house.s3.faults().clear();
        assert_model(&house.on("b").run(["get", "p@1"]).path_saying(&["from remote"]));
        house.on("a").run(["evict", "p@1", "--yes"]).ok();
        fs::remove_dir_all(house.path("a")).unwrap();
        fs::remove_dir_all(house.path("b")).unwrap();
    }
}

#[test]
fn a_failure_of_s3_during_the_download_falls_back_to_the_hub() {
    let (house, commit) = House::with_model();
    house.on("publisher").run(["get", "hf://org/model"]).path();
    let reference = format!("hf://org/model@{commit}");
    let aims = [S3Fault::slow_down(), S3Fault::access_denied(), S3Fault::hang_up(), S3Fault::expired_token()];
    for fault in aims {
        house.s3.faults().add(fault.on("model.safetensors").method("GET"));
        let got = impatient(house.on("a")).run(["get", &reference]).said(&[
            "WARN",
            "model.safetensors",
            "remote",
            "trying the next",
        ]);
        assert_model(&got.path());
        house.s3.faults().clear();
        fs::remove_dir_all(house.path("a")).unwrap();
    }
}

#[test]
fn passing_failures_of_the_hub_are_retried() {
    let house = house();
    let body = "model.safetensors";
    for fault in [
        HubFault::status(503).times(2),
        HubFault::status(500).on(body).times(2),
        HubFault::hang_up().times(2),
        HubFault::delay(FOR_EVER).once(),
        HubFault::throttle(1).once(),
        HubFault::rate_limit(1).once(),
        HubFault::cut(MIB).on(body).times(3),
        HubFault::short(5).on(body).once(),
        HubFault::stall(MIB, FOR_EVER).on(body).once(),
        HubFault::flip(8 * MIB + 1).on(body).once(),
        HubFault::ignore_range(),
    ] {
        let shown = format!("{fault:?}");
        let hits = house.hub.faults().add(fault);
        assert_model(&house.on_local("a").run(["get", "hf://org/model"]).path_saying(&["from origin"]));
        assert!(hits.count() > 0, "{shown} was not triggered");
        house.hub.faults().clear();
        fs::remove_dir_all(house.path("a")).unwrap();
    }
}

#[test]
fn a_long_wait_is_reported() {
    let house = house();
    house.hub.faults().add(HubFault::rate_limit(3).once());
    let got = house.on_local("a").env("MODEL_CACHE_RETRY_DEADLINE", "30s").run(["get", "hf://org/model"]);
    assert_model(&got.said(&["waiting before the next attempt", "throttled", "wait_s"]).path());
}

#[test]
fn a_lasting_failure_of_the_hub_is_reported() {
    let house = house();
    let body = "model.safetensors";
    let hub = house.hub.url();
    for (fault, code, message_parts) in [
        (HubFault::status(503), 7, &[&hub[..], "503"][..]),
        (HubFault::status(500).on(body), 7, &["500"]),
        (HubFault::hang_up(), 7, &[&hub, "broke"]),
        (HubFault::hang_up().on(body), 7, &["broke"]),
        (HubFault::delay(FOR_EVER), 7, &[&hub, "timed out waiting for"]),
        (HubFault::throttle(3600), 7, &[&hub, "throttled", "asks to wait 3600 s", "HF_TOKEN"]),
        (HubFault::rate_limit(3600), 7, &[&hub, "throttled", "asks to wait 3600 s", "HF_TOKEN"]),
        (HubFault::throttle(3600).on(body), 7, &["throttled", "asks to wait 3600 s"]),
        (HubFault::redirect_loop(), 7, &[&hub, "still redirects after 10 redirects", "HF_ENDPOINT for the Hub"]),
        (HubFault::redirect_loop().on(body), 7, &["still redirects after 10 redirects", "HF_ENDPOINT for the Hub"]),
        (HubFault::stall(0, FOR_EVER).on(body), 7, &[&house.hub.cdn_url(), "timed out waiting for"]),
        (HubFault::cut(0).on(body), 7, &[&house.hub.cdn_url(), "broke"]),
        (HubFault::short(5).on(body), 7, &[body, "bytes early"]),
        (HubFault::flip(MIB + 7).on(body), 5, &["sha256 mismatch", body, "discarded"]),
        (HubFault::flip(3).on("config.json"), 5, &["git sha1 mismatch", "config.json", "discarded"]),
        (HubFault::lie_size(1).on(body), 5, &[body, "9441506 bytes", "9441505 bytes"]),
        (HubFault::lie_size(-1).on(body), 5, &[body, "9441504 bytes", "9441505 bytes"]),
        (HubFault::lie_size(1).on("config.json"), 5, &["config.json", "9 bytes", "8 bytes"]),
    ] {
        let shown = format!("{fault:?}");
        let hits = house.hub.faults().add(fault);
        impatient(house.on("a"))
            .run(["get", "hf://org/model"])
            .failed(code, &[message_parts, &["hf://org/model@", "origin"]].concat());
        assert!(hits.count() > 0, "{shown} was not triggered");
        house.assert_no_artifact("a");
        house.hub.faults().clear();
        let keys = house.published_keys();
        assert!(!keys.iter().any(|key| key.contains("hf/")), "nothing was published: {keys:?}");
        assert_model(&house.on_local("a").run(["get", "hf://org/model"]).path_saying(&["from origin"]));
        fs::remove_dir_all(house.path("a")).unwrap();
    }
}

#[test]
fn an_unreachable_hub_is_reported_with_a_remedy() {
    let house = house();
    for (endpoint, code, message_parts) in [
        (CLOSED_PORT, 7, &["cannot reach http://127.0.0.1:9", "check the network"][..]),
        ("http://no-such-host.invalid", 7, &["cannot reach http://no-such-host.invalid", "check the network"]),
        ("ftp://host", 2, &["HF_ENDPOINT"]),
        ("huggingface.co", 2, &["HF_ENDPOINT"]),
        (&house.s3.endpoint(), 4, &["403", "HF_ENDPOINT is the address"]),
    ] {
        let run = house.on_local("a").env("HF_ENDPOINT", endpoint).env("MODEL_CACHE_RETRY_DEADLINE", "300ms");
        run.run(["get", "hf://org/model"]).failed(code, message_parts);
        house.assert_no_artifact("a");
    }
    assert_model(&house.on("a").run(["get", "hf://org/model"]).path());
}

#[test]
fn passing_failures_of_the_network_are_retried() {
    let faults = vec![
        ProxyFault::refuse().times(2),
        ProxyFault::reset(0).times(2),
        ProxyFault::reset(2 * MIB).times(2),
        ProxyFault::cut(2 * MIB).times(2),
        ProxyFault::hang(2 * MIB).once(),
        ProxyFault::slow(1).once(),
        ProxyFault::unavailable(Some(1)).once(),
    ];
    each_in_its_own_environment(faults, |fault| {
        let house = house();
        let hub = FaultProxy::start_on(house.hub.url(), 0).unwrap();
        let s3 = FaultProxy::start_on(house.s3.endpoint(), 0).unwrap();
        house.hub.repo("org/plain").commit().plain("weights.bin", big()).publish().unwrap();
        let shown = format!("{fault:?}");
        let hits = [hub.faults().add(fault.clone()), s3.faults().add(fault)];
        let on = |run: Run| run.env("HF_ENDPOINT", hub.url()).env("AWS_ENDPOINT_URL", s3.url());
        let got = on(house.on("a").env("MODEL_CACHE_RETRY_DEADLINE", "10s")).run(["get", "m@1"]);
        assert_model(&got.path_saying(&["from remote"]));
        let run = on(house.on_local("a").env("MODEL_CACHE_RETRY_DEADLINE", "10s"));
        let got = run.run(["get", "hf://org/plain"]).path_saying(&["from origin"]);
        assert_same(&got.join("weights.bin"), &big());
        assert!(hits.iter().all(|hits| hits.count() > 0), "{shown} was not triggered");
    });
}

#[test]
fn a_lasting_failure_of_the_network_ends_in_7() {
    let faults = vec![
        ProxyFault::refuse(),
        ProxyFault::reset(10),
        ProxyFault::cut(10),
        ProxyFault::hang(10),
        ProxyFault::slow(1),
        ProxyFault::answer(502),
    ];
    each_in_its_own_environment(faults, |fault| {
        let house = house();
        let hub = FaultProxy::start_on(house.hub.url(), 0).unwrap();
        let s3 = FaultProxy::start_on(house.s3.endpoint(), 0).unwrap();
        for proxy in [&hub, &s3] {
            proxy.faults().add(fault.clone());
        }
        let on = |run: Run| impatient(run).env("HF_ENDPOINT", hub.url()).env("AWS_ENDPOINT_URL", s3.url());
        on(house.on("a")).run(["get", "m@1"]).failed(7, &["m@1", "remote", "127.0.0.1"]);
        on(house.on_local("a")).run(["get", "hf://org/model"]).failed(7, &["hf://org/model", "origin", "127.0.0.1"]);
        house.assert_no_artifact("a");
        for proxy in [&hub, &s3] {
            proxy.faults().clear();
            proxy.sever();
        }
        assert_model(&on(house.on("a")).run(["get", "m@1"]).path_saying(&["from remote"]));
        assert_model(&on(house.on("a")).run(["get", "hf://org/model"]).path());
    });
}
