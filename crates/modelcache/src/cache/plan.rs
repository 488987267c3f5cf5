//! Planning: what the artifact consists of, what disk lacks of it, and which source gives each file.
//!
//! The one place where it is decided what a failing tier means. *Not there* goes on to the next. *Unavailable*, after
//! retries inside the tier, goes on too, unless configured to fail; the failure is kept, and is what the caller gets to
//! see if nobody else has the artifact. Where the remote contradicts the origin, the origin wins and the remote is left
//! alone.
//!
//! Also decided here, and nowhere else: whose ladder is trusted before the whole file is proven.

use super::pointer::TagRecord;
use super::resolve::{FetchRequest, LookupPolicy};
use super::{Cache, GetOptions, GetPlan, PlannedFile, digest_alerts};
use crate::config::OnRemoteDown;
use crate::digest::Provenance;
use crate::disk::DiskSource;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::Ladder;
use crate::manifest::{FileEntry, Manifest};
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::remote::{self, RemoteSource};
use crate::source::Source;
use crate::transfer::{ReadGate, blocking};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names shown when a pattern matches nothing.
const NAMES_SHOWN: usize = 8;

/// What a fill will do.
#[derive(Debug)]
pub(super) struct FillPlan {
    /// All files, with everything known of them.
    pub(super) listing: Manifest,
    /// The files wanted.
    pub(super) selected: Vec<(FilePath, FileEntry)>,
    /// What the remote holds, if it could be asked and agrees.
    pub(super) remote: Option<Manifest>,
    /// The remote failed or contradicts the origin: neither read nor written in this fill.
    pub(super) remote_unusable: bool,
    policy: LookupPolicy,
    /// It does not answer now; what it lacks may be written later.
    pub(super) remote_down: bool,
    /// The remote's files are another tool's: read as they were listed, never written.
    pub(super) remote_unmanaged: bool,
    sources: BTreeMap<FilePath, Vec<Arc<dyn Source>>>,
    read_gates: BTreeMap<FilePath, ReadGate>,
}

/// What the tiers said.
#[derive(Default)]
pub(super) struct TierManifests {
    disk: Option<Manifest>,
    lower: Option<Manifest>,
    remote: Option<(Arc<dyn Source>, Manifest)>,
    remote_unmanaged: bool,
    origin: Option<Manifest>,
    /// Whether the origin was asked, whatever it answered.
    origin_asked: bool,
    remote_failure: Option<Error>,
    origin_failure: Option<Error>,
}

impl FillPlan {
    /// The sources of one file, best first.
    pub(super) fn sources_of(&self, path: &FilePath) -> Result<Vec<Arc<dyn Source>>> {
        let sources = self.sources.get(path).cloned().unwrap_or_default();
        if sources.is_empty() {
            let listed = format!("{path} is listed, but");
            return Err(match self.policy.max_tier {
                Tier::Origin => Error::not_found(format!("{listed} neither the remote nor an origin holds it"))
                    .hint("put the artifact again, or configure MODEL_CACHE_ORIGIN"),
                _ => Error::not_found(format!("{listed} not held here; {}", self.policy.tiers_not_consulted()))
                    .hint(LookupPolicy::HINT_ONLINE),
            });
        }
        Ok(sources)
    }

    /// When the bytes of one file may be read while it is filled.
    pub(super) fn read_gate(&self, path: &FilePath) -> ReadGate {
        self.read_gates.get(path).copied().unwrap_or(ReadGate::Published)
    }

    /// The one file that is wanted.
    ///
    /// # Errors
    /// `Invalid` where there are several, or none.
    pub(super) fn only_file(&self) -> Result<FilePath> {
        only_file(self.selected.iter().map(|(path, _)| path))
    }
}

impl Cache {
    /// What [`get`](Self::get) would do; fetches lists only.
    pub async fn plan(&self, reference: &Reference, options: &GetOptions) -> Result<GetPlan> {
        let progress = Progress::new();
        // Whoever only looks writes nothing for others to see.
        let policy = LookupPolicy { share_answers: false, ..self.policy(options) };
        let request = self
            .resolve_with(reference, options, policy, &progress)
            .await
            .map_err(|error| error.artifact(reference))?;
        let plan = self.plan_fill(&request, &progress).await.map_err(|error| error.artifact(&request.key))?;
        let disk = self.0.disk.manifest(&request.key)?;
        let on_disk =
            |path: &FilePath| disk.as_ref().and_then(|m| m.files.get(path)).is_some_and(|entry| entry.held.is_some());
        let from = |path: &FilePath| match plan.sources.get(path).and_then(|sources| sources.first()) {
            _ if on_disk(path) => Tier::Disk,
            Some(source) => source.tier(),
            None => Tier::Disk,
        };
        let files = plan.selected.iter().map(|(path, entry)| PlannedFile {
            path: path.clone(),
            size: entry.size,
            from: from(path),
        });
        Ok(GetPlan { key: request.key, files: files.collect() })
    }

    /// Step 4 of the main path.
    pub(super) async fn plan_fill(&self, request: &FetchRequest, progress: &Progress) -> Result<FillPlan> {
        let _phase = progress.enter(Phase::Plan, 0);
        let mut tier_manifests = self.tier_manifests(request).await?;
        let mut listing = self.merge(request, &mut tier_manifests)?;
        request.check_demanded_digest(&listing)?;
        self.complete_digests(request, &mut listing).await?;
        let selected: Vec<_> =
            listing.selected(&request.selection).map(|(path, entry)| (path.clone(), entry.clone())).collect();
        if selected.is_empty() && !listing.files.is_empty() {
            return Err(nothing_selected(request, &listing));
        }
        self.require_checksums(request, &listing)?;
        let local = self.local_sources(request, &selected).await?;
        let sources = selected
            .iter()
            .map(|(path, entry)| (path.clone(), sources(path, entry, &local, &tier_manifests, request)))
            .collect();
        let read_gate = |(path, entry): &(FilePath, FileEntry)| {
            (path.clone(), read_gate(path, entry, &tier_manifests, request, &listing))
        };
        let read_gates = selected.iter().map(read_gate).collect();
        keep_own_ladders(&mut listing, tier_manifests.disk.as_ref());
        let remote_unusable = tier_manifests.remote_failure.is_some() || self.remote_within(request.max_tier).is_none();
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
            sources,
            read_gates,
        })
    }

    /// Asks disk, the remote, and the origin only if those two do not hold all that is wanted.
    pub(super) async fn tier_manifests(&self, request: &FetchRequest) -> Result<TierManifests> {
        let (disk, key) = (self.0.disk.clone(), request.key.clone());
        let mut tier_manifests =
            TierManifests { disk: blocking(move || disk.manifest(&key)).await?, ..TierManifests::default() };
        tier_manifests.lower = self.lower_manifest(&request.key).await?;
        if let Some(remote) = self.remote_within(request.max_tier) {
            self.before_first_call().await;
            let asked = request.remote.clone().unwrap_or_else(|| Ok(Arc::new(remote.source(&request.key))));
            let asked = manifest_of(asked).await;
            self.metrics().asked(Tier::Remote, &asked);
            match asked {
                Ok((source, manifest)) => {
                    tier_manifests.remote_unmanaged = source.is_unmanaged();
                    tier_manifests.remote = manifest.map(|manifest| (source as Arc<dyn Source>, manifest));
                }
                Err(error) => tier_manifests.remote_failure = Some(self.remote_failed(error)?),
            }
        }
        if let Some(origin) = request.origin.as_ref().filter(|_| !tier_manifests.satisfies(request)) {
            self.before_first_call().await;
            tier_manifests.origin_asked = true;
            let asked = origin.manifest().await;
            self.metrics().asked(Tier::Origin, &asked);
            match asked {
                Ok(manifest) => tier_manifests.origin = manifest,
                Err(error) => tier_manifests.origin_failure = Some(error.tier(Tier::Origin)),
            }
        }
        Ok(tier_manifests)
    }

    /// Refuses files of which nobody states a checksum, where that is configured. A caller who demands a digest states
    /// one.
    pub(super) fn require_checksums(&self, request: &FetchRequest, listing: &Manifest) -> Result<()> {
        if !self.0.config.require_checksum || request.digest.is_some() {
            return Ok(());
        }
        let unstated: Vec<_> =
            remote::unstated(listing).into_iter().filter(|path| request.selection.matches(path)).collect();
        if unstated.is_empty() {
            return Ok(());
        }
        let (files, names) = (unstated.len(), remote::some(&unstated));
        Err(Error::corrupt(format!("nobody states a checksum of {files} of its files ({names}), and one is required"))
            .hint(format!("{}; MODEL_CACHE_REQUIRE_CHECKSUM=0 takes them as they come", remote::REMEDY)))
    }

    /// What it means that the remote could not be asked: go on, or fail.
    pub(super) fn remote_failed(&self, error: Error) -> Result<Error> {
        let error = error.tier(Tier::Remote);
        if error.kind() == ErrorKind::Invalid || self.0.config.on_remote_down == OnRemoteDown::Fail {
            return Err(error);
        }
        Ok(error)
    }

    /// One list out of what the tiers said, or the reason why there is none.
    pub(super) fn merge(&self, request: &FetchRequest, tier_manifests: &mut TierManifests) -> Result<Manifest> {
        let local = match (tier_manifests.disk.clone(), tier_manifests.origin.as_ref()) {
            (Some(mut disk), Some(origin)) => {
                disk.learn(origin).map_err(|error| digest_alerts::disk_contradicts_origin(&request.key, &error))?;
                Some(disk)
            }
            (disk, origin) => disk.or_else(|| origin.cloned()),
        };
        let local = match (local, &tier_manifests.lower) {
            (Some(mut listing), Some(lower)) => {
                if let Err(error) = listing.learn(lower) {
                    tracing::warn!(%error, "the lower directory contradicts this disk or the origin; its list is not used");
                }
                Some(listing)
            }
            (local, lower) => local.or_else(|| lower.clone()),
        };
        let remote = tier_manifests.remote.as_ref().map(|(_, manifest)| manifest.clone().without_holdings());
        if let (Some(tag_record), Some(there)) =
            (&request.tag_record, remote.as_ref().and_then(Manifest::content_digest))
            && let Some(sha256) = tag_record.sha256.filter(|sha256| *sha256 != there)
        {
            digest_alerts::retagged(&request.key, &tag_record.tag, sha256, there);
        }
        match (local, remote) {
            (Some(mut listing), Some(remote)) => {
                if let Err(error) = listing.learn(&remote) {
                    if tier_manifests.remote_unmanaged && request.origin.is_none() {
                        return Err(replaced(request, &error));
                    }
                    digest_alerts::remote_contradicts(&request.key, &error);
                    tier_manifests.remote = None;
                    tier_manifests.remote_failure = Some(error.tier(Tier::Remote));
                }
                Ok(listing.without_holdings())
            }
            (Some(listing), None) | (None, Some(listing)) => {
                if let Some(error) = &tier_manifests.remote_failure {
                    tracing::warn!(%error, hint = error.hint_text(), "the remote is left out");
                }
                Ok(listing.without_holdings())
            }
            (None, None) => Err(self.nowhere(request, tier_manifests)),
        }
    }

    /// Nobody has it: the failure that explains most, else plain absence.
    fn nowhere(&self, request: &FetchRequest, tier_manifests: &mut TierManifests) -> Error {
        let failures = [tier_manifests.origin_failure.take(), tier_manifests.remote_failure.take()];
        let (absent, failed): (Vec<_>, Vec<_>) =
            failures.into_iter().flatten().partition(|error| error.kind() == ErrorKind::NotFound);
        if let Some(error) = failed.into_iter().chain(absent).next() {
            return error;
        }
        let mut asked = vec!["this disk".to_owned()];
        asked.extend(self.remote_within(request.max_tier).map(|remote| format!("the remote ({})", remote.url())));
        let bare = request.key.name.scheme().is_none();
        asked.extend(match &request.origin {
            Some(_) if bare => self.0.config.origins.iter().map(|origin| format!("the origin {origin}")).collect(),
            Some(_) => vec!["the origin".to_owned()],
            None => Vec::new(),
        });
        let hint = match (&self.0.remote, &request.origin) {
            (None, None) => {
                "no remote and no origin is configured: set MODEL_CACHE_REMOTE or MODEL_CACHE_ORIGIN, or write a URI (hf://org/model)"
            }
            (_, Some(_)) if request.key.name.scheme() == Some("hf") => {
                "check the commit; hf://org/model without @revision is main"
            }
            (_, Some(_)) if !bare => "check the reference",
            (None, Some(_)) => "check name and version, and what MODEL_CACHE_ORIGIN makes of them",
            (Some(_), Some(_)) => {
                "check name and version, and what MODEL_CACHE_ORIGIN makes of them; `modelcache ls --remote` lists what is published"
            }
            (Some(_), None) => {
                "check name and version; `modelcache ls --remote` lists what is published, MODEL_CACHE_ORIGIN says where else to look"
            }
        };
        let asked = asked.join(", nor on ");
        let not_found = match &request.tag_record {
            Some(TagRecord { tag, .. }) => format!("the tag {tag} points to {}, which is not on {asked}", request.key),
            None => format!("not found on {asked}"),
        };
        match (request.max_tier, &request.tag_record) {
            (Tier::Origin, None) => Error::not_found(not_found).hint(hint),
            (Tier::Origin, Some(TagRecord { tag, .. })) => Error::not_found(not_found).hint(format!(
                "`modelcache tag {}@VERSION {tag}` moves the tag; `modelcache ls --remote` lists versions and tags",
                request.key.name
            )),
            _ => Error::not_found(format!("{not_found}; {}", request.policy().tiers_not_consulted()))
                .hint(LookupPolicy::HINT_ONLINE),
        }
    }

    /// What our own directory and the lower one have of the files, for what cannot be linked.
    async fn local_sources(
        &self,
        request: &FetchRequest,
        selected: &[(FilePath, FileEntry)],
    ) -> Result<Vec<Arc<DiskSource>>> {
        let (disk, lower, key, selected) =
            (self.0.disk.clone(), self.0.lower.clone(), request.key.clone(), selected.to_vec());
        blocking(move || {
            let own = disk.source(&key, &selected)?;
            let below = lower.map(|lower| lower.source(&key, &selected)).transpose()?;
            Ok([own].into_iter().chain(below).map(Arc::new).collect())
        })
        .await
    }

    /// Fills in digests that were learnt before: the caller's, and those that another version has for the same git blob.
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
        let (disk, name) = (self.0.disk.clone(), request.key.name.clone());
        let known = blocking(move || disk.digests_of_git_oids(&name)).await?;
        for (path, oid, size) in unknown {
            if let (Some(digest), Some(entry)) = (known.get(&(oid, size)), listing.files.get_mut(&path)) {
                entry.sha256 = Some(*digest);
            }
        }
        Ok(())
    }
}

impl TierManifests {
    /// Whether disk, lower directory and remote together list and hold all that is wanted.
    fn satisfies(&self, request: &FetchRequest) -> bool {
        let remote = self.remote.as_ref().map(|(_, manifest)| manifest);
        let lower = self.lower.as_ref();
        let Some(listing) = self.disk.as_ref().or(lower).or(remote) else { return false };
        let held = |manifest: Option<&Manifest>, path: &FilePath| {
            manifest.and_then(|manifest| manifest.files.get(path)).is_some_and(|entry| entry.held.is_some())
        };
        let places = [self.disk.as_ref(), lower, remote];
        listing.selected(&request.selection).all(|(path, _)| places.iter().any(|manifest| held(*manifest, path)))
    }
}

/// Local bytes where there are any, then the remote where it holds the file, then the origin. Most bytes on our own disk
/// are linked and not read at all. A file that no digest names has one source only: nothing could tell a mixture of two
/// contents from either.
fn sources(
    path: &FilePath,
    entry: &FileEntry,
    local: &[Arc<DiskSource>],
    tier_manifests: &TierManifests,
    request: &FetchRequest,
) -> Vec<Arc<dyn Source>> {
    let local = local.iter().filter(|source| source.holds(path)).map(|source| source.clone() as Arc<dyn Source>);
    let held = |manifest: &Manifest| manifest.files.get(path).is_some_and(|entry| entry.held.is_some());
    let remote =
        tier_manifests.remote.as_ref().filter(|(_, manifest)| held(manifest)).map(|(source, _)| source.clone());
    let most = if entry.sha256.is_none() && entry.git_oid.is_none() { 1 } else { usize::MAX };
    local.chain(remote.map(|source| source as Arc<dyn Source>)).chain(request.origin.clone()).take(most).collect()
}

/// When bytes of a file may be read before all of it is proven.
///
/// A ladder vouches for a part where it was made or proven on this disk, or where it comes from the very manifest whose
/// digests this fill goes by. Where the origin's list or a digest of the caller's is what counts, a remote's ladder
/// proves nothing before it has led to that digest.
fn read_gate(
    path: &FilePath,
    entry: &FileEntry,
    tier_manifests: &TierManifests,
    request: &FetchRequest,
    listing: &Manifest,
) -> ReadGate {
    if request.digest.is_some() && request.single_file(listing).is_none() {
        // The demand is compared when all digests are known.
        return ReadGate::Published;
    }
    // A digest that was known here before may be an origin's, whoever brought it.
    let stated = |manifest: &Option<Manifest>| {
        let entry = manifest.as_ref().and_then(|manifest| manifest.files.get(path));
        entry.is_some_and(|entry| entry.sha256.is_some() || entry.git_oid.is_some())
    };
    let is_known = stated(&tier_manifests.disk) || stated(&tier_manifests.lower);
    let goes_by_its_manifest = !tier_manifests.origin_asked && request.digest.is_none() && !is_known;
    match &entry.ladder {
        Some(ladder) if is_own(ladder, path, tier_manifests.disk.as_ref()) || goes_by_its_manifest => ReadGate::ByPart,
        _ => ReadGate::Proven,
    }
}

/// Forgets ladders that others told of. They serve this fill; what is written down on this disk was proven on it, so
/// that it may be trusted the next time.
fn keep_own_ladders(listing: &mut Manifest, disk: Option<&Manifest>) {
    for (path, entry) in listing.files.iter_mut().filter(|(_, entry)| entry.ladder.is_some()) {
        entry.ladder = entry.ladder.take().filter(|ladder| is_own(ladder, path, disk));
    }
}

/// Whether our own disk has this ladder of the file: it was made or proven on it.
fn is_own(ladder: &Ladder, path: &FilePath, disk: Option<&Manifest>) -> bool {
    disk.and_then(|disk| disk.files.get(path)).is_some_and(|here| here.ladder.as_ref() == Some(ladder))
}

/// The one among `paths`.
pub(super) fn only_file<'a>(paths: impl Iterator<Item = &'a FilePath>) -> Result<FilePath> {
    let paths: Vec<_> = paths.collect();
    match paths.as_slice() {
        [path] => Ok(FilePath::clone(path)),
        [] => Err(Error::not_found("it has no file")),
        many => Err(Error::invalid(format!("it has {} files, and one is to be opened", many.len()))
            .hint(format!("name one of them: {}", some(many.iter().copied())))),
    }
}

/// A source with its list, for which it is asked if it was not before.
pub(super) async fn manifest_of(asked: Result<Arc<RemoteSource>>) -> Result<(Arc<RemoteSource>, Option<Manifest>)> {
    let source = asked?;
    let manifest = source.manifest().await?;
    Ok((source, manifest))
}

/// A foreign tree is not what it was when disk got a part of it: nobody says which of the two is meant.
fn replaced(request: &FetchRequest, error: &Error) -> Error {
    let what = format!("the files on the remote are no longer those that this disk knows: {}", error.message());
    let hint = format!(
        "put changed files under another version; `modelcache evict --tier disk {}` makes this disk forget the old ones",
        request.key
    );
    Error::new(ErrorKind::Conflict, what).tier(Tier::Remote).hint(hint)
}

fn nothing_selected(request: &FetchRequest, listing: &Manifest) -> Error {
    let message = match request.selection.one_file() {
        Some(file) => format!("it has no file {file}"),
        None => format!("no file matches {}", request.selection.patterns().join(", ")),
    };
    Error::not_found(message).hint(format!("it has {} files: {}", listing.files.len(), some(listing.files.keys())))
}

/// A few of many names, for a message.
fn some<'a>(mut paths: impl Iterator<Item = &'a FilePath>) -> String {
    let mut names: Vec<&str> = paths.by_ref().take(NAMES_SHOWN).map(FilePath::as_str).collect();
    names.extend(paths.next().map(|_| "…"));
    names.join(", ")
}
