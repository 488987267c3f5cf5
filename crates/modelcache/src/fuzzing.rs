//! Entry points for fuzz targets into private parsers. Built only with `--cfg fuzzing`; see `fuzz/`.
//!
//! Each function accepts arbitrary bytes and asserts the invariants of the parser. A panic is a finding.

use crate::manifest::Manifest;
use crate::{origin, remote};

/// Parses a manifest without its envelope (format number and checksum). Checks that a valid manifest round-trips and
/// merges with itself.
pub fn manifest_list(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(manifest) = Manifest::from_member(text) else { return };
    if manifest.check().is_ok() {
        let written = manifest.to_bytes().expect("a valid manifest can be written");
        assert_eq!(Manifest::from_bytes(&written).expect("a written manifest can be read"), manifest);
        let mut merged = manifest.clone();
        merged.learn(&manifest).expect("a manifest can be merged with itself");
        assert_eq!(merged, manifest, "a merge with itself changes nothing");
    }
}

/// Parses a manifest without its envelope, and checks nothing further.
pub fn read_manifest_list(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = Manifest::from_member(text);
}

/// Returns a manifest of thousands of files, each with `bytes` as its entry.
pub fn repeated_list(bytes: &[u8]) -> String {
    let entry = String::from_utf8_lossy(bytes);
    let files: Vec<String> =
        (0..(1 << 20) / (entry.len() + 16)).map(|number| format!("\"{number:x}\":{entry}")).collect();
    format!(r#"{{"name":"m","version":"1","shape":"tree","files":{{{}}}}}"#, files.join(","))
}

/// Parses responses of the Hugging Face Hub: a page of a tree listing, a revision, an error.
pub fn hub_tree(bytes: &[u8]) {
    origin::fuzz_hub(bytes);
}

/// Parses responses of an OCI registry: a manifest, an index, an authentication challenge.
pub fn oci(bytes: &[u8]) {
    origin::fuzz_oci(bytes);
}

/// Parses the bytes as a claim and as a ref of the remote.
pub fn claim(bytes: &[u8]) {
    remote::fuzz_claim(bytes);
    remote::fuzz_ref(bytes);
}

/// Parses a page of an S3 listing.
pub fn listing(text: &str) {
    remote::fuzz_listing(text);
}

/// Parses a file of AWS profiles.
pub fn aws_profile(text: &str) {
    remote::fuzz_profile(text);
}
