//! Fault injection by request, shared by all stand-ins.
//!
//! A [`Fault`] defines the failure, the requests it applies to and how often; [`Faults`] holds the armed faults of one
//! stand-in. The first armed fault that matches a request is applied to it and counted down.
//!
//! A fault without [`Fault::times`] stays armed until [`Faults::clear`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::serve::lock;

/// One fault: its kind (`K`), the requests it matches and how often it is applied.
#[derive(Clone, Debug)]
pub struct Fault<K> {
    kind: K,
    left: Option<u64>,
    on: Option<String>,
    method: Option<String>,
    skip: u64,
}

impl<K> Fault<K> {
    /// A fault of this kind that applies to every request, without limit.
    pub fn new(kind: K) -> Self {
        Self { kind, left: None, on: None, method: None, skip: 0 }
    }

    /// Applies the fault to `count` requests, then disarms it.
    pub fn times(mut self, count: u64) -> Self {
        self.left = Some(count);
        self
    }

    /// Applies the fault to the next matching request only.
    pub fn once(self) -> Self {
        self.times(1)
    }

    /// Lets the first `count` matching requests pass.
    pub fn after_skipping(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }

    /// Applies the fault only if the decoded path contains `part`. Most faults are also compared with the query.
    pub fn on(mut self, part: impl Into<String>) -> Self {
        self.on = Some(part.into());
        self
    }

    /// Applies the fault only to requests with this method, written as on the wire (`GET`).
    pub fn method(mut self, method: impl Into<String>) -> Self {
        self.method = Some(method.into());
        self
    }

    fn fits(&self, method: &str, subject: &str) -> bool {
        self.method.as_ref().is_none_or(|wanted| wanted == method)
            && self.on.as_ref().is_none_or(|part| subject.contains(part.as_str()))
    }
}

/// Counts how often one armed fault was applied.
#[derive(Clone, Debug, Default)]
pub struct Hits(Arc<AtomicU64>);

impl Hits {
    /// Returns how often the fault was applied so far.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// The armed faults of one stand-in.
#[derive(Debug)]
pub struct Faults<K> {
    armed: Mutex<Vec<(Fault<K>, Hits)>>,
}

impl<K> Default for Faults<K> {
    fn default() -> Self {
        Self { armed: Mutex::new(Vec::new()) }
    }
}

impl<K: Clone> Faults<K> {
    /// Arms a fault and returns its counter. Faults that were armed earlier take precedence.
    pub fn add(&self, fault: Fault<K>) -> Hits {
        let hits = Hits::default();
        lock(&self.armed).push((fault, hits.clone()));
        hits
    }

    /// Disarms all faults.
    pub fn clear(&self) {
        lock(&self.armed).clear();
    }

    /// Applies the first armed fault that matches the request, among the kinds that `accepts` returns true for, and
    /// returns its kind. `subject` is the text that [`Fault::on`] is compared with: the decoded path, mostly followed
    /// by the query.
    pub(crate) fn take(&self, method: &str, subject: &str, accepts: impl Fn(&K) -> bool) -> Option<K> {
        let mut armed = lock(&self.armed);
        for (fault, hits) in armed.iter_mut() {
            // A spent fault stays in the list but matches nothing.
            if fault.left == Some(0) || !accepts(&fault.kind) || !fault.fits(method, subject) {
                continue;
            }
            // A skipped request may still get a later fault.
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            fault.left = fault.left.map(|left| left - 1);
            hits.0.fetch_add(1, Ordering::SeqCst);
            return Some(fault.kind.clone());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_applies_to_the_given_number_of_requests() {
        let faults = Faults::default();
        let hits = faults.add(Fault::new('a').times(2).on("/x").method("GET").after_skipping(1));
        let strike = |method, subject| faults.take(method, subject, |_| true);
        assert_eq!(strike("GET", "/y"), None);
        assert_eq!(strike("PUT", "/x"), None);
        assert_eq!(strike("GET", "/x"), None, "skipped");
        assert_eq!(strike("GET", "/x/1"), Some('a'));
        assert_eq!(strike("GET", "/x/2"), Some('a'));
        assert_eq!(strike("GET", "/x/3"), None, "spent");
        assert_eq!(hits.count(), 2);
    }
}
