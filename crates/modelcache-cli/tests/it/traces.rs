//! Traces by OTLP over HTTP: the spans that a collector gets, and what a bad collector does to a command.

use crate::common::*;
use crate::serve::{Daemon, get_with, send};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A collector in Python that prints the spans it gets.
struct Collector {
    child: Child,
    output: BufReader<ChildStdout>,
    port: u16,
}

impl Collector {
    fn start(venv: &Path) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/receive_traces.py");
        let mut child =
            Command::new(venv.join("bin/python")).arg(script).stdout(Stdio::piped()).spawn().expect("Python starts");
        let (mut output, mut port) = (BufReader::new(child.stdout.take().unwrap()), String::new());
        output.read_line(&mut port).unwrap();
        Self { child, output, port: port.trim().parse().unwrap() }
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Ends the collector, and returns the spans that it got.
    fn end(mut self) -> Vec<Value> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut text = String::new();
        self.output.read_to_string(&mut text).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn named<'a>(spans: &'a [Value], name: &str) -> &'a Value {
    spans.iter().find(|span| span["name"] == name).unwrap_or_else(|| panic!("no span {name} in {spans:#?}"))
}

#[test]
fn a_request_to_the_daemon_continues_the_trace_of_its_client() {
    let Some(venv) = venv() else { return };
    let (house, collector) = (House::new(), Collector::start(&venv));
    let commit = house.hub.repo("org/model").commit().lfs("model.bin", big()).publish().unwrap();
    let run = house.on_local("a").env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    let daemon = Daemon::start(run.env("OTEL_EXPORTER_OTLP_HEADERS", "api-key=canary-key"), &[]);
    let header = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\nX-Request-Id: request-1\r\n");
    let path = format!("/org/model/resolve/{commit}/model.bin");
    let secret = "/cache/artifacts/https:%2F%2Fuser:canary-password@host%2Fa%3Ftoken%3Dcanary-query";
    get_with(daemon.port, secret, "");
    let (head, body) = get_with(daemon.port, &path, &header);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(body == big().to_vec().unwrap(), "other bytes");
    // The head of this response is sent before the download begins.
    let body = r#"{"ref": "hf://org/model"}"#;
    let length = format!("Content-Length: {}\r\n", body.len());
    let lines = format!("Content-Type: application/json\r\nAccept: application/x-ndjson\r\n{length}");
    send(daemon.port, "POST", "/cache/artifacts", &lines, body);
    daemon.get("/livez");
    daemon.running.signal("TERM");
    let outcome = daemon.running.wait().ok();

    let spans = collector.end();
    let request = named(&spans, "GET hub_file");
    assert_eq!((&request["trace"], &request["parent"]), (&TRACE.into(), &PARENT.into()));
    assert_eq!(request["kind"], 2, "a server");
    assert_eq!((&request["path"], &request["key"]), (&"/v1/traces".into(), &"canary-key".into()));
    assert_eq!(request["resource"]["service.name"], "modelcache");
    let attributes = &request["attributes"];
    assert_eq!(attributes["http.request.method"], "GET");
    assert_eq!(attributes["http.response.status_code"], 200);
    assert_eq!(attributes["url.path"], path);
    assert_eq!(attributes["request.id"], "request-1");

    let download = named(&spans, "download");
    assert_eq!((&download["trace"], &download["parent"]), (&TRACE.into(), &request["id"]));
    assert_eq!(download["attributes"]["origin_bytes"], big().len());
    let took = |span: &Value| span["ms"].as_f64().unwrap();
    assert!(took(request) >= took(download), "a request lasts until its body is sent: {request:#} {download:#}");
    let fill = named(&spans, "POST /cache/artifacts");
    let phase = spans.iter().find(|span| span["parent"] == fill["id"]).expect("it has phases");
    assert!(took(fill) >= took(phase), "{fill:#} {phase:#}");
    assert_eq!(named(&spans, "GET /livez")["parent"], "", "another trace");
    assert!(spans.iter().all(|span| span["events"] == 0), "the log is not sent");
    let printed = format!("{spans:?} {}", outcome.stderr);
    assert!(!printed.contains("canary-password") && !printed.contains("canary-query"), "{printed}");
}

#[test]
fn a_command_is_a_trace_with_its_phases() {
    let Some(venv) = venv() else { return };
    let ((house, _), collector) = (House::with_model(), Collector::start(&venv));
    let run = |dir| house.on_local(dir).env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    run("a").env("OTEL_RESOURCE_ATTRIBUTES", "service.name=trainer").run(["get", "hf://org/model"]).ok();
    run("a").run(["exec", "hf://org/model", "--", "/bin/true"]).ok();
    run("b").run(["prewarm", "hf://org/model"]).ok();
    run("b").run(["get", "other@1"]).failed(3, &["other@1"]);
    let spans = collector.end();
    let command = named(&spans, "get");
    assert_eq!(command["resource"]["service.name"], "trainer");
    for phase in ["resolve", "plan", "download", "publish"] {
        assert_eq!(named(&spans, phase)["parent"], command["id"], "{phase}");
    }
    assert_eq!(command["attributes"]["exit_code"], 0);
    // Its span ends before the user's command begins.
    assert_eq!(named(&spans, "exec")["attributes"]["exit_code"], 0);
    // Each artifact of a list has a span of its own.
    let prewarm = named(&spans, "prewarm");
    let one = spans.iter().find(|span| span["attributes"]["reference"] == "hf://org/model").expect("a span");
    assert_eq!((&one["name"], &one["parent"]), (&"get".into(), &prewarm["id"]));
    let phase = spans.iter().find(|span| span["parent"] == one["id"] && span["name"] == "download").expect("a phase");
    assert!(one["ms"].as_f64() >= phase["ms"].as_f64(), "{one:#} {phase:#}");
    let failed = spans.iter().find(|span| span["attributes"]["exit_code"] == 3).expect("a failed command");
    assert_eq!(failed["status"], 2, "an error");
}

#[test]
fn without_a_collector_a_command_succeeds_and_says_so() {
    let (house, _) = House::with_model();
    // Nothing listens on this port any more.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let run = |endpoint: &str| house.on_local("a").env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
    let started = Instant::now();
    let outcome = run(&format!("http://user:canary-password@127.0.0.1:{port}")).run(["get", "hf://org/model"]).ok();
    let outcome = outcome.said(&["OTEL_EXPORTER_OTLP_ENDPOINT", "cannot send traces"]);
    assert!(!outcome.stderr.contains("canary-password"), "{outcome}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());

    // The variables may be meant for the program that `exec` starts.
    run("no address").run(["ls"]).ok().said(&["OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318"]);
    let grpc = run("http://127.0.0.1:4317").env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
    grpc.run(["ls"]).ok().said(&["OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"]);
    // Values that the SDK itself would follow into an abort.
    let odd = run("http://127.0.0.1:9").env("OTEL_BSP_MAX_QUEUE_SIZE", "1000000000000");
    odd.env("OTEL_BSP_SCHEDULE_DELAY", "0").run(["ls"]).ok();
    let outcome = run("no address").env("OTEL_SDK_DISABLED", "true").run(["ls"]).ok();
    assert!(!outcome.stderr.contains("OTEL"), "{outcome}");
}
