//! Conformance suite for [`Source`], run over every implementation.
//!
//! A [`Subject`] is a source with content that the suite knows. To add an implementation, build a subject in a test of
//! its own and pass it to [`obeys_the_contract`].

#[path = "../../examples/own_origin.rs"]
#[allow(dead_code)]
mod own_origin;

use futures::StreamExt as _;
use modelcache::config::{BucketConfig, Config, Environment, MlflowConfig, RemoteConfig, RetryConfig, Secret};
use modelcache::key::FilePath;
use modelcache::manifest::Shape;
use modelcache::origin::Origins;
use modelcache::remote::Remote;
use modelcache::source::Source;
use modelcache::transfer::Retry;
use modelcache::{ArtifactKey, ErrorKind, Reference, Tier};
use modelcache_testkit::registry::Layer;
use modelcache_testkit::{Gate, Hub, Mlflow, Page, Ranges, Registry, S3, Web, content};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A source and its expected content.
struct Subject {
    source: Arc<dyn Source>,
    /// A source of the same kind, bound to an absent artifact. `None` if this kind cannot have such a source.
    absent: Option<Arc<dyn Source>>,
    tier: Tier,
    shape: Shape,
    files: BTreeMap<FilePath, Vec<u8>>,
    /// Returns the number of requests sent so far, or always 0 if they cannot be counted.
    requests: Box<dyn Fn() -> usize>,
}

/// Runs all checks of the suite.
async fn obeys_the_contract(subject: &Subject) {
    a_range_is_read_without_asking_for_the_manifest_first(subject).await;
    the_manifest_lists_every_file_and_is_remembered(subject).await;
    an_absent_artifact_has_no_manifest(subject).await;
    any_range_gives_exactly_those_bytes(subject).await;
    an_absent_path_is_not_found(subject).await;
    ranges_beyond_the_end_are_refused_without_a_panic(subject).await;
    concurrent_reads_do_not_mix(subject).await;
    an_abandoned_read_harms_no_other(subject).await;
}

async fn a_range_is_read_without_asking_for_the_manifest_first(subject: &Subject) {
    let (path, content) = largest(subject);
    assert_eq!(read(subject, path, 1..5).await, &content[1..5]);
}

async fn the_manifest_lists_every_file_and_is_remembered(subject: &Subject) {
    assert_eq!(subject.source.tier(), subject.tier);
    let manifest = subject.source.manifest().await.unwrap().expect("the artifact is there");
    let before = (subject.requests)();
    assert_eq!(subject.source.manifest().await.unwrap().as_ref(), Some(&manifest));
    assert_eq!((subject.requests)(), before, "the second manifest cost a request");

    manifest.check().unwrap();
    assert_eq!(manifest.shape, subject.shape);
    assert!(manifest.files.keys().eq(subject.files.keys()), "{:?}", manifest.files.keys());
    for (path, entry) in &manifest.files {
        let content = &subject.files[path];
        assert_eq!(entry.size, content.len() as u64, "{path}");
        if let Some(sha256) = entry.sha256 {
            assert_eq!(sha256.to_string(), content::sha256(content), "{path}");
        }
        if let Some(oid) = entry.git_oid {
            assert_eq!(oid.to_string(), content::git_sha1(content), "{path}");
        }
        let stated = entry.sha256.is_some() || entry.git_oid.is_some();
        assert_eq!(entry.provenance.is_some(), stated, "{path}: a digest has a provenance, and nothing else has");
    }
}

async fn an_absent_artifact_has_no_manifest(subject: &Subject) {
    if let Some(absent) = &subject.absent {
        assert_eq!(absent.manifest().await.unwrap(), None);
    }
}

async fn any_range_gives_exactly_those_bytes(subject: &Subject) {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos().into();
    let mut random = Random(seed);
    for (path, content) in subject.files.iter().filter(|(_, content)| !content.is_empty()) {
        let size = content.len() as u64;
        let mut ranges = vec![0..1, size - 1..size, 0..size];
        ranges.extend((0..12).map(|_| random.range(size)));
        for range in ranges {
            let want = &content[range.start as usize..range.end as usize];
            let got = read(subject, path, range.clone()).await;
            assert!(got == want, "{path} {range:?}: {} bytes, or other ones (seed {seed})", got.len());
        }
    }
}

async fn an_absent_path_is_not_found(subject: &Subject) {
    for path in ["no/such file", "no-such.bin"] {
        let error = subject.source.read(&FilePath::new(path).unwrap(), 0..1).await.expect_err("nothing is there");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(!error.is_transient(), "{error}");
        assert_eq!(error.failed_tier(), Some(subject.tier), "{error}");
    }
}

async fn ranges_beyond_the_end_are_refused_without_a_panic(subject: &Subject) {
    let (path, content) = largest(subject);
    let size = content.len() as u64;
    for range in [size..size + 1, 0..size + 1, u64::MAX - 1..u64::MAX] {
        let error = subject.source.read(path, range.clone()).await.expect_err("the file is shorter");
        assert!(!error.is_transient(), "{range:?}: {error}");
    }
}

async fn concurrent_reads_do_not_mix(subject: &Subject) {
    let mut random = Random(7);
    let files: Vec<_> = subject.files.iter().filter(|(_, content)| !content.is_empty()).collect();
    let asked: Vec<_> = (0..24).map(|at| files[at % files.len()]).collect();
    let asked: Vec<_> = asked.into_iter().map(|file| (file, random.range(file.1.len() as u64))).collect();
    let reads = asked.iter().map(|((path, _), range)| read(subject, path, range.clone()));
    for (got, ((path, content), range)) in futures::future::join_all(reads).await.into_iter().zip(&asked) {
        assert!(got == content[range.start as usize..range.end as usize], "{path} {range:?}");
    }
}

async fn an_abandoned_read_harms_no_other(subject: &Subject) {
    let (path, content) = largest(subject);
    let mut body = subject.source.read(path, 0..content.len() as u64).await.unwrap();
    body.stream.next().await.unwrap().unwrap();
    drop(body);
    drop(subject.source.read(path, 0..content.len() as u64));
    assert_eq!(read(subject, path, 3..9).await, &content[3..9]);
}

fn largest(subject: &Subject) -> (&FilePath, &Vec<u8>) {
    subject.files.iter().max_by_key(|(_, content)| content.len()).unwrap()
}

/// Reads a range. If the server ignored the range, cuts it out of the whole file.
async fn read(subject: &Subject, path: &FilePath, range: Range<u64>) -> Vec<u8> {
    let opened = subject.source.read(path, range.clone()).await;
    let mut body = opened.unwrap_or_else(|error| panic!("{path} {range:?}: {error}"));
    assert!(body.start == range.start || body.start == 0, "{path} {range:?} starts at {}", body.start);
    let mut bytes = Vec::new();
    while let Some(chunk) = body.stream.next().await {
        bytes.extend_from_slice(&chunk.unwrap_or_else(|error| panic!("{path} {range:?}: {error}")));
    }
    let mut wanted = bytes.split_off((range.start - body.start) as usize);
    if body.start != range.start {
        wanted.truncate((range.end - range.start) as usize);
    }
    wanted
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// Returns a range that is not empty, in a file of `size` bytes.
    fn range(&mut self, size: u64) -> Range<u64> {
        let start = self.next() % size;
        start..start + 1 + self.next() % (size - start)
    }
}

fn files() -> BTreeMap<FilePath, Vec<u8>> {
    let rows: [(&str, Vec<u8>); 8] = [
        ("empty.txt", vec![]),
        ("one.bin", b"x".to_vec()),
        (".gitattributes", b"*.bin filter=lfs".to_vec()),
        ("config.json", b"{\"a\": 1}".to_vec()),
        ("model.safetensors", content::bytes(1, 5 * 1024 * 1024 + 3)),
        ("sub dir/fé+%.txt", content::bytes(2, 70_000)),
        ("sub dir/deeper/ω & 100% #?.bin", content::bytes(3, 1024 * 1024)),
        ("a:b;c=d,e@f~g!$'()*.txt", b"every odd character".to_vec()),
    ];
    rows.into_iter().map(|(path, content)| (FilePath::new(path).unwrap(), content)).collect()
}

/// Returns the origins of the default configuration after `change`. Nothing here reaches the public Hub.
fn origins_with(change: impl FnOnce(&mut Config)) -> Origins {
    let mut config = Config::new("unused");
    config.hub.endpoint = "http://127.0.0.1:9".into();
    change(&mut config);
    Origins::new(&config, Retry::new(config.retry)).unwrap()
}

fn origins(endpoint: String) -> Origins {
    origins_with(|config| config.hub.endpoint = endpoint)
}

async fn on_the_hub(hub: &Arc<Hub>, repo: &str) -> Subject {
    let files = files();
    let mut commit = hub.repo(repo).commit();
    for (path, content) in &files {
        commit = commit.file(path.as_str(), content.clone());
    }
    commit.publish().unwrap();
    let origins = origins(hub.url());
    let reference = Reference::parse(&format!("hf://{repo}")).unwrap();
    let resolved = origins.resolve(&reference).await.unwrap().expect("a repository");
    let absent = ArtifactKey { version: "0".repeat(40).parse().unwrap(), ..resolved.key };
    Subject {
        source: resolved.source,
        absent: origins.source(&reference, &absent),
        tier: Tier::Origin,
        shape: Shape::Tree,
        files,
        requests: Box::new({
            let hub = hub.clone();
            move || hub.requests().len()
        }),
    }
}

#[tokio::test]
async fn the_hub_is_a_source() {
    let hub = Arc::new(Hub::start().await.unwrap());
    for repo in ["org/model", "gpt2", "datasets/org/set", "spaces/org/app"] {
        let subject = on_the_hub(&hub, repo).await;
        assert!(subject.absent.is_some());
        obeys_the_contract(&subject).await;
        let key = subject.source.manifest().await.unwrap().unwrap().key;
        let exact = Reference::parse(&key.to_string()).unwrap();
        let again = origins(hub.url()).source(&exact, &key).expect("an exact key");
        obeys_the_contract(&Subject { source: again, ..subject }).await;
    }
    assert!(hub.requests().iter().all(|seen| !seen.authorized()), "a token was sent although none is configured");
}

#[tokio::test]
async fn a_file_on_a_web_server_is_a_source() {
    let content = content::bytes(4, 5 * 1024 * 1024 + 3);
    for ranges in [Ranges::Served, Ranges::Ignored, Ranges::Refused] {
        let web = Arc::new(Web::start().unwrap());
        let files = BTreeMap::from([(FilePath::new("a b+%.bin").unwrap(), content.clone())]);
        for (at, version) in ["", "@3"].into_iter().enumerate() {
            let page = Page::of(content.clone()).ranges(ranges);
            let page = if at == 0 { page.etag("\"v\"") } else { page.without_length() };
            web.put("/d/a%20b+%25.bin", page.header("x-checksum-sha256", content::sha256(&content)));
            let reference = Reference::parse(&format!("{}/d/a%20b+%25.bin{version}", web.url())).unwrap();
            let origins = origins("http://127.0.0.1:9".into());
            let resolved = origins.resolve(&reference).await.unwrap().expect("an address");
            let requests = Box::new({
                let web = web.clone();
                move || web.requests().len()
            });
            let (tier, shape, files) = (Tier::Origin, Shape::File, files.clone());
            let subject = Subject { source: resolved.source, absent: None, tier, shape, files, requests };
            obeys_the_contract(&subject).await;
            let again = origins.source(&reference, &resolved.key).expect("an exact key");
            obeys_the_contract(&Subject { source: again, ..subject }).await;
        }
    }
}

async fn in_the_file_system(path: &Path, shape: Shape, files: BTreeMap<FilePath, Vec<u8>>) -> Subject {
    let reference = Reference::parse(&format!("file://{}", path.display())).unwrap();
    let resolved = origins("http://127.0.0.1:9".into()).resolve(&reference).await.unwrap().expect("it is there");
    let key = resolved.source.manifest().await.unwrap().unwrap().key;
    assert_eq!(key, resolved.key);
    Subject { source: resolved.source, absent: None, tier: Tier::Origin, shape, files, requests: Box::new(|| 0) }
}

fn write(folder: &Path, files: &BTreeMap<FilePath, Vec<u8>>) {
    for (path, content) in files {
        let path = folder.join(path.as_str());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

#[tokio::test]
async fn a_folder_is_a_source() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &files());
    obeys_the_contract(&in_the_file_system(folder.path(), Shape::Tree, files()).await).await;
}

#[tokio::test]
async fn a_single_file_is_a_source() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &files());
    let mut files = files();
    files.retain(|path, _| path.as_str() == "model.safetensors");
    let path = folder.path().join("model.safetensors");
    obeys_the_contract(&in_the_file_system(&path, Shape::File, files).await).await;
}

#[tokio::test]
async fn a_snapshot_of_links_is_a_source() {
    let folder = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (folder.path().join("blobs"), folder.path().join("snapshot"));
    write(&blobs, &files());
    std::fs::create_dir(&snapshot).unwrap();
    for path in files().keys().filter(|path| !path.as_str().contains('/')) {
        std::os::unix::fs::symlink(format!("../blobs/{path}"), snapshot.join(path.as_str())).unwrap();
    }
    std::os::unix::fs::symlink("../blobs/sub dir", snapshot.join("sub dir")).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("snapshot", &link).unwrap();
    obeys_the_contract(&in_the_file_system(&link, Shape::Tree, files()).await).await;
}

async fn bucket(files: &BTreeMap<FilePath, Vec<u8>>) -> Arc<S3> {
    let s3 = S3::start().await.unwrap();
    s3.bucket("elsewhere").unwrap();
    for (path, content) in files {
        s3.put("elsewhere", &format!("some models/m/{path}"), content.clone()).unwrap();
    }
    Arc::new(s3)
}

fn environment(s3: &S3) -> Environment {
    Environment(s3.env().into_iter().collect())
}

fn requests(s3: &Arc<S3>) -> Box<dyn Fn() -> usize> {
    let s3 = s3.clone();
    Box::new(move || s3.requests().len())
}

async fn at(s3: &Arc<S3>, reference: &str, shape: Shape, files: BTreeMap<FilePath, Vec<u8>>) -> Subject {
    let buckets = BucketConfig { environment: environment(s3), ..BucketConfig::default() };
    let origins = || origins_with(|config| config.buckets = buckets.clone());
    let reference = Reference::parse(reference).unwrap();
    let key = origins().resolve(&reference).await.unwrap().expect("it is there").key;
    // Another process knows only the key, and has not listed anything.
    let source = origins().source(&reference, &key).expect("a bucket reference has a source");
    let nothing = Reference::parse("s3://elsewhere/some models/nothing").unwrap();
    let absent = origins().source(&nothing, &key);
    Subject { source, absent, tier: Tier::Origin, shape, files, requests: requests(s3) }
}

#[tokio::test]
async fn a_prefix_in_a_bucket_is_a_source() {
    let s3 = bucket(&files()).await;
    for reference in ["s3://elsewhere/some models/m", "s3://elsewhere/some models/m/"] {
        obeys_the_contract(&at(&s3, reference, Shape::Tree, files()).await).await;
    }
}

/// Returns the path in an environment variable, or prints `SKIPPED` if it is unset or empty.
fn path_from_env(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    if path.is_none() {
        #[allow(clippy::print_stderr)]
        {
            eprintln!("SKIPPED: {variable} is not set (`cargo xtask test` sets it)");
        }
    }
    path
}

/// Builds a subject for `reference` on `origins`. `gate` is in front of the server and counts the requests.
async fn behind(gate: &Arc<Gate>, origins: &Origins, reference: &str, files: BTreeMap<FilePath, Vec<u8>>) -> Subject {
    let reference = Reference::parse(reference).unwrap();
    let resolved = origins.resolve(&reference).await.unwrap().expect("it is there");
    let gate = gate.clone();
    Subject {
        source: resolved.source,
        // These origins report a missing artifact as an error with a hint.
        absent: None,
        tier: Tier::Origin,
        shape: Shape::Tree,
        files,
        requests: Box::new(move || gate.requests().len()),
    }
}

/// Returns a subject for the same artifact, addressed by its exact key.
async fn again(origins: &Origins, subject: Subject) -> Subject {
    let key = subject.source.manifest().await.unwrap().unwrap().key;
    let exact = Reference::parse(&key.to_string()).unwrap();
    Subject { source: origins.source(&exact, &key).expect("an exact key"), ..subject }
}

#[tokio::test]
async fn a_registry_is_a_source_and_so_is_its_cdn() {
    let Some(program) = path_from_env("MODELCACHE_TEST_REGISTRY") else { return };
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::start(&program, folder.path(), false).unwrap();
    let layers: Vec<_> = files()
        .into_iter()
        .map(|(path, content)| Layer::new("x/y", "org.opencontainers.image.title", path.as_str(), content))
        .collect();
    registry.push("org/model", "v1", "x/y", &layers).unwrap();
    for cdn in [false, true] {
        let gate = Arc::new(Gate::start(registry.addr()).unwrap());
        if cdn {
            gate.redirect("/blobs/");
            gate.spent_after(5);
        }
        let origins = origins("http://127.0.0.1:9".into());
        let tag = format!("oci://{}/org/model:v1", gate.addr());
        let subject = behind(&gate, &origins, &tag, files()).await;
        obeys_the_contract(&subject).await;
        obeys_the_contract(&again(&origins, subject).await).await;
        let spent = gate.requests().iter().filter(|seen| seen.status == 403).count();
        assert_eq!(spent > 0, cdn, "{spent} addresses at the CDN were spent");
    }
}

#[tokio::test]
async fn one_object_in_a_bucket_is_a_source() {
    let mut files = files();
    files.retain(|path, _| path.as_str() == "model.safetensors");
    let s3 = bucket(&files).await;
    let reference = "s3://elsewhere/some models/m/model.safetensors";
    obeys_the_contract(&at(&s3, reference, Shape::File, files).await).await;
}

fn on_the_remote(url: String, environment: Environment, requests: Box<dyn Fn() -> usize>) -> Subject {
    let config = RemoteConfig { url, options: BTreeMap::new(), environment };
    let remote = Remote::open(&config, Retry::new(RetryConfig::default())).unwrap();
    let source = |key| Arc::new(remote.source(&ArtifactKey::bare(key).unwrap()));
    let absent: Arc<dyn Source> = source("some models@n");
    let source = source("some models@m");
    Subject { source, absent: Some(absent), tier: Tier::Remote, shape: Shape::Tree, files: files(), requests }
}

#[tokio::test]
async fn unmanaged_objects_on_the_remote_are_a_source() {
    let s3 = bucket(&files()).await;
    obeys_the_contract(&on_the_remote("s3://elsewhere".into(), environment(&s3), requests(&s3))).await;
}

#[tokio::test]
async fn unmanaged_files_in_a_shared_folder_are_a_source() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("some models/m"), &files());
    let url = format!("file://{}", folder.path().display());
    obeys_the_contract(&on_the_remote(url, Environment::default(), Box::new(|| 0))).await;
}

#[tokio::test]
async fn mlflow_is_a_source() {
    let Some(venv) = path_from_env("MODELCACHE_TEST_VENV") else { return };
    let folder = tempfile::tempdir().unwrap();
    let server = folder.path().join("server");
    let server = Mlflow::start(&venv, &server, &["--artifacts-destination", "artifacts"]).unwrap();
    // MLflow itself refuses names with a `#` or a `:`.
    let mut files = files();
    files.retain(|path, _| !path.as_str().contains(['#', ':']));
    write(&folder.path().join("model"), &files);
    let log = "import sys, mlflow
client = mlflow.MlflowClient()
run = client.create_run(client.create_experiment('tests'))
client.log_artifacts(run.info.run_id, sys.argv[1], 'model')
client.create_registered_model('m 1')
client.create_model_version('m 1', run.info.artifact_uri + '/model', run.info.run_id)";
    server.python(log, &[&folder.path().join("model").display().to_string()], &[]).unwrap();
    let gate = Arc::new(Gate::start(server.addr()).unwrap());
    let config = MlflowConfig { tracking_uri: Some(Secret::new(gate.url())), ..MlflowConfig::default() };
    let origins = origins_with(|changed| changed.mlflow = config);
    let subject = behind(&gate, &origins, "models:/m 1/latest", files).await;
    obeys_the_contract(&subject).await;
    obeys_the_contract(&again(&origins, subject).await).await;
}

#[tokio::test]
async fn an_applications_own_origin_is_a_source() {
    let pages = files().into_iter().map(|(path, content)| (path, content.into())).collect();
    let books = BTreeMap::from([("novels/emma".to_owned(), BTreeMap::from([(2, pages)]))]);
    let origins = origins_with(|config| config.own_origins = vec![Arc::new(own_origin::Shelf { books })]);
    let reference = origins.parse("shelf://novels/emma").unwrap();
    let resolved = origins.resolve(&reference).await.unwrap().expect("it is there");
    let absent = ArtifactKey { version: "3".parse().unwrap(), ..resolved.key.clone() };
    let absent = origins.source(&reference, &absent);
    let (tier, shape, requests) = (Tier::Origin, Shape::Tree, Box::new(|| 0));
    let subject = Subject { source: resolved.source, absent, tier, shape, files: files(), requests };
    obeys_the_contract(&subject).await;
    obeys_the_contract(&again(&origins, subject).await).await;
}
