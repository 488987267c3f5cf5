//! Verifying: every held file is read in full and compared with its digest, whatever its metadata say.
//!
//! What lending cannot see is found here: bytes that changed while size and mtime did not. A file with a ladder is read
//! part by part on all cores, two parts at once on each, so that a bad part has a name. A file that several artifacts
//! share is read once. What is wrong is quarantined and uncommitted as lending would do it; nothing else is changed: no
//! last use is touched, and nothing is evicted.
//!
//! A lease is held while a file is opened and while a finding is recorded, not while the file is read: an open file stays
//! what it is, and no eviction has to wait for us. The medium is asked and not the kernel's memory, which stays as it is.

use super::Disk;
use super::acquire::{Mismatch, is_shortage};
use super::files;
use super::hashing::{self, Stretch};
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::{Error, Result, Tier};
use crate::finding::{BadPart, Finding, Problem, Verified};
use crate::key::{ArtifactKey, FilePath, Version, unescape};
use crate::ladder::{Ladder, PartHasher};
use crate::manifest::{FileEntry, FileIdentity, Manifest};
use crate::progress::Progress;
use crate::selection::Selection;
use crate::transfer::RateLimiter;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long an eviction that is at work on an artifact is waited for.
const LEASE_WAIT_MAX: Duration = Duration::from_secs(30);

/// What one verification shares over all its artifacts.
#[derive(Debug)]
pub(crate) struct VerifyRun {
    rate_limiter: RateLimiter,
    threads: usize,
    /// Whether the medium is asked, and not the kernel's memory.
    from_medium: bool,
    stopped: AtomicBool,
    /// Files that were found right: device, identity, digest.
    seen: Mutex<HashSet<(u64, FileIdentity, Digest)>>,
    /// Files that were found bad and had to stay: device and inode.
    bad: Mutex<HashSet<(u64, u64)>>,
    /// What was found in a file that other artifacts share, and is uncommitted there by now.
    shared: Mutex<HashMap<ArtifactKey, Vec<Finding>>>,
}

impl VerifyRun {
    /// At most `bytes_per_s`, on one thread then; else on all cores.
    pub(crate) fn new(bytes_per_s: Option<u64>, from_medium: bool) -> Self {
        let rate_limiter = RateLimiter::new(bytes_per_s);
        Self {
            threads: match from_medium {
                _ if rate_limiter.is_limited() => 1,
                true => hashing::threads_from_medium(),
                false => hashing::threads(),
            },
            rate_limiter,
            from_medium,
            stopped: AtomicBool::new(false),
            seen: Mutex::default(),
            bad: Mutex::default(),
            shared: Mutex::default(),
        }
    }

    /// The pace of everything that is read.
    pub(crate) fn rate_limiter(&self) -> &RateLimiter {
        &self.rate_limiter
    }

    /// Nobody waits for the outcome any more.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Bytes were read: waits as the pace demands. Whether anybody still waits for the outcome.
    fn took(&self, bytes: u64, progress: &Progress) -> bool {
        self.rate_limiter.sleep(bytes, || self.is_stopped());
        progress.done(bytes);
        !self.is_stopped()
    }

    /// The digest of a file of `size` bytes, read in order. Whatever, when nobody waits any more.
    fn in_order(&self, file: &File, size: u64, progress: &Progress) -> io::Result<Digest> {
        if self.from_medium {
            hashing::from_medium(file);
        }
        hashing::in_order(file, size, |bytes| self.took(bytes, progress))
    }

    fn was_right(&self, device: u64, identity: FileIdentity, digest: Digest) -> bool {
        lock(&self.seen).contains(&(device, identity, digest))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something in the directory that can be verified.
#[derive(Debug, Clone)]
pub(crate) enum VerifyItem {
    /// An artifact, its manifest readable or not.
    Artifact(ArtifactKey),
    /// A folder with a damaged manifest whose key its name does not tell.
    Nameless(RootedPath),
}

impl Disk {
    /// Everything that has a manifest, by name.
    pub(crate) fn stored(&self) -> Result<Vec<VerifyItem>> {
        let (mut keys, mut nameless) = (Vec::new(), Vec::new());
        for artifact in self.scan()? {
            match artifact.manifest.map(|manifest| manifest.key).or_else(|| self.key_of(&artifact.dir)) {
                _ if files::stat(&artifact.dir.manifest())?.is_none() => {}
                Some(key) => keys.push(key),
                None => nameless.push(VerifyItem::Nameless(artifact.dir.path().clone())),
            }
        }
        keys.sort();
        Ok(keys.into_iter().map(VerifyItem::Artifact).chain(nameless).collect())
    }

    /// The key whose folder this is, as far as names that were not cut tell.
    fn key_of(&self, dir: &ArtifactDir) -> Option<ArtifactKey> {
        let text = |path: &RootedPath| unescape(path.name());
        let key = ArtifactKey::new(text(&dir.path().parent()?)?.parse().ok()?, Version::new(&text(dir.path())?).ok()?);
        (self.layout().artifact(&key) == *dir).then_some(key)
    }

    /// Bytes that verifying what `selection` chooses of `key` reads at most.
    pub(crate) fn bytes_to_verify(&self, key: &ArtifactKey, selection: &Selection) -> Result<u64> {
        let manifest = self.shared_manifest(&self.layout().artifact(key))?;
        let held = manifest.iter().flat_map(|manifest| manifest.selected(selection));
        Ok(held.filter(|(_, entry)| entry.held.is_some()).map(|(_, entry)| entry.size).sum())
    }

    /// Reads what is held of `key` among what `selection` chooses; `None` if the artifact is not here.
    ///
    /// What is found wrong is not lent any more, unless nothing can be written here.
    pub(crate) fn verify(
        &self,
        key: &ArtifactKey,
        selection: &Selection,
        reading: &VerifyRun,
        progress: &Progress,
    ) -> Result<Option<Verified>> {
        let dir = self.layout().artifact(key);
        if files::stat(&dir.manifest())?.is_none() {
            return Ok(None);
        }
        let mut verified = Verified::new(Some(key.clone()), key.to_string(), Tier::Disk);
        let Some(manifest) = self.shared_manifest(&dir)? else {
            verified.findings.push(damaged_manifest(&dir));
            return Ok(Some(verified));
        };
        let held = manifest.selected(selection).filter(|(_, entry)| entry.held.is_some());
        let files: Vec<_> = held.map(|(path, entry)| (path.clone(), entry.clone())).collect();
        let work = ArtifactWork {
            disk: self,
            dir: &dir,
            reading,
            progress,
            queue: Mutex::new(Queue { files: files.into_iter(), ..Queue::default() }),
            opened: Condvar::new(),
            done: Mutex::new(verified),
        };
        let failed = thread::scope(|scope| {
            // Where a thread cannot be started, those that run do its share.
            let start = |_| thread::Builder::new().spawn_scoped(scope, || work.run()).ok();
            let threads: Vec<_> = (1..reading.threads).map_while(start).collect();
            let ours = work.run();
            let theirs = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(cut_short())));
            theirs.fold(ours, |first, next| first.and(next))
        });
        failed?;
        let mut verified = work.done.into_inner().unwrap_or_else(PoisonError::into_inner);
        for finding in lock(&reading.shared).remove(key).unwrap_or_default() {
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

    /// Files that an earlier check took out of service and that were not fetched since: what failed lies in quarantine,
    /// or nothing of the artifact is left. Files that nobody asked for are none of them.
    fn withdrawn_before(&self, manifest: &Manifest, selection: &Selection) -> Result<Vec<Finding>> {
        let nothing_left = manifest.files.values().all(|entry| entry.held.is_none());
        let mut quarantined = BTreeSet::new();
        for path in files::entries(&self.layout().quarantine())? {
            quarantined.extend(path.name().split_once('-').and_then(|(digest, _)| digest.parse::<Digest>().ok()));
        }
        let absent = manifest.selected(selection).filter(|(_, entry)| entry.held.is_none());
        let lost = absent
            .filter(|(_, entry)| nothing_left || entry.sha256.is_some_and(|digest| quarantined.contains(&digest)));
        let finding = |(path, entry): (&FilePath, &FileEntry)| Finding {
            expected: entry.sha256,
            detail: Some("it was taken out of service before, and has not come back".into()),
            withdrawn: true,
            remedy: Some(format!(
                "`modelcache verify --repair` or a get fetches it, where a source has it; `modelcache evict {}` gives it up",
                manifest.key
            )),
            ..Finding::new(Some(path.clone()), Problem::Missing)
        };
        Ok(lost.map(finding).collect())
    }

    /// What there is to say of a folder whose manifest tells nothing.
    pub(crate) fn verify_nameless(&self, dir: &RootedPath) -> Verified {
        let mut verified = Verified::new(None, dir.to_string(), Tier::Disk);
        verified.findings.push(damaged_manifest(&ArtifactDir(dir.clone())));
        verified
    }

    /// Reads the blobs that no artifact's file led to: leftovers, copies beside files with bytes of their own.
    pub(crate) fn verify_blobs(&self, reading: &VerifyRun, progress: &Progress) -> Result<Verified> {
        let folder = self.layout().blobs();
        let mut verified = Verified::new(None, folder.to_string(), Tier::Disk);
        let mut blobs = Vec::new();
        files::walk(&folder, &mut |path, _| {
            blobs.push(path.clone());
            Ok(())
        })?;
        for path in blobs {
            if reading.is_stopped() {
                break;
            }
            self.verify_blob(&path, reading, progress, &mut verified)?;
        }
        Ok(verified)
    }

    fn verify_blob(
        &self,
        path: &RootedPath,
        reading: &VerifyRun,
        progress: &Progress,
        verified: &mut Verified,
    ) -> Result<()> {
        let name = path.name();
        if name.starts_with(files::TEMPORARY) {
            return Ok(());
        }
        let Some(expected) = name.parse::<Digest>().ok().filter(|digest| self.layout().blob(digest) == *path) else {
            verified.findings.push(Finding {
                detail: Some(format!("{} is no blob: its name is no digest", path)),
                remedy: Some("remove it; modelcache did not make it, and leaves it alone".into()),
                ..Finding::new(None, Problem::WrongBytes)
            });
            return Ok(());
        };
        let Some(file) = files::absent(path.open(false)).at("open", path)? else { return Ok(()) };
        let metadata = Metadata::of(&file).at("look at", path)?;
        let is_told = lock(&reading.bad).contains(&metadata.device_and_inode());
        if is_told || reading.was_right(metadata.dev(), metadata.identity(), expected) {
            return Ok(());
        }
        verified.files += 1;
        verified.bytes += metadata.len();
        let found = match reading.in_order(&file, metadata.len(), progress) {
            Ok(found) if found == expected || reading.is_stopped() => return Ok(()),
            Ok(found) => Some(found),
            Err(_) => None,
        };
        if !self.is_read_only() {
            self.quarantine_inode(&expected, metadata.ino())?;
        }
        let problem = if found.is_some() { Problem::WrongBytes } else { Problem::Unreadable };
        verified.findings.push(Finding {
            expected: Some(expected),
            found,
            detail: Some(format!("the blob {}", path)),
            withdrawn: !self.is_read_only(),
            // Nobody is served from it, and nobody will be.
            repaired_from: (!self.is_read_only()).then_some(Tier::Disk),
            ..Finding::new(None, problem)
        });
        Ok(())
    }

    /// The digest of a file that is only read; `None` if it is gone, or nobody waits any more.
    pub(crate) fn hash_rate_limited(&self, path: &RootedPath, reading: &VerifyRun) -> Result<Option<Digest>> {
        let Some(file) = files::absent(path.open(false)).at("open", path)? else { return Ok(None) };
        let size = Metadata::of(&file).at("look at", path)?.len();
        let digest = reading.in_order(&file, size, &Progress::new()).at("read", path)?;
        Ok((!reading.is_stopped()).then_some(digest))
    }

    /// The artifact as it is here, held against eviction; its last use stays what it was. `None` if it is not here, or
    /// just being evicted.
    pub(crate) fn hold(&self, key: &ArtifactKey) -> Result<Option<(Manifest, ArtifactDir, Option<FileLock>)>> {
        let dir = self.layout().artifact(key);
        if files::stat(&dir.manifest())?.is_none() {
            return Ok(None);
        }
        let Some(lease) = self.lease_for_reading(&dir)? else { return Ok(None) };
        Ok(self.read_manifest(&dir)?.map(|manifest| (manifest, dir, lease.0)))
    }

    /// A shared lease, or none where a read-only directory has no lock to take; the outer `None` while an eviction is at
    /// work for too long.
    fn lease_for_reading(&self, dir: &ArtifactDir) -> Result<Option<Lease>> {
        let started = Instant::now();
        loop {
            match FileLock::try_shared(&self.layout().lease(dir)) {
                Ok(Some(lease)) => return Ok(Some(Lease(Some(lease)))),
                Ok(None) if started.elapsed() > LEASE_WAIT_MAX => return Ok(None),
                Ok(None) => thread::sleep(Duration::from_millis(2)),
                Err(_) if self.is_read_only() => return Ok(Some(Lease(None))),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A lease, where there is a lock to take.
struct Lease(Option<FileLock>);

fn cut_short() -> Error {
    Error::new(crate::ErrorKind::Other, "verifying was cut short")
}

fn damaged_manifest(dir: &ArtifactDir) -> Finding {
    Finding {
        detail: Some(dir.manifest().to_string()),
        withdrawn: true,
        remedy: Some("get or put the artifact again; what is left of it is found by digest, or swept".into()),
        ..Finding::new(None, Problem::DamagedManifest)
    }
}

/// One artifact's files on their way through the threads.
struct ArtifactWork<'a> {
    disk: &'a Disk,
    dir: &'a ArtifactDir,
    reading: &'a VerifyRun,
    progress: &'a Progress,
    queue: Mutex<Queue>,
    /// Notified when a thread has opened a file, or failed to.
    opened: Condvar,
    done: Mutex<Verified>,
}

#[derive(Default)]
struct Queue {
    files: std::vec::IntoIter<(FilePath, FileEntry)>,
    /// Files with parts that no thread has taken yet, and the next part of each.
    open: Vec<(Arc<HashingFile>, u64)>,
    /// Threads that are opening a file.
    opening: usize,
}

/// A thread that is opening a file; the others wait for the parts of that file.
struct OpeningGuard<'work>(&'work ArtifactWork<'work>);

impl Drop for OpeningGuard<'_> {
    fn drop(&mut self) {
        lock(&self.0.queue).opening -= 1;
        self.0.opened.notify_all();
    }
}

/// A file that is being read.
struct HashingFile {
    path: FilePath,
    entry: FileEntry,
    file: File,
    device: u64,
    identity: FileIdentity,
    /// Parts that are checked alone, or 1.
    parts: u64,
    /// Parts whose check is not done.
    left: AtomicU64,
    /// What was found so far.
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    bad: BTreeSet<u64>,
    /// The whole file's digest, where it was read in order.
    found: Option<Digest>,
    trouble: Option<io::Error>,
}

impl HashingFile {
    /// The ladder, where parts are checked alone.
    fn ladder(&self) -> Option<&Ladder> {
        self.entry.ladder.as_ref().filter(|_| self.parts > 1)
    }
}

/// A part of a file, or the whole of it.
struct Piece {
    open: Arc<HashingFile>,
    part: u64,
}

impl AsRef<File> for Piece {
    fn as_ref(&self) -> &File {
        &self.open.file
    }
}

impl ArtifactWork<'_> {
    /// Takes pieces until there are none.
    fn run(&self) -> Result<()> {
        hashing::in_pairs(
            || Ok(self.next()?.map(stretch)),
            |bytes| self.reading.took(bytes, self.progress),
            |piece, hashed| self.is_read(&piece, hashed),
        )
    }

    fn next(&self) -> Result<Option<Piece>> {
        let mut queue = lock(&self.queue);
        loop {
            if self.reading.is_stopped() {
                return Ok(None);
            }
            if let Some((open, next)) = queue.open.last_mut() {
                let piece = Piece { open: open.clone(), part: *next };
                *next += 1;
                if *next == open.parts {
                    queue.open.pop();
                }
                return Ok(Some(piece));
            }
            let Some((path, entry)) = queue.files.next() else {
                if queue.opening == 0 {
                    return Ok(None);
                }
                queue = self.opened.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.opening += 1;
            // Opening may parse the manifest again, which takes long where it is large.
            drop(queue);
            let opening = OpeningGuard(self);
            if let Some(open) = self.open(path, entry)? {
                lock(&self.queue).open.push((Arc::new(open), 0));
            }
            drop(opening);
            queue = lock(&self.queue);
        }
    }

    /// One piece was read; the last of a file lets it be judged.
    fn is_read(&self, piece: &Piece, hashed: io::Result<PartHasher>) -> Result<()> {
        let Piece { open, part } = piece;
        let mut seen = lock(&open.seen);
        let holds = match (hashed, open.ladder()) {
            (Ok(hasher), Some(ladder)) => ladder.holds(*part, open.entry.sha256, hasher),
            (Ok(hasher), None) => {
                seen.found = Some(hasher.finish());
                seen.found == open.entry.sha256
            }
            (Err(error), _) => {
                seen.trouble.get_or_insert(error);
                false
            }
        };
        if !holds {
            seen.bad.insert(*part);
        }
        drop(seen);
        match open.left.fetch_sub(1, Ordering::AcqRel) {
            1 if !self.reading.is_stopped() => self.conclude(open),
            _ => Ok(()),
        }
    }

    /// Opens a view under a lease; `None` where there is nothing more to find out.
    fn open(&self, path: FilePath, entry: FileEntry) -> Result<Option<HashingFile>> {
        let Some(_lease) = self.disk.lease_for_reading(self.dir)? else { return Ok(None) };
        if !self.is_still_held(&path, &entry)? {
            return Ok(None);
        }
        let view = self.dir.view(&path);
        let opened = view.open(false);
        if opened.as_ref().is_err_and(is_shortage) {
            return opened.at("open", &view).map(|_| None);
        }
        lock(&self.done).files += 1;
        let file = match opened {
            Ok(file) => file,
            // The file may be right: it stays in service for those who may read it.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                lock(&self.done).findings.push(Finding {
                    expected: entry.sha256,
                    detail: Some(error.to_string()),
                    remedy: Some("its owner or root can make it readable, or remove it".into()),
                    ..Finding::new(Some(path.clone()), Problem::Unreadable)
                });
                return Ok(None);
            }
            Err(_) => {
                self.record(&path, &entry, Mismatch::Missing, Finding::new(Some(path.clone()), Problem::Missing))?;
                return Ok(None);
            }
        };
        let metadata = Metadata::of(&file).at("look at", &view)?;
        let (device, identity) = (metadata.dev(), metadata.identity());
        if entry.on_disk() == Some(identity)
            && entry.sha256.is_some_and(|digest| self.reading.was_right(device, identity, digest))
        {
            self.progress.done(entry.size);
            return Ok(None);
        }
        let ladder = entry.ladder.as_ref().filter(|ladder| metadata.len() == entry.size && ladder.fits(entry.size));
        let parts = ladder.map_or(1, |ladder| entry.size.div_ceil(ladder.part_size())).max(1);
        let left = AtomicU64::new(parts);
        if self.reading.from_medium {
            hashing::from_medium(&file);
        }
        Ok(Some(HashingFile { path, entry, file, device, identity, parts, left, seen: Mutex::default() }))
    }

    /// Whether the manifest still says that this is held: an eviction may have been faster, or somebody who lent.
    fn is_still_held(&self, path: &FilePath, entry: &FileEntry) -> Result<bool> {
        let manifest = self.disk.shared_manifest(self.dir)?;
        let now = manifest.as_ref().and_then(|manifest| manifest.files.get(path));
        Ok(now.is_some_and(|now| now.held.is_some() && now.sha256 == entry.sha256))
    }

    /// Every part of a file was read: what that means.
    fn conclude(&self, open: &HashingFile) -> Result<()> {
        let (path, entry) = (&open.path, &open.entry);
        let view = self.dir.view(path);
        let now = Metadata::of(&open.file).at("look at", &view)?.identity();
        lock(&self.done).bytes += open.identity.bytes;
        let mut seen = std::mem::take(&mut *lock(&open.seen));
        if !seen.bad.is_empty() && seen.found.is_none() && seen.trouble.is_none() {
            // The ladder's word alone condemns nothing: it may be the ladder that is wrong.
            match self.reading.in_order(&open.file, open.identity.bytes, &Progress::new()) {
                Ok(found) => seen.found = Some(found),
                Err(error) => seen.trouble = Some(error),
            }
        }
        if self.reading.is_stopped() {
            return Ok(());
        }
        if seen.bad.is_empty() || (seen.trouble.is_none() && seen.found == entry.sha256) {
            if let Some(digest) = entry.sha256 {
                lock(&self.reading.seen).insert((open.device, now, digest));
            }
            return self.confirm(open, now);
        }
        let mut finding = Finding {
            expected: entry.sha256,
            found: seen.found,
            detail: seen.trouble.as_ref().map(ToString::to_string),
            ..Finding::new(Some(path.clone()), problem(open, &seen))
        };
        if let Some(ladder) = open.ladder() {
            let bad = seen.bad.iter().map(|part| BadPart::new(*part, ladder.part_size(), entry.size));
            finding.bad_parts = bad.collect();
        }
        lock(&self.reading.bad).insert((open.device, open.identity.inode));
        let file = open.file.try_clone().at("look at", &view)?;
        let Some(_lease) = self.disk.lease_for_reading(self.dir)? else { return Ok(()) };
        if self.is_still_held(path, entry)? {
            self.record(path, entry, Mismatch::Wrong(file), finding)?;
        }
        Ok(())
    }

    /// The bytes are right; that they lie in another file than was recorded is put down.
    fn confirm(&self, open: &HashingFile, now: FileIdentity) -> Result<()> {
        if open.entry.on_disk() == Some(now) || self.disk.is_read_only() {
            return Ok(());
        }
        let Some(_lease) = self.disk.lease_for_reading(self.dir)? else { return Ok(()) };
        let lies_there = files::stat(&self.dir.view(&open.path))?.map(|metadata| metadata.identity());
        if lies_there == Some(now) && self.is_still_held(&open.path, &open.entry)? {
            self.disk.record_mismatch(self.dir, &open.path, &open.entry, Mismatch::Right(now))?;
        }
        Ok(())
    }

    /// Takes a bad file out of service, here and wherever it is shared, and reports it. Under the lease.
    fn record(&self, path: &FilePath, entry: &FileEntry, mismatch: Mismatch, finding: Finding) -> Result<()> {
        let mut finding = Finding { expected: entry.sha256, ..finding };
        if self.disk.is_read_only() {
            finding.remedy = Some("nothing can be written here: it can be neither withdrawn nor mended".into());
        } else {
            let uncommitted = self.disk.record_mismatch(self.dir, path, entry, mismatch)?;
            finding.withdrawn = true;
            let others = uncommitted.iter().filter(|(key, _)| self.disk.layout().artifact(key) != *self.dir);
            let others: BTreeSet<String> = others.map(|(key, _)| key.to_string()).collect();
            if !others.is_empty() {
                let names = others.into_iter().collect::<Vec<_>>().join(", ");
                finding.detail.get_or_insert_with(|| format!("{names} had the same file, and has it no more"));
            }
            let mut shared = lock(&self.reading.shared);
            for (key, path) in uncommitted {
                shared.entry(key).or_default().push(Finding { path: Some(path), ..finding.clone() });
            }
        }
        lock(&self.done).findings.push(finding);
        Ok(())
    }
}

/// What is to be read of a piece.
fn stretch(piece: Piece) -> Stretch<Piece> {
    let (part, bytes) = (piece.part, piece.open.identity.bytes);
    match piece.open.ladder().and_then(|ladder| Some((ladder.range(part, bytes), ladder.hasher(part)?))) {
        Some((range, hasher)) => Stretch::new(piece, range, hasher),
        None => Stretch::whole(piece, bytes),
    }
}

fn problem(open: &HashingFile, seen: &Seen) -> Problem {
    match &seen.trouble {
        Some(_) => Problem::Unreadable,
        None if open.identity.bytes != open.entry.size => Problem::WrongSize,
        None => Problem::WrongBytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};
    use crate::manifest::{FileDetails, Held, Shape};

    const FILES: usize = 5000;

    /// A directory with one artifact of many files, all of them links to one blob.
    fn many_files(root: &std::path::Path) -> (Disk, ArtifactKey) {
        let disk = Disk::open(root, ByteBound::Bytes(1 << 30), ByteBound::Bytes(0), Sharing::Off).expect("opens");
        let key = ArtifactKey::bare("team/many@1").expect("key");
        let (digest, dir) = (Digest::of(b"content"), disk.layout().artifact(&key));
        let blob = disk.layout().blob(&digest);
        std::fs::create_dir_all(blob.parent().expect("a folder").full()).expect("makes");
        std::fs::create_dir_all(dir.files().full()).expect("makes");
        std::fs::write(blob.full(), "content").expect("writes");
        let held = Some(Held::Disk(blob.metadata().expect("is there").identity()));
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
            let reading = VerifyRun::new(None, false);
            let all = Selection::all();
            assert_eq!(disk.bytes_to_verify(&key, &all).expect("counts"), 7 * FILES as u64);
            let verified = disk.verify(&key, &all, &reading, &Progress::new()).expect("verifies").expect("is here");
            assert_eq!((verified.files, verified.findings.len()), (FILES, 0));
        };
        verify();
        verify();
        assert_eq!(disk.0.memo.parsed.load(Ordering::Relaxed), 1);
    }
}
