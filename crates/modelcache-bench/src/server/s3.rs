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

/// Keys of one page of a listing, as in S3.
const KEYS_MAX: usize = 1000;
const XML: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";
const NAMESPACE: &str = "xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"";

/// A response with its body in memory.
struct Response {
    status: &'static str,
    headers: String,
    body: String,
}

impl Response {
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
    pub(super) fn respond(&self, wire: &mut BufReader<Wire>, request: Request) -> Result<()> {
        let (bucket, key) = request.path.split_once('/').unwrap_or((&request.path, ""));
        if request.query_value("bench-stats").is_some() {
            let stats = Response { status: "200 OK", headers: String::new(), body: self.counts.to_json() };
            return self.send(wire, &request, stats);
        }
        // A path without a key names a bucket.
        let response = match (request.method.as_str(), key.is_empty()) {
            ("GET" | "HEAD", false) if request.query_value("uploadId").is_none() => return self.object(wire, &request),
            ("GET" | "HEAD", true) => self.bucket(&request, bucket),
            ("PUT", false) => self.put(wire, &request)?,
            ("PUT", true) => Response::empty("200 OK"),
            ("POST", _) => {
                let mut body = vec![0; request.body_bytes() as usize];
                wire.read_exact(&mut body)?;
                self.post(&request, &String::from_utf8_lossy(&body))
            }
            ("DELETE", false) => self.delete(&request),
            _ => Response::error("405 Method Not Allowed", "MethodNotAllowed"),
        };
        self.send(wire, &request, response)
    }

    fn send(&self, wire: &mut BufReader<Wire>, request: &Request, response: Response) -> Result<()> {
        std::thread::sleep(self.shaping.first_byte);
        let Response { status, headers, body } = response;
        let now = date::http(SystemTime::now());
        let length = body.len();
        let mut text = format!("HTTP/1.1 {status}\r\nDate: {now}\r\nContent-Length: {length}\r\n{headers}\r\n");
        if request.method != "HEAD" {
            text += &body;
        }
        wire.get_mut().write_all(text.as_bytes())?;
        Ok(wire.get_mut().flush()?)
    }

    /// Responds to GET and HEAD of an object.
    fn object(&self, wire: &mut BufReader<Wire>, request: &Request) -> Result<()> {
        let found = self.objects.find(&self.objects.lock(), &request.path);
        let Some(Object { size, etag, modified, file }) = found else {
            return self.send(wire, request, Response::error("404 Not Found", "NoSuchKey"));
        };
        if request.header("if-match").is_some_and(|wanted| !etag_matches(wanted, &etag)) {
            return self.send(wire, request, Response::error("412 Precondition Failed", "PreconditionFailed"));
        }
        if request.header("if-none-match").is_some_and(|known| etag_matches(known, &etag)) {
            return self.send(wire, request, Response::empty("304 Not Modified"));
        }
        let Ok(range) = request.range(size) else {
            return self.send(wire, request, Response::error("416 Range Not Satisfiable", "InvalidRange"));
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
                std::thread::sleep(self.shaping.first_byte);
                wire.get_mut().write_all(head.as_bytes())?;
                Ok(wire.get_mut().flush()?)
            }
            Some(file) => self.send_file(wire, &head, &file, at, length),
            None => self.send(wire, request, Response::error("410 Gone", "ThrownAway")),
        }
    }

    /// Responds to GET and HEAD of a bucket: its existence, its location, its objects, or its unfinished uploads.
    fn bucket(&self, request: &Request, bucket: &str) -> Response {
        if request.method == "HEAD" {
            return Response::empty("200 OK");
        }
        if request.query_value("location").is_some() {
            return Response::xml(format!("<LocationConstraint {NAMESPACE}></LocationConstraint>"));
        }
        if request.query_value("uploads").is_some() {
            return self.uploads(request, bucket);
        }
        self.listing(request, bucket)
    }

    fn uploads(&self, request: &Request, bucket: &str) -> Response {
        let begin = format!("{bucket}/{}", request.query_value("prefix").unwrap_or_default());
        let mut rows = String::new();
        for (id, upload) in self.objects.lock().uploads.iter().filter(|(_, upload)| upload.path.starts_with(&begin)) {
            let (key, begun) = (escaped(&upload.path[bucket.len() + 1..]), date::xml(upload.begun));
            let _ = write!(
                rows,
                "<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>{begun}</Initiated></Upload>"
            );
        }
        let name = "ListMultipartUploadsResult";
        Response::xml(format!(
            "<{name} {NAMESPACE}><Bucket>{bucket}</Bucket><IsTruncated>false</IsTruncated>{rows}</{name}>"
        ))
    }

    /// Lists objects, for both versions of ListObjects.
    fn listing(&self, request: &Request, bucket: &str) -> Response {
        let prefix = request.query_value("prefix").unwrap_or_default();
        let delimiter = request.query_value("delimiter").filter(|delimiter| !delimiter.is_empty());
        let after =
            ["continuation-token", "start-after", "marker"].into_iter().find_map(|name| request.query_value(name));
        let most = request.query_value("max-keys").and_then(|most| most.parse().ok()).unwrap_or(KEYS_MAX).min(KEYS_MAX);
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
        Response::xml(format!(
            "<ListBucketResult {NAMESPACE}><Name>{bucket}</Name><Prefix>{}</Prefix><KeyCount>{count}</KeyCount>\
             <MaxKeys>{most}</MaxKeys><IsTruncated>{more}</IsTruncated>{next}{rows}</ListBucketResult>",
            escaped(prefix)
        ))
    }

    /// Stores an object, or one part of a multipart upload.
    fn put(&self, wire: &mut BufReader<Wire>, request: &Request) -> Result<Response> {
        let (on_wire, size) = (request.body_bytes(), request.object_bytes());
        let part = request
            .query_value("partNumber")
            .and_then(|number| number.parse().ok())
            .zip(request.query_value("uploadId"));
        let mut small = Vec::new();
        // Keep only small objects. Discard all other bodies, including parts.
        if part.is_none() && on_wire <= SMALL_BYTES_MAX {
            small.resize(on_wire as usize, 0);
            wire.read_exact(&mut small)?;
        } else {
            discard(wire, on_wire)?;
        }
        self.counts.bytes_received.fetch_add(size, Ordering::SeqCst);
        let mut state = self.objects.lock();
        if let Some((number, id)) = part {
            let Some(upload) = state.uploads.get_mut(id) else {
                return Ok(Response::error("404 Not Found", "NoSuchUpload"));
            };
            upload.parts.insert(number, size);
            return Ok(Response::empty("200 OK").with_etag(&super::objects::etag(format!("{id} {number}").as_bytes())));
        }
        if self.precondition_fails(&state, request) {
            return Ok(Response::error("412 Precondition Failed", "PreconditionFailed"));
        }
        let etag = if on_wire <= SMALL_BYTES_MAX {
            self.objects.store(&mut state, &request.path, &small)?
        } else {
            self.objects.record_discarded(&mut state, &request.path, size)
        };
        Ok(Response::empty("200 OK").with_etag(&etag))
    }

    /// Returns true if the conditions of a write do not hold.
    fn precondition_fails(&self, state: &super::objects::State, request: &Request) -> bool {
        let present = || self.objects.find(state, &request.path);
        match (request.header("if-match"), request.header("if-none-match")) {
            (Some(wanted), _) => !present().is_some_and(|present| etag_matches(wanted, &present.etag)),
            (None, Some(_)) => self.objects.exists(state, &request.path),
            (None, None) => false,
        }
    }

    fn post(&self, request: &Request, body: &str) -> Response {
        let mut state = self.objects.lock();
        let (bucket, key) = request.path.split_once('/').unwrap_or((&request.path, ""));
        let place = format!("<Bucket>{bucket}</Bucket><Key>{}</Key>", escaped(key));
        if request.query_value("uploads").is_some() {
            let id = state.begin_upload(&request.path);
            let name = "InitiateMultipartUploadResult";
            return Response::xml(format!("<{name} {NAMESPACE}>{place}<UploadId>{id}</UploadId></{name}>"));
        }
        if request.query_value("delete").is_some() {
            for key in body.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next()) {
                self.objects.remove(&mut state, &format!("{bucket}/{key}"));
            }
            return Response::xml(format!("<DeleteResult {NAMESPACE}></DeleteResult>"));
        }
        // The remaining request completes a multipart upload.
        let Some(id) = request.query_value("uploadId") else {
            return Response::error("501 Not Implemented", "NotImplemented");
        };
        if !state.uploads.contains_key(id) {
            return Response::error("404 Not Found", "NoSuchUpload");
        }
        if self.precondition_fails(&state, request) {
            return Response::error("412 Precondition Failed", "PreconditionFailed");
        }
        // The parts were discarded; only their sizes are known.
        let size = state.uploads.remove(id).map_or(0, |upload| upload.parts.values().sum());
        let etag = self.objects.record_discarded(&mut state, &request.path, size);
        let name = "CompleteMultipartUploadResult";
        Response::xml(format!("<{name} {NAMESPACE}>{place}<ETag>{}</ETag></{name}>", escaped(&etag)))
    }

    fn delete(&self, request: &Request) -> Response {
        let mut state = self.objects.lock();
        match request.query_value("uploadId") {
            Some(id) => drop(state.uploads.remove(id)),
            None => self.objects.remove(&mut state, &request.path),
        }
        Response::empty("204 No Content")
    }
}

/// Returns true if the list of ETags in a condition contains `etag`.
fn etag_matches(list: &str, etag: &str) -> bool {
    let bare = |tag: &str| tag.trim().trim_matches('"').to_owned();
    list.trim() == "*" || list.split(',').any(|tag| bare(tag) == bare(etag))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
