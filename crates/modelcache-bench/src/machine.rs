//! Describes the machine on which the figures were measured, and measures its disk.

use super::setup::{Setup, read};
use super::usage::run;
use anyhow::Result;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Instant, SystemTime};

/// Size of one write.
const BUFFER_BYTES: usize = 4 << 20;
/// Alignment of the buffer in bytes, as O_DIRECT requires it.
const ALIGN: usize = 4096;
const GIB: f64 = 1_073_741_824.0;

/// Returns the description. Its first line states the date and the number of rounds; the rest describes the machine.
pub(super) fn description(setup: &Setup) -> Result<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (model, memory_gib) = (field("/proc/cpuinfo", "model name"), memory_bytes("MemTotal") as f64 / GIB);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let (write, read) = disk_rates(setup)?;
    let served_data = if setup.scratch.in_memory { "in memory (tmpfs)" } else { "on the same disk" };
    let size = setup.sizes.file >> 20;
    Ok(format!(
        "{}, {} rounds{}\n\
         {model}, {cores} cores, shared by the servers and the measured programs; {memory_gib:.0} GiB of memory;\n\
         Linux {}. Downloads are written to {}, at {write:.0} MB/s for writes and {read:.0} MB/s for reads with\n\
         O_DIRECT (one file of {size} MiB, 4 MiB at a time for writes and 8 MiB for reads).\n\
         Served data is {served_data}.\n\n\
         Peers: {}.",
        super::server::day(SystemTime::now()),
        setup.rounds,
        if setup.quick { ", small sizes (`--quick`, not comparable)" } else { "" },
        kernel.trim(),
        filesystem(&setup.scratch.disk),
        setup.peers.summary(),
    ))
}

/// Returns a value of /proc/meminfo in bytes, or 0 if the kernel does not report it.
pub(super) fn memory_bytes(name: &str) -> u64 {
    field("/proc/meminfo", name).split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() * 1024
}

/// Returns the value of the first line that begins with `name`.
fn field(file: &str, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_default().trim_start_matches([':', ' ', '\t']).trim().to_owned()
}

fn filesystem(path: &Path) -> String {
    let name = run(Command::new("stat").args(["--file-system", "--format=%T"]).arg(path));
    name.map_or_else(|_| "an unknown filesystem".into(), |(_, name)| name.trim().to_owned())
}

/// Returns the O_DIRECT rates of the disk in MB/s: of writing, including the sync, and of reading. They are (0, 0) if
/// the filesystem does not support O_DIRECT.
fn disk_rates(setup: &Setup) -> Result<(f64, f64)> {
    let file = setup.scratch.empty_folder("rate")?.join("file");
    let Ok(write_s) = write_direct(&file, setup.sizes.file) else { return Ok((0.0, 0.0)) };
    let read_s = read(&file, true)?.seconds;
    super::scratch::remove(&setup.scratch.disk.join("rate"))?;
    let mb = setup.sizes.file as f64 / 1e6;
    Ok((mb / write_s, mb / read_s))
}

fn write_direct(path: &Path, bytes: u64) -> Result<f64> {
    let memory = vec![0x5a_u8; BUFFER_BYTES + ALIGN];
    let start = memory.as_ptr().align_offset(ALIGN);
    let buffer = &memory[start..start + BUFFER_BYTES];
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::DIRECT;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?;
    // Preallocate, so that only the writes are timed.
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    let started = Instant::now();
    for _ in 0..bytes / BUFFER_BYTES as u64 {
        rustix::io::write(&file, buffer)?;
    }
    rustix::fs::fdatasync(&file)?;
    Ok(started.elapsed().as_secs_f64())
}
