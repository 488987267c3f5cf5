//! Row for a model from the Hub to disk, cold, through the redirect to its CDN.

use super::calls::Calls;
use super::pull::the_file;
use super::{DEFAULTS, durable, progress, size};
use crate::bench::contest::{Entry, Line, OURS, best_peer, contest_to_disk, ours, table};
use crate::bench::page::{Bar, Section};
use crate::bench::served::{Kind, Served};
use crate::bench::setup::{Setup, has_bytes, sync};
use crate::bench::usage::measure;
use anyhow::{Context, Result};
use modelcache_testkit::{Content, Hub};
use std::path::{Path, PathBuf};
use std::process::Command;

const REPO: &str = "bench/model";
const FILE: &str = "model.safetensors";
const FOLDER: &str = "hub";

/// A Hub in this process, which only redirects, and the bench server as its CDN.
pub(super) struct HubStage<'a> {
    setup: &'a Setup,
    hub: Hub,
    _cdn: Served,
    commit: String,
    bytes: u64,
}

impl<'a> HubStage<'a> {
    pub(super) fn set(setup: &'a Setup, bytes: u64) -> Result<Self> {
        let folder = setup.scratch.memory.join(FOLDER);
        std::fs::create_dir_all(folder.join("cdn"))?;
        let whole = bytes == setup.sizes.file;
        let file = if whole { the_file(setup)? } else { setup.scratch.data("hub/model", 1, bytes)? };
        let content = Content::on_disk(&file)?;
        // The Hub redirects to `cdn/<sha256>` on the server.
        std::fs::hard_link(&file, folder.join("cdn").join(content.sha256()?))?;
        let (hub, cdn) = (Hub::start_on(0)?, Served::start(&folder, Kind::Plain)?);
        hub.cdn_elsewhere(&format!("{}/cdn", cdn.url()));
        let commit = hub.repo(REPO).commit().file(FILE, content).publish()?;
        Ok(Self { setup, hub, _cdn: cdn, commit, bytes })
    }

    fn ours(&'a self, setting: &str, waits: &'static str, change: fn(&mut Command) -> &mut Command) -> Entry<'a> {
        let run = move |folder: &Path| {
            let mut command = self.setup.modelcache(&folder.join("cache"));
            command.env("HF_ENDPOINT", self.hub.url());
            let (used, path) = self.setup.get(change(&mut command), &format!("hf://{REPO}"))?;
            has_bytes(&path.join(FILE), self.bytes)?;
            Ok(vec![used])
        };
        Entry { who: OURS, setting: setting.into(), checked: "SHA-256", steps: vec![("", waits)], run: Box::new(run) }
    }

    fn theirs(&'a self, workers: Option<u32>) -> Entry<'a> {
        let run = move |folder: &Path| {
            self.setup.peers.want("huggingface_hub")?;
            let mut command = self.script("hub_snapshot.py", folder);
            command.args([REPO]).arg(folder).args(workers.map(|workers| workers.to_string()));
            let used = measure(&mut command)?;
            let file = found(folder)?;
            has_bytes(&file, self.bytes)?;
            Ok(vec![used, used.then(sync(&file)?)])
        };
        let setting = workers.map_or(DEFAULTS.to_owned(), |workers| format!("max_workers {workers}"));
        let steps = vec![("", "no"), (" + sync", "yes")];
        Entry { who: "huggingface_hub", setting, checked: "no", steps, run: Box::new(run) }
    }

    fn script(&self, name: &str, home: &Path) -> Command {
        let mut command = self.setup.peers.script(name);
        command.env("HF_ENDPOINT", self.hub.url()).env("HOME", home).env("HF_HUB_DISABLE_XET", "1");
        command.env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
        command
    }

    /// Downloads the file by `hf_hub_download` into a cache in `folder`.
    pub(super) fn fill_theirs(&self, folder: &Path) -> Result<()> {
        measure(&mut self.their_calls(folder, 0)?).map(drop)
    }

    /// Measures `hf_hub_download` of the file cached in `folder`. Offline mode is set by variable or by argument.
    pub(super) fn call_theirs(&self, folder: &Path, runs: usize, by_variable: bool) -> Result<Calls> {
        let mut command = self.their_calls(folder, runs)?;
        if by_variable {
            command.env("HF_HUB_OFFLINE", "1");
        }
        Calls::of(&mut command)
    }

    fn their_calls(&self, folder: &Path, runs: usize) -> Result<Command> {
        self.setup.peers.want("huggingface_hub")?;
        let mut command = self.script("hub_warm.py", folder);
        command.args([REPO, FILE]).arg(folder).arg(runs.to_string());
        Ok(command)
    }

    /// Downloads the file by our program into the cache directory `dir`.
    pub(super) fn fill_ours(&self, dir: &Path) -> Result<()> {
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

impl Drop for HubStage<'_> {
    fn drop(&mut self) {
        let _ = crate::bench::scratch::remove(&self.setup.scratch.memory.join(FOLDER));
    }
}

/// Returns the path of the file in a Hugging Face cache.
fn found(folder: &Path) -> Result<PathBuf> {
    let snapshots = folder.join("models--bench--model/snapshots");
    let snapshot = std::fs::read_dir(&snapshots)?.next().context("huggingface_hub left no snapshot")??;
    Ok(snapshot.path().join(FILE).canonicalize()?)
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "hub");
    let stage = HubStage::set(setup, setup.sizes.file)?;
    let entries = [
        stage.ours(DEFAULTS, "after", |command| command),
        stage.ours("durable", "yes", durable),
        stage.theirs(None),
        stage.theirs(Some(16)),
    ];
    let lines = contest_to_disk(setup, setup.sizes.file, &entries)?;
    let best = best_peer(&lines, |_| true);
    let ratio = best.zip(ours(&lines, DEFAULTS).and_then(Line::seconds)).map(|(best, seconds)| best / seconds);
    Ok(Section {
        row: "hub",
        title: format!("One {} file, Hub to disk, cold", size(setup.sizes.file)),
        what:
            "The Hub answers with a redirect to another server, as the real one does; no xet. Seen for the first time, \
               the file has no ladder: it is hashed in order, and never written past the page cache."
                .into(),
        tables: vec![table(&lines, best)],
        bars: vec![Bar::at_least("defaults: times huggingface_hub as it is", ratio, " x", 4.0, None)],
        notes: Vec::new(),
    })
}
