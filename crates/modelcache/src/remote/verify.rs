//! Verification of an artifact on the remote: every object in the manifest is streamed, hashed and compared.
//!
//! Memory use does not depend on the size of the objects. An interrupted stream is resumed. An object with the right
//! digest and another ETag than recorded is intact, because copying a bucket changes ETags. The remote is not changed;
//! callers repair by publishing again.

use super::store::{ReadBody, Store};
use super::{Folder, REPAIR, Remote};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::finding::{BadPart, Finding, Problem, Verified};
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::{LadderHasher, part_size};
use crate::manifest::{FileEntry, ObjectIdentity};
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
}

/// Verifies the objects of `key` at the paths that `chosen` accepts. Returns `None` if the artifact is not published.
pub(super) async fn verify(
    remote: &Remote,
    key: &ArtifactKey,
    chosen: &(dyn Fn(&FilePath) -> bool + Sync),
    rate_limiter: &RateLimiter,
    progress: &Progress,
) -> Result<Option<Verified>> {
    let store = remote.store().await?;
    let folder = Folder::new(key);
    let mut verified = Verified::new(Some(key.clone()), key.to_string(), Tier::Remote);
    let manifest = match folder.read_manifest(store).await {
        Ok(None) => return Ok(None),
        Ok(Some((manifest, _))) => manifest,
        // A damaged manifest is a finding. Without it there is nothing else to compare.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            verified.findings.push(Finding {
                detail: Some(error.message().to_owned()),
                remedy: Some(REPAIR.to_owned()),
                ..Finding::new(None, Problem::DamagedManifest)
            });
            return Ok(Some(verified));
        }
        Err(error) => return Err(error),
    };
    let held: Vec<(&FilePath, &FileEntry, &ObjectIdentity)> = manifest
        .files
        .iter()
        .filter(|(path, _)| chosen(path))
        .filter_map(|(path, entry)| Some((path, entry, entry.on_remote()?)))
        .collect();
    let _phase = progress.enter(Phase::Verify, held.iter().map(|(_, entry, _)| entry.size).sum());
    verified.files = held.len();
    verified.bytes = held.iter().map(|(_, entry, _)| entry.size).sum();
    let job = VerifyJob { store, folder: &folder, rate_limiter, progress };
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
        let Some(now) = self.store.head(&object).await? else { return Ok(finding(Problem::Missing, None)) };
        if now.object_bytes != entry.size {
            let detail = format!("{} bytes, published with {}", now.object_bytes, entry.size);
            return Ok(finding(Problem::WrongSize, Some(detail)));
        }
        // Another ETag is no problem by itself, only a detail of one.
        let replaced = match (&now.etag, &recorded.etag) {
            (Some(now), Some(recorded)) if now != recorded => Some("its ETag is not the one recorded".to_owned()),
            _ => None,
        };
        let Some(hasher) = self.hash(&object, &now).await? else {
            return Ok(finding(Problem::Missing, Some("it was removed or replaced while it was read".into())));
        };
        let (found, ladder) = hasher.finish();
        if entry.sha256.is_none_or(|expected| expected == found) {
            return Ok(None);
        }
        // The first checkpoint that differs locates the first wrong part.
        let first = entry.ladder.as_ref().and_then(|expected| BadPart::first_between(expected, &ladder, entry.size));
        let bad_parts = first.into_iter().collect();
        Ok(finding(Problem::WrongBytes, replaced).map(|finding| Finding { found: Some(found), bad_parts, ..finding }))
    }

    /// Hashes the whole object. Returns `None` if it was removed or replaced since `now`.
    async fn hash(&self, object: &Path, now: &ObjectIdentity) -> Result<Option<LadderHasher>> {
        let size = now.object_bytes;
        let mut hasher = LadderHasher::new(part_size(size));
        let mut attempts = self.store.retry().attempts();
        while hasher.position() < size {
            let before = hasher.position();
            match self.read_on(object, now, &mut hasher).await {
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
    async fn read_on(&self, object: &Path, now: &ObjectIdentity, hasher: &mut LadderHasher) -> Result<bool> {
        let size = now.object_bytes;
        let ReadBody::Stream { start, mut stream } = self.store.read(object, hasher.position()..size, now).await?
        else {
            return Ok(false);
        };
        // A server that ignores ranges sends the object from its start: skip the bytes hashed already.
        let mut skip = hasher.position().saturating_sub(start);
        while let Some(chunk) = stream.try_next().await? {
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            let left = usize::try_from(size - hasher.position()).unwrap_or(usize::MAX);
            let fresh = &chunk[usize::try_from(skipped).unwrap_or(chunk.len())..];
            if fresh.len() > left {
                return Err(Error::corrupt(format!("{object}: the server sent more than was asked for")));
            }
            hasher.update(fresh);
            self.progress.received(Tier::Remote, fresh.len() as u64);
            self.progress.done(fresh.len() as u64);
            self.rate_limiter.wait(fresh.len() as u64).await;
        }
        match hasher.position() {
            position if position == size => Ok(true),
            position => Err(Error::unavailable(format!("{object} ended after {position} of {size} bytes"))),
        }
    }
}
