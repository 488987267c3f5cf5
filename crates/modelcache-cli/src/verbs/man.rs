//! `man`: prints manual pages, for `man -l` or for a package.

use crate::arguments::Arguments;
use crate::exit::EXITS;
use crate::output::Output;
use clap::{Args, Command, CommandFactory};
use clap_mangen::roff::{Roff, bold, roman};
use modelcache::settings::SETTINGS;
use modelcache::{Error, ErrorKind, Result};
use std::io;

/// Print a manual page as roff
///
/// Example: modelcache man get | man -l -
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// The command to document; without it, the program itself
    #[arg(value_name = "COMMAND")]
    pub(crate) verb: Option<String>,
}

impl Man {
    pub(crate) fn run(&self, output: &Output) -> Result<()> {
        let page = match &self.verb {
            None => top_page(),
            Some(verb) => verb_page(verb)?,
        };
        output
            .print_unescaped(&page.map_err(|cause| Error::new(ErrorKind::Other, "cannot write the page").cause(cause))?)
    }
}

/// Returns the command line with all derived values filled in.
fn built_command() -> Command {
    let mut command = Arguments::command();
    command.build();
    command
}

/// Returns the page of the program.
fn top_page() -> io::Result<String> {
    // The exit codes are left out of the long help: they get a section of their own.
    let page = clap_mangen::Man::new(Arguments::command().after_long_help(""));
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    page.render_subcommands_section(&mut text)?;
    exits_and_variables().to_writer(&mut text)?;
    page.render_version_section(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Returns the page of one command.
fn verb_page(verb: &str) -> Result<io::Result<String>> {
    let command = built_command();
    let is_visible = |verb: &&Command| !verb.is_hide_set() && verb.get_name() != "help";
    let verbs = || command.get_subcommands().filter(is_visible);
    let Some(found) = verbs().find(|command| command.get_name() == verb) else {
        let names: Vec<_> = verbs().map(Command::get_name).collect();
        return Err(Error::invalid(format!("unknown command {verb:?}")).hint(format!("commands: {}", names.join(", "))));
    };
    let version = env!("CARGO_PKG_VERSION");
    let page = clap_mangen::Man::new(found.clone()).source(format!("modelcache {version}"));
    let mut text = Vec::new();
    Ok(page.render(&mut text).map(|()| String::from_utf8_lossy(&text).into_owned()))
}

/// Returns the sections for exit codes and environment variables.
fn exits_and_variables() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["EXIT STATUS"]);
    for exit in EXITS {
        roff.control("TP", []).text([bold(exit.code.to_string())]).text([roman(exit.meaning)]);
    }
    roff.control("SH", ["ENVIRONMENT"]);
    for setting in SETTINGS {
        let Some(variable) = setting.variable else { continue };
        let meaning = format!("{} Default: {}.", setting.description, setting.default).replace('`', "");
        roff.control("TP", []).text([bold(variable)]).text([roman(meaning)]);
    }
    roff
}
