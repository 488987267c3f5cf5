//! The fast path of a hit: steps 1 and 2 of the main path without asynchronous work.

use super::fill::FillOutcome;
use super::get::artifact;
use super::resolve::FetchRequest;
use super::{Artifact, Cache, GetOptions};
use crate::error::Result;
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::selection::Selection;

impl Cache {
    /// Returns the leased artifact if the reference or a cached resolution determines the key, and all selected files
    /// are on disk. Takes some tens of microseconds. Returns `None` if the caller has to continue with the slow path.
    pub(super) fn try_fast_hit(
        &self,
        reference: &Reference,
        options: &GetOptions,
        progress: &Progress,
    ) -> Option<Result<Artifact>> {
        let request = self.local_request(reference, options)?;
        let leased = {
            let _phase = progress.enter(Phase::Acquire, 0);
            self.0.disk.try_acquire_fast(&request.key, &request.selection)?
        };
        let checked = self.check_policy(&request, &leased.manifest);
        let artifact = checked.and_then(|()| artifact(&request, FillOutcome::local(leased), progress));
        Some(artifact.map_err(|error| error.artifact(&request.key)))
    }

    /// Returns the request that the reference or a cached resolution determines, without contacting any tier; `None` if
    /// the reference has to be resolved.
    pub(super) fn local_request(&self, reference: &Reference, options: &GetOptions) -> Option<FetchRequest> {
        // The slow path reports the conflict between a file in the reference and a selection.
        let selection = match &reference.file {
            Some(_) if !options.selection.is_all() => return None,
            Some(file) => Selection::file(file.clone()),
            None => options.selection.clone(),
        };
        let (completed, policy) = (self.0.origins.completed(reference), self.policy(options));
        let key = completed.exact_key().or_else(|| self.cached_key(&completed, policy)).filter(|_| !options.verify)?;
        // A refresh of a bare key has to compare it with the remote's manifest, so it takes the slow path.
        if options.refresh && key.name.scheme().is_none() {
            return None;
        }
        let plain = FetchRequest::new(key, selection, policy.max_tier);
        let (digest, purpose, durable) = (reference.digest, options.purpose, options.durable);
        Some(FetchRequest { digest, purpose, durable, ..plain })
    }
}
