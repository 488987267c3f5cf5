//! A stand-in of the Hugging Face Hub, with a CDN on another address.
//!
//! Speaks the routes, headers and error codes that download clients depend on, for repos that a test fills itself.
//! LFS files are redirected to the CDN by signed URLs, everything asked is logged, and [`Hub::faults`] breaks what
//! should be broken.
//!
//! Surprise: the CDN listens on 127.0.0.2 where the system allows it, so that a client which compares hosts, not
//! ports, also sees another host. Tokens that arrive there are kept in the log: see [`Hub::tokens_at_cdn`].

mod answer;
mod api;
mod body;
mod fault;
mod refuse;
mod repo;
mod resolve;
mod route;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
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
use crate::log::{Log, Place, Seen};
use crate::serve::{Server, bind, lock, serve};

/// A running Hub with its CDN; both end when it is dropped.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<Shared>,
    hub: Server,
    cdn: Server,
}

/// What both listeners work on.
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
    cdn_elsewhere: Option<String>,
    users: BTreeMap<String, String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            page_size: 1000,
            redirect_revisions: false,
            signed_url_ttl: Duration::from_secs(3600),
            signing_epoch: 0,
            cdn_elsewhere: None,
            users: BTreeMap::new(),
        }
    }
}

impl Hub {
    /// Starts an empty Hub on a free port. Errors if nothing can listen on loopback.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_on(0)
    }

    /// Like [`Hub::start`], for code without a runtime and for a fixed port (0 picks one).
    pub fn start_on(port: u16) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let hub = bind(("127.0.0.1", port))?;
        let cdn = bind("127.0.0.2:0").or_else(|_| bind("127.0.0.1:0"))?;
        let urls = (format!("http://{}", hub.1), format!("http://{}", cdn.1));
        shared.urls.set(urls).expect("a new hub has no addresses yet");
        let hub = serve(hub, handler(&shared, Place::Hub));
        let cdn = serve(cdn, handler(&shared, Place::Cdn));
        Ok(Self { shared, hub, cdn })
    }

    /// The address for `HF_ENDPOINT`, without a slash at the end.
    pub fn url(&self) -> String {
        self.shared.hub_url().to_owned()
    }

    /// The address of the CDN, without a slash at the end.
    pub fn cdn_url(&self) -> String {
        self.shared.cdn_url().to_owned()
    }

    /// The repo of this name, created empty if need be: `org/model`, `gpt2`, `datasets/org/set`, `spaces/org/app`.
    pub fn repo(&self, name: &str) -> Repo {
        Repo::new(self.shared.clone(), name)
    }

    /// Commits every file below `folder` to a repo, paths relative to it. Errors are those of reading the folder.
    pub fn repo_from_folder(&self, name: &str, folder: impl AsRef<Path>) -> anyhow::Result<Repo> {
        let folder = folder.as_ref();
        let repo = self.repo(name);
        let mut commit = repo.commit();
        for path in files_below(folder)? {
            let inside = path.strip_prefix(folder).expect("a file found below a folder has its prefix");
            let inside = inside.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
            commit = commit.file(inside, Content::on_disk(&path)?);
        }
        commit.publish()?;
        Ok(repo)
    }

    /// The faults; see [`HubFault`] for what there is.
    pub fn faults(&self) -> &Faults<HubFaultKind> {
        &self.shared.faults
    }

    /// While down, both listeners close every connection without an answer.
    pub fn down(&self, down: bool) {
        self.hub.set_down(down);
        self.cdn.set_down(down);
    }

    /// Entries in one page of a tree, 1,000 unless changed.
    pub fn page_size(&self, entries: usize) {
        lock(&self.shared.settings).page_size = entries.max(1);
    }

    /// Whether a revision that can move is answered with 307 to its commit. The real Hub does not; off at first.
    pub fn redirect_revisions(&self, on: bool) {
        lock(&self.shared.settings).redirect_revisions = on;
    }

    /// How long signed URLs live that are handed out from now on: an hour unless changed, in whole seconds.
    pub fn signed_url_ttl(&self, ttl: Duration) {
        lock(&self.shared.settings).signed_url_ttl = ttl;
    }

    /// Makes every signed URL handed out so far worthless: the CDN answers 403.
    pub fn expire_signed_urls(&self) {
        lock(&self.shared.settings).signing_epoch += 1;
    }

    /// Redirects LFS files to another server from now on: to `<url>/<sha256>`, signed all the same. What is there, and
    /// whether it looks at signatures, is that server's business; the log does not see it.
    pub fn cdn_elsewhere(&self, url: &str) {
        lock(&self.shared.settings).cdn_elsewhere = Some(url.to_owned());
    }

    /// Makes a token known to `whoami-v2` under this name.
    pub fn user(&self, name: &str, token: &str) {
        lock(&self.shared.settings).users.insert(token.to_owned(), name.to_owned());
    }

    /// Every request so far, on both listeners.
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.log.all()
    }

    /// Forgets the requests and the count of body bytes.
    pub fn clear_requests(&self) {
        self.shared.log.clear();
        self.shared.body_bytes.store(0, Ordering::SeqCst);
    }

    /// GETs that were answered with file content: the CDN's, and those the Hub served in place.
    pub fn body_gets(&self) -> Vec<Seen> {
        let is_body = |seen: &Seen| seen.method == "GET" && seen.file.is_some() && matches!(seen.status, 200 | 206);
        self.requests().into_iter().filter(is_body).collect()
    }

    /// Bytes of file content handed to connections; what a client asked for and did not read may be among them.
    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::SeqCst)
    }

    /// Values of `Authorization` that reached the CDN, where none belongs.
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

    /// The size that metadata says, which a fault may have put off.
    fn told_size(&self, entry: &Entry) -> u64 {
        let size = entry.content.len();
        match self.faults.strike("GET", &entry.path, |kind| matches!(kind, Kind::LieSize(_))) {
            Some(Kind::LieSize(by)) => size.saturating_add_signed(by),
            _ => size,
        }
    }
}

fn files_below(folder: &Path) -> anyhow::Result<Vec<std::path::PathBuf>> {
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
