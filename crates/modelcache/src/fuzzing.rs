//! Ways for fuzz targets into parsers that are private otherwise. Built with `--cfg fuzzing` only; see `fuzz/`.
//!
//! Each takes whatever bytes there are. What must hold of them is asserted here; a panic is a finding.

use crate::manifest::Manifest;
use crate::{origin, remote};

/// The list inside a manifest, past its envelope.
pub fn manifest_list(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(manifest) = Manifest::from_list(text) else { return };
    if manifest.check().is_ok() {
        let written = manifest.to_bytes().expect("a manifest that obeys the rules can be written");
        assert_eq!(Manifest::from_bytes(&written).expect("and read again"), manifest);
        let mut merged = manifest.clone();
        merged.learn(&manifest).expect("a manifest agrees with itself");
        assert_eq!(merged, manifest, "and learns nothing from itself");
    }
}

/// The same list, read only.
pub fn read_manifest_list(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = Manifest::from_list(text);
}

/// A list with thousands of files, each with `bytes` for its entry.
pub fn repeated_list(bytes: &[u8]) -> String {
    let entry = String::from_utf8_lossy(bytes);
    let files: Vec<String> =
        (0..(1 << 20) / (entry.len() + 16)).map(|number| format!("\"{number:x}\":{entry}")).collect();
    format!(r#"{{"name":"m","version":"1","shape":"tree","files":{{{}}}}}"#, files.join(","))
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
