//! Shows what a running call does: a bar on a terminal, else a line every few seconds.
//!
//! The call is polled, never slowed. One that is done within a second shows nothing. The bar is gone when the call is,
//! also when it is dropped halfway.

use crate::human;
use crate::output::Output;
use indicatif::{ProgressBar, ProgressStyle};
use modelcache::Tier;
use modelcache::progress::{Phase, Progress, Snapshot};
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

/// A call that is done by then shows nothing.
const SHOW_AFTER: Duration = Duration::from_secs(1);
/// Time between two drawings of the bar.
const BAR_EVERY: Duration = Duration::from_millis(100);
/// Time between two lines.
const LINE_EVERY: Duration = Duration::from_secs(5);
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
    label: &'a str,
    meter: Meter,
    started: Instant,
    last_line: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl<'a> View<'a> {
    fn new(output: &'a Output, label: &'a str) -> Self {
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
        let (output, label) = (self.output, self.label);
        let bar = self.bar.get_or_insert_with(|| {
            let bar = output.bars().add(ProgressBar::no_length());
            bar.set_prefix(label.to_owned());
            bar
        });
        let template = if reading.total_bytes > 0 {
            "{prefix:.48} [{bar:20}] {wide_msg}"
        } else {
            "{prefix:.48} {spinner} {wide_msg}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_length(reading.total_bytes);
        bar.set_position(reading.done_bytes.min(reading.total_bytes));
        bar.set_message(reading.text());
        bar.tick();
    }
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
    fn text(&self) -> String {
        let what = match (self.phase, self.tier) {
            (Phase::Join, _) => "waiting for another fill".to_owned(),
            (Phase::Backfill, _) => "backfill to remote".to_owned(),
            (Phase::Pour, Some(tier)) => format!("pour from {tier}"),
            (phase, _) => phase.name().to_owned(),
        };
        if self.total_bytes == 0 {
            return what;
        }
        let mut text = format!("{what}, {} of {}", human::bytes(self.done_bytes), human::bytes(self.total_bytes));
        if let Some(rate) = self.bytes_per_second {
            text.push_str(&format!(", {}", human::rate(rate)));
            let left = self.total_bytes.saturating_sub(self.done_bytes) as f64 / rate;
            if left.is_finite() && left < 1e7 {
                text.push_str(&format!(", {} left", human::duration(Duration::from_secs(left.ceil() as u64))));
            }
        }
        text
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
        if snapshot.phase != Phase::Pour {
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
            meter.read(start + Duration::from_secs(second), snapshot(Phase::Pour, second * 100_000_000, 1_000_000_000))
        };
        assert_eq!(read(0).text(), "pour, 0 B of 1.0 GB");
        assert_eq!(read(1).text(), "pour from origin, 100 MB of 1.0 GB, 100 MB/s, 9.0 s left");
        assert_eq!(read(2).text(), "pour from origin, 200 MB of 1.0 GB, 100 MB/s, 8.0 s left");
    }

    #[test]
    fn a_new_phase_starts_a_new_rate() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.read(start, snapshot(Phase::Pour, 0, 100));
        meter.read(start + Duration::from_secs(1), snapshot(Phase::Pour, 100, 100));
        let reading = meter.read(start + Duration::from_secs(2), snapshot(Phase::Backfill, 0, 100));
        assert_eq!(reading.text(), "backfill to remote, 0 B of 100 B");
    }

    #[test]
    fn bytes_that_are_taken_back_do_not_make_a_negative_rate() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.read(start, snapshot(Phase::Pour, 50, 100));
        let reading = meter.read(start + Duration::from_secs(1), snapshot(Phase::Pour, 20, 100));
        assert_eq!(reading.bytes_per_second, None);
    }

    #[test]
    fn waiting_is_called_waiting() {
        let reading = Meter::default().read(Instant::now(), snapshot(Phase::Join, 0, 0));
        assert_eq!(reading.text(), "waiting for another fill");
    }
}
