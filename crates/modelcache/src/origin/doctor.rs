//! Checks of the origins for the doctor: the origin templates, and the check of each origin.

use super::Origins;
use crate::check::{Area, Check, Clock, with_timeout};
use crate::config::{Config, Environment};
use crate::error::ErrorKind;
use crate::option_name::setting::ORIGIN;
use crate::settings;
use crate::transfer::Retry;

/// Checks the origin templates and every origin.
pub(crate) async fn examine(config: &Config, environment: &Environment, clock: &Clock) -> Vec<Check> {
    let mut checks = vec![templates(config)];
    if config.offline {
        checks.push(offline(environment));
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

/// Returns the warning about offline mode. It names every variable that turns offline mode on. The configuration file
/// may turn it on, too, whether or not a variable is set.
fn offline(environment: &Environment) -> Check {
    let names = settings::offline_variables(environment).join(" and ");
    let (cause, fix) = match names.is_empty() {
        true => ("offline in the configuration file".to_owned(), "unset offline in the configuration file".to_owned()),
        false => (names.clone(), format!("unset {names}, and offline in the configuration file if it is set there,")),
    };
    let summary =
        format!("offline mode ({cause}): no origin is contacted; only artifacts on disk or on the remote are found");
    Check::warning(Area::Origin, summary, format!("{fix} to fetch from origins"))
}

/// Returns the origin templates, which say where bare names come from.
fn templates(config: &Config) -> Check {
    let templates: Vec<String> = config.origins.iter().map(ToString::to_string).collect();
    match templates.is_empty() {
        true => Check::ok(Area::Origin, format!("bare names come from disk and remote only ({ORIGIN} is not set)")),
        false => Check::ok(Area::Origin, format!("bare names come from {}", templates.join(", then "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fix_for_offline_mode_names_every_setting_that_turns_it_on() {
        let fix = |variables: &[&str]| {
            let variables = variables.iter().map(|name| (name.to_string(), "1".to_owned())).collect();
            offline(&Environment(variables)).fix.expect("a fix")
        };
        assert_eq!(fix(&[]), "unset offline in the configuration file to fetch from origins");
        let file = "and offline in the configuration file if it is set there, to fetch from origins";
        assert_eq!(fix(&["HF_HUB_OFFLINE"]), format!("unset HF_HUB_OFFLINE, {file}"));
        let both = fix(&["HF_HUB_OFFLINE", "MODEL_CACHE_OFFLINE"]);
        assert_eq!(both, format!("unset MODEL_CACHE_OFFLINE and HF_HUB_OFFLINE, {file}"));
    }
}
