//! Ways for fuzz targets into parsers that are private otherwise. Built with `--cfg fuzzing` only; see `fuzz/`.
//!
//! Each takes whatever bytes there are. What must hold of them is asserted here; a panic is a finding.

use crate::manifest::Manifest;
use crate::{origin, remote};

/// The list inside a manifest, past its envelope.
pub fn manifest_list(bytes: &[u8]) {
    let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else { return };
    if manifest.check().is_ok() {
        let written = manifest.to_bytes().expect("a manifest that obeys the rules can be written");
        assert_eq!(Manifest::from_bytes(&written).expect("and read again"), manifest);
        let mut merged = manifest.clone();
        merged.learn(&manifest).expect("a manifest agrees with itself");
        assert_eq!(merged, manifest, "and learns nothing from itself");
    }
}

/// A page of a repository's tree, a revision, a refusal: what the Hub answers.
pub fn hub_tree(bytes: &[u8]) {
    origin::fuzz_hub(bytes);
}

/// What an OCI registry answers: a manifest, an index, a challenge.
pub fn oci(bytes: &[u8]) {
    origin::fuzz_oci(bytes);
}

/// A claim or a ref on the remote.
pub fn claim(bytes: &[u8]) {
    remote::fuzz_claim(bytes);
    remote::fuzz_ref(bytes);
}

/// A page of what an S3 server lists.
pub fn listing(text: &str) {
    remote::fuzz_listing(text);
}

/// A file of AWS profiles.
pub fn aws_profile(text: &str) {
    remote::fuzz_profile(text);
}
