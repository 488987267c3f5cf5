//! Rows for one large file from S3: to disk, to disk and then to memory, and over TLS.

use super::{DEFAULTS, DURABLE, durable, progress, size};
use crate::bench::contest::{Entry, Line, OURS, best_peer, contest_to_disk, ours, table};
use crate::bench::page::{Bar, Section};
use crate::bench::rivals::{ALL, Rival, Way, aria2, url};
use crate::bench::served::{Kind, Served};
use crate::bench::setup::{Setup, has_bytes, read, sync};
use crate::bench::usage::{Run, measure};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "bench/model";
pub(super) const REFERENCE: &str = "bench/model@1";
const THE_FILE: &str = "model.bin";
const KEY: &str = "raw/model.bin";

/// The large file with a server.
pub(super) struct Stage<'a> {
    pub(super) setup: &'a Setup,
    pub(super) served: Served,
}

impl<'a> Stage<'a> {
    /// Creates and publishes the file, and starts a server of this kind.
    pub(super) fn set(setup: &'a Setup, kind: Kind) -> Result<Self> {
        let file = the_file(setup)?;
        // Several rows share the published file.
        if !setup.served().exists() {
            std::fs::create_dir_all(setup.served())?;
            setup.publish(&Served::start(&setup.served(), Kind::Plain)?, NAME, &file)?;
            setup.expose("raw", &file)?;
        }
        Ok(Self { setup, served: Served::start(&setup.served(), kind)? })
    }

    /// Returns the entry of our get. `then` is measured after it, on the path that it printed.
    pub(super) fn ours(
        &'a self,
        setting: &str,
        steps: &[(&'static str, &'static str)],
        change: fn(&mut Command) -> &mut Command,
        then: Option<fn(&Path) -> Result<Run>>,
    ) -> Entry<'a> {
        let run = move |folder: &Path| {
            let mut command = self.setup.with_remote(&folder.join("cache"), &self.served);
            let (used, path) = self.setup.get(change(&mut command), REFERENCE)?;
            has_bytes(&path, self.setup.sizes.file)?;
            Ok(match then {
                None => vec![used],
                Some(then) => vec![used, used.then(then(&path)?)],
            })
        };
        Entry { who: OURS, setting: setting.into(), checked: "SHA-256", steps: steps.to_vec(), run: Box::new(run) }
    }

    /// Returns the entry of a peer's copy, followed by the steps of `then`.
    pub(super) fn theirs(&'a self, rival: Rival, then: &'static [Then]) -> Entry<'a> {
        let run = move |folder: &Path| {
            let file = folder.join("model.bin");
            let mut command = rival.command(self.setup, &self.served, Way::Get, KEY, &file)?;
            self.measured(&mut command, &file, then)
        };
        Entry { who: rival.who, setting: rival.setting(), checked: "no", steps: steps(then), run: Box::new(run) }
    }

    fn aria2(&'a self, then: &'static [Then]) -> Entry<'a> {
        let run = move |folder: &Path| {
            let file = folder.join("model.bin");
            self.measured(&mut aria2(self.setup, &self.served, KEY, &file)?, &file, then)
        };
        Entry { who: "aria2c", setting: "16 connections".into(), checked: "no", steps: steps(then), run: Box::new(run) }
    }

    fn measured(&self, command: &mut Command, file: &Path, then: &[Then]) -> Result<Vec<Run>> {
        // The first run is the copy alone. Each further run adds one step to it.
        let mut runs = vec![measure(command)?];
        has_bytes(file, self.setup.sizes.file)?;
        for then in then {
            runs.push(runs[0].then((then.what)(file)?));
        }
        Ok(runs)
    }

    /// Returns the entry of Run:ai's streamer, which loads the file into memory and stores nothing on disk.
    fn streamer(&'a self, concurrency: Option<u32>) -> Entry<'a> {
        let run = move |_: &Path| {
            self.setup.peers.want("runai-model-streamer")?;
            self.setup.peers.want("runai-model-streamer-s3")?;
            let mut command = self.setup.peers.script("runai_load.py");
            command.args([url(KEY), self.setup.sizes.file.to_string()]);
            command.args(concurrency.map(|number| number.to_string()));
            command.envs(self.served.env()).env("HOME", &self.setup.scratch.disk);
            Ok(vec![measure(&mut command)?])
        };
        let setting = concurrency.map_or(DEFAULTS.to_owned(), |number| format!("concurrency {number}"));
        let steps = vec![(", to memory", "not kept")];
        Entry { who: "runai streamer", setting, checked: "no", steps, run: Box::new(run) }
    }
}

/// Removes the large file and all served data, for a row that needs the space.
pub(super) fn make_room(setup: &Setup) -> Result<()> {
    crate::bench::scratch::remove(&setup.served())?;
    match std::fs::remove_file(setup.scratch.memory.join(THE_FILE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Returns the large file that most rows move. It is created once.
pub(super) fn the_file(setup: &Setup) -> Result<PathBuf> {
    let file = setup.scratch.memory.join(THE_FILE);
    if file.exists() { Ok(file) } else { setup.scratch.data(THE_FILE, 1, setup.sizes.file) }
}

/// A step after a peer's copy.
pub(super) struct Then {
    suffix: &'static str,
    durable: &'static str,
    what: fn(&Path) -> Result<Run>,
}

const SYNCED: &[Then] = &[Then { suffix: " + sync", durable: "yes", what: sync }];
const LOADED: &[Then] = &[Then { suffix: " + read", durable: "no", what: read_cached }];

fn read_cached(path: &Path) -> Result<Run> {
    read(path, false)
}

fn steps(then: &[Then]) -> Vec<(&'static str, &'static str)> {
    std::iter::once(("", "no")).chain(then.iter().map(|then| (then.suffix, then.durable))).collect()
}

pub(crate) fn to_disk(setup: &Setup) -> Result<Section> {
    progress(setup, "durable");
    let stage = Stage::set(setup, Kind::Plain)?;
    let mut entries = vec![
        stage.ours(DURABLE, &[("", "yes")], durable, None),
        stage.ours(DEFAULTS, &[("", "after")], |command| command, None),
    ];
    entries.extend(ALL.map(|rival| stage.theirs(rival, SYNCED)));
    entries.push(stage.aria2(SYNCED));
    let lines = contest_to_disk(setup, setup.sizes.file, &entries)?;
    section(&stage, "durable", "", &lines, (1.5, 2.0))
}

pub(crate) fn over_tls(setup: &Setup) -> Result<Section> {
    progress(setup, "tls");
    let stage = Stage::set(setup, Kind::Tls)?;
    let mut entries = vec![
        stage.ours(DURABLE, &[("", "yes")], durable, None),
        stage.ours(DEFAULTS, &[("", "after")], |command| command, None),
    ];
    let fast = ALL.into_iter().filter(|rival| rival.tuned || rival.who == "s5cmd");
    entries.extend(fast.map(|rival| stage.theirs(rival, SYNCED)));
    let lines = contest_to_disk(setup, setup.sizes.file, &entries)?;
    section(&stage, "tls", " over TLS", &lines, (1.3, 1.6))
}

fn section(
    stage: &Stage<'_>,
    row: &'static str,
    how: &str,
    lines: &[Line],
    (least, goal): (f64, f64),
) -> Result<Section> {
    let counted = stage.served.counted()?;
    let served = counted.core_seconds / (counted.bytes_sent.max(1) as f64 / 1e9);
    let best = best_peer(lines, |_| true);
    let best_durable = best_peer(lines, |line| line.setting.ends_with("sync"));
    let durable = ours(lines, DURABLE);
    let seconds = durable.and_then(Line::seconds);
    let ratio = |best: Option<f64>| best.zip(seconds).map(|(best, seconds)| best / seconds);
    let mut bars =
        vec![Bar::at_least("durable, checked: times the best peer as it is", ratio(best), " x", least, Some(goal))];
    if row == "durable" {
        let spent = durable.filter(|line| line.seconds().is_some()).and_then(Line::core_seconds_per_gb);
        bars.push(Bar::at_most("its core-seconds per GB", spent, "", 1.3, Some(1.0)));
    }
    let beside =
        ratio(best_durable).map_or_else(String::new, |ratio| format!("{ratio:.2} x the best peer with `sync`."));
    let what = "Ours is checked with SHA-256; the others check nothing but the size. \"+ sync\" adds `sync FILE`, which \
                makes theirs as durable as ours. \"after\": on its way to the disk when `get` returns.";
    Ok(Section {
        row,
        title: format!("One {} file, S3 to disk{how}", size(stage.setup.sizes.file)),
        what: what.into(),
        tables: vec![table(lines, best)],
        bars,
        notes: vec![
            format!("Durable beside durable: {beside}"),
            format!("The server took {served:.2} core-s/GB of the same cores, which are in no figure."),
        ],
    })
}

pub(crate) fn loaded(setup: &Setup) -> Result<Section> {
    progress(setup, "loaded");
    let stage = Stage::set(setup, Kind::Plain)?;
    let steps = [("", "after"), (" + read", "after")];
    let mut entries = vec![
        stage.ours(DEFAULTS, &steps, |command| command, Some(read_cached)),
        stage.ours("buffered", &steps, |command| command.env("MODEL_CACHE_WRITE_MODE", "buffered"), Some(read_cached)),
        stage.ours(DURABLE, &[("", "yes"), (" + read", "yes")], durable, Some(read_cached)),
        stage.streamer(None),
        stage.streamer(Some(16)),
    ];
    let fast = ALL.into_iter().filter(|rival| rival.tuned && rival.who != "aws" || rival.who == "s5cmd");
    entries.extend(fast.map(|rival| stage.theirs(rival, LOADED)));
    let lines = contest_to_disk(setup, setup.sizes.file, &entries)?;
    let loaded = |line: &Line| line.setting.ends_with("read") || line.setting.ends_with("memory");
    let best = best_peer(&lines, loaded);
    let seconds = ours(&lines, &format!("{DEFAULTS} + read")).and_then(Line::seconds);
    let share = best.zip(seconds).map(|(best, seconds)| seconds / best);
    Ok(Section {
        row: "loaded",
        title: format!("One {} file, S3 to loaded", size(setup.sizes.file)),
        what:
            "From the start of the program to the file read once by another, 8 MiB at a time. The streamer brings it \
               into its own memory and keeps nothing on disk; its engine is called without torch."
                .into(),
        tables: vec![table(&lines, best)],
        bars: vec![Bar::at_most("defaults, then read: share of the best peer's time", share, " x", 0.75, Some(0.65))],
        notes: Vec::new(),
    })
}
