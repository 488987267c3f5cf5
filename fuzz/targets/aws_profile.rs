//! AWS configuration files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

fuzz_target!(|text: &str| fuzzing::aws_profile(text));
