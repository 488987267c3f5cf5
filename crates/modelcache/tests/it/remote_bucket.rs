//! S3 remotes: refusals, regions, throttling, lost responses, and the sources of credentials.

use crate::remote_support::*;
use modelcache::config::{Environment, RemoteConfig};
use modelcache::remote::Remote;
use modelcache::source::Source;
use modelcache::{Error, ErrorKind, Tier};
use modelcache_testkit::S3;
use modelcache_testkit::s3::S3Fault;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

async fn started() -> S3 {
    let s3 = S3::start().await.expect("starts");
    s3.bucket(BUCKET).expect("bucket");
    s3
}

fn open(config: &RemoteConfig) -> Remote {
    Remote::open(config, retry()).expect("opens")
}

/// Returns true if the remote has a manifest of `m@1`.
async fn exists(remote: &Remote) -> Result<bool, Error> {
    Ok(remote.source(&key("m@1")).manifest().await?.is_some())
}

/// Returns the error of a read of the manifest under `fault`.
async fn refused(s3: &S3, fault: S3Fault) -> Error {
    s3.faults().clear();
    s3.faults().add(fault);
    let error = exists(&open(&s3_config(s3, &[]))).await.expect_err("refused");
    assert_eq!(error.failed_tier(), Some(Tier::Remote));
    error
}

/// Returns the error and its hint as text.
fn text(error: &Error) -> String {
    format!("{error} / {}", error.hint_text().unwrap_or_default())
}

#[tokio::test]
async fn opening_a_remote_uses_no_network_and_reads_no_file() {
    let config = RemoteConfig {
        url: "s3://b/p".into(),
        options: BTreeMap::from([("endpoint".into(), "http://127.0.0.1:1".into())]),
        environment: Environment(HashMap::from([("AWS_CA_BUNDLE".into(), "/nowhere".into())])),
    };
    let started = Instant::now();
    let remote = open(&config);
    assert!(started.elapsed() < Duration::from_millis(50), "{:?}", started.elapsed());
    assert_eq!(remote.url(), "s3://b/p");
    let error = exists(&remote).await.expect_err("no certificates");
    assert!(text(&error).contains("AWS_CA_BUNDLE"), "{}", text(&error));
}

#[tokio::test]
async fn a_missing_bucket_is_never_a_missing_artifact() {
    let s3 = S3::start().await.expect("starts");
    let remote = open(&s3_config(&s3, &[]));
    let tree = Tree::new("m@1", &[("a", 5)]);
    let progress = modelcache::progress::Progress::new();
    for error in [
        exists(&remote).await.expect_err("no bucket"),
        remote.list().await.expect_err("no bucket"),
        remote
            .publish(&tree.manifest, &tree.local_files(), Default::default(), &progress)
            .await
            .expect_err("no bucket"),
    ] {
        assert_eq!((error.kind(), error.is_transient()), (ErrorKind::Invalid, false), "{error}");
        assert!(text(&error).contains("\"models\"") && text(&error).contains("s3://BUCKET"), "{}", text(&error));
    }
}

#[tokio::test]
async fn refusals_have_a_remedy() {
    let s3 = started().await;
    let rows = [
        (S3Fault::invalid_access_key(), ErrorKind::Unauthorized, "AWS_ACCESS_KEY_ID"),
        (S3Fault::error(403, "SignatureDoesNotMatch", "no"), ErrorKind::Unauthorized, "AWS_SECRET_ACCESS_KEY"),
        (S3Fault::expired_token(), ErrorKind::Unauthorized, "expired"),
        (S3Fault::clock_skew(), ErrorKind::Unauthorized, "clock"),
        (S3Fault::wrong_region("eu-west-3"), ErrorKind::Invalid, "AWS_REGION=eu-west-3"),
        (S3Fault::error(301, "PermanentRedirect", "elsewhere"), ErrorKind::Invalid, "AWS_REGION"),
    ];
    for (fault, kind, word) in rows {
        let error = refused(&s3, fault).await;
        assert_eq!((error.kind(), error.is_transient()), (kind, false), "{error}");
        assert!(text(&error).contains(word), "{}", text(&error));
        assert_eq!(error.artifact_name(), Some("m@1"));
    }
}

#[tokio::test]
async fn wrong_keys_are_refused_by_the_server_itself() {
    let s3 = started().await;
    let unknown = s3_config(&s3, &[("access_key_id", "NOBODY"), ("secret_access_key", "canary-secret")]);
    let error = exists(&open(&unknown)).await.expect_err("unknown key");
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    let wrong = s3_config(&s3, &[("access_key_id", s3.access_key()), ("secret_access_key", "canary-secret")]);
    let remote = open(&wrong);
    let error = exists(&remote).await.expect_err("wrong secret");
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    let printed = format!("{error:?} {} {remote:?} {wrong:?} {:?}", text(&error), remote.source(&key("m@1")));
    assert!(!printed.replace(&format!("{wrong:?}"), "").contains("canary-secret"), "{printed}");
}

#[tokio::test]
async fn an_ambiguous_403_is_a_miss_and_publishing_still_protects_existing_objects() {
    let s3 = started().await;
    s3.faults().add(S3Fault::no_list_permission());
    let remote = open(&s3_config(&s3, &[]));
    assert!(!exists(&remote).await.expect("a miss"));
    let tree = Tree::new("m@1", &[("a", 5)]);
    let progress = modelcache::progress::Progress::new();
    remote
        .publish(&tree.manifest, &tree.local_files(), Default::default(), &progress)
        .await
        .expect("publishes without listing");
    assert!(exists(&remote).await.expect("there"));
    s3.put(BUCKET, "some/prefix/n/1/a", modelcache_testkit::Content::generated(1, 9)).expect("puts");
    let tree = Tree::new("n@1", &[("a", 5)]);
    let error = remote
        .publish(&tree.manifest, &tree.local_files(), Default::default(), &progress)
        .await
        .expect_err("unmanaged");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(remote.list().await.expect_err("no right").kind(), ErrorKind::Unauthorized);
}

#[tokio::test]
async fn slow_down_and_broken_connections_are_retried() {
    for fault in [S3Fault::slow_down, S3Fault::internal_error, S3Fault::hang_up] {
        let place = Place::bucket().await;
        let hits = place.s3().faults().add(fault().times(3));
        place.publish(&Tree::new("m@1", &[("a", 500)])).await.expect("publishes in the end");
        assert_eq!(hits.count(), 3);
        place.s3().faults().add(fault().times(2));
        assert_eq!(
            place.another().source(&key("m@1")).manifest().await.expect("reads in the end").map(|m| m.files.len()),
            Some(1)
        );
    }
}

#[tokio::test]
async fn reading_a_body_is_one_attempt() {
    let place = Place::bucket().await;
    place.publish(&Tree::new("m@1", &[("a", 500)])).await.expect("publishes");
    let source = place.remote().source(&key("m@1"));
    source.manifest().await.expect("reads");
    let hits = place.s3().faults().add(S3Fault::slow_down().on("/a?"));
    let error = source.read(&path("a"), 0..500).await.expect_err("slow down");
    assert_eq!((error.kind(), error.is_transient(), hits.count()), (ErrorKind::Unavailable, true, 1));
}

#[tokio::test]
async fn lost_responses_do_no_harm() {
    for (method, part) in [
        ("PUT", "claim"),
        ("PUT", "manifest.json"),
        ("PUT", "/a?"),
        ("DELETE", "claim"),
        ("POST", "big"),
        ("PUT", "big"),
    ] {
        let place = Place::bucket().await;
        let hits = place.s3().faults().add(S3Fault::lose_reply().method(method).on(part).once());
        let tree = Tree::new("m@1", &[("a", 500), ("big", 9 << 20)]);
        place.publish(&tree).await.unwrap_or_else(|error| panic!("{method} {part}: {error}"));
        assert_eq!(hits.count(), 1, "{method} {part}");
        assert_same_files(&place.another().source(&tree.key()), &tree).await;
        assert!(!place.keys().iter().any(|key| key.ends_with("claim")), "{method} {part}");
    }
}

#[tokio::test]
async fn a_failing_part_aborts_the_upload_and_the_next_publish_succeeds() {
    let place = Place::bucket().await;
    let tree = Tree::new("m@1", &[("big", 20 << 20)]);
    place.s3().faults().add(S3Fault::access_denied().method("PUT").on("partNumber=2").once());
    assert_eq!(place.publish(&tree).await.expect_err("denied").kind(), ErrorKind::Unauthorized);
    assert!(
        place.s3().requests().iter().any(|seen| seen.method == "DELETE" && seen.query.contains("uploadId")),
        "aborted"
    );
    place.publish(&tree).await.expect("publishes");
    assert_same_files(&place.remote().source(&tree.key()), &tree).await;
}

#[tokio::test]
async fn a_failure_at_any_request_leaves_old_or_new() {
    let tree = Tree::new("m@1", &[("a", 500), ("big", 9 << 20)]);
    let definite: fn() -> S3Fault = S3Fault::invalid_access_key;
    for (fault, ambiguous) in [(definite, false), (S3Fault::access_denied, true)] {
        for nth in 0.. {
            let place = Place::bucket().await;
            let hits = place.s3().faults().add(fault().after_skipping(nth).once());
            let published = place.publish(&tree).await;
            if hits.count() == 0 {
                assert!(nth > 5, "{nth} requests");
                break;
            }
            let there = place.another().source(&tree.key()).manifest().await.expect("old or new");
            if let Some(there) = &there {
                assert!(there.files.values().all(|entry| entry.held.is_some()), "request {nth}");
            }
            assert!(published.is_err() || there.is_some(), "request {nth}: success means published");
            place.publish(&tree).await.unwrap_or_else(|error| panic!("after request {nth} failed: {error}"));
            assert_same_files(&place.another().source(&tree.key()), &tree).await;
            // After an ambiguous 403 the writer takes its claim for removed. Such a claim expires by itself.
            let keys: Vec<String> =
                place.keys().into_iter().filter(|key| !(ambiguous && key.ends_with("claim"))).collect();
            assert_eq!(keys, ["m/1/.modelcache/manifest.json", "m/1/a", "m/1/big"], "request {nth}");
        }
    }
}

#[tokio::test]
async fn a_failure_at_any_request_of_an_evict_leaves_old_or_nothing() {
    let tree = Tree::new("m@1", &[("a", 500), ("b", 9)]);
    for nth in 0.. {
        let place = Place::bucket().await;
        place.publish(&tree).await.expect("publishes");
        let hits = place.s3().faults().add(S3Fault::error(403, "InvalidAccessKeyId", "no").after_skipping(nth).once());
        let _ = place.remote().evict(&tree.key(), false).await;
        if hits.count() == 0 {
            break;
        }
        if place.another().source(&tree.key()).manifest().await.expect("old or nothing").is_some() {
            assert_same_files(&place.another().source(&tree.key()), &tree).await;
        }
        place.remote().evict(&tree.key(), false).await.expect("evicts");
        assert!(place.keys().is_empty(), "request {nth}: {:?}", place.keys());
    }
}

#[tokio::test]
async fn a_store_that_is_down_is_unavailable() {
    let place = Place::bucket().await;
    place.s3().down(true);
    let config = RemoteConfig { url: format!("s3://{BUCKET}"), ..s3_config(place.s3(), &[]) };
    let quick = modelcache::transfer::Retry::new(modelcache::config::RetryConfig {
        deadline: Duration::from_millis(300),
        read_timeout: Duration::from_millis(500),
    });
    let remote = Remote::open(&config, quick.clone()).expect("opens");
    let error = exists(&remote).await.expect_err("down");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    place.s3().down(false);
    place.s3().faults().add(S3Fault::delay(Duration::from_secs(30)));
    let started = Instant::now();
    let error = exists(&remote).await.expect_err("hangs");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());

    let refused =
        RemoteConfig { options: BTreeMap::from([("endpoint".into(), "http://127.0.0.1:1".into())]), ..config };
    let error = exists(&Remote::open(&refused, quick).expect("opens")).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

#[tokio::test]
async fn listings_continue_beyond_one_page() {
    let place = Place::bucket().await;
    for at in 0..2_501 {
        place.put(&format!("aaa/{at:04}"), b"x");
    }
    place.publish(&Tree::new("zzz@1", &[("a", 5)])).await.expect("publishes");
    assert_eq!(place.remote().list().await.expect("lists").len(), 1);
}

fn environment(s3: &S3, pairs: &[(&str, &str)]) -> RemoteConfig {
    let mut variables: HashMap<String, String> =
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    variables.insert("AWS_EC2_METADATA_DISABLED".into(), "true".into());
    RemoteConfig {
        url: format!("s3://{BUCKET}"),
        options: BTreeMap::from([("endpoint".into(), s3.endpoint())]),
        environment: Environment(variables),
    }
}

fn aws_files(home: &Path, credentials: &str, config: &str) {
    let folder = home.join(".aws");
    std::fs::create_dir_all(&folder).expect("folder");
    std::fs::write(folder.join("credentials"), credentials).expect("writes");
    std::fs::write(folder.join("config"), config).expect("writes");
}

#[tokio::test]
async fn the_files_of_aws_configure_are_enough() {
    let s3 = started().await;
    let home = tempfile::tempdir().expect("home");
    let keys = format!("aws_access_key_id = {}\naws_secret_access_key = {}\n", s3.access_key(), s3.secret_key());
    aws_files(home.path(), &format!("[default]\n{keys}"), "[default]\nregion = us-east-1\noutput = json\n");
    let at_home = [("HOME", home.path().to_str().expect("text"))];
    assert!(!exists(&open(&environment(&s3, &at_home))).await.expect("let in"));

    aws_files(
        home.path(),
        &format!("[default]\naws_access_key_id = no\naws_secret_access_key = no\n[team]\n{keys}"),
        "[profile team]\nregion = us-east-1\n",
    );
    assert_eq!(
        exists(&open(&environment(&s3, &at_home))).await.expect_err("the default is wrong").kind(),
        ErrorKind::Unauthorized
    );
    let team = [at_home[0], ("AWS_PROFILE", "team")];
    assert!(!exists(&open(&environment(&s3, &team))).await.expect("let in"));

    aws_files(home.path(), "", &format!("[profile tool]\ncredential_process = {}/tool --now\n", home.path().display()));
    let script = format!(
        "#!/bin/sh\necho '{{\"Version\":1,\"AccessKeyId\":\"{}\",\"SecretAccessKey\":\"{}\",\"Expiration\":\"2099-01-01T00:00:00Z\"}}'\n",
        s3.access_key(),
        s3.secret_key()
    );
    let program = home.path().join("tool");
    std::fs::write(&program, script).expect("writes");
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    let tool = [at_home[0], ("AWS_PROFILE", "tool"), ("PATH", "/usr/bin:/bin")];
    assert!(!exists(&open(&environment(&s3, &tool))).await.expect("let in"));
}

#[tokio::test]
async fn missing_credentials_are_reported_with_the_places_that_were_searched() {
    let s3 = started().await;
    let home = tempfile::tempdir().expect("home");
    let config = environment(&s3, &[("HOME", home.path().to_str().expect("text")), ("AWS_PROFILE", "nobody")]);
    let error = exists(&open(&config)).await.expect_err("none");
    assert_eq!((error.kind(), error.is_transient()), (ErrorKind::Unauthorized, false));
    for word in
        ["AWS_ACCESS_KEY_ID", "\"nobody\"", ".aws/credentials", "instance metadata (disabled by", "aws configure"]
    {
        assert!(text(&error).contains(word), "{word}: {}", text(&error));
    }
    assert!(s3.requests().is_empty(), "nothing unsigned is sent");
    let open_bucket = RemoteConfig {
        options: BTreeMap::from([("endpoint".into(), s3.endpoint()), ("skip_signature".into(), "true".into())]),
        ..config
    };
    let _ = exists(&open(&open_bucket)).await;
    assert!(s3.requests().iter().all(|seen| !seen.authorized()) && !s3.requests().is_empty());
}

#[tokio::test]
async fn an_unreachable_metadata_service_fails_fast() {
    let s3 = started().await;
    let mut config = environment(&s3, &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")]);
    config.environment.0.remove("AWS_EC2_METADATA_DISABLED");
    let remote = open(&config);
    let started = Instant::now();
    for _ in 0..20 {
        assert_eq!(exists(&remote).await.expect_err("none").kind(), ErrorKind::Unauthorized);
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

/// Starts a server on loopback that answers every request with the body `answer(head)`, or with 404 if it is empty.
async fn answering(answer: impl Fn(&str) -> String + Send + 'static) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = format!("http://{}", listener.local_addr().expect("address"));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            let mut buffer = [0; 4096];
            while !head.windows(4).any(|window| window == b"\r\n\r\n") {
                match stream.read(&mut buffer).await {
                    Ok(got) if got > 0 => head.extend_from_slice(&buffer[..got]),
                    _ => break,
                }
            }
            let body = answer(&String::from_utf8_lossy(&head));
            let status = if body.is_empty() { "404 Not Found" } else { "200 OK" };
            let text =
                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
            let _ = stream.write_all(text.as_bytes()).await;
        }
    });
    address
}

#[tokio::test]
async fn containers_and_instances_have_credentials() {
    let s3 = started().await;
    let folder = tempfile::tempdir().expect("folder");
    let token = folder.path().join("token");
    std::fs::write(&token, "pod-token\n").expect("writes");
    let json = format!(
        r#"{{"Code":"Success","AccessKeyId":"{}","SecretAccessKey":"{}","Token":"session","Expiration":"2099-01-01T00:00:00Z"}}"#,
        s3.access_key(),
        s3.secret_key()
    );
    let pod = json.clone();
    let service = answering(move |head| {
        let authorized = head.to_lowercase().contains("authorization: pod-token");
        if head.starts_with("GET /creds") && authorized { pod.clone() } else { String::new() }
    })
    .await;
    let config = environment(
        &s3,
        &[
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{service}/creds")),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token.to_str().expect("text")),
        ],
    );
    assert!(!exists(&open(&config)).await.expect("let in"));

    let metadata = answering(move |head| match head.split(' ').take(2).collect::<Vec<_>>().as_slice() {
        ["PUT", "/latest/api/token"] => "imds-token".into(),
        ["GET", "/latest/meta-data/iam/security-credentials/"] => "role".into(),
        ["GET", "/latest/meta-data/iam/security-credentials/role"] if head.contains("imds-token") => json.clone(),
        _ => String::new(),
    })
    .await;
    let mut config = environment(&s3, &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata)]);
    config.environment.0.remove("AWS_EC2_METADATA_DISABLED");
    assert!(!exists(&open(&config)).await.expect("let in"));
}

#[tokio::test]
async fn a_profile_may_name_a_role() {
    let s3 = started().await;
    let home = tempfile::tempdir().expect("home");
    let xml = format!(
        "<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>{}</AccessKeyId><SecretAccessKey>{}</SecretAccessKey>\
         <SessionToken>session</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>",
        s3.access_key(),
        s3.secret_key()
    );
    let sts = answering(move |head| {
        let good = head.contains("Action=AssumeRole")
            && head.contains("RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Freader")
            && head.contains("Credential=SOURCEKEY/");
        if good { xml.clone() } else { String::new() }
    })
    .await;
    aws_files(
        home.path(),
        "[base]\naws_access_key_id = SOURCEKEY\naws_secret_access_key = s\n",
        "[profile reader]\nrole_arn = arn:aws:iam::1:role/reader\nsource_profile = base\n[profile alone]\nrole_arn = arn:aws:iam::1:role/x\n",
    );
    let home = home.path().to_str().expect("text");
    let config = environment(&s3, &[("HOME", home), ("AWS_PROFILE", "reader"), ("AWS_ENDPOINT_URL_STS", &sts)]);
    assert!(!exists(&open(&config)).await.expect("let in"));
    let config = environment(&s3, &[("HOME", home), ("AWS_PROFILE", "alone"), ("AWS_ENDPOINT_URL_STS", &sts)]);
    let error = exists(&open(&config)).await.expect_err("no source");
    assert!(text(&error).contains("source_profile"), "{}", text(&error));
}

#[tokio::test]
async fn an_expired_token_is_renewed() {
    let s3 = started().await;
    let home = tempfile::tempdir().expect("home");
    let keys = format!("aws_access_key_id = {}\naws_secret_access_key = {}\n", s3.access_key(), s3.secret_key());
    aws_files(home.path(), &format!("[default]\n{keys}"), "");
    let remote = open(&environment(&s3, &[("HOME", home.path().to_str().expect("text"))]));
    s3.faults().add(S3Fault::expired_token().once());
    let error = exists(&remote).await.expect_err("fresh credentials that are called expired");
    assert_eq!((error.kind(), error.is_transient()), (ErrorKind::Unauthorized, false));
    tokio::time::sleep(Duration::from_millis(10_100)).await;
    let hits = s3.faults().add(S3Fault::expired_token().once());
    assert!(!exists(&remote).await.expect("renewed and tried again"));
    assert_eq!(hits.count(), 1);
}

/// Runs only if TESTKIT_MOTO_VENV names a Python environment with the real moto server. The stand-in cannot store such
/// keys.
#[tokio::test]
async fn odd_keys_do_not_break_listings() {
    let Some(place) = Place::moto() else { return };
    let http = reqwest::Client::new();
    for odd in
        ["some/prefix/a//b", "some/prefix//c", "some/prefix/folder/", "some/prefix/m/1/x//y", "some/prefix/z%01z"]
    {
        let put = http.put(format!("{}/{BUCKET}/{odd}", place.endpoint())).body("x").send().await.expect("answers");
        assert!(put.status().is_success(), "{odd}: {}", put.status());
    }
    let tree = Tree::new("m@1", &[("a", 5)]);
    place.publish(&tree).await.expect("publishes");
    assert_eq!(place.remote().list().await.expect("lists").len(), 1);
    assert_same_files(&place.remote().source(&tree.key()), &tree).await;
}
