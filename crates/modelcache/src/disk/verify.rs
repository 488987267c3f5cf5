//! `verify`: reads every held file in full and compares it with its digest, even if its identity is unchanged.
//!
//! This finds damage that acquiring a lease cannot detect: bytes that changed while size and mtime did not. A file with
//! a ladder is read part by part on all cores, two parts at a time on each, so that bad parts are reported by number. A
//! file that several artifacts share is read once. A wrong file is quarantined, and `held` is cleared, as when a lease
//! is acquired. The new identity of a right file is recorded. The time of last use stays, and nothing is evicted.
//!
//! If the caller wants it, reads bypass the page cache and leave it as it is.

use super::Disk;
use super::acquire::{Mismatch, is_shortage};
use super::files;
use super::hashing::{self, HashTask};
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::{Error, Result, Tier};
use crate::finding::{BadPart, Finding, Problem, VerifyReport};
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::{Ladder, PartHasher};
use crate::manifest::{FileEntry, FileIdentity, Manifest};
use crate::mutex::Mutex;
use crate::progress::Progress;
use crate::rate_limiter::RateLimiter;
use crate::selection::Selection;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, PoisonError};
use std::thread;

/// One verification: the state that all its artifacts share.
#[derive(Debug)]
pub(crate) struct VerifyRun {
    rate_limiter: RateLimiter,
    /// Number of threads that hash the files of one artifact.
    threads: usize,
    /// True if reads bypass the page cache.
    bypass_page_cache: bool,
    /// True once the caller no longer waits for the result.
    stopped: AtomicBool,
    /// Files with the right bytes: device, identity, digest.
    verified: Mutex<HashSet<(u64, FileIdentity, Digest)>>,
    /// Files with wrong bytes or read errors: device and inode.
    bad: Mutex<HashSet<(u64, u64)>>,
    /// The findings, by the key of each artifact that held the bad file. The artifact in whose verification the file
    /// was found bad is included. Each finding is reported when its artifact is verified, although the file is no
    /// longer held there and is not read again.
    shared: Mutex<HashMap<ArtifactKey, Vec<Finding>>>,
}

impl VerifyRun {
    /// Creates a run. With the limit `bytes_per_s`, one thread reads each artifact. Without a limit, several threads
    /// read it.
    pub(crate) fn new(bytes_per_s: Option<u64>, bypass_page_cache: bool) -> Self {
        let rate_limiter = RateLimiter::new(bytes_per_s);
        Self {
            threads: match bypass_page_cache {
                _ if rate_limiter.is_limited() => 1,
                true => hashing::threads_for_device_reads(),
                false => hashing::threads(),
            },
            rate_limiter,
            bypass_page_cache,
            stopped: AtomicBool::new(false),
            verified: Mutex::default(),
            bad: Mutex::default(),
            shared: Mutex::default(),
        }
    }

    /// Returns the rate limiter of all reads of this run.
    pub(crate) fn rate_limiter(&self) -> &RateLimiter {
        &self.rate_limiter
    }

    /// Stops the run, because the caller no longer waits for the result.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Accounts for `bytes` read, and sleeps as the rate limit requires. Returns false if the run was stopped.
    fn account(&self, bytes: u64, progress: &Progress) -> bool {
        self.rate_limiter.sleep(bytes, || self.is_stopped());
        progress.done(bytes);
        !self.is_stopped()
    }

    /// Returns the digest of a file of `size` bytes, read in order. The result is wrong if the run was stopped
    /// meanwhile.
    fn digest_in_order(&self, file: &File, size: u64, progress: &Progress) -> io::Result<Digest> {
        if self.bypass_page_cache {
            hashing::bypass_page_cache(file);
        }
        hashing::in_order(file, size, |bytes| self.account(bytes, progress))
    }

    /// Returns true if this run has already found that the file has `digest`.
    fn is_verified(&self, device: u64, identity: FileIdentity, digest: Digest) -> bool {
        self.verified.lock().contains(&(device, identity, digest))
    }
}

/// An artifact, or a folder of an unknown artifact, to verify.
#[derive(Debug, Clone)]
pub(crate) enum VerifyItem {
    /// An artifact. Its manifest may be damaged.
    Artifact(ArtifactKey),
    /// A folder with a damaged manifest, whose key cannot be derived from the folder names.
    Nameless(RootedPath),
}

impl Disk {
    /// Returns every folder that has a manifest: the artifacts sorted by key, then those without a known key.
    pub(crate) fn verify_items(&self) -> Result<Vec<VerifyItem>> {
        let (mut keys, mut nameless) = (Vec::new(), Vec::new());
        for artifact in self.scan()? {
            match artifact.manifest.map(|manifest| manifest.key).or_else(|| artifact.dir.key()) {
                // Without a manifest no file is held.
                _ if files::stat(&artifact.dir.manifest())?.is_none() => {}
                Some(key) => keys.push(key),
                None => nameless.push(VerifyItem::Nameless(artifact.dir.path().clone())),
            }
        }
        keys.sort();
        Ok(keys.into_iter().map(VerifyItem::Artifact).chain(nameless).collect())
    }

    /// Returns the maximum number of bytes that a verification of the selected files of `key` reads.
    pub(crate) fn bytes_to_verify(&self, key: &ArtifactKey, selection: &Selection) -> Result<u64> {
        let manifest = self.shared_manifest(&self.layout().artifact(key))?;
        let held = manifest.iter().flat_map(|manifest| manifest.selected(selection));
        Ok(held.filter(|(_, entry)| entry.held.is_some()).map(|(_, entry)| entry.size).sum())
    }

    /// Verifies the selected files of `key` that are held; `None` if the artifact is not on this disk.
    ///
    /// A wrong file is quarantined and no longer held, unless the directory is read-only.
    pub(crate) fn verify(
        &self,
        key: &ArtifactKey,
        selection: &Selection,
        run: &VerifyRun,
        progress: &Progress,
    ) -> Result<Option<VerifyReport>> {
        let dir = self.layout().artifact(key);
        if files::stat(&dir.manifest())?.is_none() {
            return Ok(None);
        }
        let mut verified = VerifyReport::new(Some(key.clone()), key.to_string(), Tier::Disk);
        let Some(manifest) = self.shared_manifest(&dir)? else {
            verified.findings.push(damaged_manifest(&dir));
            return Ok(Some(verified));
        };
        let held = manifest.selected(selection).filter(|(_, entry)| entry.held.is_some());
        let files: Vec<_> = held.map(|(path, entry)| (path.clone(), entry.clone())).collect();
        let work = ArtifactWork {
            disk: self,
            dir: &dir,
            run,
            progress,
            queue: Mutex::new(Queue { files: files.into_iter(), ..Queue::default() }),
            opened: Condvar::new(),
            report: Mutex::new(verified),
        };
        let outcome = thread::scope(|scope| {
            // If a thread cannot be started, the other threads do its work.
            let start = |_| thread::Builder::new().spawn_scoped(scope, || work.hash_pieces()).ok();
            let threads: Vec<_> = (1..run.threads).map_while(start).collect();
            let ours = work.hash_pieces();
            let theirs = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(thread_panicked())));
            theirs.fold(ours, |first, next| first.and(next))
        });
        outcome?;
        let mut verified = work.report.into_inner();
        // Add the findings in shared files that were made while another artifact was verified.
        for finding in run.shared.lock().remove(key).unwrap_or_default() {
            if !verified.findings.iter().any(|known| known.path == finding.path) {
                verified.findings.push(finding);
            }
        }
        for finding in self.withdrawn_before(&manifest, selection)? {
            if !verified.findings.iter().any(|known| known.path == finding.path) {
                verified.findings.push(finding);
            }
        }
        verified.findings.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Some(verified))
    }

    /// Returns a finding for each selected file that was withdrawn by an earlier check and not downloaded again.
    ///
    /// A file that is not held counts as withdrawn if its digest is in quarantine, or if no file of the artifact is
    /// held. Otherwise it was never requested.
    fn withdrawn_before(&self, manifest: &Manifest, selection: &Selection) -> Result<Vec<Finding>> {
        let holds_nothing = manifest.files.values().all(|entry| entry.held.is_none());
        let mut quarantined = BTreeSet::new();
        for path in files::entries(&self.layout().quarantine())? {
            // The names in quarantine are `<digest>-<random>`.
            quarantined.extend(path.name().split_once('-').and_then(|(digest, _)| digest.parse::<Digest>().ok()));
        }
        let absent = manifest.selected(selection).filter(|(_, entry)| entry.held.is_none());
        let lost = absent
            .filter(|(_, entry)| holds_nothing || entry.sha256.is_some_and(|digest| quarantined.contains(&digest)));
        let finding = |(path, entry): (&FilePath, &FileEntry)| Finding {
            expected: entry.sha256,
            detail: Some("an earlier check found it damaged, and it was not downloaded since".into()),
            withdrawn: true,
            remedy: Some(format!(
                "`modelcache verify --repair` or a get downloads it again, if a source has it; `modelcache evict {}` drops it",
                manifest.key
            )),
            ..Finding::new(Some(path.clone()), Problem::Missing)
        };
        Ok(lost.map(finding).collect())
    }

    /// Returns the report for a folder with a damaged manifest and an unknown key.
    pub(crate) fn verify_nameless(&self, dir: &RootedPath) -> VerifyReport {
        let mut verified = VerifyReport::new(None, dir.to_string(), Tier::Disk);
        verified.findings.push(damaged_manifest(&ArtifactDir(dir.clone())));
        verified
    }

    /// Verifies the blobs that were not read as a file of an artifact: leftovers, and blobs whose views are copies.
    pub(crate) fn verify_blobs(&self, run: &VerifyRun, progress: &Progress) -> Result<VerifyReport> {
        let folder = self.layout().blobs();
        let mut verified = VerifyReport::new(None, folder.to_string(), Tier::Disk);
        let mut blobs = Vec::new();
        files::walk(&folder, &mut |path, _| {
            blobs.push(path.clone());
            Ok(())
        })?;
        for path in blobs {
            if run.is_stopped() {
                break;
            }
            self.verify_blob(&path, run, progress, &mut verified)?;
        }
        Ok(verified)
    }

    /// Verifies one blob, unless this run has read it before. Adds the result to `verified`.
    fn verify_blob(
        &self,
        path: &RootedPath,
        run: &VerifyRun,
        progress: &Progress,
        verified: &mut VerifyReport,
    ) -> Result<()> {
        let name = path.name();
        if name.starts_with(files::TEMPORARY_PREFIX) {
            return Ok(());
        }
        // The name of a blob is the expected digest.
        let Some(expected) = name.parse::<Digest>().ok().filter(|digest| self.layout().blob(digest) == *path) else {
            verified.findings.push(Finding {
                detail: Some(format!("{} is not a blob: it is not at the path of a SHA-256 digest", path)),
                remedy: Some("remove it; modelcache did not create it and does not use it".into()),
                ..Finding::new(None, Problem::WrongBytes)
            });
            return Ok(());
        };
        let Some(file) = files::absent(path.open(false)).at("open", path)? else { return Ok(()) };
        let metadata = Metadata::of(&file).at("examine", path)?;
        // Skip files that this run has already read through a view.
        let is_reported = run.bad.lock().contains(&metadata.device_and_inode());
        if is_reported || run.is_verified(metadata.dev(), metadata.identity(), expected) {
            return Ok(());
        }
        verified.files += 1;
        verified.bytes += metadata.len();
        let found = match run.digest_in_order(&file, metadata.len(), progress) {
            Ok(found) if found == expected || run.is_stopped() => return Ok(()),
            Ok(found) => Some(found),
            Err(_) => None,
        };
        self.count_corrupt(Some(expected), metadata.len());
        if !self.is_read_only() {
            self.quarantine_inode(&expected, metadata.ino())?;
        }
        let problem = if found.is_some() { Problem::WrongBytes } else { Problem::Unreadable };
        verified.findings.push(Finding {
            expected: Some(expected),
            found,
            detail: Some(format!("the blob {}", path)),
            withdrawn: !self.is_read_only(),
            // No view is a link to this blob, and the blob is in quarantine. Nothing is left to repair, so the finding
            // counts as repaired.
            repaired_from: (!self.is_read_only()).then_some(Tier::Disk),
            ..Finding::new(None, problem)
        });
        Ok(())
    }

    /// Hashes a file within the rate limit of `run`; `None` if the file is missing or the run was stopped.
    pub(crate) fn hash_rate_limited(&self, path: &RootedPath, run: &VerifyRun) -> Result<Option<Digest>> {
        let Some(file) = files::absent(path.open(false)).at("open", path)? else { return Ok(None) };
        let size = Metadata::of(&file).at("examine", path)?.len();
        let digest = run.digest_in_order(&file, size, &Progress::new()).at("read", path)?;
        Ok((!run.is_stopped()).then_some(digest))
    }

    /// Leases the artifact without changing its time of last use. Returns the manifest, the folder and the lease;
    /// `None` if the artifact is not on this disk or is being evicted.
    pub(crate) fn lease_with_manifest(
        &self,
        key: &ArtifactKey,
    ) -> Result<Option<(Manifest, ArtifactDir, Option<FileLock>)>> {
        let dir = self.layout().artifact(key);
        if files::stat(&dir.manifest())?.is_none() {
            return Ok(None);
        }
        let Some(lease) = self.lease_for_reading(&dir)? else { return Ok(None) };
        Ok(self.read_manifest(&dir)?.map(|manifest| (manifest, dir, lease.0)))
    }

    /// Takes a shared lease; `None` if an eviction holds the exclusive lease for too long.
    fn lease_for_reading(&self, dir: &ArtifactDir) -> Result<Option<Lease>> {
        match FileLock::wait_shared(&self.layout().lease_lock(dir)) {
            // A read-only directory may have no lock file that can be opened. Then read without a lease.
            Err(_) if self.is_read_only() => Ok(Some(Lease(None))),
            lease => Ok(lease?.map(|lease| Lease(Some(lease)))),
        }
    }
}

/// A shared lease. `None` if the directory is read-only and its lock file cannot be opened.
struct Lease(Option<FileLock>);

fn thread_panicked() -> Error {
    Error::new(crate::ErrorKind::Other, "a verification thread panicked")
}

/// Returns the finding for the damaged manifest of `dir`.
fn damaged_manifest(dir: &ArtifactDir) -> Finding {
    Finding {
        detail: Some(dir.manifest().to_string()),
        withdrawn: true,
        remedy: Some("get or put the artifact again; its blobs are reused by digest, or swept".into()),
        ..Finding::new(None, Problem::DamagedManifest)
    }
}

/// The verification of one artifact, shared by its threads.
struct ArtifactWork<'a> {
    disk: &'a Disk,
    dir: &'a ArtifactDir,
    run: &'a VerifyRun,
    progress: &'a Progress,
    queue: Mutex<Queue>,
    /// Notified when a thread has opened a file, or failed to.
    opened: Condvar,
    /// The findings and counts so far.
    report: Mutex<VerifyReport>,
}

/// The work that no thread has taken yet.
#[derive(Default)]
struct Queue {
    /// Files that no thread has opened yet.
    files: std::vec::IntoIter<(FilePath, FileEntry)>,
    /// Files with parts that no thread has taken yet, and the next part of each.
    open: Vec<(Arc<HashingFile>, u64)>,
    /// Number of threads that are opening a file.
    opening: usize,
}

/// When dropped, ends the count of a thread in [`Queue::opening`] and wakes the idle threads.
struct OpeningGuard<'work>(&'work ArtifactWork<'work>);

impl Drop for OpeningGuard<'_> {
    fn drop(&mut self) {
        self.0.queue.lock().opening -= 1;
        self.0.opened.notify_all();
    }
}

/// An open file that is being hashed.
struct HashingFile {
    path: FilePath,
    entry: FileEntry,
    file: File,
    device: u64,
    /// The identity of the file when it was opened.
    identity: FileIdentity,
    /// Number of parts that are verified separately; 1 for a file without a ladder.
    parts: u64,
    /// Number of parts that are not hashed yet.
    parts_left: AtomicU64,
    /// The results of the parts hashed so far.
    results: Mutex<PartResults>,
}

/// The results of the hashed parts of one file.
#[derive(Default)]
struct PartResults {
    /// Numbers of the parts that are wrong or could not be read.
    bad: BTreeSet<u64>,
    /// The digest of the whole file, if it was read in order.
    found: Option<Digest>,
    /// The first read error.
    read_error: Option<io::Error>,
}

impl HashingFile {
    /// Returns the ladder if the parts are verified separately.
    fn ladder(&self) -> Option<&Ladder> {
        self.entry.ladder.as_ref().filter(|_| self.parts > 1)
    }
}

/// A part of a file or, if the file has no ladder, the whole file.
struct Piece {
    hashing: Arc<HashingFile>,
    part: u64,
}

impl AsRef<File> for Piece {
    fn as_ref(&self) -> &File {
        &self.hashing.file
    }
}

impl ArtifactWork<'_> {
    /// Hashes pieces, two at a time, until the queue is empty.
    fn hash_pieces(&self) -> Result<()> {
        hashing::in_pairs(
            || Ok(self.next()?.map(hash_task)),
            |bytes| self.run.account(bytes, self.progress),
            |piece, hashed| self.finish_piece(&piece, hashed),
        )
    }

    /// Returns the next piece to hash; `None` when none is left. Opens the next file when all pieces of the open files
    /// are taken.
    fn next(&self) -> Result<Option<Piece>> {
        let mut queue = self.queue.lock();
        loop {
            if self.run.is_stopped() {
                return Ok(None);
            }
            // First choice: a part of a file that is already open.
            if let Some((open, next)) = queue.open.last_mut() {
                let piece = Piece { hashing: open.clone(), part: *next };
                *next += 1;
                if *next == open.parts {
                    queue.open.pop();
                }
                return Ok(Some(piece));
            }
            // Second choice: open the next file. If there is none, wait for the parts of a file that another thread is
            // opening.
            let Some((path, entry)) = queue.files.next() else {
                if queue.opening == 0 {
                    return Ok(None);
                }
                queue = self.opened.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.opening += 1;
            // Release the queue: opening may parse the manifest again, which takes long if it is large.
            drop(queue);
            let opening = OpeningGuard(self);
            if let Some(open) = self.open(path, entry)? {
                self.queue.lock().open.push((Arc::new(open), 0));
            }
            drop(opening);
            queue = self.queue.lock();
        }
    }

    /// Records the result of one piece. With the last piece of a file, finishes the file.
    fn finish_piece(&self, piece: &Piece, hashed: io::Result<PartHasher>) -> Result<()> {
        let Piece { hashing: open, part } = piece;
        let mut results = open.results.lock();
        let holds = match (hashed, open.ladder()) {
            // With a ladder, the state after the part must be the next checkpoint; after the last part, the digest.
            (Ok(hasher), Some(ladder)) => ladder.holds(*part, open.entry.sha256, hasher),
            (Ok(hasher), None) => {
                results.found = Some(hasher.finish());
                results.found == open.entry.sha256
            }
            (Err(error), _) => {
                results.read_error.get_or_insert(error);
                false
            }
        };
        if !holds {
            results.bad.insert(*part);
        }
        drop(results);
        match open.parts_left.fetch_sub(1, Ordering::AcqRel) {
            1 if !self.run.is_stopped() => self.finish_file(open),
            _ => Ok(()),
        }
    }

    /// Opens a view under a lease; `None` if its bytes need not be read.
    fn open(&self, path: FilePath, entry: FileEntry) -> Result<Option<HashingFile>> {
        // The lease is held while the file is opened, not while it is read: an open file keeps its bytes when it is
        // evicted, and no eviction has to wait for the verification.
        let Some(_lease) = self.disk.lease_for_reading(self.dir)? else { return Ok(None) };
        if !self.is_still_held(&path, &entry)? {
            return Ok(None);
        }
        let view = self.dir.view(&path);
        let opened = view.open(false);
        // Too many files are open, or memory is short. This says nothing about the file.
        if opened.as_ref().is_err_and(is_shortage) {
            return opened.at("open", &view).map(|_| None);
        }
        self.report.lock().files += 1;
        let file = match opened {
            Ok(file) => file,
            // This user may not read the file. Its bytes may be right, so it stays held for other users.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.report.lock().findings.push(Finding {
                    expected: entry.sha256,
                    detail: Some(error.to_string()),
                    remedy: Some("its owner or root can make it readable, or remove it".into()),
                    ..Finding::new(Some(path.clone()), Problem::Unreadable)
                });
                return Ok(None);
            }
            // The view is missing or is not a regular file. Any other error counts as missing as well.
            Err(_) => {
                self.record(&path, &entry, Mismatch::Missing, Finding::new(Some(path.clone()), Problem::Missing))?;
                return Ok(None);
            }
        };
        let metadata = Metadata::of(&file).at("examine", &view)?;
        let (device, identity) = (metadata.dev(), metadata.identity());
        // Another artifact shares the file, which was already found to have the right bytes.
        if entry.on_disk() == Some(identity)
            && entry.sha256.is_some_and(|digest| self.run.is_verified(device, identity, digest))
        {
            self.progress.done(entry.size);
            return Ok(None);
        }
        // A file of another size is read in order, because the ladder does not fit it.
        let ladder = entry.ladder.as_ref().filter(|ladder| metadata.len() == entry.size && ladder.fits(entry.size));
        let parts = ladder.map_or(1, |ladder| entry.size.div_ceil(ladder.part_size())).max(1);
        let parts_left = AtomicU64::new(parts);
        if self.run.bypass_page_cache {
            hashing::bypass_page_cache(&file);
        }
        Ok(Some(HashingFile { path, entry, file, device, identity, parts, parts_left, results: Mutex::default() }))
    }

    /// Returns true if the manifest still lists the file as held. It does not after an eviction, or if another process
    /// found the file wrong when it acquired a lease.
    fn is_still_held(&self, path: &FilePath, entry: &FileEntry) -> Result<bool> {
        let manifest = self.disk.shared_manifest(self.dir)?;
        let now = manifest.as_ref().and_then(|manifest| manifest.files.get(path));
        Ok(now.is_some_and(|now| now.held.is_some() && now.sha256 == entry.sha256))
    }

    /// Evaluates a file after all its parts were hashed: records the file as right, or withdraws and reports it.
    fn finish_file(&self, open: &HashingFile) -> Result<()> {
        let (path, entry) = (&open.path, &open.entry);
        let view = self.dir.view(path);
        let now = Metadata::of(&open.file).at("examine", &view)?.identity();
        self.report.lock().bytes += open.identity.bytes;
        let mut results = std::mem::take(&mut *open.results.lock());
        if !results.bad.is_empty() && results.found.is_none() && results.read_error.is_none() {
            // Parts do not match the ladder. The ladder may be wrong and the file right, so hash the whole file in
            // order.
            match self.run.digest_in_order(&open.file, open.identity.bytes, &Progress::new()) {
                Ok(found) => results.found = Some(found),
                Err(error) => results.read_error = Some(error),
            }
        }
        if self.run.is_stopped() {
            return Ok(());
        }
        if results.bad.is_empty() || (results.read_error.is_none() && results.found == entry.sha256) {
            // The digest is right.
            if let Some(digest) = entry.sha256 {
                self.run.verified.lock().insert((open.device, now, digest));
            }
            return self.confirm(open, now);
        }
        let mut finding = Finding {
            expected: entry.sha256,
            found: results.found,
            detail: results.read_error.as_ref().map(ToString::to_string),
            ..Finding::new(Some(path.clone()), problem(open, &results))
        };
        if let Some(ladder) = open.ladder() {
            let bad = results.bad.iter().map(|part| BadPart::new(*part, ladder.part_size(), entry.size));
            finding.bad_parts = bad.collect();
        }
        self.run.bad.lock().insert((open.device, open.identity.inode));
        // Record the finding under a lease, if the file is still held.
        let file = open.file.try_clone().at("examine", &view)?;
        let Some(_lease) = self.disk.lease_for_reading(self.dir)? else { return Ok(()) };
        if self.is_still_held(path, entry)? {
            self.record(path, entry, Mismatch::Wrong(file), finding)?;
        }
        Ok(())
    }

    /// Records the identity of a file that was found right, if it differs from the recorded one.
    fn confirm(&self, open: &HashingFile, now: FileIdentity) -> Result<()> {
        if open.entry.on_disk() == Some(now) || self.disk.is_read_only() {
            return Ok(());
        }
        let Some(_lease) = self.disk.lease_for_reading(self.dir)? else { return Ok(()) };
        // The view may have been replaced since it was opened.
        let present = files::stat(&self.dir.view(&open.path))?.map(|metadata| metadata.identity());
        if present == Some(now) && self.is_still_held(&open.path, &open.entry)? {
            self.disk.record_mismatch(self.dir, &open.path, &open.entry, Mismatch::Right(now))?;
        }
        Ok(())
    }

    /// Withdraws a bad file from this artifact and from all that share it, and reports it. The caller holds the lease.
    fn record(&self, path: &FilePath, entry: &FileEntry, mismatch: Mismatch, finding: Finding) -> Result<()> {
        let mut finding = Finding { expected: entry.sha256, ..finding };
        if self.disk.is_read_only() {
            if matches!(mismatch, Mismatch::Wrong(_)) {
                self.disk.count_corrupt(entry.sha256, entry.size);
            }
            finding.remedy = Some("the directory is read-only: the file can be neither withdrawn nor repaired".into());
        } else {
            let withdrawn = self.disk.record_mismatch(self.dir, path, entry, mismatch)?;
            finding.withdrawn = true;
            // Name the other artifacts that shared the file.
            let others = withdrawn.iter().filter(|(key, _)| self.disk.layout().artifact(key) != *self.dir);
            let others: BTreeSet<String> = others.map(|(key, _)| key.to_string()).collect();
            if !others.is_empty() {
                let names = others.into_iter().collect::<Vec<_>>().join(", ");
                finding.detail.get_or_insert_with(|| format!("the same file was withdrawn from {names}, too"));
            }
            // The reports of those artifacts list the finding as well.
            let mut shared = self.run.shared.lock();
            for (key, path) in withdrawn {
                shared.entry(key).or_default().push(Finding { path: Some(path), ..finding.clone() });
            }
        }
        self.report.lock().findings.push(finding);
        Ok(())
    }
}

/// Returns the task that hashes a piece, from the checkpoint at its start.
fn hash_task(piece: Piece) -> HashTask<Piece> {
    let (part, bytes) = (piece.part, piece.hashing.identity.bytes);
    match piece.hashing.ladder().and_then(|ladder| Some((ladder.range(part, bytes), ladder.hasher(part)?))) {
        Some((range, hasher)) => HashTask::new(piece, range, hasher),
        None => HashTask::whole(piece, bytes),
    }
}

/// Returns the kind of problem to report for a bad file.
fn problem(open: &HashingFile, results: &PartResults) -> Problem {
    match &results.read_error {
        Some(_) => Problem::Unreadable,
        None if open.identity.bytes != open.entry.size => Problem::WrongSize,
        None => Problem::WrongBytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};
    use crate::manifest::{FileDetails, HeldIdentity, Shape};

    const FILES: usize = 5000;

    /// Creates a directory with one artifact of many files, all of them links to one blob.
    fn many_files(root: &std::path::Path) -> (Disk, ArtifactKey) {
        let disk = Disk::open(root, ByteBound::Bytes(1 << 30), ByteBound::Bytes(0), Sharing::Off).expect("opens");
        let key = ArtifactKey::bare("team/many@1").expect("key");
        let (digest, dir) = (Digest::of(b"content"), disk.layout().artifact(&key));
        let blob = disk.layout().blob(&digest);
        std::fs::create_dir_all(blob.parent().expect("a folder").full()).expect("makes");
        std::fs::create_dir_all(dir.files().full()).expect("makes");
        std::fs::write(blob.full(), "content").expect("writes");
        let held = Some(HeldIdentity::Disk(blob.metadata().expect("examines").identity()));
        let mut manifest = Manifest::new(key.clone(), Shape::Tree);
        for number in 0..FILES {
            let path = FilePath::new(&format!("{number:05}.bin")).expect("path");
            blob.hard_link(&dir.view(&path)).expect("links");
            let details = FileDetails { sha256: Some(digest), held: held.clone(), ..FileDetails::default() };
            manifest.files.insert(path, FileEntry::with(7, details));
        }
        std::fs::write(dir.manifest().full(), manifest.to_bytes().expect("encodes")).expect("writes");
        (disk, key)
    }

    #[test]
    fn a_manifest_of_any_number_of_files_is_parsed_once_to_verify_them() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, key) = many_files(folder.path());
        let verify = || {
            let run = VerifyRun::new(None, false);
            let all = Selection::all();
            assert_eq!(disk.bytes_to_verify(&key, &all).expect("counts"), 7 * FILES as u64);
            let verified = disk.verify(&key, &all, &run, &Progress::new()).expect("verifies").expect("is on disk");
            assert_eq!((verified.files, verified.findings.len()), (FILES, 0));
        };
        verify();
        verify();
        assert_eq!(disk.0.manifests.parsed.load(Ordering::Relaxed), 1);
    }
}
