//! MLflow: a real `mlflow server`, with models logged by its own client.
//!
//! A server takes seconds to start, so each test runs many checks on one server. A gate in front of the server demands
//! credentials and redirects to a CDN.

use crate::common::*;
use modelcache_testkit::{Demand, Gate, Mlflow, Place};
use std::fs;
use std::path::Path;

const LOG_MODELS: &str = include_str!("../python/log_models.py");
const PASSWORD: &str = "mlflow-canary-password";

/// Changes the database of the server directly, to reach states that no request can create.
const SQL: &str = "import sqlite3, sys
with sqlite3.connect('mlflow.db') as db:
    db.execute(sys.argv[1])";

/// Writes the files of `org/model` into a folder to be logged, and returns its path.
fn write_model(house: &House) -> String {
    for (path, content) in model() {
        house.write(&format!("logged/{path}"), content);
    }
    house.path("logged").display().to_string()
}

/// All checks on a server that proxies its artifacts.
#[test]
fn models_are_fetched_by_version_alias_and_latest_through_the_server() {
    let Some(venv) = venv() else { return };
    let house = House::new();
    let folder = house.path("mlflow");
    let server = Mlflow::start(&venv, &folder, &["--artifacts-destination", "artifacts"]).unwrap();
    let printed = server.python(LOG_MODELS, &[&write_model(&house)], &[]).unwrap();
    let files = printed.lines().last().unwrap();
    assert!(files.starts_with("mlflow-artifacts:/"), "{files}");
    let run = |dir: &str| house.on_local(dir).env("MLFLOW_TRACKING_URI", server.url());

    every_form_leads_to_the_files(&run, &server);
    aliases_move_and_the_last_known_version_serves(&house, &server);
    a_template_leads_to_mlflow(&house, &server);
    missing_models_are_reported_with_a_remedy(&run, &server);
    credentials_go_to_the_server_and_nowhere_else(&house, &server);
    a_missing_server_is_reported_with_its_variable(&house);
}

fn every_form_leads_to_the_files(run: &dyn Fn(&str) -> Run, server: &Mlflow) {
    for (dir, reference) in [
        ("a", "models:/fraud/1"),
        ("b", "models:/fraud/2"),
        ("c", "models:/fraud@prod"),
        ("d", "models:/fraud/latest"),
        ("e", "models:/fraud détection 100%@next"),
    ] {
        let got = run(dir).run(["get", reference]);
        assert_eq!(got.stderr.matches("keeps no checksums").count(), 1, "reported once: {got}");
        assert_model(&got.path());
    }
    let again = run("a").run(["get", "models:/fraud@prod"]);
    assert!(!again.stderr.contains("checksums"), "a hit repeats no warning: {again}");
    again.path_saying(&["on disk"]);
    let only = run("f").run(["get", "models:/fraud/3", "--include", "sub dir/*"]).path();
    assert_eq!(files_below(&only), [Path::new("sub dir/fé+%.txt")]);
    let listed = run("e").run(["ls", "--json"]);
    let key = format!("mlflow/{}/fraud détection 100%25@2", server.addr());
    assert_eq!(listed.objects()[0]["reference"], key.as_str());
    // The listed key is a valid reference as long as the same server is configured.
    assert_model(&run("g").run(["get", &key]).path());
    let inspected = run("a").run(["inspect", "models:/fraud/1", "--json"]);
    assert!(inspected.stdout.contains("first-seen"), "{inspected}");
}

fn aliases_move_and_the_last_known_version_serves(house: &House, server: &Mlflow) {
    let gate = Gate::start(server.addr()).unwrap();
    let get = |ttl: &str| {
        let run = house.on_local("moves").env("MLFLOW_TRACKING_URI", gate.url()).env("MODEL_CACHE_REF_TTL", ttl);
        run.run(["get", "--json", "models:/fraud@prod"])
    };
    let point = |version: &str| {
        let code = "import sys, mlflow; mlflow.MlflowClient().set_registered_model_alias('fraud', 'prod', sys.argv[1])";
        server.python(code, &[version], &[]).unwrap();
    };
    let version_of = |outcome: Outcome| text(&outcome.ok().objects()[0]["version"]);
    assert_eq!(version_of(get("60s")), "1");
    point("2");
    assert_eq!(version_of(get("1h")), "1", "fresh enough");
    assert_eq!(version_of(get("0s")), "2");
    gate.down(true);
    let last = get("0s");
    assert!(last.stderr.contains("using the version that it last meant"), "{last}");
    assert_eq!(version_of(last), "2");
    point("1");
}

fn a_template_leads_to_mlflow(house: &House, server: &Mlflow) {
    let run = |dir: &str| {
        let run = house.on(dir).env("MLFLOW_TRACKING_URI", server.url());
        run.env("MODEL_CACHE_ORIGIN", "models:/{name}/{version}")
    };
    assert_model(&run("t").run(["get", "fraud@1"]).path());
    run("t").run(["get", "fraud@99"]).failed(3, &["not found", "MODEL_CACHE_ORIGIN"]);
    run("t").run(["get", "team/fraud@1"]).failed(3, &["not found"]);
    assert_model(&house.on("u").run(["get", "fraud@1"]).path());
}

fn missing_models_are_reported_with_a_remedy(run: &dyn Fn(&str) -> Run, server: &Mlflow) {
    let sql = |statement: &str| server.python(SQL, &[statement], &[]).unwrap();
    let source = |source: &str, version: u32| {
        sql(&format!(
            "UPDATE model_versions SET source='{source}', storage_location='{source}' WHERE name='fraud' AND version={version}"
        ));
    };
    let get = |reference: &str| run("missing").run(["get", reference]);
    get("models:/fraud/99").failed(3, &["no version 99", "fraud", "check the model's name"]);
    get("models:/nope/1").failed(3, &["no version 1", "nope"]);
    get("models:/fraud@nope").failed(3, &["no alias \"nope\"", "aliases"]);
    get("models:/nope@prod").failed(3, &["no alias \"prod\" of model \"nope\""]);
    get("models:/nope/latest").failed(3, &["no model \"nope\""]);
    get("models:/fraud/Production").failed(3, &["stage Production"]);
    get("models:/fraud").failed(2, &["names no version"]);

    sql("UPDATE model_versions SET status='PENDING_REGISTRATION' WHERE name='fraud' AND version=2");
    get("models:/fraud/2").failed(3, &["not ready", "PENDING_REGISTRATION"]);
    sql("UPDATE model_versions SET status='READY' WHERE name='fraud' AND version=2");
    for (bad, code, message_part) in [
        ("mlflow-artifacts:/1/nothing/here", 3, "no files"),
        ("mlflow-artifacts:/1/../../etc", 5, "has an empty segment, `.` or `..`"),
        ("mlflow-artifacts://elsewhere.example/1/x", 1, "another MLflow server"),
        ("gs://bucket/model", 1, "\"gs\""),
        ("runs:/0123456789abcdef0123456789abcdef/model", 3, "not found"),
        ("models:/fraud/3", 5, "does not lead to files"),
    ] {
        source(bad, 3);
        get("models:/fraud/3").failed(code, &[message_part]);
    }
    // Paths on the machine of the server are read only below the folder in MODEL_CACHE_MLFLOW_LOCAL_ROOT.
    let root = server.folder().parent().unwrap().to_owned();
    let logged = root.join("logged").display().to_string();
    for (dir, uri) in [("folder", format!("file://{}", logged.replace("logged", "l%6Fgged"))), ("path", logged)] {
        source(&uri, 3);
        let of = |root: &str| run(dir).env("MODEL_CACHE_MLFLOW_LOCAL_ROOT", root);
        of("none")
            .run(["get", "models:/fraud/3"])
            .failed(1, &["on the machine of the MLflow server", "MLFLOW_LOCAL_ROOT"]);
        of("/usr").run(["get", "models:/fraud/3"]).failed(1, &["on the machine of the MLflow server"]);
        assert_model(&of(&root.display().to_string()).run(["get", "models:/fraud/3"]).path());
    }
    server
        .python("import mlflow; mlflow.MlflowClient().delete_registered_model('fraud détection 100%')", &[], &[])
        .unwrap();
    get("models:/fraud détection 100%/latest").failed(3, &["fraud détection 100%"]);
}

fn credentials_go_to_the_server_and_nowhere_else(house: &House, server: &Mlflow) {
    let gate = Gate::start(server.addr()).unwrap();
    gate.redirect("/mlflow-artifacts/artifacts/");
    let run = |dir: &str| house.on_local(dir).env("MLFLOW_TRACKING_URI", gate.url()).env("MODEL_CACHE_LOG", "trace");
    gate.demand(Demand::Exactly("Bearer mlflow-canary-token".into()));
    run("x").run(["get", "models:/fraud/1"]).failed(4, &["401", "MLFLOW_TRACKING_TOKEN"]);
    let wrong = run("x").env("MLFLOW_TRACKING_TOKEN", "other-canary-token");
    wrong.run(["get", "models:/fraud/1"]).failed(4, &["401", "check that MLFLOW_TRACKING_TOKEN"]);
    gate.clear_requests();
    let right = run("x").env("MLFLOW_TRACKING_TOKEN", "mlflow-canary-token");
    assert_model(&right.run(["get", "models:/fraud/1"]).path());
    let at_cdn: Vec<_> = gate.requests().into_iter().filter(|seen| seen.place == Place::Cdn).collect();
    assert!(!at_cdn.is_empty() && at_cdn.iter().all(|seen| !seen.authorized()), "a credential at the CDN: {at_cdn:?}");

    // User and password come from two variables, then from the URL.
    gate.demand(Demand::Exactly("Basic bWU6bWxmbG93LWNhbmFyeS1wYXNzd29yZA==".into()));
    let login = run("y").env("MLFLOW_TRACKING_USERNAME", "me").env("MLFLOW_TRACKING_PASSWORD", PASSWORD);
    assert_model(&login.run(["get", "models:/fraud/1"]).path());
    let address = run("z").env("MLFLOW_TRACKING_URI", format!("http://me:{PASSWORD}@{}", gate.addr()));
    assert_model(&address.run(["get", "models:/fraud/1"]).path());
    let key = format!("mlflow/{}/fraud@1", gate.addr());
    assert_eq!(house.listed("z"), [key], "a key contains no password");
}

fn a_missing_server_is_reported_with_its_variable(house: &House) {
    let get = |run: Run| run.run(["get", "models:/fraud/1"]);
    get(house.on_local("none")).failed(2, &["no MLflow server", "MLFLOW_TRACKING_URI"]);
    for bad in ["databricks", "sqlite:///canary-secret.db"] {
        get(house.on_local("none").env("MLFLOW_TRACKING_URI", bad))
            .failed(2, &["MLFLOW_TRACKING_URI", "http or https URL"]);
        let run = house.on_local("none").env("MLFLOW_TRACKING_URI", bad);
        assert!(!run.run(["ls"]).ok().stderr.contains("MLFLOW"), "a command without MLflow ignores the variable");
    }
    let unreachable = house.on_local("none").env("MLFLOW_TRACKING_URI", "http://127.0.0.1:9");
    get(unreachable).failed(7, &["cannot reach", "127.0.0.1:9"]);
    let hub = house.on_local("none").env("MLFLOW_TRACKING_URI", house.hub.url());
    get(hub).failed(7, &["404", "is the address of an `mlflow server`"]);
}

/// A server that keeps its models in a bucket and does not proxy them.
#[test]
fn models_in_a_bucket_are_read_from_the_bucket() {
    let Some(venv) = venv() else { return };
    let house = House::new();
    house.s3.bucket("mlflow").unwrap();
    let args = ["--no-serve-artifacts", "--default-artifact-root", "s3://mlflow/root dir"];
    let server = Mlflow::start(&venv, &house.path("mlflow"), &args).unwrap();
    let mut env = house.s3.env();
    env.push(("MLFLOW_S3_ENDPOINT_URL".into(), house.s3.endpoint()));
    let printed = server.python(LOG_MODELS, &[&write_model(&house)], &env).unwrap();
    let files = printed.lines().last().unwrap();
    assert!(files.starts_with("s3://mlflow/root dir/"), "{files}");

    // The S3 endpoint comes from the AWS variables, then from the variable of MLflow.
    let run = |dir: &str| house.on_local(dir).env("MLFLOW_TRACKING_URI", server.url());
    let got = run("a").envs(house.s3.env()).run(["get", "models:/fraud@next"]);
    assert_eq!(got.stderr.matches("keeps no checksums").count(), 1, "{got}");
    assert_model(&got.path());
    let mlflows = house.s3.env().into_iter().filter(|(name, _)| !name.starts_with("AWS_ENDPOINT"));
    let mlflows = run("b").envs(mlflows).env("MLFLOW_S3_ENDPOINT_URL", house.s3.endpoint());
    assert_model(&mlflows.run(["get", "models:/fraud/1"]).path());

    let denied = run("c").envs(house.s3.env()).env("AWS_SECRET_ACCESS_KEY", "canary-secret");
    denied.run(["get", "models:/fraud/1"]).failed(4, &["SignatureDoesNotMatch"]);
    let sql = "UPDATE model_versions SET source='mlflow-artifacts:/1/x', storage_location='mlflow-artifacts:/1/x' \
               WHERE name='fraud' AND version=1";
    server.python(SQL, &[sql], &[]).unwrap();
    run("d").run(["get", "models:/fraud/1"]).failed(7, &["does not serve artifacts", "--serve-artifacts"]);
    let gone = sql.replace("mlflow-artifacts:/1/x", "s3://mlflow/gone");
    server.python(SQL, &[&gone], &[]).unwrap();
    run("d").envs(house.s3.env()).run(["get", "models:/fraud/1"]).failed(3, &["no files"]);
    let one = format!("{}/model.safetensors", files);
    server.python(SQL, &[&sql.replace("mlflow-artifacts:/1/x", &one)], &[]).unwrap();
    let path = run("d").envs(house.s3.env()).run(["get", "models:/fraud/1"]).path();
    assert!(path.is_file() && fs::metadata(&path).unwrap().len() == big().len(), "one object is one file: {path:?}");
}
