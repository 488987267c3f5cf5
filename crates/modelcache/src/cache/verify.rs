//! Verifying: what is kept is read in full and compared with its digests, on disk and on the remote; and mended.
//!
//! On disk a bad copy is withdrawn as soon as it is found, whoever asked: what fails a check is not lent any more. Repair
//! then fetches it from the next source like any get. On the remote nothing is changed unless repair is asked for: then
//! the bad objects are written anew, from disk where it has the right bytes, else from the origin.

use super::resolve::{FetchRequest, LookupPolicy, Resolution};
use super::{Cache, GetOptions};
use crate::disk::{LocalFile, Purpose, RootedPath, VerifyItem, VerifyRun};
use crate::error::{Context, Error, Result, Tier};
use crate::finding::{Finding, Problem, Verified};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::remote::{PublishOptions, Remote};
use crate::selection::Selection;
use crate::source::Source;
use crate::transfer::blocking;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What to verify, and what to do about it.
#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyOptions {
    /// Where.
    pub tier: VerifyTier,
    /// Whether what is found is repaired.
    pub repair: bool,
    /// Most bytes read in a second.
    pub bytes_per_second: Option<u64>,
}

/// Where to verify.
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

/// One thing to verify in one tier.
#[derive(Debug, Clone)]
pub struct VerifyTarget {
    /// What it is called.
    pub reference: String,
    /// Where.
    pub tier: Tier,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Artifact { key: ArtifactKey, reference: Option<Reference> },
    Nameless(RootedPath),
    Blobs,
}

/// A verification under way. What it found right it does not read again; dropping it ends what is being read.
#[derive(Debug)]
pub struct Verification {
    cache: Cache,
    options: VerifyOptions,
    reader: Arc<VerifyRun>,
}

impl Drop for Verification {
    fn drop(&mut self) {
        self.reader.stop();
    }
}

/// Ends the reading of a call that is dropped.
struct StopOnDrop(Arc<VerifyRun>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Cache {
    /// Begins a verification.
    pub fn verification(&self, options: VerifyOptions) -> Verification {
        Verification { cache: self.clone(), options, reader: Arc::new(VerifyRun::new(options.bytes_per_second, true)) }
    }

    /// Goes once through everything on disk at a low rate, telling what each artifact came to. Bad copies are withdrawn.
    pub async fn scrub(&self, bytes_per_second: u64, mut tell: impl FnMut(Verified) + Send) -> Result<()> {
        let options = VerifyOptions { bytes_per_second: Some(bytes_per_second), ..VerifyOptions::default() };
        let verification = self.verification(options);
        for target in verification.targets(&[]).await? {
            match verification.verify(&target, &Progress::new()).await? {
                Some(verified) => tell(verified),
                None => tracing::debug!(target = target.reference, "gone before it was verified"),
            }
        }
        Ok(())
    }

    /// Reads what a get is about to lend, so that whatever is wrong is withdrawn before.
    pub(super) async fn verify_hit(&self, request: &FetchRequest, progress: &Progress) -> Result<()> {
        let reader = Arc::new(VerifyRun::new(None, false));
        let _stop = StopOnDrop(reader.clone());
        let found = self.verify_disk(&request.key, &request.selection, &reader, progress).await?;
        if let Some(lower) = self.0.lower.clone() {
            let (key, selection, reader) = (request.key.clone(), request.selection.clone(), reader.clone());
            blocking(move || lower.verify(&key, &selection, &reader)).await?;
        }
        let bad = found.iter().flat_map(|verified| &verified.findings).find(|finding| !finding.withdrawn);
        match bad {
            None => Ok(()),
            Some(finding) => {
                Err(Error::corrupt(format!("{}: {}", shown(finding), finding.problem)).tier(Tier::Disk).hint(
                    "nothing can be written in this directory: mount it writable, or point MODEL_CACHE_DIR elsewhere",
                ))
            }
        }
    }

    async fn verify_disk(
        &self,
        key: &ArtifactKey,
        selection: &Selection,
        reader: &Arc<VerifyRun>,
        progress: &Progress,
    ) -> Result<Option<Verified>> {
        let (disk, key, selection) = (self.0.disk.clone(), key.clone(), selection.clone());
        let (bytes, disk, key, selection) =
            blocking(move || Ok((disk.bytes_to_verify(&key, &selection)?, disk, key, selection))).await?;
        let _phase = progress.enter(Phase::Verify, bytes);
        let (reader, progress) = (reader.clone(), progress.clone());
        blocking(move || disk.verify(&key, &selection, &reader, &progress)).await
    }

    /// Where the exact `key` comes from, if an origin may have it.
    async fn origin_of(&self, key: &ArtifactKey, reference: Option<&Reference>) -> Option<Arc<dyn Source>> {
        let parsed = Reference::parse(&key.to_string()).ok();
        for reference in reference.into_iter().chain(&parsed) {
            let policy = LookupPolicy { share_answers: false, ..self.policy(&GetOptions::default()) };
            if let Ok(Resolution { key: found, origin: Some(origin), .. }) = self.resolution(reference, policy).await
                && found == *key
            {
                return Some(origin);
            }
        }
        None
    }
}

impl Verification {
    /// What there is to verify: of `references`, or everything. Revisions mean what they last meant here.
    ///
    /// # Errors
    /// `Invalid` where the remote is meant and none is configured.
    pub async fn targets(&self, references: &[Reference]) -> Result<Vec<VerifyTarget>> {
        let on_disk = self.options.tier != VerifyTier::Remote;
        let remote = match self.options.tier {
            VerifyTier::Disk => None,
            _ => Some(self.remote()?),
        };
        if let Some(remote) = remote.as_ref().filter(|_| self.options.repair) {
            remote.ensure_read_write("leave out --repair")?;
        }
        if references.is_empty() {
            let mut targets = if on_disk { self.all_on_disk().await? } else { Vec::new() };
            if let Some(remote) = remote {
                targets.extend(remote.keys().await?.into_iter().map(|key| artifact(key, None, Tier::Remote)));
            }
            return Ok(targets);
        }
        let mut targets = Vec::new();
        for reference in references {
            let resolved = self.cache.key_without_network(reference).await;
            let (key, _) = resolved.map_err(|error| error.artifact(reference))?;
            if on_disk {
                targets.push(artifact(key.clone(), Some(reference), Tier::Disk));
            }
            if remote.is_some() {
                targets.push(artifact(key, Some(reference), Tier::Remote));
            }
        }
        Ok(targets)
    }

    async fn all_on_disk(&self) -> Result<Vec<VerifyTarget>> {
        let disk = self.cache.0.disk.clone();
        let stored = blocking(move || disk.stored()).await?;
        let target = |stored| match stored {
            VerifyItem::Artifact(key) => artifact(key, None, Tier::Disk),
            VerifyItem::Nameless(dir) => {
                VerifyTarget { reference: dir.to_string(), tier: Tier::Disk, what: What::Nameless(dir) }
            }
        };
        let blobs = VerifyTarget { reference: "blobs".into(), tier: Tier::Disk, what: What::Blobs };
        Ok(stored.into_iter().map(target).chain([blobs]).collect())
    }

    /// Reads one target and repairs it if that was asked for; `None` if it is not there (any more).
    pub async fn verify(&self, target: &VerifyTarget, progress: &Progress) -> Result<Option<Verified>> {
        let disk = self.cache.0.disk.clone();
        match &target.what {
            What::Nameless(dir) => Ok(Some(disk.verify_nameless(dir))),
            What::Blobs => {
                let (reader, progress) = (self.reader.clone(), progress.clone());
                let verified = blocking(move || disk.verify_blobs(&reader, &progress)).await?;
                let is_news = verified.files > 0 || !verified.findings.is_empty();
                Ok(is_news.then_some(verified))
            }
            What::Artifact { key, reference } => match target.tier {
                Tier::Remote => self.on_remote(key, reference.as_ref(), progress).await,
                _ => self.on_disk(key, reference.as_ref(), progress).await.context(key, Tier::Disk),
            },
        }
    }

    fn remote(&self) -> Result<&Remote> {
        self.cache.0.remote.as_ref().ok_or_else(|| {
            Error::invalid("no remote is configured").hint("set MODEL_CACHE_REMOTE, for instance s3://bucket/prefix")
        })
    }

    async fn on_disk(
        &self,
        key: &ArtifactKey,
        reference: Option<&Reference>,
        progress: &Progress,
    ) -> Result<Option<Verified>> {
        let verified = self.cache.verify_disk(key, &Selection::all(), &self.reader, progress).await?;
        let Some(mut verified) = verified else { return Ok(None) };
        if self.options.repair && !verified.is_right() {
            let outcome = self.fetch(key, reference, &verified.findings).await;
            settle(&mut verified.findings, |_| true, outcome);
        } else {
            verified.findings.iter_mut().for_each(|finding| {
                finding.remedy.get_or_insert_with(|| {
                    "`modelcache verify --repair` fetches it again, as the next get does".into()
                });
            });
        }
        Ok(Some(verified))
    }

    async fn on_remote(
        &self,
        key: &ArtifactKey,
        reference: Option<&Reference>,
        progress: &Progress,
    ) -> Result<Option<Verified>> {
        let remote = self.remote()?;
        let found = remote.verify(key, &|_| true, self.reader.rate_limiter(), progress).await?;
        let Some(mut verified) = found else { return Ok(None) };
        if verified.is_right() {
            return Ok(Some(verified));
        }
        if !self.options.repair {
            verified.findings.iter_mut().for_each(|finding| {
                finding
                    .remedy
                    .get_or_insert_with(|| "`modelcache verify --tier remote --repair` writes it anew".into());
            });
            return Ok(Some(verified));
        }
        let whole = verified.findings.iter().any(|finding| finding.problem == Problem::DamagedManifest);
        let bad: BTreeSet<FilePath> = verified.findings.iter().filter_map(|finding| finding.path.clone()).collect();
        let request = |path: &FilePath| whole || bad.contains(path);
        // From disk what disk has right, and from the origin first what it has not.
        self.cache.verify_disk(key, &selection(&verified.findings), &self.reader, progress).await?;
        let mut from = Tier::Disk;
        let mut failure = None;
        if !self.disk_has(key, &bad, whole).await? {
            match self.fetch(key, reference, &verified.findings).await {
                Ok(tier) => from = tier,
                Err(error) => failure = Some(error),
            }
        }
        let published = self.publish_from_disk(remote, key, &request, progress).await;
        let repaired = match (published, failure) {
            (Ok(repaired), None) => Ok(repaired),
            (Ok(repaired), Some(_)) if !repaired.is_empty() => Ok(repaired),
            (_, Some(error)) | (Err(error), None) => Err(error),
        };
        match repaired {
            Ok(repaired) => {
                let is_repaired = |finding: &Finding| match &finding.path {
                    Some(path) => repaired.contains(path),
                    None => !repaired.is_empty(),
                };
                settle(&mut verified.findings, is_repaired, Ok(from));
            }
            Err(error) => settle(&mut verified.findings, |_| true, Err(error)),
        }
        Ok(Some(verified))
    }

    async fn disk_has(&self, key: &ArtifactKey, bad: &BTreeSet<FilePath>, whole: bool) -> Result<bool> {
        let (disk, key) = (self.cache.0.disk.clone(), key.clone());
        let manifest = blocking(move || disk.manifest(&key)).await?;
        let holds = |manifest: &Manifest| {
            let mut request = manifest.files.iter().filter(|(path, _)| whole || bad.contains(*path));
            let lists_all = bad.iter().all(|path| manifest.files.contains_key(path));
            lists_all && request.all(|(_, entry)| entry.held.is_some())
        };
        Ok(manifest.as_ref().is_some_and(holds))
    }

    /// Brings what `findings` are about to disk, from wherever it is right. The farthest tier that gave bytes.
    async fn fetch(&self, key: &ArtifactKey, reference: Option<&Reference>, findings: &[Finding]) -> Result<Tier> {
        self.cache.0.disk.ensure_writable()?;
        let origin = self.cache.origin_of(key, reference).await;
        let selection = selection(findings);
        let max_tier = self.cache.policy(&GetOptions::default()).max_tier;
        let (key, purpose, durable) = (key.clone(), Purpose::Keep, false);
        let (tag_record, remote) = (None, None);
        let request =
            FetchRequest { key, selection, digest: None, origin, max_tier, purpose, durable, tag_record, remote };
        // A progress of its own: the tiers that bytes came from are told by what it received.
        let fresh = Progress::new();
        let artifact = self.cache.get_resolved(&request, &fresh).await?;
        Ok(artifact.report.from)
    }

    /// Writes the files that `wanted` takes to the remote anew, as far as disk holds them. Which those are.
    async fn publish_from_disk(
        &self,
        remote: &Remote,
        key: &ArtifactKey,
        request: &(dyn Fn(&FilePath) -> bool + Sync),
        progress: &Progress,
    ) -> Result<BTreeSet<FilePath>> {
        let (disk, of) = (self.cache.0.disk.clone(), key.clone());
        let held = blocking(move || disk.hold(&of)).await?;
        let Some((manifest, dir, _lease)) = held else { return Err(nowhere()) };
        let entries = manifest.files.iter().filter(|(path, entry)| entry.held.is_some() && request(path));
        let files: BTreeMap<_, _> = entries.map(|(path, _)| (path.clone(), LocalFile::from(dir.view(path)))).collect();
        if files.is_empty() {
            return Err(nowhere());
        }
        let bytes = files.keys().filter_map(|path| manifest.files.get(path)).map(|entry| entry.size).sum();
        let _phase = progress.enter(Phase::Backfill, bytes);
        let rewrite: BTreeSet<FilePath> = files.keys().cloned().collect();
        let options = PublishOptions { rewrite: rewrite.clone(), ..PublishOptions::default() };
        remote.publish(&manifest.clone().without_holdings(), &files, options, progress).await?;
        Ok(rewrite)
    }
}

fn artifact(key: ArtifactKey, reference: Option<&Reference>, tier: Tier) -> VerifyTarget {
    VerifyTarget { reference: key.to_string(), tier, what: What::Artifact { key, reference: reference.cloned() } }
}

fn shown(finding: &Finding) -> String {
    finding.path.as_ref().map_or_else(|| "the artifact".into(), ToString::to_string)
}

fn nowhere() -> Error {
    Error::not_found("neither this disk nor an origin has the right bytes")
        .hint("put the artifact again: modelcache put NAME@VERSION PATH")
}

/// The files that findings are about; everything where one is about the whole.
fn selection(findings: &[Finding]) -> Selection {
    let paths: Option<Vec<FilePath>> = findings.iter().map(|finding| finding.path.clone()).collect();
    paths.map_or_else(Selection::all, Selection::files)
}

/// Puts down what came of a repair.
fn settle(findings: &mut [Finding], concerns: impl Fn(&Finding) -> bool, outcome: Result<Tier>) {
    for finding in findings.iter_mut().filter(|finding| finding.remains()) {
        match &outcome {
            Ok(tier) if concerns(finding) => {
                finding.repaired_from = Some(*tier);
                finding.remedy = None;
            }
            Ok(_) => finding.remedy = Some(with_hint(&nowhere())),
            Err(error) => finding.remedy = Some(format!("cannot be repaired: {}", with_hint(error))),
        }
    }
}

fn with_hint(error: &Error) -> String {
    error.hint_text().map_or_else(|| error.to_string(), |hint| format!("{error}; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_odd_names_are_chosen_and_no_others() {
        let finding = |path| Finding::new(Some(FilePath::new(path).expect("path")), Problem::Missing);
        let chosen = selection(&[finding("a[b]*.bin"), finding("c?d")]);
        for (path, is_chosen) in [("a[b]*.bin", true), ("c?d", true), ("ab.bin", false), ("cxd", false)] {
            assert_eq!(chosen.matches(&FilePath::new(path).expect("path")), is_chosen, "{path}");
        }
        assert!(selection(&[Finding::new(None, Problem::DamagedManifest)]).is_all());
    }
}
