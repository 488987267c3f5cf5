//! A Hub stand-in and a daemon in this process, and the real clients as child processes.

use modelcache::config::ByteBound;
use modelcache::{Cache, Config};
use modelcache_server::{Daemon, Listeners, Options, ServeOptions, complete_config, serve};
use modelcache_testkit::hub::CommitBuilder;
use modelcache_testkit::{Content, Hub};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;

pub const MIB: u64 = 1 << 20;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/client.py");

/// The daemon between a Hub and its clients.
pub struct House {
    pub hub: Hub,
    pub url: String,
    runtime: Option<Runtime>,
    _dir: TempDir,
}

impl House {
    /// Starts an empty Hub and a daemon with an empty cache.
    pub fn new() -> Self {
        Self::with(|_, _| {})
    }

    /// Like [`House::new`], with a change to the configuration and options of the daemon.
    pub fn with(change: impl FnOnce(&mut Config, &mut Options)) -> Self {
        let (hub, dir) = (Hub::start_on(0).unwrap(), TempDir::new().unwrap());
        let mut config = Config::new(dir.path().join("cache"));
        config.hub.endpoint = hub.url();
        // The tests need little space, also on a filesystem that is nearly full.
        config.min_free_bytes = ByteBound::Bytes(0);
        // A Hub that is down is reported within the test.
        config.retry.deadline = Duration::from_secs(5);
        complete_config(&mut config);
        let mut options = Options::default();
        change(&mut config, &mut options);
        let runtime = Runtime::new().unwrap();
        let url = runtime.block_on(async {
            let daemon = Daemon::start(Cache::open(config).unwrap(), options);
            let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
            let address = listeners.local_addrs().unwrap()[0];
            tokio::spawn(serve(listeners, daemon.router(), ServeOptions::default(), std::future::pending()));
            format!("http://{address}")
        });
        Self { hub, url, runtime: Some(runtime), _dir: dir }
    }

    /// Returns a machine with nothing but this client on it, whose `HF_ENDPOINT` is the daemon.
    pub fn machine(&self, client: &Client) -> Machine {
        Machine::new(client, &self.url)
    }
}

impl Drop for House {
    fn drop(&mut self) {
        // Connections of clients may still be open.
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// The files of a repository, by path.
pub type Files = Vec<(&'static str, Content)>;

/// Adds files to a commit.
pub fn with_files(commit: CommitBuilder, files: &Files) -> CommitBuilder {
    files.iter().fold(commit, |commit, (path, content)| commit.file(path, content.clone()))
}

/// Returns the SHA-256 of each file, as `client.py` describes a folder.
pub fn sums(files: &Files) -> Value {
    files.iter().map(|(path, content)| ((*path).to_owned(), json!(content.sha256().unwrap()))).collect()
}

/// Returns what `client.py` prints for bytes.
pub fn digest(bytes: &[u8]) -> Value {
    json!({ "size": bytes.len(), "sha256": modelcache_testkit::content::sha256(bytes) })
}

/// One version of `huggingface_hub`, with or without `hf_xet`.
#[derive(Clone, Debug)]
pub struct Client {
    /// For instance `2.4`.
    pub version: &'static str,
    has_xet: bool,
    /// The folder with all environments.
    environments: PathBuf,
}

impl Client {
    /// Returns true for versions that keep an incomplete file for the next call, and do not resume within a call.
    pub fn is_old(&self) -> bool {
        self.version.starts_with("0.")
    }

    fn environment(&self) -> PathBuf {
        self.environments.join(format!("hub-{}", self.version))
    }
}

/// Returns the folder with the environments of the clients, or prints `SKIPPED` if there is none.
#[allow(clippy::print_stderr)]
pub fn environments() -> Option<PathBuf> {
    let folder = std::env::var_os("MODELCACHE_TEST_CLIENTS").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    if folder.is_none() {
        eprintln!(
            "SKIPPED: MODELCACHE_TEST_CLIENTS names no folder with Python clients (`cargo xtask test` makes one)"
        );
    }
    folder
}

/// Returns all versions of the client, each without and with `hf_xet`; none if there are no environments.
pub fn clients() -> Vec<Client> {
    let Some(environments) = environments() else { return Vec::new() };
    let of = |version| [false, true].map(|has_xet| Client { version, has_xet, environments: environments.clone() });
    ["0.36", "1.31", "2.4"].into_iter().flat_map(of).collect()
}

/// A machine with one client on it.
pub struct Machine {
    client: Client,
    python: PathBuf,
    environment: BTreeMap<&'static str, String>,
    home: TempDir,
}

impl Machine {
    /// Returns a machine with nothing but this client on it, whose `HF_ENDPOINT` is `url`.
    pub fn new(client: &Client, url: &str) -> Self {
        let python = client.environment().join("bin/python");
        Self::with_python(client, python, url)
    }

    /// Returns a machine with the environment of transformers.
    pub fn with_transformers(environments: &Path, url: &str) -> Self {
        let client = Client { version: "2.4", has_xet: true, environments: environments.to_owned() };
        Self::with_python(&client, environments.join("transformers/bin/python"), url)
    }

    fn with_python(client: &Client, python: PathBuf, url: &str) -> Self {
        let home = TempDir::new().unwrap();
        let mut environment = BTreeMap::from([
            ("HF_ENDPOINT", url.to_owned()),
            ("HF_HOME", home.path().join("hf").to_str().unwrap().to_owned()),
            ("HOME", home.path().to_str().unwrap().to_owned()),
            ("PATH", std::env::var("PATH").unwrap()),
            ("HF_HUB_DISABLE_PROGRESS_BARS", "1".to_owned()),
            ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
        ]);
        if client.has_xet {
            // `hf_xet` is not in the environments of the clients, but in one of its own.
            let versions = std::fs::read_dir(client.environments.join("hf-xet/lib")).unwrap();
            let packages = versions.map(|version| version.unwrap().path().join("site-packages"));
            let packages = packages.map(|packages| packages.to_str().unwrap().to_owned()).next();
            environment.insert("PYTHONPATH", packages.unwrap());
        }
        Self { client: client.clone(), python, environment, home }
    }

    /// Sets a variable of the client's environment.
    pub fn set(&mut self, name: &'static str, value: &str) -> &mut Self {
        self.environment.insert(name, value.to_owned());
        self
    }

    /// Returns a folder of this machine.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Runs steps of `client.py` and returns their outcomes.
    #[track_caller]
    pub fn run(&self, steps: Value) -> Vec<Value> {
        self.start(steps).finish()
    }

    /// Runs one step of `client.py` and returns its value.
    #[track_caller]
    pub fn value(&self, name: &str, arguments: Value) -> Value {
        let outcome = self.run(json!([[name, arguments]])).remove(0);
        assert!(outcome.get("value").is_some(), "{:?}: {name}: {outcome:#}", self.client);
        outcome["value"].clone()
    }

    /// Starts `client.py`.
    pub fn start(&self, steps: Value) -> Running {
        let mut command = self.command(&self.python);
        command.arg(SCRIPT).arg(steps.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.python.display()));
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Running { child, stdin, stdout }
    }

    /// Runs the command line client `hf`.
    pub fn hf<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Output {
        self.command(&self.client.environment().join("bin/hf")).args(arguments).output().unwrap()
    }

    /// Runs `hf`, which must succeed. Returns its output.
    #[track_caller]
    pub fn hf_ok<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        let output = self.hf(arguments);
        assert!(output.status.success(), "{:?}: {output:#?}", self.client);
        String::from_utf8(output.stdout).unwrap()
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().envs(&self.environment).current_dir(self.home.path());
        command
    }
}

/// A running `client.py`.
pub struct Running {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    /// Waits until the script pauses.
    #[track_caller]
    pub fn wait_for_pause(&mut self) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "pause\n");
    }

    /// Lets the script go on after a pause.
    pub fn resume(&mut self) {
        self.stdin.write_all(b"\n").unwrap();
    }

    /// Waits for the end, and returns the outcome of each step.
    #[track_caller]
    pub fn finish(mut self) -> Vec<Value> {
        let last = self.stdout.lines().map(Result::unwrap).last().unwrap_or_default();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "client.py ended with {status}; the last line is {last:?}");
        serde_json::from_str(&last).unwrap()
    }
}

/// Returns the class of an outcome's exception; `None` if the step succeeded.
pub fn error_class(outcome: &Value) -> Option<&str> {
    outcome.get("errors").map(|classes| classes[0].as_str().unwrap())
}

/// Returns true if the exception of an outcome is of this class or derived from it.
pub fn is_error(outcome: &Value, class: &str) -> bool {
    outcome.get("errors").and_then(Value::as_array).is_some_and(|classes| classes.iter().any(|name| name == class))
}
