//! `man`: prints manual pages, for `man -l` or for a package.

use crate::arguments::Arguments;
use crate::exit::EXITS;
use crate::output::Output;
use clap::{Args, Command, CommandFactory};
use clap_mangen::roff::{Roff, bold, roman};
use modelcache::settings::SETTINGS;
use modelcache::{Error, ErrorKind, Result};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Print a manual page as roff
///
/// Example: modelcache man get | man -l -
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// The command to document; without it, the program itself
    #[arg(value_name = "COMMAND")]
    pub(crate) verb: Option<String>,
    /// Write the pages of the program and of all commands into this folder, for a package
    #[arg(long = "output", value_name = "FOLDER", conflicts_with = "verb")]
    pub(crate) folder: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(&self, output: &Output) -> Result<()> {
        let page = match (&self.folder, &self.verb) {
            (Some(folder), _) => return write_pages(folder),
            (None, None) => top_page(),
            (None, Some(name)) => verb_page(find(&built_command(), name)?),
        };
        output.print_unescaped(&page.map_err(|cause| cannot_write("the page", cause))?)
    }
}

/// Writes all pages into `folder`, which is created if necessary.
fn write_pages(folder: &Path) -> Result<()> {
    let write = |name: &str, page: io::Result<String>| {
        let path = folder.join(format!("{name}.1"));
        page.and_then(|page| fs::write(&path, page)).map_err(|cause| cannot_write(path.display(), cause))
    };
    fs::create_dir_all(folder).map_err(|cause| cannot_write(folder.display(), cause))?;
    write("modelcache", top_page())?;
    for verb in visible_verbs(&built_command()) {
        write(&format!("modelcache-{}", verb.get_name()), verb_page(verb))?;
    }
    Ok(())
}

fn cannot_write(what: impl Display, cause: io::Error) -> Error {
    Error::new(ErrorKind::Other, format!("cannot write {what}")).cause(cause)
}

/// Returns the commands that have a page.
fn visible_verbs(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help")
}

/// Returns the command line with the values that clap derives, such as the full name of each command.
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

/// Returns the command with this name.
fn find<'a>(command: &'a Command, name: &str) -> Result<&'a Command> {
    visible_verbs(command).find(|verb| verb.get_name() == name).ok_or_else(|| {
        let names: Vec<_> = visible_verbs(command).map(Command::get_name).collect();
        Error::invalid(format!("unknown command {name:?}")).hint(format!("commands: {}", names.join(", ")))
    })
}

/// Returns the page of one command.
fn verb_page(verb: &Command) -> io::Result<String> {
    let version = env!("CARGO_PKG_VERSION");
    let page = clap_mangen::Man::new(verb.clone()).source(format!("modelcache {version}"));
    let mut text = Vec::new();
    page.render(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
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
