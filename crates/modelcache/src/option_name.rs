//! The options that messages name. The front end decides how they are written.
//!
//! A remedy such as "raise `max_bytes`" has to say how the option is set: by a variable or a flag on the command line,
//! by a keyword in Python. The library formats an [`OptionName`] into the message, and the front end installs the
//! function that writes it, with [`write_options_with`]. Without that function the plain name is written, which is the
//! key in the configuration file.

use std::fmt;
use std::sync::{PoisonError, RwLock};

/// The function of the front end. A front end takes the write lock once, when it starts. Afterwards there are only
/// readers, which share the lock: if a fork happens while a thread reads, the child can still read.
static WRITE: RwLock<fn(OptionName) -> String> = RwLock::new(plain);

/// Sets how options are written in later messages of this process.
pub fn write_options_with(write: fn(OptionName) -> String) {
    *WRITE.write().unwrap_or_else(PoisonError::into_inner) = write;
}

/// Writes the plain name, and the value after an equals sign.
fn plain(option: OptionName) -> String {
    option.value.map_or_else(|| option.name.to_owned(), |value| format!("{}={value}", option.name))
}

/// Where an option is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// For the whole cache: a row of [`SETTINGS`](crate::settings::SETTINGS).
    Setting,
    /// For one call.
    Call,
}

/// An option in a message, with the value that the message suggests, if it suggests one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionName {
    /// The name, in the form of a key of the configuration file.
    pub name: &'static str,
    /// Where the option is set.
    pub scope: Scope,
    /// True if the option is turned on without a value.
    pub is_switch: bool,
    /// The suggested value.
    pub value: Option<&'static str>,
}

impl OptionName {
    /// Returns the option with a suggested value.
    #[must_use]
    pub const fn set_to(self, value: &'static str) -> Self {
        Self { value: Some(value), ..self }
    }
}

impl fmt::Display for OptionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let write = *WRITE.read().unwrap_or_else(PoisonError::into_inner);
        f.write_str(&write(*self))
    }
}

macro_rules! options {
    ($scope:ident: $($constant:ident = $name:literal $($switch:ident)?,)*) => {
        use super::{OptionName, Scope};
        $(
            #[doc = concat!("`", $name, "`")]
            pub const $constant: OptionName = OptionName {
                name: $name,
                scope: Scope::$scope,
                is_switch: options!($($switch)?),
                value: None,
            };
        )*
        /// All of them.
        pub const ALL: &[OptionName] = &[$($constant,)*];
    };
    (switch) => { true };
    () => { false };
}

/// Settings that messages name.
pub mod setting {
    options! { Setting:
        DIR = "dir",
        FORBID = "forbid",
        LAYOUT = "layout",
        LOWER_DIR = "lower_dir",
        MAX_BYTES = "max_bytes",
        MIN_FREE_BYTES = "min_free_bytes",
        MLFLOW_LOCAL_ROOT = "mlflow_local_root",
        MLFLOW_REGISTRY_URI = "mlflow_registry_uri",
        MLFLOW_TRACKING_URI = "mlflow_tracking_uri",
        OFFLINE = "offline" switch,
        ORIGIN = "origin",
        READ_TIMEOUT = "read_timeout",
        REMOTE = "remote",
        REMOTE_MODE = "remote_mode",
        REQUIRE_CHECKSUM = "require_checksum" switch,
        RETRY_DEADLINE = "retry_deadline",
        S3_BUCKET = "s3_bucket",
        SHARED = "shared",
        START_JITTER = "start_jitter",
    }
}

/// Options of a call that messages name.
pub mod call {
    options! { Call:
        CONFIG = "config",
        EXCLUDE = "exclude",
        EXPECT = "expect",
        EXTRACT = "extract",
        FOLLOW_LINKS = "follow_links" switch,
        FORCE = "force" switch,
        INCLUDE = "include",
        INTO = "into",
        LINK = "link",
        LOCAL_FILES_ONLY = "local_files_only" switch,
        OFFLINE = "offline" switch,
        READ_ONLY = "read_only" switch,
        REFRESH = "refresh" switch,
        REMOTE = "remote",
        REPAIR = "repair" switch,
        REVISION = "revision",
        SIDECAR = "sidecar" switch,
        TIER = "tier",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_front_end_the_plain_name_is_written() {
        use setting::MAX_BYTES;
        assert_eq!(format!("raise {MAX_BYTES}, or {}", call::TIER.set_to("remote")), "raise max_bytes, or tier=remote");
    }
}
