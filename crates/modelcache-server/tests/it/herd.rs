//! Many clients of one file.

use crate::common::*;
use futures::future::join_all;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::sleep;

const SIZE: u64 = 6 * MIB + 77;

fn content() -> Content {
    Content::generated(9, SIZE)
}

/// Opens a connection, sends a GET and returns the connection. Nothing is read from it.
async fn request(served: &Served, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(served.url.trim_start_matches("http://")).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

/// Returns the body of the response on a connection.
async fn body(mut stream: TcpStream) -> Vec<u8> {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await.unwrap();
    let end = text.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    assert!(text.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&text[..end]));
    text.split_off(end)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_of_a_cold_file_cost_one_fetch() {
    let (house, commit) = House::with_model(&[("model.bin", content())]).await;
    house.hub.faults().add(HubFault::delay(Duration::from_millis(300)).on("model.bin"));
    let served = house.daemon();
    let path = file_url("org/model", &commit, "model.bin");
    let whole = content().to_vec().unwrap();
    let clients = (0..200).map(|_| async { body(request(&served, &path).await).await == whole });
    let right = join_all(clients).await;
    assert!(
        right.iter().all(|right| *right),
        "{} of 200 got other bytes",
        right.iter().filter(|right| !**right).count()
    );
    assert_eq!(house.hub.body_bytes(), SIZE, "bytes were fetched twice");
    // The responses and the download share one list of files.
    let (lists, checks) = (house.requests("/tree/"), house.requests("auth-check"));
    assert!(lists == 1 && checks <= 1, "{:?}", house.hub.requests());
    served.until_unleased().await;
    assert_eq!(served.value("/cache/stats", "/artifacts").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_ask_for_all_files_of_a_cold_revision_cost_one_listing() {
    let (house, commit) = House::with_model(&[("a", "a".into()), ("b", "b".into()), ("model.bin", content())]).await;
    let served = house.daemon();
    let heads = ["a", "b", "model.bin"].map(|file| file_url("org/model", "main", file));
    for head in join_all(heads.iter().cycle().take(60).map(|path| served.head(path))).await {
        head.is(307);
    }
    for path in &heads {
        served.head(path).await.is(307);
    }
    for file in ["a", "b", "model.bin"] {
        served.get(&file_url("org/model", &commit, file)).await.ok();
    }
    assert_eq!((house.requests("/tree/"), house.requests("/revision/")), (1, 1), "{:?}", house.hub.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_does_not_slow_the_others() {
    let (house, commit) = House::with_model(&[("model.bin", content())]).await;
    let served = house.daemon();
    let path = file_url("org/model", &commit, "model.bin");
    let stalled = join_all((0..20).map(|_| request(&served, &path))).await;
    let (started, whole) = (Instant::now(), content().to_vec().unwrap());
    for _ in 0..5 {
        assert!(body(request(&served, &path).await).await == whole);
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    // The clients read on after a while, and get the rest.
    for stream in stalled {
        assert!(body(stream).await == whole);
    }
    assert_eq!(house.hub.body_bytes(), SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_go_away_leave_nothing_behind() {
    let (house, commit) = House::with_model(&[("model.bin", content()), ("other.bin", content())]).await;
    let served = house.daemon();
    let path = file_url("org/model", &commit, "model.bin");
    // Everything that is started once is running.
    body(request(&served, &file_url("org/model", &commit, "other.bin")).await).await;
    served.until_unleased().await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    sleep(Duration::from_secs(1)).await;
    let before = tasks();
    for read in [0, 1, 100_000] {
        let streams = join_all((0..30).map(|_| request(&served, &path))).await;
        for mut stream in streams {
            let mut some = vec![0; read];
            stream.read_exact(&mut some).await.unwrap();
        }
    }
    served.until_unleased().await;
    until(async || tasks() <= before + 2).await;
    assert_eq!(served.value("/cache/metrics", "/http/in_flight").await, 1, "the request for the metrics itself");
    assert_eq!(served.value("/cache/stats", "/leases").await, 0);
    assert!(body(request(&served, &path).await).await == content().to_vec().unwrap());
    // A fill that was given up may have left parts of the last requests to be fetched again.
    assert!(house.hub.body_bytes() <= 4 * SIZE, "{}", house.hub.body_bytes());
}
