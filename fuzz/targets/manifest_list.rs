//! The list inside a manifest, without the checksum around it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::manifest_list(bytes));
