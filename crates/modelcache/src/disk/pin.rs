//! Pins: an operator's lasting protection of an artifact against eviction, in a file beside its manifest.
//!
//! A pin is written under the shared lease, after the manifest was read, so that no eviction runs at the same time. An
//! expired pin has no effect. A pin that cannot be read protects the artifact.

use super::files;
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::{Disk, holders};
use crate::error::{Error, Result, Tier};
use crate::key::ArtifactKey;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Maximum length of a pin file in bytes.
const PIN_BYTES_MAX: u64 = 64 << 10;

/// Protects an artifact against eviction until it expires or is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// When the pin was set, in seconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_unix: Option<u64>,
    /// When the pin expires, in seconds since the Unix epoch; `None`: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_unix: Option<u64>,
    /// The user or system that set the pin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// The reason, in free text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Pin {
    /// Returns the time of expiry; `None` if the pin never expires.
    pub fn until(&self) -> Option<SystemTime> {
        self.until_unix.and_then(calendar_time)
    }

    /// Returns the time at which the pin was set, if recorded.
    pub fn since(&self) -> Option<SystemTime> {
        self.since_unix.and_then(calendar_time)
    }

    fn is_active_at(&self, now: SystemTime) -> bool {
        self.until().is_none_or(|until| now < until)
    }
}

/// `pinned until 2030-01-01T00:00:00Z by ops@host: reason`
impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("pinned")?;
        if let Some(until) = self.until() {
            write!(f, " until {}", humantime::format_rfc3339_seconds(until))?;
        }
        if let Some(by) = &self.by {
            write!(f, " by {by}")?;
        }
        match &self.reason {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

/// Converts seconds since the Unix epoch to a time; `None` beyond the year 9999, which RFC 3339 cannot express.
fn calendar_time(seconds: u64) -> Option<SystemTime> {
    const YEAR_10000: u64 = 253_402_300_800;
    (seconds < YEAR_10000).then(|| UNIX_EPOCH + Duration::from_secs(seconds))
}

impl Disk {
    /// Returns the pin of the artifact in `dir`; `None` if there is none or it has expired.
    pub(crate) fn pin_in(&self, dir: &ArtifactDir) -> Result<Option<Pin>> {
        let bytes = match files::read_small(&dir.pin(), PIN_BYTES_MAX) {
            Ok(None) => return Ok(None),
            Ok(Some(bytes)) => bytes,
            Err(error) => {
                tracing::warn!(%error, "a pin cannot be read; its artifact stays protected");
                return Ok(Some(Pin::default()));
            }
        };
        // A damaged file counts as a pin without expiry.
        let pin: Pin = serde_json::from_slice(&bytes).unwrap_or_default();
        Ok(Some(pin).filter(|pin| pin.is_active_at(SystemTime::now())))
    }

    /// Sets the pin of `key`, replacing an existing one.
    pub(crate) fn pin(&self, key: &ArtifactKey, pin: &Pin) -> Result<()> {
        self.ensure_writable()?;
        let dir = self.layout().artifact(key);
        let _lease = self.lease_existing(key, &dir)?;
        let mut bytes = serde_json::to_vec(pin).unwrap_or_default();
        bytes.push(b'\n');
        files::replace(&dir.pin(), &bytes, &self.layout().stagings())
    }

    /// Removes the pin of `key`, and returns it unless it had expired.
    pub(crate) fn unpin(&self, key: &ArtifactKey) -> Result<Option<Pin>> {
        self.ensure_writable()?;
        let dir = self.layout().artifact(key);
        let _lease = self.lease_existing(key, &dir)?;
        let pin = self.pin_in(&dir)?;
        files::remove_file(&dir.pin())?;
        files::sync_dir(dir.path())?;
        Ok(pin)
    }

    /// Takes a shared lease on an artifact that has at least one held file, or that lists no files.
    ///
    /// # Errors
    /// `NotFound` if the artifact is not on this disk.
    fn lease_existing(&self, key: &ArtifactKey, dir: &ArtifactDir) -> Result<FileLock> {
        let absent = || {
            let hint = format!("`modelcache ls` lists what is there; `modelcache get '{key}'` downloads it");
            Err(Error::not_found("it is not on this disk").artifact(key).tier(Tier::Disk).hint(hint))
        };
        if files::stat(&dir.manifest())?.is_none() {
            return absent();
        }
        let lease = self.wait_for_lease(dir)?;
        // Read the manifest under the lease: an eviction may have removed it before the lease was taken.
        match self.read_manifest(dir)? {
            Some(manifest) if manifest.files.is_empty() || manifest.files.values().any(|e| e.held.is_some()) => {
                Ok(lease)
            }
            _ => absent(),
        }
    }

    /// Returns the processes that hold a lease on the artifact; empty if the kernel does not report them.
    pub(crate) fn lease_holders(&self, dir: &ArtifactDir) -> Vec<Holder> {
        holders::of_flock(&self.layout().lease_lock(dir))
    }
}

/// A process that holds a lease, or fills an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// The process id, in the PID namespace of the process that reads it.
    pub pid: u32,
    /// The command name of the process, if it can be read.
    pub command: Option<String>,
}

/// `process 123 (python3)`
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)?;
        match &self.command {
            Some(command) => write!(f, " ({command})"),
            None => Ok(()),
        }
    }
}

/// The reason why an artifact was not evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeepReason {
    /// These processes hold a lease on it; empty if the kernel does not report them.
    Leased(Vec<Holder>),
    /// It is pinned.
    Pinned(Pin),
    /// It was used after it had been chosen as a victim.
    JustUsed,
    /// Every file has a link outside the cache, so no byte would become free.
    LinkedOutside,
    /// Locks do not exclude other processes on this filesystem, and it was used within the last hour.
    UsedLately,
    /// No other tier is known to have it.
    OnlyCopy,
    /// Another user put entries into it that this user cannot remove.
    NotRemovable,
}

impl KeepReason {
    /// Returns true if the obstacle may go away by itself.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Leased(_) | Self::JustUsed)
    }

    /// Returns the stable name that `--json` output uses.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Leased(_) => "leased",
            Self::Pinned(_) => "pinned",
            Self::JustUsed => "just_used",
            Self::LinkedOutside => "linked_outside",
            Self::UsedLately => "used_lately",
            Self::OnlyCopy => "only_copy",
            Self::NotRemovable => "not_removable",
        }
    }
}

/// `in use by process 123 (python3)`, `pinned until … by …: reason`, `just used`, `linked outside the cache …`
impl fmt::Display for KeepReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leased(holders) if holders.is_empty() => f.write_str("in use"),
            Self::Leased(holders) => {
                let names: Vec<_> = holders.iter().map(Holder::to_string).collect();
                write!(f, "in use by {}", names.join(", "))
            }
            Self::Pinned(pin) => pin.fmt(f),
            Self::JustUsed => f.write_str("just used"),
            Self::LinkedOutside => f.write_str("linked outside the cache, so that no byte would become free"),
            Self::UsedLately => f.write_str("perhaps in use: it was used lately, and locks do not work here"),
            Self::OnlyCopy => f.write_str("the only copy: it was not uploaded to a remote"),
            Self::NotRemovable => f.write_str("not removable: another user put entries into its folder"),
        }
    }
}
