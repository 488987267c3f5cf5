//! Claims: the lock object that gives one writer the right to write a version folder.
//!
//! A claim is created with `If-None-Match: *`, contains an expiry time and is renewed while its writer works. It lists
//! every object and multipart upload that the writer may leave behind. A writer that takes over an expired claim
//! adds this list to its own and removes the leftovers.
//!
//! Each writer compares the expiry time with its own clock. A writer whose clock is a minute fast takes a claim over
//! too early. That costs an upload or a conflict; readers never accept wrong bytes, because they check digests.

use super::process::Process;
use super::store::{Condition, PutOutcome, Store};
use super::{CLAIM, ConditionalWrites, Folder, Remote, orphaned_uploads};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::key::FilePath;
use crate::limits;
use crate::mutex::Mutex;
use crate::transfer::spawn_cleanup;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// Time until a claim expires without renewal.
const LIFETIME: Duration = Duration::from_secs(60);
/// Interval between renewals.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(20);
/// Longest wait for another writer's claim. Longer than [`LIFETIME`], so that the claim of a writer that died expires
/// before the next writer gives up.
const WAIT_MAX: Duration = Duration::from_secs(75);
/// First pause between two reads of a claim.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause between two reads of a claim.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Files by path, with their digests if known.
pub(super) type ListedFiles = BTreeMap<FilePath, Option<Digest>>;

/// Multipart uploads by id, with the file that each becomes.
pub(super) type Uploads = BTreeMap<String, FilePath>;

/// Content of the claim object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClaimRecord {
    /// Host name, process id and a random number.
    pub(super) owner: String,
    /// Seconds since the Unix epoch, by the owner's clock.
    pub(super) expires_at: u64,
    /// Every object that the owner may leave behind.
    #[serde(default)]
    pub(super) files: ListedFiles,
    /// Every multipart upload that the owner created, completed or not.
    #[serde(default, skip_serializing_if = "Uploads::is_empty")]
    uploads: Uploads,
    /// The owner's process, so that writers on the same machine can detect that it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    process: Option<Process>,
}

impl ClaimRecord {
    fn new(files: ListedFiles) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "unknown" } else { host.trim() };
        let owner = format!("{host}/{}/{:016x}", std::process::id(), rand::random::<u64>());
        Self { owner, expires_at: 0, files, uploads: Uploads::new(), process: Process::current() }
    }

    /// Returns this record, valid for [`LIFETIME`] from now.
    fn renewed(&self) -> Self {
        Self { expires_at: now_s() + LIFETIME.as_secs(), ..self.clone() }
    }

    /// Returns this record, expired.
    fn expired(&self) -> Self {
        Self { expires_at: 0, ..self.clone() }
    }

    /// Returns true if the claim was not renewed in time, or its writer ran on this machine and ended.
    pub(super) fn has_expired(&self) -> bool {
        self.expires_at <= now_s() || self.process.as_ref().is_some_and(Process::has_ended)
    }

    fn to_bytes(&self) -> Result<Bytes> {
        let text = serde_json::to_vec(self);
        text.map(Bytes::from).map_err(|cause| Error::new(ErrorKind::Other, "cannot serialize a claim").cause(cause))
    }

    /// Parses a claim. An invalid claim counts as expired and lists nothing. Its expiry time is unknown, so a writer
    /// that waited for it could wait forever.
    fn from_bytes(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "a claim on the remote cannot be read; treating it as expired");
            Self {
                owner: "unknown".into(),
                expires_at: 0,
                files: ListedFiles::new(),
                uploads: Uploads::new(),
                process: None,
            }
        })
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Reads the claim of a version folder. Returns the claim with its ETag, or `None` if no claim exists.
pub(super) async fn read(store: &Store, folder: &Folder) -> Result<Option<(ClaimRecord, Option<String>)>> {
    read_at(store, &folder.record_key(store, CLAIM)?).await
}

/// Reads the claim stored at `key`, as [`read`] does.
pub(super) async fn read_at(
    store: &Store,
    key: &object_store::path::Path,
) -> Result<Option<(ClaimRecord, Option<String>)>> {
    let read = store.get(key, limits::RESPONSE_BYTES_MAX).await?;
    Ok(read.map(|(bytes, identity)| (ClaimRecord::from_bytes(&bytes), identity.etag)))
}

/// The right to write a version folder, renewed until it is released or dropped.
pub(super) struct Claim {
    held: Arc<HeldClaim>,
    /// Files that the writer of an expired claim listed, and may have left, if its claim was taken over.
    pub(super) taken_over_files: ListedFiles,
    /// Multipart uploads that the writer of a taken-over claim may have left; `None` if no claim was taken over.
    pub(super) abandoned_uploads: Option<Uploads>,
    renewal: tokio::task::JoinHandle<()>,
    /// True if objects may exist that no manifest lists.
    has_leftovers: AtomicBool,
    released: bool,
}

/// The state that a [`Claim`] shares with its renewal task.
struct HeldClaim {
    store: Arc<Store>,
    folder: Folder,
    record: Mutex<ClaimRecord>,
    conditional_writes: ConditionalWrites,
    /// The ETag of our last write. The lock also serializes writes of the claim object.
    etag: tokio::sync::Mutex<Option<String>>,
    /// True once another writer took the claim over.
    lost: AtomicBool,
}

impl HeldClaim {
    fn new(remote: &Remote, store: &Arc<Store>, folder: &Folder, record: ClaimRecord, etag: Option<String>) -> Self {
        Self {
            store: store.clone(),
            folder: folder.clone(),
            record: Mutex::new(record),
            conditional_writes: remote.conditional_writes(),
            etag: tokio::sync::Mutex::new(etag),
            lost: AtomicBool::new(false),
        }
    }

    fn record(&self) -> ClaimRecord {
        self.record.lock().clone()
    }

    fn is_owner(&self, present: &ClaimRecord) -> bool {
        present.owner == self.record.lock().owner
    }
}

/// Records multipart uploads in a held claim.
#[derive(Clone)]
pub(super) struct UploadRegistry(Arc<HeldClaim>);

impl UploadRegistry {
    /// Adds uploads to the claim object, so that the next writer can abort them. If the write fails, a later sweep
    /// finds the uploads by their age.
    pub(super) async fn register(&self, uploads: impl IntoIterator<Item = (String, FilePath)>) {
        self.0.record.lock().uploads.extend(uploads);
        match rewrite(&self.0, ClaimRecord::renewed).await {
            Ok(true) => {}
            Ok(false) => self.0.lost.store(true, Ordering::Relaxed),
            Err(error) => {
                tracing::debug!(artifact = %self.0.folder.key, %error, "cannot record multipart uploads in the claim")
            }
        }
    }
}

impl Claim {
    /// Acquires the claim. Waits for a valid claim of another writer, and takes over an expired one.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] with the name of the holder if its claim is neither released nor expired in time.
    pub(super) async fn acquire(remote: &Remote, folder: &Folder, files: ListedFiles) -> Result<Self> {
        Self::acquire_within(remote, folder, files, WAIT_MAX).await
    }

    /// Acquires the claim as [`acquire`](Self::acquire) does, but waits at most `wait_max` for another writer's claim.
    pub(super) async fn acquire_within(
        remote: &Remote,
        folder: &Folder,
        files: ListedFiles,
        wait_max: Duration,
    ) -> Result<Self> {
        // Runs in its own task, because a caller that is cancelled during the request must not leave a claim behind.
        // The task runs to its end, and dropping its result releases the claim.
        let (remote, folder) = (remote.clone(), folder.clone());
        let acquired = tokio::spawn(async move {
            let store = remote.store().await?.clone();
            let mut record = ClaimRecord::new(files);
            let acquired = Self::acquire_now(&remote, &store, &folder, &mut record, wait_max).await;
            // The write of a failed attempt may have succeeded although its response was lost.
            if acquired.is_err() {
                abandon(&remote, &store, &folder, record).await;
            }
            acquired
        });
        acquired.await.map_err(cut_short)?
    }

    async fn acquire_now(
        remote: &Remote,
        store: &Arc<Store>,
        folder: &Folder,
        record: &mut ClaimRecord,
        wait_max: Duration,
    ) -> Result<Self> {
        let deadline = Instant::now() + wait_max;
        let mut pause = PAUSE_MIN;
        loop {
            // Step 1: create the claim if none exists.
            let present = match create(remote, store, folder, record).await? {
                CreateOutcome::Ours(etag) => {
                    return Ok(Self::start(remote, store, folder, record.clone(), etag, None));
                }
                CreateOutcome::Taken(present) => present,
            };
            if let Some((theirs, etag)) = present {
                if theirs.has_expired() {
                    // Step 2: take over an expired claim. Our claim has to list its leftovers from the first write on,
                    // because this process may die before it removes them.
                    record.files.extend(theirs.files.clone());
                    record.uploads.extend(theirs.uploads.clone());
                    if let Some(etag) = take_over(remote, store, folder, record, etag).await? {
                        return Ok(Self::start(remote, store, folder, record.clone(), etag, Some(theirs)));
                    }
                } else if Instant::now() >= deadline {
                    return Err(held_by(&theirs));
                } else if pause == PAUSE_MIN {
                    // Logged once per wait, before the pause grows.
                    tracing::info!(artifact = %folder.key, holder = theirs.owner, "waiting for another writer on the remote");
                }
            } else if Instant::now() >= deadline {
                // In every attempt, a claim existed at the create request and was gone at the read request.
                let message = "other writers keep creating and removing the claim on the remote";
                return Err(Error::unavailable(message).transient(false));
            }
            // Step 3: wait with exponential backoff and jitter, so that waiting writers do not retry in lockstep.
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Starts the renewal of a claim that was written. `replaced` is the record of the expired claim that it replaced.
    fn start(
        remote: &Remote,
        store: &Arc<Store>,
        folder: &Folder,
        record: ClaimRecord,
        etag: Option<String>,
        replaced: Option<ClaimRecord>,
    ) -> Self {
        let (taken_over_files, abandoned_uploads) = match replaced {
            Some(ClaimRecord { files, uploads, .. }) => (files, Some(uploads)),
            None => (ListedFiles::new(), None),
        };
        let held = Arc::new(HeldClaim::new(remote, store, folder, record, etag));
        let renewal = tokio::spawn(renew(held.clone()));
        // These objects may still exist, even if this writer writes nothing.
        let has_leftovers = !taken_over_files.is_empty();
        Self {
            held,
            taken_over_files,
            abandoned_uploads,
            renewal,
            has_leftovers: has_leftovers.into(),
            released: false,
        }
    }

    /// Returns a handle that records multipart uploads in this claim.
    pub(super) fn upload_registry(&self) -> UploadRegistry {
        UploadRegistry(self.held.clone())
    }

    /// Makes [`release`](Self::release) keep the claim object, marked as expired, because objects may exist that only it
    /// lists.
    pub(super) fn keep_record_on_release(&self) {
        self.has_leftovers.store(true, Ordering::Relaxed);
    }

    /// Makes [`release`](Self::release) remove the claim object, because every object that it lists is in a manifest or
    /// removed.
    pub(super) fn remove_record_on_release(&self) {
        self.has_leftovers.store(false, Ordering::Relaxed);
    }

    /// Fails if another writer has taken the claim over.
    pub(super) fn ensure_held(&self) -> Result<()> {
        if self.held.lost.load(Ordering::Relaxed) {
            let message = "another writer took the claim over, because it was not renewed in time";
            return Err(Error::unavailable(message).transient(false).hint("try again"));
        }
        Ok(())
    }

    /// Releases the claim. Removes the object, or only marks it as expired if its list of leftovers is still needed.
    pub(super) async fn release(mut self) -> Result<()> {
        let (held, has_leftovers) = self.stop_renewal();
        // Runs in its own task, so that it completes even if the caller is cancelled.
        tokio::spawn(async move { release(&held, has_leftovers).await }).await.map_err(cut_short)?
    }

    /// Aborts the multipart uploads recorded in the claim, then releases it. Used after a failure.
    pub(super) async fn abandon(mut self) -> Result<()> {
        let (held, has_leftovers) = self.stop_renewal();
        tokio::spawn(async move { abort_and_release(&held, has_leftovers).await }).await.map_err(cut_short)?
    }

    fn stop_renewal(&mut self) -> (Arc<HeldClaim>, bool) {
        self.released = true;
        self.renewal.abort();
        (self.held.clone(), self.has_leftovers.load(Ordering::Relaxed))
    }
}

/// Releases the claim in the background if its holder is cancelled.
impl Drop for Claim {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let (held, has_leftovers) = self.stop_renewal();
        spawn_cleanup(async move {
            if let Err(error) = abort_and_release(&held, has_leftovers).await {
                tracing::debug!(%error, "cannot release a claim; it expires by itself");
            }
        });
    }
}

fn cut_short(cause: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Other, "the task that changes a claim failed").cause(cause)
}

fn held_by(theirs: &ClaimRecord) -> Error {
    let left = theirs.expires_at.saturating_sub(now_s());
    Error::unavailable(format!("another writer holds the claim on the remote: {}", theirs.owner))
        .transient(false)
        .hint(format!("wait until it has finished; if that process died, its claim expires in {left} s"))
}

/// Result of an attempt to create a claim.
enum CreateOutcome {
    /// The claim is ours, with this ETag.
    Ours(Option<String>),
    /// Another writer holds the claim; `None` if the claim was removed before it could be read.
    Taken(Option<(ClaimRecord, Option<String>)>),
}

/// Writes the claim if none exists. The first call tests whether the store supports conditional writes.
async fn create(remote: &Remote, store: &Store, folder: &Folder, record: &ClaimRecord) -> Result<CreateOutcome> {
    // Read first unless the store is known to support the condition. A store that ignores it would overwrite a valid
    // claim.
    if remote.conditional_writes() != ConditionalWrites::Supported
        && let Some(present) = read(store, folder).await?
    {
        return Ok(CreateOutcome::Taken(Some(present)));
    }
    let key = folder.record_key(store, CLAIM)?;
    let bytes = record.renewed().to_bytes()?;
    if remote.conditional_writes() == ConditionalWrites::Unsupported {
        return create_unconditionally(store, folder, record, bytes).await;
    }
    match store.put(&key, bytes.clone(), Condition::Absent).await? {
        PutOutcome::Done(identity) if remote.conditional_writes() == ConditionalWrites::Supported => {
            Ok(CreateOutcome::Ours(identity.etag))
        }
        // Probe: repeat the create-only write. A store that supports `If-None-Match` must refuse it, because the object
        // exists now.
        PutOutcome::Done(identity) => match store.put(&key, bytes, Condition::Absent).await? {
            PutOutcome::ConditionFailed => {
                remote.set_conditional_writes(ConditionalWrites::Supported);
                Ok(CreateOutcome::Ours(identity.etag))
            }
            PutOutcome::Done(_) | PutOutcome::ConditionUnsupported => {
                // Another writer may have overwritten our claim, or our probe may have overwritten theirs: read it
                // back.
                remote.set_conditional_writes(ConditionalWrites::Unsupported);
                confirm(store, folder, record).await
            }
        },
        // The request may have been retried: if the first attempt succeeded and its response was lost, the claim is
        // ours.
        PutOutcome::ConditionFailed => confirm(store, folder, record).await,
        PutOutcome::ConditionUnsupported => {
            remote.set_conditional_writes(ConditionalWrites::Unsupported);
            create_unconditionally(store, folder, record, bytes).await
        }
    }
}

/// Creates the claim on a store without conditional writes, as far as that is possible: writes, waits for a concurrent
/// write to be visible, and reads the claim back. The last writer wins.
async fn create_unconditionally(
    store: &Store,
    folder: &Folder,
    record: &ClaimRecord,
    bytes: Bytes,
) -> Result<CreateOutcome> {
    store.put(&folder.record_key(store, CLAIM)?, bytes, Condition::Always).await?;
    tokio::time::sleep(PAUSE_MIN).await;
    confirm(store, folder, record).await
}

/// Reads the claim back and compares its owner with `record`.
async fn confirm(store: &Store, folder: &Folder, record: &ClaimRecord) -> Result<CreateOutcome> {
    Ok(match read(store, folder).await? {
        Some((present, etag)) if present.owner == record.owner => CreateOutcome::Ours(etag),
        present => CreateOutcome::Taken(present),
    })
}

/// Overwrites the expired claim that has the ETag `etag`. Returns the new ETag, or `None` if another writer was faster.
async fn take_over(
    remote: &Remote,
    store: &Store,
    folder: &Folder,
    record: &ClaimRecord,
    etag: Option<String>,
) -> Result<Option<Option<String>>> {
    let key = folder.record_key(store, CLAIM)?;
    let bytes = record.renewed().to_bytes()?;
    // The condition admits one of several writers that found the expired claim at the same time.
    let condition = match etag.as_deref() {
        Some(etag) if remote.conditional_writes() != ConditionalWrites::Unsupported => Condition::Matches(etag),
        _ => Condition::Always,
    };
    if let PutOutcome::ConditionUnsupported = store.put(&key, bytes.clone(), condition).await? {
        store.put(&key, bytes, Condition::Always).await?;
        // Wait for the write of another writer, as in `create_unconditionally`.
        tokio::time::sleep(PAUSE_MIN).await;
    }
    // Needed after a failed condition, too: the failed request may be a retry of our own successful write.
    match confirm(store, folder, record).await? {
        CreateOutcome::Ours(etag) => Ok(Some(etag)),
        CreateOutcome::Taken(_) => Ok(None),
    }
}

/// Renews the claim until the task is aborted or the claim is lost.
async fn renew(held: Arc<HeldClaim>) {
    loop {
        tokio::time::sleep(RENEWAL_INTERVAL).await;
        match rewrite(&held, ClaimRecord::renewed).await {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(artifact = %held.folder.key, "the claim on the remote was taken over by another writer");
                held.lost.store(true, Ordering::Relaxed);
                return;
            }
            // A failed renewal is not fatal: the next one comes before the claim expires.
            Err(error) => tracing::warn!(artifact = %held.folder.key, %error, "cannot renew the claim on the remote"),
        }
    }
}

/// Replaces our claim object with the record that `change` returns. Returns false if the claim is no longer ours.
async fn rewrite(held: &HeldClaim, change: fn(&ClaimRecord) -> ClaimRecord) -> Result<bool> {
    let key = held.folder.record_key(&held.store, CLAIM)?;
    let mut etag = held.etag.lock().await;
    // Read the record under the lock, so that the latest list of uploads is written.
    let record = change(&held.record());
    if let (Some(known), ConditionalWrites::Supported) = (etag.as_deref(), held.conditional_writes) {
        match held.store.put(&key, record.to_bytes()?, Condition::Matches(known)).await? {
            PutOutcome::Done(identity) => {
                *etag = identity.etag;
                return Ok(true);
            }
            // The failed request may be a retry of our own successful write: check the owner below.
            PutOutcome::ConditionFailed | PutOutcome::ConditionUnsupported => {}
        }
    }
    // No condition is usable: check the owner and then overwrite.
    match read(&held.store, &held.folder).await? {
        Some((present, _)) if held.is_owner(&present) => {}
        _ => return Ok(false),
    }
    if let PutOutcome::Done(identity) = held.store.put(&key, record.to_bytes()?, Condition::Always).await? {
        *etag = identity.etag;
    }
    Ok(true)
}

/// Marks the claim of a failed acquisition as expired, in case its write succeeded. The claim is not removed, because
/// it may list inherited leftovers.
async fn abandon(remote: &Remote, store: &Arc<Store>, folder: &Folder, record: ClaimRecord) {
    let held = HeldClaim::new(remote, store, folder, record, None);
    if let Err(error) = try_release(&held, true).await {
        tracing::debug!(%error, "cannot release the claim of a failed attempt; it expires by itself");
    }
}

/// Aborts the uploads recorded in the claim, then releases it.
async fn abort_and_release(held: &HeldClaim, has_leftovers: bool) -> Result<()> {
    // Uploads that could not be aborted are leftovers: the claim must keep their ids.
    let has_leftovers =
        has_leftovers || !orphaned_uploads::abort_listed(&held.store, &held.folder, &held.record().uploads).await;
    release(held, has_leftovers).await
}

/// Releases the claim, with one retry. If the claim stays, the next writer waits up to [`LIFETIME`].
async fn release(held: &HeldClaim, has_leftovers: bool) -> Result<()> {
    match try_release(held, has_leftovers).await {
        Ok(()) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "cannot release a claim; trying once more");
            tokio::time::sleep(PAUSE_MIN).await;
            try_release(held, has_leftovers).await
        }
    }
}

async fn try_release(held: &HeldClaim, has_leftovers: bool) -> Result<()> {
    if held.lost.load(Ordering::Relaxed) {
        return Ok(());
    }
    // Keep the list for the next writer. The expired claim can be taken over at once.
    if has_leftovers {
        return rewrite(held, ClaimRecord::expired).await.map(|_| ());
    }
    // The delete is unconditional, so check the owner first.
    match read(&held.store, &held.folder).await? {
        Some((present, _)) if held.is_owner(&present) => {
            held.store.delete(&held.folder.record_key(&held.store, CLAIM)?).await
        }
        _ => Ok(()),
    }
}

/// Fuzz target: parses arbitrary bytes as a claim.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    let _ = ClaimRecord::from_bytes(bytes).has_expired();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_records_owner_expiry_and_files() {
        let files = ListedFiles::from([(FilePath::new("a/b").expect("path"), Some(Digest::of(b"x")))]);
        let record = ClaimRecord::new(files);
        assert!(record.has_expired() && !record.renewed().has_expired() && record.renewed().expired().has_expired());
        let bytes = record.renewed().to_bytes().expect("writes");
        let read = ClaimRecord::from_bytes(&bytes);
        assert_eq!((read.owner, read.files), (record.owner.clone(), record.files.clone()));
        assert_ne!(ClaimRecord::new(ListedFiles::new()).owner, record.owner);
        let json: serde_json::Value = serde_json::from_slice(&bytes).expect("json");
        assert_eq!(json["files"]["a/b"], Digest::of(b"x").to_string());
        assert!(json["expires_at"].is_u64() && json["owner"].is_string());
    }

    #[test]
    fn an_unreadable_claim_has_expired_and_lists_nothing() {
        for text in ["", "{}", "[1]", "{\"owner\":1}", "{\"owner\":\"a\",\"expires_at\":9,\"files\":{\"../x\":null}}"] {
            let record = ClaimRecord::from_bytes(text.as_bytes());
            assert!(record.has_expired() && record.files.is_empty(), "{text}");
        }
    }
}
