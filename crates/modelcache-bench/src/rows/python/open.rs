//! Row for a safetensors file that is read while it is downloaded from S3: the time to its first tensor, and the share
//! of the file received by then.

use crate::comparison::{OURS, failure_cell, median, spread};
use crate::copiers::url;
use crate::page::{Section, Target};
use crate::rows::{large_file, progress, size};
use crate::scratch::remove;
use crate::server_process::{SHAPED_BYTES_PER_S, SHAPED_FIRST_BYTE_MS, ServerKind, ServerProcess};
use crate::setup::Setup;
use crate::tensors::{FILE, NAME, REFERENCE, TENSORS, write_tensor_file};
use crate::usage::Figures;
use anyhow::{Result, ensure};
use xtask::table::markdown;

/// Prefix of the objects for the peers.
const RAW: &str = "raw-tensors";
const SCRIPT: &str = "first_tensor.py";
/// For each program that reads the file: the argument with which the script selects the program, its name, and its
/// setting.
const READERS: [(&str, &str, &str); 3] = [
    ("open", OURS, "open, read while it downloads"),
    ("get", OURS, "get, then safe_open"),
    ("runai", "runai streamer", "to memory, not kept"),
];

/// One run of a reader.
struct Read {
    first_s: f64,
    /// Percentage of the file that the server had sent when the first tensor was in memory.
    sent_percent: f64,
    whole_s: f64,
    core_seconds: f64,
    rss_bytes: u64,
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-open");
    large_file::make_room(setup)?;
    let (source, bytes) = write_tensor_file(setup)?;
    std::fs::create_dir_all(setup.served_folder())?;
    setup.publish(&ServerProcess::start(&setup.served_folder(), ServerKind::Plain)?, NAME, &source)?;
    setup.link_for_peers(RAW, &source)?;
    let server = ServerProcess::start(&setup.served_folder(), ServerKind::SHAPED)?;
    let mut reads: [Result<Vec<Read>>; READERS.len()] = std::array::from_fn(|_| Ok(Vec::new()));
    for round in 1..=setup.rounds {
        for ((reader, program, setting), reads) in READERS.iter().zip(&mut reads) {
            let Ok(previous) = reads else { continue };
            match measure(setup, &server, reader, bytes) {
                Ok(read) => {
                    eprintln!(
                        "  {round}  {program:<16} {setting:<24} {:.2} s, {:.1} %",
                        read.first_s, read.sent_percent
                    );
                    previous.push(read);
                }
                Err(error) => {
                    eprintln!("  {round}  {program:<16} {setting:<24} {error:#}");
                    *reads = Err(error);
                }
            }
        }
    }
    drop(server);
    remove(&setup.scratch.disk.join("run"))?;
    remove(&source)?;
    remove(&setup.served_folder())?;
    Ok(report(setup, &reads))
}

fn measure(setup: &Setup, server: &ServerProcess, reader: &str, bytes: u64) -> Result<Read> {
    let folder = setup.scratch.empty_folder("run")?;
    // At its first tensor, the script asks the server for the bytes that it has sent.
    server.reset_counts()?;
    let size = setup.sizes.tensors.to_string();
    let mut command = if reader == "runai" {
        setup.peers.require("runai-model-streamer")?;
        setup.peers.require("runai-model-streamer-s3")?;
        let mut command = setup.peers.script(SCRIPT);
        command.envs(server.env()).env("HOME", &setup.scratch.disk);
        command.args([&size, reader, &url(&format!("{RAW}/{FILE}"))]);
        command
    } else {
        setup.peers.require("safetensors")?;
        let mut command = setup.python_with_remote(SCRIPT, &folder.join("cache"), server);
        command.args([&size, reader, REFERENCE, FILE]);
        command
    };
    setup.peers.require("numpy")?;
    let (process, figures) = Figures::run(&mut command)?;
    let read = figures.get("bytes")?;
    ensure!(read == setup.sizes.tensors as f64, "read {read} bytes of tensors, not {}", setup.sizes.tensors);
    let sent_percent = 100.0 * figures.get("first_sent")? / bytes as f64;
    let (first_s, whole_s) = (figures.get("first_s")?, figures.get("whole_s")?);
    let core_seconds = figures.get("core_seconds")?;
    Ok(Read { first_s, sent_percent, whole_s, core_seconds, rss_bytes: process.rss_bytes })
}

fn report(setup: &Setup, reads: &[Result<Vec<Read>>]) -> Section {
    let median_of = |reads: &[Read], figure: fn(&Read) -> f64| median(reads.iter().map(figure).collect());
    let gb = setup.sizes.tensors as f64 / 1e9;
    let best_peer_s = READERS
        .iter()
        .zip(reads)
        .filter(|((_, program, _), _)| *program != OURS)
        .find_map(|(_, reads)| median_of(reads.as_ref().ok()?, |read| read.first_s));
    let cells = |((_, program, setting), reads): (&(&str, &str, &str), &Result<Vec<Read>>)| {
        let mut cells = vec![(*program).to_owned(), (*setting).to_owned()];
        let reads = match reads {
            Ok(reads) => reads,
            Err(error) => {
                cells.push(failure_cell(&format!("{error:#}")));
                return cells;
            }
        };
        let shown =
            |figure: fn(&Read) -> f64| median_of(reads, figure).map_or_else(String::new, |found| format!("{found:.2}"));
        let best = best_peer_s.zip(median_of(reads, |read| read.first_s));
        let rss_bytes = reads.iter().map(|read| read.rss_bytes).max().unwrap_or_default();
        cells.extend([
            shown(|read| read.first_s),
            spread(reads.iter().map(|read| read.first_s), 2),
            shown(|read| read.sent_percent),
            shown(|read| read.whole_s),
            reads.len().to_string(),
            median_of(reads, |read| read.core_seconds).map_or_else(String::new, |spent| format!("{:.2}", spent / gb)),
            (rss_bytes >> 20).to_string(),
            best.map_or_else(String::new, |(best, first)| format!("{:.2}", best / first)),
        ]);
        cells
    };
    let header = [
        "program",
        "setting",
        "first tensor s",
        "spread",
        "sent by then, %",
        "all tensors s",
        "rounds",
        "core-s/GB",
        "peak RSS MiB",
        "x best peer, first tensor",
    ];
    let opened = reads[0].as_ref().ok();
    Section {
        row: "python-open",
        title: format!("From Python: the first tensor of {} on S3, with traffic shaping", size(setup.sizes.tensors)),
        what: format!(
            "{TENSORS} tensors in one safetensors file. The server sends at most {} MB/s on each connection, and the \
             first byte of each response after {SHAPED_FIRST_BYTE_MS} ms. Measured *in process*: the seconds until \
             the header and the first tensor are in memory, the share of the file that the server had sent by then, \
             and the seconds until all tensors are in memory.",
            SHAPED_BYTES_PER_S / 1_000_000
        ),
        charts: Vec::new(),
        tables: vec![markdown(&header, &READERS.iter().zip(reads).map(cells).collect::<Vec<_>>())],
        targets: vec![Target::at_most(
            "`open`: share of the file sent until the first tensor",
            opened.and_then(|reads| median_of(reads, |read| read.sent_percent)),
            " %",
            50.0,
            None,
        )],
        notes: vec![
            "The first tensor of the streamer is the first one that arrives, not the first one in the file.".into(),
        ],
    }
}
