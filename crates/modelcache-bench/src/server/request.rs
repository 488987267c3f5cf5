//! Parses HTTP requests: request line, headers and length of the body.

use super::wire::Wire;
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};

/// Longest request head, in bytes.
const HEAD_BYTES_MAX: u64 = 64 * 1024;

pub(super) struct Request {
    pub(super) method: String,
    /// Decoded, without the leading slash.
    pub(super) path: String,
    /// Decoded names and values.
    pub(super) query: HashMap<String, String>,
    /// Values by lower-case name.
    headers: HashMap<String, String>,
}

impl Request {
    /// Reads the next request. Returns `None` if the client closed the connection.
    pub(super) fn read(wire: &mut BufReader<Wire>) -> Result<Option<Self>> {
        let mut head = wire.take(HEAD_BYTES_MAX);
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split_ascii_whitespace();
        let method = words.next().context("the request line has no method")?.to_owned();
        let target = words.next().context("the request line has no target")?;
        // The target may be a full URL.
        let target = target
            .find("://")
            .map_or(target, |at| target[at + 3..].find('/').map_or("/", |slash| &target[at + 3 + slash..]));
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(name), decoded(value))
        };
        let query = query.split('&').filter(|part| !part.is_empty()).map(pair).collect();
        let path = decoded(path.trim_start_matches('/'));
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            ensure!(head.read_line(&mut line)? > 0, "the request head has no end");
            match line.trim_end().split_once(':') {
                None => break,
                Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            };
        }
        let request = Self { method, path, query, headers };
        // The client sends the body only after this response.
        if request.header("expect").is_some() {
            wire.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        Ok(Some(request))
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Returns the value of a query parameter.
    pub(super) fn query_value(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }

    /// Returns the length of the body on the wire, in bytes.
    pub(super) fn body_bytes(&self) -> u64 {
        self.header("content-length").and_then(|length| length.parse().ok()).unwrap_or_default()
    }

    /// Returns the length of the object in the body, in bytes. It is shorter than the body if that consists of signed
    /// chunks.
    pub(super) fn object_bytes(&self) -> u64 {
        let decoded = self.header("x-amz-decoded-content-length").and_then(|length| length.parse().ok());
        decoded.unwrap_or_else(|| self.body_bytes())
    }

    pub(super) fn wants_close(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    /// Returns the first byte and the length that the `Range` header requests of an object of `size` bytes. Returns
    /// `None` if it requests the whole object, and an error if the range is unsatisfiable.
    pub(super) fn range(&self, size: u64) -> Result<Option<(u64, u64)>, ()> {
        let Some((first, last)) = self.header("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'))
        else {
            return Ok(None);
        };
        let (first, end) = match (first.parse::<u64>(), last.parse::<u64>()) {
            (Ok(first), Ok(last)) => (first, last.saturating_add(1).min(size)),
            (Ok(first), Err(_)) => (first, size),
            (Err(_), Ok(suffix)) => (size - suffix.min(size), size),
            (Err(_), Err(_)) => return Ok(None),
        };
        if first < end { Ok(Some((first, end - first))) } else { Err(()) }
    }
}

/// Decodes percent-encoding. Invalid UTF-8 is replaced.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(range: &str) -> Request {
        let headers = HashMap::from([("range".to_owned(), range.to_owned())]);
        Request { method: "GET".into(), path: "b/k".into(), query: HashMap::new(), headers }
    }

    #[test]
    fn ranges_stay_within_the_object() {
        assert_eq!(asking("bytes=0-9").range(100), Ok(Some((0, 10))));
        assert_eq!(asking("bytes=90-199").range(100), Ok(Some((90, 10))));
        assert_eq!(asking("bytes=90-").range(100), Ok(Some((90, 10))));
        assert_eq!(asking("bytes=-5").range(100), Ok(Some((95, 5))));
        assert_eq!(asking("bytes=100-").range(100), Err(()));
        assert_eq!(asking("lines=1-2").range(100), Ok(None));
    }

    #[test]
    fn paths_are_decoded_once() {
        assert_eq!(decoded("a%2Fb%2520c%"), "a/b%20c%");
    }
}
