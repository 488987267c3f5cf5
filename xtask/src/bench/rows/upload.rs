//! Row for one large file to S3, where the bytes are counted and discarded.

use super::pull::the_file;
use super::{DEFAULTS, progress, size};
use crate::bench::contest::{Entry, Line, OURS, best_peer, contest, ours, table};
use crate::bench::page::{Bar, Section};
use crate::bench::rivals::{ALL, Way, url};
use crate::bench::served::{Kind, Served};
use crate::bench::setup::Setup;
use crate::bench::usage::measure;
use anyhow::{Result, ensure};
use std::cell::Cell;
use std::process::Command;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "upload");
    let file = the_file(setup)?;
    let folder = setup.scratch.memory.join("sink");
    std::fs::create_dir_all(&folder)?;
    let served = Served::start(&folder, Kind::Plain)?;
    let bytes = setup.sizes.file;
    let number = Cell::new(0);
    // A new prefix for each upload: content that a remote has is not uploaded again.
    let next = || {
        number.set(number.get() + 1);
        format!("upload-{}", number.get())
    };
    let counted = |command: &mut Command| {
        served.forget_counts()?;
        let used = measure(command)?;
        let taken = served.counted()?.bytes_taken;
        ensure!(taken >= bytes, "sent {taken} bytes, not {bytes}");
        Ok(vec![used])
    };
    let (counted, next, file, served) = (&counted, &next, &file, &served);
    let steps = || vec![("", "remote")];
    let ours_run = move |folder: &std::path::Path| {
        let mut put = setup.with_remote(&folder.join("cache"), served);
        put.env("MODEL_CACHE_REMOTE", url(&next()));
        counted(put.args(["put", "bench/model@1", "--tier", "remote", "--quiet"]).arg(file))
    };
    let mut entries = vec![Entry {
        who: OURS,
        setting: DEFAULTS.into(),
        checked: "SHA-256",
        steps: steps(),
        run: Box::new(ours_run),
    }];
    for rival in ALL {
        let run = move |_: &std::path::Path| counted(&mut rival.command(setup, served, Way::Put, &next(), file)?);
        let setting = rival.setting();
        entries.push(Entry { who: rival.who, setting, checked: "no", steps: steps(), run: Box::new(run) });
    }
    let lines = contest(setup, bytes, &entries)?;
    drop(entries);
    crate::bench::scratch::remove(&folder)?;
    let best = best_peer(&lines, |_| true);
    let ratio = best.zip(ours(&lines, DEFAULTS).and_then(Line::seconds)).map(|(best, seconds)| best / seconds);
    Ok(Section {
        row: "upload",
        title: format!("One {} file to S3", size(bytes)),
        what:
            "From memory (tmpfs) to a server that counts bodies and throws them away. Ours reads the file, hashes it, \
               and publishes it with its manifest (`put --tier remote`); the others copy it, most with a CRC."
                .into(),
        tables: vec![table(&lines, best)],
        bars: vec![Bar::at_least("times the best peer", ratio, " x", 1.2, None)],
        notes: Vec::new(),
    })
}
