//! Manifests, as they stand on a disk or a remote: what is read obeys the rules, and is written and read again alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::manifest::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::from_bytes(bytes) {
        manifest.check().expect("what was read obeys the rules");
        let written = manifest.to_bytes().expect("what was read can be written");
        assert_eq!(Manifest::from_bytes(&written).expect("and read again"), manifest);
        let _ = (manifest.list_digest(), manifest.bytes());
    }
});
