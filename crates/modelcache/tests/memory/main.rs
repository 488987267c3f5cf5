//! Memory use of reading a manifest: less than four times the document, the document included, for any content.
#![allow(clippy::unwrap_used)]

mod counting;

use counting::{Counting, peak_of};
use modelcache::ArtifactKey;
use modelcache::digest::{Digest, Provenance};
use modelcache::key::FilePath;
use modelcache::ladder::{INITIAL, Ladder, part_size};
use modelcache::limits;
use modelcache::manifest::{FileDetails, FileEntry, FileIdentity, HeldIdentity, Manifest, Shape};
use std::collections::BTreeSet;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that reading may allocate regardless of the size of the document.
const BYTES_MIN: usize = 64 << 10;
/// About the length of each hostile document.
const BYTES: usize = 2 << 20;

/// A list of files in its envelope, the checksum right.
fn sealed(list: &str) -> String {
    format!("{{\"format\":1,\"sha256\":\"{}\",\"manifest\":{list}}}\n", Digest::of(list.as_bytes()))
}

/// A manifest with these files and these other fields.
fn list(files: &str, others: &str) -> String {
    sealed(&format!(r#"{{"name":"m","version":"1","shape":"tree","files":{{{files}}}{others}}}"#))
}

/// `make(0)`, `make(1)`, … up to [`BYTES`], with commas between.
fn many(make: impl Fn(usize) -> String) -> String {
    let mut text = make(0);
    for number in 1.. {
        if text.len() > BYTES {
            break;
        }
        text.push(',');
        text.push_str(&make(number));
    }
    text
}

/// Reads a manifest and asserts the memory bound. Returns the manifest or the text of the error.
fn read(name: &str, document: &str) -> Result<Manifest, String> {
    let (read, peak) = peak_of(|| Manifest::from_bytes(document.as_bytes()));
    let (all, most) = (document.len() + peak, 4 * document.len() + BYTES_MIN);
    assert!(
        all <= most,
        "{name}: {} bytes take {all}, {:.1} times that",
        document.len(),
        all as f64 / document.len() as f64
    );
    read.map_err(|error| error.to_string())
}

#[test]
fn no_document_takes_four_times_its_bytes_to_read() {
    let long = |what: &str| what.repeat(BYTES / what.len());
    let one = |entry: &str| list(&format!("\"a\":{{\"size\":0,{entry}}}"), "");
    let mut documents = vec![
        ("arrays", list("", &format!(",\"z\":[{}]", many(|_| "[]".into())))),
        ("numbers", list("", &format!(",\"z\":[{}]", many(|_| "0".into())))),
        ("other fields", list("", &format!(",{}", many(|number| format!("\"{number:x}\":0"))))),
        ("other fields in a file", one(&many(|number| format!("\"{number:x}\":0")))),
        ("a long other field", list("", &format!(",\"z\":\"{}\"", long("\\n")))),
        ("a name of a field", list("", &format!(",\"{}\":0", long("\\n")))),
        ("an other field in each file", list(&many(|number| format!("\"{number:x}\":{{\"size\":0,\"x\":0}}")), "")),
        ("depth", list("", &format!(",\"z\":{}{}", "[".repeat(BYTES / 2), "]".repeat(BYTES / 2)))),
        ("depth without end", list("", &format!(",\"z\":{}", "[".repeat(BYTES)))),
        ("depth in place of files", sealed(&format!("{{\"files\":{}", "{\"a\":".repeat(BYTES / 5)))),
        ("files without anything", list(&many(|number| format!("\"{number:x}\":{{\"size\":0}}")), "")),
        ("files in another order", list(&many(|number| format!("\"{:x}\":{{\"size\":0}}", number ^ 0x5555)), "")),
        ("one file again and again", list(&many(|_| "\"a\":{\"size\":0}".into()), "")),
        ("files of a format", list(&many(|number| format!("\"{number:x}\":{{\"size\":0,\"format\":\"\"}}")), "")),
        ("files with a sidecar", list(&many(|number| format!("\"{number:x}\":{{\"size\":0,\"sidecar\":true}}")), "")),
        (
            "files twice",
            list("", &format!(",\"files\":{{{}}}", many(|number| format!("\"{number:x}\":{{\"size\":0}}")))),
        ),
        ("a long path", list(&format!("\"{}\":{{\"size\":0}}", long("a")), "")),
        ("a long path of escapes", list(&format!("\"{}\":{{\"size\":0}}", long("\\u007f")), "")),
        ("spaces", list(&" ".repeat(BYTES), "")),
        ("spaces around", format!("{}{}", " ".repeat(BYTES), list("", ""))),
        ("other fields around", sealed("{}").replacen('{', &format!("{{\"z\":[{}],", many(|_| "[]".into())), 1)),
        ("a text", format!("\"{}\"", long("\u{7f}"))),
        ("a number", "1".repeat(BYTES)),
        ("arrays alone", format!("[{}]", many(|_| "[]".into()))),
        ("a text for a manifest", sealed(&format!("\"{}\"", long("\u{7f}")))),
        ("not text", long("\u{7f}")),
    ];
    for (name, held) in [
        ("held", r#""held":{"inode":1,"bytes":0,"mtime_ns":0,"z":[Z]}"#),
        ("held in each", r#""held":{"etag":null,"object_bytes":0}"#),
        ("an entity tag", r#""held":{"etag":"Z","object_bytes":0}"#),
        ("a mark", r#""held":{"inode":1,"bytes":0,"mtime_ns":0,"unsynced_mount":"Z","unsynced_boottime_s":1}"#),
        ("ladder", r#""ladder":{"part_size":64,"states":"","z":[Z]}"#),
        ("ladder of text", r#""ladder":"Z""#),
        ("states", r#""ladder":{"part_size":64,"states":"Z"}"#),
        ("part size", r#""ladder":{"part_size":"Z","states":""}"#),
    ] {
        documents.push((name, one(&held.replace('Z', &long("\u{7f}")))));
        documents.push((name, one(&held.replace('Z', &long("\\u007f")))));
        documents.push((name, one(&held.replace('Z', &many(|_| "[]".into())))));
        documents
            .push((name, list(&many(|number| format!("\"{number:x}\":{{\"size\":0,{}}}", held.replace('Z', ""))), "")));
    }
    for field in ["size", "sha256", "provenance", "git_oid", "format", "sidecar"] {
        documents.push((field, list(&format!("\"a\":{{\"{field}\":\"{}\"}}", long("\u{7f}")), "")));
        documents.push((field, list(&format!("\"a\":{{\"{field}\":\"{}\"}}", long("\\u007f")), "")));
        documents.push((field, list(&format!("\"a\":{{\"{field}\":[{}]}}", many(|_| "[]".into())), "")));
    }
    for field in ["name", "version", "shape", "files"] {
        documents.push((field, sealed(&format!("{{\"{field}\":\"{}\"}}", long("\u{7f}")))));
        documents.push((field, sealed(&format!("{{\"{field}\":[{}]}}", many(|_| "[]".into())))));
    }
    for field in ["format", "sha256", "manifest"] {
        documents.push((field, format!("{{\"{field}\":\"{}\"}}", long("\u{7f}"))));
    }
    let accepted: Vec<_> = documents.iter().filter(|(name, document)| read(name, document).is_ok()).collect();
    let accepted: BTreeSet<_> = accepted.into_iter().map(|(name, _)| *name).collect();
    // These documents are accepted, because another release may write them.
    let right =
        ["a mark", "an other field in each file", "files in another order", "files without anything", "held in each"];
    assert_eq!(accepted, BTreeSet::from(right));
}

#[test]
fn a_refusal_names_the_part_that_is_too_large() {
    let refused = |document: &str, message_part: &str| {
        let error = read(message_part, document).unwrap_err();
        assert!(error.contains(message_part), "{error}");
        assert!(error.len() < 1000, "{error}");
    };
    refused(&list("", &format!(",\"z\":[{}]", many(|_| "[]".into()))), "unknown fields (\"z\" is the last)");
    refused(&list("", &format!(",\"z\":{}{}", "[".repeat(99), "]".repeat(99))), "nested deeper than 40");
    refused(&list("", &format!(",{}", many(|number| format!("\"{number:x}\":0")))), "more than 64");
    refused(&list(&" ".repeat(BYTES), ""), "is too large for its 0 files");
    refused(&list("\"a\":{\"size\":0},\"a\":{\"size\":0}", ""), "lists a twice");
    refused(&list("\"a\":{\"size\":0,\"size\":0}", ""), "a: duplicate field size");
    let tiny = many(|number| format!("\"{number:x}\":{{\"size\":0,\"format\":\"\"}}"));
    refused(&list(&tiny, ""), "would take more than 3 times that in memory");
    let files: Vec<String> = (0..=limits::FILES_MAX).map(|number| format!("\"{number:x}\":{{\"size\":0}}")).collect();
    refused(&list(&files.join(","), ""), "1000001 files; at most 1000000");
}

fn round_trip(name: &str, files: impl Iterator<Item = (FilePath, FileEntry)>) {
    let mut manifest = Manifest::new(ArtifactKey::bare("team/model@1").unwrap(), Shape::Tree);
    manifest.files = files.collect();
    let document = String::from_utf8(manifest.to_bytes().unwrap()).unwrap();
    assert!(read(name, &document).unwrap() == manifest, "{name}");
}

#[test]
fn large_manifests_of_ours_are_read_within_the_same_bounds() {
    let path = |number: u64| FilePath::new(&number.to_string()).unwrap();
    round_trip(
        "files of which the size is known",
        (0..100_000).map(|number| (path(number), FileEntry::of(number % 10))),
    );
    let entry = |number: u64| {
        let digest = Digest::of(&number.to_le_bytes());
        let held =
            HeldIdentity::Disk(FileIdentity { inode: number, bytes: number, mtime_ns: 1_700_000_000_000_000_000 });
        let details = FileDetails {
            sha256: Some(digest),
            provenance: Some(Provenance::Put),
            held: (number.is_multiple_of(2)).then_some(held),
            ..FileDetails::default()
        };
        FileEntry::with(number, details)
    };
    round_trip("files with digests", (0..20_001).map(|number| (path(number), entry(number))));
    let ladder = |parts: u64| {
        let size = parts * part_size(parts * limits::PART_BYTES_MIN);
        let states = usize::try_from(size.div_ceil(part_size(size)) - 1).unwrap();
        let ladder = Ladder::new(part_size(size), vec![INITIAL; states]).unwrap();
        FileEntry::with(size, FileDetails { ladder: Some(ladder), ..FileDetails::default() })
    };
    round_trip("a file of many parts", (1..2).map(|number| (path(number), ladder(limits::PARTS_MAX))));
    round_trip("files of many parts", (1..30).map(|number| (path(number), ladder(400 * number))));
}
