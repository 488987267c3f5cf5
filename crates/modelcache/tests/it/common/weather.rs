//! An S3 stand-in behind a proxy that injects network faults.

use super::House;
use modelcache::cache::PutOptions;
use modelcache::config::{Config, Environment, RemoteConfig};
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Cache};
use modelcache_testkit::{Content, FaultProxy, S3};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

pub const BUCKET: &str = "models";

/// A test environment with a bucket that is reached through a fault proxy.
pub struct Weather {
    pub house: House,
    pub s3: S3,
    pub proxy: FaultProxy,
}

impl Weather {
    pub async fn new() -> Self {
        let house = House::new().await;
        let s3 = S3::start_in(house.path("s3"), 0).unwrap();
        s3.bucket(BUCKET).unwrap();
        let proxy = FaultProxy::start(s3.endpoint()).await.unwrap();
        Self { house, s3, proxy }
    }

    pub fn config(&self, dir: &str, endpoint: &str) -> Config {
        let remote = RemoteConfig {
            url: format!("s3://{BUCKET}/cache"),
            options: BTreeMap::from([("endpoint".into(), endpoint.into())]),
            environment: Environment(
                self.s3.env().into_iter().filter(|(name, _)| !name.contains("ENDPOINT")).collect(),
            ),
        };
        let mut config = self.house.config(dir);
        config.remote = Some(remote);
        config
    }

    /// A cache that reaches the bucket through the proxy.
    pub fn cache(&self, dir: &str) -> Cache {
        Cache::open(self.config(dir, &self.proxy.url())).unwrap()
    }

    /// Publishes `name@1`, one file with this content, to the bucket without the proxy.
    pub async fn put(&self, name: &str, content: &Content) {
        let file = self.house.path(name);
        content.write_to(&file).unwrap();
        let mut config = self.config("publisher", &self.s3.endpoint());
        // On a busy disk, the server needs long to assemble the parts of an upload.
        config.retry.read_timeout = Duration::from_secs(60);
        let cache = Cache::open(config).unwrap();
        let key = ArtifactKey::bare(&format!("{name}@1")).unwrap();
        cache.put_with(&key, &file, &PutOptions::default(), &Progress::new()).await.unwrap();
        fs::remove_dir_all(self.house.path("publisher")).unwrap();
        self.s3.clear_requests();
    }

    /// The byte ranges of `name` that were requested.
    pub fn ranges(&self, name: &str) -> Vec<(u64, u64)> {
        let parse = |range: &str| {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
        };
        self.s3.object_gets(name).iter().filter_map(|seen| parse(seen.range.as_deref()?)).collect()
    }
}
