//! Command line arguments.
//!
//! Flags for settings are generated from the library's table of settings, so that each setting is defined once. They
//! are global: they may come before or after the command. `ls --remote` has the name of a global flag, but its URL is
//! optional.

use crate::exit;
use crate::verbs::Verb;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, Parser, Subcommand as _};
use modelcache::option_name::OptionName;
use modelcache::settings::{SETTINGS, SWITCH, Setting};
use modelcache::{printable, redact};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

/// A tiered, verifying cache for model artifacts: local disk, an object store, and origins such as Hugging Face
#[derive(Debug, Parser)]
#[command(name = "modelcache", version, arg_required_else_help = true)]
#[command(after_long_help = exit::help(), disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// Options of every command.
    #[command(flatten)]
    pub(crate) global: Global,
    /// The command.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Parses a command line, which begins with the program's name.
///
/// Each command accepts every setting as an option, so the definition of all commands has hundreds of options. Building
/// it takes longer than a hit. The first attempt therefore defines only the commands whose names are among the arguments.
/// If it fails, the complete definition provides the error, the help or the version.
pub(crate) fn parse(args: &[OsString]) -> Result<Arguments, clap::Error> {
    let verbs = Verb::augment_subcommands(Command::new("modelcache"));
    let named = verbs.get_subcommands().filter(|verb| args.iter().any(|arg| arg == verb.get_name()));
    let command = Command::new("modelcache").disable_help_subcommand(true).subcommands(named.cloned());
    let matches = Global::augment_args(command).try_get_matches_from(args);
    matches.and_then(|matches| Arguments::from_arg_matches(&matches)).or_else(|_| Arguments::try_parse_from(args))
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Print JSON: one object per line
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print neither progress nor summary, only errors
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Read only this configuration file [env: MODEL_CACHE_CONFIG]. Settings are options, too:
    /// `modelcache help settings`
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) config: Option<PathBuf>,
    /// Settings passed as flags.
    #[command(flatten)]
    pub(crate) settings: SettingFlags,
}

/// The settings passed as flags, keyed by flag name.
#[derive(Debug, Default)]
pub(crate) struct SettingFlags(pub(crate) BTreeMap<&'static str, String>);

impl Args for SettingFlags {
    fn augment_args(command: Command) -> Command {
        SETTINGS.iter().filter_map(|setting| Some((setting, setting.flag?))).fold(
            command,
            |command, (setting, flag)| {
                let variable = setting.variable.map_or_else(String::new, |variable| format!(" [env: {variable}]"));
                let default = setting.default.replace('`', "");
                let help = format!("{}{variable} [default: {default}]", setting.description.replace('`', ""));
                let arg = Arg::new(flag)
                    .long(flag)
                    .value_name(setting.value_name)
                    .help(help)
                    .action(ArgAction::Set)
                    .global(true)
                    // `help settings` lists them once.
                    .hide_short_help(true)
                    .hide_long_help(true)
                    .help_heading("Settings");
                command.arg(match setting.value_name {
                    // A value needs `=`, otherwise `--durable REF` would take the reference as its value.
                    SWITCH => arg.num_args(0..=1).require_equals(true).default_missing_value("1"),
                    _ => arg,
                })
            },
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for flag in SETTINGS.iter().filter_map(|setting| setting.flag) {
            if let Some(value) = matches.get_one::<String>(flag) {
                self.0.insert(flag, value.clone());
            }
        }
        Ok(())
    }
}

/// Writes an option of a message: a setting as its variable, an option of a call as its flag.
pub(crate) fn write_option(option: OptionName) -> String {
    let variable = Setting::named(option).and_then(|setting| setting.variable);
    let (name, before_value) = match variable {
        Some(variable) => (variable.to_owned(), '='),
        None => (format!("--{}", option.name.replace('_', "-")), ' '),
    };
    option.value.map_or_else(|| name.clone(), |value| format!("{name}{before_value}{value}"))
}

/// Commands of other tools, and what to use instead.
const FOREIGN_VERBS: &[(&[&str], &str)] = &[
    (&["download", "pull", "fetch", "wget", "snapshot"], "modelcache get REF"),
    (&["upload", "push", "publish", "add", "save"], "modelcache put NAME@VERSION PATH"),
    (
        &["cp", "copy"],
        "modelcache get REF --into DIR copies an artifact to a folder, modelcache put NAME@VERSION PATH publishes a \
         file or folder",
    ),
    (
        &["sync", "mirror"],
        "modelcache get REF --into DIR copies an artifact to a folder, modelcache put NAME@VERSION DIR publishes a \
         folder",
    ),
    (
        &["mv", "move", "rename"],
        "an artifact cannot be renamed: modelcache put publishes it with the new name, modelcache evict removes the \
         old one",
    ),
    (&["rm", "rmi", "delete", "remove", "del"], "modelcache evict REF; --tier disk removes it from this machine only"),
    (&["list", "dir", "images", "ll"], "modelcache ls, modelcache ls --remote"),
    (&["info", "show", "describe", "cat", "head"], "modelcache inspect REF"),
    (&["du", "df", "status"], "modelcache stats"),
    (&["top", "watch", "monitor"], "modelcache stats --watch"),
    (&["clean", "gc", "purge", "clear"], "modelcache prune"),
    (&["check", "validate", "fsck"], "modelcache verify, modelcache doctor"),
    (&["run"], "modelcache exec REF -- CMD"),
    (&["login", "auth", "configure"], "HF_TOKEN and AWS_* are used as they are; modelcache doctor checks them"),
];

/// Options of other tools, and what to use instead.
const FOREIGN_OPTIONS: &[(&[&str], &str)] = &[
    (&["--token"], "set HF_TOKEN, which `ps` does not show"),
    (&["--cache-dir"], "--dir DIR, or MODEL_CACHE_DIR"),
    (&["--repo-type"], "write the type in the reference: hf://datasets/org/name, hf://spaces/org/name"),
    (
        &["--max-workers", "--concurrency", "--numworkers"],
        "the number of connections adapts; `prewarm --jobs` gets several artifacts at the same time",
    ),
    (
        &["--force-download"],
        "--refresh asks the server again, --verify reads the files on disk and replaces damaged ones",
    ),
    (&["--resume-download"], "omit it: downloads always resume"),
    (&["--local-dir-use-symlinks"], "--link symlink, hard, reflink or copy"),
    (&["--endpoint-url"], "set AWS_ENDPOINT_URL or HF_ENDPOINT"),
    (&["--profile", "--region"], "set AWS_PROFILE or AWS_REGION"),
    (&["--recursive"], "omit it: a folder always includes its subfolders"),
    (&["--dryrun"], "--dry-run"),
    (&["--interval", "--delay"], "modelcache stats --watch=INTERVAL"),
    (&["--output-dir", "--output", "--destination"], "--into DIR"),
    (&["--allow-patterns"], "--include GLOB"),
    (&["--ignore-patterns"], "--exclude GLOB"),
];

/// Returns what to use instead of a command or option of another tool.
fn replacement(error: &clap::Error) -> Option<&'static str> {
    let (kind, table) = match error.kind() {
        ErrorKind::InvalidSubcommand => (ContextKind::InvalidSubcommand, FOREIGN_VERBS),
        ErrorKind::UnknownArgument => (ContextKind::InvalidArg, FOREIGN_OPTIONS),
        _ => return None,
    };
    let Some(ContextValue::String(word)) = error.get(kind) else { return None };
    let word = word.split('=').next().unwrap_or(word);
    table.iter().find(|(words, _)| words.contains(&word)).map(|(_, instead)| *instead)
}

/// Prints what clap returns instead of arguments: help, version or a usage error. Returns the exit code.
pub(crate) fn print_parse_error(error: clap::Error, args: &[OsString]) -> u8 {
    let mut error = without_secrets(error);
    let instead = replacement(&error);
    if let Some(instead) = instead {
        // Replace the suggestions of clap, which are commands and options with a similar spelling.
        error.remove(ContextKind::SuggestedSubcommand);
        error.remove(ContextKind::SuggestedArg);
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![instead.into()]));
    }
    // Ignored: the stream may be closed, and the exit code already reports the failure.
    let _ = error.print();
    if error.use_stderr() && args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json") {
        let rendered = error.render().to_string();
        let first_paragraph =
            rendered.lines().take_while(|line| !line.is_empty()).map(str::trim).collect::<Vec<_>>().join(" ");
        let message = first_paragraph.trim_start_matches("error: ");
        let object = serde_json::json!({"error": {
            "code": modelcache::ErrorKind::Invalid.name(), "message": message,
            "hint": instead, "artifact": null, "tier": null,
        }});
        let _ = writeln!(std::io::stdout(), "{}", printable::json(&object.to_string()));
    }
    u8::try_from(error.exit_code()).unwrap_or(exit::USAGE)
}

/// Returns the error with each quoted argument redacted and made printable.
fn without_secrets(mut error: clap::Error) -> clap::Error {
    let shown = |text: &String| printable::line(&redact::reference(text)).into_owned();
    let context: Vec<(ContextKind, ContextValue)> = error
        .context()
        .filter_map(|(kind, value)| match value {
            ContextValue::String(text) => Some((kind, ContextValue::String(shown(text)))),
            ContextValue::Strings(texts) => Some((kind, ContextValue::Strings(texts.iter().map(shown).collect()))),
            // Suggestions quote the argument.
            ContextValue::StyledStrs(texts) => {
                let plain = texts.iter().map(|text| shown(&text.to_string()).into());
                Some((kind, ContextValue::StyledStrs(plain.collect())))
            }
            _ => None,
        })
        .collect();
    for (kind, value) in context {
        error.insert(kind, value);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn try_parse(args: &[&str]) -> Result<Arguments, clap::Error> {
        super::parse(&["modelcache"].iter().chain(args).map(OsString::from).collect::<Vec<_>>())
    }

    fn parse(args: &[&str]) -> Arguments {
        try_parse(args).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn errors_help_and_version_come_from_the_definition_of_all_commands() {
        for args in [&["get"][..], &["get", "--help"], &["gte", "ls"], &["--version"], &["ls", "--no-such"], &[]] {
            let complete = Arguments::try_parse_from(["modelcache"].iter().chain(args)).expect_err("no arguments");
            assert_eq!(try_parse(args).expect_err("no arguments").to_string(), complete.to_string(), "{args:?}");
        }
        let exec = parse(&["--json", "exec", "a@1", "--", "get", "--no-such"]);
        assert!(exec.global.json && matches!(exec.verb, Verb::Exec(_)));
    }

    #[test]
    fn the_command_line_has_no_conflicting_definitions() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn options_in_messages_are_written_as_variables_and_flags() {
        use modelcache::option_name::{call, setting};
        assert_eq!(write_option(setting::REMOTE_MODE.set_to("ro")), "MODEL_CACHE_REMOTE_MODE=ro");
        assert_eq!(write_option(call::TIER.set_to("disk")), "--tier disk");
        let mut command = Arguments::command();
        command.build();
        for option in call::ALL {
            let flag = write_option(*option);
            let mut arguments = command.get_subcommands().flat_map(Command::get_arguments);
            let found = arguments.find(|argument| argument.get_long() == flag.strip_prefix("--"));
            assert!(found.is_some(), "{flag}");
        }
    }

    #[test]
    fn flags_of_settings_may_come_before_or_after_the_command() {
        for args in [["--dir", "/d", "get", "a@1"], ["get", "a@1", "--dir", "/d"], ["get", "--dir", "/d", "a@1"]] {
            assert_eq!(parse(&args).global.settings.0.get("dir").map(String::as_str), Some("/d"), "{args:?}");
        }
    }

    #[test]
    fn a_switch_without_a_value_is_on_and_does_not_take_the_reference() {
        let require_checksum = |args: &[&str]| {
            let arguments = parse(args);
            let Verb::Get(get) = &arguments.verb else { panic!("{args:?}") };
            assert_eq!(get.references, ["a@1"], "{args:?}");
            arguments.global.settings.0.get("require-checksum").cloned()
        };
        assert_eq!(require_checksum(&["get", "--require-checksum", "a@1"]).as_deref(), Some("1"));
        assert_eq!(require_checksum(&["--require-checksum=0", "get", "a@1"]).as_deref(), Some("0"));
        assert_eq!(require_checksum(&["get", "a@1"]), None);
    }

    #[test]
    fn ls_takes_remote_with_or_without_an_address() {
        let remote = |args: &[&str]| {
            let arguments = parse(args);
            let Verb::Ls(ls) = &arguments.verb else { panic!("{args:?}") };
            (ls.of_remote(), arguments.global.settings.0.get("remote").cloned().unwrap_or_default())
        };
        assert_eq!(remote(&["ls"]), (false, String::new()));
        assert_eq!(remote(&["ls", "--remote"]), (true, String::new()));
        assert_eq!(remote(&["ls", "--remote", "--json"]), (true, String::new()));
        assert_eq!(remote(&["ls", "--remote", "s3://b"]), (true, "s3://b".into()));
        assert_eq!(remote(&["ls", "--remote=s3://b"]), (true, "s3://b".into()));
        assert_eq!(remote(&["--remote", "s3://b", "ls"]), (true, "s3://b".into()));
    }

    #[test]
    fn a_quoted_argument_is_printable_and_has_no_secret() {
        for args in [
            &["inspect", "a@1", "http://u:canary@h/\x1b[2J\nerror: false"][..],
            &["http://u:canary@h/x"],
            &["get", "--\u{202e}http://u:canary@h"],
            &["pin", "a@1", "--for", "http://u:canary@h/x"],
            &["evict", "a@1", "--tier", "https://h/x?sig=canary"],
        ] {
            let error = Arguments::try_parse_from(["modelcache"].iter().chain(args)).expect_err("refused");
            let text = without_secrets(error).render().to_string();
            assert!(!text.contains(['\x1b', '\u{202e}']) && !text.contains("canary"), "{text}");
            assert!(!text.contains("\nerror: false"), "{text}");
        }
    }

    #[test]
    fn a_command_or_option_of_another_tool_has_a_replacement_that_is_accepted() {
        let instead = |args: &[&str]| {
            let parsed = Arguments::try_parse_from(["modelcache"].iter().chain(args));
            replacement(&parsed.expect_err("refused"))
        };
        for (words, _) in FOREIGN_OPTIONS {
            words.iter().for_each(|word| assert!(instead(&["get", word, "x"]).is_some(), "{word}"));
        }
        assert_eq!(instead(&["get", "--token=canary", "x"]), instead(&["get", "--token", "x"]));
        for (words, text) in FOREIGN_VERBS {
            words.iter().for_each(|word| assert!(instead(&[word]).is_some(), "{word}"));
            for verb in text.split("modelcache ").skip(1).filter_map(|rest| rest.split([' ', ',', ';', ':']).next()) {
                assert!(Arguments::command().find_subcommand(verb).is_some(), "{verb}");
            }
        }
        assert_eq!(instead(&["frobnicate"]), None);
    }

    #[test]
    fn settings_are_in_their_own_help_only() {
        let help = |verb: &str| {
            let mut command = Arguments::command();
            command.build();
            command.find_subcommand_mut(verb).expect("verb").render_long_help().to_string()
        };
        for verb in ["get", "pin", "evict"] {
            let text = help(verb);
            assert!(!text.contains("--retry-deadline") && text.contains("modelcache help settings"), "{text}");
        }
    }

    #[test]
    fn include_may_be_repeated_and_does_not_take_the_reference() {
        let arguments = parse(&["get", "--include", "*.json", "--include", "*.txt", "a@1", "b@2"]);
        let Verb::Get(get) = &arguments.verb else { panic!("get") };
        assert_eq!(get.references, ["a@1", "b@2"]);
        assert_eq!(get.arguments.include, ["*.json", "*.txt"]);
    }
}
