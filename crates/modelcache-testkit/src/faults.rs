//! Counted, aimed faults, the same for every stand-in.
//!
//! A [`Fault`] says what goes wrong, for which requests and how often; [`Faults`] holds the armed ones of a stand-in.
//! The first armed fault that fits a request takes it and is counted down.
//!
//! Surprise: without [`Fault::times`] a fault stays until [`Faults::clear`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::serve::lock;

/// One thing that goes wrong: what (`K`), where it is aimed and how often it strikes.
#[derive(Clone, Debug)]
pub struct Fault<K> {
    kind: K,
    left: Option<u64>,
    on: Option<String>,
    method: Option<String>,
    skip: u64,
}

impl<K> Fault<K> {
    /// A fault of this kind that strikes every request, for ever.
    pub fn new(kind: K) -> Self {
        Self { kind, left: None, on: None, method: None, skip: 0 }
    }

    /// Strikes `count` times and is then spent.
    pub fn times(mut self, count: u64) -> Self {
        self.left = Some(count);
        self
    }

    /// Strikes the next fitting request only.
    pub fn once(self) -> Self {
        self.times(1)
    }

    /// Lets the first `count` fitting requests pass unharmed.
    pub fn after_skipping(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }

    /// Strikes only where the decoded path contains `part`.
    pub fn on(mut self, part: impl Into<String>) -> Self {
        self.on = Some(part.into());
        self
    }

    /// Strikes only requests with this method, written as on the wire (`GET`).
    pub fn method(mut self, method: impl Into<String>) -> Self {
        self.method = Some(method.into());
        self
    }

    fn fits(&self, method: &str, subject: &str) -> bool {
        self.method.as_ref().is_none_or(|wanted| wanted == method)
            && self.on.as_ref().is_none_or(|part| subject.contains(part.as_str()))
    }
}

/// How often one armed fault has struck.
#[derive(Clone, Debug, Default)]
pub struct Hits(Arc<AtomicU64>);

impl Hits {
    /// The number of strikes so far.
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
    /// Arms a fault; the answer counts its strikes. Faults armed earlier are looked at first.
    pub fn add(&self, fault: Fault<K>) -> Hits {
        let hits = Hits::default();
        lock(&self.armed).push((fault, hits.clone()));
        hits
    }

    /// Disarms all of them.
    pub fn clear(&self) {
        lock(&self.armed).clear();
    }

    /// Takes one strike from the first fault that fits and whose kind `wanted` accepts.
    pub(crate) fn strike(&self, method: &str, subject: &str, wanted: impl Fn(&K) -> bool) -> Option<K> {
        let mut armed = lock(&self.armed);
        for (fault, hits) in armed.iter_mut() {
            if fault.left == Some(0) || !wanted(&fault.kind) || !fault.fits(method, subject) {
                continue;
            }
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
    fn a_fault_strikes_as_often_as_it_was_told() {
        let faults = Faults::default();
        let hits = faults.add(Fault::new('a').times(2).on("/x").method("GET").after_skipping(1));
        let strike = |method, subject| faults.strike(method, subject, |_| true);
        assert_eq!(strike("GET", "/y"), None);
        assert_eq!(strike("PUT", "/x"), None);
        assert_eq!(strike("GET", "/x"), None, "skipped");
        assert_eq!(strike("GET", "/x/1"), Some('a'));
        assert_eq!(strike("GET", "/x/2"), Some('a'));
        assert_eq!(strike("GET", "/x/3"), None, "spent");
        assert_eq!(hits.count(), 2);
    }
}
