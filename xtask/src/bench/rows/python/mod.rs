//! Rows for our Python package, compared with the command line and with its alternatives in Python.
//!
//! Our scripts run in the interpreter of the peers, with the settings of our program.

pub(in crate::bench) mod cold;
pub(in crate::bench) mod open;
pub(in crate::bench) mod tensors;
pub(in crate::bench) mod warm;
