//! Starts the real moto server, an independent implementation of S3.
//!
//! Runs `moto_server` from an existing Python environment and kills it when dropped. It keeps objects in memory and
//! accepts any key pair.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::s3::create_bucket_unsigned;
use crate::wire::request;

const START_DEADLINE: Duration = Duration::from_secs(30);
const ATTEMPTS: u32 = 3;

/// A running moto server.
#[derive(Debug)]
pub struct Moto {
    child: Child,
    addr: SocketAddr,
}

impl Moto {
    /// Starts `<venv>/bin/moto_server` on a free port and blocks until it answers, at most 30 s. Fails if the program
    /// is missing, ends early in every attempt, or does not answer in time.
    pub fn start(venv: impl AsRef<Path>) -> anyhow::Result<Self> {
        let program = venv.as_ref().join("bin/moto_server");
        // Another process may take the port before the server does. Then the server ends, and the next attempt uses
        // another port.
        let started = (0..ATTEMPTS).find_map(|_| Self::try_start(&program).transpose());
        started.unwrap_or_else(|| Err(anyhow::anyhow!("moto_server found no free port in {ATTEMPTS} attempts")))
    }

    /// Returns `None` if the port was taken by another process.
    fn try_start(program: &Path) -> anyhow::Result<Option<Self>> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, crate::free_port()?));
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &addr.port().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut moto = Self { child, addr };
        let deadline = Instant::now() + START_DEADLINE;
        while status_of(addr, "GET", "/moto-api/").ok() != Some(200) {
            if moto.child.try_wait()?.is_some() {
                return Ok(None);
            }
            anyhow::ensure!(Instant::now() < deadline, "moto_server did not answer within {START_DEADLINE:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(Some(moto))
    }

    /// The value for `AWS_ENDPOINT_URL`, without a trailing slash.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Creates a bucket. Fails if the server refuses.
    pub fn bucket(&self, name: &str) -> anyhow::Result<()> {
        create_bucket_unsigned(self.addr, name)
    }

    /// Environment variables that point an S3 client at this server.
    pub fn env(&self) -> Vec<(String, String)> {
        let pairs = [
            ("AWS_ACCESS_KEY_ID", "moto".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "moto".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
        ];
        pairs.map(|(name, value)| (name.to_owned(), value)).into()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a request without body or signature and returns the status of its answer.
pub(crate) fn status_of(addr: SocketAddr, method: &str, path: &str) -> anyhow::Result<u16> {
    Ok(request(addr, method, path, &[], b"")?.status)
}
