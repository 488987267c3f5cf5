//! Row for loading a safetensors file that is on disk and in the page cache: the time until all its tensors are numpy
//! arrays in memory.

use crate::comparison::{Entry, OURS, best_peer, compare, table};
use crate::page::Section;
use crate::rows::{large_file, progress, size};
use crate::scratch::remove;
use crate::setup::{Setup, read};
use crate::tensors::{FILE, REFERENCE, TENSORS, write_tensor_file};
use crate::usage::{Figures, Usage, measure};
use anyhow::Result;
use std::path::Path;
use std::process::Command;

const SCRIPT: &str = "load_tensors.py";

/// One way to load the file, named as in the script.
struct Loader {
    how: &'static str,
    program: &'static str,
    setting: &'static str,
    /// The package that must be installed.
    needs: &'static str,
    /// The text in the column `setting` of a second entry, in which our cache provides the path. `None` if there is no
    /// second entry, because the peer's own entry shows the same.
    setting_with_ours: Option<&'static str>,
}

const fn loader(
    how: &'static str,
    program: &'static str,
    setting: &'static str,
    needs: &'static str,
    setting_with_ours: Option<&'static str>,
) -> Loader {
    Loader { how, program, setting, needs, setting_with_ours }
}

const LOADERS: [Loader; 4] = [
    loader("safe_open", "safetensors", "safe_open", "safetensors", Some("get, then safe_open")),
    loader("load_file", "safetensors", "load_file", "safetensors", Some("get, then load_file")),
    loader("runai", "runai streamer", "laid out as in the file", "runai-model-streamer", None),
    loader("runai-packed", "runai streamer", "packed", "runai-model-streamer", Some("get, then streamer, packed")),
];

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-tensors");
    large_file::make_room(setup)?;
    let (source, bytes) = write_tensor_file(setup)?;
    let cache = setup.scratch.empty_folder("python-tensors")?;
    measure(setup.modelcache(&cache).args(["put", REFERENCE, "--quiet"]).arg(&source))?;
    // The cache has its own copy.
    remove(&source)?;
    let (_, folder) = setup.get(&mut setup.modelcache(&cache), REFERENCE)?;
    let (file, cache) = (folder.join(FILE), cache.as_path());
    let mut entries = Vec::new();
    for Loader { how, needs, setting_with_ours, .. } in LOADERS {
        let command = move || {
            let mut command = setup.python(SCRIPT, cache);
            command.args([how, &setup.sizes.tensors.to_string(), REFERENCE, FILE]);
            command
        };
        entries.extend(setting_with_ours.map(|setting| entry(setup, OURS, setting, needs, &file, command)));
    }
    for Loader { how, program, setting, needs, .. } in LOADERS {
        let path = file.clone();
        let command = move || {
            let mut command = setup.peers.script(SCRIPT);
            command.env("HOME", &setup.scratch.disk).args([how, &setup.sizes.tensors.to_string()]).arg(&path);
            command
        };
        entries.push(entry(setup, program, setting, needs, &file, command));
    }
    let lines = compare(setup, bytes, &entries)?;
    drop(entries);
    remove(cache)?;
    Ok(Section {
        row: "python-tensors",
        title: format!("From Python: {} of cached tensors, loaded into memory", size(setup.sizes.tensors)),
        what: format!(
            "{TENSORS} tensors in one safetensors file, which is on disk and in the page cache. Measured *in \
             process*: the time until every tensor is a numpy array in memory. For modelcache it includes opening the \
             cache and getting the path; the file was hashed when it was put (`at put`). The engine of the Run:ai \
             streamer is called without torch. Before each measurement, the script touches as much memory as the \
             tensors take and frees it."
        ),
        tables: vec![table(&lines, best_peer(&lines, |_| true))],
        charts: Vec::new(),
        targets: Vec::new(),
        notes: vec![
            "Peak RSS includes the arrays and, for safetensors, the mapped file.".into(),
            "The Python API of the streamer lays the tensors out in memory as in the file (`laid out as in the file`), \
             so that the engine can bypass the page cache. With `packed`, it reads through the page cache."
                .into(),
        ],
    })
}

/// Returns the entry of a script that loads the file. The file is in the page cache when the script starts.
fn entry<'a>(
    setup: &'a Setup,
    program: &'static str,
    setting: &str,
    needs: &'static str,
    file: &Path,
    command: impl Fn() -> Command + 'a,
) -> Entry<'a> {
    let file = file.to_owned();
    let run = move |_: &Path| {
        setup.peers.require("numpy")?;
        setup.peers.require(needs)?;
        read(&file, false)?;
        Ok(vec![measure_load(&mut command())?])
    };
    let verified = if program == OURS { "at put" } else { "no" };
    Entry { program, setting: setting.into(), verified, steps: vec![("", "")], run: Box::new(run) }
}

/// Runs the script and returns the figures that it reports.
fn measure_load(command: &mut Command) -> Result<Usage> {
    let (process, figures) = Figures::run(command)?;
    Ok(Usage { seconds: figures.get("seconds")?, core_seconds: figures.get("core_seconds")?, ..process })
}
