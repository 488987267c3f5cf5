//! Detection of the format of a file by its first bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::format::Format;

fuzz_target!(|bytes: &[u8]| {
    let format = Format::of(bytes, bytes.len() as u64);
    let _ = (Format::of(bytes, u64::MAX), format.name().map(Format::parse));
});
