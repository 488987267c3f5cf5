//! `cargo xtask demo`: shows the program from the first download to a full directory, and checks every step.
//!
//! Runs the real program as a user would, against an S3 server and a stand-in for the Hugging Face Hub in this process:
//! no network, no credentials. Each step compares digests, the bytes by tier that the program reports, and the requests
//! to the servers; the first difference ends the demo with a failure. All files are in one folder below `target/`,
//! which is removed at the end. The program is built in the development profile, which optimises dependencies,
//! including the hash.

use crate::repository::{Build, build_modelcache, shown, target_folder};
use crate::table;
use anyhow::{Context, Result, ensure};
use clap::Args;
use modelcache_testkit::content::safetensors;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::{Content, Hub, S3};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const BUCKET: &str = "models";
const MODEL: &str = "demo/model";
const WEIGHTS: &str = "model.safetensors";
/// Numbers in the model's weights, 256 MiB in total.
const FLOATS: usize = 64 << 20;
/// Size of each of the three models that compete for space. The budget holds two of them.
const SMALL_BYTES: u64 = 48 << 20;
const BUDGET: &str = "110MB";
/// Size of a part in bytes: the most that each connection may lose by a kill.
const PART_BYTES: u64 = 8 << 20;
/// Number of timed runs of the warm call.
const WARM_RUNS: usize = 11;

/// Run the program against an embedded S3 server and Hub, and check every step
#[derive(Debug, Args)]
pub(crate) struct Demo {}

impl Demo {
    pub(crate) fn run(&self) -> Result<()> {
        let program = build_modelcache(Build::Development)?;
        let started = Instant::now();
        let mut stage = Stage::set(program)?;
        let model = Model::publish(&stage.hub)?;
        println!("An S3 server and a Hub, which has {MODEL} ({} MB), listen on loopback.", megabytes(model.bytes));
        println!("Every command below has this in its environment, and the server's own key pair:");
        println!("  HF_ENDPOINT={} AWS_ENDPOINT_URL={}", stage.hub.url(), stage.s3.endpoint());
        println!("  MODEL_CACHE_REMOTE={} MODEL_CACHE_MIN_FREE_BYTES=0", remote());
        println!("Answers in JSON are read by the checks and not shown.");

        cold_from_the_origin(&mut stage, &model)?;
        cold_from_s3(&mut stage, &model)?;
        warm(&mut stage, &model)?;
        a_flipped_byte(&mut stage, &model)?;
        a_budget(&mut stage)?;
        put_and_back(&mut stage)?;
        ten_at_once(&mut stage)?;
        a_kill(&mut stage)?;

        println!("\nBytes in MB. Every step was checked: digests, bytes by tier, and the requests to the servers.\n");
        println!("{}", table::markdown(&["step", "seconds", "disk", "S3", "origin", "sent to S3"], &stage.rows));
        println!("All in {:.1} s.", started.elapsed().as_secs_f64());
        Ok(())
    }
}

fn cold_from_the_origin(stage: &mut Stage, model: &Model) -> Result<()> {
    stage.title("Cold: neither disk nor S3 has it, so it comes from the Hub, and S3 is filled on the way");
    let got = stage.get("node-1", &format!("hf://{MODEL}@main"))?;
    got.bytes_are(0, 0, model.bytes)?.sent_are(model.bytes)?;
    model.lies_in(&got.path()?)?;
    ensure!(stage.hub.body_bytes() >= model.bytes, "the Hub sent less than the model");
    ensure!(stage.hub.tokens_at_cdn().is_empty(), "a token reached the CDN");
    stage.row("cold, from the origin", &got);
    Ok(())
}

fn cold_from_s3(stage: &mut Stage, model: &Model) -> Result<()> {
    stage.title("A second machine, and the Hub is down: it comes from S3");
    stage.hub.down(true);
    stage.hub.clear_requests();
    let got = stage.get("node-2", &format!("hf://{MODEL}@{}", model.commit))?;
    got.bytes_are(0, model.bytes, 0)?.sent_are(0)?;
    model.lies_in(&got.path()?)?;
    ensure!(stage.hub.requests().is_empty(), "the Hub got requests");
    ensure!(!stage.s3.object_gets(WEIGHTS).is_empty(), "S3 got no request for the weights");
    stage.row("cold, from S3, Hub down", &got);
    Ok(())
}

fn warm(stage: &mut Stage, model: &Model) -> Result<()> {
    stage.title("Warm: from disk, without a request to S3 or the Hub (which is still down)");
    stage.s3.clear_requests();
    let reference = format!("hf://{MODEL}@main");
    let mut runs = vec![stage.get("node-1", &reference)?];
    for _ in 1..WARM_RUNS {
        runs.push(stage.run_silently("node-1", &["get", &reference, "--json"])?);
    }
    for got in &runs {
        got.bytes_are(model.bytes, 0, 0)?.sent_are(0)?;
        model.lies_in(&got.path()?)?;
    }
    ensure!(stage.s3.requests().is_empty(), "S3 got requests");
    runs.sort_by_key(|run| run.took);
    println!("  median of {WARM_RUNS} runs: {:.1} ms", runs[WARM_RUNS / 2].took.as_secs_f64() * 1e3);
    stage.row("warm, the whole command", &runs[WARM_RUNS / 2]);
    Ok(())
}

fn a_flipped_byte(stage: &mut Stage, model: &Model) -> Result<()> {
    stage.title("One bit of the object on S3 is flipped: noticed, replaced from the Hub, repaired on S3");
    stage.hub.down(false);
    stage.hub.clear_requests();
    let key = stage.weights_key()?;
    stage.s3.flip_byte(BUCKET, &key, model.bytes / 2)?;
    let object = stage.s3.object_path(BUCKET, &key);
    ensure!(Content::on_disk(&object)?.sha256()? != model.sha256, "the object was not damaged");
    let got = stage.get("node-3", &format!("hf://{MODEL}@{}", model.commit))?;
    model.lies_in(&got.path()?)?;
    let (remote, origin) = (got.bytes("remote"), got.bytes("origin"));
    ensure!(remote > 0 && origin > 0, "{remote} bytes came from S3 and {origin} from the origin, not some from both");
    ensure!(Content::on_disk(&object)?.sha256()? == model.sha256, "the object on S3 was not repaired");
    stage.row("flipped byte on S3, healed", &got);
    Ok(())
}

fn a_budget(stage: &mut Stage) -> Result<()> {
    stage.title(&format!("A budget of {BUDGET} has room for two of three models: the least recently used goes first"));
    let hub_repos = ["demo/red", "demo/green", "demo/blue"];
    let mut digests = Vec::new();
    for (seed, repo) in (1..).zip(hub_repos) {
        let content = Content::generated(seed, SMALL_BYTES);
        digests.push(content.sha256()?);
        stage.hub.repo(repo).commit().file(WEIGHTS, content).publish()?;
    }
    stage.budget = Some(BUDGET);
    for repo in ["demo/red", "demo/green", "demo/red"] {
        stage.get("node-4", &format!("hf://{repo}@main"))?;
        // Last uses are compared as file times. The pause makes them differ even on a coarse clock.
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(stage.listed("node-4")? == ["hf/demo/green", "hf/demo/red"], "two models should be on disk");
    let got = stage.get("node-4", "hf://demo/blue@main")?;
    got.bytes_are(0, 0, SMALL_BYTES)?;
    ensure!(stage.listed("node-4")? == ["hf/demo/blue", "hf/demo/red"], "green was used least recently and should go");
    for (repo, digest) in hub_repos.iter().zip(&digests).filter(|(repo, _)| **repo != "demo/green") {
        let path = stage.run_silently("node-4", &["get", &format!("hf://{repo}@main"), "--json"])?.path()?;
        ensure!(Content::on_disk(path.join(WEIGHTS))?.sha256()? == *digest, "{repo} is damaged");
    }
    let stats = stage.run_silently("node-4", &["stats", "--json"])?;
    let used = stats.answer["used_bytes"].as_u64().context("stats reports no used bytes")?;
    ensure!(used <= stats.answer["budget_bytes"].as_u64().unwrap_or_default(), "{used} bytes are more than the budget");
    stage.row("third of three, room for two", &got);
    stage.budget = None;
    Ok(())
}

fn put_and_back(stage: &mut Stage) -> Result<()> {
    stage.title("Put, evict from disk, get it back from S3");
    let content = Content::generated(9, SMALL_BYTES);
    let sha256 = content.sha256()?;
    content.write_to(stage.folder.path().join("fraud.bin"))?;
    let put = stage.run("node-5", &["put", "fraud-detector@3", "fraud.bin", "--json"])?;
    ensure!(put.answer["uploaded_bytes"] == SMALL_BYTES && put.answer["sha256"] == *sha256, "{}", put.answer);
    stage.rows.push(row("put to disk and S3", put.took, ["".into(), "".into(), "".into(), megabytes(SMALL_BYTES)]));
    stage.run("node-5", &["evict", "fraud-detector@3", "--tier", "disk"])?;
    ensure!(stage.listed("node-5")?.is_empty(), "it is still on disk");
    let got = stage.get("node-5", "fraud-detector@3")?;
    got.bytes_are(0, SMALL_BYTES, 0)?.sent_are(0)?;
    ensure!(Content::on_disk(got.path()?)?.sha256()? == sha256, "the file from S3 differs from the file that was put");
    stage.row("evicted from disk, back from S3", &got);
    Ok(())
}

fn ten_at_once(stage: &mut Stage) -> Result<()> {
    stage.title("Ten processes get the same model at once, into one directory: one of them downloads it");
    let crowd = Content::generated(21, SMALL_BYTES);
    let sha256 = crowd.sha256()?;
    stage.hub.repo("demo/crowd").commit().file(WEIGHTS, crowd).publish()?;
    stage.hub.clear_requests();
    let arguments = ["get", "hf://demo/crowd@main"];
    println!(
        "$ for i in $(seq 10); do MODEL_CACHE_DIR=node-6 {} & done; wait",
        shown(stage.command("node-6").args(arguments))
    );
    let started = Instant::now();
    let start = |_| stage.command("node-6").args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let processes = (0..10).map(start).collect::<Result<Vec<_>, _>>()?;
    for process in processes {
        let output = process.wait_with_output()?;
        ensure!(output.status.success(), "one of the ten failed");
        let path = PathBuf::from(String::from_utf8(output.stdout)?.trim_end());
        ensure!(Content::on_disk(path.join(WEIGHTS))?.sha256()? == sha256, "one of the ten got other bytes");
    }
    let took = started.elapsed();
    let sent = stage.hub.body_bytes();
    println!("  the Hub sent {} MB, which is the model once", megabytes(sent));
    ensure!(sent == SMALL_BYTES, "the Hub sent {sent} bytes, not {SMALL_BYTES}");
    let cells = ["".into(), "".into(), megabytes(sent), megabytes(SMALL_BYTES)];
    stage.rows.push(row("ten processes, one fetch", took, cells));
    Ok(())
}

fn a_kill(stage: &mut Stage) -> Result<()> {
    stage.title("kill -9 during a download: the next get resumes from the parts on disk");
    let large = Content::generated(22, SMALL_BYTES);
    let sha256 = large.sha256()?;
    stage.hub.repo("demo/large").commit().file(WEIGHTS, large).publish()?;
    stage.hub.clear_requests();
    // Stall one connection, so that the kill comes during the download.
    stage.hub.faults().add(HubFault::stall(1 << 20, Duration::from_secs(600)).on(WEIGHTS).once());
    let reference = "hf://demo/large@main";
    let mut command = stage.command("node-7");
    println!("$ MODEL_CACHE_DIR=node-7 {} & kill -9 $!", shown(command.args(["get", reference])));
    let mut process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    while stage.hub.body_bytes() < SMALL_BYTES - PART_BYTES {
        ensure!(process.try_wait()?.is_none(), "it ended before it was killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(500));
    process.kill()?;
    process.wait()?;
    ensure!(stage.listed("node-7")?.is_empty(), "an incomplete artifact is visible");
    let got = stage.get("node-7", reference)?;
    ensure!(Content::on_disk(got.path()?.join(WEIGHTS))?.sha256()? == sha256, "the resumed file is damaged");
    let again = got.bytes("origin");
    ensure!(again <= PART_BYTES, "{again} bytes were downloaded again, more than the part in progress");
    stage.row("killed, then resumed", &got);
    Ok(())
}

fn remote() -> String {
    format!("s3://{BUCKET}/demo")
}

/// The servers, the program and the results.
struct Stage {
    hub: Hub,
    s3: S3,
    program: PathBuf,
    budget: Option<&'static str>,
    step: usize,
    rows: Vec<Vec<String>>,
    /// The last field, so that the folder is removed after the servers have stopped.
    folder: TempDir,
}

impl Stage {
    fn set(program: PathBuf) -> Result<Self> {
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
        let by_tier = [run.bytes("disk"), run.bytes("remote"), run.bytes("origin"), run.sent()];
        self.rows.push(row(step, run.took, by_tier.map(|bytes| if bytes == 0 { "".into() } else { megabytes(bytes) })));
    }

    fn get(&self, node: &str, reference: &str) -> Result<Run> {
        self.run(node, &["get", reference, "--json"])
    }

    /// Runs the program on one of the machines. Prints the command and its messages.
    fn run(&self, node: &str, arguments: &[&str]) -> Result<Run> {
        let budget = self.budget.map_or_else(String::new, |budget| format!(" MODEL_CACHE_MAX_BYTES={budget}"));
        println!("$ MODEL_CACHE_DIR={node}{budget} {}", shown(self.command(node).args(arguments)));
        let run = self.run_silently(node, arguments)?;
        run.messages.lines().for_each(|line| println!("  {line}"));
        Ok(run)
    }

    fn run_silently(&self, node: &str, arguments: &[&str]) -> Result<Run> {
        let mut command = self.command(node);
        let started = Instant::now();
        let output = command.args(arguments).output().context("cannot run modelcache")?;
        let took = started.elapsed();
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{} ended with {}\n{messages}", shown(&command), output.status);
        let text = String::from_utf8(output.stdout)?;
        let answer = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(Run { answer, text, messages, took })
    }

    /// Returns a command for the program with a clean environment, on a machine that is simulated by a folder.
    fn command(&self, node: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(self.folder.path()).env_clear().env("HOME", self.folder.path());
        command.env("HF_ENDPOINT", self.hub.url()).envs(self.s3.env());
        command.env("MODEL_CACHE_DIR", node).env("MODEL_CACHE_REMOTE", remote());
        // The machine that runs the demo may be short of space, which the demo does not show.
        command.env("MODEL_CACHE_MIN_FREE_BYTES", "0");
        self.budget.map(|budget| command.env("MODEL_CACHE_MAX_BYTES", budget));
        command
    }

    /// Returns the names of the artifacts on a machine's disk, sorted. Prints the listing.
    fn listed(&self, node: &str) -> Result<Vec<String>> {
        let shown = self.run(node, &["ls"])?;
        shown.text.lines().for_each(|line| println!("  {line}"));
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
    answer: Value,
    text: String,
    messages: String,
    took: Duration,
}

impl Run {
    fn path(&self) -> Result<PathBuf> {
        Ok(self.answer["path"].as_str().context("the answer names no path")?.into())
    }

    fn bytes(&self, tier: &str) -> u64 {
        self.answer["bytes"][tier].as_u64().unwrap_or_default()
    }

    fn sent(&self) -> u64 {
        self.answer["backfilled_bytes"].as_u64().unwrap_or_default()
    }

    fn bytes_are(&self, disk: u64, remote: u64, origin: u64) -> Result<&Self> {
        let found = (self.bytes("disk"), self.bytes("remote"), self.bytes("origin"));
        let expected = (disk, remote, origin);
        ensure!(found == expected, "bytes from disk, S3 and origin are {found:?}, not {expected:?}");
        Ok(self)
    }

    fn sent_are(&self, bytes: u64) -> Result<&Self> {
        ensure!(self.sent() == bytes, "{} bytes were sent to S3, not {bytes}", self.sent());
        Ok(self)
    }
}

/// The model on the Hub, and the content that each get must produce.
struct Model {
    commit: String,
    bytes: u64,
    sha256: String,
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
    fn lies_in(&self, folder: &Path) -> Result<()> {
        let found = Content::on_disk(folder.join(WEIGHTS))?.sha256()?;
        ensure!(found == self.sha256, "{WEIGHTS} has SHA-256 {found}, not {}", self.sha256);
        for (path, text) in &self.small {
            ensure!(fs::read_to_string(folder.join(path))? == *text, "{path} differs from what the Hub has");
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
