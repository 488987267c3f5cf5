//! Row for a hit that provides its files as a Hugging Face cache (`get --layout hub`), compared with a hit that does
//! not.

use super::progress;
use crate::comparison::{Entry, Line, compare, ours, table};
use crate::page::{Section, Target};
use crate::setup::Setup;
use crate::usage::measure;
use anyhow::Result;
use modelcache_testkit::{Content, Hub};
use std::path::Path;

const REFERENCE: &str = "hf://bench/files";
const FILES: u64 = 200;
const HIT: &str = "get";
const FIRST: &str = "get --layout hub, first";
const AGAIN: &str = "get --layout hub, again";

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "layout");
    let hub = Hub::start_on(0)?;
    let files = (0..FILES).map(|number| (format!("shard-{number:03}.bin"), Content::generated(number, 4096)));
    let commit = files.fold(hub.repo("bench/files").commit(), |commit, (path, content)| commit.file(&path, content));
    commit.publish()?;
    let (hub, cache) = (&hub, setup.scratch.empty_folder("layout")?);
    let cache = cache.as_path();
    let get = move |layout: &str| {
        let mut command = setup.modelcache(cache);
        command.env("HF_ENDPOINT", hub.url()).env("MODEL_CACHE_LAYOUT", layout).env("MODEL_CACHE_REF_TTL", "1h");
        command.args(["get", REFERENCE, "--quiet"]);
        command
    };
    measure(&mut get("files"))?;
    let entry = |setting: &str, layout: &'static str, is_first: bool| {
        Entry::ours(setting, &[("", "")], move |_: &Path| {
            if is_first {
                crate::scratch::remove(&cache.join("hub"))?;
            }
            Ok(vec![measure(&mut get(layout))?])
        })
    };
    let entries = [entry(HIT, "files", false), entry(FIRST, "hub", true), entry(AGAIN, "hub", false)];
    let lines = compare(setup, FILES * 4096, &entries)?;
    drop(entries);
    crate::scratch::remove(cache)?;
    let added_ms = |setting: &str| {
        let (hit, layout) = (ours(&lines, HIT).and_then(Line::seconds), ours(&lines, setting).and_then(Line::seconds));
        hit.zip(layout).map(|(hit, layout)| (layout - hit) * 1000.0)
    };
    Ok(Section {
        row: "layout",
        title: format!("A hit of {FILES} files, as a Hugging Face cache"),
        what: "The artifact is on disk. The first `get --layout hub` makes a hard link for each file; the later ones check \
               the links. The commands include the start of the program."
            .into(),
        tables: vec![table(&lines, None)],
        charts: Vec::new(),
        targets: vec![
            Target::at_most("first: time added to `get`", added_ms(FIRST), " ms", 10.0, None),
            Target::at_most("again: time added to `get`", added_ms(AGAIN), " ms", 10.0, None),
        ],
        notes: Vec::new(),
    })
}
