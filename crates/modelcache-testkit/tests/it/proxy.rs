//! Tests the fault proxy in front of the Hub stand-in.

use std::time::{Duration, Instant};

use modelcache_testkit::proxy::ProxyFault;
use modelcache_testkit::{Content, FaultProxy, Hub};
use reqwest::Client;

const LEN: u64 = 500_000;

async fn proxied() -> (Hub, FaultProxy, String) {
    let hub = Hub::start().await.unwrap();
    hub.repo("org/m").commit().plain("f", Content::generated(5, LEN)).publish().unwrap();
    let proxy = FaultProxy::start(hub.url()).await.unwrap();
    let url = format!("{}/org/m/resolve/main/f", proxy.url());
    (hub, proxy, url)
}

fn client() -> Client {
    // A new connection for each request, because faults belong to connections.
    Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap()
}

/// Returns the bytes received, and true if the body was complete.
async fn received(url: &str) -> (Vec<u8>, bool) {
    let Ok(mut answer) = client().get(url).send().await else { return (Vec::new(), false) };
    let mut body = Vec::new();
    loop {
        match answer.chunk().await {
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => return (body, true),
            Err(_) => return (body, false),
        }
    }
}

#[tokio::test]
async fn without_a_fault_all_bytes_pass_and_are_counted() {
    let (_hub, proxy, url) = proxied().await;
    let (body, well) = received(&url).await;
    assert!(well);
    assert_eq!(body, Content::generated(5, LEN).to_vec().unwrap());
    assert_eq!(proxy.connections(), 1);
    assert!(proxy.bytes_down() > LEN && proxy.bytes_down() < LEN + 2000);
    assert!(proxy.bytes_up() > 20);
}

#[tokio::test]
async fn each_fault_applies_once() {
    let (_hub, proxy, url) = proxied().await;
    let good = Content::generated(5, LEN).to_vec().unwrap();

    for fault in [ProxyFault::refuse(), ProxyFault::cut(0)] {
        proxy.faults().add(fault.once());
        assert_eq!(received(&url).await, (Vec::new(), false));
    }
    for fault in [ProxyFault::cut(100_000), ProxyFault::reset(100_000)] {
        proxy.faults().add(fault.once());
        let (body, well) = received(&url).await;
        assert!(!well && body.len() < 100_000, "{}", body.len());
        assert_eq!(body, good[..body.len()]);
    }
    proxy.faults().add(ProxyFault::flip(100_000).once());
    let (body, well) = received(&url).await;
    assert!(well);
    assert_eq!(body.iter().zip(&good).filter(|(one, other)| one != other).count(), 1);

    proxy.faults().add(ProxyFault::stall(100_000, Duration::from_millis(200)).once());
    let start = Instant::now();
    assert_eq!(received(&url).await, (good.clone(), true));
    assert!(start.elapsed() >= Duration::from_millis(200));

    proxy.faults().add(ProxyFault::slow(2_000_000).once());
    let start = Instant::now();
    assert_eq!(received(&url).await, (good.clone(), true));
    assert!(start.elapsed() >= Duration::from_millis(200));

    proxy.faults().add(ProxyFault::hang(100_000).once());
    let waited = tokio::time::timeout(Duration::from_millis(300), received(&url)).await;
    assert!(waited.is_err(), "nothing more comes");
    assert_eq!(received(&url).await, (good, true));
}

#[tokio::test]
async fn the_proxy_can_answer_by_itself() {
    let (hub, proxy, url) = proxied().await;
    let hits = proxy.faults().add(ProxyFault::unavailable(Some(3)).times(2));
    for _ in 0..2 {
        let answer = client().get(&url).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (503, "3"));
    }
    assert_eq!(hits.count(), 2);
    assert!(hub.requests().is_empty());
    assert_eq!(client().get(&url).send().await.unwrap().status(), 200);
    proxy.faults().add(ProxyFault::answer(502).once());
    assert_eq!(client().post(&url).body(vec![0; 300_000]).send().await.unwrap().status(), 502);
}

#[tokio::test]
async fn open_connections_can_be_severed() {
    let (_hub, proxy, url) = proxied().await;
    proxy.faults().add(ProxyFault::hang(100_000).once());
    let (outcome, ()) = tokio::join!(received(&url), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        proxy.sever();
    });
    assert!(!outcome.1);
}
