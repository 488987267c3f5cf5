//! Tags: movable names of versions, kept on the remote. Moving one is a rollout, moving it back a rollback.
//!
//! Whoever gets `name@tag` follows within the time that answers are fresh (`ref_ttl`). A tag is no version: it is
//! refused where a version has that name, and goes when its version is evicted from the remote.

use super::pointer::FALLBACK_TIMEOUT;
use super::{Cache, TagReport};
use crate::error::{Error, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::remote::{RefKind, Remote, RemoteRef};
use crate::source::Source;
use crate::transfer::within;

impl Cache {
    /// Makes `tag` mean the version of `key`, whatever it meant before.
    ///
    /// # Errors
    /// `Invalid` without a remote, for a name from a URI, and for a tag that is a version; `NotFound` where the remote
    /// does not have the version.
    pub async fn tag(&self, key: &ArtifactKey, tag: &Version) -> Result<TagReport> {
        self.tag_unnamed(key, tag).await.map_err(|error| error.artifact(key))
    }

    async fn tag_unnamed(&self, key: &ArtifactKey, tag: &Version) -> Result<TagReport> {
        let remote = self.remote_for_tags(&key.name)?;
        let Some(manifest) = remote.source(key).manifest().await? else {
            return Err(self.nothing_to_tag(remote, key, tag).await);
        };
        self.check_tag(key, tag).await?;
        let record = RemoteRef::now(tag.as_str(), &key.version, RefKind::Tag, manifest.content_digest());
        let before = remote.set_tag(&key.name, &record).await?;
        // This machine follows at once, not when what it remembers is old.
        self.forget(&ArtifactKey::new(key.name.clone(), tag.clone())).await;
        Ok(TagReport {
            name: key.name.clone(),
            tag: tag.clone(),
            from: before.map(|before| before.version),
            to: Some(key.version.clone()),
            sha256: record.sha256,
        })
    }

    /// Whether `tag` can be set for a version of that name: asked before a put that ends with it.
    ///
    /// # Errors
    /// As for [`tag`](Self::tag).
    pub async fn check_tag(&self, key: &ArtifactKey, tag: &Version) -> Result<()> {
        let remote = self.remote_for_tags(&key.name)?;
        let of_that_name = ArtifactKey::new(key.name.clone(), tag.clone());
        let is_version = *tag == key.version
            || self.0.disk.manifest(&of_that_name)?.is_some()
            || remote.source(&of_that_name).manifest().await?.is_some();
        if is_version {
            return Err(Error::invalid(format!("{tag} is a version of {}, and a version never moves", key.name))
                .hint("choose another word for the tag, for instance prod"));
        }
        Ok(())
    }

    /// Removes the tag that `name@tag` names.
    ///
    /// # Errors
    /// `NotFound` where there is none.
    pub async fn untag(&self, tag_record: &ArtifactKey) -> Result<TagReport> {
        self.untag_unnamed(tag_record).await.map_err(|error| error.artifact(tag_record))
    }

    async fn untag_unnamed(&self, tag_record: &ArtifactKey) -> Result<TagReport> {
        let ArtifactKey { name, version: tag } = tag_record;
        let remote = self.remote_for_tags(name)?;
        let removed = remote.remove_tag(name, tag.as_str(), None).await?;
        self.forget(tag_record).await;
        let Some(before) = removed else {
            return Err(Error::not_found(format!("{name} has no tag {tag}"))
                .tier(Tier::Remote)
                .hint("`modelcache ls --remote` lists versions and their tags"));
        };
        Ok(TagReport { name: name.clone(), tag: tag.clone(), from: Some(before.version), to: None, sha256: None })
    }

    /// What on the remote means the version of `key`: tags, and what an origin once answered.
    pub(super) async fn refs_to(&self, key: &ArtifactKey) -> Result<Vec<RemoteRef>> {
        let Some(remote) = &self.0.remote else { return Ok(Vec::new()) };
        let Some(refs) = remote.refs_of(&key.name).await? else {
            if key.name.scheme().is_none() {
                tracing::warn!(%key, "which tags point to it cannot be seen: listing the remote is not permitted (s3:ListBucket)");
            }
            return Ok(Vec::new());
        };
        Ok(refs.into_iter().filter(|found| found.version == key.version).collect())
    }

    /// Removes those of `refs` that still mean the version of `key`.
    pub(super) async fn remove_refs(&self, key: &ArtifactKey, refs: &[RemoteRef]) -> Result<()> {
        let Some(remote) = &self.0.remote else { return Ok(()) };
        for RemoteRef { revision, kind, .. } in refs {
            remote.remove_tag(&key.name, revision, Some(&key.version)).await?;
            if *kind == RefKind::Tag {
                self.forget(&ArtifactKey::new(key.name.clone(), Version::new(revision)?)).await;
            }
        }
        Ok(())
    }

    /// Refuses `name@tag` where a version is meant. A remote that cannot be asked refuses nothing.
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

    fn remote_for_tags(&self, name: &ArtifactName) -> Result<&Remote> {
        if let Some(word) = name.scheme() {
            return Err(Error::invalid(format!("names that begin with {word:?} have no tags of ours"))
                .hint("what a revision means there, its origin decides; tags are for NAME@VERSION"));
        }
        let remote = self.0.remote.as_ref().ok_or_else(|| {
            Error::invalid("tags are kept on the remote, and none is configured")
                .hint("set MODEL_CACHE_REMOTE, for instance s3://bucket/prefix")
        })?;
        remote.ensure_read_write("move the tag from where the remote is written")?;
        Ok(remote)
    }

    /// Why a version cannot be tagged that the remote does not have.
    async fn nothing_to_tag(&self, remote: &Remote, key: &ArtifactKey, tag: &Version) -> Error {
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
            _ => "publish it first with `modelcache put`; `modelcache ls --remote` lists what is there".to_owned(),
        };
        Error::not_found("the remote does not have this version, so no tag can mean it").tier(Tier::Remote).hint(hint)
    }
}
