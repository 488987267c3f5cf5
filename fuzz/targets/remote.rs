//! What lies on a remote beside manifests: claims.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::claim(bytes));
