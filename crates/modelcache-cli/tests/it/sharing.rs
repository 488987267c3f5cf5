//! A cache directory shared by several users and mounts, and filesystems that refuse links, writes or locks.

use crate::common::*;
use modelcache_testkit::Content;
use serde_json::json;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

const REF: &str = "hf://org/model@main";
const OTHER: &str = "hf://org/other@main";

/// An environment that other users can enter, with a second repository: the big file of `org/model` and a file of its
/// own.
fn open_house() -> House {
    let (house, _) = House::with_model();
    house.hub.repo("org/other").commit().file("weights", big()).file("own", "own").publish().unwrap();
    chmod(&house.path(""), 0o755);
    let open = house.path("open");
    fs::create_dir(&open).unwrap();
    chmod(&open, 0o777);
    house
}

/// Runs the binary as another user with umask 077.
#[track_caller]
fn by(user: (u32, u32), run: Run, args: &[&str]) -> Outcome {
    let (uid, gid) = user;
    let become_user = format!("setpriv --reuid={uid} --regid={gid} --clear-groups");
    run.script(&format!("umask 077\nexec {become_user} {BIN} \"$@\""), args)
}

/// Runs a shell script as another user.
#[track_caller]
fn by_shell(user: (u32, u32), run: Run, script: &str, args: &[&str]) -> Outcome {
    let (uid, gid) = user;
    let setpriv = format!("exec setpriv --reuid={uid} --regid={gid} --clear-groups");
    run.script(&format!("{setpriv} sh -c '{script}' sh \"$@\""), args)
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn used_bytes(house: &House, dir: &str) -> u64 {
    house.on_local(dir).run(["stats", "--json"]).object()["used_bytes"].as_u64().unwrap()
}

/// Returns the bytes of the blobs, quarantined files and views of `dir`. Each inode counts once.
fn stored_bytes(house: &House, dir: &str) -> u64 {
    let mut inodes = std::collections::BTreeMap::new();
    for part in ["blobs", "quarantine", "artifacts"] {
        let folder = house.path(dir).join(part);
        for file in files_below(&folder).iter().map(|file| folder.join(file)) {
            if part != "artifacts" || file.components().any(|part| part.as_os_str() == "files") {
                let metadata = fs::symlink_metadata(&file).unwrap();
                inodes.insert(metadata.ino(), metadata.blocks() * 512);
            }
        }
    }
    inodes.values().sum()
}

#[track_caller]
fn assert_counted(house: &House, dir: &str) {
    let used = used_bytes(house, dir);
    assert_eq!(used, stored_bytes(house, dir), "the record is exact");
    fs::remove_file(house.path(dir).join("locks/budget")).unwrap();
    assert_eq!(used_bytes(house, dir), used, "counting again finds the same");
}

fn two_users_share(sharing: &str, a: (u32, u32), b: (u32, u32), modes: (u32, u32)) {
    if !can_mount() {
        return;
    }
    let house = open_house();
    let dir = "open/cache";
    let on = || house.on_local(dir).env("MODEL_CACHE_SHARED", sharing);
    assert_model(&by(a, on(), &["get", REF]).path());
    let cache = house.path(dir);
    for folder in ["", "blobs", "artifacts", "locks", "refs"] {
        assert_eq!(mode(&cache.join(folder)), modes.0 | 0o1000, "{folder} is sticky");
    }
    for folder in ["staging", "quarantine", "backfill", "lower"] {
        assert_eq!(mode(&cache.join(folder)), modes.0, "{folder}");
    }
    for file in files_below(&cache.join("locks")) {
        assert_eq!(mode(&cache.join("locks").join(&file)), modes.1, "{file:?}");
    }
    for file in files_below(&cache.join("artifacts")) {
        let expected = match file.file_name().unwrap().to_str().unwrap() {
            "manifest.json" => 0o644,
            "last-used" => modes.1,
            _ => 0o444,
        };
        assert_eq!(mode(&cache.join("artifacts").join(&file)), expected, "{file:?}");
    }

    let last_used = files_below(&cache).into_iter().find(|path| path.ends_with("last-used")).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(86_400);
    fs::File::open(cache.join(&last_used)).unwrap().set_modified(long_ago).unwrap();
    house.hub.clear_requests();
    assert_model(&by(b, on(), &["get", REF]).path_saying(&["on disk"]));
    assert_eq!(house.hub.body_bytes(), 0, "the second user fetches nothing");
    let touched = fs::metadata(cache.join(&last_used)).unwrap().modified().unwrap();
    assert!(touched > long_ago + Duration::from_secs(3600), "the second user touches the last use");

    // The kernel refuses a link to another user's read-only blob.
    let other = by(b, on(), &["get", OTHER, "--json"]).said(&["copy"]).object();
    assert_eq!((&other["link"], &other["from"]), (&json!("copy"), &json!("origin")));
    assert_eq!(house.hub.body_bytes(), "own".len() as u64, "a file that can be copied is not fetched");
    assert_same(Path::new(&text(&other["path"])).join("weights").as_path(), &big());
    assert_counted(&house, dir);

    for reference in [REF, OTHER] {
        for user in [b, a] {
            by(user, on(), &["get", reference]).path_saying(&["on disk"]);
        }
    }
    by(b, on(), &["evict", REF, "--tier", "disk"]).ok();
    assert_counted(&house, dir);
    assert_same(&by(a, on(), &["get", OTHER]).path_saying(&["on disk"]).join("weights"), &big());
    by(a, on(), &["evict", OTHER, "--tier", "disk"]).ok();
    assert_eq!((used_bytes(&house, dir), stored_bytes(&house, dir)), (0, 0), "both are gone, and so are the copies");
}

#[test]
fn two_users_of_one_group_share_a_directory() {
    two_users_share("group", (1001, 2000), (1002, 2000), (0o2775, 0o664));
}

#[test]
fn any_two_users_share_a_directory_that_is_open_to_the_world() {
    two_users_share("world", (1001, 1001), (1002, 1002), (0o777, 0o666));
}

#[test]
fn a_file_that_one_user_may_not_read_stays_in_service_for_the_others() {
    let (house, a, b) = (open_house(), (12_001, 12_001), (12_002, 12_002));
    let on = || house.on_local("open/cache").env("MODEL_CACHE_SHARED", "world");
    let view = by(a, on(), &["get", REF]).path().join("config.json");
    chmod(&view, 0o000);
    // A changed modification time means that the file has to be hashed.
    fs::File::open(&view).unwrap().set_modified(SystemTime::now()).unwrap();
    by(b, on(), &["get", REF]).failed(8, &["cannot open", "config.json", "Permission denied"]);
    let verified = by(b, on(), &["verify"]);
    assert_eq!(verified.code, Some(5), "{verified}");
    assert!(verified.stdout.contains("config.json: cannot be read"), "{verified}");
    assert!(!verified.stdout.contains("withdrawn"), "{verified}");
    chmod(&view, 0o444);
    house.hub.clear_requests();
    assert_model(&by(b, on(), &["get", REF]).path_saying(&["on disk"]));
    assert_eq!(house.hub.body_bytes(), 0);
}

#[test]
fn private_folders_of_one_user_do_not_stop_the_others() {
    let (a, b) = ((12_001, 12_001), (12_002, 12_002));
    for place in [
        "artifacts/zz",
        "artifacts/zz/1",
        "artifacts/m/1/files/p",
        "staging/0b203ec73c7ce729a75f7f51a8caf41e-abcdefghijklmnop",
        "staging/new-abcdefghijklmnop",
        "quarantine/x",
    ] {
        let house = open_house();
        let source = house.write("source/w", "weights").parent().unwrap().to_owned();
        chmod(&source, 0o755);
        let on = || house.on_local("open/cache").env("MODEL_CACHE_SHARED", "world");
        by(a, on(), &["put", "m@1", source.to_str().unwrap()]).ok();
        let private = house.path("open/cache").join(place);
        let script = r#"umask 0; mkdir -p "$1/in" && : > "$1/in/f" && chmod 700 "$1""#;
        by_shell(b, on(), script, &[private.to_str().unwrap()]).ok();
        for args in [
            &["stats"][..],
            &["put", "new@1", source.to_str().unwrap()],
            &["get", "m@1"],
            &["verify"],
            &["prune"],
            &["prune", "--dry-run", "--to", "0"],
            &["evict", "new@1", "--tier", "disk", "--yes"],
            &["put", "new@2", source.to_str().unwrap()],
            &["stats"],
        ] {
            let outcome = by(a, on(), args);
            assert_eq!(outcome.code, Some(0), "{place}: {args:?}: {outcome}");
        }
        let evicted = by(a, on(), &["evict", "m@1", "--tier", "disk", "--yes"]);
        match place.starts_with("artifacts/m") {
            true => assert!(evicted.code == Some(1) && evicted.stderr.contains("not removable"), "{place}: {evicted}"),
            false => assert_eq!(evicted.code, Some(0), "{place}: {evicted}"),
        }
    }
}

#[test]
fn one_user_cannot_make_another_publish() {
    let (house, a, b) = (open_house(), (12_001, 12_001), (12_002, 12_002));
    let remote = house.path("remote-of-a");
    fs::create_dir(&remote).unwrap();
    std::os::unix::fs::chown(&remote, Some(a.0), Some(a.1)).unwrap();
    chmod(&remote, 0o700);
    let on_remote = |folder: &str| {
        let run = house.on_local("open/cache").env("MODEL_CACHE_SHARED", "world");
        run.env("MODEL_CACHE_REMOTE", format!("file://{}", house.path(folder).display()))
    };
    let on = || on_remote("remote-of-a");
    by(a, on(), &["get", "none@1"]).failed(3, &["none@1"]);
    // B records an upload to the remote of A, in the place of a record of A.
    by(b, on_remote("open/remote-of-b"), &["get", REF, "--backfill", "later"]).ok();
    let records = house.path("open/cache/backfill");
    let record = fs::read_dir(&records).unwrap().next().expect("a record").unwrap().path();
    let of_a = record.to_str().unwrap().replace("-12002", "-12001");
    let script = r#"sed "s#open/remote-of-b#remote-of-a#" < "$1" > "$2""#;
    by_shell(b, on(), script, &[record.to_str().unwrap(), &of_a]).ok();
    assert!(fs::read_to_string(&of_a).unwrap().contains("/remote-of-a"));
    by(a, on(), &["backfill"]).ok();
    assert_eq!(files_below(&remote), Vec::<PathBuf>::new(), "A has uploaded for B");
    // A's own upload works, unless B exchanges the content meanwhile.
    by(b, on(), &["evict", REF, "--tier", "disk", "--yes"]).ok();
    by(a, on(), &["get", OTHER, "--backfill", "later"]).ok();
    by(a, on(), &["backfill"]).ok();
    assert!(files_below(&remote).iter().any(|file| file.ends_with("own")), "A's own upload");
}

#[test]
fn a_directory_that_another_user_planted_in_an_open_folder_is_refused() {
    if !can_mount() {
        return;
    }
    let house = open_house();
    chmod(&house.path("open"), 0o1777);
    let (stranger, user) = ((1003, 1003), (1001, 1001));
    by(stranger, house.on_local("open/cache"), &["get", REF]).ok();
    let link = house.path("open/link");
    std::os::unix::fs::symlink(house.path("open/cache"), &link).unwrap();
    std::os::unix::fs::lchown(&link, Some(1003), Some(1003)).unwrap();
    by(user, house.on_local("open/cache"), &["get", REF]).failed(8, &["user 1003", "MODEL_CACHE_SHARED"]);
    for sharing in ["off", "world"] {
        let run = house.on_local("open/link").env("MODEL_CACHE_SHARED", sharing);
        by(user, run, &["get", REF]).failed(8, &["symbolic link"]);
    }
    by(stranger, house.on_local("open/cache"), &["get", REF]).path_saying(&["on disk"]);
}

#[test]
fn two_processes_each_through_its_own_bind_mount_share() {
    if !can_mount() {
        return;
    }
    let house = open_house();
    for folder in ["cache", "one", "two"] {
        fs::create_dir(house.path(folder)).unwrap();
    }
    for (mount, message_part) in [("one", "from origin"), ("two", "on disk")] {
        let [from, to] = [house.path("cache"), house.path(mount)];
        let check = format!(
            "mount --bind {} {}\n{BIN} \"$@\" >out\ncmp \"$(cat out)/config.json\" want",
            from.display(),
            to.display()
        );
        house.write("want", "{\"a\": 1}");
        house.on_local(mount).script(&check, &["get", REF]).ok().said(&[message_part]);
    }
    assert_eq!(house.hub.body_bytes(), model_bytes(), "each byte was fetched once");
    assert_counted(&house, "cache");
}

/// Fills, completes and evicts an artifact, with the folder `part` of the directory on a mount of its own.
fn with_a_part_on_its_own_mount(part: &str) {
    if !can_mount() {
        return;
    }
    let house = open_house();
    house.make_cache("a");
    let folder = house.path("a").join(part);
    let mount = format!("mount --bind {0} {0}", folder.display());
    let first = house.on_local("a").run_after(&mount, &["get", REF, "--include", "*.safetensors", "--json"]).object();
    assert_eq!(first["link"], json!("copy"), "{first}");
    assert_counted(&house, "a");
    let whole = house.on_local("a").run_after(&mount, &["get", REF]).path();
    assert_model(&whole);
    assert_eq!(house.hub.body_bytes(), model_bytes(), "files on disk were not fetched again");
    assert_counted(&house, "a");
    assert_model(&house.on_local("a").run(["get", REF]).path_saying(&["on disk"]));
    house.on_local("a").run_after(&mount, &["evict", REF, "--tier", "disk"]).ok();
    assert_eq!((used_bytes(&house, "a"), stored_bytes(&house, "a")), (0, 0));
    assert_eq!(house.staging("a"), Vec::<PathBuf>::new());
}

#[test]
fn with_blobs_on_another_mount_the_views_hold_the_bytes() {
    with_a_part_on_its_own_mount("blobs");
}

#[test]
fn artifacts_on_another_mount_are_copies() {
    with_a_part_on_its_own_mount("artifacts");
}

#[test]
fn a_changed_copy_is_repaired_and_counted_once() {
    if !can_mount() {
        return;
    }
    let house = open_house();
    house.make_cache("a");
    let mount = format!("mount --bind {0} {0}", house.path("a/blobs").display());
    let path = house.on_local("a").run_after(&mount, &["get", REF]).path();
    let config = path.join("config.json");
    chmod(&config, 0o644);
    fs::write(&config, "{\"a\": 2}").unwrap();
    house.hub.clear_requests();
    assert_model(&house.on_local("a").run_after(&mount, &["get", REF]).path_saying(&["was changed or damaged"]));
    assert_eq!(house.hub.body_bytes(), "{\"a\": 1}".len() as u64);
    assert_counted(&house, "a");
}

#[test]
fn a_blob_with_as_many_links_as_the_filesystem_takes_is_copied() {
    let house = open_house();
    let view = house.on_local("a").run(["get", REF]).path().join("model.safetensors");
    fs::create_dir(house.path("links")).unwrap();
    let full = (0..70_000).any(|at| fs::hard_link(&view, house.path("links").join(at.to_string())).is_err());
    if !full {
        return; // this filesystem has no such limit
    }
    house.hub.clear_requests();
    let other = house.on_local("a").run(["get", OTHER, "--json"]).object();
    assert_eq!((&other["link"], house.hub.body_bytes()), (&json!("copy"), "own".len() as u64));
    assert_same(&Path::new(&text(&other["path"])).join("weights"), &big());
    assert_counted(&house, "a");
}

#[test]
fn a_small_filesystem_refuses_clearly_and_keeps_nothing_half_made() {
    if !can_mount() {
        return;
    }
    let house = open_house();
    fs::create_dir(house.path("a")).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=8m none {0}\n{BIN} get {REF} && exit 1 || echo $?\nfind {0}/staging {0}/blobs -type f\n\
         {BIN} get {REF} --include config.json",
        house.path("a").display()
    );
    let outcome = house.on_local("a").script(&script, &[]).said(&["no room", "hint: "]);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!((lines[0], lines.len()), ("6", 2), "{outcome}");
}

#[test]
fn a_read_only_directory_serves_hits_and_a_miss_names_the_remedy() {
    if !can_mount() {
        return;
    }
    let house = open_house();
    house.on_local("a").run(["get", REF, "--include", "*.json"]).ok();
    house.on_local("a").run(["get", OTHER]).ok();
    for folder in ["m", "empty"] {
        fs::create_dir(house.path(folder)).unwrap();
    }
    let [a, m, empty] = ["a", "m", "empty"].map(|name| house.path(name).display().to_string());
    let read_only = format!("mount --bind {a} {a}; mount -o remount,ro,bind {a}");
    let overlay = format!("mount -t overlay -o lowerdir={a}:{empty} none {m}");
    let before = listing(&house.path("a"));
    for (dir, mount) in [("a", &read_only), ("m", &overlay)] {
        let check = format!("{mount}\n{BIN} \"$@\" >out\ncmp \"$(cat out)/own\" want");
        house.write("want", "own");
        house.on_local(dir).script(&check, &["get", OTHER]).ok().said(&["on disk"]);
        house.on_local(dir).run_after(mount, &["get", REF]).failed(8, &["MODEL_CACHE_DIR"]);
        house.on_local(dir).run_after(mount, &["stats"]).ok();
    }
    let other_user = || house.on_local("a");
    by((1001, 1001), other_user(), &["get", OTHER]).path_saying(&["on disk"]);
    by((1001, 1001), other_user(), &["get", REF]).failed(8, &["MODEL_CACHE_DIR"]);
    assert_eq!(listing(&house.path("a")), before, "nothing was touched");
}

/// Returns every file below `folder` with its inode, number of links, and modification time.
fn listing(folder: &Path) -> Vec<(PathBuf, u64, u64, i64, i64)> {
    let files = files_below(folder).into_iter();
    let row = |file: PathBuf| {
        let metadata = fs::symlink_metadata(folder.join(&file)).unwrap();
        (file, metadata.ino(), metadata.nlink(), metadata.mtime(), metadata.mtime_nsec())
    };
    files.map(row).collect()
}

#[test]
fn a_cache_in_the_lower_layer_of_an_overlay_serves_and_grows() {
    if !can_mount() {
        return;
    }
    let house = open_house();
    house.on_local("a").run(["get", REF]).ok();
    for folder in ["m", "upper", "work"] {
        fs::create_dir(house.path(folder)).unwrap();
    }
    let [a, m, upper, work] = ["a", "m", "upper", "work"].map(|name| house.path(name).display().to_string());
    // An overlay refuses an overlay as upper layer. Here both layers are plain folders.
    let mount = format!("mount -t overlay -o lowerdir={a},upperdir={upper},workdir={work} none {m}");
    house.hub.clear_requests();
    let script = format!(
        "{mount}\n{BIN} get {REF} >one\n{BIN} get {OTHER} >two\n\
         cmp \"$(cat one)/model.safetensors\" want; cmp \"$(cat two)/weights\" want"
    );
    house.write("want", big());
    house.on_local("m").script(&script, &[]).ok().said(&["on disk", "from origin"]);
    assert_eq!(house.hub.body_bytes(), "own".len() as u64, "the blob of the lower layer is reused");
}

#[test]
fn an_artifact_linked_outside_the_cache_is_not_evicted() {
    let house = House::new();
    let put = |name: &str, seed| {
        let file = house.write("file", Content::generated(seed, 3 * MIB));
        house.on("a").env("MODEL_CACHE_MAX_BYTES", "5MiB").run(["put", name, file.to_str().unwrap()])
    };
    put("linked@1", 1).ok();
    let kept = house.on_local("a").run(["get", "linked@1"]).path();
    fs::hard_link(&kept, house.path("outside")).unwrap();
    put("second@1", 2).failed(6, &["linked@1 is linked outside the cache"]);
    assert_eq!(house.listed("a"), ["linked@1"], "evicting it would have freed nothing");
    fs::remove_file(house.path("outside")).unwrap();
    put("second@1", 2).ok();
    assert_eq!(house.listed("a"), ["second@1"]);
}

#[test]
fn targets_of_links_planted_in_the_directory_are_not_changed() {
    let (house, commit) = House::with_model();
    let mine = house.path("mine");
    for path in ["1/manifest.json", "1/files/config.json", "1/thesis.txt"] {
        house.write(&format!("mine/{path}"), "dear to me");
    }
    house.on_local("a").run(["put", "m@1", mine.join("1/thesis.txt").to_str().unwrap()]).ok();
    let artifacts = house.path("a/artifacts");
    std::os::unix::fs::symlink(&mine, artifacts.join("evil")).unwrap();
    fs::create_dir(artifacts.join("worse")).unwrap();
    std::os::unix::fs::symlink(mine.join("1"), artifacts.join("worse/1")).unwrap();
    std::os::unix::fs::symlink(&mine, artifacts.join("m/1/files/1")).unwrap();
    // An empty budget record, as a crash leaves it, makes the next command sweep and recount.
    fs::write(house.path("a/locks/budget"), "").unwrap();
    house.on_local("a").run(["stats"]).ok();
    house.on_local("a").run(["evict", "worse@1", "--yes"]);
    house.on_local("a").run(["evict", "evil@1", "--yes"]);
    let put = || house.on_local("a").run(["put", "worse@1", mine.join("1/thesis.txt").to_str().unwrap()]);
    put().failed(8, &["worse/1", "not a folder"]);
    house.on_local("a").run(["prune"]).said(&["artifacts/evil", "artifacts/worse/1", "quarantine"]);
    put().ok();
    house
        .on_local("a")
        .env("MODEL_CACHE_MAX_BYTES", "9500000")
        .run(["get", &format!("hf://org/model@{commit}")])
        .path();
    for path in ["1/manifest.json", "1/files/config.json", "1/thesis.txt"] {
        assert_same(&mine.join(path), &"dear to me".into());
    }
}

/// Builds a library in which `flock` has the body `does`.
fn flock_that(house: &House, does: &str) -> PathBuf {
    let source = house.path("flock.c");
    fs::write(&source, format!("#include <errno.h>\nint flock(int fd, int op) {{ {does} }}\n")).unwrap();
    let library = house.path("flock.so");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-w", "-o"]).arg(&library).arg(source);
    assert!(cc.status().unwrap().success());
    library
}

const LYING: &str = "return 0;";
const REFUSING: &str = "errno = ENOLCK; return -1;";

#[test]
fn with_broken_locks_gets_work_and_warn() {
    for does in [LYING, REFUSING] {
        let (house, _) = House::with_model();
        let library = flock_that(&house, does);
        let run = || house.on_local("a").env("LD_PRELOAD", &library);
        let runs: Vec<Running> = (0..4).map(|_| run().start(["get", REF])).collect();
        for running in runs {
            assert_model(&running.wait().path_saying(&["file locks have no effect"]));
        }
        assert_model(&run().run(["get", REF]).path_saying(&["on disk"]));
        assert_eq!(used_bytes(&house, "a"), stored_bytes(&house, "a"), "the count did not drift");
        run().run(["evict", REF, "--tier", "disk"]).ok();
        assert_eq!(stored_bytes(&house, "a"), 0);
    }
    let (house, _) = House::with_model();
    let outcome = house.on_local("a").run(["get", REF]);
    assert!(!outcome.stderr.contains("locks"), "{outcome}");
}

#[test]
fn with_broken_locks_only_long_idle_artifacts_are_evicted_for_space() {
    let house = House::new();
    let library = flock_that(&house, LYING);
    let put = |name: &str, seed| {
        let file = house.write("file", Content::generated(seed, 3 * MIB));
        let run = house.on("a").env("LD_PRELOAD", &library).env("MODEL_CACHE_MAX_BYTES", "5MiB");
        run.run(["put", name, file.to_str().unwrap()])
    };
    put("first@1", 1).ok();
    let first = house.on_local("a").run(["get", "first@1"]).path();
    put("second@1", 2).failed(6, &["first@1 is perhaps in use"]);
    let dir = first.parent().unwrap().parent().unwrap();
    for name in ["manifest.json", "last-used", "files", "."] {
        let then = SystemTime::now() - Duration::from_secs(7200);
        fs::File::open(dir.join(name)).unwrap().set_modified(then).unwrap();
    }
    put("second@1", 2).ok();
    assert_eq!(house.listed("a"), ["second@1"]);
}

#[test]
fn with_broken_locks_two_concurrent_puts_of_one_key_have_one_winner() {
    let house = House::new();
    let library = flock_that(&house, LYING);
    for round in 0..15 {
        let key = format!("race@{round}");
        let start = |seed| {
            let file = house.write(&format!("file-{seed}/weights"), Content::generated(seed, MIB));
            let folder = file.parent().unwrap().to_owned();
            house.on_local("a").env("LD_PRELOAD", &library).start(["put", &key, folder.to_str().unwrap()])
        };
        let outcomes = [1, 2].map(start).map(Running::wait);
        let winners: Vec<u64> =
            outcomes.iter().zip([1, 2]).filter(|(outcome, _)| outcome.code == Some(0)).map(|(_, seed)| seed).collect();
        assert_eq!(winners.len(), 1, "{} {}", outcomes[0], outcomes[1]);
        let got = house.on_local("a").env("LD_PRELOAD", &library).run(["get", &key]);
        assert_same(&got.path().join("weights"), &Content::generated(winners[0], MIB));
    }
}
