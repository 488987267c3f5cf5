//! The doctor: checks everything that a cache needs, and suggests a fix for each problem.
//!
//! # Contract
//! - Needs no open cache, because it is used when a cache cannot be opened. Front ends report an invalid configuration
//!   themselves.
//! - Removes everything that it creates: one temporary folder below the cache directory and, unless `read_only` is set,
//!   one small object below the remote's prefix under a unique name.
//! - Every network request has a timeout. The requests run concurrently.
//! - Reports the source of credentials and the first characters of a key's id, but no secrets.
//!
//! The checks of a tier are in the tier's own folder (`disk/doctor.rs`, `remote/doctor.rs`, `origin/doctor.rs`).

mod network;

pub use crate::check::{Area, Check, Clock, DoctorOptions, Severity};

use crate::config::{Config, Environment, RemoteMode};
use crate::runtime::blocking;

/// Runs all checks. Returns the results, sorted by area.
pub async fn examine(config: &Config, environment: &Environment, options: DoctorOptions) -> Vec<Check> {
    let options = DoctorOptions { read_only: options.read_only || config.remote_mode == RemoteMode::ReadOnly };
    let (disk_config, disk_environment) = (config.clone(), environment.clone());
    let disk = async move {
        let checks = blocking(move || Ok(crate::disk::examine(&disk_config, &disk_environment))).await;
        checks.unwrap_or_default()
    };
    let clock = Clock::default();
    let (disk, remote, origin) = futures::join!(
        disk,
        crate::remote::examine(config, options, &clock),
        crate::origin::examine(config, environment, &clock)
    );
    let mut checks = [disk, remote, origin, network::examine(environment)].concat();
    checks.extend(clock.check());
    checks.sort_by_key(|check| check.area);
    checks
}
