//! Detection of file formats by content: formats of model files, and of files that are published by mistake.
//!
//! Only the first [`HEAD_BYTES`] of a file are examined, never its name, and nothing is deserialized. Of a pickle two
//! opcodes are read; of a gzip file the first 512 bytes are decompressed.
//!
//! The end of a file is not examined, so a truncated file is not detected. Detection identifies the format of a file,
//! and does not validate the file.

use crate::error::{Error, Result};
use crate::key::FilePath;
use crate::option_name::call::EXPECT;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;
use std::io::Read;

/// Number of bytes at the beginning of a file that are examined.
pub const HEAD_BYTES: usize = 64 * 1024;
/// Size of a block of a tar archive, in bytes.
const TAR_BLOCK: usize = 512;
/// Highest accepted version of ONNX's intermediate representation. The present version is 13.
const ONNX_VERSION_MAX: u64 = 64;

/// A file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Format {
    /// A tar archive, compressed by gzip.
    TarGz,
    /// A tar archive.
    Tar,
    /// A gzip file that contains no tar archive.
    Gzip,
    /// A Zstandard file.
    Zstd,
    /// A zip archive.
    Zip,
    /// A zip archive written by `torch.save`.
    PyTorch,
    /// Safetensors.
    Safetensors,
    /// GGUF.
    Gguf,
    /// ONNX.
    Onnx,
    /// A Python pickle.
    Pickle,
    /// An HDF5 file, for instance from Keras.
    Hdf5,
    /// A NumPy array.
    Numpy,
    /// An xz file.
    Xz,
    /// A bzip2 file.
    Bzip2,
    /// A 7z archive.
    SevenZip,
    /// A Parquet file.
    Parquet,
    /// A Git LFS pointer, which a clone without LFS contains instead of a large file.
    LfsPointer,
    /// An HTML page.
    Html,
    /// An XML document, for instance an error response of an object store.
    Xml,
    /// A JSON document.
    Json,
    /// Any other text.
    Text,
    /// An empty file.
    Empty,
    /// Any other content.
    Unknown,
}

use Format::*;

/// The formats that [`Format::parse`] accepts, for `--expect`.
pub const EXPECTABLE: [Format; 9] = [TarGz, Tar, Zstd, Zip, Safetensors, Gguf, Onnx, Pickle, PyTorch];

impl Format {
    /// Detects the format of a file of `size` bytes. `head` contains its first [`HEAD_BYTES`], or the whole file if it
    /// is shorter.
    pub fn of(head: &[u8], size: u64) -> Self {
        let head = &head[..head.len().min(HEAD_BYTES)];
        if size == 0 {
            return Empty;
        }
        // From the most specific test to the least specific one.
        // A tar archive begins with the name of its first file, which may look like the magic of another format.
        is_tar(head)
            .then_some(Tar)
            .or_else(|| by_magic(head))
            .or_else(|| is_safetensors(head, size).then_some(Safetensors))
            .or_else(|| is_pickle(head).then_some(Pickle))
            .or_else(|| by_text(head, size))
            .or_else(|| is_onnx(head, size).then_some(Onnx))
            .unwrap_or(Unknown)
    }

    /// Returns the name on the command line and in manifests; `None` if it is not a format of model files.
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            TarGz => "tar.gz",
            Tar => "tar",
            Gzip => "gzip",
            Zstd => "zstd",
            Zip => "zip",
            PyTorch => "pytorch",
            Safetensors => "safetensors",
            Gguf => "gguf",
            Onnx => "onnx",
            Pickle => "pickle",
            Hdf5 => "hdf5",
            Numpy => "numpy",
            Xz => "xz",
            Bzip2 => "bzip2",
            SevenZip => "7z",
            Parquet => "parquet",
            LfsPointer | Html | Xml | Json | Text | Empty | Unknown => return None,
        })
    }

    /// Iterates over the formats that have a [`name`](Self::name).
    fn all_named() -> impl Iterator<Item = Self> {
        EXPECTABLE.into_iter().chain([Gzip, Hdf5, Numpy, Xz, Bzip2, SevenZip, Parquet])
    }

    /// Returns the names of all formats that have one.
    pub fn names() -> Vec<&'static str> {
        Self::all_named().filter_map(Self::name).collect()
    }

    /// Returns the format with this [`name`](Self::name).
    pub fn named(name: &str) -> Option<Self> {
        Self::all_named().find(|format| format.name() == Some(name))
    }

    /// Returns true if a file of this format has content of the format `other`. A PyTorch file contains a pickle.
    pub fn contains(self, other: Self) -> bool {
        self.meets(other) || (self == PyTorch && other == Pickle)
    }

    /// Returns the format of [`EXPECTABLE`] with this name.
    ///
    /// # Errors
    /// `Invalid` for any other name. The hint lists the valid ones.
    pub fn parse(name: &str) -> Result<Self> {
        let known = || EXPECTABLE.into_iter().filter_map(|format| Some((format, format.name()?)));
        known().find(|(_, known)| *known == name).map(|(format, _)| format).ok_or_else(|| {
            let names: Vec<_> = known().map(|(_, name)| name).collect();
            Error::invalid(format!("no format is called {name:?}")).hint(format!("known formats: {}", names.join(", ")))
        })
    }

    /// Returns true if a file of this format also has the format `expected`. A PyTorch file is also a zip archive.
    pub fn meets(self, expected: Self) -> bool {
        self == expected || (self == PyTorch && expected == Zip)
    }

    /// Returns true if the name of the file has an extension of this format.
    pub fn is_named(self, path: &FilePath) -> bool {
        let name = path.file_name().to_ascii_lowercase();
        let endings: &[&str] = match self {
            TarGz => &[".tar.gz", ".tgz"],
            Tar => &[".tar"],
            Zstd => &[".zst", ".zstd"],
            Zip => &[".zip"],
            Safetensors => &[".safetensors"],
            Gguf => &[".gguf"],
            Onnx => &[".onnx"],
            Pickle => &[".pkl", ".pickle"],
            PyTorch => &[".pt", ".pth"],
            _ => &[],
        };
        endings.iter().any(|ending| name.ends_with(ending))
    }

    /// Returns the hint for a file of this format that should have the format `expected`.
    fn remedy(self, expected: Self) -> String {
        match self {
            LfsPointer => {
                "the repository was cloned without its large files: run `git lfs pull`, then put it again".into()
            }
            Html | Xml => {
                "the download probably returned a login or error page instead of the file: download it again".into()
            }
            Empty => "the program that writes it has not run, or failed: write the file again, then put it".into(),
            Gzip if expected == TarGz => {
                "only a file was compressed, not a folder: pack the folder with `tar -czf`".into()
            }
            Tar if expected == TarGz => format!("compress it with gzip, or put it with {}", EXPECT.set_to("tar")),
            format if EXPECTABLE.contains(&format) => {
                format!("put the right file, or use {}", EXPECT.set_to(format.name().unwrap_or_default()))
            }
            _ => format!("put the right file, or omit {EXPECT}"),
        }
    }
}

/// Formats a description with its article, such as `a zip archive`.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TarGz => "a tar archive compressed by gzip",
            Tar => "a tar archive",
            Gzip => "a gzip file without a tar archive in it",
            Zstd => "a Zstandard file",
            Zip => "a zip archive",
            PyTorch => "a PyTorch file (a zip archive with a pickle in it)",
            Safetensors => "a safetensors file",
            Gguf => "a GGUF file",
            Onnx => "an ONNX model",
            Pickle => "a Python pickle",
            Hdf5 => "an HDF5 file",
            Numpy => "a NumPy array",
            Xz => "an xz file",
            Bzip2 => "a bzip2 file",
            SevenZip => "a 7z archive",
            Parquet => "a Parquet file",
            LfsPointer => "a Git LFS pointer instead of the file itself",
            Html => "an HTML page",
            Xml => "an XML document",
            Json => "JSON",
            Text => "text",
            Empty => "empty",
            Unknown => "of an unknown format",
        })
    }
}

/// Checks that an artifact has the expected format. A single file must have it. In a tree, at least one file must have
/// it, and so must every file with an extension of that format.
///
/// # Errors
/// `Corrupt`, with the file, its format and a remedy.
pub fn expect<'a>(
    expected: Format,
    is_tree: bool,
    files: impl IntoIterator<Item = (&'a FilePath, Format)>,
) -> Result<()> {
    let wanted = expected.name().unwrap_or_default();
    let mut any_meets = false;
    for (path, found) in files {
        if found.meets(expected) {
            any_meets = true;
        } else if !is_tree || expected.is_named(path) {
            return Err(
                Error::corrupt(format!("{path} should be {wanted} and is {found}")).hint(found.remedy(expected))
            );
        }
    }
    if any_meets {
        return Ok(());
    }
    Err(Error::corrupt(format!("no file in the folder is {wanted}"))
        .hint(format!("put the right folder, or omit {EXPECT}")))
}

/// Detects the formats that begin with a fixed sequence of bytes.
fn by_magic(head: &[u8]) -> Option<Format> {
    const MAGICS: &[(&[u8], Format)] = &[
        (b"\x28\xb5\x2f\xfd", Zstd),
        (b"\x89HDF\r\n\x1a\n", Hdf5),
        (b"\x93NUMPY", Numpy),
        (b"\xfd7zXZ\0", Xz),
        (b"7z\xbc\xaf\x27\x1c", SevenZip),
        (b"PAR1", Parquet),
        (b"version https://git-lfs.github.com/spec/", LfsPointer),
    ];
    if head.starts_with(b"\x1f\x8b\x08") {
        return Some(if is_tar(&inflated(head)) { TarGz } else { Gzip });
    }
    // An archive with entries, or an empty archive.
    if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        return Some(if is_pytorch(head) { PyTorch } else { Zip });
    }
    if head.starts_with(b"GGUF") && le_u32(head, 4).is_some_and(|version| (1..=0xffff).contains(&version)) {
        return Some(Gguf);
    }
    // The level, then the magic number of a block, or of the end of an empty file.
    if let [b'B', b'Z', b'h', b'1'..=b'9', rest @ ..] = head
        && (rest.starts_with(b"1AY&SY") || rest.starts_with(b"\x17\x72\x45\x38\x50\x90"))
    {
        return Some(Bzip2);
    }
    MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, format)| *format)
}

/// Decompresses the first [`TAR_BLOCK`] bytes of a gzip file, or fewer if `head` does not contain them.
fn inflated(head: &[u8]) -> Vec<u8> {
    let mut block = Vec::with_capacity(TAR_BLOCK);
    // An error is ignored: the bytes that were decompressed before it are examined.
    let _ = flate2::read::GzDecoder::new(head).take(TAR_BLOCK as u64).read_to_end(&mut block);
    block
}

/// Returns true if the first block is a tar header with a name and a correct checksum. An archive without files has
/// only zeros and is not detected.
fn is_tar(head: &[u8]) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let Some(block) = head.get(..TAR_BLOCK).filter(|block| block[0] != 0) else { return false };
    let digits: String = block[CHECKSUM].iter().map(|byte| char::from(*byte)).collect();
    let Ok(recorded) = u64::from_str_radix(digits.trim_matches([' ', '\0']), 8) else { return false };
    // The checksum is the sum of all bytes, with its own field taken as spaces.
    let byte = |(at, byte): (usize, &u8)| if CHECKSUM.contains(&at) { u64::from(b' ') } else { u64::from(*byte) };
    block.iter().enumerate().map(byte).sum::<u64>() == recorded
}

/// Returns true if the first entry of a zip archive has a name that `torch.save` writes.
fn is_pytorch(head: &[u8]) -> bool {
    // Offsets 26 and 30 of the local file header: length of the name, and the name.
    let Some(length) = head.get(26..28).map(|bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]]))) else {
        return false;
    };
    let Some(name) = head.get(30..30 + length) else { return false };
    name.ends_with(b"/data.pkl") || name.ends_with(b"/.format_version")
}

/// Returns true if the file begins with the length of a header that fits into the file, and the header is a JSON object
/// of objects.
fn is_safetensors(head: &[u8], size: u64) -> bool {
    let Some(length) = head.get(..8).and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?))) else {
        return false;
    };
    if length < 2 || size.checked_sub(8).is_none_or(|room| room < length) {
        return false;
    }
    let text = &head[8..];
    match usize::try_from(length).ok().and_then(|length| text.get(..length)) {
        Some(whole) => serde_json::from_slice::<ObjectOfObjects>(whole).is_ok(),
        // The header is longer than `head`: check only its beginning.
        None => text.starts_with(b"{\"") && !text.contains(&0),
    }
}

/// A JSON object whose values are objects. Its content is not kept.
struct ObjectOfObjects;

impl<'de> Deserialize<'de> for ObjectOfObjects {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = ObjectOfObjects;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of objects")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<ObjectOfObjects, A::Error> {
                while let Some((IgnoredAny, value)) = members.next_entry::<IgnoredAny, &RawValue>()? {
                    if !value.get().starts_with('{') {
                        return Err(A::Error::custom("a value is not an object"));
                    }
                }
                Ok(ObjectOfObjects)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Returns true if the file begins with opcode `PROTO`, a protocol from 2 to 5, and an opcode that can follow.
fn is_pickle(head: &[u8]) -> bool {
    let [0x80, protocol @ 2..=5, opcode, ..] = head else { return false };
    // Protocol 4 and 5 usually begin with a frame (0x95). Otherwise an opcode that pushes a value or a mark.
    matches!((protocol, opcode), (4.., 0x95))
        || matches!(
            opcode,
            b'(' | b')'
                | b']'
                | b'}'
                | b'c'
                | b'N'
                | b'I'
                | b'J'
                | b'K'
                | b'L'
                | b'M'
                | b'F'
                | b'G'
                | b'X'
                | b'U'
                | b'T'
                | b'B'
                | b'C'
                | 0x88..=0x8f | 0x93 | 0x96
        )
}

/// Detects text formats: valid UTF-8 without control characters other than white space and escape.
fn by_text(head: &[u8], size: u64) -> Option<Format> {
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        // `head` ends within a character, because the file is longer.
        Err(error) if error.error_len().is_none() && size > head.len() as u64 => {
            std::str::from_utf8(&head[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    if text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t' | '\x0c' | '\x1b')) {
        return None;
    }
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let begins = |tag: &str| text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag));
    Some(match () {
        () if begins("<!doctype html") || begins("<html") => Html,
        () if begins("<?xml") => Xml,
        () if text.starts_with(['{', '[']) => Json,
        () => Text,
    })
}

/// Returns true if the file is a protobuf message that has only fields of ONNX's `ModelProto`, among them its version
/// and a graph or operator sets (<https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>).
fn is_onnx(head: &[u8], size: u64) -> bool {
    // Field numbers of `ModelProto`.
    const IR_VERSION: u64 = 1;
    const MODEL_VERSION: u64 = 5;
    const GRAPH: u64 = 7;
    const OPERATOR_SETS: u64 = 8;
    /// Producer name and version, domain, documentation, metadata, training information, functions, configurations.
    const OTHER_STRINGS_AND_MESSAGES: [u64; 8] = [2, 3, 4, 6, 14, 20, 25, 26];
    let (mut at, mut has_version, mut has_body) = (0, false, false);
    while let Some((tag, next)) = varint(head, at) {
        // Number and wire type of the field.
        match (tag >> 3, tag & 7) {
            // Wire type 0: integers.
            (field @ (IR_VERSION | MODEL_VERSION), 0) => {
                let Some((value, next)) = varint(head, next) else { return false };
                if field == IR_VERSION && !(1..=ONNX_VERSION_MAX).contains(&value) {
                    return false;
                }
                has_version |= field == IR_VERSION;
                at = next;
            }
            // Wire type 2: strings and messages, which begin with their length. Their content is skipped.
            (field, 2) if matches!(field, GRAPH | OPERATOR_SETS) || OTHER_STRINGS_AND_MESSAGES.contains(&field) => {
                let Some((length, next)) = varint(head, next) else { return false };
                let Some(end) = (next as u64).checked_add(length).filter(|end| *end <= size) else { return false };
                has_body |= matches!(field, GRAPH | OPERATOR_SETS);
                let Ok(end) = usize::try_from(end) else { return false };
                at = end;
            }
            _ => return false,
        }
        if at >= head.len() {
            break;
        }
    }
    has_version && has_body
}

/// Returns the variable-length integer at offset `at`, and the offset after it.
fn varint(bytes: &[u8], at: usize) -> Option<(u64, usize)> {
    let mut value = 0;
    // Seven bits a byte: 64 bits need at most ten bytes.
    for (index, byte) in bytes.get(at..)?.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * u32::try_from(index).ok()?)?;
        if byte & 0x80 == 0 {
            return Some((value, at + index + 1));
        }
    }
    None
}

fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;
    use std::io::Write;

    fn of(bytes: &[u8]) -> Format {
        Format::of(bytes, bytes.len() as u64)
    }

    /// Returns a tar archive with one empty file. `magic` selects the old or the new format.
    fn tar(magic: &[u8]) -> Vec<u8> {
        let mut block = vec![0; TAR_BLOCK];
        block[..7].copy_from_slice(b"a/model");
        block[100..107].copy_from_slice(b"0000644");
        block[124..135].copy_from_slice(b"00000000000");
        block[257..257 + magic.len()].copy_from_slice(magic);
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block.extend([0; 2 * TAR_BLOCK]);
        block
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).expect("compresses");
        encoder.finish().expect("compresses")
    }

    fn safetensors(header: &str) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 8]].concat()
    }

    fn zip(name: &str) -> Vec<u8> {
        let mut bytes = b"PK\x03\x04".to_vec();
        bytes.resize(26, 0);
        bytes.extend(u16::try_from(name.len()).expect("short").to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(name.as_bytes());
        bytes
    }

    fn onnx() -> Vec<u8> {
        [&b"\x08\x0a\x12\x07pytorch\x1a\x052.9.0\x3a\x03abc\x42\x04"[..], b"\x0a\x00\x10\x12"].concat()
    }

    #[test]
    fn every_format_is_detected_by_its_content() {
        let tensors = r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let rows: Vec<(Vec<u8>, Format)> = vec![
            (gzip(&tar(b"ustar")), TarGz),
            (gzip(b"only a file"), Gzip),
            (tar(b"ustar\x0000"), Tar),
            (tar(b""), Tar),
            (b"\x28\xb5\x2f\xfd....".to_vec(), Zstd),
            (zip("a.txt"), Zip),
            (b"PK\x05\x06".to_vec(), Zip),
            (zip("archive/data.pkl"), PyTorch),
            (safetensors(tensors), Safetensors),
            (b"GGUF\x03\0\0\0........".to_vec(), Gguf),
            (onnx(), Onnx),
            (b"\x80\x04\x95\x05\0\0\0\0\0\0\0K\x01.".to_vec(), Pickle),
            (b"\x80\x02}q\x00.".to_vec(), Pickle),
            (b"\x89HDF\r\n\x1a\n".to_vec(), Hdf5),
            (b"\x93NUMPY\x01\0".to_vec(), Numpy),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), LfsPointer),
            (b"\n<!DOCTYPE html><html>".to_vec(), Html),
            (b"<HTML>".to_vec(), Html),
            (b"<?xml version=\"1.0\"?><Error/>".to_vec(), Xml),
            (b"{\"a\": 1}".to_vec(), Json),
            ("hello, wörld\n".into(), Text),
            (Vec::new(), Empty),
            (vec![0; 4096], Unknown),
            (b"\x08\x0a".to_vec(), Unknown),
            (b"GGUF\xff\xff\xff\xff".to_vec(), Unknown),
            (safetensors("{\"a\":1}"), Unknown),
        ];
        for (bytes, format) in rows {
            assert_eq!(of(&bytes), format, "{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
        }
    }

    #[test]
    fn of_a_long_header_only_the_beginning_is_checked() {
        let entry = |n: usize| format!("\"w{n}\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}");
        let header = format!("{{{}}}", (0..2000).map(entry).collect::<Vec<_>>().join(","));
        let bytes = safetensors(&header);
        assert!(bytes.len() > HEAD_BYTES);
        assert_eq!(of(&bytes), Safetensors);
        assert_eq!(Format::of(&bytes[..HEAD_BYTES], bytes.len() as u64), Safetensors);
        assert_ne!(Format::of(&bytes[..HEAD_BYTES], 100_000), Safetensors, "the header does not fit into the file");
    }

    #[test]
    fn a_cut_character_at_the_end_of_the_head_is_still_text() {
        let text = "é".repeat(HEAD_BYTES);
        assert_eq!(Format::of(&text.as_bytes()[..101], text.len() as u64), Text);
        assert_ne!(Format::of(&text.as_bytes()[..101], 101), Text);
    }

    #[test]
    fn a_refusal_names_the_format_and_the_remedy() {
        let path = |text| FilePath::new(text).expect("path");
        let refused = |expected, is_tree, files: &[(&FilePath, Format)]| {
            let error = expect(expected, is_tree, files.iter().copied()).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            format!("{} | {}", error.message(), error.hint_text().unwrap_or_default())
        };
        let (model, other) = (path("model.safetensors"), path("other.bin"));
        let text = refused(Safetensors, false, &[(&other, LfsPointer)]);
        assert!(text.starts_with("other.bin should be safetensors and is a Git LFS pointer"), "{text}");
        assert!(text.contains("git lfs pull"), "{text}");
        assert!(refused(TarGz, false, &[(&other, Zip)]).ends_with("or use expect=zip"));
        assert!(refused(Safetensors, true, &[(&other, Safetensors), (&model, Html)]).contains("an HTML page"));
        assert!(refused(Safetensors, true, &[(&other, Json)]).starts_with("no file in the folder is safetensors"));
        expect(Safetensors, true, [(&other, Json), (&model, Safetensors)]).expect("one file has the format");
        expect(Zip, false, [(&other, PyTorch)]).expect("a PyTorch file is also a zip archive");
    }

    #[test]
    fn names_of_formats_are_those_of_the_command_line() {
        for format in EXPECTABLE {
            assert_eq!(Format::parse(format.name().expect("name")).expect("parses"), format);
        }
        assert!(Format::parse("html").expect_err("none").hint_text().is_some_and(|hint| hint.contains("tar.gz")));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), size in any::<u64>()) {
            Format::of(&bytes, size);
        }

        #[test]
        fn no_damage_makes_it_panic(which in 0usize..6, at in any::<u16>(), byte in any::<u8>(), cut in any::<u16>()) {
            let pickle = b"\x80\x04\x95".to_vec();
            let whole = [gzip(&tar(b"ustar")), tar(b"ustar"), zip("a/data.pkl"), safetensors("{}"), onnx(), pickle];
            let mut bytes = whole[which].clone();
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - usize::from(cut) % bytes.len());
            Format::of(&bytes, bytes.len() as u64);
        }
    }
}
