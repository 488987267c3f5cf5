//! Parses manifests with bounded memory.
//!
//! A manifest may come from a hostile server or from another user of a shared directory. Parsing allocates less than
//! three times the size of the document plus [`MEMORY_BYTES_MIN`] (with the document itself: less than four times),
//! whether the manifest is accepted or refused:
//!
//! - A first scan without allocations refuses deep nesting and long names.
//! - Each value is first taken as a slice of the document, and parsed only within the length limit of its type. Error
//!   messages quote nothing longer.
//! - Unknown fields stay text, of bounded length and number.
//! - Files are counted before their list is allocated. A manifest is refused if its entries exceed the memory limit.

use super::{
    FileDetails, FileEntry, FileIdentity, Files, Held, Manifest, ObjectIdentity, Shape, UnknownFields, UnsyncedFile,
};
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::ladder::Ladder;
use crate::limits;
use serde::Deserialize;
use serde::de::{self, Deserializer as _, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

/// The memory limit of the parsed form, in multiples of the document's size.
const MEMORY_PER_BYTE: usize = 3;
/// The memory that the parsed form may use in any case, in bytes.
const MEMORY_BYTES_MIN: usize = 16 << 10;
/// The longest number, digest or word, in bytes of JSON.
const WORD_BYTES_MAX: usize = 256;
/// The longest name or version, in bytes of JSON. An escaped byte takes six.
const NAME_JSON_BYTES_MAX: usize = 6 * limits::NAME_BYTES_MAX + 2;
/// The longest field name or file path, in bytes of JSON.
const FIELD_JSON_BYTES_MAX: usize = 6 * limits::PATH_BYTES_MAX;
/// The longest value of `held`, in bytes of JSON. It has a few numbers and an entity tag.
const HELD_BYTES_MAX: usize = 1 << 10;
/// The longest ladder, in bytes of JSON: twice the base64 form of 32 bytes for each part.
const LADDER_BYTES_MAX: usize = 2 * limits::PARTS_MAX as usize * 43;
/// The largest size of a manifest without its files, in bytes.
const HEAD_BYTES_MAX: usize = limits::UNKNOWN_BYTES_MAX + (64 << 10);
/// The largest size of a file's entry without ladder and unknown fields, in bytes of JSON: an escaped path, digests and
/// numbers.
const ENTRY_BYTES_MAX: usize = 8 << 10;

/// Returns the value of `manifest` in the stored form `bytes`. Checks format number and checksum.
pub(super) fn open_envelope(bytes: &[u8]) -> Result<&str> {
    let text = std::str::from_utf8(bytes).map_err(damaged)?;
    look_over(text)?;
    let (mut format, mut sha256, mut list) = (None, None, None);
    each_member(text, &mut |field, value| {
        match field {
            "format" => once(&mut format, field, parsed::<u32>(field, value, WORD_BYTES_MAX)?)?,
            "sha256" => once(&mut sha256, field, value)?,
            "manifest" => once(&mut list, field, value.get())?,
            _ => {}
        }
        Ok(())
    })?;
    // The format first: the other fields of a newer format may differ.
    let format = format.ok_or_else(|| lacks("format"))?;
    if format > super::FORMAT {
        return Err(Error::invalid(format!(
            "the manifest has format {format}; this release reads up to {}",
            super::FORMAT
        ))
        .hint("update modelcache"));
    }
    let sha256 = sha256.ok_or_else(|| lacks("sha256"))?;
    let list = list.ok_or_else(|| lacks("manifest"))?;
    if super::Digest::of(list.as_bytes()) != parsed("sha256", sha256, WORD_BYTES_MAX)? {
        return Err(Error::corrupt("the manifest does not match its own checksum"));
    }
    // Unknown fields of the envelope are ignored, but they count towards its size limit.
    match text.len() - list.len() {
        around if around > HEAD_BYTES_MAX => Err(Error::corrupt(format!(
            "the envelope around the manifest has {around} bytes; at most {HEAD_BYTES_MAX}"
        ))),
        _ => Ok(list),
    }
}

/// Parses a manifest. `text` must have passed [`look_over`]. Checks only types and limits.
pub(super) fn manifest(text: &str) -> Result<Manifest> {
    let mut memory = Memory { left: MEMORY_PER_BYTE * text.len() + MEMORY_BYTES_MIN, bytes: text.len(), files: 0 };
    let (mut name, mut version, mut shape, mut files) = (None, None, None, None);
    let mut unknown = Unknown::new(limits::UNKNOWN_BYTES_MAX);
    each_member(text, &mut |field, value| match field {
        "name" => once(&mut name, field, parsed::<ArtifactName>(field, value, NAME_JSON_BYTES_MAX)?),
        "version" => once(&mut version, field, parsed::<Version>(field, value, NAME_JSON_BYTES_MAX)?),
        "shape" => once(&mut shape, field, parsed::<Shape>(field, value, WORD_BYTES_MAX)?),
        "files" => once(&mut files, field, value.get()),
        _ => unknown.add(field, value, &mut memory),
    })?;
    let extra = unknown.gathered();
    let key = ArtifactKey::new(name.ok_or_else(|| lacks("name"))?, version.ok_or_else(|| lacks("version"))?);
    let shape = shape.ok_or_else(|| lacks("shape"))?;
    let files = self::files(files.ok_or_else(|| lacks("files"))?, &mut memory)?;
    Ok(Manifest { key, shape, files, extra })
}

/// Parses the files of a manifest.
fn files(text: &str, memory: &mut Memory) -> Result<Files> {
    let count = count_members(text);
    if count > limits::FILES_MAX {
        return Err(Error::corrupt(format!("a manifest of {count} files; at most {}", limits::FILES_MAX)));
    }
    // Reserve the memory of the list before it is allocated.
    memory.files = count;
    memory.take(count * size_of::<(FilePath, FileEntry)>())?;
    // `expected_max` adds up the size that the parsed fields justify. A larger document is padded.
    let (mut files, mut expected_max) = (Vec::with_capacity(count), HEAD_BYTES_MAX);
    each_member(text, &mut |path, value| {
        let path = FilePath::new(path)
            .map_err(|cause| Error::corrupt(format!("the manifest is damaged: {}", cause.message())))?;
        let entry = entry(value.get(), &mut expected_max, memory)
            .map_err(|cause| Error::corrupt(format!("the manifest is damaged: {path}: {}", cause.message())))?;
        memory.take(path.as_str().len() + entry.heap_bytes())?;
        files.push((path, entry));
        Ok(())
    })?;
    if memory.bytes > expected_max {
        return Err(too_large(memory.bytes, &format!("its {count} files"), expected_max));
    }
    Files::from_list(files).map_err(|path| Error::corrupt(format!("the manifest lists {path} twice")))
}

/// The known fields of an entry.
const ENTRY_FIELDS: [&str; 8] = ["size", "sha256", "provenance", "git_oid", "ladder", "format", "held", "sidecar"];

/// Parses the entry of one file. Adds the size that the entry may have in the document to `expected_max`, and takes the
/// memory for parsing from `memory`.
fn entry(text: &str, expected_max: &mut usize, memory: &mut Memory) -> Result<FileEntry> {
    let (mut size, mut details, mut seen) = (None, FileDetails::NONE, [false; ENTRY_FIELDS.len()]);
    let mut unknown = Unknown::new(limits::UNKNOWN_ENTRY_BYTES_MAX);
    *expected_max += ENTRY_BYTES_MAX;
    each_member(text, &mut |field, value| {
        if let Some(at) = ENTRY_FIELDS.iter().position(|known| *known == field)
            && std::mem::replace(&mut seen[at], true)
        {
            return Err(twice(field));
        }
        match field {
            "size" => size = Some(parsed(field, value, WORD_BYTES_MAX)?),
            "sha256" => details.sha256 = parsed(field, value, WORD_BYTES_MAX)?,
            "provenance" => details.provenance = parsed(field, value, WORD_BYTES_MAX)?,
            "git_oid" => details.git_oid = parsed(field, value, WORD_BYTES_MAX)?,
            "ladder" => {
                // The base64 text is decoded to bytes, and the bytes to states.
                memory.take(value.get().len() * 3 / 2)?;
                details.ladder = ladder(value)?;
                *expected_max += value.get().len();
            }
            "format" => details.format = parsed(field, value, WORD_BYTES_MAX)?,
            "held" => details.held = held(value)?,
            "sidecar" => details.sidecar = parsed(field, value, WORD_BYTES_MAX)?,
            _ => {
                unknown.add(field, value, memory)?;
                *expected_max += field.len() + value.get().len();
            }
        }
        Ok(())
    })?;
    Ok(FileEntry { extra: unknown.gathered(), ..FileEntry::with(size.ok_or_else(|| lacks("size"))?, details) })
}

/// Parses a ladder.
fn ladder(value: &RawValue) -> Result<Option<Ladder>> {
    within("ladder", value, LADDER_BYTES_MAX)?;
    if value.get() == "null" {
        return Ok(None);
    }
    let (mut part_size, mut states) = (None, None);
    each_member(value.get(), &mut |field, value| {
        match field {
            "part_size" => once(&mut part_size, field, parsed::<u64>(field, value, WORD_BYTES_MAX)?)?,
            "states" => once(&mut states, field, text_of(field, value)?)?,
            _ => {}
        }
        Ok(())
    })?;
    let (part_size, states) = (part_size.ok_or_else(|| lacks("part_size"))?, states.ok_or_else(|| lacks("states"))?);
    Ladder::from_base64(part_size, &states).map(Some)
}

/// Parses the value of `held`. The variants differ in their fields. Of an unknown variant, the fields of a known one
/// are read, if it has them.
fn held(value: &RawValue) -> Result<Option<Held>> {
    within("held", value, HELD_BYTES_MAX)?;
    let text = value.get();
    if text == "null" {
        return Ok(None);
    }
    let held = serde_json::from_str::<UnsyncedFile>(text).map(Held::Unsynced);
    let held = held.or_else(|_| serde_json::from_str::<FileIdentity>(text).map(Held::Disk));
    let held = held.or_else(|_| serde_json::from_str::<ObjectIdentity>(text).map(Held::Remote));
    held.map(Some).map_err(|_| Error::corrupt("held is neither a file nor an object"))
}

/// Collects unknown fields.
struct Unknown<'a> {
    fields: Vec<(String, &'a RawValue)>,
    bytes: usize,
    bytes_max: usize,
}

impl<'a> Unknown<'a> {
    fn new(bytes_max: usize) -> Self {
        Self { fields: Vec::new(), bytes: 0, bytes_max }
    }

    fn add(&mut self, field: &str, value: &'a RawValue, memory: &mut Memory) -> Result<()> {
        let refuse = |what: String| Err(Error::corrupt(format!("unknown fields ({field:?} is the last): {what}")));
        self.bytes += field.len() + value.get().len();
        if self.bytes > self.bytes_max {
            return refuse(format!("{} bytes; at most {}", self.bytes, self.bytes_max));
        }
        if self.fields.len() == limits::UNKNOWN_FIELDS_MAX {
            return refuse(format!("more than {}", limits::UNKNOWN_FIELDS_MAX));
        }
        if self.fields.iter().any(|(there, _)| there == field) {
            return Err(twice(field));
        }
        self.fields.push((field.to_owned(), value));
        // Twice: once while the fields are joined, once for the result.
        memory.take(2 * (field.len() + value.get().len()))
    }

    fn gathered(self) -> UnknownFields {
        let mut fields = UnknownFields::default();
        if !self.fields.is_empty() {
            fields.add_all(self.fields.iter().map(|(field, value)| (field.as_str(), *value)));
        }
        fields
    }
}

/// The memory that the parsed form may still use.
struct Memory {
    left: usize,
    /// The size of the document in bytes.
    bytes: usize,
    /// The number of files.
    files: usize,
}

impl Memory {
    fn take(&mut self, bytes: usize) -> Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            Error::corrupt(format!(
                "a manifest of {} files in {} bytes would take more than {MEMORY_PER_BYTE} times that in memory",
                self.files, self.bytes
            ))
            .hint("publish the artifact again, or remove what made this manifest; modelcache writes none like it")
        })?;
        Ok(())
    }
}

/// Calls `visit` for each member of the JSON object `text`, in order.
///
/// # Errors
/// An error of `visit`, and [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if `text` is not a JSON object.
fn each_member<'a>(text: &'a str, visit: &mut dyn FnMut(&str, &'a RawValue) -> Result<()>) -> Result<()> {
    struct Members<'v, 'a> {
        visit: &'v mut dyn FnMut(&str, &'a RawValue) -> Result<()>,
        failure: &'v mut Option<Error>,
    }
    impl<'a> Visitor<'a> for Members<'_, 'a> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'a>>(self, mut members: A) -> Result<(), A::Error> {
            while let Some(Field(field)) = members.next_key()? {
                if let Err(error) = (self.visit)(&field, members.next_value()?) {
                    *self.failure = Some(error);
                    return Err(de::Error::custom("refused"));
                }
            }
            Ok(())
        }
    }
    // For any other value, the parser's error would quote the whole document.
    if !text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('{') {
        return Err(Error::corrupt("the manifest is damaged: an object is missing"));
    }
    let (mut failure, mut parser) = (None, serde_json::Deserializer::from_str(text));
    let read = parser.deserialize_map(Members { visit, failure: &mut failure }).and_then(|()| parser.end());
    failure.map_or_else(|| read.map_err(damaged), Err)
}

/// Returns the members of the JSON object `text`.
pub(super) fn members(text: &str) -> Result<Vec<(String, &RawValue)>> {
    let mut all = Vec::new();
    each_member(text, &mut |field, value| {
        all.push((field.to_owned(), value));
        Ok(())
    })?;
    Ok(all)
}

/// The name of a member, borrowed from the document if it has no escapes.
struct Field<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Field<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl<'de> Visitor<'de> for Name {
            type Value = Field<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E: de::Error>(self, name: &'de str) -> Result<Field<'de>, E> {
                Ok(Field(Cow::Borrowed(name)))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Field<'de>, E> {
                Ok(Field(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(Name)
    }
}

/// Parses a value of at most `bytes_max` bytes of JSON.
fn parsed<'a, T: Deserialize<'a>>(field: &str, value: &'a RawValue, bytes_max: usize) -> Result<T> {
    within(field, value, bytes_max)?;
    serde_json::from_str(value.get()).map_err(|cause| Error::corrupt(format!("{field}: {cause}")))
}

/// Returns a JSON string, without a copy if it has no escapes.
fn text_of<'a>(field: &str, value: &'a RawValue) -> Result<Cow<'a, str>> {
    let quoted = value.get().strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    let text = quoted.ok_or_else(|| Error::corrupt(format!("{field} is not a string")))?;
    Ok(if text.contains('\\') { Cow::Owned(serde_json::from_str(value.get()).map_err(damaged)?) } else { text.into() })
}

/// Checks the length of a value.
fn within(field: &str, value: &RawValue, bytes_max: usize) -> Result<()> {
    match value.get().len() {
        bytes if bytes > bytes_max => Err(Error::corrupt(format!("{field} has {bytes} bytes; at most {bytes_max}"))),
        _ => Ok(()),
    }
}

/// Stores the value of a field. Fails if the field occurs twice.
fn once<T>(slot: &mut Option<T>, field: &str, value: T) -> Result<()> {
    slot.replace(value).map_or(Ok(()), |_| Err(twice(field)))
}

fn twice(field: &str) -> Error {
    Error::corrupt(format!("duplicate field {field}"))
}

fn lacks(field: &str) -> Error {
    Error::corrupt(format!("the manifest is damaged: it has no {field}"))
}

fn too_large(bytes: usize, what: &str, bytes_max: usize) -> Error {
    Error::corrupt(format!("a manifest of {bytes} bytes is too large for {what}: at most {bytes_max} bytes"))
        .hint("publish the artifact again, or remove what made this manifest; modelcache writes none like it")
}

fn damaged(cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::corrupt("the manifest is damaged").cause(cause)
}

/// Refuses deep nesting and long names, without allocations. For text that is not JSON, the outcome is arbitrary; the
/// parser refuses it later.
pub(super) fn look_over(text: &str) -> Result<()> {
    let (mut string, mut deepest) = (0, 0);
    scan(text, &mut |token, depth| {
        deepest = deepest.max(depth);
        match token {
            Token::String(bytes) => string = bytes,
            Token::Byte(b' ' | b'\t' | b'\n' | b'\r') => {}
            Token::Byte(b':') if string > FIELD_JSON_BYTES_MAX => return false,
            Token::Byte(_) => string = 0,
        }
        deepest <= limits::MANIFEST_DEPTH_MAX
    });
    if deepest > limits::MANIFEST_DEPTH_MAX {
        return Err(Error::corrupt(format!("a manifest that is nested deeper than {}", limits::MANIFEST_DEPTH_MAX)));
    }
    match string {
        bytes if bytes > FIELD_JSON_BYTES_MAX => {
            Err(Error::corrupt(format!("a manifest with a name of {bytes} bytes; at most {FIELD_JSON_BYTES_MAX}")))
        }
        _ => Ok(()),
    }
}

/// Returns the number of members of an object. `text` must be valid JSON.
fn count_members(text: &str) -> usize {
    let mut members = 0;
    scan(text, &mut |token, depth| {
        members += usize::from(depth == 1 && matches!(token, Token::Byte(b':')));
        true
    });
    members
}

/// A token of the scanner: a string with its length in bytes of JSON, or a single byte outside strings.
enum Token {
    String(usize),
    Byte(u8),
}

/// Calls `visit` for each token of `text` with the nesting depth, until it returns false.
fn scan(text: &str, visit: &mut impl FnMut(Token, usize) -> bool) {
    let (bytes, mut at, mut depth) = (text.as_bytes(), 0, 0_usize);
    while let Some(byte) = bytes.get(at) {
        let start = at;
        at += 1;
        let token = match byte {
            b'"' => {
                while let Some(byte) = bytes.get(at).filter(|byte| **byte != b'"') {
                    // Skip an escaped quote.
                    at += if *byte == b'\\' { 2 } else { 1 };
                }
                at += 1;
                Token::String(at - start)
            }
            byte => Token::Byte(*byte),
        };
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if !visit(token, depth) {
            return;
        }
    }
}
