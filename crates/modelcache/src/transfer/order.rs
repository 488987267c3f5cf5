//! Order in which the parts of a file are requested; it differs from node to node.
//!
//! If all nodes of a fleet start together and use one order, they all read the same part at the same time. A random
//! order spreads the load over all parts. Parts that are verified by a ladder may be requested in any order. A file
//! that is hashed in order is requested nearly sequentially. Parts that a reader waits for come before this order
//! (`partial_file.rs`). Groups of consecutive parts stay together, because one request may cover several of them.

use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::ops::Range;

/// Number of consecutive groups that are shuffled among themselves if the file is hashed in order.
const SHUFFLE_WINDOW: usize = 8;

/// The order in which the parts of one file are requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Random over the whole file.
    Any,
    /// Random within consecutive windows of [`SHUFFLE_WINDOW`] groups.
    Windowed,
    /// One after the other. Used if several files share the connections, so that each part is hashed on arrival.
    Sequential,
}

/// The parts of a file that have not been requested yet.
#[derive(Debug)]
pub(super) struct PartQueue {
    /// Parts in the order of requests. [`peek`](Self::peek) skips those that are no longer queued.
    request_order: std::vec::IntoIter<u64>,
    /// The parts that are still queued.
    parts: BTreeSet<u64>,
}

impl PartQueue {
    /// Creates a queue of the parts `0..count`. Each `group_parts` consecutive parts stay together.
    pub(super) fn new(count: u64, group_parts: u64, order: Order) -> Self {
        let groups = ordered(count.div_ceil(group_parts), order);
        let parts = groups.into_iter().flat_map(|index| index * group_parts..((index + 1) * group_parts).min(count));
        Self { request_order: parts.collect::<Vec<_>>().into_iter(), parts: (0..count).collect() }
    }

    /// Returns the number of parts that are still queued.
    pub(super) fn len(&self) -> usize {
        self.parts.len()
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
        while let Some(part) = self.request_order.as_slice().first() {
            // Skip parts that were requested out of order.
            if self.parts.contains(part) {
                return Some(*part);
            }
            self.request_order.next();
        }
        None
    }

    /// Removes the run of queued parts that begins with `first`, and returns their indices. One request covers them.
    /// The run has at most `count_max` parts and ends before a gap. A part for which `alone` is true is a run of its
    /// own.
    pub(super) fn take_run(&mut self, first: u64, count_max: u64, alone: impl Fn(u64) -> bool) -> Range<u64> {
        let mut end = first + 1;
        while !alone(first) && end - first < count_max && self.parts.contains(&end) && !alone(end) {
            end += 1;
        }
        for part in first..end {
            self.parts.remove(&part);
        }
        first..end
    }
}

/// Returns the groups `0..count`, ordered by `order`.
fn ordered(count: u64, order: Order) -> Vec<u64> {
    let mut groups: Vec<u64> = (0..count).collect();
    match order {
        Order::Any => groups.shuffle(&mut rand::rng()),
        Order::Windowed => groups.chunks_mut(SHUFFLE_WINDOW).for_each(|window| window.shuffle(&mut rand::rng())),
        Order::Sequential => {}
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_requested_out_of_order_is_not_requested_again() {
        let mut queue = PartQueue::new(5, 1, Order::Sequential);
        assert_eq!(queue.first_in(1..9), Some(1));
        [1, 0].into_iter().for_each(|part| assert_eq!(queue.take_run(part, 1, |_| false), part..part + 1));
        assert_eq!((queue.first_in(0..2), queue.first_in(0..3)), (None, Some(2)));
        let rest = std::iter::from_fn(|| queue.peek().map(|part| queue.take_run(part, 1, |_| false).start));
        assert_eq!(rest.collect::<Vec<_>>(), [2, 3, 4]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_run_ends_before_a_gap_and_before_a_part_that_must_be_alone() {
        let mut queue = PartQueue::new(9, 4, Order::Sequential);
        let alone = |part| part == 7;
        assert_eq!(queue.take_run(2, 1, alone), 2..3);
        assert_eq!(queue.take_run(0, 4, alone), 0..2);
        assert_eq!(queue.take_run(3, 2, alone), 3..5);
        assert_eq!(queue.take_run(5, 4, alone), 5..7);
        assert_eq!(queue.take_run(7, 4, alone), 7..8);
        assert_eq!((queue.peek(), queue.len()), (Some(8), 1));
    }

    #[test]
    fn every_group_is_queued_once_and_shuffled_within_its_window() {
        for order in [Order::Any, Order::Windowed, Order::Sequential] {
            let (one, other) = (ordered(1000, order), ordered(1000, order));
            assert_eq!(one == other, order == Order::Sequential, "{order:?}");
            let mut sorted = one.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, ordered(1000, Order::Sequential));
            let displacement = (0..).zip(&one).map(|(at, part): (u64, _)| at.abs_diff(*part)).max();
            let is_bounded = displacement < Some(SHUFFLE_WINDOW as u64);
            assert_eq!(is_bounded, order != Order::Any, "{order:?}: displaced by {displacement:?}");
        }
    }
}
