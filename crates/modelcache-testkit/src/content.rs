//! File content that can be recomputed from a seed.
//!
//! A [`Content`] has a length and returns any slice of itself. Generated content depends only on seed and offset, so
//! two processes, or a server and the test that checks it, agree on every byte without sharing any.
//!
//! Digests are computed by reading the whole content. For a huge [`Content::zeros`], state the digest instead: see
//! [`crate::hub::CommitBuilder::claim_sha256`].

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// Bytes read or generated at a time.
pub(crate) const CHUNK: u64 = 256 * 1024;

/// The bytes of one file: held in memory, or computed when they are read.
#[derive(Clone, Debug)]
pub enum Content {
    /// Held in memory.
    Held(Bytes),
    /// Pseudo-random bytes, computed from a seed.
    Generated {
        /// Equal seeds give equal bytes.
        seed: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Only zero bytes.
    Zeros {
        /// Length in bytes.
        len: u64,
    },
    /// A file on disk, which must not change while it is served.
    OnDisk {
        /// Path of the file.
        path: PathBuf,
        /// Length in bytes at the time of [`Content::on_disk`].
        len: u64,
    },
}

impl Content {
    /// Pseudo-random bytes that depend only on `seed`. Shorter content is a prefix of longer content with the same
    /// seed.
    pub fn generated(seed: u64, len: u64) -> Self {
        Self::Generated { seed, len }
    }

    /// `len` zero bytes.
    pub fn zeros(len: u64) -> Self {
        Self::Zeros { len }
    }

    /// A file on disk. Fails if its metadata cannot be read.
    pub fn on_disk(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let len = path.metadata()?.len();
        Ok(Self::OnDisk { path, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Held(bytes) => bytes.len() as u64,
            Self::Generated { len, .. } | Self::Zeros { len } | Self::OnDisk { len, .. } => *len,
        }
    }

    /// Returns true if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the bytes of `range`, cut at the end of the content. Fails only for a file on disk.
    pub fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        let end = range.end.min(self.len());
        let start = range.start.min(end);
        let size = as_usize(end - start);
        match self {
            Self::Held(bytes) => Ok(bytes.slice(as_usize(start)..as_usize(end))),
            Self::Zeros { .. } => Ok(Bytes::from(vec![0; size])),
            Self::Generated { seed, .. } => {
                let mut buffer = vec![0; size];
                generate(*seed, start, &mut buffer);
                Ok(Bytes::from(buffer))
            }
            Self::OnDisk { path, .. } => {
                let mut buffer = vec![0; size];
                File::open(path)?.read_exact_at(&mut buffer, start)?;
                Ok(Bytes::from(buffer))
            }
        }
    }

    /// Returns all bytes. Fails only for a file on disk.
    pub fn to_vec(&self) -> io::Result<Vec<u8>> {
        Ok(self.read(0..self.len())?.to_vec())
    }

    /// SHA-256 in lowercase hex. Fails only for a file on disk.
    pub fn sha256(&self) -> io::Result<String> {
        let mut hasher = Sha256::new();
        self.each_chunk(|chunk| {
            hasher.update(chunk);
            Ok(())
        })?;
        Ok(hex::encode(hasher.finalize()))
    }

    /// Git's blob id: SHA-1 over `blob <len>`, a zero byte and the content, in lowercase hex.
    pub fn git_sha1(&self) -> io::Result<String> {
        let mut hasher = Sha1::new();
        hasher.update(format!("blob {}\0", self.len()));
        self.each_chunk(|chunk| {
            hasher.update(chunk);
            Ok(())
        })?;
        Ok(hex::encode(hasher.finalize()))
    }

    /// Writes the content to `path` and creates the folders above it. Fails on errors of the filesystem.
    pub fn write_to(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let path = path.as_ref();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut out = BufWriter::new(File::create(path)?);
        self.each_chunk(|chunk| out.write_all(chunk))?;
        out.flush()
    }

    fn each_chunk(&self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut at = 0;
        while at < self.len() {
            take(&self.read(at..at + CHUNK)?)?;
            at += CHUNK;
        }
        Ok(())
    }
}

impl From<Bytes> for Content {
    fn from(bytes: Bytes) -> Self {
        Self::Held(bytes)
    }
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Held(bytes.into())
    }
}

impl From<&[u8]> for Content {
    fn from(bytes: &[u8]) -> Self {
        Self::Held(Bytes::copy_from_slice(bytes))
    }
}

impl<const N: usize> From<&[u8; N]> for Content {
    fn from(bytes: &[u8; N]) -> Self {
        Self::Held(Bytes::copy_from_slice(bytes))
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Self::Held(text.into())
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Held(Bytes::copy_from_slice(text.as_bytes()))
    }
}

/// Returns `len` generated bytes, equal to [`Content::generated`] with the same seed.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut buffer = vec![0; len];
    generate(seed, 0, &mut buffer);
    buffer
}

/// SHA-256 of `bytes` in lowercase hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// SHA-1 of `bytes` in lowercase hex, without git's header.
pub fn sha1(bytes: &[u8]) -> String {
    hex::encode(Sha1::digest(bytes))
}

/// Git's blob id of `bytes`: SHA-1 over `blob <len>`, a zero byte and `bytes`, in lowercase hex.
pub fn git_sha1(bytes: &[u8]) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex::encode(hasher.finalize())
}

/// Returns a small valid safetensors file: one `F32` vector of `floats` generated numbers per name.
///
/// Layout: header length (u64, little endian), a JSON header padded with spaces to 8 bytes, then the tensors.
pub fn safetensors(seed: u64, names: &[&str], floats: usize) -> Vec<u8> {
    let mut file = safetensors_header(names, floats);
    for word in 0..names.len() * floats {
        let bits = word_at(seed, word as u64);
        // A cache accepts any bit pattern. Finite numbers also satisfy readers of the format.
        let value = (bits >> 40) as f32 / (1u64 << 24) as f32;
        file.extend_from_slice(&value.to_le_bytes());
    }
    file
}

/// Returns the bytes of a safetensors file before its tensors: header length and header, for one `F32` vector of
/// `floats` numbers per name, in this order.
pub fn safetensors_header(names: &[&str], floats: usize) -> Vec<u8> {
    let tensor_bytes = floats * 4;
    let mut header = serde_json::Map::new();
    for (index, name) in names.iter().enumerate() {
        let offsets = [index * tensor_bytes, (index + 1) * tensor_bytes];
        let row = serde_json::json!({"dtype": "F32", "shape": [floats], "data_offsets": offsets});
        header.insert((*name).to_owned(), row);
    }
    let mut text = serde_json::Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(text.as_bytes());
    file
}

fn generate(seed: u64, offset: u64, out: &mut [u8]) {
    let mut index = offset / 8;
    let skip = as_usize(offset % 8);
    let mut rest = out;
    // A slice may begin inside an 8-byte word.
    if skip != 0 {
        let word = word_at(seed, index).to_le_bytes();
        let take = rest.len().min(8 - skip);
        let (head, tail) = rest.split_at_mut(take);
        head.copy_from_slice(&word[skip..skip + take]);
        rest = tail;
        index += 1;
    }
    for slot in rest.chunks_mut(8) {
        let word = word_at(seed, index).to_le_bytes();
        slot.copy_from_slice(&word[..slot.len()]);
        index += 1;
    }
}

/// SplitMix64 as a function of the position, so that any slice can be computed without the bytes before it.
pub(crate) fn word_at(seed: u64, index: u64) -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    mix(mix(seed).wrapping_add(index.wrapping_add(1).wrapping_mul(STEP)))
}

fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn as_usize(number: u64) -> usize {
    usize::try_from(number).expect("a slice of content fits in memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slice_agrees_with_the_whole() {
        let content = Content::generated(7, 1000);
        let whole = content.to_vec().unwrap();
        assert_eq!(whole, bytes(7, 1000));
        for (start, end) in [(0, 0), (0, 1), (3, 5), (1, 17), (8, 16), (993, 1000), (990, 2000)] {
            let want = &whole[start.min(1000)..end.min(1000)];
            assert_eq!(content.read(start as u64..end as u64).unwrap(), want, "{start}..{end}");
        }
        assert_ne!(bytes(7, 64), bytes(8, 64));
    }

    #[test]
    fn digests_are_those_of_the_usual_tools() {
        let content = Content::from("hello\n");
        assert_eq!(content.git_sha1().unwrap(), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(content.sha256().unwrap(), sha256(b"hello\n"));
        assert_eq!(sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(sha1(b""), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    }

    #[test]
    fn a_written_file_holds_the_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/file.bin");
        let content = Content::generated(1, CHUNK + 3);
        content.write_to(&path).unwrap();
        let back = Content::on_disk(&path).unwrap();
        assert_eq!(back.len(), CHUNK + 3);
        assert_eq!(back.sha256().unwrap(), content.sha256().unwrap());
    }

    #[test]
    fn safetensors_header_spans_the_data() {
        let file = safetensors(3, &["a", "b"], 5);
        let header_len = usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap();
        assert_eq!(header_len % 8, 0);
        let header: serde_json::Value = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
        assert_eq!(header["b"]["data_offsets"][1], 40);
        assert_eq!(file.len(), 8 + header_len + 40);
    }
}
