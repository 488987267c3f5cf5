//! Limits on names, files, manifests and responses, each with its unit and reason.
//!
//! Input that exceeds a limit is rejected. No limit depends on the machine.

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// Maximum number of segments of a bare name. Enough for `team/project/model`. A publication sends one HEAD request for
/// each leading part of the name (`team`, `team/project`, …), to check that no version is published there.
pub const NAME_SEGMENTS_MAX: usize = 8;

/// Maximum length of an artifact name, in bytes: half of S3's limit on keys (1,024 bytes), which also contain the
/// version and the file path. A version is one segment, limited by [`SEGMENT_BYTES_MAX`].
pub const NAME_BYTES_MAX: usize = 512;

/// Maximum length of the path of a file within an artifact, in bytes. Below S3's limit on keys (1,024 bytes).
pub const PATH_BYTES_MAX: usize = 900;

/// Maximum length of a segment of a path, in bytes: the limit of common filesystems.
pub const SEGMENT_BYTES_MAX: usize = 255;

/// Maximum length of an escaped folder name on disk, in bytes. A longer name is cut, and a hash is appended. Below
/// [`SEGMENT_BYTES_MAX`], so that temporary suffixes fit.
pub const ESCAPED_BYTES_MAX: usize = 240;

/// Maximum number of files in one artifact. The largest datasets on the Hub have fewer.
pub const FILES_MAX: usize = 1_000_000;

/// Maximum size of a manifest, in bytes. A million files with digests and ladders fit.
pub const MANIFEST_BYTES_MAX: u64 = 512 * MIB;

/// Maximum number of unknown fields in one object of a manifest. A newer release adds only a few.
pub const UNKNOWN_FIELDS_MAX: usize = 64;

/// Maximum size of the unknown fields of a manifest, except those of its files, in bytes. A signature with its
/// certificates fits.
pub const UNKNOWN_BYTES_MAX: usize = 1 << 20;

/// Maximum size of the unknown fields of one file in a manifest, in bytes.
pub const UNKNOWN_ENTRY_BYTES_MAX: usize = 16 << 10;

/// Maximum nesting depth of a manifest. The known fields have six levels; unknown fields may have more.
pub const MANIFEST_DEPTH_MAX: usize = 40;

/// Maximum size of the extracted files of an archive, as a multiple of its own size. Weights compress to half at best;
/// zeros compress to a thousandth.
pub const ARCHIVE_RATIO_MAX: u64 = 200;

/// Total size that the extracted files of an archive may always have, even if it is more than [`ARCHIVE_RATIO_MAX`]
/// times the size of the archive.
pub const ARCHIVE_BYTES_ALWAYS_ALLOWED: u64 = 64 * MIB;

/// Maximum number of entries in an archive. Each takes about 2 KiB of memory until the files are published.
pub const ARCHIVE_ENTRIES_MAX: usize = 200_000;

/// Maximum size of the names of all entries in an archive, in bytes. They are in memory several times.
pub const ARCHIVE_NAME_BYTES_MAX: usize = 32 << 20;

/// Maximum number of folders in the path of a file in an archive.
pub const ARCHIVE_DEPTH_MAX: usize = 40;

/// Maximum size of the header of a file in a tar archive, with its long name and its fields, in bytes.
pub const ARCHIVE_HEADER_BYTES_MAX: u64 = MIB;

/// Maximum size of the list of files in a zip archive, in bytes. Reading it takes about ten times as much memory.
pub const ARCHIVE_LIST_BYTES_MAX: u64 = 8 * MIB;

/// Maximum memory for the decompression of an xz archive, in KiB. `xz -9` needs 65 MiB.
pub const ARCHIVE_XZ_KIB_MAX: u32 = 128 << 10;

/// Maximum size of a single metadata response (a revision, a claim, an error body), in bytes.
pub const RESPONSE_BYTES_MAX: u64 = 16 * MIB;

/// Maximum size of a file, in bytes: 5 TiB, the maximum size of an S3 object.
pub const FILE_BYTES_MAX: u64 = 5 * 1024 * GIB;

/// Minimum size of a part, in bytes, so that ladders stay small.
pub const PART_BYTES_MIN: u64 = 4 * MIB;

/// Maximum number of parts in one file. Limits a ladder to 512 KiB of SHA-256 states.
pub const PARTS_MAX: u64 = 16_384;

/// A file above this size, in bytes, has parts of at least twice [`PART_BYTES_MIN`], so that its ladder stays small.
pub const LARGE_FILE_BYTES: u64 = GIB;

/// Maximum number of redirects that one request follows.
pub const REDIRECTS_MAX: usize = 10;
