//! The table of settings: one row each, from which flags, environment, file and documentation follow.
