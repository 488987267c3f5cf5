//! The list inside a manifest: reading it never takes four times its bytes, itself included.
#![no_main]

#[path = "../../crates/modelcache/tests/memory/counting.rs"]
mod counting;

use counting::{Counting, peak_of};
use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What reading may take in any case.
const BYTES_MIN: usize = 64 << 10;

fuzz_target!(|bytes: &[u8]| {
    // libFuzzer's inputs are small, what must not grow with them is not: the same again and again shows it.
    let repeated = fuzzing::repeated_list(bytes);
    for list in [bytes, repeated.as_bytes()] {
        let ((), peak) = peak_of(|| fuzzing::read_manifest_list(list));
        assert!(list.len() + peak <= 4 * list.len() + BYTES_MIN, "{} bytes take {peak}", list.len());
    }
});
