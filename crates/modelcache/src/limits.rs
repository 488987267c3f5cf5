//! The limits of the system in one place, each with its unit and reason.
//!
//! Input from outside (manifests, listings, names) is refused beyond these; nothing here is tuned per machine.

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// Most segments of a bare name. Deep enough for `team/project/model`, shallow enough for one HEAD per ancestor.
pub const NAME_SEGMENTS_MAX: usize = 8;

/// Longest name or version, in bytes. Together with a file path it must fit S3's 1,024-byte key.
pub const NAME_BYTES_MAX: usize = 512;

/// Longest path of a file within an artifact, in bytes.
pub const PATH_BYTES_MAX: usize = 900;

/// Longest segment of a path, in bytes: what common filesystems accept.
pub const SEGMENT_BYTES_MAX: usize = 255;

/// Longest escaped folder name on disk, in bytes; beyond it the name is cut and a hash appended. Below
/// [`SEGMENT_BYTES_MAX`], so that temporary suffixes fit.
pub const ESCAPED_BYTES_MAX: usize = 240;

/// Most files in one artifact. The largest datasets on the Hub stay below it.
pub const FILES_MAX: usize = 1_000_000;

/// Largest manifest accepted, in bytes: a million files with digests and ladders stay below it.
pub const MANIFEST_BYTES_MAX: u64 = 512 * MIB;

/// Most unknown fields in one object of a manifest. Releases add a few at a time.
pub const UNKNOWN_FIELDS_MAX: usize = 64;

/// Most bytes of unknown fields of a manifest besides those of its files: a signature with its certificates fits.
pub const UNKNOWN_BYTES_MAX: usize = 1 << 20;

/// Most bytes of unknown fields of one file.
pub const UNKNOWN_ENTRY_BYTES_MAX: usize = 16 << 10;

/// How deep a manifest may be nested. Those of ours have six levels, and unknown fields may have theirs.
pub const MANIFEST_DEPTH_MAX: usize = 40;

/// Largest single metadata answer (a revision, a claim, an error body) accepted, in bytes.
pub const ANSWER_BYTES_MAX: u64 = 16 * MIB;

/// Largest file, in bytes: 5 TiB is S3's largest object.
pub const FILE_BYTES_MAX: u64 = 5 * 1024 * GIB;

/// Smallest part, in bytes.
pub const PART_BYTES_MIN: u64 = 8 * MIB;

/// Most parts in one file: bounds a ladder to 512 KiB of states.
pub const PARTS_MAX: u64 = 16_384;

/// A file above this many bytes uses parts of at least twice [`PART_BYTES_MIN`]: fewer requests per byte.
pub const LARGE_FILE_BYTES: u64 = GIB;

/// Most redirects followed for one request.
pub const REDIRECTS_MAX: usize = 10;
