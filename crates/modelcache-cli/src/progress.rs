//! Shows the progress of a running call: a bar on a terminal, otherwise a line every few seconds.
//!
//! The display samples counters and does not slow the call down. A call that ends within a second shows nothing. The
//! bar, and the progress in the taskbar, are removed when the call ends or is dropped.

use crate::human;
use crate::output::Output;
use crate::rate::{self, RateMeter};
use crate::taskbar::CallId;
use indicatif::{ProgressBar, ProgressStyle};
use modelcache::progress::{Phase, Progress, Snapshot};
use modelcache::{Result, Tier, printable};
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

/// A call that ends within this time shows nothing.
const SHOW_AFTER: Duration = Duration::from_secs(1);
/// Interval between two updates of the bar.
const BAR_INTERVAL: Duration = Duration::from_millis(100);
/// Interval between two lines.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Longest label beside a bar, in characters.
const LABEL_CHARS_MAX: usize = 28;

/// Runs `work` and shows `progress` labelled `label`, unless `--quiet` was passed. Returns the outcome of `work`.
pub(crate) async fn show<T>(
    output: &Output,
    label: &str,
    progress: &Progress,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    if output.is_quiet() {
        return work.await;
    }
    let mut work = pin!(work);
    let mut view = View::new(output, label);
    let interval = if output.can_redraw() { BAR_INTERVAL } else { SHOW_AFTER.min(LINE_INTERVAL) };
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            outcome = &mut work => {
                view.has_failed = outcome.is_err();
                return outcome;
            }
            _ = ticks.tick() => view.update(Instant::now(), progress.snapshot()),
        }
    }
}

/// The state of one progress display.
struct View<'a> {
    output: &'a Output,
    label: String,
    meter: Meter,
    started: Instant,
    last_line: Option<Instant>,
    bar: Option<ProgressBar>,
    /// The number of the call in the taskbar, if it was shown there.
    taskbar_call: Option<CallId>,
    has_failed: bool,
}

impl<'a> View<'a> {
    fn new(output: &'a Output, label: &'a str) -> Self {
        let label = printable::line(label).into_owned();
        Self {
            output,
            label,
            meter: Meter::default(),
            started: Instant::now(),
            last_line: None,
            bar: None,
            taskbar_call: None,
            has_failed: false,
        }
    }

    /// Samples the counters, and updates the bar or prints a line if it is time.
    fn update(&mut self, now: Instant, snapshot: Snapshot) {
        let reading = self.meter.sample(now, snapshot);
        if now.duration_since(self.started) < SHOW_AFTER {
            return;
        }
        if self.output.can_redraw() {
            self.draw(&reading);
        } else if self.last_line.is_none_or(|last| now.duration_since(last) >= LINE_INTERVAL) {
            self.last_line = Some(now);
            self.output.message(&format!("{}: {}", self.label, reading.text()));
        }
    }

    /// Draws the bar, or the spinner while the total is unknown.
    fn draw(&mut self, reading: &ProgressSample) {
        let style = style(reading.total_bytes > 0);
        let (output, label) = (self.output, &self.label);
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::no_length().with_style(style.clone()).with_prefix(shortened(label));
            output.bars().add(bar.with_message(reading.brief()))
        });
        bar.set_style(style);
        bar.set_length(reading.total_bytes);
        bar.set_position(reading.done_bytes.min(reading.total_bytes));
        bar.set_message(reading.brief());
        bar.tick();
        self.output.show_in_taskbar(|taskbar| {
            let call = *self.taskbar_call.get_or_insert_with(|| taskbar.add_call());
            taskbar.update(call, reading.done_bytes, reading.total_bytes)
        });
    }
}

/// Returns the style of a bar if the total is known, otherwise of a spinner.
fn style(is_total_known: bool) -> ProgressStyle {
    let template = if is_total_known { "{prefix} [{wide_bar}] {msg}" } else { "{prefix} {spinner} {wide_msg}" };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            self.output.bars().remove(bar);
        }
        if let Some(call) = self.taskbar_call {
            self.output.show_in_taskbar(|taskbar| taskbar.end(call, self.has_failed));
        }
    }
}

/// One sample of a running call, as it is displayed.
#[derive(Debug, Clone, PartialEq)]
struct ProgressSample {
    phase: Phase,
    /// The tier that bytes are downloaded from; `None` if no bytes have moved.
    tier: Option<Tier>,
    done_bytes: u64,
    total_bytes: u64,
    /// The average rate; `None` until bytes have moved in this phase.
    bytes_per_second: Option<f64>,
}

impl ProgressSample {
    /// Returns the phase in words.
    fn activity(&self) -> String {
        let words = match self.phase {
            Phase::Resolve => "resolving the reference",
            Phase::Acquire => "checking the local disk",
            Phase::Join => "waiting for another download of this artifact",
            Phase::Plan => "planning",
            Phase::Download => match self.tier {
                Some(tier) => return format!("downloading from {tier}"),
                None => "downloading",
            },
            Phase::Read => "reading and hashing",
            Phase::Publish => "publishing",
            Phase::Backfill => "uploading to remote",
            Phase::Materialize => "writing files",
            Phase::Extract => "extracting",
            Phase::Verify => "verifying",
        };
        words.to_owned()
    }

    /// Returns the text of a line: phase, bytes, rate, time left.
    fn text(&self) -> String {
        self.joined(" of ", ", ")
    }

    /// Returns the short text beside a bar.
    fn brief(&self) -> String {
        self.joined("/", " ")
    }

    /// Joins phase, bytes, rate and time left.
    fn joined(&self, of: &str, separator: &str) -> String {
        let mut parts = vec![self.activity()];
        if self.total_bytes > 0 {
            parts.push(format!("{}{of}{}", human::bytes(self.done_bytes), human::bytes(self.total_bytes)));
            parts.extend(self.bytes_per_second.map(human::rate));
            let left = rate::time_left(self.done_bytes, self.total_bytes, self.bytes_per_second);
            parts.extend(left.map(|left| format!("{} left", human::countdown(left))));
        }
        parts.join(separator)
    }
}

/// Returns the label, shortened to leave room for the bar. The end is kept, because it identifies the artifact.
fn shortened(label: &str) -> String {
    match label.chars().count().checked_sub(LABEL_CHARS_MAX) {
        None | Some(0) => label.to_owned(),
        Some(excess) => std::iter::once('…').chain(label.chars().skip(excess + 1)).collect(),
    }
}

/// Computes rate and tier from successive samples of the counters.
#[derive(Debug, Default)]
struct Meter {
    last: Option<Snapshot>,
    tier: Option<Tier>,
    rate: RateMeter,
}

impl Meter {
    /// Takes a sample of the counters, and returns it as it is displayed.
    fn sample(&mut self, now: Instant, snapshot: Snapshot) -> ProgressSample {
        match self.last.replace(snapshot) {
            Some(before) if before.phase == snapshot.phase && before.total_bytes == snapshot.total_bytes => {
                self.update_tier(&before, &snapshot);
            }
            // A new phase or a new total starts a new average.
            _ => self.rate = RateMeter::default(),
        }
        if snapshot.phase != Phase::Download {
            self.tier = None;
        }
        ProgressSample {
            phase: snapshot.phase,
            tier: self.tier,
            done_bytes: snapshot.done_bytes,
            total_bytes: snapshot.total_bytes,
            bytes_per_second: self.rate.sample(now, snapshot.done_bytes),
        }
    }

    /// Updates the tier from two samples.
    fn update_tier(&mut self, before: &Snapshot, now: &Snapshot) {
        if now.origin_bytes > before.origin_bytes {
            self.tier = Some(Tier::Origin);
        } else if now.remote_bytes > before.remote_bytes {
            self.tier = Some(Tier::Remote);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(phase: Phase, done_bytes: u64, total_bytes: u64) -> Snapshot {
        Snapshot { phase, total_bytes, done_bytes, remote_bytes: 0, origin_bytes: done_bytes }
    }

    #[test]
    fn a_steady_download_shows_tier_rate_and_time_left() {
        let start = Instant::now();
        let mut meter = Meter::default();
        let mut read = |second: u64| {
            meter.sample(
                start + Duration::from_secs(second),
                snapshot(Phase::Download, second * 100_000_000, 1_000_000_000),
            )
        };
        assert_eq!(read(0).text(), "downloading, 0 B of 1.0 GB");
        assert_eq!(read(1).text(), "downloading from origin, 100 MB of 1.0 GB, 100 MB/s, 9 s left");
        assert_eq!(read(2).text(), "downloading from origin, 200 MB of 1.0 GB, 100 MB/s, 8 s left");
    }

    #[test]
    fn a_new_phase_starts_a_new_rate() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.sample(start, snapshot(Phase::Download, 0, 100));
        meter.sample(start + Duration::from_secs(1), snapshot(Phase::Download, 100, 100));
        let reading = meter.sample(start + Duration::from_secs(2), snapshot(Phase::Backfill, 0, 100));
        assert_eq!(reading.text(), "uploading to remote, 0 B of 100 B");
    }

    #[test]
    fn a_long_name_keeps_its_end() {
        assert_eq!(shortened("hf://org/model@main"), "hf://org/model@main");
        assert_eq!(shortened("hf://organisation/some-large-model@v1.2"), "…ation/some-large-model@v1.2".to_owned());
    }

    #[test]
    fn a_call_that_waits_for_another_download_shows_it() {
        let reading = Meter::default().sample(Instant::now(), snapshot(Phase::Join, 0, 0));
        assert_eq!(reading.text(), "waiting for another download of this artifact");
    }
}
