//! The machine: read-only directories, disks without room, other formats, and little memory.
//!
//! Tests that need a mount run a shell script in a mount namespace. Where this is not possible they are skipped, with a
//! message.

use crate::common::*;
use modelcache_testkit::Content;
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// An environment in which the directory `a` holds all of `org/model`. Returns the commit, too.
fn filled() -> (House, String) {
    let (house, commit) = House::with_model();
    house.hub.repo("org/other").commit().file("x", "x").publish().unwrap();
    house.on("a").run(["get", "hf://org/model"]).path();
    (house, commit)
}

#[test]
fn a_read_only_mount_serves_hits_and_a_miss_names_the_remedy() {
    if !can_mount() {
        return;
    }
    let (house, commit) = filled();
    let dir = house.path("a").display().to_string();
    let frozen = format!("mount --bind '{dir}' '{dir}'; mount -o remount,bind,ro '{dir}'");
    let reference = format!("hf://org/model@{commit}");
    for args in [&["get", "hf://org/model"][..], &["get", &reference], &["get", &reference, "--include", "*.json"]] {
        house.on("a").run_after(&frozen, args).path_saying(&["on disk"]);
    }
    assert_model(&house.path("a/artifacts/hf%2Forg%2Fmodel").join(commit).join("files"));
    let ls = house.on("a").run_after(&frozen, &["ls", "--json"]).object();
    assert_eq!((&ls["held_files"], &ls["files"]), (&json!(4), &json!(4)));
    house.on("a").run_after(&frozen, &["inspect", &reference]).ok();
    house.on("a").run_after(&frozen, &["stats"]).ok();

    house.write("w.bin", "weights");
    let message_parts = ["disk", "cannot be written", "mount it writable", "MODEL_CACHE_DIR"];
    for args in [&["get", "hf://org/other"][..], &["put", "m@1", "w.bin"], &["evict", &reference, "--yes"]] {
        house.on("a").run_after(&frozen, args).failed(8, &message_parts);
    }
    assert_eq!(house.listed("a"), std::slice::from_ref(&reference));
    assert!(!house.published_keys().iter().any(|key| key.contains("other") || key.contains("w.bin")));

    house.on("a").run(["get", "hf://org/other"]).path();
    let nowhere = "mount -t tmpfs -o ro none home";
    fs::create_dir_all(house.path("home")).unwrap();
    let fresh = house.on("a").without("MODEL_CACHE_DIR").run_after(nowhere, &["get", "hf://org/model"]);
    fresh.failed(8, &["home/.cache/modelcache", "read-only", "MODEL_CACHE_DIR"]);
}

#[test]
fn a_directory_without_write_permission_serves_hits_and_a_miss_names_the_remedy() {
    let (house, commit) = filled();
    fs::set_permissions(house.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let reference = format!("hf://org/model@{commit}");
    set_mode_of_folders(&house.path("a"), 0o555);
    let path = house.on("a").unprivileged().run(["get", &reference]).path_saying(&["on disk"]);
    assert_model(&path);
    assert_model(&house.on("a").unprivileged().run(["get", "hf://org/model"]).path());
    assert_eq!(house.on("a").unprivileged().run(["ls", "--json"]).objects().len(), 1);
    house.write("w.bin", "weights");
    let message_parts = ["disk", "cannot be written", "MODEL_CACHE_DIR"];
    for args in [&["get", "hf://org/other"][..], &["put", "m@1", "w.bin"], &["evict", &reference, "--yes"]] {
        house.on("a").unprivileged().run(args).failed(8, &message_parts);
    }
    set_mode_of_folders(&house.path("a"), 0o755);
    house.on("a").run(["get", "hf://org/other"]).path();

    fs::create_dir(house.path("locked")).unwrap();
    fs::set_permissions(house.path("locked"), fs::Permissions::from_mode(0o555)).unwrap();
    let outcome = house.on("locked/cache").unprivileged().run(["get", "hf://org/model"]);
    outcome.failed(8, &["locked/cache", "ermission denied", "write access", "MODEL_CACHE_DIR"]);
}

#[test]
fn a_file_cannot_be_a_cache_directory() {
    let (house, _) = House::with_model();
    house.write("file", "mine");
    for dir in ["file", "file/below"] {
        house.on(dir).run(["get", "hf://org/model"]).failed(8, &[dir, "MODEL_CACHE_DIR"]);
    }
    assert_same(&house.path("file"), &"mine".into());
}

fn set_mode_of_folders(folder: &Path, mode: u32) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            set_mode_of_folders(&path, mode);
        }
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
}

/// Runs a get in a tmpfs that is too small, checks that nothing is left, and repeats the get after enlarging the tmpfs.
fn get_without_room(house: &House, too_small: &str, large: &str) -> Outcome {
    for (path, content) in model() {
        house.write(&format!("mine/{path}"), content);
    }
    let script = format!(
        "mkdir -p \"$MODEL_CACHE_DIR\"; mount -t tmpfs -o {too_small} none \"$MODEL_CACHE_DIR\"; cd \"$MODEL_CACHE_DIR\"
         {BIN} get hf://org/small >&2
         set +e; {BIN} get hf://org/model; code=$?; set -e
         test -z \"$(ls -A staging)\" || {{ echo LEFT OVER; ls -AlR staging; }} >&2
         test \"$({BIN} ls --json | wc -l)\" = 1 || {{ echo VISIBLE; {BIN} ls; }} >&2
         mount -o remount,{large} \"$MODEL_CACHE_DIR\"
         diff -r \"$({BIN} get hf://org/model)\" \"$1\" >&2
         exit $code"
    );
    let outcome = house.on_local("tmpfs").script(&script, &[house.path("mine").to_str().unwrap()]);
    for bad in ["LEFT OVER", "VISIBLE", "diff"] {
        assert!(!outcome.stderr.contains(bad), "{outcome}");
    }
    outcome
}

#[test]
fn a_full_disk_ends_in_6_frees_the_staged_files_and_works_with_more_room() {
    if !can_mount() {
        return;
    }
    let (house, _) = House::with_model();
    house.hub.repo("org/small").commit().file("x", "x").publish().unwrap();
    let message_parts = ["hf://org/model@", "disk", "no room for 9.5 MB", "free", "larger one"];
    get_without_room(&house, "size=8m", "size=64m").failed(6, &message_parts);
    assert!(house.hub.body_bytes() < model_bytes() + 100, "nothing is downloaded that does not fit");
}

#[test]
fn a_disk_without_inodes_ends_in_6_frees_the_staged_files_and_works_with_more_inodes() {
    if !can_mount() {
        return;
    }
    let (house, _) = House::with_model();
    house.hub.repo("org/small").commit().file("x", "x").publish().unwrap();
    let message_parts =
        ["hf://org/model@", "disk", "No space left on device", "free space or inodes", "MODEL_CACHE_DIR"];
    get_without_room(&house, "size=64m,nr_inodes=32", "size=64m,nr_inodes=1000").failed(6, &message_parts);
}

#[test]
fn a_put_without_room_ends_in_6_and_frees_the_staged_files() {
    if !can_mount() {
        return;
    }
    let (house, _) = House::with_model();
    let script = format!(
        "mkdir -p \"$MODEL_CACHE_DIR\"; mount -t tmpfs -o size=12m none \"$MODEL_CACHE_DIR\"; cd \"$MODEL_CACHE_DIR\"
         mkdir mine; echo x > mine/x; truncate -s 20m mine/big
         set +e; {BIN} put m@1 mine; code=$?; set -e
         test -z \"$(ls -A staging)\" || {{ echo LEFT OVER; ls -AlR staging; }} >&2
         rm mine/big
         {BIN} put m@1 mine >&2
         exit $code"
    );
    let outcome = house.on_local("tmpfs").script(&script, &[]).failed(6, &["m@1", "disk", "no room for", "free"]);
    assert!(!outcome.stderr.contains("LEFT OVER"), "{outcome}");
}

#[test]
fn a_directory_with_a_newer_or_unknown_format_is_refused_and_left_alone() {
    let (house, _) = House::with_model();
    for (text, message_parts) in [
        ("modelcache 2\n", &["has format 2", "this release knows 1", "update modelcache", "nothing was touched"][..]),
        ("something else\n", &["is not a cache directory", "FORMAT", "MODEL_CACHE_DIR"]),
        ("\u{0}\u{1}binary", &["is not a cache directory", "FORMAT", "MODEL_CACHE_DIR"]),
    ] {
        house.write("theirs/FORMAT", text);
        for args in [&["get", "hf://org/model"][..], &["put", "m@1", "theirs"], &["ls"], &["stats"], &["evict", "m@1"]]
        {
            house.on("theirs").run(args).failed(8, &[message_parts, &["theirs"]].concat());
        }
        assert_eq!(entries_of(&house.path("theirs")), ["FORMAT"], "nothing was created there");
        assert_same(&house.path("theirs/FORMAT"), &text.into());
    }
    fs::remove_file(house.path("theirs/FORMAT")).unwrap();
    assert_model(&house.on("theirs").run(["get", "hf://org/model"]).path());
    assert_eq!(fs::read_to_string(house.path("theirs/FORMAT")).unwrap(), "modelcache 1\n");
}

fn entries_of(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_artifact_larger_than_the_budget_is_refused_before_any_download() {
    let (house, _) = House::with_model();
    house.hub.repo("org/small").commit().file("x", "x").publish().unwrap();
    for (path, content) in model() {
        house.write(&format!("mine/{path}"), content);
    }
    let tight = || house.on_local("a").env("MODEL_CACHE_MAX_BYTES", "5MB");
    tight().run(["get", "hf://org/small"]).path();
    house.hub.clear_requests();
    let message_parts = ["disk", "needs 9.5 MB", "5.0 MB", "MODEL_CACHE_MAX_BYTES"];
    tight().run(["get", "hf://org/model"]).failed(6, &[&message_parts[..], &["hf://org/model@"]].concat());
    tight().run(["put", "m@1", "mine"]).failed(6, &[&message_parts[..], &["m@1"]].concat());
    assert_eq!(house.hub.body_bytes(), 0, "nothing was downloaded");
    assert_eq!(house.listed("a").len(), 1, "nothing was evicted");

    let held = || house.on_local("a").env("MODEL_CACHE_MIN_FREE_BYTES", "100%");
    held().run(["get", "hf://org/model"]).failed(6, &["disk", "no room", "free", "MODEL_CACHE_MIN_FREE_BYTES"]);
    assert_model(&house.on_local("a").run(["get", "hf://org/model"]).path());
    assert_eq!(house.listed("a").len(), 2);
}

#[test]
fn a_large_file_is_downloaded_with_little_memory() {
    const SIZE: u64 = 512 * MIB;
    const SHA256_OF_ZEROS: &str = "9acca8e8c22201155389f65abbf6bc9723edc7384ead80503839f49dcc56d767";
    /// For downloads on a small machine, for uploads, and for the program itself.
    const PEAK_MAX: u64 = (128 + 48 + 20) * MIB;
    if !can_mount() {
        return;
    }
    let house = House::new();
    // Downloads use more memory if more is free.
    let small = "printf 'MemAvailable: 1048576 kB\n' > meminfo; mount --bind meminfo /proc/meminfo";
    let commit = house.hub.repo("org/large").commit().lfs("model.safetensors", Content::zeros(SIZE));
    commit.claim_sha256(SHA256_OF_ZEROS).publish().unwrap();
    let measure = |dir: &str| {
        let run = house.on(dir).env("MODEL_CACHE_MAX_BYTES", "4GB").env("MODEL_CACHE_READ_TIMEOUT", "30s");
        let (outcome, peak) = run.start_after(small, &["get", "hf://org/large", "--json"]).wait_with_peak_memory();
        let object = outcome.object();
        let path = PathBuf::from(text(&object["path"])).join("model.safetensors");
        assert_eq!(path.metadata().unwrap().len(), SIZE);
        fs::remove_dir_all(house.path(dir)).unwrap();
        assert!(peak > MIB, "it was measured");
        assert!(peak < PEAK_MAX, "{} MiB at most, with {object}", peak / MIB);
        object
    };
    // A slow request is sent a second time.
    let whole = SIZE..SIZE + SIZE / 8;
    assert!(whole.contains(&measure("a")["bytes"]["origin"].as_u64().unwrap()));
    assert!(whole.contains(&measure("b")["bytes"]["remote"].as_u64().unwrap()));
}

#[test]
fn few_open_files_are_enough_for_many_files() {
    if !can_mount() {
        return;
    }
    let house = House::new();
    fs::create_dir(house.path("many")).unwrap();
    let content = |at: u64| Content::generated(at, 1000 + at);
    for at in 0..300 {
        house.write(&format!("many/{at}.bin"), content(at));
    }
    house.write("many/large.bin", Content::generated(1000, 40 << 20));
    house.on("publisher").run(["put", "m@1", "many"]).ok();
    let folder = house.on("a").run_after("ulimit -n 64", &["get", "m@1"]).path();
    (0..300).for_each(|at| assert_same(&folder.join(format!("{at}.bin")), &content(at)));
    assert_same(&folder.join("large.bin"), &Content::generated(1000, 40 << 20));
}
