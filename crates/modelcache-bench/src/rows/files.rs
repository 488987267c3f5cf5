//! Rows with many files: large, medium and small ones.

use super::large_file::make_room;
use super::{DEFAULTS, DURABLE, durable, progress, size};
use crate::comparison::{Entry, Line, best_peer, compare_to_disk, ours, table};
use crate::copiers::{COPIERS, Operation};
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess};
use crate::setup::{Setup, check_size, sync};
use crate::usage::measure;
use anyhow::Result;
use std::path::Path;
use std::process::Command;

pub(crate) fn large(setup: &Setup) -> Result<Section> {
    section(setup, "files-large", setup.sizes.large_files, 1.5)
}

pub(crate) fn medium(setup: &Setup) -> Result<Section> {
    section(setup, "files-medium", setup.sizes.medium_files, 1.5)
}

pub(crate) fn small(setup: &Setup) -> Result<Section> {
    section(setup, "files-small", setup.sizes.small_files, 2.0)
}

fn section(setup: &Setup, row: &'static str, (count, each): (usize, u64), required: f64) -> Result<Section> {
    progress(setup, row);
    make_room(setup)?;
    let files = setup.scratch.memory.join(row);
    for number in 0..count {
        setup.scratch.data(&format!("{row}/model-{number:05}.bin"), 100 + number as u64, each)?;
    }
    std::fs::create_dir_all(setup.served_folder())?;
    let server = ServerProcess::start(&setup.served_folder(), ServerKind::Plain)?;
    setup.publish(&server, row, &files)?;
    setup.link_for_peers(&format!("raw-{row}"), &files)?;
    let bytes = count as u64 * each;
    let reference = format!("{row}@1");
    let prefix = format!("raw-{row}");
    let our_entry = |setting: &str, durability: &'static str, change: fn(&mut Command) -> &mut Command| {
        let (server, reference) = (&server, &reference);
        let run = move |folder: &Path| {
            let mut command = setup.with_remote(&folder.join("cache"), server);
            let (used, path) = setup.get(change(&mut command), reference)?;
            check_size(&path, bytes)?;
            Ok(vec![used])
        };
        Entry::ours(setting, &[("", durability)], run)
    };
    // "after": the files become durable after the command has returned.
    let mut entries = vec![our_entry(DEFAULTS, "after", |command| command), our_entry(DURABLE, "yes", durable)];
    for copier in COPIERS {
        let (server, prefix) = (&server, &prefix);
        let run = move |folder: &Path| {
            let used = measure(&mut copier.command(setup, server, Operation::Tree, prefix, folder)?)?;
            check_size(folder, bytes)?;
            Ok(vec![used, used.then(sync(folder)?)])
        };
        let steps = vec![("", "no"), (" + sync", "yes")];
        entries.push(Entry {
            program: copier.program,
            setting: copier.setting(),
            verified: "no",
            steps,
            run: Box::new(run),
        });
    }
    let lines = compare_to_disk(setup, bytes, &entries)?;
    drop(entries);
    crate::scratch::remove(&files)?;
    crate::scratch::remove(&setup.served_folder())?;
    let best = best_peer(&lines, |_| true);
    let ratio = best.zip(ours(&lines, DEFAULTS).and_then(Line::seconds)).map(|(best, seconds)| best / seconds);
    Ok(Section {
        row,
        title: format!("{count} files of {}, S3 to disk", size(each)),
        what:
            "A download of one artifact that consists of these files. `+ sync` adds the time of `sync` for every file \
               and for their folder."
                .into(),
        tables: vec![table(&lines, best)],
        charts: Vec::new(),
        targets: vec![Target::at_least(
            &format!("`{DEFAULTS}`: speed, relative to the fastest peer"),
            ratio,
            " x",
            required,
            None,
        )],
        notes: Vec::new(),
    })
}
