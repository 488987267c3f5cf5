//! Row for the peak memory of get and put: of a regular file, and of a file larger than any disk here.
//!
//! The large file consists of holes, so it costs the server nothing. Its put is measured to the end. Its get is stopped
//! when the server has sent [`STOP_BYTES`]: by then every list that grows with the object's size exists, and the amount
//! of data in flight reached its limit long before. An LD_PRELOAD library (`room.c`) replaces the missing disk space:
//! it reports more free space than there is, and makes preallocation only set the length.

use super::pull::{REFERENCE, Stage};
use super::{DEFAULTS, DURABLE, durable, size};
use crate::bench::page::{Bar, Section};
use crate::bench::served::{Kind, Served};
use crate::bench::setup::{BUCKET, Setup, files_of};
use crate::bench::usage::{Run, Running, measure};
use crate::table::markdown;
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const STOP_BYTES: u64 = 6 << 30;
const STOP_AFTER: Duration = Duration::from_secs(60);
const ROOM: &str = include_str!("../room.c");

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    eprintln!("memory");
    let mut rows = Vec::new();
    let [with_defaults, past_cache] = whole(setup)?;
    let what = format!("get of {}", size(setup.sizes.file));
    let shown = |what: &str, setting: &str, rss: u64, how: String| {
        vec![what.to_owned(), setting.to_owned(), format!("{:.0}", rss as f64 / f64::from(1 << 20)), how]
    };
    rows.push(shown(&what, DEFAULTS, with_defaults, "to its end".into()));
    rows.push(shown(&what, DURABLE, past_cache, "to its end".into()));
    let gb = setup.sizes.sparse / 1_000_000_000;
    let sparse = sparse(setup).inspect_err(|error| eprintln!("  the object of {gb} GB: {error:#}"));
    let mut sparse_rss = None;
    match &sparse {
        Ok(Sparse { put, get, landed }) => {
            sparse_rss = Some(get.rss_bytes);
            rows.push(shown(
                &format!("put of {gb} GB of holes"),
                DEFAULTS,
                put.rss_bytes,
                format!("to its end, {:.0} s", put.seconds),
            ));
            let how = format!("stopped after {:.1} GB, {:.0} s", *landed as f64 / 1e9, get.seconds);
            rows.push(shown(&format!("get of {gb} GB of holes"), DURABLE, get.rss_bytes, how));
        }
        Err(error) => rows.push(vec![format!("{gb} GB of holes"), String::new(), String::new(), format!("{error:#}")]),
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Ok(Section {
        row: "memory",
        title: "Memory".into(),
        what: "The most that the process held (`ru_maxrss`). The large object is published by our own put, with its ladder; \
               its get is stopped early, on a directory that is told to have the room."
            .into(),
        tables: vec![markdown(&["what", "setting", "peak RSS MiB", "how"], &rows)],
        bars: vec![
            Bar::at_most(&what, Some(mib(with_defaults.max(past_cache))), " MiB", 128.0, Some(64.0)),
            Bar::at_most(&format!("get of {gb} GB"), sparse_rss.map(mib), " MiB", 128.0, Some(64.0)),
        ],
        notes: Vec::new(),
    })
}

/// Returns the highest peak of at most three gets of the file, for each setting.
fn whole(setup: &Setup) -> Result<[u64; 2]> {
    let stage = Stage::set(setup, Kind::Plain)?;
    let mut most = [0, 0];
    for _ in 0..setup.rounds.min(3) {
        let settings: [fn(&mut Command) -> &mut Command; 2] = [|command| command, durable];
        for (change, most) in settings.into_iter().zip(&mut most) {
            let folder = setup.scratch.fresh("run")?;
            let mut command = setup.with_remote(&folder.join("cache"), &stage.served);
            *most = setup.get(change(&mut command), REFERENCE)?.0.rss_bytes.max(*most);
        }
    }
    crate::bench::scratch::remove(&setup.scratch.disk.join("run"))?;
    Ok(most)
}

struct Sparse {
    put: Run,
    get: Run,
    /// Bytes that the server had sent when the get was stopped.
    landed: u64,
}

fn sparse(setup: &Setup) -> Result<Sparse> {
    let folder = setup.scratch.memory.join("sparse");
    std::fs::create_dir_all(folder.join("s3"))?;
    let file = folder.join("holes.bin");
    File::create(&file)?.set_len(setup.sizes.sparse)?;
    let served = Served::start(&folder.join("s3"), Kind::Plain)?;
    let measured = put_and_get(setup, &served, &folder, &file);
    drop(served);
    crate::bench::scratch::remove(&folder)?;
    crate::bench::scratch::remove(&setup.scratch.disk.join("run"))?;
    measured
}

fn put_and_get(setup: &Setup, served: &Served, folder: &Path, file: &Path) -> Result<Sparse> {
    let run = setup.scratch.fresh("run")?;
    let room = build_room(&run)?;
    let with_room = |served: &Served| {
        let mut command = setup.with_remote(&run.join("cache"), served);
        command.env("LD_PRELOAD", &room).env("MODEL_CACHE_MAX_BYTES", "1TB");
        command
    };
    let put = measure(with_room(served).args(["put", "sparse@1", "--tier", "remote", "--quiet"]).arg(file))?;
    // The server discarded the content, so let it serve the original file.
    let objects = folder.join("s3").join(BUCKET).join("bench/sparse/1");
    let target = objects.join("holes.bin");
    std::fs::create_dir_all(&objects)?;
    std::fs::hard_link(file, &target)?;
    ensure!(files_of(&objects)?.len() == 1, "the server kept what it should have thrown away");
    served.forget_counts()?;
    let stop = STOP_BYTES.min(setup.sizes.sparse / 4);
    let getting = Running::start(durable(&mut with_room(served)).args(["get", "sparse@1", "--quiet"]))?;
    let started = Instant::now();
    // Stop at the byte limit, at the time limit, or when the program exits.
    while served.counted()?.bytes_sent < stop && started.elapsed() < STOP_AFTER && getting.is_running() {
        std::thread::sleep(Duration::from_millis(50));
    }
    getting.terminate();
    let (get, _, output) = getting.wait()?;
    let landed = served.counted()?.bytes_sent;
    ensure!(
        landed >= stop.min(1 << 30),
        "only {landed} bytes were sent: {}",
        output[1].lines().last().unwrap_or_default()
    );
    Ok(Sparse { put, get, landed })
}

/// Compiles the library that reports more free space.
fn build_room(folder: &Path) -> Result<PathBuf> {
    let library = folder.join("room.so");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-x", "c", "-", "-o"]).arg(&library).stdin(Stdio::piped());
    let mut compiling =
        compiler.spawn().context("there is no C compiler; on Debian and Ubuntu: apt-get install gcc")?;
    compiling.stdin.take().context("no way to hand the source over")?.write_all(ROOM.as_bytes())?;
    ensure!(compiling.wait()?.success(), "the library does not compile");
    Ok(library)
}
