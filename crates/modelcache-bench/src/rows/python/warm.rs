//! Row for hits from Python: the time to get the path of an artifact that is on disk, in a running process.

use crate::comparison::{OURS, failure_cell, spread};
use crate::page::{Section, Target};
use crate::rows::calls::{CallTimes, median_of};
use crate::rows::hub::ServedRepo;
use crate::rows::progress;
use crate::scratch::remove;
use crate::setup::Setup;
use crate::usage::measure;
use anyhow::Result;
use xtask::table::markdown;

/// Size of the file, which is never read.
const FILE_BYTES: u64 = 1 << 20;
const NAME: &str = "bench/warm";
const BY_NAME: &str = "get(name, version)";

/// One way to request the cached file, with its results.
struct Caller<'a> {
    program: &'static str,
    setting: &'static str,
    run_calls: Box<dyn Fn() -> Result<CallTimes> + 'a>,
    results: Vec<CallTimes>,
    failure: Option<String>,
}

impl<'a> Caller<'a> {
    fn new(program: &'static str, setting: &'static str, run_calls: impl Fn() -> Result<CallTimes> + 'a) -> Self {
        Self { program, setting, run_calls: Box::new(run_calls), results: Vec::new(), failure: None }
    }

    fn run(&mut self, round: usize) {
        if self.failure.is_some() {
            return;
        }
        match (self.run_calls)() {
            Ok(calls) => {
                eprintln!("  {round}  {:<16} {:<24} {:.1} us", self.program, self.setting, calls.p50_us);
                self.results.push(calls);
            }
            Err(error) => {
                eprintln!("  {round}  {:<16} {:<24} {error:#}", self.program, self.setting);
                self.failure = Some(format!("{error:#}"));
            }
        }
    }

    fn p50_us(&self) -> Option<f64> {
        median_of(&self.results, |calls| calls.p50_us).filter(|_| self.failure.is_none())
    }

    fn cells(&self, best_peer_us: Option<f64>) -> Vec<String> {
        let mut cells = vec![self.program.to_owned(), self.setting.to_owned()];
        let Some(p50_us) = self.p50_us() else {
            cells.push(failure_cell(self.failure.as_deref().unwrap_or("not run")));
            return cells;
        };
        let figure = |figure: fn(&CallTimes) -> f64| median_of(&self.results, figure).unwrap_or_default();
        let rss_bytes = self.results.iter().map(|calls| calls.process.rss_bytes).max().unwrap_or_default();
        cells.extend([
            format!("{p50_us:.1}"),
            spread(self.results.iter().map(|calls| calls.p50_us), 1),
            format!("{:.1}", figure(|calls| calls.p99_us)),
            self.results.len().to_string(),
            format!("{:.1}", figure(|calls| calls.core_us)),
            (rss_bytes >> 20).to_string(),
            best_peer_us.map_or_else(String::new, |best_us| format!("{:.1}", best_us / p50_us)),
        ]);
        cells
    }
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-warm");
    let hub = ServedRepo::start(setup, FILE_BYTES)?;
    let folder = setup.scratch.empty_folder("python-warm")?;
    let (dir, peer_dir) = (folder.join("ours"), folder.join("theirs"));
    let file = setup.scratch.data("warm.bin", 7, FILE_BYTES)?;
    measure(setup.modelcache(&dir).args(["put", &format!("{NAME}@1"), "--quiet"]).arg(file))?;
    hub.fill_our_cache(&dir)?;
    // If huggingface_hub is not available, its lines show the reason.
    let filled = hub.fill_peer_cache(&peer_dir).inspect_err(|error| eprintln!("  huggingface_hub: {error:#}")).is_ok();
    let runs = setup.sizes.calls;
    let ours = |arguments: Vec<String>| {
        let dir = &dir;
        move || {
            let mut command = setup.python("modelcache_warm.py", dir);
            CallTimes::run(command.env("HF_HUB_OFFLINE", "1").arg(runs.to_string()).args(&arguments))
        }
    };
    let hub_call = |by_variable: bool| {
        let (hub, peer_dir) = (&hub, &peer_dir);
        move || {
            anyhow::ensure!(filled, "huggingface_hub could not fill its cache");
            hub.measure_peer_calls(peer_dir, runs, by_variable)
        }
    };
    let mut callers = [
        Caller::new(OURS, BY_NAME, ours(vec![NAME.into(), "1".into()])),
        Caller::new(OURS, "get(URI) at a commit", ours(vec![hub.uri(hub.commit())])),
        Caller::new(OURS, "get(URI) at main", ours(vec![hub.uri("main")])),
        Caller::new("hf_hub_download", "HF_HUB_OFFLINE=1", hub_call(true)),
        Caller::new("hf_hub_download", "local_files_only=True", hub_call(false)),
    ];
    for round in 1..=setup.rounds {
        callers.iter_mut().for_each(|caller| caller.run(round));
    }
    let (best_peer_us, by_name_us) = (best_peer_us(&callers), callers[0].p50_us());
    let rows: Vec<_> = callers.iter().map(|caller| caller.cells(best_peer_us)).collect();
    drop(callers);
    remove(&folder)?;
    Ok(Section {
        row: "python-warm",
        title: "From Python: warm get of an artifact that is on disk".into(),
        what: format!(
            "{runs} calls in one process, for a cached file of 1 MiB, which no call reads. The URI is `{}`. \
             modelcache and `hf_hub_download` look up on disk which commit `main` refers to. No call sends a request: \
             `HF_HUB_OFFLINE=1` is set for modelcache as well. Core-us is the processor time of all threads per call, \
             in microseconds.",
            hub.uri("main")
        ),
        tables: vec![markdown(
            &["program", "setting", "p50 us", "spread", "p99 us", "rounds", "core-us", "peak RSS MiB", "x best peer"],
            &rows,
        )],
        charts: Vec::new(),
        targets: vec![Target::at_most(&format!("`{BY_NAME}`, p50"), by_name_us, " us", 25.0, Some(18.0))],
        notes: Vec::new(),
    })
}

fn best_peer_us(callers: &[Caller<'_>]) -> Option<f64> {
    callers.iter().filter(|caller| caller.program != OURS).filter_map(Caller::p50_us).min_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::Usage;
    use std::cell::Cell;

    /// Reports one of these medians per run, and fails when there are no more.
    fn caller(program: &'static str, p50s_us: &'static [f64]) -> Caller<'static> {
        let next = Cell::new(0);
        Caller::new(program, "", move || {
            let p50_us = *p50s_us.get(next.replace(next.get() + 1)).ok_or_else(|| anyhow::anyhow!("why"))?;
            let process = Usage { rss_bytes: 32 << 20, ..Usage::default() };
            Ok(CallTimes { p10_us: 1.0, p50_us, p90_us: 80.0, p99_us: 90.0, core_us: 21.0, process })
        })
    }

    #[test]
    fn ratios_are_relative_to_the_fastest_peer_that_succeeded() {
        let mut callers = [caller(OURS, &[20.0, 30.0]), caller("slow", &[90.0, 70.0]), caller("fails", &[1.0])];
        (1..=2).for_each(|round| callers.iter_mut().for_each(|caller| caller.run(round)));
        let best = best_peer_us(&callers);
        assert_eq!(best, Some(80.0));
        assert_eq!(callers[0].cells(best)[2..], ["25.0", "20.0-30.0", "90.0", "2", "21.0", "32", "3.2"]);
        assert_eq!(callers[2].cells(best)[2..], ["why"]);
    }
}
