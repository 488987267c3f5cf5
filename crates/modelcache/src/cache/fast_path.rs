//! A hit in passing: the first two steps of the main path where nothing is out of the ordinary.

use super::flight::Landed;
use super::get::artifact;
use super::resolve::Wanted;
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
        let (placed, asking) = (self.0.origins.placed(reference), self.asking(options));
        let key = placed.exact_key().or_else(|| self.key_in_passing(&placed, asking)).filter(|_| !options.verify)?;
        let lent = {
            let _phase = progress.enter(Phase::Lend, 0);
            self.0.disk.lend_in_passing(&key, &selection)?
        };
        let (reach, purpose) = (asking.reach, options.purpose);
        let (digest, origin, tagged, remote) = (reference.digest, None, None, None);
        let durable = options.durable;
        let wanted = Wanted { key, selection, digest, origin, reach, purpose, durable, tagged, remote };
        let checked = self.require_checksums(&wanted, &lent.manifest);
        let got = checked.and_then(|()| artifact(&wanted, Landed::here(lent), progress));
        Some(got.map_err(|error| error.artifact(&wanted.key)))
    }
}
