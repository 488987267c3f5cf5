//! Revisions and tags: the version that a movable name resolves to, and the tier that resolves it, also when tiers do
//! not answer.

use crate::common::*;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::s3::S3Fault;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Longer than any timeout of these tests.
const FOR_EVER: Duration = Duration::from_secs(600);

/// The two kinds of remote.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Bucket,
    Folder,
}

impl Kind {
    const BOTH: [Self; 2] = [Self::Bucket, Self::Folder];

    /// Builds a run with the cache directory `dir` for which no cached ref is fresh.
    fn on(self, house: &House, dir: &str) -> Run {
        let run = match self {
            Self::Bucket => house.on(dir),
            Self::Folder => {
                house.on_local(dir).env("MODEL_CACHE_REMOTE", format!("file://{}", house.path("remote").display()))
            }
        };
        run.env("MODEL_CACHE_REF_TTL", "0s")
    }

    /// Returns the path of an object of the remote on disk.
    fn object(self, house: &House, key: &str) -> std::path::PathBuf {
        match self {
            Self::Bucket => house.s3.object_path(BUCKET, &format!("cache/{key}")),
            Self::Folder => house.path("remote").join(key),
        }
    }
}

fn on(house: &House, dir: &str) -> Run {
    Kind::Bucket.on(house, dir)
}

/// An environment with `m@1`, `m@2` and `m@3` on the remote: one file each, which contains its version.
fn house_of(kind: Kind) -> House {
    let house = House::new();
    for version in ["1", "2", "3"] {
        house.write(version, version);
        kind.on(&house, "publisher").run(["put", &format!("m@{version}"), version]).ok();
    }
    fs::remove_dir_all(house.path("publisher")).unwrap();
    house
}

#[track_caller]
fn content(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn write_ref(kind: Kind, house: &House, key: &str, text: &str) {
    let path = kind.object(house, key);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn a_tag_can_be_moved_and_moved_back() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let get = || content(&kind.on(&house, "a").run(["get", "m@prod"]).path());
        kind.on(&house, "ops").run(["tag", "m@1", "prod"]).ok().said(&["m@prod now points to version 1 (new tag)"]);
        assert_eq!(get(), "1");
        kind.on(&house, "ops").run(["tag", "m@2", "prod"]).ok().said(&["m@prod now points to version 2 (was 1)"]);
        assert_eq!(get(), "2");
        let moved = kind.on(&house, "ops").run(["tag", "m@1", "prod", "--json"]).object();
        assert_eq!((&moved["from"], &moved["to"], &moved["tag"]), (&"2".into(), &"1".into(), &"prod".into()));
        assert_eq!(get(), "1");
        kind.on(&house, "ops").run(["tag", "m@1", "prod"]).ok().said(&["already points to version 1"]);

        house.write("4", "4");
        let put = kind.on(&house, "ops").run(["put", "m@4", "4", "--tag", "prod"]);
        put.ok().said(&["m@prod now points to version 4 (was 1)"]);
        assert_eq!(get(), "4");
        kind.on(&house, "ops").run(["tag", "m@4", "stable"]).ok();
        let listed = kind.on(&house, "a").run(["ls", "--remote", "--json"]).objects();
        let tags: Vec<_> = listed.iter().map(|row| (text(&row["reference"]), row["tags"].to_string())).collect();
        let rows = [("m@1", "[]"), ("m@2", "[]"), ("m@3", "[]"), ("m@4", r#"["prod","stable"]"#)];
        assert_eq!(tags, rows.map(|(row, tags)| (row.to_owned(), tags.to_owned())), "{kind:?}");
        let table = kind.on(&house, "a").run(["ls", "--remote"]).ok().stdout;
        assert!(table.contains("TAGS") && table.contains("prod, stable"), "{table}");

        kind.on(&house, "ops").run(["tag", "--remove", "m@prod"]).ok().said(&["m@prod: tag removed (was 4)"]);
        kind.on(&house, "a").run(["get", "m@prod"]).failed(3, &["m@prod", "not found", "ls --remote"]);
        kind.on(&house, "a").run(["get", "m@prod", "--local-files-only"]).failed(3, &["m@prod"]);
        kind.on(&house, "ops").run(["tag", "--remove", "m@prod"]).failed(3, &["m has no tag prod"]);
    }
}

#[test]
fn a_fresh_answer_and_a_version_on_disk_cost_no_request() {
    let house = house_of(Kind::Bucket);
    on(&house, "ops").run(["tag", "m@1", "prod"]).ok();
    let fresh = || house.on("a").env("MODEL_CACHE_REF_TTL", "1h");
    fresh().run(["get", "m@prod"]).path();
    on(&house, "ops").run(["tag", "m@2", "prod"]).ok();
    house.s3.clear_requests();
    assert_eq!(content(&fresh().run(["get", "m@prod"]).path_saying(&["m@1: on disk"])), "1");
    on(&house, "a").run(["get", "m@1"]).path_saying(&["on disk"]);
    assert_eq!(house.s3.requests().len(), 0, "{:?}", house.s3.requests());
    let refreshed = fresh().run(["get", "m@prod", "--refresh"]);
    assert_eq!(content(&refreshed.path()), "2", "a refresh ignores the fresh ref");
}

#[test]
fn a_version_wins_over_a_tag_and_neither_takes_the_others_name() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let forged = r#"{"format":1,"revision":"1","version":"2","kind":"tag","resolved_at_unix":1}"#;
        write_ref(kind, &house, "m/.modelcache/refs/1", forged);
        assert_eq!(content(&kind.on(&house, "a").run(["get", "m@1"]).path()), "1");
        let run = || kind.on(&house, "ops");
        run().run(["tag", "m@1", "3"]).failed(2, &["3 is a version of m", "another name"]);
        run().run(["tag", "m@1", "1"]).failed(2, &["1 is a version of m"]);
        run().run(["tag", "m@9", "prod"]).failed(3, &["m@9", "does not have this version", "modelcache put"]);
        run().run(["tag", "m@1", "a/b"]).failed(2, &["cannot be a tag"]);
        run().run(["tag", "m@1", "prod"]).ok();
        run().run(["tag", "m@prod", "live"]).failed(2, &["prod is a tag itself, and means 1", "tag m@1 live"]);
        run().run(["put", "m@prod", "3"]).failed(2, &["prod is a tag of m, and means 1", "tag --remove m@prod"]);
        run().run(["evict", "m@prod", "--yes"]).failed(2, &["prod is a tag of m, and means 1"]);
        run().run(["put", "m@5", "3", "--tag", "5"]).failed(2, &["5 is a version"]);
        assert!(!kind.object(&house, "m/5/.modelcache/manifest.json").exists(), "refused before anything is published");
        house.on_local("b").run(["put", "m@1", "1"]).ok();
        house.on_local("b").run(["tag", "m@1", "prod"]).failed(2, &["stored on the remote", "MODEL_CACHE_REMOTE"]);
        kind.on(&house, "b").run(["put", "n@1", "1"]).ok();
        kind.on(&house, "b").run(["evict", "n@1", "--tier", "remote", "--yes"]).ok();
        let here_only = kind.on(&house, "b").run(["tag", "n@1", "prod"]);
        here_only.failed(3, &["does not have this version", "on this disk only"]);
    }
}

#[test]
fn evicting_a_tagged_version_names_the_tags_and_leaves_none_behind() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        for tag in ["prod", "stable"] {
            kind.on(&house, "ops").run(["tag", "m@1", tag]).ok();
        }
        kind.on(&house, "ops").run(["tag", "m@2", "next"]).ok();
        let run = || kind.on(&house, "a");
        assert_eq!(content(&run().run(["get", "m@prod"]).path()), "1");
        run().run(["evict", "m@1"]).failed(2, &["would delete", "the tags prod, stable", "--yes"]);
        let report = run().run(["evict", "m@1", "--dry-run", "--json"]).object();
        assert_eq!(report["tags"].to_string(), r#"["prod","stable"]"#);
        run().run(["evict", "m@1", "--tier", "disk"]).ok();
        assert_eq!(content(&run().run(["get", "m@stable"]).path()), "1", "eviction from disk keeps the tags");
        // An origin that has the artifact does not have its tags, so `--yes` is still needed.
        house.write("origin/m/1", "1");
        let origin = format!("file://{}/{{name}}/{{version}}", house.path("origin").display());
        let with_origin = || run().env("MODEL_CACHE_ORIGIN", &origin);
        with_origin().run(["evict", "m@1", "--tier", "remote"]).failed(2, &["the tags prod, stable"]);
        with_origin().run(["evict", "m@1", "--yes"]).ok().said(&["also removed the tags prod, stable"]);
        run().run(["get", "m@prod"]).failed(3, &["m@prod", "not found"]);
        assert_eq!(content(&run().run(["get", "m@next"]).path()), "2");
        for version in ["2", "3"] {
            run().run(["evict", &format!("m@{version}"), "--yes"]).ok();
        }
        if kind == Kind::Folder {
            assert_eq!(fs::read_dir(house.path("remote")).unwrap().count(), 0, "no empty folder is left");
        }
    }
}

#[test]
fn a_dangling_tag_is_reported_with_the_remedy() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        kind.on(&house, "ops").run(["tag", "m@3", "prod"]).ok();
        fs::remove_dir_all(kind.object(&house, "m/3")).unwrap();
        let message_parts = ["the tag prod points to m@3", "not on this disk, nor on the remote", "tag m@VERSION prod"];
        kind.on(&house, "a").run(["get", "m@prod"]).failed(3, &message_parts);
        kind.on(&house, "a").run(["resolve", "m@prod"]).failed(3, &message_parts);
    }
}

#[test]
fn a_tag_keeps_its_last_known_version_while_the_remote_does_not_answer() {
    let house = house_of(Kind::Bucket);
    on(&house, "ops").run(["tag", "m@1", "prod"]).ok();
    on(&house, "a").run(["get", "m@prod"]).path();
    on(&house, "ops").run(["tag", "m@2", "prod"]).ok();
    for fault in [S3Fault::slow_down(), S3Fault::hang_up(), S3Fault::delay(FOR_EVER)] {
        house.s3.faults().add(fault);
        let run = || on(&house, "a").env("MODEL_CACHE_READ_TIMEOUT", "30s");
        let got = run().run(["get", "m@prod"]);
        let message_parts = ["WARN", "m@prod", "no answer", "last meant", "version=1", "age_s=", "remote"];
        assert_eq!(content(&got.path_saying(&message_parts)), "1");
        let refuses = run().env("MODEL_CACHE_ON_REMOTE_DOWN", "fail").env("MODEL_CACHE_READ_TIMEOUT", "500ms");
        refuses.run(["get", "m@prod"]).failed(7, &["m@prod", "remote"]);
        let refresh = run().env("MODEL_CACHE_READ_TIMEOUT", "500ms").run(["get", "m@prod", "--refresh"]);
        refresh.failed(7, &["m@prod", "remote"]);
        on(&house, "a").run(["get", "m@1"]).path_saying(&["on disk"]);
        house.s3.faults().clear();
    }
    // A refusal is an answer: the cached ref is not used.
    house.s3.faults().add(S3Fault::expired_token());
    on(&house, "a").run(["get", "m@prod"]).failed(4, &["ExpiredToken"]);
    house.s3.faults().clear();
    assert_eq!(content(&on(&house, "a").run(["get", "m@prod"]).path()), "2");
}

#[test]
fn damaged_refs_are_ignored_and_refs_of_a_newer_format_are_refused() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let run = || kind.on(&house, "a");
        let large = "x".repeat(100_000);
        for damaged in ["", "{", r#"{"format":1}"#, &large] {
            write_ref(kind, &house, "m/.modelcache/refs/prod", damaged);
            run().run(["get", "m@prod"]).failed(3, &["WARN", "damaged", "prod", "not found"]);
        }
        // A ref that was copied to another name counts as damaged.
        run().run(["tag", "m@1", "live"]).ok();
        let live = kind.object(&house, "m/.modelcache/refs/live");
        fs::copy(&live, kind.object(&house, "m/.modelcache/refs/prod")).unwrap();
        run().run(["get", "m@prod"]).failed(3, &["WARN", "damaged"]);
        run().run(["ls", "--remote"]).ok().said(&["WARN", "skipping a ref"]);
        run().run(["tag", "m@2", "prod"]).ok().said(&["now points to version 2 (new tag)"]);
        assert_eq!(content(&run().run(["get", "m@prod"]).path()), "2");

        write_ref(kind, &house, "m/.modelcache/refs/prod", r#"{"format":2,"of":"tomorrow"}"#);
        run().run(["get", "m@prod"]).failed(2, &["format 2", "update modelcache"]);
        run().run(["tag", "m@1", "prod"]).failed(2, &["format 2", "update modelcache"]);
        run().run(["tag", "--remove", "m@prod"]).failed(2, &["format 2", "update modelcache"]);
        assert_eq!(content(&run().run(["get", "m@1"]).path()), "1", "exact versions are not affected");
    }
}

#[test]
fn refs_do_not_block_other_artifacts() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let run = || kind.on(&house, "ops");
        run().run(["put", "team/sub/m@1", "1"]).ok();
        run().run(["tag", "team/sub/m@1", "prod"]).ok();
        run().run(["put", "team@sub", "1"]).failed(1, &["other artifacts are published below"]);
        run().run(["evict", "team/sub/m@1", "--yes"]).ok();
        let left = r#"{"format":1,"revision":"x","version":"2","kind":"tag","resolved_at_unix":1}"#;
        write_ref(kind, &house, "team/sub/m/.modelcache/refs/x", left);
        run().run(["put", "team@sub", "1"]).ok();
        let listed = run().run(["ls", "--remote", "--json"]).objects();
        let listed: Vec<_> = listed.iter().map(|row| text(&row["reference"])).collect();
        assert_eq!(listed, ["m@1", "m@2", "m@3", "team@sub"]);
        // Tags may contain special characters and reserved names.
        for tag in ["manifest.json", "claim", "100%", ".hidden", "fé"] {
            run().run(["tag", "m@1", tag]).ok();
            assert_eq!(content(&kind.on(&house, "a").run(["get", &format!("m@{tag}")]).path()), "1", "{tag}");
        }
        assert_eq!(run().run(["ls", "--remote"]).ok().stdout.lines().count(), 6);
    }
}

#[test]
fn concurrent_moves_of_a_tag_leave_one_of_their_versions() {
    let house = house_of(Kind::Bucket);
    let moves: Vec<_> = (0..6).map(|n| on(&house, "ops").start(["tag", &format!("m@{}", n % 3 + 1), "prod"])).collect();
    for moved in moves {
        moved.wait().ok();
    }
    let got = content(&on(&house, "a").run(["get", "m@prod"]).path());
    assert!(["1", "2", "3"].contains(&got.as_str()), "{got}");

    // A store without conditional writes.
    house.s3.faults().add(S3Fault::ignore_conditions());
    on(&house, "ops").run(["tag", "m@1", "prod"]).ok();
    assert_eq!(content(&on(&house, "a").run(["get", "m@prod"]).path()), "1");
}

#[test]
fn one_machine_asks_the_hub_and_the_others_use_its_answer() {
    for kind in Kind::BOTH {
        let (house, first) = House::with_model();
        let fresh = |dir: &str| kind.on(&house, dir).env("MODEL_CACHE_REF_TTL", "1h");
        fresh("a").run(["get", "hf://org/model"]).path();
        let stored = fs::read_to_string(kind.object(&house, "hf/org/model/.modelcache/refs/main")).unwrap();
        assert!(stored.contains(&first) && stored.contains(r#""kind":"origin""#), "{stored}");
        house.hub.clear_requests();
        let resolved = fresh("b").run(["resolve", "hf://org/model", "--json"]).object();
        assert_eq!((text(&resolved["version"]), text(&resolved["from"])), (first.clone(), "remote".into()));
        assert_model(&fresh("b").run(["get", "hf://org/model"]).path_saying(&["from remote"]));
        assert_eq!(house.hub.requests().len(), 0, "{kind:?}: the Hub was asked");

        // An expired ref is resolved again at the Hub, and the other machines use the new answer.
        let second = house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
        assert_eq!(
            fresh("b").run(["resolve", "hf://org/model"]).ok().stdout.trim_end(),
            format!("hf://org/model@{first}")
        );
        let asked = kind.on(&house, "b").run(["resolve", "hf://org/model", "--json"]).object();
        assert_eq!((text(&asked["version"]), text(&asked["from"])), (second.clone(), "origin".into()));
        let shared = fresh("c").run(["resolve", "hf://org/model", "--json"]).object();
        assert_eq!((text(&shared["version"]), text(&shared["from"])), (second.clone(), "remote".into()));

        // A ref on the remote with a version that is not a commit is ignored, although its time is the latest.
        let forged = r#"{"format":1,"revision":"main","version":"main","kind":"origin","resolved_at_unix":9999999999}"#;
        write_ref(kind, &house, "hf/org/model/.modelcache/refs/main", forged);
        let asked = fresh("d").run(["resolve", "hf://org/model", "--json"]).object();
        assert_eq!((text(&asked["version"]), text(&asked["from"])), (second.clone(), "origin".into()));
        let stored = fs::read_to_string(kind.object(&house, "hf/org/model/.modelcache/refs/main")).unwrap();
        assert!(stored.contains(&second), "a time in the future does not protect a ref: {stored}");
    }
}

#[test]
fn a_remote_that_refuses_or_delays_refs_does_not_affect_a_resolve() {
    let (house, commit) = House::with_model();
    house.on("publisher").run(["get", "hf://org/model"]).path();
    house.s3.faults().add(S3Fault::access_denied().method("PUT"));
    let second = house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
    let got = on(&house, "a").run(["resolve", "hf://org/model"]).ok();
    assert_eq!(got.stdout, format!("hf://org/model@{second}\n"));
    assert!(!got.stderr.contains("WARN"), "{got}");
    let stored = house.s3.object(BUCKET, "cache/hf/org/model/.modelcache/refs/main").unwrap();
    assert!(String::from_utf8(stored).unwrap().contains(&commit));
    house.s3.faults().clear();
    house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT"));
    let run = on(&house, "b").env("MODEL_CACHE_READ_TIMEOUT", "300s");
    assert_eq!(run.run(["resolve", "hf://org/model"]).ok().stdout, format!("hf://org/model@{second}\n"));
}

#[test]
fn a_revision_keeps_its_last_known_commit_while_the_hub_does_not_answer() {
    let (house, commit) = House::with_model();
    let run = || house.on_local("a").env("MODEL_CACHE_REF_TTL", "0s").env("MODEL_CACHE_READ_TIMEOUT", "30s");
    // The last retry ends well before the three seconds after which the answer counts as missing.
    let run = || run().env("MODEL_CACHE_RETRY_DEADLINE", "1s");
    assert_model(&run().run(["get", "hf://org/model"]).path());
    house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
    for (fault, why) in [
        (HubFault::delay(FOR_EVER), "no answer within 3 s"),
        (HubFault::throttle(3600), "asks to wait 3600 s"),
        (HubFault::status(503), "503"),
        (HubFault::hang_up(), "broke"),
    ] {
        house.hub.faults().add(fault);
        let version = format!("version={commit}");
        let message_parts = ["WARN", "hf://org/model@main", "last meant", &version, "age_s=", why];
        let got = run().run(["get", "hf://org/model"]);
        assert_eq!(got.stderr.matches("WARN").count(), 1, "{got}");
        assert_model(&got.path_saying(&message_parts));
        run()
            .env("MODEL_CACHE_READ_TIMEOUT", "500ms")
            .run(["get", "hf://org/model", "--refresh"])
            .failed(7, &["origin"]);
        let cold = house.on_local("b").env("MODEL_CACHE_READ_TIMEOUT", "500ms");
        cold.run(["get", "hf://org/model"]).failed(7, &["origin"]);
        house.hub.faults().clear();
    }
    // "Not found" and "not permitted" are answers: the cached ref is not used.
    house.hub.repo("org/model").private(TOKEN);
    run().run(["get", "hf://org/model"]).failed(3, &["private", "HF_TOKEN"]);
}

#[test]
fn a_ref_on_the_remote_serves_a_new_machine_while_the_hub_is_down() {
    let (house, commit) = House::with_model();
    on(&house, "a").run(["get", "hf://org/model"]).path();
    house.hub.faults().add(HubFault::status(503));
    let version = format!("version={commit}");
    let got = on(&house, "b").run(["get", "hf://org/model"]);
    assert_model(&got.path_saying(&["WARN", "last meant", &version, "from remote"]));
}

#[test]
fn a_resolved_reference_keeps_its_meaning() {
    let (house, commit) = House::with_model();
    let run = || on(&house, "a");
    let resolved = run().run(["resolve", "hf://org/model"]).ok().said(&["sha256 not known yet", "answered by origin"]);
    assert_eq!(resolved.stdout, format!("hf://org/model@{commit}\n"));
    run().run(["resolve", "--digest", "hf://org/model"]).failed(3, &["digest", "modelcache get"]);
    assert_model(&run().run(["get", resolved.stdout.trim_end()]).path());
    let digest = run().run(["resolve", "--digest", "hf://org/model"]).ok().stdout;
    assert!(digest.starts_with(&format!("hf://org/model@{commit}#sha256=")), "{digest}");
    house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
    assert_model(&run().run(["get", digest.trim_end()]).path());

    let file = run().run(["resolve", "--revision", &commit, "--json", "hf://org/model@main"]).object();
    assert_eq!((&file["from"], &file["revision"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    let object = run().run(["resolve", &format!("hf://org/model@{commit}/model.safetensors"), "--json"]).object();
    assert_eq!(text(&object["sha256"]), big().sha256().unwrap(), "the digest of the file alone");
    assert_eq!(text(&object["pinned"]), format!("hf://org/model@{commit}/model.safetensors"));

    house.write("1", "one");
    run().run(["put", "m@1", "1", "--tag", "prod"]).ok();
    let tag = run().run(["resolve", "m@prod", "--json"]).object();
    let expected =
        [("pinned", "m@1"), ("key", "m@1"), ("revision", "prod"), ("from", "remote"), ("reference", "m@prod")];
    for (field, value) in expected {
        assert_eq!(tag[field], value, "{tag}");
    }
    assert_eq!(text(&tag["pinned_with_digest"]), format!("m@1#sha256={}", text(&tag["sha256"])));
    let path = on(&house, "b").run(["get", &text(&tag["pinned_with_digest"])]).path();
    assert_eq!(content(&path), "one");
    assert_eq!(on(&house, "c").run(["resolve", "m@1", "--json"]).object()["from"], "remote");
    assert_eq!(on(&house, "b").run(["resolve", "m@1", "--json"]).object()["from"], "disk");
    on(&house, "b").run(["resolve", "m@2"]).failed(3, &["m@2", "not found"]);
    house.assert_no_artifact("c");
}

#[test]
fn pin_and_inspect_follow_a_tag() {
    let house = house_of(Kind::Bucket);
    on(&house, "ops").run(["tag", "m@2", "prod"]).ok();
    assert_eq!(text(&on(&house, "a").run(["inspect", "m@prod", "--json"]).object()["version"]), "2");
    on(&house, "a").run(["get", "m@prod"]).path();
    on(&house, "a").run(["pin", "m@prod"]).ok().said(&["m@2"]);
    on(&house, "a").run(["unpin", "m@prod"]).ok().said(&["m@2"]);
}

/// Returns the digests of two texts.
fn digests(a: &str, b: &str) -> [String; 2] {
    [a, b].map(|text| modelcache_testkit::Content::from(text).sha256().unwrap())
}

#[test]
fn a_version_that_changed_after_it_was_tagged_is_reported_as_an_error() {
    let house = house_of(Kind::Bucket);
    let [old, new] = digests("1", "other");
    on(&house, "ops").run(["tag", "m@1", "prod"]).ok();
    assert_eq!(content(&on(&house, "old").run(["get", "m@prod"]).path()), "1");
    house.write("other", "other");
    on(&house, "ops").run(["put", "m@1", "other", "--force"]).ok();

    let alarm = ["ERROR", &old, &new, "m@1", "prod", "modelcache tag m@1 prod"];
    for _ in 0..2 {
        let got = on(&house, "a").run(["get", "m@prod"]);
        assert_eq!(got.stderr.matches("ERROR").count(), 1, "{got}");
        assert_eq!(content(&got.path_saying(&alarm)), "other", "the remote's content, cold and warm");
    }
    // A machine with the old content has the tagged content.
    let quiet = on(&house, "old").run(["get", "m@prod"]);
    assert!(!quiet.stderr.contains("ERROR"), "{quiet}");

    // After the tag is set again, the new content is the tagged one. A machine with the old content gets an error.
    on(&house, "ops").run(["tag", "m@1", "prod"]).ok();
    let quiet = on(&house, "a").run(["get", "m@prod"]);
    assert!(!quiet.stderr.contains("ERROR"), "{quiet}");
    let message_parts = ["ERROR", &old, &new, "this disk has", "evict m@1 --tier disk"];
    on(&house, "old").run(["get", "m@prod"]).failed(5, &message_parts);
    assert_eq!(content(&on(&house, "old").run(["get", "m@1"]).path()), "1", "a hit sends no request");
    on(&house, "old").run(["evict", "m@1", "--tier", "disk"]).ok();
    assert_eq!(content(&on(&house, "old").run(["get", "m@prod"]).path()), "other");
}

#[test]
fn a_commit_that_changed_at_the_hub_is_an_error_and_old_files_are_not_mixed_with_new_ones() {
    let (house, commit) = House::with_model();
    let reference = format!("hf://org/model@{commit}");
    let run = || house.on_local("a");
    run().run(["get", &reference, "--include", "*.safetensors"]).path();
    house.hub.repo("org/model").tamper(&commit, "model.safetensors", content_of(2)).unwrap();
    let [old, new] = [big(), content_of(2)].map(|content| content.sha256().unwrap()[..12].to_owned());
    let message_parts = ["ERROR", &old, &new, "contradict", "evict", "--tier disk", "verify", &reference];
    run().run(["get", &reference]).failed(5, &message_parts);
    run().run(["get", &reference, "--include", "*.safetensors"]).path_saying(&["on disk"]);
    run().run(["evict", &reference, "--tier", "disk"]).ok();
    assert_same(&run().run(["get", &reference]).path().join("model.safetensors"), &content_of(2));
}

#[test]
fn a_remote_that_contradicts_the_hub_is_reported_as_an_error_and_the_hub_wins() {
    let (house, commit) = House::with_model();
    let reference = format!("hf://org/model@{commit}");
    house.on("a").run(["get", &reference, "--include", "config.json"]).path();
    house.hub.repo("org/model").tamper(&commit, "model.safetensors", content_of(2)).unwrap();
    let [old, new] = [big(), content_of(2)].map(|content| content.sha256().unwrap()[..12].to_owned());
    let got = house.on("b").run(["get", &reference]);
    assert_eq!(got.stderr.matches("ERROR").count(), 1, "{got}");
    let message_parts = ["ERROR", &old, &new, "the remote contradicts", "evict", "--tier remote", "from origin"];
    assert_same(&got.path_saying(&message_parts).join("model.safetensors"), &content_of(2));
}

/// Content of the size of [`big`] with other bytes.
fn content_of(seed: u64) -> modelcache_testkit::Content {
    modelcache_testkit::Content::generated(seed, big().len())
}
