//! Row for the latency of a small file at a fixed rate of requests, beside nginx.

use super::{NGINX, artifact_url, put, start_daemon, start_nginx};
use crate::comparison::{OURS, failure_cell, median};
use crate::page::{Section, Target};
use crate::rows::hub::ServedRepo;
use crate::rows::{progress, size};
use crate::service::Service;
use crate::setup::Setup;
use crate::usage::Figures;
use anyhow::{Context, Result};
use std::process::Command;
use xtask::table::markdown;

const FILE_BYTES: u64 = 4 << 10;
const REQUESTS_PER_S: u32 = 5000;
const CONNECTIONS: u32 = 48;
/// The figures in the columns, as the client names them.
const FIGURES: [&str; 6] = ["p50_us", "p99_us", "p999_us", "max_us", "late_p50_us", "late_p99_us"];

/// A server and the figures of its runs.
struct Subject<'a> {
    program: &'static str,
    route: &'static str,
    server: &'a Service,
    url: String,
    runs: Vec<[f64; FIGURES.len()]>,
    /// Core-microseconds of the server per request.
    core_us: Vec<f64>,
    failure: Option<String>,
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "daemon-small");
    let folder = setup.scratch.empty_folder("daemon")?;
    let served = ServedRepo::start(setup, FILE_BYTES)?;
    let dir = folder.join("cache");
    let file = put(setup, &dir, &setup.scratch.data("small.bin", 7, FILE_BYTES)?)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let daemon = start_daemon(setup, &dir, Some(&served.hub.url()))?;
    let nginx = start_nginx(setup, file.parent().context("a file lies in a folder")?, &folder)
        .inspect_err(|error| eprintln!("  nginx: {error:#}"));
    let subject = |program, route, server, url| {
        let (runs, core_us, failure) = (Vec::new(), Vec::new(), None);
        Subject { program, route, server, url, runs, core_us, failure }
    };
    let mut subjects = vec![
        subject(OURS, "of the Hub", &daemon, served.file_url(&daemon.url())),
        subject(OURS, "of its own", &daemon, artifact_url(&daemon, &file)),
    ];
    subjects.extend(nginx.iter().map(|nginx| subject(NGINX, "", nginx, format!("{}/{name}", nginx.url()))));
    let seconds = if setup.quick { 1 } else { 10 };
    for round in 1..=setup.rounds {
        for subject in subjects.iter_mut().filter(|subject| subject.failure.is_none()) {
            if let Err(error) = subject.measure(seconds) {
                subject.failure = Some(format!("{error:#}"));
            }
            let p50_us = subject.runs.last().map_or(0.0, |run| run[0]);
            eprintln!("  {round}  {:<16} {:<24} {p50_us:.0} us", subject.program, subject.route);
        }
    }
    let mut rows: Vec<_> = subjects.iter().map(Subject::cells).collect();
    rows.extend(nginx.as_ref().err().map(|error| vec![NGINX.into(), "".into(), failure_cell(&format!("{error:#}"))]));
    let target = |route: &str, figure: usize, name: &str, required_us: f64| {
        let subject = subjects.iter().find(|subject| subject.program == OURS && subject.route == route);
        let measured = subject.and_then(|subject| subject.median(figure));
        Target::at_most(&format!("route {route}: {name}"), measured, " us", required_us, None)
    };
    let targets = ["of the Hub", "of its own"]
        .into_iter()
        .flat_map(|route| [target(route, 0, "median", 500.0), target(route, 1, "99th percentile", 5000.0)])
        .collect();
    drop(subjects);
    drop((daemon, nginx));
    crate::scratch::remove(&folder)?;
    Ok(Section {
        row: "daemon-small",
        title: format!("Daemon: {REQUESTS_PER_S} requests per second for a {} file", size(FILE_BYTES)),
        what: format!(
            "The requests are sent at fixed times over {CONNECTIONS} keep-alive connections, for {seconds} s in each \
             round (open loop). The latency is measured from the scheduled time, so the time for which a \
             request waits for its connection counts, too (no coordinated omission). `sent late` is the part of the \
             latency before the request was sent. The load generator shares both cores with the server. The figures are \
             medians over the rounds. The daemon has two routes for files: that of the Hub for clients with \
             `HF_ENDPOINT`, and its own below `/cache/artifacts`. nginx has one process."
        ),
        tables: vec![markdown(
            &[
                "program",
                "route",
                "p50 us",
                "p99 us",
                "p99.9 us",
                "max us",
                "sent late, p50 us",
                "sent late, p99 us",
                "server core-us per request",
            ],
            &rows,
        )],
        charts: Vec::new(),
        targets,
        notes: Vec::new(),
    })
}

impl Subject<'_> {
    fn measure(&mut self, seconds: u32) -> Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        let number = |number: u32| number.to_string();
        command.args(["bench-load", "--rate", &number(REQUESTS_PER_S), "--connections", &number(CONNECTIONS)]);
        command.args(["--seconds", &number(seconds), &self.url]);
        let ((_, figures), used) = self.server.usage_during(|| Figures::run(&mut command))?;
        let mut run = [0.0; FIGURES.len()];
        for (value, name) in run.iter_mut().zip(FIGURES) {
            *value = figures.get(name)?;
        }
        self.runs.push(run);
        self.core_us.push(used.core_seconds * 1e6 / f64::from(REQUESTS_PER_S * seconds));
        Ok(())
    }

    fn median(&self, figure: usize) -> Option<f64> {
        median(self.runs.iter().map(|run| run[figure]).collect()).filter(|_| self.failure.is_none())
    }

    fn cells(&self) -> Vec<String> {
        let mut cells = vec![self.program.to_owned(), self.route.to_owned()];
        if let Some(failure) = &self.failure {
            cells.push(failure_cell(failure));
            return cells;
        }
        let values = (0..FIGURES.len()).map(|figure| self.median(figure)).chain([median(self.core_us.clone())]);
        cells.extend(values.map(|value| value.map_or_else(String::new, |value| format!("{value:.0}"))));
        cells
    }
}
