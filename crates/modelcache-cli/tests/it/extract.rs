//! `--extract`: archives from every tier, damaged and hostile archives, room, kills, and what an eviction removes.

use crate::common::*;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes `name` below the temporary folder, an archive of the folder `from`. The extension decides the format.
fn archive(house: &House, name: &str, from: &str) -> PathBuf {
    let (target, from) = (house.path(name), house.path(from));
    let mut command = match name {
        name if name.ends_with(".zip") => {
            let mut command = Command::new("python3");
            let script = "import shutil, sys; shutil.make_archive(sys.argv[1][:-4], 'zip', sys.argv[2])";
            command.args(["-c", script]).arg(&target).arg(&from);
            command
        }
        _ => {
            let mut command = Command::new("tar");
            command.arg(if name.ends_with("gz") { "-czf" } else { "-cf" }).arg(&target).arg("-C").arg(&from).arg(".");
            command
        }
    };
    assert!(command.status().unwrap().success());
    target
}

/// A folder with a large file, a small one and one to be executed.
fn folder(house: &House, name: &str, seed: u64) -> BTreeMap<&'static str, Content> {
    let files = BTreeMap::from([
        ("config.json", Content::from(format!("{{\"seed\": {seed}}}").as_str())),
        ("shared.bin", Content::generated(9, 2 * MIB + 5)),
        ("1/model.bin", Content::generated(seed, 9 * MIB + 7)),
        ("bin/run", Content::from("#!/bin/sh\necho ran\n")),
    ]);
    for (path, content) in &files {
        house.write(&format!("{name}/{path}"), content.clone());
    }
    fs::set_permissions(house.path(name).join("bin/run"), fs::Permissions::from_mode(0o755)).unwrap();
    files
}

#[track_caller]
fn assert_files(found: &Path, files: &BTreeMap<&'static str, Content>) {
    let mut names: Vec<PathBuf> = files.keys().map(PathBuf::from).collect();
    names.sort();
    assert_eq!(files_below(found), names);
    files.iter().for_each(|(path, content)| assert_same(&found.join(path), content));
    assert_eq!(fs::metadata(found.join("bin/run")).unwrap().permissions().mode() & 0o777, 0o555);
}

/// Puts an archive of a folder on the remote as `m@1`. Returns the files in it, and its path.
fn put_archive(house: &House) -> (BTreeMap<&'static str, Content>, PathBuf) {
    let files = folder(house, "m", 1);
    let path = archive(house, "model.tar.gz", "m");
    house.on("a").run(["put", "--tier", "remote", "m@1", path.to_str().unwrap()]).ok();
    (files, path)
}

fn extracted(run: Run, reference: &str) -> PathBuf {
    run.run(["get", "--extract", "auto", reference]).path()
}

fn used(house: &House, dir: &str) -> u64 {
    house.on_local(dir).run(["stats", "--json"]).object()["used_bytes"].as_u64().unwrap()
}

#[test]
fn an_archive_from_the_bucket_becomes_the_folder_of_its_files() {
    let house = House::new();
    let files = folder(&house, "m", 1);
    for name in ["model.tar", "model.tar.gz", "model.zip"] {
        let path = archive(&house, name, "m");
        let reference = format!("{}@1", name.replace('.', "-"));
        house.on("a").run(["put", "--tier", "remote", &reference, path.to_str().unwrap()]).ok();
        let found =
            house.on("a").run(["get", "--extract", "auto", &reference]).path_saying(&["from remote", "extract"]);
        assert_files(&found, &files);
        // The archive itself is on the remote, so it does not stay here.
        assert!(!house.path("a/artifacts").join(name.replace('.', "-")).exists());
        house.s3.clear_requests();
        assert_eq!(extracted(house.on("a"), &reference), found);
        let offline = ["get", "--extract", "always", "--local-files-only", &reference];
        assert_eq!(house.on("a").run(offline).path_saying(&["on disk"]), found);
        assert!(house.s3.requests().is_empty());
    }
    // The files of all three are the same, and take their space once.
    let bytes: u64 = files.values().map(Content::len).sum();
    assert!(used(&house, "a") < bytes + 100_000);
    house.assert_consistent("a");
    // Without the setting, the archive is a file like any other.
    assert!(house.on("a").run(["get", "model-tar-gz@1"]).path().ends_with("model.tar.gz"));
}

#[test]
fn the_archive_is_kept_on_request_or_if_this_disk_has_the_only_copy() {
    let house = House::new();
    let (_, path) = put_archive(&house);
    extracted(house.on("a").env("MODEL_CACHE_KEEP_ARCHIVE", "1"), "m@1");
    house.on("a").run(["get", "--local-files-only", "m@1"]).path_saying(&["on disk"]);

    house.on_local("b").run(["put", "only@1", path.to_str().unwrap()]).ok();
    extracted(house.on_local("b"), "only@1");
    assert_same(&house.on_local("b").run(["get", "only@1"]).path(), &Content::on_disk(&path).unwrap());
}

#[test]
fn new_content_under_a_version_is_extracted_again() {
    let house = House::new();
    let (first, second) = (folder(&house, "one", 1), folder(&house, "two", 2));
    let (one, two) = (archive(&house, "one.tar.gz", "one"), archive(&house, "two.tar.gz", "two"));
    let put = |path: &Path, name: &str| {
        fs::copy(path, house.path(name)).unwrap();
        house.on("a").run(["put", "--force", "m@1", house.path(name).to_str().unwrap()]).ok();
    };
    put(&one, "model.tar.gz");
    assert_files(&extracted(house.on("a"), "m@1"), &first);
    assert_files(&extracted(house.on("b"), "m@1"), &first);
    put(&two, "model.tar.gz");
    assert_files(&extracted(house.on("a"), "m@1"), &second);
    let refresh = ["get", "--extract", "auto", "--refresh", "m@1"];
    assert_files(&house.on("b").run(refresh).path(), &second);

    // An eviction removes the archive and its files.
    house.on("b").run(["evict", "m@1", "--tier", "disk"]).ok();
    assert_eq!(house.listed("b").iter().filter(|key| !key.starts_with("extracted/m@")).count(), 0);
    house.on("b").run(["get", "--extract", "auto", "--local-files-only", "m@1"]).failed(3, &["m@1"]);
}

#[test]
fn a_pin_of_an_archive_protects_its_files() {
    let house = House::new();
    put_archive(&house);
    let found = extracted(house.on("a"), "m@1");
    house.on("a").run(["pin", "m@1", "--reason", "busy"]).ok();
    house.on("a").run(["evict", "m@1", "--tier", "disk"]).failed(1, &["busy"]);
    house.on("a").run(["prune", "--to", "1"]);
    assert!(found.join("config.json").exists());
    house.on("a").run(["unpin", "m@1"]).ok();
    house.on("a").run(["evict", "m@1", "--tier", "disk"]).ok();
    assert!(!found.exists());
}

#[test]
fn versions_with_one_archive_share_its_files_until_the_last_is_evicted() {
    let house = House::new();
    let files = folder(&house, "m", 1);
    let path = archive(&house, "model.tar.gz", "m");
    let evict = |version: &str| house.on("a").run(["evict", version, "--tier", "disk"]);
    for version in ["m@1", "m@2"] {
        house.on("a").run(["put", version, path.to_str().unwrap()]).ok();
        extracted(house.on("a"), version);
    }
    evict("m@1").ok();
    assert_files(&house.on("a").run(["get", "--extract", "auto", "--local-files-only", "m@2"]).path(), &files);
    evict("m@2").ok();
    assert_eq!(house.listed("a"), Vec::<String>::new());
}

#[test]
fn an_archive_whose_files_are_in_use_is_neither_evicted_nor_replaced() {
    let house = House::new();
    let files = folder(&house, "m", 1);
    folder(&house, "other", 2);
    let (path, other) = (archive(&house, "model.tar.gz", "m"), archive(&house, "model.tar", "other"));
    house.on("a").env("MODEL_CACHE_KEEP_ARCHIVE", "1").run(["put", "m@1", path.to_str().unwrap()]).ok();
    // A pin of the archive protects the files that are extracted later.
    house.on("a").run(["pin", "m@1"]).ok();
    let found = extracted(house.on("a"), "m@1");
    let digest = Content::on_disk(&path).unwrap().sha256().unwrap();
    house.on("a").run(["unpin", &format!("extracted/m@{digest}")]).ok();
    house.on("a").run(["evict", "m@1", "--tier", "disk"]).failed(1, &["m@1"]);
    house.on("a").run(["unpin", "m@1"]).ok();
    house.on("a").run(["pin", &format!("extracted/m@{digest}")]).ok();
    house.on("a").run(["evict", "m@1", "--tier", "disk"]).failed(1, &["extracted/m"]);
    house.on("a").run(["put", "--force", "m@1", other.to_str().unwrap()]).failed(1, &["extracted/m"]);
    // Neither this disk nor the remote was changed.
    assert_files(&found, &files);
    assert_files(&extracted(house.on("b"), "m@1"), &files);
}

#[test]
fn what_is_no_archive_is_returned_as_it_is_or_refused() {
    let house = House::new();
    folder(&house, "m", 1);
    let tar = archive(&house, "model.tar", "m");
    // By name an archive, by content none.
    let raw = house.write("raw.tar.gz", Content::generated(4, MIB));
    house.on("a").run(["put", "--tier", "remote", "raw@1", raw.to_str().unwrap()]).ok();
    assert_same(&extracted(house.on("a"), "raw@1"), &Content::generated(4, MIB));
    let text = house.write("text.tar.bz2", Content::from("BZhello, a text"));
    house.on("a").run(["put", "text@1", text.to_str().unwrap()]).ok();
    assert_same(&extracted(house.on("a"), "text@1"), &Content::from("BZhello, a text"));
    house
        .on("a")
        .run(["get", "--extract", "always", "raw@1"])
        .failed(5, &["raw.tar.gz is not an archive", "--extract"]);
    // By content an archive, by name a format of its own.
    fs::copy(&tar, house.path("model.nemo")).unwrap();
    house.on("a").run(["put", "nemo@1", house.path("model.nemo").to_str().unwrap()]).ok();
    assert!(extracted(house.on("a"), "nemo@1").ends_with("model.nemo"));
    assert!(house.on("a").run(["get", "--extract", "always", "nemo@1"]).path().join("config.json").exists());
    // Several files.
    house.on("a").run(["put", "tree@1", house.path("m").to_str().unwrap()]).ok();
    assert!(extracted(house.on("a"), "tree@1").join("config.json").exists());
    house.on("a").run(["get", "--extract", "always", "tree@1"]).failed(2, &["several files"]);
    house.on("a").run(["get", "--extract", "maybe", "tree@1"]).failed(2, &["auto, always or never"]);
}

#[test]
fn a_file_of_a_repository_is_extracted() {
    let house = House::new();
    let files = folder(&house, "m", 1);
    let tar = Content::on_disk(archive(&house, "model.tar.gz", "m")).unwrap();
    house.hub.repo("org/model").commit().file("sub/model.tar.gz", tar).file("README.md", "text").publish().unwrap();
    let reference = "hf://org/model@main/sub/model.tar.gz";
    assert_files(&house.on("a").run(["get", "--extract", "auto", reference]).path_saying(&["from origin"]), &files);
    let args = ["get", "--extract", "auto", "--include", "*.tar.gz", "--layout", "hub", "hf://org/model"];
    assert_files(&house.on("a").run(args).path(), &files);
    let exec = ["exec", "--extract", "auto", reference, "--", "sh", "-c", "$0/bin/run; ls $0", "{}"];
    assert_eq!(house.on("a").run(exec).ok().stdout, "ran\n1\nbin\nconfig.json\nshared.bin\n");
}

#[test]
fn wrong_bytes_leave_nothing_and_a_second_try_heals() {
    let house = House::new();
    let files = folder(&house, "m", 1);
    let tar = Content::on_disk(archive(&house, "model.tar", "m")).unwrap();
    house.hub.repo("org/model").commit().lfs("model.tar", tar).publish().unwrap();
    let reference = "hf://org/model@main/model.tar";
    // A flipped bit in the content of a file, which a tar archive cannot detect.
    house.hub.faults().add(HubFault::flip(5 * MIB).on("model.tar"));
    house.on_local("a").run(["get", "--extract", "auto", reference]).failed(5, &["model.tar"]);
    house.assert_no_artifact_or_staging("a");
    house.hub.faults().clear();
    assert_files(&extracted(house.on_local("a"), reference), &files);

    house.hub.faults().add(HubFault::flip(5 * MIB).on("model.tar").once());
    assert_files(&extracted(house.on_local("b"), reference), &files);
    house.assert_consistent("b");

    // A demanded digest is that of the archive.
    let wrong = format!("{reference}#sha256={}", "0".repeat(64));
    house.on_local("b").run(["get", "--extract", "auto", &wrong]).failed(5, &["is demanded"]);
    house.on_local("c").run(["get", "--extract", "auto", &wrong]).failed(5, &["is demanded"]);
}

#[test]
fn a_damaged_extracted_file_is_found_and_replaced() {
    let house = House::new();
    let (files, _) = put_archive(&house);
    let found = extracted(house.on("a"), "m@1");
    let file = found.join("config.json");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, "other").unwrap();
    assert_files(&extracted(house.on("a"), "m@1"), &files);
    assert_eq!(house.on("a").run(["verify"]).code, Some(0));
}

#[test]
fn an_archive_that_does_not_fit_leaves_nothing() {
    let house = House::new();
    put_archive(&house);
    let tight = || house.on("a").env("MODEL_CACHE_MAX_BYTES", "15MB");
    tight().run(["get", "--extract", "auto", "m@1"]).failed(6, &["no room", "MODEL_CACHE_MAX_BYTES"]);
    assert_eq!(house.staging("a"), Vec::<PathBuf>::new());
    assert!(house.listed("a").iter().all(|key| !key.starts_with("extracted/")));
    extracted(house.on("a"), "m@1");
}

#[test]
fn many_at_once_extract_once() {
    let house = House::new();
    let files = folder(&house, "m", 1);
    let tar = Content::on_disk(archive(&house, "model.tar.gz", "m")).unwrap();
    let bytes = tar.len();
    house.hub.repo("org/model").commit().lfs("model.tar.gz", tar).publish().unwrap();
    let args = ["get", "--extract", "auto", "hf://org/model@main/model.tar.gz"];
    let running: Vec<_> = (0..4).map(|_| house.on_local("a").start(args)).collect();
    for running in running {
        assert_files(&running.wait().path(), &files);
    }
    assert_eq!(house.hub.body_bytes(), bytes, "one download for all");
    house.assert_consistent("a");
}

#[test]
fn python_writes_archives_that_are_read() {
    // Names, sizes and times as pax records; hard links inside the archive are refused by name.
    let house = House::new();
    let script = r"
import io, sys, tarfile
def add(archive, name, content, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))
with tarfile.open(sys.argv[1] + '/pax.tar.gz', 'w:gz', format=tarfile.PAX_FORMAT) as archive:
    add(archive, 'd/' + 'n' * 150 + '/é.txt', b'long', pax_headers={'comment': 'c' * 5000})
    add(archive, 'plain', b'plain', mtime=1.5)
with tarfile.open(sys.argv[1] + '/hard.tar', 'w') as archive:
    add(archive, 'a', b'a')
    add(archive, 'b', b'', type=tarfile.LNKTYPE, linkname='a')
";
    assert!(Command::new("python3").args(["-c", script]).arg(house.path("")).status().unwrap().success());
    house.on_local("a").run(["put", "pax@1", house.path("pax.tar.gz").to_str().unwrap()]).ok();
    let found = extracted(house.on_local("a"), "pax@1");
    assert_eq!(fs::read(found.join(format!("d/{}/é.txt", "n".repeat(150)))).unwrap(), b"long");
    house.on_local("a").run(["put", "hard@1", house.path("hard.tar").to_str().unwrap()]).ok();
    let refused = house.on_local("a").run(["get", "--extract", "auto", "hard@1"]);
    refused.failed(5, &["hard.tar", "\"b\": it is a hard link", "tar --dereference"]);
}

#[test]
fn the_report_names_archive_and_files() {
    let house = House::new();
    let (_, path) = put_archive(&house);
    let report = house.on("a").run(["get", "--extract", "auto", "--json", "m@1"]).object();
    let digest = Content::on_disk(&path).unwrap().sha256().unwrap();
    assert_eq!((&report["name"], &report["version"]), (&json!("extracted/m"), &json!(digest)));
    assert_eq!((&report["files"], &report["from"]), (&json!(4), &json!("remote")));
    assert_eq!(report["bytes"]["remote"], json!(Content::on_disk(&path).unwrap().len()));
    assert_eq!(report["bytes"]["disk"], json!(0));
    let listed: Vec<Value> = house.on("a").run(["ls", "--json"]).objects();
    assert_eq!(listed.len(), 1, "{listed:?}");
    let reference = format!("extracted/m@{digest}");
    assert_eq!(house.on("a").run(["get", &reference]).path(), PathBuf::from(text(&report["path"])));
    house.on("a").run(["put", "extracted/x@1", path.to_str().unwrap()]).failed(2, &["extracted"]);
}
