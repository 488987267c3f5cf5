//! Generates docs/json.md, which describes the objects that `modelcache --json` prints.
//!
//! Field names, types and meanings come from the serde attributes and the comments at the types, which are read from
//! the sources. The examples are serialized values, and their keys are compared with the fields that were read.

use crate::repository::root;
use anyhow::{Context, Result, bail, ensure};
use modelcache_cli::docs::reports;
use regex::Regex;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// The sources of the types, below `crates/`.
const SOURCES: [&str; 18] = [
    "modelcache/src/cache/report.rs",
    "modelcache/src/digest.rs",
    "modelcache/src/disk/hub_layout.rs",
    "modelcache/src/disk/link.rs",
    "modelcache/src/disk/materialize.rs",
    "modelcache/src/disk/misplaced.rs",
    "modelcache/src/disk/pin.rs",
    "modelcache/src/disk/prune.rs",
    "modelcache/src/disk/running_fills.rs",
    "modelcache/src/check/mod.rs",
    "modelcache/src/error.rs",
    "modelcache/src/finding.rs",
    "modelcache/src/key.rs",
    "modelcache/src/manifest.rs",
    "modelcache-cli/src/output.rs",
    "modelcache-cli/src/verbs/backfill.rs",
    "modelcache-cli/src/verbs/pin.rs",
    "modelcache-cli/src/verbs/watch.rs",
];
/// The source of the doctor's report. It is read last, so that its type `Report` replaces any other of this name.
const DOCTOR: &str = "modelcache-cli/src/verbs/doctor.rs";

const HEAD: &str = "# JSON output

<!-- Written by `cargo xtask docs`; edit the comments at the types, or crates/modelcache-cli/src/docs/json.rs. -->

With `--json`, a command prints its result to standard output as JSON, one object per line, with the fields in
alphabetical order. Progress and messages stay on standard error.

- Sizes are in bytes. Durations are in seconds. Times are in RFC 3339, in UTC.
- A value that is unknown or does not apply is `null`, unless the table says that the field is absent.
- A later release may add fields, but does not rename or remove them.

The Python package builds its data classes from the same objects. Three things differ: `from` and `to` of a tag are
called `before` and `after` in Python, `from` of a resolved reference is called `origin`, and times are numbers of
seconds since the Unix epoch. `inspect`, `prune` and `doctor` of the package return the objects themselves, `doctor` without
`exit`.
";

/// Returns the page.
pub(super) fn page() -> Result<String> {
    let mut types = Types::read()?;
    let mut page = HEAD.to_owned();
    for report in reports()? {
        let rows = report.types.iter().map(|name| types.rows(name)).collect::<Result<Vec<_>>>()?.concat();
        types.compare(&report.example, &rows).with_context(|| format!("the example of `{}`", report.command))?;
        let title = if report.command == "Errors" { "Errors".to_owned() } else { format!("`{}`", report.command) };
        page.push_str(&format!("\n## {title}\n\n{}\n\n{}", report.about, table(&rows)));
        page.push_str(&format!("\n```json\n{}\n```\n", serde_json::to_string_pretty(&report.example)?));
    }
    page.push_str("\n## Nested objects\n");
    let mut described = BTreeSet::new();
    // Describing an object may mention further ones.
    while let Some(name) = types.mentioned.difference(&described).next().cloned() {
        page.push_str(&format!("\n### {}\n\n{}", title(&name), table(&types.rows(&name)?)));
        described.insert(name);
    }
    Ok(page)
}

/// One field of an object.
#[derive(Clone)]
struct Row {
    name: String,
    /// The JSON type.
    json_type: String,
    meaning: String,
    may_be_absent: bool,
    /// The Rust type of the object, or of the objects in the array.
    object: Option<String>,
}

fn table(rows: &[Row]) -> String {
    let row = |row: &Row| format!("| `{}` | {} | {} |\n", row.name, row.json_type, row.meaning);
    rows.iter().map(row).fold("| field | type | meaning |\n|---|---|---|\n".to_owned(), |table, row| table + &row)
}

/// Returns the heading of a nested object: the name of its type without the suffix `Json`.
fn title(name: &str) -> &str {
    name.strip_suffix("Json").unwrap_or(name)
}

/// A field or variant, as it was read from the sources.
#[derive(Default)]
struct Member {
    name: String,
    /// The Rust type; empty for a variant.
    of: String,
    docs: Vec<String>,
    /// The contents of `#[serde(…)]`.
    serde: String,
}

/// A struct or enum, as it was read from the sources.
struct Definition {
    serde: String,
    members: Vec<Member>,
}

struct Types {
    definitions: BTreeMap<String, Definition>,
    /// The objects that a table refers to.
    mentioned: BTreeSet<String>,
}

impl Types {
    fn read() -> Result<Self> {
        let mut definitions = BTreeMap::new();
        for source in SOURCES.iter().chain([&DOCTOR]) {
            let text = fs::read_to_string(root().join("crates").join(source)).with_context(|| source.to_string())?;
            definitions.extend(definitions_in(&text)?);
        }
        Ok(Self { definitions, mentioned: BTreeSet::new() })
    }

    fn definition(&self, name: &str) -> Result<&Definition> {
        self.definitions.get(name).with_context(|| format!("{name} is in none of the sources of docs/json.md"))
    }

    /// Returns the fields of an object, in the order of the type.
    fn rows(&mut self, name: &str) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        if let Some(form) = value_of("into", &self.definition(name)?.serde) {
            return self.rows(&form);
        }
        for index in 0..self.definition(name)?.members.len() {
            let Member { name: field, of, docs, serde } = &self.definition(name)?.members[index];
            if has("skip", serde) {
                continue;
            }
            if has("flatten", serde) {
                // A type parameter stands for a type that the report names as well.
                let of = without_reference(of);
                if of != "T" {
                    rows.extend(self.rows(&of)?);
                }
                continue;
            }
            let (row_name, meaning) = (value_of("rename", serde).unwrap_or_else(|| field.clone()), meaning(docs)?);
            let may_be_absent = serde.contains("skip_serializing_if");
            let (of, with) = (of.clone(), value_of("serialize_with", serde));
            let (json_type, object) = match with.as_deref() {
                Some("json::time") => ("time or null".to_owned(), None),
                Some("json::path") => ("string".into(), None),
                Some("json::optional_path" | "tag_name") => ("string or null".into(), None),
                Some("json::seconds") => ("number".into(), None),
                Some("phases") => ("object: a number for each phase".into(), None),
                Some("pin") => self.json_type("Option<PinJson>", false)?,
                Some(other) => {
                    bail!("{name}.{field}: xtask/src/docs/json.rs does not know the type that {other} serializes to")
                }
                None => self.json_type(&of, may_be_absent)?,
            };
            rows.push(Row { name: row_name, json_type, meaning, may_be_absent, object });
        }
        Ok(rows)
    }

    /// Returns the JSON type of a Rust type, and the Rust type of the object in it.
    fn json_type(&mut self, of: &str, may_be_absent: bool) -> Result<(String, Option<String>)> {
        let of = without_reference(of);
        let argument = |generic: &str| of.strip_prefix(generic)?.strip_suffix('>').map(str::to_owned);
        if let Some(of) = argument("Option<") {
            let (json_type, object) = self.json_type(&of, false)?;
            return Ok((if may_be_absent { json_type } else { format!("{json_type} or null") }, object));
        }
        let item = argument("Vec<").or_else(|| argument("BTreeSet<"));
        if let Some(of) = item.or_else(|| of.strip_prefix('[')?.strip_suffix(']').map(str::to_owned)) {
            let (json_type, object) = self.json_type(&of, false)?;
            return Ok((format!("array of {json_type}"), object));
        }
        if let Some(arguments) = argument("BTreeMap<") {
            let (key, of) = arguments.split_once(", ").context("a map has two arguments")?;
            let ((keys, _), (json_type, object)) = (self.json_type(key, false)?, self.json_type(of, false)?);
            return Ok((format!("object: {json_type} for {keys}"), object));
        }
        let json_type = match of.as_str() {
            "u8" | "u32" | "u64" | "usize" => "integer",
            "f64" => "number",
            "bool" => "boolean",
            "str" | "String" | "ArtifactName" | "Version" | "FilePath" | "Digest" | "GitOid" => "string",
            name => {
                let Definition { serde, members } = self.definition(name)?;
                if members.iter().all(|member| member.of.is_empty()) {
                    let case = value_of("rename_all", serde).with_context(|| format!("{name} has no rename_all"))?;
                    let words: Vec<_> = members.iter().map(|variant| variant_text(&variant.name, &case)).collect();
                    return Ok((words.join(", "), None));
                }
                self.mentioned.insert(name.to_owned());
                let json_type = format!("[{}](#{})", title(name), title(name).to_lowercase());
                return Ok((json_type, Some(name.to_owned())));
            }
        };
        Ok((json_type.to_owned(), None))
    }

    /// Compares the keys of an example with the fields of the types, also in nested objects.
    fn compare(&mut self, example: &Value, rows: &[Row]) -> Result<()> {
        let fields = example.as_object().context("the example is not an object")?;
        if let Some(key) = fields.keys().find(|key| !rows.iter().any(|row| row.name == **key)) {
            bail!("the example has the field {key}, which no type has");
        }
        for row in rows {
            let value = fields.get(&row.name);
            ensure!(value.is_some() || row.may_be_absent, "the example lacks the field {}", row.name);
            let Some(object) = &row.object else { continue };
            let nested = match value {
                Some(Value::Array(items)) => items.clone(),
                Some(value @ Value::Object(_)) => vec![value.clone()],
                _ => continue,
            };
            let rows = self.rows(object)?;
            nested.iter().try_for_each(|value| self.compare(value, &rows)).with_context(|| row.name.clone())?;
        }
        Ok(())
    }
}

/// Reads the structs and enums of a source that rustfmt has formatted.
fn definitions_in(text: &str) -> Result<BTreeMap<String, Definition>> {
    let head = Regex::new(r"^(?:pub(?:\(\w+\))? )?(?:struct|enum) (\w+)(?:<[^>]*>)? \{$")?;
    let field = Regex::new(r"^    (?:pub(?:\(\w+\))? )?(\w+): (.+),$")?;
    let variant = Regex::new(r"^    (\w+),$")?;
    let serde = Regex::new(r"^ *#\[serde\((.*)\)\]$")?;
    let mut definitions = BTreeMap::new();
    // The serde attribute above the next type, and the type that is being read.
    let (mut above, mut open): (String, Option<(String, Definition)>) = (String::new(), None);
    let mut member = Member::default();
    for line in text.lines() {
        let attribute = serde.captures(line).map(|found| found[1].to_owned());
        let Some((_, definition)) = &mut open else {
            if let Some(found) = head.captures(line) {
                let definition = Definition { serde: std::mem::take(&mut above), members: Vec::new() };
                (open, member) = (Some((found[1].to_owned(), definition)), Member::default());
            } else if let Some(attribute) = attribute {
                above = attribute;
            } else if line.is_empty() {
                above.clear();
            }
            continue;
        };
        if line == "}" {
            definitions.extend(open.take());
        } else if let Some(docs) = line.strip_prefix("    ///") {
            member.docs.push(docs.trim().to_owned());
        } else if let Some(attribute) = attribute {
            member.serde = attribute;
        } else if let Some(found) = field.captures(line) {
            let read = std::mem::take(&mut member);
            definition.members.push(Member { name: found[1].to_owned(), of: found[2].to_owned(), ..read });
        } else if let Some(found) = variant.captures(line) {
            let read = std::mem::take(&mut member);
            definition.members.push(Member { name: found[1].to_owned(), ..read });
        }
    }
    Ok(definitions)
}

/// Returns a Rust type without reference and lifetimes.
fn without_reference(of: &str) -> String {
    let of = of.strip_prefix('&').unwrap_or(of);
    let of = of.strip_suffix("<'a>").unwrap_or(of);
    of.strip_prefix("'a ").or_else(|| of.strip_prefix("'static ")).unwrap_or(of).to_owned()
}

/// Returns true if `word` is one of the serde attributes.
fn has(word: &str, serde: &str) -> bool {
    serde.split(", ").any(|each| each == word)
}

/// Returns the value of `name = "value"` in serde attributes.
fn value_of(name: &str, serde: &str) -> Option<String> {
    let value = |each: &str| each.strip_prefix(name)?.strip_prefix(" = \"")?.strip_suffix('"').map(str::to_owned);
    serde.split(", ").find_map(value)
}

/// Returns the name of a variant as serde serializes it, in quotes.
fn variant_text(variant: &str, case: &str) -> String {
    let letter = |(at, letter): (usize, char)| {
        let dash = if at > 0 && letter.is_uppercase() && case == "kebab-case" { "-" } else { "" };
        format!("{dash}{}", letter.to_lowercase())
    };
    format!("`\"{}\"`", variant.char_indices().map(letter).collect::<String>())
}

/// Returns the comment at a field as the text of a table cell.
fn meaning(docs: &[String]) -> Result<String> {
    let link = Regex::new(r"\[(`[^`]+`)\](?:\([^)]*\))?")?;
    Ok(link.replace_all(&docs.join(" "), "$1").replace("`None`", "`null`").replace('|', "\\|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_with_their_serialized_names() {
        let text = "/// A report.\npub struct A<'a> {\n    /// The size, or\n    /// `None`.\n    \
                    #[serde(rename = \"size\")]\n    pub bytes: Option<u64>,\n    pub(crate) name: &'a str,\n}\n\n\
                    #[serde(rename_all = \"kebab-case\")]\nenum B {\n    OneTwo,\n}\n";
        let mut types = Types { definitions: definitions_in(text).expect("definitions"), mentioned: BTreeSet::new() };
        let rows = types.rows("A").expect("rows");
        assert_eq!(
            table(&rows).lines().skip(2).collect::<Vec<_>>(),
            ["| `size` | integer or null | The size, or `null`. |", "| `name` | string |  |"]
        );
        assert_eq!(types.json_type("Vec<B>", false).expect("a JSON type").0, "array of `\"one-two\"`");
        let example = serde_json::json!({"size": 1, "name": "a", "other": 2});
        let error = types.compare(&example, &rows).expect_err("a difference").to_string();
        assert_eq!(error, "the example has the field other, which no type has");
    }
}
