//! Handle of the server process of a row: starts it, reads its counts and ends it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Rate limit of each connection to a shaped server, in bytes per second, unless a row varies it.
pub(super) const SHAPED_BYTES_PER_S: u64 = 90_000_000;
/// Time to the first byte of a shaped server, in milliseconds, unless a row varies it.
pub(super) const SHAPED_FIRST_BYTE_MS: u64 = 30;

/// How a server is reached, and whether its traffic is shaped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ServerKind {
    Plain,
    Shaped(Shape),
    Tls,
}

/// Traffic shaping of a server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Rate limit of each connection.
    pub(super) bytes_per_s: u64,
    /// Time to the first byte of each response.
    pub(super) first_byte_ms: u64,
}

impl ServerKind {
    /// A server with the usual traffic shaping.
    pub(super) const SHAPED: Self =
        Self::Shaped(Shape { bytes_per_s: SHAPED_BYTES_PER_S, first_byte_ms: SHAPED_FIRST_BYTE_MS });
}

/// A server in a separate process. It exits when this is dropped.
pub(super) struct ServerProcess {
    child: Child,
    /// Its standard input, for commands, and its standard output, for the replies.
    pipes: Mutex<(Option<ChildStdin>, BufReader<ChildStdout>)>,
    addr: String,
    /// File with the certificate of its certificate authority, if it uses TLS.
    ca_file: Option<PathBuf>,
}

/// Counts of a server since the last reset.
#[derive(Debug)]
pub(super) struct ServerCounts {
    pub(super) bytes_sent: u64,
    /// Bytes received in uploads.
    pub(super) bytes_received: u64,
    /// Highest number of connections that carried a transfer at one time.
    pub(super) busy_connections_max: u64,
    /// Processor time of the server. A reset does not change it.
    pub(super) core_seconds: f64,
}

impl ServerProcess {
    pub(super) fn start(folder: &Path, kind: ServerKind) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench-server").arg("--folder").arg(folder);
        let ca_file = (kind == ServerKind::Tls).then(|| folder.join("ca.pem"));
        if let Some(ca_file) = &ca_file {
            command.arg("--tls-ca-file").arg(ca_file);
        }
        if let ServerKind::Shaped(shape) = kind {
            command.args(["--first-byte-ms", &shape.first_byte_ms.to_string()]);
            command.args(["--bytes-per-s", &shape.bytes_per_s.to_string()]);
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the bench server")?;
        let output = child.stdout.take().context("the server has no output")?;
        let pipes = Mutex::new((child.stdin.take(), BufReader::new(output)));
        let mut server = Self { child, pipes, addr: String::new(), ca_file };
        // The first line is the server's address. It is empty if the server exited.
        server.addr = server.read_line()?;
        ensure!(!server.addr.is_empty(), "the server did not start");
        Ok(server)
    }

    /// The server's URL, without a trailing slash.
    pub(super) fn url(&self) -> String {
        let scheme = if self.ca_file.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.addr)
    }

    /// Environment variables that point S3 clients, ours and the peers', at this server.
    pub(super) fn env(&self) -> Vec<(String, String)> {
        let mut env = vec![
            ("AWS_ACCESS_KEY_ID", "BENCH".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "bench".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_DEFAULT_REGION", "us-east-1".to_owned()),
            ("AWS_ENDPOINT_URL", self.url()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
        ];
        if let Some(ca_file) = &self.ca_file {
            let ca_file = ca_file.display().to_string();
            env.push(("AWS_CA_BUNDLE", ca_file.clone()));
            env.push(("SSL_CERT_FILE", ca_file));
        }
        env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    pub(super) fn counts(&self) -> Result<ServerCounts> {
        let stats: Value = serde_json::from_str(&self.command("stats")?)?;
        let number = |name: &str| stats[name].as_u64().with_context(|| format!("the server reports no {name}"));
        Ok(ServerCounts {
            bytes_sent: number("bytes_sent")?,
            bytes_received: number("bytes_received")?,
            busy_connections_max: number("busy_connections_max")?,
            core_seconds: stats["core_seconds"].as_f64().unwrap_or_default(),
        })
    }

    pub(super) fn reset_counts(&self) -> Result<()> {
        self.command("reset").map(drop)
    }

    /// Sends a command and returns the reply.
    fn command(&self, command: &str) -> Result<String> {
        {
            let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
            let input = pipes.0.as_mut().context("the bench server has ended")?;
            writeln!(input, "{command}")?;
            input.flush()?;
        }
        self.read_line()
    }

    fn read_line(&self) -> Result<String> {
        let mut line = String::new();
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner).1.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // The server exits when its standard input is closed.
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner).0 = None;
        let _ = self.child.wait();
    }
}
