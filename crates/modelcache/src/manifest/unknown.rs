//! Fields of other releases, which are preserved as text and written again.

use super::read::members;
use serde::Serialize;
use serde::ser::{Error as _, SerializeMap, Serializer};
use serde_json::value::RawValue;

/// The unknown members of a JSON object.
#[derive(Debug, Clone, Default)]
pub struct UnknownFields(
    /// A JSON object with at least one member; `None` if there are no unknown fields.
    Option<Box<RawValue>>,
);

impl UnknownFields {
    /// Returns true if there are no unknown fields.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Adds a field, unless a field of this name exists.
    pub fn add(&mut self, field: &str, value: &RawValue) {
        self.add_all([(field, value)]);
    }

    /// Adds the fields of `other` whose names do not exist.
    pub(super) fn learn(&mut self, other: &Self) {
        if let Some(object) = &other.0
            && let Ok(theirs) = members(object.get())
        {
            self.add_all(theirs.iter().map(|(field, value)| (field.as_str(), *value)));
        }
    }

    /// Adds the fields whose names do not exist.
    pub(super) fn add_all<'a>(&mut self, fields: impl IntoIterator<Item = (&'a str, &'a RawValue)>) {
        let before = self.text().to_owned();
        let mut all = members(&before).unwrap_or_default();
        for (field, value) in fields {
            if !all.iter().any(|(existing, _)| existing == field) {
                all.push((field.to_owned(), value));
            }
        }
        let mut text =
            String::with_capacity(all.iter().map(|(field, value)| field.len() + value.get().len() + 8).sum());
        for (field, value) in &all {
            text.push(if text.is_empty() { '{' } else { ',' });
            text.push_str(&serde_json::Value::from(field.as_str()).to_string());
            text.push(':');
            text.push_str(value.get());
        }
        text.push('}');
        self.0 = if all.is_empty() { None } else { RawValue::from_string(text).ok() };
    }

    /// Returns the fields as a JSON object.
    fn text(&self) -> &str {
        self.0.as_ref().map_or("{}", |object| object.get())
    }

    /// Returns the heap memory that the fields use, in bytes.
    pub(super) fn heap_bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |object| object.get().len())
    }
}

impl PartialEq for UnknownFields {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text()
    }
}

impl Serialize for UnknownFields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = members(self.text()).map_err(S::Error::custom)?;
        let mut map = serializer.serialize_map(Some(all.len()))?;
        for (field, value) in all {
            map.serialize_entry(&field, value)?;
        }
        map.end()
    }
}
