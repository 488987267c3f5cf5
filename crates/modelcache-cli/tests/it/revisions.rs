//! Revisions and tags: what a movable name means, who says so, and what happens when it moves or nobody answers.

use crate::common::*;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::s3::S3Fault;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Longer than any patience.
const FOR_EVER: Duration = Duration::from_secs(600);

/// The two kinds of remote.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Bucket,
    Folder,
}

impl Kind {
    const BOTH: [Self; 2] = [Self::Bucket, Self::Folder];

    /// A run over the cache directory `dir` that takes no answer to be fresh.
    fn on(self, house: &House, dir: &str) -> Run {
        let run = match self {
            Self::Bucket => house.on(dir),
            Self::Folder => {
                house.on_local(dir).env("MODEL_CACHE_REMOTE", format!("file://{}", house.path("remote").display()))
            }
        };
        run.env("MODEL_CACHE_REF_TTL", "0s")
    }

    /// Where an object of the remote lies.
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

/// `m@1`, `m@2` and `m@3` on the remote: one file each, with its version in it.
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
fn a_tag_is_a_rollout_and_moved_back_a_rollback() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let get = || content(&kind.on(&house, "a").run(["get", "m@prod"]).path());
        kind.on(&house, "ops").run(["tag", "m@1", "prod"]).ok().said(&["m@prod: new, means 1"]);
        assert_eq!(get(), "1");
        kind.on(&house, "ops").run(["tag", "m@2", "prod"]).ok().said(&["m@prod: moved from 1 to 2"]);
        assert_eq!(get(), "2");
        let moved = kind.on(&house, "ops").run(["tag", "m@1", "prod", "--json"]).object();
        assert_eq!((&moved["from"], &moved["to"], &moved["tag"]), (&"2".into(), &"1".into(), &"prod".into()));
        assert_eq!(get(), "1");
        kind.on(&house, "ops").run(["tag", "m@1", "prod"]).ok().said(&["still means 1"]);

        house.write("4", "4");
        let put = kind.on(&house, "ops").run(["put", "m@4", "4", "--tag", "prod"]);
        put.ok().said(&["m@prod: moved from 1 to 4"]);
        assert_eq!(get(), "4");
        kind.on(&house, "ops").run(["tag", "m@4", "stable"]).ok();
        let listed = kind.on(&house, "a").run(["ls", "--remote", "--json"]).objects();
        let tags: Vec<_> = listed.iter().map(|row| (text(&row["reference"]), row["tags"].to_string())).collect();
        let rows = [("m@1", "[]"), ("m@2", "[]"), ("m@3", "[]"), ("m@4", r#"["prod","stable"]"#)];
        assert_eq!(tags, rows.map(|(row, tags)| (row.to_owned(), tags.to_owned())), "{kind:?}");
        let table = kind.on(&house, "a").run(["ls", "--remote"]).ok().stdout;
        assert!(table.contains("TAGS") && table.contains("prod, stable"), "{table}");

        kind.on(&house, "ops").run(["tag", "--remove", "m@prod"]).ok().said(&["m@prod: removed; it meant 4"]);
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
    assert_eq!(content(&refreshed.path()), "2", "a refresh asks, however fresh the answer");
}

#[test]
fn a_version_wins_over_a_tag_and_neither_takes_the_others_name() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let forged = r#"{"format":1,"revision":"1","version":"2","kind":"tag","resolved_at_unix":1}"#;
        write_ref(kind, &house, "m/.modelcache/refs/1", forged);
        assert_eq!(content(&kind.on(&house, "a").run(["get", "m@1"]).path()), "1");
        let run = || kind.on(&house, "ops");
        run().run(["tag", "m@1", "3"]).failed(2, &["3 is a version of m", "another word"]);
        run().run(["tag", "m@1", "1"]).failed(2, &["1 is a version of m"]);
        run().run(["tag", "m@9", "prod"]).failed(3, &["m@9", "does not have this version", "modelcache put"]);
        run().run(["tag", "m@1", "a/b"]).failed(2, &["cannot be a tag"]);
        run().run(["tag", "m@1", "prod"]).ok();
        run().run(["tag", "m@prod", "live"]).failed(2, &["prod is a tag itself, and means 1", "tag m@1 live"]);
        run().run(["put", "m@prod", "3"]).failed(2, &["prod is a tag of m, and means 1", "tag --remove m@prod"]);
        run().run(["evict", "m@prod", "--yes"]).failed(2, &["prod is a tag of m, and means 1"]);
        run().run(["put", "m@5", "3", "--tag", "5"]).failed(2, &["5 is a version"]);
        assert!(!kind.object(&house, "m/5/.modelcache/manifest.json").exists(), "told before anything is published");
        house.on_local("b").run(["put", "m@1", "1"]).ok();
        house.on_local("b").run(["tag", "m@1", "prod"]).failed(2, &["kept on the remote", "MODEL_CACHE_REMOTE"]);
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
        run().run(["evict", "m@1"]).failed(2, &["the tags prod, stable", "would go with it", "--yes"]);
        let told = run().run(["evict", "m@1", "--dry-run", "--json"]).object();
        assert_eq!(told["tags"].to_string(), r#"["prod","stable"]"#);
        run().run(["evict", "m@1", "--tier", "disk"]).ok();
        assert_eq!(content(&run().run(["get", "m@stable"]).path()), "1", "disk alone concerns no tag");
        // An origin that could give it back changes nothing about the tags.
        house.write("origin/m/1", "1");
        let origin = format!("file://{}/{{name}}/{{version}}", house.path("origin").display());
        let with_origin = || run().env("MODEL_CACHE_ORIGIN", &origin);
        with_origin().run(["evict", "m@1", "--tier", "remote"]).failed(2, &["the tags prod, stable"]);
        with_origin().run(["evict", "m@1", "--yes"]).ok().said(&["removed, too", "the tags prod, stable"]);
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
fn a_tag_that_dangles_says_so_with_the_remedy() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        kind.on(&house, "ops").run(["tag", "m@3", "prod"]).ok();
        fs::remove_dir_all(kind.object(&house, "m/3")).unwrap();
        let says = ["the tag prod points to m@3", "not on this disk, nor on the remote", "tag m@VERSION prod"];
        kind.on(&house, "a").run(["get", "m@prod"]).failed(3, &says);
        kind.on(&house, "a").run(["resolve", "m@prod"]).failed(3, &says);
    }
}

#[test]
fn a_remote_that_does_not_answer_leaves_the_tag_at_what_it_last_meant() {
    let house = house_of(Kind::Bucket);
    on(&house, "ops").run(["tag", "m@1", "prod"]).ok();
    on(&house, "a").run(["get", "m@prod"]).path();
    on(&house, "ops").run(["tag", "m@2", "prod"]).ok();
    for fault in [S3Fault::slow_down(), S3Fault::hang_up(), S3Fault::delay(FOR_EVER)] {
        house.s3.faults().add(fault);
        let run = || on(&house, "a").env("MODEL_CACHE_READ_TIMEOUT", "30s");
        let got = run().run(["get", "m@prod"]);
        let says = ["WARN", "m@prod", "no answer", "last meant", "version=1", "age_s=", "remote"];
        assert_eq!(content(&got.path_saying(&says)), "1");
        let refuses = run().env("MODEL_CACHE_ON_REMOTE_DOWN", "fail").env("MODEL_CACHE_READ_TIMEOUT", "500ms");
        refuses.run(["get", "m@prod"]).failed(7, &["m@prod", "remote"]);
        let refresh = run().env("MODEL_CACHE_READ_TIMEOUT", "500ms").run(["get", "m@prod", "--refresh"]);
        refresh.failed(7, &["m@prod", "remote"]);
        on(&house, "a").run(["get", "m@1"]).path_saying(&["on disk"]);
        house.s3.faults().clear();
    }
    // Being refused is an answer.
    house.s3.faults().add(S3Fault::expired_token());
    on(&house, "a").run(["get", "m@prod"]).failed(4, &["ExpiredToken"]);
    house.s3.faults().clear();
    assert_eq!(content(&on(&house, "a").run(["get", "m@prod"]).path()), "2");
}

#[test]
fn damaged_refs_are_passed_over_and_newer_ones_are_not_guessed_at() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let run = || kind.on(&house, "a");
        let large = "x".repeat(100_000);
        for damaged in ["", "{", r#"{"format":1}"#, &large] {
            write_ref(kind, &house, "m/.modelcache/refs/prod", damaged);
            run().run(["get", "m@prod"]).failed(3, &["WARN", "damaged", "prod", "not found"]);
        }
        // A ref that was copied under another name is none.
        run().run(["tag", "m@1", "live"]).ok();
        let live = kind.object(&house, "m/.modelcache/refs/live");
        fs::copy(&live, kind.object(&house, "m/.modelcache/refs/prod")).unwrap();
        run().run(["get", "m@prod"]).failed(3, &["WARN", "damaged"]);
        run().run(["ls", "--remote"]).ok().said(&["WARN", "left out"]);
        run().run(["tag", "m@2", "prod"]).ok().said(&["new, means 2"]);
        assert_eq!(content(&run().run(["get", "m@prod"]).path()), "2");

        write_ref(kind, &house, "m/.modelcache/refs/prod", r#"{"format":2,"of":"tomorrow"}"#);
        run().run(["get", "m@prod"]).failed(2, &["format 2", "update modelcache"]);
        run().run(["tag", "m@1", "prod"]).failed(2, &["format 2", "update modelcache"]);
        run().run(["tag", "--remove", "m@prod"]).failed(2, &["format 2", "update modelcache"]);
        assert_eq!(content(&run().run(["get", "m@1"]).path()), "1", "versions do not mind");
    }
}

#[test]
fn refs_stand_in_nobodys_way() {
    for kind in Kind::BOTH {
        let house = house_of(kind);
        let run = || kind.on(&house, "ops");
        run().run(["put", "team/sub/m@1", "1"]).ok();
        run().run(["tag", "team/sub/m@1", "prod"]).ok();
        run().run(["put", "team@sub", "1"]).failed(1, &["other artifacts are published below it"]);
        run().run(["evict", "team/sub/m@1", "--yes"]).ok();
        let left = r#"{"format":1,"revision":"x","version":"2","kind":"tag","resolved_at_unix":1}"#;
        write_ref(kind, &house, "team/sub/m/.modelcache/refs/x", left);
        run().run(["put", "team@sub", "1"]).ok();
        let listed = run().run(["ls", "--remote", "--json"]).objects();
        let listed: Vec<_> = listed.iter().map(|row| text(&row["reference"])).collect();
        assert_eq!(listed, ["m@1", "m@2", "m@3", "team@sub"]);
        // Odd tags have odd object names.
        for tag in ["manifest.json", "claim", "100%", ".hidden", "fé"] {
            run().run(["tag", "m@1", tag]).ok();
            assert_eq!(content(&kind.on(&house, "a").run(["get", &format!("m@{tag}")]).path()), "1", "{tag}");
        }
        assert_eq!(run().run(["ls", "--remote"]).ok().stdout.lines().count(), 5);
    }
}

#[test]
fn of_many_who_move_a_tag_at_once_one_is_last() {
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
fn one_machine_asks_the_hub_and_the_fleet_hears_of_it() {
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

        // Old answers are asked for again, and the fleet hears of the news.
        let second = house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
        assert_eq!(
            fresh("b").run(["resolve", "hf://org/model"]).ok().stdout.trim_end(),
            format!("hf://org/model@{first}")
        );
        let asked = kind.on(&house, "b").run(["resolve", "hf://org/model", "--json"]).object();
        assert_eq!((text(&asked["version"]), text(&asked["from"])), (second.clone(), "origin".into()));
        let heard = fresh("c").run(["resolve", "hf://org/model", "--json"]).object();
        assert_eq!((text(&heard["version"]), text(&heard["from"])), (second.clone(), "remote".into()));

        // What the remote says is no more than a hint of what a revision can be.
        let forged = r#"{"format":1,"revision":"main","version":"main","kind":"origin","resolved_at_unix":9999999999}"#;
        write_ref(kind, &house, "hf/org/model/.modelcache/refs/main", forged);
        let asked = fresh("d").run(["resolve", "hf://org/model", "--json"]).object();
        assert_eq!((text(&asked["version"]), text(&asked["from"])), (second.clone(), "origin".into()));
        let stored = fs::read_to_string(kind.object(&house, "hf/org/model/.modelcache/refs/main")).unwrap();
        assert!(stored.contains(&second), "a time ahead of all clocks does not protect a ref: {stored}");
    }
}

#[test]
fn a_remote_that_takes_no_answers_costs_nothing_but_a_question() {
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
fn a_hub_that_does_not_answer_leaves_the_revision_at_what_it_last_meant() {
    let (house, commit) = House::with_model();
    let run = || house.on_local("a").env("MODEL_CACHE_REF_TTL", "0s").env("MODEL_CACHE_READ_TIMEOUT", "30s");
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
        let says = ["WARN", "hf://org/model@main", "last meant", &version, "age_s=", why];
        let got = run().run(["get", "hf://org/model"]);
        assert_eq!(got.stderr.matches("WARN").count(), 1, "{got}");
        assert_model(&got.path_saying(&says));
        run()
            .env("MODEL_CACHE_READ_TIMEOUT", "500ms")
            .run(["get", "hf://org/model", "--refresh"])
            .failed(7, &["origin"]);
        let cold = house.on_local("b").env("MODEL_CACHE_READ_TIMEOUT", "500ms");
        cold.run(["get", "hf://org/model"]).failed(7, &["origin"]);
        house.hub.faults().clear();
    }
    // That there is no such revision any more, or no right to it, is an answer.
    house.hub.repo("org/model").private(TOKEN);
    run().run(["get", "hf://org/model"]).failed(3, &["private", "HF_TOKEN"]);
}

#[test]
fn the_last_answer_of_the_fleet_serves_a_new_machine_when_the_hub_is_down() {
    let (house, commit) = House::with_model();
    on(&house, "a").run(["get", "hf://org/model"]).path();
    house.hub.faults().add(HubFault::status(503));
    let version = format!("version={commit}");
    let got = on(&house, "b").run(["get", "hf://org/model"]);
    assert_model(&got.path_saying(&["WARN", "last meant", &version, "from remote"]));
}

#[test]
fn a_pinned_reference_means_the_same_for_ever() {
    let (house, commit) = House::with_model();
    let run = || on(&house, "a");
    let resolved = run().run(["resolve", "hf://org/model"]).ok().said(&["sha256 not known yet", "origin says so"]);
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
    house.assert_invisible("c");
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

/// The digests of the contents that two words make.
fn digests(a: &str, b: &str) -> [String; 2] {
    [a, b].map(|text| modelcache_testkit::Content::from(text).sha256().unwrap())
}

#[test]
fn a_version_that_changed_after_it_was_tagged_is_an_alarm() {
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
        assert_eq!(content(&got.path_saying(&alarm)), "other", "the remote has it so, cold and warm");
    }
    // Whoever has the old content has what was tagged.
    let quiet = on(&house, "old").run(["get", "m@prod"]);
    assert!(!quiet.stderr.contains("ERROR"), "{quiet}");

    // Tagged anew, all is well, but for those who have the old content: that is not what the tag means now.
    on(&house, "ops").run(["tag", "m@1", "prod"]).ok();
    let quiet = on(&house, "a").run(["get", "m@prod"]);
    assert!(!quiet.stderr.contains("ERROR"), "{quiet}");
    let says = ["ERROR", &old, &new, "this disk has", "evict m@1 --tier disk"];
    on(&house, "old").run(["get", "m@prod"]).failed(5, &says);
    assert_eq!(content(&on(&house, "old").run(["get", "m@1"]).path()), "1", "a hit asks nobody");
    on(&house, "old").run(["evict", "m@1", "--tier", "disk"]).ok();
    assert_eq!(content(&on(&house, "old").run(["get", "m@prod"]).path()), "other");
}

#[test]
fn a_commit_that_changed_at_the_hub_is_an_alarm_and_disk_is_not_served_as_the_new_one() {
    let (house, commit) = House::with_model();
    let reference = format!("hf://org/model@{commit}");
    let run = || house.on_local("a");
    run().run(["get", &reference, "--include", "*.safetensors"]).path();
    house.hub.repo("org/model").tamper(&commit, "model.safetensors", content_of(2)).unwrap();
    let [old, new] = [big(), content_of(2)].map(|content| content.sha256().unwrap()[..12].to_owned());
    let says = ["ERROR", &old, &new, "contradicts", "evict", "--tier disk", "verify", &reference];
    run().run(["get", &reference]).failed(5, &says);
    run().run(["get", &reference, "--include", "*.safetensors"]).path_saying(&["on disk"]);
    run().run(["evict", &reference, "--tier", "disk"]).ok();
    assert_same(&run().run(["get", &reference]).path().join("model.safetensors"), &content_of(2));
}

#[test]
fn a_remote_that_contradicts_the_hub_is_an_alarm_and_the_hub_wins() {
    let (house, commit) = House::with_model();
    let reference = format!("hf://org/model@{commit}");
    house.on("a").run(["get", &reference, "--include", "config.json"]).path();
    house.hub.repo("org/model").tamper(&commit, "model.safetensors", content_of(2)).unwrap();
    let [old, new] = [big(), content_of(2)].map(|content| content.sha256().unwrap()[..12].to_owned());
    let got = house.on("b").run(["get", &reference]);
    assert_eq!(got.stderr.matches("ERROR").count(), 1, "{got}");
    let says = ["ERROR", &old, &new, "the remote contradicts", "evict", "--tier remote", "from origin"];
    assert_same(&got.path_saying(&says).join("model.safetensors"), &content_of(2));
}

/// Other content of the same size as [`big`].
fn content_of(seed: u64) -> modelcache_testkit::Content {
    modelcache_testkit::Content::generated(seed, big().len())
}
