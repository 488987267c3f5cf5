//! Moving bytes: trying again, and pouring sources into staging.

mod buffer;
mod pour;
mod retry;

pub(crate) use pour::{PourFile, Poured, Pourer, blocking};
pub(crate) use retry::within;
pub use retry::{Attempts, Retry};
