//! Row for a safetensors file that is read while it is downloaded from S3: the time to its first tensor, and the share
//! of the file received by then.

use crate::bench::contest::{OURS, failure_cell, median, spread};
use crate::bench::page::{Bar, Section};
use crate::bench::rivals::url;
use crate::bench::rows::{progress, pull, size};
use crate::bench::scratch::remove;
use crate::bench::served::{Kind, SHAPED_BYTES_PER_S, SHAPED_FIRST_BYTE_MS, Served};
use crate::bench::setup::Setup;
use crate::bench::tensors::{FILE, NAME, REFERENCE, TENSORS, write_for};
use crate::bench::usage::Figures;
use crate::table::markdown;
use anyhow::{Result, ensure};

/// Prefix of the objects for the peers.
const RAW: &str = "raw-tensors";
const SCRIPT: &str = "first_tensor.py";
const READERS: [(&str, &str, &str); 3] = [
    ("open", OURS, "open, read as it comes"),
    ("get", OURS, "get, then safe_open"),
    ("runai", "runai streamer", "to memory, not kept"),
];

/// One run of a reader.
struct Read {
    first_s: f64,
    /// Percent of the file that the server had sent when the first tensor could be read.
    first_percent: f64,
    whole_s: f64,
    core_seconds: f64,
    rss_bytes: u64,
}

pub(in crate::bench) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-open");
    pull::make_room(setup)?;
    let (source, bytes) = write_for(setup)?;
    std::fs::create_dir_all(setup.served())?;
    setup.publish(&Served::start(&setup.served(), Kind::Plain)?, NAME, &source)?;
    setup.expose(RAW, &source)?;
    let served = Served::start(&setup.served(), Kind::Shaped)?;
    let mut reads: [Result<Vec<Read>>; READERS.len()] = std::array::from_fn(|_| Ok(Vec::new()));
    for round in 1..=setup.rounds {
        for ((how, who, setting), reads) in READERS.iter().zip(&mut reads) {
            let Ok(present) = reads else { continue };
            match once(setup, &served, how, bytes) {
                Ok(read) => {
                    eprintln!("  {round}  {who:<16} {setting:<24} {:.2} s, {:.1} %", read.first_s, read.first_percent);
                    present.push(read);
                }
                Err(error) => {
                    eprintln!("  {round}  {who:<16} {setting:<24} {error:#}");
                    *reads = Err(error);
                }
            }
        }
    }
    drop(served);
    remove(&setup.scratch.disk.join("run"))?;
    remove(&source)?;
    remove(&setup.served())?;
    Ok(report(setup, &reads))
}

fn once(setup: &Setup, served: &Served, how: &str, bytes: u64) -> Result<Read> {
    let folder = setup.scratch.fresh("run")?;
    // The script reads the bytes sent until its first tensor.
    served.forget_counts()?;
    let size = setup.sizes.tensors.to_string();
    let mut command = if how == "runai" {
        setup.peers.want("runai-model-streamer")?;
        setup.peers.want("runai-model-streamer-s3")?;
        let mut command = setup.peers.script(SCRIPT);
        command.envs(served.env()).env("HOME", &setup.scratch.disk);
        command.args([&size, how, &url(&format!("{RAW}/{FILE}"))]);
        command
    } else {
        setup.peers.want("safetensors")?;
        let mut command = setup.python_with_remote(SCRIPT, &folder.join("cache"), served);
        command.args([&size, how, REFERENCE, FILE]);
        command
    };
    setup.peers.want("numpy")?;
    let (process, figures) = Figures::of(&mut command)?;
    let read = figures.figure("bytes")?;
    ensure!(read == setup.sizes.tensors as f64, "read {read} bytes of tensors, not {}", setup.sizes.tensors);
    let first_percent = 100.0 * figures.figure("first_sent")? / bytes as f64;
    let (first_s, whole_s) = (figures.figure("first_s")?, figures.figure("whole_s")?);
    let core_seconds = figures.figure("core_seconds")?;
    Ok(Read { first_s, first_percent, whole_s, core_seconds, rss_bytes: process.rss_bytes })
}

fn report(setup: &Setup, reads: &[Result<Vec<Read>>]) -> Section {
    let of = |reads: &[Read], figure: fn(&Read) -> f64| median(reads.iter().map(figure).collect());
    let gb = setup.sizes.tensors as f64 / 1e9;
    let best_peer_s = READERS
        .iter()
        .zip(reads)
        .filter(|((_, who, _), _)| *who != OURS)
        .find_map(|(_, reads)| of(reads.as_ref().ok()?, |read| read.first_s));
    let cells = |((_, who, setting), reads): (&(&str, &str, &str), &Result<Vec<Read>>)| {
        let mut cells = vec![(*who).to_owned(), (*setting).to_owned()];
        let reads = match reads {
            Ok(reads) => reads,
            Err(error) => {
                cells.push(failure_cell(&format!("{error:#}")));
                return cells;
            }
        };
        let shown =
            |figure: fn(&Read) -> f64| of(reads, figure).map_or_else(String::new, |found| format!("{found:.2}"));
        let best = best_peer_s.zip(of(reads, |read| read.first_s));
        let rss_bytes = reads.iter().map(|read| read.rss_bytes).max().unwrap_or_default();
        cells.extend([
            shown(|read| read.first_s),
            spread(reads.iter().map(|read| read.first_s), 2),
            shown(|read| read.first_percent),
            shown(|read| read.whole_s),
            reads.len().to_string(),
            of(reads, |read| read.core_seconds).map_or_else(String::new, |spent| format!("{:.2}", spent / gb)),
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
        "come by then, %",
        "all s",
        "rounds",
        "core-s/GB",
        "peak RSS MiB",
        "x best peer, first",
    ];
    let opened = reads[0].as_ref().ok();
    Section {
        row: "python-open",
        title: format!("From Python: the first of {} of tensors, S3 shaped", size(setup.sizes.tensors)),
        what: format!(
            "{TENSORS} tensors in one safetensors file, at {} MB/s a connection and {SHAPED_FIRST_BYTE_MS} ms to the \
             first byte. In process, without the start of Python and imports: seconds until header and first tensor are \
             in memory, and until all are. What had come by then is what the server had sent.",
            SHAPED_BYTES_PER_S / 1_000_000
        ),
        tables: vec![markdown(&header, &READERS.iter().zip(reads).map(cells).collect::<Vec<_>>())],
        bars: vec![Bar::at_most(
            "`open`: share that had come at the first tensor",
            opened.and_then(|reads| of(reads, |read| read.first_percent)),
            " %",
            50.0,
            None,
        )],
        notes: vec!["The streamer's first tensor is whichever comes first, not the first of the file.".into()],
    }
}
