//! HTTP clients with little overhead, as processes of their own: one fetches a file, one sends requests at a fixed rate.

pub(super) mod fetch;
pub(super) mod load;

use anyhow::{Context, Result};

/// The parts of a URL such as `http://127.0.0.1:80/path`.
#[derive(Debug, PartialEq, Eq)]
struct Url {
    /// Host and port.
    authority: String,
    path: String,
}

impl Url {
    fn parse(text: &str) -> Result<Self> {
        let (authority, path) = text
            .strip_prefix("http://")
            .and_then(|rest| rest.split_once('/'))
            .with_context(|| format!("not a URL with a path: {text}"))?;
        Ok(Self { authority: authority.to_owned(), path: format!("/{path}") })
    }

    /// Returns the target of a redirect: a URL, or a path on the same server.
    fn redirected(self, location: &str) -> Result<Self> {
        if location.starts_with('/') { Ok(Self { path: location.to_owned(), ..self }) } else { Self::parse(location) }
    }

    /// Returns a GET request for the path.
    fn request(&self) -> String {
        format!("GET {} HTTP/1.1\r\nHost: {}\r\n\r\n", self.path, self.authority)
    }
}

/// The head of a response.
#[derive(Debug)]
struct Head {
    /// Length of the head itself.
    bytes: usize,
    status: u16,
    /// The value of `Content-Length`.
    body_bytes: Option<u64>,
    location: Option<String>,
}

impl Head {
    /// Parses the head at the start of the received bytes. Returns `None` if it is not complete yet.
    fn parse(received: &[u8]) -> Result<Option<Self>> {
        let Some(end) = received.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return Ok(None) };
        let mut lines = std::str::from_utf8(&received[..end])?.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("a response without a status")?;
        let mut head = Self { bytes: end + 4, status: status.parse()?, body_bytes: None, location: None };
        for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
            if name.eq_ignore_ascii_case("content-length") {
                head.body_bytes = Some(value.parse()?);
            } else if name.eq_ignore_ascii_case("location") {
                head.location = Some(value.to_owned());
            }
        }
        Ok(Some(head))
    }
}

/// Returns a percentile of sorted values.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * percent / 100.0) as usize).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_is_a_url_or_a_path() {
        let url = || Url::parse("http://localhost:80/a/b").expect("a URL");
        assert_eq!(url().redirected("/c").expect("a path").request(), "GET /c HTTP/1.1\r\nHost: localhost:80\r\n\r\n");
        assert_eq!(url().redirected("http://other/c").expect("a URL").authority, "other");
    }

    #[test]
    fn a_head_is_parsed_once_it_is_complete() {
        let text = b"HTTP/1.1 302 Found\r\ncontent-length: 3\r\nLocation: /x\r\n\r\nabc";
        assert!(Head::parse(&text[..30]).expect("no error").is_none());
        let head = Head::parse(text).expect("no error").expect("complete");
        assert_eq!((head.status, head.body_bytes, head.location.as_deref()), (302, Some(3), Some("/x")));
        assert_eq!(&text[head.bytes..], b"abc");
    }
}
