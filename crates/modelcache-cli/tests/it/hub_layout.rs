//! `--layout hub`: the links below `hub/`, their share of the budget, and their end. The real clients read such a folder
//! in `modelcache-server/tests/clients/layout.rs`.

use crate::common::*;
use modelcache_testkit::Content;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

fn get(house: &House, args: &[&str]) -> PathBuf {
    house.on_local("a").run(["get", "--layout", "hub"].iter().chain(args)).path()
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// The view of a file of `org/model`.
fn view(house: &House, commit: &str, file: &str) -> PathBuf {
    house.path("a/artifacts/hf%2Forg%2Fmodel").join(commit).join("files").join(file)
}

/// The bytes that count against the budget.
fn used(house: &House) -> u64 {
    house.on_local("a").run(["stats", "--json"]).object()["used_bytes"].as_u64().unwrap()
}

#[test]
fn the_snapshot_has_the_files_as_links_and_takes_no_space() {
    let (house, commit) = House::with_model();
    house.on_local("a").run(["get", "hf://org/model"]).path();
    let before = used(&house);
    let snapshot = get(&house, &["hf://org/model"]);
    let repo = house.path("a/hub/models--org--model");
    assert_eq!(snapshot, repo.join("snapshots").join(&commit));
    assert_model(&snapshot);
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), commit, "without a newline");
    for path in files_below(&snapshot) {
        let file = snapshot.join(&path);
        assert!(!fs::symlink_metadata(&file).unwrap().is_symlink());
        assert_eq!(inode(&file), inode(&view(&house, &commit, path.to_str().unwrap())));
    }
    assert_eq!(used(&house), before);
    house.assert_consistent("a");

    // The report names the folder, and a single file is a path in it.
    let args = ["get", "--layout", "hub", "--json", &format!("hf://org/model@{commit}/config.json")];
    let report = house.on_local("a").run(args).object();
    assert_eq!(report["path"], json!(snapshot.join("config.json")));
    let hub = json!({ "cache_dir": house.path("a/hub"), "repo_id": "org/model", "snapshot": snapshot });
    assert_eq!(report["hub"], hub);
}

#[test]
fn the_setting_concerns_artifacts_of_the_hub_only() {
    let (house, commit) = House::with_model();
    house.write("w.bin", "weights");
    let on = || house.on_local("a").env("MODEL_CACHE_LAYOUT", "hub");
    on().run(["put", "m@1", "w.bin"]).ok();
    assert_eq!(on().run(["get", "m@1"]).path(), house.path("a/artifacts/m/1/files/w.bin"));
    assert!(!house.path("a/hub").exists());
    assert!(on().run(["get", &format!("hf://org/model@{commit}")]).path().starts_with(house.path("a/hub")));
    // A commit needs no ref.
    assert!(!house.path("a/hub/models--org--model/refs").exists());
    house.on_local("a").run(["get", "--layout", "flat", "m@1"]).failed(2, &["layout", "files or hub"]);
}

#[test]
fn revisions_datasets_and_a_part_of_the_files_have_their_places() {
    let (house, first) = House::with_model();
    let repo = house.hub.repo("org/model");
    let second = repo.commit().file("config.json", "{\"a\": 2}").publish().unwrap();
    repo.tag("v1", &first);
    repo.tag("refs/pr/1", &first);
    let data = house.hub.repo("datasets/squad").commit().file("sub dir/fé+%.txt", "text").publish().unwrap();

    get(&house, &["hf://org/model@v1", "--include", "*.json"]);
    get(&house, &["hf://org/model@refs/pr/1", "--include", "*.json"]);
    get(&house, &["hf://org/model"]);
    get(&house, &["hf://datasets/squad"]);
    let below = |folder: &str| {
        let paths = files_below(&house.path("a/hub").join(folder));
        paths.into_iter().map(|path| path.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(below("models--org--model/refs"), ["main", "refs/pr/1", "v1"]);
    assert_eq!(below(&format!("models--org--model/snapshots/{first}")), ["config.json"]);
    assert_eq!(below(&format!("datasets--squad/snapshots/{data}")), ["sub dir/fé+%.txt"]);

    // An eviction removes what belongs to the commit, and nothing else.
    house.on_local("a").run(["evict", &format!("hf://org/model@{first}"), "--tier", "disk"]).ok();
    assert_eq!(below("models--org--model/refs"), ["main"]);
    assert_eq!(below("models--org--model/trees"), [format!("{second}.json")]);
    house.on_local("a").run(["evict", "hf://org/model", "--tier", "disk"]).ok();
    house.on_local("a").run(["evict", "hf://datasets/squad", "--tier", "disk"]).ok();
    assert_eq!(entries(&house.path("a/hub")), Vec::<PathBuf>::new());
    assert_eq!(used(&house), 0);
    house.assert_consistent("a");
}

#[test]
fn an_artifact_with_links_is_evicted_for_space() {
    let (house, commit) = House::with_model();
    house.hub.repo("org/other").commit().file("x", Content::generated(2, 9 * MIB)).publish().unwrap();
    get(&house, &["hf://org/model"]);
    let planned =
        house.on_local("a").run(["evict", "hf://org/model", "--dry-run", "--json", "--tier", "disk"]).object();
    let tight = || house.on_local("a").env("MODEL_CACHE_MAX_BYTES", "12MB");
    tight().run(["get", "--layout", "hub", "hf://org/other"]).path();
    assert!(!house.path("a/hub/models--org--model").exists(), "{planned}");
    assert!(!view(&house, &commit, "config.json").exists());
    house.assert_consistent("a");

    // While a command uses the files, they stay, and so do the links.
    let running = tight().start(["exec", "hf://org/other", "--", "sleep", "600"]);
    running.wait_until_it_is("sleep");
    tight().run(["get", "hf://org/model"]).failed(6, &["sleep"]);
    assert!(house.path("a/hub/models--org--other").exists());
    running.signal("KILL");
    running.wait();
}

#[test]
fn a_damaged_file_loses_its_link_and_gets_a_new_one() {
    let (house, commit) = House::with_model();
    let snapshot = get(&house, &["hf://org/model"]);
    let file = snapshot.join("config.json");
    let damage = || {
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        fs::write(&file, "{\"b\": 1}").unwrap();
    };
    damage();
    assert_eq!(house.on_local("a").run(["verify"]).code, Some(5));
    assert!(!file.exists(), "a client must not read wrong bytes");
    get(&house, &["hf://org/model"]);
    assert_model(&snapshot);

    // Also if the next get does not ask for the layout: the link follows its view.
    damage();
    house.on_local("a").run(["get", "hf://org/model"]).path();
    assert!(!file.exists() || inode(&file) == inode(&view(&house, &commit, "config.json")));
    get(&house, &["hf://org/model"]);
    assert_model(&snapshot);
    house.assert_consistent("a");
}

#[test]
fn files_of_other_programs_below_hub_stay() {
    let (house, commit) = House::with_model();
    house.write("elsewhere/keep", "keep");
    house.write("a/hub/models--org--model/snapshots/0000/own.txt", "own");
    house.write(&format!("a/hub/models--org--model/snapshots/{commit}/extra.txt"), "extra");
    house.write("a/hub/models--org--mine/refs/main", "mine");
    get(&house, &["hf://org/model"]);
    house.on_local("a").run(["evict", "hf://org/model", "--tier", "disk"]).ok();
    house.on_local("a").run(["prune"]).ok();
    let paths = files_below(&house.path("a/hub"));
    let kept = [
        "models--org--mine/refs/main".into(),
        "models--org--model/snapshots/0000/own.txt".into(),
        format!("models--org--model/snapshots/{commit}/extra.txt"),
    ];
    assert_eq!(paths, kept.map(PathBuf::from));

    // Nothing is linked or removed through a symbolic link.
    fs::remove_dir_all(house.path("a/hub")).unwrap();
    symlink(house.path("elsewhere"), house.path("a/hub")).unwrap();
    house.on_local("a").run(["get", "--layout", "hub", "hf://org/model"]).failed(8, &["hub"]);
    assert_eq!(files_below(&house.path("elsewhere")), [PathBuf::from("keep")]);
    house.on_local("a").run(["get", "hf://org/model"]).path();
}

#[test]
fn a_read_only_directory_serves_the_links_that_it_has() {
    if !can_mount() {
        return;
    }
    let (house, commit) = House::with_model();
    house.hub.repo("org/other").commit().file("x", "x").publish().unwrap();
    let snapshot = get(&house, &["hf://org/model"]);
    house.on_local("a").run(["get", "hf://org/other"]).path();
    let dir = house.path("a").display().to_string();
    let frozen = format!("mount --bind '{dir}' '{dir}'; mount -o remount,bind,ro '{dir}'");
    let on = || house.on_local("a").env("MODEL_CACHE_LAYOUT", "hub");
    assert_eq!(on().run_after(&frozen, &["get", "hf://org/model"]).path(), snapshot);
    assert_eq!(on().run_after(&frozen, &["get", &format!("hf://org/model@{commit}")]).path(), snapshot);
    on().run_after(&frozen, &["get", "hf://org/other"]).failed(8, &["cannot be written"]);
    // `exec` still runs the command, which has the path.
    let exec = ["exec", "hf://org/other", "--", "sh", "-c", "cat $0/x; echo $HF_HUB_CACHE", "{}"];
    let outcome = house.on_local("a").run_after(&frozen, &exec).ok();
    assert_eq!(outcome.stdout, "x\n");
    outcome.said(&["only by its path"]);
}

#[test]
fn a_folder_that_cannot_have_hard_links_is_named() {
    if !can_mount() {
        return;
    }
    let (house, _) = House::with_model();
    house.on_local("a").run(["get", "hf://org/model"]).path();
    fs::create_dir_all(house.path("a/hub")).unwrap();
    let hub = house.path("a/hub").display().to_string();
    // The kernel refuses hard links between mounts, even of one filesystem.
    let mounted = format!("mount --bind '{hub}' '{hub}'");
    let refused = house.on_local("a").run_after(&mounted, &["get", "--layout", "hub", "hf://org/model"]);
    refused.failed(8, &["hard links", "MODEL_CACHE_LAYOUT=hub"]);
    house.on_local("a").run_after(&mounted, &["get", "hf://org/model"]).path();
}

#[test]
fn exec_sets_the_variables_of_the_hub_and_of_vllm() {
    let (house, commit) = House::with_model();
    house.hub.repo("datasets/org/data").commit().file("x", "x").publish().unwrap();
    let script = "echo $HF_HUB_CACHE $HF_HUB_OFFLINE; cat $VLLM_MODEL_REDIRECT_PATH; echo; cat $0/config.json";
    let args = ["exec", "hf://org/model", "hf://datasets/org/data", "--", "sh", "-ec", script, "{}"];
    let lines = house.on_local("a").run(args).ok().stdout;
    let lines: Vec<_> = lines.lines().collect();
    let hub = house.path("a/hub");
    assert_eq!(lines[0], format!("{} 1", hub.display()));
    let snapshot = hub.join("models--org--model/snapshots").join(&commit);
    assert_eq!(serde_json::from_str::<Value>(lines[1]).unwrap(), json!({ "org/model": snapshot }));
    assert_eq!(lines[2], "{\"a\": 1}");

    let print = "echo [$HF_HUB_CACHE$HF_HUB_OFFLINE$VLLM_MODEL_REDIRECT_PATH]";
    let bare = house.on_local("a").run(["exec", "--no-env", "hf://org/model", "--", "sh", "-c", print]).ok();
    assert_eq!(bare.stdout, "[]\n");
    house.write("w.bin", "weights");
    house.on_local("a").run(["put", "m@1", "w.bin"]).ok();
    assert_eq!(house.on_local("a").run(["exec", "m@1", "--", "sh", "-c", print]).ok().stdout, "[]\n");

    // The map goes with the artifact.
    for reference in ["hf://org/model", "hf://datasets/org/data"] {
        house.on_local("a").run(["evict", reference, "--tier", "disk"]).ok();
    }
    assert_eq!(entries(&hub), Vec::<PathBuf>::new());
}
