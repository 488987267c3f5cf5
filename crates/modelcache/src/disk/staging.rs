//! Staging: the private folder of one fill, made and reserved in one budget hold.
//!
//! The journal in it is locked by the fill that owns the folder; a folder whose lock can be gained is a dead fill's.
//! Blobs that the fill reuses are linked into staging first, so that they cannot be evicted from under it.

use super::Disk;
use super::budget::{BudgetHold, room_for};
use super::fault::At;
use super::files::{self, allocated, identity};
use super::layout::staged_name;
use super::lock::FileLock;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
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
            staging.reuse(&mut hold, path, entry)?;
        }
        let missing: BTreeMap<String, u64> = wanted
            .iter()
            .map(|(path, entry)| (staged_name(path, entry), room_for(entry.size)))
            .filter(|(name, _)| !staging.reused.contains_key(name))
            .collect();
        let reserved = missing.values().sum();
        hold.make_room(reserved, key).map_err(|error| error.artifact(key))?;
        staging.write_journal(key, reserved)?;
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
        fs::create_dir(&dir).at("make", &dir)?;
        let journal = dir.join("journal");
        let file = File::options().read(true).write(true).create_new(true).open(&journal).at("make", &journal)?;
        let owner = FileLock::of_new(file, &journal)?.ok_or_else(|| {
            Error::new(ErrorKind::Other, "a new staging folder is locked by somebody else").tier(Tier::Disk)
        })?;
        let staging = Staging { disk: self.clone(), dir, owner, reused: BTreeMap::new() };
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
            let live = matches!(FileLock::try_existing(&journal)?, Some(None));
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

    /// Removes temporary files of writers that ended long ago.
    pub(crate) fn drop_old_temporaries(&self) -> Result<()> {
        for path in files::entries(&self.layout().stagings())? {
            let age = |metadata: &fs::Metadata| SystemTime::now().duration_since(metadata.modified().ok()?).ok();
            if files::stat(&path)?
                .is_some_and(|metadata| metadata.is_file() && age(&metadata) > Some(TEMPORARY_AGE_MAX))
            {
                files::remove_file(&path)?;
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

    /// Links the blob of `entry`, if disk has it and its bytes are known (or found) to be right.
    fn reuse(&mut self, hold: &mut BudgetHold<'_>, path: &FilePath, entry: &FileEntry) -> Result<()> {
        let Some(digest) = entry.sha256 else { return Ok(()) };
        let name = staged_name(path, entry);
        if self.reused.contains_key(&name) {
            return Ok(());
        }
        let Some(known) = self.disk.checked_blob(hold, &digest)? else { return Ok(()) };
        let (blob, target) = (self.disk.layout().blob(&digest), self.file(&name));
        if files::absent(fs::hard_link(&blob, &target)).at("link", &target)?.is_none() {
            return Ok(());
        }
        match files::stat(&target)?.map(|metadata| identity(&metadata)) {
            Some(linked) if linked == known => {
                self.reused.insert(name, known);
            }
            _ => files::remove_file(&target)?,
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
