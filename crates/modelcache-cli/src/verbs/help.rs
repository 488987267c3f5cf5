//! `help`: prints the help of the program or of a command, and the settings that every command accepts as options.

use crate::arguments::Arguments;
use crate::output::Output;
use clap::{Args, CommandFactory};
use modelcache::{Error, Result};

/// The topic that lists the settings.
const SETTINGS: &str = "settings";

/// Print the help of a command, or the list of all settings
#[derive(Debug, Args)]
pub(crate) struct Help {
    /// A command, or `settings`
    #[arg(value_name = "TOPIC")]
    pub(crate) topic: Option<String>,
}

impl Help {
    pub(crate) fn run(&self, output: &Output) -> Result<()> {
        let mut command = Arguments::command();
        command.build();
        let text = match self.topic.as_deref() {
            None => command.render_long_help(),
            Some(SETTINGS) => settings_command().render_long_help(),
            Some(verb) => match command.find_subcommand_mut(verb) {
                Some(verb) => verb.render_long_help(),
                None => {
                    return Err(Error::invalid(format!("there is no command {verb:?}"))
                        .hint("`modelcache help` lists the commands; `modelcache help settings` lists the settings"));
                }
            },
        };
        output.print_unescaped(&text.to_string())
    }
}

/// Returns a command whose help lists the settings and nothing else.
pub(crate) fn settings_command() -> clap::Command {
    Arguments::command()
        .about("Settings, as options of every command")
        .long_about(
            "Each setting can be an option of any command, a variable, or an entry of the configuration file. An \
             option overrides a variable, and a variable overrides the file.",
        )
        .after_long_help("")
        .disable_help_flag(true)
        .disable_version_flag(true)
        .help_template("{about-with-newline}\n{options}\n")
        .mut_args(|argument| {
            let is_setting = argument.get_help_heading() == Some("Settings");
            argument.hide(!is_setting).hide_long_help(false)
        })
        .mut_subcommands(|verb| verb.hide(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_are_listed_without_other_options() {
        let text = settings_command().render_long_help().to_string();
        assert!(text.contains("--max-bytes") && text.contains("MODEL_CACHE_DIR"), "{text}");
        assert!(!text.contains("--quiet") && !text.contains("Commands:"), "{text}");
    }
}
