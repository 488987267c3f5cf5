//! Fills the page with values, as text and attributes.
//!
//! The page is described once, in page.html: page.js reads the same attributes when it updates the page.
//! - `data-text="EXPRESSION"`: the text of the element, `–` without a value
//! - `data-attr-NAME="EXPRESSION"`: the attribute `NAME`, absent without a value
//! - `data-if="PATH"`, `data-unless="PATH"`: hides the element if the value is, or is not, null, false, 0 or empty
//! - `data-each="PATH"`: repeats the `<template>` with which the element begins for each item; paths inside start at
//!   the item
//!
//! An expression is `PATH` or `PATH / PATH` (a fraction of at most 1), and may be followed by `| FORMAT`.

use modelcache::human;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Items of a list that are shown.
const ROWS_MAX: usize = 500;
/// The text of an element without a value.
const NO_VALUE: &str = "–";

/// Returns `template` with the values of `scope`. In tags of the template, `>` stands only at the end.
pub(super) fn render(template: &str, scope: &Value) -> String {
    let mut page = String::with_capacity(2 * template.len());
    fill(template, scope, &mut page);
    page
}

fn fill(template: &str, scope: &Value, page: &mut String) {
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('<') {
        let (tag, after) = after.split_once('>').unwrap_or((after, ""));
        rest = after;
        page.push_str(before);
        page.push('<');
        // `<rect …/>` ends with a slash, which has to stay the last character.
        let (tag, end) = tag.strip_suffix('/').map_or((tag, ">"), |tag| (tag, "/>"));
        page.push_str(tag);
        let (mut text, mut items) = (None, None);
        for (name, expression) in directives(tag) {
            match name {
                "text" => text = Some(shown(scope, expression).unwrap_or_else(|| NO_VALUE.into())),
                "each" => items = Some(entries(lookup(scope, expression))),
                "if" | "unless" if is_shown(lookup(scope, expression)) == (name == "if") => {}
                "if" | "unless" => page.push_str(" hidden"),
                _ => {
                    let value = name.strip_prefix("attr-").and_then(|name| Some((name, shown(scope, expression)?)));
                    page.extend(value.map(|(name, value)| format!(" {name}=\"{}\"", escape(&value))));
                }
            }
        }
        page.push_str(end);
        page.extend(text.map(|text| escape(&text)));
        if let Some((items, (head, after))) = items.zip(rest.split_once("</template>")) {
            // The script needs the template as well.
            page.push_str(head);
            page.push_str("</template>");
            let row = head.trim_start().trim_start_matches("<template>");
            items.iter().take(ROWS_MAX).for_each(|item| fill(row, item, page));
            rest = after;
        }
    }
    page.push_str(rest);
}

/// Returns the names and values of the `data-` attributes of a tag.
fn directives(tag: &str) -> impl Iterator<Item = (&str, &str)> {
    tag.split(" data-").skip(1).filter_map(|attribute| {
        let (name, rest) = attribute.split_once("=\"")?;
        Some((name, rest.split_once('"')?.0))
    })
}

/// Returns text in which no character has a meaning in HTML, for elements and for attributes in quotes.
fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut escaped, c| {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
        escaped
    })
}

fn lookup<'a>(scope: &'a Value, path: &str) -> &'a Value {
    match path {
        "." => scope,
        _ => path.split('.').fold(scope, |value, key| &value[key]),
    }
}

fn is_shown(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

/// Returns the items of an array, or those of an object with their names as `key`.
fn entries(items: &Value) -> Vec<Value> {
    match items {
        Value::Array(items) => items.clone(),
        Value::Object(fields) => {
            let keyed = |(key, item): (&String, &Value)| {
                let mut item = item.clone();
                item["key"] = json!(key);
                item
            };
            fields.iter().map(keyed).collect()
        }
        _ => Vec::new(),
    }
}

/// Returns the text of an expression, or `None` without a value.
fn shown(scope: &Value, expression: &str) -> Option<String> {
    let (operands, format) = match expression.split_once('|') {
        Some((operands, format)) => (operands.trim(), Some(format.trim())),
        None => (expression, None),
    };
    let value = match operands.split_once('/') {
        Some((value, divisor)) => {
            let divisor = lookup(scope, divisor.trim()).as_f64().filter(|divisor| *divisor > 0.0)?;
            json!((lookup(scope, value.trim()).as_f64()? / divisor).min(1.0))
        }
        None => lookup(scope, operands).clone(),
    };
    match format {
        Some(format) => formatted(&value, format),
        None => match value {
            Value::Null => None,
            Value::String(text) => Some(text),
            Value::Array(items) => {
                let texts = items.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned));
                Some(texts.collect::<Vec<_>>().join(", "))
            }
            other => Some(other.to_string()),
        },
    }
}

fn formatted(value: &Value, format: &str) -> Option<String> {
    match format {
        "bytes" => value.as_f64().map(|bytes| human::bytes(bytes as u64)),
        "percent" => value.as_f64().map(|fraction| format!("{:.0} %", 100.0 * fraction)),
        "number" => value.as_f64().map(|fraction| format!("{:.0}", 100.0 * fraction)),
        "width" => value.as_f64().map(|fraction| format!("{:.2}%", 100.0 * fraction)),
        "duration" => value.as_f64().map(duration),
        "ago" => ago(value),
        "rate" => rate(value).map(|rate| format!("{}/s", human::bytes(rate as u64))),
        "left" => {
            let left = value["total_bytes"].as_f64()? - value["done_bytes"].as_f64()?;
            Some(duration(left.max(0.0) / rate(value)?))
        }
        "tier" => {
            let tiers = [("remote", "remote_bytes"), ("origin", "origin_bytes")];
            let used: Vec<_> =
                tiers.iter().filter(|(_, bytes)| is_shown(&value[bytes])).map(|(tier, _)| *tier).collect();
            Some(used.join(", ")).filter(|tiers| !tiers.is_empty())
        }
        _ => None,
    }
}

/// Formats a duration in its largest unit.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.0} s"),
        s if s < 3600.0 => format!("{} min", (s / 60.0) as u64),
        s if s < 86_400.0 => format!("{} h", (s / 3600.0) as u64),
        s => format!("{} d", (s / 86_400.0) as u64),
    }
}

/// Formats the time since a moment, which is in seconds since the Unix epoch or in RFC 3339.
fn ago(value: &Value) -> Option<String> {
    let then = match value {
        Value::Number(unix) => UNIX_EPOCH.checked_add(Duration::from_secs(unix.as_u64()?))?,
        Value::String(text) => humantime::parse_rfc3339(text).ok()?,
        _ => return None,
    };
    let age = SystemTime::now().duration_since(then).unwrap_or_default();
    Some(format!("{} ago", duration(age.as_secs() as f64)))
}

/// Returns the average rate of a fill in bytes per second; `None` before the first byte.
fn rate(fill: &Value) -> Option<f64> {
    let bytes = fill["remote_bytes"].as_f64()? + fill["origin_bytes"].as_f64()?;
    let seconds = fill["seconds"].as_f64()?;
    (bytes > 0.0 && seconds > 0.0).then(|| bytes / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_in_text_and_in_attributes() {
        let name = "\"><script>alert('&')</script>";
        let page = render("<p data-attr-aria-label=\"name\" data-text=\"name\"></p>", &json!({ "name": name }));
        let safe = "&quot;&gt;&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;";
        let tag = "<p data-attr-aria-label=\"name\" data-text=\"name\"";
        assert_eq!(page, format!("{tag} aria-label=\"{safe}\">{safe}</p>"));
    }

    #[test]
    fn lists_repeat_their_template_and_values_are_not_read_as_templates() {
        let template = "<ul data-each=\"items\">\n<template><li data-text=\"name\"></li></template>\n</ul>";
        let page = render(template, &json!({ "items": [{ "name": "a" }, { "name": "<b data-text=\"name\">" }] }));
        let rows = page.split_once("</template>").expect("the template stays").1;
        let row = |text| format!("<li data-text=\"name\">{text}</li>");
        assert_eq!(rows, format!("{}{}\n</ul>", row("a"), row("&lt;b data-text=&quot;name&quot;&gt;")));
        let keyed = render(&template.replace("\"name\"", "\"key\""), &json!({ "items": { "remote": { "up": true } } }));
        assert!(keyed.contains(">remote</li>"), "{keyed}");
    }

    #[test]
    fn elements_are_hidden_by_their_value_and_absent_values_are_not_shown_as_null() {
        let hidden = |value: Value| render("<p data-if=\"v\">", &json!({ "v": value })).contains(" hidden");
        for value in [json!(null), json!(false), json!(0), json!(""), json!([]), json!({})] {
            assert!(hidden(value.clone()), "{value}");
        }
        for value in [json!(true), json!(0.5), json!("a"), json!([0]), json!({ "a": 1 })] {
            assert!(!hidden(value.clone()), "{value}");
        }
        assert!(render("<p data-text=\"a.b\">", &json!({})).ends_with(NO_VALUE));
        assert_eq!(
            render("<rect data-attr-width=\"a / b | width\"/>", &json!({ "a": 1, "b": 8 })),
            "<rect data-attr-width=\"a / b | width\" width=\"12.50%\"/>"
        );
        assert!(!render("<progress data-attr-value=\"a / b\">", &json!({ "a": 1, "b": null })).contains(" value="));
    }

    #[test]
    fn fills_have_a_rate_a_time_left_and_their_tiers() {
        let fill = json!({ "done_bytes": 40e6, "total_bytes": 100e6, "remote_bytes": 10e6, "origin_bytes": 10e6,
            "seconds": 10.0 });
        let text = |format: &str| shown(&fill, &format!(". | {format}"));
        assert_eq!(text("rate").as_deref(), Some("2.0 MB/s"));
        assert_eq!(text("left").as_deref(), Some("30 s"));
        assert_eq!(text("tier").as_deref(), Some("remote, origin"));
        assert_eq!(shown(&json!({ "seconds": 0.0, "remote_bytes": 0, "origin_bytes": 0 }), ". | rate"), None);
        assert_eq!(
            shown(&json!({ "at": "1970-01-01T00:00:00Z" }), "at | ago").map(|age| age.ends_with(" d ago")),
            Some(true)
        );
    }

    #[test]
    fn every_format_of_the_page_exists_here_and_in_the_script() {
        let (page, script) = (include_str!("page.html"), include_str!("page.js"));
        let value = json!({ "done_bytes": 1, "total_bytes": 2, "remote_bytes": 1, "origin_bytes": 0, "seconds": 1.0 });
        let formats = page.split(" | ").skip(1).filter_map(|rest| rest.split_once('"')).map(|(format, _)| format);
        for format in formats {
            assert!(script.contains(&format!("  {format}: (")), "page.js has no format {format}");
            assert!(formatted(&value, format).or_else(|| formatted(&json!(1), format)).is_some(), "{format}");
        }
    }
}
