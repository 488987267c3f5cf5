//! Row for a network that limits each connection: a program has to find out by itself how many connections to use.

use super::pull::Stage;
use super::{DEFAULTS, DURABLE, durable, progress, size};
use crate::bench::contest::{Entry, best_peer, contest_to_disk, median, ours, table};
use crate::bench::page::{Bar, Section};
use crate::bench::rivals::ALL;
use crate::bench::served::{Counted, Kind, SHAPED_BYTES_PER_S, SHAPED_FIRST_BYTE_MS};
use crate::bench::setup::Setup;
use crate::table::markdown;
use anyhow::Result;
use std::cell::RefCell;

/// Counts of the server for one run.
struct Seen {
    who: String,
    connections: f64,
    /// Seconds that the shape alone takes if that many connections are always busy.
    bound_s: f64,
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "shaped");
    let (stage, free) = (Stage::set(setup, Kind::Shaped)?, Stage::set(setup, Kind::Plain)?);
    let seen = RefCell::new(Vec::new());
    let fast =
        ALL.into_iter().filter(|rival| matches!(rival.who, "s5cmd" | "obstore") || rival.tuned && rival.who == "boto3");
    let mut entries = vec![
        watched(&stage, &seen, stage.ours(DEFAULTS, &[("", "after")], |command| command, None)),
        watched(&stage, &seen, stage.ours(DURABLE, &[("", "yes")], durable, None)),
        free.ours("defaults, no shape", &[("", "after")], |command| command, None),
        free.ours("durable, no shape", &[("", "yes")], durable, None),
    ];
    entries.extend(fast.map(|rival| watched(&stage, &seen, stage.theirs(rival, &[]))));
    let lines = contest_to_disk(setup, setup.sizes.file, &entries)?;
    drop(entries);
    let seen = seen.into_inner();
    let share = |setting: &str, free: &str| {
        let (_, bound_s) = medians(&seen, &format!("modelcache {setting}"))?;
        // Allowed time: the bound of the shape, or the time without a shape if that is longer.
        let allowed_s = bound_s.max(ours(&lines, free)?.seconds()?);
        Some(100.0 * allowed_s / ours(&lines, setting)?.seconds()?)
    };
    let best = best_peer(&lines, |_| true);
    Ok(Section {
        row: "shaped",
        title: format!("One {} file, S3 to disk, shaped", size(setup.sizes.file)),
        what: format!(
            "{} MB/s a connection, {SHAPED_FIRST_BYTE_MS} ms to the first byte. What the shape allows is the greater of two \
             times: that of the shape with as many connections as the program had busy at its peak, never idle (\"bound\"), \
             and that of the same program where nothing is shaped.",
            SHAPED_BYTES_PER_S / 1_000_000
        ),
        tables: vec![table(&lines, best), connections(&seen)],
        bars: vec![
            Bar::at_least(
                "defaults: share of what the shape allows",
                share(DEFAULTS, "defaults, no shape"),
                " %",
                95.0,
                None,
            ),
            Bar::at_least(
                "durable: share of what the shape allows",
                share(DURABLE, "durable, no shape"),
                " %",
                95.0,
                None,
            ),
        ],
        notes: Vec::new(),
    })
}

/// Wraps an entry so that the server's counts of each run are recorded.
fn watched<'a>(stage: &'a Stage<'_>, seen: &'a RefCell<Vec<Seen>>, entry: Entry<'a>) -> Entry<'a> {
    let Entry { who, setting, checked, steps, run } = entry;
    let name = format!("{who} {setting}");
    let watched = move |folder: &std::path::Path| {
        stage.served.forget_counts()?;
        let runs = run(folder)?;
        let counted = stage.served.counted()?;
        let (connections, bound_s) = (counted.busy_max as f64, bound_s(&counted));
        seen.borrow_mut().push(Seen { who: name.clone(), connections, bound_s });
        Ok(runs)
    };
    Entry { who, setting, checked, steps, run: Box::new(watched) }
}

/// Returns the seconds that the shape needs for the requests of a run, spread evenly over the connections that were
/// busy at the peak.
fn bound_s(counted: &Counted) -> f64 {
    let first_bytes_s = counted.transfers as f64 * SHAPED_FIRST_BYTE_MS as f64 / 1e3;
    let bytes_s = counted.bytes_sent as f64 / SHAPED_BYTES_PER_S as f64;
    (first_bytes_s + bytes_s) / counted.busy_max.max(1) as f64
}

fn medians(seen: &[Seen], who: &str) -> Option<(f64, f64)> {
    let of = |value: fn(&Seen) -> f64| median(seen.iter().filter(|seen| seen.who == who).map(value).collect());
    Some((of(|seen| seen.connections)?, of(|seen| seen.bound_s)?))
}

fn connections(seen: &[Seen]) -> String {
    let mut names: Vec<&str> = Vec::new();
    seen.iter().for_each(|seen| {
        if !names.contains(&seen.who.as_str()) {
            names.push(&seen.who);
        }
    });
    let row = |who: &str| {
        let (connections, bound_s) = medians(seen, who)?;
        Some(vec![who.to_owned(), format!("{connections:.0}"), format!("{bound_s:.2}")])
    };
    let rows: Vec<_> = names.into_iter().filter_map(row).collect();
    markdown(&["program", "connections busy at the peak", "bound s"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_counts_first_bytes_and_bytes_on_all_connections() {
        let counted =
            Counted { transfers: 100, bytes_sent: 900_000_000, bytes_taken: 0, busy_max: 10, core_seconds: 0.0 };
        assert!((bound_s(&counted) - 1.3).abs() < 1e-9);
    }
}
