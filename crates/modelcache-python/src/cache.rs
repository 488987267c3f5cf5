//! The cache as Python calls it: one method a verb, each of which gives a `Call`.
//!
//! What `get` lends is held until the cache closes. In a forked child the cache is opened anew on first use, and holds
//! what its parent held.

use crate::answers;
use crate::call::{Answer, Call, Shown};
use crate::process::{self, Inside, Owned};
use crate::{failure, logs};
use futures::{StreamExt, stream};
use modelcache::cache::{
    Artifact, EvictTier, GetOptions, LinkMode, OpenOptions, Pin, Purpose, PutOptions, PutTier, VerifyOptions,
    VerifyTier,
};
use modelcache::config::{Backfill, Secret};
use modelcache::format::Format;
use modelcache::key::{FilePath, Version};
use modelcache::progress::Progress;
use modelcache::reference::Target;
use modelcache::settings::{self, Argument, ConfigFiles, SETTINGS, Settings};
use modelcache::{ArtifactKey, Config, Error, Reference, Result, Selection, Tier, metrics, redact};
use pyo3::prelude::*;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::future::Future;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Callers' tokens whose caches are kept open.
const TOKENS_MAX: usize = 16;

/// A cache over one directory.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct Cache {
    config: Config,
    /// `None` once it is closed.
    open: Mutex<Option<Owned<Arc<Open>>>>,
}

/// A cache that is open in one process.
struct Open {
    cache: modelcache::Cache,
    /// The same for callers with a token of their own; `None`: without one.
    others: Mutex<HashMap<Option<String>, modelcache::Cache>>,
    held: Arc<Mutex<Held>>,
}

/// What is held until the cache closes: each artifact once for each choice of its files.
type Held = HashMap<(ArtifactKey, Vec<String>), (Reference, Selection, Artifact)>;

/// How a get is to be done, from its arguments.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct GetArguments {
    reference: String,
    version: Option<String>,
    revision: Option<String>,
    include: Vec<String>,
    exclude: Vec<String>,
    into: Option<PathBuf>,
    /// A token of the caller's own; an empty one: none at all. `None`: as configured.
    token: Option<String>,
    local_files_only: bool,
    refresh: bool,
    verify: bool,
    timeout_seconds: Option<f64>,
    /// Whether the cache keeps the hold; otherwise the answer is a `Lease`.
    hold: bool,
}

/// What is to be opened, and how, from the arguments of an open.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct OpenArguments {
    reference: String,
    path: Option<String>,
    version: Option<String>,
    revision: Option<String>,
    unchecked: bool,
    /// As for a get.
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
            reach: reach(self.local_files_only),
            verify: self.verify,
            // What is put elsewhere is durable there, and so it is here.
            durable: self.into.is_some(),
            ..GetOptions::default()
        })
    }
}

#[pymethods]
impl Cache {
    /// Opens the cache. `arguments` go by the keys of the settings, with the names that messages shall have for them;
    /// `environment` is the process's own, in bytes.
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
        process::entry(py, |inside| {
            logs::look_up_level(py);
            let opened = inside.detach(|| Self::gathered(&arguments, environment, config_file, remote_options, token));
            opened.map_err(|error| failure::exception(py, &error))
        })
    }

    /// The directory.
    #[getter]
    fn dir(&self) -> OsString {
        self.config.dir.clone().into_os_string()
    }

    /// The remote's address.
    #[getter]
    fn remote(&self) -> Option<String> {
        self.config.remote.as_ref().map(|remote| remote.url.clone())
    }

    /// Whether it can be used.
    #[getter]
    fn is_open(&self) -> bool {
        self.lock().is_some()
    }

    /// Makes an artifact local. The answer is its path, or a `Lease`.
    fn get(&self, py: Python<'_>, arguments: GetArguments) -> PyResult<Call> {
        self.call(py, |open| {
            let reference =
                reference(&arguments.reference, arguments.version.as_deref(), arguments.revision.as_deref())?;
            let options = arguments.options()?;
            let cache = open.for_caller(arguments.token.as_deref())?;
            let held = open.held.clone();
            let progress = Progress::new();
            let shown = vec![progress.clone()];
            let work = async move {
                let GetArguments { into, hold, timeout_seconds, include, exclude, .. } = arguments;
                let destination = match &into {
                    Some(dir) => Some(cache.destination(dir).await?),
                    None => None,
                };
                let artifact = in_time(timeout_seconds, cache.get(&reference, &options, &progress)).await?;
                if let Some(destination) = destination {
                    let made = artifact.materialize(&destination, LinkMode::Auto, &progress).await?;
                    return Ok(Answer::Path(made.path));
                }
                if !hold {
                    return Ok(Answer::Lent(Box::new(artifact)));
                }
                let path = Answer::Path(artifact.path.clone());
                let patterns = [include, vec![String::new()], exclude].concat();
                let (pinned, id) = (reference.pinned(&artifact.key), (artifact.key.clone(), patterns));
                let keep = move || drop(lock(&held).insert(id, (pinned, options.selection, artifact)));
                Ok(Answer::Kept(Box::new(keep), Box::new(path)))
            };
            Ok((shown, work))
        })
    }

    /// Opens one file of an artifact. The answer is a `File`.
    fn open_file(&self, py: Python<'_>, arguments: OpenArguments) -> PyResult<Call> {
        self.call(py, |open| {
            let OpenArguments { reference, path, version, revision, timeout_seconds, .. } = &arguments;
            let reference = self::reference(reference, version.as_deref(), revision.as_deref())?;
            let options = OpenOptions {
                file: path.as_deref().map(FilePath::new).transpose()?,
                unchecked: arguments.unchecked,
                refresh: arguments.refresh,
                reach: reach(arguments.local_files_only),
            };
            let cache = open.for_caller(arguments.token.as_deref())?;
            let (timeout, progress) = (*timeout_seconds, Progress::new());
            let shown = vec![progress.clone()];
            let work = async move {
                let file = in_time(timeout, cache.open_file(&reference, &options, &progress)).await?;
                Ok(Answer::Opened(Box::new(file), timeout))
            };
            Ok((shown, work))
        })
    }

    /// Publishes a file or folder.
    #[pyo3(signature = (name, version, path, *, tag, tier, expect, sidecar, force))]
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
        force: bool,
    ) -> PyResult<Call> {
        self.call(py, |open| {
            let key = ArtifactKey::bare(&format!("{name}@{version}"))?;
            let tag = tag.map(Version::new).transpose()?;
            let tier = match tier {
                "all" => PutTier::All,
                "remote" => PutTier::Remote,
                other => return Err(no_such_tier(other, "all, remote")),
            };
            let expect = expect.map(Format::parse).transpose()?;
            let options = PutOptions { force, tier, expect, sidecars: sidecar };
            let (cache, progress) = (open.cache.clone(), Progress::new());
            let shown = vec![progress.clone()];
            let work = async move {
                let path = std::path::absolute(&path)
                    .map_err(|cause| Error::invalid(format!("{} is no path", path.display())).cause(cause))?;
                if let Some(tag) = &tag {
                    cache.check_tag(&key, tag).await.map_err(|error| error.artifact(&key))?;
                }
                let report = cache.put(&key, &path, &options, &progress).await?;
                if let Some(tag) = &tag {
                    cache.tag(&key, tag).await?;
                }
                Ok(Answer::Json(answers::put(&report)))
            };
            Ok((shown, work))
        })
    }

    /// Removes an artifact.
    fn evict(
        &self,
        py: Python<'_>,
        reference: &str,
        version: Option<&str>,
        tier: &str,
        dry_run: bool,
    ) -> PyResult<Call> {
        self.quiet(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let tier = match tier {
                "all" => EvictTier::All,
                "disk" => EvictTier::Disk,
                "remote" => EvictTier::Remote,
                other => return Err(no_such_tier(other, "all, disk, remote")),
            };
            // Its own hold would be in the way.
            if !dry_run && tier != EvictTier::Remote {
                let is_it = |key: &ArtifactKey| reference.exact_key().as_ref() == Some(key);
                lock(&open.held).retain(|(key, _), _| !is_it(key));
            }
            let cache = open.cache.clone();
            Ok(async move { Ok(answers::evicted(&cache.evict(&reference, tier, dry_run).await?)) })
        })
    }

    /// The state of the directory.
    fn stats(&self, py: Python<'_>) -> PyResult<Call> {
        self.quiet(py, |open| {
            let cache = open.cache.clone();
            Ok(async move { answers::plain(&cache.stats().await?) })
        })
    }

    /// The artifacts on disk, or on the remote.
    fn artifacts(&self, py: Python<'_>, remote: bool) -> PyResult<Call> {
        self.quiet(py, |open| {
            let cache = open.cache.clone();
            Ok(async move {
                let rows = if remote { cache.list_remote().await? } else { cache.list().await? };
                Ok(rows.iter().map(answers::listed).collect())
            })
        })
    }

    /// The counters, as JSON.
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        self.with_open(py, |open| {
            let counts = open.cache.metrics().counts();
            let mut object = answers::plain(&counts)?;
            object["hit_rate"] = json!(counts.hit_rate());
            Ok(object.to_string())
        })
    }

    /// Counters and the state of the directory, as families of Prometheus, or as its text.
    fn families(&self, py: Python<'_>, text: bool) -> PyResult<Call> {
        self.quiet(py, |open| {
            let cache = open.cache.clone();
            Ok(async move {
                let mut families = cache.metrics().counts().families();
                families.extend(cache.stats().await?.families());
                if text { Ok(json!(metrics::text(&families))) } else { answers::plain(&families) }
            })
        })
    }

    /// Keeps an artifact on disk.
    fn pin(
        &self,
        py: Python<'_>,
        reference: &str,
        version: Option<&str>,
        seconds: Option<f64>,
        by: Option<String>,
        reason: Option<String>,
    ) -> PyResult<Call> {
        self.quiet(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let lasting = seconds.map(duration).transpose()?;
            let pin = Pin {
                since_unix: Some(now.as_secs()),
                until_unix: lasting.map(|lasting| now.saturating_add(lasting).as_secs()),
                by,
                reason,
            };
            let cache = open.cache.clone();
            Ok(async move { Ok(answers::pin(&cache.pin(&reference, pin).await?)) })
        })
    }

    /// Takes a pin off.
    fn unpin(&self, py: Python<'_>, reference: &str, version: Option<&str>) -> PyResult<Call> {
        self.quiet(py, |open| {
            let reference = self::reference(reference, version, None)?;
            let cache = open.cache.clone();
            Ok(async move { Ok(answers::pin(&cache.unpin(&reference).await?)) })
        })
    }

    /// What a reference means now.
    fn resolve(
        &self,
        py: Python<'_>,
        reference: &str,
        version: Option<&str>,
        revision: Option<&str>,
        refresh: bool,
        local_files_only: bool,
    ) -> PyResult<Call> {
        self.quiet(py, |open| {
            let reference = self::reference(reference, version, revision)?;
            let reach = reach(local_files_only);
            let options = GetOptions { refresh, reach, ..GetOptions::default() };
            let cache = open.cache.clone();
            Ok(async move { Ok(answers::resolved(&cache.pinned(&reference, &options).await?)) })
        })
    }

    /// Makes a tag mean a version.
    fn tag(&self, py: Python<'_>, name: &str, version: &str, tag: &str) -> PyResult<Call> {
        self.quiet(py, |open| {
            let (key, tag) = (ArtifactKey::bare(&format!("{name}@{version}"))?, Version::new(tag)?);
            let cache = open.cache.clone();
            Ok(async move { Ok(answers::tagged(&cache.tag(&key, &tag).await?)) })
        })
    }

    /// Removes a tag.
    fn untag(&self, py: Python<'_>, name: &str, tag: &str) -> PyResult<Call> {
        self.quiet(py, |open| {
            let tagged = ArtifactKey::bare(&format!("{name}@{tag}"))?;
            let cache = open.cache.clone();
            Ok(async move { Ok(answers::tagged(&cache.untag(&tagged).await?)) })
        })
    }

    /// Reads what is kept and compares it with its digests.
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
                other => return Err(no_such_tier(other, "disk, remote, all")),
            };
            let verification = open.cache.verification(VerifyOptions { tier, repair, bytes_per_second });
            let progress = Progress::new();
            let shown = vec![progress.clone()];
            let work = async move {
                let mut rows = Vec::new();
                for target in verification.targets(&references).await? {
                    let verified = verification.verify(&target, &progress).await?;
                    rows.extend(verified.iter().map(answers::verified));
                }
                Ok(Answer::Json(rows.into()))
            };
            Ok((shown, work))
        })
    }

    /// Fills a list ahead of time; refused as a whole if it does not fit. The answer is one `Lease` or exception each.
    fn prewarm(&self, py: Python<'_>, wanted: Vec<(String, Option<String>)>, jobs: usize) -> PyResult<Call> {
        self.with_open(py, |open| {
            let references = wanted.iter().map(|(text, version)| reference(text, version.as_deref(), None));
            let references = references.collect::<Result<Vec<_>>>()?;
            let (open, shown) = (open.clone(), Shown::default());
            let work = prewarm(open, references, jobs.clamp(1, 64), shown.clone());
            Ok(Call::showing(py, shown, work))
        })
    }

    /// In a child that was forked just now: lets go of what is the parent's alone.
    fn forked(&self) {
        let open = self.open.try_lock();
        let parents = open.as_ref().ok().and_then(|open| open.as_ref()).and_then(|owned| owned.of_any_process());
        if let Some(open) = parents {
            open.cache.forked();
        }
    }

    /// Lets go of everything, once what was fetched is durable and uploads in the background are done, or `seconds` have
    /// passed.
    fn close(&self, py: Python<'_>, seconds: f64) -> PyResult<Call> {
        process::entry(py, |_| Ok(self.closing(py, seconds)))
    }
}

impl Cache {
    fn closing(&self, py: Python<'_>, seconds: f64) -> Call {
        let taken = self.lock().take().and_then(|mut open| open.take());
        let progress = Progress::new();
        let shown = progress.clone();
        Call::new(py, shown, async move {
            if let Some(open) = taken {
                let others: Vec<_> = lock(&open.others).drain().map(|(_, cache)| cache).collect();
                let finish = async {
                    for cache in std::iter::once(&open.cache).chain(&others) {
                        cache.land().await;
                        // Told where it failed; the next get of it finds what is missing.
                        let _ = cache.make_durable().await;
                        cache.finish_backfills(&progress).await;
                    }
                };
                if tokio::time::timeout(duration(seconds)?, finish).await.is_err() {
                    tracing::info!("what has not reached the remote yet is left to a later run");
                }
                lock(&open.held).clear();
            }
            Ok(Answer::Json(json!(null)))
        })
    }

    /// Opens the cache from its settings.
    fn gathered(
        arguments: &HashMap<String, (String, String)>,
        environment: Vec<(Vec<u8>, Vec<u8>)>,
        config_file: Option<PathBuf>,
        remote_options: Option<BTreeMap<String, String>>,
        token: Option<String>,
    ) -> Result<Self> {
        let settings = gather(arguments, environment, config_file)?;
        settings.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let mut config = settings.config;
        config.backfill.get_or_insert(Backfill::Background);
        for (name, value) in remote_options.into_iter().flatten() {
            config.buckets.options.insert(name.clone(), value.clone());
            if let Some(remote) = &mut config.remote {
                remote.options.insert(name, value);
            }
        }
        if let Some(token) = token {
            config.hub.token = Some(Secret::new(token)).filter(|token| !token.expose().is_empty());
        }
        let open = Open::new(config.clone())?;
        Ok(Self { config, open: Mutex::new(Some(Owned::new(Arc::new(open)))) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Owned<Arc<Open>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cache as it is open in this process: in a forked child, opened anew.
    fn opened(&self, inside: &Inside<'_>, py: Python<'_>) -> Result<Arc<Open>> {
        let parents = match &*self.lock() {
            None => return Err(Error::invalid("the cache is closed").hint("make another ModelCache")),
            Some(owned) => match owned.get() {
                Some(open) => return Ok(open.clone()),
                None => owned.of_any_process().map(|open| open.held_again()).unwrap_or_default(),
            },
        };
        let runtime = inside.process().runtime(py)?;
        let open = inside.detach(move || {
            let open = Open::new(self.config.clone())?;
            runtime.block_on(open.hold_again(parents));
            Ok::<_, Error>(Arc::new(open))
        })?;
        *self.lock() = Some(Owned::new(open.clone()));
        Ok(open)
    }

    /// What `make` makes of the cache as it is open in this process.
    fn with_open<T>(&self, py: Python<'_>, make: impl FnOnce(&Arc<Open>) -> Result<T>) -> PyResult<T> {
        process::entry(py, |inside| {
            let made = self.opened(inside, py).and_then(|open| make(&open));
            made.map_err(|error| failure::exception(py, &error))
        })
    }

    fn call<W>(&self, py: Python<'_>, make: impl FnOnce(&Open) -> Result<(Vec<Progress>, W)>) -> PyResult<Call>
    where
        W: Future<Output = Result<Answer>> + Send + 'static,
    {
        self.with_open(py, |open| {
            let (shown, work) = make(open)?;
            Ok(Call::showing(py, Arc::new(Mutex::new(shown)), work))
        })
    }

    /// A call without progress that gives JSON.
    fn quiet<W>(&self, py: Python<'_>, make: impl FnOnce(&Open) -> Result<W>) -> PyResult<Call>
    where
        W: Future<Output = Result<serde_json::Value>> + Send + 'static,
    {
        self.call(py, |open| {
            let work = make(open)?;
            Ok((Vec::new(), async move { work.await.map(Answer::Json) }))
        })
    }
}

impl Open {
    fn new(config: Config) -> Result<Self> {
        Ok(Self { cache: modelcache::Cache::open(config)?, others: Mutex::default(), held: Arc::default() })
    }

    /// The cache for a caller who brings a token, or none.
    fn for_caller(&self, token: Option<&str>) -> Result<modelcache::Cache> {
        let Some(token) = token else { return Ok(self.cache.clone()) };
        let id = Some(token.to_owned()).filter(|token| !token.is_empty());
        let mut others = lock(&self.others);
        if let Some(cache) = others.get(&id) {
            return Ok(cache.clone());
        }
        if others.len() >= TOKENS_MAX {
            others.clear();
        }
        let cache = self.cache.with_hub_token(id.clone().map(Secret::new))?;
        others.insert(id, cache.clone());
        Ok(cache)
    }

    /// What a forked child shall hold, too.
    fn held_again(&self) -> Vec<(Vec<String>, Reference, Selection)> {
        // Only whoever holds the interpreter's lock takes this one, so no fork came while it was taken.
        let held = lock(&self.held);
        held.iter()
            .map(|((_, patterns), (pinned, selection, _))| (patterns.clone(), pinned.clone(), selection.clone()))
            .collect()
    }

    async fn hold_again(&self, wanted: Vec<(Vec<String>, Reference, Selection)>) {
        for (patterns, pinned, selection) in wanted {
            let options = GetOptions { selection: selection.clone(), reach: Tier::Disk, ..GetOptions::default() };
            match self.cache.get(&pinned, &options, &Progress::new()).await {
                Ok(artifact) => {
                    lock(&self.held).insert((artifact.key.clone(), patterns), (pinned, selection, artifact));
                }
                Err(error) => tracing::warn!(%error, "a forked child cannot hold what its parent holds"),
            }
        }
    }
}

async fn prewarm(open: Arc<Open>, references: Vec<Reference>, jobs: usize, shown: Shown) -> Result<Answer> {
    let options = GetOptions { purpose: Purpose::Keep, durable: true, ..GetOptions::default() };
    let plan = open.cache.plan_prewarm(&references, &options).await?;
    let (mut rows, mut waves) = (vec![json!(null); references.len()], [Vec::new(), Vec::new(), Vec::new()]);
    for (at, planned) in plan.artifacts.into_iter().enumerate() {
        match planned {
            // What is here first: from then on it is held. What shares files comes last, and finds those files here.
            Ok(planned) => waves[if planned.is_local { 0 } else { 1 + usize::from(planned.shares) }].push(at),
            Err(error) => rows[at] = failed(&error),
        }
    }
    let mut lent = Vec::new();
    for (wave, jobs) in waves.into_iter().zip([jobs, jobs, 1]) {
        let fills: Vec<_> = wave.into_iter().map(|at| fill(&open, &references[at], at, &options, &shown)).collect();
        let mut fills = stream::iter(fills).buffer_unordered(jobs);
        while let Some((at, filled)) = fills.next().await {
            rows[at] = match filled {
                Ok(artifact) => {
                    let row = json!({"path": artifact.path, "report": answers::got(&artifact)});
                    lent.push((references[at].pinned(&artifact.key), artifact));
                    row
                }
                Err(error) => failed(&error),
            };
        }
    }
    let held = open.held.clone();
    let keep = move || {
        let mut held = lock(&held);
        for (pinned, artifact) in lent {
            held.insert((artifact.key.clone(), vec![String::new()]), (pinned, Selection::all(), artifact));
        }
    };
    Ok(Answer::Kept(Box::new(keep), Box::new(Answer::Json(rows.into()))))
}

async fn fill(
    open: &Open,
    reference: &Reference,
    at: usize,
    options: &GetOptions,
    shown: &Shown,
) -> (usize, Result<Artifact>) {
    let progress = Progress::new();
    lock(shown).push(progress.clone());
    (at, open.cache.get(reference, options, &progress).await)
}

/// A failure that is told beside what succeeded, as the package makes exceptions of it.
fn failed(error: &Error) -> serde_json::Value {
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

fn gather(
    arguments: &HashMap<String, (String, String)>,
    environment: Vec<(Vec<u8>, Vec<u8>)>,
    config_file: Option<PathBuf>,
) -> Result<Settings> {
    let variables = environment.into_iter().map(|(name, value)| (OsString::from_vec(name), OsString::from_vec(value)));
    let environment = settings::environment(variables)?;
    let files = settings::read_files(ConfigFiles::choose(config_file.as_deref(), &environment))?;
    if let Some(unknown) = arguments.keys().find(|key| !SETTINGS.iter().any(|setting| setting.key == **key)) {
        return Err(Error::invalid(format!("there is no setting {unknown:?}")));
    }
    let argument = |(text, source): &(String, String)| Argument { text: text.clone(), source: source.clone() };
    let arguments = arguments.iter().map(|(key, given)| (key.as_str(), argument(given))).collect();
    Settings::gather_arguments(&arguments, &environment, &files, settings::read_if_there)?.placed(&environment)
}

/// The reference that a caller means. A bare name takes its version, or in its place a revision, from an argument.
fn reference(text: &str, version: Option<&str>, revision: Option<&str>) -> Result<Reference> {
    let is_uri = text.contains("://") || text.starts_with("models:");
    match (version, revision) {
        (Some(_), Some(_)) => Err(Error::invalid("both a version and a revision").hint("give one of the two")),
        (None, None) => Reference::parse(text),
        (Some(version), None) | (None, Some(version)) if !is_uri => {
            let reference = Reference::parse(&format!("{text}@{version}"))?;
            match &reference.target {
                Target::Bare(key) if key.name.as_str() == text => Ok(reference),
                _ => Err(Error::invalid(format!("{:?} and a version, {version:?}", redact::reference(text)))
                    .hint("name one version")),
            }
        }
        (Some(revision), None) | (None, Some(revision)) => Reference::parse(text)?.at_revision(revision),
    }
}

fn reach(local_files_only: bool) -> Tier {
    if local_files_only { Tier::Disk } else { Tier::Origin }
}

pub(crate) async fn in_time<T>(seconds: Option<f64>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let Some(seconds) = seconds else { return work.await };
    tokio::time::timeout(duration(seconds)?, work).await.unwrap_or_else(|_| {
        Err(Error::unavailable(format!("not done within {seconds} s"))
            .hint("give it a longer timeout; the same call goes on where this one ended"))
    })
}

fn duration(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|_| Error::invalid(format!("{seconds} is no number of seconds")))
}

fn no_such_tier(given: &str, known: &str) -> Error {
    Error::invalid(format!("there is no tier {given:?} here")).hint(format!("one of {known}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
