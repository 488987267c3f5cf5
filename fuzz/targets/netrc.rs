//! Netrc files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::credentials::Netrc;

fuzz_target!(|text: &str| {
    if let Ok(netrc) = Netrc::parse(text) {
        let _ = format!("{netrc:?}");
    }
});
