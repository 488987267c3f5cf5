//! Shows what a running call does: a bar on a terminal, else a line every few seconds.
//!
//! The call is polled, never slowed. One that is done within a second shows nothing. The bar is gone when the call is,
//! also when it is dropped halfway.

use crate::human;
use crate::output::Output;
use indicatif::{ProgressBar, ProgressStyle};
use modelcache::progress::{Phase, Progress, Snapshot};
use modelcache::{Tier, printable};
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

/// A call that is done by then shows nothing.
const SHOW_AFTER: Duration = Duration::from_secs(1);
/// Time between two drawings of the bar.
const BAR_EVERY: Duration = Duration::from_millis(100);
/// Time between two lines.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Longest name beside a bar.
const LABEL_CHARS_MAX: usize = 28;
/// How far back the rate looks, roughly.
const RATE_WINDOW_SECONDS: f64 = 5.0;

/// Runs `work`, showing `progress` under the name `label`, unless nobody wants to see it.
pub(crate) async fn show<T>(output: &Output, label: &str, progress: &Progress, work: impl Future<Output = T>) -> T {
    if output.is_quiet() {
        return work.await;
    }
    let mut work = pin!(work);
    let mut view = View::new(output, label);
    let every = if output.draws() { BAR_EVERY } else { SHOW_AFTER.min(LINE_EVERY) };
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            outcome = &mut work => return outcome,
            _ = ticks.tick() => view.look(Instant::now(), progress.snapshot()),
        }
    }
}

/// What is on the screen.
struct View<'a> {
    output: &'a Output,
    label: String,
    meter: Meter,
    started: Instant,
    last_line: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl<'a> View<'a> {
    fn new(output: &'a Output, label: &'a str) -> Self {
        let label = printable::line(label).into_owned();
        Self { output, label, meter: Meter::default(), started: Instant::now(), last_line: None, bar: None }
    }

    fn look(&mut self, now: Instant, snapshot: Snapshot) {
        let reading = self.meter.read(now, snapshot);
        if now.duration_since(self.started) < SHOW_AFTER {
            return;
        }
        if self.output.draws() {
            self.draw(&reading);
        } else if self.last_line.is_none_or(|last| now.duration_since(last) >= LINE_EVERY) {
            self.last_line = Some(now);
            self.output.remark(&format!("{}: {}", self.label, reading.text()));
        }
    }

    fn draw(&mut self, reading: &Reading) {
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
    }
}

/// A bar where the end is known, else something that turns.
fn style(has_end: bool) -> ProgressStyle {
    let template = if has_end { "{prefix} [{wide_bar}] {msg}" } else { "{prefix} {spinner} {wide_msg}" };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            self.output.bars().remove(bar);
        }
    }
}

/// What a person is told of a running call.
#[derive(Debug, Clone, PartialEq)]
struct Reading {
    phase: Phase,
    /// Where bytes come from, or go to; `None` while none move.
    tier: Option<Tier>,
    done_bytes: u64,
    total_bytes: u64,
    /// `None` until bytes have moved in this phase.
    bytes_per_second: Option<f64>,
}

impl Reading {
    fn what(&self) -> String {
        match (self.phase, self.tier) {
            (Phase::Join, _) => "waiting for another fill".to_owned(),
            (Phase::Backfill, _) => "uploading to remote".to_owned(),
            (Phase::Download, Some(tier)) => format!("downloading from {tier}"),
            (phase, _) => phase.name().to_owned(),
        }
    }

    /// A line of its own: what, how much, how fast, how long.
    fn text(&self) -> String {
        self.joined(" of ", ", ")
    }

    /// The same beside a bar, where columns are few.
    fn brief(&self) -> String {
        self.joined("/", " ")
    }

    fn joined(&self, of: &str, separator: &str) -> String {
        let mut parts = vec![self.what()];
        if self.total_bytes > 0 {
            parts.push(format!("{}{of}{}", human::bytes(self.done_bytes), human::bytes(self.total_bytes)));
            parts.extend(self.bytes_per_second.map(human::rate));
            parts.extend(self.left());
        }
        parts.join(separator)
    }

    /// How long the rest of the phase takes at this rate, unless that is nobody's guess.
    fn left(&self) -> Option<String> {
        let left = self.total_bytes.saturating_sub(self.done_bytes) as f64 / self.bytes_per_second?;
        match left.ceil() {
            seconds if !seconds.is_finite() || seconds >= 1e7 => None,
            seconds if seconds < 60.0 => Some(format!("{seconds} s left")),
            seconds => Some(format!("{} left", human::duration(Duration::from_secs(seconds as u64)))),
        }
    }
}

/// A name that leaves room for the bar: its end tells more than its beginning.
fn shortened(label: &str) -> String {
    match label.chars().count().checked_sub(LABEL_CHARS_MAX) {
        None | Some(0) => label.to_owned(),
        Some(excess) => std::iter::once('…').chain(label.chars().skip(excess + 1)).collect(),
    }
}

/// Turns readings of counters into a rate.
#[derive(Debug, Default)]
struct Meter {
    last: Option<(Instant, Snapshot)>,
    tier: Option<Tier>,
    bytes_per_second: Option<f64>,
}

impl Meter {
    fn read(&mut self, now: Instant, snapshot: Snapshot) -> Reading {
        match self.last.take() {
            Some((then, before)) if before.phase == snapshot.phase && before.total_bytes == snapshot.total_bytes => {
                self.learn(now.duration_since(then).as_secs_f64(), &before, &snapshot);
            }
            _ => self.bytes_per_second = None,
        }
        if snapshot.phase != Phase::Download {
            self.tier = None;
        }
        self.last = Some((now, snapshot));
        Reading {
            phase: snapshot.phase,
            tier: self.tier,
            done_bytes: snapshot.done_bytes,
            total_bytes: snapshot.total_bytes,
            bytes_per_second: self.bytes_per_second,
        }
    }

    /// A moving average that forgets by time, so that it does not depend on how often it is fed.
    fn learn(&mut self, seconds: f64, before: &Snapshot, now: &Snapshot) {
        if now.origin_bytes > before.origin_bytes {
            self.tier = Some(Tier::Origin);
        } else if now.remote_bytes > before.remote_bytes {
            self.tier = Some(Tier::Remote);
        }
        if seconds <= 0.0 {
            return;
        }
        let present = now.done_bytes.saturating_sub(before.done_bytes) as f64 / seconds;
        self.bytes_per_second = match self.bytes_per_second {
            None if present == 0.0 => None,
            None => Some(present),
            Some(rate) => Some(present + (rate - present) * (-seconds / RATE_WINDOW_SECONDS).exp()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(phase: Phase, done_bytes: u64, total_bytes: u64) -> Snapshot {
        Snapshot { phase, total_bytes, done_bytes, remote_bytes: 0, origin_bytes: done_bytes }
    }

    #[test]
    fn a_steady_pour_shows_tier_rate_and_time_left() {
        let start = Instant::now();
        let mut meter = Meter::default();
        let mut read = |second: u64| {
            meter.read(
                start + Duration::from_secs(second),
                snapshot(Phase::Download, second * 100_000_000, 1_000_000_000),
            )
        };
        assert_eq!(read(0).text(), "download, 0 B of 1.0 GB");
        assert_eq!(read(1).text(), "downloading from origin, 100 MB of 1.0 GB, 100 MB/s, 9 s left");
        assert_eq!(read(2).text(), "downloading from origin, 200 MB of 1.0 GB, 100 MB/s, 8 s left");
    }

    #[test]
    fn a_new_phase_starts_a_new_rate() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.read(start, snapshot(Phase::Download, 0, 100));
        meter.read(start + Duration::from_secs(1), snapshot(Phase::Download, 100, 100));
        let reading = meter.read(start + Duration::from_secs(2), snapshot(Phase::Backfill, 0, 100));
        assert_eq!(reading.text(), "backfill to remote, 0 B of 100 B");
    }

    #[test]
    fn bytes_that_are_taken_back_do_not_make_a_negative_rate() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.read(start, snapshot(Phase::Download, 50, 100));
        let reading = meter.read(start + Duration::from_secs(1), snapshot(Phase::Download, 20, 100));
        assert_eq!(reading.bytes_per_second, None);
    }

    #[test]
    fn a_long_name_keeps_its_end() {
        assert_eq!(shortened("hf://org/model@main"), "hf://org/model@main");
        assert_eq!(shortened("hf://organisation/some-large-model@v1.2"), "…ation/some-large-model@v1.2".to_owned());
    }

    #[test]
    fn waiting_is_called_waiting() {
        let reading = Meter::default().read(Instant::now(), snapshot(Phase::Join, 0, 0));
        assert_eq!(reading.text(), "waiting for another fill");
    }
}
