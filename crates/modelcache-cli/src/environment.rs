//! The one place that reads the process's environment and the files that settings come from.
//!
//! The library gets values and decides what they mean.

use crate::arguments::Global;
use modelcache::config::Environment;
use modelcache::settings::{ConfigFiles, Settings, netrc_path};
use modelcache::{Error, ErrorKind, Result};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Settings from flags, environment and files.
pub(crate) fn gather(global: &Global) -> Result<Settings> {
    let environment = environment(std::env::vars_os())?;
    let files = read_files(ConfigFiles::choose(global.config.as_deref(), &environment))?;
    let mut settings = Settings::gather(&global.settings.0, &environment, &files, read_if_there)?;
    if netrc_path(&environment).is_some_and(|path| others_may_read(&path)) {
        settings.config.credentials.netrc_is_open();
    }
    settings.config.dir = std::path::absolute(&settings.config.dir)
        .map_err(|cause| Error::new(ErrorKind::Directory, "the present folder is not known").cause(cause))?;
    Ok(settings)
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

/// The variables as text. One of ours that is not UTF-8 is refused; others are none of our business.
fn environment(variables: impl Iterator<Item = (OsString, OsString)>) -> Result<Environment> {
    let mut environment = Environment::default();
    for (name, value) in variables {
        let Ok(name) = name.into_string() else { continue };
        match value.into_string() {
            Ok(value) => {
                environment.0.insert(name, value);
            }
            Err(_) if name.starts_with("MODEL_CACHE_") => {
                return Err(Error::invalid(format!("{name} is not UTF-8")));
            }
            Err(_) => {}
        }
    }
    Ok(environment)
}

fn read_files(files: ConfigFiles) -> Result<Vec<(PathBuf, String)>> {
    let refuse = |path: &Path, cause: io::Error| {
        Error::invalid(format!("cannot read the configuration file {}", path.display())).cause(cause)
    };
    match files {
        ConfigFiles::Named(path) => match std::fs::read_to_string(&path) {
            Ok(text) => Ok(vec![(path, text)]),
            Err(cause) => Err(refuse(&path, cause).hint("--config and MODEL_CACHE_CONFIG name a TOML file")),
        },
        ConfigFiles::Usual(paths) => paths
            .into_iter()
            .filter_map(|path| match read_if_there(&path) {
                Ok(text) => Some(Ok((path, text?))),
                Err(cause) => Some(Err(refuse(&path, cause))),
            })
            .collect(),
    }
}

/// Whether users other than the owner may read the file.
fn others_may_read(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.mode() & 0o044 != 0)
}

fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn only_our_own_variables_must_be_utf8() {
        let bad = || OsString::from_vec(vec![0xff]);
        let read = environment([("LESS".into(), bad()), (bad(), "x".into()), ("A".into(), "b".into())].into_iter());
        assert_eq!(read.expect("environment").get("A"), Some("b"));
        assert!(environment([("MODEL_CACHE_DIR".into(), bad())].into_iter()).is_err());
    }
}
