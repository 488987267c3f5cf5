//! Servers that send wrong bytes, trickle, or never end, for every source that has a server.
//!
//! A wrong answer that can be detected leads to a retry or to an error, and the next honest get has the right bytes.
//! Other bytes of the right length cannot be detected without a digest. Then the first download is trusted
//! (`first-seen`), and the suite accepts it.

use crate::common::House;
use modelcache::cache::{GetOptions, PutOptions};
use modelcache::config::{BucketConfig, Config, Environment, HubConfig, MlflowConfig, RemoteConfig, Secret};
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Cache, Error, ErrorKind, Reference, Result};
use modelcache_testkit::{Gate, Lie, Page, Ranges, S3, Web, content};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A file on a server behind a gate that can falsify answers.
struct Subject {
    name: &'static str,
    house: House,
    gate: Gate,
    config: Box<dyn Fn(&str) -> Config>,
    reference: String,
    /// A digest of the file is known.
    has_digest: bool,
    /// Part of the path in requests for the file.
    aim: &'static str,
    /// Parts of the paths in metadata requests, each of which occurs.
    metadata: Vec<&'static str>,
    /// The size is known from an answer other than the one with the bytes.
    knows_size: bool,
    /// Ranges are served, so that answers have a `Content-Range`.
    has_ranges: bool,
    /// Answers without a `Content-Length` are accepted.
    takes_chunks: bool,
    _servers: Vec<Arc<dyn std::any::Any + Send + Sync>>,
}

impl Subject {
    async fn get(&self, dir: &str) -> Result<Vec<u8>> {
        self.get_within(Duration::from_secs(1), dir).await
    }

    /// Gets the file with a long read timeout, so that a slow machine causes no failure.
    async fn get_patiently(&self, dir: &str) -> Result<Vec<u8>> {
        self.get_within(Duration::from_secs(30), dir).await
    }

    async fn get_within(&self, read_timeout: Duration, dir: &str) -> Result<Vec<u8>> {
        let mut config = (self.config)(&self.house.path(dir).display().to_string());
        config.retry.read_timeout = read_timeout;
        let cache = Cache::open(config).unwrap();
        let reference = Reference::parse(&self.reference).unwrap();
        let artifact = cache.get_with(&reference, &GetOptions::default(), &Progress::new()).await?;
        Ok(std::fs::read(file_at(artifact.path)).unwrap())
    }
}

/// Returns the file, or the only file in the folder.
fn file_at(path: PathBuf) -> PathBuf {
    match path.is_dir() {
        true => std::fs::read_dir(path).unwrap().next().unwrap().unwrap().path(),
        false => path,
    }
}

fn at(gate: &Gate, s3: &S3) -> Environment {
    let with_gate = |(name, value): (String, String)| match name.as_str() {
        "AWS_ENDPOINT_URL" => (name, gate.url()),
        _ => (name, value),
    };
    Environment(s3.env().into_iter().map(with_gate).collect())
}

/// The uses of a bucket that are tested.
enum Bucket {
    Published,
    Unmanaged,
    UnmanagedWithSidecar,
    Origin,
}

async fn in_a_bucket(kind: Bucket, content: &[u8]) -> Subject {
    let (house, s3) = (House::new().await, S3::start().await.unwrap());
    s3.bucket("models").unwrap();
    let gate = Gate::transparent(s3.endpoint().strip_prefix("http://").unwrap().parse().unwrap()).unwrap();
    let remote = |environment| RemoteConfig { url: "s3://models".into(), options: BTreeMap::new(), environment };
    let base = house.config("base");
    match kind {
        Bucket::Published => {
            let file = house.path("model.bin");
            std::fs::write(&file, content).unwrap();
            let honest = Environment(s3.env().into_iter().collect());
            let cache = Cache::open({
                let mut config = house.config("publisher");
                config.remote = Some(remote(honest));
                config
            })
            .unwrap();
            let key = ArtifactKey::bare("m@1").unwrap();
            cache.put_with(&key, &file, &PutOptions::default(), &Progress::new()).await.unwrap();
        }
        _ => s3.put("models", "m/1/model.bin", content.to_vec()).unwrap(),
    }
    if let Bucket::UnmanagedWithSidecar = kind {
        s3.put("models", "m/1/model.bin.sha256", content::sha256(content)).unwrap();
    }
    let environment = at(&gate, &s3);
    let is_origin = matches!(kind, Bucket::Origin);
    let config: Box<dyn Fn(&str) -> Config> = Box::new(move |dir| {
        let mut config = base.clone();
        config.dir = dir.into();
        config.remote = (!is_origin).then(|| remote(environment.clone()));
        config.buckets = BucketConfig { environment: environment.clone(), ..BucketConfig::default() };
        config
    });
    let (name, has_digest, metadata) = match kind {
        Bucket::Published => ("published on S3", true, vec!["manifest.json"]),
        Bucket::Unmanaged => ("unmanaged on S3", false, vec!["manifest.json", "list-type=2"]),
        Bucket::UnmanagedWithSidecar => ("unmanaged on S3, .sha256", true, vec!["list-type=2", ".sha256"]),
        Bucket::Origin => ("s3 origin", false, vec!["list-type=2"]),
    };
    let reference = if is_origin { "s3://models/m/1/model.bin".to_owned() } else { "m@1".to_owned() };
    Subject {
        name,
        house,
        gate,
        config,
        reference,
        has_digest,
        aim: "model.bin?",
        metadata,
        knows_size: true,
        has_ranges: true,
        takes_chunks: false,
        _servers: vec![Arc::new(s3)],
    }
}

async fn on_the_web(page: Page, has_digest: bool, has_ranges: bool) -> Subject {
    let (house, web) = (House::new().await, Web::start().unwrap());
    web.put("/model.bin", page.etag("\"v\""));
    let gate = Gate::start(web.addr()).unwrap();
    let base = house.config("base");
    Subject {
        name: if has_digest { "web page with a digest" } else { "web page" },
        house,
        reference: format!("{}/model.bin", gate.url()),
        gate,
        config: Box::new(move |dir| {
            let mut config = base.clone();
            config.dir = dir.into();
            config
        }),
        has_digest,
        aim: "model.bin?",
        metadata: vec![".sha256"],
        knows_size: has_ranges,
        has_ranges,
        takes_chunks: true,
        _servers: vec![Arc::new(web)],
    }
}

async fn on_the_hub(content: &[u8]) -> Subject {
    let house = House::new().await;
    house.hub.repo("org/model").commit().plain("model.bin", content.to_vec()).publish().unwrap();
    let gate = Gate::start(house.hub.url().strip_prefix("http://").unwrap().parse().unwrap()).unwrap();
    let hub = HubConfig { endpoint: gate.url(), ..HubConfig::default() };
    let base = {
        let mut config = house.config("base");
        config.hub = hub;
        config
    };
    Subject {
        name: "Hub",
        house,
        gate,
        config: Box::new(move |dir| {
            let mut config = base.clone();
            config.dir = dir.into();
            config
        }),
        reference: "hf://org/model".into(),
        has_digest: true,
        aim: "/resolve/",
        metadata: vec!["/revision/", "/tree/"],
        knows_size: true,
        has_ranges: true,
        takes_chunks: true,
        _servers: Vec::new(),
    }
}

async fn in_a_registry(content: &[u8]) -> Subject {
    let (house, web) = (House::new().await, Web::start().unwrap());
    let digest = content::sha256(content);
    let manifest = format!(
        r#"{{"schemaVersion":2,"layers":[{{"mediaType":"x/y","digest":"sha256:{digest}","size":{},
            "annotations":{{"org.opencontainers.image.title":"model.bin"}}}}]}}"#,
        content.len()
    );
    web.put(&format!("/v2/m/manifests/sha256:{}", content::sha256(manifest.as_bytes())), Page::of(manifest.clone()));
    web.put("/v2/m/manifests/1", Page::of(manifest));
    web.put(&format!("/v2/m/blobs/sha256:{digest}"), Page::of(content.to_vec()));
    let gate = Gate::start(web.addr()).unwrap();
    let base = house.config("base");
    Subject {
        name: "OCI registry",
        house,
        reference: format!("oci://{}/m:1", gate.addr()),
        gate,
        config: Box::new(move |dir| {
            let mut config = base.clone();
            config.dir = dir.into();
            config
        }),
        has_digest: true,
        aim: "/blobs/",
        metadata: vec!["/manifests/"],
        knows_size: true,
        has_ranges: true,
        takes_chunks: true,
        _servers: vec![Arc::new(web)],
    }
}

async fn at_mlflow(content: &[u8]) -> Subject {
    let (house, web) = (House::new().await, Web::start().unwrap());
    let api = "/api/2.0/mlflow/model-versions";
    web.put(&format!("{api}/get"), Page::of(r#"{"model_version":{"version":"1","status":"READY"}}"#));
    web.put(&format!("{api}/get-download-uri"), Page::of(r#"{"artifact_uri":"mlflow-artifacts:/1/a"}"#));
    let list = format!(r#"{{"files":[{{"path":"model.bin","is_dir":false,"file_size":{}}}]}}"#, content.len());
    web.put("/api/2.0/mlflow-artifacts/artifacts", Page::of(list));
    web.put("/api/2.0/mlflow-artifacts/artifacts/1/a/model.bin", Page::of(content.to_vec()));
    let gate = Gate::start(web.addr()).unwrap();
    let tracking_uri = Some(Secret::new(gate.url()));
    let mut base = house.config("base");
    base.mlflow = MlflowConfig { tracking_uri, ..MlflowConfig::default() };
    Subject {
        name: "MLflow",
        house,
        gate,
        config: Box::new(move |dir| {
            let mut config = base.clone();
            config.dir = dir.into();
            config
        }),
        reference: "models:/m/1".into(),
        has_digest: false,
        aim: "model.bin?",
        metadata: vec!["/get?", "/get-download-uri", "/artifacts?"],
        knows_size: true,
        has_ranges: false,
        takes_chunks: true,
        _servers: vec![Arc::new(web)],
    }
}

async fn every_subject(content: &[u8]) -> Vec<Subject> {
    let digest = content::sha256(content);
    let page = || Page::of(content.to_vec());
    vec![
        in_a_bucket(Bucket::Published, content).await,
        in_a_bucket(Bucket::Unmanaged, content).await,
        in_a_bucket(Bucket::UnmanagedWithSidecar, content).await,
        in_a_bucket(Bucket::Origin, content).await,
        on_the_web(page(), false, true).await,
        on_the_web(page().header("x-checksum-sha256", digest), true, true).await,
        on_the_web(page().ranges(Ranges::Ignored), false, false).await,
        on_the_hub(content).await,
        in_a_registry(content).await,
        at_mlflow(content).await,
    ]
}

/// A false answer, and the properties that a subject needs so that its server can give it.
struct LieCase {
    name: &'static str,
    lie: fn() -> Lie,
    needs_range: bool,
    needs_chunks: bool,
    /// Only a digest can detect it.
    is_plausible: bool,
}

const LIES: [LieCase; 8] = [
    LieCase { name: "too long in front", lie: || Lie::prepend(120, true), ..HONEST },
    LieCase { name: "too long in front, chunked", lie: || Lie::prepend(120, false), needs_chunks: true, ..HONEST },
    LieCase { name: "trailing bytes, chunked", lie: || Lie::append(120, false), needs_chunks: true, ..HONEST },
    LieCase { name: "too short", lie: || Lie::short(120), ..HONEST },
    LieCase { name: "other bytes", lie: Lie::flip, is_plausible: true, ..HONEST },
    LieCase { name: "other range", lie: || Lie::other_range(7), needs_range: true, ..HONEST },
    LieCase { name: "other size", lie: || Lie::other_size(7), needs_range: true, ..HONEST },
    LieCase { name: "encoded", lie: || Lie::encoded("gzip"), ..HONEST },
];
const HONEST: LieCase =
    LieCase { name: "", lie: || Lie::short(0), needs_range: false, needs_chunks: false, is_plausible: false };

async fn no_lie_gives_wrong_bytes(content: Vec<u8>) {
    for subject in every_subject(&content).await {
        assert!(subject.get_patiently("honest").await.unwrap() == content, "{}", subject.name);
        for case in LIES {
            if case.needs_range && !subject.has_ranges || case.needs_chunks && !subject.takes_chunks {
                continue;
            }
            for once in [true, false] {
                let what = format!("{}: {}, {}", subject.name, case.name, if once { "once" } else { "always" });
                let lie = (case.lie)().method("GET").on(subject.aim);
                let hits = subject.gate.lies().add(if once { lie.once() } else { lie });
                let got = subject.get_patiently("lied").await;
                assert!(hits.count() > 0, "{what}: the false answer was not sent: {:?}", got.as_ref().err());
                // Consistently false answers cannot be distinguished from another file: the first download is trusted.
                let is_plausible = !subject.has_digest && (case.is_plausible || !subject.knows_size);
                match &got {
                    Ok(bytes) => assert!(is_plausible || *bytes == content, "{what}: wrong bytes, and no error"),
                    Err(error) => assert!(!once || !subject.knows_size, "{what}: {error}"),
                }
                let is_found_out = got.is_err();
                subject.gate.lies().clear();
                if is_found_out {
                    assert!(subject.get_patiently("lied").await.unwrap() == content, "{what}: honest again");
                }
                std::fs::remove_dir_all(subject.house.path("lied")).unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_answers_lead_to_a_retry_or_an_error_for_a_file_of_one_slice() {
    no_lie_gives_wrong_bytes(content::bytes(1, 70_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_answers_lead_to_a_retry_or_an_error_for_a_file_of_two_parts() {
    no_lie_gives_wrong_bytes(content::bytes(2, (8 << 20) + 70_000)).await;
}

/// Asserts that a get fails within `seconds`, and returns its error.
async fn ends(subject: &Subject, what: &str, seconds: u64) -> Error {
    let began = Instant::now();
    let got = tokio::time::timeout(Duration::from_secs(60), subject.get("hostile")).await;
    let got = got.unwrap_or_else(|_| panic!("{}: {what}: does not end", subject.name));
    let error = got.map(|_| ()).expect_err(&format!("{}: {what}", subject.name));
    let took = began.elapsed().as_secs();
    assert!(took <= seconds, "{}: {what}: {took} s: {error}", subject.name);
    let _ = std::fs::remove_dir_all(subject.house.path("hostile"));
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn trickling_metadata_times_out() {
    let content = content::bytes(3, 1000);
    let subjects = every_subject(&content).await;
    let all = subjects.iter().map(|subject| async move {
        for aim in &subject.metadata {
            for status in [200, 503] {
                let lie = Lie::endless(status, &b"  "[..], Duration::from_millis(300)).method("GET").on(*aim);
                let hits = subject.gate.lies().add(lie);
                let error = ends(subject, &format!("{aim} {status} at 7 bytes/s"), 20).await;
                assert!(hits.count() > 0, "{}: {aim} was not requested", subject.name);
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{}: {aim} {status}: {error}", subject.name);
                subject.gate.lies().clear();
            }
        }
    });
    futures::future::join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_bodies_use_bounded_memory() {
    let content = content::bytes(4, 1000);
    for subject in every_subject(&content).await {
        for aim in &subject.metadata {
            for status in [200, 403] {
                let before = subject.gate.endless_bytes();
                let lie = Lie::endless(status, vec![b' '; 1 << 20], Duration::ZERO).method("GET").on(*aim);
                subject.gate.lies().add(lie.once());
                // The get may succeed: an endless checksum file is ignored, and a refusal may count as absence.
                let _ = tokio::time::timeout(Duration::from_secs(60), subject.get("hostile")).await.expect("ends");
                let mib = (subject.gate.endless_bytes() - before) >> 20;
                // The bounds include the buffers of the sockets.
                let most = match (status, *aim) {
                    // All of the announced length: a manifest may be that large.
                    (200, "manifest.json") => 101,
                    (200, _) => 40,
                    _ => 24,
                };
                assert!(mib <= most, "{}: {aim} {status}: {mib} MiB were taken", subject.name);
                subject.gate.lies().clear();
                let _ = std::fs::remove_dir_all(subject.house.path("hostile"));
            }
        }
    }
}

/// A truncated page of a bucket listing, with `token` for the next page.
fn page(keys: &str, token: &str) -> String {
    let one = |key: &str| {
        format!(
            "<Contents><Key>{key}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified><ETag>\"e\"</ETag>\
             <Size>1</Size></Contents>"
        )
    };
    let keys: String = keys.split_whitespace().map(one).collect();
    format!(
        "<?xml version='1.0'?><ListBucketResult><Name>models</Name><IsTruncated>true</IsTruncated>\
         <NextContinuationToken>{token}</NextContinuationToken>{keys}</ListBucketResult>"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_circular_bucket_listing_ends() {
    for kind in [Bucket::Unmanaged, Bucket::Origin] {
        let subject = in_a_bucket(kind, b"content").await;
        for (what, page) in [
            ("the same token", page("m/1/model.bin/{n}", "again")),
            ("the same keys", page("m/1/model.bin/a m/1/model.bin/b", "{n}")),
            ("keys that are left out", page("m/1/model.bin//a", "{n}")),
        ] {
            subject.gate.lies().add(Lie::replace(page).method("GET").on("list-type=2"));
            subject.gate.clear_requests();
            let error = ends(&subject, what, 10).await;
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
            assert!(error.to_string().contains("does not end"), "{what}: {error}");
            assert!(subject.gate.requests().len() < 20, "{what}: {} requests", subject.gate.requests().len());
            let cache = Cache::open((subject.config)(&subject.house.path("hostile").display().to_string())).unwrap();
            if (subject.config)("x").remote.is_some() {
                let listed = tokio::time::timeout(Duration::from_secs(10), cache.list_remote()).await;
                let listed = listed.expect("ends").map(|_| ()).expect_err(what);
                assert!(listed.to_string().contains("does not end"), "{what}: {listed}");
            }
            subject.gate.lies().clear();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_circular_listing_of_the_hub_ends() {
    let subject = on_the_hub(b"content").await;
    let folder = r#"[{"type":"directory","path":"d{n}","oid":"x","size":0}]"#;
    let same = r#"[{"type":"directory","path":"d","oid":"x","size":0}]"#;
    for (what, body, next) in [
        ("the same link", folder, "<?cursor=1>; rel=\"next\""),
        ("the same entries", same, "<?cursor={n}>; rel=\"next\""),
    ] {
        subject.gate.lies().add(Lie::replace_page(body, next).on("/tree/"));
        subject.gate.clear_requests();
        let error = ends(&subject, what, 10).await;
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("does not end"), "{what}: {error}");
        assert!(subject.gate.requests().len() < 10, "{what}: {} requests", subject.gate.requests().len());
        subject.gate.lies().clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_mlflow_folder_that_lists_itself_ends() {
    let subject = at_mlflow(b"content").await;
    subject.gate.lies().add(Lie::replace(r#"{"files":[{"path":"x","is_dir":true}]}"#).on("/artifacts?"));
    let error = ends(&subject, "itself", 10).await;
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("folders deep"), "{error}");
    assert!(subject.gate.requests().len() < 50, "{} requests", subject.gate.requests().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_list_of_files_is_an_error_and_is_not_kept() {
    let content = b"content";
    let empty_manifest = r#"{"schemaVersion":2,"layers":[]}"#;
    for (subject, aim, empty) in [
        (on_the_hub(content).await, "/tree/", "[]"),
        (at_mlflow(content).await, "/artifacts?", "{}"),
        (in_a_registry(content).await, "/manifests/1", empty_manifest),
    ] {
        subject.gate.lies().add(Lie::replace(empty).on(aim));
        let error = subject.get_patiently("a").await.map(|_| ()).expect_err(subject.name);
        assert_eq!(error.kind(), ErrorKind::NotFound, "{}: {error}", subject.name);
        subject.gate.lies().clear();
        assert!(subject.get_patiently("a").await.unwrap() == content, "{}: honest again", subject.name);
    }
    let house = House::new().await;
    std::fs::create_dir_all(house.path("mount/point")).unwrap();
    let reference = format!("file://{}", house.path("mount").display());
    let error = crate::common::get(&house.cache("a"), &reference).await.map(|_| ()).expect_err("an empty folder");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}
