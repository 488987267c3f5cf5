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
    /// Steps 1 and 2 in a few microseconds, where the reference alone decides the key and all of it is here; `None` says
    /// nothing.
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
        let key = self.0.origins.placed(reference).exact_key().filter(|_| !options.verify)?;
        let lent = {
            let _phase = progress.enter(Phase::Lend, 0);
            self.0.disk.lend_in_passing(&key, &selection)?
        };
        let (reach, purpose) = (self.asking(options).reach, options.purpose);
        let (digest, origin, tagged, remote) = (reference.digest, None, None, None);
        let durable = options.durable;
        let wanted = Wanted { key, selection, digest, origin, reach, purpose, durable, tagged, remote };
        let checked = self.require_checksums(&wanted, &lent.manifest);
        let got = checked.and_then(|()| artifact(&wanted, Landed::here(lent), progress));
        Some(got.map_err(|error| error.artifact(&wanted.key)))
    }
}
