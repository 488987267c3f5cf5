//! Examining the remote: credentials, bucket, region, rights, conditional writes; each tried, nothing left behind.
//!
//! What is written is one small object under a random name below `.modelcache-doctor/`, a name that no artifact can
//! have; it is removed whatever happens in between, also when the examination is cut short.

use super::Remote;
use super::credentials::CredentialSource;
use super::http_client::Connector;
use super::profile::Profiles;
use super::settings::{RemoteLocation, S3Settings};
use super::store::{Condition, Store, Written};
use crate::config::{Config, RemoteConfig, RetryConfig};
use crate::doctor::{Area, Check, Clock, DoctorOptions, in_time};
use crate::error::{Error, ErrorKind, Result};
use crate::transfer::Retry;
use bytes::Bytes;
use object_store::aws::AmazonS3ConfigKey;
use object_store::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Where what is tried lies, below the remote's prefix.
const FOLDER: &str = ".modelcache-doctor";
/// How long a question is asked again, and how long its answer may take: somebody is waiting.
const RETRY: RetryConfig = RetryConfig { deadline: Duration::from_secs(3), read_timeout: Duration::from_secs(5) };
/// Credentials that end sooner are worth a word, unless the chain renews them.
const ENDS_SOON: Duration = Duration::from_secs(900);
/// What the object says.
const CONTENT: &[u8] = b"modelcache doctor wrote this to try its rights; it may be removed\n";

/// Looks at the remote of `config`, if there is one.
pub(crate) async fn examine(config: &Config, options: DoctorOptions, clock: &Clock) -> Vec<Check> {
    let Some(remote) = &config.remote else {
        return vec![Check::ok(Area::Remote, "none is configured: there are only the disk and the origins")];
    };
    let mut checks = Vec::new();
    if let Err(error) = look(remote, options, clock, &mut checks).await {
        checks.push(Check::problem(Area::Remote, &error));
    }
    checks
}

async fn look(config: &RemoteConfig, options: DoctorOptions, clock: &Clock, checks: &mut Vec<Check>) -> Result<()> {
    let remote = Remote::open(config, Retry::new(RETRY))?;
    let store = remote.store().await?;
    match &remote.0.place {
        RemoteLocation::Folder(folder) => {
            checks.push(Check::ok(Area::Remote, format!("the folder {}", folder.display())));
            if !folder.is_dir() {
                let says = format!("{} is not there; the first put makes it", folder.display());
                let fix = "see whether a mount is missing; otherwise nothing";
                checks.push(Check::warning(Area::Remote, says, fix));
                return Ok(());
            }
        }
        RemoteLocation::Bucket { .. } => {
            let (settings, connector) = settings(&remote).await?;
            checks.push(Check::ok(Area::Remote, place(&remote, &settings)));
            query_clock(&settings, &connector, clock).await;
            match credentials(&remote, store).await {
                Ok(check) => checks.push(check),
                Err(error) => {
                    // Whatever is asked without them is refused.
                    checks.push(Check::problem(Area::Credentials, &error));
                    return Ok(());
                }
            }
        }
    }
    let listed = rights_to_read(store, checks).await?;
    let written = if options.read_only {
        checks.push(Check::ok(Area::Remote, "what may be written was not tried (--read-only)"));
        None
    } else {
        Some(rights_to_write(store, checks).await)
    };
    if !listed && written == Some(false) {
        let error = Error::new(ErrorKind::Unauthorized, "the credentials have no right that was tried");
        return Err(error.hint("`modelcache doctor --iam-policy writer` (or reader) prints the rights that are needed"));
    }
    Ok(())
}

/// The settings as the store has them, and a client for questions beside it.
async fn settings(remote: &Remote) -> Result<(S3Settings, Connector)> {
    let inner = remote.0.clone();
    let gathered = tokio::task::spawn_blocking(move || {
        let environment = &inner.config.environment;
        let settings = S3Settings::gather(&inner.options, environment, &Profiles::load(environment))?;
        let connector = Connector::new(&settings, &inner.options, RETRY.read_timeout)?;
        Ok((settings, connector))
    });
    gathered.await.map_err(|cause| Error::new(ErrorKind::Other, "looking was cut short").cause(cause))?
}

fn place(remote: &Remote, settings: &S3Settings) -> String {
    let style = if settings.path_style { "path style" } else { "virtual-hosted style" };
    let mut text = format!("{} at {}, region {}, {style}", remote.url(), endpoint(settings), settings.region);
    let option = |key: AmazonS3ConfigKey| remote.0.options.passed_on.iter().find(|(name, _)| *name == key);
    let encrypts =
        remote.0.config.options.iter().find(|(name, _)| name.ends_with("sse") || name.contains("encryption"));
    if let Some((_, how)) = encrypts {
        text.push_str(&format!(", encryption {how}"));
    }
    if option(AmazonS3ConfigKey::RequestPayer).is_some() {
        text.push_str(", requester pays");
    }
    text
}

fn endpoint(settings: &S3Settings) -> String {
    let usual = || format!("https://s3.{}.amazonaws.com", settings.region);
    settings.endpoint.clone().unwrap_or_else(usual)
}

/// Any answer of the endpoint tells its time, a refusal as well as another. That it does not answer is told elsewhere.
async fn query_clock(settings: &S3Settings, connector: &Connector, clock: &Clock) {
    let endpoint = endpoint(settings);
    let request = connector.client().get(&endpoint).timeout(RETRY.read_timeout);
    if let Ok(answer) = request.send().await {
        let date = answer.headers().get("date").and_then(|value| value.to_str().ok());
        clock.learn(&endpoint, date);
    }
}

/// Which link of the chain answers.
async fn credentials(remote: &Remote, store: &Store) -> Result<Check> {
    let skips = |(key, value): &(AmazonS3ConfigKey, crate::config::Secret)| {
        *key == AmazonS3ConfigKey::SkipSignature && !matches!(value.expose(), "false" | "0")
    };
    let chain = store.credentials().filter(|_| !remote.0.options.passed_on.iter().any(skips));
    let Some(chain) = chain else {
        return Ok(Check::ok(Area::Credentials, "requests are not signed (skip_signature)"));
    };
    let CredentialSource { place, key_begins, ends } = in_time(chain.credential_source()).await?;
    let mut says = format!("from {place}; the key's id begins with {key_begins}");
    let left = ends.map(|ends| ends.duration_since(SystemTime::now()).unwrap_or_default());
    if let Some(left) = left {
        says.push_str(&format!("; they end in {} min", left.as_secs() / 60));
    }
    Ok(match left {
        Some(left) if left < ENDS_SOON => {
            let fix = "nothing, if they renew themselves; else log in again (`aws sso login`)";
            Check::warning(Area::Credentials, says, fix)
        }
        _ => Check::ok(Area::Credentials, says),
    })
}

/// Whether the bucket is there, in this region, and may be listed.
async fn rights_to_read(store: &Store, checks: &mut Vec<Check>) -> Result<bool> {
    let listed = in_time(store.list(Some(&store.key(FOLDER)?))).await?;
    match &listed {
        Some(_) => checks.push(Check::ok(Area::Remote, "it answers, and may be listed")),
        None => checks.push(Check::warning(
            Area::Remote,
            "listing is not permitted: what is missing cannot be told from what is forbidden, and `ls --remote` fails",
            "grant s3:ListBucket on the bucket; `modelcache doctor --iam-policy reader` prints the policy",
        )),
    }
    Ok(listed.is_some())
}

/// Writes, reads and removes an object of our own. Whether it could be written.
async fn rights_to_write(store: &Arc<Store>, checks: &mut Vec<Check>) -> bool {
    let key = match store.key(&format!("{FOLDER}/{:016x}", rand::random::<u64>())) {
        Ok(key) => key,
        Err(error) => {
            checks.push(Check::problem(Area::Remote, &error));
            return false;
        }
    };
    let mut ours = Ours { store: store.clone(), key: Some(key.clone()) };
    let put = || store.put(&key, Bytes::from_static(CONTENT), Condition::Absent);
    let first = match in_time(put()).await {
        Ok(Written::Unsupported) => in_time(store.put(&key, Bytes::from_static(CONTENT), Condition::Always)).await,
        first => first,
    };
    let is_written = match first {
        Ok(_) => {
            checks.push(Check::ok(Area::Remote, "objects may be written"));
            checks.push(conditions(in_time(put()).await));
            checks.push(read_back(in_time(store.get(&key, 4096)).await.map(|found| found.map(|(bytes, _)| bytes))));
            true
        }
        Err(error) => {
            checks.push(not_writable(&error));
            false
        }
    };
    // Also where the write failed: it may have arrived all the same.
    match (ours.remove().await, is_written) {
        (Ok(()), true) => checks.push(Check::ok(Area::Remote, "objects may be removed")),
        (Err(error), true) => checks.push(
            Check::problem(Area::Remote, &error)
                .with_detail(&format!("evicting fails, and {key} had to be left there: remove it")),
        ),
        (_, false) => {}
    }
    is_written
}

fn not_writable(error: &Error) -> Check {
    if error.kind() == ErrorKind::Unauthorized {
        let says = "objects may not be written: what comes from origins stays on this disk, and put fails";
        let fix = "grant s3:PutObject (`modelcache doctor --iam-policy writer` prints the policy), or set \
                   MODEL_CACHE_REMOTE_MODE=ro if that is meant";
        return Check::warning(Area::Remote, says, fix).with_detail(error.message());
    }
    Check::problem(Area::Remote, error)
}

/// What a second create-only write of the same object came to.
fn conditions(second: Result<Written>) -> Check {
    match second {
        Ok(Written::Refused) => Check::ok(Area::Remote, "conditional writes are kept"),
        Ok(Written::Done(_) | Written::Unsupported) => Check::warning(
            Area::Remote,
            "conditional writes are ignored: two writers of one artifact at once may conflict or upload twice",
            "let one machine at a time publish an artifact, or use a store that keeps If-None-Match",
        ),
        Err(error) => Check::problem(Area::Remote, &error),
    }
}

fn read_back(read: Result<Option<Bytes>>) -> Check {
    match read {
        Ok(Some(bytes)) if bytes == CONTENT => Check::ok(Area::Remote, "objects may be read"),
        Ok(Some(_)) => Check::problem(
            Area::Remote,
            &Error::corrupt("an object that was just written reads back with other bytes")
                .hint("something on the way alters what is sent: look at proxies and the store itself"),
        ),
        Ok(None) => Check::problem(
            Area::Remote,
            &Error::new(ErrorKind::Unauthorized, "an object that was just written cannot be read")
                .hint("grant s3:GetObject; `modelcache doctor --iam-policy reader` prints the policy"),
        ),
        Err(error) => Check::problem(Area::Remote, &error),
    }
}

/// The object that was written; it goes, also when the examination is dropped.
struct Ours {
    store: Arc<Store>,
    key: Option<Path>,
}

impl Ours {
    async fn remove(&mut self) -> Result<()> {
        let Some(key) = self.key.clone() else { return Ok(()) };
        let removed = in_time(remove(&self.store, &key)).await;
        self.key = None;
        removed
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let (Some(key), Ok(runtime)) = (self.key.take(), tokio::runtime::Handle::try_current()) else { return };
        let store = self.store.clone();
        runtime.spawn(async move {
            let _ = remove(&store, &key).await;
        });
    }
}

/// Removes the object, and of a folder the folder that was made for it.
async fn remove(store: &Store, key: &Path) -> Result<()> {
    let removed = store.delete(key).await;
    if let Some(folder) = store.file(key).as_deref().and_then(std::path::Path::parent) {
        // Fails where somebody else is just trying, too; that one removes it.
        let _ = std::fs::remove_dir(folder);
    }
    removed
}
