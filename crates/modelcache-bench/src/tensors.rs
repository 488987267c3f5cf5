//! Writes a safetensors file of any size for the Python rows. It is written in slices, because this process must stay
//! small: its size is a lower bound of the measured memory (see `usage`).
//!
//! All tensors are vectors of 32-bit numbers and have equal length. Any bit pattern may occur, including NaN.

use super::setup::Setup;
use anyhow::{Context, Result};
use modelcache_testkit::Content;
use modelcache_testkit::content::safetensors_header;
use std::fs::{File, create_dir_all};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Number of tensors in the file.
pub(super) const TENSORS: u64 = 64;
/// Bytes generated and written at a time.
const SLICE_BYTES: usize = 1 << 20;

/// Name and reference of the artifact, and its only file.
pub(super) const NAME: &str = "bench/tensors";
pub(super) const REFERENCE: &str = "bench/tensors@1";
pub(super) const FILE: &str = "model.safetensors";
/// Seed of the generated content.
const SEED: u64 = 11;

/// Writes the file into the folder of served data. Returns its folder, and its size including the header.
pub(super) fn write_tensor_file(setup: &Setup) -> Result<(PathBuf, u64)> {
    let folder = setup.scratch.memory.join("tensors");
    let bytes = write(&folder.join(FILE), SEED, setup.sizes.tensors)?;
    Ok((folder, bytes))
}

/// Writes a file whose tensors have `bytes` bytes in all. `bytes` must be a multiple of 4 * [`TENSORS`], because each
/// number has 4 bytes. Returns the size of the file including the header.
fn write(path: &Path, seed: u64, bytes: u64) -> Result<u64> {
    write_to(path, seed, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn write_to(path: &Path, seed: u64, bytes: u64) -> Result<u64> {
    let names: Vec<String> = (0..TENSORS).map(|number| format!("tensor-{number:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let floats = usize::try_from(bytes / TENSORS / size_of::<f32>() as u64)?;
    let header = safetensors_header(&names, floats);
    let content = Content::generated(seed, bytes);
    create_dir_all(path.parent().context("a file lies in a folder")?)?;
    let mut out = File::create(path)?;
    out.write_all(&header)?;
    for at in (0..bytes).step_by(SLICE_BYTES) {
        out.write_all(&content.read(at..at + SLICE_BYTES as u64)?)?;
    }
    Ok(header.len() as u64 + bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn every_byte_after_the_header_belongs_to_one_tensor() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/model.safetensors");
        // More than one slice, and not a multiple of the slice size.
        let bytes = TENSORS * 4 * 5000;
        let size = write(&path, 1, bytes).expect("written");
        let file = std::fs::read(&path).expect("read");
        assert_eq!(file.len() as u64, size);
        let (length, rest) = file.split_first_chunk::<8>().expect("a length");
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        assert_eq!(data, Content::generated(1, bytes).to_vec().expect("generated"));
        let header: Value = serde_json::from_slice(header).expect("JSON");
        let rows = header.as_object().expect("an object");
        let mut places: Vec<[u64; 2]> =
            rows.values().map(|row| serde_json::from_value(row["data_offsets"].clone()).expect("two")).collect();
        places.sort_unstable();
        assert_eq!(places.len() as u64, TENSORS);
        let ends = places.iter().map(|place| place[1]);
        assert!(ends.clone().eq(places.iter().skip(1).map(|place| place[0]).chain([bytes])), "{places:?}");
        assert_eq!(places[0][0], 0);
    }
}
