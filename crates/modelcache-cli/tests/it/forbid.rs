//! `forbid`: files that are neither published nor downloaded nor returned, by name and by the format of their content.

use crate::common::*;
use modelcache_testkit::Content;
use std::path::PathBuf;
use std::process::Command;

const PICKLE: &[u8] = b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.";

fn strict(run: Run) -> Run {
    run.env("MODEL_CACHE_FORBID", "*.pkl,pickle")
}

#[test]
fn a_put_is_refused_before_anything_is_stored() {
    let house = House::new();
    house.write("m/config.json", "{}");
    house.write("m/weights.bin", PICKLE.to_vec());
    let folder = house.path("m");
    let put = ["put", "m@1", folder.to_str().unwrap()];
    strict(house.on("a")).run(put).failed(5, &["weights.bin is forbidden", "a Python pickle", "MODEL_CACHE_FORBID"]);
    assert!(house.published_keys().is_empty());
    house.assert_no_artifact_or_staging("a");
    house.write("n/model.pkl", "no pickle");
    let named = house.path("n");
    strict(house.on("a"))
        .run(["put", "n@1", named.to_str().unwrap()])
        .failed(5, &["its name matches a forbidden pattern"]);
    strict(house.on("a")).run(["put", "n@1", named.to_str().unwrap(), "--exclude", "*.pkl"]).failed(2, &["no files"]);
    strict(house.on("a")).run(["put", "m@1", folder.to_str().unwrap(), "--exclude", "*.bin"]).ok();
}

#[test]
fn a_get_is_refused_before_or_after_the_download_and_leaves_nothing() {
    let house = House::new();
    let commit =
        house.hub.repo("org/model").commit().file("config.json", "{}").lfs("old.pkl", Content::generated(1, MIB));
    commit.lfs("weights.bin", Content::from(PICKLE.to_vec())).publish().unwrap();
    let get = |args: &[&str]| strict(house.on("a")).run(["get", "hf://org/model"].iter().chain(args));
    // By name: nothing is requested.
    get(&[]).failed(5, &["old.pkl is forbidden"]);
    assert_eq!(house.hub.body_gets().len(), 0);
    // By content, which only the download shows.
    get(&["--exclude", "*.pkl"]).failed(5, &["weights.bin is forbidden", "pickle"]);
    house.assert_no_artifact_or_staging("a");
    assert!(house.published_keys().is_empty(), "nothing is uploaded");
    get(&["--include", "*.json"]).path();

    // What a less strict command downloaded is not returned either.
    house.on("a").run(["get", "hf://org/model"]).path();
    get(&["--exclude", "*.pkl"]).failed(5, &["weights.bin is forbidden"]);
    house.hub.clear_requests();
    // On another machine the manifest of the remote has the format.
    let other = strict(house.on("b")).run(["get", "hf://org/model", "--exclude", "*.pkl"]);
    other.failed(5, &["weights.bin is forbidden"]);
    assert_eq!(house.hub.body_gets().len(), 0);
}

#[test]
fn a_forbidden_file_in_an_archive_is_found() {
    let house = House::new();
    house.write("m/config.json", "{}");
    house.write("m/weights.bin", PICKLE.to_vec());
    let tar = ["-czf", "m.tar.gz", "-C", "m", "."];
    assert!(Command::new("tar").args(tar).current_dir(house.path("")).status().unwrap().success());
    strict(house.on_local("a")).run(["put", "m@1", house.path("m.tar.gz").to_str().unwrap()]).ok();
    strict(house.on_local("a")).run(["get", "--extract", "auto", "m@1"]).failed(5, &["weights.bin is forbidden"]);
    assert_eq!(house.listed("a"), ["m@1"]);
    assert_eq!(house.staging("a"), Vec::<PathBuf>::new());
    // Nor is what a less strict command extracted.
    house.on_local("a").run(["get", "--extract", "auto", "m@1"]).path();
    strict(house.on_local("a")).run(["get", "--extract", "auto", "m@1"]).failed(5, &["weights.bin is forbidden"]);
}
