//! Unmanaged objects: files that other tools put into the bucket, and places in other buckets. They are served as they
//! are, checked against the checksums beside them, and never written.

use crate::common::*;
use modelcache_testkit::s3::S3Fault;
use modelcache_testkit::{Content, Moto};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn model_file() -> Content {
    Content::generated(7, 200_000)
}

fn sha256(content: &Content) -> String {
    content.sha256().unwrap()
}

/// An environment with these objects in the bucket, as another tool put them there.
fn by_hand(objects: &[(&str, Content)]) -> House {
    let house = House::new();
    for (key, content) in objects {
        house.s3.put(BUCKET, &format!("cache/{key}"), content.clone()).unwrap();
    }
    house
}

fn inspected(house: &House, dir: &str, reference: &str) -> Value {
    house.on(dir).run(["inspect", reference, "--json"]).object()
}

fn provenances(inspection: &Value) -> Vec<String> {
    inspection["files"].as_array().unwrap().iter().map(|file| text(&file["provenance"])).collect()
}

/// Part of the warning that no checksum is available.
const UNSTATED: &str = "no checksum available for";

#[test]
fn a_single_unmanaged_object_is_a_file_checked_by_its_sidecar() {
    let model = model_file();
    let digest = sha256(&model);
    for (form, sidecar) in [
        format!("{digest}\n"),
        format!("{}  model.tar.gz\r\n", digest.to_uppercase()),
        format!("SHA256 (model.tar.gz) = {digest}\n"),
    ]
    .into_iter()
    .enumerate()
    {
        let sidecar: Content = sidecar.as_str().into();
        let house = by_hand(&[("fraud/3/model.tar.gz", model.clone()), ("fraud/3/model.tar.gz.sha256", sidecar)]);
        let got = house.on("a").run(["get", "fraud@3"]);
        assert!(!got.stderr.contains("WARN"), "form {form}: {got}");
        let path = got.path();
        assert!(path.ends_with("model.tar.gz") && path.is_file(), "{path:?}");
        assert_same(&path, &model);
        let inspection = inspected(&house, "a", "fraud@3");
        assert_eq!(provenances(&inspection), ["sidecar"]);
        assert_eq!(text(&inspection["sha256"]), digest);
        assert_eq!(house.s3.keys(BUCKET).len(), 2, "nothing was written");
    }
}

#[test]
fn a_wrong_sidecar_is_named_and_nothing_is_kept() {
    let other: Content = format!("{}  model.tar.gz\n", sha256(&"other".into())).as_str().into();
    let house = by_hand(&[("fraud/3/model.tar.gz", model_file()), ("fraud/3/model.tar.gz.sha256", other)]);
    let digest = sha256(&model_file());
    house.on("a").run(["get", "fraud@3"]).failed(5, &["(from model.tar.gz.sha256)", &digest]);
    house.assert_no_artifact("a");
}

#[test]
fn sha256sums_files_cover_their_folder_and_are_not_part_of_the_view() {
    let (a, b, c): (Content, Content, Content) = (model_file(), "b".into(), "c".into());
    let root = format!("{}  a.bin\n{}  sub/b\n{}  gone\n", sha256(&a), sha256(&"wrong".into()), sha256(&"x".into()));
    let sub = format!("{} *b\n", sha256(&b));
    let house = by_hand(&[
        ("team/m/1/a.bin", a.clone()),
        ("team/m/1/sub/b", b.clone()),
        ("team/m/1/sub/c", c.clone()),
        ("team/m/1/sub/c.sha256", "<html>not found</html>".into()),
        ("team/m/1/SHA256SUMS", root.as_str().into()),
        ("team/m/1/sub/SHA256SUMS", sub.as_str().into()),
    ]);
    let got = house.on("a").run(["get", "team/m@1"]);
    let got = got.said(&[
        "sub/SHA256SUMS takes precedence",
        "sub/c.sha256",
        UNSTATED,
        "1 of 3 files",
        r#"do not exist ("gone")"#,
    ]);
    let path = got.path();
    assert_eq!(files_below(&path), ["a.bin", "sub/b", "sub/c"].map(PathBuf::from));
    assert_same(&path.join("a.bin"), &a);
    assert_same(&path.join("sub/b"), &b);
    assert_eq!(provenances(&inspected(&house, "a", "team/m@1")), ["sidecar", "sidecar", "first-seen"]);
    // `--require-checksum` needs a checksum for every selected file.
    house.on("b").run(["get", "--require-checksum", "team/m@1"]).failed(5, &["sub/c"]);
    house.on("b").run(["get", "--require-checksum", "team/m@1", "--include", "*/b"]).path();
}

#[test]
fn without_checksums_a_get_warns_once_and_a_requirement_refuses() {
    let house = by_hand(&[("fraud/3/model.tar.gz", model_file())]);
    let before = house.s3.keys(BUCKET);
    let got = house.on("a").run(["get", "fraud@3"]).ok();
    assert_eq!(got.stderr.matches("WARN").count(), 1, "{got}");
    let got = got.said(&[UNSTATED, "model.tar.gz", "sha256sum FILE > FILE.sha256"]);
    assert_same(&got.path(), &model_file());
    assert_eq!(provenances(&inspected(&house, "a", "fraud@3")), ["first-seen"]);
    assert_eq!(house.s3.keys(BUCKET), before, "a first-seen digest is not published");

    let warm = house.on("a").run(["get", "fraud@3"]).ok();
    assert!(!warm.stderr.contains("WARN"), "{warm}");
    let required = || ["MODEL_CACHE_REQUIRE_CHECKSUM", "1"];
    let message_parts = ["no checksum available for 1 of its files", "model.tar.gz", "sha256sum FILE > FILE.sha256"];
    for dir in ["b", "a"] {
        let [name, value] = required();
        house.on(dir).env(name, value).run(["get", "fraud@3"]).failed(5, &message_parts);
    }
    house.assert_no_artifact_or_staging("b");
    let demanded = format!("fraud@3#sha256={}", sha256(&model_file()));
    house.on("b").run(["get", "--require-checksum", &demanded]).path();
}

#[test]
fn a_listing_of_several_pages_is_complete() {
    const FILES: usize = 2_501;
    let house = House::new();
    let mut sums = String::new();
    for at in 0..FILES {
        let content: Content = format!("file {at}").as_str().into();
        sums.push_str(&format!("{}  part-{at:04}.txt\n", sha256(&content)));
        content.write_to(house.s3.object_path(BUCKET, &format!("cache/shards/1/part-{at:04}.txt"))).unwrap();
    }
    house.s3.put(BUCKET, "cache/shards/1/SHA256SUMS", sums.as_str()).unwrap();
    // A key that shares only the prefix is not part of the artifact.
    house.s3.put(BUCKET, "cache/shards/10/x", "x").unwrap();
    let got = house.on("a").run(["get", "shards@1"]);
    assert!(!got.stderr.contains("WARN"), "{got}");
    let path = got.path();
    assert_eq!(files_below(&path).len(), FILES);
    assert_same(&path.join("part-2500.txt"), &"file 2500".into());
    let lists = house.s3.requests().into_iter().filter(|seen| seen.query.contains("list-type=2")).count();
    assert_eq!(lists, 3, "pages");
}

#[test]
fn an_absent_or_half_written_artifact_is_a_miss_after_four_requests() {
    let house = by_hand(&[("fraud/3/model.tar.gz", model_file()), ("fraud/3/.modelcache/claim", "{}".into())]);
    house.on("a").run(["get", "fraud@3"]).failed(3, &["not found"]);
    // Versions below a name are not files of an artifact.
    house.on("a").run(["put", "team/x@1", house.write("x", "x").to_str().unwrap()]).ok();
    house.on("a").run(["get", "team@x"]).failed(3, &["not found"]);
    house.s3.clear_requests();
    house.on("a").run(["get", "nothing@1"]).failed(3, &["not found"]);
    assert_eq!(house.s3.requests().len(), 4, "manifest, tag, list, object: {:?}", house.s3.requests());
}

#[test]
fn one_object_may_be_the_version_itself() {
    let house = by_hand(&[
        ("fraud/3", model_file()),
        ("fraud/3.sha256", sha256(&model_file()).as_str().into()),
        ("fraud/30/x", "x".into()),
    ]);
    let path = house.on("a").run(["get", "fraud@3", "--require-checksum"]).path();
    assert_same(&path, &model_file());
    assert!(path.is_file());
    let file = house.write("mine", "mine");
    house.on("b").run(["put", "fraud@3", file.to_str().unwrap()]).failed(1, &["modelcache did not write"]);
}

/// Runs a get of `big@1` and replaces its object `times` times, each time while a read is held back.
fn replaced_while_read(times: u64) -> (House, Outcome) {
    let house = by_hand(&[("big/1/model.bin", Content::generated(0, 50_000))]);
    let held =
        house.s3.faults().add(S3Fault::delay(Duration::from_secs(2)).method("GET").on("big/1/model.bin").times(times));
    let running = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "30s").start(["get", "big@1"]);
    for time in 1..=times {
        wait_until("the read is held back", || held.count() >= time);
        house.s3.put(BUCKET, "cache/big/1/model.bin", Content::generated(time, 50_000)).unwrap();
    }
    let outcome = running.wait();
    (house, outcome)
}

#[test]
fn nothing_is_put_below_unmanaged_objects() {
    let house = by_hand(&[("fraud/3/model.tar.gz", model_file())]);
    let mine = house.write("mine", "m").display().to_string();
    for key in ["fraud/3@x", "fraud/3/model.tar.gz@1", "fraud/3/deep/er@1"] {
        house.on("a").run(["put", key, &mine]).failed(1, &["fraud/3", "another tool", "choose another name"]);
    }
    assert_same(&house.on("b").run(["get", "fraud@3"]).path(), &model_file());
    house.on("a").run(["put", "fraud@4", &mine]).ok();
}

#[test]
fn a_file_without_a_digest_is_read_from_one_source() {
    let house = by_hand(&[("big/1/model.bin", big())]);
    let other = Content::generated(7, big().len());
    other.write_to(house.path("registry/big/1")).unwrap();
    let origin = format!("file://{}/{{name}}/{{version}}", house.path("registry").display());
    // The first part arrives, then every read from the bucket fails.
    house.s3.faults().add(S3Fault::hang_up().on("model.bin").method("GET").after_skipping(1));
    let got = house.on("a").env("MODEL_CACHE_ORIGIN", &origin).run(["get", "big@1"]);
    assert_ne!(got.code, Some(0), "a mix of two sources is refused: {got}");
    house.assert_no_artifact("a");
    house.s3.faults().clear();
    assert_same(&house.on("a").env("MODEL_CACHE_ORIGIN", &origin).run(["get", "big@1"]).path(), &big());
}

#[test]
fn an_object_replaced_between_list_and_read_is_listed_again() {
    let (_house, outcome) = replaced_while_read(1);
    let path = outcome.said(&["starting over with a new list"]).path();
    assert_same(&path, &Content::generated(1, 50_000));
}

#[test]
fn an_object_that_is_replaced_twice_is_an_error() {
    let (house, outcome) = replaced_while_read(2);
    outcome.failed(1, &["model.bin was replaced or removed after it was listed"]);
    house.assert_no_artifact("a");
}

/// The references by which the objects of `m@1` in the bucket of the remote are read: as a key and as a place.
fn both_ways() -> [String; 2] {
    ["m@1".into(), format!("s3://{BUCKET}/cache/m/1")]
}

#[test]
fn an_object_that_is_served_with_another_etag_than_it_is_listed_with_is_read() {
    for reference in both_ways() {
        for etag in ["\"served\"", "W/\"served\""] {
            let house = by_hand(&[("m/1/model.bin", big()), ("m/1/config.json", "{}".into())]);
            house.s3.faults().add(S3Fault::ignore_conditions().on("model.bin"));
            for method in ["GET", "HEAD"] {
                house.s3.faults().add(S3Fault::other_etag(etag).on("model.bin").method(method));
            }
            let got = house.on("a").run(["get", &reference]);
            assert!(!got.stderr.contains("starting over"), "{got}");
            assert_same(&got.path_saying(&["lists another ETag than it serves"]).join("model.bin"), &big());
        }
    }
}

#[test]
fn a_checksum_decides_where_no_two_etags_agree() {
    for reference in both_ways() {
        let house = by_hand(&[("m/1/model.bin", big()), ("m/1/model.bin.sha256", sha256(&big()).as_str().into())]);
        house.s3.faults().add(S3Fault::new_etags().on("model.bin"));
        let got = house.on("a").run(["get", &reference]);
        assert!(!got.stderr.contains("WARN"), "{got}");
        assert_same(&got.path(), &big());

        let house = by_hand(&[("m/1/model.bin", big())]);
        house.s3.faults().add(S3Fault::new_etags().on("model.bin"));
        let got = house.on("a").run(["get", &reference]);
        got.failed(7, &["disagree about the ETag of", "model.bin", "sha256sum"]);
        house.assert_no_artifact("a");
    }
}

#[test]
fn published_files_are_read_and_verified_whatever_their_etags_are() {
    let house = House::new();
    let file = house.write("mine", big());
    house.on("a").run(["put", "p@1", file.to_str().unwrap()]).ok();
    house.s3.faults().add(S3Fault::new_etags().on("p/1/mine"));
    assert_same(&house.on("b").run(["get", "p@1"]).path(), &big());
    house.on("b").run(["verify", "--tier", "remote", "p@1"]).ok();
}

#[test]
fn an_object_replaced_together_with_its_checksum_is_listed_again() {
    let put = |house: &House, content: &Content| {
        house.s3.put(BUCKET, "cache/m/1/model.bin", content.clone()).unwrap();
        house.s3.put(BUCKET, "cache/m/1/model.bin.sha256", sha256(content).as_str()).unwrap();
    };
    for reference in both_ways() {
        let (house, new) = (House::new(), Content::generated(9, 50_000));
        put(&house, &Content::generated(8, 50_000));
        let held = S3Fault::delay(Duration::from_secs(2)).method("GET").on("m/1/model.bin?").times(1);
        let held = house.s3.faults().add(held);
        let running = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "30s").start(["get", &reference]);
        wait_until("the read is held back", || held.count() == 1);
        put(&house, &new);
        assert_same(&running.wait().path_saying(&["starting over"]), &new);
    }
}

#[test]
fn objects_that_changed_under_a_version_are_an_error() {
    let house = by_hand(&[("m/1/a", "a".into()), ("m/1/b", "b".into())]);
    house.on("a").run(["get", "m@1", "--include", "a"]).path();
    house.s3.put(BUCKET, "cache/m/1/a", "aa").unwrap();
    house.on("a").run(["get", "m@1"]).failed(1, &["the objects on the remote changed", "evict --tier disk m@1"]);
    house.on("a").run(["evict", "--tier", "disk", "m@1"]).ok();
    let path = house.on("a").run(["get", "m@1"]).path();
    assert_same(&path.join("a"), &"aa".into());
}

#[test]
fn without_list_permission_a_get_is_a_miss_that_names_the_permission() {
    let house = by_hand(&[("fraud/3/model.tar.gz", model_file())]);
    house.s3.faults().add(S3Fault::no_list_permission());
    let got = house.on("a").run(["get", "fraud@3"]).failed(3, &["s3:ListBucket"]);
    assert_eq!(got.stderr.matches("WARN").count(), 1, "{got}");
}

#[test]
fn a_slow_or_throttling_store_is_waited_for() {
    let house = by_hand(&[("fraud/3/model.tar.gz", model_file())]);
    house.s3.faults().add(S3Fault::slow_down().on("list-type=2").times(2));
    house.s3.faults().add(S3Fault::internal_error().method("HEAD").on("model.tar.gz").times(1));
    house.s3.faults().add(S3Fault::hang_up().method("GET").on("model.tar.gz").times(1));
    let path = house.on("a").run(["get", "fraud@3"]).path();
    assert_same(&path, &model_file());
}

#[test]
fn unmanaged_objects_are_neither_overwritten_nor_removed() {
    let house = by_hand(&[("fraud/3/model.tar.gz", model_file())]);
    let file = house.write("mine", "mine");
    house.on("a").run(["put", "fraud@3", file.to_str().unwrap()]).failed(1, &["modelcache did not write"]);
    for tier in ["remote", "all"] {
        let args = ["evict", "--tier", tier, "--yes", "fraud@3"];
        house.on("a").run(args).failed(1, &["uploaded by another tool"]);
    }
    house.on("a").run(["get", "fraud@3"]).path();
    // `--yes` is not needed, because the remote still has the artifact.
    house
        .on("a")
        .run(["evict", "fraud@3"])
        .ok()
        .said(&["the unmanaged objects on the remote are not removed", "on disk"]);
    assert_eq!(house.listed("a"), [""; 0]);
    assert_eq!(house.s3.keys(BUCKET), ["cache/fraud/3/model.tar.gz"]);
}

#[test]
fn unmanaged_files_in_a_shared_folder_are_served_and_links_out_of_it_are_not() {
    let house = House::new();
    let run =
        |dir: &str| house.on_local(dir).env("MODEL_CACHE_REMOTE", format!("file://{}", house.path("far").display()));
    house.write("far/fraud/3/model.tar.gz", model_file());
    house.write("far/fraud/3/SHA256SUMS", format!("{}  model.tar.gz\n", sha256(&model_file())).as_str());
    house.write("far/odd/1/sub dir/fé+%.txt", "odd");
    house.write("far/odd/1/with\nnewline", "x");
    std::os::unix::fs::symlink("..", house.path("far/odd/1/circle")).unwrap();
    // A user with write access to the folder must not make modelcache read other files through links.
    house.write("private", "private");
    std::os::unix::fs::symlink(house.path("private"), house.path("far/odd/1/planted")).unwrap();
    std::os::unix::fs::symlink(house.path("private"), house.path("far/odd/2")).unwrap();
    // A link within the folder is followed.
    std::os::unix::fs::symlink("3", house.path("far/fraud/latest")).unwrap();
    assert_same(&run("a").run(["get", "--require-checksum", "fraud@3"]).path(), &model_file());
    let path = run("a").run(["get", "odd@1"]).path_saying(&["skipping", r"with\nnewline", "planted", UNSTATED]);
    assert_eq!(files_below(&path), [PathBuf::from("sub dir/fé+%.txt")]);
    run("a").run(["get", "odd@2"]).failed(3, &["leads out of the remote's folder"]);
    assert_same(&run("a").run(["get", "fraud@latest"]).path(), &model_file());
    run("a").run(["get", "nothing@1"]).failed(3, &["not found"]);
    run("a").run(["evict", "--tier", "remote", "--yes", "odd@1"]).failed(1, &["uploaded by another tool"]);
}

/// Uploads objects with boto3: `keys` with their own names as content, then objects with a digest in the metadata, with
/// a checksum of the store, and with the checksum of a multipart upload.
const UPLOAD: &str = r#"
import boto3, hashlib, sys
from botocore.config import Config
s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
bucket, base = sys.argv[1:3]
for key in sys.argv[3:]:
    s3.put_object(Bucket=bucket, Key=base + "odd/1/" + key, Body=key.encode())
s3.put_object(Bucket=bucket, Key=base + "stated/1/meta", Body=b"meta", Metadata={"sha256": hashlib.sha256(b"meta").hexdigest()})
s3.put_object(Bucket=bucket, Key=base + "stated/1/checksum", Body=b"checksum", ChecksumAlgorithm="SHA256")
s3.put_object(Bucket=bucket, Key=base + "lying/1/meta", Body=b"meta", Metadata={"sha256": "00" * 32})
upload = s3.create_multipart_upload(Bucket=bucket, Key=base + "stated/1/parts", ChecksumAlgorithm="SHA256")["UploadId"]
at = dict(Bucket=bucket, Key=base + "stated/1/parts", UploadId=upload)
parts = []
for number, body in enumerate([b"1" * (5 << 20), b"2"], 1):
    part = s3.upload_part(PartNumber=number, Body=body, ChecksumAlgorithm="SHA256", **at)
    parts.append({"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": part["ChecksumSHA256"]})
s3.complete_multipart_upload(MultipartUpload={"Parts": parts}, **at)
"#;

fn upload(venv: &Path, moto: &Moto, keys: &[&str]) {
    let mut python = Command::new(venv.join("bin/python"));
    python.args(["-c", UPLOAD, BUCKET, "cache/"]).args(keys).envs(moto.env()).env("AWS_DEFAULT_REGION", "us-east-1");
    let output = python.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn odd_keys_metadata_and_checksums_of_a_real_tool_are_read() {
    let Some(venv) = venv() else { return };
    let (house, moto) = (House::new(), Moto::start(&venv).unwrap());
    moto.bucket(BUCKET).unwrap();
    let good = ["a b.txt", "fé ω.txt", "x+y.txt", "100%25 %.txt", "sub/q?&=;#.txt", "<&>'.txt"];
    let bad = ["a//b", "marker/", "../up", "sub/../x", "back\\slash", "both", "both/inner"];
    upload(&venv, &moto, &[&good[..], &bad[..]].concat());
    let run = |dir| house.on_local(dir).envs(moto.env()).env("MODEL_CACHE_REMOTE", format!("s3://{BUCKET}/cache"));

    let got = run("a").run(["get", "odd@1"]).said(&["skipping", "a//b"]);
    assert!(!got.stderr.contains("marker/"), "{got}");
    let path = got.path();
    let mut expected: Vec<PathBuf> = good.iter().chain(&["both/inner"]).map(PathBuf::from).collect();
    expected.sort();
    assert_eq!(files_below(&path), expected);
    for name in good {
        assert_same(&path.join(name), &name.into());
    }

    let path = run("a").run(["get", "stated@1"]).path_saying(&[UNSTATED, "1 of 3 files", "parts"]);
    assert_eq!(fs::read(path.join("parts")).unwrap().len() as u64, 5 * MIB + 1);
    let inspection = run("a").run(["inspect", "stated@1", "--json"]).object();
    assert_eq!(provenances(&inspection), ["sidecar", "sidecar", "first-seen"], "checksum, meta, parts");
    run("a").run(["get", "lying@1"]).failed(5, &["from x-amz-meta-sha256"]);
}

/// An environment with a second bucket that holds a tree.
fn elsewhere() -> House {
    let house = House::new();
    house.s3.bucket("other").unwrap();
    for (key, content) in [("m@1/model.bin", model_file()), ("m@1/config.json", "{}".into()), ("m@12/x", "x".into())] {
        house.s3.put("other", &format!("models/{key}"), content).unwrap();
    }
    house
}

#[test]
fn a_place_in_another_bucket_is_an_origin() {
    let house = elsewhere();
    let sums = format!("{}  model.bin\n", sha256(&model_file()));
    house.s3.put("other", "models/m@1/SHA256SUMS", sums.as_str()).unwrap();
    let path = house.on("a").run(["get", "s3://other/models/m@1"]).path_saying(&[UNSTATED, "config.json"]);
    assert_eq!(files_below(&path), ["config.json", "model.bin"].map(PathBuf::from));
    assert_same(&path.join("model.bin"), &model_file());
    let file = house.on("a").run(["get", "s3://other/models/m@1/model.bin"]).path();
    assert_same(&file, &model_file());
    house
        .on("a")
        .run(["get", "s3://other/models/m"])
        .failed(3, &["there is no such object, and no object below this prefix"]);
    house.on("a").run(["get", "s3://no-such-bucket/x"]).failed(2, &["no-such-bucket", "does not exist"]);

    // The artifact and the provenance of its digests were backfilled, and another machine gets them from the remote.
    let listed = house.on("a").run(["ls", "--remote", "--json"]).objects();
    let reference =
        listed.iter().map(|row| text(&row["reference"])).find(|name| name.starts_with("s3/other/models/m%401@"));
    let reference = reference.expect("it was backfilled");
    house.s3.clear_requests();
    let path = house.on("b").run(["get", &reference]).path();
    assert_same(&path.join("model.bin"), &model_file());
    assert!(house.s3.requests().iter().all(|seen| !seen.path.starts_with("/other")), "the key alone is enough");
    assert_eq!(provenances(&inspected(&house, "b", &reference)), ["first-seen", "sidecar"]);
}

#[test]
fn another_bucket_is_listed_again_only_after_its_answer_has_expired() {
    let house = elsewhere();
    let get = |ttl: &str| {
        let run = house.on_local("a").envs(house.s3.env()).env("MODEL_CACHE_REF_TTL", ttl);
        run.run(["get", "s3://other/models/m@1", "--json"]).object()
    };
    let first = text(&get("1h")["version"]);
    house.s3.put("other", "models/m@1/config.json", "{\"new\": 1}").unwrap();
    house.s3.clear_requests();
    assert_eq!(text(&get("1h")["version"]), first);
    assert_eq!(house.s3.requests().len(), 0, "a fresh answer costs no request");
    let second = get("0s");
    assert_ne!(text(&second["version"]), first);
    assert_same(&Path::new(&text(&second["path"])).join("config.json"), &"{\"new\": 1}".into());
    house.s3.down(true);
    let last = house.on_local("a").envs(house.s3.env()).env("MODEL_CACHE_REF_TTL", "0s");
    last.env("MODEL_CACHE_RETRY_DEADLINE", "0s")
        .run(["get", "s3://other/models/m@1"])
        .path_saying(&["using the version that it last meant"]);
}

#[test]
fn a_bucket_in_another_region_is_found_there() {
    let house = elsewhere();
    let hits = house.s3.faults().add(S3Fault::wrong_region("eu-west-1").on("prefix=models/m@1").times(1));
    house.on("a").run(["get", "s3://other/models/m@1/"]).path();
    assert_eq!(hits.count(), 1);
    let signed = |seen: &modelcache_testkit::LoggedRequest| seen.authorization.clone().unwrap_or_default();
    let reads = house.s3.object_gets("models/m@1");
    assert!(!reads.is_empty() && reads.iter().all(|seen| signed(seen).contains("/eu-west-1/s3/")), "{reads:?}");
}

#[test]
fn a_template_leads_bare_names_to_another_bucket() {
    let house = elsewhere();
    house.s3.put("other", "byname/fraud/3/model.tar.gz", model_file()).unwrap();
    let run = |dir| house.on(dir).env("MODEL_CACHE_ORIGIN", "s3://other/byname/{name}/{version}/");
    assert_same(&run("a").run(["get", "fraud@3"]).path(), &model_file());
    run("a").run(["get", "fraud@4"]).failed(3, &["s3://other/byname/{name}/{version}/"]);
    assert!(house.s3.keys(BUCKET).contains(&"cache/fraud/3/.modelcache/manifest.json".to_owned()), "backfilled");
}

#[test]
fn an_artifact_published_in_another_bucket_is_read_by_its_manifest() {
    let house = elsewhere();
    let file = house.write("given", model_file());
    let there = house.on("a").env("MODEL_CACHE_REMOTE", "s3://other/pool");
    there.run(["put", "fraud@3", file.to_str().unwrap()]).ok();
    let reference = "s3://other/pool/fraud/3";
    let path = house.on_local("b").envs(house.s3.env()).run(["get", reference, "--require-checksum"]).path();
    assert_same(&path, &model_file());
    assert!(path.is_file() && path.ends_with("given"), "{path:?}");
    house
        .on("b")
        .run(["get", "s3://other/pool/fraud"])
        .failed(2, &["versions are published below this address", "pool/fraud/3"]);
    // Bytes that differ from the manifest are refused.
    house.s3.flip_byte("other", "pool/fraud/3/given", 5).unwrap();
    house.on("c").without("MODEL_CACHE_REMOTE").run(["get", reference]).failed(5, &["mismatch"]);
}

/// Runs every command of docs/existing-bucket.md, in order, in an empty folder.
#[test]
fn the_commands_of_the_page_on_existing_buckets_work() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/existing-bucket.md");
    let page = fs::read_to_string(page).unwrap();
    let blocks = page.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let script: String = blocks.collect();
    let house = House::new();
    let work = house.path("work");
    fs::create_dir(&work).unwrap();
    let mut shell = Command::new("/bin/sh");
    shell.args(["-euc", &script]).current_dir(&work).env_clear().env("MODEL_CACHE_DIR", house.path("a"));
    shell.env("MODEL_CACHE_MIN_FREE_BYTES", "0");
    shell.env("PATH", format!("{}:/usr/bin:/bin", Path::new(BIN).parent().unwrap().display()));
    let output = shell.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains(UNSTATED), "{said}");
    for part in ["sidecar", "refused with exit code 5"] {
        assert!(printed.contains(part), "{part:?} is not printed: {printed}{said}");
    }
}

#[test]
fn files_that_the_origin_reads_from_the_bucket_of_the_remote_are_not_stored_twice() {
    let house = by_hand(&[("raw/big.bin", big()), ("raw/more/small", "small".into())]);
    let contents = || house.s3.keys(BUCKET).into_iter().filter(|key| !key.contains("/refs/")).collect::<Vec<_>>();
    let before = contents();
    for remote in ["s3://models", "s3://models/elsewhere"] {
        let on = |dir: &str| house.on(dir).env("MODEL_CACHE_REMOTE", remote);
        for dir in ["a", "b"] {
            assert_same(&on(dir).run(["get", "s3://models/cache/raw/big.bin"]).path(), &big());
            on(dir).env("MODEL_CACHE_ORIGIN", "s3://models/cache/{name}/{version}/").run(["get", "raw@more"]).path();
            assert_eq!(house.pending(dir), (0, 0));
            fs::remove_dir_all(house.path(dir)).unwrap();
        }
        assert_eq!(contents(), before, "{remote}");
    }
    // Another bucket.
    house.s3.bucket("other").unwrap();
    house.on("c").env("MODEL_CACHE_REMOTE", "s3://other/c").run(["get", "s3://models/cache/raw/big.bin"]).path();
    assert!(house.s3.keys("other").iter().any(|key| key.ends_with("big.bin")));
    // A folder below the folder of the remote.
    let file = house.write("far/raw/x", "x");
    let address = |path: &Path| format!("file://{}", path.display());
    let run = house.on_local("d").env("MODEL_CACHE_REMOTE", address(&house.path("far")));
    run.run(["get", &address(&file)]).path();
    assert_eq!(files_below(&house.path("far")).iter().filter(|path| path.ends_with("x")).count(), 1);
}
