//! Process limits as set by batch systems and containers: address space, number of threads, size of files.

use crate::common::*;
use modelcache_testkit::Content;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

/// 30 files, 26 MB in all, on the remote as `m@1` and in the folder `tree`.
fn house() -> House {
    let house = House::new();
    for n in 0..30 {
        house.write(&format!("tree/{n}.bin"), Content::generated(n, n * 60_000 + 1));
    }
    house.on("first").run(["put", "m@1", "tree", "--tier", "remote"]).ok();
    house
}

fn folder_origin(house: &House) -> String {
    format!("file://{}", house.path("tree").display())
}

#[test]
fn little_address_space_is_enough_to_get_and_to_put() {
    let house = house();
    let folder = folder_origin(&house);
    for mib in [180, 250, 400, 1000] {
        let limit = format!("--as={}", mib << 20);
        let run = || house.on("a").through(&["prlimit", &limit]);
        run().run(["get", "m@1"]).path();
        run().run(["get", &folder]).path();
        run().run(["put", &format!("p{mib}@1"), "tree"]).ok();
        fs::remove_dir_all(house.path("a")).unwrap();
    }
}

#[test]
fn too_little_address_space_is_an_error_that_names_the_limit() {
    let (house, _) = House::with_model();
    let limit = format!("--as={}", 100 << 20);
    house.on("a").through(&["prlimit", &limit]).run(["get", "hf://org/model"]).failed(8, &["ulimit -v"]);
}

#[test]
fn the_command_of_exec_gets_the_environment_of_exec_also_where_address_space_is_limited() {
    let (house, _) = House::with_model();
    let run = || house.on_local("a").through(&["prlimit", &format!("--as={}", 400 << 20)]);
    let exec = ["exec", "hf://org/model", "--", "env"];
    let environment = run().run(exec).ok().stdout;
    assert!(!environment.contains("ARENA"), "{environment}");
    let environment = run().env("MALLOC_ARENA_MAX", "1").run(exec).ok().stdout;
    assert!(environment.contains("MALLOC_ARENA_MAX=1\n"), "the user's setting stays: {environment}");
}

#[test]
fn few_threads_are_enough_and_a_lack_of_them_is_an_error_that_names_the_limit() {
    if !can_mount() {
        return; // Only root can switch to a user without other processes.
    }
    let house = house();
    fs::set_permissions(house.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(house.path("caches")).unwrap();
    fs::set_permissions(house.path("caches"), fs::Permissions::from_mode(0o777)).unwrap();
    let user = (1_000_000 + std::process::id()).to_string();
    let user = ["setpriv", "--clear-groups", &format!("--reuid={user}"), &format!("--regid={user}")].map(str::to_owned);
    let folder = folder_origin(&house);
    for threads in [1, 2, 3, 4, 5, 6, 8, 12] {
        for reference in ["m@1", &folder] {
            let limit = format!("--nproc={threads}");
            let run = house.on(&format!("caches/{threads}")).through(&["prlimit", &limit]);
            let words: Vec<&str> = user.iter().map(String::as_str).collect();
            let got = run.through(&words).run(["get", reference]);
            match threads {
                1 => drop(got.failed(8, &["no thread can be started", "ulimit -u"])),
                _ => drop(got.path()),
            }
        }
    }
}

#[test]
fn a_file_above_the_size_limit_ends_in_6_and_names_the_limit() {
    let house = house();
    let run = || house.on("a").through(&["prlimit", "--fsize=300000"]);
    for args in [&["get", "m@1"][..], &["get", &folder_origin(&house)], &["put", "n@1", "tree"]] {
        run().run(args).failed(6, &["File too large", "ulimit -f"]);
    }
    house.on("a").run(["get", "m@1"]).path();
    run().run(["get", "m@1", "--into", "elsewhere", "--link", "copy"]).failed(6, &["File too large", "ulimit -f"]);
    let folder = format!("file://{}", house.path("remote").display());
    let put = ["put", "n@1", "tree", "--tier", "remote", "--remote", &folder];
    run().run(put).failed(6, &["File too large", "ulimit -f"]);
}

/// Runs the main commands under each of `limits`, and asserts that each ends with a documented exit code. A panic and a
/// hang fail in [`Run::run`].
fn each_command_ends_as_documented(option: &str, limits: &[u64]) {
    let house = House::new();
    for n in 0..3 {
        house.write(&format!("tree/{n}.bin"), Content::generated(n, n * 60_000 + 1));
    }
    house.on("first").run(["put", "m@1", "tree", "--tier", "remote"]).ok();
    fs::set_permissions(house.path("."), fs::Permissions::from_mode(0o777)).unwrap();
    // The number of threads is limited per user, and not for root.
    let user = (2_000_000 + std::process::id()).to_string();
    let user = ["setpriv", "--clear-groups", &format!("--reuid={user}"), &format!("--regid={user}")].map(str::to_owned);
    let user: &[String] = if option == "nproc" { &user } else { &[] };
    for limit in limits {
        let limit = format!("--{option}={limit}");
        let words: Vec<&str> = ["prlimit", &limit].into_iter().chain(user.iter().map(String::as_str)).collect();
        let commands = [&["get", "m@1"][..], &["put", "p@1", "tree"], &["ls"], &["stats"], &["evict", "m@1", "--yes"]];
        for command in commands {
            let outcome = house.on("a").env("MODEL_CACHE_DIR", house.path("caches")).through(&words).run(command);
            // With too little of anything, the program is not even loaded.
            let is_loaded = !["error while loading shared libraries", "failed to execute", "cannot execute"]
                .iter()
                .any(|text| outcome.stderr.contains(text));
            let is_documented = outcome.code.is_some_and(|code| (0..=8).contains(&code));
            let is_killed_at_start = outcome.code.is_none() && outcome.stderr.is_empty();
            assert!(is_documented || !is_loaded || is_killed_at_start, "{limit} {command:?}: {outcome}");
        }
        house.on("first").run(["put", "m@1", "tree", "--tier", "remote"]).ok();
        let _ = fs::remove_dir_all(house.path("caches"));
    }
}

#[test]
fn under_every_limit_of_descriptors_each_command_ends_as_documented() {
    each_command_ends_as_documented("nofile", &[3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 25, 32, 64]);
}

#[test]
fn under_every_limit_of_threads_each_command_ends_as_documented() {
    if can_mount() {
        each_command_ends_as_documented("nproc", &[1, 2, 3, 4, 5, 6, 7, 8, 10, 16]);
    }
}

#[test]
fn under_every_limit_of_address_space_each_command_ends_as_documented() {
    let mib = [8, 16, 24, 32, 40, 50, 60, 70, 80, 90, 100, 120, 150, 200];
    each_command_ends_as_documented("as", &mib.map(|mib| mib << 20));
}

#[test]
fn under_every_limit_of_file_size_each_command_ends_as_documented() {
    each_command_ends_as_documented("fsize", &[0, 1, 100, 500, 1000, 4096, 50_000, 100_000]);
}
