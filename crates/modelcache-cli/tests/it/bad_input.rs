//! Artifacts that cannot be fetched or put. Each failure has its exit code and a message with the artifact, the tier
//! and a remedy, and the directory works as before.

use crate::common::*;
use modelcache_testkit::content;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

#[test]
fn anything_missing_at_an_origin_ends_in_3_with_a_remedy() {
    let (house, _) = House::with_model();
    let unknown = "hf://org/model@0123456789abcdef0123456789abcdef01234567";
    for (args, message_parts) in [
        (&["hf://org/none"][..], &["hf://org/none", "origin", "no repository org/none", "HF_TOKEN"][..]),
        (&["hf://org/model@v9"], &["hf://org/model@v9", "origin", "no revision v9", "without @revision it is main"]),
        (&["hf://org/model", "--revision", "v9"], &["no revision v9", "check the branch, tag or commit"]),
        (&[unknown], &[unknown, "not found", "the origin", "check the commit"]),
        (&["hf://org/model@main/none.json"], &["no file none.json", "4 files: config.json, empty"]),
        (&["hf://org/model", "--include", "*.gguf"], &["no file matches *.gguf", "4 files: config.json, empty"]),
        (&["hf://org/model", "--exclude", "*"], &["no file matches", "4 files: config.json, empty"]),
        (&["hf://datasets/org/model"], &["hf://datasets/org/model", "no repository"]),
        (&["file:///no/such/folder"], &["file:///no/such/folder", "origin", "check the path"]),
    ] {
        house.on("a").run([&["get"], args].concat()).failed(3, message_parts);
        house.assert_no_artifact("a");
    }
    assert_eq!(house.published_keys(), [""; 0], "nothing was written to the remote");
    assert_model(&house.on("a").run(["get", "hf://org/model"]).path());
}

#[test]
fn the_error_for_an_unknown_bare_name_lists_the_tiers_that_were_asked() {
    let (house, _) = House::with_model();
    let here = ["nobody@1", "not found on this disk", "MODEL_CACHE_REMOTE", "MODEL_CACHE_ORIGIN", "hf://"];
    house.on_local("a").run(["get", "nobody@1"]).failed(3, &here);
    let remote = ["nobody@1", "this disk", "s3://models/cache", "modelcache ls --remote"];
    house.on("a").run(["get", "nobody@1"]).failed(3, &remote);
    let origin = ["nobody@1", "s3://models/cache", "hf://org/{name}@{version}", "MODEL_CACHE_ORIGIN"];
    house.on("a").run(["get", "nobody@1", "--origin", "hf://org/{name}@{version}"]).failed(3, &origin);
    house.assert_no_artifact("a");
    assert!(house.hub.body_gets().is_empty());

    house.write("w.bin", "weights");
    house.on("b").run(["put", "nobody@1", "w.bin"]).ok();
    assert_same(&house.on("a").run(["get", "nobody@1"]).path(), &"weights".into());
}

#[test]
fn a_gated_repository_names_the_page_where_its_conditions_are_accepted() {
    let (house, commit) = House::with_model();
    house.hub.repo("org/model").accept(TOKEN);
    let page = format!("{}/org/model", house.hub.url());
    let message_parts = [commit.as_str(), "origin", "org/model is gated", "accept its conditions", &page, "HF_TOKEN"];
    house.on("a").run(["get", "hf://org/model"]).failed(4, &message_parts);
    house.on("a").env("HF_TOKEN", "hf_other").run(["get", "hf://org/model"]).failed(4, &message_parts);
    house.assert_no_artifact("a");
    assert_eq!(house.published_keys(), [""; 0]);
    assert_model(&house.on("a").env("HF_TOKEN", TOKEN).run(["get", "hf://org/model"]).path());
    assert_eq!(house.hub.tokens_at_cdn(), [""; 0]);
}

#[test]
fn a_private_repository_accepts_its_token_from_every_source() {
    let (house, _) = House::with_model();
    house.hub.repo("org/model").private(TOKEN);
    let on = |dir: &str| house.on_local(dir);
    let message_parts = ["hf://org/model", "origin", "or it is private", "set HF_TOKEN"];
    on("a").run(["get", "hf://org/model"]).failed(3, &message_parts);
    let message_parts = ["hf://org/model", "origin", "the token has no access to it", "an account with access"];
    on("a").env("HF_TOKEN", "hf_canary-secret").run(["get", "hf://org/model"]).failed(3, &message_parts);
    on("a")
        .env("HF_TOKEN", "hf_canary-secret\nx")
        .run(["get", "hf://org/model"])
        .failed(2, &["HF_TOKEN", "line breaks"]);
    house.assert_no_artifact("a");

    let file = house.write("token", format!("{TOKEN}\n").as_str());
    house.write("hf/token", TOKEN);
    house.write("home/.cache/huggingface/token", TOKEN);
    assert_model(&on("a").env("HF_TOKEN", TOKEN).run(["get", "hf://org/model"]).path());
    assert_model(&on("b").env("HF_TOKEN_PATH", &file).run(["get", "hf://org/model"]).path());
    assert_model(&on("c").env("HF_HOME", house.path("hf")).run(["get", "hf://org/model"]).path());
    assert_model(&on("d").run(["get", "hf://org/model"]).path());
    assert_eq!(house.hub.tokens_at_cdn(), [""; 0]);
}

#[test]
fn the_error_for_a_malformed_reference_shows_the_right_form() {
    let (house, _) = House::with_model();
    for (reference, message_parts) in [
        ("s3://", &["s3://", "names no bucket", "write s3://bucket/prefix-or-object"][..]),
        ("s3://bucket/a//b", &["s3://bucket/a//b", "an empty segment"]),
        ("s3://bucket/../b", &["s3://bucket/../b", "\"..\""]),
        ("models:/name/3", &["models:/name/3", "MLFLOW_TRACKING_URI"]),
        ("models:/name", &["models:/name", "names no version", "models:/name@alias"]),
        ("oci://registry", &["oci://registry", "names no repository"]),
        ("https://host/", &["https://host/", "has no file name"]),
        ("https://ann:canary-secret@host/f", &["user or password", "netrc"]),
        ("https://host/f?X-Amz-Signature=canary-signature", &["a query", "put NAME@VERSION FILE"]),
        ("ftp://host/file.bin", &["ftp://host/file.bin", "write name@version"]),
        ("hf://org/model/config.json", &["hf://org/model/config.json", "hf://org/model@revision/file"]),
        ("hf://", &["hf://", "write hf://org/model"]),
        ("file://host/x", &["file://host/x", "file:///absolute/path"]),
        ("file://x", &["file://x", "file:///absolute/path"]),
        ("model", &["model", "has no version", "NAME@VERSION"]),
        ("org/model", &["has no version", "write hf://org/model", "org/model@3"]),
        ("model:3", &["has no version", "NAME@VERSION: model@3"]),
        ("s3:/bucket/x", &["has no version", "write s3://bucket/x"]),
        ("./model", &["has no version", "file:///FOLDER"]),
        ("https://huggingface.co/org/model", &["a page of the Hugging Face Hub", "write hf://org/model"]),
        ("https://huggingface.co/org/model/blob/v1/a.json", &["a page of the", "write hf://org/model@v1/a.json"]),
        ("../model@1", &["\"../model\"", "segment \"..\"", "write NAME@VERSION"]),
        ("m@1#sha256=abc", &["m@1#sha256=abc", "64 hex digits"]),
        ("m@1#md5=d41d8cd98f00b204e9800998ecf8427e", &["#md5", "append #sha256=", "sha256=<64 hex digits>"]),
        ("m@1?a=b", &["\"1?a=b\"", "'?'", "write NAME@VERSION"]),
    ] {
        house.on("a").run(["get", reference]).failed(2, &[&["error: "], message_parts].concat());
    }
    house.on("a").run(["get", "m@1", "--revision", "2"]).failed(2, &["--revision", "hf://"]);
    let both = ["get", "hf://org/model@main/config.json", "--include", "*.bin"];
    house.on("a").run(both).failed(2, &["config.json", "--include"]);
    // Every reference is parsed before any is downloaded.
    let several = ["get", "hf://org/model", "config.json", "org/model"];
    house.on("a").run(several).failed(2, &["\"config.json\" has no version", "\"org/model\" has no version"]);
    house.on("a").run(["exec", "hf://org/model", "config.json", "--", "true"]).failed(2, &["\"config.json\""]);
    assert_eq!(house.hub.requests().len() + house.s3.requests().len(), 0, "no request is sent");
    house.assert_no_artifact("a");
    assert_model(&house.on("a").run(["get", "hf://org/model"]).path());
}

#[test]
fn a_digest_mismatch_is_refused_before_any_download_if_the_digest_is_known() {
    let (house, _) = House::with_model();
    let other = content::sha256(b"other");
    let message_parts =
        |what: &str| vec![what.to_owned(), other.clone(), "is demanded".into(), "pins other content".into()];
    let fails = |reference: &str, what: &str| {
        let message_parts = message_parts(what);
        let message_parts: Vec<&str> = message_parts.iter().map(String::as_str).collect();
        house.on("a").run(["get", &format!("{reference}#sha256={other}")]).failed(5, &message_parts);
        house.assert_no_artifact("a");
    };
    // The Hub states the SHA-256 of a large file. For a small one it states only a SHA-1, so that file is downloaded
    // first.
    fails("hf://org/model@main/model.safetensors", &big().sha256().unwrap());
    assert_eq!(house.hub.body_bytes(), 0);
    house
        .on("a")
        .run(["get", &format!("hf://org/model@main/config.json#sha256={other}")])
        .failed(5, &["config.json", &other, "does not match the digest in the reference"]);
    house.assert_no_artifact("a");
    fails("hf://org/model", "the artifact has");

    for (path, content) in model() {
        house.write(&format!("mine/{path}"), content);
    }
    let put = house.on("b").run(["put", "m@1", "mine", "--json"]).object();
    fails("m@1", &text(&put["sha256"]));
    assert_eq!(house.s3.object_gets("m/1/model.safetensors").len(), 0);
    assert_model(&house.on("a").run(["get", &format!("m@1#sha256={}", text(&put["sha256"]))]).path());
    assert_model(&house.on("a").run(["get", "hf://org/model"]).path());
}

#[test]
fn paths_that_cannot_be_an_artifact_are_not_put() {
    let house = House::new();
    fs::create_dir_all(house.path("empty/deep/er")).unwrap();
    fs::create_dir_all(house.path("loop/x")).unwrap();
    symlink("..", house.path("loop/x/up")).unwrap();
    fs::create_dir_all(house.path("dangling")).unwrap();
    symlink("nowhere", house.path("dangling/link")).unwrap();
    fs::create_dir_all(house.path("pipes")).unwrap();
    assert!(Command::new("mkfifo").arg(house.path("pipes/fifo")).status().unwrap().success());
    house.write("ours/.modelcache/manifest.json", "{}");
    house.write("w.bin", "weights");
    for (code, key, path, message_parts) in [
        (2, "m@1", "empty", &["m@1", "empty holds no files", "at least one file"][..]),
        (3, "m@1", "none", &["m@1", "there is no ", "/none", "check the path"]),
        (2, "m@1", "loop", &["m@1", "loop/x/up", "links back to a folder above it"]),
        (2, "m@1", "dangling", &["m@1", "dangling/link", "points to nothing"]),
        (2, "m@1", "pipes", &["m@1", "pipes/fifo", "neither a file nor a folder", "take it out"]),
        (2, "m@1", "pipes/fifo", &["m@1", "pipes/fifo", "neither a file nor a folder"]),
        (2, "m@1", "/dev/null", &["m@1", "/dev/null", "neither a file nor a folder"]),
        (2, "m@1", "ours", &["m@1", ".modelcache"]),
        (2, "m", "w.bin", &["\"m\" has no version", "NAME@VERSION"]),
        (2, "a/../b@1", "w.bin", &["\"a/../b\"", "segment \"..\""]),
        (2, "hf://org/model", "w.bin", &["hf://org/model"]),
    ] {
        house.on("a").run(["put", key, path]).failed(code, message_parts);
        house.assert_no_artifact_or_staging("a");
    }
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
    house.on("a").run(["put", "m@1", "w.bin"]).ok();
    assert_same(&house.on("b").run(["get", "m@1"]).path(), &"weights".into());
}

#[test]
fn an_unreadable_file_is_named() {
    let house = House::new();
    let chmod = |name: &str, mode| fs::set_permissions(house.path(name), fs::Permissions::from_mode(mode)).unwrap();
    house.write("mine/secret/key.bin", "weights");
    fs::create_dir_all(house.path("a")).unwrap();
    chmod("", 0o755);
    chmod("a", 0o777);
    let put = || house.on("a").unprivileged().run(["put", "m@1", "mine"]);
    let get = || house.on("a").unprivileged().run(["get", &format!("file://{}", house.path("mine").display())]);
    for (name, mode, back) in [("mine/secret/key.bin", 0, 0o644), ("mine/secret", 0, 0o755)] {
        chmod(name, mode);
        put().failed(4, &["m@1", name, "ermission denied", "read access to it"]);
        get().failed(4, &["origin", name, "ermission denied", "read access to it"]);
        house.assert_no_artifact("a");
        chmod(name, back);
    }
    assert_eq!(house.s3.keys(BUCKET), [""; 0]);
    put().ok();
    assert_same(&get().path().join("secret/key.bin"), &"weights".into());
    assert_same(&house.on("b").run(["get", "m@1"]).path().join("secret/key.bin"), &"weights".into());
}

#[test]
fn arguments_of_put_that_are_no_path_are_explained() {
    let house = House::new();
    house.write("tree/x", "x");
    for (args, message_parts) in [
        (["tree", "oddtree@2"], &["\"tree\" is a file or folder", "modelcache put oddtree@2 tree"][..]),
        (["x@1", "-"], &["standard input", "modelcache put x@1 FILE"]),
        (["x@1", "https://host/f"], &["not a URL", "modelcache get https://host/f"]),
        (["x@1", "s3://bucket/k"], &["not a URL", "modelcache get s3://bucket/k"]),
    ] {
        house.on_local("a").run(["put", args[0], args[1]]).failed(2, message_parts);
    }
}

#[test]
fn a_pattern_in_a_key_is_explained_and_a_number_sign_belongs_to_the_key() {
    let house = House::new();
    house.s3.put(BUCKET, "p/a#b.txt", "odd").unwrap();
    house.s3.put(BUCKET, "p/c.txt", "c").unwrap();
    let missed = house.on("a").run(["get", "s3://models/p/*.txt"]);
    missed.failed(3, &["get 's3://models/p/' --include '*.txt'"]);
    let got = house.on("a").run(["get", "s3://models/p/", "--include", "*.txt"]).path();
    assert_eq!(files_below(&got).len(), 2);
    assert_same(&house.on("a").run(["get", "s3://models/p/a#b.txt"]).path(), &"odd".into());
    let digest = modelcache_testkit::content::sha256(b"odd");
    house.on("a").run(["get", &format!("s3://models/p/a#b.txt#sha256={digest}")]).path();
    let other = format!("s3://models/p/a#b.txt#sha256={}", modelcache_testkit::content::sha256(b"even"));
    house.on("a").run(["get", &other]).failed(5, &["a%23b.txt"]);
}
