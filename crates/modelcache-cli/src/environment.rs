//! The one place that reads the process's environment.
//!
//! The library gets values and decides what they mean.

use crate::arguments::Global;
use modelcache::Result;
use modelcache::config::Environment;
use modelcache::settings::{self, ConfigFiles, Settings, read_files, read_if_there};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Settings from flags, environment and files.
pub(crate) fn gather(global: &Global) -> Result<Settings> {
    let environment = settings::environment(std::env::vars_os())?;
    let files = read_files(ConfigFiles::choose(global.config.as_deref(), &environment))?;
    Settings::gather(&global.settings.0, &environment, &files, read_if_there)?.placed(&environment)
}

/// What the doctor wants to know of where settings come from.
pub(crate) struct Survey {
    pub(crate) environment: Environment,
    /// The files that were read.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) settings: Result<Settings>,
    /// The settings, as far as possible, where the others cannot be used.
    pub(crate) without_what_is_wrong: Result<Settings>,
}

/// Gathers settings, and where that fails again without the file, variable or flags that are in the way.
pub(crate) fn survey(global: &Global) -> Survey {
    // Values that are not UTF-8 are left out here; gathering tells of them.
    let texts =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let environment = Environment(texts.collect());
    let files = read_files(ConfigFiles::choose(global.config.as_deref(), &environment)).unwrap_or_default();
    let settings = gather(global);
    let gather = |flags: &_, environment: &_, files: &[_]| Settings::gather(flags, environment, files, read_if_there);
    let (flags, none) = (&global.settings.0, Default::default());
    let is_ours = |name: &&String| name.starts_with("MODEL_CACHE_") || *name == "HF_ENDPOINT";
    let without = |name: &String| {
        let mut environment = environment.clone();
        environment.0.remove(name);
        environment
    };
    let bare = || {
        Environment(
            environment.0.iter().filter(|(name, _)| !is_ours(name)).map(|(a, b)| (a.clone(), b.clone())).collect(),
        )
    };
    let without_what_is_wrong = gather(flags, &environment, &files)
        .or_else(|_| gather(flags, &environment, &[]))
        .or_else(|error| {
            let less = environment.0.keys().filter(is_ours).map(without);
            less.map(|less| gather(flags, &less, &files)).find(Result::is_ok).unwrap_or(Err(error))
        })
        .or_else(|_| gather(&none, &environment, &files))
        .or_else(|_| gather(&none, &bare(), &[]));
    let files = files.into_iter().map(|(path, _)| path).collect();
    Survey { environment, files, settings, without_what_is_wrong }
}

/// Who calls: `user@host`, for records that others read.
pub(crate) fn caller() -> String {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let number = || std::fs::metadata("/proc/self").map_or_else(|_| "somebody".into(), |m| format!("uid {}", m.uid()));
    let user = variable("USER").or_else(|| variable("LOGNAME")).unwrap_or_else(number);
    match read_if_there(Path::new("/proc/sys/kernel/hostname")) {
        Ok(Some(host)) => format!("{user}@{}", host.trim()),
        _ => user,
    }
}
