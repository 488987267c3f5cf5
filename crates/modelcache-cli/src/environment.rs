//! Reads the environment of the process. The library reads none: it receives the values and interprets them.

use crate::arguments::Global;
use modelcache::Result;
use modelcache::config::Environment;
use modelcache::settings::{self, ConfigFiles, Settings, read_files, read_if_there};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Gathers the settings from flags, environment and files.
pub(crate) fn gather(global: &Global) -> Result<Settings> {
    gather_with(global, |_| Ok(()))
}

/// Like [`gather`], with a change to the environment before it is interpreted.
pub(crate) fn gather_with(global: &Global, complete: impl FnOnce(&mut Environment) -> Result<()>) -> Result<Settings> {
    let mut environment = settings::environment(std::env::vars_os())?;
    complete(&mut environment)?;
    let files = read_files(ConfigFiles::choose(global.config.as_deref(), &environment))?;
    Settings::gather(&global.settings.0, &environment, &files, read_if_there)?.completed_on_this_machine(&environment)
}

/// The settings and their sources, which the doctor also examines if settings are invalid.
pub(crate) struct DoctorSettings {
    pub(crate) environment: Environment,
    /// The configuration files that were read.
    pub(crate) files: Vec<PathBuf>,
    /// The settings, or the reason why they are invalid.
    pub(crate) settings: Result<Settings>,
    /// The settings that remain without the invalid file, variable or flags.
    pub(crate) valid_settings: Result<Settings>,
}

/// Gathers the settings. If that fails, gathers them again without the invalid file, variable or flags, so that the
/// doctor can examine the rest.
pub(crate) fn gather_for_doctor(global: &Global) -> DoctorSettings {
    // Variables that are not UTF-8 are skipped here; `gather` reports them.
    let texts =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let environment = Environment(texts.collect());
    let files = read_files(ConfigFiles::choose(global.config.as_deref(), &environment)).unwrap_or_default();
    let settings = gather(global);
    let gather_from = |flags: &_, environment: &_, files: &[_]| {
        Settings::gather(flags, environment, files, read_if_there)?.completed_on_this_machine(environment)
    };
    let (flags, no_flags) = (&global.settings.0, Default::default());
    let is_ours = |name: &&String| name.starts_with("MODEL_CACHE_") || *name == "HF_ENDPOINT";
    let without = |name: &String| {
        let mut environment = environment.clone();
        environment.0.remove(name);
        environment
    };
    let without_ours = || {
        Environment(
            environment.0.iter().filter(|(name, _)| !is_ours(name)).map(|(a, b)| (a.clone(), b.clone())).collect(),
        )
    };
    // Try in this order: everything; no files; all but one variable; no flags; neither flags, variables nor files.
    let valid_settings = gather_from(flags, &environment, &files)
        .or_else(|_| gather_from(flags, &environment, &[]))
        .or_else(|error| {
            let reduced = environment.0.keys().filter(is_ours).map(without);
            reduced.map(|reduced| gather_from(flags, &reduced, &files)).find(Result::is_ok).unwrap_or(Err(error))
        })
        .or_else(|_| gather_from(&no_flags, &environment, &files))
        .or_else(|_| gather_from(&no_flags, &without_ours(), &[]));
    let files = files.into_iter().map(|(path, _)| path).collect();
    DoctorSettings { environment, files, settings, valid_settings }
}

/// Returns `user@host` of this process, for records that other users read.
pub(crate) fn caller() -> String {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user_id = || {
        std::fs::metadata("/proc/self").map_or_else(|_| "unknown".into(), |process| format!("uid {}", process.uid()))
    };
    let user = variable("USER").or_else(|| variable("LOGNAME")).unwrap_or_else(user_id);
    match read_if_there(Path::new("/proc/sys/kernel/hostname")) {
        Ok(Some(host)) => format!("{user}@{}", host.trim()),
        _ => user,
    }
}
