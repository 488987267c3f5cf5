//! Checksum files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::sidecar;

fuzz_target!(|text: &str| {
    let lines: Vec<_> = sidecar::lines(text).collect();
    let stated = sidecar::digest_of(text, "model.bin");
    assert!(stated.is_none_or(|digest| lines.iter().any(|line| line.digest == digest)), "digest is in no line");
});
