//! Order in which the parts of a file are requested; it differs from node to node.
//!
//! If all nodes of a fleet start together and use one order, they all read the same part at the same time. A random
//! order spreads the load over all parts. Parts that are verified by a ladder may be requested in any order. A file
//! that is hashed in order is requested nearly sequentially. Parts that a reader waits for come before this order
//! (`partial_file.rs`).

use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::ops::Range;

/// Number of consecutive parts that are shuffled among themselves if the file is hashed in order.
const SHUFFLE_WINDOW: usize = 8;

/// The order in which the parts of one file are requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Random over the whole file.
    Any,
    /// Random within consecutive windows of [`SHUFFLE_WINDOW`] parts.
    Windowed,
    /// One after the other. Used if several files share the connections, so that each part is hashed on arrival.
    Sequential,
}

/// The parts of a file that have not been requested yet.
#[derive(Debug)]
pub(super) struct PartQueue {
    /// All parts in order. Parts that were requested out of order are still in it.
    in_order: std::vec::IntoIter<u64>,
    /// The parts that are still queued.
    parts: BTreeSet<u64>,
}

impl PartQueue {
    /// Creates a queue of the parts `0..count`.
    pub(super) fn new(count: u64, order: Order) -> Self {
        Self { in_order: parts(count, order).into_iter(), parts: (0..count).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Returns the lowest part in the range `parts` that is still queued.
    pub(super) fn first_in(&self, parts: Range<u64>) -> Option<u64> {
        self.parts.range(parts).next().copied()
    }

    /// Returns the next part in order without removing it.
    pub(super) fn peek(&mut self) -> Option<u64> {
        while let Some(part) = self.in_order.as_slice().first() {
            // Skip parts that were requested out of order.
            if self.parts.contains(part) {
                return Some(*part);
            }
            self.in_order.next();
        }
        None
    }

    /// Removes `part`, which is being requested.
    pub(super) fn mark_requested(&mut self, part: u64) {
        self.parts.remove(&part);
    }
}

/// Returns the parts `0..count`, ordered by `order`.
fn parts(count: u64, order: Order) -> Vec<u64> {
    let mut parts: Vec<u64> = (0..count).collect();
    match order {
        Order::Any => parts.shuffle(&mut rand::rng()),
        Order::Windowed => parts.chunks_mut(SHUFFLE_WINDOW).for_each(|window| window.shuffle(&mut rand::rng())),
        Order::Sequential => {}
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_requested_out_of_order_is_not_requested_again() {
        let mut queue = PartQueue::new(5, Order::Sequential);
        assert_eq!(queue.first_in(1..9), Some(1));
        [1, 0].into_iter().for_each(|part| queue.mark_requested(part));
        assert_eq!((queue.first_in(0..2), queue.first_in(0..3)), (None, Some(2)));
        let rest = std::iter::from_fn(|| queue.peek().inspect(|part| queue.mark_requested(*part)));
        assert_eq!(rest.collect::<Vec<_>>(), [2, 3, 4]);
        assert!(queue.is_empty());
    }

    #[test]
    fn every_part_is_queued_once_and_shuffled_within_its_window() {
        for order in [Order::Any, Order::Windowed, Order::Sequential] {
            let (one, other) = (parts(1000, order), parts(1000, order));
            assert_eq!(one == other, order == Order::Sequential, "{order:?}");
            let mut sorted = one.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, parts(1000, Order::Sequential));
            let displacement = (0..).zip(&one).map(|(at, part): (u64, _)| at.abs_diff(*part)).max();
            let is_bounded = displacement < Some(SHUFFLE_WINDOW as u64);
            assert_eq!(is_bounded, order != Order::Any, "{order:?}: displaced by {displacement:?}");
        }
    }
}
