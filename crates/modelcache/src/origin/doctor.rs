//! Examining origins: whether the Hub answers, whose token it is, what bare names come from.

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

/// Variables that keep origins from being asked.
const OFFLINE: [&str; 2] = ["MODEL_CACHE_OFFLINE", "HF_HUB_OFFLINE"];

/// Looks at the configured origins and the Hub.
pub(crate) async fn examine(config: &Config, environment: &Environment, clock: &Clock) -> Vec<Check> {
    let mut checks = vec![templates(config)];
    if config.offline {
        let set = |name: &&&str| environment.get(name).is_some_and(is_true);
        let name = OFFLINE.iter().find(set).copied().unwrap_or("offline in the configuration file");
        let says = format!("{name} is set: no origin is asked, and only what is on disk or on the remote is found");
        checks.push(Check::warning(Area::Origin, says, format!("unset {name} to fetch from origins")));
        return checks;
    }
    checks.push(match in_time(hub(config, clock)).await {
        Ok(check) => check,
        // Whoever has a remote may live without.
        Err(error) if error.kind() == ErrorKind::Unavailable && config.remote.is_some() => {
            Check::warning_of(Area::Origin, &error).with_detail("what the remote holds is found all the same")
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

/// Asks the Hub who we are: it answers that with and without a token.
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
    clock.learn(&server, http::header(response.headers(), "date"));
    let (status, signed) = (response.status(), config.hub.token.is_some());
    let body = http.body(response, &url, limits::ANSWER_BYTES_MAX).await.unwrap_or_default();
    Ok(match status {
        StatusCode::OK if signed => {
            #[derive(serde::Deserialize)]
            struct Account {
                name: String,
            }
            let name = serde_json::from_slice::<Account>(&body).ok().map(|account| account.name);
            let who = name.map_or_else(|| "somebody".into(), |name| format!("{name:?}"));
            Check::ok(Area::Origin, format!("{server} answers; the token is that of {who}"))
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if signed => Check::problem(
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
            if signed {
                "ask less often, or use a plan with higher limits"
            } else {
                "set HF_TOKEN: requests with a token have higher limits"
            },
        ),
        status if status.is_server_error() => {
            return Err(Error::unavailable(format!("{server} answered {}", status.as_u16()))
                .hint("try again later; see status.huggingface.co, or check HF_ENDPOINT"));
        }
        _ if signed => Check::warning(
            Area::Origin,
            format!("{server} answers, but cannot say whose the token is ({})", status.as_u16()),
            "nothing, if it is a mirror; else check HF_ENDPOINT: does a Hub answer there?",
        ),
        _ => {
            Check::ok(Area::Origin, format!("{server} answers; no token is set, so only public repositories are seen"))
        }
    })
}
