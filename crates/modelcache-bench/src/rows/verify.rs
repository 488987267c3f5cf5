//! Row for the verification of a cached file, compared with reading the disk and with hashing alone.

use super::large_file::{REFERENCE, ServedFile};
use super::{durable, progress, size};
use crate::comparison::{Entry, Line, OURS, compare, ours, table};
use crate::page::{Section, Target};
use crate::scratch::drop_from_page_cache;
use crate::server_process::ServerKind;
use crate::setup::{Setup, read};
use crate::usage::{Usage, measure, run};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

const SETTING: &str = "verify";
const READ: &str = "O_DIRECT read";

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "verify");
    let served = ServedFile::start(setup, ServerKind::Plain)?;
    let cache = setup.scratch.empty_folder("verify")?;
    let (_, file) = setup.get(durable(&mut setup.with_remote(&cache, &served.server)), REFERENCE)?;
    let (file, cache) = (file.as_path(), cache.as_path());
    let verify = move |_: &Path| {
        drop_from_page_cache(file)?;
        Ok(vec![measure(setup.modelcache(cache).args(["verify", REFERENCE, "--quiet"]))?])
    };
    let hash = |program: &'static str, arguments: &'static [&'static str]| {
        move |_: &Path| {
            // Bring the file into the page cache, so that only the hash is measured.
            read(file, false)?;
            Ok(vec![measure(Command::new(program).args(arguments).arg(file))?])
        }
    };
    let entry = |program: &'static str, setting: &str, verified, run| Entry {
        program,
        setting: setting.to_owned(),
        verified,
        // One step. It adds nothing to the setting, and the column `durable` is empty.
        steps: vec![("", "")],
        run,
    };
    let entries: Vec<Entry<'_>> = vec![
        entry(OURS, SETTING, "SHA-256", Box::new(verify)),
        entry("this bench", READ, "no", Box::new(move |_| Ok(vec![read(file, true)?]))),
        entry("fio", "4 MiB, queue depth 8, O_DIRECT", "no", Box::new(move |_| Ok(vec![fio(file, setup.sizes.file)?]))),
        entry("sha256sum", "from the page cache", "SHA-256", Box::new(hash("sha256sum", &[]))),
        entry("openssl", "from the page cache", "SHA-256", Box::new(hash("openssl", &["dgst", "-sha256"]))),
    ];
    let lines = compare(setup, setup.sizes.file, &entries)?;
    drop(entries);
    crate::scratch::remove(cache)?;
    let fastest = |names: [&str; 2]| {
        let candidates = lines.iter().filter(|line| names.contains(&line.program));
        candidates.filter_map(Line::seconds).min_by(f64::total_cmp)
    };
    let (read_s, hash_s) = (fastest(["this bench", "fio"]), fastest(["sha256sum", "openssl"]));
    let bound_s = read_s.zip(hash_s).map(|(read, hash)| read.max(hash));
    let share = bound_s.zip(ours(&lines, SETTING).and_then(Line::seconds)).map(|(bound, ours)| 100.0 * bound / ours);
    Ok(Section {
        row: "verify",
        title: format!("Verification of a cached {} file", size(setup.sizes.file)),
        what: "The file is on disk, but not in the page cache, when `modelcache verify` starts. Two rates limit the \
               verification: reading the file in order with O_DIRECT (the faster of this bench and `fio`), and \
               hashing it in one SHA-256 stream from the page cache (the faster of `sha256sum` and `openssl`). The \
               target refers to the slower of the two."
            .into(),
        tables: vec![table(&lines, None)],
        charts: Vec::new(),
        targets: vec![Target::at_least("speed, as a share of the slower rate", share, " %", 90.0, None)],
        notes: Vec::new(),
    })
}

/// Runs fio. Returns its usage, with the read time that fio reports instead of the run time.
fn fio(file: &Path, bytes: u64) -> Result<Usage> {
    let mut command = Command::new("fio");
    command.args(["--name=read", "--readonly", "--rw=read", "--bs=4M", "--direct=1", "--ioengine=libaio"]);
    command.args(["--iodepth=8", "--output-format=json"]).arg(format!("--filename={}", file.display()));
    let (used, printed) = run(&mut command)?;
    let report: serde_json::Value = serde_json::from_str(&printed).context("fio printed no JSON")?;
    let rate = report["jobs"][0]["read"]["bw_bytes"].as_f64().context("fio reports no read rate")?;
    Ok(Usage { seconds: bytes as f64 / rate, ..used })
}
