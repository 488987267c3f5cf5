//! `get --into`: the folder is replaced as a whole, or not at all.

use crate::common::*;
use modelcache_testkit::Content;
use serde_json::json;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const MARKER: &str = ".modelcache.json";

/// Asserts that `folder` holds exactly the files of `org/model` and the marker.
#[track_caller]
fn assert_materialized(folder: &Path) {
    let mut expected: Vec<PathBuf> = model().iter().map(|(path, _)| PathBuf::from(path)).collect();
    expected.push(MARKER.into());
    expected.sort();
    assert_eq!(files_below(folder), expected);
    model().iter().for_each(|(path, content)| assert_same(&folder.join(path), content));
}

/// Asserts that no temporary folder is left beside the target.
#[track_caller]
fn assert_no_leftover(house: &House) {
    let names = fs::read_dir(house.path(".")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.contains(".modelcache-")).collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn the_folder_is_printed_and_holds_the_files_and_another_version_replaces_all_of_it() {
    let (house, _) = House::with_model();
    house.hub.repo("org/other").commit().file("only", "other").publish().unwrap();
    let out = house.path("out");
    let get = |reference: &str| house.on_local("a").run(["get", reference, "--into", "out"]);
    assert_eq!(get("hf://org/model").path_saying(&["4 files hard-linked (read-only)"]), out);
    assert_materialized(&out);
    let [view, file] = [house.on_local("a").run(["get", "hf://org/model"]).path(), out.clone()]
        .map(|folder| fs::metadata(folder.join("config.json")).unwrap());
    assert_eq!((view.ino(), file.permissions().mode() & 0o777), (file.ino(), 0o444));

    get("hf://org/other").path();
    assert_eq!(files_below(&out), [PathBuf::from(MARKER), "only".into()], "no file of the old version stays");
    assert_no_leftover(&house);
    house.on_local("a").run(["get", "hf://org/model", "--local-dir", "out/"]).path();
    assert_materialized(&out);
}

#[test]
fn each_link_mode_is_used_on_request_and_reported() {
    let (house, _) = House::with_model();
    for (how, files, symlink) in [("hard", 4, false), ("copy", 4, false), ("symlink", 4, true)] {
        let args = ["get", "hf://org/model", "--into", how, "--link", how, "--json"];
        let made = house.on_local("a").run(args).object();
        assert_eq!((&made["path"], &made["into"]["links"]), (&json!(house.path(how)), &json!({how: files})));
        assert_materialized(&house.path(how));
        assert_eq!(fs::symlink_metadata(house.path(how).join("empty")).unwrap().is_symlink(), symlink);
    }
    let copied = fs::metadata(house.path("copy/config.json")).unwrap();
    assert_eq!(copied.nlink(), 1);
    fs::write(house.path("copy/config.json"), "mine").unwrap();
    house.on_local("a").run(["get", "hf://org/model", "--into", "s", "--link", "symlink"]).ok().said(&["breaks them"]);
    house.on_local("a").run(["evict", "--tier", "disk", "hf://org/model"]).ok();
    assert_same(&house.path("hard/model.safetensors"), &big());
}

#[test]
fn a_single_file_is_in_the_folder_under_its_path() {
    let (house, _) = House::with_model();
    let file = house.on_local("a").run(["get", "hf://org/model@main/sub dir/fé+%.txt", "--into", "x/out"]).path();
    assert_eq!(file, house.path("x/out/sub dir/fé+%.txt"));
    assert_same(&file, &"odd name".into());
    let part = house.on_local("a").run(["get", "hf://org/model", "--include", "*.json", "--into", "x/out"]).path();
    assert_eq!(files_below(&part), [PathBuf::from(MARKER), "config.json".into()]);
}

#[test]
fn files_of_other_programs_are_never_removed() {
    let (house, _) = House::with_model();
    let get = |dir: &str| house.on_local("a").run(["get", "hf://org/model", "--into", dir]);
    house.write("foreign/notes.txt", "mine");
    get("foreign").failed(1, &["notes.txt", "did not put there"]);
    assert_eq!(house.hub.body_bytes(), 0, "refused before any download");
    fs::create_dir(house.path("empty")).unwrap();
    get("empty").path();
    house.write("empty/checkpoints/1", "mine");
    get("empty").failed(1, &["checkpoints/1"]);
    assert_same(&house.path("empty/checkpoints/1"), &"mine".into());
    house.write("file", "mine");
    get("file").failed(2, &["is not a folder"]);
    get(".").failed(2, &["runs in"]);
    get("a/out").failed(2, &["outside the cache directory"]);
    let two = ["get", "hf://org/model", "hf://org/model", "--into", "two"];
    house.on_local("a").run(two).failed(2, &["--into takes one reference"]);
    house.on_local("a").run(["get", "hf://org/model", "--link", "copy"]).said(&["--into"]);
}

#[test]
fn files_changed_by_the_user_are_never_removed() {
    let (house, _) = House::with_model();
    let get = || house.on_local("a").run(["get", "hf://org/model", "--into", "out", "--link", "copy"]);
    get().path();
    get().path();
    fs::write(house.path("out/config.json"), "tuned").unwrap();
    get().failed(1, &["config.json", "changed since"]);
    assert_same(&house.path("out/config.json"), &"tuned".into());
    house.write(".out.modelcache-backup/notes", "mine");
    fs::remove_file(house.path("out/config.json")).unwrap();
    get().path();
    assert_same(&house.path(".out.modelcache-backup/notes"), &"mine".into());
}

#[test]
fn a_copy_of_damaged_bytes_is_refused_and_the_old_folder_stays() {
    let (house, _) = House::with_model();
    let copy = || house.on_local("a").run(["get", "hf://org/model", "--into", "out", "--link", "copy"]);
    copy().path();
    let view = house.on_local("a").run(["get", "hf://org/model"]).path().join("model.safetensors");
    let mtime = fs::metadata(&view).unwrap().modified().unwrap();
    fs::set_permissions(&view, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::File::options().write(true).open(&view).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", 7).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(mtime)).unwrap();
    copy().failed(5, &["model.safetensors are wrong"]);
    assert_materialized(&house.path("out"));
    assert_no_leftover(&house);
}

#[test]
fn the_temporary_folder_of_a_killed_call_is_removed_by_the_next_one() {
    let (house, _) = House::with_model();
    house.write(".out.modelcache-0123456789abcdef/model.safetensors", Content::generated(9, MIB));
    house.on_local("a").run(["get", "hf://org/model", "--into", "out"]).path();
    assert_no_leftover(&house);
}

#[test]
fn on_another_filesystem_files_are_copied_and_refusals_precede_the_download() {
    if !can_mount() {
        return;
    }
    let (house, _) = House::with_model();
    fs::create_dir(house.path("mnt")).unwrap();
    let mounted = "mount -t tmpfs none mnt";
    let refused = |before: &str, args: &[&str], code, said: &[&str]| {
        let get = [&["get", "hf://org/model", "--into"], args].concat();
        house.on_local("b").run_after(before, &get).failed(code, said);
        assert_eq!(house.hub.body_bytes(), 0, "refused before any download: {args:?}");
    };
    refused(mounted, &["mnt/out", "--link", "hard"], 1, &["--link auto"]);
    let small = "mount -t tmpfs -o size=1m none mnt";
    refused(small, &["mnt/out"], 6, &["has no room", "free space"]);
    refused(small, &["mnt"], 6, &["has no room"]);
    let read_only = "mount -t tmpfs -o ro none mnt";
    refused(read_only, &["mnt"], 1, &["may write to"]);
    refused(read_only, &["mnt/new/out"], 1, &["may write to"]);
    refused("mount -t tmpfs none mnt; echo mine > mnt/notes.txt", &["mnt"], 1, &["notes.txt", "did not put there"]);

    house.on_local("a").run(["get", "hf://org/model"]).path();
    let copied = house.on_local("a").run_after(mounted, &["get", "hf://org/model", "--into", "mnt/out", "--json"]);
    assert_eq!(copied.object()["into"]["links"], json!({"copy": 4}));
}

#[test]
fn a_link_to_nowhere_and_a_tilde_are_refused_before_the_download() {
    let (house, _) = House::with_model();
    std::os::unix::fs::symlink("nowhere", house.path("link")).unwrap();
    let into = |folder: &str| house.on_local("a").run(["get", "hf://org/model", "--into", folder]);
    into(house.path("link").to_str().unwrap()).failed(2, &["symbolic link to a folder that does not exist"]);
    into("~/models").failed(2, &["the shell did not expand", "$HOME"]);
    house.assert_no_artifact_or_staging("a");
}

#[test]
fn a_mount_point_is_filled_and_updated_in_place() {
    if !can_mount() {
        return;
    }
    let (house, _) = House::with_model();
    house.hub.repo("org/other").commit().file("only", "other").publish().unwrap();
    fs::create_dir(house.path("mnt")).unwrap();
    // The same filesystem at another mount, which no hard link can reach, and one that has no room for
    // the files twice.
    for mount in ["mkdir bound; mount --bind bound mnt", "mount -t tmpfs -o size=14m none mnt"] {
        let script = format!(
            "{mount}; mkdir mnt/lost+found
            {BIN} get hf://org/model --into mnt | grep -qx \"$PWD/mnt\"
            ls -AR mnt >first; ls -i mnt/model.safetensors >inode
            {BIN} get hf://org/model --into mnt/ --link copy
            ls -i mnt/model.safetensors | diff inode -
            cp -r mnt filled
            {BIN} get hf://org/other --into mnt
            find mnt -type f | sort >second
            echo mine >mnt/only2; ! {BIN} get hf://org/model --into mnt 2>refusal; rm mnt/only2
            grep -q 'only2, which modelcache did not put there' refusal
            {BIN} get hf://org/model --into mnt
            ls -AR mnt | diff first -"
        );
        house.on_local("a").script(&script, &[]).ok().said(&["4 files copied"]);
        fs::remove_dir(house.path("filled/lost+found")).unwrap();
        assert_materialized(&house.path("filled"));
        assert_eq!(fs::read_to_string(house.path("second")).unwrap(), "mnt/.modelcache.json\nmnt/only\n");
        fs::remove_dir_all(house.path("filled")).unwrap();
    }
}
