//! Offline mode: no origin is asked, and cached artifacts and refs are served at any age.

use crate::common::*;
use std::fs;

/// A run for which no cached ref is fresh.
fn on(house: &House, dir: &str) -> Run {
    house.on(dir).env("MODEL_CACHE_REF_TTL", "0s")
}

fn same(run: Run) -> Run {
    run
}

/// A way to switch offline mode on: a change of the environment, and flags.
type Way = (fn(Run) -> Run, &'static [&'static str]);
const OFFLINE: [Way; 4] = [
    (|run| run.env("MODEL_CACHE_OFFLINE", "1"), &[]),
    (|run| run.env("HF_HUB_OFFLINE", "1"), &[]),
    (same, &["--offline"]),
    (same, &["--local-files-only"]),
];

#[track_caller]
fn assert_unasked(house: &House, with_remote: bool) {
    assert_eq!(house.hub.requests().len(), 0, "{:?}", house.hub.requests());
    if with_remote {
        assert_eq!(house.s3.requests().len(), 0, "{:?}", house.s3.requests());
    }
}

fn clear(house: &House) {
    house.hub.clear_requests();
    house.s3.clear_requests();
}

#[test]
fn artifacts_on_disk_are_served_offline_without_a_request() {
    let (house, commit) = House::with_model();
    on(&house, "a").run(["get", "hf://org/model"]).path();
    house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
    clear(&house);
    for (change, flags) in OFFLINE {
        let run = || change(on(&house, "a"));
        let args = |verb: &'static str| [&[verb], flags, &["hf://org/model"]].concat().into_iter().map(str::to_owned);
        let got = run().run(args("get"));
        assert!(!got.stderr.contains("WARN"), "offline mode is not a warning: {got}");
        assert_model(&got.path_saying(&["on disk"]));
        run().run(args("prewarm")).ok().said(&["on disk"]);
        let cat = [&["exec"], flags, &["hf://org/model", "--", "cat", "{}/config.json"]].concat();
        assert_eq!(run().run(cat).ok().stdout, "{\"a\": 1}");
        assert_eq!(run().run(args("resolve")).ok().stdout, format!("hf://org/model@{commit}\n"));
        assert_eq!(house.hub.requests().len(), 0, "{flags:?}: {:?}", house.hub.requests());
    }
}

#[test]
fn an_artifact_that_is_not_on_disk_is_not_found_and_the_error_names_offline_mode() {
    let (house, commit) = House::with_model();
    let exact = format!("hf://org/model@{commit}");
    for (change, flags) in OFFLINE {
        let run = || change(on(&house, "a").env("MODEL_CACHE_ORIGIN", "hf://{name}@{version}"));
        let local = flags == ["--local-files-only"];
        let reason = if local { "neither remote nor origin was asked" } else { "no origin was asked" };
        for reference in ["hf://org/model", &exact, "org/model@main"] {
            let message_parts = [reason, "--offline", "MODEL_CACHE_OFFLINE", "HF_HUB_OFFLINE"];
            run().run([&["get", reference], flags].concat()).failed(3, &message_parts);
        }
        assert_unasked(&house, local);
        clear(&house);
    }
    // A partial artifact does not satisfy a get of the whole.
    house.on_local("a").run(["get", &exact, "--include", "config.json"]).path();
    clear(&house);
    house
        .on_local("a")
        .run(["get", &exact, "--offline"])
        .failed(3, &["is in the manifest, but none of the tiers used has it", "no origin was asked"]);
    house.on_local("a").run(["get", &exact, "--offline", "--include", "config.json"]).path();
    assert_unasked(&house, true);
}

#[test]
fn offline_mode_still_asks_the_remote_and_accepts_an_old_ref() {
    let (house, _) = House::with_model();
    on(&house, "a").run(["get", "hf://org/model"]).path();
    house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
    clear(&house);
    assert_model(&on(&house, "b").run(["get", "hf://org/model", "--offline"]).path_saying(&["from remote"]));
    assert_unasked(&house, false);
    let evicts = on(&house, "b").env("MODEL_CACHE_OFFLINE", "1").env("MODEL_CACHE_ORIGIN", "hf://{name}@{version}");
    house.write("mine", "mine");
    on(&house, "b").run(["put", "org/model@main", "mine"]).ok();
    clear(&house);
    evicts.run(["evict", "org/model@main"]).failed(2, &["the only copies", "--yes"]);
    assert_unasked(&house, false);
}

#[test]
fn local_files_only_asks_no_remote_either() {
    let house = House::new();
    house.write("1", "one");
    house.write("2", "two");
    on(&house, "ops").run(["put", "m@1", "1", "--tag", "prod"]).ok();
    on(&house, "a").run(["get", "m@prod"]).path();
    on(&house, "ops").run(["put", "m@2", "2", "--tag", "prod"]).ok();
    clear(&house);
    let local = |dir: &str, reference: &str| on(&house, dir).run(["get", reference, "--local-files-only"]);
    assert_eq!(fs::read_to_string(local("a", "m@prod").path()).unwrap(), "one");
    local("a", "m@1").path();
    local("a", "m@2").failed(3, &["m@2", "neither remote nor origin was asked", "--local-files-only"]);
    local("b", "m@prod").failed(3, &["m@prod", "neither remote nor origin was asked"]);
    assert_unasked(&house, true);
    assert_eq!(fs::read_to_string(on(&house, "a").run(["get", "m@prod", "--offline"]).path()).unwrap(), "two");
}

#[test]
fn a_local_folder_is_a_usable_origin_in_offline_mode() {
    let house = House::new();
    house.write("models/m/1/a.txt", "a");
    let folder = format!("file://{}", house.path("models/m/1").display());
    let template = format!("file://{}/{{name}}/{{version}}, hf://{{name}}@{{version}}", house.path("models").display());
    for flag in ["--offline", "--local-files-only"] {
        assert!(house.on_local("a").run(["get", &folder, flag]).path().join("a.txt").is_file());
        let bare = house.on_local("a").env("MODEL_CACHE_ORIGIN", &template).run(["get", "m@1", flag]);
        assert!(bare.path().join("a.txt").is_file());
        fs::remove_dir_all(house.path("a")).unwrap();
    }
    assert_unasked(&house, true);
}

#[test]
fn a_refresh_and_offline_exclude_each_other() {
    let (house, _) = House::with_model();
    on(&house, "a").run(["get", "hf://org/model"]).path();
    for flag in ["--offline", "--local-files-only"] {
        let got = on(&house, "a").run(["get", "hf://org/model", "--refresh", flag]);
        assert_eq!(got.code, Some(2), "{got}");
    }
    let offline = on(&house, "a").env("MODEL_CACHE_OFFLINE", "1");
    offline
        .run(["get", "hf://org/model", "--refresh"])
        .failed(2, &["a refresh needs the origin", "MODEL_CACHE_OFFLINE"]);
}

#[test]
fn start_jitter_delays_a_fetch_and_never_a_hit() {
    let (house, commit) = House::with_model();
    let jitter = |dir: &str| on(&house, dir).env("MODEL_CACHE_START_JITTER", "40000d");
    let exact = format!("hf://org/model@{commit}");
    on(&house, "a").run(["get", "hf://org/model"]).path();
    clear(&house);
    assert_model(&jitter("a").run(["get", &exact]).path_saying(&["on disk"]));
    assert_model(&jitter("a").run(["get", "hf://org/model", "--local-files-only"]).path());
    for reference in [&exact, "hf://org/model", "m@1"] {
        let got = jitter("b").run(["get", reference, "--timeout", "3s"]);
        got.failed(7, &["waiting a random time", "MODEL_CACHE_START_JITTER", "not done within"]);
    }
    assert_unasked(&house, true);
    assert_model(&on(&house, "b").env("MODEL_CACHE_START_JITTER", "1ms").run(["get", &exact]).path());
}
