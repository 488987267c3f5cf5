//! Claims on a remote.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::claim(bytes));
