//! Rows with many files: sixteen large ones, and two thousand small ones.

use super::pull::make_room;
use super::{DEFAULTS, DURABLE, durable, progress, size};
use crate::bench::contest::{Entry, Line, OURS, best_peer, contest_to_disk, ours, table};
use crate::bench::page::{Bar, Section};
use crate::bench::rivals::{ALL, Way};
use crate::bench::served::{Kind, Served};
use crate::bench::setup::{Setup, has_bytes, sync};
use crate::bench::usage::measure;
use anyhow::Result;
use std::path::Path;
use std::process::Command;

pub(crate) fn large(setup: &Setup) -> Result<Section> {
    section(setup, "files-large", setup.sizes.many, 1.5)
}

pub(crate) fn small(setup: &Setup) -> Result<Section> {
    section(setup, "files-small", setup.sizes.small, 2.0)
}

fn section(setup: &Setup, row: &'static str, (count, each): (usize, u64), least: f64) -> Result<Section> {
    progress(setup, row);
    make_room(setup)?;
    let files = setup.scratch.memory.join(row);
    for number in 0..count {
        setup.scratch.data(&format!("{row}/model-{number:05}.bin"), 100 + number as u64, each)?;
    }
    std::fs::create_dir_all(setup.served())?;
    let served = Served::start(&setup.served(), Kind::Plain)?;
    setup.publish(&served, row, &files)?;
    setup.expose(&format!("raw-{row}"), &files)?;
    let bytes = count as u64 * each;
    let reference = format!("{row}@1");
    let prefix = format!("raw-{row}");
    let our = |setting: &str, waits: &'static str, change: fn(&mut Command) -> &mut Command| {
        let (served, reference) = (&served, &reference);
        let run = move |folder: &Path| {
            let mut command = setup.with_remote(&folder.join("cache"), served);
            let (used, path) = setup.get(change(&mut command), reference)?;
            has_bytes(&path, bytes)?;
            Ok(vec![used])
        };
        Entry { who: OURS, setting: setting.into(), checked: "SHA-256", steps: vec![("", waits)], run: Box::new(run) }
    };
    let mut entries = vec![our(DEFAULTS, "after", |command| command), our(DURABLE, "yes", durable)];
    for rival in ALL {
        let (served, prefix) = (&served, &prefix);
        let run = move |folder: &Path| {
            let used = measure(&mut rival.command(setup, served, Way::Tree, prefix, folder)?)?;
            has_bytes(folder, bytes)?;
            Ok(vec![used, used.then(sync(folder)?)])
        };
        let steps = vec![("", "no"), (" + sync", "yes")];
        entries.push(Entry { who: rival.who, setting: rival.setting(), checked: "no", steps, run: Box::new(run) });
    }
    let lines = contest_to_disk(setup, bytes, &entries)?;
    drop(entries);
    crate::bench::scratch::remove(&files)?;
    crate::bench::scratch::remove(&setup.served())?;
    let best = best_peer(&lines, |_| true);
    let ratio = best.zip(ours(&lines, DEFAULTS).and_then(Line::seconds)).map(|(best, seconds)| best / seconds);
    Ok(Section {
        row,
        title: format!("{count} files of {}, S3 to disk", size(each)),
        what: "One artifact of that many files. \"+ sync\" adds `sync` of every file and of the folder.".into(),
        tables: vec![table(&lines, best)],
        bars: vec![Bar::at_least("defaults: times the best peer as it is", ratio, " x", least, None)],
        notes: Vec::new(),
    })
}
