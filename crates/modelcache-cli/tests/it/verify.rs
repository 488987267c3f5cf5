//! `verify`: damage that does not show in the metadata is found, withdrawn and repaired, on disk and on the remote.

use crate::common::*;
use modelcache_testkit::Content;
use modelcache_testkit::s3::S3Fault;
use serde_json::Value;
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Flips one bit of a file. Size, mode and modification time stay.
fn rot(file: &Path, offset: u64) {
    let before = fs::metadata(file).unwrap();
    fs::set_permissions(file, Permissions::from_mode(0o644)).unwrap();
    let open = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    open.read_exact_at(&mut byte, offset).unwrap();
    open.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    open.set_times(FileTimes::new().set_modified(before.modified().unwrap())).unwrap();
    fs::set_permissions(file, Permissions::from_mode(0o444)).unwrap();
    assert_eq!(fs::metadata(file).unwrap().mtime_nsec(), before.mtime_nsec(), "the metadata are as before");
}

/// Puts `m@1`, a file of several parts and a small one, into `dir` and onto the remote. Returns its path.
fn put(house: &House, dir: &str) -> PathBuf {
    house.write("m/weights.bin", weights());
    house.write("m/config.json", "{}");
    house.on(dir).run(["put", "m@1", "m"]).ok();
    house.on(dir).run(["get", "m@1"]).path()
}

/// Content of five parts of up to 4 MiB.
fn weights() -> Content {
    Content::generated(5, 17 * MIB)
}

fn objects(outcome: &Outcome) -> Vec<Value> {
    outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Returns the only finding of a run with `--json`.
#[track_caller]
fn finding(outcome: &Outcome) -> Value {
    let objects = objects(outcome);
    let mut findings = objects.iter().flat_map(|object| object["findings"].as_array().unwrap());
    let found = findings.next().unwrap_or_else(|| panic!("nothing found: {outcome}")).clone();
    assert!(findings.next().is_none(), "{outcome}");
    found
}

#[test]
fn intact_artifacts_are_read_in_full_and_not_changed() {
    let house = House::new();
    put(&house, "a");
    let last_used = |house: &House| fs::metadata(house.path("a/artifacts/m/1/last-used")).unwrap().modified().unwrap();
    let before = last_used(&house);
    let read = house.on("a").run(["verify", "--json"]).objects();
    assert_eq!((read.len(), &read[0]["ok"], &read[0]["files"]), (1, &true.into(), &2.into()));
    assert_eq!(read[0]["bytes"], 17 * MIB + 2);
    house.on("a").run(["verify", "m@1"]).ok().said(&["verified 1 artifact", "0 files wrong"]);
    assert_eq!(last_used(&house), before, "verify does not count as a use");
    let remote = house.on("a").run(["verify", "--tier", "all", "--json"]).objects();
    assert_eq!(remote.iter().map(|row| text(&row["tier"])).collect::<Vec<_>>(), ["disk", "remote"]);
    assert!(remote.iter().all(|row| row["ok"] == true && row["bytes"] == 17 * MIB + 2), "{remote:?}");
    house.assert_consistent("a");
}

#[test]
fn silent_rot_is_found_with_its_part_and_not_served_any_more() {
    let house = House::new();
    let weights_bin = put(&house, "a").join("weights.bin");
    rot(&weights_bin, 9 * MIB);
    assert_eq!(house.on("a").run(["get", "m@1"]).path(), house.path("a/artifacts/m/1/files"), "a hit cannot see it");
    let found = house.on("a").run(["verify", "--json"]);
    assert_eq!(found.code, Some(5), "{found}");
    let finding = finding(&found);
    assert_eq!((&finding["path"], &finding["problem"]), (&"weights.bin".into(), &"wrong-bytes".into()));
    assert_eq!(finding["bad_parts"], serde_json::json!([{"index": 2, "start": 8 * MIB, "end": 12 * MIB}]));
    assert_eq!(text(&finding["expected"]), weights().sha256().unwrap());
    assert_ne!(finding["found"], finding["expected"]);
    assert_eq!(finding["withdrawn"], true);
    assert_eq!(files_below(&house.path("a/quarantine")).len(), 1);

    let again = house.on("a").run(["verify", "m@1"]);
    assert_eq!(again.code, Some(5), "a withdrawn file is reported until it is restored: {again}");

    // The withdrawn file is not served. With all sources down the get fails.
    house.s3.down(true);
    let refused = house.on("a").env("MODEL_CACHE_RETRY_DEADLINE", "100ms").run(["get", "m@1"]);
    assert_ne!(refused.code, Some(0), "{refused}");
    house.s3.down(false);
    assert_same(&house.on("a").run(["get", "m@1"]).path().join("weights.bin"), &weights());
    house.on("a").run(["verify"]).ok();
    house.assert_consistent("a");
}

#[test]
fn the_text_output_names_file_part_digests_and_remedy() {
    let house = House::new();
    rot(&put(&house, "a").join("weights.bin"), 17 * MIB - 1);
    let found = house.on("a").run(["verify", "m@1"]);
    assert_eq!(found.code, Some(5), "{found}");
    for message_part in
        ["bad ", "m@1", "weights.bin: wrong bytes in part 4 (bytes 16777216-17825791)", "expected sha256", "found "]
    {
        assert!(found.stdout.contains(message_part), "{message_part:?}: {found}");
    }
    found.said(&["error: 1 file wrong in 1 artifact", "hint: ", "--repair"]);
}

#[test]
fn a_damaged_blob_is_reported_for_every_artifact_that_shares_it_and_repaired_in_each() {
    let house = House::new();
    for name in ["one", "two"] {
        house.write(&format!("{name}/shared.bin"), weights());
        house.write(&format!("{name}/own"), name);
        house.on("a").run(["put", &format!("{name}@1"), name]).ok();
    }
    let shared = house.path("a/artifacts/one/1/files/shared.bin");
    rot(&shared, 5);
    let found = house.on("a").run(["verify", "--json"]);
    assert_eq!(found.code, Some(5), "{found}");
    let rows = objects(&found);
    assert_eq!(rows.len(), 2, "{found}");
    for row in &rows {
        assert_eq!((&row["ok"], &row["findings"][0]["path"]), (&false.into(), &"shared.bin".into()), "{row}");
    }
    assert_eq!(files_below(&house.path("a/quarantine")).len(), 1);

    rot(&house.on("a").run(["get", "one@1"]).path().join("own"), 0);
    house.on("a").run(["get", "two@1"]).path();
    rot(&shared, 5);
    let repaired = house.on("a").run(["verify", "--repair", "--json"]).objects();
    assert!(repaired.iter().all(|row| row["ok"] == true), "{repaired:?}");
    let from = |row: &Value| row["findings"].as_array().unwrap().iter().map(|f| text(&f["repaired_from"])).collect();
    let sources: Vec<Vec<String>> = repaired.iter().map(from).collect();
    // The second artifact reuses the bytes that the first one fetched.
    assert_eq!(sources[0], ["remote", "remote"], "{repaired:?}");
    assert_eq!(sources[1].len(), 1, "{repaired:?}");
    for name in ["one", "two"] {
        assert_same(&house.path(&format!("a/artifacts/{name}/1/files/shared.bin")), &weights());
    }
    house.on("a").run(["verify"]).ok();
    house.assert_consistent("a");
}

#[test]
fn a_missing_view_a_cut_file_and_a_link_in_its_place_are_found_and_repaired() {
    for (what, problem) in [("remove", "missing"), ("cut", "wrong-size"), ("link", "missing")] {
        let house = House::new();
        let file = put(&house, "a").join("weights.bin");
        match what {
            "remove" => fs::remove_file(&file).unwrap(),
            "cut" => {
                fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
                File::options().write(true).open(&file).unwrap().set_len(9 * MIB).unwrap();
            }
            _ => {
                fs::remove_file(&file).unwrap();
                std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
            }
        }
        let found = house.on("a").run(["verify", "--json"]);
        assert_eq!(found.code, Some(5), "{what}: {found}");
        assert_eq!(finding(&found)["problem"], problem, "{what}");
        let again = house.on("a").run(["get", "m@1"]).path();
        assert_same(&again.join("weights.bin"), &weights());
        fs::remove_file(&file).unwrap();
        let repaired = house.on("a").run(["verify", "--repair", "m@1"]).ok();
        assert!(repaired.stdout.starts_with("repaired"), "{repaired}");
        assert_same(&file, &weights());
        house.assert_consistent("a");
    }
}

#[test]
fn a_damaged_manifest_is_reported_and_repaired_from_the_files_on_disk() {
    let house = House::new();
    put(&house, "a");
    let manifest = house.path("a/artifacts/m/1/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap().replace("config.json", "konfig.json");
    fs::write(&manifest, text).unwrap();
    let found = house.on("a").run(["verify", "--json"]);
    assert_eq!(found.code, Some(5), "{found}");
    assert_eq!(
        (&finding(&found)["problem"], &objects(&found)[0]["reference"]),
        (&"damaged-manifest".into(), &"m@1".into())
    );
    house.s3.clear_requests();
    house.on("a").run(["verify", "--repair"]).ok();
    assert!(house.s3.object_gets("weights.bin").is_empty(), "the blobs are found again");
    house.on("a").run(["verify"]).ok();
    house.assert_consistent("a");
}

#[test]
fn a_damaged_blob_without_an_artifact_is_quarantined() {
    let house = House::new();
    put(&house, "a");
    let digest = weights().sha256().unwrap();
    let blob = house.path(&format!("a/blobs/{}/{digest}", &digest[..2]));
    let bytes = fs::read(&blob).unwrap();
    // The view becomes a copy, as where links are refused. Then the blob, which has another link outside, is damaged
    // alone.
    fs::hard_link(&blob, house.path("outside")).unwrap();
    let view = house.path("a/artifacts/m/1/files/weights.bin");
    fs::remove_file(&view).unwrap();
    fs::write(&view, bytes).unwrap();
    rot(&blob, 3);
    let found = house.on("a").run(["verify", "--json"]).ok();
    let rows = objects(&found);
    assert_eq!(rows.len(), 2, "{found}");
    assert_eq!((&rows[0]["ok"], &rows[1]["findings"][0]["expected"]), (&true.into(), &digest.into()), "{found}");
    assert_eq!(files_below(&house.path("a/quarantine")).len(), 1);
    house.on("a").run(["verify"]).ok();
}

#[test]
fn an_artifact_without_another_source_is_repaired_by_putting_it_again() {
    let house = House::new();
    house.write("m/weights.bin", weights());
    house.on_local("a").run(["put", "m@1", "m"]).ok();
    rot(&house.path("a/artifacts/m/1/files/weights.bin"), 0);
    let failed = house.on_local("a").run(["verify", "--repair"]);
    assert_eq!(failed.code, Some(5), "{failed}");
    assert!(
        failed.stdout.contains("cannot be repaired") && failed.stdout.contains("put the artifact again"),
        "{failed}"
    );
    house.on_local("a").run(["put", "m@1", "m"]).ok();
    house.on_local("a").run(["verify"]).ok();
    house.assert_consistent("a");
}

#[test]
fn verify_uses_the_last_known_commit_and_repairs_from_the_hub() {
    let (house, commit) = House::with_model();
    let folder = house.on_local("a").run(["get", "hf://org/model"]).path();
    rot(&folder.join("model.safetensors"), MIB);
    house.hub.down(true);
    let found = house.on_local("a").env("MODEL_CACHE_REF_TTL", "0s").run(["verify", "--json", "hf://org/model"]);
    assert_eq!((found.code, objects(&found)[0]["version"].as_str()), (Some(5), Some(commit.as_str())), "{found}");
    house.hub.down(false);
    house.on_local("a").run(["get", "hf://org/model"]).path();
    rot(&folder.join("model.safetensors"), MIB);
    let repaired = house.on_local("a").run(["verify", "--repair", "--json"]).objects();
    assert_eq!(repaired[0]["findings"][0]["repaired_from"], "origin", "{repaired:?}");
    assert_model(&folder);
    house.on_local("a").run(["verify", "nobody@1"]).failed(3, &["nobody@1", "not on disk"]);
}

#[test]
fn get_verify_hashes_a_hit_before_it_returns() {
    let house = House::new();
    let file = put(&house, "a").join("weights.bin");
    rot(&file, 12 * MIB);
    let path = house.on("a").run(["get", "--verify", "m@1"]).path();
    assert_same(&path.join("weights.bin"), &weights());
    house.s3.clear_requests();
    house.on("a").run(["get", "--verify", "m@1"]).path();
    assert!(house.s3.requests().is_empty(), "an intact hit sends no request");
    house.assert_consistent("a");
}

#[test]
fn an_artifact_in_use_is_verified_and_an_eviction_does_not_wait_for_it() {
    let house = House::new();
    put(&house, "a");
    let reader = house.on("a").start(["exec", "m@1", "--", "sleep", "60"]);
    reader.wait_until_it_is("sleep");
    house.on("a").run(["verify", "m@1"]).ok();
    reader.signal("KILL");
    reader.wait();
    // 17 MiB at 4 MB/s take seconds, so that the eviction comes during the verification.
    let slow = house.on("a").start(["verify", "--limit-rate", "4MB", "m@1"]);
    wait_until("it reads", || {
        let fds = fs::read_dir(format!("/proc/{}/fd", slow.pid())).into_iter().flatten().flatten();
        fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|path| path.ends_with("weights.bin"))
    });
    house.on("a").run(["evict", "--tier", "disk", "m@1"]).ok();
    let ended = slow.wait();
    assert!(matches!(ended.code, Some(0 | 3)), "an evicted file is not wrong: {ended}");
    assert!(!ended.stdout.contains("bad"), "{ended}");
    house.assert_no_artifact_or_staging("a");
}

#[test]
fn a_verify_that_is_interrupted_or_killed_leaves_nothing() {
    for (signal, code) in [("INT", Some(130)), ("KILL", None)] {
        let house = House::new();
        put(&house, "a");
        let before = files_below(&house.path("a"));
        let slow = house.on("a").start(["verify", "--limit-rate", "2MB"]);
        wait_until("it reads", || {
            let fds = fs::read_dir(format!("/proc/{}/fd", slow.pid())).into_iter().flatten().flatten();
            fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|path| path.ends_with("weights.bin"))
        });
        slow.signal(signal);
        assert_eq!(slow.wait().code, code, "{signal}");
        assert_eq!(files_below(&house.path("a")), before, "{signal}");
        house.on("a").run(["verify"]).ok();
        house.assert_consistent("a");
    }
}

#[test]
fn a_read_only_directory_is_verified_and_left_as_it_is() {
    if !can_mount() {
        return;
    }
    let house = House::new();
    rot(&put(&house, "a").join("weights.bin"), 0);
    let dir = house.path("a");
    let mount = format!("mount --bind {0} {0} && mount -o remount,ro,bind {0}", dir.display());
    let found = house.on("a").run_after(&mount, &["verify", "--json"]);
    assert_eq!(found.code, Some(5), "{found}");
    assert_eq!((&finding(&found)["withdrawn"], &finding(&found)["problem"]), (&false.into(), &"wrong-bytes".into()));
    let refused = house.on("a").run_after(&mount, &["get", "--verify", "m@1"]);
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(5), ""), "{refused}");
}

#[test]
fn a_flipped_bit_on_the_remote_is_found_by_reading_and_repaired_from_disk() {
    let house = House::new();
    put(&house, "a");
    let key = house.s3_key("m/1", "weights.bin");
    house.s3.flip_byte(BUCKET, &key, 10 * MIB).unwrap();
    let found = house.on("a").run(["verify", "--tier", "remote", "--json"]);
    assert_eq!(found.code, Some(5), "{found}");
    let finding = finding(&found);
    assert_eq!(
        (&finding["problem"], &finding["bad_parts"][0]["index"]),
        (&"wrong-bytes".into(), &2.into()),
        "{finding}"
    );
    assert_eq!(finding["withdrawn"], false);
    house.on("a").run(["verify", "--tier", "remote", "--repair"]).ok();
    assert!(house.s3.object(BUCKET, &key).unwrap() == weights().to_vec().unwrap());
    house.on("b").run(["verify", "--tier", "remote"]).ok();
    assert!(house.listed("b").is_empty(), "verify leaves nothing on disk");
}

#[test]
fn missing_cut_and_replaced_objects_are_distinguished() {
    let house = House::new();
    put(&house, "a");
    let key = house.s3_key("m/1", "config.json");
    let problem = |house: &House| {
        let found = house.on("b").run(["verify", "--tier", "remote", "--json", "m@1"]);
        assert_eq!(found.code, Some(5), "{found}");
        text(&finding(&found)["problem"])
    };
    house.s3.remove(BUCKET, &key).unwrap();
    assert_eq!(problem(&house), "missing");
    fs::write(house.s3.object_path(BUCKET, &key), "{}{}").unwrap();
    assert_eq!(problem(&house), "wrong-size");
    fs::write(house.s3.object_path(BUCKET, &key), "[]").unwrap();
    assert_eq!(problem(&house), "wrong-bytes");
    fs::write(house.s3.object_path(BUCKET, &key), "{}").unwrap();
    house.on("b").run(["verify", "--tier", "remote"]).ok();
}

#[test]
fn the_remote_is_repaired_from_the_origin_where_disk_has_nothing() {
    let (house, commit) = House::with_model();
    house.on("a").run(["get", "hf://org/model"]).path();
    let key = house.s3_key(&format!("hf/org/model/{commit}"), "model.safetensors");
    house.s3.flip_byte(BUCKET, &key, 0).unwrap();
    let repaired = house.on("b").run(["verify", "--tier", "remote", "--repair", "--json"]).objects();
    assert_eq!(repaired[0]["findings"][0]["repaired_from"], "origin", "{repaired:?}");
    assert!(house.s3.object(BUCKET, &key).unwrap() == big().to_vec().unwrap());
    house.on("c").run(["verify", "--tier", "remote"]).ok();
}

#[test]
fn the_remote_is_not_repaired_from_a_damaged_copy_on_disk() {
    let (house, commit) = House::with_model();
    let folder = house.on("a").run(["get", "hf://org/model"]).path();
    let key = house.s3_key(&format!("hf/org/model/{commit}"), "model.safetensors");
    house.s3.flip_byte(BUCKET, &key, 0).unwrap();
    rot(&folder.join("model.safetensors"), 5);
    house.on("a").run(["verify", "--tier", "remote", "--repair"]).ok();
    assert!(house.s3.object(BUCKET, &key).unwrap() == big().to_vec().unwrap());
    house.on("a").run(["verify", "--tier", "all"]).ok();
    assert_model(&folder);
}

#[test]
fn a_file_that_cannot_be_repaired_has_its_own_reason_although_another_one_is_repaired() {
    let (house, commit) = House::with_model();
    house.on("a").run(["get", "hf://org/model"]).path();
    house.on("b").run(["get", "hf://org/model", "--include", "config.json"]).path();
    for file in ["config.json", "model.safetensors"] {
        house.s3.flip_byte(BUCKET, &house.s3_key(&format!("hf/org/model/{commit}"), file), 0).unwrap();
    }
    house.hub.down(true);
    let verified = house.on("b").run(["verify", "--tier", "remote", "--repair", "--json"]);
    assert_eq!(verified.code, Some(5), "{verified}");
    let report: Value = serde_json::from_str(verified.stdout.lines().next().unwrap()).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let of = |path: &str| findings.iter().find(|finding| finding["path"] == path).unwrap();
    assert_eq!(of("config.json")["repaired_from"], "disk", "{findings:?}");
    let remedy = text(&of("model.safetensors")["remedy"]);
    assert!(remedy.starts_with("cannot be repaired: ") && remedy.contains("hf://org/model"), "{remedy}");
}

#[test]
fn with_both_tiers_one_of_them_is_enough_and_neither_is_not_found() {
    let house = House::new();
    put(&house, "a");
    let read = house.on("b").run(["verify", "--tier", "all", "--json", "m@1"]).objects();
    assert_eq!((read.len(), &read[0]["tier"]), (1, &"remote".into()));
    house.on("b").run(["verify", "--tier", "all", "n@1"]).failed(3, &["n@1", "neither on disk nor on the remote"]);
    house.on("b").run(["verify", "--tier", "remote", "n@1"]).failed(3, &["not on the remote"]);
}

#[test]
fn get_verify_does_not_serve_damage_of_a_lower_directory() {
    let house = House::new();
    rot(&put(&house, "baked").join("weights.bin"), 7);
    let run = || house.on("a").env("MODEL_CACHE_LOWER_DIR", house.path("baked"));
    assert!(run().run(["get", "m@1"]).path().starts_with(house.path("baked")), "a hit cannot see it");
    let path = run().run(["get", "--verify", "m@1"]).path_saying(&["the lower directory's copy is damaged"]);
    assert!(path.starts_with(house.path("a")), "{}", path.display());
    assert_same(&path.join("weights.bin"), &weights());
}

#[test]
fn the_remote_is_repaired_from_disk_and_not_without_a_source() {
    let house = House::new();
    put(&house, "a");
    house.s3.flip_byte(BUCKET, &house.s3_key("m/1", "weights.bin"), 0).unwrap();
    let failed = house.on("b").run(["verify", "--tier", "remote", "--repair"]);
    assert_eq!(failed.code, Some(5), "{failed}");
    assert!(failed.stdout.contains("cannot be repaired"), "{failed}");

    let manifest = house.s3_key("m/1", ".modelcache/manifest.json");
    house.s3.flip_byte(BUCKET, &manifest, 100).unwrap();
    let found = house.on("a").run(["verify", "--tier", "remote"]);
    assert_eq!(found.code, Some(5), "{found}");
    assert!(
        found.stdout.contains("the manifest is damaged") && found.stdout.contains("publish the artifact again"),
        "{found}"
    );
    house.on("a").run(["verify", "--tier", "remote", "--repair"]).ok();
    house.on("a").run(["verify", "--tier", "remote"]).ok();
    assert_same(&house.on("c").run(["get", "m@1"]).path().join("weights.bin"), &weights());
}

#[test]
fn a_broken_stream_is_retried_and_a_remote_that_is_down_is_unavailable() {
    let house = House::new();
    put(&house, "a");
    house.s3.faults().add(S3Fault::slow_down().on("weights.bin").method("GET").times(2));
    house.on("b").run(["verify", "--tier", "remote"]).ok();
    house.s3.down(true);
    house.on("b").env("MODEL_CACHE_RETRY_DEADLINE", "100ms").run(["verify", "--tier", "remote"]).failed(7, &["remote"]);
    house.on_local("b").run(["verify", "--tier", "remote"]).failed(2, &["no remote is configured"]);
}

#[test]
fn a_version_that_was_replaced_on_the_remote_is_named_and_refreshed() {
    let house = House::new();
    let [one, two] =
        ["1", "22"].map(|content| house.write(&format!("v{content}/w"), content).parent().unwrap().to_owned());
    house.on("a").run(["put", "m@1", one.to_str().unwrap(), "--tag", "prod"]).ok();
    let old = house.on("a").run(["get", "m@1", "--refresh"]).path().join("w");
    house.on("b").run(["put", "m@1", two.to_str().unwrap(), "--force", "--tag", "prod"]).ok();
    assert_eq!(fs::read_to_string(&old).unwrap(), "1");
    house.on("a").run(["get", "m@1"]).path();

    let outcome = house.on("a").run(["verify", "m@1", "--tier", "all"]);
    assert_eq!(outcome.code, Some(5), "{outcome}");
    assert!(outcome.stdout.contains("w: this disk and the remote have different content"), "{outcome}");
    assert!(outcome.stdout.contains("get m@1 --refresh"), "{outcome}");
    house.on("a").run(["verify", "m@1"]).ok();

    // A copy in use is not replaced.
    let running = house.on("a").start(["exec", "m@1", "--", "sleep", "600"]);
    running.wait_until_it_is("sleep");
    house.on("a").run(["get", "m@1", "--refresh"]).failed(1, &["was replaced on the remote", "in use"]);
    running.signal("KILL");
    running.wait();
    let new = house.on("a").run(["get", "m@1", "--refresh"]).path_saying(&["was replaced on the remote", "w was"]);
    assert_eq!(fs::read_to_string(new.join("w")).unwrap(), "22");
    house.on("a").run(["verify", "m@1", "--tier", "all"]).ok();

    // Without the remote, a refresh fails.
    let down = house.on("a").env("AWS_ENDPOINT_URL", "http://127.0.0.1:9");
    down.run(["get", "m@1", "--refresh"]).failed(7, &["m@1"]);
    // A copy that was never uploaded is not replaced.
    house.on_local("c").run(["put", "m@1", one.to_str().unwrap()]).ok();
    house.on("c").run(["get", "m@1", "--refresh"]).failed(1, &["m@1", "never uploaded", "--force"]);
}

#[test]
fn a_refresh_of_a_tag_replaces_a_version_that_was_replaced() {
    let house = House::new();
    let [one, two] =
        ["1", "22"].map(|content| house.write(&format!("v{content}/w"), content).parent().unwrap().to_owned());
    house.on("a").run(["put", "m@1", one.to_str().unwrap(), "--tag", "prod"]).ok();
    house.on("b").run(["put", "m@1", two.to_str().unwrap(), "--force", "--tag", "prod"]).ok();
    let new = house.on("a").run(["get", "m@prod", "--refresh"]).path_saying(&["was replaced on the remote"]);
    assert_eq!(fs::read_to_string(new.join("w")).unwrap(), "22");
}
