//! The live view `stats --watch`: on a terminal, in a pipe and as JSON, with fills and leases of other processes.

use crate::common::tmux::Tmux;
use crate::common::*;
use modelcache_testkit::FaultProxy;
use serde_json::Value;

/// Starts `exec` of an artifact whose download stalls. After the download, the process is `sleep`, which holds the lease.
fn start_slow_exec(house: &House, dir: &str) -> (FaultProxy, Running) {
    let (proxy, run) = house.on_stalled_remote(dir);
    (proxy, run.start(["exec", "team/model@1", "--", "sleep", "600"]))
}

/// Returns the percentage in the line of the fill.
fn percent(lines: &[String]) -> Option<u64> {
    let line = lines.iter().find(|line| line.ends_with("team/model@1") && line.contains(" %)"))?;
    line.split_once(" %)")?.0.rsplit_once('(')?.1.parse().ok()
}

#[test]
fn the_live_view_shows_the_fill_and_the_lease_of_another_process() {
    let house = House::new();
    let size = (100, 30);
    let Some(terminal) = Tmux::start(house.on("a"), &["stats", "--watch=200ms"], &house.path("tmux"), size) else {
        return;
    };
    let shows = |text: &str| terminal.lines().iter().any(|line| line.contains(text));
    wait_until("the view is there", || shows("no fill is running") && shows("no lease is held"));
    assert!(!house.path("a").exists(), "the view creates no directory");

    let (proxy, exec) = start_slow_exec(&house, "a");
    wait_until("the fill is shown with its percentage", || percent(&terminal.lines()).is_some_and(|now| now > 0));
    let before = percent(&terminal.lines()).unwrap();
    assert!(before < 60, "{:?}", terminal.lines());
    assert!(shows(&format!("{} modelcache", exec.pid())), "the process is named: {:?}", terminal.lines());
    proxy.let_through(3 * MIB);
    wait_until("the percentage rises", || percent(&terminal.lines()).is_some_and(|now| now >= before + 20));
    assert!(shows("MB/s") || shows("kB/s"), "{:?}", terminal.lines());

    proxy.let_through(1 << 40);
    wait_until("the fill has ended and the lease is shown", || {
        shows("no fill is running") && shows(&format!("{} sleep", exec.pid()))
    });
    assert!(shows("artifacts     1 (1 file)"), "{:?}", terminal.lines());

    terminal.resize(24, 6);
    wait_until("the view fits into a small terminal", || shows("more lines"));
    let lines = terminal.lines();
    assert!(lines.len() == 6 && lines[1].starts_with("directory") && lines[1].ends_with('…'), "{lines:?}");
    terminal.resize(100, 30);
    wait_until("the view fills a larger terminal", || shows("sleep") && !shows("more lines"));

    terminal.send("C-c");
    wait_until("the view has ended", || shows("exit 0"));
    assert!(terminal.has_cursor(), "{:?}", terminal.lines());
    assert!(shows("sleep"), "the last state stays on the screen: {:?}", terminal.lines());
}

#[test]
fn without_a_terminal_each_interval_appends_a_block_of_lines() {
    let house = House::new();
    house.make_cache("a");
    let shown = house.on("a").shell(&format!("{BIN} stats --watch 0.1 | head -n 12")).ok();
    let lines: Vec<&str> = shown.stdout.lines().collect();
    assert!(lines[0].starts_with("time          20") && lines[7].is_empty(), "{shown}");
    assert_eq!(lines[8..], ["no fill is running", "", "no lease is held", ""], "{shown}");
    assert!(!shown.stdout.contains('\x1b'), "{shown}");
}

#[test]
fn with_json_each_interval_is_an_object_with_fills_and_leases() {
    let house = House::new();
    let (proxy, exec) = start_slow_exec(&house, "a");
    wait_until("the download has begun", || proxy.bytes_down() >= 2 * MIB);
    let watch = |lines: u32| {
        let script = format!("{BIN} stats --watch=300ms --json | head -n {lines}");
        house.on("a").shell(&script).objects()
    };
    let samples = watch(2);
    let fill = &samples[1]["fills"][0];
    assert_eq!((text(&fill["reference"]), &fill["process"]["pid"]), ("team/model@1".into(), &Value::from(exec.pid())));
    assert_eq!(fill["total_bytes"], big().len());
    let done = fill["done_bytes"].as_u64().unwrap();
    assert!(done > 0 && done <= 3 * MIB, "{fill}");
    assert!(samples[0]["time"].is_string() && samples[0]["used_bytes"].as_u64().unwrap() > 0, "{samples:?}");
    assert!(fill["bytes_per_second"].is_null() || fill["bytes_per_second"].is_number(), "{fill}");

    proxy.let_through(1 << 40);
    exec.wait_until_it_is("sleep");
    let sample = watch(1).remove(0);
    assert_eq!(sample["fills"], Value::Array(Vec::new()));
    assert_eq!(sample["leased"][0]["reference"], "team/model@1");
    assert_eq!(sample["leased"][0]["holders"][0]["pid"], exec.pid());
}

#[test]
fn an_interval_that_makes_no_sense_is_refused() {
    let house = House::new();
    for interval in ["0", "0.01", "-1", "2d", "soon"] {
        let refused = house.on("a").run(["stats", &format!("--watch={interval}")]);
        assert_eq!(refused.code, Some(2), "{refused}");
        assert!(refused.stderr.contains("--watch"), "{refused}");
    }
}

#[test]
fn a_signal_of_a_supervisor_ends_the_view_with_its_exit_code() {
    let house = House::new();
    house.make_cache("a");
    let mut watch = house.on("a").start(["stats", "--watch", "--json"]);
    watch.first_line();
    watch.signal("TERM");
    assert_eq!(watch.wait().code, Some(143));
    let mut watch = house.on("a").start(["stats", "--watch", "--json"]);
    watch.first_line();
    watch.signal("INT");
    let ended = watch.wait();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "Ctrl-C is the usual end");
}
