//! The fast path of a cache hit: a lease acquired in microseconds, on the caller's own thread.
//!
//! The steps are those of [`acquire`](super::Disk::acquire), with their numbers: shared lease, manifest, one `stat` per
//! file, time of last use. Step 3 and any unusual case (no lock file yet, a running eviction, a large manifest, a
//! changed file) are left to `acquire`, which may read, hash, repair and wait.
//!
//! The fast path is used only on local filesystems. A call on a network filesystem may hang, and would block a thread
//! of the async runtime.

use super::layout::{ArtifactDir, FILES, LAST_USED, MANIFEST};
use super::lock::FileLock;
use super::rooted::{Folder, Folders};
use super::{Disk, LeasedArtifact};
use crate::key::ArtifactKey;
use crate::manifest::Manifest;
use crate::mutex::Mutex;
use crate::selection::Selection;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};

/// Maximum number of selected files on the fast path. The `stat` calls of so many files take about 100 µs.
const FILES_MAX: usize = 64;
/// Maximum size in bytes of a manifest that the fast path reads. A manifest in the in-memory cache may be larger.
const MANIFEST_BYTES_MAX: u64 = 32 << 10;
/// Number of entries in [`Leases`] below which the entries of ended leases are not removed.
const LEASES_MIN: usize = 64;

/// The leases that this process holds. A further lease of the same key shares the lock, without a system call.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<HeldLeases>);

#[derive(Debug, Default)]
struct HeldLeases {
    by_key: HashMap<String, Weak<FileLock>>,
    /// The process that took the locks. A forked child does not use them: it shares each lock with the parent, and the
    /// parent may release it.
    pid: u32,
    /// Number of entries at which the entries of ended leases are removed next, if more than [`LEASES_MIN`].
    prune_at: usize,
}

impl Leases {
    /// Returns the lease of the artifact with this key hash, if this process holds it.
    fn get(&self, key: &str) -> Option<Arc<FileLock>> {
        let held = self.0.lock();
        held.by_key.get(key).filter(|_| held.pid == std::process::id()).and_then(Weak::upgrade)
    }

    /// Adds a new lease of the artifact with this key hash.
    fn insert(&self, key: String, lease: &Arc<FileLock>) {
        let mut held = self.0.lock();
        if held.pid != std::process::id() {
            *held = HeldLeases { pid: std::process::id(), ..HeldLeases::default() };
        }
        // Doubling the threshold keeps the amortized cost of `retain` constant per insertion.
        if held.by_key.len() >= held.prune_at.max(LEASES_MIN) {
            held.by_key.retain(|_, lease| lease.strong_count() > 0);
            held.prune_at = 2 * held.by_key.len();
        }
        held.by_key.insert(key, Arc::downgrade(lease));
    }
}

impl Disk {
    /// Returns true if the fast path may be used: the directory is local and can be written.
    pub(crate) fn allows_fast_path(&self) -> bool {
        self.0.is_local && !self.is_read_only()
    }

    /// Acquires a lease on the selected files of `key` if this takes microseconds only. If it returns `None`, the files
    /// may still be on disk: call [`acquire`](Self::acquire).
    pub(crate) fn try_acquire_fast(&self, key: &ArtifactKey, selection: &Selection) -> Option<LeasedArtifact> {
        if !self.allows_fast_path() {
            return None;
        }
        let (dir, hash) = (self.layout().artifact(key), key.hash());
        // Step 1: take the shared lease.
        let lease = self.try_lease_fast(&hash)?;
        let folder = dir.path().open_folder().ok()?;
        // Step 2: read the manifest.
        let manifest = self.cached_manifest(&folder, &dir, &hash)?;
        if !manifest.holds(selection) || manifest.selected(selection).nth(FILES_MAX).is_some() {
            return None;
        }
        // Step 4: compare the identities. Opening `files/` relative to its parent saves resolving the path again.
        let mut views = Folders::starting_at(dir.files(), folder.open_folder(FILES).ok()?);
        for (path, entry) in manifest.selected(selection) {
            let view = views.metadata(&dir.view(path)).ok()??;
            // `on_disk` is `None` for unsynced files: `acquire` settles their marks in step 3.
            if entry.on_disk() != Some(view.identity()) {
                return None;
            }
        }
        // Step 5: touch `last-used`.
        let _ = folder.touch(LAST_USED);
        Some(LeasedArtifact { manifest, dir, link: None, is_lower: false, lease: Some(lease) })
    }

    /// Takes the shared lease; `None` if there is no lock file yet, or if an eviction holds the lock.
    fn try_lease_fast(&self, hash: &str) -> Option<Arc<FileLock>> {
        if let Some(lease) = self.0.leases.get(hash) {
            return Some(lease);
        }
        let path = self.layout().lease_lock_of(hash);
        let lease = Arc::new(FileLock::try_shared_of(path.open(true).ok()?, &path).ok()??);
        self.0.leases.insert(hash.to_owned(), &lease);
        Some(lease)
    }

    /// Returns the manifest from the in-memory cache, or reads the file if it is small.
    fn cached_manifest(&self, folder: &Folder, dir: &ArtifactDir, hash: &str) -> Option<Arc<Manifest>> {
        let file = folder.metadata(MANIFEST).ok()?.identity();
        match self.0.manifests.get(hash, file) {
            None if file.bytes <= MANIFEST_BYTES_MAX => self.shared_manifest(dir).ok()?,
            cached => cached,
        }
    }
}

/// Returns true if the directory is on a local filesystem, whose calls do not wait for a server.
#[cfg(target_os = "linux")]
pub(super) fn is_local(root: &Path) -> bool {
    /// Values of `f_type`, from linux/magic.h and the headers of the modules.
    const LOCAL: [u32; 9] = [
        0xef53,      // ext2, ext3, ext4
        0x5846_5342, // xfs
        0x9123_683e, // btrfs
        0xf2f5_2010, // f2fs
        0x2fc1_2fc1, // zfs
        0xca45_1a4e, // bcachefs
        0x0102_1994, // tmpfs
        0x8584_58f6, // ramfs
        0x794c_7630, // overlayfs
    ];
    #[allow(clippy::unnecessary_cast)]
    rustix::fs::statfs(root).is_ok_and(|filesystem| LOCAL.contains(&(filesystem.f_type as u32))) // not below the root
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
        let (max_bytes, min_free) = (ByteBound::Bytes(1 << 20), ByteBound::Bytes(0));
        let disk = Disk::open(&folder.path().join("cache"), max_bytes, min_free, Sharing::Off).expect("opens");
        let key = ArtifactKey::bare("team/model@1").expect("key");
        drop(put(&disk, &key, "content", &folder.path().join("source")).expect("fits"));
        // Files that are not durable yet are left to `acquire`.
        assert!(disk.try_acquire_fast(&key, &Selection::all()).is_none());
        disk.sync_published().expect("syncs");
        (folder, disk, key)
    }

    #[test]
    fn a_fast_hit_holds_the_lease_and_updates_the_time_of_last_use() {
        let (_folder, disk, key) = filled_disk();
        let dir = disk.layout().artifact(&key);
        let last_used = fs::File::open(dir.last_used().full()).expect("opens");
        last_used.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).expect("sets");
        let first = disk.try_acquire_fast(&key, &Selection::all()).expect("a hit");
        assert!(disk.last_used(&dir).expect("examines") > Some(SystemTime::UNIX_EPOCH + Duration::from_secs(2)));
        let second = disk.try_acquire_fast(&key, &Selection::all()).expect("a hit");
        drop(first);
        assert!(disk.is_leased(&dir), "the second lease is still held");
        drop(second);
        assert!(!disk.is_leased(&dir));
        let third = disk.try_acquire_fast(&key, &Selection::all()).expect("a hit");
        assert!(disk.is_leased(&dir), "an ended lease is not shared");
        drop(third);
    }

    #[test]
    fn unusual_cases_are_left_to_acquire() {
        let (_folder, disk, key) = filled_disk();
        let (dir, all) = (disk.layout().artifact(&key), Selection::all());
        assert!(disk.try_acquire_fast(&ArtifactKey::bare("other@1").expect("key"), &all).is_none());
        assert!(disk.try_acquire_fast(&key, &Selection::globs(&["g"], &[]).expect("globs")).is_none());
        let eviction = FileLock::try_exclusive(&disk.layout().lease_lock(&dir)).expect("tries").expect("free");
        assert!(disk.try_acquire_fast(&key, &all).is_none(), "an eviction is running");
        drop(eviction);
        let view = dir.files().join("f").full();
        let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        fs::File::open(&view).expect("opens").set_times(times).expect("touches");
        assert!(disk.try_acquire_fast(&key, &all).is_none(), "the file may have been changed");
        assert!(matches!(disk.acquire(&key, &all), Ok(AcquireOutcome::Leased(_))), "the bytes are right");
        assert!(disk.try_acquire_fast(&key, &all).is_some());
        fs::remove_file(&view).expect("removes");
        assert!(disk.try_acquire_fast(&key, &all).is_none());
        fs::remove_dir_all(disk.layout().locks().full()).expect("removes");
        assert!(disk.try_acquire_fast(&key, &all).is_none());
    }
}
