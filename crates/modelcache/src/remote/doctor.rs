//! Checks of the remote for `modelcache doctor`: credentials, bucket, region, permissions and conditional writes.
//!
//! The write checks put one small object under a random name below `.modelcache-doctor/`, a name that no artifact can
//! have. The object is removed afterwards, also if the checks fail or are cancelled.

use super::Remote;
use super::store::{Condition, PutOutcome, Store};
use crate::check::{Area, Check, Clock, DoctorOptions, with_timeout};
use crate::config::{Config, RemoteConfig, RetryConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::option_name::call::READ_ONLY;
use crate::option_name::setting::REMOTE_MODE;
use crate::transfer::Retry;
use bytes::Bytes;
use object_store::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Folder of the probe object, below the remote's prefix.
const PROBE_FOLDER: &str = ".modelcache-doctor";
/// Retry policy of the checks. Its limits are short, because a user waits for the report.
pub(super) const RETRY: RetryConfig =
    RetryConfig { deadline: Duration::from_secs(3), read_timeout: Duration::from_secs(5) };
/// Maximum number of bytes to read from the probe object, which is shorter.
const PROBE_READ_BYTES_MAX: u64 = 4096;
/// Content of the probe object.
const PROBE_CONTENT: &[u8] = b"written by `modelcache doctor` to test permissions; safe to remove\n";

/// Checks the configured remote and returns the results.
pub(crate) async fn examine(config: &Config, options: DoctorOptions, clock: &Clock) -> Vec<Check> {
    let Some(remote) = &config.remote else {
        return vec![Check::ok(Area::Remote, "none is configured; using only the disk and the origins")];
    };
    let mut checks = Vec::new();
    if let Err(error) = run_checks(remote, options, clock, &mut checks).await {
        checks.push(Check::problem(Area::Remote, &error));
    }
    checks
}

async fn run_checks(
    config: &RemoteConfig,
    options: DoctorOptions,
    clock: &Clock,
    checks: &mut Vec<Check>,
) -> Result<()> {
    let remote = Remote::open(config, Retry::new(RETRY))?;
    let store = remote.store().await?;
    // If the backend found a problem that makes all further checks fail, stop here.
    if !store.backend().examine(config, clock, checks).await? {
        return Ok(());
    }
    let listed = check_listing(store, checks).await?;
    let written = if options.read_only {
        checks.push(Check::ok(Area::Remote, format!("write access was not tried ({READ_ONLY})")));
        None
    } else {
        Some(check_writing(store, checks).await)
    };
    // One missing permission is a warning, because a reader needs fewer permissions than a writer. If neither listing
    // nor writing is permitted, the remote is unusable.
    if !listed && written == Some(false) {
        let error = Error::new(ErrorKind::Unauthorized, "the credentials lack every permission that was tried");
        return Err(error.hint("`modelcache doctor --iam-policy writer` (or reader) prints the required permissions"));
    }
    Ok(())
}

/// Checks that the bucket or folder can be reached. Returns true if listing is permitted.
async fn check_listing(store: &Store, checks: &mut Vec<Check>) -> Result<bool> {
    let listed = with_timeout(store.list(Some(&store.key(PROBE_FOLDER)?))).await?;
    match &listed {
        Some(_) => checks.push(Check::ok(Area::Remote, "the remote responds, and objects can be listed")),
        None => checks.push(Check::warning(
            Area::Remote,
            "listing is not permitted: missing and forbidden objects look the same, and `ls --remote` fails",
            "grant s3:ListBucket on the bucket; `modelcache doctor --iam-policy reader` prints the policy",
        )),
    }
    Ok(listed.is_some())
}

/// Writes, reads and removes the probe object. Returns true if it could be written.
async fn check_writing(store: &Arc<Store>, checks: &mut Vec<Check>) -> bool {
    let key = match store.key(&format!("{PROBE_FOLDER}/{:016x}", rand::random::<u64>())) {
        Ok(key) => key,
        Err(error) => {
            checks.push(Check::problem(Area::Remote, &error));
            return false;
        }
    };
    // The guard is created before the write, so that the object is removed even if this future is dropped.
    let mut probe = ProbeObject { store: store.clone(), key: Some(key.clone()) };
    let put = || store.put(&key, Bytes::from_static(PROBE_CONTENT), Condition::Absent);
    let first = match with_timeout(put()).await {
        Ok(PutOutcome::ConditionUnsupported) => {
            with_timeout(store.put(&key, Bytes::from_static(PROBE_CONTENT), Condition::Always)).await
        }
        first => first,
    };
    let is_written = match first {
        Ok(_) => {
            checks.push(Check::ok(Area::Remote, "objects can be written"));
            // The object exists now, so a second create-only write must be refused.
            checks.push(conditional_write_check(with_timeout(put()).await));
            checks.push(read_back_check(
                with_timeout(store.get(&key, PROBE_READ_BYTES_MAX)).await.map(|found| found.map(|(bytes, _)| bytes)),
            ));
            true
        }
        Err(error) => {
            checks.push(write_failure_check(&error));
            false
        }
    };
    // Remove the object even if the write failed, because the request may have arrived. Report only the removal of an
    // object that is known to exist.
    match (probe.remove().await, is_written) {
        (Ok(()), true) => checks.push(Check::ok(Area::Remote, "objects can be removed")),
        (Err(error), true) => checks.push(
            Check::problem(Area::Remote, &error)
                .with_detail(&format!("`evict` will fail, too; remove the object {key} from the remote")),
        ),
        (_, false) => {}
    }
    is_written
}

/// Returns a warning for a missing permission, which is normal for a reader, and a problem for any other error.
fn write_failure_check(error: &Error) -> Check {
    if error.kind() == ErrorKind::Unauthorized {
        let message = "objects cannot be written: artifacts from origins are cached on this disk only, and put fails";
        let fix = format!(
            "grant s3:PutObject (`modelcache doctor --iam-policy writer` prints the policy), or set {} if the remote \
             is meant to be read-only",
            REMOTE_MODE.set_to("ro")
        );
        return Check::warning(Area::Remote, message, fix).with_detail(error.message());
    }
    Check::problem(Area::Remote, error)
}

/// Reports support for conditional writes from the result of a second create-only write of the same object.
fn conditional_write_check(second: Result<PutOutcome>) -> Check {
    match second {
        Ok(PutOutcome::ConditionFailed) => Check::ok(Area::Remote, "conditional writes are supported"),
        Ok(PutOutcome::Done(_) | PutOutcome::ConditionUnsupported) => Check::warning(
            Area::Remote,
            "conditional writes are not supported: concurrent writers of one artifact may conflict or upload twice",
            "publish an artifact from one machine at a time, or use a store that supports If-None-Match",
        ),
        Err(error) => Check::problem(Area::Remote, &error),
    }
}

/// Compares the bytes read from the probe object with the bytes written.
fn read_back_check(read: Result<Option<Bytes>>) -> Check {
    match read {
        Ok(Some(bytes)) if bytes == PROBE_CONTENT => Check::ok(Area::Remote, "objects can be read"),
        Ok(Some(_)) => Check::problem(
            Area::Remote,
            &Error::corrupt("an object that was just written was read with other bytes")
                .hint("a proxy or the store alters the content: check both"),
        ),
        Ok(None) => Check::problem(
            Area::Remote,
            &Error::new(ErrorKind::Unauthorized, "an object that was just written cannot be read")
                .hint("grant s3:GetObject; `modelcache doctor --iam-policy reader` prints the policy"),
        ),
        Err(error) => Check::problem(Area::Remote, &error),
    }
}

/// The probe object. Dropping it removes the object in the background.
struct ProbeObject {
    store: Arc<Store>,
    key: Option<Path>,
}

impl ProbeObject {
    async fn remove(&mut self) -> Result<()> {
        let Some(key) = self.key.clone() else { return Ok(()) };
        let removed = with_timeout(remove(&self.store, &key)).await;
        self.key = None;
        removed
    }
}

impl Drop for ProbeObject {
    fn drop(&mut self) {
        let (Some(key), Ok(runtime)) = (self.key.take(), tokio::runtime::Handle::try_current()) else { return };
        let store = self.store.clone();
        runtime.spawn(async move {
            let _ = remove(&store, &key).await;
        });
    }
}

/// Removes the object and, if the remote is a folder, the folder that was created for it.
async fn remove(store: &Store, key: &Path) -> Result<()> {
    let removed = store.delete(key).await;
    // The folder is not empty while another `doctor` runs. That one removes the folder.
    store.backend().remove_empty_folders(&store.key(PROBE_FOLDER)?, 0).await;
    removed
}
