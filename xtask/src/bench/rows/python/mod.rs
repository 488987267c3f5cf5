//! Our Python package, in an interpreter: beside the command line, and beside what Python programs would use instead.
//!
//! Each script of ours is run by the interpreter that runs the peers, with the settings that our program gets.

pub(in crate::bench) mod cold;
pub(in crate::bench) mod open;
pub(in crate::bench) mod tensors;
pub(in crate::bench) mod warm;
