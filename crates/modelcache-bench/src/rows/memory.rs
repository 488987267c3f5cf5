//! Row for the peak memory of get and put: of the large file, and of a sparse file that is larger than the disk.
//!
//! The put of the sparse file runs to its end. Its get is stopped when the server has sent [`STOP_BYTES`]: by then
//! every list that grows with the size of the object exists, and the amount of data in flight has reached its limit. An
//! LD_PRELOAD library (`free_space.c`) reports more free space than the disk has, and makes preallocation only set the
//! length of the file.

use super::large_file::{REFERENCE, ServedFile};
use super::{DEFAULTS, DURABLE, durable, size};
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess};
use crate::setup::{BUCKET, Setup, files_of};
use crate::usage::{Running, Usage, measure};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use xtask::table::markdown;

/// The get of the sparse file is stopped when the server has sent this many bytes.
const STOP_BYTES: u64 = 6 << 30;
/// The get of the sparse file is stopped after this time at the latest.
const STOP_AFTER: Duration = Duration::from_secs(60);
/// Source of the LD_PRELOAD library.
const FREE_SPACE_SOURCE: &str = include_str!("../free_space.c");

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    eprintln!("memory");
    let mut rows = Vec::new();
    let [with_defaults, with_durable] = large_file_gets(setup)?;
    let get = format!("get of {}", size(setup.sizes.file));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let row = |operation: &str, setting: &str, rss_bytes: u64, extent: String| {
        vec![operation.to_owned(), setting.to_owned(), format!("{:.0}", mib(rss_bytes)), extent]
    };
    rows.push(row(&get, DEFAULTS, with_defaults, "complete".into()));
    rows.push(row(&get, DURABLE, with_durable, "complete".into()));
    let gb = setup.sizes.sparse / 1_000_000_000;
    let sparse = sparse_file_runs(setup).inspect_err(|error| eprintln!("  the sparse file of {gb} GB: {error:#}"));
    let mut sparse_rss = None;
    match &sparse {
        Ok(SparseRuns { put, get, sent_bytes }) => {
            sparse_rss = Some(get.rss_bytes);
            rows.push(row(
                &format!("put of a sparse file of {gb} GB"),
                DEFAULTS,
                put.rss_bytes,
                format!("complete, {:.0} s", put.seconds),
            ));
            let extent = format!("stopped after {:.1} GB, {:.0} s", *sent_bytes as f64 / 1e9, get.seconds);
            rows.push(row(&format!("get of a sparse file of {gb} GB"), DURABLE, get.rss_bytes, extent));
        }
        Err(error) => {
            rows.push(vec![format!("a sparse file of {gb} GB"), String::new(), String::new(), format!("{error:#}")])
        }
    }
    Ok(Section {
        row: "memory",
        title: "Peak memory".into(),
        what: format!(
            "The peak resident memory of the process (`ru_maxrss`). The file of {gb} GB is sparse. `modelcache put` \
             publishes it with its ladder. Its get is stopped early; a preloaded library makes the disk appear large \
             enough for the file."
        ),
        tables: vec![markdown(&["operation", "setting", "peak RSS MiB", "extent"], &rows)],
        charts: Vec::new(),
        targets: vec![
            Target::at_most(
                &format!("peak RSS, {get}"),
                Some(mib(with_defaults.max(with_durable))),
                " MiB",
                128.0,
                Some(64.0),
            ),
            Target::at_most(&format!("peak RSS, get of {gb} GB"), sparse_rss.map(mib), " MiB", 128.0, Some(64.0)),
        ],
        notes: Vec::new(),
    })
}

/// Returns the highest peak of at most three gets of the file, for each setting.
fn large_file_gets(setup: &Setup) -> Result<[u64; 2]> {
    let served = ServedFile::start(setup, ServerKind::Plain)?;
    let mut peaks = [0, 0];
    for _ in 0..setup.rounds.min(3) {
        let settings: [fn(&mut Command) -> &mut Command; 2] = [|command| command, durable];
        for (change, peak) in settings.into_iter().zip(&mut peaks) {
            let folder = setup.scratch.empty_folder("run")?;
            let mut command = setup.with_remote(&folder.join("cache"), &served.server);
            *peak = setup.get(change(&mut command), REFERENCE)?.0.rss_bytes.max(*peak);
        }
    }
    crate::scratch::remove(&setup.scratch.disk.join("run"))?;
    Ok(peaks)
}

/// The put and the get of the sparse file.
struct SparseRuns {
    put: Usage,
    get: Usage,
    /// Bytes that the server had sent when the get was stopped.
    sent_bytes: u64,
}

fn sparse_file_runs(setup: &Setup) -> Result<SparseRuns> {
    let folder = setup.scratch.memory.join("sparse");
    std::fs::create_dir_all(folder.join("s3"))?;
    let file = folder.join("holes.bin");
    File::create(&file)?.set_len(setup.sizes.sparse)?;
    let server = ServerProcess::start(&folder.join("s3"), ServerKind::Plain)?;
    let measured = put_and_get(setup, &server, &folder, &file);
    drop(server);
    crate::scratch::remove(&folder)?;
    crate::scratch::remove(&setup.scratch.disk.join("run"))?;
    measured
}

fn put_and_get(setup: &Setup, server: &ServerProcess, folder: &Path, file: &Path) -> Result<SparseRuns> {
    let run = setup.scratch.empty_folder("run")?;
    let library = build_free_space_library(&run)?;
    let with_free_space = |server: &ServerProcess| {
        let mut command = setup.with_remote(&run.join("cache"), server);
        command.env("LD_PRELOAD", &library).env("MODEL_CACHE_MAX_BYTES", "1TB");
        command
    };
    let put = measure(with_free_space(server).args(["put", "sparse@1", "--tier", "remote", "--quiet"]).arg(file))?;
    // The server discarded the content, so let it serve the original file.
    let objects = folder.join("s3").join(BUCKET).join("bench/sparse/1");
    let target = objects.join("holes.bin");
    std::fs::create_dir_all(&objects)?;
    std::fs::hard_link(file, &target)?;
    ensure!(files_of(&objects)?.len() == 1, "the server kept an upload that it should have discarded");
    server.reset_counts()?;
    let stop = STOP_BYTES.min(setup.sizes.sparse / 4);
    let getting = Running::start(durable(&mut with_free_space(server)).args(["get", "sparse@1", "--quiet"]))?;
    let started = Instant::now();
    // Stop at the byte limit, at the time limit, or when the program exits.
    while server.counts()?.bytes_sent < stop && started.elapsed() < STOP_AFTER && getting.is_running() {
        std::thread::sleep(Duration::from_millis(50));
    }
    getting.terminate();
    let (get, _, output) = getting.wait()?;
    let sent_bytes = server.counts()?.bytes_sent;
    ensure!(
        sent_bytes >= stop.min(1 << 30),
        "only {sent_bytes} bytes were sent: {}",
        output[1].lines().last().unwrap_or_default()
    );
    Ok(SparseRuns { put, get, sent_bytes })
}

/// Compiles the library that reports more free space.
fn build_free_space_library(folder: &Path) -> Result<PathBuf> {
    let library = folder.join("free_space.so");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-x", "c", "-", "-o"]).arg(&library).stdin(Stdio::piped());
    let mut compiling =
        compiler.spawn().context("cannot run the C compiler cc; on Debian and Ubuntu: apt-get install gcc")?;
    compiling.stdin.take().context("the C compiler has no standard input")?.write_all(FREE_SPACE_SOURCE.as_bytes())?;
    ensure!(compiling.wait()?.success(), "free_space.c does not compile");
    Ok(library)
}
