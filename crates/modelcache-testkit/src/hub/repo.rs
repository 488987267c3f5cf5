//! Repos, their commits and files, and the handles by which a test fills them.
//!
//! A commit is immutable. Its id is a hash over its parent and files, so equal content gives equal ids in every run. A
//! [`CommitBuilder`] starts from the files of the branch it moves and keeps those that it does not change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use super::Shared;
use crate::content::{self, Content};
use crate::serve::lock;

/// Files of at least this many bytes are LFS files by default.
const LFS_BYTES_MIN: u64 = 1024 * 1024;
/// File name endings that the Hub's default `.gitattributes` puts into LFS at any size.
const LFS_ENDINGS: [&str; 10] =
    [".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".pth", ".h5", ".msgpack", ".parquet", ".zip"];

/// Type and name of a repo. The name has one or two segments.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RepoId {
    pub(super) kind: RepoKind,
    pub(super) name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum RepoKind {
    Model,
    Dataset,
    Space,
}

impl RepoId {
    /// Parses `org/model`, `datasets/org/name` or `spaces/org/name`.
    pub(super) fn of(name: &str) -> Self {
        let (kind, name) = match name.split_once('/') {
            Some(("datasets", rest)) => (RepoKind::Dataset, rest),
            Some(("spaces", rest)) => (RepoKind::Space, rest),
            _ => (RepoKind::Model, name),
        };
        Self { kind, name: name.to_owned() }
    }

    /// Returns the path before `/resolve/`. It names the type of the repo, except for models.
    pub(super) fn web_path(&self) -> String {
        match self.kind {
            RepoKind::Model => format!("/{}", self.name),
            RepoKind::Dataset => format!("/datasets/{}", self.name),
            RepoKind::Space => format!("/spaces/{}", self.name),
        }
    }
}

/// All repos of a Hub.
#[derive(Debug, Default)]
pub(super) struct Repos {
    pub(super) by_id: BTreeMap<RepoId, RepoData>,
}

#[derive(Debug, Default)]
pub(super) struct RepoData {
    trees: HashMap<String, Arc<Tree>>,
    /// Commits by full ref name (`refs/heads/main`).
    pub(super) refs: BTreeMap<String, String>,
    /// Commit ids, oldest first.
    pub(super) commits: Vec<String>,
    pub(super) readers: Option<BTreeSet<String>>,
    pub(super) accepted: Option<BTreeSet<String>>,
    pub(super) xet: bool,
}

impl RepoData {
    /// Returns the tree of a branch, tag, pull request or full commit id.
    pub(super) fn tree(&self, revision: &str) -> Option<Arc<Tree>> {
        // A branch comes before a tag of the same name. Any other revision is a full ref or a commit id.
        let names = [format!("refs/heads/{revision}"), format!("refs/tags/{revision}"), revision.to_owned()];
        let commit = names.iter().find_map(|name| self.refs.get(name)).map_or(revision, String::as_str);
        self.trees.get(commit).cloned()
    }
}

/// The files of one commit.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) commit: String,
    pub(super) files: BTreeMap<String, Arc<Entry>>,
}

/// One file of one commit.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: String,
    pub(super) content: Content,
    /// Git's blob id of the file's content, or of its pointer if it is an LFS file.
    pub(super) oid: String,
    pub(super) lfs: Option<Lfs>,
}

#[derive(Debug)]
pub(super) struct Lfs {
    pub(super) sha256: String,
    pub(super) pointer_size: u64,
}

impl Entry {
    fn new(path: &str, content: Content, lfs: Option<bool>, claimed: Option<String>) -> io::Result<Self> {
        let by_default = content.len() >= LFS_BYTES_MIN || LFS_ENDINGS.iter().any(|ending| path.ends_with(ending));
        let path = path.to_owned();
        if !lfs.unwrap_or(by_default) {
            let oid = content.git_sha1()?;
            return Ok(Self { path, content, oid, lfs: None });
        }
        let sha256 = claimed.map_or_else(|| content.sha256(), Ok)?;
        let size = content.len();
        // The pointer that git stores in place of an LFS file.
        let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
        let oid = content::git_sha1(pointer.as_bytes());
        let lfs = Lfs { sha256, pointer_size: pointer.len() as u64 };
        Ok(Self { path, content, oid, lfs: Some(lfs) })
    }

    /// Returns the digest that a client checks: SHA-256 for an LFS file, git's SHA-1 for any other.
    pub(super) fn digest(&self) -> &str {
        self.lfs.as_ref().map_or(&self.oid, |lfs| &lfs.sha256)
    }
}

/// Handle of a repo. Repos are created on first use.
#[derive(Clone, Debug)]
pub struct Repo {
    shared: Arc<Shared>,
    id: RepoId,
}

impl Repo {
    pub(super) fn new(shared: Arc<Shared>, name: &str) -> Self {
        let id = RepoId::of(name);
        lock(&shared.repos).by_id.entry(id.clone()).or_default();
        Self { shared, id }
    }

    /// Starts a commit on `main`.
    pub fn commit(&self) -> CommitBuilder {
        CommitBuilder { repo: self.clone(), branch: "main".to_owned(), changes: Vec::new() }
    }

    /// Points a branch at a commit. Full ref names such as `refs/pr/1` are used unchanged.
    pub fn branch(&self, name: &str, commit: &str) {
        self.with(|repo| repo.refs.insert(full_ref("heads", name), commit.to_owned()));
    }

    /// Points a tag at a commit.
    pub fn tag(&self, name: &str, commit: &str) {
        self.with(|repo| repo.refs.insert(full_ref("tags", name), commit.to_owned()));
    }

    /// Makes the repo private and lets this token read it. Further calls add tokens.
    pub fn private(&self, token: &str) -> &Self {
        self.with(|repo| repo.readers.get_or_insert_default().insert(token.to_owned()));
        self
    }

    /// Makes the repo gated: its files need a token passed to [`Repo::accept`]; its listings stay readable.
    pub fn gated(&self) -> &Self {
        self.with(|repo| {
            repo.accepted.get_or_insert_default();
        });
        self
    }

    /// Grants a token access to the files of a gated repo. Makes the repo gated if it was not.
    pub fn accept(&self, token: &str) -> &Self {
        self.with(|repo| repo.accepted.get_or_insert_default().insert(token.to_owned()));
        self
    }

    /// Sets whether LFS entries have a `xetHash` and answers have the xet headers. Off by default. There is no xet
    /// server: a client that uses the hint gets 404.
    pub fn xet(&self, on: bool) -> &Self {
        self.with(|repo| repo.xet = on);
        self
    }

    /// Returns the commit that a revision currently resolves to.
    pub fn resolve(&self, revision: &str) -> Option<String> {
        self.with(|repo| repo.tree(revision).map(|tree| tree.commit.clone()))
    }

    /// Replaces a file of a published commit, which the real Hub never does: the commit id stays, the content changes.
    /// Fails only if a file on disk cannot be read.
    pub fn tamper(&self, commit: &str, path: &str, content: impl Into<Content>) -> io::Result<()> {
        let entry = Arc::new(Entry::new(path, content.into(), None, None)?);
        self.with(|repo| {
            // Requests in progress keep the old tree.
            if let Some(tree) = repo.trees.get_mut(commit) {
                let mut files = tree.files.clone();
                files.insert(path.to_owned(), entry);
                *tree = Arc::new(Tree { commit: commit.to_owned(), files });
            }
        });
        Ok(())
    }

    fn with<T>(&self, change: impl FnOnce(&mut RepoData) -> T) -> T {
        change(lock(&self.shared.repos).by_id.entry(self.id.clone()).or_default())
    }
}

fn full_ref(sort: &str, name: &str) -> String {
    if name.starts_with("refs/") { name.to_owned() } else { format!("refs/{sort}/{name}") }
}

/// Changes on top of a branch. [`CommitBuilder::publish`] makes them visible together.
#[derive(Debug)]
pub struct CommitBuilder {
    repo: Repo,
    branch: String,
    changes: Vec<Change>,
}

#[derive(Debug)]
struct Change {
    path: String,
    content: Option<Content>,
    lfs: Option<bool>,
    claimed: Option<String>,
}

impl CommitBuilder {
    /// Moves this branch (or full ref) instead of `main`. A new branch starts empty.
    pub fn on(mut self, branch: &str) -> Self {
        self.branch = branch.to_owned();
        self
    }

    /// Adds or replaces a file. It is an LFS file if it has at least 1 MiB or an ending such as `.safetensors`.
    pub fn file(self, path: &str, content: impl Into<Content>) -> Self {
        self.change(path, Some(content.into()), None)
    }

    /// Adds or replaces an LFS file.
    pub fn lfs(self, path: &str, content: impl Into<Content>) -> Self {
        self.change(path, Some(content.into()), Some(true))
    }

    /// Adds or replaces a file that is not in LFS.
    pub fn plain(self, path: &str, content: impl Into<Content>) -> Self {
        self.change(path, Some(content.into()), Some(false))
    }

    /// Adds or replaces a file of generated content; in LFS by the rule of [`CommitBuilder::file`].
    pub fn generated(self, path: &str, seed: u64, len: u64) -> Self {
        self.file(path, Content::generated(seed, len))
    }

    /// Removes a file.
    pub fn remove(self, path: &str) -> Self {
        self.change(path, None, None)
    }

    /// States the SHA-256 of the file added last instead of computing it: to save time on huge files, or to state a
    /// wrong digest. It has no effect on a file that is not in LFS.
    pub fn claim_sha256(mut self, sha256: &str) -> Self {
        if let Some(last) = self.changes.last_mut() {
            last.claimed = Some(sha256.to_owned());
        }
        self
    }

    /// Hashes the files, creates the commit and returns its id. Fails only if a file on disk cannot be read.
    pub fn publish(self) -> io::Result<String> {
        let parent = self.repo.with(|repo| repo.tree(&self.branch));
        let parent_commit = parent.as_ref().map_or("", |tree| &tree.commit).to_owned();
        let mut files = parent.map(|tree| tree.files.clone()).unwrap_or_default();
        for change in self.changes {
            match change.content {
                Some(content) => {
                    let entry = Entry::new(&change.path, content, change.lfs, change.claimed)?;
                    files.insert(change.path, Arc::new(entry));
                }
                None => {
                    files.remove(&change.path);
                }
            }
        }
        let commit = commit_id(&parent_commit, &files);
        let tree = Tree { commit: commit.clone(), files };
        // One locked step, so that no request sees the commit without its branch.
        self.repo.with(|repo| {
            repo.trees.insert(commit.clone(), Arc::new(tree));
            repo.commits.push(commit.clone());
            repo.refs.insert(full_ref("heads", &self.branch), commit.clone());
        });
        Ok(commit)
    }

    fn change(mut self, path: &str, content: Option<Content>, lfs: Option<bool>) -> Self {
        self.changes.push(Change { path: path.to_owned(), content, lfs, claimed: None });
        self
    }
}

fn commit_id(parent: &str, files: &BTreeMap<String, Arc<Entry>>) -> String {
    let mut text = format!("parent {parent}\n");
    for (path, entry) in files {
        text.push_str(&format!("{} {} {path}\n", entry.oid, entry.content.len()));
    }
    content::sha1(text.as_bytes())
}
