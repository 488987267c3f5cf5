//! Answers of a Hub: trees, revisions, refusals.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::hub_tree(bytes));
