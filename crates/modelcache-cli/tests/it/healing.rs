//! A file that was changed on disk is found when a lease is acquired, quarantined, and withdrawn from every artifact.

use crate::common::*;
use modelcache_testkit::{Content, content};
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

fn shared() -> Content {
    Content::generated(1, 2 * MIB + 3)
}

/// Changes one byte in place and restores the mode, as another program could. Returns the new bytes.
fn corrupt(file: &Path) -> Vec<u8> {
    fs::set_permissions(file, Permissions::from_mode(0o644)).unwrap();
    let open = fs::File::options().write(true).open(file).unwrap();
    let wrong = [!fs::read(file).unwrap()[1_000_000]];
    open.write_all_at(&wrong, 1_000_000).unwrap();
    fs::set_permissions(file, Permissions::from_mode(0o444)).unwrap();
    fs::read(file).unwrap()
}

/// Asserts that the quarantine holds one file with these bytes and nothing else.
#[track_caller]
fn assert_quarantined(house: &House, bytes: &[u8]) {
    let folder = house.path("a/quarantine");
    let [file] = &files_below(&folder)[..] else { panic!("{:?}", files_below(&folder)) };
    assert_eq!(content::sha256(&fs::read(folder.join(file)).unwrap()), content::sha256(bytes));
}

/// Returns the number of files of `reference` that `ls` reports as held, and true if `inspect` reports the shared file
/// as on disk.
fn reported(house: &House, reference: &str) -> (u64, bool) {
    let rows = house.on_local("a").run(["ls", "--json"]).objects();
    let row = rows.iter().find(|row| text(&row["reference"]).starts_with(reference)).unwrap();
    let seen = house.on_local("a").run(["inspect", reference, "--json"]).object();
    let file = seen["files"].as_array().unwrap().iter().find(|file| file["path"] == "shared.bin").unwrap();
    (row["held_files"].as_u64().unwrap(), file["on_disk"].as_bool().unwrap())
}

#[test]
fn a_changed_file_is_withdrawn_from_every_artifact_that_shares_it_and_both_are_refilled() {
    for (first, second) in [("org/one", "org/two"), ("org/two", "org/one")] {
        let house = House::new();
        let references = [first, second].map(|repo| {
            let commit = house.hub.repo(repo).commit().lfs("shared.bin", shared()).file("own", repo);
            format!("hf://{repo}@{}", commit.publish().unwrap())
        });
        let get = |at: usize| house.on_local("a").run(["get", &references[at]]);
        let [one, two] = [0, 1].map(|at| get(at).path().join("shared.bin"));
        assert_eq!(fs::metadata(&one).unwrap().ino(), fs::metadata(&two).unwrap().ino(), "they share the file");
        let wrong = corrupt(&one);
        house.hub.clear_requests();

        // The origin is down, so that the state between detection and refill can be inspected.
        house.hub.down(true);
        let refused = house.on_local("a").env("MODEL_CACHE_RETRY_DEADLINE", "100ms").run(["get", &references[0]]);
        assert_ne!(refused.code, Some(0), "{refused}");
        refused.said(&["shared.bin", "was changed or damaged", "hint: "]);
        assert_quarantined(&house, &wrong);
        for reference in &references {
            assert_eq!(reported(&house, reference), (1, false), "{reference}");
        }
        house.state("a");
        house.assert_counted("a");

        house.hub.down(false);
        for at in [0, 1] {
            assert_same(&get(at).path().join("shared.bin"), &shared());
            assert_eq!(reported(&house, &references[at]), (2, true));
        }
        assert_eq!(house.hub.body_bytes(), shared().len(), "it was fetched once");
        assert_eq!(fs::metadata(&one).unwrap().ino(), fs::metadata(&two).unwrap().ino(), "they share one again");
        assert_quarantined(&house, &wrong);
        house.on_local("a").run(["prune"]).ok();
        assert_eq!(files_below(&house.path("a/quarantine")), Vec::<PathBuf>::new());
        house.assert_consistent("a");
    }
}

#[test]
fn a_changed_file_without_another_source_is_an_error_until_the_artifact_is_put_again() {
    let house = House::new();
    for name in ["one", "two"] {
        house.write(&format!("{name}/shared.bin"), shared());
        house.write(&format!("{name}/own"), name);
        house.on_local("a").run(["put", &format!("{name}@1"), name]).ok();
    }
    let get = |reference: &str| house.on_local("a").run(["get", reference]);
    let wrong = corrupt(&get("one@1").path().join("shared.bin"));
    for reference in ["one@1", "two@1"] {
        get(reference).failed(3, &[reference, "shared.bin", "put"]);
        assert_eq!(reported(&house, reference), (1, false), "{reference}");
    }
    assert_quarantined(&house, &wrong);
    assert_same(&house.on_local("a").run(["get", "two@1", "--include", "own"]).path().join("own"), &"two".into());

    house.on_local("a").run(["put", "one@1", "one"]).ok();
    for reference in ["one@1", "two@1"] {
        assert_same(&get(reference).path().join("shared.bin"), &shared());
    }
    house.assert_consistent("a");
}
