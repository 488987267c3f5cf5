//! The JSON routes: info, tree, paths-info, refs, commits, whoami.
//!
//! All routes describe a file by the same fields: `oid` is git's blob id; `lfs` holds the SHA-256 of an LFS file. Trees
//! are paged; the link to the next page is absolute and names the host of the client's request.

use std::collections::BTreeMap;

use hyper::StatusCode;
use hyper::header::{HOST, HeaderMap, LINK};
use serde_json::{Value, json};

use super::answer::bearer;
use super::repo::{Entry, RepoData, RepoId, RepoKind, Tree};
use super::route::{is_set, values};
use super::{Shared, refuse};
use crate::content;
use crate::serve::{Answer, answer, lock};

const LONG_AGO: &str = "2024-01-01T00:00:00.000Z";

/// Answers 200 with a JSON body.
pub(super) fn json(value: &Value) -> Answer {
    answer(StatusCode::OK, "application/json; charset=utf-8", value.to_string())
}

/// Describes a repo at one of its revisions. Sizes and digests of its files are included if the query sets `blobs`.
pub(super) fn info(shared: &Shared, id: &RepoId, repo: &RepoData, tree: &Tree, query: &str) -> Answer {
    let blobs = is_set(query, "blobs");
    let sibling = |entry: &Entry| {
        let mut row = json!({ "rfilename": entry.path });
        if blobs {
            let size = shared.metadata_size(entry);
            row["size"] = size.into();
            row["blobId"] = entry.oid.as_str().into();
            if let Some(lfs) = &entry.lfs {
                row["lfs"] = json!({
                    "sha256": lfs.sha256, "size": size, "pointerSize": lfs.pointer_size,
                });
            }
        }
        row
    };
    let mut body = json!({
        "_id": content::sha1(id.name.as_bytes())[..24],
        "id": id.name,
        "sha": tree.commit,
        "author": id.name.split_once('/').map(|(org, _)| org),
        "private": repo.readers.is_some(),
        "gated": if repo.accepted.is_some() { json!("manual") } else { json!(false) },
        "disabled": false,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": LONG_AGO,
        "lastModified": LONG_AGO,
        "siblings": tree.files.values().map(|entry| sibling(entry)).collect::<Vec<_>>(),
    });
    if id.kind == RepoKind::Model {
        body["modelId"] = id.name.as_str().into();
    }
    json(&body)
}

/// Returns one page of the entries below a folder.
pub(super) fn tree(shared: &Shared, repo: &RepoData, tree: &Tree, folder: &str, request: &PageRequest<'_>) -> Answer {
    let folder = folder.trim_matches('/');
    let rows = rows_below(tree, folder, is_set(request.query, "recursive"));
    if rows.is_empty() && !folder.is_empty() {
        return refuse::no_entry(&tree.commit);
    }
    let number = |name| values(request.query, name).first().and_then(|value| value.parse::<usize>().ok());
    let page_size = lock(&shared.settings).page_size;
    let page_size = number("limit").map_or(page_size, |limit| limit.clamp(1, page_size));
    let start = number("cursor").unwrap_or(0);
    let expand = is_set(request.query, "expand");
    let page = rows.iter().skip(start).take(page_size);
    let page: Vec<Value> = page.map(|row| row.json(shared, repo, tree, expand)).collect();
    let mut answer = json(&Value::Array(page));
    if start + page_size < rows.len() {
        // Paging as on the Hub: a `Link` header names the next page, the last page has none.
        let link = format!("<{}>; rel=\"next\"", request.next_url(start + page_size));
        answer.headers_mut().insert(LINK, link.parse().expect("a URL from a request is a header value"));
    }
    answer
}

/// The request for a page, from which the URL of the next page is built.
pub(super) struct PageRequest<'a> {
    pub(super) headers: &'a HeaderMap,
    pub(super) path: &'a str,
    pub(super) query: &'a str,
    pub(super) own_url: &'a str,
}

impl PageRequest<'_> {
    fn next_url(&self, cursor: usize) -> String {
        // The host that the client used, so that a proxy in front of the Hub also sees the request for the next page.
        let host = self.headers.get(HOST).and_then(|host| host.to_str().ok());
        let base = host.map_or_else(|| self.own_url.to_owned(), |host| format!("http://{host}"));
        let kept = self.query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("cursor="));
        let query: Vec<&str> = kept.collect();
        let joint = if query.is_empty() { "" } else { "&" };
        format!("{base}{}?{}{joint}cursor={cursor}", self.path, query.join("&"))
    }
}

/// Returns the entries of the paths named in a form or JSON body. Unknown paths are left out.
pub(super) fn paths_info(shared: &Shared, repo: &RepoData, tree: &Tree, body: &str) -> Answer {
    let parsed = serde_json::from_str::<Value>(body).ok();
    let (paths, expand) = match parsed.as_ref().and_then(|body| body.get("paths")) {
        Some(Value::Array(paths)) => {
            let paths = paths.iter().filter_map(|path| path.as_str().map(str::to_owned)).collect();
            (paths, parsed.as_ref().is_some_and(|body| body["expand"] == true))
        }
        _ => (values(body, "paths"), is_set(body, "expand")),
    };
    let all = rows_below(tree, "", true);
    let named = |path: &String| all.iter().find(|row| row.path() == path.trim_matches('/'));
    let found = paths.iter().filter_map(named).map(|row| row.json(shared, repo, tree, expand));
    json(&Value::Array(found.collect()))
}

/// Lists branches, tags and pull requests.
pub(super) fn refs(repo: &RepoData) -> Answer {
    let of = |prefix: &str| -> Value {
        let matching = repo.refs.iter().filter_map(|(name, commit)| Some((name, name.strip_prefix(prefix)?, commit)));
        matching.map(|(name, short, commit)| json!({ "name": short, "ref": name, "targetCommit": commit })).collect()
    };
    let body = json!({
        "branches": of("refs/heads/"), "tags": of("refs/tags/"), "converts": [], "pullRequests": of("refs/pr/"),
    });
    json(&body)
}

/// Lists the commits of the repo, newest first, starting at the requested revision.
pub(super) fn commits(repo: &RepoData, tree: &Tree) -> Answer {
    let from_here = repo.commits.iter().rev().skip_while(|commit| **commit != tree.commit);
    let row =
        |commit: &String| json!({ "id": commit, "title": "commit", "message": "", "authors": [], "date": LONG_AGO });
    json(&from_here.map(row).collect())
}

/// Names the user that the token belongs to.
pub(super) fn whoami(shared: &Shared, headers: &HeaderMap) -> Answer {
    let name = bearer(headers).and_then(|token| lock(&shared.settings).users.get(token).cloned());
    match name {
        Some(name) => json(&json!({
            "type": "user", "id": content::sha1(name.as_bytes())[..24], "name": name, "fullname": name, "orgs": [],
            "auth": { "type": "access_token", "accessToken": { "displayName": "testkit", "role": "read" } },
        })),
        None => refuse::refuse(StatusCode::UNAUTHORIZED, None, "Invalid credentials in Authorization header"),
    }
}

/// An entry of a listing: a file, or a folder with a hash over the files below it.
enum Row<'a> {
    File(&'a Entry),
    Folder { path: String, oid: String },
}

impl Row<'_> {
    fn path(&self) -> &str {
        match self {
            Row::File(entry) => &entry.path,
            Row::Folder { path, .. } => path,
        }
    }

    fn json(&self, shared: &Shared, repo: &RepoData, tree: &Tree, expand: bool) -> Value {
        let mut row = match self {
            Row::Folder { path, oid } => json!({ "type": "directory", "oid": oid, "size": 0, "path": path }),
            Row::File(entry) => {
                let size = shared.metadata_size(entry);
                let mut row = json!({ "type": "file", "oid": entry.oid, "size": size, "path": entry.path });
                if let Some(lfs) = &entry.lfs {
                    row["lfs"] = json!({ "oid": lfs.sha256, "size": size, "pointerSize": lfs.pointer_size });
                    if repo.xet {
                        row["xetHash"] = xet_hash(entry).into();
                    }
                }
                row
            }
        };
        if expand {
            row["lastCommit"] = json!({ "id": tree.commit, "title": "commit", "date": LONG_AGO });
        }
        row
    }
}

/// A made-up xet hash: 64 hex digits that differ from the SHA-256.
pub(super) fn xet_hash(entry: &Entry) -> String {
    content::sha256(format!("xet {}", entry.digest()).as_bytes())
}

fn rows_below<'a>(tree: &'a Tree, folder: &str, recursive: bool) -> Vec<Row<'a>> {
    let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let mut rows: BTreeMap<&str, Row<'a>> = BTreeMap::new();
    for (path, entry) in &tree.files {
        let Some(below) = path.strip_prefix(&prefix) else { continue };
        for (at, _) in below.match_indices('/') {
            // Every folder between the listed folder and the file becomes an entry; without `recursive`, only the
            // first.
            let inner = &path[..prefix.len() + at];
            rows.entry(inner).or_insert_with(|| folder_row(tree, inner));
            if !recursive {
                break;
            }
        }
        if recursive || !below.contains('/') {
            rows.insert(path, Row::File(entry));
        }
    }
    rows.into_values().collect()
}

fn folder_row<'a>(tree: &Tree, path: &str) -> Row<'a> {
    let prefix = format!("{path}/");
    let inside = tree.files.range(prefix.clone()..).take_while(|(path, _)| path.starts_with(&prefix));
    let text: String = inside.map(|(path, entry)| format!("{} {path}\n", entry.oid)).collect();
    Row::Folder { path: path.to_owned(), oid: content::sha1(text.as_bytes()) }
}
