//! Rows for one large file from S3: to disk, to disk and then into memory, and to disk over TLS.

use super::{DEFAULTS, DURABLE, durable, progress, size};
use crate::comparison::{Entry, Line, best_peer, compare_to_disk, ours, table};
use crate::copiers::{COPIERS, Copier, Operation, aria2, url};
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess};
use crate::setup::{Setup, check_size, read, sync};
use crate::usage::{Usage, measure};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "bench/model";
pub(super) const REFERENCE: &str = "bench/model@1";
const LARGE_FILE: &str = "model.bin";
const KEY: &str = "raw/model.bin";

/// The large file as an object of a running S3 server.
pub(super) struct ServedFile<'a> {
    pub(super) setup: &'a Setup,
    pub(super) server: ServerProcess,
}

impl<'a> ServedFile<'a> {
    /// Creates and publishes the file unless an earlier row did, and starts a server of this kind.
    pub(super) fn start(setup: &'a Setup, kind: ServerKind) -> Result<Self> {
        let file = large_file(setup)?;
        // Several rows share the published file.
        if !setup.served_folder().exists() {
            std::fs::create_dir_all(setup.served_folder())?;
            setup.publish(&ServerProcess::start(&setup.served_folder(), ServerKind::Plain)?, NAME, &file)?;
            setup.link_for_peers("raw", &file)?;
        }
        Ok(Self { setup, server: ServerProcess::start(&setup.served_folder(), kind)? })
    }

    /// Returns the entry of our get. `then`, if set, runs on the path that the get printed and adds its usage to that
    /// of the get. `steps` has, for each measured step, what is added to the setting and the cell in the column
    /// `durable`.
    pub(super) fn ours(
        &'a self,
        setting: &str,
        steps: &[(&'static str, &'static str)],
        change: fn(&mut Command) -> &mut Command,
        then: Option<fn(&Path) -> Result<Usage>>,
    ) -> Entry<'a> {
        let run = move |folder: &Path| {
            let mut command = self.setup.with_remote(&folder.join("cache"), &self.server);
            let (used, path) = self.setup.get(change(&mut command), REFERENCE)?;
            check_size(&path, self.setup.sizes.file)?;
            Ok(match then {
                None => vec![used],
                Some(then) => vec![used, used.then(then(&path)?)],
            })
        };
        Entry::ours(setting, steps, run)
    }

    /// Returns the entry of a peer's download. Each step of `then` is measured as well, after the download.
    pub(super) fn peer(&'a self, copier: Copier, then: &'static [NextStep]) -> Entry<'a> {
        let run = move |folder: &Path| {
            let file = folder.join("model.bin");
            let mut command = copier.command(self.setup, &self.server, Operation::Get, KEY, &file)?;
            self.measured(&mut command, &file, then)
        };
        Entry {
            program: copier.program,
            setting: copier.setting(),
            verified: "no",
            steps: steps(then),
            run: Box::new(run),
        }
    }

    fn aria2(&'a self, then: &'static [NextStep]) -> Entry<'a> {
        let run = move |folder: &Path| {
            let file = folder.join("model.bin");
            self.measured(&mut aria2(self.setup, &self.server, KEY, &file)?, &file, then)
        };
        Entry {
            program: "aria2c",
            setting: "16 connections".into(),
            verified: "no",
            steps: steps(then),
            run: Box::new(run),
        }
    }

    fn measured(&self, command: &mut Command, file: &Path, then: &[NextStep]) -> Result<Vec<Usage>> {
        // The first usage is that of the download alone. Each further one is the sum of the download and one step; the
        // download is not repeated.
        let mut usages = vec![measure(command)?];
        check_size(file, self.setup.sizes.file)?;
        for then in then {
            usages.push(usages[0].then((then.run)(file)?));
        }
        Ok(usages)
    }

    /// Returns the entry of Run:ai's streamer, which loads the file into memory and stores nothing on disk.
    fn streamer(&'a self, concurrency: Option<u32>) -> Entry<'a> {
        let run = move |_: &Path| {
            self.setup.peers.require("runai-model-streamer")?;
            self.setup.peers.require("runai-model-streamer-s3")?;
            let mut command = self.setup.peers.script("runai_load.py");
            command.args([url(KEY), self.setup.sizes.file.to_string()]);
            command.args(concurrency.map(|number| number.to_string()));
            command.envs(self.server.env()).env("HOME", &self.setup.scratch.disk);
            Ok(vec![measure(&mut command)?])
        };
        let setting = concurrency.map_or(DEFAULTS.to_owned(), |number| format!("concurrency {number}"));
        let steps = vec![(", to memory", "not kept")];
        Entry { program: "runai streamer", setting, verified: "no", steps, run: Box::new(run) }
    }
}

/// Removes the large file and all served data, for a row that needs the space.
pub(super) fn make_room(setup: &Setup) -> Result<()> {
    crate::scratch::remove(&setup.served_folder())?;
    match std::fs::remove_file(setup.scratch.memory.join(LARGE_FILE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Returns the large file that most rows move. It is created once.
pub(super) fn large_file(setup: &Setup) -> Result<PathBuf> {
    let file = setup.scratch.memory.join(LARGE_FILE);
    if file.exists() { Ok(file) } else { setup.scratch.data(LARGE_FILE, 1, setup.sizes.file) }
}

/// A step that is measured after a peer's download.
pub(super) struct NextStep {
    /// Appended to the setting.
    suffix: &'static str,
    /// The cell in the column `durable`.
    durable: &'static str,
    run: fn(&Path) -> Result<Usage>,
}

const SYNCED: &[NextStep] = &[NextStep { suffix: " + sync", durable: "yes", run: sync }];
const LOADED: &[NextStep] = &[NextStep { suffix: " + read", durable: "no", run: read_buffered }];

fn read_buffered(path: &Path) -> Result<Usage> {
    read(path, false)
}

fn steps(then: &[NextStep]) -> Vec<(&'static str, &'static str)> {
    std::iter::once(("", "no")).chain(then.iter().map(|then| (then.suffix, then.durable))).collect()
}

pub(crate) fn to_disk(setup: &Setup) -> Result<Section> {
    progress(setup, "durable");
    let served = ServedFile::start(setup, ServerKind::Plain)?;
    let mut entries = vec![
        served.ours(DURABLE, &[("", "yes")], durable, None),
        served.ours(DEFAULTS, &[("", "after")], |command| command, None),
    ];
    entries.extend(COPIERS.map(|copier| served.peer(copier, SYNCED)));
    entries.push(served.aria2(SYNCED));
    let lines = compare_to_disk(setup, setup.sizes.file, &entries)?;
    section(&served, "durable", "", &lines, (1.5, 2.0), (1.3, Some(1.0)))
}

pub(crate) fn over_tls(setup: &Setup) -> Result<Section> {
    progress(setup, "tls");
    let served = ServedFile::start(setup, ServerKind::Tls)?;
    let mut entries = vec![
        served.ours(DURABLE, &[("", "yes")], durable, None),
        served.ours(DEFAULTS, &[("", "after")], |command| command, None),
    ];
    let fast = COPIERS.into_iter().filter(|copier| copier.is_tuned() || copier.program == "s5cmd");
    entries.extend(fast.map(|copier| served.peer(copier, SYNCED)));
    let lines = compare_to_disk(setup, setup.sizes.file, &entries)?;
    section(&served, "tls", " over TLS", &lines, (1.3, 1.6), (1.15, None))
}

fn section(
    served: &ServedFile<'_>,
    row: &'static str,
    how: &str,
    lines: &[Line],
    (required, goal): (f64, f64),
    (core_s_required, core_s_goal): (f64, Option<f64>),
) -> Result<Section> {
    let counts = served.server.counts()?;
    let server_core_s_per_gb = counts.core_seconds / (counts.bytes_sent.max(1) as f64 / 1e9);
    let best = best_peer(lines, |_| true);
    let best_durable = best_peer(lines, |line| line.setting.ends_with("sync"));
    let durable = ours(lines, DURABLE);
    let seconds = durable.and_then(Line::seconds);
    let ratio = |best: Option<f64>| best.zip(seconds).map(|(best, seconds)| best / seconds);
    let name = format!("`{DURABLE}`: speed, relative to the fastest peer");
    let spent = durable.filter(|line| line.seconds().is_some()).and_then(Line::core_seconds_per_gb);
    let spent_name = format!("`{DURABLE}`: core-seconds per GB");
    let targets = vec![
        Target::at_least(&name, ratio(best), " x", required, Some(goal)),
        Target::at_most(&spent_name, spent, "", core_s_required, core_s_goal),
    ];
    let mut notes: Vec<String> = Vec::from_iter(ratio(best_durable).map(|ratio| {
        format!("If `sync` is included for the peers, modelcache is {ratio:.2} times as fast as the fastest peer.")
    }));
    notes.push(format!(
        "The server took {server_core_s_per_gb:.2} core-seconds per GB on the same cores, which the table does not \
         include."
    ));
    let what = "A download of one file into a new directory. modelcache verifies the bytes with SHA-256. The other \
                programs do not verify them; the bench checks only the size of their file. `+ sync` adds the time of \
                `sync FILE` after the download, which makes their file as durable as that of modelcache at `durable, \
                O_DIRECT`.";
    Ok(Section {
        row,
        title: format!("One {} file, S3 to disk{how}", size(served.setup.sizes.file)),
        what: what.into(),
        tables: vec![table(lines, best)],
        charts: Vec::new(),
        targets,
        notes,
    })
}

pub(crate) fn loaded(setup: &Setup) -> Result<Section> {
    progress(setup, "loaded");
    let served = ServedFile::start(setup, ServerKind::Plain)?;
    let steps = [("", "after"), (" + read", "after")];
    let mut entries = vec![
        served.ours(DEFAULTS, &steps, |command| command, Some(read_buffered)),
        served.ours(
            "buffered",
            &steps,
            |command| command.env("MODEL_CACHE_WRITE_MODE", "buffered"),
            Some(read_buffered),
        ),
        served.ours(DURABLE, &[("", "yes"), (" + read", "yes")], durable, Some(read_buffered)),
        served.streamer(None),
        served.streamer(Some(16)),
    ];
    let fast =
        COPIERS.into_iter().filter(|copier| copier.is_tuned() && copier.program != "aws" || copier.program == "s5cmd");
    entries.extend(fast.map(|copier| served.peer(copier, LOADED)));
    let lines = compare_to_disk(setup, setup.sizes.file, &entries)?;
    let loaded = |line: &Line| line.setting.ends_with("read") || line.setting.ends_with("memory");
    let best = best_peer(&lines, loaded);
    let seconds = ours(&lines, &format!("{DEFAULTS} + read")).and_then(Line::seconds);
    let share = best.zip(seconds).map(|(best, seconds)| seconds / best);
    Ok(Section {
        row: "loaded",
        title: format!("One {} file, S3 to memory", size(setup.sizes.file)),
        what: "The time until the whole file has been read into memory. modelcache and the programs that copy write \
               it to disk; then a second program reads it from start to end, 8 MiB at a time (`+ read`). The Run:ai \
               streamer reads the object into its own memory and stores nothing on disk (`not kept`); its engine is \
               called without torch."
            .into(),
        tables: vec![table(&lines, best)],
        charts: Vec::new(),
        targets: vec![Target::at_most(
            &format!("`{DEFAULTS} + read`: time, relative to the fastest peer"),
            share,
            " x",
            0.75,
            Some(0.65),
        )],
        notes: Vec::new(),
    })
}
