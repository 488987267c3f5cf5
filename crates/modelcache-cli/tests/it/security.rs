//! Hostile surroundings: a bucket that somebody else wrote to, and secrets that nothing may repeat.
//!
//! What a remote says of an artifact is believed for as long as nobody better was asked. Whenever the Hub is, it wins.
//! Names that climb are refused wherever they come from; secrets are looked for in all output of every verb, at the
//! most talkative level, and in every byte of the local directory.

use crate::common::{BUCKET, House, TOKEN, assert_model, files_below};
use modelcache::digest::Digest;
use modelcache::key::FilePath;
use modelcache::manifest::{Held, Manifest, ObjectIdentity};
use modelcache_testkit::Content;
use std::fs;

const POISON: &str = "{\"a\": 2}";

/// A house whose bucket holds `org/model` whole; the answer is its commit, too.
fn published() -> (House, String) {
    let (house, commit) = House::with_model();
    house.on("publisher").run(["get", "hf://org/model"]).path();
    (house, commit)
}

fn key(commit: &str, path: &str) -> String {
    format!("cache/hf/org/model/{commit}/{path}")
}

/// Changes the manifest on the remote as somebody could who may write there: its checksum is right again.
fn rewrite_manifest(house: &House, commit: &str, change: impl FnOnce(&mut Manifest)) {
    let key = key(commit, ".modelcache/manifest.json");
    let mut manifest = Manifest::from_bytes(&house.s3.object(BUCKET, &key).unwrap()).unwrap();
    change(&mut manifest);
    house.s3.put(BUCKET, &key, manifest.to_bytes().unwrap()).unwrap();
}

#[test]
fn a_poisoned_object_is_told_and_the_hub_serves() {
    let (house, commit) = published();
    house.s3.put(BUCKET, &key(&commit, "config.json"), POISON).unwrap();
    let got = house.on("a").run(["get", &format!("hf://org/model@{commit}")]);
    assert_model(&got.said(&["WARN", "config.json", "remote"]).path());
    let healed = house.s3.object(BUCKET, &key(&commit, "config.json")).unwrap();
    assert_ne!(healed, POISON.as_bytes(), "the good bytes go back to the bucket");
}

#[test]
fn object_and_manifest_poisoned_together_do_not_survive_a_look_at_the_hub() {
    let (house, commit) = published();
    let poison = Content::from(POISON);
    house.s3.put(BUCKET, &key(&commit, "model.safetensors"), poison.clone()).unwrap();
    rewrite_manifest(&house, &commit, |manifest| {
        let entry = manifest.files.get_mut(&FilePath::new("model.safetensors").unwrap()).unwrap();
        (entry.size, entry.sha256, entry.ladder) = (poison.len(), Some(Digest::of(POISON.as_bytes())), None);
        entry.held = Some(Held::Remote(ObjectIdentity { etag: None, object_bytes: poison.len() }));
        // One file is not held there, so that the Hub is asked for the tree.
        manifest.files.get_mut(&FilePath::new("config.json").unwrap()).unwrap().held = None;
    });
    let got = house.on("a").run(["get", &format!("hf://org/model@{commit}")]);
    assert_model(&got.said(&["ERROR", "the remote contradicts", "model.safetensors"]).path());
}

#[test]
fn a_manifest_with_a_name_that_climbs_is_no_manifest() {
    let (house, commit) = published();
    let at = key(&commit, ".modelcache/manifest.json");
    let text = String::from_utf8(house.s3.object(BUCKET, &at).unwrap()).unwrap();
    let list = text.split_once("\"manifest\":").unwrap().1.trim_end().strip_suffix('}').unwrap();
    for name in ["../../../../planted", "/planted", "a/../../planted", "a\\\\planted", ".modelcache/claim", "a\\u0000"]
    {
        let list = list.replace("config.json", name);
        assert!(list.contains(name), "{list}");
        let digest = Digest::of(list.as_bytes());
        let hostile = format!("{{\"format\":1,\"sha256\":\"{digest}\",\"manifest\":{list}}}\n");
        house.s3.put(BUCKET, &at, hostile.as_str()).unwrap();
        let got = house.on("a").run(["get", &format!("hf://org/model@{commit}")]);
        assert_model(&got.said(&["WARN", "the manifest is damaged"]).path());
        fs::remove_dir_all(house.path("a")).unwrap();
        let planted = files_below(&house.path("")).into_iter().find(|path| path.ends_with("planted"));
        assert_eq!(planted, None, "{name}");
    }
}

#[test]
fn no_verb_repeats_a_secret_and_none_lies_in_the_directory() {
    let (house, commit) = House::with_model();
    house.hub.repo("org/model").private(TOKEN);
    house.write("p", "mine");
    let reference = format!("hf://org/model@{commit}");
    let run = |args: &[&str]| {
        // What any of them prints is searched where it is taken in.
        house
            .on("a")
            .env("HF_TOKEN", TOKEN)
            .env("MODEL_CACHE_LOG", "trace")
            .env("HTTP_PROXY", "")
            .env("MODEL_CACHE_METRICS_FILE", house.path("a.prom"))
            .run(args)
    };
    for args in [
        &["get", "hf://org/model", "--json"][..],
        &["get", "hf://org/absent"],
        &["get", &reference, "--dry-run"],
        &["exec", &reference, "--", "true"],
        &["prewarm", &reference],
        &["put", "p@1", "p"],
        &["ls", "--remote"],
        &["inspect", &reference],
        &["stats", "--json"],
        &["pin", &reference],
        &["unpin", &reference],
        &["prune"],
        &["evict", "p@1", "--yes"],
        &["evict", "hf://org/model", "--yes"],
        &["get", "hf://org/model"],
    ] {
        run(args);
    }
    // With credentials that are refused, errors are long.
    for variable in ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"] {
        let refused = house.on("b").env(variable, "canary-secret").env("MODEL_CACHE_LOG", "trace");
        refused.run(["ls", "--remote"]).failed(4, &[]);
    }
    let secrets = [TOKEN, house.s3.secret_key()];
    let kept = files_below(&house.path("a")).into_iter().map(|path| house.path("a").join(path));
    for path in kept.chain([house.path("a.prom")]) {
        let bytes = fs::read(&path).unwrap();
        for secret in secrets {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{secret} lies in {}", path.display());
        }
    }
}
