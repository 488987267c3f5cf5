//! Client for OCI registries: URLs, authentication challenges, tokens, and errors for responses.
//!
//! The password is sent to the registry. It is sent to the token server that the registry names only if that server
//! uses TLS, or is on the host of a registry without TLS. The token is sent to the registry only. Redirect targets,
//! mostly a CDN, get neither.

use crate::config::{Config, OciConfig, OciLogin};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::origin::authorization;
use crate::origin::http::{self, FinalResponse, Http, HttpErrorResponse, Request, Server};
use crate::printable;
use crate::reference::{OciAt, OciRepo};
use crate::transfer::Retry;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use url::Url;

/// Largest manifest, in bytes: the maximum that registries accept.
const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Largest response of a token server, in bytes.
const TOKEN_BYTES_MAX: u64 = 256 * 1024;
/// The supported media types of manifests.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.artifact.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";
/// The API host of the registry `docker.io`.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// A client for all registries, with the credentials that each has accepted.
pub(crate) struct Registries {
    config: OciConfig,
    pub(super) http: Http,
    pub(super) retry: Retry,
    /// The `Authorization` value per registry and repository, after the first challenge.
    authorizations: tokio::sync::Mutex<HashMap<(String, String), HeaderValue>>,
}

/// Prints no tokens.
impl fmt::Debug for Registries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registries").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Registries {
    /// Creates a client. Sends no request.
    pub(crate) fn new(config: &Config, retry: Retry) -> Self {
        Self { config: config.oci.clone(), http: Http::new(config, &retry), retry, authorizations: Default::default() }
    }

    /// Returns the base URL of a registry: https, or plain http if configured or if the host is this machine.
    pub(super) fn base_url(&self, repo: &OciRepo) -> Result<Url> {
        let registry = repo.registry.as_str();
        let host = if registry == "docker.io" { DOCKER_HUB_HOST } else { registry };
        let no_host = || Error::invalid(format!("{registry} is not a valid registry name"));
        let plain = Url::parse(&format!("http://{host}/")).map_err(|_| no_host())?;
        // Use TLS unless plain http is configured, because credentials are sent to this URL.
        let plain_allowed = self.config.plain_http.iter().any(|name| name == registry) || is_this_machine(&plain);
        if plain_allowed {
            return Ok(plain);
        }
        Url::parse(&format!("https://{host}/")).map_err(|_| no_host())
    }

    /// Returns the bytes of a manifest, verified against the requested digest and against the header
    /// `Docker-Content-Digest`, if present.
    pub(super) async fn manifest(&self, repo: &OciRepo, at: &OciAt) -> Result<Vec<u8>> {
        let base_url = self.base_url(repo)?;
        let name = match at {
            OciAt::Tag(tag) => tag.clone(),
            OciAt::Digest(digest) => format!("sha256:{digest}"),
        };
        let url = url_for(&base_url, &format!("v2/{}/manifests/{name}", repo.repository))?;
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES))]);
        let fetched = self.request(repo, url, headers, true).await?;
        if !fetched.response.status().is_success() {
            return Err(self.error_of(fetched, repo, &format!("manifest {at}")).await);
        }
        // Read the header before the body consumes the response.
        let stated = http::header(fetched.response.headers(), "docker-content-digest").map(str::to_owned);
        let bytes = self.http.body(fetched.response, &fetched.url, MANIFEST_BYTES_MAX).await?;
        let found = Digest::of(&bytes);
        let mismatch = |requested: &str| {
            Error::corrupt(format!(
                "{} sent another manifest than requested: expected {requested}, got sha256:{found}",
                Server(&base_url)
            ))
        };
        match at {
            OciAt::Digest(digest) if *digest != found => Err(mismatch(&format!("sha256:{digest}"))),
            // A registry may state the digest in another algorithm, which cannot be checked here.
            _ => match stated.filter(|stated| stated.starts_with("sha256:")) {
                Some(stated) if !stated.eq_ignore_ascii_case(&format!("sha256:{found}")) => Err(mismatch(&stated)),
                _ => Ok(bytes),
            },
        }
    }

    /// Sends a request and, if the registry demands authentication, sends it again with a credential. With
    /// `same_origin_only`, fails if the registry redirects to another scheme, host or port.
    pub(super) async fn request(
        &self,
        repo: &OciRepo,
        url: Url,
        headers: HeaderMap,
        same_origin_only: bool,
    ) -> Result<FinalResponse> {
        let base_url = self.base_url(repo)?;
        let repo_id = (repo.registry.clone(), repo.repository.clone());
        let sent = self.authorizations.lock().await.get(&repo_id).cloned();
        let request = |authorization| Request {
            headers: headers.clone(),
            credential_url: &base_url,
            authorization,
            same_origin_only,
        };
        let fetched = self.http.follow(url.clone(), request(sent.as_ref())).await?;
        // Only a challenge of the registry itself is answered.
        if fetched.response.status() != StatusCode::UNAUTHORIZED || !fetched.is_same_origin {
            return Ok(fetched);
        }
        let Some(challenge) = Challenge::read(fetched.response.headers()) else { return Ok(fetched) };
        // Hold the lock while the token is fetched, so that concurrent requests wait for it instead of fetching
        // another.
        let mut cached = self.authorizations.lock().await;
        let newer = cached.get(&repo_id).cloned();
        let authorization = match newer.filter(|newer| Some(newer) != sent.as_ref()) {
            // Another request has fetched a token since this one was sent.
            Some(newer) => newer,
            None => match self.authorization(repo, &base_url, &challenge).await? {
                Some(authorization) => authorization,
                None => return Ok(fetched),
            },
        };
        cached.insert(repo_id, authorization.clone());
        drop(cached);
        // Repeat the request with the credential, on the same connection if possible.
        http::drain(fetched.response).await;
        self.http.follow(url, request(Some(&authorization))).await
    }

    /// Returns the `Authorization` value that answers a challenge; `None` without a login for Basic authentication.
    async fn authorization(
        &self,
        repo: &OciRepo,
        base_url: &Url,
        challenge: &Challenge,
    ) -> Result<Option<HeaderValue>> {
        let login = match self.config.logins.get(&repo.registry) {
            Some(OciLogin::Password(user, password)) => {
                Some(authorization::basic(user, password.expose(), "the password for the registry")?)
            }
            _ => None,
        };
        match challenge {
            Challenge::Basic => Ok(login),
            Challenge::Bearer { realm, service } => {
                let token = self.token(repo, base_url, realm, service.as_deref(), login.as_ref()).await?;
                Ok(Some(authorization::bearer(&token, "the registry's token")?))
            }
        }
    }

    /// Fetches a token for pulling from the repository, from the token server that the registry named.
    async fn token(
        &self,
        repo: &OciRepo,
        base_url: &Url,
        realm: &str,
        service: Option<&str>,
        login: Option<&HeaderValue>,
    ) -> Result<String> {
        // The realm comes from the server, so check it before the password is sent there.
        let realm = checked_realm(base_url, realm)?;
        let mut url = realm.clone();
        url.query_pairs_mut()
            .extend_pairs(service.map(|service| ("service", service)))
            .append_pair("scope", &format!("repository:{}:pull", repo.repository));
        let headers: HeaderMap = login.map(|login| (AUTHORIZATION, login.clone())).into_iter().collect();
        let response = self.http.get(&url, headers).await?;
        if !response.status().is_success() {
            return Err(self.token_error(response, &realm, repo, login.is_some()).await);
        }
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let body = self.http.body(response, &realm, TOKEN_BYTES_MAX).await?;
        // The parse error is dropped, because its message may quote the token.
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        // Registries use either field.
        let token = token.and_then(|token| token.token.or(token.access_token)).filter(|token| !token.is_empty());
        token.ok_or_else(|| Error::corrupt(format!("the response of {} has no token", Server(&realm))))
    }

    /// Converts an error response of the token server into an error with a remedy.
    async fn token_error(&self, response: reqwest::Response, realm: &Url, repo: &OciRepo, has_login: bool) -> Error {
        let response = read_error_response(&self.http, response, true).await;
        match response.status.as_u16() {
            401 | 403 if has_login => {
                response.error(realm).hint(format!("log in again with `docker login {}`", repo.registry))
            }
            401 | 403 => response.error(realm).hint(self.login_hint(&repo.registry)),
            status if (300..400).contains(&status) => {
                Error::unavailable(format!("{} redirects a request for a token; not followed", Server(realm)))
                    .transient(false)
            }
            _ => response.error(realm),
        }
    }

    /// Converts an error response into an error with a remedy. All statuses of registries are mapped here. `what` is
    /// the object that was requested.
    pub(super) async fn error_of(&self, fetched: FinalResponse, repo: &OciRepo, what: &str) -> Error {
        let FinalResponse { response, url, is_same_origin, .. } = fetched;
        let response = read_error_response(&self.http, response, is_same_origin).await;
        if !is_same_origin {
            return redirect_target_error(&response, &url);
        }
        let has_login = matches!(self.config.logins.get(&repo.registry), Some(OciLogin::Password(..)));
        let place = format!("{}/{}", repo.registry, repo.repository);
        match response.status.as_u16() {
            // With an error code the registry names the missing part; without one it is probably not a registry.
            404 => match response.code.as_deref() {
                Some("NAME_UNKNOWN") => Error::not_found(format!("there is no repository {place}"))
                    .hint("check the names of registry and repository"),
                Some(_) => Error::not_found(format!("there is no {what} in {place}"))
                    .hint("check the tag or digest; without either it is the tag latest"),
                None => response.error(&url).hint(format!("check that {} is the address of a registry", repo.registry)),
            },
            401 | 403 if has_login => response.error(&url).hint(format!(
                "check that {place} exists and that the account may read it; `docker login {}` logs in again",
                repo.registry
            )),
            401 | 403 => response.error(&url).hint(self.login_hint(&repo.registry)),
            429 if !has_login => response.error(&url).hint(self.login_hint(&repo.registry)),
            429 => response.error(&url).hint("send fewer requests, or use a plan with higher limits"),
            _ => response.error(&url),
        }
    }

    /// Returns the hint for missing or refused credentials of `registry`.
    fn login_hint(&self, registry: &str) -> String {
        match (self.config.logins.get(registry), &self.config.helper) {
            (Some(OciLogin::Helper(helper)), _) => format!(
                "its credentials are kept by docker-credential-{helper}, which is not run; put user and password for \
                 {registry} under auths in a config.json of DOCKER_CONFIG"
            ),
            (Some(OciLogin::IdentityToken), _) => format!(
                "docker's configuration has an identity token for {registry}, which is not supported; log in with \
                 user and password"
            ),
            (None, Some(helper)) => format!(
                "there are no credentials for {registry}; those that docker-credential-{helper} may keep are not read: \
                 put user and password under auths in a config.json of DOCKER_CONFIG"
            ),
            _ => match &self.config.trouble {
                Some(trouble) => format!("{trouble}; correct it, or set DOCKER_CONFIG to another folder"),
                None => format!("check the name; for a private repository `docker login {registry}`"),
            },
        }
    }
}

/// Returns the URL of `path`, which needs no encoding, below the registry.
pub(super) fn url_for(base_url: &Url, path: &str) -> Result<Url> {
    base_url.join(path).map_err(|cause| Error::invalid(format!("{path:?} is not a valid URL path")).cause(cause))
}

/// Returns true if the host is this machine by name or loopback address, so that no other machine can respond.
fn is_this_machine(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Parses the URL of the token server. The password is sent to it, so it must use TLS, or be on the host of a registry
/// without TLS.
fn checked_realm(base_url: &Url, realm: &str) -> Result<Url> {
    let refuse = |why: String| {
        let message = format!("{} asks for a token {why}; no token was requested", Server(base_url));
        Error::new(ErrorKind::Unauthorized, message)
            .hint("the registry is misconfigured, or a proxy alters its responses")
    };
    let Ok(url) = Url::parse(realm) else { return Err(refuse("from an invalid URL".into())) };
    // The password is already sent to this host in the clear, so another port of the host may get it, too.
    let is_plain_on_same_host = url.scheme() == "http" && base_url.scheme() == "http" && url.host() == base_url.host();
    match (url.scheme(), url.has_host()) {
        (_, true) if is_plain_on_same_host => Ok(url),
        ("https", true) => Ok(url),
        ("http", true) => Err(refuse(format!("from {}, without TLS", Server(&url)))),
        (scheme, _) => Err(refuse(format!("from an address that begins with {scheme:?}"))),
    }
}

/// Converts an error response of a redirect target. Such a URL needs no credentials, so 401 and 403 mean that it
/// expired, never that the user lacks access.
fn redirect_target_error(response: &HttpErrorResponse, url: &Url) -> Error {
    let what = format!("{} refused a URL that the registry has just issued ({})", Server(url), response.status);
    match response.status.as_u16() {
        401 | 403 => Error::unavailable(what).hint("check the clock of this machine"),
        404 | 410 => Error::unavailable(what).transient(false).hint(http::REFUSED_HINT),
        _ => response.error(url),
    }
}

/// An authentication challenge of a registry.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    /// Returns the challenge that the client responds to: Bearer if it is offered, else Basic.
    fn read(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).into_iter().filter_map(|value| value.to_str().ok());
        let mut found: Vec<Self> = values.filter_map(Self::parse).collect();
        // A token has fewer rights than the password, so prefer it.
        let bearer = found.iter().position(|challenge| matches!(challenge, Self::Bearer { .. }));
        match bearer {
            Some(index) => Some(found.swap_remove(index)),
            None => found.pop(),
        }
    }

    /// Parses `Bearer realm="…",service="…"` or `Basic realm="…"` (RFC 9110, 11.6.1; one challenge per header).
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        let mut parameters = scheme.eq_ignore_ascii_case("bearer").then(|| parameters(rest))?;
        Some(Self::Bearer { realm: parameters.remove("realm")?, service: parameters.remove("service") })
    }
}

/// Parses `name="value"` and `name=value`, separated by commas. A comma between quotes belongs to the value.
fn parameters(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        // A quoted value ends at the next quote, any other at the next comma.
        let (value, next) = match after.trim_start().strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(name.trim().trim_start_matches(',').trim().to_ascii_lowercase(), value.trim().to_owned());
        rest = next;
    }
    found
}

/// Fuzz target for challenges; see `fuzzing`.
#[cfg(fuzzing)]
pub(super) fn fuzz(text: &str) {
    let _ = Challenge::parse(text);
}

/// Reads an error response, including the error code and message in the registry's format.
async fn read_error_response(http: &Http, response: reqwest::Response, is_same_origin: bool) -> HttpErrorResponse {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<ErrorItem>,
    }
    #[derive(Deserialize)]
    struct ErrorItem {
        code: Option<String>,
        message: Option<String>,
    }
    let mut response = HttpErrorResponse::read(http, response, is_same_origin).await;
    let errors: Option<Errors> = serde_json::from_slice(&response.body).ok();
    if let Some(item) = errors.and_then(|errors| errors.errors.into_iter().next()) {
        response.code = item.code.as_deref().map(printable::quote);
        let message = item.message.filter(|message| !message.is_empty());
        response.message = message.as_deref().map(printable::quote).or(response.message);
    }
    response
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
        let mut config = Config::new("");
        change(&mut config.oci);
        Registries::new(&config, Retry::new(RetryConfig::default()))
    }

    #[test]
    fn plain_http_is_used_only_for_this_machine_and_configured_registries() {
        let registries = registries(|config| config.plain_http = vec!["lab:5000".into()]);
        let base_url = |text: &str| registries.base_url(&repo(text)).expect(text).to_string();
        assert_eq!(base_url("oci://registry.example/m"), "https://registry.example/");
        assert_eq!(base_url("oci://registry.example:5000/m"), "https://registry.example:5000/");
        assert_eq!(base_url("oci://lab:5000/m"), "http://lab:5000/");
        assert_eq!(base_url("oci://lab/m"), "https://lab/", "another port is another registry");
        assert_eq!(base_url("oci://localhost:5000/m"), "http://localhost:5000/");
        assert_eq!(base_url("oci://127.9.9.9/m"), "http://127.9.9.9/");
        assert_eq!(base_url("oci://[::1]:5000/m"), "http://[::1]:5000/");
        assert_eq!(base_url("oci://localhost.example/m"), "https://localhost.example/");
        assert_eq!(base_url("oci://docker.io/m"), "https://registry-1.docker.io/");
    }

    #[test]
    fn a_password_goes_to_a_token_server_with_tls_or_on_the_registrys_own_host() {
        let to = |base_url: &str, realm: &str| checked_realm(&Url::parse(base_url).expect(base_url), realm).is_ok();
        assert!(to("https://r.example", "https://auth.example/token?x=y"));
        assert!(to("https://r.example", "https://r.example/token"));
        assert!(to("http://127.0.0.1:5000", "http://127.0.0.1:5001/token"));
        assert!(to("http://127.0.0.1:5000", "https://auth.example/token"));
        for (base_url, realm) in [
            ("https://r.example", "http://r.example/token"),
            ("https://r.example", "http://auth.example/token"),
            ("http://127.0.0.1:5000", "http://127.0.0.2:5000/token"),
            ("http://lab:5000", "http://lab.evil:5000/token"),
            ("http://lab:5000", "http://lab:5000@evil/token"),
            ("https://r.example", "file:///etc/passwd"),
            ("https://r.example", "/token"),
            ("https://r.example", "data:,x"),
        ] {
            assert!(!to(base_url, realm), "{base_url} {realm}");
        }
    }

    #[test]
    fn challenges_are_parsed_in_the_formats_of_real_registries() {
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
    fn the_hint_names_the_credential_helper_that_has_the_login() {
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
    fn passwords_and_tokens_are_not_printed() {
        let registries = registries(|config| {
            config.logins.insert("r".into(), OciLogin::Password("me".into(), Secret::new("canary")));
        });
        registries
            .authorizations
            .blocking_lock()
            .insert(("r".into(), "m".into()), HeaderValue::from_static("Bearer canary"));
        assert!(!format!("{registries:?}").contains("canary"));
    }
}
