//! Listings of an S3 server.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

fuzz_target!(|text: &str| fuzzing::listing(text));
