//! Refs: small objects on the remote that resolve a movable name to a version, shared by the fleet.
//!
//! For a name with an origin, a ref records the version that the origin last returned. It saves other machines a
//! request to the origin, and losing it does no harm. For a bare name, a ref is a tag, which is stored nowhere else. A
//! tag records the digest that its version had when the tag was set.
//!
//! Writes are compare-and-swap by ETag. On a store that ignores conditional writes the last writer wins. A damaged ref
//! is ignored with a warning and replaced by the next write; a ref in a newer format is left alone.

use super::store::{Condition, PutOutcome, Store};
use super::{ConditionalWrites, Remote};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactName, OWN_FOLDER, Version, escape};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Format number of refs. Refs with a higher number are never replaced. Minor releases do not raise the number.
const FORMAT: u32 = 1;
/// The folder of refs within [`OWN_FOLDER`].
const REFS: &str = "refs";
/// Largest ref accepted, in bytes.
const REF_BYTES_MAX: u64 = 16 * 1024;
/// Largest tolerated clock difference between two machines.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(60);
/// Attempts to set a tag while other writers change it.
const SET_TAG_ATTEMPTS_MAX: usize = 5;
/// Concurrent reads of refs.
const READS_IN_FLIGHT: usize = 16;

/// A movable name (a tag or a revision) and the version that it resolves to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRef {
    /// The movable name. The key of the object contains it in escaped and possibly shortened form.
    pub revision: String,
    /// The version that the movable name resolves to.
    pub version: Version,
    /// The source of the resolution: a user or an origin.
    pub kind: RefKind,
    /// Time of the resolution, in seconds since the Unix epoch by the writer's clock.
    pub resolved_at_unix: u64,
    /// For a tag: the digest of the version's file, or of its file list, when the tag was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
}

/// The source of a resolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefKind {
    /// A user, with `modelcache tag`.
    Tag,
    /// An origin, in its answer to a request.
    Origin,
}

/// The stored form of a ref, in JSON.
#[derive(Serialize, Deserialize)]
struct StoredRef {
    format: u32,
    #[serde(flatten)]
    reference: RemoteRef,
}

impl RemoteRef {
    /// Returns a ref with the current time.
    pub fn now(revision: &str, version: &Version, kind: RefKind, sha256: Option<Digest>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (revision, version) = (revision.to_owned(), version.clone());
        Self { revision, version, kind, resolved_at_unix: now.as_secs(), sha256 }
    }

    /// Returns the age of the resolution at `now`. A resolution time up to [`CLOCK_SKEW_MAX`] in the future counts as
    /// `now`. The age of a later one is unlimited, so that a wrong clock cannot make a ref fresh forever.
    pub fn age(&self, now: SystemTime) -> Duration {
        let since_epoch = Duration::from_secs(self.resolved_at_unix);
        let at = UNIX_EPOCH.checked_add(since_epoch).unwrap_or(UNIX_EPOCH);
        match now.duration_since(at) {
            Ok(age) => age,
            Err(ahead) if ahead.duration() <= CLOCK_SKEW_MAX => Duration::ZERO,
            Err(_) => Duration::MAX,
        }
    }

    fn to_bytes(&self) -> Result<Bytes> {
        let text = serde_json::to_vec(&StoredRef { format: FORMAT, reference: self.clone() });
        text.map(Bytes::from).map_err(|cause| Error::new(ErrorKind::Other, "cannot serialize a ref").cause(cause))
    }
}

/// The parsed object at the key of a ref.
#[derive(Debug, PartialEq, Eq)]
enum RefObject {
    Usable(RemoteRef),
    Damaged,
    /// A ref with this format number, which is higher than [`FORMAT`].
    Newer(u32),
}

impl RefObject {
    fn from_bytes(bytes: &[u8]) -> Self {
        // Read the format first: the other fields of a newer format are unknown.
        #[derive(Deserialize)]
        struct FormatOnly {
            format: u32,
        }
        match serde_json::from_slice::<FormatOnly>(bytes) {
            Ok(FormatOnly { format }) if format > FORMAT => Self::Newer(format),
            Ok(_) => {
                serde_json::from_slice::<StoredRef>(bytes).map_or(Self::Damaged, |read| Self::Usable(read.reference))
            }
            Err(_) => Self::Damaged,
        }
    }
}

/// A ref object with its ETag.
struct FoundRef {
    stored: RefObject,
    etag: Option<String>,
}

/// Returns true if `path`, relative to any folder of the remote, is the key of a ref. Refs do not count as unmanaged
/// objects.
pub(super) fn is_ref(path: &str) -> bool {
    let folder = format!("{OWN_FOLDER}/{REFS}/");
    path.starts_with(&folder) || path.contains(&format!("/{folder}"))
}

/// Returns the folder of the refs of `name`.
fn folder(store: &Store, name: &ArtifactName) -> Result<Path> {
    store.key(&format!("{name}/{OWN_FOLDER}/{REFS}"))
}

/// Returns the key of the ref of `revision`.
fn object(store: &Store, name: &ArtifactName, revision: &str) -> Result<Path> {
    store.key(&format!("{name}/{OWN_FOLDER}/{REFS}/{}", escape(revision)))
}

async fn read(store: &Store, key: &Path) -> Result<Option<FoundRef>> {
    match store.get(key, REF_BYTES_MAX).await {
        Ok(read) => {
            Ok(read.map(|(bytes, identity)| FoundRef { stored: RefObject::from_bytes(&bytes), etag: identity.etag }))
        }
        // Larger than `REF_BYTES_MAX`.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            Ok(Some(FoundRef { stored: RefObject::Damaged, etag: None }))
        }
        Err(error) => Err(error),
    }
}

/// Reads the ref of `revision`. A ref that records another revision, for instance a copied object, counts as damaged.
async fn read_ref(store: &Store, name: &ArtifactName, revision: &str) -> Result<Option<FoundRef>> {
    // A revision that is not a valid key of this remote has no ref.
    let Ok(key) = object(store, name, revision) else { return Ok(None) };
    let found = read(store, &key).await?;
    Ok(found.map(|found| match found.stored {
        RefObject::Usable(stored) if stored.revision != revision => FoundRef { stored: RefObject::Damaged, ..found },
        stored => FoundRef { stored, ..found },
    }))
}

/// Returns the error for a ref in a newer format.
fn newer(format: u32) -> Error {
    Error::invalid(format!("the ref on the remote has format {format}; this release reads up to {FORMAT}"))
        .hint("update modelcache")
}

fn warn_damaged(name: &ArtifactName, revision: &str) {
    tracing::warn!(%name, revision, "ignoring a damaged ref on the remote; the next write replaces it");
}

/// Replaces the ref that was `found` by `bytes`. Returns false if another writer was faster.
async fn replace(remote: &Remote, store: &Store, key: &Path, bytes: Bytes, found: Option<&FoundRef>) -> Result<bool> {
    let condition = match found {
        _ if remote.conditional_writes() == ConditionalWrites::Unsupported => Condition::Always,
        None => Condition::Absent,
        Some(FoundRef { etag: Some(etag), .. }) => Condition::Matches(etag),
        Some(FoundRef { etag: None, .. }) => Condition::Always,
    };
    match store.put(key, bytes.clone(), condition).await? {
        PutOutcome::Done(_) => Ok(true),
        PutOutcome::ConditionFailed => Ok(false),
        PutOutcome::ConditionUnsupported => store.put(key, bytes, Condition::Always).await.map(|_| true),
    }
}

/// Returns the origin's last recorded answer for `revision`. Damaged refs and refs in a newer format count as absent,
/// because the caller can resolve the revision at the origin.
pub(super) async fn origin_answer(remote: &Remote, name: &ArtifactName, revision: &str) -> Result<Option<RemoteRef>> {
    let Some(found) = read_ref(remote.store().await?, name, revision).await? else { return Ok(None) };
    Ok(match found.stored {
        RefObject::Usable(stored) => Some(stored),
        RefObject::Damaged => {
            warn_damaged(name, revision);
            None
        }
        RefObject::Newer(format) => {
            tracing::warn!(%name, revision, format, "ignoring a ref on the remote in a newer format; update modelcache");
            None
        }
    })
}

/// Records an origin's answer, unless the recorded one is newer or identical. A ref in a newer format is left as it is.
pub(super) async fn write_origin_answer(remote: &Remote, name: &ArtifactName, ours: &RemoteRef) -> Result<()> {
    let store = remote.store().await?;
    let found = read_ref(store, name, &ours.revision).await?;
    let now = SystemTime::now();
    match found.as_ref().map(|found| &found.stored) {
        Some(RefObject::Newer(_)) => return Ok(()),
        Some(RefObject::Usable(theirs)) if theirs.age(now) < ours.age(now) || theirs == ours => return Ok(()),
        _ => {}
    }
    let key = object(store, name, &ours.revision)?;
    // No further attempt: if another writer was faster, its answer is as recent as ours.
    replace(remote, store, &key, ours.to_bytes()?, found.as_ref()).await.map(|_| ())
}

/// Returns the tag, or `None` if it does not exist or is damaged.
///
/// # Errors
/// `Invalid` for a tag in a newer format. Treating it as absent could deploy the wrong version.
pub(super) async fn tag(remote: &Remote, name: &ArtifactName, tag: &str) -> Result<Option<RemoteRef>> {
    let Some(found) = read_ref(remote.store().await?, name, tag).await? else { return Ok(None) };
    match found.stored {
        RefObject::Usable(stored) => Ok(Some(stored)),
        RefObject::Newer(format) => Err(newer(format)),
        RefObject::Damaged => {
            warn_damaged(name, tag);
            Ok(None)
        }
    }
}

/// Sets a tag and returns its previous value.
pub(super) async fn set_tag(remote: &Remote, name: &ArtifactName, ours: &RemoteRef) -> Result<Option<RemoteRef>> {
    let store = remote.store().await?;
    let key = object(store, name, &ours.revision)?;
    let mut before = None;
    // Compare-and-swap loop: read the tag, then replace it on the condition that it is unchanged.
    for attempt in 0..SET_TAG_ATTEMPTS_MAX {
        let found = read_ref(store, name, &ours.revision).await?;
        let stored = match found.as_ref().map(|found| &found.stored) {
            Some(RefObject::Newer(format)) => return Err(newer(*format)),
            Some(RefObject::Usable(stored)) => Some(stored.clone()),
            Some(RefObject::Damaged) | None => None,
        };
        // The write of the previous attempt may have succeeded although its response was lost.
        if attempt > 0 && stored.as_ref() == Some(ours) {
            return Ok(before);
        }
        before = stored;
        if replace(remote, store, &key, ours.to_bytes()?, found.as_ref()).await? {
            return Ok(before);
        }
    }
    Err(Error::unavailable("other writers keep moving the tag")
        .transient(false)
        .hint("let one writer at a time move the tag, then try again"))
}

/// Removes a tag and returns its value. With `only_to`, removes it only if it points to that version. Without
/// `only_to`, removes a damaged tag, too.
pub(super) async fn remove_tag(
    remote: &Remote,
    name: &ArtifactName,
    tag: &str,
    only_to: Option<&Version>,
) -> Result<Option<RemoteRef>> {
    let store = remote.store().await?;
    let Some(found) = read_ref(store, name, tag).await? else { return Ok(None) };
    let stored = match found.stored {
        RefObject::Newer(format) => return Err(newer(format)),
        RefObject::Usable(stored) => Some(stored),
        RefObject::Damaged => None,
    };
    if only_to.is_some_and(|only_to| stored.as_ref().is_none_or(|stored| stored.version != *only_to)) {
        return Ok(None);
    }
    // The delete is unconditional, so check the ETag just before it. A move of the tag between the two requests is
    // lost.
    match read_ref(store, name, tag).await? {
        Some(current) if current.etag == found.etag => store.delete(&object(store, name, tag)?).await?,
        Some(_) => {
            let message = "another writer moved the tag while it was being removed";
            return Err(Error::unavailable(message).transient(false).hint("check the tag and try again"));
        }
        None => return Ok(None),
    }
    // Remove the folders `refs` and `.modelcache` if they are empty.
    store.backend().remove_empty_folders(&folder(store, name)?, 1).await;
    Ok(stored)
}

/// Returns the refs of `name`: tags and origins' answers. Returns `None` if listing is not permitted.
pub(super) async fn refs_of(remote: &Remote, name: &ArtifactName) -> Result<Option<Vec<RemoteRef>>> {
    let store = remote.store().await?;
    let Some(objects) = store.list(Some(&folder(store, name)?)).await? else { return Ok(None) };
    let refs = refs_among(store, &objects, |listed| listed == name).await?;
    Ok(Some(refs.into_iter().map(|(_, found)| found).collect()))
}

/// Reads the tags among listed objects. Returns each with its name.
pub(super) async fn tags_among(store: &Store, objects: &[ObjectMeta]) -> Result<Vec<(ArtifactName, RemoteRef)>> {
    let refs = refs_among(store, objects, |name| name.scheme().is_none()).await?;
    Ok(refs.into_iter().filter(|(_, found)| found.kind == RefKind::Tag).collect())
}

/// Reads the refs among listed objects whose names `is_wanted` accepts. Returns each with its name. Damaged refs are
/// skipped.
async fn refs_among(
    store: &Store,
    objects: &[ObjectMeta],
    is_wanted: impl Fn(&ArtifactName) -> bool,
) -> Result<Vec<(ArtifactName, RemoteRef)>> {
    let names = objects.iter().filter_map(|meta| Some((name_of(store.relative(&meta.location)?)?, &meta.location)));
    let reads: Vec<_> =
        names.filter(|(name, _)| is_wanted(name)).map(|(name, key)| read_listed(store, name, key)).collect();
    let read: Vec<Option<_>> = futures::stream::iter(reads).buffered(READS_IN_FLIGHT).try_collect().await?;
    Ok(read.into_iter().flatten().collect())
}

/// Reads one listed ref. Returns `None` if it was removed, is damaged or in a newer format, or is stored under the key
/// of another ref.
async fn read_listed(store: &Store, name: ArtifactName, key: &Path) -> Result<Option<(ArtifactName, RemoteRef)>> {
    match read(store, key).await?.map(|found| found.stored) {
        // Control characters could manipulate the terminal that shows the name.
        Some(RefObject::Usable(stored))
            if *key == object(store, &name, &stored.revision)? && !stored.revision.contains(char::is_control) =>
        {
            Ok(Some((name, stored)))
        }
        Some(_) => {
            tracing::warn!(%key, "skipping a ref on the remote that cannot be read");
            Ok(None)
        }
        None => Ok(None),
    }
}

/// Returns the name that the ref at `path` belongs to, or `None` if `path` is not the key of a ref.
fn name_of(path: &str) -> Option<ArtifactName> {
    let (folder, _) = path.rsplit_once('/')?;
    folder.strip_suffix(REFS)?.strip_suffix('/')?.strip_suffix(OWN_FOLDER)?.strip_suffix('/')?.parse().ok()
}

/// Fuzz target: parses arbitrary bytes as a ref.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let RefObject::Usable(read) = RefObject::from_bytes(bytes) {
        let _ = read.age(SystemTime::now());
        let written = read.to_bytes().expect("a parsed ref can be written");
        assert_eq!(RefObject::from_bytes(&written), RefObject::Usable(read));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::new(text).expect("version")
    }

    #[test]
    fn a_ref_is_written_as_documented_and_reads_back() {
        let tag = RemoteRef::now("prod", &version("3"), RefKind::Tag, Some(Digest::of(b"x")));
        let bytes = tag.to_bytes().expect("writes");
        let json: serde_json::Value = serde_json::from_slice(&bytes).expect("json");
        assert_eq!((&json["format"], &json["kind"], &json["version"]), (&1.into(), &"tag".into(), &"3".into()));
        assert_eq!(json["sha256"], Digest::of(b"x").to_string());
        assert_eq!(RefObject::from_bytes(&bytes), RefObject::Usable(tag));
        let mut later = json.as_object().expect("object").clone();
        later.insert("note".into(), "of a later release".into());
        assert!(matches!(RefObject::from_bytes(&serde_json::to_vec(&later).expect("json")), RefObject::Usable(_)));
    }

    #[test]
    fn damaged_refs_are_distinguished_from_newer_formats() {
        for text in ["", "{}", "[1]", r#"{"format":1,"version":"../x"}"#, r#"{"format":"1"}"#] {
            assert_eq!(RefObject::from_bytes(text.as_bytes()), RefObject::Damaged, "{text}");
        }
        assert_eq!(RefObject::from_bytes(br#"{"format":2,"anything":[]}"#), RefObject::Newer(2));
    }

    #[test]
    fn small_clock_differences_are_tolerated_and_no_ref_is_fresh_forever() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let resolved_at =
            |seconds| RemoteRef { resolved_at_unix: seconds, ..RemoteRef::now("a", &version("1"), RefKind::Tag, None) };
        assert_eq!(resolved_at(999_990).age(now), Duration::from_secs(10));
        assert_eq!(resolved_at(1_000_030).age(now), Duration::ZERO);
        assert_eq!(resolved_at(2_000_000).age(now), Duration::MAX);
        assert_eq!(
            resolved_at(u64::MAX).age(now),
            Duration::from_secs(1_000_000),
            "a time that `SystemTime` cannot represent counts as the epoch"
        );
    }

    #[test]
    fn refs_are_recognized_by_their_key() {
        let name = |path| name_of(path).map(|name| name.to_string());
        assert_eq!(name("a/b/.modelcache/refs/prod").as_deref(), Some("a/b"));
        for odd in ["a/.modelcache/prod", "a/refs/prod", ".modelcache/refs/prod", "a/.modelcache/refs/x/y", "refs/prod"]
        {
            assert_eq!(name(odd), None, "{odd}");
        }
        assert!(is_ref("a/.modelcache/refs/prod") && !is_ref("a/refs/prod") && !is_ref("a/.modelcache/manifest.json"));
    }
}
