//! Handle of a server whose usage is measured: our daemon, nginx, olah.

use super::usage::{Running, Usage};
use anyhow::{Context, Result, bail};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

/// Time in which a server must accept connections.
const START_MAX: Duration = Duration::from_secs(30);
/// Clock ticks per second in /proc/PID/stat, see proc(5).
const TICKS_PER_S: f64 = 100.0;

/// A running server. It is killed when this is dropped.
pub(super) struct Service {
    /// `None` once it was waited for.
    running: Option<Running>,
    pid: u32,
    address: SocketAddr,
}

/// Returns an address on loopback with a free port.
pub(super) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

impl Service {
    /// Runs `command`, and waits until it accepts connections at `address`.
    pub(super) fn start(command: &mut Command, address: SocketAddr) -> Result<Self> {
        let running = Running::start(command)?;
        let mut service = Self { pid: running.pid(), running: Some(running), address };
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            if started.elapsed() > START_MAX || !service.running.as_ref().is_some_and(Running::is_running) {
                let output = service.end()?.context("the server has ended")?;
                let last = output[1].lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
                bail!("the server did not start: {last}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(service)
    }

    /// The address at which it accepts connections.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL, without a trailing slash.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Runs `work`. Returns its result, the time that it took, the core-seconds of the server during this time, and the
    /// peak memory of the server since its start.
    pub(super) fn usage_during<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Usage)> {
        let (started, before) = (Instant::now(), self.core_seconds()?);
        let result = work()?;
        let seconds = started.elapsed().as_secs_f64();
        let core_seconds = self.core_seconds()? - before;
        Ok((result, Usage { seconds, core_seconds, rss_bytes: self.rss_peak_bytes()? }))
    }

    /// Returns the user and system time of all its threads.
    fn core_seconds(&self) -> Result<f64> {
        let text = self.read("stat")?;
        // The second field, the name in parentheses, may contain spaces. User and system time are fields 14 and 15.
        let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
        let ticks = fields.map(|field| Ok(field.parse::<u64>()?)).sum::<Result<u64>>()?;
        Ok(ticks as f64 / TICKS_PER_S)
    }

    fn rss_peak_bytes(&self) -> Result<u64> {
        let text = self.read("status")?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("the kernel reports no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }

    fn read(&self, name: &str) -> Result<String> {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid)).context("the server has ended")
    }

    /// Kills the server and returns its output. Returns `None` if this was called before.
    fn end(&mut self) -> Result<Option<[String; 2]>> {
        let Some(running) = self.running.take() else { return Ok(None) };
        running.kill();
        Ok(Some(running.wait()?.2))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_ends_is_an_error_with_its_last_words() {
        let address = free_address().expect("a port");
        let error = Service::start(Command::new("sh").args(["-c", "echo why >&2"]), address).err().expect("it fails");
        assert!(error.to_string().ends_with("why"), "{error}");
    }
}
