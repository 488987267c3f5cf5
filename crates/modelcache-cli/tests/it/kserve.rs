//! `storage-initializer` under the conditions of KServe, and beside KServe's own from PyPI.

use crate::common::*;
use modelcache_testkit::{Content, Page, Web};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What KServe's image runs, without its command line.
const THEIRS: &str = "import sys; from kserve_storage import Storage; Storage.download(*sys.argv[1:])";

/// Returns the SHA-256 of each file below `folder`, without the notes of either program. Follows symbolic links, which
/// KServe makes to local files and folders.
fn sums(folder: &Path) -> BTreeMap<PathBuf, String> {
    let (mut sums, mut folders) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(inside) = folders.pop() {
        for entry in fs::read_dir(folder.join(&inside)).unwrap() {
            let path = inside.join(entry.unwrap().file_name());
            let found = folder.join(&path);
            if path.starts_with(".cache") || path == Path::new(".modelcache.json") {
                continue;
            }
            match found.is_dir() {
                true => folders.push(path),
                false => drop(sums.insert(path, Content::on_disk(&found).unwrap().sha256().unwrap())),
            }
        }
    }
    sums
}

/// Puts a model into the bucket, as other tools do: a prefix, and archives of it.
fn in_bucket(house: &House) {
    let files = [("config.json", Content::from("{}")), ("1/model.bin", Content::generated(1, 9 * MIB + 7))];
    for (path, content) in files {
        house.write(&format!("m/{path}"), content.clone());
        house.s3.put(BUCKET, &format!("tree/{path}"), content).unwrap();
    }
    let run = |program: &str, args: &[&str]| {
        let status = Command::new(program).args(args).current_dir(house.path("")).status().unwrap();
        assert!(status.success(), "{program} {args:?}");
    };
    run("tar", &["-czf", "model.tar.gz", "-C", "m", "."]);
    run("python3", &["-c", "import shutil; shutil.make_archive('model', 'zip', 'm')"]);
    for name in ["model.tar.gz", "model.zip"] {
        house.s3.put(BUCKET, &format!("archives/{name}"), Content::on_disk(house.path(name)).unwrap()).unwrap();
    }
}

fn initializer(house: &House) -> Run {
    // Not the house's remote: the sources are read from the bucket by the credentials of AWS.
    house.on_local("unused").without("MODEL_CACHE_DIR").without("MODEL_CACHE_DURABLE").envs(house.s3.env())
}

#[test]
fn every_source_gives_the_files_of_kserves_own_initializer() {
    let Some(venv) = venv() else { return };
    let (house, web) = (House::new(), Web::start().unwrap());
    in_bucket(&house);
    let repo = house.hub.repo("org/model");
    let commit = repo.commit().file("config.json", "{}").generated("model.safetensors", 3, 9 * MIB).publish().unwrap();
    repo.tag("v1", &commit);
    let page = |name: &str, kind: &str| {
        web.put(
            &format!("/{name}"),
            Page::of(Content::on_disk(house.path(name)).unwrap()).header("Content-Type", kind),
        );
    };
    page("model.tar.gz", "application/gzip");
    page("model.zip", "application/zip");
    house.write("weights.bin", Content::generated(4, MIB));
    page("weights.bin", "application/octet-stream");
    let local = house.path("m").display().to_string();
    let sources = [
        format!("s3://{BUCKET}/tree"),
        format!("s3://{BUCKET}/archives/model.tar.gz"),
        format!("s3://{BUCKET}/archives/model.zip"),
        format!("s3://{BUCKET}/tree/config.json"),
        "hf://org/model".to_owned(),
        "hf://org/model:v1".to_owned(),
        format!("{}/model.tar.gz", web.url()),
        format!("{}/model.zip", web.url()),
        format!("{}/weights.bin", web.url()),
        format!("file://{local}"),
        local,
    ];
    for (number, source) in sources.iter().enumerate() {
        let (ours, theirs) = (house.path(&format!("ours/{number}")), house.path(&format!("theirs/{number}")));
        fs::create_dir_all(&theirs).unwrap();
        let mut command = Command::new(venv.join("bin/python"));
        command.args(["-c", THEIRS, source]).arg(&theirs).env_clear().envs(house.s3.env());
        command.env("HF_ENDPOINT", house.hub.url()).env("HOME", house.path("home")).env("PATH", "/usr/bin:/bin");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
        fs::create_dir_all(&ours).unwrap();
        initializer(&house).run(["storage-initializer", source, ours.to_str().unwrap()]).ok();
        assert_eq!(sums(&ours), sums(&theirs), "{source}");
        // Nothing is left beside the destination.
        let beside = fs::read_dir(house.path("ours")).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(beside.into_iter().all(|name| !name.to_str().unwrap().starts_with('.')), "{source}");
    }
}

#[test]
fn a_volume_is_filled_by_another_user_on_a_read_only_root() {
    if !can_mount() {
        return;
    }
    let house = House::new();
    in_bucket(&house);
    let there = house.path("").display().to_string();
    fs::set_permissions(house.path(""), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::create_dir_all(house.path("models")).unwrap();
    // An emptyDir is a mount point that belongs to the user of the pod.
    let script = format!(
        "mount -t tmpfs -o uid=1000,mode=755 none models\n\
         mount --rbind '{there}' '{there}'; mount -o remount,bind,ro '{there}'\n\
         setpriv --reuid=1000 --regid=1000 --clear-groups {BIN} \"$@\"\n\
         find models -type f | sort; stat -c %u models/config.json"
    );
    let source = format!("s3://{BUCKET}/archives/model.tar.gz");
    let outcome = initializer(&house).script(&script, &["storage-initializer", &source, "models"]);
    assert_eq!(outcome.ok().stdout, "models/.modelcache.json\nmodels/1/model.bin\nmodels/config.json\n1000\n");
}

#[test]
fn a_node_shares_what_its_pods_download() {
    let house = House::new();
    in_bucket(&house);
    let source = format!("s3://{BUCKET}/archives/model.tar.gz");
    for pod in ["one", "two"] {
        let run = initializer(&house).env("MODEL_CACHE_DIR", house.path("node"));
        run.run(["storage-initializer", &source, pod]).ok();
        assert_eq!(sums(&house.path(pod)), sums(&house.path("m")));
        assert!(house.path("node").exists(), "a configured directory stays");
        let gets = house.s3.object_gets("model.tar.gz").into_iter().filter(|get| get.path.ends_with(".gz")).count();
        assert_eq!(gets > 0, pod == "one", "the second pod downloads nothing");
        house.s3.clear_requests();
    }
}

#[test]
fn the_digest_and_the_patterns_of_kserve_are_obeyed() {
    let house = House::new();
    in_bucket(&house);
    let source = format!("s3://{BUCKET}/archives/model.tar.gz");
    let digest = Content::on_disk(house.path("model.tar.gz")).unwrap().sha256().unwrap();
    let with = |digest: &str| initializer(&house).env("VERIFICATION_DIGEST", digest);
    with(&format!("sha256:{digest}")).run(["storage-initializer", &source, "right"]).ok();
    with(&format!("sha256:{}", "0".repeat(64)))
        .run(["storage-initializer", &source, "wrong"])
        .failed(1, &["sha256 mismatch"]);
    assert!(!house.path("wrong").exists());
    with("md5:0").run(["storage-initializer", &source, "wrong"]).failed(1, &["VERIFICATION_DIGEST", "64 hex digits"]);
    let pairs = ["storage-initializer", &source, "a", &source, "b"];
    with(&digest).run(pairs).failed(1, &["several sources"]);

    let run = initializer(&house).env("STORAGE_CONFIG", "{secret");
    run.run(["storage-initializer", &source, "x"]).failed(1, &["STORAGE_CONFIG is not a JSON object"]);

    let run = initializer(&house).env("STORAGE_IGNORE_PATTERNS", json!(["*.bin"]).to_string());
    run.run(["storage-initializer", &format!("s3://{BUCKET}/tree"), "some"]).ok();
    assert_eq!(sums(&house.path("some")).into_keys().collect::<Vec<_>>(), [PathBuf::from("config.json")]);
}

#[test]
fn several_pairs_are_filled_and_every_failure_ends_with_1() {
    let house = House::new();
    in_bucket(&house);
    let (tree, file) = (format!("s3://{BUCKET}/tree"), format!("s3://{BUCKET}/tree/config.json"));
    initializer(&house).run(["storage-initializer", &tree, "one", &file, "two"]).ok();
    assert_eq!(sums(&house.path("one")), sums(&house.path("m")));
    assert_eq!(sums(&house.path("two")).into_keys().collect::<Vec<_>>(), [PathBuf::from("config.json")]);
    for (args, part) in [
        (&[tree.as_str(), "x", &tree][..], "has no destination"),
        (&["gs://bucket/model", "x"], "gs://"),
        (&[&format!("s3://{BUCKET}/none"), "x"], "none"),
        (&["hf://org/none", "x"], "no repository"),
        (&[&tree, "x", &tree, "x/y"], "one contains the other"),
    ] {
        initializer(&house).run(["storage-initializer"].iter().chain(args)).failed(1, &[part]);
    }
}
