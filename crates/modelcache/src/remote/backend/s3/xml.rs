//! Extraction of elements from the XML responses of S3.
//!
//! Every element before the first syntax error is found, so that a truncated error body still yields its code. An
//! element nested deeper than [`DEPTH_MAX`] counts as a syntax error.

use quick_xml::Reader;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesRef, Event};
use std::ops::Range;

/// Deepest nesting of elements. S3 uses five levels, and the parser allocates memory for each.
const DEPTH_MAX: usize = 32;

/// Returns the text of the first element with this local name, or `None` if it is absent or has no end tag.
pub(super) fn text(xml: &str, name: &str) -> Option<String> {
    let element = elements(xml, name).next()?;
    let (mut reader, mut text) = (reader(xml.get(element)?), String::new());
    loop {
        match reader.read_event().ok()? {
            Event::Text(part) => text.push_str(&part.decode().ok()?),
            Event::CData(part) => text.push_str(&part.decode().ok()?),
            Event::GeneralRef(reference) => push_reference(&mut text, &reference)?,
            Event::Eof => return Some(text),
            _ => {}
        }
    }
}

/// Appends the character that a reference (`&amp;`, `&#x41;`) stands for. An unknown reference is kept as it is.
fn push_reference(text: &mut String, reference: &BytesRef<'_>) -> Option<()> {
    let name = reference.decode().ok()?;
    match (reference.resolve_char_ref(), resolve_predefined_entity(&name)) {
        (Ok(Some(character)), _) => text.push(character),
        (_, Some(entity)) => text.push_str(entity),
        _ => text.extend(["&", &name, ";"]),
    }
    Some(())
}

/// Returns the position of every element with this local name, from start tag to end tag. Elements inside such an
/// element are not returned. Ends before the first syntax error.
pub(super) fn elements<'a>(xml: &'a str, name: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
    // The parser does not count a byte order mark, so it is skipped here.
    let content = xml.trim_start_matches('\u{feff}');
    let skipped = xml.len() - content.len();
    let (mut reader, mut depth, mut has_ended) = (reader(content), 0, false);
    std::iter::from_fn(move || {
        let found = if has_ended { None } else { next(&mut reader, &mut depth, name) };
        has_ended = found.is_none();
        found.map(|at| at.start + skipped..at.end + skipped)
    })
}

/// Returns the position of the next element named `name`.
fn next(reader: &mut Reader<&[u8]>, depth: &mut usize, name: &str) -> Option<Range<usize>> {
    let mut open = None;
    loop {
        let start = position(reader)?;
        match reader.read_event().ok()? {
            Event::Start(tag) => {
                *depth += 1;
                if *depth > DEPTH_MAX {
                    return None;
                }
                if open.is_none() && tag.local_name().as_ref() == name.as_bytes() {
                    open = Some((start, *depth));
                }
            }
            Event::End(_) => {
                // The parser has checked that the names of both tags match.
                if let Some((start, depth_open)) = open
                    && depth_open == *depth
                {
                    *depth -= 1;
                    return Some(start..position(reader)?);
                }
                *depth = depth.checked_sub(1)?;
            }
            Event::Eof => return None,
            _ => {}
        }
    }
}

fn position(reader: &Reader<&[u8]>) -> Option<usize> {
    usize::try_from(reader.buffer_position()).ok()
}

fn reader(xml: &str) -> Reader<&[u8]> {
    let mut reader = Reader::from_str(xml);
    // Accept a bare `&`, so that an error message with one is still shown.
    reader.config_mut().allow_dangling_amp = true;
    reader
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_found_up_to_the_first_syntax_error() {
        let found = |xml: &str| elements(xml, "a").map(|at| xml[at].to_owned()).collect::<Vec<_>>();
        assert_eq!(
            found("<?xml version='1.0'?>\n<x>\n <a>1</a> <y><a k='v'><a/><a>2</a></a></y></x>"),
            ["<a>1</a>", "<a k='v'><a/><a>2</a></a>"]
        );
        assert_eq!(found("\u{feff}<x><a>1</a></x>"), ["<a>1</a>"], "a byte order mark shifts no position");
        assert_eq!(found("<x><!-- <a>0</a> --><a>1</a><a>2</x><a>3</a>"), ["<a>1</a>"]);
        assert!(found("<a>").is_empty() && found("</a><a>1</a>").is_empty() && found("").is_empty());
        let nested = |depth: usize| format!("{}<a>1</a>", "<x>".repeat(depth));
        assert_eq!((found(&nested(DEPTH_MAX - 1)).len(), found(&nested(DEPTH_MAX)).len()), (1, 0));
    }

    #[test]
    fn text_is_unescaped() {
        let plain = |inner: &str| text(&format!("<x><k>{inner}</k></x>"), "k");
        let of = |text: &str| Some(text.to_owned());
        assert_eq!(plain("&lt;&#65;&#x1;&gt; &amp;amp; &apos;&quot;"), of("<A\u{1}> &amp; '\""));
        assert_eq!(plain(" <![CDATA[<&amp;>]]> "), of(" <&amp;> "));
        assert_eq!(plain("a & b &unknown; &#xffffffff;"), of("a & b &unknown; &#xffffffff;"));
        assert_eq!(plain(""), of(""));
        assert_eq!((text("<k/>", "k"), text("<k>cut", "k"), text("<K>1</K>", "k")), (None, None, None));
        assert_eq!(text("<s:k xmlns:s='u'>1</s:k>", "k"), of("1"));
    }
}
