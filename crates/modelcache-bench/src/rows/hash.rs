//! Row for SHA-256 without I/O, measured by the library's own benchmark `hash`.

use crate::page::Section;
use crate::setup::Setup;
use anyhow::{Context, Result, ensure};
use std::process::Stdio;
use xtask::repository::cargo;
use xtask::table::markdown;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    let mut command = cargo();
    command.args(["bench", "--quiet", "--package", "modelcache", "--bench", "hash", "--"]);
    if setup.quick {
        command.arg("--quick");
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "`cargo bench --bench hash` failed");
    let rows = figures(&String::from_utf8(output.stdout)?);
    Ok(Section {
        row: "hash",
        title: "SHA-256 without I/O".into(),
        what:
            "SHA-256 on one core, over bytes in memory (`cargo bench --bench hash`). A ladder is the list of SHA-256 \
               checkpoints at the part boundaries of a file; a part is verified from the checkpoint before it."
                .into(),
        tables: vec![markdown(&["benchmark", "time", "throughput"], &rows)],
        charts: Vec::new(),
        targets: Vec::new(),
        notes: Vec::new(),
    })
}

/// Returns name, time and throughput of each benchmark. Criterion prints a lower bound, an estimate and an upper bound
/// of each figure; the estimates are returned.
fn figures(printed: &str) -> Vec<Vec<String>> {
    let estimate = |line: &str, label: &str| {
        let words: Vec<&str> = line.split_once(label)?.1.split(['[', ']']).nth(1)?.split_whitespace().collect();
        Some(format!("{} {}", words.get(2)?, words.get(3)?))
    };
    let (mut rows, mut name): (Vec<Vec<String>>, &str) = (Vec::new(), "");
    for line in printed.lines() {
        if let Some(time) = estimate(line, "time:") {
            let before = line.split("time:").next().unwrap_or_default().trim();
            rows.push(vec![if before.is_empty() { name } else { before }.to_owned(), time, String::new()]);
        } else if let Some(throughput) = estimate(line, "thrpt:") {
            rows.last_mut().into_iter().for_each(|row| row[2].clone_from(&throughput));
        } else if !line.starts_with(' ') && !line.trim().is_empty() {
            // Criterion prints a long name on a line of its own.
            name = line.trim();
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_parsed_from_criterion_output() {
        let printed = "sha256/one              time:   [1.1 ms 1.2 ms 1.3 ms]\n\
                       \x20                       thrpt:  [3.1 GiB/s 3.2 GiB/s 3.3 GiB/s]\n\
                       a name that is rather long\n\
                       \x20                       time:   [7.0 us 8.0 us 9.0 us]\n";
        let want = [["sha256/one", "1.2 ms", "3.2 GiB/s"], ["a name that is rather long", "8.0 us", ""]];
        assert_eq!(figures(printed), want);
    }
}
