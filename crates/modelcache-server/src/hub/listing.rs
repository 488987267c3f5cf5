//! The descriptions of repositories that clients of the Hub read, made from manifests.
//!
//! They have no `xetHash`: a client that sees one contacts a server of the Hub that this daemon does not replace.

use super::route::{Repo, is_set, values};
use modelcache::digest::{Digest, GitOid, lfs_pointer};
use modelcache::key::FilePath;
use modelcache::manifest::{FileEntry, Manifest};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Entries of a tree in one answer, as on the Hub.
const PAGE_ENTRIES: usize = 1_000;

/// How the Hub stores a file.
pub(super) enum Storage {
    /// In git: known by the object id.
    Git(GitOid),
    /// As a large file (LFS or xet): known by the SHA-256 of its content; git has a pointer to it.
    Lfs(Digest),
    /// Unknown: the server states no digest.
    Unknown,
}

impl Storage {
    pub(super) fn of(entry: &FileEntry) -> Self {
        match (entry.git_oid, entry.sha256) {
            (Some(oid), _) => Self::Git(oid),
            (None, Some(sha256)) => Self::Lfs(sha256),
            (None, None) => Self::Unknown,
        }
    }

    /// Returns the entity tag of the file on the Hub, without quotes.
    pub(super) fn etag(&self) -> Option<String> {
        match self {
            Self::Git(oid) => Some(oid.to_string()),
            Self::Lfs(sha256) => Some(sha256.to_string()),
            Self::Unknown => None,
        }
    }
}

/// Returns the description of a revision. The sizes and digests of its files are left out unless the query asks for
/// them (`blobs=true`).
pub(super) fn info(repo: &Repo, manifest: &Manifest, query: &str) -> Value {
    let blobs = is_set(query, "blobs");
    let sibling = |(path, entry): (&FilePath, &FileEntry)| {
        let mut row = Map::from_iter([("rfilename".to_owned(), json!(path))]);
        if blobs {
            row.insert("size".into(), json!(entry.size));
            match Storage::of(entry) {
                Storage::Git(oid) => row.insert("blobId".into(), json!(oid)),
                Storage::Lfs(sha256) => {
                    let pointer = lfs_pointer(sha256, entry.size);
                    row.insert("blobId".into(), json!(GitOid::of(pointer.as_bytes())));
                    let lfs = json!({ "sha256": sha256, "size": entry.size, "pointerSize": pointer.len() });
                    row.insert("lfs".into(), lfs)
                }
                Storage::Unknown => None,
            };
        }
        Value::Object(row)
    };
    let mut info = json!({
        "_id": GitOid::of(repo.id.as_bytes()).to_string()[..24],
        "id": repo.id,
        "sha": manifest.key.version,
        "author": repo.id.split_once('/').map(|(author, _)| author),
        "private": false,
        "gated": false,
        "disabled": false,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": manifest.files.iter().map(sibling).collect::<Vec<_>>(),
    });
    if repo.kind == "models" {
        info["modelId"] = json!(repo.id);
    }
    info
}

/// One page of a tree.
pub(super) struct Page {
    pub(super) entries: Vec<Value>,
    /// The cursor of the next page; `None` for the last one.
    pub(super) next: Option<usize>,
}

/// Returns one page of the entries below `folder`; `None` if there is no such folder.
pub(super) fn tree(manifest: &Manifest, folder: &str, query: &str) -> Option<Page> {
    let folder = folder.trim_matches('/');
    let rows = rows_below(manifest, folder, is_set(query, "recursive"));
    if rows.is_empty() && !folder.is_empty() {
        return None;
    }
    let number = |name| values(query, name).first().and_then(|value| value.parse::<usize>().ok());
    let limit = number("limit").unwrap_or(PAGE_ENTRIES).clamp(1, PAGE_ENTRIES);
    let start = number("cursor").unwrap_or(0);
    let next = Some(start.saturating_add(limit)).filter(|next| *next < rows.len());
    Some(Page { entries: rows.into_values().skip(start).take(limit).map(Row::json).collect(), next })
}

/// Returns the entries of the named paths. Unknown paths are left out, as on the Hub.
pub(super) fn paths_info(manifest: &Manifest, paths: &[String]) -> Vec<Value> {
    let mut rows = rows_below(manifest, "", true);
    paths.iter().filter_map(|path| rows.remove(path.trim_matches('/')).map(Row::json)).collect()
}

/// One entry of a tree.
enum Row<'a> {
    File(&'a str, &'a FileEntry),
    Folder(&'a str),
}

/// Returns the files and folders below `folder` by path: all of them, or only those directly in it.
fn rows_below<'a>(manifest: &'a Manifest, folder: &str, recursive: bool) -> BTreeMap<&'a str, Row<'a>> {
    let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let mut rows = BTreeMap::new();
    for (path, entry) in &manifest.files {
        let path = path.as_str();
        let Some(rest) = path.strip_prefix(&prefix) else { continue };
        let slashes = rest.match_indices('/').map(|(at, _)| prefix.len() + at);
        let folders = slashes.take(if recursive { usize::MAX } else { 1 });
        let mut is_direct = true;
        for end in folders {
            rows.insert(&path[..end], Row::Folder(&path[..end]));
            is_direct = false;
        }
        if recursive || is_direct {
            rows.insert(path, Row::File(path, entry));
        }
    }
    rows
}

impl Row<'_> {
    fn json(self) -> Value {
        match self {
            // The Hub has the object id of git's tree here, which manifests do not record.
            Self::Folder(path) => {
                json!({ "type": "directory", "path": path, "size": 0, "oid": GitOid::of(path.as_bytes()) })
            }
            Self::File(path, entry) => {
                let mut row = json!({ "type": "file", "path": path, "size": entry.size });
                match Storage::of(entry) {
                    Storage::Git(oid) => row["oid"] = json!(oid),
                    Storage::Lfs(sha256) => {
                        let pointer = lfs_pointer(sha256, entry.size);
                        row["oid"] = json!(GitOid::of(pointer.as_bytes()));
                        row["lfs"] = json!({ "oid": sha256, "size": entry.size, "pointerSize": pointer.len() });
                    }
                    Storage::Unknown => row["oid"] = json!(GitOid::of(path.as_bytes())),
                }
                row
            }
        }
    }
}

/// Removes the fields that lead clients to the Hub's own storage.
pub(super) fn without_xet(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !name.to_ascii_lowercase().starts_with("xet"));
            fields.values_mut().for_each(without_xet);
        }
        Value::Array(items) => items.iter_mut().for_each(without_xet),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::ArtifactKey;
    use modelcache::manifest::Shape;

    fn manifest() -> Manifest {
        let mut manifest = Manifest::new(ArtifactKey::bare("m@1").expect("key"), Shape::Tree);
        for (path, size) in [("a.json", 3), ("x/b.bin", 7), ("x/y/c.bin", 9)] {
            let mut entry = FileEntry::of(size);
            match path.ends_with("bin") {
                true => entry.sha256 = Some(Digest::of(path.as_bytes())),
                false => entry.git_oid = Some(GitOid::of(b"abc")),
            }
            manifest.files.insert(FilePath::new(path).expect("path"), entry);
        }
        manifest
    }

    fn paths(page: &Page) -> Vec<&str> {
        page.entries.iter().filter_map(|entry| entry["path"].as_str()).collect()
    }

    #[test]
    fn trees_are_listed_by_folder_and_by_page() {
        let manifest = manifest();
        let tree = |folder, query| tree(&manifest, folder, query);
        assert_eq!(paths(&tree("", "").expect("root")), ["a.json", "x"]);
        assert_eq!(paths(&tree("x", "").expect("folder")), ["x/b.bin", "x/y"]);
        assert_eq!(paths(&tree("", "recursive=True").expect("all")), ["a.json", "x", "x/b.bin", "x/y", "x/y/c.bin"]);
        assert!(tree("nothing", "").is_none());
        let first = tree("", "recursive=1&limit=2").expect("page");
        assert_eq!((paths(&first), first.next), (vec!["a.json", "x"], Some(2)));
        let last = tree("", "recursive=1&limit=3&cursor=2").expect("page");
        assert_eq!((paths(&last), last.next), (vec!["x/b.bin", "x/y", "x/y/c.bin"], None));
    }

    #[test]
    fn a_large_file_has_the_object_id_of_its_pointer() {
        // From a repository on the Hub: the pointer of an empty large file.
        let empty = Digest::of(b"");
        assert_eq!(lfs_pointer(empty, 0).len(), 126);
        let rows = paths_info(&manifest(), &["x/b.bin".into(), "no".into(), "/a.json".into()]);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0]["lfs"]["pointerSize"], 126);
        assert_eq!(rows[1]["oid"], "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f", "git hash-object of abc");
    }

    #[test]
    fn no_hint_at_the_hubs_own_storage_is_passed_on() {
        let mut value = json!([{ "xetHash": "1", "lfs": { "xet_hash": 1, "oid": 2 }, "siblings": [{ "xetHash": 1 }] }]);
        without_xet(&mut value);
        assert_eq!(value, json!([{ "lfs": { "oid": 2 }, "siblings": [{}] }]));
    }
}
