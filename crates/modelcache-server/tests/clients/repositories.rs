//! Downloads, file systems, rights and errors, while network and Hub are well.

use crate::harness::{House, MIB, Machine, clients, digest, error_class, is_error, sums, with_files};
use modelcache_testkit::Content;
use serde_json::{Value, json};
use std::fs;
use std::thread;

const BIG: &str = "model.safetensors";
const ODD: &str = "sub dir/fé+%.txt";

/// A model with a large file, which has more than one step of the client (10 MiB).
fn model() -> Vec<(&'static str, Content)> {
    vec![
        ("config.json", Content::Held(r#"{"hidden_size": 8}"#.into())),
        (BIG, Content::generated(1, 12 * MIB + 7)),
        (ODD, Content::generated(2, 300)),
        ("empty.txt", Content::zeros(0)),
    ]
}

#[test]
fn hf_download_fetches_each_file_once_and_hf_cache_verify_finds_a_flipped_byte() {
    for client in clients() {
        let house = House::new();
        let repo = house.hub.repo("org/model");
        // Clients with `hf_xet` that see a hint at xet storage ask the Hub for it, and fail.
        repo.xet(true);
        let commit = with_files(repo.commit(), &model()).publish().unwrap();
        let cold = house.machine(&client);
        cold.hf_ok(["download", "org/model"]);
        assert_eq!(house.hub.body_bytes(), model().iter().map(|(_, file)| file.len()).sum::<u64>(), "{client:?}");
        house.hub.clear_requests();

        let warm = house.machine(&client);
        warm.hf_ok(["download", "org/model", "--include", "*"]);
        assert_eq!(house.hub.body_gets().len(), 0, "{client:?}");
        let asked_for_xet = house.hub.requests().iter().any(|seen| seen.path.contains("xet"));
        assert!(!asked_for_xet, "{client:?}: {:#?}", house.hub.requests());
        for machine in [&cold, &warm] {
            let snapshot = machine.path("hf/hub/models--org--model/snapshots").join(&commit);
            for (path, content) in model() {
                assert_eq!(fs::read(snapshot.join(path)).unwrap(), content.to_vec().unwrap(), "{client:?}: {path}");
            }
        }

        // Version 0.36 has no such command.
        if !client.is_old() {
            cold.hf_ok(["cache", "verify", "org/model"]);
            let blob = cold.path("hf/hub/models--org--model/blobs").join(model()[1].1.sha256().unwrap());
            let mut bytes = fs::read(&blob).unwrap();
            bytes[1_000_000] ^= 1;
            fs::write(&blob, bytes).unwrap();
            let found = cold.hf(["cache", "verify", "org/model"]);
            assert!(!found.status.success(), "{client:?}: {found:#?}");
            assert!(String::from_utf8_lossy(&found.stdout).contains(BIG), "{client:?}: {found:#?}");
        }
    }
}

#[test]
fn snapshots_load_offline_and_while_the_hub_is_down() {
    for client in clients() {
        let house = House::new();
        with_files(house.hub.repo("org/model").commit(), &model()).publish().unwrap();
        let gated = house.hub.repo("org/gated");
        gated.accept("hf_A");
        with_files(gated.commit(), &model()).publish().unwrap();
        let model_step = || json!(["snapshot_download", { "repo_id": "org/model" }]);
        let gated_step = |token| json!(["snapshot_download", { "repo_id": "org/gated", "token": token }]);

        let mut machine = house.machine(&client);
        for outcome in machine.run(json!([model_step(), gated_step("hf_A")])) {
            assert_eq!(outcome["value"]["files"], sums(&model()), "{client:?}: {outcome:#}");
        }
        house.hub.clear_requests();
        machine.set("HF_HUB_OFFLINE", "1");
        assert_eq!(machine.run(json!([model_step()]))[0]["value"]["files"], sums(&model()), "{client:?}");
        assert_eq!(house.hub.requests().len(), 0, "{client:?}");

        house.hub.down(true);
        let other = house.machine(&client);
        let outcomes = other.run(json!([
            model_step(),
            gated_step("hf_A"),
            ["hf_hub_download", { "repo_id": "org/model", "filename": "absent.txt" }],
        ]));
        for outcome in &outcomes[..2] {
            assert_eq!(outcome["value"]["files"], sums(&model()), "{client:?}: {outcome:#}");
        }
        assert!(is_error(&outcomes[2], "EntryNotFoundError"), "{client:?}: {:#}", outcomes[2]);
        // Nobody can tell what this token may read. Clients would repeat the request for most of a minute.
        let url = format!("{}/org/gated/resolve/main/config.json", house.url);
        let stranger = other.value("ranges", json!({ "url": url, "wanted": ["bytes=0-"], "token": "hf_B" }));
        assert_eq!(stranger[0][0], 503, "{client:?}");
    }
}

#[test]
fn refusals_are_the_exceptions_that_the_hub_itself_causes() {
    for client in clients() {
        let house = House::new();
        house.hub.repo("org/model").commit().file("config.json", "{}").publish().unwrap();
        house.hub.repo("org/private").private("hf_A").commit().file("config.json", "{}").publish().unwrap();
        house.hub.repo("org/gated").accept("hf_A").commit().file("config.json", "{}").publish().unwrap();
        let file = |repo: &str, file: &str, more: Value| {
            let mut arguments = json!({ "repo_id": repo, "filename": file });
            arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!(["hf_hub_download", arguments])
        };
        // Each step with the exception that it must cause.
        let steps = [
            (file("org/model", "absent.txt", json!({})), Some("EntryNotFoundError")),
            (file("org/model", "config.json", json!({ "revision": "nightly" })), Some("RevisionNotFoundError")),
            (file("org/absent", "config.json", json!({})), Some("RepositoryNotFoundError")),
            (file("org/private", "config.json", json!({})), Some("RepositoryNotFoundError")),
            (file("org/private", "config.json", json!({ "token": "hf_B" })), Some("RepositoryNotFoundError")),
            (
                json!(["snapshot_download", { "repo_id": "org/private", "token": "hf_B" }]),
                Some("RepositoryNotFoundError"),
            ),
            (json!(["snapshot_download", { "repo_id": "org/gated" }]), Some("Exception")),
            (file("org/private", "config.json", json!({ "token": "hf_A" })), None),
            (file("org/gated", "config.json", json!({})), Some("GatedRepoError")),
            (file("org/gated", "config.json", json!({ "token": "hf_B" })), Some("GatedRepoError")),
            (file("org/gated", "config.json", json!({ "token": "hf_A" })), None),
            (json!(["snapshot_download", { "repo_id": "org/absent" }]), Some("RepositoryNotFoundError")),
            (
                json!(["snapshot_download", { "repo_id": "org/model", "revision": "nightly" }]),
                Some("RevisionNotFoundError"),
            ),
        ];
        // The daemon has everything, so that it could answer without asking the Hub.
        let mut granted = house.machine(&client);
        granted.set("HF_TOKEN", "hf_A");
        let snapshot = |repo| json!(["snapshot_download", { "repo_id": repo }]);
        for outcome in granted.run(json!([snapshot("org/private"), snapshot("org/gated")])) {
            assert!(outcome.get("value").is_some(), "{client:?}: {outcome:#}");
        }
        let all: Value = steps.iter().map(|(step, _)| step.clone()).collect();
        let through = house.machine(&client).run(all.clone());
        let direct = Machine::new(&client, &house.hub.url()).run(all.clone());
        for (((step, expected), through), direct) in steps.iter().zip(&through).zip(&direct) {
            assert_eq!(error_class(through), error_class(direct), "{client:?}: {step}: {through:#} {direct:#}");
            match expected {
                Some(class) => assert!(is_error(through, class), "{client:?}: {step}: {through:#}"),
                None => assert!(through.get("value").is_some(), "{client:?}: {step}: {through:#}"),
            }
        }
        assert_eq!(house.hub.tokens_at_cdn(), Vec::<String>::new());

        // The client remembers the absence of a file and does not ask again.
        let machine = house.machine(&client);
        machine.run(json!([file("org/model", "absent.txt", json!({}))]));
        let absent = machine.path("hf/hub/models--org--model/.no_exist");
        assert_eq!(fs::read_dir(absent).unwrap().count(), 1, "{client:?}");
    }
}

#[test]
fn file_systems_list_and_read_ranges() {
    for client in clients() {
        let house = House::new();
        let repo = house.hub.repo("org/model");
        repo.xet(true);
        let commit = with_files(repo.commit(), &model()).publish().unwrap();
        repo.branch("refs/pr/1", &commit);
        let set = house.hub.repo("datasets/org/set");
        with_files(set.commit(), &model()).publish().unwrap();

        let roots = ["org/model", "org/model@refs/pr/1", "datasets/org/set"];
        let (start, end) = (5 * MIB - 3, 6 * MIB + 5);
        let steps = |big: &str| -> Value {
            let step = |root| json!(["filesystem", { "root": root, "file": big, "start": start, "end": end }]);
            roots.iter().map(step).collect()
        };
        let through = house.machine(&client).run(steps(BIG));
        let direct = Machine::new(&client, &house.hub.url()).run(steps(BIG));
        assert_eq!(through, direct, "{client:?}");
        let bytes = model()[1].1.to_vec().unwrap();
        for outcome in &through {
            let found = &outcome["value"];
            let part = digest(&bytes[start as usize..end as usize]);
            assert_eq!((&found["part"], &found["cat"]), (&part, &part), "{client:?}: {outcome:#}");
            assert_eq!(found["suffix"], digest(&bytes[bytes.len() - 1000..]), "{client:?}");
            assert_eq!(found["whole"], digest(&bytes), "{client:?}");
            assert_eq!((&found["size"], &found["has_missing"]), (&json!(bytes.len()), &json!(false)), "{client:?}");
        }
    }
}

#[test]
fn every_kind_of_name_and_revision_is_found() {
    for client in clients() {
        let house = House::new();
        let repo = house.hub.repo("org/model");
        let first = with_files(repo.commit(), &model()).publish().unwrap();
        repo.branch("refs/pr/1", &first);
        repo.tag("v1.0", &first);
        repo.commit().remove(BIG).publish().unwrap();
        with_files(house.hub.repo("gpt2").commit(), &model()).publish().unwrap();
        with_files(house.hub.repo("datasets/org/set").commit(), &model()).publish().unwrap();
        with_files(house.hub.repo("spaces/org/app").commit(), &model()).publish().unwrap();

        let outcomes = house.machine(&client).run(json!([
            ["snapshot_download", { "repo_id": "org/model", "revision": "refs/pr/1" }],
            ["snapshot_download", { "repo_id": "org/model", "revision": "v1.0" }],
            ["snapshot_download", { "repo_id": "org/model", "revision": first }],
            ["snapshot_download", { "repo_id": "gpt2" }],
            ["snapshot_download", { "repo_id": "org/set", "repo_type": "dataset" }],
            ["snapshot_download", { "repo_id": "org/app", "repo_type": "space" }],
            ["hf_hub_download", { "repo_id": "org/model", "filename": ODD, "revision": "refs/pr/1" }],
            ["hf_hub_download", { "repo_id": "gpt2", "filename": ODD }],
            ["hf_hub_download", { "repo_id": "gpt2", "filename": "fé+%.txt", "subfolder": "sub dir" }],
        ]));
        for outcome in &outcomes[..6] {
            assert_eq!(outcome["value"]["files"], sums(&model()), "{client:?}: {outcome:#}");
        }
        for outcome in &outcomes[6..] {
            assert_eq!(outcome["value"]["files"][""], sums(&model())[ODD], "{client:?}: {outcome:#}");
        }
    }
}

#[test]
fn local_folders_are_filled_and_recognised_as_complete() {
    for client in clients() {
        let house = House::new();
        with_files(house.hub.repo("org/model").commit(), &model()).publish().unwrap();
        let machine = house.machine(&client);
        let folder = |name: &str| machine.path(name).to_str().unwrap().to_owned();
        let snapshot = json!(["snapshot_download", { "repo_id": "org/model", "local_dir": folder("all") }]);
        let outcomes = machine.run(json!([
            snapshot,
            ["hf_hub_download", { "repo_id": "org/model", "filename": ODD, "local_dir": folder("one") }],
        ]));
        assert_eq!(outcomes[0]["value"]["files"], sums(&model()), "{client:?}: {:#}", outcomes[0]);
        let odd = fs::read(machine.path("one").join(ODD)).unwrap();
        assert_eq!(odd, model()[2].1.to_vec().unwrap(), "{client:?}: {:#}", outcomes[1]);

        // The second time, the client compares entity tags and fetches nothing, not even from the daemon.
        let written = fs::metadata(machine.path("all").join(BIG)).unwrap().modified().unwrap();
        assert_eq!(machine.run(json!([snapshot]))[0]["value"]["files"], sums(&model()), "{client:?}");
        assert_eq!(fs::metadata(machine.path("all").join(BIG)).unwrap().modified().unwrap(), written, "{client:?}");
    }
}

#[test]
fn a_download_stays_on_one_commit_if_main_moves_between_head_and_get() {
    for client in clients() {
        let house = House::with(|config, _| config.ref_ttl = std::time::Duration::ZERO);
        let repo = house.hub.repo("org/model");
        let (old, new) = (Content::generated(1, 3 * MIB), Content::generated(2, 3 * MIB));
        let first = repo.commit().file(BIG, old.clone()).publish().unwrap();
        let machine = house.machine(&client);
        let download = json!({ "repo_id": "org/model", "filename": BIG });
        let mut running = machine.start(json!([["download_with_pause", download]]));
        running.wait_for_pause();
        let second = repo.commit().file(BIG, new.clone()).publish().unwrap();
        running.resume();
        let outcome = &running.finish()[0]["value"];
        assert!(outcome["path"].as_str().unwrap().contains(&first), "{client:?}: {outcome:#}");
        assert_eq!(outcome["files"][""], json!(old.sha256().unwrap()), "{client:?}");
        let outcome = machine.value("hf_hub_download", download);
        assert!(outcome["path"].as_str().unwrap().contains(&second), "{client:?}: {outcome:#}");
        assert_eq!(outcome["files"][""], json!(new.sha256().unwrap()), "{client:?}");
    }
}

#[test]
fn a_tree_of_more_than_a_thousand_entries_is_complete() {
    const FILES: usize = 2_300;
    for client in clients() {
        let house = House::new();
        let mut commit = house.hub.repo("org/many").commit();
        for number in 0..FILES {
            commit = commit.plain(&format!("part/{number:04}.txt"), number.to_string());
        }
        commit.publish().unwrap();
        let outcomes = house.machine(&client).run(json!([
            ["tree", { "repo_id": "org/many" }],
            ["snapshot_download", { "repo_id": "org/many", "allow_patterns": ["part/229?.txt", "part/0000.txt"] }],
        ]));
        let listed = outcomes[0]["value"].as_array().unwrap();
        assert_eq!((listed.len(), &listed[FILES]), (FILES + 1, &json!("part/2299.txt")), "{client:?}");
        assert_eq!(outcomes[1]["value"]["files"].as_object().unwrap().len(), 11, "{client:?}: {:#}", outcomes[1]);
    }
}

#[test]
fn a_file_above_50_gb_is_downloaded_over_plain_http() {
    const SIZE: u64 = 51_000_000_000;
    for client in clients() {
        let house = House::with(|config, _| config.max_bytes = modelcache::config::ByteBound::Bytes(256 * MIB));
        let commit = house.hub.repo("org/huge").commit().lfs(BIG, Content::zeros(SIZE));
        commit.claim_sha256(&"ab".repeat(32)).publish().unwrap();
        let outcomes = house.machine(&client).run(json!([
            ["metadata", { "repo_id": "org/huge", "filename": BIG }],
            ["begin_download", { "repo_id": "org/huge", "filename": BIG, "enough": 20 * MIB }],
        ]));
        assert_eq!(outcomes[0]["value"]["etag"], "ab".repeat(32), "{client:?}: {:#}", outcomes[0]);
        if client.is_old() {
            // This version needs the size of every file, and refuses the download itself, as from the Hub.
            assert_eq!(outcomes[0]["value"]["size"], SIZE, "{client:?}");
            assert!(is_error(&outcomes[1], "ValueError"), "{client:?}: {:#}", outcomes[1]);
        } else {
            assert_eq!(outcomes[0]["value"]["size"], Value::Null, "{client:?}");
            assert_eq!(outcomes[1]["value"], 20 * MIB, "{client:?}: {:#}", outcomes[1]);
        }
    }
}

#[test]
fn eight_clients_at_once_cost_one_fetch() {
    let clients = clients();
    if clients.is_empty() {
        return;
    }
    let house = House::new();
    with_files(house.hub.repo("org/model").commit(), &model()).publish().unwrap();
    let machines: Vec<_> = clients.iter().cycle().take(8).map(|client| house.machine(client)).collect();
    thread::scope(|scope| {
        for machine in &machines {
            scope.spawn(|| {
                let found = machine.value("snapshot_download", json!({ "repo_id": "org/model" }));
                assert_eq!(found["files"], sums(&model()));
            });
        }
    });
    assert_eq!(house.hub.body_bytes(), model().iter().map(|(_, file)| file.len()).sum::<u64>());
}

#[test]
fn ranges_are_answered_as_a_simple_client_asks_for_them() {
    let Some(client) = clients().pop() else { return };
    let house = House::new();
    let commit = with_files(house.hub.repo("org/model").commit(), &model()).publish().unwrap();
    let size = 12 * MIB + 7;
    let bytes = model()[1].1.to_vec().unwrap();
    let sum = |bytes: &[u8]| digest(bytes)["sha256"].clone();
    let found = house.machine(&client).value(
        "ranges",
        json!({
            // urllib follows the redirect from `main`.
            "url": format!("{}/org/model/resolve/main/{BIG}", house.url),
            "wanted": ["bytes=0-0", "bytes=-5", format!("bytes={}-", size - 3), format!("bytes={size}-")],
        }),
    );
    let tail = |count: usize| sum(&bytes[bytes.len() - count..]);
    assert_eq!(
        found,
        json!([
            [206, format!("bytes 0-0/{size}"), sum(&bytes[..1])],
            [206, format!("bytes {}-{}/{size}", size - 5, size - 1), tail(5)],
            [206, format!("bytes {}-{}/{size}", size - 3, size - 1), tail(3)],
            [416, format!("bytes */{size}"), sum(b"")],
        ]),
        "{commit}"
    );
}
