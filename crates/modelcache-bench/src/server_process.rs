//! Handle of the server process of a row: starts it, reads its counts and ends it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Rate limit of each connection to the shaped server, in bytes per second.
pub(super) const SHAPED_BYTES_PER_S: u64 = 90_000_000;
/// Time to the first byte of the shaped server, in milliseconds.
pub(super) const SHAPED_FIRST_BYTE_MS: u64 = 30;

/// Kind of server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Shaped,
    Tls,
}

/// A server in a separate process. It exits when this is dropped.
pub(super) struct ServerProcess {
    child: Child,
    /// Its standard input, for commands, and its standard output, for the replies.
    pipes: Mutex<(Option<ChildStdin>, BufReader<ChildStdout>)>,
    addr: String,
    /// The certificate of its authority, if it speaks TLS.
    authority: Option<PathBuf>,
}

/// Counts of a server since the last reset.
#[derive(Debug)]
pub(super) struct ServerCounts {
    /// Number of responses of at least 64 KiB.
    pub(super) transfers: u64,
    pub(super) bytes_sent: u64,
    /// Bytes of uploads.
    pub(super) bytes_taken: u64,
    /// Highest number of connections that carried a transfer at one time.
    pub(super) busy_max: u64,
    /// Processor time of the server. A reset does not change it.
    pub(super) core_seconds: f64,
}

impl ServerProcess {
    pub(super) fn start(folder: &Path, kind: Kind) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench-server").arg("--folder").arg(folder);
        let authority = (kind == Kind::Tls).then(|| folder.join("authority.pem"));
        if let Some(authority) = &authority {
            command.arg("--tls-authority").arg(authority);
        }
        if kind == Kind::Shaped {
            command.args(["--first-byte-ms", &SHAPED_FIRST_BYTE_MS.to_string()]);
            command.args(["--bytes-per-s", &SHAPED_BYTES_PER_S.to_string()]);
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the bench server")?;
        let output = child.stdout.take().context("the server has no output")?;
        let pipes = Mutex::new((child.stdin.take(), BufReader::new(output)));
        let mut server = Self { child, pipes, addr: String::new(), authority };
        // The first line is the server's address. It is empty if the server exited.
        server.addr = server.line()?;
        ensure!(!server.addr.is_empty(), "the server did not start");
        Ok(server)
    }

    /// The server's URL, without a trailing slash.
    pub(super) fn url(&self) -> String {
        let scheme = if self.authority.is_some() { "https" } else { "http" };
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
        if let Some(authority) = &self.authority {
            let authority = authority.display().to_string();
            env.push(("AWS_CA_BUNDLE", authority.clone()));
            env.push(("SSL_CERT_FILE", authority));
        }
        env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    pub(super) fn counts(&self) -> Result<ServerCounts> {
        let stats: Value = serde_json::from_str(&self.command("stats")?)?;
        let number = |name: &str| stats[name].as_u64().with_context(|| format!("the server reports no {name}"));
        Ok(ServerCounts {
            transfers: number("transfers")?,
            bytes_sent: number("bytes_sent")?,
            bytes_taken: number("bytes_taken")?,
            busy_max: number("busy_max")?,
            core_seconds: stats["core_seconds"].as_f64().unwrap_or_default(),
        })
    }

    pub(super) fn reset_counts(&self) -> Result<()> {
        self.command("reset").map(drop)
    }

    /// Sends a command and returns the reply.
    fn command(&self, word: &str) -> Result<String> {
        {
            let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
            let input = pipes.0.as_mut().context("the bench server has ended")?;
            writeln!(input, "{word}")?;
            input.flush()?;
        }
        self.line()
    }

    fn line(&self) -> Result<String> {
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
