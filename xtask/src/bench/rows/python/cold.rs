//! Row for one large file from S3 to disk, by our command and by our Python package: the cost of the interpreter.

use crate::bench::contest::{Entry, OURS, best_peer, contest_to_disk, ours, table};
use crate::bench::page::{Bar, Section};
use crate::bench::rivals::ALL;
use crate::bench::rows::pull::{REFERENCE, Stage};
use crate::bench::rows::{DEFAULTS, DURABLE, durable, progress, size};
use crate::bench::served::Kind;
use crate::bench::setup::{Setup, has_bytes};
use crate::bench::usage::run;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

type Change = fn(&mut Command) -> &mut Command;

pub(in crate::bench) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-cold");
    let stage = Stage::set(setup, Kind::Plain)?;
    let settings: [(&str, &[_; 1], Change); 2] =
        [(DURABLE, &[("", "yes")], durable), (DEFAULTS, &[("", "after")], |command| command)];
    let mut entries = Vec::new();
    for (setting, step, change) in settings {
        entries.push(stage.ours(&by_command(setting), step, change, None));
        entries.push(by_package(&stage, setting, change));
    }
    let in_python = ALL.into_iter().filter(|rival| matches!(rival.who, "obstore" | "boto3") && rival.tuned);
    entries.extend(in_python.map(|rival| stage.theirs(rival, &[])));
    let lines = contest_to_disk(setup, setup.sizes.file, &entries)?;
    drop(entries);
    let best = best_peer(&lines, |_| true);
    let bar = |setting: &str| {
        let spent =
            |setting: &str| ours(&lines, setting).filter(|line| line.seconds().is_some())?.core_seconds_per_gb();
        let ratio =
            spent(&in_python_at(setting)).zip(spent(&by_command(setting))).map(|(ours, command)| ours / command);
        Bar::at_most(&format!("{setting}: core-seconds, times the command's"), ratio, " x", 1.1, None)
    };
    Ok(Section {
        row: "python-cold",
        title: format!("From Python: one {} file, S3 to disk", size(setup.sizes.file)),
        what:
            "The same `get` by the command and by `ModelCache().get` in an interpreter of its own, whose start and end \
               are in the figures; beside them, what else is called from Python."
                .into(),
        tables: vec![table(&lines, best)],
        bars: vec![bar(DURABLE), bar(DEFAULTS)],
        notes: vec![
            "At defaults, the command hands what is to be made durable to a process that is in no figure; the \
             interpreter waits for the disk when it ends."
                .into(),
        ],
    })
}

fn by_command(setting: &str) -> String {
    format!("command, {setting}")
}

fn in_python_at(setting: &str) -> String {
    format!("Python, {setting}")
}

fn by_package<'a>(stage: &'a Stage<'_>, setting: &str, change: Change) -> Entry<'a> {
    let run = move |folder: &Path| {
        let mut command = stage.setup.python_with_remote("modelcache_get.py", &folder.join("cache"), &stage.served);
        let (used, printed) = run(change(&mut command).arg(REFERENCE))?;
        has_bytes(Path::new(printed.lines().next().context("no path was printed")?), stage.setup.sizes.file)?;
        Ok(vec![used])
    };
    let steps = vec![("", "yes")];
    Entry { who: OURS, setting: in_python_at(setting), checked: "SHA-256", steps, run: Box::new(run) }
}
