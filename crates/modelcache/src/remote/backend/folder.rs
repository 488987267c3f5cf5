//! A local folder, for instance on a shared file system, with the same layout as a bucket.
//!
//! A file appears by a rename, after it is complete, verified and synced. Copies are hard links; without them, files
//! are uploaded again. Symbolic links are followed inside the folder only.

use super::{Backend, CopyOutcome, CopyRequest, EndpointContext, WalkedFiles, failure};
use crate::check::{Area, Check, Clock};
use crate::config::RemoteConfig;
use crate::disk::{link_is_refused, sync_folder};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::ladder::PartHasher;
use crate::remote::upload::{Upload, changed, ensure_digest, open, unreadable};
use crate::runtime::blocking;
use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::list::PaginatedListResult;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ListResult, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutResult};
#[cfg(target_os = "linux")]
use rustix::fs::{CWD, RenameFlags};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

/// Name prefix of temporary files.
const TEMPORARY_PREFIX: &str = "upload-";

/// Size of one read of a local file, in bytes.
const SLICE_BYTES: usize = 1 << 20;

/// Most attempts to create a file, or to rename it, while concurrent evictions remove its folder.
const ATTEMPTS_MAX: usize = 11;

/// An opened folder.
pub(super) struct FolderBackend {
    objects: LocalFileSystem,
    root: PathBuf,
    prefix: String,
    context: EndpointContext,
}

impl FolderBackend {
    pub(super) fn open(folder: &FsPath) -> Result<Self> {
        let unusable = || Error::invalid(format!("the remote's folder {folder:?} cannot be used")).tier(Tier::Remote);
        let prefix = Path::from_absolute_path(folder).map_err(|cause| unusable().cause(cause))?.as_ref().to_owned();
        let shown_path = folder.display().to_string();
        Ok(Self {
            objects: LocalFileSystem::new().with_fsync(true),
            root: folder.to_path_buf(),
            prefix,
            context: EndpointContext { container: shown_path.clone(), endpoint: shown_path, region: String::new() },
        })
    }

    /// Returns the path of the file that holds the object `key`.
    fn file(&self, key: &Path) -> Result<PathBuf> {
        let relative = key.as_ref().strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix('/'));
        let outside = || Error::new(ErrorKind::Other, format!("{key} is outside the remote"));
        Ok(self.root.join(relative.ok_or_else(outside)?))
    }

    /// Hard-links an object to `copy.to`, and makes the new name durable.
    async fn link(&self, copy: &CopyRequest<'_>) -> Result<()> {
        let (source, target) = (self.file(copy.from)?, self.file(copy.to)?);
        let (staging, root) = (self.file(copy.staging)?, self.root.clone());
        let link = move || {
            std::fs::create_dir_all(&staging)?;
            // `hard_link` does not replace an existing target, so link to a temporary name and rename it.
            let temporary = temporary_in(&staging);
            std::fs::hard_link(&source, &temporary)?;
            let renamed = place_durably(&temporary, &target, &root, |from, to| std::fs::rename(from, to));
            // If both names are links to the same file, `rename` does nothing and the temporary name stays.
            let _ = std::fs::remove_file(&temporary);
            renamed
        };
        blocking(move || link().map_err(|cause| Error::new(ErrorKind::Other, "cannot create a hard link").cause(cause)))
            .await
    }
}

#[async_trait]
impl Backend for FolderBackend {
    fn objects(&self) -> &dyn ObjectStore {
        &self.objects
    }

    /// Unlike `put` of [`LocalFileSystem`], this also works on a filesystem that refuses hard links or syncs of
    /// folders.
    async fn put(&self, key: &Path, bytes: Bytes, mode: PutMode) -> object_store::Result<PutResult> {
        let is_new = match mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => {
                let options = PutOptions { mode, ..PutOptions::default() };
                return self.objects.put_opts(key, bytes.into(), options).await;
            }
        };
        let generic = |source| object_store::Error::Generic { store: "folder", source };
        let (target, root) = (self.file(key).map_err(|error| generic(error.into()))?, self.root.clone());
        let written = tokio::task::spawn_blocking(move || write_object(&bytes, &target, &root, is_new)).await;
        match written.map_err(|panicked| generic(panicked.into()))? {
            Ok(()) => {}
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
                return Err(object_store::Error::AlreadyExists { path: key.to_string(), source: cause.into() });
            }
            Err(cause) => return Err(generic(cause.into())),
        }
        let e_tag = self.objects.head(key).await?.e_tag;
        Ok(PutResult { e_tag, version: None, extensions: Default::default() })
    }

    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn endpoint_context(&self) -> &EndpointContext {
        &self.context
    }

    fn unusable_key(&self, key: &Path) -> Option<String> {
        // `LocalFileSystem` writes a file as `name#1` before it renames it to `name`, and hides such names in listings.
        let numbered = |name: &str| {
            name.split_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        let is_numbered = key.filename().is_some_and(numbered);
        is_numbered.then(|| {
            "in a remote that is a folder, a name that ends in # and digits is the name of an upload in progress"
                .to_owned()
        })
    }

    /// Lists all objects as one page.
    async fn list_page(
        &self,
        prefix: Option<&Path>,
        one_level: bool,
        _token: Option<String>,
    ) -> object_store::Result<PaginatedListResult> {
        let result = match one_level {
            true => self.objects.list_with_delimiter(prefix).await?,
            false => ListResult {
                objects: self.objects.list(prefix).try_collect().await?,
                common_prefixes: Vec::new(),
                extensions: Default::default(),
            },
        };
        Ok(PaginatedListResult { result, page_token: None })
    }

    async fn copy(&self, _store: &Arc<crate::remote::store::Store>, copy: &CopyRequest<'_>) -> Result<CopyOutcome> {
        self.link(copy).await.map(|()| CopyOutcome::Done(None))
    }

    async fn put_file(&self, upload: &Upload, staging: &Path) -> Result<()> {
        let (target, staging) = (self.file(&upload.object)?, self.file(staging)?);
        let (upload, root, context) = (upload.clone(), self.root.clone(), self.context.clone());
        blocking(move || copy_into(&upload, &target, &staging, &root, &context)).await
    }

    async fn sweep_unfinished(&self, staging: &Path) {
        let Ok(staging) = self.file(staging) else { return };
        let _ = tokio::task::spawn_blocking(move || sweep_unfinished(&staging)).await;
    }

    async fn remove_empty_folders(&self, folder: &Path, levels_above: usize) {
        let Ok(folder) = self.file(folder) else { return };
        let root = self.root.clone();
        let _ = tokio::task::spawn_blocking(move || remove_empty(&folder, &root, levels_above)).await;
    }

    async fn walk(&self, base: &str) -> Result<Option<WalkedFiles>> {
        if self.leads_outside(base).await {
            tracing::warn!(path = base, "a link leads out of the remote's folder; its target is skipped");
            return Ok(Some(WalkedFiles::default()));
        }
        let (root, folder) = (self.root.clone(), self.root.join(base));
        match blocking(move || Ok(walk(&root, &folder))).await? {
            Ok(walked) => Ok(Some(walked)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(Some(WalkedFiles::default()))
            }
            Err(error) => Err(failure::from_io(&error, &format!("cannot list {base:?}"), &self.context)),
        }
    }

    /// Callers do not follow a link that leads outside. Otherwise a user with write access to a shared folder could
    /// make another user's process read files that the first user has no permission to read.
    async fn leads_outside(&self, base: &str) -> bool {
        let (root, path) = (self.root.clone(), self.root.join(base));
        // A path that does not exist is not outside. Its lookup finds no file.
        let leads_outside = move || match (root.canonicalize(), path.canonicalize()) {
            (Ok(root), Ok(path)) => !path.starts_with(root),
            _ => false,
        };
        tokio::task::spawn_blocking(leads_outside).await.unwrap_or(true)
    }

    async fn explain(&self, error: object_store::Error, what_failed: &str) -> Error {
        failure::translate(error, what_failed, &self.context)
    }

    fn write_permission_hint(&self, _error: &Error) -> String {
        format!("check owner and mode of the folder {}", self.context.container)
    }

    async fn examine(&self, _config: &RemoteConfig, _clock: &Clock, checks: &mut Vec<Check>) -> Result<bool> {
        checks.push(Check::ok(Area::Remote, format!("the folder {}", self.root.display())));
        if self.root.is_dir() {
            return Ok(true);
        }
        let message = format!("{} does not exist; the first put creates it", self.root.display());
        let fix = "check whether a mount is missing; otherwise no action is needed";
        checks.push(Check::warning(Area::Remote, message, fix));
        Ok(false)
    }
}

/// Returns a new name for a temporary file in `staging`.
fn temporary_in(staging: &FsPath) -> PathBuf {
    staging.join(format!("{TEMPORARY_PREFIX}{:016x}", rand::random::<u64>()))
}

/// Copies `upload` to `target` through a temporary file in `staging`.
fn copy_into(
    upload: &Upload,
    target: &FsPath,
    staging: &FsPath,
    root: &FsPath,
    context: &EndpointContext,
) -> Result<()> {
    let what_failed = format!("cannot write {}", upload.object);
    let failed = |io: std::io::Error| failure::from_io(&io, &what_failed, context);
    let mut source = open(&upload.file)?;
    std::fs::create_dir_all(staging).map_err(failed)?;
    // The name of the temporary file does not extend the name of the target, which may have the maximum length.
    let temporary = temporary_in(staging);
    let mut copy = File::create_new(&temporary).map_err(failed)?;
    // Verify, sync, rename: the target appears complete and durable, or not at all.
    let copied = copy_checked(&mut source, &mut copy, upload, failed)
        .and_then(|()| copy.sync_all().map_err(failed))
        .and_then(|()| place_durably(&temporary, target, root, |from, to| std::fs::rename(from, to)).map_err(failed));
    if copied.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    copied
}

/// Copies the file and verifies size and digest of the copied bytes.
fn copy_checked(
    source: &mut File,
    copy: &mut File,
    upload: &Upload,
    failed: impl Fn(std::io::Error) -> Error,
) -> Result<()> {
    let mut hasher = PartHasher::new();
    let mut buffer = vec![0; SLICE_BYTES];
    let mut size = 0;
    loop {
        let got = source.read(&mut buffer).map_err(|cause| unreadable(&upload.file, cause))?;
        if got == 0 {
            break;
        }
        hasher.update(&buffer[..got]);
        copy.write_all(&buffer[..got]).map_err(&failed)?;
        size += got as u64;
    }
    if size != upload.size {
        return Err(changed(&upload.file, &format!("{size} bytes, expected {}", upload.size)));
    }
    ensure_digest(upload.sha256, hasher.finish(), &upload.file)
}

/// Writes a small object through a temporary file beside `target`. With `is_new`, fails with `AlreadyExists` if the
/// target exists.
fn write_object(bytes: &[u8], target: &FsPath, root: &FsPath, is_new: bool) -> io::Result<()> {
    let folder = target.parent().unwrap_or(target);
    // `LocalFileSystem` hides names of this form in listings.
    let temporary = folder.join(format!("#{}", rand::random::<u64>()));
    let created = retry_if_removed(|| {
        std::fs::create_dir_all(folder)?;
        File::create_new(&temporary)
    });
    let written = created.and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        let rename =
            |from: &FsPath, to: &FsPath| if is_new { rename_no_replace(from, to) } else { std::fs::rename(from, to) };
        place_durably(&temporary, target, root, rename)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// Renames `from` to `to`. Fails with `AlreadyExists` if `to` exists, and with `Unsupported` if the filesystem has no
/// call that guarantees it.
fn rename_no_replace(from: &FsPath, to: &FsPath) -> io::Result<()> {
    let is_refusal = |cause: &io::Error| link_is_refused(cause) || cause.kind() == io::ErrorKind::InvalidInput;
    match std::fs::hard_link(from, to) {
        // Some filesystems have no hard links.
        Err(cause) if is_refusal(&cause) => {}
        linked => return linked.and_then(|()| std::fs::remove_file(from)),
    }
    #[cfg(target_os = "linux")]
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(io::Error::from) {
        // Network filesystems have no such rename.
        Err(cause) if is_refusal(&cause) => {}
        renamed => return renamed,
    }
    // Take the name first, and then replace the empty file. A reader in between finds a damaged record, and tries
    // again.
    match File::create_new(to) {
        Err(cause) if is_refusal(&cause) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "it has no hard links and no other way to create a file only if it is absent",
        )),
        created => created.and_then(|_| std::fs::rename(from, to)),
    }
}

/// Calls `create` again as long as it fails because a concurrent evict removed a new folder while it was empty.
fn retry_if_removed<T>(mut create: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut attempts = 1;
    loop {
        match create() {
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < ATTEMPTS_MAX => attempts += 1,
            ended => return ended,
        }
    }
}

/// Renames `temporary` to `target` by `rename`, and syncs the folders from `target` up to `root`, the remote's folder.
fn place_durably(
    temporary: &FsPath,
    target: &FsPath,
    root: &FsPath,
    rename: impl Fn(&FsPath, &FsPath) -> io::Result<()>,
) -> std::io::Result<()> {
    let folder = target.parent().unwrap_or(target);
    retry_if_removed(|| {
        std::fs::create_dir_all(folder)?;
        rename(temporary, target)
    })?;
    // A new folder is durable only after its parent is synced.
    for ancestor in folder.ancestors() {
        sync_folder(&File::open(ancestor)?)?;
        if ancestor == root {
            break;
        }
    }
    Ok(())
}

/// Removes the temporary files of killed writers from `staging`.
fn sweep_unfinished(staging: &FsPath) {
    for entry in std::fs::read_dir(staging).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Removes the empty folders in `folder`, `folder` itself if it is empty, and up to `levels_above` empty folders above
/// `folder`. `root` stays.
fn remove_empty(folder: &FsPath, root: &FsPath, levels_above: usize) {
    fn remove_from_below(folder: &FsPath) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_from_below(&entry.path());
            }
        }
        // Fails if the folder is not empty, which is expected.
        let _ = std::fs::remove_dir(folder);
    }
    remove_from_below(folder);
    let above = folder.ancestors().skip(1).take(levels_above);
    for folder in above.take_while(|folder| *folder != root && folder.starts_with(root)) {
        if std::fs::remove_dir(folder).is_err() {
            break;
        }
    }
}

/// Returns the paths of all files below `top`, and of all other entries: names that are not UTF-8, pipes and other
/// special files, and links to targets outside `root`.
fn walk(root: &FsPath, top: &FsPath) -> io::Result<WalkedFiles> {
    let (mut paths, mut skipped) = (Vec::new(), Vec::new());
    let root = root.canonicalize()?;
    // Each element: a folder, its path below `top`, and the canonical paths of the folders above it, which detect
    // cycles of links.
    let mut folders = vec![(top.to_owned(), String::new(), Vec::new())];
    while let Some((folder, inside, mut above)) = folders.pop() {
        above.push(folder.canonicalize()?);
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                skipped.push(path.strip_prefix(top).unwrap_or(&path).to_string_lossy().into_owned());
                continue;
            };
            let inside = if inside.is_empty() { name.to_owned() } else { format!("{inside}/{name}") };
            // A dangling link is ignored.
            let (Ok(metadata), Ok(real)) = (path.metadata(), path.canonicalize()) else { continue };
            match () {
                () if !real.starts_with(&root) => skipped.push(inside),
                () if metadata.is_file() => paths.push(inside),
                () if !metadata.is_dir() => skipped.push(inside),
                () if !above.contains(&real) => folders.push((path, inside, above.clone())),
                () => {}
            }
        }
    }
    Ok(WalkedFiles { paths, skipped })
}
