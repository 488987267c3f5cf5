//! A hit in passing: the steps of lending where nothing is out of the ordinary, short enough for the caller's own thread.
//!
//! The order is that of [`lend`](super::Disk::lend): shared lease, manifest, one `stat` a file, last use touched. Whatever
//! is not as it usually is (no lock file yet, an eviction at work, a manifest that is large or not read before, a file that
//! differs) is left to `lend`, which may read, hash, mend and wait. It runs only where the directory is on a filesystem of
//! this machine: one that is on a server may hang, and a thread of the runtime with it.

use super::layout::{ArtifactDir, FILES, LAST_USED, MANIFEST};
use super::lock::FileLock;
use super::rooted::{Folder, Folders};
use super::{Disk, LeasedArtifact};
use crate::key::ArtifactKey;
use crate::manifest::Manifest;
use crate::selection::Selection;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Most files that are looked at in passing: some 100 us.
const FILES_MAX: usize = 64;
/// Largest manifest that is read in passing.
const MANIFEST_BYTES_MAX: u64 = 32 << 10;
/// Leases that are remembered before those are forgotten that have ended.
const LEASES_MIN: usize = 64;

/// The leases that this process holds, so that a key that is held already is held once more without a system call.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<HeldLease>);

#[derive(Debug, Default)]
struct HeldLease {
    by_key: HashMap<String, Weak<FileLock>>,
    /// Whose they are: a forked child shares descriptors with its parent, and the parent would end the child's lease.
    pid: u32,
    /// How many there may be before those are dropped that have ended.
    most: usize,
}

impl Leases {
    fn share(&self, key: &str) -> Option<Arc<FileLock>> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.by_key.get(key).filter(|_| held.pid == std::process::id()).and_then(Weak::upgrade)
    }

    fn keep(&self, key: String, lease: &Arc<FileLock>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.pid != std::process::id() {
            *held = HeldLease { pid: std::process::id(), ..HeldLease::default() };
        }
        if held.by_key.len() >= held.most.max(LEASES_MIN) {
            held.by_key.retain(|_, lease| lease.strong_count() > 0);
            held.most = 2 * held.by_key.len();
        }
        held.by_key.insert(key, Arc::downgrade(lease));
    }
}

impl Disk {
    /// Whether what lies here can be looked at without anything that might be waited for.
    pub(crate) fn allows_fast_path(&self) -> bool {
        self.0.is_local && !self.is_read_only()
    }

    /// Lends what `selection` chooses of `key`, if that takes microseconds; `None` says nothing about what is here.
    pub(crate) fn try_acquire_fast(&self, key: &ArtifactKey, selection: &Selection) -> Option<LeasedArtifact> {
        if !self.allows_fast_path() {
            return None;
        }
        let (dir, hash) = (self.layout().artifact(key), key.hash());
        let lease = self.try_lease_fast(&hash)?;
        let folder = dir.path().open_folder().ok()?;
        let manifest = self.cached_manifest(&folder, &dir, &hash)?;
        if !manifest.holds(selection) || manifest.selected(selection).nth(FILES_MAX).is_some() {
            return None;
        }
        // Opened from its parent's descriptor: the path to it is not walked again.
        let mut views = Folders::starting_at(dir.files(), folder.open_folder(FILES).ok()?);
        for (path, entry) in manifest.selected(selection) {
            let view = views.metadata(&dir.view(path)).ok()??;
            if entry.on_disk() != Some(view.identity()) {
                return None;
            }
        }
        let _ = folder.touch(LAST_USED);
        Some(LeasedArtifact { manifest, dir, link: None, is_lower: false, _lease: Some(lease) })
    }

    fn try_lease_fast(&self, hash: &str) -> Option<Arc<FileLock>> {
        if let Some(lease) = self.0.leases.share(hash) {
            return Some(lease);
        }
        let path = self.layout().lease_of(hash);
        let lease = Arc::new(FileLock::try_shared_of(path.open(true).ok()?, &path).ok()??);
        self.0.leases.keep(hash.to_owned(), &lease);
        Some(lease)
    }

    fn cached_manifest(&self, folder: &Folder, dir: &ArtifactDir, hash: &str) -> Option<Arc<Manifest>> {
        let file = folder.metadata(MANIFEST).ok()?.identity();
        match self.0.memo.recall(hash, file) {
            None if file.bytes <= MANIFEST_BYTES_MAX => self.shared_manifest(dir).ok()?,
            recalled => recalled,
        }
    }
}

/// Whether the directory is on a filesystem of this machine, whose calls do not wait for a server.
#[cfg(target_os = "linux")]
pub(super) fn is_local(root: &Path) -> bool {
    /// `f_type` of ext2 to ext4, xfs, btrfs, f2fs, zfs, bcachefs, tmpfs, ramfs, overlayfs (linux/magic.h and the modules').
    const LOCAL: [u32; 9] = [
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0xf2f5_2010,
        0x2fc1_2fc1,
        0xca45_1a4e,
        0x0102_1994,
        0x8584_58f6,
        0x794c_7630,
    ];
    #[allow(clippy::unnecessary_cast)]
    rustix::fs::statfs(root).is_ok_and(|filesystem| LOCAL.contains(&(filesystem.f_type as u32))) // outside the root
}

#[cfg(not(target_os = "linux"))]
pub(super) fn is_local(_: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::super::AcquireOutcome;
    use super::super::budget::tests::put;
    use super::*;
    use crate::config::{ByteBound, Sharing};
    use std::fs;
    use std::time::{Duration, SystemTime};

    fn filled_disk() -> (tempfile::TempDir, Disk, ArtifactKey) {
        let folder = tempfile::tempdir().expect("folder");
        let (most, least) = (ByteBound::Bytes(1 << 20), ByteBound::Bytes(0));
        let disk = Disk::open(&folder.path().join("cache"), most, least, Sharing::Off).expect("opens");
        let key = ArtifactKey::bare("team/model@1").expect("key");
        drop(put(&disk, &key, "content", &folder.path().join("source")).expect("fits"));
        // What is not durable yet is for `lend` to judge.
        assert!(disk.try_acquire_fast(&key, &Selection::all()).is_none());
        disk.sync_dirty().expect("syncs");
        (folder, disk, key)
    }

    #[test]
    fn a_hit_in_passing_holds_the_lease_and_touches_the_last_use() {
        let (_folder, disk, key) = filled_disk();
        let dir = disk.layout().artifact(&key);
        let last_used = fs::File::open(dir.last_used().full()).expect("opens");
        last_used.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).expect("sets");
        let first = disk.try_acquire_fast(&key, &Selection::all()).expect("a hit");
        assert!(disk.last_used(&dir).expect("looks") > Some(SystemTime::UNIX_EPOCH + Duration::from_secs(2)));
        let second = disk.try_acquire_fast(&key, &Selection::all()).expect("a hit");
        drop(first);
        assert!(disk.is_leased(&dir), "the second holds it, too");
        drop(second);
        assert!(!disk.is_leased(&dir));
        let third = disk.try_acquire_fast(&key, &Selection::all()).expect("a hit");
        assert!(disk.is_leased(&dir), "what has ended is not shared");
        drop(third);
    }

    #[test]
    fn what_is_not_as_usual_is_left_to_lend() {
        let (_folder, disk, key) = filled_disk();
        let (dir, all) = (disk.layout().artifact(&key), Selection::all());
        assert!(disk.try_acquire_fast(&ArtifactKey::bare("other@1").expect("key"), &all).is_none());
        assert!(disk.try_acquire_fast(&key, &Selection::globs(&["g"], &[]).expect("globs")).is_none());
        let eviction = FileLock::try_exclusive(&disk.layout().lease(&dir)).expect("tries").expect("free");
        assert!(disk.try_acquire_fast(&key, &all).is_none(), "an eviction is at work");
        drop(eviction);
        let view = dir.files().join("f").full();
        let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        fs::File::open(&view).expect("opens").set_times(times).expect("touches");
        assert!(disk.try_acquire_fast(&key, &all).is_none(), "it may have been changed");
        assert!(matches!(disk.acquire(&key, &all), Ok(AcquireOutcome::Leased(_))), "its bytes are right");
        assert!(disk.try_acquire_fast(&key, &all).is_some());
        fs::remove_file(&view).expect("removes");
        assert!(disk.try_acquire_fast(&key, &all).is_none());
        fs::remove_dir_all(disk.layout().locks().full()).expect("removes");
        assert!(disk.try_acquire_fast(&key, &all).is_none());
    }
}
