//! The limits of the system, each with its unit and reason.
//!
//! Input from outside (manifests, listings, names) that exceeds a limit is rejected. No limit depends on the machine.

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// Maximum number of segments of a bare name. Enough for `team/project/model`, and few enough for one HEAD request per
/// ancestor.
pub const NAME_SEGMENTS_MAX: usize = 8;

/// Maximum length of a name or version, in bytes. Together with a file path it must fit S3's 1,024-byte key.
pub const NAME_BYTES_MAX: usize = 512;

/// Maximum length of the path of a file within an artifact, in bytes.
pub const PATH_BYTES_MAX: usize = 900;

/// Maximum length of a segment of a path, in bytes: the limit of common filesystems.
pub const SEGMENT_BYTES_MAX: usize = 255;

/// Maximum length of an escaped folder name on disk, in bytes. A longer name is cut, and a hash is appended. Below
/// [`SEGMENT_BYTES_MAX`], so that temporary suffixes fit.
pub const ESCAPED_BYTES_MAX: usize = 240;

/// Maximum number of files in one artifact. The largest datasets on the Hub are below it.
pub const FILES_MAX: usize = 1_000_000;

/// Maximum size of a manifest, in bytes. A million files with digests and ladders are below it.
pub const MANIFEST_BYTES_MAX: u64 = 512 * MIB;

/// Maximum number of unknown fields in one object of a manifest. A release adds a few at a time.
pub const UNKNOWN_FIELDS_MAX: usize = 64;

/// Maximum size of the unknown fields of a manifest, except those of its files, in bytes. A signature with its
/// certificates fits.
pub const UNKNOWN_BYTES_MAX: usize = 1 << 20;

/// Maximum size of the unknown fields of one file, in bytes.
pub const UNKNOWN_ENTRY_BYTES_MAX: usize = 16 << 10;

/// Maximum nesting depth of a manifest. The known fields have six levels, and unknown fields may have more.
pub const MANIFEST_DEPTH_MAX: usize = 40;

/// Maximum size of a single metadata response (a revision, a claim, an error body), in bytes.
pub const ANSWER_BYTES_MAX: u64 = 16 * MIB;

/// Maximum size of a file, in bytes: 5 TiB, the maximum size of an S3 object.
pub const FILE_BYTES_MAX: u64 = 5 * 1024 * GIB;

/// Minimum size of a part, in bytes.
pub const PART_BYTES_MIN: u64 = 8 * MIB;

/// Maximum number of parts in one file. Limits a ladder to 512 KiB of SHA-256 states.
pub const PARTS_MAX: u64 = 16_384;

/// A file above this size, in bytes, has parts of at least twice [`PART_BYTES_MIN`], so that it needs fewer requests.
pub const LARGE_FILE_BYTES: u64 = GIB;

/// Maximum number of redirects that one request follows.
pub const REDIRECTS_MAX: usize = 10;
