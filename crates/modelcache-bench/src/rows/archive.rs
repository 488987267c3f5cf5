//! Row for the time from an archive in S3 to its files on disk, downloaded and extracted in one pass or in two.

use super::{progress, size};
use crate::comparison::{Entry, Line, OURS, compare_to_disk, ours, table};
use crate::copiers::{COPIERS, Copier, Operation};
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess};
use crate::setup::{Setup, check_size};
use crate::usage::{Usage, measure};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

const WEIGHTS: &str = "weights.bin";
/// The texts of our entries in the column `setting`: these three constants. The texts of the peers end with `GZIP` or
/// `PLAIN`.
const GZIP: &str = "tar.gz";
const PLAIN: &str = "tar";
const NOT_EXTRACTED: &str = "tar, not extracted";
/// The limit for peak memory, in MiB.
const RSS_MIB_MAX: f64 = 128.0;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "archive");
    super::large_file::make_room(setup)?;
    let bytes = setup.sizes.tensors;
    let folder = setup.scratch.memory.join("archive");
    fs::create_dir_all(&folder)?;
    write_weights(&folder.join(WEIGHTS), bytes)?;
    for (name, compressor) in [("model.tar", None), ("model.tar.gz", Some("gzip -1"))] {
        let mut tar = Command::new("tar");
        tar.args(compressor.map(|program| format!("--use-compress-program={program}")));
        measure(tar.arg("-cf").arg(folder.join(name)).arg("-C").arg(&folder).arg(WEIGHTS))?;
    }
    fs::remove_file(folder.join(WEIGHTS))?;
    fs::create_dir_all(setup.served_folder())?;
    let server = ServerProcess::start(&setup.served_folder(), ServerKind::Plain)?;
    for name in ["model.tar", "model.tar.gz"] {
        setup.publish(&server, &format!("bench/{name}"), &folder.join(name))?;
        setup.link_for_peers("archive", &folder.join(name))?;
    }
    let (server, archive) = (&server, folder.join("model.tar.gz"));
    let get = |setting: &'static str, name: &'static str, extract: &'static str| {
        Entry::ours(setting, &[("", "after")], move |folder: &Path| {
            let mut command = setup.with_remote(&folder.join("cache"), server);
            command.env("MODEL_CACHE_EXTRACT", extract).env("MODEL_CACHE_WRITE_MODE", "buffered");
            let (used, path) = setup.get(&mut command, &format!("bench/{name}@1"))?;
            if extract == "always" {
                check_size(&path.join(WEIGHTS), bytes)?;
            }
            Ok(vec![used])
        })
    };
    let copy = |copier: Copier, name: &'static str| Entry {
        program: copier.program,
        setting: format!("{}, then tar, {}", copier.setting(), if name == "model.tar" { PLAIN } else { GZIP }),
        verified: "no",
        steps: vec![("", "no")],
        run: Box::new(move |folder: &Path| {
            let file = folder.join(name);
            let key = format!("archive/{name}");
            let copied = measure(&mut copier.command(setup, server, Operation::Get, &key, &file)?)?;
            let extracted = measure(Command::new("tar").arg("-xf").arg(&file).arg("-C").arg(folder))?;
            check_size(&folder.join(WEIGHTS), bytes)?;
            Ok(vec![copied.then(extracted)])
        }),
    };
    let gunzip = Entry {
        program: "gzip",
        setting: "decompression alone, from memory".into(),
        verified: "no",
        steps: vec![("", "not kept")],
        run: Box::new(move |_: &Path| gunzip(&archive)),
    };
    let (aws, s5cmd) = (copier("aws")?, copier("s5cmd")?);
    let entries = vec![
        get(GZIP, "model.tar.gz", "always"),
        copy(aws, "model.tar.gz"),
        copy(s5cmd, "model.tar.gz"),
        gunzip,
        get(PLAIN, "model.tar", "always"),
        get(NOT_EXTRACTED, "model.tar", "never"),
        copy(aws, "model.tar"),
        copy(s5cmd, "model.tar"),
    ];
    let lines = compare_to_disk(setup, bytes, &entries)?;
    drop(entries);
    super::large_file::make_room(setup)?;
    crate::scratch::remove(&folder)?;
    let seconds = |program: &str, part: &str| {
        let line = lines.iter().find(|line| line.program == program && line.setting.contains(part));
        line.and_then(Line::seconds)
    };
    let share = |ours: Option<f64>, other: Option<f64>| ours.zip(other).map(|(ours, other)| ours / other);
    let (gzip, plain) = (ours(&lines, GZIP).and_then(Line::seconds), ours(&lines, PLAIN).and_then(Line::seconds));
    let peak = lines.iter().filter(|line| line.program == OURS).flat_map(|line| &line.runs);
    let peak = peak.map(|run| run.rss_bytes).max().map(|bytes| bytes as f64 / f64::from(1 << 20));
    Ok(Section {
        row: "archive",
        title: format!("An archive of one {} file, S3 to its files on disk", size(bytes)),
        what: "The archive is in S3. modelcache downloads, verifies, extracts and hashes it in one pass (`extract`), and \
               removes the archive at the end. The others download it and then run GNU tar. The file compresses to about \
               three quarters, as weights in bfloat16 do, by `gzip -1`. `gzip -dc` alone reads the archive from memory and \
               writes nothing. The sizes are those of the extracted file."
            .into(),
        tables: vec![table(&lines, None)],
        charts: Vec::new(),
        targets: vec![
            Target::at_most(
                "`tar.gz`: time, relative to decompression alone",
                share(gzip, seconds("gzip", "alone")),
                " x",
                1.1,
                None,
            ),
            Target::at_most(
                "`tar.gz`: time, relative to `aws s3 cp`, then `tar`",
                share(gzip, seconds("aws", GZIP)),
                " x",
                0.6,
                None,
            ),
            Target::at_least(
                "`tar`: speed, relative to the download without extraction",
                share(ours(&lines, NOT_EXTRACTED).and_then(Line::seconds), plain),
                " x",
                0.9,
                None,
            ),
            Target::at_most("peak memory", peak, " MiB", RSS_MIB_MAX, None),
        ],
        notes: Vec::new(),
    })
}

fn copier(program: &str) -> Result<Copier> {
    COPIERS.into_iter().find(|copier| copier.program == program && !copier.is_tuned()).context("no such copier")
}

/// Decompresses the archive, and discards the output.
fn gunzip(archive: &Path) -> Result<Vec<Usage>> {
    let mut command = Command::new("sh");
    Ok(vec![measure(command.args(["-c", "gzip -dc \"$0\" > /dev/null"]).arg(archive))?])
}

/// Writes numbers like weights in bfloat16: a byte of mantissa, which is random, and one of sign and exponent, which
/// has few values.
fn write_weights(path: &Path, bytes: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..bytes / 8 {
        // xorshift64, by Marsaglia.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let exponents = 0x3c00_3c00_3c00_3c00 | (state & 0x8300_8300_8300_8300);
        file.write_all(&(state & 0x00ff_00ff_00ff_00ff | exponents).to_le_bytes())?;
    }
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}
