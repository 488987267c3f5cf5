//! A hit in passing: the first two steps of the main path where nothing is out of the ordinary.

use super::fill::FillOutcome;
use super::get::artifact;
use super::resolve::FetchRequest;
use super::{Artifact, Cache, GetOptions};
use crate::error::Result;
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::selection::Selection;

impl Cache {
    /// Steps 1 and 2 in a few microseconds, where the reference and what is remembered decide the key and all of it is
    /// here; `None` says nothing.
    pub(super) fn hit(
        &self,
        reference: &Reference,
        options: &GetOptions,
        progress: &Progress,
    ) -> Option<Result<Artifact>> {
        let selection = match &reference.file {
            Some(_) if !options.selection.is_all() => return None,
            Some(file) => Selection::file(file.clone()),
            None => options.selection.clone(),
        };
        let (placed, policy) = (self.0.origins.placed(reference), self.policy(options));
        let key = placed.exact_key().or_else(|| self.cached_key(&placed, policy)).filter(|_| !options.verify)?;
        let leased = {
            let _phase = progress.enter(Phase::Acquire, 0);
            self.0.disk.try_acquire_fast(&key, &selection)?
        };
        let (max_tier, purpose) = (policy.max_tier, options.purpose);
        let (digest, origin, tag_record, remote) = (reference.digest, None, None, None);
        let durable = options.durable;
        let request = FetchRequest { key, selection, digest, origin, max_tier, purpose, durable, tag_record, remote };
        let checked = self.require_checksums(&request, &leased.manifest);
        let got = checked.and_then(|()| artifact(&request, FillOutcome::here(leased), progress));
        Some(got.map_err(|error| error.artifact(&request.key)))
    }
}
