//! Row for hits: the time to get the path of an artifact that is on disk.

use super::calls::CallTimes;
use super::hub::ServedRepo;
use crate::comparison::median;
use crate::page::{Section, Target};
use crate::setup::Setup;
use crate::usage::measure;
use anyhow::{Context, Result, ensure};
use std::process::Stdio;
use xtask::repository::cargo;
use xtask::table::markdown;

/// Size of the cached file for the whole command and for huggingface_hub. Neither reads it.
const FILE_BYTES: u64 = 1 << 20;
/// Name of the line for huggingface_hub.
const HUB_CALL: &str = "hf_hub_download in process, offline";

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    let runs = if setup.quick { 20 } else { 200 };
    let (command_ms, command_row) = command(setup, runs)?;
    let mut rows = vec![command_row];
    let in_process = in_process(setup.quick)?;
    rows.extend(in_process.clone());
    rows.push(match hub_calls(setup, if setup.quick { 100 } else { 2000 }) {
        Ok(CallTimes { p10_us, p50_us, p90_us, .. }) => {
            vec![HUB_CALL.into(), format!("{p50_us:.1} us"), format!("p10 {p10_us:.1} us, p90 {p90_us:.1} us")]
        }
        Err(error) => vec![HUB_CALL.into(), format!("{error:#}")],
    });
    let hits = hits(&in_process);
    let target_name = |count: u64| format!("warm get in process, {count} artifacts: median");
    let [fewest, most] = [hits.iter().min_by_key(|(count, _)| *count), hits.iter().max_by_key(|(count, _)| *count)];
    // The target is for 100 artifacts. Without that measurement, the smallest directory takes its place.
    let few = hits.iter().find(|(count, _)| *count == 100).or(fewest);
    let growth = few.zip(most).filter(|(few, most)| few.0 < most.0).map(|(few, most)| most.1 / few.1);
    let [few_count, most_count] = [few, most].map(|hit| hit.map_or(0, |(count, _)| *count));
    Ok(Section {
        row: "warm",
        title: "Warm get: an artifact that is on disk".into(),
        what: "`in process` is one `Cache::get` in a running process, including the lease, one `stat` of each file, \
               and the record of the last use (`cargo bench --bench directory`). `the whole command` is `modelcache \
               get` from exec to exit."
            .into(),
        tables: vec![markdown(&["operation", "median", "percentiles", "notes"], &rows)],
        charts: Vec::new(),
        targets: vec![
            Target::at_most("the whole command: median", Some(command_ms), " ms", 2.5, None),
            Target::at_most(&target_name(few_count), few.map(|(_, us)| *us), " us", 20.0, Some(15.0)),
            Target::at_most(&format!("{}, relative to {few_count}", target_name(most_count)), growth, " x", 2.0, None),
        ],
        notes: Vec::new(),
    })
}

/// Measures the whole command, from exec to exit. Returns the median in milliseconds, and the line of the table.
fn command(setup: &Setup, runs: usize) -> Result<(f64, Vec<String>)> {
    let file = setup.scratch.data("warm.bin", 7, FILE_BYTES)?;
    let dir = setup.scratch.empty_folder("warm")?;
    measure(setup.modelcache(&dir).args(["put", "bench/warm@1"]).arg(&file))?;
    let once = |_| Ok(measure(setup.modelcache(&dir).args(["get", "bench/warm@1"]))?.seconds * 1e3);
    let mut times = (0..runs).map(once).collect::<Result<Vec<f64>>>()?;
    crate::scratch::remove(&dir)?;
    times.sort_by(f64::total_cmp);
    let percentile = |share: usize| times[(times.len() - 1) * share / 100];
    let spread = format!("p10 {:.1} ms, p90 {:.1} ms", percentile(10), percentile(90));
    let middle = median(times.clone()).unwrap_or_default();
    Ok((middle, vec!["the whole command".into(), format!("{middle:.1} ms"), spread, format!("{runs} runs")]))
}

/// Measures `hf_hub_download` of a cached file.
fn hub_calls(setup: &Setup, runs: usize) -> Result<CallTimes> {
    let (served, folder) = (ServedRepo::start(setup, FILE_BYTES)?, setup.scratch.empty_folder("hub-warm")?);
    served.fill_peer_cache(&folder)?;
    let calls = served.measure_peer_calls(&folder, runs, false)?;
    crate::scratch::remove(&folder)?;
    Ok(calls)
}

/// Runs the library's own benchmark `directory`. Returns its lines, split into cells at `|`.
fn in_process(quick: bool) -> Result<Vec<Vec<String>>> {
    let mut command = cargo();
    command.args(["bench", "--quiet", "--package", "modelcache", "--bench", "directory"]);
    if quick {
        command.args(["--", "--quick"]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "`cargo bench --bench directory` failed");
    let text = String::from_utf8(output.stdout)?;
    let lines = text.lines().filter(|line| line.contains('|'));
    Ok(lines.map(|line| line.split('|').map(|cell| cell.trim().to_owned()).collect()).collect())
}

/// Returns the number of artifacts and the microseconds of each line about a warm get, such as
/// `warm get in process, 10,000 artifacts|18 us|…`.
fn hits(rows: &[Vec<String>]) -> Vec<(u64, f64)> {
    let number = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>().parse().ok();
    let hit = |row: &Vec<String>| {
        let operation = row.first().filter(|operation| operation.contains("warm get"))?;
        let words: Vec<&str> = operation.split_whitespace().collect();
        let at = words.iter().position(|word| word.starts_with("artifact"))?;
        let us = row.get(1)?.strip_suffix(" us")?.trim().parse().ok()?;
        Some((number(words.get(at.checked_sub(1)?)?)?, us))
    };
    rows.iter().filter_map(hit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_read_from_the_lines_of_the_benchmark() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let rows = [
            row(["warm get in process, 100 artifacts", "17 us"]),
            row(["warm get in process, 100,000 artifacts", "18.5 us"]),
            row(["evict one, 100 artifacts", "90 us"]),
        ];
        assert_eq!(hits(&rows), [(100, 17.0), (100_000, 18.5)]);
    }
}
