//! Which caller may read which repository. The Hub decides, and its answers are remembered for a while.

use super::route::Repo;
use crate::access::Caller;
use modelcache::config::Secret;
use modelcache::digest::Digest;
use modelcache::mutex::Mutex;
use modelcache::origin::{HubAnswer, HubApi};
use modelcache::{ArtifactKey, Cache, Error, ErrorKind, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a refusal is used: a user who has just accepted the conditions of a repository tries again soon.
const REFUSED_FOR: Duration = Duration::from_secs(15);
/// Longest wait for the answer of the Hub. Clients give up after 10 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
/// The same if an earlier permission can be used instead.
const FALLBACK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the Hub is not asked again after it has left a question unanswered. Otherwise each request of a client
/// would wait for it.
const SILENT_FOR: Duration = Duration::from_secs(15);
/// Number of answers and of caches that are remembered.
const REMEMBERED_MAX: usize = 10_000;

/// The rights of all callers.
pub(crate) struct Rights {
    /// The cache with the daemon's own Hub token.
    cache: Cache,
    auth_fresh: Duration,
    auth_stale: Duration,
    /// When the Hub last left a question unanswered; `None` after an answer.
    silent_at: Mutex<Option<Instant>>,
    decisions: Mutex<HashMap<(CallerId, Repo), SharedDecision>>,
    /// For each repository that is not public, a cache with the token of a caller who may read it. All callers share
    /// it, so that they also share fills.
    caches: Mutex<HashMap<Repo, Cache>>,
}

/// A decision, locked while the Hub is asked.
type SharedDecision = Arc<tokio::sync::Mutex<Decision>>;

/// The digest of a caller's token; `None` for callers without one.
type CallerId = Option<Digest>;

/// What is known about one caller and one repository.
#[derive(Debug, Default)]
struct Decision {
    allowed_at: Option<Instant>,
    refused: Option<(Instant, Refusal)>,
}

/// The Hub's refusal, to be passed on.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) code: Option<String>,
    pub(crate) message: Option<String>,
}

/// Why a caller gets no cache.
#[derive(Debug)]
pub(crate) enum NoAccess {
    /// The Hub refuses the caller.
    Refused(Refusal),
    /// The Hub does not answer, and nothing is known about the caller.
    Unknown(Error),
}

impl Rights {
    /// See [`Options`](crate::Options) for the two times.
    pub(crate) fn new(cache: Cache, auth_fresh: Duration, auth_stale: Duration) -> Self {
        Self {
            cache,
            auth_fresh,
            auth_stale,
            silent_at: Mutex::default(),
            decisions: Mutex::default(),
            caches: Mutex::default(),
        }
    }

    /// Returns true if the Hub has left a question unanswered lately.
    pub(crate) fn is_hub_silent(&self) -> bool {
        self.silent_at.lock().is_some_and(|at| at.elapsed() < SILENT_FOR)
    }

    /// Returns the cache with which `caller` reads `repo`.
    pub(crate) async fn cache_for(&self, caller: &Caller, repo: &Repo) -> Result<Cache, NoAccess> {
        let token = match caller {
            // A caller with the token of the daemon may read whatever the daemon can read with its own Hub token.
            Caller::Daemon => return Ok(self.cache.clone()),
            Caller::Hub(token) => Some(token.as_str()),
            Caller::Anonymous => None,
        };
        self.check(token, repo).await?;
        let Some(token) = token else { return Ok(self.cache.clone()) };
        if self.is_public(repo).await {
            return Ok(self.cache.clone());
        }
        let mut caches = self.caches.lock();
        if let Some(cache) = caches.get(repo) {
            return Ok(cache.clone());
        }
        let cache = self.cache.with_hub_token(Some(Secret::new(token))).map_err(NoAccess::Unknown)?;
        if caches.len() >= REMEMBERED_MAX {
            caches.clear();
        }
        caches.insert(repo.clone(), cache.clone());
        Ok(cache)
    }

    /// Returns the caches with tokens of callers.
    pub(crate) fn caches(&self) -> Vec<Cache> {
        self.caches.lock().values().cloned().collect()
    }

    /// Forgets the shared cache of a repository, because the token of its caller has lost its rights.
    pub(crate) fn forget_cache(&self, repo: &Repo) {
        self.caches.lock().remove(repo);
    }

    /// Returns the refusal of the Hub for the daemon's own Hub token; `None` if the repository can be read.
    pub(crate) async fn own_refusal(&self, repo: &Repo) -> Option<Refusal> {
        match self.check(self.cache.hub_api().token(), repo).await {
            Err(NoAccess::Refused(refusal)) => Some(refusal),
            _ => None,
        }
    }

    /// Returns true if callers without a token may read the repository.
    async fn is_public(&self, repo: &Repo) -> bool {
        self.check(None, repo).await.is_ok()
    }

    /// Asks the Hub whether a caller may read the repository, unless the last answer is fresh.
    async fn check(&self, token: Option<&str>, repo: &Repo) -> Result<(), NoAccess> {
        let caller = token.map(|token| Digest::of(token.as_bytes()));
        let decision = {
            let mut decisions = self.decisions.lock();
            if decisions.len() >= REMEMBERED_MAX {
                // Whoever sends many wrong tokens must not take the permissions of others away.
                decisions.retain(|_, decision| decision.try_lock().is_ok_and(|known| known.allowed_at.is_some()));
            }
            if decisions.len() >= REMEMBERED_MAX {
                decisions.clear();
            }
            decisions.entry((caller, repo.clone())).or_default().clone()
        };
        // While the Hub is asked, other requests of the same caller wait for the answer.
        let mut decision = decision.lock().await;
        if decision.allowed_at.is_some_and(|at| at.elapsed() < self.auth_fresh) {
            return Ok(());
        }
        let refused_for = REFUSED_FOR.min(self.auth_fresh);
        if let Some((_, refusal)) = decision.refused.as_ref().filter(|(at, _)| at.elapsed() < refused_for) {
            return Err(NoAccess::Refused(refusal.clone()));
        }
        // While the Hub does not answer, a permission may be used for `auth_stale`.
        let is_usable = decision.allowed_at.is_some_and(|at| at.elapsed() < self.auth_stale);
        let has_fallback = is_usable || self.was_public(repo).await;
        let timeout = if has_fallback { FALLBACK_TIMEOUT } else { ANSWER_TIMEOUT };
        match self.ask(token, repo, timeout).await {
            Ok(None) => {
                if token.is_none() {
                    self.record_public(repo, decision.allowed_at.is_none()).await;
                }
                *decision = Decision { allowed_at: Some(Instant::now()), refused: None };
                Ok(())
            }
            Ok(Some(refusal)) => {
                if token.is_none() {
                    self.record_not_public(repo).await;
                }
                *decision = Decision { allowed_at: None, refused: Some((Instant::now(), refusal.clone())) };
                Err(NoAccess::Refused(refusal))
            }
            Err(error) if has_fallback => {
                tracing::debug!(repo = repo.id, %error, "the Hub does not answer; using an earlier permission");
                Ok(())
            }
            Err(error) => Err(NoAccess::Unknown(error)),
        }
    }

    /// Asks the Hub. Returns its refusal, or `None` if the caller may read the files of the repository.
    async fn ask(&self, token: Option<&str>, repo: &Repo, timeout: Duration) -> Result<Option<Refusal>> {
        if self.cache.config().offline {
            return Err(Error::unavailable("the daemon is offline, and asks no origin what a caller may read")
                .hint("send the daemon's own token (MODEL_CACHE_TOKEN), or start the daemon online once"));
        }
        let (hub, path) = (self.cache.hub_api(), repo.api_path());
        let answer = self.within(timeout, hub.get(&format!("{path}/auth-check"), token)).await?;
        let is_unknown_call = answer.error_code.is_none() && matches!(answer.status, 404 | 405 | 410 | 501);
        if !is_unknown_call {
            return decide(answer);
        }
        // The server is a mirror that does not know the call. A caller to whom it describes a repository may read the
        // files, unless the repository is gated.
        let answer = self.within(timeout, hub.get(&path, token)).await?;
        let is_gated = serde_json::from_slice::<serde_json::Value>(&answer.body)
            .is_ok_and(|info| !matches!(info.get("gated"), None | Some(serde_json::Value::Bool(false))));
        match decide(answer)? {
            None if is_gated => Ok(Some(Refusal {
                status: 403,
                code: Some("GatedRepo".into()),
                message: Some("the server at HF_ENDPOINT does not tell who may read this gated repository".into()),
            })),
            decision => Ok(decision),
        }
    }

    /// Limits the wait for an answer of the Hub. Does not ask a Hub that has been silent lately.
    async fn within(&self, timeout: Duration, request: impl Future<Output = Result<HubAnswer>>) -> Result<HubAnswer> {
        let silent = || Error::unavailable(format!("the Hub did not answer within {} s", timeout.as_secs()));
        if self.is_hub_silent() {
            return Err(silent());
        }
        let answer = tokio::time::timeout(timeout, request).await;
        *self.silent_at.lock() = answer.is_err().then(Instant::now);
        answer.unwrap_or_else(|_| Err(silent()))
    }

    async fn record_public(&self, repo: &Repo, is_new: bool) {
        if let Some(name) = self.name(repo).filter(|_| is_new)
            && let Err(error) = self.cache.mark_public(&name).await
        {
            tracing::debug!(repo = repo.id, %error, "cannot record that the repository is public");
        }
    }

    async fn record_not_public(&self, repo: &Repo) {
        if let Some(name) = self.name(repo)
            && self.was_public(repo).await
            && let Err(error) = self.cache.unmark_public(&name).await
        {
            tracing::warn!(repo = repo.id, %error, "cannot record that the repository is not public any more");
        }
    }

    /// Returns true if the repository was public when the Hub last answered a caller without a token.
    async fn was_public(&self, repo: &Repo) -> bool {
        match self.name(repo) {
            Some(name) => self.cache.is_marked_public(&name).await.unwrap_or(false),
            None => false,
        }
    }

    fn name(&self, repo: &Repo) -> Option<modelcache::key::ArtifactName> {
        // Any commit will do.
        let reference = self.cache.reference(&repo.reference(&"0".repeat(40))).ok()?;
        reference.exact_key().map(|ArtifactKey { name, .. }| name)
    }
}

/// Returns the refusal in an answer; `None` if the answer grants access.
///
/// # Errors
/// `Unavailable` if the answer decides nothing.
fn decide(answer: HubAnswer) -> Result<Option<Refusal>> {
    let HubAnswer { status, error_code, error_message, retry_after, .. } = answer;
    match status {
        200..=299 => Ok(None),
        401 | 403 | 404 | 451 => Ok(Some(Refusal { status, code: error_code, message: error_message })),
        _ => {
            let error = Error::new(ErrorKind::Unavailable, format!("the Hub answered {status}"));
            Err(retry_after.map_or(error.clone(), |wait| error.retry_after(wait)))
        }
    }
}

/// Waits for `work`, which sends requests to the Hub. Fails as soon as the Hub asks for a long pause, so that the
/// client is told instead of kept waiting.
pub(crate) async fn unless_paused<T>(hub: &HubApi, work: impl Future<Output = Result<T>>) -> Result<T> {
    /// A shorter pause is waited out.
    const PAUSE_MAX: Duration = Duration::from_secs(2);
    let paused = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if let Some(left) = hub.pause().filter(|left| *left > PAUSE_MAX) {
                return left;
            }
        }
    };
    tokio::select! {
        biased;
        done = work => done,
        left = paused => Err(Error::unavailable("the Hub has asked for a pause (429)").retry_after(left)),
    }
}
