//! Tests with archives of every format, with hostile ones, and with generated ones that are compared with GNU tar and
//! bsdtar.

use super::*;
use crate::error::ErrorKind;
use ::tar::{Builder, EntryType, Header};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::Command;

/// The extracted files: content, and whether the file is executable.
type Files = BTreeMap<String, (Vec<u8>, bool)>;

#[derive(Default)]
struct Memory(Files);

impl FileSink for Memory {
    fn file(&mut self, path: FilePath, size: u64, executable: bool, content: &mut dyn Read) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        content.read_exact(&mut bytes).map_err(|cause| Error::corrupt("cannot be read").cause(cause))?;
        self.0.insert(path.as_str().to_owned(), (bytes, executable));
        Ok(())
    }
}

fn extract(bytes: &[u8]) -> Result<Files> {
    let size = bytes.len() as u64;
    let (format, mut into) = (Format::of(bytes, size), Memory::default());
    let archive = Archive { format, size, name: "model.archive" };
    match format {
        Format::Zip => {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            archive.extract_zip(file, &mut into)?;
        }
        _ => assert!(archive.extract_stream(bytes, &mut into)?, "not a tar archive"),
    }
    Ok(into.0)
}

#[track_caller]
fn refused(bytes: &[u8], part: &str) {
    let error = extract(bytes).map(|files| files.len()).expect_err(part);
    assert!(error.to_string().contains(part), "{error}");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

/// Adds an entry whose name is not checked.
fn entry(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &[u8], mode: u32, content: &[u8]) {
    let mut header = Header::new_gnu();
    let field = &mut header.as_gnu_mut().unwrap().name;
    let short = &name[..name.len().min(field.len())];
    field[..short.len()].copy_from_slice(short);
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    if matches!(kind, EntryType::Link | EntryType::Symlink) {
        header.set_link_name("target").unwrap();
    }
    header.set_cksum();
    builder.append(&header, content).unwrap();
}

fn tar_of(entries: &[(EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    entries.iter().for_each(|(kind, name, content)| entry(&mut builder, *kind, name.as_bytes(), 0o644, content));
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Compresses by a module of Python, which has the compressors that this crate lacks.
fn by_command(format: &str, bytes: &[u8]) -> Vec<u8> {
    let call = match format {
        "xz" => "lzma.compress(content)",
        "bz2" => "bz2.compress(content)",
        _ => "lzma.compress(content, filters=[{'id': lzma.FILTER_LZMA2, 'dict_size': 256 << 20}])",
    };
    let script = format!("import bz2, lzma, sys; content = sys.stdin.buffer.read(); sys.stdout.buffer.write({call})");
    let mut child = Command::new("python3")
        .args(["-c", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    child.wait_with_output().unwrap().stdout
}

#[test]
fn every_format_gives_the_same_files() {
    let mut builder = Builder::new(Vec::new());
    entry(&mut builder, EntryType::Directory, b"./", 0o755, b"");
    entry(&mut builder, EntryType::Regular, b"./config.json", 0o644, b"{}");
    entry(&mut builder, EntryType::Regular, b"./bin/run", 0o755, b"#!/bin/sh");
    entry(&mut builder, EntryType::Regular, b"./empty", 0o600, b"");
    let tar = builder.into_inner().unwrap();
    let file = |content: &[u8], executable| (content.to_vec(), executable);
    let expected: Files = [
        ("config.json".to_owned(), file(b"{}", false)),
        ("bin/run".to_owned(), file(b"#!/bin/sh", true)),
        ("empty".to_owned(), file(b"", false)),
    ]
    .into();
    let mut zip = ::zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, (content, executable)) in &expected {
        let mode = if *executable { 0o755 } else { 0o644 };
        zip.start_file(name, ::zip::write::SimpleFileOptions::default().unix_permissions(mode)).unwrap();
        zip.write_all(content).unwrap();
    }
    let zip = zip.finish().unwrap().into_inner();
    // Two members of one gzip file are one stream.
    let (first, second) = tar.split_at(700);
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    let joined = [gzip(first), gzip(second)].concat();
    for archive in [tar.clone(), gzip(&tar), zstd, zip, joined, by_command("bz2", &tar), by_command("xz", &tar)] {
        assert_eq!(extract(&archive).unwrap(), expected);
    }
}

#[test]
fn entries_that_are_not_regular_files_are_refused_by_name() {
    for (kind, what) in [
        (EntryType::Symlink, "symbolic link"),
        (EntryType::Link, "hard link"),
        (EntryType::Char, "device"),
        (EntryType::Block, "device"),
        (EntryType::Fifo, "pipe"),
        (EntryType::new(b'V'), "unknown type"),
    ] {
        let archive = tar_of(&[(EntryType::Regular, "a", b"a"), (kind, "dir/odd", b"")]);
        refused(&archive, what);
        refused(&gzip(&archive), "dir/odd");
    }
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    for name in ["/etc/passwd", "../up", "a/../../up", "a/..", "..", "./../x"] {
        refused(&tar_of(&[(EntryType::Regular, name, b"x")]), &format!("{name:?}"));
    }
    refused(&tar_of(&[(EntryType::Directory, "/etc", b""), (EntryType::Regular, "a", b"a")]), "absolute");
    let mut builder = Builder::new(Vec::new());
    entry(&mut builder, EntryType::Regular, b"not\xffutf8", 0o644, b"x");
    refused(&builder.into_inner().unwrap(), "not UTF-8");
    let deep = "d/".repeat(45) + "f";
    refused(&tar_of(&[(EntryType::Regular, &deep, b"x")]), "deep");
    // A file cannot also be a folder.
    refused(&tar_of(&[(EntryType::Regular, "a", b"a"), (EntryType::Regular, "a/b", b"b")]), "also a file");
    refused(&tar_of(&["a", "a-b", "a/b"].map(|name| (EntryType::Regular, name, &b"x"[..]))), "also a file");
    refused(&tar_of(&[(EntryType::Regular, "a", b"a"), (EntryType::Directory, "a", b"")]), "also a folder");
    refused(&tar_of(&[(EntryType::Directory, "a", b"")]), "no files");
    // GNU tar reads the content of such a folder as further headers.
    for kind in [EntryType::Directory, EntryType::Regular] {
        refused(&tar_of(&[(EntryType::Regular, "a", b"a"), (kind, "b/", b"b")]), "states a size");
    }
}

#[test]
fn the_last_of_several_files_with_one_name_counts() {
    let archive = tar_of(&[(EntryType::Regular, "a", b"first"), (EntryType::Regular, "./a", b"2nd")]);
    assert_eq!(extract(&archive).unwrap()["a"].0, b"2nd");
}

#[test]
fn a_damaged_or_cut_archive_is_refused() {
    let tar = tar_of(&[(EntryType::Regular, "a", &[7; 100_000]), (EntryType::Regular, "b", b"b")]);
    refused(&tar[..50_000], "damaged or truncated");
    let compressed = gzip(&tar);
    refused(&compressed[..compressed.len() - 9], "damaged or truncated");
    // The checksum at the end is checked, although all files were read before it.
    let mut flipped = compressed.clone();
    *flipped.iter_mut().nth_back(5).unwrap() ^= 1;
    refused(&flipped, "damaged or truncated");
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    refused(&zstd[..zstd.len() - 2], "damaged or truncated");
    for format in ["bz2", "xz"] {
        let compressed = by_command(format, &tar);
        refused(&compressed[..compressed.len() - 9], "damaged or truncated");
        let mut flipped = compressed.clone();
        // Near the end are checksums.
        flipped[compressed.len() - 7] ^= 1;
        refused(&flipped, "damaged or truncated");
    }
    // Without the blocks of zeros at the end, as some programs write it.
    assert_eq!(extract(&tar[..tar.len() - 1024]).unwrap().len(), 2);
}

#[test]
fn limits_are_checked_before_they_are_exceeded() {
    // A header that says 100 GB, and has no content: refused before any byte is read.
    let mut header = Header::new_gnu();
    header.set_path("big").unwrap();
    header.set_size(100 << 30);
    header.set_mode(0o644);
    header.set_cksum();
    refused(&[header.as_bytes().to_vec(), vec![0; 1024]].concat(), "exceeds a limit");
    // A small archive of zeros that becomes large.
    let zeros = vec![0; 80 << 20];
    refused(&gzip(&tar_of(&[(EntryType::Regular, "zeros", &zeros)])), "and 200 times its own");
    // A long name is kept in memory, so it has a limit of its own.
    let long = vec![b'n'; 2 << 20];
    let mut builder = Builder::new(Vec::new());
    entry(&mut builder, EntryType::GNULongName, b"././@LongLink", 0o644, &long);
    entry(&mut builder, EntryType::Regular, b"n", 0o644, b"x");
    refused(&builder.into_inner().unwrap(), "header has more than");
    // Decompression with a dictionary of 256 MiB.
    let archive = tar_of(&[(EntryType::Regular, "a", &[7; 10_000])]);
    refused(&by_command("xz, filters", &archive), "needs more than 128 MiB");
    // What follows the end is read only so far.
    let mut endless = tar_of(&[(EntryType::Regular, "a", b"a")]);
    endless.resize(endless.len() + (65 << 20), 0);
    refused(&endless, "follow the end");
}

#[test]
fn zip_archives_have_the_same_rules() {
    let zip_of = |name: &str, options: ::zip::write::SimpleFileOptions, content: &[u8]| {
        let mut zip = ::zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file(name, options).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap().into_inner()
    };
    let plain = ::zip::write::SimpleFileOptions::default();
    for name in ["../up", "/etc/passwd", "a\\..\\up"] {
        let archive = zip_of(name, plain, b"x");
        assert!(extract(&archive).is_err(), "{name}");
    }
    let mut links = ::zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    links.add_symlink("link", "/etc/passwd", plain).unwrap();
    refused(&links.finish().unwrap().into_inner(), "link or a device");
    refused(&zip_of("zeros", plain, &vec![0; 80 << 20]), "and 200 times its own");
    let sound = zip_of("a", plain.compression_method(::zip::CompressionMethod::Stored), b"content of a file");
    // One wrong bit in the content: the checksum of the entry finds it.
    let mut flipped = sound.clone();
    let at = flipped.windows(7).position(|window| window == b"content").unwrap();
    flipped[at] ^= 1;
    refused(&flipped, "damaged or truncated");
    refused(&sound[..sound.len() - 30], "damaged or truncated");
}

#[test]
fn entries_are_counted_even_if_they_repeat_one_path() {
    let one = tar_of(&[(EntryType::Regular, "a", b"")]);
    let many = [one[..512].repeat(ARCHIVE_ENTRIES_MAX + 1), vec![0; 1024]].concat();
    refused(&gzip(&many), "more than 200000 entries");
}

#[test]
fn the_list_of_a_zip_archive_is_what_its_end_states() {
    let mut zip = ::zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for name in ["a", "b"] {
        zip.start_file(name, ::zip::write::SimpleFileOptions::default()).unwrap();
    }
    let sound = zip.finish().unwrap().into_inner();
    assert_eq!(extract(&sound).unwrap().len(), 2);
    let end = sound.len() - 22;
    let with = |at: usize, bytes: &[u8]| {
        let mut archive = sound.clone();
        archive[at..at + bytes.len()].copy_from_slice(bytes);
        archive
    };
    // Another number of files, another size of the list, and a comment that does not end with the file.
    refused(&with(end + 10, &[1]), "lists other ones");
    refused(&with(end + 12, &[0xff, 0xff, 0xff, 0]), "no central directory");
    refused(&with(end + 20, &[9]), "no central directory");
    refused(&[&sound[..], b"after"].concat(), "no central directory");
    // A zip64 record with other values, which some readers would use.
    let list = u32::from_le_bytes(sound[end + 12..end + 16].try_into().unwrap());
    let zip64 = |files: u64| {
        let mut record = b"PK\x06\x06".to_vec();
        record.extend(44_u64.to_le_bytes());
        record.extend([45, 0, 45, 0]);
        record.extend([0; 8]);
        for value in [files, files, u64::from(list), end as u64 - u64::from(list)] {
            record.extend(value.to_le_bytes());
        }
        record.extend(b"PK\x06\x07\0\0\0\0");
        record.extend((end as u64).to_le_bytes());
        record.extend(1_u32.to_le_bytes());
        [&sound[..end], &record, &sound[end..]].concat()
    };
    assert_eq!(extract(&zip64(2)).unwrap().len(), 2);
    refused(&zip64(1), "no central directory");
}

/// An entry of a generated archive: its kind, name, mode and content.
///
/// No name has a colon: bsdtar strips `c:`, the letter of a drive, from names.
fn any_entry() -> impl Strategy<Value = (u8, String, u32, Vec<u8>)> {
    let kind = prop_oneof![60 => Just(b'0'), 12 => Just(b'5'), 1 => Just(b'2'), 1 => Just(b'1'), 1 => Just(b'7'), 1 => Just(0)];
    let segment =
        prop_oneof![40 => "[a-z]{1,2}", 1 => Just("..".to_owned()), 1 => Just(".".to_owned()), 3 => "[ -9;-~é]{1,120}"];
    let name = prop::collection::vec(segment, 1..4).prop_map(|segments| segments.join("/"));
    let mode = prop_oneof![Just(0o644), Just(0o755), Just(0o4755), Just(0o000)];
    (kind, name, mode, prop::collection::vec(any::<u8>(), 0..2000))
}

fn archive_of(entries: &[(u8, String, u32, Vec<u8>)]) -> Option<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, mode, content) in entries {
        let kind = EntryType::new(*kind);
        let content: &[u8] = if kind == EntryType::Regular || kind == EntryType::Continuous { content } else { b"" };
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(*mode);
        header.set_size(content.len() as u64);
        if matches!(kind, EntryType::Link | EntryType::Symlink) {
            header.set_link_name("target").ok()?;
        }
        header.set_cksum();
        // Long names get a header of their own. Names that the builder refuses are not written by any program.
        if name.len() < 100 {
            entry(&mut builder, kind, name.as_bytes(), *mode, content);
        } else {
            builder.append_data(&mut header, name, content).ok()?;
        }
    }
    builder.into_inner().ok()
}

/// Returns the command for GNU tar, and that for bsdtar (libarchive) if it is there.
fn other_programs() -> Vec<Command> {
    let mut programs = vec![Command::new("tar")];
    if let Some(path) = std::env::var_os("MODELCACHE_TEST_BSDTAR").filter(|path| !path.is_empty()) {
        let mut bsdtar = Command::new(path);
        bsdtar.envs(std::env::var_os("MODELCACHE_TEST_BSDTAR_LIBRARIES").map(|folder| ("LD_LIBRARY_PATH", folder)));
        programs.push(bsdtar);
    }
    programs
}

/// Returns the files that `program` extracts, or `None` if it reports an error.
fn by_program(program: &mut Command, archive: &[u8]) -> Option<Files> {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let file = folder.join("archive.tar");
    std::fs::write(&file, archive).unwrap();
    let into = folder.join("into");
    std::fs::create_dir(&into).unwrap();
    let output = program.args(["-xf"]).arg(&file).arg("-C").arg(&into).output().unwrap();
    let mut files = Files::new();
    let mut folders = vec![into.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            use std::os::unix::fs::PermissionsExt as _;
            let path = entry.unwrap().path();
            let metadata = std::fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
                folders.push(path);
            } else {
                let executable = metadata.permissions().mode() & 0o100 != 0;
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
                let name = path.strip_prefix(&into).unwrap().to_str().unwrap().to_owned();
                files.insert(name, (std::fs::read(&path).unwrap_or_default(), executable));
            }
        }
    }
    output.status.success().then_some(files)
}

/// `EXTRACT_CASES` sets the number of archives, `EXTRACT_SEED` repeats a run. A failure prints the archive.
#[test]
#[allow(clippy::print_stderr)]
fn an_archive_gives_the_files_of_other_programs_or_is_refused() {
    let number = |variable: &str| std::env::var(variable).ok().map(|text| text.parse::<u64>().unwrap());
    let cases = number("EXTRACT_CASES").map_or(200, |cases| u32::try_from(cases).unwrap());
    let seed = number("EXTRACT_SEED").unwrap_or_else(rand::random);
    eprintln!("EXTRACT_SEED={seed}");
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed.to_le_bytes(); 4].concat());
    let mut runner = TestRunner::new_with_rng(ProptestConfig { cases, ..ProptestConfig::default() }, rng);
    let accepted = std::cell::Cell::new(0);
    let compared = runner.run(&prop::collection::vec(any_entry(), 1..8), |entries| {
        let Some(archive) = archive_of(&entries) else { return Ok(()) };
        if let Ok(ours) = extract(&archive) {
            accepted.set(accepted.get() + 1);
            for mut program in other_programs() {
                prop_assert_eq!(by_program(&mut program, &archive), Some(ours.clone()), "{:?}", program);
            }
        }
        Ok(())
    });
    compared.unwrap_or_else(|failure| panic!("{failure}"));
    let programs = other_programs().len();
    eprintln!("{} of {cases} archives were extracted, and compared with {programs} programs", accepted.get());
    assert!(accepted.get() > cases / 10, "only {} archives were compared", accepted.get());
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(entries in prop::collection::vec(any_entry(), 1..4), at in any::<usize>(), bytes in any::<[u8; 4]>()) {
        let Some(mut archive) = archive_of(&entries) else { return Ok(()) };
        let at = at % (archive.len() - bytes.len());
        archive[at..at + bytes.len()].copy_from_slice(&bytes);
        for archive in [gzip(&archive), archive] {
            let mut into = Memory::default();
            let format = Format::of(&archive, archive.len() as u64);
            if is_archive(format) && format != Format::Zip {
                let _ = Archive { format, size: archive.len() as u64, name: "a" }.extract_stream(&archive[..], &mut into);
            }
        }
    }
}
