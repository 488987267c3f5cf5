//! Options of `put`: expected format, sidecars, remote only. Also server-side copies and memory use.

use crate::common::*;
use modelcache_testkit::s3::S3Fault;
use modelcache_testkit::{Content, Moto, content};
use serde_json::{Value, json};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Two versions of a folder. They share a file of more than one part, a smaller file, and a tiny one.
fn versions(house: &House) -> [PathBuf; 2] {
    for (version, config) in [("v1", "{\"v\": 1}"), ("v2", "{\"v\": 2, \"more\": true}")] {
        house.write(&format!("{version}/config.json"), config);
        house.write(&format!("{version}/big.bin"), big());
        house.write(&format!("{version}/sub dir/fé+%.bin"), Content::generated(2, 100_000));
        house.write(&format!("{version}/tiny"), "tiny");
    }
    [house.path("v1"), house.path("v2")]
}

const SHARED: u64 = 9 * MIB + 4321 + 100_000;

#[track_caller]
fn put(run: Run, key: &str, path: &Path, options: &[&str]) -> Value {
    let arguments = [&["put", key, path.to_str().unwrap(), "--json"], options].concat();
    run.run(arguments).object()
}

#[track_caller]
fn assert_version(folder: &Path, version: &Path) {
    assert_eq!(files_below(folder), files_below(version));
    for file in files_below(version) {
        assert!(fs::read(folder.join(&file)).unwrap() == fs::read(version.join(&file)).unwrap(), "{}", file.display());
    }
}

/// Puts two versions from different machines and asserts that the second upload contains only the differences.
#[track_caller]
fn assert_copies(house: &House, run: impl Fn(&str) -> Run) {
    let [v1, v2] = versions(house);
    let first = put(run("a"), "team/m@1", &v1, &[]);
    assert_eq!(first["copied_bytes"], 0);
    let second = put(run("b"), "team/m@2", &v2, &[]);
    assert_eq!((&second["copied_bytes"], &second["uploaded_bytes"]), (&json!(SHARED), &json!(26)), "{second}");
    assert_version(&run("c").run(["get", "team/m@2"]).path(), &v2);
    // A copy does not depend on its source.
    run("a").run(["evict", "team/m@1", "--yes"]).ok();
    fs::remove_dir_all(house.path("c")).unwrap();
    assert_version(&run("c").run(["get", "team/m@2"]).path(), &v2);
}

#[test]
fn equal_files_of_another_version_are_copied_by_the_server() {
    let house = House::new();
    assert_copies(&house, |dir| house.on(dir));
    let sent = |seen: &&modelcache_testkit::LoggedRequest| seen.method == "POST" && seen.query.starts_with("uploads");
    assert_eq!(house.s3.requests().iter().filter(sent).count(), 1, "the big file was uploaded once");
}

#[test]
fn equal_files_of_another_version_are_copied_by_moto() {
    let Some(venv) = venv() else { return };
    let (house, moto) = (House::new(), Moto::start(venv).unwrap());
    moto.bucket(BUCKET).unwrap();
    assert_copies(&house, |dir| house.on(dir).envs(moto.env()));
}

#[test]
fn equal_files_of_another_version_are_linked_in_a_folder() {
    let house = House::new();
    let remote = house.path("remote");
    assert_copies(&house, |dir| house.on(dir).env("MODEL_CACHE_REMOTE", format!("file://{}", remote.display())));
}

#[test]
fn a_backfill_copies_equal_files_of_another_revision() {
    let house = House::new();
    let repo = house.hub.repo("org/model");
    let first = repo.commit().lfs("big.bin", big()).file("config.json", "1").publish().unwrap();
    let second = repo.commit().lfs("big.bin", big()).file("config.json", "22").publish().unwrap();
    house.on("a").run(["get", &format!("hf://org/model@{first}")]).path();
    let got = house.on("b").run(["get", &format!("hf://org/model@{second}"), "--json"]).object();
    assert_eq!((&got["copied_bytes"], &got["backfilled_bytes"]), (&json!(big().len()), &json!(2)), "{got}");
}

#[test]
fn an_object_that_differs_from_its_manifest_is_not_copied() {
    let house = House::new();
    let [v1, v2] = versions(&house);
    put(house.on("a"), "team/m@1", &v1, &[]);
    house.s3.put(BUCKET, "cache/team/m/1/big.bin", Content::generated(99, big().len())).unwrap();
    let second = put(house.on("b"), "team/m@2", &v2, &[]);
    assert_eq!(second["copied_bytes"], 100_000, "the other file is copied");
    house.s3.faults().add(S3Fault::error(501, "NotImplemented", "no").method("PUT").on("/sub dir/").once());
    let v3 = house.path("v3");
    fs::rename(&v2, &v3).unwrap();
    house.write("v3/config.json", "3");
    let third = put(house.on("b"), "team/m@3", &v3, &[]);
    assert_eq!(third["copied_bytes"], big().len(), "a refused copy is uploaded: {third}");
    assert_version(&house.on("c").run(["get", "team/m@3"]).path(), &v3);
}

#[test]
fn a_put_to_the_remote_only_needs_no_local_space() {
    let house = House::new();
    let [v1, _] = versions(&house);
    let run = || house.on("a").env("MODEL_CACHE_MAX_BYTES", "1MB");
    let report = put(run(), "team/m@1", &v1, &["--tier", "remote"]);
    assert_eq!((&report["path"], &report["on_remote"]), (&Value::Null, &json!(true)));
    assert_eq!(report["uploaded_bytes"], SHARED + 12);
    house.assert_no_artifact_or_staging("a");
    assert_eq!(files_below(&house.path("a/blobs")), Vec::<PathBuf>::new());
    assert_version(&house.on("b").run(["get", "team/m@1"]).path(), &v1);
    let everywhere = put(house.on("c"), "team/m@1", &v1, &[]);
    assert_eq!((&everywhere["sha256"], &everywhere["uploaded_bytes"]), (&report["sha256"], &json!(0)), "equal");
    house.write("v1/tiny", "more");
    run().run(["put", "team/m@1", "v1", "--tier", "remote"]).failed(1, &["other content"]);
    house.on_local("a").run(["put", "team/m@2", "v1", "--tier", "remote"]).failed(2, &["no remote is configured"]);
}

#[test]
fn a_small_file_that_changes_between_hashing_and_upload_is_refused() {
    let house = House::new();
    // Larger files are uploaded while they are hashed.
    let content = Content::generated(5, MIB);
    let file = house.write("small.bin", content.clone());
    let struck = house.s3.faults().add(S3Fault::delay(Duration::from_secs(2)).method("PUT").on("claim").once());
    let run = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "30s");
    let putting = run.start(["put", "m@1", file.to_str().unwrap(), "--tier", "remote"]);
    wait_until("it is hashed", || struck.count() > 0);
    let mut content = content.to_vec().unwrap();
    content[5] ^= 1;
    fs::write(&file, content).unwrap();
    putting.wait().failed(5, &["changed before it was sent", "put it again when no process writes to it"]);
    assert!(!house.s3.keys(BUCKET).iter().any(|key| key.ends_with("manifest.json") || key.ends_with("small.bin")));
}

#[test]
fn sidecars_are_readable_by_sha256sum_and_belong_to_the_artifact() {
    let house = House::new();
    let [v1, _] = versions(&house);
    put(house.on("a"), "team/m@1", &v1, &[]);
    let plain = house.s3.keys(BUCKET);
    let again = put(house.on("a"), "team/m@1", &v1, &["--sidecar"]);
    assert_eq!(again["uploaded_bytes"], 0, "only the sidecars are new");
    let below = house.s3.object_path(BUCKET, "cache/team/m/1");
    for folder in [below.clone(), below.join("sub dir")] {
        let check = "for sidecar in *.sha256; do sha256sum -c \"$sidecar\" || exit 1; done";
        let checked = Command::new("sh").args(["-c", check]).current_dir(&folder).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }
    assert_eq!(house.s3.keys(BUCKET).len(), plain.len() + 4);

    assert_version(&house.on("b").run(["get", "team/m@1"]).path(), &v1);
    put(house.on("c"), "team/m@1", &v1, &[]);
    house.on("c").run(["evict", "team/m@1", "--yes"]).ok();
    assert_eq!(house.s3.keys(BUCKET), [""; 0], "no object stays");

    put(house.on("d"), "team/m@1", &v1, &["--sidecar", "--tier", "remote"]);
    house.write("v1/tiny", "changed");
    put(house.on("d"), "team/m@1", &v1, &["--force"]);
    let sidecars = house.s3.keys(BUCKET).iter().filter(|key| key.ends_with(".sha256")).count();
    assert_eq!(sidecars, 0, "old sidecars are removed");
    house.write("v1/tiny.sha256", "of my own");
    house.on("d").run(["put", "team/m@2", "v1", "--sidecar"]).failed(2, &["tiny.sha256", "remove the file"]);
    house.on_local("d").run(["put", "team/m@2", "v1", "--sidecar"]).failed(2, &["no remote is configured"]);
}

#[test]
fn leftovers_of_a_killed_put_with_sidecars_are_swept() {
    let house = House::new();
    let [v1, _] = versions(&house);
    let struck = house.s3.faults().add(S3Fault::delay(Duration::from_secs(600)).method("PUT").on("manifest.json"));
    let run = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m");
    let putting = run.start(["put", "team/m@1", v1.to_str().unwrap(), "--sidecar"]);
    wait_until("all but the manifest is there", || struck.count() > 0);
    putting.signal("KILL");
    putting.wait();
    house.s3.faults().clear();
    house.end_claims();
    house.write("v1/tiny", "changed");
    fs::remove_file(v1.join("big.bin")).unwrap();
    put(house.on("a"), "team/m@1", &v1, &[]);
    let left: Vec<_> =
        house.s3.keys(BUCKET).into_iter().filter(|key| key.contains("sha256") || key.contains("big")).collect();
    assert_eq!(left, [""; 0], "swept by the next writer");
}

fn gzipped_tar(folder: &Path) -> Vec<u8> {
    Command::new("tar").args(["-czf", "-", "-C"]).arg(folder).arg(".").output().unwrap().stdout
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = Command::new("gzip").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    gzip.stdin.take().unwrap().write_all(bytes).unwrap();
    gzip.wait_with_output().unwrap().stdout
}

#[test]
fn a_file_of_another_format_than_expected_is_refused_and_its_format_named() {
    let house = House::new();
    let [v1, _] = versions(&house);
    let tensors = content::safetensors(3, &["w"], 64);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
    house.write("right/model.safetensors", tensors.clone());
    house.write("right/README.md", "# model");
    house.write("wrong/model.safetensors", pointer);
    house.write("wrong/other.safetensors", tensors.clone());
    let files = [
        ("tar.gz", house.write("model.zip", gzipped_tar(&v1))),
        ("safetensors", house.write("weights", tensors)),
        ("zstd", house.write("data", b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00".to_vec())),
        ("gguf", house.write("model.bin", b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec())),
        ("pickle", house.write("model.txt", b"\x80\x04K\x01.".to_vec())),
    ];
    for (format, file) in &files {
        put(house.on("a"), &format!("m/{}@1", format.replace('.', "-")), file, &["--expect", format]);
    }
    put(house.on("a"), "m/tree@1", &house.path("right"), &["--expect", "safetensors"]);

    let refused = |file: &Path, format: &str, message_parts: &[&str]| {
        house.on("b").run(["put", "no@1", file.to_str().unwrap(), "--expect", format]).failed(5, message_parts);
    };
    refused(
        &files[0].1,
        "zip",
        &["model.zip should be zip and is a tar archive compressed by gzip", "--expect tar.gz"],
    );
    refused(&house.write("page.tar.gz", "<!DOCTYPE html>"), "tar.gz", &["an HTML page", "download it again"]);
    refused(&house.write("one.tar.gz", gzipped(b"no archive")), "tar.gz", &["a gzip file without a tar archive"]);
    refused(&house.write("empty.onnx", ""), "onnx", &["is empty"]);
    refused(&house.path("wrong"), "safetensors", &["model.safetensors", "a Git LFS pointer", "git lfs pull"]);
    refused(&house.path("right"), "gguf", &["no file in the folder is gguf"]);
    house.on("b").run(["put", "no@1", "weights", "--expect", "toast"]).said(&["toast", "known formats: tar.gz"]);
    house.assert_no_artifact_or_staging("b");
    assert!(!house.s3.keys(BUCKET).iter().any(|key| key.contains("/no/")));
}

#[test]
fn the_format_is_in_the_manifest_and_in_every_listing() {
    let house = House::new();
    let tensors = content::safetensors(3, &["w"], 64);
    house.hub.repo("org/model").commit().file("model.safetensors", tensors).file("a.json", "{}").publish().unwrap();
    let reference = "hf://org/model";
    house.on("a").run(["get", reference]).path();
    for (dir, list) in [("a", &["ls", "--json"][..]), ("b", &["ls", "--json", "--remote"])] {
        assert_eq!(house.on(dir).run(list).object()["formats"], json!(["safetensors"]));
    }
    let shown = house.on("a").run(["inspect", reference]).ok().stdout;
    assert!(shown.contains("FORMAT") && shown.contains("safetensors  yes"), "{shown}");
    let inspection = house.on("a").run(["inspect", "--json", reference]).object();
    assert_eq!(
        (&inspection["files"][0]["format"], &inspection["files"][1]["format"]),
        (&Value::Null, &json!("safetensors"))
    );
    assert!(house.on("a").run(["ls"]).ok().stdout.contains("safetensors"));
}

/// Up to sixteen files are uploaded at once, each in several parts. The memory bound is for all of them together.
#[test]
fn many_large_files_are_uploaded_within_bounded_memory() {
    const FILES: u64 = 8;
    let house = House::new();
    (0..FILES).for_each(|n| drop(house.write(&format!("many/{n}.bin"), Content::generated(n, 25 * MIB))));
    let measure = |run: Run, args: &[&str]| {
        let (outcome, peak) = run.env("MODEL_CACHE_READ_TIMEOUT", "30s").start(args).wait_with_peak_memory();
        outcome.ok();
        assert!(peak > MIB, "it was measured");
        assert!(peak < 128 * MIB, "{} MiB at most with {args:?}", peak / MIB);
    };
    measure(house.on("a"), &["put", "m@1", "many", "--tier", "remote"]);
    let run = || house.on("b").env("MODEL_CACHE_BACKFILL", "later");
    run().run(["get", &format!("file://{}", house.path("many").display())]).path();
    measure(run(), &["backfill"]);
    assert_eq!(house.pending("b"), (0, 0));
}

#[test]
fn a_forced_put_that_the_remote_refuses_keeps_the_old_content() {
    let house = House::new();
    let (old, new) = (house.write("old", "old"), house.write("new", "new"));
    house.on_local("a").run(["put", "m@1", old.to_str().unwrap()]).ok();
    for fault in [S3Fault::access_denied().method("PUT"), S3Fault::wrong_region("eu-west-1")] {
        house.s3.faults().add(fault);
        let refused = house.on("a").run(["put", "m@1", new.to_str().unwrap(), "--force"]);
        assert_ne!(refused.code, Some(0), "{refused}");
        house.s3.faults().clear();
        assert_same(&house.on_local("a").run(["get", "m@1"]).path(), &"old".into());
    }
    house.on("a").run(["put", "m@1", new.to_str().unwrap(), "--force"]).ok();
    assert_same(&house.on_local("a").run(["get", "m@1"]).path(), &"new".into());
    assert_same(&house.on("b").run(["get", "m@1"]).path(), &"new".into());
}

#[test]
fn a_link_out_of_the_folder_is_followed_on_request_only() {
    let house = House::new();
    house.write("t/sub/inside", "inside");
    house.write("secret/outside", "outside");
    symlink("sub/inside", house.path("t/link")).unwrap();
    let tree = house.path("t");
    put(house.on_local("a"), "t@1", &tree, &[]);
    symlink("../secret/outside", house.path("t/file")).unwrap();
    symlink(house.path("secret"), house.path("t/sub/folder")).unwrap();
    let refused = house.on_local("a").run(["put", "t@2", tree.to_str().unwrap()]);
    refused.failed(2, &["t/file is a symbolic link to", "secret/outside", "--follow-links", "--exclude"]);
    put(house.on_local("a"), "t@3", &tree, &["--exclude", "file", "--exclude", "sub/folder/"]);
    put(house.on_local("a"), "t@4", &tree, &["--follow-links"]);
    let files = |version: &str| files_below(&house.on_local("a").run(["get", &format!("t@{version}")]).path());
    assert_eq!(files("3"), ["link", "sub/inside"].map(PathBuf::from));
    assert_eq!(files("4"), ["file", "link", "sub/folder/outside", "sub/inside"].map(PathBuf::from));
    // The path on the command line may be a link.
    symlink(&tree, house.path("tree")).unwrap();
    put(house.on_local("a"), "t@5", &house.path("tree"), &["--exclude", "[f]*", "--exclude", "*/folder/*"]);
    assert_eq!(files("5"), files("3"));
}

#[test]
fn excluded_files_and_the_marker_of_a_materialized_folder_are_not_published() {
    let house = House::new();
    for path in ["t/a.bin", "t/run.log", "t/logs/x", "t/logs/deep/y"] {
        house.write(path, path);
    }
    // Excluded entries are not examined.
    symlink("nowhere", house.path("t/dangling.log")).unwrap();
    put(house.on_local("a"), "t@1", &house.path("t"), &["--exclude", "*.log", "--exclude", "logs/"]);
    let got = house.path("work");
    house.on_local("a").run(["get", "t@1", "--into", got.to_str().unwrap()]).ok();
    assert_eq!(files_below(&got), [".modelcache.json", "a.bin"].map(PathBuf::from));
    house.write("work/b.bin", "b");
    put(house.on_local("a"), "t@2", &got, &[]);
    assert_eq!(files_below(&house.on_local("a").run(["get", "t@2"]).path()), ["a.bin", "b.bin"].map(PathBuf::from));
    house.on_local("a").run(["put", "t@3", got.to_str().unwrap(), "--exclude", "*"]).failed(2, &["holds no files"]);
}

#[test]
fn executable_files_stay_executable_on_every_machine() {
    let house = House::new();
    // Equal content at a plain and at an executable path.
    for (path, executable) in [("plain", false), ("bin/run.sh", true), ("bin/same", true), ("big", true)] {
        let content: Content = if path == "big" { big() } else { "#!/bin/sh\necho ran\n".into() };
        let file = house.write(&format!("tree/{path}"), content);
        fs::set_permissions(file, fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 })).unwrap();
    }
    fs::create_dir_all(house.path("tree/none/at/all")).unwrap();
    house.write("other/plain", "#!/bin/sh\necho ran\n");
    house.write("other/big", big());
    let assert_modes = |folder: &Path, separate: bool| {
        let [plain, executable] = if separate { [0o644, 0o755] } else { [0o444, 0o555] };
        for (path, expected) in
            [("plain", plain), ("bin/run.sh", executable), ("bin/same", executable), ("big", executable)]
        {
            let found = fs::metadata(folder.join(path)).unwrap().permissions().mode() & 0o777;
            assert_eq!(found, expected, "{path} in {}", folder.display());
        }
        let ran = Command::new(folder.join("bin/run.sh")).output().unwrap();
        assert_eq!(ran.stdout, b"ran\n");
    };
    let put = house.on("a").run(["put", "t@1", "tree"]).ok();
    assert_eq!(put.stderr.matches("empty folders are not kept").count(), 1, "{put}");
    assert_modes(&house.on("a").run(["get", "t@1"]).path(), false);
    let used = |dir: &str| house.on(dir).run(["stats", "--json"]).object()["used_bytes"].as_u64().unwrap();
    assert!(used("a") < 2 * big().len(), "the large executable file takes space once");
    // On another machine, from the remote; then beside an artifact in which the same content is not executable.
    for (dir, first) in [("b", "t@1"), ("c", "o@1")] {
        house.on("a").run(["put", "o@1", "other"]).ok();
        house.on(dir).run(["get", first]).path();
        let other = house.on(dir).run(["get", "o@1"]).path();
        let tree = house.on(dir).run(["get", "t@1"]).path();
        assert_modes(&tree, false);
        for path in ["plain", "big"] {
            assert_eq!(fs::metadata(other.join(path)).unwrap().permissions().mode() & 0o777, 0o444, "{path}");
        }
        assert_modes(&house.on(dir).run(["get", "t@1", "--into", &format!("{dir}-links")]).path(), false);
        assert_modes(
            &house.on(dir).run(["get", "t@1", "--into", &format!("{dir}-copies"), "--link", "copy"]).path(),
            true,
        );
        house.on(dir).run(["verify"]).ok();
        house.assert_nothing_leaked(dir);
        // A blob with a link outside the directory stays when its artifact is evicted.
        fs::remove_dir_all(house.path(&format!("{dir}-links"))).unwrap();
        house.on(dir).run(["evict", "o@1", "--tier", "disk"]).ok();
        assert_modes(&tree, false);
        house.on(dir).run(["evict", "t@1", "--tier", "disk"]).ok();
        assert_eq!(house.on(dir).run(["stats", "--json"]).object()["used_bytes"], 0);
    }
    // The origin is a folder.
    let folder = format!("file://{}", house.path("tree").display());
    let version = house.on("d").run(["get", &folder]).path();
    assert_modes(&version, false);
    fs::set_permissions(house.path("tree/plain"), fs::Permissions::from_mode(0o755)).unwrap();
    let changed = house.on("d").run(["get", &folder]).path();
    assert_eq!(fs::metadata(changed.join("plain")).unwrap().permissions().mode() & 0o777, 0o555, "another version");
}

#[test]
fn a_put_that_only_takes_the_executable_bit_away_says_that_it_stays() {
    let house = House::new();
    let file = house.write("tree/run.sh", "#!/bin/sh\n");
    let set_mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    for has_remote in [true, false] {
        let run = || if has_remote { house.on("a") } else { house.on_local("b") };
        let put = || run().run(["put", "t@1", "tree"]).ok();
        set_mode(0o755);
        put();
        assert!(!put().stderr.contains("stay executable"));
        set_mode(0o644);
        assert_eq!(put().stderr.matches("stay executable").count(), 1, "remote: {has_remote}");
    }
}
