//! Staging: the private folder of one fill, made and reserved in one budget hold.
//!
//! The journal in it is locked by the fill that owns the folder; a folder whose lock can be gained is a dead fill's.
//! Blobs that the fill reuses are linked into staging first, so that they cannot be evicted from under it.

use super::Disk;
use super::budget::{BudgetHold, room_for};
use super::clone;
use super::fault::At;
use super::files::{self, allocated, identity};
use super::layout::staged_name;
use super::lock::FileLock;
use super::modes;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Age after which a temporary file in staging is nobody's.
const TEMPORARY_AGE_MAX: Duration = Duration::from_secs(3600);

#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    /// Which artifact is being filled, for people.
    key: String,
    pid: u32,
    /// Bytes that the folder will hold when the fill is done.
    reserved: u64,
}

/// A fill's own folder. Dropped without being published, it is removed.
#[derive(Debug)]
pub(crate) struct Staging {
    disk: Disk,
    dir: PathBuf,
    owner: FileLock,
    /// Staged names that are links to blobs, and the identity under which their bytes are known to be right.
    reused: BTreeMap<String, FileIdentity>,
    /// Those of them that are reflinks, which count by themselves, and the bytes that they take.
    reflinked: BTreeMap<String, u64>,
}

/// What one staging folder takes.
#[derive(Debug)]
pub(crate) struct StagingUse {
    pub(crate) dir: PathBuf,
    pub(crate) live: bool,
    pub(crate) allocated: u64,
    reserved: u64,
}

impl StagingUse {
    /// Reserved and not yet written.
    pub(crate) fn outstanding(&self) -> u64 {
        if self.live { self.reserved.saturating_sub(self.allocated) } else { 0 }
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }

    pub(crate) fn is_of(&self, key: &ArtifactKey) -> bool {
        let name = self.dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(&key.hash())
    }

    /// Removes the folder, its journal last.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_staging(&self.dir)
    }
}

fn remove_staging(dir: &Path) -> Result<()> {
    let journal = dir.join("journal");
    for path in files::entries(dir)?.into_iter().filter(|path| *path != journal) {
        files::remove_file(&path)?;
    }
    files::remove_tree(dir)
}

impl Disk {
    /// Makes a staging folder for `key`: links what disk already has of `wanted`, makes room for the rest, reserves it.
    pub(crate) fn begin_fill(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<Staging> {
        self.ensure_writable()?;
        self.refuse_beyond_budget(key, wanted)?;
        let mut hold = self.hold_budget()?;
        hold.drop_dead_stagings(Some(key))?;
        let mut staging = self.make_staging(key)?;
        for (path, entry) in wanted {
            staging.reuse(&mut hold, key, path, entry)?;
        }
        let missing: BTreeMap<String, u64> = wanted
            .iter()
            .map(|(path, entry)| (staged_name(path, entry), room_for(entry.size)))
            .filter(|(name, _)| !staging.reused.contains_key(name))
            .collect();
        let reserved = missing.values().sum();
        hold.make_room(reserved, key).map_err(|error| error.artifact(key))?;
        staging.write_journal(key, reserved + staging.reflinked.values().sum::<u64>())?;
        hold.release()?;
        Ok(staging)
    }

    /// Refuses, before anything is evicted, what could never fit.
    fn refuse_beyond_budget(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<()> {
        let distinct: BTreeMap<String, u64> =
            wanted.iter().map(|(path, entry)| (staged_name(path, entry), room_for(entry.size))).collect();
        let (needed, budget) = (distinct.values().sum::<u64>(), self.space()?.budget);
        if needed <= budget {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Full,
            format!("needs {needed} bytes on disk, and the whole budget is {budget} bytes"),
        )
        .artifact(key)
        .tier(Tier::Disk)
        .hint("raise MODEL_CACHE_MAX_BYTES, or choose fewer files with --include"))
    }

    fn make_staging(&self, key: &ArtifactKey) -> Result<Staging> {
        let dir = self.layout().stagings().join(format!("{}-{}", key.hash(), files::random_name()));
        modes::make_new_dir(&dir).at("make", &dir)?;
        let journal = dir.join("journal");
        let file = modes::create_shared(&journal).at("make", &journal)?;
        let owner = FileLock::of_new(file, &journal)?.ok_or_else(|| {
            Error::new(ErrorKind::Other, "a new staging folder is locked by somebody else").tier(Tier::Disk)
        })?;
        let staging = Staging { disk: self.clone(), dir, owner, reused: BTreeMap::new(), reflinked: BTreeMap::new() };
        staging.write_journal(key, 0)?;
        Ok(staging)
    }

    /// Every staging folder and what it takes. Files that are links to blobs count there, not here.
    pub(crate) fn stagings(&self) -> Result<Vec<StagingUse>> {
        let mut uses = Vec::new();
        for dir in files::entries(&self.layout().stagings())? {
            if !files::stat(&dir)?.is_some_and(|metadata| metadata.is_dir()) {
                continue;
            }
            let journal = dir.join("journal");
            let owned = || Ok(files::stat(&journal)?.is_some() && FileLock::try_exclusive(&journal)?.is_none());
            let live = !self.is_idle(&dir)? || owned()?;
            let reserved = files::read_small(&journal, 4096)?
                .and_then(|bytes| serde_json::from_slice::<Journal>(&bytes).ok())
                .map_or(0, |journal| journal.reserved);
            let mut bytes = 0;
            files::walk(&dir, &mut |path, metadata| {
                if metadata.nlink() == 1 && path != journal {
                    bytes += allocated(metadata);
                }
                Ok(())
            })?;
            uses.push(StagingUse { dir, live, allocated: bytes, reserved });
        }
        Ok(uses)
    }

    /// Removes what writers that ended long ago had not given its name yet, directly in `folder`.
    pub(crate) fn drop_old_temporaries(&self, folder: &Path) -> Result<()> {
        let is_temporary =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(files::TEMPORARY));
        for path in files::entries(folder)?.into_iter().filter(is_temporary) {
            let age = |metadata: &fs::Metadata| SystemTime::now().duration_since(metadata.modified().ok()?).ok();
            match files::stat(&path)?.filter(|metadata| age(metadata) > Some(TEMPORARY_AGE_MAX)) {
                Some(metadata) if metadata.is_file() => files::remove_file(&path)?,
                Some(metadata) if metadata.is_dir() => drop(fs::remove_dir(&path)),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Staging {
    /// Where the file called `name` is (to be) staged.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The identity of `name`, if it is a link to a blob whose bytes are known to be right.
    pub(crate) fn reused(&self, name: &str) -> Option<FileIdentity> {
        self.reused.get(name).copied()
    }

    /// Everything is written: from here on the folder counts by what it holds.
    pub(crate) fn end_reservation(&self, key: &ArtifactKey) -> Result<()> {
        self.write_journal(key, 0)
    }

    fn write_journal(&self, key: &ArtifactKey, reserved: u64) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let journal = Journal { key: key.to_string(), pid: std::process::id(), reserved };
        let mut bytes = serde_json::to_vec(&journal).unwrap_or_default();
        bytes.push(b'\n');
        let file = self.owner.file();
        let write = file.set_len(0).and_then(|()| file.write_all_at(&bytes, 0));
        write.at("write", &self.dir.join("journal"))
    }

    /// Whether `name` is a reflink of a blob.
    pub(crate) fn is_reflink(&self, name: &str) -> bool {
        self.reflinked.contains_key(name)
    }

    /// Links (or reflinks) the bytes of `entry`, if disk has them and they are known, or found, to be right: the blob,
    /// or where there is none behind it, this artifact's own view. What can only be copied is left to the pour.
    fn reuse(
        &mut self,
        hold: &mut BudgetHold<'_>,
        key: &ArtifactKey,
        path: &FilePath,
        entry: &FileEntry,
    ) -> Result<()> {
        let Some(digest) = entry.sha256 else { return Ok(()) };
        let name = staged_name(path, entry);
        if self.reused.contains_key(&name) {
            return Ok(());
        }
        let (blob, view) = (self.disk.layout().blob(&digest), self.disk.layout().artifact(key).view(path));
        let known = match self.disk.checked_blob(hold, &digest)? {
            Some(known) => Some((blob, known)),
            None => hold.vouched_file(&view, &digest)?.map(|known| (view, known)),
        };
        let Some((from, known)) = known else { return Ok(()) };
        let target = self.file(&name);
        match files::absent(clone::hard_link(&from, &target)).at("link", &target)? {
            Some(true) => match files::stat(&target)?.map(|metadata| identity(&metadata)) {
                Some(linked) if linked == known => drop(self.reused.insert(name, known)),
                _ => files::remove_file(&target)?,
            },
            Some(false) => {
                if let Some(cloned) = clone::reflink(&from, &target, known)? {
                    self.reflinked.insert(name.clone(), room_for(entry.size));
                    self.reused.insert(name, cloned);
                }
            }
            None => {}
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = remove_staging(&self.dir) {
            tracing::debug!(%error, "staging stays until the next sweep");
        }
    }
}
