//! Progress in the taskbar or the tab of the terminal (OSC 9;4), on terminals that are known to show it.
//!
//! Calls that run at the same time share one indicator, which shows the sum of their bytes. After a failure it shows an
//! error until the last of them has ended. Then it is removed.

use anstyle_progress::{TermProgress, TermProgressStatus, supports_term_progress};
use std::collections::BTreeMap;

/// The indicator of this process.
#[derive(Debug, Default)]
pub(crate) struct Taskbar {
    /// Done and total bytes of the running calls. The total is 0 while it is unknown.
    running: BTreeMap<CallId, (u64, u64)>,
    calls: CallId,
    has_failed: bool,
}

/// The number of a call.
pub(crate) type CallId = u64;

impl Taskbar {
    /// Returns the indicator if standard error is a terminal (`is_terminal`) that shows it. The environment names the
    /// terminal. Within tmux and screen it names the terminal around them, which does not get the sequence.
    pub(crate) fn detect(is_terminal: bool) -> Option<Self> {
        let is_multiplexed = ["TMUX", "STY"].iter().any(|name| std::env::var_os(name).is_some());
        (!is_multiplexed && supports_term_progress(is_terminal)).then(Self::default)
    }

    /// Returns the number of a new call.
    pub(crate) fn add_call(&mut self) -> CallId {
        self.calls += 1;
        self.calls
    }

    /// Records the progress of a call. Returns the text to write to the terminal.
    pub(crate) fn update(&mut self, call: CallId, done_bytes: u64, total_bytes: u64) -> String {
        self.running.insert(call, (done_bytes, total_bytes));
        self.indicator().to_string()
    }

    /// Removes a call that has ended. Returns the text to write to the terminal.
    pub(crate) fn end(&mut self, call: CallId, has_failed: bool) -> String {
        if !self.running.contains_key(&call) {
            return String::new();
        }
        self.has_failed |= has_failed;
        let failure = if has_failed { self.indicator().to_string() } else { String::new() };
        self.running.remove(&call);
        if self.running.is_empty() {
            self.has_failed = false;
            return format!("{failure}{}", TermProgress::remove());
        }
        self.indicator().to_string()
    }

    fn indicator(&self) -> TermProgress {
        let sum = |of: fn(&(u64, u64)) -> u64| self.running.values().map(of).fold(0, u64::saturating_add);
        let (done, total) = (sum(|(done, _)| *done), sum(|(_, total)| *total));
        let status = if self.has_failed { TermProgressStatus::Error } else { TermProgressStatus::Normal };
        let progress = TermProgress::none().status(status);
        match total {
            0 => progress,
            _ => progress.percent((done.min(total) as f64 * 100.0 / total as f64) as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_share_an_indicator_that_is_removed_with_the_last_one() {
        let mut taskbar = Taskbar::default();
        let (first, second) = (taskbar.add_call(), taskbar.add_call());
        assert_eq!(taskbar.update(first, 0, 0), "\x1b]9;4;3;\x1b\\", "indeterminate");
        assert_eq!(taskbar.update(first, 25, 100), "\x1b]9;4;1;25\x1b\\");
        assert_eq!(taskbar.update(second, 0, 400), "\x1b]9;4;1;5\x1b\\");
        assert_eq!(taskbar.end(first, false), "\x1b]9;4;1;0\x1b\\");
        assert_eq!(taskbar.end(second, false), "\x1b]9;4;0;\x1b\\");
        assert_eq!(taskbar.end(second, false), "", "it was never shown");
    }

    #[test]
    fn a_failure_is_shown_until_the_last_call_ends() {
        let mut taskbar = Taskbar::default();
        let (first, second) = (taskbar.add_call(), taskbar.add_call());
        taskbar.update(first, 50, 100);
        taskbar.update(second, 50, 100);
        assert_eq!(taskbar.end(first, true), "\x1b]9;4;2;50\x1b\\");
        assert_eq!(taskbar.update(second, 80, 100), "\x1b]9;4;2;80\x1b\\");
        assert_eq!(taskbar.end(second, false), "\x1b]9;4;0;\x1b\\");
        taskbar.update(first, 50, 100);
        assert_eq!(taskbar.end(first, true), "\x1b]9;4;2;50\x1b\\\x1b]9;4;0;\x1b\\");
    }
}
