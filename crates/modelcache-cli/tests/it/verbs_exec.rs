//! `exec`: arguments, environment and exit code of the command, and the lease that it holds.

use crate::common::*;
use std::path::Path;

/// A budget with room for `org/model`, and for no other artifact of that size beside it.
const TIGHT: &str = "12MB";

#[test]
fn the_command_gets_the_paths_and_nothing_else_is_on_its_output() {
    let (house, _) = House::with_model();
    house.hub.repo("org/other").commit().file("x", "other").publish().unwrap();
    let script = r#"cat "$0/config.json" "$1"; test "$MODEL_CACHE_PATH" = "$0"; test "$MODEL_CACHE_PATH_2/x" = "$1""#;
    let args = ["exec", "hf://org/model", "hf://org/other", "--", "sh", "-ec", script, "{}", "{2}/x"];
    let outcome = house.on_local("a").run(args).ok().said(&["from origin"]);
    assert_eq!(outcome.stdout, "{\"a\": 1}other");
    let quiet = house.on_local("a").run(["exec", "-q", "hf://org/model", "--", "echo", "{{}}", "{1}"]).ok();
    assert!(quiet.stdout.starts_with("{} /") && quiet.stderr.is_empty(), "{quiet}");
}

#[test]
fn the_command_runs_in_the_same_process_and_its_exit_code_is_kept() {
    let (house, _) = House::with_model();
    let running = house.on_local("a").start(["exec", "hf://org/model", "--", "sh", "-c", "echo $$; exit 42"]);
    let pid = running.pid();
    let outcome = running.wait();
    assert_eq!((outcome.code, outcome.stdout.trim()), (Some(42), pid.to_string().as_str()), "{outcome}");
}

#[test]
fn a_command_that_cannot_be_run_ends_as_in_a_shell() {
    let (house, _) = House::with_model();
    let exec = |program: &str| house.on_local("a").run(["exec", "hf://org/model", "--", program]);
    exec("no-such-program").failed(127, &["no-such-program", "PATH"]);
    exec("{}/config.json").failed(126, &["config.json"]);
    exec("{2}").failed(2, &["{2} matches no reference"]);
    house.on_local("a").run(["exec", "hf://org/model"]).said(&["<CMD>"]);
}

#[test]
fn the_command_is_not_run_if_a_reference_fails() {
    let (house, _) = House::with_model();
    let args = ["exec", "hf://org/model", "hf://org/none", "--", "echo", "ran"];
    house.on_local("a").run(args).failed(3, &["hf://org/none"]);
}

#[test]
fn an_artifact_in_use_by_a_command_is_not_evicted_and_the_refusal_names_the_process() {
    let (house, _) = House::with_model();
    house
        .hub
        .repo("org/other")
        .commit()
        .file("x", modelcache_testkit::Content::generated(2, 9 * MIB))
        .publish()
        .unwrap();
    let on = || house.on_local("a").env("MODEL_CACHE_MAX_BYTES", TIGHT);
    let path = on().run(["get", "hf://org/model"]).path();
    let running = on().start(["exec", "hf://org/model", "--", "sleep", "600"]);
    running.wait_until_it_is("sleep");
    let names = format!("in use by process {} (sleep)", running.pid());

    on().run(["evict", "--tier", "disk", "hf://org/model"]).failed(1, &[&names]);
    on().run(["get", "hf://org/other"]).failed(6, &["in the way: hf://org/model@", &names]);
    let seen = on().run(["inspect", "hf://org/model", "--json"]).object();
    assert_eq!(seen["holders"], serde_json::json!([{"pid": running.pid(), "command": "sleep"}]));
    assert_eq!(on().run(["stats", "--json"]).object()["leases"], 1);
    assert_model(&path);

    running.signal("KILL");
    assert_eq!(running.wait().code, None, "killed");
    assert_eq!(on().run(["stats", "--json"]).object()["leases"], 0, "the kernel released the lease");
    on().run(["get", "hf://org/other"]).path();
    assert!(!Path::new(&path).exists(), "an artifact without a lease makes room");
}

#[test]
fn the_lease_ends_when_the_command_ends() {
    let (house, _) = House::with_model();
    let ended = house.on_local("a").run(["exec", "hf://org/model", "--", "true"]).ok();
    assert_eq!(ended.stdout, "");
    house.on_local("a").run(["evict", "--tier", "disk", "hf://org/model"]).ok();
}
