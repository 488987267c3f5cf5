//! Row for a server with traffic shaping: it limits each connection, so a program has to find out by itself how many
//! connections to use.

use super::large_file::ServedFile;
use super::{DEFAULTS, DURABLE, durable, progress, size};
use crate::comparison::{Entry, best_peer, compare_to_disk, median, ours, table};
use crate::copiers::COPIERS;
use crate::page::{Section, Target};
use crate::server_process::{SHAPED_BYTES_PER_S, SHAPED_FIRST_BYTE_MS, ServerCounts, ServerKind};
use crate::setup::Setup;
use anyhow::Result;
use std::cell::RefCell;
use xtask::table::markdown;

/// Connections of one run, from the counts of the server.
struct ConnectionUse {
    program: String,
    connections: f64,
    /// Seconds that the shaping alone requires if this number of connections is busy all the time.
    bound_s: f64,
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "shaped");
    let (served, free) = (ServedFile::start(setup, ServerKind::Shaped)?, ServedFile::start(setup, ServerKind::Plain)?);
    let observed = RefCell::new(Vec::new());
    let fast = COPIERS
        .into_iter()
        .filter(|copier| matches!(copier.program, "s5cmd" | "obstore") || copier.tuned && copier.program == "boto3");
    let mut entries = vec![
        recorded(&served, &observed, served.ours(DEFAULTS, &[("", "after")], |command| command, None)),
        recorded(&served, &observed, served.ours(DURABLE, &[("", "yes")], durable, None)),
        free.ours("defaults, not shaped", &[("", "after")], |command| command, None),
        free.ours("durable, not shaped", &[("", "yes")], durable, None),
    ];
    entries.extend(fast.map(|copier| recorded(&served, &observed, served.peer(copier, &[]))));
    let lines = compare_to_disk(setup, setup.sizes.file, &entries)?;
    drop(entries);
    let observed = observed.into_inner();
    let share = |setting: &str, free: &str| {
        let (_, bound_s) = medians(&observed, &format!("modelcache {setting}"))?;
        let attainable_s = bound_s.max(ours(&lines, free)?.seconds()?);
        Some(100.0 * attainable_s / ours(&lines, setting)?.seconds()?)
    };
    let best = best_peer(&lines, |_| true);
    Ok(Section {
        row: "shaped",
        title: format!("One {} file, S3 to disk, with traffic shaping", size(setup.sizes.file)),
        what: format!(
            "The server sends at most {} MB/s on each connection, and the first byte of each response after \
             {SHAPED_FIRST_BYTE_MS} ms, so only a program with many connections is fast. The second table shows the \
             highest number of connections that were busy at the same time. The lower bound is the time that the \
             shaping alone requires if this number is busy all the time. The attainable time, to which the targets \
             refer, is the lower bound or, if that is longer, the time of the same program without shaping.",
            SHAPED_BYTES_PER_S / 1_000_000
        ),
        tables: vec![table(&lines, best), connections(&observed)],
        targets: vec![
            Target::at_least(
                &format!("`{DEFAULTS}`: attainable time, as a share of the median"),
                share(DEFAULTS, "defaults, not shaped"),
                " %",
                95.0,
                None,
            ),
            Target::at_least(
                &format!("`{DURABLE}`: attainable time, as a share of the median"),
                share(DURABLE, "durable, not shaped"),
                " %",
                95.0,
                None,
            ),
        ],
        notes: Vec::new(),
    })
}

/// Wraps an entry so that the connections of each run are recorded.
fn recorded<'a>(served: &'a ServedFile<'_>, observed: &'a RefCell<Vec<ConnectionUse>>, entry: Entry<'a>) -> Entry<'a> {
    let Entry { program, setting, verified, steps, run } = entry;
    let name = format!("{program} {setting}");
    let recorded = move |folder: &std::path::Path| {
        served.server.reset_counts()?;
        let runs = run(folder)?;
        let counts = served.server.counts()?;
        let (connections, bound_s) = (counts.busy_connections_max as f64, bound_s(&counts));
        observed.borrow_mut().push(ConnectionUse { program: name.clone(), connections, bound_s });
        Ok(runs)
    };
    Entry { program, setting, verified, steps, run: Box::new(recorded) }
}

/// Returns the seconds that the shaping requires for the transfers of a run, if they are spread evenly over the
/// connections that were busy at the peak.
fn bound_s(counts: &ServerCounts) -> f64 {
    let first_bytes_s = counts.transfers as f64 * SHAPED_FIRST_BYTE_MS as f64 / 1e3;
    let bytes_s = counts.bytes_sent as f64 / SHAPED_BYTES_PER_S as f64;
    (first_bytes_s + bytes_s) / counts.busy_connections_max.max(1) as f64
}

fn medians(observed: &[ConnectionUse], program: &str) -> Option<(f64, f64)> {
    let of = |value: fn(&ConnectionUse) -> f64| {
        median(observed.iter().filter(|observed| observed.program == program).map(value).collect())
    };
    Some((of(|observed| observed.connections)?, of(|observed| observed.bound_s)?))
}

fn connections(observed: &[ConnectionUse]) -> String {
    let mut names: Vec<&str> = Vec::new();
    observed.iter().for_each(|observed| {
        if !names.contains(&observed.program.as_str()) {
            names.push(&observed.program);
        }
    });
    let row = |program: &str| {
        let (connections, bound_s) = medians(observed, program)?;
        Some(vec![program.to_owned(), format!("{connections:.0}"), format!("{bound_s:.2}")])
    };
    let rows: Vec<_> = names.into_iter().filter_map(row).collect();
    markdown(&["program", "connections busy at the peak", "lower bound s"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_counts_first_bytes_and_bytes_on_all_connections() {
        let counts = ServerCounts {
            transfers: 100,
            bytes_sent: 900_000_000,
            bytes_received: 0,
            busy_connections_max: 10,
            core_seconds: 0.0,
        };
        assert!((bound_s(&counts) - 1.3).abs() < 1e-9);
    }
}
