//! A stand-in for the Hugging Face Hub, with its CDN on another address.
//!
//! Implements the routes, headers and error codes that download clients depend on, for repos that a test creates. LFS
//! files are redirected to the CDN by signed URLs. All requests are logged, and [`Hub::faults`] injects failures.
//!
//! The CDN listens on 127.0.0.2 where the system allows it, so that it is another host also to clients that compare
//! hosts without ports. Tokens that arrive there are logged: see [`Hub::tokens_at_cdn`].

mod answer;
mod api;
mod body;
mod fault;
mod refuse;
mod repo;
mod resolve;
mod route;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::Context as _;

pub use self::fault::{HubFault, Kind as HubFaultKind};
pub use self::repo::{CommitBuilder, Repo};

use self::answer::handler;
use self::fault::Kind;
use self::repo::{Entry, Repos};
use self::resolve::CdnObject;
use crate::content::Content;
use crate::faults::Faults;
use crate::log::{Log, LoggedRequest, Place};
use crate::serve::{Server, bind, lock, serve};

/// A running Hub with its CDN. Both stop when it is dropped.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<Shared>,
    hub: Server,
    cdn: Server,
}

/// State shared by both listeners.
#[derive(Debug, Default)]
struct Shared {
    repos: Mutex<Repos>,
    cdn_objects: Mutex<HashMap<String, CdnObject>>,
    settings: Mutex<Settings>,
    faults: Faults<Kind>,
    log: Log,
    body_bytes: AtomicU64,
    urls: OnceLock<(String, String)>,
}

#[derive(Debug)]
struct Settings {
    page_size: usize,
    redirect_revisions: bool,
    signed_url_ttl: Duration,
    signing_epoch: u64,
    external_cdn_url: Option<String>,
    cdn_proxy_url: Option<String>,
    users: BTreeMap<String, String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            page_size: 1000,
            redirect_revisions: false,
            signed_url_ttl: Duration::from_secs(3600),
            signing_epoch: 0,
            external_cdn_url: None,
            cdn_proxy_url: None,
            users: BTreeMap::new(),
        }
    }
}

impl Hub {
    /// Starts an empty Hub on a free port. Fails if it cannot listen on loopback.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_on(0)
    }

    /// Like [`Hub::start`], for callers without a runtime and for a fixed port (0 picks a free one).
    pub fn start_on(port: u16) -> anyhow::Result<Self> {
        Self::start_with(port, &[])
    }

    /// Like [`Self::start_on`], with a repo for each name and folder. It answers no request before it has all of them.
    ///
    /// # Errors
    /// If the port is in use, or a folder cannot be read.
    pub fn start_with(port: u16, folders: &[(String, PathBuf)]) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let hub = bind(("127.0.0.1", port))?;
        let cdn = bind("127.0.0.2:0").or_else(|_| bind("127.0.0.1:0"))?;
        let urls = (format!("http://{}", hub.1), format!("http://{}", cdn.1));
        shared.urls.set(urls).expect("a new hub has no addresses yet");
        for (name, folder) in folders {
            commit_folder(&Repo::new(shared.clone(), name), folder)?;
        }
        let hub = serve(hub, handler(&shared, Place::Hub));
        let cdn = serve(cdn, handler(&shared, Place::Cdn));
        Ok(Self { shared, hub, cdn })
    }

    /// The value for `HF_ENDPOINT`: the Hub's URL without a trailing slash.
    pub fn url(&self) -> String {
        self.shared.hub_url().to_owned()
    }

    /// The CDN's URL, without a trailing slash.
    pub fn cdn_url(&self) -> String {
        self.shared.cdn_url().to_owned()
    }

    /// Returns the repo of this name and creates it if needed: `org/model`, `gpt2`, `datasets/org/set`,
    /// `spaces/org/app`.
    pub fn repo(&self, name: &str) -> Repo {
        Repo::new(self.shared.clone(), name)
    }

    /// Commits every file below `folder` to a repo, by its path relative to `folder`. Fails if the folder cannot be
    /// read.
    pub fn repo_from_folder(&self, name: &str, folder: impl AsRef<Path>) -> anyhow::Result<Repo> {
        let repo = self.repo(name);
        commit_folder(&repo, folder.as_ref())?;
        Ok(repo)
    }

    /// The armed faults; see [`HubFault`] for the kinds.
    pub fn faults(&self) -> &Faults<HubFaultKind> {
        &self.shared.faults
    }

    /// While down, both listeners close every connection without an answer.
    pub fn down(&self, down: bool) {
        self.hub.set_down(down);
        self.cdn.set_down(down);
    }

    /// Sets the number of entries per page of a tree. The default is 1,000.
    pub fn page_size(&self, entries: usize) {
        lock(&self.shared.settings).page_size = entries.max(1);
    }

    /// Sets whether a branch or tag is answered with 307 to its commit. Off by default, as on the real Hub.
    pub fn redirect_revisions(&self, on: bool) {
        lock(&self.shared.settings).redirect_revisions = on;
    }

    /// Sets the lifetime of signed URLs issued from now on, in whole seconds. The default is an hour.
    pub fn signed_url_ttl(&self, ttl: Duration) {
        lock(&self.shared.settings).signed_url_ttl = ttl;
    }

    /// Invalidates every signed URL issued so far: the CDN answers 403.
    pub fn expire_signed_urls(&self) {
        lock(&self.shared.settings).signing_epoch += 1;
    }

    /// Redirects LFS files to another server from now on: to `<url>/<sha256>`, with a signature as usual. This stand-in
    /// neither serves nor logs the requests to that server, and does not check their signatures.
    pub fn use_external_cdn(&self, url: &str) {
        lock(&self.shared.settings).external_cdn_url = Some(url.to_owned());
    }

    /// Redirects LFS files to the CDN through the proxy at `url` from now on.
    pub fn use_cdn_proxy(&self, url: &str) {
        lock(&self.shared.settings).cdn_proxy_url = Some(url.to_owned());
    }

    /// Registers a token under this user name for `whoami-v2`.
    pub fn user(&self, name: &str, token: &str) {
        lock(&self.shared.settings).users.insert(token.to_owned(), name.to_owned());
    }

    /// Returns all requests so far, on both listeners.
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.log.all()
    }

    /// Clears the request log and the count of body bytes.
    pub fn clear_requests(&self) {
        self.shared.log.clear();
        self.shared.body_bytes.store(0, Ordering::SeqCst);
    }

    /// Returns the GETs answered with file content, by the CDN or by the Hub itself.
    pub fn body_gets(&self) -> Vec<LoggedRequest> {
        let is_body =
            |seen: &LoggedRequest| seen.method == "GET" && seen.file.is_some() && matches!(seen.status, 200 | 206);
        self.requests().into_iter().filter(is_body).collect()
    }

    /// Bytes of file content handed to connections. Includes bytes that a client requested and did not read.
    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::SeqCst)
    }

    /// Returns the `Authorization` values that reached the CDN. A correct client sends none there.
    pub fn tokens_at_cdn(&self) -> Vec<String> {
        let at_cdn = self.requests().into_iter().filter(|seen| seen.place == Place::Cdn);
        at_cdn.filter_map(|seen| seen.authorization).collect()
    }
}

impl Shared {
    fn hub_url(&self) -> &str {
        self.urls.get().map_or("", |urls| &urls.0)
    }

    fn cdn_url(&self) -> &str {
        self.urls.get().map_or("", |urls| &urls.1)
    }

    /// Returns the size that metadata states for a file, altered if a fault is armed.
    fn metadata_size(&self, entry: &Entry) -> u64 {
        let size = entry.content.len();
        match self.faults.take("GET", &entry.path, |kind| matches!(kind, Kind::LieSize(_))) {
            Some(Kind::LieSize(by)) => size.saturating_add_signed(by),
            _ => size,
        }
    }
}

/// Publishes the files of a folder as one commit on `main`.
fn commit_folder(repo: &Repo, folder: &Path) -> anyhow::Result<()> {
    let mut commit = repo.commit();
    for path in files_below(folder)? {
        let inside = path.strip_prefix(folder).expect("a file found below a folder has its prefix");
        let inside = inside.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
        commit = commit.file(inside, Content::on_disk(&path)?);
    }
    commit.publish()?;
    Ok(())
}

fn files_below(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let listing = std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in listing {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.is_file() {
                files.push(path);
            }
        }
    }
    Ok(files)
}
