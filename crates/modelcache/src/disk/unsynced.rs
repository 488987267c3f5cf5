//! The marks of unsynced files: files that are published and may not be on stable storage yet.
//!
//! Publishing does not wait for the disk. The published manifest marks each file with the boot and the mount during
//! which the page cache holds the bytes, and with the time. The kernel writes the bytes back on its own. As long as
//! boot and mount are the same, reading the file gives the right bytes, even if its writer has ended. After a reboot it
//! is unknown what reached the disk, and the file is hashed before it is used.
//!
//! `sync.rs` clears the marks.

use super::Disk;
use super::budget::boot_id;
use super::rooted::RootedPath;
use crate::digest::Digest;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, Manifest, UnsyncedFile};
use crate::mutex::Mutex;
use crate::selection::Selection;
use rustix::time::{ClockId, clock_gettime};
use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::MutexGuard;
use std::sync::atomic::AtomicBool;

/// Age of a mark, in seconds, from which it counts as old: the next use of the file syncs it. The kernel starts to
/// write a page back when it has been dirty for 30 s, and looks for such pages every 5 s (`vm.dirty_expire_centisecs`,
/// `vm.dirty_writeback_centisecs`).
const WRITE_BACK_S: u64 = 35;
/// Hexadecimal digits of a mount id.
const MOUNT_DIGITS: usize = 16;

/// The artifacts that this process published and has not synced yet.
#[derive(Debug, Default)]
pub(super) struct PendingSyncs {
    keys: Mutex<BTreeSet<ArtifactKey>>,
    /// Held during a sync: of two that meet, the second finds the work done. Asynchronous, so that waiting calls occupy
    /// no thread.
    turn: tokio::sync::Mutex<()>,
    /// True once a `syncfs` of this process has failed.
    pub(super) filesystem_failed: AtomicBool,
}

/// What the mark of an unsynced file says at present, ordered by how much is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum MarkState {
    /// The page cache has the bytes. A sync now might block until the disk has written them.
    Recent,
    /// The page cache has the bytes, and the kernel has had the time to write them back.
    Old,
    /// The mark is of another boot or mount. The bytes may be lost.
    Foreign,
}

/// The present boot, mount and time, with which marks are compared. Determined when the first mark is
/// found or made.
pub(super) struct CurrentMount<'disk> {
    disk: &'disk Disk,
    known: OnceCell<(Option<String>, u64)>,
}

impl CurrentMount<'_> {
    fn known(&self) -> &(Option<String>, u64) {
        self.known.get_or_init(|| (mount_id(self.disk), boottime_s()))
    }

    pub(super) fn state(&self, file: &UnsyncedFile) -> MarkState {
        let (mount, now_s) = self.known();
        match mount {
            Some(mount) if *mount == file.mount => {}
            _ => return MarkState::Foreign,
        }
        // A mark from the future was made in a time namespace with another offset. Its age is unknown.
        let is_recent = now_s.checked_sub(file.boottime_s).is_some_and(|age_s| age_s < WRITE_BACK_S);
        if is_recent { MarkState::Recent } else { MarkState::Old }
    }

    /// Returns the mark for a file that is published now. If the kernel reports no boot id, every process hashes the
    /// file.
    pub(super) fn mark(&self, identity: FileIdentity) -> UnsyncedFile {
        let (mount, boottime_s) = self.known();
        UnsyncedFile { identity, mount: mount.clone().unwrap_or_default(), boottime_s: *boottime_s }
    }

    /// Returns the identity under which the bytes of `entry` are known to be right without reading them.
    pub(super) fn trusted_identity(&self, entry: &FileEntry) -> Option<FileIdentity> {
        let unsynced = || entry.unsynced().filter(|file| self.state(file) != MarkState::Foreign);
        entry.on_disk().or_else(|| unsynced().map(|file| file.identity))
    }

    /// Returns the greatest state of the marks of the selected files; `None` if none is marked.
    pub(super) fn greatest_state(&self, manifest: &Manifest, selection: &Selection) -> Option<MarkState> {
        manifest.selected(selection).filter_map(|(_, entry)| Some(self.state(entry.unsynced()?))).max()
    }

    /// Returns the selected files whose marks are in one of `states`.
    pub(super) fn marked<'a>(
        &'a self,
        manifest: &'a Manifest,
        selection: &'a Selection,
        states: &'a [MarkState],
    ) -> impl Iterator<Item = (&'a FilePath, &'a FileEntry)> {
        let is_one = |entry: &FileEntry| entry.unsynced().is_some_and(|file| states.contains(&self.state(file)));
        manifest.selected(selection).filter(move |(_, entry)| is_one(entry))
    }
}

impl Disk {
    /// Returns the present boot, mount and time.
    pub(super) fn current_mount(&self) -> CurrentMount<'_> {
        CurrentMount { disk: self, known: OnceCell::new() }
    }

    /// Returns true if a get may return before its files are durable, because the next user can trust the marks. On a
    /// network filesystem that user may be on another machine, which would have to hash the files.
    pub(crate) fn may_defer_sync(&self) -> bool {
        self.0.is_local && mount_id(self).is_some()
    }

    /// Records that this process published files of `key`.
    pub(super) fn add_pending_sync(&self, key: &ArtifactKey) {
        self.pending_sync_keys().insert(key.clone());
    }

    /// Removes and returns the artifacts that this process published and has not synced yet. A publication during the
    /// sync adds its artifact again.
    pub(super) fn take_pending_syncs(&self) -> BTreeSet<ArtifactKey> {
        std::mem::take(&mut self.pending_sync_keys())
    }

    /// Returns the lock that serializes the syncs of this process.
    pub(crate) fn sync_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.pending_syncs().turn
    }

    pub(super) fn pending_syncs(&self) -> &PendingSyncs {
        &self.0.pending_syncs
    }

    fn pending_sync_keys(&self) -> MutexGuard<'_, BTreeSet<ArtifactKey>> {
        self.pending_syncs().keys.lock()
    }
}

/// Returns the seconds since boot, including suspended time. This clock cannot be set. It starts again at each boot, so
/// only times under the same boot id can be compared.
fn boottime_s() -> u64 {
    clock_gettime(ClockId::Boottime).tv_sec.try_into().unwrap_or_default()
}

/// Returns 16 digits of a SHA-256 over the boot id and the filesystems of the cache; `None` if the kernel reports no
/// boot id.
fn mount_id(disk: &Disk) -> Option<String> {
    let boot = Some(boot_id()).filter(|boot| !boot.is_empty())?;
    let layout = disk.layout();
    let device = |path: &RootedPath| path.metadata().map(|metadata| metadata.dev()).ok();
    let devices = [layout.root(), &layout.blobs(), &layout.artifacts()].map(device);
    let filesystem = layout.root().filesystem().ok()?.f_fsid;
    let mut text = Vec::new();
    write!(text, "{boot}\0{devices:?}\0{filesystem}").ok()?;
    Some(Digest::of(&text).to_string()[..MOUNT_DIGITS].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};

    #[test]
    fn a_mark_is_trusted_in_its_boot_and_old_after_write_back() {
        let folder = tempfile::tempdir().expect("folder");
        let bounds = (ByteBound::Bytes(1 << 20), ByteBound::Bytes(0));
        let disk = Disk::open(&folder.path().join("cache"), bounds.0, bounds.1, Sharing::Off).expect("opens");
        let file = disk.current_mount().mark(FileIdentity { inode: 1, bytes: 2, mtime_ns: 3 });
        assert_eq!(disk.current_mount().state(&file), MarkState::Recent);
        let state = |mount: Option<&str>, boottime_s| {
            let known = OnceCell::from((mount.map(str::to_owned), boottime_s));
            CurrentMount { disk: &disk, known }.state(&UnsyncedFile {
                mount: "here".into(),
                boottime_s: 1000,
                ..file.clone()
            })
        };
        assert_eq!(state(Some("here"), 1000 + WRITE_BACK_S - 1), MarkState::Recent);
        assert_eq!(state(Some("here"), 1000 + WRITE_BACK_S), MarkState::Old);
        assert_eq!(state(Some("here"), 999), MarkState::Old, "a mark from the future");
        assert_eq!(state(Some("elsewhere"), 1000), MarkState::Foreign);
        assert_eq!(state(None, 1000), MarkState::Foreign, "no boot id is known");
    }
}
