//! The AWS credential provider chain, with caching and renewal.
//!
//! Providers are tried in order, and the first one that returns credentials is used. If none does, the error lists
//! every provider with its reason. Variables are read from the configured environment, never from the process's own.

use super::endpoint::dns_suffix;
use super::profile::{Profiles, home};
use super::settings::Options;
use super::xml;
use crate::config::{Environment, Secret};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::transfer::{BodyError, BodyLimits, read_body};
use crate::{printable, redact};
use async_trait::async_trait;
use bytes::Bytes;
use object_store::CredentialProvider;
use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::client::{HttpRequest, HttpRequestBody};
use reqsign_aws_core::{
    AssumeRoleWithWebIdentityCredentialProvider, Credential, ECSCredentialProvider, EnvCredentialProvider,
    IMDSv2CredentialProvider, ProcessCredentialProvider, ProfileCredentialProvider, SSOCredentialProvider,
};
use reqsign_core::{CommandExecute, CommandOutput, Context, FileRead, HttpSend, ProvideCredential, StaticEnv};
use std::collections::HashMap;
use std::fmt;
use std::io::Read as _;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant, SystemTime};

/// Credentials are renewed this long before they expire, or a quarter of their lifetime before if that is shorter.
const RENEW_BEFORE_END: Duration = Duration::from_secs(300);
/// Time for which a search without result is cached. On a machine without an instance metadata service, each search
/// takes a second, and without the cache every request would wait for one.
const NOT_FOUND_TTL: Duration = Duration::from_secs(10);
/// Credentials found more recently than this are kept although the store reports them as expired, because a new search
/// would return the same ones.
const FRESH_AGE_MAX: Duration = Duration::from_secs(10);
/// Longest wait for a connection to a metadata service. Short, because the service is one network hop away.
const METADATA_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for a response of a metadata service.
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a response of STS or SSO.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest run of a `credential_process`. It may ask the user for a code in a window of its own.
const PROCESS_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between two looks at whether a `credential_process` has ended.
const PROCESS_POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Largest response of a metadata service, STS, SSO or a process, in bytes. Credentials have a few KiB.
const RESPONSE_BYTES_MAX: u64 = 256 * 1024;
/// Most profiles in a chain of `source_profile` settings.
const SOURCE_PROFILES_MAX: usize = 5;

/// Number of characters of an access key id that are shown. They distinguish a long-term key (`AKIA`) from a temporary
/// one (`ASIA`).
const KEY_CHARS_SHOWN: usize = 4;

/// Source of the credentials, for display.
pub(super) struct CredentialSource {
    /// The provider that returned the credentials.
    pub(super) provider_name: String,
    /// The first [`KEY_CHARS_SHOWN`] characters of the access key id.
    pub(super) key_id_start: String,
    /// Expiry time of temporary credentials.
    pub(super) expires_at: Option<SystemTime>,
}

/// The provider chain, with the credentials that it returned last.
pub(super) struct Credentials {
    environment: Environment,
    /// The keys in the remote's options, if it has them.
    from_options: Option<Credential>,
    region: String,
    profiles: Profiles,
    context: Context,
    http: Http,
    cache: tokio::sync::Mutex<CredentialCache>,
}

#[derive(Default)]
struct CredentialCache {
    found: Option<FoundCredentials>,
    /// Time of a search without result, and the providers that it tried.
    not_found: Option<(Instant, String)>,
}

/// Credentials with the times of their search, renewal and expiry.
#[derive(Clone)]
struct FoundCredentials {
    credential: Arc<AwsCredential>,
    expires_at: Option<SystemTime>,
    renew_at: Option<SystemTime>,
    found_at: Instant,
}

/// Prints no field, because they contain secrets.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

impl Credentials {
    /// Returns the chain for `environment`. `service` is the HTTP client for STS and SSO.
    pub(super) fn new(
        environment: &Environment,
        options: &Options,
        profiles: Profiles,
        region: &str,
        service: reqwest::Client,
    ) -> Self {
        let http = Http { service, metadata: Arc::default() };
        // An empty variable counts as unset, as in the AWS tools.
        let set = environment.0.keys().filter_map(|name| Some((name.clone(), environment.get(name)?.to_owned())));
        let mut variables: HashMap<String, String> = set.collect();
        variables.insert("AWS_PROFILE".into(), profiles.name().to_owned());
        variables.entry("AWS_REGION".into()).or_insert_with(|| region.to_owned());
        // Use the regional endpoint of STS, as the AWS tools do. Some partitions have no global one.
        variables.entry("AWS_STS_REGIONAL_ENDPOINTS".into()).or_insert_with(|| "regional".into());
        let context = Context::new()
            .with_file_read(Files)
            .with_http_send(http.clone())
            .with_env(StaticEnv { home_dir: home(environment), envs: variables })
            .with_command_execute(Commands(environment.clone()));
        let secret = |secret: &Option<Secret>| secret.as_ref().map(|secret| secret.expose().to_owned());
        let from_options =
            secret(&options.access_key).zip(secret(&options.secret_key)).map(|(access_key_id, secret_access_key)| {
                Credential {
                    access_key_id,
                    secret_access_key,
                    session_token: secret(&options.session_token),
                    expires_in: None,
                }
            });
        Self {
            environment: environment.clone(),
            from_options,
            region: region.to_owned(),
            profiles,
            context,
            http,
            cache: Default::default(),
        }
    }

    /// Drops the cached credentials after the store reported them as expired. Returns true if a retry may succeed.
    pub(super) async fn drop_expired(&self) -> bool {
        let mut cache = self.cache.lock().await;
        let stale = cache.found.as_ref().is_some_and(|found| found.found_at.elapsed() > FRESH_AGE_MAX);
        if stale {
            cache.found = None;
        }
        stale
    }

    /// Returns the cached credentials, or searches for new ones if they are due for renewal.
    async fn current(&self) -> Result<Arc<AwsCredential>> {
        // The lock is held during the search, so that concurrent requests share one.
        let mut cache = self.cache.lock().await;
        let now = SystemTime::now();
        if let Some(found) = &cache.found
            && found.renew_at.is_none_or(|renew_at| now < renew_at)
        {
            return Ok(found.credential.clone());
        }
        if let Some((when, tried)) = &cache.not_found
            && when.elapsed() < NOT_FOUND_TTL
        {
            return Err(self.none_found(tried));
        }
        match self.search().await {
            Ok((_, found)) => {
                cache.not_found = None;
                Ok(cache.found.insert(found).credential.clone())
            }
            Err(tried) => match &cache.found {
                // The renewal failed, but the present credentials are still valid.
                Some(found) if found.expires_at.is_some_and(|expires_at| now < expires_at) => {
                    tracing::warn!(
                        reason = tried,
                        "cannot renew the AWS credentials; using the present ones until they expire"
                    );
                    Ok(found.credential.clone())
                }
                _ => {
                    cache.not_found = Some((Instant::now(), tried.clone()));
                    Err(self.none_found(&tried))
                }
            },
        }
    }

    /// Searches the chain and returns the source of the credentials. Does not use the cache.
    pub(super) async fn credential_source(&self) -> Result<CredentialSource> {
        let (provider_name, found) = self.search().await.map_err(|tried| self.none_found(&tried))?;
        let key_id_start = found.credential.key_id.chars().take(KEY_CHARS_SHOWN).collect();
        Ok(CredentialSource { provider_name, key_id_start, expires_at: found.expires_at })
    }

    /// Returns the error of a search without result. `tried` lists the providers with their reasons.
    fn none_found(&self, tried: &str) -> Error {
        Error::new(ErrorKind::Unauthorized, format!("no AWS credentials found; tried {tried}")).tier(Tier::Remote).hint(
            "run `aws configure` (or `aws sso login`), set AWS_PROFILE, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; \
             for a public bucket set skip_signature = true under [remote.options]",
        )
    }

    /// Tries the providers in order. Returns the name of the first one with credentials, and the credentials. The error
    /// lists each provider with its reason.
    async fn search(&self) -> std::result::Result<(String, FoundCredentials), String> {
        let mut tried = Vec::new();
        for provider in Provider::ALL {
            let provider_name = self.name_of(provider);
            match self.credentials_of(provider).await {
                Ok(Some(credential)) => {
                    tracing::debug!(provider = provider_name.as_str(), "AWS credentials found");
                    return Ok((provider_name, FoundCredentials::new(credential)));
                }
                Ok(None) => tried.push(provider_name),
                Err(reason) => {
                    tracing::debug!(provider = provider_name, reason, "an AWS credential provider failed");
                    tried.push(format!("{provider_name} ({reason})"));
                }
            }
        }
        Err(tried.join(", "))
    }

    /// Returns the name of a provider for messages.
    fn name_of(&self, provider: Provider) -> String {
        let profile = self.profiles.name();
        match provider {
            Provider::Options => "[remote.options]".into(),
            Provider::Variables => "AWS_ACCESS_KEY_ID".into(),
            Provider::Role => format!("the role of profile {profile:?}"),
            Provider::Profile => {
                let files: Vec<String> =
                    Profiles::files(&self.environment).iter().map(|file| file.display().to_string()).collect();
                let missing = if self.profiles.exists() { "" } else { ", which does not exist" };
                format!(
                    "profile {profile:?}{missing} in {}",
                    if files.is_empty() { "no file: HOME is not set".into() } else { files.join(" and ") }
                )
            }
            Provider::Sso => "SSO".into(),
            Provider::WebIdentity => "web identity".into(),
            Provider::Process => "credential_process".into(),
            Provider::Container => "container credentials".into(),
            Provider::Instance => "instance metadata".into(),
        }
    }

    /// Returns the credentials of one provider, or `None` if it is not configured.
    async fn credentials_of(&self, provider: Provider) -> std::result::Result<Option<Credential>, String> {
        self.provided(provider).await?.map(usable).transpose()
    }

    /// Returns the credentials of one provider as it states them.
    async fn provided(&self, provider: Provider) -> std::result::Result<Option<Credential>, String> {
        let context = &self.context;
        let result = match provider {
            Provider::Options => return Ok(self.from_options.clone()),
            Provider::Variables => EnvCredentialProvider::new().provide_credential(context).await,
            Provider::Role => return self.assume_role(self.profiles.name(), SOURCE_PROFILES_MAX).await,
            Provider::Profile => ProfileCredentialProvider::new().provide_credential(context).await,
            Provider::Sso => return self.sso(self.profiles.name()).await,
            Provider::WebIdentity => {
                AssumeRoleWithWebIdentityCredentialProvider::new().provide_credential(context).await
            }
            Provider::Process => ProcessCredentialProvider::new().provide_credential(context).await,
            Provider::Container => ECSCredentialProvider::new().provide_credential(context).await,
            Provider::Instance if metadata_disabled(&self.environment) => {
                return Err("disabled by AWS_EC2_METADATA_DISABLED".into());
            }
            Provider::Instance => IMDSv2CredentialProvider::new().provide_credential(context).await,
        };
        result.map_err(|error| reason(&error))
    }

    /// Returns SSO credentials, from the profile's own SSO settings or from those of its `sso_session`.
    async fn sso(&self, profile: &str) -> std::result::Result<Option<Credential>, String> {
        let session = self.profiles.get(profile, "sso_session");
        let section = session.map_or_else(|| profile.to_owned(), |session| format!("sso-session {session}"));
        let own = |setting: &str| self.profiles.get(profile, setting);
        let (Some(account), Some(role)) = (own("sso_account_id"), own("sso_role_name")) else { return Ok(None) };
        let region =
            self.profiles.get(&section, "sso_region").ok_or_else(|| format!("[{section}] has no sso_region"))?;
        // `aws sso login` names the token cache file by a hash of the session name, or of the start URL if there is no
        // session.
        let token_name = session.or_else(|| own("sso_start_url")).ok_or("the profile has no sso_session")?;
        let provider = SSOCredentialProvider::new()
            .with_account_id(account)
            .with_role_name(role)
            .with_region(region)
            .with_start_url(token_name);
        provider.provide_credential(&self.context).await.map_err(|error| reason(&error))
    }

    /// Assumes the role of a profile (`role_arn`) with the credentials of its source. Returns `None` if the profile has
    /// no role. `depth` is the number of further source profiles that are allowed.
    async fn assume_role(&self, profile: &str, depth: usize) -> std::result::Result<Option<Credential>, String> {
        let own = |setting: &str| self.profiles.get(profile, setting);
        let Some(role) = own("role_arn") else { return Ok(None) };
        if let Some(file) = own("web_identity_token_file") {
            let provider = AssumeRoleWithWebIdentityCredentialProvider::with_config(role.to_owned(), file.into());
            return provider.provide_credential(&self.context).await.map_err(|error| reason(&error));
        }
        let source = match (own("source_profile"), own("credential_source")) {
            (Some(source), _) => Box::pin(self.profile_source(profile, source, depth)).await?,
            (None, Some("Environment")) => self.named_source(Provider::Variables).await?,
            (None, Some("EcsContainer")) => self.named_source(Provider::Container).await?,
            (None, Some("Ec2InstanceMetadata")) => self.named_source(Provider::Instance).await?,
            _ => return Err("the profile has role_arn, but neither source_profile nor credential_source".into()),
        };
        if own("mfa_serial").is_some() {
            return Err(
                "the role requires MFA (mfa_serial); get a session token with `aws sts get-session-token`".into()
            );
        }
        let source = source.ok_or("the source profile has no credentials")?;
        let request = RoleRequest {
            role,
            session: own("role_session_name").unwrap_or("modelcache"),
            external_id: own("external_id"),
            duration_s: own("duration_seconds"),
        };
        self.call_assume_role(&source, &request).await.map(Some)
    }

    /// Returns the credentials of the provider that `credential_source` names.
    async fn named_source(&self, provider: Provider) -> std::result::Result<Option<Credential>, String> {
        Box::pin(self.credentials_of(provider)).await
    }

    /// Returns the credentials of a source profile, from its keys, its own role, SSO or `credential_process`, in this
    /// order.
    async fn profile_source(
        &self,
        profile: &str,
        source: &str,
        depth: usize,
    ) -> std::result::Result<Option<Credential>, String> {
        if depth == 0 {
            return Err("the chain of source_profile settings is too long".into());
        }
        let keys = ProfileCredentialProvider::new().with_profile(source);
        if let Some(credential) = keys.provide_credential(&self.context).await.map_err(|error| reason(&error))? {
            return Ok(Some(credential));
        }
        // A profile may name itself as its source. Its keys were tried above; assuming its own role would recurse.
        if source != profile
            && let Some(credential) = Box::pin(self.assume_role(source, depth - 1)).await?
        {
            return Ok(Some(credential));
        }
        if let Some(credential) = self.sso(source).await? {
            return Ok(Some(credential));
        }
        let process = ProcessCredentialProvider::new().with_profile(source);
        process.provide_credential(&self.context).await.map_err(|error| reason(&error))
    }

    /// Calls `AssumeRole` of STS, <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html>.
    async fn call_assume_role(
        &self,
        source: &Credential,
        role: &RoleRequest<'_>,
    ) -> std::result::Result<Credential, String> {
        let request = self.sts_request(source, role)?;
        let response = self.http.send(request.map(|_| Bytes::new())).await?;
        let body = String::from_utf8_lossy(response.body());
        if !response.status().is_success() {
            let code = xml::text(&body, "Code").unwrap_or_default();
            return Err(format!(
                "STS responded with HTTP {} {code}: {}",
                response.status().as_u16(),
                xml::text(&body, "Message").unwrap_or_default()
            ));
        }
        let field = |name: &str| xml::text(&body, name).ok_or(format!("the response of STS has no {name}"));
        Ok(Credential {
            access_key_id: field("AccessKeyId")?,
            secret_access_key: field("SecretAccessKey")?,
            session_token: Some(field("SessionToken")?),
            expires_in: field("Expiration")?.parse().ok(),
        })
    }

    fn sts_request(&self, source: &Credential, role: &RoleRequest<'_>) -> std::result::Result<HttpRequest, String> {
        let endpoint =
            match self.environment.get("AWS_ENDPOINT_URL_STS").or_else(|| self.environment.get("AWS_ENDPOINT_URL")) {
                Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
                None => format!("https://sts.{}.{}", self.region, dns_suffix(&self.region)),
            };
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("Action", "AssumeRole").append_pair("Version", "2011-06-15");
        query.append_pair("RoleArn", role.role).append_pair("RoleSessionName", role.session);
        for (name, value) in [("ExternalId", role.external_id), ("DurationSeconds", role.duration_s)] {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        // SigV4 requires %20 for a space in the query, not `+`.
        let address = format!("{endpoint}/?{}", query.finish().replace('+', "%20"));
        let request = http::Request::get(address).body(HttpRequestBody::empty());
        let mut request: HttpRequest = request.map_err(|_| "the address of STS is not a valid URL")?;
        let signer = to_object_store(source);
        let authorizer = AwsAuthorizer::new(&signer, "sts", &self.region);
        authorizer.try_authorize(&mut request, None).map_err(|_| "cannot sign the request to STS")?;
        Ok(request)
    }
}

/// Parameters of `AssumeRole`.
struct RoleRequest<'a> {
    role: &'a str,
    session: &'a str,
    external_id: Option<&'a str>,
    duration_s: Option<&'a str>,
}

#[async_trait]
impl CredentialProvider for Credentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.current().await.map_err(|error| object_store::Error::Generic { store: "S3", source: Box::new(error) })
    }
}

/// The providers of the chain, in the order in which they are tried.
#[derive(Debug, Clone, Copy)]
enum Provider {
    Options,
    Variables,
    Role,
    Profile,
    Sso,
    WebIdentity,
    Process,
    Container,
    Instance,
}

impl Provider {
    const ALL: [Self; 9] = [
        Self::Options,
        Self::Variables,
        Self::Role,
        Self::Profile,
        Self::Sso,
        Self::WebIdentity,
        Self::Process,
        Self::Container,
        Self::Instance,
    ];
}

impl FoundCredentials {
    fn new(credential: Credential) -> Self {
        let expires_at = credential.expires_in.map(|expires_at| expires_at.as_system_time());
        let renew_at = expires_at.map(|expires_at| {
            let left = expires_at.duration_since(SystemTime::now()).unwrap_or_default();
            expires_at - RENEW_BEFORE_END.min(left / 4)
        });
        Self { credential: Arc::new(to_object_store(&credential)), expires_at, renew_at, found_at: Instant::now() }
    }
}

/// Returns the credential without white space around its parts.
///
/// # Errors
/// The reason, if a part has a character that no credential has. Such a part could not be sent in a header.
fn usable(credential: Credential) -> std::result::Result<Credential, String> {
    let checked = |part: &str, name: &str| match part.trim() {
        trimmed if trimmed.chars().all(|c| c.is_ascii_graphic()) => Ok(trimmed.to_owned()),
        _ => Err(format!("its {name} has a space, a line break or another character that no credential has")),
    };
    Ok(Credential {
        access_key_id: checked(&credential.access_key_id, "access key id")?,
        secret_access_key: checked(&credential.secret_access_key, "secret access key")?,
        session_token: credential.session_token.map(|token| checked(&token, "session token")).transpose()?,
        expires_in: credential.expires_in,
    })
}

/// Converts a credential for `object_store`, and registers its secrets for redaction.
fn to_object_store(credential: &Credential) -> AwsCredential {
    redact::register(&credential.secret_access_key);
    credential.session_token.iter().for_each(|token| redact::register(token));
    AwsCredential {
        key_id: credential.access_key_id.clone(),
        secret_key: credential.secret_access_key.clone(),
        token: credential.session_token.clone(),
    }
}

/// Returns true if the instance metadata service must not be used.
fn metadata_disabled(environment: &Environment) -> bool {
    environment.get("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
}

/// Returns the error of a provider as one printable line.
fn reason(error: &reqsign_core::Error) -> String {
    printable::quote(&error.to_string())
}

fn unexpected(reason: impl Into<String>) -> reqsign_core::Error {
    reqsign_core::Error::unexpected(reason)
}

/// Reads token and profile files.
#[derive(Debug)]
struct Files;

impl FileRead for Files {
    async fn file_read(&self, path: &str) -> reqsign_core::Result<Vec<u8>> {
        let path = path.to_owned();
        let read =
            tokio::task::spawn_blocking(move || std::fs::read(&path).map_err(|error| format!("{path}: {error}")));
        read.await.map_err(|_| unexpected("cancelled"))?.map_err(unexpected)
    }
}

/// Runs `credential_process` in the configured environment.
#[derive(Debug)]
struct Commands(Environment);

impl CommandExecute for Commands {
    async fn command_execute<'a>(
        &'a self,
        program: &'a str,
        arguments: &'a [&'a str],
    ) -> reqsign_core::Result<CommandOutput> {
        // The caller splits the setting at white space. A shell puts quoted arguments together again, as in the AWS
        // tools.
        let line = [&[program], arguments].concat().join(" ");
        let mut command = Command::new("sh");
        command.args(["-c", &line]).env_clear().envs(&self.0.0).stdin(Stdio::null());
        // Discard standard error, which may contain secrets. The error then shows the exit status only.
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let ran = tokio::task::spawn_blocking(move || output_of(command, PROCESS_TIMEOUT)).await;
        let (status, stdout) = ran.map_err(|_| unexpected("cancelled"))?.map_err(unexpected)?;
        Ok(CommandOutput { status: status.code().unwrap_or(-1), stdout, stderr: Vec::new() })
    }
}

/// Runs a command that prints credentials, and kills it after `timeout` or [`RESPONSE_BYTES_MAX`] bytes. Blocks.
fn output_of(mut command: Command, timeout: Duration) -> std::result::Result<(ExitStatus, Vec<u8>), String> {
    let deadline = Instant::now() + timeout;
    let mut child = command.spawn().map_err(|error| format!("cannot start sh: {error}"))?;
    let stdout = child.stdout.take().ok_or("it has no standard output")?;
    // A child of the command may keep the pipe open, so the thread of the reader is never joined: its result is awaited
    // until the timeout only.
    let (sender, received) = mpsc::channel();
    let reader = std::thread::Builder::new().spawn(move || {
        let mut output = Vec::new();
        let read = stdout.take(RESPONSE_BYTES_MAX + 1).read_to_end(&mut output);
        sender.send(read.map(|_| output))
    });
    let output = match received.recv_timeout(timeout) {
        _ if reader.is_err() => Err("no thread can be started to read its output".to_owned()),
        Ok(Ok(output)) if output.len() as u64 <= RESPONSE_BYTES_MAX => Ok(output),
        Ok(Ok(_)) => Err(format!("it printed more than {RESPONSE_BYTES_MAX} bytes")),
        Ok(Err(error)) => Err(format!("its output cannot be read: {error}")),
        Err(_) => Err(format!("it did not end within {} s", timeout.as_secs_f32())),
    };
    // The command may have closed its output and still run.
    while output.is_ok() && Instant::now() < deadline {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            return output.map(|output| (status, output));
        }
        std::thread::sleep(PROCESS_POLL_INTERVAL);
    }
    let _ = child.kill();
    let _ = child.wait();
    output.and_then(|_| Err(format!("it did not end within {} s", timeout.as_secs_f32())))
}

/// HTTP for the providers: a client with short timeouts and no proxy for metadata services (plain HTTP), and the
/// remote's own client for STS and SSO.
#[derive(Debug, Clone)]
struct Http {
    service: reqwest::Client,
    metadata: Arc<OnceLock<reqwest::Client>>,
}

impl Http {
    async fn send(&self, request: http::Request<Bytes>) -> std::result::Result<http::Response<Bytes>, String> {
        let is_metadata = request.uri().scheme_str() == Some("http");
        let text = |error: reqwest::Error| {
            let reason = if error.is_timeout() {
                "no response in time"
            } else if error.is_connect() {
                "cannot connect"
            } else {
                "invalid response"
            };
            format!("{}: {reason}", if is_metadata { "metadata service" } else { "AWS service" })
        };
        let client = if is_metadata { self.metadata()? } else { &self.service };
        let mut request = reqwest::Request::try_from(request).map_err(|_| "cannot build the request")?;
        *request.timeout_mut() = Some(if is_metadata { METADATA_TIMEOUT } else { SERVICE_TIMEOUT });
        let response = client.execute(request).await.map_err(text)?;
        let mut collected = http::Response::builder().status(response.status());
        if let Some(headers) = collected.headers_mut() {
            headers.clone_from(response.headers());
        }
        let limits =
            BodyLimits::within(RESPONSE_BYTES_MAX, if is_metadata { METADATA_TIMEOUT } else { SERVICE_TIMEOUT });
        let body = match read_body(response.bytes_stream(), limits).await {
            (body, None) => Bytes::from(body),
            (_, Some(BodyError::Broken(error))) => return Err(text(error)),
            (_, Some(BodyError::TooLong(bytes_max))) => {
                return Err(format!("the response has more than {bytes_max} bytes"));
            }
            (_, Some(_)) => return Err("the response was not complete in time".into()),
        };
        collected.body(body).map_err(|_| "invalid response".into())
    }

    /// Returns the client for metadata services. The first call builds it.
    fn metadata(&self) -> std::result::Result<&reqwest::Client, String> {
        if let Some(client) = self.metadata.get() {
            return Ok(client);
        }
        // No root certificates: they are slow to load, and this client uses plain HTTP only.
        let client = reqwest::Client::builder()
            .connect_timeout(METADATA_CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .tls_certs_only([])
            .build()
            .map_err(|_| "cannot set up the metadata client")?;
        Ok(self.metadata.get_or_init(|| client))
    }
}

impl HttpSend for Http {
    async fn http_send(&self, request: http::Request<Bytes>) -> reqsign_core::Result<http::Response<Bytes>> {
        self.send(request).await.map_err(unexpected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(line: &str) -> std::result::Result<(ExitStatus, Vec<u8>), String> {
        let mut command = Command::new("sh");
        command.args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        output_of(command, Duration::from_millis(500))
    }

    #[test]
    fn a_credential_process_that_hangs_or_prints_without_end_is_killed() {
        let started = Instant::now();
        for hanging in ["sleep 30", "exec >&-; sleep 30", "sleep 30 & exit 0", "read line; sleep 30"] {
            assert!(output(hanging).is_err_and(|reason| reason.contains("did not end within")), "{hanging}");
        }
        assert!(output("yes").is_err_and(|reason| reason.contains("more than")));
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        let (status, printed) = output("printf abc; exit 3").expect("ends");
        assert_eq!((status.code(), printed.as_slice()), (Some(3), b"abc".as_slice()));
    }

    #[tokio::test]
    async fn quoted_arguments_of_a_credential_process_stay_together() {
        let path = std::env::var("PATH").unwrap_or_default();
        let commands = Commands(Environment(HashMap::from([("PATH".into(), path)])));
        // The caller has split `printf '%s|' 'a b' "c"` at white space.
        let ran = commands.command_execute("printf", &["'%s|'", "'a", "b'", "\"c\""]).await.expect("runs");
        assert_eq!((ran.status, ran.stdout.as_slice()), (0, b"a b|c|".as_slice()));
    }
}
