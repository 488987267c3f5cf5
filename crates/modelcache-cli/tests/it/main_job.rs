//! The main commands with the real binary: get, put, evict, ls, inspect and stats, with disk, S3 and the Hub.

use crate::common::*;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::{Content, content};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

#[test]
fn a_cold_get_fills_disk_and_s3_a_second_machine_reads_s3_and_a_warm_get_sends_no_request() {
    let (house, commit) = House::with_model();
    let cold = house.on("a").run(["get", "hf://org/model@main"]).path_saying(&["from origin", "to remote"]);
    assert_model(&cold);
    assert_eq!(house.hub.body_bytes(), model_bytes(), "each byte was fetched once");

    let folder = format!("hf/org/model/{commit}");
    for (path, content) in model() {
        let object = house.s3.object(BUCKET, &house.s3_key(&folder, path));
        assert_eq!(object.as_deref(), Some(&*content.to_vec().unwrap()), "{path} is a plain object on S3");
    }
    let manifest = house.s3.object(BUCKET, &house.s3_key(&folder, ".modelcache/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert!(manifest.to_string().contains(&content::sha256(b"odd name")), "{manifest}");
    assert!(house.s3.object(BUCKET, &house.s3_key(&folder, ".modelcache/claim")).is_none(), "the claim is removed");

    house.hub.clear_requests();
    let second = house.on("b").run(["get", &format!("hf://org/model@{commit}")]).path_saying(&["from remote"]);
    assert_model(&second);
    assert_eq!(house.hub.requests().len(), 0, "the Hub is not asked for a commit on S3");

    house.hub.down(true);
    house.s3.down(true);
    for dir in ["a", "b"] {
        let warm = house.on(dir).run(["get", &format!("hf://org/model@{commit}")]);
        assert_model(&warm.path_saying(&["on disk"]));
    }
    let main = house.on("a").run(["get", "hf://org/model"]).path_saying(&["on disk"]);
    assert_eq!(main, cold, "the cached ref is fresh");
}

#[test]
fn main_on_a_second_machine_is_known_from_the_first_and_read_from_s3() {
    let (house, _) = House::with_model();
    house.on("a").run(["get", "hf://org/model@main"]).path();
    house.hub.clear_requests();
    assert_model(&house.on("b").run(["get", "hf://org/model@main"]).path_saying(&["from remote"]));
    assert_eq!(house.hub.body_gets().len(), 0);
    assert_eq!(house.hub.requests().len(), 0, "the remote has the ref");
}

#[test]
fn json_output_has_the_path_and_the_source_of_each_byte() {
    let (house, commit) = House::with_model();
    let cold = house.on("a").run(["get", "hf://org/model", "--json"]).object();
    assert_eq!((&cold["reference"], &cold["from"]), (&json!("hf://org/model"), &json!("origin")));
    assert_eq!((&cold["name"], &cold["version"]), (&json!("hf/org/model"), &json!(commit)));
    assert_eq!((&cold["files"], &cold["size"]), (&json!(4), &json!(model_bytes())));
    assert_eq!(cold["bytes"], json!({"disk": 0, "remote": 0, "origin": model_bytes()}));
    assert_eq!(cold["backfilled_bytes"], json!(model_bytes()));
    assert!(cold["seconds"]["download"].as_f64().unwrap() > 0.0 && cold["total_seconds"].as_f64().unwrap() > 0.0);
    assert_model(&PathBuf::from(text(&cold["path"])));

    let warm = house.on("a").run(["get", "hf://org/model", "--json"]).object();
    assert_eq!((&warm["from"], &warm["path"]), (&json!("disk"), &cold["path"]));
    let second = house.on("b").run(["get", "hf://org/model", "--json", "--quiet"]);
    assert_eq!(second.stderr, "", "quiet");
    let second = second.object();
    assert_eq!(second["bytes"], json!({"disk": 0, "remote": model_bytes(), "origin": 0}));
}

#[test]
fn one_failing_reference_does_not_stop_the_others() {
    let (house, _) = House::with_model();
    house.hub.repo("org/other").commit().file("x", "x").publish().unwrap();
    let args = ["get", "hf://org/other", "hf://org/none", "hf://org/model"];
    let outcome = house.on("a").run(args).said(&["error: hf://org/none", "hint: "]);
    assert_eq!(outcome.code, Some(3), "{outcome}");
    let paths: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(paths.len(), 2, "{outcome}");
    assert_same(&PathBuf::from(paths[0]).join("x"), &"x".into());
    assert_model(&PathBuf::from(paths[1]));

    let outcome = house.on("a").run([&args[..], &["--json"]].concat());
    let rows: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 3, "one object for each, in order: {outcome}");
    assert_eq!((&rows[1]["reference"], &rows[1]["error"]["code"]), (&json!("hf://org/none"), &json!("not_found")));
}

#[test]
fn a_partial_artifact_can_be_completed_and_is_never_taken_for_the_whole() {
    let (house, commit) = House::with_model();
    let part = house.on("a").run(["get", "hf://org/model", "--include", "*.json"]).path();
    assert_eq!(files_below(&part), [PathBuf::from("config.json")]);
    let row = house.on("a").run(["ls", "--json"]).object();
    assert_eq!((&row["held_files"], &row["files"]), (&json!(1), &json!(4)));

    // The second machine finds a part on S3 and gets the rest from the Hub.
    house.hub.clear_requests();
    let whole = house.on("b").run(["get", "hf://org/model", "--json"]).object();
    assert_model(&PathBuf::from(text(&whole["path"])));
    assert_eq!(whole["bytes"], json!({"disk": 0, "remote": 8, "origin": model_bytes() - 8}));
    assert!(house.hub.body_gets().iter().all(|seen| seen.file.as_deref() != Some("config.json")));

    // The first machine completes its copy with the files that the second one has put on S3.
    house.hub.down(true);
    let wide = house.on("a").run(["get", &format!("hf://org/model@{commit}"), "--json"]).object();
    assert_eq!(wide["bytes"], json!({"disk": 8, "remote": model_bytes() - 8, "origin": 0}));
    assert_model(&part);

    let without = house.on("a").run(["get", "hf://org/model", "--exclude", "*.safetensors", "--json"]).object();
    assert_eq!((&without["from"], &without["files"]), (&json!("disk"), &json!(3)));
}

#[test]
fn one_file_of_a_repository_is_returned_as_a_file() {
    let (house, commit) = House::with_model();
    let file = house.on("a").run(["get", "hf://org/model@main/sub dir/fé+%25.txt"]).path();
    assert_same(&file, &"odd name".into());
    assert_eq!(house.hub.body_bytes(), 8);
    let pinned = format!("hf://org/model@{commit}/config.json#sha256={}", content::sha256(b"{\"a\": 1}"));
    assert_same(&house.on("b").run(["get", &pinned]).path(), &"{\"a\": 1}".into());
    let wrong = pinned.replace("#sha256=", "#sha256=0000").chars().take(pinned.len()).collect::<String>();
    house.on("a").run(["get", &wrong]).failed(5, &["sha256", "demanded"]);
}

#[test]
fn a_dry_run_prints_sizes_and_tiers_and_downloads_nothing() {
    let (house, _) = House::with_model();
    let outcome = house.on("a").run(["get", "hf://org/model", "--dry-run"]).ok();
    assert!(outcome.stdout.contains("model.safetensors") && outcome.stdout.contains("origin 9.4 MB"), "{outcome}");
    assert_eq!(house.hub.body_gets().len(), 0);
    house.assert_no_artifact_or_staging("a");
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);

    house.on("a").run(["get", "hf://org/model", "--include", "*.json"]).path();
    let plan = house.on("b").run(["get", "hf://org/model", "--dry-run", "--json"]).object();
    assert_eq!(plan["bytes"], json!({"disk": 0, "remote": 8, "origin": model_bytes() - 8}));
    let plan = house.on("a").run(["get", "hf://org/model", "--dry-run", "--json"]).object();
    assert_eq!(plan["bytes"], json!({"disk": 8, "remote": 0, "origin": model_bytes() - 8}));
    house.on("a").run(["get", "hf://org/none", "--dry-run"]).failed(3, &["org/none"]);
}

fn put_folder(house: &House) -> PathBuf {
    for (path, content) in model() {
        house.write(&format!("mine/{path}"), content);
    }
    house.path("mine")
}

#[test]
fn a_folder_that_was_put_comes_back_the_same_on_another_machine() {
    let house = House::new();
    let mine = put_folder(&house);
    let put = house.on("a").run(["put", "team/model@1", mine.to_str().unwrap(), "--json"]).object();
    assert_eq!((&put["files"], &put["on_remote"]), (&json!(4), &json!(true)));
    assert_eq!((&put["size"], &put["uploaded_bytes"]), (&json!(model_bytes()), &json!(model_bytes())));
    assert_model(&house.on("a").run(["get", "team/model@1"]).path_saying(&["on disk"]));
    assert_model(&house.on("b").run(["get", "team/model@1"]).path_saying(&["from remote"]));
    assert_model(&mine);
    assert!(house.hub.requests().is_empty(), "a bare name is not looked up at the Hub");

    let again = house.on("c").run(["put", "team/model@1", mine.to_str().unwrap(), "--json"]).object();
    assert_eq!(again["uploaded_bytes"], json!(0), "equal content is there already");
    let sha256 = text(&put["sha256"]);
    assert_eq!(text(&again["sha256"]), sha256);
    let pinned = format!("team/model@1#sha256={sha256}");
    assert_model(&house.on("d").run(["get", &pinned]).path());
}

#[test]
fn a_file_that_was_put_comes_back_as_that_file() {
    let house = House::new();
    let file = house.write("weights.bin", big());
    let put = house.on("a").run(["put", "weights@v1", "weights.bin"]).ok();
    assert_eq!(put.stdout, "", "{put}");
    put.said(&["weights@v1: put 1 file", "to remote", &big().sha256().unwrap()]);
    let got = house.on("b").run(["get", "weights@v1"]).path();
    assert_eq!(got.file_name(), file.file_name());
    assert_same(&got, &big());
    let pinned = format!("weights@v1#sha256={}", big().sha256().unwrap());
    assert_same(&house.on("b").run(["get", &pinned]).path(), &big());
}

#[test]
fn other_content_under_a_key_is_refused_until_it_is_forced() {
    let house = House::new();
    house.write("one", "first");
    house.write("two/one", "second");
    house.on("a").run(["put", "m@1", "one"]).ok();
    for dir in ["a", "b"] {
        house.on(dir).run(["put", "m@1", "two/one"]).failed(1, &["m@1", "--force"]);
    }
    assert_same(&house.on("b").run(["get", "m@1"]).path(), &"first".into());
    house.on("b").run(["put", "m@1", "two/one", "--force"]).ok();
    assert_same(&house.on("b").run(["get", "m@1"]).path(), &"second".into());
    assert_same(&house.on("c").run(["get", "m@1"]).path(), &"second".into());
}

#[test]
fn evict_removes_from_the_given_tier_and_needs_yes_for_the_last_copy() {
    let house = House::new();
    let mine = put_folder(&house);
    let mine = mine.to_str().unwrap();
    house.on("a").run(["put", "m@1", mine]).ok();
    house.on("a").run(["evict", "m@1", "--tier", "disk"]).ok().said(&["removed", "on disk"]);
    house.assert_no_artifact_or_staging("a");
    assert_model(&house.on("a").run(["get", "m@1"]).path_saying(&["from remote"]));

    for tier in ["all", "remote"] {
        house.on("a").run(["evict", "m@1", "--tier", tier]).failed(2, &["m@1", "the only copies", "--yes"]);
    }
    let would = house.on("a").run(["evict", "m@1", "--dry-run", "--json"]).object();
    assert_eq!((&would["disk_bytes"], &would["remote_bytes"]), (&json!(model_bytes()), &json!(model_bytes())));
    assert_eq!((&would["dry_run"], &would["can_be_fetched_again"]), (&json!(true), &json!(false)));
    assert_eq!(house.on("a").run(["ls", "--remote", "--json"]).objects().len(), 1, "nothing was removed so far");

    house.on("a").run(["evict", "m@1", "--tier", "remote", "--yes"]).ok();
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
    house.on("b").run(["get", "m@1"]).failed(3, &["m@1", "not found", "s3://models/cache"]);
    assert_model(&house.on("a").run(["get", "m@1"]).path_saying(&["on disk"]));
    house.on("a").run(["put", "m@1", mine]).ok();
    house.on("a").run(["evict", "m@1", "--yes"]).ok().said(&["on disk", "on s3://models/cache"]);
    house.on("a").run(["get", "m@1"]).failed(3, &["m@1"]);
    house.on("a").run(["evict", "m@1", "--yes"]).failed(3, &["m@1", "neither on disk nor on the remote"]);
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
}

#[test]
fn an_artifact_that_an_origin_has_leaves_the_remote_with_yes_or_a_named_tier_only() {
    let (house, commit) = House::with_model();
    house.on("a").run(["get", "hf://org/model"]).path();
    let refused = house.on("a").run(["evict", "hf://org/model"]);
    refused.failed(2, &["this would delete", "on s3://models/cache", "--yes", "--tier disk"]);
    assert_eq!(house.on("a").run(["ls", "--remote", "--json"]).objects().len(), 1, "nothing was removed");
    house.on_local("a").run(["evict", "hf://org/model", "--dry-run"]).ok();
    house.on("a").run(["evict", "hf://org/model", "--tier", "all"]).ok();
    house.assert_no_artifact_or_staging("a");
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
    let again = house.on("a").run(["get", &format!("hf://org/model@{commit}")]);
    assert_model(&again.path_saying(&["from origin"]));
}

#[test]
fn ls_inspect_and_stats_show_the_state() {
    let (house, commit) = House::with_model();
    house.write("w.bin", "weights");
    house.on("a").run(["get", "hf://org/model", "--include", "*.json"]).path();
    house.on("a").run(["put", "m@1", "w.bin"]).ok();
    let name = format!("hf://org/model@{commit}");

    let ls = house.on("a").run(["ls"]).ok().stdout;
    assert!(ls.contains("NAME@VERSION") && ls.contains("m@1") && ls.contains(&name), "{ls}");
    assert!(ls.contains("8 B of 9.4 MB") && ls.contains("1/4"), "{ls}");
    let ls = house.on("b").run(["ls", "--remote"]).ok().stdout;
    assert!(ls.contains("m@1") && ls.contains(&name), "{ls}");
    let url = format!("s3://{BUCKET}/cache");
    let rows = house.on("b").without("MODEL_CACHE_REMOTE").run(["ls", "--remote", &url, "--json"]).objects();
    assert_eq!(rows.iter().map(|row| text(&row["reference"])).collect::<Vec<_>>(), [name.clone(), "m@1".into()]);
    assert_eq!(house.on("b").run(["ls", "--json"]).objects().len(), 0);

    let inspect = house.on("a").run(["inspect", "m@1"]).ok().stdout;
    for part in ["m@1", "w.bin", "put", &content::sha256(b"weights"), "yes"] {
        assert!(inspect.contains(part), "{part}: {inspect}");
    }
    let object = house.on("a").run(["inspect", &name, "--json"]).object();
    let files = object["files"].as_array().unwrap();
    assert_eq!(files.len(), 4, "all files, held or not: {object}");
    let held: Vec<bool> = files.iter().map(|file| file["on_disk"] == json!(true)).collect();
    assert_eq!(held, [true, false, false, false]);
    assert_eq!(files[0]["on_remote"], json!(true));
    house.on("b").run(["inspect", "m@1"]).ok();
    house.on("b").run(["inspect", "none@1"]).failed(3, &["none@1"]);

    let stats = house.on("a").run(["stats", "--json"]).object();
    assert_eq!((&stats["artifacts"], &stats["files"]), (&json!(2), &json!(2)));
    assert_eq!((&stats["budget_bytes"], &stats["remote"]), (&json!(1_000_000_000), &json!(url)));
    assert_eq!((&stats["staging_bytes"], &stats["quarantine_bytes"]), (&json!(0), &json!(0)));
    let used = stats["used_bytes"].as_u64().unwrap();
    assert!((15..100_000).contains(&used), "{stats}");
    let stats = house.on("a").run(["stats"]).ok().stdout;
    assert!(stats.contains("artifacts     2 (2 files)") && stats.contains("of 1.0 GB"), "{stats}");
}

#[test]
fn several_references_and_patterns_are_evicted_at_once() {
    let house = House::new();
    let file = house.write("file", "1");
    let put = |key: &str| drop(house.on("a").run(["put", key, file.to_str().unwrap()]).ok());
    ["m@1", "m@2", "n@1", "team/m@1"].into_iter().for_each(put);
    let run = |args: &[&str]| house.on("a").run([&["evict"], args].concat());
    run(&["m@1", "no version", "--yes"]).failed(2, &["no version"]);
    run(&["m@*", "--tier", "all"]).failed(2, &["m@1: this would delete", "m@2: this would delete", "--yes"]);
    run(&["x@*", "--yes"]).failed(3, &["no artifact matches \"x@*\"", "modelcache ls"]);
    assert_eq!(house.listed("a").len(), 4, "nothing was removed");
    run(&["nope@1", "n@1", "--yes"]).failed(3, &["nope@1: neither on disk nor on the remote", "n@1: removed"]);
    run(&["m@*", "--yes"]).ok();
    assert_eq!(house.listed("a"), ["team/m@1"]);
    assert_eq!(house.on("a").run(["ls", "--remote", "--json"]).objects().len(), 1);
}

#[test]
fn the_only_copy_on_this_disk_is_evicted_with_yes_only() {
    let house = House::new();
    let file = house.write("file", "1");
    house.on_local("a").run(["put", "m@1", file.to_str().unwrap()]).ok();
    for tier in ["disk", "all"] {
        house.on("a").run(["evict", "m@1", "--tier", tier]).failed(2, &["the only copies", "--yes"]);
    }
    house.on("a").run(["evict", "m@1", "--tier", "disk", "--yes"]).ok();
    house.assert_no_artifact_or_staging("a");
}

#[test]
fn a_budget_evicts_the_least_recently_used_before_the_download() {
    let house = House::new();
    for (seed, name) in ["one", "two", "three"].into_iter().enumerate() {
        house.hub.repo(name).commit().generated("model.bin", seed as u64, 4 * MIB).publish().unwrap();
    }
    let get = |name: &str| {
        let run = house.on_local("a").env("MODEL_CACHE_MAX_BYTES", "9MiB");
        run.run(["get", &format!("hf://{name}")]).path();
        std::thread::sleep(Duration::from_millis(20));
    };
    ["one", "two", "one", "three"].into_iter().for_each(get);
    let left: Vec<String> = house.listed("a").iter().map(|name| name[..8].to_owned()).collect();
    assert_eq!(left, ["hf://one", "hf://thr"]);
}

#[test]
fn a_killed_put_is_invisible_on_s3_and_a_second_put_completes_it() {
    use modelcache_testkit::s3::S3Fault;
    let house = House::new();
    let mine = put_folder(&house);
    let mine = mine.to_str().unwrap();
    house.s3.faults().add(S3Fault::delay(Duration::from_secs(600)).on("manifest.json").method("PUT"));
    let running = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["put", "m@1", mine]);
    wait_until("the files are on S3", || house.s3.keys(BUCKET).len() >= 4);
    running.signal("KILL");
    running.wait();
    house.s3.faults().clear();
    house.on("b").run(["get", "m@1"]).failed(3, &["m@1"]);
    assert_eq!(house.on("b").run(["ls", "--remote", "--json"]).objects().len(), 0);
    assert_eq!(house.listed("a"), [""; 0]);
}

#[test]
fn a_timeout_ends_in_7_and_the_next_one_works() {
    let (house, _) = House::with_model();
    house.hub.faults().add(HubFault::stall(MIB, Duration::from_secs(600)).on("model.safetensors"));
    let run = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m");
    run.run(["get", "hf://org/model", "--timeout", "1s"]).failed(7, &["not done within 1.0 s", "--timeout"]);
    house.assert_no_artifact("a");
    house.hub.faults().clear();
    assert_model(&house.on("a").run(["get", "hf://org/model", "--timeout", "1m"]).path());
}

#[test]
fn a_flipped_byte_on_s3_is_replaced_from_the_origin_and_repaired_on_s3() {
    let (house, commit) = House::with_model();
    house.on("a").run(["get", "hf://org/model"]).path();
    let key = house.s3_key(&format!("hf/org/model/{commit}"), "model.safetensors");
    house.s3.flip_byte(BUCKET, &key, 8 * MIB + 7).unwrap();
    house.hub.clear_requests();
    let healed = house.on("b").run(["get", &format!("hf://org/model@{commit}"), "--json"]).said(&["model.safetensors"]);
    let healed = healed.object();
    assert_model(&PathBuf::from(text(&healed["path"])));
    assert_eq!(healed["from"], json!("origin"));
    let from_origin = healed["bytes"]["origin"].as_u64().unwrap();
    assert!(from_origin < 2 * MIB, "only the bad part came from the origin: {healed}");
    assert_eq!(house.s3.object(BUCKET, &key).as_deref(), Some(&*big().to_vec().unwrap()), "repaired on S3");

    house.hub.down(true);
    let clean = house.on("c").run(["get", &format!("hf://org/model@{commit}")]).path_saying(&["from remote"]);
    assert_model(&clean);
}

#[test]
fn a_flipped_byte_without_another_source_ends_in_5_and_is_repaired_by_putting_again() {
    let house = House::new();
    let mine = put_folder(&house);
    house.on("a").run(["put", "m@1", mine.to_str().unwrap()]).ok();
    house.s3.flip_byte(BUCKET, &house.s3_key("m/1", "model.safetensors"), 5).unwrap();
    let message_parts = ["m@1", "remote", "model.safetensors", "sha256"];
    house.on("b").run(["get", "m@1"]).failed(5, &message_parts);
    house.assert_no_artifact("b");
    assert_model(&house.on("a").run(["get", "m@1"]).path_saying(&["on disk"]));
    // The intact files can still be fetched.
    house.on("b").run(["get", "m@1", "--include", "*.json"]).path();
    house.on("a").run(["put", "m@1", mine.to_str().unwrap(), "--force"]).ok();
    assert_model(&house.on("b").run(["get", "m@1"]).path_saying(&["from remote"]));
}

#[test]
fn an_object_removed_by_a_lifecycle_rule_is_fetched_from_the_origin_and_restored() {
    let (house, commit) = House::with_model();
    house.on("a").run(["get", "hf://org/model"]).path();
    let key = house.s3_key(&format!("hf/org/model/{commit}"), "model.safetensors");
    house.s3.remove(BUCKET, &key).unwrap();
    let refilled =
        house.on("b").run(["get", &format!("hf://org/model@{commit}")]).path_saying(&["from remote and origin"]);
    assert_model(&refilled);
    assert_eq!(house.s3.object(BUCKET, &key).as_deref(), Some(&*big().to_vec().unwrap()), "repaired on S3");
    house.hub.down(true);
    let clean = house.on("c").run(["get", &format!("hf://org/model@{commit}")]).path_saying(&["from remote"]);
    assert_model(&clean);
}

#[test]
fn a_lost_object_without_another_source_is_named() {
    let house = House::new();
    let mine = put_folder(&house);
    house.on("a").run(["put", "m@1", mine.to_str().unwrap()]).ok();
    house.s3.remove(BUCKET, &house.s3_key("m/1", "model.safetensors")).unwrap();
    house.on("b").run(["get", "m@1"]).failed(3, &["m@1", "remote", "model.safetensors"]);
    house.assert_no_artifact("b");
    house.on("a").run(["put", "m@1", mine.to_str().unwrap()]).ok().said(&["to remote"]);
    assert_model(&house.on("b").run(["get", "m@1"]).path());
}

#[test]
fn a_folder_is_an_origin_and_a_remote_too() {
    let house = House::new();
    let mine = put_folder(&house);
    let remote = format!("file://{}", house.path("shared").display());
    let on = |dir: &str| house.on_local(dir).env("MODEL_CACHE_REMOTE", &remote);
    let got = on("a").run(["get", &format!("file://{}", mine.display()), "--json"]).object();
    assert_model(&PathBuf::from(text(&got["path"])));
    assert_eq!(got["from"], json!("origin"));
    on("a").run(["put", "m@1", mine.to_str().unwrap()]).ok();
    assert_model(&on("b").run(["get", "m@1"]).path_saying(&["from remote"]));
    assert_eq!(on("b").run(["ls", "--remote", "--json"]).objects().len(), 2);
    fs::write(house.path("shared/m/1/config.json"), "{\"a\": 2}").unwrap();
    on("c").run(["get", "m@1"]).failed(5, &["m@1", "remote", "config.json"]);
}

#[test]
fn an_old_version_of_a_folder_is_addressed_by_its_listed_key() {
    let house = House::new();
    let mine = house.path("mine");
    let reference = format!("file://{}", mine.display());
    house.write("mine/weights", "first");
    house.on("a").run(["get", &reference]).path();
    let once = house.listed("a").remove(0);
    house.write("mine/weights", "second, and longer");
    house.on("a").run(["get", &reference]).path();
    assert_same(&house.on("a").run(["get", &once]).path().join("weights"), &"first".into());
    house.on("a").run(["evict", &once, "--yes"]).ok();
    assert!(!house.listed("a").contains(&once) && house.listed("a").len() == 1, "{:?}", house.listed("a"));
    house.on("a").run(["put", &once, "mine"]).failed(2, &["is reserved"]);
}

#[test]
fn a_bare_name_comes_from_the_origin_that_is_configured() {
    let (house, _) = House::with_model();
    let origin = "hf://nobody/{name}@{version},hf://org/{name}@{version}";
    let got = house.on("a").run(["get", "model@main", "--origin", origin]).path_saying(&["model@main", "from origin"]);
    assert_model(&got);
    assert_model(&house.on("b").run(["get", "model@main"]).path_saying(&["from remote"]));
}

#[test]
fn a_cached_file_that_was_changed_is_found_and_fetched_again() {
    let (house, _) = House::with_model();
    let path = house.on_local("a").run(["get", "hf://org/model"]).path().join("model.safetensors");
    fs::remove_file(&path).unwrap();
    fs::write(&path, "spoilt").unwrap();
    assert_model(&house.on_local("a").run(["get", "hf://org/model"]).path());
}

#[test]
fn settings_may_come_from_a_file_and_credentials_from_a_profile() {
    let (house, _) = House::with_model();
    house.write(
        "c.toml",
        Content::from(
            format!(
                "dir = {:?}\n[remote]\nurl = 's3://{BUCKET}/cache'\n[remote.options]\nendpoint = {:?}\nregion = 'us-east-1'\n",
                house.path("from-file"),
                house.s3.endpoint()
            )
            .into_bytes(),
        ),
    );
    let credentials = format!(
        "[work]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
        house.s3.access_key(),
        house.s3.secret_key()
    );
    house.write("home/.aws/credentials", credentials.as_str());
    let run = || house.on_local("a").without("MODEL_CACHE_DIR").env("AWS_PROFILE", "work");
    let path = run().run(["--config", "c.toml", "get", "hf://org/model"]).path_saying(&["to remote"]);
    assert!(path.starts_with(house.path("from-file")), "{}", path.display());
    let unset = run().without("AWS_PROFILE").env("AWS_EC2_METADATA_DISABLED", "true");
    unset.run(["--config", "c.toml", "ls", "--remote"]).failed(4, &["credentials", "aws configure"]);
}

#[test]
fn an_eviction_says_which_bytes_stay_because_another_artifact_uses_them() {
    let house = House::new();
    let file = house.write("f", big());
    let file = file.to_str().unwrap();
    for key in ["a@1", "a@2"] {
        house.on_local("a").run(["put", key, file]).ok();
    }
    let report = |options: &[&str]| {
        let evict = [&["evict", "a@1", "--tier", "disk", "--yes", "--json"], options].concat();
        house
            .on_local("a")
            .run(evict)
            .said(if options.is_empty() { &["0 B on disk", "stay on disk"][..] } else { &[] })
            .object()
    };
    for options in [&["--dry-run"][..], &[]] {
        let report = report(options);
        assert_eq!((&report["disk_bytes"], &report["shared_bytes"]), (&json!(0), &json!(big().len())), "{options:?}");
    }
    let alone = house.on_local("a").run(["evict", "a@2", "--tier", "disk", "--dry-run", "--json"]).object();
    assert_eq!((&alone["disk_bytes"], &alone["shared_bytes"]), (&json!(big().len()), &json!(0)));
}

#[test]
fn ls_selects_sorts_and_sums() {
    let house = House::new();
    for (key, size) in [("a@1", 3_000), ("team/m@1", 1_000), ("team/m@2", 2_000)] {
        let file = house.write("file", Content::generated(size, size));
        house.on("a").run(["put", key, file.to_str().unwrap()]).ok();
        std::thread::sleep(Duration::from_millis(20));
    }
    house.on("a").run(["get", "a@1"]).path();
    let listed = |args: &[&str]| {
        let rows = house.on("a").run([&["ls", "--json"], args].concat()).objects();
        rows.iter().map(|row| text(&row["reference"])).collect::<Vec<_>>()
    };
    assert_eq!(listed(&["--sort", "name"]), ["a@1", "team/m@1", "team/m@2"]);
    assert_eq!(listed(&["--sort", "size"]), ["a@1", "team/m@2", "team/m@1"]);
    assert_eq!(listed(&["--sort", "used"]), ["a@1", "team/m@2", "team/m@1"]);
    assert_eq!(listed(&["team/m"]), ["team/m@1", "team/m@2"]);
    assert_eq!(listed(&["*@1", "--sort", "size"]), ["a@1", "team/m@1"]);
    assert_eq!(listed(&["nope"]), [""; 0]);
    assert_eq!(listed(&["team/*", "--remote"]), ["team/m@1", "team/m@2"]);
    assert!(house.on("a").run(["ls", "team/m"]).ok().stdout.ends_with("\n2 artifacts, 3.0 kB\n"));
}

#[test]
fn ls_remote_says_what_else_is_there() {
    let house = House::new();
    let file = house.write("file", "1");
    for key in ["m@1", "team/n@1"] {
        house.on("a").run(["put", key, file.to_str().unwrap()]).ok();
    }
    for key in ["raw/3/model.bin", "raw/4/model.bin", "top"] {
        house.s3.put(BUCKET, key, "x").unwrap();
    }
    let listed = house.on("a").run(["ls", "--remote", "s3://models"]).ok();
    assert_eq!(listed.stdout, "0 artifacts, 0 B\n");
    let listed =
        listed.said(&["2 artifacts published under s3://models/cache", "modelcache ls --remote s3://models/cache"]);
    let listed = listed.said(&["1 folder of other tools in s3://models (raw)", "modelcache get NAME@VERSION"]);
    assert!(!listed.stderr.contains("WARN"), "{listed}");
    let right = house.on("a").run(["ls", "--remote"]).ok();
    assert!(!right.stderr.contains("other tools") && right.stdout.contains("2 artifacts, 2 B"), "{right}");
}
