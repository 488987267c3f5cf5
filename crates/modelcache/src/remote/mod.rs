//! The far tier: an object store.
