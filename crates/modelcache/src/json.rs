//! Functions for `#[serde(serialize_with = …)]`: the serialized forms of times, durations and paths in reports.

use serde::{Serialize, Serializer};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The beginning of the year 10000, in seconds since the Unix epoch. RFC 3339 cannot express times from then on.
const YEAR_10000: u64 = 253_402_300_800;

/// Serializes a time as RFC 3339 in UTC, to the second. A time outside the years 1970 to 9999 is `null`.
pub(crate) fn time<S: Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    let unix = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    match unix.filter(|unix| unix.as_secs() < YEAR_10000) {
        Some(unix) => serializer.collect_str(&humantime::format_rfc3339_seconds(UNIX_EPOCH + unix)),
        None => serializer.serialize_none(),
    }
}

/// Serializes a duration as a number of seconds.
pub(crate) fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// Serializes a path as text. Bytes that are not UTF-8 are replaced.
pub(crate) fn path<S: Serializer>(path: &impl AsRef<Path>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.as_ref().display())
}

/// Serializes a path as [`path`] does, or `null`.
pub(crate) fn optional_path<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.display().to_string()).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn times_that_rfc_3339_cannot_express_are_null() {
        let text = |at| time(&at, serde_json::value::Serializer).expect("text");
        let after = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(text(after(1_000_000)), json!("1970-01-12T13:46:40Z"));
        assert_eq!(text(after(YEAR_10000 - 1)), json!("9999-12-31T23:59:59Z"));
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!([text(None), text(after(YEAR_10000)), text(Some(before))], [json!(null), json!(null), json!(null)]);
    }

    #[test]
    fn a_path_need_not_be_utf_8() {
        let odd = PathBuf::from(OsString::from_vec(b"/c/\xff".to_vec()));
        assert_eq!(path(&odd, serde_json::value::Serializer).expect("text"), json!("/c/\u{fffd}"));
        assert_eq!(optional_path(&Some(odd), serde_json::value::Serializer).expect("text"), json!("/c/\u{fffd}"));
        assert_eq!(optional_path(&None, serde_json::value::Serializer).expect("text"), json!(null));
    }
}
