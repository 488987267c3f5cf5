//! `inspect`: shows the files and the state of one artifact, on disk and on the remote.

use super::{Session, path_text};
use crate::human;
use crate::output::{Lines, table};
use clap::Args;
use modelcache::cache::{Holder, Inspection};
use modelcache::{Error, Reference, Result, Tier};
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
        let inspection = session.existing_cache()?.inspect(&reference).await?;
        if !(inspection.known_on_disk || inspection.known_in_lower || inspection.known_on_remote) {
            return Err(not_found(&inspection));
        }
        if output.is_json() {
            output.print_json(&inspection)
        } else {
            output.print(&inspection_text(&inspection, SystemTime::now()))
        }
    }
}

/// Returns the error for an artifact that no tier has.
fn not_found(inspection: &Inspection) -> Error {
    match &inspection.remote_error {
        None => Error::not_found("neither on disk nor on the remote"),
        Some(why) => {
            Error::unavailable(format!("not on disk, and the remote cannot be reached: {why}")).tier(Tier::Remote)
        }
    }
    .artifact(&inspection.key)
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
    if inspection.known_in_lower {
        facts.push(("lower", "the lower directory has a manifest of it".into()));
    }
    if let Some(why) = &inspection.remote_error {
        facts.push(("remote", format!("cannot be reached: {why}")));
    }
    let mut lines = Lines::default();
    facts.iter().for_each(|(name, value)| lines.push(&format!("{name:<10} {value}")));
    lines.push("");

    let yes_or_dash = |held: bool| if held { "yes" } else { "-" }.to_owned();
    let rows = inspection.files.iter().map(|file| {
        let unknown = || "-".to_owned();
        vec![
            file.path.to_string(),
            human::bytes(file.size),
            file.sha256.map_or_else(unknown, |digest| digest.short()),
            file.provenance.map_or_else(unknown, |provenance| provenance.to_string()),
            file.format.clone().unwrap_or_else(unknown),
            yes_or_dash(file.on_disk),
            yes_or_dash(file.on_remote),
        ]
    });
    lines += table(&["FILE", "SIZE", "SHA256", "PROVENANCE", "FORMAT", "DISK", "REMOTE"], &[1], rows);
    lines
}

/// Returns whether the artifact is leased, and by which processes.
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
    use modelcache::cache::InspectedFile;
    use modelcache::digest::{Digest, Provenance};
    use modelcache::key::FilePath;
    use modelcache::manifest::Shape;
    use modelcache::{ArtifactKey, ErrorKind};
    use serde_json::json;

    fn inspection() -> Inspection {
        let file = |path, on_disk| InspectedFile {
            path: FilePath::new(path).expect("path"),
            size: 5,
            sha256: Some(Digest::of(b"x")),
            git_oid: None,
            provenance: Some(Provenance::Put),
            format: None,
            on_disk,
            in_lower: false,
            on_remote: false,
        };
        Inspection {
            key: ArtifactKey::bare("a@1").expect("key"),
            reference: "a@1".into(),
            shape: Shape::Tree,
            path: Some("/c/a".into()),
            sha256: None,
            known_on_disk: true,
            known_in_lower: false,
            known_on_remote: false,
            remote_error: Some("connection refused".into()),
            last_used: None,
            leased: false,
            holders: Vec::new(),
            pin: None,
            files: vec![file("one", true), file("two", false)],
        }
    }

    #[test]
    fn each_file_shows_the_tiers_that_have_it() {
        let text = inspection_text(&inspection(), SystemTime::UNIX_EPOCH).to_string();
        let short = Digest::of(b"x").short();
        assert!(text.contains(&format!("one    5 B  {short}")), "{text}");
        let [one, two] = ["one", "two"].map(|name| text.lines().find(|line| line.starts_with(name)).expect("row"));
        assert!(one.contains("yes") && !two.contains("yes"), "{text}");
        assert!(text.contains("remote     cannot be reached: connection refused"), "{text}");
        let object = json!(inspection());
        assert_eq!(object["files"][0]["sha256"], json!(Digest::of(b"x").to_string()), "JSON has the whole digest");
        assert_eq!((&object["files"][0]["on_disk"], &object["files"][1]["on_disk"]), (&json!(true), &json!(false)));
    }

    #[test]
    fn an_absent_artifact_is_not_found_unless_the_remote_was_down() {
        let gone = Inspection { known_on_disk: false, ..inspection() };
        assert_eq!(not_found(&gone).kind(), ErrorKind::Unavailable);
        assert_eq!(not_found(&Inspection { remote_error: None, ..gone }).kind(), ErrorKind::NotFound);
    }
}
