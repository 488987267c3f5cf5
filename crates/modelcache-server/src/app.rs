//! The state that all requests share.

use crate::activity::Activity;
use crate::doctor::{Doctor, DoctorRun};
use crate::http_metrics::{HttpCounts, HttpMetrics};
use crate::hub::{Infos, OwnRequests, Rights};
use crate::listen::ConnectionCounters;
use crate::prewarm::Readiness;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared, WeakShared};
use modelcache::cache::{Artifact, FillStatus, GetOptions};
use modelcache::config::Secret;
use modelcache::key::FilePath;
use modelcache::manifest::Manifest;
use modelcache::mutex::Mutex;
use modelcache::{ArtifactKey, Cache, Error, ErrorKind, Reference, Result, Tier};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the daemon remembers that a file failed verification while it was sent. Some clients keep what they got and
/// ask for the rest of it days later.
const CORRUPT_REMEMBERED_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// Number of such files that are remembered.
const CORRUPT_FILES_MAX: usize = 1_000;
/// Number of downloads that may fail verification before the file is refused. Clients repeat a download without end as
/// long as each attempt brings bytes.
const CORRUPT_DOWNLOADS_MAX: u32 = 3;
/// How long a file is then refused before it is downloaded again.
const CORRUPT_PAUSE: Duration = Duration::from_secs(60);
/// Number of manifests that are remembered for artifacts that are not on disk yet.
const MANIFESTS_MAX: usize = 256;
/// How long the manifest of a revision is used without resolving the revision again, unless `ref_ttl` is shorter. It is
/// long enough for a client that asks for all files of a repository.
const REVISION_AGE_MAX: Duration = Duration::from_secs(5);
/// Number of leases that clients may hold at the same time.
const HELD_MAX: usize = 10_000;
/// The longest lease of a client.
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(24 * 3600);

/// A request for a manifest that several callers wait for.
type Listing = Shared<BoxFuture<'static, Result<Arc<Manifest>>>>;
type WeakListing = WeakShared<BoxFuture<'static, Result<Arc<Manifest>>>>;

/// Options of the daemon.
#[derive(Debug, Clone)]
pub struct Options {
    /// The token that clients of the native routes have to send; `None` if they need none.
    pub token: Option<Secret>,
    /// Accept requests to the native routes from other machines although there is no token.
    pub insecure: bool,
    /// Accept references with any server, bucket or registry.
    pub allow_any_origin: bool,
    /// How long a permission of the Hub is used without asking it again.
    pub auth_fresh: Duration,
    /// How long a permission of the Hub is used while the Hub cannot be reached.
    pub auth_stale: Duration,
    /// The references to get at the start.
    pub prewarm: Vec<Reference>,
    /// True if probes and metrics have an address of their own, so that `/metrics` needs the token on this one.
    pub has_admin_listener: bool,
    /// The URLs at which the daemon is served, for the status page.
    pub listen: Vec<String>,
    /// Runs the doctor for `/cache/doctor`; `None` if there is none.
    pub doctor: Option<DoctorRun>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            token: None,
            insecure: false,
            allow_any_origin: false,
            auth_fresh: Duration::from_secs(300),
            auth_stale: Duration::from_secs(3600),
            prewarm: Vec::new(),
            has_admin_listener: false,
            listen: Vec::new(),
            doctor: None,
        }
    }
}

/// The state that all requests share.
pub(crate) struct App {
    /// The cache with the daemon's own Hub token.
    pub(crate) cache: Cache,
    pub(crate) options: Options,
    pub(crate) started: Instant,
    pub(crate) doctor: Doctor,
    pub(crate) rights: Rights,
    pub(crate) infos: Infos,
    /// When the daemon last received a request that it had sent itself, because the endpoint of its Hub is its own
    /// address.
    pub(crate) own_requests: OwnRequests,
    pub(crate) readiness: Readiness,
    pub(crate) activity: Activity,
    pub(crate) http: HttpMetrics,
    pub(crate) connections: Arc<ConnectionCounters>,
    /// The manifests of artifacts that are not on disk yet, by key and by revision, each with the time of the answer.
    /// They are kept so that listing and download request them once.
    manifests: Mutex<HashMap<String, (Instant, Arc<Manifest>)>>,
    /// The running requests for manifests, so that all clients of a cold artifact share one.
    listings: Mutex<HashMap<String, WeakListing>>,
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
            rights: Rights::new(cache.clone(), options.auth_fresh, options.auth_stale),
            infos: Infos::default(),
            own_requests: OwnRequests::default(),
            readiness: Readiness::new(&options.prewarm),
            started: Instant::now(),
            doctor: Doctor::new(options.doctor.clone()),
            cache,
            options,
            activity: Activity::default(),
            http: HttpMetrics::default(),
            connections: Arc::default(),
            manifests: Mutex::default(),
            listings: Mutex::default(),
            held: Mutex::default(),
            corrupt: Mutex::default(),
        })
    }

    /// Returns the manifest of a reference. Requests the list of files from a farther tier only if neither the disk nor
    /// an earlier request has it. Concurrent calls share one request and its error.
    pub(crate) async fn manifest(&self, cache: &Cache, reference: &Reference, max_tier: Tier) -> Result<Arc<Manifest>> {
        let key = reference.exact_key();
        let name = key.as_ref().map_or_else(|| reference.to_string(), ArtifactKey::to_string);
        let revision_age_max = REVISION_AGE_MAX.min(cache.config().ref_ttl);
        if let Some((at, manifest)) = self.manifests.lock().get(&name)
            && (key.is_some() || at.elapsed() < revision_age_max)
        {
            return Ok(manifest.clone());
        }
        let manifest = self.listing(cache, reference, max_tier).await?;
        // Manifests of bare names change if they are published again; those of a commit do not.
        if manifest.key.name.scheme().is_some() {
            let mut manifests = self.manifests.lock();
            if manifests.len() >= MANIFESTS_MAX {
                manifests.clear();
            }
            for name in [name, manifest.key.to_string()] {
                manifests.insert(name, (Instant::now(), manifest.clone()));
            }
        }
        Ok(manifest)
    }

    /// Returns the running request for a manifest, or starts one.
    fn listing(&self, cache: &Cache, reference: &Reference, max_tier: Tier) -> Listing {
        let name = format!("{max_tier} {reference}");
        let mut listings = self.listings.lock();
        if let Some(listing) = listings.get(&name).and_then(WeakListing::upgrade) {
            return listing;
        }
        let (cache, reference) = (cache.clone(), reference.clone());
        let request =
            async move { cache.manifest(&reference, &GetOptions { max_tier, ..GetOptions::default() }).await };
        let listing = request.boxed().shared();
        listings.retain(|_, listing| listing.upgrade().is_some());
        listings.extend(listing.downgrade().map(|weak| (name, weak)));
        listing
    }

    /// Returns the fills in progress of all caches, the longest one first.
    pub(crate) fn fills(&self) -> Vec<FillStatus> {
        let mut fills = self.cache.fills();
        fills.extend(self.rights.caches().iter().flat_map(Cache::fills));
        fills.sort_by_key(|fill| Reverse(fill.running_for));
        fills
    }

    /// Returns the counters of requests and connections.
    pub(crate) fn http_counts(&self) -> HttpCounts {
        self.http.counts(&self.connections, self.readiness.is_ready())
    }

    /// Forgets what is remembered of an artifact that was evicted.
    pub(crate) fn forget(&self, key: &ArtifactKey) {
        self.manifests.lock().remove(&key.to_string());
    }

    /// Keeps the lease of an artifact for `time`.
    ///
    /// # Errors
    /// `Limits` if clients hold too many leases.
    pub(crate) fn hold(self: &Arc<Self>, artifact: Artifact, time: Duration) -> Result<()> {
        let mut held = self.held.lock();
        self.release_ended(&mut held);
        if held.len() >= HELD_MAX {
            return Err(Error::new(ErrorKind::Limits, format!("clients hold {HELD_MAX} leases already"))
                .hint("ask for shorter leases, or hold one lease for each artifact and machine"));
        }
        let end = Instant::now() + time.min(HOLD_MAX);
        held.push((end, artifact));
        let app = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep_until(end.into()).await;
            if let Some(app) = app.upgrade() {
                app.release_ended(&mut app.held.lock());
            }
        });
        Ok(())
    }

    /// Releases the leases whose time is over.
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
        corrupt.retain(|_, file| file.last_failure.elapsed() < CORRUPT_REMEMBERED_FOR);
        corrupt.get(&format!("{reference} {path}")).copied()
    }
}
