//! The Hugging Face routes, as clients of the Hub need them.

use crate::common::*;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use reqwest::Method;
use reqwest::header::{CONTENT_TYPE, IF_NONE_MATCH, RANGE, USER_AGENT};
use serde_json::{Value, json};

const BIG: u64 = 2 * MIB + 5;

fn big() -> Content {
    Content::generated(2, BIG)
}

fn files() -> Vec<(&'static str, Content)> {
    vec![
        ("config.json", "{\"a\": 1}".into()),
        ("empty.txt", "".into()),
        ("model.safetensors", big()),
        ("sub dir/fé+%.txt", "odd name".into()),
    ]
}

async fn with_model() -> (House, Served, String) {
    let (house, commit) = House::with_model(&files()).await;
    let served = house.daemon();
    (house, served, commit)
}

fn names(tree: &Value) -> Vec<&str> {
    tree.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_described_with_its_files() {
    let (_house, served, commit) = with_model().await;
    for path in
        ["/api/models/org/model", "/api/models/org/model/revision/main", "/api/models/org/model/revision/{commit}"]
    {
        let reply = served.get(&path.replace("{commit}", &commit)).await.ok();
        assert_eq!(reply.header("x-repo-commit"), Some(commit.as_str()));
        let info = reply.json();
        assert_eq!((&info["id"], &info["sha"]), (&json!("org/model"), &json!(commit)));
        let siblings: Vec<_> = info["siblings"].as_array().unwrap().iter().map(|row| &row["rfilename"]).collect();
        assert_eq!(siblings, ["config.json", "empty.txt", "model.safetensors", "sub dir/fé+%.txt"]);
        assert!(info["siblings"][0].get("size").is_none(), "sizes only with blobs=true");
    }
    for query in ["?blobs=true", "?blobs=True"] {
        let info = served.get(&format!("/api/models/org/model/revision/main{query}")).await.ok().json();
        let sibling = &info["siblings"][2];
        assert_eq!((&sibling["size"], &sibling["lfs"]["sha256"]), (&json!(BIG), &json!(big().sha256().unwrap())));
        assert_eq!(info["siblings"][0]["blobId"], json!(files()[0].1.git_sha1().unwrap()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_description_made_from_the_manifest_agrees_with_that_of_the_hub() {
    let (house, served, _) = with_model().await;
    let path = "/api/models/org/model/revision/main?blobs=true";
    let of_hub = reqwest::get(format!("{}{path}", house.hub.url())).await.unwrap().json::<Value>().await.unwrap();
    // The first request of the daemon for the description fails.
    served.get("/api/models/org/model/tree/main").await.ok();
    house.hub.faults().add(HubFault::status(500).on("blobs"));
    let own = served.get(path).await.ok().json();
    for field in ["id", "modelId", "sha", "siblings", "private", "gated", "author"] {
        assert_eq!(own[field], of_hub[field], "{field}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tree_agrees_with_that_of_the_hub() {
    let (house, served, commit) = with_model().await;
    for path in
        ["tree/main", "tree/main?recursive=True&expand=false", "tree/main/sub%20dir", "tree/main/sub%20dir?recursive=1"]
    {
        let path = format!("/api/models/org/model/{path}");
        let mut of_hub =
            reqwest::get(format!("{}{path}", house.hub.url())).await.unwrap().json::<Value>().await.unwrap();
        let reply = served.get(&path).await.ok();
        let (mut own, commit_header) = (reply.json(), reply.header("x-repo-commit"));
        assert_eq!(commit_header, Some(commit.as_str()));
        assert_eq!(reply.header("link"), None);
        // Git's object id of a folder is not recorded in manifests.
        for rows in [&mut own, &mut of_hub] {
            for row in rows.as_array_mut().unwrap().iter_mut().filter(|row| row["type"] == "directory") {
                row["oid"] = Value::Null;
            }
        }
        assert_eq!(own, of_hub, "{path}");
    }
    let code = served.get("/api/models/org/model/tree/main/none").await.hub_error(404);
    assert_eq!(code.as_deref(), Some("EntryNotFound"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_tree_is_paged_with_links_to_the_daemon() {
    let house = House::new().await;
    let names_wanted: Vec<String> = (0..2_501).map(|number| format!("data/{number:05}.txt")).collect();
    let files: Vec<_> = names_wanted.iter().map(|name| (name.as_str(), Content::from("x"))).collect();
    house.publish("org/many", &files);
    let served = house.daemon();
    for (forwarded, scheme) in [(None, "http"), (Some("https"), "https"), (Some("gopher"), "http")] {
        let (mut found, mut pages) = (Vec::new(), 0);
        let mut next = Some(format!("{}/api/models/org/many/tree/main?recursive=true&expand=false", served.url));
        while let Some(url) = next {
            let request = served.client.get(&url);
            let request = match forwarded {
                Some(forwarded) => request.header("x-forwarded-proto", forwarded),
                None => request,
            };
            let reply = Reply::of(request).await.ok();
            let page = reply.json();
            assert!(page.as_array().unwrap().len() <= 1_000);
            found.extend(names(&page).into_iter().filter(|path| *path != "data").map(str::to_owned));
            pages += 1;
            next = reply.header("link").map(|link| {
                let url = link.strip_prefix('<').and_then(|link| link.strip_suffix(">; rel=\"next\"")).unwrap();
                let path = url.strip_prefix(&format!("{scheme}{}", served.url.trim_start_matches("http"))).unwrap();
                format!("{}{path}", served.url)
            });
        }
        assert_eq!((found, pages), (names_wanted.clone(), 3));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_info_takes_a_form_or_json() {
    let (_house, served, commit) = with_model().await;
    let url = "/api/models/org/model/paths-info/main";
    let form = "paths=model.safetensors&paths=sub+dir%2Ff%C3%A9%2B%25.txt&paths=none&expand=False";
    let json = json!({ "paths": ["model.safetensors", "sub dir/fé+%.txt", "none"], "expand": false }).to_string();
    for (content_type, body) in [("application/x-www-form-urlencoded", form), ("application/json", json.as_str())] {
        let request = served.request(Method::POST, url).header(CONTENT_TYPE, content_type).body(body.to_owned());
        let reply = Reply::of(request).await.ok();
        assert_eq!(reply.header("x-repo-commit"), Some(commit.as_str()));
        assert_eq!(names(&reply.json()), ["model.safetensors", "sub dir/fé+%.txt"]);
        assert_eq!(reply.json()[0]["lfs"]["oid"], json!(big().sha256().unwrap()));
    }
    let folder = Reply::of(served.request(Method::POST, url).body("paths=sub+dir")).await.ok();
    assert_eq!(folder.json()[0]["type"], "directory");
    served.get(url).await.hub_error(405);
    let large = Reply::of(served.request(Method::POST, url).body("paths=a&".repeat(200_000))).await;
    assert_eq!(large.status, 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_movable_revision_is_redirected_to_its_commit() {
    let (house, served, commit) = with_model().await;
    house.hub.repo("org/model").branch("refs/pr/1", &commit);
    house.hub.repo("org/model").branch("feature/x", &commit);
    for revision in ["main", "refs%2Fpr%2F1", "feature%2Fx"] {
        for (file, location) in [
            ("model.safetensors", "model.safetensors"),
            ("sub%20dir/f%C3%A9%2B%25.txt", "sub%20dir/f%C3%A9%2B%25.txt"),
            ("sub%20dir/f%c3%a9+%25.txt", "sub%20dir/f%C3%A9%2B%25.txt"),
        ] {
            for method in [Method::HEAD, Method::GET] {
                let request = served.request(method, &file_url("org/model", revision, file));
                let reply = Reply::of(request).await.is(307);
                let found = reply.header("location").unwrap();
                assert_eq!(found, format!("/org/model/resolve/{commit}/{location}"), "{revision} {file}");
                assert_eq!(reply.header("x-repo-commit"), Some(commit.as_str()));
                assert!(reply.header("etag").is_some());
            }
        }
    }
    // `main` moves between HEAD and GET: the client stays on the commit that it was redirected to.
    let location =
        served.head(&file_url("org/model", "main", "config.json")).await.header("location").unwrap().to_owned();
    let second = house.publish("org/model", &[("config.json", "{\"b\": 22}".into())]);
    assert_ne!(commit, second);
    assert_eq!(served.get(&location).await.ok().text(), "{\"a\": 1}");
    assert_eq!(served.get(&file_url("org/model", &second, "config.json")).await.ok().text(), "{\"b\": 22}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_has_the_headers_that_clients_read() {
    let (_house, served, commit) = with_model().await;
    let etag_of = |path: &str, content: &Content| match path.ends_with("safetensors") {
        true => content.sha256().unwrap(),
        false => content.git_sha1().unwrap(),
    };
    for (path, content) in files() {
        let (url, etag) = (file_url("org/model", &commit, path), format!("\"{}\"", etag_of(path, &content)));
        let url = url.replace('%', "%25").replace(' ', "%20").replace('é', "%C3%A9");
        let head = served.head(&url).await.ok();
        let get = served.get(&url).await.ok();
        get.has(&content, 0..content.len());
        for reply in [&head, &get] {
            assert_eq!(reply.header("x-repo-commit"), Some(commit.as_str()), "{path}");
            assert_eq!(reply.header("etag"), Some(etag.as_str()), "{path}");
            assert_eq!(reply.header("content-length"), Some(content.len().to_string().as_str()), "{path}: {reply:?}");
            assert_eq!(reply.header("accept-ranges"), Some("bytes"));
            let is_lfs = path.ends_with("safetensors");
            assert_eq!(reply.header("x-linked-etag").is_some(), is_lfs);
            assert_eq!(reply.header("x-linked-size"), is_lfs.then_some(BIG.to_string().as_str()));
        }
        Reply::of(served.request(Method::HEAD, &url).header(IF_NONE_MATCH, &etag)).await.is(304);
    }
    let url = file_url("org/model", &commit, "model.safetensors");
    for (range, part) in
        [("bytes=0-0", 0..1), ("bytes=-8", BIG - 8..BIG), ("bytes=1048576-", MIB..BIG), ("bytes=5-9", 5..10)]
    {
        let reply = Reply::of(served.request(Method::GET, &url).header(RANGE, range)).await.is(206);
        reply.has(&big(), part.clone());
        assert_eq!(
            reply.header("content-range"),
            Some(format!("bytes {}-{}/{BIG}", part.start, part.end - 1).as_str())
        );
        assert_eq!(reply.header("x-repo-commit"), Some(commit.as_str()));
    }
    let past = served.get_with(&url, "range", &format!("bytes={BIG}-")).await.is(416);
    assert_eq!(past.header("content-range"), Some(format!("bytes */{BIG}").as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_file_is_headed_without_a_download() {
    let (house, served, commit) = with_model().await;
    served.head(&file_url("org/model", &commit, "model.safetensors")).await.ok();
    assert_eq!(house.body_gets(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_hint_at_xet_is_passed_on() {
    let (house, served, commit) = with_model().await;
    house.hub.repo("org/model").xet(true);
    let tree = reqwest::get(format!("{}/api/models/org/model/tree/main", house.hub.url())).await.unwrap();
    assert!(tree.text().await.unwrap().contains("xetHash"), "the stand-in gives no hint");
    let model = "/api/models/org/model";
    for path in [
        format!("{model}?blobs=true&expand=xet"),
        format!("{model}/tree/main?recursive=true&expand=true"),
        format!("{model}/refs"),
        format!("{model}/commits/main"),
        file_url("org/model", "main", "model.safetensors"),
        file_url("org/model", &commit, "model.safetensors"),
    ] {
        for method in [Method::GET, Method::HEAD] {
            let reply = Reply::of(served.request(method, &path)).await;
            assert!(reply.status.is_success() || reply.status == 307, "{path}: {reply:?}");
            let hints = reply.headers.iter().any(|(name, value)| {
                name.as_str().contains("xet") || value.to_str().unwrap_or_default().contains("xet")
            });
            assert!(
                !hints && (path.contains("safetensors") || !reply.text().to_lowercase().contains("xet")),
                "{reply:?}"
            );
        }
    }
    let request = served.request(Method::POST, &format!("{model}/paths-info/main")).body("paths=model.safetensors");
    assert!(!Reply::of(request).await.ok().text().contains("xet"));
    served.get(&format!("{model}/xet-read-token/{commit}")).await.is(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_has_the_error_codes_of_the_hub() {
    let (_house, served, commit) = with_model().await;
    for revision in ["main", &commit] {
        for method in [Method::GET, Method::HEAD] {
            let reply = Reply::of(served.request(method, &file_url("org/model", revision, "none.json"))).await.is(404);
            assert_eq!(reply.header("x-error-code"), Some("EntryNotFound"));
            assert_eq!(reply.header("x-repo-commit"), Some(commit.as_str()), "clients remember the absence by it");
        }
    }
    let unknown = "0".repeat(40);
    for revision in ["nothing", &unknown, "a%20b", "a..b", "refs%2Fpr%2F9"] {
        for path in
            [file_url("org/model", revision, "config.json"), format!("/api/models/org/model/revision/{revision}")]
        {
            let code = served.get(&path).await.hub_error(404);
            assert_eq!(code.as_deref(), Some("RevisionNotFound"), "{path}");
        }
    }
    for path in ["/api/models/org/none", "/api/datasets/org/model", "/org/none/resolve/main/config.json"] {
        let code = served.get(path).await.hub_error(401);
        assert_eq!(code.as_deref(), Some("RepoNotFound"), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_of_one_segment_datasets_and_spaces_are_served() {
    let house = House::new().await;
    let served = house.daemon();
    for (repo, api) in [
        ("gpt2", "/api/models/gpt2"),
        ("datasets/squad", "/api/datasets/squad"),
        ("datasets/org/set", "/api/datasets/org/set"),
        ("spaces/org/app", "/api/spaces/org/app"),
    ] {
        let content = Content::from(format!("of {repo}"));
        let commit = house.publish(repo, &[("a/data.txt", content.clone())]);
        assert_eq!(served.get(api).await.ok().json()["sha"], json!(commit));
        assert_eq!(served.get(&format!("{api}/tree/main?recursive=true")).await.ok().json()[1]["path"], "a/data.txt");
        let location = served.head(&file_url(repo, "main", "a/data.txt")).await.is(307);
        assert_eq!(location.header("location"), Some(format!("/{repo}/resolve/{commit}/a/data.txt").as_str()));
        served.get(&file_url(repo, &commit, "a/data.txt")).await.ok().has(&content, 0..content.len());
        let refs = served.get(&format!("{api}/refs")).await.ok().json();
        assert_eq!(refs["branches"][0]["targetCommit"], json!(commit));
        assert_eq!(served.get(&format!("{api}/commits/main")).await.ok().json()[0]["id"], json!(commit));
        served.get(&format!("{api}/auth-check")).await.ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_file_is_headed_without_its_size_except_for_old_clients() {
    let house = House::new().await;
    let size = 51_000_000_000;
    let commit =
        house.hub.repo("org/huge").commit().lfs("huge.bin", Content::zeros(size)).claim_sha256(&"ab".repeat(32));
    let commit = commit.publish().unwrap();
    let served = house.daemon();
    let head = async |agent: &str, revision: &str| {
        let request = served.request(Method::HEAD, &file_url("org/huge", revision, "huge.bin"));
        Reply::of(request.header(USER_AGENT, agent)).await
    };
    for agent in ["unknown/None; hf_hub/1.31.0; python/3.12.1", "hf_hub/2.4.0", "curl/8"] {
        for revision in [commit.as_str(), "main"] {
            let reply = head(agent, revision).await;
            assert_eq!(reply.header("x-linked-size"), None, "{agent}");
            if revision != "main" {
                assert_eq!((reply.status.as_u16(), reply.header("content-length")), (200, None), "{agent} {reply:?}");
            }
            assert_eq!(reply.header("x-linked-etag"), Some(format!("\"{}\"", "ab".repeat(32)).as_str()));
        }
    }
    let reply = head("transformers/4.57; hf_hub/0.36.0; python/3.10", &commit).await.ok();
    let size = size.to_string();
    assert_eq!(
        (reply.header("x-linked-size"), reply.header("content-length")),
        (Some(size.as_str()), Some(size.as_str()))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_about_the_caller_are_passed_on_and_telemetry_is_not() {
    let house = House::new().await;
    house.hub.user("ann", TOKEN_A);
    let served = house.daemon();
    assert_eq!(served.get_as(Some(TOKEN_A), "/api/whoami-v2").await.ok().json()["name"], "ann");
    served.get("/api/whoami-v2").await.hub_error(401);
    house.hub.clear_requests();
    for path in
        ["/api/agent-harnesses", "/api/telemetry/hf_hub/cli", "/api/models", "/api/quicksearch?q=a", "/org/model"]
    {
        served.head(path).await.is(404);
        served.get(path).await.hub_error(404);
    }
    assert!(house.hub.requests().is_empty(), "{:?}", house.hub.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_files_cost_no_request_for_content() {
    let (house, served, commit) = with_model().await;
    for round in 0..2 {
        for path in ["config.json", "model.safetensors", "empty.txt"] {
            served.get(&file_url("org/model", &commit, path)).await.ok();
        }
        assert_eq!(round == 0, house.body_gets() > 0);
        house.hub.clear_requests();
    }
    assert!(house.hub.tokens_at_cdn().is_empty());
}
