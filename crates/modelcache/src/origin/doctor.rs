//! Checks of the origins: whether the Hub answers, which account its token belongs to, and where bare names come from.

use super::authorization;
use super::http::{self, Http, Server};
use super::hub::HUB_TOKEN;
use crate::config::{Config, Environment};
use crate::doctor::{Area, Check, Clock, in_time};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use reqwest::StatusCode;
use reqwest::header::{AUTHORIZATION, HeaderMap};
use url::Url;

/// Environment variables that turn on offline mode.
const OFFLINE: [&str; 2] = ["MODEL_CACHE_OFFLINE", "HF_HUB_OFFLINE"];

/// Checks the configured origins and the Hub.
pub(crate) async fn examine(config: &Config, environment: &Environment, clock: &Clock) -> Vec<Check> {
    let mut checks = vec![templates(config)];
    if config.offline {
        // Name the variable that turned offline mode on; otherwise the configuration file did.
        let set = |name: &&&str| environment.get(name).is_some_and(is_true);
        let name = OFFLINE.iter().find(set).copied().unwrap_or("offline in the configuration file");
        let summary = format!("{name} is set: no origin is asked; only artifacts on disk or on the remote are found");
        checks.push(Check::warning(Area::Origin, summary, format!("unset {name} to fetch from origins")));
        return checks;
    }
    checks.push(match in_time(hub(config, clock)).await {
        Ok(check) => check,
        // With a remote the cache can work without the Hub, so this is only a warning.
        Err(error) if error.kind() == ErrorKind::Unavailable && config.remote.is_some() => {
            Check::warning_of(Area::Origin, &error).with_detail("artifacts on the remote are found all the same")
        }
        Err(error) => Check::problem(Area::Origin, &error),
    });
    checks
}

fn is_true(text: &str) -> bool {
    matches!(text.trim().to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

fn templates(config: &Config) -> Check {
    let names: Vec<String> = config.origins.iter().map(ToString::to_string).collect();
    match names.is_empty() {
        true => Check::ok(Area::Origin, "bare names come from disk and remote only (MODEL_CACHE_ORIGIN is not set)"),
        false => Check::ok(Area::Origin, format!("bare names come from {}", names.join(", then "))),
    }
}

/// Requests the account of the token from the Hub. The endpoint answers with and without a token.
async fn hub(config: &Config, clock: &Clock) -> Result<Check> {
    let no_address = || {
        Error::invalid("the Hub's endpoint is no web address")
            .hint("set HF_ENDPOINT to scheme and host, for instance https://huggingface.co")
    };
    let text = format!("{}/api/whoami-v2", config.hub.endpoint);
    let url = Url::parse(&text).ok().filter(|url| url.has_host()).ok_or_else(no_address)?;
    let mut headers = HeaderMap::new();
    if let Some(token) = &config.hub.token {
        let value = authorization::bearer(token.expose(), HUB_TOKEN)?;
        headers.insert(AUTHORIZATION, value);
    }
    let http = Http::new(config.retry.read_timeout);
    let response = http.get(&url, headers).await?;
    let server = Server(&url).to_string();
    // The date of the response also serves the check of the clock.
    clock.learn(&server, http::header(response.headers(), "date"));
    let (status, has_token) = (response.status(), config.hub.token.is_some());
    // The body only serves to name the account, so a failure to read it is ignored.
    let body = http.body(response, &url, limits::ANSWER_BYTES_MAX).await.unwrap_or_default();
    Ok(match status {
        StatusCode::OK if has_token => {
            #[derive(serde::Deserialize)]
            struct Account {
                name: String,
            }
            let name = serde_json::from_slice::<Account>(&body).ok().map(|account| account.name);
            let account = name.map_or_else(|| "an unnamed account".into(), |name| format!("{name:?}"));
            Check::ok(Area::Origin, format!("{server} answers; the token is that of {account}"))
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if has_token => Check::problem(
            Area::Origin,
            &Error::new(
                ErrorKind::Unauthorized,
                format!("{server} does not know the token: it is wrong or has expired"),
            )
            .hint("set HF_TOKEN to a token that is valid (huggingface.co/settings/tokens), or unset it"),
        ),
        StatusCode::TOO_MANY_REQUESTS => Check::warning(
            Area::Origin,
            format!("{server} answers, and limits how often it is asked"),
            if has_token {
                "ask less often, or use a plan with higher limits"
            } else {
                "set HF_TOKEN: requests with a token have higher limits"
            },
        ),
        // The Hub is down. The caller decides whether that is a problem or a warning.
        status if status.is_server_error() => {
            return Err(Error::unavailable(format!("{server} answered {}", status.as_u16()))
                .hint("try again later; see status.huggingface.co, or check HF_ENDPOINT"));
        }
        _ if has_token => Check::warning(
            Area::Origin,
            format!("{server} answers, but does not name the account of the token ({})", status.as_u16()),
            "ignore this for a mirror; otherwise check that HF_ENDPOINT is the address of a Hub",
        ),
        _ => {
            Check::ok(Area::Origin, format!("{server} answers; no token is set, so only public repositories are seen"))
        }
    })
}
