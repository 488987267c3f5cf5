//! Files on web servers: validators, ranges, digests, credentials, and registries as origins.

use crate::common::*;
use modelcache_testkit::{Content, Page, Ranges, Web, content};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::process::{Command, Stdio};

/// Adds a validator to a page: an entity tag or a date.
type Validate = fn(Page, &str, &str) -> Page;

const DATE: &str = "Wed, 25 Nov 2026 02:00:00 GMT";
const OTHER_DATE: &str = "Thu, 26 Nov 2026 02:00:00 GMT";

fn other() -> Content {
    Content::generated(2, big().len())
}

fn sha256(content: &Content) -> String {
    content::sha256(&content.to_vec().unwrap())
}

/// Returns the number of requests for content, without those for a checksum file.
fn for_content(web: &Web) -> usize {
    web.requests().iter().filter(|seen| !seen.path.ends_with(".sha256")).count()
}

#[test]
fn a_file_is_revalidated_only_after_its_answer_has_expired_and_a_changed_file_is_another_version() {
    let (house, web) = (House::new(), Web::start().unwrap());
    web.put("/m/model.bin", Page::of(big()).etag("\"one\""));
    let address = format!("{}/m/model.bin", web.url());
    let path = house.on_local("c").run(["get", &address]).path();
    assert_eq!(path.file_name().unwrap(), "model.bin");
    assert_same(&path, &big());
    let asked = web.requests().len();
    assert_eq!(house.on_local("c").run(["get", &address]).path(), path);
    assert_eq!(web.requests().len(), asked, "the answer is fresh");

    web.put("/m/model.bin", Page::of(other()).etag("\"two\""));
    let old = || house.on_local("c").env("MODEL_CACHE_REF_TTL", "0s");
    assert_same(&old().run(["get", &address]).path(), &other());
    let name = address.replace("://", "/");
    assert_eq!(house.listed("c"), [format!("{name}@etag-one"), format!("{name}@etag-two")]);
    web.clear_log();
    old().run(["get", &address]).path();
    assert_eq!(web.requests().len(), 1, "one request, and no change");

    web.set_down(true);
    let path = old().run(["get", &address]).path_saying(&["using the version that it last meant"]);
    assert_same(&path, &other());
    let path = old().run(["get", &format!("{address}@etag-one")]).path();
    assert_same(&path, &big());
}

#[test]
fn servers_of_every_kind_give_the_right_bytes() {
    let (house, web) = (House::new(), Web::start().unwrap());
    let digest = format!("sha256-{}", sha256(&big()));
    let dated = format!("modified-Wed-25-Nov-2026-02-00-00-GMT-{}", big().len());
    let page = || Page::of(big());
    let rows = [
        ("strong", page().etag("\"a/b\"").header("last-modified", DATE), "etag-"),
        ("weak", page().etag("W/\"a\"").header("last-modified", DATE), dated.as_str()),
        ("dated", page().header("last-modified", DATE).ranges(Ranges::Ignored), dated.as_str()),
        ("refusing", page().etag("\"r\"").ranges(Ranges::Refused), "etag-r"),
        ("nothing", page(), digest.as_str()),
        ("nothing-in-one", page().ranges(Ranges::Ignored), digest.as_str()),
        ("chunked", page().without_length(), digest.as_str()),
        ("chunked-tagged", page().without_length().etag("\"c\""), "etag-c"),
    ];
    for (name, page, version) in rows {
        web.put(&format!("/{name}.bin"), page);
        let outcome = house.on_local("c").run(["get", &format!("{}/{name}.bin", web.url())]);
        assert_same(&outcome.said(&["checksum"]).path(), &big());
        let listed = house.listed("c");
        assert!(listed.iter().any(|row| row.contains(&format!("{name}.bin@{version}"))), "{name}: {listed:?}");
        let given = house.on_local("c").run(["get", &format!("{}/{name}.bin@3#sha256={}", web.url(), sha256(&big()))]);
        assert!(!given.stderr.contains("checksum"), "a digest was demanded: {given}");
        given.path();
    }
    web.put("/empty.bin", Page::of("").etag("\"e\""));
    assert_same(&house.on_local("c").run(["get", &format!("{}/empty.bin", web.url())]).path(), &"".into());
    assert!(web.requests().iter().all(|seen| seen.method == "GET"));
}

#[test]
fn a_file_replaced_during_the_download_is_fetched_again_and_never_mixed() {
    let pages: [(&str, Validate); 3] = [
        ("tagged", |page, tag, _| page.etag(tag)),
        ("tagged, without conditions", |page, tag, _| page.etag(tag).ignoring_conditions()),
        ("dated", |page, _, date| page.header("last-modified", date)),
    ];
    for (what, page) in pages {
        for version in ["", "@3"] {
            let (house, web) = (House::new(), Web::start().unwrap());
            let new = page(Page::of(other()), "\"new\"", OTHER_DATE);
            // Two requests (the first byte, one of the two parts) get the old file, later ones the new file.
            web.put("/model.bin", page(Page::of(big()), "\"old\"", DATE).then(2, new));
            let outcome = house.on_local("c").run(["get", &format!("{}/model.bin{version}", web.url())]);
            assert_same(&outcome.said(&["changed", "starting over"]).path(), &other());
            assert_eq!(house.listed("c").len(), 1, "{what} {version}");
        }
    }
}

/// A page for each of `count` answers, each with an ETag of its own.
fn new_etags(page: impl Fn() -> Page, count: usize) -> Page {
    let last = page().etag("\"last\"");
    (0..count).fold(last, |next, number| page().etag(&format!("\"{number}\"")).then(1, next))
}

#[test]
fn a_digest_decides_where_the_validators_of_back_ends_differ() {
    let digest = sha256(&big());
    let house = House::new();
    type Digested = fn(Page, &str) -> Page;
    let rows: [(&str, Digested, bool, String); 4] = [
        ("demanded", |page, _| page, false, format!("#sha256={digest}")),
        ("demanded-at", |page, _| page, false, format!("@1#sha256={digest}")),
        ("header", |page, digest| page.header("x-checksum-sha256", digest), false, String::new()),
        ("beside", |page, _| page, true, String::new()),
    ];
    for (name, page, has_sidecar, suffix) in rows {
        let web = Web::start().unwrap();
        web.put("/m.bin", new_etags(|| page(Page::of(big()), &digest), 40));
        if has_sidecar {
            web.put("/m.bin.sha256", Page::of(digest.as_str()));
        }
        let got = house.on_local(name).run(["get", &format!("{}/m.bin{suffix}", web.url())]);
        assert!(!got.stderr.contains("WARN"), "{name}: {got}");
        assert_same(&got.path(), &big());
    }
}

#[test]
fn without_a_digest_only_answers_with_the_first_validators_are_used() {
    let pairs: [(&str, Validate, Validate); 4] = [
        ("two ETags", |page, _, _| page.etag("\"a\""), |page, _, _| page.etag("\"b\"")),
        (
            "conditions ignored",
            |page, _, _| page.etag("\"a\"").ignoring_conditions(),
            |page, _, _| page.etag("\"b\"").ignoring_conditions(),
        ),
        (
            "two dates",
            |page, _, _| page.header("last-modified", DATE),
            |page, _, _| page.header("last-modified", OTHER_DATE),
        ),
        (
            "two weak ETags",
            |page, _, _| page.etag("W/\"a\"").header("last-modified", DATE),
            |page, _, _| page.etag("W/\"b\"").header("last-modified", DATE),
        ),
    ];
    for (what, one, other) in pairs {
        let (house, web) = (House::new(), Web::start().unwrap());
        web.put("/m.bin", one(Page::of(big()), "", "").in_turn_with(other(Page::of(big()), "", "")));
        let got = house.on_local("c").run(["get", &format!("{}/m.bin", web.url())]);
        assert!(!got.stderr.contains("starting over"), "{what}: {got}");
        assert_same(&got.path_saying(&["disagree about the validators"]), &big());
    }
    // A proxy marks the ETag as weak.
    let (house, web) = (House::new(), Web::start().unwrap());
    let page = || Page::of(big()).ignoring_conditions();
    web.put("/m.bin", page().etag("\"a\"").in_turn_with(page().etag("W/\"a\"")));
    let got = house.on_local("c").run(["get", &format!("{}/m.bin", web.url())]);
    assert!(!got.stderr.contains("disagree"), "{got}");
    assert_same(&got.path(), &big());
    // No two answers agree.
    web.put("/n.bin", new_etags(|| Page::of(big()), 60));
    let got = house.on_local("c").run(["get", &format!("{}/n.bin", web.url())]);
    got.failed(7, &["changed since it was resolved: its ETag was", "back ends", "#sha256="]);
}

#[test]
fn a_file_replaced_together_with_its_digest_is_fetched_again() {
    let (house, web) = (House::new(), Web::start().unwrap());
    let digest = |content: &Content| Page::of(sha256(content).as_str());
    web.put("/m.bin", Page::of(big()).etag("\"old\"").then(2, Page::of(other()).etag("\"new\"")));
    web.put("/m.bin.sha256", digest(&big()).then(1, digest(&other())));
    let got = house.on_local("c").run(["get", &format!("{}/m.bin", web.url())]);
    assert_same(&got.path_saying(&["starting over"]), &other());
}

#[test]
fn a_broken_download_is_resumed_only_if_a_digest_is_known() {
    let (house, web) = (House::new(), Web::start().unwrap());
    let get = || house.on_local("c").run(["get", &format!("{}/model.bin@3", web.url())]);
    web.put("/model.bin", Page::of(big()).etag("\"old\"").broken_from(8 * MIB));
    get().failed(7, &["503"]);
    assert_eq!(house.marked_parts("c"), 0, "the next answer may be another file");
    let stated = || Page::of(other()).etag("\"new\"").header("x-checksum-sha256", sha256(&other()));
    web.put("/model.bin", stated().broken_from(8 * MIB));
    get().failed(7, &["503"]);
    assert_eq!(house.marked_parts("c"), 2);
    web.put("/model.bin", stated());
    let before = web.body_bytes();
    assert_same(&get().path(), &other());
    assert!(web.body_bytes() - before < other().len(), "the whole file was fetched again");
}

#[test]
fn digests_in_headers_and_beside_the_file_are_checked() {
    let (house, web) = (House::new(), Web::start().unwrap());
    let (right, wrong) = (sha256(&big()), sha256(&other()));
    let header = |digest: &str| ("x-checksum-sha256", digest.to_owned());
    let get = |name: &str| house.on_local("c").run(["get", &format!("{}/{name}@1", web.url())]);
    let lay = |name: &str, header: Option<(&str, String)>, beside: Option<Page>| {
        let page = Page::of(big()).etag("\"x\"");
        web.put(&format!("/{name}"), header.iter().fold(page, |page, (name, value)| page.header(name, value.clone())));
        beside.into_iter().for_each(|page| web.put(&format!("/{name}.sha256"), page));
    };
    let provenance = |name: &str| {
        let key = format!("{}/{name}@1", web.url().replace("://", "/"));
        let seen = house.on_local("c").run(["inspect", "--json", &key]).object();
        text(&seen["files"][0]["provenance"])
    };
    let quiet = |name: &str, tier: &str| {
        let outcome = get(name);
        assert!(!outcome.stderr.contains("checksum"), "{outcome}");
        outcome.path();
        assert_eq!(provenance(name), tier, "{name}");
    };
    lay("header", Some(header(&right)), None);
    quiet("header", "origin");
    lay("bare", None, Some(Page::of(format!("{right}\n"))));
    quiet("bare", "sidecar");
    lay("bsd", None, Some(Page::of(format!("SHA256 (bsd) = {right}\n"))));
    quiet("bsd", "sidecar");
    lay("both", Some(header(&right)), Some(Page::of(format!("{right}  both\n"))));
    quiet("both", "origin");

    let page = "<html>not found, but 200</html>";
    for (name, beside) in [
        ("page", Page::of(page)),
        ("gone", Page::status(410)),
        ("forbidden", Page::status(403)),
        ("endless", Page::of(Content::generated(5, 3 * MIB))),
        ("of-another", Page::of(format!("{wrong}  another.bin\n"))),
    ] {
        lay(name, None, Some(beside));
        get(name).path_saying(&["no checksum available"]);
        assert_eq!(provenance(name), "first-seen", "{name}");
    }

    lay("wrong", Some(header(&wrong)), None);
    get("wrong").failed(5, &["sha256 mismatch", &wrong]);
    lay("wrong-beside", None, Some(Page::of(wrong.clone())));
    get("wrong-beside").failed(5, &["sha256 mismatch", &wrong]);
    lay("contradiction", Some(header(&right)), Some(Page::of(wrong.clone())));
    get("contradiction").failed(5, &[&right, &wrong]);
    lay("fine", Some(header(&right)), None);
    let demanded = format!("{}/fine@2#sha256={wrong}", web.url());
    house.on_local("c").run(["get", &demanded]).failed(5, &[&wrong]);
}

#[test]
fn answers_other_than_the_file_are_refused() {
    let (house, web) = (House::new(), Web::start().unwrap());
    web.put("/a.tar.gz", Page::of(big()).etag("\"x\"").header("content-encoding", "x-gzip"));
    web.put("/b.bin", Page::redirect(302, "/login"));
    web.put("/login", Page::of("<html>who are you?</html>").header("content-type", "text/html; charset=utf-8"));
    let get = |name: &str| house.on_local("c").run(["get", &format!("{}/{name}", web.url())]);
    get("a.tar.gz").failed(5, &["x-gzip", "Content-Encoding"]);
    get("b.bin").failed(5, &["text/html", "login page"]);
    get("c.bin").failed(3, &["404", "no credential was sent"]);
    house.assert_no_artifact_or_staging("c");
    for (address, message_part) in [
        ("http://ann:canary-secret@127.0.0.1:1/x", "netrc"),
        ("http://127.0.0.1:1/x?sig=canary-signature", "query"),
        ("http://127.0.0.1:1/x?sig=canary-signature#y", "sha256="),
        ("ftp://ann:canary-secret@h/x", "unknown scheme"),
    ] {
        house.on_local("c").run(["get", address]).failed(2, &[message_part]);
        house.on_local("c").env("MODEL_CACHE_ORIGIN", format!("{address}{{name}}")).run(["get", "a@1"]).failed(2, &[]);
    }
}

#[test]
fn credentials_are_sent_to_their_server_and_a_refusal_names_the_ones_that_were_sent() {
    let (house, web) = (House::new(), Web::start().unwrap());
    web.put("/bearer.bin", Page::of(big()).etag("\"b\"").wanting("Bearer canary-secret"));
    web.put("/basic.bin", Page::of(big()).etag("\"b\"").wanting("Basic YW5uOmNhbmFyeS1zZWNyZXQ="));
    let run = |config: &str, name: &str| {
        let config = house.write("modelcache.toml", format!("[credentials.{:?}]\n{config}", web.url()));
        let run = house.on_local("c").env("MODEL_CACHE_CONFIG", config).env("TOKEN", "canary-secret");
        run.env("MODEL_CACHE_LOG", "trace").run(["get", &format!("{}/{name}.bin@1", web.url())])
    };
    house.write("password", "canary-secret\n");
    run("bearer_env = 'TOKEN'", "bearer").path();
    run(&format!("username = 'ann'\npassword_file = {:?}", house.path("password")), "basic").path();

    let refused = |outcome: Outcome, message_parts: &[&str]| outcome.failed(4, message_parts);
    web.put("/more.bin", Page::status(401));
    refused(run("bearer = 'stale'", "more"), &["401", "configuration file was sent", "is valid"]);
    web.put("/no.bin", Page::status(403));
    let none = house.on_local("c").run(["get", &format!("{}/no.bin", web.url())]);
    refused(none, &["403", "no credential was sent", &format!("[credentials.\"{}\"]", web.url())]);
    house.write("home/.netrc", "machine 127.0.0.1 login ann password canary-secret\n");
    web.clear_log();
    let kept = house.on_local("c").run(["get", &format!("{}/no.bin", web.url())]);
    refused(kept, &["403", "not sent over plain http", "use https"]);
    assert!(web.requests().iter().all(|seen| !seen.authorized()), "sent over plain http");
    house.write("home/.netrc", "machine 127.0.0.1 login ann password canary-secret extra\n");
    let warned = house.on_local("c").run(["get", &format!("{}/no.bin", web.url())]);
    refused(warned, &["the netrc", "is not used: line 1"]);
    for file in files_below(&house.path("c")) {
        let bytes = std::fs::read(house.path("c").join(&file)).unwrap();
        assert!(!bytes.windows(13).any(|window| window == b"canary-secret"), "{}", file.display());
    }
}

#[test]
fn retry_after_is_respected_within_the_deadline() {
    let (house, web) = (House::new(), Web::start().unwrap());
    let busy = |wait: &str| Page::status(429).header("retry-after", wait);
    web.put("/m.bin", busy("1").then(1, Page::of(big()).etag("\"x\"")));
    let outcome = house.on_local("c").run(["get", &format!("{}/m.bin", web.url())]);
    outcome.path_saying(&["asks to wait 1 s", "waiting before the next attempt"]);
    web.put("/n.bin", busy("3600"));
    house.on_local("c").run(["get", &format!("{}/n.bin", web.url())]).failed(7, &["asks to wait 3600 s"]);
    assert_eq!(web.requests().iter().filter(|seen| seen.path == "/n.bin").count(), 1);
    // A date counts from the server's clock. A 503 states the wait, too.
    let date = |page: Page, retry: &str| {
        page.header("date", "Wed, 21 Oct 2015 07:28:00 GMT")
            .header("retry-after", format!("Wed, 21 Oct 2015 {retry} GMT"))
    };
    web.put("/o.bin", date(Page::status(429), "07:28:01").then(1, Page::of(big()).etag("\"x\"")));
    house.on_local("c").run(["get", &format!("{}/o.bin", web.url())]).path_saying(&["asks to wait 1 s"]);
    web.put("/p.bin", date(Page::status(503), "08:28:00"));
    house.on_local("c").run(["get", &format!("{}/p.bin", web.url())]).failed(7, &["503", "asks to wait 3600 s"]);
    assert_eq!(web.requests().iter().filter(|seen| seen.path == "/p.bin").count(), 1);
}

#[test]
fn a_definite_answer_is_not_reported_as_try_again() {
    let (house, web) = (House::new(), Web::start().unwrap());
    for (status, code, says) in [
        (451, 4, "legal reasons"),
        (402, 7, "trying again does not help"),
        (407, 7, "proxy requires a user"),
        (501, 7, "trying again does not help"),
        (511, 7, "captive portal"),
    ] {
        web.put("/m.bin", Page::status(status));
        web.clear_log();
        let got = house.on_local("c").run(["get", &format!("{}/m.bin", web.url())]);
        let got = got.failed(code, &[&status.to_string(), says]);
        assert!(!got.stderr.contains("try again later"), "{got}");
        assert_eq!(web.requests().len(), 1, "{status}");
    }
}

#[test]
fn a_registry_behind_a_template_fills_the_bare_key_and_the_next_is_asked_only_on_not_found() {
    let (house, first, second) = (House::new(), Web::start().unwrap(), Web::start().unwrap());
    let template = |web: &Web| format!("{}/{{name}}/{{version}}.tar.gz", web.url());
    let origins = format!("{},{}", template(&first), template(&second));
    let get = |reference: &str| house.on("c").env("MODEL_CACHE_ORIGIN", &origins).run(["get", reference]);
    second.put("/team/a%20b/1%252.tar.gz", Page::of(big()).header("x-checksum-sha256", sha256(&big())));
    let path = get("team/a b@1%2").path();
    assert_eq!(path.file_name().unwrap(), "1%2.tar.gz");
    assert_same(&path, &big());
    assert_eq!(house.listed("c"), ["team/a b@1%2"]);
    assert_eq!(for_content(&first), 1, "asked first");
    // Another machine gets the file from the remote, under the bare key.
    let (before, origins) = (for_content(&second), "none");
    assert_same(&house.on("d").env("MODEL_CACHE_ORIGIN", origins).run(["get", "team/a b@1%2"]).path(), &big());
    assert_eq!(for_content(&second), before);

    for (status, code) in [(401, 4), (500, 7), (400, 7)] {
        first.put("/m/1.tar.gz", Page::status(status));
        second.put("/m/1.tar.gz", Page::of(big()).etag("\"x\""));
        second.clear_log();
        get("m@1").failed(code, &[&status.to_string()]);
        assert_eq!(second.requests().len(), 0, "{status} is not a miss");
    }
    get("nowhere@1").failed(3, &["the origin http://"]);
}

#[test]
fn pythons_own_web_server_works() {
    let house = House::new();
    house.write("served/sub/model é.bin", big());
    let mut server = Command::new("python3")
        .args(["-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory"])
        .arg(house.path("served"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let port: u16 = line.split(" port ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let outcome = house.on_local("c").run(["get", &format!("http://127.0.0.1:{port}/sub/model%20é.bin")]);
    let missing = house.on_local("c").run(["get", &format!("http://127.0.0.1:{port}/sub/none.bin")]);
    let folder = house.on_local("c").run(["get", &format!("http://127.0.0.1:{port}/sub")]);
    server.kill().unwrap();
    server.wait().unwrap();
    let path = outcome.path();
    assert_eq!(path.file_name().unwrap(), "model é.bin");
    assert_same(&path, &big());
    missing.failed(3, &["404"]);
    folder.failed(5, &["text/html"]);
}

/// Starts a server with one file and without ranges, and returns the URL. An answer is a body and the number of its
/// bytes that are sent before the connection is closed. The last answer is repeated.
fn server_that_hangs_up(answers: Vec<(Vec<u8>, usize)>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut asked = 0;
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let is_file = lines.next().is_some_and(|first| first.contains(" /model.bin "));
            while lines.next().is_some_and(|line| !line.is_empty()) {}
            if !is_file {
                let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
                continue;
            }
            let (body, sent) = &answers[asked.min(answers.len() - 1)];
            asked += 1;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\netag: \"1\"\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body[..*sent]));
        }
    });
    format!("http://{address}/model.bin")
}

#[test]
fn a_beginning_that_is_sent_twice_is_hashed_as_it_is_stored() {
    // One part of several slices. The slices before the cut are hashed when the beginning of the file is sent again.
    // The first answer is to the request that looks up size and validator.
    let right = content::bytes(1, 2 << 20);
    let mut damaged = right.clone();
    damaged[100] ^= 1;
    let whole = right.len();
    let digest = content::sha256(&right);
    let answers = vec![(right.clone(), whole), (right.clone(), 1_500_000), (damaged, whole), (right.clone(), whole)];
    let address = format!("{}@3#sha256={digest}", server_that_hangs_up(answers));
    let house = House::new();
    let got = house.on_local("c").run(["get", &address]);
    assert_eq!(content::sha256(&std::fs::read(got.path()).unwrap()), digest);
}
