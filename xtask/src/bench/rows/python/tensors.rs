//! Row for a safetensors file on disk and in the page cache, until all its tensors are numpy arrays in memory.

use crate::bench::contest::{Entry, OURS, best_peer, contest, table};
use crate::bench::page::Section;
use crate::bench::rows::{progress, pull, size};
use crate::bench::scratch::remove;
use crate::bench::setup::{Setup, read};
use crate::bench::tensors::{FILE, REFERENCE, TENSORS, write_for};
use crate::bench::usage::{Figures, Run, measure};
use anyhow::Result;
use std::path::Path;
use std::process::Command;

const SCRIPT: &str = "load_tensors.py";

/// One way to load the file, named as in the script.
struct Loader {
    how: &'static str,
    who: &'static str,
    setting: &'static str,
    needs: &'static str,
    /// Setting shown if our cache provides the path. `None` omits that run, because it would add nothing to the peer's
    /// own.
    on_ours: Option<&'static str>,
}

const fn loader(
    how: &'static str,
    who: &'static str,
    setting: &'static str,
    needs: &'static str,
    on_ours: Option<&'static str>,
) -> Loader {
    Loader { how, who, setting, needs, on_ours }
}

const LOADERS: [Loader; 4] = [
    loader("safe_open", "safetensors", "safe_open", "safetensors", Some("get, then safe_open")),
    loader("load_file", "safetensors", "load_file", "safetensors", Some("get, then load_file")),
    loader("runai", "runai streamer", "laid out as in the file", "runai-model-streamer", None),
    loader("runai-packed", "runai streamer", "packed", "runai-model-streamer", Some("get, then streamer, packed")),
];

pub(in crate::bench) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-tensors");
    pull::make_room(setup)?;
    let (source, bytes) = write_for(setup)?;
    let cache = setup.scratch.fresh("python-tensors")?;
    measure(setup.modelcache(&cache).args(["put", REFERENCE, "--quiet"]).arg(&source))?;
    // The cache has its own copy.
    remove(&source)?;
    let (_, folder) = setup.get(&mut setup.modelcache(&cache), REFERENCE)?;
    let (file, cache) = (folder.join(FILE), cache.as_path());
    let mut entries = Vec::new();
    for Loader { how, needs, on_ours, .. } in LOADERS {
        let command = move || {
            let mut command = setup.python(SCRIPT, cache);
            command.args([how, &setup.sizes.tensors.to_string(), REFERENCE, FILE]);
            command
        };
        entries.extend(on_ours.map(|setting| entry(setup, OURS, setting, needs, &file, command)));
    }
    for Loader { how, who, setting, needs, .. } in LOADERS {
        let path = file.clone();
        let command = move || {
            let mut command = setup.peers.script(SCRIPT);
            command.env("HOME", &setup.scratch.disk).args([how, &setup.sizes.tensors.to_string()]).arg(&path);
            command
        };
        entries.push(entry(setup, who, setting, needs, &file, command));
    }
    let lines = contest(setup, bytes, &entries)?;
    drop(entries);
    remove(cache)?;
    Ok(Section {
        row: "python-tensors",
        title: format!("From Python: a cached {} of tensors, until loaded", size(setup.sizes.tensors)),
        what: format!(
            "{TENSORS} tensors in one safetensors file on disk, in the page cache for all, until each is a numpy array. \
             In process, without the start of Python and imports, ours with the opening of the cache; its file was \
             checked when it came. The streamer's engine is called without torch. As much memory as the tensors take \
             is touched and let go of before."
        ),
        tables: vec![table(&lines, best_peer(&lines, |_| true))],
        bars: Vec::new(),
        notes: vec![
            "Peak RSS has the arrays, and of what is mapped (safetensors) the file again.".into(),
            "The streamer's face lays tensors out as they lie in the file, which lets it read past the page cache; \
             packed, they come from the page cache."
                .into(),
        ],
    })
}

/// Returns the entry of a script that loads the file. The file is in the page cache when the script starts.
fn entry<'a>(
    setup: &'a Setup,
    who: &'static str,
    setting: &str,
    needs: &'static str,
    file: &Path,
    command: impl Fn() -> Command + 'a,
) -> Entry<'a> {
    let file = file.to_owned();
    let run = move |_: &Path| {
        setup.peers.want("numpy")?;
        setup.peers.want(needs)?;
        read(&file, false)?;
        Ok(vec![loaded(&mut command())?])
    };
    let checked = if who == OURS { "when it came" } else { "no" };
    Entry { who, setting: setting.into(), checked, steps: vec![("", "")], run: Box::new(run) }
}

/// Runs the script and returns the figures that it reports.
fn loaded(command: &mut Command) -> Result<Run> {
    let (process, figures) = Figures::of(command)?;
    Ok(Run { seconds: figures.figure("seconds")?, core_seconds: figures.figure("core_seconds")?, ..process })
}
