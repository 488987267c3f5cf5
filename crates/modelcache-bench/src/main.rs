//! `cargo xtask bench`: measures modelcache and its peers in turn, and writes docs/benchmarks.md.
//!
//! A row measures one operation that users wait for. All programs of a row run in the same rounds, because the speed of
//! a machine drifts, and against the same server on loopback. The server is a separate process. It uses as little
//! processor time as possible, because it shares the cores with the programs. A program is measured from start to exit:
//! the start of an interpreter is included, the server is not.
//!
//! | module | contents |
//! |---|---|
//! | [`rows`] | the measured operations |
//! | [`comparison`] | runs programs in rounds; medians, ratios, the table |
//! | [`copiers`], [`peers`] | the commands of the peers that copy objects; the installation of all peers |
//! | [`server`], [`server_process`] | the server; the handle of its process |
//! | [`service`] | the handle of a server whose usage is measured: our daemon, nginx, olah |
//! | [`client`] | HTTP clients with little overhead, as processes of their own |
//! | [`package`] | the installation of our Python package beside the peers |
//! | [`setup`], [`scratch`] | our program and the sizes; the data folders and their removal |
//! | [`tensors`] | the safetensors file of the Python rows |
//! | [`usage`], [`reader`] | one run of a program and its resource usage; a program that reads files |
//! | [`page`], [`chart`], [`machine`] | docs/benchmarks.md; its charts; the description of the machine |
//!
//! The hidden commands `bench-server`, `bench-read`, `bench-fetch` and `bench-load` are the processes that the rows
//! start.
//!
//! A missed target or a failed program is no error: the tables show both.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod chart;
mod client;
mod comparison;
mod copiers;
mod machine;
mod package;
mod page;
mod peers;
mod reader;
mod rows;
mod scratch;
mod server;
mod server_process;
mod service;
mod setup;
mod tensors;
mod usage;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use client::fetch::FetchArguments;
use client::load::LoadArguments;
use page::Section;
use peers::Peers;
use reader::ReaderArguments;
use scratch::Scratch;
use server::ServerArguments;
use setup::{Setup, Sizes};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use xtask::repository::{Build, build_modelcache};

/// Default number of rounds.
const ROUNDS: usize = 5;
/// Default number of rounds with `--quick`.
const ROUNDS_QUICK: usize = 2;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    process: Option<Process>,
    #[command(flatten)]
    bench: Bench,
}

/// A process that a row starts
#[derive(Debug, Subcommand)]
enum Process {
    #[command(name = "bench-server", hide = true)]
    Server(ServerArguments),
    #[command(name = "bench-read", hide = true)]
    Read(ReaderArguments),
    #[command(name = "bench-fetch", hide = true)]
    Fetch(FetchArguments),
    #[command(name = "bench-load", hide = true)]
    Load(LoadArguments),
}

fn main() -> ExitCode {
    let Arguments { process, bench } = Arguments::parse();
    let result = match process {
        None => bench.run(),
        Some(Process::Server(server)) => server.run(),
        Some(Process::Read(reader)) => reader.run(),
        Some(Process::Fetch(fetch)) => fetch.run(),
        Some(Process::Load(load)) => load.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measure modelcache and its peers, and write docs/benchmarks.md
#[derive(Debug, Args)]
struct Bench {
    /// Small data and two rounds, as a quick check; writes no page
    #[arg(long)]
    quick: bool,
    /// Write the page also with --quick
    #[arg(long)]
    write: bool,
    /// Only these rows; the page keeps its other sections
    #[arg(long, value_enum, value_name = "ROW")]
    only: Vec<Row>,
    /// Number of rounds, each of which runs every program once (5; with --quick 2)
    #[arg(long)]
    rounds: Option<usize>,
    /// Measure this program instead of building ours
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Measure the Python package with this native module (libmodelcache_native.so) instead of building ours
    #[arg(long, value_name = "FILE")]
    native: Option<PathBuf>,
}

/// The rows, in the order of the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Row {
    /// One large file from S3 to disk, durable
    Durable,
    /// One large file from S3, until it has been read into memory
    Loaded,
    /// One large file from S3 to disk, over TLS
    Tls,
    /// Sixteen large files
    FilesLarge,
    /// Ten thousand files of 1 MiB
    FilesMedium,
    /// Two thousand small files
    FilesSmall,
    /// One large file from S3 to disk, with a rate limit on each connection
    Shaped,
    /// First download of one large file from the Hub, through its CDN
    Hub,
    /// 50 processes that get the same file at the same time
    Herd,
    /// An archive in S3, until its files are on disk
    Archive,
    /// Upload of one large file to S3
    Upload,
    /// Verification of a cached file
    Verify,
    /// Hits: artifacts that are on disk
    Warm,
    /// A hit that provides its files as a Hugging Face cache
    Layout,
    /// Peak memory
    Memory,
    /// Growth of cost with the number of files and of connections
    Growth,
    /// SHA-256 without I/O
    Hash,
    /// Hits from Python
    PythonWarm,
    /// One large file from S3 to disk, from Python
    PythonCold,
    /// The first tensor of a file that is still being downloaded
    PythonOpen,
    /// The tensors of a cached file, until they are in memory
    PythonTensors,
    /// The daemon: one large file that it has, to one client
    DaemonWarm,
    /// The daemon: 5,000 requests per second for a small file
    DaemonSmall,
    /// The daemon between the Hub and huggingface_hub
    DaemonCold,
    /// The daemon between the Hub and huggingface_hub, with a rate limit on each connection to the CDN
    DaemonShaped,
    /// The daemon: the first byte of a large file that it does not have
    DaemonFirstByte,
    /// The daemon: 200 clients that request the same file, which it does not have, at the same time
    DaemonHerd,
}

impl Row {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Returns true if the row needs our Python package.
    fn is_in_python(self) -> bool {
        matches!(self, Self::PythonWarm | Self::PythonCold | Self::PythonOpen | Self::PythonTensors)
    }

    fn measure(self, setup: &Setup) -> Result<Section> {
        match self {
            Self::Durable => rows::large_file::to_disk(setup),
            Self::Loaded => rows::large_file::loaded(setup),
            Self::Tls => rows::large_file::over_tls(setup),
            Self::FilesLarge => rows::files::large(setup),
            Self::FilesMedium => rows::files::medium(setup),
            Self::FilesSmall => rows::files::small(setup),
            Self::Shaped => rows::shaped::section(setup),
            Self::Hub => rows::hub::section(setup),
            Self::Herd => rows::herd::section(setup),
            Self::Archive => rows::archive::section(setup),
            Self::Upload => rows::upload::section(setup),
            Self::Verify => rows::verify::section(setup),
            Self::Warm => rows::warm::section(setup),
            Self::Layout => rows::layout::section(setup),
            Self::Memory => rows::memory::section(setup),
            Self::Growth => rows::growth::section(setup),
            Self::Hash => rows::hash::section(setup),
            Self::PythonWarm => rows::python::warm::section(setup),
            Self::PythonCold => rows::python::cold::section(setup),
            Self::PythonOpen => rows::python::open::section(setup),
            Self::PythonTensors => rows::python::tensors::section(setup),
            Self::DaemonWarm => rows::daemon::warm::section(setup),
            Self::DaemonSmall => rows::daemon::small::section(setup),
            Self::DaemonCold => rows::daemon::snapshot::section(setup),
            Self::DaemonShaped => rows::daemon::snapshot::shaped(setup),
            Self::DaemonFirstByte => rows::daemon::first_byte::section(setup),
            Self::DaemonHerd => rows::daemon::herd::section(setup),
        }
    }
}

impl Bench {
    fn run(&self) -> Result<()> {
        let started = Instant::now();
        let setup = self.setup()?;
        let machine = machine::description(&setup)?;
        let names: Vec<String> = Row::value_variants().iter().map(|row| row.name()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut failed = Vec::new();
        for row in measurement_order().into_iter().filter(|row| self.measures(*row)) {
            match row.measure(&setup) {
                Ok(section) => {
                    println!("\n{}", section.text());
                    // Write the page after each row, so that interrupting a later row loses no results.
                    if self.write || !self.quick {
                        page::write(&names, &[section], &machine).unwrap_or_else(|error| {
                            eprintln!("bench: row {}: {error:#}", row.name());
                            failed.push(row.name());
                        });
                    }
                }
                // A failed row does not stop the others.
                Err(error) => {
                    eprintln!("bench: row {}: {error:#}", row.name());
                    failed.push(row.name());
                }
            }
        }
        println!("{machine}\n{:.0} s in all", started.elapsed().as_secs_f64());
        ensure!(failed.is_empty(), "rows that could not be measured: {}", failed.join(", "));
        Ok(())
    }

    fn measures(&self, row: Row) -> bool {
        self.only.is_empty() || self.only.contains(&row)
    }

    fn setup(&self) -> Result<Setup> {
        let rounds = self.rounds.unwrap_or(if self.quick { ROUNDS_QUICK } else { ROUNDS });
        ensure!(rounds > 0, "--rounds must be at least 1");
        let sizes = if self.quick { Sizes::QUICK } else { Sizes::FULL };
        let program = match &self.program {
            Some(program) => {
                program.canonicalize().with_context(|| format!("cannot find the program {}", program.display()))?
            }
            None => build_modelcache(Build::Release)?,
        };
        let peers = Peers::install()?;
        if Row::value_variants().iter().any(|row| row.is_in_python() && self.measures(*row)) {
            package::install(&peers, self.native.as_deref())?;
        }
        let scratch = Scratch::new(sizes.file)?;
        Ok(Setup { scratch, peers, program, rounds, quick: self.quick, sizes })
    }
}

/// Returns the rows in the order of measurement: first those that share the large file, then the others, some of
/// which remove it to make room.
fn measurement_order() -> Vec<Row> {
    let last = |row: &&Row| {
        row.is_in_python() && **row != Row::PythonCold
            || matches!(
                row,
                Row::Archive
                    | Row::FilesLarge
                    | Row::FilesMedium
                    | Row::FilesSmall
                    | Row::Growth
                    | Row::Warm
                    | Row::Hash
            )
    };
    let (last, first): (Vec<Row>, Vec<Row>) = Row::value_variants().iter().partition(last);
    first.into_iter().chain(last).collect()
}
