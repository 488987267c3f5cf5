//! The server of a row, as this process sees it: started, asked what it counted, ended.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// The bound of each connection to the shaped server, in bytes a second.
pub(super) const SHAPED_BYTES_PER_S: u64 = 90_000_000;
/// Its time to the first byte, in milliseconds.
pub(super) const SHAPED_FIRST_BYTE_MS: u64 = 30;

/// What a server is to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Shaped,
    Tls,
}

/// A server in a process of its own, which ends when this is dropped.
pub(super) struct Served {
    child: Child,
    lines: Mutex<(Option<ChildStdin>, BufReader<ChildStdout>)>,
    addr: String,
    authority: Option<PathBuf>,
}

/// What a server counted since it was last told to forget.
#[derive(Debug)]
pub(super) struct Counted {
    /// Requests that were answered with at least 64 KiB.
    pub(super) transfers: u64,
    pub(super) bytes_sent: u64,
    pub(super) bytes_taken: u64,
    /// Most connections that carried a transfer at a time.
    pub(super) busy_max: u64,
    /// Since it was started.
    pub(super) core_seconds: f64,
}

impl Served {
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
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start a server")?;
        let output = child.stdout.take().context("the server has no output")?;
        let lines = Mutex::new((child.stdin.take(), BufReader::new(output)));
        let mut served = Self { child, lines, addr: String::new(), authority };
        served.addr = served.line()?;
        ensure!(!served.addr.is_empty(), "the server did not start");
        Ok(served)
    }

    /// The address, with its scheme and without a slash at the end.
    pub(super) fn url(&self) -> String {
        let scheme = if self.authority.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.addr)
    }

    /// What points S3 clients, ours and the others, here.
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

    pub(super) fn counted(&self) -> Result<Counted> {
        let told: Value = serde_json::from_str(&self.asked("stats")?)?;
        let number = |name: &str| told[name].as_u64().with_context(|| format!("the server tells no {name}"));
        Ok(Counted {
            transfers: number("transfers")?,
            bytes_sent: number("bytes_sent")?,
            bytes_taken: number("bytes_taken")?,
            busy_max: number("busy_max")?,
            core_seconds: told["core_seconds"].as_f64().unwrap_or_default(),
        })
    }

    pub(super) fn forget_counts(&self) -> Result<()> {
        self.asked("reset").map(drop)
    }

    fn asked(&self, word: &str) -> Result<String> {
        {
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            let input = lines.0.as_mut().context("the server was ended")?;
            writeln!(input, "{word}")?;
            input.flush()?;
        }
        self.line()
    }

    fn line(&self) -> Result<String> {
        let mut line = String::new();
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).1.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).0 = None;
        let _ = self.child.wait();
    }
}
