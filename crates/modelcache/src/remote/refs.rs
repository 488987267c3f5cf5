//! Refs: what a movable name means, for the whole fleet.
//!
//! One small object for each name. For an artifact from an origin it is that origin's last answer, written by whoever
//! asked last, so that a fleet asks once; losing it costs a question. For a bare name it is a tag, which is nowhere
//! else: moving it is a rollout, moving it back a rollback. A tag says which content its version had when it was set.
//!
//! A write replaces what was read, under its ETag where the store keeps such conditions; otherwise the last writer wins.
//! A damaged ref is passed over with a warning and written anew; one in a newer format is left alone.
//!
//! Surprise: times are those of the writers' clocks. A time that lies ahead by more than clocks usually differ is old.

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

/// The number of this format. A reader leaves a higher one alone; minor releases never raise it.
const FORMAT: u32 = 1;
/// The folder of refs within [`OWN_FOLDER`].
const REFS: &str = "refs";
/// Largest ref accepted, in bytes.
const REF_BYTES_MAX: u64 = 16 * 1024;
/// How far two clocks may differ without a doubt about what they say.
const CLOCKS_DIFFER_MAX: Duration = Duration::from_secs(60);
/// How often a move is tried again that somebody else got ahead of.
const MOVES_MAX: usize = 5;
/// Refs read or removed at a time.
const IN_FLIGHT: usize = 16;

/// What a movable name means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRef {
    /// The movable name itself: its object's name may be cut.
    pub revision: String,
    /// What it means.
    pub version: Version,
    /// Who says so.
    pub kind: RefKind,
    /// When, in seconds since the Unix epoch by the writer's clock.
    pub resolved_at_unix: u64,
    /// Of a tag: the digest of the version's file, or of its file list, when the tag was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
}

/// Who says what a movable name means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefKind {
    /// A person, with `modelcache tag`.
    Tag,
    /// The origin, when it was asked.
    Origin,
}

/// The stored form.
#[derive(Serialize, Deserialize)]
struct StoredRef {
    format: u32,
    #[serde(flatten)]
    reference: RemoteRef,
}

impl RemoteRef {
    /// What `revision` means as of now.
    pub fn now(revision: &str, version: &Version, kind: RefKind, sha256: Option<Digest>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (revision, version) = (revision.to_owned(), version.clone());
        Self { revision, version, kind, resolved_at_unix: now.as_secs(), sha256 }
    }

    /// How old it is at `now`; for ever, where its time lies too far ahead to be believed.
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

/// What lies in a ref's place.
#[derive(Debug, PartialEq, Eq)]
enum RefObject {
    Usable(RemoteRef),
    Damaged,
    /// In this format, which is newer than ours.
    Newer(u32),
}

impl RefObject {
    fn from_bytes(bytes: &[u8]) -> Self {
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

/// One ref as it was found.
struct FoundRef {
    there: RefObject,
    etag: Option<String>,
}

/// Whether `path`, below some name or version, is that of a ref: no object that stands in anybody's way.
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
        // Too large to be one.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            Ok(Some(FoundRef { there: RefObject::Damaged, etag: None }))
        }
        Err(error) => Err(error),
    }
}

/// The ref of `revision`, for which its place may stand: one that was copied there from elsewhere is damage.
async fn read_ref(store: &Store, name: &ArtifactName, revision: &str) -> Result<Option<FoundRef>> {
    // What cannot be a key of this remote cannot be there either.
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
    tracing::warn!(%name, revision, "a ref on the remote is damaged and passed over; the next one written replaces it");
}

/// Replaces what was found by `bytes`. `false`: somebody else was faster.
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

/// What the origin last said about `revision`, as far as the remote knows.
pub(super) async fn answer(remote: &Remote, name: &ArtifactName, revision: &str) -> Result<Option<RemoteRef>> {
    let Some(found) = read_ref(remote.store().await?, name, revision).await? else { return Ok(None) };
    Ok(match found.there {
        RefObject::Usable(there) => Some(there),
        RefObject::Damaged => {
            warn_damaged(name, revision);
            None
        }
        RefObject::Newer(format) => {
            tracing::warn!(%name, revision, format, "a ref on the remote is in a newer format and passed over; update modelcache");
            None
        }
    })
}

/// Writes an origin's answer, unless what is there is newer, or as new and the same.
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
    // Where somebody else was faster, the remote has an answer of this moment.
    replace(remote, store, &key, ours.to_bytes()?, found.as_ref()).await.map(|_| ())
}

/// The tag, or `None`.
///
/// # Errors
/// `Invalid` for one in a newer format: a tag is a decision, and not guessed at.
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

/// Sets a tag, wherever it pointed before; the answer is that.
pub(super) async fn set_tag(remote: &Remote, name: &ArtifactName, ours: &RemoteRef) -> Result<Option<RemoteRef>> {
    let store = remote.store().await?;
    let key = object(store, name, &ours.revision)?;
    let mut before = None;
    for attempt in 0..MOVES_MAX {
        let found = read_ref(store, name, &ours.revision).await?;
        let there = match found.as_ref().map(|found| &found.there) {
            Some(RefObject::Newer(format)) => return Err(newer(*format)),
            Some(RefObject::Usable(there)) => Some(there.clone()),
            Some(RefObject::Damaged) | None => None,
        };
        // Our own first try may have arrived although its answer did not.
        if attempt > 0 && there.as_ref() == Some(ours) {
            return Ok(before);
        }
        before = there;
        if replace(remote, store, &key, ours.to_bytes()?, found.as_ref()).await? {
            return Ok(before);
        }
    }
    Err(Error::unavailable("somebody else keeps moving the tag")
        .transient(false)
        .hint("agree on who moves it, then try again"))
}

/// Removes a tag, if there is one and it is `only_to` this version; the answer is what it was. A damaged one goes, too.
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
    // Deleting takes no condition. Whoever moves the tag between these two requests loses the move: see the page on tags.
    match read_ref(store, name, tag).await? {
        Some(now) if now.etag == found.etag => store.delete(&object(store, name, tag)?).await?,
        Some(_) => {
            return Err(Error::unavailable("somebody else moved the tag just now").transient(false).hint("look again"));
        }
        None => return Ok(None),
    }
    if let Some(refs) = store.file(&folder(store, name)?) {
        // Whatever still holds something stays.
        let _ = tokio::task::spawn_blocking(move || {
            refs.ancestors().take(2).take_while(|folder| std::fs::remove_dir(folder).is_ok()).count()
        })
        .await;
    }
    Ok(there)
}

/// The refs of `name`, tags and answers. `None`: listing is not permitted.
pub(super) async fn refs_of(remote: &Remote, name: &ArtifactName) -> Result<Option<Vec<RemoteRef>>> {
    let store = remote.store().await?;
    let Some(objects) = store.list(Some(&folder(store, name)?)).await? else { return Ok(None) };
    let refs = refs_among(store, &objects, |of| of == name).await?;
    Ok(Some(refs.into_iter().map(|(_, found)| found).collect()))
}

/// The tags among listed objects, with the names that they belong to.
pub(super) async fn tags_among(store: &Store, objects: &[ObjectMeta]) -> Result<Vec<(ArtifactName, RemoteRef)>> {
    let refs = refs_among(store, objects, |name| name.scheme().is_none()).await?;
    Ok(refs.into_iter().filter(|(_, found)| found.kind == RefKind::Tag).collect())
}

/// The refs among listed objects, with the names that they belong to. What cannot be read is left out.
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

async fn read_listed(store: &Store, name: ArtifactName, key: &Path) -> Result<Option<(ArtifactName, RemoteRef)>> {
    match read(store, key).await?.map(|found| found.there) {
        // What a person could not have typed is not shown, either.
        Some(RefObject::Usable(there))
            if *key == object(store, &name, &there.revision)? && !there.revision.contains(char::is_control) =>
        {
            Ok(Some((name, there)))
        }
        Some(_) => {
            tracing::warn!(%key, "a ref on the remote cannot be read and is left out");
            Ok(None)
        }
        None => Ok(None),
    }
}

/// The name whose ref lies at `path`, if it is a place for one.
fn name_of(path: &str) -> Option<ArtifactName> {
    let (folder, _) = path.rsplit_once('/')?;
    folder.strip_suffix(REFS)?.strip_suffix('/')?.strip_suffix(OWN_FOLDER)?.strip_suffix('/')?.parse().ok()
}

/// Whatever lies where a ref should; see `fuzzing`.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let RefObject::Usable(read) = RefObject::from_bytes(bytes) {
        let _ = read.age(SystemTime::now());
        let written = read.to_bytes().expect("what was read can be written");
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
    fn damage_is_told_from_what_is_newer() {
        for text in ["", "{}", "[1]", r#"{"format":1,"version":"../x"}"#, r#"{"format":"1"}"#] {
            assert_eq!(RefObject::from_bytes(text.as_bytes()), RefObject::Damaged, "{text}");
        }
        assert_eq!(RefObject::from_bytes(br#"{"format":2,"anything":[]}"#), RefObject::Newer(2));
    }

    #[test]
    fn clocks_may_differ_a_little_and_no_answer_is_fresh_for_ever() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let at =
            |seconds| RemoteRef { resolved_at_unix: seconds, ..RemoteRef::now("a", &version("1"), RefKind::Tag, None) };
        assert_eq!(at(999_990).age(now), Duration::from_secs(10));
        assert_eq!(at(1_000_030).age(now), Duration::ZERO);
        assert_eq!(at(2_000_000).age(now), Duration::MAX);
        assert_eq!(at(u64::MAX).age(now), Duration::from_secs(1_000_000), "no time at all is the epoch");
    }

    #[test]
    fn refs_are_told_by_their_place() {
        let name = |path| name_of(path).map(|name| name.to_string());
        assert_eq!(name("a/b/.modelcache/refs/prod").as_deref(), Some("a/b"));
        for odd in ["a/.modelcache/prod", "a/refs/prod", ".modelcache/refs/prod", "a/.modelcache/refs/x/y", "refs/prod"]
        {
            assert_eq!(name(odd), None, "{odd}");
        }
        assert!(is_ref("a/.modelcache/refs/prod") && !is_ref("a/refs/prod") && !is_ref("a/.modelcache/manifest.json"));
    }
}
