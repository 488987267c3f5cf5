//! Row for the transfer of one large file, which the daemon has on disk, to one client, compared with nginx.

use super::{NGINX, artifact_url, fetch, put, start_daemon, start_nginx};
use crate::comparison::{Entry, Line, OURS, best_peer, compare, ours, table};
use crate::page::{Section, Target};
use crate::rows::large_file::large_file;
use crate::rows::{DEFAULTS, progress, size};
use crate::service::Service;
use crate::setup::{Setup, read};
use crate::usage::Usage;
use anyhow::{Context, Result};
use std::path::Path;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "daemon-warm");
    let (bytes, folder) = (setup.sizes.file, setup.scratch.empty_folder("daemon")?);
    let dir = folder.join("cache");
    let file = put(setup, &dir, &large_file(setup)?)?;
    // Both servers send the same file from the page cache.
    read(&file, false)?;
    let daemon = start_daemon(setup, &dir, None)?;
    let (root, name) = (file.parent().context("a file lies in a folder")?, file.file_name().unwrap_or_default());
    let nginx = start_nginx(setup, root, &folder);
    let name = name.to_string_lossy();
    let daemon_url = artifact_url(&daemon, &file);
    let entries = [
        Entry {
            program: OURS,
            setting: DEFAULTS.into(),
            verified: "at put",
            steps: vec![("", "")],
            run: Box::new(|_: &Path| fetch_from(&daemon, &daemon_url, bytes)),
        },
        Entry {
            program: NGINX,
            setting: "sendfile, one process".into(),
            verified: "no",
            steps: vec![("", "")],
            run: Box::new(|_: &Path| {
                let nginx = nginx.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
                fetch_from(nginx, &format!("{}/{name}", nginx.url()), bytes)
            }),
        },
    ];
    let lines = compare(setup, bytes, &entries)?;
    drop(entries);
    drop((daemon, nginx));
    crate::scratch::remove(&folder)?;
    let best = best_peer(&lines, |_| true);
    let ratio = best.zip(ours(&lines, DEFAULTS).and_then(Line::seconds)).map(|(best, seconds)| best / seconds);
    Ok(Section {
        row: "daemon-warm",
        title: format!("Daemon: one {} file from the cache to one client", size(bytes)),
        what: "The file is in the page cache. The client requests it over plain HTTP on one connection, reads it and \
               discards it. nginx serves the same file. Core-seconds and peak RSS are those of the server, not of the \
               client, which shares the cores."
            .into(),
        tables: vec![table(&lines, best)],
        charts: Vec::new(),
        targets: vec![Target::at_least("speed, relative to nginx", ratio, " x", 0.8, None)],
        notes: Vec::new(),
    })
}

/// Fetches the file once. Returns the seconds of the client, and the core-seconds and memory of the server.
fn fetch_from(server: &Service, url: &str, bytes: u64) -> Result<Vec<Usage>> {
    let ((client, _), used) = server.usage_during(|| fetch(url, 1, bytes))?;
    Ok(vec![Usage { seconds: client.seconds, ..used }])
}
