//! In which order the parts of a file are asked for: another one on every node.
//!
//! A fleet that starts at once and asks in one order makes every part hot in turn; at random it spreads over all of
//! them. Parts that a ladder checks may come in any order. A file that is hashed in order is asked for nearly so. What
//! a reader waits for comes before its turn (`partial_file.rs`).

use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::ops::Range;

/// Parts among which an order may differ where the hash follows close behind.
const WINDOW: usize = 8;

/// How the parts of one file are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Any part at any time.
    Any,
    /// At random among few, on and on.
    Nearly,
    /// One after the other: several files share the connections, and each part is hashed as it comes.
    Strict,
}

/// The parts of a file that were not asked for yet.
#[derive(Debug)]
pub(super) struct PartQueue {
    in_order: std::vec::IntoIter<u64>,
    parts: BTreeSet<u64>,
}

impl PartQueue {
    /// All parts from 0 to `count`.
    pub(super) fn new(count: u64, order: Order) -> Self {
        Self { in_order: parts(count, order).into_iter(), parts: (0..count).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The first among `parts` that is left.
    pub(super) fn first_in(&self, parts: Range<u64>) -> Option<u64> {
        self.parts.range(parts).next().copied()
    }

    /// The next in order; it stays left.
    pub(super) fn peek(&mut self) -> Option<u64> {
        while let Some(part) = self.in_order.as_slice().first() {
            if self.parts.contains(part) {
                return Some(*part);
            }
            self.in_order.next();
        }
        None
    }

    /// `part` is asked for.
    pub(super) fn begin(&mut self, part: u64) {
        self.parts.remove(&part);
    }
}

/// The parts from 0 to `count`, in such an order.
fn parts(count: u64, order: Order) -> Vec<u64> {
    let mut parts: Vec<u64> = (0..count).collect();
    match order {
        Order::Any => parts.shuffle(&mut rand::rng()),
        Order::Nearly => parts.chunks_mut(WINDOW).for_each(|few| few.shuffle(&mut rand::rng())),
        Order::Strict => {}
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_before_its_turn_is_not_asked_for_again() {
        let mut left = PartQueue::new(5, Order::Strict);
        assert_eq!(left.first_in(1..9), Some(1));
        [1, 0].into_iter().for_each(|part| left.begin(part));
        assert_eq!((left.first_in(0..2), left.first_in(0..3)), (None, Some(2)));
        let rest = std::iter::from_fn(|| left.peek().inspect(|part| left.begin(*part)));
        assert_eq!(rest.collect::<Vec<_>>(), [2, 3, 4]);
        assert!(left.is_empty());
    }

    #[test]
    fn every_part_comes_once_and_orders_differ_within_their_bounds() {
        for order in [Order::Any, Order::Nearly, Order::Strict] {
            let (one, other) = (parts(1000, order), parts(1000, order));
            assert_eq!(one == other, order == Order::Strict, "{order:?}");
            let mut sorted = one.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, parts(1000, Order::Strict));
            let early = (0..).zip(&one).map(|(at, part): (u64, _)| at.abs_diff(*part)).max();
            assert_eq!(early < Some(WINDOW as u64), order != Order::Any, "{order:?} strays by {early:?}");
        }
    }
}
