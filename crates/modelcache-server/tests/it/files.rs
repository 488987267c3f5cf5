//! Files by the native route: ranges, conditions, and artifacts of one and of many files.

use crate::common::*;
use modelcache_testkit::Content;
use reqwest::Method;
use reqwest::header::{IF_NONE_MATCH, IF_RANGE, RANGE};

const SIZE: u64 = 100_000;

fn content() -> Content {
    Content::generated(3, SIZE)
}

/// A daemon with `m@1`, a tree with `dir/file.bin` and an empty file, and `single@1`, one file.
async fn served() -> (House, Served) {
    let house = House::new().await;
    let served = house.daemon();
    house.put(&served, "m@1", &[("dir/file.bin", content()), ("empty", "".into())]).await;
    house.put(&served, "single@1", &[("", content())]).await;
    (house, served)
}

const FILE: &str = "/cache/artifacts/m@1/files/dir/file.bin";

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_file_has_its_size_and_digest_in_the_headers() {
    let (_house, served) = served().await;
    let etag = format!("\"{}\"", content().sha256().unwrap());
    for path in [FILE, "/cache/artifacts/single@1/files/source%20single@1"] {
        let (get, head) = (served.get(path).await.ok(), served.head(path).await.ok());
        get.has(&content(), 0..SIZE);
        assert!(head.body.is_empty());
        for reply in [&get, &head] {
            assert_eq!(reply.header("etag"), Some(etag.as_str()));
            assert_eq!(reply.header("content-length"), Some("100000"));
            assert_eq!(reply.header("accept-ranges"), Some("bytes"));
            assert_eq!(reply.header("content-type"), Some("application/octet-stream"));
            assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
            assert!(reply.header("x-request-id").is_some() && reply.header("content-encoding").is_none());
        }
    }
    let empty = served.get("/cache/artifacts/m@1/files/empty").await.ok();
    empty.has(&"".into(), 0..0);
}

#[tokio::test(flavor = "multi_thread")]
async fn single_ranges_are_answered_with_206() {
    let (_house, served) = served().await;
    for (range, part) in [
        ("bytes=0-0", 0..1),
        ("bytes=10-19", 10..20),
        ("bytes=99990-", 99_990..SIZE),
        ("bytes=99990-200000", 99_990..SIZE),
        ("bytes=-10", 99_990..SIZE),
        ("bytes=-200000", 0..SIZE),
        ("bytes=0-", 0..SIZE),
    ] {
        let reply = served.get_with(FILE, "range", range).await.is(206);
        reply.has(&content(), part.clone());
        let stated = format!("bytes {}-{}/{SIZE}", part.start, part.end - 1);
        assert_eq!(reply.header("content-range"), Some(stated.as_str()), "{range}");
        let head = Reply::of(served.request(Method::HEAD, FILE).header(RANGE, range)).await.is(206);
        assert_eq!(head.header("content-range"), Some(stated.as_str()), "{range}");
        assert_eq!(head.header("content-length"), Some((part.end - part.start).to_string().as_str()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_outside_the_file_is_answered_with_416_and_the_size() {
    let (_house, served) = served().await;
    let empty = "/cache/artifacts/m@1/files/empty";
    for (path, range, size) in [
        (FILE, "bytes=100000-", SIZE),
        (FILE, "bytes=200000-300000", SIZE),
        (FILE, "bytes=-0", SIZE),
        (empty, "bytes=0-0", 0),
    ] {
        let reply = served.get_with(path, "range", range).await.is(416);
        assert_eq!(reply.header("content-range"), Some(format!("bytes */{size}").as_str()), "{range}");
        assert!(reply.body.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_ranges_are_answered_with_the_whole_file() {
    let (_house, served) = served().await;
    for range in
        ["bytes=0-1,5-6", "bytes=9-8", "bytes=a-b", "bytes=", "bytes=-", "lines=1-2", "bytes 0-1", "bytes=+0-1"]
    {
        served.get_with(FILE, "range", range).await.ok().has(&content(), 0..SIZE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_compare_the_digest() {
    let (_house, served) = served().await;
    let etag = format!("\"{}\"", content().sha256().unwrap());
    for known in [etag.clone(), format!("W/{etag}"), format!("\"other\", {etag}"), "*".to_owned()] {
        for method in [Method::GET, Method::HEAD] {
            let reply = Reply::of(served.request(method, FILE).header(IF_NONE_MATCH, &known)).await.is(304);
            assert_eq!((reply.header("etag"), reply.body.len()), (Some(etag.as_str()), 0));
            // A length would have to be that of the file.
            assert!(matches!(reply.header("content-length"), None | Some("100000")), "{reply:?}");
        }
    }
    served.get_with(FILE, "if-none-match", "\"other\"").await.ok().has(&content(), 0..SIZE);
    for (condition, status) in [(etag.as_str(), 206), ("\"other\"", 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)] {
        let request = served.request(Method::GET, FILE).header(IF_RANGE, condition).header(RANGE, "bytes=5-");
        let reply = Reply::of(request).await.is(status);
        reply.has(&content(), if status == 206 { 5..SIZE } else { 0..SIZE });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_in_the_key_is_demanded() {
    let (_house, served) = served().await;
    let manifest = served.get("/cache/artifacts/m@1").await.ok().json();
    for digest in [content().sha256().unwrap().as_str(), manifest["sha256"].as_str().unwrap()] {
        let path = format!("/cache/artifacts/m@1%23sha256={digest}/files/dir/file.bin");
        served.get(&path).await.ok().has(&content(), 0..SIZE);
    }
    for path in ["/cache/artifacts/m@1", "/cache/artifacts/single@1"] {
        let path = format!("{path}%23sha256={}/files/dir/file.bin", "0".repeat(64));
        assert!(served.get(&path).await.refused(502).contains("corrupt"));
    }
}
