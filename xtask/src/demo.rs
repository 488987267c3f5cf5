//! `cargo xtask demo`: shows the program from the first download to a full directory, and checks every step.
//!
//! Runs the program as a user would, against an S3 server and a stand-in for the Hugging Face Hub in this process.
//! Needs no network and no credentials. Each step checks digests, the bytes by tier that the program reports, and the
//! requests to the servers. The demo fails at the first difference. All files are in one folder below `target/`, which
//! is removed at the end. The program is built in the development profile, which optimises the dependencies, including
//! the hash.

use crate::repository::{Build, build_modelcache, shell_line, target_folder};
use crate::table;
use anyhow::{Context, Result, ensure};
use clap::Args;
use modelcache_testkit::content::safetensors;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::{Content, Hub, S3, wire};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const BUCKET: &str = "models";
const MODEL: &str = "demo/model";
const WEIGHTS: &str = "model.safetensors";
/// Number of floats in the model's weights, 256 MiB in total.
const FLOATS: usize = 64 << 20;
/// Size of each of the three models that compete for space. The budget holds two of them.
const SMALL_BYTES: u64 = 48 << 20;
const BUDGET: &str = "110MB";
/// Size of a part in bytes: the most that the get after a kill may have to download again.
const PART_BYTES: u64 = 8 << 20;
/// Number of timed runs of the warm call.
const WARM_RUNS: usize = 11;

/// Run the program against an embedded S3 server and Hub, and check every step
#[derive(Debug, Args)]
pub struct Demo {}

impl Demo {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let program = build_modelcache(Build::Development)?;
        let started = Instant::now();
        let mut scenario = Scenario::start(program)?;
        let model = Model::publish(&scenario.hub)?;
        println!("An S3 server and a Hub, which has {MODEL} ({} MB), listen on loopback.", megabytes(model.bytes));
        println!("Every command below has these variables in its environment, and the key pair of the S3 server:");
        println!("  HF_ENDPOINT={} AWS_ENDPOINT_URL={}", scenario.hub.url(), scenario.s3.endpoint());
        println!("  MODEL_CACHE_REMOTE={} MODEL_CACHE_MIN_FREE_BYTES=0", remote());
        println!("The JSON output of the commands is checked, but not shown.");

        first_download(&mut scenario, &model)?;
        from_s3(&mut scenario, &model)?;
        warm_get(&mut scenario, &model)?;
        damaged_byte(&mut scenario, &model)?;
        budget(&mut scenario)?;
        put_evict_get(&mut scenario)?;
        ten_processes(&mut scenario)?;
        kill_and_resume(&mut scenario)?;
        daemon(&mut scenario)?;

        println!("\nSizes are in MB. Digests, bytes by tier and requests to the servers were checked at every step.\n");
        println!("{}", table::markdown(&["step", "seconds", "disk", "S3", "origin", "uploaded to S3"], &scenario.rows));
        println!("Total: {:.1} s.", started.elapsed().as_secs_f64());
        Ok(())
    }
}

fn first_download(scenario: &mut Scenario, model: &Model) -> Result<()> {
    scenario.title("First download: neither disk nor S3 has the model. It comes from the Hub and is uploaded to S3");
    let got = scenario.get("node-1", &format!("hf://{MODEL}@main"))?;
    got.check_bytes(0, 0, model.bytes)?.check_uploaded(model.bytes)?;
    model.check_files(&got.path()?)?;
    ensure!(scenario.hub.body_bytes() >= model.bytes, "the Hub sent less than the model");
    ensure!(scenario.hub.tokens_at_cdn().is_empty(), "a token reached the CDN");
    scenario.row("first download, from the Hub", &got);
    Ok(())
}

fn from_s3(scenario: &mut Scenario, model: &Model) -> Result<()> {
    scenario.title("A second machine, while the Hub is down: the model comes from S3");
    scenario.hub.down(true);
    scenario.hub.clear_requests();
    let got = scenario.get("node-2", &format!("hf://{MODEL}@{}", model.commit))?;
    got.check_bytes(0, model.bytes, 0)?.check_uploaded(0)?;
    model.check_files(&got.path()?)?;
    ensure!(scenario.hub.requests().is_empty(), "the Hub got requests");
    ensure!(!scenario.s3.object_gets(WEIGHTS).is_empty(), "S3 got no request for the weights");
    scenario.row("from S3, while the Hub is down", &got);
    Ok(())
}

fn warm_get(scenario: &mut Scenario, model: &Model) -> Result<()> {
    scenario.title("Warm get: the model comes from disk, without a request to S3 or to the Hub, which is still down");
    scenario.s3.clear_requests();
    let reference = format!("hf://{MODEL}@main");
    let mut runs = vec![scenario.get("node-1", &reference)?];
    for _ in 1..WARM_RUNS {
        runs.push(scenario.run_silently("node-1", &["get", &reference, "--json"])?);
    }
    for got in &runs {
        got.check_bytes(model.bytes, 0, 0)?.check_uploaded(0)?;
        model.check_files(&got.path()?)?;
    }
    ensure!(scenario.s3.requests().is_empty(), "S3 got requests");
    runs.sort_by_key(|run| run.took);
    println!("  median of {WARM_RUNS} runs: {:.1} ms", runs[WARM_RUNS / 2].took.as_secs_f64() * 1e3);
    scenario.row("warm get, whole command", &runs[WARM_RUNS / 2]);
    Ok(())
}

fn damaged_byte(scenario: &mut Scenario, model: &Model) -> Result<()> {
    scenario.title("One byte of the object on S3 is damaged: the bad part comes from the Hub, and S3 is repaired");
    scenario.hub.down(false);
    scenario.hub.clear_requests();
    let key = scenario.weights_key()?;
    scenario.s3.flip_byte(BUCKET, &key, model.bytes / 2)?;
    let object = scenario.s3.object_path(BUCKET, &key);
    ensure!(Content::on_disk(&object)?.sha256()? != model.sha256, "the object was not damaged");
    let got = scenario.get("node-3", &format!("hf://{MODEL}@{}", model.commit))?;
    model.check_files(&got.path()?)?;
    let (remote, origin) = (got.bytes("remote"), got.bytes("origin"));
    ensure!(remote > 0 && origin > 0, "{remote} bytes came from S3 and {origin} from the Hub; both should be above 0");
    ensure!(Content::on_disk(&object)?.sha256()? == model.sha256, "the object on S3 was not repaired");
    scenario.row("damaged byte on S3, repaired", &got);
    Ok(())
}

fn budget(scenario: &mut Scenario) -> Result<()> {
    scenario
        .title(&format!("A budget of {BUDGET} has room for two of three models: the least recently used is evicted"));
    let hub_repos = ["demo/red", "demo/green", "demo/blue"];
    let mut digests = Vec::new();
    for (seed, repo) in (1..).zip(hub_repos) {
        let content = Content::generated(seed, SMALL_BYTES);
        digests.push(content.sha256()?);
        scenario.hub.repo(repo).commit().file(WEIGHTS, content).publish()?;
    }
    scenario.budget = Some(BUDGET);
    for repo in ["demo/red", "demo/green", "demo/red"] {
        scenario.get("node-4", &format!("hf://{repo}@main"))?;
        // Last uses are compared as file times. The pause makes them differ even on a coarse clock.
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(scenario.listed("node-4")? == ["hf/demo/green", "hf/demo/red"], "green and red should be on disk");
    let got = scenario.get("node-4", "hf://demo/blue@main")?;
    got.check_bytes(0, 0, SMALL_BYTES)?;
    ensure!(
        scenario.listed("node-4")? == ["hf/demo/blue", "hf/demo/red"],
        "green was used least recently and should be evicted"
    );
    for (repo, digest) in hub_repos.iter().zip(&digests).filter(|(repo, _)| **repo != "demo/green") {
        let path = scenario.run_silently("node-4", &["get", &format!("hf://{repo}@main"), "--json"])?.path()?;
        ensure!(Content::on_disk(path.join(WEIGHTS))?.sha256()? == *digest, "{repo} is damaged");
    }
    let stats = scenario.run_silently("node-4", &["stats", "--json"])?;
    let used = stats.json["used_bytes"].as_u64().context("stats reports no used bytes")?;
    ensure!(used <= stats.json["budget_bytes"].as_u64().unwrap_or_default(), "{used} bytes are more than the budget");
    scenario.row("get that evicts", &got);
    scenario.budget = None;
    Ok(())
}

fn put_evict_get(scenario: &mut Scenario) -> Result<()> {
    scenario.title("Put a file, evict it from disk, and get it from S3");
    let content = Content::generated(9, SMALL_BYTES);
    let sha256 = content.sha256()?;
    content.write_to(scenario.folder.path().join("fraud.bin"))?;
    let put = scenario.run("node-5", &["put", "fraud-detector@3", "fraud.bin", "--json"])?;
    ensure!(put.json["uploaded_bytes"] == SMALL_BYTES && put.json["sha256"] == *sha256, "{}", put.json);
    scenario.rows.push(row("put to disk and S3", put.took, ["".into(), "".into(), "".into(), megabytes(SMALL_BYTES)]));
    scenario.run("node-5", &["evict", "fraud-detector@3", "--tier", "disk"])?;
    ensure!(scenario.listed("node-5")?.is_empty(), "the file is still on disk");
    let got = scenario.get("node-5", "fraud-detector@3")?;
    got.check_bytes(0, SMALL_BYTES, 0)?.check_uploaded(0)?;
    ensure!(Content::on_disk(got.path()?)?.sha256()? == sha256, "the file from S3 differs from the file that was put");
    scenario.row("evicted from disk, from S3", &got);
    Ok(())
}

fn ten_processes(scenario: &mut Scenario) -> Result<()> {
    scenario.title("Ten processes get the same model at the same time, into one directory: one of them downloads it");
    let content = Content::generated(21, SMALL_BYTES);
    let sha256 = content.sha256()?;
    scenario.hub.repo("demo/crowd").commit().file(WEIGHTS, content).publish()?;
    scenario.hub.clear_requests();
    let arguments = ["get", "hf://demo/crowd@main"];
    println!(
        "$ for i in $(seq 10); do MODEL_CACHE_DIR=node-6 {} & done; wait",
        shell_line(scenario.command("node-6").args(arguments))
    );
    let started = Instant::now();
    let start = |_| scenario.command("node-6").args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let processes = (0..10).map(start).collect::<Result<Vec<_>, _>>()?;
    for process in processes {
        let output = process.wait_with_output()?;
        ensure!(output.status.success(), "one of the ten processes failed");
        let path = PathBuf::from(String::from_utf8(output.stdout)?.trim_end());
        ensure!(Content::on_disk(path.join(WEIGHTS))?.sha256()? == sha256, "one of the ten processes got other bytes");
    }
    let took = started.elapsed();
    let sent = scenario.hub.body_bytes();
    println!("  the Hub sent {} MB: the model once", megabytes(sent));
    ensure!(sent == SMALL_BYTES, "the Hub sent {sent} bytes, not {SMALL_BYTES}");
    let cells = ["".into(), "".into(), megabytes(sent), megabytes(SMALL_BYTES)];
    scenario.rows.push(row("ten processes, one download", took, cells));
    Ok(())
}

fn kill_and_resume(scenario: &mut Scenario) -> Result<()> {
    scenario.title("kill -9 during a download: the next get resumes from the parts on disk");
    let content = Content::generated(22, SMALL_BYTES);
    let sha256 = content.sha256()?;
    scenario.hub.repo("demo/large").commit().file(WEIGHTS, content).publish()?;
    scenario.hub.clear_requests();
    // No response contains the last byte, so that the download cannot end before the kill.
    scenario.hub.faults().add(HubFault::stall_at(SMALL_BYTES - 1, Duration::from_secs(600)).on(WEIGHTS));
    let reference = "hf://demo/large@main";
    let mut command = scenario.command("node-7");
    println!("$ MODEL_CACHE_DIR=node-7 {} & kill -9 $!", shell_line(command.args(["get", reference])));
    let mut process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    while scenario.hub.body_bytes() < SMALL_BYTES - PART_BYTES {
        ensure!(process.try_wait()?.is_none(), "the get ended before it was killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(500));
    process.kill()?;
    process.wait()?;
    scenario.hub.faults().clear();
    ensure!(scenario.listed("node-7")?.is_empty(), "an incomplete artifact is visible");
    let got = scenario.get("node-7", reference)?;
    ensure!(Content::on_disk(got.path()?.join(WEIGHTS))?.sha256()? == sha256, "the resumed file is damaged");
    let resumed_bytes = got.bytes("origin");
    ensure!(resumed_bytes <= PART_BYTES, "{resumed_bytes} bytes were downloaded again, more than one part");
    scenario.row("killed, then resumed", &got);
    Ok(())
}

fn daemon(scenario: &mut Scenario) -> Result<()> {
    scenario.title("A daemon as the Hugging Face endpoint: eight clients share one download; then the Hub is down");
    let content = Content::generated(23, SMALL_BYTES);
    let (sha256, size) = (content.sha256()?, content.len());
    let commit = scenario.hub.repo("demo/served").commit().lfs(WEIGHTS, content).publish()?;
    scenario.hub.clear_requests();
    let daemon = Daemon::start(scenario)?;
    let path = format!("/demo/served/resolve/{commit}/{WEIGHTS}");
    println!("$ for i in $(seq 8); do curl -sO http://{}{path} & done; wait", daemon.address);
    let started = Instant::now();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (address, path) = (daemon.address, path.clone());
            std::thread::spawn(move || http_get(address, &path))
        })
        .collect();
    for client in clients {
        let body = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        ensure!(Content::from(body).sha256()? == sha256, "a client got other bytes");
    }
    let took = started.elapsed();
    let sent = scenario.hub.body_bytes();
    println!("  the Hub sent {} MB: the model once", megabytes(sent));
    ensure!(sent == size, "the Hub sent {sent} bytes, not {size}");
    scenario.rows.push(row("eight clients of the daemon", took, ["".into(), "".into(), megabytes(sent), "".into()]));

    scenario.hub.down(true);
    println!("$ curl -sO http://{}{path}    # while the Hub is down", daemon.address);
    let started = Instant::now();
    ensure!(http_get(daemon.address, &path)?.len() as u64 == size, "the daemon served another size");
    let cells = [megabytes(size), "".into(), "".into(), "".into()];
    scenario.rows.push(row("from the daemon, while the Hub is down", started.elapsed(), cells));
    let metrics = String::from_utf8(http_get(daemon.address, "/metrics")?)?;
    for line in metrics.lines().filter(|line| line.starts_with("modelcache_gets_total")) {
        println!("  {line}");
    }
    ensure!(metrics.contains("modelcache_gets_total{from=\"disk\"} 1\n"), "the last request was no hit:\n{metrics}");
    scenario.hub.down(false);
    Ok(())
}

/// A running daemon. It is killed when this value is dropped.
struct Daemon {
    process: Child,
    /// Its address and port.
    address: SocketAddr,
}

impl Daemon {
    /// Starts the daemon on a free port, and waits until it serves.
    fn start(scenario: &Scenario) -> Result<Self> {
        let mut command = scenario.command("node-8");
        command.args(["serve", "--listen", "127.0.0.1:0", "--backfill", "never"]);
        println!("$ MODEL_CACHE_DIR=node-8 {} &", shell_line(&command));
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let messages = process.stderr.take().context("the daemon has no messages")?;
        let mut lines = BufReader::new(messages).lines();
        let address = loop {
            let line = lines.next().context("the daemon ended")??;
            println!("  {line}");
            if let Some((_, address)) = line.split_once("HF_ENDPOINT=http://") {
                break address.parse()?;
            }
        };
        // Read further messages, so that the daemon does not wait for a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { process, address })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Sends a GET and returns the body of the response.
fn http_get(address: SocketAddr, path: &str) -> Result<Vec<u8>> {
    Ok(wire::request(address, "GET", path, &[], b"")?.want(200).context(path.to_owned())?.body)
}

fn remote() -> String {
    format!("s3://{BUCKET}/demo")
}

/// The servers, the program and the results.
struct Scenario {
    hub: Hub,
    s3: S3,
    program: PathBuf,
    budget: Option<&'static str>,
    step: usize,
    rows: Vec<Vec<String>>,
    /// The last field, so that the folder is removed after the servers have stopped.
    folder: TempDir,
}

impl Scenario {
    /// Starts the servers.
    fn start(program: PathBuf) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("demo-").tempdir_in(target_folder()?)?;
        let s3 = S3::start_in(folder.path().join("s3"), 0)?;
        s3.bucket(BUCKET)?;
        Ok(Self { hub: Hub::start_on(0)?, s3, program, budget: None, step: 0, rows: Vec::new(), folder })
    }

    fn title(&mut self, title: &str) {
        self.step += 1;
        println!("\n{}. {title}", self.step);
    }

    fn row(&mut self, step: &str, run: &Run) {
        let by_tier = [run.bytes("disk"), run.bytes("remote"), run.bytes("origin"), run.uploaded()];
        self.rows.push(row(step, run.took, by_tier.map(|bytes| if bytes == 0 { "".into() } else { megabytes(bytes) })));
    }

    fn get(&self, node: &str, reference: &str) -> Result<Run> {
        self.run(node, &["get", reference, "--json"])
    }

    /// Runs the program on the machine `node`. Prints the command and its messages.
    fn run(&self, node: &str, arguments: &[&str]) -> Result<Run> {
        let budget = self.budget.map_or_else(String::new, |budget| format!(" MODEL_CACHE_MAX_BYTES={budget}"));
        println!("$ MODEL_CACHE_DIR={node}{budget} {}", shell_line(self.command(node).args(arguments)));
        let run = self.run_silently(node, arguments)?;
        run.messages.lines().for_each(|line| println!("  {line}"));
        Ok(run)
    }

    /// Runs the program on the machine `node` and prints nothing.
    fn run_silently(&self, node: &str, arguments: &[&str]) -> Result<Run> {
        let mut command = self.command(node);
        let started = Instant::now();
        let output = command.args(arguments).output().context("cannot run modelcache")?;
        let took = started.elapsed();
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{} ended with {}\n{messages}", shell_line(&command), output.status);
        let text = String::from_utf8(output.stdout)?;
        let json = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(Run { json, text, messages, took })
    }

    /// Returns a command for the program with a clean environment. The folder `node` simulates the disk of a machine.
    fn command(&self, node: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(self.folder.path()).env_clear().env("HOME", self.folder.path());
        command.env("HF_ENDPOINT", self.hub.url()).envs(self.s3.env());
        command.env("MODEL_CACHE_DIR", node).env("MODEL_CACHE_REMOTE", remote());
        // The demo must run on a machine with little free space, too.
        command.env("MODEL_CACHE_MIN_FREE_BYTES", "0");
        self.budget.map(|budget| command.env("MODEL_CACHE_MAX_BYTES", budget));
        command
    }

    /// Returns the names of the artifacts on a machine's disk, sorted. Prints the listing.
    fn listed(&self, node: &str) -> Result<Vec<String>> {
        let listing = self.run(node, &["ls"])?;
        listing.text.lines().for_each(|line| println!("  {line}"));
        let rows = self.run_silently(node, &["ls", "--json"])?.text;
        let rows: Vec<Value> = rows.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let mut names: Vec<_> = rows.iter().filter_map(|row| row["name"].as_str()).map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Returns the key of the model's weights on S3.
    fn weights_key(&self) -> Result<String> {
        let keys = self.s3.keys(BUCKET);
        keys.into_iter().find(|key| key.ends_with(WEIGHTS)).context("the weights are not on S3")
    }
}

/// One run of the program.
struct Run {
    /// The JSON on standard output, or null.
    json: Value,
    /// Standard output.
    text: String,
    messages: String,
    took: Duration,
}

impl Run {
    fn path(&self) -> Result<PathBuf> {
        Ok(self.json["path"].as_str().context("the JSON output has no path")?.into())
    }

    /// Returns the bytes that came from a tier.
    fn bytes(&self, tier: &str) -> u64 {
        self.json["bytes"][tier].as_u64().unwrap_or_default()
    }

    /// Returns the bytes that were uploaded to S3.
    fn uploaded(&self) -> u64 {
        self.json["backfilled_bytes"].as_u64().unwrap_or_default()
    }

    fn check_bytes(&self, disk: u64, remote: u64, origin: u64) -> Result<&Self> {
        let found = (self.bytes("disk"), self.bytes("remote"), self.bytes("origin"));
        let expected = (disk, remote, origin);
        ensure!(found == expected, "bytes from disk, S3 and origin are {found:?}, not {expected:?}");
        Ok(self)
    }

    fn check_uploaded(&self, bytes: u64) -> Result<&Self> {
        ensure!(self.uploaded() == bytes, "{} bytes were uploaded to S3, not {bytes}", self.uploaded());
        Ok(self)
    }
}

/// The model on the Hub, and the content that each get must produce.
struct Model {
    commit: String,
    bytes: u64,
    /// Digest of the weights.
    sha256: String,
    /// Path and content of the other files.
    small: Vec<(&'static str, String)>,
}

impl Model {
    fn publish(hub: &Hub) -> Result<Self> {
        let weights = Content::from(safetensors(1, &["embedding.weight"], FLOATS));
        let small: Vec<(_, String)> = vec![
            ("README.md", "# A model for show\n".into()),
            ("config.json", "{\"architectures\": [\"DemoModel\"], \"hidden_size\": 8192}\n".into()),
            ("tokenizer/vocab.txt", (0..30_000).map(|word| format!("word{word}\n")).collect()),
        ];
        let bytes = weights.len() + small.iter().map(|(_, text)| text.len() as u64).sum::<u64>();
        let sha256 = weights.sha256()?;
        let mut commit = hub.repo(MODEL).commit().file(WEIGHTS, weights);
        for (path, text) in &small {
            commit = commit.file(path, text.as_str());
        }
        Ok(Self { commit: commit.publish()?, bytes, sha256, small })
    }

    /// Reads every file in `folder` and compares it with the model.
    fn check_files(&self, folder: &Path) -> Result<()> {
        let found = Content::on_disk(folder.join(WEIGHTS))?.sha256()?;
        ensure!(found == self.sha256, "{WEIGHTS} has SHA-256 {found}, not {}", self.sha256);
        for (path, text) in &self.small {
            ensure!(fs::read_to_string(folder.join(path))? == *text, "{path} differs from the file on the Hub");
        }
        Ok(())
    }
}

fn row(step: &str, took: Duration, bytes: [String; 4]) -> Vec<String> {
    [step.to_owned(), table::seconds(took.as_secs_f64())].into_iter().chain(bytes).collect()
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}
