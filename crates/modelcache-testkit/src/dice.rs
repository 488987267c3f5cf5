//! Chance that can be repeated: numbers from a seed, which is printed.

use crate::content::word_at;

/// A row of numbers that depends on the seed alone.
#[derive(Debug, Clone)]
pub struct Dice {
    seed: u64,
    drawn: u64,
}

impl Dice {
    /// With the seed of the environment variable `name`, else a new one; printed on standard error.
    #[allow(clippy::print_stderr, reason = "without its seed a failure cannot be repeated")]
    pub fn from_env(name: &str) -> Self {
        let given = std::env::var(name).ok().and_then(|seed| seed.parse().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let seed = given.unwrap_or(u64::from(now.subsec_nanos()) ^ (u64::from(std::process::id()) << 32));
        eprintln!("seed: {name}={seed}");
        Self::new(seed)
    }

    /// With this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Dice of their own for the `index`-th of several that draw at the same time.
    pub fn split(&self, index: u64) -> Self {
        Self::new(word_at(self.seed, u64::MAX - 1 - index))
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.drawn += 1;
        word_at(self.seed, self.drawn).checked_rem(end).unwrap_or(0)
    }

    /// Whether something happens that happens `of` times in a hundred.
    pub fn percent(&mut self, of: u64) -> bool {
        self.below(100) < of
    }

    /// One of `items`, which are not empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let index = self.below(items.len() as u64);
        &items[usize::try_from(index).expect("an index fits")]
    }

    /// Puts `items` into another order.
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
