//! Putting: a file or folder becomes an artifact on the remote and on disk.
//!
//! The files are copied into staging and hashed in the same pass; the source is read once. The remote is written first
//! and disk last, so that what this machine lends as published is published. Other content under the same key is
//! refused before anything is written; `force` replaces it.

use super::{Cache, PutOptions, PutReport};
use crate::digest::Provenance;
use crate::disk::{StagedFile, StagedWriter, Staging, staged_name};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::part_size;
use crate::limits;
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::progress::{Phase, Progress};
use crate::remote::PublishOptions;
use crate::transfer::blocking;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Files copied and hashed at once.
const COPIES_AT_ONCE: usize = 4;
/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;
/// How long to sleep while another call fills the same key.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A file to be put.
#[derive(Debug, Clone)]
struct Given {
    path: FilePath,
    from: PathBuf,
    size: u64,
}

impl Cache {
    /// Publishes a file or folder on disk and, where there is one, the remote.
    ///
    /// # Errors
    /// `Invalid` for what cannot be an artifact; `Conflict` where the key has other content (unless forced); `Full`,
    /// `Directory`, `Unavailable`, `Unauthorized` as for [`get`](Self::get). Nothing is visible then.
    pub async fn put(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        self.put_unnamed(key, path, options, progress).await.map_err(|error| error.artifact(key))
    }

    async fn put_unnamed(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        let source = path.to_owned();
        let (shape, given) = blocking(move || list_given(&source)).await?;
        let flight = loop {
            match self.0.disk.try_fill(key)? {
                Some(flight) => break flight,
                None => tokio::time::sleep(LOOK_AGAIN).await,
            }
        };
        let (staging, manifest, files) = self.stage(key, shape, &given, progress).await?;
        self.refuse_other_content(&manifest, options)?;
        let uploaded_bytes = self.put_on_remote(&manifest, &staging, &files, options, progress).await?;
        let lent = {
            let _phase = progress.enter(Phase::Publish, 0);
            let (disk, manifest, force) = (self.0.disk.clone(), manifest.clone(), options.force);
            blocking(move || {
                if force && disk.manifest(&manifest.key)?.is_some_and(|present| present.agrees_with(&manifest).is_err())
                {
                    disk.evict(&manifest.key)?;
                }
                disk.publish(staging, &manifest, &files)
            })
            .await?
        };
        drop(flight);
        let sha256 = match shape {
            Shape::File => manifest.files.values().next().and_then(|entry| entry.sha256),
            Shape::Tree => manifest.list_digest(),
        };
        Ok(PutReport {
            key: key.clone(),
            path: lent.path(&crate::Selection::all()),
            files: manifest.files.len(),
            bytes: manifest.bytes(),
            uploaded_bytes,
            on_remote: self.0.remote.is_some(),
            sha256: sha256.ok_or_else(|| Error::new(ErrorKind::Other, "a digest is missing after hashing"))?,
            phases: progress.phases(),
        })
    }

    /// Copies the given files into staging and hashes them on the way.
    async fn stage(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        given: &[Given],
        progress: &Progress,
    ) -> Result<(Staging, Manifest, BTreeMap<FilePath, StagedFile>)> {
        let entry = |given: &Given| FileEntry { size: given.size, ..FileEntry::default() };
        let wanted: Vec<_> = given.iter().map(|given| (given.path.clone(), entry(given))).collect();
        let (disk, fill_key) = (self.0.disk.clone(), key.clone());
        let staging = blocking(move || disk.begin_fill(&fill_key, &wanted)).await?;
        let _phase = progress.enter(Phase::Pour, given.iter().map(|given| given.size).sum());
        let copies = given.iter().cloned().map(|given| {
            let (name, progress) = (staged_name(&given.path, &entry(&given)), progress.clone());
            let target = staging.file(&name);
            blocking(move || {
                let copied = copy(&given, &target, &progress)?;
                Ok((given.path, StagedFile { name, ..copied }))
            })
        });
        let files: BTreeMap<_, _> =
            stream::iter(copies.collect::<Vec<_>>()).buffer_unordered(COPIES_AT_ONCE).try_collect().await?;
        let mut manifest = Manifest::new(key.clone(), shape);
        manifest.files = files.iter().map(|(path, file)| (path.clone(), file.entry.clone())).collect();
        manifest.check().map_err(|error| Error::invalid(error.message().to_owned()))?;
        Ok((staging, manifest, files))
    }

    fn refuse_other_content(&self, manifest: &Manifest, options: &PutOptions) -> Result<()> {
        match self.0.disk.manifest(&manifest.key)? {
            Some(present) if !options.force => present.agrees_with(manifest).context(&manifest.key, Tier::Disk),
            _ => Ok(()),
        }
    }

    async fn put_on_remote(
        &self,
        manifest: &Manifest,
        staging: &Staging,
        files: &BTreeMap<FilePath, StagedFile>,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<u64> {
        let Some(remote) = &self.0.remote else { return Ok(0) };
        let _phase = progress.enter(Phase::Backfill, manifest.bytes());
        let staged = files.iter().map(|(path, file)| (path.clone(), staging.file(&file.name))).collect();
        let options = PublishOptions { force: options.force, rewrite: BTreeSet::new() };
        let published =
            remote.publish(manifest, &staged, options, progress).await.context(&manifest.key, Tier::Remote)?;
        Ok(published.uploaded_bytes)
    }
}

/// Copies one file into staging, hashing it; refuses one that changes meanwhile.
fn copy(given: &Given, target: &Path, progress: &Progress) -> Result<StagedFile> {
    let fault = |cause: std::io::Error| unreadable(&given.from, cause);
    let changed = || {
        Error::new(ErrorKind::Other, format!("{} changed while it was being read", given.from.display()))
            .hint("put it again when it is complete")
    };
    let mut source = File::open(&given.from).map_err(fault)?;
    let before = source.metadata().map_err(fault)?;
    let part_size = part_size(given.size);
    let writer = StagedWriter::create(target, given.size, part_size, true, false)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut offset = 0;
    loop {
        let read = source.read(&mut buffer).map_err(fault)?;
        if read == 0 {
            break;
        }
        if offset + read as u64 > given.size {
            return Err(changed());
        }
        writer.write(offset, &buffer[..read])?;
        offset += read as u64;
        progress.done(read as u64);
    }
    let after = source.metadata().map_err(fault)?;
    if offset != given.size || before.modified().ok() != after.modified().ok() {
        return Err(changed());
    }
    let hashed = writer.hashed();
    let entry = FileEntry {
        size: given.size,
        sha256: Some(hashed.sha256),
        provenance: Some(Provenance::Put),
        ladder: Some(hashed.ladder),
        ..FileEntry::default()
    };
    Ok(StagedFile { name: String::new(), entry, identity: writer.seal()? })
}

/// The files of a file or folder. Links are followed, loops refused; what is neither file nor folder is refused.
fn list_given(path: &Path) -> Result<(Shape, Vec<Given>)> {
    let metadata = fs::metadata(path).map_err(|cause| unreadable(path, cause))?;
    if metadata.is_file() {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::invalid(format!("the name of {} is not UTF-8", path.display())))?;
        return Ok((
            Shape::File,
            vec![Given { path: FilePath::new(name)?, from: path.to_owned(), size: metadata.len() }],
        ));
    }
    let mut given = Vec::new();
    list_folder(path, "", &mut vec![canonical(path)?], &mut given)?;
    if given.is_empty() {
        return Err(
            Error::invalid(format!("{} holds no files", path.display())).hint("an artifact has at least one file")
        );
    }
    Ok((Shape::Tree, given))
}

fn list_folder(folder: &Path, prefix: &str, above: &mut Vec<PathBuf>, given: &mut Vec<Given>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .and_then(|entries| entries.collect::<std::io::Result<_>>())
        .map_err(|cause| unreadable(folder, cause))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let from = entry.path();
        let name = entry.file_name();
        let name =
            name.to_str().ok_or_else(|| Error::invalid(format!("the name of {} is not UTF-8", from.display())))?;
        let metadata = fs::metadata(&from).map_err(|cause| unreadable(&from, cause))?;
        let path = format!("{prefix}{name}");
        if metadata.is_dir() {
            let real = canonical(&from)?;
            if above.contains(&real) {
                return Err(Error::invalid(format!("{} links back to a folder above it", from.display())));
            }
            above.push(real);
            list_folder(&from, &format!("{path}/"), above, given)?;
            above.pop();
        } else if metadata.is_file() {
            given.push(Given { path: FilePath::new(&path)?, from, size: metadata.len() });
            if given.len() > limits::FILES_MAX {
                return Err(Error::invalid(format!("more than {} files", limits::FILES_MAX)));
            }
        } else {
            return Err(Error::invalid(format!("{} is neither a file nor a folder", from.display()))
                .hint("take it out of the folder"));
        }
    }
    Ok(())
}

fn canonical(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|cause| unreadable(path, cause))
}

fn unreadable(path: &Path, cause: std::io::Error) -> Error {
    match cause.kind() {
        std::io::ErrorKind::NotFound => {
            Error::not_found(format!("there is no {}", path.display())).hint("check the path")
        }
        std::io::ErrorKind::PermissionDenied => {
            Error::new(ErrorKind::Unauthorized, format!("may not read {}", path.display())).cause(cause)
        }
        _ => Error::new(ErrorKind::Other, format!("cannot read {}", path.display())).cause(cause),
    }
}
