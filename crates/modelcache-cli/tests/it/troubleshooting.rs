//! docs/troubleshooting.md: each message occurs in the source code, and each command runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const BIN: &str = env!("CARGO_BIN_EXE_modelcache");

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn page() -> String {
    fs::read_to_string(repository().join("docs/troubleshooting.md")).unwrap()
}

/// Returns the text of all source files, with continued string literals joined.
fn sources() -> String {
    let (mut folders, mut text) = (vec![repository().join("crates")], String::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "tests" && name != "target" {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }
    // Joins string literals that continue on the next line.
    let mut whole = String::with_capacity(text.len());
    for piece in text.split("\\\n") {
        whole.push_str(if whole.is_empty() { piece } else { piece.trim_start() });
    }
    whole.replace("\\\"", "\"")
}

/// Returns the texts between backticks in headings of the third level.
fn messages(page: &str) -> Vec<String> {
    let headings = page.lines().filter_map(|line| line.strip_prefix("### "));
    headings.flat_map(|heading| heading.split('`').skip(1).step_by(2).map(str::to_owned)).collect()
}

#[test]
fn every_message_on_the_page_occurs_in_the_code() {
    let (sources, page) = (sources(), page());
    let messages = messages(&page);
    assert!(messages.len() > 40, "{messages:?}");
    // Messages of the operating system.
    let foreign = ["No space left on device"];
    for message in messages.iter().filter(|message| !foreign.contains(&message.as_str())) {
        let pieces: Vec<&str> = message.split('…').map(str::trim).filter(|piece| piece.len() > 2).collect();
        assert!(!pieces.is_empty(), "{message:?} has no text");
        for piece in pieces {
            assert!(sources.contains(piece), "no source contains {piece:?} (of {message:?})");
        }
    }
}

#[test]
fn every_heading_is_a_message_and_has_a_remedy() {
    for section in page().split("\n### ").skip(1) {
        let (heading, body) = section.split_once('\n').unwrap();
        assert!(heading.starts_with('`'), "{heading:?} is not a message");
        assert!(body.trim().len() > 40, "{heading:?} has no text");
    }
}

#[test]
fn the_commands_on_the_page_run_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let work = folder.path().join("work");
    fs::create_dir(&work).unwrap();
    let page = page();
    let blocks = page.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let bin = Path::new(BIN).parent().unwrap().display();
    for block in blocks {
        let output = Command::new("sh")
            .args(["-euc", block])
            .current_dir(&work)
            .env_clear()
            .env("PATH", format!("{bin}:/usr/bin:/bin"))
            .env("HOME", folder.path().join("home"))
            .env("MODEL_CACHE_DIR", folder.path().join("cache"))
            .env("MODEL_CACHE_MIN_FREE_BYTES", "0")
            .env("MODEL_CACHE_REMOTE", format!("file://{}", folder.path().join("remote").display()))
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .output()
            .unwrap();
        assert!(output.status.success(), "{block}\n{output:?}");
    }
}
