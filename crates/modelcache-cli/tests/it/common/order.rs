//! Consistency checks of a cache directory while no process works in it.
//!
//! The output of `ls`, `inspect` and `stats` is compared with the files themselves.

use super::{House, entries, files_below, text};
use modelcache_testkit::content::sha256;
use modelcache_testkit::folder::Census;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// SHA-256 of every file on disk, by reference and path.
pub type State = BTreeMap<String, BTreeMap<String, String>>;

impl House {
    /// Returns the files that `ls` and `inspect` report as on disk. Reads each file and asserts that its digest is the
    /// recorded one.
    #[track_caller]
    pub fn state(&self, dir: &str) -> State {
        self.listed(dir).into_iter().map(|reference| (reference.clone(), self.held_files(dir, &reference))).collect()
    }

    #[track_caller]
    fn held_files(&self, dir: &str, reference: &str) -> BTreeMap<String, String> {
        let inspection = self.on_local(dir).run(["inspect", "--json", reference]).object();
        let files = inspection["files"].as_array().unwrap();
        let held = files.iter().filter(|file| file["on_disk"] == true);
        let view = |file| self.views(dir, &inspection).join(text(file));
        held.map(|file| {
            let path = view(&file["path"]);
            let bytes = fs::read(&path).unwrap_or_else(|error| panic!("on disk, but {error}: {}", path.display()));
            let digest = sha256(&bytes);
            assert_eq!(text(&file["sha256"]), digest, "wrong bytes in {}", path.display());
            (text(&file["path"]), digest)
        })
        .collect()
    }

    /// Returns the folder of the views of an artifact.
    fn views(&self, dir: &str, inspection: &serde_json::Value) -> PathBuf {
        let (name, version) = (text(&inspection["name"]), text(&inspection["version"]));
        self.path(dir).join("artifacts").join(name.replace('/', "%2F")).join(version).join("files")
    }

    /// Asserts that `stats` counts exactly the bytes that the files take.
    #[track_caller]
    pub fn assert_counted(&self, dir: &str) {
        let stats = self.on_local(dir).run(["stats", "--json"]).object();
        let census = Census::of(&self.path(dir)).unwrap();
        assert_eq!(stats["used_bytes"], census.counted_bytes, "wrong count: {census:?}");
    }

    /// Asserts that nothing has leaked and that every view is a hard link to a blob.
    #[track_caller]
    pub fn assert_consistent(&self, dir: &str) {
        self.assert_nothing_leaked(dir);
        assert_views_are_blobs(&self.path(dir));
    }

    /// Asserts that the count is right, that no fill is left over, and that every blob and view belongs to an artifact.
    ///
    /// Leftovers without bytes of their own may stay until a sweep finds them old: links to blobs in the staging folder
    /// of a writer that was killed after its commit, and temporary files that a killed writer was about to rename.
    #[track_caller]
    pub fn assert_nothing_leaked(&self, dir: &str) {
        self.assert_counted(dir);
        let root = self.path(dir);
        let census = Census::of(&root).unwrap();
        assert!(census.stagings_with_bytes.is_empty(), "fills are left over: {census:?}");
        assert!(census.orphans.is_empty(), "unlinked blobs: {census:?}");
        assert!(census.loose_views.is_empty(), "views without a manifest: {census:?}");
        self.sweep(dir);
        let census = Census::of(&root).unwrap();
        assert!(census.stagings.is_empty(), "not swept: {census:?}");
        assert!(census.temporaries.is_empty(), "not swept: {census:?}");
        assert_eq!(fs::read_to_string(root.join("FORMAT")).unwrap(), "modelcache 1\n");
        assert!(fs::read_to_string(root.join("CACHEDIR.TAG")).unwrap().starts_with("Signature: "));
        assert_pending_uploads_have_artifacts(&root, &census);
        self.assert_counted(dir);
    }

    /// Makes all leftovers old enough to be swept, and runs a command that sweeps and recounts.
    #[track_caller]
    pub fn sweep(&self, dir: &str) {
        let old = FileTimes::new().set_modified(SystemTime::now() - Duration::from_secs(2 * 24 * 3600));
        let staging = self.path(dir).join("staging");
        for path in entries(&staging).into_iter().flat_map(|path| [entries(&path), vec![path]].concat()) {
            File::open(path).unwrap().set_times(old).unwrap();
        }
        spoil_record(&self.path(dir));
        self.on_local(dir).run(["stats"]).ok();
    }
}

/// Corrupts the budget record, as a crash during a change does. The next command then sweeps and recounts.
pub fn spoil_record(root: &Path) {
    let record = root.join("locks/budget");
    if record.exists() {
        fs::write(record, "spoilt").unwrap();
    }
}

/// Asserts that the artifact of every pending upload is on disk. Otherwise the upload could never complete.
#[track_caller]
fn assert_pending_uploads_have_artifacts(root: &Path, census: &Census) {
    for path in &census.pending_uploads {
        let intent: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let (name, version) = (text(&intent["name"]).replace('/', "%2F"), text(&intent["version"]));
        let manifest = root.join("artifacts").join(name).join(version).join("manifest.json");
        assert!(manifest.exists(), "no artifact for the pending upload {}: {intent}", path.display());
    }
}

/// Asserts that every view is a hard link to a blob.
#[track_caller]
fn assert_views_are_blobs(root: &Path) {
    let inode = |path: &PathBuf| fs::symlink_metadata(path).unwrap().ino();
    let below = |folder: &str| {
        let folder = root.join(folder);
        files_below(&folder).into_iter().map(|path| folder.join(path)).collect::<Vec<_>>()
    };
    let blobs: BTreeSet<u64> = below("blobs").iter().map(inode).collect();
    for view in below("artifacts").into_iter().filter(|path| path.components().any(|part| part.as_os_str() == "files"))
    {
        // A blob is shared and not executable, so an executable file has none.
        let is_executable = fs::symlink_metadata(&view).unwrap().mode() & 0o111 != 0;
        assert!(is_executable || blobs.contains(&inode(&view)), "{} is not a link to a blob", view.display());
    }
}
