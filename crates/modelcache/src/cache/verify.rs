//! Verification and repair: stored files are read in full and compared with their digests, on disk and on the remote.
//!
//! On disk, a file that fails verification is withdrawn at once, with or without repair, and is not leased any more.
//! Repair then downloads it from the next source, like a get. On the remote, nothing is changed without repair. Repair
//! uploads the bad objects again, from the disk if it has the right bytes, otherwise from the origin.

use super::resolve::{FetchRequest, LookupPolicy, Resolution};
use super::{Cache, GetOptions};
use crate::disk::{LocalFile, Purpose, RootedPath, VerifyItem, VerifyRun};
use crate::error::{Context, Error, Result, Tier};
use crate::finding::{Finding, Problem, VerifyReport};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, Manifest};
use crate::option_name::call::REPAIR;
use crate::option_name::setting::{DIR, REMOTE};
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::remote::{PublishOptions, Remote};
use crate::runtime::blocking;
use crate::selection::Selection;
use crate::source::Source;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Options of [`Cache::verification`].
#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyOptions {
    /// The tiers to verify.
    pub tier: VerifyTier,
    /// Repair the files that fail verification.
    pub repair: bool,
    /// Maximum read rate in bytes per second; `None` for no limit.
    pub bytes_per_second: Option<u64>,
}

/// The tiers to verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VerifyTier {
    /// The local directory.
    #[default]
    Disk,
    /// The remote.
    Remote,
    /// Both.
    All,
}

/// One unit of a [`Verification`]: an artifact in one tier, or other files on disk.
#[derive(Debug, Clone)]
pub struct VerifyTarget {
    /// The reference of the artifact, or a name of the target for messages.
    pub reference: String,
    /// The tier in which it is verified.
    pub tier: Tier,
    subject: Subject,
}

/// The files of a [`VerifyTarget`].
#[derive(Debug, Clone)]
enum Subject {
    Artifact {
        key: ArtifactKey,
        reference: Option<Reference>,
    },
    /// A folder with a damaged manifest and an unknown key.
    Nameless(RootedPath),
    /// The blobs that were not read as a file of an artifact: leftovers, and blobs with copied views.
    Blobs,
}

/// A verification in progress. A file that several artifacts share is read once. Dropping this value stops all reads.
#[derive(Debug)]
pub struct Verification {
    cache: Cache,
    options: VerifyOptions,
    run: Arc<VerifyRun>,
}

impl Drop for Verification {
    fn drop(&mut self) {
        self.run.stop();
    }
}

/// Stops the reads of a call that is cancelled.
struct StopOnDrop(Arc<VerifyRun>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Cache {
    /// Starts a verification. Nothing is read until [`Verification::verify`] is called.
    pub fn verification(&self, options: VerifyOptions) -> Verification {
        Verification { cache: self.clone(), options, run: Arc::new(VerifyRun::new(options.bytes_per_second, true)) }
    }

    /// Verifies everything on disk once, at most at `bytes_per_second`, and calls `report` with the result of each
    /// target. Files that fail verification are withdrawn, and not repaired.
    pub async fn scrub(&self, bytes_per_second: u64, mut report: impl FnMut(VerifyReport) + Send) -> Result<()> {
        let options = VerifyOptions { bytes_per_second: Some(bytes_per_second), ..VerifyOptions::default() };
        let verification = self.verification(options);
        for target in verification.targets(&[]).await? {
            match verification.verify(&target, &Progress::new()).await? {
                Some(verified) => report(verified),
                None => tracing::debug!(target = target.reference, "removed before it was verified"),
            }
        }
        Ok(())
    }

    /// Verifies the local files of a get before they are leased. Withdraws the bad ones, so that the get downloads
    /// them.
    ///
    /// # Errors
    /// `Corrupt` if a bad file cannot be withdrawn, because the directory is read-only.
    pub(super) async fn verify_hit(&self, request: &FetchRequest, progress: &Progress) -> Result<()> {
        let run = Arc::new(VerifyRun::new(None, false));
        let _stop = StopOnDrop(run.clone());
        let verified = self.verify_disk(&request.key, &request.selection, &run, progress).await?;
        // The get may also lease from the lower directory. This remembers its bad files, and does not lease them.
        if let Some(lower) = self.0.lower.clone() {
            let (key, selection, run) = (request.key.clone(), request.selection.clone(), run.clone());
            blocking(move || lower.verify(&key, &selection, &run)).await?;
        }
        // Withdrawn files are downloaded again. A bad file that could not be withdrawn must not be leased.
        let bad = verified.iter().flat_map(|verified| &verified.findings).find(|finding| !finding.withdrawn);
        match bad {
            None => Ok(()),
            Some(finding) => {
                Err(Error::corrupt(format!("{}: {}", file_of(finding), finding.problem)).tier(Tier::Disk).hint(
                    format!("the cache directory is read-only: mount it writable, or point {DIR} to another directory"),
                ))
            }
        }
    }

    /// Verifies the selected files of `key` on disk. Returns `None` if the artifact is not on disk.
    async fn verify_disk(
        &self,
        key: &ArtifactKey,
        selection: &Selection,
        run: &Arc<VerifyRun>,
        progress: &Progress,
    ) -> Result<Option<VerifyReport>> {
        let (key, selection, run, progress) = (key.clone(), selection.clone(), run.clone(), progress.clone());
        self.on_disk(move |disk| {
            let _phase = progress.enter(Phase::Verify, disk.bytes_to_verify(&key, &selection)?);
            disk.verify(&key, &selection, &run, &progress)
        })
        .await
    }

    /// Returns an origin for exactly this `key`, if there is one.
    async fn origin_of(&self, key: &ArtifactKey, reference: Option<&Reference>) -> Option<Arc<dyn Source>> {
        // Try the caller's reference first, because it may contain a URI, and then the key as text.
        let parsed = Reference::parse(&key.to_string()).ok();
        for reference in reference.into_iter().chain(&parsed) {
            let policy = LookupPolicy { may_write: false, ..self.policy(&GetOptions::default()) };
            if let Ok(Resolution { key: resolved_key, origin: Some(origin), .. }) =
                self.resolution(reference, policy).await
                // A revision may have moved since. Only an origin of this version can repair it.
                && resolved_key == *key
            {
                return Some(origin);
            }
        }
        None
    }
}

impl Verification {
    /// Returns the targets for `references`, or for all artifacts of the selected tiers if there are none. A revision
    /// stands for the version that it last resolved to on this machine.
    ///
    /// # Errors
    /// `Invalid` if the remote is to be verified and none is configured, or if it is to be repaired and is read-only.
    pub async fn targets(&self, references: &[Reference]) -> Result<Vec<VerifyTarget>> {
        let on_disk = self.options.tier != VerifyTier::Remote;
        let remote = match self.options.tier {
            VerifyTier::Disk => None,
            _ => Some(self.remote()?),
        };
        if let Some(remote) = remote.as_ref().filter(|_| self.options.repair) {
            remote.ensure_read_write(|| format!("leave out {REPAIR}"))?;
        }
        // Without references: everything in the selected tiers.
        if references.is_empty() {
            let mut targets = if on_disk { self.all_on_disk().await? } else { Vec::new() };
            if let Some(remote) = remote {
                targets.extend(remote.keys().await?.into_iter().map(|key| artifact_target(key, None, Tier::Remote)));
            }
            return Ok(targets);
        }
        let mut targets = Vec::new();
        for reference in references {
            let resolved = self.cache.last_resolved_key(reference).await;
            let (key, _) = resolved.map_err(|error| error.artifact(reference))?;
            if on_disk {
                targets.push(artifact_target(key.clone(), Some(reference), Tier::Disk));
            }
            if remote.is_some() {
                targets.push(artifact_target(key, Some(reference), Tier::Remote));
            }
        }
        Ok(targets)
    }

    /// Returns one target for each artifact on disk, and one for the remaining blobs.
    async fn all_on_disk(&self) -> Result<Vec<VerifyTarget>> {
        let stored = self.cache.on_disk(|disk| disk.verify_items()).await?;
        let target = |stored| match stored {
            VerifyItem::Artifact(key) => artifact_target(key, None, Tier::Disk),
            VerifyItem::Nameless(dir) => {
                VerifyTarget { reference: dir.to_string(), tier: Tier::Disk, subject: Subject::Nameless(dir) }
            }
        };
        // The blobs come last: those that were already read as files of artifacts are skipped.
        let blobs = VerifyTarget { reference: "blobs".into(), tier: Tier::Disk, subject: Subject::Blobs };
        Ok(stored.into_iter().map(target).chain([blobs]).collect())
    }

    /// Verifies one target, and repairs it if the options require it. Returns `None` if the target no longer exists, or
    /// if it has no files.
    pub async fn verify(&self, target: &VerifyTarget, progress: &Progress) -> Result<Option<VerifyReport>> {
        match &target.subject {
            Subject::Nameless(dir) => Ok(Some(self.cache.0.disk.verify_nameless(dir))),
            Subject::Blobs => {
                let (run, progress) = (self.run.clone(), progress.clone());
                let verified = self.cache.on_disk(move |disk| disk.verify_blobs(&run, &progress)).await?;
                let has_result = verified.files > 0 || !verified.findings.is_empty();
                Ok(has_result.then_some(verified))
            }
            Subject::Artifact { key, reference } => match target.tier {
                Tier::Remote => {
                    let mut verified = self.verify_on_remote(key, reference.as_ref(), progress).await?;
                    if let Some(verified) = verified.as_mut().filter(|_| self.options.tier == VerifyTier::All) {
                        verified.findings.extend(self.differences(key).await?);
                    }
                    Ok(verified)
                }
                _ => self.verify_on_disk(key, reference.as_ref(), progress).await.context(key, Tier::Disk),
            },
        }
    }

    fn remote(&self) -> Result<&Remote> {
        self.cache.0.remote.as_ref().ok_or_else(|| {
            Error::invalid("no remote is configured").hint(format!("set {REMOTE}, for instance s3://bucket/prefix"))
        })
    }

    /// Verifies an artifact on disk. Repair downloads the withdrawn files again.
    async fn verify_on_disk(
        &self,
        key: &ArtifactKey,
        reference: Option<&Reference>,
        progress: &Progress,
    ) -> Result<Option<VerifyReport>> {
        let verified = self.cache.verify_disk(key, &Selection::all(), &self.run, progress).await?;
        let Some(mut verified) = verified else { return Ok(None) };
        if self.options.repair && !verified.is_right() {
            let downloaded = self.download(key, reference, &verified.findings).await;
            let remedy = downloaded.as_ref().err().map(cannot_be_repaired).unwrap_or_default();
            record_repair(&mut verified.findings, |_| downloaded.as_ref().ok().copied(), &remedy);
        } else {
            verified.findings.iter_mut().for_each(|finding| {
                finding.remedy.get_or_insert_with(|| {
                    "`modelcache verify --repair` fetches it again, as the next get does".into()
                });
            });
        }
        Ok(Some(verified))
    }

    /// Verifies an artifact on the remote. Repair uploads the bad objects again.
    async fn verify_on_remote(
        &self,
        key: &ArtifactKey,
        reference: Option<&Reference>,
        progress: &Progress,
    ) -> Result<Option<VerifyReport>> {
        let remote = self.remote()?;
        let found = remote.verify(key, &|_| true, self.run.rate_limiter(), progress, self.cache.metrics()).await?;
        let Some(mut verified) = found else { return Ok(None) };
        if verified.is_right() {
            return Ok(Some(verified));
        }
        if !self.options.repair {
            verified.findings.iter_mut().for_each(|finding| {
                finding
                    .remedy
                    .get_or_insert_with(|| "`modelcache verify --tier remote --repair` uploads it again".into());
            });
            return Ok(Some(verified));
        }
        // A damaged manifest affects all files, otherwise only those with a finding.
        let all_files = verified.findings.iter().any(|finding| finding.problem == Problem::DamagedManifest);
        let bad: BTreeSet<FilePath> = verified.findings.iter().filter_map(|finding| finding.path.clone()).collect();
        let is_affected = |path: &FilePath| all_files || bad.contains(path);
        // Step 1: verify the local copies, and download those that the disk does not have with the right bytes.
        self.cache.verify_disk(key, &selection(&verified.findings), &self.run, progress).await?;
        let mut from = Tier::Disk;
        let mut failure = None;
        if !self.disk_has(key, &bad, all_files).await? {
            match self.download(key, reference, &verified.findings).await {
                Ok(tier) => from = tier,
                Err(error) => failure = Some(error),
            }
        }
        // Step 2: upload the files that are on disk now. Even if a download failed, other files can be repaired.
        let published = self.publish_from_disk(remote, key, &is_affected, progress).await;
        let (uploaded, failure) = match published {
            Ok(uploaded) => (uploaded, failure),
            Err(error) => (BTreeSet::new(), failure.or(Some(error))),
        };
        // Step 3: record the result in the findings.
        let is_repaired = |finding: &Finding| match &finding.path {
            Some(path) => uploaded.contains(path),
            None => !uploaded.is_empty(),
        };
        let remedy = failure.as_ref().map_or_else(|| with_hint(&no_right_copy()), cannot_be_repaired);
        record_repair(&mut verified.findings, |finding| is_repaired(finding).then_some(from), &remedy);
        let repaired = verified.findings.iter().filter(|finding| finding.path.is_some() && !finding.remains()).count();
        self.cache.metrics().update(|counts| counts.repaired_files.add(Tier::Remote, repaired as u64));
        Ok(Some(verified))
    }

    /// Returns the files of which disk and remote record different content, if both have the artifact.
    async fn differences(&self, key: &ArtifactKey) -> Result<Vec<Finding>> {
        let owned_key = key.clone();
        let local = self.cache.on_disk(move |disk| disk.manifest(&owned_key)).await?;
        let (Some(local), Ok(Some(published))) = (local, self.remote()?.source(key).manifest().await) else {
            // A manifest that cannot be read is among the other findings.
            return Ok(Vec::new());
        };
        if local.difference(&published).is_none() {
            return Ok(Vec::new());
        }
        let paths: BTreeSet<&FilePath> = local.files.keys().chain(published.files.keys()).collect();
        let finding = |path: &FilePath| {
            let [found, expected] = [&local, &published].map(|manifest| manifest.files.get(path));
            let digest = |entry: Option<&FileEntry>| entry.and_then(|entry| entry.sha256);
            // An unknown digest does not contradict any other.
            let contradicts = matches!((digest(found), digest(expected)), (Some(a), Some(b)) if a != b);
            let is_same = found.map(|entry| entry.size) == expected.map(|entry| entry.size) && !contradicts;
            (!is_same).then(|| Finding {
                expected: digest(expected),
                found: digest(found),
                detail: match (found, expected) {
                    (None, _) => Some("only the remote lists it".into()),
                    (_, None) => Some("only this disk lists it".into()),
                    _ => None,
                },
                remedy: Some(format!(
                    "`modelcache get {key} --refresh` replaces the copy on this disk, `modelcache put {key} PATH --force` \
                     the one on the remote"
                )),
                ..Finding::new(Some(path.clone()), Problem::TiersDiffer)
            })
        };
        Ok(paths.into_iter().filter_map(finding).collect())
    }

    /// Returns true if the disk holds all files in `bad`, or all files of the artifact if `all_files` is set.
    async fn disk_has(&self, key: &ArtifactKey, bad: &BTreeSet<FilePath>, all_files: bool) -> Result<bool> {
        let key = key.clone();
        let manifest = self.cache.on_disk(move |disk| disk.manifest(&key)).await?;
        let holds = |manifest: &Manifest| {
            let mut affected = manifest.files.iter().filter(|(path, _)| all_files || bad.contains(*path));
            let lists_all = bad.iter().all(|path| manifest.files.contains_key(path));
            lists_all && affected.all(|(_, entry)| entry.held.is_some())
        };
        Ok(manifest.as_ref().is_some_and(holds))
    }

    /// Downloads the files of `findings` to disk. Returns the farthest tier that supplied bytes.
    async fn download(&self, key: &ArtifactKey, reference: Option<&Reference>, findings: &[Finding]) -> Result<Tier> {
        self.cache.0.disk.ensure_writable()?;
        let origin = self.cache.origin_of(key, reference).await;
        let selection = selection(findings);
        let max_tier = self.cache.policy(&GetOptions::default()).max_tier;
        let plain = FetchRequest::new(key.clone(), selection, max_tier);
        let request = FetchRequest { origin, purpose: Purpose::Keep, ..plain };
        // A new progress, not the caller's: `artifact.report.from` is derived from the bytes counted in it, which must
        // be those of this download only.
        let progress = Progress::new();
        let artifact = self.cache.get_resolved(&request, &progress).await?;
        Ok(artifact.report.from)
    }

    /// Uploads the affected files that the disk holds, and overwrites their objects. Returns the paths of these files.
    async fn publish_from_disk(
        &self,
        remote: &Remote,
        key: &ArtifactKey,
        is_affected: &(dyn Fn(&FilePath) -> bool + Sync),
        progress: &Progress,
    ) -> Result<BTreeSet<FilePath>> {
        let owned_key = key.clone();
        let leased = self.cache.on_disk(move |disk| disk.lease_with_manifest(&owned_key)).await?;
        let Some((manifest, dir, _lease)) = leased else { return Err(no_right_copy()) };
        let entries = manifest.files.iter().filter(|(path, entry)| entry.held.is_some() && is_affected(path));
        let files: BTreeMap<_, _> = entries.map(|(path, _)| (path.clone(), LocalFile::from(dir.view(path)))).collect();
        if files.is_empty() {
            return Err(no_right_copy());
        }
        let bytes = files.keys().filter_map(|path| manifest.files.get(path)).map(|entry| entry.size).sum();
        let _phase = progress.enter(Phase::Backfill, bytes);
        let rewrite: BTreeSet<FilePath> = files.keys().cloned().collect();
        let options = PublishOptions { rewrite: rewrite.clone(), ..PublishOptions::default() };
        remote.publish(&manifest.clone().without_holdings(), &files, options, progress).await?;
        Ok(rewrite)
    }
}

/// Returns the target for an artifact in one tier.
fn artifact_target(key: ArtifactKey, reference: Option<&Reference>, tier: Tier) -> VerifyTarget {
    let reference = reference.cloned();
    VerifyTarget { reference: key.to_string(), tier, subject: Subject::Artifact { key, reference } }
}

/// Returns the path of the file that a finding concerns, or `the artifact`, for a message.
fn file_of(finding: &Finding) -> String {
    finding.path.as_ref().map_or_else(|| "the artifact".into(), ToString::to_string)
}

/// Returns the error for files that no tier has with the right bytes.
fn no_right_copy() -> Error {
    Error::not_found("neither this disk nor an origin has the right bytes")
        .hint("put the artifact again: modelcache put NAME@VERSION PATH")
}

/// Returns the selection of the files of all findings; all files if a finding concerns the whole artifact.
fn selection(findings: &[Finding]) -> Selection {
    let paths: Option<Vec<FilePath>> = findings.iter().map(|finding| finding.path.clone()).collect();
    paths.map_or_else(Selection::all, Selection::files)
}

/// Records the outcome of a repair in the findings. `repaired_from` returns the tier that supplied the right bytes, or
/// `None` for a finding that is not repaired and gets `remedy`.
fn record_repair(findings: &mut [Finding], repaired_from: impl Fn(&Finding) -> Option<Tier>, remedy: &str) {
    for finding in findings.iter_mut().filter(|finding| finding.remains()) {
        finding.repaired_from = repaired_from(finding);
        finding.remedy = finding.repaired_from.is_none().then(|| remedy.to_owned());
    }
}

/// Returns the remedy of a finding whose repair failed with `error`.
fn cannot_be_repaired(error: &Error) -> String {
    format!("cannot be repaired: {}", with_hint(error))
}

/// Formats an error with its hint.
fn with_hint(error: &Error) -> String {
    error.hint_text().map_or_else(|| error.to_string(), |hint| format!("{error}; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_look_like_patterns_are_selected_literally() {
        let finding = |path| Finding::new(Some(FilePath::new(path).expect("path")), Problem::Missing);
        let chosen = selection(&[finding("a[b]*.bin"), finding("c?d")]);
        for (path, is_chosen) in [("a[b]*.bin", true), ("c?d", true), ("ab.bin", false), ("cxd", false)] {
            assert_eq!(chosen.matches(&FilePath::new(path).expect("path")), is_chosen, "{path}");
        }
        assert!(selection(&[Finding::new(None, Problem::DamagedManifest)]).is_all());
    }
}
