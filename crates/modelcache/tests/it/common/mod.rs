//! A cache in a temporary folder, with a Hub stand-in as its origin.
#![allow(unreachable_pub)]

pub mod weather;

use modelcache::cache::{Artifact, GetOptions};
use modelcache::config::{ByteBound, Config, Durable, Environment, HubConfig, RemoteConfig, RetryConfig};
use modelcache::progress::Progress;
use modelcache::{Cache, Reference, Result, Selection};
use modelcache_testkit::{Content, Hub};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::sleep;

/// A test environment: a Hub stand-in, and a temporary folder for cache directories and files.
pub struct House {
    pub hub: Hub,
    pub folder: TempDir,
}

impl House {
    pub async fn new() -> Self {
        Self { hub: Hub::start().await.unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    /// A configuration with the cache directory `name` and without a remote.
    pub fn config(&self, name: &str) -> Config {
        let mut config = Config::new(self.folder.path().join(name));
        config.max_bytes = ByteBound::Bytes(1 << 30);
        config.min_free_bytes = ByteBound::Bytes(0);
        config.durable = Durable::Wait;
        config.hub = HubConfig { endpoint: self.hub.url().to_owned(), ..HubConfig::default() };
        config.retry = RetryConfig { deadline: Duration::from_secs(3), read_timeout: Duration::from_secs(1) };
        config
    }

    /// A remote in a folder of the environment.
    pub fn folder_remote(&self) -> Option<RemoteConfig> {
        Some(RemoteConfig {
            url: format!("file://{}", self.folder.path().join("remote").display()),
            options: Default::default(),
            environment: Environment::default(),
        })
    }

    pub fn cache(&self, name: &str) -> Cache {
        Cache::open(self.config(name)).unwrap()
    }

    pub fn cache_with_remote(&self, name: &str) -> Cache {
        let mut config = self.config(name);
        config.remote = self.folder_remote();
        Cache::open(config).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

pub async fn get(cache: &Cache, reference: &str) -> Result<Artifact> {
    get_some(cache, reference, &[], &[]).await
}

pub async fn get_some(cache: &Cache, reference: &str, include: &[&str], exclude: &[&str]) -> Result<Artifact> {
    let options = GetOptions { selection: Selection::globs(include, exclude).unwrap(), ..GetOptions::default() };
    cache.get_with(&Reference::parse(reference).unwrap(), &options, &Progress::new()).await
}

/// Waits until `condition` holds, and fails the test after 2000 looks.
pub async fn until(mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("timed out");
}

pub fn assert_same(path: &Path, content: &Content) {
    let found = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(found.len() as u64, content.len(), "{}", path.display());
    assert!(found == content.to_vec().unwrap(), "{} has other bytes", path.display());
}
