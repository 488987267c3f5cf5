//! Rows for our Python package, compared with the command line and with its alternatives in Python.
//!
//! Our scripts run in the interpreter of the peers, with the settings of our program.

pub(crate) mod cold;
pub(crate) mod open;
pub(crate) mod tensors;
pub(crate) mod warm;
