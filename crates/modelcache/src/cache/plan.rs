//! Planning of a fill: the manifests of all tiers are merged into one list of files, and each file gets its sources.
//!
//! This module decides how a failing tier affects the get. If a tier does not have the artifact, the next one is used.
//! If a tier is unavailable after its retries, the next one is used as well, unless `on_remote_down` requires the get
//! to fail. The error is kept, and returned if no other tier has the artifact. If the remote contradicts the origin,
//! the origin takes precedence, and the remote is neither read nor written.
//!
//! It also decides which ladders are trusted before the whole file is verified ([`read_gate`]).

use super::pointer::TagRecord;
use super::resolve::{FetchRequest, LookupPolicy};
use super::{Cache, GetOptions, GetPlan, PlannedFile, digest_alerts};
use crate::config::OnRemoteDown;
use crate::digest::Provenance;
use crate::disk::DiskSource;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::format::Format;
use crate::human::first_few;
use crate::key::FilePath;
use crate::ladder::Ladder;
use crate::manifest::{FileEntry, Manifest};
use crate::option_name::call::EXTRACT;
use crate::option_name::setting::{ORIGIN, REMOTE, REQUIRE_CHECKSUM};
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::remote::{self, RemoteSource};
use crate::source::Source;
use crate::transfer::ReadGate;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Maximum number of file names in a message.
const NAMES_SHOWN_MAX: usize = 8;

/// The plan of a fill: which files it has to provide, and from which sources.
#[derive(Debug)]
pub(super) struct FillPlan {
    /// All files of the artifact, merged from all manifests.
    pub(super) listing: Manifest,
    /// The selected files.
    pub(super) selected: Vec<(FilePath, FileEntry)>,
    /// The manifest on the remote, if it could be read and does not contradict the origin.
    pub(super) remote: Option<Manifest>,
    /// True if the remote failed or contradicts the origin, or if there is none to use. The fill neither reads nor
    /// writes it.
    pub(super) remote_unusable: bool,
    policy: LookupPolicy,
    /// True if the remote is unreachable at present. A later run can upload the files that it lacks.
    pub(super) remote_down: bool,
    /// True if the files on the remote are unmanaged objects. They are read only while they are unchanged since they
    /// were listed, and never written.
    pub(super) remote_unmanaged: bool,
    /// True if the origin reads from the bucket or folder of the remote, so that a backfill would only copy the files
    /// within it.
    pub(super) origin_in_remote: bool,
    sources: BTreeMap<FilePath, Vec<Arc<dyn Source>>>,
    read_gates: BTreeMap<FilePath, ReadGate>,
}

/// The manifests of one artifact by tier, and the errors of the tiers that failed.
#[derive(Default)]
pub(super) struct TierManifests {
    disk: Option<Manifest>,
    lower: Option<Manifest>,
    remote: Option<(Arc<dyn Source>, Manifest)>,
    remote_unmanaged: bool,
    origin: Option<Manifest>,
    /// True if the origin was contacted, even if it failed or does not have the artifact.
    origin_contacted: bool,
    remote_failure: Option<Error>,
    origin_failure: Option<Error>,
}

impl FillPlan {
    /// Returns the sources of one file, best first.
    ///
    /// # Errors
    /// `NotFound` if the file is in the manifest, but no usable tier has its bytes.
    pub(super) fn sources_of(&self, path: &FilePath) -> Result<Vec<Arc<dyn Source>>> {
        let sources = self.sources.get(path).cloned().unwrap_or_default();
        if sources.is_empty() {
            return Err(match self.policy.max_tier {
                Tier::Origin if self.listing.key.name.is_extracted() => {
                    Error::not_found(format!("{path} was extracted from an archive, and is damaged or missing"))
                        .hint(format!("get the archive again, with {}", EXTRACT.set_to("auto")))
                }
                Tier::Origin => Error::not_found(format!("{path} is in the manifest, but no tier has its bytes"))
                    .hint(format!("put the artifact again, or configure {ORIGIN}")),
                _ => {
                    let excluded = self.policy.tiers_not_consulted();
                    Error::not_found(format!(
                        "{path} is in the manifest, but none of the tiers used has it; {excluded}"
                    ))
                    .hint(LookupPolicy::hint_online())
                }
            });
        }
        Ok(sources)
    }

    /// Returns true if a source of `tier` used a response with other validators than it had listed.
    pub(super) fn saw_other_validators(&self, tier: Tier) -> bool {
        self.sources.values().flatten().any(|source| source.tier() == tier && source.saw_other_validators())
    }

    /// Returns the point of the fill from which the bytes of one file may be read.
    pub(super) fn read_gate(&self, path: &FilePath) -> ReadGate {
        self.read_gates.get(path).copied().unwrap_or(ReadGate::Published)
    }

    /// Returns the only selected file.
    ///
    /// # Errors
    /// `Invalid` if several files are selected; `NotFound` if none is.
    pub(super) fn only_file(&self) -> Result<FilePath> {
        only_file(self.selected.iter().map(|(path, _)| path))
    }
}

impl Cache {
    /// Returns which files [`get`](Self::get) would lease, and from which tier each would come. Reads only manifests
    /// and file lists.
    ///
    /// # Errors
    /// As for [`get`](Self::get), if the error occurs before the download starts.
    pub async fn plan(&self, reference: &Reference, options: &GetOptions) -> Result<GetPlan> {
        let progress = Progress::new();
        // A call that downloads nothing does not write to the remote.
        let policy = LookupPolicy { may_write: false, ..self.policy(options) };
        let request = self
            .resolve_with(reference, options, policy, &progress)
            .await
            .map_err(|error| error.artifact(reference))?;
        let plan = self.plan_fill(&request, &progress).await.map_err(|error| error.artifact(&request.key))?;
        let disk = self.0.disk.manifest(&request.key)?;
        let is_on_disk =
            |path: &FilePath| disk.as_ref().and_then(|m| m.files.get(path)).is_some_and(|entry| entry.held.is_some());
        let from = |path: &FilePath| match plan.sources.get(path).and_then(|sources| sources.first()) {
            _ if is_on_disk(path) => Tier::Disk,
            Some(source) => source.tier(),
            // A complete staged file is reused, or the get fails.
            None => Tier::Disk,
        };
        let files = plan.selected.iter().map(|(path, entry)| PlannedFile {
            path: path.clone(),
            size: entry.size,
            from: from(path),
        });
        Ok(GetPlan::new(request.key, files.collect()))
    }

    /// Plans a fill before it is started. The source on the remote is kept in `request`, so that the fill does not
    /// request the manifest again.
    pub(super) async fn plan_ahead(&self, request: &mut FetchRequest, progress: &Progress) -> Result<FillPlan> {
        if let (None, Some(remote)) = (&request.remote, self.remote_within(request.max_tier)) {
            request.remote = Some(Ok(Arc::new(remote.source(&request.key))));
        }
        self.plan_fill(request, progress).await
    }

    /// Step 4 of the main path: plans a fill.
    pub(super) async fn plan_fill(&self, request: &FetchRequest, progress: &Progress) -> Result<FillPlan> {
        let _phase = progress.enter(Phase::Plan, 0);
        // 4a: read the manifests, and merge them into one list of files.
        let mut tier_manifests = self.tier_manifests(request).await?;
        let mut listing = self.merge(request, &mut tier_manifests)?;
        // 4b: check digests before any download. Those that are unknown yet are checked after it.
        request.check_demanded_digest(&listing)?;
        self.complete_digests(request, &mut listing).await?;
        // 4c: select the files.
        let selected: Vec<_> =
            listing.selected(&request.selection).map(|(path, entry)| (path.clone(), entry.clone())).collect();
        if selected.is_empty() && !listing.files.is_empty() {
            return Err(nothing_selected(request, &listing));
        }
        self.check_policy(request, &listing)?;
        // 4d: find the sources of each file, and when it may be read.
        let local = self.local_sources(request, &selected).await?;
        let sources = selected
            .iter()
            .map(|(path, entry)| (path.clone(), sources(path, entry, &local, &tier_manifests, request)))
            .collect();
        // A forbidden format is detected only when the file is complete, so no bytes may be read before that.
        let has_forbidden_formats = self.0.config.forbid.has_formats();
        let read_gate = |(path, entry): &(FilePath, FileEntry)| {
            let read_gate = match has_forbidden_formats {
                true => ReadGate::Published,
                false => read_gate(path, entry, &tier_manifests, request, &listing),
            };
            (path.clone(), read_gate)
        };
        let read_gates = selected.iter().map(read_gate).collect();
        // After `selected` was copied: this fill may use ladders of other tiers, but only ladders from this disk are
        // recorded in its manifest.
        keep_ladders_from_disk(&mut listing, tier_manifests.disk.as_ref());
        let remote_unusable = tier_manifests.remote_failure.is_some() || self.remote_within(request.max_tier).is_none();
        let store = request.origin.as_ref().and_then(|origin| origin.store());
        let origin_in_remote =
            self.0.remote.as_ref().is_some_and(|remote| store.is_some_and(|store| remote.contains(&store)));
        let is_down = |error: &Error| error.kind() == ErrorKind::Unavailable;
        let remote_down = tier_manifests.remote_failure.as_ref().is_some_and(is_down);
        Ok(FillPlan {
            listing,
            selected,
            remote: tier_manifests.remote.map(|(_, manifest)| manifest),
            remote_unusable,
            policy: request.policy(),
            remote_down,
            remote_unmanaged: tier_manifests.remote_unmanaged,
            origin_in_remote,
            sources,
            read_gates,
        })
    }

    /// Reads the manifests on disk, in the lower directory and on the remote. Contacts the origin only if these tiers
    /// together do not hold all selected files.
    pub(super) async fn tier_manifests(&self, request: &FetchRequest) -> Result<TierManifests> {
        let key = request.key.clone();
        let disk = self.on_disk(move |disk| disk.manifest(&key)).await?;
        let mut tier_manifests = TierManifests { disk, ..TierManifests::default() };
        tier_manifests.lower = self.lower_manifest(&request.key).await?;
        if let Some(remote) = self.remote_within(request.max_tier) {
            self.wait_for_start_jitter().await;
            let source = request.remote.clone().unwrap_or_else(|| Ok(Arc::new(remote.source(&request.key))));
            let result = manifest_of(source).await;
            self.metrics().record_health(Tier::Remote, &result);
            match result {
                Ok((source, manifest)) => {
                    tier_manifests.remote_unmanaged = source.is_unmanaged();
                    tier_manifests.remote = manifest.map(|manifest| (source as Arc<dyn Source>, manifest));
                }
                Err(error) => tier_manifests.remote_failure = Some(self.tolerate_remote_failure(error)?),
            }
        }
        if let Some(origin) = request.origin.as_ref().filter(|_| !tier_manifests.satisfies(request)) {
            self.wait_for_start_jitter().await;
            tier_manifests.origin_contacted = true;
            let result = origin.manifest().await;
            self.metrics().record_health(Tier::Origin, &result);
            match result {
                Ok(manifest) => tier_manifests.origin = manifest,
                Err(error) => tier_manifests.origin_failure = Some(error.tier(Tier::Origin)),
            }
        }
        Ok(tier_manifests)
    }

    /// Fails if the configuration does not allow a selected file, as far as `listing` knows the files.
    ///
    /// # Errors
    /// `Corrupt`, with the names of the files.
    pub(super) fn check_policy(&self, request: &FetchRequest, listing: &Manifest) -> Result<()> {
        self.require_checksums(request, listing)?;
        let format = |entry: &FileEntry| entry.format.as_deref().and_then(Format::named);
        self.0.config.forbid.check(listing.selected(&request.selection).map(|(path, entry)| (path, format(entry))))
    }

    /// Fails if `require_checksum` is configured and a selected file has no published checksum. A digest that the
    /// caller demands counts as one.
    ///
    /// # Errors
    /// `Corrupt`, with the names of the files.
    fn require_checksums(&self, request: &FetchRequest, listing: &Manifest) -> Result<()> {
        if !self.0.config.require_checksum || request.digest.is_some() {
            return Ok(());
        }
        let without_checksum: Vec<_> =
            remote::without_checksum(listing).into_iter().filter(|path| request.selection.matches(path)).collect();
        if without_checksum.is_empty() {
            return Ok(());
        }
        let (files, names) = (without_checksum.len(), remote::quoted_names(&without_checksum));
        Err(Error::corrupt(format!(
            "no checksum available for {files} of its files ({names}), but checksums are required"
        ))
        .hint(format!(
            "{}; {} accepts files without one",
            remote::ADD_CHECKSUMS_HINT,
            REQUIRE_CHECKSUM.set_to("0")
        )))
    }

    /// Returns the error if the get can continue without the remote. Fails with it if the remote is misconfigured, or
    /// if `on_remote_down` requires the get to fail.
    pub(super) fn tolerate_remote_failure(&self, error: Error) -> Result<Error> {
        let error = error.tier(Tier::Remote);
        if error.kind() == ErrorKind::Invalid || self.0.config.on_remote_down == OnRemoteDown::Fail {
            return Err(error);
        }
        Ok(error)
    }

    /// Merges the manifests into one list of files. If the remote contradicts the others, removes it from
    /// `tier_manifests` and records the failure.
    ///
    /// # Errors
    /// `Corrupt` if the disk contradicts the origin; `Conflict` if unmanaged objects changed; `NotFound`, or the error
    /// of a tier that failed, if there is no manifest at all.
    pub(super) fn merge(&self, request: &FetchRequest, tier_manifests: &mut TierManifests) -> Result<Manifest> {
        // The disk is checked against the origin. A contradiction is never resolved silently.
        let local = match (tier_manifests.disk.clone(), tier_manifests.origin.as_ref()) {
            (Some(mut disk), Some(origin)) => {
                disk.learn(origin).map_err(|error| digest_alerts::disk_contradicts_origin(&request.key, &error))?;
                Some(disk)
            }
            (disk, origin) => disk.or_else(|| origin.cloned()),
        };
        // The lower directory only adds details. If it contradicts the others, it is ignored, with a warning.
        let local = match (local, &tier_manifests.lower) {
            (Some(mut listing), Some(lower)) => {
                if let Err(error) = listing.learn(lower) {
                    tracing::warn!(
                        %error,
                        "the lower directory contradicts this disk or the origin; its list of files is not used"
                    );
                }
                Some(listing)
            }
            (local, lower) => local.or_else(|| lower.clone()),
        };
        let remote = tier_manifests.remote.as_ref().map(|(_, manifest)| manifest.clone().without_holdings());
        // If the content of the version changed after it was tagged, log it, and use the present content.
        if let (Some(tag_record), Some(on_remote)) =
            (&request.tag_record, remote.as_ref().and_then(Manifest::content_digest))
            && let Some(sha256) = tag_record.sha256.filter(|sha256| *sha256 != on_remote)
        {
            digest_alerts::changed_after_tagging(&request.key, &tag_record.tag, sha256, on_remote);
        }
        // The remote must agree with the disk and the origin. Otherwise it is not used.
        match (local, remote) {
            (Some(mut listing), Some(remote)) => {
                if let Err(error) = listing.learn(&remote) {
                    // Without an origin, nothing decides whether the local files or the unmanaged objects are the right
                    // ones.
                    if tier_manifests.remote_unmanaged && request.origin.is_none() {
                        return Err(unmanaged_objects_changed(request, &error));
                    }
                    digest_alerts::remote_contradicts(&request.key, &error);
                    tier_manifests.remote = None;
                    tier_manifests.remote_failure = Some(error.tier(Tier::Remote));
                }
                Ok(listing.without_holdings())
            }
            (Some(listing), None) | (None, Some(listing)) => {
                if let Some(error) = &tier_manifests.remote_failure {
                    tracing::warn!(%error, hint = error.hint_text(), "the remote failed and is skipped");
                }
                Ok(listing.without_holdings())
            }
            (None, None) => Err(self.not_found_error(request, tier_manifests)),
        }
    }

    /// Returns the error for an artifact that no tier has: the failure of a tier if there was one, otherwise `NotFound`
    /// with the tiers that were contacted.
    fn not_found_error(&self, request: &FetchRequest, tier_manifests: &mut TierManifests) -> Error {
        // A tier that failed may have the artifact, so its error explains more than the absence elsewhere.
        let failures = [tier_manifests.origin_failure.take(), tier_manifests.remote_failure.take()];
        let (absent, failed): (Vec<_>, Vec<_>) =
            failures.into_iter().flatten().partition(|error| error.kind() == ErrorKind::NotFound);
        if let Some(error) = failed.into_iter().chain(absent).next() {
            return error;
        }
        let mut tiers = vec!["this disk".to_owned()];
        tiers.extend(self.remote_within(request.max_tier).map(|remote| format!("the remote ({})", remote.url())));
        let is_bare = request.key.name.scheme().is_none();
        tiers.extend(match &request.origin {
            Some(_) if is_bare => self.0.config.origins.iter().map(|origin| format!("the origin {origin}")).collect(),
            Some(_) => vec!["the origin".to_owned()],
            None => Vec::new(),
        });
        let hint = match (&self.0.remote, &request.origin) {
            (None, None) => {
                format!(
                    "no remote and no origin is configured: set {REMOTE} or {ORIGIN}, or write a URI \
                 (hf://org/model)"
                )
            }
            (_, Some(_)) if request.key.name.scheme() == Some("hf") => {
                "check the commit; hf://org/model without @revision is main".to_owned()
            }
            (_, Some(_)) if !is_bare => "check the reference".to_owned(),
            (None, Some(_)) => format!("check name and version, and the URI that {ORIGIN} builds from them"),
            (Some(_), Some(_)) => {
                format!(
                    "check name and version, and the URI that {ORIGIN} builds from them; \
                 `modelcache ls --remote` lists published artifacts"
                )
            }
            (Some(_), None) => {
                format!(
                    "check name and version; `modelcache ls --remote` lists published artifacts, and {ORIGIN} \
                 configures an origin for bare names"
                )
            }
        };
        let tiers = tiers.join(", nor on ");
        let not_found = match &request.tag_record {
            Some(TagRecord { tag, .. }) => format!("the tag {tag} points to {}, which is not on {tiers}", request.key),
            None => format!("not found on {tiers}"),
        };
        match (request.max_tier, &request.tag_record) {
            (Tier::Origin, None) => Error::not_found(not_found).hint(hint),
            (Tier::Origin, Some(TagRecord { tag, .. })) => Error::not_found(not_found).hint(format!(
                "`modelcache tag {}@VERSION {tag}` moves the tag; `modelcache ls --remote` lists versions and tags",
                request.key.name
            )),
            _ => Error::not_found(format!("{not_found}; {}", request.policy().tiers_not_consulted()))
                .hint(LookupPolicy::hint_online()),
        }
    }

    /// Returns the local and the lower directory as sources. They supply files that cannot be linked into the artifact.
    async fn local_sources(
        &self,
        request: &FetchRequest,
        selected: &[(FilePath, FileEntry)],
    ) -> Result<Vec<Arc<DiskSource>>> {
        let (lower, key, selected) = (self.0.lower.clone(), request.key.clone(), selected.to_vec());
        self.on_disk(move |disk| {
            let own = disk.source(&key, &selected)?;
            let below = lower.map(|lower| lower.source(&key, &selected)).transpose()?;
            Ok([own].into_iter().chain(below).map(Arc::new).collect())
        })
        .await
    }

    /// Completes missing digests: with the digest that the caller demands, and with the SHA-256 that another version on
    /// disk has for the same git object id. A known SHA-256 allows a file to be linked instead of downloaded.
    async fn complete_digests(&self, request: &FetchRequest, listing: &mut Manifest) -> Result<()> {
        if let (Some(demanded), Some(path)) = (request.digest, request.single_file(listing).cloned())
            && let Some(entry) = listing.files.get_mut(&path)
            && entry.sha256.is_none()
        {
            (entry.sha256, entry.provenance) = (Some(demanded), Some(Provenance::Caller));
        }
        let unknown: Vec<_> = listing
            .selected(&request.selection)
            .filter(|(_, entry)| entry.sha256.is_none())
            .filter_map(|(path, entry)| Some((path.clone(), entry.git_oid?, entry.size)))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let name = request.key.name.clone();
        let known = self.on_disk(move |disk| disk.digests_of_git_oids(&name)).await?;
        for (path, oid, size) in unknown {
            if let (Some(digest), Some(entry)) = (known.get(&(oid, size)), listing.files.get_mut(&path)) {
                entry.sha256 = Some(*digest);
            }
        }
        Ok(())
    }
}

impl TierManifests {
    /// Returns true if disk, lower directory and remote together hold all selected files, so that no origin is needed.
    fn satisfies(&self, request: &FetchRequest) -> bool {
        let remote = self.remote.as_ref().map(|(_, manifest)| manifest);
        let lower = self.lower.as_ref();
        // Every manifest lists all files of the artifact, whether or not its tier holds them.
        let Some(listing) = self.disk.as_ref().or(lower).or(remote) else { return false };
        let holds = |manifest: Option<&Manifest>, path: &FilePath| {
            manifest.and_then(|manifest| manifest.files.get(path)).is_some_and(|entry| entry.held.is_some())
        };
        let manifests = [self.disk.as_ref(), lower, remote];
        listing.selected(&request.selection).all(|(path, _)| manifests.iter().any(|manifest| holds(*manifest, path)))
    }
}

/// Returns the sources of one file, best first: local directories, the remote, the origin. Files in the local directory
/// are usually linked and not read at all.
fn sources(
    path: &FilePath,
    entry: &FileEntry,
    local: &[Arc<DiskSource>],
    tier_manifests: &TierManifests,
    request: &FetchRequest,
) -> Vec<Arc<dyn Source>> {
    let local = local.iter().filter(|source| source.holds(path)).map(|source| source.clone() as Arc<dyn Source>);
    let holds = |manifest: &Manifest| manifest.files.get(path).is_some_and(|entry| entry.held.is_some());
    let remote =
        tier_manifests.remote.as_ref().filter(|(_, manifest)| holds(manifest)).map(|(source, _)| source.clone());
    // Without a digest, a mixture of bytes from two sources could not be detected, so use only one source.
    let sources_max = if entry.sha256.is_none() && entry.git_oid.is_none() { 1 } else { usize::MAX };
    local
        .chain(remote.map(|source| source as Arc<dyn Source>))
        .chain(request.origin.clone())
        .take(sources_max)
        .collect()
}

/// Decides when bytes of a file may be read during the fill.
///
/// A ladder verifies single parts if it was computed or verified on this disk, or if it comes from the manifest that is
/// also the authority for the digest. If the authority is the origin's file list or a digest that the caller demands,
/// a ladder from the remote proves nothing until the whole file has that digest.
fn read_gate(
    path: &FilePath,
    entry: &FileEntry,
    tier_manifests: &TierManifests,
    request: &FetchRequest,
    listing: &Manifest,
) -> ReadGate {
    if request.digest.is_some() && request.single_file(listing).is_none() {
        // The demanded digest is that of the file list. It can be compared only when all files are downloaded.
        return ReadGate::Published;
    }
    // A digest that a local directory knows may come from an origin, and the remote's ladder need not match it.
    let has_digest = |manifest: &Option<Manifest>| {
        let entry = manifest.as_ref().and_then(|manifest| manifest.files.get(path));
        entry.is_some_and(|entry| entry.sha256.is_some() || entry.git_oid.is_some())
    };
    let is_known = has_digest(&tier_manifests.disk) || has_digest(&tier_manifests.lower);
    let remote_is_authority = !tier_manifests.origin_contacted && request.digest.is_none() && !is_known;
    match &entry.ladder {
        Some(ladder) if is_from_disk(ladder, path, tier_manifests.disk.as_ref()) || remote_is_authority => {
            ReadGate::ByPart
        }
        _ => ReadGate::Verified,
    }
}

/// Removes the ladders that do not come from the disk. A ladder in the manifest on disk is trusted later, so it must
/// have been verified there.
fn keep_ladders_from_disk(listing: &mut Manifest, disk: Option<&Manifest>) {
    for (path, entry) in listing.files.iter_mut().filter(|(_, entry)| entry.ladder.is_some()) {
        entry.ladder = entry.ladder.take().filter(|ladder| is_from_disk(ladder, path, disk));
    }
}

/// Returns true if the manifest on disk has this ladder of the file, which was then computed or verified there.
fn is_from_disk(ladder: &Ladder, path: &FilePath, disk: Option<&Manifest>) -> bool {
    disk.and_then(|disk| disk.files.get(path)).is_some_and(|here| here.ladder.as_ref() == Some(ladder))
}

/// Returns the only path of `paths`.
///
/// # Errors
/// `Invalid` if there are several; `NotFound` if there is none.
pub(super) fn only_file<'a>(paths: impl Iterator<Item = &'a FilePath>) -> Result<FilePath> {
    let paths: Vec<_> = paths.collect();
    match paths.as_slice() {
        [path] => Ok(FilePath::clone(path)),
        [] => Err(Error::not_found("it has no file")),
        many => Err(Error::invalid(format!("it has {} files, but only one can be opened", many.len()))
            .hint(format!("name one of them: {}", first_few(many, NAMES_SHOWN_MAX)))),
    }
}

/// Returns `source` with its manifest. Requests the manifest, unless the source has it already.
pub(super) async fn manifest_of(source: Result<Arc<RemoteSource>>) -> Result<(Arc<RemoteSource>, Option<Manifest>)> {
    let source = source?;
    let manifest = source.manifest().await?;
    Ok((source, manifest))
}

/// Returns the error for unmanaged objects that changed after some of them were downloaded to this disk. There is no
/// authority that decides which content is right.
fn unmanaged_objects_changed(request: &FetchRequest, error: &Error) -> Error {
    let message =
        format!("the objects on the remote changed after this disk downloaded some of them: {}", error.message());
    let hint = format!(
        "put changed files under another version; `modelcache evict --tier disk {}` removes the local ones",
        request.key
    );
    Error::new(ErrorKind::Conflict, message).tier(Tier::Remote).hint(hint)
}

/// Returns the error for a selection that matches no file of the artifact.
fn nothing_selected(request: &FetchRequest, listing: &Manifest) -> Error {
    let message = match request.selection.one_file() {
        Some(file) => format!("it has no file {file}"),
        None => format!("no file matches {}", request.selection.patterns().join(", ")),
    };
    let names = first_few(listing.files.keys(), NAMES_SHOWN_MAX);
    Error::not_found(message).hint(format!("it has {} files: {names}", listing.files.len()))
}
