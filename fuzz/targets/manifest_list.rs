//! The list inside a manifest, past the checksum that guards it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::manifest_list(bytes));
