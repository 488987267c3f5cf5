//! The builder of a [`Cache`]: a [`Config`] with its most frequent settings as methods.

use super::Cache;
use crate::config::{BucketConfig, ByteBound, Config, Environment, OriginTemplate, RemoteConfig, Secret, Sharing};
use crate::error::Result;
use crate::origin::Origin;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

impl Cache {
    /// Returns a builder for a cache in the local directory `dir`.
    ///
    /// ```no_run
    /// use modelcache::{Cache, config::ByteBound};
    ///
    /// # fn main() -> modelcache::Result<()> {
    /// let cache = Cache::builder("/var/cache/models")
    ///     .remote("s3://bucket/models")
    ///     .environment(std::env::vars())
    ///     .budget(ByteBound::Percent(80))
    ///     .open()?;
    /// # Ok(()) }
    /// ```
    pub fn builder(dir: impl Into<PathBuf>) -> CacheBuilder {
        CacheBuilder {
            config: Config::new(dir),
            remote: None,
            store_options: BTreeMap::new(),
            environment: Environment::default(),
            origins: Vec::new(),
        }
    }
}

/// Settings of a cache that is not open yet. [`CacheBuilder::config`] can change all settings.
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `open` is called"]
pub struct CacheBuilder {
    config: Config,
    remote: Option<String>,
    store_options: BTreeMap<String, String>,
    environment: Environment,
    origins: Vec<String>,
}

impl CacheBuilder {
    /// Sets the remote: `s3://bucket/prefix` or `file:///folder`. AWS credentials are looked up in the
    /// [`environment`](Self::environment) and in the files that it names.
    pub fn remote(mut self, url: impl Into<String>) -> Self {
        self.remote = Some(url.into());
        self
    }

    /// Sets an option of the object store, for example `endpoint`, `region` or `sse`. It applies to the remote and to
    /// `s3://` references.
    pub fn store_option(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.store_options.insert(name.into(), value.into());
        self
    }

    /// Sets the environment variables from which AWS credentials and settings are read. The library does not read the
    /// environment of the process.
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        self.environment = Environment(variables.into_iter().collect::<HashMap<_, _>>());
        self
    }

    /// Sets the budget: the maximum size of the local directory.
    pub fn budget(mut self, bound: ByteBound) -> Self {
        self.config.max_bytes = bound;
        self
    }

    /// Sets the space that the cache leaves free on the filesystem.
    pub fn min_free(mut self, bound: ByteBound) -> Self {
        self.config.min_free_bytes = bound;
        self
    }

    /// Shares the local directory with other users.
    pub fn shared(mut self, sharing: Sharing) -> Self {
        self.config.shared = sharing;
        self
    }

    /// Adds an origin for bare names: a reference with the placeholders `{name}` and `{version}`.
    pub fn origin(mut self, template: impl Into<String>) -> Self {
        self.origins.push(template.into());
        self
    }

    /// Adds an origin that the application implements. [`Cache::reference`] parses references to it.
    pub fn own_origin(mut self, origin: Arc<dyn Origin>) -> Self {
        self.config.own_origins.push(origin);
        self
    }

    /// Sets the token for the Hugging Face Hub.
    pub fn hub_token(mut self, token: impl Into<String>) -> Self {
        self.config.hub.token = Some(Secret::new(token));
        self
    }

    /// Never contacts an origin.
    pub fn offline(mut self) -> Self {
        self.config.offline = true;
        self
    }

    /// Changes any setting.
    pub fn config(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    /// Opens the cache.
    ///
    /// # Errors
    /// Those of [`Cache::open`]; [`Invalid`](crate::ErrorKind::Invalid) if an origin template is wrong.
    pub fn open(self) -> Result<Cache> {
        let Self { mut config, remote, store_options: options, environment, origins } = self;
        for template in origins {
            config.origins.push(OriginTemplate::new(&template)?);
        }
        config.buckets = BucketConfig { options: options.clone(), environment: environment.clone() };
        if let Some(url) = remote {
            config.remote = Some(RemoteConfig { url, options, environment });
        }
        Cache::open(config)
    }
}
