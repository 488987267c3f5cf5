//! The pages under `docs/`: every command that they show is run.
//!
//! One shell runs the `sh` blocks of a page in order and stops at the first failure. It has an empty folder, a cache
//! directory, a remote and a Hub stand-in of its own. Commands that need other servers are in `text` blocks. `console`
//! blocks show commands with their output. The tests in `docs/tests` run those of the tutorials, and the others offline.

use crate::common::{BIN, BUCKET, House};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Returns the `sh` blocks of a page, in order.
fn commands(page: &str) -> Vec<String> {
    let blocks = page.split("\n```sh\n").skip(1);
    blocks.map(|block| block.split("\n```").next().unwrap().to_owned()).collect()
}

/// Runs the commands of `page`. Returns false if it has none.
#[track_caller]
fn run(page: &Path) -> bool {
    let commands = commands(&fs::read_to_string(page).unwrap());
    if commands.is_empty() {
        return false;
    }
    let (house, _) = House::with_model();
    let work = house.path("page");
    fs::create_dir(&work).unwrap();
    let script = format!("set -ex\n{}\n", commands.join("\n"));
    let path = format!("{}:/usr/bin:/bin", Path::new(BIN).parent().unwrap().display());
    let output = Command::new("/bin/sh")
        .args(["-c", &script])
        .current_dir(&work)
        .env_clear()
        .envs(house.s3.env())
        .env("PATH", path)
        .env("HOME", house.path("home"))
        .env("MODEL_CACHE_DIR", house.path("cache"))
        .env("MODEL_CACHE_REMOTE", format!("file://{}", house.path("remote").display()))
        .env("MODEL_CACHE_MIN_FREE_BYTES", "0")
        .env("HF_ENDPOINT", house.hub.url())
        .env("BUCKET", BUCKET)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {}\n{stderr}", page.display(), output.status);
    true
}

#[test]
fn every_command_of_every_page_works() {
    let mut pages: Vec<PathBuf> = fs::read_dir(docs()).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.sort();
    let with_commands: Vec<_> = pages.iter().filter(|page| run(page)).collect();
    assert!(!with_commands.is_empty(), "no page shows a command");
}

#[test]
fn links_between_pages_lead_somewhere() {
    for entry in fs::read_dir(docs()).unwrap() {
        let page = entry.unwrap().path();
        let Some(text) = page.extension().filter(|e| *e == "md").map(|_| fs::read_to_string(&page).unwrap()) else {
            continue;
        };
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(docs().join(target).exists(), "{} links to {link}", page.display());
        }
    }
}
