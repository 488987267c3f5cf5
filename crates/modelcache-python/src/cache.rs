//! `Cache`: the native object behind `modelcache.ModelCache`, with one method per operation.
//!
//! Methods check their arguments at once and return a `Call`, which does the work. An artifact whose path `get`
//! returned stays leased until the cache is closed. A forked child opens the cache again when it first uses it, and
//! acquires its own leases on the artifacts that its parent has leased.

use crate::call::{self, Call, CallOutput, ProgressHandles};
use crate::process::{self, EntryGuard, ProcessLocal};
use crate::{failure, logs};
use futures::StreamExt;
use modelcache::cache::{
    Artifact, EvictTier, GetOptions, LinkMode, OpenOptions, Pin, PruneOptions, Purpose, PutOptions, PutTier,
    VerifyOptions, VerifyTier,
};
use modelcache::config::{Backfill, Environment, Extract, Secret};
use modelcache::doctor::{self, DoctorOptions, Severity};
use modelcache::format::Format;
use modelcache::key::{FilePath, Version};
use modelcache::mutex::Mutex;
use modelcache::progress::Progress;
use modelcache::reference::Target;
use modelcache::settings::{self, Argument, ConfigFiles, SETTINGS, Settings};
use modelcache::{ArtifactKey, Config, Error, Reference, Result, Selection, Tier, human, metrics, redact};
use pyo3::prelude::*;
use serde::Serialize;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::future::Future;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Upper bound on the number of caches that are kept open for tokens passed by callers.
const TOKENS_MAX: usize = 16;

/// A cache over one local directory.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct Cache {
    config: Config,
    /// The environment that the cache was opened in, for the doctor.
    environment: Environment,
    /// `None` once the cache is closed.
    open: Mutex<Option<ProcessLocal<Arc<Open>>>>,
}

/// The open state of a cache in one process.
struct Open {
    cache: modelcache::Cache,
    /// Caches for callers that pass a token of their own, keyed by it. The key `None` is for
    /// callers that pass an empty token, whose requests are sent without one.
    by_token: Mutex<HashMap<Option<String>, modelcache::Cache>>,
    leases: Arc<Mutex<Leases>>,
}

/// The artifacts that are leased until the cache closes, by artifact and patterns of its files. The reference and the
/// selection of an entry let a forked child lease the same files.
type Leases = HashMap<(ArtifactKey, Vec<String>), (Reference, Selection, Artifact)>;

/// The arguments of a get.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct GetArguments {
    reference: String,
    version: Option<String>,
    revision: Option<String>,
    include: Vec<String>,
    exclude: Vec<String>,
    into: Option<PathBuf>,
    /// The token for this call. An empty string sends no token, `None` sends the configured one.
    token: Option<String>,
    local_files_only: bool,
    refresh: bool,
    verify: bool,
    /// `auto`, `always` or `never`; `None` for the configured value.
    extract: Option<String>,
    timeout_seconds: Option<f64>,
    /// If true, the cache keeps the lease until it is closed, and the output is a path. If false, the output is a
    /// `Lease`.
    keep_lease: bool,
}

/// The arguments of an open.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct OpenArguments {
    reference: String,
    path: Option<String>,
    version: Option<String>,
    revision: Option<String>,
    unchecked: bool,
    /// As in [`GetArguments`].
    token: Option<String>,
    local_files_only: bool,
    refresh: bool,
    timeout_seconds: Option<f64>,
}

impl GetArguments {
    fn options(&self) -> Result<GetOptions> {
        Ok(GetOptions {
            selection: Selection::globs(&self.include, &self.exclude)?,
            refresh: self.refresh,
            max_tier: max_tier(self.local_files_only),
            verify: self.verify,
            extract: self.extract.as_deref().map(Extract::parse).transpose()?,
            // A call with `into` returns when the files are durable, in the caller's folder and in the cache.
            durable: self.into.is_some(),
            ..GetOptions::default()
        })
    }
}

#[pymethods]
impl Cache {
    /// Opens the cache. `arguments` maps the key of a setting to its value and to the name that messages use for its
    /// source. `environment` is the environment of the process, in bytes.
    #[new]
    #[pyo3(signature = (arguments, environment, config_file = None, remote_options = None, token = None))]
    fn open(
        py: Python<'_>,
        arguments: HashMap<String, (String, String)>,
        environment: Vec<(Vec<u8>, Vec<u8>)>,
        config_file: Option<PathBuf>,
        remote_options: Option<BTreeMap<String, String>>,
        token: Option<String>,
    ) -> PyResult<Self> {
        process::entry(py, |guard| {
            logs::look_up_level(py);
            // Opening does file I/O. Other Python threads run meanwhile.
            let opened =
                guard.detach(|| Self::from_settings(&arguments, environment, config_file, remote_options, token));
            opened.map_err(|error| failure::exception(py, &error))
        })
    }

    /// The local directory.
    #[getter]
    fn dir(&self) -> OsString {
        self.config.dir.clone().into_os_string()
    }

    /// The URL of the remote, or `None` without one.
    #[getter]
    fn remote(&self) -> Option<String> {
        self.config.remote.as_ref().map(|remote| remote.url.clone())
    }

    /// True until the cache is closed.
    #[getter]
    fn is_open(&self) -> bool {
        self.open.lock().is_some()
    }

    /// Downloads an artifact unless it is on disk, and leases it. The output is its path or a `Lease`.
    fn get(&self, py: Python<'_>, arguments: GetArguments) -> PyResult<Call> {
        self.call(py, |open| {
            let reference =
                reference(&arguments.reference, arguments.version.as_deref(), arguments.revision.as_deref())?;
            let mut options = arguments.options()?;
            let cache = open.with_token(arguments.token.as_deref())?;
            let leases = open.leases.clone();
            let progress = Progress::new();
            let handles = vec![progress.clone()];
            let work = async move {
                let GetArguments { into, keep_lease, timeout_seconds, include, exclude, .. } = arguments;
                // Checked before the download, so that a folder that must not be replaced is refused at once.
                let destination = match &into {
                    Some(dir) => Some(cache.destination(dir, LinkMode::Auto).await?),
                    None => None,
                };
                options.destination.clone_from(&destination);
                let artifact = with_timeout(timeout_seconds, cache.get_with(&reference, &options, &progress)).await?;
                log_arrival(&cache, &artifact);
                if let Some(destination) = destination {
                    let materialized = artifact.materialize(&destination, &progress).await?;
                    return Ok(CallOutput::Path(materialized.path));
                }
                if !keep_lease {
                    return Ok(CallOutput::Lease(Box::new(artifact)));
                }
                let path = CallOutput::Path(artifact.path.clone());
                // The patterns are part of the key of the lease. The empty string separates the two lists.
                let patterns = [include, vec![String::new()], exclude].concat();
                let (exact, key) = (reference.at_key(&artifact.key), (artifact.key.clone(), patterns));
                let keep = move || drop(leases.lock().insert(key, (exact, options.selection, artifact)));
                Ok(CallOutput::StoreLeases(Box::new(keep), Box::new(path)))
            };
            Ok((handles, work))
        })
    }

    /// Opens one file of an artifact for reading. The output is a `File`.
    fn open_file(&self, py: Python<'_>, arguments: OpenArguments) -> PyResult<Call> {
        self.call(py, |open| {
            let OpenArguments { reference, path, version, revision, timeout_seconds, .. } = &arguments;
            let reference = self::reference(reference, version.as_deref(), revision.as_deref())?;
            let options = OpenOptions {
                file: path.as_deref().map(FilePath::new).transpose()?,
                unchecked: arguments.unchecked,
                refresh: arguments.refresh,
                max_tier: max_tier(arguments.local_files_only),
            };
            let cache = open.with_token(arguments.token.as_deref())?;
            let (timeout, progress) = (*timeout_seconds, Progress::new());
            let handles = vec![progress.clone()];
            let work = async move {
                let file = with_timeout(timeout, cache.open_file(&reference, &options, &progress)).await?;
                Ok(CallOutput::File(Box::new(file), timeout))
            };
            Ok((handles, work))
        })
    }

    /// Publishes a file or folder under a name and version.
    #[pyo3(signature = (name, version, path, *, tag, tier, expect, sidecar, ignore_patterns, follow_links, force))]
    #[expect(clippy::too_many_arguments, reason = "the arguments of put, by name")]
    fn put(
        &self,
        py: Python<'_>,
        name: &str,
        version: &str,
        path: PathBuf,
        tag: Option<&str>,
        tier: &str,
        expect: Option<&str>,
        sidecar: bool,
        ignore_patterns: Vec<String>,
        follow_links: bool,
        force: bool,
    ) -> PyResult<Call> {
        self.call(py, |open| {
            let key = ArtifactKey::bare(&format!("{name}@{version}"))?;
            let tag = tag.map(Version::new).transpose()?;
            let tier = match tier {
                "all" => PutTier::All,
                "remote" => PutTier::Remote,
                other => return Err(unknown_tier(other, "all, remote")),
            };
            let expect = expect.map(Format::parse).transpose()?;
            let options =
                PutOptions { force, tier, expect, sidecars: sidecar, exclude: ignore_patterns, follow_links, tag };
            let (cache, progress) = (open.cache.clone(), Progress::new());
            let handles = vec![progress.clone()];
            let work = async move {
                let path = std::path::absolute(&path)
                    .map_err(|cause| Error::invalid(format!("{} is not a valid path", path.display())).cause(cause))?;
                call::json(&cache.put_with(&key, &path, &options, &progress).await?).map(CallOutput::Json)
            };
            Ok((handles, work))
        })
    }

    /// Removes an artifact from disk, from the remote or from both.
    fn evict(
        &self,
        py: Python<'_>,
        reference: &str,
        version: Option<&str>,
        tier: &str,
        dry_run: bool,
    ) -> PyResult<Call> {
        self.json_call(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let tier = match tier {
                "all" => EvictTier::All,
                "disk" => EvictTier::Disk,
                "remote" => EvictTier::Remote,
                other => return Err(unknown_tier(other, "all, disk, remote")),
            };
            // Release the leases that this cache holds on the artifact, because they would make the eviction fail.
            if !dry_run && tier != EvictTier::Remote {
                let is_same = |key: &ArtifactKey| reference.exact_key().as_ref() == Some(key);
                open.leases.lock().retain(|(key, _), _| !is_same(key));
            }
            let cache = open.cache.clone();
            Ok(async move { cache.evict(&reference, tier, dry_run).await })
        })
    }

    /// Returns budget, usage and counts of the local directory.
    fn stats(&self, py: Python<'_>) -> PyResult<Call> {
        self.json_call(py, |open| {
            let cache = open.cache.clone();
            Ok(async move { cache.stats().await })
        })
    }

    /// Lists the artifacts on disk, or on the remote.
    fn artifacts(&self, py: Python<'_>, remote: bool) -> PyResult<Call> {
        self.json_call(py, |open| {
            let cache = open.cache.clone();
            Ok(async move { if remote { cache.list_remote().await } else { cache.list().await } })
        })
    }

    /// Returns true if the artifact is complete on disk.
    fn contains(&self, py: Python<'_>, reference: &str, version: Option<&str>) -> PyResult<Call> {
        self.json_call(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let cache = open.cache.clone();
            Ok(async move { cache.contains(&reference, &Selection::all()).await })
        })
    }

    /// Returns the files and the state of one artifact.
    fn inspect(&self, py: Python<'_>, reference: &str, version: Option<&str>) -> PyResult<Call> {
        self.json_call(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let cache = open.cache.clone();
            Ok(async move { cache.inspect(&reference).await })
        })
    }

    /// Removes leftovers and, as far as requested, artifacts from the local directory.
    fn prune(
        &self,
        py: Python<'_>,
        older_than: Option<&str>,
        to: Option<&str>,
        only_copies: bool,
        dry_run: bool,
    ) -> PyResult<Call> {
        self.json_call(py, |open| {
            let of = |name, text, error: Error| {
                let refused = Error::invalid(format!("{name}={text:?}: {}", error.message()));
                match error.hint_text() {
                    Some(hint) => refused.hint(hint),
                    None => refused,
                }
            };
            let age =
                older_than.map(|text| settings::parse_lifetime(text).map_err(|error| of("older_than", text, error)));
            let size = to.map(|text| settings::parse_size(text).map_err(|error| of("to", text, error)));
            let options = PruneOptions { older_than: age.transpose()?, to: size.transpose()?, only_copies, dry_run };
            let cache = open.cache.clone();
            Ok(async move { cache.prune(&options).await })
        })
    }

    /// Checks directory, credentials, remote and origins.
    fn doctor(&self, py: Python<'_>, read_only: bool) -> PyResult<Call> {
        self.json_call(py, |_| {
            let (config, environment) = (self.config.clone(), self.environment.clone());
            Ok(async move {
                let checks = doctor::examine(&config, &environment, DoctorOptions { read_only }).await;
                let count = |severity| checks.iter().filter(|check| check.severity == severity).count();
                let (problems, warnings) = (count(Severity::Problem), count(Severity::Warning));
                Ok(json!({ "checks": checks, "problems": problems, "warnings": warnings }))
            })
        })
    }

    /// Returns the counters as JSON. Runs at once, without a `Call`.
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        self.with_open(py, |open| Ok(call::json(&open.cache.metrics().counts().answer())?.to_string()))
    }

    /// Returns the counters and the state of the directory as Prometheus metric families: as JSON, or as a page in the
    /// text format.
    fn families(&self, py: Python<'_>, text: bool) -> PyResult<Call> {
        self.json_call(py, |open| {
            let cache = open.cache.clone();
            Ok(async move {
                let mut families = cache.metrics().counts().families();
                families.extend(cache.stats().await?.families());
                if text { Ok(json!(metrics::text(&families))) } else { call::json(&families) }
            })
        })
    }

    /// Pins an artifact on disk, for `seconds` or until it is unpinned.
    fn pin(
        &self,
        py: Python<'_>,
        reference: &str,
        version: Option<&str>,
        seconds: Option<f64>,
        by: Option<String>,
        reason: Option<String>,
    ) -> PyResult<Call> {
        self.json_call(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let lifetime = seconds.map(duration).transpose()?;
            let pin = Pin {
                since_unix: Some(now.as_secs()),
                until_unix: lifetime.map(|lifetime| now.saturating_add(lifetime).as_secs()),
                by,
                reason,
            };
            let cache = open.cache.clone();
            Ok(async move { cache.pin(&reference, pin).await })
        })
    }

    /// Removes a pin.
    fn unpin(&self, py: Python<'_>, reference: &str, version: Option<&str>) -> PyResult<Call> {
        self.json_call(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let cache = open.cache.clone();
            Ok(async move { cache.unpin(&reference).await })
        })
    }

    /// Resolves a reference to one that names an exact version, without downloading files.
    fn resolve(
        &self,
        py: Python<'_>,
        reference: &str,
        version: Option<&str>,
        revision: Option<&str>,
        refresh: bool,
        local_files_only: bool,
    ) -> PyResult<Call> {
        self.json_call(py, |open| {
            let reference = self::reference(reference, version, revision)?;
            let max_tier = max_tier(local_files_only);
            let options = GetOptions { refresh, max_tier, ..GetOptions::default() };
            let cache = open.cache.clone();
            Ok(async move { cache.resolve_reference(&reference, &options).await })
        })
    }

    /// Points a tag on the remote at a version.
    fn tag(&self, py: Python<'_>, name: &str, version: &str, tag: &str) -> PyResult<Call> {
        self.json_call(py, |open| {
            let (key, tag) = (ArtifactKey::bare(&format!("{name}@{version}"))?, Version::new(tag)?);
            let cache = open.cache.clone();
            Ok(async move { cache.tag(&key, &tag).await })
        })
    }

    /// Removes a tag.
    fn untag(&self, py: Python<'_>, name: &str, tag: &str) -> PyResult<Call> {
        self.json_call(py, |open| {
            let tagged = ArtifactKey::bare(&format!("{name}@{tag}"))?;
            let cache = open.cache.clone();
            Ok(async move { cache.untag(&tagged).await })
        })
    }

    /// Reads stored files in full and compares them with their digests.
    fn verify(
        &self,
        py: Python<'_>,
        references: Vec<String>,
        tier: &str,
        repair: bool,
        bytes_per_second: Option<u64>,
    ) -> PyResult<Call> {
        self.call(py, |open| {
            let references = references.iter().map(|text| Reference::parse(text)).collect::<Result<Vec<_>>>()?;
            let tier = match tier {
                "disk" => VerifyTier::Disk,
                "remote" => VerifyTier::Remote,
                "all" => VerifyTier::All,
                other => return Err(unknown_tier(other, "disk, remote, all")),
            };
            let verification = open.cache.verification(VerifyOptions { tier, repair, bytes_per_second });
            let progress = Progress::new();
            let handles = vec![progress.clone()];
            let work = async move {
                let mut rows = Vec::new();
                for target in verification.targets(&references).await? {
                    rows.extend(verification.verify(&target, &progress).await?);
                }
                call::json(&rows).map(CallOutput::Json)
            };
            Ok((handles, work))
        })
    }

    /// Downloads a list of artifacts ahead of time. Fails before the first download if the list does not fit on disk.
    /// The output is a JSON row for each artifact, with its path or its error. The cache keeps the leases.
    fn prewarm(&self, py: Python<'_>, wanted: Vec<(String, Option<String>)>, jobs: usize) -> PyResult<Call> {
        self.with_open(py, |open| {
            let references = wanted.iter().map(|(text, version)| reference(text, version.as_deref(), None));
            let references = references.collect::<Result<Vec<_>>>()?;
            let (open, handles) = (open.clone(), ProgressHandles::default());
            let work = prewarm(open, references, jobs.clamp(1, 64), handles.clone());
            Ok(Call::with_handles(py, handles, work))
        })
    }

    /// Closes the cache: waits up to `seconds` until downloads are published and durable and background uploads are
    /// done, then releases all leases.
    fn close(&self, py: Python<'_>, seconds: f64) -> PyResult<Call> {
        process::entry(py, |_| Ok(self.close_call(py, seconds)))
    }
}

impl Cache {
    fn close_call(&self, py: Python<'_>, seconds: f64) -> Call {
        let limit = duration(seconds);
        // From here on, other calls fail. If the timeout is invalid, the cache stays open. A forked child that never
        // used the cache has nothing to close.
        let taken = if limit.is_ok() { self.open.lock().take().and_then(|mut open| open.take()) } else { None };
        let progress = Progress::new();
        Call::new(py, progress.clone(), async move {
            let limit = limit?;
            if let Some(open) = taken {
                let by_token: Vec<_> = open.by_token.lock().drain().map(|(_, cache)| cache).collect();
                let finish = async {
                    for cache in std::iter::once(&open.cache).chain(&by_token) {
                        cache.wait_for_fills().await;
                        // The library logs a failure. The next get of the artifact detects missing bytes.
                        let _ = cache.make_durable().await;
                        cache.finish_backfills(&progress).await;
                    }
                };
                if tokio::time::timeout(limit, finish).await.is_err() {
                    tracing::info!("closing timed out; pending uploads to the remote are left to a later run");
                }
                open.leases.lock().clear();
            }
            Ok(CallOutput::Json(json!(null)))
        })
    }

    /// Merges the settings and opens the cache.
    fn from_settings(
        arguments: &HashMap<String, (String, String)>,
        environment: Vec<(Vec<u8>, Vec<u8>)>,
        config_file: Option<PathBuf>,
        remote_options: Option<BTreeMap<String, String>>,
        token: Option<String>,
    ) -> Result<Self> {
        let (settings, environment) = load_settings(arguments, environment, config_file)?;
        settings.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let mut config = settings.config;
        // Default of the Python package: calls do not wait for uploads.
        config.backfill.get_or_insert(Backfill::Background);
        for (name, value) in remote_options.into_iter().flatten() {
            // Options apply to the remote and to `s3://` references.
            config.buckets.options.insert(name.clone(), value.clone());
            if let Some(remote) = &mut config.remote {
                remote.options.insert(name, value);
            }
        }
        if let Some(token) = token {
            config.hub.token = Some(Secret::new(token)).filter(|token| !token.expose().is_empty());
        }
        let open = Open::new(config.clone())?;
        Ok(Self { config, environment, open: Mutex::new(Some(ProcessLocal::new(Arc::new(open)))) })
    }

    /// Returns the open state for this process. In a forked child, opens the cache again on first use.
    fn open_in_this_process(&self, guard: &EntryGuard<'_>, py: Python<'_>) -> Result<Arc<Open>> {
        let inherited = match &*self.open.lock() {
            None => return Err(closed()),
            Some(local) => match local.get() {
                Some(open) => return Ok(open.clone()),
                // The parent opened the cache. Its table of leases is only read.
                None => local.of_any_process().map(|open| open.inherited_leases()).unwrap_or_default(),
            },
        };
        let runtime = guard.process().runtime(py)?;
        let open = guard.detach(move || {
            let open = Open::new(self.config.clone())?;
            runtime.block_on(open.acquire_leases(inherited));
            Ok::<_, Error>(Arc::new(open))
        })?;
        // Another thread may have opened or closed the cache meanwhile.
        let mut slot = self.open.lock();
        let Some(local) = &*slot else { return Err(closed()) };
        if let Some(opened_meanwhile) = local.get() {
            return Ok(opened_meanwhile.clone());
        }
        *slot = Some(ProcessLocal::new(open.clone()));
        Ok(open)
    }

    /// Calls `make` with the open state for this process.
    fn with_open<T>(&self, py: Python<'_>, make: impl FnOnce(&Arc<Open>) -> Result<T>) -> PyResult<T> {
        process::entry(py, |guard| {
            let result = self.open_in_this_process(guard, py).and_then(|open| make(&open));
            result.map_err(|error| failure::exception(py, &error))
        })
    }

    /// Returns a call that runs the future from `make`. The handles from `make` report its progress.
    fn call<W>(&self, py: Python<'_>, make: impl FnOnce(&Open) -> Result<(Vec<Progress>, W)>) -> PyResult<Call>
    where
        W: Future<Output = Result<CallOutput>> + Send + 'static,
    {
        self.with_open(py, |open| {
            let (handles, work) = make(open)?;
            Ok(Call::with_handles(py, Arc::new(Mutex::new(handles)), work))
        })
    }

    /// Returns a call with JSON as its output and without progress.
    fn json_call<W, R>(&self, py: Python<'_>, make: impl FnOnce(&Open) -> Result<W>) -> PyResult<Call>
    where
        W: Future<Output = Result<R>> + Send + 'static,
        R: Serialize,
    {
        self.call(py, |open| {
            let work = make(open)?;
            Ok((Vec::new(), async move { call::json(&work.await?).map(CallOutput::Json) }))
        })
    }
}

impl Open {
    fn new(config: Config) -> Result<Self> {
        Ok(Self { cache: modelcache::Cache::open(config)?, by_token: Mutex::default(), leases: Arc::default() })
    }

    /// Returns the cache that sends `token` to the Hub: `None` is the configured token, an empty string is no token.
    /// Callers with different tokens share the directory and the counters. They share no download, because a caller
    /// could otherwise get files that its token gives no access to.
    fn with_token(&self, token: Option<&str>) -> Result<modelcache::Cache> {
        let Some(token) = token else { return Ok(self.cache.clone()) };
        // The key `None` stands for the empty token.
        let id = Some(token.to_owned()).filter(|token| !token.is_empty());
        let mut by_token = self.by_token.lock();
        if let Some(cache) = by_token.get(&id) {
            return Ok(cache.clone());
        }
        // Drop all of them: running calls keep their clones, and a later call opens its cache again.
        if by_token.len() >= TOKENS_MAX {
            by_token.clear();
        }
        let cache = self.cache.with_hub_token(id.clone().map(Secret::new))?;
        by_token.insert(id, cache.clone());
        Ok(cache)
    }

    /// Returns the leases of the parent, which a forked child has to acquire as well. Called in the child, on the state
    /// of its parent.
    fn inherited_leases(&self) -> Vec<(Vec<String>, Reference, Selection)> {
        // While the cache is open, this mutex is locked only with the interpreter's lock held, so no fork copies it in
        // the locked state.
        let leases = self.leases.lock();
        leases
            .iter()
            .map(|((_, patterns), (exact, selection, _))| (patterns.clone(), exact.clone(), selection.clone()))
            .collect()
    }

    /// Leases these artifacts. Uses only the disk.
    async fn acquire_leases(&self, wanted: Vec<(Vec<String>, Reference, Selection)>) {
        for (patterns, exact, selection) in wanted {
            let options = GetOptions { selection: selection.clone(), max_tier: Tier::Disk, ..GetOptions::default() };
            match self.cache.get_with(&exact, &options, &Progress::new()).await {
                Ok(artifact) => {
                    self.leases.lock().insert((artifact.key.clone(), patterns), (exact, selection, artifact));
                }
                Err(error) => tracing::warn!(%error, "a forked child could not lease an artifact of its parent"),
            }
        }
    }
}

/// Downloads `references` and leases them. The output has one row for each reference, in the same order.
async fn prewarm(
    open: Arc<Open>,
    references: Vec<Reference>,
    jobs: usize,
    handles: ProgressHandles,
) -> Result<CallOutput> {
    let options = GetOptions { purpose: Purpose::Keep, durable: true, ..GetOptions::default() };
    let plan = open.cache.plan_prewarm(&references, &options).await?;
    // The row of a planned artifact is null until the artifact is leased.
    let row = |planned: &Result<_>| planned.as_ref().map_or_else(failure_row, |_| json!(null));
    let mut rows: Vec<_> = plan.artifacts.iter().map(row).collect();
    let mut leased = Vec::new();
    let mut gets = pin!(plan.gets(jobs, |index| get_one(&open, &references[index], index, &options, &handles)));
    while let Some((index, result)) = gets.next().await {
        rows[index] = match result {
            Ok(artifact) => {
                let row = call::json(&artifact.answer())?;
                leased.push((references[index].at_key(&artifact.key), artifact));
                row
            }
            Err(error) => failure_row(&error),
        };
    }
    let leases = open.leases.clone();
    // Runs with the interpreter's lock held, see `inherited_leases`. If the call is cancelled, the leases are released.
    let keep = move || {
        let mut leases = leases.lock();
        for (exact, artifact) in leased {
            leases.insert((artifact.key.clone(), vec![String::new()]), (exact, Selection::all(), artifact));
        }
    };
    Ok(CallOutput::StoreLeases(Box::new(keep), Box::new(CallOutput::Json(rows.into()))))
}

/// Gets one artifact of a list. Returns its index with the result.
async fn get_one(
    open: &Open,
    reference: &Reference,
    index: usize,
    options: &GetOptions,
    handles: &ProgressHandles,
) -> (usize, Result<Artifact>) {
    let progress = Progress::new();
    handles.lock().push(progress.clone());
    let outcome = open.cache.get_with(reference, options, &progress).await;
    (index, outcome.inspect(|artifact| log_arrival(&open.cache, artifact)))
}

/// Logs that an artifact was downloaded by this call: `minilm@1 ready: 91.6 MB from s3 in 1.8 s`.
fn log_arrival(cache: &modelcache::Cache, artifact: &Artifact) {
    let report = &artifact.report;
    let remote = cache.config().remote.as_ref().and_then(|remote| remote.url.split_once("://"));
    let remote = remote.map_or("the remote", |(scheme, _)| scheme);
    let parts = [(report.bytes.remote, remote), (report.bytes.origin, "the origin")];
    let parts = parts.iter().filter(|(bytes, _)| *bytes > 0);
    let parts: Vec<_> = parts.map(|(bytes, tier)| format!("{} from {tier}", human::bytes(*bytes))).collect();
    if !parts.is_empty() {
        tracing::info!("{} ready: {} in {:.1} s", artifact.key, parts.join(", "), report.took.as_secs_f64());
    }
}

/// Returns the row for an artifact that failed. The Python package makes an exception from it.
fn failure_row(error: &Error) -> serde_json::Value {
    json!({
        "kind": error.kind().name(),
        "message": error.to_string(),
        "hint": error.hint_text(),
        "artifact": error.artifact_name(),
        "tier": error.failed_tier(),
        "retry_after": error.wait().map(|wait| wait.as_secs_f64()),
        "transient": error.is_transient(),
    })
}

/// Merges the settings from arguments, environment and configuration files. Returns the environment, too.
fn load_settings(
    arguments: &HashMap<String, (String, String)>,
    environment: Vec<(Vec<u8>, Vec<u8>)>,
    config_file: Option<PathBuf>,
) -> Result<(Settings, Environment)> {
    let variables = environment.into_iter().map(|(name, value)| (OsString::from_vec(name), OsString::from_vec(value)));
    let environment = settings::environment(variables)?;
    let files = settings::read_files(ConfigFiles::choose(config_file.as_deref(), &environment))?;
    if let Some(unknown) = arguments.keys().find(|key| !SETTINGS.iter().any(|setting| setting.key == **key)) {
        return Err(Error::invalid(format!("unknown setting {unknown:?}")));
    }
    let argument = |(text, source): &(String, String)| Argument { text: text.clone(), source: source.clone() };
    let arguments = arguments.iter().map(|(key, value)| (key.as_str(), argument(value))).collect();
    let settings = Settings::gather_arguments(&arguments, &environment, &files, settings::read_if_there)?;
    Ok((settings.completed_on_this_machine(&environment)?, environment))
}

/// Builds the reference from the arguments of a call. A bare name takes its version from `version` or `revision`; a URI
/// takes its revision from either.
fn reference(text: &str, version: Option<&str>, revision: Option<&str>) -> Result<Reference> {
    let is_uri = text.contains("://") || text.starts_with("models:");
    match (version, revision) {
        (Some(_), Some(_)) => {
            Err(Error::invalid("a version and a revision were both given").hint("give only one of them"))
        }
        (None, None) => Reference::parse(text),
        (Some(version), None) | (None, Some(version)) if !is_uri => {
            let reference = Reference::parse(&format!("{text}@{version}"))?;
            match &reference.target {
                Target::Bare(key) if key.name.as_str() == text => Ok(reference),
                // The text contains a version, or something else that cannot precede one.
                _ => Err(Error::invalid(format!(
                    "the reference {:?} cannot be combined with the version {version:?}",
                    redact::reference(text)
                ))
                .hint("give the version once: in the reference or as an argument")),
            }
        }
        (Some(revision), None) | (None, Some(revision)) => Reference::parse(text)?.at_revision(revision),
    }
}

fn closed() -> Error {
    Error::invalid("the cache is closed").hint("create a new ModelCache")
}

fn max_tier(local_files_only: bool) -> Tier {
    if local_files_only { Tier::Disk } else { Tier::Origin }
}

/// Runs `work` with a timeout in seconds, or without one if `seconds` is `None`.
pub(crate) async fn with_timeout<T>(seconds: Option<f64>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let Some(seconds) = seconds else { return work.await };
    tokio::time::timeout(duration(seconds)?, work).await.unwrap_or_else(|_| {
        Err(Error::unavailable(format!("not done within {seconds} s"))
            .hint("use a longer timeout; calling again continues the download"))
    })
}

fn duration(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| Error::invalid(format!("{seconds} is not a valid number of seconds")))
}

fn unknown_tier(tier: &str, allowed: &str) -> Error {
    Error::invalid(format!("there is no tier {tier:?} for this operation")).hint(format!("use one of {allowed}"))
}
