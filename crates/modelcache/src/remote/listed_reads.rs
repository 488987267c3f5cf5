//! Reads of objects of other tools, on condition that they are still the listed ones.
//!
//! If the digest of an object is known, it decides, and ETags need not agree. Otherwise all ranges of an object are
//! read with one ETag. A store may contradict itself: list one ETag and serve another, or have other ETags on each back
//! end. If a listing still has the listed ETag, the object was not replaced, and the first ETag that is served is used
//! for the whole object.

use super::store::{ReadBody, Store, etag_differs};
use super::unmanaged::ADD_CHECKSUMS_HINT;
use crate::error::{Error, Result, Tier};
use crate::manifest::ObjectIdentity;
use crate::mutex::Mutex;
use crate::printable;
use crate::source::Body;
use object_store::path::Path;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most requests for one range, until one is answered with the wanted ETag. Two back ends that answer in turn do so
/// within a few requests. Two that answer at random fail to do so with a probability of about 2^-8.
const ATTEMPTS_MAX: usize = 8;

/// The ETags with which the objects of one listing are read.
#[derive(Debug, Default)]
pub(crate) struct ListedReads {
    /// The ETag of the first response for each object.
    served_etags: Mutex<HashMap<Path, Option<String>>>,
    saw_other_etag: AtomicBool,
    /// True once the warning about a store that contradicts itself was logged.
    is_warned: AtomicBool,
}

impl ListedReads {
    /// Returns true if an object was read although its ETag differed from the listed one, because its digest is known.
    pub(crate) fn saw_other_etag(&self) -> bool {
        self.saw_other_etag.load(Ordering::Relaxed)
    }

    /// Reads a range of an object. Returns `None` if the object was replaced since it was `listed`.
    ///
    /// # Errors
    /// `Unavailable` if the answers of the store disagree about the ETag, and no digest is known.
    pub(super) async fn read(
        &self,
        store: &Store,
        key: &Path,
        range: Range<u64>,
        listed: &ObjectIdentity,
        has_digest: bool,
    ) -> Result<Option<Body>> {
        if has_digest {
            return match store.read(key, range, &ObjectIdentity { etag: None, ..listed.clone() }).await? {
                ReadBody::Stream { start, etag, stream } => {
                    if differs(listed.etag.as_deref(), etag.as_deref()) {
                        self.saw_other_etag.store(true, Ordering::Relaxed);
                    }
                    Ok(Some(Body { start, stream }))
                }
                ReadBody::Changed => Ok(None),
            };
        }
        for attempt in 0..ATTEMPTS_MAX {
            let wanted_etag = self.served_etag(key).unwrap_or_else(|| listed.etag.clone());
            let wanted = ObjectIdentity { etag: wanted_etag, ..listed.clone() };
            if let ReadBody::Stream { start, etag, stream } = store.read(key, range.clone(), &wanted).await?
                && self.agrees(key, etag)
            {
                return Ok(Some(Body { start, stream }));
            }
            if attempt == 0 && !is_still_listed(store, key, listed).await? {
                return Ok(None);
            }
            // The store lists one ETag and serves another: take over the one that it serves.
            if self.served_etag(key).is_none() {
                let first_byte = 0..listed.object_bytes.min(1);
                let unconditional = ObjectIdentity { etag: None, ..listed.clone() };
                let ReadBody::Stream { etag, .. } = store.read(key, first_byte, &unconditional).await? else {
                    return Ok(None);
                };
                if !self.is_warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        %key,
                        listed = listed.etag,
                        read = etag,
                        "the store lists another ETag than it serves, and no checksum is known; the ETag that it serves is used"
                    );
                }
                self.agrees(key, etag);
            }
        }
        let shown = |etag: Option<String>| etag.as_deref().map_or_else(|| "none".into(), printable::quote);
        let (listed, read) = (shown(listed.etag.clone()), shown(self.served_etag(key).flatten()));
        Err(Error::unavailable(format!(
            "the answers of the store disagree about the ETag of {key} (listed {listed}, read {read}, then others), and \
             no checksum is known"
        ))
        .transient(false)
        .tier(Tier::Remote)
        .hint(ADD_CHECKSUMS_HINT))
    }

    fn served_etag(&self, key: &Path) -> Option<Option<String>> {
        self.served_etags.lock().get(key).cloned()
    }

    /// Returns true if `etag` is the ETag with which the object is read. The first one is recorded.
    fn agrees(&self, key: &Path, etag: Option<String>) -> bool {
        let mut served_etags = self.served_etags.lock();
        let served_etag = served_etags.entry(key.clone()).or_insert_with(|| etag.clone());
        !differs(served_etag.as_deref(), etag.as_deref())
    }
}

/// Returns true if both ETags are known and differ.
fn differs(one: Option<&str>, other: Option<&str>) -> bool {
    one.is_some_and(|one| etag_differs(one, other))
}

/// Returns true if a new listing has the object with the `listed` ETag and size.
pub(super) async fn is_still_listed(store: &Store, key: &Path, listed: &ObjectIdentity) -> Result<bool> {
    let same = |now: &ObjectIdentity| {
        now.object_bytes == listed.object_bytes && !differs(listed.etag.as_deref(), now.etag.as_deref())
    };
    Ok(store.listed(key).await?.flatten().is_some_and(|now| same(&now)))
}
