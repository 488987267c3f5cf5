//! `storage-initializer`: the container contract of KServe. Downloads each source into its destination folder.
//!
//! KServe runs it as an init container: user 1000, a read-only root filesystem, 1 GiB of memory, and an emptyDir volume
//! as destination. Its environment has names of its own, which are translated here.

use super::Session;
use crate::arguments::Global;
use crate::progress;
use clap::Args;
use modelcache::cache::{GetAnswer, GetOptions, LinkMode, Materialized};
use modelcache::config::{Config, Environment};
use modelcache::digest::Digest;
use modelcache::progress::Progress;
use modelcache::settings::{self, ConfigFiles, read_files};
use modelcache::{Cache, Error, Reference, Result, Selection};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The name of the temporary cache directory. If the destination is a mount point, the directory is created in it.
/// Otherwise it is created beside the destination, and a dash and the name of the destination are appended.
const TEMPORARY_CACHE: &str = modelcache::disk::CACHE_IN_MOUNT;

/// The variable that names the cache directory.
const CACHE_DIR: &str = "MODEL_CACHE_DIR";

/// The variable with the digest that the source must have, from KServe's `verification.digest`.
const VERIFICATION_DIGEST: &str = "VERIFICATION_DIGEST";

/// Download models into folders, as the storage initializer of KServe
///
/// Runs in place of KServe's own image, see docs/kserve.md. Each SRC is a reference, a path, or a URI as KServe writes
/// it. Its files are put into the folder DEST, and an archive is extracted there. If there is neither MODEL_CACHE_DIR
/// nor a configuration file, the files are downloaded into a temporary cache directory in the volume of the first DEST.
/// Every failure ends with exit code 1; a command line that cannot be parsed ends with 2.
#[derive(Debug, Args)]
pub(crate) struct StorageInitializer {
    /// Pairs of a source and a destination folder
    #[arg(required = true, num_args = 2.., value_names = ["SRC", "DEST"])]
    paths: Vec<String>,
}

impl StorageInitializer {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let own = self.temporary_cache().filter(|own| *own == session.config.dir && !is_dir_configured(session.global));
        // A failed run leaves the temporary cache directory: the container is started again, and resumes.
        self.get_all(session).await?;
        // The files in the destinations are hard links or copies, which stay.
        own.map_or(Ok(()), |own| remove_temporary_cache(&own))
    }

    /// Returns the temporary cache directory, for a container without a configured one: in the volume of the first
    /// destination, so that the files can be linked there.
    fn temporary_cache(&self) -> Option<PathBuf> {
        let destination = std::path::absolute(self.paths.get(1)?).ok()?;
        Some(match destination.parent() {
            Some(parent) if !modelcache::disk::is_mount_point(&destination) => {
                let name = destination.file_name()?.to_str()?;
                parent.join(format!("{TEMPORARY_CACHE}-{name}"))
            }
            _ => destination.join(TEMPORARY_CACHE),
        })
    }

    /// Adds to `environment` the variables of this program that follow from those of KServe, and the cache directory
    /// if none is configured.
    ///
    /// # Errors
    /// `Invalid` for a variable that cannot be parsed.
    pub(crate) fn complete_environment(&self, global: &Global, environment: &mut Environment) -> Result<()> {
        translate(&mut environment.0)?;
        if let Some(own) = self.temporary_cache().filter(|_| !is_dir_configured(global)) {
            environment.0.insert(CACHE_DIR.to_owned(), own.display().to_string());
        }
        Ok(())
    }

    async fn get_all(&self, session: &Session<'_>) -> Result<()> {
        let variables = &session.config.buckets.environment.0;
        let (pairs, []) = self.paths.as_chunks::<2>() else {
            return Err(Error::invalid("the last source has no destination").hint("write SRC DEST [SRC DEST]..."));
        };
        check_destinations(pairs.iter().map(|[_, destination]| destination.as_str()))?;
        let digest = variables.get(VERIFICATION_DIGEST).map(|text| demanded_digest(text)).transpose()?;
        if digest.is_some() && pairs.len() > 1 {
            return Err(Error::invalid(format!("{VERIFICATION_DIGEST} is set, and there are several sources"))
                .hint("append the digest to each source instead: SRC#sha256=HEX"));
        }
        let patterns = |name| variables.get(name).map_or_else(Vec::new, |text| patterns(text));
        let selection = Selection::globs(&patterns("STORAGE_ALLOW_PATTERNS"), &patterns("STORAGE_IGNORE_PATTERNS"))?;
        let mut config = session.config_without_background_sync();
        complete_config(&mut config);
        let cache = Cache::open(config)?;
        for [source, destination] in pairs {
            let mut reference = reference(source)?;
            reference.digest = digest.or(reference.digest);
            self.get_one(session, &cache, (source, &reference), Path::new(destination), &selection).await?;
        }
        Ok(())
    }

    async fn get_one(
        &self,
        session: &Session<'_>,
        cache: &Cache,
        (text, reference): (&str, &Reference),
        folder: &Path,
        selection: &Selection,
    ) -> Result<()> {
        let destination = cache.destination(folder, LinkMode::Auto).await?;
        let options = GetOptions {
            selection: selection.clone(),
            durable: true,
            destination: Some(destination.clone()),
            ..GetOptions::default()
        };
        let (output, progress) = (session.output, Progress::new());
        let artifact = progress::show(output, text, &progress, cache.get_with(reference, &options, &progress)).await?;
        session.report_get(&artifact);
        let filling = Progress::new();
        let into: Materialized =
            progress::show(output, "into", &filling, artifact.materialize(&destination, &filling)).await?;
        output.message(&format!("{}: {}", into.dir.display(), super::into::links_text(&into)));
        if output.is_json() {
            let report = GetAnswer { path: &into.path, into: Some(&into), ..artifact.answer() };
            output.print_json(&crate::output::WithReference { reference: text, report })?;
        }
        Ok(())
    }
}

/// Checks that no destination is empty, occurs twice, or is inside another one: the later download would replace the
/// files of the earlier one.
fn check_destinations<'a>(destinations: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut folders: Vec<PathBuf> = Vec::new();
    for text in destinations {
        let folder = std::path::absolute(text).map_err(|_| Error::invalid("a destination is empty"))?;
        if let Some(other) = folders.iter().find(|other| folder.starts_with(other) || other.starts_with(&folder)) {
            return Err(Error::invalid(format!(
                "the destinations {} and {} are the same folder, or one contains the other",
                other.display(),
                folder.display()
            ))
            .hint("give each source a folder of its own"));
        }
        folders.push(folder);
    }
    Ok(())
}

/// Parses a source as KServe writes it: a reference, or the absolute path of a mounted volume.
fn reference(source: &str) -> Result<Reference> {
    if source.starts_with('/') { Reference::parse(&format!("file://{source}")) } else { Reference::parse(source) }
}

/// Parses `sha256:HEX` or `HEX`.
fn demanded_digest(text: &str) -> Result<Digest> {
    text.strip_prefix("sha256:").unwrap_or(text).parse().map_err(|error: Error| {
        Error::invalid(format!("{VERIFICATION_DIGEST}: {}", error.message())).hint("write sha256: and 64 hex digits")
    })
}

/// Parses a list of patterns: a JSON array, or text with commas.
fn patterns(text: &str) -> Vec<String> {
    let list: Vec<String> = serde_json::from_str(text).unwrap_or_else(|_| text.split(',').map(str::to_owned).collect());
    list.iter().map(|pattern| pattern.trim().to_owned()).filter(|pattern| !pattern.is_empty()).collect()
}

/// Returns true if a variable names the cache directory, or if there is a configuration file, which may do so.
fn is_dir_configured(global: &Global) -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let has_file = || {
        let environment = settings::environment(std::env::vars_os()).unwrap_or_default();
        // A file that cannot be read is reported when the settings are gathered.
        !read_files(ConfigFiles::choose(global.config.as_deref(), &environment)).is_ok_and(|files| files.is_empty())
    };
    is_set(CACHE_DIR) || has_file()
}

/// Adds the variables of this program that follow from those of KServe. Variables that are set already stay.
fn translate(variables: &mut HashMap<String, String>) -> Result<()> {
    // The secret of a data connection, as JSON.
    for name in ["STORAGE_OVERRIDE_CONFIG", "STORAGE_CONFIG"] {
        let Some(config) = variables.get(name).filter(|text| !text.trim().is_empty()) else { continue };
        // The text of the parse error could contain a secret.
        let config: Map<String, Value> = serde_json::from_str(config).map_err(|_| {
            Error::invalid(format!("{name} is not a JSON object"))
                .hint(r#"write {"type": "s3", "access_key_id": "...", ...}, as in the secret of a data connection"#)
        })?;
        let text = |key: &str| match config.get(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Bool(is_set) => Some(is_set.to_string()),
            _ => None,
        };
        if config.get("type").is_some_and(|kind| kind != "s3") {
            continue;
        }
        for (variable, key) in [
            ("AWS_ENDPOINT_URL", "endpoint_url"),
            ("AWS_ACCESS_KEY_ID", "access_key_id"),
            ("AWS_SECRET_ACCESS_KEY", "secret_access_key"),
            ("AWS_DEFAULT_REGION", "region"),
            ("AWS_CA_BUNDLE", "ca_bundle"),
            ("awsAnonymousCredential", "anonymous"),
        ] {
            if let Some(value) = text(key) {
                variables.entry(variable.to_owned()).or_insert(value);
            }
        }
    }
    // The certificates of the cluster, from a ConfigMap.
    if variables.contains_key("CA_BUNDLE_CONFIGMAP_NAME") {
        let folder = variables.get("CA_BUNDLE_VOLUME_MOUNT_POINT").map_or("/etc/ssl/custom-certs", String::as_str);
        let bundle = Path::new(folder).join("cabundle.crt");
        if bundle.exists() {
            variables.entry("AWS_CA_BUNDLE".to_owned()).or_insert(bundle.display().to_string());
        }
    }
    variables.entry("MODEL_CACHE_EXTRACT".to_owned()).or_insert_with(|| "auto".to_owned());
    Ok(())
}

/// Removes the cache directory that only this run used.
fn remove_temporary_cache(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).map_err(|cause| {
        Error::new(modelcache::ErrorKind::Other, format!("cannot remove {}", dir.display())).cause(cause)
    })
}

/// Sets the options of buckets that KServe states by variables.
fn complete_config(config: &mut Config) {
    let is_true = |name: &str| config.buckets.environment.0.get(name).is_some_and(|text| text.to_lowercase() == "true");
    let (anonymous, virtual_hosted) = (is_true("awsAnonymousCredential"), is_true("S3_USER_VIRTUAL_BUCKET"));
    for (option, is_set) in [("skip_signature", anonymous), ("virtual_hosted_style_request", virtual_hosted)] {
        if is_set {
            config.buckets.options.insert(option.to_owned(), "true".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_patterns_have_two_forms() {
        for text in [r#"["*.json", " *.safetensors "]"#, "*.json, *.safetensors,"] {
            assert_eq!(patterns(text), ["*.json", "*.safetensors"]);
        }
    }

    #[test]
    fn the_digest_of_kserve_has_a_prefix() {
        let digest = Digest::of(b"x");
        assert_eq!(demanded_digest(&format!("sha256:{digest}")).ok(), Some(digest));
        assert_eq!(demanded_digest(&digest.to_string()).ok(), Some(digest));
        assert!(demanded_digest("sha256:12").is_err_and(|error| error.message().contains("VERIFICATION_DIGEST")));
    }

    #[test]
    fn the_secret_of_a_data_connection_becomes_the_variables_of_aws() {
        let secret = r#"{"type": "s3", "access_key_id": "id", "secret_access_key": "key", "region": "eu"}"#;
        let variables = [("STORAGE_CONFIG", secret), ("AWS_DEFAULT_REGION", "us")];
        let mut variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().collect();
        translate(&mut variables).expect("valid JSON");
        let value = |name: &str| variables.get(name).map(String::as_str);
        assert_eq!((value("AWS_ACCESS_KEY_ID"), value("AWS_SECRET_ACCESS_KEY")), (Some("id"), Some("key")));
        // What is set already stays.
        assert_eq!(value("AWS_DEFAULT_REGION"), Some("us"));
        assert_eq!(value("MODEL_CACHE_EXTRACT"), Some("auto"));
        variables.insert("STORAGE_CONFIG".to_owned(), "{secret".to_owned());
        let error = translate(&mut variables).expect_err("no JSON").to_string();
        assert!(error.contains("STORAGE_CONFIG is not a JSON object") && !error.contains("{secret"), "{error}");
    }

    #[test]
    fn destinations_are_separate_folders() {
        for (pair, is_right) in [
            (["/m/a", "/m/b"], true),
            (["/m/a", "/m/ab"], true),
            (["/m/a", "/m/a/"], false),
            (["/m/a/b", "/m/a"], false),
        ] {
            assert_eq!(check_destinations(pair.into_iter()).is_ok(), is_right, "{pair:?}");
        }
        assert!(check_destinations(["a", ""].into_iter()).is_err_and(|error| error.message().contains("is empty")));
    }
}
