//! `exec`: makes artifacts local, then replaces this process with a command that keeps their leases.
//!
//! The command is not a child: it has this process's id, receives the signals and determines the exit code. The kernel
//! releases the leases when the command ends, however it ends. `exec` prints nothing to standard output.

use super::get_arguments::GetArguments;
use super::{Session, reference_forms};
use crate::{exit, progress, small_memory};
use clap::Args;
use modelcache::cache::Artifact;
use modelcache::config::{Backfill, Config};
use modelcache::progress::Progress;
use modelcache::{Cache, Error, ErrorKind, Reference, Result};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use tracing::Instrument as _;

/// Download artifacts, then run a command that uses them
///
/// In the command, `{}` and `{1}` stand for the path of the first artifact, `{2}` for the path of the second, and so
/// on. For literal braces, double them: `{{}}`. The command finds the paths also in the environment variables
/// MODEL_CACHE_PATH (the first), MODEL_CACHE_PATH_1, MODEL_CACHE_PATH_2, and so on. The artifacts are not evicted while
/// the command runs. If one reference fails, the command is not run.
///
/// For artifacts of the Hugging Face Hub, HF_HUB_CACHE, HF_HUB_OFFLINE=1 and VLLM_MODEL_REDIRECT_PATH are set, so that
/// the command can name the model as on the Hub.
///
/// Example: modelcache exec hf://org/model -- vllm serve org/model
#[derive(Debug, Args)]
pub(crate) struct Exec {
    #[arg(required = true, value_name = "REF", help = reference_forms())]
    pub(crate) references: Vec<String>,
    #[command(flatten)]
    pub(crate) arguments: GetArguments,
    /// Do not set HF_HUB_CACHE, HF_HUB_OFFLINE and VLLM_MODEL_REDIRECT_PATH
    #[arg(long)]
    pub(crate) no_env: bool,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

impl Exec {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        self.reject_unknown_placeholders()?;
        let Some(references) = self.arguments.references(session, &self.references) else { return Ok(exit::USAGE) };
        let cache = open_cache(session.config_without_background_sync())?;
        let span = crate::command_span("exec");
        let getting = self.get_all(session, &cache, &references).instrument(span.clone());
        let artifacts = self.arguments.with_timeout(getting).await;
        crate::end_span(&span, exit::code_of(&artifacts));
        let mut artifacts = artifacts?;
        let hub_variables = match self.no_env {
            true => Vec::new(),
            false => hub_variables(&cache, &references, &mut artifacts).await,
        };
        let paths: Vec<PathBuf> = artifacts.iter().map(|artifact| artifact.path.clone()).collect();
        let words: Vec<OsString> = self.command.iter().map(|word| substitute_paths(word, &paths)).collect();
        let [program, arguments @ ..] = &words[..] else {
            return Err(Error::invalid("there is no command").hint("write it after --"));
        };
        let numbered = (1..).zip(&paths).map(|(number, path)| (format!("MODEL_CACHE_PATH_{number}"), path));
        let mut command = Command::new(program);
        command.args(arguments).envs(hub_variables).envs(numbered).env("MODEL_CACHE_PATH", &paths[0]);
        small_memory::remove_from(&mut command);
        artifacts.iter().try_for_each(Artifact::hold_through_exec)?;
        // `exec` ends this program, so clean up and write the metrics before it.
        modelcache::transfer::wait_for_cleanup(crate::CLEANUP_WAIT).await;
        session.write_metrics("exec", exit::DONE).await;
        crate::traces::finish();
        // Returns only if it failed.
        let (code, error) = not_run(program, command.exec());
        session.report_failure(&error, None);
        Ok(code)
    }

    /// Gets every reference. Stops at the first failure.
    async fn get_all(&self, session: &Session<'_>, cache: &Cache, references: &[Reference]) -> Result<Vec<Artifact>> {
        let (output, options) = (session.output, self.arguments.options()?);
        let mut artifacts = Vec::new();
        for (text, reference) in self.references.iter().zip(references) {
            let progress = Progress::new();
            let artifact =
                progress::show(output, text, &progress, cache.get_with(reference, &options, &progress)).await?;
            session.report_get(&artifact);
            artifacts.push(artifact);
        }
        Ok(artifacts)
    }

    /// Rejects a word that is a placeholder whose number has no reference, such as `{3}` with two references. Does not
    /// check placeholders inside longer words.
    fn reject_unknown_placeholders(&self) -> Result<()> {
        let number = |word: &OsString| {
            word.to_str()?
                .strip_prefix('{')?
                .strip_suffix('}')?
                .parse()
                .ok()
                .map(|number: usize| (number, word.clone()))
                // Only this form is a placeholder; `usize` also parses `+3` and `03`.
                .filter(|(number, word)| word == format!("{{{number}}}").as_str())
        };
        let references = self.references.len();
        match self.command.iter().filter_map(number).find(|(number, _)| !(1..=references).contains(number)) {
            Some((_, word)) => Err(Error::invalid(format!("{} matches no reference", word.display()))
                .hint(format!("use {{1}} to {{{references}}}; double the braces to pass them unchanged"))),
            None => Ok(()),
        }
    }
}

/// Opens the cache. Background uploads are left to a later run, because `exec` ends this program.
fn open_cache(mut config: Config) -> Result<Cache> {
    config.backfill = config.backfill.map(|mode| if mode == Backfill::Background { Backfill::Later } else { mode });
    Cache::open(config)
}

/// Makes the artifacts of the Hub available under their names. Returns the variables by which programs find them.
///
/// A failure is only a warning: the command may use the paths.
async fn hub_variables(
    cache: &Cache,
    references: &[Reference],
    artifacts: &mut [Artifact],
) -> Vec<(&'static str, PathBuf)> {
    for (reference, artifact) in references.iter().zip(artifacts.iter_mut()) {
        if let Err(error) = cache.link_hub_layout(reference, artifact).await {
            let message = "HF_HUB_CACHE is not set, because the model cannot be linked as a Hugging Face cache; the command finds it only by its path";
            tracing::warn!(artifact = %artifact.key, %error, hint = error.hint_text(), "{message}");
            return Vec::new();
        }
    }
    let mut cache_dirs: Vec<_> =
        artifacts.iter().filter_map(|artifact| artifact.hub.as_ref()).map(|hub| hub.cache_dir.clone()).collect();
    cache_dirs.dedup();
    match &cache_dirs[..] {
        [] => return Vec::new(),
        [_] => {}
        // Programs read one Hugging Face cache only.
        _ => {
            tracing::warn!(
                "HF_HUB_CACHE is not set: some models are in the lower directory and others are not, and a program reads one Hugging Face cache only"
            );
            return Vec::new();
        }
    }
    let mut variables = vec![("HF_HUB_CACHE", cache_dirs.remove(0)), ("HF_HUB_OFFLINE", "1".into())];
    match cache.write_model_map(artifacts).await {
        Ok(map) => variables.extend(map.map(|map| ("VLLM_MODEL_REDIRECT_PATH", map))),
        Err(error) => tracing::warn!(%error, "VLLM_MODEL_REDIRECT_PATH is not set; vLLM uses HF_HUB_CACHE"),
    }
    variables
}

/// Returns the exit code of a shell for a command that cannot be run, and the error.
fn not_run(program: &OsStr, cause: io::Error) -> (u8, Error) {
    let program = program.display();
    let (code, message, hint) = match cause.kind() {
        io::ErrorKind::NotFound => {
            (exit::NO_COMMAND, format!("command not found: {program}"), "check its name and PATH")
        }
        _ => (
            exit::NOT_RUN,
            format!("cannot run {program}"),
            "check that it is an executable file that this user may run",
        ),
    };
    (code, Error::new(ErrorKind::Other, message).hint(hint).cause(cause))
}

/// Replaces `{}` and `{N}` in a word of the command with paths. `{{}}` and `{{N}}` lose one pair of braces. Everything
/// else stays unchanged, including numbers without a path.
fn substitute_paths(word: &OsStr, paths: &[PathBuf]) -> OsString {
    let (mut rest, mut filled) = (word.as_bytes(), Vec::new());
    while let [first, tail @ ..] = rest {
        if let Some((literal, after)) = tail.strip_prefix(b"{").and_then(split_placeholder).filter(|_| *first == b'{')
            && let Some(after) = after.strip_prefix(b"}")
        {
            // `{{…}}`: keep the inner pair.
            filled.extend_from_slice(&rest[1..literal_end(literal)]);
            rest = after;
        } else if let Some((digits, after)) = split_placeholder(tail).filter(|_| *first == b'{')
            && let Some(path) = path_for(digits, paths)
        {
            filled.extend_from_slice(path.as_os_str().as_bytes());
            rest = after;
        } else {
            filled.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(filled)
}

/// Splits the text after an opening brace into its digits, possibly none, and the rest after the closing brace. Returns
/// `None` if the brace does not enclose digits.
fn split_placeholder(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = text.iter().position(|byte| !byte.is_ascii_digit())?;
    (text[end] == b'}').then(|| (&text[..end], &text[end + 1..]))
}

/// Returns the offset after the inner closing brace of `{{digits}}`.
fn literal_end(digits: &[u8]) -> usize {
    // `{{`, the digits, and `}`.
    digits.len() + 3
}

/// Returns the path for the digits between braces. Without digits, this is the first path.
fn path_for<'a>(digits: &[u8], paths: &'a [PathBuf]) -> Option<&'a PathBuf> {
    match std::str::from_utf8(digits).ok()? {
        "" => paths.first(),
        digits => paths.get(digits.parse::<usize>().ok()?.checked_sub(1)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_become_paths_and_other_braces_stay() {
        let paths = ["/a b".into(), "/c".into()];
        for (word, becomes) in [
            ("{}", "/a b"),
            ("--model={1}/x", "--model=/a b/x"),
            ("{2}:{}", "/c:/a b"),
            ("{{}}", "{}"),
            ("{{2}}x", "{2}x"),
            ("{0}{3}{a}{", "{0}{3}{a}{"),
            ("{\"a\": {\"b\": 1}}", "{\"a\": {\"b\": 1}}"),
            ("${{ x }}", "${{ x }}"),
            ("a{1,3}", "a{1,3}"),
            ("", ""),
        ] {
            assert_eq!(substitute_paths(OsStr::new(word), &paths), OsStr::new(becomes), "{word}");
        }
    }

    #[test]
    fn a_placeholder_without_reference_is_rejected() {
        let exec = |command: &[&str]| Exec {
            references: vec!["a@1".into(), "b@1".into()],
            arguments: GetArguments::default(),
            no_env: false,
            command: command.iter().map(OsString::from).collect(),
        };
        assert!(exec(&["x", "{}", "{2}", "{{3}}", "{x}"]).reject_unknown_placeholders().is_ok());
        for word in ["{0}", "{3}"] {
            let error = exec(&["x", word]).reject_unknown_placeholders().expect_err("no such reference");
            assert!(error.message().starts_with(word), "{error}");
        }
    }
}
