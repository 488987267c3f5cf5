//! Hostile input and secrets: a bucket that an attacker can write to, and output that must not contain a secret.
//!
//! The remote is trusted only as long as the Hub is not asked; if it is, the Hub wins. Paths that leave their folder
//! are refused from every source. Secrets are searched for in all output of every verb at the most verbose log level,
//! and in every byte of the cache directory.

use crate::common::{BUCKET, House, Run, TOKEN, assert_model, files_below};
use modelcache::digest::Digest;
use modelcache::key::FilePath;
use modelcache::manifest::{HeldIdentity, Manifest, ObjectIdentity};
use modelcache_testkit::Content;
use modelcache_testkit::s3::S3Fault;
use std::fs;

const POISON: &str = "{\"a\": 2}";

/// An environment with all of `org/model` in the bucket. Returns its commit, too.
fn published() -> (House, String) {
    let (house, commit) = House::with_model();
    house.on("publisher").run(["get", "hf://org/model"]).path();
    (house, commit)
}

fn key(commit: &str, path: &str) -> String {
    format!("cache/hf/org/model/{commit}/{path}")
}

/// Changes the manifest on the remote and its checksum, as an attacker with write access can.
fn rewrite_manifest(house: &House, commit: &str, change: impl FnOnce(&mut Manifest)) {
    let key = key(commit, ".modelcache/manifest.json");
    let mut manifest = Manifest::from_bytes(&house.s3.object(BUCKET, &key).unwrap()).unwrap();
    change(&mut manifest);
    house.s3.put(BUCKET, &key, manifest.to_bytes().unwrap()).unwrap();
}

#[test]
fn a_poisoned_object_is_reported_and_the_hub_serves() {
    let (house, commit) = published();
    house.s3.put(BUCKET, &key(&commit, "config.json"), POISON).unwrap();
    let got = house.on("a").run(["get", &format!("hf://org/model@{commit}")]);
    assert_model(&got.said(&["WARN", "config.json", "remote"]).path());
    let healed = house.s3.object(BUCKET, &key(&commit, "config.json")).unwrap();
    assert_ne!(healed, POISON.as_bytes(), "the object is repaired");
}

#[test]
fn a_poisoned_object_with_a_matching_manifest_is_detected_when_the_hub_is_asked() {
    let (house, commit) = published();
    let poison = Content::from(POISON);
    house.s3.put(BUCKET, &key(&commit, "model.safetensors"), poison.clone()).unwrap();
    rewrite_manifest(&house, &commit, |manifest| {
        let entry = manifest.files.get_mut(&FilePath::new("model.safetensors").unwrap()).unwrap();
        (entry.size, entry.sha256, entry.ladder) = (poison.len(), Some(Digest::of(POISON.as_bytes())), None);
        entry.held = Some(HeldIdentity::Remote(ObjectIdentity { etag: None, object_bytes: poison.len() }));
        // One file is not on the remote, so that the Hub is asked for its list of files.
        manifest.files.get_mut(&FilePath::new("config.json").unwrap()).unwrap().held = None;
    });
    let got = house.on("a").run(["get", &format!("hf://org/model@{commit}")]);
    assert_model(&got.said(&["ERROR", "the remote contradicts", "model.safetensors"]).path());
}

#[test]
fn a_manifest_with_a_path_outside_its_folder_is_refused() {
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
fn no_verb_prints_a_secret_and_the_directory_contains_none() {
    let (house, commit) = House::with_model();
    house.hub.repo("org/model").private(TOKEN);
    house.write("p", "mine");
    let reference = format!("hf://org/model@{commit}");
    let run = |args: &[&str]| {
        // `Outcome::new` searches the output for secrets.
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
    // Refused credentials lead to long errors.
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
            assert!(!found, "{secret} is in {}", path.display());
        }
    }
}

/// Forms of output: text at the log level `info`, and JSON at the log level `trace`.
const FORMS: [(&[&str], &str); 2] = [(&[], "info"), (&["--json"], "trace")];

/// Runs `args` in every form. `Outcome::new` searches the output for `canary-password` and the other secrets.
fn in_every_form(run: impl Fn() -> Run, args: &[&str]) {
    for (flags, level) in FORMS {
        run().env("MODEL_CACHE_LOG", level).run(flags.iter().chain(args));
    }
}

#[test]
fn no_verb_prints_a_secret_in_a_reference() {
    let house = House::new();
    house.write("p", "mine");
    let references = [
        "http://u:canary-password@127.0.0.1:1/x",
        "https://canary-token@127.0.0.1:1/x@1",
        "https://u:p/canary-password@127.0.0.1:1/x",
        "https://u:p canary-password@127.0.0.1:1/x",
        "http://127.0.0.1:1/x?X-Amz-Signature=canary-signature&X-Amz-Expires=60",
        "http://127.0.0.1:1/x?canary-signature",
        "hf://u:canary-password@org/model",
        "hf://org/model@main/f?token=canary-token",
        "s3://u:canary-password@models/x",
        "s3://canary-token@models/x",
        "s3://models/x?X-Amz-Security-Token=canary-session",
        "oci://u:canary-password@127.0.0.1:1/m:1",
        "oci://127.0.0.1:1/m?access_token=canary-token",
        "models://u:canary-password@127.0.0.1/x/1",
        "models:/x/1?token=canary-token",
        "file://u:canary-password@host/x",
        "file:///x?sig=canary-signature",
        "ftp://u:canary-password@127.0.0.1/x",
        "u:canary-password@x/y@1",
        "x@1?token=canary-token",
        "http://u:canary-password@127.0.0.1:1/x#sha256=zz",
    ];
    for reference in references {
        for args in [
            &["get", reference][..],
            &["get", reference, "--dry-run"],
            &["exec", reference, "--", "true"],
            &["prewarm", reference],
            &["put", reference, "p"],
            &["resolve", reference],
            &["inspect", reference],
            &["pin", reference],
            &["unpin", reference],
            &["evict", reference, "--yes"],
            &["verify", reference],
            &["tag", reference, "prod"],
            &["ls", reference],
            &["get", "p@1", "--for", reference],
            &["get", "p@1", "--remote", reference],
            &["get", "p@1", "--origin", reference],
            &["evict", "p@1", "--tier", reference],
            &[reference],
        ] {
            in_every_form(|| house.on_local("a"), args);
        }
    }
    assert_eq!(files_below(&house.path("a")).iter().find(|path| path.to_string_lossy().contains("canary")), None);
}

#[test]
fn no_verb_prints_a_secret_in_the_environment() {
    let house = House::new();
    let address = "http://u:canary-password@127.0.0.1:1";
    let rows = [
        ("AWS_ENDPOINT_URL", address),
        ("AWS_ENDPOINT_URL_S3", address),
        ("HF_ENDPOINT", address),
        ("HF_ENDPOINT", "ftp://u:canary-password@127.0.0.1:1"),
        ("MODEL_CACHE_REMOTE", address),
        ("MODEL_CACHE_REMOTE", "s3://u:canary-password@bucket/x"),
        ("MODEL_CACHE_REMOTE", "s3://bucket/x?token=canary-token"),
        ("MODEL_CACHE_S3_BUCKET", "u:canary-password@bucket"),
        ("MODEL_CACHE_ORIGIN", "hf://{name}@{version},http://u:canary-password@127.0.0.1:1/{name}/{version}"),
        ("MODEL_CACHE_ORIGIN", "http://u:p,canary-password@127.0.0.1:1/{name}"),
        ("MODEL_CACHE_MAX_BYTES", address),
        ("MODEL_CACHE_REF_TTL", address),
        ("MODEL_CACHE_LOG_FORMAT", address),
        ("MODEL_CACHE_OCI_PLAIN_HTTP", "u:canary-password@registry:5000"),
        ("MLFLOW_TRACKING_URI", address),
        ("MLFLOW_REGISTRY_URI", address),
        ("MLFLOW_TRACKING_TOKEN", "canary-token"),
        ("HTTPS_PROXY", address),
        ("HTTP_PROXY", address),
        ("ALL_PROXY", "u:canary-password@127.0.0.1:1"),
        ("http_proxy", address),
        ("AWS_SESSION_TOKEN", "canary-session"),
        ("AWS_SECRET_ACCESS_KEY", "canary-secret"),
        ("HF_TOKEN", "hf_canaryCanaryCanary"),
    ];
    for (variable, value) in rows {
        let run = || {
            let run = house
                .on("a")
                .env("MODEL_CACHE_RETRY_DEADLINE", "0s")
                .env("MODEL_CACHE_METRICS_FILE", house.path("prom"));
            run.env("MLFLOW_TRACKING_URI", house.hub.url()).env(variable, value)
        };
        for args in [
            &["ls"][..],
            &["ls", "--remote"],
            &["stats"],
            &["get", "x@1"],
            &["get", "hf://org/absent"],
            &["get", "http://localhost:1/x"],
            &["get", "models:/x/1"],
            &["get", "oci://localhost:1/x:1"],
            &["doctor", "--read-only"],
        ] {
            in_every_form(run, args);
        }
    }
    // The log filter is a setting, too.
    for args in [&["ls"][..], &["doctor", "--read-only"]] {
        house.on("a").env("MODEL_CACHE_LOG", address).run(args);
    }
    // A filter that names modules of the HTTP client shows their traces, without passwords in them.
    let traced = house.on("a").env("HTTP_PROXY", address).env("MODEL_CACHE_LOG", "off,hyper_util=trace,reqwest=trace");
    let traced = traced.env("MODEL_CACHE_RETRY_DEADLINE", "0s").run(["get", "http://host.test/x"]);
    assert!(traced.stderr.contains("TRACE") || traced.stderr.contains("DEBUG"), "{traced}");
}

#[test]
fn at_the_trace_level_only_modules_of_modelcache_are_logged() {
    let (house, commit) = House::with_model();
    let run = house.on("a").env("MODEL_CACHE_LOG", "trace").env("MODEL_CACHE_LOG_FORMAT", "json");
    let got = run.run(["get", &format!("hf://org/model@{commit}")]);
    for line in got.stderr.lines().filter(|line| line.starts_with('{')) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["target"].as_str().unwrap().starts_with("modelcache"), "{line}");
    }
}

#[test]
fn no_verb_prints_a_secret_in_the_configuration() {
    let house = House::new();
    let address = "http://u:canary-password@127.0.0.1:1";
    for text in [
        format!("[credentials.\"{address}\"]\nbearer = \"canary-token\""),
        format!("[credentials.\"{address}\"]\nbearer = 1.5"),
        format!("[credentials.\"{address}\"]\nbaerer = \"canary-token\""),
        format!("[credentials.\"{address}\"]\nbearer = \"canary-token\"\npassword = \"canary-secret\""),
        "[credentials.\"u:canary-password@127.0.0.1\"]\nbearer = \"x\"".to_owned(),
        "[credentials.\"http://127.0.0.1:1\"]\nbearer = \"canary-token\"".to_owned(),
        "[credentials.\"http://127.0.0.1:1\"]\nbearer = canary-token".to_owned(),
        "[credentials.\"http://127.0.0.1:1\"]\nbearer = \"canary-token".to_owned(),
        "[credentials.\"http://127.0.0.1:1\"]\nbearer_env = \"canary-token\"".to_owned(),
        "[credentials.\"http://127.0.0.1:1\"]\nbearer_file = \"canary-token\"".to_owned(),
        format!("remote = \"{address}\""),
        format!("remote = \"{address}"),
        format!("origin = \"{address}/x\""),
        format!("mlflow_tracking_uri = \"{address}\""),
        format!("max_bytes = \"{address}\""),
        format!("\"{address}\" = 1"),
        format!("\"{address}\" = 1\n\"{address}\" = 2"),
        format!("[remote]\nurl = \"s3://models\"\noptions = {{ endpoint = \"{address}\" }}"),
        "[remote]\nurl = \"s3://models\"\noptions = { endpoint = \"u:canary-password@host\" }".to_owned(),
        format!("[remote]\nurl = \"s3://models\"\noptions = {{ path_style = \"{address}\" }}"),
        format!(
            "[remote]\nurl = \"s3://models\"\noptions = {{ proxy_url = \"{address}\", endpoint = \"http://127.0.0.1:1\" }}"
        ),
        "[remote]\nurl = \"s3://models\"\noptions = { secret_access_key = \"canary-secret\", access_key_id = \"k\" }"
            .to_owned(),
    ] {
        let file = house.write("c.toml", text.as_str());
        let run = || {
            let run = house.on_local("a").envs(house.s3.env()).without("AWS_ENDPOINT_URL");
            run.env("MODEL_CACHE_CONFIG", &file)
                .env("MODEL_CACHE_RETRY_DEADLINE", "0s")
                .env("AWS_EC2_METADATA_DISABLED", "true")
        };
        for args in [
            &["ls"][..],
            &["ls", "--remote"],
            &["get", "http://127.0.0.1:1/x"],
            &["get", "models:/x/1"],
            &["doctor", "--read-only"],
        ] {
            in_every_form(run, args);
        }
    }
}

#[test]
fn a_secret_quoted_by_a_server_is_not_printed() {
    let (house, commit) = House::with_model();
    let secret = house.s3.secret_key();
    let all = format!(
        "{secret} canary-session {TOKEN} testkit%2Fsecret%2Bkey http://u:canary-password@h Signature=canary-signature"
    );
    for status in [400, 403, 404, 500, 503] {
        for (code, message) in [("Bad", all.as_str()), (all.as_str(), ""), ("AccessDenied", all.as_str())] {
            house.s3.faults().clear();
            house.s3.faults().add(S3Fault::error(status, code, message));
            let run = || {
                let run = house.on("a").env("HF_TOKEN", TOKEN).env("MODEL_CACHE_RETRY_DEADLINE", "0s");
                run.env("AWS_SESSION_TOKEN", "canary-session")
            };
            for args in [
                &["ls", "--remote"][..],
                &["get", "m@1"],
                &["get", &format!("hf://org/model@{commit}")],
                &["inspect", "m@1"],
                &["evict", "m@1", "--yes"],
                &["doctor"],
            ] {
                in_every_form(run, args);
            }
        }
    }
}

/// Terminal escapes, a bell, line ends, direction marks, zero-width characters.
const HOSTILE: &str = "\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\nerror: a false line\r\u{85}\u{202e}exe\u{2066}\u{200b}\u{200d}\u{2028}\u{61c}";

/// Runs `args` in every form and asserts that the output contains no control or format character of [`HOSTILE`].
#[track_caller]
fn assert_printable(run: impl Fn() -> Run, args: &[&str]) {
    for (flags, level) in FORMS {
        let ended = run()
            .env("MODEL_CACHE_LOG", level)
            .env("MODEL_CACHE_LOG_FORMAT", if level == "trace" { "json" } else { "text" });
        let ended = ended.run(flags.iter().chain(args));
        let shown = format!("{}{}", ended.stdout, ended.stderr);
        let bad = |c: char| c != '\n' && HOSTILE.contains(c) && !c.is_ascii_graphic() && c != ' ';
        assert_eq!(shown.chars().find(|c| bad(*c)), None, "{shown:?}");
        assert!(!shown.lines().any(|line| line.starts_with("error: a false line")), "{shown:?}");
    }
}

#[test]
fn the_error_text_of_a_server_is_printed_without_control_characters() {
    let house = House::new();
    let (long, spelled) = ("C".repeat(60_000), HOSTILE.chars().map(|c| format!("&#{};", c as u32)).collect::<String>());
    for status in [400, 403, 503] {
        for (code, message) in [("Bad", HOSTILE), (HOSTILE, "m"), (&long, &long), ("Bad", &spelled)] {
            house.s3.faults().clear();
            house.s3.faults().add(S3Fault::error(status, code, message));
            let run = || house.on("a").env("MODEL_CACHE_RETRY_DEADLINE", "0s");
            for args in [&["get", "m@1"][..], &["inspect", "m@1"], &["ls", "--remote"], &["doctor", "--read-only"]] {
                assert_printable(run, args);
            }
            let said = run().run(["get", "m@1"]).stderr.len();
            assert!(said < 3000, "{said} bytes were printed");
        }
    }
    house.s3.faults().clear();
    house.s3.faults().add(S3Fault::wrong_region("eu\u{9b}31m-\u{202e}west"));
    assert_printable(|| house.on("a"), &["get", "m@1"]);
}

#[test]
fn names_in_a_shared_directory_or_a_bucket_are_printed_without_control_characters() {
    let house = House::new();
    let mut names = ["a\u{202e}b", "a\u{200b}b", "a\u{2066}b"].into_iter();
    names.all(|name| house.s3.put(BUCKET, &format!("cache/x/1/{name}"), "1").is_ok());
    house.on("a").run(["get", "x@1"]).path();
    for args in [&["ls"][..], &["inspect", "x@1"], &["get", "x@1", "--dry-run"], &["verify"], &["ls", "--remote"]] {
        assert_printable(|| house.on("a"), args);
    }
    house.on("a").env("USER", HOSTILE).run(["pin", "x@1", "--reason", HOSTILE]).ok();
    let pin = files_below(&house.path("a")).into_iter().find(|path| path.ends_with("pin")).unwrap();
    let text = serde_json::json!({"since_unix": 1, "by": HOSTILE, "reason": HOSTILE}).to_string();
    fs::write(house.path("a").join(pin), text).unwrap();
    for args in [
        &["inspect", "x@1"][..],
        &["evict", "x@1", "--yes"],
        &["prune", "--to", "0"],
        &["prune", "--to", "0", "--dry-run"],
        &["ls"],
        &["pin", "x@1", "--reason", HOSTILE],
        &["unpin", "x@1"],
    ] {
        assert_printable(|| house.on("a"), args);
    }
}

#[test]
fn arguments_and_settings_are_printed_without_control_characters() {
    let house = House::new();
    let url = format!("http://h/{HOSTILE}");
    for args in [
        &["get", HOSTILE][..],
        &["get", &url],
        &["get", "a@1", "--for", HOSTILE],
        &["get", "a@1", "--origin", HOSTILE],
        &["get", "a@1", "--include", &format!("[{HOSTILE}")],
        &["evict", "a@1", "--tier", HOSTILE],
        &["inspect", "a@1", HOSTILE],
        &["exec", "a@1", "--", HOSTILE],
        &["put", "a@1", HOSTILE],
        &["tag", "a@1", HOSTILE],
        &["verify", HOSTILE],
        &[HOSTILE],
        &[&format!("--{HOSTILE}")],
    ] {
        assert_printable(|| house.on_local("a"), args);
    }
    for name in [
        "MODEL_CACHE_REMOTE",
        "MODEL_CACHE_MAX_BYTES",
        "HF_ENDPOINT",
        "MODEL_CACHE_DIR",
        "MODEL_CACHE_S3_BUCKET",
        "NETRC",
    ] {
        assert_printable(|| house.on_local("a").env(name, HOSTILE), &["stats"]);
        assert_printable(|| house.on_local("a").env(name, HOSTILE), &["doctor", "--read-only"]);
    }
    let key = serde_json::Value::from(HOSTILE).to_string();
    for text in [
        format!("{key} = 1"),
        format!("remote = {key}"),
        HOSTILE.to_owned(),
        format!("[credentials.{key}]\nbearer = \"x\""),
    ] {
        let file = house.write("c.toml", text.as_str());
        assert_printable(|| house.on_local("a").env("MODEL_CACHE_CONFIG", &file), &["ls"]);
    }
}
