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
    FileDetails, FileEntry, FileIdentity, Files, HeldIdentity, Manifest, ObjectIdentity, Shape, UnknownFields,
    UnsyncedFile,
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

/// The memory limit of the parsed form, in bytes for each byte of the document.
const MEMORY_PER_BYTE: usize = 3;
/// The memory that the parsed form may use in addition, in bytes.
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

/// Hint for a manifest that modelcache cannot have written.
const FOREIGN_HINT: &str =
    "modelcache does not write such manifests: find the program that wrote it, and publish the artifact again";

/// Returns the text of the member `manifest` of the stored form `bytes`. Checks format number and checksum.
pub(super) fn open_envelope(bytes: &[u8]) -> Result<&str> {
    let text = std::str::from_utf8(bytes).map_err(damaged)?;
    prescan(text)?;
    let (mut format, mut sha256, mut manifest) = (None, None, None);
    each_member(text, &mut |field, value| {
        match field {
            "format" => set_once(&mut format, field, parse_value::<u32>(field, value, WORD_BYTES_MAX)?)?,
            "sha256" => set_once(&mut sha256, field, value)?,
            "manifest" => set_once(&mut manifest, field, value.get())?,
            _ => {}
        }
        Ok(())
    })?;
    // Check the format first, because the other fields of a newer format may differ.
    let format = format.ok_or_else(|| missing("format"))?;
    if format > super::FORMAT {
        return Err(Error::invalid(format!(
            "the manifest has format {format}; this release reads up to {}",
            super::FORMAT
        ))
        .hint("update modelcache"));
    }
    let sha256 = sha256.ok_or_else(|| missing("sha256"))?;
    let manifest = manifest.ok_or_else(|| missing("manifest"))?;
    if super::Digest::of(manifest.as_bytes()) != parse_value("sha256", sha256, WORD_BYTES_MAX)? {
        return Err(Error::corrupt("the manifest does not match its own checksum"));
    }
    // Unknown fields of the envelope are ignored, but they count towards its size limit.
    match text.len() - manifest.len() {
        around if around > HEAD_BYTES_MAX => Err(Error::corrupt(format!(
            "the envelope around the manifest has {around} bytes; at most {HEAD_BYTES_MAX} are allowed"
        ))),
        _ => Ok(manifest),
    }
}

/// Parses a manifest. `text` must have passed [`prescan`]. Checks only types and limits.
pub(super) fn parse_manifest(text: &str) -> Result<Manifest> {
    let mut memory = Memory { left: MEMORY_PER_BYTE * text.len() + MEMORY_BYTES_MIN, bytes: text.len(), files: 0 };
    let (mut name, mut version, mut shape, mut files) = (None, None, None, None);
    let mut unknown = UnknownCollector::new(limits::UNKNOWN_BYTES_MAX);
    each_member(text, &mut |field, value| match field {
        "name" => set_once(&mut name, field, parse_value::<ArtifactName>(field, value, NAME_JSON_BYTES_MAX)?),
        "version" => set_once(&mut version, field, parse_value::<Version>(field, value, NAME_JSON_BYTES_MAX)?),
        "shape" => set_once(&mut shape, field, parse_value::<Shape>(field, value, WORD_BYTES_MAX)?),
        "files" => set_once(&mut files, field, value.get()),
        _ => unknown.add(field, value, &mut memory),
    })?;
    let extra = unknown.finish();
    let key = ArtifactKey::new(name.ok_or_else(|| missing("name"))?, version.ok_or_else(|| missing("version"))?);
    let shape = shape.ok_or_else(|| missing("shape"))?;
    let files = parse_files(files.ok_or_else(|| missing("files"))?, &mut memory)?;
    Ok(Manifest { key, shape, files, extra })
}

/// Parses the files of a manifest.
fn parse_files(text: &str, memory: &mut Memory) -> Result<Files> {
    let count = count_members(text);
    if count > limits::FILES_MAX {
        return Err(Error::corrupt(format!(
            "the manifest lists {count} files; at most {} are allowed",
            limits::FILES_MAX
        )));
    }
    // Reserve the memory of the list before it is allocated.
    memory.files = count;
    memory.take(count * size_of::<(FilePath, FileEntry)>())?;
    // The largest size in bytes that a document with the parsed fields can have. A larger document has padding.
    let (mut files, mut expected_max) = (Vec::with_capacity(count), HEAD_BYTES_MAX);
    each_member(text, &mut |path, value| {
        let path = FilePath::new(path)
            .map_err(|cause| Error::corrupt(format!("the manifest is damaged: {}", cause.message())))?;
        let entry = parse_entry(value.get(), &mut expected_max, memory)
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
const ENTRY_FIELDS: [&str; 9] =
    ["size", "sha256", "provenance", "git_oid", "ladder", "format", "held", "sidecar", "executable"];

/// Parses the entry of one file. Adds the size that the entry may have in the document to `expected_max`, and takes the
/// memory for parsing from `memory`.
fn parse_entry(text: &str, expected_max: &mut usize, memory: &mut Memory) -> Result<FileEntry> {
    let (mut size, mut details, mut seen) = (None, FileDetails::NONE, [false; ENTRY_FIELDS.len()]);
    let mut unknown = UnknownCollector::new(limits::UNKNOWN_ENTRY_BYTES_MAX);
    *expected_max += ENTRY_BYTES_MAX;
    each_member(text, &mut |field, value| {
        if let Some(index) = ENTRY_FIELDS.iter().position(|known| *known == field)
            && std::mem::replace(&mut seen[index], true)
        {
            return Err(duplicate(field));
        }
        match field {
            "size" => size = Some(parse_value(field, value, WORD_BYTES_MAX)?),
            "sha256" => details.sha256 = parse_value(field, value, WORD_BYTES_MAX)?,
            "provenance" => details.provenance = parse_value(field, value, WORD_BYTES_MAX)?,
            "git_oid" => details.git_oid = parse_value(field, value, WORD_BYTES_MAX)?,
            "ladder" => {
                // The base64 text is decoded to bytes, and the bytes to states.
                memory.take(value.get().len() * 3 / 2)?;
                details.ladder = parse_ladder(value)?;
                *expected_max += value.get().len();
            }
            "format" => details.format = parse_value(field, value, WORD_BYTES_MAX)?,
            "held" => details.held = parse_held(value)?,
            "sidecar" => details.sidecar = parse_value(field, value, WORD_BYTES_MAX)?,
            "executable" => details.executable = parse_value(field, value, WORD_BYTES_MAX)?,
            _ => {
                unknown.add(field, value, memory)?;
                *expected_max += field.len() + value.get().len();
            }
        }
        Ok(())
    })?;
    Ok(FileEntry { extra: unknown.finish(), ..FileEntry::with(size.ok_or_else(|| missing("size"))?, details) })
}

/// Parses a ladder.
fn parse_ladder(value: &RawValue) -> Result<Option<Ladder>> {
    check_length("ladder", value, LADDER_BYTES_MAX)?;
    if value.get() == "null" {
        return Ok(None);
    }
    let (mut part_size, mut states) = (None, None);
    each_member(value.get(), &mut |field, value| {
        match field {
            "part_size" => set_once(&mut part_size, field, parse_value::<u64>(field, value, WORD_BYTES_MAX)?)?,
            "states" => set_once(&mut states, field, parse_string(field, value)?)?,
            _ => {}
        }
        Ok(())
    })?;
    let (part_size, states) =
        (part_size.ok_or_else(|| missing("part_size"))?, states.ok_or_else(|| missing("states"))?);
    Ladder::from_base64(part_size, &states).map(Some)
}

/// Parses the value of `held`. The variants differ in their fields. An unknown variant that has the fields of a known
/// one is read as the known one.
fn parse_held(value: &RawValue) -> Result<Option<HeldIdentity>> {
    check_length("held", value, HELD_BYTES_MAX)?;
    let text = value.get();
    if text == "null" {
        return Ok(None);
    }
    let held = serde_json::from_str::<UnsyncedFile>(text).map(HeldIdentity::Unsynced);
    let held = held.or_else(|_| serde_json::from_str::<FileIdentity>(text).map(HeldIdentity::Disk));
    let held = held.or_else(|_| serde_json::from_str::<ObjectIdentity>(text).map(HeldIdentity::Remote));
    held.map(Some).map_err(|_| Error::corrupt("held is neither a file nor an object"))
}

/// Collects unknown fields.
struct UnknownCollector<'a> {
    fields: Vec<(String, &'a RawValue)>,
    bytes: usize,
    bytes_max: usize,
}

impl<'a> UnknownCollector<'a> {
    fn new(bytes_max: usize) -> Self {
        Self { fields: Vec::new(), bytes: 0, bytes_max }
    }

    /// Adds a field, and takes the memory for it.
    fn add(&mut self, field: &str, value: &'a RawValue, memory: &mut Memory) -> Result<()> {
        let refuse = |why: String| Err(Error::corrupt(format!("unknown fields ({field:?} is the last): {why}")));
        self.bytes += field.len() + value.get().len();
        if self.bytes > self.bytes_max {
            return refuse(format!("{} bytes; at most {} are allowed", self.bytes, self.bytes_max));
        }
        if self.fields.len() == limits::UNKNOWN_FIELDS_MAX {
            return refuse(format!("more than {}", limits::UNKNOWN_FIELDS_MAX));
        }
        if self.fields.iter().any(|(existing, _)| existing == field) {
            return Err(duplicate(field));
        }
        self.fields.push((field.to_owned(), value));
        // The fields are in memory twice: while they are joined, and in the result.
        memory.take(2 * (field.len() + value.get().len()))
    }

    /// Returns the collected fields.
    fn finish(self) -> UnknownFields {
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
    /// Subtracts `bytes` from the memory that is left. Fails with `Corrupt` if less is left.
    fn take(&mut self, bytes: usize) -> Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            Error::corrupt(format!(
                "the manifest has {} files in {} bytes and would take more than {MEMORY_PER_BYTE} times that in memory",
                self.files, self.bytes
            ))
            .hint(FOREIGN_HINT)
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
    // Checked here, because for any other value the parser's error would quote the whole document.
    if !text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('{') {
        return Err(Error::corrupt("the manifest is damaged: expected a JSON object"));
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
fn parse_value<'a, T: Deserialize<'a>>(field: &str, value: &'a RawValue, bytes_max: usize) -> Result<T> {
    check_length(field, value, bytes_max)?;
    serde_json::from_str(value.get()).map_err(|cause| Error::corrupt(format!("{field}: {cause}")))
}

/// Parses a JSON string. Does not copy it if it has no escapes.
fn parse_string<'a>(field: &str, value: &'a RawValue) -> Result<Cow<'a, str>> {
    let quoted = value.get().strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    let text = quoted.ok_or_else(|| Error::corrupt(format!("{field} is not a string")))?;
    Ok(if text.contains('\\') { Cow::Owned(serde_json::from_str(value.get()).map_err(damaged)?) } else { text.into() })
}

/// Fails if a value has more than `bytes_max` bytes of JSON.
fn check_length(field: &str, value: &RawValue, bytes_max: usize) -> Result<()> {
    match value.get().len() {
        bytes if bytes > bytes_max => {
            Err(Error::corrupt(format!("{field} has {bytes} bytes; at most {bytes_max} are allowed")))
        }
        _ => Ok(()),
    }
}

/// Stores the value of a field. Fails if the field occurs twice.
fn set_once<T>(slot: &mut Option<T>, field: &str, value: T) -> Result<()> {
    slot.replace(value).map_or(Ok(()), |_| Err(duplicate(field)))
}

fn duplicate(field: &str) -> Error {
    Error::corrupt(format!("duplicate field {field}"))
}

fn missing(field: &str) -> Error {
    Error::corrupt(format!("the manifest is damaged: it has no {field}"))
}

fn too_large(bytes: usize, what: &str, bytes_max: usize) -> Error {
    Error::corrupt(format!(
        "the manifest has {bytes} bytes and is too large for {what}; at most {bytes_max} are allowed"
    ))
    .hint(FOREIGN_HINT)
}

fn damaged(cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::corrupt("the manifest is damaged").cause(cause)
}

/// Refuses deep nesting and long names, without allocations. The result for text that is not JSON is arbitrary, because
/// the parser refuses such text later.
pub(super) fn prescan(text: &str) -> Result<()> {
    // `string`: the length of the last string, until a byte other than white space follows.
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
        return Err(Error::corrupt(format!(
            "the manifest is nested deeper than {} levels",
            limits::MANIFEST_DEPTH_MAX
        )));
    }
    match string {
        bytes if bytes > FIELD_JSON_BYTES_MAX => {
            let bytes_max = FIELD_JSON_BYTES_MAX;
            Err(Error::corrupt(format!(
                "a field name in the manifest has {bytes} bytes; at most {bytes_max} are allowed"
            )))
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
