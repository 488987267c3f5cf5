//! The part of S3 that the measured programs use: objects, listings, single and multipart uploads.
//!
//! Conditions (`If-Match`, `If-None-Match`) are honoured; signatures and digests are not checked.

use super::objects::{Object, SMALL_BYTES_MAX};
use super::request::Request;
use super::wire::{Wire, discard};
use super::{Shared, date};
use anyhow::Result;
use std::fmt::Write as _;
use std::io::{BufReader, Read as _, Write as _};
use std::sync::atomic::Ordering;
use std::time::SystemTime;

const KEYS_MAX: usize = 1000;
const XML: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";
const NAMESPACE: &str = "xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"";

/// An answer with its body in memory.
struct Answer {
    status: &'static str,
    headers: String,
    body: String,
}

impl Answer {
    fn empty(status: &'static str) -> Self {
        Self { status, headers: String::new(), body: String::new() }
    }

    fn xml(body: String) -> Self {
        Self { status: "200 OK", headers: "Content-Type: application/xml\r\n".into(), body: XML.to_owned() + &body }
    }

    fn error(status: &'static str, code: &str) -> Self {
        let body = format!("<Error><Code>{code}</Code><Message>{code}</Message><RequestId>bench</RequestId></Error>");
        Self { status, ..Self::xml(body) }
    }

    fn with_etag(mut self, etag: &str) -> Self {
        let _ = write!(self.headers, "ETag: {etag}\r\n");
        self
    }
}

impl Shared {
    pub(super) fn answer(&self, wire: &mut BufReader<Wire>, request: Request) -> Result<()> {
        let (bucket, key) = request.path.split_once('/').unwrap_or((&request.path, ""));
        if request.asks("bench-stats").is_some() {
            let stats = Answer { status: "200 OK", headers: String::new(), body: self.counts.to_json() };
            return self.send(wire, &request, stats);
        }
        // A path without a key names a bucket.
        let answer = match (request.method.as_str(), key.is_empty()) {
            ("GET" | "HEAD", false) if request.asks("uploadId").is_none() => return self.object(wire, &request),
            ("GET" | "HEAD", true) => self.bucket(&request, bucket),
            ("PUT", false) => self.put(wire, &request)?,
            ("PUT", true) => Answer::empty("200 OK"),
            ("POST", _) => {
                let mut body = vec![0; request.body_bytes() as usize];
                wire.read_exact(&mut body)?;
                self.post(&request, &String::from_utf8_lossy(&body))
            }
            ("DELETE", false) => self.delete(&request),
            _ => Answer::error("405 Method Not Allowed", "MethodNotAllowed"),
        };
        self.send(wire, &request, answer)
    }

    fn send(&self, wire: &mut BufReader<Wire>, request: &Request, answer: Answer) -> Result<()> {
        std::thread::sleep(self.shape.first_byte);
        let Answer { status, headers, body } = answer;
        let now = date::http(SystemTime::now());
        let length = body.len();
        let mut text = format!("HTTP/1.1 {status}\r\nDate: {now}\r\nContent-Length: {length}\r\n{headers}\r\n");
        if request.method != "HEAD" {
            text += &body;
        }
        wire.get_mut().write_all(text.as_bytes())?;
        Ok(wire.get_mut().flush()?)
    }

    /// Answers GET and HEAD of an object.
    fn object(&self, wire: &mut BufReader<Wire>, request: &Request) -> Result<()> {
        let found = self.objects.find(&self.objects.lock(), &request.path);
        let Some(Object { size, etag, modified, file }) = found else {
            return self.send(wire, request, Answer::error("404 Not Found", "NoSuchKey"));
        };
        if request.header("if-match").is_some_and(|wanted| !names(wanted, &etag)) {
            return self.send(wire, request, Answer::error("412 Precondition Failed", "PreconditionFailed"));
        }
        if request.header("if-none-match").is_some_and(|known| names(known, &etag)) {
            return self.send(wire, request, Answer::empty("304 Not Modified"));
        }
        let Ok(range) = request.range(size) else {
            return self.send(wire, request, Answer::error("416 Range Not Satisfiable", "InvalidRange"));
        };
        let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
        let (at, length) = range.unwrap_or((0, size));
        let (now, modified) = (date::http(SystemTime::now()), date::http(modified));
        let mut head = format!("HTTP/1.1 {status}\r\nDate: {now}\r\nContent-Length: {length}\r\n");
        let _ = write!(head, "ETag: {etag}\r\nLast-Modified: {modified}\r\nAccept-Ranges: bytes\r\n");
        head += "Content-Type: application/octet-stream\r\n";
        if range.is_some() {
            let _ = write!(head, "Content-Range: bytes {at}-{}/{size}\r\n", at + length - 1);
        }
        head += "\r\n";
        match file {
            _ if request.method == "HEAD" => {
                std::thread::sleep(self.shape.first_byte);
                wire.get_mut().write_all(head.as_bytes())?;
                Ok(wire.get_mut().flush()?)
            }
            Some(file) => self.send_file(wire, &head, &file, at, length),
            None => self.send(wire, request, Answer::error("410 Gone", "ThrownAway")),
        }
    }

    /// Answers GET and HEAD of a bucket: existence, location, listing, or unfinished uploads.
    fn bucket(&self, request: &Request, bucket: &str) -> Answer {
        if request.method == "HEAD" {
            return Answer::empty("200 OK");
        }
        if request.asks("location").is_some() {
            return Answer::xml(format!("<LocationConstraint {NAMESPACE}></LocationConstraint>"));
        }
        if request.asks("uploads").is_some() {
            return self.uploads(request, bucket);
        }
        self.listing(request, bucket)
    }

    fn uploads(&self, request: &Request, bucket: &str) -> Answer {
        let begin = format!("{bucket}/{}", request.asks("prefix").unwrap_or_default());
        let mut rows = String::new();
        for (id, upload) in self.objects.lock().uploads.iter().filter(|(_, upload)| upload.path.starts_with(&begin)) {
            let (key, begun) = (escaped(&upload.path[bucket.len() + 1..]), date::xml(upload.begun));
            let _ = write!(
                rows,
                "<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>{begun}</Initiated></Upload>"
            );
        }
        let name = "ListMultipartUploadsResult";
        Answer::xml(format!(
            "<{name} {NAMESPACE}><Bucket>{bucket}</Bucket><IsTruncated>false</IsTruncated>{rows}</{name}>"
        ))
    }

    /// Lists objects, for both versions of ListObjects.
    fn listing(&self, request: &Request, bucket: &str) -> Answer {
        let prefix = request.asks("prefix").unwrap_or_default();
        let delimiter = request.asks("delimiter").filter(|delimiter| !delimiter.is_empty());
        let after = ["continuation-token", "start-after", "marker"].into_iter().find_map(|name| request.asks(name));
        let most = request.asks("max-keys").and_then(|most| most.parse().ok()).unwrap_or(KEYS_MAX).min(KEYS_MAX);
        let (mut rows, mut count, mut last, mut more) = (String::new(), 0, String::new(), false);
        let state = self.objects.lock();
        for key in self.objects.list(&state, bucket, prefix) {
            let rest = &key[prefix.len()..];
            let folder = delimiter.and_then(|delimiter| Some(&rest[..rest.find(delimiter)? + delimiter.len()]));
            let name = folder.map_or_else(|| key.clone(), |folder| format!("{prefix}{folder}"));
            // One row per common prefix. Skip names that earlier pages contained.
            if name == last || after.is_some_and(|after| name.as_str() <= after) {
                continue;
            }
            if count == most {
                more = true;
                break;
            }
            let shown = escaped(&name);
            if folder.is_some() {
                let _ = write!(rows, "<CommonPrefixes><Prefix>{shown}</Prefix></CommonPrefixes>");
            } else {
                let Some(object) = self.objects.find(&state, &format!("{bucket}/{key}")) else { continue };
                // The file's own time, because s5cmd skips objects that are newer than its start.
                let (etag, modified, size) = (escaped(&object.etag), date::xml(object.modified), object.size);
                let _ = write!(
                    rows,
                    "<Contents><Key>{shown}</Key><LastModified>{modified}</LastModified><ETag>{etag}</ETag>\
                     <Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                );
            }
            count += 1;
            last = name;
        }
        let next = if more {
            let last = escaped(&last);
            format!("<NextContinuationToken>{last}</NextContinuationToken><NextMarker>{last}</NextMarker>")
        } else {
            String::new()
        };
        Answer::xml(format!(
            "<ListBucketResult {NAMESPACE}><Name>{bucket}</Name><Prefix>{}</Prefix><KeyCount>{count}</KeyCount>\
             <MaxKeys>{most}</MaxKeys><IsTruncated>{more}</IsTruncated>{next}{rows}</ListBucketResult>",
            escaped(prefix)
        ))
    }

    /// Stores an object, or one part of a multipart upload.
    fn put(&self, wire: &mut BufReader<Wire>, request: &Request) -> Result<Answer> {
        let (on_wire, size) = (request.body_bytes(), request.object_bytes());
        let part = request.asks("partNumber").and_then(|number| number.parse().ok()).zip(request.asks("uploadId"));
        let mut small = Vec::new();
        // Keep only small objects. Discard all other bodies, including parts.
        if part.is_none() && on_wire <= SMALL_BYTES_MAX {
            small.resize(on_wire as usize, 0);
            wire.read_exact(&mut small)?;
        } else {
            discard(wire, on_wire)?;
        }
        self.counts.bytes_taken.fetch_add(size, Ordering::SeqCst);
        let mut state = self.objects.lock();
        if let Some((number, id)) = part {
            let Some(upload) = state.uploads.get_mut(id) else {
                return Ok(Answer::error("404 Not Found", "NoSuchUpload"));
            };
            upload.parts.insert(number, size);
            return Ok(Answer::empty("200 OK").with_etag(&super::objects::etag(format!("{id} {number}").as_bytes())));
        }
        if self.refuses(&state, request) {
            return Ok(Answer::error("412 Precondition Failed", "PreconditionFailed"));
        }
        let etag = if on_wire <= SMALL_BYTES_MAX {
            self.objects.keep(&mut state, &request.path, &small)?
        } else {
            self.objects.forget(&mut state, &request.path, size)
        };
        Ok(Answer::empty("200 OK").with_etag(&etag))
    }

    /// Returns true if the conditions of a write do not hold.
    fn refuses(&self, state: &super::objects::State, request: &Request) -> bool {
        let there = || self.objects.find(state, &request.path);
        match (request.header("if-match"), request.header("if-none-match")) {
            (Some(wanted), _) => !there().is_some_and(|there| names(wanted, &there.etag)),
            (None, Some(_)) => self.objects.exists(state, &request.path),
            (None, None) => false,
        }
    }

    fn post(&self, request: &Request, body: &str) -> Answer {
        let mut state = self.objects.lock();
        let (bucket, key) = request.path.split_once('/').unwrap_or((&request.path, ""));
        let place = format!("<Bucket>{bucket}</Bucket><Key>{}</Key>", escaped(key));
        if request.asks("uploads").is_some() {
            let id = state.begin_upload(&request.path);
            let name = "InitiateMultipartUploadResult";
            return Answer::xml(format!("<{name} {NAMESPACE}>{place}<UploadId>{id}</UploadId></{name}>"));
        }
        if request.asks("delete").is_some() {
            for key in body.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next()) {
                self.objects.remove(&mut state, &format!("{bucket}/{key}"));
            }
            return Answer::xml(format!("<DeleteResult {NAMESPACE}></DeleteResult>"));
        }
        // The remaining request completes a multipart upload.
        let Some(id) = request.asks("uploadId") else {
            return Answer::error("501 Not Implemented", "NotImplemented");
        };
        if !state.uploads.contains_key(id) {
            return Answer::error("404 Not Found", "NoSuchUpload");
        }
        if self.refuses(&state, request) {
            return Answer::error("412 Precondition Failed", "PreconditionFailed");
        }
        // Of the parts only their total size remains.
        let size = state.uploads.remove(id).map_or(0, |upload| upload.parts.values().sum());
        let etag = self.objects.forget(&mut state, &request.path, size);
        let name = "CompleteMultipartUploadResult";
        Answer::xml(format!("<{name} {NAMESPACE}>{place}<ETag>{}</ETag></{name}>", escaped(&etag)))
    }

    fn delete(&self, request: &Request) -> Answer {
        let mut state = self.objects.lock();
        match request.asks("uploadId") {
            Some(id) => drop(state.uploads.remove(id)),
            None => self.objects.remove(&mut state, &request.path),
        }
        Answer::empty("204 No Content")
    }
}

/// Returns true if the list of ETags in a condition contains `etag`.
fn names(list: &str, etag: &str) -> bool {
    let bare = |tag: &str| tag.trim().trim_matches('"').to_owned();
    list.trim() == "*" || list.split(',').any(|tag| bare(tag) == bare(etag))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
