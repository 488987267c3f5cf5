//! Reading manifests within bounds.
//!
//! A manifest may come from a hostile server or from another user of a shared directory. Reading one, accepted or refused,
//! allocates less than three times its bytes and [`MEMORY_BYTES_MIN`]; with the document itself that is less than four
//! times. So that this holds:
//!
//! - A first look, which allocates nothing, refuses what is nested too deep and names that are too long.
//! - Every value is taken as a slice of the document first, and parsed only if it is no longer than such a value may be.
//!   Error messages quote nothing longer than that.
//! - Fields that this release does not know stay text, of bounded length and number.
//! - Files are counted before the list of them is allocated. What the entries take is added up, and a manifest that would
//!   take more than its share is refused.

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

/// What the parsed form may take, in multiples of the text.
const MEMORY_PER_BYTE: usize = 3;
/// What the parsed form may take in any case, in bytes.
const MEMORY_BYTES_MIN: usize = 16 << 10;
/// Longest number, digest or word, in bytes of JSON.
const WORD_BYTES_MAX: usize = 256;
/// Longest name or version, in bytes of JSON: each byte may be escaped as six.
const NAME_JSON_BYTES_MAX: usize = 6 * limits::NAME_BYTES_MAX + 2;
/// Longest name of a field or path of a file, in bytes of JSON.
const FIELD_JSON_BYTES_MAX: usize = 6 * limits::PATH_BYTES_MAX;
/// Longest statement how a file is held, in bytes of JSON. It has a number or two and an entity tag.
const HELD_BYTES_MAX: usize = 1 << 10;
/// Longest ladder, in bytes of JSON: base64 of 32 bytes for each part, and as much again to spare.
const LADDER_BYTES_MAX: usize = 2 * limits::PARTS_MAX as usize * 43;
/// What a manifest may have besides its files, in bytes.
const HEAD_BYTES_MAX: usize = limits::UNKNOWN_BYTES_MAX + (64 << 10);
/// What a file may take besides its ladder and unknown fields, in bytes of JSON: a path of escapes, digests and numbers.
const ENTRY_BYTES_MAX: usize = 8 << 10;

/// The value of `manifest` in the stored form `bytes`, its checksum compared.
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
    match text.len() - list.len() {
        around if around > HEAD_BYTES_MAX => Err(too_large(text.len(), "the list of files in it", list.len())),
        _ => Ok(list),
    }
}

/// The manifest that `text` describes, which was looked over; not checked beyond its types.
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

/// The files in `text`.
fn files(text: &str, memory: &mut Memory) -> Result<Files> {
    let count = count_members(text);
    if count > limits::FILES_MAX {
        return Err(Error::corrupt(format!("a manifest of {count} files; at most {}", limits::FILES_MAX)));
    }
    memory.files = count;
    memory.take(count * size_of::<(FilePath, FileEntry)>())?;
    let (mut files, mut warranted) = (Vec::with_capacity(count), HEAD_BYTES_MAX);
    each_member(text, &mut |path, value| {
        let path = FilePath::new(path)
            .map_err(|cause| Error::corrupt(format!("the manifest is damaged: {}", cause.message())))?;
        let entry = entry(value.get(), &mut warranted, memory)
            .map_err(|cause| Error::corrupt(format!("the manifest is damaged: {path}: {}", cause.message())))?;
        memory.take(path.as_str().len() + entry.heap_bytes())?;
        files.push((path, entry));
        Ok(())
    })?;
    if memory.bytes > warranted {
        return Err(too_large(memory.bytes, &format!("its {count} files"), warranted));
    }
    Files::from_list(files).map_err(|path| Error::corrupt(format!("the manifest lists {path} twice")))
}

/// The fields of an entry that this release knows.
const ENTRY_FIELDS: [&str; 8] = ["size", "sha256", "provenance", "git_oid", "ladder", "format", "held", "sidecar"];

/// One file's entry. What it may contribute to the document's length is added to `warranted`, what only reading it takes is
/// taken from `memory`.
fn entry(text: &str, warranted: &mut usize, memory: &mut Memory) -> Result<FileEntry> {
    let (mut size, mut details, mut seen) = (None, FileDetails::NONE, [false; ENTRY_FIELDS.len()]);
    let mut unknown = Unknown::new(limits::UNKNOWN_ENTRY_BYTES_MAX);
    *warranted += ENTRY_BYTES_MAX;
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
                // The text is decoded to bytes, and those to states.
                memory.take(value.get().len() * 3 / 2)?;
                details.ladder = ladder(value)?;
                *warranted += value.get().len();
            }
            "format" => details.format = parsed(field, value, WORD_BYTES_MAX)?,
            "held" => details.held = held(value)?,
            "sidecar" => details.sidecar = parsed(field, value, WORD_BYTES_MAX)?,
            _ => {
                unknown.add(field, value, memory)?;
                *warranted += field.len() + value.get().len();
            }
        }
        Ok(())
    })?;
    Ok(FileEntry { extra: unknown.gathered(), ..FileEntry::with(size.ok_or_else(|| lacks("size"))?, details) })
}

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

/// How a file is held. The kinds are told apart by their fields; of a kind that this release does not know it reads what
/// an older one would.
fn held(value: &RawValue) -> Result<Option<Held>> {
    within("held", value, HELD_BYTES_MAX)?;
    let text = value.get();
    if text == "null" {
        return Ok(None);
    }
    let held = serde_json::from_str::<UnsyncedFile>(text).map(Held::Unsynced);
    let held = held.or_else(|_| serde_json::from_str::<FileIdentity>(text).map(Held::Disk));
    let held = held.or_else(|_| serde_json::from_str::<ObjectIdentity>(text).map(Held::Remote));
    held.map(Some).map_err(|_| Error::corrupt("held says neither a file nor an object"))
}

/// Fields that this release does not know, as they are found.
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
        // Once while the fields are put together, once for good.
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

/// What the parsed form may still take.
struct Memory {
    left: usize,
    /// Bytes of the text.
    bytes: usize,
    /// How many files it has.
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
/// What `visit` returns, and [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) for what is no JSON object.
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
    // Of anything else the parser would quote the whole.
    if !text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('{') {
        return Err(Error::corrupt("the manifest is damaged: an object is missing"));
    }
    let (mut failure, mut parser) = (None, serde_json::Deserializer::from_str(text));
    let read = parser.deserialize_map(Members { visit, failure: &mut failure }).and_then(|()| parser.end());
    failure.map_or_else(|| read.map_err(damaged), Err)
}

/// The members of the JSON object `text`.
pub(super) fn members(text: &str) -> Result<Vec<(String, &RawValue)>> {
    let mut all = Vec::new();
    each_member(text, &mut |field, value| {
        all.push((field.to_owned(), value));
        Ok(())
    })?;
    Ok(all)
}

/// The name of a member.
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

/// A value of at most `bytes_max` bytes of JSON.
fn parsed<'a, T: Deserialize<'a>>(field: &str, value: &'a RawValue, bytes_max: usize) -> Result<T> {
    within(field, value, bytes_max)?;
    serde_json::from_str(value.get()).map_err(|cause| Error::corrupt(format!("{field}: {cause}")))
}

/// A text without copying it, where it has no escapes.
fn text_of<'a>(field: &str, value: &'a RawValue) -> Result<Cow<'a, str>> {
    let quoted = value.get().strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    let text = quoted.ok_or_else(|| Error::corrupt(format!("{field} is no text")))?;
    Ok(if text.contains('\\') { Cow::Owned(serde_json::from_str(value.get()).map_err(damaged)?) } else { text.into() })
}

fn within(field: &str, value: &RawValue, bytes_max: usize) -> Result<()> {
    match value.get().len() {
        bytes if bytes > bytes_max => Err(Error::corrupt(format!("{field} has {bytes} bytes; at most {bytes_max}"))),
        _ => Ok(()),
    }
}

fn once<T>(slot: &mut Option<T>, field: &str, value: T) -> Result<()> {
    slot.replace(value).map_or(Ok(()), |_| Err(twice(field)))
}

fn twice(field: &str) -> Error {
    Error::corrupt(format!("the field {field} stands there twice"))
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

/// Refuses what is nested too deep, and names that are too long. Of what is no JSON it may refuse anything or nothing.
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

/// The number of members of an object, which is valid JSON.
fn count_members(text: &str) -> usize {
    let mut members = 0;
    scan(text, &mut |token, depth| {
        members += usize::from(depth == 1 && matches!(token, Token::Byte(b':')));
        true
    });
    members
}

/// A string of so many bytes of JSON, or a byte between strings.
enum Token {
    String(usize),
    Byte(u8),
}

/// Calls `visit` for each token of `text` with the number of open brackets, until it returns false.
fn scan(text: &str, visit: &mut impl FnMut(Token, usize) -> bool) {
    let (bytes, mut at, mut depth) = (text.as_bytes(), 0, 0_usize);
    while let Some(byte) = bytes.get(at) {
        let start = at;
        at += 1;
        let token = match byte {
            b'"' => {
                while let Some(byte) = bytes.get(at).filter(|byte| **byte != b'"') {
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
