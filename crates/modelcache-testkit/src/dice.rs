//! Random numbers from a seed that is printed, so that a failure can be repeated.

use crate::content::word_at;

/// A sequence of pseudo-random numbers that depends only on the seed.
#[derive(Debug, Clone)]
pub struct Dice {
    seed: u64,
    drawn: u64,
}

impl Dice {
    /// Reads the seed from the environment variable `name`, or picks a new one. Prints it on standard error.
    #[allow(clippy::print_stderr, reason = "without its seed a failure cannot be repeated")]
    pub fn from_env(name: &str) -> Self {
        let given = std::env::var(name).ok().and_then(|seed| seed.parse().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let seed = given.unwrap_or(u64::from(now.subsec_nanos()) ^ (u64::from(std::process::id()) << 32));
        eprintln!("seed: {name}={seed}");
        Self::new(seed)
    }

    /// Starts the sequence of this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    /// Returns the seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Returns an independent sequence for the `index`-th of several concurrent users.
    pub fn split(&self, index: u64) -> Self {
        Self::new(word_at(self.seed, u64::MAX - 1 - index))
    }

    /// Returns a number below `end`, or 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.drawn += 1;
        word_at(self.seed, self.drawn).checked_rem(end).unwrap_or(0)
    }

    /// Returns true with a probability of `of` percent.
    pub fn percent(&mut self, of: u64) -> bool {
        self.below(100) < of
    }

    /// Returns one of `items`. Panics if `items` is empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let index = self.below(items.len() as u64);
        &items[usize::try_from(index).expect("an index fits")]
    }

    /// Shuffles `items`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1);
            items.swap(last, usize::try_from(other).expect("an index fits"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_row() {
        let row = |seed| {
            let mut dice = Dice::new(seed);
            std::iter::repeat_with(|| dice.below(1000)).take(20).collect::<Vec<_>>()
        };
        assert_eq!(row(1), row(1));
        assert_ne!(row(1), row(2));
        let mut items: Vec<u32> = (0..50).collect();
        Dice::new(3).shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>(), "nothing is lost");
    }
}
