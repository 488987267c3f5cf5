//! Rows for the first and the second download of a model through the daemon with huggingface_hub, beside a download
//! without a server in between, and beside olah.

use super::start_daemon;
use crate::comparison::{Entry, Line, OURS, best_peer, claim_page_cache_memory, compare, ours, table};
use crate::page::{Section, Target};
use crate::rows::hub::ServedRepo;
use crate::rows::{progress, size};
use crate::server_process::{SHAPED_BYTES_PER_S, SHAPED_FIRST_BYTE_MS, ServerKind};
use crate::service::{Service, free_address};
use crate::setup::Setup;
use crate::usage::Usage;
use anyhow::{Context, Result};
use std::path::Path;

/// The steps of a download through a server, each with its cell in the column `durable`: first the server does not have
/// the file, then it has it.
const COLD_AND_WARM: [(&str, &str); 2] = [("cold", "no"), ("warm", "no")];

/// The setting of the download without a server in between.
const DIRECT: &str = "direct";
/// How a download through a server is measured.
const HOW_THROUGH: &str = "The server has an empty cache (`cold`), or has served the file once (`warm`). The client \
    starts without a cache each time. Core-seconds are the sum of the client and the server in between, and peak RSS is \
    that of the larger of the two. The daemon verifies the bytes with SHA-256 when it downloads them.";

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "daemon-cold");
    let served = ServedRepo::start(setup, setup.sizes.file)?;
    let lines = compare(
        setup,
        setup.sizes.file,
        &[direct(&served), daemon(&served), through(&served, "olah", "no", start_olah)],
    )?;
    Ok(Section {
        row: "daemon-cold",
        title: format!("Daemon: one {} file from the Hub with huggingface_hub", size(setup.sizes.file)),
        what: format!(
            "`snapshot_download` of huggingface_hub to disk: `direct` from the stand-in for the Hub, and through a \
             server in between, which `HF_ENDPOINT` names. {HOW_THROUGH} [olah](https://pypi.org/project/olah) is \
             another mirror of the Hub."
        ),
        tables: vec![table(&lines, best_peer(&lines, |_| true))],
        charts: Vec::new(),
        targets: vec![Target::at_least("`cold`: speed, relative to `direct`", speed(&lines, "cold"), " x", 0.9, None)],
        notes: Vec::new(),
    })
}

pub(crate) fn shaped(setup: &Setup) -> Result<Section> {
    progress(setup, "daemon-shaped");
    let served = ServedRepo::start_with_cdn(setup, setup.sizes.file, ServerKind::SHAPED)?;
    let lines = compare(setup, setup.sizes.file, &[direct(&served), daemon(&served)])?;
    Ok(Section {
        row: "daemon-shaped",
        title: format!(
            "Daemon: one {} file from the Hub with huggingface_hub, with traffic shaping",
            size(setup.sizes.file)
        ),
        what: format!(
            "The same as above, with traffic shaping at the CDN: at most {} MB/s on each connection, and the first byte \
             of each response after {SHAPED_FIRST_BYTE_MS} ms. huggingface_hub downloads a file over one connection, \
             and the daemon over several. {HOW_THROUGH}",
            SHAPED_BYTES_PER_S / 1_000_000
        ),
        tables: vec![table(&lines, best_peer(&lines, |_| true))],
        charts: Vec::new(),
        targets: vec![Target::at_least("`warm`: speed, relative to `direct`", speed(&lines, "warm"), " x", 2.0, None)],
        notes: Vec::new(),
    })
}

/// Returns the speed of our line with this setting, relative to the direct download.
fn speed(lines: &[Line], setting: &str) -> Option<f64> {
    let direct = lines.iter().find(|line| line.setting == DIRECT)?.seconds()?;
    Some(direct / ours(lines, setting)?.seconds()?)
}

fn direct<'a>(served: &'a ServedRepo<'_>) -> Entry<'a> {
    let run = |folder: &Path| {
        claim_page_cache_memory(&served.setup.scratch.disk, served.setup.sizes.file)?;
        Ok(vec![served.snapshot(&served.hub.url(), folder, None)?])
    };
    Entry {
        program: "huggingface_hub",
        setting: DIRECT.into(),
        verified: "no",
        steps: vec![("", "no")],
        run: Box::new(run),
    }
}

fn daemon<'a>(served: &'a ServedRepo<'_>) -> Entry<'a> {
    through(served, OURS, "at fill", |served, folder| {
        start_daemon(served.setup, &folder.join("cache"), Some(&served.hub.url()))
    })
}

/// Returns the entry of a download through the server that `start` starts with an empty cache in a folder.
fn through<'a>(
    served: &'a ServedRepo<'_>,
    program: &'static str,
    verified: &'static str,
    start: fn(&ServedRepo<'_>, &Path) -> Result<Service>,
) -> Entry<'a> {
    let run = move |folder: &Path| cold_and_warm(served, &start(served, folder)?, folder);
    Entry { program, setting: String::new(), verified, steps: COLD_AND_WARM.to_vec(), run: Box::new(run) }
}

fn start_olah(served: &ServedRepo<'_>, folder: &Path) -> Result<Service> {
    served.setup.peers.require("olah")?;
    let (address, hub) = (free_address()?, served.hub.url());
    let (scheme, hub) = hub.split_once("://").context("a URL has a scheme")?;
    let mut command = served.setup.peers.program("olah-cli");
    command.env("HOME", folder).current_dir(folder);
    command.args(["--host", &address.ip().to_string(), "--port", &address.port().to_string()]);
    command.args(["--hf-scheme", scheme, "--hf-netloc", hub]);
    command.args(["--mirror-netloc", &address.to_string(), "--mirror-lfs-netloc", &address.to_string()]);
    command.arg("--repos-path").arg(folder.join("cache")).arg("--log-path").arg(folder.join("logs"));
    Service::start(&mut command, address)
}

/// Downloads the repository twice through a server with an empty cache. Returns one measurement for each.
fn cold_and_warm(served: &ServedRepo<'_>, server: &Service, folder: &Path) -> Result<Vec<Usage>> {
    let mut runs = Vec::new();
    for (step, _) in COLD_AND_WARM {
        let target = folder.join(step);
        // The cold run writes the file twice: to the cache of the server, and to that of the client.
        let files = if step == "cold" { 2 } else { 1 };
        claim_page_cache_memory(&served.setup.scratch.disk, files * served.setup.sizes.file)?;
        let (client, used) = server.usage_during(|| served.snapshot(&server.url(), &target, None))?;
        runs.push(client.with_server(used));
        crate::scratch::remove(&target)?;
        // As before each run: write dirty pages back.
        rustix::fs::sync();
    }
    Ok(runs)
}
