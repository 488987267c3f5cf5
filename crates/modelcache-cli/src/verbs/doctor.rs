//! `doctor`: checks everything that a cache needs, and prints a fix for each problem.
//!
//! It runs even if the settings are invalid: it reports the reason, and examines the rest without the invalid file or
//! variable.

use crate::arguments::Global;
use crate::environment::{self, DoctorSettings};
use crate::output::{Lines, Output};
use crate::{exit, human, logs, signals, small_memory};
use clap::{Args, ValueEnum};
use modelcache::config::Environment;
use modelcache::doctor::{self, Area, Check, DoctorOptions, Severity};
use modelcache::remote::{Policy, Role};
use modelcache::settings::Settings;
use modelcache::{Config, Error, ErrorKind, Result};
use modelcache_server::DoctorRun;
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;

/// Find problems with settings, directory, credentials, remote, and origins
///
/// Prints a fix for each problem. Exits with 0 if there are no problems (warnings are allowed), otherwise with the exit
/// code of the first problem. To test write access, it writes one small object below the remote's prefix and removes
/// it.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Only print an IAM policy with the minimal permissions on the configured bucket
    #[arg(long, value_enum, value_name = "ROLE")]
    pub(crate) iam_policy: Option<RoleArgument>,
    /// Write nothing to the remote, not even a temporary object
    #[arg(long)]
    pub(crate) read_only: bool,
}

/// The roles that `--iam-policy` accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArgument {
    /// May get and list artifacts
    Reader,
    /// May also put and evict artifacts
    Writer,
}

impl From<RoleArgument> for Role {
    fn from(role: RoleArgument) -> Self {
        match role {
            RoleArgument::Reader => Self::Reader,
            RoleArgument::Writer => Self::Writer,
        }
    }
}

impl Doctor {
    /// Runs the whole command. The doctor gathers its own settings.
    pub(crate) fn run(&self, global: &Global, output: &Output) -> Result<u8> {
        let gathered = environment::gather_for_doctor(global);
        if let Some(role) = self.iam_policy {
            return print_policy(&gathered.settings?.config, role.into(), output).map(|()| exit::DONE);
        }
        let mut checks = configuration_checks(&gathered);
        let settings = gathered.settings.or(gathered.valid_settings)?;
        if let Err(error) = logs::start(&settings.log, output) {
            checks.push(Check::problem(Area::Configuration, &error));
        }
        let options = DoctorOptions { read_only: self.read_only };
        let runtime = modelcache::runtime::start(!small_memory::arenas_are_limited())?;
        match runtime.block_on(signals::run_until_signal(doctor::examine(
            &settings.config,
            &gathered.environment,
            options,
        ))) {
            Ok(examined) => {
                runtime.shutdown_background();
                checks.extend(examined);
                print_report(&Report::new(checks), output)
            }
            Err(signal) => {
                output.report_signal(signal);
                runtime.shutdown_timeout(crate::SHUTDOWN_WAIT);
                Ok(signal.exit_code())
            }
        }
    }
}

/// Checks configuration files, variables and flags.
fn configuration_checks(gathered: &DoctorSettings) -> Vec<Check> {
    let mut checks = Vec::new();
    let files: Vec<String> = gathered.files.iter().map(|path| path.display().to_string()).collect();
    checks.push(match files.is_empty() {
        true => Check::ok(Area::Configuration, "no configuration file; using the defaults"),
        false => Check::ok(Area::Configuration, format!("read {}", files.join(", then "))),
    });
    let mut names: Vec<&str> =
        gathered.environment.0.keys().map(String::as_str).filter(|name| is_listed_variable(name)).collect();
    names.sort_unstable();
    if !names.is_empty() {
        checks.push(Check::ok(Area::Configuration, format!("variables that are set: {}", names.join(", "))));
    }
    match &gathered.settings {
        Err(error) => {
            checks.push(Check::problem(Area::Configuration, error));
            checks.push(Check::warning(
                Area::Configuration,
                "the other checks ran without this setting",
                "fix the setting, then run `modelcache doctor` again",
            ));
        }
        Ok(settings) => checks.extend(settings_checks(settings, &gathered.environment)),
    }
    checks
}

/// Checks the settings: misspelt names, and a cache directory that may be emptied.
fn settings_checks(settings: &Settings, environment: &Environment) -> Vec<Check> {
    let warnings = settings.warnings.iter();
    let mut checks: Vec<Check> =
        warnings.map(|warning| Check::warning(Area::Configuration, warning, "correct the name, or unset it")).collect();
    let has_no_home = ["HOME", "XDG_CACHE_HOME", "MODEL_CACHE_DIR"].iter().all(|name| environment.get(name).is_none());
    if has_no_home && settings.config.dir.starts_with(environment.get("TMPDIR").unwrap_or("/tmp")) {
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

/// Returns true if the doctor lists the variable `name`.
fn is_listed_variable(name: &str) -> bool {
    name.starts_with("MODEL_CACHE_") || matches!(name, "HF_ENDPOINT" | "HF_TOKEN" | "HF_HOME" | "HF_TOKEN_PATH")
}

/// Prints the IAM policy for `role` on the configured bucket.
fn print_policy(config: &Config, role: Role, output: &Output) -> Result<()> {
    let Some(remote) = &config.remote else {
        return Err(Error::invalid("no remote is configured, so there is no bucket to grant rights on")
            .hint("set MODEL_CACHE_REMOTE=s3://BUCKET/PREFIX, or add --remote s3://BUCKET/PREFIX"));
    };
    let policy = Policy::minimal(remote, role)?;
    let encode = |cause| Error::new(ErrorKind::Other, "cannot write the policy").cause(cause);
    output.print_unescaped(&serde_json::to_string_pretty(&policy.document).map_err(encode)?)?;
    policy.notes.iter().for_each(|note| output.message(note));
    Ok(())
}

/// All checks, with their result.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The checks, sorted by area.
    pub(crate) checks: Vec<Check>,
    /// Number of problems.
    pub(crate) problems: usize,
    /// Number of warnings.
    pub(crate) warnings: usize,
    /// The exit code of the command.
    pub(crate) exit: u8,
}

impl Report {
    pub(crate) fn new(checks: Vec<Check>) -> Self {
        let count = |severity| checks.iter().filter(|check| check.severity == severity).count();
        let (problems, warnings) = (count(Severity::Problem), count(Severity::Warning));
        let first_problem = checks.iter().find_map(|check| check.kind.filter(|_| check.severity == Severity::Problem));
        Self { problems, warnings, exit: first_problem.map_or(exit::DONE, exit::code), checks }
    }
}

/// Prints the checks. Returns the exit code of the first problem.
fn print_report(report: &Report, output: &Output) -> Result<u8> {
    if output.is_json() {
        output.print_json(report)?;
    } else {
        output.print(&text(&report.checks, output.is_quiet()))?;
    }
    output.message(&format!("{}, {}", counted(report.problems, "problem"), counted(report.warnings, "warning")));
    Ok(report.exit)
}

/// Returns the doctor of a daemon with the configuration `config`. It writes nothing to the remote.
pub(crate) fn for_daemon(global: &Global, config: &Config) -> DoctorRun {
    let gathered = environment::gather_for_doctor(global);
    let known = Arc::new((configuration_checks(&gathered), config.clone(), gathered.environment));
    DoctorRun::new(move || {
        let known = known.clone();
        async move {
            let (checks, config, environment) = &*known;
            let examined = doctor::examine(config, environment, DoctorOptions { read_only: true }).await;
            json!(Report::new([checks.clone(), examined].concat()))
        }
    })
}

/// Formats a count with its noun: `no problems`, `1 problem`, `2 problems`.
fn counted(number: usize, noun: &str) -> String {
    if number == 0 { format!("no {noun}s") } else { human::counted(number, noun) }
}

/// Formats the checks by area. With `only_bad`, leaves out the checks that passed.
fn text(checks: &[Check], only_bad: bool) -> Lines {
    let mut text = Lines::default();
    let mut area = None;
    for check in checks.iter().filter(|check| !only_bad || check.severity != Severity::Ok) {
        if area != Some(check.area) {
            text.push(&check.area.to_string());
            area = Some(check.area);
        }
        let word = match check.severity {
            Severity::Ok => "ok",
            Severity::Warning => "warning",
            Severity::Problem => "PROBLEM",
        };
        text.push(&format!("  {word:<8} {}", check.message));
        check.fix.iter().for_each(|fix| text.push(&format!("           fix: {fix}")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_grouped_by_area_and_problems_have_a_fix() {
        let error = Error::new(ErrorKind::Directory, "cannot be written").hint("chmod it");
        let checks = [
            Check::ok(Area::Configuration, "fine"),
            Check::ok(Area::Directory, "/c"),
            Check::problem(Area::Directory, &error),
        ];
        let all = "configuration\n  ok       fine\n\
                   directory\n  ok       /c\n  PROBLEM  cannot be written\n           fix: chmod it";
        assert_eq!(text(&checks, false).to_string(), all);
        let bad = "directory\n  PROBLEM  cannot be written\n           fix: chmod it";
        assert_eq!(text(&checks, true).to_string(), bad);
        assert_eq!((counted(0, "problem"), counted(2, "warning")), ("no problems".into(), "2 warnings".into()));
    }
}
