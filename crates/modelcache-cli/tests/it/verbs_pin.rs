//! `pin` and `unpin`.

use crate::common::*;
use modelcache_testkit::Content;
use serde_json::json;
use std::fs;
use std::path::PathBuf;

/// A budget with room for `org/model`, and for no other artifact of that size beside it.
const TIGHT: &str = "12MB";

/// An environment with `org/model` on disk. `org/other` fits only if `org/model` is evicted. Returns the path of
/// `org/model`, too.
fn house() -> (House, PathBuf) {
    let (house, _) = House::with_model();
    house.hub.repo("org/other").commit().file("x", Content::generated(2, 9 * MIB)).publish().unwrap();
    let path = tight(&house).run(["get", "hf://org/model"]).path();
    (house, path)
}

fn tight(house: &House) -> Run {
    house.on_local("a").env("MODEL_CACHE_MAX_BYTES", TIGHT).env("USER", "ops")
}

#[test]
fn a_pinned_artifact_stays_and_the_refusal_names_end_user_and_reason() {
    let (house, path) = house();
    let pin = ["pin", "hf://org/model", "--for", "7d", "--reason", "release 4"];
    tight(&house).run(pin).ok().said(&["pinned until ", " by ops@", ": release 4"]);
    let message_parts = ["is pinned until 2", " by ops@", ": release 4"];
    tight(&house).run(["get", "hf://org/other"]).failed(6, &message_parts);
    tight(&house)
        .run(["evict", "--tier", "disk", "hf://org/model"])
        .failed(1, &message_parts)
        .said(&["modelcache unpin"]);
    assert_model(&path);

    let row = tight(&house).run(["ls", "--json"]).object();
    assert_eq!(row["pin"]["reason"], "release 4");
    assert!(tight(&house).run(["ls"]).ok().stdout.contains(", pinned"));
    assert!(tight(&house).run(["inspect", "hf://org/model"]).ok().stdout.contains("pinned until 2"));
    assert_eq!(tight(&house).run(["stats", "--json"]).object()["pins"], 1);

    tight(&house).run(["unpin", "hf://org/model"]).ok().said(&["unpinned; it was pinned until"]);
    tight(&house).run(["unpin", "hf://org/model"]).ok().said(&["was not pinned"]);
    tight(&house).run(["get", "hf://org/other"]).path();
    assert!(!path.exists());
}

#[test]
fn a_pin_without_end_holds_and_one_that_has_ended_does_not() {
    let (house, path) = house();
    let pinned = tight(&house).run(["pin", "hf://org/model", "--json"]).object();
    assert_eq!((&pinned["pin"]["until"], &pinned["pin"]["reason"]), (&json!(null), &json!(null)));
    tight(&house).run(["get", "hf://org/other"]).failed(6, &["is pinned by ops@"]);

    let far = ["pin", "hf://org/model", "--for", "3000000d"];
    tight(&house).run(far).ok();
    assert!(tight(&house).run(["inspect", "hf://org/model"]).ok().stdout.contains("pinned"), "end beyond all dates");
    tight(&house).run(["pin", "hf://org/model", "--for", "0s"]).ok();
    assert_eq!(tight(&house).run(["ls", "--json"]).object()["pin"], json!(null));
    tight(&house).run(["get", "hf://org/other"]).path();
    assert!(!path.exists(), "a pin that has ended protects nothing");
}

#[test]
fn a_pin_that_cannot_be_read_protects() {
    let (house, path) = house();
    fs::write(path.parent().unwrap().join("pin"), "{").unwrap();
    tight(&house).run(["get", "hf://org/other"]).failed(6, &["hf://org/model@", "is pinned"]);
    tight(&house).run(["unpin", "hf://org/model"]).ok();
    tight(&house).run(["get", "hf://org/other"]).path();
}

#[test]
fn only_an_artifact_on_disk_can_be_pinned() {
    let (house, _) = house();
    for verb in ["pin", "unpin"] {
        tight(&house).run([verb, "team/model@1"]).failed(3, &["not on this disk", "modelcache get 'team/model@1'"]);
    }
    tight(&house).run(["evict", "--tier", "disk", "hf://org/model"]).ok();
    tight(&house).run(["pin", "hf://org/model"]).failed(3, &["not on this disk"]);
}
