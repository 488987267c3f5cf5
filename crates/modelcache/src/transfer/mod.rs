//! Moving bytes: trying again, and pouring a source into staging.

mod retry;

pub use retry::Retry;
