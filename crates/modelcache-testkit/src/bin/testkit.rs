//! `testkit hub` and `testkit s3`: run the stand-ins from a terminal.
//!
//! Prints the connection settings as `export` lines for a shell, then serves until interrupted.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use modelcache_testkit::proxy::ProxyFault;
use modelcache_testkit::{FaultProxy, Hub, S3};

const USAGE: &str = "\
usage: testkit hub --folder DIR [--port N] [--rate BYTES]
           serves every DIR/org/name as a model repo (DIR/datasets/org/name as a dataset);
           main is one commit of the files there; with --rate, a connection to the CDN passes
           at most BYTES per second
       testkit s3 --folder DIR --bucket NAME [--port N]
           serves DIR as an S3 store with this bucket";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testkit: {error:#}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let stand_in = arguments.next().context("missing argument: hub or s3")?;
    let options = Options::parse(arguments)?;
    match stand_in.as_str() {
        "hub" => serve_hub(&options),
        "s3" => serve_s3(&options),
        other => bail!("unknown stand-in {other:?}"),
    }
}

#[derive(Default)]
struct Options {
    folder: Option<PathBuf>,
    bucket: Option<String>,
    port: u16,
    /// Bytes per second of each connection to the CDN.
    rate: Option<u64>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut options = Self::default();
        while let Some(name) = arguments.next() {
            let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--folder" => options.folder = Some(value.into()),
                "--bucket" => options.bucket = Some(value),
                "--rate" => options.rate = Some(value.parse().context("--rate is not a number of bytes")?),
                "--port" => options.port = value.parse().context("--port is not a number")?,
                _ => bail!("unknown option {name}"),
            }
        }
        Ok(options)
    }

    fn folder(&self) -> anyhow::Result<&Path> {
        self.folder.as_deref().context("--folder is missing")
    }
}

fn serve_hub(options: &Options) -> anyhow::Result<()> {
    let repos = repos_in(options.folder()?)?;
    let hub = Hub::start_with(options.port, &repos)?;
    for (name, _) in &repos {
        println!("# {name} main is {}", hub.repo(name).resolve("main").unwrap_or_default());
    }
    let _proxy = options.rate.map(|rate| slow_cdn(&hub, rate)).transpose()?;
    println!("export HF_ENDPOINT={}", hub.url());
    wait()
}

/// Redirects clients to the CDN through a proxy that slows each connection.
fn slow_cdn(hub: &Hub, bytes_per_s: u64) -> anyhow::Result<FaultProxy> {
    let proxy = FaultProxy::start_on(hub.cdn_url(), 0)?;
    proxy.faults().add(ProxyFault::slow(bytes_per_s));
    hub.use_cdn_proxy(&proxy.url());
    Ok(proxy)
}

fn serve_s3(options: &Options) -> anyhow::Result<()> {
    let s3 = S3::start_in(options.folder()?, options.port)?;
    s3.bucket(options.bucket.as_deref().context("--bucket is missing")?)?;
    for (name, value) in s3.env() {
        println!("export {name}={value}");
    }
    wait()
}

fn wait() -> ! {
    loop {
        std::thread::park();
    }
}

/// Returns the repos below `root`, sorted by name, with their folders. Names have two segments (`org/name`), or three
/// below `datasets` and `spaces`.
fn repos_in(root: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut repos = Vec::new();
    for (org, folder) in folders_in(root)? {
        if matches!(org.as_str(), "datasets" | "spaces") {
            repos.extend(repos_in(&folder)?.into_iter().map(|(name, folder)| (format!("{org}/{name}"), folder)));
        } else {
            repos.extend(folders_in(&folder)?.into_iter().map(|(name, folder)| (format!("{org}/{name}"), folder)));
        }
    }
    repos.sort();
    Ok(repos)
}

fn folders_in(folder: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_dir(), path.file_name().and_then(|name| name.to_str())) {
            folders.push((name.to_owned(), path));
        }
    }
    Ok(folders)
}
