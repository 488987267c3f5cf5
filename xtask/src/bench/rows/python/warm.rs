//! Row for hits from Python: the time to get the path of an artifact that is on disk, in a running process.

use crate::bench::contest::{OURS, failure_cell, spread};
use crate::bench::page::{Bar, Section};
use crate::bench::rows::calls::{Calls, middle};
use crate::bench::rows::hub::HubStage;
use crate::bench::rows::progress;
use crate::bench::scratch::remove;
use crate::bench::setup::Setup;
use crate::bench::usage::measure;
use crate::table::markdown;
use anyhow::Result;

/// Size of the file, which is never read.
const FILE_BYTES: u64 = 1 << 20;
const NAME: &str = "bench/warm";
const BY_NAME: &str = "get(name, version)";

/// One way to request the cached file, with its results.
struct Way<'a> {
    who: &'static str,
    setting: &'static str,
    ask: Box<dyn Fn() -> Result<Calls> + 'a>,
    results: Vec<Calls>,
    failure: Option<String>,
}

impl<'a> Way<'a> {
    fn new(who: &'static str, setting: &'static str, ask: impl Fn() -> Result<Calls> + 'a) -> Self {
        Self { who, setting, ask: Box::new(ask), results: Vec::new(), failure: None }
    }

    fn run(&mut self, round: usize) {
        if self.failure.is_some() {
            return;
        }
        match (self.ask)() {
            Ok(calls) => {
                eprintln!("  {round}  {:<16} {:<24} {:.1} us", self.who, self.setting, calls.p50_us);
                self.results.push(calls);
            }
            Err(error) => {
                eprintln!("  {round}  {:<16} {:<24} {error:#}", self.who, self.setting);
                self.failure = Some(format!("{error:#}"));
            }
        }
    }

    fn p50_us(&self) -> Option<f64> {
        middle(&self.results, |calls| calls.p50_us).filter(|_| self.failure.is_none())
    }

    fn cells(&self, best_peer_us: Option<f64>) -> Vec<String> {
        let mut cells = vec![self.who.to_owned(), self.setting.to_owned()];
        let Some(p50_us) = self.p50_us() else {
            cells.push(failure_cell(self.failure.as_deref().unwrap_or("not run")));
            return cells;
        };
        let figure = |figure: fn(&Calls) -> f64| middle(&self.results, figure).unwrap_or_default();
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

pub(in crate::bench) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "python-warm");
    let hub = HubStage::set(setup, FILE_BYTES)?;
    let folder = setup.scratch.fresh("python-warm")?;
    let (dir, theirs) = (folder.join("ours"), folder.join("theirs"));
    let file = setup.scratch.data("warm.bin", 7, FILE_BYTES)?;
    measure(setup.modelcache(&dir).args(["put", &format!("{NAME}@1"), "--quiet"]).arg(file))?;
    hub.fill_ours(&dir)?;
    // If huggingface_hub is not available, its lines show the reason.
    let filled = hub.fill_theirs(&theirs).inspect_err(|error| eprintln!("  huggingface_hub: {error:#}")).is_ok();
    let runs = setup.sizes.calls;
    let ours = |what: Vec<String>| {
        let dir = &dir;
        move || {
            let mut command = setup.python("modelcache_warm.py", dir);
            Calls::of(command.env("HF_HUB_OFFLINE", "1").arg(runs.to_string()).args(&what))
        }
    };
    let hub_call = |by_variable: bool| {
        let (hub, theirs) = (&hub, &theirs);
        move || {
            anyhow::ensure!(filled, "it could not fill its cache");
            hub.call_theirs(theirs, runs, by_variable)
        }
    };
    let mut ways = [
        Way::new(OURS, BY_NAME, ours(vec![NAME.into(), "1".into()])),
        Way::new(OURS, "get(URI) at a commit", ours(vec![hub.uri(hub.commit())])),
        Way::new(OURS, "get(URI) at main", ours(vec![hub.uri("main")])),
        Way::new("hf_hub_download", "HF_HUB_OFFLINE=1", hub_call(true)),
        Way::new("hf_hub_download", "local_files_only=True", hub_call(false)),
    ];
    for round in 1..=setup.rounds {
        ways.iter_mut().for_each(|way| way.run(round));
    }
    let (best_peer_us, by_name_us) = (best_peer_us(&ways), ways[0].p50_us());
    let rows: Vec<_> = ways.iter().map(|way| way.cells(best_peer_us)).collect();
    drop(ways);
    remove(&folder)?;
    Ok(Section {
        row: "python-warm",
        title: "From Python: an artifact that is on disk".into(),
        what: format!(
            "{runs} calls in one process, for a file of 1 MiB, which is not read; the URI is `{}`, and what `main` \
             means is looked up on disk, as `hf_hub_download` does. Nobody is asked: `HF_HUB_OFFLINE=1` is set for \
             ours, too. Core-us are of all threads.",
            hub.uri("main")
        ),
        tables: vec![markdown(
            &["program", "setting", "p50 us", "spread", "p99 us", "rounds", "core-us", "peak RSS MiB", "x best peer"],
            &rows,
        )],
        bars: vec![Bar::at_most(&format!("`{BY_NAME}`, p50"), by_name_us, " us", 25.0, None)],
        notes: Vec::new(),
    })
}

fn best_peer_us(ways: &[Way<'_>]) -> Option<f64> {
    ways.iter().filter(|way| way.who != OURS).filter_map(Way::p50_us).min_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::usage::Run;
    use std::cell::Cell;

    /// Reports one of these medians per run, and fails when there are no more.
    fn way(who: &'static str, p50s_us: &'static [f64]) -> Way<'static> {
        let next = Cell::new(0);
        Way::new(who, "", move || {
            let p50_us = *p50s_us.get(next.replace(next.get() + 1)).ok_or_else(|| anyhow::anyhow!("why"))?;
            let process = Run { rss_bytes: 32 << 20, ..Run::default() };
            Ok(Calls { p10_us: 1.0, p50_us, p90_us: 80.0, p99_us: 90.0, core_us: 21.0, process })
        })
    }

    #[test]
    fn ratios_are_to_the_fastest_of_the_others_that_came_through() {
        let mut ways = [way(OURS, &[20.0, 30.0]), way("slow", &[90.0, 70.0]), way("fails", &[1.0])];
        (1..=2).for_each(|round| ways.iter_mut().for_each(|way| way.run(round)));
        let best = best_peer_us(&ways);
        assert_eq!(best, Some(80.0));
        assert_eq!(ways[0].cells(best)[2..], ["25.0", "20.0-30.0", "90.0", "2", "21.0", "32", "3.2"]);
        assert_eq!(ways[2].cells(best)[2..], ["why"]);
    }
}
