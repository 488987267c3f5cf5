//! In which order the parts of a file are asked for: another one on every node.
//!
//! A fleet that starts at once and asks in one order makes every part hot in turn; at random it spreads over all of
//! them. Parts that a ladder checks may come in any order. A file that is hashed in order is asked for nearly so.

use rand::seq::SliceRandom;

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

/// The parts from 0 to `count`, in such an order.
pub(super) fn parts(count: u64, order: Order) -> Vec<u64> {
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
