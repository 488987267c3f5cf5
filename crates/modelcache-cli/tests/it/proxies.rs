//! HTTP proxies and private certificate authorities.

use crate::common::*;
use modelcache_testkit::{Authority, ConnectProxy, Page, TlsFront, Web};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

/// `ann:canary-secret`.
const PROXY_AUTHORIZATION: &str = "Basic YW5uOmNhbmFyeS1zZWNyZXQ=";

/// A registry, the Hub and S3 under host names that only the proxy resolves, with certificates of the authority in
/// `roots`.
struct Inside {
    house: House,
    web: Web,
    hosts: BTreeMap<String, SocketAddr>,
    roots: PathBuf,
    _fronts: Vec<TlsFront>,
}

impl Inside {
    fn new() -> Self {
        let (house, web) = (House::new(), Web::start().unwrap());
        web.put("/m.bin", Page::of(big()).etag("\"x\""));
        house.hub.repo("org/model").commit().file("f", "small").publish().unwrap();
        let authority = Authority::new().unwrap();
        let roots = house.write("roots.pem", "");
        authority.write_to(&roots).unwrap();
        let at = |url: String| url.strip_prefix("http://").unwrap().parse::<SocketAddr>().unwrap();
        let places =
            [("registry.test", web.addr()), ("hub.test", at(house.hub.url())), ("s3.test", at(house.s3.endpoint()))];
        let front = |(name, to)| (name, TlsFront::start("127.0.0.1", to, &authority, &[name]).unwrap());
        let fronts = places.map(front);
        let hosts = fronts.iter().map(|(name, front)| (format!("{name}:443"), front.addr())).collect();
        Self { house, web, hosts, roots, _fronts: fronts.map(|(_, front)| front).into() }
    }

    fn proxy(&self, wants: Option<&str>) -> ConnectProxy {
        ConnectProxy::start(self.hosts.clone(), wants).unwrap()
    }

    fn run(&self, proxy: SocketAddr, user: &str) -> Run {
        let run = self.house.on_local("c").env("HTTPS_PROXY", format!("http://{user}{proxy}"));
        run.env("HF_ENDPOINT", "https://hub.test").env("MODEL_CACHE_LOG", "trace")
    }
}

#[test]
fn registry_hub_and_s3_work_behind_a_proxy_with_a_private_authority() {
    let inside = Inside::new();
    let proxy = inside.proxy(Some(PROXY_AUTHORIZATION));
    let run = || {
        let run = inside.run(proxy.addr(), "ann:canary-secret@").env("SSL_CERT_FILE", &inside.roots);
        let run = run.envs(inside.house.s3.env()).env("AWS_ENDPOINT_URL", "https://s3.test");
        run.env("MODEL_CACHE_REMOTE", format!("s3://{BUCKET}/cache"))
    };
    assert_same(&run().run(["get", "https://registry.test/m.bin@1"]).path(), &big());
    run().run(["get", "hf://org/model"]).path();
    for name in ["registry.test:443", "hub.test:443", "s3.test:443"] {
        assert!(proxy.asked().iter().any(|asked| asked == name), "{name}: {:?}", proxy.asked());
    }
    // Another machine gets the artifact from the remote, with the authority in AWS_CA_BUNDLE alone.
    let asked = inside.web.requests().len();
    let other = run().without("SSL_CERT_FILE").env("AWS_CA_BUNDLE", &inside.roots);
    let other = other.env("MODEL_CACHE_DIR", inside.house.path("d"));
    assert_same(&other.run(["get", "https://registry.test/m.bin@1"]).path(), &big());
    assert_eq!(inside.web.requests().len(), asked);
}

#[test]
fn a_socks_proxy_resolves_the_names() {
    let inside = Inside::new();
    let proxy = inside.proxy(None);
    let run = |scheme: &str| {
        let run = inside.house.on_local("c").env("ALL_PROXY", format!("{scheme}://{}", proxy.addr()));
        run.env("HF_ENDPOINT", "https://hub.test").env("SSL_CERT_FILE", &inside.roots)
    };
    assert_same(&run("socks5h").run(["get", "https://registry.test/m.bin@1"]).path(), &big());
    run("socks5h").run(["get", "hf://org/model"]).path();
    assert!(proxy.asked().contains(&"hub.test:443".to_owned()), "{:?}", proxy.asked());
    // Without the `h`, this machine resolves the name.
    let unknown = run("socks5").env("MODEL_CACHE_DIR", inside.house.path("d"));
    unknown
        .run(["get", "hf://org/model"])
        .failed(7, &["hub.test", "socks5://", "write the address of the proxy as socks5h://"]);
}

#[test]
fn an_untrusted_authority_is_reported_with_the_remedy() {
    let inside = Inside::new();
    let proxy = inside.proxy(None);
    for reference in ["https://registry.test/m.bin", "hf://org/model"] {
        inside.run(proxy.addr(), "").run(["get", reference]).failed(7, &["is not trusted", "SSL_CERT_FILE"]);
    }
    assert!(inside.web.requests().is_empty());
}

#[test]
fn a_proxy_that_refuses_or_is_unreachable_is_named_without_its_password() {
    let inside = Inside::new();
    let proxy = inside.proxy(Some("Basic other"));
    let run = |addr| inside.run(addr, "ann:canary-secret@").env("SSL_CERT_FILE", &inside.roots);
    let get = ["get", "https://registry.test/m.bin"];
    let named = format!("through the proxy http://{}", proxy.addr());
    run(proxy.addr()).run(get).failed(7, &[&named, "requires a user and password"]);
    run(proxy.addr()).run(["get", "hf://org/model"]).failed(7, &[&named]);
    let gone = inside.proxy(None).addr();
    run(gone).run(get).failed(7, &[&format!("through the proxy http://{gone}"), "NO_PROXY"]);
    // The error for a host in NO_PROXY does not mention the proxy.
    let direct = run(gone).env("NO_PROXY", "registry.test").run(get);
    assert!(!direct.stderr.contains("through the proxy"), "{direct}");
    direct.failed(7, &["cannot reach https://registry.test"]);
}
