//! The layout of a Hugging Face cache: makes leased artifacts of the Hub readable for clients of the Hub.

use super::{Artifact, Cache};
use crate::disk::HubLayout;
use crate::error::Result;
use crate::reference::{Reference, RepoKind, Target};
use crate::runtime::blocking;
use std::path::PathBuf;

impl Cache {
    /// Makes the files of an artifact from the Hub readable as a Hugging Face cache below the folder `hub` of the local
    /// directory, by hard links. Sets [`Artifact::hub`], and [`Artifact::path`] to the path there. Any other artifact
    /// stays as it is.
    ///
    /// A get does this by itself if [`Config::layout`](crate::config::Config::layout) says so. Evicting the artifact
    /// removes the links.
    ///
    /// # Errors
    /// `Directory` if the directory cannot be written, or its filesystem refuses hard links.
    pub async fn link_hub_layout(&self, reference: &Reference, artifact: &mut Artifact) -> Result<()> {
        let Target::Hub(repo) = &reference.target else { return Ok(()) };
        // The files of an archive are not files of the repository.
        if artifact.key.name.is_extracted() {
            return Ok(());
        }
        let revision = (!repo.is_commit()).then(|| repo.revision.clone());
        let (disk, lease, selection) = (self.0.disk.clone(), artifact.lease.clone(), artifact.selection.clone());
        let hub = blocking(move || disk.link_hub_layout(&lease, &selection, revision.as_deref())).await?;
        // The same file or folder, in the snapshot.
        let path = artifact.lease.path(&artifact.selection);
        artifact.path = match path.strip_prefix(artifact.lease.dir.files().full()) {
            Ok(file) if !file.as_os_str().is_empty() => hub.snapshot.join(file),
            _ => hub.snapshot.clone(),
        };
        artifact.hub = Some(hub);
        Ok(())
    }

    /// Writes a file that maps the name of each model in `artifacts` to its snapshot, as JSON, for programs such as
    /// vLLM (`VLLM_MODEL_REDIRECT_PATH`). Returns its path; `None` if no artifact is a model of the Hub whose layout
    /// was [linked](Self::link_hub_layout).
    ///
    /// # Errors
    /// `Directory` if the directory cannot be written.
    pub async fn write_model_map(&self, artifacts: &[Artifact]) -> Result<Option<PathBuf>> {
        let is_model = |hub: &&HubLayout| hub.kind == RepoKind::Model;
        let of_model = |artifact: &Artifact| artifact.hub.as_ref().filter(is_model).cloned();
        let mut models: Vec<_> = artifacts.iter().filter_map(of_model).collect();
        // Leave out a model of which there are several revisions: they have the same name, so the program finds them by
        // revision only.
        let all = models.clone();
        models.retain(|model| all.iter().filter(|other| other.repo_id == model.repo_id).count() == 1);
        if models.is_empty() {
            return Ok(None);
        }
        let has_entry = |artifact: &&Artifact| of_model(artifact).is_some_and(|model| models.contains(&model));
        let Some(first) = artifacts.iter().find(has_entry) else { return Ok(None) };
        let (disk, lease) = (self.0.disk.clone(), first.lease.clone());
        blocking(move || disk.write_model_map(&lease, &models)).await.map(Some)
    }
}
