//! Trees of files to publish, and the remotes to publish them to.

#![allow(unreachable_pub)]

use futures::TryStreamExt;
use modelcache::Result;
use modelcache::config::{Environment, RemoteConfig, RetryConfig};
use modelcache::digest::{Digest, Provenance};
use modelcache::key::{ArtifactKey, ArtifactName, FilePath, Version};
use modelcache::manifest::{FileDetails, FileEntry, Manifest, Shape};
use modelcache::progress::Progress;
use modelcache::remote::{LocalFile, PublishOptions, PublishedBytes, Remote, RemoteSource};
use modelcache::source::{Body, Source};
use modelcache::transfer::Retry;
use modelcache_testkit::s3::S3Fault;
use modelcache_testkit::{Content, Moto, S3};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::{ObjectStore, ObjectStoreExt};
use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

pub const BUCKET: &str = "models";

pub fn key(text: &str) -> ArtifactKey {
    ArtifactKey::bare(text).expect("key")
}

pub fn uri_key(scheme: &str, parts: &[&str], version: &str) -> ArtifactKey {
    let name = ArtifactName::from_uri(scheme, parts.iter().copied()).expect("name");
    ArtifactKey::new(name, Version::new(version).expect("version"))
}

pub fn path(text: &str) -> FilePath {
    FilePath::new(text).expect("path")
}

pub fn retry() -> Retry {
    Retry::new(RetryConfig { deadline: Duration::from_secs(5), read_timeout: Duration::from_secs(10) })
}

/// Files on disk, and the manifest that describes them.
pub struct Tree {
    pub manifest: Manifest,
    pub files: BTreeMap<FilePath, PathBuf>,
    _folder: TempDir,
}

pub enum Change {
    Flip,
    Longer,
    Shorter,
}

impl Tree {
    /// Returns the files in the form that `Remote::publish` takes.
    pub fn local_files(&self) -> BTreeMap<FilePath, LocalFile> {
        self.files.iter().map(|(path, file)| (path.clone(), file.clone().into())).collect()
    }

    pub fn new(name: &str, files: &[(&str, u64)]) -> Self {
        Self::seeded(1, name, files)
    }

    pub fn seeded(seed: u64, name: &str, files: &[(&str, u64)]) -> Self {
        Self::of(key(name), seed, files, Shape::Tree)
    }

    pub fn of(key: ArtifactKey, seed: u64, files: &[(&str, u64)], shape: Shape) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let mut tree = Self { manifest: Manifest::new(key, shape), files: BTreeMap::new(), _folder: folder };
        for (at, (name, size)) in files.iter().enumerate() {
            let content = Content::generated(seed * 1_000 + at as u64, *size);
            let bytes = content.read(0..*size).expect("content");
            let file = tree._folder.path().join(at.to_string());
            std::fs::write(&file, &bytes).expect("file");
            let entry = FileEntry::with(
                *size,
                FileDetails {
                    sha256: Some(Digest::of(&bytes)),
                    provenance: Some(Provenance::Put),
                    ..FileDetails::default()
                },
            );
            tree.manifest.files.insert(path(name), entry);
            tree.files.insert(path(name), file);
        }
        tree
    }

    pub fn key(&self) -> ArtifactKey {
        self.manifest.key.clone()
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(&self.files[&path(name)]).expect("file")
    }

    pub fn change(&self, name: &str, change: Change) {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&self.files[&path(name)]).expect("opens");
        let size = file.metadata().expect("metadata").len();
        match change {
            Change::Flip => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, size - 1).expect("reads");
                file.write_all_at(&[byte[0] ^ 1], size - 1).expect("writes");
            }
            Change::Longer => file.set_len(size + 1).expect("sets"),
            Change::Shorter => file.set_len(size - 1).expect("sets"),
        }
    }
}

pub async fn collect(body: Body) -> Result<Vec<u8>> {
    body.stream
        .try_fold(Vec::new(), |mut all, chunk| async move {
            all.extend_from_slice(&chunk);
            Ok(all)
        })
        .await
}

/// Reads every file of `tree` from `source` and compares.
pub async fn assert_same_files(source: &RemoteSource, tree: &Tree) {
    let manifest = source.manifest().await.expect("reads").expect("is there");
    for (name, entry) in &tree.manifest.files {
        let theirs = &manifest.files[name];
        assert_eq!((theirs.size, theirs.sha256, theirs.held.is_some()), (entry.size, entry.sha256, true), "{name}");
        if entry.size > 0 {
            let body = source.read(name, 0..entry.size).await.expect("reads");
            let bytes = collect(body).await.expect("streams");
            assert_eq!(Digest::of(&bytes), entry.sha256.expect("digest"), "{name}");
        }
    }
}

/// A remote and its backing store.
pub struct Place {
    remote: Remote,
    config: RemoteConfig,
    behind: Behind,
}

enum Behind {
    Folder(TempDir),
    Bucket(S3),
    Moto(Moto),
}

/// A separate S3 client for moto, which does not store objects as files.
fn client(moto: &Moto) -> AmazonS3 {
    let builder = AmazonS3Builder::new().with_endpoint(moto.endpoint()).with_allow_http(true).with_bucket_name(BUCKET);
    builder.with_region("us-east-1").with_access_key_id("a").with_secret_access_key("b").build().expect("client")
}

/// Runs `work` to completion on a runtime of its own, for synchronous callers.
fn block_on<T: Send>(work: impl Future<Output = T> + Send) -> T {
    let run = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(work);
    std::thread::scope(|scope| scope.spawn(run).join().expect("runs"))
}

/// A configuration for the stand-in with additional options.
pub fn s3_config(s3: &S3, options: &[(&str, &str)]) -> RemoteConfig {
    RemoteConfig {
        url: format!("s3://{BUCKET}/some/prefix"),
        options: options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        environment: Environment(s3.env().into_iter().collect()),
    }
}

impl Place {
    pub fn folder() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let url = url::Url::from_file_path(folder.path().join("not yet/there")).expect("url").to_string();
        let config = RemoteConfig { url, options: BTreeMap::new(), environment: Environment(HashMap::new()) };
        Self::open(config, Behind::Folder(folder))
    }

    pub async fn bucket() -> Self {
        let s3 = S3::start().await.expect("starts");
        s3.bucket(BUCKET).expect("bucket");
        Self::open(s3_config(&s3, &[]), Behind::Bucket(s3))
    }

    pub async fn bucket_without_conditions() -> Self {
        let place = Self::bucket().await;
        place.s3().faults().add(S3Fault::ignore_conditions());
        place
    }

    /// A remote on the real moto server. `None` if TESTKIT_MOTO_VENV is not set.
    pub fn moto() -> Option<Self> {
        let moto = Moto::start(std::env::var_os("TESTKIT_MOTO_VENV")?).expect("starts");
        moto.bucket(BUCKET).expect("bucket");
        let variables = [
            ("AWS_ACCESS_KEY_ID", "a".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "b".to_owned()),
            ("AWS_ENDPOINT_URL_S3", moto.endpoint()),
        ];
        let config = RemoteConfig {
            url: format!("s3://{BUCKET}/some/prefix"),
            options: BTreeMap::new(),
            environment: Environment(variables.map(|(name, value)| (name.to_owned(), value)).into()),
        };
        Some(Self::open(config, Behind::Moto(moto)))
    }

    fn open(config: RemoteConfig, behind: Behind) -> Self {
        Self { remote: Remote::open(&config, retry()).expect("opens"), config, behind }
    }

    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Address of the backing store: a path or a URL.
    pub fn endpoint(&self) -> String {
        match &self.behind {
            Behind::Folder(folder) => folder.path().display().to_string(),
            Behind::Bucket(s3) => s3.endpoint(),
            Behind::Moto(moto) => moto.endpoint(),
        }
    }

    /// A second, independent client of the same remote, as another process has it.
    pub fn another(&self) -> Remote {
        Remote::open(&self.config, retry()).expect("opens")
    }

    pub fn s3(&self) -> &S3 {
        match &self.behind {
            Behind::Bucket(s3) => s3,
            _ => panic!("not the stand-in"),
        }
    }

    pub async fn publish(&self, tree: &Tree) -> Result<PublishedBytes> {
        self.remote.publish(&tree.manifest, &tree.local_files(), PublishOptions::default(), &Progress::new()).await
    }

    pub async fn publish_forced(&self, tree: &Tree) -> Result<PublishedBytes> {
        self.remote
            .publish(
                &tree.manifest,
                &tree.local_files(),
                PublishOptions { force: true, ..PublishOptions::default() },
                &Progress::new(),
            )
            .await
    }

    pub async fn publish_only(&self, tree: &Tree, names: &[&str]) -> Result<PublishedBytes> {
        let files = names.iter().map(|name| (path(name), tree.files[&path(name)].clone().into())).collect();
        self.remote.publish(&tree.manifest, &files, PublishOptions::default(), &Progress::new()).await
    }

    pub async fn manifest(&self, name: &str) -> Manifest {
        self.remote.source(&key(name)).manifest().await.expect("reads").expect("is there")
    }

    /// Longest file name in bytes that the backing store takes. The stand-in makes one file name of a whole key.
    pub fn name_bytes_max(&self) -> usize {
        match &self.behind {
            Behind::Folder(_) | Behind::Moto(_) => 255,
            Behind::Bucket(_) => 80,
        }
    }

    fn root(&self) -> PathBuf {
        match &self.behind {
            Behind::Folder(folder) => folder.path().join("not yet/there"),
            Behind::Bucket(s3) => s3.object_path(BUCKET, "some/prefix"),
            Behind::Moto(_) => panic!("not files"),
        }
    }

    fn object_key(key: &str) -> object_store::path::Path {
        object_store::path::Path::parse(format!("some/prefix/{key}")).expect("key")
    }

    /// All objects below the remote's prefix, sorted.
    pub fn keys(&self) -> Vec<String> {
        if let Behind::Moto(moto) = &self.behind {
            let client = client(moto);
            let mut keys: Vec<String> =
                block_on(client.list(None).map_ok(|meta| meta.location.to_string()).try_collect()).expect("lists");
            keys.sort();
            return keys.iter().map(|key| key.strip_prefix("some/prefix/").unwrap_or(key).to_owned()).collect();
        }
        let root = self.root();
        let (mut folders, mut keys) = (vec![root.clone()], Vec::new());
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Ok(key) = path.strip_prefix(&root) {
                    keys.push(key.to_string_lossy().into_owned());
                }
            }
        }
        keys.sort();
        keys
    }

    pub fn object(&self, key: &str) -> Option<Vec<u8>> {
        if let Behind::Moto(moto) = &self.behind {
            let read = async { client(moto).get(&Self::object_key(key)).await.ok()?.bytes().await.ok() };
            return block_on(read).map(|bytes| bytes.to_vec());
        }
        std::fs::read(self.root().join(key)).ok()
    }

    /// Writes an object directly into the backing store.
    pub fn put(&self, key: &str, bytes: &[u8]) {
        match &self.behind {
            Behind::Bucket(s3) => {
                std::fs::create_dir_all(
                    s3.object_path(BUCKET, &format!("some/prefix/{key}")).parent().expect("parent"),
                )
                .expect("folder");
                s3.put(BUCKET, &format!("some/prefix/{key}"), Content::Held(bytes.to_vec().into())).expect("puts");
            }
            Behind::Moto(moto) => {
                block_on(client(moto).put(&Self::object_key(key), bytes.to_vec().into())).expect("puts");
            }
            Behind::Folder(_) => {
                let file = self.root().join(key);
                std::fs::create_dir_all(file.parent().expect("parent")).expect("folder");
                let _ = std::fs::remove_file(&file);
                std::fs::write(file, bytes).expect("writes");
            }
        }
    }

    /// Removes an object directly from the backing store.
    pub fn remove(&self, key: &str) {
        match &self.behind {
            Behind::Bucket(s3) => s3.remove(BUCKET, &format!("some/prefix/{key}")).expect("removes"),
            Behind::Moto(moto) => block_on(client(moto).delete(&Self::object_key(key))).expect("removes"),
            Behind::Folder(_) => std::fs::remove_file(self.root().join(key)).expect("removes"),
        }
    }
}
