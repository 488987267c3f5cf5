//! The state that all requests share.

use crate::activity::Activity;
use crate::http_metrics::HttpMetrics;
use crate::hub::{Infos, Rights};
use crate::listen::ConnectionCounters;
use crate::prewarm::Readiness;
use modelcache::cache::{Artifact, GetOptions};
use modelcache::config::Secret;
use modelcache::key::FilePath;
use modelcache::manifest::Manifest;
use modelcache::mutex::Mutex;
use modelcache::{ArtifactKey, Cache, Error, ErrorKind, Reference, Result, Tier};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the daemon remembers that a file failed verification while it was sent. Some clients keep what they got and
/// ask for the rest of it days later.
const CORRUPT_MEMORY: Duration = Duration::from_secs(7 * 24 * 3600);
/// Number of such files that are remembered.
const CORRUPT_FILES_MAX: usize = 1_000;
/// Number of downloads that may fail verification before the file is refused. Clients repeat a download without end as
/// long as each attempt brings bytes.
const CORRUPT_DOWNLOADS_MAX: u32 = 3;
/// How long a file is then refused before it is downloaded again.
const CORRUPT_PAUSE: Duration = Duration::from_secs(60);
/// Number of manifests that are remembered for artifacts that are not on disk yet.
const MANIFESTS_MAX: usize = 256;
/// Number of leases that clients may hold at the same time.
const HELD_MAX: usize = 10_000;
/// The longest lease of a client.
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(24 * 3600);

/// Options of the daemon.
#[derive(Debug, Clone)]
pub struct Options {
    /// The token that clients of the native routes have to send; `None` if they need none.
    pub token: Option<Secret>,
    /// Accept requests to the native routes from other machines although there is no token.
    pub insecure: bool,
    /// Accept references with any server, bucket or registry.
    pub allow_any_origin: bool,
    /// How long a permission of the Hub is used while the Hub cannot be reached.
    pub auth_stale: Duration,
    /// The references to get at the start.
    pub prewarm: Vec<Reference>,
    /// True if probes and metrics have an address of their own, so that `/metrics` needs the token on this one.
    pub has_admin_listener: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            token: None,
            insecure: false,
            allow_any_origin: false,
            auth_stale: Duration::from_secs(3600),
            prewarm: Vec::new(),
            has_admin_listener: false,
        }
    }
}

/// The state that all requests share.
pub(crate) struct App {
    /// The cache with the daemon's own Hub token.
    pub(crate) cache: Cache,
    pub(crate) options: Options,
    pub(crate) rights: Rights,
    pub(crate) infos: Infos,
    pub(crate) readiness: Readiness,
    pub(crate) activity: Activity,
    pub(crate) http: HttpMetrics,
    pub(crate) connections: Arc<ConnectionCounters>,
    /// The manifests of artifacts that are not on disk yet, so that listing and download request them once.
    manifests: Mutex<HashMap<ArtifactKey, Arc<Manifest>>>,
    /// The leases that clients asked for, with their ends.
    held: Mutex<Vec<(Instant, Artifact)>>,
    /// The files that failed verification while they were sent, by reference and path.
    corrupt: Mutex<BTreeMap<String, CorruptFile>>,
}

/// A file that failed verification while it was sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CorruptFile {
    last_failure: Instant,
    /// Number of downloads that failed.
    pub(crate) failed_downloads: u32,
}

impl CorruptFile {
    /// Returns true if the file must not be downloaded again yet.
    pub(crate) fn is_refused(&self) -> bool {
        self.failed_downloads >= CORRUPT_DOWNLOADS_MAX && self.last_failure.elapsed() < CORRUPT_PAUSE
    }
}

impl App {
    pub(crate) fn new(cache: Cache, options: Options) -> Arc<Self> {
        Arc::new(Self {
            rights: Rights::new(cache.clone(), options.auth_stale),
            infos: Infos::default(),
            readiness: Readiness::new(&options.prewarm),
            cache,
            options,
            activity: Activity::default(),
            http: HttpMetrics::default(),
            connections: Arc::default(),
            manifests: Mutex::default(),
            held: Mutex::default(),
            corrupt: Mutex::default(),
        })
    }

    /// Returns the manifest of a reference. Requests the list of files from a farther tier only if neither the disk nor
    /// an earlier request has it.
    pub(crate) async fn manifest(&self, cache: &Cache, reference: &Reference, max_tier: Tier) -> Result<Arc<Manifest>> {
        let remembered = reference.exact_key().and_then(|key| self.manifests.lock().get(&key).cloned());
        if let Some(manifest) = remembered {
            return Ok(manifest);
        }
        let manifest = cache.manifest(reference, &GetOptions { max_tier, ..GetOptions::default() }).await?;
        // Manifests of bare names change if they are published again; those of a commit do not.
        if manifest.key.name.scheme().is_some() {
            let mut manifests = self.manifests.lock();
            if manifests.len() >= MANIFESTS_MAX {
                manifests.clear();
            }
            manifests.insert(manifest.key.clone(), manifest.clone());
        }
        Ok(manifest)
    }

    /// Forgets what is remembered of an artifact that was evicted.
    pub(crate) fn forget(&self, key: &ArtifactKey) {
        self.manifests.lock().remove(key);
    }

    /// Keeps the lease of an artifact for `time`.
    ///
    /// # Errors
    /// `Limits` if clients hold too many leases.
    pub(crate) fn hold(&self, artifact: Artifact, time: Duration) -> Result<()> {
        let mut held = self.held.lock();
        self.release_ended(&mut held);
        if held.len() >= HELD_MAX {
            return Err(Error::new(ErrorKind::Limits, format!("clients hold {HELD_MAX} leases already"))
                .hint("ask for shorter leases, or hold one lease for each artifact and machine"));
        }
        held.push((Instant::now() + time.min(HOLD_MAX), artifact));
        Ok(())
    }

    /// Releases the leases whose time is over.
    pub(crate) fn release_ended_leases(&self) {
        self.release_ended(&mut self.held.lock());
    }

    fn release_ended(&self, held: &mut Vec<(Instant, Artifact)>) {
        let now = Instant::now();
        held.retain(|(end, _)| *end > now);
    }

    /// Records that a response, which began at `started`, was cut because of `error`.
    pub(crate) fn record_cut_body(&self, reference: &Reference, path: &FilePath, started: Instant, error: &Error) {
        tracing::warn!(%reference, %path, %error, "the response was cut");
        self.http.count_cut();
        self.activity.record_error("response", error);
        if error.kind() == ErrorKind::Corrupt {
            let mut corrupt = self.corrupt.lock();
            if corrupt.len() >= CORRUPT_FILES_MAX {
                corrupt.clear();
            }
            let now = Instant::now();
            let file = corrupt
                .entry(format!("{reference} {path}"))
                .or_insert(CorruptFile { last_failure: now, failed_downloads: 1 });
            // Responses that began before the last failure were cut because of the same download.
            if started > file.last_failure {
                *file = CorruptFile { last_failure: now, failed_downloads: file.failed_downloads + 1 };
            }
        }
    }

    /// Returns what is known about a file if a response with it was cut because its digest did not match.
    pub(crate) fn corrupt_file(&self, reference: &Reference, path: &FilePath) -> Option<CorruptFile> {
        let mut corrupt = self.corrupt.lock();
        corrupt.retain(|_, file| file.last_failure.elapsed() < CORRUPT_MEMORY);
        corrupt.get(&format!("{reference} {path}")).copied()
    }
}
