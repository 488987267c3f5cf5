//! Memory use of reading the list inside a manifest: less than four times its bytes, the list included.
#![no_main]

#[path = "../../crates/modelcache/tests/memory/counting.rs"]
mod counting;

use counting::{Counting, peak_of};
use libfuzzer_sys::fuzz_target;
use modelcache::fuzzing;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that reading may allocate regardless of the size of the list.
const BYTES_MIN: usize = 64 << 10;

fuzz_target!(|bytes: &[u8]| {
    // Inputs of libFuzzer are small. Repeating an input shows memory use that grows with it.
    let repeated = fuzzing::repeated_list(bytes);
    for list in [bytes, repeated.as_bytes()] {
        let ((), peak) = peak_of(|| fuzzing::read_manifest_list(list));
        assert!(list.len() + peak <= 4 * list.len() + BYTES_MIN, "{} bytes take {peak}", list.len());
    }
});
