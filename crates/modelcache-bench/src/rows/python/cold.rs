//! Row for one large file from S3 to disk, with our command and with our Python package, to show the cost of the
//! interpreter.

use crate::comparison::{Entry, best_peer, compare_to_disk, ours, table};
use crate::copiers::COPIERS;
use crate::page::{Section, Target};
use crate::rows::large_file::{REFERENCE, ServedFile};
use crate::rows::{DEFAULTS, DURABLE, durable, progress, size};
use crate::server_process::ServerKind;
use crate::setup::{Setup, check_size};
use crate::usage::run;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

/// Applies a setting to the command of our program.
type Change = fn(&mut Command) -> &mut Command;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-cold");
    let served = ServedFile::start(setup, ServerKind::Plain)?;
    let settings: [(&str, &[_; 1], Change); 2] =
        [(DURABLE, &[("", "yes")], durable), (DEFAULTS, &[("", "after")], |command| command)];
    let mut entries = Vec::new();
    for (setting, step, change) in settings {
        entries.push(served.ours(&command_setting(setting), step, change, None));
        entries.push(package_entry(&served, setting, change));
    }
    let in_python =
        COPIERS.into_iter().filter(|copier| matches!(copier.program, "obstore" | "boto3") && copier.is_tuned());
    entries.extend(in_python.map(|copier| served.peer(copier, &[])));
    let lines = compare_to_disk(setup, setup.sizes.file, &entries)?;
    drop(entries);
    let best = best_peer(&lines, |_| true);
    let target = |setting: &str| {
        let spent =
            |setting: &str| ours(&lines, setting).filter(|line| line.seconds().is_some())?.core_seconds_per_gb();
        let ratio = spent(&python_setting(setting))
            .zip(spent(&command_setting(setting)))
            .map(|(python, command)| python / command);
        Target::at_most(&format!("`{setting}`: core-seconds, relative to the command"), ratio, " x", 1.1, None)
    };
    Ok(Section {
        row: "python-cold",
        title: format!("From Python: one {} file, S3 to disk", size(setup.sizes.file)),
        what: "The same download with the command `modelcache get`, and with `ModelCache().get` in a new Python \
               interpreter, including its start and its exit. The peers are Python packages and run in a new \
               interpreter, too."
            .into(),
        tables: vec![table(&lines, best)],
        charts: Vec::new(),
        targets: vec![target(DURABLE), target(DEFAULTS)],
        notes: vec![
            "At `defaults`, the command leaves the file to the kernel, which writes it to the disk later. No figure \
             includes that. Python waits for the sync before the interpreter exits."
                .into(),
        ],
    })
}

fn command_setting(setting: &str) -> String {
    format!("command, {setting}")
}

fn python_setting(setting: &str) -> String {
    format!("Python, {setting}")
}

fn package_entry<'a>(served: &'a ServedFile<'_>, setting: &str, change: Change) -> Entry<'a> {
    let run = move |folder: &Path| {
        let mut command = served.setup.python_with_remote("modelcache_get.py", &folder.join("cache"), &served.server);
        let (used, printed) = run(change(&mut command).arg(REFERENCE))?;
        check_size(Path::new(printed.lines().next().context("no path was printed")?), served.setup.sizes.file)?;
        Ok(vec![used])
    };
    // The file is durable at every setting, because the interpreter waits for the sync before it exits.
    Entry::ours(python_setting(setting), &[("", "yes")], run)
}
