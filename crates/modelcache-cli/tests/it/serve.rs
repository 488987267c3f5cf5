//! `serve`: the daemon as a process, its end by signals, and settings that it refuses.

use crate::common::*;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 40 * MIB + 99;

fn content() -> Content {
    Content::generated(8, SIZE)
}

/// A running daemon.
pub(crate) struct Daemon {
    pub(crate) port: u16,
    pub(crate) running: Running,
}

impl Daemon {
    /// Starts a daemon over the cache directory `a`, and waits until it answers.
    pub(crate) fn start(run: Run, arguments: &[&str]) -> Self {
        let port = modelcache_testkit::free_port().unwrap();
        let run = run.env("MODEL_CACHE_LISTEN", format!("127.0.0.1:{port}"));
        let daemon = Self { port, running: run.start([&["serve"], arguments].concat()) };
        wait_until("the daemon answers", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        daemon
    }

    /// Sends a GET. Returns the head and the body, which is short if the connection was cut.
    pub(crate) fn get(&self, path: &str) -> (String, Vec<u8>) {
        get(self.port, path)
    }
}

fn get(port: u16, path: &str) -> (String, Vec<u8>) {
    get_with(port, path, "")
}

/// Sends a GET with further header lines, each of which ends with CRLF.
pub(crate) fn get_with(port: u16, path: &str, headers: &str) -> (String, Vec<u8>) {
    send(port, "GET", path, headers, "")
}

/// Sends a request with further header lines, and a body. Returns like [`Daemon::get`].
pub(crate) fn send(port: u16, method: &str, path: &str, headers: &str, body: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close");
    write!(stream, "{head}\r\n\r\n{body}").unwrap();
    let mut bytes = Vec::new();
    // A reset is also an end.
    let _ = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
    let body = bytes.split_off(end);
    (String::from_utf8(bytes).unwrap(), body)
}

/// An environment whose Hub has `org/model` with one large file, and the path of the file in the daemon.
fn house() -> (House, String) {
    let house = House::new();
    let commit = house.hub.repo("org/model").commit().lfs("model.bin", content()).publish().unwrap();
    (house, format!("/org/model/resolve/{commit}/model.bin"))
}

/// A stall of the last part of the model.
fn stall() -> HubFault {
    HubFault::stall_at(37 * MIB, Duration::from_secs(600)).on("model.bin")
}

#[test]
fn a_daemon_that_is_killed_in_the_middle_of_a_fill_continues_it_after_a_restart() {
    let (house, path) = house();
    let stall = house.hub.faults().add(stall());
    let run = || house.on_local("a").env("MODEL_CACHE_READ_TIMEOUT", "600s");
    let daemon = Daemon::start(run(), &[]);
    let port = daemon.port;
    let client = thread::spawn({
        let path = path.clone();
        move || get(port, &path)
    });
    wait_until("the fill stalls", || stall.count() > 0);
    wait_until("parts are on disk", || house.marked_parts("a") >= 3);
    daemon.running.signal("KILL");
    daemon.running.wait();
    let (_, partial) = client.join().unwrap();
    assert!((partial.len() as u64) < SIZE, "the fill was over already");
    assert!(content().to_vec().unwrap().starts_with(&partial));

    house.hub.faults().clear();
    house.hub.clear_requests();
    let daemon = Daemon::start(run(), &[]);
    let (head, body) = daemon.get(&path);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(body == content().to_vec().unwrap(), "other bytes");
    let sent = house.hub.body_bytes();
    assert!(sent < SIZE, "the origin sent {sent} bytes of {SIZE} again");
    daemon.running.signal("TERM");
    daemon.running.wait().ok();
}

#[test]
fn a_signal_ends_the_daemon_with_success() {
    for signal in ["TERM", "INT"] {
        let (house, path) = house();
        let daemon = Daemon::start(house.on_local("a"), &[]);
        assert!(daemon.get(&path).0.starts_with("HTTP/1.1 200"));
        let started = Instant::now();
        daemon.running.signal(signal);
        let outcome =
            daemon.running.wait().ok().said(&["finishing the running requests", "HF_ENDPOINT=http://127.0.0.1:"]);
        assert_eq!(outcome.stdout, "");
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    }
}

#[test]
fn a_stalled_download_does_not_keep_the_daemon_from_ending() {
    let (house, path) = house();
    let stall = house.hub.faults().add(stall());
    let run = house.on_local("a").env("MODEL_CACHE_READ_TIMEOUT", "600s");
    // One download for the list, one for a client.
    let daemon = Daemon::start(run, &["hf://org/model"]);
    let port = daemon.port;
    let client = thread::spawn(move || get(port, &path));
    wait_until("the fill stalls", || stall.count() > 0);
    assert!(daemon.get("/readyz").0.starts_with("HTTP/1.1 503"));
    let started = Instant::now();
    daemon.running.signal("TERM");
    daemon.running.wait().ok();
    assert!(started.elapsed() < Duration::from_secs(35), "{:?}", started.elapsed());
    assert!((client.join().unwrap().1.len() as u64) < SIZE);
}

#[test]
fn a_taken_port_is_an_error_with_the_remedy() {
    let house = House::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    let run = || house.on_local("a").env("MODEL_CACHE_LISTEN", &listen);
    run().run(["serve"]).failed(1, &[&listen, "another program uses the port", "MODEL_CACHE_LISTEN"]);
    // The daemon itself may be running, or systemd may hold its socket.
    run().run(["serve", "--check"]).ok().said(&[&listen, "the rest of the configuration is usable"]);
}

#[test]
fn a_check_ends_without_serving() {
    let (house, _) = house();
    let port = modelcache_testkit::free_port().unwrap();
    let run = || house.on_local("a").env("MODEL_CACHE_LISTEN", format!("127.0.0.1:{port}"));
    run().run(["serve", "--check", "hf://org/model"]).ok().said(&["ready to serve", &port.to_string()]);
    assert!(house.hub.requests().is_empty());
    run().run(["serve", "--check", "no-version"]).failed(2, &["no-version"]);
}

#[test]
fn settings_that_cannot_work_are_refused_before_anything_is_served() {
    let house = House::new();
    let check = |pairs: &[(&str, &str)]| {
        let run = house.on_local("a").env("MODEL_CACHE_LISTEN", "127.0.0.1:0");
        let run = pairs.iter().fold(run, |run, (name, value)| run.env(name, value));
        run.run(["serve", "--check"])
    };
    let open = ("MODEL_CACHE_LISTEN", "0.0.0.0:0");
    check(&[open]).failed(2, &["no token", "MODEL_CACHE_TOKEN", "--insecure"]);
    check(&[open, ("MODEL_CACHE_TOKEN", "canary-token-of-the-daemon")]).ok();
    check(&[open, ("MODEL_CACHE_INSECURE", "1")]).ok();
    check(&[("MODEL_CACHE_LISTEN", "[::]:0")]).failed(2, &["no token"]);
    check(&[("MODEL_CACHE_LISTEN", "nonsense")]).failed(2, &["MODEL_CACHE_LISTEN", "nonsense"]);
    check(&[("MODEL_CACHE_TLS_CERTIFICATE", "/none.pem")]).failed(2, &["MODEL_CACHE_TLS_KEY"]);
    check(&[("MODEL_CACHE_TLS_CERTIFICATE", "/none.pem"), ("MODEL_CACHE_TLS_KEY", "/none.pem")])
        .failed(2, &["/none.pem"]);
    check(&[("MODEL_CACHE_PREWARM", "no-version")]).failed(2, &["no-version"]);
}

#[test]
fn sockets_of_systemd_need_a_token_if_other_machines_can_reach_them() {
    let house = House::new();
    // Passes a socket as descriptor 3, as systemd does.
    let check = |passed: &str, setting: &str| {
        let script = r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" serve --check 3<&0"#;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, BIN]).env_clear().env("MODEL_CACHE_DIR", house.path("a"));
        let socket = OwnedFd::from(TcpListener::bind(passed).unwrap());
        let output = command.env("MODEL_CACHE_LISTEN", setting).stdin(socket).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, message) = check("0.0.0.0:0", "127.0.0.1:0");
    assert!(code == Some(2) && message.contains("no token"), "{code:?} {message}");
    let (code, message) = check("127.0.0.1:0", "0.0.0.0:0");
    assert!(code == Some(0) && message.contains("ready to serve"), "{code:?} {message}");
}

#[test]
fn schemathesis_finds_no_response_that_the_description_of_the_routes_does_not_allow() {
    let Some(venv) = venv() else { return };
    let (house, _) = house();
    house.on_local("a").run(["put", "team/model@3", house.write("f", "x").to_str().unwrap()]).ok();
    let daemon = Daemon::start(house.on_local("a").env("MODEL_CACHE_RETRY_DEADLINE", "1s"), &[]);
    let mut tool = Command::new(venv.join("bin/schemathesis"));
    tool.args(["run", &format!("http://127.0.0.1:{}/openapi.json", daemon.port)]);
    // References have a grammar that a schema does not describe, so that valid requests may be refused.
    tool.args(["--exclude-checks", "positive_data_acceptance", "--max-examples", "20", "--no-color"]);
    let output = tool.current_dir(house.path("")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("Test cases:"), "{text}");
}
