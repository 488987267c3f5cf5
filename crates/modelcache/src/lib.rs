//! Tiered cache.
