//! How a registry is asked: addresses, challenges, tokens, and what a refusal means.
//!
//! Credentials go to the registry, and to the token server that the registry names where that is one with TLS or on the
//! registry's own host: a registry that is known by its certificate could have asked for the password itself. The token
//! goes to the registry only; what it redirects to, a CDN mostly, gets neither.

use crate::config::{OciConfig, OciLogin};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::origin::authorization;
use crate::origin::http::{self, Answer, Http, Refusal, Request, Server};
use crate::printable;
use crate::reference::{OciAt, OciRepo};
use crate::transfer::Retry;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use url::Url;

/// Largest manifest, in bytes: what registries accept at most.
const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Largest answer of a token server, in bytes.
const TOKEN_BYTES_MAX: u64 = 256 * 1024;
/// The manifests that are understood.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.artifact.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";
/// Where docker's own registry really answers.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// All registries, and what was learnt of each.
pub(in crate::origin) struct Registries {
    config: OciConfig,
    pub(super) http: Http,
    pub(super) retry: Retry,
    /// What a repository wants in `Authorization`, once it said so.
    shown: tokio::sync::Mutex<HashMap<(String, String), HeaderValue>>,
}

/// Tokens stay unprinted.
impl fmt::Debug for Registries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registries").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Registries {
    /// Registries that were not yet spoken to.
    pub(in crate::origin) fn new(config: OciConfig, retry: Retry) -> Self {
        Self { config, http: Http::new(retry.read_timeout()), retry, shown: Default::default() }
    }

    /// Scheme, host and port of a registry. Without TLS only where it was said so, or on this machine.
    pub(super) fn home(&self, repo: &OciRepo) -> Result<Url> {
        let registry = repo.registry.as_str();
        let host = if registry == "docker.io" { DOCKER_HUB_HOST } else { registry };
        let no_host = || Error::invalid(format!("{registry} is no registry"));
        let plain = Url::parse(&format!("http://{host}/")).map_err(|_| no_host())?;
        let plain_allowed = self.config.plain_http.iter().any(|name| name == registry) || is_this_machine(&plain);
        if plain_allowed {
            return Ok(plain);
        }
        Url::parse(&format!("https://{host}/")).map_err(|_| no_host())
    }

    /// The bytes of a manifest, which are those that the digest names.
    pub(super) async fn manifest(&self, repo: &OciRepo, at: &OciAt) -> Result<Vec<u8>> {
        let home = self.home(repo)?;
        let name = match at {
            OciAt::Tag(tag) => tag.clone(),
            OciAt::Digest(digest) => format!("sha256:{digest}"),
        };
        let url = below(&home, &format!("v2/{}/manifests/{name}", repo.repository))?;
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MANIFESTS))]);
        let answer = self.ask(repo, url, headers, true).await?;
        if !answer.response.status().is_success() {
            return Err(self.refused(answer, repo, &format!("manifest {at}")).await);
        }
        let stated = http::header(answer.response.headers(), "docker-content-digest").map(str::to_owned);
        let bytes = self.http.body(answer.response, &answer.url, MANIFEST_BYTES_MAX).await?;
        let found = Digest::of(&bytes);
        let contradicts = |asked: &str| {
            Error::corrupt(format!(
                "{} answered with another manifest: asked for {asked}, got sha256:{found}",
                Server(&home)
            ))
        };
        match at {
            OciAt::Digest(digest) if *digest != found => Err(contradicts(&format!("sha256:{digest}"))),
            // A registry may say so in another algorithm, which then says nothing here.
            _ => match stated.filter(|stated| stated.starts_with("sha256:")) {
                Some(stated) if !stated.eq_ignore_ascii_case(&format!("sha256:{found}")) => Err(contradicts(&stated)),
                _ => Ok(bytes),
            },
        }
    }

    /// One answer, after what the registry wants to be shown was shown to it; `stay` refuses to be sent elsewhere.
    pub(super) async fn ask(&self, repo: &OciRepo, url: Url, headers: HeaderMap, stay: bool) -> Result<Answer> {
        let home = self.home(repo)?;
        let whose = (repo.registry.clone(), repo.repository.clone());
        let shown = self.shown.lock().await.get(&whose).cloned();
        let ask = |authorization| Request { headers: headers.clone(), home: &home, authorization, stay };
        let answer = self.http.follow(url.clone(), ask(shown.as_ref())).await?;
        if answer.response.status() != StatusCode::UNAUTHORIZED || !answer.at_home {
            return Ok(answer);
        }
        let Some(challenge) = Challenge::read(answer.response.headers()) else { return Ok(answer) };
        // Held while a token is fetched: whoever else was refused waits for it, and does not fetch one more.
        let mut wants = self.shown.lock().await;
        let present = wants.get(&whose).cloned();
        let authorization = match present.filter(|present| Some(present) != shown.as_ref()) {
            Some(newer) => newer,
            None => match self.authorization(repo, &home, &challenge).await? {
                Some(authorization) => authorization,
                None => return Ok(answer),
            },
        };
        wants.insert(whose, authorization.clone());
        drop(wants);
        http::drain(answer.response).await;
        self.http.follow(url, ask(Some(&authorization))).await
    }

    /// What answers a challenge; `None` where there is nothing to show.
    async fn authorization(&self, repo: &OciRepo, home: &Url, challenge: &Challenge) -> Result<Option<HeaderValue>> {
        let login = match self.config.logins.get(&repo.registry) {
            Some(OciLogin::Password(user, password)) => {
                Some(authorization::basic(user, password.expose(), "the password for the registry")?)
            }
            _ => None,
        };
        match challenge {
            Challenge::Basic => Ok(login),
            Challenge::Bearer { realm, service } => {
                let token = self.token(repo, home, realm, service.as_deref(), login.as_ref()).await?;
                Ok(Some(authorization::bearer(&token, "the registry's token")?))
            }
        }
    }

    /// A token for reading the repository, from the server that the registry named.
    async fn token(
        &self,
        repo: &OciRepo,
        home: &Url,
        realm: &str,
        service: Option<&str>,
        login: Option<&HeaderValue>,
    ) -> Result<String> {
        let realm = checked_realm(home, realm)?;
        let mut url = realm.clone();
        url.query_pairs_mut()
            .extend_pairs(service.map(|service| ("service", service)))
            .append_pair("scope", &format!("repository:{}:pull", repo.repository));
        let headers: HeaderMap = login.map(|login| (AUTHORIZATION, login.clone())).into_iter().collect();
        let response = self.http.get(&url, headers).await?;
        if !response.status().is_success() {
            return Err(self.refused_token(response, &realm, repo, login.is_some()).await);
        }
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let body = self.http.body(response, &realm, TOKEN_BYTES_MAX).await?;
        // The cause is not kept: it may repeat what it stumbled over.
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        let token = token.and_then(|token| token.token.or(token.access_token)).filter(|token| !token.is_empty());
        token.ok_or_else(|| Error::corrupt(format!("{} answered without a token", Server(&realm))))
    }

    async fn refused_token(&self, response: reqwest::Response, realm: &Url, repo: &OciRepo, signed: bool) -> Error {
        let refusal = explained(&self.http, response, true).await;
        match refusal.status.as_u16() {
            401 | 403 if signed => refusal.error(realm).hint(format!("`docker login {}` again", repo.registry)),
            401 | 403 => refusal.error(realm).hint(self.login_hint(&repo.registry)),
            status if (300..400).contains(&status) => {
                Error::unavailable(format!("{} redirects a request for a token; not followed", Server(realm)))
                    .transient(false)
            }
            _ => refusal.error(realm),
        }
    }

    /// What a refusal means: the one place where a registry's statuses become kinds.
    pub(super) async fn refused(&self, answer: Answer, repo: &OciRepo, what: &str) -> Error {
        let Answer { response, url, at_home, .. } = answer;
        let refusal = explained(&self.http, response, at_home).await;
        if !at_home {
            return refused_elsewhere(&refusal, &url);
        }
        let signed = matches!(self.config.logins.get(&repo.registry), Some(OciLogin::Password(..)));
        let place = format!("{}/{}", repo.registry, repo.repository);
        match refusal.status.as_u16() {
            404 => match refusal.code.as_deref() {
                Some("NAME_UNKNOWN") => Error::not_found(format!("there is no repository {place}"))
                    .hint("check the names of registry and repository"),
                Some(_) => Error::not_found(format!("there is no {what} in {place}"))
                    .hint("check the tag or digest; without either it is the tag latest"),
                None => refusal.error(&url).hint(format!("check the name: is there a registry at {}?", repo.registry)),
            },
            401 | 403 if signed => refusal.error(&url).hint(format!(
                "check that {place} exists and that the account may read it; `docker login {}` logs in again",
                repo.registry
            )),
            401 | 403 => refusal.error(&url).hint(self.login_hint(&repo.registry)),
            429 if !signed => refusal.error(&url).hint(self.login_hint(&repo.registry)),
            429 => refusal.error(&url).hint("ask less often, or use a plan with higher limits"),
            _ => refusal.error(&url),
        }
    }

    fn login_hint(&self, registry: &str) -> String {
        match (self.config.logins.get(registry), &self.config.helper) {
            (Some(OciLogin::Helper(helper)), _) => format!(
                "its credentials are kept by docker-credential-{helper}, which is not run; put user and password for \
                 {registry} under auths in a config.json of DOCKER_CONFIG"
            ),
            (Some(OciLogin::IdentityToken), _) => format!(
                "docker's configuration has an identity token for {registry}, which is not understood; log in with \
                 user and password"
            ),
            (None, Some(helper)) => format!(
                "there are no credentials for {registry}; those that docker-credential-{helper} may keep are not read: \
                 put user and password under auths in a config.json of DOCKER_CONFIG"
            ),
            _ => match &self.config.trouble {
                Some(trouble) => format!("{trouble}; mend it, or set DOCKER_CONFIG to the folder of another"),
                None => format!("check the name; for a private repository `docker login {registry}`"),
            },
        }
    }
}

/// `path`, which needs no encoding, below the registry.
pub(super) fn below(home: &Url, path: &str) -> Result<Url> {
    home.join(path).map_err(|cause| Error::invalid(format!("{path:?} cannot be asked for")).cause(cause))
}

/// Whether a host is this machine by its very name, so that nobody else can answer.
fn is_this_machine(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// The token server's address. It gets the password, so it has TLS, or is where the registry is, which has none either.
fn checked_realm(home: &Url, realm: &str) -> Result<Url> {
    let refuse = |why: String| {
        Error::new(ErrorKind::Unauthorized, format!("{} wants a token {why}; not asked for", Server(home)))
            .hint("the registry is misconfigured, or something on the way alters its answers")
    };
    let Ok(url) = Url::parse(realm) else { return Err(refuse("from a place that is no address".into())) };
    let plainly = url.scheme() == "http" && home.scheme() == "http" && url.host() == home.host();
    match (url.scheme(), url.has_host()) {
        (_, true) if plainly => Ok(url),
        ("https", true) => Ok(url),
        ("http", true) => Err(refuse(format!("from {}, without TLS", Server(&url)))),
        (scheme, _) => Err(refuse(format!("from an address that begins with {scheme:?}"))),
    }
}

/// What a refusal means where a registry redirected to: never a matter of our rights.
fn refused_elsewhere(refusal: &Refusal, url: &Url) -> Error {
    let what = format!("{} refused an address that the registry has just given ({})", Server(url), refusal.status);
    match refusal.status.as_u16() {
        401 | 403 => Error::unavailable(what).hint("is the clock of this machine right?"),
        404 | 410 => Error::unavailable(what).transient(false),
        _ => refusal.error(url),
    }
}

/// What a registry wants to be shown.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    /// The challenge that can be met, a token before a password.
    fn read(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).into_iter().filter_map(|value| value.to_str().ok());
        let mut found: Vec<Self> = values.filter_map(Self::parse).collect();
        let bearer = found.iter().position(|challenge| matches!(challenge, Self::Bearer { .. }));
        match bearer {
            Some(at) => Some(found.swap_remove(at)),
            None => found.pop(),
        }
    }

    /// `Bearer realm="…",service="…"`, `Basic realm="…"` (RFC 9110, 11.6.1; one challenge a header).
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        let mut parameters = scheme.eq_ignore_ascii_case("bearer").then(|| parameters(rest))?;
        Some(Self::Bearer { realm: parameters.remove("realm")?, service: parameters.remove("service") })
    }
}

/// `name="value"` or `name=value`, split by commas; a comma between quotes belongs to the value.
fn parameters(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let (value, next) = match after.trim_start().strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(name.trim().trim_start_matches(',').trim().to_ascii_lowercase(), value.trim().to_owned());
        rest = next;
    }
    found
}

/// Whatever a registry wants to be shown; see `fuzzing`.
#[cfg(fuzzing)]
pub(super) fn fuzz(text: &str) {
    let _ = Challenge::parse(text);
}

/// A refusal with the registry's own code and words.
async fn explained(http: &Http, response: reqwest::Response, at_home: bool) -> Refusal {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Words>,
    }
    #[derive(Deserialize)]
    struct Words {
        code: Option<String>,
        message: Option<String>,
    }
    let mut refusal = Refusal::read(http, response, at_home).await;
    let errors: Option<Errors> = serde_json::from_slice(&refusal.body).ok();
    if let Some(words) = errors.and_then(|errors| errors.errors.into_iter().next()) {
        refusal.code = words.code.as_deref().map(printable::quote);
        let message = words.message.filter(|message| !message.is_empty());
        refusal.message = message.as_deref().map(printable::quote).or(refusal.message);
    }
    refusal
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RetryConfig, Secret};
    use crate::reference::{Reference, Target};

    fn repo(text: &str) -> OciRepo {
        match Reference::parse(text).expect(text).target {
            Target::Oci(repo) => repo,
            other => panic!("{other:?}"),
        }
    }

    fn registries(change: impl FnOnce(&mut OciConfig)) -> Registries {
        let mut config = OciConfig::default();
        change(&mut config);
        Registries::new(config, Retry::new(RetryConfig::default()))
    }

    #[test]
    fn only_this_machine_and_what_is_configured_is_spoken_to_without_tls() {
        let registries = registries(|config| config.plain_http = vec!["lab:5000".into()]);
        let home = |text: &str| registries.home(&repo(text)).expect(text).to_string();
        assert_eq!(home("oci://registry.example/m"), "https://registry.example/");
        assert_eq!(home("oci://registry.example:5000/m"), "https://registry.example:5000/");
        assert_eq!(home("oci://lab:5000/m"), "http://lab:5000/");
        assert_eq!(home("oci://lab/m"), "https://lab/", "another port is another registry");
        assert_eq!(home("oci://localhost:5000/m"), "http://localhost:5000/");
        assert_eq!(home("oci://127.9.9.9/m"), "http://127.9.9.9/");
        assert_eq!(home("oci://[::1]:5000/m"), "http://[::1]:5000/");
        assert_eq!(home("oci://localhost.example/m"), "https://localhost.example/");
        assert_eq!(home("oci://docker.io/m"), "https://registry-1.docker.io/");
    }

    #[test]
    fn a_password_goes_to_a_token_server_with_tls_or_on_the_registrys_own_host() {
        let to = |home: &str, realm: &str| checked_realm(&Url::parse(home).expect(home), realm).is_ok();
        assert!(to("https://r.example", "https://auth.example/token?x=y"));
        assert!(to("https://r.example", "https://r.example/token"));
        assert!(to("http://127.0.0.1:5000", "http://127.0.0.1:5001/token"));
        assert!(to("http://127.0.0.1:5000", "https://auth.example/token"));
        for (home, realm) in [
            ("https://r.example", "http://r.example/token"),
            ("https://r.example", "http://auth.example/token"),
            ("http://127.0.0.1:5000", "http://127.0.0.2:5000/token"),
            ("http://lab:5000", "http://lab.evil:5000/token"),
            ("http://lab:5000", "http://lab:5000@evil/token"),
            ("https://r.example", "file:///etc/passwd"),
            ("https://r.example", "/token"),
            ("https://r.example", "data:,x"),
        ] {
            assert!(!to(home, realm), "{home} {realm}");
        }
    }

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let bearer = |realm: &str, service: Option<&str>| Challenge::Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
        };
        let read = |values: &[&str]| {
            let rows = values.iter().map(|value| (WWW_AUTHENTICATE, HeaderValue::from_str(value).expect("value")));
            let mut headers = HeaderMap::new();
            rows.for_each(|(name, value)| {
                headers.append(name, value);
            });
            Challenge::read(&headers)
        };
        assert_eq!(
            read(&["Bearer realm=\"https://a/t,x\",service=\"s\",scope=\"repository:a/b:pull,push\""]),
            Some(bearer("https://a/t,x", Some("s")))
        );
        assert_eq!(read(&["bearer scope=x , realm=\"https://a\""]), Some(bearer("https://a", None)));
        assert_eq!(read(&["Basic realm=\"r\"", "Bearer realm=\"https://a\""]), Some(bearer("https://a", None)));
        assert_eq!(read(&["Basic realm=\"Registry Realm\""]), Some(Challenge::Basic));
        assert_eq!(read(&["basic"]), Some(Challenge::Basic));
        for none in ["Bearer", "Bearer service=\"x\"", "Negotiate", ""] {
            assert_eq!(read(&[none]), None, "{none}");
        }
        assert_eq!(read(&[]), None);
    }

    #[test]
    fn a_helper_is_named_where_it_would_have_known() {
        let hint = |change: fn(&mut OciConfig)| registries(change).login_hint("r:1");
        assert!(hint(|_| ()).contains("docker login r:1"));
        let helper = |config: &mut OciConfig| {
            config.logins.insert("r:1".into(), OciLogin::Helper("ecr-login".into()));
        };
        assert!(hint(helper).contains("docker-credential-ecr-login"));
        assert!(hint(|config| config.helper = Some("desktop".into())).contains("docker-credential-desktop"));
        let token = |config: &mut OciConfig| {
            config.logins.insert("r:1".into(), OciLogin::IdentityToken);
        };
        assert!(hint(token).contains("identity token"));
    }

    #[test]
    fn passwords_and_tokens_stay_unprinted() {
        let registries = registries(|config| {
            config.logins.insert("r".into(), OciLogin::Password("me".into(), Secret::new("canary")));
        });
        registries.shown.blocking_lock().insert(("r".into(), "m".into()), HeaderValue::from_static("Bearer canary"));
        assert!(!format!("{registries:?}").contains("canary"));
    }
}
