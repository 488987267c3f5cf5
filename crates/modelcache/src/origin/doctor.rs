//! Checks of the origins for the doctor: the origin templates, and the check of each origin.

use super::Origins;
use crate::check::{Area, Check, Clock, with_timeout};
use crate::config::{Config, Environment};
use crate::error::ErrorKind;
use crate::settings::parse_switch;
use crate::transfer::Retry;

/// Environment variables that turn on offline mode.
const OFFLINE: [&str; 2] = ["MODEL_CACHE_OFFLINE", "HF_HUB_OFFLINE"];

/// Checks the origin templates and every origin.
pub(crate) async fn examine(config: &Config, environment: &Environment, clock: &Clock) -> Vec<Check> {
    let mut checks = vec![templates(config)];
    if config.offline {
        // Name the variable that turned offline mode on; otherwise the configuration file did.
        let is_set = |name: &&&str| environment.get(name).is_some_and(|text| parse_switch(text).is_ok_and(|on| on));
        let name = OFFLINE.iter().find(is_set).copied().unwrap_or("offline in the configuration file");
        let summary =
            format!("{name} is set: no origin is contacted; only artifacts on disk or on the remote are found");
        checks.push(Check::warning(Area::Origin, summary, format!("unset {name} to fetch from origins")));
        return checks;
    }
    let origins = match Origins::new(config, Retry::new(config.retry)) {
        Ok(origins) => origins,
        Err(error) => return [checks, vec![Check::problem(Area::Origin, &error)]].concat(),
    };
    let found = futures::future::join_all(origins.0.iter().map(|origin| with_timeout(origin.check(clock)))).await;
    checks.extend(found.into_iter().filter_map(|found| match found {
        Ok(check) => check,
        // With a remote the cache can work without the origin, so this is only a warning.
        Err(error) if error.kind() == ErrorKind::Unavailable && config.remote.is_some() => {
            Some(Check::warning_of(Area::Origin, &error).with_detail("artifacts on the remote can still be downloaded"))
        }
        Err(error) => Some(Check::problem(Area::Origin, &error)),
    }));
    checks
}

/// Returns the origin templates, which say where bare names come from.
fn templates(config: &Config) -> Check {
    let templates: Vec<String> = config.origins.iter().map(ToString::to_string).collect();
    match templates.is_empty() {
        true => Check::ok(Area::Origin, "bare names come from disk and remote only (MODEL_CACHE_ORIGIN is not set)"),
        false => Check::ok(Area::Origin, format!("bare names come from {}", templates.join(", then "))),
    }
}
