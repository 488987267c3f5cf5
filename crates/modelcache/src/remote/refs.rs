//! Refs: small objects on the remote that resolve a movable name to a version, shared by the fleet.
//!
//! For a name with an origin, a ref is the origin's last answer. It saves the other machines a request and may be lost.
//! For a bare name, a ref is a tag. A tag is stored nowhere else: moving it is a rollout, moving it back a rollback. It
//! records the digest that its version had when the tag was set.
//!
//! Writes are compare-and-swap by ETag. On a store that ignores conditional writes the last writer wins. A damaged ref
//! is ignored with a warning and replaced by the next write; a ref in a newer format is left alone.

use super::store::{Condition, Store, Written};
use super::{Conditions, Remote};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactName, OWN_FOLDER, Version, escape};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Number of this format. Refs with a higher number are left alone. Minor releases never raise it.
const FORMAT: u32 = 1;
/// The folder of refs within [`OWN_FOLDER`].
const REFS: &str = "refs";
/// Largest ref accepted, in bytes.
const REF_BYTES_MAX: u64 = 16 * 1024;
/// Largest clock difference between two machines that is tolerated.
const CLOCKS_DIFFER_MAX: Duration = Duration::from_secs(60);
/// Attempts to set a tag while other writers move it.
const MOVES_MAX: usize = 5;
/// Concurrent reads of refs.
const IN_FLIGHT: usize = 16;

/// A movable name (a tag or a revision) and the version that it resolves to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRef {
    /// The movable name. The key of the object contains it in escaped and possibly shortened form.
    pub revision: String,
    /// The version that it resolves to.
    pub version: Version,
    /// The source of the resolution.
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
    /// The origin's answer.
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

    /// Returns the age of the resolution at `now`. The age is unlimited if its time is further in the future than
    /// clocks usually differ, so that a wrong clock cannot make a ref fresh forever.
    pub fn age(&self, now: SystemTime) -> Duration {
        let since_epoch = Duration::from_secs(self.resolved_at_unix);
        let at = UNIX_EPOCH.checked_add(since_epoch).unwrap_or(UNIX_EPOCH);
        match now.duration_since(at) {
            Ok(age) => age,
            Err(ahead) if ahead.duration() <= CLOCKS_DIFFER_MAX => Duration::ZERO,
            Err(_) => Duration::MAX,
        }
    }

    fn to_bytes(&self) -> Result<Bytes> {
        let text = serde_json::to_vec(&StoredRef { format: FORMAT, reference: self.clone() });
        text.map(Bytes::from).map_err(|cause| Error::new(ErrorKind::Other, "cannot write a ref").cause(cause))
    }
}

/// The parsed object at the key of a ref.
#[derive(Debug, PartialEq, Eq)]
enum RefObject {
    Usable(RemoteRef),
    Damaged,
    /// It has this format, which is newer than [`FORMAT`].
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
    there: RefObject,
    etag: Option<String>,
}

/// Returns true if `path`, below a name or version, is the key of a ref. Refs do not count as unmanaged objects.
pub(super) fn is_ref(path: &str) -> bool {
    path.contains(&format!("/{OWN_FOLDER}/{REFS}/"))
}

fn folder(store: &Store, name: &ArtifactName) -> Result<Path> {
    store.key(&format!("{name}/{OWN_FOLDER}/{REFS}"))
}

fn object(store: &Store, name: &ArtifactName, revision: &str) -> Result<Path> {
    store.key(&format!("{name}/{OWN_FOLDER}/{REFS}/{}", escape(revision)))
}

async fn read(store: &Store, key: &Path) -> Result<Option<FoundRef>> {
    match store.get(key, REF_BYTES_MAX).await {
        Ok(read) => {
            Ok(read.map(|(bytes, identity)| FoundRef { there: RefObject::from_bytes(&bytes), etag: identity.etag }))
        }
        // Larger than `REF_BYTES_MAX`.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            Ok(Some(FoundRef { there: RefObject::Damaged, etag: None }))
        }
        Err(error) => Err(error),
    }
}

/// Reads the ref of `revision`. A ref with another name inside, for instance a copied object, counts as damaged.
async fn read_ref(store: &Store, name: &ArtifactName, revision: &str) -> Result<Option<FoundRef>> {
    // A revision that is no valid key of this remote cannot exist there.
    let Ok(key) = object(store, name, revision) else { return Ok(None) };
    let found = read(store, &key).await?;
    Ok(found.map(|found| match found.there {
        RefObject::Usable(there) if there.revision != revision => FoundRef { there: RefObject::Damaged, ..found },
        there => FoundRef { there, ..found },
    }))
}

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
        _ if remote.conditions() == Conditions::Ignored => Condition::Always,
        None => Condition::Absent,
        Some(FoundRef { etag: Some(etag), .. }) => Condition::Matches(etag),
        Some(FoundRef { etag: None, .. }) => Condition::Always,
    };
    match store.put(key, bytes.clone(), condition).await? {
        Written::Done(_) => Ok(true),
        Written::Refused => Ok(false),
        Written::Unsupported => store.put(key, bytes, Condition::Always).await.map(|_| true),
    }
}

/// Returns the origin's last recorded answer for `revision`. Damaged refs and refs in a newer format count as absent,
/// because the origin can be asked again.
pub(super) async fn answer(remote: &Remote, name: &ArtifactName, revision: &str) -> Result<Option<RemoteRef>> {
    let Some(found) = read_ref(remote.store().await?, name, revision).await? else { return Ok(None) };
    Ok(match found.there {
        RefObject::Usable(there) => Some(there),
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

/// Records an origin's answer, unless the recorded one is newer or equal.
pub(super) async fn write_answer(remote: &Remote, name: &ArtifactName, ours: &RemoteRef) -> Result<()> {
    let store = remote.store().await?;
    let found = read_ref(store, name, &ours.revision).await?;
    let now = SystemTime::now();
    match found.as_ref().map(|found| &found.there) {
        Some(RefObject::Newer(_)) => return Ok(()),
        Some(RefObject::Usable(theirs)) if theirs.age(now) < ours.age(now) || theirs == ours => return Ok(()),
        _ => {}
    }
    let key = object(store, name, &ours.revision)?;
    // No retry: if another writer was faster, its answer is as recent as ours.
    replace(remote, store, &key, ours.to_bytes()?, found.as_ref()).await.map(|_| ())
}

/// Returns the tag, or `None` if it does not exist or is damaged.
///
/// # Errors
/// `Invalid` for a tag in a newer format. Treating it as absent could deploy the wrong version.
pub(super) async fn tag(remote: &Remote, name: &ArtifactName, tag: &str) -> Result<Option<RemoteRef>> {
    let Some(found) = read_ref(remote.store().await?, name, tag).await? else { return Ok(None) };
    match found.there {
        RefObject::Usable(there) => Ok(Some(there)),
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
    for attempt in 0..MOVES_MAX {
        let found = read_ref(store, name, &ours.revision).await?;
        let there = match found.as_ref().map(|found| &found.there) {
            Some(RefObject::Newer(format)) => return Err(newer(*format)),
            Some(RefObject::Usable(there)) => Some(there.clone()),
            Some(RefObject::Damaged) | None => None,
        };
        // The write of the previous attempt may have arrived although its answer did not.
        if attempt > 0 && there.as_ref() == Some(ours) {
            return Ok(before);
        }
        before = there;
        if replace(remote, store, &key, ours.to_bytes()?, found.as_ref()).await? {
            return Ok(before);
        }
    }
    Err(Error::unavailable("other writers keep moving the tag")
        .transient(false)
        .hint("let one writer at a time move the tag, then try again"))
}

/// Removes a tag and returns its value. With `only_to`, removes it only if it points to that version. Removes a damaged
/// tag, too, unless `only_to` is given.
pub(super) async fn remove_tag(
    remote: &Remote,
    name: &ArtifactName,
    tag: &str,
    only_to: Option<&Version>,
) -> Result<Option<RemoteRef>> {
    let store = remote.store().await?;
    let Some(found) = read_ref(store, name, tag).await? else { return Ok(None) };
    let there = match found.there {
        RefObject::Newer(format) => return Err(newer(format)),
        RefObject::Usable(there) => Some(there),
        RefObject::Damaged => None,
    };
    if only_to.is_some_and(|only_to| there.as_ref().is_none_or(|there| there.version != *only_to)) {
        return Ok(None);
    }
    // The delete is unconditional, so check the ETag just before it. A writer that moves the tag between the two
    // requests loses its move.
    match read_ref(store, name, tag).await? {
        Some(now) if now.etag == found.etag => store.delete(&object(store, name, tag)?).await?,
        Some(_) => {
            let message = "another writer moved the tag while it was being removed";
            return Err(Error::unavailable(message).transient(false).hint("check the tag and try again"));
        }
        None => return Ok(None),
    }
    // Remove the folders `refs` and `.modelcache` if they are empty.
    store.backend().remove_empty_folders(&folder(store, name)?, 1).await;
    Ok(there)
}

/// Returns the refs of `name`: tags and origins' answers. Returns `None` if listing is not permitted.
pub(super) async fn refs_of(remote: &Remote, name: &ArtifactName) -> Result<Option<Vec<RemoteRef>>> {
    let store = remote.store().await?;
    let Some(objects) = store.list(Some(&folder(store, name)?)).await? else { return Ok(None) };
    let refs = refs_among(store, &objects, |of| of == name).await?;
    Ok(Some(refs.into_iter().map(|(_, found)| found).collect()))
}

/// Reads the tags among listed objects. Returns each with its name.
pub(super) async fn tags_among(store: &Store, objects: &[ObjectMeta]) -> Result<Vec<(ArtifactName, RemoteRef)>> {
    let refs = refs_among(store, objects, |name| name.scheme().is_none()).await?;
    Ok(refs.into_iter().filter(|(_, found)| found.kind == RefKind::Tag).collect())
}

/// Reads the refs of `wanted` names among listed objects. Returns each with its name. Damaged refs are skipped.
async fn refs_among(
    store: &Store,
    objects: &[ObjectMeta],
    wanted: impl Fn(&ArtifactName) -> bool,
) -> Result<Vec<(ArtifactName, RemoteRef)>> {
    let names = objects.iter().filter_map(|meta| Some((name_of(store.relative(&meta.location)?)?, &meta.location)));
    let reads: Vec<_> =
        names.filter(|(name, _)| wanted(name)).map(|(name, key)| read_listed(store, name, key)).collect();
    let read: Vec<Option<_>> = futures::stream::iter(reads).buffered(IN_FLIGHT).try_collect().await?;
    Ok(read.into_iter().flatten().collect())
}

/// Reads one listed ref. Returns `None` if it was removed, is damaged, or is stored under the key of another ref.
async fn read_listed(store: &Store, name: ArtifactName, key: &Path) -> Result<Option<(ArtifactName, RemoteRef)>> {
    match read(store, key).await?.map(|found| found.there) {
        // Control characters could manipulate the terminal that shows the name.
        Some(RefObject::Usable(there))
            if *key == object(store, &name, &there.revision)? && !there.revision.contains(char::is_control) =>
        {
            Ok(Some((name, there)))
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
        let at =
            |seconds| RemoteRef { resolved_at_unix: seconds, ..RemoteRef::now("a", &version("1"), RefKind::Tag, None) };
        assert_eq!(at(999_990).age(now), Duration::from_secs(10));
        assert_eq!(at(1_000_030).age(now), Duration::ZERO);
        assert_eq!(at(2_000_000).age(now), Duration::MAX);
        assert_eq!(at(u64::MAX).age(now), Duration::from_secs(1_000_000), "no time at all is the epoch");
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
