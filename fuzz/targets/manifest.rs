//! Manifests of a disk or a remote. A manifest that is accepted passes its checks and survives a round trip.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::manifest::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::from_bytes(bytes) {
        manifest.check().expect("an accepted manifest passes its checks");
        let written = manifest.to_bytes().expect("an accepted manifest can be written");
        assert_eq!(Manifest::from_bytes(&written).expect("and read again"), manifest);
        let _ = (manifest.list_digest(), manifest.bytes());
    }
});
