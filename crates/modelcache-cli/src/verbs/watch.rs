//! `stats --watch`: a live view of the local directory, with the fills and leases of all processes.

use super::Session;
use super::stats::{facts, lines};
use crate::output::{Lines, table};
use crate::rate::{RateMeter, time_left};
use crate::screen::Screen;
use crate::signals::{self, Signal};
use crate::{exit, human};
use modelcache::cache::{Activity, Holder, LeasedReference, RunningFill, Stats};
use modelcache::{Cache, Result};
use serde::Serialize;
use std::collections::HashMap;
use std::future::pending;
use std::time::{Duration, Instant, SystemTime};
use tokio::time::MissedTickBehavior;

/// The facts that the live view shows, by name.
const SHOWN_FACTS: [&str; 6] = ["directory", "artifacts", "used", "  staging", "free", "pending"];

/// Shows the view until a signal arrives, or standard output is closed. Returns the exit code. As in `top` and `watch`,
/// Ctrl-C is the usual end and no failure.
pub(super) async fn run(session: &Session<'_>, interval: Duration) -> Result<u8> {
    tokio::select! {
        shown = show(session, interval) => shown.map(|()| exit::DONE),
        signal = signals::next() => Ok(match signal {
            Signal::Interrupt => exit::DONE,
            Signal::HangUp | Signal::Terminate => signal.exit_code(),
        }),
    }
}

/// Shows the view until standard output is closed.
async fn show(session: &Session<'_>, interval: Duration) -> Result<()> {
    let output = session.output;
    let mut directory = WatchedDirectory::open(session)?;
    let is_live = output.can_redraw_stdout() && !output.is_json();
    let screen = is_live.then(|| Screen::open(output)).transpose()?;
    let mut resizes = signals::resizes().filter(|_| is_live);
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !output.is_closed() {
        let resized = async {
            match &mut resizes {
                Some(resizes) => resizes.recv().await,
                None => pending().await,
            }
        };
        tokio::select! {
            _ = ticks.tick() => {}
            _ = resized => {}
        }
        let sample = directory.sample(session).await?;
        match &screen {
            Some(screen) => screen.draw(&sample.text())?,
            None if output.is_json() => output.print_json(&sample)?,
            None => {
                output.print(&sample.text())?;
                output.print(&Lines::default())?;
            }
        }
    }
    Ok(())
}

/// The directory that is watched, and the rates of the fills that were running at the last sample.
struct WatchedDirectory {
    cache: Cache,
    /// False while the directory is missing.
    exists: bool,
    rates: HashMap<(String, u32), RateMeter>,
}

impl WatchedDirectory {
    fn open(session: &Session<'_>) -> Result<Self> {
        let exists = session.config.dir.exists();
        Ok(Self { cache: session.existing_cache()?, exists, rates: HashMap::new() })
    }

    async fn sample(&mut self, session: &Session<'_>) -> Result<Sample> {
        // Another process has created the directory.
        if !self.exists && session.config.dir.exists() {
            *self = Self::open(session)?;
        }
        let Activity { stats, fills, leased } = self.cache.activity().await?;
        let (now, mut before) = (Instant::now(), std::mem::take(&mut self.rates));
        let mut watched = |fill: RunningFill| {
            let id = (fill.reference.clone(), fill.process.pid);
            let mut meter = before.remove(&id).unwrap_or_default();
            // While the total is unknown, `done_bytes` is the space that the fill takes on disk, which gives no rate.
            let bytes_per_second = fill.total_bytes.and_then(|_| meter.sample(now, fill.done_bytes));
            let left = fill.total_bytes.and_then(|total| time_left(fill.done_bytes, total, bytes_per_second));
            self.rates.insert(id, meter);
            WatchedFill { fill, bytes_per_second, seconds_left: left.map(|left| left.as_secs()) }
        };
        let fills = fills.into_iter().map(&mut watched).collect();
        let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        Ok(Sample { time, stats, fills, leased })
    }
}

/// The state of the directory at one time.
#[derive(Debug, Serialize)]
pub(crate) struct Sample {
    /// The time, in RFC 3339.
    pub(crate) time: String,
    /// Content and disk usage.
    #[serde(flatten)]
    pub(crate) stats: Stats,
    /// The running fills, sorted by reference.
    pub(crate) fills: Vec<WatchedFill>,
    /// The artifacts with a lease, sorted by reference.
    pub(crate) leased: Vec<LeasedReference>,
}

/// A running fill with its rate.
#[derive(Debug, Serialize)]
pub(crate) struct WatchedFill {
    /// The fill.
    #[serde(flatten)]
    pub(crate) fill: RunningFill,
    /// The average rate. `None` until bytes have moved between two samples, and while `total_bytes` is `None`.
    pub(crate) bytes_per_second: Option<f64>,
    /// The time that the rest takes at this rate, in seconds.
    pub(crate) seconds_left: Option<u64>,
}

impl Sample {
    fn text(&self) -> Lines {
        let shown = facts(&self.stats).into_iter().filter(|(name, _)| SHOWN_FACTS.contains(name));
        let mut text = lines(std::iter::once(("time", self.time.clone())).chain(shown)).and("");
        // The reference comes last: a narrow terminal cuts its end, and keeps the numbers.
        if self.fills.is_empty() {
            text.push("no fill is running");
        } else {
            let header = ["PROCESS", "DONE", "RATE", "LEFT", "FILL"];
            text += table(&header, &[2, 3], self.fills.iter().map(WatchedFill::cells));
        }
        text.push("");
        if self.leased.is_empty() {
            text.push("no lease is held");
        } else {
            text += table(&["PROCESS", "LEASE"], &[], self.leased.iter().flat_map(lease_rows));
        }
        text
    }
}

impl WatchedFill {
    fn cells(&self) -> Vec<String> {
        let (done, total) = (self.fill.done_bytes, self.fill.total_bytes);
        let done = match total {
            None => human::bytes(done),
            Some(total) => {
                let percent = (done as f64 * 100.0 / total as f64).floor();
                format!("{} of {} ({percent} %)", human::bytes(done), human::bytes(total))
            }
        };
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        vec![
            process(&self.fill.process),
            done,
            or_dash(self.bytes_per_second.map(human::rate)),
            or_dash(self.seconds_left.map(|seconds| human::countdown(Duration::from_secs(seconds)))),
            self.fill.reference.clone(),
        ]
    }
}

/// Returns a row for each process that holds a lease on the artifact.
fn lease_rows(lease: &LeasedReference) -> Vec<Vec<String>> {
    let row = |process: String| vec![process, lease.reference.clone()];
    match lease.holders.as_slice() {
        [] => vec![row("not visible".into())],
        holders => holders.iter().map(|holder| row(process(holder))).collect(),
    }
}

/// Formats a process: `123 python3`.
fn process(holder: &Holder) -> String {
    holder.command.as_ref().map_or_else(|| holder.pid.to_string(), |command| format!("{} {command}", holder.pid))
}
