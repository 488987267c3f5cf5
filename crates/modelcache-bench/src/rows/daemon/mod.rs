//! Rows for the HTTP daemon, `modelcache serve`.

pub(crate) mod first_byte;
pub(crate) mod herd;
pub(crate) mod small;
pub(crate) mod snapshot;
pub(crate) mod warm;

use crate::service::{Service, free_address};
use crate::setup::Setup;
use crate::usage::{Figures, Usage, measure};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Reference of the artifact that the rows put into the cache, and its path at the daemon.
const REFERENCE: &str = "bench/model@1";
const ARTIFACT_PATH: &str = "/cache/artifacts/bench%2Fmodel@1/files";
/// The name of nginx in the tables, and among the peers.
const NGINX: &str = "nginx";

/// Starts the daemon on the cache directory `dir`, with `hub` as its Hub.
pub(super) fn start_daemon(setup: &Setup, dir: &Path, hub: Option<&str>) -> Result<Service> {
    let address = free_address()?;
    let mut command = setup.modelcache(dir);
    command.args(["serve", "--listen", &address.to_string()]);
    command.envs(hub.map(|url| ("HF_ENDPOINT", url)));
    Service::start(&mut command, address)
}

/// Returns the URL of `file` at the daemon's own routes, not at those of the Hub. `file` is the path that [`put`]
/// returned.
pub(super) fn artifact_url(daemon: &Service, file: &Path) -> String {
    format!("{}{ARTIFACT_PATH}/{}", daemon.url(), file.file_name().unwrap_or_default().to_string_lossy())
}

/// Starts nginx with one process, which serves `root` with sendfile. `folder` is for its configuration and temporary
/// files.
fn start_nginx(setup: &Setup, root: &Path, folder: &Path) -> Result<Service> {
    let address = free_address()?;
    let config = folder.join("nginx.conf");
    let (root, temporary) = (root.display(), folder.display());
    let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let paths: String = paths.map(|name| format!("  {name}_temp_path \"{temporary}/{name}\";\n")).concat();
    // By default, nginx closes a connection after 1000 requests.
    let text = format!(
        "daemon off;\nmaster_process off;\npid \"{temporary}/nginx.pid\";\nerror_log stderr;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n  access_log off;\n  sendfile on;\n  tcp_nopush on;\n  keepalive_requests 1000000000;\n{paths}  \
         server {{ listen {address}; root \"{root}\"; }}\n}}\n"
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let mut command = setup.peers.debian_program(NGINX)?;
    command.arg("-e").arg("stderr").arg("-p").arg(folder).arg("-c").arg(&config);
    Service::start(&mut command, address)
}

/// Puts a file into the cache directory `dir`, and returns its path there.
pub(super) fn put(setup: &Setup, dir: &Path, file: &Path) -> Result<PathBuf> {
    measure(setup.modelcache(dir).args(["put", REFERENCE, "--quiet"]).arg(file))?;
    Ok(setup.get(&mut setup.modelcache(dir), REFERENCE)?.1)
}

/// Fetches `url` with `clients` connections at once. Returns the usage of the client process and its figures. Fails
/// unless every connection gets `bytes` bytes.
pub(super) fn fetch(url: &str, clients: usize, bytes: u64) -> Result<(Usage, Figures)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench-fetch", "--clients", &clients.to_string(), url]);
    let (usage, figures) = Figures::run(&mut command)?;
    let (received, expected) = (figures.get("bytes")?, clients as f64 * bytes as f64);
    ensure!(received == expected, "the client received {received} bytes, not {expected}");
    Ok((usage, figures))
}
