//! Row for the first download of a model from the Hub to disk, through the redirect to its CDN.

use super::calls::CallTimes;
use super::large_file::large_file;
use super::{DEFAULTS, durable, progress, size};
use crate::comparison::{Entry, Line, best_peer, compare_to_disk, ours, table};
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess};
use crate::setup::{Setup, check_size, sync};
use crate::usage::{Usage, measure};
use anyhow::{Context, Result};
use modelcache_testkit::{Content, Hub};
use std::path::{Path, PathBuf};
use std::process::Command;

const REPO: &str = "bench/model";
const FILE: &str = "model.safetensors";
const FOLDER: &str = "hub";

/// A repository on a stand-in for the Hub, and the bench server as the CDN of the stand-in. The stand-in runs in this
/// process and only redirects.
pub(super) struct ServedRepo<'a> {
    pub(super) setup: &'a Setup,
    pub(super) hub: Hub,
    pub(super) cdn: ServerProcess,
    commit: String,
    bytes: u64,
}

impl<'a> ServedRepo<'a> {
    pub(super) fn start(setup: &'a Setup, bytes: u64) -> Result<Self> {
        Self::start_with_cdn(setup, bytes, ServerKind::Plain)
    }

    pub(super) fn start_with_cdn(setup: &'a Setup, bytes: u64, cdn: ServerKind) -> Result<Self> {
        let folder = setup.scratch.memory.join(FOLDER);
        std::fs::create_dir_all(folder.join("cdn"))?;
        let is_large_file = bytes == setup.sizes.file;
        let file = if is_large_file { large_file(setup)? } else { setup.scratch.data("hub/model", 1, bytes)? };
        let content = Content::on_disk(&file)?;
        // The Hub redirects to `cdn/<sha256>` on the server.
        std::fs::hard_link(&file, folder.join("cdn").join(content.sha256()?))?;
        let (hub, cdn) = (Hub::start_on(0)?, ServerProcess::start(&folder, cdn)?);
        hub.use_external_cdn(&format!("{}/cdn", cdn.url()));
        let commit = hub.repo(REPO).commit().file(FILE, content).publish()?;
        Ok(Self { setup, hub, cdn, commit, bytes })
    }

    fn ours(&'a self, setting: &str, durability: &'static str, change: fn(&mut Command) -> &mut Command) -> Entry<'a> {
        let run = move |folder: &Path| {
            let mut command = self.setup.modelcache(&folder.join("cache"));
            command.env("HF_ENDPOINT", self.hub.url());
            let (used, path) = self.setup.get(change(&mut command), &format!("hf://{REPO}"))?;
            check_size(&path.join(FILE), self.bytes)?;
            Ok(vec![used])
        };
        Entry::ours(setting, &[("", durability)], run)
    }

    fn peer(&'a self, workers: Option<u32>) -> Entry<'a> {
        let run = move |folder: &Path| {
            let used = self.snapshot(&self.hub.url(), folder, workers)?;
            Ok(vec![used, used.then(sync(&downloaded_file(folder)?)?)])
        };
        let setting = workers.map_or(DEFAULTS.to_owned(), |workers| format!("max_workers {workers}"));
        let steps = vec![("", "no"), (" + sync", "yes")];
        Entry { program: "huggingface_hub", setting, verified: "no", steps, run: Box::new(run) }
    }

    /// Measures `snapshot_download` of the repository from `endpoint` into `folder`.
    pub(super) fn snapshot(&self, endpoint: &str, folder: &Path, workers: Option<u32>) -> Result<Usage> {
        self.setup.peers.require("huggingface_hub")?;
        let mut command = self.script("hub_snapshot.py", folder);
        command.env("HF_ENDPOINT", endpoint);
        command.args([REPO]).arg(folder).args(workers.map(|workers| workers.to_string()));
        let used = measure(&mut command)?;
        check_size(&downloaded_file(folder)?, self.bytes)?;
        Ok(used)
    }

    /// Returns the URL of the file at `endpoint`, in its commit.
    pub(super) fn file_url(&self, endpoint: &str) -> String {
        format!("{endpoint}/{REPO}/resolve/{}/{FILE}", self.commit)
    }

    fn script(&self, name: &str, home: &Path) -> Command {
        let mut command = self.setup.peers.script(name);
        command.env("HF_ENDPOINT", self.hub.url()).env("HOME", home).env("HF_HUB_DISABLE_XET", "1");
        command.env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
        command
    }

    /// Downloads the file with `hf_hub_download` into a cache in `folder`.
    pub(super) fn fill_peer_cache(&self, folder: &Path) -> Result<()> {
        measure(&mut self.peer_script(folder, 0)?).map(drop)
    }

    /// Measures `hf_hub_download` of the file cached in `folder`, in offline mode. The mode is set by `HF_HUB_OFFLINE`
    /// if `by_variable`, otherwise by the argument `local_files_only`.
    pub(super) fn measure_peer_calls(&self, folder: &Path, runs: usize, by_variable: bool) -> Result<CallTimes> {
        let mut command = self.peer_script(folder, runs)?;
        if by_variable {
            command.env("HF_HUB_OFFLINE", "1");
        }
        CallTimes::run(&mut command)
    }

    fn peer_script(&self, folder: &Path, runs: usize) -> Result<Command> {
        self.setup.peers.require("huggingface_hub")?;
        let mut command = self.script("hub_warm.py", folder);
        command.args([REPO, FILE]).arg(folder).arg(runs.to_string());
        Ok(command)
    }

    /// Downloads the file with our program into the cache directory `dir`.
    pub(super) fn fill_our_cache(&self, dir: &Path) -> Result<()> {
        let mut command = self.setup.modelcache(dir);
        self.setup.get(command.env("HF_ENDPOINT", self.hub.url()), &self.uri("main")).map(drop)
    }

    /// Returns the URI of the file for our program.
    pub(super) fn uri(&self, revision: &str) -> String {
        format!("hf://{REPO}@{revision}/{FILE}")
    }

    /// Returns the commit of `main`.
    pub(super) fn commit(&self) -> &str {
        &self.commit
    }
}

impl Drop for ServedRepo<'_> {
    fn drop(&mut self) {
        let _ = crate::scratch::remove(&self.setup.scratch.memory.join(FOLDER));
    }
}

/// Returns the path of the file in a Hugging Face cache.
fn downloaded_file(folder: &Path) -> Result<PathBuf> {
    let snapshots = folder.join("models--bench--model/snapshots");
    let snapshot = std::fs::read_dir(&snapshots)?.next().context("huggingface_hub left no snapshot")??;
    Ok(snapshot.path().join(FILE).canonicalize()?)
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "hub");
    let served = ServedRepo::start(setup, setup.sizes.file)?;
    // "after": the files become durable after the command has returned.
    let entries = [
        served.ours(DEFAULTS, "after", |command| command),
        served.ours("durable", "yes", durable),
        served.peer(None),
        served.peer(Some(16)),
    ];
    let lines = compare_to_disk(setup, setup.sizes.file, &entries)?;
    let best = best_peer(&lines, |_| true);
    let ratio = best.zip(ours(&lines, DEFAULTS).and_then(Line::seconds)).map(|(best, seconds)| best / seconds);
    Ok(Section {
        row: "hub",
        title: format!("One {} file, Hub to disk, first download", size(setup.sizes.file)),
        what: "A stand-in for the Hugging Face Hub redirects the download to another server, as the real Hub does; \
               xet is off. modelcache has no ladder (SHA-256 checkpoints) for a file that it downloads for the first \
               time, so it hashes the bytes in order and writes them through the page cache."
            .into(),
        tables: vec![table(&lines, best)],
        charts: Vec::new(),
        targets: vec![Target::at_least(
            &format!("`{DEFAULTS}`: speed, relative to huggingface_hub"),
            ratio,
            " x",
            4.0,
            None,
        )],
        notes: Vec::new(),
    })
}
