//! A lower directory: a cache directory that is part of an image and only read.

use crate::common::*;
use serde_json::json;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

const REF: &str = "hf://org/model@main";

/// An environment in which the folder `image` is a copy, with other inodes, of a directory filled by `get REF args…`.
fn baked(args: &[&str]) -> House {
    let (house, _) = House::with_model();
    house.on_local("built").run([&["get", REF], args].concat()).ok();
    let [from, to] = ["built", "image"].map(|name| house.path(name));
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
    house.hub.clear_requests();
    house
}

fn over(house: &House, dir: &str) -> Run {
    house.on_local(dir).env("MODEL_CACHE_LOWER_DIR", house.path("image"))
}

/// Returns every file below `folder` with its inode, number of links, and time of change.
fn listing(folder: &Path) -> Vec<(PathBuf, u64, u64, i64, i64)> {
    let row = |file: PathBuf| {
        let metadata = fs::symlink_metadata(folder.join(&file)).unwrap();
        (file, metadata.ino(), metadata.nlink(), metadata.ctime(), metadata.ctime_nsec())
    };
    files_below(folder).into_iter().map(row).collect()
}

#[test]
fn a_complete_artifact_is_served_from_the_image_and_hashed_once() {
    let house = baked(&[]);
    let before = listing(&house.path("image"));
    house.hub.down(true);
    let path = over(&house, "a").run(["get", REF]).path_saying(&["on disk"]);
    assert!(path.starts_with(house.path("image")), "{path:?}");
    assert_model(&path);
    assert_eq!(files_below(&house.path("a/artifacts")), Vec::<PathBuf>::new(), "nothing is copied");
    let records: Vec<PathBuf> = files_below(&house.path("a/lower"));
    assert_eq!(records.len(), 4, "the digests are recorded");
    over(&house, "a").run(["get", REF]).path_saying(&["on disk"]);
    assert_eq!(listing(&house.path("image")), before, "the image is only read");

    // The recorded digest decides. If the file were hashed again, this change of the record would have no effect.
    fs::write(house.path("a/lower").join(&records[0]), "0".repeat(64)).unwrap();
    let got = over(&house, "a").run(["get", REF]);
    assert_eq!(got.stderr.matches("the lower directory's copy is damaged").count(), 1, "reported once: {got}");
    let copied = got.path();
    assert!(copied.starts_with(house.path("a")), "{copied:?}");
    assert_model(&copied);
}

#[test]
fn a_partial_artifact_of_the_image_is_copied_and_only_the_rest_is_fetched() {
    let house = baked(&["--include", "*.safetensors"]);
    let before = listing(&house.path("image"));
    let got = over(&house, "a").run(["get", REF, "--json"]).object();
    let path = PathBuf::from(text(&got["path"]));
    assert!(path.starts_with(house.path("a")), "{path:?}");
    assert_model(&path);
    let rest = model_bytes() - big().len();
    assert_eq!((house.hub.body_bytes(), &got["bytes"]["origin"]), (rest, &json!(rest)));
    assert_eq!(got["bytes"]["disk"], json!(big().len()));
    assert_eq!(listing(&house.path("image")), before, "the image is only read");
    let plan = over(&house, "b").run(["get", REF, "--dry-run", "--json"]).object();
    assert_eq!(plan["bytes"], json!({"disk": big().len(), "remote": 0, "origin": rest}));
}

#[test]
fn a_damaged_file_of_the_image_is_neither_served_nor_copied() {
    for args in [&[][..], &["--include", "*.safetensors"]] {
        let house = baked(args);
        let image = house.path("image/artifacts");
        let view = files_below(&image).into_iter().find(|path| path.ends_with("model.safetensors")).unwrap();
        let file = fs::OpenOptions::new().write(true).open(image.join(view)).unwrap();
        file.write_all_at(b"damage", 5_000_000).unwrap();
        let path = over(&house, "a").run(["get", REF]).path();
        assert!(path.starts_with(house.path("a")), "{path:?}");
        assert_model(&path);
    }
}

#[test]
fn stats_and_inspect_show_the_lower_directory() {
    let house = baked(&[]);
    let stats = over(&house, "a").run(["stats", "--json"]).object();
    assert_eq!((&stats["lower_dir"], &stats["lower_artifacts"]), (&json!(house.path("image")), &json!(1)));
    assert_eq!((&stats["artifacts"], &stats["used_bytes"]), (&json!(0), &json!(0)), "it is not counted");
    house.hub.down(true);
    let inspection = over(&house, "a").run(["inspect", REF, "--json"]).object();
    assert_eq!((&inspection["known_on_disk"], &inspection["known_in_lower"]), (&json!(false), &json!(true)));
    assert!(inspection["files"].as_array().unwrap().iter().all(|file| file["in_lower"] == json!(true)));
    assert!(Path::new(&text(&inspection["path"])).starts_with(house.path("image")));
    assert_eq!(over(&house, "a").run(["evict", REF, "--tier", "disk"]).code, Some(3), "it cannot be evicted");
}

#[test]
fn an_invalid_lower_directory_is_left_out() {
    let (house, _) = House::with_model();
    let run = house.on_local("a").env("MODEL_CACHE_LOWER_DIR", house.path("nothing"));
    assert_model(&run.run(["get", REF]).path_saying(&["not a cache directory", "is ignored"]));
}

#[test]
fn an_image_serves_with_a_read_only_cache_directory() {
    if !can_mount() {
        return;
    }
    let house = baked(&[]);
    house.make_cache("a");
    let mount = format!("mount --bind {0} {0}; mount -o remount,ro,bind {0}", house.path("a").display());
    assert_model(&over(&house, "a").run_after(&mount, &["get", REF]).path_saying(&["on disk"]));
}
