//! Verification of an artifact on the remote: every object in the manifest is streamed, hashed and compared.
//!
//! Memory use does not depend on the size of the objects. An interrupted stream is resumed. An object whose digest is
//! right is intact even if its ETag differs from the recorded one, because copying a bucket changes ETags. The remote
//! is not changed; callers repair it by publishing again.

use super::store::{ReadBody, Store};
use super::{Folder, REPAIR_HINT, Remote};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::finding::{BadPart, Finding, Problem, VerifyReport};
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::{LadderHasher, part_size};
use crate::manifest::{FileEntry, ObjectIdentity};
use crate::metrics::Metrics;
use crate::progress::{Phase, Progress};
use crate::rate_limiter::RateLimiter;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;

/// Concurrent reads of objects.
const READS_IN_FLIGHT: usize = 8;

/// The arguments of one verification.
struct VerifyJob<'a> {
    store: &'a Store,
    folder: &'a Folder,
    rate_limiter: &'a RateLimiter,
    progress: &'a Progress,
    metrics: &'a Metrics,
}

/// Verifies the objects of `key` at the paths that `is_selected` accepts. Returns `None` if the artifact is not
/// published.
pub(super) async fn verify(
    remote: &Remote,
    key: &ArtifactKey,
    is_selected: &(dyn Fn(&FilePath) -> bool + Sync),
    rate_limiter: &RateLimiter,
    progress: &Progress,
    metrics: &Metrics,
) -> Result<Option<VerifyReport>> {
    let store = remote.store().await?;
    let folder = Folder::new(key);
    let mut verified = VerifyReport::new(Some(key.clone()), key.to_string(), Tier::Remote);
    let manifest = match folder.read_manifest(store).await {
        Ok(None) => return Ok(None),
        Ok(Some((manifest, _))) => manifest,
        // A damaged manifest is a finding. Without a manifest, the objects cannot be compared.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            verified.findings.push(Finding {
                detail: Some(error.message().to_owned()),
                remedy: Some(REPAIR_HINT.to_owned()),
                ..Finding::new(None, Problem::DamagedManifest)
            });
            return Ok(Some(verified));
        }
        Err(error) => return Err(error),
    };
    let held: Vec<(&FilePath, &FileEntry, &ObjectIdentity)> = manifest
        .files
        .iter()
        .filter(|(path, _)| is_selected(path))
        .filter_map(|(path, entry)| Some((path, entry, entry.on_remote()?)))
        .collect();
    let _phase = progress.enter(Phase::Verify, held.iter().map(|(_, entry, _)| entry.size).sum());
    verified.files = held.len();
    verified.bytes = held.iter().map(|(_, entry, _)| entry.size).sum();
    let job = VerifyJob { store, folder: &folder, rate_limiter, progress, metrics };
    let checks: Vec<_> = held.into_iter().map(|(path, entry, recorded)| job.object(path, entry, recorded)).collect();
    let found: Vec<Option<Finding>> = futures::stream::iter(checks).buffered(READS_IN_FLIGHT).try_collect().await?;
    verified.findings = found.into_iter().flatten().collect();
    Ok(Some(verified))
}

impl VerifyJob<'_> {
    /// Verifies the object of `path`. Returns a finding if it is missing or differs.
    async fn object(&self, path: &FilePath, entry: &FileEntry, recorded: &ObjectIdentity) -> Result<Option<Finding>> {
        let object = self.folder.object(self.store, path)?;
        let finding = |problem, detail: Option<String>| {
            Some(Finding { expected: entry.sha256, detail, ..Finding::new(Some(path.clone()), problem) })
        };
        // The cheap checks first: existence and size.
        let Some(current) = self.store.head(&object).await? else { return Ok(finding(Problem::Missing, None)) };
        if current.object_bytes != entry.size {
            self.metrics.record_corrupt(Tier::Remote, 1, current.object_bytes);
            let detail = format!("{} bytes; the manifest records {}", current.object_bytes, entry.size);
            return Ok(finding(Problem::WrongSize, Some(detail)));
        }
        // Another ETag alone is not a problem. It becomes the detail of a digest mismatch.
        let etag_note = match (&current.etag, &recorded.etag) {
            (Some(current), Some(recorded)) if current != recorded => {
                Some("its ETag is not the one recorded".to_owned())
            }
            _ => None,
        };
        let hasher = match self.hash(&object, &current).await? {
            // The store may have another ETag for each kind of request. The digest decides.
            None if entry.sha256.is_some() => self.hash(&object, &ObjectIdentity { etag: None, ..current }).await?,
            hashed => hashed,
        };
        let Some(hasher) = hasher else {
            return Ok(finding(Problem::Missing, Some("it was removed or replaced while it was read".into())));
        };
        let (found, ladder) = hasher.finish();
        if entry.sha256.is_none_or(|expected| expected == found) {
            return Ok(None);
        }
        self.metrics.record_corrupt(Tier::Remote, 1, entry.size);
        // The first checkpoint that differs shows which part is the first wrong one.
        let first = entry.ladder.as_ref().and_then(|expected| BadPart::first_between(expected, &ladder, entry.size));
        let bad_parts = first.into_iter().collect();
        Ok(finding(Problem::WrongBytes, etag_note).map(|finding| Finding { found: Some(found), bad_parts, ..finding }))
    }

    /// Hashes the whole object. Returns `None` if it was removed or replaced since `current`.
    async fn hash(&self, object: &Path, current: &ObjectIdentity) -> Result<Option<LadderHasher>> {
        let size = current.object_bytes;
        let mut hasher = LadderHasher::new(part_size(size));
        let mut attempts = self.store.retry().attempts();
        while hasher.position() < size {
            let before = hasher.position();
            match self.continue_hashing(object, current, &mut hasher).await {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => {
                    // Progress since the last error resets the retry budget.
                    if hasher.position() > before {
                        attempts = self.store.retry().attempts();
                    }
                    attempts.pause(error).await?;
                }
            }
        }
        Ok(Some(hasher))
    }

    /// Streams the object from the position of `hasher` to the end. Returns false if the object was replaced.
    async fn continue_hashing(
        &self,
        object: &Path,
        current: &ObjectIdentity,
        hasher: &mut LadderHasher,
    ) -> Result<bool> {
        let size = current.object_bytes;
        let ReadBody::Stream { start, mut stream, .. } =
            self.store.read(object, hasher.position()..size, current).await?
        else {
            return Ok(false);
        };
        // A server that ignores ranges sends the object from its start: skip the bytes that are hashed already.
        let mut skip = hasher.position().saturating_sub(start);
        while let Some(chunk) = stream.try_next().await? {
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            let left = usize::try_from(size - hasher.position()).unwrap_or(usize::MAX);
            let unhashed = &chunk[usize::try_from(skipped).unwrap_or(chunk.len())..];
            if unhashed.len() > left {
                return Err(Error::corrupt(format!("{object}: the server sent more bytes than requested")));
            }
            hasher.update(unhashed);
            self.progress.received(Tier::Remote, unhashed.len() as u64);
            self.progress.done(unhashed.len() as u64);
            self.rate_limiter.wait(unhashed.len() as u64).await;
        }
        match hasher.position() {
            position if position == size => Ok(true),
            position => Err(Error::unavailable(format!("{object} ended after {position} of {size} bytes"))),
        }
    }
}
