//! The limit on concurrent requests at the end of the last large download from each endpoint, remembered in this
//! directory. If the record is lost, the next download searches for the limit again.

use super::Disk;
use super::files;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Maximum number of endpoints that are remembered. The one that was used least recently is forgotten first.
const ENDPOINTS_MAX: usize = 64;
/// Maximum size of the record, in bytes. A larger one is not read.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// The limit on concurrent requests that a download found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FoundLimit {
    /// Number of concurrent requests.
    pub(crate) limit: usize,
    /// True if a higher limit may be much better, because slow start had not ended.
    pub(crate) is_slow_start: bool,
}

/// The content of `locks/request-limits`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct StoredLimits {
    /// The least recently used endpoint first.
    endpoints: Vec<(String, FoundLimit)>,
}

impl Disk {
    /// Returns the limit that the last download from `endpoint` found; `None` if it is not remembered.
    pub(crate) fn remembered_request_limit(&self, endpoint: &str) -> Option<FoundLimit> {
        let remembered = self.stored_limits().endpoints.into_iter().find(|(known, _)| known == endpoint);
        remembered.map(|(_, found)| found)
    }

    /// Remembers the limit for `endpoint`. If two processes write at the same time, the update of one is lost.
    pub(crate) fn remember_request_limit(&self, endpoint: &str, found: FoundLimit) -> Result<()> {
        self.ensure_writable()?;
        let mut stored = self.stored_limits();
        if stored.endpoints.last().is_some_and(|(known, same)| known == endpoint && *same == found) {
            return Ok(());
        }
        stored.endpoints.retain(|(known, _)| known != endpoint);
        stored.endpoints.push((endpoint.to_owned(), found));
        let surplus = stored.endpoints.len().saturating_sub(ENDPOINTS_MAX);
        stored.endpoints.drain(..surplus);
        let bytes = serde_json::to_vec(&stored).unwrap_or_default();
        files::replace_hint(&self.layout().request_limits(), &bytes, &self.layout().stagings())
    }

    fn stored_limits(&self) -> StoredLimits {
        let bytes = files::read_small(&self.layout().request_limits(), RECORD_BYTES_MAX).ok().flatten();
        bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};

    #[test]
    fn the_last_limit_of_a_bounded_number_of_endpoints_is_remembered() {
        let folder = tempfile::tempdir().expect("folder");
        let disk =
            Disk::open(folder.path(), ByteBound::Bytes(1 << 30), ByteBound::Bytes(0), Sharing::Off).expect("opens");
        assert_eq!(disk.remembered_request_limit("s3://models"), None);
        let found = |limit| FoundLimit { limit, is_slow_start: limit > 100 };
        for limit in [100, 256] {
            disk.remember_request_limit("s3://models", found(limit)).expect("writes");
            assert_eq!(disk.remembered_request_limit("s3://models"), Some(found(limit)));
        }
        (0..ENDPOINTS_MAX).for_each(|at| disk.remember_request_limit(&at.to_string(), found(at)).expect("writes"));
        assert_eq!(disk.remembered_request_limit("s3://models"), None, "the oldest is forgotten");
        assert_eq!(disk.remembered_request_limit("0"), Some(found(0)));
        std::fs::write(disk.layout().request_limits().full(), "damaged").expect("writes");
        assert_eq!(disk.remembered_request_limit("0"), None);
        disk.remember_request_limit("0", found(1)).expect("replaces a damaged record");
    }
}
