//! `inspect`: shows the files and the state of one artifact, on disk and on the remote.

use super::pin::pin_object;
use super::{Session, extend, key_object, path_text};
use crate::human;
use crate::output::{Lines, table};
use clap::Args;
use modelcache::cache::{Holder, Inspection};
use modelcache::key::FilePath;
use modelcache::manifest::FileEntry;
use modelcache::{Error, Reference, Result, Tier};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::SystemTime;

/// Show the files of an artifact, their digests, and the processes that use it
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// NAME@VERSION, or another reference
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
}

impl Inspect {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        let reference = Reference::parse(&self.reference)?;
        let inspection = session.cache()?.inspect(&reference).await?;
        if [&inspection.disk, &inspection.lower, &inspection.remote].into_iter().all(Option::is_none) {
            return Err(nowhere(&inspection));
        }
        if output.is_json() {
            output.answer_json(&inspection_object(&inspection))
        } else {
            output.answer(&inspection_text(&inspection, SystemTime::now()))
        }
    }
}

/// Returns the error for an artifact that no tier has.
fn nowhere(inspection: &Inspection) -> Error {
    match &inspection.remote_error {
        None => Error::not_found("neither on disk nor on the remote"),
        Some(why) => {
            Error::unavailable(format!("not on disk, and the remote cannot be reached: {why}")).tier(Tier::Remote)
        }
    }
    .artifact(&inspection.key)
}

/// The entries of one file in the manifests of disk, lower directory and remote.
struct File<'a> {
    disk: Option<&'a FileEntry>,
    lower: Option<&'a FileEntry>,
    remote: Option<&'a FileEntry>,
}

impl<'a> File<'a> {
    /// Returns the first value of `field` among the entries, in the order disk, lower directory, remote.
    fn known<T>(&self, field: impl Fn(&'a FileEntry) -> Option<T>) -> Option<T> {
        [self.disk, self.lower, self.remote].into_iter().flatten().find_map(field)
    }

    fn on_disk(&self) -> bool {
        self.disk.is_some_and(|entry| entry.held.is_some())
    }

    fn in_lower(&self) -> bool {
        self.lower.is_some_and(|entry| entry.held.is_some())
    }

    fn on_remote(&self) -> bool {
        self.remote.is_some_and(|entry| entry.held.is_some())
    }
}

/// Merges the file lists of disk, lower directory and remote by path.
fn files(inspection: &Inspection) -> BTreeMap<&FilePath, File<'_>> {
    let mut files = BTreeMap::new();
    let empty = || File { disk: None, lower: None, remote: None };
    for (path, entry) in inspection.disk.iter().flatten() {
        files.entry(path).or_insert_with(empty).disk = Some(entry);
    }
    for (path, entry) in inspection.lower.iter().flatten() {
        files.entry(path).or_insert_with(empty).lower = Some(entry);
    }
    for (path, entry) in inspection.remote.iter().flatten() {
        files.entry(path).or_insert_with(empty).remote = Some(entry);
    }
    files
}

fn inspection_object(inspection: &Inspection) -> Value {
    let file = |(path, file): (&FilePath, File<'_>)| {
        json!({
            "path": path,
            "size": file.known(|entry| Some(entry.size)),
            "sha256": file.known(|entry| entry.sha256),
            "git_oid": file.known(|entry| entry.git_oid),
            "provenance": file.known(|entry| entry.provenance),
            "format": file.known(|entry| entry.format.as_deref()),
            "on_disk": file.on_disk(),
            "in_lower": file.in_lower(),
            "on_remote": file.on_remote(),
        })
    };
    let about = json!({
        "reference": inspection.key.to_string(),
        "shape": inspection.shape,
        "path": inspection.path.as_deref().map(path_text),
        "sha256": inspection.sha256,
        "known_on_disk": inspection.disk.is_some(),
        "known_in_lower": inspection.lower.is_some(),
        "known_on_remote": inspection.remote.is_some(),
        "remote_error": inspection.remote_error,
        "last_used": inspection.last_used.map(human::timestamp),
        "leased": inspection.leased,
        "holders": inspection.holders,
        "pin": pin_object(inspection.pin.as_ref()),
        "files": files(inspection).into_iter().map(file).collect::<Vec<_>>(),
    });
    extend(key_object(&inspection.key), about)
}

fn inspection_text(inspection: &Inspection, now: SystemTime) -> Lines {
    let unknown = || "unknown".to_owned();
    let mut facts = vec![
        ("artifact", inspection.key.to_string()),
        ("path", inspection.path.as_deref().map_or_else(|| "not on disk".into(), path_text)),
        ("sha256", inspection.sha256.map_or_else(unknown, |digest| digest.to_string())),
        ("last used", inspection.last_used.map_or_else(unknown, |then| human::ago(then, now))),
        ("in use", in_use(inspection)),
    ];
    facts.extend(inspection.pin.as_ref().map(|pin| ("pin", pin.to_string())));
    if inspection.lower.is_some() {
        facts.push(("lower", "also listed in the lower directory".into()));
    }
    if let Some(why) = &inspection.remote_error {
        facts.push(("remote", format!("cannot be reached: {why}")));
    }
    let mut lines = Lines::default();
    facts.iter().for_each(|(name, value)| lines.push(&format!("{name:<10} {value}")));
    lines.push("");

    let tick = |held: bool| if held { "yes" } else { "-" }.to_owned();
    let rows = files(inspection).into_iter().map(|(path, file)| {
        let digest = file.known(|entry| entry.sha256.map(|digest| digest.short()));
        let provenance = file.known(|entry| entry.provenance);
        vec![
            path.to_string(),
            human::bytes(file.known(|entry| Some(entry.size)).unwrap_or_default()),
            digest.unwrap_or_else(|| "-".into()),
            provenance.map_or_else(|| "-".into(), |provenance| provenance.to_string()),
            file.known(|entry| entry.format.clone()).unwrap_or_else(|| "-".into()),
            tick(file.on_disk()),
            tick(file.on_remote()),
        ]
    });
    lines += table(&["FILE", "SIZE", "SHA256", "PROVENANCE", "FORMAT", "DISK", "REMOTE"], &[1], rows);
    lines
}

fn in_use(inspection: &Inspection) -> String {
    let holders: Vec<_> = inspection.holders.iter().map(Holder::to_string).collect();
    match (inspection.leased, holders.is_empty()) {
        (false, _) => "no".into(),
        (true, true) => "yes".into(),
        (true, false) => format!("yes, by {}", holders.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::digest::{Digest, Provenance};
    use modelcache::manifest::{FileDetails, FileIdentity, Files, Held, Shape};
    use modelcache::{ArtifactKey, ErrorKind};

    fn inspection() -> Inspection {
        let held = Some(Held::Disk(FileIdentity { inode: 1, bytes: 5, mtime_ns: 0 }));
        let entry = |held| {
            FileEntry::with(
                5,
                FileDetails {
                    sha256: Some(Digest::of(b"x")),
                    provenance: Some(Provenance::Put),
                    held,
                    ..FileDetails::default()
                },
            )
        };
        let path = |text| FilePath::new(text).expect("path");
        Inspection {
            key: ArtifactKey::bare("a@1").expect("key"),
            shape: Shape::Tree,
            path: Some("/c/a".into()),
            sha256: None,
            disk: Some(Files::from_iter([(path("one"), entry(held)), (path("two"), entry(None))])),
            lower: None,
            remote: None,
            remote_error: Some("connection refused".into()),
            last_used: None,
            leased: false,
            holders: Vec::new(),
            pin: None,
        }
    }

    #[test]
    fn a_file_shows_where_it_is_held() {
        let text = inspection_text(&inspection(), SystemTime::UNIX_EPOCH).to_string();
        let short = Digest::of(b"x").short();
        assert!(text.contains(&format!("one    5 B  {short}")), "{text}");
        let [one, two] = ["one", "two"].map(|name| text.lines().find(|line| line.starts_with(name)).expect("row"));
        assert!(one.contains("yes") && !two.contains("yes"), "{text}");
        assert!(text.contains("remote     cannot be reached: connection refused"), "{text}");
        let object = inspection_object(&inspection());
        assert_eq!(object["files"][0]["sha256"], json!(Digest::of(b"x").to_string()), "JSON has the whole digest");
        assert_eq!((&object["files"][0]["on_disk"], &object["files"][1]["on_disk"]), (&json!(true), &json!(false)));
    }

    #[test]
    fn nowhere_is_not_found_unless_the_remote_was_down() {
        let gone = Inspection { disk: None, ..inspection() };
        assert_eq!(nowhere(&gone).kind(), ErrorKind::Unavailable);
        assert_eq!(nowhere(&Inspection { remote_error: None, ..gone }).kind(), ErrorKind::NotFound);
    }
}
