//! Tags: movable names of versions, stored on the remote. Moving a tag is a rollout, moving it back a rollback.
//!
//! A get of `name@tag` follows a move within `ref_ttl`. A tag cannot have the name of a version. It is removed when its
//! version is evicted from the remote.

use super::pointer::FALLBACK_TIMEOUT;
use super::{Cache, TagReport};
use crate::error::{Error, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::option_name::setting::REMOTE;
use crate::remote::{RefKind, Remote, RemoteRef};
use crate::source::Source;
use crate::transfer::within;

impl Cache {
    /// Points `tag` to the version of `key`. Creates the tag, or moves it.
    ///
    /// # Errors
    /// `Invalid` if no remote is configured, if the name comes from a URI, or if `tag` is the name of a version;
    /// `NotFound` if the remote does not have the version of `key`.
    pub async fn tag(&self, key: &ArtifactKey, tag: &Version) -> Result<TagReport> {
        self.tag_inner(key, tag).await.map_err(|error| error.artifact(key))
    }

    /// Does the work of [`tag`](Self::tag). Its errors do not name the artifact.
    async fn tag_inner(&self, key: &ArtifactKey, tag: &Version) -> Result<TagReport> {
        let remote = self.remote_for_tags(&key.name)?;
        let Some(manifest) = remote.source(key).manifest().await? else {
            return Err(self.no_version_to_tag(remote, key, tag).await);
        };
        self.check_tag(key, tag).await?;
        let record = RemoteRef::now(tag.as_str(), &key.version, RefKind::Tag, manifest.content_digest());
        let before = remote.set_tag(&key.name, &record).await?;
        // Drop the cached version, so that this machine follows the move at once and not only after `ref_ttl`.
        self.forget_tag(&ArtifactKey::new(key.name.clone(), tag.clone())).await;
        Ok(TagReport {
            name: key.name.clone(),
            tag: tag.clone(),
            from: before.map(|before| before.version),
            to: Some(key.version.clone()),
            sha256: record.sha256,
        })
    }

    /// Checks that `tag` can be set on the version of `key`. Call this before a put whose version is then tagged.
    ///
    /// # Errors
    /// As for [`tag`](Self::tag).
    pub async fn check_tag(&self, key: &ArtifactKey, tag: &Version) -> Result<()> {
        let remote = self.remote_for_tags(&key.name)?;
        let as_version = ArtifactKey::new(key.name.clone(), tag.clone());
        let is_version = *tag == key.version
            || self.0.disk.manifest(&as_version)?.is_some()
            || remote.source(&as_version).manifest().await?.is_some();
        if is_version {
            return Err(Error::invalid(format!("{tag} is a version of {}, and a version never moves", key.name))
                .hint("choose another name for the tag, for instance prod"));
        }
        Ok(())
    }

    /// Removes the tag `name@tag`. The version that it points to stays.
    ///
    /// # Errors
    /// `NotFound` if there is no such tag; `Invalid` if no remote is configured, or if the name comes from a URI.
    pub async fn untag(&self, key: &ArtifactKey) -> Result<TagReport> {
        self.untag_inner(key).await.map_err(|error| error.artifact(key))
    }

    /// Does the work of [`untag`](Self::untag). Its errors do not name the artifact.
    async fn untag_inner(&self, key: &ArtifactKey) -> Result<TagReport> {
        let ArtifactKey { name, version: tag } = key;
        let remote = self.remote_for_tags(name)?;
        let removed = remote.remove_tag(name, tag.as_str(), None).await?;
        self.forget_tag(key).await;
        let Some(before) = removed else {
            return Err(Error::not_found(format!("{name} has no tag {tag}"))
                .tier(Tier::Remote)
                .hint("`modelcache ls --remote` lists versions and their tags"));
        };
        Ok(TagReport { name: name.clone(), tag: tag.clone(), from: Some(before.version), to: None, sha256: None })
    }

    /// Returns the refs on the remote that point to the version of `key`: tags, and revisions that an origin resolved.
    pub(super) async fn refs_to(&self, key: &ArtifactKey) -> Result<Vec<RemoteRef>> {
        let Some(remote) = &self.0.remote else { return Ok(Vec::new()) };
        let Some(refs) = remote.refs_of(&key.name).await? else {
            if key.name.scheme().is_none() {
                tracing::warn!(
                    %key,
                    "cannot find the tags of this version: listing the remote is not permitted (s3:ListBucket)"
                );
            }
            return Ok(Vec::new());
        };
        Ok(refs.into_iter().filter(|remote_ref| remote_ref.version == key.version).collect())
    }

    /// Removes those of `refs` that still point to the version of `key`.
    pub(super) async fn remove_refs(&self, key: &ArtifactKey, refs: &[RemoteRef]) -> Result<()> {
        let Some(remote) = &self.0.remote else { return Ok(()) };
        for RemoteRef { revision, kind, .. } in refs {
            remote.remove_tag(&key.name, revision, Some(&key.version)).await?;
            if *kind == RefKind::Tag {
                self.forget_tag(&ArtifactKey::new(key.name.clone(), Version::new(revision)?)).await;
            }
        }
        Ok(())
    }

    /// Fails if `key` is a tag, for operations that need a version. Returns `Ok` if the remote cannot be reached.
    ///
    /// # Errors
    /// `Invalid` if `key` is a tag.
    pub(super) async fn refuse_tag(&self, key: &ArtifactKey) -> Result<()> {
        let Some(remote) = self.0.remote.as_ref().filter(|_| key.name.scheme().is_none()) else { return Ok(()) };
        match within(FALLBACK_TIMEOUT, remote.tag(&key.name, key.version.as_str())).await {
            Some(Ok(Some(tag))) => {
                let ArtifactKey { name, version } = key;
                Err(Error::invalid(format!("{version} is a tag of {name}, and means {} now", tag.version))
                    .artifact(key)
                    .hint(format!("name a version; `modelcache tag --remove {key}` removes the tag")))
            }
            _ => Ok(()),
        }
    }

    /// Returns the remote on which tags of `name` are stored.
    ///
    /// # Errors
    /// `Invalid` for a name from a URI, without a remote, or with a read-only one.
    fn remote_for_tags(&self, name: &ArtifactName) -> Result<&Remote> {
        if let Some(word) = name.scheme() {
            return Err(Error::invalid(format!("a name that begins with {word:?} cannot have tags"))
                .hint("its revisions are resolved by the origin; tags are for NAME@VERSION"));
        }
        let remote = self.0.remote.as_ref().ok_or_else(|| {
            Error::invalid("tags are stored on the remote, but no remote is configured")
                .hint(format!("set {REMOTE}, for instance s3://bucket/prefix"))
        })?;
        remote.ensure_read_write(|| "move the tag on a machine that may write to the remote".to_owned())?;
        Ok(remote)
    }

    /// Returns the error for a version that cannot be tagged because the remote does not have it.
    async fn no_version_to_tag(&self, remote: &Remote, key: &ArtifactKey, tag: &Version) -> Error {
        let ArtifactKey { name, version } = key;
        if let Ok(Some(other)) = remote.tag(name, version.as_str()).await {
            let to = other.version;
            return Error::invalid(format!("{version} is a tag itself, and means {to} now"))
                .hint(format!("name the version: `modelcache tag {name}@{to} {tag}`"));
        }
        let hint = match self.0.disk.manifest(key) {
            Ok(Some(_)) => {
                format!("it is on this disk only: `modelcache put {key} \"$(modelcache get {key})\"` publishes it")
            }
            _ => "publish it first with `modelcache put`; `modelcache ls --remote` lists what is published".to_owned(),
        };
        Error::not_found("the remote does not have this version, so a tag cannot point to it")
            .tier(Tier::Remote)
            .hint(hint)
    }
}
