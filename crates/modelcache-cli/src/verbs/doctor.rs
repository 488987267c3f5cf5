//! `doctor`: looks at everything a cache needs, and says how to mend what is wrong.
//!
//! It runs where other verbs do not even start: without usable settings it tells why, and examines the rest as if the
//! offending file or variable were not there.

use crate::arguments::Global;
use crate::environment::{self, Survey};
use crate::output::{Lines, Output};
use crate::{exit, logs, signals, small_memory};
use clap::{Args, ValueEnum};
use modelcache::config::Environment;
use modelcache::doctor::{self, Area, Check, DoctorOptions, Gravity};
use modelcache::remote::{Policy, Role};
use modelcache::settings::Settings;
use modelcache::{Config, Error, ErrorKind, Result};
use serde_json::json;

/// Look for what is wrong with settings, directory, credentials, remote and origin
///
/// Each problem comes with its fix. Ends with 0 if there is none (warnings allowed), else with the exit code that the
/// first of them will have. To try what may be written, one small object is put below the remote's prefix and removed.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Print the least rights on the configured bucket as an IAM policy, and examine nothing
    #[arg(long, value_enum, value_name = "ROLE")]
    pub(crate) iam_policy: Option<Who>,
    /// Write nothing to the remote, not even for a moment
    #[arg(long)]
    pub(crate) read_only: bool,
}

/// Whose rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Who {
    /// Gets and lists
    Reader,
    /// Puts and evicts, too
    Writer,
}

impl From<Who> for Role {
    fn from(who: Who) -> Self {
        match who {
            Who::Reader => Self::Reader,
            Who::Writer => Self::Writer,
        }
    }
}

impl Doctor {
    /// The whole verb; it gathers its own settings.
    pub(crate) fn run(&self, global: &Global, output: &Output) -> Result<u8> {
        let survey = environment::survey(global);
        if let Some(who) = self.iam_policy {
            return print_policy(&survey.settings?.config, who.into(), output).map(|()| exit::DONE);
        }
        let mut checks = configuration(&survey);
        let settings = survey.settings.or(survey.without_what_is_wrong)?;
        if let Err(error) = logs::start(&settings.log, output) {
            checks.push(Check::problem(Area::Configuration, &error));
        }
        let options = DoctorOptions { read_only: self.read_only };
        let runtime = modelcache::runtime::start(!small_memory::has_one_arena())?;
        match runtime.block_on(signals::or_signal(doctor::examine(&settings.config, &survey.environment, options))) {
            Ok(examined) => {
                runtime.shutdown_background();
                checks.extend(examined);
                tell(&checks, output)
            }
            Err(signal) => {
                output.interrupted(signal);
                runtime.shutdown_timeout(crate::PUT_AWAY);
                Ok(signal.exit_code())
            }
        }
    }
}

/// What there is to say of files, variables and flags.
fn configuration(survey: &Survey) -> Vec<Check> {
    let mut checks = Vec::new();
    let files: Vec<String> = survey.files.iter().map(|path| path.display().to_string()).collect();
    checks.push(match files.is_empty() {
        true => Check::ok(Area::Configuration, "no configuration file; the defaults hold"),
        false => Check::ok(Area::Configuration, format!("read {}", files.join(", then "))),
    });
    let mut names: Vec<&str> = survey.environment.0.keys().map(String::as_str).filter(|name| is_ours(name)).collect();
    names.sort_unstable();
    if !names.is_empty() {
        checks.push(Check::ok(Area::Configuration, format!("set: {}", names.join(", "))));
    }
    match &survey.settings {
        Err(error) => {
            checks.push(Check::problem(Area::Configuration, error));
            checks.push(Check::warning(
                Area::Configuration,
                "what follows was examined as if that were not set",
                "mend it first, then run the doctor again",
            ));
        }
        Ok(settings) => checks.extend(of_settings(settings, &survey.environment)),
    }
    checks
}

fn of_settings(settings: &Settings, environment: &Environment) -> Vec<Check> {
    let odd = settings.warnings.iter();
    let mut checks: Vec<Check> =
        odd.map(|warning| Check::warning(Area::Configuration, warning, "correct the name, or unset it")).collect();
    let homeless = ["HOME", "XDG_CACHE_HOME", "MODEL_CACHE_DIR"].iter().all(|name| environment.get(name).is_none());
    if homeless && settings.config.dir.starts_with(environment.get("TMPDIR").unwrap_or("/tmp")) {
        checks.push(Check::warning(
            Area::Configuration,
            format!(
                "HOME is not set, so the directory is {}, which may be emptied at any time",
                settings.config.dir.display()
            ),
            "set MODEL_CACHE_DIR (or HOME)",
        ));
    }
    checks
}

fn is_ours(name: &str) -> bool {
    name.starts_with("MODEL_CACHE_") || matches!(name, "HF_ENDPOINT" | "HF_TOKEN" | "HF_HOME" | "HF_TOKEN_PATH")
}

fn print_policy(config: &Config, role: Role, output: &Output) -> Result<()> {
    let Some(remote) = &config.remote else {
        return Err(Error::invalid("no remote is configured, so there is no bucket to grant rights on")
            .hint("set MODEL_CACHE_REMOTE=s3://BUCKET/PREFIX, or add --remote s3://BUCKET/PREFIX"));
    };
    let policy = Policy::least(remote, role)?;
    let encode = |cause| Error::new(ErrorKind::Other, "cannot write the policy").cause(cause);
    output.answer_own(&serde_json::to_string_pretty(&policy.document).map_err(encode)?)?;
    policy.notes.iter().for_each(|note| output.remark(note));
    Ok(())
}

/// Shows the checks; the exit code of the first problem.
fn tell(checks: &[Check], output: &Output) -> Result<u8> {
    let count = |gravity| checks.iter().filter(|check| check.gravity == gravity).count();
    let (problems, warnings) = (count(Gravity::Problem), count(Gravity::Warning));
    let first = checks.iter().find_map(|check| check.kind.filter(|_| check.gravity == Gravity::Problem));
    let code = first.map_or(exit::DONE, exit::code);
    if output.is_json() {
        let object = json!({"checks": checks, "problems": problems, "warnings": warnings, "exit": code});
        output.answer_json(&object)?;
    } else {
        output.answer(&text(checks, output.is_quiet()))?;
    }
    output.remark(&format!("{}, {}", counted(problems, "problem"), counted(warnings, "warning")));
    Ok(code)
}

fn counted(number: usize, what: &str) -> String {
    match number {
        0 => format!("no {what}"),
        1 => format!("1 {what}"),
        many => format!("{many} {what}s"),
    }
}

/// The checks by area; with `only_bad`, those that are as they should be are left out.
fn text(checks: &[Check], only_bad: bool) -> Lines {
    let mut text = Lines::default();
    let mut area = None;
    for check in checks.iter().filter(|check| !only_bad || check.gravity != Gravity::Ok) {
        if area != Some(check.area) {
            text.push(&check.area.to_string());
            area = Some(check.area);
        }
        let word = match check.gravity {
            Gravity::Ok => "ok",
            Gravity::Warning => "warning",
            Gravity::Problem => "PROBLEM",
        };
        text.push(&format!("  {word:<8} {}", check.says));
        check.fix.iter().for_each(|fix| text.push(&format!("           fix: {fix}")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_stand_below_their_area_and_problems_have_their_fix() {
        let error = Error::new(ErrorKind::Directory, "cannot be written").hint("chmod it");
        let checks = [
            Check::ok(Area::Configuration, "fine"),
            Check::ok(Area::Directory, "/c"),
            Check::problem(Area::Directory, &error),
        ];
        let all = "configuration\n  ok       fine\ndirectory\n  ok       /c\n  PROBLEM  cannot be written\n           fix: chmod it";
        assert_eq!(text(&checks, false).to_string(), all);
        let bad = "directory\n  PROBLEM  cannot be written\n           fix: chmod it";
        assert_eq!(text(&checks, true).to_string(), bad);
        assert_eq!((counted(0, "problem"), counted(2, "warning")), ("no problem".into(), "2 warnings".into()));
    }
}
