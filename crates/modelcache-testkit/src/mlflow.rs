//! Starts the real `mlflow server` from an existing Python environment.
//!
//! Starting takes seconds, so each test binary should start only one. The database and the artifacts are in one folder.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::wire::request;

/// Importing mlflow takes ten seconds on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// A running server.
#[derive(Debug)]
pub struct Mlflow {
    child: Child,
    addr: SocketAddr,
    folder: PathBuf,
    venv: PathBuf,
}

impl Mlflow {
    /// Starts `<venv>/bin/mlflow server` with `args` over `folder`, and blocks until it answers. Its output goes to
    /// `server.log` in the folder. Fails if the program is missing, exits early or does not answer in time.
    pub fn start(venv: &Path, folder: &Path, args: &[&str]) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, crate::free_port()?));
        let log = File::create(folder.join("server.log"))?;
        let program = venv.join("bin/mlflow");
        let child = Command::new(&program)
            .args(["server", "--host", "127.0.0.1", "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"])
            .args(["--port", &addr.port().to_string()])
            .args(args)
            .current_dir(folder)
            .env("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
            .env("MLFLOW_DISABLE_TELEMETRY", "true")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut server = Self { child, addr, folder: folder.to_owned(), venv: venv.to_owned() };
        let deadline = Instant::now() + START_DEADLINE;
        while request(addr, "GET", "/health", &[], b"").and_then(|answer| answer.want(200)).is_err() {
            let log = || std::fs::read_to_string(folder.join("server.log")).unwrap_or_default();
            anyhow::ensure!(server.child.try_wait()?.is_none(), "mlflow ended before it answered: {}", log());
            anyhow::ensure!(Instant::now() < deadline, "mlflow did not answer within {START_DEADLINE:?}: {}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }

    /// Address of the server.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The value for `MLFLOW_TRACKING_URI`, without a trailing slash.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The folder with the database and the artifacts.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Runs Python code with MLflow's own client, pointed at this server, and returns its output. Fails if the code
    /// fails.
    pub fn python(&self, code: &str, args: &[&str], env: &[(String, String)]) -> anyhow::Result<String> {
        let output = Command::new(self.venv.join("bin/python"))
            .args(["-c", code])
            .args(args)
            .envs(env.iter().map(|(name, value)| (name, value)))
            .env("MLFLOW_TRACKING_URI", self.url())
            .env("MLFLOW_DISABLE_TELEMETRY", "true")
            .current_dir(&self.folder)
            .output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Mlflow {
    /// The server has a worker process, which exits on SIGTERM but survives if its parent is killed. So the server gets
    /// SIGTERM and five seconds before SIGKILL.
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
