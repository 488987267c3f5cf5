//! OCI registries: a real one (Debian's `docker-registry`), with artifacts in the forms of ORAS, ModelPack and KitOps.
//!
//! A gate in front of the registry adds tokens and a CDN, which the registry does not have here.

use crate::common::*;
use modelcache_testkit::registry::{IMAGE_INDEX, IMAGE_MANIFEST, Layer, PASSWORD, USER};
use modelcache_testkit::{Content, Demand, Gate, Place, Registry, content};
use serde_json::json;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

const TITLE: &str = "org.opencontainers.image.title";
const FILE_PATH: &str = "org.cncf.model.filepath";
/// The media type that ORAS gives to every file.
const ORAS: &str = "application/vnd.oci.image.layer.v1.tar";

/// An environment and a registry, with or without a password. `None` if the registry program is not installed.
fn with_registry(with_password: bool) -> Option<(House, Registry)> {
    let program = registry_program()?;
    let house = House::new();
    let registry = Registry::start(&program, &house.path("registry"), with_password).unwrap();
    Some((house, registry))
}

/// Pushes `org/model` in the form that ORAS uses. Returns the digest of its manifest.
fn push_model(registry: &Registry, tag: &str) -> String {
    let layers: Vec<_> =
        model().into_iter().map(|(path, content)| Layer::new(ORAS, TITLE, path, content.to_vec().unwrap())).collect();
    registry.push("org/model", tag, "application/vnd.oci.empty.v1+json", &layers).unwrap()
}

fn push_text(registry: &Registry, tag: &str, text: &str) -> String {
    registry.push("org/text", tag, "text/plain", &[Layer::new("text/plain", TITLE, "a.txt", text)]).unwrap()
}

fn reference(addr: SocketAddr, rest: &str) -> String {
    format!("oci://{addr}/{rest}")
}

/// Writes `text` as the configuration of docker and returns its folder.
fn docker_config(house: &House, text: &str) -> PathBuf {
    let folder = house.path("docker");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("config.json"), text).unwrap();
    folder
}

fn login(house: &House, addr: SocketAddr) -> PathBuf {
    docker_config(house, &json!({"auths": {addr.to_string(): {"username": USER, "password": PASSWORD}}}).to_string())
}

/// Returns the path of a blob in the storage folder of the registry.
fn blob_file(house: &House, digest: &str) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").unwrap();
    house.path("registry/data/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
}

#[test]
fn an_artifact_is_fetched_by_tag_and_by_digest_and_kept_under_its_digest() {
    let Some((house, registry)) = with_registry(false) else { return };
    let digest = push_model(&registry, "v1");
    let by_tag = house.on_local("a").run(["get", &reference(registry.addr(), "org/model:v1")]).path();
    assert_model(&by_tag);
    assert!(by_tag.to_string_lossy().contains(&digest), "{by_tag:?}");
    let pinned = reference(registry.addr(), &format!("org/model@{digest}"));
    assert_eq!(house.listed("a"), [pinned.as_str()]);
    drop(registry);
    house.on_local("a").run(["get", &pinned]).path_saying(&["on disk"]);
    assert_eq!(house.on_local("a").run(["evict", &pinned, "--yes"]).code, Some(0));
    house.assert_no_artifact_or_staging("a");
}

#[test]
fn layers_of_every_tool_become_files_with_the_manifests_digests() {
    let Some((house, registry)) = with_registry(false) else { return };
    let raw = "application/vnd.cncf.model.weight.v1.raw";
    let pack = [
        Layer::new(raw, FILE_PATH, "weights/model.safetensors", content::bytes(1, 100_000)),
        Layer::new("application/vnd.cnai.model.weight.v1.tar", "org.cnai.model.filepath", "docs", b"a tar".as_slice()),
        Layer::new(raw, FILE_PATH, "empty", b"".as_slice()),
    ];
    registry.push("team/pack", "1", "application/vnd.cncf.model.manifest.v1+json", &pack).unwrap();
    let folder = house.on_local("a").run(["get", &reference(registry.addr(), "team/pack:1")]).path();
    assert_eq!(files_below(&folder), ["docs.tar", "empty", "weights/model.safetensors"].map(PathBuf::from));
    assert_same(&folder.join("weights/model.safetensors"), &Content::from(content::bytes(1, 100_000)));

    let kit = "application/vnd.kitops.modelkit.model.v1.tar+gzip";
    let nameless = Layer { annotations: json!({}), ..Layer::new(kit, TITLE, "", b"packed".as_slice()) };
    let code = Layer::new("application/vnd.kitops.modelkit.code.v1.tar", TITLE, "src", b"code".as_slice());
    registry.push("team/kit", "latest", "application/vnd.kitops.modelkit.config.v1+json", &[nameless, code]).unwrap();
    let folder = house.on_local("a").run(["get", &reference(registry.addr(), "team/kit")]).path();
    let by_digest = format!("{}.tar.gz", content::sha256(b"packed"));
    let mut expected = [PathBuf::from(by_digest), PathBuf::from("src.tar")];
    expected.sort();
    assert_eq!(files_below(&folder), expected);

    let only =
        house.on_local("b").run(["get", &reference(registry.addr(), "team/pack:1"), "--include", "empty"]).path();
    assert_eq!(files_below(&only), [PathBuf::from("empty")]);
    let inspected = house.on_local("a").run(["inspect", &reference(registry.addr(), "team/pack:1"), "--json"]);
    assert!(inspected.stdout.contains("\"origin\""), "the digests come from the registry: {inspected}");
}

#[test]
fn a_tag_that_moved_is_another_version_and_the_last_one_serves_while_the_registry_is_down() {
    let Some((house, registry)) = with_registry(false) else { return };
    let gate = Gate::start(registry.addr()).unwrap();
    let tag = reference(gate.addr(), "org/text:prod");
    let get = |ttl: &str| house.on_local("a").env("MODEL_CACHE_REF_TTL", ttl).run(["get", &tag]);
    let read = |path: PathBuf| fs::read_to_string(path.join("a.txt")).unwrap();
    push_text(&registry, "prod", "one");
    assert_eq!(read(get("60s").path()), "one");
    push_text(&registry, "prod", "two");
    assert_eq!(read(get("1h").path()), "one", "fresh enough");
    assert_eq!(read(get("0s").path()), "two");
    gate.down(true);
    let last = get("0s");
    assert!(last.stderr.contains("using the version that it last meant"), "{last}");
    assert_eq!(read(last.path()), "two");
}

#[test]
fn a_bare_key_is_fetched_from_a_registry_by_template_and_then_served_by_the_remote() {
    let Some((house, registry)) = with_registry(false) else { return };
    let origin = reference(registry.addr(), "{name}:{version}");
    let run = |dir: &str| house.on(dir).env("MODEL_CACHE_ORIGIN", &origin);
    push_model(&registry, "3");
    assert_model(&run("a").run(["get", "org/model@3"]).path());
    for bad in ["org/model@4", "Not/Possible@3", "nowhere@3"] {
        run("a").run(["get", bad]).failed(3, &["not found", "MODEL_CACHE_ORIGIN"]);
    }
    drop(registry);
    assert_model(&run("b").run(["get", "org/model@3"]).path());
}

#[test]
fn a_password_is_taken_from_the_docker_configuration_and_a_missing_one_is_reported() {
    let Some((house, registry)) = with_registry(true) else { return };
    push_model(&registry, "v1");
    let (addr, tag) = (registry.addr(), reference(registry.addr(), "org/model:v1"));
    let run = |config: PathBuf| house.on_local("a").env("DOCKER_CONFIG", config).env("MODEL_CACHE_LOG", "trace");
    let config = |text: String| docker_config(&house, &text);
    let host = addr.to_string();
    run(config("{}".into())).run(["get", &tag]).failed(4, &["401", &format!("docker login {host}")]);
    let wrong = json!({"auths": {&host: {"username": USER, "password": "other-canary-password"}}});
    run(config(wrong.to_string())).run(["get", &tag]).failed(4, &["401", "may read it"]);
    let helper = json!({"credHelpers": {&host: "ecr-login"}});
    run(config(helper.to_string())).run(["get", &tag]).failed(4, &["docker-credential-ecr-login"]);
    house.assert_no_artifact_or_staging("a");
    assert_model(&run(login(&house, addr)).run(["get", &tag]).path());
    // The file is also found in its default place, `~/.docker`.
    fs::create_dir_all(house.path("home")).unwrap();
    fs::rename(house.path("docker"), house.path("home/.docker")).unwrap();
    assert_model(&house.on_local("b").run(["get", &tag]).path());
}

#[test]
fn tokens_are_fetched_with_the_password_renewed_and_never_sent_to_the_cdn() {
    let Some((house, registry)) = with_registry(false) else { return };
    push_model(&registry, "v1");
    let gate = Gate::start(registry.addr()).unwrap();
    gate.demand(Demand::Token(Some((USER.into(), PASSWORD.into()))));
    gate.next_token_uses(3);
    gate.redirect("/blobs/");
    let tag = reference(gate.addr(), "org/model:v1");
    let run = |dir: &str| house.on_local(dir).env("MODEL_CACHE_LOG", "trace");
    run("a").run(["get", &tag]).failed(4, &["401", "docker login"]);
    gate.clear_requests();
    let got = run("a").env("DOCKER_CONFIG", login(&house, gate.addr())).run(["get", &tag]);
    assert_model(&got.path());

    let seen = gate.requests();
    let tokens: Vec<_> = seen.iter().filter(|seen| seen.path == "/token").collect();
    assert!(tokens.len() >= 2, "a token is renewed when it is spent: {}", tokens.len());
    for token in tokens {
        assert!(token.authorization.as_deref().is_some_and(|shown| shown.starts_with("Basic ")), "{token:?}");
        assert!(
            token.query.contains("scope=repository%3Aorg%2Fmodel%3Apull") && !token.query.contains("push"),
            "{token:?}"
        );
    }
    let at_registry = seen.iter().filter(|seen| seen.place == Place::Gate && seen.path.starts_with("/v2/"));
    assert!(at_registry.clone().all(|seen| !seen.authorization.as_deref().unwrap_or("").starts_with("Basic ")));
    let at_cdn: Vec<_> = seen.iter().filter(|seen| seen.place == Place::Cdn).collect();
    assert!(at_cdn.len() >= 4, "{at_cdn:?}");
    assert!(at_cdn.iter().all(|seen| !seen.authorized()), "a credential at the CDN: {at_cdn:?}");
}

#[test]
fn anonymous_tokens_need_no_login() {
    let Some((house, registry)) = with_registry(false) else { return };
    push_model(&registry, "v1");
    let gate = Gate::start(registry.addr()).unwrap();
    gate.demand(Demand::Token(None));
    assert_model(&house.on_local("a").run(["get", &reference(gate.addr(), "org/model:v1")]).path());
    assert!(gate.requests().iter().filter(|seen| seen.path == "/token").all(|seen| !seen.authorized()));
}

#[test]
fn a_token_server_without_tls_on_another_host_gets_no_password() {
    let Some((house, registry)) = with_registry(false) else { return };
    push_model(&registry, "v1");
    let (gate, thief) = (Gate::start(registry.addr()).unwrap(), Gate::start(registry.addr()).unwrap());
    gate.demand(Demand::Token(None));
    gate.realm(&format!("http://localhost:{}/token", thief.addr().port()));
    let run = house.on_local("a").env("DOCKER_CONFIG", login(&house, gate.addr()));
    run.run(["get", &reference(gate.addr(), "org/model:v1")]).failed(4, &["without TLS", "no token was requested"]);
    assert!(thief.requests().is_empty(), "{:?}", thief.requests());
}

#[test]
fn missing_and_ambiguous_manifests_are_reported_with_a_remedy() {
    let Some((house, registry)) = with_registry(false) else { return };
    let digest = push_text(&registry, "1", "one");
    let other = push_text(&registry, "2", "two");
    let at = |rest: &str| reference(registry.addr(), rest);
    let get = |rest: &str| house.on_local("a").run(["get", &at(rest)]);
    get("no/such:1").failed(3, &["there is no", "no/such", "check"]);
    get("org/text:9").failed(3, &["there is no manifest :9", "check the tag"]);
    get(&format!("org/text@sha256:{}", "0".repeat(64))).failed(3, &["there is no manifest"]);
    get("org/text@sha512:00").failed(2, &["sha512", "sha256"]);
    get("Org/Text:1").failed(2, &["lower-case letters"]);

    let entry = |digest: &str, os: &str| {
        let size = fs::metadata(blob_file(&house, digest)).unwrap().len();
        let platform = json!({"os": os, "architecture": "amd64"});
        json!({"mediaType": IMAGE_MANIFEST, "digest": digest, "size": size, "platform": platform})
    };
    let index = |rows: serde_json::Value| {
        json!({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": rows}).to_string().into_bytes()
    };
    let two = index(json!([entry(&digest, "linux"), entry(&other, "windows")]));
    registry.push_manifest("org/text", "both", IMAGE_INDEX, &two).unwrap();
    get("org/text:both").failed(2, &["offers 2 manifests", &format!("@{other} (windows/amd64)")]);
    let one = index(json!([entry(&other, "linux")]));
    registry.push_manifest("org/text", "one", IMAGE_INDEX, &one).unwrap();
    assert_eq!(fs::read_to_string(get("org/text:one").path().join("a.txt")).unwrap(), "two");

    registry.delete("org/text", &digest).unwrap();
    get("org/text:1").failed(3, &["there is no manifest"]);
    house.on_local("a").run(["get", "oci://127.0.0.1:9/a:1"]).failed(7, &["cannot reach", "127.0.0.1:9"]);
}

#[test]
fn a_layer_with_a_path_outside_its_folder_is_refused_before_a_byte_is_written() {
    let Some((house, registry)) = with_registry(false) else { return };
    for (at, bad) in ["../evil", "/etc/evil", "a/../../evil", ".modelcache/evil"].iter().enumerate() {
        let layers = [Layer::new(ORAS, TITLE, "good", b"x".as_slice()), Layer::new(ORAS, TITLE, bad, b"y".as_slice())];
        registry.push("org/bad", &at.to_string(), "x/y", &layers).unwrap();
        let got = house.on_local("a").run(["get", &reference(registry.addr(), &format!("org/bad:{at}"))]);
        got.failed(5, &["names a layer", "rejected as a whole"]);
    }
    house.assert_no_artifact_or_staging("a");
}

/// Changes one byte of a file in place.
fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn wrong_bytes_of_a_registry_are_detected_by_the_digests() {
    let Some((house, registry)) = with_registry(false) else { return };
    let digest = push_model(&registry, "v1");
    let tag = reference(registry.addr(), "org/model:v1");
    let big = format!("sha256:{}", content::sha256(&big().to_vec().unwrap()));
    flip(&blob_file(&house, &big));
    house.on_local("a").run(["get", &tag]).failed(5, &["sha256 mismatch", "model.safetensors"]);
    house.assert_no_artifact("a");
    flip(&blob_file(&house, &big));
    assert_model(&house.on_local("a").run(["get", &tag]).path());

    let manifest = blob_file(&house, &digest);
    let text = fs::read_to_string(&manifest).unwrap().replace("config.json", "konfig.json");
    fs::write(&manifest, text).unwrap();
    house
        .on_local("b")
        .run(["get", &reference(registry.addr(), &format!("org/model@{digest}"))])
        .failed(5, &["manifest"]);
    house.assert_no_artifact_or_staging("b");
}
