//! Repos, their commits and the files in them; and the handles a test fills them with.
//!
//! A commit is immutable and its id is a hash over what it holds, so equal content gives equal ids from run to run.
//! A [`CommitBuilder`] starts from the files of the branch it will move: what is not named stays.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use super::Shared;
use crate::content::{self, Content};
use crate::serve::lock;

/// Files of at least this many bytes are LFS files unless said otherwise.
const LFS_BYTES_MIN: u64 = 1024 * 1024;
/// Names that the Hub's default `.gitattributes` sends to LFS at any size.
const LFS_ENDINGS: [&str; 10] =
    [".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".pth", ".h5", ".msgpack", ".parquet", ".zip"];

/// Which of the three sorts of repo, and its name of one or two segments.
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
    /// Reads `org/model`, `datasets/org/name`, `spaces/org/name`.
    pub(super) fn of(name: &str) -> Self {
        let (kind, name) = match name.split_once('/') {
            Some(("datasets", rest)) => (RepoKind::Dataset, rest),
            Some(("spaces", rest)) => (RepoKind::Space, rest),
            _ => (RepoKind::Model, name),
        };
        Self { kind, name: name.to_owned() }
    }

    /// The path in front of `/resolve/`: the type is named for all but models.
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
    /// Full ref names (`refs/heads/main`) to commits.
    pub(super) refs: BTreeMap<String, String>,
    /// Oldest first.
    pub(super) commits: Vec<String>,
    pub(super) readers: Option<BTreeSet<String>>,
    pub(super) accepted: Option<BTreeSet<String>>,
    pub(super) xet: bool,
}

impl RepoData {
    /// The tree that a branch, tag, pull request or full commit id names.
    pub(super) fn tree(&self, revision: &str) -> Option<Arc<Tree>> {
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
    /// What git calls the file: the hash of its content, or of its pointer if it is an LFS file.
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
        let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
        let oid = content::git_sha1(pointer.as_bytes());
        let lfs = Lfs { sha256, pointer_size: pointer.len() as u64 };
        Ok(Self { path, content, oid, lfs: Some(lfs) })
    }

    /// The digest a client checks: SHA-256 for an LFS file, git's SHA-1 for others.
    pub(super) fn digest(&self) -> &str {
        self.lfs.as_ref().map_or(&self.oid, |lfs| &lfs.sha256)
    }
}

/// A repo of the stand-in, existing from its first mention.
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

    /// Begins a commit on `main`.
    pub fn commit(&self) -> CommitBuilder {
        CommitBuilder { repo: self.clone(), branch: "main".to_owned(), changes: Vec::new() }
    }

    /// Points a branch at a commit; `refs/pr/1` and other full ref names are taken as they are.
    pub fn branch(&self, name: &str, commit: &str) {
        self.with(|repo| repo.refs.insert(full_ref("heads", name), commit.to_owned()));
    }

    /// Points a tag at a commit.
    pub fn tag(&self, name: &str, commit: &str) {
        self.with(|repo| repo.refs.insert(full_ref("tags", name), commit.to_owned()));
    }

    /// Hides the repo from everyone without this token; more calls let more tokens in.
    pub fn private(&self, token: &str) -> &Self {
        self.with(|repo| repo.readers.get_or_insert_default().insert(token.to_owned()));
        self
    }

    /// Gates the files: without a token let in by [`Repo::accept`] they are refused; listings stay open.
    pub fn gated(&self) -> &Self {
        self.with(|repo| {
            repo.accepted.get_or_insert_default();
        });
        self
    }

    /// Lets a token through the gate, making the repo gated if it was not.
    pub fn accept(&self, token: &str) -> &Self {
        self.with(|repo| repo.accepted.get_or_insert_default().insert(token.to_owned()));
        self
    }

    /// Whether LFS entries carry a `xetHash` and answers the xet headers. Off at first. There is no xet server behind
    /// it: a client that follows the hint gets 404.
    pub fn xet(&self, on: bool) -> &Self {
        self.with(|repo| repo.xet = on);
        self
    }

    /// The commit that a revision means now.
    pub fn resolve(&self, revision: &str) -> Option<String> {
        self.with(|repo| repo.tree(revision).map(|tree| tree.commit.clone()))
    }

    /// Replaces a file of a commit that is published, which no honest Hub does: same commit, other content. Errors
    /// only if a file on disk cannot be read.
    pub fn tamper(&self, commit: &str, path: &str, content: impl Into<Content>) -> io::Result<()> {
        let entry = Arc::new(Entry::new(path, content.into(), None, None)?);
        self.with(|repo| {
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

/// Changes on top of a branch, made visible together by [`CommitBuilder::publish`].
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
    /// Moves this branch (or full ref) instead of `main`. A new one starts empty.
    pub fn on(mut self, branch: &str) -> Self {
        self.branch = branch.to_owned();
        self
    }

    /// Adds or replaces a file; LFS if it has at least 1 MiB or a name like `.safetensors`.
    pub fn file(self, path: &str, content: impl Into<Content>) -> Self {
        self.change(path, Some(content.into()), None)
    }

    /// Adds or replaces an LFS file.
    pub fn lfs(self, path: &str, content: impl Into<Content>) -> Self {
        self.change(path, Some(content.into()), Some(true))
    }

    /// Adds or replaces a file that git itself holds.
    pub fn plain(self, path: &str, content: impl Into<Content>) -> Self {
        self.change(path, Some(content.into()), Some(false))
    }

    /// Adds or replaces a generated file, by the rule of [`CommitBuilder::file`].
    pub fn generated(self, path: &str, seed: u64, len: u64) -> Self {
        self.file(path, Content::generated(seed, len))
    }

    /// Removes a file.
    pub fn remove(self, path: &str) -> Self {
        self.change(path, None, None)
    }

    /// Says the SHA-256 of the file added last instead of computing it: for huge files, or to lie. Only an LFS file
    /// has one.
    pub fn claim_sha256(mut self, sha256: &str) -> Self {
        if let Some(last) = self.changes.last_mut() {
            last.claimed = Some(sha256.to_owned());
        }
        self
    }

    /// Hashes the files, makes the commit and answers its id. Errors only if a file on disk cannot be read.
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
