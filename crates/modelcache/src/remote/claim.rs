//! Claims: who may write a version folder, and what a writer that died has left there.
//!
//! A claim is a create-only object with an end. It is renewed while its writer works, and names every object that the
//! writer may leave behind, unfinished uploads among it: whoever takes over an ended claim inherits that list and sweeps
//! it. A claim whose writer is seen to have died, on the same machine, has ended.
//!
//! Surprise: a claim that fails with objects written is not removed but ended at once, so that the list survives. Time
//! is compared by the clocks of the writers; a clock that is a minute fast takes over too early, which costs an upload
//! or a conflict, and no reader a wrong byte.

use super::process::Process;
use super::store::{Condition, Store, Written};
use super::{Conditions, Folder, Remote, orphaned_uploads};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::key::FilePath;
use crate::limits;
use crate::transfer::spawn_cleanup;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// How long a claim holds without renewal.
const LIFE: Duration = Duration::from_secs(60);
/// How often it is renewed.
const RENEWAL: Duration = Duration::from_secs(20);
/// How long a living claim of another writer is waited for: longer than one that is not renewed lives, so that a writer
/// who died does not make the next one fail.
const PATIENCE: Duration = Duration::from_secs(75);
/// First and longest pause between two looks.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Files by path, with their digests where known.
pub(super) type Listed = BTreeMap<FilePath, Option<Digest>>;

/// Multipart uploads by their ids, and the files that they are to become.
pub(super) type Uploads = BTreeMap<String, FilePath>;

/// What the object says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClaimRecord {
    /// Host, process and a random number.
    pub(super) owner: String,
    /// Seconds since the Unix epoch, by the owner's clock.
    pub(super) expires_at: u64,
    /// Every object that the owner may leave.
    #[serde(default)]
    pub(super) files: Listed,
    /// Every multipart upload that the owner began, completed or not.
    #[serde(default, skip_serializing_if = "Uploads::is_empty")]
    uploads: Uploads,
    /// The owner again, for those on its machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    process: Option<Process>,
}

impl ClaimRecord {
    fn new(files: Listed) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "unknown" } else { host.trim() };
        let owner = format!("{host}/{}/{:016x}", std::process::id(), rand::random::<u64>());
        Self { owner, expires_at: 0, files, uploads: Uploads::new(), process: Process::this() }
    }

    /// Lives for [`LIFE`] from now.
    fn living(&self) -> Self {
        Self { expires_at: now_s() + LIFE.as_secs(), ..self.clone() }
    }

    /// Has ended.
    fn ended(&self) -> Self {
        Self { expires_at: 0, ..self.clone() }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.expires_at <= now_s() || self.process.as_ref().is_some_and(Process::has_ended)
    }

    fn to_bytes(&self) -> Result<Bytes> {
        let text = serde_json::to_vec(self);
        text.map(Bytes::from).map_err(|cause| Error::new(ErrorKind::Other, "cannot write a claim").cause(cause))
    }

    /// A claim that cannot be read is one that has ended and lists nothing: it cannot say until when it holds.
    fn from_bytes(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "a claim on the remote cannot be read; taken as ended");
            Self {
                owner: "unknown".into(),
                expires_at: 0,
                files: Listed::new(),
                uploads: Uploads::new(),
                process: None,
            }
        })
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The claim there, if any, and its ETag.
pub(super) async fn look(store: &Store, folder: &Folder) -> Result<Option<(ClaimRecord, Option<String>)>> {
    read(store, &folder.own(store, "claim")?).await
}

/// The same for a claim at `key`.
pub(super) async fn read(
    store: &Store,
    key: &object_store::path::Path,
) -> Result<Option<(ClaimRecord, Option<String>)>> {
    let read = store.get(key, limits::ANSWER_BYTES_MAX).await?;
    Ok(read.map(|(bytes, identity)| (ClaimRecord::from_bytes(&bytes), identity.etag)))
}

/// The right to write a version folder, renewed until it is closed or dropped.
pub(super) struct Claim {
    held: Arc<HeldClaim>,
    /// What an earlier writer may have left.
    pub(super) inherited: Listed,
    /// Uploads that it may have left unfinished; `None` where nobody left anything.
    pub(super) abandoned: Option<Uploads>,
    renewal: tokio::task::JoinHandle<()>,
    /// Whether there may be objects that no manifest names yet.
    touched: AtomicBool,
    closed: bool,
}

struct HeldClaim {
    store: Arc<Store>,
    folder: Folder,
    record: Mutex<ClaimRecord>,
    conditions: Conditions,
    etag: tokio::sync::Mutex<Option<String>>,
    lost: AtomicBool,
}

impl HeldClaim {
    fn new(remote: &Remote, store: &Arc<Store>, folder: &Folder, record: ClaimRecord, etag: Option<String>) -> Self {
        Self {
            store: store.clone(),
            folder: folder.clone(),
            record: Mutex::new(record),
            conditions: remote.conditions(),
            etag: tokio::sync::Mutex::new(etag),
            lost: AtomicBool::new(false),
        }
    }

    fn record(&self) -> ClaimRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_owner(&self, there: &ClaimRecord) -> bool {
        there.owner == self.record.lock().unwrap_or_else(PoisonError::into_inner).owner
    }
}

/// Where a claim's holder notes what it begins.
#[derive(Clone)]
pub(super) struct ClaimNotes(Arc<HeldClaim>);

impl ClaimNotes {
    /// Notes uploads on the remote, so that the next writer finds them. Where that fails they are found by their age.
    pub(super) async fn uploads(&self, begun: impl IntoIterator<Item = (String, FilePath)>) {
        self.0.record.lock().unwrap_or_else(PoisonError::into_inner).uploads.extend(begun);
        match rewrite(&self.0, ClaimRecord::living).await {
            Ok(true) => {}
            Ok(false) => self.0.lost.store(true, Ordering::Relaxed),
            Err(error) => {
                tracing::debug!(artifact = %self.0.folder.key, %error, "what was begun is not noted on the remote")
            }
        }
    }
}

impl Claim {
    /// Takes the claim, waiting for a living one of another writer, taking over one that has ended.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] naming the holder, when it does not end in time.
    pub(super) async fn take(remote: &Remote, folder: &Folder, files: Listed) -> Result<Self> {
        Self::take_within(remote, folder, files, PATIENCE).await
    }

    /// The same, waiting for a living claim no longer than `patience`.
    pub(super) async fn take_within(
        remote: &Remote,
        folder: &Folder,
        files: Listed,
        patience: Duration,
    ) -> Result<Self> {
        // In a task of its own: a caller that is cancelled while the claim is on its way must not leave it behind. The
        // task ends, and dropping its result gives the claim back.
        let (remote, folder) = (remote.clone(), folder.clone());
        let taken = tokio::spawn(async move {
            let store = remote.store().await?.clone();
            let mut record = ClaimRecord::new(files);
            let taken = Self::take_now(&remote, &store, &folder, &mut record, patience).await;
            if taken.is_err() {
                abandon(&remote, &store, &folder, record).await;
            }
            taken
        });
        taken.await.map_err(cut_short)?
    }

    async fn take_now(
        remote: &Remote,
        store: &Arc<Store>,
        folder: &Folder,
        record: &mut ClaimRecord,
        patience: Duration,
    ) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let mut pause = PAUSES.0;
        loop {
            let there = match create(remote, store, folder, record).await? {
                Created::Ours(etag) => {
                    return Ok(Self::holding(remote, store, folder, record.clone(), etag, None));
                }
                Created::Taken(there) => there,
            };
            if let Some((theirs, etag)) = there {
                if theirs.has_ended() {
                    record.files.extend(theirs.files.clone());
                    record.uploads.extend(theirs.uploads.clone());
                    if let Some(etag) = take_over(remote, store, folder, record, etag).await? {
                        return Ok(Self::holding(remote, store, folder, record.clone(), etag, Some(theirs)));
                    }
                } else if Instant::now() >= deadline {
                    return Err(held_by(&theirs));
                } else if pause == PAUSES.0 {
                    tracing::info!(artifact = %folder.key, holder = theirs.owner, "waiting for another writer on the remote");
                }
            } else if Instant::now() >= deadline {
                return Err(Error::unavailable("the claim on the remote comes and goes").transient(false));
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    fn holding(
        remote: &Remote,
        store: &Arc<Store>,
        folder: &Folder,
        record: ClaimRecord,
        etag: Option<String>,
        before: Option<ClaimRecord>,
    ) -> Self {
        let (inherited, abandoned) = match before {
            Some(ClaimRecord { files, uploads, .. }) => (files, Some(uploads)),
            None => (Listed::new(), None),
        };
        let held = Arc::new(HeldClaim::new(remote, store, folder, record, etag));
        let renewal = tokio::spawn(renew(held.clone()));
        let touched = !inherited.is_empty();
        Self { held, inherited, abandoned, renewal, touched: touched.into(), closed: false }
    }

    /// Where to note what is begun under it.
    pub(super) fn notes(&self) -> ClaimNotes {
        ClaimNotes(self.held.clone())
    }

    /// From now on there may be objects that only the claim names.
    pub(super) fn touch(&self) {
        self.touched.store(true, Ordering::Relaxed);
    }

    /// Everything is named by a manifest, or gone.
    pub(super) fn settle(&self) {
        self.touched.store(false, Ordering::Relaxed);
    }

    /// Fails where somebody else has taken the claim over.
    pub(super) fn check(&self) -> Result<()> {
        if self.held.lost.load(Ordering::Relaxed) {
            let message = "another writer took the claim over, because it was not renewed in time";
            return Err(Error::unavailable(message).transient(false).hint("try again"));
        }
        Ok(())
    }

    /// Gives the claim back: removed, or ended where leftovers have to be remembered.
    pub(super) async fn close(mut self) -> Result<()> {
        let (held, touched) = self.let_go();
        tokio::spawn(async move { give_back(&held, touched).await }).await.map_err(cut_short)?
    }

    /// Gives the claim back after a failure: what was begun under it is aborted first.
    pub(super) async fn abandon(mut self) -> Result<()> {
        let (held, touched) = self.let_go();
        tokio::spawn(async move { give_back_unfinished(&held, touched).await }).await.map_err(cut_short)?
    }

    fn let_go(&mut self) -> (Arc<HeldClaim>, bool) {
        self.closed = true;
        self.renewal.abort();
        (self.held.clone(), self.touched.load(Ordering::Relaxed))
    }
}

/// Gives the claim back when its holder is cancelled.
impl Drop for Claim {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        let (held, touched) = self.let_go();
        spawn_cleanup(async move {
            if let Err(error) = give_back_unfinished(&held, touched).await {
                tracing::debug!(%error, "a claim is left to end by itself");
            }
        });
    }
}

fn cut_short(cause: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Other, "the work on a claim was cut short").cause(cause)
}

fn held_by(theirs: &ClaimRecord) -> Error {
    let left = theirs.expires_at.saturating_sub(now_s());
    Error::unavailable(format!("another writer is at work there: {}", theirs.owner))
        .transient(false)
        .hint(format!("wait for it; if it is gone, its claim ends in {left} s"))
}

enum Created {
    /// The claim is ours, with this ETag.
    Ours(Option<String>),
    /// There is one already, or was.
    Taken(Option<(ClaimRecord, Option<String>)>),
}

/// Writes the claim unless there is one, and learns on the way whether the store keeps the condition.
async fn create(remote: &Remote, store: &Store, folder: &Folder, record: &ClaimRecord) -> Result<Created> {
    // A store that ignores the condition would overwrite a living claim.
    if remote.conditions() != Conditions::Kept
        && let Some(there) = look(store, folder).await?
    {
        return Ok(Created::Taken(Some(there)));
    }
    let key = folder.own(store, "claim")?;
    let bytes = record.living().to_bytes()?;
    if remote.conditions() == Conditions::Ignored {
        return create_unconditionally(store, folder, record, bytes).await;
    }
    match store.put(&key, bytes.clone(), Condition::Absent).await? {
        Written::Done(identity) if remote.conditions() == Conditions::Kept => Ok(Created::Ours(identity.etag)),
        Written::Done(identity) => match store.put(&key, bytes, Condition::Absent).await? {
            Written::Refused => {
                remote.learn_conditions(Conditions::Kept);
                Ok(Created::Ours(identity.etag))
            }
            Written::Done(_) | Written::Unsupported => {
                remote.learn_conditions(Conditions::Ignored);
                confirm(store, folder, record).await
            }
        },
        // Our own first try may have arrived although its answer did not.
        Written::Refused => confirm(store, folder, record).await,
        Written::Unsupported => {
            remote.learn_conditions(Conditions::Ignored);
            create_unconditionally(store, folder, record, bytes).await
        }
    }
}

/// As near as one gets without conditions: write, let a rival's write arrive, look whose it is.
async fn create_unconditionally(store: &Store, folder: &Folder, record: &ClaimRecord, bytes: Bytes) -> Result<Created> {
    store.put(&folder.own(store, "claim")?, bytes, Condition::Always).await?;
    tokio::time::sleep(PAUSES.0).await;
    confirm(store, folder, record).await
}

/// Looks whose the claim is.
async fn confirm(store: &Store, folder: &Folder, record: &ClaimRecord) -> Result<Created> {
    Ok(match look(store, folder).await? {
        Some((there, etag)) if there.owner == record.owner => Created::Ours(etag),
        there => Created::Taken(there),
    })
}

/// Overwrites a claim that has ended. `None`: somebody else was faster.
async fn take_over(
    remote: &Remote,
    store: &Store,
    folder: &Folder,
    record: &ClaimRecord,
    etag: Option<String>,
) -> Result<Option<Option<String>>> {
    let key = folder.own(store, "claim")?;
    let bytes = record.living().to_bytes()?;
    let condition = match etag.as_deref() {
        Some(etag) if remote.conditions() != Conditions::Ignored => Condition::Matches(etag),
        _ => Condition::Always,
    };
    if let Written::Unsupported = store.put(&key, bytes.clone(), condition).await? {
        store.put(&key, bytes, Condition::Always).await?;
        tokio::time::sleep(PAUSES.0).await;
    }
    match confirm(store, folder, record).await? {
        Created::Ours(etag) => Ok(Some(etag)),
        Created::Taken(_) => Ok(None),
    }
}

/// Renews until aborted or lost.
async fn renew(held: Arc<HeldClaim>) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        match rewrite(&held, ClaimRecord::living).await {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(artifact = %held.folder.key, "the claim on the remote was taken over by another writer");
                held.lost.store(true, Ordering::Relaxed);
                return;
            }
            Err(error) => tracing::warn!(artifact = %held.folder.key, %error, "cannot renew the claim on the remote"),
        }
    }
}

/// Replaces our claim, as `state` makes it. Whether it was still ours.
async fn rewrite(held: &HeldClaim, state: fn(&ClaimRecord) -> ClaimRecord) -> Result<bool> {
    let key = held.folder.own(&held.store, "claim")?;
    let mut etag = held.etag.lock().await;
    let record = state(&held.record());
    if let (Some(known), Conditions::Kept) = (etag.as_deref(), held.conditions) {
        match held.store.put(&key, record.to_bytes()?, Condition::Matches(known)).await? {
            Written::Done(identity) => {
                *etag = identity.etag;
                return Ok(true);
            }
            Written::Refused | Written::Unsupported => {}
        }
    }
    // Without the condition, or where our own retried write may be what refused it: look first.
    match look(&held.store, &held.folder).await? {
        Some((there, _)) if held.is_owner(&there) => {}
        _ => return Ok(false),
    }
    if let Written::Done(identity) = held.store.put(&key, record.to_bytes()?, Condition::Always).await? {
        *etag = identity.etag;
    }
    Ok(true)
}

/// A failed attempt may have left our claim: what it inherited must not be lost with it, so it is ended.
async fn abandon(remote: &Remote, store: &Arc<Store>, folder: &Folder, record: ClaimRecord) {
    let held = HeldClaim::new(remote, store, folder, record, None);
    if let Err(error) = try_to_give_back(&held, true).await {
        tracing::debug!(%error, "a claim, if it arrived, is left to end by itself");
    }
}

/// Aborts the uploads that were begun under the claim, then gives it back; ended, where not all of them are gone.
async fn give_back_unfinished(held: &HeldClaim, touched: bool) -> Result<()> {
    let touched = touched || !orphaned_uploads::abort_noted(&held.store, &held.folder, &held.record().uploads).await;
    give_back(held, touched).await
}

/// Tries twice, since what failed may have been a single answer.
async fn give_back(held: &HeldClaim, touched: bool) -> Result<()> {
    match try_to_give_back(held, touched).await {
        Ok(()) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "giving a claim back once more");
            tokio::time::sleep(PAUSES.0).await;
            try_to_give_back(held, touched).await
        }
    }
}

async fn try_to_give_back(held: &HeldClaim, touched: bool) -> Result<()> {
    if held.lost.load(Ordering::Relaxed) {
        return Ok(());
    }
    if touched {
        return rewrite(held, ClaimRecord::ended).await.map(|_| ());
    }
    match look(&held.store, &held.folder).await? {
        Some((there, _)) if held.is_owner(&there) => held.store.delete(&held.folder.own(&held.store, "claim")?).await,
        _ => Ok(()),
    }
}

/// Whatever lies where a claim should; see `fuzzing`.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    let _ = ClaimRecord::from_bytes(bytes).has_ended();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_says_who_until_when_and_what() {
        let files = Listed::from([(FilePath::new("a/b").expect("path"), Some(Digest::of(b"x")))]);
        let record = ClaimRecord::new(files);
        assert!(record.has_ended() && !record.living().has_ended() && record.living().ended().has_ended());
        let bytes = record.living().to_bytes().expect("writes");
        let read = ClaimRecord::from_bytes(&bytes);
        assert_eq!((read.owner, read.files), (record.owner.clone(), record.files.clone()));
        assert_ne!(ClaimRecord::new(Listed::new()).owner, record.owner);
        let json: serde_json::Value = serde_json::from_slice(&bytes).expect("json");
        assert_eq!(json["files"]["a/b"], Digest::of(b"x").to_string());
        assert!(json["expires_at"].is_u64() && json["owner"].is_string());
    }

    #[test]
    fn an_unreadable_claim_has_ended_and_names_nothing() {
        for text in ["", "{}", "[1]", "{\"owner\":1}", "{\"owner\":\"a\",\"expires_at\":9,\"files\":{\"../x\":null}}"] {
            let record = ClaimRecord::from_bytes(text.as_bytes());
            assert!(record.has_ended() && record.files.is_empty(), "{text}");
        }
    }
}
