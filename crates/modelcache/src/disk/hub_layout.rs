//! The Hugging Face cache folder `hub/`: artifacts of the Hub in the layout of `huggingface_hub`, for programs that run
//! with `HF_HUB_CACHE` and `HF_HUB_OFFLINE=1`.
//!
//! ```text
//! hub/models--org--name/snapshots/<commit>/<path…>   hard links to the views of the artifact
//!                      /refs/<revision>              the commit, 40 hex digits without a newline
//!                      /trees/<commit>.json          all files of the commit, for huggingface_hub 1.x and later
//!                      /model-maps/<digest>.json     model names and snapshots, for `VLLM_MODEL_REDIRECT_PATH`
//! ```
//!
//! Each hard link shares the inode of a view, so the budget counts it once. Links are made and replaced under the
//! budget lock, and an eviction removes them before the views. A program may remove links (`hf cache rm`). A file of
//! another program is replaced only if it has the path of a link. A ref or model map that names an evicted commit is
//! removed, whoever wrote it.
//!
//! Other programs and users write below `hub/`, so an entry there that cannot be read is skipped: it must not stop a
//! fill or an eviction.

use super::budget::BudgetGuard;
use super::files;
use super::io_error::IoContext;
use super::layout::{ArtifactDir, HUB};
use super::link;
use super::modes;
use super::rooted::{Folders, Metadata, RootedPath};
use super::{Disk, LeasedArtifact};
use crate::digest::{Digest, GitOid, lfs_pointer};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::json;
use crate::key::FilePath;
use crate::manifest::{FileEntry, Manifest};
use crate::option_name::setting::LAYOUT;
use crate::reference::{HubRepo, RepoKind};
use crate::selection::Selection;
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

/// The version of the format of `trees/<commit>.json`.
const TREE_FORMAT: u32 = 1;
/// Maximum size of a model map in bytes.
const MODEL_MAP_BYTES_MAX: u64 = 1 << 20;

/// The folder of one repository below `hub/`, and a commit of it.
#[derive(Debug)]
pub(super) struct HubFolder {
    repo: RootedPath,
    commit: String,
}

/// An artifact in the Hugging Face cache layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HubLayout {
    /// The Hugging Face cache folder: the value for `HF_HUB_CACHE`.
    #[serde(serialize_with = "json::path")]
    pub cache_dir: PathBuf,
    /// The kind of the repository.
    #[serde(skip)]
    pub kind: RepoKind,
    /// The repository, such as `org/name`.
    pub repo_id: String,
    /// The folder with the files of the commit.
    #[serde(serialize_with = "json::path")]
    pub snapshot: PathBuf,
}

/// The content of `trees/<commit>.json`, as `huggingface_hub` writes it.
#[derive(Serialize)]
struct Tree {
    format_version: u32,
    files: BTreeMap<FilePath, TreeEntry>,
}

#[derive(Serialize)]
struct TreeEntry {
    size: u64,
    blob_id: GitOid,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
}

impl HubFolder {
    /// Returns the repository and its folder below `hub/` for the artifact in `dir`; `None` if it is not from the Hub.
    fn of(dir: &ArtifactDir) -> Option<(HubRepo, Self)> {
        let repo = HubRepo::of_key(&dir.key()?)?;
        let folder = Self::below(&dir.path().ancestors().last()?, &repo);
        Some((repo, folder))
    }

    /// Returns the folder of a repository, whose revision is a commit, below `hub/` of the cache directory `root`.
    fn below(root: &RootedPath, repo: &HubRepo) -> Self {
        Self { repo: root.join(HUB).join(repo.cache_folder()), commit: repo.revision.clone() }
    }

    fn snapshot(&self) -> RootedPath {
        self.repo.join("snapshots").join(&self.commit)
    }

    fn tree(&self) -> RootedPath {
        self.repo.join("trees").join(format!("{}.json", self.commit))
    }

    fn refs(&self) -> RootedPath {
        self.repo.join("refs")
    }

    fn model_maps(&self) -> RootedPath {
        self.repo.join("model-maps")
    }
}

impl Disk {
    /// Makes the selected files of a leased artifact from the Hub readable below `hub/`. With `revision`, a client
    /// finds the commit under that name.
    ///
    /// # Errors
    /// `Directory` if the directory cannot be written or the filesystem refuses hard links.
    pub(crate) fn link_hub_layout(
        &self,
        leased: &LeasedArtifact,
        selection: &Selection,
        revision: Option<&str>,
    ) -> Result<HubLayout> {
        let (repo, folder) = HubFolder::of(&leased.dir).ok_or_else(not_from_the_hub)?;
        let selected: Vec<_> = leased.manifest.selected(selection).map(|(path, _)| path).collect();
        let tree = tree_of(&leased.manifest)?;
        if !is_complete(&leased.dir, &folder, &selected, tree.as_deref(), revision)? {
            if leased.is_lower {
                return Err(Error::new(
                    ErrorKind::Directory,
                    "the artifact is in the lower directory, which has no Hugging Face cache of it",
                )
                .tier(Tier::Disk)
                .hint(format!("create it when the lower directory is made, with {}", LAYOUT.set_to("hub"))));
            }
            self.ensure_writable()?;
            let mut guard = self.lock_budget()?;
            // The index of every process counts the links, so the change is logged.
            guard.begin_change_of(&leased.dir)?;
            // Read the manifest again: a file may have been withdrawn since it was leased.
            let manifest = self.read_manifest(&leased.dir)?;
            let recorded = |path: &FilePath| manifest.as_ref()?.files.get(path)?.recorded_on_disk();
            for path in &selected {
                let view = leased.dir.view(path);
                if files::stat(&view)?.map(|found| found.identity()) != recorded(path) {
                    return Err(Error::unavailable(format!("{path} was changed on disk")).tier(Tier::Disk));
                }
                guard.link_into_hub(&leased.dir, &folder, path)?;
            }
            if let Some(tree) = &tree {
                self.write_hub_file(&folder.tree(), tree)?;
            }
            // The ref comes last: a client that finds it finds the files.
            if let Some(revision) = revision {
                self.write_hub_file(&folder.refs().join(revision), folder.commit.as_bytes())?;
            }
            guard.release()?;
        }
        let cache_dir = folder.repo.parent().map_or_else(PathBuf::new, |hub| hub.full());
        Ok(HubLayout { cache_dir, kind: repo.kind, repo_id: repo.id, snapshot: folder.snapshot().full() })
    }

    /// Writes the model map: a JSON object from model name to snapshot folder. Returns its path. The file is removed
    /// with the artifact of the first model.
    pub(crate) fn write_model_map(&self, leased: &LeasedArtifact, models: &[HubLayout]) -> Result<PathBuf> {
        self.ensure_writable()?;
        let (repo, _) = HubFolder::of(&leased.dir).ok_or_else(not_from_the_hub)?;
        // The map is written to this directory even if the artifact is in the lower directory, which is never written.
        let folder = HubFolder::below(self.layout().root(), &repo);
        let snapshots: BTreeMap<_, _> = models.iter().map(|model| (&model.repo_id, &model.snapshot)).collect();
        let map = serde_json::to_vec(&snapshots).map_err(|cause| {
            Error::invalid("the path of the cache directory is not UTF-8, so it cannot be in a model map").cause(cause)
        })?;
        let path = folder.model_maps().join(format!("{}.json", Digest::of(&map)));
        self.write_hub_file(&path, &map)?;
        Ok(path.full())
    }

    /// Writes a small file below `hub/`, unless it has this content.
    fn write_hub_file(&self, path: &RootedPath, content: &[u8]) -> Result<()> {
        if has_content(path, content)? {
            return Ok(());
        }
        if let Some(folder) = path.parent() {
            modes::make_dirs(&folder).at("make", &folder)?;
        }
        files::replace_unsynced(path, content, &self.layout().stagings())
    }

    /// Calls `visit` for every link below `hub/` to a view of the artifact in `dir`.
    pub(super) fn hub_links(
        &self,
        dir: &ArtifactDir,
        visit: &mut dyn FnMut(&RootedPath, &Metadata) -> Result<()>,
    ) -> Result<()> {
        let Some((_, folder)) = HubFolder::of(dir) else { return Ok(()) };
        let snapshot = folder.snapshot();
        // The usual case: the artifact has no links.
        if !is_readable_folder(&snapshot) {
            return Ok(());
        }
        let mut views = HashSet::new();
        files::walk(&dir.files(), &mut |_, metadata| {
            views.insert(metadata.ino());
            Ok(())
        })?;
        let mut links = Vec::new();
        skip_unreadable(files::walk(&snapshot, &mut |path, metadata| {
            if views.contains(&metadata.ino()) {
                links.push((path.clone(), *metadata));
            }
            Ok(())
        }));
        links.iter().try_for_each(|(path, metadata)| visit(path, metadata))
    }

    /// Removes the link below `hub/` to the view of `path`, if it is a link to `inode`.
    pub(super) fn remove_hub_link(&self, dir: &ArtifactDir, path: &FilePath, inode: u64) {
        let Some((_, folder)) = HubFolder::of(dir) else { return };
        let link = folder.snapshot().join(path.as_str());
        if files::stat(&link).is_ok_and(|found| found.is_some_and(|found| found.ino() == inode)) {
            skip_unreadable(files::remove_file(&link));
        }
    }
}

impl BudgetGuard<'_> {
    /// Links the view of `path` below `hub/`, replacing what is there.
    fn link_into_hub(&self, dir: &ArtifactDir, folder: &HubFolder, path: &FilePath) -> Result<()> {
        let (view, target) = (dir.view(path), folder.snapshot().join(path.as_str()));
        if files::is_folder(&target)? {
            return Err(Error::new(
                ErrorKind::Directory,
                format!("{target} is a folder of another program, not a file"),
            )
            .tier(Tier::Disk)
            .hint("remove that folder"));
        }
        let inode = |path: &RootedPath| files::stat(path).map(|found| found.map(|metadata| metadata.ino()));
        let present = inode(&target)?;
        if present.is_some() && present == inode(&view)? {
            return Ok(());
        }
        if let Some(parent) = target.parent() {
            modes::make_dirs(&parent).at("make", &parent)?;
        }
        let linked = match link::hard_link(&view, &target) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let stagings = self.disk().layout().stagings();
                let temporary = stagings.join(format!("{}{}", files::TEMPORARY_PREFIX, files::random_name()));
                let linked = link::hard_link(&view, &temporary).at("link", &temporary)?;
                if linked && let Err(error) = temporary.rename(&target).at("link", &target) {
                    files::remove_file(&temporary)?;
                    return Err(error);
                }
                linked
            }
            linked => linked.at("link", &target)?,
        };
        if linked {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Directory,
            "a Hugging Face cache needs hard links, which are refused: the filesystem has none, the folder hub is a \
             mount of its own, or another user owns the file",
        )
        .tier(Tier::Disk)
        .hint(format!(
            "keep the cache directory on one local filesystem, or let the owner of the files get them with {}; without \
             that setting, a get returns a path in the artifact's own folder",
            LAYOUT.set_to("hub")
        )))
    }

    /// Replaces the links below `hub/` whose views were replaced. Called under the lock that replaced the views.
    pub(super) fn refresh_hub_links<'a>(&self, dir: &ArtifactDir, paths: impl Iterator<Item = &'a FilePath>) {
        let Some((_, folder)) = HubFolder::of(dir) else { return };
        if !is_readable_folder(&folder.snapshot()) {
            return;
        }
        for path in paths {
            let link = folder.snapshot().join(path.as_str());
            if files::stat(&link).is_ok_and(|found| found.is_some_and(|found| found.is_file())) {
                skip_unreadable(self.link_into_hub(dir, &folder, path));
            }
        }
    }

    /// Removes the links below `hub/` to the views of `dir`, and the refs and the list of files of its commit.
    pub(super) fn remove_hub_layout(&self, dir: &ArtifactDir, manifest: Option<&Manifest>) -> Result<()> {
        let Some((_, folder)) = HubFolder::of(dir) else { return Ok(()) };
        if !is_readable_folder(&folder.repo) {
            return Ok(());
        }
        let mut unwanted = Vec::new();
        // First the refs, so that a client does not find a commit without files.
        skip_unreadable(files::walk(&folder.refs(), &mut |path, metadata| {
            if metadata.is_file() && has_content(path, folder.commit.as_bytes()).unwrap_or(false) {
                unwanted.push(path.clone());
            }
            Ok(())
        }));
        // Then the links. A link whose view is missing or was replaced is found by its path.
        self.disk().hub_links(dir, &mut |link, _| {
            unwanted.push(link.clone());
            Ok(())
        })?;
        for path in manifest.iter().flat_map(|manifest| manifest.files.keys()) {
            let link = folder.snapshot().join(path.as_str());
            if files::stat(&link).is_ok_and(|found| found.is_some_and(|found| found.is_file())) {
                unwanted.push(link);
            }
        }
        unwanted.push(folder.tree());
        skip_unreadable(files::walk(&folder.model_maps(), &mut |path, metadata| {
            let map = if metadata.is_file() { files::read_small(path, MODEL_MAP_BYTES_MAX) } else { Ok(None) };
            let map = map.ok().flatten().unwrap_or_default();
            if String::from_utf8_lossy(&map).contains(&folder.commit) {
                unwanted.push(path.clone());
            }
            Ok(())
        }));
        unwanted.iter().for_each(|path| skip_unreadable(remove_with_folders(path, &folder.repo)));
        // Fails while the folder has another commit, or files of another program.
        let _ = folder.repo.remove_dir();
        Ok(())
    }
}

/// Logs an error about an entry below `hub/`, which other programs and users write, and goes on.
fn skip_unreadable(result: Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "an entry of the Hugging Face cache is skipped");
    }
}

fn is_readable_folder(path: &RootedPath) -> bool {
    files::is_folder(path).unwrap_or(false)
}

fn not_from_the_hub() -> Error {
    Error::invalid("the artifact is not from the Hugging Face Hub, so it cannot be linked as a Hugging Face cache")
}

/// Removes a file, and the folders above it below `top` that are empty then.
fn remove_with_folders(path: &RootedPath, top: &RootedPath) -> Result<()> {
    files::remove_file(path)?;
    for folder in path.ancestors().skip(1).take_while(|folder| folder != top) {
        if folder.remove_dir().is_err() {
            break;
        }
    }
    Ok(())
}

/// Returns true if the links, the list of files and the ref are all there.
fn is_complete(
    dir: &ArtifactDir,
    folder: &HubFolder,
    selected: &[&FilePath],
    tree: Option<&[u8]>,
    revision: Option<&str>,
) -> Result<bool> {
    let (snapshot, mut views, mut links) = (folder.snapshot(), Folders::default(), Folders::default());
    for path in selected {
        let (view, link) = (dir.view(path), snapshot.join(path.as_str()));
        let link = links.metadata(&link).at("examine", &link)?;
        if link.is_none()
            || link.map(|found| found.ino()) != views.metadata(&view).at("examine", &view)?.map(|v| v.ino())
        {
            return Ok(false);
        }
    }
    let tree_is_there = tree.map_or(Ok(true), |tree| has_content(&folder.tree(), tree))?;
    let ref_is_there = |revision: &str| has_content(&folder.refs().join(revision), folder.commit.as_bytes());
    Ok(tree_is_there && revision.map_or(Ok(true), ref_is_there)?)
}

fn has_content(path: &RootedPath, content: &[u8]) -> Result<bool> {
    Ok(files::read_small(path, content.len() as u64)?.is_some_and(|found| found == content))
}

/// Returns the list of files in the form of `huggingface_hub`; `None` if a digest is unknown.
fn tree_of(manifest: &Manifest) -> Result<Option<Vec<u8>>> {
    fn row((path, entry): (&FilePath, &FileEntry)) -> Option<(FilePath, TreeEntry)> {
        let size = entry.size;
        let row = match (entry.git_oid, entry.sha256) {
            (Some(blob_id), _) => TreeEntry { size, blob_id, lfs_sha256: None, lfs_size: None },
            (None, sha256) => {
                let blob_id = GitOid::of(lfs_pointer(sha256?, size).as_bytes());
                TreeEntry { size, blob_id, lfs_sha256: sha256, lfs_size: Some(size) }
            }
        };
        Some((path.clone(), row))
    }
    let Some(files) = manifest.files.iter().map(row).collect::<Option<_>>() else { return Ok(None) };
    let tree = serde_json::to_vec(&Tree { format_version: TREE_FORMAT, files });
    tree.map(Some).map_err(|cause| Error::new(ErrorKind::Other, "the list of files cannot be written").cause(cause))
}
