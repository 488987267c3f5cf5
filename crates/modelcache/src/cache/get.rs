//! The main path: from a reference to a lent path, in seven steps.
//!
//! Each step is one call; what a step decides stands in its own file. Absence is a value on the way down and becomes an
//! error only here. Steps 4 to 7 are a flight: they go on for whoever else waits when a caller is dropped. Whenever they
//! end, nothing is half-made: staging is private until published, and the next fill goes on with it. Nobody waits for
//! the disk who did not ask to: see `durable.rs`.

use super::backfill::ToBackfill;
use super::flight::{Joined, Landed, Teller};
use super::plan::FillPlan;
use super::resolve::Wanted;
use super::{Artifact, BytesByTier, Cache, GetOptions, GetReport};
use crate::disk::{Lend, Lent, Purpose, RootedPath, StagedFile, Staging, format_named, staged_name};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::manifest::Manifest;
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::remote::{Early, Proven};
use crate::transfer::{Arrival, Arrivals, PourFile, Poured, Release, blocking};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an eviction, which is done in moments, is waited for.
const EVICTION_MAX: Duration = Duration::from_secs(30);
/// How long to sleep while an eviction is at work on what is wanted.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What a fill brought, still private.
struct Filled {
    staging: Staging,
    listing: Manifest,
    files: BTreeMap<FilePath, StagedFile>,
    /// Files that the remote lists but gave wrong or not at all.
    bad_on_remote: BTreeSet<FilePath>,
    /// Bytes that no local directory had.
    fetched_bytes: u64,
    /// What went to the remote meanwhile.
    early: Option<Early>,
}

impl Cache {
    /// Makes the artifact local and lends its path.
    ///
    /// # Errors
    /// `NotFound` when no tier has it; `Unauthorized`, `Unavailable`, `Corrupt` when the tiers that might have it
    /// failed; `Full`, `Directory` when the local directory cannot take it.
    ///
    /// What is replaced at its origin while it is fetched is discarded and fetched anew, once.
    pub async fn get(&self, reference: &Reference, options: &GetOptions, progress: &Progress) -> Result<Artifact> {
        let outcome = match self.get_once(reference, options, progress).await {
            Err(error) if error.is_superseded() => {
                tracing::warn!(%error, "starting over");
                // What anybody remembers of it is no longer so.
                let options = GetOptions { refresh: true, ..options.clone() };
                self.get_once(reference, &options, progress).await
            }
            outcome => outcome,
        };
        self.count_get(&outcome);
        outcome
    }

    async fn get_once(&self, reference: &Reference, options: &GetOptions, progress: &Progress) -> Result<Artifact> {
        if let Some(hit) = self.hit(reference, options, progress) {
            return hit;
        }
        let wanted = self.resolve(reference, options, progress).await.map_err(|error| error.artifact(reference))?;
        if options.verify {
            self.verify_hit(&wanted, progress).await.map_err(|error| error.artifact(&wanted.key))?;
        }
        self.get_resolved(&wanted, progress).await.map_err(|error| error.artifact(&wanted.key))
    }

    pub(super) async fn get_resolved(&self, wanted: &Wanted, progress: &Progress) -> Result<Artifact> {
        let landed = match self.lend(wanted, progress).await? {
            Some(lent) => Landed::here(lent),
            None => self.board(wanted, progress).await?,
        };
        self.require_checksums(wanted, &landed.lent.manifest)?;
        self.durably(wanted, &landed.lent).await?;
        artifact(wanted, landed, progress)
    }

    /// A flight, for everybody who waits for it; `tell` tells them what is coming, and as soon as there is something to
    /// lend.
    pub(super) async fn fill(&self, wanted: &Wanted, progress: &Progress, tell: &Teller) -> Result<Landed> {
        let lead = match self.lead(wanted, progress).await? {
            Joined::Lent(lent) => return Ok(Landed::here(*lent)),
            Joined::Leading(lead) => lead,
        };
        let (plan, mut filled) = self.plan_and_pour(wanted, progress, tell).await?;
        let to_backfill = self.missing_on_remote(&plan, &mut filled);
        let fetched_bytes = filled.fetched_bytes;
        // Before anything is published: whoever dies from here on has said what the remote still lacks.
        let to_backfill = self.intend(&wanted.key, to_backfill).await;
        let lent = self.publish(filled, progress).await?;
        self.was_published();
        let to_backfill = self.intend_again(&wanted.key, to_backfill).await;
        drop(lead);
        let landed = Landed { fetched_bytes, ..Landed::here(lent) };
        tell.published(&landed);
        let done = self.backfill(&landed.lent, to_backfill, progress).await;
        Ok(Landed { backfilled_bytes: done.uploaded_bytes, copied_bytes: done.copied_bytes, ..landed })
    }

    /// Steps 4 and 5; once more where another tool replaced files that had been listed.
    async fn plan_and_pour(&self, wanted: &Wanted, progress: &Progress, tell: &Teller) -> Result<(FillPlan, Filled)> {
        let plan = self.plan_fill(wanted, progress).await?;
        self.note_remote(!plan.remote_unusable);
        match self.pour(wanted, &plan, progress, tell).await {
            Err(error) if plan.remote_foreign && error.kind() == ErrorKind::Conflict => {
                tracing::warn!(%error, "starting over with a new list");
                let anew = Wanted { remote: None, ..wanted.clone() };
                let plan = self.plan_fill(&anew, progress).await?;
                tell.forget();
                let filled = self.pour(&anew, &plan, progress, tell).await?;
                Ok((plan, filled))
            }
            poured => Ok((plan, poured?)),
        }
    }

    async fn lend(&self, wanted: &Wanted, progress: &Progress) -> Result<Option<Lent>> {
        let _phase = progress.enter(Phase::Lend, 0);
        self.try_lend(wanted).await
    }

    /// Lends what is wanted if disk holds all of it, waiting out an eviction that is at work on it.
    pub(super) async fn try_lend(&self, wanted: &Wanted) -> Result<Option<Lent>> {
        let started = Instant::now();
        loop {
            let (disk, key, selection) = (self.0.disk.clone(), wanted.key.clone(), wanted.selection.clone());
            match blocking(move || disk.lend(&key, &selection)).await? {
                Lend::Lent(lent) => return Ok(Some(*lent)),
                Lend::Absent => return self.lend_lower(wanted).await,
                Lend::Busy if started.elapsed() > EVICTION_MAX => {
                    return Err(Error::unavailable("an eviction has been at work on it for too long")
                        .tier(Tier::Disk)
                        .hint("see whether a modelcache process is stopped; its hold falls when it ends"));
                }
                Lend::Busy => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Reserves room, evicting if need be, and pours what disk does not have.
    async fn pour(&self, wanted: &Wanted, plan: &FillPlan, progress: &Progress, tell: &Teller) -> Result<Filled> {
        let (disk, key, selected) = (self.0.disk.clone(), wanted.key.clone(), plan.selected.clone());
        let staging = blocking(move || disk.begin_fill(&key, &selected)).await?;
        let (arrivals, to_pour) = to_pour(&staging, plan)?;
        let _first_reader = tell.arrivals(arrivals);
        let (poured, early) = match self.pour_missing(to_pour, plan, self.purpose_of(wanted), progress).await {
            Ok(poured) => poured,
            Err(error) => {
                // Before any of it goes or is filled again: nobody shall be given what is not there.
                tell.forget();
                // What was fetched is kept for the next fill, unless it is what fills the disk.
                if error.kind() == ErrorKind::Full
                    && let Err(left) = blocking(move || staging.discard()).await
                {
                    tracing::warn!(error = %left, "what was fetched could not be removed; the next fill does");
                }
                return Err(error);
            }
        };
        let fetched_bytes = poured.iter().map(|file| file.fetched_bytes).sum();
        let by_target: BTreeMap<RootedPath, _> = poured.into_iter().map(|file| (file.target.clone(), file)).collect();
        let (mut files, mut bad_on_remote) = (BTreeMap::new(), BTreeSet::new());
        for (path, entry) in &plan.selected {
            let name = staged_name(path, entry);
            let staged = match (staging.reused(&name), by_target.get(&staging.file(&name))) {
                (Some(identity), _) => {
                    // Its bytes are proven. A ladder that somebody told of is not.
                    let ladder = plan.listing.files.get(path).and_then(|listed| listed.ladder.clone());
                    let mut entry = entry.clone();
                    entry.ladder = ladder;
                    StagedFile { name, entry, identity }
                }
                (None, Some(poured)) => {
                    if poured.bad_tiers.contains(&Tier::Remote) {
                        bad_on_remote.insert(path.clone());
                    }
                    StagedFile { name, entry: poured.entry.clone(), identity: poured.identity }
                }
                (None, None) => return Err(Error::not_found(format!("{path} was not filled"))),
            };
            files.insert(path.clone(), staged);
        }
        let files = tell_formats(&staging, files).await?;
        let filled = Filled { staging, listing: plan.listing.clone(), files, bad_on_remote, fetched_bytes, early };
        wanted.check_demanded_digest(&filled.known())?;
        Ok(filled)
    }

    async fn pour_missing(
        &self,
        mut to_pour: BTreeMap<String, PourFile>,
        plan: &FillPlan,
        purpose: Purpose,
        progress: &Progress,
    ) -> Result<(Vec<Poured>, Option<Early>)> {
        let early = self.send_early(plan, &mut to_pour);
        let _phase = progress.enter(Phase::Pour, to_pour.values().map(|file| file.entry.size).sum());
        Ok((self.0.pourer.pour(to_pour.into_values().collect(), purpose, progress).await?, early))
    }

    async fn publish(&self, filled: Filled, progress: &Progress) -> Result<Lent> {
        let _phase = progress.enter(Phase::Publish, 0);
        let disk = self.0.disk.clone();
        blocking(move || disk.publish(filled.staging, &filled.listing, &filled.files)).await
    }

    /// The files of this fill that the remote should now be given, and those among them that it must write anew.
    fn missing_on_remote(&self, plan: &FillPlan, filled: &mut Filled) -> Option<ToBackfill> {
        if !self.may_backfill() || plan.remote_foreign {
            tracing::debug!(key = %plan.listing.key, "nothing of this goes to a remote");
            return None;
        }
        if plan.remote_unusable && !plan.remote_down {
            return None;
        }
        let held = |path: &FilePath| {
            plan.remote.as_ref().and_then(|m| m.files.get(path)).is_some_and(|entry| entry.held.is_some())
        };
        let missing = |path: &&FilePath| !held(path) || filled.bad_on_remote.contains(*path);
        let paths: BTreeSet<FilePath> = filled.files.keys().filter(missing).cloned().collect();
        let rewrite = filled.bad_on_remote.clone();
        let sent = filled.early.take().map(|early| (early, filled.proven()));
        (!paths.is_empty()).then(|| ToBackfill::new(paths, rewrite, plan.remote_down, sent))
    }
}

/// What is to be poured, by its name in staging, and for every file what its readers are told of. Equal files come
/// once.
fn to_pour(staging: &Staging, plan: &FillPlan) -> Result<(Arrivals, BTreeMap<String, PourFile>)> {
    let (mut arrivals, mut by_name, mut to_pour) = (Arrivals::new(), BTreeMap::new(), BTreeMap::new());
    let mut releases: BTreeMap<String, Release> = BTreeMap::new();
    for (path, entry) in &plan.selected {
        // Of equal files, what is asked of one is asked of all.
        let (name, release) = (staged_name(path, entry), plan.release(path));
        let of_all = releases.entry(name).or_insert(release);
        *of_all = release.max(*of_all);
    }
    for (path, entry) in &plan.selected {
        let name = staged_name(path, entry);
        let target = staging.file(&name);
        let release = releases.get(&name).copied().unwrap_or(Release::Published);
        let arrival: &mut Arc<Arrival> =
            by_name.entry(name.clone()).or_insert_with(|| Arrival::new(target.clone(), entry.size, release));
        arrivals.insert(path.clone(), arrival.clone());
        if staging.reused(&name).is_some() {
            arrival.proven();
        } else if let Entry::Vacant(vacant) = to_pour.entry(name) {
            let (owner, arrival, sources) = (staging.owner(), arrival.clone(), plan.sources_of(path)?);
            let (path, entry) = (path.clone(), entry.clone());
            vacant.insert(PourFile { path, entry, target, owner, sources, on_part: None, arrival });
        }
    }
    Ok((arrivals, to_pour))
}

/// Looks at the first bytes of files whose format nobody knows yet.
async fn tell_formats(
    staging: &Staging,
    mut files: BTreeMap<FilePath, StagedFile>,
) -> Result<BTreeMap<FilePath, StagedFile>> {
    let folder = staging.file("");
    blocking(move || {
        for file in files.values_mut().filter(|file| file.entry.format.is_none()) {
            file.entry.format = format_named(folder.join(&file.name).open(false));
        }
        Ok(files)
    })
    .await
}

impl Filled {
    /// What each file turned out to be.
    fn proven(&self) -> Proven {
        let proven = |(path, file): (&FilePath, &StagedFile)| Some((path.clone(), (file.identity, file.entry.sha256?)));
        self.files.iter().filter_map(proven).collect()
    }

    /// The listing with what this fill learnt.
    fn known(&self) -> Manifest {
        let mut known = self.listing.clone();
        for (path, file) in &self.files {
            if let Some(entry) = known.files.get_mut(path) {
                entry.learn(&file.entry);
            }
        }
        known
    }
}

impl Landed {
    /// Disk had it all.
    pub(super) fn here(lent: Lent) -> Self {
        Self { lent: Arc::new(lent), fetched_bytes: 0, backfilled_bytes: 0, copied_bytes: 0 }
    }
}

pub(super) fn artifact(wanted: &Wanted, landed: Landed, progress: &Progress) -> Result<Artifact> {
    let Landed { lent, fetched_bytes, backfilled_bytes, copied_bytes } = landed;
    wanted.check_demanded_digest(&lent.manifest)?;
    let received = progress.snapshot();
    let (files, selected_bytes) = lent
        .manifest
        .selected(&wanted.selection)
        .fold((0, 0), |(files, bytes), (_, entry)| (files + 1, bytes + entry.size));
    let from = match (received.origin_bytes, received.remote_bytes) {
        (1.., _) => Tier::Origin,
        (0, 1..) => Tier::Remote,
        (0, 0) => Tier::Disk,
    };
    let bytes = BytesByTier {
        disk: selected_bytes.saturating_sub(fetched_bytes),
        remote: received.remote_bytes,
        origin: received.origin_bytes,
    };
    let (link, phases) = (lent.link, progress.phases());
    let report = GetReport { from, bytes, backfilled_bytes, copied_bytes, files, selected_bytes, link, phases };
    let (path, selection) = (lent.path(&wanted.selection), wanted.selection.clone());
    Ok(Artifact { key: wanted.key.clone(), path, report, selection, _lent: lent })
}
