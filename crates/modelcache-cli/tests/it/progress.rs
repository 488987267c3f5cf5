//! The progress of a call: on a terminal, in its taskbar, in pipes and in logs of CI.

use crate::common::tmux::Tmux;
use crate::common::*;
use modelcache_testkit::FaultProxy;
use std::time::Duration;

/// Starts a get in a terminal and stalls it, so that its progress is shown.
fn stalled_get(house: &House, variables: &[(&str, &str)]) -> Option<(FaultProxy, Tmux)> {
    let (proxy, run) = house.on_stalled_remote("a");
    let run = variables.iter().fold(run, |run, (name, value)| run.env(name, value));
    Some((proxy, Tmux::start(run, &["get", "team/model@1"], &house.path("tmux"), (100, 10))?))
}

/// Returns true if the taskbar has shown a percentage above 0.
fn has_percentage(terminal: &Tmux) -> bool {
    terminal.received().split("\x1b]9;4;1;").skip(1).any(|rest| !rest.starts_with('0'))
}

#[test]
fn a_terminal_that_shows_it_gets_the_progress_for_its_taskbar_until_the_call_ends() {
    let house = House::new();
    let Some((proxy, terminal)) = stalled_get(&house, &[("WT_SESSION", "1")]) else { return };
    wait_until("the taskbar shows a percentage", || has_percentage(&terminal));
    proxy.let_through(1 << 40);
    wait_until("the get has ended", || terminal.received().contains("exit 0"));
    let received = terminal.received();
    let (_, last) = received.rsplit_once("\x1b]9;4;").unwrap();
    assert!(last.starts_with("0;"), "the progress is removed: {last:?}");
}

#[test]
fn ctrl_c_and_failures_remove_the_progress_from_the_taskbar() {
    let house = House::new();
    let Some((_proxy, terminal)) = stalled_get(&house, &[("WT_SESSION", "1")]) else { return };
    wait_until("the taskbar shows a percentage", || has_percentage(&terminal));
    terminal.send("C-c");
    wait_until("the get has ended", || terminal.received().contains("exit 130"));
    assert!(terminal.received().rsplit_once("\x1b]9;4;").unwrap().1.starts_with("0;"), "{}", terminal.received());

    let house = House::new();
    let variables = [("WT_SESSION", "1"), ("MODEL_CACHE_READ_TIMEOUT", "3s"), ("MODEL_CACHE_RETRY_DEADLINE", "1s")];
    let Some((_proxy, terminal)) = stalled_get(&house, &variables) else { return };
    wait_until("the get has failed", || terminal.received().contains("exit 7"));
    let received = terminal.received();
    let codes: Vec<&str> = received.split("\x1b]9;4;").skip(1).map(|rest| &rest[..1]).collect();
    assert!(codes.ends_with(&["2", "0"]), "an error, then nothing: {codes:?}");
}

#[test]
fn other_terminals_get_no_progress_for_a_taskbar() {
    let house = House::new();
    let Some((_proxy, terminal)) = stalled_get(&house, &[]) else { return };
    wait_until("the bar is shown", || terminal.lines().iter().any(|line| line.contains("9.4 MB")));
    assert!(!terminal.received().contains("\x1b]9;"), "{}", terminal.received());
}

#[test]
fn in_ci_a_terminal_gets_plain_lines() {
    let house = House::new();
    let Some((_proxy, terminal)) = stalled_get(&house, &[("CI", "true"), ("WT_SESSION", "1")]) else { return };
    wait_until("a line is there", || terminal.received().contains("modelcache: team/model@1: downloading"));
    let lines = terminal.received().lines().filter(|line| line.contains("downloading")).count();
    assert_eq!(lines, 1, "one every 5 s");
    assert!(!terminal.received().contains('\x1b'), "{:?}", terminal.received());
}

#[test]
fn in_a_pipe_progress_is_plain_lines_every_few_seconds() {
    let house = House::new();
    let (proxy, run) = house.on_stalled_remote("a");
    let get = run.start(["get", "team/model@1"]);
    wait_until("the download has begun", || proxy.bytes_down() >= 2 * MIB);
    std::thread::sleep(Duration::from_millis(2500));
    get.signal("INT");
    let ended = get.wait();
    let lines: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("downloading")).collect();
    assert!(lines.len() == 1 && lines[0].starts_with("modelcache: team/model@1: downloading"), "{ended}");
    assert!(!ended.stderr.contains(['\x1b', '\r']), "{ended}");
}
