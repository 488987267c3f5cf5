//! Row for the upload of one large file to S3. The server counts the bytes and discards them.

use super::large_file::large_file;
use super::{DEFAULTS, progress, size};
use crate::comparison::{Entry, Line, best_peer, compare, ours, table};
use crate::copiers::{COPIERS, Operation, url};
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess};
use crate::setup::Setup;
use crate::usage::measure;
use anyhow::{Result, ensure};
use std::cell::Cell;
use std::process::Command;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "upload");
    let file = large_file(setup)?;
    let folder = setup.scratch.memory.join("sink");
    std::fs::create_dir_all(&folder)?;
    let server = ServerProcess::start(&folder, ServerKind::Plain)?;
    let bytes = setup.sizes.file;
    let number = Cell::new(0);
    // A new name for each upload, because modelcache does not upload content again that the remote has.
    let next_name = || {
        number.set(number.get() + 1);
        format!("upload-{}", number.get())
    };
    let measure_upload = |command: &mut Command| {
        server.reset_counts()?;
        let used = measure(command)?;
        let received = server.counts()?.bytes_received;
        ensure!(received >= bytes, "the program sent {received} bytes, not {bytes}");
        Ok(vec![used])
    };
    let (measure_upload, next_name, file, server) = (&measure_upload, &next_name, &file, &server);
    const STEPS: [(&str, &str); 1] = [("", "remote")];
    let ours_run = move |folder: &std::path::Path| {
        let mut put = setup.with_remote(&folder.join("cache"), server);
        put.env("MODEL_CACHE_REMOTE", url(&next_name()));
        measure_upload(put.args(["put", "bench/model@1", "--tier", "remote", "--quiet"]).arg(file))
    };
    let mut entries = vec![Entry::ours(DEFAULTS, &STEPS, ours_run)];
    for copier in COPIERS {
        let run = move |_: &std::path::Path| {
            measure_upload(&mut copier.command(setup, server, Operation::Put, &next_name(), file)?)
        };
        let setting = copier.setting();
        entries.push(Entry {
            program: copier.program,
            setting,
            verified: "no",
            steps: STEPS.to_vec(),
            run: Box::new(run),
        });
    }
    let lines = compare(setup, bytes, &entries)?;
    drop(entries);
    crate::scratch::remove(&folder)?;
    let best = best_peer(&lines, |_| true);
    let ratio = best.zip(ours(&lines, DEFAULTS).and_then(Line::seconds)).map(|(best, seconds)| best / seconds);
    Ok(Section {
        row: "upload",
        title: format!("Upload of one {} file to S3", size(bytes)),
        what: "The file is read from memory (tmpfs), and the server counts the bytes it receives and discards them. \
               modelcache hashes the file with SHA-256 and publishes it with its manifest (`put --tier remote`). The \
               other programs copy it, most of them with a CRC."
            .into(),
        tables: vec![table(&lines, best)],
        charts: Vec::new(),
        targets: vec![Target::at_least("speed, relative to the fastest peer", ratio, " x", 1.2, None)],
        notes: Vec::new(),
    })
}
