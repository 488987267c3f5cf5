//! Credentials across redirects: every redirect status with every kind of target, for web servers and the Hub.
//!
//! A credential is sent to its own server and to no other. No output and no file contains it.

use crate::common::*;
use modelcache_testkit::{Authority, Content, Page, TlsFront, Web, content};
use std::path::PathBuf;

const SECRET: &str = "canary-secret";
const STATUSES: [u16; 5] = [301, 302, 303, 307, 308];

/// The target of a redirect, relative to the server that the credential is for ("home").
#[derive(Debug, Clone, Copy, PartialEq)]
enum To {
    SameOrigin,
    OtherHost,
    OtherPort,
    /// From https to http: not followed.
    Down,
    /// From http to https: another scheme is another origin.
    Up,
}

/// Three web servers, each with plain HTTP and with TLS.
struct Places {
    home: Web,
    other_host: Web,
    other_port: Web,
    home_tls: TlsFront,
    other_host_tls: TlsFront,
    other_port_tls: TlsFront,
    roots: PathBuf,
}

impl Places {
    fn new(house: &House) -> Self {
        let authority = Authority::new().unwrap();
        let roots = house.write("roots.pem", "");
        authority.write_to(&roots).unwrap();
        let (home, other_port) = (Web::start().unwrap(), Web::start().unwrap());
        let other_host = Web::start_at("127.0.0.2").unwrap();
        let tls = |web: &Web, host| TlsFront::start(host, web.addr(), &authority, &["127.0.0.1", "127.0.0.2"]).unwrap();
        let (home_tls, other_port_tls) = (tls(&home, "127.0.0.1"), tls(&other_port, "127.0.0.1"));
        let other_host_tls = tls(&other_host, "127.0.0.2");
        Self { home, other_host, other_port, home_tls, other_host_tls, other_port_tls, roots }
    }

    /// Returns the URL of home, with TLS or without.
    fn home(&self, tls: bool) -> String {
        if tls { format!("https://{}", self.home_tls.addr()) } else { self.home.url() }
    }

    /// Returns URL and server of the target of a redirect from home. `None` if the combination does not exist.
    fn target(&self, to: To, tls: bool) -> Option<(String, &Web)> {
        let (web, front) = match to {
            To::SameOrigin => (&self.home, &self.home_tls),
            To::OtherHost => (&self.other_host, &self.other_host_tls),
            To::OtherPort | To::Up | To::Down => (&self.other_port, &self.other_port_tls),
        };
        let target_tls = match to {
            To::Up if tls => return None,
            To::Down if !tls => return None,
            To::Up => true,
            To::Down => false,
            _ => tls,
        };
        Some((if target_tls { format!("https://{}", front.addr()) } else { web.url() }, web))
    }

    fn clear(&self) {
        [&self.home, &self.other_host, &self.other_port].into_iter().for_each(Web::clear_log);
    }

    /// Calls `cell` for every combination of status, TLS and target.
    fn matrix(&self, mut cell: impl FnMut(usize, u16, To, bool, &str, &Web)) {
        let mut number = 0;
        for status in STATUSES {
            for tls in [false, true] {
                for to in [To::SameOrigin, To::OtherHost, To::OtherPort, To::Down, To::Up] {
                    let Some((target, web)) = self.target(to, tls) else { continue };
                    self.clear();
                    number += 1;
                    cell(number, status, to, tls, &target, web);
                }
            }
        }
        assert_eq!(number, 5 * 8);
    }
}

fn file(number: usize) -> Content {
    Content::generated(number as u64, 100_000)
}

/// Asserts the result of a run that was redirected from home to a target.
#[track_caller]
fn assert_cell(outcome: Outcome, what: &str, to: To, target: &Web, path: &str, content: &Content) {
    let at_target: Vec<_> = target.requests().into_iter().filter(|seen| seen.path == path).collect();
    if to == To::Down {
        assert!(at_target.is_empty(), "{what}: requested over plain http");
        outcome.failed(7, &["from https to http", "not followed"]);
        return;
    }
    assert_same(&outcome.path(), content);
    assert!(!at_target.is_empty(), "{what}: not redirected");
    let sent = at_target.iter().all(|seen| seen.authorized());
    let kept = at_target.iter().all(|seen| !seen.authorized());
    assert!(if to == To::SameOrigin { sent } else { kept }, "{what}: {at_target:?}");
}

#[test]
fn the_credential_for_a_web_server_is_sent_to_no_other_server() {
    let house = House::new();
    let places = Places::new(&house);
    let tables = [false, true].map(|tls| {
        let home = places.home(tls);
        format!("[credentials.{home:?}]\nusername = 'ann'\npassword = '{SECRET}'\n")
    });
    let config = house.write("modelcache.toml", tables.concat());
    places.matrix(|number, status, to, tls, target, web| {
        let what = format!("{status} {to:?} tls={tls}");
        let (from, path) = (format!("/from/{number}.bin"), format!("/to/{number}.bin"));
        web.put(&path, Page::of(file(number)).etag("\"x\""));
        let location = if to == To::SameOrigin { path.clone() } else { format!("{target}{path}?sig=canary-signature") };
        places.home.put(&from, Page::redirect(status, location));
        let run = house.on_local("c").env("MODEL_CACHE_CONFIG", &config).env("SSL_CERT_FILE", &places.roots);
        let outcome = run.env("MODEL_CACHE_LOG", "trace").run(["get", &format!("{}{from}", places.home(tls))]);
        assert_cell(outcome, &what, to, web, &path, &file(number));
        assert!(places.home.requests().iter().all(|seen| seen.authorized()), "{what}: not sent home");
    });
    assert_no_secret(&house);
}

#[test]
fn the_token_for_the_hub_is_sent_to_no_other_server() {
    let house = House::new();
    let places = Places::new(&house);
    places.matrix(|number, status, to, tls, target, web| {
        let what = format!("{status} {to:?} tls={tls}");
        let (commit, path) = (format!("{number:040x}"), format!("/to/{number}.bin"));
        let sha256 = content::sha256(&file(number).to_vec().unwrap());
        let tree = format!(
            "[{{\"type\":\"file\",\"path\":\"m.bin\",\"size\":100000,\"oid\":\"{commit}\",\"lfs\":{{\"oid\":\"{sha256}\"}}}}]"
        );
        places.home.put(&format!("/api/models/org/m/tree/{commit}"), Page::of(tree));
        let location = format!("{target}{path}?sig=canary-signature");
        places.home.put(&format!("/org/m/resolve/{commit}/m.bin"), Page::redirect(status, location));
        web.put(&path, Page::of(file(number)).etag("\"x\""));
        let run = house.on_local("c").env("HF_ENDPOINT", places.home(tls)).env("HF_TOKEN", SECRET);
        let run = run.env("SSL_CERT_FILE", &places.roots).env("MODEL_CACHE_LOG", "trace");
        let outcome = run.run(["get", &format!("hf://org/m@{commit}/m.bin")]);
        assert_cell(outcome, &what, to, web, &path, &file(number));
        assert!(places.home.requests().iter().all(|seen| seen.authorized()), "{what}: not sent home");
    });
    assert_no_secret(&house);
}

#[test]
fn netrc_is_used_for_https_only_with_a_warning_if_others_may_read_it() {
    let house = House::new();
    let places = Places::new(&house);
    let netrc = house.write("home/.netrc", format!("machine 127.0.0.1\n  login ann\n  password \"{SECRET}\"\n"));
    places.home.put("/m.bin", Page::of(file(1)).etag("\"x\"").wanting("Basic YW5uOmNhbmFyeS1zZWNyZXQ="));
    let get = |tls: bool, at: &str| {
        let run = house.on_local("c").env("SSL_CERT_FILE", &places.roots).env("MODEL_CACHE_LOG", "trace");
        run.run(["get", &format!("{}/m.bin@{at}", places.home(tls))])
    };
    let mode = |mode| std::fs::set_permissions(&netrc, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    mode(0o600);
    let quiet = get(true, "1");
    assert!(!quiet.stderr.contains("chmod"), "{quiet}");
    quiet.path();
    mode(0o644);
    get(true, "2").path_saying(&["chmod 600"]);
    places.clear();
    get(false, "3").failed(4, &["not sent over plain http"]);
    assert!(places.home.requests().iter().all(|seen| !seen.authorized()));
    assert_no_secret(&house);
}

#[test]
fn a_redirect_loop_ends_after_ten() {
    let (house, web) = (House::new(), Web::start().unwrap());
    web.put("/a.bin", Page::redirect(302, "/b.bin"));
    web.put("/b.bin", Page::redirect(302, "/a.bin"));
    house.on_local("c").run(["get", &format!("{}/a.bin", web.url())]).failed(7, &["still redirects after 10"]);
    assert_eq!(web.requests().len(), 11);
}

#[test]
fn an_expired_signed_url_is_renewed_and_never_printed() {
    let (house, home, store) = (House::new(), Web::start().unwrap(), Web::start_at("127.0.0.2").unwrap());
    let spent = format!("{}/one.bin?sig=canary-signature", store.url());
    let fresh = format!("{}/two.bin?sig=canary-signature", store.url());
    home.put("/m.bin", Page::redirect(302, spent).then(2, Page::redirect(302, fresh)));
    // The signed URL expires after the first request and one part.
    store.put("/one.bin", Page::of(big()).etag("\"x\"").then(2, Page::status(403)));
    store.put("/two.bin", Page::of(big()).etag("\"x\""));
    let run = house.on_local("c").env("MODEL_CACHE_LOG", "trace");
    let outcome = run.run(["get", &format!("{}/m.bin", home.url())]);
    assert_same(&outcome.path(), &big());
    store.put("/three.bin", Page::status(403));
    home.put("/n.bin", Page::redirect(302, format!("{}/three.bin?sig=canary-signature", store.url())));
    let refused = house.on_local("c").run(["get", &format!("{}/n.bin", home.url())]);
    refused.failed(4, &["403", "redirected the request"]);
}

/// Asserts that no file of the cache directory contains a secret.
#[track_caller]
fn assert_no_secret(house: &House) {
    let folder = house.path("c");
    let files = files_below(&folder);
    assert!(!files.is_empty());
    for file in files {
        let bytes = std::fs::read(folder.join(&file)).unwrap();
        for secret in [SECRET, "canary-signature", "YW5uOmNhbmFyeS1zZWNyZXQ"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found && !file.to_string_lossy().contains(secret), "{secret} in {}", file.display());
        }
    }
}
